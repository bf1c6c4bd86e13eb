//! `--view DIR --persist`: images that outlive the cache. It is killed, or told to end, at each stage of a session, and
//! started again in the same directories; the CRIUs are played, as in the tests of the view.

mod common;

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use common::relay::FakeProxy;
use common::script::{Bench, FakeCriu, Source, pre_stream, succeeds};
use common::view::{Place, Watch};
use common::*;
use criu_relay::wire::relay::{self as wire, Kind};
use rustix::process::Signal;

/// CRIU as a process of its own, when the environment says so.
#[test]
fn fake_criu() {
    common::script::fake_criu();
}

const ALL: [&str; 3] = ["inventory.img", "pages-1.img", "pstree.img"];

/// A cache whose images outlive it.
struct Kept {
    place: Place,
    cache: Daemon,
}

impl Kept {
    /// None: there is no tmpfs where one can be expected.
    fn new(args: &[&str]) -> Option<Self> {
        let Some(place) = Place::in_memory() else {
            skip("persist", "/dev/shm is no tmpfs");
            return None;
        };
        let cache = Daemon::cache(&[&["--view", place.arg(), "--persist"], args].concat());
        Some(Self { place, cache })
    }

    /// It is killed, and another one is started.
    fn kill(&mut self) {
        let dir = self.cache.kill();
        self.start(dir);
    }

    fn start(&mut self, dir: Dir) {
        let port = self.cache.port;
        self.cache = Daemon::cache_at(dir, port, &["--view", self.place.arg(), "--persist"]);
    }

    /// The same after it has ended by itself.
    fn start_again(&mut self) {
        let dir = std::mem::replace(&mut self.cache.dir, Dir::new());
        self.start(dir);
    }

    fn bench(&self) -> Bench {
        Bench::new(self.cache.port, &[])
    }

    /// Everything is stored, and CRIU was let go; the source lives.
    fn stored(&mut self) -> Bench {
        let mut bench = self.bench();
        bench.images();
        bench.post_dump().agrees();
        let hidden = self.hidden();
        assert_eq!(self.place.names(), [&hidden, "pages-1.img", "pstree.img"]);
        bench
    }

    /// What is withheld: behind its name is that of the session.
    fn hidden(&self) -> String {
        let names = self.place.names();
        let hidden: Vec<_> = names.into_iter().filter(|name| name.starts_with(".inventory.img.")).collect();
        assert!(hidden.len() == 1 && hidden[0].len() == ".inventory.img.".len() + 32, "{hidden:?}");
        hidden[0].clone()
    }

    /// Released, and the proxy knows.
    fn published(&mut self) {
        let mut bench = self.stored();
        self.release(&mut bench);
        self.is_published();
    }

    fn release(&mut self, bench: &mut Bench) {
        bench.source.kill();
        bench.disconnect();
        assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
        assert_eq!(bench.proxy.records(), [] as [std::path::PathBuf; 0]);
    }

    fn is_published(&self) {
        self.place.appears("inventory.img");
        assert_eq!(self.place.names(), ALL);
        assert!(self.place.read("pages-1.img") == pattern(300_000, 1));
        assert_eq!(self.place.read("inventory.img"), b"the inventory");
    }

    /// It is restored by a stream, as if nothing had been.
    fn streams(mut self) {
        pre_stream(&self.cache).agrees();
        let mut restore = Restore::connect(&self.cache);
        assert_eq!(restore.read("inventory.img").unwrap(), b"the inventory");
        assert!(restore.read("pages-1.img") == Some(pattern(300_000, 1)));
        assert_eq!(restore.read("pstree.img").unwrap(), b"the tree");
        assert_eq!(restore.read("other.img"), None);
        let copy = succeeds(&self.cache);
        drop(restore);
        self.is_over();
        assert!(copy.runs());
    }

    /// The same from the directory.
    fn restores(mut self) {
        self.place.wait(&mut self.cache).finds(&self.place.dir);
        let copy = Source::new();
        let mut criu = FakeCriu::start_in(&self.place.dir, &copy);
        for line in ["pre-restore", "read", "post-restore", "pre-resume"] {
            criu.does(line);
        }
        drop(criu);
        self.is_over();
        assert!(copy.runs());
    }

