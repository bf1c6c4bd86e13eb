//! Command line, start, readiness, signals, files, limits.

mod common;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::*;
use criu_relay::wire::criu::WriteMode;
use rustix::process::{Pid, Signal, kill_process};

fn run(args: &[&str]) -> Output {
    Command::new(binary()).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn usage() {
    for args in [&[][..], &["relay"], &["proxy", "--nonsense"], &["cache", "--port", "x"]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(text(&output.stderr).contains("Try criu-relay --help") && output.stdout.is_empty());
    }
    let help = run(&["--help"]);
    assert!(help.status.success() && text(&help.stdout).contains("--connect-timeout SECONDS"));
    let version = run(&["-V"]);
    assert_eq!(text(&version.stdout), format!("criu-relay {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn what_can_not_start_says_why() {
    let dir = Dir::new();
    let path = dir.0.to_str().unwrap();
    let open = dir.join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let long = format!("{path}/{}", "d".repeat(100));
    fs::create_dir(&long).unwrap();
    for (args, why) in [
        (vec!["cache", "-D", path, "--address", "0.0.0.0", "--port", "0"], "needs --allow-peer"),
        (vec!["cache", "-D", open.to_str().unwrap()], "writable by others"),
        (vec!["proxy", "-D", &long], "longer than 107 bytes"),
        (vec!["proxy", "-D", "/nonexistent"], "No such file"),
        (vec!["proxy", "-D", path, "--ps-socket", "1"], "is no socket"),
        (vec!["proxy", "-D", path, "--ps-socket", "77"], "can't be taken over"),
        (vec!["proxy", "-D", path, "--address", "no.such.host.invalid"], "can't be resolved"),
        (vec!["cache", "-D", path, "-d", "--address", "0.0.0.0"], "see "),
    ] {
        let output = run(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(text(&output.stderr).contains(why), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty());
        let sockets = fs::read_dir(&dir.0)
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_socket());
        assert_eq!(sockets.count(), 0, "{args:?} left a socket");
    }
}

#[test]
fn sockets_are_private_and_go_with_the_daemon() {
    let mut cache = Daemon::cache(&["--pidfile", "pid", "--keep"]);
    let mut proxy = Daemon::proxy(cache.port, &["--keep"]);
    for (daemon, names) in [
        (&mut cache, ["img-cache.sock", "streamer-serve.sock"]),
        (&mut proxy, ["img-proxy.sock", "streamer-capture.sock"]),
    ] {
        for name in names {
            let meta = fs::metadata(daemon.dir.join(name)).unwrap();
            assert!(meta.file_type().is_socket());
            assert_eq!(meta.mode() & 0o777, 0o600);
        }
        // One thread, and nothing large.
        let tasks = fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap();
        assert_eq!(tasks.count(), 1);
    }
    let pid = fs::read_to_string(cache.dir.join("pid")).unwrap();
    assert_eq!(pid.trim(), cache.child.id().to_string());
    assert_eq!(proxy.terminate(), 0);
    assert_eq!(cache.terminate(), 0);
    for daemon in [&cache, &proxy] {
        let left: Vec<_> =
            fs::read_dir(&daemon.dir.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["log"]);
    }
}

#[test]
fn a_signal_before_any_dump() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = Daemon::proxy(cache.port, &[]);
    proxy.signal(Signal::INT);
    assert_eq!(proxy.wait(), 1, "nothing has been moved");
    assert_eq!(cache.terminate(), 1);
}

#[test]
fn a_dead_daemons_sockets_are_replaced_and_a_live_ones_are_not() {
    let dir = Dir::new();
    drop(UnixListener::bind(dir.join("img-cache.sock")).unwrap());
    let mut first = Daemon::cache_in(dir, &[]);
    let path = first.dir.0.to_str().unwrap().to_string();
    let second = run(&["cache", "-D", &path, "--port", "0"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("belongs to a daemon that is running"));
    // Killed, so that it leaves its sockets.
    first.signal(Signal::KILL);
    first.wait();
    assert!(first.dir.join("streamer-serve.sock").exists());
    let dir = std::mem::replace(&mut first.dir, Dir::new());
    let mut third = Daemon::cache_in(dir, &[]);
    Restore::connect(&third);
    assert_eq!(third.terminate(), 1);
}

/// A process that is nobody's child: ended if its test fails.
struct KillOnDrop(Pid);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

#[test]
fn in_the_background() {
    let dir = Dir::new();
    let path = dir.0.to_str().unwrap();
    let output = run(&["cache", "-d", "-D", path, "--port", "0", "--pidfile", "pid"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    // It accepts already, and the parent has said where.
    let address = text(&output.stdout);
    TcpStream::connect(address.trim()).unwrap();
    connect(&dir.join("streamer-serve.sock"));
    let pid: i32 = fs::read_to_string(dir.join("pid")).unwrap().trim().parse().unwrap();
    let guard = KillOnDrop(Pid::from_raw(pid).unwrap());
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap();
    assert_eq!(session, pid.to_string(), "a session of its own");
    assert!(fs::read_to_string(dir.join("criu-relay-cache.log")).unwrap().contains("is ready"));
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    wait_until("it has ended", || !dir.join("pid").exists());
    std::mem::forget(guard);
    assert!(!dir.join("streamer-serve.sock").exists());
}

// Runs a shell in which descriptor 9 is `file`, as an operator's script would.
fn with_descriptor_9(file: impl Into<Stdio>, args: &str) -> Command {
    let mut command = Command::new("sh");
    // The shell has the file as 0 and gives it on as 9.
    command.args(["-c", &format!("exec \"$0\" {args} \"$@\" 9<&0 0</dev/null"), binary()]);
    command.stdin(file);
    command
}

#[test]
fn readiness_is_a_nul_and_the_end() {
    let dir = Dir::new();
    let (mut reader, writer) = io::pipe().unwrap();
    let mut command = with_descriptor_9(writer, "cache --keep --port 0 --status-fd 9 -o log");
    let mut child = command.arg("-D").arg(&dir.0).stdout(Stdio::null()).spawn().unwrap();
    drop(command);
    let mut told = Vec::new();
    // To the end of file: the daemon must not keep any copy of it.
    reader.read_to_end(&mut told).unwrap();
    assert_eq!(told, b"\0");
    connect(&dir.join("streamer-serve.sock"));
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn an_inherited_connection() {
    let (listener, port) = old_listener();
    let ours = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    let start = |link: TcpStream, verb: &str| {
        let dir = Dir::new();
        let mut command =
            with_descriptor_9(std::os::fd::OwnedFd::from(link), &format!("{verb} --ps-socket 9"));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.arg("-D").arg(&dir.0).spawn().unwrap();
        wait_until("it is ready", || {
            let name = if verb == "proxy" { "streamer-capture.sock" } else { "streamer-serve.sock" };
            std::os::unix::net::UnixStream::connect(dir.join(name)).is_ok()
        });
        (dir, child)
    };
    let (source, mut proxy) = start(ours, "proxy");
    let (target, mut cache) = start(theirs, "cache");
    let mut dump = Dump(connect(&source.join("streamer-capture.sock")));
    dump.write("pages-1.img", b"pages");
    dump.end();
    assert!(proxy.wait().unwrap().success());
    let mut restore = Restore(connect(&target.join("streamer-serve.sock")));
    assert!(restore.read("inventory.img").is_some());
    assert_eq!(restore.read("pages-1.img"), Some(b"pages".to_vec()));
    drop(restore);
    assert!(cache.wait().unwrap().success());
}

// A daemon with so few descriptors.
fn limited(descriptors: u32, verb: &str, args: &[&str]) -> Daemon {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -n {descriptors}; exec \"$0\" \"$@\""), binary(), verb]);
    Daemon::start(Dir::new(), command, args)
}

#[test]
fn without_descriptors_accepting_pauses_and_goes_on() {
    let mut cache = limited(64, "cache", &["--port", "0"]);
    let socket = cache.dir.join("streamer-serve.sock");
    // Far more than it can take; those who are not accepted wait in the backlog.
    let crowd: Vec<_> = (0..200).map(|_| connect(&socket)).collect();
    cache.wait_log("accepting pauses");
    drop(crowd);
    let mut peer = OldProxy::connect(&cache);
    peer.send(&key("/d", "a.img"), b"still works");
    assert_eq!(
        read_remote(&cache.dir.join("img-cache.sock"), &key("/d", "a.img")),
        Ok(b"still works".to_vec())
    );
}

#[test]
fn large_images_beyond_the_descriptors_share_one_file() {
    let cache = limited(64, "cache", &["--port", "0"]);
    let mut peer = OldProxy::connect(&cache);
    let image = |i: u32| (key("/d", &format!("pages-{i}.img")), pattern(40_000 + i as usize * 100, i));
    for i in 0..200 {
        let (key, bytes) = image(i);
        peer.send(&key, &bytes);
    }
    for i in (0..200).rev() {
        let (key, bytes) = image(i);
        assert!(read_remote(&cache.dir.join("img-cache.sock"), &key) == Ok(bytes), "{i}");
    }
    assert!(cache.descriptors() < 64, "{}", cache.descriptors());
}

#[test]
fn a_client_that_stalls_in_its_header_is_closed() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &[]);
    let cache = std::thread::spawn(move || old_cache(listener.accept().unwrap().0));
    let began = Instant::now();
    // Silent, half-way, and half-way into a later request of the stream dialect.
    let mut stalled =
        vec![connect(&proxy.dir.join("img-proxy.sock")), connect(&proxy.dir.join("img-proxy.sock"))];
    stalled[1].write_all(&[40, 0, 0, 0, 1]).unwrap();
    let mut half = Dump::connect(&proxy).0;
    half.write_all(&[40, 0]).unwrap();
    stalled.push(half);
    for mut client in stalled {
        assert_closed(&mut client);
    }
    assert!(began.elapsed() >= Duration::from_secs(9));
    proxy.wait_log_times("kept us waiting", 3);
    Dump::connect(&proxy).end();
    assert_eq!(proxy.wait(), 0, "the others go on");
    assert_eq!(cache.join().unwrap().0.len(), 2);
}

#[test]
fn memory_when_idle() {
    let cache = Daemon::cache(&[]);
    let proxy = Daemon::proxy(cache.port, &[]);
    for (name, daemon) in [("proxy", &proxy), ("cache", &cache)] {
        let idle = daemon.memory("VmRSS");
        println!("{name}: {idle} KiB resident when idle");
        // The limit is for the release binary; a debug build is not larger than twice that.
        assert!(idle <= 8192, "{name}: {idle} KiB");
    }
}

#[test]
fn ten_thousand_waiting_readers() {
    const READERS: usize = 10_000;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
    if limit.maximum.is_some_and(|most| most < READERS as u64 * 4 / 3 + 200) {
        skip("ten_thousand_waiting_readers", &format!("RLIMIT_NOFILE allows only {:?}", limit.maximum));
        return;
    }
    let cache = Daemon::cache(&["-v1"]);
    let before = cache.memory("VmRSS");
    let socket = cache.dir.join("img-cache.sock");
    let image = |i: usize| key("/d", &format!("core-{}.img", i % 100));
    let readers: Vec<_> = (0..READERS).map(|i| open_remote(&socket, &image(i), None)).collect();
    wait_until("all are accepted", || cache.descriptors() > READERS);
    let bytes = (cache.memory("VmRSS") - before) * 1024 / READERS as u64;
    println!("{bytes} bytes resident per waiting reader");
    let mut peer = OldProxy::connect(&cache);
    for i in 0..100 {
        peer.send(&image(i), format!("image {i}").as_bytes());
    }
    for (i, reader) in readers.into_iter().enumerate() {
        assert_eq!(finish_read(reader), Ok(format!("image {}", i % 100).into_bytes()));
    }
    assert!(bytes <= 2048, "{bytes} bytes per waiting reader");
}

#[test]
fn a_hundred_thousand_images() {
    const IMAGES: usize = 100_000;
    let cache = Daemon::cache(&["-v1"]);
    let before = cache.memory("VmRSS");
    let mut peer = OldProxy::connect(&cache);
    let image = |i: usize| key("/dump", &format!("image-{i}.img"));
    let payload = vec![7; 1024];
    let mut bytes = Vec::new();
    for i in 0..IMAGES {
        let transfer =
            criu_relay::wire::criu::Transfer { key: image(i), mode: WriteMode::Append, size: 1024 };
        bytes.extend(criu_relay::wire::criu::encode_transfer(&transfer));
        bytes.extend(&payload);
    }
    peer.0.write_all(&bytes).unwrap();
    let socket = cache.dir.join("img-cache.sock");
    for i in [IMAGES - 1, 0, IMAGES / 2] {
        assert_eq!(read_remote(&socket, &image(i)).as_ref(), Ok(&payload));
    }
    let each = (cache.memory("VmRSS") - before) * 1024 / IMAGES as u64 - 1024;
    println!("{each} bytes resident per image beyond its payload");
    assert!(each <= 600, "{each} bytes per image");
}

#[test]
fn a_full_disk_under_the_log_ends_nothing() {
    let dir = Dir::new();
    let mut child = Command::new(binary())
        .args(["cache", "--port", "0", "--keep", "-v3", "-o", "/dev/full", "-D"])
        .arg(&dir.0)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it accepts", || std::os::unix::net::UnixStream::connect(dir.join("img-cache.sock")).is_ok());
    // Both say something to the log.
    connect(&dir.join("img-cache.sock")).write_all(&[0xff; 4]).unwrap();
    let mut client = open_remote(&dir.join("img-cache.sock"), &key("/d", "a"), Some(WriteMode::Append));
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_terminal_that_goes_takes_no_only_copy_with_it() {
    let mut cache = Daemon::cache(&[]);
    OldProxy::connect(&cache).end();
    cache.wait_log("the dump is complete");
    for times in 1..=3 {
        cache.signal(Signal::HUP);
        cache.wait_log_times("ask once more", times);
    }
    cache.signal(Signal::TERM);
    cache.wait_log_times("ask once more", 4);
    assert_eq!(cache.terminate(), 1);
    let mut idle = Daemon::cache(&["--keep"]);
    idle.signal(Signal::HUP);
    assert_eq!(idle.wait(), 0);
}

#[test]
fn a_log_file_in_the_work_directory() {
    let work = Dir::new();
    let dir = Dir::new();
    let mut child = Command::new(binary())
        .args(["cache", "--port", "0", "--keep", "-o", "relay.log", "--pidfile", "relay.pid", "-D"])
        .arg(&dir.0)
        .arg("-W")
        .arg(&work.0)
        .stdout(Stdio::null())
        .stderr(Stdio::from(File::create(dir.join("stderr")).unwrap()))
        .spawn()
        .unwrap();
    wait_until("it is ready", || {
        fs::read_to_string(work.join("relay.log")).is_ok_and(|log| log.contains("is ready"))
    });
    assert!(work.join("relay.pid").exists() && work.join("img-cache.sock").exists());
    assert!(!work.join("streamer-serve.sock").exists());
    assert_eq!(fs::read(dir.join("stderr")).unwrap(), b"");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!work.join("relay.pid").exists() && !work.join("img-cache.sock").exists());
}
