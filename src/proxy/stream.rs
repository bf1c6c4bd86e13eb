//! The proxy and the stream dialect: one connection, and a pipe for each image.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::link::NONE_ANY_MORE;
use super::{Conn, Proxy, Splice};
use crate::client::stream::{Captured, PipeIn, Way};
use crate::peer::sender::Passing;
use crate::peer::{Choice, Protocol};
use crate::pump::{FillError, Flow, Inflow};
use crate::reactor::Pollable;
use crate::session::Dialect;
use crate::store::limit;
use crate::table::Id;
use crate::wire::Key;
use crate::wire::criu::{Request, WriteMode};
use crate::{net, pump};

impl Proxy {
    pub(super) fn step_capture(&mut self, id: Id) {
        if self.capture == Some(id) {
            return self.read_capture(id);
        }
        let Some(Conn::Capture(capture)) = self.conns.get(id) else { return };
        let order = capture.order();
        // Several may have waited for a session to end: dumps are taken in the order in which they came.
        let mut waiting: Vec<_> = self
            .conns
            .iter()
            .filter_map(|(id, conn)| match conn {
                Conn::Capture(capture) if capture.order() <= order => Some((capture.order(), id)),
                _ => None,
            })
            .collect();
        waiting.sort_unstable();
        for (_, id) in waiting {
            // Another session is about to end: their turn comes then.
            if self.is_holding_back() {
                return;
            }
            self.read_capture(id);
        }
    }

    pub(super) fn read_capture(&mut self, id: Id) {
        // To the end: whether CRIU is about to finish decides what a lost link or a signal means.
        while let Some(Conn::Capture(capture)) = self.conns.get_mut(id) {
            match capture.step(&mut self.block) {
                Ok(Captured::Wait) => return self.settle(id),
                Ok(Captured::Image(key, pipe)) => self.open_image(id, key, pipe),
                Ok(Captured::End) => self.close(id, None),
                Err(why) => self.close(id, Some(why)),
            }
        }
    }

