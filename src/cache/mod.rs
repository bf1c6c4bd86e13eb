//! The restore-side role: takes images from its peer and gives them to CRIU.
//!
//! Theory of operation. TCP connections are parked until one shows a valid first frame; it is the peer until
//! it ends. Its images go into the catalog of the session that comes in. A reader whose image is not there
//! waits under its name; all who wait are answered when the image is complete, or when the session has
//! ended. A complete session is served until a restore has succeeded, or, with --keep, until the next
//! session is complete; a restore of the stream dialect goes on with the session that it began with. A scripted one
//! waits, stored, until its source has released it; or, with the commit point `restored`, one restore makes a copy of it
//! meanwhile, which is stopped, and runs at the release.
//!
//! With a view the images are files of a directory as well. A restore from there asks for nothing: its action script
//! says when it begins and what it has made. What may be written before a dump comes is memory for its images.

mod aside;
mod copies;
mod outcome;
mod peer;
mod prepare;
mod readers;
mod recover;
mod scripted;
mod view;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use mio::Interest;
use rustix::io::Errno;

use crate::client::Door;
use crate::client::control::Control;
use crate::client::fence::Fence;
use crate::client::listener::Listener;
use crate::client::process::Process;
use crate::client::remote::RemoteClient;
use crate::client::stream::{PipeOut, Serve};
use crate::deferred::Deferred;
use crate::peer::allow::Allowed;
use crate::peer::receiver::{Parked, Receiver};
use crate::peer::relay::RelayPeer;
use crate::peer::{Choice, Prepare};
use crate::pump::{Conduit, Flow, Outflow};
use crate::reactor::{Conns, Exit, Pollable, Reactor, Role};
use crate::record::{Book, Record};
use crate::session::sink::Decision;
use crate::session::{Ask, Commit, Dialect, Sink};
use crate::store::{Bodies, BodyId, Catalog, Waits, catalog};
use crate::table::Id;
use crate::times::Times;
use crate::view::{Left, View};
use crate::wire::Key;
use crate::wire::relay::SessionId;
use crate::{net, pump};
use aside::Aside;
use copies::{Copy, CopyTask};
use prepare::Preparation;
use scripted::Criu;
use view::Shown;

/// TCP connections that may wait for their first frame at a time.
pub const MAX_PARKED: usize = 16;

/// How long a silent connection may keep its place when another needs it.
pub const PARKED_AT_LEAST: Duration = Duration::from_secs(10);

/// Batches of events between a failure and the end: a client that has connected is accepted in one, its
/// header is read in the next, and the fence takes a third.
const FAREWELL: u8 = 4;

/// Batches after which a signal is decided in any case. In each a MiB is taken from the peer at most; what its
/// kernel counts as delivered is a few of them.
const DEFER_AT_MOST: u16 = 64;

/// How long a cache that has nothing else to do waits for a proxy that may have missed how its session ended: it
/// finds its way back in a second or two.
const LINGER: Duration = Duration::from_secs(5);

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
    pub listeners: Vec<(OwnedFd, Door)>,
    /// The way of the peer.
    pub reach: Reach,
    /// Stay for the next session.
    pub keep: bool,
    /// What may be spoken with the peer.
    pub choice: Choice,
    /// Whether memory is written beforehand.
    pub prepare: Prepare,
    /// Free what a restore has read.
    pub consume: bool,
    /// Where the record of a copy is kept, and what an earlier run has left there.
    pub book: Book,
    /// See [`Setup::book`].
    pub records: Vec<Record>,
    /// Where the images will be.
    pub bodies: Bodies,
    /// Where they appear as files, and what an earlier run has left there.
    pub view: Option<(View, Left)>,
    /// Connections and pipes at a time.
    pub max_conns: usize,
}

/// What is accepted at a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// CRIU, and its action script.
    Local(Door),
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
    /// The peer, seed protocol.
    Peer(Receiver),
    /// Relay protocol: the peer, or one that may become it.
    Relay(RelayPeer),
    /// CRIU's action script.
    Control(Control),
    /// A CRIU that has announced itself.
    Criu(Criu),
    /// A task of what it has restored.
    Task(CopyTask),
    /// A process that reads the images of the view after the restore.
    Reader(Process),
}

/// A restore of the stream dialect.
#[derive(Debug)]
pub struct Restore {
    serve: Serve,
    /// The session that it is served from, once it has got something of one.
    images: Option<Rc<Catalog>>,
    asked: HashSet<Key>,
    /// Whether its CRIU has announced itself, by this process id.
    announced: bool,
    pid: i32,
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
            Self::Relay(conn) => conn,
            Self::Control(conn) => conn,
            Self::Criu(criu) => &criu.process,
            Self::Task(task) => &task.process,
            Self::Reader(process) => process,
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
    /// It is in this body; None: it is still arriving there.
    Here(BodyId, Option<u64>),
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
    conduit: Conduit,
    bodies: Bodies,
    session: Sink,
    exit: Option<Exit>,
    // Signals: the peer may have ended in the same moment.
    asks: Deferred<Ask>,
    // Whether there is more to take, from the peer or of connections, than a batch takes.
    busy: bool,
    // Failed, for good: so many batches more, in which whoever has connected already is told.
    failing: Option<u8>,

