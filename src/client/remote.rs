//! One client of the remote dialect: a connection to img-proxy.sock or img-cache.sock, or the pipe that
//! took its place.
//!
//! Theory of operation. A client sends a header; its role decides when the operation may start. A writer's
//! bytes then go to a body until its end of file. A reader gets its answer and the image; when all is sent
//! our half is shut down, not closed, since a CRIU of May 2020 may yet send a pipe and expect everything
//! there, from the first byte. The connection is over when the client closes it.
//!
//! Owns the socket or the pipe; dropped by the role when the step says it is over. The body named by
//! [`RemoteClient::body`] is held for it, and released by the role.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use mio::Interest;
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::{HEADER_LIMIT, TOO_MANY};
use crate::net::{self, PipeEnd, Received};
use crate::pump::{self, Carried, Conduit, FillError, Flow, Inflow, Outflow};
use crate::reactor::Pollable;
use crate::store::{Bodies, BodyId, INLINE_MAX, limit};
use crate::wire::criu::{self, Request};
use crate::wire::frame::{FrameReader, LENGTH, MAX_BODY};
use crate::wire::remote::Remote;
use crate::wire::{Key, WireError};

/// A client of the remote dialect.
#[derive(Debug)]
pub struct RemoteClient {
    fd: OwnedFd,
    // Whether `fd` is the pipe by now.
    piped: bool,
    wire: Remote,
    state: State,
    order: u64,
    // A reader's header has been understood, but its last byte left in the socket. As long as it is there, a
    // close resets the connection: a reader that is closed in the middle of an image sees an error, where an
    // end would tell it that this was all.
    unread: bool,
}

#[derive(Debug)]
enum State {
    /// The header is to come.
    Header { until: Instant },
    /// The operation waits for its turn. What came glued to a writer's header is kept.
    Queued { request: Request, early: Vec<u8> },
    /// The image is being written; `begun`: some of it has been taken. `early`: what had come with the header and
    /// is still to be stored.
    Writing { inflow: Inflow, begun: bool, early: Vec<u8> },
    /// The image is being read; when all is `sent` the client may close, or send a pipe.
    Reading { out: Outflow, sent: bool },
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An event will come.
    Wait,
    /// The turn is used up.
    Again,
    /// The header is complete: [`RemoteClient::request`].
    Requested,
    /// The writer has reached its end of file: [`RemoteClient::written`].
    Written,
    /// The writer has more than there is memory for, within the limit. It has lost nothing, and may go on when
    /// there is some.
    Full,
    /// A reader has gone, with or without all of its image.
    Over,
}

impl RemoteClient {
    /// A connection just accepted, as number `order` of all that were.
    pub fn new(fd: OwnedFd, order: u64, now: Instant) -> Self {
        let state = State::Header { until: now + HEADER_LIMIT };
        Self { fd, piped: false, wire: Remote::default(), state, order, unread: false }
    }

    /// Its place among all accepted connections.
    pub fn order(&self) -> u64 {
        self.order
    }

    /// What it asks for, once it has and until it has begun.
    pub fn request(&self) -> Option<&Request> {
        match &self.state {
            State::Queued { request, .. } => Some(request),
            _ => None,
        }
    }

    /// Whether it asks for an image.
    pub fn reads(&self) -> bool {
        matches!(self.state, State::Queued { request: Request::Read(_), .. })
    }

    /// Whether its header is complete.
    pub fn has_asked(&self) -> bool {
        !matches!(self.state, State::Header { .. })
    }

    /// The body that is held for it.
    pub fn body(&self) -> Option<BodyId> {
        match &self.state {
            State::Writing { inflow, .. } => Some(inflow.body),
            State::Reading { out, .. } => Some(out.body),
            State::Header { .. } | State::Queued { .. } => None,
        }
    }

    /// The image that it is writing.
    pub fn writing(&self) -> Option<&Inflow> {
        match &self.state {
            State::Writing { inflow, .. } => Some(inflow),
            _ => None,
        }
    }

    /// Whether bytes of an image are still to be sent.
    pub fn is_reading(&self) -> bool {
        matches!(self.state, State::Reading { sent: false, .. })
    }

