//! Both life cycles, by the rule 'fail towards the running process'. Input: which side, whether it keeps and
//! whether the source may run on beside its copy (three bits), then one byte for each event: its low five bits
//! say which, the others are its arguments.
#![no_main]

use criu_relay::session::sink::{self, Heard, Settled};
use criu_relay::session::source::Decision;
use criu_relay::session::{Ask, Begun, Dialect, REMEMBERED, Sink, Source, Word};
use criu_relay_fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// A decision without its reasons.
#[derive(Debug, PartialEq)]
enum What {
    Nothing,
    Allow,
    Deny,
    Say(Word),
    Connect,
    SendAnew,
    Stay,
    Done,
    Fails,
}

fn what(decision: &Decision) -> What {
    match decision {
        Decision::Nothing => What::Nothing,
        Decision::Allow => What::Allow,
        Decision::Say(word) => What::Say(*word),
        Decision::Connect => What::Connect,
        Decision::SendAnew => What::SendAnew,
        Decision::Stay => What::Stay,
        Decision::Over(Ok(())) => What::Done,
        Decision::Deny(why) | Decision::Over(Err(why)) => {
            assert!(!why.is_empty(), "whoever is made to fail learns why");
            if matches!(decision, Decision::Deny(_)) { What::Deny } else { What::Fails }
        }
    }
}

fn what_of_sink(decision: &sink::Decision) -> What {
    match decision {
        sink::Decision::Nothing => What::Nothing,
        sink::Decision::Stay => What::Stay,
        sink::Decision::Over(Ok(())) => What::Done,
        sink::Decision::Over(Err(why)) => {
            assert!(!why.is_empty(), "whoever is made to fail learns why");
            What::Fails
        }
    }
}

/// Where a dump is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Idle,
    Running(Dialect),
    Complete,
    Held,
    Asking,
    Confirmed,
    Saying(Word),
}

/// What the outside knows of the source.
struct Dump {
    keep: bool,
    leave_running: bool,
    at: At,
    scripted: bool,
    // A CRIU of the remote dialect goes on with a dump that has failed.
    spoiled: bool,
    linked: bool,
    // The peer of the last link has seen a part of this session, and that link is lost.
    torn: bool,
    asked: bool,
    leaves: bool,
    last_failed: Option<bool>,
    so_far: SoFar,
}

/// What has happened in a scripted session, whatever came between.
#[derive(Default)]
struct SoFar {
    confirmed: bool,
    allowed: bool,
    denied: bool,
    // The source is dead; its CRIU has ended.
    dead: bool,
    ended: bool,
    word: Option<Word>,
}

impl SoFar {
    fn decided(&mut self, decision: &What) {
        match decision {
            What::Allow => {
                assert!(self.confirmed, "only what the cache has confirmed may cost the source its life");
                assert!(!self.denied && !self.allowed, "CRIU is told once, and nothing else afterwards");
                self.allowed = true;
            }
            What::Deny => self.denied = true,
            _ => {}
        }
    }

    // `word`: what has to reach the cache.
    fn says(&mut self, word: Option<Word>, leave_running: bool) {
        match word {
            Some(Word::Release) => {
                assert!(self.allowed && !self.denied);
                assert!(
                    self.dead || leave_running && self.ended,
                    "never two that run, unless that is wanted"
                );
            }
            Some(Word::Rollback) => assert!(self.denied),
            None => {}
        }
        assert!(self.word.is_none() || self.word == word, "it does not change its mind");
        self.word = word;
    }
}

impl Dump {
    fn new(keep: bool, leave_running: bool) -> Self {
        Self {
            keep,
            leave_running,
            at: At::Idle,
            scripted: false,
            spoiled: false,
            linked: false,
            torn: false,
            asked: false,
            leaves: false,
            last_failed: None,
            so_far: SoFar::default(),
        }
    }

