//! Byte movers between descriptors and bodies. It owns nothing.
//!
//! One turn moves [`TURN`] bytes at most; who could move more is queued again by its owner.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::sendfile;
use rustix::io::{Errno, read, write};

use crate::store::{Bodies, BodyId, Content};
use crate::wire::Key;

/// What one read(2) takes at most, in bytes: large enough that system calls don't count, small enough to
/// stay in the processor's cache until the bytes are written on.
pub const BLOCK: usize = 256 * 1024;

/// What one connection moves in a turn, in bytes: the pipe's size, so that a full pipe is emptied at once.
pub const TURN: usize = 1 << 20;

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The descriptor is not ready; an event will come.
    Wait,
    /// The turn is used up; no event will come.
    Again,
    /// Everything has been moved.
    End,
}

/// An image being written: bytes that go to the end of a body.
#[derive(Debug)]
pub struct Inflow {
    /// The image.
    pub key: Key,
    /// Where its bytes go.
    pub body: BodyId,
    /// How long the body was before; what is behind is taken back when the writer fails.
    pub start: u64,
}

/// An image being read: the bytes `at..end` of a body.
#[derive(Debug)]
pub struct Outflow {
    /// The image.
    pub key: Key,
    /// Where its bytes are.
    pub body: BodyId,
    /// What has been read so far.
    pub at: u64,
    /// Where the image ends.
    pub end: u64,
}

/// Why [`fill`] failed.
#[derive(Debug)]
pub enum FillError {
    /// The descriptor.
    Read(io::Error),
    /// The store.
    Store(io::Error),
}

/// Moves bytes from `source` to the end of `body`.
pub fn fill(
    source: BorrowedFd<'_>,
    bodies: &mut Bodies,
    body: BodyId,
    block: &mut [u8],
) -> Result<Flow, FillError> {
    let mut moved = 0;
    while moved < TURN {
        match read(source, &mut *block) {
            Ok(0) => return Ok(Flow::End),
            Ok(n) => {
                bodies.append(body, &block[..n]).map_err(FillError::Store)?;
                moved += n;
            }
            Err(Errno::AGAIN) => return Ok(Flow::Wait),
            Err(Errno::INTR) => {}
            Err(error) => return Err(FillError::Read(error.into())),
        }
    }
    Ok(Flow::Again)
}

/// Moves the rest of an image to `target`: from a file without a copy, with sendfile(2).
pub fn drain(bodies: &Bodies, out: &mut Outflow, target: BorrowedFd<'_>) -> io::Result<Flow> {
    let stop = out.end.min(out.at + TURN as u64);
    while out.at < stop {
        let count = (stop - out.at) as usize;
        let moved = match bodies.content(out.body) {
            Some(Content::Inline(bytes)) => {
                let at = out.at as usize;
                let piece = bytes.get(at..at + count).ok_or_else(missing)?;
                write(target, piece)
            }
            Some(Content::File(file, start)) => {
                let mut offset = start + out.at;
                sendfile(target, file, Some(&mut offset), count)
            }
            None => return Err(missing()),
        };
        match moved {
            Ok(0) => return Err(missing()),
            Ok(n) => out.at += n as u64,
            Err(Errno::AGAIN) => return Ok(Flow::Wait),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(if out.at == out.end { Flow::End } else { Flow::Again })
}

fn missing() -> io::Error {
    io::Error::other("the image's memory has been freed")
}

/// A size for people.
pub fn human(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    if bytes < 1024 { format!("{bytes} bytes") } else { format!("{size:.1} {}", units[unit]) }
}
