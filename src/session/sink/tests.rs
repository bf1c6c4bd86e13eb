use super::*;

fn over(decision: &Decision) -> Option<bool> {
    match decision {
        Decision::Over(outcome) => Some(outcome.is_ok()),
        _ => None,
    }
}

#[test]
fn a_cache_ends_with_a_restore_that_succeeded() {
    let mut sink = Sink::new(false, false);
    sink.peer().unwrap();
    assert!(sink.peer().is_err());
    assert_eq!(sink.peer_ended(Ok(())), Decision::Nothing);
    assert!(sink.peer().is_err() && !sink.takes_peers());
    assert_eq!(sink.restore_ended(false), Decision::Nothing);
    assert_eq!(sink.terminate(Ask::End, false), Decision::Stay);
    assert_eq!(over(&sink.restore_ended(true)), Some(true));
}

#[test]
fn a_cache_that_keeps_takes_the_next() {
    let mut sink = Sink::new(true, false);
    assert_eq!(over(&sink.terminate(Ask::End, false)), Some(true));
    sink.peer().unwrap();
    assert_eq!(over(&sink.peer_ended(Err("reset".into()))), Some(false));
    sink.peer().unwrap();
    sink.peer_ended(Ok(()));
    assert!(sink.has_only_copy());
    sink.restore_ended(true);
    sink.peer().unwrap();
    assert_eq!(over(&sink.terminate(Ask::End, false)), Some(false), "a transfer is cut off");
}

#[test]
fn what_was_not_restored_is_given_up_at_the_second_request() {
    for keep in [false, true] {
        let mut sink = Sink::new(keep, false);
        sink.peer().unwrap();
        sink.peer_ended(Ok(()));
        assert_eq!(sink.terminate(Ask::Hangup, false), Decision::Stay);
        assert_eq!(sink.terminate(Ask::End, false), Decision::Stay);
        assert_eq!(sink.terminate(Ask::Hangup, false), Decision::Stay);
        assert_eq!(over(&sink.terminate(Ask::End, false)), Some(false));
    }
}
#[test]
fn whoever_was_asked_to_go_leaves_when_the_only_copy_is_safe() {
    let mut sink = Sink::new(true, false);
    sink.peer().unwrap();
    sink.peer_ended(Ok(()));
    assert_eq!(sink.terminate(Ask::End, false), Decision::Stay);
    assert!(!sink.takes_peers());
    // One that waits already may have sent its whole session.
    sink.peer().unwrap();
    assert_eq!(over(&sink.restore_ended(true)), Some(true));
    assert!(!sink.is_done());
    sink.peer_ended(Ok(()));
    assert!(!sink.is_done() && sink.has_only_copy());
    sink.restore_ended(true);
    assert!(sink.is_done());
}

#[test]
fn a_stored_session_is_decided_once() {
    let (one, two) = ([1; 16], [2; 16]);
    let mut sink = Sink::new(true, false);
    sink.peer().unwrap();
    sink.hold(one, Commit::Stored);
    assert!(sink.peer().is_err() && sink.has_only_copy() && sink.is_busy());
    assert_eq!(sink.hear(two, Word::Release), Heard::Unknown);
    assert_eq!(sink.hear(one, Word::Release), Heard::Decides);
    sink.peer_ended(Ok(()));
    assert_eq!(sink.hear(one, Word::Release), Heard::Again);
    assert_eq!(sink.hear(one, Word::Rollback), Heard::Contradicts);
    assert_eq!(sink.terminate(Ask::End, false), Decision::Stay, "it has not been restored");
    // What was rolled back before it was complete is not taken when it is.
    assert_eq!(sink.hear(two, Word::Rollback), Heard::Unknown);
    assert_eq!(sink.settled(&two), Some(Settled::Said(Word::Rollback)));
    assert_eq!(sink.hear(two, Word::Release), Heard::Contradicts);
}

#[test]
fn a_session_without_its_word_is_given_up_at_the_second_request() {
    let mut sink = Sink::new(false, false);
    sink.peer().unwrap();
    sink.hold([1; 16], Commit::Stored);
    assert!(sink.is_full() && !sink.takes_peers());
    assert_eq!(sink.terminate(Ask::Hangup, false), Decision::Stay);
    assert_eq!(sink.terminate(Ask::End, false), Decision::Stay);
    assert_eq!(over(&sink.terminate(Ask::End, false)), Some(false));
}

#[test]
fn one_restore_gets_the_images_before_the_word() {
    let mut sink = Sink::new(true, false);
    sink.peer().unwrap();
    sink.hold([1; 16], Commit::Stored);
    assert!(!sink.offers());
    sink.hear([1; 16], Word::Rollback);
    sink.peer_ended(Err("rolled back".into()));
    sink.peer().unwrap();
    sink.hold([2; 16], Commit::Restored);
    assert!(sink.offers() && !sink.prepared() && !sink.copy_failed());
    sink.copying();
    assert!(!sink.offers() && sink.copy_stands_ready([2; 16]).is_none());
    assert!(sink.prepared() && !sink.prepared());
    assert_eq!(sink.copy_stands_ready([2; 16]), Some(true));
    // It died: its source may have been let go, and no second copy is made before it has spoken.
    assert!(sink.copy_failed() && !sink.copy_failed() && !sink.offers());
    assert_eq!(sink.copy_stands_ready([2; 16]), Some(false));
    assert_eq!(sink.hear([2; 16], Word::Release), Heard::Decides);
    assert!(!sink.copy_failed());
}

#[test]
fn what_an_earlier_run_has_left() {
    let mut sink = Sink::new(false, false);
    sink.recover([1; 16], None);
    assert!(sink.has_only_copy() && !sink.offers() && sink.peer().is_err());
    assert_eq!(sink.hear([1; 16], Word::Release), Heard::Decides);
    sink.lost([1; 16]);
    assert!(sink.settled(&[1; 16]).is_some(), "it has been decided");
    sink.recover([3; 16], None);
    sink.lost([3; 16]);
    assert_eq!(sink.hear([3; 16], Word::Release), Heard::Unknown);
    let mut sink = Sink::new(false, false);
    sink.recover([4; 16], Some(Word::Release));
    assert_eq!(over(&sink.restore_ended(true)), Some(true));
    let mut sink = Sink::new(false, false);
    sink.recover([2; 16], Some(Word::Rollback));
    assert_eq!(sink.hear([2; 16], Word::Rollback), Heard::Again);
    assert_eq!(sink.hear([2; 16], Word::Release), Heard::Contradicts);
}
