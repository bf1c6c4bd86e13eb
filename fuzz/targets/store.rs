//! Bodies against a vector of bytes for each. Input: the budget of descriptors and the limit, with or without a
//! spill file; then operations, each with the body it is about and, where it needs one, a length. Bodies that are
//! gone are used on. Memory is written beforehand, and page images begin in it.
#![no_main]

use std::collections::HashSet;
use std::fs::{DirBuilder, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt};

use criu_relay::store::body::{End, Filling, INLINE_MAX};
use criu_relay::store::limit::is_full;
use criu_relay::store::{Bodies, BodyId, Content, SpillFile};
use criu_relay::wire::Key;
use criu_relay_fuzz::Input;
use libfuzzer_sys::fuzz_target;

struct Model {
    id: BodyId,
    holders: u32,
    bytes: Vec<u8>,
    // The bytes before this have been punched out.
    punched: usize,
    was_punched: bool,
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
    let len = model.bytes.len();
    assert_eq!(bodies.len(model.id), len as u64);
    if model.holders == 0 {
        assert!(bodies.content_at(model.id, 0).is_none() && bodies.memory(model.id) == 0);
        return;
    }
    let read = bodies.range(model.id, model.punched as u64, len as u64).unwrap();
    assert!(read == model.bytes[model.punched..]);
    // Piece by piece, to the end.
    let mut at = 0;
    while at < len {
        let (content, here) = bodies.content_at(model.id, at as u64).unwrap();
        assert!(here > 0 && here <= (len - at) as u64);
        if let Content::Inline(bytes) = content {
            assert!(bytes[..here as usize] == model.bytes[at..at + here as usize]);
            assert!(len <= INLINE_MAX || (here as usize) < len);
        }
        at += here as usize;
    }
}

// What the store counts is what its bodies take, and within the limit.
fn count(bodies: &Bodies, models: &[Model], limit: Option<u64>) {
    let taken = models.iter().map(|model| bodies.memory(model.id)).sum::<u64>();
    assert_eq!(bodies.used(), taken + bodies.pool());
    // A body that ends in a page which had been punched out counts it again at once.
    let again = models.iter().filter(|model| model.was_punched).count() * 4096;
    assert!(limit.is_none_or(|limit| bodies.used() <= limit + again as u64));
}

fn spill() -> SpillFile {
    let dir = std::env::temp_dir().join(format!("criu-relay-fuzz-{}", std::process::id()));
    let _ = DirBuilder::new().mode(0o700).create(&dir);
    let spill = SpillFile::open(&dir).unwrap();
    let _ = std::fs::remove_dir(&dir);
    spill
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let first = input.small();
    let budget = usize::from(first % 4);
    // None; or from less than one body to a few.
    let limit = (first & 4 != 0).then(|| u64::from(input.small()) * 1024);
    let spills = first & 8 != 0;
    let mut bodies = Bodies::new(budget).limited(limit, spills.then(spill));
    let mut models = Vec::<Model>::new();
    let mut seed = 0_u8;
    for _ in 0..256 {
        let Some(operation) = input.byte() else { break };
        let which = usize::from(input.small());
        if models.is_empty() || (operation % 8 == 0 && models.len() < 16) {
            let id = match operation & 8 {
                0 => bodies.create(),
                _ => match bodies.create_for(&Key::stream(&b"pages-1.img"[..])) {
                    Ok(id) => id,
                    Err(_) => {
                        assert!(limit.is_some());
                        continue;
                    }
                },
            };
            assert!(models.iter().all(|model| model.id != id), "an id is never used for another");
            models.push(Model { id, holders: 1, bytes: Vec::new(), punched: 0, was_punched: false });
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
                let appended = bodies.append(model.id, &piece);
                match appended {
                    Ok(()) => {
                        assert!(alive);
                        model.bytes.extend(piece);
                    }
                    Err(error) if alive => {
                        assert!(limit.is_some() && !spills && is_full(&error));
                        // As much as there was said to be room for is taken.
                        if let Ok(room) = bodies.room(model.id, piece.len() as u64) {
                            let piece = &piece[..room as usize];
                            bodies.append(model.id, piece).unwrap();
                            model.bytes.extend(piece);
                        }
                    }
                    Err(_) => {}
                }
            }
            4 if operation & 8 != 0 => {
                // Bytes that the kernel moves there: some of those for which there is room.
                let (want, came) = (length(&mut input), length(&mut input));
                let want = want.min(LONGEST - model.bytes.len()) as u64 + 1;
                if let Ok(End { file, offset, room }) = bodies.file_end(model.id, want) {
                    assert!(alive && room > 0 && room <= want);
                    let came = came.min(room as usize - 1);
                    let piece = vec![7; came];
                    File::from(file.try_clone_to_owned().unwrap()).write_all_at(&piece, offset).unwrap();
                    bodies.extend(model.id, came as u64);
                    model.bytes.extend(piece);
                } else {
                    assert!(!alive || (limit.is_some() && !spills));
                }
            }
            4 => {
                let len = length(&mut input);
                bodies.truncate(model.id, len as u64);
                model.bytes.truncate(len);
                model.punched = model.punched.min(len);
            }
            6 if operation & 8 != 0 => {
                let to = length(&mut input).min(model.bytes.len());
                let stopped = bodies.punch(model.id, model.punched as u64, to as u64).unwrap() as usize;
                assert!(stopped <= to || stopped == model.punched);
                if alive && stopped > model.punched {
                    // What is inline stays; of the others zeros are read.
                    let read = bodies.range(model.id, model.punched as u64, stopped as u64).unwrap();
                    model.bytes[model.punched..stopped].copy_from_slice(&read);
                    (model.punched, model.was_punched) = (stopped, true);
                }
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
                    model.punched = 0;
                }
            }
            7 if operation & 24 == 8 => {
                let sizes: Vec<u64> = (0..which % 4).map(|_| length(&mut input) as u64 * 16).collect();
                bodies.prepare(&sizes);
            }
            7 if operation & 24 == 16 => {
                if matches!(bodies.fill_pool(), Filling::Stopped(_)) {
                    assert!(!bodies.is_filling());
                }
            }
            7 if operation & 24 == 24 => {
                bodies.give_pool_back();
                bodies.drain_pool();
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
        count(&bodies, &models, limit);
        assert_eq!(bodies.count(), models.iter().filter(|model| model.holders > 0).count());
    }
    // No body has changed because another did, none shares its place, and the budget was kept.
    let (mut places, mut files) = (HashSet::new(), HashSet::new());
    for model in &models {
        check(&bodies, model);
        if let Some((Content::File(fd, start), 1..)) = bodies.content_at(model.id, 0) {
            assert!(places.insert((fd.as_raw_fd(), start)));
            files.insert(fd.as_raw_fd());
        }
    }
    assert!(files.len() <= budget + 1 + usize::from(spills));
    for model in &models {
        (0..model.holders).for_each(|_| bodies.release(model.id));
    }
    bodies.give_pool_back();
    while bodies.drain_pool() {}
    assert_eq!((bodies.count(), bodies.used(), bodies.pool()), (0, 0, 0));
});
