//! The session on the source: from CRIU's first valid request until the images are delivered.

use super::{Ask, Asked, Commit, Dialect, Word};

/// What to do after an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Go on.
    Nothing,
    /// Scripted: let CRIU go on, which kills the source.
    Allow,
    /// Scripted: kill what is left of the source. CRIU has ended in the middle of that, and a half of it is no use.
    Finish,
    /// Scripted: a part of the source lives, and nobody knows why. The operator decides.
    Hold,
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
    /// Commit `restored`: it is stored, and the copy is being made. CRIU is held.
    Stored,
    /// Scripted: confirmed, and CRIU was let go on. The source dies, or it turns out to live.
    Confirmed,
    /// Scripted: this word has to reach the cache.
    Saying(Word),
}

/// What of the source is left when its CRIU has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All of it.
    Lives,
    /// Some tasks were killed and some were not.
    Broken,
    /// Nothing, or nothing without a SIGKILL on its way.
    Dead,
}

const UNCONFIRMED: &str = "criu dump ended before its images were confirmed";
const UNPREPARED: &str = "criu dump ended before the copy stood ready";

/// The source's side.
#[derive(Debug)]
pub struct Source {
    keep: bool,
    // Whether the source may run on beside its copy: of the sessions that begin here, and of the one that runs.
    leave_running: bool,
    runs_on: bool,
    commit: Commit,
    dump: Dump,
    scripted: bool,
    // Whether the cache has confirmed this session; whether every task of the source is dead.
    confirmed: bool,
    dead: bool,
    // It was begun by an earlier run of this daemon.
    recovered: bool,
    // Why it is rolled back.
    why: String,
    linked: bool,
    // The link has been lost since the session began, so that the peer has not seen all of it.
    torn: bool,
    // A link that is lost may come back (--reconnect): the peer keeps what it has seen.
    reconnects: bool,
    asked: Asked,
    last: Option<Result<(), ()>>,
}

impl Source {
    /// `keep`: another session follows. `leave_running`: a copy is wanted, beside a source that runs on.
    pub fn new(keep: bool, leave_running: bool, commit: Commit) -> Self {
        Self {
            keep,
            leave_running,
            runs_on: leave_running,
            commit,
            dump: Dump::None,
            scripted: false,
            confirmed: false,
            dead: false,
            recovered: false,
            why: String::new(),
            linked: false,
            torn: false,
            reconnects: false,
            asked: Asked::default(),
            last: None,
        }
    }

    /// A session that an earlier run of this daemon has left undecided. `word`: it had decided; otherwise what is left
    /// of the source decides, as if CRIU had been let go. `leave_running`: what was wanted of that session.
    pub fn recover(&mut self, word: Option<Word>, leave_running: bool) {
        self.runs_on = leave_running;
        self.recovered = true;
        self.scripted = true;
        self.confirmed = true;
        self.dead = word == Some(Word::Release);
        self.dump = word.map_or(Dump::Confirmed, Dump::Saying);
        if word == Some(Word::Rollback) {
            self.why = "it was rolled back before this daemon was started".into();
        }
    }

    /// Whether the session goes on when its link is lost now, should another be had in time.
    pub fn reconnects(&mut self, may: bool) {
        self.reconnects = may;
    }

    /// Whether the session's link has been lost, and there is no other yet that it could go on over.
    pub fn is_torn(&self) -> bool {
        self.torn && !self.is_idle() && self.word().is_none()
    }

