//! The real binary as CRIU's action script, against a daemon that this test plays.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use common::*;
use criu_relay::client::control::{Control, Controlled};
use criu_relay::client::{HEADER_LIMIT, control};
use criu_relay::net;
use criu_relay::reactor::Pollable;
use criu_relay::wire::control::{Action, BATCH, Request, encode_request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open};

const PROXY: &str = "relay-proxy.sock";
const CACHE: &str = "relay-cache.sock";

/// The binary as a script, with CRIU's environment; CRIU is this test.
fn script(action: &str, dir: &Path) -> Command {
    let mut command = Command::new(binary());
    command.env("CRTOOLS_SCRIPT_ACTION", action).env("CRTOOLS_IMAGE_DIR", dir).env("CRTOOLS_INIT_PID", "");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn output(action: &str, dir: &Path) -> Output {
    script(action, dir).output().unwrap()
}

/// The exit status, and what it says.
fn end(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    assert!(output.stdout.is_empty());
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn is_ready(fd: BorrowedFd<'_>, seconds: i64) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: seconds, tv_nsec: 0 })).unwrap() > 0
}

fn wait_ready(fd: BorrowedFd<'_>) {
    assert!(is_ready(fd, DEADLINE.as_secs() as i64), "timed out");
}

/// A control socket of a daemon.
struct Socket(UnixListener);

impl Socket {
    fn new(dir: &Dir, name: &str) -> Self {
        Self(UnixListener::bind(dir.join(name)).unwrap())
    }

    fn accept(&self) -> Control {
        wait_ready(self.0.as_fd());
        Control::new(self.0.accept().unwrap().0.into(), false, Instant::now())
    }

    /// The next request, and where to answer.
    fn request(&self) -> (Control, Request<OwnedFd>) {
        let mut control = self.accept();
        assert!(control.deadline().unwrap() <= Instant::now() + HEADER_LIMIT);
        match step(&mut control) {
            Ok(Controlled::Request(request)) => (control, request),
            other => panic!("no request: {other:?}"),
        }
    }

    fn is_left_alone(&self) -> bool {
        !is_ready(self.0.as_fd(), 0)
    }
}

/// Steps until something has come.
fn step(control: &mut Control) -> Result<Controlled, String> {
    loop {
        match control.step(&mut [0; 1 << 14]) {
            Ok(Controlled::Wait) => wait_ready(control.fd()),
            other => return other,
        }
    }
}

fn pid(fd: &OwnedFd) -> Option<i32> {
    net::pidfd_pid(fd.as_fd())
}

fn pids(request: &Request<OwnedFd>) -> Vec<i32> {
    let mut pids: Vec<_> = request.tasks.iter().map(|fd| pid(fd).expect("it is alive")).collect();
    pids.sort_unstable();
    pids
}

/// A tree of processes that says which ones it consists of. Killed when dropped.
struct Tree {
    root: Child,
    pids: Vec<i32>,
}

impl Tree {
    /// `command` prints so many process ids, one in each line.
    fn new(command: &str, count: usize) -> Self {
        let mut root = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(root.stdout.take().unwrap()).lines().take(count);
        let mut pids: Vec<i32> = lines.map(|line| line.unwrap().parse().unwrap()).collect();
        assert_eq!(pids.len(), count);
        pids.sort_unstable();
        Self { root, pids }
    }

    fn root(&self) -> String {
        self.root.id().to_string()
    }

    fn kill(&mut self) {
        for pid in self.pids.drain(..).filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.root.wait();
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.kill();
    }
}

// A root with two children, one of which has two of its own.
const SMALL: &str = "echo $$
    sleep 1000 & echo $!
    sh -c 'echo $$; sleep 1000 & echo $!; sleep 1000 & echo $!; wait' &
    wait";

#[test]
fn pre_stream_is_announced_to_every_daemon_there() {
    for names in [&[PROXY][..], &[CACHE], &[PROXY, CACHE]] {
        let dir = Dir::new();
        let sockets: Vec<_> = names.iter().map(|name| Socket::new(&dir, name)).collect();
        let child = script("pre-stream", &dir.0).spawn().unwrap();
        // The last is told though the first has not answered.
        let mut asked: Vec<_> = sockets.iter().rev().map(Socket::request).collect();
        for (control, request) in &mut asked {
            assert_eq!((request.action, request.tasks.len()), (Action::PreStream, 0));
            assert_eq!(pid(&request.criu), Some(getpid().as_raw_pid()), "CRIU, not its script");
            assert!(control.deadline().is_none(), "it waits for us");
            assert!(matches!(control.step(&mut [0; 1 << 14]), Ok(Controlled::Wait)));
            control.reply(0, "").unwrap();
        }
        assert_eq!(end(child), (Some(0), String::new()));
    }
}

#[test]
fn the_directory_is_a_descriptor_of_criu() {
    let dir = Dir::new();
    let socket = Socket::new(&dir, PROXY);
    let open = fs::File::open(&dir.0).unwrap();
    let by_descriptor = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&open));
    let own = std::process::id().to_string();
    let child = script("pre-dump", Path::new(&by_descriptor)).env("CRTOOLS_INIT_PID", own).spawn().unwrap();
    let (control, request) = socket.request();
    assert_eq!(request.action, Action::PreDump);
    drop(control);
    let (status, said) = end(child);
    let path = dir.join(PROXY);
    assert_eq!(status, Some(1));
    assert!(said.contains(&format!("the daemon at {} has gone", path.display())), "{said}");
}

