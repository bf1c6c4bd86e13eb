//! A link that is lost in the middle of a dump and comes back (--reconnect), and peers that are silent.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use common::middleman::Middleman;
use common::relay::{FakeCache, FakeProxy, Held, Seen, hello};
use common::script::{Bench, played, pre_stream, succeeds};
use common::*;
use criu_relay::wire::criu::WriteMode;
use criu_relay::wire::relay::{self as wire, Kind};
use rustix::process::Signal;

const RECONNECT: &[&str] = &["--reconnect", "10"];

/// A scripted dump through a middleman.
struct Moved {
    cache: Daemon,
    middle: Middleman,
    bench: Bench,
}

impl Moved {
    fn new(args: &[&str], cuts: &[u64]) -> Self {
        let mut cache = Daemon::cache(&[]);
        let middle = Middleman::new(cache.port);
        let bench = Bench::new(middle.port, args);
        cache.wait_log("is ready");
        // Those that come from now on: the first is cut by hand.
        middle.cut_after(cuts);
        Self { cache, middle, bench }
    }

    fn write(&mut self, name: &str, bytes: &[u8]) {
        self.bench.dump.as_mut().unwrap().write(name, bytes);
    }

    fn log(&self) -> String {
        format!("\n{}\n{}", self.bench.proxy.log(), self.cache.log())
    }

    /// To the end: everything is there, byte for byte.
    fn restores(mut self, images: &[(&str, &[u8])]) {
        self.write("pstree.img", b"the tree");
        self.write("inventory.img", b"the inventory");
        let (status, why) = self.bench.post_dump().end();
        assert_eq!(status, 0, "{why}{}", self.log());
        self.bench.source.kill();
        self.bench.disconnect();
        pre_stream(&self.cache).agrees();
        let mut restore = Restore::connect(&self.cache);
        assert_eq!(restore.read("inventory.img"), Some(b"the inventory".to_vec()));
        for (name, bytes) in images {
            assert!(restore.read(name).as_deref() == Some(*bytes), "{name}{}", self.log());
        }
        assert_eq!(self.bench.proxy.wait(), 0, "{}", self.log());
        assert!(self.bench.proxy.log().contains("confirmed and released"));
        succeeds(&self.cache);
        drop(restore);
        assert_eq!(self.cache.wait(), 0, "{}", self.log());
    }
}

/// Numbers that look random, and are the same each time.
fn numbers(seed: u32) -> impl FnMut(u64) -> u64 {
    let bytes = pattern(4096, seed);
    let mut at = 0;
    move |below| {
        at += 4;
        let word: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
        u64::from(u32::from_ne_bytes(word)) % below
    }
}

#[test]
fn a_link_that_is_cut_anywhere_and_again_and_again() {
    std::thread::scope(|scope| {
        for seed in 1..=6 {
            scope.spawn(move || {
                let mut number = numbers(seed);
                // Early, in the middle of a message, and anywhere.
                let mut cuts = vec![70 + number(300), number(5000), 80 + number(200_000)];
                cuts.extend((0..3).map(|_| number(6 << 20)));
                let mut moved = Moved::new(RECONNECT, &cuts);
                let pages = pattern(12 << 20, seed);
                let many: Vec<_> =
                    (0..40).map(|i| (format!("core-{i}.img"), pattern(i * 700, i as u32))).collect();
                // The first link too.
                let mut pipe = moved.bench.dump.as_mut().unwrap().open("pages-1.img");
                let early = number(3 << 20) as usize;
                pipe.write_all(&pages[..early]).unwrap();
                moved.middle.cut();
                for (name, bytes) in &many {
                    moved.write(name, bytes);
                }
                let written = pipe.write_all(&pages[early..]);
                assert!(written.is_ok(), "{written:?}{}", moved.log());
                drop(pipe);
                moved.bench.proxy.wait_log_times("the link to the cache is lost", 2);
                let mut images = vec![("pages-1.img", &pages[..])];
                images.extend(many.iter().map(|(name, bytes)| (&name[..], &bytes[..])));
                moved.restores(&images);
            });
        }
    });
}

