//! The memory limit: refused in words that both sides log, or spilled; a proxy that makes CRIU wait, or fails at
//! once; and nothing is lost for it.

mod common;

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::relay::{FakeCache, FakeProxy, Held, hello};
use common::script::Bench;
use common::*;
use criu_relay::wire::Key;
use criu_relay::wire::criu::{Transfer, WriteMode, encode_transfer};
use criu_relay::wire::relay::{self as wire, Kind};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

const MIB: usize = 1 << 20;

/// What the bodies of a daemon take in memory files, in bytes.
fn memfds(daemon: &Daemon) -> usize {
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap().flatten();
    let mut seen = HashMap::new();
    for path in files.map(|entry| entry.path()) {
        if fs::read_link(&path).is_ok_and(|link| link.to_string_lossy().contains("memfd:"))
            && let Ok(file) = fs::metadata(&path)
        {
            seen.insert(file.ino(), file.blocks() as usize * 512);
        }
    }
    seen.values().sum()
}

/// The sentence about an image that can't grow.
fn refusal(log: &str, image: &str) -> String {
    let start = format!("{image} can't grow past byte ");
    let at = log.find(&start).unwrap_or_else(|| panic!("no '{start}' in\n{log}"));
    let line = log[at..].lines().next().unwrap();
    line.split("; ").next().unwrap().to_string()
}

/// CRIU writes until it can't: a proxy that keeps everything may be far ahead of its cache.
fn write_in_vain(dump: &mut Dump, name: &str) {
    let piece = pattern(MIB, 1);
    let Ok(mut pipe) = dump.try_open(name) else { return };
    wait_until("nothing more is taken", || pipe.write_all(&piece).is_err());
}

