//! Daemons that are killed, and started again in the same directories: the session that they have left is finished
//! without anybody's asking, and one of source and copy runs at its end. The CRIUs are played, each by a process of
//! its own, since a CRIU does not die with its daemon.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};

use common::relay::{FakeCache, FakeProxy};
use common::script::{FakeCriu, Source};
use common::*;
use criu_relay::cli::Verb;
use criu_relay::net;
use criu_relay::record::{Identity, Record, State, Task};
use criu_relay::wire::relay::{self as wire, Kind};
use rustix::process::{Signal, kill_process};

/// CRIU as a process of its own, when the environment says so.
#[test]
fn fake_criu() {
    common::script::fake_criu();
}

fn proxy_in(dir: Dir, port: u16) -> Daemon {
    Daemon::proxy_in(dir, port, &["--commit", "restored"])
}

/// A session with all that belongs to it.
struct Both {
    cache: Daemon,
    proxy: Daemon,
    source: Source,
    copy: Source,
    dump: FakeCriu,
    restore: FakeCriu,
}

impl Both {
    /// CRIU is held on the source, and a restore waits.
    fn new() -> Self {
        let cache = Daemon::cache(&[]);
        let proxy = proxy_in(Dir::new(), cache.port);
        let (source, copy) = (Source::new(), Source::new());
        let restore = FakeCriu::restore(&cache, &copy);
        let dump = FakeCriu::dump(&proxy, &source);
        Self { cache, proxy, source, copy, dump, restore }
    }

    /// The restore is at it.
    fn preparing() -> Self {
        let mut both = Self::new();
        both.proxy.wait_log("the cache has stored everything: the restore is at it");
        both
    }

    /// The copy stands ready, and the proxy has not heard of it.
    fn prepared_untold() -> Self {
        let mut both = Self::preparing();
        both.proxy.stop();
        both.prepare();
        both
    }

    fn prepare(&mut self) {
        self.restore.restores();
        self.restore.does("pre-resume");
        self.cache.wait_log("the copy stands ready (3 processes)");
        assert!(self.copy.is_stopped());
    }

    /// CRIU is let go, and about to kill the source.
    fn allowed() -> Self {
        let mut both = Self::preparing();
        both.prepare();
        assert_eq!(both.dump.hear(), "0");
        both
    }

    fn start_cache(&mut self) {
        let port = self.cache.port;
        self.cache = Daemon::cache_at(self.cache.kill(), port, &[]);
    }

    fn start_proxy(&mut self) {
        self.proxy = proxy_in(self.proxy.kill(), self.cache.port);
    }

    /// The copy runs, and the source is dead.
    fn moved(&mut self) {
        assert_eq!(self.proxy.wait(), 0, "{}", self.proxy.log());
        assert_eq!(self.cache.wait(), 0, "{}", self.cache.log());
        assert!(self.source.is_dead());
        wait_until("the copy runs", || self.copy.runs());
        self.no_records();
    }

    /// The source runs, and the copy is dead.
    fn stayed(&mut self) {
        self.proxy.wait();
        wait_until("the copy is dead", || self.copy.is_dead());
        assert!(self.source.runs());
        wait_until("no records are left", || {
            self.cache.records().is_empty() && self.proxy.records().is_empty()
        });
    }

    fn no_records(&self) {
        assert_eq!((self.cache.records(), self.proxy.records()), (vec![], vec![]));
    }
}

fn state(daemon: &Daemon) -> String {
    let records = daemon.records();
    assert_eq!(records.len(), 1, "{records:?}");
    let text = fs::read_to_string(&records[0]).unwrap();
    text.lines().find_map(|line| line.strip_prefix("state ")).unwrap().into()
}

fn gone(daemon: &mut Daemon) {
    daemon.child.kill().unwrap();
    daemon.wait();
}

// --- The copy stands ready.

