//! The source's side.

use criu_relay::session::source::{Decision, Fate};
use criu_relay::session::{Begun, Commit, Dialect, Source, Word};
use criu_relay_fuzz::Input;

use crate::{commit, signal};

/// A decision without its reasons.
#[derive(Debug, PartialEq)]
enum What {
    Nothing,
    Allow,
    Finish,
    Hold,
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
        Decision::Finish => What::Finish,
        Decision::Hold => What::Hold,
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

/// With what a daemon is started.
#[derive(Clone, Copy)]
pub struct Options {
    keep: bool,
    leave_running: bool,
    commit: Commit,
}

impl Options {
    pub fn new(keep: bool, leave_running: bool, commit: Commit) -> Self {
        Self { keep, leave_running, commit }
    }

    fn start(self) -> (Source, Dump) {
        (Source::new(self.keep, self.leave_running, self.commit), Dump::new(self))
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
    Stored,
    Confirmed,
    Saying(Word),
}

/// What the outside knows of the source.
struct Dump {
    options: Options,
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

/// What has happened in a scripted session, whatever came between, a daemon that was killed too.
struct SoFar {
    leave_running: bool,
    commit: Commit,
    // The cache has it; its copy stands ready.
    stored: bool,
    ready: bool,
    allowed: bool,
    denied: bool,
    // The source is dead, and the daemon knows it; a part of it is; its CRIU has ended.
    gone: bool,
    dead: bool,
    broken: bool,
    ended: bool,
    // Whoever began it was killed; the operator has released it.
    recovered: bool,
    by_hand: bool,
    word: Option<Word>,
}

impl SoFar {
    fn new(options: Options) -> Self {
        Self {
            leave_running: options.leave_running,
            commit: options.commit,
            stored: false,
            ready: false,
            allowed: false,
            denied: false,
            gone: false,
            dead: false,
            broken: false,
            ended: false,
            recovered: false,
            by_hand: false,
            word: None,
        }
    }

    fn decided(&mut self, decision: &What) {
        match decision {
            What::Allow => {
                assert!(self.stored, "only what the cache has confirmed may cost the source its life");
                let ready = self.ready || self.dead || self.commit == Commit::Stored;
                assert!(ready, "with commit `restored`, only a copy that stands ready");
                assert!(!self.denied && !self.allowed, "CRIU is told once, and nothing else afterwards");
                assert!(!self.recovered && self.word.is_none(), "the script has gone");
                self.allowed = true;
            }
            What::Deny => {
                assert!(!self.gone && self.word.is_none(), "what is left of a dead source is not dropped");
                self.denied = true;
            }
            What::Finish => {
                assert!(
                    self.allowed && self.ended && self.broken,
                    "only what CRIU was about to kill is killed"
                );
                assert!(!self.leave_running && !self.recovered && self.word.is_none());
            }
            What::Hold => assert!(self.recovered && self.broken && !self.gone && self.word.is_none()),
            _ => {}
        }
    }

    // `word`: what has to reach the cache.
    fn says(&mut self, word: Option<Word>) {
        match word {
            Some(Word::Release) => {
                assert!((self.allowed || self.recovered || self.by_hand) && !self.denied);
                assert!(
                    self.gone || self.leave_running && self.ended,
                    "never two that run, unless that is wanted"
                );
            }
            Some(Word::Rollback) => assert!(self.denied),
            None => {}
        }
        assert!(self.word.is_none() || self.word == word, "it does not change its mind");
        self.word = word;
    }

