//! Byte movers between descriptors and bodies. It owns nothing but a pipe through which the kernel moves bytes.
//!
//! What goes to a file goes there by splice(2), which copies it once: from a pipe at once, from a socket through
//! that pipe. What is small, and what goes to the heap, is read.
//!
//! One turn moves [`TURN`] bytes at most; who could move more is queued again by its owner. The store is asked for
//! room first: what it has none for stays where it is.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::sendfile;
use rustix::io::{Errno, ioctl_fionread, read, write};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

use crate::net::{self, Received};
use crate::store::body::End;
use crate::store::{Bodies, BodyId, Content, INLINE_MAX, limit};
use crate::wire::Key;

/// What one read(2) takes at most, in bytes: large enough that system calls don't count, small enough to
/// stay in the processor's cache until the bytes are written on.
pub const BLOCK: usize = 256 * 1024;

/// What one connection moves in a turn, in bytes: the pipe's size, so that a full pipe is emptied at once.
pub const TURN: usize = 1 << 20;

/// The same for the link of the relay protocol, which all images share: every turn costs a look at what the peer
/// says, and at the cache an acknowledgement that wakes the proxy.
pub const LINK_TURN: usize = 4 << 20;

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The descriptor is not ready; an event will come.
    Wait,
    /// The turn is used up; no event will come.
    Again,
    /// All that is there has been moved; the image is still growing.
    Starved,
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
    /// Where the image ends; None: it is still arriving.
    pub end: Option<u64>,
    /// So much of its memory has been freed behind the reader.
    pub freed: u64,
}

impl Outflow {
    /// All of an image.
    pub fn new(key: Key, body: BodyId, end: Option<u64>) -> Self {
        Self { key, body, at: 0, end, freed: 0 }
    }
}

/// Why [`fill`] failed.
#[derive(Debug)]
pub enum FillError {
    /// The descriptor.
    Read(io::Error),
    /// The store.
    Store(io::Error),
}

/// Moves bytes from a pipe to the end of `body`.
pub fn fill(
    pipe: BorrowedFd<'_>,
    bodies: &mut Bodies,
    body: BodyId,
    block: &mut [u8],
) -> Result<Flow, FillError> {
    let mut moved = 0;
    while moved < TURN {
        // Up to that length it may stay on the heap; the rest begins at a page's start.
        let left = INLINE_MAX.saturating_sub(usize::try_from(bodies.len(body)).unwrap_or(usize::MAX));
        let taken = if left > 0 {
            bodies.room(body, left as u64).map(|room| read(pipe, &mut block[..room as usize]))
        } else {
            bodies.file_end(body, TURN as u64).map(|End { file, mut offset, room }| {
                splice(pipe, None, file, Some(&mut offset), room as usize, SpliceFlags::NONBLOCK)
            })
        };
        let taken = match taken {
            Ok(taken) => taken,
            // It may be all that there is.
            Err(error) if limit::is_full(&error) && ioctl_fionread(pipe).is_ok_and(|here| here == 0) => {
                return Ok(if net::is_pipe_at_end(pipe) { Flow::End } else { Flow::Wait });
            }
            Err(error) => return Err(FillError::Store(error)),
        };
        if left == 0 {
            bodies.extend(body, taken.unwrap_or(0) as u64);
        }
        match taken {
            Ok(0) => return Ok(Flow::End),
            Ok(n) if left > 0 => {
                bodies.append(body, &block[..n]).map_err(FillError::Store)?;
                moved += n;
            }
            Ok(n) => moved += n,
            Err(Errno::AGAIN) => return Ok(Flow::Wait),
            Err(Errno::INTR) => {}
            // Which of the two it was shows in the error: a pipe is not full, and has no limit.
            Err(error @ (Errno::NOSPC | Errno::FBIG | Errno::NOMEM | Errno::DQUOT)) => {
                return Err(FillError::Store(error.into()));
            }
            Err(error) => return Err(FillError::Read(error.into())),
        }
    }
    Ok(Flow::Again)
}

