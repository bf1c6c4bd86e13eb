//! The dump-side role: takes images from CRIU and gives them to the link.
//!
//! Theory of operation. Clients of the remote dialect pass the fence, then wait in line under the name of
//! their image: a writer at a time, and readers behind the writers that came before them. The stream
//! dialect has one connection and a pipe for each image. Either way an image that has reached its end goes
//! into the catalog; its bytes go to the sender as they come. `session` says what an event means for the dump
//! as a whole.
//!
//! What is kept. A dump that CRIU's action script has announced can be made to fail until the cache has
//! confirmed everything, so that nothing of it need be kept: CRIU's pages go from its pipes straight to the link.
//! Where a lost link may come back (--reconnect), what goes through is kept until the cache has acknowledged it.
//! Of any other dump this may be the only copy one day, and unless told otherwise (--retain) everything is kept
//! until the session is over: it may have to be sent anew.
//!
//! Before a scripted dump begins, the cache is asked to write the memory that it will need (`prepare`): nothing is
//! frozen then.
//!
//! Before a link stands nothing is taken from the pipes, so that a dump that is larger than they are waits
//! for its receiver. Once CRIU has ended, or may have (its inventory.img has been opened), everything is
//! taken: these may be the last bytes of a process.

mod link;
mod memory;
mod outcome;
mod policy;
mod prepare;
mod records;
mod remote;
mod scripted;
mod stream;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use mio::Interest;

use crate::client::Door;
use crate::client::control::Control;
use crate::client::fence::Fence;
use crate::client::listener::Listener;
use crate::client::remote::RemoteClient;
use crate::client::stream::{Capture, PipeIn, Way};
use crate::deferred::Deferred;
use crate::peer::dialer::Dialer;
use crate::peer::link::Link;
use crate::peer::sender::{Sender, TransferId};
use crate::peer::{Choice, Protocol};
use crate::pump::{Conduit, Flow, Inflow};
use crate::reactor::{Conns, Exit, Pollable, Reactor, Role};
use crate::record::{Book, Record};
use crate::session::{Ask, Commit, Dialect, Source};
use crate::store::{Bodies, BodyId, Catalog, Waits};
use crate::table::Id;
use crate::times::Times;
use crate::wire::Key;
use crate::wire::criu::WriteMode;
use crate::wire::relay::{self, Hello, Holding, SessionId};
use crate::{net, pump};
pub use policy::{Policy, Retain, Splice};
use records::Owed;
use scripted::{Announced, Held, Task, Waiting};

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
    pub listeners: Vec<(OwnedFd, Door)>,
    /// The way to the cache.
    pub reach: Reach,
    /// Stay for the next session.
    pub keep: bool,
    /// What is done with the images, and with the source.
    pub policy: Policy,
    /// Where the record of a session is kept, and what an earlier run has left there.
    pub book: Book,
    /// See [`Setup::book`].
    pub records: Vec<Record>,
    /// Where the images will be.
    pub bodies: Bodies,
    /// Connections and pipes at a time.
    pub max_conns: usize,
}

/// What the proxy has descriptors of.
#[derive(Debug)]
pub enum Conn {
    /// A listening UNIX socket.
    Local(Listener<Door>),
    /// A client of the remote dialect.
    Remote(RemoteClient),
    /// A client of the stream dialect.
    Capture(Capture),
    /// One of its pipes.
    Pipe(PipeIn),
    /// The way to the cache.
    Link(Link),
    /// CRIU's action script.
    Control(Control),
    /// A process that is watched: a CRIU that has announced itself, or a task of the source.
    Process(Task),
}

