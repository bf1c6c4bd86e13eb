//! Bodies: the bytes of images.
//!
//! A body only ever grows at its end; a reader that knows how long the body was when it began is never
//! disturbed. Who holds a body says so ([`Bodies::hold`], [`Bodies::release`]); it is freed with the last.
//!
//! Small bodies lie inline on the heap. Larger ones are memfds, from which sendfile(2) serves without a
//! copy. Each memfd costs a descriptor, so when a fixed share of RLIMIT_NOFILE is used up, further large
//! bodies lie side by side in one shared memfd, the arena. It is sparse: every body has [`ARENA_SLOT`]
//! bytes of file offsets to itself, and only what is written takes memory.
//!
//! What a body takes is counted before it is taken: inline what is reserved for it, in a file its whole pages; and
//! what an image of a peer takes beside its bytes. When the limit is reached, a body grows no more; or, with a spill
//! file, it goes on there, from where it was, in a tail of chunks. What it has in memory stays there. So whoever
//! reads takes piece by piece ([`Bodies::content_at`]).
//!
//! Memory for page images can be written beforehand, see `pool`.

mod growing;
mod place;
mod pool;
mod reading;

use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, fallocate};

use super::catalog::is_pages;
use super::limit::Account;
use super::spill::{CHUNK, SpillFile};
use crate::table::{Id, Table};
use crate::wire::Key;

pub use growing::End;
pub use place::{Files, MEMFD};
pub use pool::Filling;

/// Bodies up to this many bytes stay inline. Most of CRIU's images are a few hundred bytes; a memfd costs
/// a descriptor, an inode (about 1 KiB of kernel memory) and whole pages.
pub const INLINE_MAX: usize = 16 * 1024;

/// The offsets that one body has in the arena: the longest body there, in bytes (1 TiB). The file may
/// have 2^63 bytes, so that 8 million bodies find a place.
pub const ARENA_SLOT: u64 = 1 << 40;

/// What an image takes beside its bytes and its name, in bytes: its places in the tables.
const IMAGE: u64 = 256;

/// The name of one body.
pub type BodyId = Id;

/// All bodies.
#[derive(Debug)]
pub struct Bodies {
    bodies: Table<Body>,
    memfds: usize,
    max_memfds: usize,
    arena: Option<OwnedFd>,
    // Slots given back, and how many there have ever been.
    free_slots: Vec<u32>,
    slots: u32,
    account: Account,
    spill: Option<SpillFile>,
    files: Files,
    pool: pool::Pool,
    page: u64,
}

#[derive(Debug)]
struct Body {
    holders: u32,
    // What is counted for the image beside its bytes.
    beside: u32,
    len: u64,
    place: Place,
    // So much of its file was written beforehand, and is counted until the image is complete.
    prepared: u64,
    // Whether anybody but who made it has ever held it.
    shared: bool,
    tail: Option<Box<Tail>>,
}

/// The pages of a file that are counted: from what has been punched out to the page of the last byte, or to
/// where room has been made.
type Pages = Range<u64>;

#[derive(Debug)]
enum Place {
    Inline(Vec<u8>),
    Memfd(OwnedFd, Pages),
    Arena(u32, Pages),
}

/// What lies in the spill file: the bytes behind the first `from`.
#[derive(Debug)]
struct Tail {
    from: u64,
    chunks: Vec<u32>,
}

impl Body {
    // What of the limit it takes.
    fn charge(&self) -> u64 {
        u64::from(self.beside)
            + match &self.place {
                Place::Inline(bytes) => bytes.capacity() as u64,
                Place::Memfd(_, pages) | Place::Arena(_, pages) => pages.end.saturating_sub(pages.start),
            }
    }

    // How many of its bytes are in memory, or in memory files.
    fn in_memory(&self) -> u64 {
        self.tail.as_ref().map_or(self.len, |tail| tail.from)
    }
}

