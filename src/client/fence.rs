//! The order of operations: that in which their connections were accepted.
//!
//! CRIU appends to an image, closes, and reads it back on a new connection at once. Both connections may be
//! told of in one batch of events, in any order, or the second may have been accepted while the first's
//! header was still on its way to us. But whatever a client did before another connected is known to the
//! kernel by then. So an operation waits for one more batch after the one in which its header was read: in
//! that batch every header is read that was sent before it. Then operations run in order.

use std::collections::BTreeMap;

use crate::table::Id;

/// Operations whose header has been read and which may not run yet.
#[derive(Debug, Default)]
pub struct Fence {
    // By the order of acceptance: who, and the batch in which the header was read.
    pending: BTreeMap<u64, (Id, u64)>,
    batch: u64,
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

    /// A batch is over: the operations that may run now, in order.
    pub fn pass(&mut self) -> Vec<Id> {
        let batch = self.batch;
        self.batch += 1;
        // Whoever comes before one that may run has no reason left to wait either.
        let Some(last) = self.pending.iter().rev().find(|(_, (_, read))| *read < batch) else {
            return Vec::new();
        };
        let rest = self.pending.split_off(&(last.0 + 1));
        std::mem::replace(&mut self.pending, rest).into_values().map(|(id, _)| id).collect()
    }

    /// Whether an operation waits for the next batch.
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
        // The second connection's header is seen first.
        fence.push(2, ids[2]);
        assert_eq!(fence.pass(), []);
        fence.push(1, ids[1]);
        fence.push(3, ids[3]);
        assert_eq!(fence.pass(), [ids[1], ids[2]]);
        assert!(fence.is_waiting());
        assert_eq!(fence.pass(), [ids[3]]);
        fence.push(4, ids[0]);
        fence.remove(4);
        assert!(!fence.is_waiting());
        assert_eq!(fence.pass(), []);
    }
}