#[test]
fn the_cache_is_killed_while_the_copy_stands_ready() {
    for release in [true, false] {
        let mut both = Both::allowed();
        gone(&mut both.cache);
        assert_eq!(state(&both.cache), "prepared");
        both.proxy.wait_log("the link to the cache is lost");
        if release {
            both.source.kill();
        }
        both.dump.kill_now();
        assert!(both.copy.is_stopped() && both.proxy.is_running());
        // It may take long, and may be killed again.
        both.start_cache();
        both.cache.wait_log("the copy stands ready; its source decides");
        both.start_cache();
        if release {
            both.moved();
        } else {
            both.stayed();
            assert!(both.proxy.log().contains("the cache has rolled back"), "{}", both.proxy.log());
            assert_eq!(both.cache.wait(), 1, "{}", both.cache.log());
        }
    }
}

#[test]
fn a_cache_with_a_copy_takes_nothing_else() {
    let mut both = Both::prepared_untold();
    both.start_cache();
    both.cache.wait_log("the copy stands ready; its source decides");
    let mut other = FakeProxy::greet(&both.cache, &common::relay::hello(9));
    assert!(other.hear_error().contains("was refused"));
    // No images are left for another restore.
    let second = Source::new();
    let mut restore = FakeCriu::restore(&both.cache, &second);
    both.proxy.go_on();
    both.dump.kill_now();
    both.stayed();
    assert!(second.runs());
    restore.tell("close");
}

#[test]
fn the_copy_of_a_killed_cache_dies_in_part() {
    let mut both = Both::allowed();
    gone(&mut both.cache);
    both.copy.kill_child();
    let children = both.copy.pids();
    assert_eq!(children.len(), 2);
    both.start_cache();
    both.cache.wait_log("a part of the copy that stood ready is dead");
    both.cache.wait_log("nothing of the copy is left");
    assert!(both.copy.is_dead());
    // Its images were gone before: nothing is left, and both say so.
    both.source.kill();
    both.dump.kill_now();
    assert_eq!(both.proxy.wait(), 1);
    assert!(both.proxy.log().contains("the source is dead, and the cache has lost its images"));
}

#[test]
fn the_proxy_is_killed_and_the_source_dies() {
    let mut both = Both::allowed();
    gone(&mut both.proxy);
    assert_eq!(state(&both.proxy), "allowed");
    both.source.kill();
    both.dump.kill_now();
    assert!(both.copy.is_stopped());
    both.start_proxy();
    both.moved();
}

#[test]
fn the_proxy_is_killed_and_criu_too() {
    let mut both = Both::allowed();
    gone(&mut both.proxy);
    both.dump.kill_now();
    both.start_proxy();
    both.stayed();
    assert_eq!(both.cache.wait(), 1, "{}", both.cache.log());
}

/// Perhaps in the middle of its killing, perhaps the source ran on and a part of it has ended: nobody knows.
#[test]
fn the_proxy_is_killed_and_a_part_of_the_source_is_dead() {
    let mut both = Both::allowed();
    gone(&mut both.proxy);
    both.source.kill_child();
    both.dump.kill_now();
    both.start_proxy();
    both.proxy.wait_log("a part of the source lives and a part is dead");
    assert!(both.copy.is_stopped());
    both.source.kill();
    both.moved();
}

#[test]
fn criu_goes_on_while_the_proxy_is_away() {
    for release in [true, false] {
        let mut both = Both::allowed();
        // It lives when the proxy is there again.
        both.start_proxy();
        both.proxy.wait_log("connected to");
        assert!(both.copy.is_stopped() && both.source.runs());
        if release {
            both.source.kill();
            both.moved();
        } else {
            both.dump.kill_now();
            both.stayed();
        }
    }
}

