//! The cache and its peer: who may be it, what comes from it, and what its end means.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use rustix::io::Errno;

use super::{Cache, Conn, MAX_PARKED, PARKED_AT_LEAST};
use crate::peer::receiver::{Arrival, Parked, Shown};
use crate::peer::relay::{Event, RelayPeer, Turn};
use crate::reactor::{Exit, Pollable};
use crate::record::{Record, State};
use crate::session::sink::Heard;
use crate::session::{self, Commit, Word};
use crate::store::{BodyId, Catalog, catalog};
use crate::table::Id;
use crate::wire::Key;
use crate::wire::relay::{self, Hello, Kind, SessionId, Welcome};
use crate::{net, pump};

/// With less than this, in bytes, memory is short: twice what comes in a turn, since an image can take that much
/// while it grows.
const SHORT: u64 = 2 * (pump::LINK_TURN + net::PIPE_SIZE) as u64;

impl Cache {
    pub(super) fn park(&mut self, fd: OwnedFd) -> Result<(), String> {
        let address = rustix::net::getpeername(&fd).ok().flatten();
        let address: SocketAddr = match address.and_then(|address| address.try_into().ok()) {
            Some(address) => address,
            None => return Err("it is gone already".into()),
        };
        if !self.allowed.is_empty() && !self.allowed.iter().any(|allowed| allowed.admits(address)) {
            return Err(format!("{address} is not among those that --allow-peer names"));
        }
        // With --keep the next peer waits its turn: refused, its whole session might be lost in the backlog. And
        // a proxy whose session is stored here may have to come back for the outcome, or one for the rest of its session.
        let takes = self.session.takes_peers() || self.is_awaited();
        let has_peer = self.session.is_receiving() && !self.session.stays() && !self.may_be_resumed();
        if !takes || has_peer {
            return Err(format!("{address}: this cache has its peer"));
        }
        let now = Instant::now();
        if self.parked.len() >= MAX_PARKED {
            let is_old = |id: &Id| match self.conns.get(*id) {
                Some(Conn::Parked(parked)) => now >= parked.since() + PARKED_AT_LEAST && parked.is_silent(),
                Some(Conn::Relay(peer)) => now >= peer.since() + PARKED_AT_LEAST && peer.is_silent(),
                _ => true,
            };
            // The youngest of those that have had their time: the oldest may be a proxy that waits for its dump.
            match self.parked.iter().rev().copied().find(is_old) {
                Some(old) => self.close(old, Some("has to make room: it has sent nothing yet".into())),
                None => return Err(format!("{address}: {MAX_PARKED} connections wait already")),
            }
        }
        let parked = Conn::Parked(Parked::new(fd, address.to_string(), now));
        let id = self.conns.insert(parked).map_err(|error| error.to_string())?;
        self.parked.push_back(id);
        Ok(())
    }

    // Whether a proxy may come back for what it has not heard, or for what it has to say.
    fn is_awaited(&self) -> bool {
        !self.confirmed.is_empty() || self.session.knows_any()
    }

    fn is_silent(&self, id: Id) -> bool {
        match self.conns.get(id) {
            Some(Conn::Parked(parked)) => parked.is_silent(),
            Some(Conn::Relay(peer)) => peer.is_silent(),
            _ => true,
        }
    }

    // Whether somebody who waits for this session to end has sent something.
    pub(super) fn has_waiting_peer(&self) -> bool {
        self.parked.iter().any(|id| !self.is_silent(*id))
    }

    // Looks at those who connected before it first: a proxy's sessions become complete in their order.
    pub(super) fn step_parked(&mut self, id: Id) {
        for parked in self.parked.clone() {
            self.look_at(parked);
            if parked == id {
                break;
            }
        }
    }

    fn look_at(&mut self, id: Id) {
        let choice = self.choice;
        let Some(Conn::Parked(parked)) = self.conns.get_mut(id) else { return };
        match parked.step(choice, &mut self.block) {
            Ok(Shown::Nothing) => self.settle(id),
            Ok(Shown::Closed) => self.close(id, None),
            Ok(Shown::Hello(hello)) => self.greet(id, &hello),
            Ok(Shown::Wrong(why)) => self.refuse(id, &why),
            // It waits until the session that is in progress is over.
            Ok(Shown::Peer) if self.session.is_busy() && self.session.stays() => {}
            Ok(Shown::Peer) => match self.session.peer() {
                Ok(()) => self.promote(id),
                Err(why) => self.close(id, Some(why.into())),
            },
            Err(why) => self.close(id, Some(why)),
        }
    }

