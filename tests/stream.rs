//! The stream dialect (criu --stream) at the real binary, with the seed protocol between the daemons.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;

use common::*;
use criu_relay::wire::criu;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::Signal;

fn pair(args: &[&str]) -> (Daemon, Daemon) {
    let cache = Daemon::cache(args);
    let proxy = Daemon::proxy(cache.port, args);
    (proxy, cache)
}

#[test]
fn interleaved_pipes_and_a_restore_in_another_order() {
    let (mut proxy, mut cache) = pair(&[]);
    let images: Vec<_> = (0..8).map(|i| (format!("pages-{i}.img"), pattern(i * 300_000, i as u32))).collect();
    // The restore waits already.
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");

    let mut dump = Dump::connect(&proxy);
    let mut pipes: Vec<_> = images.iter().map(|(name, _)| dump.open(name)).collect();
    for at in (0..2_100_000).step_by(50_000) {
        for ((_, bytes), pipe) in images.iter().zip(&mut pipes) {
            pipe.write_all(&bytes[at.min(bytes.len())..(at + 50_000).min(bytes.len())]).unwrap();
        }
    }
    drop(pipes);
    dump.end();
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    assert!(proxy.log().contains("confirmed by the cache"));

    assert_eq!(restore.answer(), Some(true));
    let mut inventory = Vec::new();
    restore.pipe().read_to_end(&mut inventory).unwrap();
    assert_eq!(inventory, b"the inventory");
    assert_eq!(restore.read("tty.img"), None);
    for (name, bytes) in images.iter().rev() {
        assert!(restore.read(name).as_ref() == Some(bytes), "{name}");
    }
    // Again, several at a time, and one closed before it is read.
    let mut readers = Vec::new();
    for (name, bytes) in &images {
        restore.ask(name);
        assert_eq!(restore.answer(), Some(true));
        readers.push((restore.pipe(), bytes));
    }
    readers.remove(7);
    for (mut reader, bytes) in readers {
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert!(got == *bytes);
    }
    drop(restore);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}

#[test]
fn byte_by_byte() {
    let (mut proxy, mut cache) = pair(&[]);
    let mut dump = Dump::connect(&proxy);
    for byte in criu::encode_streamer_request(b"core-1.img").chunks(1) {
        dump.0.write_all(byte).unwrap();
    }
    let (reader, mut writer) = std::io::pipe().unwrap();
    send_with(&dump.0, b"\0", &[reader.as_fd()]).unwrap();
    drop(reader);
    for byte in b"bytes" {
        writer.write_all(&[*byte]).unwrap();
    }
    drop(writer);
    dump.end();
    assert_eq!(proxy.wait(), 0);
    let mut restore = Restore::connect(&cache);
    assert!(restore.read("inventory.img").is_some());
    for byte in criu::encode_streamer_request(b"core-1.img").chunks(1) {
        restore.0.write_all(byte).unwrap();
    }
    assert_eq!(restore.answer(), Some(true));
    let mut got = Vec::new();
    restore.pipe().read_to_end(&mut got).unwrap();
    assert_eq!(got, b"bytes");
    drop(restore);
    assert_eq!(cache.wait(), 0);
}

#[test]
fn an_aborted_dump_fails_the_waiting_restore() {
    let (mut proxy, mut cache) = pair(&[]);
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    let mut dump = Dump::connect(&proxy);
    dump.write("core-1.img", b"the core");
    cache.wait_log("core-1.img: 8 bytes received");
    drop(dump);
    assert_eq!(proxy.wait(), 1);
    assert!(proxy.log().contains("without a complete inventory.img"));
    assert_eq!(restore.answer(), None, "closed, and not told that the image does not exist");
    assert_eq!(cache.wait(), 1);
}

#[test]
fn an_aborted_dump_resets_the_link() {
    let (listener, port) = old_listener();
    let cache = std::thread::spawn(move || old_cache(listener.accept().unwrap().0));
    let mut proxy = Daemon::seed_proxy(port, &[]);
    let mut dump = Dump::connect(&proxy);
    dump.write("core-1.img", b"the core");
    // An inventory that is still open when the connection closes, and is finished: a good dump...
    let mut inventory = dump.open("inventory.img");
    dump.write("pstree.img", b"x");
    drop(dump);
    inventory.write_all(b"late").unwrap();
    drop(inventory);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    let (images, end) = cache.join().unwrap();
    assert_eq!((images[&key("", "inventory.img")].as_slice(), end), (&b"late"[..], LinkEnd::InOrder));

    // ... none at all, or one without a tree (criu pre-dump): not.
    for without in ["inventory.img", "pstree.img"] {
        let (listener, port) = old_listener();
        let cache = std::thread::spawn(move || old_cache(listener.accept().unwrap().0));
        let mut proxy = Daemon::seed_proxy(port, &[]);
        let mut dump = Dump::connect(&proxy);
        for name in ["core-1.img", "inventory.img", "pstree.img"] {
            if name != without {
                dump.write(name, b"x");
            }
        }
        drop(dump);
        assert_eq!(proxy.wait(), 1);
        assert!(proxy.log().contains(without));
        assert_eq!(cache.join().unwrap().1, LinkEnd::Reset);
    }
}