// What each side says last, and the answer to that: what is held, that this is all, and that all is stored.
#[test]
fn a_link_that_is_cut_around_the_end() {
    const NEVER: u64 = u64::MAX;
    let pages = pattern(100_000, 1);
    let mut points: Vec<_> = (0..130).step_by(9).map(|down| (NEVER, down)).collect();
    points.extend((0..60).step_by(20).map(|up| (up, NEVER)));
    points.extend((100_000..100_260).step_by(19).map(|up| (up, NEVER)));
    let (next, cut) = (std::sync::Mutex::new(points.into_iter()), std::sync::atomic::AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let Some((up, down)) = next.lock().unwrap().next() else { break };
                    // The second link, too: in the middle of its welcome, or of what is held.
                    let mut moved = Moved::new(RECONNECT, &[70 + up.min(down) % 150]);
                    moved.middle.cut_this_after(up, down);
                    let middle = moved.middle.clone();
                    moved.write("pages-1.img", &pages);
                    moved.restores(&[("pages-1.img", &pages)]);
                    cut.fetch_add(usize::from(middle.links() > 1), std::sync::atomic::Ordering::SeqCst);
                }
            });
        }
    });
    let cut = cut.into_inner();
    assert!(cut >= 24, "{cut} links were cut: the points are not where something is said");
}

#[test]
fn a_link_that_is_down_for_a_while() {
    let mut moved = Moved::new(RECONNECT, &[]);
    let pages = pattern(32 << 20, 1);
    let mut pipe = moved.bench.dump.as_mut().unwrap().open("pages-1.img");
    pipe.write_all(&pages[..16 << 20]).unwrap();
    moved.middle.down(true);
    moved.middle.cut();
    let writer = std::thread::spawn({
        let pages = pages.clone();
        move || pipe.write_all(&pages[16 << 20..]).unwrap()
    });
    moved.bench.proxy.wait_log("the dump goes on if the link comes back within 10 s");
    let lost = Instant::now();
    wait_until("it was down for a second", || lost.elapsed() > Duration::from_secs(1));
    assert!(!writer.is_finished(), "CRIU is slowed down");
    moved.middle.down(false);
    writer.join().unwrap();
    moved.bench.proxy.wait_log("the dump goes on where the link was lost");
    moved.cache.wait_log("the dump goes on, from");
    moved.restores(&[("pages-1.img", &pages)]);
}

/// By hand, or in the long run: a link cut for 3 s in the middle of 1 GiB.
#[test]
#[ignore = "takes 2 GiB of memory"]
fn a_gibibyte_over_a_link_that_is_cut_for_three_seconds() {
    let size = std::env::var("RECONNECT_MIB").map_or(1 << 30, |mib| mib.parse::<usize>().unwrap() << 20);
    let mut moved = Moved::new(RECONNECT, &[]);
    let pages = pattern(size, 1);
    let mut pipe = moved.bench.dump.as_mut().unwrap().open("pages-1.img");
    let began = Instant::now();
    pipe.write_all(&pages[..size / 2]).unwrap();
    moved.middle.down(true);
    moved.middle.cut();
    let lost = Instant::now();
    let middle = moved.middle.clone();
    let back = std::thread::spawn(move || {
        wait_until("three seconds are over", || lost.elapsed() > Duration::from_secs(3));
        middle.down(false);
    });
    pipe.write_all(&pages[size / 2..]).unwrap();
    drop(pipe);
    back.join().unwrap();
    println!("{size} bytes taken after {:?}, cut for 3 s", began.elapsed());
    moved.restores(&[("pages-1.img", &pages)]);
    println!("restored after {:?}", began.elapsed());
}

// The cache has it all, and its word for that is lost.
#[test]
fn the_confirmation_is_lost_and_asked_for_again() {
    let mut moved = Moved::new(RECONNECT, &[]);
    moved.write("pages-1.img", &pattern(300_000, 1));
    moved.bench.proxy.wait_log("pages-1.img: 293.0 KiB sent");
    moved.middle.deaf(true);
    moved.write("pstree.img", b"the tree");
    moved.write("inventory.img", b"the inventory");
    let script = moved.bench.post_dump();
    moved.cache.wait_log("the dump is stored");
    moved.middle.cut();
    moved.middle.deaf(false);
    script.agrees();
    moved.bench.source.kill();
    moved.bench.disconnect();
    assert_eq!(moved.bench.proxy.wait(), 0, "{}", moved.log());
}

fn holding(id: u64, size: u64, complete: bool, last: bool) -> Kind {
    Kind::Holding(wire::Holding { id, size, complete, last })
}

