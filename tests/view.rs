//! `--view DIR`: the images of the cache as a directory. Both daemons and the real action script, with CRIUs that the
//! tests play: one that restores from a directory only reads files, and its script says where it is.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use common::relay::FakeProxy;
use common::script::{Bench, FakeCriu, Script, Source, pre_stream};
use common::view::{Place, Watch};
use common::*;
use criu_relay::wire::Key;
use criu_relay::wire::criu::WriteMode;
use criu_relay::wire::relay::{Kind, Prepare};

const RESTORED: [&str; 2] = ["--commit", "restored"];

/// CRIU as a process of its own, when the environment says so.
#[test]
fn fake_criu() {
    common::script::fake_criu();
}

fn cache(place: &Place, args: &[&str]) -> Daemon {
    Daemon::cache(&[&["--view", place.arg()], args].concat())
}

/// `criu restore -D DIR`, which has read all images and made its copy of them.
fn restored(dir: &Path, copy: &Source) -> FakeCriu {
    let mut criu = FakeCriu::start_in(dir, copy);
    for line in ["pre-restore", "read", "post-restore"] {
        criu.does(line);
    }
    criu
}

/// The same to its end: the copy runs, as far as CRIU is concerned.
fn restores(dir: &Path, copy: &Source) {
    restored(dir, copy).does("pre-resume");
}

/// A whole scripted dump, confirmed and released.
fn dumped(cache: &mut Daemon, port: u16, args: &[&str]) -> Bench {
    let mut bench = Bench::new(port, args);
    bench.images();
    bench.post_dump().agrees();
    bench.source.kill();
    bench.disconnect();
    cache.wait_log("released by its source");
    bench
}

fn succeeded(cache: &mut Daemon, bench: &mut Bench, place: &Place) {
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    assert!(!place.dir.exists());
    assert_eq!((cache.records(), bench.proxy.records()), (vec![], vec![]));
}

/// The source runs, and nothing is left of its dump.
fn rolled_back(cache: &mut Daemon, bench: &mut Bench, place: &Place) {
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
    assert_eq!(cache.wait(), 1, "{}", cache.log());
    assert!(bench.source.runs() && !place.dir.exists());
    assert_eq!((cache.records(), bench.proxy.records()), (vec![], vec![]));
}

// --- Commit stored.

#[test]
fn images_appear_as_they_come_and_the_inventory_when_the_source_is_dead() {
    let place = Place::new();
    let mut cache = cache(&place, &[]);
    let watch = Watch::new(&place.dir);
    let mut waiter = place.wait(&mut cache);
    let mut bench = Bench::new(cache.port, &[]);
    let dump = bench.dump.as_mut().unwrap();
    dump.write("small.img", b"small");
    place.appears("small.img");
    assert_eq!(place.read("small.img"), b"small");
    // One that is not complete is not there.
    let mut pages = dump.open("pages-1.img");
    pages.write_all(&pattern(300_000, 1)[..200_000]).unwrap();
    dump.write("empty.img", b"");
    place.appears("empty.img");
    assert_eq!(place.names(), ["empty.img", "small.img"]);
    pages.write_all(&pattern(300_000, 1)[200_000..]).unwrap();
    drop(pages);
    place.appears("pages-1.img");
    dump.write("inventory.img", b"the inventory");
    dump.write("pstree.img", b"the tree");
    place.appears("pstree.img");
    let script = bench.post_dump();
    cache.wait_log("the dump is stored");
    script.agrees();
    assert!(waiter.waits() && !place.has("inventory.img"));
    bench.source.kill();
    bench.disconnect();
    waiter.finds(&place.dir);
    let mut seen = watch.seen();
    assert_eq!(seen.pop().unwrap(), "inventory.img", "it is the last");
    seen.sort();
    assert_eq!(seen, [".inventory.img", "empty.img", "pages-1.img", "pstree.img", "small.img"]);
    assert_eq!((place.read("empty.img"), place.read("inventory.img")), (vec![], b"the inventory".to_vec()));
    assert_eq!(fs::metadata(place.dir.join("pages-1.img")).unwrap().len(), 300_000);
    // Whoever comes later need not wait.
    place.wait(&mut cache).finds(&place.dir);
    let copy = Source::new();
    restores(&place.dir, &copy);
    succeeded(&mut cache, &mut bench, &place);
    assert!(copy.runs());
}