    // The session that comes in, and when its source may go; the one that is stored and waits for its word; the last
    // complete one.
    incoming: Catalog,
    commit: Commit,
    stored: Option<Rc<Catalog>>,
    last: Option<Rc<Catalog>>,
    // Of what comes in: the images that have begun, and who reads them already, by their bodies.
    arriving: HashMap<Key, BodyId>,
    followers: HashMap<BodyId, Vec<Id>>,
    // What was said of the last sessions that have been stored: their transfers and bytes.
    confirmed: VecDeque<(SessionId, u64, u64)>,
    // A proxy that has not said yet that it knows how this session, the last, has ended: it may have lost its link, and
    // come back. Since when nothing but that keeps us here.
    unheard: Option<SessionId>,
    lingers: Option<Instant>,
    // What restores have made, until it runs or is dead.
    copies: Vec<Copy>,
    // What is written of them; and of those that run while their source may ask once more.
    book: Book,
    released: Vec<Record>,
    // And of the session that is stored and waits for its word.
    open: Option<Record>,
    shown: Shown,
    times: Times,
    // Whether a proxy has been told that an announced restore waits, and whether that may have changed.
    told_waits: bool,
    restores_changed: bool,
    // Names this run of the cache.
    run: SessionId,
    choice: Choice,
    // Memory that is written before a dump comes.
    preparing: Preparation,
    // What restores have read is freed; these bodies have been opened, and are not whole any more.
    consume: bool,
    consumed: HashSet<BodyId>,

    accepted: u64,
    fence: Fence,
    waits: Waits,
    // What restores of the remote dialect have asked for since the last finish.
    asked: HashSet<Key>,

    peer: Option<Id>,
    // What has come of a session whose link was lost.
    aside: Option<Aside>,
    parked: VecDeque<Id>,
    inherited: bool,
    allowed: Vec<Allowed>,
}

