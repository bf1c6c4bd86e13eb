//! The session on the destination: from the peer's first valid frame until a restore has succeeded.

use std::collections::VecDeque;

use super::{Ask, Asked, Commit, Word, remember};
use crate::wire::relay::SessionId;

/// The destination's side.
#[derive(Debug)]
pub struct Sink {
    keep: bool,
    // Whether a dump that was not restored is in the next one's way.
    in_view: bool,
    receiving: bool,
    held: Held,
    // A scripted session that is stored and waits for its word.
    stored: Option<Stored>,
    settled: VecDeque<(SessionId, Settled)>,
    asked: Asked,
    last: Option<Result<(), ()>>,
}

#[derive(Clone, Copy, Debug)]
struct Stored {
    id: SessionId,
    copy: Copy,
}

/// What has become of the images of a session that waits for its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    /// Commit `stored`: nobody gets them before the word.
    Withheld,
    /// Commit `restored`: they are for the restore that waits.
    Offered,
    /// A restore is at it, or the copy is being stopped.
    Making,
    /// The copy is stopped and may run at once.
    Prepared,
    /// The one restore that got them has failed, or its copy has died. Nobody else gets them before the word.
    Failed,
}

/// What of the last complete session is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Nothing,
    /// Perhaps the only copy.
    Unrestored,
    Restored,
}

/// What to do after an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Go on.
    Nothing,
    /// Stay, although asked to go; the log says why.
    Stay,
    /// The session is over: close what belongs to it.
    Over(Result<(), String>),
}

/// What became of a session that was stored completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Not scripted, and taken.
    Taken,
    /// The word was said.
    Said(Word),
}

/// What a word from the source means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It decides about the images that are stored.
    Decides,
    /// It has been said before.
    Again,
    /// It concerns no session that is known here.
    Unknown,
    /// The opposite has been said.
    Contradicts,
}

impl Sink {
    /// `keep`: another session follows. `in_view`: not before the last one has been restored, which is where its images
    /// would be.
    pub fn new(keep: bool, in_view: bool) -> Self {
        Self {
            keep,
            in_view,
            receiving: false,
            held: Held::Nothing,
            stored: None,
            settled: VecDeque::new(),
            asked: Asked::default(),
            last: None,
        }
    }