fn again(cache: &FakeCache) -> Held {
    let (mut peer, greeting) = cache.greeted();
    assert_eq!(greeting.reconnect, 10);
    peer.say(Kind::Welcome(cache.welcome()));
    let Kind::Resume(resume) = peer.hear() else { panic!("it does not resume") };
    assert_eq!((resume.session, resume.run), (greeting.session, cache.run.clone()));
    Held::new(peer)
}

// That this is all has not arrived: it is said again, behind what has not either.
#[test]
fn the_end_is_lost_and_said_again() {
    let (cache, mut held, mut bench) = played(RECONNECT);
    held.confirms = false;
    bench.images();
    let script = bench.post_dump();
    assert_eq!(held.begin().reconnect, 10);
    let Kind::Finished(all) = held.hear() else { panic!() };
    held.peer.reset();
    let mut held = again(&cache);
    // The first of three is complete, of the second nothing is there, the third was not heard of.
    held.peer.say(holding(1, 300_000, true, false));
    held.peer.say(holding(2, 3, false, true));
    let pstree = key("", "pstree.img");
    held.open.insert(2, (pstree.clone(), b"the".to_vec()));
    let Kind::Finished(said) = held.hear() else { panic!() };
    assert_eq!(said, all, "the totals are those of the session");
    assert_eq!(held.images[&pstree], b"the tree", "{}", bench.proxy.log());
    assert_eq!(held.images[&key("", "inventory.img")], b"the inventory");
    held.peer.say(Kind::AllStored(wire::AllStored { images: said.images, bytes: said.bytes }));
    script.agrees();
    bench.source.kill();
    let Kind::Release(said) = held.hear() else { panic!() };
    held.peer.say(Kind::Released(wire::Released { session: said.session }));
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
}

// What the cache claims to hold can't be: that does not get better by asking again.
#[test]
fn a_cache_that_holds_what_was_not_sent() {
    for (wrong, why) in [
        (holding(9, 1, false, true), "holds transfer 9, which was not sent"),
        (holding(1, 300_001, false, true), "holds 300001 bytes of pages-1.img, of which 300000 were sent"),
        (holding(1, 299_999, true, true), "holds all 299999 bytes of pages-1.img, of which 300000 were sent"),
    ] {
        let (cache, mut held, mut bench) = played(RECONNECT);
        held.confirms = false;
        bench.images();
        held.begin();
        bench.proxy.wait_log("inventory.img: 13 bytes sent");
        held.peer.reset();
        let mut held = again(&cache);
        held.peer.say(wrong);
        bench.proxy.wait_log(why);
        assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
        assert!(bench.source.lives());
    }
}

// The cache fails the session, and says so: no link is looked for.
#[test]
fn a_session_that_the_cache_has_failed_does_not_come_back() {
    let (_cache, mut held, mut bench) = played(RECONNECT);
    bench.images();
    held.begin();
    held.peer.say(Kind::Error(wire::Error::new(28, "no memory is left")));
    bench.proxy.wait_log("the dump failed: the link was lost: the cache says: no memory is left");
    assert_eq!(bench.proxy.wait(), 1);
}

// The proxy has lost its link, of which the cache has heard nothing.
#[test]
fn a_half_dead_link_is_replaced() {
    let mut moved = Moved::new(RECONNECT, &[]);
    let pages = pattern(8 << 20, 1);
    let mut pipe = moved.bench.dump.as_mut().unwrap().open("pages-1.img");
    pipe.write_all(&pages[..4 << 20]).unwrap();
    moved.middle.cut_half();
    pipe.write_all(&pages[4 << 20..]).unwrap();
    drop(pipe);
    moved.cache.wait_log("its proxy has come back over another link");
    assert!(!moved.cache.log().contains("the dump goes on if it comes back"), "{}", moved.cache.log());
    moved.restores(&[("pages-1.img", &pages)]);
}