    /// The image that it asks for, or writes or reads; for the log.
    pub fn key(&self) -> Option<&Key> {
        match &self.state {
            State::Queued { request: Request::Read(key) | Request::Write(key, _), .. } => Some(key),
            State::Writing { inflow, .. } => Some(&inflow.key),
            State::Reading { out, .. } => Some(&out.key),
            _ => None,
        }
    }

    /// Begins to write: `body` is held for it and has `start` bytes.
    pub fn start_write(&mut self, key: Key, body: BodyId, start: u64) {
        let early = match &mut self.state {
            State::Queued { early, .. } => std::mem::take(early),
            _ => Vec::new(),
        };
        self.state = State::Writing { inflow: Inflow { key, body, start }, begun: false, early };
    }

    /// What it is reading.
    pub fn reading_mut(&mut self) -> Option<&mut Outflow> {
        match &mut self.state {
            State::Reading { out, .. } => Some(out),
            _ => None,
        }
    }

    /// The pipe to which it reads, and what.
    pub fn piping_mut(&mut self) -> Option<(BorrowedFd<'_>, &mut Outflow)> {
        match &mut self.state {
            State::Reading { out, .. } if self.piped => Some((self.fd.as_fd(), out)),
            _ => None,
        }
    }

    /// Begins to read, from a body that the caller holds for this client.
    pub fn start_read(&mut self, out: Outflow) -> Result<(), String> {
        if out.end.is_none_or(|end| end > INLINE_MAX as u64) {
            net::widen(&self.fd);
        }
        self.state = State::Reading { out, sent: false };
        self.answer(0)
    }

    /// Answers with an errno, or 0. The client is over then, unless its image follows.
    pub fn answer(&mut self, errno: u32) -> Result<(), String> {
        self.wire.answered();
        if errno != 0 {
            self.read_last_byte();
        }
        let reply = criu::encode_reply(errno);
        // The first bytes on this socket: there is room for them.
        match send(&self.fd, &reply, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(n) if n == reply.len() => Ok(()),
            Ok(_) => Err("could not take a whole answer".into()),
            Err(error) => Err(format!("could not be answered: {error}")),
        }
    }

    /// Goes on. `draining`: whether a writer's bytes may be taken now. The error is the second half
    /// of a sentence.
    pub fn step(
        &mut self,
        bodies: &mut Bodies,
        block: &mut [u8],
        conduit: &mut Conduit,
        draining: bool,
    ) -> Result<Step, String> {
        match &mut self.state {
            State::Header { .. } => self.read_header(block),
            // What it wants stands, whether it stays or not.
            State::Queued { request: Request::Write(..) | Request::Finish { .. }, .. } => Ok(Step::Wait),
            State::Queued { request: Request::Read(_), .. } => match net::is_closed(self.fd.as_fd()) {
                true => Ok(Step::Over),
                false => Ok(Step::Wait),
            },
            State::Writing { .. } if !draining => Ok(Step::Wait),
            State::Writing { inflow, early, .. } if !early.is_empty() => {
                match bodies.append(inflow.body, early) {
                    Ok(()) => {
                        early.clear();
                        Ok(Step::Again)
                    }
                    Err(error) => no_memory(inflow, &error, bodies),
                }
            }
            State::Writing { inflow, begun, .. } if self.piped => {
                if !std::mem::replace(begun, true) {
                    net::enlarge(self.fd.as_fd());
                }
                match pump::fill(self.fd.as_fd(), bodies, inflow.body, block) {
                    Ok(Flow::Wait | Flow::Starved) => Ok(Step::Wait),
                    Ok(Flow::Again) => Ok(Step::Again),
                    Ok(Flow::End) => Ok(Step::Written),
                    Err(FillError::Read(error)) => Err(format!("could not be read from: {error}")),
                    Err(FillError::Store(error)) => no_memory(inflow, &error, bodies),
                }
            }
            State::Writing { .. } => self.write_from_socket(bodies, block, conduit),
            State::Reading { .. } => self.read_image(bodies, block),
        }
    }

    /// Ends a writer that has reached its end of file.
    pub fn written(self) -> Option<Inflow> {
        match self.state {
            State::Writing { inflow, .. } => Some(inflow),
            _ => None,
        }
    }

