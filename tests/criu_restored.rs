//! Commit point `restored` with the real CRIU: real processes are moved, or stay where they are, and one of source and
//! copy runs at the end.

#[path = "criu/harness.rs"]
mod harness;
#[allow(dead_code)]
#[path = "common/middleman.rs"]
mod middleman;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use harness::{Answer, Bench, Daemon, PATIENCE, Process, Restore, free_port, states, wait_for};
use middleman::Middleman;
use rustix::process::{Pid, Signal, kill_process};

const OURS: &str = env!("CARGO_BIN_EXE_criu-relay");
const SCRIPT: [&str; 2] = ["--action-script", OURS];

/// Where the middleman listens.
fn old_listener() -> (TcpListener, u16) {
    let port = free_port();
    (TcpListener::bind(("127.0.0.1", port)).expect("it is free"), port)
}

/// A migration whose restore waits already.
struct Migration {
    // In the order in which they are ended.
    copy: Restore,
    workload: Process,
    before: Answer,
    proxy: Daemon,
    cache: Daemon,
    bench: Bench,
}

/// How the restore is started.
enum Way<'a> {
    /// As the first process of its namespace.
    First(Vec<&'a str>),
    /// Below that.
    Below(Vec<&'a str>),
    /// Where somebody else has the root's PID.
    Taken,
    /// As a job of a shell, like its workload.
    Job,
}

impl Migration {
    fn new(test: &str, workload: &[&str]) -> Option<Self> {
        Self::with(Bench::new(test)?, workload, &[], |_| Way::First(SCRIPT.to_vec()))
    }

    /// One whose cache may use so much memory.
    fn limited(test: &str, workload: &[&str], limit: &str) -> Option<Self> {
        let cache = ["--memory-limit", limit];
        Self::with_both(Bench::new(test)?, workload, &cache, &[], |_| Way::First(SCRIPT.to_vec()))
    }

    fn with<'a>(
        bench: Bench,
        workload: &[&str],
        proxy: &[&str],
        way: impl FnOnce(&Bench) -> Way<'a>,
    ) -> Option<Self> {
        Self::with_both(bench, workload, &[], proxy, way)
    }

    fn with_both<'a>(
        bench: Bench,
        workload: &[&str],
        cache: &[&str],
        proxy: &[&str],
        way: impl FnOnce(&Bench) -> Way<'a>,
    ) -> Option<Self> {
        let (port, at) = match &bench.netns {
            Some(_) => (9996, vec!["--address", "10.77.0.2"]),
            None => (free_port(), vec![]),
        };
        let allowed = ["--allow-peer", "10.77.0.1", "--allow-peer", "127.0.0.1"];
        let mut cache = bench.cache_at(port, &[&at[..], &allowed, cache].concat());
        let way = way(&bench);
        let workload = match way {
            Way::Job => bench.job(workload),
            _ => bench.workload(workload),
        };
        let before = bench.ask();
        let copy = match way {
            Way::Job => bench.restore_job(&SCRIPT),
            Way::First(args) => bench.restore_with(&args),
            Way::Below(args) => bench.restore_below(&args),
            Way::Taken => bench.restore_with_taken(workload.pid(), &SCRIPT),
        };
        cache.logs("a restore has announced itself");
        cache.serves();
        // The default.
        let mut proxy = bench.proxy(port, &[&at, proxy].concat());
        proxy.logs("connected to");
        Some(Self { copy, workload, before, proxy, cache, bench })
    }

    fn start_dump(&self, args: &[&str]) -> Process {
        self.bench.dump_with(&self.workload, args)
    }

    fn start_again(&mut self, cache: bool, proxy: bool) {
        if cache {
            self.cache = self.bench.cache_at(self.cache.port, &[]);
        }
        if proxy {
            self.proxy = self.bench.proxy(self.cache.port, &[]);
        }
    }

    /// It has moved: the copy is the same process, and well.
    fn moved(&mut self) {
        assert_eq!(self.workload.end(), -9, "CRIU kills what it has dumped");
        let after = self.bench.ask();
        assert_eq!((after.pid, after.processes), (self.before.pid, self.before.processes));
        assert!(after.counter > self.before.counter, "it went on: {:?}, {after:?}", self.before);
        assert_eq!(states(&self.copy.copy()).len(), after.processes as usize);
        assert_eq!(self.proxy.process.end(), 0, "the proxy");
        assert_eq!(self.cache.process.end(), 0, "the cache");
        assert_eq!(self.bench.images_on_disk(), 0);
        assert_eq!(self.bench.records().len(), 0);
    }

    /// It has not: the source is well, and nothing is left of the copy.
    fn stayed(&mut self) {
        let _ = self.proxy.process.end();
        self.copy_is_dead();
        assert_eq!(self.workload.ended(), None, "the source runs on");
        let after = self.bench.ask();
        assert_eq!((after.pid, after.processes), (self.before.pid, self.before.processes));
        assert!(after.counter > self.before.counter);
        wait_for("end of all records", PATIENCE, || self.bench.records().is_empty().then_some(()));
    }

    fn copy_is_dead(&self) {
        wait_for("end of the copy", PATIENCE, || {
            states(&self.copy.copy()).chars().all(|state| "ZX".contains(state)).then_some(())
        });
    }

    /// Waits until the copy is stopped, all of it.
    fn copy_is_stopped(&mut self) {
        let ready = format!("the copy stands ready ({} processes)", self.before.processes);
        self.cache.logs(&ready);
        assert_eq!(states(&self.copy.copy()), "T".repeat(self.before.processes as usize));
    }

    fn kill_both(&mut self) {
        for daemon in [&mut self.cache, &mut self.proxy] {
            daemon.process.signal(Signal::KILL);
            assert_eq!(daemon.process.end(), -9);
        }
    }
}

