//! The sending side of the seed protocol: whole images, one after the other.
//!
//! An old cache reads a length with one read(2) and a header's body with another, and takes a short read
//! for an error. So a header goes out with a single send(2), and the end of each payload is marked (MSG_EOR):
//! the header behind it then begins a TCP segment of its own instead of being split between two.
//!
//! Owns nothing but its queue; each body in it is held, and released when it is sent or dropped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use crate::pump::{self, Flow, Outflow};
use crate::store::{Bodies, Content, Image};
use crate::wire::Key;
use crate::wire::criu::{self, Transfer, WriteMode};

/// The last bytes of a payload, at most, which are copied and sent with the mark.
const TAIL: u64 = 4096;

/// What is to be sent.
#[derive(Debug, Default)]
pub struct Sender {
    queue: VecDeque<(WriteMode, Outflow)>,
    // The header of the first, as far as it is not sent.
    header: Vec<u8>,
    begun: bool,
    sent_images: u64,
    sent_bytes: u64,
}

impl Sender {
    /// Queues the bytes of `image` from `from` on. The caller has taken a hold on the body for it.
    pub fn push(&mut self, key: Key, image: Image, from: u64, mode: WriteMode) {
        let out = Outflow { key, body: image.body, at: from, end: image.len };
        self.queue.push_back((mode, out));
    }

    /// Forgets everything, also what has been sent: the link is lost.
    pub fn clear(&mut self, bodies: &mut Bodies) {
        for (_, out) in &self.queue {
            bodies.release(out.body);
        }
        *self = Self::default();
    }

    /// Whether everything has been handed to the kernel.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// How many transfers and how many bytes of payload have been sent.
    pub fn sent(&self) -> (u64, u64) {
        (self.sent_images, self.sent_bytes)
    }

    /// Sends as much as `link` takes, a turn's worth at most.
    pub fn step(&mut self, bodies: &mut Bodies, link: BorrowedFd<'_>) -> io::Result<Flow> {
        let mut moved = 0;
        while moved < pump::TURN as u64 {
            let Some((mode, out)) = self.queue.front_mut() else { return Ok(Flow::End) };
            if !self.begun {
                let key = out.key.clone();
                self.header = criu::encode_transfer(&Transfer { key, mode: *mode, size: out.end });
                self.begun = true;
            }
            while !self.header.is_empty() {
                match send(link, &self.header, SendFlags::NOSIGNAL) {
                    Ok(n) => drop(self.header.drain(..n)),
                    Err(Errno::AGAIN) => return Ok(Flow::Wait),
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let before = out.at;
            let flow = send_payload(bodies, out, link)?;
            moved += out.at - before;
            self.sent_bytes += out.at - before;
            match flow {
                Flow::Wait => return Ok(Flow::Wait),
                Flow::Again => {}
                Flow::End => {
                    log::debug!("{}: {} sent", out.key, pump::human(out.end));
                    bodies.release(out.body);
                    self.queue.pop_front();
                    self.begun = false;
                    self.sent_images += 1;
                    // Ten thousand empty images are a turn's work too.
                    moved += 512;
                }
            }
        }
        Ok(Flow::Again)
    }
}

fn send_payload(bodies: &Bodies, out: &mut Outflow, link: BorrowedFd<'_>) -> io::Result<Flow> {
    // Everything but the tail goes without a copy.
    if let Some(Content::File(..)) = bodies.content(out.body)
        && out.end - out.at > TAIL
    {
        let key = out.key.clone();
        let mut front = Outflow { key, body: out.body, at: out.at, end: out.end - TAIL };
        let flow = pump::drain(bodies, &mut front, link);
        out.at = front.at;
        match flow? {
            Flow::End => {}
            other => return Ok(other),
        }
    }
    while out.at < out.end {
        let tail = bodies.range(out.body, out.at, out.end)?;
        match send(link, &tail, SendFlags::NOSIGNAL | SendFlags::EOR) {
            Ok(n) => out.at += n as u64,
            Err(Errno::AGAIN) => return Ok(Flow::Wait),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Flow::End)
}
