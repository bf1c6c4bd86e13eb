//! The sending side of the link: transfers, each an image or more of one, in whichever protocol is spoken.
//!
//! The relay protocol sends a transfer while it grows, and all that have something to send in turns. The
//! seed protocol knows whole images only, one after the other, in the order in which they became complete; and
//! an old cache reads a length with one read(2) and a header's body with another, and takes a short read for
//! an error. So there a header goes out with a single send(2), and the end of each payload is marked (MSG_EOR):
//! the header behind it then begins a TCP segment of its own instead of being split between two.
//!
//! A link of the relay protocol that was lost may go on (--reconnect): each transfer from where the cache has it. A
//! body is there to be sent again; what comes through a pipe is kept until it is acknowledged, and while there is no
//! place for more of that, nothing is taken from the pipes.
//!
//! Owns its queues and a share of each pipe that goes straight to the link; each body in it is held, and
//! released when it is sent (relay: and confirmed) or dropped.

mod frames;
mod replay;
mod resume;
mod seed;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::Protocol;
use crate::pump::Flow;
use crate::store::{Bodies, BodyId, Image};
use crate::wire::Key;
use crate::wire::criu::WriteMode;
use crate::wire::relay::{self, Kind};
use replay::Replay;

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
    /// The same, and its bytes are kept until they are acknowledged. None: it has reached its end.
    Kept(Option<Rc<OwnedFd>>, Replay),
}

#[derive(Debug)]
struct Transfer {
    key: Key,
    mode: WriteMode,
    source: Source,
    // Where in the image it began, where it stands, and where the image ends; None: that is not known yet.
    from: u64,
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
    // Relay, by their numbers on the link: those that are open, and those that are closed and not confirmed.
    open: HashMap<u64, TransferId>,
    unconfirmed: HashMap<u64, (TransferId, Transfer)>,
    stored_images: u64,
    // Whatever the peer has confirmed, and whatever it has been given: it only grows.
    progress: u64,
    // The same of what it has acknowledged alone.
    acknowledged: u64,
    // How many bytes of pipes may be kept until they are acknowledged, how many are, and who waits for room. None:
    // none are kept, a link that is lost does not go on.
    replay_buffer: Option<u64>,
    kept: u64,
    crowded: Vec<TransferId>,
    // A link was lost, and what the cache has is not known yet: nothing is sent but what is said.
    torn: bool,
    ended: Vec<(Key, u64)>,
    drained: Vec<Key>,
}

