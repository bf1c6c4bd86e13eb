//! What goes wrong at the worst moment, and sessions that follow one another closely.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use common::*;
use criu_relay::wire::criu::WriteMode;
use rustix::process::Signal;

/// A proxy with a link, and a dump of which an image has been taken.
fn half_way() -> (Daemon, Dump, TcpListener, std::net::TcpStream) {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &[]);
    let (link, _) = listener.accept().unwrap();
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", &pattern(1000, 1));
    proxy.wait_log("pages-1.img: 1000 bytes taken");
    (proxy, dump, listener, link)
}

#[test]
fn the_link_dies_while_criu_ends() {
    for reset in [false, true] {
        let (mut proxy, dump, listener, link) = half_way();
        proxy.stop();
        if reset {
            rustix::net::sockopt::set_socket_linger(&link, Some(Duration::ZERO)).unwrap();
        }
        drop(link);
        // CRIU ends with success, since everything fits the pipes; the proxy learns of both at once.
        dump.end();
        proxy.go_on();
        proxy.wait_log("the dump is complete");
        let (images, _) = old_cache(listener.accept().unwrap().0);
        assert_eq!(images.len(), 3);
        assert_eq!(proxy.wait(), 0);
    }
}

#[test]
fn a_signal_comes_while_criu_ends() {
    let (mut proxy, dump, _listener, link) = half_way();
    proxy.stop();
    proxy.signal(Signal::TERM);
    dump.end();
    proxy.go_on();
    let (images, end) = old_cache(link);
    assert_eq!((images.len(), end), (3, LinkEnd::InOrder));
    assert_eq!(proxy.wait(), 0);
}

#[test]
fn the_search_ends_while_criu_ends() {
    let (listener, port) = old_listener();
    drop(listener);
    let mut proxy = Daemon::seed_proxy(port, &["--connect-timeout", "1"]);
    let mut dump = Dump::connect(&proxy);
    let pages = dump.open("pages-1.img");
    proxy.wait_log("a dump begins");
    proxy.stop();
    drop(pages);
    dump.end();
    // Until the time for the search is up.
    let began = std::time::Instant::now();
    wait_until("a second has passed", || began.elapsed() > Duration::from_millis(1100));
    proxy.go_on();
    proxy.wait_log("this may be the only copy");
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    assert_eq!(old_cache(listener.accept().unwrap().0).0.len(), 3);
    assert_eq!(proxy.wait(), 0);
}

#[test]
fn a_cache_that_is_slow_loses_no_session() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = Daemon::seed_proxy(cache.port, &["--keep"]);
    proxy.wait_log("connected to");
    cache.stop();
    for (times, n) in [(1, "first"), (2, "second")] {
        let mut dump = Dump::connect(&proxy);
        dump.write("pages-1.img", n.as_bytes());
        dump.end();
        proxy.wait_log_times("sent, not confirmed", times);
        proxy.wait_log_times("connected to", times + 1);
    }
    cache.go_on();
    cache.wait_log_times("the dump is complete", 2);
    let mut restore = Restore::connect(&cache);
    assert!(restore.read("inventory.img").is_some());
    assert_eq!(restore.read("pages-1.img"), Some(b"second".to_vec()));
}

