use super::*;

fn over(decision: &Decision) -> Option<bool> {
    match decision {
        Decision::Over(outcome) => Some(outcome.is_ok()),
        _ => None,
    }
}

fn source(dialect: Dialect) -> Source {
    let mut source = Source::new(false, false, Commit::Stored);
    assert_eq!(source.link_up(), Decision::Nothing);
    assert_eq!(source.request(dialect, true), Ok(Begun::Now));
    source
}

#[test]
fn a_dump_that_goes_well() {
    let mut source = source(Dialect::Stream);
    assert_eq!(source.ended(Ok(())), Decision::Nothing);
    assert!(source.is_complete());
    assert_eq!(over(&source.delivered()), Some(true));
}

#[test]
fn a_lost_link_fails_a_dump_that_can_still_fail() {
    for dialect in [Dialect::Stream, Dialect::Remote] {
        assert_eq!(over(&source(dialect).link_lost("reset", false)), Some(false));
        assert_eq!(over(&source(dialect).no_link("no".into(), false)), Some(false));
    }
}

#[test]
fn what_may_be_the_only_copy_is_kept_and_sent_anew() {
    let mut source = source(Dialect::Stream);
    assert_eq!(source.link_lost("reset", true), Decision::Connect);
    assert_eq!(source.no_link("no".into(), true), Decision::Connect);
    assert_eq!(source.ended(Ok(())), Decision::Nothing);
    assert_eq!(source.no_link("no".into(), false), Decision::Connect);
    assert_eq!(source.link_up(), Decision::SendAnew);
    assert_eq!(source.link_lost("reset", false), Decision::Connect);
    assert_eq!(source.link_up(), Decision::SendAnew);
    assert_eq!(source.terminate(Ask::End, false), Decision::Stay);
    assert_eq!(over(&source.terminate(Ask::End, false)), Some(false));
}

#[test]
fn a_signal_during_a_dump() {
    assert_eq!(over(&source(Dialect::Stream).terminate(Ask::End, false)), Some(false));
    let mut late = source(Dialect::Stream);
    assert_eq!(late.terminate(Ask::End, true), Decision::Stay);
    assert_eq!(late.terminate(Ask::Hangup, true), Decision::Stay, "a hangup never drops it");
    assert_eq!(over(&late.terminate(Ask::End, true)), Some(false));
    assert_eq!(over(&Source::new(false, false, Commit::Stored).terminate(Ask::End, false)), Some(false));
    assert_eq!(over(&Source::new(true, false, Commit::Stored).terminate(Ask::End, false)), Some(true));
    assert_eq!(over(&Source::new(true, false, Commit::Stored).terminate(Ask::Hangup, false)), Some(true));
}

#[test]
fn one_dump_at_a_time() {
    let mut stream = source(Dialect::Stream);
    assert!(stream.request(Dialect::Stream, true).is_err());
    assert!(stream.request(Dialect::Remote, false).is_err());
    let mut remote = source(Dialect::Remote);
    assert_eq!(remote.request(Dialect::Remote, false), Ok(Begun::Before));
    remote.ended(Ok(()));
    assert!(remote.request(Dialect::Remote, false).is_err());
}

#[test]
fn after_a_failure_a_remote_dump_is_refused_to_its_end() {
    let mut source = Source::new(true, false, Commit::Stored);
    source.link_up();
    source.request(Dialect::Remote, false).unwrap();
    assert_eq!(over(&source.link_lost("reset", false)), Some(false));
    assert!(source.request(Dialect::Remote, false).is_err());
    assert_eq!(source.ended(Ok(())), Decision::Nothing);
    assert_eq!(source.request(Dialect::Remote, false), Ok(Begun::Now));
    // Its CRIU may die without one: the next dump tells as well.
    assert_eq!(over(&source.link_lost("reset", false)), Some(false));
    assert_eq!(source.request(Dialect::Remote, true), Ok(Begun::Now));
    // A stream dump ends with its connection: nothing of it can come later.
    let mut source = Source::new(true, false, Commit::Stored);
    source.request(Dialect::Stream, true).unwrap();
    source.link_lost("reset", false);
    assert_eq!(source.request(Dialect::Stream, true), Ok(Begun::Now));
}