/// They go on as if nothing had been.
#[test]
fn those_that_keep_take_the_next_session() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = Daemon::proxy(cache.port, &["--commit", "restored", "--keep"]);
    for n in 1..=3 {
        let (mut source, mut copy) = (Source::new(), Source::new());
        let mut restore = FakeCriu::restore(&cache, &copy);
        let mut dump = FakeCriu::dump(&proxy, &source);
        restore.restores();
        restore.does("pre-resume");
        assert_eq!(dump.hear(), "0");
        let port = cache.port;
        cache = Daemon::cache_at(cache.kill(), port, &["--keep"]);
        proxy = Daemon::proxy_in(proxy.kill(), port, &["--commit", "restored", "--keep"]);
        assert!(copy.is_stopped());
        // The second is rolled back.
        if n != 2 {
            source.kill();
        }
        drop(dump);
        match n {
            2 => wait_until("the copy is dead", || copy.is_dead()),
            _ => wait_until("the copy runs", || copy.runs()),
        }
        assert_eq!(source.runs(), n == 2);
        wait_until("no records are left", || cache.records().is_empty() && proxy.records().is_empty());
        copy.kill();
    }
    assert!(cache.is_running() && proxy.is_running());
}

// --- Both at once.

#[test]
fn both_are_killed_while_criu_is_held() {
    let mut both = Both::prepared_untold();
    gone(&mut both.cache);
    gone(&mut both.proxy);
    assert_eq!((state(&both.cache), state(&both.proxy)), ("prepared".into(), "asking".into()));
    // CRIU is told that its daemon is gone, and thaws what it has frozen.
    both.dump.hears("has gone without an answer");
    assert!(both.copy.is_stopped() && both.source.runs());
    both.dump.kill_now();
    // In either order.
    both.start_proxy();
    both.start_cache();
    both.stayed();
    assert!(both.proxy.log().contains("the source was not killed"), "{}", both.proxy.log());
}

#[test]
fn both_are_killed_and_criu_lives_on_for_a_while() {
    let mut both = Both::prepared_untold();
    gone(&mut both.cache);
    gone(&mut both.proxy);
    both.dump.hears("has gone without an answer");
    both.start_cache();
    both.start_proxy();
    both.proxy.wait_log("connected to");
    assert!(both.copy.is_stopped());
    both.dump.kill_now();
    both.stayed();
}

#[test]
fn both_are_killed_after_criu_was_let_go() {
    for (release, cache_first) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut both = Both::allowed();
        gone(&mut both.cache);
        gone(&mut both.proxy);
        if release {
            both.source.kill();
        }
        both.dump.kill_now();
        if cache_first {
            both.start_cache();
            both.start_proxy();
        } else {
            both.start_proxy();
            both.start_cache();
        }
        if release { both.moved() } else { both.stayed() }
    }
}

/// The source is killed with its CRIU while that is held: what was prepared is all that is left.
#[test]
fn both_are_killed_and_the_source_with_them() {
    let mut both = Both::prepared_untold();
    gone(&mut both.cache);
    gone(&mut both.proxy);
    both.dump.kill_now();
    both.source.kill();
    both.start_cache();
    both.start_proxy();
    both.moved();
}

// --- Before the copy stands ready.

#[test]
fn the_proxy_is_killed_while_the_copy_is_made() {
    let mut both = Both::preparing();
    gone(&mut both.proxy);
    both.dump.hears("has gone without an answer");
    both.dump.kill_now();
    // It becomes ready all the same.
    both.prepare();
    both.start_proxy();
    both.stayed();
}

#[test]
fn the_cache_is_killed_before_pre_resume() {
    for restarted_first in [false, true] {
        let mut both = Both::preparing();
        both.restore.restores();
        gone(&mut both.cache);
        assert_eq!(state(&both.cache), "made");
        both.dump.hears("the link was lost before the copy stood ready");
        both.dump.kill_now();
        if restarted_first {
            both.start_cache();
            both.cache.wait_log("nothing of the copy is left");
        } else {
            // Nobody is there who could say that it may run: its script stops it.
            both.restore.tell("pre-resume");
            both.restore.hears("was left by a criu-relay cache that is gone");
            wait_until("the copy is stopped", || both.copy.is_stopped());
            both.start_cache();
        }
        both.stayed();
        assert!(both.proxy.log().contains("the cache has rolled back"), "{}", both.proxy.log());
        // It is as good as new.
        assert!(both.cache.is_running());
        both.cache.terminate();
    }
}

