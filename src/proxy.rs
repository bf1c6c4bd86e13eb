//! The dump-side role: takes images from CRIU and gives them to the link.
//!
//! Theory of operation. Clients of the remote dialect pass the fence, then wait in line under the name of
//! their image: a writer at a time, and readers behind the writers that came before them. The stream
//! dialect has one connection and a pipe for each image. Either way an image that has reached its end goes
//! into the catalog and, whole, into the sender's queue. `session` says what an event means for the dump
//! as a whole. Everything is kept until the session is over: it may have to be sent anew.
//!
//! Before a link stands nothing is taken from the pipes, so that a dump that is larger than they are waits
//! for its receiver. Once CRIU has ended, or may have (its inventory.img has been opened), everything is
//! taken: these may be the last bytes of a process.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use mio::Interest;
use rustix::io::Errno;

use crate::client::fence::Fence;
use crate::client::listener::Listener;
use crate::client::remote::{RemoteClient, Step};
use crate::client::stream::{Capture, Captured, PipeIn};
use crate::net;
use crate::peer::dialer::Dialer;
use crate::peer::link::{Link, LinkStep};
use crate::peer::sender::Sender;
use crate::pump::{self, FillError, Flow, Inflow};
use crate::reactor::{Conns, Exit, Pollable, Reactor, Role};
use crate::session::{Ask, Begun, Decision, Dialect, Source};
use crate::store::{Bodies, Catalog, Waits, catalog};
use crate::table::Id;
use crate::wire::Key;
use crate::wire::criu::{Request, WriteMode};

/// How the proxy reaches its cache.
#[derive(Debug)]
pub enum Reach {
    /// By connecting.
    Dial(Dialer),
    /// By a connection that was made before it began.
    Inherited(OwnedFd),
}

/// What the proxy is started with.
#[derive(Debug)]
pub struct Setup {
    /// Listening sockets and what is spoken there.
    pub listeners: Vec<(OwnedFd, Dialect)>,
    /// The way to the cache.
    pub reach: Reach,
    /// Stay for the next session.
    pub keep: bool,
    /// Descriptors that bodies may take.
    pub max_memfds: usize,
    /// Connections and pipes at a time.
    pub max_conns: usize,
}

/// What the proxy has descriptors of.
#[derive(Debug)]
pub enum Conn {
    /// A listening UNIX socket.
    Local(Listener<Dialect>),
    /// A client of the remote dialect.
    Remote(RemoteClient),
    /// A client of the stream dialect.
    Capture(Capture),
    /// One of its pipes.
    Pipe(PipeIn),
    /// The way to the cache.
    Link(Link),
}

impl Conn {
    fn as_pollable(&self) -> &dyn Pollable {
        match self {
            Self::Local(conn) => conn,
            Self::Remote(conn) => conn,
            Self::Capture(conn) => conn,
            Self::Pipe(conn) => conn,
            Self::Link(conn) => conn,
        }
    }
}

impl Pollable for Conn {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_pollable().fd()
    }

    fn interest(&self) -> Option<Interest> {
        self.as_pollable().interest()
    }

    fn deadline(&self) -> Option<Instant> {
        self.as_pollable().deadline()
    }
}

/// What is decided only when everything has been read that CRIU had done by then: it may have ended the dump in
/// the same moment, and can't be made to fail any more.
#[derive(Debug)]
enum Deferred {
    LinkLost(String),
    NoLink(String),
    Asked(Ask),
}

/// Batches until a deferred event is decided: in the next, the kernel tells of everything that had happened;
/// an operation of the remote dialect runs one later.
const DEFER: u8 = 3;

/// The role.
#[derive(Debug)]
pub struct Proxy {
    conns: Conns<Conn>,
    max_conns: usize,
    block: Vec<u8>,
    bodies: Bodies,
    images: Catalog,
    session: Source,
    exit: Option<Exit>,
    draining: bool,
    // What has happened and is decided some batches later.
    deferred: Vec<(Deferred, u8)>,

