//! The seed protocol: whole images, one after the other.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::{Sender, Source, gone};
use crate::pump::{self, Flow, Outflow};
use crate::store::{Bodies, BodyId, Content, INLINE_MAX};
use crate::wire::Key;
use crate::wire::criu::{self, Transfer as Header};

/// The last bytes of a payload, at most, which are copied and sent with the mark.
const TAIL: u64 = 4096;

impl Sender {
    pub(super) fn step_seed(
        &mut self,
        old: bool,
        bodies: &mut Bodies,
        link: BorrowedFd<'_>,
    ) -> io::Result<Flow> {
        let mut moved = 0;
        while moved < pump::TURN as u64 {
            let Some(id) = self.complete.front().copied() else { return Ok(Flow::End) };
            let Some(transfer) = self.transfers.get_mut(&id) else {
                self.complete.pop_front();
                continue;
            };
            let (Source::Body(body), Some(end)) = (&transfer.source, transfer.end) else {
                return Err(gone());
            };
            let (body, before) = (*body, transfer.at);
            if old && end == 0 {
                if !std::mem::replace(&mut self.told_empty, true) {
                    log::warn!(
                        "{}: left out, and so is every other: an old cache takes no empty images",
                        transfer.key
                    );
                }
                self.complete.pop_front();
                self.remove(id, bodies);
                continue;
            }
            if !self.begun {
                let key = transfer.key.clone();
                self.out = criu::encode_transfer(&Header { key, mode: transfer.mode, size: end });
                self.begun = true;
            }
            if self.flush(link, SendFlags::empty())? == Flow::Wait {
                return Ok(Flow::Wait);
            }
            let Some(transfer) = self.transfers.get_mut(&id) else { continue };
            let flow = send_payload(bodies, body, &mut transfer.at, end, link)?;
            let n = transfer.at - before;
            moved += n;
            self.sent_bytes += n;
            self.progress += n;
            match flow {
                Flow::Wait => return Ok(Flow::Wait),
                Flow::Again | Flow::Starved => {}
                Flow::End => {
                    log::debug!("{}: {} sent", transfer.key, pump::human(end));
                    self.complete.pop_front();
                    self.remove(id, bodies);
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

fn send_payload(
    bodies: &Bodies,
    body: BodyId,
    at: &mut u64,
    end: u64,
    link: BorrowedFd<'_>,
) -> io::Result<Flow> {
    // Everything but the tail goes without a copy; what is small is one piece.
    let left = end - *at;
    let in_file = matches!(bodies.content_at(body, *at), Some((Content::File(..), _)));
    if left > INLINE_MAX as u64 || (in_file && left > TAIL) {
        let mut front = Outflow { at: *at, ..Outflow::new(Key::stream([]), body, Some(end - TAIL)) };
        let flow = pump::drain(bodies, &mut front, link);
        *at = front.at;
        match flow? {
            Flow::End => {}
            other => return Ok(other),
        }
    }
    while *at < end {
        let tail = bodies.range(body, *at, end)?;
        match send(link, &tail, SendFlags::NOSIGNAL | SendFlags::EOR) {
            Ok(n) => *at += n as u64,
            Err(Errno::AGAIN) => return Ok(Flow::Wait),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Flow::End)
}
