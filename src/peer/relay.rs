//! The cache's end of a link that speaks the relay protocol: images come in, interleaved, and what has been
//! stored is acknowledged.
//!
//! Theory of operation. A link carries sessions, one after the other; each begins with a hello in a frame, which
//! its role accepts. Messages are read in large blocks while they are small. Behind the header of a large piece
//! of an image the bytes are not read at all: they go through a pipe into the image's file, which copies
//! them once.
//!
//! Owns the TCP socket. The bodies of the images that are arriving are held.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::Interest;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::resume::{Arriving, Progress};
use super::silence::{PING, PROXY_LOST};
use crate::net::{self, Received};
use crate::pump::{self, Carried, Conduit, FillError, Inflow};
use crate::reactor::Pollable;
use crate::session::Word;
use crate::store::{Bodies, BodyId, Catalog};
use crate::wire::criu::WriteMode;
use crate::wire::relay::{self, Decoder, Hello, Item, Kind, SessionId, TOP};
use crate::wire::{Key, WireError};

/// From this many bytes on it pays to splice a piece: two system calls against one copy more.
const SPLICE_MIN: u64 = 64 * 1024;

/// An image's bytes are acknowledged when there are so many at the end of a turn, or when so much time has passed.
const ACK_BYTES: u64 = 1 << 20;
const ACK_AFTER: Duration = Duration::from_millis(50);

/// Images that a peer may have open at a time. Ours opens as many as its CRIU has.
const MAX_OPEN: usize = 1 << 16;

/// Answers that wait for the peer to read them, in bytes, until it is listened to no more.
const MAX_OUT: usize = 256 * 1024;

/// A peer that speaks the relay protocol.
#[derive(Debug)]
pub struct RelayPeer {
    fd: OwnedFd,
    name: String,
    since: Instant,
    decoder: Decoder,
    // Whether nothing has come behind the greeting.
    fresh: bool,
    // A session that its role has not accepted yet: nothing more is read.
    offered: Option<Hello>,
    session: Option<SessionId>,
    progress: Progress,
    // When something of it was heard last; while it waits its turn, when it was told so last.
    heard_at: Instant,
    splicing: bool,
    sip: bool,
    // What was read behind a message that its role has to decide about first.
    rest: Vec<u8>,
    out: Vec<u8>,
    ack_at: Option<Instant>,
    ack_now: bool,
    // What it is told should its session fail now.
    errno: Errno,
}

/// What has happened to the session, or to an image of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A session begins: [`RelayPeer::accept`] it, or close the link.
    Hello(Hello),
    /// An image has begun to arrive in this body.
    Opened(Key, BodyId),
    /// There is more in this body.
    Grown(BodyId),
    /// The image is complete, with so many bytes, and in the catalog.
    Complete(Key, BodyId, u64),
    /// The image will never be complete; its body has been released.
    Aborted(Key, BodyId),
    /// A dump is about to begin, of so many bytes, and with page images of these sizes.
    Prepare(u64, Vec<u64>),
    /// The dump is complete, and so many images and bytes of it have been stored.
    Finished(u64, u64),
    /// The source has decided.
    Word(SessionId, Word),
    /// A link that was lost is back: what is held of this session of this run?
    Resume(SessionId, Vec<u8>),
    /// The proxy has heard how this session ended.
    Settled(SessionId),
    /// The proxy has failed the dump, and says why.
    Failed(String),
}

/// How a step ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// An event will come.
    Wait,
    /// The turn is used up, or something has happened.
    Again,
    /// The peer has closed, between two messages.
    End,
    /// The link was lost. The second half of a sentence.
    Lost(String),
    /// It goes on in the seed protocol: it has not seen the welcome.
    Fallback,
}

impl RelayPeer {
    /// A connection whose greeting has been read, and to which `welcome` is said.
    pub fn new(fd: OwnedFd, name: String, since: Instant, welcome: relay::Welcome) -> Self {
        Self {
            fd,
            name,
            since,
            decoder: Decoder::default(),
            fresh: true,
            offered: None,
            session: None,
            progress: Progress::default(),
            heard_at: Instant::now(),
            splicing: false,
            sip: false,
            rest: Vec::new(),
            out: relay::encode(Kind::Welcome(welcome)),
            ack_at: None,
            ack_now: false,
            errno: Errno::IO,
        }
    }

