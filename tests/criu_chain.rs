//! `criu restore` from a chain of two snapshots: what lies in the directories and what links them. The snapshots come
//! in the remote dialect, which no CRIU of today speaks, through both daemons and into the view of the cache; what they
//! hold is from the real one.

#[path = "criu/chain.rs"]
mod chain;
mod common;
#[path = "criu/harness.rs"]
mod harness;
#[path = "criu/watch.rs"]
mod watch;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use chain::Images;
use common::{Style, dump_finish, id_list, key, write_remote};
use criu_relay::wire::criu::WriteMode;
use harness::namespace::Namespace;
use harness::{Answer, Bench, Daemon, PATIENCE, wait_for};
use rustix::process::Signal;
use watch::Watch;

const INVENTORY: &str = "inventory.img";
const LIST: &str = "parent";
const SCRIPT: [&str; 2] = ["--action-script", env!("CARGO_BIN_EXE_criu-relay")];

/// What is to be restored, and how it was.
struct Chain {
    snapshots: [Images; 2],
    before: Answer,
    bench: Bench,
}

impl Chain {
    fn new(test: &str, workload: &[&str]) -> Option<Self> {
        let bench = Bench::new(test)?;
        let mut workload = bench.workload(workload);
        let before = bench.ask();
        let dir = bench.path("dump");
        chain::write(&dir, &Images::new(), None);
        assert_eq!(bench.dump_to_files(&workload, &dir).end(), 0, "criu dump");
        assert_eq!(workload.end(), -9);
        let snapshots = chain::split(chain::read(&dir));
        Some(Self { snapshots, before, bench })
    }

    /// As files, and with this link. The directory of the second.
    fn to_files(&self, name: &str, parent: Option<&str>) -> PathBuf {
        let dir = self.bench.path(name);
        chain::write(&dir, &Images::new(), None);
        chain::write(&dir.join("1"), &self.snapshots[0], None);
        chain::write(&dir.join("2"), &self.snapshots[1], parent);
        dir.join("2")
    }

    /// A directory for what CRIU writes at a restore.
    fn work(&self, name: &str) -> PathBuf {
        let work = self.bench.path(name);
        chain::write(&work, &Images::new(), None);
        work
    }

    /// `criu lazy-pages` and the restore that it goes with.
    fn lazily(&self, namespace: &Namespace, dir: &Path, work: &Path) -> [Daemon; 2] {
        let args = ["-W", work.to_str().unwrap()];
        let mut lazy = self.bench.criu_in(namespace, "lazy-pages", dir, &args);
        lazy.logs("aiting for incoming connections");
        let restore = self.bench.criu_in(namespace, "restore", dir, &[&args[..], &["--lazy-pages"]].concat());
        [lazy, restore]
    }

    /// The copy is well, and it is the same process.
    fn check_copy(&self) {
        let after = self.bench.ask();
        assert_eq!((after.pid, after.processes), (self.before.pid, self.before.processes));
        assert!(after.counter > self.before.counter, "it went on: {:?}, {after:?}", self.before);
    }
}