fn whole(restore: &mut Restore, name: &str) -> Vec<u8> {
    restore.read(name).unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn a_dump_beyond_the_caches_limit_is_refused_in_the_same_words_on_both_sides() {
    let mut cache = Daemon::cache(&["--memory-limit", "16M"]);
    cache.wait_log("the memory limit is 16.0 MiB (--memory-limit): images beyond it are refused");
    let mut proxy = Daemon::proxy(cache.port, &[]);
    proxy.wait_log("relay protocol; its memory limit is 16.0 MiB");
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    let mut dump = Dump::connect(&proxy);
    dump.write("core-1.img", &pattern(100_000, 1));
    write_in_vain(&mut dump, "pages-1.img");
    assert_eq!((cache.wait(), proxy.wait()), (1, 1));
    assert_eq!(restore.answer(), None);
    let said = refusal(&cache.log(), "pages-1.img");
    assert_eq!(refusal(&proxy.log(), "pages-1.img"), said, "{}", proxy.log());
    assert!(said.contains("the memory limit of 16.0 MiB (--memory-limit) is reached, 1"), "{said}");
    assert!(said.contains(" MiB are in use"), "{said}");
    assert!(proxy.log().contains("the dump failed:"), "{}", proxy.log());
}

#[test]
fn a_scripted_dump_beyond_the_limit_leaves_its_source_alone() {
    let mut cache = Daemon::cache(&["--memory-limit", "8M"]);
    let mut bench = Bench::new(cache.port, &[]);
    let mut dump = bench.dump.take().unwrap();
    write_in_vain(&mut dump, "pages-1.img");
    assert_eq!((cache.wait(), bench.proxy.wait()), (1, 1));
    assert!(bench.source.lives());
    assert_eq!(refusal(&bench.proxy.log(), "pages-1.img"), refusal(&cache.log(), "pages-1.img"));
}

#[test]
fn a_refused_peer_hears_enospc_and_what_others_know_of_the_limit() {
    let dir = Dir::new();
    let spill = ["--memory-limit", "4M", "--spill-dir", dir.0.to_str().unwrap()];
    for (args, limit) in [(&spill[..2], 4 << 20), (&spill[..], 0)] {
        let cache = Daemon::cache(args);
        let mut peer = FakeProxy::greet(&cache, &hello(1));
        let Kind::Welcome(welcome) = peer.hear() else { panic!("no welcome") };
        assert_eq!(welcome.memory_limit, limit);
    }
    // Whether its bytes are spliced or read.
    for piece in [MIB, 10_000] {
        let mut cache = Daemon::cache(&["--memory-limit", "4M"]);
        let mut proxy = FakeProxy::connect(&cache);
        proxy.begin(1, false);
        let id = proxy.open(&Key::stream(*b"pages-1.img"), WriteMode::Append);
        let bytes = pattern(piece, 1);
        let mut sent = 0;
        while sent < 4 * MIB {
            proxy.data(id, &bytes);
            sent += piece;
        }
        // One byte more. It may be refused already.
        let _ = proxy.peer.stream.write_all(&wire::encode(Kind::Data(wire::Data::new(id, 1))));
        let _ = proxy.peer.stream.write_all(b"x");
        let error = heard_error(&mut proxy);
        assert_eq!(error.errno, rustix::io::Errno::NOSPC.raw_os_error() as u32);
        assert_eq!(cache.wait(), 1);
        let said = refusal(&cache.log(), "pages-1.img");
        assert!(said.contains("the memory limit of 4.0 MiB"), "{said}");
        let at: usize =
            said["pages-1.img can't grow past byte ".len()..].split(':').next().unwrap().parse().unwrap();
        assert!(at > 4 * MIB - 2 * 10_000 && at <= 4 * MIB, "{said}");
    }
}

fn heard_error(proxy: &mut FakeProxy) -> wire::Error {
    loop {
        match proxy.peer.hear() {
            Kind::Error(error) => return error,
            Kind::Stored(_) => {}
            other => panic!("no error but {other:?}"),
        }
    }
}

// The length is only announced: nothing is taken for it.
#[test]
fn an_announced_size_is_not_believed() {
    let cache = Daemon::cache(&["--memory-limit", "4M", "--keep"]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    let id = proxy.open(&Key::stream(*b"pages-1.img"), WriteMode::Append);
    proxy.peer.say(Kind::Data(wire::Data::new(id, wire::DATA_MAX as u32)));
    proxy.peer.stream.write_all(&pattern(100_000, 1)).unwrap();
    proxy.peer.is_read();
    let used = memfds(&cache);
    assert!(used <= 128 * 1024, "{used}");
    // The same in the seed protocol, where it is the whole image that is announced.
    let mut cache = Daemon::cache(&["--memory-limit", "4M"]);
    let mut old = OldProxy::connect(&cache);
    old.header(&key("", "pages-1.img"), WriteMode::Append, 1 << 50);
    old.0.write_all(&pattern(MIB, 1)).unwrap();
    cache.wait_log("a dump begins");
    while old.0.write_all(&pattern(MIB, 1)).is_ok() {}
    assert_eq!(cache.wait(), 1);
    assert!(refusal(&cache.log(), "pages-1.img").contains("the memory limit of 4.0 MiB"));
}

// Nor may there be any number of images, though there is nothing in them.
#[test]
fn empty_images_are_counted() {
    let name = |number: usize| format!("{number}-{}", "n".repeat(4000));
    let mut cache = Daemon::cache(&["--memory-limit", "1M"]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    let sent = (0..300).take_while(|number| {
        let open =
            wire::Open { id: *number as u64 + 1, name: name(*number).into_bytes(), ..wire::Open::default() };
        let open = wire::Open { snapshot_id: Vec::new(), open_mode: WriteMode::Append.flags(), ..open };
        let all = [
            wire::encode(Kind::Open(open)),
            wire::encode(Kind::Close(wire::Close { id: *number as u64 + 1, size: 0 })),
        ];
        proxy.peer.stream.write_all(&all.concat()).is_ok()
    });
    assert!(sent.count() > 200);
    assert_eq!(heard_error(&mut proxy).errno, rustix::io::Errno::NOSPC.raw_os_error() as u32);
    assert_eq!(cache.wait(), 1);
    assert!(
        cache.log().contains("n can't be taken in: the memory limit of 1.0 MiB (--memory-limit) is reached")
    );
    let mut cache = Daemon::cache(&["--memory-limit", "1M"]);
    let mut old = OldProxy::connect(&cache);
    for number in 0..300 {
        let header = Transfer { key: Key::stream(name(number).as_bytes()), mode: WriteMode::Append, size: 0 };
        if old.0.write_all(&encode_transfer(&header)).is_err() {
            break;
        }
    }
    assert_eq!(cache.wait(), 1);
    assert!(
        cache.log().contains("n can't be taken in: the memory limit of 1.0 MiB (--memory-limit) is reached")
    );
}

fn session(cache: &mut Daemon, number: u8, pages: &[u8]) -> FakeProxy {
    let mut proxy = FakeProxy::connect(cache);
    proxy.begin(number, false);
    proxy.stream_image("pages-1.img", pages);
    proxy.end();
    cache.wait_log_times("the dump is complete", number.into());
    proxy
}

fn restored(cache: &mut Daemon, pages: &[u8], times: usize) {
    let mut restore = Restore::connect(cache);
    assert_eq!(whole(&mut restore, "inventory.img"), b"the inventory");
    assert!(whole(&mut restore, "pages-1.img") == pages);
    drop(restore);
    cache.wait_log_times("taken for a success", times);
}

#[test]
fn a_restored_session_makes_room_for_the_next() {
    let mut cache = Daemon::cache(&["--keep", "--memory-limit", "48M"]);
    let (one, two) = (pattern(30 * MIB, 1), pattern(30 * MIB, 2));
    let first = session(&mut cache, 1, &one);
    restored(&mut cache, &one, 1);
    // As long as there is room, it is served.
    restored(&mut cache, &one, 2);
    drop(first);
    drop(session(&mut cache, 2, &two));
    cache.wait_log("memory is short: the last dump, which has been restored, is dropped: 3 images, 30.0 MiB");
    restored(&mut cache, &two, 3);
    assert!(memfds(&cache) <= 31 * MIB);
    assert_eq!(cache.terminate(), 0);
}

// What may be the only copy of a process makes no room.
#[test]
fn a_session_that_was_not_restored_makes_no_room() {
    let mut cache = Daemon::cache(&["--keep", "--memory-limit", "48M"]);
    let one = pattern(30 * MIB, 1);
    drop(session(&mut cache, 1, &one));
    let mut proxy = Daemon::proxy(cache.port, &["--keep"]);
    let mut dump = Dump::connect(&proxy);
    write_in_vain(&mut dump, "pages-1.img");
    proxy.wait_log("the dump failed");
    cache.wait_log("the dump failed");
    let said = refusal(&cache.log(), "pages-1.img");
    assert_eq!(refusal(&proxy.log(), "pages-1.img"), said);
    restored(&mut cache, &one, 1);
    // Now that it is restored, the same dump goes well.
    drop(dump);
    proxy.wait_log_times("relay protocol; its memory limit", 2);
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", &pattern(30 * MIB, 2));
    dump.end();
    cache.wait_log_times("the dump is complete", 2);
    restored(&mut cache, &pattern(30 * MIB, 2), 2);
}

#[test]
fn images_spill_into_a_file_without_a_name() {
    let dir = Dir::new();
    let spill = ["--memory-limit", "8M", "--spill-dir", dir.0.to_str().unwrap()];
    let mut cache = Daemon::cache(&[&spill[..], &["--keep"]].concat());
    cache.wait_log("the memory limit is 8.0 MiB (--memory-limit): images beyond it go to ");
    let mut proxy = Daemon::proxy(cache.port, &[&spill[..], &["--keep"]].concat());
    for round in 1..=2 {
        let mut dump = Dump::connect(&proxy);
        let pages = pattern(40 * MIB + 777, round);
        let mut streams = [dump.open("pages-1.img"), dump.open("pages-2.img")];
        for piece in pages.chunks(50_001) {
            streams.iter_mut().for_each(|pipe| pipe.write_all(piece).unwrap());
        }
        drop(streams);
        for small in 0..50 {
            dump.write(&format!("core-{small}.img"), &pattern(200 * small as usize, small));
        }
        dump.end();
        cache.wait_log_times("the dump is complete", round as usize);
        for daemon in [&cache, &proxy] {
            let used = memfds(daemon);
            assert!(used <= 8 * MIB, "{used}: {}", daemon.log());
        }
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0, "it has no name");
        let mut restore = Restore::connect(&cache);
        whole(&mut restore, "inventory.img");
        for name in ["pages-1.img", "pages-2.img"] {
            assert!(whole(&mut restore, name) == pages, "{name}");
        }
        for small in 0..50 {
            assert!(
                whole(&mut restore, &format!("core-{small}.img")) == pattern(200 * small as usize, small)
            );
        }
        drop(restore);
        cache.wait_log_times("taken for a success", round as usize);
        let shared = cache.memory("RssShmem:") / 1024;
        assert!(shared <= 8, "{shared} MiB");
        proxy.wait_log_times("confirmed by the cache", round as usize);
    }
    assert_eq!((proxy.terminate(), cache.terminate()), (0, 0));
}

/// What the file without a name in this directory takes on the disk, in bytes.
fn spilled(daemon: &Daemon, dir: &Path) -> u64 {
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap().flatten();
    let ours = files.map(|entry| entry.path()).find(|path| {
        fs::read_link(path)
            .is_ok_and(|link| link.starts_with(dir) && link.to_string_lossy().contains("deleted"))
    });
    fs::metadata(ours.expect("it has a spill file")).unwrap().blocks() * 512
}

// An image that is read while it arrives, or freed as it is read, is no other for lying in two places.
#[test]
fn a_spilled_image_is_followed_and_consumed() {
    let dir = Dir::new();
    let args = ["--memory-limit", "2M", "--consume", "--spill-dir", dir.0.to_str().unwrap()];
    let mut cache = Daemon::cache(&args);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    let id = proxy.open(&Key::stream(*b"pages-1.img"), WriteMode::Append);
    let pages = pattern(20 * MIB, 1);
    proxy.data(id, &pages[..8 * MIB]);
    let mut restore = Restore::connect(&cache);
    restore.ask("pages-1.img");
    assert_eq!(restore.answer(), Some(true));
    let mut pipe = restore.pipe();
    let mut bytes = vec![0; 7 * MIB];
    pipe.read_exact(&mut bytes).unwrap();
    assert!(bytes == pages[..7 * MIB]);
    proxy.data(id, &pages[8 * MIB..]);
    proxy.close(id, pages.len());
    proxy.end();
    cache.wait_log("the dump is complete");
    assert!(spilled(&cache, &dir.0) > 8 * MIB as u64);
    let mut rest = Vec::new();
    pipe.read_to_end(&mut rest).unwrap();
    assert!(rest == pages[7 * MIB..]);
    wait_until("it is freed", || memfds(&cache) < MIB && spilled(&cache, &dir.0) < 2 * MIB as u64);
    whole(&mut restore, "inventory.img");
    drop(restore);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}

#[test]
fn a_spill_directory_is_looked_at_at_the_start() {
    let dir = Dir::new();
    let path = dir.0.to_str().unwrap();
    for (spill, why) in
        [("/does/not/exist", "No such file"), ("/dev/null", "is not a directory"), ("/proc", "/proc")]
    {
        let mut command = Command::new(binary());
        command.args(["cache", "-D", path, "--port", "0", "--spill-dir", spill]);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(why), "{said}");
    }
}

// A disk that is full fails the session, in words; the daemon lives.
#[test]
fn a_full_spill_directory_fails_the_dump() {
    const NAME: &str = "a_full_spill_directory_fails_the_dump";
    let mount = "mount -t tmpfs -o size=4m,mode=700 none \"$0\" && exec \"$@\"";
    let probe = Dir::new();
    let mut unshare = Command::new("unshare");
    if !unshare.args(["-m", "sh", "-c", mount]).arg(&probe.0).arg("true").status().is_ok_and(|s| s.success())
    {
        return skip(NAME, "no file system can be mounted here (it takes root)");
    }
    let spill = Dir::new();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", mount]).arg(&spill.0).arg(binary());
    command.args(["cache", "--port", "0", "--keep", "--memory-limit", "2M", "--spill-dir"]).arg(&spill.0);
    let mut cache = Daemon::start(Dir::new(), command, &[]);
    cache.wait_log("is in memory itself: nothing is gained");
    let mut proxy = Daemon::proxy(cache.port, &["--keep"]);
    let mut dump = Dump::connect(&proxy);
    write_in_vain(&mut dump, "pages-1.img");
    proxy.wait_log("the dump failed");
    cache.wait_log("the dump failed");
    let said = refusal(&cache.log(), "pages-1.img");
    assert!(said.contains(spill.0.to_str().unwrap()) && said.contains("No space left"), "{said}");
    assert_eq!(refusal(&proxy.log(), "pages-1.img"), said);
    drop(dump);
    // What fits is taken.
    proxy.wait_log_times("relay protocol", 2);
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", &pattern(4 * MIB, 2));
    dump.end();
    cache.wait_log("the dump is complete");
    restored(&mut cache, &pattern(4 * MIB, 2), 1);
}

// Without a descriptor there is no memory file either. The daemon lives, and takes the next dump.
#[test]
fn a_cache_without_descriptors_refuses_in_words() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, false);
    proxy.stream_image("core-1.img", b"small");
    cache.wait_log("core-1.img: 5 bytes received");
    let plenty = prlimit(Some(cache.pid()), Resource::Nofile, limited(0)).unwrap();
    for (number, piece) in [(2, MIB), (3, 20_000)] {
        let id = proxy.open(&Key::stream(*b"pages-1.img"), WriteMode::Append);
        let _ = proxy.peer.stream.write_all(&wire::encode(Kind::Data(wire::Data::new(id, piece as u32))));
        let _ = proxy.peer.stream.write_all(&pattern(piece, 1));
        let error = heard_error(&mut proxy);
        assert_eq!(error.errno, rustix::io::Errno::NOSPC.raw_os_error() as u32);
        cache.wait_log_times("the dump failed", usize::from(number) - 1);
        let said = refusal(&cache.log(), "pages-1.img");
        assert!(
            said.contains("no memory can be had for it") && said.contains("Too many open files"),
            "{said}"
        );
        prlimit(Some(cache.pid()), Resource::Nofile, plenty).unwrap();
        proxy = FakeProxy::connect(&cache);
        proxy.begin(number, false);
        proxy.stream_image("core-1.img", b"small");
        cache.wait_log_times("core-1.img: 5 bytes received", number.into());
        prlimit(Some(cache.pid()), Resource::Nofile, limited(0)).unwrap();
    }
    prlimit(Some(cache.pid()), Resource::Nofile, plenty).unwrap();
    proxy.stream_image("pages-1.img", &pattern(MIB, 2));
    proxy.end();
    cache.wait_log("the dump is complete");
    restored(&mut cache, &pattern(MIB, 2), 1);
}