#[test]
fn sessions_follow_one_another_at_once() {
    const SESSIONS: usize = 300;
    let mut cache = Daemon::cache(&["--keep", "-v1"]);
    let mut proxy = Daemon::proxy(cache.port, &["--keep", "-v1"]);
    proxy.wait_log("connected to");
    let mut descriptors = (0, 0);
    for n in 0..SESSIONS {
        // Neither waits for the last session to be delivered: CRIU doesn't either.
        let mut dump = Dump::connect(&proxy);
        dump.write("pages-1.img", &pattern(20_000, n as u32));
        dump.end();
        if n == 50 {
            proxy.wait_log_times("confirmed by the cache", n + 1);
            descriptors = (proxy.descriptors(), cache.descriptors());
        }
    }
    proxy.wait_log_times("confirmed by the cache", SESSIONS);
    cache.wait_log_times("the dump is complete", SESSIONS);
    let mut restore = Restore::connect(&cache);
    assert!(restore.read("inventory.img").is_some());
    assert_eq!(restore.read("pages-1.img"), Some(pattern(20_000, SESSIONS as u32 - 1)));
    drop(restore);
    assert!(!proxy.log().contains("refused"), "{}", proxy.log());
    // A few for what is on its way.
    let now = (proxy.descriptors(), cache.descriptors());
    assert!(now.0 <= descriptors.0 + 5 && now.1 <= descriptors.1 + 5, "{descriptors:?}, now {now:?}");
    assert_eq!(proxy.terminate(), 0);
}

#[test]
fn a_whole_remote_dump_may_come_while_the_last_is_delivered() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &["--keep"]);
    let (link, _) = listener.accept().unwrap();
    let socket = proxy.dir.join("img-proxy.sock");
    let list = key("null", "parent");
    write_remote(&socket, &list, WriteMode::Append, &id_list(&["/d1"]));
    write_remote(&socket, &key("/d1", "pages-1.img"), WriteMode::Truncate, &pattern(16 << 20, 1));
    write_remote(&socket, &key("/d1", "inventory.img"), WriteMode::Truncate, b"one");
    dump_finish(&socket, Style::Y2019);
    proxy.wait_log("the dump is complete");
    // Everything of the second, its finish too, waits until the first is over.
    let second = socket.clone();
    write_remote(&second, &list, WriteMode::Append, &id_list(&["/d2"]));
    let reader = open_remote(&second, &list, None);
    write_remote(&second, &key("/d2", "inventory.img"), WriteMode::Truncate, b"two");
    dump_finish(&second, Style::Y2019);
    assert_eq!(old_cache(link).0[&list], id_list(&["/d1"]));
    assert_eq!(finish_read(reader), Ok(id_list(&["/d2"])), "it reads what it has written");
    let (images, end) = old_cache(listener.accept().unwrap().0);
    assert_eq!(end, LinkEnd::InOrder);
    assert_eq!(images[&list], id_list(&["/d2"]));
    assert_eq!(images[&key("/d2", "inventory.img")], b"two");
    proxy.wait_log_times("the dump is complete", 2);
}

#[test]
fn a_finish_and_the_next_dump_at_the_same_moment() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &["--keep"]);
    let (link, _) = listener.accept().unwrap();
    proxy.wait_log("connected to");
    let socket = proxy.dir.join("img-proxy.sock");
    let list = key("null", "parent");
    // The proxy sees all of both at once; a writer of the first is still open at its finish.
    proxy.stop();
    write_remote(&socket, &list, WriteMode::Append, &id_list(&["/d1"]));
    let mut slow = open_remote(&socket, &key("/d1", "core-1.img"), Some(WriteMode::Truncate));
    write_remote(&socket, &key("/d1", "inventory.img"), WriteMode::Truncate, b"one");
    dump_finish(&socket, Style::Y2019);
    write_remote(&socket, &list, WriteMode::Append, &id_list(&["/d2"]));
    write_remote(&socket, &key("/d2", "inventory.img"), WriteMode::Truncate, b"two");
    dump_finish(&socket, Style::Y2019);
    proxy.go_on();
    proxy.wait_log("inventory.img of snapshot /d1: 3 bytes taken");
    slow.write_all(b"slow").unwrap();
    drop(slow);
    let (images, end) = old_cache(link);
    assert_eq!((images.len(), end), (3, LinkEnd::InOrder));
    assert_eq!(images[&list], id_list(&["/d1"]));
    assert_eq!(images[&key("/d1", "core-1.img")], b"slow");
    let (images, end) = old_cache(listener.accept().unwrap().0);
    assert_eq!((images.len(), end), (2, LinkEnd::InOrder));
    assert_eq!(images[&list], id_list(&["/d2"]));
}