impl Cache {
    /// A cache that accepts CRIU and its peer.
    pub fn new(reactor: &Reactor, setup: Setup) -> io::Result<Self> {
        let mut conns = reactor.conns()?;
        for (fd, door) in setup.listeners {
            conns.insert(Conn::Listener(Listener::new(fd, Kind::Local(door))))?;
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
        let (view, left) = setup.view.map_or((None, Left::Nothing), |(view, left)| (Some(view), left));
        let mut cache = Self {
            conns,
            max_conns: setup.max_conns,
            block: vec![0; pump::BLOCK],
            conduit: Conduit::default(),
            bodies: setup.bodies,
            session: Sink::new(setup.keep, view.is_some()),
            exit: None,
            asks: Deferred::new(DEFER_AT_MOST),
            busy: false,
            failing: None,
            incoming: Catalog::default(),
            commit: Commit::Stored,
            stored: None,
            last: None,
            arriving: HashMap::new(),
            followers: HashMap::new(),
            confirmed: VecDeque::new(),
            unheard: None,
            lingers: None,
            copies: Vec::new(),
            book: setup.book,
            released: Vec::new(),
            open: None,
            shown: Shown::new(view),
            times: Times::default(),
            told_waits: false,
            restores_changed: false,
            run: net::random_id()?,
            choice: setup.choice,
            preparing: Preparation::new(setup.prepare),
            consume: setup.consume,
            consumed: HashSet::new(),
            accepted: 0,
            fence: Fence::default(),
            waits: Waits::default(),
            asked: HashSet::new(),
            peer: None,
            aside: None,
            parked,
            inherited,
            allowed,
        };
        cache.recover(setup.records, left).map_err(io::Error::other)?;
        Ok(cache)
    }

    fn settle(&mut self, id: Id) {
        if let Err((conn, error)) = self.conns.settle(id) {
            self.gone(id, conn, Some(format!("can't be polled: {error}")));
        }
    }

    fn accept(&mut self, id: Id) {
        let room = self.max_conns.saturating_sub(self.conns.len());
        let Some(Conn::Listener(listener)) = self.conns.get_mut(id) else { return };
        let kind = listener.kind();
        let (accepted, flow) = listener.accept(room);
        self.settle(id);
        if flow == Flow::Again {
            self.busy = true;
            self.conns.again(id);
        }
        for fd in accepted {
            let refused = match kind {
                Kind::Peer => self.park(fd),
                Kind::Local(door) => net::check_user(&fd).and_then(|()| {
                    self.accepted += 1;
                    let now = Instant::now();
                    let conn = match door {
                        Door::Criu(Dialect::Remote) => {
                            Conn::Remote(RemoteClient::new(fd, self.accepted, now))
                        }
                        Door::Criu(Dialect::Stream) => {
                            let pid = net::peer_pid(&fd);
                            self.restores_changed = true;
                            Conn::Restore(Restore {
                                serve: Serve::new(fd, now),
                                images: None,
                                asked: HashSet::new(),
                                announced: self.has_announced(pid),
                                pid,
                            })
                        }
                        Door::Control | Door::View => {
                            Conn::Control(Control::new(fd, door == Door::View, now))
                        }
                    };
                    let id = self.conns.insert(conn).map_err(|error| error.to_string())?;
                    // Its header may be there already.
                    self.ready(id);
                    Ok(())
                }),
            };
            if let Err(why) = refused {
                log::warn!("a connection was refused: {why}");
            }
        }
    }

    fn decide(&mut self, decision: Decision) {
        match decision {
            Decision::Nothing => {}
            Decision::Stay => log::warn!(
                "asked to end, but the dump has not been restored ({} images): this may be the only copy of the \
                 process; ask once more to drop it",
                self.stored.as_ref().or(self.last.as_ref()).map_or(0, |images| images.len())
            ),
            // When nobody reads any more, it is time to leave.
            Decision::Over(Ok(())) => {}
            Decision::Over(Err(why)) => {
                match self.incoming.len() {
                    0 => log::error!("{why}"),
                    images => log::error!("{why}; {images} images that were complete are dropped"),
                }
                self.incoming.clear(&mut self.bodies);
                self.arriving.clear();
                if !(self.session.has_only_copy() && self.persists()) {
                    self.clear_view();
                }
                if !self.session.stays() && !self.session.has_only_copy() {
                    self.failing = Some(FAREWELL);
                }
            }
        }
    }

    fn unpin(&mut self, images: Rc<Catalog>) {
        if let Ok(mut images) = Rc::try_unwrap(images) {
            for (_, image) in images.in_order() {
                self.consumed.remove(&image.body);
            }
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
                if !self.session.has_only_copy() && !self.session.is_receiving() {
                    self.exit = Some(Exit::Failed);
                }
            }
            Conn::Remote(mut client) => {
                // A client of a socket may yet change to a pipe, and start again, until it closes.
                if self.consume
                    && let Some(out) = client.reading_mut()
                    && catalog::is_pages(&out.key)
                {
                    readers::free(&mut self.bodies, out, out.at);
                }
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
                self.restores_changed = true;
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
                    match restore.announced {
                        // Its script has said so, or will.
                        true => self.restore_closed(restore.pid, images),
                        false => {
                            self.restore_ended(&images, &restore.asked);
                            self.unpin(images);
                        }
                    }
                }
            }
            Conn::Pipe(PipeOut { outflow, .. }) => {
                let Outflow { key, body, at, end, .. } = outflow;
                match (why, end) {
                    (Some(why), _) => log::warn!("the pipe of {key}, at byte {at}, {why}"),
                    (None, Some(end)) if at == end => log::debug!("{key}: {} served", pump::human(end)),
                    (None, _) => log::debug!("{key}: served up to byte {at}, CRIU closed it"),
                }
                self.bodies.release(body);
            }
            Conn::Parked(parked) => self.unpark(id, parked.name(), why),
            Conn::Peer(peer) => {
                let why = format!("the peer {} {}", peer.name(), why.unwrap_or_default());
                peer.abandon(&mut self.bodies);
                self.session_ended(Err(why));
            }
            Conn::Relay(peer) => self.relay_gone(id, peer, why),
            Conn::Control(_) => {
                self.script_gone(id);
                self.waiter_gone(id);
                if let Some(why) = why {
                    log::warn!("the action script {why}");
                }
            }
            Conn::Criu(criu) => self.criu_gone(criu),
            Conn::Task(_) => self.task_gone(id),
            Conn::Reader(_) => self.reader_gone(id),
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
            Some(Conn::Relay(_)) => self.step_relay(id),
            Some(Conn::Control(_)) => self.step_control(id),
            Some(Conn::Criu(_)) => self.step_criu(id),
            Some(Conn::Task(_)) => self.step_task(id),
            Some(Conn::Reader(_)) => self.step_reader(id),
            None => {}
        }
    }

    fn expired(&mut self, id: Id) {
        match self.conns.get_mut(id) {
            Some(Conn::Listener(listener)) => {
                listener.resume();
                self.settle(id);
            }
            // It is we who have not looked.
            Some(Conn::Parked(parked)) if self.session.is_receiving() => parked.be_patient(),
            Some(Conn::Relay(peer)) => match peer.expired(Instant::now()) {
                Ok(()) => self.settle(id),
                Err(why) => self.link_lost(id, why),
            },
            Some(Conn::Remote(_) | Conn::Restore(_) | Conn::Parked(_) | Conn::Control(_)) => {
                self.close(id, Some("kept us waiting for a whole request for too long".into()));
            }
            Some(Conn::Pipe(_) | Conn::Peer(_) | Conn::Criu(_) | Conn::Task(_) | Conn::Reader(_)) | None => {}
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        // Once it is over, whatever else keeps us here is an event.
        let lingers = self.lingers.filter(|until| *until > Instant::now());
        let aside = self.aside.as_ref().map(Aside::until);
        let waking = [lingers, self.copies_wake_at(), aside, self.shown.wake_at(), self.preparing.wake_at()];
        waking.into_iter().flatten().min()
    }

    fn after_batch(&mut self, now: Instant) -> (bool, Option<Exit>) {
        self.fence.pass();
        while let Some(id) = self.fence.take() {
            self.run_request(id);
        }
        self.tick_aside(now);
        if let Some(batches) = &mut self.failing {
            match batches.checked_sub(1) {
                Some(less) => *batches = less,
                None if self.may_leave(now) => self.exit = Some(Exit::Failed),
                None => {}
            }
        }
        self.decide_asks();
        self.tick_copies(now);
        self.tick_view(now);
        self.tell_waits();
        let preparing = self.tick_prepare(now);
        let is_busy = |conn: &Conn| match conn {
            Conn::Remote(client) => client.is_reading(),
            Conn::Relay(peer) => !peer.has_said_all(),
            conn => matches!(conn, Conn::Pipe(_)),
        };
        if self.session.is_done()
            && !self.has_waiting_peer()
            && !self.conns.iter().any(|(_, conn)| is_busy(conn))
            && self.may_leave(now)
            && !self.is_being_read()
        {
            self.clear_view();
            self.exit = self.exit.or(Some(Exit::Done));
        }
        // Of images that stay the next cache is asked.
        if self.exit.is_some() && !(self.session.has_only_copy() && self.persists()) {
            self.forget_released(None);
        }
        let failing = self.failing.is_some() && self.lingers.is_none();
        (self.fence.is_waiting() || failing || preparing || !self.asks.is_empty(), self.exit)
    }

    fn terminate(&mut self, signal: Ask) {
        self.asks.push(signal);
    }
}

