//! `criu-relay wait`: the real binary, for daemons that are there, not yet or no more, and a cache that this test
//! plays.

mod common;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::script::Script;
use common::*;
use criu_relay::cli::Verb::{self, Cache, Proxy};
use criu_relay::client::control::{Control, Controlled};
use criu_relay::net;
use criu_relay::script::socket_name;
use criu_relay::wire::control::{Action, Request};

fn command(dir: &Path, args: &str) -> Command {
    let mut command = Command::new(binary());
    command.arg("wait").arg("-D").arg(dir).args(args.split_whitespace());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn start(dir: &Path, args: &str) -> Child {
    command(dir, args).spawn().unwrap()
}

/// The exit status, what it prints and what it complains of.
fn end(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn ended(child: Child) -> (i32, String, String) {
    end(child.wait_with_output().unwrap())
}

fn said(dir: &Path, args: &str) -> (i32, String, String) {
    end(command(dir, args).output().unwrap())
}

fn succeeds(child: Child) {
    assert_eq!(ended(child), (0, String::new(), String::new()));
}

fn fails(dir: &Path, args: &str, why: &str) {
    let (status, out, err) = said(dir, args);
    assert!(status == 1 && out.is_empty() && err.contains(why), "{status}: {out}{err}");
}

/// A cache that the test plays.
struct Played {
    dir: Dir,
    socket: UnixListener,
}

impl Played {
    fn new() -> Self {
        let dir = Dir::new();
        let socket = UnixListener::bind(dir.join(socket_name(Cache))).unwrap();
        Self { dir, socket }
    }

    /// Somebody waits; and the connection at which it does.
    fn asked(&self, args: &str) -> (Child, Control) {
        let child = start(&self.dir.0, args);
        let mut control = Control::new(self.socket.accept().unwrap().0.into(), false, Instant::now());
        let mut asked = None;
        wait_until("the request has come", || match control.step(&mut [0; 1 << 14]) {
            Ok(Controlled::Request(request)) => {
                asked = Some(request);
                true
            }
            Ok(Controlled::Wait) => false,
            other => panic!("no request: {other:?}"),
        });
        let Request { action, criu, tasks, memory, stays, sizes } = asked.unwrap();
        assert_eq!((action, tasks.len(), memory, stays, sizes.len()), (Action::Wait, 0, 0, 0, 0));
        assert_eq!(net::pidfd_pid(criu.as_fd()), Some(child.id() as i32), "it comes from who waits");
        (child, control)
    }
}

/// What a killed daemon leaves.
fn leave_socket(dir: &Dir, verb: Verb) {
    drop(UnixListener::bind(dir.join(socket_name(verb))).unwrap());
}

#[test]
fn wrong_usage() {
    let dir = Dir::new();
    for args in
        ["x", "--timeout 0", "--timeout x", "--keep", "-W .", "-D .", "--view .", "cache", "--ready=3"]
    {
        let (status, out, err) = said(&dir.0, args);
        assert!(status == 2 && out.is_empty() && err.contains("--help"), "{args}: {status}: {err}");
    }
    for args in [&["cache", "--ready"], &["proxy", "--ready"], &["resolve", "--ready"]] {
        let (status, out, err) = end(Command::new(binary()).args(args).output().unwrap());
        assert!(status == 2 && out.is_empty() && err.contains("--ready is"), "{args:?}: {status}: {err}");
    }
    let help = end(Command::new(binary()).args(["wait", "-h"]).output().unwrap());
    assert!(help.0 == 0 && help.1.contains("criu-relay wait [-D DIR]"));
}

#[test]
fn the_answer_is_the_exit_status() {
    let cache = Played::new();
    for (errno, text, expected) in [
        (0, "", (0, "", "")),
        (0, "/run/view/2", (0, "/run/view/2\n", "")),
        (
            125,
            "the dump has failed: the link is lost",
            (1, "", "criu-relay: the dump has failed: the link is lost\n"),
        ),
        (2, "", (1, "", "criu-relay: No such file or directory (os error 2)\n")),
    ] {
        let (child, mut control) = cache.asked("");
        control.reply(errno, text).unwrap();
        let (status, out, err) = ended(child);
        assert_eq!((status, out.as_str(), err.as_str()), expected);
    }
}

#[test]
fn it_waits_for_the_answer() {
    let cache = Played::new();
    let (mut child, mut control) = cache.asked("--timeout 30 -v");
    assert!(
        matches!(control.step(&mut [0; 64]), Ok(Controlled::Wait)) && child.try_wait().unwrap().is_none()
    );
    control.reply(0, "").unwrap();
    let (status, out, err) = ended(child);
    assert!(status == 0 && out.is_empty() && err.contains("the cache has been asked"), "{status}: {err}");
    // The shell goes on only then.
    let line = "\"$0\" wait -D \"$1\" --timeout 30 && echo restores || echo does not";
    for (errno, then) in [(0, "restores\n"), (125, "does not\n")] {
        let mut shell = Command::new("sh");
        shell.args(["-c", line, binary()]).arg(&cache.dir.0).stdout(Stdio::piped()).stderr(Stdio::null());
        let shell = shell.spawn().unwrap();
        let mut control = Control::new(cache.socket.accept().unwrap().0.into(), false, Instant::now());
        wait_until("it asks", || matches!(control.step(&mut [0; 1 << 14]), Ok(Controlled::Request(_))));
        control.reply(errno, "").unwrap();
        assert_eq!(ended(shell).1, then);
    }
}

#[test]
fn a_cache_that_goes_away() {
    let cache = Played::new();
    let (child, control) = cache.asked("");
    drop(control);
    let (status, out, err) = ended(child);
    let path = cache.dir.join(socket_name(Cache));
    let why = format!("the daemon at {} has gone without an answer", path.display());
    assert!(status == 1 && out.is_empty() && err.contains(&why), "{status}: {err}");
}

#[test]
fn no_dump_in_time() {
    let cache = Played::new();
    let begin = Instant::now();
    let (child, mut control) = cache.asked("--timeout 1");
    let (status, out, err) = ended(child);
    assert!(
        status == 1 && out.is_empty() && err.contains("no dump was complete within 1 s"),
        "{status}: {err}"
    );
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert!(matches!(control.step(&mut [0; 64]), Ok(Controlled::End)), "nobody waits any more");
    // One that can't answer.
    let cache = Daemon::cache(&[]);
    cache.stop();
    fails(&cache.dir.0, "--timeout 1", "no dump was complete within 1 s");
    cache.go_on();
}

#[test]
fn no_cache() {
    let dir = Dir::new();
    let missing = dir.join("missing");
    for dir in [&dir.0, &missing] {
        let why = format!("no criu-relay cache is in {0}: start it with --view {0} or -D {0}", dir.display());
        fails(dir, "", &why);
        fails(dir, "--timeout 30", "criu-relay wait --ready");
    }
    // What it is that has to be there.
    let proxy = Daemon::proxy(9, &[]);
    fails(&proxy.dir.0, "", "no criu-relay cache is in");
    symlink(socket_name(Proxy), proxy.dir.join(socket_name(Cache))).unwrap();
    fails(&proxy.dir.0, "", "this is criu-relay proxy, which restores nothing");
    Script::start("pre-restore", &proxy, None).refuses("this is criu-relay proxy, which restores nothing");
    leave_socket(&dir, Cache);
    fails(&dir.0, "", "was left by a criu-relay cache that is gone");
    fs::write(dir.join("file"), "").unwrap();
    fails(&dir.join("file"), "", "Not a directory");
}

#[test]
fn ready_when_a_daemon_is_there() {
    let cache = Daemon::cache(&[]);
    succeeds(start(&cache.dir.0, "--ready"));
    let (status, _, err) = said(&cache.dir.0, "--ready -v --timeout 30");
    assert!(status == 0 && err.contains("criu-relay cache is ready"), "{err}");
    let proxy = Daemon::proxy(cache.port, &[]);
    succeeds(start(&proxy.dir.0, "--ready --timeout 30"));
    // The current directory is the default.
    let mut here = Command::new(binary());
    assert_eq!(end(here.args(["wait", "--ready"]).current_dir(&cache.dir.0).output().unwrap()).0, 0);
    assert!(!cache.log().contains("WARN"), "{}", cache.log());
}

#[test]
fn ready_when_a_daemon_comes() {
    let starts: [fn(Dir) -> Daemon; 2] =
        [|dir| Daemon::cache_in(dir, &[]), |dir| Daemon::proxy_in(dir, 9, &[])];
    for (start_in, verb) in starts.into_iter().zip([Cache, Proxy]) {
        let dir = Dir::new();
        // Without a directory; with an empty one; with what another has left.
        fs::remove_dir(&dir.0).unwrap();
        let mut waits = vec![start(&dir.0, "--ready --timeout 30")];
        looks_for(&waits[0]);
        fs::DirBuilder::new().mode(0o700).create(&dir.0).unwrap();
        waits.push(start(&dir.0, "--ready"));
        looks_for(&waits[1]);
        leave_socket(&dir, verb);
        waits.push(start(&dir.0, "--ready"));
        for child in &mut waits {
            looks_for(child);
            assert!(child.try_wait().unwrap().is_none());
        }
        let daemon = start_in(dir);
        waits.into_iter().for_each(succeeds);
        drop(daemon);
    }
}

/// Waits until it has rested, and looked again.
fn looks_for(child: &Child) {
    let rested = || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let times = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        times.trim().parse::<u64>().unwrap()
    };
    let before = rested();
    wait_until("it looks again", || rested() > before + 2);
}

#[test]
fn not_ready_in_time() {
    let dir = Dir::new();
    leave_socket(&dir, Cache);
    let missing = dir.join("missing");
    for dir in [&dir.0, &missing] {
        let begin = Instant::now();
        let why = format!("no criu-relay cache or proxy was ready in {} within 1 s", dir.display());
        fails(dir, "--ready --timeout 1", &why);
        assert!(begin.elapsed() >= Duration::from_secs(1));
    }
    // What time can't mend is said at once.
    fs::write(dir.join("file"), "").unwrap();
    fails(&dir.join("file"), "--ready", "Not a directory");
    fails(&dir.join(&"d".repeat(200)), "--ready", "can't be connected to");
}