#[test]
fn a_tree_moves() {
    let Some(mut m) = Migration::new("a_tree_moves", &["--tree", "--heap", "16"]) else { return };
    assert_eq!(m.start_dump(&SCRIPT).end(), 0, "criu dump");
    m.moved();
    assert!(m.proxy.has_logged("(4 processes)") && m.proxy.has_logged("confirmed and released"));
    assert!(m.cache.has_logged("the copy stands ready (4 processes)"));
}

#[test]
fn a_tree_with_a_connection_moves() {
    let test = "a_tree_with_a_connection_moves";
    let Some(mut bench) = Bench::new(test) else { return };
    // The connection can't be there twice.
    match harness::two_hosts() {
        Ok(hosts) => bench.netns = Some(hosts),
        Err(why) => return harness::skip(test, &why),
    }
    // Both ends of it are frozen: nothing can be lost, and no packet filter is needed.
    let args = [&SCRIPT[..], &["--tcp-established", "--network-lock", "skip"]].concat();
    let restore = args.clone();
    let Some(mut m) = Migration::with(bench, &["--tree", "--tcp"], &[], |_| Way::First(restore)) else {
        return;
    };
    assert_eq!(m.start_dump(&args).end(), 0, "criu dump");
    m.moved();
}

#[test]
fn the_copy_is_stopped_until_the_source_is_dead() {
    let Some(mut m) = Migration::new("the_copy_is_stopped_until_the_source_is_dead", &["--tree"]) else {
        return;
    };
    // It is there when ours has agreed: the first on the command line runs last.
    let gate = m.bench.gate("post-dump");
    let args = gate.args();
    let mut dump = m.start_dump(&[&[&args[0][..], &args[1]], &SCRIPT[..]].concat());
    gate.is_reached();
    m.copy_is_stopped();
    assert!(m.proxy.has_logged("the copy stands ready: CRIU goes on") && !m.cache.has_logged("released by"));
    gate.opens();
    assert_eq!(dump.end(), 0, "criu dump");
    m.moved();
}