impl Cache {
    // Whether the proxy of the last session knows how it ended, or has had its time, and nothing of a copy is left
    // that has to die.
    fn may_leave(&mut self, now: Instant) -> bool {
        if !self.copies.is_empty() {
            return false;
        }
        if self.unheard.is_none() {
            return true;
        }
        let until = *self.lingers.get_or_insert(now + LINGER);
        if now < until {
            return false;
        }
        log::warn!("the proxy has not said that it knows how its session has ended");
        true
    }

    // A peer whose whole session is in our socket already has a source that is dead: a signal that comes at the
    // same time is decided when that has been read.
    fn decide_asks(&mut self) {
        let busy = std::mem::take(&mut self.busy);
        self.asks.batch(!busy);
        while let Some(signal) = self.asks.due() {
            self.asked(signal);
        }
    }

    fn asked(&mut self, signal: Ask) {
        let only_copy = self.session.has_only_copy();
        let outlives = only_copy && self.persists();
        let decision = self.session.terminate(signal, outlives);
        if let Decision::Over(outcome) = &decision {
            self.exit = Some(if outcome.is_ok() { Exit::Done } else { Exit::Failed });
            // Of a copy that was made the record stays, and of images that do.
            if let Some(open) = self.open.take()
                && !outlives
                && !self.is_being_copied(open.session)
            {
                self.book.remove(&open);
            }
            if outlives {
                log::warn!(
                    "{} images stay in the view",
                    self.stored.as_ref().or(self.last.as_ref()).map_or(0, |images| images.len())
                );
            } else if let (true, Some(images)) = (only_copy, self.stored.as_ref().or(self.last.as_ref())) {
                log::error!("dropped: {} images, {}", images.len(), pump::human(images.bytes()));
            }
            if !outlives {
                self.clear_view();
            }
            self.drop_aside();
            // So that it does not take our end for a good one.
            match self.peer.take().and_then(|id| self.conns.remove(id)) {
                Some(Conn::Peer(peer)) => peer.abandon(&mut self.bodies),
                Some(Conn::Relay(peer)) => {
                    peer.abandon(Errno::CANCELED, "a signal has ended the cache", &mut self.bodies);
                }
                _ => {}
            }
        }
        self.decide(decision);
    }
}