#[test]
fn when_the_time_is_up_both_sides_fail() {
    let mut moved = Moved::new(&["--reconnect", "1"], &[]);
    pre_stream(&moved.cache).agrees();
    let mut restore = Restore::connect(&moved.cache);
    restore.ask("inventory.img");
    moved.write("pages-1.img", &pattern(4 << 20, 1));
    moved.cache.wait_log("pages-1.img: 4.0 MiB received");
    moved.middle.down(true);
    moved.middle.cut();
    moved.cache.wait_log("the dump goes on if it comes back within 16 s");
    let lost = Instant::now();
    assert_eq!(moved.bench.proxy.wait(), 1);
    assert!(lost.elapsed() < Duration::from_secs(5), "{:?}", lost.elapsed());
    let log = moved.bench.proxy.log();
    assert!(log.contains("the dump failed: no link to ") && log.contains("within 1 s"), "{log}");
    assert!(moved.bench.source.lives());
    assert!(common::script::is_left_waiting(&restore), "it may come back{}", moved.log());
    assert_eq!(restore.answer(), None);
    assert_eq!(moved.cache.wait(), 1);
    assert!(moved.cache.log().contains("and has not come back"), "{}", moved.cache.log());
}

// CRIU is held, and the cache may have it all: it is told to roll back, should it be found in the usual time.
#[test]
fn when_the_time_is_up_criu_that_is_held_fails() {
    for told in [false, true] {
        let (cache, mut held, mut bench) = played(&["--reconnect", "1", "--connect-timeout", "2"]);
        let script = bench.held(&mut held);
        let (port, run) = (cache.port, cache.run.clone());
        drop(cache);
        held.peer.reset();
        script.refuses("within 1 s");
        assert!(bench.source.lives());
        if told {
            let listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            let cache = FakeCache { listener, port, run };
            let mut held = cache.accept();
            let Kind::Rollback(said) = held.hear() else { panic!() };
            held.peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
            bench.proxy.wait_log("the cache has rolled back");
        } else {
            bench.proxy.wait_log("the cache could not be told");
        }
        assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
    }
}

#[test]
fn without_reconnect_a_link_that_is_lost_fails_the_dump_at_once() {
    let mut moved = Moved::new(&[], &[]);
    moved.write("pages-1.img", &pattern(4 << 20, 1));
    moved.cache.wait_log("pages-1.img: 4.0 MiB received");
    moved.middle.cut();
    assert_eq!((moved.bench.proxy.wait(), moved.cache.wait()), (1, 1));
    assert!(moved.bench.proxy.log().contains("the dump failed: the link was lost"), "{}", moved.log());
    assert!(moved.bench.source.lives());
}

// A cache that was started anew holds nothing, and the beginning is not kept any more.
#[test]
fn a_cache_that_was_started_anew() {
    let (cache, mut held, mut bench) = played(RECONNECT);
    bench.dump.as_mut().unwrap().write("pages-1.img", &pattern(4 << 20, 1));
    held.begin();
    held.until(|held| held.images.len() == 1);
    bench.proxy.wait_log("pages-1.img: 4.0 MiB sent");
    held.peer.is_read();
    held.peer.reset();
    let (mut peer, _) = cache.greeted();
    peer.say(Kind::Welcome(wire::Welcome { run: vec![8; wire::ID], ..cache.welcome() }));
    let why =
        "the dump failed: the cache does not have the session any more, and what had been sent was not kept";
    bench.proxy.wait_log(why);
    assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
    assert!(bench.source.lives());
}

// As long as nothing is confirmed, all is here: another cache gets it.
#[test]
fn what_has_not_been_acknowledged_is_sent_to_a_cache_that_was_started_anew() {
    let (cache, mut held, mut bench) = played(RECONNECT);
    bench.images();
    held.confirms = false;
    held.begin();
    held.until(|held| held.images.len() == 3);
    held.peer.reset();
    let (mut peer, _) = cache.greeted();
    peer.say(Kind::Welcome(wire::Welcome { run: vec![8; wire::ID], ..cache.welcome() }));
    let mut held = Held::new(peer);
    let script = bench.post_dump();
    held.session();
    script.agrees();
    assert!(held.images[&key("", "pages-1.img")] == pattern(300_000, 1));
}

