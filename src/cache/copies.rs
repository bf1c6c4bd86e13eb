//! The cache and the copies that restores have made, from `post-restore` until each runs or is dead.
//!
//! Theory of operation. At `post-restore` the script passes a pidfd of every task: from then on a CRIU that vanishes
//! leaves a tree that neither runs nor dies, and it is killed. At `pre-resume` the tree is about to run. If its source
//! is dead it may. If not (commit `restored`), every task is sent a SIGSTOP while CRIU still traces it: so none runs
//! when CRIU lets go of it, and it stays stopped whatever dies afterwards. When all are stopped the copy stands
//! ready; the source's word continues it, or kills it. A task that was to be stopped anyway, since it was on the
//! source or --leave-stopped was given, has a SIGSTOP from CRIU by then: that one is never continued.

mod look;

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{Cache, Conn};
use crate::client::process::Process;
use crate::net;
use crate::record::{self, Identity, Record, State};
use crate::session::Commit;
use crate::store::Catalog;
use crate::table::Id;
use crate::wire::relay::{self, Kind, SessionId};

/// How long a copy that an earlier run has released is continued again and again: its CRIU's script, which found no
/// daemon at `pre-resume`, may be stopping it.
pub const INSIST: Duration = Duration::from_secs(1);

/// Connections that may come while a copy is watched.
const SPARE: usize = 8;

/// A task of a copy.
#[derive(Debug)]
pub struct CopyTask {
    pub(super) process: Process,
    /// It was to be stopped anyway.
    pub(super) stays: bool,
}

/// The tree that a restore has made.
#[derive(Debug)]
pub struct Copy {
    /// The process id of its CRIU, as seen from here; 0: it was that of an earlier run of this daemon.
    pub(super) criu: i32,
    /// From what it was made; None: by an earlier run.
    pub(super) images: Option<Rc<Catalog>>,
    /// What is written of it. Its session is its own if its source was dead when it was made.
    pub(super) record: Record,
    /// Those that live.
    pub(super) tasks: Vec<Id>,
    pub(super) phase: Phase,
    /// The script that has asked at `pre-resume`, until it has closed: one that has not heard our answer, since its
    /// CRIU is dead, stops every task before it does.
    pub(super) script: Option<Id>,
    /// Relay links that wait to hear that it is dead.
    pub(super) answer: Vec<Id>,
    pub(super) look_at: Instant,
}

/// How far it has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Phase {
    /// It is in CRIU's hands: at first CRIU's own code in it blocks every signal, if this CRIU has it so (`masked`);
    /// then it is traced, shortly before it runs.
    Made { masked: bool, traced: bool },
    /// Every task has its SIGSTOP; CRIU has not let go of all.
    Stopping,
    /// It is stopped. Its source decides.
    Prepared,
    /// It may run; until then, and until nobody holds it any more, it is continued.
    Continued { until: Instant },
    /// Every task has its SIGKILL. The reason, for whoever has to be told.
    Doomed(String),
}

impl Cache {
    /// A restore has made its copy.
    pub(super) fn post_restore(&mut self, criu: i32, tasks: Vec<OwnedFd>) -> Result<(), String> {
        let Some(images) = self.images_of(criu) else {
            return Err("this restore has read nothing here".into());
        };
        if !self.is_current(&images) {
            return Err("the source has rolled back what this restore was made of, and runs on".into());
        }
        if self.copies.iter().any(|copy| copy.criu == criu) {
            return Err("this restore has made its copy already".into());
        }
        // At pre-resume they come once more, and the script needs a place too: without one it would stand still.
        let room = self.max_conns.saturating_sub(self.conns.len());
        if 2 * tasks.len() + SPARE > room {
            return Err(format!(
                "the copy has {} processes, and this cache can't watch so many: raise its limit of descriptors (ulimit -n)",
                tasks.len()
            ));
        }
        let (session, state) = match self.session.stored() {
            Some(session) if self.is_stored(&images) => (session, State::Made),
            // Its source is dead: nobody else knows it by a name.
            _ => {
                let name = net::random_id();
                (name.map_err(|error| format!("no name can be had for the copy: {error}"))?, State::Released)
            }
        };
        let mut record = self.book.record(session, state)?;
        record.peer = self.open.as_ref().map_or(String::new(), |open| open.peer.clone());
        record.criu = Identity::of(criu).ok();
        record.kept = self.kept(Commit::Stored, &images);
        let tasks = self.watch(tasks, 0)?;
        record.tasks = self.identities(&tasks);
        if let Err(why) = self.book.store(&record) {
            self.forget(&tasks);
            return Err(why);
        }
        log::info!("the copy has been restored ({} processes)", tasks.len());
        let masked = matches!(tasks.first().and_then(|id| self.conns.get(*id)),
            Some(Conn::Task(root)) if root.process.is_masked());
        if self.is_stored(&images) {
            // Its CRIU has read what it needs: nobody else is to find it while the source may live.
            self.take_back();
        }
        let phase = Phase::Made { masked, traced: false };
        let (answer, look_at) = (Vec::new(), Instant::now());
        let images = Some(images);
        self.copies.push(Copy { criu, images, record, tasks, phase, script: None, answer, look_at });
        Ok(())
    }

