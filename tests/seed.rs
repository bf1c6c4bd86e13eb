//! The seed peer protocol: our daemons and the programs of 2017, in both directions, and what may connect.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;

use common::*;
use criu_relay::wire::criu::WriteMode;

#[test]
fn our_proxy_to_an_old_cache() {
    to_an_old_cache(true);
    to_an_old_cache(false);
}

/// `told`: what the cache speaks; if not it is found out, and empty images are left out then.
fn to_an_old_cache(told: bool) {
    let (listener, port) = old_listener();
    let cache = std::thread::spawn(move || old_cache(listener.accept().unwrap().0));
    let mut proxy = if told { Daemon::seed_proxy(port, &[]) } else { Daemon::proxy(port, &[]) };
    let socket = proxy.dir.join("img-proxy.sock");
    // Sizes about every boundary there is: the old cache reads each header with one read(2).
    let sizes = [0, 1, 4095, 4096, 4097, 16384, 16385, 65536, 262_144, 262_145, 3_000_000];
    for round in 0..30 {
        for (i, size) in sizes.iter().enumerate() {
            let image = key("/d", &format!("{}{i}-{round}", "long-name-".repeat(round * 4)));
            write_remote(&socket, &image, WriteMode::Truncate, &pattern(*size, i as u32));
        }
    }
    // Several arriving at once while one is being forwarded.
    let list = key("", "list");
    let mut slow = open_remote(&socket, &key("/d", "slow"), Some(WriteMode::Append));
    for piece in [&b"one, "[..], b"two, ", b"three"] {
        slow.write_all(piece).unwrap();
        write_remote(&socket, &list, WriteMode::Append, piece);
    }
    drop(slow);
    write_remote(&socket, &key("/d", "over"), WriteMode::Truncate, b"a long one");
    write_remote(&socket, &key("/d", "over"), WriteMode::Truncate, b"short");
    write_remote(&socket, &key("/d", "over"), WriteMode::Append, b"er");
    write_remote(&socket, &key("/d", "gone"), WriteMode::Append, b"something");
    if told {
        write_remote(&socket, &key("/d", "gone"), WriteMode::Truncate, b"");
    }
    dump_finish(&socket, Style::Y2017);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    let (images, end) = cache.join().unwrap();
    assert_eq!(end, LinkEnd::InOrder);
    let empty = if told { 0 } else { 1 };
    assert_eq!(images.len(), 30 * (sizes.len() - empty) + 4);
    assert_eq!(proxy.log().matches("takes no empty images").count(), empty);
    for round in 0..30 {
        for (i, size) in sizes.iter().enumerate().skip(empty) {
            let image = key("/d", &format!("{}{i}-{round}", "long-name-".repeat(round * 4)));
            assert!(images[&image] == pattern(*size, i as u32));
        }
    }
    assert_eq!(images[&list], b"one, two, three");
    assert_eq!(images[&key("/d", "slow")], b"one, two, three");
    assert_eq!(images[&key("/d", "over")], b"shorter");
    assert_eq!(images[&key("/d", "gone")], if told { &b""[..] } else { b"something" });
}

#[test]
fn an_old_proxy_to_our_cache() {
    let cache = Daemon::cache(&[]);
    let mut peer = OldProxy::connect(&cache);
    let image = |name: &str| key("/d", name);
    peer.send(&image("a"), b"one ");
    peer.send(&image("b"), &pattern(1_000_000, 2));
    peer.send(&image("empty"), b"");
    // More of the first: the size counts from its first byte.
    peer.header(&image("a"), WriteMode::Append, 7);
    peer.0.write_all(b"two").unwrap();
    peer.header(&image("b"), WriteMode::Truncate, 5);
    peer.0.write_all(b"short").unwrap();
    peer.header(&image("a"), WriteMode::Append, 0);
    peer.send(&image("last"), b"x");
    let socket = cache.dir.join("img-cache.sock");
    assert_eq!(read_remote(&socket, &image("last")), Ok(b"x".to_vec()));
    assert_eq!(read_remote(&socket, &image("a")), Ok(b"one two".to_vec()));
    assert_eq!(read_remote(&socket, &image("b")), Ok(b"short".to_vec()));
    assert_eq!(read_remote(&socket, &image("empty")), Ok(vec![]));
    // Complete without anything behind it, whatever its size.
    peer.send(&image("page"), &[7; 8192]);
    assert_eq!(read_remote(&socket, &image("page")), Ok(vec![7; 8192]));
    let late = open_remote(&socket, &image("never"), None);
    drop(peer);
    assert_eq!(finish_read(late), Err(2));
}

