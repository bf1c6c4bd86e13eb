//! The cache and its peer: who may be it, what comes from it, and what its end means.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;

use super::{Cache, Conn, MAX_PARKED, PARKED_AT_LEAST};
use crate::net;
use crate::peer::receiver::{Arrival, Parked, Shown};
use crate::peer::relay::{Event, RelayPeer, Turn};
use crate::reactor::{Exit, Pollable};
use crate::session::Commit;
use crate::store::{BodyId, catalog};
use crate::table::Id;
use crate::wire::Key;
use crate::wire::relay::{self, Hello, Kind, Welcome};

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
    pub(super) fn is_awaited(&self) -> bool {
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
        self.clear_view();
        self.dump_takes_prepared();
        self.times.begin();
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
                // One that has been replaced meanwhile is gone: what has replaced it has an event of its own.
                let is_last = self.incoming.get(&key).is_some_and(|image| image.body == body);
                let shown = if is_last { self.show(&key, body) } else { Ok(()) };
                if let Err(why) = shown {
                    return self.close(id, Some(why));
                }
                for follower in self.followers.remove(&body).into_iter().flatten() {
                    self.complete_for(follower, body, end);
                }
                self.answer_waiting(&key);
            }
            Event::Aborted(key, body) => {
                self.has_arrived(&key, body);
                self.abort_followers(body);
            }
            Event::Prepare(bytes, sizes) => self.prepare(id, bytes, sizes),
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
            let shown = self.incoming.get(&key).map_or(Ok(()), |image| self.show(&key, image.body));
            if let Err(why) = shown {
                return self.close(id, Some(why));
            }
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

    // An image no longer arrives: it is complete, or never will be.
    pub(super) fn has_arrived(&mut self, key: &Key, body: BodyId) {
        if self.arriving.get(key) == Some(&body) {
            self.arriving.remove(key);
        }
    }

    // There is something to be read under this name.
    pub(super) fn answer_waiting(&mut self, key: &Key) {
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

    pub(super) fn wake_parked(&mut self) {
        for parked in self.parked.clone() {
            self.conns.again(parked);
        }
    }
}
