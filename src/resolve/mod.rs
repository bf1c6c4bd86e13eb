//! `criu-relay resolve`: says what is known of sessions that are not decided, and decides one by hand. Where the
//! daemon of its record lives it is asked to; where none does, this does what a daemon started again would do.
//!
//! A short-lived program of its own; it may block.

mod kept;
mod listing;
mod side;

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use self::side::Side;
use crate::cli::{Resolve, Verb};
use crate::record::{Distance, Found, Place, Record, State};
use crate::script::{Daemon, Tree, wait};
use crate::sockets::{check_dir, lock_dir};
use crate::wire::control::Action;

/// How a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The copy runs.
    Commit,
    /// The source runs.
    Rollback,
}

impl Decision {
    /// What it is called.
    pub fn name(self) -> &'static str {
        self.action().name()
    }

    fn action(self) -> Action {
        match self {
            Self::Commit => Action::Commit,
            Self::Rollback => Action::Rollback,
        }
    }

    fn state(self) -> State {
        match self {
            Self::Commit => State::Released,
            Self::Rollback => State::RolledBack,
        }
    }
}

/// Does what is asked for. What is to be said, or why nothing was done.
pub fn run(asked: &Resolve) -> Result<String, String> {
    let dir = asked.work_dir.as_path();
    // Processes are killed by what stands there.
    check_dir(dir)?;
    let here = Place::here().map_err(|error| format!("/proc can't be read: {error}"))?;
    match asked.decision {
        None => listing::list(dir, &here, asked.verbosity > 1),
        Some(decision) => decide(dir, &here, decision, asked.session.as_deref()),
    }
}

fn decide(dir: &Path, here: &Place, decision: Decision, session: Option<&str>) -> Result<String, String> {
    // A daemon that is being started in the meantime waits, and finds what has been decided.
    let lock = lock_dir(dir)?;
    let record = choose(Record::load_all(dir, None)?, dir, session)?;
    let distance = here.distance(&record.place);
    match distance {
        Distance::Elsewhere => return Err(elsewhere(&record)),
        Distance::Rebooted => {}
        Distance::Here => {
            let daemon = record.daemon;
            let found = daemon.open().map_err(|error| format!("process {}: {error}", daemon.pid))?;
            if let Found::Alive(_) = found {
                // It may want to write the record.
                drop(lock);
                return ask(&record, decision);
            }
        }
    }
    let opposite = record.state.is_decided() && record.state != decision.state();
    if opposite {
        return Err(format!(
            "the session {} is decided the other way: its record {} says {}",
            record.session_hex(),
            record.path(dir).display(),
            record.state.name()
        ));
    }
    let again = record.state == decision.state();
    let side = Side { record, dir, distance, again };
    let text = match (side.record.role, decision) {
        (Verb::Cache, Decision::Commit) => side.run_copy(),
        (Verb::Cache, Decision::Rollback) => side.kill_copy(),
        (Verb::Proxy, Decision::Commit) => side.let_copy_run(),
        (Verb::Proxy, Decision::Rollback) => side.let_source_run(),
    };
    drop(lock);
    text
}

/// The record that is meant. `session` is the beginning of its session's name, which may have the role before it.
fn choose(mut records: Vec<Record>, dir: &Path, session: Option<&str>) -> Result<Record, String> {
    if records.is_empty() {
        return Err(format!("{}: no session is open here", dir.display()));
    }
    let name = |record: &Record| format!("{}-{}", record.role.name(), record.session_hex());
    match session {
        Some(session) => records
            .retain(|record| record.session_hex().starts_with(session) || name(record).starts_with(session)),
        // Who has one session to decide means that one.
        None if records.iter().any(|record| !record.state.is_decided()) => {
            records.retain(|record| !record.state.is_decided());
        }
        None => {}
    }
    match (records.pop(), session) {
        (Some(record), _) if records.is_empty() => Ok(record),
        (Some(record), _) => {
            records.push(record);
            let names: Vec<_> = records.iter().map(|record| format!("\n  {}", name(record))).collect();
            let dir = dir.display();
            Err(format!("{dir}: more than one session is meant, name one of these:{}", names.concat()))
        }
        (None, session) => {
            let session = session.unwrap_or_default();
            Err(format!("{}: no session {session} is open here (see criu-relay resolve)", dir.display()))
        }
    }
}