#[test]
fn each_action_has_its_daemon() {
    let dir = Dir::new();
    let (proxy, cache) = (Socket::new(&dir, PROXY), Socket::new(&dir, CACHE));
    let tree = Tree::new(SMALL, 5);
    for (action, to, other, tasks) in [
        ("pre-dump", &proxy, &cache, 1),
        ("pre-restore", &cache, &proxy, 0),
        ("post-restore", &cache, &proxy, 5),
        ("pre-resume", &cache, &proxy, 5),
    ] {
        let child = script(action, &dir.0).env("CRTOOLS_INIT_PID", tree.root()).spawn().unwrap();
        let (mut control, request) = to.request();
        assert_eq!((request.action.name(), request.tasks.len()), (action, tasks));
        assert_eq!(request.memory > 0, action == "pre-dump", "{action}: {}", request.memory);
        control.reply(0, "fine").unwrap();
        assert_eq!(end(child), (Some(0), String::new()));
        assert!(other.is_left_alone());
    }
    for action in ["commit", "rollback", "wait", "network-lock", "setup-namespaces", "post-resume", "", "new"]
    {
        // Whatever stands in the environment.
        let status = output(action, Path::new("/nonexistent")).status.code();
        assert_eq!(status, Some(0), "{action}");
        assert_eq!(output(action, &dir.0).status.code(), Some(0), "{action}");
    }
    assert!(proxy.is_left_alone() && cache.is_left_alone());
}

// The root has a child of 8 MB, which has one of its own, a small one, and one of 40 MB.
const UNEVEN: &str = "sh -c 'v=$(printf %8000000s x); echo $$; sleep 1000 & echo $!; wait' &
    sleep 1000 & echo $!
    sh -c 'v=$(printf %40000000s x); echo $$; sleep 1000 & echo $!; wait' &
    echo $$
    exec sleep 1000";

#[test]
fn pre_dump_says_how_large_each_page_image_will_be() {
    let dir = Dir::new();
    let socket = Socket::new(&dir, PROXY);
    let tree = Tree::new(UNEVEN, 6);
    // The small one is dead, and has not been waited for.
    let root = tree.root();
    let children = fs::read_to_string(format!("/proc/{root}/task/{root}/children")).unwrap();
    let small = children.split_whitespace().nth(1).unwrap();
    let stat = |pid: &str| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    wait_until("the root waits for nobody", || stat(&root).contains("(sleep)"));
    kill_process(Pid::from_raw(small.parse().unwrap()).unwrap(), Signal::KILL).unwrap();
    wait_until("there is a zombie", || stat(small).contains(") Z "));
    let child = script("pre-dump", &dir.0).env("CRTOOLS_INIT_PID", tree.root()).spawn().unwrap();
    let (mut control, request) = socket.request();
    // As CRIU goes through them: each before its children, what is dead not at all.
    let [root, first, its_child, second, its_too] = request.sizes[..] else { panic!("{:?}", request.sizes) };
    assert!((8_000_000..40_000_000).contains(&first), "{:?}", request.sizes);
    assert!(second > 40_000_000 && root > 0 && its_child > 0, "{:?}", request.sizes);
    assert!(root.max(its_child).max(its_too) < 8_000_000);
    assert_eq!(request.memory, request.sizes.iter().sum());
    control.reply(0, "").unwrap();
    assert_eq!(end(child), (Some(0), String::new()));
}

#[test]
fn post_dump_brings_the_whole_tree() {
    let dir = Dir::new();
    let socket = Socket::new(&dir, PROXY);
    let mut tree = Tree::new(SMALL, 5);
    // As CRIU does it: without a descriptor 0.
    let child = Command::new("sh")
        .args(["-c", "\"$0\" <&-; exit $?", binary()])
        .env("CRTOOLS_SCRIPT_ACTION", "post-dump")
        .env("CRTOOLS_IMAGE_DIR", &dir.0)
        .env("CRTOOLS_INIT_PID", tree.root())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut control, request) = socket.request();
    assert_eq!(request.action, Action::PostDump);
    assert_eq!(pid(&request.criu), Some(child.id() as i32));
    assert_eq!(pids(&request), tree.pids);
    assert!(request.tasks.iter().all(|fd| !is_ready(fd.as_fd(), 0)), "all are alive");
    tree.kill();
    for fd in &request.tasks {
        wait_ready(fd.as_fd());
    }
    control.reply(0, "").unwrap();
    assert_eq!(end(child), (Some(0), String::new()));
}

