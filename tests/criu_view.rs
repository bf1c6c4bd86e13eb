//! Restores from the view of a cache with the real CRIU: at once and lazily, for both commit points, more than one from
//! the same view, and what is left when a part of it fails or is killed.

#[path = "criu/harness.rs"]
mod harness;
#[path = "criu/watch.rs"]
mod watch;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use harness::namespace::{Held, Namespace};
use harness::{Answer, Bench, Daemon, PATIENCE, Process, descendants, free_port, states, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use watch::Watch;

const OURS: &str = env!("CARGO_BIN_EXE_criu-relay");
const SCRIPT: [&str; 2] = ["--action-script", OURS];
const INVENTORY: &str = "inventory.img";
const TREE: u32 = 4;

/// A directory on a tmpfs; it is removed at the end.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(test: &str) -> Self {
        let dir = Path::new("/dev/shm").join(format!("criu-view-{}-{test}", std::process::id()));
        make_dir(&dir);
        Self(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn make_dir(dir: &Path) {
    fs::DirBuilder::new().mode(0o700).create(dir).expect("a directory can be created");
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// A migration by way of a view, which is in a PID namespace with its cache.
struct Migration {
    // In the order in which they are ended.
    namespace: Namespace,
    workload: Process,
    before: Answer,
    proxy: Daemon,
    wait: Daemon,
    cache: Daemon,
    view: PathBuf,
    /// Where CRIU writes at a restore: the view is only read.
    work: PathBuf,
    port: u16,
    _tmpfs: Option<Tmpfs>,
    bench: Bench,
}

/// A copy, and what it came by.
struct Restored {
    restore: Daemon,
    lazy: Option<Daemon>,
}

impl Migration {
    fn new(test: &str, commit: &str, workload: &[&str], cache: &[&str]) -> Option<Self> {
        let bench = Bench::new(test)?;
        let tmpfs = cache.contains(&"--persist").then(|| Tmpfs::new(test));
        let view = tmpfs.as_ref().map_or(bench.path("view"), |tmpfs| tmpfs.0.join("view"));
        let work = bench.path("work");
        make_dir(&work);
        let namespace = bench.namespace();
        let port = free_port();
        let cache =
            bench.cache_in_at(&namespace, port, &[&["--view", view.to_str().unwrap()], cache].concat());
        let workload = bench.workload(workload);
        let before = bench.ask();
        let wait = bench.wait_in(&namespace, &view);
        let mut proxy = bench.proxy(port, &["--commit", commit]);
        proxy.logs("connected to");
        Some(Self { namespace, workload, before, proxy, wait, cache, view, work, port, _tmpfs: tmpfs, bench })
    }

    fn dump(&self, args: &[&str]) -> Process {
        self.bench.dump_with(&self.workload, &[args, &SCRIPT].concat())
    }

    /// Starts a dump, and returns when a restore may begin.
    fn moved_into_view(&mut self) -> Process {
        let dump = self.dump(&[]);
        assert_eq!(self.wait.process.end(), 0, "criu-relay wait: {}", self.wait.log());
        let said = self.wait.log();
        assert_eq!(
            said.lines().last().unwrap(),
            self.view.to_str().unwrap(),
            "where it is to be restored from"
        );
        assert!(self.view.join(INVENTORY).symlink_metadata().is_ok(), "it is there when it is said to be");
        dump
    }

    fn restore_in(&self, namespace: &Namespace, args: &[&str]) -> Daemon {
        let args = [&["-W", self.work.to_str().unwrap()], args].concat();
        self.bench.criu_in(namespace, "restore", &self.view, &args)
    }

    fn restore(&self, args: &[&str]) -> Restored {
        Restored { restore: self.restore_in(&self.namespace, args), lazy: None }
    }

    fn restore_lazily(&self, args: &[&str]) -> Restored {
        let work = self.work.to_str().unwrap();
        let mut lazy = self.bench.criu_in(&self.namespace, "lazy-pages", &self.view, &["-W", work]);
        lazy.logs("aiting for incoming connections");
        let restore = self.restore_in(&self.namespace, &[args, &["--lazy-pages"]].concat());
        Restored { restore, lazy: Some(lazy) }
    }

    /// The process is the same, and well.
    fn is_well(&self) -> Answer {
        let after = self.bench.ask();
        assert_eq!((after.pid, after.processes), (self.before.pid, self.before.processes));
        assert!(after.counter > self.before.counter, "it went on: {:?}, {after:?}", self.before);
        after
    }

    /// The source is dead, and both daemons know that it has moved.
    fn is_over(&mut self, mut dump: Process) {
        assert_eq!(dump.end(), 0, "criu dump");
        assert_eq!(self.workload.end(), -9, "CRIU kills what it has dumped");
        assert_eq!(self.proxy.process.end(), 0, "the proxy");
    }

    fn cache_is_over(&mut self) {
        assert_eq!(self.cache.process.end(), 0, "the cache: {}", self.cache.log());
        // The directory itself goes only with the cache that has made it.
        assert!(names(&self.view).is_empty(), "{:?} stay", names(&self.view));
        assert!(self.bench.records().is_empty(), "{:?}", self.bench.records());
    }

    /// It has not moved: the source is well, and nothing is left of a copy.
    fn stayed(&mut self) {
        assert_eq!(self.workload.ended(), None, "the source runs on");
        self.is_well();
        self.no_copy();
        let _ = self.proxy.process.end();
        wait_for("end of all records", PATIENCE, || self.bench.records().is_empty().then_some(()));
    }

    fn no_copy(&self) {
        wait_for("end of the copy", PATIENCE, || {
            states(&self.namespace.copy()).chars().all(|state| "ZX".contains(state)).then_some(())
        });
    }
}

/// What is to be moved. With 512 in CRIU_RELAY_MIB this is the long run.
fn mib() -> String {
    std::env::var("CRIU_RELAY_MIB").unwrap_or("48".into())
}

fn a_tree_moves(test: &str, commit: &str, lazily: bool) {
    let mib = mib();
    let Some(mut m) = Migration::new(test, commit, &["--tree", "--heap", &mib], &[]) else { return };
    let dump = m.moved_into_view();
    let mut copy = if lazily { m.restore_lazily(&SCRIPT) } else { m.restore(&SCRIPT) };
    m.is_over(dump);
    m.is_well();
    assert_eq!(m.namespace.copy().len(), TREE as usize);
    if let Some(lazy) = &mut copy.lazy {
        assert_eq!(lazy.process.end(), 0, "criu lazy-pages");
        assert!(lazy.has_logged("UFFD transferred pages"), "it is what has brought them");
    }
    m.cache_is_over();
    // All its memory is there when nobody is left who could bring it.
    assert!(m.resident() > mib.parse::<u64>().expect("a number") << 10);
    m.is_well();
    assert_eq!(copy.restore.process.ended(), None, "criu restore waits for its copy");
}

#[test]
fn a_tree_moves_stored() {
    a_tree_moves("a_tree_moves_stored", "stored", false);
}

#[test]
fn a_tree_moves_restored() {
    a_tree_moves("a_tree_moves_restored", "restored", false);
}

#[test]
fn a_tree_moves_lazily_stored() {
    a_tree_moves("a_tree_moves_lazily_stored", "stored", true);
}

#[test]
fn a_tree_moves_lazily_restored() {
    a_tree_moves("a_tree_moves_lazily_restored", "restored", true);
}

#[test]
fn two_restores_from_one_view() {
    let Some(mut m) = Migration::new("two_restores_from_one_view", "stored", &["--tree"], &["--keep"]) else {
        return;
    };
    let dump = m.moved_into_view();
    let mut first = m.restore(&SCRIPT);
    m.is_over(dump);
    m.is_well();
    m.cache.logs("the restore has succeeded");
    for pid in m.namespace.copy() {
        // Errors: it has gone with its parent.
        let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
    }
    first.restore.process.end();
    m.no_copy();

    // Whoever wants it again knows that it is there; criu-relay wait is for the next one.
    let _second = m.restore_lazily(&SCRIPT);
    m.is_well();
    wait_for("two restores", PATIENCE, || {
        (m.cache.log().matches("the restore has succeeded").count() == 2).then_some(())
    });
    m.cache.process.signal(Signal::TERM);
    m.cache_is_over();
    m.is_well();
}

/// The numbers behind every `"name":`, as crit prints them.
fn numbers(text: &str, name: &str) -> Vec<u32> {
    let name = format!("\"{name}\": ");
    let values = text.split(&name).skip(1).map(|rest| rest.split([',', '\n', '}']).next().unwrap().trim());
    values.map(|value| value.parse().expect("a number")).collect()
}

#[test]
fn crit_decodes_an_image_in_the_view() {
    let test = "crit_decodes_an_image_in_the_view";
    let Some(mut m) = Migration::new(test, "stored", &["--tree"], &[]) else { return };
    let root = m.workload.pid();
    let pids: BTreeSet<_> = descendants(root).into_iter().chain([root]).collect();
    let mut threads = BTreeSet::new();
    for pid in &pids {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        threads.extend(tasks.map(|task| task.file_name().to_str().unwrap().parse::<u32>().unwrap()));
    }
    let dump = m.moved_into_view();
    let decode = |name: &str| {
        let image = m.view.join(name).display().to_string();
        m.bench.crit_in(&m.namespace, &["decode", "--pretty", "-i", &image])
    };
    let tree = match decode("pstree.img") {
        Ok(tree) => tree,
        Err(why) => return harness::skip(test, &why),
    };
    let found = numbers(&tree, "pid");
    assert_eq!((found.len(), found.into_iter().collect()), (TREE as usize, pids.clone()), "{tree}");
    let (start, end) = ("\"threads\": [", "]");
    let found = tree.split(start).skip(1).flat_map(|rest| rest.split(end).next().unwrap().split(','));
    assert_eq!(found.map(|tid| tid.trim().parse().unwrap()).collect::<BTreeSet<u32>>(), threads, "{tree}");
    let core = decode(&format!("core-{root}.img")).unwrap();
    assert!(core.contains("\"comm\": \"migrant\""), "{core}");
    // What only reads is nobody whom the cache would have to hear of.
    let _copy = m.restore(&SCRIPT);
    m.is_over(dump);
    m.is_well();
    m.cache_is_over();
}

// --- It stays where it is.

/// What a failed dump leaves: nothing, and nobody could have taken it for a whole one at any time.
fn has_failed(m: &mut Migration, watch: &Watch) {
    assert_eq!(m.wait.process.end(), 1, "criu-relay wait: {}", m.wait.log());
    assert!(m.wait.has_logged("the dump failed"), "{}", m.wait.log());
    assert_eq!(m.cache.process.end(), 1, "the cache");
    assert!(!m.cache.has_logged("the proxy has not said that it knows"), "nobody had to wait");
    m.stayed();
    assert!(!m.view.exists(), "it stays with {:?}", names(&m.view));
    let seen = watch.seen();
    assert!(seen.iter().any(|path| path.ends_with("pstree.img")), "the dump has come so far: {seen:?}");
    assert!(!seen.iter().any(|path| path.ends_with(INVENTORY)), "{seen:?}");
}

#[test]
fn a_dump_that_fails_when_it_is_stored() {
    for (n, cache) in [&[][..], &["--persist"]].into_iter().enumerate() {
        let test = format!("a_dump_that_fails_when_it_is_stored-{n}");
        let Some(mut m) = Migration::new(&test, "stored", &["--tree"], cache) else { return };
        let watch = Watch::new(std::slice::from_ref(&m.view));
        let other = m.bench.script("fails", "exit 1").display().to_string();
        // The first on the command line runs last.
        assert_ne!(m.dump(&["--action-script", &other]).end(), 0, "criu dump");
        assert!(m.cache.has_logged("the dump is stored"));
        has_failed(&mut m, &watch);
    }
}

#[test]
fn a_dump_that_is_killed_before_it_is_complete() {
    for (n, cache) in [&[][..], &["--persist"]].into_iter().enumerate() {
        let test = format!("a_dump_that_is_killed_before_it_is_complete-{n}");
        let Some(mut m) = Migration::new(&test, "stored", &["--tree"], cache) else { return };
        let watch = Watch::new(std::slice::from_ref(&m.view));
        let gate = m.bench.gate("post-dump");
        let args = gate.args();
        // The last on the command line runs first.
        let mut dump = m.bench.dump_with(&m.workload, &[&SCRIPT[..], &[&args[0], &args[1]]].concat());
        gate.is_reached();
        wait_for("image in the view", PATIENCE, || m.view.join("pstree.img").symlink_metadata().ok());
        assert!(!m.cache.has_logged("the dump is stored"));
        dump.signal(Signal::KILL);
        has_failed(&mut m, &watch);
    }
}

#[test]
fn a_restore_from_the_view_whose_pid_is_taken() {
    let test = "a_restore_from_the_view_whose_pid_is_taken";
    let Some(mut m) = Migration::new(test, "restored", &["--tree"], &[]) else { return };
    m.bench.take_pid(&m.namespace, m.workload.pid());
    let mut dump = m.moved_into_view();
    let mut copy = m.restore(&SCRIPT);
    assert_ne!(copy.restore.process.end(), 0, "criu restore");
    assert_ne!(dump.end(), 0, "criu dump");
    m.stayed();
    assert!(m.proxy.has_logged("the restore on the other side has failed"), "{}", m.proxy.log());
    assert_eq!(m.cache.process.end(), 1, "the cache");
    assert!(!m.view.exists(), "it stays with {:?}", names(&m.view));
}

// --- What is killed while `criu lazy-pages` still fills in.

/// So much at once is filled in only when nobody has asked for it, and there is a lot more.
const IN_THE_MIDDLE: &str = "/1048576\n";

/// A process that has been restored, while not even half of its memory is there.
struct Filling {
    lazy: Held,
    _restore: Daemon,
    m: Migration,
}

impl Filling {
    fn new(test: &str, workload: &[&str], cache: &[&str]) -> Option<Self> {
        let mut m = Migration::new(test, "stored", workload, cache)?;
        let dump = m.moved_into_view();
        let args = ["-W", m.work.to_str().unwrap()];
        let lazy = m.bench.criu_held_in(&m.namespace, "lazy-pages", &m.view, &args, IN_THE_MIDDLE);
        let socket = m.work.join("lazy-pages.socket");
        wait_for("lazy-pages.socket", PATIENCE, || socket.exists().then_some(()));
        let restore = m.restore_in(&m.namespace, &[&SCRIPT[..], &["--lazy-pages"]].concat());
        lazy.is_reached();
        m.is_over(dump);
        m.cache.logs("still reads images: it is waited for");
        let resident = m.resident();
        assert!(resident < 64 << 10, "{resident} KiB of 128 MiB are there");
        Some(Self { lazy, _restore: restore, m })
    }
}

impl Migration {
    /// How many KiB of the root of the copy there are.
    fn resident(&self) -> u64 {
        // The root has the most.
        let rss = self.namespace.copy().into_iter().filter_map(|pid| {
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            rollup.split_whitespace().skip_while(|word| *word != "Rss:").nth(1)?.parse::<u64>().ok()
        });
        rss.max().unwrap_or(0)
    }
}

#[test]
fn the_cache_is_killed_while_pages_are_filled_in() {
    for (n, cache) in [&[][..], &["--persist"]].into_iter().enumerate() {
        let test = format!("the_cache_is_killed_while_pages_are_filled_in-{n}");
        let Some(mut f) = Filling::new(&test, &["--tree", "--heap", "128"], cache) else { return };
        f.m.cache.process.signal(Signal::KILL);
        assert_eq!(f.m.cache.process.end(), -9);
        f.lazy.opens();
        // It has every image open: the memory is there until it ends.
        assert_eq!(f.lazy.process.end(), 0, "criu lazy-pages");
        f.m.is_well();
        assert!(f.m.resident() > 128 << 10);
    }
}

/// What has not come is zeros from then on, which nobody tells the process, nor the cache: it may fall, or compute with
/// them, and even find that all is right, since what it compares with may be zero too.
#[test]
fn lazy_pages_is_killed_while_it_fills_in() {
    let test = "lazy_pages_is_killed_while_it_fills_in";
    let Some(mut f) = Filling::new(test, &["--heap", "128"], &[]) else { return };
    f.lazy.process.signal(Signal::KILL);
    assert_eq!(f.lazy.process.end(), -9);
    // The restore had succeeded, and nobody reads any more.
    f.m.cache_is_over();
    assert!(f.m.resident() < 64 << 10, "nothing more has come");
}

// --- The cache is killed before the restore.

/// Kills the cache when its source is dead, and the images are the only copy.
fn only_images(test: &str) -> Option<Migration> {
    let mut m = Migration::new(test, "stored", &["--tree"], &["--persist"])?;
    let dump = m.moved_into_view();
    m.is_over(dump);
    m.cache.process.signal(Signal::KILL);
    assert_eq!(m.cache.process.end(), -9);
    Some(m)
}

#[test]
fn images_that_outlive_the_cache_are_restored_without_it() {
    let Some(m) = only_images("images_that_outlive_the_cache_are_restored_without_it") else { return };
    // The /proc of the cache is not needed.
    let elsewhere = m.bench.namespace();
    let _restore = m.restore_in(&elsewhere, &[]);
    m.is_well();
    assert_eq!(elsewhere.copy().len(), TREE as usize);
    assert!(m.namespace.copy().is_empty());
}

#[test]
fn images_that_outlive_the_cache_are_served_by_the_next() {
    for (n, lazily) in [false, true].into_iter().enumerate() {
        let test = format!("images_that_outlive_the_cache_are_served_by_the_next-{n}");
        let Some(mut m) = only_images(&test) else { return };
        let view = m.view.display().to_string();
        m.cache = m.bench.cache_in_at(&m.namespace, m.port, &["--view", &view, "--persist"]);
        let mut wait = m.bench.wait_in(&m.namespace, &m.view);
        assert_eq!(wait.process.end(), 0, "criu-relay wait: {}", wait.log());
        let _copy = if lazily { m.restore_lazily(&SCRIPT) } else { m.restore(&SCRIPT) };
        m.is_well();
        m.cache_is_over();
        m.is_well();
    }
}
