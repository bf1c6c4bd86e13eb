//! Scripted sessions: both daemons and the real action script, with a CRIU that the tests play. Where that has to die
//! it is a process of its own (`fake_criu`).

mod common;

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use common::relay::{FakeCache, FakeProxy};
use common::script::{Bench, Script, Source, is_left_waiting, pair, played, pre_stream, succeeds};
use common::*;
use criu_relay::wire::relay::{self as wire, Kind};
use rustix::process::Signal;

#[test]
fn the_restore_begins_when_all_of_the_source_are_dead() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    bench.images();
    bench.post_dump().agrees();
    bench.proxy.wait_log("(3 processes)");
    cache.wait_log("it is served when its source has released it");
    assert!(bench.source.lives() && is_left_waiting(&restore));
    // CRIU kills them one by one, root first.
    bench.source.kill_root();
    assert!(is_left_waiting(&restore) && bench.proxy.is_running() && !cache.log().contains("released by"));
    bench.source.kill_children();
    cache.wait_log("released by its source");
    assert_eq!(restore.answer(), Some(true));
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    assert!(bench.proxy.log().contains("confirmed and released"));
    let mut inventory = Vec::new();
    restore.pipe().read_to_end(&mut inventory).unwrap();
    assert_eq!(inventory, b"the inventory");
    assert!(restore.read("pages-1.img") == Some(pattern(300_000, 1)));
    // Its connection says nothing of success, its script does.
    drop(restore);
    assert!(cache.is_running());
    succeeds(&cache);
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}

#[test]
fn images_are_read_before_the_release_but_for_the_first() {
    let (mut cache, mut bench, mut waiting) = pair(&[], &[]);
    bench.images();
    bench.post_dump().agrees();
    cache.wait_log("it is served when its source has released it");
    let mut other = Restore::connect(&cache);
    assert!(other.read("pages-1.img") == Some(pattern(300_000, 1)));
    other.ask("inventory.img");
    // When others that came later are answered twice, it has been looked at.
    let mut third = Restore::connect(&cache);
    for _ in 0..2 {
        assert_eq!(third.read("pstree.img"), Some(b"the tree".to_vec()));
    }
    assert!(is_left_waiting(&other) && is_left_waiting(&waiting));
    bench.source.kill();
    // One of them restores it: the other's turn comes if that fails.
    assert_eq!(waiting.answer(), Some(true));
    assert!(is_left_waiting(&other));
}

#[test]
fn the_cache_is_killed_half_way() {
    let (mut cache, mut bench, restore) = pair(&[], &[]);
    let dump = bench.dump.as_mut().unwrap();
    dump.write("core-1.img", b"the core");
    cache.wait_log("core-1.img: 8 bytes received");
    cache.signal(Signal::KILL);
    cache.wait();
    drop(restore);
    // CRIU's connection is closed; should it come to post-dump all the same, it is told.
    assert_closed(&mut dump.0);
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.proxy.log().contains("the dump failed: the link was lost"), "{}", bench.proxy.log());
    let (status, _) = bench.post_dump().end();
    assert_eq!(status, 1);
    assert!(bench.source.lives());
}

#[test]
fn the_cache_is_killed_while_criu_is_held() {
    let (mut cache, mut bench, restore) = pair(&[], &[]);
    cache.stop();
    bench.images();
    let script = bench.post_dump();
    bench.proxy.wait_log("inventory.img: 13 bytes sent");
    bench.proxy.wait_log("CRIU is held");
    cache.signal(Signal::KILL);
    cache.wait();
    drop(restore);
    script.refuses("the link was lost");
    assert!(bench.source.lives());
}

#[test]
fn a_cache_that_can_not_be_told() {
    let (cache, mut held, mut bench) = played(&["--connect-timeout", "1"]);
    let script = bench.held(&mut held);
    drop(cache);
    held.peer.reset();
    script.refuses("the link was lost before the cache had confirmed");
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.proxy.log().contains("the cache could not be told"), "{}", bench.proxy.log());
    assert!(bench.source.lives());
}

#[test]
fn a_lost_link_rolls_back() {
    let (cache, mut held, mut bench) = played(&[]);
    let script = bench.held(&mut held);
    held.peer.reset();
    script.refuses("the link was lost before the cache had confirmed");
    let mut held = cache.accept();
    let Kind::Rollback(said) = held.hear() else { panic!() };
    // Until that is acknowledged.
    held.peer.reset();
    let mut held = cache.accept();
    assert_eq!(held.hear(), Kind::Rollback(said.clone()));
    assert!(bench.proxy.is_running());
    held.peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.proxy.log().contains("the cache has rolled back"), "{}", bench.proxy.log());
    assert!(bench.source.lives());
}