#[test]
fn a_large_tree_comes_in_batches() {
    let dir = Dir::new();
    let socket = Socket::new(&dir, PROXY);
    // With the root 251, one more than a message has; one of them is dead and not waited for.
    let count = BATCH + 1;
    let tree = Tree::new(
        &format!(
            "echo $$; i=1; while [ $i -lt {count} ]; do sleep 1000 & echo $!; i=$((i + 1)); done
            exec sleep 1000"
        ),
        count,
    );
    let stat = |pid: i32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let root = tree.root.id() as i32;
    wait_until("the root waits for nobody", || stat(root).contains("(sleep)"));
    let zombie = *tree.pids.iter().find(|pid| **pid != root).unwrap();
    kill_process(Pid::from_raw(zombie).unwrap(), Signal::KILL).unwrap();
    wait_until("there is a zombie", || stat(zombie).contains(") Z "));
    let child = script("post-dump", &dir.0).env("CRTOOLS_INIT_PID", tree.root()).spawn().unwrap();
    let (mut control, request) = socket.request();
    assert_eq!(pids(&request), tree.pids);
    let dead: Vec<_> = request.tasks.iter().filter(|fd| is_ready(fd.as_fd(), 0)).map(pid).collect();
    assert_eq!(dead, [Some(zombie)]);
    control.reply(0, "").unwrap();
    assert_eq!(end(child).0, Some(0));
}

#[test]
fn a_tree_that_is_not_there() {
    let dir = Dir::new();
    let socket = Socket::new(&dir, PROXY);
    let mut gone = Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    for (root, why) in [
        (gone.id().to_string().as_str(), "does not exist"),
        ("", "is no process id"),
        ("-1", "is no process id"),
        ("0", "is no process id"),
    ] {
        let output = script("post-dump", &dir.0).env("CRTOOLS_INIT_PID", root).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.contains(why), "{root}: {said}");
    }
    assert!(socket.is_left_alone());
}

#[test]
fn a_refusal_is_a_sentence() {
    let dir = Dir::new();
    let (proxy, cache) = (Socket::new(&dir, PROXY), Socket::new(&dir, CACHE));
    let child = script("pre-stream", &dir.0).spawn().unwrap();
    let (mut control, _) = proxy.request();
    // Though the other says nothing.
    let _waits = cache.request();
    control.reply(11, "no restore waits at the cache").unwrap();
    let said = "criu-relay: pre-stream: no restore waits at the cache\n";
    assert_eq!(end(child), (Some(1), said.into()));

    let child = script("pre-stream", &dir.0).spawn().unwrap();
    let (mut control, _) = cache.request();
    control.reply(2, "").unwrap();
    let (status, said) = end(child);
    assert!(status == Some(1) && said.contains("No such file"), "{said}");
}

// CRIU goes on whatever the script returns: so nothing of the tree is left that could run.
#[test]
fn a_tree_that_may_not_run_is_stopped() {
    for gone in [false, true] {
        let dir = Dir::new();
        let cache = Socket::new(&dir, CACHE);
        let tree = Tree::new(SMALL, 5);
        let child = script("pre-resume", &dir.0).env("CRTOOLS_INIT_PID", tree.root()).spawn().unwrap();
        let (mut control, _) = cache.request();
        if !gone {
            control.reply(11, "its source runs on").unwrap();
        }
        drop(control);
        assert_eq!(end(child).0, Some(1));
        for pid in &tree.pids {
            wait_until("a stopped process", || {
                let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
                status.contains("State:\tT")
            });
        }
    }
}

#[test]
fn a_daemon_that_refuses_before_it_has_read() {
    let dir = Dir::new();
    let socket = Socket::new(&dir, PROXY);
    let tree = Tree::new(SMALL, 5);
    let child = script("post-dump", &dir.0).env("CRTOOLS_INIT_PID", tree.root()).spawn().unwrap();
    socket.accept().reply(1, "not now").unwrap();
    let (status, said) = end(child);
    assert!(status == Some(1) && said.contains("not now"), "{said}");
}

#[test]
fn a_daemon_that_answers_nonsense() {
    let dir = Dir::new();
    let socket = Socket::new(&dir, PROXY);
    for answer in [&[0; 4][..], &[1, 0, 0, 0, 255], &[2, 0, 0, 0, 8, 0]] {
        let own = std::process::id().to_string();
        let child = script("pre-dump", &dir.0).env("CRTOOLS_INIT_PID", own).spawn().unwrap();
        let mut client = socket.0.accept().unwrap().0;
        client.write_all(answer).unwrap();
        let (status, said) = end(child);
        assert!(status == Some(1) && said.contains("the daemon at"), "{said}");
    }
}

