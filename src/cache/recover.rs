//! What an earlier run of the cache has left of the copies that it had to do with, and what the operator says of
//! them.

use std::time::Instant;

use super::copies::{Copy, CopyTask, INSIST, Phase};
use super::{Cache, Conn};
use crate::client::process::Process;
use crate::record::{self, Found, Record, State};
use crate::session::Word;
use crate::session::sink::Heard;

impl Cache {
    /// Goes on where an earlier run has stopped. Its images are gone; what it had made of them is not.
    pub(super) fn recover(&mut self, records: Vec<Record>) -> Result<(), String> {
        for record in records {
            self.recover_copy(record)?;
        }
        Ok(())
    }

    fn recover_copy(&mut self, record: Record) -> Result<(), String> {
        if record.state == State::Stored {
            log::error!(
                "the images of session {} were lost with the earlier run; no copy had been made of them",
                record.session_hex()
            );
            self.book.remove(&record);
            return Ok(());
        }
        let mut tasks = Vec::new();
        for task in &record.tasks {
            let Found::Alive(fd) = record::find(&task.who)? else { continue };
            let watched = Conn::Task(CopyTask { process: Process::new(fd), stays: task.stays });
            let watched = self.conns.insert(watched);
            tasks.push(watched.map_err(|error| format!("a task of the copy can't be watched: {error}"))?);
        }
        let whole = tasks.len() == record.tasks.len() && !tasks.is_empty();
        let (session, state) = (record.session, record.state);
        let now = Instant::now();
        let phase = Phase::Prepared;
        self.copies.push(Copy {
            criu: 0,
            images: None,
            record,
            tasks,
            phase,
            script: None,
            answer: Vec::new(),
            look_at: now,
        });
        let at = self.copies.len() - 1;
        match state {
            State::Prepared if whole => {
                log::info!("the copy stands ready; its source decides");
                self.session.recover(session, None);
                self.unheard = Some(session);
            }
            State::Prepared => {
                log::error!(
                    "a part of the copy that stood ready is dead: what is left of it is killed, and nothing of it can be \
                     released"
                );
                self.kill_copy(at, "a part of it is dead".into());
            }
            State::Released => {
                log::info!("the copy was released: it is continued");
                self.session.recover(session, Some(Word::Release));
                self.unheard = Some(session);
                self.copies[at].phase = Phase::Continued { until: now + INSIST };
            }
            // The source was never told that it stands ready: it lives, as far as this side knows.
            State::Made | State::RolledBack | State::Asking | State::Allowed | State::Stored => {
                log::warn!("the copy was not to run, or its source runs: it is killed");
                self.session.recover(session, Some(Word::Rollback));
                self.kill_copy(at, "the cache was started anew".into());
            }
        }
        Ok(())
    }

    /// The operator decides. What is said is for people; an error is why not.
    pub(super) fn resolve(&mut self, word: Word) -> Result<String, String> {
        let Some(session) = self.session.stored() else {
            return Err("no session waits for a word at this cache".into());
        };
        if self.session.hear(session, word) != Heard::Decides {
            return Err("the session is decided already".into());
        }
        Ok(match word {
            Word::Release => match self.released(session) {
                true => "the copy runs".into(),
                false => "the images are served to a restore now".into(),
            },
            Word::Rollback => {
                self.rolled_back(session, None);
                "the images are dropped, and the copy is killed if there was one".into()
            }
        })
    }
}