    // A proxy of ours has said hello.
    fn greet(&mut self, id: Id, hello: &Hello) {
        let known = relay::session_id(&hello.session).is_ok_and(|session| {
            self.session.stored() == Some(session) || self.session.settled(&session).is_some()
        });
        if !self.session.takes_peers() && !known {
            return self.refuse(id, "was refused: this cache has its dump already (--keep takes another)");
        }
        let welcome = Welcome {
            major: relay::MAJOR,
            minor: relay::MINOR,
            run: self.run.to_vec(),
            memory_limit: self.bodies.hard_limit().unwrap_or(0),
            restore_waits: self.has_waiting_restore(),
        };
        self.replace_parked(id, |conn| match conn {
            Conn::Parked(parked) => Conn::Relay(parked.welcome(welcome)),
            other => other,
        });
    }

    // Tells a proxy of ours why it is not taken, and closes.
    fn refuse(&mut self, id: Id, why: &str) {
        match self.conns.remove(id) {
            Some(Conn::Parked(parked)) => {
                let name = parked.name().to_string();
                parked.refuse(&format!("the cache says that this proxy {why}"));
                self.unpark(id, &name, Some(why.into()));
            }
            Some(Conn::Relay(peer)) => {
                let name = peer.name().to_string();
                peer.abandon(Errno::BUSY, &format!("this proxy {why}"), &mut self.bodies);
                self.unpark(id, &name, Some(why.into()));
            }
            _ => {}
        }
    }

    // Another kind of connection on the same socket; it keeps its place.
    fn replace_parked(&mut self, id: Id, into: impl FnOnce(Conn) -> Conn) {
        let Some(conn) = self.conns.remove(id) else { return };
        match self.conns.insert(into(conn)) {
            Ok(new) => {
                self.parked.iter_mut().filter(|other| **other == id).for_each(|other| *other = new);
                self.conns.again(new);
            }
            Err(error) => {
                self.parked.retain(|other| *other != id);
                log::warn!("a connection can't be polled: {error}");
            }
        }
    }

    // One that waited is gone.
    pub(super) fn unpark(&mut self, id: Id, name: &str, why: Option<String>) {
        self.parked.retain(|other| *other != id);
        if let Some(why) = why {
            log::warn!("{name} {why}");
        }
        if self.inherited && self.confirmed.is_empty() {
            log::error!("{name} is gone before it had sent anything");
            self.exit = Some(Exit::Failed);
        }
        if self.inherited && self.session.stored().is_some() {
            log::error!(
                "{name} is gone, and with it whoever could release the images: end this cache by two signals"
            );
        }
    }

    pub(super) fn promote(&mut self, id: Id) {
        let Some(Conn::Parked(parked)) = self.conns.remove(id) else { return };
        self.parked.retain(|other| *other != id);
        self.dump_begins(parked.name(), false);
        match self.conns.insert(Conn::Peer(parked.promote())) {
            Ok(id) => {
                self.peer = Some(id);
                self.conns.again(id);
            }
            Err(error) => self.session_ended(Err(format!("the peer can't be polled: {error}"))),
        }
    }

    fn dump_begins(&mut self, from: &str, scripted: bool) {
        let served = match (scripted, self.commit) {
            (true, Commit::Stored) => "it is scripted: it is served when its source has released it",
            (true, Commit::Restored) => {
                "it is scripted: its copy is made when it is stored, and runs when its source has released it"
            }
            (false, _) => "it is not scripted: it is served as soon as it is complete",
        };
        log::info!("a dump begins, from {from}; {served}");
        if scripted {
            // A restore that has not announced itself need not wait for it.
            self.answer_all();
        }
        if !self.session.stays() {
            // With --keep, one that has sent something may have sent a whole session.
            for other in self.parked.clone() {
                if self.is_silent(other) || !self.session.keeps() {
                    self.close(other, Some("was refused: another connection is the peer".into()));
                }
            }
        }
    }

