//! The cache and those who read: what they are told, and when.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use rustix::io::{Errno, ioctl_fionread};

use super::{Cache, Conn, Found};
use crate::client::remote::{Step, closed_early};
use crate::client::stream::{PipeOut, Served};
use crate::pump;
use crate::pump::{Flow, Outflow};
use crate::store::{Bodies, BodyId, Catalog, catalog};
use crate::table::Id;
use crate::wire::Key;
use crate::wire::criu::Request;

impl Cache {
    pub(super) fn find(&self, images: Option<&Rc<Catalog>>, key: &Key) -> Found {
        if self.failing.is_some() {
            return Found::Broken;
        }
        let needed = key.snapshot_id.is_empty() && key.name[..] == *catalog::INVENTORY;
        if let Some(images) = images {
            match images.get(key) {
                Some(image) => return Found::Here(image.body, Some(image.len)),
                None if needed => return Found::Broken,
                None if images.has_snapshot(&key.snapshot_id) || !self.session.stays() => {
                    return Found::Never;
                }
                // With --keep: it is of a dump that may yet come.
                None => {}
            }
        }
        if catalog::waits_for_the_end(key) {
            return Found::NotYet;
        }
        // What is stored and not released has everything but the image with which a restore begins.
        let complete = self.stored.as_ref().and_then(|images| images.get(key));
        match complete.or_else(|| self.incoming.get(key)) {
            Some(image) => Found::Here(image.body, Some(image.len)),
            None => self.arriving.get(key).map_or(Found::NotYet, |body| Found::Here(*body, None)),
        }
    }

    // With --consume an image is there once: its memory goes while it is read. `begins`: it is read from now on. An
    // error is why not again.
    fn opens(&mut self, key: &Key, body: BodyId, begins: bool) -> Result<(), String> {
        if !self.consume || !catalog::is_pages(key) {
            return Ok(());
        }
        if self.consumed.contains(&body) || (begins && !self.consumed.insert(body)) {
            return Err(format!(
                "was refused: {key} has been read before, and with --consume it is not here any more: this \
                 restore fails, and the dump can't be restored from here again"
            ));
        }
        Ok(())
    }

    // Whether a restore has succeeded with these images, or another one is at it.
    fn is_taken(&self, id: Id, images: &Rc<Catalog>) -> bool {
        self.session.is_restored() || self.is_restored_from(Some(id), images)
    }

    // Whether a restore is at these images, other than this one.
    pub(super) fn is_restored_from(&self, than: Option<Id>, images: &Rc<Catalog>) -> bool {
        let is_at_it = |(other, conn): (Id, &Conn)| match conn {
            Conn::Restore(restore) if than != Some(other) => {
                restore.images.as_ref().is_some_and(|i| Rc::ptr_eq(i, images))
            }
            Conn::Criu(criu) => criu.is_at(images),
            _ => false,
        };
        self.is_copied(images) || self.conns.iter().any(is_at_it)
    }

    // What was consumed of images that are gone.
    pub(super) fn forget_consumed(&mut self) {
        let left: HashSet<_> = [&self.last, &self.stored]
            .into_iter()
            .flatten()
            .flat_map(|images| images.in_order())
            .map(|(_, image)| image.body)
            .collect();
        self.consumed.retain(|body| left.contains(body));
    }

    // Restores that have read something of a dump before it was complete, which it never will be.
    pub(super) fn close_early_restores(&mut self) {
        let early = self.conns.iter().filter(|(_, conn)| match conn {
            Conn::Restore(restore) => restore.images.is_none() && !restore.asked.is_empty(),
            _ => false,
        });
        for id in early.map(|(id, _)| id).collect::<Vec<_>>() {
            self.close(id, Some("had to be closed: the dump that it has read from has failed".into()));
        }
    }

    // Who reads an image that is still arriving follows it to its end.
    fn follow(&mut self, id: Id, body: BodyId, end: Option<u64>) {
        if end.is_none() {
            self.followers.entry(body).or_default().push(id);
        }
    }

    // The image that this one follows is complete.
    pub(super) fn complete_for(&mut self, id: Id, body: BodyId, end: u64) {
        let outflow = match self.conns.get_mut(id) {
            Some(Conn::Remote(client)) => client.reading_mut(),
            Some(Conn::Restore(restore)) => restore.serve.promised_mut(),
            Some(Conn::Pipe(pipe)) => Some(&mut pipe.outflow),
            _ => None,
        };
        if let Some(outflow) = outflow.filter(|outflow| outflow.body == body) {
            outflow.end = Some(end);
            self.conns.again(id);
        }
    }

    // The image will never be complete. CRIU's connection goes before the pipe: what came through the pipe is
    // not to be taken for the whole image.
    pub(super) fn abort_followers(&mut self, body: BodyId) {
        let mut followers = self.followers.remove(&body).unwrap_or_default();
        if followers.is_empty() {
            return;
        }
        self.close_early_restores();
        let all = std::mem::take(&mut followers);
        for id in all {
            self.close(
                id,
                Some("had to be closed: the image that it was reading will never be complete".into()),
            );
        }
    }