#[test]
fn a_second_dump_is_refused() {
    let (mut proxy, _cache) = pair(&[]);
    let mut first = Dump::connect(&proxy);
    let mut pages = first.open("pages-1.img");
    proxy.wait_log("a dump begins");
    let mut second = Dump::connect(&proxy);
    // It may be closed at the request, before the pipe.
    let _ = second.try_open("pages-1.img");
    assert_closed(&mut second.0);
    proxy.wait_log("a dump is in progress, one at a time");
    let mut remote =
        open_remote(&proxy.dir.join("img-proxy.sock"), &key("/d", "a.img"), Some(criu::WriteMode::Append));
    assert_closed(&mut remote);
    pages.write_all(b"pages").unwrap();
    drop(pages);
    first.end();
    assert_eq!(proxy.wait(), 0, "the first is not disturbed");
}

#[test]
fn a_criu_that_fails_at_start_up_is_no_session() {
    let (mut proxy, mut cache) = pair(&[]);
    drop(Dump::connect(&proxy));
    let mut half = Dump::connect(&proxy);
    half.0.write_all(&[9]).unwrap();
    drop(half);
    drop(Restore::connect(&cache));
    proxy.wait_log("ended in the middle of a request");
    Dump::connect(&proxy).end();
    assert_eq!(proxy.wait(), 0);
    let mut restore = Restore::connect(&cache);
    assert!(restore.read("inventory.img").is_some());
    drop(restore);
    assert_eq!(cache.wait(), 0);
}

#[test]
fn a_restore_that_fails_leaves_everything_for_the_next() {
    let (mut proxy, mut cache) = pair(&[]);
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", b"one");
    dump.write("pages-2.img", b"two");
    dump.end();
    assert_eq!(proxy.wait(), 0);
    for asked in [&["core-1.img"][..], &["inventory.img"], &["inventory.img", "pages-2.img"]] {
        let mut restore = Restore::connect(&cache);
        for name in asked {
            restore.read(name);
        }
        drop(restore);
        cache.wait_log("start criu restore again");
        assert!(cache.is_running());
    }
    // It does not leave what may be the only copy at the first signal.
    cache.signal(Signal::TERM);
    cache.wait_log("ask once more to drop it");
    let mut restore = Restore::connect(&cache);
    for name in ["inventory.img", "pages-1.img", "pages-2.img"] {
        assert!(restore.read(name).is_some());
    }
    drop(restore);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}

#[test]
fn a_second_signal_drops_what_was_not_restored() {
    let (mut proxy, mut cache) = pair(&[]);
    Dump::connect(&proxy).end();
    assert_eq!(proxy.wait(), 0);
    cache.wait_log("the dump is complete");
    cache.signal(Signal::TERM);
    cache.wait_log("ask once more");
    assert_eq!(cache.terminate(), 1);
}

#[test]
fn the_last_session_is_kept_until_the_next_is_complete() {
    let (mut proxy, mut cache) = pair(&["--keep"]);
    let generation = |dump: &mut Dump, n: &str| dump.write("pages-1.img", n.as_bytes());
    for (times, n) in [(1, "one"), (2, "two")] {
        let mut dump = Dump::connect(&proxy);
        generation(&mut dump, n);
        dump.end();
        proxy.wait_log_times("confirmed by the cache", times);
        cache.wait_log_times("the dump is complete", times);
        for _ in 0..2 {
            let mut restore = Restore::connect(&cache);
            assert!(restore.read("inventory.img").is_some());
            assert_eq!(restore.read("pages-1.img"), Some(n.as_bytes().to_vec()));
        }
    }
    // A restore goes on with the session that it began with, and a dump that fails changes nothing.
    let mut restore = Restore::connect(&cache);
    assert!(restore.read("inventory.img").is_some());
    let mut dump = Dump::connect(&proxy);
    generation(&mut dump, "three");
    drop(dump);
    proxy.wait_log("without a complete inventory.img");
    let mut dump = Dump::connect(&proxy);
    generation(&mut dump, "four");
    dump.end();
    cache.wait_log_times("the dump is complete", 3);
    let mut other = Restore::connect(&cache);
    assert!(other.read("inventory.img").is_some());
    assert_eq!(other.read("pages-1.img"), Some(b"four".to_vec()));
    drop(other);
    proxy.wait_log_times("confirmed by the cache", 3);
    assert_eq!(restore.read("pages-1.img"), Some(b"two".to_vec()));
    drop(restore);
    assert_eq!(proxy.terminate(), 0, "{}", proxy.log());
    assert_eq!(cache.terminate(), 0, "{}", cache.log());
}

