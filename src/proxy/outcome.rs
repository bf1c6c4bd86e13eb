//! The proxy and its session: what may be taken when, what cannot be undone, and what is left at the end.

use std::time::Instant;

use super::{Conn, Event, Proxy};
use crate::client::stream::{PipeIn, Way};
use crate::peer::dialer::Dialer;
use crate::pump;
use crate::reactor::Exit;
use crate::record::State;
use crate::session::source::Decision;
use crate::session::{Commit, Dialect, Word};
use crate::store::{Waits, catalog};
use crate::times::Times;
use crate::wire::Key;
use crate::wire::relay::{self, Kind};

impl Proxy {
    pub(super) fn session_begins(&mut self) {
        if self.session.is_scripted() {
            let when = match self.policy.commit {
                Commit::Stored => "the cache has confirmed everything",
                Commit::Restored => "the copy stands ready on the other side",
            };
            log::info!("a dump begins; it is scripted: CRIU goes on when {when}");
        } else {
            log::info!(
                "a dump begins; it is not scripted: CRIU kills the process without asking, and the cache serves \
                 it as soon as it is complete (criu dump --action-script criu-relay makes it wait)"
            );
        }
        if self.session.is_linked() {
            self.announce_session();
        }
        self.times.begin_at_latest();
        self.lost_at = None;
        // Its time for finding a link begins now.
        self.deferred.retain(|event| !matches!(event, Event::NoLink(_)));
        if !self.session.is_linked()
            && let Some(dialer) = &mut self.dialer
        {
            dialer.limit(Instant::now(), false);
        }
    }

