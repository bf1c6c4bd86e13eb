//! Memory that is written before a dump: who asks for it and when, who waits for what, and where it goes.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use common::relay::{FakeCache, FakeProxy, Held};
use common::script::{Bench, Script, Source, pair, played, pre_stream};
use common::*;
use criu_relay::wire::relay::{self as wire, Kind, Prepared};

const MIB: u64 = 1 << 20;
const STORED: [&str; 3] = ["--commit", "stored", "-v2"];

/// A proxy of which a fake cache is the cache, and a script at `pre-dump` that has asked.
fn asked(args: &[&str]) -> (FakeCache, Held, Bench, Script, wire::Prepare) {
    let (fake, mut held, bench) = played(&[&STORED[..], args].concat());
    let script = Script::start("pre-dump", &bench.proxy, Some(&bench.source));
    let prepare = hear_prepare(&mut held);
    (fake, held, bench, script, prepare)
}

fn hear_prepare(held: &mut Held) -> wire::Prepare {
    match held.hear() {
        Kind::Prepare(prepare) => prepare,
        other => panic!("not asked to prepare but {other:?}"),
    }
}

fn prepared(held: &mut Held, bytes: u64) {
    held.peer.say(Kind::Prepared(Prepared { bytes }));
}

/// How much its memory files have.
fn files(daemon: &Daemon) -> u64 {
    let all = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().map(|entry| entry.unwrap().path());
    let memfds = all.filter(|path| {
        fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:criu-relay"))
    });
    memfds.filter_map(|path| fs::metadata(path).ok()).map(|stat| stat.blocks() * 512).sum()
}

fn ask(proxy: &mut FakeProxy, sizes: &[u64]) -> u64 {
    proxy.peer.say(Kind::Prepare(wire::Prepare::new(sizes.iter().sum(), sizes)));
    hear_prepared(proxy)
}

fn hear_prepared(proxy: &mut FakeProxy) -> u64 {
    match proxy.peer.hear() {
        Kind::Prepared(Prepared { bytes }) => bytes,
        other => panic!("not prepared but {other:?}"),
    }
}

#[test]
fn pre_dump_waits_until_it_is_there() {
    let (_fake, mut held, mut bench, mut script, prepare) = asked(&[]);
    // A shell and its two children, which share nothing.
    assert_eq!((prepare.sizes.len(), prepare.sizes.iter().sum()), (3, prepare.bytes));
    assert!(prepare.sizes.iter().all(|size| *size > 0 && size % 4096 == 0), "{prepare:?}");
    bench.proxy.wait_log("the action script: pre-dump");
    assert!(script.waits());
    prepared(&mut held, prepare.bytes);
    script.agrees();
    bench.proxy.wait_log("the cache has prepared");
    // Each dump asks anew; and the dump is as any other.
    let script = Script::start("pre-dump", &bench.proxy, Some(&bench.source));
    let bytes = hear_prepare(&mut held).bytes;
    prepared(&mut held, bytes);
    script.agrees();
    let script = bench.held(&mut held);
    held.all_stored();
    script.agrees();
}

#[test]
fn off_asks_for_nothing() {
    let (_fake, mut held, mut bench) = played(&[&STORED[..], &["--prepare", "off"]].concat());
    Script::start("pre-dump", &bench.proxy, Some(&bench.source)).agrees();
    // The first that is heard is the session.
    let script = bench.held(&mut held);
    held.all_stored();
    script.agrees();
}

#[test]
fn a_size_is_asked_for_and_has_to_be_there() {
    let (_fake, mut held, mut bench, script, prepare) = asked(&["--prepare", "3M"]);
    assert_eq!(prepare, wire::Prepare { bytes: 3 * MIB, sizes: vec![] });
    prepared(&mut held, 3 * MIB - 4096);
    script.refuses("the cache has prepared 3.0 MiB of the 3.0 MiB of memory that --prepare demands");
    // It is not needed then.
    assert_eq!(hear_prepare(&mut held), wire::Prepare::default());
    let script = Script::start("pre-dump", &bench.proxy, Some(&bench.source));
    assert_eq!(hear_prepare(&mut held).bytes, 3 * MIB);
    // The answer to the one before says nothing.
    prepared(&mut held, 0);
    prepared(&mut held, 3 * MIB);
    script.agrees();
    bench.proxy.wait_log("the cache has prepared 3.0 MiB");
}

#[test]
fn without_enough_the_dump_goes_on() {
    let (_fake, mut held, mut bench, script, _) = asked(&[]);
    prepared(&mut held, 0);
    script.agrees();
    bench.proxy.wait_log("the cache has prepared 0 bytes of the");
    bench.proxy.wait_log("it goes on without the rest");
}