#[test]
fn without_keep_nobody_waits_for_a_session_that_never_comes() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &[]);
    let (link, _) = listener.accept().unwrap();
    proxy.wait_log("connected to");
    let (mut first, mut second) = (Dump::connect(&proxy), Dump::connect(&proxy));
    first.write("pages-1.img", &pattern(16 << 20, 1));
    first.end();
    proxy.wait_log("the dump is complete");
    let _pages = second.open("pages-1.img");
    assert_closed(&mut second.0);
    let list = key("", "parent");
    let mut late = open_remote(&proxy.dir.join("img-proxy.sock"), &list, Some(WriteMode::Append));
    assert_closed(&mut late);
    proxy.wait_log_times("still being delivered", 2);
    assert_eq!(old_cache(link).0.len(), 3);
    assert_eq!(proxy.wait(), 0);
}

#[test]
fn a_dump_that_waits_and_has_ended_is_not_left_behind() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &["--keep"]);
    let (link, _) = listener.accept().unwrap();
    proxy.wait_log("connected to");
    let mut first = Dump::connect(&proxy);
    first.write("pages-1.img", &pattern(16 << 20, 1));
    first.end();
    proxy.wait_log("the dump is complete");
    // Small enough for its pipes: its CRIU has ended, and killed the process, before a byte was read.
    let mut second = Dump::connect(&proxy);
    second.write("pages-1.img", b"second");
    second.end();
    proxy.signal(Signal::TERM);
    proxy.wait_log("ask once more");
    assert!(old_cache(link).0[&key("", "pages-1.img")].len() == 16 << 20);
    let (images, _) = old_cache(listener.accept().unwrap().0);
    assert_eq!(images[&key("", "pages-1.img")], b"second");
    assert_eq!(proxy.wait(), 0);
}

#[test]
fn a_lost_link_is_not_taken_for_the_next() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &["--keep"]);
    let (link, _) = listener.accept().unwrap();
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", &pattern(1000, 1));
    proxy.wait_log("pages-1.img: 1000 bytes taken");
    // The link is lost and CRIU fails in the same moment.
    proxy.stop();
    rustix::net::sockopt::set_socket_linger(&link, Some(Duration::ZERO)).unwrap();
    drop((link, dump));
    proxy.go_on();
    proxy.wait_log("the dump failed");
    let (link, _) = listener.accept().unwrap();
    proxy.wait_log_times("connected to", 2);
    Dump::connect(&proxy).end();
    assert_eq!(old_cache(link).0.len(), 2);
    proxy.wait_log("sent, not confirmed");
    assert_eq!(proxy.log().matches("the dump failed").count(), 1);
    // One link for the next session, and no other.
    let _link = listener.accept().unwrap();
    proxy.wait_log_times("connected to", 3);
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn many_connections_and_a_signal() {
    // More than a batch accepts, left behind by a CRIU that has ended with success.
    const IMAGES: usize = 1000;
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &["-v1"]);
    let (link, _) = listener.accept().unwrap();
    proxy.wait_log("connected to");
    let socket = proxy.dir.join("img-proxy.sock");
    proxy.stop();
    proxy.signal(Signal::TERM);
    write_remote(&socket, &key("", "parent"), WriteMode::Append, &id_list(&["/d"]));
    for i in 0..IMAGES {
        write_remote(&socket, &key("/d", &format!("{i}.img")), WriteMode::Truncate, b"x");
    }
    write_remote(&socket, &key("/d", "inventory.img"), WriteMode::Truncate, b"x");
    dump_finish(&socket, Style::Y2019);
    proxy.go_on();
    let (images, end) = old_cache(link);
    assert_eq!((images.len(), end), (IMAGES + 2, LinkEnd::InOrder));
    assert_eq!(proxy.wait(), 0);
}