fn limited(descriptors: u64) -> Rlimit {
    Rlimit { current: Some(descriptors), ..getrlimit(Resource::Nofile) }
}

// --- The proxy

fn proxy_and_cache(args: &[&str]) -> (Daemon, FakeCache, Held) {
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, args);
    let held = cache.accept();
    proxy.wait_log("relay protocol");
    (proxy, cache, held)
}

// Everything is kept, so that waiting would be in vain.
#[test]
fn a_proxy_that_keeps_everything_fails_at_once() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = Daemon::proxy(cache.port, &["--memory-limit", "4M"]);
    proxy.wait_log("the memory limit is 4.0 MiB (--memory-limit): images beyond it are refused");
    proxy.wait_log("relay protocol");
    let mut dump = Dump::connect(&proxy);
    write_in_vain(&mut dump, "pages-1.img");
    assert_eq!((proxy.wait(), cache.wait()), (1, 1));
    let said = refusal(&proxy.log(), "pages-1.img");
    assert!(
        said.starts_with("pages-1.img can't grow past byte 4194304: the memory limit of 4.0 MiB"),
        "{said}"
    );
    assert!(said.contains("4.0 MiB are in use"), "{said}");
    // The cache is told, unless that would have come in the middle of a piece: then the link is reset.
    let log = cache.log();
    assert!(log.contains(&said) || log.contains("was lost in the middle of pages-1.img"), "{log}");
}