    // The remote dialect.
    accepted: u64,
    fence: Fence,
    // Who writes an image now, and who waits behind.
    writers: HashMap<Key, Id>,
    waits: Waits,
    // By their place in the order: the writes that have passed the fence and not ended; the finish.
    open_writes: BTreeSet<u64>,
    finish: Option<u64>,
    // Writers that came while the last session was being delivered.
    held_back: Vec<Id>,

    // The stream dialect: the session's connection until it ends, its pipes.
    capture: Option<Id>,
    pipes: HashMap<Key, Id>,

    dialer: Option<Dialer>,
    link: Option<Id>,
    sender: Sender,
}

impl Proxy {
    /// A proxy that accepts CRIU and looks for its cache.
    pub fn new(reactor: &Reactor, setup: Setup) -> io::Result<Self> {
        let mut conns = reactor.conns()?;
        for (fd, dialect) in setup.listeners {
            conns.insert(Conn::Local(Listener::new(fd, dialect)))?;
        }
        let mut session = Source::new(setup.keep);
        let (dialer, link) = match setup.reach {
            Reach::Dial(mut dialer) => {
                dialer.start(Instant::now(), false);
                (Some(dialer), None)
            }
            Reach::Inherited(fd) => {
                session.link_up();
                (None, Some(conns.insert(Conn::Link(Link::inherited(fd)))?))
            }
        };
        Ok(Self {
            conns,
            max_conns: setup.max_conns,
            block: vec![0; pump::BLOCK],
            bodies: Bodies::new(setup.max_memfds),
            images: Catalog::default(),
            session,
            exit: None,
            draining: false,
            deferred: Vec::new(),
            accepted: 0,
            fence: Fence::default(),
            writers: HashMap::new(),
            waits: Waits::default(),
            open_writes: BTreeSet::new(),
            finish: None,
            held_back: Vec::new(),
            capture: None,
            pipes: HashMap::new(),
            dialer,
            link,
            sender: Sender::default(),
        })
    }

    fn settle(&mut self, id: Id) {
        if let Err((conn, error)) = self.conns.settle(id) {
            self.gone(id, conn, Some(format!("can't be polled: {error}")));
        }
    }

    // --- CRIU connects

    fn accept(&mut self, id: Id) {
        let room = self.max_conns.saturating_sub(self.conns.len());
        let Some(Conn::Local(listener)) = self.conns.get_mut(id) else { return };
        let dialect = listener.kind();
        let (accepted, flow) = listener.accept(room);
        self.settle(id);
        if flow == Flow::Again {
            self.conns.again(id);
        }
        for fd in accepted {
            // A CRIU that can't be served is to see that before it has frozen anything.
            let busy = match dialect {
                Dialect::Stream => self.capture_is_busy(),
                Dialect::Remote => Ok(()),
            };
            if let Err(why) = net::check_user(&fd).and(busy.map_err(String::from)) {
                log::warn!("a client was refused: {why}");
                continue;
            }
            self.accepted += 1;
            let now = Instant::now();
            let conn = match dialect {
                Dialect::Remote => Conn::Remote(RemoteClient::new(fd, self.accepted, now)),
                Dialect::Stream => Conn::Capture(Capture::new(fd, now)),
            };
            if let Err(error) = self.conns.insert(conn) {
                log::warn!("a client was refused: {error}");
            }
        }
    }

    // --- the remote dialect

    fn step_remote(&mut self, id: Id) {
        let draining = self.may_drain();
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        let order = client.order();
        match client.step(&mut self.bodies, &mut self.block, draining) {
            Ok(Step::Wait) => {}
            Ok(Step::Again) => self.conns.again(id),
            Ok(Step::Requested) => self.fence.push(order, id),
            Ok(Step::Written) => return self.written(id),
            Ok(Step::Over) => return self.close(id, None),
            Err(why) => return self.close(id, Some(why)),
        }
        self.settle(id);
    }