#[test]
fn a_signal_comes_while_the_whole_dump_is_in_the_socket() {
    for args in [&[][..], &["--keep"]] {
        let mut cache = Daemon::cache(args);
        cache.stop();
        cache.signal(Signal::TERM);
        let mut peer = OldProxy::connect(&cache);
        peer.send(&key("", "pages-1.img"), &pattern(100_000, 1));
        peer.end();
        cache.go_on();
        cache.wait_log("ask once more to drop it");
        let mut restore = Restore::connect(&cache);
        assert!(restore.read("inventory.img").is_some());
        assert!(restore.read("pages-1.img") == Some(pattern(100_000, 1)));
        drop(restore);
        assert_eq!(cache.wait(), 0);
    }
}

#[test]
fn a_cache_asked_to_go_does_not_leave_what_came_meanwhile() {
    let mut cache = Daemon::cache(&["--keep"]);
    let restore = |cache: &Daemon| {
        let mut restore = Restore::connect(cache);
        assert!(restore.read("inventory.img").is_some() && restore.read("pages-1.img").is_some());
    };
    let mut peer = OldProxy::connect(&cache);
    peer.send(&key("", "pages-1.img"), b"first");
    peer.end();
    cache.wait_log("the dump is complete");
    let mut peer = OldProxy::connect(&cache);
    peer.send(&key("", "pages-1.img"), b"second");
    cache.wait_log_times("a dump begins", 2);
    cache.signal(Signal::TERM);
    cache.wait_log("ask once more");
    // The first is restored, and with that the cache might go; but the second is on its way.
    restore(&cache);
    cache.wait_log("taken for a success");
    peer.end();
    cache.wait_log_times("the dump is complete", 2);
    assert!(cache.is_running());
    restore(&cache);
    assert_eq!(cache.wait(), 0);
}

#[test]
fn nobody_waits_frozen_behind_a_dump_that_has_no_cache() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &["--keep"]);
    let (link, _) = listener.accept().unwrap();
    proxy.wait_log("connected to");
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", &pattern(16 << 20, 1));
    dump.end();
    proxy.wait_log("the dump is complete");
    // While it is being delivered the next may wait ...
    let mut next = Dump::connect(&proxy);
    let _pages = next.open("pages-1.img");
    // ... but not when nobody knows for how long.
    drop((listener, link));
    assert_closed(&mut next.0);
    let mut later = Dump::connect(&proxy);
    assert_closed(&mut later.0);
    proxy.wait_log("the images of the last dump wait for their cache");
    // They are still here.
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    assert_eq!(old_cache(listener.accept().unwrap().0).0.len(), 3);
    proxy.wait_log("sent, not confirmed");
}

#[test]
fn a_criu_that_has_asked_for_nothing_belongs_to_no_session() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = Daemon::proxy(cache.port, &["--keep"]);
    // Both connect, before either has begun.
    let (one, mut two) = (Dump::connect(&proxy), Dump::connect(&proxy));
    one.end();
    proxy.wait_log("confirmed by the cache");
    two.write("pages-1.img", b"of the second");
    two.end();
    cache.wait_log_times("the dump is complete", 2);
}

#[test]
fn the_last_dump_of_a_series_fails_in_time_without_a_link() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &["--connect-timeout", "1"]);
    let (link, _) = listener.accept().unwrap();
    let socket = proxy.dir.join("img-proxy.sock");
    let list = key("null", "parent");
    write_remote(&socket, &list, WriteMode::Append, &id_list(&["/pre"]));
    write_remote(&socket, &key("/pre", "inventory.img"), WriteMode::Truncate, b"inventory");
    proxy.wait_log("inventory.img of snapshot /pre: 9 bytes sent");
    // Between two dumps the cache goes. What is here is complete, so it is kept ...
    drop((listener, link));
    proxy.wait_log("the link to the cache is lost");
    // ... until the next dump begins, which can still be made to fail.
    write_remote(&socket, &list, WriteMode::Append, &id_list(&["/final"]));
    let mut pages = open_remote(&socket, &key("/final", "pages-1.img"), Some(WriteMode::Truncate));
    assert!(pages.write_all(&pattern(5_000_000, 3)).is_err());
    assert_eq!(proxy.wait(), 1, "{}", proxy.log());
}