#[test]
fn an_old_proxy_may_wait_for_its_dump() {
    // It connects when it starts and says nothing until CRIU comes; a scan in between changes nothing.
    let mut cache = Daemon::cache(&[]);
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    let mut peer = OldProxy::connect(&cache);
    for junk in [&b""[..], b"GET / HTTP/1.0\r\n\r\n", &[0; 64], &[5, 0, 0, 0, 1, 2, 3, 4, 5], &[0xff; 9]] {
        let mut scan = TcpStream::connect(("127.0.0.1", cache.port)).unwrap();
        scan.write_all(junk).unwrap();
        if !junk.is_empty() {
            assert_closed(&mut scan);
        }
    }
    peer.send(&key("", "pages-1.img"), b"pages");
    cache.wait_log("a dump begins");
    // One peer at a time.
    let mut second = TcpStream::connect(("127.0.0.1", cache.port)).unwrap();
    assert_closed(&mut second);
    cache.wait_log("this cache has its peer");
    peer.end();
    assert_eq!(restore.answer(), Some(true), "the restore has gone on waiting");
}

#[test]
fn junk_after_a_valid_frame_fails_the_session() {
    let mut cache = Daemon::cache(&[]);
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    let mut peer = OldProxy::connect(&cache);
    peer.send(&key("", "core-1.img"), b"core");
    peer.0.write_all(&[0xff; 32]).unwrap();
    assert_eq!(restore.answer(), None);
    assert_eq!(cache.wait(), 1);
    assert!(cache.log().contains("announced a header of 4294967295 bytes"));
}

#[test]
fn parked_connections_are_few() {
    let mut cache = Daemon::cache(&[]);
    let connect = || TcpStream::connect(("127.0.0.1", cache.port)).unwrap();
    let parked: Vec<_> = (0..16).map(|_| connect()).collect();
    let mut one_too_many = connect();
    one_too_many.set_read_timeout(Some(DEADLINE)).unwrap();
    assert_closed(&mut one_too_many);
    cache.wait_log("16 connections wait already");
    drop(parked);
    cache.wait_log("16 connections wait already");
    wait_until("a place is free", || {
        let mut peer = OldProxy::connect(&cache);
        peer.header(&key("", "a.img"), WriteMode::Append, 0);
        let got = peer.0.set_read_timeout(Some(std::time::Duration::from_millis(100)));
        got.unwrap();
        // A refused one is closed, the peer's stays open.
        matches!(peer.0.read(&mut [0; 1]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    });
}

#[test]
fn who_is_not_allowed_is_refused() {
    let mut cache = Daemon::cache(&["--allow-peer", "10.0.0.0/8", "--allow-peer", "fd00::1"]);
    let mut link = TcpStream::connect(("127.0.0.1", cache.port)).unwrap();
    assert_closed(&mut link);
    cache.wait_log("is not among those that --allow-peer names");
    // A proxy that is turned away again and again gives up in time.
    let mut proxy = Daemon::proxy(cache.port, &["--connect-timeout", "2"]);
    assert_eq!(proxy.wait(), 1, "{}", proxy.log());
}

#[test]
fn images_over_4_gib() {
    // All in memory: 4 GiB and a little in the cache, written and read in blocks.
    let cache = Daemon::cache(&["-v1"]);
    let image = key("/d", "pages-1.img");
    let size = (4 << 30) + 12345_u64;
    let block = pattern(1 << 20, 9);
    let mut peer = OldProxy::connect(&cache);
    peer.header(&image, WriteMode::Append, size);
    let mut left = size;
    while left > 0 {
        let n = left.min(block.len() as u64) as usize;
        peer.0.write_all(&block[..n]).unwrap();
        left -= n as u64;
    }
    let mut client = open_remote(&cache.dir.join("img-cache.sock"), &image, None);
    assert_eq!(read_answer(&mut client).unwrap(), 0);
    let mut buffer = vec![0; block.len()];
    let mut left = size;
    while left > 0 {
        let n = left.min(block.len() as u64) as usize;
        client.read_exact(&mut buffer[..n]).unwrap();
        assert!(buffer[..n] == block[..n], "{left} bytes before the end");
        left -= n as u64;
    }
    assert_eq!(client.read(&mut buffer).unwrap(), 0);
}
