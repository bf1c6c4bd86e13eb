//! The session on the destination: from the peer's first valid frame until a restore has succeeded.

use super::{Ask, Asked, Decision};

/// The destination's side.
#[derive(Debug)]
pub struct Sink {
    keep: bool,
    receiving: bool,
    held: Held,
    asked: Asked,
    last: Option<Result<(), ()>>,
}

/// What of the last complete session is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Nothing,
    /// Perhaps the only copy.
    Unrestored,
    Restored,
}

impl Sink {
    /// `keep`: another session follows.
    pub fn new(keep: bool) -> Self {
        Self { keep, receiving: false, held: Held::Nothing, asked: Asked::default(), last: None }
    }

    /// Somebody has sent a valid first frame. An error is why it is refused.
    pub fn peer(&mut self) -> Result<(), &'static str> {
        if self.receiving {
            return Err("was refused: a session is in progress, one at a time");
        }
        if self.is_full() {
            return Err("was refused: this cache has its dump already (--keep takes another)");
        }
        self.receiving = true;
        Ok(())
    }

    /// Whether images are coming in.
    pub fn is_receiving(&self) -> bool {
        self.receiving
    }

    /// Whether the last complete session has not been restored.
    pub fn has_only_copy(&self) -> bool {
        self.held == Held::Unrestored
    }

    /// Whether a peer may still come.
    pub fn takes_peers(&self) -> bool {
        self.stays() || self.held == Held::Nothing
    }

    /// Whether this cache has had its only session.
    pub fn is_full(&self) -> bool {
        !self.keep && self.held != Held::Nothing
    }

    /// Whether everything is done and nothing more is wanted.
    pub fn is_done(&self) -> bool {
        self.held == Held::Restored && !self.receiving && !self.stays()
    }

    /// Whether it was to take more than one session.
    pub fn keeps(&self) -> bool {
        self.keep
    }

    /// Whether another session may follow.
    pub fn stays(&self) -> bool {
        self.keep && !self.asked.leaves()
    }

    /// The peer has ended. `outcome`: whether what it left is a complete dump.
    pub fn peer_ended(&mut self, outcome: Result<(), String>) -> Decision {
        self.receiving = false;
        match outcome {
            Ok(()) => {
                self.held = Held::Unrestored;
                Decision::Nothing
            }
            Err(why) => {
                self.last = Some(Err(()));
                Decision::Over(Err(format!("the dump failed: {why}")))
            }
        }
    }

    /// A restore has ended; `success` as far as the dialect can tell.
    pub fn restore_ended(&mut self, success: bool) -> Decision {
        if !success || self.held == Held::Nothing {
            return Decision::Nothing;
        }
        self.held = Held::Restored;
        self.last = Some(Ok(()));
        Decision::Over(Ok(()))
    }

    /// A signal. What may be the only copy is given up at the second request to end, and never because
    /// a terminal has gone.
    pub fn terminate(&mut self, signal: Ask) -> Decision {
        if self.held == Held::Unrestored && !self.asked.insists(signal) {
            return Decision::Stay;
        }
        Decision::Over(match (self.held, self.last) {
            (Held::Unrestored, _) => {
                Err("asked twice to end: what may be the only copy of the process is given up".into())
            }
            _ if self.receiving => Err("the dump failed: a signal ended it before it was complete".into()),
            (_, Some(Err(()))) => Err("the last session had failed".into()),
            (_, None) if !self.keep => Err("a signal ended it before any dump came".into()),
            _ => Ok(()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(decision: &Decision) -> Option<bool> {
        match decision {
            Decision::Over(outcome) => Some(outcome.is_ok()),
            _ => None,
        }
    }

    #[test]
    fn a_cache_ends_with_a_restore_that_succeeded() {
        let mut sink = Sink::new(false);
        sink.peer().unwrap();
        assert!(sink.peer().is_err());
        assert_eq!(sink.peer_ended(Ok(())), Decision::Nothing);
        assert!(sink.peer().is_err() && !sink.takes_peers());
        assert_eq!(sink.restore_ended(false), Decision::Nothing);
        assert_eq!(sink.terminate(Ask::End), Decision::Stay);
        assert_eq!(over(&sink.restore_ended(true)), Some(true));
    }

    #[test]
    fn a_cache_that_keeps_takes_the_next() {
        let mut sink = Sink::new(true);
        assert_eq!(over(&sink.terminate(Ask::End)), Some(true));
        sink.peer().unwrap();
        assert_eq!(over(&sink.peer_ended(Err("reset".into()))), Some(false));
        sink.peer().unwrap();
        sink.peer_ended(Ok(()));
        assert!(sink.has_only_copy());
        sink.restore_ended(true);
        sink.peer().unwrap();
        assert_eq!(over(&sink.terminate(Ask::End)), Some(false), "a transfer is cut off");
    }

    #[test]
    fn what_was_not_restored_is_given_up_at_the_second_request() {
        for keep in [false, true] {
            let mut sink = Sink::new(keep);
            sink.peer().unwrap();
            sink.peer_ended(Ok(()));
            assert_eq!(sink.terminate(Ask::Hangup), Decision::Stay);
            assert_eq!(sink.terminate(Ask::End), Decision::Stay);
            assert_eq!(sink.terminate(Ask::Hangup), Decision::Stay);
            assert_eq!(over(&sink.terminate(Ask::End)), Some(false));
        }
    }
    #[test]
    fn whoever_was_asked_to_go_leaves_when_the_only_copy_is_safe() {
        let mut sink = Sink::new(true);
        sink.peer().unwrap();
        sink.peer_ended(Ok(()));
        assert_eq!(sink.terminate(Ask::End), Decision::Stay);
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
}
