//! Real processes, moved by the real CRIU through the real program: `criu dump --stream`, `criu-relay proxy`, TCP,
//! `criu-relay cache`, `criu restore --stream`.
//!
//! CRIU comes from tests/fetch-criu.sh. Both hosts are this one: the copy lives in a PID namespace of its own, and
//! answers through files in the same directory as the original. Where CRIU can't run each test says `SKIPPED`.

#[path = "criu/harness.rs"]
mod harness;

use std::time::Duration;

use harness::{Answer, Bench, Daemon, PATIENCE, Process, Restore, ThreadWatch, free_port, wait_for};
use rustix::process::Signal;

/// Both daemons with their link, and a workload that is well.
struct Migration {
    // In the order in which they are ended.
    workload: Process,
    before: Answer,
    proxy: Daemon,
    cache: Daemon,
    bench: Bench,
}

impl Migration {
    fn new(test: &str, workload: &[&str], cache: &[&str]) -> Option<Self> {
        Self::with(test, workload, cache, &[])
    }

    fn with(test: &str, workload: &[&str], cache: &[&str], proxy: &[&str]) -> Option<Self> {
        let bench = Bench::new(test)?;
        let cache = bench.cache(cache);
        // The last one counts.
        let mut proxy = bench.proxy(cache.port, &[&["--commit", "stored"], proxy].concat());
        proxy.logs("connected to");
        let workload = bench.workload(workload);
        let before = bench.ask();
        assert_eq!(before.pid, workload.pid());
        Some(Self { workload, before, proxy, cache, bench })
    }

    fn dump(&mut self) {
        assert_eq!(self.bench.dump(&self.workload).end(), 0, "criu dump");
        assert_eq!(self.workload.end(), -9, "CRIU kills what it has dumped");
    }

    /// The copy is well, and it is the same process.
    fn check_copy(&self) {
        check_copy(&self.bench, &self.before);
    }

    fn check_exits(&mut self) {
        assert_eq!(self.proxy.process.end(), 0, "the proxy");
        assert_eq!(self.cache.process.end(), 0, "the cache");
    }
}

fn check_copy(bench: &Bench, before: &Answer) {
    let after = bench.ask();
    assert_eq!((after.pid, after.processes), (before.pid, before.processes));
    assert!(after.counter > before.counter, "it went on: {before:?}, {after:?}");
}

#[test]
fn one_process_and_daemons_of_one_thread() {
    let Some(mut m) = Migration::new("one_process_and_daemons_of_one_thread", &[], &[]) else { return };
    let threads = ThreadWatch::new(&[&m.proxy.process, &m.cache.process]);
    m.dump();
    let _copy = m.bench.restore();
    m.check_copy();
    m.check_exits();
    for (times, most) in threads.seen() {
        assert!(times > 20, "looked at {times} times only");
        assert_eq!(most, 1, "threads");
    }
}

#[test]
fn a_tree() {
    let Some(mut m) = Migration::new("a_tree", &["--tree"], &[]) else { return };
    assert_eq!(m.before.processes, 4);
    m.dump();
    let _copy = m.bench.restore();
    m.check_copy();
    m.check_exits();
}

#[test]
fn half_a_gigabyte() {
    let Some(mut m) = Migration::new("half_a_gigabyte", &["--heap", "512"], &[]) else { return };
    m.dump();
    let _copy = m.bench.restore();
    m.check_copy();
    m.check_exits();
}

#[test]
fn a_dump_that_fails_half_way() {
    let Some(mut m) = Migration::new("a_dump_that_fails_half_way", &["--tree", "--tcp"], &[]) else { return };
    let mut copy = m.bench.restore();
    m.cache.serves();
    assert_ne!(m.bench.dump(&m.workload).end(), 0, "criu dump");
    assert_ne!(copy.process.end_within(Duration::from_secs(1)), 0, "criu restore");
    assert_eq!(m.proxy.process.end(), 1, "the proxy");
    assert_eq!(m.cache.process.end(), 1, "the cache");
    assert!(m.proxy.has_logged(" taken"), "it has failed half-way, not before");
    assert!(m.proxy.has_logged("the dump failed"));
    assert!(m.cache.has_logged("the dump failed"));
    let after = m.bench.ask();
    assert_eq!((after.pid, m.workload.ended()), (m.before.pid, None), "the source went on");
}

