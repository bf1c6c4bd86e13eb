//! The cache and CRIU's action script: which restores have announced themselves, and which have succeeded.
//!
//! A restore that has announced itself fails when its CRIU ends before `post-restore`; from then on what it has made
//! decides (`copies`). Its connection's end says neither.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use super::{Cache, Conn};
use crate::client::control::Controlled;
use crate::client::process::Process;
use crate::net;
use crate::session::Word;
use crate::store::Catalog;
use crate::table::Id;
use crate::wire::control::{Action, Request};
use crate::wire::relay;

/// A CRIU that has announced itself, watched by its pidfd.
#[derive(Debug)]
pub struct Criu {
    pub(super) process: Process,
    /// As seen from here.
    pid: i32,
    /// What it restores from without a connection: that has closed, or it reads the view.
    at: Option<Rc<Catalog>>,
    /// Whether its script has said at `post-restore` that it has made a copy.
    copied: bool,
}

impl Criu {
    /// Whether it restores from these images without a connection, and has made no copy yet.
    pub fn is_at(&self, images: &Rc<Catalog>) -> bool {
        self.at.as_ref().is_some_and(|at| Rc::ptr_eq(at, images))
    }
}

impl Cache {
    pub(super) fn step_control(&mut self, id: Id) {
        let Some(Conn::Control(control)) = self.conns.get_mut(id) else { return };
        match control.step(&mut self.block) {
            Ok(Controlled::Wait) => self.settle(id),
            Ok(Controlled::End) => self.close(id, None),
            Ok(Controlled::Request(request)) => {
                let in_view = control.is_in_view();
                log::debug!("the action script: {}", request.action.name());
                let verdict = match request.action {
                    Action::PreStream => self.announce(request.criu),
                    // Without pre-stream, it is the first that is heard of a restore from a directory.
                    Action::PreRestore if in_view => self.begins_in_view(request.criu),
                    Action::PreRestore => Ok(()),
                    Action::PostRestore => self.restored(request, in_view),
                    Action::PreResume => {
                        let verdict = self.pre_resume(request, id);
                        return self.about_to_run_answered(id, verdict);
                    }
                    Action::PreDump | Action::PostDump => {
                        Err("this is criu-relay cache, at which nothing is dumped".into())
                    }
                    Action::Wait => {
                        self.settle(id);
                        return self.wait(id);
                    }
                    Action::Commit => return self.resolved(id, Word::Release),
                    Action::Rollback => return self.resolved(id, Word::Rollback),
                };
                self.reply(id, verdict.map(|()| String::new()));
            }
            Err(why) => self.close(id, Some(why)),
        }
    }

    // Tells the script. What it does if it does not hear that is done when it has closed.
    fn about_to_run_answered(&mut self, id: Id, verdict: Result<(), String>) {
        if verdict.is_err() {
            return self.reply(id, verdict.map(|()| String::new()));
        }
        if let Some(Conn::Control(control)) = self.conns.get_mut(id)
            && let Err(why) = control.reply(0, "")
        {
            log::warn!("the action script {why}");
        }
        // It may have closed already.
        self.conns.again(id);
        self.settle(id);
    }

    // The operator has said it.
    fn resolved(&mut self, id: Id, word: Word) {
        let said = self.resolve(word);
        self.reply(id, said);
    }

    pub(super) fn reply(&mut self, id: Id, verdict: Result<String, String>) {
        if let Some(Conn::Control(control)) = self.conns.remove(id) {
            control.verdict(verdict.as_deref().map_err(String::as_str));
        }
    }

