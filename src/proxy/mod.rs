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

mod link;
mod outcome;
mod remote;
mod stream;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use mio::Interest;

use crate::client::fence::Fence;
use crate::client::listener::Listener;
use crate::client::remote::RemoteClient;
use crate::client::stream::{Capture, PipeIn};
use crate::deferred::Deferred;
use crate::peer::dialer::Dialer;
use crate::peer::link::Link;
use crate::peer::sender::Sender;
use crate::pump::{Flow, Inflow};
use crate::reactor::{Conns, Exit, Pollable, Reactor, Role};
use crate::session::{Ask, Dialect, Source};
use crate::store::{Bodies, Catalog, Waits};
use crate::table::Id;
use crate::wire::Key;
use crate::wire::criu::WriteMode;
use crate::{net, pump};

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
enum Event {
    /// `used`: a session was running.
    LinkLost {
        why: String,
        used: bool,
    },
    NoLink(String),
    Asked(Ask),
}

/// Batches after which that is decided in any case: 64 clients are accepted in each.
const DEFER_AT_MOST: u16 = 1000;

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
    // Asked to go, and done with what was in progress: to be left with this, if nothing else waits.
    leaving: Option<Exit>,
    draining: bool,
    deferred: Deferred<Event>,
    // Whether more clients wait to be accepted than a batch takes.
    crowded: bool,

    // The remote dialect.
    accepted: u64,
    fence: Fence,
    // Who writes an image now, and who waits behind.
    writers: HashMap<Key, Id>,
    waits: Waits,
    // By their place in the order: the writes that have passed the fence and not ended; the finish.
    open_writes: BTreeSet<u64>,
    finish: Option<u64>,

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
            leaving: None,
            draining: false,
            deferred: Deferred::new(DEFER_AT_MOST),
            crowded: false,
            accepted: 0,
            fence: Fence::default(),
            writers: HashMap::new(),
            waits: Waits::default(),
            open_writes: BTreeSet::new(),
            finish: None,
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

    fn accept(&mut self, id: Id) {
        let room = self.max_conns.saturating_sub(self.conns.len());
        let Some(Conn::Local(listener)) = self.conns.get_mut(id) else { return };
        let dialect = listener.kind();
        let (accepted, flow) = listener.accept(room);
        self.settle(id);
        if flow == Flow::Again {
            self.crowded = true;
            self.conns.again(id);
        }
        for fd in accepted {
            // A CRIU that can't be served is to see that before it has frozen anything.
            let busy = match dialect {
                Dialect::Stream => self.has_room_for_dump(),
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
                Dialect::Stream => Conn::Capture(Capture::new(fd, self.accepted, now)),
            };
            if let Err(error) = self.conns.insert(conn) {
                log::warn!("a client was refused: {error}");
            }
        }
    }

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
            Conn::Link(_) => self.link_gone(id, why.unwrap_or_default()),
            Conn::Local(_) => {
                log::error!("a listening socket {}: nobody can connect any more", why.unwrap_or_default());
                if self.session.is_idle() {
                    self.exit = Some(Exit::Failed);
                }
            }
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
            // It is we who don't read.
            Some(Conn::Capture(capture)) if self.capture != Some(id) && !self.session.is_idle() => {
                capture.be_patient();
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
        // Behind a finish comes the next dump, which has to wait until this one is over.
        self.fence.pass();
        while !self.is_holding_back()
            && let Some(id) = self.fence.take()
        {
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
        if self.leaving.is_some() && self.session.is_idle() && !self.has_waiting_dump() {
            self.exit = self.exit.or(self.leaving);
        }
        ((self.fence.is_waiting() && !self.is_holding_back()) || !self.deferred.is_empty(), self.exit)
    }

    fn terminate(&mut self, signal: Ask) {
        self.deferred.push(Event::Asked(signal));
    }
}