/// Where the bytes of a body are.
#[derive(Debug)]
pub enum Content<'a> {
    /// Here.
    Inline(&'a [u8]),
    /// In a file, from this offset on.
    File(BorrowedFd<'a>, u64),
}

impl Bodies {
    /// An empty store that takes at most `max_memfds` descriptors for bodies, and one more.
    pub fn new(max_memfds: usize) -> Self {
        Self {
            bodies: Table::default(),
            memfds: 0,
            max_memfds,
            arena: None,
            free_slots: Vec::new(),
            slots: 0,
            account: Account::default(),
            spill: None,
            files: Files::default(),
            pool: pool::Pool::default(),
            page: rustix::param::page_size() as u64,
        }
    }

    /// The same with a limit of so many bytes; beyond it bodies grow in the spill file, if there is one.
    pub fn limited(self, limit: Option<u64>, spill: Option<SpillFile>) -> Self {
        let mut account = Account::new(limit);
        if let (Some(limit), Some(_)) = (limit, &spill) {
            // The images themselves can't go there, only their bytes.
            account.keep_back(limit / 16);
        }
        Self { account, spill, ..self }
    }

    /// A new, empty body with one holder.
    pub fn create(&mut self) -> BodyId {
        self.bodies.insert(Body {
            holders: 1,
            beside: 0,
            len: 0,
            place: Place::Inline(Vec::new()),
            prepared: 0,
            shared: false,
            tail: None,
        })
    }

    /// The same for an image that a peer sends: it is counted as well, with its name, since there may be any number
    /// of them; and if it holds memory, it begins in what was written beforehand. The error is a sentence.
    pub fn create_for(&mut self, key: &Key) -> Result<BodyId, String> {
        let beside = IMAGE + (key.name.len() + key.snapshot_id.len()) as u64;
        self.make_room(beside);
        self.account.take_at_any_rate(beside).map_err(|full| format!("{key} can't be taken in: {full}"))?;
        let id = self.create();
        if let Some(body) = self.bodies.get_mut(id) {
            body.beside = beside as u32;
        }
        if is_pages(key) {
            self.take_prepared(id);
        }
        Ok(id)
    }

    /// One holder more. A body that is gone stays so.
    pub fn hold(&mut self, id: BodyId) {
        if let Some(body) = self.bodies.get_mut(id) {
            body.holders += 1;
            body.shared = true;
        }
    }

    /// One holder less; the last frees the body.
    pub fn release(&mut self, id: BodyId) {
        let Some(body) = self.bodies.get_mut(id) else { return };
        body.holders -= 1;
        if body.holders > 0 {
            return;
        }
        if let Some(body) = self.bodies.remove(id) {
            self.drop_body(body);
        }
    }

    fn drop_body(&mut self, body: Body) {
        self.account.give(body.charge());
        match body.place {
            Place::Memfd(..) => self.memfds -= 1,
            Place::Arena(slot, _) => self.free_slot(slot),
            Place::Inline(_) => {}
        }
        if let (Some(tail), Some(spill)) = (body.tail, &mut self.spill) {
            tail.chunks.into_iter().for_each(|chunk| spill.give(chunk));
        }
    }

    /// Gives the memory of the whole pages between `from` and `to` back, and returns where it stopped. What was
    /// there reads as zeros. Of an inline body nothing is given back.
    pub fn punch(&mut self, id: BodyId, from: u64, to: u64) -> io::Result<u64> {
        let to = to / self.page * self.page;
        if to <= from {
            return Ok(from);
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let mut at = from;
        while at < to {
            let Some((content, here)) = self.content_at(id, at).filter(|(_, here)| *here > 0) else { break };
            let count = here.min(to - at);
            if let Content::File(file, offset) = content {
                fallocate(file, hole, offset, count)?;
            }
            at += count;
        }
        let page = self.page;
        let Some(body) = self.bodies.get_mut(id) else { return Ok(to) };
        let punched = to.min(body.in_memory() / page * page);
        if let Place::Memfd(_, pages) | Place::Arena(_, pages) = &mut body.place
            && (from..=punched).contains(&pages.start)
        {
            self.account.give(punched - pages.start);
            pages.start = punched;
        }
        Ok(to)
    }

    /// Takes away what is behind the first `len` bytes: an append that failed.
    pub fn truncate(&mut self, id: BodyId, len: u64) {
        let (up, down) = (self.up(len), len / self.page * self.page);
        let Some(body) = self.bodies.get_mut(id) else { return };
        let up = up.max(body.prepared);
        if len >= body.len {
            return;
        }
        let before = body.charge();
        body.len = len;
        if let (Some(tail), Some(spill)) = (&mut body.tail, &mut self.spill) {
            let kept = len.saturating_sub(tail.from).div_ceil(CHUNK) as usize;
            tail.chunks.drain(kept.min(tail.chunks.len())..).for_each(|chunk| spill.give(chunk));
            if len > tail.from {
                return;
            }
        }
        body.tail = None;
        let freed = match &mut body.place {
            Place::Inline(bytes) => {
                bytes.truncate(len as usize);
                None
            }
            // Nobody reads past `len`. What is left of the last page stays until it is overwritten.
            Place::Memfd(_, pages) | Place::Arena(_, pages) => {
                let freed = up..pages.end;
                *pages = pages.start.min(down)..up;
                Some(freed)
            }
        };
        self.account.correct(before, body.charge());
        if let Some(freed) = freed.filter(|freed| !freed.is_empty())
            && let Ok(end) = self.end_in_memory(id, 0)
        {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let start = end.offset - len + freed.start;
            if let Err(error) = fallocate(end.file, hole, start, freed.end - freed.start) {
                log::warn!("freeing the end of an image failed: {error}");
            }
        }
    }

    /// The body will hardly grow any more: what was reserved for growth is given back.
    pub fn settle(&mut self, id: BodyId) {
        self.settle_prepared(id);
        let Some(body) = self.bodies.get_mut(id) else { return };
        let before = body.charge();
        if let Place::Inline(bytes) = &mut body.place {
            bytes.shrink_to_fit();
        }
        self.account.correct(before, body.charge());
    }

    /// How many bytes there are.
    pub fn len(&self, id: BodyId) -> u64 {
        self.bodies.get(id).map_or(0, |body| body.len)
    }

    /// How many bodies there are.
    pub fn count(&self) -> usize {
        self.bodies.len()
    }

    /// How much memory all bodies take, and what was written for more, in bytes, as the limit counts it.
    pub fn used(&self) -> u64 {
        self.account.used()
    }

    /// How much of it this body takes.
    pub fn memory(&self, id: BodyId) -> u64 {
        self.bodies.get(id).map_or(0, Body::charge)
    }

    /// How much more may be taken: what waits for images is to be had.
    pub fn left(&self) -> u64 {
        self.account.left().saturating_add(self.pool())
    }

    /// The limit at which bodies grow no more, in bytes; None: there is none, or they go on in the spill file.
    pub fn hard_limit(&self) -> Option<u64> {
        self.account.limit().filter(|_| self.spill.is_none())
    }

    /// From now on memory is taken beyond the limit, or no longer. Returns whether that has changed.
    pub fn set_yields(&mut self, yields: bool) -> bool {
        self.account.set_yields(yields)
    }

    fn up(&self, len: u64) -> u64 {
        len.div_ceil(self.page).saturating_mul(self.page)
    }
}

fn slot_start(slot: u32) -> u64 {
    u64::from(slot) * ARENA_SLOT
}

fn gone() -> io::Error {
    io::Error::other("the image's memory has been freed")
}

#[cfg(test)]
mod tests;