    fn identities(&self, tasks: &[Id]) -> Vec<record::Task> {
        let identity = |id: &Id| match self.conns.get(*id) {
            Some(Conn::Task(task)) => {
                let who = Identity::of(task.process.pid()?).ok()?;
                Some(record::Task { who, stays: task.stays })
            }
            _ => None,
        };
        tasks.iter().filter_map(identity).collect()
    }

    // Watches tasks from now on; the last `stays` are to be stopped anyway.
    fn watch(&mut self, pidfds: Vec<OwnedFd>, stays: usize) -> Result<Vec<Id>, String> {
        let mut tasks = Vec::new();
        let go_on = pidfds.len().saturating_sub(stays);
        for (at, fd) in pidfds.into_iter().enumerate() {
            let process = Process::new(fd);
            // A zombie is part of what was dumped.
            if process.is_dead() {
                continue;
            }
            if process.pid().is_none() {
                self.forget(&tasks);
                return Err("a task of the copy is not visible from here".into());
            }
            match self.conns.insert(Conn::Task(CopyTask { process, stays: at >= go_on })) {
                Ok(task) => tasks.push(task),
                Err(error) => {
                    self.forget(&tasks);
                    return Err(format!("a task of the copy can't be watched: {error}"));
                }
            }
        }
        Ok(tasks)
    }

    fn forget(&mut self, tasks: &[Id]) {
        for task in tasks {
            self.conns.remove(*task);
        }
    }

    // Whether these images are there for a restore; the others were rolled back, or replaced.
    fn is_current(&self, images: &Rc<Catalog>) -> bool {
        self.is_stored(images) || self.last.as_ref().is_some_and(|last| Rc::ptr_eq(last, images))
    }

    /// Whether these images are stored, and their source has not spoken.
    pub(super) fn is_stored(&self, images: &Rc<Catalog>) -> bool {
        self.stored.as_ref().is_some_and(|stored| Rc::ptr_eq(stored, images))
    }

    fn copy_of(&self, criu: i32) -> Option<usize> {
        self.copies.iter().position(|copy| copy.criu == criu)
    }

    /// Whether a copy is made of these images.
    pub(super) fn is_copied(&self, images: &Rc<Catalog>) -> bool {
        let of_these = |copy: &Copy| copy.images.as_ref().is_some_and(|of| Rc::ptr_eq(of, images));
        self.copies.iter().any(of_these)
    }

    /// It is about to run, with these tasks, as `script` says; CRIU stops the last `stays` of them. An error: nothing
    /// of it may run.
    pub(super) fn about_to_run(
        &mut self,
        criu: i32,
        pidfds: Vec<OwnedFd>,
        stays: usize,
        script: Id,
    ) -> Result<(), String> {
        let Some(at) = self.copy_of(criu) else {
            return Err("this restore has not said at post-restore that it has made a copy".into());
        };
        if !matches!(self.copies[at].phase, Phase::Made { .. }) {
            return Err("its source has decided against this copy".into());
        }
        let Some(images) = self.copies[at].images.clone() else { return Ok(()) };
        let runs = !self.is_stored(&images);
        // The tree is at rest now, which it may not have been before.
        let tasks = match self.watch(pidfds, stays) {
            Ok(tasks) => tasks,
            Err(why) => {
                self.unpin(images);
                self.fail_copy(at, why.clone());
                return Err(why);
            }
        };
        let now = Instant::now();
        let copy = &mut self.copies[at];
        copy.script = Some(script);
        copy.look_at = now;
        let before = std::mem::replace(&mut copy.tasks, tasks.clone());
        self.forget(&before);
        if runs {
            log::info!("the restore has succeeded: its action script says so");
            self.copies[at].phase = Phase::Continued { until: now };
            self.decide_restored(&images, true);
            self.unpin(images);
            return Ok(());
        }
        self.unpin(images);
        for task in tasks {
            if let Err(why) = self.stop_task(task) {
                self.fail_copy(at, why.clone());
                return Err(why);
            }
        }
        log::info!("the copy is stopped: CRIU lets go of it");
        self.copies[at].phase = Phase::Stopping;
        Ok(())
    }

