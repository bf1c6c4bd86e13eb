//! The sending side of the link: transfers, each an image or more of one, in whichever protocol is spoken.
//!
//! The relay protocol sends a transfer while it grows, and all that have something to send in turns. The
//! seed protocol knows whole images only, one after the other, in the order in which they became complete; and
//! an old cache reads a length with one read(2) and a header's body with another, and takes a short read for
//! an error. So there a header goes out with a single send(2), and the end of each payload is marked (MSG_EOR):
//! the header behind it then begins a TCP segment of its own instead of being split between two.
//!
//! Owns its queues and a share of each pipe that goes straight to the link; each body in it is held, and
//! released when it is sent or dropped.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::sendfile;
use rustix::io::{Errno, ioctl_fionread, read};
use rustix::net::{SendAncillaryBuffer, SendFlags, send, sendmsg};
use rustix::pipe::{SpliceFlags, splice};

use super::Protocol;
use crate::net;
use crate::pump::{self, Flow, Outflow};
use crate::store::{Bodies, BodyId, Content, Image};
use crate::wire::Key;
use crate::wire::criu::{self, Transfer as Header, WriteMode};
use crate::wire::relay::{self, DATA_MAX, Kind};

/// Seed: the last bytes of a payload, at most, which are copied and sent with the mark.
const TAIL: u64 = 4096;

/// Relay: pieces up to this many bytes are copied behind their header and sent with it. A system call of its
/// own costs more than copying a few pages.
const COPY_MAX: u64 = 16 * 1024;

/// Relay: frames are gathered up to this many bytes before they are sent.
const GATHER: usize = 64 * 1024;

/// The number of a transfer.
pub type TransferId = u64;

/// How the bytes of a pipe go to the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// Moved by the kernel: what is sent are CRIU's own pages, and the process's.
    Splice,
    /// Copied out of the pipe first.
    Copy,
}

#[derive(Debug)]
enum Source {
    /// A body, which may be growing.
    Body(BodyId),
    /// A pipe of CRIU.
    Pipe(Rc<OwnedFd>, Passing),
}

#[derive(Debug)]
struct Transfer {
    key: Key,
    mode: WriteMode,
    source: Source,
    // Where in the image it stands, and where the image ends; None: that is not known yet.
    at: u64,
    end: Option<u64>,
    // Relay: its number on the link, once it has been opened there.
    opened: Option<u64>,
    queued: bool,
}

/// Bytes whose `Data` has gone out, or is about to: nothing else may come in between.
#[derive(Clone, Copy, Debug)]
enum Moving {
    /// So many from the transfer's source.
    Source(TransferId, u64),
    /// The rest of the copy, from here to there.
    Copy(TransferId, usize, usize),
}

/// What is to be sent.
#[derive(Debug, Default)]
pub struct Sender {
    transfers: HashMap<TransferId, Transfer>,
    last: TransferId,
    last_opened: u64,
    // Transfers of the same image go one after the other.
    lines: HashMap<Key, VecDeque<TransferId>>,
    // Relay: those that may have something to send. Seed: those that are complete.
    ready: VecDeque<TransferId>,
    complete: VecDeque<TransferId>,
    // Relay: messages that go before further images.
    frames: VecDeque<Kind>,
    // What has to go out next, as far as it has not, and the raw bytes behind it.
    out: Vec<u8>,
    out_at: usize,
    moving: Option<Moving>,
    copy: Vec<u8>,
    // Seed: the header of the first has been made.
    begun: bool,
    // Seed: the log knows that empty images are left out.
    told_empty: bool,
    sent_images: u64,
    sent_bytes: u64,
    unconfirmed: HashMap<u64, (Key, BodyOf, u64)>,
    stored_images: u64,
    // Whatever the peer has confirmed, and whatever it has been given: it only grows.
    progress: u64,
    ended: Vec<(Key, u64)>,
    drained: Vec<Key>,
}

/// The body that a transfer came from, if it came from one.
pub type BodyOf = Option<BodyId>;

/// What the cache has said of a transfer.
#[derive(Debug, PartialEq, Eq)]
pub enum Confirmed {
    /// Nothing that anybody need know.
    Nothing,
    /// This image is stored: it came from this body.
    Image(Key, BodyOf),
}

impl Sender {
    /// A transfer begins: the bytes of `body` from `from` on, which may be growing. The caller has taken a hold
    /// on the body for it.
    pub fn open(&mut self, key: Key, mode: WriteMode, body: BodyId, from: u64) -> TransferId {
        self.insert(key, mode, Source::Body(body), from)
    }