    // What of the source is left; `hint` where that is open.
    fn fate(&mut self, hint: Fate) -> Fate {
        let fate = match hint {
            _ if self.gone => Fate::Dead,
            Fate::Lives if self.broken => Fate::Broken,
            hint => hint,
        };
        self.broken |= fate == Fate::Broken;
        self.gone |= fate == Fate::Dead;
        fate
    }
}

impl Dump {
    fn new(options: Options) -> Self {
        Self {
            options,
            at: At::Idle,
            scripted: false,
            spoiled: false,
            linked: false,
            torn: false,
            asked: false,
            leaves: false,
            last_failed: None,
            so_far: SoFar::new(options),
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
        assert_eq!(source.is_asking(), self.at == At::Asking);
        assert_eq!(source.is_preparing(), self.at == At::Stored);
        assert_eq!(source.is_torn(), self.torn && !idle && !matches!(self.at, At::Saying(_)));
        assert_eq!(source.is_idle(), idle);
        assert_eq!(source.has_all(), !idle && dialect.is_none());
        assert_eq!(source.is_source_dead(), self.so_far.dead || idle && source.is_source_dead());
        let decided = self.so_far.allowed || self.so_far.recovered || self.so_far.dead;
        assert_eq!(source.is_bound(), decided && !idle && dialect.is_none() || self.at == At::Complete);
        assert_eq!(source.is_scripted(), self.scripted && !idle);
        assert_eq!(source.was_scripted(), self.scripted);
        assert_eq!(source.is_linked(), self.linked);
        assert_eq!(source.stays(), self.options.keep && !self.leaves);
        let word = match self.at {
            At::Saying(word) => Some(word),
            _ => None,
        };
        assert_eq!(source.word(), word, "whoever is idle has none");
        if !idle {
            self.so_far.says(word);
        }
    }

    // The session has gone. `criu_goes_on`: it was not CRIU that ended.
    fn over(&mut self, failed: bool, criu_goes_on: bool) {
        self.spoiled = criu_goes_on && self.at == At::Running(Dialect::Remote);
        self.at = At::Idle;
        self.last_failed = Some(failed);
    }

    fn allows(&mut self) -> What {
        self.at = At::Confirmed;
        What::Allow
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

    // This side fails while CRIU can be made to fail.
    fn cant_go_on(&mut self) -> What {
        match self.at {
            At::Running(_) => self.fails(true),
            // The images are all that is left of the source.
            At::Held | At::Asking if self.so_far.dead => What::Nothing,
            At::Held => self.fails(false),
            At::Asking | At::Stored => self.rolls_back(),
            _ => What::Nothing,
        }
    }

    // The daemon was killed: what the next one finds in its work directory, and what it makes of it.
    fn starts_again(self, options: Options) -> (Source, Self) {
        let (mut source, mut next) = options.start();
        let word = match self.at {
            At::Asking | At::Stored | At::Confirmed => None,
            At::Saying(Word::Release) => Some(Word::Release),
            // Before that nothing is written; and a rollback is owed to the cache, beside what is new.
            At::Idle | At::Running(_) | At::Complete | At::Held | At::Saying(Word::Rollback) => {
                return (source, next);
            }
        };
        source.recover(word, self.so_far.leave_running);
        next.at = word.map_or(At::Confirmed, At::Saying);
        next.scripted = true;
        next.so_far = self.so_far;
        next.so_far.recovered = true;
        next.so_far.dead = word.is_some();
        // Whoever died then was not killed by CRIU, and is not missed.
        next.so_far.broken &= self.at == At::Confirmed;
        (source, next)
    }
}

#[expect(clippy::too_many_lines, reason = "an event each")]
pub fn run(mut options: Options, input: &mut Input) {
    let (mut source, mut dump) = options.start();
    assert_eq!(source.keeps(), options.keep);
    while let Some(event) = input.byte() {
        let [a, b, c] = [32, 64, 128].map(|bit| event & bit != 0);
        let running = matches!(dump.at, At::Running(_));
        let has_all = !running && dump.at != At::Idle;
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
                        dump.so_far = SoFar::new(options);
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
            2 => (source.failed("a writer"), dump.cant_go_on()),
            3 | 23 if !dump.linked => {
                dump.linked = true;
                let decision = source.link_up();
                let expected = match dump.at {
                    At::Saying(word) => What::Say(word),
                    // Everything is stored, and what becomes of the source decides.
                    at if std::mem::take(&mut dump.torn) && !matches!(at, At::Idle | At::Confirmed) => {
                        What::SendAnew
                    }
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            4 => {
                source.reconnects(b);
                let decision = source.link_lost("reset", a);
                dump.linked = false;
                let expected = match dump.at {
                    // It may come back.
                    At::Running(_) | At::Held | At::Asking | At::Stored if b => {
                        dump.torn = true;
                        What::Connect
                    }
                    At::Running(_) if !a => dump.fails(true),
                    At::Held | At::Asking if dump.so_far.dead => {
                        dump.torn = true;
                        What::Connect
                    }
                    At::Held => dump.fails(false),
                    At::Asking | At::Stored => dump.rolls_back(),
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
                    At::Held if !dump.so_far.dead => dump.fails(false),
                    At::Asking | At::Stored if !dump.so_far.dead => dump.rolls_back(),
                    At::Idle if !dump.spoiled && !options.keep => dump.fails(false),
                    // Without a word the cache does not serve what it may have.
                    At::Saying(Word::Rollback) if !dump.so_far.allowed && !dump.so_far.recovered => {
                        dump.fails(false)
                    }
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
                    At::Held | At::Asking | At::Stored => dump.so_far.dead,
                    At::Idle => false,
                };
                let insists = dump.asked && !c;
                let expected = if precious && !insists {
                    What::Stay
                } else if matches!(dump.at, At::Asking | At::Stored) && !dump.so_far.dead {
                    dump.rolls_back()
                } else if dump.at != At::Idle {
                    dump.fails(false)
                } else if dump.last_failed.unwrap_or(!options.keep) {
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
                        dump.so_far.stored = true;
                        if options.commit == Commit::Stored || dump.so_far.dead {
                            dump.allows()
                        } else {
                            dump.at = At::Stored;
                            What::Nothing
                        }
                    }
                    At::Complete => dump.is_done(),
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            11 => {
                (dump.so_far.gone, dump.so_far.dead) = (true, true);
                let decision = source.source_died();
                let expected = match dump.at {
                    At::Confirmed => dump.releases(),
                    // There is nothing that a copy could collide with.
                    At::Stored => dump.allows(),
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            12 => {
                let hint = match (a, b) {
                    (true, _) => Fate::Lives,
                    (_, true) => Fate::Broken,
                    _ => Fate::Dead,
                };
                let fate = dump.so_far.fate(hint);
                dump.so_far.ended = true;
                dump.so_far.dead |= fate == Fate::Dead;
                let decision = source.criu_ended(fate);
                let expected = match dump.at {
                    At::Confirmed if dump.so_far.leave_running => dump.releases(),
                    At::Confirmed if fate == Fate::Broken && dump.so_far.recovered => What::Hold,
                    At::Confirmed if fate == Fate::Broken => What::Finish,
                    At::Confirmed if fate == Fate::Lives => dump.rolls_back(),
                    At::Held | At::Asking if dump.so_far.dead => What::Nothing,
                    At::Stored if dump.so_far.dead => dump.allows(),
                    At::Held => dump.fails(false),
                    At::Asking | At::Stored => dump.rolls_back(),
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
            15 if running || matches!(dump.at, At::Complete | At::Held | At::Asking | At::Stored) => {
                let decision = source.lost("it is gone");
                let denies = matches!(dump.at, At::Asking | At::Stored) && !dump.so_far.dead;
                (decision, if denies { dump.rolls_back() } else { dump.fails(true) })
            }
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
            27 => {
                let decision = source.prepared();
                // Whatever else says so means nothing.
                dump.so_far.ready |= dump.at == At::Stored;
                (decision, if dump.at == At::Stored { dump.allows() } else { What::Nothing })
            }
            28 => {
                let decision = source.restore_failed("no pages");
                let counts = dump.scripted && options.commit == Commit::Restored;
                (decision, if counts { dump.cant_go_on() } else { What::Nothing })
            }
            // The operator, who has looked at what lives.
            29 if has_all && a && matches!(dump.at, At::Saying(_)) => {
                (dump.so_far.gone, dump.so_far.by_hand) = (true, true);
                let decision = source.resolve(Word::Release);
                let expected = match dump.at {
                    At::Saying(Word::Release) => dump.is_done(),
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            29 if has_all && !dump.so_far.gone => {
                let decision = source.resolve(Word::Rollback);
                let expected = match dump.at {
                    At::Saying(Word::Rollback) => dump.fails(false),
                    At::Asking | At::Stored => dump.rolls_back(),
                    // CRIU may be about to kill it, unless that was long ago.
                    At::Confirmed if dump.so_far.recovered => dump.rolls_back(),
                    _ => What::Nothing,
                };
                (decision, expected)
            }
            31 if b => {
                // It may be started with other options.
                (options.leave_running, options.commit) = (a, commit(c));
                (source, dump) = dump.starts_again(options);
                (Decision::Nothing, What::Nothing)
            }
            _ => (Decision::Nothing, What::Nothing),
        };
        let decision = what(&decision);
        dump.so_far.decided(&decision);
        assert_eq!(decision, expected);
        let over = matches!(decision, What::Done | What::Fails);
        if over && (signalled || !options.keep || dump.leaves) {
            // The program has ended; the next one begins.
            (source, dump) = options.start();
        }
        dump.agrees(&source);
    }
}
