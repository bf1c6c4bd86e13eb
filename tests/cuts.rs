//! Scripted sessions over a link that is cut once, anywhere.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::script::{Bench, Script, pre_stream, succeeds};
use common::*;

fn carry(mut from: TcpStream, mut to: TcpStream, left: &AtomicU64) {
    let mut block = vec![0; 64 * 1024];
    while let Ok(n) = from.read(&mut block) {
        if n == 0 {
            break;
        }
        let may = left.load(Ordering::SeqCst);
        let n2 = (n as u64).min(may) as usize;
        if to.write_all(&block[..n2]).is_err() {
            break;
        }
        left.fetch_sub(n2 as u64, Ordering::SeqCst);
        if n2 < n {
            left.store(u64::MAX / 2, Ordering::SeqCst);
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn middle(to: u16, up: u64, down: u64) -> u16 {
    let (listener, port) = old_listener();
    let (up, down) = (Arc::new(AtomicU64::new(up)), Arc::new(AtomicU64::new(down)));
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let near = near.unwrap();
            let Ok(far) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            for end in [&near, &far] {
                end.set_nodelay(true).unwrap();
            }
            let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let (up, down) = (up.clone(), down.clone());
            std::thread::spawn(move || carry(near, far, &up));
            std::thread::spawn(move || carry(far2, near2, &down));
        }
    });
    port
}

fn run(up: u64, down: u64, keep: bool, scripted: bool) -> String {
    let args: &[&str] = if keep { &["--keep"] } else { &[] };
    let mut cache = Daemon::cache(args);
    let port = middle(cache.port, up, down);
    let mut all = vec!["--connect-timeout", "3", "--confirm-timeout", "5"];
    all.extend(args);
    let proxy = Daemon::proxy(port, &all);
    if scripted && Script::start("pre-stream", &proxy, None).end().0 != 0 {
        return "refused".into();
    }
    let mut bench = Bench::connected(proxy);
    if scripted {
        pre_stream(&cache).agrees();
    }
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    let dump = bench.dump.as_mut().unwrap();
    for (name, bytes) in [
        ("pages-1.img", &pattern(300_000, 1)[..]),
        ("pstree.img", b"the tree"),
        ("inventory.img", b"the inventory"),
    ] {
        let pipe = dump.try_open(name);
        if pipe.and_then(|mut pipe| pipe.write_all(bytes)).is_err() {
            break;
        }
    }
    let killed = if scripted { bench.post_dump().end().0 == 0 } else { false };
    if killed {
        bench.source.kill();
    }
    bench.disconnect();
    let state = |bench: &Bench, cache: &Daemon| format!("\n{}\n{}", bench.proxy.log(), cache.log());
    let answer = if keep && !killed && scripted {
        // With --keep it may wait for the next dump.
        use rustix::net::{RecvFlags, recv};
        restore.0.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        let seen = recv(&restore.0, &mut [0; 1], RecvFlags::PEEK);
        match seen {
            Ok((_, 1)) => restore.answer(),
            _ => None,
        }
    } else {
        if scripted && !killed && bench.proxy.wait() == 1 && !cache.log().contains("a dump begins") {
            return "no session".into();
        }
        restore.0.set_read_timeout(Some(std::time::Duration::from_secs(6))).unwrap();
        let mut one = [0; 1];
        let seen = rustix::net::recv(&restore.0, &mut one, rustix::net::RecvFlags::PEEK);
        assert!(
            !matches!(seen, Err(rustix::io::Errno::AGAIN)),
            "WAITS {up} {down} {killed} {}",
            state(&bench, &cache)
        );
        restore.answer()
    };
    if scripted {
        assert_eq!(answer == Some(true), killed, "{up} {down} {keep}{}", state(&bench, &cache));
    }
    if answer == Some(true) {
        restore.pipe().read_to_end(&mut Vec::new()).unwrap();
        assert!(restore.read("pages-1.img").unwrap() == pattern(300_000, 1));
        if !keep {
            // Not before the proxy is through: see tests/review2.rs.
            let want = 0;
            assert_eq!(bench.proxy.wait(), want, "{up} {down}{}", state(&bench, &cache));
        }
        if scripted {
            succeeds(&cache);
        }
        drop(restore);
        if !keep {
            assert_eq!(cache.wait(), 0, "{up} {down}{}", state(&bench, &cache));
        }
        return "moved".into();
    }
    if !keep {
        assert_eq!(cache.wait(), 1, "{up} {down}{}", state(&bench, &cache));
        if !scripted {
            return "kept".into();
        }
        assert_eq!(bench.proxy.wait(), 1, "{up} {down}{}", state(&bench, &cache));
        return "failed".into();
    }
    drop(restore);
    // The next one works.
    let Bench { proxy, source, .. } = bench;
    drop(source);
    wait_until("granted", || Script::start("pre-stream", &proxy, None).end().0 == 0);
    let mut bench = Bench::connected(proxy);
    bench.images();
    let (status, why) = bench.post_dump().end();
    assert_eq!(status, 0, "{up} {down} {why}{}", state(&bench, &cache));
    bench.source.kill();
    bench.disconnect();
    bench.proxy.wait_log("confirmed and released");
    "failed, then moved".into()
}

fn all(keep: bool, scripted: bool) {
    const NEVER: u64 = u64::MAX / 2;
    let mut points: Vec<(u64, u64)> = (0..260).step_by(3).map(|down| (NEVER, down)).collect();
    points.extend((0..400).step_by(23).map(|up| (up, NEVER)));
    points.extend([150_000, 299_000].map(|up| (up, NEVER)));
    points.extend((300_000..300_500).step_by(11).map(|up| (up, NEVER)));
    let seen: Mutex<std::collections::BTreeMap<String, Vec<(u64, u64)>>> = Mutex::default();
    let next = Mutex::new(points.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let Some((up, down)) = next.lock().unwrap().next() else { break };
                    let outcome = run(up, down, keep, scripted);
                    seen.lock()
                        .unwrap()
                        .entry(outcome)
                        .or_default()
                        .push((up.min(999_999), down.min(999_999)));
                }
            });
        }
    });
    for (outcome, points) in seen.into_inner().unwrap() {
        println!("{keep} {scripted} {outcome}: {points:?}");
    }
}

#[test]
fn once() {
    all(false, true);
}
#[test]
fn keeping() {
    all(true, true);
}