    fn is_over(&mut self) {
        assert_eq!(self.cache.wait(), 0, "{}", self.cache.log());
        self.nothing_is_left();
    }

    fn nothing_is_left(&self) {
        let left: Vec<_> = fs::read_dir(&self.place.dir).into_iter().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(self.cache.records(), [] as [std::path::PathBuf; 0]);
    }

    /// The source lives, and nothing is left of what it had sent.
    fn rolls_back(mut self, mut bench: Bench) {
        bench.disconnect();
        assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
        assert!(bench.proxy.log().contains("the cache has rolled back"), "{}", bench.proxy.log());
        assert_eq!(self.cache.wait(), 1, "{}", self.cache.log());
        assert!(bench.source.runs());
        assert_eq!(bench.proxy.records(), [] as [std::path::PathBuf; 0]);
        self.nothing_is_left();
    }
}

/// What a cache says that does not start.
fn fails_to_start(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new(binary());
    command.args(["cache", "--port", "0", "-D"]).arg(dir).args(args).stdin(Stdio::null());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

// --- Without any failure.

#[test]
fn images_are_files_from_the_start() {
    let Some(mut kept) = Kept::new(&[]) else { return };
    let watch = Watch::new(&kept.place.dir);
    let mut bench = kept.bench();
    let dump = bench.dump.as_mut().unwrap();
    dump.write("empty.img", b"");
    kept.place.appears("empty.img");
    let meta = fs::symlink_metadata(kept.place.dir.join("empty.img")).unwrap();
    assert!(meta.is_file() && meta.mode() & 0o7777 == 0o600 && meta.nlink() == 1);
    bench.images();
    let waiter = kept.place.wait(&mut kept.cache);
    bench.post_dump().agrees();
    let hidden = kept.hidden();
    kept.release(&mut bench);
    waiter.finds(&kept.place.dir);
    let seen = watch.seen();
    assert_eq!(seen[seen.len() - 2..], [hidden, "inventory.img".into()]);
    fs::remove_file(kept.place.dir.join("empty.img")).unwrap();
    kept.is_published();
    kept.restores();
}

#[test]
fn an_image_that_grows_leaves_nothing_behind() {
    let Some(mut kept) = Kept::new(&[]) else { return };
    let mut peer = OldProxy::connect(&kept.cache);
    peer.send(&key("", "pages-1.img"), &pattern(300_000, 1)[..100_000]);
    kept.place.appears("pages-1.img");
    peer.header(&key("", "pages-1.img"), criu_relay::wire::criu::WriteMode::Append, 300_000);
    std::io::Write::write_all(&mut peer.0, &pattern(300_000, 1)[100_000..]).unwrap();
    peer.end();
    kept.is_published();
    kept.cache.wait_log("the dump can be restored from");
    kept.restores();
}

#[test]
fn with_keep_one_follows_the_other() {
    let Some(mut kept) = Kept::new(&["--keep"]) else { return };
    for times in 1..=2 {
        kept.published();
        let copy = Source::new();
        let mut criu = FakeCriu::start_in(&kept.place.dir, &copy);
        for line in ["pre-restore", "read", "post-restore", "pre-resume"] {
            criu.does(line);
        }
        kept.cache.wait_log_times("the restore has succeeded", times);
        // Who comes upon it later is not to restore it again.
        assert!(!kept.place.has("inventory.img"));
        criu.tell("pre-restore");
        criu.hears("there is no dump in the view that may be restored now");
    }
    assert_eq!(kept.cache.terminate(), 0, "{}", kept.cache.log());
    kept.nothing_is_left();
}

#[test]
fn a_dump_that_is_rolled_back_goes() {
    let Some(mut kept) = Kept::new(&[]) else { return };
    let bench = kept.stored();
    kept.rolls_back(bench);
}

// --- The cache is killed.

#[test]
fn killed_before_the_dump_is_complete() {
    let Some(mut kept) = Kept::new(&[]) else { return };
    let mut bench = kept.bench();
    bench.images();
    kept.place.appears(".inventory.img");
    kept.place.appears("pages-1.img");
    kept.place.appears("pstree.img");
    let dir = kept.cache.kill();
    assert_eq!(kept.place.names(), [".inventory.img", "pages-1.img", "pstree.img"]);
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
    assert!(bench.source.runs());
    kept.start(dir);
    let said = "2 images (293.0 KiB) of a dump that was never complete were left in";
    assert!(kept.cache.log().contains(said), "{}", kept.cache.log());
    kept.nothing_is_left_but_the_socket();
    // The next dump comes as if nothing had been.
    kept.published();
    kept.streams();
}

impl Kept {
    fn nothing_is_left_but_the_socket(&self) {
        assert!(self.place.names().is_empty(), "{:?}", self.place.names());
        assert_eq!(self.cache.records(), [] as [std::path::PathBuf; 0]);
    }
}

#[test]
fn killed_while_the_source_decides() {
    for release in [true, false] {
        let Some(mut kept) = Kept::new(&[]) else { return };
        let mut bench = kept.stored();
        let hidden = kept.hidden();
        // More than once.
        for _ in 0..2 {
            kept.kill();
            assert!(
                kept.cache.log().contains("the dump is stored; its source decides"),
                "{}",
                kept.cache.log()
            );
            assert_eq!(kept.hidden(), hidden);
        }
        // Nobody gets it before.
        let mut early = FakeCriu::start_in(&kept.place.dir, &bench.source);
        early.tell("pre-restore");
        early.hears("there is no dump in the view that may be restored now");
        if release {
            kept.release(&mut bench);
            kept.is_published();
            kept.streams();
        } else {
            kept.rolls_back(bench);
        }
    }
}

#[test]
fn the_source_decides_while_the_cache_is_away() {
    for release in [true, false] {
        let Some(mut kept) = Kept::new(&[]) else { return };
        let mut bench = kept.stored();
        let dir = kept.cache.kill();
        if release {
            bench.source.kill();
        }
        bench.disconnect();
        bench.proxy.wait_log("the link to the cache is lost");
        kept.start(dir);
        if release {
            assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
            kept.is_published();
            kept.restores();
        } else {
            kept.rolls_back(bench);
        }
    }
}

#[test]
fn killed_when_the_source_is_dead() {
    for stream in [true, false] {
        let Some(mut kept) = Kept::new(&[]) else { return };
        kept.published();
        let dir = kept.cache.kill();
        // They are there without any daemon.
        kept.is_published();
        assert!(records(&dir).is_empty());
        kept.start(dir);
        assert!(kept.cache.log().contains("an earlier run has left 3 images, 293.0 KiB, in the view"));
        kept.is_published();
        refuses_unscripted(&kept);
        if stream { kept.streams() } else { kept.restores() }
    }
}

/// A played proxy that has released its session, and has not heard that it was understood.
fn untold(kept: &mut Kept) -> FakeProxy {
    let mut proxy = FakeProxy::connect(&kept.cache);
    proxy.begin(1, true);
    proxy.stream_image("pages-1.img", &pattern(300_000, 1));
    proxy.end();
    proxy.release();
    kept.cache.wait_log("released by its source");
    kept.is_published();
    proxy
}

/// The dump was scripted: a restore that can't say how it ends gets nothing of it.
fn refuses_unscripted(kept: &Kept) {
    let mut unscripted = Restore::connect(&kept.cache);
    unscripted.ask("inventory.img");
    assert_eq!(unscripted.answer(), None);
}

/// It comes back, and asks.
fn told(kept: &mut Kept, before: &FakeProxy) {
    let mut proxy = FakeProxy::connect(&kept.cache);
    proxy.session.clone_from(&before.session);
    proxy.release();
    match proxy.peer.hear() {
        Kind::Released(released) => assert_eq!(released.session, before.session),
        other => panic!("not released but {other:?}"),
    }
    proxy.peer.say(Kind::Settled(wire::Settled { session: before.session.clone() }));
    wait_until("it is forgotten", || kept.cache.records().is_empty());
}

#[test]
fn killed_before_the_source_has_heard_that_it_is_released() {
    let Some(mut kept) = Kept::new(&[]) else { return };
    let proxy = untold(&mut kept);
    let record = fs::read_to_string(&kept.cache.records()[0]).unwrap();
    assert!(record.contains("state released") && record.contains(kept.place.arg()), "{record}");
    kept.kill();
    kept.is_published();
    told(&mut kept, &proxy);
    refuses_unscripted(&kept);
    kept.streams();
}

// --- The cache is told to end.

#[test]
fn ended_before_the_dump_is_complete() {
    let Some(mut kept) = Kept::new(&[]) else { return };
    let mut bench = kept.bench();
    bench.images();
    kept.place.appears(".inventory.img");
    assert_eq!(kept.cache.terminate(), 1);
    kept.nothing_is_left();
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.source.runs());
}

