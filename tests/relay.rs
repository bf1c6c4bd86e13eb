//! The relay protocol at the real binary: against peers that the test plays frame by frame, and between the daemons.

mod common;

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;

use common::relay::{FakeCache, FakeProxy, Held, Seen, hello, unknown_frame};
use common::*;
use criu_relay::wire::Key;
use criu_relay::wire::criu::WriteMode;
use criu_relay::wire::relay::{self as wire, Hello, Kind, Welcome};
use rustix::net::{RecvFlags, recv};
use rustix::process::Signal;

const EIO: u32 = 5;

fn stream(name: &str) -> Key {
    key("", name)
}

/// A proxy and its cache, which is this test.
fn proxy_and_cache(args: &[&str]) -> (Daemon, FakeCache, Held) {
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, args);
    let held = cache.accept();
    proxy.wait_log("relay protocol");
    (proxy, cache, held)
}

// --- The proxy, and a cache that the test plays.

#[test]
fn an_image_is_on_the_wire_before_its_writer_closes() {
    let (mut proxy, _cache, mut held) = proxy_and_cache(&["--keep"]);
    // Stream dialect.
    let mut dump = Dump::connect(&proxy);
    let mut pages = dump.open("pages-1.img");
    pages.write_all(b"first").unwrap();
    let hello = held.begin();
    assert!(!hello.scripted && hello.session.len() == wire::ID);
    held.until(|held| held.open.values().any(|(_, bytes)| bytes == b"first"));
    pages.write_all(&pattern(300_000, 1)).unwrap();
    held.until(|held| held.open.values().any(|(_, bytes)| bytes.len() == 300_005));
    assert!(held.images.is_empty());
    drop(pages);
    dump.end();
    held.finished();
    held.all_stored();
    proxy.wait_log("confirmed by the cache");
    assert_eq!(held.images[&stream("pages-1.img")][5..], pattern(300_000, 1));

    // Remote dialect.
    let socket = proxy.dir.join("img-proxy.sock");
    let mut pages = open_remote(&socket, &key("/d", "pages-1.img"), Some(WriteMode::Append));
    pages.write_all(b"first").unwrap();
    held.begin();
    held.until(|held| held.open.values().any(|(_, bytes)| bytes == b"first"));
    drop(pages);
    write_remote(&socket, &key("/d", "inventory.img"), WriteMode::Append, b"x");
    dump_finish(&socket, Style::Y2019);
    held.finished();
    held.all_stored();
    proxy.wait_log_times("confirmed by the cache", 2);
    assert_eq!(held.images[&key("/d", "pages-1.img")], b"first");
}

#[test]
fn images_share_the_link() {
    const IMAGES: usize = 8;
    let (mut proxy, _cache, mut held) = proxy_and_cache(&[]);
    let images: Vec<_> = (0..IMAGES).map(|i| pattern(1_500_000 + i, i as u32)).collect();
    let mut dump = Dump::connect(&proxy);
    let mut pipes: Vec<_> = (0..IMAGES).map(|i| dump.open(&format!("pages-{i}.img"))).collect();
    let writer = std::thread::spawn({
        let images = images.clone();
        move || {
            for at in (0..1_500_000).step_by(50_000) {
                for (bytes, pipe) in images.iter().zip(&mut pipes) {
                    pipe.write_all(&bytes[at..at + 50_000]).unwrap();
                }
            }
            for (bytes, pipe) in images.iter().zip(&mut pipes) {
                pipe.write_all(&bytes[1_500_000..]).unwrap();
            }
            drop(pipes);
            dump.end();
        }
    });
    held.begin();
    held.until(|held| held.open.len() == IMAGES);
    held.finished();
    writer.join().unwrap();
    held.all_stored();
    assert_eq!(proxy.wait(), 0);
    for (i, bytes) in images.iter().enumerate() {
        let image = stream(&format!("pages-{i}.img"));
        assert!(held.images[&image] == *bytes, "{image}");
        assert!(held.mixed.contains(&image), "{image}");
    }
}

#[test]
fn appends_overwrites_and_empty_images_arrive_exactly() {
    let (mut proxy, _cache, mut held) = proxy_and_cache(&[]);
    let socket = proxy.dir.join("img-proxy.sock");
    let image = |name: &str| key("/d", name);
    for (name, mode, bytes) in [
        ("a", WriteMode::Append, &b"one"[..]),
        ("empty", WriteMode::Append, b""),
        ("b", WriteMode::Truncate, &pattern(700_000, 1)),
        ("a", WriteMode::Append, b", two"),
        ("b", WriteMode::Truncate, b"short"),
        ("b", WriteMode::Append, b"er"),
        ("a", WriteMode::Append, b""),
        ("gone", WriteMode::Append, b"something"),
        ("gone", WriteMode::Truncate, b""),
        ("page", WriteMode::Truncate, &[7; 8192]),
        ("inventory.img", WriteMode::Append, b"x"),
    ] {
        write_remote(&socket, &image(name), mode, bytes);
    }
    let names = ["a", "b", "empty", "gone", "page"];
    let here: Vec<_> = names.iter().map(|name| read_remote(&socket, &image(name)).unwrap()).collect();
    dump_finish(&socket, Style::Y2017);
    held.session();
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    assert_eq!(held.images.len(), 6);
    for (name, bytes) in names.iter().zip(&here) {
        assert!(held.images[&image(name)] == *bytes, "{name}");
    }
    assert_eq!((here[0].as_slice(), here[1].as_slice()), (&b"one, two"[..], &b"shorter"[..]));
    assert!(here[2].is_empty() && here[3].is_empty());
}

