//! Many scripted sessions over one pair that keeps: what each of them needed is given back, whatever became of it.

mod common;

use common::script::{Bench, pre_stream, succeeds};
use common::*;

const SESSIONS: usize = 200;
/// Sessions after which everything that grows once has grown.
const WARM: usize = 20;

#[test]
fn many_sessions_leave_nothing_behind() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = Daemon::proxy(cache.port, &["--keep"]);
    let mut warm = None;
    let mut restored = 0;
    let (mut rolled_back, mut failures) = (0, 0);
    let what = |cache: &Daemon, proxy: &Daemon| {
        [cache, proxy].map(|daemon| (daemon.descriptors(), daemon.memory("VmRSS:")))
    };
    for session in 0..SESSIONS {
        if session == WARM {
            warm = Some(what(&cache, &proxy));
        }
        let mut bench = Bench::with(proxy);
        match session % 4 {
            // Released and restored.
            0 | 1 => {
                bench.images();
                bench.post_dump().agrees();
                bench.source.kill();
                bench.disconnect();
                restored += 1;
                cache.wait_log_times("released by its source", restored);
                pre_stream(&cache).agrees();
                let mut restore = Restore::connect(&cache);
                for name in ["inventory.img", "pages-1.img", "pstree.img"] {
                    assert!(restore.read(name).is_some());
                }
                succeeds(&cache);
                bench.proxy.wait_log_times("confirmed and released", restored);
            }
            // Rolled back.
            2 => {
                bench.images();
                bench.post_dump().agrees();
                bench.disconnect();
                rolled_back += 1;
                cache.wait_log_times("rolled back: the source runs on", rolled_back);
                bench.proxy.wait_log_times("the cache has rolled back", rolled_back);
                assert!(bench.source.lives());
            }
            // Half-way.
            _ => {
                let dump = bench.dump.as_mut().unwrap();
                dump.write("pages-1.img", &pattern(300_000, 1));
                let pipe = dump.open("pages-2.img");
                bench.disconnect();
                drop(pipe);
                failures += 1;
                cache.wait_log_times("the dump failed: the peer", failures);
                assert!(bench.source.lives());
            }
        }
        proxy = bench.proxy;
    }
    let (before, after) = (warm.unwrap(), what(&cache, &proxy));
    println!("{before:?} {after:?}");
    for (before, after) in before.into_iter().zip(after) {
        assert!(after.0 <= before.0 + 4, "descriptors: {before:?} {after:?}");
        assert!(after.1 <= before.1 + 1024, "KiB: {before:?} {after:?}");
    }
    assert_eq!((proxy.terminate(), cache.terminate()), (1, 1), "{}\n{}", proxy.log(), cache.log());
}
