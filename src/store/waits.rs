//! Wait-lists: who waits for what happens next under a name, in the order in which they came.

use std::collections::{HashMap, VecDeque};

use crate::table::Id;
use crate::wire::Key;

/// The wait-lists of all names.
#[derive(Debug, Default)]
pub struct Waits {
    lists: HashMap<Key, VecDeque<Id>>,
}

impl Waits {
    /// Puts `id` at the end of the list.
    pub fn push(&mut self, key: &Key, id: Id) {
        match self.lists.get_mut(key) {
            Some(list) => list.push_back(id),
            None => {
                self.lists.insert(key.clone(), VecDeque::from([id]));
            }
        }
    }

    /// Takes the first off the list.
    pub fn pop(&mut self, key: &Key) -> Option<Id> {
        let list = self.lists.get_mut(key)?;
        let id = list.pop_front();
        if list.is_empty() {
            self.lists.remove(key);
        }
        id
    }

    /// Takes `id` off the list: it has gone away.
    pub fn remove(&mut self, key: &Key, id: Id) {
        if let Some(list) = self.lists.get_mut(key) {
            list.retain(|waiting| *waiting != id);
            if list.is_empty() {
                self.lists.remove(key);
            }
        }
    }

    /// Takes everybody off the list.
    pub fn take(&mut self, key: &Key) -> VecDeque<Id> {
        self.lists.remove(key).unwrap_or_default()
    }

    /// Takes everybody off every list.
    pub fn take_all(&mut self) -> Vec<Id> {
        std::mem::take(&mut self.lists).into_values().flatten().collect()
    }

    /// Whether anybody waits under this name.
    pub fn is_waiting(&self, key: &Key) -> bool {
        self.lists.contains_key(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    #[test]
    fn in_order_and_all_of_them() {
        let mut table = Table::default();
        let ids: Vec<_> = (0..4).map(|i| table.insert(i)).collect();
        let (a, b) = (Key::stream(*b"a"), Key::stream(*b"b"));
        let mut waits = Waits::default();
        for id in &ids {
            waits.push(&a, *id);
        }
        waits.push(&b, ids[0]);
        waits.remove(&a, ids[1]);
        assert_eq!(waits.pop(&a), Some(ids[0]));
        assert_eq!(waits.take(&a), [ids[2], ids[3]]);
        assert!(!waits.is_waiting(&a) && waits.is_waiting(&b));
        assert_eq!(waits.take_all(), [ids[0]]);
        assert_eq!(waits.pop(&b), None);
    }
}
