//! The proxy and CRIU's action script: who has announced itself, who is held at `post-dump`, and whether the
//! source is dead, or will not run again.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::prepare::Wanted;
use super::{Conn, Policy, Proxy};
use crate::client::control::Controlled;
use crate::client::process::Process;
use crate::peer::Protocol;
use crate::record::State;
use crate::session::source::Decision;
use crate::session::{Commit, Dialect, Fate, Word};
use crate::table::Id;
use crate::wire::control::{Action, Request};
use crate::{net, pump};

const INVISIBLE: &str = "this CRIU's process id is not visible to criu-relay proxy: start the proxy in CRIU's PID \
                         namespace, or in one around it";

const NO_RESTORE: &str = "no criu restore waits at the cache: start it first (criu restore --stream --action-script \
                          criu-relay, CRIU 3.19 or later, and with -D the cache's; where the cache has a view, \
                          criu-relay wait -D VIEW, and then criu restore -D VIEW with the script), or start \
                          criu-relay proxy with --commit stored";

/// How long a dump waits for a restore that may have been started in the same moment. Nothing is frozen yet.
const RESTORE_GRACE: Duration = Duration::from_secs(3);

/// How often it is looked for whether the source has been killed, once CRIU was let go; and for how long. A process
/// tells that it is dead when all of its memory has been freed, which takes time. But none that has a SIGKILL runs
/// again: CRIU has stopped them all in the kernel, and that lets none of these out.
pub const LOOK: Duration = Duration::from_millis(2);
const LOOK_FOR: Duration = Duration::from_secs(10);

/// A process that is watched.
#[derive(Debug)]
pub struct Task {
    pub(super) process: Process,
    /// Whether it is a CRIU, and not a task of the source.
    criu: bool,
}

impl Task {
    /// A process that is watched from now on.
    pub fn new(process: Process, criu: bool) -> Self {
        Self { process, criu }
    }
}

/// A CRIU that has announced itself. (A restore may have, too: nothing says which it is.)
#[derive(Debug)]
pub struct Announced {
    /// As seen from here.
    pid: i32,
    process: Id,
}

/// A script whose CRIU has not frozen anything yet, and waits for our leave.
#[derive(Debug)]
pub struct Waiting {
    client: Id,
    since: Instant,
    /// The memory that is to be prepared, at `pre-dump`.
    wanted: Option<Wanted>,
}

/// A script that holds CRIU at `post-dump`.
#[derive(Debug)]
pub struct Held {
    client: Id,
    /// When it is too late, unless something moves.
    pub until: Instant,
    progress: u64,
    /// Commit `restored`: by when the copy has to stand ready.
    prepared_by: Option<Instant>,
}

impl Waiting {
    /// When it is to be looked at again.
    pub fn wake_at(&self, policy: &Policy, now: Instant) -> Instant {
        let prepared = self.wanted.as_ref().and_then(|wanted| wanted.until(policy.prepare_timeout));
        let limits = [self.since + RESTORE_GRACE, self.since + policy.confirm_timeout];
        limits.into_iter().chain(prepared).filter(|limit| *limit > now).min().unwrap_or(now)
    }

    /// Who it is.
    pub fn client(&self) -> Id {
        self.client
    }

    /// What it waits for.
    pub fn wanted(&self) -> Option<&Wanted> {
        self.wanted.as_ref()
    }