/// CRIU has ended behind our script's success, and its source lives: CRIU was killed, another script has failed, or
/// it was told to leave the source running.
#[test]
fn a_source_that_lives_is_rolled_back() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    bench.images();
    bench.post_dump().agrees();
    cache.wait_log("it is served when its source has released it");
    bench.disconnect();
    assert_eq!(restore.answer(), None);
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.proxy.log().contains("criu dump ended, but the source was not killed"));
    cache.wait_log("rolled back: the source runs on");
    assert_eq!(cache.wait(), 1, "{}", cache.log());
}

/// CRIU was killed in the middle of its killing: half a process is no use to anybody.
#[test]
fn a_source_of_which_a_part_is_dead_is_killed() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    bench.images();
    bench.post_dump().agrees();
    cache.wait_log("it is served when its source has released it");
    bench.source.kill_root();
    bench.proxy.wait_log("a process of the source is dead");
    bench.disconnect();
    assert_eq!(restore.answer(), Some(true));
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    assert!(bench.proxy.log().contains("the rest is killed too"));
}

#[test]
fn criu_ends_while_its_script_waits() {
    let (mut cache, mut bench, mut restore) = pair(&["--keep"], &[]);
    cache.stop();
    bench.images();
    let script = bench.post_dump();
    bench.proxy.wait_log("inventory.img: 13 bytes sent");
    bench.proxy.wait_log("CRIU is held");
    // As if it had been killed: its connection closes, its script sees it and goes.
    bench.disconnect();
    bench.proxy.wait_log("the source runs on");
    cache.go_on();
    cache.wait_log("rolled back");
    assert_eq!(restore.answer(), None);
    assert_eq!(bench.proxy.wait(), 1);
    assert_eq!(script.end().0, 1);
    assert!(bench.source.lives());
}

#[test]
fn criu_ends_before_its_script_was_called() {
    let (mut cache, mut bench, mut restore) = pair(&[], &[]);
    bench.images();
    bench.disconnect();
    // Everything is there, but nobody has asked: not confirmed, so the source runs.
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.proxy.log().contains("CRIU ended without having asked at post-dump"));
    assert_eq!(restore.answer(), None);
    assert_eq!(cache.wait(), 1);
}

#[test]
fn a_script_that_is_killed_while_it_waits() {
    let (cache, mut held, mut bench) = played(&[]);
    let script = bench.held(&mut held);
    drop(script);
    let Kind::Rollback(said) = held.hear() else { panic!() };
    held.peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.proxy.log().contains("CRIU's action script has gone before it was answered"));
    assert!(bench.source.lives());
    drop(cache);
}

#[test]
fn a_source_may_be_left_running() {
    let (mut cache, mut bench, mut restore) = pair(&[], &["--leave-running"]);
    bench.images();
    bench.post_dump().agrees();
    cache.wait_log("it is served when its source has released it");
    assert!(is_left_waiting(&restore));
    bench.disconnect();
    assert_eq!(restore.answer(), Some(true));
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
    assert!(bench.source.lives());
}

#[test]
fn a_confirmation_that_comes_too_late() {
    let (_cache, mut held, mut bench) = played(&["--confirm-timeout", "1"]);
    let script = bench.held(&mut held);
    script.refuses("the cache has not confirmed for 1 s (--confirm-timeout)");
    // It is late.
    held.all_stored();
    let Kind::Rollback(said) = held.hear() else { panic!() };
    held.peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
    assert_eq!(bench.proxy.wait(), 1);
    assert!(!bench.proxy.log().contains("confirmed everything: CRIU goes on"), "{}", bench.proxy.log());
    assert!(bench.source.lives());
}

#[test]
fn a_signal_while_criu_is_held() {
    let (_cache, mut held, mut bench) = played(&[]);
    let script = bench.held(&mut held);
    bench.proxy.signal(Signal::TERM);
    script.refuses("a signal ended it");
    let Kind::Rollback(said) = held.hear() else { panic!() };
    held.peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.source.lives());
}

#[test]
fn a_cache_that_fails_while_criu_is_held() {
    let (cache, mut held, mut bench) = played(&[]);
    let script = bench.held(&mut held);
    held.peer.say(Kind::Error(wire::Error::new(28, "no memory is left")));
    script.refuses("no memory is left");
    let mut held = cache.accept();
    let Kind::Rollback(said) = held.hear() else { panic!() };
    held.peer.say(Kind::RolledBack(wire::RolledBack { session: said.session }));
    assert_eq!(bench.proxy.wait(), 1);
}