#[test]
fn an_idle_source_waits_for_its_link() {
    let mut once = Source::new(false, false, Commit::Stored);
    assert_eq!(over(&once.no_link("no".into(), false)), Some(false));
    let mut kept = Source::new(true, false, Commit::Stored);
    assert_eq!(kept.no_link("no".into(), false), Decision::Connect);
    kept.link_up();
    assert_eq!(kept.link_lost("closed", false), Decision::Connect);
    assert_eq!(kept.link_up(), Decision::Nothing, "there is nothing to send");
}

#[test]
fn whoever_was_asked_to_go_leaves_when_the_only_copy_is_safe() {
    let mut source = Source::new(true, false, Commit::Stored);
    source.link_up();
    source.request(Dialect::Stream, true).unwrap();
    source.ended(Ok(()));
    assert!(source.stays());
    assert_eq!(source.terminate(Ask::End, false), Decision::Stay);
    assert_eq!(over(&source.delivered()), Some(true));
    assert!(!source.stays());
}

fn scripted(leave_running: bool, commit: Commit) -> Source {
    let mut source = Source::new(false, leave_running, commit);
    source.link_up();
    source.request(Dialect::Stream, true).unwrap();
    source.is_announced();
    source
}

fn asking(leave_running: bool) -> Source {
    asking_for(leave_running, Commit::Stored)
}

fn asking_for(leave_running: bool, commit: Commit) -> Source {
    let mut source = scripted(leave_running, commit);
    assert_eq!(source.held(Ok(())), Decision::Nothing);
    assert!(source.is_held());
    source.asking();
    source
}

// Commit `restored`, and everything is stored.
fn preparing() -> Source {
    let mut source = asking_for(false, Commit::Restored);
    assert_eq!(source.prepared(), Decision::Nothing, "too early");
    assert_eq!(source.all_stored(), Decision::Nothing);
    assert!(source.is_preparing());
    source
}

#[test]
fn stored_then_dead_then_released() {
    let mut source = asking(false);
    assert_eq!(source.all_stored(), Decision::Allow);
    assert_eq!(source.criu_ended(Fate::Dead), Decision::Nothing, "its tasks are about to die");
    assert_eq!(source.source_died(), Decision::Say(Word::Release));
    // The word is said until it is acknowledged, on whichever link.
    assert_eq!(source.link_lost("reset", false), Decision::Connect);
    assert_eq!(source.no_link("none".into(), false), Decision::Connect);
    assert_eq!(source.link_up(), Decision::Say(Word::Release));
    assert_eq!(source.acknowledged(Word::Rollback), Decision::Nothing);
    assert_eq!(over(&source.acknowledged(Word::Release)), Some(true));
}

#[test]
fn one_that_lives_is_rolled_back() {
    let mut source = asking(false);
    source.all_stored();
    assert!(matches!(source.criu_ended(Fate::Lives), Decision::Deny(_)));
    assert_eq!(source.word(), Some(Word::Rollback));
    assert_eq!(source.source_died(), Decision::Nothing, "it does not change its mind");
    assert_eq!(over(&source.acknowledged(Word::Rollback)), Some(false));
    // Unless that was wanted.
    let mut source = asking(true);
    source.all_stored();
    assert_eq!(source.criu_ended(Fate::Lives), Decision::Say(Word::Release));
}

#[test]
fn before_the_cache_can_have_stored_it_nothing_need_be_said() {
    assert_eq!(over(&scripted(false, Commit::Stored).ended(Ok(()))), Some(false), "CRIU has not asked");
    assert_eq!(over(&scripted(false, Commit::Stored).link_lost("reset", false)), Some(false));
    let mut held = scripted(false, Commit::Stored);
    held.held(Ok(()));
    assert_eq!(over(&held.failed("the script has gone")), Some(false));
}

#[test]
fn a_confirmation_that_comes_too_late_is_rolled_back() {
    for event in [
        |source: &mut Source| source.failed("it takes too long"),
        |source: &mut Source| source.link_lost("reset", false),
        |source: &mut Source| source.criu_ended(Fate::Lives),
        |source: &mut Source| source.terminate(Ask::End, false),
    ] {
        let mut source = asking(false);
        assert!(matches!(event(&mut source), Decision::Deny(_)));
        assert_eq!(source.all_stored(), Decision::Nothing);
        // Nobody is waited for in vain: without a word the cache serves nothing.
        source.link_lost("reset", false);
        assert_eq!(over(&source.no_link("none".into(), false)), Some(false));
    }
}

