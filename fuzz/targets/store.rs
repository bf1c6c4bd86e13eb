//! Bodies against a vector of bytes for each. Input: the budget of descriptors, then operations, each with
//! the body it is about and, where it needs one, a length. Bodies that are gone are used on.
#![no_main]

use std::collections::HashSet;
use std::os::fd::AsRawFd;

use criu_relay::store::body::INLINE_MAX;
use criu_relay::store::{Bodies, BodyId, Content};
use criu_relay_fuzz::Input;
use libfuzzer_sys::fuzz_target;

struct Model {
    id: BodyId,
    holders: u32,
    bytes: Vec<u8>,
    // It has had more bytes at once than stay inline, and lives in a file since.
    in_file: bool,
}

/// No body gets longer than this, so that an input costs little.
const LONGEST: usize = 5 * INLINE_MAX;

/// Lengths of all kinds, many of them around the one at which a body moves to a file.
fn length(input: &mut Input) -> usize {
    let n = usize::from(input.number());
    match n % 4 {
        0 => n / 4 % 64,
        1 => INLINE_MAX - 32 + n / 4 % 64,
        2 => n / 4,
        _ => n / 4 * 4,
    }
}

fn check(bodies: &Bodies, model: &Model) {
    assert_eq!(bodies.len(model.id), model.bytes.len() as u64);
    match bodies.content(model.id) {
        None => assert_eq!(model.holders, 0),
        Some(Content::Inline(bytes)) => assert!(!model.in_file && bytes == model.bytes),
        Some(Content::File(..)) => {
            assert!(model.in_file && model.holders > 0);
            assert!(bodies.range(model.id, 0, model.bytes.len() as u64).unwrap() == model.bytes);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let budget = usize::from(input.small() % 4);
    let (mut bodies, mut models) = (Bodies::new(budget), Vec::<Model>::new());
    let mut seed = 0_u8;
    for _ in 0..256 {
        let Some(operation) = input.byte() else { break };
        let which = usize::from(input.small());
        if models.is_empty() || (operation % 8 == 0 && models.len() < 16) {
            let id = bodies.create();
            assert!(models.iter().all(|model| model.id != id), "an id is never used for another");
            models.push(Model { id, holders: 1, bytes: Vec::new(), in_file: false });
            continue;
        }
        let at = which % models.len();
        let model = &mut models[at];
        let alive = model.holders > 0;
        match operation % 8 {
            1..=3 => {
                let len = length(&mut input).min(LONGEST - model.bytes.len());
                seed = seed.wrapping_add(41);
                let piece: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
                assert_eq!(bodies.append(model.id, &piece).is_ok(), alive);
                if alive {
                    model.bytes.extend(piece);
                    model.in_file |= model.bytes.len() > INLINE_MAX;
                }
            }
            4 => {
                let len = length(&mut input);
                bodies.truncate(model.id, len as u64);
                model.bytes.truncate(len);
            }
            5 => {
                bodies.hold(model.id);
                model.holders += u32::from(alive);
            }
            6 => {
                bodies.release(model.id);
                model.holders = model.holders.saturating_sub(1);
                if model.holders == 0 {
                    model.bytes.clear();
                }
            }
            _ => {
                bodies.settle(model.id);
                let (a, b) = (length(&mut input), length(&mut input));
                let to = a.max(b).min(model.bytes.len());
                let from = a.min(b).min(to);
                match bodies.range(model.id, from as u64, to as u64) {
                    Ok(bytes) => assert!(alive && bytes == model.bytes[from..to]),
                    Err(_) => assert!(!alive),
                }
            }
        }
        check(&bodies, &models[at]);
        assert_eq!(bodies.count(), models.iter().filter(|model| model.holders > 0).count());
    }
    // No body has changed because another did, none shares its place, and the budget was kept.
    let (mut places, mut files) = (HashSet::new(), HashSet::new());
    for model in &models {
        check(&bodies, model);
        if let Some(Content::File(fd, start)) = bodies.content(model.id) {
            assert!(places.insert((fd.as_raw_fd(), start)));
            files.insert(fd.as_raw_fd());
        }
    }
    assert!(files.len() <= budget + 1);
    for model in &models {
        (0..model.holders).for_each(|_| bodies.release(model.id));
    }
    assert_eq!(bodies.count(), 0);
});
