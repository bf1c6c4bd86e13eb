//! The proxy and the stream dialect: one connection, and a pipe for each image.

use std::os::fd::OwnedFd;

use super::{Conn, Proxy};
use crate::client::stream::{Captured, PipeIn};
use crate::pump::{FillError, Flow, Inflow};
use crate::reactor::Pollable;
use crate::session::Dialect;
use crate::table::Id;
use crate::wire::Key;
use crate::wire::criu::Request;
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

    fn read_capture(&mut self, id: Id) {
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
            if let Err(why) = self.session.request(Dialect::Stream, true) {
                return self.close(id, Some(why.into()));
            }
            self.capture = Some(id);
            self.session_begins();
        }
        if self.pipes.contains_key(&key) {
            return self.failed(format!("CRIU opened {key} while it was still writing it"));
        }
        let body = self.bodies.create();
        let inflow = Inflow { key: key.clone(), body, start: 0 };
        match self.conns.insert(Conn::Pipe(PipeIn { fd: pipe, inflow, begun: false })) {
            Ok(pipe) => drop(self.pipes.insert(key, pipe)),
            Err(error) => {
                self.bodies.release(body);
                self.failed(format!("no place for the pipe of {key}: {error}"));
            }
        }
    }

    pub(super) fn step_pipe(&mut self, id: Id) {
        if !self.may_drain() {
            // It is to be woken when that changes.
            self.draining = false;
            return;
        }
        let Some(Conn::Pipe(pipe)) = self.conns.get_mut(id) else { return };
        if !std::mem::replace(&mut pipe.begun, true) {
            net::enlarge(pipe.fd());
        }
        let fill = pump::fill(pipe.fd(), &mut self.bodies, pipe.inflow.body, &mut self.block);
        match fill {
            Ok(Flow::Wait) => {}
            Ok(Flow::Again) => self.conns.again(id),
            Ok(Flow::End) => {
                let Some(Conn::Pipe(pipe)) = self.conns.remove(id) else { return };
                self.pipes.remove(&pipe.inflow.key);
                self.complete(pipe.inflow);
                self.stream_ended();
            }
            Err(error) => {
                let (doing, error) = match error {
                    FillError::Read(error) => ("read", error),
                    FillError::Store(error) => ("stored", error),
                };
                let at = self.bodies.len(pipe.inflow.body);
                let why = format!("{} can't be {doing} at byte {at}: {error}", pipe.inflow.key);
                self.failed(why);
            }
        }
    }

    pub(super) fn stream_ended(&mut self) {
        let running = self.session.dialect() == Some(Dialect::Stream);
        if running && self.capture.is_none() && self.pipes.is_empty() {
            let outcome = self.images.check_stream();
            self.ended(outcome);
        }
    }
}