#[test]
fn ended_while_the_source_decides() {
    for release in [true, false] {
        let Some(mut kept) = Kept::new(&[]) else { return };
        let mut bench = kept.stored();
        let hidden = kept.hidden();
        kept.cache.signal(Signal::TERM);
        kept.cache.wait_log("asked to end, but the dump has not been restored");
        assert!(kept.cache.is_running());
        assert_eq!(kept.cache.terminate(), 1, "{}", kept.cache.log());
        assert!(kept.cache.log().contains("3 images stay in the view"), "{}", kept.cache.log());
        assert_eq!((kept.hidden(), kept.cache.records().len()), (hidden, 1));
        kept.start_again();
        if release {
            kept.release(&mut bench);
            kept.is_published();
            kept.restores();
        } else {
            kept.rolls_back(bench);
        }
    }
}

#[test]
fn ended_when_the_source_is_dead() {
    let Some(mut kept) = Kept::new(&[]) else { return };
    kept.published();
    assert_eq!(kept.cache.terminate(), 1, "at once: nothing is lost");
    assert!(kept.cache.log().contains("3 images stay in the view"), "{}", kept.cache.log());
    assert!(!kept.place.has("relay-cache.sock"));
    kept.is_published();
    kept.start_again();
    kept.streams();
}

#[test]
fn ended_before_the_source_has_heard_that_it_is_released() {
    let Some(mut kept) = Kept::new(&[]) else { return };
    let proxy = untold(&mut kept);
    assert_eq!(kept.cache.terminate(), 1, "{}", kept.cache.log());
    assert_eq!(kept.cache.records().len(), 1, "the source may ask the next cache");
    kept.start_again();
    told(&mut kept, &proxy);
    kept.streams();
}

