//! What is looked for in a copy, since nothing tells of it: that CRIU has let go of its tasks and all are stopped, that
//! somebody has continued one, that CRIU has let it run without our script's word. Every few milliseconds, for as
//! long as it matters.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{Copy, CopyTask, Phase};
use crate::cache::{Cache, Conn};
use crate::client::process::Process;
use crate::record::{Found, Identity, State};
use crate::table::Id;
use crate::wire::relay;

/// How often a copy is looked at, in the states of which nothing tells the end.
const LOOK: Duration = Duration::from_millis(2);

/// How often one that stands ready is, which nothing but a SIGCONT can change: that of whoever does not know better,
/// or of the kernel, which continues a stopped job when its CRIU, the last link to its shell, has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How long a copy that an earlier run has released, and that shows nothing, may be in the hands of its CRIU: that asks
/// at `pre-resume`, and should find us. (A program may block every signal too.)
const IN_HAND: Duration = Duration::from_secs(60);

impl Cache {
    /// When a copy is to be looked at again.
    pub(in crate::cache) fn copies_wake_at(&self) -> Option<Instant> {
        let looked_at = |copy: &&Copy| !matches!(copy.phase, Phase::Doomed(_));
        self.copies.iter().filter(looked_at).map(|copy| copy.look_at).min()
    }

    pub(in crate::cache) fn tick_copies(&mut self, now: Instant) {
        let due = |copy: &Copy| copy.look_at <= now;
        let sessions: Vec<_> =
            self.copies.iter().filter(|copy| due(copy)).map(|c| c.record.session).collect();
        for session in sessions {
            if let Some(at) = self.copies.iter().position(|copy| copy.record.session == session) {
                let copy = &mut self.copies[at];
                copy.look_at = now + if copy.phase == Phase::Prepared { LOOK_AGAIN } else { LOOK };
                self.look_at_copy(at, now);
            }
        }
    }

    fn look_at_copy(&mut self, at: usize, now: Instant) {
        let copy = &self.copies[at];
        let process = |id: &Id| match self.conns.get(*id) {
            Some(Conn::Task(task)) => Some(&task.process),
            _ => None,
        };
        match copy.phase {
            Phase::Made { masked, traced } => {
                // Of the tree's root, which is no helper of CRIU's.
                let Some(root) = copy.tasks.first().and_then(process).filter(|root| !root.is_dead()) else {
                    return;
                };
                let is_traced = root.is_traced();
                if !is_traced && traced || masked && root.is_free() {
                    self.runs_unasked(at);
                } else if is_traced {
                    self.copies[at].phase = Phase::Made { masked, traced: true };
                }
            }
            Phase::Stopping => match copy.tasks.iter().filter_map(process).all(Process::is_stopped) {
                true if copy.script.is_some() => {}
                true => self.stands_ready(at),
                false => self.stop_again(at),
            },
            Phase::Prepared => self.stop_again(at),
            Phase::Continued { until } => {
                let mut held = copy.script.is_some() || now < until;
                for task in copy.tasks.iter().filter_map(|id| self.conns.get(*id)) {
                    let Conn::Task(CopyTask { process, stays: false }) = task else { continue };
                    let is_traced = process.is_traced();
                    held |= is_traced;
                    // Or will be, in a moment.
                    if !is_traced && process.is_stopping() {
                        held = true;
                        if let Err(error) = process.send(Signal::CONT) {
                            log::error!("a task of the copy can't be continued: {error}");
                        }
                    }
                }
                // CRIU may be about to kill what an earlier run has released: then it has never run.
                let root = copy.tasks.first().and_then(process);
                held |= now < until + IN_HAND && self.is_in_hand(at);
                if copy.criu == 0 && root.is_some_and(Process::is_free) {
                    self.spend_view();
                }
                match held {
                    true => {}
                    false if self.copies[at].tasks.is_empty() && self.can_be_repeated(at) => {
                        self.copy_is_dead(at)
                    }
                    false => self.runs(at),
                }
            }
            Phase::Doomed(_) => {}
        }
    }

