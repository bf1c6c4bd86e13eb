//! The clients of the stream dialect: the two kinds of connection, and the pipes that come over them.
//!
//! Each owns its descriptor and is dropped by its role. A pipe's body is held for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use mio::Interest;
use rustix::net::{SendFlags, send};

use super::{HEADER_LIMIT, SILENCE_LIMIT, TOO_MANY};
use crate::net::{self, PipeEnd, Received};
use crate::pump::{Inflow, Outflow};
use crate::reactor::Pollable;
use crate::wire::frame::{LENGTH, MAX_BODY};
use crate::wire::stream::ServeEvent;
use crate::wire::{Key, WireError, criu, stream};

/// When a connection of this dialect has kept us waiting for too long: before its first request, or in
/// the middle of one. Between requests, and while it waits for us, there is no limit.
#[derive(Debug)]
struct Patience {
    mid_request: bool,
    until: Option<Instant>,
}

impl Patience {
    fn new(now: Instant) -> Self {
        Self { mid_request: false, until: Some(now + SILENCE_LIMIT) }
    }

    fn update(&mut self, mid_request: bool) {
        if !mid_request {
            self.until = None;
        } else if !self.mid_request {
            self.until = Some(Instant::now() + HEADER_LIMIT);
        }
        self.mid_request = mid_request;
    }
}

/// `criu dump --stream`.
#[derive(Debug)]
pub struct Capture {
    fd: OwnedFd,
    order: u64,
    wire: stream::Capture,
    patience: Patience,
}

/// What a step of a [`Capture`] brought.
#[derive(Debug)]
pub enum Captured {
    /// An image, and the pipe that it comes through. There may be more.
    Image(Key, OwnedFd),
    /// An event will come.
    Wait,
    /// CRIU has closed: no further image will be opened.
    End,
}

impl Capture {
    /// A connection just accepted, as number `order` of all that were.
    pub fn new(fd: OwnedFd, order: u64, now: Instant) -> Self {
        Self { fd, order, wire: stream::Capture::default(), patience: Patience::new(now) }
    }

    /// Its place among all accepted connections.
    pub fn order(&self) -> u64 {
        self.order
    }

    /// The process id of its CRIU, as seen from here; 0: not visible.
    pub fn pid(&self) -> i32 {
        net::peer_pid(&self.fd)
    }

    /// It waits for us: its time begins anew with the next step.
    pub fn be_patient(&mut self) {
        self.patience.until = None;
    }

    /// Goes on. The error is the second half of a sentence.
    pub fn step(&mut self, block: &mut [u8]) -> Result<Captured, String> {
        loop {
            let input = &mut block[..LENGTH + MAX_BODY];
            let (n, descriptor) = match net::receive(self.fd.as_fd(), input) {
                Ok(Received::Bytes(n, descriptor)) => (n, descriptor),
                Ok(Received::Wait) => return Ok(Captured::Wait),
                Ok(Received::End) if self.wire.is_idle() => return Ok(Captured::End),
                Ok(Received::End) => return Err(WireError::Truncated("a request").to_string()),
                Ok(Received::TooManyDescriptors) => return Err(TOO_MANY.into()),
                Err(error) => return Err(format!("could not be read from: {error}")),
            };
            let got = self.wire.feed(&input[..n], descriptor).map_err(|error| error.to_string())?;
            self.patience.update(!self.wire.is_idle());
            if let Some((key, pipe)) = got {
                return Ok(Captured::Image(key, net::adopt_pipe(pipe, PipeEnd::Read)?));
            }
        }
    }
}

/// `criu restore --stream`.
#[derive(Debug)]
pub struct Serve {
    fd: OwnedFd,
    wire: stream::Serve,
    patience: Patience,
    state: Turn,
}

/// What a restore's connection is about.
#[derive(Debug)]
enum Turn {
    /// A request is to come.
    Request,
    /// This image is asked for and not yet there.
    Waiting(Key),
    /// The pipe for this image is to come. Its body is held.
    Pipe(Outflow),
}

/// What a step of a [`Serve`] brought.
#[derive(Debug)]
pub enum Served {
    /// An image is asked for: answer with [`Serve::found`] or [`Serve::missing`], now or later.
    Request(Key),
    /// The pipe that an image goes to.
    Pipe(PipeOut),
    /// An event will come.
    Wait,
    /// CRIU has closed.
    End,
}

impl Serve {
    /// A connection just accepted.
    pub fn new(fd: OwnedFd, now: Instant) -> Self {
        let patience = Patience::new(now);
        Self { fd, wire: stream::Serve::default(), patience, state: Turn::Request }
    }

