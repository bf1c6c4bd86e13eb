//! Deciding a session without its daemon: what has to hold before, and what is done.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, pidfd_send_signal, test_kill_process};

use super::{Decision, processes};
use crate::client::process::is_killed;
use crate::net;
use crate::record::{Distance, Found, Record, State, Task};

/// How long a process may take to die.
const DYING: Duration = Duration::from_secs(10);

/// What a process of a record is doing now.
pub enum Fate {
    Lives(OwnedFd),
    /// It lives, and dies as soon as it may.
    Dying,
    Dead,
    Another,
}

pub fn fate(task: &Task, distance: Distance) -> Result<Fate, String> {
    if distance == Distance::Rebooted {
        return Ok(Fate::Dead);
    }
    let pid = task.who.pid;
    Ok(match task.who.open().map_err(|error| format!("process {pid} can't be looked at: {error}"))? {
        Found::Alive(fd) => match is_killed(pid) {
            // What was read may have been of another by then.
            _ if net::is_readable(fd.as_fd()) => Fate::Dead,
            true => Fate::Dying,
            false => Fate::Lives(fd),
        },
        Found::Dead => Fate::Dead,
        Found::Another => Fate::Another,
    })
}

/// A session without a daemon.
pub struct Side<'a> {
    pub record: Record,
    /// Where the record is.
    pub dir: &'a Path,
    pub distance: Distance,
    /// It is decided this way already.
    pub again: bool,
}