// The same in the seed protocol, in which everything is kept as well.
#[test]
fn a_proxy_whose_cache_is_old_fails_at_once() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &["--memory-limit", "4M", "--retain", "none"]);
    let link = listener.accept().unwrap().0;
    let mut dump = Dump::connect(&proxy);
    write_in_vain(&mut dump, "pages-1.img");
    assert_eq!(proxy.wait(), 1);
    assert!(refusal(&proxy.log(), "pages-1.img").contains("the memory limit of 4.0 MiB"));
    assert_eq!(old_cache(link).1, LinkEnd::Reset);
}

// An old cache gets whole images, however many places they lie in; a reader of the remote dialect reads them back.
#[test]
fn what_a_proxy_has_spilled_goes_to_an_old_cache() {
    let (listener, port) = old_listener();
    let dir = Dir::new();
    let args = ["--memory-limit", "1M", "--spill-dir", dir.0.to_str().unwrap()];
    let mut proxy = Daemon::seed_proxy(port, &args);
    let link = listener.accept().unwrap().0;
    let old = std::thread::spawn(move || old_cache(link));
    let socket = proxy.dir.join("img-proxy.sock");
    write_remote(&socket, &key("null", "parent"), WriteMode::Append, &id_list(&["/d"]));
    // Some are inline, some in files of their own, some in both places.
    let sizes = [3 * MIB, 900, 15_000, 17_000, 70_000, 2 * MIB + 1, 4096, 0, 1];
    let images: Vec<_> =
        (0..60).map(|n| (key("/d", &format!("{n}.img")), pattern(sizes[n % 9], n as u32))).collect();
    for (key, bytes) in &images {
        // In two transfers: the second appends.
        write_remote(&socket, key, WriteMode::Append, &bytes[..bytes.len() / 3]);
        write_remote(&socket, key, WriteMode::Append, &bytes[bytes.len() / 3..]);
    }
    assert!(memfds(&proxy) <= MIB && spilled(&proxy, &dir.0) > 30 * MIB as u64);
    for (key, bytes) in &images {
        assert!(read_remote(&socket, key).as_ref() == Ok(bytes), "{key}");
    }
    write_remote(&socket, &key("/d", "inventory.img"), WriteMode::Append, b"x");
    dump_finish(&socket, Style::Y2017);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    let (held, end) = old.join().unwrap();
    assert_eq!((held.len(), end), (62, LinkEnd::InOrder));
    for (key, bytes) in &images {
        assert!(held[key] == *bytes, "{key}");
    }
}

