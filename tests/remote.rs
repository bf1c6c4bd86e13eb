//! The remote dialect (criu --remote, 2017 to 2020) at the real binary.

mod common;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread::JoinHandle;

use common::*;
use criu_relay::wire::Key;
use criu_relay::wire::criu::{self, WriteMode};

const ENOENT: u32 = 2;
const EIO: u32 = 5;

fn img_proxy(daemon: &Daemon) -> PathBuf {
    daemon.dir.join("img-proxy.sock")
}

fn img_cache(daemon: &Daemon) -> PathBuf {
    daemon.dir.join("img-cache.sock")
}

type Received = (HashMap<Key, Vec<u8>>, LinkEnd);

/// A proxy whose peer is an old cache, which ends with what it holds.
fn with_old_cache() -> (Daemon, JoinHandle<Received>) {
    let (listener, port) = old_listener();
    let cache = std::thread::spawn(move || old_cache(listener.accept().unwrap().0));
    let mut proxy = Daemon::seed_proxy(port, &[]);
    proxy.wait_log("connected to");
    (proxy, cache)
}

#[test]
fn write_append_overwrite_read_back() {
    let (mut proxy, cache) = with_old_cache();
    let socket = img_proxy(&proxy);
    let image = key("/dump", "pages-1.img");
    assert_eq!(read_remote(&socket, &image), Err(ENOENT));
    for len in [0, 1, 4096, 16 * 1024, 16 * 1024 + 1, 3 << 20] {
        let bytes = pattern(len, 1);
        write_remote(&socket, &image, WriteMode::Truncate, &bytes);
        assert_eq!(read_remote(&socket, &image), Ok(bytes.clone()), "{len} bytes");
        write_remote(&socket, &image, WriteMode::Append, b"more");
        assert_eq!(read_remote(&socket, &image), Ok([&bytes[..], b"more"].concat()));
    }
    write_remote(&socket, &key("/dump", "empty.img"), WriteMode::Append, b"");
    assert_eq!(read_remote(&socket, &key("/dump", "empty.img")), Ok(vec![]));
    let last = read_remote(&socket, &image).unwrap();
    dump_finish(&socket, Style::Y2019);
    assert_eq!(proxy.wait(), 0);
    let (images, end) = cache.join().unwrap();
    assert_eq!(end, LinkEnd::InOrder);
    assert_eq!(images[&image], last, "what the cache holds is what was read back here");
    assert_eq!(images[&key("/dump", "empty.img")], b"");
}

#[test]
fn both_finish_styles_through_both_daemons() {
    for style in [Style::Y2017, Style::Y2019] {
        let mut cache = Daemon::cache(&[]);
        let mut proxy = Daemon::proxy(cache.port, &[]);
        let list = key(if matches!(style, Style::Y2017) { "null" } else { "" }, "parent");
        let (dump, restore) = (img_proxy(&proxy), img_cache(&cache));
        let pages = pattern(5 << 20, 7);

        // A pre-dump and a dump. The restore's first reader waits already.
        let early = open_remote(&restore, &list, None);
        for id in ["/pre", "/final"] {
            write_remote(&dump, &list, WriteMode::Append, &id_list(&[id]));
            assert!(read_remote(&dump, &list).unwrap().ends_with(&id_list(&[id])));
            write_remote(&dump, &key(id, "pages-1.img"), WriteMode::Truncate, &pages);
            write_remote(&dump, &key(id, "inventory.img"), WriteMode::Truncate, id.as_bytes());
        }
        dump_finish(&dump, style);
        assert_eq!(proxy.wait(), 0, "{}", proxy.log());

        assert_eq!(finish_read(early), Ok(id_list(&["/pre", "/final"])));
        for id in ["/pre", "/final"] {
            assert_eq!(read_remote(&restore, &key(id, "inventory.img")), Ok(id.as_bytes().to_vec()));
            assert_eq!(read_remote(&restore, &key(id, "pages-1.img")), Ok(pages.clone()));
        }
        assert_eq!(read_remote(&restore, &key("/final", "tty.img")), Err(ENOENT));
        restore_finish(&restore, style);
        assert_eq!(cache.wait(), 0, "{}", cache.log());
    }
}