    /// Who it is.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Since when it has been connected.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The session that it is at.
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// Whether nothing of it waits to be read.
    pub fn is_silent(&self) -> bool {
        self.offered.is_none()
            && self.rest.is_empty()
            && !matches!(net::peek(self.fd.as_fd(), &mut [0; 1]), Ok(Received::Bytes(..)))
    }

    /// The session that it wants to begin.
    pub fn offered(&self) -> Option<&Hello> {
        self.offered.as_ref()
    }

    /// It may begin.
    pub fn accept(&mut self) {
        if let Some(hello) = self.offered.take() {
            self.session = relay::session_id(&hello.session).ok();
            self.progress.begin(&hello);
            self.heard_at = Instant::now();
        }
    }

    /// For how many seconds a link that is lost now may come back; 0: it may not.
    pub fn reconnect(&self) -> u32 {
        if self.session.is_some() { self.progress.reconnect } else { 0 }
    }

    /// The link is lost, or another takes its place: what has come of the session, as far as it is whole. A message
    /// that was cut off is not, its bytes that are stored are.
    pub fn set_aside(self) -> Progress {
        self.progress
    }

    /// Goes on with a session whose link was lost, and says what is held of it.
    pub fn go_on(&mut self, session: SessionId, progress: Progress) {
        self.session = Some(session);
        self.progress = progress;
        self.heard_at = Instant::now();
        for holding in self.progress.holdings() {
            relay::append(&mut self.out, Kind::Holding(holding));
        }
        let _ = self.flush();
    }

    /// Its session is over; the link stays for the next.
    pub fn settled(&mut self) {
        self.session = None;
    }

    /// Says something. What the link does not take now is sent later.
    pub fn say(&mut self, kind: Kind) {
        relay::append(&mut self.out, kind);
        // An error shows with the next read.
        let _ = self.flush();
    }

    /// Whether everything that was said has been handed to the kernel.
    pub fn has_said_all(&self) -> bool {
        self.out.is_empty()
    }

    /// Gives up what was arriving and closes the link, after having said why.
    pub fn abandon(mut self, errno: Errno, why: &str, bodies: &mut Bodies) {
        self.progress.drop_arriving(bodies);
        self.say(Kind::Error(relay::Error::new(errno.raw_os_error() as u32, why)));
    }

    /// Why its session has failed, if it has.
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// The socket, for another protocol.
    pub fn into_parts(self) -> (OwnedFd, String, Instant) {
        (self.fd, self.name, self.since)
    }

    /// Takes what has come into `catalog`. The error is the second half of a sentence.
    pub fn step(
        &mut self,
        catalog: &mut Catalog,
        bodies: &mut Bodies,
        block: &mut [u8],
        conduit: &mut Conduit,
        events: &mut Vec<Event>,
    ) -> Result<Turn, String> {
        let turn = self.take(catalog, bodies, block, conduit, events);
        if std::mem::take(&mut self.ack_now) {
            self.acknowledge();
        }
        match (self.flush(), turn) {
            (Err(error), Ok(Turn::Wait | Turn::Again)) => Ok(Turn::Lost(unanswered(&error))),
            (_, turn) => turn,
        }
    }

    fn take(
        &mut self,
        catalog: &mut Catalog,
        bodies: &mut Bodies,
        block: &mut [u8],
        conduit: &mut Conduit,
        events: &mut Vec<Event>,
    ) -> Result<Turn, String> {
        if self.fresh {
            let mut word = [0; 4];
            match net::peek(self.fd.as_fd(), &mut word) {
                Ok(Received::Bytes(4, _)) if u32::from_ne_bytes(word) & TOP == 0 => {
                    return Ok(Turn::Fallback);
                }
                Ok(Received::Bytes(4, _)) => self.fresh = false,
                Ok(Received::End) => return Ok(Turn::End),
                Ok(_) => return Ok(Turn::Wait),
                Err(error) => return Ok(Turn::Lost(format!("was lost: {error}"))),
            }
        }
        let mut moved = 0;
        while moved < pump::LINK_TURN as u64 {
            if self.offered.is_some() {
                return Ok(Turn::Wait);
            }
            if self.out.len() > MAX_OUT {
                if let Err(error) = self.flush() {
                    return Ok(Turn::Lost(unanswered(&error)));
                }
                if self.out.len() > MAX_OUT {
                    return Ok(Turn::Wait);
                }
            }
            let taken = match self.decoder.raw() {
                Some((id, left)) if (left >= SPLICE_MIN || self.splicing) && self.rest.is_empty() => {
                    self.splice(id, left, bodies, conduit, events)?
                }
                _ => self.read(catalog, bodies, block, events)?,
            };
            match taken {
                Taken::Some(n) => {
                    moved += n;
                    self.heard_at = Instant::now();
                }
                Taken::Decide => {
                    self.heard_at = Instant::now();
                    return Ok(Turn::Again);
                }
                Taken::Nothing => return Ok(Turn::Wait),
                Taken::End if self.decoder.at_boundary() && self.progress.arriving.is_empty() => {
                    return Ok(Turn::End);
                }
                Taken::End => return Ok(Turn::Lost(format!("closed{}", self.position(bodies)))),
                Taken::Lost(error) => {
                    return Ok(Turn::Lost(format!("was lost{}: {error}", self.position(bodies))));
                }
            }
        }
        Ok(Turn::Again)
    }

