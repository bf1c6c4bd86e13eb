//! Commit point `restored`: the source dies when its copy stands ready, and not before. Both daemons and the real
//! action script, with CRIUs that the tests play and a source and a copy that only have to live, stop or die.

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::relay::{FakeCache, FakeProxy, Held, Peer};
use common::script::{Bench, FakeCriu, Script, Source, is_left_waiting, pre_stream, succeeds};
use common::*;
use criu_relay::wire::relay::{self as wire, Kind};
use rustix::process::{Signal, kill_process};

const RESTORED: [&str; 2] = ["--commit", "restored"];

/// CRIU as a process of its own, when the environment says so.
#[test]
fn fake_criu() {
    common::script::fake_criu();
}

/// A restore of this process, which has announced itself and waits.
fn waiting(cache: &Daemon) -> Restore {
    pre_stream(cache).agrees();
    let mut restore = Restore::connect(cache);
    restore.ask("inventory.img");
    restore
}

fn bench(port: u16, args: &[&str]) -> Bench {
    Bench::new(port, &[&RESTORED, args].concat())
}

/// Both daemons; a restore waits and a dump is connected.
fn pair(cache_args: &[&str], proxy_args: &[&str]) -> (Daemon, Bench, Restore) {
    let cache = Daemon::cache(cache_args);
    let restore = waiting(&cache);
    let bench = bench(cache.port, proxy_args);
    (cache, bench, restore)
}

/// A played cache at which a restore waits.
fn played(args: &[&str]) -> (FakeCache, Held, Bench) {
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, &[&RESTORED, args].concat());
    let held = accept(&cache, |welcome| welcome.restore_waits = true);
    proxy.wait_log("relay protocol");
    (cache, held, Bench::with(proxy))
}

fn accept(cache: &FakeCache, change: impl FnOnce(&mut wire::Welcome)) -> Held {
    let (mut peer, _) = cache.greeted();
    let mut welcome = cache.welcome();
    change(&mut welcome);
    peer.say(Kind::Welcome(welcome));
    Held::new(peer)
}

fn say(held: &mut Held, state: u32, why: &str) {
    held.peer.say(Kind::Restore(wire::Restore { state, text: why.into() }));
}

/// Everything is stored, and the copy is being made.
fn preparing(held: &mut Held, bench: &mut Bench) -> Script {
    let script = bench.held(held);
    held.all_stored();
    bench.proxy.wait_log("the cache has stored everything: the restore is at it");
    script
}

/// The copy of a restore whose script says both; it is stopped then.
fn prepared(cache: &mut Daemon) -> Source {
    let copy = Source::new();
    Script::start("post-restore", cache, Some(&copy)).agrees();
    Script::start("pre-resume", cache, Some(&copy)).agrees();
    cache.wait_log("the copy stands ready (3 processes)");
    assert!(copy.is_stopped());
    copy
}

/// The source is rolled back: it runs, and both daemons have failed.
fn rolled_back(cache: &mut Daemon, bench: &mut Bench) {
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
    assert_eq!(cache.wait(), 1, "{}", cache.log());
    assert!(bench.source.runs());
    no_records(cache, &bench.proxy);
}

fn no_records(cache: &Daemon, proxy: &Daemon) {
    assert_eq!((cache.records(), proxy.records()), (vec![], vec![]));
}

#[test]
fn the_source_dies_when_its_copy_stands_ready() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    assert!(is_left_waiting(&restore));
    bench.images();
    let mut script = bench.post_dump();
    // It gets its images while the source lives.
    assert_eq!(restore.answer(), Some(true));
    drop(restore.pipe());
    assert!(restore.read("pages-1.img") == Some(pattern(300_000, 1)));
    bench.proxy.wait_log("the cache has stored everything: the restore is at it");
    assert!(fs::read_to_string(&bench.proxy.records()[0]).unwrap().contains("state asking"));
    let copy = Source::new();
    Script::start("post-restore", &cache, Some(&copy)).agrees();
    assert!(fs::read_to_string(&cache.records()[0]).unwrap().contains("state made"));
    assert!(copy.runs() && script.waits() && !bench.proxy.log().contains("stands ready: CRIU"));
    Script::start("pre-resume", &cache, Some(&copy)).agrees();
    // As CRIU does when it has let go of it.
    drop(restore);
    cache.wait_log("the copy stands ready (3 processes)");
    script.agrees();
    assert!(bench.source.runs() && copy.is_stopped());
    assert!(fs::read_to_string(&cache.records()[0]).unwrap().contains("state prepared"));
    assert!(fs::read_to_string(&bench.proxy.records()[0]).unwrap().contains("state allowed"));
    // CRIU kills them one by one.
    bench.source.kill_root();
    bench.proxy.wait_log("a process of the source is dead, 2 are left");
    assert!(copy.is_stopped() && !cache.log().contains("released by"));
    bench.source.kill_children();
    wait_until("the copy runs", || copy.runs());
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    no_records(&cache, &bench.proxy);
    let log = cache.log();
    let places: Vec<_> =
        ["(3 processes)", "CRIU lets go of it", "stands ready", "the copy runs", "released by"]
            .iter()
            .map(|text| log.find(text).unwrap_or_else(|| panic!("{text}:\n{log}")))
            .collect();
    assert!(places.is_sorted(), "{places:?}:\n{log}");
}