#[test]
fn only_the_caches_word_ends_the_proxy() {
    let (mut proxy, _cache, mut held) = proxy_and_cache(&[]);
    Dump::connect(&proxy).end();
    held.begin();
    held.finished();
    // Other words have been heard, and are not the end. (The second shows that the first has been dealt with.)
    for _ in 0..2 {
        held.peer.say(Kind::Ack(wire::Ack { id: 1, bytes: 8 }));
        held.peer.is_read();
    }
    assert!(proxy.is_running() && !proxy.log().contains("confirmed by the cache"));
    held.all_stored();
    assert_eq!(proxy.wait(), 0);
    assert!(proxy.log().contains("2 images, 21 bytes: confirmed by the cache"), "{}", proxy.log());
    assert_eq!(held.peer.end(), LinkEnd::InOrder);
}

#[test]
fn a_cache_that_confirms_what_was_not_sent() {
    type Say = fn(&mut Held);
    let wrong: [(&str, Say); 4] = [
        ("has confirmed 3 transfers and 21 bytes, which are not what was sent", |held| {
            held.peer.say(Kind::AllStored(wire::AllStored { images: 3, bytes: 21 }));
        }),
        ("has confirmed transfer 77", |held| held.peer.say(Kind::Stored(wire::Stored { id: 77, size: 1 }))),
        ("that is no frame of the relay protocol", |held| held.peer.stream.write_all(&[9; 9]).unwrap()),
        ("announced a header of", |held| held.peer.stream.write_all(&[0xff; 9]).unwrap()),
    ];
    let (mut proxy, mut cache, mut held) = proxy_and_cache(&[]);
    Dump::connect(&proxy).end();
    for (n, (why, say)) in wrong.into_iter().enumerate() {
        held.begin();
        held.finished();
        held.peer.is_read();
        say(&mut held);
        proxy.wait_log(why);
        proxy.wait_log_times("the link to the cache is lost", n + 1);
        // This may be the only copy: another cache gets everything.
        cache.run[0] += 1;
        held = cache.accept();
    }
    assert!(!held.session().scripted);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
}

#[test]
fn a_wrong_size_is_not_a_confirmation() {
    let (mut proxy, mut cache, mut held) = proxy_and_cache(&[]);
    Dump::connect(&proxy).end();
    held.confirms = false;
    held.begin();
    held.finished();
    held.peer.say(Kind::Stored(wire::Stored { id: 1, size: 7 }));
    proxy.wait_log("has stored 7 bytes of pstree.img, of which 8 were sent");
    cache.run[0] += 1;
    cache.accept().session();
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
}

#[test]
fn a_link_that_is_lost_before_everything_is_confirmed() {
    let (mut proxy, mut cache, mut held) = proxy_and_cache(&[]);
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", &pattern(2_000_000, 1));
    dump.end();
    let session = held.begin().session;
    held.finished();
    held.peer.reset();

    // The same run: has it everything? It has not.
    let mut held = cache.accept();
    let resume = wire::Resume { session: session.clone(), run: cache.run.clone() };
    assert_eq!(held.hear(), Kind::Resume(resume.clone()));
    held.peer.say(Kind::Holding(wire::Holding { last: true, ..wire::Holding::default() }));
    assert_eq!(held.begin().session, session);
    held.finished();
    drop(held);

    // Another run: it can't have anything.
    cache.run[0] += 1;
    let mut held = cache.accept();
    assert_eq!(held.begin().session, session);
    held.finished();
    assert!(held.images[&stream("pages-1.img")] == pattern(2_000_000, 1));
    held.peer.reset();

    // The same once more: it has not.
    let mut held = cache.accept();
    assert_eq!(held.hear(), Kind::Resume(wire::Resume { run: cache.run.clone(), ..resume }));
    held.peer.say(Kind::Holding(wire::Holding { last: true, ..wire::Holding::default() }));
    held.session();
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    assert_eq!(proxy.log().matches("sent anew").count(), 3);
}

#[test]
fn a_link_that_is_lost_with_the_caches_word() {
    let (mut proxy, cache, mut held) = proxy_and_cache(&[]);
    Dump::connect(&proxy).end();
    let session = held.begin().session;
    held.finished();
    held.peer.reset();
    let mut held = cache.accept();
    assert_eq!(held.hear(), Kind::Resume(wire::Resume { session, run: cache.run.clone() }));
    held.peer.say(Kind::AllStored(wire::AllStored { images: 2, bytes: 21 }));
    proxy.wait_log("confirmed by the cache");
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
}

#[test]
fn a_cache_that_sends_image_data() {
    let (mut proxy, _cache, mut held) = proxy_and_cache(&["--keep"]);
    let mut bytes = wire::encode(Kind::Data(wire::Data::new(1, 1)));
    bytes.extend(b"x");
    held.peer.stream.write_all(&bytes).unwrap();
    proxy.wait_log("sent image data, which no cache does");
}

#[test]
fn a_link_that_is_lost_in_the_middle() {
    // While CRIU can be made to fail, it is.
    let (mut proxy, _cache, mut held) = proxy_and_cache(&[]);
    let mut dump = Dump::connect(&proxy);
    dump.write("core-1.img", b"the core");
    held.begin();
    held.until(|held| held.images.len() == 1);
    held.peer.reset();
    assert_closed(&mut dump.0);
    assert_eq!(proxy.wait(), 1);
    assert!(proxy.log().contains("the dump failed: the link was lost"), "{}", proxy.log());

    // Between two sessions nobody minds.
    let (mut proxy, cache, held) = proxy_and_cache(&["--keep"]);
    held.peer.reset();
    let mut held = cache.accept();
    proxy.wait_log_times("relay protocol", 2);
    Dump::connect(&proxy).end();
    held.session();
    proxy.wait_log("confirmed by the cache");
}