    /// Whether the cache has been told that this is all, and has not confirmed it.
    pub fn is_asking(&self) -> bool {
        self.dump == Dump::Asking
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
                self.recovered = false;
                self.runs_on = self.leave_running;
                Ok(Begun::Now)
            }
            Dump::Running(running) if running == dialect && dialect == Dialect::Remote => Ok(Begun::Before),
            Dump::Running(_) => Err("was refused: a dump is in progress, one at a time"),
            Dump::Complete => Err("was refused: the images of the last dump are still being delivered"),
            Dump::Held | Dump::Asking | Dump::Stored | Dump::Confirmed | Dump::Saying(_) => {
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
            // Of a source that is dead already nothing else is left: its images are released at once.
            Dump::Asking if self.commit == Commit::Stored || self.dead => self.allow(),
            Dump::Asking => {
                self.dump = Dump::Stored;
                Decision::Nothing
            }
            Dump::Complete => self.over(Ok(()), false),
            _ => Decision::Nothing,
        }
    }

    /// Commit `restored`: the copy stands ready, and runs as soon as it is released.
    pub fn prepared(&mut self) -> Decision {
        match self.dump {
            Dump::Stored => self.allow(),
            _ => Decision::Nothing,
        }
    }

    /// CRIU was about to be let go, and could not be: that was not to be recorded.
    pub fn revoked(&mut self, why: &str) -> Decision {
        match self.dump {
            Dump::Confirmed if !self.dead => self.roll_back(why),
            _ => Decision::Nothing,
        }
    }

    /// Whether the copy is being made, and CRIU is held until it stands ready.
    pub fn is_preparing(&self) -> bool {
        self.dump == Dump::Stored
    }

    /// Commit `restored`: no restore waits any more, or the one that was at it has failed. Once CRIU was let go it
    /// means nothing: the cache has the images, and another restore may take them.
    pub fn restore_failed(&mut self, why: &str) -> Decision {
        match self.dump {
            _ if self.commit == Commit::Stored || !self.scripted => Decision::Nothing,
            Dump::Running(_) => self.fail(why, true),
            Dump::Held | Dump::Asking if self.dead => Decision::Nothing,
            Dump::Held => self.fail(why, false),
            Dump::Asking | Dump::Stored => self.roll_back(why),
            _ => Decision::Nothing,
        }
    }

    fn allow(&mut self) -> Decision {
        self.dump = Dump::Confirmed;
        self.confirmed = true;
        Decision::Allow
    }

    /// Scripted: every task of the source is dead, or dies for certain. Should it have died before it was let go, the
    /// images are all that is left of it: nothing is rolled back from then on.
    pub fn source_died(&mut self) -> Decision {
        self.dead = true;
        match self.dump {
            Dump::Confirmed => self.say(Word::Release),
            Dump::Stored => self.allow(),
            _ => Decision::Nothing,
        }
    }

    /// Whether CRIU was let go, to kill the source.
    pub fn is_being_killed(&self) -> bool {
        self.dump == Dump::Confirmed && !self.runs_on
    }

    /// Whether every task of the source is dead, or about to die for certain.
    pub fn is_source_dead(&self) -> bool {
        self.dead
    }

    /// Scripted: CRIU has ended, and this is what it has left.
    pub fn criu_ended(&mut self, fate: Fate) -> Decision {
        self.dead |= fate == Fate::Dead;
        match self.dump {
            Dump::Confirmed if self.runs_on => self.say(Word::Release),
            // What became of CRIU behind our back is not known.
            Dump::Confirmed if fate == Fate::Broken && self.recovered => Decision::Hold,
            Dump::Confirmed if fate == Fate::Broken => Decision::Finish,
            Dump::Confirmed if fate == Fate::Lives => {
                self.roll_back("criu dump ended, but the source was not killed")
            }
            Dump::Held | Dump::Asking if self.dead => Decision::Nothing,
            Dump::Held => self.fail(UNCONFIRMED, false),
            Dump::Asking => self.roll_back(UNCONFIRMED),
            Dump::Stored if self.dead => self.allow(),
            Dump::Stored => self.roll_back(UNPREPARED),
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

    /// The operator decides, having made sure that it fits: the source is dead, or a part of it lives. Nothing: it is
    /// decided otherwise. He sees to it that the cache learns of it, if it can't be told.
    pub fn resolve(&mut self, word: Word) -> Decision {
        match (self.dump, word) {
            (Dump::Saying(said), Word::Release) if said == word => self.over(Ok(()), false),
            (Dump::Saying(said), Word::Rollback) if said == word => {
                let why = std::mem::take(&mut self.why);
                self.over(Err(format!("the dump failed: {why}; it was rolled back by hand")), false)
            }
            (Dump::Asking | Dump::Stored, Word::Rollback) => self.roll_back("it was rolled back by hand"),
            (Dump::Confirmed, Word::Rollback) if self.recovered => {
                self.roll_back("it was rolled back by hand")
            }
            _ => Decision::Nothing,
        }
    }

    /// What had been sent is lost and can't be sent again: it was not kept.
    pub fn lost(&mut self, why: &str) -> Decision {
        // CRIU can still be made to fail.
        if self.scripted && !self.dead {
            return self.failed(&format!("{why}, and what had been sent was not kept"));
        }
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
            Dump::Asking | Dump::Stored => self.roll_back(why),
            _ => Decision::Nothing,
        }
    }

    /// A link stands.
    pub fn link_up(&mut self) -> Decision {
        self.linked = true;
        if let Dump::Saying(word) = self.dump {
            return Decision::Say(word);
        }
        let torn = std::mem::take(&mut self.torn);
        match self.dump {
            // In the last case it was all stored, and what becomes of the source decides.
            Dump::None | Dump::Spoiled | Dump::Confirmed => Decision::Nothing,
            _ if torn => Decision::SendAnew,
            _ => Decision::Nothing,
        }
    }

    /// The link is lost. `only_copy`: CRIU may have finished already, so that it can't be made to fail.
    pub fn link_lost(&mut self, why: &str, only_copy: bool) -> Decision {
        self.linked = false;
        match self.dump {
            // The dump goes on; it fails when no link can be had in time.
            Dump::Running(_) | Dump::Held | Dump::Asking | Dump::Stored if self.reconnects => {
                self.torn = true;
                Decision::Connect
            }
            Dump::Running(_) if !only_copy => self.fail(&format!("the link was lost: {why}"), true),
            Dump::Running(_) | Dump::Complete => {
                self.torn = true;
                Decision::Connect
            }
            Dump::Held | Dump::Asking if self.dead => {
                self.torn = true;
                Decision::Connect
            }
            Dump::Held => self.fail(&format!("the link was lost: {why}"), false),
            Dump::Asking => {
                self.roll_back(&format!("the link was lost before the cache had confirmed: {why}"))
            }
            Dump::Stored => self.roll_back(&format!("the link was lost before the copy stood ready: {why}")),
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
            // Its link was lost and has not come back.
            Dump::Held if !self.dead => self.fail(&why, false),
            Dump::Asking | Dump::Stored if !self.dead => self.roll_back(&why),
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
            Dump::Asking | Dump::Stored if !self.dead => {
                self.asked.insists(signal);
                self.roll_back("a signal ended it")
            }
            Dump::Held | Dump::Asking | Dump::Stored | Dump::Confirmed | Dump::Saying(Word::Release) => {
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
mod tests;