#[test]
fn after_a_failed_dump_the_next_may_come() {
    let cache = Daemon::cache(&["--keep"]);
    let mut proxy = Daemon::proxy(cache.port, &["--keep"]);
    let socket = proxy.dir.join("img-proxy.sock");
    let list = key("null", "parent");
    for times in 1..=2 {
        // A writer that dies with a descriptor in the wrong place spoils its dump; CRIU sends no finish.
        write_remote(&socket, &list, WriteMode::Append, &id_list(&["/d"]));
        let mut bad = open_remote(&socket, &key("/d", "pages-1.img"), Some(WriteMode::Truncate));
        bad.write_all(b"data").unwrap();
        // The reader behind it waits in line: so its writer is writing.
        let _behind = open_remote(&socket, &key("/d", "pages-1.img"), None);
        proxy.wait_log_times("a client waits its turn", times);
        let (reader, _writer) = std::io::pipe().unwrap();
        let _ = send_with(&bad, b"x", &[std::os::fd::AsFd::as_fd(&reader)]);
        proxy.wait_log_times("the dump failed", times);
        let mut rest = open_remote(&socket, &key("/d", "core-1.img"), Some(WriteMode::Truncate));
        assert_closed(&mut rest);
    }
    // Another dump begins, in either dialect.
    write_remote(&socket, &list, WriteMode::Append, &id_list(&["/e"]));
    write_remote(&socket, &key("/e", "inventory.img"), WriteMode::Truncate, b"x");
    dump_finish(&socket, Style::Y2017);
    proxy.wait_log("confirmed by the cache");
    let mut bad = open_remote(&socket, &key("/f", "pages-1.img"), Some(WriteMode::Truncate));
    bad.write_all(b"data").unwrap();
    proxy.wait_log_times("a dump begins", 4);
    let (reader, _writer) = std::io::pipe().unwrap();
    let _ = send_with(&bad, b"x", &[std::os::fd::AsFd::as_fd(&reader)]);
    proxy.wait_log_times("the dump failed", 3);
    Dump::connect(&proxy).end();
    proxy.wait_log_times("confirmed by the cache", 2);
}

#[test]
fn what_an_earlier_restore_asked_for_does_not_count() {
    let mut cache = Daemon::cache(&[]);
    let mut peer = OldProxy::connect(&cache);
    peer.send(&key("null", "parent"), &id_list(&["/d"]));
    peer.send(&key("/d", "pages-1.img"), b"pages");
    peer.send(&key("/d", "inventory.img"), b"inventory");
    drop(peer);
    cache.wait_log("the dump is complete");
    let socket = cache.dir.join("img-cache.sock");
    // The first restore reads everything and is killed, so that it sends no finish.
    read_remote(&socket, &key("/d", "inventory.img")).unwrap();
    read_remote(&socket, &key("/d", "pages-1.img")).unwrap();
    // The second fails at once.
    read_remote(&socket, &key("/d", "inventory.img")).unwrap();
    restore_finish(&socket, Style::Y2019);
    cache.wait_log("start criu restore again");
    read_remote(&socket, &key("/d", "inventory.img")).unwrap();
    read_remote(&socket, &key("/d", "pages-1.img")).unwrap();
    restore_finish(&socket, Style::Y2019);
    assert_eq!(cache.wait(), 0);
}

#[test]
fn a_restore_may_wait_for_the_next_dump() {
    let mut cache = Daemon::cache(&["--keep"]);
    let session = |id: &str, n: usize, cache: &mut Daemon| {
        let mut peer = OldProxy::connect(cache);
        peer.send(&key("null", "parent"), &id_list(&[id]));
        cache.wait_log_times("a dump begins", n);
        peer.send(&key(id, "inventory.img"), id.as_bytes());
        drop(peer);
        cache.wait_log_times("the dump is complete", n);
    };
    session("/d1", 1, &mut cache);
    let socket = cache.dir.join("img-cache.sock");
    let waiting = open_remote(&socket, &key("/d2", "inventory.img"), None);
    assert_eq!(read_remote(&socket, &key("/d1", "none.img")), Err(2), "that dump is complete");
    session("/d2", 2, &mut cache);
    assert_eq!(finish_read(waiting), Ok(b"/d2".to_vec()));
}