#[test]
fn it_is_the_default() {
    let cache = Daemon::cache(&[]);
    let restore = waiting(&cache);
    let mut command = Command::new(binary());
    command.args(["proxy", "--address", "127.0.0.1", "--port", &cache.port.to_string()]);
    let mut bench = Bench::with(Daemon::start(Dir::new(), command, &[]));
    bench.images();
    let script = bench.post_dump();
    bench.proxy.wait_log("the cache has stored everything: the restore is at it");
    drop(restore);
    drop(script);
}

#[test]
fn a_task_that_was_stopped_stays_stopped() {
    for release in [true, false] {
        let (mut cache, mut bench, mut restore) = pair(&[], &[]);
        bench.images();
        let script = bench.post_dump();
        assert_eq!(restore.answer(), Some(true));
        let copy = Source::new();
        Script::start("post-restore", &cache, Some(&copy)).agrees();
        // As CRIU does to what was stopped when it was dumped.
        copy.stop_child();
        Script::start("pre-resume", &cache, Some(&copy)).agrees();
        script.agrees();
        assert!(copy.is_stopped());
        if release {
            bench.source.kill();
            bench.disconnect();
            assert_eq!(cache.wait(), 0, "{}", cache.log());
            wait_until("the others run", || copy.only_child_is_stopped());
        } else {
            rolled_back(&mut cache, &mut bench);
            wait_until("all are dead", || copy.is_dead());
        }
    }
}

#[test]
fn a_copy_that_is_rolled_back_is_dead_when_that_is_said() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    bench.images();
    let script = bench.post_dump();
    assert_eq!(restore.answer(), Some(true));
    let copy = prepared(&mut cache);
    script.agrees();
    // Another script fails behind ours, or CRIU was killed.
    bench.disconnect();
    bench.proxy.wait_log("the cache has rolled back");
    assert!(copy.is_dead());
    rolled_back(&mut cache, &mut bench);
    assert!(cache.log().contains("nothing of the copy is left"));
}

#[test]
fn a_source_that_is_left_running_has_a_copy_beside_it() {
    let (mut cache, mut bench, mut restore) = pair(&[], &["--leave-running"]);
    bench.images();
    let script = bench.post_dump();
    assert_eq!(restore.answer(), Some(true));
    let copy = prepared(&mut cache);
    script.agrees();
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    assert!(copy.runs() && bench.source.runs());
    no_records(&cache, &bench.proxy);
}

/// It was killed while CRIU was held, by others: the images are all that is left of it.
#[test]
fn a_source_that_dies_before_its_copy_stands_ready() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    bench.images();
    let script = bench.post_dump();
    assert_eq!(restore.answer(), Some(true));
    let copy = Source::new();
    Script::start("post-restore", &cache, Some(&copy)).agrees();
    bench.source.kill();
    script.agrees();
    cache.wait_log("released by its source: its images are served now");
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    Script::start("pre-resume", &cache, Some(&copy)).agrees();
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    assert!(copy.runs());
    no_records(&cache, &bench.proxy);
}

