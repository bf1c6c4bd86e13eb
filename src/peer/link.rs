//! The proxy's end of the link: a connection being made, in use, or being closed in order.
//!
//! Theory of operation. Once connected, the proxy says hello in a way that an old cache takes for an image that
//! nobody asks for. A cache of ours answers with its welcome, and both go on in the relay protocol; a silent
//! one is old, and what it may say later is not listened to. Nothing else is sent before that is decided.
//!
//! Owns the TCP socket (or the inherited one). What is sent on it is the [`Sender`]'s.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::Interest;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, connect, recv, send, shutdown, sockopt};

use super::dialer::ATTEMPT;
use super::outq::unacknowledged;
use super::sender::Sender;
use super::silence::{CACHE_LOST, Silence};
use super::{Choice, Protocol};
use crate::net;
use crate::pump::Flow;
use crate::reactor::Pollable;
use crate::store::Bodies;
use crate::wire::relay::{self, Decoder, Hello, Item, Kind};

/// How often the send queue is looked at while the link is being closed, since nothing tells when it is
/// empty: at first, and after it has been in vain for a while. (A look costs up to a millisecond.)
const LOOK: Duration = Duration::from_millis(5);
const LOOK_MAX: Duration = Duration::from_millis(500);

/// How long a cache has for its welcome until it is taken for an old one.
pub const GREETING: Duration = Duration::from_secs(2);

/// Blocks that a peer may send at a time with nothing in them that concerns us.
const CHATTER: u32 = 16;

/// The link as the proxy sees it.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
    name: String,
    hello: Hello,
    choice: Choice,
    state: State,
}

#[derive(Debug)]
enum State {
    Connecting {
        until: Instant,
    },
    /// The hello is said; the welcome is to come.
    Greeting {
        until: Instant,
        decoder: Decoder,
    },
    /// `old`: it has not answered the hello.
    Seed {
        idle: bool,
        old: bool,
    },
    Relay {
        idle: bool,
        decoder: Decoder,
        // What the cache said right behind its welcome.
        behind: Vec<Kind>,
        // What was wrong behind something that the cache has said.
        broken: Option<String>,
        // A cache of the first minor version may be silent while it lets us wait our turn.
        silence: Option<Silence>,
    },
    /// Everything is sent, our half is shut. The send queue is looked at next at `look_at`; None: it can't be
    /// known.
    Closing {
        look_at: Option<Instant>,
        pause: Duration,
    },
}

/// How a step of the link ended.
#[derive(Debug)]
pub enum LinkStep {
    /// The connection could not be made.
    Refused(String),
    /// The link stands. With a welcome it speaks the relay protocol.
    Up(Option<relay::Welcome>),
    /// Relay: the cache says something.
    Heard(Vec<Kind>),
    /// An event will come, or something to send.
    Wait,
    /// The turn is used up.
    Again,
    /// The link is lost.
    Lost(String),
    /// The peer has everything, as far as this protocol can tell.
    Delivered,
}