#[test]
fn a_release_whose_link_is_lost() {
    let (cache, mut held, mut bench) = played(&[]);
    let script = bench.held(&mut held);
    held.all_stored();
    script.agrees();
    bench.source.kill();
    bench.disconnect();
    let Kind::Release(said) = held.hear() else { panic!() };
    held.peer.reset();
    let mut held = cache.accept();
    assert_eq!(held.hear(), Kind::Release(said.clone()));
    assert!(bench.proxy.is_running());
    // The source is dead: not even a signal makes it forget that.
    bench.proxy.signal(Signal::TERM);
    bench.proxy.wait_log("ask once more");
    drop(held);
    let mut held = cache.accept();
    assert_eq!(held.hear(), Kind::Release(said.clone()));
    held.peer.say(Kind::Released(wire::Released { session: said.session }));
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
}

#[test]
fn a_link_that_is_lost_while_the_source_dies() {
    let (cache, mut held, mut bench) = played(&[]);
    let script = bench.held(&mut held);
    held.all_stored();
    script.agrees();
    held.peer.reset();
    bench.proxy.wait_log("the link to the cache is lost");
    bench.source.kill();
    bench.disconnect();
    let mut held = cache.accept();
    let Kind::Release(said) = held.hear() else { panic!() };
    held.peer.say(Kind::Released(wire::Released { session: said.session }));
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
}

/// The cache has confirmed, the source is dead, and the link is lost before the release is said.
fn played_until_the_link_is_lost() -> (FakeCache, Bench) {
    let (cache, mut held, mut bench) = played(&[]);
    let script = bench.held(&mut held);
    held.all_stored();
    script.agrees();
    held.peer.reset();
    bench.source.kill();
    bench.disconnect();
    (cache, bench)
}

#[test]
fn a_release_and_a_welcome_that_comes_late() {
    // A scripted session never goes on in the seed protocol, and the release has to be said as long as it takes.
    let (cache, mut bench) = played_until_the_link_is_lost();
    // The cache is busy for more than two seconds.
    let (slow, _) = cache.greeted();
    slow.end();
    let mut held = cache.accept();
    let Kind::Release(said) = held.hear() else { panic!() };
    held.peer.say(Kind::Released(wire::Released { session: said.session }));
    assert_eq!(bench.proxy.wait(), 0, "{}", bench.proxy.log());
}

#[test]
fn a_release_of_what_the_cache_has_lost() {
    let (cache, mut bench) = played_until_the_link_is_lost();
    let mut held = cache.accept();
    assert!(matches!(held.hear(), Kind::Release(_)));
    held.peer.say(Kind::Error(wire::Error::new(3, "who are you?")));
    assert_eq!(bench.proxy.wait(), 1);
    assert!(bench.proxy.log().contains("the source is dead, and the cache has lost its images"));
}

// --- The cache's side of a word.

fn stored(cache: &mut Daemon) -> FakeProxy {
    let mut proxy = FakeProxy::connect(cache);
    proxy.begin(1, true);
    proxy.end();
    cache.wait_log("it is served when its source has released it");
    proxy
}

#[test]
fn a_word_is_repeated_without_effect() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = stored(&mut cache);
    let released = Kind::Released(wire::Released { session: proxy.session.clone() });
    proxy.release();
    assert_eq!(proxy.peer.hear(), released);
    // On the same link, and on another.
    proxy.release();
    assert_eq!(proxy.peer.hear(), released);
    let mut again = FakeProxy::connect(&cache);
    again.session.clone_from(&proxy.session);
    again.release();
    assert_eq!(again.peer.hear(), released);
    // The opposite is not taken, and changes nothing.
    again.rollback();
    assert!(again.peer.hear_error().contains("the opposite has been said"));
    pre_stream(&cache).agrees();
    assert!(Restore::connect(&cache).read("inventory.img").is_some());
}

