//! The store, alone.

use super::*;
use crate::store::limit;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn place(bodies: &Bodies, id: BodyId) -> &'static str {
    match bodies.bodies.get(id).unwrap().place {
        Place::Inline(_) => "inline",
        Place::Memfd(..) => "memfd",
        Place::Arena(..) => "arena",
    }
}

#[test]
fn grows_from_inline_to_a_file() {
    let mut bodies = Bodies::new(10);
    let id = bodies.create();
    let bytes = pattern(3 * INLINE_MAX, 1);
    for piece in bytes.chunks(1000) {
        bodies.append(id, piece).unwrap();
        let expected = if bodies.len(id) as usize <= INLINE_MAX { "inline" } else { "memfd" };
        assert_eq!(place(&bodies, id), expected);
    }
    assert_eq!(bodies.range(id, 0, bytes.len() as u64).unwrap(), bytes);
}

#[test]
fn beyond_the_budget_bodies_share_the_arena() {
    let mut bodies = Bodies::new(1);
    let ids: Vec<_> = (0..4).map(|_| bodies.create()).collect();
    let contents: Vec<_> = (0..4).map(|i| pattern(INLINE_MAX + 5000 * i + 1, i as u8)).collect();
    // Interleaved, so that each grows beside the others.
    for at in (0..contents[3].len()).step_by(4096) {
        for (id, content) in ids.iter().zip(&contents) {
            if at < content.len() {
                bodies.append(*id, &content[at..content.len().min(at + 4096)]).unwrap();
            }
        }
    }
    let places: Vec<_> = ids.iter().map(|id| place(&bodies, *id)).collect();
    assert_eq!(places, ["memfd", "arena", "arena", "arena"]);
    for (id, content) in ids.iter().zip(&contents) {
        assert_eq!(&bodies.range(*id, 0, content.len() as u64).unwrap(), content);
    }
    // Freed places are used again, and the memfd's budget too.
    bodies.release(ids[0]);
    bodies.release(ids[2]);
    let (a, b) = (bodies.create(), bodies.create());
    bodies.append(a, &contents[3]).unwrap();
    bodies.append(b, &contents[3]).unwrap();
    assert_eq!((place(&bodies, a), place(&bodies, b)), ("memfd", "arena"));
    assert_eq!(bodies.slots, 3);
    assert_eq!(bodies.range(b, 0, contents[3].len() as u64).unwrap(), contents[3]);
    assert_eq!(bodies.range(ids[3], 0, contents[3].len() as u64).unwrap(), contents[3]);
}

#[test]
fn freed_arena_space_goes_back_to_the_system() {
    let mut bodies = Bodies::new(0);
    let id = bodies.create();
    bodies.append(id, &pattern(1 << 20, 0)).unwrap();
    let blocks = |bodies: &Bodies| rustix::fs::fstat(bodies.arena.as_ref().unwrap()).unwrap().st_blocks;
    assert!(blocks(&bodies) >= 2048);
    bodies.release(id);
    assert_eq!(blocks(&bodies), 0);
}

#[test]
fn a_body_lives_as_long_as_a_holder() {
    let mut bodies = Bodies::new(1);
    let id = bodies.create();
    bodies.append(id, b"abc").unwrap();
    bodies.hold(id);
    bodies.release(id);
    assert_eq!(bodies.len(id), 3);
    bodies.release(id);
    assert!(bodies.content_at(id, 0).is_none());
    assert!(bodies.append(id, b"x").is_err());
    assert_eq!(bodies.count(), 0);
}

#[test]
fn a_failed_append_is_taken_back() {
    for len in [10, INLINE_MAX * 2] {
        let mut bodies = Bodies::new(1);
        let id = bodies.create();
        let bytes = pattern(len, 3);
        bodies.append(id, &bytes).unwrap();
        bodies.append(id, b"half").unwrap();
        bodies.truncate(id, len as u64);
        bodies.append(id, b"new").unwrap();
        let expected: Vec<u8> = bytes.iter().copied().chain(*b"new").collect();
        assert_eq!(bodies.range(id, 0, (len + 3) as u64).unwrap(), expected);
    }
}

fn pages() -> u64 {
    rustix::param::page_size() as u64
}