#[test]
fn nothing_is_drained_before_there_is_a_link() {
    let (listener, port) = old_listener();
    drop(listener);
    let mut proxy = Daemon::seed_proxy(port, &[]);
    let mut dump = Dump::connect(&proxy);
    let mut pages = dump.open("pages-1.img");
    proxy.wait_log("a dump begins");
    let flags = fcntl_getfl(&pages).unwrap();
    fcntl_setfl(&pages, flags | OFlags::NONBLOCK).unwrap();
    let bytes = pattern(8 << 20, 5);
    let mut written = 0;
    loop {
        match pages.write(&bytes[written..]) {
            Ok(n) => written += n,
            Err(error) => break assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    assert!(written <= 1 << 16, "the pipe is full at {written} bytes");
    fcntl_setfl(&pages, flags).unwrap();
    // The cache comes late.
    let listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let cache = std::thread::spawn(move || old_cache(listener.accept().unwrap().0));
    pages.write_all(&bytes[written..]).unwrap();
    drop(pages);
    dump.end();
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    assert!(cache.join().unwrap().0[&key("", "pages-1.img")] == bytes);
}

#[test]
fn without_a_cache_the_dump_fails_in_time() {
    let (listener, port) = old_listener();
    drop(listener);
    let mut proxy = Daemon::seed_proxy(port, &["--connect-timeout", "1"]);
    let mut dump = Dump::connect(&proxy);
    let mut pages = dump.open("pages-1.img");
    // More than the pipe takes: blocks until the proxy closes it.
    assert_eq!(pages.write_all(&pattern(8 << 20, 1)).unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!(proxy.wait(), 1);
    assert!(proxy.log().contains("no link to 127.0.0.1"));
    assert_closed(&mut dump.0);
}

#[test]
fn the_only_copy_stays_until_it_is_delivered() {
    let (listener, port) = old_listener();
    drop(listener);
    let mut proxy = Daemon::seed_proxy(port, &["--connect-timeout", "1"]);
    // Small: it fits the pipes, so that CRIU ends it, and kills the process, with no cache anywhere.
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", b"all there is");
    dump.end();
    proxy.wait_log("this may be the only copy");
    proxy.signal(Signal::TERM);
    proxy.wait_log("ask once more to drop them");
    // A link that breaks in the middle is not the end of it either.
    let listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let (mut link, _) = listener.accept().unwrap();
    link.read_exact(&mut [0; 5]).unwrap();
    rustix::net::sockopt::set_socket_linger(&link, Some(std::time::Duration::ZERO)).unwrap();
    drop(link);
    let (images, end) = old_cache(listener.accept().unwrap().0);
    assert_eq!(end, LinkEnd::InOrder);
    assert_eq!(images[&key("", "pages-1.img")], b"all there is");
    assert_eq!(images.len(), 3);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
}

#[test]
fn a_peer_that_shuts_its_half_has_not_read_everything() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &[]);
    let (link, _) = listener.accept().unwrap();
    proxy.wait_log("connected to");
    let mut dump = Dump::connect(&proxy);
    // More than the buffers between us: the rest stays with the proxy.
    let pages = pattern(16 << 20, 4);
    dump.write("pages-1.img", &pages);
    dump.end();
    proxy.wait_log("the dump is complete");
    link.shutdown(std::net::Shutdown::Write).unwrap();
    proxy.wait_log("the link to the cache is lost");
    drop(link);
    let (images, end) = old_cache(listener.accept().unwrap().0);
    assert!(end == LinkEnd::InOrder && images[&key("", "pages-1.img")] == pages);
    assert_eq!(proxy.wait(), 0);

    // The same when the proxy has shut its own half already: nothing but the acknowledgement counts.
    let mut proxy = Daemon::seed_proxy(port, &[]);
    let (link, _) = listener.accept().unwrap();
    proxy.wait_log("connected to");
    let mut dump = Dump::connect(&proxy);
    let pages = pattern(200_000, 4);
    rustix::net::sockopt::set_socket_recv_buffer_size(&link, 4096).unwrap();
    dump.write("pages-1.img", &pages);
    dump.end();
    proxy.wait_log("inventory.img: 13 bytes sent");
    link.shutdown(std::net::Shutdown::Write).unwrap();
    drop(link);
    proxy.wait_log("the link to the cache is lost");
    let (images, _) = old_cache(listener.accept().unwrap().0);
    assert!(images[&key("", "pages-1.img")] == pages);
    assert_eq!(proxy.wait(), 0);
}

#[test]
fn a_dump_cut_off_in_order_is_no_dump() {
    // As an ssh tunnel ends one that was reset.
    let mut cache = Daemon::cache(&[]);
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    let mut peer = OldProxy::connect(&cache);
    peer.send(&key("", "core-1.img"), b"core");
    drop(peer);
    assert_eq!(restore.answer(), None);
    assert_eq!(cache.wait(), 1);
    assert!(cache.log().contains("without a complete inventory.img"));
}

#[test]
fn a_daemon_asked_to_go_leaves_when_its_work_is_done() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = Daemon::proxy(cache.port, &["--keep"]);
    cache.signal(Signal::STOP);
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", &pattern(16 << 20, 1));
    dump.end();
    proxy.wait_log("the dump is complete");
    proxy.signal(Signal::TERM);
    proxy.wait_log("ask once more");
    cache.signal(Signal::CONT);
    assert_eq!(proxy.wait(), 0);
    cache.wait_log("the dump is complete");
    cache.signal(Signal::TERM);
    cache.wait_log("ask once more");
    let mut restore = Restore::connect(&cache);
    assert!(restore.read("inventory.img").is_some() && restore.read("pages-1.img").is_some());
    drop(restore);
    assert_eq!(cache.wait(), 0);
}

