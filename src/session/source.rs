//! The session on the source: from CRIU's first valid request until the images are delivered.

use super::{Ask, Asked, Dialect, Word};

/// What to do after an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Go on.
    Nothing,
    /// Scripted: let CRIU go on, which kills the source.
    Allow,
    /// Scripted: make CRIU fail, for this reason, and say the word.
    Deny(String),
    /// Scripted: say the word, now or when there is a link.
    Say(Word),
    /// Try to get a link.
    Connect,
    /// Send everything that is held, from the beginning, on the new link.
    SendAnew,
    /// Stay, although asked to go; the log says why.
    Stay,
    /// The session is over: close what belongs to it. On an error the link is reset.
    Over(Result<(), String>),
}

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
    /// Scripted: everything is here, CRIU is held at `post-dump`.
    Held,
    /// The same, and the cache has been told that this is all: it may have stored it.
    Asking,
    /// Scripted: confirmed, and CRIU was let go on. The source dies, or it turns out to live.
    Confirmed,
    /// Scripted: this word has to reach the cache.
    Saying(Word),
}

const UNCONFIRMED: &str = "criu dump ended before its images were confirmed";

/// The source's side.
#[derive(Debug)]
pub struct Source {
    keep: bool,
    // Whether the source may run on beside its copy.
    leave_running: bool,
    dump: Dump,
    scripted: bool,
    // Whether the cache has confirmed this session; whether every task of the source is dead.
    confirmed: bool,
    dead: bool,
    // Why it is rolled back.
    why: String,
    linked: bool,
    // The link has been lost since the session began, so that the peer has not seen all of it.
    torn: bool,
    asked: Asked,
    last: Option<Result<(), ()>>,
}

impl Source {
    /// `keep`: another session follows. `leave_running`: a copy is wanted, beside a source that runs on.
    pub fn new(keep: bool, leave_running: bool) -> Self {
        Self {
            keep,
            leave_running,
            dump: Dump::None,
            scripted: false,
            confirmed: false,
            dead: false,
            why: String::new(),
            linked: false,
            torn: false,
            asked: Asked::default(),
            last: None,
        }
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
                self.scripted = false;
                self.confirmed = false;
                self.dead = false;
                Ok(Begun::Now)
            }
            Dump::Running(running) if running == dialect && dialect == Dialect::Remote => Ok(Begun::Before),
            Dump::Running(_) => Err("was refused: a dump is in progress, one at a time"),
            Dump::Complete => Err("was refused: the images of the last dump are still being delivered"),
            Dump::Held | Dump::Asking | Dump::Confirmed | Dump::Saying(_) => {
                Err("was refused: the last dump is not decided yet")
            }
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

    /// CRIU's action script has announced the CRIU of the session that has just begun.
    pub fn is_announced(&mut self) {
        self.scripted = true;
    }

    /// Whether the session is scripted.
    pub fn is_scripted(&self) -> bool {
        self.scripted && !self.is_idle()
    }

    /// Whether CRIU waits at `post-dump`, and the cache has not been told that this is all.
    pub fn is_held(&self) -> bool {
        self.dump == Dump::Held
    }

    /// Scripted: the cache is told now that this is all.
    pub fn asking(&mut self) {
        if self.dump == Dump::Held {
            self.dump = Dump::Asking;
        }
    }

    /// Whether everything of the dump has come: nothing more is taken.
    pub fn has_all(&self) -> bool {
        !matches!(self.dump, Dump::None | Dump::Running(_) | Dump::Spoiled)
    }

    /// Whether the cache has to be found, however long that takes.
    pub fn is_bound(&self) -> bool {
        (self.confirmed || self.dead) && self.has_all() || self.dump == Dump::Complete
    }

    /// Whether the session that runs, or the last one, is scripted.
    pub fn was_scripted(&self) -> bool {
        self.scripted
    }

