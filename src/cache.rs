//! The restore-side role: takes images from its peer and gives them to CRIU.
//!
//! Theory of operation. TCP connections are parked until one shows a valid first frame; it is the peer until
//! it ends. Its images go into the catalog of the session that comes in. A reader whose image is not there
//! waits under its name; all who wait are answered when the image is complete, or when the session has
//! ended. A complete session is served until a restore has succeeded, or, with --keep, until the next
//! session is complete; a restore of the stream dialect goes on with the session that it began with.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use mio::Interest;
use rustix::io::Errno;

use crate::client::fence::Fence;
use crate::client::listener::Listener;
use crate::client::remote::{RemoteClient, Step, closed_early};
use crate::client::stream::{PipeOut, Serve, Served};
use crate::net;
use crate::peer::allow::Allowed;
use crate::peer::receiver::{Arrival, Parked, Receiver, Shown};
use crate::pump::{self, Flow, Outflow};
use crate::reactor::{Conns, Exit, Pollable, Reactor, Role};
use crate::session::{Ask, Decision, Dialect, Sink};
use crate::store::{Bodies, Catalog, Image, Waits, catalog};
use crate::table::Id;
use crate::wire::Key;
use crate::wire::criu::Request;

/// TCP connections that may wait for their first frame at a time.
pub const MAX_PARKED: usize = 16;

/// How long a silent connection may keep its place when another needs it.
pub const PARKED_AT_LEAST: Duration = Duration::from_secs(10);

/// Batches of events between a failure and the end: a client that has connected is accepted in one, its
/// header is read in the next, and the fence takes a third.
const FAREWELL: u8 = 4;

/// How the peer reaches the cache.
#[derive(Debug)]
pub enum Reach {
    /// By connecting to this listening socket, if one of these admits it (none given: everybody who can).
    Listen(OwnedFd, Vec<Allowed>),
    /// By a connection that was made before we began.
    Inherited(OwnedFd),
}

/// What the cache is started with.
#[derive(Debug)]
pub struct Setup {
    /// Listening UNIX sockets and what is spoken there.
    pub listeners: Vec<(OwnedFd, Dialect)>,
    /// The way of the peer.
    pub reach: Reach,
    /// Stay for the next session.
    pub keep: bool,
    /// Descriptors that bodies may take.
    pub max_memfds: usize,
    /// Connections and pipes at a time.
    pub max_conns: usize,
}

/// What is accepted at a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// CRIU.
    Local(Dialect),
    /// A proxy.
    Peer,
}

/// What the cache has descriptors of.
#[derive(Debug)]
pub enum Conn {
    /// A listening socket.
    Listener(Listener<Kind>),
    /// A client of the remote dialect.
    Remote(RemoteClient),
    /// A client of the stream dialect.
    Restore(Restore),
    /// One of its pipes.
    Pipe(PipeOut),
    /// Perhaps a peer.
    Parked(Parked),
    /// The peer.
    Peer(Receiver),
}

/// A restore of the stream dialect.
#[derive(Debug)]
pub struct Restore {
    serve: Serve,
    /// The session that it is served from, once it has got something of one.
    images: Option<Rc<Catalog>>,
    asked: HashSet<Key>,
}