// Nothing is taken from CRIU's pipes that could not be kept.
#[test]
fn a_full_replay_buffer_slows_criu_down() {
    const MIB: usize = 1 << 20;
    let (_cache, mut held, mut bench) = played(&["--reconnect", "10", "--replay-buffer", "1M"]);
    let pages = pattern(8 * MIB, 1);
    let mut pipe = bench.dump.as_mut().unwrap().open("pages-1.img");
    let writer = std::thread::spawn({
        let pages = pages.clone();
        move || pipe.write_all(&pages).unwrap()
    });
    held.begin();
    let mut got = Vec::new();
    for mib in 1..=8 {
        while got.len() < mib * MIB {
            if let Seen::Bytes(1, bytes) = held.peer.next() {
                got.extend(bytes);
            }
        }
        assert_eq!(got.len(), mib * MIB);
        if mib < 8 {
            held.peer.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let more = held.peer.stream.read(&mut [0; 1]).map_err(|error| error.kind());
            assert!(
                matches!(more, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)),
                "{more:?} behind {mib} MiB"
            );
            held.peer.stream.set_read_timeout(Some(DEADLINE)).unwrap();
        }
        held.peer.say(Kind::Ack(wire::Ack { id: 1, bytes: got.len() as u64 }));
    }
    writer.join().unwrap();
    assert!(got == pages);
}

// Images that are kept go on too, of a dump that nobody can make fail.
#[test]
fn a_dump_that_is_not_scripted_goes_on() {
    for retain in ["all", "none"] {
        let mut cache = Daemon::cache(&[]);
        let middle = Middleman::new(cache.port);
        middle.cut_after(&[3 << 20, 5 << 20, 700]);
        let mut proxy = Daemon::proxy(middle.port, &["--reconnect", "10", "--retain", retain]);
        proxy.wait_log("connected to");
        let pages = pattern(16 << 20, 1);
        // Read while it arrives, over all those links.
        let mut restore = Restore::connect(&cache);
        let reader = std::thread::spawn(move || (restore.read("pages-1.img"), restore));
        let mut dump = Dump::connect(&proxy);
        dump.write("pages-1.img", &pages);
        dump.end();
        let (read, mut restore) = reader.join().unwrap();
        assert!(read == Some(pages));
        assert!(restore.read("inventory.img").is_some());
        drop(restore);
        assert_eq!((proxy.wait(), cache.wait()), (0, 0), "{}\n{}", proxy.log(), cache.log());
        proxy.wait_log_times("the link to the cache is lost", 3);
    }
}

#[test]
fn a_dump_of_the_remote_dialect_goes_on() {
    let mut cache = Daemon::cache(&[]);
    let middle = Middleman::new(cache.port);
    middle.cut_after(&[3 << 20, 90, 5 << 20, 700]);
    let mut proxy = Daemon::proxy(middle.port, RECONNECT);
    proxy.wait_log("connected to");
    let (to, from) = (proxy.dir.join("img-proxy.sock"), cache.dir.join("img-cache.sock"));
    let (pages, id) = (pattern(16 << 20, 1), "/images");
    write_remote(&to, &key(id, "pages-1.img"), WriteMode::Truncate, &pages[..9 << 20]);
    write_remote(&to, &key(id, "pages-1.img"), WriteMode::Append, &pages[9 << 20..]);
    for name in ["pstree.img", "inventory.img"] {
        write_remote(&to, &key(id, name), WriteMode::Truncate, name.as_bytes());
    }
    write_remote(&to, &key("", "parent"), WriteMode::Append, &id_list(&[id]));
    dump_finish(&to, Style::Y2019);
    cache.wait_log("the dump is complete");
    assert_eq!(read_remote(&from, &key(id, "inventory.img")).unwrap(), b"inventory.img");
    assert!(read_remote(&from, &key(id, "pages-1.img")).unwrap() == pages);
    restore_finish(&from, Style::Y2019);
    assert_eq!((proxy.wait(), cache.wait()), (0, 0), "{}\n{}", proxy.log(), cache.log());
    assert!(middle.links() >= 4, "{}", proxy.log());
}

// --keep: the proxy fails its dump while there is no link; the next dump need not wait for what does not come back.
#[test]
fn a_dump_that_fails_meanwhile_makes_room_for_the_next() {
    let mut cache = Daemon::cache(&["--keep"]);
    let middle = Middleman::new(cache.port);
    let mut bench = Bench::new(middle.port, &["--keep", "--reconnect", "600"]);
    bench.dump.as_mut().unwrap().write("pages-1.img", &pattern(300_000, 1));
    cache.wait_log("pages-1.img: 293.0 KiB received");
    middle.down(true);
    middle.cut();
    bench.proxy.wait_log("the dump goes on if the link comes back");
    bench.disconnect();
    bench.proxy.wait_log("the dump failed");
    middle.down(false);
    cache.wait_log("and its source has rolled the dump back");
    let Bench { proxy, source, .. } = bench;
    drop(source);
    let mut bench = Bench::with(proxy);
    bench.images();
    bench.post_dump().agrees();
}