#[test]
fn what_was_stopped_stays_stopped() {
    for (n, tree) in [&[][..], &["--tree"]].into_iter().enumerate() {
        let Some(mut m) = Migration::new(&format!("what_was_stopped_stays_stopped-{n}"), tree) else {
            return;
        };
        let source = std::iter::once(m.workload.pid());
        let source: Vec<_> = source.chain(harness::descendants(m.workload.pid())).collect();
        assert_eq!(source.len(), m.before.processes as usize);
        // The last one only, of a tree.
        let stopped = *source.last().unwrap();
        signal(stopped, Signal::STOP);
        wait_for("stop", PATIENCE, || (states(&[stopped]) == "T").then_some(()));
        assert_eq!(m.start_dump(&SCRIPT).end(), 0, "criu dump");
        assert_eq!(m.workload.end(), -9, "CRIU kills what it has dumped");
        assert_eq!(m.proxy.process.end(), 0, "the proxy");
        assert_eq!(m.cache.process.end(), 0, "the cache");
        let copy = m.copy.copy();
        let still = |copy: &[u32]| states(copy).matches('T').count();
        wait_for("copy that runs, but for one process", PATIENCE, || (still(&copy) == 1).then_some(()));
        let stopped = copy.iter().find(|pid| states(&[**pid]) == "T").unwrap();
        signal(*stopped, Signal::CONT);
        let after = m.bench.ask();
        assert_eq!((after.pid, after.processes), (m.before.pid, m.before.processes));
    }
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).expect("a signal can be sent");
}

/// When its CRIU ends, the kernel continues a stopped job.
#[test]
fn a_job_of_a_shell_is_stopped_until_the_source_is_dead() {
    let Some(bench) = Bench::new("a_job_of_a_shell") else { return };
    let Some(mut m) = Migration::with(bench, &[], &[], |_| Way::Job) else { return };
    let gate = m.bench.gate("post-dump");
    let args = gate.args();
    let mut dump = m.start_dump(&[&["--shell-job", &args[0][..], &args[1]], &SCRIPT[..]].concat());
    gate.is_reached();
    wait_for("end of criu restore", PATIENCE, || m.copy.named("ld-linux-x86-64").is_empty().then_some(()));
    // It depends on when that has happened whether the cache had said before that the copy stands ready.
    let stopped = || (states(&m.copy.copy()) == "T").then_some(());
    wait_for("copy that is stopped", PATIENCE, stopped);
    gate.opens();
    assert_eq!(dump.end(), 0, "criu dump");
    m.moved();
}

// --- It stays where it is.

#[test]
fn a_restore_whose_pid_is_taken() {
    let Some(bench) = Bench::new("a_restore_whose_pid_is_taken_restored") else { return };
    let Some(mut m) = Migration::with(bench, &["--tree"], &[], |_| Way::Taken) else { return };
    assert_ne!(m.start_dump(&SCRIPT).end(), 0, "criu dump");
    m.stayed();
    assert!(m.proxy.has_logged("the restore on the other side has failed"));
    assert_ne!(m.copy.process.end(), 0, "criu restore");
    assert_eq!(m.cache.process.end(), 1, "the cache");
}

#[test]
fn something_ends_criu_dump_when_the_copy_stands_ready() {
    for (name, does, exit) in [("killed", "kill -KILL $PPID", -9), ("fails", "exit 1", 1)] {
        let Some(mut m) = Migration::new(&format!("something_ends_criu_dump-{name}"), &["--tree"]) else {
            return;
        };
        let other = m.bench.script(name, does).display().to_string();
        // The first on the command line runs last.
        let status = m.start_dump(&[&["--action-script", &other], &SCRIPT[..]].concat()).end();
        assert!(status == exit || (exit == 1 && status > 0), "criu dump: {status}");
        m.stayed();
        assert!(
            m.cache.has_logged("the copy stands ready") && m.cache.has_logged("nothing of the copy is left")
        );
        assert_eq!(m.cache.process.end(), 1, "the cache");
    }
}

#[test]
fn left_running() {
    let Some(mut m) = Migration::new("left_running", &["--tree"]) else { return };
    assert_eq!(m.start_dump(&[&SCRIPT[..], &["--leave-running"]].concat()).end(), 0, "criu dump");
    m.stayed();
    assert!(m.proxy.has_logged("the source was not killed"));
}

#[test]
fn criu_restore_is_killed_between_its_scripts() {
    let Some(bench) = Bench::new("criu_restore_is_killed_between_its_scripts") else { return };
    // It is there before ours is called: the last on the command line runs first.
    let gate = bench.gate("pre-resume");
    let args = gate.args();
    let way = Way::Below(vec![SCRIPT[0], SCRIPT[1], &args[0], &args[1]]);
    let Some(mut m) = Migration::with(bench, &["--tree"], &[], |_| way) else { return };
    let mut dump = m.start_dump(&SCRIPT);
    gate.is_reached();
    assert_eq!(dump.ended(), None, "criu dump is held");
    assert_eq!(m.copy.copy().len(), 4);
    // By then CRIU is at its copy as a tracer.
    assert!(states(&m.copy.copy()).chars().all(|state| state == 't'), "{}", states(&m.copy.copy()));
    for criu in m.copy.named("criu").into_iter().chain(m.copy.named("ld-linux-x86-64")) {
        signal(criu, Signal::KILL);
    }
    assert_ne!(dump.end(), 0, "criu dump");
    m.stayed();
    // Whichever is seen first: that it has gone, that its connection has, or that it is no tracer any more.
    assert!(m.proxy.has_logged("without a word of"));
}