impl Conn {
    fn as_pollable(&self) -> &dyn Pollable {
        match self {
            Self::Listener(conn) => conn,
            Self::Remote(conn) => conn,
            Self::Restore(conn) => &conn.serve,
            Self::Pipe(conn) => conn,
            Self::Parked(conn) => conn,
            Self::Peer(conn) => conn,
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

/// What is known of an image that is asked for.
#[derive(Clone, Copy, Debug)]
enum Found {
    Here(Image),
    NotYet,
    /// It does not exist and never will.
    Never,
    /// There is nothing to restore: the dump failed, or the session is none.
    Broken,
}

/// The role.
#[derive(Debug)]
pub struct Cache {
    conns: Conns<Conn>,
    max_conns: usize,
    block: Vec<u8>,
    bodies: Bodies,
    session: Sink,
    exit: Option<Exit>,
    // Restored: leave as soon as nobody reads any more.
    leaving: bool,
    // Failed, for good: so many batches more, in which whoever has connected already is told.
    failing: Option<u8>,

    // The session that comes in, and the last complete one.
    incoming: Catalog,
    last: Option<Rc<Catalog>>,

    accepted: u64,
    fence: Fence,
    waits: Waits,
    // What restores of the remote dialect have asked for since the last finish.
    asked: HashSet<Key>,

    peer: Option<Id>,
    parked: VecDeque<Id>,
    inherited: bool,
    allowed: Vec<Allowed>,
}

impl Cache {
    /// A cache that accepts CRIU and its peer.
    pub fn new(reactor: &Reactor, setup: Setup) -> io::Result<Self> {
        let mut conns = reactor.conns()?;
        for (fd, dialect) in setup.listeners {
            conns.insert(Conn::Listener(Listener::new(fd, Kind::Local(dialect))))?;
        }
        let mut parked = VecDeque::new();
        let (allowed, inherited) = match setup.reach {
            Reach::Listen(fd, allowed) => {
                conns.insert(Conn::Listener(Listener::new(fd, Kind::Peer)))?;
                (allowed, false)
            }
            Reach::Inherited(fd) => {
                let name = "the inherited connection".into();
                parked.push_back(conns.insert(Conn::Parked(Parked::new(fd, name, Instant::now())))?);
                (Vec::new(), true)
            }
        };
        Ok(Self {
            conns,
            max_conns: setup.max_conns,
            block: vec![0; pump::BLOCK],
            bodies: Bodies::new(setup.max_memfds),
            session: Sink::new(setup.keep),
            exit: None,
            leaving: false,
            failing: None,
            incoming: Catalog::default(),
            last: None,
            accepted: 0,
            fence: Fence::default(),
            waits: Waits::default(),
            asked: HashSet::new(),
            peer: None,
            parked,
            inherited,
            allowed,
        })
    }

    fn settle(&mut self, id: Id) {
        if let Err((conn, error)) = self.conns.settle(id) {
            self.gone(id, conn, Some(format!("can't be polled: {error}")));
        }
    }

    // --- somebody connects

    fn accept(&mut self, id: Id) {
        let room = self.max_conns.saturating_sub(self.conns.len());
        let Some(Conn::Listener(listener)) = self.conns.get_mut(id) else { return };
        let kind = listener.kind();
        let (accepted, flow) = listener.accept(room);
        self.settle(id);
        if flow == Flow::Again {
            self.conns.again(id);
        }
        for fd in accepted {
            let refused = match kind {
                Kind::Peer => self.park(fd),
                Kind::Local(dialect) => net::check_user(&fd).and_then(|()| {
                    self.accepted += 1;
                    let now = Instant::now();
                    let conn = match dialect {
                        Dialect::Remote => Conn::Remote(RemoteClient::new(fd, self.accepted, now)),
                        Dialect::Stream => Conn::Restore(Restore {
                            serve: Serve::new(fd, now),
                            images: None,
                            asked: HashSet::new(),
                        }),
                    };
                    self.conns.insert(conn).map(drop).map_err(|error| error.to_string())
                }),
            };
            if let Err(why) = refused {
                log::warn!("a connection was refused: {why}");
            }
        }
    }

    fn park(&mut self, fd: OwnedFd) -> Result<(), String> {
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
                Some(Conn::Parked(parked)) => now >= parked.since() + PARKED_AT_LEAST,
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

    // --- the peer

    fn step_parked(&mut self, id: Id) {
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

    fn promote(&mut self, id: Id) {
        let Some(Conn::Parked(parked)) = self.conns.remove(id) else { return };
        self.parked.retain(|other| *other != id);
        log::info!(
            "a dump begins, from {}; it is not scripted: it is served as soon as it is complete",
            parked.name()
        );
        if !self.session.stays() {
            for other in std::mem::take(&mut self.parked) {
                self.close(other, Some("was refused: another connection is the peer".into()));
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

    fn step_peer(&mut self, id: Id) {
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
            Ok(Arrival::Again) => self.conns.again(id),
            Ok(Arrival::End) => {
                self.conns.remove(id);
                let outcome = self.incoming.check(&self.bodies);
                self.session_ended(outcome);
            }
            Err(why) => self.close(id, Some(why)),
        }
    }

    fn session_ended(&mut self, outcome: Result<(), String>) {
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
        if !self.session.takes_peers() {
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

    // --- readers

    fn find(&self, images: Option<&Rc<Catalog>>, key: &Key) -> Found {
        if self.failing.is_some() {
            return Found::Broken;
        }
        let needed = key.snapshot_id.is_empty() && key.name[..] == *catalog::INVENTORY;
        if let Some(images) = images {
            match images.get(key) {
                Some(image) => return Found::Here(image),
                None if needed => return Found::Broken,
                None if images.has_snapshot(&key.snapshot_id) || !self.session.stays() => {
                    return Found::Never;
                }
                // With --keep: it is of a dump that may yet come.
                None => {}
            }
        }
        match self.incoming.get(key) {
            Some(image) if !catalog::waits_for_the_end(key) => Found::Here(image),
            _ => Found::NotYet,
        }
    }

    // The dump failed: an error, not the word that the image does not exist.
    fn fail(&mut self, id: Id) {
        let answered = match self.conns.get_mut(id) {
            Some(Conn::Remote(client)) => client.answer(Errno::IO.raw_os_error() as u32),
            _ => Ok(()),
        };
        let why = answered.err().unwrap_or_else(|| "had to be closed: the dump failed".into());
        self.close(id, Some(why));
    }

    // Answers a reader if that can be done now, else lets it wait.
    fn answer(&mut self, id: Id) {
        match self.conns.get(id) {
            Some(Conn::Remote(_)) => self.answer_remote(id),
            Some(Conn::Restore(_)) => self.answer_restore(id),
            _ => {}
        }
    }

    fn answer_remote(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get(id) else { return };
        let Some(Request::Read(key)) = client.request().cloned() else { return };
        let found = self.find(self.last.as_ref(), &key);
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        let failure = match found {
            Found::Here(image) => {
                self.bodies.hold(image.body);
                // With it a restore begins: what another, that failed, had asked for does not count.
                if key.name[..] == *catalog::INVENTORY {
                    self.asked.clear();
                }
                self.asked.insert(key.clone());
                match client.start_read(key, image) {
                    Ok(()) => {
                        self.conns.again(id);
                        return self.settle(id);
                    }
                    Err(why) => Some(why),
                }
            }
            Found::NotYet => {
                self.waits.push(&key, id);
                return self.settle(id);
            }
            Found::Never => {
                log::debug!("{key}: asked for, does not exist");
                client.answer(Errno::NOENT.raw_os_error() as u32).err()
            }
            Found::Broken => return self.fail(id),
        };
        self.close(id, failure);
    }

    fn run_request(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        match client.request().cloned() {
            Some(Request::Read(_)) => self.answer_remote(id),
            Some(Request::Write(..)) => {
                let why = "was refused: images are written at img-proxy.sock of criu-relay proxy";
                self.close(id, Some(why.into()));
            }
            Some(Request::Finish { answer }) => {
                let failure = if answer { client.answer(0).err() } else { None };
                self.close(id, failure);
                let asked = std::mem::take(&mut self.asked);
                match self.last.clone() {
                    Some(images) => {
                        self.restore_ended(&images, &asked);
                        self.unpin(images);
                    }
                    None => log::warn!("a restore ended before there was a complete dump"),
                }
            }
            None => {}
        }
    }

    fn step_remote(&mut self, id: Id) {
        let Some(Conn::Remote(client)) = self.conns.get_mut(id) else { return };
        let order = client.order();
        match client.step(&mut self.bodies, &mut self.block, false) {
            Ok(Step::Wait) => self.settle(id),
            Ok(Step::Again) => {
                self.conns.again(id);
                self.settle(id);
            }
            Ok(Step::Requested) => {
                self.fence.push(order, id);
                self.settle(id);
            }
            Ok(Step::Written | Step::Over) => self.close(id, None),
            Err(why) => self.close(id, Some(why)),
        }
    }

    fn step_restore(&mut self, id: Id) {
        let Some(Conn::Restore(restore)) = self.conns.get_mut(id) else { return };
        match restore.serve.step(&mut self.block) {
            Ok(Served::Wait) => self.settle(id),
            Ok(Served::Request(_)) => self.answer_restore(id),
            Ok(Served::Pipe(pipe)) => {
                // A pipe that its caller can't poll is closed, which CRIU sees as a short image.
                let body = pipe.outflow.body;
                if let Err(error) = self.conns.insert(Conn::Pipe(pipe)) {
                    self.bodies.release(body);
                    return self.close(id, Some(format!("has sent a pipe that can't be polled: {error}")));
                }
                self.conns.again(id);
                self.settle(id);
            }
            Ok(Served::End) => self.close(id, None),
            Err(why) => self.close(id, Some(why)),
        }
    }

    fn answer_restore(&mut self, id: Id) {
        let Some(Conn::Restore(restore)) = self.conns.get(id) else { return };
        let Some(key) = restore.serve.waiting().cloned() else { return };
        let images = restore.images.clone().or_else(|| self.last.clone());
        let found = self.find(images.as_ref(), &key);
        let Some(Conn::Restore(restore)) = self.conns.get_mut(id) else { return };
        restore.images = images;
        let answered = match found {
            Found::Here(image) => {
                self.bodies.hold(image.body);
                restore.asked.insert(key.clone());
                restore.serve.found(Outflow { key, body: image.body, at: 0, end: image.len })
            }
            Found::NotYet => {
                self.waits.push(&key, id);
                Ok(())
            }
            Found::Never => {
                log::debug!("{key}: asked for, does not exist");
                restore.serve.missing()
            }
            Found::Broken => return self.fail(id),
        };
        match answered {
            Ok(()) => {
                self.conns.again(id);
                self.settle(id);
            }
            Err(why) => self.close(id, Some(why)),
        }
    }

    fn step_pipe(&mut self, id: Id) {
        let Some(Conn::Pipe(PipeOut { fd, outflow })) = self.conns.get_mut(id) else { return };
        match pump::drain(&self.bodies, outflow, fd.as_fd()) {
            Ok(Flow::Wait) => {}
            Ok(Flow::Again) => self.conns.again(id),
            Ok(Flow::End) => self.close(id, None),
            Err(error) if closed_early(&error) => self.close(id, None),
            Err(error) => self.close(id, Some(format!("can't be written to: {error}"))),
        }
    }

    // A restore has ended, one way or the other: if it has asked for all memory it has probably succeeded.
    fn restore_ended(&mut self, images: &Rc<Catalog>, asked: &HashSet<Key>) {
        let missing = images.pages(&self.bodies).into_iter().filter(|key| !asked.contains(key)).count();
        let success = missing == 0 && asked.iter().any(|key| key.name[..] == *catalog::INVENTORY);
        if success {
            log::info!("the restore has ended; it had asked for every page image: taken for a success");
        } else {
            log::error!(
                "the restore has ended before it had asked for everything ({missing} page images were not): it \
                 failed; all {} images stay here, start criu restore again",
                images.len()
            );
        }
        let current = self.last.as_ref().is_some_and(|last| Rc::ptr_eq(last, images));
        if current {
            let decision = self.session.restore_ended(success);
            self.decide(decision);
        }
    }

    // --- the session

    fn decide(&mut self, decision: Decision) {
        match decision {
            Decision::Nothing | Decision::Connect | Decision::SendAnew => {}
            Decision::Stay => log::warn!(
                "asked to end, but the dump has not been restored ({} images): this may be the only copy of the \
                 process; ask once more to drop it",
                self.last.as_ref().map_or(0, |images| images.len())
            ),
            Decision::Over(Ok(())) => self.leaving = !self.session.stays(),
            Decision::Over(Err(why)) => {
                match self.incoming.len() {
                    0 => log::error!("{why}"),
                    images => log::error!("{why}; {images} images that were complete are dropped"),
                }
                self.incoming.clear(&mut self.bodies);
                if !self.session.stays() && !self.session.has_only_copy() {
                    self.failing = Some(FAREWELL);
                }
            }
        }
    }

    fn unpin(&mut self, images: Rc<Catalog>) {
        if let Ok(mut images) = Rc::try_unwrap(images) {
            images.clear(&mut self.bodies);
        }
    }

    fn close(&mut self, id: Id, why: Option<String>) {
        if let Some(conn) = self.conns.remove(id) {
            self.gone(id, conn, why);
        }
    }

    fn gone(&mut self, id: Id, conn: Conn, why: Option<String>) {
        match conn {
            Conn::Listener(_) => {
                log::error!("a listening socket {}: nobody can connect any more", why.unwrap_or_default());
                self.exit = Some(Exit::Failed);
            }
            Conn::Remote(client) => {
                match (client.key(), why) {
                    (Some(key), Some(why)) => log::warn!("the reader of {key} {why}"),
                    (None, Some(why)) => log::warn!("a client of img-cache.sock {why}"),
                    (Some(key), None) if client.body().is_some() => log::debug!("{key}: served"),
                    _ => {}
                }
                self.fence.remove(client.order());
                match (client.body(), client.key()) {
                    (Some(body), _) => self.bodies.release(body),
                    (None, Some(key)) => self.waits.remove(key, id),
                    (None, None) => {}
                }
            }
            Conn::Restore(restore) => {
                if let Some(why) = why {
                    log::warn!("a client of streamer-serve.sock {why}");
                }
                if let Some(key) = restore.serve.waiting() {
                    self.waits.remove(key, id);
                }
                if let Some(promised) = restore.serve.promised() {
                    self.bodies.release(promised.body);
                }
                if let Some(images) = restore.images {
                    self.restore_ended(&images, &restore.asked);
                    self.unpin(images);
                }
            }
            Conn::Pipe(PipeOut { outflow, .. }) => {
                let Outflow { key, body, at, end } = outflow;
                match why {
                    Some(why) => log::warn!("the pipe of {key}, at byte {at}, {why}"),
                    None if at < end => log::debug!("{key}: served up to byte {at} of {end}, CRIU closed it"),
                    None => log::debug!("{key}: {} served", pump::human(end)),
                }
                self.bodies.release(body);
            }
            Conn::Parked(parked) => {
                self.parked.retain(|other| *other != id);
                if let Some(why) = why {
                    log::warn!("{} {why}", parked.name());
                }
                if self.inherited {
                    log::error!("{} is gone before it had sent anything", parked.name());
                    self.exit = Some(Exit::Failed);
                }
            }
            Conn::Peer(peer) => {
                let why = format!("the peer {} {}", peer.name(), why.unwrap_or_default());
                peer.abandon(&mut self.bodies);
                self.session_ended(Err(why));
            }
        }
    }
}

impl Role for Cache {
    type Conn = Conn;

    fn conns(&mut self) -> &mut Conns<Conn> {
        &mut self.conns
    }

    fn ready(&mut self, id: Id) {
        match self.conns.get(id) {
            Some(Conn::Listener(_)) => self.accept(id),
            Some(Conn::Remote(_)) => self.step_remote(id),
            Some(Conn::Restore(_)) => self.step_restore(id),
            Some(Conn::Pipe(_)) => self.step_pipe(id),
            Some(Conn::Parked(_)) => self.step_parked(id),
            Some(Conn::Peer(_)) => self.step_peer(id),
            None => {}
        }
    }

    fn expired(&mut self, id: Id) {
        match self.conns.get_mut(id) {
            Some(Conn::Listener(listener)) => {
                listener.resume();
                self.settle(id);
            }
            Some(Conn::Remote(_) | Conn::Restore(_) | Conn::Parked(_)) => {
                self.close(id, Some("kept us waiting for a whole request for too long".into()));
            }
            Some(Conn::Pipe(_) | Conn::Peer(_)) | None => {}
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        None
    }

    fn after_batch(&mut self, _now: Instant) -> (bool, Option<Exit>) {
        for id in self.fence.pass() {
            self.run_request(id);
        }
        if let Some(batches) = &mut self.failing {
            match batches.checked_sub(1) {
                Some(less) => *batches = less,
                None => self.exit = Some(Exit::Failed),
            }
        }
        let reads = |conn: &Conn| match conn {
            Conn::Remote(client) => client.is_reading(),
            conn => matches!(conn, Conn::Pipe(_)),
        };
        if self.exit.is_none() && self.leaving && !self.conns.iter().any(|(_, conn)| reads(conn)) {
            self.exit = Some(Exit::Done);
        }
        (self.fence.is_waiting() || self.failing.is_some(), self.exit)
    }

    fn terminate(&mut self, signal: Ask) {
        let only_copy = self.session.has_only_copy();
        let decision = self.session.terminate(signal);
        if let Decision::Over(outcome) = &decision {
            self.exit = Some(if outcome.is_ok() { Exit::Done } else { Exit::Failed });
            if let (true, Some(images)) = (only_copy, &self.last) {
                log::error!("dropped: {} images, {}", images.len(), pump::human(images.bytes()));
            }
            // So that it does not take our end for a good one.
            if let Some(Conn::Peer(peer)) = self.peer.take().and_then(|id| self.conns.remove(id)) {
                peer.abandon(&mut self.bodies);
            }
        }
        self.decide(decision);
    }
}
