//! Corners of scripted and other sessions, each of which a daemon once got wrong.

mod common;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Instant;

use common::relay::{FakeCache, FakeProxy};
use common::script::{Bench, Script, played, pre_stream};
use common::*;
use criu_relay::wire::criu::{self, WriteMode};
use criu_relay::wire::relay::{self, Kind};

// Between pre-stream, which was granted, and the dump's first image, the link is lost and comes back with an old cache.
#[test]
fn nothing_unconfirmed_is_accepted_unasked() {
    let cache = FakeCache::new();
    let proxy = Daemon::proxy(cache.port, &[]);
    let held = cache.accept();
    pre_stream(&proxy).agrees();
    drop(held);
    let (old, _) = cache.greeted();
    let old = std::thread::spawn(move || io::copy(&mut &old.stream, &mut io::sink()));
    let mut bench = Bench::connected(proxy);
    bench.proxy.wait_log("seed protocol");
    // It is refused at the first of these, or at the end.
    for name in ["pstree.img", "inventory.img"] {
        let pipe = bench.dump.as_mut().unwrap().try_open(name);
        let _ = pipe.and_then(|mut pipe| pipe.write_all(b"x"));
    }
    let (status, why) = bench.post_dump().end();
    assert_ne!(status, 0, "the source may die: '{why}'\n{}", bench.proxy.log());
    drop(bench);
    let _ = old.join().unwrap();
}

// The source is killed by somebody else while CRIU is held, and the link is lost before the cache has confirmed: the
// images are all that is left of it.
#[test]
fn nothing_is_rolled_back_when_the_source_is_dead() {
    let (cache, mut held, mut bench) = played(&[]);
    let _script = bench.held(&mut held);
    bench.source.kill();
    bench.proxy.wait_log("a process of the source is dead, 0 are left");
    drop(held);
    let said = cache.accept().hear();
    assert!(matches!(said, Kind::Resume(_)), "{said:?}\n{}", bench.proxy.log());
}

// As above, but the cache stays silent behind its link, beyond --confirm-timeout.
#[test]
fn a_dead_source_and_a_silent_cache_cost_no_time() {
    const WAITS: &str = "it is waited for, since the source is dead";
    let began = Instant::now();
    let (_cache, mut held, mut bench) = played(&["--confirm-timeout", "1"]);
    let _script = bench.held(&mut held);
    bench.source.kill();
    bench.proxy.wait_log(WAITS);
    let switches = |proxy: &Daemon| proxy.status("voluntary_ctxt").parse::<u64>().unwrap();
    let before = switches(&bench.proxy);
    // For another second.
    let said = bench.proxy.log().matches(WAITS).count();
    bench.proxy.wait_log_times(WAITS, said + 1);
    let woken = switches(&bench.proxy) - before;
    assert!(woken < 50, "woken {woken} times\n{}", bench.proxy.log());
    let said = bench.proxy.log().matches(WAITS).count() as u64;
    assert!(said <= began.elapsed().as_secs(), "said {said} times\n{}", bench.proxy.log());
}

// With --keep the idle link is lost in the moment in which a dump begins.
#[test]
fn a_session_is_announced_once() {
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, &["--keep"]);
    let held = cache.accept();
    proxy.wait_log("connected to");
    proxy.stop();
    drop(held);
    let mut dump = Dump::connect(&proxy);
    let mut pipe = dump.open("core-1.img");
    pipe.write_all(b"abc").unwrap();
    proxy.go_on();
    let mut peer = cache.accept().peer;
    let mut hellos = 0;
    loop {
        match peer.hear() {
            Kind::Hello(_) => hellos += 1,
            Kind::Open(_) => break,
            _ => {}
        }
    }
    assert_eq!(hellos, 1, "{}", proxy.log());
}

// A cache that keeps has stored a session, the proxy has not heard so, and meanwhile another proxy's session has come.
#[test]
fn whoever_comes_back_after_another_session_hears_what_was_stored() {
    let cache = Daemon::cache(&["--keep"]);
    let mut one = FakeProxy::connect_for(&cache, 1);
    one.begin(1, false);
    one.stream_image("core-1.img", b"one");
    one.end();
    one.peer.reset();
    let mut other = FakeProxy::connect_for(&cache, 2);
    other.begin(2, false);
    other.stream_image("core-1.img", b"other");
    other.end();
    let mut again = FakeProxy::connect_for(&cache, 1);
    assert_eq!(one.run, again.run);
    again.peer.say(Kind::Resume(relay::Resume { session: one.session, run: one.run }));
    let said = again.peer.hear();
    assert!(matches!(said, Kind::AllStored(_)), "{said:?}\n{}", cache.log());
}