fn remote_dump(socket: PathBuf, images: u32, finish: bool) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for image in 0..images {
            let key = key("/d", &format!("pages-{image}.img"));
            write_remote(&socket, &key, WriteMode::Append, &pattern(MIB + 1000 * image as usize, image));
        }
        write_remote(&socket, &key("/d", "inventory.img"), WriteMode::Append, b"x");
        if finish {
            dump_finish(&socket, Style::Y2017);
        }
    })
}

// Remote dialect, --retain none: an image leaves when the cache has confirmed it, for which CRIU waits.
#[test]
fn a_proxy_lets_criu_wait_while_something_leaves() {
    let (mut proxy, _cache, mut held) = proxy_and_cache(&["--memory-limit", "4M", "--retain", "none"]);
    let socket = proxy.dir.join("img-proxy.sock");
    write_remote(&socket, &key("null", "parent"), WriteMode::Append, &id_list(&["/d"]));
    let criu = remote_dump(socket, 30, true);
    // The cache does nothing for now.
    proxy.wait_log("waits for memory");
    assert!(memfds(&proxy) <= 4 * MIB && !criu.is_finished());
    held.begin();
    let mut most = 0;
    held.until(|held| {
        most = most.max(memfds(&proxy));
        held.images.len() == 32
    });
    assert!(most <= 4 * MIB, "{most}");
    criu.join().unwrap();
    held.finished();
    held.all_stored();
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    for image in 0..30 {
        let key = key("/d", &format!("pages-{image}.img"));
        assert!(held.images[&key] == pattern(MIB + 1000 * image as usize, image), "{key}");
    }
}

