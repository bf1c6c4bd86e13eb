//! The proxy and its link: the search for it, what is lost with it, and its end.

use std::time::Instant;

use super::records::Owed;
use super::{Conn, Event, Proxy, hello};
use crate::client::stream::{PipeIn, Way};
use crate::peer::dialer::Dialer;
use crate::peer::link::{Link, LinkStep};
use crate::peer::{Choice, Protocol};
use crate::pump;
use crate::reactor::Exit;
use crate::session::Word;
use crate::session::source::Decision;
use crate::store::BodyId;
use crate::table::Id;
use crate::wire::Key;
use crate::wire::relay::{self, Hello, Holding, Kind, Welcome};

pub const NONE_ANY_MORE: &str = "no criu restore waits at the cache any more";

impl Proxy {
    pub(super) fn dial(&mut self) {
        if self.link.is_some() {
            return;
        }
        let for_ever = self.session.is_bound() || self.may_be_only_copy();
        // A session that goes on has a time of its own for that: anew whenever something of it has got through.
        let comes_back = self.policy.reconnect.filter(|_| self.session.is_torn());
        let renewed = comes_back.is_some() && self.lost_at != Some(self.sender.acknowledgements());
        if comes_back.is_some() {
            self.lost_at = Some(self.sender.acknowledgements());
        }
        if let Some(dialer) = &mut self.dialer {
            dialer.within(comes_back);
            if renewed {
                dialer.served();
            }
        }
        match &mut self.dialer {
            // A search that is under way goes on, and perhaps for ever from now on.
            Some(dialer) if dialer.is_searching() => {
                if for_ever {
                    dialer.limit(Instant::now(), true);
                } else if self.session.word().is_some() && dialer.is_endless() {
                    // The time for a link that was lost is up; that for a word begins.
                    dialer.limit(Instant::now(), false);
                }
            }
            Some(dialer) => dialer.start(Instant::now(), for_ever),
            None if self.session.is_idle() => {
                log::error!("the inherited connection is gone and can't be made anew");
                self.exit = Some(Exit::Failed);
            }
            None if self.session.word().is_some() && !self.session.is_bound() => {
                let decision = self.session.no_link("the inherited connection is gone".into(), false);
                self.decide(decision);
            }
            None => log::error!(
                "the inherited connection is gone and can't be made anew: the images stay here until a signal comes"
            ),
        }
    }

    pub(super) fn step_link(&mut self, id: Id) {
        let Some(Conn::Link(link)) = self.conns.get_mut(id) else { return };
        let step = link.step(&mut self.sender, &mut self.bodies, &mut self.block);
        self.passed();
        self.link_stepped(id, step);
    }