#[test]
fn all_readers_of_an_image_are_woken() {
    let cache = Daemon::cache(&[]);
    let socket = img_cache(&cache);
    let image = key("/d", "core-1.img");
    let readers: Vec<_> = (0..3).map(|_| open_remote(&socket, &image, None)).collect();
    let mut peer = OldProxy::connect(&cache);
    peer.send(&image, b"the core");
    // The link stays open: the image is complete, so they are answered.
    for reader in readers {
        assert_eq!(finish_read(reader), Ok(b"the core".to_vec()));
    }
}

#[test]
fn a_pipe_may_take_the_sockets_place() {
    for len in [0, 10, 1 << 20] {
        let mut cache = Daemon::cache(&[]);
        let mut proxy = Daemon::proxy(cache.port, &[]);
        let image = key("/d", "pages-1.img");
        let bytes = pattern(len, 3);

        // A write: the byte with the pipe behind the header, or glued to it.
        for (glued, name) in [(false, "pages-1.img"), (true, "pages-2.img")] {
            let mut header = criu::encode_request(&key("/d", name), Some(WriteMode::Truncate));
            let (reader, mut writer) = std::io::pipe().unwrap();
            let mut client = connect(&img_proxy(&proxy));
            if glued {
                header.push(0);
                send_with(&client, &header, &[reader.as_fd()]).unwrap();
            } else {
                client.write_all(&header).unwrap();
                send_with(&client, b"\0", &[reader.as_fd()]).unwrap();
            }
            drop((client, reader));
            writer.write_all(&bytes).unwrap();
            drop(writer);
            assert_eq!(read_remote(&img_proxy(&proxy), &key("/d", name)), Ok(bytes.clone()));
        }
        dump_finish(&img_proxy(&proxy), Style::Y2019);
        assert_eq!(proxy.wait(), 0);

        // A read: after the answer; what went to the socket by then is worth nothing.
        let mut client = open_remote(&img_cache(&cache), &image, None);
        assert_eq!(read_answer(&mut client).unwrap(), 0);
        cache.wait_log("the dump is complete");
        let (mut reader, writer) = std::io::pipe().unwrap();
        send_with(&client, b"\0", &[writer.as_fd()]).unwrap();
        drop((client, writer));
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert_eq!(got, bytes);
    }
}

#[test]
fn byte_by_byte() {
    let (proxy, _cache) = with_old_cache();
    let image = key("/d", "core-1.img");
    let mut bytes = criu::encode_request(&image, Some(WriteMode::Append));
    bytes.extend(b"abc");
    let mut client = connect(&img_proxy(&proxy));
    for byte in bytes.chunks(1) {
        client.write_all(byte).unwrap();
    }
    drop(client);
    let mut client = connect(&img_proxy(&proxy));
    for byte in criu::encode_request(&image, None).chunks(1) {
        client.write_all(byte).unwrap();
    }
    assert_eq!(finish_read(client), Ok(b"abc".to_vec()));
}

#[test]
fn an_end_in_every_state_hurts_nobody_else() {
    let (mut proxy, cache) = with_old_cache();
    let socket = img_proxy(&proxy);
    let header = criu::encode_request(&key("/d", "x.img"), None);
    for cut in 0..header.len() {
        connect(&socket).write_all(&header[..cut]).unwrap();
    }
    // A reader that goes away before its answer, after it, and in the middle of the image.
    write_remote(&socket, &key("/d", "big.img"), WriteMode::Append, &pattern(4 << 20, 1));
    for taken in [0, 10, 100_000] {
        let mut client = open_remote(&socket, &key("/d", "big.img"), None);
        let mut buffer = vec![0; taken];
        client.read_exact(&mut buffer).unwrap();
    }
    // One that only shuts its half still gets everything.
    let client = open_remote(&socket, &key("/d", "big.img"), None);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(finish_read(client).unwrap().len(), 4 << 20);
    dump_finish(&socket, Style::Y2017);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    assert_eq!(cache.join().unwrap().0.len(), 1);
}