// What is waited for does not come: the dump fails, and CRIU does not hang.
#[test]
fn a_proxy_that_waits_does_not_wait_for_ever() {
    let (mut proxy, _cache, _held) = proxy_and_cache(&["--memory-limit", "4M", "--retain", "none"]);
    let socket = proxy.dir.join("img-proxy.sock");
    let mut writers = Vec::new();
    for image in 0..6 {
        let mut writer =
            open_remote(&socket, &key("/d", &format!("pages-{image}.img")), Some(WriteMode::Append));
        if writer.write_all(&pattern(MIB, image)).is_err() {
            break;
        }
        writers.push(writer);
    }
    // None of them has ended, so that none can leave.
    assert_eq!(proxy.wait(), 1);
    let log = proxy.log();
    assert!(
        log.contains(".img of snapshot /d can't grow past byte ")
            && log.contains("the memory limit of 4.0 MiB"),
        "{log}"
    );
    // The link is lost while CRIU waits.
    let (mut proxy, _cache, held) = proxy_and_cache(&["--memory-limit", "4M", "--retain", "none"]);
    let criu = remote_dump_in_vain(proxy.dir.join("img-proxy.sock"));
    proxy.wait_log("waits for memory");
    held.peer.reset();
    assert_eq!(proxy.wait(), 1);
    criu.join().unwrap();
}