// Whoever says something right behind its welcome is heard.
#[test]
fn what_is_said_behind_the_welcome() {
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, &[]);
    let (mut peer, _) = cache.greeted();
    let mut said = wire::encode(Kind::Welcome(cache.welcome()));
    wire::append(&mut said, Kind::Error(wire::Error::new(28, "no room here")));
    peer.stream.write_all(&said).unwrap();
    proxy.wait_log("the cache says: no room here");
}

/// Whoever says nothing is lost: a cache after 15 s, a proxy in the middle of its session after 20 s. But not who waits
/// for its turn.
#[test]
fn silent_peers_are_found_in_seconds() {
    let cache_stops = || {
        let mut moved = Moved::new(&[], &[]);
        moved.write("core-1.img", b"the core");
        moved.cache.wait_log("core-1.img: 8 bytes received");
        let stopped = Instant::now();
        moved.cache.stop();
        moved.bench.proxy.wait_log("nothing was heard of it for 15 s");
        let found = stopped.elapsed();
        assert!((9..20).contains(&found.as_secs()), "{found:?}");
        assert_eq!(moved.bench.proxy.wait(), 1);
        assert!(moved.bench.source.lives());
    };
    let proxy_stops = || {
        let mut moved = Moved::new(&[], &[]);
        moved.write("core-1.img", b"the core");
        moved.cache.wait_log("core-1.img: 8 bytes received");
        let stopped = Instant::now();
        moved.bench.proxy.stop();
        moved.cache.wait_log("has said nothing for 20 s");
        let found = stopped.elapsed();
        assert!((14..25).contains(&found.as_secs()), "{found:?}");
        assert_eq!(moved.cache.wait(), 1);
        moved.bench.proxy.go_on();
    };
    let waits = || {
        let mut cache = Daemon::cache(&["--keep"]);
        let mut first = FakeProxy::connect_for(&cache, 1);
        // One that does not ping.
        first.peer.say(Kind::Hello(wire::Hello { minor: 0, ..hello(1) }));
        cache.wait_log("a dump begins");
        let mut proxy = Daemon::proxy(cache.port, &[]);
        proxy.wait_log("connected to");
        let mut dump = Dump::connect(&proxy);
        let mut pipe = dump.open("pages-1.img");
        let writer = std::thread::spawn(move || pipe.write_all(&pattern(32 << 20, 1)).unwrap());
        proxy.wait_log("a dump begins");
        let began = Instant::now();
        wait_until("it has waited", || began.elapsed() > Duration::from_secs(22));
        assert!(!proxy.log().contains("lost"), "{}", proxy.log());
        first.peer.reset();
        writer.join().unwrap();
        dump.end();
        assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    };
    let holds = || {
        // CRIU is held, and nothing else moves: its proxy and cache are there.
        let mut moved = Moved::new(&[], &[]);
        moved.write("core-1.img", b"the core");
        let began = Instant::now();
        wait_until("it has been silent", || began.elapsed() > Duration::from_secs(22));
        moved.restores(&[("core-1.img", b"the core")]);
    };
    std::thread::scope(|scope| {
        for case in [&cache_stops as &(dyn Fn() + Sync), &proxy_stops, &waits, &holds] {
            scope.spawn(case);
        }
    });
}

// A signal ends a cache that waits for a link to come back.
#[test]
fn a_signal_while_the_link_is_lost() {
    let mut moved = Moved::new(&["--reconnect", "600"], &[]);
    moved.write("pages-1.img", &pattern(4 << 20, 1));
    moved.middle.down(true);
    moved.middle.cut();
    moved.cache.wait_log("the dump goes on if it comes back");
    assert_eq!(moved.cache.terminate(), 1);
    moved.bench.proxy.wait_log("the dump goes on if the link comes back");
    moved.bench.proxy.signal(Signal::TERM);
    assert_eq!(moved.bench.proxy.wait(), 1);
    assert!(moved.bench.source.lives());
}
