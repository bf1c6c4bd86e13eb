//! Where a body's bytes are, and what is said of one that can't grow.

use std::io;
use std::os::fd::AsFd;

use rustix::io::{Errno, pread};

use super::{Bodies, BodyId, Content, Files, Place, gone, slot_start};
use crate::store::limit;
use crate::store::spill::{self, CHUNK};
use crate::wire::Key;

impl Bodies {
    /// Where the bytes from `at` on are, and how many of them are in that place; None when the body is gone.
    pub fn content_at(&self, id: BodyId, at: u64) -> Option<(Content<'_>, u64)> {
        let body = self.bodies.get(id)?;
        let end = body.in_memory();
        if let Some(tail) = body.tail.as_ref().filter(|tail| at >= tail.from) {
            let at = at - tail.from;
            let chunk = tail.chunks.get((at / CHUNK) as usize).copied();
            let here = (CHUNK - at % CHUNK).min((body.len - tail.from).saturating_sub(at));
            return match chunk {
                Some(chunk) => {
                    Some((Content::File(self.spill.as_ref()?.fd(), spill::start(chunk) + at % CHUNK), here))
                }
                None => Some((Content::Inline(&[]), 0)),
            };
        }
        let here = end.saturating_sub(at);
        let content = match &body.place {
            Place::Inline(bytes) => Content::Inline(bytes.get(at as usize..).unwrap_or_default()),
            Place::Memfd(fd, _) => Content::File(fd.as_fd(), at),
            Place::Arena(slot, _) => Content::File(self.arena.as_ref()?.as_fd(), slot_start(*slot) + at),
        };
        Some((content, here))
    }

    /// A copy of the bytes `from..to`. Only for what is known to be small.
    pub fn range(&self, id: BodyId, from: u64, to: u64) -> io::Result<Vec<u8>> {
        if from > to || self.bodies.get(id).is_none_or(|body| to > body.len) {
            return Err(gone());
        }
        let mut bytes = vec![0; (to - from) as usize];
        let mut done = 0;
        while done < bytes.len() {
            let (content, here) = self.content_at(id, from + done as u64).ok_or_else(gone)?;
            let wanted = usize::try_from(here).unwrap_or(usize::MAX).min(bytes.len() - done);
            let piece = &mut bytes[done..done + wanted];
            let n = match content {
                Content::Inline(here) => {
                    piece.copy_from_slice(here.get(..wanted).ok_or_else(gone)?);
                    wanted
                }
                Content::File(file, offset) => pread(file, piece, offset)?,
            };
            if n == 0 {
                return Err(gone());
            }
            done += n;
        }
        Ok(bytes)
    }

    /// Why an image can't grow, as a sentence.
    pub fn refusal(&self, key: &Key, id: BodyId, error: &io::Error) -> String {
        // An append that failed has been taken back; but with a spill file it is there that space runs out.
        let no_space = matches!(Errno::from_io_error(error), Some(Errno::NOSPC | Errno::DQUOT));
        let spilled = no_space || self.bodies.get(id).is_some_and(|body| body.tail.is_some());
        let at = self.len(id);
        match &self.spill {
            Some(spill) if spilled => format!(
                "{key} can't grow past byte {at} in the spill directory {}: {error}",
                spill.dir().display()
            ),
            _ if no_space && matches!(self.files, Files::Nameless(_)) => format!(
                "{key} can't grow past byte {at}: the file system of the view (--view) is full: {error}; give it more \
                 room (mount -o remount,size=SIZE), or choose another directory"
            ),
            _ if limit::is_full(error) => format!("{key} can't grow past byte {at}: {error}"),
            _ => format!("{key} can't grow past byte {at}, no memory can be had for it: {error}"),
        }
    }

    /// What an image is told that can't grow because of the limit.
    pub fn full(&self, key: &Key, id: BodyId) -> String {
        self.refusal(key, id, &self.account.full().into())
    }
}