    pub(super) fn step_relay(&mut self, id: Id) {
        let Some(Conn::Relay(peer)) = self.conns.get_mut(id) else { return };
        if let Some(hello) = peer.offered().cloned() {
            // Nobody goes away who wants to hear that his images are stored.
            return match net::has_ended(peer.fd()) {
                true => self.close(id, Some("closed while its session had to wait".into())),
                false => self.offered(id, &hello),
            };
        }
        self.make_room();
        let Some(Conn::Relay(peer)) = self.conns.get_mut(id) else { return };
        let mut events = Vec::new();
        let turn =
            peer.step(&mut self.incoming, &mut self.bodies, &mut self.block, &mut self.conduit, &mut events);
        for event in events {
            self.happened(id, event);
        }
        match turn {
            Ok(Turn::Wait) => self.settle(id),
            Ok(Turn::Again) => {
                self.busy = true;
                self.conns.again(id);
                self.settle(id);
            }
            Ok(Turn::End) => match self.peer == Some(id) {
                true => self.link_lost(id, "closed before the dump was finished".into()),
                false => self.close(id, None),
            },
            Ok(Turn::Lost(why)) => self.link_lost(id, why),
            Ok(Turn::Fallback) => self.replace_parked(id, |conn| match conn {
                Conn::Relay(peer) => Conn::Parked(Parked::fallen_back(peer.into_parts())),
                other => other,
            }),
            Err(why) => self.close(id, Some(why)),
        }
    }

    fn happened(&mut self, id: Id, event: Event) {
        match event {
            Event::Hello(hello) => self.offered(id, &hello),
            Event::Opened(key, body) => {
                self.arriving.insert(key.clone(), body);
                self.answer_waiting(&key);
            }
            Event::Grown(body) => {
                for follower in self.followers.get(&body).into_iter().flatten() {
                    self.conns.again(*follower);
                }
            }
            Event::Complete(key, body, end) => {
                self.has_arrived(&key, body);
                for follower in self.followers.remove(&body).into_iter().flatten() {
                    self.complete_for(follower, body, end);
                }
                self.answer_waiting(&key);
            }
            Event::Aborted(key, body) => {
                self.has_arrived(&key, body);
                self.abort_followers(body);
            }
            Event::Finished(images, bytes) => self.finished(id, images, bytes),
            Event::Word(session, word) => self.word(id, session, word),
            Event::Resume(session, run) => self.resume(id, session, &run),
            Event::Settled(session) => {
                if self.unheard == Some(session) {
                    self.unheard = None;
                }
                self.forget_released(Some(session));
            }
            Event::Failed(why) if self.peer == Some(id) => {
                self.close(id, Some(format!("has failed the dump: {why}")));
            }
            Event::Failed(why) => self.close(id, Some(format!("says: {why}"))),
        }
    }

    pub(super) fn say(&mut self, id: Id, kind: Kind) {
        if let Some(Conn::Relay(peer)) = self.conns.get_mut(id) {
            peer.say(kind);
            self.settle(id);
        }
    }

    // A session wants to begin.
    fn offered(&mut self, id: Id, hello: &Hello) {
        // With --keep it waits until the one that is in progress is over, in the order in which they came.
        if self.session.is_busy() && self.session.stays() {
            return self.settle(id);
        }
        let settled =
            relay::session_id(&hello.session).ok().and_then(|session| self.session.settled(&session));
        if settled.is_some() {
            return self.refuse(id, "was refused: that session is over");
        }
        if let Err(why) = self.session.peer() {
            return self.refuse(id, why);
        }
        let Some(Conn::Relay(peer)) = self.conns.get_mut(id) else { return };
        peer.accept();
        let name = peer.name().to_string();
        self.parked.retain(|other| *other != id);
        self.peer = Some(id);
        self.incoming.scripted = hello.scripted;
        self.commit = match hello.commit {
            relay::COMMIT_RESTORED => Commit::Restored,
            _ => Commit::Stored,
        };
        self.dump_begins(&name, hello.scripted);
        self.conns.again(id);
    }