    // Whether nothing of an earlier run's copy has run, and another can be made.
    fn can_be_repeated(&self, at: usize) -> bool {
        self.copies[at].criu == 0 && self.copies[at].images.is_some() && !self.is_view_spent()
    }

    // It runs, and whatever becomes of it is its own affair.
    pub(super) fn runs(&mut self, at: usize) {
        if self.copies[at].criu == 0 && self.may_be_stuck(at) {
            log::warn!(
                "the copy blocks every signal, and its CRIU is dead: see whether it runs, or was left half-made"
            );
        }
        log::info!("the copy runs");
        if self.copies[at].criu == 0 {
            self.spend_view();
        }
        let copy = self.drop_copy(at);
        match self.session.settled(&copy.record.session) {
            // Its source may ask once more.
            Some(_) => self.released.push(copy.record),
            None => self.book.remove(&copy.record),
        }
        if let Some(images) = copy.images {
            self.unpin(images);
        }
        if copy.criu == 0 {
            let decision = self.session.restore_ended(true);
            self.decide(decision);
        }
    }

    // Whether an earlier run's copy may be in CRIU's code for ever, since that CRIU is dead. (A program may block every
    // signal too.)
    fn may_be_stuck(&self, at: usize) -> bool {
        let criu = self.copies[at].record.criu.as_ref().map(Identity::open);
        self.is_masked(at) && matches!(criu, Some(Ok(Found::Dead | Found::Another)))
    }

    // Whether an earlier run's copy is in the hands of its CRIU still.
    fn is_in_hand(&self, at: usize) -> bool {
        let copy = &self.copies[at];
        let criu = || copy.record.criu.as_ref().map(Identity::open);
        copy.criu == 0 && self.is_masked(at) && matches!(criu(), Some(Ok(Found::Alive(_))))
    }

    fn is_masked(&self, at: usize) -> bool {
        let root = self.copies[at].tasks.first().and_then(|id| self.conns.get(*id));
        matches!(root, Some(Conn::Task(root)) if root.process.is_masked())
    }

    // Somebody else has continued what is not to run.
    fn stop_again(&self, at: usize) {
        for id in &self.copies[at].tasks {
            if let Some(Conn::Task(task)) = self.conns.get(*id)
                && !task.process.is_traced()
                && !task.process.is_stopping()
            {
                if self.copies[at].phase == Phase::Prepared && !task.process.is_dead() {
                    log::warn!("a task of the copy was continued by somebody else: it is stopped again");
                }
                if let Err(error) = task.process.send(Signal::STOP) {
                    log::error!("a task of the copy can't be stopped: {error}");
                }
            }
        }
    }

    fn stands_ready(&mut self, at: usize) {
        let tasks = self.identities(&self.copies[at].tasks);
        let record = &mut self.copies[at].record;
        record.tasks = tasks;
        record.state = State::Prepared;
        // Without it, nobody could find the copy should this daemon die.
        if let Err(why) = self.book.store(record) {
            return self.fail_copy(at, why);
        }
        log::info!("the copy stands ready ({} processes)", self.copies[at].tasks.len());
        self.times.ready();
        self.copies[at].phase = Phase::Prepared;
        if self.session.prepared() {
            self.tell(relay::PREPARED, "");
        }
    }

    // CRIU has let go of it, and our script has not asked at pre-resume: it runs. That is wrong only if its source
    // may live.
    pub(super) fn runs_unasked(&mut self, at: usize) {
        match self.copies[at].images.clone() {
            Some(images) if !self.is_stored(&images) => {
                log::warn!(
                    "the copy runs, although CRIU's action script has not asked at pre-resume (if it does not, the script \
                     has stopped it: kill -CONT its processes)"
                );
                // In this order: without a record, what is in the view would be restored again.
                self.decide_restored(&images, true);
                self.finish_copy(at);
                self.unpin(images);
            }
            _ => self.fail_copy(at, "it ran without a word of CRIU's action script at pre-resume".into()),
        }
    }
}
