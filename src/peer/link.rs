//! The proxy's end of the link: a connection being made, in use, or being closed in order.
//!
//! Owns the TCP socket (or the inherited one). What is sent on it is the [`Sender`]'s.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::Interest;
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, connect, recv, shutdown, sockopt};

use super::dialer::ATTEMPT;
use super::outq::unacknowledged;
use super::sender::Sender;
use crate::net;
use crate::pump::Flow;
use crate::reactor::Pollable;
use crate::store::Bodies;

/// How often the send queue is looked at while the link is being closed, since nothing tells when it is
/// empty: at first, and after it has been in vain for a while. (A look costs up to a millisecond.)
const LOOK: Duration = Duration::from_millis(5);
const LOOK_MAX: Duration = Duration::from_millis(500);

/// Blocks that a peer may send at a time although there is nothing to say.
const CHATTER: u32 = 16;

/// The link as the proxy sees it.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
    name: String,
    state: State,
}

#[derive(Debug)]
enum State {
    Connecting {
        until: Instant,
    },
    Up {
        idle: bool,
    },
    /// Everything is sent, our half is shut. The send queue is looked at next at `look_at`; None: it can't be
    /// known.
    Closing {
        look_at: Option<Instant>,
        pause: Duration,
    },
}

/// How a step of the link ended.
#[derive(Debug)]
pub enum LinkStep {
    /// The connection could not be made.
    Refused(String),
    /// The link stands.
    Up,
    /// An event will come, or something to send.
    Wait,
    /// The turn is used up.
    Again,
    /// The link is lost.
    Lost(String),
    /// The peer has everything, as far as this protocol can tell.
    Delivered,
}

impl Link {
    /// Begins to connect.
    pub fn connect(address: SocketAddr, now: Instant) -> io::Result<Self> {
        let fd = net::tcp_socket(address)?;
        match connect(&fd, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let state = State::Connecting { until: now + ATTEMPT };
        Ok(Self { fd, name: address.to_string(), state })
    }

    /// Takes over an established connection.
    pub fn inherited(fd: OwnedFd) -> Self {
        net::tune_link(&fd);
        Self { fd, name: "the inherited connection".into(), state: State::Up { idle: true } }
    }

    /// Who is on the other side.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Goes on.
    pub fn step(&mut self, sender: &mut Sender, bodies: &mut Bodies, block: &mut [u8]) -> LinkStep {
        match &mut self.state {
            State::Connecting { .. } => self.connected(),
            State::Up { idle } => {
                match discard(&self.fd, block) {
                    Ok(true) => {}
                    Ok(false) => return LinkStep::Lost("the peer closed it".into()),
                    Err(why) => return LinkStep::Lost(why),
                }
                let flow = sender.step(bodies, self.fd.as_fd());
                *idle = matches!(flow, Ok(Flow::End));
                match flow {
                    Ok(Flow::Wait | Flow::End) => LinkStep::Wait,
                    Ok(Flow::Again) => LinkStep::Again,
                    Err(error) => LinkStep::Lost(error.to_string()),
                }
            }
            State::Closing { look_at, pause } => {
                // Behind the peer's close a read says nothing of an error.
                if let Ok(Err(error)) = sockopt::socket_error(&self.fd) {
                    return LinkStep::Lost(error.to_string());
                }
                let open = match discard(&self.fd, block) {
                    Ok(open) => open,
                    Err(why) => return LinkStep::Lost(why),
                };
                let now = Instant::now();
                match look_at {
                    // Nothing but the close tells.
                    None if open => LinkStep::Wait,
                    None => LinkStep::Delivered,
                    Some(at) if open && now < *at => LinkStep::Wait,
                    Some(at) => {
                        *pause = (*pause * 2).min(LOOK_MAX);
                        *at = now + *pause;
                        match unacknowledged(&self.fd) {
                            Some(0) => LinkStep::Delivered,
                            // A peer that closes its half has not read everything for that.
                            Some(_) => LinkStep::Wait,
                            None if open => LinkStep::Wait,
                            None => LinkStep::Delivered,
                        }
                    }
                }
            }
        }
    }

    /// Everything has been handed to the kernel: closes our half, and waits until the peer has it.
    pub fn finish(&mut self) {
        // It fails only when the link is lost already; the next step sees that.
        let _ = shutdown(&self.fd, Shutdown::Write);
        let known = unacknowledged(&self.fd).is_some();
        self.state = State::Closing { look_at: known.then(Instant::now), pause: LOOK };
    }

    /// Whether it is being closed.
    pub fn is_closing(&self) -> bool {
        matches!(self.state, State::Closing { .. })
    }

    /// Closes it so that the peer sees a failure.
    pub fn reset(self) {
        net::reset(self.fd);
    }

    fn connected(&mut self) -> LinkStep {
        match sockopt::socket_error(&self.fd) {
            Ok(Ok(())) => {}
            Ok(Err(error)) | Err(error) => return LinkStep::Refused(error.to_string()),
        }
        match rustix::net::getpeername(&self.fd) {
            Ok(Some(_)) => {}
            Ok(None) | Err(Errno::NOTCONN) => return LinkStep::Wait,
            Err(error) => return LinkStep::Refused(error.to_string()),
        }
        // A port that nobody listens at may be the one that the kernel gave to this very socket.
        if rustix::net::getsockname(&self.fd).ok() == rustix::net::getpeername(&self.fd).ok().flatten() {
            return LinkStep::Refused("nobody listens there".into());
        }
        net::tune_link(&self.fd);
        self.state = State::Up { idle: true };
        LinkStep::Up
    }
}

// A peer of the seed protocol says nothing. Should one, what it says is dropped; one that does not stop fails
// the link instead of taking all our time. Ok(false): it has closed.
fn discard(link: &OwnedFd, block: &mut [u8]) -> Result<bool, String> {
    for _ in 0..CHATTER {
        match recv(link, &mut *block, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Ok(false),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(true),
            Err(error) => return Err(error.to_string()),
        }
    }
    Err("the peer does not stop talking, which no cache does".into())
}

impl Pollable for Link {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        Some(match self.state {
            State::Connecting { .. } => Interest::WRITABLE,
            State::Up { idle: false } => Interest::READABLE | Interest::WRITABLE,
            State::Up { idle: true } | State::Closing { .. } => Interest::READABLE,
        })
    }

    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Connecting { until } => Some(until),
            State::Up { .. } => None,
            State::Closing { look_at, .. } => look_at,
        }
    }
}