impl Sender {
    /// One whose link may be lost and go on, for which so many bytes of pipes are kept.
    pub fn with_replay_buffer(bytes: u64) -> Self {
        Self { replay_buffer: Some(bytes), ..Self::default() }
    }

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
        let source = match self.replay_buffer {
            Some(_) => Source::Kept(Some(pipe), Replay::default()),
            None => Source::Pipe(pipe, passing),
        };
        let id = self.insert(key, mode, source, 0);
        self.grown(id);
        id
    }

    fn insert(&mut self, key: Key, mode: WriteMode, source: Source, at: u64) -> TransferId {
        self.last += 1;
        self.lines.entry(key.clone()).or_default().push_back(self.last);
        let transfer = Transfer { key, mode, source, from: at, at, end: None, opened: None, queued: false };
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
        if let Some(Transfer { source: Source::Body(body), .. }) = self.take(id) {
            bodies.release(body);
        }
    }

    // The turn of the next transfer of that image comes.
    fn take(&mut self, id: TransferId) -> Option<Transfer> {
        let transfer = self.transfers.remove(&id)?;
        if let Some(number) = transfer.opened {
            self.open.remove(&number);
        }
        if let Some(line) = self.lines.get_mut(&transfer.key) {
            line.retain(|other| *other != id);
            match line.front().copied() {
                Some(next) => self.grown(next),
                None => drop(self.lines.remove(&transfer.key)),
            }
        }
        Some(transfer)
    }

    /// Forgets everything, also what has been sent: the link is lost, or the session over.
    pub fn clear(&mut self, bodies: &mut Bodies) {
        let sent = self.unconfirmed.values().map(|(_, transfer)| transfer);
        for transfer in self.transfers.values().chain(sent) {
            if let Source::Body(body) = transfer.source {
                bodies.release(body);
            }
        }
        *self = Self {
            last: self.last,
            last_opened: self.last_opened,
            progress: self.progress,
            acknowledged: self.acknowledged,
            replay_buffer: self.replay_buffer,
            ..Self::default()
        };
    }

    /// Relay: says this before anything else.
    pub fn say(&mut self, kind: Kind) {
        self.frames.push_back(kind);
    }

    /// Relay: asks whether the cache is there, unless a question still waits to be sent.
    pub fn ping(&mut self, token: u64) {
        if !self.frames.iter().any(|kind| matches!(kind, Kind::Ping(_))) {
            self.say(Kind::Ping(relay::Ping { token }));
        }
    }

    /// Whether everything has been handed to the kernel.
    pub fn is_idle(&self) -> bool {
        self.transfers.is_empty() && self.is_between() && !self.torn
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

    /// Whether there is a complete image on its way to the cache, or to its confirmation, of which this is so.
    pub fn has_leaving(&self, leaves: impl Fn(&Key, BodyId) -> bool) -> bool {
        let complete = self.transfers.values().filter(|transfer| transfer.end.is_some());
        let sent = self.unconfirmed.values().map(|(_, transfer)| transfer);
        complete.chain(sent).any(|transfer| match transfer.source {
            Source::Body(body) => leaves(&transfer.key, body),
            Source::Pipe(..) | Source::Kept(..) => false,
        })
    }

    /// The cache has stored some of what it was given.
    pub fn acknowledged(&mut self, ack: &relay::Ack) {
        self.progress += 1;
        self.acknowledged += 1;
        let open = self.open.get(&ack.id).and_then(|id| self.transfers.get_mut(id));
        let transfer = match open {
            Some(transfer) => Some(transfer),
            None => self.unconfirmed.get_mut(&ack.id).map(|(_, transfer)| transfer),
        };
        if let Some(Transfer { source: Source::Kept(_, replay), at, .. }) = transfer {
            let freed = replay.acknowledged(ack.bytes.min(*at));
            self.make_room(freed);
        }
    }

    /// The cache has all that was sent.
    pub fn all_stored(&mut self, bodies: &mut Bodies) {
        for (_, (_, transfer)) in std::mem::take(&mut self.unconfirmed) {
            self.confirmed(transfer, bodies);
        }
        self.torn = false;
    }

    /// How many transfers have been opened, in all sessions.
    pub fn opened(&self) -> u64 {
        self.last_opened
    }

    /// A number that grows whenever the cache acknowledges something.
    pub fn acknowledgements(&self) -> u64 {
        self.acknowledged
    }

    // So many bytes less are kept: who waited for room may go on.
    fn make_room(&mut self, freed: u64) {
        self.kept = self.kept.saturating_sub(freed);
        if freed > 0 {
            for id in std::mem::take(&mut self.crowded) {
                self.grown(id);
            }
        }
    }

    /// The cache has said something of what was sent: perhaps that an image is stored, which came from this body. An
    /// error is the second half of a sentence.
    pub fn heard(&mut self, kind: &Kind, bodies: &mut Bodies) -> Result<Option<(Key, BodyId)>, String> {
        self.progress += 1;
        let Kind::Stored(stored) = kind else { return Ok(None) };
        self.acknowledged += 1;
        if let Some((_, Transfer { key, at, .. })) = self.unconfirmed.get(&stored.id)
            && *at != stored.size
        {
            return Err(format!("has stored {} bytes of {key}, of which {at} were sent", stored.size));
        }
        match self.unconfirmed.remove(&stored.id) {
            Some((_, transfer)) => Ok(self.confirmed(transfer, bodies)),
            None => Err(format!("has confirmed transfer {}, which was not sent", stored.id)),
        }
    }

    // The cache has all of it.
    fn confirmed(&mut self, transfer: Transfer, bodies: &mut Bodies) -> Option<(Key, BodyId)> {
        self.stored_images += 1;
        match transfer.source {
            Source::Body(body) => {
                bodies.release(body);
                Some((transfer.key, body))
            }
            Source::Kept(_, replay) => {
                self.make_room(replay.len());
                None
            }
            Source::Pipe(..) => None,
        }
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