#[test]
fn a_dump_that_fails_half_way_is_never_to_be_seen_whole() {
    for scripted in [true, false] {
        let place = Place::new();
        let mut cache = cache(&place, &[]);
        let watch = Watch::new(&place.dir);
        let waiter = place.wait(&mut cache);
        let proxy = Daemon::proxy(cache.port, &[]);
        let mut bench = if scripted { Bench::with(proxy) } else { Bench::connected(proxy) };
        bench.images();
        place.appears("pstree.img");
        place.appears(".inventory.img");
        drop(bench.proxy.kill());
        waiter.fails("the dump failed: ");
        assert_eq!(cache.wait(), 1, "{}", cache.log());
        assert!(!place.dir.exists() && !watch.seen().contains(&"inventory.img".into()));
        assert!(bench.source.runs());
    }
    // With --keep the next one may come.
    let place = Place::new();
    let mut cache = cache(&place, &["--keep"]);
    let waiter = place.wait(&mut cache);
    let mut bench = Bench::new(cache.port, &[]);
    bench.dump.as_mut().unwrap().write("pages-9.img", b"of the first");
    place.appears("pages-9.img");
    drop(bench.proxy.kill());
    waiter.fails("the dump failed: ");
    wait_until("it is empty", || place.names().is_empty());
    let waiter = place.wait(&mut cache);
    let port = cache.port;
    dumped(&mut cache, port, &[]);
    waiter.finds(&place.dir);
    assert_eq!(place.names(), ["inventory.img", "pages-1.img", "pstree.img"]);
}

#[test]
fn a_dump_that_is_rolled_back_goes() {
    let place = Place::new();
    let mut cache = cache(&place, &[]);
    let watch = Watch::new(&place.dir);
    let waiter = place.wait(&mut cache);
    let mut bench = Bench::new(cache.port, &[]);
    bench.images();
    bench.post_dump().agrees();
    rolled_back(&mut cache, &mut bench, &place);
    waiter.fails("its source has rolled it back and runs on");
    assert!(!watch.seen().contains(&"inventory.img".into()));
}

#[test]
fn one_restore_at_a_time() {
    let place = Place::new();
    let mut cache = cache(&place, &[]);
    let port = cache.port;
    let (first, second) = (Source::new(), Source::new());
    let mut early = FakeCriu::start_in(&place.dir, &second);
    early.tell("pre-restore");
    early.hears("there is no dump in the view that may be restored now");
    let mut bench = dumped(&mut cache, port, &[]);
    let mut criu = FakeCriu::start_in(&place.dir, &first);
    criu.does("pre-restore");
    early.tell("pre-restore");
    early.hears("another restore is at this dump");
    // One that streams does not get it either.
    let mut stream = FakeCriu::restore(&cache, &first);
    criu.does("read");
    // Whoever has waited goes on.
    criu.kill();
    stream.does("take");
    early.tell("pre-restore");
    early.hears("another restore is at this dump");
    stream.kill();
    cache.wait_log_times("the restore has failed", 2);
    restores(&place.dir, &second);
    succeeded(&mut cache, &mut bench, &place);
    assert!(second.runs());
}

#[test]
fn a_restore_that_fails_is_followed_by_another() {
    let place = Place::new();
    let mut cache = cache(&place, &[]);
    let port = cache.port;
    let mut bench = dumped(&mut cache, port, &[]);
    let copy = Source::new();
    // Before it has made a copy; and behind that, when what it has made is killed.
    let mut criu = FakeCriu::start_in(&place.dir, &copy);
    criu.does("pre-restore");
    criu.kill();
    cache.wait_log("its CRIU ended before it had made a copy; all images stay here");
    assert!(place.has("inventory.img"));
    restored(&place.dir, &copy).kill();
    cache.wait_log("nothing of the copy is left");
    assert!(copy.is_dead() && place.has("inventory.img"));
    // An old CRIU has no pre-restore that is heard.
    let copy = Source::new();
    let mut criu = FakeCriu::start_in(&place.dir, &copy);
    criu.does("post-restore");
    criu.does("pre-resume");
    succeeded(&mut cache, &mut bench, &place);
    assert!(copy.runs());
}