#[test]
fn no_daemon_is_a_failure() {
    let dir = Dir::new();
    let tree = Tree::new(SMALL, 5);
    for (action, what) in [
        ("pre-stream", "proxy or cache"),
        ("pre-dump", "proxy"),
        ("post-dump", "proxy"),
        ("pre-restore", "cache"),
        ("post-restore", "cache"),
        ("pre-resume", "cache"),
    ] {
        let output = script(action, &dir.0).env("CRTOOLS_INIT_PID", tree.root()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let path = dir.0.display();
        assert_eq!(output.status.code(), Some(1), "{action}");
        assert!(said.contains(&format!("no criu-relay {what} is in {path}")), "{said}");
        assert!(said.contains(&format!("start criu-relay {what} with -D {path}")), "{said}");
    }
    let wrong = |dir: &Path, why: &str| {
        let output = script("pre-dump", dir).env("CRTOOLS_INIT_PID", tree.root()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.contains(why), "{said}");
    };
    wrong(Path::new(""), "CRTOOLS_IMAGE_DIR is not set");
    wrong(&dir.join(&"d".repeat(107)), "longer than 107 bytes");
    // What a killed daemon leaves.
    drop(Socket::new(&dir, PROXY));
    wrong(&dir.0, "was left by a criu-relay proxy that is gone");
}

#[test]
fn criu_dies_while_its_script_waits() {
    let dir = Dir::new();
    let socket = Socket::new(&dir, PROXY);
    // It says how its script has ended, which nobody waits for any more, through a shell between them.
    let mut criu = Command::new("sh")
        .args(["-c", "\"$0\"; exit 9", binary()])
        .env("CRTOOLS_SCRIPT_ACTION", "pre-stream")
        .env("CRTOOLS_IMAGE_DIR", &dir.0)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut control, request) = socket.request();
    assert_eq!(pid(&request.criu), Some(criu.id() as i32));
    criu.kill().unwrap();
    criu.wait().unwrap();
    wait_ready(request.criu.as_fd());
    // To the end of stderr: the script has ended too.
    let mut said = String::new();
    criu.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("CRIU has ended"), "{said}");
    assert!(matches!(step(&mut control), Ok(Controlled::End)));
}

#[test]
fn only_criu_makes_a_script_of_it() {
    let usage = |command: &mut Command, status, why: &str| {
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(status) && said.contains(why), "{said}");
    };
    usage(
        Command::new(binary()).env_remove("CRTOOLS_SCRIPT_ACTION"),
        2,
        "proxy, cache, resolve or wait has to be named",
    );
    // With arguments it is a command line like any other.
    usage(script("pre-stream", Path::new("/")).arg("--nonsense"), 2, "--nonsense");
}

// The daemon's side, of which a script of ours shows only the good part.

fn pair() -> (UnixStream, Control) {
    let (client, daemon) = UnixStream::pair().unwrap();
    (client, control::Control::new(daemon.into(), false, Instant::now()))
}

fn myself() -> OwnedFd {
    pidfd_open(getpid(), PidfdFlags::empty()).unwrap()
}

#[test]
fn requests_that_are_wrong() {
    let bytes = encode_request(Action::PostDump, 2, 0, 0, &[]);
    let wrong = |control: &mut Control, why: &str| {
        let said = step(control).unwrap_err();
        assert!(said.contains(why), "{said}");
    };

    let (client, mut control) = pair();
    drop(client);
    assert!(matches!(step(&mut control), Ok(Controlled::End)), "a probe");

    let (mut client, mut control) = pair();
    client.write_all(&bytes[..7]).unwrap();
    drop(client);
    wrong(&mut control, "ended in the middle of a request");

    let (mut client, mut control) = pair();
    client.write_all(&bytes).unwrap();
    wrong(&mut control, "without the one descriptor");

    let (client, mut control) = pair();
    send_with(&client, &bytes, &[client.as_fd()]).unwrap();
    wrong(&mut control, "no pidfd");

    let (client, mut control) = pair();
    let fd = myself();
    send_with(&client, &bytes, &[fd.as_fd()]).unwrap();
    send_with(&client, &[0], &[fd.as_fd()]).unwrap();
    wrong(&mut control, "another number of processes");

    let (mut client, mut control) = pair();
    send_with(&client, &bytes, &[fd.as_fd()]).unwrap();
    send_with(&client, &[0], &[fd.as_fd(), fd.as_fd()]).unwrap();
    client.write_all(b"more").unwrap();
    assert!(matches!(step(&mut control), Ok(Controlled::Request(_))));
    wrong(&mut control, "behind its request");
}
