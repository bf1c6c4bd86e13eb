//! The order of operations: that in which their connections were accepted.
//!
//! CRIU appends to an image, closes, and reads it back on a new connection at once. Both connections may be
//! told of in one batch of events, in any order, or the second may have been accepted while the first's
//! header was still on its way to us. But whatever a client did before another connected is known to the
//! kernel by then. So an operation waits for one more batch after the one in which its header was read: in
//! that batch every header is read that was sent before it. Then operations run in order.

use std::collections::BTreeMap;

use crate::table::Id;

/// Operations whose header has been read and which have not run yet.
#[derive(Debug, Default)]
pub struct Fence {
    // By the order of acceptance: who, and the batch in which the header was read.
    pending: BTreeMap<u64, (Id, u64)>,
    batch: u64,
    // Those before this place in the order may run.
    open_to: u64,
}

impl Fence {
    /// The header of connection number `order` has been read.
    pub fn push(&mut self, order: u64, id: Id) {
        self.pending.insert(order, (id, self.batch));
    }

    /// The connection is gone.
    pub fn remove(&mut self, order: u64) {
        self.pending.remove(&order);
    }

    /// Whether this connection's operation waits here.
    pub fn holds(&self, order: u64) -> bool {
        self.pending.contains_key(&order)
    }

    /// A batch is over: what had been read before it may run, and so may all that comes before that.
    pub fn pass(&mut self) {
        let batch = self.batch;
        self.batch += 1;
        if let Some((last, _)) = self.pending.iter().rev().find(|(_, (_, read))| *read < batch) {
            self.open_to = last + 1;
        }
    }

    /// Takes out the next operation that may run.
    pub fn take(&mut self) -> Option<Id> {
        let first = self.pending.first_entry()?;
        if *first.key() < self.open_to { Some(first.remove().0) } else { None }
    }

    /// Whether an operation waits.
    pub fn is_waiting(&self) -> bool {
        !self.pending.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    #[test]
    fn one_batch_later_and_in_order() {
        let mut table = Table::default();
        let ids: Vec<_> = (0..4).map(|i| table.insert(i)).collect();
        let mut fence = Fence::default();
        let pass = |fence: &mut Fence| {
            fence.pass();
            std::iter::from_fn(|| fence.take()).collect::<Vec<_>>()
        };
        // The second connection's header is seen first.
        fence.push(2, ids[2]);
        assert_eq!(pass(&mut fence), []);
        fence.push(1, ids[1]);
        fence.push(3, ids[3]);
        assert_eq!(pass(&mut fence), [ids[1], ids[2]]);
        assert!(fence.is_waiting() && fence.holds(3) && !fence.holds(2));
        // One that is not taken out stays, and may run later.
        fence.pass();
        assert!(fence.holds(3));
        assert_eq!(fence.take(), Some(ids[3]));
        fence.push(4, ids[0]);
        fence.remove(4);
        assert!(!fence.is_waiting());
        assert_eq!(pass(&mut fence), []);
    }
}