// --- Commit restored.

#[test]
fn killed_while_the_copy_is_made() {
    for with_copy in [false, true] {
        let Some(mut kept) = Kept::new(&[]) else { return };
        let waiter = kept.place.wait(&mut kept.cache);
        let mut bench = Bench::new(kept.cache.port, &["--commit", "restored"]);
        bench.images();
        let script = bench.post_dump();
        waiter.finds(&kept.place.dir);
        kept.is_published();
        let copy = Source::new();
        let mut criu = FakeCriu::start_in(&kept.place.dir, &copy);
        criu.does("pre-restore");
        criu.does("read");
        if with_copy {
            criu.does("post-restore");
        }
        kept.kill();
        script.refuses("");
        assert!(!kept.place.has("inventory.img"), "its source runs");
        // What CRIU has made is not to run.
        criu.tell(if with_copy { "pre-resume" } else { "post-restore" });
        let said = criu.hear();
        assert!(said.starts_with("1 ") || copy.is_dead(), "{said}");
        drop(criu);
        if with_copy {
            wait_until("it is dead", || copy.is_dead());
            bench.disconnect();
            assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
            assert!(bench.source.runs() && kept.place.names().is_empty());
            // It is as new.
            assert_eq!(kept.cache.terminate(), 1, "{}", kept.cache.log());
            kept.nothing_is_left();
        } else {
            kept.rolls_back(bench);
        }
    }
}

// --- What is refused.

