//! The session on the source: from CRIU's first valid request until the images are delivered.

use super::{Ask, Asked, Decision, Dialect};

/// Where the dump is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dump {
    /// No session.
    None,
    /// CRIU is at it.
    Running(Dialect),
    /// CRIU has ended after a complete dump; the images are being delivered.
    Complete,
    /// It failed while a CRIU of the remote dialect goes on: nothing more of it is taken.
    Spoiled,
}

/// The source's side.
#[derive(Debug)]
pub struct Source {
    keep: bool,
    dump: Dump,
    linked: bool,
    // The link has been lost since the session began, so that the peer has not seen all of it.
    torn: bool,
    asked: Asked,
    last: Option<Result<(), ()>>,
}

impl Source {
    /// `keep`: another session follows.
    pub fn new(keep: bool) -> Self {
        Self { keep, dump: Dump::None, linked: false, torn: false, asked: Asked::default(), last: None }
    }

    /// CRIU makes a valid request. `first`: one with which dumps begin. An error is why it is refused, as the
    /// second half of a sentence.
    pub fn request(&mut self, dialect: Dialect, first: bool) -> Result<Begun, &'static str> {
        match self.dump {
            Dump::Spoiled if !first => {
                Err("was refused: its dump has failed, which ends with CRIU's finish or with the next dump")
            }
            Dump::None | Dump::Spoiled => {
                self.dump = Dump::Running(dialect);
                self.torn = false;
                Ok(Begun::Now)
            }
            Dump::Running(running) if running == dialect && dialect == Dialect::Remote => Ok(Begun::Before),
            Dump::Running(_) => Err("was refused: a dump is in progress, one at a time"),
            Dump::Complete => Err("was refused: the images of the last dump are still being delivered"),
        }
    }

    /// Whether there is a session that nothing has decided yet.
    pub fn is_running(&self) -> bool {
        matches!(self.dump, Dump::Running(_))
    }

    /// Whether everything is here and is to be delivered.
    pub fn is_complete(&self) -> bool {
        self.dump == Dump::Complete
    }

    /// Whether no session is in progress.
    pub fn is_idle(&self) -> bool {
        matches!(self.dump, Dump::None | Dump::Spoiled)
    }

    /// Whether another session may follow.
    pub fn stays(&self) -> bool {
        self.keep && !self.asked.leaves()
    }

    /// Whether it was to take more than one session.
    pub fn keeps(&self) -> bool {
        self.keep
    }

    /// Whether a link stands.
    pub fn is_linked(&self) -> bool {
        self.linked
    }

    /// The dialect of the dump that runs.
    pub fn dialect(&self) -> Option<Dialect> {
        match self.dump {
            Dump::Running(dialect) => Some(dialect),
            _ => None,
        }
    }

    /// CRIU has ended. `outcome`: whether what it left is a complete dump.
    pub fn ended(&mut self, outcome: Result<(), String>) -> Decision {
        match (self.dump, outcome) {
            (Dump::Running(_), Ok(())) => {
                self.dump = Dump::Complete;
                Decision::Nothing
            }
            (Dump::Running(_), Err(why)) => self.fail(&why, false),
            (Dump::Spoiled, _) => {
                self.dump = Dump::None;
                Decision::Nothing
            }
            (Dump::None | Dump::Complete, _) => Decision::Nothing,
        }
    }

    /// Something went wrong on this side: a writer, the memory.
    pub fn failed(&mut self, why: &str) -> Decision {
        match self.dump {
            Dump::Running(_) => self.fail(why, true),
            Dump::None | Dump::Complete | Dump::Spoiled => Decision::Nothing,
        }
    }

    /// A link stands.
    pub fn link_up(&mut self) -> Decision {
        self.linked = true;
        if std::mem::take(&mut self.torn) && !self.is_idle() { Decision::SendAnew } else { Decision::Nothing }
    }

    /// The link is lost. `only_copy`: CRIU may have finished already, so that it can't be made to fail.
    pub fn link_lost(&mut self, why: &str, only_copy: bool) -> Decision {
        self.linked = false;
        match self.dump {
            Dump::Running(_) if !only_copy => self.fail(&format!("the link was lost: {why}"), true),
            Dump::Running(_) | Dump::Complete => {
                self.torn = true;
                Decision::Connect
            }
            Dump::None | Dump::Spoiled => Decision::Connect,
        }
    }

    /// The link is lost, but nothing of this session has gone over it.
    pub fn unused_link_lost(&mut self) -> Decision {
        self.linked = false;
        Decision::Connect
    }

    /// No link could be had in the time allowed.
    pub fn no_link(&mut self, why: String, only_copy: bool) -> Decision {
        match self.dump {
            Dump::Running(_) if !only_copy => self.fail(&why, true),
            Dump::None if !self.keep => self.over(Err(why), false),
            _ => Decision::Connect,
        }
    }

    /// The peer has everything, as far as its protocol can tell.
    pub fn delivered(&mut self) -> Decision {
        self.linked = false;
        self.over(Ok(()), false)
    }

    /// A signal. What may be the only copy is given up at the second request to end, and never because
    /// a terminal has gone.
    pub fn terminate(&mut self, signal: Ask, only_copy: bool) -> Decision {
        let precious = self.is_complete() || (self.is_running() && only_copy);
        if precious && !self.asked.insists(signal) {
            return Decision::Stay;
        }
        match self.dump {
            Dump::Running(_) | Dump::Complete if precious => {
                let why = "asked twice to end: what may be the only copy of the process is given up";
                self.over(Err(why.into()), false)
            }
            Dump::Running(_) | Dump::Complete => self.fail("a signal ended it", false),
            Dump::None | Dump::Spoiled => match self.last {
                None if !self.keep => Decision::Over(Err("a signal ended it before any dump came".into())),
                last => Decision::Over(match last {
                    Some(Err(())) => Err("the last session had failed".into()),
                    _ => Ok(()),
                }),
            },
        }
    }

    fn fail(&mut self, why: &str, criu_goes_on: bool) -> Decision {
        self.over(Err(format!("the dump failed: {why}")), criu_goes_on)
    }

    fn over(&mut self, outcome: Result<(), String>, criu_goes_on: bool) -> Decision {
        let remote = self.dump == Dump::Running(Dialect::Remote);
        self.dump = if remote && criu_goes_on { Dump::Spoiled } else { Dump::None };
        self.last = Some(outcome.as_ref().map(|_| ()).map_err(|_| ()));
        Decision::Over(outcome)
    }
}