    /// A transfer begins: everything that comes through `pipe`. Relay protocol only; its end is told by
    /// [`Sender::ended`].
    pub fn open_pipe(
        &mut self,
        key: Key,
        mode: WriteMode,
        pipe: Rc<OwnedFd>,
        passing: Passing,
    ) -> TransferId {
        let id = self.insert(key, mode, Source::Pipe(pipe, passing), 0);
        self.grown(id);
        id
    }

    fn insert(&mut self, key: Key, mode: WriteMode, source: Source, at: u64) -> TransferId {
        self.last += 1;
        self.lines.entry(key.clone()).or_default().push_back(self.last);
        let transfer = Transfer { key, mode, source, at, end: None, opened: None, queued: false };
        self.transfers.insert(self.last, transfer);
        self.last
    }

    /// There may be more of it.
    pub fn grown(&mut self, id: TransferId) {
        if let Some(transfer) = self.transfers.get_mut(&id)
            && !std::mem::replace(&mut transfer.queued, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Its body is complete: the image has `end` bytes.
    pub fn complete(&mut self, id: TransferId, end: u64, bodies: &mut Bodies) {
        let Some(transfer) = self.transfers.get_mut(&id) else { return };
        // Nothing has changed. (To an old cache, size 0 would mean that too, and an empty image.)
        if transfer.opened.is_none() && transfer.mode == WriteMode::Append && end > 0 && transfer.at == end {
            return self.remove(id, bodies);
        }
        transfer.end = Some(end);
        self.complete.push_back(id);
        self.grown(id);
    }

    /// A complete image.
    pub fn push(&mut self, key: Key, image: Image, bodies: &mut Bodies) {
        bodies.hold(image.body);
        let id = self.open(key, WriteMode::Append, image.body, 0);
        self.complete(id, image.len, bodies);
    }

    // It is sent, or dropped.
    fn remove(&mut self, id: TransferId, bodies: &mut Bodies) {
        let Some(transfer) = self.transfers.remove(&id) else { return };
        if let Source::Body(body) = transfer.source {
            bodies.release(body);
        }
        if let Some(line) = self.lines.get_mut(&transfer.key) {
            line.retain(|other| *other != id);
            match line.front().copied() {
                Some(next) => self.grown(next),
                None => drop(self.lines.remove(&transfer.key)),
            }
        }
    }

    /// Forgets everything, also what has been sent: the link is lost, or the session over.
    pub fn clear(&mut self, bodies: &mut Bodies) {
        for transfer in self.transfers.values() {
            if let Source::Body(body) = transfer.source {
                bodies.release(body);
            }
        }
        *self = Self {
            last: self.last,
            last_opened: self.last_opened,
            progress: self.progress,
            ..Self::default()
        };
    }

    /// Relay: says this before anything else.
    pub fn say(&mut self, kind: Kind) {
        self.frames.push_back(kind);
    }

    /// Whether everything has been handed to the kernel.
    pub fn is_idle(&self) -> bool {
        self.transfers.is_empty() && self.is_between()
    }

    /// Whether nothing has been begun that has to be gone on with.
    fn is_between(&self) -> bool {
        self.out.is_empty() && self.moving.is_none() && self.frames.is_empty()
    }

    /// How many transfers and how many bytes of payload have been sent.
    pub fn sent(&self) -> (u64, u64) {
        (self.sent_images, self.sent_bytes)
    }

    /// How many transfers the cache has confirmed.
    pub fn stored(&self) -> u64 {
        self.stored_images
    }

    /// A number that grows whenever something is sent or confirmed.
    pub fn progress(&self) -> u64 {
        self.progress
    }

    /// Takes out the images whose pipes have reached their end, with their sizes in bytes.
    pub fn ended(&mut self) -> Vec<(Key, u64)> {
        std::mem::take(&mut self.ended)
    }

    /// Takes out the images whose pipes have been found empty: they want [`Sender::grown`] when they are not.
    pub fn drained(&mut self) -> Vec<Key> {
        std::mem::take(&mut self.drained)
    }

    /// The cache has stored some of what it was given.
    pub fn acknowledged(&mut self) {
        self.progress += 1;
    }

    /// The cache has said something of what was sent. An error is the second half of a sentence.
    pub fn heard(&mut self, kind: &Kind) -> Result<Confirmed, String> {
        self.progress += 1;
        match kind {
            Kind::Stored(stored) => match self.unconfirmed.remove(&stored.id) {
                Some((key, body, size)) if size == stored.size => {
                    self.stored_images += 1;
                    Ok(Confirmed::Image(key, body))
                }
                Some((key, _, size)) => {
                    Err(format!("has stored {} bytes of {key}, of which {size} were sent", stored.size))
                }
                None => Err(format!("has confirmed transfer {}, which was not sent", stored.id)),
            },
            _ => Ok(Confirmed::Nothing),
        }
    }

    /// Relay: tries to tell the cache that the dump has failed. False: that could not be said in order, so that
    /// the link has to be reset.
    pub fn fail(&mut self, why: &str, link: BorrowedFd<'_>) -> bool {
        if self.moving.is_some() || self.out_at > 0 {
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

    /// Sends as much as `link` takes, a turn's worth at most. `old`: negotiation has shown that the cache is one
    /// of 2017 or 2020, which hang at an empty image.
    pub fn step(
        &mut self,
        protocol: Protocol,
        old: bool,
        bodies: &mut Bodies,
        link: BorrowedFd<'_>,
    ) -> io::Result<Flow> {
        match protocol {
            Protocol::Seed => self.step_seed(old, bodies, link),
            Protocol::Relay => self.step_relay(bodies, link),
        }
    }

    // Sends `out`, with `flags`.
    fn flush(&mut self, link: BorrowedFd<'_>, flags: SendFlags) -> io::Result<Flow> {
        while self.out_at < self.out.len() {
            match send(link, &self.out[self.out_at..], SendFlags::NOSIGNAL | flags) {
                Ok(n) => self.out_at += n,
                Err(Errno::AGAIN) => return Ok(Flow::Wait),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.out.clear();
        self.out_at = 0;
        Ok(Flow::End)
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

    fn step_relay(&mut self, bodies: &mut Bodies, link: BorrowedFd<'_>) -> io::Result<Flow> {
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
                    Source::Body(body) => match bodies.content(*body) {
                        Some(Content::File(file, start)) => {
                            let mut offset = start + transfer.at;
                            retry(|| sendfile(link, file, Some(&mut offset), count))?
                        }
                        Some(Content::Inline(bytes)) => {
                            let from = transfer.at as usize;
                            let piece = bytes.get(from..from + count).ok_or_else(gone)?;
                            retry(|| send(link, piece, SendFlags::NOSIGNAL))?
                        }
                        None => return Err(gone()),
                    },
                    Source::Pipe(pipe, _) => {
                        retry(|| splice(pipe, None, link, None, count, SpliceFlags::NONBLOCK))?
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
            } else if let Some(id) = self.ready.pop_front() {
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
        let (length, ended) = match &transfer.source {
            Source::Body(body) => {
                let known = transfer.end.unwrap_or_else(|| bodies.len(*body));
                (known.saturating_sub(transfer.at), transfer.end.is_some())
            }
            Source::Pipe(pipe, _) => match retry(|| ioctl_fionread(pipe.as_fd()))? {
                0 => (0, net::is_pipe_at_end(pipe.as_fd())),
                here => (here, false),
            },
        };
        if length == 0 && !ended {
            if let Source::Pipe(..) = transfer.source {
                self.drained.push(transfer.key.clone());
            }
            return Ok(());
        }
        let number = match transfer.opened {
            Some(number) => number,
            None => {
                self.last_opened += 1;
                transfer.opened = Some(self.last_opened);
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
            Source::Pipe(..) => ended,
        };
        if !at_end {
            self.grown(id);
            return Ok(());
        }
        let size = transfer.at;
        log::debug!("{}: {} sent", transfer.key, pump::human(size));
        let body = match transfer.source {
            Source::Body(body) => Some(body),
            Source::Pipe(..) => {
                self.ended.push((transfer.key.clone(), size));
                None
            }
        };
        self.unconfirmed.insert(number, (transfer.key.clone(), body, size));
        self.sent_images += 1;
        relay::append(&mut self.out, Kind::Close(relay::Close { id: number, size }));
        self.remove(id, bodies);
        Ok(())
    }

    fn step_seed(&mut self, old: bool, bodies: &mut Bodies, link: BorrowedFd<'_>) -> io::Result<Flow> {
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
    // Everything but the tail goes without a copy.
    if let Some(Content::File(..)) = bodies.content(body)
        && end - *at > TAIL
    {
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

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the image that is being sent is not here any more")
}