    /// The same.
    pub fn wanted_mut(&mut self) -> Option<&mut Wanted> {
        self.wanted.as_mut()
    }
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
                    Action::PreStream => self.announce(id, request.criu, None),
                    Action::PreDump => match self.check_dump(&request) {
                        Ok(()) => {
                            let wanted = self.wanted(request.memory, request.sizes);
                            self.announce(id, request.criu, wanted);
                        }
                        Err(why) => self.reply(id, Err(&why)),
                    },
                    Action::PostDump => self.post_dump(id, request),
                    Action::PreRestore | Action::PostRestore | Action::PreResume | Action::Wait => {
                        self.reply(id, Err("this is criu-relay proxy, which restores nothing"));
                    }
                    Action::Commit => self.resolved(id, Word::Release),
                    Action::Rollback => self.resolved(id, Word::Rollback),
                }
            }
            Err(why) => self.close(id, Some(why)),
        }
    }

    // The operator has said it.
    fn resolved(&mut self, id: Id, word: Word) {
        let said = self.resolve(word);
        if let Some(Conn::Control(control)) = self.conns.remove(id) {
            control.verdict(said.as_deref().map_err(String::as_str));
        }
    }

    // Tells a script whether CRIU may go on.
    fn reply(&mut self, id: Id, verdict: Result<(), &str>) {
        if let Some(Conn::Control(control)) = self.conns.remove(id) {
            control.verdict(verdict.map(|()| ""));
        }
    }

    fn announce(&mut self, id: Id, criu: OwnedFd, wanted: Option<Wanted>) {
        // 0, as which it would be seen here, is what every process is that is not visible.
        let Some(pid) = net::pidfd_pid(criu.as_fd()) else {
            return self.reply(id, Err(INVISIBLE));
        };
        if !self.announced.iter().any(|announced| announced.pid == pid) {
            match self.conns.insert(Conn::Process(Task::new(Process::new(criu), true))) {
                Ok(process) => self.announced.push(Announced { pid, process }),
                Err(error) => return self.reply(id, Err(&format!("CRIU can't be watched: {error}"))),
            }
        }
        self.waiting.push(Waiting { client: id, since: Instant::now(), wanted });
    }

    // Whether a tree that is about to be frozen can be dumped at all.
    fn check_dump(&self, request: &Request<OwnedFd>) -> Result<(), String> {
        if self.cache_limit > 0 && request.memory > self.cache_limit {
            return Err(format!(
                "the tree has {} of memory, and the cache may use {} (--memory-limit there): raise it, or start the \
                 cache with --spill-dir",
                pump::human(request.memory),
                pump::human(self.cache_limit)
            ));
        }
        let network = |pid: Option<i32>| fs::read_link(format!("/proc/{}/ns/net", pid?)).ok();
        let root = request.tasks.first().and_then(|root| network(net::pidfd_pid(root.as_fd())));
        let criu = network(net::pidfd_pid(request.criu.as_fd()));
        let ours = network(Some(std::process::id() as i32));
        // CRIU locks the network of a tree that has its own: ours would be cut off with it.
        if root.is_some() && root == ours && criu.is_some() && root != criu {
            return Err(
                "criu-relay proxy runs in the network namespace of the tree, which CRIU locks while it dumps: start \
                 the proxy in the namespace of CRIU"
                    .into(),
            );
        }
        Ok(())
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
                Some(Protocol::Relay) if self.needs_restore() && !self.cache_restores => Some(Err(format!(
                    "{} is too old for --commit restored: use the same criu-relay there, or start the proxy with \
                     --commit stored",
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

    fn needs_restore(&self) -> bool {
        self.policy.commit == Commit::Restored
    }

    // Whether a dump needs a restore that waits, and there is none.
    pub(super) fn lacks_restore(&self) -> bool {
        let confirms = self.link.and_then(|id| self.conns.get(id));
        let confirms = matches!(confirms, Some(Conn::Link(link)) if link.protocol() == Some(Protocol::Relay));
        confirms && self.needs_restore() && !self.restore_waits
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
        } else if self.criu_pid() != Some(pid) {
            Some("the dump that is in progress is another CRIU's")
        } else if request.tasks.is_empty() {
            Some("no task of the source was named")
        } else {
            None
        };
        if let Some(why) = refused {
            return self.reply(id, Err(why));
        }
        self.broken = false;
        for fd in request.tasks {
            let process = Process::new(fd);
            // One that nobody has waited for yet: it is no part of what lives.
            if process.is_dead() {
                continue;
            }
            match self.conns.insert(Conn::Process(Task::new(process, false))) {
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
        self.held = Some(Held { client: id, until, progress: self.sender.progress(), prepared_by: None });
        self.check_held();
    }

    // The process id of the CRIU whose dump is in progress, if it is visible.
    pub(super) fn criu_pid(&self) -> Option<i32> {
        match self.capture.and_then(|id| self.conns.get(id)) {
            Some(Conn::Capture(capture)) => Some(capture.pid()).filter(|pid| *pid != 0),
            _ => None,
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
        if let Err(why) = self.write_down(State::Allowed) {
            // Should CRIU and this daemon die in the middle of the killing, nobody would know that there was any.
            let revoked = self.session.revoked(&why);
            if revoked != Decision::Nothing {
                return self.decide(revoked);
            }
        }
        match self.policy.commit {
            Commit::Stored => log::info!("the cache has confirmed everything: CRIU goes on"),
            Commit::Restored => log::info!("the copy stands ready: CRIU goes on"),
        }
        if let Some(held) = self.held.take() {
            self.reply(held.client, Ok(()));
        }
        // Whoever restores afterwards may want what the source holds until all of it is gone: its file locks.
        self.killed_until = match self.policy.commit {
            Commit::Restored => Some(Instant::now() + LOOK_FOR),
            Commit::Stored => None,
        };
        if self.tasks.is_empty() {
            self.source_died();
        }
    }

    pub(super) fn tick_killed(&mut self, now: Instant) {
        self.killed_until.take_if(|until| *until <= now);
        if self.killed_until.is_some() && self.session.is_being_killed() && self.fate() == Fate::Dead {
            log::debug!("every process of the source has its SIGKILL");
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
        self.note(State::RolledBack);
        self.say_word(Word::Rollback);
    }

    // CRIU has closed its connection: it has ended, or is about to.
    pub(super) fn criu_ended(&mut self) {
        if !self.session.is_scripted() {
            return;
        }
        self.note_deaths();
        let was_asking = self.record.as_ref().is_some_and(|record| record.state == State::Asking);
        let fate = match self.fate() {
            // CRIU had no leave: what is dead has ended by itself, or somebody else has killed it.
            Fate::Broken if was_asking => Fate::Lives,
            fate => fate,
        };
        let decision = self.session.criu_ended(fate);
        self.decide(decision);
    }

    // CRIU was killed in the middle of its killing.
    pub(super) fn finish_source(&mut self) {
        log::warn!("CRIU has ended when it had killed a part of the source: the rest is killed too");
        for task in &self.tasks {
            if let Some(Conn::Process(task)) = self.conns.get(*task)
                && let Err(error) = task.process.send(Signal::KILL)
            {
                log::error!("a task of the source can't be killed, the copy waits for that: {error}");
            }
        }
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

    // What of the source is left. (Whoever sees CRIU sees its tree.)
    pub(super) fn fate(&self) -> Fate {
        let lives = |id: &Id| match self.conns.get(*id) {
            // Unless it has died since.
            Some(Conn::Process(task)) => !task.process.is_killed() && !task.process.is_dead(),
            _ => false,
        };
        let left = self.tasks.iter().filter(|id| lives(id)).count();
        match left {
            0 => Fate::Dead,
            _ if self.broken || left < self.tasks.len() => Fate::Broken,
            _ => Fate::Lives,
        }
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
            if self.last_criu == Some(id) {
                self.last_criu = None;
                self.criu_ended();
            }
            return;
        }
        self.tasks.retain(|task| *task != id);
        self.broken = true;
        log::debug!("a process of the source is dead, {} are left", self.tasks.len());
        if self.tasks.is_empty() {
            self.source_died();
        }
    }

    pub(super) fn source_died(&mut self) {
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
        if let Some(at) = self.waiting.iter().position(|waiting| waiting.client == id) {
            let waiting = self.waiting.remove(at);
            self.unprepare(&waiting);
        }
        if self.held.as_ref().is_some_and(|held| held.client == id) {
            self.note_deaths();
            if self.fate() == Fate::Dead {
                // They were killed together: the images are all that is left, and what was asked for stands.
                let decision = self.session.criu_ended(Fate::Dead);
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
        if !self.waiting.is_empty() {
            let readiness = self.readiness();
            let lacks = self.lacks_restore();
            for mut waiting in std::mem::take(&mut self.waiting) {
                let waits = |limit: Duration| now < waiting.since + limit;
                let verdict = match &readiness {
                    Some(Ok(())) if !lacks => self.is_prepared(&mut waiting, now),
                    Some(Ok(())) if !waits(RESTORE_GRACE) => Some(Err(NO_RESTORE.into())),
                    Some(Err(why)) => Some(Err(why.clone())),
                    None if !waits(self.policy.confirm_timeout) => {
                        Some(Err("there is no link to the cache yet (--confirm-timeout)".into()))
                    }
                    _ => None,
                };
                let Some(verdict) = verdict else {
                    self.waiting.push(waiting);
                    continue;
                };
                match verdict {
                    Ok(()) => self.times.begin(),
                    Err(_) => self.unprepare(&waiting),
                }
                self.reply(waiting.client, verdict.as_ref().copied().map_err(String::as_str));
            }
        }
        let unscripted = self.held.is_some() && !self.session.is_scripted();
        if unscripted && self.pipes.is_empty() && self.sender.is_idle() {
            // --accept-unconfirmed: all that can be known.
            if let Some(held) = self.held.take() {
                log::warn!("CRIU goes on: everything is sent, and nothing is confirmed");
                self.reply(held.client, Ok(()));
            }
        }
        // Without a link nothing can move: how long that may last is --reconnect's.
        let torn = self.session.is_torn();
        if let Some(held) = &mut self.held {
            let progress = self.sender.progress();
            if self.session.is_preparing() {
                let until = *held.prepared_by.get_or_insert(now + self.policy.restore_timeout);
                held.until = until;
                if until <= now {
                    let seconds = self.policy.restore_timeout.as_secs();
                    self.failed(format!(
                        "the copy does not stand ready after {seconds} s (--restore-timeout)"
                    ));
                }
            } else if progress != held.progress || torn {
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