    fn read_header(&mut self, block: &mut [u8]) -> Result<Step, String> {
        // Not more than a header and a little: the rest stays in the socket until its turn.
        let input = &mut block[..LENGTH + MAX_BODY];
        let unreadable = |error| format!("could not be read from: {error}");
        let truncated = || WireError::Truncated("its header").to_string();
        let here = match net::peek(self.fd.as_fd(), input).map_err(unreadable)? {
            Received::Bytes(n, _) => n,
            Received::End => return Err(truncated()),
            Received::Wait | Received::TooManyDescriptors => return Ok(Step::Wait),
        };
        let mut rest = &input[..here];
        let Some(body) = FrameReader::default().feed(&mut rest).map_err(|error| error.to_string())? else {
            return if net::has_ended(self.fd.as_fd()) { Err(truncated()) } else { Ok(Step::Wait) };
        };
        let reads = matches!(criu::decode_request(&body), Ok(Request::Read(_)));
        self.unread = reads && rest.is_empty();
        let last = input[here - 1];
        let room = if self.unread { here - 1 } else { here };
        let (n, descriptor) = match net::receive(self.fd.as_fd(), &mut input[..room]).map_err(unreadable)? {
            Received::Bytes(n, descriptor) => (n, descriptor),
            Received::TooManyDescriptors => return Err(TOO_MANY.into()),
            Received::Wait => return Ok(Step::Wait),
            Received::End => return Err(truncated()),
        };
        let mut fed = self.wire.feed(&input[..n], descriptor).map_err(|error| error.to_string())?;
        let last = [last];
        if self.unread {
            fed = self.wire.feed(&last, None).map_err(|error| error.to_string())?;
        }
        // A receive ends at a descriptor: one that belongs to no header.
        let Some(request) = fed.request else {
            return Err(WireError::Descriptor("a descriptor inside its header").to_string());
        };
        self.state = State::Queued { request, early: fed.data.to_vec() };
        if let Some(pipe) = fed.pipe {
            self.change_to(pipe, PipeEnd::Read)?;
        }
        Ok(Step::Requested)
    }

    // The close of the connection may be taken for an end again.
    fn read_last_byte(&mut self) {
        if std::mem::take(&mut self.unread) {
            // It is there: it has been seen.
            let _ = net::receive(self.fd.as_fd(), &mut [0; 1]);
        }
    }

    fn write_from_socket(
        &mut self,
        bodies: &mut Bodies,
        block: &mut [u8],
        conduit: &mut Conduit,
    ) -> Result<Step, String> {
        let State::Writing { inflow, .. } = &self.state else { return Ok(Step::Wait) };
        let mut moved = 0;
        while moved < pump::TURN {
            // Behind the image's first bytes no pipe can come, so that nothing need be looked at.
            if bodies.len(inflow.body) >= inflow.start + INLINE_MAX as u64 {
                match conduit.carry(self.fd.as_fd(), net::PIPE_SIZE as u64, bodies, inflow.body) {
                    Ok(Carried::Some(n)) => moved += n as usize,
                    Ok(Carried::Nothing) => return Ok(Step::Wait),
                    Ok(Carried::End) => return Ok(Step::Written),
                    Err(FillError::Read(error)) => return Err(format!("could not be read from: {error}")),
                    Err(FillError::Store(error)) => return no_memory(inflow, &error, bodies),
                }
                continue;
            }
            let room = match bodies.room(inflow.body, INLINE_MAX as u64) {
                Ok(room) => room as usize,
                Err(error) => {
                    // What comes may be its end, or a pipe; and a descriptor is not lost.
                    return match net::peek(self.fd.as_fd(), &mut [0; 1]) {
                        Ok(Received::End) => Ok(Step::Written),
                        Ok(Received::Wait) => Ok(Step::Wait),
                        _ => no_memory(inflow, &error, bodies),
                    };
                }
            };
            let block = &mut block[..room];
            let (n, descriptor) = match net::receive(self.fd.as_fd(), block) {
                Ok(Received::Bytes(n, descriptor)) => (n, descriptor),
                Ok(Received::Wait) => return Ok(Step::Wait),
                Ok(Received::End) => return Ok(Step::Written),
                Ok(Received::TooManyDescriptors) => return Err(TOO_MANY.into()),
                Err(error) => return Err(format!("could not be read from: {error}")),
            };
            let fed = self.wire.feed(&block[..n], descriptor).map_err(|error| error.to_string())?;
            if let Some(pipe) = fed.pipe {
                self.change_to(pipe, PipeEnd::Read)?;
                return Ok(Step::Again);
            }
            if let Err(error) = bodies.append(inflow.body, fed.data) {
                return Err(format!("was stopped: {}", bodies.refusal(&inflow.key, inflow.body, &error)));
            }
            moved += n;
        }
        Ok(Step::Again)
    }