/// A directory for a spill file, removed at the end.
struct Dir(std::path::PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("crt-{name}-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        Self(path)
    }

    fn spill(&self) -> Option<SpillFile> {
        Some(SpillFile::open(&self.0).unwrap())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn sum(bodies: &Bodies) -> u64 {
    bodies.bodies.iter().map(|(id, _)| bodies.memory(id)).sum()
}

#[test]
fn every_kind_of_body_is_counted_and_given_back() {
    for budget in [0, 1] {
        let mut bodies = Bodies::new(budget).limited(Some(1 << 20), None);
        let small = bodies.create();
        bodies.append(small, &pattern(1000, 1)).unwrap();
        assert!((1000..=2000).contains(&bodies.used()), "{}", bodies.used());
        bodies.settle(small);
        assert_eq!(bodies.used(), 1000);
        let large = bodies.create();
        bodies.append(large, &pattern(100_000, 2)).unwrap();
        assert_eq!(bodies.memory(large), 100_000_u64.next_multiple_of(pages()));
        assert_eq!(bodies.used(), sum(&bodies));
        bodies.truncate(large, 5000);
        assert_eq!(bodies.memory(large), 5000_u64.next_multiple_of(pages()));
        bodies.append(large, &pattern(60_000, 3)).unwrap();
        assert_eq!(bodies.memory(large), 65_000_u64.next_multiple_of(pages()));
        // What a restore has read.
        assert_eq!(bodies.punch(large, 0, 40_000).unwrap(), 40_000 / pages() * pages());
        assert_eq!(bodies.punch(large, 0, 40_000).unwrap(), 40_000 / pages() * pages());
        assert_eq!(bodies.memory(large), 65_000_u64.next_multiple_of(pages()) - 40_000 / pages() * pages());
        assert_eq!(bodies.range(large, 40_000, 65_000).unwrap(), pattern(60_000, 3)[35_000..]);
        bodies.hold(large);
        bodies.release(large);
        bodies.release(small);
        assert!(bodies.used() > 0 && bodies.used() == sum(&bodies));
        bodies.release(large);
        assert_eq!(bodies.used(), 0);
    }
}

#[test]
fn nothing_is_taken_beyond_the_limit() {
    let limit = 1 << 20;
    for budget in [0, 1] {
        let mut bodies = Bodies::new(budget).limited(Some(limit), None);
        let id = bodies.create();
        let bytes = pattern(limit as usize, 1);
        bodies.append(id, &bytes[..limit as usize - 10]).unwrap();
        let error = bodies.append(id, b"eleven byte").unwrap_err();
        assert!(limit::is_full(&error));
        let why = bodies.refusal(&Key::stream(*b"pages-1.img"), id, &error);
        assert!(
            why.starts_with("pages-1.img can't grow past byte 1048566: the memory limit of 1.0 MiB"),
            "{why}"
        );
        assert_eq!(bodies.range(id, 0, limit - 10).unwrap(), bytes[..limit as usize - 10]);
        // To the last byte; and no other body finds room.
        bodies.append(id, &bytes[limit as usize - 10..]).unwrap();
        assert_eq!((bodies.used(), bodies.left()), (limit, 0));
        let other = bodies.create();
        assert!(bodies.append(other, b"x").is_err() && bodies.room(other, 1).is_err());
        assert!(bodies.file_end(other, 1).is_err() && bodies.room(id, 1).is_err());
        bodies.append(other, b"").unwrap();
        // What may be the only copy goes on.
        assert!(bodies.set_yields(true));
        bodies.append(other, &bytes).unwrap();
        assert_eq!(bodies.used(), sum(&bodies));
        bodies.release(id);
        bodies.release(other);
        assert_eq!(bodies.used(), 0);
    }
}

#[test]
fn room_is_made_first_and_given_back() {
    let mut bodies = Bodies::new(1).limited(Some(40 * pages()), None);
    let id = bodies.create();
    assert_eq!(bodies.file_end(id, u64::MAX).unwrap().room, 40 * pages());
    assert_eq!(bodies.used(), 40 * pages());
    bodies.extend(id, 0);
    assert_eq!(bodies.used(), 0);
    assert_eq!(bodies.file_end(id, 100).unwrap().room, 100);
    bodies.extend(id, 7);
    assert_eq!(bodies.used(), pages());
    assert_eq!(bodies.room(id, u64::MAX).unwrap(), 40 * pages() - 7);
    assert_eq!(bodies.file_end(id, u64::MAX).unwrap().room, 40 * pages() - 7);
    bodies.extend(id, 40 * pages() - 7);
    assert!(bodies.file_end(id, 1).is_err());
    bodies.release(id);
    assert_eq!(bodies.used(), 0);
}

#[test]
fn beyond_the_limit_bodies_go_on_in_the_spill_file() {
    let dir = Dir::new("beyond");
    for (budget, limit) in [(9, 300_000), (0, 300_000), (9, 20_000), (9, 0)] {
        let mut bodies = Bodies::new(budget).limited(Some(limit), dir.spill());
        let contents: Vec<_> = (1..6_u8).map(|i| pattern(usize::from(i) * 700_001, i)).collect();
        let ids: Vec<_> = contents.iter().map(|_| bodies.create()).collect();
        for at in (0..contents[4].len()).step_by(70_003) {
            for (id, content) in ids.iter().zip(&contents).filter(|(_, content)| at < content.len()) {
                bodies.append(*id, &content[at..content.len().min(at + 70_003)]).unwrap();
            }
            assert!(bodies.used() <= limit && bodies.used() == sum(&bodies));
        }
        for (id, content) in ids.iter().zip(&contents) {
            assert_eq!(&bodies.range(*id, 0, content.len() as u64).unwrap(), content);
            // Across every border.
            for at in (1000..content.len() - 2000).step_by(99_991) {
                assert_eq!(bodies.range(*id, at as u64, at as u64 + 1500).unwrap(), content[at..at + 1500]);
            }
            bodies.settle(*id);
        }
        // Taken back, below the border too, and written anew.
        for (kept, id) in [(3_000_000, ids[4]), (100_000, ids[3]), (10, ids[2])] {
            bodies.truncate(id, kept);
            bodies.append(id, b"new").unwrap();
            assert_eq!(bodies.range(id, kept, kept + 3).unwrap(), b"new");
            let before = bodies.range(id, 0, kept).unwrap();
            assert!(contents.iter().any(|content| content.starts_with(&before)));
            assert_eq!(bodies.used(), sum(&bodies));
        }
        // Read and freed; what is behind stays.
        let (id, content) = (ids[1], &contents[1]);
        let to = bodies.punch(id, 0, 1_300_000).unwrap();
        assert!(to <= 1_300_000 && bodies.used() == sum(&bodies));
        assert_eq!(bodies.range(id, to, content.len() as u64).unwrap(), content[to as usize..]);
        let blocks =
            |bodies: &Bodies| rustix::fs::fstat(bodies.spill.as_ref().unwrap().fd()).unwrap().st_blocks;
        assert!(blocks(&bodies) > 0);
        for id in ids {
            bodies.release(id);
        }
        assert_eq!((bodies.used(), bodies.count(), blocks(&bodies)), (0, 0, 0));
    }
    assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 0);
}

#[test]
fn a_reader_is_not_disturbed_when_its_body_spills() {
    let dir = Dir::new("reader");
    let mut bodies = Bodies::new(1).limited(Some(100_000), dir.spill());
    let id = bodies.create();
    bodies.append(id, &pattern(90_000, 1)).unwrap();
    let before = match bodies.content_at(id, 500) {
        Some((Content::File(file, at), here)) => (std::os::fd::AsRawFd::as_raw_fd(&file), at, here),
        other => panic!("{other:?}"),
    };
    bodies.append(id, &pattern(2_000_000, 2)).unwrap();
    match bodies.content_at(id, 500) {
        Some((Content::File(file, at), here)) => {
            assert_eq!((std::os::fd::AsRawFd::as_raw_fd(&file), at), (before.0, before.1));
            assert!(here >= before.2);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(bodies.range(id, 0, 90_000).unwrap(), pattern(90_000, 1));
    assert!(bodies.hard_limit().is_none());
}

#[test]
fn a_small_body_for_which_there_is_no_room_spills_too() {
    let dir = Dir::new("small");
    let mut bodies = Bodies::new(1).limited(Some(8192), dir.spill());
    let (full, small) = (bodies.create(), bodies.create());
    bodies.append(full, &pattern(8000, 1)).unwrap();
    bodies.append(small, &pattern(150, 2)).unwrap();
    for _ in 0..100 {
        bodies.append(small, &pattern(300, 3)).unwrap();
    }
    assert!(bodies.used() <= 8192);
    let all: Vec<u8> =
        [pattern(150, 2)].into_iter().chain((0..100).map(|_| pattern(300, 3))).flatten().collect();
    assert_eq!(bodies.range(small, 0, all.len() as u64).unwrap(), all);
    bodies.release(full);
    bodies.append(small, b"to the same place").unwrap();
    assert_eq!(bodies.range(small, 30_150, 30_167).unwrap(), b"to the same place");
    bodies.release(small);
    assert_eq!(bodies.used(), 0);
}

#[test]
fn images_of_a_peer_are_counted_however_empty() {
    let dir = Dir::new("empty");
    // Their places in the tables can't spill.
    for spill in [None, dir.spill()] {
        let mut bodies = Bodies::new(1).limited(Some(10_000), spill);
        let key = Key::new(*b"/d", [b'n'; 998]);
        let ids: Vec<_> = std::iter::from_fn(|| bodies.create_for(&key).ok()).collect();
        assert_eq!((ids.len(), bodies.used()), (7, 7 * 1256));
        let why = bodies.create_for(&key).unwrap_err();
        assert!(why.contains("can't be taken in: the memory limit of 9.8 KiB (--memory-limit)"), "{why}");
        assert_eq!(bodies.used(), sum(&bodies));
        ids.into_iter().for_each(|id| bodies.release(id));
        assert_eq!(bodies.used(), 0);
    }
}