#[test]
fn the_cache_is_killed_while_it_stores() {
    let mut both = Both::new();
    both.proxy.wait_log("CRIU is held");
    // However far that is.
    gone(&mut both.cache);
    both.dump.hears("the link was lost");
    both.dump.kill_now();
    both.restore.kill_now();
    both.start_cache();
    both.proxy.wait();
    assert!(both.source.runs() && both.copy.runs());
    both.no_records();
}

#[test]
fn the_cache_is_killed_while_a_restore_reads() {
    let mut both = Both::preparing();
    both.restore.does("take");
    gone(&mut both.cache);
    both.dump.hears("the link was lost before the copy stood ready");
    both.dump.kill_now();
    // It fails, and its copy with it.
    both.restore.kill_now();
    both.copy.kill();
    both.start_cache();
    both.stayed();
    assert!(both.proxy.log().contains("the cache has rolled back"), "{}", both.proxy.log());
    assert!(both.cache.is_running());
}

// --- Released images, of which a copy is made after the source is dead.

/// Stored and released, and a restore that has made its copy.
fn made_of_released() -> (Daemon, FakeProxy, FakeCriu, Source) {
    let cache = Daemon::cache(&[]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, true);
    proxy.stream_image("pages-1.img", &pattern(300_000, 1));
    proxy.end();
    proxy.release();
    assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
    let copy = Source::new();
    let mut restore = FakeCriu::restore(&cache, &copy);
    restore.restores();
    assert_eq!(state(&cache), "released");
    (cache, proxy, restore, copy)
}

#[test]
fn the_cache_is_killed_before_the_only_copy_runs() {
    for restarted_first in [false, true] {
        let (mut cache, _proxy, mut restore, copy) = made_of_released();
        let (port, dir) = (cache.port, cache.kill());
        if restarted_first {
            let mut cache = Daemon::cache_at(dir, port, &[]);
            cache.wait_log("the copy was released: it is continued");
            restore.does("pre-resume");
            assert_eq!(cache.wait(), 0, "{}", cache.log());
            assert_eq!(cache.records(), Vec::<std::path::PathBuf>::new());
        } else {
            restore.tell("pre-resume");
            restore.hears("was left by a criu-relay cache that is gone");
            wait_until("the copy is stopped", || copy.is_stopped());
            let mut cache = Daemon::cache_at(dir, port, &[]);
            cache.wait_log("the copy runs");
            assert!(copy.runs());
            assert_eq!(cache.wait(), 0, "{}", cache.log());
            assert_eq!(cache.records(), Vec::<std::path::PathBuf>::new());
        }
        assert!(copy.runs());
    }
}

/// Its source has died while the copy was being made: from then on that copy is all there is.
#[test]
fn the_cache_is_killed_with_a_copy_that_was_released_while_it_was_made() {
    for restarted_first in [false, true] {
        let mut cache = Daemon::cache(&[]);
        let copy = Source::new();
        let mut restore = FakeCriu::restore(&cache, &copy);
        let mut proxy = FakeProxy::connect(&cache);
        proxy.begin_for(1, true, wire::COMMIT_RESTORED);
        proxy.stream_image("pages-1.img", &pattern(300_000, 1));
        proxy.end();
        restore.restores();
        assert_eq!(state(&cache), "made");
        proxy.release();
        assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
        assert_eq!(state(&cache), "released");
        let (port, dir, session) = (cache.port, cache.kill(), proxy.session.clone());
        if !restarted_first {
            restore.tell("pre-resume");
            restore.hears("was left by a criu-relay cache that is gone");
            wait_until("the copy is stopped", || copy.is_stopped());
        }
        let mut cache = Daemon::cache_at(dir, port, &[]);
        cache.wait_log("the copy was released: it is continued");
        if restarted_first {
            restore.does("pre-resume");
        }
        cache.wait_log("the copy runs");
        assert!(copy.runs());
        // Its source asks once more.
        let mut proxy = FakeProxy::connect_for(&cache, 1);
        proxy.session.clone_from(&session);
        proxy.release();
        assert_eq!(proxy.peer.hear(), Kind::Released(wire::Released { session: session.clone() }));
        proxy.peer.say(Kind::Settled(wire::Settled { session }));
        assert_eq!(cache.wait(), 0, "{}", cache.log());
        assert_eq!(cache.records(), Vec::<std::path::PathBuf>::new());
        assert!(copy.runs());
    }
}

