//! From inline to a file: a memfd of its own, the arena, or neither.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, MemfdFlags, Mode, OFlags, fallocate, fstat, fstatvfs, ftruncate, memfd_create, openat,
};
use rustix::io::{Errno, pwrite};

use super::{ARENA_SLOT, Bodies, Body, BodyId, Pages, Place, gone, slot_start};

/// What every memfd of ours is called, for who looks at it in /proc.
pub const MEMFD: &str = "criu-relay";

/// What the files of large bodies are.
#[derive(Debug, Default)]
pub enum Files {
    /// Memfds; in the arena when there are no descriptors for more.
    #[default]
    Shared,
    /// Memfds, one for each body, or an error.
    Own,
    /// Files without a name in this directory, one for each body, or an error.
    Nameless(OwnedFd),
}

impl Bodies {
    /// The same with other files.
    pub fn with_files(self, files: Files) -> Self {
        Self { files, ..self }
    }

    /// The file of a body, exactly as long as the body is; one that lies inline gets one. For whoever opens it as a file:
    /// not where bodies share one.
    pub fn file_of(&mut self, id: BodyId) -> io::Result<BorrowedFd<'_>> {
        self.leave_inline(id)?;
        match self.bodies.get(id) {
            Some(Body { place: Place::Memfd(fd, _), tail: None, len, .. }) => {
                // What has failed to grow may have left a longer one.
                ftruncate(fd, *len)?;
                Ok(fd.as_fd())
            }
            _ => Err(gone()),
        }
    }

    /// The file of a body that has one of its own.
    pub fn own_file(&self, id: BodyId) -> Option<BorrowedFd<'_>> {
        match &self.bodies.get(id)?.place {
            Place::Memfd(fd, _) => Some(fd.as_fd()),
            Place::Inline(_) | Place::Arena(..) => None,
        }
    }

    /// A body that is this file, with one holder. It is there: it is counted, also beyond the limit.
    pub fn adopt(&mut self, fd: OwnedFd) -> io::Result<BodyId> {
        let len = u64::try_from(fstat(&fd)?.st_size).unwrap_or(0);
        let place = Place::Memfd(fd, 0..self.up(len));
        let body = Body { holders: 1, beside: 0, len, place, tail: None, prepared: 0, shared: false };
        self.account.correct(0, body.charge());
        self.memfds += 1;
        Ok(self.bodies.insert(body))
    }

    // Moves an inline body to a file. With a spill file, one for which there is no room stays where it is, and goes
    // on there.
    pub(super) fn leave_inline(&mut self, id: BodyId) -> io::Result<()> {
        let Some(body) = self.bodies.get(id) else { return Err(gone()) };
        if !matches!((&body.place, &body.tail), (Place::Inline(_), None)) {
            return Ok(());
        }
        let counted = 0..self.up(body.len);
        // With a page for what comes: else it would take a descriptor for nothing.
        self.make_room(counted.end + self.page);
        let moved = if self.account.left() < counted.end + self.page {
            Err(self.account.full().into())
        } else {
            self.move_to_file(id, counted)
        };
        match moved {
            Err(_) if self.spill.is_some() => self.end_in_tail(id, 0).map(|_| ()),
            moved => moved,
        }
    }

    fn move_to_file(&mut self, id: BodyId, counted: Pages) -> io::Result<()> {
        self.spare_descriptor();
        // With no descriptor left, although the budget says otherwise, the arena takes it as well.
        let place = match self.new_file() {
            Ok(fd) => Place::Memfd(fd, counted),
            Err(_) if matches!(self.files, Files::Shared) => Place::Arena(self.take_slot()?, counted),
            Err(error) => return Err(error),
        };
        let Some(body) = self.bodies.get_mut(id) else { return Err(gone()) };
        let (file, start) = match &place {
            Place::Memfd(fd, _) => (fd.as_fd(), 0),
            Place::Arena(slot, _) => (self.arena.as_ref().ok_or_else(gone)?.as_fd(), slot_start(*slot)),
            Place::Inline(_) => return Err(gone()),
        };
        let written = match &body.place {
            Place::Inline(bytes) => write_all(file, bytes, start),
            Place::Memfd(..) | Place::Arena(..) => Ok(()),
        };
        if let Err(error) = written {
            if let Place::Arena(slot, _) = place {
                self.free_slot(slot);
            }
            return Err(error);
        }
        self.memfds += usize::from(matches!(place, Place::Memfd(..)));
        let before = body.charge();
        body.place = place;
        self.account.correct(before, body.charge());
        Ok(())
    }

    pub(super) fn new_file(&self) -> io::Result<OwnedFd> {
        if self.memfds >= self.max_memfds {
            return Err(io::Error::other(format!(
                "{} images have a file of their own, as many as this process may have descriptors for (see ulimit -n)",
                self.memfds
            )));
        }
        match &self.files {
            Files::Shared | Files::Own => memfd(),
            Files::Nameless(dir) => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                Ok(openat(dir, ".", flags, Mode::RUSR | Mode::WUSR)?)
            }
        }
    }

    // How much fits in the file system where the files are; memfds have none that is full before memory is.
    pub(super) fn free_space(&self) -> u64 {
        match &self.files {
            Files::Shared | Files::Own => u64::MAX,
            Files::Nameless(dir) => match fstatvfs(dir) {
                // A tmpfs without a size has no blocks.
                Ok(system) if system.f_blocks > 0 => system.f_bavail.saturating_mul(system.f_frsize),
                _ => u64::MAX,
            },
        }
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

    pub(super) fn free_slot(&mut self, slot: u32) {
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

fn memfd() -> io::Result<OwnedFd> {
    Ok(memfd_create(MEMFD, MemfdFlags::CLOEXEC)?)
}

pub(super) fn write_all(file: BorrowedFd<'_>, mut data: &[u8], mut offset: u64) -> io::Result<()> {
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

#[cfg(test)]
mod tests;