#[test]
fn a_restore_whose_script_says_nothing_at_pre_resume() {
    let Some(bench) = Bench::new("a_restore_whose_script_says_nothing_at_pre_resume") else { return };
    let silent = bench.script_without("pre-resume").display().to_string();
    let way = Way::Below(vec!["--action-script", &silent]);
    let Some(mut m) = Migration::with(bench, &["--tree"], &[], |_| way) else { return };
    assert_ne!(m.start_dump(&SCRIPT).end(), 0, "criu dump");
    m.stayed();
    assert!(m.proxy.has_logged("without a word of"));
}

#[test]
fn criu_restore_is_killed_when_the_copy_stands_ready() {
    let Some(bench) = Bench::new("criu_restore_is_killed_when_the_copy_stands_ready") else { return };
    let way = Way::Below(SCRIPT.to_vec());
    let Some(mut m) = Migration::with(bench, &["--tree"], &[], |_| way) else { return };
    let gate = m.bench.gate("post-dump");
    let args = gate.args();
    let mut dump = m.start_dump(&[&[&args[0][..], &args[1]], &SCRIPT[..]].concat());
    gate.is_reached();
    m.copy_is_stopped();
    for criu in m.copy.named("criu").into_iter().chain(m.copy.named("ld-linux-x86-64")) {
        signal(criu, Signal::KILL);
    }
    wait_for("end of criu restore", PATIENCE, || m.copy.named("ld-linux-x86-64").is_empty().then_some(()));
    m.copy_is_stopped();
    gate.opens();
    assert_eq!(dump.end(), 0, "criu dump");
    m.moved();
}

// --- Daemons that are killed, and started again.

#[test]
fn both_are_killed_before_criu_dump_is_let_go() {
    let Some(bench) = Bench::new("both_are_killed_before_criu_dump_is_let_go") else { return };
    let gate = bench.gate("post-restore");
    let args = gate.args();
    let way = Way::First(vec![SCRIPT[0], SCRIPT[1], &args[0], &args[1]]);
    let Some(mut m) = Migration::with(bench, &["--tree"], &[], |_| way) else { return };
    let mut dump = m.start_dump(&SCRIPT);
    gate.is_reached();
    // It does not hear that the copy stands ready.
    m.proxy.process.signal(Signal::STOP);
    gate.opens();
    m.copy_is_stopped();
    m.kill_both();
    assert_ne!(dump.end(), 0, "criu dump");
    assert_eq!(m.bench.records().len(), 2);
    assert_eq!(states(&m.copy.copy()), "TTTT");
    m.start_again(true, true);
    m.stayed();
}

#[test]
fn both_are_killed_when_criu_dump_was_let_go() {
    let test = "both_are_killed_when_criu_dump_was_let_go";
    for (n, killed) in [false, true].into_iter().enumerate() {
        let Some(mut m) = Migration::new(&format!("{test}-{n}"), &["--tree"]) else { return };
        let gate = m.bench.gate("post-dump");
        let args = gate.args();
        let mut dump = m.start_dump(&[&[&args[0][..], &args[1]], &SCRIPT[..]].concat());
        gate.is_reached();
        m.copy_is_stopped();
        m.kill_both();
        if killed {
            // CRIU can't kill the source any more.
            dump.signal(Signal::KILL);
        }
        gate.opens();
        assert_eq!(dump.end(), if killed { -9 } else { 0 }, "criu dump");
        assert_eq!(states(&m.copy.copy()), "TTTT");
        m.start_again(true, true);
        if killed { m.stayed() } else { m.moved() }
    }
}