#[test]
fn the_only_copy_is_dropped_at_the_second_signal() {
    let (listener, port) = old_listener();
    drop(listener);
    let mut proxy = Daemon::seed_proxy(port, &[]);
    Dump::connect(&proxy).end();
    proxy.wait_log("this may be the only copy");
    proxy.signal(Signal::TERM);
    proxy.wait_log("ask once more");
    assert_eq!(proxy.terminate(), 1);
    assert!(proxy.log().contains("2 images, 21 bytes, are dropped"), "{}", proxy.log());
}

#[test]
fn bad_input_ends_that_client_alone() {
    let (mut proxy, mut cache) = pair(&[]);
    let (reader, writer) = std::io::pipe().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let request = [&criu::encode_streamer_request(b"a.img")[..], b"\0"].concat();
    for (descriptors, why) in [
        (vec![null.as_fd()], "is no pipe"),
        (vec![writer.as_fd()], "wrong end"),
        (vec![reader.as_fd(), reader.as_fd()], "more than one descriptor"),
    ] {
        let mut client = Dump::connect(&proxy);
        send_with(&client.0, &request, &descriptors).unwrap();
        assert_closed(&mut client.0);
        proxy.wait_log(why);
    }
    for (bytes, why) in [
        (request.clone(), "without a pipe"),
        (criu::encode_streamer_request(b"../a"), "holds a slash"),
        (vec![0xff; 4], "announced a header"),
    ] {
        let mut client = Dump::connect(&proxy);
        client.0.write_all(&bytes).unwrap();
        assert_closed(&mut client.0);
        proxy.wait_log(why);
        let mut client = Restore::connect(&cache);
        client.0.write_all(&bytes).unwrap();
        assert_closed(&mut client.0);
    }
    let mut dump = Dump::connect(&proxy);
    dump.write("pages-1.img", b"pages");
    dump.end();
    assert_eq!(proxy.wait(), 0);
    // A restore that sends rubbish in place of its pipe fails alone.
    let mut bad = Restore::connect(&cache);
    bad.ask("inventory.img");
    assert_eq!(bad.answer(), Some(true));
    send_with(&bad.0, b"\0", &[reader.as_fd()]).unwrap();
    assert_eq!(bad.answer(), None);
    let mut restore = Restore::connect(&cache);
    assert!(restore.read("inventory.img").is_some() && restore.read("pages-1.img").is_some());
    drop(restore);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}
