//! The cache's end of the link: a connection that may become the peer, and a peer of the seed protocol.
//!
//! Each owns its TCP socket (or the inherited one).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use mio::Interest;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::relay::RelayPeer;
use super::{Choice, Protocol};
use crate::client::HEADER_LIMIT;
use crate::net::{self, Received};
use crate::pump::{self, Inflow};
use crate::reactor::Pollable;
use crate::store::{Bodies, Catalog};
use crate::wire::criu::{self, Transfer, WriteMode};
use crate::wire::frame::{FrameReader, LENGTH, MAX_BODY};
use crate::wire::relay::{self, Hello, Kind, Welcome};
use crate::wire::seed::{Decoder, Item};
use crate::wire::{Key, WireError};

/// A connection that has not sent a whole first frame yet. It may be a proxy that waits for its CRIU, so
/// silence has no limit of its own; a frame that has begun has.
#[derive(Debug)]
pub struct Parked {
    fd: OwnedFd,
    name: String,
    since: Instant,
    until: Option<Instant>,
    // Whether it has said hello, and goes on in the seed protocol nevertheless.
    greeted: bool,
}

/// What a parked connection has shown.
#[derive(Debug, PartialEq, Eq)]
pub enum Shown {
    /// Not enough yet.
    Nothing,
    /// A valid first frame of the seed protocol: it is a peer.
    Peer,
    /// It speaks the relay protocol. (Its hello has been taken.)
    Hello(Hello),
    /// It has said hello in a way that is none.
    Wrong(String),
    /// It has closed.
    Closed,
}

impl Parked {
    /// A connection just accepted from `name`.
    pub fn new(fd: OwnedFd, name: String, now: Instant) -> Self {
        net::tune_link(&fd);
        Self { fd, name, since: now, until: None, greeted: false }
    }

    /// One that has said hello, and goes on in the seed protocol.
    pub fn fallen_back((fd, name, since): (OwnedFd, String, Instant)) -> Self {
        Self { fd, name, since, until: None, greeted: true }
    }

    /// Since when it has been parked.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Who it is.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether nothing of it has come.
    pub fn is_silent(&self) -> bool {
        !matches!(net::peek(self.fd.as_fd(), &mut [0; 1]), Ok(Received::Bytes(..)))
    }

    /// Its time begins anew when it is looked at next.
    pub fn be_patient(&mut self) {
        self.until = None;
    }

    /// Looks at its first frame. Only a hello is taken. The error is the second half of a sentence.
    pub fn step(&mut self, choice: Choice, block: &mut [u8]) -> Result<Shown, String> {
        let seen = &mut block[..LENGTH + MAX_BODY];
        let n = match net::peek(self.fd.as_fd(), seen) {
            Ok(Received::Bytes(n, _)) => n,
            Ok(Received::End) => return Ok(Shown::Closed),
            Ok(_) => return Ok(Shown::Nothing),
            Err(error) => return Err(format!("could not be read from: {error}")),
        };
        let wrong = |error: WireError| error.to_string();
        let mut rest = &seen[..n];
        let Some(body) = FrameReader::default().feed(&mut rest).map_err(wrong)? else {
            return Ok(self.begun());
        };
        let transfer = criu::decode_transfer(&body).map_err(wrong)?;
        if self.greeted || !choice.allows(Protocol::Relay) || !relay::is_greeting(&transfer) {
            return match choice.allows(Protocol::Seed) {
                true => Ok(Shown::Peer),
                false => Err("speaks the seed protocol, which --peer-protocol relay does not allow".into()),
            };
        }
        let Some(payload) = rest.get(..transfer.size as usize) else { return Ok(self.begun()) };
        let hello = match Hello::check(payload) {
            Ok(hello) => hello,
            Err(error) => return Ok(Shown::Wrong(error.to_string())),
        };
        let whole = n - rest.len() + payload.len();
        match recv(&self.fd, &mut seen[..whole], RecvFlags::DONTWAIT) {
            Ok((_, taken)) if taken == whole => Ok(Shown::Hello(hello)),
            Ok(_) => Err("could not be read from: its hello changed".into()),
            Err(error) => Err(format!("could not be read from: {error}")),
        }
    }

    fn begun(&mut self) -> Shown {
        self.until.get_or_insert_with(|| Instant::now() + HEADER_LIMIT);
        Shown::Nothing
    }