/// That the chain is one: the tests of the view would prove nothing if CRIU did not need both of them.
#[test]
fn a_chain_of_files() {
    let Some(c) = Chain::new("a_chain_of_files", &["--tree"]) else { return };
    let dir = c.to_files("chain", Some("../1"));
    let mut namespace = c.bench.namespace();
    let _criu = c.bench.criu_in(&namespace, "restore", &dir, &[]);
    c.check_copy();
    assert_eq!(namespace.copy().len(), 4);
    namespace.kill();

    let mut namespace = c.bench.namespace();
    let [mut lazy, _criu] = c.lazily(&namespace, &dir, &c.work("lazy"));
    assert_eq!(lazy.process.end(), 0, "criu lazy-pages");
    assert!(lazy.has_logged("UFFD transferred pages"), "it is what has brought them");
    c.check_copy();
    namespace.kill();

    let dir = c.to_files("alone", None);
    let namespace = c.bench.namespace();
    let mut criu = c.bench.criu_in(&namespace, "restore", &dir, &[]);
    assert_ne!(criu.process.end(), 0, "criu restore without the first snapshot");
    assert!(criu.has_logged("No parent for snapshot pagemap"), "it fails for want of the first");
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// The names of images, and not one that is hidden.
fn images(dir: &Path) -> BTreeSet<String> {
    names(dir).into_iter().filter(|name| !name.starts_with('.') && name.ends_with(".img")).collect()
}

/// The chain in the view of a cache, which is where the restore will be.
struct Viewed {
    cache: Daemon,
    namespace: Namespace,
    view: PathBuf,
    work: PathBuf,
    c: Chain,
}

impl Viewed {
    /// CRIU's part of the dumps, up to the finish; no dump can be restored before that.
    fn new(test: &str) -> Option<Self> {
        let c = Chain::new(test, &["--tree"])?;
        let (view, work) = (c.bench.path("view"), c.work("work"));
        let namespace = c.bench.namespace();
        let cache = c.bench.cache_in(&namespace, &["--view", view.to_str().unwrap()]);
        let this = Self { cache, namespace, view, work, c };
        let mut proxy = this.c.bench.proxy(this.cache.port, &["--commit", "stored"]);
        let socket = this.c.bench.path("source/img-proxy.sock");
        for (id, images) in ["/dumps/1", "/dumps/2"].into_iter().zip(&this.c.snapshots) {
            write_remote(&socket, &key("", LIST), WriteMode::Append, &id_list(&[id]));
            // Not in the order in which they are to appear.
            for (name, bytes) in images {
                write_remote(&socket, &key(id, name), WriteMode::Truncate, bytes);
            }
        }
        let dirs = this.dirs();
        for (dir, snapshot) in dirs.iter().zip(&this.c.snapshots) {
            let expected =
                snapshot.keys().filter(|name| *name != INVENTORY).cloned().collect::<BTreeSet<_>>();
            wait_for("images in the view", PATIENCE, || (images(dir) == expected).then_some(()));
        }
        let watch = Watch::new(&dirs);
        dump_finish(&socket, Style::Y2019);
        this.check_order(&watch, &mut proxy);
        Some(this)
    }

    fn dirs(&self) -> [PathBuf; 2] {
        ["1", "2"].map(|name| self.view.join(name))
    }

    fn check_order(&self, watch: &Watch, proxy: &mut Daemon) {
        let dirs = self.dirs();
        let mut seen = Vec::new();
        wait_for("last image of all", PATIENCE, || {
            seen.extend(watch.seen());
            dirs[1].join(INVENTORY).is_symlink().then_some(())
        });
        seen.extend(watch.seen());
        assert_eq!(seen, [dirs[1].join(LIST), dirs[0].join(INVENTORY), dirs[1].join(INVENTORY)]);
        assert_eq!(proxy.process.end(), 0, "the proxy");
        assert!(watch.seen().is_empty(), "the last inventory is the last of all");
    }

    /// Names, what they lead to, `parent`, and who can go there.
    fn check_names(&self) {
        let dirs = self.dirs();
        for (dir, snapshot) in dirs.iter().zip(&self.c.snapshots) {
            assert_eq!(images(dir), snapshot.keys().cloned().collect(), "{}", dir.display());
            for (name, bytes) in snapshot {
                let link = fs::read_link(dir.join(name)).unwrap();
                // The cache's number in its own namespace; from here it has another.
                let descriptor = link.strip_prefix("/proc").unwrap().iter().skip(1).collect::<PathBuf>();
                let seen_from_here = Path::new("/proc").join(self.cache.process.pid().to_string());
                let found = fs::read(seen_from_here.join(descriptor)).unwrap();
                assert!(
                    found == *bytes,
                    "{} leads to {} bytes of something else",
                    link.display(),
                    found.len()
                );
            }
        }
        assert_eq!(fs::read_link(dirs[1].join(LIST)).unwrap(), Path::new("../1"));
        assert!(!dirs[0].join(LIST).is_symlink(), "the first has nothing before it");
        for dir in [&self.view, &dirs[0], &dirs[1]] {
            assert_eq!(dir.metadata().unwrap().permissions().mode() & 0o777, 0o700, "{}", dir.display());
        }
    }

    /// `criu restore` of the second snapshot.
    fn restore(&self, args: &[&str]) -> Daemon {
        // What CRIU writes goes elsewhere: the view is only read.
        let args = [&["-W", self.work.to_str().unwrap()], args].concat();
        self.c.bench.criu_in(&self.namespace, "restore", &self.view.join("2"), &args)
    }

    /// Without CRIU's action script the cache can't know that it is over: it has to be told, twice.
    fn end(&mut self) {
        self.cache.process.signal(Signal::TERM);
        self.cache.logs("asked to end, but");
        self.cache.process.signal(Signal::TERM);
        assert_eq!(self.cache.process.end(), 1, "the cache");
        self.check_gone();
    }

    fn check_gone(&self) {
        assert!(!self.view.exists(), "it stays with {:?}", names(&self.view));
    }
}

#[test]
fn a_chain_in_the_view() {
    let Some(mut v) = Viewed::new("a_chain_in_the_view") else { return };
    v.check_names();
    let _criu = v.restore(&[]);
    v.c.check_copy();
    assert_eq!(v.namespace.copy().len(), 4);
    v.end();
}

#[test]
fn a_scripted_restore_of_a_chain_in_the_view() {
    let Some(mut v) = Viewed::new("a_scripted_restore_of_a_chain_in_the_view") else { return };
    let _criu = v.restore(&SCRIPT);
    v.c.check_copy();
    // The cache knows by itself that it is over.
    assert_eq!(v.cache.process.end(), 0, "the cache");
    v.check_gone();
}

/// `criu lazy-pages` follows the chain, too, and needs the cache until it has ended.
#[test]
fn a_lazy_restore_of_a_chain_in_the_view() {
    let Some(mut v) = Viewed::new("a_lazy_restore_of_a_chain_in_the_view") else { return };
    let dir = v.view.join("2");
    let [mut lazy, _criu] = v.c.lazily(&v.namespace, &dir, &v.work);
    v.c.check_copy();
    assert_eq!(lazy.process.end(), 0, "criu lazy-pages");
    v.c.check_copy();
    v.end();
}

/// Ids that end alike, and one that is named twice.
#[test]
fn directories_of_snapshots() {
    let dir = common::Dir::new();
    let view = dir.join("view");
    let mut cache = common::Daemon::cache(&["--view", view.to_str().unwrap()]);
    let mut proxy = common::Daemon::proxy(cache.port, &[]);
    let socket = proxy.dir.join("img-proxy.sock");
    // The first is made again at once: the cache may have both before it has a link to either.
    for (id, content, name) in
        [("/a/1", "too old", ""), ("/a/1", "a", "1"), ("/b/1", "b", "1~2"), ("/b/2/", "c", "2")]
    {
        write_remote(&socket, &key("", LIST), WriteMode::Append, &id_list(&[id]));
        write_remote(&socket, &key(id, "pages-1.img"), WriteMode::Truncate, content.as_bytes());
        write_remote(&socket, &key(id, INVENTORY), WriteMode::Truncate, content.as_bytes());
        // Who comes first has the name.
        let image = view.join(name).join("pages-1.img");
        common::wait_until("its image is there", || name.is_empty() || image.exists());
    }
    dump_finish(&socket, Style::Y2019);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    let last = view.join("2").join(INVENTORY);
    common::wait_until("the last inventory is there", || last.exists());
    for (name, content, parent) in [("1", "a", None), ("1~2", "b", Some("../1")), ("2", "c", Some("../1~2"))]
    {
        let dir = view.join(name);
        assert_eq!(images(&dir).into_iter().collect::<Vec<_>>(), [INVENTORY, "pages-1.img"], "{name}");
        for image in images(&dir) {
            assert_eq!(fs::read(dir.join(image)).unwrap(), content.as_bytes(), "{name}");
        }
        assert_eq!(fs::read_link(dir.join(LIST)).ok(), parent.map(PathBuf::from), "{name}");
    }
    cache.signal(Signal::TERM);
    cache.wait_log("asked to end, but");
    assert_eq!(cache.terminate(), 1, "{}", cache.log());
    assert!(!view.exists());
}
