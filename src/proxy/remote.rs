//! The proxy and the remote dialect: operations pass the fence, then wait in line under the name of their
//! image, a writer at a time, with the readers behind the writers that came before them.

use rustix::io::Errno;

use super::{Conn, Proxy};
use crate::client::remote::{RemoteClient, Step};
use crate::pump::Outflow;
use crate::session::{Begun, Dialect};
use crate::store::catalog;
use crate::table::Id;
use crate::wire::Key;
use crate::wire::criu::{Request, WriteMode};

impl Proxy {
    pub(super) fn step_remote(&mut self, id: Id) {
        let draining = self.may_drain();
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        let order = client.order();
        // Should it have to wait for that, it is to be woken.
        self.draining &= draining;
        let step = client.step(&mut self.bodies, &mut self.block, &mut self.conduit, draining);
        if let (Some(inflow), Ok(Step::Wait | Step::Again | Step::Full)) = (client.writing(), &step) {
            let (key, body) = (inflow.key.clone(), inflow.body);
            self.grown(&key, body);
            if step == Ok(Step::Full) {
                self.short_of_memory(id, &key, body);
            }
        }
        match step {
            Ok(Step::Wait | Step::Full) => {}
            Ok(Step::Again) => self.conns.again(id),
            Ok(Step::Requested) => self.fence.push(order, id),
            Ok(Step::Written) => return self.written(id),
            Ok(Step::Over) => return self.close(id, None),
            Err(why) => return self.close(id, Some(why)),
        }
        self.settle(id);
    }

    pub(super) fn run_request(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get(id) else { return };
        let order = client.order();
        match client.request().cloned() {
            Some(Request::Read(key)) => self.in_line(id, &key),
            Some(Request::Write(key, _)) => {
                match self.session.request(Dialect::Remote, catalog::is_list(&key)) {
                    Ok(begun) => {
                        if begun == Begun::Now {
                            self.session_begins();
                        }
                        self.open_writes.insert(order);
                        self.in_line(id, &key);
                    }
                    Err(why) => self.close(id, Some(why.into())),
                }
            }
            // The finish of a restore, at the wrong daemon.
            Some(Request::Finish { answer: true }) => {
                self.close(id, Some("was refused: a restore finishes at img-cache.sock".into()));
            }
            Some(Request::Finish { answer: false }) => {
                self.close(id, None);
                // One is enough; the last counts, should CRIU have sent another.
                self.finish = Some(order);
                self.try_finish();
            }
            None => {}
        }
    }

    // Starts the client's operation, or lets it wait behind those that came before.
    pub(super) fn in_line(&mut self, id: Id, key: &Key) {
        if self.writers.contains_key(key) || self.waits.is_waiting(key) {
            log::trace!("{key}: a client waits its turn");
            self.waits.push(key, id);
        } else {
            self.start(id);
        }
    }

    pub(super) fn start(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get(id) else { return };
        let request = client.request().cloned();
        if let Some(Request::Read(key) | Request::Write(key, WriteMode::Append)) = &request
            && self.images.get(key).is_some_and(|image| !image.kept)
        {
            let why = "was refused: the image has gone to the cache and is not kept here (--retain)";
            let (key, appends) = (key.clone(), matches!(request, Some(Request::Write(..))));
            self.close(id, Some(why.into()));
            if appends {
                self.failed(format!("nothing can be appended to {key}, which is not kept here (--retain)"));
            }
            return;
        }
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        let started = match request {
            Some(Request::Write(key, mode)) => {
                let appended = self.images.get(&key).filter(|_| mode == WriteMode::Append);
                let (body, start) = match appended {
                    Some(image) => {
                        self.bodies.hold(image.body);
                        (image.body, image.len)
                    }
                    None => (self.bodies.create(), 0),
                };
                self.writers.insert(key.clone(), id);
                client.start_write(key.clone(), body, start);
                self.opens(&key, body, start);
                Ok(())
            }
            Some(Request::Read(key)) => match self.images.get(&key) {
                Some(image) => {
                    self.bodies.hold(image.body);
                    client.start_read(Outflow::new(key, image.body, Some(image.len)))
                }
                None => {
                    let answered = client.answer(Errno::NOENT.raw_os_error() as u32);
                    return self.close(id, answered.err());
                }
            },
            Some(Request::Finish { .. }) | None => Ok(()),
        };
        if let Err(why) = started {
            return self.close(id, Some(why));
        }
        self.conns.again(id);
        self.settle(id);
    }

    pub(super) fn written(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.remove(id) else { return };
        self.open_writes.remove(&client.order());
        let Some(inflow) = client.written() else { return };
        let key = inflow.key.clone();
        self.writers.remove(&key);
        self.complete(inflow);
        self.next_in_line(&key);
        self.try_finish();
    }

    pub(super) fn next_in_line(&mut self, key: &Key) {
        while !self.writers.contains_key(key) {
            let Some(id) = self.waits.pop(key) else { return };
            self.start(id);
        }
    }

    pub(super) fn try_finish(&mut self) {
        let Some(finish) = self.finish else { return };
        if self.open_writes.first().is_none_or(|first| *first > finish) {
            self.finish = None;
            let outcome = self.images.check_remote(&self.bodies);
            self.ended(outcome);
        }
    }

    pub(super) fn remote_gone(&mut self, id: Id, client: RemoteClient, why: Option<String>) {
        if let Some(why) = &why {
            match client.key() {
                Some(key) => log::warn!("the client of {key} {why}"),
                None => log::warn!("a client of img-proxy.sock {why}"),
            }
        }
        self.fence.remove(client.order());
        let was_writing = self.open_writes.remove(&client.order());
        match (client.writing(), client.key()) {
            (Some(inflow), _) => {
                self.writers.remove(&inflow.key);
                let at = self.bodies.len(inflow.body);
                self.bodies.truncate(inflow.body, inflow.start);
                self.bodies.release(inflow.body);
                let key = inflow.key.clone();
                let why = why.unwrap_or_default();
                self.failed(format!("the writer of {key}, at byte {at}, {why}"));
                self.next_in_line(&key);
            }
            (None, Some(key)) => {
                self.waits.remove(key, id);
                if let Some(body) = client.body() {
                    log::debug!("{key}: read back");
                    self.bodies.release(body);
                }
            }
            (None, None) => {}
        }
        if was_writing {
            self.try_finish();
        }
    }
}