    /// Goes on in the relay protocol.
    pub fn welcome(self, welcome: Welcome) -> RelayPeer {
        RelayPeer::new(self.fd, self.name, self.since, welcome)
    }

    /// Closes it, after having said why in the relay protocol.
    pub fn refuse(self, why: &str) {
        let error = relay::Error::new(Errno::BUSY.raw_os_error() as u32, why);
        let _ = send(&self.fd, &relay::encode(Kind::Error(error)), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }

    /// It is the peer from now on; nothing of it has been taken yet.
    pub fn promote(self) -> Receiver {
        Receiver { fd: self.fd, name: self.name, decoder: Decoder::default(), current: None }
    }
}

impl Pollable for Parked {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        Some(Interest::READABLE)
    }

    fn deadline(&self) -> Option<Instant> {
        self.until
    }
}

/// The peer.
#[derive(Debug)]
pub struct Receiver {
    fd: OwnedFd,
    name: String,
    decoder: Decoder,
    // The image that is arriving. Its body is held.
    current: Option<Inflow>,
}

/// How a step of the receiver ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrival {
    /// An event will come.
    Wait,
    /// The turn is used up.
    Again,
    /// The peer has closed, between two images.
    End,
}

impl Receiver {
    /// Who it is.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes what has come into `catalog`, and adds the names of the images that have become complete to
    /// `complete`. The error is the second half of a sentence.
    pub fn step(
        &mut self,
        catalog: &mut Catalog,
        bodies: &mut Bodies,
        block: &mut [u8],
        complete: &mut Vec<Key>,
    ) -> Result<Arrival, String> {
        let mut moved = 0;
        while moved < pump::TURN {
            let n = match recv(&self.fd, &mut *block, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return self.end(bodies),
                Ok((_, n)) => n,
                Err(Errno::AGAIN) => return Ok(Arrival::Wait),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(format!("was lost{}: {error}", self.position(bodies))),
            };
            moved += n;
            let mut input = &block[..n];
            loop {
                let held = |key: &Key| catalog.get(key).map_or(0, |image| image.len);
                match self.decoder.next(&mut input, held).map_err(|error| error.to_string())? {
                    None => break,
                    Some(Item::Begin(transfer)) => self.begin(transfer, catalog, bodies)?,
                    Some(Item::Data(data)) => {
                        let Some(inflow) = &self.current else { continue };
                        bodies.append(inflow.body, data).map_err(|error| {
                            format!("was stopped: {}", bodies.refusal(&inflow.key, inflow.body, &error))
                        })?;
                    }
                    Some(Item::End) => {
                        let Some(Inflow { key, body, .. }) = self.current.take() else { continue };
                        let image = catalog.complete(key.clone(), body, bodies);
                        log::debug!("{key}: {} received", pump::human(image.len));
                        complete.push(key);
                    }
                }
            }
        }
        Ok(Arrival::Again)
    }

    /// Gives up the image that was arriving and closes the link, so that the peer sees a failure.
    pub fn abandon(mut self, bodies: &mut Bodies) {
        if let Some(inflow) = self.current.take() {
            bodies.truncate(inflow.body, inflow.start);
            bodies.release(inflow.body);
        }
        net::reset(self.fd);
    }

    fn begin(&mut self, transfer: Transfer, catalog: &Catalog, bodies: &mut Bodies) -> Result<(), String> {
        let existing = catalog.get(&transfer.key).filter(|_| transfer.mode == WriteMode::Append);
        let (body, start) = match existing {
            Some(image) => {
                bodies.hold(image.body);
                (image.body, image.len)
            }
            None => (bodies.create_for(&transfer.key).map_err(|why| format!("was stopped: {why}"))?, 0),
        };
        self.current = Some(Inflow { key: transfer.key, body, start });
        Ok(())
    }

    fn end(&self, bodies: &Bodies) -> Result<Arrival, String> {
        match self.decoder.at_boundary() {
            true => Ok(Arrival::End),
            false => Err(format!("closed{}", self.position(bodies))),
        }
    }

    fn position(&self, bodies: &Bodies) -> String {
        match &self.current {
            Some(inflow) => {
                format!(" in the middle of {}, at its byte {}", inflow.key, bodies.len(inflow.body))
            }
            None if self.decoder.at_boundary() => " between two images".into(),
            None => " in the middle of a header".into(),
        }
    }
}

impl Pollable for Receiver {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        Some(Interest::READABLE)
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}