#[test]
fn the_cache_is_killed_between_the_scripts_of_criu_restore() {
    let Some(bench) = Bench::new("the_cache_is_killed_between_the_scripts") else { return };
    let gate = bench.gate("pre-resume");
    let args = gate.args();
    let way = Way::First(vec![SCRIPT[0], SCRIPT[1], &args[0], &args[1]]);
    let Some(mut m) = Migration::with(bench, &["--tree"], &[], |_| way) else { return };
    let mut dump = m.start_dump(&SCRIPT);
    gate.is_reached();
    m.cache.process.signal(Signal::KILL);
    assert_ne!(dump.end(), 0, "criu dump");
    assert_eq!(m.workload.ended(), None, "the source runs on");
    gate.opens();
    // Nobody is there whom the script could ask: it has stopped the copy, and CRIU has let go of it.
    wait_for("copy that is stopped", PATIENCE, || (states(&m.copy.copy()) == "TTTT").then_some(()));
    m.start_again(true, false);
    m.stayed();
    assert!(m.cache.has_logged("nothing of the copy is left"));
    let _ = m.copy.process.end_within(Duration::from_secs(10));
}

#[test]
fn a_tree_that_is_larger_than_the_cache_is_not_frozen() {
    let test = "a_tree_that_is_larger_than_the_cache_is_not_frozen";
    let Some(mut m) = Migration::limited(test, &["--heap", "32"], "16M") else { return };
    assert_ne!(m.start_dump(&SCRIPT).end(), 0, "criu dump");
    let why = m.proxy.log();
    assert!(why.contains("and the cache may use 16.0 MiB (--memory-limit there)"), "{why}");
    assert!(!m.proxy.has_logged("a dump begins"), "nothing was frozen");
    m.proxy.process.signal(Signal::TERM);
    assert_eq!(m.workload.ended(), None, "the source runs on");
    assert!(m.bench.ask().counter > m.before.counter);
}

/// It is as large as the cache can bear when it is looked at, and grows before it is frozen.
#[test]
fn a_process_that_grows_beyond_the_cache_stays() {
    let test = "a_process_that_grows_beyond_the_cache_stays";
    let Some(mut m) = Migration::limited(test, &["--heap", "16"], "48M") else { return };
    let gate = m.bench.gate("pre-dump");
    // The last on the command line is run first.
    let gate_args = gate.args();
    let mut dump = m.start_dump(&[&gate_args.each_ref().map(String::as_str)[..], &SCRIPT].concat());
    gate.is_reached();
    m.bench.grow();
    gate.opens();
    assert_ne!(dump.end(), 0, "criu dump");
    assert_eq!(m.proxy.process.end(), 1, "the proxy");
    assert_eq!(m.cache.process.end(), 1, "the cache");
    let why = "the memory limit of 48.0 MiB (--memory-limit) is reached";
    assert!(m.proxy.has_logged(why) && m.cache.has_logged(why), "{}", m.proxy.log());
    m.stayed();
}

/// The link is cut in the middle of the memory, and nobody gets through for three seconds. With 1024 in CRIU_RELAY_MIB
/// this is the long run.
#[test]
fn a_link_that_is_cut_comes_back() {
    let mib = std::env::var("CRIU_RELAY_MIB").unwrap_or("96".into());
    let Some(bench) = Bench::new("a_link_that_is_cut_comes_back") else { return };
    let port = free_port();
    let cache = bench.cache_at(port, &[]);
    let workload = bench.workload(&["--heap", &mib]);
    let before = bench.ask();
    let copy = bench.restore_with(&SCRIPT);
    cache.serves();
    let middle = Middleman::new(port);
    let half = mib.parse::<u64>().expect("a number") << 19;
    middle.cut_after(&[half]);
    let mut proxy = bench.proxy(middle.port, &["--reconnect", "10"]);
    proxy.logs("connected to");
    let mut m = Migration { copy, workload, before, proxy, cache, bench };
    let mut dump = m.start_dump(&SCRIPT);
    m.proxy.logs("the dump goes on if the link comes back");
    let lost = Instant::now();
    middle.down(true);
    wait_for("the end of three seconds", PATIENCE, || {
        (lost.elapsed() > Duration::from_secs(3)).then_some(())
    });
    middle.down(false);
    assert_eq!(dump.end(), 0, "criu dump");
    m.moved();
    assert!(middle.links() >= 2 && m.proxy.has_logged("the dump goes on where the link was lost"));
}