/// The copy runs, and its source was not told: it asks once more.
#[test]
fn the_cache_is_killed_before_its_source_knows() {
    let mut cache = Daemon::cache(&[]);
    let copy = Source::new();
    let mut restore = FakeCriu::restore(&cache, &copy);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin_for(1, true, wire::COMMIT_RESTORED);
    proxy.stream_image("pages-1.img", &pattern(300_000, 1));
    proxy.end();
    restore.restores();
    copy.stop_child();
    restore.does("pre-resume");
    cache.wait_log("the copy stands ready");
    proxy.release();
    wait_until("the others run", || copy.only_child_is_stopped());
    cache.wait_log("released by its source");
    let (port, session) = (cache.port, proxy.session.clone());
    let mut cache = Daemon::cache_at(cache.kill(), port, &[]);
    let mut proxy = FakeProxy::connect_for(&cache, 1);
    proxy.session.clone_from(&session);
    proxy.rollback();
    assert!(proxy.peer.hear_error().contains("the opposite has been said"));
    let mut proxy = FakeProxy::connect_for(&cache, 1);
    proxy.session.clone_from(&session);
    proxy.release();
    assert_eq!(proxy.peer.hear(), Kind::Released(wire::Released { session: session.clone() }));
    proxy.peer.say(Kind::Settled(wire::Settled { session }));
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    assert!(copy.only_child_is_stopped(), "what was stopped on the source stays");
    assert_eq!(cache.records(), Vec::<std::path::PathBuf>::new());
}

// --- A word that could not be told.

