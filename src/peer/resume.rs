//! What has come of a session at the cache: it belongs to the link that carries it, and outlives that link if the
//! proxy may come back (--reconnect). Pure but for the bodies.

use std::collections::HashMap;

use crate::pump::Inflow;
use crate::store::Bodies;
use crate::wire::relay::{self, Hello, Holding};

/// One image that arrives.
#[derive(Debug)]
pub struct Arriving {
    /// Where it goes.
    pub inflow: Inflow,
    /// Of this transfer: what has come.
    pub came: u64,
    /// What of it has been acknowledged.
    pub acked: u64,
}

/// What has come of a session. The bodies of the images that are arriving are held.
#[derive(Debug, Default)]
pub struct Progress {
    /// The transfers that are open, by their numbers.
    pub arriving: HashMap<u64, Arriving>,
    // Those that are complete, with their bytes: only where somebody may ask for them.
    done: Vec<(u64, u64)>,
    /// How many are complete, and how many bytes they had together.
    pub images: u64,
    /// See `images`.
    pub bytes: u64,
    /// The last number that was used.
    pub last: u64,
    /// Whether its proxy pings.
    pub pings: bool,
    /// For how many seconds it may come back.
    pub reconnect: u32,
}

impl Progress {
    /// A session begins with `hello`.
    pub fn begin(&mut self, hello: &Hello) {
        self.done.clear();
        (self.images, self.bytes) = (0, 0);
        self.pings = hello.minor >= relay::PINGS_SINCE;
        self.reconnect = hello.reconnect.min(relay::RECONNECT_MAX);
    }

    /// Whether nothing has come.
    pub fn is_empty(&self) -> bool {
        self.images == 0 && self.arriving.is_empty()
    }

    /// A transfer is complete.
    pub fn complete(&mut self, id: u64, bytes: u64) {
        self.images += 1;
        self.bytes += bytes;
        if self.reconnect > 0 {
            self.done.push((id, bytes));
        }
    }

    /// All that is held, the last marked as such. What is arriving counts as acknowledged by that.
    pub fn holdings(&mut self) -> Vec<Holding> {
        let done =
            self.done.iter().map(|(id, size)| Holding { id: *id, size: *size, complete: true, last: false });
        let mut holdings: Vec<_> = done.collect();
        for (id, arriving) in &mut self.arriving {
            arriving.acked = arriving.came;
            holdings.push(Holding { id: *id, size: arriving.came, complete: false, last: false });
        }
        match holdings.last_mut() {
            Some(last) => last.last = true,
            None => holdings.push(Holding { last: true, ..Holding::default() }),
        }
        holdings
    }

    /// Gives up what is arriving.
    pub fn drop_arriving(&mut self, bodies: &mut Bodies) {
        for (_, Arriving { inflow, .. }) in self.arriving.drain() {
            bodies.truncate(inflow.body, inflow.start);
            bodies.release(inflow.body);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Key;

    #[test]
    fn what_is_held_is_said_once_and_the_last_is_marked() {
        let mut bodies = Bodies::new(1);
        let mut progress = Progress::default();
        progress.begin(&Hello { minor: 1, reconnect: u32::MAX, ..Hello::default() });
        assert_eq!((progress.pings, progress.reconnect), (true, relay::RECONNECT_MAX));
        assert_eq!(progress.holdings(), [Holding { last: true, ..Holding::default() }]);
        assert!(progress.is_empty());
        progress.complete(1, 10);
        assert!(!progress.is_empty());
        assert_eq!(progress.holdings(), [Holding { id: 1, size: 10, complete: true, last: true }]);
        let inflow = Inflow { key: Key::stream(*b"a"), body: bodies.create(), start: 0 };
        progress.arriving.insert(3, Arriving { inflow, came: 7, acked: 2 });
        let expected = [
            Holding { id: 1, size: 10, complete: true, last: false },
            Holding { id: 3, size: 7, complete: false, last: true },
        ];
        assert_eq!(progress.holdings(), expected);
        assert_eq!(progress.arriving[&3].acked, 7);
        progress.drop_arriving(&mut bodies);
        progress.begin(&Hello::default());
        assert_eq!((progress.images, progress.bytes, bodies.count()), (0, 0, 0));
        progress.complete(4, 1);
        assert_eq!(progress.holdings(), [Holding { last: true, ..Holding::default() }], "nobody asks");
    }
}