impl Link {
    /// Begins to connect. `hello` is what is said first, unless `choice` leaves nothing to be found out.
    pub fn connect(address: SocketAddr, hello: Hello, choice: Choice, now: Instant) -> io::Result<Self> {
        let fd = net::tcp_socket(address)?;
        match connect(&fd, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let state = State::Connecting { until: now + ATTEMPT };
        Ok(Self { fd, name: address.to_string(), hello, choice, state })
    }

    /// Takes over an established connection.
    pub fn inherited(fd: OwnedFd, hello: Hello, choice: Choice, now: Instant) -> Self {
        let state = State::Connecting { until: now + ATTEMPT };
        Self { fd, name: "the inherited connection".into(), hello, choice, state }
    }

    /// What is spoken, once that is known.
    pub fn protocol(&self) -> Option<Protocol> {
        match self.state {
            State::Connecting { .. } | State::Greeting { .. } => None,
            State::Seed { .. } | State::Closing { .. } => Some(Protocol::Seed),
            State::Relay { .. } => Some(Protocol::Relay),
        }
    }

    /// Who is on the other side.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Goes on.
    pub fn step(&mut self, sender: &mut Sender, bodies: &mut Bodies, block: &mut [u8]) -> LinkStep {
        match &mut self.state {
            State::Connecting { .. } => self.connected(),
            State::Greeting { .. } => self.greeted(block),
            State::Seed { idle, old } => {
                let old = *old;
                match discard(&self.fd, block) {
                    Ok(true) => {}
                    Ok(false) => return LinkStep::Lost(CLOSED.into()),
                    Err(why) => return LinkStep::Lost(why),
                }
                give(sender, Protocol::Seed, old, bodies, &self.fd, idle)
            }
            State::Relay { behind, .. } if !behind.is_empty() => LinkStep::Heard(std::mem::take(behind)),
            State::Relay { broken: Some(why), .. } => LinkStep::Lost(std::mem::take(why)),
            State::Relay { idle, decoder, broken, silence, .. } => {
                let mut heard = Vec::new();
                let heed = |kind: &Kind| match kind {
                    Kind::Ack(ack) => {
                        sender.acknowledged(ack);
                        false
                    }
                    Kind::Pong(_) => false,
                    _ => true,
                };
                match listen(&self.fd, decoder, block, &mut heard, silence, heed) {
                    // What it said last may be why.
                    ended if !heard.is_empty() => {
                        *broken = ended.err();
                        LinkStep::Heard(heard)
                    }
                    Ok(()) => match give(sender, Protocol::Relay, false, bodies, &self.fd, idle) {
                        // What it said before it closed explains more than the error does.
                        LinkStep::Lost(why) => {
                            let _ = listen(&self.fd, decoder, block, &mut heard, silence, |_| true);
                            if heard.is_empty() { LinkStep::Lost(why) } else { LinkStep::Heard(heard) }
                        }
                        step => step,
                    },
                    Err(why) => LinkStep::Lost(why),
                }
            }
            State::Closing { look_at, pause } => {
                // Behind the peer's close a read says nothing of an error.
                if let Ok(Err(error)) = sockopt::socket_error(&self.fd) {
                    return LinkStep::Lost(error.to_string());
                }
                let open = match discard(&self.fd, block) {
                    Ok(open) => open,
                    Err(why) => return LinkStep::Lost(why),
                };
                let now = Instant::now();
                match look_at {
                    // Nothing but the close tells.
                    None if open => LinkStep::Wait,
                    None => LinkStep::Delivered,
                    Some(at) if open && now < *at => LinkStep::Wait,
                    Some(at) => {
                        *pause = (*pause * 2).min(LOOK_MAX);
                        *at = now + *pause;
                        match unacknowledged(&self.fd) {
                            Some(0) => LinkStep::Delivered,
                            // A peer that closes its half has not read everything for that.
                            Some(_) => LinkStep::Wait,
                            None if open => LinkStep::Wait,
                            None => LinkStep::Delivered,
                        }
                    }
                }
            }
        }
    }

    /// Everything has been handed to the kernel: closes our half, and waits until the peer has it.
    pub fn finish(&mut self) {
        // It fails only when the link is lost already; the next step sees that.
        let _ = shutdown(&self.fd, Shutdown::Write);
        let known = unacknowledged(&self.fd).is_some();
        self.state = State::Closing { look_at: known.then(Instant::now), pause: LOOK };
    }

    /// Nothing but the relay protocol will do from now on.
    pub fn require_relay(&mut self) {
        self.choice = Choice::Only(Protocol::Relay);
    }

    /// Whether negotiation has shown that the cache is one of 2017 or 2020.
    pub fn is_old(&self) -> bool {
        matches!(self.state, State::Seed { old: true, .. })
    }

    /// Whether it is being closed.
    pub fn is_closing(&self) -> bool {
        matches!(self.state, State::Closing { .. })
    }

    /// The time for the welcome is up, or the attempt took too long, or the cache has been silent for a while.
    pub fn expired(&mut self, sender: &mut Sender) -> LinkStep {
        match &mut self.state {
            State::Relay { silence: Some(silence), .. } => match silence.expired(Instant::now()) {
                Some(token) => {
                    sender.ping(token);
                    LinkStep::Again
                }
                None => LinkStep::Lost(format!("nothing was heard of it for {} s", CACHE_LOST.as_secs())),
            },
            State::Greeting { .. } if self.choice.allows(Protocol::Seed) => {
                self.state = State::Seed { idle: true, old: true };
                LinkStep::Up(None)
            }
            State::Greeting { .. } => LinkStep::Refused(format!(
                "it has not said within {} s that it speaks the relay protocol, which is needed here",
                GREETING.as_secs()
            )),
            _ => LinkStep::Refused("no answer".into()),
        }
    }

    /// Writes what there is to say, whatever comes in meanwhile: this link may not be stepped any more. An error is seen
    /// by the next step, if there is one.
    pub fn say_now(&mut self, sender: &mut Sender, bodies: &mut Bodies) {
        if let State::Relay { idle, .. } = &mut self.state {
            give(sender, Protocol::Relay, false, bodies, &self.fd, idle);
        }
    }

    /// Closes it so that the peer sees a failure, and learns what it was if it can be told: whether it could.
    pub fn fail(self, sender: &mut Sender, why: &str) -> bool {
        let told = self.protocol() == Some(Protocol::Relay) && sender.fail(why, self.fd.as_fd());
        if !told {
            net::reset(self.fd);
        }
        told
    }

    fn connected(&mut self) -> LinkStep {
        match sockopt::socket_error(&self.fd) {
            Ok(Ok(())) => {}
            Ok(Err(error)) | Err(error) => return LinkStep::Refused(error.to_string()),
        }
        match rustix::net::getpeername(&self.fd) {
            Ok(Some(_)) => {}
            Ok(None) | Err(Errno::NOTCONN) => return LinkStep::Wait,
            Err(error) => return LinkStep::Refused(error.to_string()),
        }
        // A port that nobody listens at may be the one that the kernel gave to this very socket.
        if rustix::net::getsockname(&self.fd).ok() == rustix::net::getpeername(&self.fd).ok().flatten() {
            return LinkStep::Refused("nobody listens there".into());
        }
        net::tune_link(&self.fd);
        if self.choice == Choice::Only(Protocol::Seed) {
            self.state = State::Seed { idle: true, old: false };
            return LinkStep::Up(None);
        }
        let hello = relay::encode_greeting(&self.hello);
        // The first bytes on this socket: there is room for them.
        match send(&self.fd, &hello, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(n) if n == hello.len() => {}
            Ok(_) => return LinkStep::Refused("it did not take a whole hello".into()),
            Err(error) => return LinkStep::Refused(error.to_string()),
        }
        self.state = State::Greeting { until: Instant::now() + GREETING, decoder: Decoder::default() };
        LinkStep::Wait
    }

    fn greeted(&mut self, block: &mut [u8]) -> LinkStep {
        let State::Greeting { decoder, .. } = &mut self.state else { return LinkStep::Wait };
        let mut heard = Vec::new();
        let ended = listen(&self.fd, decoder, block, &mut heard, &mut None, |_| true);
        let mut heard = heard.into_iter();
        match heard.next() {
            Some(Kind::Welcome(welcome)) => match relay::check_version(welcome.major) {
                Ok(()) => {
                    let decoder = std::mem::take(decoder);
                    let pings = welcome.minor >= relay::PINGS_SINCE;
                    let silence = pings.then(|| Silence::new(Instant::now()));
                    if pings {
                        net::let_wait(&self.fd);
                    }
                    // It may have said more, and gone.
                    let (behind, broken) = (heard.collect(), ended.err());
                    self.state = State::Relay { idle: true, decoder, behind, broken, silence };
                    LinkStep::Up(Some(welcome))
                }
                Err(error) => LinkStep::Refused(format!("it {error}")),
            },
            Some(Kind::Error(error)) => LinkStep::Refused(error.shown()),
            Some(_) => LinkStep::Refused("it did not begin with its welcome".into()),
            None => match ended {
                Ok(()) => LinkStep::Wait,
                Err(why) => LinkStep::Refused(why),
            },
        }
    }
}

const CLOSED: &str = "the peer closed it";

fn give(
    sender: &mut Sender,
    protocol: Protocol,
    old: bool,
    bodies: &mut Bodies,
    link: &OwnedFd,
    idle: &mut bool,
) -> LinkStep {
    let flow = sender.step(protocol, old, bodies, link.as_fd());
    *idle = matches!(flow, Ok(Flow::End));
    match flow {
        Ok(Flow::Wait | Flow::End | Flow::Starved) => LinkStep::Wait,
        Ok(Flow::Again) => LinkStep::Again,
        Err(error) => LinkStep::Lost(error.to_string()),
    }
}

// Takes what the cache says, a bounded part of it, as far as `heed` has it. The error: the link has ended, and why.
fn listen(
    link: &OwnedFd,
    decoder: &mut Decoder,
    block: &mut [u8],
    heard: &mut Vec<Kind>,
    silence: &mut Option<Silence>,
    mut heed: impl FnMut(&Kind) -> bool,
) -> Result<(), String> {
    let mut blocks = 0;
    while blocks < CHATTER {
        let n = match recv(link, &mut *block, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(CLOSED.into()),
            Ok((_, n)) => n,
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.to_string()),
        };
        blocks += u32::from(n == block.len());
        *silence = silence.take().map(|_| Silence::new(Instant::now()));
        let mut input = &block[..n];
        while let Some(item) = decoder.next(&mut input).map_err(|error| format!("the peer {error}"))? {
            match item {
                Item::Message(kind) if heed(&kind) => heard.push(kind),
                Item::Message(_) => {}
                Item::Bytes(..) => return Err("the peer sent image data, which no cache does".into()),
            }
        }
        if !heard.is_empty() {
            return Ok(());
        }
    }
    Err("the peer does not stop talking, which no cache does".into())
}

// A peer of the seed protocol says nothing. Should one, what it says is dropped; one that does not stop fails
// the link instead of taking all our time. Ok(false): it has closed.
fn discard(link: &OwnedFd, block: &mut [u8]) -> Result<bool, String> {
    for _ in 0..CHATTER {
        match recv(link, &mut *block, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Ok(false),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(true),
            Err(error) => return Err(error.to_string()),
        }
    }
    Err("the peer does not stop talking, which no cache does".into())
}

impl Pollable for Link {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        Some(match self.state {
            State::Connecting { .. } => Interest::WRITABLE,
            State::Seed { idle: false, .. } | State::Relay { idle: false, .. } => {
                Interest::READABLE | Interest::WRITABLE
            }
            State::Greeting { .. }
            | State::Seed { idle: true, .. }
            | State::Relay { idle: true, .. }
            | State::Closing { .. } => Interest::READABLE,
        })
    }

    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Connecting { until } | State::Greeting { until, .. } => Some(until),
            State::Seed { .. } => None,
            State::Relay { ref silence, .. } => silence.as_ref().map(Silence::until),
            State::Closing { look_at, .. } => look_at,
        }
    }
}
