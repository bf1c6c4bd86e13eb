//! The cache and the memory that it writes before a dump comes: because a proxy asks for it, before anything is frozen,
//! or from the start (--prepare SIZE). It is written in turns, while everything else goes on.

use std::time::{Duration, Instant};

use super::{Cache, Conn};
use crate::peer::Prepare;
use crate::pump::human;
use crate::store::body::Filling;
use crate::table::Id;
use crate::times::Times;
use crate::wire::relay::{self, Kind};

/// How long what a proxy has asked for waits for its dump.
pub const STALE: Duration = Duration::from_secs(60);

/// What is written, and for whom.
#[derive(Debug, Default)]
pub struct Preparation {
    policy: Prepare,
    asked: Option<Asked>,
    // Since when memory is being written.
    since: Option<Instant>,
    // Whether what --prepare SIZE asks for has been tried since the last session.
    tried: bool,
    // What was written last, for the session that comes next or is here: how long it took, and how much there was.
    done: Option<(Duration, u64)>,
}

/// A proxy that has asked.
#[derive(Debug)]
struct Asked {
    peer: Id,
    bytes: u64,
    /// It has been answered: until when its dump may take to come.
    until: Option<Instant>,
}

impl Preparation {
    /// As --prepare has it.
    pub fn new(policy: Prepare) -> Self {
        Self { policy, ..Self::default() }
    }

    /// When it is to be looked at again.
    pub fn wake_at(&self) -> Option<Instant> {
        self.asked.as_ref()?.until
    }
}

impl Cache {
    /// A proxy is about to dump so much; or, with 0, is not any more.
    pub(super) fn prepare(&mut self, id: Id, bytes: u64, sizes: Vec<u64>) {
        // Another one, or the same once more: each is answered, in its turn.
        self.answer_prepare(self.bodies.pool());
        let is_theirs = self.preparing.asked.as_ref().is_some_and(|asked| asked.peer == id);
        if bytes == 0 && is_theirs {
            log::debug!("the dump for which memory was prepared does not come");
            self.preparing.done = None;
            self.preparation_over();
        }
        if bytes == 0
            || self.preparing.policy == Prepare::Off
            || self.session.is_busy()
            || !self.session.takes_peers()
        {
            return self.say(id, Kind::Prepared(relay::Prepared { bytes: 0 }));
        }
        self.make_room_for(bytes);
        let sizes = if sizes.is_empty() { vec![bytes] } else { sizes };
        self.bodies.prepare(&sizes);
        self.preparing.done = None;
        self.preparing.asked = Some(Asked { peer: id, bytes, until: None });
        self.preparing.since = Some(Instant::now());
    }

    fn answer_prepare(&mut self, bytes: u64) {
        if let Some(asked) = &mut self.preparing.asked
            && asked.until.is_none()
        {
            asked.until = Some(Instant::now() + STALE);
            let (peer, bytes) = (asked.peer, bytes.min(asked.bytes));
            self.say(peer, Kind::Prepared(relay::Prepared { bytes }));
        }
    }

    /// A dump begins: what is there is for its images.
    pub(super) fn dump_takes_prepared(&mut self) {
        self.bodies.stop_filling();
        self.answer_prepare(self.bodies.pool());
        self.preparing.asked = None;
        self.preparing.since = None;
        self.times = Times::default();
        if let Some((took, bytes)) = self.preparing.done.take() {
            self.times.prepared(bytes, took);
        }
    }

    /// No image will come any more for what is left of it.
    pub(super) fn preparation_over(&mut self) {
        self.bodies.give_pool_back();
        let Preparation { policy, done, .. } = self.preparing;
        self.preparing = Preparation { done, ..Preparation::new(policy) };
    }

    /// Goes on with it. Whether there is more to do at once.
    pub(super) fn tick_prepare(&mut self, now: Instant) -> bool {
        if let Some(asked) = &self.preparing.asked {
            let is_gone = !matches!(self.conns.get(asked.peer), Some(Conn::Relay(_)));
            if is_gone || asked.until.is_some_and(|until| until <= now) {
                let why = if is_gone { "its proxy is gone" } else { "it has not come in time" };
                log::info!("memory was prepared for a dump that does not come: {why}");
                self.preparing.done = None;
                self.preparation_over();
            }
        }
        self.fill_at_start(now);
        let was_filling = self.bodies.is_filling();
        let filled = self.bodies.fill_pool();
        if was_filling && !self.bodies.is_filling() {
            self.filled(&filled, now);
        }
        matches!(filled, Filling::Again) || self.bodies.drain_pool()
    }

    fn filled(&mut self, filled: &Filling, now: Instant) {
        let (pool, took) = (self.bodies.pool(), self.preparing.since.take().map(|since| now - since));
        let took = took.unwrap_or_default();
        self.preparing.done = Some((took, pool));
        let for_whom = match &self.preparing.asked {
            Some(asked) => match self.conns.get(asked.peer) {
                Some(Conn::Relay(peer)) => format!(" for {}", peer.name()),
                _ => String::new(),
            },
            None => String::new(),
        };
        let (pool_shown, ms) = (human(pool), took.as_millis());
        match filled {
            Filling::Stopped(error) => {
                log::warn!("no more than {pool_shown} of memory can be prepared{for_whom}: {error}");
                self.answer_prepare(pool);
            }
            Filling::Done | Filling::Again => {
                log::info!("{pool_shown} of memory are prepared{for_whom}, in {ms} ms");
                // All that was asked for: what is small has no file of its own.
                self.answer_prepare(u64::MAX);
            }
        }
    }

    // --prepare SIZE: whenever nothing else is in progress.
    fn fill_at_start(&mut self, now: Instant) {
        let Prepare::Size(size) = self.preparing.policy else { return };
        let idle = self.preparing.asked.is_none()
            && !self.session.is_busy()
            && !self.session.has_only_copy()
            && self.session.takes_peers()
            && self.exit.is_none();
        if !idle || self.preparing.tried || self.bodies.is_filling() || self.bodies.pool() > 0 {
            return;
        }
        self.preparing.tried = true;
        self.make_room_for(size);
        self.bodies.prepare(&[size]);
        self.preparing.since = Some(now);
    }
}