#[test]
fn a_cache_that_fails_says_why() {
    let (mut proxy, _cache, mut held) = proxy_and_cache(&[]);
    let mut dump = Dump::connect(&proxy);
    let mut pages = dump.open("pages-1.img");
    pages.write_all(b"pages").unwrap();
    held.begin();
    held.until(|held| held.open.len() == 1);
    held.peer.say(Kind::Error(wire::Error::new(28, "no memory is left")));
    assert_closed(&mut dump.0);
    // Rust ignores SIGPIPE.
    wait_until("the pipe is broken", || pages.write_all(b"more").is_err());
    assert_eq!(proxy.wait(), 1);
    assert!(proxy.log().contains("the cache says: no memory is left"), "{}", proxy.log());
}

#[test]
fn a_dump_that_fails_is_told_to_the_cache() {
    let (mut proxy, _cache, mut held) = proxy_and_cache(&["--keep"]);
    let mut dump = Dump::connect(&proxy);
    let mut pages = dump.open("pages-1.img");
    pages.write_all(b"pages").unwrap();
    dump.write("core-1.img", b"the core");
    held.begin();
    held.until(|held| held.open.len() == 1 && held.images.len() == 1);
    // An orderly end of the pipe too: nothing but the missing inventory tells.
    drop((dump, pages));
    loop {
        match held.hear() {
            Kind::Abort(abort) => assert!(held.open.remove(&abort.id).is_some()),
            Kind::Error(error) => break assert!(error.shown().contains("inventory.img")),
            other => panic!("{other:?}"),
        }
    }
    proxy.wait_log("without a complete inventory.img");
    proxy.wait_log("the cache had stored");
}

#[test]
fn a_late_welcome_changes_nothing() {
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, &[]);
    let (mut peer, _) = cache.greeted();
    proxy.wait_log("seed protocol: nothing is confirmed");
    peer.say(Kind::Welcome(cache.welcome()));
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", b"pages");
    dump.end();
    let (images, end) = old_cache(peer.stream);
    assert_eq!((images.len(), end), (3, LinkEnd::InOrder));
    assert_eq!(images[&stream("pages-1.img")], b"pages");
    assert_eq!(proxy.wait(), 0);
    assert!(proxy.log().contains("sent, not confirmed"));
}

#[test]
fn old_peers_are_not_taken_where_the_relay_protocol_is_needed() {
    for args in [&["--peer-protocol", "relay"][..], &["--splice", "always"]] {
        let (listener, port) = old_listener();
        let mut proxy = Daemon::proxy(port, &[args, &["--connect-timeout", "3"]].concat());
        let link = listener.accept().unwrap();
        assert_eq!(proxy.wait(), 1);
        assert!(
            proxy.log().contains("it has not said within 2 s that it speaks the relay protocol"),
            "{}",
            proxy.log()
        );
        drop(link);
    }
    let mut cache = Daemon::cache(&["--peer-protocol", "relay"]);
    let mut peer = OldProxy::connect(&cache);
    peer.header(&stream("core-1.img"), WriteMode::Append, 8);
    assert_closed(&mut peer.0);
    cache.wait_log("speaks the seed protocol, which --peer-protocol relay does not allow");
    let mut ours = FakeProxy::connect(&cache);
    ours.begin(1, false);
    ours.end();
    cache.wait_log("the dump is complete");

    // And the other way round, a cache that is told to be an old one.
    let mut cache = Daemon::cache(&["--peer-protocol", "seed"]);
    let mut proxy = Daemon::proxy(cache.port, &[]);
    Dump::connect(&proxy).end();
    assert_eq!(proxy.wait(), 0);
    assert!(proxy.log().contains("sent, not confirmed"));
    cache.wait_log("the dump is complete");
}

#[test]
fn another_version_is_an_error_on_both_sides() {
    let theirs = "speaks version 2 of the protocol, and this program version 1";
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, &["--connect-timeout", "1"]);
    let (mut peer, _) = cache.greeted();
    peer.say(Kind::Welcome(Welcome { major: 2, ..cache.welcome() }));
    drop(peer);
    drop(cache);
    assert_eq!(proxy.wait(), 1);
    assert!(proxy.log().contains(theirs), "{}", proxy.log());

    let mut cache = Daemon::cache(&["--keep"]);
    let mut peer = FakeProxy::greet(&cache, &Hello { major: 2, ..hello(1) });
    assert!(peer.hear_error().contains(theirs));
    peer.end();
    cache.wait_log(theirs);
    let mut peer = FakeProxy::connect(&cache);
    peer.peer.say(Kind::Hello(Hello { major: 2, ..hello(1) }));
    cache.wait_log_times(theirs, 2);
    // A session without a name is none.
    let mut peer = FakeProxy::greet(&cache, &Hello { session: vec![1; 15], ..hello(1) });
    assert!(peer.hear_error().contains("session id"));

    // Another minor one is none.
    let mut fake = FakeCache::new();
    let mut proxy = Daemon::proxy(fake.port, &[]);
    let (mut peer, _) = fake.greeted();
    fake.run[0] += 1;
    peer.say(Kind::Welcome(Welcome { minor: 9, ..fake.welcome() }));
    peer.stream.write_all(&unknown_frame()).unwrap();
    Dump::connect(&proxy).end();
    let mut held = Held::new(peer);
    held.peer.stream.write_all(&unknown_frame()).unwrap();
    held.session();
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    let mut peer = FakeProxy::greet(&cache, &Hello { minor: 9, ..hello(1) });
    assert!(matches!(peer.hear(), Kind::Welcome(_)));
}

