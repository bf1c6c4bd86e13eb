//! Both life cycles, by the rule 'fail towards the running process'. Input: which side and whether it keeps
//! (two bits), then one byte for each event: its low four bits say which, the others are its arguments.
#![no_main]

use criu_relay::session::{Ask, Begun, Decision, Dialect, Sink, Source};
use criu_relay_fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// What the outside knows of the source.
struct Dump {
    keep: bool,
    // What runs; None: nothing does.
    dialect: Option<Dialect>,
    complete: bool,
    // A CRIU of the remote dialect goes on with a dump that has failed.
    spoiled: bool,
    linked: bool,
    // The peer of the last link has seen a part of this session, and that link is lost.
    torn: bool,
    asked: bool,
    leaves: bool,
    last_failed: Option<bool>,
}

impl Dump {
    fn new(keep: bool) -> Self {
        Self {
            keep,
            dialect: None,
            complete: false,
            spoiled: false,
            linked: false,
            torn: false,
            asked: false,
            leaves: false,
            last_failed: None,
        }
    }

    fn agrees(&self, source: &Source) {
        assert_eq!(source.is_running(), self.dialect.is_some());
        assert_eq!(source.dialect(), self.dialect);
        assert_eq!(source.is_complete(), self.complete);
        assert_eq!(source.is_idle(), self.dialect.is_none() && !self.complete);
        assert_eq!(source.is_linked(), self.linked);
        assert_eq!(source.stays(), self.keep && !self.leaves);
    }

    // The session has gone. `criu_goes_on`: it was not CRIU that ended.
    fn over(&mut self, failed: bool, criu_goes_on: bool) {
        self.spoiled = criu_goes_on && self.dialect == Some(Dialect::Remote);
        (self.dialect, self.complete) = (None, false);
        self.last_failed = Some(failed);
    }
}

fn is_failure(decision: &Decision) -> bool {
    matches!(decision, Decision::Over(Err(why)) if !why.is_empty())
}

fn signal(event: u8) -> Ask {
    if event & 64 == 0 { Ask::End } else { Ask::Hangup }
}