    // Moves raw bytes from the socket into the body's file.
    fn splice(
        &mut self,
        id: u64,
        left: u64,
        bodies: &mut Bodies,
        conduit: &mut Conduit,
        events: &mut Vec<Event>,
    ) -> Result<Taken, String> {
        let body = match self.progress.arriving.get(&id) {
            Some(Arriving { inflow, .. }) => inflow.body,
            None => return Err(not_open(id)),
        };
        let here = match conduit.carry(self.fd.as_fd(), left, bodies, body) {
            Ok(Carried::Some(here)) => here,
            Ok(Carried::Nothing) => return Ok(Taken::Nothing),
            Ok(Carried::End) => return Ok(Taken::End),
            Err(FillError::Read(error)) => return Ok(Taken::Lost(error)),
            Err(FillError::Store(error)) => return Err(self.no_memory(id, &error, bodies)),
        };
        self.decoder.took(here);
        self.came(id, here, events);
        // To the end of the piece, however little is left; behind it comes a header.
        self.splicing = self.decoder.raw().is_some();
        self.sip = true;
        Ok(Taken::Some(here))
    }

    fn read(
        &mut self,
        catalog: &mut Catalog,
        bodies: &mut Bodies,
        block: &mut [u8],
        events: &mut Vec<Event>,
    ) -> Result<Taken, String> {
        let rest = std::mem::take(&mut self.rest);
        if !rest.is_empty() {
            return self.parse(&rest, catalog, bodies, events);
        }
        // Behind a spliced piece comes the header of the next: nothing of the image is to come with it.
        let room = if self.sip { self.decoder.missing().clamp(1, block.len()) } else { block.len() };
        match recv(&self.fd, &mut block[..room], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Ok(Taken::End),
            Ok((_, n)) => self.parse(&block[..n], catalog, bodies, events),
            Err(Errno::AGAIN) => Ok(Taken::Nothing),
            Err(Errno::INTR) => Ok(Taken::Some(0)),
            Err(error) => Ok(Taken::Lost(error.into())),
        }
    }

    fn parse(
        &mut self,
        mut input: &[u8],
        catalog: &mut Catalog,
        bodies: &mut Bodies,
        events: &mut Vec<Event>,
    ) -> Result<Taken, String> {
        let all = input.len() as u64;
        while let Some(item) = self.decoder.next(&mut input).map_err(|error| error.to_string())? {
            match item {
                Item::Message(kind) => {
                    if self.message(kind, catalog, bodies, events)? {
                        // Its role decides first.
                        self.rest = input.to_vec();
                        return Ok(Taken::Decide);
                    }
                }
                Item::Bytes(id, data) => {
                    let Some(Arriving { inflow, .. }) = self.progress.arriving.get(&id) else {
                        return Err(not_open(id));
                    };
                    let stored = bodies.append(inflow.body, data);
                    stored.map_err(|error| self.no_memory(id, &error, bodies))?;
                    self.came(id, data.len() as u64, events);
                }
            }
        }
        // Small messages are read as many at once as there are.
        self.sip = match self.decoder.raw() {
            Some((_, left)) => left >= SPLICE_MIN,
            None => self.sip && !self.decoder.at_boundary(),
        };
        Ok(Taken::Some(all))
    }

