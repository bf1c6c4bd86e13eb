//! A process that is watched, by its pidfd: CRIU, or a task of what it dumps.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use mio::Interest;

use crate::net;
use crate::reactor::Pollable;

/// A watched process. It is readable when it is dead, with all its threads.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Takes over a pidfd.
    pub fn new(pidfd: OwnedFd) -> Self {
        Self(pidfd)
    }

    /// Its process id as seen from here; None: it has been waited for, or is not visible.
    pub fn pid(&self) -> Option<i32> {
        net::pidfd_pid(self.0.as_fd())
    }

    /// Whether all of it is dead.
    pub fn is_dead(&self) -> bool {
        net::is_readable(self.0.as_fd())
    }
}

impl Pollable for Process {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        Some(Interest::READABLE)
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}