#[test]
fn sessions_follow_one_another() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = Daemon::proxy(cache.port, &["--commit", "restored", "--keep"]);
    // The second is rolled back.
    for n in 1..=3_usize {
        let mut copy = Source::new();
        let mut restore = FakeCriu::restore(&cache, &copy);
        let mut bench = Bench::with(proxy);
        bench.images();
        let script = bench.post_dump();
        restore.restores();
        restore.does("pre-resume");
        script.agrees();
        assert!(copy.is_stopped());
        if n != 2 {
            bench.source.kill();
        }
        bench.disconnect();
        let said = if n == 2 { "has rolled back" } else { "confirmed and released" };
        bench.proxy.wait_log_times(said, n.div_ceil(2));
        proxy = bench.proxy;
        match n {
            2 => assert!(copy.is_dead() && bench.source.runs()),
            _ => wait_until("the copy runs", || copy.runs()),
        }
        copy.kill();
    }
    assert_eq!(proxy.log().matches("connected to").count(), 1);
    assert_eq!((proxy.terminate(), cache.terminate()), (0, 0));
    no_records(&cache, &proxy);
}

// --- A restore that fails.

/// A whole dump, up to the cache's word that it is stored.
fn store(proxy: &mut FakeProxy, session: u8) {
    proxy.begin_for(session, true, wire::COMMIT_RESTORED);
    proxy.stream_image("pages-1.img", &pattern(300_000, 1));
    proxy.end();
}

/// Held at post-dump, with a restore that is a process of its own.
fn at_it() -> (Daemon, Bench, FakeCriu, Source, Script) {
    let cache = Daemon::cache(&[]);
    let copy = Source::new();
    let restore = FakeCriu::restore(&cache, &copy);
    let mut bench = bench(cache.port, &[]);
    bench.images();
    let script = bench.post_dump();
    bench.proxy.wait_log("the cache has stored everything: the restore is at it");
    (cache, bench, restore, copy, script)
}

#[test]
fn a_restore_that_dies_before_it_has_made_a_copy() {
    let (mut cache, mut bench, mut restore, copy, script) = at_it();
    restore.does("take");
    restore.kill();
    script.refuses("the restore on the other side has failed: its CRIU ended before it had made a copy");
    rolled_back(&mut cache, &mut bench);
    assert!(copy.runs(), "nobody has said that it is one");
}

#[test]
fn a_restore_that_dies_with_its_copy_made() {
    let (mut cache, mut bench, mut restore, copy, script) = at_it();
    restore.restores();
    restore.kill();
    script.refuses("without a word of");
    assert!(copy.is_dead());
    rolled_back(&mut cache, &mut bench);
    assert!(cache.log().contains("nothing of the copy is left"));
}

/// Its script was killed before it could ask, or CRIU could not start it.
#[test]
fn a_restore_that_lets_its_copy_go_without_a_word() {
    let (mut cache, mut bench, mut restore, copy, script) = at_it();
    restore.restores();
    restore.does("close");
    script.refuses("it ran without a word of CRIU");
    assert!(copy.is_dead());
    rolled_back(&mut cache, &mut bench);
}

#[test]
fn a_copy_of_which_all_die_before_it_is_stopped() {
    let (mut cache, mut bench, mut restore, mut copy, script) = at_it();
    restore.restores();
    // CRIU kills what it has made when its restore fails.
    copy.kill();
    script.refuses("a task of the copy has died");
    rolled_back(&mut cache, &mut bench);
}

/// Such is one that has died between the walk through the tree and now.
#[test]
fn a_task_that_goes_while_the_copy_is_made_is_none_of_it() {
    let (mut cache, mut bench, mut restore, mut copy, script) = at_it();
    restore.restores();
    copy.kill_child();
    restore.does("pre-resume");
    cache.wait_log("the copy stands ready (2 processes)");
    script.agrees();
    bench.source.kill();
    bench.disconnect();
    assert_eq!((bench.proxy.wait(), cache.wait()), (0, 0));
    wait_until("the copy runs", || copy.runs());
}

#[test]
fn a_copy_that_is_killed_while_it_stands_ready() {
    let mut cache = Daemon::cache(&[]);
    let mut copy = Source::new();
    let mut restore = FakeCriu::restore(&cache, &copy);
    let mut proxy = FakeProxy::connect(&cache);
    store(&mut proxy, 1);
    restore.restores();
    restore.does("pre-resume");
    assert_eq!(proxy.peer.hear_restore(), wire::PREPARED);
    copy.kill_child();
    assert_eq!(proxy.peer.hear_restore(), wire::FAILED);
    assert!(copy.is_dead());
    // Its images are there, and nobody gets them: the source may have been let go, and may be alive.
    let second = Source::new();
    let mut again = FakeCriu::restore(&cache, &second);
    cache.wait_log_times("a restore has announced itself", 2);
    let other = waiting(&cache);
    assert!(is_left_waiting(&other));
    drop(other);
    proxy.release();
    assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
    // The one whose copy has died is still connected.
    restore.does("close");
    again.restores();
    again.does("pre-resume");
    assert!(second.runs());
    proxy.peer.say(Kind::Settled(wire::Settled { session: proxy.session.clone() }));
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    assert_eq!(cache.records(), Vec::<std::path::PathBuf>::new());
}