    /// The process id of its CRIU, as seen from here; 0: not visible.
    pub fn pid(&self) -> i32 {
        net::peer_pid(&self.fd)
    }

    /// The image that is asked for and not yet there.
    pub fn waiting(&self) -> Option<&Key> {
        match &self.state {
            Turn::Waiting(key) => Some(key),
            _ => None,
        }
    }

    /// The image whose body is held for the pipe to come.
    pub fn promised(&self) -> Option<&Outflow> {
        match &self.state {
            Turn::Pipe(outflow) => Some(outflow),
            _ => None,
        }
    }

    /// See [`Serve::promised`].
    pub fn promised_mut(&mut self) -> Option<&mut Outflow> {
        match &mut self.state {
            Turn::Pipe(outflow) => Some(outflow),
            _ => None,
        }
    }

    /// Goes on. The error is the second half of a sentence.
    pub fn step(&mut self, block: &mut [u8]) -> Result<Served, String> {
        if self.waiting().is_some() {
            return Ok(if net::is_hung_up(self.fd.as_fd()) { Served::End } else { Served::Wait });
        }
        loop {
            let input = &mut block[..LENGTH + MAX_BODY];
            let (n, descriptor) = match net::receive(self.fd.as_fd(), input) {
                Ok(Received::Bytes(n, descriptor)) => (n, descriptor),
                Ok(Received::Wait) => return Ok(Served::Wait),
                Ok(Received::End) if self.wire.is_idle() => return Ok(Served::End),
                Ok(Received::End) => return Err(WireError::Truncated("a request").to_string()),
                Ok(Received::TooManyDescriptors) => return Err(TOO_MANY.into()),
                Err(error) => return Err(format!("could not be read from: {error}")),
            };
            let event = self.wire.feed(&input[..n], descriptor).map_err(|error| error.to_string())?;
            self.patience.update(self.wire.is_waiting());
            match event {
                None => {}
                Some(ServeEvent::Request(key)) => {
                    self.state = Turn::Waiting(key.clone());
                    return Ok(Served::Request(key));
                }
                Some(ServeEvent::Pipe(pipe)) => {
                    let fd = net::adopt_pipe(pipe, PipeEnd::Write)?;
                    net::enlarge(fd.as_fd());
                    if let Turn::Pipe(outflow) = std::mem::replace(&mut self.state, Turn::Request) {
                        return Ok(Served::Pipe(PipeOut { fd, outflow }));
                    }
                }
            }
        }
    }

    /// The image is there, and held for this client.
    pub fn found(&mut self, outflow: Outflow) -> Result<(), String> {
        self.state = Turn::Pipe(outflow);
        self.answer(true)
    }

    /// The image does not exist and never will.
    pub fn missing(&mut self) -> Result<(), String> {
        self.state = Turn::Request;
        self.answer(false)
    }

    fn answer(&mut self, exists: bool) -> Result<(), String> {
        self.wire.answered(exists);
        self.patience.update(self.wire.is_waiting());
        let reply = criu::encode_streamer_reply(exists);
        match send(&self.fd, &reply, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(n) if n == reply.len() => Ok(()),
            Ok(_) => Err("could not take a whole answer".into()),
            Err(error) => Err(format!("could not be answered: {error}")),
        }
    }
}

/// The pipe through which an image comes from `criu dump`.
#[derive(Debug)]
pub struct PipeIn {
    /// Its read end, shared with the sender when the bytes go straight to the link.
    pub fd: Rc<OwnedFd>,
    /// The image.
    pub key: Key,
    /// Where the bytes go.
    pub way: Way,
    /// Whether an event is wanted. While the sender has not found it empty, its events would only wake us for
    /// nothing, again and again.
    pub watched: bool,
}

/// Where the bytes of a pipe go. It is decided when the first are taken.
#[derive(Debug)]
pub enum Way {
    /// Nothing has been taken yet.
    Open,
    /// To the end of a body, which is held.
    Body(Inflow),
    /// To the link: the sender takes them.
    Link,
}

/// The pipe through which an image goes to `criu restore`.
#[derive(Debug)]
pub struct PipeOut {
    /// Its write end.
    pub fd: OwnedFd,
    /// What is to go.
    pub outflow: Outflow,
}

impl Pollable for Capture {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        Some(Interest::READABLE)
    }

    fn deadline(&self) -> Option<Instant> {
        self.patience.until
    }
}

impl Pollable for Serve {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        Some(Interest::READABLE)
    }

    fn deadline(&self) -> Option<Instant> {
        self.patience.until
    }
}

impl Pollable for PipeIn {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        self.watched.then_some(Interest::READABLE)
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}

impl Pollable for PipeOut {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        Some(Interest::WRITABLE)
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}
