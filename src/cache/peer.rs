//! The cache and its peer: who may be it, what comes from it, and what its end means.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use super::{Cache, Conn, Kind, MAX_PARKED, PARKED_AT_LEAST};
use crate::peer::receiver::{Arrival, Parked, Shown};
use crate::pump;
use crate::store::catalog;
use crate::table::Id;

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
        // With --keep the next peer waits its turn: refused, its whole session might be lost in the backlog.
        if !self.session.takes_peers() || (self.session.is_receiving() && !self.session.stays()) {
            return Err(format!("{address}: this cache has its peer"));
        }
        let now = Instant::now();
        if self.parked.len() >= MAX_PARKED {
            let is_old = |id: &Id| match self.conns.get(*id) {
                Some(Conn::Parked(parked)) => now >= parked.since() + PARKED_AT_LEAST && parked.is_silent(),
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

    // Whether somebody who waits for this session to end has sent something.
    pub(super) fn has_waiting_peer(&self) -> bool {
        self.parked.iter().any(|id| match self.conns.get(*id) {
            Some(Conn::Parked(parked)) => !parked.is_silent(),
            _ => false,
        })
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
        if self.session.is_receiving() {
            return;
        }
        let Some(Conn::Parked(parked)) = self.conns.get_mut(id) else { return };
        match parked.step(&mut self.block) {
            Ok(Shown::Nothing) => self.settle(id),
            Ok(Shown::Closed) => self.close(id, None),
            Ok(Shown::Peer) => match self.session.peer() {
                Ok(()) => self.promote(id),
                Err(why) => self.close(id, Some(why.into())),
            },
            Err(why) => self.close(id, Some(why)),
        }
    }

    pub(super) fn promote(&mut self, id: Id) {
        let Some(Conn::Parked(parked)) = self.conns.remove(id) else { return };
        self.parked.retain(|other| *other != id);
        log::info!(
            "a dump begins, from {}; it is not scripted: it is served as soon as it is complete",
            parked.name()
        );
        if !self.session.stays() {
            // With --keep, one that has sent something may have sent a whole session.
            for other in self.parked.clone() {
                let silent = match self.conns.get(other) {
                    Some(Conn::Parked(parked)) => parked.is_silent(),
                    _ => true,
                };
                if silent || !self.session.keeps() {
                    self.close(other, Some("was refused: another connection is the peer".into()));
                }
            }
        }
        match self.conns.insert(Conn::Peer(parked.promote())) {
            Ok(id) => {
                self.peer = Some(id);
                self.conns.again(id);
            }
            Err(error) => self.session_ended(Err(format!("the peer can't be polled: {error}"))),
        }
    }

    pub(super) fn step_peer(&mut self, id: Id) {
        let Some(Conn::Peer(peer)) = self.conns.get_mut(id) else { return };
        let mut complete = Vec::new();
        let arrival = peer.step(&mut self.incoming, &mut self.bodies, &mut self.block, &mut complete);
        for key in complete {
            if !catalog::waits_for_the_end(&key) {
                for reader in self.waits.take(&key) {
                    self.answer(reader);
                }
            }
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

    pub(super) fn session_ended(&mut self, outcome: Result<(), String>) {
        self.peer = None;
        let failed = outcome.is_err();
        if outcome.is_ok() {
            let images = std::mem::take(&mut self.incoming);
            log::info!("the dump is complete: {} images, {}", images.len(), pump::human(images.bytes()));
            if let Some(old) = self.last.replace(Rc::new(images)) {
                if self.session.has_only_copy() {
                    log::warn!(
                        "the dump before it, of {} images, was never restored; it is dropped",
                        old.len()
                    );
                }
                self.unpin(old);
            }
            self.asked.clear();
        }
        let decision = self.session.peer_ended(outcome);
        self.decide(decision);
        for reader in self.waits.take_all() {
            // Those who waited for a dump that failed are told so, even if another may come.
            if failed { self.fail(reader) } else { self.answer(reader) }
        }
        for parked in self.parked.clone() {
            self.conns.again(parked);
        }
        if self.session.is_full() {
            let peers = self.conns.iter().filter(|(_, conn)| match conn {
                Conn::Listener(listener) => listener.kind() == Kind::Peer,
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