    /// What an earlier run has released is about to run, as the script of its CRIU says.
    pub(super) fn recovered_runs(&mut self, criu: i32) {
        let is_of = |record: &Record| record.criu.is_some_and(|who| who.pid == criu);
        let released = |copy: &Copy| copy.criu == 0 && copy.record.state == State::Released;
        if self.copies.iter().any(|copy| released(copy) && is_of(&copy.record)) {
            self.spend_view();
        }
    }

    /// A script has closed.
    pub(super) fn script_gone(&mut self, script: Id) {
        for copy in self.copies.iter_mut().filter(|copy| copy.script == Some(script)) {
            copy.script = None;
        }
    }

    fn stop_task(&mut self, id: Id) -> Result<(), String> {
        let Some(Conn::Task(task)) = self.conns.get_mut(id) else { return Ok(()) };
        let pid = task.process.pid().unwrap_or(0);
        let sent = task.process.send(Signal::STOP);
        sent.map_err(|error| format!("process {pid} of the copy can't be stopped: {error}"))?;
        // One that nobody traces may be stopping in this very moment: that is seen when all are.
        let process = &task.process;
        match process.is_stopping() || process.is_dead() || !process.is_traced() {
            true => Ok(()),
            false => Err(format!("process {pid} of the copy does not stop")),
        }
    }

    /// CRIU has ended.
    pub(super) fn copys_criu_ended(&mut self, criu: i32) {
        if let Some(at) = self.copy_of(criu)
            && matches!(self.copies[at].phase, Phase::Made { .. })
        {
            self.fail_copy(at, "its CRIU ended without a word of its action script at pre-resume".into());
        }
    }

    /// CRIU has closed the connection on which it restores, as it does when it has let go of its copy: whether it was
    /// seen to trace that before is a matter of luck.
    pub(super) fn copys_criu_closed(&mut self, criu: i32) {
        let Some(at) = self.copy_of(criu) else { return };
        let copy = &self.copies[at];
        let Phase::Made { masked, .. } = copy.phase else { return };
        // Of one that shows nothing, and whose source is dead, its CRIU's end decides.
        let shows = masked || copy.images.as_ref().is_some_and(|images| self.is_stored(images));
        let is_free = |root: &Process| root.is_free() && !root.is_dead();
        let root = copy.tasks.first().and_then(|id| self.conns.get(*id));
        if shows && matches!(root, Some(Conn::Task(root)) if is_free(&root.process)) {
            self.runs_unasked(at);
        }
    }

    pub(super) fn step_task(&mut self, id: Id) {
        if matches!(self.conns.get(id), Some(Conn::Task(task)) if task.process.is_dead()) {
            self.close(id, None);
        }
    }

    pub(super) fn task_gone(&mut self, id: Id) {
        let Some(at) = self.copies.iter().position(|copy| copy.tasks.contains(&id)) else { return };
        let copy = &mut self.copies[at];
        copy.tasks.retain(|task| *task != id);
        match copy.phase {
            // A helper of CRIU's, or a task that CRIU kills since its restore has failed: it says so itself.
            Phase::Made { .. } if !copy.tasks.is_empty() => {}
            Phase::Made { .. } | Phase::Stopping | Phase::Prepared => {
                self.fail_copy(at, "a task of the copy has died".into());
            }
            Phase::Doomed(_) if copy.tasks.is_empty() => self.copy_is_dead(at),
            // It runs, and ends as it likes.
            Phase::Doomed(_) | Phase::Continued { .. } => {}
        }
    }

    // The copy is of no use, and goes.
    fn fail_copy(&mut self, at: usize, why: String) {
        let more = self.what_stays();
        log::error!("the restore has failed: {why}; what it had made is killed; {more}");
        self.kill_copy(at, why);
    }

    pub(super) fn kill_copy(&mut self, at: usize, why: String) {
        let copy = &mut self.copies[at];
        copy.phase = Phase::Doomed(why);
        for task in copy.tasks.clone() {
            if let Some(Conn::Task(task)) = self.conns.get(task)
                && let Err(error) = task.process.send(Signal::KILL)
            {
                log::error!("a task of the copy can't be killed: {error}");
            }
        }
        if self.copies[at].tasks.is_empty() {
            self.copy_is_dead(at);
        }
    }