#[test]
fn bad_input_ends_that_client_alone() {
    let (mut proxy, cache) = with_old_cache();
    let socket = img_proxy(&proxy);
    let mut bystander = open_remote(&socket, &key("/d", "good.img"), Some(WriteMode::Append));
    bystander.write_all(b"first, ").unwrap();

    let raw = |body: &[u8]| [&(body.len() as u32).to_ne_bytes(), body].concat();
    let entry = |name: &[u8], id: &[u8], mode: u8| {
        let mut body = vec![0x0a, name.len() as u8];
        body.extend(name);
        body.extend([0x12, id.len() as u8]);
        body.extend(id);
        body.extend([0x18, mode]);
        raw(&body)
    };
    for (bytes, why) in [
        (u32::MAX.to_ne_bytes().to_vec(), "announced a header of"),
        (0u32.to_ne_bytes().to_vec(), "announced a header of 0"),
        (raw(b"not protobuf"), "does not parse"),
        (raw(&[0x0a, 1, b'a']), "does not parse"),
        (entry(b"a", b"b", 2), "open mode 0o2"),
        (entry(b"a/b", b"c", 0), "holds a slash"),
        (entry(b"a\0b", b"c", 0), "holds a NUL"),
        (entry(b"", b"c", 0), "is empty"),
    ] {
        let mut client = connect(&socket);
        client.write_all(&bytes).unwrap();
        assert_closed(&mut client);
        proxy.wait_log(why);
    }

    // Descriptors: none of a kind that is wanted, or too many, or where none belongs.
    let header = criu::encode_request(&key("/d", "bad.img"), Some(WriteMode::Append));
    let glued = [&header[..], b"\0"].concat();
    let (reader, writer) = std::io::pipe().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    for (bytes, descriptors, why) in [
        (&glued, vec![null.as_fd()], "is no pipe"),
        (&glued, vec![writer.as_fd()], "wrong end of a pipe"),
        (&glued, vec![reader.as_fd(), reader.as_fd()], "more than one descriptor"),
        (&header, vec![reader.as_fd()], "where none belongs"),
    ] {
        let mut client = connect(&socket);
        send_with(&client, bytes, &descriptors).unwrap();
        assert_closed(&mut client);
        proxy.wait_log(why);
    }
    let mut reader_that_writes = open_remote(&socket, &key("/d", "none.img"), None);
    let _ = reader_that_writes.write_all(b"data");

    bystander.write_all(b"last").unwrap();
    drop(bystander);
    assert_eq!(read_remote(&socket, &key("/d", "good.img")), Ok(b"first, last".to_vec()));
    dump_finish(&socket, Style::Y2019);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    assert_eq!(cache.join().unwrap().0.len(), 1);
}

#[test]
fn no_finish_is_lost_however_soon_criu_closes() {
    const TIMES: usize = 2000;
    let mut cache = Daemon::cache(&["--keep"]);
    let header = criu::encode_request(&key("d", "x"), None);
    for i in 0..TIMES {
        let mut client = connect(&img_cache(&cache));
        client.write_all(&[2 + 2 + 2, 0, 0, 0, 0x0a, 0, 0x12, 0, 0x18, 0]).unwrap();
        // Sooner or later after the header, so that every moment is hit.
        for _ in 0..i % 300 {
            std::hint::black_box(&header);
        }
        drop(client);
    }
    cache.wait_log_times("a restore ended before there was a complete dump", TIMES);
}

#[test]
fn a_writer_at_the_cache_is_refused() {
    let mut cache = Daemon::cache(&[]);
    let mut client = open_remote(&img_cache(&cache), &key("/d", "a.img"), Some(WriteMode::Append));
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    cache.wait_log("images are written at img-proxy.sock");
}

