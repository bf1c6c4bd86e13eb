//! The poll loop: one epoll instance, one thread, edge-triggered.
//!
//! The rules of edges. An event is told once. Whoever gets one goes on until the system says "would
//! block", or, having used up its turn, is queued again ([`Conns::again`]): no further event would come.
//! Which events a connection waits for is a pure function of its state ([`Pollable::interest`]); it is
//! compared after every step ([`Conns::settle`]) and registered anew when it has changed, which makes
//! epoll tell at once what is ready already. So a state that does not care for an event may miss it. The
//! same holds for the moment at which a state has lasted too long ([`Pollable::deadline`]).
//!
//! An event may come late, for a connection that is gone: its [`Id`] finds nothing then.
//!
//! A batch is one round of the loop: every event that the kernel knew of when it was asked, then those
//! queued again, then [`Role::after_batch`].

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::session::Ask;
use crate::table::{Id, Table};

/// What a connection is to the loop.
pub trait Pollable {
    /// The descriptor that is polled.
    fn fd(&self) -> BorrowedFd<'_>;
    /// What this state waits for; None: nothing.
    fn interest(&self) -> Option<Interest>;
    /// When this state has lasted too long.
    fn deadline(&self) -> Option<Instant>;
}

/// All connections of a role, with what is registered for each.
#[derive(Debug)]
pub struct Conns<C> {
    table: Table<Entry<C>>,
    registry: Registry,
    again: VecDeque<Id>,
    deadlines: BTreeSet<(Instant, Id)>,
}

#[derive(Debug)]
struct Entry<C> {
    conn: C,
    registered: Option<(RawFd, Interest)>,
    deadline: Option<Instant>,
    queued: bool,
}

impl<C: Pollable> Conns<C> {
    /// Takes a connection in; events come under its id from now on.
    pub fn insert(&mut self, conn: C) -> io::Result<Id> {
        let entry = Entry { conn, registered: None, deadline: None, queued: false };
        let id = self.table.insert(entry);
        match self.try_settle(id) {
            Ok(()) => Ok(id),
            Err(error) => {
                self.table.remove(id);
                Err(error)
            }
        }
    }

    /// The connection, unless it is gone.
    pub fn get(&self, id: Id) -> Option<&C> {
        self.table.get(id).map(|entry| &entry.conn)
    }

    /// The connection, unless it is gone. Whoever changes its state settles it afterwards.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut C> {
        self.table.get_mut(id).map(|entry| &mut entry.conn)
    }

    /// Takes the connection out.
    pub fn remove(&mut self, id: Id) -> Option<C> {
        let entry = self.table.remove(id)?;
        if let Some((fd, _)) = entry.registered {
            // Needed although we close it: CRIU may hold the same open file still. It fails when the
            // state has closed the descriptor itself, and then nothing is registered any more.
            let _ = self.registry.deregister(&mut SourceFd(&fd));
        }
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        Some(entry.conn)
    }

    /// Registers what the connection's state now waits for. When the kernel can't (out of memory), the
    /// connection is taken out and returned with the cause.
    pub fn settle(&mut self, id: Id) -> Result<(), (C, io::Error)> {
        match self.try_settle(id) {
            Ok(()) => Ok(()),
            Err(error) => match self.remove(id) {
                Some(conn) => Err((conn, error)),
                None => Ok(()),
            },
        }
    }

    fn try_settle(&mut self, id: Id) -> io::Result<()> {
        let Some(entry) = self.table.get_mut(id) else { return Ok(()) };
        let wanted = entry.conn.interest().map(|interest| (entry.conn.fd().as_raw_fd(), interest));
        if wanted != entry.registered {
            let same_fd = |a: &(RawFd, Interest), b: &(RawFd, Interest)| a.0 == b.0;
            match (&entry.registered, &wanted) {
                (Some(old), Some(new)) if same_fd(old, new) => {
                    self.registry.reregister(&mut SourceFd(&new.0), id.into(), new.1)?;
                }
                (old, new) => {
                    if let Some((fd, _)) = old {
                        let _ = self.registry.deregister(&mut SourceFd(fd));
                    }
                    entry.registered = None;
                    if let Some((fd, interest)) = new {
                        self.registry.register(&mut SourceFd(fd), id.into(), *interest)?;
                    }
                }
            }
            entry.registered = wanted;
        }
        let deadline = entry.conn.deadline();
        if deadline != entry.deadline {
            if let Some(old) = entry.deadline {
                self.deadlines.remove(&(old, id));
            }
            if let Some(new) = deadline {
                self.deadlines.insert((new, id));
            }
            entry.deadline = deadline;
        }
        Ok(())
    }

    /// Puts the connection at the end of the queue of those that can go on without an event.
    pub fn again(&mut self, id: Id) {
        if let Some(entry) = self.table.get_mut(id)
            && !entry.queued
        {
            entry.queued = true;
            self.again.push_back(id);
        }
    }

    /// All connections.
    pub fn iter(&self) -> impl Iterator<Item = (Id, &C)> {
        self.table.iter().map(|(id, entry)| (id, &entry.conn))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    fn next_again(&mut self) -> Option<Id> {
        let id = self.again.pop_front()?;
        if let Some(entry) = self.table.get_mut(id) {
            entry.queued = false;
        }
        Some(id)
    }

    fn pop_expired(&mut self, now: Instant) -> Option<Id> {
        let first = self.deadlines.first().copied().filter(|(at, _)| *at <= now)?;
        self.deadlines.remove(&first);
        if let Some(entry) = self.table.get_mut(first.1) {
            entry.deadline = None;
        }
        Some(first.1)
    }
}

