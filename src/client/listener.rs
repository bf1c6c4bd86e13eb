//! A listening socket, UNIX or TCP: accepts in turns, pauses when descriptors run out.
//!
//! Owns the listening descriptor; the role closes it by dropping the listener.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::Interest;
use rustix::io::Errno;
use rustix::net::accept_with;

use crate::net;
use crate::pump::Flow;
use crate::reactor::Pollable;

/// Connections accepted in one turn; the others wait for the next.
pub const TURN: usize = 64;

/// How long a pause lasts. Who waits meanwhile waits in the backlog.
const PAUSE: Duration = Duration::from_millis(200);

/// A listening socket. `kind` says what is accepted there.
#[derive(Debug)]
pub struct Listener<K> {
    fd: OwnedFd,
    kind: K,
    paused: Option<Instant>,
    // Whether the log knows that there are too many.
    told: bool,
}

impl<K: Copy> Listener<K> {
    /// Takes over a non-blocking, listening socket.
    pub fn new(fd: OwnedFd, kind: K) -> Self {
        Self { fd, kind, paused: None, told: false }
    }

    /// What is accepted here.
    pub fn kind(&self) -> K {
        self.kind
    }

    /// Takes a turn's connections, `room` at most, and says how the turn ended ([`Flow::Again`]: more may
    /// wait). Without a descriptor for the next one it pauses, since no event would tell when there is one.
    pub fn accept(&mut self, room: usize) -> (Vec<OwnedFd>, Flow) {
        let mut accepted = Vec::new();
        while accepted.len() < TURN {
            if accepted.len() >= room {
                self.pause("every place for a connection is taken".into());
                return (accepted, Flow::Wait);
            }
            match accept_with(&self.fd, net::SOCKET) {
                Ok(fd) => accepted.push(fd),
                Err(Errno::AGAIN) => {
                    self.told = false;
                    return (accepted, Flow::Wait);
                }
                // The peer gave up while it waited.
                Err(Errno::CONNABORTED | Errno::INTR | Errno::PROTO | Errno::PERM) => {}
                Err(error) => {
                    self.pause(error.to_string());
                    return (accepted, Flow::Wait);
                }
            }
        }
        (accepted, Flow::Again)
    }

    fn pause(&mut self, why: String) {
        if !std::mem::replace(&mut self.told, true) {
            log::warn!("accepting pauses until there is room again: {why}");
        }
        self.paused = Some(Instant::now() + PAUSE);
    }

    /// Accepts again.
    pub fn resume(&mut self) {
        self.paused = None;
    }
}

impl<K> Pollable for Listener<K> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        // Registering anew after a pause makes epoll tell who has come meanwhile.
        self.paused.is_none().then_some(Interest::READABLE)
    }

    fn deadline(&self) -> Option<Instant> {
        self.paused
    }
}
