//! The cache and CRIU's action script: which restores have announced themselves, and which have succeeded.
//!
//! A restore that has announced itself succeeds when its script says so at `pre-resume`, and fails when its CRIU
//! ends without that. Its connection's end says neither.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use super::{Cache, Conn};
use crate::client::control::Controlled;
use crate::client::process::Process;
use crate::net;
use crate::store::Catalog;
use crate::table::Id;
use crate::wire::control::Action;

/// A CRIU that has announced itself, watched by its pidfd.
#[derive(Debug)]
pub struct Criu {
    pub(super) process: Process,
    /// As seen from here.
    pid: i32,
    /// What it was restoring when its connection closed.
    closed: Option<Rc<Catalog>>,
    /// Whether its script has said that it succeeded.
    succeeded: bool,
}

impl Criu {
    /// Whether it was restoring these images when its connection closed, and has not spoken yet.
    pub fn is_at(&self, images: &Rc<Catalog>) -> bool {
        self.closed.as_ref().is_some_and(|closed| Rc::ptr_eq(closed, images))
    }
}

impl Cache {
    pub(super) fn step_control(&mut self, id: Id) {
        let Some(Conn::Control(control)) = self.conns.get_mut(id) else { return };
        match control.step(&mut self.block) {
            Ok(Controlled::Wait) => self.settle(id),
            Ok(Controlled::End) => self.close(id, None),
            Ok(Controlled::Request(request)) => {
                log::debug!("the action script: {}", request.action.name());
                let verdict = match request.action {
                    Action::PreStream => self.announce(request.criu),
                    Action::PreResume => self.pre_resume(&request.criu),
                    Action::PreDump | Action::PostDump => {
                        Err("this is criu-relay cache, at which nothing is dumped".into())
                    }
                    Action::PostRestore => Ok(()),
                };
                self.reply(id, verdict);
            }
            Err(why) => self.close(id, Some(why)),
        }
    }

    fn reply(&mut self, id: Id, verdict: Result<(), String>) {
        if let Some(Conn::Control(control)) = self.conns.remove(id) {
            control.verdict(verdict.as_ref().copied().map_err(String::as_str));
        }
    }

    fn announce(&mut self, criu: OwnedFd) -> Result<(), String> {
        // 0, as which it would be seen here, is what every process is that is not visible.
        let Some(pid) = net::pidfd_pid(criu.as_fd()) else {
            return Err(
                "this CRIU's process id is not visible to criu-relay cache: start the cache in CRIU's PID \
                        namespace, or in one around it"
                    .into(),
            );
        };
        if let Some(criu) = self.criu_mut(pid) {
            // The same process restores again.
            criu.succeeded = false;
            if let Some(images) = criu.closed.take() {
                self.unpin(images);
            }
        } else {
            let criu = Criu { process: Process::new(criu), pid, closed: None, succeeded: false };
            let added = self.conns.insert(Conn::Criu(criu));
            added.map_err(|error| format!("CRIU can't be watched: {error}"))?;
        }
        log::info!("a restore has announced itself");
        Ok(())
    }

    pub(super) fn has_announced(&self, pid: i32) -> bool {
        self.conns.iter().any(|(_, conn)| matches!(conn, Conn::Criu(criu) if pid != 0 && criu.pid == pid))
    }

    // Whether a restore that has announced itself waits for its first image.
    pub(super) fn has_waiting_restore(&self) -> bool {
        self.conns
            .iter()
            .any(|(_, conn)| matches!(conn, Conn::Restore(r) if r.announced && r.images.is_none()))
    }

    fn criu_mut(&mut self, pid: i32) -> Option<&mut Criu> {
        let id = self.conns.iter().find_map(|(id, conn)| match conn {
            Conn::Criu(criu) if criu.pid == pid => Some(id),
            _ => None,
        })?;
        match self.conns.get_mut(id) {
            Some(Conn::Criu(criu)) => Some(criu),
            _ => None,
        }
    }

    // Everything is restored, and about to run.
    fn pre_resume(&mut self, criu: &OwnedFd) -> Result<(), String> {
        let pid = net::pidfd_pid(criu.as_fd()).unwrap_or(0);
        if !self.has_announced(pid) {
            return Err("this restore has not announced itself (CRIU has pre-stream since 3.19)".into());
        }
        let at_it = self.conns.iter().find_map(|(id, conn)| match conn {
            Conn::Restore(restore) if restore.announced && restore.pid == pid => Some(id),
            _ => None,
        });
        // What its connection does from here on means nothing any more.
        let at_it = match at_it.and_then(|id| self.conns.get_mut(id)) {
            Some(Conn::Restore(restore)) => {
                restore.announced = false;
                restore.asked.clear();
                restore.images.take()
            }
            _ => None,
        };
        let Some(criu) = self.criu_mut(pid) else { return Ok(()) };
        let Some(images) = at_it.or(criu.closed.take()) else {
            return Err("this restore has read nothing here".into());
        };
        criu.succeeded = true;
        log::info!("the restore has succeeded: its action script says so");
        self.decide_restored(&images, true);
        self.unpin(images);
        Ok(())
    }

    // The connection of an announced restore has closed: judged when its script has spoken, or its CRIU ended.
    pub(super) fn restore_closed(&mut self, pid: i32, images: Rc<Catalog>) {
        match self.criu_mut(pid) {
            Some(criu) if criu.succeeded => self.unpin(images),
            Some(criu) => {
                if let Some(before) = criu.closed.replace(images) {
                    self.unpin(before);
                }
            }
            None => {
                self.restore_failed(&images);
                self.unpin(images);
            }
        }
    }

    pub(super) fn step_criu(&mut self, id: Id) {
        if matches!(self.conns.get(id), Some(Conn::Criu(criu)) if criu.process.is_dead()) {
            self.close(id, None);
        }
    }

    pub(super) fn criu_gone(&mut self, criu: Criu) {
        if let Some(images) = criu.closed {
            self.restore_failed(&images);
            self.unpin(images);
        }
    }

    fn restore_failed(&mut self, images: &Rc<Catalog>) {
        let more = self.what_stays();
        log::error!("the restore has failed: its CRIU ended without a word of its action script; {more}");
        self.decide_restored(images, false);
        // Another may try.
        self.answer_all();
    }

    // What a restore's end means for the session.
    pub(super) fn decide_restored(&mut self, images: &Rc<Catalog>, success: bool) {
        if self.last.as_ref().is_some_and(|last| Rc::ptr_eq(last, images)) {
            let decision = self.session.restore_ended(success);
            self.decide(decision);
        }
    }
}