#[test]
fn a_restore_that_waits_for_the_dump() {
    let Some(mut m) = Migration::new("a_restore_that_waits_for_the_dump", &["--tree"], &[]) else { return };
    let mut copy = m.bench.restore();
    m.cache.serves();
    m.dump();
    m.check_copy();
    m.check_exits();
    assert_eq!(copy.process.ended(), None);
}

#[test]
fn restored_again_and_again() {
    let Some(mut m) = Migration::new("restored_again_and_again", &[], &["--keep"]) else { return };
    m.dump();
    assert_eq!(m.proxy.process.end(), 0, "the proxy");
    for _ in 0..3 {
        let mut copy = m.bench.restore();
        m.check_copy();
        copy.kill();
    }
    let successes = |cache: &Daemon| cache.log().matches("taken for a success").count();
    wait_for("third success in the cache's log", PATIENCE, || (successes(&m.cache) == 3).then_some(()));
    m.cache.process.signal(Signal::TERM);
    assert_eq!(m.cache.process.end(), 0, "the cache");
}

#[test]
fn a_restore_whose_pid_is_taken() {
    let Some(mut m) = Migration::new("a_restore_whose_pid_is_taken", &[], &[]) else { return };
    m.dump();
    assert_eq!(m.proxy.process.end(), 0, "the proxy");
    assert_eq!(m.bench.restore_with_taken(m.before.pid, &[]).process.end(), 1, "criu restore");
    m.cache.logs("it failed; all");
    let _copy = m.bench.restore();
    m.check_copy();
    assert_eq!(m.cache.process.end(), 0, "the cache");
    assert!(m.cache.has_logged("taken for a success"));
}

// CRIU's one thread is at a pipe that nobody empties.
fn is_blocked(criu: &mut Process) {
    let place = format!("/proc/{}/wchan", criu.pid());
    wait_for("criu dump that is blocked", PATIENCE, || {
        assert_eq!(criu.ended(), None, "criu dump has not waited");
        std::fs::read_to_string(&place).is_ok_and(|place| place.starts_with("pipe_w")).then_some(())
    });
}

#[test]
fn a_cache_that_comes_late() {
    let Some(bench) = Bench::new("a_cache_that_comes_late") else { return };
    let port = free_port();
    let mut proxy = bench.proxy(port, &[]);
    let mut workload = bench.workload(&["--heap", "64"]);
    let before = bench.ask();
    let mut dump = bench.dump(&workload);
    proxy.logs("a dump begins");
    is_blocked(&mut dump);
    assert!(!proxy.has_logged("connected to"));
    let mut cache = bench.cache_at(port, &[]);
    assert_eq!(dump.end(), 0, "criu dump");
    assert_eq!(workload.end(), -9);
    let _copy = bench.restore();
    check_copy(&bench, &before);
    assert_eq!(proxy.process.end(), 0, "the proxy");
    assert_eq!(cache.process.end(), 0, "the cache");
}

#[test]
fn a_cache_that_is_lost_with_the_images() {
    let test = "a_cache_that_is_lost_with_the_images";
    let Some(mut m) = Migration::new(test, &["--heap", "64"], &[]) else { return };
    // It reads nothing, and its socket can't hold everything.
    m.cache.process.signal(Signal::STOP);
    m.dump();
    m.proxy.logs("the dump is complete");
    m.cache.process.signal(Signal::KILL);
    assert_eq!(m.cache.process.end(), -9);
    m.proxy.logs("the link to the cache is lost");
    m.cache = m.bench.cache_at(m.cache.port, &[]);
    m.proxy.logs("sent anew");
    let _copy = m.bench.restore();
    m.check_copy();
    m.check_exits();
}