    fn read_image(&mut self, bodies: &Bodies, block: &mut [u8]) -> Result<Step, String> {
        let arrives = matches!(&self.state, State::Reading { out, .. } if out.end.is_none());
        // Behind that byte a pipe may have come.
        if !arrives || ioctl_fionread(&self.fd).is_ok_and(|bytes| bytes > 1) {
            self.read_last_byte();
        }
        if !self.piped && !self.unread {
            match net::receive(self.fd.as_fd(), block) {
                Ok(Received::Bytes(n, descriptor)) => {
                    let fed = self.wire.feed(&block[..n], descriptor).map_err(|error| error.to_string())?;
                    if let Some(pipe) = fed.pipe {
                        self.change_to(pipe, PipeEnd::Write)?;
                        if let State::Reading { out, sent } = &mut self.state {
                            (out.at, *sent) = (0, false);
                        }
                        return Ok(Step::Again);
                    }
                }
                Ok(Received::TooManyDescriptors) => return Err(TOO_MANY.into()),
                Ok(Received::Wait) => {}
                // A reader may have shut its own half; whether it still reads, writing tells.
                Ok(Received::End) if self.is_reading() => {}
                // Reset: it closed before it had read everything.
                Ok(Received::End) | Err(_) => return Ok(Step::Over),
            }
        }
        let State::Reading { out, sent: sent @ false } = &mut self.state else { return Ok(Step::Wait) };
        match pump::drain(bodies, out, self.fd.as_fd()) {
            Ok(Flow::Wait | Flow::Starved) => Ok(Step::Wait),
            Ok(Flow::Again) => Ok(Step::Again),
            Ok(Flow::End) if self.piped => Ok(Step::Over),
            Ok(Flow::End) => {
                // All that can fail here is that it has closed: the next step sees it.
                let _ = shutdown(&self.fd, Shutdown::Write);
                *sent = true;
                // Its close, or a pipe, is an event.
                Ok(Step::Wait)
            }
            // It closed early; that is its right.
            Err(error) if closed_early(&error) && self.piped => Ok(Step::Over),
            // On a socket a pipe may have come at the same time: the next step looks.
            Err(error) if closed_early(&error) => {
                *sent = true;
                Ok(Step::Again)
            }
            Err(error) => Err(format!("could not be written to: {error}")),
        }
    }

    fn change_to(&mut self, pipe: OwnedFd, end: PipeEnd) -> Result<(), String> {
        self.fd = net::adopt_pipe(pipe, end)?;
        if end == PipeEnd::Write {
            net::enlarge(self.fd.as_fd());
        }
        self.piped = true;
        Ok(())
    }
}

fn no_memory(inflow: &Inflow, error: &std::io::Error, bodies: &Bodies) -> Result<Step, String> {
    match limit::is_full(error) {
        true => Ok(Step::Full),
        false => Err(format!("was stopped: {}", bodies.refusal(&inflow.key, inflow.body, error))),
    }
}

/// Whether a write failed because the reader has closed.
pub fn closed_early(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::PIPE | Errno::CONNRESET))
}

impl Pollable for RemoteClient {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        match &self.state {
            State::Header { .. } | State::Writing { .. } => Some(Interest::READABLE),
            // A waiting writer's bytes and end keep until it is stepped; a waiting reader that goes away is to be
            // seen. It costs less to be told too often than to change what is registered.
            State::Queued { .. } => Some(Interest::READABLE),
            State::Reading { .. } if self.piped => Some(Interest::WRITABLE),
            State::Reading { sent: true, .. } => Some(Interest::READABLE),
            State::Reading { sent: false, .. } => Some(Interest::READABLE | Interest::WRITABLE),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Header { until } => Some(until),
            _ => None,
        }
    }
}
