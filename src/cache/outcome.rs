//! What becomes of a session at the cache: stored, decided by its source, published, over.

use std::rc::Rc;

use rustix::io::Errno;

use super::{Cache, Conn, Kind as ListenerKind};
use crate::record::{Record, State};
use crate::session::sink::Heard;
use crate::session::{self, Commit, Word};
use crate::store::Catalog;
use crate::table::Id;
use crate::wire::relay::{self, Kind, SessionId};
use crate::{net, pump};

/// With less than this, in bytes, memory is short: twice what comes in a turn, since an image can take that much
/// while it grows.
const SHORT: u64 = 2 * (pump::LINK_TURN + net::PIPE_SIZE) as u64;

impl Cache {
    // Everything has come.
    pub(super) fn finished(&mut self, id: Id, images: u64, bytes: u64) {
        let Some(Conn::Relay(peer)) = self.conns.get_mut(id) else { return };
        let Some(session) = peer.session() else { return };
        if let Err(why) = self.incoming.check(&self.bodies) {
            return self.close(id, Some(format!("has finished a dump that is none: {why}")));
        }
        let name = peer.name().to_string();
        if self.incoming.scripted
            && let Err(why) = self.open_record(name, session).and_then(|()| self.outlives(session))
        {
            self.close_record(false);
            return self.close(id, Some(format!("was stopped: {why}")));
        }
        let Some(Conn::Relay(peer)) = self.conns.get_mut(id) else { return };
        peer.settled();
        self.peer = None;
        self.preparation_over();
        self.parked.push_back(id);
        session::remember(&mut self.confirmed, (session, images, bytes));
        self.unheard = Some(session);
        self.times.stored(bytes);
        if self.incoming.scripted {
            let images = std::mem::take(&mut self.incoming);
            let what = match self.commit {
                Commit::Stored => "it is served when its source has released it",
                Commit::Restored => "the restore that waits makes the copy",
            };
            log::info!(
                "the dump is stored: {} images, {}; {what}",
                images.len(),
                pump::human(images.bytes())
            );
            self.session.hold(session, self.commit);
            self.stored = Some(Rc::new(images));
            // From here on another one has to wait, if any does.
            self.told_waits = false;
            self.restores_changed = true;
        } else {
            self.session.taken(session);
            self.session_ended(Ok(()));
        }
        self.say(id, Kind::AllStored(relay::AllStored { images, bytes }));
        if self.session.offers() {
            self.offer_view();
            self.answer_all();
        }
        self.wake_parked();
    }

    // So that the operator finds who has the images. Something depends on it only if they outlive this daemon.
    fn open_record(&mut self, peer: String, session: SessionId) -> Result<(), String> {
        let kept = self.kept(self.commit, &self.incoming);
        let needed = kept.is_some();
        let record = self.book.record(session, State::Stored).map(|record| Record { peer, kept, ..record });
        let stored = record.and_then(|record| {
            let record = self.open.insert(record);
            self.book.store(record)
        });
        match stored {
            Err(why) if !needed => {
                log::warn!("{why}");
                Ok(())
            }
            stored => stored,
        }
    }

    pub(super) fn note_open(&self) {
        if let Some(record) = &self.open
            && let Err(why) = self.book.store(record)
        {
            log::warn!("{why}");
        }
    }

    // It is decided. `copied`: the record is that of its copy now.
    fn close_record(&mut self, copied: bool) {
        if let Some(record) = self.open.take()
            && !copied
        {
            self.book.remove(&record);
        }
    }

    // The same when it was released. Of images that outlive us the record stays until the source knows: it may ask the
    // next cache.
    fn release_record(&mut self, copied: bool) {
        match self.open.take_if(|open| !copied && open.kept.is_some()) {
            Some(mut record) => {
                record.state = State::Released;
                if let Err(why) = self.book.store(&record) {
                    log::error!("{why}; should this daemon die now, see criu-relay resolve");
                }
                self.released.push(record);
            }
            None => self.close_record(copied),
        }
    }

    // The source has decided about its images.
    pub(super) fn word(&mut self, id: Id, session: SessionId, word: Word) {
        let known = self.session.hear(session, word);
        let acknowledged = match word {
            Word::Release => Kind::Released(relay::Released { session: session.to_vec() }),
            Word::Rollback => Kind::RolledBack(relay::RolledBack { session: session.to_vec() }),
        };
        match (known, word) {
            (Heard::Decides, Word::Release) => {
                self.released(session);
            }
            (Heard::Decides, Word::Rollback) => {
                if self.rolled_back(session, Some(id)) {
                    return;
                }
            }
            (Heard::Again, Word::Release) => {}
            (Heard::Again, Word::Rollback) => {
                if self.roll_back_copy(session, Some(id)) {
                    return;
                }
            }
            // It is not complete, and perhaps still arriving, on this link or on one that is lost.
            (Heard::Unknown, Word::Rollback) => {
                self.say(id, acknowledged);
                if let Some(peer) = self.peer
                    && matches!(self.conns.get(peer), Some(Conn::Relay(peer)) if peer.session() == Some(session))
                {
                    self.close(peer, Some("has rolled back its dump".into()));
                }
                self.roll_back_aside(session);
                return;
            }
            (Heard::Unknown, Word::Release) => {
                let why = "this cache does not have the images of that session (was it started anew? its copy may run already)";
                log::error!("a source has released a session that is not known here");
                let errno = Errno::SRCH.raw_os_error() as u32;
                return self.say(id, Kind::Error(relay::Error::new(errno, why)));
            }
            (Heard::Contradicts, _) => {
                let why = "the opposite has been said of that session before";
                log::error!("a source's word is not taken: {why}");
                let errno = Errno::INVAL.raw_os_error() as u32;
                return self.say(id, Kind::Error(relay::Error::new(errno, why)));
            }
        }
        self.say(id, acknowledged);
    }