    // True: it is for the role to decide what comes of it.
    fn message(
        &mut self,
        kind: Kind,
        catalog: &mut Catalog,
        bodies: &mut Bodies,
        events: &mut Vec<Event>,
    ) -> Result<bool, String> {
        let wrong = |error: WireError| error.to_string();
        match kind {
            // It goes on with a session of which nothing had come, and begins it once more.
            Kind::Hello(hello)
                if self.session.is_some_and(|session| hello.session[..] == session)
                    && self.progress.is_empty() => {}
            Kind::Hello(hello) => {
                if self.session.is_some() {
                    return Err("began a session in the middle of another".into());
                }
                let hello = hello.checked().map_err(wrong)?;
                self.offered = Some(hello.clone());
                events.push(Event::Hello(hello));
                return Ok(true);
            }
            Kind::Open(_) | Kind::Close(_) | Kind::Abort(_) | Kind::Finished(_) if self.session.is_none() => {
                return Err("sent images outside of a session".into());
            }
            Kind::Open(open) => {
                let id = open.id;
                let (key, mode) = relay::opened(open).map_err(wrong)?;
                self.open(id, key, mode, catalog, bodies, events)?;
            }
            // Its bytes are looked for when they come.
            Kind::Data(_) => {}
            Kind::Close(relay::Close { id, size }) => {
                let Some(Arriving { inflow, came, .. }) = self.progress.arriving.remove(&id) else {
                    return Err(not_open(id));
                };
                let Inflow { key, body, start } = inflow;
                let here = bodies.len(body);
                if size != here {
                    bodies.truncate(body, start);
                    bodies.release(body);
                    return Err(format!("closed {key} at {size} bytes, of which {here} are here"));
                }
                catalog.complete(key.clone(), body, bodies);
                log::debug!("{key}: {} received", pump::human(size));
                self.progress.complete(id, came);
                relay::append(&mut self.out, Kind::Stored(relay::Stored { id, size }));
                events.push(Event::Complete(key, body, size));
            }
            Kind::Abort(relay::Abort { id }) => {
                let Some(Arriving { inflow, .. }) = self.progress.arriving.remove(&id) else {
                    return Err(not_open(id));
                };
                log::warn!("{}: its writer died at byte {}", inflow.key, bodies.len(inflow.body));
                bodies.truncate(inflow.body, inflow.start);
                bodies.release(inflow.body);
                events.push(Event::Aborted(inflow.key, inflow.body));
            }
            Kind::Finished(relay::Finished { images, bytes }) => {
                if let Some(Arriving { inflow, .. }) = self.progress.arriving.values().next() {
                    return Err(format!("finished the dump although {} is not complete", inflow.key));
                }
                if (images, bytes) != (self.progress.images, self.progress.bytes) {
                    return Err(format!(
                        "finished a dump of {images} transfers and {bytes} bytes, of which {} and {} are here",
                        self.progress.images, self.progress.bytes
                    ));
                }
                events.push(Event::Finished(images, bytes));
                return Ok(true);
            }
            Kind::Release(relay::Release { session }) => {
                let id = relay::session_id(&session).map_err(wrong)?;
                events.push(Event::Word(id, Word::Release));
                return Ok(true);
            }
            Kind::Rollback(relay::Rollback { session }) => {
                let id = relay::session_id(&session).map_err(wrong)?;
                events.push(Event::Word(id, Word::Rollback));
                return Ok(true);
            }
            Kind::Resume(relay::Resume { session, run }) => {
                let id = relay::session_id(&session).map_err(wrong)?;
                events.push(Event::Resume(id, run));
                return Ok(true);
            }
            Kind::Settled(relay::Settled { session }) => {
                let id = relay::session_id(&session).map_err(wrong)?;
                events.push(Event::Settled(id));
                return Ok(true);
            }
            Kind::Error(error) => {
                events.push(Event::Failed(error.shown()));
                return Ok(true);
            }
            Kind::Ping(relay::Ping { token }) => {
                relay::append(&mut self.out, Kind::Pong(relay::Pong { token }));
            }
            Kind::Prepare(relay::Prepare { bytes, sizes }) => {
                events.push(Event::Prepare(bytes, sizes));
                return Ok(true);
            }
            Kind::Welcome(_)
            | Kind::Ack(_)
            | Kind::Stored(_)
            | Kind::Prepared(_)
            | Kind::AllStored(_)
            | Kind::Restore(_)
            | Kind::Released(_)
            | Kind::RolledBack(_)
            | Kind::Holding(_)
            | Kind::Pong(_) => return Err("said what only a cache says".into()),
        }
        Ok(false)
    }

