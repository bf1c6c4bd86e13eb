//! `--view DIR --persist`, commit `restored`: caches that are killed when the copy from the view stands ready, or its
//! source is dead. One of source and copy runs at the end, and while neither does the images are there.

mod common;

use common::script::{FakeCriu, Source};
use common::view::Place;
use common::*;

/// CRIU as a process of its own, when the environment says so.
#[test]
fn fake_criu() {
    common::script::fake_criu();
}

/// A test has a disk at any rate.
fn args(place: &Place) -> [&str; 3] {
    ["--view", place.arg(), "--persist=disk"]
}

/// Whether the dump can be restored, and is what it was.
fn is_whole(place: &Place) -> bool {
    place.names() == ["inventory.img", "pages-1.img", "pstree.img"]
        && place.read("pages-1.img") == pattern(300_000, 1)
        && place.read("inventory.img") == b"the inventory"
}

/// Whether it is there, and nobody is to begin with it.
fn is_withheld(place: &Place) -> bool {
    let names = place.names();
    names.len() == 3 && names[0].starts_with(".inventory.img.")
}

fn restores(criu: &mut FakeCriu) {
    for line in ["pre-restore", "read", "post-restore", "pre-resume"] {
        criu.does(line);
    }
}

fn dies(daemon: &mut Daemon) {
    daemon.child.kill().unwrap();
    daemon.wait();
}

fn ends(cache: &mut Daemon, status: i32) {
    assert_eq!(cache.wait(), status, "{}", cache.log());
    assert!(cache.records().is_empty());
}

/// A session of which a copy is made from the view, while its source lives.
struct Both {
    place: Place,
    cache: Daemon,
    proxy: Daemon,
    source: Source,
    copy: Source,
    dump: FakeCriu,
    restore: FakeCriu,
}

impl Both {
    /// The restore that has waited may begin.
    fn offered() -> Self {
        let place = Place::new();
        let mut cache = Daemon::cache(&args(&place));
        let wait = place.wait(&mut cache);
        let proxy = Daemon::proxy(cache.port, &["--commit", "restored"]);
        let (source, copy) = (Source::new(), Source::new());
        let dump = FakeCriu::dump(&proxy, &source);
        wait.finds(&place.dir);
        let restore = FakeCriu::start_in(&place.dir, &copy);
        Self { place, cache, proxy, source, copy, dump, restore }
    }

    /// The copy stands ready: CRIU is let go, and about to kill the source.
    fn allowed() -> Self {
        let mut both = Self::offered();
        restores(&mut both.restore);
        both.cache.wait_log("the copy stands ready (3 processes)");
        assert_eq!(both.dump.hear(), "0");
        assert!(both.copy.is_stopped());
        both
    }

    /// The cache is killed.
    fn cache_is_killed(&mut self) {
        dies(&mut self.cache);
    }

    fn start_again(&mut self) {
        let port = self.cache.port;
        self.cache = Daemon::cache_at(self.cache.kill(), port, &args(&self.place));
    }

    fn release(&mut self) {
        self.source.kill();
        self.dump.kill_now();
    }

    /// The copy runs, and nothing else is left.
    fn moved(&mut self) {
        assert_eq!(self.proxy.wait(), 0, "{}", self.proxy.log());
        ends(&mut self.cache, 0);
        wait_until("the copy runs", || self.copy.runs());
        assert!(self.source.is_dead());
        self.nothing_is_left();
    }

    /// The source runs, and nothing else is left.
    fn stayed(&mut self) {
        assert_eq!(self.proxy.wait(), 1, "{}", self.proxy.log());
        ends(&mut self.cache, 1);
        assert!(self.source.runs());
        self.nothing_is_left();
    }

    fn nothing_is_left(&self) {
        assert!(self.place.names().is_empty());
        assert!(self.proxy.records().is_empty() && self.cache.records().is_empty());
    }

    /// The source is dead, and so is the copy: another is made of the images.
    fn another(&mut self) {
        self.place.wait(&mut self.cache).finds(&self.place.dir);
        assert!(is_whole(&self.place));
        self.copy = Source::new();
        restores(&mut FakeCriu::start_in(&self.place.dir, &self.copy));
        self.moved();
    }
}

