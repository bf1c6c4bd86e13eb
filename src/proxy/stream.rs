//! The proxy and the stream dialect: one connection, and a pipe for each image.

use std::os::fd::OwnedFd;

use super::{Conn, Proxy};
use crate::client::stream::{Captured, PipeIn};
use crate::pump::{FillError, Flow, Inflow};
use crate::reactor::Pollable;
use crate::session::Dialect;
use crate::table::Id;
use crate::wire::Key;
use crate::{net, pump};

impl Proxy {
    pub(super) fn step_capture(&mut self, id: Id) {
        // The last session is about to end: this one's turn comes then.
        if self.capture != Some(id) && self.capture_is_busy().is_ok() && !self.session.is_idle() {
            return;
        }
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

    // Whether another dump can't come now, nor in a moment. The one that runs is looked at once more: its CRIU
    // may have ended before the next connected. Without a link the moment may be long, and a process may be
    // frozen for it.
    pub(super) fn capture_is_busy(&mut self) -> Result<(), &'static str> {
        if let Some(capture) = self.capture {
            self.step_capture(capture);
        }
        if self.capture.is_some() || self.session.dialect() == Some(Dialect::Remote) {
            Err("a dump is in progress, one at a time")
        } else if self.session.is_idle() {
            Ok(())
        } else if !self.session.stays() {
            Err("this proxy has had its dump")
        } else if !self.may_end_soon() {
            Err("the images of the last dump wait for their cache")
        } else {
            Ok(())
        }
    }

    // Whether the session that is being delivered has a link, or is about to have one.
    pub(super) fn may_end_soon(&self) -> bool {
        self.session.is_linked() || self.dialer.as_ref().is_some_and(|dialer| !dialer.is_in_vain())
    }

    // Those who wait for the last session to end are looked at again.
    pub(super) fn release_held(&mut self) {
        let waiting = self.conns.iter().filter(|(_, conn)| matches!(conn, Conn::Capture(_)));
        for id in waiting.map(|(id, _)| id).collect::<Vec<_>>() {
            self.conns.again(id);
        }
        for id in std::mem::take(&mut self.held_back) {
            self.run_request(id);
        }
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