#[test]
fn no_cache_at_all() {
    let Some(bench) = Bench::new("no_cache_at_all") else { return };
    let mut proxy = bench.proxy(free_port(), &["--connect-timeout", "1"]);
    let mut workload = bench.workload(&["--heap", "64"]);
    let before = bench.ask();
    assert_ne!(bench.dump(&workload).end(), 0, "criu dump");
    assert_eq!(proxy.process.end(), 1, "the proxy");
    assert_eq!((bench.ask().pid, workload.ended()), (before.pid, None), "the source went on");
}

#[test]
fn two_network_namespaces() {
    let test = "two_network_namespaces";
    let Some(mut bench) = Bench::new(test) else { return };
    match harness::two_hosts() {
        Ok(hosts) => bench.netns = Some(hosts),
        Err(why) => return harness::skip(test, &why),
    }
    let mut cache = bench.cache_at(9996, &["--address", "10.77.0.2", "--allow-peer", "10.77.0.1"]);
    let mut copy = bench.restore();
    cache.serves();
    let mut proxy = bench.proxy(9996, &["--address", "10.77.0.2"]);
    let mut workload = bench.workload(&["--tree", "--heap", "16"]);
    let before = bench.ask();
    assert_eq!(bench.dump(&workload).end(), 0, "criu dump");
    assert_eq!(workload.end(), -9);
    check_copy(&bench, &before);
    assert_eq!(copy.process.ended(), None);
    assert_eq!(proxy.process.end(), 0, "the proxy");
    assert_eq!(cache.process.end(), 0, "the cache");
}

#[test]
fn a_signal_while_the_proxy_has_the_only_copy() {
    let test = "a_signal_while_the_proxy_has_the_only_copy";
    let Some(mut m) = Migration::new(test, &["--heap", "64"], &[]) else { return };
    m.cache.process.signal(Signal::STOP);
    m.dump();
    m.proxy.logs("the dump is complete");
    m.cache.process.signal(Signal::KILL);
    m.proxy.logs("the link to the cache is lost");
    m.proxy.process.signal(Signal::TERM);
    m.proxy.logs("it stays until they are sent");
    assert_eq!(m.proxy.process.ended(), None, "the proxy");
    m.proxy.process.signal(Signal::TERM);
    assert_eq!(m.proxy.process.end(), 1, "the proxy");
    assert!(m.proxy.has_logged(", are dropped"));
}

// --- Scripted: with --action-script criu-relay on both sides. (The other commit point is in criu_restored.rs.)

const SCRIPT: [&str; 2] = ["--action-script", env!("CARGO_BIN_EXE_criu-relay")];

/// For a cache that stands still before anything is dumped: it would be waited for at `pre-dump`.
const UNASKED: [&str; 4] = ["--connect-timeout", "1", "--prepare", "off"];

/// A migration whose restore waits already.
struct Scripted {
    copy: Restore,
    m: Migration,
}

impl Scripted {
    fn new(test: &str, workload: &[&str], proxy: &[&str]) -> Option<Self> {
        let m = Migration::with(test, workload, &["-v3"], proxy)?;
        let copy = m.bench.restore_with(&SCRIPT);
        let mut this = Self { copy, m };
        this.m.cache.logs("a restore has announced itself");
        this.m.cache.serves();
        Some(this)
    }

    /// `criu dump` with these arguments, to its end.
    fn dump(&self, args: &[&str]) -> i32 {
        self.m.bench.dump_with(&self.m.workload, args).end()
    }

    /// The source runs on, and the restore has never begun.
    fn check_rolled_back(&mut self, told: bool) {
        assert_ne!(self.copy.process.end(), 0, "criu restore");
        assert_eq!(self.m.proxy.process.end(), 1, "the proxy");
        if told {
            assert_eq!(self.m.cache.process.end(), 1, "the cache");
            assert!(self.m.cache.has_logged("rolled back") || self.m.cache.has_logged("has failed the dump"));
        }
        assert!(!self.m.cache.has_logged("released by"));
        let log = self.m.cache.log();
        assert!(!log.lines().any(|line| line.ends_with(" served")), "the restore got an image");
        let after = self.m.bench.ask();
        assert_eq!((after.pid, self.m.workload.ended()), (self.m.before.pid, None), "the source runs on");
        assert_eq!(after.processes, self.m.before.processes);
    }
}