/// Such as the kernel does to a job whose shell can't be reached any more.
#[test]
fn a_copy_that_somebody_else_continues_is_stopped_again() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    bench.images();
    let script = bench.post_dump();
    assert_eq!(restore.answer(), Some(true));
    let copy = prepared(&mut cache);
    script.agrees();
    for times in 1..=2 {
        for pid in copy.pids() {
            kill_process(pid, Signal::CONT).unwrap();
        }
        cache.wait_log_times("was continued by somebody else: it is stopped again", 3 * times);
        wait_until("it is stopped", || copy.is_stopped());
    }
    bench.source.kill();
    bench.disconnect();
    assert_eq!((bench.proxy.wait(), cache.wait()), (0, 0), "{}", cache.log());
    assert!(copy.runs());
}

#[test]
fn the_restore_that_comes_second_gets_nothing() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    let second = waiting(&cache);
    bench.images();
    let script = bench.post_dump();
    assert_eq!(restore.answer(), Some(true));
    let copy = prepared(&mut cache);
    script.agrees();
    // Nor one that comes now.
    let third = waiting(&cache);
    assert!(is_left_waiting(&second) && is_left_waiting(&third));
    bench.source.kill();
    bench.disconnect();
    wait_until("the copy runs", || copy.runs());
    assert_eq!(bench.proxy.wait(), 0);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}

/// Its tasks would take the place of the script that asks at pre-resume: it would stand still there for ever.
#[test]
fn a_copy_of_more_processes_than_can_be_watched() {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 128; exec \"$0\" \"$@\"", binary(), "cache", "--port", "0"]);
    let mut cache = Daemon::start(Dir::new(), command, &[]);
    let mut restore = waiting(&cache);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, true);
    proxy.stream_image("pages-1.img", &pattern(300_000, 1));
    proxy.end();
    proxy.release();
    cache.wait_log("released by its source");
    assert_eq!(restore.answer(), Some(true));
    drop(restore.pipe());
    let many = "i=0; while [ $i -lt 60 ]; do sleep 1000 & i=$((i + 1)); done; echo; wait";
    let mut tree =
        Command::new("sh").args(["-c", many]).stdout(Stdio::piped()).process_group(0).spawn().unwrap();
    tree.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let script = |action| {
        let mut script = Script::command(action, &cache.dir.0, None);
        Script(script.env("CRTOOLS_INIT_PID", tree.id().to_string()).spawn().unwrap())
    };
    script("post-restore").refuses("the copy has 61 processes, and this cache can't watch so many");
    // CRIU kills it then. A smaller one is welcome.
    succeeds(&cache);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    rustix::process::kill_process_group(rustix::process::Pid::from_child(&tree), Signal::KILL).unwrap();
    tree.wait().unwrap();
}

/// The images of an earlier session are still being restored: what becomes of that says nothing of the next.
#[test]
fn a_copy_of_the_last_session_that_fails() {
    let mut cache = Daemon::cache(&["--keep"]);
    let (first, second) = (Source::new(), Source::new());
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, true);
    proxy.stream_image("pages-1.img", &pattern(300_000, 1));
    proxy.end();
    proxy.release();
    let mut last = FakeCriu::restore(&cache, &first);
    last.restores();
    let mut restore = FakeCriu::start(&cache, &second);
    restore.does("pre-stream");
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin_for(2, true, wire::COMMIT_RESTORED);
    proxy.stream_image("pages-1.img", &pattern(300_000, 1));
    restore.does("restore");
    // A real proxy would not have begun before.
    while proxy.peer.hear_restore() != wire::WAITS {}
    proxy.end();
    restore.restores();
    last.kill();
    cache.wait_log("nothing of the copy is left");
    assert!(first.is_dead());
    restore.does("pre-resume");
    loop {
        match proxy.peer.hear_restore() {
            wire::PREPARED => break,
            state => assert_ne!(state, wire::FAILED, "{}", cache.log()),
        }
    }
    proxy.release();
    wait_until("it runs", || second.runs());
}