#[test]
fn a_cache_that_does_not_stop_talking() {
    let (mut proxy, _cache, mut held) = proxy_and_cache(&["--keep"]);
    let frames = unknown_frame().repeat(100_000);
    // Until the proxy has had enough of it.
    while held.peer.stream.write_all(&frames).is_ok() {}
    proxy.wait_log("the peer does not stop talking");
}

// --- The cache, and a proxy that the test plays.

/// All of an image, from a restore of the stream dialect.
fn read_all(restore: &mut Restore, name: &str) -> Vec<u8> {
    restore.read(name).unwrap_or_else(|| panic!("{name} does not exist"))
}

fn pipe_for(restore: &mut Restore, name: &str) -> std::io::PipeReader {
    restore.ask(name);
    assert_eq!(restore.answer(), Some(true), "{name}");
    restore.pipe()
}

fn exactly(from: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn everything_is_confirmed_and_served() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    let pages = pattern(5_000_000, 1);
    let ids = ["pages-1.img", "pages-2.img"].map(|name| proxy.open(&stream(name), WriteMode::Append));
    for piece in pages.chunks(70_001) {
        proxy.data(ids[0], piece);
        proxy.data(ids[1], piece);
    }
    for id in ids {
        proxy.close(id, pages.len());
    }
    proxy.stream_image("empty.img", b"");
    // More of an image, one over another, and nothing more of one.
    proxy.stream_image("core-1.img", b"one");
    let id = proxy.open(&stream("core-1.img"), WriteMode::Append);
    proxy.data(id, b", two");
    proxy.close(id, 8);
    let id = proxy.open(&stream("core-1.img"), WriteMode::Append);
    proxy.close(id, 8);
    proxy.stream_image("core-2.img", &pages);
    let id = proxy.open(&stream("core-2.img"), WriteMode::Truncate);
    proxy.data(id, b"short");
    proxy.close(id, 5);
    proxy.end();
    cache.wait_log("the dump is complete");
    let mut restore = Restore::connect(&cache);
    assert_eq!(read_all(&mut restore, "inventory.img"), b"the inventory");
    for name in ["pages-1.img", "pages-2.img"] {
        assert!(read_all(&mut restore, name) == pages, "{name}");
    }
    assert_eq!(read_all(&mut restore, "empty.img"), b"");
    assert_eq!(read_all(&mut restore, "core-1.img"), b"one, two");
    assert_eq!(read_all(&mut restore, "core-2.img"), b"short");
    assert_eq!(restore.read("core-3.img"), None);
    drop(restore);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}

#[test]
fn parts_are_acknowledged_and_pings_answered() {
    let cache = Daemon::cache(&[]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.peer.say(Kind::Ping(wire::Ping { token: 5 }));
    assert_eq!(proxy.peer.next(), Seen::Message(Kind::Pong(wire::Pong { token: 5 })));
    proxy.begin(1, false);
    let id = proxy.open(&stream("pages-1.img"), WriteMode::Append);
    proxy.data(id, b"a few");
    assert_eq!(proxy.peer.next(), Seen::Message(Kind::Ack(wire::Ack { id, bytes: 5 })));
    proxy.data(id, &[3; 1 << 20]);
    let all = 5 + (1 << 20);
    loop {
        match proxy.peer.next() {
            Seen::Message(Kind::Ack(ack)) if ack.id == id && ack.bytes == all => break,
            Seen::Message(Kind::Ack(ack)) => assert!(ack.bytes < all),
            other => panic!("{other:?}"),
        }
    }
    proxy.close(id, all as usize);
    assert_eq!(proxy.peer.next(), Seen::Message(Kind::Stored(wire::Stored { id, size: all })));
}

#[test]
fn what_a_proxy_must_not_say() {
    let mut cache = Daemon::cache(&["--keep"]);
    type Say = fn(&mut FakeProxy);
    let wrong: [(&str, Say); 14] = [
        ("began a session in the middle of another", |p| p.begin(2, false)),
        ("sent bytes or the end of transfer 9, which is not open", |p| p.close(9, 0)),
        ("sent bytes or the end of transfer 9, which is not open", |p| p.data(9, b"x")),
        ("sent bytes or the end of transfer 9, which is not open", |p| p.data(9, &[0; 100_000])),
        ("sent bytes or the end of transfer 9, which is not open", |p| {
            p.peer.say(Kind::Abort(wire::Abort { id: 9 }));
        }),
        ("of which 1 are here", |p| {
            let id = p.open(&stream("core-1.img"), WriteMode::Append);
            p.data(id, b"x");
            p.close(id, 2);
        }),
        ("opened transfer 1 behind transfer 1", |p| {
            let open = wire::Open { id: 1, name: b"a.img".to_vec(), open_mode: 1, ..wire::Open::default() };
            p.peer.say(Kind::Open(open.clone()));
            p.peer.say(Kind::Open(open));
        }),
        ("asked for the unknown open mode", |p| {
            p.peer.say(Kind::Open(wire::Open {
                id: 1,
                name: b"a.img".to_vec(),
                open_mode: 2,
                ..wire::Open::default()
            }));
        }),
        ("sent a name that", |p| {
            p.peer.say(Kind::Open(wire::Open {
                id: 1,
                name: b"../a".to_vec(),
                open_mode: 1,
                ..wire::Open::default()
            }));
        }),
        ("said what only a cache says", |p| p.peer.say(Kind::Pong(wire::Pong { token: 1 }))),
        ("finished a dump of 1 transfers and 0 bytes, of which 0 and 0 are here", |p| {
            p.peer.say(Kind::Finished(wire::Finished { images: 1, bytes: 0 }));
        }),
        ("although core-1.img is not complete", |p| {
            p.open(&stream("core-1.img"), WriteMode::Append);
            p.finish();
        }),
        ("that is no frame of the relay protocol", |p| p.peer.stream.write_all(&[0; 9]).unwrap()),
        ("sent a relay frame that does not parse", |p| {
            let word = (2 | wire::TOP).to_ne_bytes();
            p.peer.stream.write_all(&[&word[..], &[0xff; 2]].concat()).unwrap();
        }),
    ];
    for (n, (why, say)) in wrong.into_iter().enumerate() {
        let mut proxy = FakeProxy::connect(&cache);
        proxy.begin(1, false);
        say(&mut proxy);
        cache.wait_log_times("the dump failed", n + 1);
        let said = proxy.peer.hear_error();
        assert!(said.contains(why), "{said}");
        assert!(cache.log().contains(why), "{why}");
        proxy.peer.end();
    }
    let mut proxy = FakeProxy::connect(&cache);
    proxy.open(&stream("core-1.img"), WriteMode::Append);
    cache.wait_log("sent images outside of a session");
    proxy.peer.end();
    // It goes on as if nothing had been.
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    proxy.end();
    cache.wait_log("the dump is complete");
}

#[test]
fn a_dump_that_is_none_fails() {
    let mut cache = Daemon::cache(&[]);
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    proxy.stream_image("core-1.img", b"the core");
    proxy.stream_image("inventory.img", b"x");
    proxy.finish();
    assert!(proxy.peer.hear_error().contains("no pstree.img"));
    assert_eq!(restore.answer(), None);
    assert_eq!(cache.wait(), 1);
}

#[test]
fn a_proxy_that_fails_says_why() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    proxy.stream_image("core-1.img", b"the core");
    proxy.peer.say(Kind::Error(wire::Error::new(5, "criu has failed")));
    assert_eq!(cache.wait(), 1);
    assert!(cache.log().contains("has failed the dump: criu has failed"));
    proxy.peer.end();
}

