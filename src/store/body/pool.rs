//! Memory that is written before it is needed. The first write to a page of a memory file costs several times what
//! the next one does; so, before a process is frozen, files are filled with zeros, and its page images begin in them.
//!
//! The pool is a queue of files, one for each page image in the order in which they will come; one that is hardly
//! worth a file has a place in the queue all the same. What an image does not need of its file is cut off when it is
//! complete. All of it is counted from the moment at which it is written; and it is the first that is given up when
//! there is no room within the limit.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::ftruncate;

use super::place::write_all;
use super::{Bodies, Body, BodyId, INLINE_MAX, Place, gone};

/// How much is written in a turn, in bytes.
const TURN: u64 = 1 << 20;
/// How much is given back in a turn: that is less work.
const BACK: u64 = 16 << 20;
/// What an image has to take at least for a file of its own to be written beforehand, in bytes.
const LEAST: u64 = 4 * INLINE_MAX as u64;
/// An image is moved out of a file of which it takes less than one part in so many: another may need it.
const SMALL: u64 = 8;
/// If it has this many bytes at most: they are copied in one go.
const MOVE_MAX: u64 = 16 << 20;

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// The files that wait for their images.
#[derive(Debug, Default)]
pub(super) struct Pool {
    spare: VecDeque<Spare>,
    filling: bool,
    leaving: bool,
}

/// One of them.
#[derive(Debug, Default)]
struct Spare {
    file: Option<OwnedFd>,
    /// So many bytes of it are written, and counted.
    bytes: u64,
    /// And so many are to be.
    goal: u64,
}

/// How a turn of writing ended.
#[derive(Debug)]
pub enum Filling {
    /// There is nothing more to write.
    Done,
    /// There is.
    Again,
    /// No more can be had: the limit, the system's memory or the descriptors.
    Stopped(io::Error),
}

impl Bodies {
    /// From now on memory is wanted for page images of these sizes, in the order in which they will come. Files that are
    /// there already are used for the largest of them.
    pub fn prepare(&mut self, sizes: &[u64]) {
        let mut old: Vec<_> = std::mem::take(&mut self.pool.spare).into();
        old.retain(|spare| spare.file.is_some());
        old.sort_unstable_by_key(|spare| spare.bytes);
        let mut spare: VecDeque<_> = sizes.iter().map(|size| self.wanted(*size)).collect();
        let mut largest: Vec<_> = (0..spare.len()).collect();
        largest.sort_by_key(|at| std::cmp::Reverse(spare[*at].goal));
        for at in largest.into_iter().take_while(|at| spare[*at].goal > 0).collect::<Vec<_>>() {
            let Some(file) = old.pop() else { break };
            spare[at] = Spare { goal: spare[at].goal.max(file.bytes), ..file };
        }
        // Behind all others: they are given up first, and take what nobody has counted on.
        old.iter_mut().for_each(|file| file.goal = file.bytes);
        spare.extend(old);
        self.pool = Pool { spare, filling: true, leaving: false };
    }

    fn wanted(&self, size: u64) -> Spare {
        Spare { goal: if size < LEAST { 0 } else { self.up(size) }, ..Spare::default() }
    }

    /// Writes a turn's worth of what is wanted.
    pub fn fill_pool(&mut self) -> Filling {
        if !self.pool.filling {
            return Filling::Done;
        }
        let filled = self.fill_some();
        if !matches!(filled, Ok(true)) {
            self.stop_filling();
        }
        match filled {
            Ok(true) => Filling::Again,
            Ok(false) => Filling::Done,
            Err(error) => Filling::Stopped(error),
        }
    }

    fn fill_some(&mut self) -> io::Result<bool> {
        let Some(at) = self.pool.spare.iter().position(|spare| spare.bytes < spare.goal) else {
            return Ok(false);
        };
        if self.pool.spare[at].file.is_none() {
            let file = self.new_file()?;
            self.memfds += 1;
            self.pool.spare[at].file = Some(file);
        }
        let spare = &mut self.pool.spare[at];
        let count = TURN.min(spare.goal - spare.bytes);
        let Some(file) = &spare.file else { return Err(gone()) };
        let page = self.page;
        let count = count.min(self.account.left() / page * page);
        if count == 0 {
            return Err(self.account.full().into());
        }
        self.account.take(count)?;
        let pieces = (0..count).step_by(ZEROS.len());
        let written = pieces
            .map(|at| (at, (count - at).min(ZEROS.len() as u64)))
            .try_for_each(|(at, here)| write_all(file.as_fd(), &ZEROS[..here as usize], spare.bytes + at));
        if let Err(error) = written {
            self.account.give(count);
            // What has come of it.
            let _ = ftruncate(file, spare.bytes);
            return Err(error);
        }
        spare.bytes += count;
        Ok(true)
    }

    /// What is there is all that there will be.
    pub fn stop_filling(&mut self) {
        self.pool.filling = false;
    }

    /// Whether there is more to write.
    pub fn is_filling(&self) -> bool {
        self.pool.filling
    }

    /// How much memory waits for images, in bytes.
    pub fn pool(&self) -> u64 {
        self.pool.spare.iter().map(|spare| spare.bytes).sum()
    }