#[test]
fn a_scripted_migration() {
    let Some(mut s) = Scripted::new("a_scripted_migration", &["--tree", "--heap", "16"], &[]) else { return };
    assert_eq!(s.dump(&SCRIPT), 0, "criu dump");
    assert_eq!(s.m.workload.end(), -9, "CRIU kills what it has dumped");
    s.m.check_copy();
    s.m.check_exits();
    assert_eq!(s.copy.process.ended(), None);
    assert!(s.m.proxy.has_logged("(4 processes)") && s.m.proxy.has_logged("confirmed and released"));
    for action in ["pre-stream", "pre-restore", "post-restore", "pre-resume"] {
        assert!(s.m.cache.has_logged(&format!("the action script: {action}")), "{action}");
    }
    assert!(s.m.cache.has_logged("the restore has succeeded: its action script says so"));
    assert_eq!(s.m.bench.images_on_disk(), 0);
}

#[test]
fn a_scripted_restore_whose_pid_is_taken() {
    let test = "a_scripted_restore_whose_pid_is_taken";
    let Some(mut m) = Migration::new(test, &["--tree"], &[]) else { return };
    assert_eq!(m.bench.dump_with(&m.workload, &SCRIPT).end(), 0, "criu dump");
    assert_eq!(m.workload.end(), -9);
    assert_eq!(m.proxy.process.end(), 0, "the proxy");
    assert_ne!(m.bench.restore_with_taken(m.before.pid, &SCRIPT).process.end(), 0, "criu restore");
    m.cache.logs("its CRIU ended before it had made a copy");
    // Without the script it is refused, and that changes nothing.
    assert_ne!(m.bench.restore().process.end(), 0, "criu restore without its script");
    m.cache.logs("this criu restore needs --action-script criu-relay");
    let _copy = m.bench.restore_with(&SCRIPT);
    m.check_copy();
    assert_eq!(m.cache.process.end(), 0, "the cache");
}

#[test]
fn a_cache_that_is_killed_half_way() {
    let test = "a_cache_that_is_killed_half_way";
    let Some(mut s) = Scripted::new(test, &["--tree", "--heap", "64"], &UNASKED) else {
        return;
    };
    s.m.cache.process.signal(Signal::STOP);
    let mut dump = s.m.bench.dump_with(&s.m.workload, &SCRIPT);
    is_blocked(&mut dump);
    s.m.cache.process.signal(Signal::KILL);
    assert_ne!(dump.end(), 0, "criu dump");
    s.check_rolled_back(false);
    assert!(s.m.proxy.has_logged("the link was lost"));
}

#[test]
fn a_cache_that_is_killed_at_post_dump() {
    let test = "a_cache_that_is_killed_at_post_dump";
    let Some(mut s) = Scripted::new(test, &["--tree"], &UNASKED) else { return };
    s.m.cache.process.signal(Signal::STOP);
    let mut dump = s.m.bench.dump_with(&s.m.workload, &SCRIPT);
    s.m.proxy.logs("CRIU is held until the cache has confirmed everything");
    assert_eq!(dump.ended(), None);
    s.m.cache.process.signal(Signal::KILL);
    assert_ne!(dump.end(), 0, "criu dump");
    s.check_rolled_back(false);
}

#[test]
fn criu_dump_is_killed_at_post_dump() {
    for (n, ours_first) in [true, false].into_iter().enumerate() {
        let test = format!("criu_dump_is_killed_at_post_dump-{n}");
        let Some(mut s) = Scripted::new(&test, &["--tree"], &[]) else { return };
        let killer = s.m.bench.script("killer", "kill -KILL $PPID").display().to_string();
        let killer = ["--action-script", &killer];
        // The first on the command line runs last.
        let scripts = if ours_first { [killer, SCRIPT] } else { [SCRIPT, killer] };
        assert_eq!(s.dump(&scripts.concat()), -9, "criu dump");
        s.check_rolled_back(true);
        assert_eq!(s.m.cache.has_logged("rolled back"), ours_first);
    }
}