    // Everything has come.
    fn finished(&mut self, id: Id, images: u64, bytes: u64) {
        let Some(Conn::Relay(peer)) = self.conns.get_mut(id) else { return };
        let Some(session) = peer.session() else { return };
        if let Err(why) = self.incoming.check(&self.bodies) {
            return self.close(id, Some(format!("has finished a dump that is none: {why}")));
        }
        peer.settled();
        self.peer = None;
        self.parked.push_back(id);
        session::remember(&mut self.confirmed, (session, images, bytes));
        self.unheard = Some(session);
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
            self.open_record(id, session);
            // From here on another one has to wait, if any does.
            self.told_waits = false;
            self.restores_changed = true;
        } else {
            self.session.taken(session);
            self.session_ended(Ok(()));
        }
        self.say(id, Kind::AllStored(relay::AllStored { images, bytes }));
        if self.session.offers() {
            self.answer_all();
        }
        self.wake_parked();
    }

    // So that the operator finds who has the images. Nothing depends on it: they go with this daemon.
    fn open_record(&mut self, link: Id, session: SessionId) {
        let name = match self.conns.get(link) {
            Some(Conn::Relay(peer)) => peer.name().to_string(),
            _ => String::new(),
        };
        match self.book.record(session, State::Stored) {
            Ok(record) => self.open = Some(Record { peer: name, ..record }),
            Err(why) => log::warn!("{why}"),
        }
        self.note_open();
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

    // The source has decided about its images.
    fn word(&mut self, id: Id, session: SessionId, word: Word) {
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
        let runs = self.release_copy(session);
        self.close_record(runs || self.is_being_copied(session));
        match runs {
            true => log::info!("released by its source"),
            false => log::info!("released by its source: its images are served now"),
        }
        if let Some(images) = self.stored.take() {
            self.publish(images);
        }
        let mut decision = self.session.peer_ended(Ok(()));
        if runs {
            self.tell(relay::SUCCEEDED, "");
            decision = self.session.restore_ended(true);
        }
        self.decide(decision);
        self.answer_all();
        runs
    }

    // The source runs on. Whether a copy has to die first; `link` is told then.
    pub(super) fn rolled_back(&mut self, session: SessionId, link: Option<Id>) -> bool {
        log::warn!("rolled back: the source runs on, its images are dropped");
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

    pub(super) fn relay_gone(&mut self, id: Id, peer: RelayPeer, why: Option<String>) {
        let name = peer.name().to_string();
        if self.peer != Some(id) {
            return self.unpark(id, &name, why);
        }
        let why = why.unwrap_or_default();
        let errno = peer.errno();
        peer.abandon(errno, &format!("the session has failed: this proxy {why}"), &mut self.bodies);
        self.session_ended(Err(format!("the peer {name} {why}")));
    }

    pub(super) fn step_peer(&mut self, id: Id) {
        self.make_room();
        let Some(Conn::Peer(peer)) = self.conns.get_mut(id) else { return };
        let mut complete = Vec::new();
        let arrival = peer.step(&mut self.incoming, &mut self.bodies, &mut self.block, &mut complete);
        for key in complete {
            self.answer_waiting(&key);
        }
        match arrival {
            Ok(Arrival::Wait) => self.settle(id),
            Ok(Arrival::Again) => {
                self.busy = true;
                self.conns.again(id);
            }
            Ok(Arrival::End) => {
                self.conns.remove(id);
                let outcome = self.incoming.check(&self.bodies);
                self.session_ended(outcome);
            }
            Err(why) => self.close(id, Some(why)),
        }
    }

    // Before the peer's images are refused for want of memory, what need not stay goes: the last session, if it has
    // been restored and nobody reads it.
    fn make_room(&mut self) {
        if self.bodies.left() >= SHORT || !self.session.is_receiving() || !self.session.is_restored() {
            return;
        }
        if let Some(images) = self.last.take_if(|images| Rc::strong_count(images) == 1) {
            log::info!(
                "memory is short: the last dump, which has been restored, is dropped: {} images, {}",
                images.len(),
                pump::human(images.bytes())
            );
            self.unpin(images);
        }
    }

    // A complete session is there to be served.
    fn publish(&mut self, images: Rc<Catalog>) {
        log::info!("the dump is complete: {} images, {}", images.len(), pump::human(images.bytes()));
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
        let failed = outcome.is_err();
        if outcome.is_ok() {
            let images = std::mem::take(&mut self.incoming);
            self.publish(Rc::new(images));
        }
        let decision = self.session.peer_ended(outcome);
        self.decide(decision);
        if failed {
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
                Conn::Listener(listener) => listener.kind() == super::Kind::Peer,
                conn => matches!(conn, Conn::Parked(_)),
            });
            for id in peers.map(|(id, _)| id).collect::<Vec<_>>() {
                // Nobody need come any more: the next one is refused by the kernel.
                self.conns.remove(id);
            }
            self.parked.clear();
        }
    }

    // An image no longer arrives: it is complete, or never will be.
    fn has_arrived(&mut self, key: &Key, body: BodyId) {
        if self.arriving.get(key) == Some(&body) {
            self.arriving.remove(key);
        }
    }

    // There is something to be read under this name.
    fn answer_waiting(&mut self, key: &Key) {
        if !catalog::waits_for_the_end(key) {
            for reader in self.waits.take(key) {
                self.answer(reader);
            }
        }
    }

    pub(super) fn answer_all(&mut self) {
        for reader in self.waits.take_all() {
            self.answer(reader);
        }
    }

    fn wake_parked(&mut self) {
        for parked in self.parked.clone() {
            self.conns.again(parked);
        }
    }
}
