//! The proxy and its memory limit: who waits for memory, and for how long.
//!
//! A writer for whose bytes there is no room waits, and with it CRIU, as long as something may leave without CRIU:
//! an image that is not kept (--retain) leaves when the cache has confirmed it, one that was overwritten when it
//! is sent. When nothing may leave, waiting would be in vain, and the dump fails at once. What may be the only copy
//! of a process is worth more than the limit, and is taken beyond it.

use super::Proxy;
use crate::pump;
use crate::store::BodyId;
use crate::table::Id;
use crate::wire::Key;

impl Proxy {
    // This writer has more than there is room for.
    pub(super) fn short_of_memory(&mut self, id: Id, key: &Key, body: BodyId) {
        if self.takes_everything() {
            if self.bodies.set_yields(true) {
                log::warn!(
                    "{key}, at byte {}: the memory limit (--memory-limit) is reached, and is exceeded: this may be \
                     the only copy of the process",
                    self.bodies.len(body)
                );
            }
            return self.conns.again(id);
        }
        if !self.can_leave() {
            return self.failed(self.bodies.full(key, body));
        }
        if self.short.iter().all(|(waiting, _)| *waiting != id) {
            let used = self.bodies.used();
            log::debug!(
                "{key} waits for memory, at byte {}: {} in use",
                self.bodies.len(body),
                pump::human(used)
            );
            self.short.push((id, used));
        }
    }

    // Those who wait try again when something has left, or when nothing will.
    pub(super) fn tick_memory(&mut self) {
        let used = self.bodies.used();
        if self.short.iter().any(|(_, before)| used < *before)
            || (!self.short.is_empty() && (self.takes_everything() || !self.can_leave()))
        {
            for (id, _) in std::mem::take(&mut self.short) {
                self.conns.again(id);
            }
        }
    }

    fn takes_everything(&self) -> bool {
        self.is_ending() || self.may_be_only_copy()
    }

    // Whether memory will be free without anything from CRIU.
    fn can_leave(&self) -> bool {
        let stays = |key: &Key, body: BodyId| {
            let kept = self.run.is_none() || self.policy.retain.keeps(key) || self.flows.contains_key(key);
            let indexed = self.images.get(key).is_some_and(|image| image.body == body);
            (indexed && kept) || self.bodies.memory(body) == 0
        };
        self.session.is_linked() && self.sender.has_leaving(|key, body| !stays(key, body))
    }
}