#[test]
fn another_script_fails() {
    for (n, ours_first) in [true, false].into_iter().enumerate() {
        let test = format!("another_script_fails-{n}");
        let Some(mut s) = Scripted::new(&test, &["--tree"], &[]) else { return };
        let failing = s.m.bench.script("failing", "exit 1").display().to_string();
        let failing = ["--action-script", &failing];
        let scripts = if ours_first { [failing, SCRIPT] } else { [SCRIPT, failing] };
        assert!(s.dump(&scripts.concat()) > 0, "criu dump");
        s.check_rolled_back(true);
        assert!(s.m.cache.has_logged("rolled back"));
    }
}

#[test]
fn left_running_without_leave() {
    let Some(mut s) = Scripted::new("left_running_without_leave", &["--tree"], &[]) else { return };
    assert_eq!(s.dump(&[&SCRIPT[..], &["--leave-running"]].concat()), 0, "criu dump");
    s.check_rolled_back(true);
    assert!(s.m.cache.has_logged("rolled back"));
    assert!(s.m.proxy.has_logged("the source was not killed"));
}

#[test]
fn left_running_with_leave() {
    let test = "left_running_with_leave";
    let Some(mut s) = Scripted::new(test, &["--tree"], &["--leave-running"]) else { return };
    assert_eq!(s.dump(&[&SCRIPT[..], &["--leave-running"]].concat()), 0, "criu dump");
    s.m.check_exits();
    assert_eq!(s.m.workload.ended(), None, "the source runs on");
    // Both answer in the same place: one is enough.
    s.m.workload.signal(Signal::KILL);
    assert_eq!(s.m.workload.end(), -9);
    s.m.check_copy();
    assert_eq!(s.copy.process.ended(), None);
}

// A source that is left running scribbles over its memory while what was dumped is still in the sockets. What the
// copy says of its memory.
fn scribbled(test: &str, proxy: &[&str], scripted: bool) -> Option<String> {
    let mut m = Migration::with(test, &["--heap", "1"], &[], &[&UNASKED[2..], proxy].concat())?;
    m.cache.process.signal(Signal::STOP);
    let args = if scripted { &SCRIPT[..] } else { &[] };
    let mut dump = m.bench.dump_with(&m.workload, &[args, &["--leave-running"]].concat());
    if scripted {
        m.proxy.logs("CRIU is held until the cache has confirmed everything");
        m.proxy.logs("inventory.img");
        assert_eq!(dump.ended(), None, "the source stands still");
        m.cache.process.signal(Signal::CONT);
        assert_eq!(dump.end(), 0, "criu dump");
        m.bench.scribble();
    } else {
        assert_eq!(dump.end(), 0, "criu dump");
        m.bench.scribble();
        m.cache.process.signal(Signal::CONT);
    }
    assert_eq!(m.proxy.process.end(), 0, "the proxy");
    assert_eq!(m.bench.ask_for_text(), "bad heap in process 0 of the tree\n");
    m.workload.signal(Signal::KILL);
    assert_eq!(m.workload.end(), -9);
    let _copy = m.bench.restore_with(args);
    let said = m.bench.ask_for_text();
    assert_eq!(m.cache.process.end(), 0, "the cache");
    Some(said)
}

#[test]
fn what_is_dumped_does_not_change() {
    let cases: [(&str, &[&str], bool); 4] = [
        ("scripted", &["--leave-running"], true),
        ("scripted-always", &["--leave-running", "--splice", "always"], true),
        ("auto", &[], false),
        ("never", &["--splice", "never", "--retain", "none"], false),
    ];
    for (name, proxy, scripted) in cases {
        let Some(said) = scribbled(&format!("what_is_dumped_does_not_change-{name}"), proxy, scripted) else {
            return;
        };
        assert!(said.starts_with("ok "), "{name}: {said}");
    }
}

#[test]
fn what_is_dumped_changes_with_splice_always_and_no_script() {
    let test = "what_is_dumped_changes_with_splice_always_and_no_script";
    let Some(said) = scribbled(test, &["--splice", "always"], false) else { return };
    assert_eq!(said, "bad heap in process 0 of the tree\n");
}
