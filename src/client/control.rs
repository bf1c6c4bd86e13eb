//! CRIU's action script, which is criu-relay itself: one request, then it waits for the one answer.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use mio::Interest;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::HEADER_LIMIT;
use crate::net::{self, Received, ReceivedMany};
use crate::reactor::Pollable;
use crate::wire::WireError;
use crate::wire::control::{Decoder, Request, encode_reply};
use crate::wire::frame::{LENGTH, MAX_BODY};

/// One connection to a control socket.
#[derive(Debug)]
pub struct Control {
    fd: OwnedFd,
    wire: Decoder<OwnedFd>,
    until: Option<Instant>,
    // Whether the request has come; from then on the script waits for us.
    asked: bool,
    in_view: bool,
}

/// What a step of a [`Control`] brought.
#[derive(Debug)]
pub enum Controlled {
    /// The request: answer with [`Control::verdict`], now or later, and close.
    Request(Request<OwnedFd>),
    /// An event will come.
    Wait,
    /// The script has closed: nobody waits for an answer.
    End,
}

impl Control {
    /// A connection just accepted; `in_view`: at the socket in the view.
    pub fn new(fd: OwnedFd, in_view: bool, now: Instant) -> Self {
        Self { fd, wire: Decoder::default(), until: Some(now + HEADER_LIMIT), asked: false, in_view }
    }

    /// Whether it came by the socket in the view.
    pub fn is_in_view(&self) -> bool {
        self.in_view
    }

    /// Goes on. The error is the second half of a sentence.
    pub fn step(&mut self, block: &mut [u8]) -> Result<Controlled, String> {
        if self.asked {
            return match net::peek(self.fd.as_fd(), &mut [0; 1]) {
                Ok(Received::Wait) => Ok(Controlled::Wait),
                Ok(Received::End) | Err(_) => Ok(Controlled::End),
                Ok(_) => Err(WireError::Unexpected("behind its request").to_string()),
            };
        }
        loop {
            let input = &mut block[..LENGTH + MAX_BODY];
            let (n, descriptors) = match net::receive_many(self.fd.as_fd(), input) {
                Ok(ReceivedMany::Bytes(n, descriptors)) => (n, descriptors),
                Ok(ReceivedMany::Wait) => return Ok(Controlled::Wait),
                Ok(ReceivedMany::End) if self.wire.is_idle() => return Ok(Controlled::End),
                Ok(ReceivedMany::End) => return Err(WireError::Truncated("a request").to_string()),
                Ok(ReceivedMany::Truncated) => {
                    return Err("sent more descriptors than this process may have (see ulimit -n)".into());
                }
                Err(error) => return Err(format!("could not be read from: {error}")),
            };
            if !descriptors.iter().all(|fd| net::is_pidfd(fd.as_fd())) {
                return Err("sent a descriptor that is no pidfd".into());
            }
            let got = self.wire.feed(&input[..n], descriptors).map_err(|error| error.to_string())?;
            if let Some(request) = got {
                self.asked = true;
                self.until = None;
                return Ok(Controlled::Request(request));
            }
        }
    }

    /// Tells the script whether CRIU may go on, or why not; or the operator what was done. Closes.
    pub fn verdict(mut self, verdict: Result<&str, &str>) {
        let told = match verdict {
            Ok(done) => self.reply(0, done),
            Err(why) => {
                log::warn!("the action script was told to fail: {why}");
                self.reply(Errno::CANCELED.raw_os_error() as u32, why)
            }
        };
        if let Err(why) = told {
            log::warn!("the action script {why}");
        }
    }

    /// The answer: 0, or an errno and why CRIU is not to go on.
    pub fn reply(&mut self, errno: u32, text: &str) -> Result<(), String> {
        let reply = encode_reply(errno, text);
        match send(&self.fd, &reply, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(n) if n == reply.len() => Ok(()),
            Ok(_) => Err("could not take a whole answer".into()),
            Err(error) => Err(format!("could not be answered: {error}")),
        }
    }
}

impl Pollable for Control {
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