#[test]
fn a_link_that_is_lost_fails_the_dump() {
    for ends in [0, 1, 2] {
        let mut cache = Daemon::cache(&[]);
        let mut restore = Restore::connect(&cache);
        restore.ask("inventory.img");
        let mut proxy = FakeProxy::connect(&cache);
        proxy.begin(1, false);
        proxy.stream_image("core-1.img", b"the core");
        if ends > 0 {
            let id = proxy.open(&stream("pages-1.img"), WriteMode::Append);
            proxy.data(id, &pattern(100_000, 1));
        }
        cache.wait_log("core-1.img: 8 bytes received");
        match ends {
            2 => proxy.peer.reset(),
            _ => drop(proxy),
        }
        assert_eq!(restore.answer(), None);
        assert_eq!(cache.wait(), 1, "{}", cache.log());
    }
}

#[test]
fn a_proxy_that_has_not_seen_the_welcome() {
    let mut cache = Daemon::cache(&[]);
    let mut peer = FakeProxy::greet(&cache, &hello(1));
    assert!(matches!(peer.hear(), Kind::Welcome(_)));
    let mut old = OldProxy(peer.stream);
    old.send(&stream("pages-1.img"), b"pages");
    old.end();
    cache.wait_log("the dump is complete");
    let mut restore = Restore::connect(&cache);
    assert_eq!(read_all(&mut restore, "inventory.img"), b"the inventory");
    assert_eq!(read_all(&mut restore, "pages-1.img"), b"pages");
    assert_eq!(restore.read(".criu-relay"), None, "the greeting is no image");
    drop(restore);
    assert_eq!(cache.wait(), 0);
}

#[test]
fn a_lost_word_is_said_again() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    proxy.stream_image("pstree.img", b"the tree");
    proxy.stream_image("inventory.img", b"the inventory");
    proxy.finish();
    cache.wait_log("the dump is complete");
    let FakeProxy { peer, session, run, .. } = proxy;
    peer.reset();
    let mut proxy = FakeProxy::connect(&cache);
    assert_eq!(proxy.run, run, "the same run");
    proxy.peer.say(Kind::Resume(wire::Resume { session: session.clone(), run: run.clone() }));
    assert_eq!(proxy.peer.hear(), Kind::AllStored(wire::AllStored { images: 2, bytes: 21 }));
    // Of another session, or another run, nothing is here.
    for (session, run) in [(vec![9; wire::ID], run), (session, vec![9; wire::ID])] {
        proxy.peer.say(Kind::Resume(wire::Resume { session, run }));
        assert_eq!(
            proxy.peer.hear(),
            Kind::Holding(wire::Holding { last: true, ..wire::Holding::default() })
        );
    }
    // The link goes on with the next session.
    proxy.begin(2, false);
    proxy.end();
    cache.wait_log_times("the dump is complete", 2);
}

#[test]
fn sessions_follow_one_another_on_one_link() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = FakeProxy::connect(&cache);
    for n in 1..=3_u8 {
        proxy.begin(n, false);
        proxy.stream_image("pages-1.img", &[n; 100_000]);
        proxy.end();
        cache.wait_log_times("the dump is complete", n.into());
        let mut restore = Restore::connect(&cache);
        assert_eq!(read_all(&mut restore, "inventory.img"), b"the inventory");
        assert!(read_all(&mut restore, "pages-1.img") == [n; 100_000]);
    }
    // A second link waits until the session on the first is over, and is heard then.
    proxy.begin(4, false);
    let mut other = FakeProxy::connect(&cache);
    other.begin(5, false);
    other.stream_image("core-1.img", b"other");
    cache.wait_log_times("a dump begins", 4);
    proxy.end();
    other.end();
    cache.wait_log_times("the dump is complete", 5);
}

