//! Links that are lost at the wrong moment, and sessions that go on all the same.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::relay::{FakeCache, FakeProxy};
use common::script::{Bench, is_left_waiting, pre_stream, succeeds};
use common::*;
use rustix::process::Signal;

/// A middleman between a proxy and its cache, as ssh would be.
#[derive(Clone)]
struct Middleman {
    port: u16,
    /// What the cache says gets lost.
    deaf: Arc<AtomicBool>,
    /// Nobody gets through.
    down: Arc<AtomicBool>,
    links: Arc<Mutex<Vec<TcpStream>>>,
}

impl Middleman {
    fn new(to: u16) -> Self {
        let (listener, port) = old_listener();
        let it = Self { port, deaf: Arc::default(), down: Arc::default(), links: Arc::default() };
        let of_it = it.clone();
        std::thread::spawn(move || of_it.run(&listener, to));
        it
    }

    fn run(&self, listener: &TcpListener, to: u16) {
        for near in listener.incoming() {
            let near = near.unwrap();
            if self.down.load(Ordering::SeqCst) {
                continue;
            }
            let Ok(far) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            let mut ends = Vec::new();
            for end in [&near, &far] {
                end.set_nodelay(true).unwrap();
                ends.push(end.try_clone().unwrap());
            }
            self.links.lock().unwrap().extend(ends);
            let (deaf, never) = (self.deaf.clone(), Arc::new(AtomicBool::new(false)));
            let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            std::thread::spawn(move || carry(near, far, &never));
            std::thread::spawn(move || carry(far2, near2, &deaf));
        }
    }