    // CRIU has ended.
    pub(super) fn ended(&mut self, outcome: Result<(), String>) {
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

    pub(super) fn failed(&mut self, why: String) {
        let decision = self.session.failed(&why);
        self.decide(decision);
    }

    // Whether CRIU may have finished already: it writes inventory.img last.
    pub(super) fn may_be_only_copy(&self) -> bool {
        match self.session.dialect() {
            None => false,
            // CRIU does nothing before its script has our leave.
            Some(Dialect::Stream) if self.session.is_scripted() => false,
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

    pub(super) fn may_drain(&self) -> bool {
        self.session.is_linked() || self.is_ending() || self.may_be_only_copy()
    }

    pub(super) fn decide(&mut self, decision: Decision) {
        match decision {
            Decision::Nothing => {}
            Decision::Connect => self.dial(),
            Decision::SendAnew => self.send_anew(),
            Decision::Allow => self.allow(),
            Decision::Finish => self.finish_source(),
            Decision::Hold => log::error!(
                "a part of the source lives and a part is dead, and what has become of its CRIU is not known: the copy \
                 waits. If the source is whole, criu-relay resolve rollback; if it is not, kill what is left of it"
            ),
            Decision::Deny(why) => self.deny(&why),
            Decision::Say(word) => {
                if word == Word::Release {
                    self.note(State::Released);
                }
                self.say_word(word);
            }
            Decision::Stay if self.session.is_scripted() => log::warn!(
                "asked to end, but the cache has to be told what becomes of the images that it holds: it stays until \
                 then; ask once more to leave that undecided"
            ),
            Decision::Stay => log::warn!(
                "asked to end, but this may be the only copy of the process ({} images, {}): it stays until they \
                 are sent; ask once more to drop them",
                self.images.len(),
                pump::human(self.images.bytes())
            ),
            Decision::Over(outcome) => self.over(outcome),
        }
    }

    pub(super) fn over(&mut self, outcome: Result<(), String>) {
        let scripted = self.session.was_scripted();
        // Whether the cache knows already: it has just said so.
        let decided = std::mem::take(&mut self.peer_knows);
        match &outcome {
            Ok(()) => {
                let (images, bytes) = self.sender.sent();
                let (images, bytes) =
                    (images.max(self.images.len() as u64), pump::human(bytes.max(self.images.bytes())));
                match (self.run.is_some(), scripted) {
                    (true, true) => log::info!("{images} images, {bytes}: confirmed and released"),
                    (true, false) => log::info!("{images} images, {bytes}: confirmed by the cache"),
                    (false, _) => log::info!(
                        "{images} images, {bytes}: sent, not confirmed (the peer speaks the seed protocol)"
                    ),
                }
                if scripted {
                    self.times.over();
                }
                if let Some(line) = self.times.take() {
                    log::info!("{line}");
                }
                if let Some(dialer) = &mut self.dialer {
                    dialer.served();
                }
            }
            Err(why) if self.images.is_empty() => log::error!("{why}"),
            Err(why) => {
                let there = match self.link.is_some() && self.run.is_some() && self.finished.is_none() {
                    true => format!(
                        " here; the cache had stored {} of them, and drops them",
                        self.sender.stored()
                    ),
                    false => String::new(),
                };
                log::error!(
                    "{why}; {} images, {}, are dropped{there}",
                    self.images.len(),
                    pump::human(self.images.bytes())
                );
            }
        }
        // A link of the relay protocol stays for the next session, if this one has ended in order.
        let settled = outcome.is_ok() || decided;
        if settled && self.run.is_some() {
            let session = self.session_id.to_vec();
            self.sender.say(Kind::Settled(relay::Settled { session }));
            if let Some(id) = self.link
                && let Some(Conn::Link(link)) = self.conns.get_mut(id)
            {
                link.say_now(&mut self.sender, &mut self.bodies);
                self.conns.again(id);
                self.settle(id);
            }
        }
        let stays = self.session.stays() && self.run.is_some() && self.sender.is_idle();
        let mut told = outcome.is_ok() || decided || self.run.is_none();
        if !(stays && settled)
            && let Some(Conn::Link(link)) = self.link.take().and_then(|id| self.conns.remove(id))
        {
            self.run = None;
            // One that was still being made is looked for again.
            if let Some(dialer) = &mut self.dialer {
                dialer.abandoned(Instant::now());
            }
            match &outcome {
                Err(why) if !decided => told |= link.fail(&mut self.sender, why),
                _ => {}
            }
        }
        // It waits for a link that does not come back.
        if !told && self.policy.reconnect.is_some() && self.record.is_none() {
            self.owe(self.session_id, None);
        }
        // What has not asked for anything yet, or waits behind the fence, belongs to no session.
        self.drop_criu();
        self.sender.clear(&mut self.bodies);
        self.images.clear(&mut self.bodies);
        self.bodies.set_yields(false);
        self.script_over(outcome.as_ref().err());
        self.close_record(settled);
        self.finished = None;
        self.holdings = None;
        self.new_session_id();
        self.times = Times::default();
        self.deferred.retain(|event| matches!(event, Event::Asked(_)));
        let exit = if outcome.is_ok() { Exit::Done } else { Exit::Failed };
        if !self.session.keeps() {
            self.exit = Some(exit);
            return;
        }
        if !self.session.stays() {
            // Unless a CRIU that waits has ended already.
            self.leaving = Some(exit);
        }
        if self.link.is_none() {
            self.session.link_lost("the session is over", false);
            self.dial();
        }
        let waiting = self.conns.iter().filter(|(_, conn)| matches!(conn, Conn::Capture(_)));
        for id in waiting.map(|(id, _)| id).collect::<Vec<_>>() {
            self.conns.again(id);
        }
    }

    // Closes what belongs to the session's CRIU. What has not asked for anything yet, or waits behind the fence,
    // belongs to no session.
    pub(super) fn drop_criu(&mut self) {
        let capture = self.capture.take();
        let ours = self.conns.iter().filter(|(id, conn)| match conn {
            Conn::Capture(_) => Some(*id) == capture,
            Conn::Remote(client) => client.has_asked() && !self.fence.holds(client.order()),
            Conn::Pipe(_) => true,
            Conn::Link(_) | Conn::Local(_) | Conn::Control(_) | Conn::Process(_) => false,
        });
        let ours: Vec<_> = ours.map(|(id, _)| id).collect();
        self.finish = None;
        self.writers.clear();
        self.waits = Waits::default();
        self.open_writes.clear();
        self.pipes.clear();
        self.flows.clear();
        self.short.clear();
        for id in ours {
            let body = match self.conns.remove(id) {
                Some(Conn::Remote(client)) => client.body(),
                Some(Conn::Pipe(PipeIn { way: Way::Body(inflow), .. })) => Some(inflow.body),
                _ => None,
            };
            if let Some(body) = body {
                self.bodies.release(body);
            }
        }
    }

    // Whether the session that is in progress takes nothing more: what comes belongs to the next.
    pub(super) fn is_ending(&self) -> bool {
        let stream_ended = self.session.dialect() == Some(Dialect::Stream) && self.capture.is_none();
        self.session.has_all() || self.finish.is_some() || stream_ended
    }

    // Whether what comes waits until then; without a next session there is nothing to wait for.
    pub(super) fn is_holding_back(&self) -> bool {
        self.is_ending() && self.session.keeps()
    }

    // Whether it may take long until that one is delivered.
    pub(super) fn is_stuck(&self) -> bool {
        !self.session.is_linked() && self.dialer.as_ref().is_none_or(Dialer::is_in_vain)
    }

    pub(super) fn decide_deferred(&mut self) {
        // Quiet: nobody is left to be accepted, and no operation waits that may run.
        let crowded = std::mem::take(&mut self.crowded);
        self.deferred.batch(!crowded && (self.is_holding_back() || !self.fence.is_waiting()));
        while let Some(event) = self.deferred.due() {
            let decision = self.decide_now(event);
            self.decide(decision);
            self.turn_away();
        }
    }

    // Whether a session whose link is lost goes on over the next: the cache was told that it might.
    fn may_come_back(&self) -> bool {
        let session = &self.session;
        let sends = session.is_running() || session.is_held() || session.is_asking() || session.is_complete();
        self.policy.reconnect.is_some() && self.run.is_some() && (sends || session.is_preparing())
    }

    fn decide_now(&mut self, event: Event) -> Decision {
        let only_copy = self.may_be_only_copy();
        match event {
            Event::LinkLost { used: false, .. } => self.session.unused_link_lost(),
            // Nothing is lost with it: it may come back.
            Event::LinkLost { why, refused: false, .. } if self.may_come_back() => {
                if let Some(time) = self.policy.reconnect.filter(|_| !only_copy && !self.session.is_bound()) {
                    log::warn!("the dump goes on if the link comes back within {} s", time.as_secs());
                }
                self.sender.link_lost();
                self.session.reconnects(true);
                self.session.link_lost(&why, only_copy)
            }
            Event::LinkLost { why, .. } => {
                self.session.reconnects(false);
                // Unless it may have everything: it will be asked.
                let ended = self.session.is_complete() || only_copy;
                if ended && self.has_passed() && self.finished.is_none() {
                    return self.session.lost(&format!("the link was lost: {why}"));
                }
                self.sender.clear(&mut self.bodies);
                self.session.link_lost(&why, only_copy)
            }
            // Meanwhile there is one. Should it be lost at once, the time is still up.
            Event::NoLink(_) if self.session.is_linked() => {
                if let Some(dialer) = &mut self.dialer {
                    dialer.is_late(Instant::now());
                }
                Decision::Nothing
            }
            Event::NoLink(why) => match self.session.no_link(why, only_copy) {
                // The search that is under way has no end any more.
                Decision::Connect => Decision::Nothing,
                other => other,
            },
            Event::Asked(signal) => {
                let decision = self.session.terminate(signal, only_copy);
                if let Decision::Over(outcome) = &decision {
                    self.exit = Some(if outcome.is_ok() { Exit::Done } else { Exit::Failed });
                }
                decision
            }
        }
    }
}