#[test]
fn with_keep_a_dump_stays_until_the_next_one_comes() {
    let place = Place::new();
    let mut cache = cache(&place, &["--keep"]);
    let port = cache.port;
    let mut bench = dumped(&mut cache, port, &[]);
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    // It may be the only copy.
    let mut second = Bench::new(port, &[]);
    let _ = second.dump.as_mut().unwrap().try_open("other.img");
    second.proxy.wait_log("the last dump, whose images are in the view, has not been restored");
    second.disconnect();
    assert_eq!(second.proxy.wait(), 1, "{}", second.proxy.log());
    assert!(second.source.runs());
    assert_eq!(place.names(), ["inventory.img", "pages-1.img", "pstree.img"]);
    // Two restores, one after the other.
    for times in 1..=2 {
        let copy = Source::new();
        restores(&place.dir, &copy);
        cache.wait_log_times("the restore has succeeded", times);
        assert!(copy.runs());
    }
    // Who waits does so for the next one: this one has been restored.
    let mut waiter = place.wait(&mut cache);
    let mut third = Bench::new(port, &[]);
    third.dump.as_mut().unwrap().write("other.img", b"other");
    place.appears("other.img");
    assert_eq!(place.names(), ["other.img"], "they are of one dump");
    assert!(waiter.waits());
    third.images();
    third.post_dump().agrees();
    third.source.kill();
    third.disconnect();
    cache.wait_log_times("released by its source", 2);
    waiter.finds(&place.dir);
    assert_eq!(place.names(), ["inventory.img", "other.img", "pages-1.img", "pstree.img"]);
    let copy = Source::new();
    restores(&place.dir, &copy);
    cache.wait_log_times("the restore has succeeded", 3);
    assert_eq!(cache.terminate(), 0, "{}", cache.log());
    assert!(!place.dir.exists());
}

#[test]
fn what_is_dropped_for_want_of_memory_is_no_longer_in_the_view() {
    let place = Place::new();
    let mut cache = cache(&place, &["--keep", "--memory-limit", "8M"]);
    let port = cache.port;
    let mut bench = dumped(&mut cache, port, &[]);
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    let copy = Source::new();
    restores(&place.dir, &copy);
    // Until then it holds its images.
    cache.wait_log("the copy runs");
    assert!(place.has("inventory.img"));
    // A link would lead to whatever gets the descriptor next.
    let mut proxy = FakeProxy::connect(&cache);
    proxy.peer.say(Kind::Prepare(Prepare::new(8 << 20, &[])));
    cache.wait_log("the last dump, which has been restored, is dropped");
    wait_until("the view is empty", || place.names().is_empty());
    assert!(copy.runs());
}

#[test]
fn what_is_streamed_is_in_the_view_too() {
    let place = Place::new();
    let mut cache = cache(&place, &[]);
    let port = cache.port;
    let mut bench = dumped(&mut cache, port, &[]);
    pre_stream(&cache).agrees();
    let mut restore = Restore::connect(&cache);
    assert_eq!(restore.read("inventory.img").unwrap(), b"the inventory");
    assert!(restore.read("pages-1.img").unwrap() == place.read("pages-1.img"));
    let copy = common::script::succeeds(&cache);
    assert!(!place.has("inventory.img") || !place.dir.exists(), "nobody begins another");
    drop(restore);
    succeeded(&mut cache, &mut bench, &place);
    assert!(copy.runs());
}

// --- Commit restored: whoever waits for the view is the restore that waits.

/// The dump is stored, and whoever has waited was told.
fn offered(place: &Place) -> (Daemon, Bench, Script) {
    let mut cache = cache(place, &[]);
    let waiter = place.wait(&mut cache);
    let mut bench = Bench::new(cache.port, &RESTORED);
    bench.images();
    let script = bench.post_dump();
    waiter.finds(&place.dir);
    bench.proxy.wait_log("the cache has stored everything: the restore is at it");
    assert!(place.has("inventory.img") && bench.source.lives());
    (cache, bench, script)
}

#[test]
fn the_source_dies_when_its_copy_stands_ready() {
    let place = Place::new();
    let (mut cache, mut bench, mut script) = offered(&place);
    let copy = Source::new();
    let mut criu = restored(&place.dir, &copy);
    assert!(script.waits() && copy.runs());
    criu.does("pre-resume");
    drop(criu);
    cache.wait_log("the copy stands ready (3 processes)");
    script.agrees();
    assert!(copy.is_stopped() && bench.source.runs());
    bench.source.kill();
    wait_until("the copy runs", || copy.runs());
    bench.disconnect();
    succeeded(&mut cache, &mut bench, &place);
}