#[test]
fn a_failed_dump_is_told_by_its_missing_inventory() {
    for style in [Style::Y2017, Style::Y2019] {
        let mut cache = Daemon::cache(&[]);
        let mut proxy = Daemon::proxy(cache.port, &[]);
        let list = key(if matches!(style, Style::Y2017) { "null" } else { "" }, "parent");
        let waiting = open_remote(&img_cache(&cache), &key("/final", "inventory.img"), None);
        write_remote(&img_proxy(&proxy), &list, WriteMode::Append, &id_list(&["/final"]));
        write_remote(&img_proxy(&proxy), &key("/final", "pages-1.img"), WriteMode::Append, b"half");
        cache.wait_log("pages-1.img of snapshot /final: 4 bytes received");
        dump_finish(&img_proxy(&proxy), style);
        assert_eq!(proxy.wait(), 1);
        assert!(proxy.log().contains("the dump /final ended without a complete inventory.img"));
        assert_eq!(finish_read(waiting), Err(EIO), "an error, not that it does not exist");
        assert_eq!(cache.wait(), 1);
    }
}

#[test]
fn a_lost_peer_is_an_error_for_whoever_waits() {
    for in_the_middle in [true, false] {
        let mut cache = Daemon::cache(&[]);
        let image = key("/d", "pages-1.img");
        let mut peer = OldProxy::connect(&cache);
        peer.send(&key("/d", "core-1.img"), b"whole");
        let waiting = open_remote(&img_cache(&cache), &image, None);
        if in_the_middle {
            // An orderly close, but in the middle of an image.
            peer.header(&image, WriteMode::Append, 1000);
            peer.0.write_all(&[1; 999]).unwrap();
            drop(peer);
        } else {
            cache.wait_log("core-1.img of snapshot /d: 5 bytes received");
            peer.reset();
        }
        assert_eq!(finish_read(waiting), Err(EIO));
        assert_eq!(cache.wait(), 1);
        if in_the_middle {
            assert!(cache.log().contains("in the middle of pages-1.img of snapshot /d, at its byte 999"));
        }
    }
}

#[test]
fn a_proxy_whose_peer_vanishes_fails_the_dump() {
    let (listener, port) = old_listener();
    let mut proxy = Daemon::seed_proxy(port, &[]);
    let (link, _) = listener.accept().unwrap();
    drop(listener);
    proxy.wait_log("connected to");
    let mut client = open_remote(&img_proxy(&proxy), &key("/d", "pages-1.img"), Some(WriteMode::Append));
    client.write_all(b"some").unwrap();
    proxy.wait_log("a dump begins");
    drop(link);
    assert_eq!(proxy.wait(), 1);
    assert!(proxy.log().contains("the link was lost"));
    assert!(client.write_all(&[0; 1 << 20]).is_err(), "CRIU sees that its image is not taken");
}

#[test]
fn images_directories_and_a_work_directory() {
    let (second, work) = (Dir::new(), Dir::new());
    let mut cache = Daemon::cache(&[]);
    let dirs = ["-D", second.0.to_str().unwrap(), "-W", work.0.to_str().unwrap()];
    let mut proxy = Daemon::proxy(cache.port, &dirs);
    let list = key("", "parent");
    // Old CRIU appends in its work directory and reads back in its images directory, at once.
    for i in 0..200 {
        write_remote(&work.join("img-proxy.sock"), &list, WriteMode::Append, &id_list(&["/d"]));
        let dir = if i % 2 == 0 { img_proxy(&proxy) } else { second.join("img-proxy.sock") };
        assert_eq!(read_remote(&dir, &list).unwrap().len(), (i + 1) * id_list(&["/d"]).len());
    }
    write_remote(&second.join("img-proxy.sock"), &key("/d", "inventory.img"), WriteMode::Append, b"x");
    dump_finish(&work.join("img-proxy.sock"), Style::Y2019);
    assert_eq!(proxy.wait(), 0, "{}", proxy.log());
    cache.wait_log("the dump is complete: 2 images");
    assert!(!work.join("img-proxy.sock").exists() && !second.join("img-proxy.sock").exists());
}