#[test]
fn another_work_directory_is_refused() {
    let Some(mut kept) = Kept::new(&[]) else { return };
    let mut bench = kept.stored();
    let hidden = kept.hidden();
    // While it runs; and when it does not.
    let other = Dir::new();
    let args = ["--view", kept.place.arg(), "--persist"];
    let why = fails_to_start(&other.0, &args);
    assert!(why.contains("relay-cache.sock"), "{why}");
    let dir = kept.cache.kill();
    let why = fails_to_start(&other.0, &args);
    let session = &hidden[".inventory.img.".len()..];
    assert!(why.contains(session) && why.contains("start the cache with the -W of the earlier run"), "{why}");
    // Nor without the view.
    let why = fails_to_start(&dir.0, &[]);
    let start = format!("start the cache with --view {} --persist", kept.place.arg());
    assert!(why.contains(&start), "{why}");
    // Nor as links.
    let why = fails_to_start(&dir.0, &["--view", kept.place.arg()]);
    assert!(why.contains("holds images that are files"), "{why}");
    // Nor with an image less.
    let pages = kept.place.dir.join("pages-1.img");
    fs::rename(&pages, kept.place.dir.join("elsewhere")).unwrap();
    let why = fails_to_start(&dir.0, &args);
    assert!(why.contains("are not those that were stored: there are 2, 21 bytes"), "{why}");
    fs::rename(kept.place.dir.join("elsewhere"), &pages).unwrap();
    assert_eq!((kept.hidden(), kept.place.names().len()), (hidden, 3), "all of it is still there");
    kept.start(dir);
    kept.release(&mut bench);
    kept.is_published();
    kept.streams();
}

#[test]
fn a_disk_has_to_be_asked_for() {
    let around = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("crt-disk-{}", std::process::id()));
    fs::DirBuilder::new().mode(0o700).create(&around).unwrap();
    let place = Place::below(Dir(around));
    let is_tmpfs = rustix::fs::statfs(place.dir.parent().unwrap()).unwrap().f_type as u64 == 0x0102_1994;
    if is_tmpfs {
        return skip("a_disk_has_to_be_asked_for", "the target directory is in memory");
    }
    let why = fails_to_start(&Dir::new().0, &["--view", place.arg(), "--persist"]);
    assert!(why.contains("is not on a tmpfs") && why.contains("--persist=disk"), "{why}");
    assert!(!place.dir.exists());
    let cache = Daemon::cache(&["--view", place.arg(), "--persist=disk"]);
    let mut kept = Kept { place, cache };
    kept.published();
    kept.streams();
}

#[test]
fn a_file_system_that_is_full_fails_the_dump() {
    let place = Place::new();
    fs::create_dir(&place.dir).unwrap();
    let start = |then: &str| {
        let mount = format!("mount -t tmpfs -o size=4m,mode=700 none '{}' && {then}", place.arg());
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", &mount, "sh", binary(), "cache", "--port", "0"]);
        command
    };
    if !start("true").status().is_ok_and(|status| status.success()) {
        return;
    }
    let args = ["--view", place.arg(), "--persist"];
    let mut cache = Daemon::start(Dir::new(), start("exec \"$@\""), &args);
    let mut bench = Bench::new(cache.port, &[]);
    let mut image = bench.dump.as_mut().unwrap().try_open("pages-1.img").unwrap();
    // It may be told before it has written all.
    let _ = std::io::Write::write_all(&mut image, &pattern(6 << 20, 1));
    drop(image);
    assert_eq!(cache.wait(), 1, "{}", cache.log());
    assert!(cache.log().contains("the file system of the view (--view) is full"), "{}", cache.log());
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.source.runs());
}

#[test]
fn too_few_descriptors_fail_the_dump() {
    let Some(place) = Place::in_memory() else { return };
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 64; exec \"$@\"", "sh", binary(), "cache", "--port", "0"]);
    let mut cache = Daemon::start(Dir::new(), command, &["--view", place.arg(), "--persist"]);
    let mut bench = Bench::new(cache.port, &[]);
    let dump = bench.dump.as_mut().unwrap();
    for n in 0..100 {
        let Ok(mut image) = dump.try_open(&format!("core-{n}.img")) else { break };
        let _ = std::io::Write::write_all(&mut image, b"core");
    }
    assert_eq!(cache.wait(), 1, "{}", cache.log());
    assert!(cache.log().contains("as many as this process may have descriptors for (see ulimit -n)"));
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.source.runs() && !place.dir.exists());
}