    pub(super) fn link_stepped(&mut self, id: Id, step: LinkStep) {
        let Some(Conn::Link(link)) = self.conns.get(id) else { return };
        match step {
            LinkStep::Wait => {}
            LinkStep::Again => self.conns.again(id),
            LinkStep::Up(welcome) => {
                self.cache_limit = welcome.as_ref().map_or(0, |welcome| welcome.memory_limit);
                match (&welcome, self.cache_limit) {
                    (Some(_), 0) => log::info!("connected to {}, relay protocol", link.name()),
                    (Some(_), limit) => log::info!(
                        "connected to {}, relay protocol; its memory limit is {}",
                        link.name(),
                        pump::human(limit)
                    ),
                    (None, _) => {
                        log::info!("connected to {}, seed protocol: nothing is confirmed", link.name())
                    }
                }
                if let Some(dialer) = &mut self.dialer {
                    dialer.succeeded(Instant::now());
                }
                self.conns.again(id);
                self.link_up(welcome);
            }
            LinkStep::Heard(heard) => {
                self.conns.again(id);
                for kind in heard {
                    self.heard(id, kind);
                }
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

    // What is spoken is decided. `welcome`: the cache's, in the relay protocol.
    fn link_up(&mut self, welcome: Option<Welcome>) {
        let welcome = welcome.unwrap_or_default();
        self.cache_restores = welcome.minor >= relay::KNOWS_RESTORED;
        self.restore_waits = welcome.restore_waits;
        // Our cache's run has a name; an old one has none.
        let run = (!welcome.run.is_empty()).then_some(welcome.run);
        let resumes = run.is_some() && run == self.run && (self.finished.is_some() || self.sender.is_torn());
        let decision = self.session.link_up();
        if run.is_some() {
            for word in self.owed_words() {
                self.sender.say(word);
            }
        }
        // What waited when the link was lost may have gone meanwhile; once everything is sent it does not wait any more.
        if self.session.is_scripted() && self.lacks_restore() && self.finished.is_none() {
            let decision = self.session.restore_failed(NONE_ANY_MORE);
            if decision != Decision::Nothing {
                return self.decide(decision);
            }
        }
        if decision == Decision::SendAnew && resumes {
            // It may have everything, so that only its word for it was lost; or a part, behind which it goes on.
            self.holdings = Some(Vec::new());
            let (session, run) = (self.session_id.to_vec(), run.unwrap_or_default());
            self.sender.say(Kind::Resume(relay::Resume { session, run }));
            return;
        }
        self.run = run;
        if decision == Decision::Nothing && (self.session.is_running() || self.session.is_complete()) {
            self.announce_session();
        }
        self.decide(decision);
    }

    // Relay: a session begins. What is sent from here on belongs to it.
    pub(super) fn announce_session(&mut self) {
        if self.run.is_some() {
            let scripted = self.session.is_scripted();
            self.sender.say(Kind::Hello(Hello { scripted, ..hello(self.session_id, &self.policy) }));
            self.wake_link();
        }
    }

    fn heard(&mut self, id: Id, kind: Kind) {
        // An error that answers a word says that there is nothing left to be told.
        let is_verdict =
            matches!(kind, Kind::Released(_) | Kind::RolledBack(_) | Kind::AllStored(_) | Kind::Error(_));
        let confirmed = match self.sender.heard(&kind, &mut self.bodies) {
            Ok(confirmed) => confirmed,
            Err(why) => return self.refuse_link(id, format!("the cache {why}")),
        };
        let decision = match (confirmed, kind) {
            (Some((key, body)), _) => {
                self.stored(&key, body);
                Decision::Nothing
            }
            (_, Kind::AllStored(all)) if Some((all.images, all.bytes)) == self.finished => {
                self.sender.all_stored(&mut self.bodies);
                self.times.stored(all.bytes);
                // The one that waited gets the images. Should another wait, the cache says so.
                self.restore_waits = false;
                let decision = self.session.all_stored();
                if self.session.is_preparing() {
                    log::info!("the cache has stored everything: the restore is at it");
                }
                decision
            }
            (_, Kind::AllStored(all)) => {
                let why = format!(
                    "the cache has confirmed {} transfers and {} bytes, which are not what was sent",
                    all.images, all.bytes
                );
                return self.refuse_link(id, why);
            }
            (_, Kind::Released(said)) if said.session == self.session_id => {
                self.session.acknowledged(Word::Release)
            }
            (_, Kind::RolledBack(said)) if said.session == self.session_id => {
                self.session.acknowledged(Word::Rollback)
            }
            (_, Kind::RolledBack(said)) => {
                self.no_longer_owed(&said.session);
                Decision::Nothing
            }
            (_, Kind::Restore(restore)) => self.restore_said(&restore),
            (_, Kind::Prepared(relay::Prepared { bytes })) => {
                self.prepared(bytes);
                Decision::Nothing
            }
            (_, Kind::Holding(holding)) => self.holds(id, holding),
            (_, Kind::Error(error)) if self.session.word().is_some() => {
                self.session.disowned(&format!("the cache says: {}", error.shown()))
            }
            // It has failed the session, as if the link had been lost; but it says why.
            (_, Kind::Error(error)) => {
                return self.refuse_link(id, format!("the cache says: {}", error.shown()));
            }
            _ => Decision::Nothing,
        };
        self.peer_knows = is_verdict && matches!(decision, Decision::Over(_));
        self.decide(decision);
    }

    // How a restore on the other side stands.
    fn restore_said(&mut self, restore: &relay::Restore) -> Decision {
        match restore.state {
            relay::NONE_WAITS => {
                self.restore_waits = false;
                // Once everything is stored, the one that matters does not wait any more.
                match self.session.is_preparing() {
                    true => Decision::Nothing,
                    false => self.session.restore_failed(NONE_ANY_MORE),
                }
            }
            relay::WAITS => {
                self.restore_waits = true;
                Decision::Nothing
            }
            relay::PREPARED => {
                self.times.ready();
                self.session.prepared()
            }
            relay::FAILED => {
                let why = relay::shown(&restore.text);
                self.session.restore_failed(&format!("the restore on the other side has failed: {why}"))
            }
            relay::SUCCEEDED => {
                log::info!("the restore on the other side has succeeded");
                Decision::Nothing
            }
            _ => Decision::Nothing,
        }
    }

    // The cache has an image that came from this body.
    fn stored(&mut self, key: &Key, body: BodyId) {
        if !self.policy.retain.keeps(key) && !self.flows.contains_key(key) {
            self.images.forget(key, body, &mut self.bodies);
            log::debug!("{key}: stored by the cache, not kept here any more");
        }
    }

    // The cache says what it holds of the session whose link was lost. What was not asked for says nothing.
    fn holds(&mut self, id: Id, holding: Holding) -> Decision {
        let Some(mut holdings) = self.holdings.take() else { return Decision::Nothing };
        let last = holding.last;
        holdings.push(holding);
        if !last {
            let too_many = holdings.len() as u64 > self.sender.opened();
            self.holdings = Some(holdings);
            if too_many {
                self.refuse_link(id, "the cache holds more transfers than were sent".into());
            }
            return Decision::Nothing;
        }
        if !self.sender.is_torn() || holdings.iter().all(|holding| holding.id == 0) {
            // Nothing.
            return Decision::SendAnew;
        }
        match self.sender.resumed(&holdings, &mut self.bodies) {
            Ok(stored) => {
                log::info!("the dump goes on where the link was lost");
                for (key, body) in stored {
                    self.stored(&key, body);
                }
                // Should it have been said that this is all: it was not heard.
                self.finished = None;
                self.wake_link();
            }
            Err(why) => self.refuse_link(id, format!("the cache {why}")),
        }
        Decision::Nothing
    }

    // The link goes, for what the cache has said: it would say that again.
    fn refuse_link(&mut self, id: Id, why: String) {
        self.refused = true;
        self.close(id, Some(why));
        self.refused = false;
    }

    pub(super) fn unreachable(&mut self, why: String) {
        log::trace!("no link: {why}");
        self.link = None;
        if let Some(dialer) = &mut self.dialer {
            dialer.failed(Instant::now(), why);
        }
        self.turn_away();
    }

    pub(super) fn link_gone(&mut self, id: Id, why: String) {
        if self.link != Some(id) {
            return;
        }
        log::warn!("the link to the cache is lost: {why}");
        self.link = None;
        self.restore_waits = false;
        self.holdings = None;
        self.forget_prepared();
        if let Some(dialer) = &mut self.dialer {
            dialer.note(&why);
        }
        let used = !self.session.is_idle();
        if !used && self.dialer.is_some() {
            // Nothing depends on it. What begins now is not to be told on a link that is gone.
            self.run = None;
            let decision = self.session.unused_link_lost();
            return self.decide(decision);
        }
        let refused = self.refused;
        self.deferred.push(Event::LinkLost { why, used, refused });
    }

    pub(super) fn send_anew(&mut self) {
        if self.sender.is_torn() && self.sender.is_whole() {
            // Nothing of it has been stored anywhere: all of it is still to be sent.
            self.finished = None;
            self.announce_session();
            if let Err(why) = self.sender.resumed(&[], &mut self.bodies) {
                self.failed(format!("the cache {why}"));
            }
            return self.wake_link();
        }
        if self.has_passed() {
            let decision = self.session.lost("the cache does not have the session any more");
            return self.decide(decision);
        }
        log::info!("the whole session is sent anew: {} images", self.images.len());
        self.sender.clear(&mut self.bodies);
        self.finished = None;
        self.announce_session();
        for (key, image) in self.images.in_order() {
            self.sender.push(key.clone(), image, &mut self.bodies);
        }
        self.flows.clear();
        let writing = self.conns.iter().filter_map(|(_, conn)| match conn {
            Conn::Remote(client) => client.writing(),
            Conn::Pipe(PipeIn { way: Way::Body(inflow), .. }) => Some(inflow),
            _ => None,
        });
        let writing: Vec<_> = writing.map(|inflow| (inflow.key.clone(), inflow.body, inflow.start)).collect();
        for (key, body, start) in writing {
            self.opens(&key, body, start);
            self.grown(&key, body);
        }
        self.wake_link();
    }

    // Scripted: what becomes of the images, if it can be said now.
    pub(super) fn say_word(&mut self, word: Word) {
        if self.run.is_none() || !self.session.is_linked() {
            return self.dial();
        }
        let session = self.session_id.to_vec();
        self.sender.say(match word {
            Word::Release => Kind::Release(relay::Release { session }),
            Word::Rollback => Kind::Rollback(relay::Rollback { session }),
        });
        self.wake_link();
    }

    pub(super) fn wake_link(&mut self) {
        if let Some(link) = self.link {
            self.conns.again(link);
        }
    }

    // Whether a dump runs that nothing but a link can end, with no end to the search for one.
    fn is_stranded(&self) -> bool {
        self.session.is_running()
            && self.link.is_none()
            && self.dialer.as_ref().is_none_or(Dialer::is_endless)
            && self.deferred.is_empty()
            && !self.may_be_only_copy()
    }

    pub(super) fn tick_link(&mut self, now: Instant) {
        if let Some(dialer) = &mut self.dialer
            && dialer.gave_up(now)
        {
            let why = dialer.why();
            if self.session.stays() && self.session.is_idle() {
                log::warn!("{why} The search goes on.");
            }
            self.deferred.push(Event::NoLink(why));
        }
        // A search without end is for the only copy: after a pre-dump, the next dump can still be made to fail.
        if self.is_stranded() {
            match &mut self.dialer {
                Some(dialer) => dialer.limit(now, false),
                None => return self.failed("the inherited connection is gone".into()),
            }
        }
        if let Some(address) = self.dialer.as_mut().and_then(|dialer| dialer.due(now)) {
            // What a scripted session has to say can't be said in the seed protocol; and a cache that has said its
            // welcome to this session is not taken for an old one because it is slow.
            let relay = self.session.is_scripted() || (self.run.is_some() && !self.session.is_idle());
            let choice = if relay { Choice::Only(Protocol::Relay) } else { self.policy.choice };
            // A cache that has its dump lets nobody in but those whose session it knows.
            let owed = self.owed.front().filter(|_| self.session.is_idle()).map(Owed::session);
            let session = owed.unwrap_or(self.session_id);
            let link = Link::connect(address, hello(session, &self.policy), choice, now);
            match link.and_then(|link| self.conns.insert(Conn::Link(link))) {
                Ok(id) => self.link = Some(id),
                Err(error) => self.unreachable(format!("{address}: {error}")),
            }
        }
        // Everything is here, and everything has been handed over.
        let Some(id) = self.link else { return };
        if !self.session.is_linked() || !self.sender.is_idle() {
            return;
        }
        let Some(Conn::Link(link)) = self.conns.get_mut(id) else { return };
        match link.protocol() {
            // The end of the link is the end of the dump.
            Some(Protocol::Seed) if self.session.is_complete() && !link.is_closing() => {
                link.finish();
                self.conns.again(id);
                self.settle(id);
            }
            Some(Protocol::Relay)
                if (self.session.is_complete() || self.session.is_held() || self.session.is_asking())
                    && self.finished.is_none() =>
            {
                if self.session.is_held()
                    && let Err(why) = self.record_session()
                {
                    return self.failed(why);
                }
                let (images, bytes) = self.sender.sent();
                self.finished = Some((images, bytes));
                self.session.asking();
                self.sender.say(Kind::Finished(relay::Finished { images, bytes }));
                self.conns.again(id);
            }
            _ => {}
        }
    }
}