    pub(super) fn copy_is_dead(&mut self, at: usize) {
        let copy = self.drop_copy(at);
        log::info!("nothing of the copy is left");
        // Its images may wait for their word still: then there is a record at any moment.
        let waits = self.session.stored() == Some(copy.record.session);
        if waits {
            self.take_back();
            self.note_open();
        }
        if !waits || self.open.is_none() {
            self.book.remove(&copy.record);
        }
        // One of an earlier session says nothing of the one that waits.
        if let Phase::Doomed(why) = copy.phase
            && copy.answer.is_empty()
            && self.session.stored() == Some(copy.record.session)
            && self.session.copy_failed()
        {
            self.tell(relay::FAILED, &why);
        }
        for link in copy.answer {
            self.say(link, Kind::RolledBack(relay::RolledBack { session: copy.record.session.to_vec() }));
        }
        match copy.images {
            Some(images) => {
                self.decide_restored(&images, false);
                self.unpin(images);
            }
            // There is nothing from which another could be made.
            None => self.session.lost(copy.record.session),
        }
        self.let_another_begin();
    }

    // Nothing is left to be done for it.
    fn finish_copy(&mut self, at: usize) -> Copy {
        let copy = self.drop_copy(at);
        self.book.remove(&copy.record);
        copy
    }

    // The same, but its source may have to be told once more.
    fn drop_copy(&mut self, at: usize) -> Copy {
        let mut copy = self.copies.remove(at);
        let tasks = std::mem::take(&mut copy.tasks);
        self.forget(&tasks);
        copy
    }

    /// Whether a restore is making a copy for this session.
    pub(super) fn is_being_copied(&self, session: SessionId) -> bool {
        self.copies.iter().any(|copy| copy.record.session == session)
    }

    /// Its source is dead: it runs. Whether there was one that could; one that is still being made runs by itself.
    pub(super) fn release_copy(&mut self, session: SessionId) -> bool {
        let Some(at) = self.copies.iter().position(|copy| copy.record.session == session) else {
            return false;
        };
        let ready = match self.copies[at].phase {
            // It is not to be killed any more, should this daemon die; its script has not asked yet.
            Phase::Made { .. } => {
                self.note(at, State::Released);
                return false;
            }
            Phase::Stopping => false,
            Phase::Prepared => true,
            Phase::Continued { .. } | Phase::Doomed(_) => return false,
        };
        self.note(at, State::Released);
        self.spend_view();
        self.continue_copy(at);
        if ready {
            self.runs(at);
        } else {
            // Its CRIU may hold it yet, and its script may send SIGSTOPs, having heard nothing.
            let now = Instant::now();
            let copy = &mut self.copies[at];
            (copy.phase, copy.look_at) = (Phase::Continued { until: now }, now);
        }
        true
    }

    // Lets every task go on that is stopped by us.
    pub(super) fn continue_copy(&self, at: usize) {
        for task in &self.copies[at].tasks {
            if let Some(Conn::Task(task)) = self.conns.get(*task)
                && !task.stays
                && let Err(error) = task.process.send(Signal::CONT)
            {
                log::error!("a task of the copy can't be continued: {error}");
            }
        }
    }

    // The copy is about to go this way. It can't be kept from it by a disk that is full.
    fn note(&mut self, at: usize, state: State) {
        let record = &mut self.copies[at].record;
        record.state = state;
        if let Err(why) = self.book.store(record) {
            log::error!("{why}; should this daemon die now, see criu-relay resolve");
        }
    }

    /// Its source knows that it runs, or nobody waits for that any more.
    pub(super) fn forget_released(&mut self, session: Option<SessionId>) {
        let (gone, left) = std::mem::take(&mut self.released)
            .into_iter()
            .partition(|record| session.is_none_or(|session| record.session == session));
        self.released = left;
        let gone: Vec<Record> = gone;
        gone.iter().for_each(|record| self.book.remove(record));
    }

    /// Its source runs on: it is killed. Whether there is one; `link` is told when it is dead.
    pub(super) fn roll_back_copy(&mut self, session: SessionId, link: Option<Id>) -> bool {
        let Some(at) = self.copies.iter().position(|copy| copy.record.session == session) else {
            return false;
        };
        self.copies[at].answer.extend(link);
        if !matches!(self.copies[at].phase, Phase::Doomed(_)) {
            self.note(at, State::RolledBack);
            self.kill_copy(at, "its source has rolled it back".into());
        }
        true
    }

    /// Tells every proxy of ours how a restore stands.
    pub(super) fn tell(&mut self, state: u32, why: &str) {
        let links = self.conns.iter().filter(|(_, conn)| matches!(conn, Conn::Relay(_)));
        for id in links.map(|(id, _)| id).collect::<Vec<_>>() {
            self.say(id, Kind::Restore(relay::Restore { state, text: why.into() }));
        }
    }
}
