//! Sessions whose link was lost and may come back (--reconnect at the proxy): what has come of them is set aside. Their
//! readers keep waiting, whoever wants to begin another waits too, and when the time is up the session fails as it
//! would have at once.

use std::time::{Duration, Instant};

use super::{Cache, Conn};
use crate::peer::resume::Progress;
use crate::peer::silence::CACHE_LOST;
use crate::table::Id;
use crate::wire::relay::{self, Holding, Kind, SessionId};

/// A session without a link.
#[derive(Debug)]
pub struct Aside {
    session: SessionId,
    progress: Progress,
    until: Instant,
    /// Who has lost it, and how.
    why: String,
}

impl Aside {
    /// When it is too late.
    pub fn until(&self) -> Instant {
        self.until
    }
}

impl Cache {
    /// A link was lost, not what came over it: its session goes on if it may.
    pub(super) fn link_lost(&mut self, id: Id, why: String) {
        let (session, seconds) = match self.conns.get(id) {
            Some(Conn::Relay(peer)) if self.peer == Some(id) => (peer.session(), peer.reconnect()),
            _ => (None, 0),
        };
        let Some(session) = session.filter(|_| seconds > 0 && !self.inherited) else {
            return self.close(id, Some(why));
        };
        let Some(Conn::Relay(peer)) = self.conns.remove(id) else { return };
        self.peer = None;
        let why = format!("the peer {} {why}", peer.name());
        // The proxy may still have to find out.
        let within = Duration::from_secs(seconds.into()) + CACHE_LOST;
        log::warn!("{why}; the dump goes on if it comes back within {} s", within.as_secs());
        self.aside = Some(Aside { session, progress: peer.set_aside(), until: Instant::now() + within, why });
    }

    /// Whether a connection that comes now may be that of the session which is in progress.
    pub(super) fn may_be_resumed(&self) -> bool {
        let goes_on = |id| matches!(self.conns.get(id), Some(Conn::Relay(peer)) if peer.reconnect() > 0);
        self.aside.is_some() || self.peer.is_some_and(goes_on)
    }

    /// A proxy is back, and asks what is held of its session.
    pub(super) fn resume(&mut self, id: Id, session: SessionId, run: &[u8]) {
        if self.peer == Some(id) {
            return self.close(id, Some("resumed a session in the middle of it".into()));
        }
        let here = run == self.run;
        let known = self.confirmed.iter().find(|(known, ..)| here && *known == session);
        if let Some((_, images, bytes)) = known {
            let answer = Kind::AllStored(relay::AllStored { images: *images, bytes: *bytes });
            self.say(id, answer);
            // And how its copy stands, which it may not have heard either.
            if let Some(ready) = self.session.copy_stands_ready(session) {
                let state = if ready { relay::PREPARED } else { relay::FAILED };
                let text = if ready { "" } else { "while the link was lost" }.into();
                self.say(id, Kind::Restore(relay::Restore { state, text }));
            }
            return;
        }
        let Some(progress) = here.then(|| self.take_progress(session)).flatten() else {
            // Nothing is held of a session that was cut off for good, or of another run.
            return self.say(id, Kind::Holding(Holding { last: true, ..Holding::default() }));
        };
        let Some(Conn::Relay(peer)) = self.conns.get_mut(id) else { return };
        log::info!("the dump goes on, from {}", peer.name());
        peer.go_on(session, progress);
        self.parked.retain(|other| *other != id);
        self.peer = Some(id);
        self.settle(id);
        self.conns.again(id);
    }

    // What has come of this session, from where it was set aside, or from a link that is lost on the proxy's side only.
    fn take_progress(&mut self, session: SessionId) -> Option<Progress> {
        if let Some(aside) = self.aside.take_if(|aside| aside.session == session) {
            return Some(aside.progress);
        }
        let old = self.peer.filter(|id| match self.conns.get(*id) {
            Some(Conn::Relay(peer)) => peer.session() == Some(session) && peer.reconnect() > 0,
            _ => false,
        })?;
        let Some(Conn::Relay(peer)) = self.conns.remove(old) else { return None };
        self.peer = None;
        log::warn!("{} is lost: its proxy has come back over another link", peer.name());
        Some(peer.set_aside())
    }

    /// The time for that may be up.
    pub(super) fn tick_aside(&mut self, now: Instant) {
        if let Some(aside) = self.aside.take_if(|aside| aside.until <= now) {
            let why = format!("{}, and has not come back", aside.why);
            self.fail_aside(aside, why);
        }
    }

    /// Its source has rolled this session back: nobody comes back for it.
    pub(super) fn roll_back_aside(&mut self, session: SessionId) {
        if let Some(aside) = self.aside.take_if(|aside| aside.session == session) {
            let why = format!("{}, and its source has rolled the dump back", aside.why);
            self.fail_aside(aside, why);
        }
    }

    fn fail_aside(&mut self, mut aside: Aside, why: String) {
        aside.progress.drop_arriving(&mut self.bodies);
        self.session_ended(Err(why));
    }

    /// The cache ends.
    pub(super) fn drop_aside(&mut self) {
        if let Some(mut aside) = self.aside.take() {
            aside.progress.drop_arriving(&mut self.bodies);
        }
    }
}