/// How a role ended: its exit status is 0 or 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done and confirmed, as far as the protocol can.
    Done,
    /// Anything else; the log says what.
    Failed,
}

/// A daemon's part: what it does when something happens. [`Exit`] ends the loop.
pub trait Role {
    /// What it has connections of.
    type Conn: Pollable;
    /// All of them.
    fn conns(&mut self) -> &mut Conns<Self::Conn>;
    /// The connection may be able to go on.
    fn ready(&mut self, id: Id);
    /// The connection's state has lasted too long.
    fn expired(&mut self, id: Id);
    /// When [`Role::after_batch`] has to be called, whatever happens.
    fn wake_at(&self) -> Option<Instant>;
    /// Everything else: what only the whole batch can tell, what depends on the time. With `true`
    /// the loop comes back at once.
    fn after_batch(&mut self, now: Instant) -> (bool, Option<Exit>);
    /// A signal asks for the end. It is decided in [`Role::after_batch`].
    fn terminate(&mut self, signal: Ask);
}

/// The loop before its role is there.
#[derive(Debug)]
pub struct Reactor {
    poll: Poll,
    signals: SignalFd,
}

const SIGNALS: Token = Token(usize::MAX);
/// Events taken from the kernel at once.
const EVENTS: usize = 1024;

impl Reactor {
    /// Makes the poll and takes over SIGTERM, SIGINT and SIGHUP: from here on they end nothing by themselves.
    pub fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.add(Signal::SIGHUP);
        set.thread_block()?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        poll.registry().register(&mut SourceFd(&signals.as_raw_fd()), SIGNALS, Interest::READABLE)?;
        Ok(Self { poll, signals })
    }

    /// An empty set of connections for a role on this loop.
    pub fn conns<C>(&self) -> io::Result<Conns<C>> {
        Ok(Conns {
            table: Table::default(),
            registry: self.poll.registry().try_clone()?,
            again: VecDeque::new(),
            deadlines: BTreeSet::new(),
        })
    }

    /// Runs until the role ends.
    pub fn run(mut self, role: &mut impl Role) -> io::Result<Exit> {
        let mut events = Events::with_capacity(EVENTS);
        let mut at_once = true;
        loop {
            let now = Instant::now();
            let conns = role.conns();
            let next = conns.deadlines.first().map(|(at, _)| *at);
            let busy = at_once || !conns.again.is_empty();
            let next = next.into_iter().chain(role.wake_at()).min();
            let mut timeout = match next {
                _ if busy => Some(Duration::ZERO),
                // Rounded up: epoll counts in milliseconds, and waking early would spin.
                Some(at) => Some(at.saturating_duration_since(now) + Duration::from_millis(1)),
                None => None,
            };
            // One round more than all connections together have events: those that were ready when the
            // batch began have all been told then, however busy the others are.
            for _ in 0..=role.conns().len() / EVENTS + 1 {
                match self.poll.poll(&mut events, timeout) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    result => result?,
                }
                for event in &events {
                    if event.token() != SIGNALS {
                        role.ready(event.token().into());
                        continue;
                    }
                    while let Ok(Some(signal)) = self.signals.read_signal() {
                        let hangup = signal.ssi_signo == Signal::SIGHUP as u32;
                        let ask = if hangup { Ask::Hangup } else { Ask::End };
                        role.terminate(ask);
                    }
                }
                if events.iter().count() < EVENTS {
                    break;
                }
                // There may be more.
                timeout = Some(Duration::ZERO);
            }
            for _ in 0..role.conns().again.len() {
                let Some(id) = role.conns().next_again() else { break };
                role.ready(id);
            }
            let now = Instant::now();
            while let Some(id) = role.conns().pop_expired(now) {
                role.expired(id);
            }
            let (again, exit) = role.after_batch(now);
            if let Some(exit) = exit {
                return Ok(exit);
            }
            at_once = again;
        }
    }
}