// --accept-unconfirmed: CRIU's connection ends while its script waits at post-dump for an answer: it has killed
// nothing.
#[test]
fn a_criu_that_ends_unanswered_has_not_dumped() {
    let (listener, port) = old_listener();
    let proxy = Daemon::seed_proxy(port, &["--accept-unconfirmed"]);
    let link = listener.accept().unwrap().0;
    let mut bench = Bench::with(proxy);
    // More than fits into the sockets.
    bench.dump.as_mut().unwrap().write("pages-2.img", &pattern(32 << 20, 1));
    bench.images();
    let script = bench.post_dump();
    bench.proxy.wait_log("CRIU is held");
    bench.proxy.wait_log("inventory.img: 13 bytes taken");
    bench.disconnect();
    bench.proxy.wait_log("CRIU ended before its action script was answered");
    drop(script);
    let old = std::thread::spawn(move || old_cache(link));
    let status = bench.proxy.wait();
    let (images, end) = old.join().unwrap();
    assert!(status == 1 && end == LinkEnd::Reset, "{status} {end:?} {}\n{}", images.len(), bench.proxy.log());
}

// Processes of a PID namespace that the proxy can't see all have the process id 0 there: none of them can announce
// itself, or be taken for one that has.
#[test]
fn process_id_0_is_nobody_in_particular() {
    let unshare = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", binary()]).args(args);
        command
    };
    if !unshare(&["--version"]).status().is_ok_and(|status| status.success()) {
        return skip("process_id_0_is_nobody_in_particular", "no PID namespace can be made");
    }
    let cache = Daemon::cache(&[]);
    let args = ["proxy", "--address", "127.0.0.1", "--port", &cache.port.to_string()];
    let mut proxy = Daemon::start(Dir::new(), unshare(&args), &[]);
    proxy.wait_log("connected to");
    Script::of_another("pre-stream", &proxy, None).refuses("not visible");
    let mut dump = Dump::connect(&proxy);
    dump.write("core-1.img", b"x");
    dump.end();
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
}

// --retain small: page images that the cache has are not kept here, and can't be appended to.
#[test]
fn a_refused_append_fails_the_dump() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = Daemon::proxy(cache.port, &["--retain", "small"]);
    proxy.wait_log("connected to");
    let socket = proxy.dir.join("img-proxy.sock");
    let pages = key("/d", "pages-1.img");
    write_remote(&socket, &key("", "parent"), WriteMode::Append, &id_list(&["/d"]));
    write_remote(&socket, &pages, WriteMode::Truncate, b"first");
    cache.wait_log("pages-1.img of snapshot /d: 5 bytes received");
    proxy.wait_log("pages-1.img of snapshot /d: stored by the cache, not kept here any more");
    // A writer writes and closes; it does not look.
    let mut append = open_remote(&socket, &pages, Some(WriteMode::Append));
    let _ = append.write_all(b"second");
    drop(append);
    // The proxy may have ended already: an image, and the finish.
    for (key, bytes) in [(key("/d", "inventory.img"), &b"y"[..]), (key("", ""), b"")] {
        let Ok(mut client) = UnixStream::connect(&socket) else { break };
        let header = criu::encode_request(&key, Some(WriteMode::Truncate));
        let _ = client.write_all(&header).and_then(|()| client.write_all(bytes));
    }
    let status = proxy.wait();
    let whole = cache.log().contains("pages-1.img of snapshot /d: 11 bytes received");
    assert!(status == 1 || whole, "status {status}\n{}\n{}", proxy.log(), cache.log());
}

// --keep: what a restore has read of a dump that then fails is worth nothing.
#[test]
fn a_restore_does_not_go_on_with_another_dump() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = FakeProxy::connect_for(&cache, 1);
    proxy.begin(1, false);
    proxy.stream_image("core-1.img", b"of the first");
    let mut restore = Restore::connect(&cache);
    assert_eq!(restore.read("core-1.img").as_deref(), Some(&b"of the first"[..]));
    proxy.peer.reset();
    cache.wait_log("the dump failed");
    let mut proxy = FakeProxy::connect_for(&cache, 2);
    proxy.begin(2, false);
    proxy.stream_image("core-1.img", b"of the second");
    proxy.end();
    assert_closed(&mut restore.0);
}