#[test]
fn a_cache_that_does_not_answer_is_not_waited_for() {
    let (_fake, mut held, mut bench, script, _) = asked(&["--prepare-timeout", "1"]);
    script.agrees();
    bench.proxy.wait_log("in 1 s (--prepare-timeout)");
    // Too late.
    prepared(&mut held, MIB);
    let script = Script::start("pre-dump", &bench.proxy, Some(&bench.source));
    let bytes = hear_prepare(&mut held).bytes;
    prepared(&mut held, bytes);
    script.agrees();
    bench.proxy.wait_log("the cache has prepared");
    let (_fake, mut held, _bench, script, _) = asked(&["--prepare-timeout", "1", "--prepare", "2M"]);
    script.refuses("in 1 s (--prepare-timeout) that --prepare demands");
    assert_eq!(hear_prepare(&mut held), wire::Prepare::default());
}

#[test]
fn what_a_criu_that_is_gone_has_asked_for_is_not_needed() {
    let (_fake, mut held, _bench, script, prepare) = asked(&[]);
    assert!(prepare.bytes > 0);
    drop(script);
    assert_eq!(hear_prepare(&mut held), wire::Prepare::default());
}

#[test]
fn on_another_link_it_is_asked_for_once_more() {
    let (fake, held, _bench, mut script, prepare) = asked(&[]);
    held.peer.reset();
    let mut held = fake.accept();
    assert!(hear_prepare(&mut held).bytes > 0 && script.waits());
    prepared(&mut held, prepare.bytes * 2);
    script.agrees();
}

#[test]
fn an_old_cache_is_not_asked() {
    let (listener, port) = old_listener();
    for (args, agrees) in [(&[][..], true), (&["--prepare", "1M"], false)] {
        let mut proxy = Daemon::proxy(
            port,
            &[&["--commit", "stored", "--accept-unconfirmed", "--peer-protocol", "seed"], args].concat(),
        );
        let source = Source::new();
        proxy.wait_log("seed protocol");
        let script = Script::start("pre-dump", &proxy, Some(&source));
        match agrees {
            true => script.agrees(),
            false => script.refuses("the cache is an old one, which prepares no memory (--prepare)"),
        }
    }
    drop(listener);
}

#[test]
fn the_cache_writes_it_and_images_begin_in_it() {
    let mut cache = Daemon::cache(&["-v2"]);
    let mut proxy = FakeProxy::connect(&cache);
    assert_eq!(ask(&mut proxy, &[2 * MIB, 100, 5 * MIB]), 7 * MIB + 100);
    cache.wait_log("7.0 MiB of memory are prepared for 127.0.0.1");
    assert_eq!(files(&cache), 7 * MIB);
    proxy.begin(1, false);
    let contents = [pattern(3 << 20, 1), pattern(50_000, 2), pattern(4 << 20, 3)];
    for (n, content) in contents.iter().enumerate() {
        let name = format!("pages-{n}.img");
        let id = proxy.open(&key("", &name), criu_relay::wire::criu::WriteMode::Append);
        proxy.data(id, content);
        if n == 2 {
            proxy.peer.is_read();
            wait_until("it is in the file", || files(&cache) == (3 << 20) + 53_248 + 5 * MIB);
        }
        proxy.close(id, content.len());
    }
    proxy.end();
    // What is left over is given back.
    wait_until("it is cut off", || files(&cache) == (3 << 20) + 53_248 + (4 << 20));
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    assert_eq!(restore.answer(), Some(true));
    drop(restore.pipe());
    for (n, content) in contents.iter().enumerate() {
        assert!(restore.read(&format!("pages-{n}.img")).as_ref() == Some(content));
    }
}

#[test]
fn what_no_dump_comes_for_is_given_back() {
    let mut cache = Daemon::cache(&["--keep", "-v2"]);
    let mut proxy = FakeProxy::connect(&cache);
    assert_eq!(ask(&mut proxy, &[3 * MIB]), 3 * MIB);
    // It is not needed any more.
    assert_eq!(ask(&mut proxy, &[]), 0);
    wait_until("all is given back", || files(&cache) == 0);
    // Its proxy is gone.
    assert_eq!(ask(&mut proxy, &[3 * MIB]), 3 * MIB);
    drop(proxy);
    cache.wait_log("memory was prepared for a dump that does not come: its proxy is gone");
    wait_until("all is given back", || files(&cache) == 0);
    // Its dump fails.
    let mut proxy = FakeProxy::connect(&cache);
    assert_eq!(ask(&mut proxy, &[3 * MIB, 4 * MIB]), 7 * MIB);
    proxy.begin(1, false);
    let id = proxy.open(&key("", "pages-1.img"), criu_relay::wire::criu::WriteMode::Append);
    proxy.data(id, &pattern(1000, 1));
    proxy.peer.is_read();
    assert_eq!(files(&cache), 7 * MIB);
    proxy.peer.reset();
    cache.wait_log("the dump failed");
    wait_until("all is given back", || files(&cache) == 0);
}

