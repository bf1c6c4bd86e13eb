//! The proxy and CRIU's action script: who has announced itself, who is held at `post-dump`, and whether the
//! source is dead.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use super::{Conn, Proxy};
use crate::client::control::Controlled;
use crate::client::process::Process;
use crate::net;
use crate::peer::Protocol;
use crate::session::{Dialect, Word};
use crate::table::Id;
use crate::wire::control::{Action, Request};

const INVISIBLE: &str = "this CRIU's process id is not visible to criu-relay proxy: start the proxy in CRIU's PID \
                         namespace, or in one around it";

/// SIGKILL in the masks of /proc/PID/status.
const SIGKILL: u64 = 1 << 8;

/// A process that is watched.
#[derive(Debug)]
pub struct Task {
    pub(super) process: Process,
    /// Whether it is a CRIU, and not a task of the source.
    criu: bool,
}

/// A CRIU that has announced itself. (A restore may have, too: nothing says which it is.)
#[derive(Debug)]
pub struct Announced {
    /// As seen from here.
    pid: i32,
    process: Id,
}

/// A script that holds CRIU at `post-dump`.
#[derive(Debug)]
pub struct Held {
    client: Id,
    /// When it is too late, unless something moves.
    pub until: Instant,
    progress: u64,
}

impl Proxy {
    pub(super) fn step_control(&mut self, id: Id) {
        let Some(Conn::Control(control)) = self.conns.get_mut(id) else { return };
        match control.step(&mut self.block) {
            Ok(Controlled::Wait) => self.settle(id),
            Ok(Controlled::End) => self.close(id, None),
            Ok(Controlled::Request(request)) => {
                self.settle(id);
                log::debug!("the action script: {}", request.action.name());
                match request.action {
                    Action::PreStream | Action::PreDump => self.announce(id, request.criu),
                    Action::PostDump => self.post_dump(id, request),
                    Action::PostRestore | Action::PreResume => {
                        self.reply(id, Err("this is criu-relay proxy, which restores nothing"));
                    }
                }
            }
            Err(why) => self.close(id, Some(why)),
        }
    }

    // Tells a script whether CRIU may go on.
    fn reply(&mut self, id: Id, verdict: Result<(), &str>) {
        if let Some(Conn::Control(control)) = self.conns.remove(id) {
            control.verdict(verdict);
        }
    }

    fn announce(&mut self, id: Id, criu: OwnedFd) {
        // 0, as which it would be seen here, is what every process is that is not visible.
        let Some(pid) = net::pidfd_pid(criu.as_fd()) else {
            return self.reply(id, Err(INVISIBLE));
        };
        if !self.announced.iter().any(|announced| announced.pid == pid) {
            match self.conns.insert(Conn::Process(Task { process: Process::new(criu), criu: true })) {
                Ok(process) => self.announced.push(Announced { pid, process }),
                Err(error) => return self.reply(id, Err(&format!("CRIU can't be watched: {error}"))),
            }
        }
        self.waiting.push((id, Instant::now() + self.policy.confirm_timeout));
    }

    // Whether the CRIU of this capture connection has announced itself.
    pub(super) fn is_announced(&self, capture: Id) -> bool {
        match self.conns.get(capture) {
            Some(Conn::Capture(capture)) => {
                self.announced.iter().any(|announced| announced.pid == capture.pid())
            }
            _ => false,
        }
    }

    // Whether a dump that is announced may freeze its process. None: that is not known yet.
    fn readiness(&mut self) -> Option<Result<(), String>> {
        if let Err(why) = self.has_room_for_dump() {
            return Some(Err(why.into()));
        }
        if !self.session.is_idle() {
            return None;
        }
        match self.link.and_then(|id| self.conns.get(id)) {
            Some(Conn::Link(link)) if self.session.is_linked() => match link.protocol() {
                Some(Protocol::Seed) if !self.policy.accept_unconfirmed => Some(Err(format!(
                    "{} speaks the seed protocol only, in which nothing can be confirmed: use criu-relay cache \
                     there, or start the proxy with --accept-unconfirmed",
                    link.name()
                ))),
                Some(_) => Some(Ok(())),
                None => None,
            },
            _ => match &self.dialer {
                Some(dialer) if dialer.is_in_vain() => Some(Err(dialer.why_not_yet())),
                Some(_) => None,
                None if self.link.is_none() => Some(Err("the inherited connection is gone".into())),
                None => None,
            },
        }
    }