#[test]
fn without_keep_there_is_one_session() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    proxy.end();
    cache.wait_log("the dump is complete");
    proxy.begin(2, false);
    assert!(proxy.peer.hear_error().contains("this cache has its dump already"));
    let mut other = FakeProxy::greet(&cache, &hello(3));
    assert!(other.hear_error().contains("this cache has its dump already"));
}

// --- A restore that reads while images arrive.

#[test]
fn an_image_is_read_while_it_arrives() {
    for len in [10, 100_000] {
        let mut cache = Daemon::cache(&[]);
        let mut proxy = FakeProxy::connect(&cache);
        proxy.begin(1, false);
        let image = key("/d", "pages-1.img");
        // One waits already, another comes when there is something.
        let mut early = open_remote(&cache.dir.join("img-cache.sock"), &image, None);
        let id = proxy.open(&image, WriteMode::Append);
        assert_eq!(read_answer(&mut early).unwrap(), 0);
        let first = pattern(len, 1);
        proxy.data(id, &first);
        assert!(exactly(&mut early, len) == first);
        let mut late = open_remote(&cache.dir.join("img-cache.sock"), &image, None);
        assert_eq!(read_answer(&mut late).unwrap(), 0);
        assert!(exactly(&mut late, len) == first);
        let more = pattern(300_000, 2);
        proxy.data(id, &more);
        for reader in [&mut early, &mut late] {
            assert!(exactly(reader, more.len()) == more);
        }
        proxy.close(id, len + more.len());
        for reader in [&mut early, &mut late] {
            assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0, "its end");
        }
        proxy.image(&key("/d", "inventory.img"), b"x");
        proxy.finish();
        proxy.hear_all_stored();
        cache.wait_log("the dump is complete");
    }
}

#[test]
fn a_stream_is_read_while_it_arrives() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    let mut restore = Restore::connect(&cache);
    restore.ask("pages-1.img");
    let id = proxy.open(&stream("pages-1.img"), WriteMode::Append);
    assert_eq!(restore.answer(), Some(true));
    // It grows before its pipe is there, and after.
    proxy.data(id, b"one");
    let mut pipe = restore.pipe();
    assert_eq!(exactly(&mut pipe, 3), b"one");
    let more = pattern(3_000_000, 2);
    proxy.data(id, &more);
    assert!(exactly(&mut pipe, more.len()) == more);
    // Others meanwhile, and one that is complete before its pipe is there.
    proxy.stream_image("core-1.img", b"the core");
    assert_eq!(read_all(&mut restore, "core-1.img"), b"the core");
    let core = proxy.open(&stream("core-2.img"), WriteMode::Append);
    restore.ask("core-2.img");
    assert_eq!(restore.answer(), Some(true));
    proxy.data(core, b"the core");
    proxy.close(core, 8);
    cache.wait_log("core-2.img: 8 bytes received");
    let mut rest = Vec::new();
    restore.pipe().read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"the core");
    proxy.close(id, 3 + more.len());
    assert_eq!(pipe.read(&mut [0; 1]).unwrap(), 0, "its end");
    proxy.end();
    assert_eq!(read_all(&mut restore, "inventory.img"), b"the inventory");
    drop(restore);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}

/// The ways in which an image that has begun never becomes complete.
const ABORTS: [fn(FakeProxy, u64); 4] = [
    |mut proxy, id| proxy.peer.say(Kind::Abort(wire::Abort { id })),
    |mut proxy, _| proxy.peer.say(Kind::Error(wire::Error::new(5, "criu has failed"))),
    |proxy, _| drop(proxy),
    |proxy, _| proxy.peer.reset(),
];

#[test]
fn an_aborted_image_ends_its_restore_before_its_pipe() {
    for len in [10, 1_000_000] {
        for abort in ABORTS {
            let cache = Daemon::cache(&["--keep"]);
            let mut proxy = FakeProxy::connect(&cache);
            proxy.begin(1, false);
            let id = proxy.open(&stream("pages-1.img"), WriteMode::Append);
            proxy.data(id, &pattern(len, 1));
            let mut restore = Restore::connect(&cache);
            let mut pipe = pipe_for(&mut restore, "pages-1.img");
            assert!(exactly(&mut pipe, len) == pattern(len, 1));
            abort(proxy, id);
            assert_eq!(pipe.read(&mut [0; 1]).unwrap(), 0);
            // Not in a moment: already.
            let closed = recv(&restore.0, &mut [0; 1], RecvFlags::DONTWAIT);
            assert!(matches!(closed, Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET)), "{closed:?}");
        }
    }
}

#[test]
fn an_aborted_image_has_no_clean_end() {
    for abort in ABORTS {
        let cache = Daemon::cache(&["--keep"]);
        let mut proxy = FakeProxy::connect(&cache);
        proxy.begin(1, false);
        let id = proxy.open(&key("/d", "pages-1.img"), WriteMode::Append);
        proxy.data(id, b"a part");
        let mut reader = open_remote(&cache.dir.join("img-cache.sock"), &key("/d", "pages-1.img"), None);
        assert_eq!(read_answer(&mut reader).unwrap(), 0);
        assert_eq!(exactly(&mut reader, 6), b"a part");
        abort(proxy, id);
        assert_eq!(reader.read(&mut [0; 1]).map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    }
}

#[test]
fn an_aborted_image_behind_a_session_of_the_other_dialect() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    proxy.image(&key("null", "parent"), &id_list(&["/d"]));
    proxy.image(&key("/d", "inventory.img"), b"x");
    proxy.finish();
    proxy.hear_all_stored();
    cache.wait_log("the dump is complete");
    // Nothing of the session that is served has been read: the restore is of the one that comes.
    proxy.begin(2, false);
    let id = proxy.open(&stream("core-1.img"), WriteMode::Append);
    proxy.data(id, b"a part");
    let mut restore = Restore::connect(&cache);
    let mut pipe = pipe_for(&mut restore, "core-1.img");
    assert_eq!(exactly(&mut pipe, 6), b"a part");
    proxy.peer.say(Kind::Abort(wire::Abort { id }));
    assert_eq!(pipe.read(&mut [0; 1]).unwrap(), 0);
    let closed = recv(&restore.0, &mut [0; 1], RecvFlags::DONTWAIT);
    assert!(matches!(closed, Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET)), "{closed:?}");
}