    // The dump failed: an error, not the word that the image does not exist.
    pub(super) fn fail(&mut self, id: Id) {
        let answered = match self.conns.get_mut(id) {
            Some(Conn::Remote(client)) => client.answer(Errno::IO.raw_os_error() as u32),
            _ => Ok(()),
        };
        let why = answered.err().unwrap_or_else(|| "had to be closed: the dump failed".into());
        self.close(id, Some(why));
    }

    // Answers a reader if that can be done now, else lets it wait.
    pub(super) fn answer(&mut self, id: Id) {
        match self.conns.get(id) {
            Some(Conn::Remote(_)) => self.answer_remote(id),
            Some(Conn::Restore(_)) => self.answer_restore(id),
            _ => {}
        }
    }

    pub(super) fn answer_remote(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get(id) else { return };
        let Some(Request::Read(key)) = client.request().cloned() else { return };
        let found = self.find(self.last.as_ref(), &key);
        let failure = match found {
            Found::Here(body, end) => {
                if let Err(why) = self.opens(&key, body, true) {
                    return self.close(id, Some(why));
                }
                self.bodies.hold(body);
                self.follow(id, body, end);
                // With it a restore begins: what another, that failed, had asked for does not count.
                if key.name[..] == *catalog::INVENTORY {
                    self.asked.clear();
                }
                self.asked.insert(key.clone());
                let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
                match client.start_read(Outflow::new(key, body, end)) {
                    Ok(()) => return self.step_remote(id),
                    Err(why) => Some(why),
                }
            }
            Found::NotYet => {
                self.waits.push(&key, id);
                return self.settle(id);
            }
            Found::Never => {
                log::debug!("{key}: asked for, does not exist");
                let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
                client.answer(Errno::NOENT.raw_os_error() as u32).err()
            }
            Found::Broken => return self.fail(id),
        };
        self.close(id, failure);
    }

    pub(super) fn run_request(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        match client.request().cloned() {
            Some(Request::Read(_)) => self.answer_remote(id),
            Some(Request::Write(..)) => {
                let why = "was refused: images are written at img-proxy.sock of criu-relay proxy";
                self.close(id, Some(why.into()));
            }
            Some(Request::Finish { answer }) => {
                let failure = if answer { client.answer(0).err() } else { None };
                self.close(id, failure);
                let asked = std::mem::take(&mut self.asked);
                match self.last.clone() {
                    Some(images) => {
                        self.restore_ended(&images, &asked);
                        self.unpin(images);
                    }
                    None => log::warn!("a restore ended before there was a complete dump"),
                }
            }
            None => {}
        }
    }

    pub(super) fn step_remote(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        let order = client.order();
        let step = client.step(&mut self.bodies, &mut self.block, &mut self.conduit, false);
        if self.consume
            && let Some((pipe, outflow)) = client.piping_mut()
            && catalog::is_pages(&outflow.key)
        {
            free_read(&mut self.bodies, outflow, pipe);
        }
        match step {
            // Nothing is written here.
            Ok(Step::Wait | Step::Full) => self.settle(id),
            Ok(Step::Again) => {
                self.conns.again(id);
                self.settle(id);
            }
            // What is read here has nothing before it that it could overtake.
            Ok(Step::Requested) if client.reads() => self.answer_remote(id),
            Ok(Step::Requested) => {
                self.fence.push(order, id);
                self.settle(id);
            }
            Ok(Step::Written | Step::Over) => self.close(id, None),
            Err(why) => self.close(id, Some(why)),
        }
    }

    pub(super) fn step_restore(&mut self, id: Id) {
        let Some(Conn::Restore(restore)) = self.conns.get_mut(id) else { return };
        match restore.serve.step(&mut self.block) {
            Ok(Served::Wait) => self.settle(id),
            Ok(Served::Request(_)) => self.answer_restore(id),
            Ok(Served::Pipe(pipe)) => {
                // A pipe that its caller can't poll is closed, which CRIU sees as a short image.
                let (body, end) = (pipe.outflow.body, pipe.outflow.end);
                if let Err(why) = self.opens(&pipe.outflow.key, body, true) {
                    self.bodies.release(body);
                    return self.close(id, Some(why));
                }
                match self.conns.insert(Conn::Pipe(pipe)) {
                    Ok(pipe) => self.follow(pipe, body, end),
                    Err(error) => {
                        self.bodies.release(body);
                        return self
                            .close(id, Some(format!("has sent a pipe that can't be polled: {error}")));
                    }
                }
                self.conns.again(id);
                self.settle(id);
            }
            Ok(Served::End) => self.close(id, None),
            Err(why) => self.close(id, Some(why)),
        }
    }