    fn cut(&self) {
        for end in self.links.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, deaf: &AtomicBool) {
    let mut block = vec![0; 64 * 1024];
    while let Ok(n) = from.read(&mut block) {
        if n == 0 {
            break;
        }
        if !deaf.load(Ordering::SeqCst) && to.write_all(&block[..n]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

// --accept-unconfirmed: the old cache reads slowly, so that there is still something to send when CRIU is held.
#[test]
fn an_old_cache_that_reads_slowly_may_be_accepted() {
    let (listener, port) = old_listener();
    let proxy = Daemon::seed_proxy(port, &["--accept-unconfirmed", "--confirm-timeout", "5"]);
    let link = listener.accept().unwrap().0;
    let mut bench = Bench::with(proxy);
    bench.dump.as_mut().unwrap().write("pages-2.img", &pattern(32 << 20, 1));
    bench.images();
    let script = bench.post_dump();
    bench.proxy.wait_log("CRIU is held");
    bench.proxy.wait_log("inventory.img: 13 bytes taken");
    let began = Instant::now();
    let old = std::thread::spawn(move || old_cache(link));
    bench.proxy.wait_log("inventory.img: 13 bytes sent");
    let sent = began.elapsed();
    let (status, why) = script.end();
    let log = bench.proxy.log();
    assert_eq!(status, 0, "all sent after {sent:?}, then after {:?}: {why}\n{log}", began.elapsed());
    bench.source.kill();
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    old.join().unwrap();
}

// pre-stream was granted; the link is lost, and whether the next one is an old cache's is not known yet when the dump begins.
#[test]
fn a_scripted_dump_never_goes_to_an_old_cache() {
    let cache = FakeCache::new();
    let proxy = Daemon::proxy(cache.port, &["--confirm-timeout", "3"]);
    let held = cache.accept();
    pre_stream(&proxy).agrees();
    drop(held);
    let (old, _) = cache.greeted();
    let mut bench = Bench::connected(proxy);
    let old = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = (&old.stream).read_to_end(&mut bytes);
        bytes
    });
    for name in ["core-1.img", "pstree.img", "inventory.img"] {
        let pipe = bench.dump.as_mut().unwrap().try_open(name);
        let _ = pipe.and_then(|mut pipe| pipe.write_all(b"x"));
    }
    bench.proxy.wait_log("a dump begins; it is scripted");
    let began = Instant::now();
    let (status, why) = bench.post_dump().end();
    let log = bench.proxy.log();
    drop(bench);
    let bytes = old.join().unwrap();
    let got = bytes.windows(13).any(|window| window == b"inventory.img");
    assert!(
        status != 0 && !got,
        "{status} after {:?} '{why}', the old cache has it all: {got}\n{log}",
        began.elapsed()
    );
}

// --keep: a rollback that could not be told within --connect-timeout is told when there is a link again: else the cache
// takes nothing any more.
#[test]
fn a_rollback_that_could_not_be_told_is_told_later() {
    let mut cache = Daemon::cache(&["--keep"]);
    let middle = Middleman::new(cache.port);
    let mut bench = Bench::new(middle.port, &["--keep", "--connect-timeout", "1", "--confirm-timeout", "5"]);
    bench.images();
    middle.deaf.store(true, Ordering::SeqCst);
    let script = bench.post_dump();
    cache.wait_log("the dump is stored");
    middle.down.store(true, Ordering::SeqCst);
    middle.cut();
    script.refuses("the link was lost before the cache had confirmed");
    bench.proxy.wait_log("the cache could not be told");
    middle.deaf.store(false, Ordering::SeqCst);
    middle.down.store(false, Ordering::SeqCst);
    bench.proxy.wait_log_times("connected to", 2);
    // The next.
    let Bench { proxy, source, .. } = bench;
    let mut bench = Bench::with(proxy);
    bench.images();
    let (status, why) = bench.post_dump().end();
    drop(source);
    assert_eq!(status, 0, "{why}\n{}\n{}", bench.proxy.log(), cache.log());
}

// The link is lost with the cache's last word on it, and the restore ends before the proxy is back: both have succeeded.
#[test]
fn a_proxy_whose_release_was_heard_is_told_so() {
    for scripted in [true, false] {
        let mut cache = Daemon::cache(&[]);
        let middle = Middleman::new(cache.port);
        let mut proxy = Daemon::proxy(middle.port, &[]);
        proxy.wait_log("connected to");
        let mut bench;
        if scripted {
            bench = Bench::with(proxy);
            pre_stream(&cache).agrees();
        } else {
            bench = Bench::connected(proxy);
        }
        bench.images();
        let mut restore = Restore::connect(&cache);
        if scripted {
            bench.post_dump().agrees();
            middle.deaf.store(true, Ordering::SeqCst);
            bench.source.kill();
            cache.wait_log("released by its source");
        } else {
            middle.deaf.store(true, Ordering::SeqCst);
        }
        bench.disconnect();
        for name in ["inventory.img", "pages-1.img"] {
            assert!(restore.read(name).is_some());
        }
        if scripted {
            succeeds(&cache);
        }
        drop(restore);
        middle.down.store(true, Ordering::SeqCst);
        middle.cut();
        bench.proxy.wait_log("the link to the cache is lost");
        middle.deaf.store(false, Ordering::SeqCst);
        middle.down.store(false, Ordering::SeqCst);
        assert_eq!((bench.proxy.wait(), cache.wait()), (0, 0));
    }
}

// --keep: what has been restored is not restored again by the restore that waits for the next dump.
#[test]
fn a_scripted_session_is_restored_once() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut bench = Bench::new(cache.port, &["--keep"]);
    pre_stream(&cache).agrees();
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    bench.images();
    bench.post_dump().agrees();
    bench.source.kill();
    bench.disconnect();
    assert_eq!(restore.answer(), Some(true));
    restore.pipe().read_to_end(&mut Vec::new()).unwrap();
    succeeds(&cache);
    drop(restore);
    cache.wait_log("the restore has succeeded");
    // The restore of the next dump is started first.
    pre_stream(&cache).agrees();
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    // When this has been answered, that has been looked at.
    pre_stream(&cache).agrees();
    assert!(is_left_waiting(&restore), "it restores the process that runs already\n{}", cache.log());
}

// The cache dies behind its confirmation, and another is started in its place.
#[test]
fn a_cache_that_died_with_the_images() {
    for keep in [true, false] {
        let args: &[&str] = if keep { &["--keep"] } else { &[] };
        let mut cache = Daemon::cache(args);
        let port = cache.port;
        let mut bench = Bench::new(port, args);
        bench.images();
        bench.post_dump().agrees();
        cache.signal(Signal::KILL);
        cache.wait();
        bench.proxy.wait_log("the link to the cache is lost");
        bench.source.kill();
        bench.disconnect();
        let cache = Daemon::cache_at(Dir::new(), port, &[]);
        bench.proxy.wait_log("the cache has lost its images");
        if !keep {
            assert_eq!(bench.proxy.wait(), 1);
        } else {
            assert_eq!(bench.proxy.terminate(), 1, "{}", bench.proxy.log());
        }
        drop(cache);
    }
}

// The link is lost in the moment before pre-stream: it waits for the next attempt, none of which has failed yet.
#[test]
fn pre_stream_right_after_an_idle_link_was_lost() {
    let mut cache = Daemon::cache(&["--keep"]);
    let middle = Middleman::new(cache.port);
    let mut proxy = Daemon::proxy(middle.port, &["--keep"]);
    proxy.wait_log("connected to");
    cache.wait_log("is ready");
    proxy.stop();
    middle.cut();
    let script = pre_stream(&proxy);
    proxy.go_on();
    let (status, why) = script.end();
    assert_eq!(status, 0, "{why}\n{}", proxy.log());
}

// --consume: what was read of a dump that then failed says nothing of the next.
#[test]
fn what_was_consumed_of_a_failed_dump_is_forgotten() {
    let mut cache = Daemon::cache(&["--keep", "--consume"]);
    let mut proxy = FakeProxy::connect_for(&cache, 1);
    proxy.begin(1, false);
    proxy.stream_image("pages-1.img", b"of the first");
    let mut restore = Restore::connect(&cache);
    assert!(restore.read("pages-1.img").is_some());
    proxy.peer.reset();
    cache.wait_log("the dump failed");
    drop(restore);
    let mut proxy = FakeProxy::connect_for(&cache, 2);
    proxy.begin(2, false);
    proxy.stream_image("pages-1.img", b"of the second");
    proxy.end();
    let mut restore = Restore::connect(&cache);
    assert!(restore.read("inventory.img").is_some());
    drop(restore);
    cache.wait_log("the restore has ended before it had asked for everything");
    assert!(cache.log().contains("all images stay here"), "{}", cache.log());
}

// A process that restores twice (a fork of nothing, a library): the second time it has read something, too.
#[test]
fn one_process_restores_twice() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = FakeProxy::connect_for(&cache, 1);
    for session in 1..=2 {
        proxy.begin(session, true);
        proxy.end();
        proxy.release();
        cache.wait_log_times("released by its source", session.into());
        assert!(matches!(proxy.peer.hear(), criu_relay::wire::relay::Kind::Released(_)));
        pre_stream(&cache).agrees();
        let mut restore = Restore::connect(&cache);
        assert!(restore.read("inventory.img").is_some());
        drop(restore);
        succeeds(&cache);
    }
}

// A cache waits for a proxy that has not said that it knows how its session ended; beyond that time it is a reader that
// keeps it, who reads nothing.
#[test]
fn a_cache_that_has_waited_long_enough_costs_no_time() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    proxy.stream_image("pages-1.img", &pattern(8 << 20, 1));
    proxy.end();
    let mut restore = Restore::connect(&cache);
    for name in ["inventory.img", "pages-1.img"] {
        assert!(restore.read(name).is_some());
    }
    drop(restore);
    cache.wait_log("taken for a success");
    let began = Instant::now();
    let mut slow = Restore::connect(&cache);
    slow.ask("pages-1.img");
    assert_eq!(slow.answer(), Some(true));
    let pipe = slow.pipe();
    wait_until("the wait is over", || began.elapsed() > Duration::from_millis(5500));
    let switches = |cache: &Daemon| cache.status("voluntary_ctxt").parse::<u64>().unwrap();
    let before = switches(&cache);
    wait_until("it had time to wake", || began.elapsed() > Duration::from_millis(6000));
    let woken = switches(&cache) - before;
    assert!(woken < 50, "woken {woken} times\n{}", cache.log());
    drop((pipe, slow));
    assert_eq!(cache.wait(), 0);
}
