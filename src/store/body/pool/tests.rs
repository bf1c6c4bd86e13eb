//! Memory that is written beforehand: who gets it, and that all of it is counted.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::store::{Content, Files, SpillFile};
use crate::wire::Key;

const MIB: u64 = 1 << 20;

fn pattern(len: u64, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn pages(n: u32) -> Key {
    Key::stream(format!("pages-{n}.img").as_bytes())
}

/// What is counted is what bodies and pool take.
fn counted(bodies: &Bodies) -> u64 {
    let sum: u64 = bodies.bodies.iter().map(|(_, body)| body.charge()).sum();
    assert_eq!(bodies.used(), sum + bodies.pool());
    let files = bodies.bodies.iter().filter(|(_, body)| matches!(body.place, Place::Memfd(..))).count();
    assert_eq!(bodies.memfds, files + bodies.pool.spare.iter().filter(|spare| spare.file.is_some()).count());
    bodies.used()
}

fn filled(bodies: &mut Bodies, sizes: &[u64]) -> Filling {
    bodies.prepare(sizes);
    loop {
        let before = bodies.pool();
        let filling = bodies.fill_pool();
        assert!(bodies.pool() <= before + TURN, "one turn at a time");
        counted(bodies);
        if !matches!(filling, Filling::Again) {
            return filling;
        }
    }
}

fn prepared(limit: Option<u64>, sizes: &[u64]) -> Bodies {
    let mut bodies = Bodies::new(9).limited(limit, None);
    assert!(matches!(filled(&mut bodies, sizes), Filling::Done));
    bodies
}

/// An image that arrives in pieces.
fn image(bodies: &mut Bodies, n: u32, bytes: &[u8]) -> BodyId {
    let id = bodies.create_for(&pages(n)).unwrap();
    for piece in bytes.chunks(300_007) {
        bodies.append(id, piece).unwrap();
        counted(bodies);
    }
    id
}

fn fd(bodies: &Bodies, id: BodyId) -> Option<i32> {
    match bodies.content_at(id, 0) {
        Some((Content::File(file, _), _)) => Some(file.as_raw_fd()),
        _ => None,
    }
}

/// How much the file really has, and how long it is.
fn blocks(bodies: &Bodies, id: BodyId) -> (u64, u64) {
    let Some((Content::File(file, _), _)) = bodies.content_at(id, 0) else { panic!("it is in a file") };
    let stat = rustix::fs::fstat(file).unwrap();
    (stat.st_blocks as u64 * 512, stat.st_size as u64)
}

fn done(mut bodies: Bodies, ids: &[BodyId]) {
    ids.iter().for_each(|id| bodies.release(*id));
    bodies.give_pool_back();
    while bodies.drain_pool() {
        counted(&bodies);
    }
    assert_eq!((counted(&bodies), bodies.memfds, bodies.pool()), (0, 0, 0));
}

#[test]
fn images_begin_in_what_was_written_for_them() {
    let mut bodies = prepared(None, &[2 * MIB, 3 * MIB, 100]);
    assert_eq!((bodies.pool(), counted(&bodies)), (5 * MIB, 5 * MIB));
    // Nothing else takes it.
    let other = bodies.create_for(&Key::stream(*b"pstree.img")).unwrap();
    bodies.append(other, &pattern(50_000, 9)).unwrap();
    assert_eq!(bodies.pool(), 5 * MIB);
    // One fits, one is too large for its file.
    let contents = [pattern(2 * MIB, 1), pattern(4 * MIB + 5, 2), pattern(700_000, 3)];
    let ids: Vec<_> = (0..3).map(|n| image(&mut bodies, n as u32, &contents[n])).collect();
    assert_eq!(bodies.pool(), 0);
    for (id, content) in ids.iter().zip(&contents) {
        assert_eq!(&bodies.range(*id, 0, content.len() as u64).unwrap(), content);
        bodies.settle(*id);
        assert_eq!(bodies.memory(*id) & !4095, bodies.up(content.len() as u64));
        assert_eq!(blocks(&bodies, *id), (bodies.up(content.len() as u64), content.len() as u64));
    }
    counted(&bodies);
    done(bodies, &[&ids[..], &[other]].concat());
}

#[test]
fn what_an_image_does_not_need_is_cut_off_when_it_is_complete() {
    let mut bodies = prepared(None, &[4 * MIB]);
    let content = pattern(MIB + 100, 1);
    let id = image(&mut bodies, 1, &content);
    let end = bodies.file_end(id, 100_000).unwrap();
    assert_eq!((end.offset, end.room), (MIB + 100, 100_000));
    bodies.extend(id, 0);
    // It is not given back before, whatever is taken back.
    bodies.truncate(id, 1000);
    assert_eq!(bodies.memory(id) & !4095, 4 * MIB);
    assert_eq!((counted(&bodies) & !4095, blocks(&bodies, id).0), (4 * MIB, 4 * MIB));
    bodies.append(id, &content[1000..]).unwrap();
    bodies.settle(id);
    assert_eq!(bodies.memory(id) & !4095, bodies.up(MIB + 100));
    assert_eq!(blocks(&bodies, id), (bodies.up(MIB + 100), MIB + 100));
    // From then on it grows and shrinks as any other.
    bodies.append(id, &pattern(20_000, 2)).unwrap();
    assert_eq!(bodies.memory(id) & !4095, bodies.up(MIB + 20_100));
    bodies.truncate(id, 5000);
    assert_eq!(bodies.memory(id) & !4095, bodies.up(5000));
    assert_eq!(bodies.range(id, 0, 5000).unwrap(), content[..5000]);
    counted(&bodies);
    done(bodies, &[id]);
}

#[test]
fn a_small_image_leaves_a_large_file_to_the_next() {
    for len in [0, 3000, 200_000, MIB / 2] {
        let mut bodies = prepared(None, &[4 * MIB]);
        let small = pattern(len, 1);
        let id = image(&mut bodies, 1, &small);
        assert_eq!(bodies.pool(), 0);
        let file = fd(&bodies, id);
        bodies.settle(id);
        assert_eq!(bodies.pool(), 4 * MIB);
        assert_eq!(bodies.range(id, 0, len).unwrap(), small);
        assert!(bodies.memory(id) <= bodies.up(len) + 1000);
        counted(&bodies);
        let large = pattern(3 * MIB, 2);
        let next = image(&mut bodies, 2, &large);
        assert_eq!(fd(&bodies, next), file);
        bodies.settle(next);
        assert_eq!(bodies.range(next, 0, 3 * MIB).unwrap(), large);
        assert_eq!(bodies.range(id, 0, len).unwrap(), small);
        done(bodies, &[id, next]);
    }
    // With a little more it stays.
    let mut bodies = prepared(None, &[4 * MIB]);
    let id = image(&mut bodies, 1, &pattern(MIB / 2 + 1, 1));
    bodies.settle(id);
    assert_eq!(bodies.pool(), 0);
    counted(&bodies);
    // A file that is none the better for the next image does not take its place.
    let mut bodies = prepared(None, &[MIB, 4 * MIB]);
    let first = image(&mut bodies, 1, b"small");
    bodies.settle(first);
    let next = bodies.create_for(&pages(2)).unwrap();
    assert_eq!((bodies.memory(next) & !4095, bodies.pool()), (4 * MIB, MIB));
    done(bodies, &[first, next]);
}

#[test]
fn a_file_that_somebody_has_read_is_not_used_again() {
    let mut bodies = prepared(None, &[4 * MIB]);
    let id = image(&mut bodies, 1, &pattern(50_000, 1));
    // A reader; what it has read may lie in a pipe as pages of the file, also when it is gone.
    bodies.hold(id);
    bodies.punch(id, 0, 10_000).unwrap();
    bodies.release(id);
    bodies.settle(id);
    assert_eq!(bodies.pool(), 0);
    assert_eq!(bodies.memory(id) & !4095, bodies.up(50_000) - 8192);
    counted(&bodies);
    done(bodies, &[id]);
}

#[test]
fn the_pool_is_the_first_to_go_at_the_limit() {
    let mut bodies = prepared(Some(8 * MIB), &[2 * MIB, 5 * MIB]);
    assert_eq!(bodies.left(), 8 * MIB);
    let other = bodies.create();
    let bytes = pattern(2 * MIB, 1);
    assert_eq!(bodies.room(other, MIB).unwrap(), INLINE_MAX as u64);
    bodies.append(other, &bytes).unwrap();
    assert!((4 * MIB..=6 * MIB).contains(&bodies.pool()), "{}", bodies.pool());
    assert!(counted(&bodies) <= 8 * MIB);
    // An image that takes its file and all the rest.
    let first = bodies.create_for(&pages(1)).unwrap();
    assert_eq!(bodies.memory(first) & !4095, 2 * MIB);
    let long = pattern(6 * MIB - 8192, 2);
    for piece in long.chunks(100_000) {
        assert!(bodies.room(first, piece.len() as u64).unwrap() == piece.len() as u64);
        bodies.append(first, piece).unwrap();
        assert!(counted(&bodies) <= 8 * MIB);
    }
    assert_eq!(bodies.pool(), 0);
    assert_eq!(bodies.range(first, 0, long.len() as u64).unwrap(), long);
    assert_eq!(bodies.range(other, 0, 2 * MIB).unwrap(), bytes);
    assert!(bodies.append(other, &bytes).is_err());
    counted(&bodies);
    done(bodies, &[first, other]);
}

#[test]
fn writing_stops_where_it_has_to() {
    let mut bodies = Bodies::new(9).limited(Some(3 * MIB + 5000), None);
    match filled(&mut bodies, &[2 * MIB, 2 * MIB]) {
        Filling::Stopped(error) => assert!(crate::store::limit::is_full(&error)),
        other => panic!("{other:?}"),
    }
    assert_eq!((bodies.pool(), bodies.is_filling()), (3 * MIB + 4096, false));
    done(bodies, &[]);
    // Descriptors.
    let mut bodies = Bodies::new(1);
    assert!(matches!(filled(&mut bodies, &[MIB, MIB]), Filling::Stopped(_)));
    assert_eq!(bodies.pool(), MIB);
    done(bodies, &[]);
    // An image comes.
    let mut bodies = Bodies::new(9);
    bodies.prepare(&[3 * MIB, 3 * MIB]);
    assert!(matches!(bodies.fill_pool(), Filling::Again));
    let ids = [image(&mut bodies, 1, &pattern(2 * MIB, 1)), image(&mut bodies, 2, &pattern(2 * MIB, 2))];
    assert!(!bodies.is_filling() && matches!(bodies.fill_pool(), Filling::Done));
    counted(&bodies);
    done(bodies, &ids);
}

#[test]
fn a_new_request_uses_what_is_there() {
    let mut bodies = prepared(None, &[3 * MIB]);
    let file = bodies.pool.spare[0].file.as_ref().unwrap().as_raw_fd();
    assert!(matches!(filled(&mut bodies, &[MIB, 5, 2 * MIB, MIB]), Filling::Done));
    assert_eq!(bodies.pool(), 5 * MIB);
    assert_eq!(bodies.pool.spare[2].file.as_ref().map(AsRawFd::as_raw_fd), Some(file));
    // What is hardly worth a file takes none.
    assert!(matches!(filled(&mut bodies, &[100, 7]), Filling::Done));
    assert_eq!(bodies.pool(), 5 * MIB);
    // One that is too small grows; what nobody asks for goes behind.
    assert!(matches!(filled(&mut bodies, &[4 * MIB, 70_000]), Filling::Done));
    let bytes: Vec<_> = bodies.pool.spare.iter().map(|spare| spare.bytes).collect();
    assert_eq!(bytes, [4 * MIB, MIB, MIB]);
    bodies.give_pool_back();
    let mut turns = 0;
    while bodies.drain_pool() {
        turns += 1;
        counted(&bodies);
    }
    assert_eq!((bodies.pool(), turns), (0, 0));
    // In turns.
    assert!(matches!(filled(&mut bodies, &[2 * BACK + MIB]), Filling::Done));
    bodies.give_pool_back();
    assert!(bodies.drain_pool() && bodies.pool() == BACK + MIB);
    assert!(bodies.drain_pool() && bodies.pool() == MIB);
    assert!(!bodies.drain_pool());
    done(bodies, &[]);
}

#[test]
fn beyond_the_file_it_spills_as_any_other() {
    let dir = std::env::temp_dir().join(format!("crt-pool-{}", std::process::id()));
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&dir).unwrap();
    let spill = SpillFile::open(&dir).unwrap();
    std::fs::remove_dir(&dir).unwrap();
    let mut bodies = Bodies::new(9).limited(Some(4 * MIB), Some(spill));
    assert!(matches!(filled(&mut bodies, &[2 * MIB, MIB]), Filling::Done));
    let content = pattern(7 * MIB, 1);
    let id = image(&mut bodies, 1, &content);
    assert!(bodies.pool() == 0 && counted(&bodies) <= 4 * MIB);
    assert_eq!(bodies.range(id, 0, 7 * MIB).unwrap(), content);
    bodies.settle(id);
    counted(&bodies);
    bodies.truncate(id, MIB);
    assert_eq!(bodies.memory(id) & !4095, MIB);
    bodies.append(id, b"new").unwrap();
    assert_eq!(bodies.range(id, MIB, MIB + 3).unwrap(), b"new");
    counted(&bodies);
    done(bodies, &[id]);
}