#[test]
fn links_of_a_daemon_that_was_killed_go_too() {
    let second = Dir::new();
    let path = second.0.to_str().unwrap().to_string();
    let mut killed = Daemon::cache(&["-D", &path]);
    killed.signal(Signal::KILL);
    killed.wait();
    let dir = std::mem::replace(&mut killed.dir, Dir::new());
    let mut cache = Daemon::cache_in(dir, &["-D", &path]);
    connect(&second.join("streamer-serve.sock"));
    let first = cache.dir.0.clone();
    cache.terminate();
    assert_eq!(fs::read_dir(&second.0).unwrap().count(), 0);
    fs::set_permissions(&second.0, fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new(binary());
    command.args(["cache", "--port", "0", "-D"]).arg(first).args(["-D", &path]);
    let output = command.output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("writable by others"));
}

#[test]
fn a_proxy_never_takes_itself_for_its_cache() {
    if !rustix::process::geteuid().is_root() {
        skip("a_proxy_never_takes_itself_for_its_cache", "a network namespace needs root");
        return;
    }
    // Ten ports for outgoing connections, one of them the cache's, where nobody listens: sooner or later the
    // kernel gives the socket that connects to it the very same port.
    let mut command = Command::new("unshare");
    let setup =
        "ip link set lo up; echo 40000 40009 > /proc/sys/net/ipv4/ip_local_port_range; exec \"$0\" \"$@\"";
    command.args(["-n", "sh", "-c", setup, binary(), "proxy", "--address", "127.0.0.1", "--port", "40004"]);
    let mut proxy = Daemon::start(Dir::new(), command, &["--keep"]);
    proxy.wait_log("nobody listens there");
    assert!(!proxy.log().contains("connected to"));
}

#[test]
fn waiting_costs_no_time() {
    let mut cache = Daemon::cache(&["--keep"]);
    let socket = cache.dir.join("img-cache.sock");
    let _waiting = open_remote(&socket, &key("/d", "x"), None);
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    let mut half = connect(&socket);
    half.write_all(&[1, 2]).unwrap();
    let mut peer = OldProxy::connect(&cache);
    peer.send(&key("/e", "small"), b"small");
    peer.send(&key("/e", "big"), &pattern(1_000_000, 1));
    let mut sent = open_remote(&socket, &key("/e", "small"), None);
    read_answer(&mut sent).unwrap();
    sent.read_exact(&mut [0; 5]).unwrap();
    let mut slow = open_remote(&socket, &key("/e", "big"), None);
    read_answer(&mut slow).unwrap();
    cache.wait_log("big of snapshot /e: 976.6 KiB received");
    let (listener, port) = old_listener();
    let proxy = Daemon::seed_proxy(port, &[]);
    let (_link, _) = listener.accept().unwrap();
    // The peer reads nothing: the proxy looks at its send queue until it does.
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", &pattern(1_000_000, 1));
    dump.end();
    let ticks = |daemon: &Daemon| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.child.id())).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').map(str::to_string).collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = (ticks(&cache), ticks(&proxy));
    let began = std::time::Instant::now();
    wait_until("two seconds have passed", || began.elapsed() > Duration::from_secs(2));
    let after = (ticks(&cache), ticks(&proxy));
    // 200 ticks are all of one processor.
    assert!(after.0 - before.0 <= 2, "the cache: {} ticks of 200", after.0 - before.0);
    assert!(after.1 - before.1 <= 10, "the proxy: {} ticks of 200", after.1 - before.1);
}