#[test]
fn a_cache_that_lives() {
    let mut both = Both::allowed();
    assert!(is_withheld(&both.place), "a copy has been made of it");
    both.release();
    both.moved();
    let mut both = Both::allowed();
    both.dump.kill_now();
    both.stayed();
    assert!(both.copy.is_dead());
}

#[test]
fn while_it_stands_ready() {
    for release in [true, false] {
        let mut both = Both::allowed();
        both.cache_is_killed();
        both.proxy.wait_log("the link to the cache is lost");
        // It is decided before another is there.
        if release {
            both.source.kill();
        }
        both.dump.kill_now();
        both.start_again();
        both.cache.wait_log("the copy stands ready; its source decides");
        if release {
            both.moved();
        } else {
            both.stayed();
            assert!(both.copy.is_dead());
        }
    }
}

#[test]
fn it_stands_ready_and_dies() {
    for release in [true, false] {
        let mut both = Both::allowed();
        both.cache_is_killed();
        both.proxy.wait_log("the link to the cache is lost");
        both.copy.kill_child();
        both.start_again();
        both.cache.wait_log("a part of the copy that stood ready is dead: what is left of it is killed");
        wait_until("the copy is dead", || both.copy.is_dead());
        assert!(is_withheld(&both.place));
        if release {
            both.release();
            both.another();
        } else {
            both.dump.kill_now();
            both.stayed();
        }
    }
}

/// Killed while its source is dead and its copy is not complete.
#[test]
fn after_the_release() {
    for copy_lives in [true, false] {
        let mut both = Both::offered();
        both.restore.does("pre-restore");
        both.restore.does("post-restore");
        both.release();
        both.cache.wait_log("released by its source");
        both.cache_is_killed();
        if !copy_lives {
            both.restore.kill_now();
            both.copy.kill();
        }
        both.start_again();
        if copy_lives {
            // Its CRIU lets it go: the script finds the next cache.
            both.cache.wait_log("the copy was released: it is continued");
            both.restore.tell("pre-resume");
            both.moved();
        } else {
            both.another();
        }
    }
}

// --- Without a copy.

#[test]
fn a_dump_that_is_not_scripted_is_served_again() {
    let place = Place::new();
    let mut cache = Daemon::cache(&args(&place));
    let mut peer = OldProxy::connect(&cache);
    peer.send(&key("", "pages-1.img"), &pattern(300_000, 1));
    peer.end();
    cache.wait_log("the dump is complete: 3 images");
    let port = cache.port;
    let mut cache = Daemon::cache_at(cache.kill(), port, &args(&place));
    assert!(is_whole(&place));
    // Nobody else may come: this one has its dump.
    assert_closed(&mut OldProxy::connect(&cache).0);
    let mut restore = Restore::connect(&cache);
    assert_eq!(restore.read("inventory.img").unwrap(), b"the inventory");
    assert!(restore.read("pages-1.img") == Some(pattern(300_000, 1)));
    drop(restore);
    ends(&mut cache, 0);
    assert!(place.names().is_empty());
}

#[test]
fn who_waits_while_a_restore_is_at_it() {
    let place = Place::new();
    let mut cache = Daemon::cache(&args(&place));
    let mut peer = OldProxy::connect(&cache);
    peer.send(&key("", "pages-1.img"), &pattern(300_000, 1));
    peer.end();
    cache.wait_log("the dump is complete: 3 images");
    let copy = Source::new();
    let mut criu = FakeCriu::start_in(&place.dir, &copy);
    criu.does("pre-restore");
    let wait = place.wait(&mut cache);
    // It fails: another may try.
    criu.kill();
    wait.finds(&place.dir);
    let mut criu = FakeCriu::start_in(&place.dir, &copy);
    criu.does("pre-restore");
    let wait = place.wait(&mut cache);
    criu.does("post-restore");
    criu.does("pre-resume");
    wait.fails("this cache has had its dump, and another restore has got it");
    ends(&mut cache, 0);
    assert!(copy.runs());
}
