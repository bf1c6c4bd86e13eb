//! The proxy and the record of its session: what is written before which step, and what an earlier run has left.

use super::scripted::Task;
use super::{Conn, Proxy};
use crate::client::process::Process;
use crate::record::{self, Found, Identity, Record, State};
use crate::session::source::Decision;
use crate::session::{self, Fate, Word};
use crate::wire::relay::{self, SessionId};

/// A session that is rolled back, while a cache may hold its images and wait for a word: it is told when it is found
/// again.
#[derive(Debug)]
pub struct Owed {
    session: SessionId,
    // What is written of it, if it could have come to more than images.
    record: Option<Record>,
}

impl Owed {
    /// Its name.
    pub fn session(&self) -> SessionId {
        self.session
    }
}

impl Proxy {
    /// The cache is about to be told that this is all. An error: it must not be.
    pub(super) fn record_session(&mut self) -> Result<(), String> {
        let mut record = self.book.record(self.session_id, State::Asking)?;
        record.leave_running = self.policy.leave_running;
        record.criu = self.criu_pid().and_then(|pid| Identity::of(pid).ok());
        if let Some(Conn::Link(link)) = self.link.and_then(|id| self.conns.get(id)) {
            record.peer = link.name().into();
        }
        for task in &self.tasks {
            if let Some(Conn::Process(task)) = self.conns.get(*task)
                && let Some(who) = task.process.pid().and_then(|pid| Identity::of(pid).ok())
            {
                record.tasks.push(record::Task { who, stays: false });
            }
        }
        self.book.store(&record)?;
        self.record = Some(record);
        Ok(())
    }

    /// The session is about to take this step. It can't be stopped by a disk that is full: what has been written
    /// before leads to the same end, if all that is to come after it goes well.
    pub(super) fn note(&mut self, state: State) {
        if let Err(why) = self.write_down(state) {
            log::error!("{why}; should this daemon die now, see criu-relay resolve");
        }
    }

    /// The same for a step that can be left undone.
    pub(super) fn write_down(&mut self, state: State) -> Result<(), String> {
        let Some(record) = &mut self.record else { return Ok(()) };
        record.state = state;
        self.book.store(record)
    }

    /// The session is over. `told`: the cache knows how.
    pub(super) fn close_record(&mut self, told: bool) {
        let Some(record) = self.record.take() else { return };
        if told {
            return self.book.remove(&record);
        }
        log::warn!(
            "the session's record stays in the work directory: start criu-relay proxy there again, or see criu-relay \
             resolve"
        );
        if record.state == State::RolledBack {
            self.owe(record.session, Some(record));
        }
    }

    /// A cache is to be told of this rollback when there is a link again.
    pub(super) fn owe(&mut self, session: SessionId, record: Option<Record>) {
        session::remember(&mut self.owed, Owed { session, record });
    }

    // That is over.
    fn forget(&self, owed: Owed) {
        if let Some(record) = owed.record {
            self.book.remove(&record);
        }
    }

    /// The cache has heard it.
    pub(super) fn no_longer_owed(&mut self, session: &[u8]) {
        if let Some(at) = self.owed.iter().position(|owed| owed.session[..] == *session)
            && let Some(owed) = self.owed.remove(at)
        {
            self.forget(owed);
        }
    }

    /// What is to be told first on a link.
    pub(super) fn owed_words(&self) -> Vec<relay::Kind> {
        let rollback = |owed: &Owed| relay::Rollback { session: owed.session.to_vec() };
        self.owed.iter().map(|owed| relay::Kind::Rollback(rollback(owed))).collect()
    }

    /// Goes on where an earlier run has stopped.
    pub(super) fn recover(&mut self, records: Vec<Record>) -> Result<(), String> {
        for record in records {
            if record.state == State::RolledBack {
                self.owe(record.session, Some(record));
                continue;
            }
            if self.record.is_some() {
                return Err(
                    "the work directory has the records of two sessions: see criu-relay resolve".into()
                );
            }
            self.recover_session(record)?;
        }
        Ok(())
    }

    fn recover_session(&mut self, record: Record) -> Result<(), String> {
        self.session_id = record.session;
        let mut dead = 0;
        for task in &record.tasks {
            match record::find(&task.who)? {
                Found::Alive(fd) => {
                    let task = self.watch_task(Process::new(fd), false)?;
                    self.tasks.push(task);
                }
                Found::Dead | Found::Another => dead += 1,
            }
        }
        // If CRIU was not let go, it was not CRIU who killed them.
        self.broken = dead > 0 && record.state == State::Allowed;
        if let Some(criu) = &record.criu
            && let Found::Alive(fd) = record::find(criu)?
        {
            self.last_criu = Some(self.watch_task(Process::new(fd), true)?);
        }
        let word = (record.state == State::Released).then_some(Word::Release);
        self.session.recover(word, record.leave_running);
        self.record = Some(record);
        if word.is_some() {
            return Ok(());
        }
        if self.tasks.is_empty() {
            self.source_died();
        } else if self.last_criu.is_none() {
            self.criu_ended();
        }
        Ok(())
    }

    fn watch_task(&mut self, process: Process, criu: bool) -> Result<crate::table::Id, String> {
        let watched = self.conns.insert(Conn::Process(Task::new(process, criu)));
        watched.map_err(|error| format!("a process of the last session can't be watched: {error}"))
    }

    /// The operator decides. What is said is for people; an error is why not.
    pub(super) fn resolve(&mut self, word: Word) -> Result<String, String> {
        if !self.session.is_scripted() || !self.session.has_all() {
            return match (word == Word::Rollback).then(|| self.owed.pop_front()).flatten() {
                Some(owed) => {
                    self.forget(owed);
                    Ok("a session that was rolled back is not told of to a cache any more".into())
                }
                None => Err("nothing is open at this proxy".into()),
            };
        }
        let lives = self.fate() != Fate::Dead;
        let decision = match (word, lives) {
            (Word::Release, true) => {
                return Err("the source lives, and two would run: roll back, or kill it first".into());
            }
            (Word::Rollback, false) => {
                return Err("nothing of the source is left: rolling back would lose the process".into());
            }
            (Word::Rollback, true) if self.last_criu.is_some() => {
                return Err(
                    "CRIU is at it, and may be about to kill the source: try again when it has ended".into(),
                );
            }
            _ => self.session.resolve(word),
        };
        if decision == Decision::Nothing {
            return Err("the session goes on by itself, and CRIU is at it: there is nothing to decide".into());
        }
        self.peer_knows = matches!(decision, Decision::Over(_));
        self.decide(decision);
        Ok(match word {
            Word::Release => {
                "the source is dead and the session is over here: if the cache has not been told, run \
                              criu-relay resolve commit on its host"
                    .into()
            }
            Word::Rollback => {
                "the source runs on: if the cache can't be told, run criu-relay resolve rollback on its \
                               host"
                    .into()
            }
        })
    }
}