    /// No image will come for what is there. It is given back by [`Bodies::drain_pool`].
    pub fn give_pool_back(&mut self) {
        self.pool.filling = false;
        self.pool.leaving = true;
    }

    /// Gives back a turn's worth of it. Whether there is more.
    pub fn drain_pool(&mut self) -> bool {
        if self.pool.leaving {
            self.shrink_pool(BACK);
            self.pool.leaving = !self.pool.spare.is_empty();
        }
        self.pool.leaving
    }

    // Gives so much of it back, or all there is, from its end.
    fn shrink_pool(&mut self, mut bytes: u64) {
        while bytes > 0
            && let Some(mut spare) = self.pool.spare.pop_back()
        {
            let count = spare.bytes.min(bytes).next_multiple_of(self.page);
            let shrunk = match &spare.file {
                Some(file) if count < spare.bytes => ftruncate(file, spare.bytes - count).is_ok(),
                _ => false,
            };
            if shrunk {
                spare.bytes -= count;
                spare.goal = spare.bytes;
                self.account.give(count);
                self.pool.spare.push_back(spare);
                return;
            }
            bytes -= count.min(bytes);
            self.drop_spare(spare);
        }
    }

    fn drop_spare(&mut self, spare: Spare) {
        self.account.give(spare.bytes);
        self.memfds -= usize::from(spare.file.is_some());
    }

    /// Room for so many bytes is wanted: what waits for images goes first.
    pub(super) fn make_room(&mut self, bytes: u64) {
        if bytes == 0 || self.pool.spare.is_empty() {
            return;
        }
        let missing = bytes.saturating_sub(self.account.left().min(self.free_space()));
        if missing > 0 {
            self.pool.filling = false;
            // Not for every page: the call costs.
            self.shrink_pool(missing.max(TURN));
        }
    }

    /// An image is to have a file of its own: when there is no descriptor left for it, one that waits goes first.
    pub(super) fn spare_descriptor(&mut self) {
        while self.memfds >= self.max_memfds
            && let Some(spare) = self.pool.spare.pop_back()
        {
            self.pool.filling = false;
            self.drop_spare(spare);
        }
    }

    /// A page image begins: in the file that was written for it, if there is one. No more is written: a process is
    /// frozen.
    pub(super) fn take_prepared(&mut self, id: BodyId) {
        self.pool.filling = false;
        let Some(spare) = self.pool.spare.pop_front() else { return };
        match (spare, self.bodies.get_mut(id)) {
            (Spare { file: Some(file), bytes: bytes @ 1.., .. }, Some(body)) => {
                body.place = Place::Memfd(file, 0..bytes);
                body.prepared = bytes;
            }
            (spare, _) => self.drop_spare(spare),
        }
    }

    /// The image is complete: what it has not used of its file is given back, or all of the file if that is nearly all.
    pub(super) fn settle_prepared(&mut self, id: BodyId) {
        let Some(body) = self.bodies.get(id).filter(|body| body.prepared > 0) else { return };
        if body.may_leave_its_file() {
            match self.leave_file(id) {
                Ok(()) => return,
                Err(error) => log::debug!("an image stays in the file that was prepared for it: {error}"),
            }
        }
        let page = self.page;
        let Some(body) = self.bodies.get_mut(id) else { return };
        body.prepared = 0;
        let len = body.in_memory();
        if let Place::Memfd(file, pages) = &mut body.place {
            let end = len.div_ceil(page) * page;
            if end >= pages.end {
                return;
            }
            match ftruncate(&*file, len) {
                Ok(()) => {
                    self.account.give(pages.end - end);
                    pages.end = end;
                }
                Err(error) => log::warn!("the end of an image's file can't be given back: {error}"),
            }
        }
    }

    // Moves the bytes to a place of their own, and gives the file back to the pool.
    fn leave_file(&mut self, id: BodyId) -> io::Result<()> {
        let bytes = self.range(id, 0, self.len(id))?;
        let fresh = self.create();
        let moved = self.append(fresh, &bytes);
        let to = self.bodies.remove(fresh).ok_or_else(gone)?;
        if let Err(error) = moved {
            self.drop_body(to);
            return Err(error);
        }
        let Some(body) = self.bodies.get_mut(id) else { return Err(gone()) };
        body.prepared = 0;
        body.tail = to.tail;
        if let Place::Memfd(file, pages) = std::mem::replace(&mut body.place, to.place) {
            let spare = Spare { file: Some(file), bytes: pages.end, goal: pages.end };
            let next = self.pool.spare.front().map_or(0, |next| next.bytes);
            // The next image has perhaps a file of its own that suits it better.
            match spare.bytes > next {
                true => self.pool.spare.push_front(spare),
                false => self.pool.spare.push_back(spare),
            }
        }
        Ok(())
    }
}

impl Body {
    // Nobody has ever read it: what lies in a pipe or a socket may still be the file's own pages.
    fn may_leave_its_file(&self) -> bool {
        let whole = matches!(&self.place, Place::Memfd(_, pages) if pages.start == 0);
        let untouched = whole && !self.shared && self.tail.is_none();
        untouched && self.len <= MOVE_MAX && self.len <= self.prepared / SMALL
    }
}

#[cfg(test)]
mod tests;