    fn post_dump(&mut self, id: Id, request: Request<OwnedFd>) {
        // What CRIU has asked for before it started the script is there.
        if let Some(capture) = self.capture {
            self.read_capture(capture);
        }
        let pid = net::pidfd_pid(request.criu.as_fd()).unwrap_or(0);
        let refused = if self.held.is_some() {
            Some("CRIU is held already")
        } else if !self.session.is_running() {
            Some("no dump is in progress at this proxy (has it failed?)")
        } else if !self.session.is_scripted() && !self.policy.accept_unconfirmed {
            Some("this dump was not announced, or not to a cache that confirms")
        } else if self.session.dialect() != Some(Dialect::Stream) {
            Some("the dump is one of criu --remote, which can't be confirmed")
        } else if !self.is_of_session(pid) {
            Some("the dump that is in progress is another CRIU's")
        } else if request.tasks.is_empty() {
            Some("no task of the source was named")
        } else {
            None
        };
        if let Some(why) = refused {
            return self.reply(id, Err(why));
        }
        for fd in request.tasks {
            match self.conns.insert(Conn::Process(Task { process: Process::new(fd), criu: false })) {
                Ok(task) => self.tasks.push(task),
                Err(error) => {
                    let why = format!("a task of the source can't be watched: {error}");
                    self.reply(id, Err(&why));
                    return self.failed(why);
                }
            }
        }
        log::info!("CRIU is held until the cache has confirmed everything ({} processes)", self.tasks.len());
        let until = Instant::now() + self.policy.confirm_timeout;
        self.held = Some(Held { client: id, until, progress: self.sender.progress() });
        self.check_held();
    }

    // Whether this process id is that of the CRIU whose dump is in progress.
    fn is_of_session(&self, pid: i32) -> bool {
        match self.capture.and_then(|id| self.conns.get(id)) {
            Some(Conn::Capture(capture)) => pid != 0 && capture.pid() == pid,
            _ => false,
        }
    }

    // Whether everything of a scripted dump has come: CRIU is held, and its pipes are empty.
    pub(super) fn check_held(&mut self) {
        if self.held.is_some()
            && self.pipes.is_empty()
            && self.session.is_running()
            && self.session.is_scripted()
        {
            let outcome = self.images.check_stream();
            let decision = self.session.held(outcome);
            self.decide(decision);
        }
    }

    pub(super) fn allow(&mut self) {
        log::info!("the cache has confirmed everything: CRIU goes on");
        if let Some(held) = self.held.take() {
            self.reply(held.client, Ok(()));
        }
        if self.tasks.is_empty() {
            self.source_died();
        }
    }

    // The source runs on: CRIU fails, and the cache is told.
    pub(super) fn deny(&mut self, why: &str) {
        log::error!("the dump failed: {why}; the source runs on, the cache is told to roll back");
        if let Some(held) = self.held.take() {
            self.reply(held.client, Err(why));
        }
        self.drop_criu();
        self.forget_tasks();
        self.say_word(Word::Rollback);
    }

    // CRIU has closed its connection: it has ended, or is about to.
    pub(super) fn criu_ended(&mut self) {
        if !self.session.is_scripted() {
            return;
        }
        self.note_deaths();
        let lives = self.source_lives();
        let decision = self.session.criu_ended(lives);
        self.decide(decision);
    }

    // Whether a script waits for an answer at `post-dump`.
    pub(super) fn is_unanswered(&self) -> bool {
        self.held.is_some() && !self.session.is_scripted()
    }

    // Looks for tasks of the source that have died and have not been told of yet.
    fn note_deaths(&mut self) {
        for task in self.tasks.clone() {
            self.step_process(task);
        }
    }