/// CRIU goes on without it: the copy is stopped all the same.
#[test]
fn a_script_that_is_killed_at_pre_resume() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    bench.images();
    let script = bench.post_dump();
    assert_eq!(restore.answer(), Some(true));
    let copy = Source::new();
    Script::start("post-restore", &cache, Some(&copy)).agrees();
    cache.stop();
    let killed = Script::start("pre-resume", &cache, Some(&copy));
    let place = format!("/proc/{}/wchan", killed.0.id());
    wait_until("it has asked", || fs::read_to_string(&place).is_ok_and(|place| place.contains("poll")));
    drop(killed);
    cache.go_on();
    cache.wait_log("the copy stands ready (3 processes)");
    script.agrees();
    assert!(copy.is_stopped());
    bench.source.kill();
    bench.disconnect();
    assert_eq!((bench.proxy.wait(), cache.wait()), (0, 0));
    assert!(copy.runs());
}

/// A cache that can't write down what it does makes nothing that it could lose.
#[test]
fn a_copy_that_can_not_be_recorded_is_not_made() {
    let mut cache = Daemon::cache(&[]);
    let copy = Source::new();
    let mut restore = FakeCriu::restore(&cache, &copy);
    let mut proxy = FakeProxy::connect(&cache);
    store(&mut proxy, 1);
    // Its name is taken.
    let name = format!("criu-relay-cache-{}.record", "01".repeat(16));
    fs::remove_file(cache.dir.join(&name)).unwrap();
    fs::create_dir(cache.dir.join(&name)).unwrap();
    restore.does("take");
    restore.tell("post-restore");
    restore.hears(&name);
    restore.kill();
    assert_eq!(proxy.peer.hear_restore(), wire::FAILED);
    proxy.rollback();
    assert!(matches!(proxy.peer.hear(), Kind::RolledBack(_)));
    assert_eq!(cache.wait(), 1);
    assert!(copy.runs(), "CRIU kills it when its script fails");
}

// --- What the cache tells of its restores.

fn states(peer: &mut Peer, states: &[u32]) {
    for state in states {
        assert_eq!(peer.hear_restore(), *state);
    }
}

#[test]
fn a_proxy_is_told_how_the_restore_stands() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = FakeProxy::connect(&cache);
    let copy = Source::new();
    let restore = FakeCriu::restore(&cache, &copy);
    states(&mut proxy.peer, &[wire::WAITS]);
    restore.kill();
    states(&mut proxy.peer, &[wire::NONE_WAITS]);
    let mut restore = FakeCriu::restore(&cache, &copy);
    states(&mut proxy.peer, &[wire::WAITS]);
    // Another is told by the welcome.
    let Kind::Welcome(welcome) = FakeProxy::greet(&cache, &common::relay::hello(2)).hear() else { panic!() };
    assert!(welcome.restore_waits && welcome.minor >= wire::KNOWS_RESTORED);
    store(&mut proxy, 1);
    restore.restores();
    restore.does("pre-resume");
    states(&mut proxy.peer, &[wire::PREPARED]);
    proxy.release();
    states(&mut proxy.peer, &[wire::SUCCEEDED]);
    assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
    wait_until("the copy runs", || copy.runs());
    // The next, which fails.
    restore.kill();
    let copy = Source::new();
    let mut restore = FakeCriu::restore(&cache, &copy);
    states(&mut proxy.peer, &[wire::WAITS]);
    store(&mut proxy, 2);
    restore.restores();
    restore.kill();
    states(&mut proxy.peer, &[wire::FAILED]);
    assert!(copy.is_dead());
    proxy.rollback();
    assert_eq!(proxy.peer.hear(), Kind::RolledBack(wire::RolledBack { session: proxy.session.clone() }));
    cache.wait_log("rolled back: the source runs on");
}

#[test]
fn the_word_comes_while_the_copy_is_made() {
    for release in [true, false] {
        let mut cache = Daemon::cache(&[]);
        let copy = Source::new();
        let mut restore = FakeCriu::restore(&cache, &copy);
        let mut proxy = FakeProxy::connect(&cache);
        store(&mut proxy, 1);
        restore.restores();
        if release {
            proxy.release();
            assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
            restore.does("pre-resume");
            assert!(copy.runs());
            proxy.peer.say(Kind::Settled(wire::Settled { session: proxy.session.clone() }));
            assert_eq!(cache.wait(), 0, "{}", cache.log());
        } else {
            proxy.rollback();
            assert!(matches!(proxy.peer.hear(), Kind::RolledBack(_)));
            assert!(copy.is_dead());
            assert_eq!(cache.wait(), 1, "{}", cache.log());
        }
        assert_eq!(cache.records(), Vec::<std::path::PathBuf>::new());
    }
}