    fn agrees(&mut self, source: &Source) {
        let dialect = match self.at {
            At::Running(dialect) => Some(dialect),
            _ => None,
        };
        let idle = self.at == At::Idle;
        assert_eq!(source.is_running(), dialect.is_some());
        assert_eq!(source.dialect(), dialect);
        assert_eq!(source.is_complete(), self.at == At::Complete);
        assert_eq!(source.is_held(), self.at == At::Held);
        assert_eq!(source.is_idle(), idle);
        assert_eq!(source.has_all(), !idle && dialect.is_none());
        assert_eq!(source.is_source_dead(), self.so_far.dead || idle && source.is_source_dead());
        let bound = (self.so_far.confirmed || self.so_far.dead) && !idle && dialect.is_none();
        assert_eq!(source.is_bound(), bound || self.at == At::Complete);
        assert_eq!(source.is_scripted(), self.scripted && !idle);
        assert_eq!(source.was_scripted(), self.scripted);
        assert_eq!(source.is_linked(), self.linked);
        assert_eq!(source.stays(), self.keep && !self.leaves);
        let word = match self.at {
            At::Saying(word) => Some(word),
            _ => None,
        };
        assert_eq!(source.word(), word, "whoever is idle has none");
        if !idle {
            self.so_far.says(word, self.leave_running);
        }
    }

    // The session has gone. `criu_goes_on`: it was not CRIU that ended.
    fn over(&mut self, failed: bool, criu_goes_on: bool) {
        self.spoiled = criu_goes_on && self.at == At::Running(Dialect::Remote);
        self.at = At::Idle;
        self.last_failed = Some(failed);
    }

    fn rolls_back(&mut self) -> What {
        self.at = At::Saying(Word::Rollback);
        What::Deny
    }

    fn releases(&mut self) -> What {
        self.at = At::Saying(Word::Release);
        What::Say(Word::Release)
    }

    fn fails(&mut self, criu_goes_on: bool) -> What {
        self.over(true, criu_goes_on);
        What::Fails
    }

    fn is_done(&mut self) -> What {
        self.over(false, false);
        What::Done
    }
}

fn signal(c: bool) -> Ask {
    if c { Ask::Hangup } else { Ask::End }
}