/// Each waits for its own: the first is in the view still when the second restore comes.
#[test]
fn with_keep_one_follows_the_other() {
    let place = Place::new();
    let mut cache = cache(&place, &["--keep"]);
    for times in 1..=2 {
        let mut waiter = place.wait(&mut cache);
        let mut bench = Bench::new(cache.port, &RESTORED);
        assert!(waiter.waits() && place.has("inventory.img") == (times == 2));
        bench.images();
        let script = bench.post_dump();
        waiter.finds(&place.dir);
        let copy = Source::new();
        restores(&place.dir, &copy);
        script.agrees();
        bench.source.kill();
        wait_until("the copy runs", || copy.runs());
        bench.disconnect();
        assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    }
    assert_eq!(cache.terminate(), 0, "{}", cache.log());
    assert!(!place.dir.exists());
}

#[test]
fn a_copy_from_the_view_is_rolled_back() {
    let place = Place::new();
    let (mut cache, mut bench, script) = offered(&place);
    let copy = Source::new();
    restores(&place.dir, &copy);
    script.agrees();
    rolled_back(&mut cache, &mut bench, &place);
    assert!(copy.is_dead());
}

#[test]
fn a_restore_that_fails_is_not_repeated_while_the_source_lives() {
    let place = Place::new();
    for with_copy in [false, true] {
        let (mut cache, mut bench, script) = offered(&place);
        let (copy, other) = (Source::new(), Source::new());
        let mut criu = FakeCriu::start_in(&place.dir, &copy);
        criu.does("pre-restore");
        let mut second = FakeCriu::start_in(&place.dir, &other);
        second.tell("pre-restore");
        second.hears("another restore is at this dump");
        if with_copy {
            criu.does("post-restore");
        }
        // Nobody else is told that he may.
        bench.proxy.stop();
        let mut waiter = place.wait(&mut cache);
        criu.kill();
        wait_until("it is taken back", || !place.has("inventory.img"));
        wait_until("nothing of it is left", || copy.is_dead() == with_copy);
        second.tell("pre-restore");
        second.hears("there is no dump in the view that may be restored now");
        assert!(waiter.waits());
        bench.proxy.go_on();
        script.refuses("the restore on the other side has failed");
        rolled_back(&mut cache, &mut bench, &place);
        waiter.fails("its source has rolled it back");
    }
}

#[test]
fn nobody_waits() {
    let place = Place::new();
    let mut cache = cache(&place, &[]);
    let proxy = Daemon::proxy(cache.port, &RESTORED);
    pre_stream(&proxy).refuses("no criu restore waits at the cache");
    // One that was there and goes.
    let waiter = place.wait(&mut cache);
    let mut bench = Bench::with(proxy);
    waiter.kill();
    let dump = bench.dump.as_mut().unwrap();
    wait_until("it is refused", || dump.try_open("other.img").is_err());
    bench.proxy.wait_log("no criu restore waits at the cache any more");
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
    assert!(bench.source.runs() && !place.has("inventory.img"));
}

#[test]
fn a_restore_that_streams_comes_first() {
    let place = Place::new();
    let mut cache = cache(&place, &[]);
    let mut waiter = place.wait(&mut cache);
    pre_stream(&cache).agrees();
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    let mut bench = Bench::new(cache.port, &RESTORED);
    bench.images();
    let script = bench.post_dump();
    assert_eq!(restore.answer(), Some(true));
    let copy = common::script::succeeds(&cache);
    script.agrees();
    assert!(waiter.waits() && !place.has("inventory.img"));
    bench.source.kill();
    bench.disconnect();
    succeeded(&mut cache, &mut bench, &place);
    let (status, said) = waiter.end();
    assert_eq!(status, 1, "{said}");
    assert!(copy.runs());
}

// --- Dumps that are not scripted.