#[test]
fn a_release_is_told_by_the_next_run() {
    // Dead, as it says.
    let (dir, record) = {
        let dead = Source::new();
        left(Verb::Proxy, State::Released, &dead)
    };
    let fake = FakeCache::new();
    let mut proxy = proxy_in(dir, fake.port);
    for times in 1..=2 {
        let mut held = fake.accept();
        assert_eq!(held.hear(), Kind::Release(wire::Release { session: record.session.to_vec() }));
        if times == 1 {
            // And killed again.
            held.peer.reset();
            proxy = proxy_in(proxy.kill(), fake.port);
        } else {
            held.peer.say(Kind::Released(wire::Released { session: record.session.to_vec() }));
            assert_eq!(proxy.wait(), 0, "{}", proxy.log());
        }
    }
    assert_eq!(proxy.records(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_rollback_is_told_by_the_next_run() {
    let fake = FakeCache::new();
    let mut proxy = proxy_in(Dir::new(), fake.port);
    let (mut peer, _) = fake.greeted();
    let welcome = wire::Welcome { restore_waits: true, ..fake.welcome() };
    peer.say(Kind::Welcome(welcome));
    proxy.wait_log("relay protocol");
    let mut held = common::relay::Held::new(peer);
    let source = Source::new();
    let mut dump = FakeCriu::dump(&proxy, &source);
    held.begin();
    held.finished();
    let port = fake.port;
    drop(fake);
    held.peer.reset();
    dump.hears("the link was lost before the cache had confirmed");
    dump.kill_now();
    wait_until("it is written", || state(&proxy) == "rolled-back");
    let dir = proxy.kill();
    // There is still nobody who could be told, and the next dump may begin.
    let mut proxy = proxy_in(dir, port);
    assert_eq!(state(&proxy), "rolled-back");
    assert!(proxy.is_running());
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let fake = FakeCache { listener, port, run: vec![8; wire::ID] };
    let (mut peer, hello) = fake.greeted();
    peer.say(Kind::Welcome(fake.welcome()));
    let Kind::Rollback(said) = peer.hear() else { panic!() };
    assert_eq!(said.session, hello.session);
    peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
    wait_until("no record is left", || proxy.records().is_empty());
    assert!(proxy.is_running() && source.runs());
}

// --- Records that are found.

/// What a daemon would have left of these processes.
fn left(role: Verb, state: State, tasks: &Source) -> (Dir, Record) {
    let dir = Dir::new();
    let mut record = Record::new(role, net::random_id().unwrap(), state).unwrap();
    // Its daemon is gone.
    record.daemon = Identity { pid: i32::MAX, start: 0 };
    let task =
        |pid: rustix::process::Pid| Task { who: Identity::of(pid.as_raw_pid()).unwrap(), stays: false };
    record.tasks = tasks.pids().into_iter().map(task).collect();
    record.store(&dir.0).unwrap();
    (dir, record)
}

/// --leave-running is that of the session, and of no other.
#[test]
fn what_was_left_running_says_nothing_of_the_next_source() {
    let cache = Daemon::cache(&["--keep"]);
    let (dir, mut record) = left(Verb::Proxy, State::Released, &Source::new());
    record.leave_running = true;
    record.store(&dir.0).unwrap();
    let mut proxy = Daemon::proxy_in(dir, cache.port, &["--commit", "restored", "--keep"]);
    proxy.wait_log("the cache has lost its images");
    let (source, copy) = (Source::new(), Source::new());
    let mut restore = FakeCriu::restore(&cache, &copy);
    let mut dump = FakeCriu::dump(&proxy, &source);
    restore.restores();
    restore.does("pre-resume");
    assert_eq!(dump.hear(), "0");
    // It dies before it has killed anything.
    dump.kill_now();
    proxy.wait_log("the cache has rolled back");
    assert!(source.runs() && copy.is_dead());
}

#[test]
fn a_source_that_was_not_to_run_on_does_not_beside_its_copy() {
    let mut both = Both::allowed();
    let dir = both.proxy.kill();
    both.dump.kill_now();
    both.proxy = Daemon::proxy_in(dir, both.cache.port, &["--commit", "restored", "--leave-running"]);
    both.stayed();
}

#[test]
fn a_copy_that_was_to_die_is_killed() {
    for state in [State::Made, State::RolledBack] {
        let copy = Source::new();
        let (dir, _) = left(Verb::Cache, state, &copy);
        let mut cache = Daemon::cache_in(dir, &[]);
        cache.wait_log("nothing of the copy is left");
        assert!(copy.is_dead());
        wait_until("no record is left", || cache.records().is_empty());
        // It takes a dump as if nothing had been.
        let mut proxy = FakeProxy::connect_for(&cache, 7);
        proxy.begin(7, true);
        proxy.end();
    }
}

#[test]
fn a_copy_that_was_to_run_is_continued() {
    let copy = Source::new();
    for pid in copy.pids() {
        kill_process(pid, Signal::STOP).unwrap();
    }
    wait_until("it is stopped", || copy.is_stopped());
    let (dir, mut record) = left(Verb::Cache, State::Released, &copy);
    record.tasks[1].stays = true;
    record.store(&dir.0).unwrap();
    let mut cache = Daemon::cache_in(dir, &[]);
    wait_until("it runs", || copy.only_child_is_stopped());
    // Its CRIU's script comes late, and stops it.
    kill_process(copy.pids()[0], Signal::STOP).unwrap();
    wait_until("it runs", || copy.only_child_is_stopped());
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    assert!(copy.only_child_is_stopped());
    assert_eq!(cache.records(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn the_host_was_started_anew() {
    // The copy is dead; whatever has its numbers is not touched.
    let copy = Source::new();
    let (dir, mut record) = left(Verb::Cache, State::Prepared, &copy);
    record.place.boot = "another".into();
    record.store(&dir.0).unwrap();
    let mut cache = Daemon::cache_in(dir, &[]);
    cache.wait_log("a part of the copy that stood ready is dead");
    cache.wait_log("nothing of the copy is left");
    assert!(copy.runs());
    let mut proxy = FakeProxy::connect(&cache);
    proxy.session = record.session.to_vec();
    proxy.release();
    assert!(proxy.peer.hear_error().contains("does not have the images of that session"));

    // The source is dead, and the copy is what is left.
    for state in [State::Asking, State::Allowed] {
        let source = Source::new();
        let (dir, mut record) = left(Verb::Proxy, state, &source);
        record.place.boot = "another".into();
        record.store(&dir.0).unwrap();
        let fake = FakeCache::new();
        let mut proxy = proxy_in(dir, fake.port);
        let mut held = fake.accept();
        let said = Kind::Release(wire::Release { session: record.session.to_vec() });
        assert_eq!(held.hear(), said);
        held.peer.say(Kind::Released(wire::Released { session: record.session.to_vec() }));
        assert_eq!(proxy.wait(), 0, "{}", proxy.log());
        assert!(source.runs());
        assert_eq!(proxy.records(), Vec::<std::path::PathBuf>::new());
    }
}

/// It does not start, and says why.
fn refuses(verb: &str, dir: &Dir, why: &[&str]) {
    let mut command = Command::new(binary());
    command.args([verb, "--address", "127.0.0.1", "--port", "1", "-D"]).arg(&dir.0);
    if verb == "cache" {
        command.args(["--port", "0"]);
    }
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    wait_until("it ends", || child.try_wait().unwrap().is_some());
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let status = child.wait().unwrap();
    assert!(!status.success() && why.iter().all(|why| said.contains(why)), "{status}: {said}");
}

#[test]
fn numbers_of_another_namespace_are_not_taken() {
    for (verb, role, state) in
        [("cache", Verb::Cache, State::Prepared), ("proxy", Verb::Proxy, State::Allowed)]
    {
        let tasks = Source::new();
        let (dir, mut record) = left(role, state, &tasks);
        record.place.pid_namespace = 1;
        record.store(&dir.0).unwrap();
        let path = record.path(&dir.0).display().to_string();
        refuses(verb, &dir, &[&path, "was made in another PID namespace", "start this daemon there"]);
        // It is as it was.
        assert_eq!(Record::load_all(&dir.0, None).unwrap(), [record]);
        assert!(tasks.runs());
    }
}

#[test]
fn a_record_that_can_not_be_read_is_not_passed_over() {
    for (verb, role, state) in
        [("cache", Verb::Cache, State::Prepared), ("proxy", Verb::Proxy, State::Allowed)]
    {
        let tasks = Source::new();
        let (dir, record) = left(role, state, &tasks);
        let path = record.path(&dir.0);
        let text = fs::read(&path).unwrap();
        // It was cut off.
        fs::File::create(&path).unwrap().write_all(&text[..text.len() - 5]).unwrap();
        refuses(verb, &dir, &[&path.display().to_string()]);
        assert!(path.exists() && tasks.runs());
    }
}

#[test]
fn the_records_of_the_other_daemon_are_left_alone() {
    let copy = Source::new();
    let (dir, record) = left(Verb::Cache, State::Made, &copy);
    let fake = FakeCache::new();
    let mut proxy = proxy_in(dir, fake.port);
    assert_eq!(proxy.terminate(), 1);
    assert_eq!(Record::load_all(&proxy.dir.0, None).unwrap(), [record]);
    assert!(copy.runs());
}

#[test]
fn the_record_of_a_daemon_that_lives_is_left_alone() {
    let copy = Source::new();
    let (dir, mut record) = left(Verb::Cache, State::Made, &copy);
    record.daemon = Identity::of_myself().unwrap();
    record.store(&dir.0).unwrap();
    let output = std::process::Command::new(binary())
        .args(["cache", "--port", "0", "-D"])
        .arg(&dir.0)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("belongs to a daemon that is running"), "{said}");
    assert!(copy.runs());
}
