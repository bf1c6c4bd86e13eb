//! Bodies: the bytes of images.
//!
//! A body only ever grows at its end; a reader that knows how long the body was when it began is never
//! disturbed. Who holds a body says so ([`Bodies::hold`], [`Bodies::release`]); it is freed with the last.
//!
//! Small bodies lie inline on the heap. Larger ones are memfds, from which sendfile(2) serves without a
//! copy. Each memfd costs a descriptor, so when a fixed share of RLIMIT_NOFILE is used up, further large
//! bodies lie side by side in one shared memfd, the arena. It is sparse: every body has [`ARENA_SLOT`]
//! bytes of file offsets to itself, and only what is written takes memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::io::{Errno, pread, pwrite};

use crate::table::{Id, Table};

/// Bodies up to this many bytes stay inline. Most of CRIU's images are a few hundred bytes; a memfd costs
/// a descriptor, an inode (about 1 KiB of kernel memory) and whole pages.
pub const INLINE_MAX: usize = 16 * 1024;

/// The offsets that one body has in the arena: the longest body there, in bytes (1 TiB). The file may
/// have 2^63 bytes, so that 8 million bodies find a place.
pub const ARENA_SLOT: u64 = 1 << 40;

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
}

#[derive(Debug)]
struct Body {
    holders: u32,
    len: u64,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Inline(Vec<u8>),
    Memfd(OwnedFd),
    Arena(u32),
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
        }
    }

    /// A new, empty body with one holder.
    pub fn create(&mut self) -> BodyId {
        self.bodies.insert(Body { holders: 1, len: 0, place: Place::Inline(Vec::new()) })
    }

    /// One holder more. A body that is gone stays so.
    pub fn hold(&mut self, id: BodyId) {
        if let Some(body) = self.bodies.get_mut(id) {
            body.holders += 1;
        }
    }

    /// One holder less; the last frees the body.
    pub fn release(&mut self, id: BodyId) {
        let Some(body) = self.bodies.get_mut(id) else { return };
        body.holders -= 1;
        if body.holders > 0 {
            return;
        }
        match self.bodies.remove(id).map(|body| body.place) {
            Some(Place::Memfd(_)) => self.memfds -= 1,
            Some(Place::Arena(slot)) => self.free_slot(slot),
            Some(Place::Inline(_)) | None => {}
        }
    }

    /// Adds `data` at the end. On error (no memory, no descriptor) nothing has changed.
    pub fn append(&mut self, id: BodyId, data: &[u8]) -> io::Result<()> {
        let Some(body) = self.bodies.get(id) else { return Err(gone()) };
        if let Place::Inline(bytes) = &body.place
            && bytes.len() + data.len() > INLINE_MAX
        {
            self.spill(id)?;
        }
        let arena = self.arena.as_ref();
        let Some(body) = self.bodies.get_mut(id) else { return Err(gone()) };
        let end = body.len + data.len() as u64;
        match &mut body.place {
            Place::Inline(bytes) => bytes.extend_from_slice(data),
            Place::Memfd(fd) => write_all(fd.as_fd(), data, body.len)?,
            Place::Arena(slot) => {
                if end > ARENA_SLOT {
                    return Err(Errno::FBIG.into());
                }
                let arena = arena.ok_or_else(gone)?;
                write_all(arena.as_fd(), data, slot_start(*slot) + body.len)?;
            }
        }
        body.len = end;
        Ok(())
    }

    /// The file in which the body's end is, and where in it: for bytes that are moved there by the kernel.
    /// [`Bodies::extend`] then makes them a part of the body.
    pub fn file_end(&mut self, id: BodyId) -> io::Result<(BorrowedFd<'_>, u64)> {
        if matches!(self.bodies.get(id), Some(Body { place: Place::Inline(_), .. })) {
            self.spill(id)?;
        }
        let Some(body) = self.bodies.get(id) else { return Err(gone()) };
        match &body.place {
            Place::Inline(_) => Err(gone()),
            Place::Memfd(fd) => Ok((fd.as_fd(), body.len)),
            Place::Arena(slot) => {
                let arena = self.arena.as_ref().ok_or_else(gone)?;
                Ok((arena.as_fd(), slot_start(*slot) + body.len))
            }
        }
    }

    /// How many bytes may be added at the body's end.
    pub fn room(&self, id: BodyId) -> u64 {
        match self.bodies.get(id) {
            Some(Body { place: Place::Arena(_), len, .. }) => ARENA_SLOT.saturating_sub(*len),
            Some(body) => (i64::MAX as u64).saturating_sub(body.len),
            None => 0,
        }
    }

    /// So many bytes have been written at [`Bodies::file_end`].
    pub fn extend(&mut self, id: BodyId, bytes: u64) {
        if let Some(body) = self.bodies.get_mut(id) {
            body.len += bytes;
        }
    }

    /// Gives the memory of the whole pages between `from` and `to` back, and returns where it stopped. What was
    /// there reads as zeros. Of an inline body nothing is given back.
    pub fn punch(&self, id: BodyId, from: u64, to: u64) -> io::Result<u64> {
        let page = rustix::param::page_size() as u64;
        let to = to / page * page;
        if to <= from {
            return Ok(from);
        }
        if let Some(Content::File(file, start)) = self.content(id) {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, hole, start + from, to - from)?;
        }
        Ok(to)
    }

    /// Takes away what is behind the first `len` bytes: an append that failed.
    pub fn truncate(&mut self, id: BodyId, len: u64) {
        let Some(body) = self.bodies.get_mut(id) else { return };
        if len < body.len {
            if let Place::Inline(bytes) = &mut body.place {
                bytes.truncate(len as usize);
            }
            // In a file the bytes stay until they are overwritten; nobody reads past `len`.
            body.len = len;
        }
    }

    /// The body will hardly grow any more: what was reserved for growth is given back.
    pub fn settle(&mut self, id: BodyId) {
        if let Some(Body { place: Place::Inline(bytes), .. }) = self.bodies.get_mut(id) {
            bytes.shrink_to_fit();
        }
    }

    /// How many bytes there are.
    pub fn len(&self, id: BodyId) -> u64 {
        self.bodies.get(id).map_or(0, |body| body.len)
    }

    /// Where the bytes are; None when the body is gone.
    pub fn content(&self, id: BodyId) -> Option<Content<'_>> {
        Some(match &self.bodies.get(id)?.place {
            Place::Inline(bytes) => Content::Inline(bytes),
            Place::Memfd(fd) => Content::File(fd.as_fd(), 0),
            Place::Arena(slot) => Content::File(self.arena.as_ref()?.as_fd(), slot_start(*slot)),
        })
    }

    /// A copy of the bytes `from..to`. Only for what is known to be small.
    pub fn range(&self, id: BodyId, from: u64, to: u64) -> io::Result<Vec<u8>> {
        if from > to || to > self.len(id) {
            return Err(gone());
        }
        let (file, start) = match self.content(id).ok_or_else(gone)? {
            Content::Inline(bytes) => {
                return Ok(bytes.get(from as usize..to as usize).ok_or_else(gone)?.to_vec());
            }
            Content::File(file, start) => (file, start + from),
        };
        let mut bytes = vec![0; (to - from) as usize];
        let mut done = 0;
        while done < bytes.len() {
            match pread(file, &mut bytes[done..], start + done as u64)? {
                0 => return Err(gone()),
                n => done += n,
            }
        }
        Ok(bytes)
    }

    /// How many bodies there are.
    pub fn count(&self) -> usize {
        self.bodies.len()
    }

    // Moves an inline body to a file.
    fn spill(&mut self, id: BodyId) -> io::Result<()> {
        let own = if self.memfds < self.max_memfds { memfd().ok() } else { None };
        // With no descriptor left, although the budget says otherwise, the arena takes it as well.
        let place = match own {
            Some(fd) => Place::Memfd(fd),
            None => Place::Arena(self.take_slot()?),
        };
        let Some(body) = self.bodies.get_mut(id) else { return Err(gone()) };
        let (file, start) = match &place {
            Place::Memfd(fd) => (fd.as_fd(), 0),
            Place::Arena(slot) => (self.arena.as_ref().ok_or_else(gone)?.as_fd(), slot_start(*slot)),
            Place::Inline(_) => return Err(gone()),
        };
        let written = match &body.place {
            Place::Inline(bytes) if bytes.is_empty() => Ok(()),
            Place::Inline(bytes) => write_all(file, bytes, start),
            Place::Memfd(_) | Place::Arena(_) => Ok(()),
        };
        if let Err(error) = written {
            if let Place::Arena(slot) = place {
                self.free_slot(slot);
            }
            return Err(error);
        }
        self.memfds += usize::from(matches!(place, Place::Memfd(_)));
        body.place = place;
        Ok(())
    }

    fn take_slot(&mut self) -> io::Result<u32> {
        if self.arena.is_none() {
            let arena = memfd()?;
            // As long as can be, once: the writes below never have to extend it.
            ftruncate(&arena, i64::MAX as u64)?;
            self.arena = Some(arena);
        }
        if let Some(slot) = self.free_slots.pop() {
            return Ok(slot);
        }
        if u64::from(self.slots) + 1 >= (1 << 63) / ARENA_SLOT {
            return Err(Errno::NOSPC.into());
        }
        self.slots += 1;
        Ok(self.slots - 1)
    }

    fn free_slot(&mut self, slot: u32) {
        if let Some(arena) = &self.arena {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // The whole slot: what a failed append left behind the body's end goes too.
            if let Err(error) = fallocate(arena, hole, slot_start(slot), ARENA_SLOT) {
                // The memory comes back when the slot is used again.
                log::warn!("freeing a part of the arena failed: {error}");
            }
        }
        self.free_slots.push(slot);
    }
}

