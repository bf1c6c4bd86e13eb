//! What an earlier run of the cache has left of the copies that it had to do with, and of the images that outlive it
//! (`--view DIR --persist`); and what the operator says of them.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use super::copies::{Copy, CopyTask, INSIST, Phase};
use super::{Cache, Conn};
use crate::client::process::Process;
use crate::pump;
use crate::record::{self, Found, Kept, Record, State};
use crate::session::sink::Heard;
use crate::session::{Commit, Word};
use crate::store::Catalog;
use crate::view::Left;
use crate::wire::Key;

impl Cache {
    /// Goes on where an earlier run has stopped. What it had made of its images is there; so are they, if they were to
    /// outlive it. An error is a sentence.
    pub(super) fn recover(&mut self, records: Vec<Record>, left: Left) -> Result<(), String> {
        // Nothing is written of a session that is not scripted; of one that is over, only in the view.
        let scripted =
            records.iter().any(|record| record.kept.as_ref().is_some_and(|kept| self.is_view(kept)));
        let (images, mut withheld) = match left {
            Left::Nothing => (None, None),
            Left::Complete(files, marked) => (Some(self.take_back_images(files, scripted || marked)?), None),
            Left::Withheld(session, files) => (Some(self.take_back_images(files, true)?), Some(session)),
        };
        // Whether somebody else is to have them: a copy that was made of them, or nobody.
        let mut spent = false;
        for record in records {
            let ours = record.kept.as_ref().is_some_and(|kept| self.is_view(kept));
            if let Some(kept) = record.kept.as_ref().filter(|_| !ours && record.tasks.is_empty()) {
                return Err(format!(
                    "the images of session {} were kept in {}: start the cache with --view {1} --persist",
                    record.session_hex(),
                    kept.dir.display()
                ));
            }
            let images = images.clone().filter(|_| ours);
            if withheld == Some(record.session) {
                withheld = None;
            }
            spent |= match (&record.state, &images) {
                (State::Stored, Some(images)) => {
                    self.recover_stored(record, images)?;
                    true
                }
                (State::Released, Some(images)) if record.tasks.is_empty() => {
                    self.recover_released(record, images)?;
                    true
                }
                _ => self.recover_copy(record, images)?,
            };
        }
        if let Some(session) = withheld {
            return Err(format!(
                "the view holds the images of session {}, which its source has not released as far as is known here, and \
                 there is no record of it: start the cache with the -W of the earlier run; or, if that is lost, see \
                 whether the source runs, and remove the images or rename their inventory",
                record::hex(&session)
            ));
        }
        match images {
            Some(images) if !spent => self.serve_again(images)?,
            Some(images) => self.unpin(images),
            None => {}
        }
        Ok(())
    }

    fn is_view(&self, kept: &Kept) -> bool {
        self.shown.view.as_ref().is_some_and(|view| view.dir() == kept.dir)
    }

    fn take_back_images(
        &mut self,
        files: Vec<(Key, OwnedFd)>,
        scripted: bool,
    ) -> Result<Rc<Catalog>, String> {
        let mut images = Catalog::default();
        images.scripted = scripted;
        for (key, file) in files {
            let body =
                self.bodies.adopt(file).map_err(|error| format!("{key} can't be used again: {error}"))?;
            images.complete(key, body, &mut self.bodies);
        }
        log::info!(
            "an earlier run has left {} images, {}, in the view",
            images.len(),
            pump::human(images.bytes())
        );
        Ok(Rc::new(images))
    }

    // They can be restored, and nobody has.
    fn serve_again(&mut self, images: Rc<Catalog>) -> Result<(), String> {
        images.check_stream()?;
        self.publish(images, false);
        let decision = self.session.peer_ended(Ok(()));
        self.decide(decision);
        Ok(())
    }

    // Its source has not decided, or was not heard.
    fn recover_stored(&mut self, record: Record, images: &Rc<Catalog>) -> Result<(), String> {
        let whole = record.kept.as_ref();
        let whole = whole.filter(|kept| (kept.images, kept.bytes) == (images.len() as u64, images.bytes()));
        let Some(kept) = whole else {
            return Err(format!(
                "the images of session {} are not those that were stored: there are {}, {} bytes",
                record.session_hex(),
                images.len(),
                images.bytes()
            ));
        };
        log::info!("the dump is stored; its source decides");
        self.session.hold(record.session, kept.commit);
        if kept.commit == Commit::Restored {
            // The restore that had waited has gone, or has failed.
            self.session.copying();
            self.session.copy_failed();
        }
        self.stored = Some(Rc::clone(images));
        self.take_back();
        self.unheard = Some(record.session);
        self.open = Some(record);
        Ok(())
    }

    // Its source is dead, and may not know that we do.
    fn recover_released(&mut self, record: Record, images: &Rc<Catalog>) -> Result<(), String> {
        log::info!("the dump was released by its source");
        self.session.recover(record.session, Some(Word::Release));
        self.unheard = Some(record.session);
        self.released.push(record);
        self.serve_again(Rc::clone(images))
    }

    // Whether its images are not to be served by now.
    fn recover_copy(&mut self, record: Record, images: Option<Rc<Catalog>>) -> Result<bool, String> {
        if record.state == State::Stored {
            log::error!(
                "the images of session {} were lost with the earlier run; no copy had been made of them",
                record.session_hex()
            );
            self.book.remove(&record);
            return Ok(false);
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
        // Should it die, its images wait for their word still.
        let kept = Record { state: State::Stored, tasks: Vec::new(), criu: None, ..record.clone() };
        self.copies.push(Copy {
            criu: 0,
            images: images.clone(),
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
                if images.is_some() {
                    (self.stored, self.open) = (images, Some(kept));
                    self.take_back();
                }
            }
            State::Prepared => {
                let lost = if images.is_some() { "" } else { ", and nothing of it can be released" };
                log::error!(
                    "a part of the copy that stood ready is dead: what is left of it is killed{lost}"
                );
                if images.is_some() {
                    // Another copy can be made if its source is dead.
                    self.session.hold(session, Commit::Restored);
                    self.session.copying();
                    self.unheard = Some(session);
                    (self.stored, self.open) = (images, Some(kept));
                    self.take_back();
                }
                self.kill_copy(at, "a part of it is dead".into());
            }
            State::Released => {
                log::info!("the copy was released: it is continued");
                self.session.recover(session, Some(Word::Release));
                // One that was made when its source was dead has a name of its own, of which no proxy ever hears.
                if !self.copies[at].record.peer.is_empty() {
                    self.unheard = Some(session);
                }
                self.copies[at].phase = Phase::Continued { until: now + INSIST };
                self.last = images;
            }
            // The source was never told that it stands ready: it lives, as far as this side knows.
            State::Made | State::RolledBack | State::Asking | State::Allowed | State::Stored => {
                log::warn!("the copy was not to run, or its source runs: it is killed");
                self.session.recover(session, Some(Word::Rollback));
                // Its record goes with it, and without that they would be served.
                self.clear_view();
                self.kill_copy(at, "the cache was started anew".into());
            }
        }
        Ok(true)
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