    fn open(
        &mut self,
        id: u64,
        key: Key,
        mode: WriteMode,
        catalog: &Catalog,
        bodies: &mut Bodies,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        if self.progress.arriving.len() >= MAX_OPEN {
            return Err(format!("has more than {MAX_OPEN} images open"));
        }
        if id <= self.progress.last {
            return Err(format!("opened transfer {id} behind transfer {}", self.progress.last));
        }
        self.progress.last = id;
        let (body, start) = match catalog.get(&key).filter(|_| mode == WriteMode::Append) {
            Some(image) => {
                bodies.hold(image.body);
                (image.body, image.len)
            }
            None => {
                let created = bodies.create_for(&key);
                self.errno = if created.is_err() { Errno::NOSPC } else { self.errno };
                (created.map_err(|why| format!("was stopped: {why}"))?, 0)
            }
        };
        if start == 0 {
            events.push(Event::Opened(key.clone(), body));
        }
        let inflow = Inflow { key, body, start };
        self.progress.arriving.insert(id, Arriving { inflow, came: 0, acked: 0 });
        Ok(())
    }

    fn came(&mut self, id: u64, bytes: u64, events: &mut Vec<Event>) {
        let Some(arriving) = self.progress.arriving.get_mut(&id) else { return };
        arriving.came += bytes;
        if arriving.came - arriving.acked >= ACK_BYTES {
            self.ack_now = true;
        } else if self.ack_at.is_none() {
            self.ack_at = Some(Instant::now() + ACK_AFTER);
        }
        events.push(Event::Grown(arriving.inflow.body));
    }

    /// It is time to acknowledge what has come.
    pub fn acknowledge(&mut self) {
        self.ack_at = None;
        for (id, arriving) in
            self.progress.arriving.iter_mut().filter(|(_, arriving)| arriving.came > arriving.acked)
        {
            arriving.acked = arriving.came;
            relay::append(&mut self.out, Kind::Ack(relay::Ack { id: *id, bytes: arriving.came }));
        }
        let _ = self.flush();
    }

    /// A moment has come that was waited for. The error: the proxy is lost, as the second half of a sentence.
    pub fn expired(&mut self, now: Instant) -> Result<(), String> {
        if self.ack_at.is_some_and(|at| at <= now) {
            self.acknowledge();
        }
        if self.offered.is_some() {
            // Its pings are not read while it waits its turn.
            if self.heard_at + PING <= now {
                self.heard_at = now;
                self.say(Kind::Pong(relay::Pong::default()));
            }
        } else if self.session.is_some() && self.progress.pings && self.heard_at + PROXY_LOST <= now {
            // Unless it is we who have not looked.
            if self.is_silent() {
                return Err(format!("has said nothing for {} s", PROXY_LOST.as_secs()));
            }
            self.heard_at = now;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match send(&self.fd, &self.out, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn no_memory(&mut self, id: u64, error: &io::Error, bodies: &Bodies) -> String {
        self.errno = Errno::NOSPC;
        match self.progress.arriving.get(&id) {
            Some(Arriving { inflow, .. }) => {
                format!("was stopped: {}", bodies.refusal(&inflow.key, inflow.body, error))
            }
            None => not_open(id),
        }
    }

    fn position(&self, bodies: &Bodies) -> String {
        let arriving = match self.decoder.raw() {
            Some((id, _)) => self.progress.arriving.get(&id),
            None => self.progress.arriving.values().next(),
        };
        match arriving {
            Some(Arriving { inflow, .. }) => {
                format!(" in the middle of {}, at its byte {}", inflow.key, bodies.len(inflow.body))
            }
            None if self.decoder.at_boundary() => " between two images".into(),
            None => " in the middle of a message".into(),
        }
    }
}

/// What was taken from the socket.
enum Taken {
    Some(u64),
    Decide,
    Nothing,
    End,
    Lost(io::Error),
}

fn unanswered(error: &io::Error) -> String {
    format!("can't be answered: {error}")
}

fn not_open(id: u64) -> String {
    format!("sent bytes or the end of transfer {id}, which is not open")
}

impl Pollable for RelayPeer {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        let writing = if self.out.is_empty() { None } else { Some(Interest::WRITABLE) };
        match writing {
            Some(writing) => Some(Interest::READABLE | writing),
            None => Some(Interest::READABLE),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let silent = match (&self.offered, self.session) {
            (Some(_), _) => Some(self.heard_at + PING),
            (None, Some(_)) if self.progress.pings => Some(self.heard_at + PROXY_LOST),
            (None, _) => None,
        };
        self.ack_at.into_iter().chain(silent).min()
    }
}