#[test]
fn a_cache_that_is_asked_to_end_stays_with_its_copy() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    bench.images();
    let script = bench.post_dump();
    assert_eq!(restore.answer(), Some(true));
    let copy = prepared(&mut cache);
    script.agrees();
    cache.signal(Signal::TERM);
    cache.wait_log("ask once more");
    bench.source.kill();
    bench.disconnect();
    wait_until("the copy runs", || copy.runs());
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}

// --- Nothing freezes in vain.

#[test]
fn no_restore_waits() {
    let mut cache = Daemon::cache(&[]);
    let proxy = Daemon::proxy(cache.port, &RESTORED);
    for action in ["pre-stream", "pre-dump"] {
        let (source, began) = (Source::new(), Instant::now());
        Script::start(action, &proxy, Some(&source)).refuses(
            "no criu restore waits at the cache: start it first (criu restore --stream --action-script criu-relay",
        );
        let took = began.elapsed();
        assert!(took > Duration::from_secs(2) && took < Duration::from_secs(10), "{took:?}");
    }
    // One that has not announced itself does not count.
    let mut other = Restore::connect(&cache);
    other.ask("inventory.img");
    pre_stream(&proxy).refuses("no criu restore waits");
    // One that is in time does.
    let mut script = pre_stream(&proxy);
    let mut proxy = proxy;
    proxy.wait_log_times("the action script: pre-stream", 3);
    assert!(script.waits());
    let _restore = waiting(&cache);
    script.agrees();
    assert!(cache.is_running());
}

#[test]
fn a_restore_that_vanishes_during_the_dump() {
    let cache = Daemon::cache(&[]);
    let copy = Source::new();
    let restore = FakeCriu::restore(&cache, &copy);
    let mut bench = bench(cache.port, &[]);
    bench.dump.as_mut().unwrap().write("core-1.img", b"the core");
    bench.proxy.wait_log("core-1.img");
    restore.kill();
    assert_closed(&mut bench.dump.as_mut().unwrap().0);
    assert_eq!(bench.proxy.wait(), 1);
    assert!(
        bench.proxy.log().contains("no criu restore waits at the cache any more"),
        "{}",
        bench.proxy.log()
    );
    assert_eq!(bench.post_dump().end().0, 1);
    assert!(bench.source.runs());
    no_records(&cache, &bench.proxy);
}

#[test]
fn a_cache_that_knows_no_restored() {
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, &RESTORED);
    let _held = accept(&cache, |welcome| (welcome.minor, welcome.restore_waits) = (0, true));
    proxy.wait_log("relay protocol");
    pre_stream(&proxy).refuses("is too old for --commit restored");
    assert!(proxy.is_running());
}

#[test]
fn a_tree_that_the_cache_has_no_memory_for() {
    for (limit, fits) in [(4096, false), (1 << 40, true)] {
        let cache = FakeCache::new();
        let mut proxy = Daemon::proxy(cache.port, &[&RESTORED[..], &["--prepare", "off"]].concat());
        let _held = accept(&cache, |welcome| (welcome.memory_limit, welcome.restore_waits) = (limit, true));
        proxy.wait_log("relay protocol");
        let source = Source::new();
        let script = Script::start("pre-dump", &proxy, Some(&source));
        match fits {
            true => script.agrees(),
            false => script.refuses("of memory, and the cache may use 4.0 KiB (--memory-limit there)"),
        }
        assert!(source.runs());
    }
}

#[test]
fn a_proxy_that_would_be_cut_off() {
    let cache = Daemon::cache(&[]);
    let _restore = waiting(&cache);
    let proxy = Daemon::proxy(cache.port, &RESTORED);
    let source = Source::new();
    // CRIU in the namespace of the tree locks nothing.
    Script::start("pre-dump", &proxy, Some(&source)).agrees();
    let script = Script::command("pre-dump", &proxy.dir.0, Some(&source));
    let mut criu = Command::new("unshare");
    criu.args(["-n", "sh", "-c", "\"$0\"; exit $?", binary()]);
    criu.envs(script.get_envs().filter_map(|(name, value)| Some((name, value?)))).process_group(0);
    let done = criu.output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    if said.starts_with("unshare: ") {
        return skip("a_proxy_that_would_be_cut_off", &said);
    }
    let why = "criu-relay proxy runs in the network namespace of the tree, which CRIU locks while it dumps";
    assert!(done.status.code() == Some(1) && said.contains(why), "{said}");
}

