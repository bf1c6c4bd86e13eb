//! The order of operations within one name, a thousand times, without a pause anywhere.

mod common;

use std::io::{Read, Write};
use std::path::PathBuf;

use common::*;
use criu_relay::wire::criu::WriteMode;

const TIMES: usize = 1000;

// The proxy has a link, so that it takes what writers send; nobody reads there until the end.
fn proxy() -> (Daemon, PathBuf, std::net::TcpListener) {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &["-v1"]);
    proxy.wait_log("connected to");
    let socket = proxy.dir.join("img-proxy.sock");
    (proxy, socket, listener)
}

#[test]
fn append_close_and_read_back_at_once() {
    let (_proxy, socket, _listener) = proxy();
    let list = key("null", "parent");
    for i in 1..=TIMES {
        write_remote(&socket, &list, WriteMode::Append, b"0123456789");
        assert_eq!(read_remote(&socket, &list).map(|bytes| bytes.len()), Ok(10 * i));
    }
}

#[test]
fn two_appends_back_to_back() {
    let (_proxy, socket, _listener) = proxy();
    for i in 0..TIMES {
        let image = key("/d", &format!("image-{i}"));
        // The second may send and close before the first has sent a byte of its image.
        let mut first = open_remote(&socket, &image, Some(WriteMode::Append));
        write_remote(&socket, &image, WriteMode::Append, b"second");
        let reader = open_remote(&socket, &image, None);
        first.write_all(b"first ").unwrap();
        drop(first);
        assert_eq!(finish_read(reader), Ok(b"first second".to_vec()));
    }
}

#[test]
fn an_overwrite_does_not_disturb_a_slow_reader() {
    let (_proxy, socket, _listener) = proxy();
    let image = key("/d", "pages-1.img");
    let mut old = pattern(2 << 20, 0);
    write_remote(&socket, &image, WriteMode::Truncate, &old);
    for i in 1..=TIMES as u32 {
        // Larger than a socket's buffer: most of it is still to be sent when the image is replaced.
        let mut slow = open_remote(&socket, &image, None);
        assert_eq!(read_answer(&mut slow).unwrap(), 0);
        // Short ones, so that a thousand rounds take seconds; every tenth is as long as the first.
        let new = pattern(if i % 10 == 0 { 2 << 20 } else { 1000 + i as usize }, i);
        write_remote(&socket, &image, WriteMode::Truncate, &new);
        assert_eq!(read_remote(&socket, &image), Ok(new.clone()));
        let mut bytes = Vec::new();
        slow.read_to_end(&mut bytes).unwrap();
        assert!(bytes == old, "round {i}: the reader got something else than it began with");
        old = new;
    }
}