    // Whether another dump may come now, or has to wait for a moment only. The one that runs is looked at once
    // more: its CRIU may have ended before the next connected. An error is why not.
    pub(super) fn has_room_for_dump(&mut self) -> Result<(), &'static str> {
        if let Some(capture) = self.capture {
            self.read_capture(capture);
        }
        if self.session.is_idle() {
            Ok(())
        } else if !self.is_ending() {
            Err("a dump is in progress, one at a time")
        } else if !self.session.stays() {
            Err("this proxy has had its dump")
        } else if self.is_stuck() {
            Err("the images of the last dump wait for their cache")
        } else {
            Ok(())
        }
    }

    // The session that is being delivered may be so for long: a CRIU that waits behind it, its process perhaps
    // frozen, is turned away. One that has ended already is not: what it left may be the only copy.
    pub(super) fn turn_away(&mut self) {
        if !self.is_ending() || !self.is_stuck() {
            return;
        }
        let waiting = self.conns.iter().filter(|(id, conn)| match conn {
            Conn::Capture(capture) => self.capture != Some(*id) && !net::has_ended(capture.fd()),
            _ => false,
        });
        for id in waiting.map(|(id, _)| id).collect::<Vec<_>>() {
            self.close(id, Some("was refused: the images of the last dump wait for their cache".into()));
        }
    }

    // Whether a CRIU that waits has ended, so that it can't be turned away.
    pub(super) fn has_waiting_dump(&self) -> bool {
        self.conns.iter().any(|(_, conn)| match conn {
            Conn::Remote(client) => {
                self.fence.holds(client.order())
                    && matches!(client.request(), Some(Request::Finish { answer: false }))
            }
            Conn::Capture(capture) => net::has_ended(capture.fd()) && !net::is_hung_up(capture.fd()),
            _ => false,
        })
    }

    pub(super) fn open_image(&mut self, id: Id, key: Key, pipe: OwnedFd) {
        if self.capture != Some(id) {
            let announced = self.is_announced(id);
            // To an old cache, if that is allowed, it is sent as any other.
            let seed =
                self.protocol() == Some(Protocol::Seed) || self.policy.choice == Choice::Only(Protocol::Seed);
            let scripted = announced && !seed;
            if announced && !scripted && !self.policy.accept_unconfirmed {
                let why = "was refused: it has announced itself, and the cache confirms nothing by now";
                return self.close(id, Some(why.into()));
            }
            if let Err(why) = self.session.request(Dialect::Stream, true) {
                return self.close(id, Some(why.into()));
            }
            if scripted {
                self.session.is_announced();
                if let Some(Conn::Link(link)) = self.link.and_then(|id| self.conns.get_mut(id)) {
                    link.require_relay();
                }
            }
            self.capture = Some(id);
            self.session_begins();
            if scripted && self.lacks_restore() {
                // It has gone since CRIU was given leave.
                let decision = self.session.restore_failed(NONE_ANY_MORE);
                return self.decide(decision);
            }
        }
        if self.pipes.contains_key(&key) {
            return self.failed(format!("CRIU opened {key} while it was still writing it"));
        }
        let pipe_in = PipeIn { fd: Rc::new(pipe), key: key.clone(), way: Way::Open, watched: true };
        match self.conns.insert(Conn::Pipe(pipe_in)) {
            Ok(pipe) => drop(self.pipes.insert(key, pipe)),
            Err(error) => self.failed(format!("no place for the pipe of {key}: {error}")),
        }
    }

    // What is spoken on the link, if there is one and that is decided.
    fn protocol(&self) -> Option<Protocol> {
        match self.conns.get(self.link?) {
            Some(Conn::Link(link)) => link.protocol(),
            _ => None,
        }
    }

    // How the bytes of an image go to the link without being kept here; None: they are kept.
    fn passing(&self, key: &Key) -> Option<Passing> {
        if self.protocol() != Some(Protocol::Relay) {
            return None;
        }
        let scripted = self.session.is_scripted();
        let kept = !scripted && self.policy.retain.keeps(key);
        match self.policy.splice {
            Splice::Always => Some(Passing::Splice),
            // What is to be sent again if the link is lost is copied.
            Splice::Auto if scripted && self.policy.reconnect.is_none() => Some(Passing::Splice),
            _ if kept => None,
            Splice::Auto | Splice::Never => Some(Passing::Copy),
        }
    }

    // The first bytes of an image are about to be taken.
    fn begin_image(&mut self, id: Id, key: &Key) {
        let passing = self.passing(key);
        let overwritten = self.images.get(key).is_some();
        let Some(Conn::Pipe(pipe)) = self.conns.get_mut(id) else { return };
        net::enlarge(pipe.fd());
        match passing {
            Some(passing) => {
                pipe.way = Way::Link;
                let mode = if overwritten { WriteMode::Truncate } else { WriteMode::Append };
                let flow = self.sender.open_pipe(key.clone(), mode, Rc::clone(&pipe.fd), passing);
                self.flows.insert(key.clone(), flow);
            }
            None => {
                let body = self.bodies.create();
                pipe.way = Way::Body(Inflow { key: key.clone(), body, start: 0 });
                self.opens(key, body, 0);
            }
        }
    }

    pub(super) fn step_pipe(&mut self, id: Id) {
        if !self.may_drain() {
            // It is to be woken when that changes.
            self.draining = false;
            return;
        }
        let Some(Conn::Pipe(pipe)) = self.conns.get(id) else { return };
        let key = pipe.key.clone();
        if matches!(pipe.way, Way::Open) {
            self.begin_image(id, &key);
        }
        let Some(Conn::Pipe(pipe)) = self.conns.get_mut(id) else { return };
        let Way::Body(inflow) = &pipe.way else {
            pipe.watched = false;
            self.settle(id);
            if let Some(flow) = self.flows.get(&key) {
                self.sender.grown(*flow);
            }
            return self.wake_link();
        };
        let body = inflow.body;
        match pump::fill(pipe.fd(), &mut self.bodies, body, &mut self.block) {
            Ok(Flow::Wait | Flow::Starved) => self.grown(&key, body),
            Ok(Flow::Again) => {
                self.conns.again(id);
                self.grown(&key, body);
            }
            Ok(Flow::End) => {
                let Some(Conn::Pipe(PipeIn { way: Way::Body(inflow), .. })) = self.conns.remove(id) else {
                    return;
                };
                self.pipes.remove(&key);
                self.complete(inflow);
                self.image_ended();
            }
            Err(FillError::Store(error)) if limit::is_full(&error) => {
                self.grown(&key, body);
                self.short_of_memory(id, &key, body);
            }
            Err(FillError::Store(error)) => self.failed(self.bodies.refusal(&key, body, &error)),
            Err(FillError::Read(error)) => {
                let at = self.bodies.len(body);
                self.failed(format!("{key} can't be read at byte {at}: {error}"));
            }
        }
    }

    // What the sender has found at the pipes that it takes from: empty, or at their end.
    pub(super) fn passed(&mut self) {
        for key in self.sender.drained() {
            let Some(id) = self.pipes.get(&key).copied() else { continue };
            if let Some(Conn::Pipe(pipe)) = self.conns.get_mut(id) {
                pipe.watched = true;
                self.settle(id);
            }
        }
        for (key, size) in self.sender.ended() {
            log::debug!("{key}: {} passed on", pump::human(size));
            self.flows.remove(&key);
            if let Some(pipe) = self.pipes.remove(&key) {
                self.conns.remove(pipe);
            }
            self.images.passed(key, size, &mut self.bodies);
            self.image_ended();
        }
    }

    // Whether something of this session has been given to the link and not kept.
    pub(super) fn has_passed(&self) -> bool {
        let passes =
            |id: &Id| matches!(self.conns.get(*id), Some(Conn::Pipe(pipe)) if matches!(pipe.way, Way::Link));
        self.images.is_partial() || self.pipes.values().any(passes)
    }

    fn image_ended(&mut self) {
        self.check_held();
        self.stream_ended();
    }

    pub(super) fn stream_ended(&mut self) {
        let running = self.session.dialect() == Some(Dialect::Stream);
        if self.capture.is_none() {
            self.criu_ended();
        }
        if running && self.capture.is_none() && self.is_unanswered() {
            return self.failed("CRIU ended before its action script was answered".into());
        }
        if running && self.capture.is_none() && self.pipes.is_empty() {
            let outcome = self.images.check_stream();
            self.ended(outcome);
        }
    }
}