#[test]
fn a_link_that_may_come_back_fails_nothing() {
    let held = || {
        let mut source = scripted(false, Commit::Stored);
        source.held(Ok(()));
        source
    };
    for (mut source, only_copy) in [
        (source(Dialect::Stream), false),
        (source(Dialect::Remote), false),
        (source(Dialect::Stream), true),
        (held(), false),
        (asking(false), false),
    ] {
        source.reconnects(true);
        for _ in 0..2 {
            assert_eq!(source.link_lost("reset", only_copy), Decision::Connect);
            assert!(source.is_torn() && !source.is_idle());
            assert_eq!(source.link_up(), Decision::SendAnew);
            assert!(!source.is_torn());
        }
        // What the cache says itself is no link that was lost.
        source.reconnects(false);
        let decision = source.link_lost("the cache has no memory", only_copy);
        assert!(only_copy == (decision == Decision::Connect), "{decision:?}");
    }
    let mut source = asking(false);
    source.reconnects(true);
    source.link_lost("reset", false);
    source.link_up();
    assert!(source.is_asking());
    assert_eq!(source.all_stored(), Decision::Allow);
}

#[test]
fn a_link_that_has_not_come_back_fails_what_can_be_failed() {
    let torn = |mut source: Source, only_copy| {
        source.reconnects(true);
        assert_eq!(source.link_lost("reset", only_copy), Decision::Connect);
        source
    };
    assert_eq!(over(&torn(source(Dialect::Stream), false).no_link("none".into(), false)), Some(false));
    assert_eq!(torn(source(Dialect::Stream), true).no_link("none".into(), true), Decision::Connect);
    let mut held = scripted(false, Commit::Stored);
    held.held(Ok(()));
    assert_eq!(over(&torn(held, false).no_link("none".into(), false)), Some(false));
    let mut source = torn(asking(false), false);
    assert!(matches!(source.no_link("none".into(), false), Decision::Deny(_)));
    assert_eq!(source.link_up(), Decision::Say(Word::Rollback));
    let mut source = asking(false);
    source.source_died();
    assert_eq!(
        torn(source, false).no_link("none".into(), false),
        Decision::Connect,
        "it is all that is left"
    );
    // What was lost with a cache that was started anew: CRIU can still be made to fail.
    assert_eq!(over(&torn(scripted(false, Commit::Stored), false).lost("it is gone")), Some(false));
    assert!(matches!(torn(asking(false), false).lost("it is gone"), Decision::Deny(_)));
}

#[test]
fn of_a_source_that_died_with_its_criu_the_images_are_all_that_is_left() {
    let mut source = asking(false);
    assert_eq!(source.source_died(), Decision::Nothing);
    assert_eq!(source.criu_ended(Fate::Dead), Decision::Nothing);
    assert_eq!(source.failed("the script has gone"), Decision::Nothing);
    assert_eq!(source.terminate(Ask::End, false), Decision::Stay);
    assert_eq!(source.link_lost("reset", false), Decision::Connect);
    assert_eq!(source.link_up(), Decision::SendAnew);
    assert_eq!(source.all_stored(), Decision::Allow);
    assert_eq!(source.source_died(), Decision::Say(Word::Release));
}

#[test]
fn prepared_then_dead_then_released() {
    let mut source = preparing();
    assert_eq!(source.prepared(), Decision::Allow);
    assert_eq!(source.restore_failed("it was killed"), Decision::Nothing, "another may take the images");
    assert_eq!(source.source_died(), Decision::Say(Word::Release));
    assert_eq!(over(&source.acknowledged(Word::Release)), Some(true));
}

#[test]
fn a_copy_that_does_not_stand_ready_is_rolled_back() {
    for event in [
        |source: &mut Source| source.failed("it takes too long"),
        |source: &mut Source| source.link_lost("reset", false),
        |source: &mut Source| source.criu_ended(Fate::Lives),
        |source: &mut Source| source.criu_ended(Fate::Broken),
        |source: &mut Source| source.terminate(Ask::End, false),
        |source: &mut Source| source.restore_failed("it was killed"),
    ] {
        let mut source = preparing();
        assert!(matches!(event(&mut source), Decision::Deny(_)));
        assert_eq!(source.prepared(), Decision::Nothing, "too late");
        assert_eq!(source.word(), Some(Word::Rollback));
    }
}

#[test]
fn without_a_restore_nothing_is_frozen_any_longer() {
    let mut source = scripted(false, Commit::Restored);
    assert_eq!(over(&source.restore_failed("none waits")), Some(false));
    let mut source = asking_for(false, Commit::Restored);
    assert!(matches!(source.restore_failed("none waits"), Decision::Deny(_)));
    let mut source = scripted(false, Commit::Stored);
    assert_eq!(source.restore_failed("none waits"), Decision::Nothing, "none is needed");
}

