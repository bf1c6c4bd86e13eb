//! The proxy and its link: the search for it, what is lost with it, and its end.

use std::time::Instant;

use super::{Conn, Event, Proxy};
use crate::peer::dialer::Dialer;
use crate::peer::link::{Link, LinkStep};
use crate::reactor::Exit;
use crate::table::Id;
use crate::wire::criu::WriteMode;

impl Proxy {
    pub(super) fn dial(&mut self) {
        if self.link.is_some() {
            return;
        }
        let for_ever = self.session.is_complete() || self.may_be_only_copy();
        match &mut self.dialer {
            Some(dialer) => dialer.start(Instant::now(), for_ever),
            None if self.session.is_idle() => {
                log::error!("the inherited connection is gone and can't be made anew");
                self.exit = Some(Exit::Failed);
            }
            None => log::error!(
                "the inherited connection is gone and can't be made anew: the images stay here until a signal comes"
            ),
        }
    }

    pub(super) fn step_link(&mut self, id: Id) {
        let Some(Conn::Link(link)) = self.conns.get_mut(id) else { return };
        match link.step(&mut self.sender, &mut self.bodies, &mut self.block) {
            LinkStep::Wait => {}
            LinkStep::Again => self.conns.again(id),
            LinkStep::Up => {
                log::info!("connected to {}", link.name());
                if let Some(dialer) = &mut self.dialer {
                    dialer.succeeded(Instant::now());
                }
                self.conns.again(id);
                let decision = self.session.link_up();
                self.decide(decision);
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
        if let Some(dialer) = &mut self.dialer {
            dialer.note(&why);
        }
        let used = !self.session.is_idle();
        self.deferred.push(Event::LinkLost { why, used });
    }

    pub(super) fn send_anew(&mut self) {
        log::info!("the whole session is sent anew: {} images", self.images.len());
        self.sender.clear(&mut self.bodies);
        for (key, image) in self.images.in_order() {
            self.bodies.hold(image.body);
            self.sender.push(key.clone(), image, 0, WriteMode::Append);
        }
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
            let link = Link::connect(address, now).and_then(|link| self.conns.insert(Conn::Link(link)));
            match link {
                Ok(id) => self.link = Some(id),
                Err(error) => self.unreachable(format!("{address}: {error}")),
            }
        }
        // Everything is here, and everything has been handed over: the end of the link is the end of the dump.
        if self.session.is_complete()
            && self.session.is_linked()
            && self.sender.is_idle()
            && let Some(id) = self.link
            && let Some(Conn::Link(link)) = self.conns.get_mut(id)
            && !link.is_closing()
        {
            link.finish();
            self.conns.again(id);
            self.settle(id);
        }
    }
}
