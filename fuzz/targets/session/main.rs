//! Both life cycles, by the rule 'fail towards the running process'. Input: which side, whether it keeps, whether
//! the source may run on beside its copy and the commit point (four bits), then one byte for each event: its low
//! five bits say which, the others are its arguments.
#![no_main]

mod sink;
mod source;

use criu_relay::session::{Ask, Commit};
use criu_relay_fuzz::Input;
use libfuzzer_sys::fuzz_target;

fn signal(c: bool) -> Ask {
    if c { Ask::Hangup } else { Ask::End }
}

fn commit(restored: bool) -> Commit {
    if restored { Commit::Restored } else { Commit::Stored }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let which = input.small();
    let keep = which & 2 != 0;
    match which & 1 {
        0 => source::run(source::Options::new(keep, which & 4 != 0, commit(which & 8 != 0)), &mut input),
        _ => sink::run(keep, &mut input),
    }
});