// --- While the copy is made.

#[test]
fn the_proxy_waits_for_the_copy() {
    let (_cache, mut held, mut bench) = played(&["--confirm-timeout", "1"]);
    let mut script = preparing(&mut held, &mut bench);
    // That another restore waits, or none, says nothing of the one that is at it.
    for state in [wire::NONE_WAITS, wire::WAITS, wire::NONE_WAITS] {
        say(&mut held, state, "");
    }
    held.peer.is_read();
    // That is another time: the confirmation has come.
    let began = Instant::now();
    wait_until("the time for the confirmation is over", || began.elapsed() > Duration::from_millis(1500));
    assert!(script.waits());
    say(&mut held, wire::PREPARED, "");
    script.agrees();
    bench.source.kill();
    bench.disconnect();
    let Kind::Release(said) = held.hear() else { panic!() };
    held.peer.say(Kind::Released(wire::Released { session: said.session }));
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    assert_eq!(bench.proxy.records(), Vec::<std::path::PathBuf>::new());
}

/// Its end: it is denied for this reason, and the cache is told.
fn denied(mut held: Held, script: Script, bench: &mut Bench, why: &str) {
    script.refuses(why);
    let Kind::Rollback(said) = held.hear() else { panic!() };
    held.peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.source.runs());
    assert_eq!(bench.proxy.records(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_copy_that_does_not_stand_ready_in_time() {
    let (_cache, mut held, mut bench) = played(&["--restore-timeout", "1"]);
    let script = preparing(&mut held, &mut bench);
    denied(held, script, &mut bench, "the copy does not stand ready after 1 s (--restore-timeout)");
}

#[test]
fn a_restore_that_has_failed() {
    let (_cache, mut held, mut bench) = played(&[]);
    let script = preparing(&mut held, &mut bench);
    say(&mut held, wire::FAILED, "pid 7 is taken");
    denied(held, script, &mut bench, "the restore on the other side has failed: pid 7 is taken");
}

#[test]
fn a_link_that_is_lost_while_the_copy_is_made() {
    let (cache, mut held, mut bench) = played(&[]);
    let script = preparing(&mut held, &mut bench);
    held.peer.reset();
    script.refuses("the link was lost before the copy stood ready");
    let mut held = cache.accept();
    let Kind::Rollback(said) = held.hear() else { panic!() };
    // It is too late.
    say(&mut held, wire::PREPARED, "");
    held.peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.source.runs());
}

#[test]
fn a_signal_while_the_copy_is_made() {
    let (_cache, mut held, mut bench) = played(&[]);
    let script = preparing(&mut held, &mut bench);
    bench.proxy.signal(Signal::TERM);
    denied(held, script, &mut bench, "a signal ended it");
}

#[test]
fn criu_dump_dies_while_the_copy_is_made() {
    let (_cache, mut held, mut bench) = played(&[]);
    let script = preparing(&mut held, &mut bench);
    bench.disconnect();
    denied(held, script, &mut bench, "criu dump ended before the copy stood ready");
}

#[test]
fn the_script_dies_while_the_copy_is_made() {
    let (_cache, mut held, mut bench) = played(&[]);
    drop(preparing(&mut held, &mut bench));
    let Kind::Rollback(said) = held.hear() else { panic!() };
    held.peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.proxy.log().contains("CRIU's action script has gone before it was answered"));
    assert!(bench.source.runs());
}

/// Once CRIU was let go nothing but the source decides.
#[test]
fn a_restore_that_fails_after_the_source_was_let_go() {
    let (_cache, mut held, mut bench) = played(&[]);
    let script = preparing(&mut held, &mut bench);
    say(&mut held, wire::PREPARED, "");
    script.agrees();
    say(&mut held, wire::FAILED, "the copy has died");
    held.peer.is_read();
    bench.source.kill();
    bench.disconnect();
    let Kind::Release(said) = held.hear() else { panic!() };
    held.peer.say(Kind::Released(wire::Released { session: said.session }));
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
}

