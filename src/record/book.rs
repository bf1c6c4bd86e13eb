//! The records of one daemon.

use std::path::PathBuf;

use super::{Distance, Found, Identity, Place, Record, State};
use crate::cli::Verb;
use crate::sockets;
use crate::wire::relay::SessionId;

/// Where a daemon keeps its records, and what it says of itself in them.
#[derive(Debug)]
pub struct Book {
    role: Verb,
    work_dir: PathBuf,
    images_dir: PathBuf,
}

impl Book {
    /// Those of the daemon whose control socket is in `images_dir` (absolute).
    pub fn new(role: Verb, work_dir: PathBuf, images_dir: PathBuf) -> Self {
        Self { role, work_dir, images_dir }
    }

    /// Takes over what an earlier run of this daemon has left, once our sockets accept: from then on
    /// `criu-relay resolve` asks us. An error is a sentence.
    pub fn take_over(&self) -> Result<Vec<Record>, String> {
        let _lock = sockets::lock_dir(&self.work_dir)?;
        let wrong = |error| format!("who we are can't be found out: {error}");
        let (here, myself) = (Place::here().map_err(wrong)?, Identity::of_myself().map_err(wrong)?);
        let mut records = Record::load_all(&self.work_dir, Some(self.role))?;
        for record in &mut records {
            match here.distance(&record.place) {
                Distance::Here => {}
                // Whoever it names is dead, and has no number here.
                Distance::Rebooted => {
                    record.tasks.iter_mut().for_each(|task| task.who.pid = 0);
                    record.criu = None;
                }
                Distance::Elsewhere => {
                    return Err(format!(
                        "the record {} was made in another PID namespace, in which its process ids mean something: \
                         start this daemon there, or with another -W",
                        record.path(&self.work_dir).display()
                    ));
                }
            }
            // Nobody else can be: it has our sockets' places. But a mistake here would cost a process.
            if here == record.place
                && record.daemon != myself
                && let Found::Alive(_) = find(&record.daemon)?
            {
                return Err(format!(
                    "the record {} belongs to a daemon that is running, process {}: choose another -W",
                    record.path(&self.work_dir).display(),
                    record.daemon.pid
                ));
            }
            record.place = here.clone();
            record.daemon = myself;
            record.images_dir.clone_from(&self.images_dir);
            record.store(&self.work_dir)?;
            log::warn!(
                "session {} was left undecided or untold ({}) by an earlier run: it is finished now",
                record.session_hex(),
                record.state.name()
            );
        }
        Ok(records)
    }

    /// A new record of ours; it is not written yet.
    pub fn record(&self, session: SessionId, state: State) -> Result<Record, String> {
        let record = Record::new(self.role, session, state);
        let mut record = record.map_err(|error| format!("no record of the session can be made: {error}"))?;
        record.images_dir.clone_from(&self.images_dir);
        Ok(record)
    }

    /// Writes it.
    pub fn store(&self, record: &Record) -> Result<(), String> {
        record.store(&self.work_dir)
    }

    /// The session is finished, and everybody knows.
    pub fn remove(&self, record: &Record) {
        if let Err(why) = record.remove(&self.work_dir) {
            log::warn!("{why}");
        }
    }
}

/// Of whom nothing can be found out, nothing is taken for granted: an error is a sentence.
pub fn find(who: &Identity) -> Result<Found, String> {
    who.open().map_err(|error| format!("process {} can't be looked for: {error}", who.pid))
}
