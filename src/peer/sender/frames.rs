//! The relay protocol: all that have something to send, in turns, in frames.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::buffer::spare_capacity;
use rustix::fs::sendfile;
use rustix::io::{Errno, ioctl_fionread, read};
use rustix::net::{SendAncillaryBuffer, SendFlags, send, sendmsg};
use rustix::pipe::{SpliceFlags, splice};

use super::{Moving, Passing, Sender, Source, TransferId, gone, retry};
use crate::net;
use crate::pump::{self, Flow};
use crate::store::{Bodies, Content};
use crate::wire::relay::{self, DATA_MAX, Kind};

/// Pieces up to this many bytes are copied behind their header and sent with it. A system call of its
/// own costs more than copying a few pages.
const COPY_MAX: u64 = 16 * 1024;

/// Frames are gathered up to this many bytes before they are sent.
const GATHER: usize = 64 * 1024;

impl Sender {
    /// Relay: tries to tell the cache that the dump has failed. False: that could not be said in order, so that
    /// the link has to be reset.
    pub fn fail(&mut self, why: &str, link: BorrowedFd<'_>) -> bool {
        // Nor does a cache know of the transfers that has not said yet what it holds of them.
        if self.moving.is_some() || self.out_at > 0 || self.torn {
            return false;
        }
        let mut out = std::mem::take(&mut self.out);
        for id in self.transfers.values().filter_map(|transfer| transfer.opened) {
            relay::append(&mut out, Kind::Abort(relay::Abort { id }));
        }
        let errno = Errno::CANCELED.raw_os_error() as u32;
        relay::append(&mut out, Kind::Error(relay::Error::new(errno, why)));
        matches!(send(link, &out, SendFlags::NOSIGNAL), Ok(n) if n == out.len())
    }

    // Sends `out`. A header and its data leave in one segment, and a copied block in the same call.
    fn send_out(&mut self, link: BorrowedFd<'_>) -> io::Result<Flow> {
        let Some(Moving::Copy(id, from, to)) = self.moving else {
            let more = if self.moving.is_some() { SendFlags::MORE } else { SendFlags::empty() };
            return self.flush(link, more);
        };
        if self.out.is_empty() {
            return Ok(Flow::End);
        }
        let header = self.out.len() - self.out_at;
        let pieces = [IoSlice::new(&self.out[self.out_at..]), IoSlice::new(&self.copy[from..to])];
        let sent = retry(|| sendmsg(link, &pieces, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL));
        let n = match sent {
            Ok(n) => n,
            Err(error) if Errno::from_io_error(&error) == Some(Errno::AGAIN) => return Ok(Flow::Wait),
            Err(error) => return Err(error),
        };
        if n < header {
            self.out_at += n;
            return Ok(Flow::Again);
        }
        self.out.clear();
        self.out_at = 0;
        self.moved_raw(id, n - header, to - from - (n - header), |left| Moving::Copy(id, to - left, to));
        Ok(Flow::Again)
    }

    pub(super) fn step_relay(&mut self, bodies: &mut Bodies, link: BorrowedFd<'_>) -> io::Result<Flow> {
        let mut moved = 0;
        loop {
            let before = self.progress;
            moved += self.out.len() as u64;
            if self.send_out(link)? == Flow::Wait {
                return Ok(Flow::Wait);
            }
            moved += self.progress - before;
            if self.moving.is_some() {
                match self.move_raw(bodies, link) {
                    Ok(n) => moved += n,
                    Err(error) if Errno::from_io_error(&error) == Some(Errno::AGAIN) => {
                        return Ok(Flow::Wait);
                    }
                    Err(error) => return Err(error),
                }
            } else if moved >= pump::LINK_TURN as u64 {
                return Ok(Flow::Again);
            } else {
                self.gather(bodies)?;
                if self.is_between() {
                    return Ok(Flow::End);
                }
            }
        }
    }

    // Moves some of the raw bytes that are to follow.
    fn move_raw(&mut self, bodies: &Bodies, link: BorrowedFd<'_>) -> io::Result<u64> {
        match self.moving {
            None => Ok(0),
            Some(Moving::Copy(id, from, to)) => {
                let n = retry(|| send(link, &self.copy[from..to], SendFlags::NOSIGNAL))?;
                Ok(self.moved_raw(id, n, to - from - n, |left| Moving::Copy(id, to - left, to)))
            }
            Some(Moving::Source(id, left)) => {
                let transfer = self.transfers.get(&id).ok_or_else(gone)?;
                let count = left as usize;
                let n = match &transfer.source {
                    Source::Body(body) => {
                        let (content, here) = bodies.content_at(*body, transfer.at).ok_or_else(gone)?;
                        let count = usize::try_from(here).unwrap_or(usize::MAX).min(count);
                        match content {
                            Content::File(file, mut offset) => {
                                retry(|| sendfile(link, file, Some(&mut offset), count))?
                            }
                            Content::Inline(bytes) => {
                                let piece = bytes.get(..count).ok_or_else(gone)?;
                                retry(|| send(link, piece, SendFlags::NOSIGNAL))?
                            }
                        }
                    }
                    Source::Pipe(pipe, _) => {
                        retry(|| splice(pipe, None, link, None, count, SpliceFlags::NONBLOCK))?
                    }
                    Source::Kept(_, replay) => {
                        let piece = replay.piece(transfer.at);
                        let piece = &piece[..piece.len().min(count)];
                        retry(|| send(link, piece, SendFlags::NOSIGNAL))?
                    }
                };
                if n == 0 {
                    return Err(gone());
                }
                Ok(self.moved_raw(id, n, count - n, |left| Moving::Source(id, left as u64)))
            }
        }
    }

