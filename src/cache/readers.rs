//! The cache and those who read: what they are told, and when.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::rc::Rc;

use rustix::io::Errno;

use super::{Cache, Conn, Found};
use crate::client::remote::{Step, closed_early};
use crate::client::stream::{PipeOut, Served};
use crate::pump;
use crate::pump::{Flow, Outflow};
use crate::store::{Catalog, catalog};
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
                Some(image) => return Found::Here(image),
                None if needed => return Found::Broken,
                None if images.has_snapshot(&key.snapshot_id) || !self.session.stays() => {
                    return Found::Never;
                }
                // With --keep: it is of a dump that may yet come.
                None => {}
            }
        }
        match self.incoming.get(key) {
            Some(image) if !catalog::waits_for_the_end(key) => Found::Here(image),
            _ => Found::NotYet,
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
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        let failure = match found {
            Found::Here(image) => {
                self.bodies.hold(image.body);
                // With it a restore begins: what another, that failed, had asked for does not count.
                if key.name[..] == *catalog::INVENTORY {
                    self.asked.clear();
                }
                self.asked.insert(key.clone());
                match client.start_read(key, image) {
                    Ok(()) => {
                        self.conns.again(id);
                        return self.settle(id);
                    }
                    Err(why) => Some(why),
                }
            }
            Found::NotYet => {
                self.waits.push(&key, id);
                return self.settle(id);
            }
            Found::Never => {
                log::debug!("{key}: asked for, does not exist");
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
        match client.step(&mut self.bodies, &mut self.block, false) {
            Ok(Step::Wait) => self.settle(id),
            Ok(Step::Again) => {
                self.conns.again(id);
                self.settle(id);
            }
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
                let body = pipe.outflow.body;
                if let Err(error) = self.conns.insert(Conn::Pipe(pipe)) {
                    self.bodies.release(body);
                    return self.close(id, Some(format!("has sent a pipe that can't be polled: {error}")));
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
        let images = restore.images.clone().or_else(|| self.last.clone());
        let found = self.find(images.as_ref(), &key);
        let Some(Conn::Restore(restore)) = self.conns.get_mut(id) else { return };
        restore.images = images;
        let answered = match found {
            Found::Here(image) => {
                self.bodies.hold(image.body);
                restore.asked.insert(key.clone());
                restore.serve.found(Outflow { key, body: image.body, at: 0, end: image.len })
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
        match pump::drain(&self.bodies, outflow, fd.as_fd()) {
            Ok(Flow::Wait) => {}
            Ok(Flow::Again) => self.conns.again(id),
            Ok(Flow::End) => self.close(id, None),
            Err(error) if closed_early(&error) => self.close(id, None),
            Err(error) => self.close(id, Some(format!("can't be written to: {error}"))),
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
                 failed; all {} images stay here, start criu restore again",
                images.len()
            );
        }
        let current = self.last.as_ref().is_some_and(|last| Rc::ptr_eq(last, images));
        if current {
            let decision = self.session.restore_ended(success);
            self.decide(decision);
        }
    }
}