#[test]
fn a_word_comes_on_another_link() {
    for release in [true, false] {
        let mut cache = Daemon::cache(&[]);
        pre_stream(&cache).agrees();
        let mut restore = Restore::connect(&cache);
        restore.ask("inventory.img");
        let proxy = stored(&mut cache);
        let (session, run) = (proxy.session.clone(), proxy.run.clone());
        proxy.peer.reset();
        let mut proxy = FakeProxy::connect(&cache);
        proxy.session.clone_from(&session);
        proxy.peer.say(Kind::Resume(wire::Resume { session: session.clone(), run }));
        assert!(matches!(proxy.peer.hear(), Kind::AllStored(_)));
        assert!(is_left_waiting(&restore));
        if release {
            proxy.release();
            assert_eq!(proxy.peer.hear(), Kind::Released(wire::Released { session }));
            assert_eq!(restore.answer(), Some(true));
        } else {
            proxy.rollback();
            assert_eq!(proxy.peer.hear(), Kind::RolledBack(wire::RolledBack { session }));
            assert_eq!(restore.answer(), None);
            assert_eq!(cache.wait(), 1);
        }
    }
}

#[test]
fn a_word_of_a_session_that_nobody_knows() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.session = vec![9; wire::ID];
    proxy.release();
    assert!(proxy.peer.hear_error().contains("does not have the images of that session"));
    // There is nothing to be dropped.
    proxy.rollback();
    assert!(matches!(proxy.peer.hear(), Kind::RolledBack(_)));
    // What is stored is not touched by that.
    let mut other = stored(&mut cache);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.session = vec![8; wire::ID];
    proxy.release();
    assert!(proxy.peer.hear_error().contains("does not have the images of that session"));
    other.release();
    assert!(matches!(other.peer.hear(), Kind::Released(_)));
}

#[test]
fn what_is_not_decided_is_not_given_up() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = stored(&mut cache);
    cache.signal(Signal::TERM);
    cache.wait_log("ask once more to drop it");
    proxy.release();
    assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
    assert!(cache.is_running());
    assert_eq!(cache.terminate(), 1, "{}", cache.log());
}

// --- Before anything is frozen.

#[test]
fn pre_stream_needs_a_link() {
    let (listener, port) = old_listener();
    drop(listener);
    let mut proxy = Daemon::proxy(port, &["--keep", "--connect-timeout", "1"]);
    pre_stream(&proxy).refuses("is criu-relay cache running there");
    // Nothing of it stays: when there is a cache the next may come.
    let cache = Daemon::cache_at(Dir::new(), port, &[]);
    proxy.wait_log("relay protocol");
    pre_stream(&proxy).agrees();
    drop(cache);
}

#[test]
fn pre_stream_waits_for_the_welcome() {
    let cache = FakeCache::new();
    let proxy = Daemon::proxy(cache.port, &[]);
    let (mut peer, _) = cache.greeted();
    let mut script = pre_stream(&proxy);
    let mut log = proxy;
    log.wait_log("the action script: pre-stream");
    assert!(script.0.try_wait().unwrap().is_none());
    peer.say(Kind::Welcome(cache.welcome()));
    script.agrees();
}

#[test]
fn pre_stream_fails_with_an_old_cache() {
    for told in [true, false] {
        let (listener, port) = old_listener();
        let proxy = if told { Daemon::seed_proxy(port, &[]) } else { Daemon::proxy(port, &[]) };
        let link = listener.accept().unwrap();
        pre_stream(&proxy).refuses("speaks the seed protocol only");
        drop(link);
    }
    // And with one that does not say what it is.
    let cache = FakeCache::new();
    let proxy = Daemon::proxy(cache.port, &["--confirm-timeout", "1"]);
    let _silent = cache.greeted();
    pre_stream(&proxy).refuses("there is no link to the cache yet (--confirm-timeout)");
}

#[test]
fn an_old_cache_may_be_accepted() {
    let (listener, port) = old_listener();
    let mut bench = {
        let proxy = Daemon::seed_proxy(port, &["--accept-unconfirmed"]);
        let link = std::thread::spawn(move || old_cache(listener.accept().unwrap().0));
        (Bench::with(proxy), link)
    };
    bench.0.images();
    bench.0.post_dump().agrees();
    bench.0.source.kill();
    bench.0.disconnect();
    assert_eq!(bench.0.proxy.wait(), 0, "{}", bench.0.proxy.log());
    let (images, end) = bench.1.join().unwrap();
    assert_eq!((images.len(), end), (3, LinkEnd::InOrder));
    assert!(images[&key("", "pages-1.img")] == pattern(300_000, 1));
    assert!(bench.0.proxy.log().contains("sent, not confirmed"));
}

#[test]
fn the_script_of_another_criu() {
    let cache = Daemon::cache(&[]);
    let mut bench = Bench::new(cache.port, &[]);
    bench.images();
    Script::of_another("post-dump", &bench.proxy, Some(&bench.source)).refuses("another CRIU's");
    // The right one is not disturbed.
    bench.post_dump().agrees();
    bench.source.kill();
    bench.disconnect();
    assert_eq!(bench.proxy.wait(), 0);
}