    /// The word that has to reach the cache.
    pub fn word(&self) -> Option<Word> {
        match self.dump {
            Dump::Saying(word) => Some(word),
            _ => None,
        }
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
            (Dump::Running(_), Ok(())) if self.scripted => {
                self.fail("CRIU ended without having asked at post-dump", false)
            }
            (Dump::Running(_), Ok(())) => {
                self.dump = Dump::Complete;
                Decision::Nothing
            }
            (Dump::Running(_), Err(why)) => self.fail(&why, false),
            (Dump::Spoiled, _) => {
                self.dump = Dump::None;
                Decision::Nothing
            }
            _ => Decision::Nothing,
        }
    }

    /// Scripted: CRIU is held at `post-dump`. `outcome`: whether what it left is a complete dump.
    pub fn held(&mut self, outcome: Result<(), String>) -> Decision {
        match (self.dump, outcome) {
            (Dump::Running(_), Ok(())) => {
                self.dump = Dump::Held;
                Decision::Nothing
            }
            (Dump::Running(_), Err(why)) => self.fail(&why, false),
            _ => Decision::Nothing,
        }
    }

    /// The cache has confirmed everything.
    pub fn all_stored(&mut self) -> Decision {
        match self.dump {
            Dump::Asking => {
                self.dump = Dump::Confirmed;
                self.confirmed = true;
                Decision::Allow
            }
            Dump::Complete => self.over(Ok(()), false),
            _ => Decision::Nothing,
        }
    }

    /// Scripted: every task of the source is dead. Should it have died before it was let go, the images are all
    /// that is left of it: nothing is rolled back from then on.
    pub fn source_died(&mut self) -> Decision {
        self.dead = true;
        match self.dump {
            Dump::Confirmed => self.say(Word::Release),
            _ => Decision::Nothing,
        }
    }

    /// Whether every task of the source is dead, or about to die for certain.
    pub fn is_source_dead(&self) -> bool {
        self.dead
    }

    /// Scripted: CRIU has ended. `lives`: a task of the source does, with no SIGKILL on its way.
    pub fn criu_ended(&mut self, lives: bool) -> Decision {
        self.dead |= !lives;
        match self.dump {
            Dump::Confirmed if self.leave_running => self.say(Word::Release),
            Dump::Confirmed if lives => self.roll_back("criu dump ended, but the source was not killed"),
            Dump::Held | Dump::Asking if self.dead => Decision::Nothing,
            Dump::Held => self.fail(UNCONFIRMED, false),
            Dump::Asking => self.roll_back(UNCONFIRMED),
            _ => Decision::Nothing,
        }
    }

    /// Scripted: the cache has acknowledged the word.
    pub fn acknowledged(&mut self, word: Word) -> Decision {
        match self.dump {
            Dump::Saying(said) if said == word => match word {
                Word::Release => self.over(Ok(()), false),
                Word::Rollback => {
                    let why = std::mem::take(&mut self.why);
                    self.over(Err(format!("the dump failed: {why}; the cache has rolled back")), false)
                }
            },
            _ => Decision::Nothing,
        }
    }

    /// Scripted: the cache does not have the session that the word is about.
    pub fn disowned(&mut self, why: &str) -> Decision {
        match self.dump {
            Dump::Saying(Word::Release) => {
                self.over(Err(format!("the source is dead, and the cache has lost its images: {why}")), false)
            }
            Dump::Saying(Word::Rollback) => self.acknowledged(Word::Rollback),
            _ => Decision::Nothing,
        }
    }

    /// What had been sent is lost and can't be sent again: it was not kept.
    pub fn lost(&mut self, why: &str) -> Decision {
        self.over(Err(format!(
            "{why}, and what had been sent was not kept (--retain, --splice): if CRIU has killed the process, it is lost"
        )), true)
    }

    fn say(&mut self, word: Word) -> Decision {
        self.dump = Dump::Saying(word);
        Decision::Say(word)
    }

    fn roll_back(&mut self, why: &str) -> Decision {
        self.dump = Dump::Saying(Word::Rollback);
        why.clone_into(&mut self.why);
        Decision::Deny(why.into())
    }

    /// Something went wrong on this side: a writer, the memory.
    pub fn failed(&mut self, why: &str) -> Decision {
        match self.dump {
            Dump::Held | Dump::Asking if self.dead => Decision::Nothing,
            Dump::Running(_) => self.fail(why, true),
            Dump::Held => self.fail(why, false),
            Dump::Asking => self.roll_back(why),
            _ => Decision::Nothing,
        }
    }

    /// A link stands.
    pub fn link_up(&mut self) -> Decision {
        self.linked = true;
        if let Dump::Saying(word) = self.dump {
            return Decision::Say(word);
        }
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
            Dump::Asking if self.dead => {
                self.torn = true;
                Decision::Connect
            }
            Dump::Held => self.fail(&format!("the link was lost: {why}"), false),
            Dump::Asking => {
                self.roll_back(&format!("the link was lost before the cache had confirmed: {why}"))
            }
            Dump::None | Dump::Spoiled | Dump::Confirmed | Dump::Saying(_) => Decision::Connect,
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
            Dump::Saying(Word::Rollback) if !self.confirmed => {
                let failed = std::mem::take(&mut self.why);
                let why = format!(
                    "the dump failed: {failed}; the source runs on, but the cache could not be told ({why}): should \
                     it have the images, it does not serve them"
                );
                self.over(Err(why), false)
            }
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
        let precious = matches!(self.dump, Dump::Complete | Dump::Confirmed | Dump::Saying(_))
            || (self.is_running() && only_copy)
            || (self.dead && self.has_all());
        if precious && !self.asked.insists(signal) {
            return Decision::Stay;
        }
        match self.dump {
            Dump::Running(_) | Dump::Complete if precious => {
                let why = "asked twice to end: what may be the only copy of the process is given up";
                self.over(Err(why.into()), false)
            }
            Dump::Held if !self.dead => self.fail("a signal ended it", false),
            Dump::Asking if !self.dead => {
                self.asked.insists(signal);
                self.roll_back("a signal ended it")
            }
            Dump::Held | Dump::Asking | Dump::Confirmed | Dump::Saying(Word::Release) => {
                let why =
                    "asked twice to end: the cache holds the images and has not been told to release them";
                self.over(Err(why.into()), false)
            }
            Dump::Saying(Word::Rollback) => {
                let why =
                    "asked twice to end: the source runs, and the cache has not been told to drop its images";
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
        let mut source = Source::new(false, false);
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
        assert_eq!(over(&Source::new(false, false).terminate(Ask::End, false)), Some(false));
        assert_eq!(over(&Source::new(true, false).terminate(Ask::End, false)), Some(true));
        assert_eq!(over(&Source::new(true, false).terminate(Ask::Hangup, false)), Some(true));
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
        let mut source = Source::new(true, false);
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
        let mut source = Source::new(true, false);
        source.request(Dialect::Stream, true).unwrap();
        source.link_lost("reset", false);
        assert_eq!(source.request(Dialect::Stream, true), Ok(Begun::Now));
    }

    #[test]
    fn an_idle_source_waits_for_its_link() {
        let mut once = Source::new(false, false);
        assert_eq!(over(&once.no_link("no".into(), false)), Some(false));
        let mut kept = Source::new(true, false);
        assert_eq!(kept.no_link("no".into(), false), Decision::Connect);
        kept.link_up();
        assert_eq!(kept.link_lost("closed", false), Decision::Connect);
        assert_eq!(kept.link_up(), Decision::Nothing, "there is nothing to send");
    }

    #[test]
    fn whoever_was_asked_to_go_leaves_when_the_only_copy_is_safe() {
        let mut source = Source::new(true, false);
        source.link_up();
        source.request(Dialect::Stream, true).unwrap();
        source.ended(Ok(()));
        assert!(source.stays());
        assert_eq!(source.terminate(Ask::End, false), Decision::Stay);
        assert_eq!(over(&source.delivered()), Some(true));
        assert!(!source.stays());
    }

    fn scripted(leave_running: bool) -> Source {
        let mut source = Source::new(false, leave_running);
        source.link_up();
        source.request(Dialect::Stream, true).unwrap();
        source.is_announced();
        source
    }

    fn asking(leave_running: bool) -> Source {
        let mut source = scripted(leave_running);
        assert_eq!(source.held(Ok(())), Decision::Nothing);
        assert!(source.is_held());
        source.asking();
        source
    }

    #[test]
    fn stored_then_dead_then_released() {
        let mut source = asking(false);
        assert_eq!(source.all_stored(), Decision::Allow);
        assert_eq!(source.criu_ended(false), Decision::Nothing, "its tasks are about to die");
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
        assert!(matches!(source.criu_ended(true), Decision::Deny(_)));
        assert_eq!(source.word(), Some(Word::Rollback));
        assert_eq!(source.source_died(), Decision::Nothing, "it does not change its mind");
        assert_eq!(over(&source.acknowledged(Word::Rollback)), Some(false));
        // Unless that was wanted.
        let mut source = asking(true);
        source.all_stored();
        assert_eq!(source.criu_ended(true), Decision::Say(Word::Release));
    }

    #[test]
    fn before_the_cache_can_have_stored_it_nothing_need_be_said() {
        assert_eq!(over(&scripted(false).ended(Ok(()))), Some(false), "CRIU has not asked");
        assert_eq!(over(&scripted(false).link_lost("reset", false)), Some(false));
        let mut held = scripted(false);
        held.held(Ok(()));
        assert_eq!(over(&held.failed("the script has gone")), Some(false));
    }

    #[test]
    fn a_confirmation_that_comes_too_late_is_rolled_back() {
        for event in [
            |source: &mut Source| source.failed("it takes too long"),
            |source: &mut Source| source.link_lost("reset", false),
            |source: &mut Source| source.criu_ended(true),
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
    fn of_a_source_that_died_with_its_criu_the_images_are_all_that_is_left() {
        let mut source = asking(false);
        assert_eq!(source.source_died(), Decision::Nothing);
        assert_eq!(source.criu_ended(false), Decision::Nothing);
        assert_eq!(source.failed("the script has gone"), Decision::Nothing);
        assert_eq!(source.terminate(Ask::End, false), Decision::Stay);
        assert_eq!(source.link_lost("reset", false), Decision::Connect);
        assert_eq!(source.link_up(), Decision::SendAnew);
        assert_eq!(source.all_stored(), Decision::Allow);
        assert_eq!(source.source_died(), Decision::Say(Word::Release));
    }
}
