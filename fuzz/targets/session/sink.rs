//! The cache's side.

use criu_relay::session::sink::{Decision, Heard, Settled};
use criu_relay::session::{REMEMBERED, Sink, Word};
use criu_relay_fuzz::Input;

use crate::{commit, signal};

/// A decision without its reasons.
#[derive(Debug, PartialEq)]
enum What {
    Nothing,
    Stay,
    Done,
    Fails,
}

fn what(decision: &Decision) -> What {
    match decision {
        Decision::Nothing => What::Nothing,
        Decision::Stay => What::Stay,
        Decision::Over(Ok(())) => What::Done,
        Decision::Over(Err(why)) => {
            assert!(!why.is_empty(), "whoever is made to fail learns why");
            What::Fails
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Held {
    Nothing,
    OnlyCopy,
    Restored,
}

/// What has become of the images of the session that waits for its word.
#[derive(Clone, Copy, PartialEq)]
enum Copy {
    Withheld,
    Offered,
    Making,
    Prepared,
    Failed,
}

/// What the outside knows of the cache.
struct Images {
    keep: bool,
    held: Held,
    receiving: bool,
    // The session that waits for its word.
    stored: Option<(u8, Copy)>,
    // Its images are gone: an earlier run had them.
    recovered: bool,
    // Whose copy stood ready when its word was said, and is being dealt with.
    decided: Option<(u8, Word)>,
    // What became of all that were stored, in their order.
    settled: Vec<(u8, Settled)>,
    asked: bool,
    leaves: bool,
    last_failed: Option<bool>,
    so_far: SoFar,
}

/// What has happened to each session, whatever came between, a daemon that was killed too.
#[derive(Default)]
struct SoFar {
    // A restore got its images before the word.
    offered: Vec<u8>,
    words: Vec<(u8, Word)>,
}

impl SoFar {
    fn is_offered(&mut self, id: u8) {
        assert!(!self.offered.contains(&id), "one restore gets the images before the word");
        self.offered.push(id);
    }

    fn is_decided(&mut self, id: u8, word: Word) {
        assert!(self.words.iter().all(|said| said.0 != id), "a session is decided once");
        self.words.push((id, word));
    }
}

impl Images {
    fn new(keep: bool) -> Self {
        Self {
            keep,
            held: Held::Nothing,
            receiving: false,
            stored: None,
            recovered: false,
            decided: None,
            settled: Vec::new(),
            asked: false,
            leaves: false,
            last_failed: None,
            so_far: SoFar::default(),
        }
    }

    fn stays(&self) -> bool {
        self.keep && !self.leaves
    }

    fn has_only_copy(&self) -> bool {
        self.held == Held::OnlyCopy || self.stored.is_some()
    }

    fn known(&self, id: u8) -> Option<Settled> {
        let last = self.settled.iter().rev().take(REMEMBERED);
        last.filter(|(known, _)| *known == id).map(|(_, settled)| *settled).next()
    }

    fn copy(&self) -> Option<Copy> {
        self.stored.map(|(_, copy)| copy)
    }

    fn agrees(&self, sink: &Sink) {
        let busy = self.receiving || self.stored.is_some();
        assert_eq!(sink.is_receiving(), self.receiving);
        assert_eq!(sink.is_busy(), busy);
        assert_eq!(sink.stored(), self.stored.map(|(id, _)| name(id)));
        assert_eq!(sink.offers(), self.copy() == Some(Copy::Offered));
        assert_eq!(sink.knows_any(), self.stored.is_some() || !self.settled.is_empty());
        assert_eq!(sink.has_only_copy(), self.has_only_copy());
        assert_eq!(sink.is_restored(), self.held == Held::Restored);
        assert_eq!(sink.stays(), self.stays());
        assert_eq!(sink.is_done(), self.held == Held::Restored && !busy && !self.stays());
        let empty = self.held == Held::Nothing && self.stored.is_none();
        assert_eq!(sink.takes_peers(), self.stays() || empty);
        assert_eq!(sink.is_full(), !self.keep && !empty);
        for (id, _) in &self.settled {
            assert_eq!(sink.settled(&name(*id)), self.known(*id));
            // What was rolled back before it was complete may be rolled back again when that is forgotten.
            let decided =
                |(other, settled): &&(u8, Settled)| other == id && *settled != Settled::Said(Word::Rollback);
            let outcomes = self.settled.iter().filter(decided).count();
            assert!(outcomes <= 1, "the images of a session are decided once");
            assert_eq!(sink.copy_stands_ready(name(*id)), None, "it has been decided");
        }
        if let Some((id, copy)) = self.stored {
            let said = match copy {
                Copy::Prepared => Some(true),
                Copy::Failed => Some(false),
                Copy::Withheld | Copy::Offered | Copy::Making => None,
            };
            assert_eq!(sink.copy_stands_ready(name(id)), said);
        }
    }

    // The peer has ended; whether the program ends with it.
    fn ends(&mut self, sink: &mut Sink, complete: bool) -> bool {
        self.receiving = false;
        let decision = what(&sink.peer_ended(if complete { Ok(()) } else { Err("cut off".into()) }));
        if complete {
            assert_eq!(decision, What::Nothing, "what is complete is kept");
            self.held = Held::OnlyCopy;
            return false;
        }
        assert_eq!(decision, What::Fails);
        self.last_failed = Some(true);
        !self.stays() && !self.has_only_copy()
    }

    // Whether the copy's step means anything.
    fn steps(&mut self, from: &[Copy], to: Copy) -> bool {
        match &mut self.stored {
            Some((_, copy)) if from.contains(copy) => {
                *copy = to;
                true
            }
            _ => false,
        }
    }

    // The daemon was killed: what the next one finds in its work directory, and what it makes of it. `made`: the
    // restore that was at it had come far enough for a record of its tasks.
    fn starts_again(self, keep: bool, made: bool) -> (Sink, Self) {
        let (mut sink, mut next) = (Sink::new(keep, false), Self::new(keep));
        next.so_far = self.so_far;
        match (self.stored, self.decided) {
            (Some((id, Copy::Prepared)), _) => {
                sink.recover(name(id), None);
                (next.stored, next.recovered) = (Some((id, Copy::Prepared)), true);
            }
            // That copy is killed.
            (Some((id, Copy::Making)), _) if made => {
                sink.recover(name(id), Some(Word::Rollback));
                next.settled.push((id, Settled::Said(Word::Rollback)));
            }
            (None, Some((id, word))) => {
                sink.recover(name(id), Some(word));
                next.settled.push((id, Settled::Said(word)));
                next.decided = self.decided;
                if word == Word::Release {
                    next.held = Held::OnlyCopy;
                }
            }
            _ => {}
        }
        (sink, next)
    }
}

// No session has the name of another.
fn name(id: u8) -> [u8; 16] {
    [id; 16]
}

#[expect(clippy::too_many_lines, reason = "an event each")]
pub fn run(keep: bool, input: &mut Input) {
    let (mut sink, mut images) = (Sink::new(keep, false), Images::new(keep));
    assert_eq!(sink.keeps(), keep);
    // The session that is coming in, or that came in last.
    let mut session = 0_u8;
    while let Some(event) = input.byte() {
        let [a, b, c] = [32, 64, 128].map(|bit| event & bit != 0);
        let mut ends = false;
        match event % 32 {
            0 | 4 | 5 => {
                let busy = images.receiving || images.stored.is_some();
                let taken = !busy && (keep || images.held == Held::Nothing);
                assert_eq!(sink.peer().is_ok(), taken);
                if taken {
                    // As many as there are names.
                    let Some(next) = session.checked_add(1) else { return };
                    (images.receiving, session) = (true, next);
                }
            }
            // The seed protocol, or what was cut off; or all of a session that is not scripted.
            1 | 6 | 7 if images.receiving => {
                if a && b && images.known(session).is_none() {
                    sink.taken(name(session));
                    images.settled.push((session, Settled::Taken));
                }
                ends = images.ends(&mut sink, a);
            }
            // All of one that is.
            9 | 10 if images.receiving && images.known(session).is_none() => {
                sink.hold(name(session), commit(a));
                let copy = if a { Copy::Offered } else { Copy::Withheld };
                (images.receiving, images.recovered) = (false, false);
                images.stored = Some((session, copy));
            }
            // A word, of the last session or of one before it.
            11..=13 => {
                let word = if a { Word::Release } else { Word::Rollback };
                let id = session.wrapping_sub(input.small() % 24);
                let stored = images.stored.filter(|(stored, _)| *stored == id);
                let expected = match images.known(id) {
                    _ if stored.is_some() => Heard::Decides,
                    Some(Settled::Said(said)) if said == word => Heard::Again,
                    Some(_) => Heard::Contradicts,
                    None => Heard::Unknown,
                };
                assert_eq!(sink.hear(name(id), word), expected);
                if expected == Heard::Unknown && word == Word::Rollback {
                    // Should its images come after all, they are not taken.
                    images.settled.push((id, Settled::Said(word)));
                }
                if let Some((_, copy)) = stored {
                    images.so_far.is_decided(id, word);
                    images.stored = None;
                    images.decided = (copy == Copy::Prepared).then_some((id, word));
                    images.settled.push((id, Settled::Said(word)));
                    ends = images.ends(&mut sink, word == Word::Release);
                }
            }
            2 | 8 => {
                let decision = what(&sink.restore_ended(a));
                if a && images.held != Held::Nothing {
                    assert_eq!(decision, What::Done);
                    (images.held, images.last_failed) = (Held::Restored, Some(false));
                    images.decided = None;
                    ends = !images.stays() && !images.receiving && images.stored.is_none();
                } else {
                    assert_eq!(decision, What::Nothing, "a failed restore costs nothing");
                }
            }
            3 => {
                let decision = what(&sink.terminate(signal(c), false));
                if images.has_only_copy() && !(images.asked && !c) {
                    assert_eq!(decision, What::Stay, "only a second request costs the only copy");
                    images.asked |= !c;
                    images.leaves = true;
                } else {
                    let lost = images.has_only_copy() || images.receiving;
                    let failed = lost || images.last_failed.unwrap_or(!keep);
                    assert_eq!(decision, if failed { What::Fails } else { What::Done });
                    ends = true;
                }
            }
            // A restore begins: it gets what is offered. Sometimes nobody looks whether anything is.
            14 | 19 => {
                let offered = sink.offers();
                sink.copying();
                if let (true, Some((id, _))) = (offered, images.stored) {
                    images.so_far.is_offered(id);
                }
                images.steps(&[Copy::Offered], Copy::Making);
            }
            15 | 20 => {
                let told = images.steps(&[Copy::Making], Copy::Prepared);
                assert_eq!(sink.prepared(), told);
            }
            16 | 21 => {
                let told = images.steps(&[Copy::Making, Copy::Prepared], Copy::Failed);
                assert_eq!(sink.copy_failed(), told, "the source is told once, and before it has decided");
            }
            17 if b => {
                (sink, images) = images.starts_again(keep, a);
            }
            // The copy of an earlier run is dead, and there is nothing from which another could be made.
            18 if images.recovered || images.stored.is_none() => {
                sink.lost(name(images.stored.map_or(session, |(id, _)| id)));
                images.stored = None;
            }
            // That of a session before is no copy of what is stored now.
            18 => sink.lost(name(session.wrapping_add(1))),
            _ => {}
        }
        if ends {
            let so_far = images.so_far;
            (sink, images) = (Sink::new(keep, false), Images::new(keep));
            images.so_far = so_far;
        }
        images.agrees(&sink);
    }
}