#[test]
fn who_waits_for_an_aborted_image_gets_an_error() {
    let cache = Daemon::cache(&["--keep"]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    proxy.image(&key("/d", "core-1.img"), b"the core");
    let socket = cache.dir.join("img-cache.sock");
    let waiting = open_remote(&socket, &key("/d", "pages-1.img"), None);
    assert_eq!(read_remote(&socket, &key("/d", "core-1.img")), Ok(b"the core".to_vec()));
    drop(proxy);
    assert_eq!(finish_read(waiting), Err(EIO));
}

// --- What is kept, and what is freed.

/// The memory of a daemon's files that have no name, in bytes.
fn memfds(daemon: &Daemon) -> u64 {
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap().flatten();
    let mut seen = HashMap::new();
    for path in files.map(|entry| entry.path()) {
        if fs::read_link(&path).is_ok_and(|link| link.to_string_lossy().contains("memfd:"))
            && let Ok(file) = fs::metadata(&path)
        {
            seen.insert(file.ino(), file.blocks() * 512);
        }
    }
    seen.values().sum()
}

const MIB: usize = 1 << 20;

#[test]
fn consumed_memory_goes_while_it_is_read() {
    for consume in [true, false] {
        let mut cache = Daemon::cache(if consume { &["--consume"] } else { &[] });
        let mut proxy = FakeProxy::connect(&cache);
        proxy.begin(1, false);
        let pages = pattern(32 * MIB, 1);
        proxy.stream_image("pages-1.img", &pages);
        proxy.stream_image("core-1.img", &pattern(2 * MIB, 2));
        proxy.end();
        assert!(memfds(&cache) >= 34 * MIB as u64);
        let mut restore = Restore::connect(&cache);
        read_all(&mut restore, "inventory.img");
        let mut pipe = pipe_for(&mut restore, "pages-1.img");
        assert!(exactly(&mut pipe, 16 * MIB) == pages[..16 * MIB]);
        if consume {
            wait_until("half of it is freed", || memfds(&cache) < 24 * MIB as u64);
        }
        let mut rest = Vec::new();
        pipe.read_to_end(&mut rest).unwrap();
        assert!(rest == pages[16 * MIB..]);
        // What is no page image is read as often as one likes.
        for _ in 0..2 {
            assert!(read_all(&mut restore, "core-1.img") == pattern(2 * MIB, 2));
        }
        if !consume {
            assert!(memfds(&cache) >= 34 * MIB as u64);
            assert!(read_all(&mut restore, "pages-1.img") == pages);
            continue;
        }
        wait_until("nearly all of it is freed", || memfds(&cache) < 8 * MIB as u64);
        restore.ask("pages-1.img");
        assert_eq!(restore.answer(), None);
        cache.wait_log("pages-1.img has been read before, and with --consume it is not here any more");
    }
}

#[test]
fn a_consumed_image_of_the_remote_dialect() {
    let mut cache = Daemon::cache(&["--consume"]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    let pages = pattern(8 * MIB, 1);
    proxy.image(&key("null", "parent"), &id_list(&["/d"]));
    proxy.image(&key("/d", "pages-1.img"), &pages);
    proxy.image(&key("/d", "inventory.img"), b"x");
    proxy.finish();
    proxy.hear_all_stored();
    let socket = cache.dir.join("img-cache.sock");
    assert_eq!(read_remote(&socket, &key("/d", "inventory.img")), Ok(b"x".to_vec()));
    assert!(read_remote(&socket, &key("/d", "pages-1.img")) == Ok(pages));
    // Neither an answer nor the image.
    let mut again = open_remote(&socket, &key("/d", "pages-1.img"), None);
    assert_closed(&mut again);
    cache.wait_log("with --consume it is not here any more");
}

/// What a proxy keeps of 16 MiB of pages and 2 MiB of something else, once the cache has them.
fn kept(retain: &str) -> (Daemon, FakeCache, Held, Dump) {
    let (proxy, cache, mut held) = proxy_and_cache(&["--retain", retain]);
    let mut dump = Dump::connect(&proxy);
    let mut pages = dump.open("pages-1.img");
    let mut core = dump.open("core-1.img");
    let writer = std::thread::spawn(move || {
        pages.write_all(&pattern(16 * MIB, 1)).unwrap();
        core.write_all(&pattern(2 * MIB, 2)).unwrap();
    });
    held.begin();
    held.until(|held| held.images.len() == 2);
    writer.join().unwrap();
    assert!(held.images[&stream("pages-1.img")] == pattern(16 * MIB, 1));
    assert!(held.images[&stream("core-1.img")] == pattern(2 * MIB, 2));
    (proxy, cache, held, dump)
}

#[test]
fn what_is_retained() {
    let (proxy, _cache, mut held, dump) = kept("all");
    assert!(memfds(&proxy) >= 18 * MIB as u64);
    dump.end();
    held.finished();

    let (mut proxy, _cache, mut held, dump) = kept("small");
    assert!(memfds(&proxy) < 4 * MIB as u64);
    dump.end();
    held.finished();
    held.all_stored();
    assert_eq!(proxy.wait(), 0);

    let (mut proxy, cache, mut held, dump) = kept("none");
    assert!(memfds(&proxy) < MIB as u64);
    dump.end();
    held.finished();
    // The cache has it, and its word is still to be had ...
    held.peer.reset();
    let mut held = cache.accept();
    let Kind::Resume(_) = held.hear() else { panic!("it does not ask") };
    held.peer.say(Kind::AllStored(wire::AllStored { images: 4, bytes: 18 * MIB as u64 + 21 }));
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());

    // ... or it has not: it can't be sent anew, and that is said.
    let (mut proxy, cache, mut held, dump) = kept("none");
    dump.end();
    held.finished();
    held.peer.reset();
    let mut held = cache.accept();
    let Kind::Resume(_) = held.hear() else { panic!("it does not ask") };
    held.peer.say(Kind::Holding(wire::Holding { last: true, ..wire::Holding::default() }));
    assert_eq!(proxy.wait(), 1);
    assert!(proxy.log().contains("what had been sent was not kept (--retain"), "{}", proxy.log());
}

#[test]
fn what_is_retained_in_the_remote_dialect() {
    for (retain, most) in [("none", 1), ("small", 4)] {
        let (mut proxy, _cache, mut held) = proxy_and_cache(&["--retain", retain]);
        let socket = proxy.dir.join("img-proxy.sock");
        let list = key("null", "parent");
        write_remote(&socket, &list, WriteMode::Append, &id_list(&["/d"]));
        let writer = std::thread::spawn({
            let socket = socket.clone();
            move || {
                write_remote(&socket, &key("/d", "pages-1.img"), WriteMode::Append, &pattern(16 * MIB, 1));
                write_remote(&socket, &key("/d", "core-1.img"), WriteMode::Append, &pattern(2 * MIB, 2));
            }
        });
        held.begin();
        held.until(|held| held.images.len() == 3);
        writer.join().unwrap();
        wait_until("it is freed", || memfds(&proxy) < most * MIB as u64);
        // CRIU reads its list back, whatever is kept.
        assert_eq!(read_remote(&socket, &list), Ok(id_list(&["/d"])));
        write_remote(&socket, &list, WriteMode::Append, &id_list(&["/e"]));
        assert_eq!(read_remote(&socket, &list), Ok(id_list(&["/d", "/e"])));
        write_remote(&socket, &key("/e", "inventory.img"), WriteMode::Append, b"x");
        dump_finish(&socket, Style::Y2017);
        held.finished();
        held.all_stored();
        assert_eq!(proxy.wait(), 0, "{}", proxy.log());
        assert_eq!(held.images[&list], id_list(&["/d", "/e"]));
    }
}

// --- Both daemons.

#[test]
fn both_daemons_and_one_link() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = Daemon::proxy(cache.port, &["--keep", "--splice", "always"]);
    for n in 1..=3 {
        let pages = pattern(3_000_000, n as u32);
        let mut dump = Dump::connect(&proxy);
        dump.write("pages-1.img", &pages);
        dump.end();
        proxy.wait_log_times("confirmed by the cache", n);
        let mut restore = Restore::connect(&cache);
        assert_eq!(read_all(&mut restore, "inventory.img"), b"the inventory");
        assert!(read_all(&mut restore, "pages-1.img") == pages);
        drop(restore);
        cache.wait_log_times("taken for a success", n);
    }
    // The other dialect on the same link, read while it arrives.
    let (dump, restore) = (proxy.dir.join("img-proxy.sock"), cache.dir.join("img-cache.sock"));
    let mut writer = open_remote(&dump, &key("/d", "pages-1.img"), Some(WriteMode::Append));
    writer.write_all(b"a part").unwrap();
    let mut reader = open_remote(&restore, &key("/d", "pages-1.img"), None);
    assert_eq!(read_answer(&mut reader).unwrap(), 0);
    assert_eq!(exactly(&mut reader, 6), b"a part");
    drop(writer);
    assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
    write_remote(&dump, &key("/d", "inventory.img"), WriteMode::Append, b"x");
    dump_finish(&dump, Style::Y2019);
    proxy.wait_log_times("confirmed by the cache", 4);
    assert_eq!(proxy.log().matches("connected to").count(), 1);
    assert_eq!(proxy.terminate(), 0);
}