#[test]
fn a_dump_that_is_not_scripted() {
    let place = Place::new();
    let mut cache = cache(&place, &[]);
    let watch = Watch::new(&place.dir);
    let waiter = place.wait(&mut cache);
    let mut bench = Bench::connected(Daemon::proxy(cache.port, &[]));
    bench.images();
    bench.disconnect();
    waiter.finds(&place.dir);
    let seen = watch.seen();
    assert_eq!((seen.len(), seen.last().unwrap().as_str()), (4, "inventory.img"));
    let copy = Source::new();
    restores(&place.dir, &copy);
    succeeded(&mut cache, &mut bench, &place);
}

#[test]
fn snapshots_of_the_remote_dialect() {
    let place = Place::new();
    let mut cache = cache(&place, &[]);
    let waiter = place.wait(&mut cache);
    let mut peer = OldProxy::connect(&cache);
    let list = key("", "parent");
    let (mut watches, mut listed) = (Vec::new(), 0);
    for (n, id) in ["/dumps/1", "/other/1", "/dumps/3"].into_iter().enumerate() {
        // Of what is appended, the size is that of the whole.
        let entry = id_list(&[id]);
        listed += entry.len() as u64;
        peer.header(&list, WriteMode::Append, listed);
        peer.0.write_all(&entry).unwrap();
        peer.send(&key(id, "pages-1.img"), &pattern(300_000, 1));
        peer.send(&key(id, "core-1.img"), id.as_bytes());
        let name = ["1", "1~2", "3"][n];
        place.appears(&format!("{name}/core-1.img"));
        watches.push((name, Watch::new(&place.dir.join(name))));
        peer.send(&key(id, "inventory.img"), b"the inventory");
        // More of one that was complete.
        peer.header(&key(id, "core-1.img"), WriteMode::Append, id.len() as u64 + 5);
        peer.0.write_all(b" more").unwrap();
        place.appears(&format!("{name}/.inventory.img"));
        wait_until("it is all there", || place.read(&format!("{name}/core-1.img")).ends_with(b" more"));
    }
    assert_eq!(place.names(), ["1", "1~2", "3"]);
    drop(peer);
    let last = place.dir.join("3");
    waiter.finds(&last);
    for (name, watch) in &watches {
        let (seen, dir) = (watch.seen(), place.dir.join(name));
        assert_eq!(seen.last().unwrap(), "inventory.img");
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o7777, 0o700);
        let parent = fs::read_link(dir.join("parent")).ok();
        let expected = match *name {
            "1" => None,
            "1~2" => Some("../1".into()),
            _ => Some("../1~2".into()),
        };
        assert_eq!((seen.contains(&"parent".into()), parent), (expected.is_some(), expected));
    }
    assert_eq!(place.read("3/parent/parent/core-1.img"), b"/dumps/1 more");
    assert_eq!(place.read("3/parent/core-1.img"), b"/other/1 more");
    // CRIU's script finds us where it restores from.
    let copy = Source::new();
    restores(&last, &copy);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    assert!(!place.dir.exists() && copy.runs());
}

// --- The directory.

#[test]
fn a_directory_that_was_there_stays() {
    let place = Place::new();
    fs::DirBuilder::new().mode(0o750).create(&place.dir).unwrap();
    fs::write(place.dir.join("notes"), "mine").unwrap();
    // What a cache that was killed has left.
    for (at, name) in ["inventory.img", "pages-1.img", "pages-2.img"].iter().enumerate() {
        symlink(format!("/proc/4194305/fd/{at}"), place.dir.join(name)).unwrap();
    }
    let mut cache = cache(&place, &[]);
    assert_eq!(place.names(), ["notes"]);
    let port = cache.port;
    let mut bench = dumped(&mut cache, port, &[]);
    assert_eq!(place.names(), ["inventory.img", "notes", "pages-1.img", "pstree.img"]);
    restores(&place.dir, &Source::new());
    assert_eq!(bench.proxy.wait(), 0);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
    assert_eq!(fs::metadata(&place.dir).unwrap().mode() & 0o7777, 0o750);
    assert_eq!(fs::read_dir(&place.dir).unwrap().count(), 1, "the socket has gone");
}