    // The source is dead: its copy runs (true), or is made now.
    pub(super) fn released(&mut self, session: SessionId) -> bool {
        self.times.over();
        let runs = self.release_copy(session);
        self.release_record(runs || self.is_being_copied(session));
        match runs {
            true => log::info!("released by its source"),
            false => log::info!("released by its source: its images are served now"),
        }
        if let Some(images) = self.stored.take() {
            self.publish(images, runs);
        }
        let mut decision = self.session.peer_ended(Ok(()));
        if runs {
            self.tell(relay::SUCCEEDED, "");
            decision = self.session.restore_ended(true);
            self.hide_restored();
            self.tell_times();
        }
        self.decide(decision);
        self.answer_all();
        runs
    }

    // Once, when the copy runs.
    pub(super) fn tell_times(&mut self) {
        if let Some(line) = self.times.take() {
            log::info!("{line}");
        }
    }

    // The source runs on. Whether a copy has to die first; `link` is told then.
    pub(super) fn rolled_back(&mut self, session: SessionId, link: Option<Id>) -> bool {
        log::warn!("rolled back: the source runs on, its images are dropped");
        // Before its record: without that, whoever comes after us would serve them, or not know whose they are.
        self.clear_view();
        let dying = self.roll_back_copy(session, link);
        self.close_record(dying);
        self.drop_stored();
        self.session_ended(Err("its source has rolled it back and runs on".into()));
        dying
    }

    // The source runs on: nobody gets its images any more, and whoever has got some can't go on.
    fn drop_stored(&mut self) {
        let Some(images) = self.stored.take() else { return };
        let at_it = self.conns.iter().filter(|(_, conn)| match conn {
            Conn::Restore(restore) => restore.images.as_ref().is_some_and(|of| Rc::ptr_eq(of, &images)),
            _ => false,
        });
        for id in at_it.map(|(id, _)| id).collect::<Vec<_>>() {
            self.close(id, Some("had to be closed: the source has rolled back its dump".into()));
        }
        self.unpin(images);
    }

    // Before the peer's images are refused for want of memory, what need not stay goes: the last session, if it has
    // been restored and nobody reads it.
    pub(super) fn make_room(&mut self) {
        if self.session.is_receiving() {
            self.make_room_for(SHORT);
        }
    }

    pub(super) fn make_room_for(&mut self, bytes: u64) {
        if self.bodies.left() >= bytes || !self.session.is_restored() {
            return;
        }
        if let Some(images) = self.last.take_if(|images| Rc::strong_count(images) == 1) {
            log::info!(
                "memory is short: the last dump, which has been restored, is dropped: {} images, {}",
                images.len(),
                pump::human(images.bytes())
            );
            // With --keep it may be in the view still: its links would lead to what gets their descriptors next.
            if !self.session.is_busy() {
                self.clear_view();
            }
            self.unpin(images);
        }
    }

    // A complete session is there to be served; unless its copy runs already, to whoever waits in the view too.
    pub(super) fn publish(&mut self, images: Rc<Catalog>, runs: bool) {
        log::info!("the dump is complete: {} images, {}", images.len(), pump::human(images.bytes()));
        if !runs && !self.is_copied(&images) {
            match self.reveal(&images) {
                Ok(()) => self.tell_waiters(Ok(())),
                Err(why) => {
                    log::error!("{why}: the dump can be restored with criu restore --stream only");
                    self.tell_waiters(Err(&why));
                }
            }
        }
        if let Some(old) = self.last.replace(images) {
            if self.session.has_only_copy() {
                log::warn!("the dump before it, of {} images, was never restored; it is dropped", old.len());
            }
            self.unpin(old);
        }
        self.asked.clear();
    }

    pub(super) fn session_ended(&mut self, outcome: Result<(), String>) {
        self.peer = None;
        if self.session.is_receiving() {
            self.preparation_over();
        }
        let failed = outcome.is_err();
        if outcome.is_ok() {
            let images = std::mem::take(&mut self.incoming);
            self.publish(Rc::new(images), false);
        }
        let why = outcome.clone().err();
        let decision = self.session.peer_ended(outcome);
        self.decide(decision);
        if failed {
            self.tell_waiters(Err(&format!("the dump failed: {}", why.unwrap_or_default())));
            self.forget_consumed();
            self.close_early_restores();
            for body in self.followers.keys().copied().collect::<Vec<_>>() {
                self.abort_followers(body);
            }
            // Those who waited for a dump that failed are told so, even if another may come.
            for reader in self.waits.take_all() {
                self.fail(reader);
            }
        } else {
            self.answer_all();
        }
        self.wake_parked();
        // A proxy of ours may come back for what it has not heard.
        if self.session.is_full() && !self.is_awaited() {
            let peers = self.conns.iter().filter(|(_, conn)| match conn {
                Conn::Listener(listener) => listener.kind() == ListenerKind::Peer,
                conn => matches!(conn, Conn::Parked(_)),
            });
            for id in peers.map(|(id, _)| id).collect::<Vec<_>>() {
                // Nobody need come any more: the next one is refused by the kernel.
                self.conns.remove(id);
            }
            self.parked.clear();
        }
    }
}