#[test]
fn post_dump_without_a_dump() {
    let cache = Daemon::cache(&[]);
    let proxy = Daemon::proxy(cache.port, &[]);
    let source = Source::new();
    Script::start("post-dump", &proxy, Some(&source)).refuses("no dump is in progress");
    // Without an inventory it is none.
    let mut bench = Bench::with(proxy);
    bench.dump.as_mut().unwrap().write("core-1.img", b"the core");
    bench.post_dump().refuses("without a complete inventory.img");
    assert_eq!(bench.proxy.wait(), 1);
}

#[test]
fn an_unannounced_restore_is_refused() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = stored(&mut cache);
    proxy.release();
    assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    assert_eq!(restore.answer(), None);
    cache.wait_log("this criu restore needs --action-script criu-relay");
    pre_stream(&cache).agrees();
    assert!(Restore::connect(&cache).read("inventory.img").is_some());
}

// --- A restore that fails.

/// CRIU as a process of its own, when told so by the environment: restores what it is told, and then ends without
/// another word of its script, or with one.
#[test]
fn fake_criu() {
    let Some(dir) = std::env::var_os("FAKE_CRIU_DIR") else { return };
    let dir = Path::new(&dir);
    let copy = Source::new();
    let script = |action: &str| Script(Script::command(action, dir, Some(&copy)).spawn().unwrap()).agrees();
    script("pre-stream");
    let mut restore = Restore(connect(&dir.join("streamer-serve.sock")));
    let images = std::env::var("FAKE_CRIU_READS").unwrap();
    for name in images.split(' ') {
        assert!(restore.read(name).is_some());
    }
    if std::env::var_os("FAKE_CRIU_SUCCEEDS").is_some() {
        script("post-restore");
        script("pre-resume");
    }
}

fn criu_restore(cache: &Daemon, images: &str, succeeds: bool) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "fake_criu", "--nocapture"]);
    command.env("FAKE_CRIU_DIR", &cache.dir.0).env("FAKE_CRIU_READS", images);
    if succeeds {
        command.env("FAKE_CRIU_SUCCEEDS", "1");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn a_restore_that_fails_is_repeated() {
    let mut cache = Daemon::cache(&[]);
    let mut proxy = stored(&mut cache);
    proxy.release();
    assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
    // Whatever it has read.
    for (times, images) in ["inventory.img", "inventory.img pstree.img"].iter().enumerate() {
        assert!(criu_restore(&cache, images, false));
        cache.wait_log_times("its CRIU ended before it had made a copy", times + 1);
        assert!(cache.is_running());
    }
    assert!(criu_restore(&cache, "inventory.img pstree.img", true));
    assert_eq!(cache.wait(), 0, "{}", cache.log());
}

#[test]
fn a_restore_that_fails_with_consume_is_the_last() {
    let mut cache = Daemon::cache(&["--consume"]);
    let mut proxy = FakeProxy::connect(&cache);
    proxy.begin(1, true);
    proxy.stream_image("pages-1.img", &pattern(5_000_000, 1));
    proxy.end();
    proxy.release();
    assert!(matches!(proxy.peer.hear(), Kind::Released(_)));
    assert!(criu_restore(&cache, "inventory.img pages-1.img", false));
    cache.wait_log("what it had read is not here any more (--consume)");
    assert!(!criu_restore(&cache, "inventory.img pages-1.img", false));
    cache.wait_log("pages-1.img has been read before, and with --consume it is not here any more");
}

#[test]
fn sessions_follow_one_another() {
    let mut cache = Daemon::cache(&["--keep"]);
    let mut proxy = Daemon::proxy(cache.port, &["--keep"]);
    for n in 1..=3_usize {
        // The second is rolled back.
        let mut bench = Bench::with(proxy);
        bench.images();
        bench.post_dump().agrees();
        if n != 2 {
            bench.source.kill();
        }
        bench.disconnect();
        match n {
            2 => cache.wait_log("rolled back: the source runs on"),
            n => cache.wait_log_times("released by its source", n.div_ceil(2)),
        }
        bench
            .proxy
            .wait_log_times(if n == 2 { "has rolled back" } else { "confirmed and released" }, n.div_ceil(2));
        proxy = bench.proxy;
        if n != 2 {
            assert!(criu_restore(&cache, "inventory.img pages-1.img", true), "it has been released");
        }
    }
    assert_eq!(proxy.log().matches("connected to").count(), 1);
}