#[test]
fn a_cache_that_is_killed_and_one_that_takes_its_place() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = Daemon::proxy(cache.port, &[]);
    proxy.wait_log("relay protocol");
    cache.stop();
    let pages = pattern(16 * MIB, 1);
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", &pages);
    dump.end();
    proxy.wait_log("the dump is complete");
    let (port, dir) = (cache.port, std::mem::replace(&mut cache.dir, Dir::new()));
    cache.signal(Signal::KILL);
    cache.wait();
    let mut cache = Daemon::cache_at(dir, port, &[]);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    assert!(proxy.log().contains("confirmed by the cache"));
    let mut restore = Restore::connect(&cache);
    assert_eq!(read_all(&mut restore, "inventory.img"), b"the inventory");
    assert!(read_all(&mut restore, "pages-1.img") == pages);
    drop(restore);
    assert_eq!(cache.wait(), 0);
}

#[test]
fn a_cache_that_takes_a_moment_for_the_word() {
    // It stops with everything in its socket; the proxy waits for its word however long that takes.
    let mut cache = Daemon::cache(&[]);
    let mut proxy = Daemon::proxy(cache.port, &[]);
    proxy.wait_log("relay protocol");
    cache.stop();
    Dump::connect(&proxy).end();
    proxy.wait_log("inventory.img: 13 bytes sent");
    assert!(proxy.is_running());
    cache.go_on();
    assert_eq!(proxy.wait(), 0);
    cache.wait_log("the dump is complete");
}
