//! How bodies grow: room is made first, within the limit or in the spill file, and then filled.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;

use super::place::write_all;
use super::{ARENA_SLOT, Bodies, BodyId, INLINE_MAX, Place, Tail, gone, slot_start};
use crate::store::spill::{self, CHUNK};

/// Where a body's end is, in a file.
#[derive(Debug)]
pub struct End<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where in it.
    pub offset: u64,
    /// For how many bytes there is room.
    pub room: u64,
}

impl Bodies {
    /// Adds `data` at the end. On error (no memory, no descriptor) nothing has changed.
    pub fn append(&mut self, id: BodyId, data: &[u8]) -> io::Result<()> {
        if self.append_inline(id, data)? {
            return Ok(());
        }
        let before = self.len(id);
        let mut rest = data;
        while !rest.is_empty() {
            match self.write_some(id, rest) {
                Ok(n) => rest = &rest[n..],
                Err(error) => {
                    self.truncate(id, before);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    // False: it can't stay inline.
    fn append_inline(&mut self, id: BodyId, data: &[u8]) -> io::Result<bool> {
        if self.bodies.get(id).is_some_and(|body| matches!(body.place, Place::Inline(_))) {
            self.make_room(data.len() as u64);
        }
        let Some(body) = self.bodies.get_mut(id) else { return Err(gone()) };
        let (Place::Inline(bytes), None) = (&mut body.place, &body.tail) else { return Ok(false) };
        let (len, had) = (bytes.len() + data.len(), bytes.capacity());
        if len > INLINE_MAX {
            return Ok(false);
        }
        if len > had {
            // As a vector grows by itself; close to the limit no more than is needed.
            let wanted = len.max((had * 2).min(INLINE_MAX));
            let (wanted, taken) = match self.account.take((wanted - had) as u64) {
                Ok(()) => (wanted, Ok(())),
                Err(_) => (len, self.account.take((len - had) as u64)),
            };
            match taken {
                Err(_) if self.spill.is_some() => return Ok(false),
                taken => taken?,
            }
            let reserved = bytes.try_reserve_exact(wanted - bytes.len());
            self.account.correct(wanted as u64, bytes.capacity() as u64);
            if reserved.is_err() {
                return Err(Errno::NOMEM.into());
            }
        }
        bytes.extend_from_slice(data);
        body.len = len as u64;
        Ok(true)
    }

    fn write_some(&mut self, id: BodyId, data: &[u8]) -> io::Result<usize> {
        let End { file, offset, room } = self.file_end(id, data.len() as u64)?;
        let room = usize::try_from(room).unwrap_or(usize::MAX).min(data.len());
        let written = write_all(file, &data[..room], offset);
        self.extend(id, if written.is_ok() { room as u64 } else { 0 });
        written.map(|()| room)
    }

    /// How many of `want` bytes could be appended now, one at least. For who takes bytes from where they can't be
    /// put back.
    pub fn room(&self, id: BodyId, want: u64) -> io::Result<u64> {
        let Some(body) = self.bodies.get(id) else { return Err(gone()) };
        if self.spill.is_some() {
            return Ok(want);
        }
        let left = self.left();
        let pages = left / self.page * self.page;
        let room = match &body.place {
            Place::Inline(bytes) if body.len < INLINE_MAX as u64 => {
                let inline = INLINE_MAX as u64 - body.len;
                inline.min((bytes.capacity() as u64 - body.len).saturating_add(left))
            }
            // All of it goes to a file first.
            Place::Inline(_) => pages.saturating_sub(self.up(body.len)),
            Place::Memfd(_, counted) | Place::Arena(_, counted) => {
                counted.end.saturating_sub(body.len).saturating_add(pages)
            }
        };
        match want.min(room) {
            0 if want > 0 => Err(self.account.full().into()),
            room => Ok(room),
        }
    }

    /// The file in which the body's end is, with room for up to `want` bytes, one at least: for bytes that are
    /// moved there by the kernel. [`Bodies::extend`] then makes those that have come, if any, a part of the body,
    /// and gives back the room for the others.
    pub fn file_end(&mut self, id: BodyId, want: u64) -> io::Result<End<'_>> {
        self.leave_inline(id)?;
        let page = self.page;
        if let Some(body) = self.bodies.get(id).filter(|body| body.tail.is_none())
            && let Place::Memfd(_, pages) | Place::Arena(_, pages) = &body.place
        {
            let missing = body.len.saturating_add(want).saturating_sub(pages.end);
            self.make_room(missing.div_ceil(page).saturating_mul(page));
        }
        let Some(body) = self.bodies.get_mut(id) else { return Err(gone()) };
        if body.tail.is_none() {
            let longest = if matches!(body.place, Place::Arena(..)) { ARENA_SLOT } else { i64::MAX as u64 };
            let (Place::Memfd(_, pages) | Place::Arena(_, pages)) = &mut body.place else {
                return Err(gone());
            };
            let want = want.min(longest - body.len);
            if want == 0 {
                return Err(Errno::FBIG.into());
            }
            let here = pages.end.saturating_sub(body.len);
            let room = want.min(here.saturating_add(self.account.left() / page * page));
            let end = (body.len + room).div_ceil(page) * page;
            if room > 0 {
                self.account.take(end.saturating_sub(pages.end))?;
                pages.end = pages.end.max(end);
                return self.end_in_memory(id, room);
            }
        }
        self.end_in_tail(id, want)
    }

    pub(super) fn end_in_memory(&self, id: BodyId, room: u64) -> io::Result<End<'_>> {
        let Some(body) = self.bodies.get(id) else { return Err(gone()) };
        match &body.place {
            Place::Inline(_) => Err(gone()),
            Place::Memfd(fd, _) => Ok(End { file: fd.as_fd(), offset: body.len, room }),
            Place::Arena(slot, _) => {
                let arena = self.arena.as_ref().ok_or_else(gone)?;
                Ok(End { file: arena.as_fd(), offset: slot_start(*slot) + body.len, room })
            }
        }
    }

    pub(super) fn end_in_tail(&mut self, id: BodyId, want: u64) -> io::Result<End<'_>> {
        let (Some(body), Some(spill)) = (self.bodies.get_mut(id), &mut self.spill) else {
            return Err(self.account.full().into());
        };
        let before = body.charge();
        if let Place::Inline(bytes) = &mut body.place {
            bytes.shrink_to_fit();
        }
        self.account.correct(before, body.charge());
        let from = body.len;
        let tail = body.tail.get_or_insert_with(|| Box::new(Tail { from, chunks: Vec::new() }));
        let at = body.len - tail.from;
        let chunk = match tail.chunks.get((at / CHUNK) as usize) {
            Some(chunk) => *chunk,
            None => {
                let chunk = spill.take()?;
                tail.chunks.push(chunk);
                chunk
            }
        };
        let offset = spill::start(chunk) + at % CHUNK;
        Ok(End { file: spill.fd(), offset, room: want.min(CHUNK - at % CHUNK) })
    }

    /// So many bytes have been written at [`Bodies::file_end`].
    pub fn extend(&mut self, id: BodyId, bytes: u64) {
        let page = self.page;
        let Some(body) = self.bodies.get_mut(id) else { return };
        body.len += bytes;
        if body.tail.is_none()
            && let Place::Memfd(_, pages) | Place::Arena(_, pages) = &mut body.place
        {
            let end = (body.len.div_ceil(page) * page).max(body.prepared);
            self.account.give(pages.end.saturating_sub(end));
            pages.end = end;
        }
    }
}