    pub(super) fn announce(&mut self, criu: OwnedFd) -> Result<(), String> {
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
            criu.copied = false;
            if let Some(images) = criu.at.take() {
                self.unpin(images);
            }
        } else {
            let criu = Criu { process: Process::new(criu), pid, at: None, copied: false };
            let added = self.conns.insert(Conn::Criu(criu));
            added.map_err(|error| format!("CRIU can't be watched: {error}"))?;
        }
        self.restores_changed = true;
        log::info!("a restore has announced itself");
        Ok(())
    }

    pub(super) fn has_announced(&self, pid: i32) -> bool {
        self.conns.iter().any(|(_, conn)| matches!(conn, Conn::Criu(criu) if pid != 0 && criu.pid == pid))
    }

    // Tells our proxies when that changes.
    pub(super) fn tell_waits(&mut self) {
        if !std::mem::take(&mut self.restores_changed) {
            return;
        }
        let waits = self.has_waiting_restore();
        if self.session.offers() && !waits {
            // Nobody is left to make the copy.
            self.session.copying();
            self.session.copy_failed();
            self.tell(relay::FAILED, "none waits any more");
        }
        if waits != self.told_waits {
            self.told_waits = waits;
            self.tell(if waits { relay::WAITS } else { relay::NONE_WAITS }, "");
        }
    }

    // Whether a restore waits for its first image, or somebody for a restore from the view.
    pub(super) fn has_waiting_restore(&self) -> bool {
        self.has_waiter() || self.has_announced_restore()
    }

    // Whether a restore of the stream dialect that has announced itself waits for its first image.
    pub(super) fn has_announced_restore(&self) -> bool {
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

    // What this CRIU restores from, if it has got something of it.
    pub(super) fn images_of(&self, pid: i32) -> Option<Rc<Catalog>> {
        self.conns.iter().find_map(|(_, conn)| match conn {
            Conn::Restore(restore) if restore.pid == pid => restore.images.clone(),
            Conn::Criu(criu) if criu.pid == pid => criu.at.clone(),
            _ => None,
        })
    }

    // Memory, files and PIDs are there. An error kills them.
    fn restored(&mut self, request: Request<OwnedFd>, in_view: bool) -> Result<(), String> {
        let pid = net::pidfd_pid(request.criu.as_fd()).unwrap_or(0);
        if in_view && !self.has_announced(pid) {
            // A CRIU without pre-restore.
            let criu = request.criu.try_clone().map_err(|error| format!("CRIU can't be watched: {error}"))?;
            self.begins_in_view(criu)?;
        }
        if !self.has_announced(pid) {
            // Before 3.19 CRIU has no pre-stream. It is given nothing of a scripted session.
            return Ok(());
        }
        self.post_restore(pid, request.tasks)?;
        if let Some(criu) = self.criu_mut(pid) {
            criu.copied = true;
            if let Some(images) = criu.at.take() {
                self.unpin(images);
            }
        }
        Ok(())
    }

    // Everything is restored, and about to run. An error: nothing of it may.
    fn pre_resume(&mut self, request: Request<OwnedFd>, script: Id) -> Result<(), String> {
        let pid = net::pidfd_pid(request.criu.as_fd()).unwrap_or(0);
        if !self.has_announced(pid) {
            self.recovered_runs(pid);
            return Ok(());
        }
        self.about_to_run(pid, request.tasks, request.stays, script)
    }

    // The connection of an announced restore has closed: judged when it has made a copy, or its CRIU ended.
    pub(super) fn restore_closed(&mut self, pid: i32, images: Rc<Catalog>) {
        match self.criu_mut(pid) {
            Some(criu) if criu.copied => {
                self.unpin(images);
                self.copys_criu_closed(pid);
                // Should its copy be dead already, another may try.
                self.answer_all();
            }
            Some(criu) => {
                if let Some(before) = criu.at.replace(images) {
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
        self.copys_criu_ended(criu.pid);
        if let Some(images) = criu.at {
            self.restore_failed(&images);
            self.unpin(images);
        }
    }

    fn restore_failed(&mut self, images: &Rc<Catalog>) {
        let more = self.what_stays();
        log::error!("the restore has failed: its CRIU ended before it had made a copy; {more}");
        if self.is_stored(images) {
            self.take_back();
            if self.session.copy_failed() {
                self.tell(relay::FAILED, "its CRIU ended before it had made a copy");
            }
        }
        self.decide_restored(images, false);
        self.let_another_begin();
    }

    // What a restore's end means for the session.
    pub(super) fn decide_restored(&mut self, images: &Rc<Catalog>, success: bool) {
        if self.last.as_ref().is_some_and(|last| Rc::ptr_eq(last, images)) {
            if success {
                self.hide_restored();
                self.times.ready();
                self.tell_times();
            }
            let decision = self.session.restore_ended(success);
            self.decide(decision);
        }
    }
}