// --- What the operator says.

fn resolve(daemon: &Daemon, word: &str) -> (bool, String) {
    let mut command = Command::new(binary());
    let done = command.args(["resolve", word, "-W"]).arg(&daemon.dir.0).output().unwrap();
    let said = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8(said).unwrap())
}

#[track_caller]
fn resolves(daemon: &Daemon, word: &str, good: bool, what: &str) {
    let (status, said) = resolve(daemon, word);
    assert!(status == good && said.contains(what), "{status}: {said}");
}

#[test]
fn the_operator_decides_at_the_cache() {
    for word in ["commit", "rollback"] {
        let mut cache = Daemon::cache(&["--keep"]);
        let copy = Source::new();
        let mut restore = FakeCriu::restore(&cache, &copy);
        let mut proxy = FakeProxy::connect(&cache);
        store(&mut proxy, 1);
        restore.restores();
        restore.does("pre-resume");
        states(&mut proxy.peer, &[wire::PREPARED]);
        cache.wait_log("the copy stands ready");
        if word == "commit" {
            resolves(&cache, word, true, "the copy runs");
            wait_until("the copy runs", || copy.runs());
            resolves(&cache, "rollback", false, "no session waits for a word");
            // The source says the same.
            states(&mut proxy.peer, &[wire::SUCCEEDED]);
            proxy.release();
            assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
            proxy.peer.say(Kind::Settled(wire::Settled { session: proxy.session.clone() }));
        } else {
            resolves(&cache, word, true, "the copy is killed if there was one");
            wait_until("the copy is dead", || copy.is_dead());
            // Or the opposite, which is too late.
            proxy.release();
            assert!(proxy.peer.hear_error().contains("the opposite has been said"));
        }
        wait_until("no record is left", || cache.records().is_empty());
    }
}

#[test]
fn the_operator_decides_at_the_proxy() {
    let (_cache, mut held, mut bench) = played(&[]);
    let script = preparing(&mut held, &mut bench);
    resolves(&bench.proxy, "commit", false, "the source lives, and two would run");
    resolves(&bench.proxy, "rollback", true, "the source runs on");
    denied(held, script, &mut bench, "it was rolled back by hand");

    // The source is dead, and the cache is out of reach.
    let (cache, mut held, mut bench) = played(&[]);
    let script = preparing(&mut held, &mut bench);
    say(&mut held, wire::PREPARED, "");
    script.agrees();
    resolves(&bench.proxy, "rollback", false, "CRIU is at it");
    drop(cache);
    held.peer.reset();
    bench.source.kill();
    bench.disconnect();
    bench.proxy.wait_log("the link to the cache is lost");
    wait_until("its record says so", || {
        bench.proxy.records().iter().any(|path| fs::read_to_string(path).unwrap().contains("state released"))
    });
    resolves(&bench.proxy, "rollback", false, "nothing of the source is left");
    resolves(&bench.proxy, "commit", true, "the session is over here");
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    assert_eq!(bench.proxy.records(), Vec::<std::path::PathBuf>::new());
}

/// Images of which no copy was made are found by the operator as long as their cache lives.
#[test]
fn the_operator_finds_who_has_the_images() {
    for (verb, exit) in [("rollback", 1), ("commit", 0)] {
        let mut cache = Daemon::cache(&[]);
        let mut proxy = FakeProxy::connect(&cache);
        proxy.begin(1, true);
        proxy.stream_image("pages-1.img", &pattern(300_000, 1));
        proxy.end();
        cache.wait_log("the dump is stored");
        let resolve = |args: &[&str]| {
            let mut command = std::process::Command::new(binary());
            let output = command.arg("resolve").args(args).arg("-W").arg(&cache.dir.0).output().unwrap();
            (output.status.code(), String::from_utf8(output.stdout).unwrap())
        };
        let (status, said) = resolve(&[]);
        assert!(status == Some(0) && said.contains(": stored"), "{said}");
        let (status, said) = resolve(&[verb]);
        assert_eq!(status, Some(0), "{said}");
        let (_, said) = resolve(&[]);
        assert!(said.contains("no session is open"), "{said}");
        if verb == "commit" {
            let copy = Source::new();
            let mut restore = FakeCriu::restore(&cache, &copy);
            restore.restores();
            restore.does("pre-resume");
        }
        assert_eq!(cache.wait(), exit, "{}", cache.log());
    }
}
