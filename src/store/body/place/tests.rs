//! A file for each body, as whoever opens it sees it.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, open};

use super::*;
use crate::store::body::INLINE_MAX;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31)).collect()
}

/// Where files without a name can be made: not every file system can.
fn dir() -> PathBuf {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { shm.into() } else { std::env::temp_dir() }
}

fn nameless() -> Files {
    Files::Nameless(open(dir(), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap())
}

fn all_kinds(max: usize) -> [Bodies; 2] {
    [Files::Own, nameless()].map(|files| Bodies::new(max).with_files(files))
}

/// Everything that is read through its link in /proc, and how many names the file has.
fn seen(file: BorrowedFd<'_>) -> (Vec<u8>, u64) {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (fs::read(&path).unwrap(), fs::metadata(path).unwrap().nlink())
}

#[test]
fn every_body_has_a_file_that_is_as_long_as_it_is() {
    for len in [0, 1, 300, 4096, INLINE_MAX, INLINE_MAX + 1, 100_000] {
        for mut bodies in all_kinds(10) {
            let (id, bytes) = (bodies.create(), pattern(len));
            bytes.chunks(5000).for_each(|piece| bodies.append(id, piece).unwrap());
            assert_eq!(bodies.own_file(id).is_some(), len > INLINE_MAX);
            let first = bodies.file_of(id).unwrap().as_raw_fd();
            assert_eq!(seen(bodies.file_of(id).unwrap()), (bytes.clone(), 0), "{len}");
            assert_eq!(bodies.own_file(id).unwrap().as_raw_fd(), first, "it has one");
            assert_eq!(bodies.range(id, 0, len as u64).unwrap(), bytes);
            // It grows there, and what fails to is not seen.
            bodies.append(id, b"more").unwrap();
            let longer = [&bytes[..], b"more"].concat();
            assert_eq!(seen(bodies.file_of(id).unwrap()).0, longer);
            bodies.append(id, b"but not this").unwrap();
            bodies.truncate(id, longer.len() as u64);
            assert_eq!(seen(bodies.file_of(id).unwrap()).0, longer);
            bodies.release(id);
            assert!(bodies.own_file(id).is_none() && bodies.file_of(id).is_err());
            assert_eq!((bodies.used(), bodies.memfds), (0, 0));
        }
    }
}

#[test]
fn what_a_file_takes_is_counted() {
    let page = rustix::param::page_size() as u64;
    for mut bodies in all_kinds(10) {
        bodies = bodies.limited(Some(4 * page), None);
        let ids = [(); 3].map(|()| bodies.create());
        for id in ids {
            bodies.append(id, b"small").unwrap();
            bodies.settle(id);
        }
        assert_eq!(bodies.used(), 15);
        // A page for each, and one that it may need next.
        for id in &ids[..2] {
            bodies.file_of(*id).unwrap();
        }
        assert_eq!(bodies.used(), 2 * page + 5);
        let error = bodies.file_of(ids[2]).unwrap_err();
        assert!(crate::store::limit::is_full(&error), "{error}");
        bodies.release(ids[0]);
        bodies.file_of(ids[2]).unwrap();
        bodies.release(ids[1]);
        bodies.release(ids[2]);
        assert_eq!(bodies.used(), 0);
    }
}

#[test]
fn without_a_descriptor_for_each_it_is_an_error() {
    for mut bodies in all_kinds(2) {
        let ids = [(); 3].map(|()| bodies.create());
        for id in &ids[..2] {
            bodies.file_of(*id).unwrap();
        }
        // Small ones that nobody opens as files need none.
        bodies.append(ids[2], b"small").unwrap();
        let why = bodies.file_of(ids[2]).unwrap_err().to_string();
        assert!(
            why.contains("2 images have a file of their own, as many as") && why.contains("ulimit -n"),
            "{why}"
        );
        assert_eq!(bodies.range(ids[2], 0, 5).unwrap(), b"small");
        let error = bodies.append(ids[2], &pattern(INLINE_MAX)).unwrap_err();
        assert!(error.to_string().contains("ulimit -n"), "{error}");
        assert_eq!(bodies.len(ids[2]), 5, "it is taken back");
        bodies.release(ids[0]);
        bodies.append(ids[2], &pattern(INLINE_MAX)).unwrap();
        assert_eq!(seen(bodies.file_of(ids[2]).unwrap()).0.len(), INLINE_MAX + 5);
    }
}

#[test]
fn a_file_gets_a_name_and_keeps_its_bytes() {
    let path = dir().join(format!("crt-place-{}.img", std::process::id()));
    let mut bodies = Bodies::new(1).with_files(nameless());
    let (id, bytes) = (bodies.create(), pattern(50_000));
    bodies.append(id, &bytes).unwrap();
    let link = format!("/proc/self/fd/{}", bodies.file_of(id).unwrap().as_raw_fd());
    rustix::fs::linkat(CWD, link, CWD, &path, rustix::fs::AtFlags::SYMLINK_FOLLOW).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    bodies.release(id);
    // A later process takes it for a body again; beyond every limit, since it is there.
    let mut bodies = Bodies::new(0).limited(Some(1), None).with_files(nameless());
    let adopted = bodies.adopt(File::options().read(true).write(true).open(&path).unwrap().into()).unwrap();
    assert_eq!((bodies.len(adopted), bodies.used()), (50_000, bodies.up(50_000)));
    assert_eq!(bodies.range(adopted, 0, 50_000).unwrap(), bytes);
    assert_eq!(seen(bodies.file_of(adopted).unwrap()), (bytes, 1));
    bodies.release(adopted);
    assert_eq!((bodies.used(), bodies.memfds), (0, 0));
    fs::remove_file(path).unwrap();
}

#[test]
fn where_files_are_shared_none_is_anybodys_own() {
    let mut bodies = Bodies::new(0);
    let id = bodies.create();
    bodies.append(id, &pattern(INLINE_MAX + 1)).unwrap();
    assert!(bodies.own_file(id).is_none() && bodies.file_of(id).is_err(), "it is in the arena");
}