impl Side<'_> {
    fn fates(&self) -> impl Iterator<Item = Result<(&Task, Fate), String>> {
        self.record.tasks.iter().map(|task| Ok((task, fate(task, self.distance)?)))
    }

    // First the word, then the deed: whoever comes after us, should we die in between, does it again.
    pub(super) fn write(&mut self, state: State) -> Result<(), String> {
        self.record.state = state;
        self.record.store(self.dir)
    }

    // What a daemon will do with the record.
    fn kept(&self) -> String {
        let role = self.record.role.name();
        format!(
            "The record {} says so: criu-relay {role}, started again with -W {}, tells the other side",
            self.record.path(self.dir).display(),
            self.dir.display()
        )
    }

    /// Commit on the destination.
    pub fn run_copy(mut self) -> Result<String, String> {
        let kept = match self.remains()? {
            Some((kept, remains)) if !self.can_copy_run()? => return self.let_restore(&kept, remains),
            kept => kept,
        };
        if self.record.state == State::Stored {
            return Err(format!(
                "the session {}: its images have gone with the cache, and no copy was made of them: if the source \
                 lives, roll back on both hosts; if it does not, the process is lost",
                self.record.session_hex()
            ));
        }
        if self.record.state == State::Made {
            return Err(format!(
                "the session {}: its copy has not been stopped before it ran, and its source was never told that \
                 it stands ready: the copy can't be trusted to be whole; criu-relay resolve rollback kills it",
                self.record.session_hex()
            ));
        }
        if !self.again {
            self.check_source()?;
            self.check_copy()?;
            self.write(State::Released)?;
        }
        if let Some((_, mut remains)) = kept {
            // Nobody makes another.
            remains.hide()?;
        }
        let (mut continued, mut stay) = (0, 0);
        for found in self.fates() {
            match found? {
                (task, Fate::Lives(_)) if task.stays => stay += 1,
                (task, Fate::Lives(fd)) => {
                    send(task, &fd, Signal::CONT)?;
                    continued += 1;
                }
                _ => {}
            }
        }
        let already = self.already();
        let stay = match stay {
            0 => String::new(),
            stay => format!(", {} as stopped as on the source", processes(stay, "is", "are")),
        };
        Ok(format!(
            "The copy runs{already}: {} continued{stay}.\n{}.\n",
            processes(continued, "was", "were"),
            self.kept()
        ))
    }

    // Whether there is a copy that is to run: whole; or, once it is decided, what lives of it.
    fn can_copy_run(&self) -> Result<bool, String> {
        let mut alive = 0;
        for found in self.fates() {
            alive += usize::from(matches!(found?.1, Fate::Lives(_)));
        }
        Ok(match self.record.state {
            State::Prepared => alive == self.record.tasks.len() && alive > 0,
            State::Released => alive > 0,
            _ => false,
        })
    }

    pub(super) fn already(&self) -> &'static str {
        if self.again { " (it was decided already, and is done again)" } else { "" }
    }

    // Whether all of the copy is there to run.
    fn check_copy(&self) -> Result<(), String> {
        if self.record.tasks.is_empty() {
            return Err("the record names no process, so that nothing could be continued".into());
        }
        for found in self.fates() {
            let (task, fate) = found?;
            let now = match fate {
                Fate::Lives(fd) => {
                    may_signal(task, &fd)?;
                    continue;
                }
                Fate::Dying => "is being killed",
                Fate::Dead => "is dead",
                Fate::Another => "is dead, and its number belongs to another process now",
            };
            return Err(format!(
                "process {} of the copy {now}: the copy is not whole, and its images have gone with the cache. If \
                 the source lives, roll back on both hosts; if it does not, the process is lost",
                task.who.pid
            ));
        }
        Ok(())
    }

    /// Rollback on the destination.
    pub fn kill_copy(mut self) -> Result<String, String> {
        let mut kept = self.remains()?;
        if self.record.tasks.is_empty()
            && let Some((kept, remains)) = kept
        {
            return self.drop_images(&kept, remains);
        }
        if !self.again {
            for found in self.fates() {
                if let (task, Fate::Another) = found? {
                    return Err(format!(
                        "process {} was one of the copy, and its number belongs to another process now: nothing \
                         is killed. See criu-relay resolve -v for what is left of the copy, kill that by hand, \
                         and remove {}",
                        task.who.pid,
                        self.record.path(self.dir).display()
                    ));
                }
            }
            self.check_signals()?;
            self.write(State::RolledBack)?;
        }
        let killed = self.kill_all()?;
        let images = match &mut kept {
            Some((kept, remains)) => {
                remains.remove()?;
                format!("Its images in {} are removed.\n", kept.dir.display())
            }
            None => String::new(),
        };
        Ok(format!(
            "The copy is dead{}: {} killed, {} dead before.\n{images}{}.\n",
            self.already(),
            processes(killed, "was", "were"),
            processes(self.record.tasks.len() - killed, "was", "were"),
            self.kept()
        ))
    }

    // Whether each process of the copy that lives can be killed.
    fn check_signals(&self) -> Result<(), String> {
        for found in self.fates() {
            if let (task, Fate::Lives(fd)) = found? {
                may_signal(task, &fd)?;
            }
        }
        Ok(())
    }

    // Kills what lives of the copy, and waits until it is dead. How many that were.
    pub(super) fn kill_all(&self) -> Result<usize, String> {
        self.check_signals()?;
        let mut alive = 0;
        for found in self.fates() {
            match found? {
                (task, Fate::Lives(fd)) => {
                    send(task, &fd, Signal::KILL)?;
                    alive += 1;
                }
                (_, Fate::Dying) => alive += 1,
                _ => {}
            }
        }
        let end = Instant::now() + DYING;
        self.record.tasks.iter().try_for_each(|task| self.wait_for(task, end))?;
        Ok(alive)
    }

    fn wait_for(&self, task: &Task, end: Instant) -> Result<(), String> {
        if self.distance == Distance::Rebooted {
            return Ok(());
        }
        let pid = task.who.pid;
        let found = task.who.open().map_err(|error| format!("process {pid} can't be looked at: {error}"))?;
        let Found::Alive(fd) = found else { return Ok(()) };
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)], Some(&left)) {
                Ok(0) => {
                    return Err(format!(
                        "process {pid} of the copy was killed and has not died in {} s (does a dead disk hold it?): \
                         try again",
                        DYING.as_secs()
                    ));
                }
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(format!("poll failed: {error}")),
            }
        }
    }

    /// Commit on the source's side.
    pub fn let_copy_run(mut self) -> Result<String, String> {
        if self.again {
            return Ok(self.told(Decision::Commit));
        }
        // With --leave-running two are wanted.
        if !self.record.leave_running {
            self.check_tasks_named()?;
            for found in self.fates() {
                let (task, fate) = found?;
                let pid = task.who.pid;
                match fate {
                    Fate::Dead | Fate::Another => {}
                    Fate::Dying => {
                        return Err(format!(
                            "process {pid} of the source is being killed and not dead yet: try again"
                        ));
                    }
                    Fate::Lives(_) => {
                        return Err(format!(
                            "process {pid} of the source lives, so that two would run: criu-relay resolve rollback \
                             lets it; or kill it first"
                        ));
                    }
                }
            }
        }
        self.write(State::Released)?;
        Ok(self.told(Decision::Commit))
    }

    /// Rollback on the source's side.
    pub fn let_source_run(mut self) -> Result<String, String> {
        if self.again {
            return Ok(self.told(Decision::Rollback));
        }
        self.check_tasks_named()?;
        if self.record.state == State::Allowed
            && let Some(criu) = self.record.criu
            && let Fate::Lives(_) | Fate::Dying = fate(&Task { who: criu, stays: false }, self.distance)?
        {
            return Err(format!(
                "CRIU, process {}, was let go and may be about to kill the source: try again when it has ended",
                criu.pid
            ));
        }
        let mut lives = 0;
        for found in self.fates() {
            if let (_, Fate::Lives(_)) = found? {
                lives += 1;
            }
        }
        if lives == 0 {
            return Err(
                "nothing of the source is left, so that rolling back would lose the process: criu-relay \
                        resolve commit lets the copy run"
                    .into(),
            );
        }
        self.write(State::RolledBack)?;
        Ok(self.told(Decision::Rollback))
    }

    fn check_tasks_named(&self) -> Result<(), String> {
        if self.record.tasks.is_empty() {
            return Err(
                "the record names no process of the source, so that nobody can tell whether it lives: see \
                        for yourself, and resolve the cache's side on its host"
                    .into(),
            );
        }
        Ok(())
    }

    fn told(&self, decision: Decision) -> String {
        let (what, name) = match decision {
            Decision::Commit => ("the copy is to run", decision.name()),
            Decision::Rollback => ("the source runs, and the copy is to go", decision.name()),
        };
        let already = if self.again { " already" } else { "" };
        let peer = match self.record.peer.as_str() {
            "" => String::new(),
            peer => format!(" ({})", peer.escape_debug()),
        };
        format!(
            "Recorded{already}: {what}.\nThe cache{peer} has to be told: start criu-relay proxy again with -W {}, or \
             run criu-relay resolve {name} on the cache's host.\n",
            self.dir.display()
        )
    }
}

fn may_signal(task: &Task, fd: &OwnedFd) -> Result<(), String> {
    let pid = Pid::from_raw(task.who.pid.max(0)).ok_or("a record names process 0")?;
    match test_kill_process(pid) {
        Err(error) if !net::is_readable(fd.as_fd()) => {
            Err(format!("process {pid} can't be sent a signal: {error}"))
        }
        _ => Ok(()),
    }
}

fn send(task: &Task, fd: &OwnedFd, signal: Signal) -> Result<(), String> {
    match pidfd_send_signal(fd, signal) {
        // It has died by itself.
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(format!("process {} can't be sent a signal: {error}", task.who.pid)),
    }
}