    /// Somebody has sent a valid first frame. An error is why it is refused.
    pub fn peer(&mut self) -> Result<(), &'static str> {
        if self.receiving {
            return Err("was refused: a session is in progress, one at a time");
        }
        if self.stored.is_some() {
            return Err(
                "was refused: the last dump is stored, and its source has not said what becomes of it",
            );
        }
        if self.is_full() {
            return Err("was refused: this cache has its dump already (--keep takes another)");
        }
        if self.in_view && self.held == Held::Unrestored {
            return Err("was refused: the last dump, whose images are in the view, has not been restored");
        }
        self.receiving = true;
        Ok(())
    }

    /// Whether images are coming in.
    pub fn is_receiving(&self) -> bool {
        self.receiving
    }

    /// Whether the last complete session has been restored.
    pub fn is_restored(&self) -> bool {
        self.held == Held::Restored
    }

    /// Whether a session is in progress that another one has to wait for.
    pub fn is_busy(&self) -> bool {
        self.receiving || self.stored.is_some()
    }

    /// Whether the last complete session has not been restored.
    pub fn has_only_copy(&self) -> bool {
        self.held == Held::Unrestored || self.stored.is_some()
    }

    /// Whether a peer may still come.
    pub fn takes_peers(&self) -> bool {
        self.stays() || (self.held == Held::Nothing && self.stored.is_none())
    }

    /// Whether this cache has had its only session.
    pub fn is_full(&self) -> bool {
        !self.keep && (self.held != Held::Nothing || self.stored.is_some())
    }

    /// The scripted session that waits for its word.
    pub fn stored(&self) -> Option<SessionId> {
        self.stored.map(|stored| stored.id)
    }

    /// Whether the images of that session are for a restore that waits.
    pub fn offers(&self) -> bool {
        matches!(self.stored, Some(Stored { copy: Copy::Offered, .. }))
    }

    /// A restore has got them: no other one does.
    pub fn copying(&mut self) {
        self.step(&[Copy::Offered], Copy::Making);
    }

    /// The copy is stopped, with all its tasks. Whether the source is to be told.
    pub fn prepared(&mut self) -> bool {
        self.step(&[Copy::Making], Copy::Prepared)
    }

    /// The restore has failed, or the copy has died. Whether the source is to be told: it knows already if it has
    /// decided.
    pub fn copy_failed(&mut self) -> bool {
        self.step(&[Copy::Making, Copy::Prepared], Copy::Failed)
    }

    /// What was said of the copy of that session: that it stands ready, or that it failed.
    pub fn copy_stands_ready(&self, id: SessionId) -> Option<bool> {
        match self.stored.filter(|stored| stored.id == id)?.copy {
            Copy::Prepared => Some(true),
            Copy::Failed => Some(false),
            Copy::Withheld | Copy::Offered | Copy::Making => None,
        }
    }

    fn step(&mut self, from: &[Copy], to: Copy) -> bool {
        match &mut self.stored {
            Some(stored) if from.contains(&stored.copy) => {
                stored.copy = to;
                true
            }
            _ => false,
        }
    }

    /// Whether the source of any session may come back.
    pub fn knows_any(&self) -> bool {
        self.stored.is_some() || !self.settled.is_empty()
    }

    /// What became of that session.
    pub fn settled(&self, id: &SessionId) -> Option<Settled> {
        self.settled.iter().find(|(known, _)| known == id).map(|(_, settled)| *settled)
    }

    /// All of a session that is not scripted has been stored; it is told of by [`Sink::peer_ended`].
    pub fn taken(&mut self, id: SessionId) {
        remember(&mut self.settled, (id, Settled::Taken));
    }

    /// All of a scripted session has been stored: it waits for its word.
    pub fn hold(&mut self, id: SessionId, commit: Commit) {
        self.receiving = false;
        let copy = if commit == Commit::Restored { Copy::Offered } else { Copy::Withheld };
        self.stored = Some(Stored { id, copy });
    }

    /// A session that an earlier run of this daemon has left: its copy stands ready, and its images are gone. `word`:
    /// what its source has said; its copy is being dealt with.
    pub fn recover(&mut self, id: SessionId, word: Option<Word>) {
        match word {
            None => self.stored = Some(Stored { id, copy: Copy::Prepared }),
            Some(word) => {
                if word == Word::Release {
                    self.held = Held::Unrestored;
                }
                remember(&mut self.settled, (id, Settled::Said(word)));
            }
        }
    }

    /// The copy of such a session is dead, and its images were gone before: a word about it finds nothing.
    pub fn lost(&mut self, id: SessionId) {
        if self.stored() == Some(id) {
            self.stored = None;
        }
    }

    /// The source has said what becomes of a session. On [`Heard::Decides`] the images are published, or the
    /// session is over, as the decision of [`Sink::peer_ended`] has it.
    pub fn hear(&mut self, id: SessionId, word: Word) -> Heard {
        if self.stored() == Some(id) {
            self.stored = None;
            remember(&mut self.settled, (id, Settled::Said(word)));
            return Heard::Decides;
        }
        match self.settled(&id) {
            Some(Settled::Said(said)) if said == word => Heard::Again,
            Some(_) => Heard::Contradicts,
            None => {
                // Its images may still be on their way: they are not to be taken any more.
                if word == Word::Rollback {
                    remember(&mut self.settled, (id, Settled::Said(word)));
                }
                Heard::Unknown
            }
        }
    }

    /// Whether everything is done and nothing more is wanted.
    pub fn is_done(&self) -> bool {
        self.held == Held::Restored && self.stored.is_none() && !self.receiving && !self.stays()
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
    /// a terminal has gone. `outlives`: it is not given up, its images stay.
    pub fn terminate(&mut self, signal: Ask, outlives: bool) -> Decision {
        let stays = self.has_only_copy() && !(outlives && self.stored.is_none());
        if stays && !self.asked.insists(signal) {
            return Decision::Stay;
        }
        Decision::Over(match (self.held, self.last) {
            _ if outlives && self.stored.is_some() => Err(
                "asked twice to end: the next cache that is started on these images goes on with their session".into(),
            ),
            (Held::Unrestored, _) if outlives => {
                Err("asked to end: the images, which have not been restored, stay where they are".into())
            }
            _ if self.stored.is_some() => Err(
                "asked twice to end: the images of a session that its source has neither released nor rolled \
                 back are given up"
                    .into(),
            ),
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
mod tests;