#[test]
fn files_that_are_shown_are_as_long_as_their_images() {
    let dir = std::env::temp_dir().join(format!("crt-pool-view-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let nameless = Files::Nameless(std::fs::File::open(&dir).unwrap().into());
    for files in [Files::Own, nameless] {
        let mut bodies = Bodies::new(9).with_files(files);
        assert!(matches!(filled(&mut bodies, &[MIB, 2 * MIB]), Filling::Done));
        let pool = bodies.pool.spare[0].file.as_ref().unwrap().as_raw_fd();
        let (content, small) = (pattern(MIB - 5000, 1), pattern(100, 2));
        let ids = [image(&mut bodies, 1, &content), image(&mut bodies, 2, &small)];
        assert_eq!(fd(&bodies, ids[0]), Some(pool));
        for (id, content) in [(ids[0], &content), (ids[1], &small)] {
            bodies.settle(id);
            let shown = bodies.file_of(id).unwrap();
            assert_eq!(rustix::fs::fstat(shown).unwrap().st_size as usize, content.len());
            counted(&bodies);
        }
        assert_eq!(bodies.pool(), 2 * MIB, "the small one has left its file");
        done(bodies, &ids);
    }
    std::fs::remove_dir(&dir).unwrap();
}

#[test]
fn the_last_descriptor_is_for_an_image_that_needs_a_file() {
    let mut bodies = Bodies::new(2).with_files(Files::Own);
    assert!(matches!(filled(&mut bodies, &[MIB, MIB]), Filling::Done));
    let id = bodies.create();
    bodies.append(id, b"inventory").unwrap();
    assert!(bodies.file_of(id).is_ok());
    assert_eq!((bodies.pool(), counted(&bodies)), (MIB, MIB + bodies.memory(id)));
    // And none is left.
    let ids = [id, image(&mut bodies, 1, &pattern(MIB, 1)), bodies.create()];
    bodies.append(ids[2], b"more").unwrap();
    assert!(bodies.file_of(ids[2]).is_err());
    done(bodies, &ids);
}

/// A tmpfs of four MiB, for as long as the process lives that has it; None: none can be had here.
fn small_tmpfs() -> Option<(Child, OwnedFd)> {
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", "mount -t tmpfs -o size=4m none /tmp && echo && exec cat"]);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = child.ok()?;
    let mut line = [0];
    if child.stdout.as_mut()?.read_exact(&mut line).is_err() {
        let _ = child.wait();
        return None;
    }
    let dir = File::open(format!("/proc/{}/root/tmp", child.id())).unwrap();
    Some((child, dir.into()))
}

#[test]
fn the_pool_is_the_first_to_go_where_the_file_system_is_full() {
    let Some((mut child, dir)) = small_tmpfs() else { return };
    let mut bodies = Bodies::new(9).with_files(Files::Nameless(dir));
    // More than fits, as where memory that is shared was counted twice.
    assert!(matches!(filled(&mut bodies, &[MIB, 16 * MIB]), Filling::Stopped(_)));
    assert!(bodies.pool() >= 3 * MIB);
    let other = bodies.create();
    bodies.append(other, &pattern(MIB, 1)).unwrap();
    let first = image(&mut bodies, 1, &pattern(2 * MIB, 2));
    let bytes = bodies.range(first, 0, 2 * MIB).unwrap();
    assert_eq!(bytes, pattern(2 * MIB, 2));
    // Of what is full without a pool, an error says so.
    assert!(bodies.append(other, &pattern(2 * MIB, 3)).is_err());
    counted(&bodies);
    done(bodies, &[first, other]);
    drop(child.stdin.take());
    child.wait().unwrap();
}
