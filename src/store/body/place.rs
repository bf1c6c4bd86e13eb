//! From inline to a file: a memfd of its own, the arena, or neither.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::io::{Errno, pwrite};

use super::{ARENA_SLOT, Bodies, BodyId, Pages, Place, gone, slot_start};

impl Bodies {
    // Moves an inline body to a file. With a spill file, one for which there is no room stays where it is, and goes
    // on there.
    pub(super) fn leave_inline(&mut self, id: BodyId) -> io::Result<()> {
        let Some(body) = self.bodies.get(id) else { return Err(gone()) };
        if !matches!((&body.place, &body.tail), (Place::Inline(_), None)) {
            return Ok(());
        }
        let counted = 0..self.up(body.len);
        // With a page for what comes: else it would take a descriptor for nothing.
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
        let own = if self.memfds < self.max_memfds { memfd().ok() } else { None };
        // With no descriptor left, although the budget says otherwise, the arena takes it as well.
        let place = match own {
            Some(fd) => Place::Memfd(fd, counted),
            None => Place::Arena(self.take_slot()?, counted),
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
    Ok(memfd_create("criu-relay", MemfdFlags::CLOEXEC)?)
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