    pub(super) fn answer_restore(&mut self, id: Id) {
        let Some(Conn::Restore(restore)) = self.conns.get(id) else { return };
        let Some(key) = restore.serve.waiting().cloned() else { return };
        // Commit `restored`: one restore makes the copy before the source is dead.
        let begun = restore.images.clone();
        let offered = self.stored.clone().filter(|_| restore.announced && self.session.offers());
        let takes_offer = begun.is_none() && offered.is_some();
        // A scripted session is restored once, by one at a time.
        let last = self.last.clone().filter(|images| !images.scripted || !self.is_taken(id, images));
        let images = begun.or(offered).or(last);
        let scripted = match &images {
            Some(images) => images.scripted,
            None => {
                self.stored.is_some()
                    || ((self.peer.is_some() || self.aside.is_some()) && self.incoming.scripted)
            }
        };
        if scripted && !restore.announced {
            let why = "was refused: the session is scripted, and this criu restore needs --action-script criu-relay";
            return self.close(id, Some(why.into()));
        }
        let found = self.find(images.as_ref(), &key);
        if let Found::Here(body, end) = found {
            if let Err(why) = self.opens(&key, body, false) {
                return self.close(id, Some(why));
            }
            self.follow(id, body, end);
        }
        if takes_offer {
            self.session.copying();
        }
        let Some(Conn::Restore(restore)) = self.conns.get_mut(id) else { return };
        if images.is_some() && restore.images.is_none() {
            self.restores_changed = true;
        }
        restore.images = images;
        let answered = match found {
            Found::Here(body, end) => {
                self.bodies.hold(body);
                restore.asked.insert(key.clone());
                restore.serve.found(Outflow::new(key, body, end))
            }
            Found::NotYet => {
                self.waits.push(&key, id);
                Ok(())
            }
            Found::Never => {
                log::debug!("{key}: asked for, does not exist");
                restore.serve.missing()
            }
            Found::Broken => return self.fail(id),
        };
        match answered {
            Ok(()) => {
                self.conns.again(id);
                self.settle(id);
            }
            Err(why) => self.close(id, Some(why)),
        }
    }

    pub(super) fn step_pipe(&mut self, id: Id) {
        let Some(Conn::Pipe(PipeOut { fd, outflow })) = self.conns.get_mut(id) else { return };
        let drained = pump::drain(&self.bodies, outflow, fd.as_fd());
        if self.consume && catalog::is_pages(&outflow.key) {
            free_read(&mut self.bodies, outflow, fd.as_fd());
        }
        match drained {
            Ok(Flow::Wait | Flow::Starved) => {}
            Ok(Flow::Again) => self.conns.again(id),
            Ok(Flow::End) => self.close(id, None),
            Err(error) if closed_early(&error) => self.close(id, None),
            Err(error) => self.close(id, Some(format!("can't be written to: {error}"))),
        }
    }

    // What is left after a restore that has failed.
    pub(super) fn what_stays(&self) -> &'static str {
        let of_last = |images: &Rc<Catalog>| {
            images.in_order().iter().any(|(_, image)| self.consumed.contains(&image.body))
        };
        if self.stored.is_some() {
            return "its images wait for the word of their source";
        }
        match !self.last.as_ref().is_some_and(of_last) {
            true => "all images stay here, start criu restore again",
            false => "what it had read is not here any more (--consume): it can't be repeated from here",
        }
    }

    // A restore has ended, one way or the other: if it has asked for all memory it has probably succeeded.
    pub(super) fn restore_ended(&mut self, images: &Rc<Catalog>, asked: &HashSet<Key>) {
        let missing = images.pages(&self.bodies).into_iter().filter(|key| !asked.contains(key)).count();
        let success = missing == 0 && asked.iter().any(|key| key.name[..] == *catalog::INVENTORY);
        if success {
            log::info!("the restore has ended; it had asked for every page image: taken for a success");
        } else {
            log::error!(
                "the restore has ended before it had asked for everything ({missing} page images were not): it \
                 failed; {}",
                self.what_stays()
            );
        }
        self.decide_restored(images, success);
    }
}

// Frees what has left the pipe: until then it is the image's own memory that CRIU reads there.
fn free_read(bodies: &mut Bodies, outflow: &mut Outflow, pipe: BorrowedFd<'_>) {
    let Ok(waiting) = ioctl_fionread(pipe) else { return };
    let read = outflow.at.saturating_sub(waiting);
    // Not for every page: the call costs.
    if read >= outflow.freed + pump::TURN as u64 {
        free(bodies, outflow, read);
    }
}

// Frees the whole pages of an image up to `read`.
pub(super) fn free(bodies: &mut Bodies, outflow: &mut Outflow, read: u64) {
    match bodies.punch(outflow.body, outflow.freed, read) {
        Ok(to) => outflow.freed = to,
        Err(error) => log::debug!("{}: its memory can't be freed: {error}", outflow.key),
    }
}