fn remote_dump_in_vain(socket: PathBuf) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for image in 0..30 {
            let key = key("/d", &format!("pages-{image}.img"));
            let Ok(mut client) = std::os::unix::net::UnixStream::connect(&socket) else { return };
            let request = criu_relay::wire::criu::encode_request(&key, Some(WriteMode::Append));
            let written = client.write_all(&request).and_then(|()| client.write_all(&pattern(MIB, image)));
            if written.is_err() {
                return;
            }
        }
        panic!("everything was taken");
    })
}

// From inventory.img on it may be the only copy, which is worth more than the limit.
#[test]
fn the_limit_yields_to_the_only_copy() {
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, &["--memory-limit", "1M"]);
    let mut held = cache.accept();
    proxy.wait_log("relay protocol");
    let mut dump = Dump::connect(&proxy);
    let mut pages = dump.open("pages-1.img");
    pages.write_all(&pattern(60_000, 1)).unwrap();
    dump.write("pstree.img", b"the tree");
    let mut inventory = dump.open("inventory.img");
    inventory.write_all(b"the inventory").unwrap();
    held.begin();
    held.until(|held| held.open.values().any(|(key, _)| key.name[..] == *b"inventory.img"));
    drop(dump);
    pages.write_all(&pattern(4 * MIB, 2)).unwrap();
    drop((pages, inventory));
    held.finished();
    held.all_stored();
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    assert_eq!(proxy.log().matches("is exceeded: this may be the only copy of the process").count(), 1);
    assert!(held.images[&Key::stream(*b"pages-1.img")][60_000..] == pattern(4 * MIB, 2));
}