#[test]
fn the_last_to_ask_is_served_and_each_is_answered() {
    let cache = Daemon::cache(&["--keep"]);
    let (mut first, mut second) = (FakeProxy::connect(&cache), FakeProxy::connect_for(&cache, 2));
    first.peer.say(Kind::Prepare(wire::Prepare::new(64 * MIB, &[])));
    first.peer.say(Kind::Prepare(wire::Prepare::new(65 * MIB, &[])));
    assert!(hear_prepared(&mut first) <= 64 * MIB);
    assert_eq!(ask(&mut second, &[2 * MIB]), 2 * MIB);
    assert!(hear_prepared(&mut first) <= 65 * MIB);
    // In the middle of a session there is nothing to be had.
    first.begin(1, false);
    first.stream_image("pages-1.img", b"small");
    assert!(matches!(first.peer.hear(), Kind::Stored(_)));
    assert_eq!((ask(&mut second, &[MIB]), ask(&mut first, &[MIB])), (0, 0));
    first.end();
}

#[test]
fn a_cache_may_refuse() {
    let cache = Daemon::cache(&["--prepare", "off"]);
    let mut proxy = FakeProxy::connect(&cache);
    assert_eq!((ask(&mut proxy, &[2 * MIB]), files(&cache)), (0, 0));
}

#[test]
fn it_counts_and_gives_way_at_the_limit() {
    let mut cache = Daemon::cache(&["--memory-limit", "8M"]);
    let mut proxy = FakeProxy::connect(&cache);
    assert_eq!(ask(&mut proxy, &[5 * MIB, 5 * MIB]), 8 * MIB);
    cache.wait_log("no more than 8.0 MiB of memory can be prepared for");
    cache.wait_log("(--memory-limit)");
    // Nothing of it keeps an image out.
    proxy.begin(1, false);
    proxy.stream_image("core-1.img", &pattern(100_000, 1));
    proxy.stream_image("pages-1.img", &pattern(7 << 20, 2));
    proxy.stream_image("pages-2.img", &pattern(500_000, 3));
    proxy.end();
    assert!(files(&cache) <= 8 * MIB);
}

#[test]
fn a_cache_may_do_it_from_the_start() {
    let mut cache = Daemon::cache(&["--prepare", "6M", "--keep", "-v2"]);
    cache.wait_log("6.0 MiB of memory are prepared, in");
    assert_eq!(files(&cache), 6 * MIB);
    // Without a script, and in the old protocol too.
    let mut old = OldProxy::connect(&cache);
    old.send(&key("", "pages-1.img"), &pattern(100_000, 1));
    wait_until("the small one has left it", || files(&cache) == 6 * MIB + 102_400);
    old.send(&key("", "pages-2.img"), &pattern(5 << 20, 2));
    wait_until("what is too much has gone", || files(&cache) == 5 * MIB + 102_400);
    old.end();
    cache.wait_log("the dump is complete");
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    assert_eq!(restore.answer(), Some(true));
    drop(restore.pipe());
    assert!(restore.read("pages-1.img") == Some(pattern(100_000, 1)));
    assert!(restore.read("pages-2.img") == Some(pattern(5 << 20, 2)));
    drop(restore);
    // For the next.
    cache.wait_log_times("6.0 MiB of memory are prepared, in", 2);
    let mut proxy = FakeProxy::connect(&cache);
    // What is there is enough.
    let before = files(&cache);
    assert_eq!((ask(&mut proxy, &[100, 4 * MIB]), files(&cache)), (4 * MIB + 100, before));
}

#[test]
fn more_than_the_limit_is_an_error_at_the_start() {
    let dir = Dir::new();
    let output = std::process::Command::new(binary())
        .args([
            "cache",
            "-D",
            dir.0.to_str().unwrap(),
            "--port",
            "0",
            "--memory-limit",
            "8M",
            "--prepare",
            "9M",
        ])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("--prepare is 9.0 MiB, and the memory limit 8.0 MiB (--memory-limit)"), "{said}");
}

#[test]
fn both_daemons() {
    let (mut cache, mut bench, _restore) = pair(&["-v2"], &["-v2"]);
    Script::start("pre-dump", &bench.proxy, Some(&bench.source)).agrees();
    bench.proxy.wait_log("the cache has prepared");
    cache.wait_log("of memory are prepared for");
    bench.images();
    let script = bench.post_dump();
    cache.wait_log("the dump is stored");
    drop(script);
    drop(pre_stream(&cache));
}