/// The pipe through which bytes of a socket go into a file.
#[derive(Debug, Default)]
pub struct Conduit {
    pipe: Option<(OwnedFd, OwnedFd)>,
}

/// What went through a [`Conduit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// So many bytes.
    Some(u64),
    /// Nothing is there now.
    Nothing,
    /// The socket has ended.
    End,
}

impl Conduit {
    /// Moves up to `count` bytes from a socket to the end of `body`, as many as are there.
    pub fn carry(
        &mut self,
        socket: BorrowedFd<'_>,
        count: u64,
        bodies: &mut Bodies,
        body: BodyId,
    ) -> Result<Carried, FillError> {
        let (from, to) = match self.pipe.take() {
            Some(pipe) => pipe,
            None => {
                let made = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK);
                let pipe = made.map_err(|error| FillError::Store(error.into()))?;
                // Through 64 KiB it costs twice as much.
                net::enlarge(pipe.1.as_fd());
                pipe
            }
        };
        let count = match bodies.file_end(body, count.min(net::PIPE_SIZE as u64)) {
            Ok(end) => end.room as usize,
            Err(error) => {
                self.pipe = Some((from, to));
                // It may be all that there is.
                return match net::peek(socket, &mut [0; 1]) {
                    Ok(Received::End) => Ok(Carried::End),
                    Ok(Received::Wait) => Ok(Carried::Nothing),
                    Ok(_) => Err(FillError::Store(error)),
                    Err(error) => Err(FillError::Read(error)),
                };
            }
        };
        let here = loop {
            match splice(socket, None, &to, None, count, SpliceFlags::NONBLOCK) {
                Ok(n) => break n as u64,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    bodies.extend(body, 0);
                    self.pipe = Some((from, to));
                    return Ok(Carried::Nothing);
                }
                Err(error) => {
                    bodies.extend(body, 0);
                    return Err(FillError::Read(error.into()));
                }
            }
        };
        let mut left = here;
        // There is room for it. Should it fail all the same, the pipe goes, with what is in it.
        while left > 0 {
            let End { file, mut offset, room } = bodies.file_end(body, left).map_err(FillError::Store)?;
            let moved = splice(&from, None, file, Some(&mut offset), room as usize, SpliceFlags::empty());
            bodies.extend(body, moved.unwrap_or(0) as u64);
            match moved {
                Ok(0) => return Err(FillError::Store(Errno::NOSPC.into())),
                Ok(n) => left -= n as u64,
                Err(Errno::INTR) => {}
                Err(error) => return Err(FillError::Store(error.into())),
            }
        }
        if here == 0 {
            bodies.extend(body, 0);
        }
        self.pipe = Some((from, to));
        Ok(if here == 0 { Carried::End } else { Carried::Some(here) })
    }
}

/// Moves the rest of an image to `target`: from a file without a copy, with sendfile(2).
pub fn drain(bodies: &Bodies, out: &mut Outflow, target: BorrowedFd<'_>) -> io::Result<Flow> {
    let known = out.end.unwrap_or_else(|| bodies.len(out.body));
    let stop = known.min(out.at + TURN as u64);
    while out.at < stop {
        let count = (stop - out.at) as usize;
        let (content, here) = bodies.content_at(out.body, out.at).ok_or_else(missing)?;
        let count = usize::try_from(here).unwrap_or(usize::MAX).min(count);
        let moved = match content {
            Content::Inline(bytes) => write(target, bytes.get(..count).ok_or_else(missing)?),
            Content::File(file, mut offset) => sendfile(target, file, Some(&mut offset), count),
        };
        match moved {
            Ok(0) => return Err(missing()),
            Ok(n) => out.at += n as u64,
            Err(Errno::AGAIN) => return Ok(Flow::Wait),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(match out.end {
        Some(end) if out.at == end => Flow::End,
        None if out.at == known => Flow::Starved,
        _ => Flow::Again,
    })
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