fn slot_start(slot: u32) -> u64 {
    u64::from(slot) * ARENA_SLOT
}

fn memfd() -> io::Result<OwnedFd> {
    Ok(memfd_create("criu-relay", MemfdFlags::CLOEXEC)?)
}

fn write_all(file: BorrowedFd<'_>, mut data: &[u8], mut offset: u64) -> io::Result<()> {
    while !data.is_empty() {
        match pwrite(file, data, offset) {
            Ok(0) => return Err(Errno::NOSPC.into()),
            Ok(n) => {
                data = &data[n..];
                offset += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn gone() -> io::Error {
    io::Error::other("the image's memory has been freed")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
    }

    fn place(bodies: &Bodies, id: BodyId) -> &'static str {
        match bodies.bodies.get(id).unwrap().place {
            Place::Inline(_) => "inline",
            Place::Memfd(_) => "memfd",
            Place::Arena(_) => "arena",
        }
    }

    #[test]
    fn grows_from_inline_to_a_file() {
        let mut bodies = Bodies::new(10);
        let id = bodies.create();
        let bytes = pattern(3 * INLINE_MAX, 1);
        for piece in bytes.chunks(1000) {
            bodies.append(id, piece).unwrap();
            let expected = if bodies.len(id) as usize <= INLINE_MAX { "inline" } else { "memfd" };
            assert_eq!(place(&bodies, id), expected);
        }
        assert_eq!(bodies.range(id, 0, bytes.len() as u64).unwrap(), bytes);
    }

    #[test]
    fn beyond_the_budget_bodies_share_the_arena() {
        let mut bodies = Bodies::new(1);
        let ids: Vec<_> = (0..4).map(|_| bodies.create()).collect();
        let contents: Vec<_> = (0..4).map(|i| pattern(INLINE_MAX + 5000 * i + 1, i as u8)).collect();
        // Interleaved, so that each grows beside the others.
        for at in (0..contents[3].len()).step_by(4096) {
            for (id, content) in ids.iter().zip(&contents) {
                if at < content.len() {
                    bodies.append(*id, &content[at..content.len().min(at + 4096)]).unwrap();
                }
            }
        }
        let places: Vec<_> = ids.iter().map(|id| place(&bodies, *id)).collect();
        assert_eq!(places, ["memfd", "arena", "arena", "arena"]);
        for (id, content) in ids.iter().zip(&contents) {
            assert_eq!(&bodies.range(*id, 0, content.len() as u64).unwrap(), content);
        }
        // Freed places are used again, and the memfd's budget too.
        bodies.release(ids[0]);
        bodies.release(ids[2]);
        let (a, b) = (bodies.create(), bodies.create());
        bodies.append(a, &contents[3]).unwrap();
        bodies.append(b, &contents[3]).unwrap();
        assert_eq!((place(&bodies, a), place(&bodies, b)), ("memfd", "arena"));
        assert_eq!(bodies.slots, 3);
        assert_eq!(bodies.range(b, 0, contents[3].len() as u64).unwrap(), contents[3]);
        assert_eq!(bodies.range(ids[3], 0, contents[3].len() as u64).unwrap(), contents[3]);
    }

    #[test]
    fn freed_arena_space_goes_back_to_the_system() {
        let mut bodies = Bodies::new(0);
        let id = bodies.create();
        bodies.append(id, &pattern(1 << 20, 0)).unwrap();
        let blocks = |bodies: &Bodies| rustix::fs::fstat(bodies.arena.as_ref().unwrap()).unwrap().st_blocks;
        assert!(blocks(&bodies) >= 2048);
        bodies.release(id);
        assert_eq!(blocks(&bodies), 0);
    }

    #[test]
    fn a_body_lives_as_long_as_a_holder() {
        let mut bodies = Bodies::new(1);
        let id = bodies.create();
        bodies.append(id, b"abc").unwrap();
        bodies.hold(id);
        bodies.release(id);
        assert_eq!(bodies.len(id), 3);
        bodies.release(id);
        assert!(bodies.content(id).is_none());
        assert!(bodies.append(id, b"x").is_err());
        assert_eq!(bodies.count(), 0);
    }

    #[test]
    fn a_failed_append_is_taken_back() {
        for len in [10, INLINE_MAX * 2] {
            let mut bodies = Bodies::new(1);
            let id = bodies.create();
            let bytes = pattern(len, 3);
            bodies.append(id, &bytes).unwrap();
            bodies.append(id, b"half").unwrap();
            bodies.truncate(id, len as u64);
            bodies.append(id, b"new").unwrap();
            let expected: Vec<u8> = bytes.iter().copied().chain(*b"new").collect();
            assert_eq!(bodies.range(id, 0, (len + 3) as u64).unwrap(), expected);
        }
    }
}