    // So many raw bytes have gone, and so many are left.
    fn moved_raw(
        &mut self,
        id: TransferId,
        n: usize,
        left: usize,
        rest: impl FnOnce(usize) -> Moving,
    ) -> u64 {
        let n = n as u64;
        self.progress += n;
        self.sent_bytes += n;
        if let Some(transfer) = self.transfers.get_mut(&id) {
            transfer.at += n;
        }
        self.moving = (left > 0).then(|| rest(left));
        if left == 0 {
            self.grown(id);
        }
        n
    }

    // Puts the next frames together.
    fn gather(&mut self, bodies: &mut Bodies) -> io::Result<()> {
        while self.moving.is_none() && self.out.len() < GATHER {
            if let Some(kind) = self.frames.pop_front() {
                relay::append(&mut self.out, kind);
            } else if !self.torn
                && let Some(id) = self.ready.pop_front()
            {
                self.advance(id, bodies)?;
            } else {
                break;
            }
        }
        Ok(())
    }

    // The next frames of one transfer.
    fn advance(&mut self, id: TransferId, bodies: &mut Bodies) -> io::Result<()> {
        let Some(transfer) = self.transfers.get_mut(&id) else { return Ok(()) };
        transfer.queued = false;
        // Its turn comes when those before it are done.
        if self.lines.get(&transfer.key).and_then(VecDeque::front) != Some(&id) {
            return Ok(());
        }
        let (length, ended) = match &mut transfer.source {
            Source::Body(body) => {
                let known = transfer.end.unwrap_or_else(|| bodies.len(*body));
                (known.saturating_sub(transfer.at), transfer.end.is_some())
            }
            Source::Pipe(pipe, _) => match retry(|| ioctl_fionread(pipe.as_fd()))? {
                0 => (0, net::is_pipe_at_end(pipe.as_fd())),
                here => (here, false),
            },
            // What was taken before goes first.
            Source::Kept(pipe, replay) => {
                if replay.to() == transfer.at
                    && let Some(pipe) = pipe
                    && let here @ 1.. = retry(|| ioctl_fionread(pipe.as_fd()))?
                {
                    let room = self.replay_buffer.unwrap_or_default().saturating_sub(self.kept);
                    if room == 0 {
                        // The pipe fills up, and CRIU waits, until something is acknowledged.
                        self.crowded.push(id);
                        return Ok(());
                    }
                    let mut chunk = Vec::with_capacity(here.min(room).min(pump::BLOCK as u64) as usize);
                    retry(|| read(&*pipe, spare_capacity(&mut chunk)))?;
                    self.kept += chunk.len() as u64;
                    replay.push(chunk);
                }
                let unsent = replay.to() - transfer.at;
                let at_end = |pipe: &Rc<OwnedFd>| net::is_pipe_at_end(pipe.as_fd());
                (unsent, unsent == 0 && pipe.as_ref().is_none_or(at_end))
            }
        };
        if length == 0 && !ended {
            if let Source::Pipe(..) | Source::Kept(..) = transfer.source {
                self.drained.push(transfer.key.clone());
            }
            return Ok(());
        }
        let number = match transfer.opened {
            Some(number) => number,
            None => {
                self.last_opened += 1;
                transfer.opened = Some(self.last_opened);
                self.open.insert(self.last_opened, id);
                let open = relay::Open {
                    id: self.last_opened,
                    name: transfer.key.name.to_vec(),
                    snapshot_id: transfer.key.snapshot_id.to_vec(),
                    open_mode: transfer.mode.flags(),
                };
                relay::append(&mut self.out, Kind::Open(open));
                self.last_opened
            }
        };
        if length > 0 {
            let length = length.min(DATA_MAX);
            let data = |length: u64| Kind::Data(relay::Data::new(number, length as u32));
            match &transfer.source {
                Source::Body(body) if length <= COPY_MAX => {
                    relay::append(&mut self.out, data(length));
                    self.out.extend(bodies.range(*body, transfer.at, transfer.at + length)?);
                    transfer.at += length;
                    self.sent_bytes += length;
                    self.progress += length;
                }
                Source::Pipe(pipe, passing) if *passing == Passing::Copy || length <= COPY_MAX => {
                    self.copy.resize(pump::BLOCK, 0);
                    let n = retry(|| read(pipe, &mut self.copy[..]))?;
                    relay::append_data(&mut self.out, number, n as u32);
                    self.moving = Some(Moving::Copy(id, 0, n));
                    return Ok(());
                }
                Source::Kept(..) => {
                    relay::append_data(&mut self.out, number, length as u32);
                    self.moving = Some(Moving::Source(id, length));
                    return Ok(());
                }
                Source::Body(_) | Source::Pipe(..) => {
                    relay::append(&mut self.out, data(length));
                    self.moving = Some(Moving::Source(id, length));
                    return Ok(());
                }
            }
        }
        let Some(transfer) = self.transfers.get_mut(&id) else { return Ok(()) };
        let at_end = match transfer.source {
            Source::Body(_) => transfer.end == Some(transfer.at),
            Source::Pipe(..) | Source::Kept(..) => ended,
        };
        if !at_end {
            self.grown(id);
            return Ok(());
        }
        let size = transfer.at;
        log::debug!("{}: {} sent", transfer.key, pump::human(size));
        // The end of a pipe is told once, however often its bytes have to be sent.
        let ended = match &mut transfer.source {
            Source::Body(_) => false,
            Source::Pipe(..) => true,
            Source::Kept(pipe, _) => pipe.take().is_some(),
        };
        if ended {
            self.ended.push((transfer.key.clone(), size));
        }
        self.sent_images += 1;
        relay::append(&mut self.out, Kind::Close(relay::Close { id: number, size }));
        if let Some(transfer) = self.take(id) {
            self.unconfirmed.insert(number, (id, transfer));
        }
        Ok(())
    }
}