// A cache that is too small for the only copy refuses it as often as it comes; it stays, and a larger one gets it.
#[test]
fn the_only_copy_that_a_cache_refuses_stays() {
    let small = Daemon::cache(&["--memory-limit", "4M"]);
    let (dir, port) = (Dir::new(), small.port);
    let mut proxy = Daemon::proxy(port, &["--keep"]);
    proxy.wait_log("relay protocol");
    // It stands still until everything is at the proxy.
    small.stop();
    let mut dump = Dump::connect(&proxy);
    let pages = pattern(16 * MIB, 1);
    let mut pipe = dump.open("pages-1.img");
    pipe.write_all(&pages).unwrap();
    drop(pipe);
    dump.end();
    proxy.wait_log("the dump is complete");
    small.go_on();
    proxy.wait_log("the cache says: the session has failed: this proxy was stopped: pages-1.img can't grow");
    drop(small);
    let mut large = Daemon::cache_at(dir, port, &["--memory-limit", "32M"]);
    proxy.wait_log("confirmed by the cache");
    restored(&mut large, &pages, 1);
}

// --- What is available

/// A memory cgroup of a test's own, removed at the end.
struct Group(PathBuf);

impl Group {
    /// Version 2 where it accounts for memory, else version 1. The error is why there is none.
    fn new(name: &str, limit: usize) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut why = "no cgroup file system that accounts for memory is mounted".to_string();
        for line in mounts.lines() {
            let fields: Vec<_> = line.split(' ').collect();
            let file = match (fields[2], fields[3].split(',').any(|option| option == "memory")) {
                ("cgroup2", _) => "memory.max",
                ("cgroup", true) => "memory.limit_in_bytes",
                _ => continue,
            };
            let dir = Path::new(fields[1]).join(format!("{name}-{}", std::process::id()));
            if let Err(error) = fs::create_dir(&dir) {
                why = format!("{}: {error}", dir.display());
                continue;
            }
            let group = Self(dir);
            match fs::write(group.0.join(file), limit.to_string()) {
                Ok(()) => return Ok(group),
                Err(error) => why = format!("{}: {error}", group.0.join(file).display()),
            }
        }
        Err(why)
    }

    /// A daemon in it.
    fn start(&self, args: &[&str]) -> Daemon {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(&self.0).arg(binary());
        command.args(args);
        Daemon::start(Dir::new(), command, &[])
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_cache_stays_within_its_cgroup() {
    let group = match Group::new("crt-memory", 100 * MIB) {
        Ok(group) => group,
        Err(why) => return skip("a_cache_stays_within_its_cgroup", &why),
    };
    let mut cache = group.start(&["cache", "--port", "0"]);
    cache.wait_log("the memory limit is 7");
    let log = cache.log();
    let line = log.lines().find(|line| line.contains("the memory limit is")).unwrap();
    assert!(line.contains("(80 % of the 9") && line.contains(group.0.to_str().unwrap()), "{line}");
    let mut proxy = Daemon::proxy(cache.port, &[]);
    proxy.wait_log("its memory limit is 7");
    let mut dump = Dump::connect(&proxy);
    write_in_vain(&mut dump, "pages-1.img");
    // It ends by itself, and is not killed for want of memory.
    assert_eq!((cache.wait(), proxy.wait()), (1, 1));
    let said = refusal(&cache.log(), "pages-1.img");
    assert!(said.contains("(--memory-limit) is reached, 7"), "{said}");
    assert_eq!(refusal(&proxy.log(), "pages-1.img"), said);
}

#[test]
fn a_cache_says_what_is_available() {
    let mut cache = Daemon::cache(&[]);
    cache.wait_log("(80 % of the ");
    let mut proxy = Daemon::proxy(cache.port, &[]);
    proxy.wait_log("relay protocol; its memory limit is ");
    assert!(!proxy.log().contains("the memory limit is"), "a proxy has none of its own");
}