fn elsewhere(record: &Record) -> String {
    let Place { pid_namespace, boot, .. } = &record.place;
    format!(
        "the session {}: the process ids of its record belong to another PID or time namespace (pid:[{pid_namespace}], \
         boot {boot}) and mean nothing here: run this where its daemon ran (nsenter -a -t PID of a process there); \
         if that host has been started anew, all of them are dead, and the other side is to be resolved by itself",
        record.session_hex()
    )
}

/// Has the daemon do it.
fn ask(record: &Record, decision: Decision) -> Result<String, String> {
    let (role, pid) = (record.role.name(), record.daemon.pid);
    let lives = format!("criu-relay {role}, process {pid}, lives");
    // Every request names a process that it comes from.
    let myself = pidfd_open(getpid(), PidfdFlags::empty())
        .map_err(|error| format!("this process can't be watched: {error}"))?;
    // By a descriptor: the daemon may have found the directory by a shorter path than the whole one.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = open(&record.images_dir, flags, Mode::empty())
        .map_err(|error| format!("{lives}, but {}: {error}", record.images_dir.display()))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    let found = Daemon::find(record.role, &short).map_err(|why| format!("{lives}, but {why}"))?;
    let Some(mut daemon) = found else {
        return Err(format!(
            "{lives}, but has no control socket in {}: it is about to end, or stands still; try again when it \
             has ended",
            record.images_dir.display()
        ));
    };
    daemon.ask(decision.action(), myself.as_fd(), &Tree::default())?;
    loop {
        wait(myself.as_fd(), &[daemon.as_fd()], PollFlags::IN)?;
        if let Some(text) = daemon.answer()? {
            let text = if text.is_empty() { "it has agreed" } else { &text };
            return Ok(format!("criu-relay {role}, process {pid}: {text}\n"));
        }
    }
}

/// "1 process is", "2 processes are".
fn processes(n: usize, one: &str, more: &str) -> String {
    if n == 1 { format!("1 process {one}") } else { format!("{n} processes {more}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(role: Verb, first: u8, state: State) -> Record {
        let mut session = [0; 16];
        session[0] = first;
        Record::new(role, session, state).unwrap()
    }

    #[test]
    fn the_session_that_is_meant() {
        use State::{Asking, Prepared, Released};
        let choose = |records: &[Record], session| choose(records.to_vec(), Path::new("/dir"), session);
        assert!(choose(&[], None).unwrap_err().contains("no session is open"));
        let one = record(Verb::Cache, 0xab, Prepared);
        let two = record(Verb::Cache, 0xac, Released);
        let three = record(Verb::Proxy, 0xab, Asking);
        assert_eq!(choose(std::slice::from_ref(&two), None), Ok(two.clone()));
        // The one that is open; but which, when two are?
        assert_eq!(choose(&[one.clone(), two.clone()], None), Ok(one.clone()));
        let all = [one.clone(), two.clone(), three.clone()];
        let why = choose(&all, None).unwrap_err();
        assert!(
            why.contains("\n  cache-ab00") && why.contains("\n  proxy-ab00") && !why.contains("ac00"),
            "{why}"
        );
        assert!(choose(&all, Some("a")).is_err() && choose(&all, Some("ab")).is_err());
        assert_eq!(choose(&all, Some("ac")), Ok(two));
        assert_eq!(choose(&all, Some("proxy")), Ok(three));
        assert_eq!(choose(&all, Some("cache-ab")), Ok(one));
        assert!(choose(&all, Some("ad")).unwrap_err().contains("no session ad is open"));
    }

    #[test]
    fn names() {
        assert_eq!((Decision::Commit.name(), Decision::Rollback.name()), ("commit", "rollback"));
        assert_eq!(processes(1, "is", "are") + &processes(0, " is", "are"), "1 process is0 processes are");
    }
}