fn source(keep: bool, input: &mut Input) {
    let (mut source, mut dump) = (Source::new(keep), Dump::new(keep));
    while let Some(event) = input.byte() {
        let (a, b) = (event & 16 != 0, event & 32 != 0);
        let signal = signal(event);
        let running = dump.dialect.is_some();
        let mut ends = false;
        match event % 16 {
            0 | 1 | 8 => {
                let dialect = if a { Dialect::Remote } else { Dialect::Stream };
                let begun = source.request(dialect, b);
                if dump.complete || dump.spoiled && !b {
                    assert!(begun.is_err());
                } else if !running {
                    assert_eq!(begun, Ok(Begun::Now), "whatever was before, a new dump is taken");
                    (dump.dialect, dump.torn, dump.spoiled) = (Some(dialect), false, false);
                } else {
                    let same = dialect == Dialect::Remote && dump.dialect == Some(dialect);
                    assert_eq!(begun.ok(), same.then_some(Begun::Before));
                }
            }
            2 | 9 => {
                let decision = source.ended(if a { Ok(()) } else { Err("incomplete".into()) });
                match (running, a) {
                    (true, true) => {
                        assert_eq!(decision, Decision::Nothing, "what is complete is kept");
                        (dump.dialect, dump.complete) = (None, true);
                    }
                    (true, false) => {
                        assert!(is_failure(&decision));
                        dump.over(true, false);
                        ends = !keep || dump.leaves;
                    }
                    (false, _) => {
                        assert_eq!(decision, Decision::Nothing);
                        dump.spoiled = false;
                    }
                }
            }
            3 => {
                let decision = source.failed("a writer");
                assert_eq!(is_failure(&decision), running, "CRIU fails while it can, and only then");
                if running {
                    dump.over(true, true);
                    ends = !keep || dump.leaves;
                } else {
                    assert_eq!(decision, Decision::Nothing);
                }
            }
            4 | 10 if !dump.linked => {
                let decision = source.link_up();
                dump.linked = true;
                let anew = std::mem::take(&mut dump.torn) && (running || dump.complete);
                assert_eq!(decision, if anew { Decision::SendAnew } else { Decision::Nothing });
            }
            5 | 11 => {
                let decision = source.link_lost("reset", a);
                dump.linked = false;
                if running && !a {
                    assert!(is_failure(&decision), "CRIU can be made to fail, at once");
                    dump.over(true, true);
                    ends = !keep || dump.leaves;
                } else {
                    assert_eq!(decision, Decision::Connect, "the only copy is never given up");
                    dump.torn |= running || dump.complete;
                }
            }
            6 if !dump.linked => {
                let decision = source.no_link("refused".into(), a);
                let gives_up = if running { !a } else { !dump.complete && !dump.spoiled && !keep };
                assert_eq!(is_failure(&decision), gives_up);
                if gives_up {
                    dump.over(true, running);
                    ends = !keep || dump.leaves;
                } else {
                    assert_eq!(decision, Decision::Connect);
                }
            }
            7 if dump.complete && dump.linked && !dump.torn => {
                assert_eq!(source.delivered(), Decision::Over(Ok(())));
                dump.linked = false;
                dump.over(false, false);
                ends = !keep || dump.leaves;
            }
            15 if b => {
                let precious = dump.complete || (running && a);
                let decision = source.terminate(signal, a);
                if precious && !(dump.asked && signal == Ask::End) {
                    assert_eq!(decision, Decision::Stay, "only a second request costs the only copy");
                    dump.asked |= signal == Ask::End;
                    dump.leaves = true;
                } else {
                    let cut_off = running || dump.complete;
                    let failed = cut_off || dump.last_failed.unwrap_or(!keep);
                    assert_eq!(is_failure(&decision), failed);
                    assert_eq!(decision == Decision::Over(Ok(())), !failed);
                    ends = true;
                }
            }
            _ => {}
        }
        if ends {
            // The program has ended; the next one begins.
            (source, dump) = (Source::new(keep), Dump::new(dump.keep));
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

fn sink(keep: bool, input: &mut Input) {
    let fresh = (Held::Nothing, false, false, false, None);
    let mut sink = Sink::new(keep);
    let (mut held, mut receiving, mut asked, mut leaves, mut last_failed) = fresh;
    while let Some(event) = input.byte() {
        let (a, signal) = (event & 16 != 0, signal(event));
        let mut ends = false;
        match event % 16 {
            0 | 4 | 5 => {
                let taken = !receiving && (keep || held == Held::Nothing);
                assert_eq!(sink.peer().is_ok(), taken);
                receiving |= taken;
            }
            1 | 6 | 7 if receiving => {
                receiving = false;
                let decision = sink.peer_ended(if a { Ok(()) } else { Err("cut off".into()) });
                if a {
                    assert_eq!(decision, Decision::Nothing, "what is complete is kept");
                    held = Held::OnlyCopy;
                } else {
                    assert!(is_failure(&decision));
                    last_failed = Some(true);
                    ends = (!keep || leaves) && held != Held::OnlyCopy;
                }
            }
            2 | 8 => {
                let decision = sink.restore_ended(a);
                if a && held != Held::Nothing {
                    assert_eq!(decision, Decision::Over(Ok(())));
                    (held, last_failed) = (Held::Restored, Some(false));
                    ends = (!keep || leaves) && held != Held::OnlyCopy;
                } else {
                    assert_eq!(decision, Decision::Nothing, "a failed restore costs nothing");
                }
            }
            3 => {
                let decision = sink.terminate(signal);
                if held == Held::OnlyCopy && !(asked && signal == Ask::End) {
                    assert_eq!(decision, Decision::Stay, "only a second request costs the only copy");
                    asked |= signal == Ask::End;
                    leaves = true;
                } else {
                    let lost = held == Held::OnlyCopy || receiving;
                    let failed = lost || last_failed.unwrap_or(!keep);
                    assert_eq!(is_failure(&decision), failed);
                    assert_eq!(decision == Decision::Over(Ok(())), !failed);
                    ends = true;
                }
            }
            _ => {}
        }
        if ends {
            sink = Sink::new(keep);
            (held, receiving, asked, leaves, last_failed) = fresh;
        }
        assert_eq!(sink.is_receiving(), receiving);
        assert_eq!(sink.has_only_copy(), held == Held::OnlyCopy);
        assert_eq!(sink.stays(), keep && !leaves);
        assert_eq!(sink.is_done(), held == Held::Restored && !receiving && !sink.stays());
        assert_eq!(sink.takes_peers(), sink.stays() || held == Held::Nothing);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let which = input.small();
    let keep = which & 2 != 0;
    match which & 1 {
        0 => source(keep, &mut input),
        _ => sink(keep, &mut input),
    }
});