/// What a request means to the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It begins the session.
    Now,
    /// It belongs to the session that runs.
    Before,
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

    fn source(dialect: Dialect) -> Source {
        let mut source = Source::new(false);
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
        assert_eq!(over(&Source::new(false).terminate(Ask::End, false)), Some(false));
        assert_eq!(over(&Source::new(true).terminate(Ask::End, false)), Some(true));
        assert_eq!(over(&Source::new(true).terminate(Ask::Hangup, false)), Some(true));
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
        let mut source = Source::new(true);
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
        let mut source = Source::new(true);
        source.request(Dialect::Stream, true).unwrap();
        source.link_lost("reset", false);
        assert_eq!(source.request(Dialect::Stream, true), Ok(Begun::Now));
    }

    #[test]
    fn an_idle_source_waits_for_its_link() {
        let mut once = Source::new(false);
        assert_eq!(over(&once.no_link("no".into(), false)), Some(false));
        let mut kept = Source::new(true);
        assert_eq!(kept.no_link("no".into(), false), Decision::Connect);
        kept.link_up();
        assert_eq!(kept.link_lost("closed", false), Decision::Connect);
        assert_eq!(kept.link_up(), Decision::Nothing, "there is nothing to send");
    }

    #[test]
    fn whoever_was_asked_to_go_leaves_when_the_only_copy_is_safe() {
        let mut source = Source::new(true);
        source.link_up();
        source.request(Dialect::Stream, true).unwrap();
        source.ended(Ok(()));
        assert!(source.stays());
        assert_eq!(source.terminate(Ask::End, false), Decision::Stay);
        assert_eq!(over(&source.delivered()), Some(true));
        assert!(!source.stays());
    }
}