impl Conn {
    fn as_pollable(&self) -> &dyn Pollable {
        match self {
            Self::Local(conn) => conn,
            Self::Remote(conn) => conn,
            Self::Capture(conn) => conn,
            Self::Pipe(conn) => conn,
            Self::Link(conn) => conn,
            Self::Control(conn) => conn,
            Self::Process(task) => &task.process,
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
    /// `used`: a session was running. `refused`: not the link has failed but what was said on it.
    LinkLost {
        why: String,
        used: bool,
        refused: bool,
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
    conduit: Conduit,
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

    // Writers that wait for memory, and how much was in use when they found that they have to.
    short: Vec<(Id, u64)>,

    // The transfers of those who write now, by the image.
    flows: HashMap<Key, TransferId>,

    policy: Policy,
    dialer: Option<Dialer>,
    link: Option<Id>,
    sender: Sender,
    // Names the session that is in progress, or the next one.
    session_id: SessionId,
    // Relay: the run of the cache that has been told of the session; the totals with which it was told that this
    // is all.
    run: Option<Vec<u8>>,
    finished: Option<(u64, u64)>,
    // What the cache of this link, or of the last, takes of memory before it refuses more, in bytes; 0: no limit.
    cache_limit: u64,
    // Sessions that are over here, while a cache may hold their images and wait for a word: it is told when it is
    // found again.
    owed: VecDeque<Owed>,
    // Whether what the cache has just said is its word on how the session ends.
    peer_knows: bool,
    times: Times,
    // What the cache has said so far that it holds of a session whose link was lost; None: it was not asked.
    holdings: Option<Vec<Holding>>,
    // How much had been acknowledged when the session's link was lost last.
    lost_at: Option<u64>,
    // Whether the link is about to be closed for what was said on it: it does not come back.
    refused: bool,

    // Scripted sessions: who has announced itself, whose announcement waits for an answer and until when, and
    // who holds CRIU at post-dump.
    announced: Vec<Announced>,
    waiting: Vec<Waiting>,
    held: Option<Held>,
    // Until then it is looked for whether CRIU, which was let go, has killed the source.
    killed_until: Option<Instant>,
    // Scripts that have asked the cache to prepare memory and were not answered yet.
    asked_to_prepare: VecDeque<Id>,
    // The source's tasks that live, and whether one has died since they were counted.
    tasks: Vec<Id>,
    broken: bool,
    // The CRIU of a session that an earlier run has left.
    last_criu: Option<Id>,
    // What is written of the session in the work directory.
    book: Book,
    record: Option<Record>,

    // What the cache says: whether it can stop a copy, and whether a restore waits there.
    cache_restores: bool,
    restore_waits: bool,
}

impl Proxy {
    /// A proxy that accepts CRIU and looks for its cache.
    pub fn new(reactor: &Reactor, setup: Setup) -> io::Result<Self> {
        let mut conns = reactor.conns()?;
        for (fd, door) in setup.listeners {
            conns.insert(Conn::Local(Listener::new(fd, door)))?;
        }
        let mut policy = setup.policy;
        if policy.splice == Splice::Always {
            // What is not kept can't be sent to a peer that takes whole images only.
            policy.choice = Choice::Only(Protocol::Relay);
        }
        let sender = match policy.reconnect {
            Some(_) => {
                // A session that goes on does so in the relay protocol.
                policy.choice = Choice::Only(Protocol::Relay);
                Sender::with_replay_buffer(policy.replay_buffer)
            }
            None => Sender::default(),
        };
        let session = Source::new(setup.keep, policy.leave_running, policy.commit);
        let session_id = net::random_id()?;
        let hello = hello(session_id, &policy);
        let (dialer, link) = match setup.reach {
            Reach::Dial(mut dialer) => {
                dialer.start(Instant::now(), false);
                (Some(dialer), None)
            }
            Reach::Inherited(fd) => {
                let link = Link::inherited(fd, hello, policy.choice, Instant::now());
                (None, Some(conns.insert(Conn::Link(link))?))
            }
        };
        let mut proxy = Self {
            conns,
            max_conns: setup.max_conns,
            block: vec![0; pump::BLOCK],
            conduit: Conduit::default(),
            bodies: setup.bodies,
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
            flows: HashMap::new(),
            policy,
            dialer,
            link,
            sender,
            session_id,
            run: None,
            finished: None,
            short: Vec::new(),
            owed: VecDeque::new(),
            peer_knows: false,
            times: Times::default(),
            holdings: None,
            lost_at: None,
            refused: false,
            announced: Vec::new(),
            waiting: Vec::new(),
            asked_to_prepare: VecDeque::new(),
            held: None,
            killed_until: None,
            tasks: Vec::new(),
            broken: false,
            last_criu: None,
            book: setup.book,
            record: None,
            cache_restores: false,
            restore_waits: false,
            cache_limit: 0,
        };
        proxy.recover(setup.records).map_err(io::Error::other)?;
        Ok(proxy)
    }

    fn new_session_id(&mut self) {
        match net::random_id() {
            Ok(id) => self.session_id = id,
            Err(error) => {
                log::error!("no name can be had for the next session: {error}");
                self.exit = Some(Exit::Failed);
            }
        }
    }

    fn settle(&mut self, id: Id) {
        if let Err((conn, error)) = self.conns.settle(id) {
            self.gone(id, conn, Some(format!("can't be polled: {error}")));
        }
    }

    fn accept(&mut self, id: Id) {
        let room = self.max_conns.saturating_sub(self.conns.len());
        let Some(Conn::Local(listener)) = self.conns.get_mut(id) else { return };
        let door = listener.kind();
        let (accepted, flow) = listener.accept(room);
        self.settle(id);
        if flow == Flow::Again {
            self.crowded = true;
            self.conns.again(id);
        }
        for fd in accepted {
            // A CRIU that can't be served is to see that before it has frozen anything.
            let busy = match door {
                Door::Criu(Dialect::Stream) => self.has_room_for_dump(),
                Door::Criu(Dialect::Remote) | Door::Control | Door::View => Ok(()),
            };
            if let Err(why) = net::check_user(&fd).and(busy.map_err(String::from)) {
                log::warn!("a client was refused: {why}");
                continue;
            }
            self.accepted += 1;
            let now = Instant::now();
            let conn = match door {
                Door::Criu(Dialect::Remote) => Conn::Remote(RemoteClient::new(fd, self.accepted, now)),
                Door::Criu(Dialect::Stream) => Conn::Capture(Capture::new(fd, self.accepted, now)),
                Door::Control | Door::View => Conn::Control(Control::new(fd, false, now)),
            };
            match self.conns.insert(conn) {
                // Its header may be there already.
                Ok(id) => self.ready(id),
                Err(error) => log::warn!("a client was refused: {error}"),
            }
        }
    }

    // The image is whole.
    fn complete(&mut self, inflow: Inflow) {
        let Inflow { key, body, .. } = inflow;
        let flow = self.flows.remove(&key);
        let image = self.images.complete(key.clone(), body, &mut self.bodies);
        log::debug!("{key}: {} taken", pump::human(image.len));
        if let Some(flow) = flow {
            self.sender.complete(flow, image.len, &mut self.bodies);
        }
        self.wake_link();
        self.check_size(&key, image.len);
    }

    // Somebody begins to write into this body, behind its first `start` bytes.
    fn opens(&mut self, key: &Key, body: BodyId, start: u64) {
        self.bodies.hold(body);
        // A first transfer is an append, as the old proxies have it.
        let overwritten = self.images.get(key).is_some_and(|old| old.body != body);
        let mode = if overwritten { WriteMode::Truncate } else { WriteMode::Append };
        let flow = self.sender.open(key.clone(), mode, body, start);
        self.flows.insert(key.clone(), flow);
    }

    // There is more in the body of an image that is being written.
    fn grown(&mut self, key: &Key, body: BodyId) {
        if let Some(flow) = self.flows.get(key) {
            self.sender.grown(*flow);
        }
        self.wake_link();
        self.check_size(key, self.bodies.len(body));
    }

    // Both old caches count an image's bytes in an int.
    fn check_size(&mut self, key: &Key, len: u64) {
        let old =
            matches!(self.link.and_then(|id| self.conns.get(id)), Some(Conn::Link(link)) if link.is_old());
        if old && len > i32::MAX as u64 {
            self.failed(format!(
                "{key} has 2 GiB or more, which the old cache can't take (criu-relay cache can)"
            ));
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
                        Some(why) => {
                            self.criu_ended();
                            self.failed(format!("CRIU {why}"));
                        }
                        None => self.stream_ended(),
                    }
                }
            }
            Conn::Pipe(pipe) => {
                self.pipes.remove(&pipe.key);
                if let Way::Body(inflow) = pipe.way {
                    self.bodies.release(inflow.body);
                }
                self.failed(format!("the pipe of {} {}", pipe.key, why.unwrap_or_default()));
            }
            Conn::Control(_) => self.script_gone(id, why),
            Conn::Process(task) => self.process_gone(id, &task, why),
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

// What is said first on a link.
fn hello(session: SessionId, policy: &Policy) -> Hello {
    let reconnect = policy.reconnect.map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX));
    Hello {
        major: relay::MAJOR,
        minor: relay::MINOR,
        session: session.to_vec(),
        commit: match policy.commit {
            Commit::Stored => relay::COMMIT_STORED,
            Commit::Restored => relay::COMMIT_RESTORED,
        },
        reconnect,
        ..Hello::default()
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
            Some(Conn::Control(_)) => self.step_control(id),
            Some(Conn::Process(_)) => self.step_process(id),
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
            Some(Conn::Remote(_) | Conn::Capture(_) | Conn::Control(_)) => {
                self.close(id, Some("kept us waiting for a whole request for too long".into()));
            }
            Some(Conn::Link(link)) if link.is_closing() => self.step_link(id),
            Some(Conn::Link(link)) => {
                let step = link.expired(&mut self.sender);
                self.link_stepped(id, step);
            }
            Some(Conn::Pipe(_) | Conn::Process(_)) | None => {}
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let now = Instant::now();
        let scripts = self.waiting.iter().map(|waiting| waiting.wake_at(&self.policy, now));
        let dialer = self.dialer.as_ref().and_then(Dialer::wake_at);
        let held = self.held.as_ref().map(|held| held.until);
        let killed =
            self.killed_until.filter(|_| self.session.is_being_killed()).map(|_| now + scripted::LOOK);
        scripts.chain(dialer).chain(held).chain(killed).min()
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
        self.tick_memory();
        self.tick_link(now);
        self.tick_scripts(now);
        self.tick_killed(now);
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