fn source(keep: bool, leave_running: bool, input: &mut Input) {
    let (mut source, mut dump) = (Source::new(keep, leave_running), Dump::new(keep, leave_running));
    assert_eq!(source.keeps(), keep);
    while let Some(event) = input.byte() {
        let [a, b, c] = [32, 64, 128].map(|bit| event & bit != 0);
        let running = matches!(dump.at, At::Running(_));
        let mut signalled = false;
        let why = || "why".to_string();
        let (decision, expected) = match event % 32 {
            0 | 17 | 18 => {
                let dialect = if a { Dialect::Remote } else { Dialect::Stream };
                let begun = source.request(dialect, b);
                match dump.at {
                    At::Idle if dump.spoiled && !b => assert!(begun.is_err()),
                    At::Idle => {
                        assert_eq!(begun, Ok(Begun::Now), "whatever was before, a new dump is taken");
                        dump.at = At::Running(dialect);
                        (dump.torn, dump.spoiled, dump.scripted) = (false, false, false);
                        dump.so_far = SoFar::default();
                    }
                    At::Running(running) => {
                        let same = dialect == Dialect::Remote && running == dialect;
                        assert_eq!(begun.ok(), same.then_some(Begun::Before));
                    }
                    _ => assert!(begun.is_err(), "what is not decided is not forgotten"),
                }
                (Decision::Nothing, What::Nothing)
            }
            1 | 19 => {
                let decision = source.ended(if a { Ok(()) } else { Err(why()) });
                let expected = match (running, a) {
                    // CRIU has not asked whether it may.
                    (true, true) if dump.scripted => dump.fails(false),
                    (true, true) => {
                        dump.at = At::Complete;
                        What::Nothing
                    }
                    (true, false) => dump.fails(false),
                    (false, _) => {
                        dump.spoiled = false;
                        What::Nothing
                    }
                };
                (decision, expected)
            }
            2 => {
                let decision = source.failed("a writer");
                let expected = match dump.at {
                    At::Running(_) => dump.fails(true),
                    // The images are all that is left of the source.
                    At::Held | At::Asking if dump.so_far.dead => What::Nothing,
                    At::Held => dump.fails(false),
                    At::Asking => dump.rolls_back(),
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            3 | 23 if !dump.linked => {
                dump.linked = true;
                let decision = source.link_up();
                let expected = match dump.at {
                    At::Saying(word) => What::Say(word),
                    at if std::mem::take(&mut dump.torn) && at != At::Idle => What::SendAnew,
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            4 => {
                let decision = source.link_lost("reset", a);
                dump.linked = false;
                let expected = match dump.at {
                    At::Running(_) if !a => dump.fails(true),
                    At::Asking if dump.so_far.dead => {
                        dump.torn = true;
                        What::Connect
                    }
                    At::Held => dump.fails(false),
                    At::Asking => dump.rolls_back(),
                    at => {
                        dump.torn |= matches!(at, At::Running(_) | At::Complete);
                        What::Connect
                    }
                };
                (decision, expected)
            }
            5 if !dump.linked => {
                let decision = source.no_link("refused".into(), a);
                let expected = match dump.at {
                    At::Running(_) if !a => dump.fails(true),
                    At::Idle if !dump.spoiled && !keep => dump.fails(false),
                    // Without a word the cache does not serve what it may have.
                    At::Saying(Word::Rollback) if !dump.so_far.confirmed => dump.fails(false),
                    _ => What::Connect,
                };
                (decision, expected)
            }
            6 if dump.at == At::Complete && dump.linked && !dump.torn => {
                dump.linked = false;
                (source.delivered(), dump.is_done())
            }
            7 if b => {
                signalled = true;
                let decision = source.terminate(signal(c), a);
                let precious = match dump.at {
                    At::Running(_) => a,
                    At::Complete | At::Confirmed | At::Saying(_) => true,
                    At::Held | At::Asking => dump.so_far.dead,
                    At::Idle => false,
                };
                let insists = dump.asked && !c;
                let expected = if precious && !insists {
                    What::Stay
                } else if dump.at == At::Asking && !dump.so_far.dead {
                    dump.rolls_back()
                } else if dump.at != At::Idle {
                    dump.fails(false)
                } else if dump.last_failed.unwrap_or(!keep) {
                    What::Fails
                } else {
                    What::Done
                };
                if matches!(expected, What::Stay | What::Deny) {
                    dump.asked |= !c;
                    dump.leaves = true;
                }
                (decision, expected)
            }
            8 | 20 if running => {
                source.is_announced();
                dump.scripted = true;
                (Decision::Nothing, What::Nothing)
            }
            9 | 21 if running && dump.scripted => {
                let decision = source.held(if a { Ok(()) } else { Err(why()) });
                let expected = if a {
                    dump.at = At::Held;
                    What::Nothing
                } else {
                    dump.fails(false)
                };
                (decision, expected)
            }
            10 | 22 => {
                let decision = source.all_stored();
                let expected = match dump.at {
                    At::Asking => {
                        dump.so_far.confirmed = true;
                        dump.at = At::Confirmed;
                        What::Allow
                    }
                    At::Complete => dump.is_done(),
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            11 => {
                dump.so_far.dead = true;
                let decision = source.source_died();
                (decision, if dump.at == At::Confirmed { dump.releases() } else { What::Nothing })
            }
            12 => {
                dump.so_far.ended = true;
                dump.so_far.dead |= !a;
                let decision = source.criu_ended(a);
                let expected = match dump.at {
                    At::Confirmed if leave_running => dump.releases(),
                    At::Held | At::Asking if dump.so_far.dead => What::Nothing,
                    At::Confirmed if a => dump.rolls_back(),
                    At::Held => dump.fails(false),
                    At::Asking => dump.rolls_back(),
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            13 => {
                let word = if a { Word::Release } else { Word::Rollback };
                let decision = source.acknowledged(word);
                let expected = match dump.at {
                    At::Saying(said) if said != word => What::Nothing,
                    At::Saying(Word::Release) => dump.is_done(),
                    At::Saying(Word::Rollback) => dump.fails(false),
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            14 => {
                let decision = source.disowned("it knows nothing");
                let expected = match dump.at {
                    At::Saying(_) => dump.fails(false),
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            15 if running || dump.at == At::Complete => (source.lost("it is gone"), dump.fails(true)),
            16 => {
                dump.linked = false;
                (source.unused_link_lost(), What::Connect)
            }
            24..=26 => {
                source.asking();
                if dump.at == At::Held {
                    dump.at = At::Asking;
                }
                (Decision::Nothing, What::Nothing)
            }
            _ => (Decision::Nothing, What::Nothing),
        };
        let decision = what(&decision);
        dump.so_far.decided(&decision);
        assert_eq!(decision, expected);
        let over = matches!(decision, What::Done | What::Fails);
        if over && (signalled || !keep || dump.leaves) {
            // The program has ended; the next one begins.
            (source, dump) = (Source::new(keep, leave_running), Dump::new(keep, leave_running));
        }
        dump.agrees(&source);
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Held {
    Nothing,
    OnlyCopy,
    Restored,
}

/// What the outside knows of the cache.
struct Images {
    keep: bool,
    held: Held,
    receiving: bool,
    // The session that waits for its word.
    stored: Option<u8>,
    // What became of all that were stored, in their order.
    settled: Vec<(u8, Settled)>,
    asked: bool,
    leaves: bool,
    last_failed: Option<bool>,
}

impl Images {
    fn new(keep: bool) -> Self {
        Self {
            keep,
            held: Held::Nothing,
            receiving: false,
            stored: None,
            settled: Vec::new(),
            asked: false,
            leaves: false,
            last_failed: None,
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

    fn agrees(&self, sink: &Sink) {
        let busy = self.receiving || self.stored.is_some();
        assert_eq!(sink.is_receiving(), self.receiving);
        assert_eq!(sink.is_busy(), busy);
        assert_eq!(sink.stored(), self.stored.map(name));
        assert_eq!(sink.has_only_copy(), self.has_only_copy());
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
        }
    }

    // The peer has ended; whether the program ends with it.
    fn ends(&mut self, sink: &mut Sink, complete: bool) -> bool {
        self.receiving = false;
        let decision = what_of_sink(&sink.peer_ended(if complete { Ok(()) } else { Err("cut off".into()) }));
        if complete {
            assert_eq!(decision, What::Nothing, "what is complete is kept");
            self.held = Held::OnlyCopy;
            return false;
        }
        assert_eq!(decision, What::Fails);
        self.last_failed = Some(true);
        !self.stays() && !self.has_only_copy()
    }
}

// No session has the name of another.
fn name(id: u8) -> [u8; 16] {
    [id; 16]
}

fn sink(keep: bool, input: &mut Input) {
    let (mut sink, mut images) = (Sink::new(keep), Images::new(keep));
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
                sink.hold(name(session));
                (images.receiving, images.stored) = (false, Some(session));
            }
            // A word, of the last session or of one before it.
            11..=13 => {
                let word = if a { Word::Release } else { Word::Rollback };
                let id = session.wrapping_sub(input.small() % 24);
                let expected = match images.known(id) {
                    _ if images.stored == Some(id) => Heard::Decides,
                    Some(Settled::Said(said)) if said == word => Heard::Again,
                    Some(_) => Heard::Contradicts,
                    None => Heard::Unknown,
                };
                assert_eq!(sink.hear(name(id), word), expected);
                if expected == Heard::Unknown && word == Word::Rollback {
                    // Should its images come after all, they are not taken.
                    images.settled.push((id, Settled::Said(word)));
                }
                if expected == Heard::Decides {
                    images.stored = None;
                    images.settled.push((id, Settled::Said(word)));
                    ends = images.ends(&mut sink, word == Word::Release);
                }
            }
            2 | 8 => {
                let decision = what_of_sink(&sink.restore_ended(a));
                if a && images.held != Held::Nothing {
                    assert_eq!(decision, What::Done);
                    (images.held, images.last_failed) = (Held::Restored, Some(false));
                    ends = !images.stays() && !images.receiving && images.stored.is_none();
                } else {
                    assert_eq!(decision, What::Nothing, "a failed restore costs nothing");
                }
            }
            3 => {
                let decision = what_of_sink(&sink.terminate(signal(c)));
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
            _ => {}
        }
        if ends {
            (sink, images) = (Sink::new(keep), Images::new(keep));
        }
        images.agrees(&sink);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let which = input.small();
    let keep = which & 2 != 0;
    match which & 1 {
        0 => source(keep, which & 4 != 0, &mut input),
        _ => sink(keep, &mut input),
    }
});