    // Whether a task of the source lives, with no SIGKILL on its way. (Whoever sees CRIU sees its tree.)
    fn source_lives(&self) -> bool {
        self.tasks.iter().any(|id| match self.conns.get(*id) {
            Some(Conn::Process(task)) => {
                let killed = task.process.pid().is_some_and(is_killed);
                // Unless it has died since.
                !killed && !task.process.is_dead()
            }
            _ => false,
        })
    }

    pub(super) fn step_process(&mut self, id: Id) {
        let Some(Conn::Process(task)) = self.conns.get(id) else { return };
        if task.process.is_dead() {
            self.close(id, None);
        }
    }

    pub(super) fn process_gone(&mut self, id: Id, task: &Task, why: Option<String>) {
        if let Some(why) = why {
            // Without it nothing can be said of the source.
            return self.failed(format!("a process that is watched {why}"));
        }
        if task.criu {
            self.announced.retain(|announced| announced.process != id);
            return;
        }
        self.tasks.retain(|task| *task != id);
        log::debug!("a process of the source is dead, {} are left", self.tasks.len());
        if self.tasks.is_empty() {
            self.source_died();
        }
    }

    fn source_died(&mut self) {
        let decision = self.session.source_died();
        self.decide(decision);
    }

    fn forget_tasks(&mut self) {
        for task in std::mem::take(&mut self.tasks) {
            self.conns.remove(task);
        }
    }

    // A script has gone, or can't be understood.
    pub(super) fn script_gone(&mut self, id: Id, why: Option<String>) {
        if let Some(why) = &why {
            log::warn!("the action script {why}");
        }
        self.waiting.retain(|(waiting, _)| *waiting != id);
        if self.held.as_ref().is_some_and(|held| held.client == id) {
            self.note_deaths();
            if !self.source_lives() {
                // They were killed together: the images are all that is left, and what was asked for stands.
                let decision = self.session.criu_ended(false);
                return self.decide(decision);
            }
            self.held = None;
            self.failed("CRIU's action script has gone before it was answered".into());
        }
    }

    // The session is over; `why`: it has failed.
    pub(super) fn script_over(&mut self, why: Option<&String>) {
        if let Some(held) = self.held.take() {
            self.reply(held.client, why.map_or(Ok(()), |why| Err(why.as_str())));
        }
        self.forget_tasks();
    }

    pub(super) fn tick_scripts(&mut self, now: Instant) {
        if !self.waiting.is_empty()
            && let Some(verdict) = self.readiness()
        {
            for (id, _) in std::mem::take(&mut self.waiting) {
                self.reply(id, verdict.as_ref().copied().map_err(String::as_str));
            }
        }
        while let Some(at) = self.waiting.iter().position(|(_, until)| *until <= now) {
            let (id, _) = self.waiting.remove(at);
            self.reply(id, Err("there is no link to the cache yet (--confirm-timeout)"));
        }
        let unscripted = self.held.is_some() && !self.session.is_scripted();
        if unscripted && self.pipes.is_empty() && self.sender.is_idle() {
            // --accept-unconfirmed: all that can be known.
            if let Some(held) = self.held.take() {
                log::warn!("CRIU goes on: everything is sent, and nothing is confirmed");
                self.reply(held.client, Ok(()));
            }
        }
        if let Some(held) = &mut self.held {
            let progress = self.sender.progress();
            if progress != held.progress {
                held.progress = progress;
                held.until = now + self.policy.confirm_timeout;
            } else if held.until <= now {
                let seconds = self.policy.confirm_timeout.as_secs();
                held.until = now + self.policy.confirm_timeout;
                let why = format!("the cache has not confirmed for {seconds} s (--confirm-timeout)");
                if self.session.is_source_dead() && self.session.has_all() {
                    log::warn!("{why}; it is waited for, since the source is dead");
                }
                self.failed(why);
            }
        }
    }
}

// Whether a process dies as soon as it may.
fn is_killed(pid: i32) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    status.lines().any(|line| match line.split_once(":\t") {
        Some(("SigPnd" | "ShdPnd", mask)) => {
            u64::from_str_radix(mask, 16).is_ok_and(|mask| mask & SIGKILL != 0)
        }
        _ => false,
    })
}