#[test]
fn a_source_that_died_does_not_wait_for_its_copy() {
    let mut source = preparing();
    assert_eq!(source.source_died(), Decision::Allow);
    let mut source = preparing();
    assert_eq!(source.criu_ended(Fate::Dead), Decision::Allow);
    assert_eq!(source.source_died(), Decision::Say(Word::Release));
    let mut source = asking_for(false, Commit::Restored);
    source.source_died();
    assert_eq!(source.all_stored(), Decision::Allow);
}

#[test]
fn a_source_of_which_a_half_is_left_is_finished() {
    let mut source = preparing();
    source.prepared();
    assert_eq!(source.criu_ended(Fate::Broken), Decision::Finish);
    assert_eq!(source.source_died(), Decision::Say(Word::Release));
}

#[test]
fn what_an_earlier_run_has_left() {
    let mut source = Source::new(false, false, Commit::Restored);
    source.recover(None, false);
    assert!(source.is_bound() && source.is_scripted() && !source.is_idle());
    assert_eq!(source.source_died(), Decision::Say(Word::Release));
    let mut source = Source::new(false, false, Commit::Restored);
    source.recover(None, false);
    assert!(matches!(source.criu_ended(Fate::Lives), Decision::Deny(_)));
    assert_eq!(source.link_up(), Decision::Say(Word::Rollback));
    // Of which a part ended by itself, or was killed: who knows?
    let half = || {
        let mut source = Source::new(false, false, Commit::Restored);
        source.recover(None, false);
        assert_eq!(source.criu_ended(Fate::Broken), Decision::Hold);
        source
    };
    assert!(matches!(half().resolve(Word::Rollback), Decision::Deny(_)));
    assert_eq!(half().source_died(), Decision::Say(Word::Release));
    for word in [Word::Release, Word::Rollback] {
        let mut source = Source::new(false, false, Commit::Restored);
        source.recover(Some(word), false);
        assert_eq!(source.no_link("none".into(), false), Decision::Connect);
        assert_eq!(source.link_up(), Decision::Say(word));
    }
}

#[test]
fn a_session_that_was_left_keeps_its_own_leave_running() {
    for (daemons, sessions) in [(false, true), (true, false)] {
        let mut source = Source::new(true, daemons, Commit::Stored);
        source.recover(None, sessions);
        let lives = source.criu_ended(Fate::Lives);
        assert_eq!(lives == Decision::Say(Word::Release), sessions);
        assert!(over(&source.acknowledged(if sessions { Word::Release } else { Word::Rollback })).is_some());
        assert_eq!(source.request(Dialect::Stream, true), Ok(Begun::Now));
        source.is_announced();
        source.held(Ok(()));
        source.asking();
        assert_eq!(source.all_stored(), Decision::Allow);
        assert_eq!(source.criu_ended(Fate::Lives) == Decision::Say(Word::Release), daemons);
    }
}

#[test]
fn what_the_operator_decides() {
    let mut source = preparing();
    assert!(matches!(source.resolve(Word::Rollback), Decision::Deny(_)));
    assert_eq!(source.resolve(Word::Release), Decision::Nothing);
    assert_eq!(over(&source.resolve(Word::Rollback)), Some(false));
    let mut source = preparing();
    source.prepared();
    assert_eq!(source.resolve(Word::Rollback), Decision::Nothing, "CRIU is killing it");
    source.source_died();
    assert_eq!(over(&source.resolve(Word::Release)), Some(true));
}

#[test]
fn what_was_stored_is_not_sent_anew() {
    let mut source = preparing();
    source.reconnects(true);
    assert_eq!(source.link_lost("reset", false), Decision::Connect);
    // CRIU and its tree are killed together while there is no link.
    assert_eq!(source.criu_ended(Fate::Dead), Decision::Allow);
    assert_eq!(source.link_up(), Decision::Nothing);
    assert_eq!(source.source_died(), Decision::Say(Word::Release));
}

#[test]
fn what_can_not_be_written_down_is_not_done() {
    let mut source = preparing();
    source.prepared();
    assert!(matches!(source.revoked("the disk is full"), Decision::Deny(_)));
    let mut source = preparing();
    source.source_died();
    assert_eq!(source.revoked("the disk is full"), Decision::Nothing, "it is dead already");
}