#[test]
fn a_directory_that_was_made_goes() {
    let place = Place::new();
    let mut daemon = cache(&place, &[]);
    assert_eq!(fs::metadata(&place.dir).unwrap().mode() & 0o7777, 0o700);
    // Not ours to use while that one is there.
    let why = fails_to_start(&Dir::new(), &["--view", place.arg()]);
    assert!(why.contains("relay-cache.sock"), "{why}");
    assert!(place.has("relay-cache.sock"));
    assert_eq!(daemon.terminate(), 1);
    assert!(!place.dir.exists());
    // A cache that is killed leaves links, which another one removes.
    let mut daemon = cache(&place, &[]);
    let port = daemon.port;
    let _bench = dumped(&mut daemon, port, &[]);
    drop(daemon.kill());
    assert_eq!(place.names(), ["inventory.img", "pages-1.img", "pstree.img"]);
    assert!(fs::read(place.dir.join("pages-1.img")).is_err(), "they lead nowhere");
    let daemon = cache(&place, &[]);
    assert!(place.names().is_empty());
    drop(daemon);
}

/// What a cache says that does not start.
fn fails_to_start(dir: &Dir, args: &[&str]) -> String {
    let mut command = Command::new(binary());
    command.args(["cache", "--port", "0", "-D"]).arg(&dir.0).args(args).stdin(Stdio::null());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn views_that_are_refused() {
    let dir = Dir::new();
    let own = format!("{}/.", dir.0.display());
    for args in [&["--view", &own][..], &["--view", &own, "-W", &own]] {
        let why = fails_to_start(&dir, args);
        assert!(why.contains("can't be the view too: --view takes a directory of its own"), "{why}");
    }
    let (work, place) = (Dir::new(), Place::new());
    let work = work.0.to_str().unwrap();
    let why = fails_to_start(&dir, &["-W", work, "--view", work]);
    assert!(why.contains("can't be the view too"), "{why}");
    // Nothing is left of a directory that was made for nothing.
    for args in [&["--pidfile", "/does/not/exist"][..], &["--address", "0.0.0.0"]] {
        fails_to_start(&dir, &[&["--view", place.arg()], args].concat());
        assert!(!place.dir.exists(), "{args:?}");
    }
    fs::DirBuilder::new().mode(0o700).create(&place.dir).unwrap();
    fs::write(place.dir.join("pages-1.img"), "of somebody").unwrap();
    let why = fails_to_start(&dir, &["--view", place.arg()]);
    assert!(why.contains("holds images that are files (pages-1.img)"), "{why}");
    assert_eq!(place.names(), ["pages-1.img"]);
    assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0);
}

// --- What comes over the network.

#[test]
fn names_that_can_not_be_files_fail_the_dump() {
    for name in ["../pages-1.img", ".hidden.img", "relay-cache.sock", "pages-1"] {
        let place = Place::new();
        let mut cache = cache(&place, &[]);
        let waiter = place.wait(&mut cache);
        let mut proxy = FakeProxy::connect(&cache);
        proxy.begin(1, true);
        proxy.stream_image("pages-1.img", b"pages");
        proxy.image(&Key::stream(name.as_bytes()), b"evil");
        let why = proxy.peer.hear_error();
        // No link has ever taken the first.
        let of_view = "is no name that an image may have in a directory (--view)";
        assert!(
            why.contains(if name.contains('/') { "a name that holds a slash" } else { of_view }),
            "{why}"
        );
        waiter.fails("the dump failed: ");
        assert_eq!(cache.wait(), 1);
        assert!(!place.dir.exists());
    }
}

#[test]
fn without_descriptors_enough_the_source_runs_on() {
    let place = Place::new();
    for limit in [64, 256] {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -n \"$0\"; exec \"$@\"", &limit.to_string(), binary()]);
        command.args(["cache", "--port", "0"]);
        let mut cache = Daemon::start(Dir::new(), command, &["--view", place.arg()]);
        let waiter = place.wait(&mut cache);
        let mut bench = Bench::new(cache.port, &[]);
        let dump = bench.dump.as_mut().unwrap();
        // The proxy closes when it has heard of it.
        for n in 0..300 {
            let Ok(mut image) = dump.try_open(&format!("core-{n}.img")) else { break };
            let _ = image.write_all(b"core");
        }
        let why = "as many as this process may have descriptors for (see ulimit -n)";
        waiter.fails(why);
        assert_eq!(cache.wait(), 1, "{}", cache.log());
        bench.disconnect();
        assert_eq!(bench.proxy.wait(), 1, "{}", bench.proxy.log());
        assert!(bench.proxy.log().contains(why), "{}", bench.proxy.log());
        assert!(bench.source.runs() && !place.dir.exists());
    }
}