    fn run_request(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get(id) else { return };
        let order = client.order();
        match client.request().cloned() {
            Some(Request::Read(key)) => self.in_line(id, &key),
            // The last session is about to end: its turn comes then.
            Some(Request::Write(..)) if self.session.is_complete() && self.session.stays() => {
                self.held_back.push(id);
            }
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
    fn in_line(&mut self, id: Id, key: &Key) {
        if self.writers.contains_key(key) || self.waits.is_waiting(key) {
            log::trace!("{key}: a client waits its turn");
            self.waits.push(key, id);
        } else {
            self.start(id);
        }
    }

    fn start(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        let started = match client.request().cloned() {
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
                client.start_write(key, body, start, &mut self.bodies)
            }
            Some(Request::Read(key)) => match self.images.get(&key) {
                Some(image) => {
                    self.bodies.hold(image.body);
                    client.start_read(key, image)
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

    fn written(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.remove(id) else { return };
        self.open_writes.remove(&client.order());
        let Some(inflow) = client.written() else { return };
        let key = inflow.key.clone();
        self.writers.remove(&key);
        self.complete(inflow);
        self.next_in_line(&key);
        self.try_finish();
    }

    fn next_in_line(&mut self, key: &Key) {
        while !self.writers.contains_key(key) {
            let Some(id) = self.waits.pop(key) else { return };
            self.start(id);
        }
    }

    fn try_finish(&mut self) {
        let Some(finish) = self.finish else { return };
        if self.open_writes.first().is_none_or(|first| *first > finish) {
            self.finish = None;
            let outcome = self.images.check_remote(&self.bodies);
            self.ended(outcome);
        }
    }

    // --- the stream dialect

    fn step_capture(&mut self, id: Id) {
        // The last session may be about to end: this one's turn comes then.
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
    // may have ended before the next connected.
    fn capture_is_busy(&mut self) -> Result<(), &'static str> {
        if let Some(capture) = self.capture {
            self.step_capture(capture);
        }
        if self.capture.is_some() || self.session.dialect() == Some(Dialect::Remote) {
            Err("a dump is in progress, one at a time")
        } else if !self.session.is_idle() && !self.session.stays() {
            Err("this proxy has had its dump")
        } else {
            Ok(())
        }
    }

    fn open_image(&mut self, id: Id, key: Key, pipe: OwnedFd) {
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

    fn step_pipe(&mut self, id: Id) {
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

    fn stream_ended(&mut self) {
        let running = self.session.dialect() == Some(Dialect::Stream);
        if running && self.capture.is_none() && self.pipes.is_empty() {
            let outcome = self.images.check_stream();
            self.ended(outcome);
        }
    }

    // --- images and the session

    // The image is whole: it can be read, and it is to be sent.
    fn complete(&mut self, inflow: Inflow) {
        let Inflow { key, body, start } = inflow;
        let old = self.images.get(&key);
        let appended = old.is_some_and(|old| old.body == body);
        let image = self.images.complete(key.clone(), body, &mut self.bodies);
        log::debug!("{key}: {} taken", pump::human(image.len));
        if appended && image.len == start {
            // Nothing has changed. (Size 0 would mean that too, but not to an old cache.)
            return;
        }
        // A first transfer is an append, as the old proxies have it.
        let mode = if old.is_some() && !appended { WriteMode::Truncate } else { WriteMode::Append };
        self.bodies.hold(image.body);
        self.sender.push(key, image, start, mode);
        self.wake_link();
    }

    fn session_begins(&mut self) {
        log::info!(
            "a dump begins; it is not scripted: it counts as sent when the cache's kernel has it, and the cache \
             serves it then"
        );
        if !self.session.is_linked()
            && let Some(dialer) = &mut self.dialer
        {
            dialer.limit(Instant::now(), false);
        }
    }

    // CRIU has ended.
    fn ended(&mut self, outcome: Result<(), String>) {
        if self.session.is_running() && outcome.is_ok() {
            let (images, bytes) = (self.images.len(), pump::human(self.images.bytes()));
            log::info!("the dump is complete: {images} images, {bytes}");
            if !self.session.is_linked() {
                log::warn!(
                    "there is no link: this may be the only copy of the process; it is kept until it is sent"
                );
            }
            if let Some(dialer) = &mut self.dialer {
                dialer.limit(Instant::now(), true);
            }
        }
        let decision = self.session.ended(outcome);
        self.decide(decision);
    }

    fn failed(&mut self, why: String) {
        let decision = self.session.failed(&why);
        self.decide(decision);
    }

    // Whether CRIU may have finished already: it writes inventory.img last.
    fn may_be_only_copy(&self) -> bool {
        match self.session.dialect() {
            None => false,
            Some(Dialect::Stream) => {
                let inventory = Key::stream(catalog::INVENTORY);
                self.pipes.contains_key(&inventory) || self.images.get(&inventory).is_some()
            }
            Some(Dialect::Remote) => {
                if self.finish.is_some() {
                    return true;
                }
                let last = self.images.last_snapshot(&self.bodies);
                let is_inventory = |key: &Key| {
                    key.name[..] == *catalog::INVENTORY
                        && last.as_ref().is_none_or(|id| key.snapshot_id[..] == id[..])
                };
                self.writers.keys().chain(self.images.keys()).any(is_inventory)
            }
        }
    }

    fn may_drain(&self) -> bool {
        let stream_ended = self.session.dialect() == Some(Dialect::Stream) && self.capture.is_none();
        self.session.is_linked() || stream_ended || self.may_be_only_copy()
    }

    fn decide(&mut self, decision: Decision) {
        match decision {
            Decision::Nothing => {}
            Decision::Connect => self.dial(),
            Decision::SendAnew => self.send_anew(),
            Decision::Stay => log::warn!(
                "asked to end, but this may be the only copy of the process ({} images, {}): it stays until they \
                 are sent; ask once more to drop them",
                self.images.len(),
                pump::human(self.images.bytes())
            ),
            Decision::Over(outcome) => self.over(outcome),
        }
    }

    fn over(&mut self, outcome: Result<(), String>) {
        match &outcome {
            Ok(()) => {
                let (images, bytes) = self.sender.sent();
                if images > 0 {
                    let bytes = pump::human(bytes);
                    log::info!(
                        "{images} images, {bytes}: sent, not confirmed (the peer speaks the seed protocol)"
                    );
                }
                if let Some(dialer) = &mut self.dialer {
                    dialer.served();
                }
            }
            Err(why) if self.images.is_empty() => log::error!("{why}"),
            Err(why) => log::error!(
                "{why}; {} images, {}, are dropped",
                self.images.len(),
                pump::human(self.images.bytes())
            ),
        }
        if let Some(Conn::Link(link)) = self.link.take().and_then(|id| self.conns.remove(id))
            && outcome.is_err()
        {
            link.reset();
        }
        // What has not asked for anything yet belongs to no session.
        let capture = self.capture.take();
        let ours = self.conns.iter().filter(|(id, conn)| match conn {
            Conn::Capture(_) => Some(*id) == capture,
            Conn::Remote(client) => client.has_asked() && !self.held_back.contains(id),
            Conn::Pipe(_) => true,
            Conn::Link(_) | Conn::Local(_) => false,
        });
        let ours: Vec<_> = ours.map(|(id, _)| id).collect();
        self.finish = None;
        self.fence = Fence::default();
        self.writers.clear();
        self.waits = Waits::default();
        self.open_writes.clear();
        self.pipes.clear();
        for id in ours {
            let body = match self.conns.remove(id) {
                Some(Conn::Remote(client)) => client.body(),
                Some(Conn::Pipe(pipe)) => Some(pipe.inflow.body),
                _ => None,
            };
            if let Some(body) = body {
                self.bodies.release(body);
            }
        }
        self.sender.clear(&mut self.bodies);
        self.images.clear(&mut self.bodies);
        let waiting = self.conns.iter().filter(|(_, conn)| matches!(conn, Conn::Capture(_)));
        for id in waiting.map(|(id, _)| id).collect::<Vec<_>>() {
            self.conns.again(id);
        }
        for id in std::mem::take(&mut self.held_back) {
            self.run_request(id);
        }
        if !self.session.stays() {
            self.exit = Some(if outcome.is_ok() { Exit::Done } else { Exit::Failed });
        } else if self.session.is_idle() {
            self.session.link_lost("the session is over", false);
            self.dial();
        }
    }

    // The connection goes, and with it what it was doing. `why`: what was wrong with it.
    fn close(&mut self, id: Id, why: Option<String>) {
        if let Some(conn) = self.conns.remove(id) {
            self.gone(id, conn, why);
        }
    }

    fn gone(&mut self, id: Id, conn: Conn, why: Option<String>) {
        match conn {
            Conn::Remote(client) => self.remote_gone(id, client, why),
            Conn::Capture(_) => {
                if let Some(why) = &why {
                    log::warn!("a client of streamer-capture.sock {why}");
                }
                if self.capture == Some(id) {
                    self.capture = None;
                    match why {
                        Some(why) => self.failed(format!("CRIU {why}")),
                        None => self.stream_ended(),
                    }
                }
            }
            Conn::Pipe(pipe) => {
                self.pipes.remove(&pipe.inflow.key);
                self.bodies.release(pipe.inflow.body);
                self.failed(format!("the pipe of {} {}", pipe.inflow.key, why.unwrap_or_default()));
            }
            Conn::Link(_) => self.link_gone(why.unwrap_or_default()),
            Conn::Local(_) => {
                log::error!("a listening socket {}: nobody can connect any more", why.unwrap_or_default());
                self.exit = Some(Exit::Failed);
            }
        }
    }

    fn remote_gone(&mut self, id: Id, client: RemoteClient, why: Option<String>) {
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

    // --- the link

    fn dial(&mut self) {
        let for_ever = self.session.is_complete() || self.may_be_only_copy();
        match &mut self.dialer {
            Some(dialer) => dialer.start(Instant::now(), for_ever),
            None if self.session.is_idle() => {
                log::error!("the inherited connection is gone and can't be made anew");
                self.exit = Some(Exit::Failed);
            }
            None => log::error!(
                "the inherited connection is gone and can't be made anew: the images stay here until a signal comes"
            ),
        }
    }

    fn step_link(&mut self, id: Id) {
        let Some(Conn::Link(link)) = self.conns.get_mut(id) else { return };
        match link.step(&mut self.sender, &mut self.bodies, &mut self.block) {
            LinkStep::Wait => {}
            LinkStep::Again => self.conns.again(id),
            LinkStep::Up => {
                log::info!("connected to {}", link.name());
                if let Some(dialer) = &mut self.dialer {
                    dialer.succeeded(Instant::now());
                }
                self.conns.again(id);
                let decision = self.session.link_up();
                self.decide(decision);
            }
            LinkStep::Refused(why) => {
                let why = format!("{}: {why}", link.name());
                self.conns.remove(id);
                return self.unreachable(why);
            }
            LinkStep::Lost(why) => return self.close(id, Some(why)),
            LinkStep::Delivered => {
                let decision = self.session.delivered();
                return self.decide(decision);
            }
        }
        self.settle(id);
    }

    fn unreachable(&mut self, why: String) {
        log::trace!("no link: {why}");
        self.link = None;
        if let Some(dialer) = &mut self.dialer {
            dialer.failed(Instant::now(), why);
        }
    }

    fn link_gone(&mut self, why: String) {
        log::warn!("the link to the cache is lost: {why}");
        self.link = None;
        self.deferred.push((Deferred::LinkLost(why), DEFER));
    }

    fn decide_deferred(&mut self) {
        let mut due = Vec::new();
        for (event, batches) in std::mem::take(&mut self.deferred) {
            match batches.checked_sub(1) {
                Some(less) => self.deferred.push((event, less)),
                None => due.push(event),
            }
        }
        for event in due {
            let only_copy = self.may_be_only_copy();
            let decision = match event {
                Deferred::LinkLost(why) => {
                    self.sender.clear(&mut self.bodies);
                    self.session.link_lost(&why, only_copy)
                }
                // Meanwhile there is one.
                Deferred::NoLink(_) if self.session.is_linked() => Decision::Nothing,
                Deferred::NoLink(why) => match self.session.no_link(why, only_copy) {
                    // The search that is under way has no end any more.
                    Decision::Connect => Decision::Nothing,
                    other => other,
                },
                Deferred::Asked(signal) => {
                    let decision = self.session.terminate(signal, only_copy);
                    if let Decision::Over(outcome) = &decision {
                        self.exit = Some(if outcome.is_ok() { Exit::Done } else { Exit::Failed });
                    }
                    decision
                }
            };
            self.decide(decision);
        }
    }

    fn send_anew(&mut self) {
        log::info!("the whole session is sent anew: {} images", self.images.len());
        self.sender.clear(&mut self.bodies);
        for (key, image) in self.images.in_order() {
            self.bodies.hold(image.body);
            self.sender.push(key.clone(), image, 0, WriteMode::Append);
        }
        self.wake_link();
    }

    fn wake_link(&mut self) {
        if let Some(link) = self.link {
            self.conns.again(link);
        }
    }

    fn tick_link(&mut self, now: Instant) {
        if let Some(dialer) = &mut self.dialer
            && dialer.gave_up(now)
        {
            let why = dialer.why();
            if self.session.stays() && self.session.is_idle() {
                log::warn!("{why} The search goes on.");
            }
            self.deferred.push((Deferred::NoLink(why), DEFER));
        }
        // A search without end is for the only copy: after a pre-dump, the next dump can still be made to fail.
        if self.session.is_running()
            && self.dialer.as_ref().is_some_and(Dialer::is_endless)
            && self.deferred.is_empty()
            && !self.may_be_only_copy()
            && let Some(dialer) = &mut self.dialer
        {
            dialer.limit(now, false);
        }
        if let Some(address) = self.dialer.as_mut().and_then(|dialer| dialer.due(now)) {
            let link = Link::connect(address, now).and_then(|link| self.conns.insert(Conn::Link(link)));
            match link {
                Ok(id) => self.link = Some(id),
                Err(error) => self.unreachable(format!("{address}: {error}")),
            }
        }
        // Everything is here, and everything has been handed over: the end of the link is the end of the dump.
        if self.session.is_complete()
            && self.session.is_linked()
            && self.sender.is_idle()
            && let Some(id) = self.link
            && let Some(Conn::Link(link)) = self.conns.get_mut(id)
            && !link.is_closing()
        {
            link.finish();
            self.conns.again(id);
            self.settle(id);
        }
    }
}

impl Role for Proxy {
    type Conn = Conn;

    fn conns(&mut self) -> &mut Conns<Conn> {
        &mut self.conns
    }

    fn ready(&mut self, id: Id) {
        match self.conns.get(id) {
            Some(Conn::Local(_)) => self.accept(id),
            Some(Conn::Remote(_)) => self.step_remote(id),
            Some(Conn::Capture(_)) => self.step_capture(id),
            Some(Conn::Pipe(_)) => self.step_pipe(id),
            Some(Conn::Link(_)) => self.step_link(id),
            None => {}
        }
    }

    fn expired(&mut self, id: Id) {
        match self.conns.get_mut(id) {
            Some(Conn::Local(listener)) => {
                listener.resume();
                self.settle(id);
            }
            Some(Conn::Remote(_) | Conn::Capture(_)) => {
                self.close(id, Some("kept us waiting for a whole request for too long".into()));
            }
            Some(Conn::Link(link)) if link.is_closing() => self.step_link(id),
            Some(Conn::Link(link)) => {
                let why = format!("{}: no answer", link.name());
                self.conns.remove(id);
                self.unreachable(why);
            }
            Some(Conn::Pipe(_)) | None => {}
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        self.dialer.as_ref().and_then(Dialer::wake_at)
    }

    fn after_batch(&mut self, now: Instant) -> (bool, Option<Exit>) {
        for id in self.fence.pass() {
            self.run_request(id);
        }
        self.decide_deferred();
        self.tick_link(now);
        let draining = self.may_drain();
        if draining && !self.draining {
            let writers = self.conns.iter().filter(|(_, conn)| match conn {
                Conn::Pipe(_) => true,
                Conn::Remote(client) => client.writing().is_some(),
                _ => false,
            });
            for id in writers.map(|(id, _)| id).collect::<Vec<_>>() {
                self.conns.again(id);
            }
        }
        self.draining = draining;
        (self.fence.is_waiting() || !self.deferred.is_empty(), self.exit)
    }

    fn terminate(&mut self, signal: Ask) {
        self.deferred.push((Deferred::Asked(signal), DEFER));
    }
}
