//! A slab whose keys carry a generation.
//!
//! A slab reuses its keys. An epoll event, a wait-list entry or a timer may name an entry that has
//! gone and whose place another has taken; the generation makes such a late name find nothing.

use slab::Slab;

#[cfg(not(target_pointer_width = "64"))]
compile_error!("an Id fills a 64-bit mio::Token");

/// The name of one entry of a [`Table`], never used for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(u64);

impl Id {
    fn new(generation: u32, key: usize) -> Self {
        Self(u64::from(generation) << 32 | key as u64)
    }

    fn key(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl From<Id> for mio::Token {
    fn from(id: Id) -> Self {
        Self(id.0 as usize)
    }
}

impl From<mio::Token> for Id {
    fn from(token: mio::Token) -> Self {
        Self(token.0 as u64)
    }
}

/// A slab of `T` under generational [`Id`]s.
#[derive(Debug)]
pub struct Table<T> {
    slots: Slab<(u32, T)>,
    generation: u32,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { slots: Slab::new(), generation: 0 }
    }
}

impl<T> Table<T> {
    /// Stores `value`. Generations wrap after 2^31 insertions: by then no event of the first is left.
    pub fn insert(&mut self, value: T) -> Id {
        // The top bit stays clear, so that no Id equals a token the reactor keeps for itself.
        self.generation = (self.generation + 1) & (u32::MAX >> 1);
        let key = self.slots.insert((self.generation, value));
        Id::new(self.generation, key)
    }

    /// The entry, unless it is gone.
    pub fn get(&self, id: Id) -> Option<&T> {
        match self.slots.get(id.key()) {
            Some((generation, value)) if *generation == id.generation() => Some(value),
            _ => None,
        }
    }

    /// The entry, unless it is gone.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        match self.slots.get_mut(id.key()) {
            Some((generation, value)) if *generation == id.generation() => Some(value),
            _ => None,
        }
    }

    /// Takes the entry out, unless it is gone.
    pub fn remove(&mut self, id: Id) -> Option<T> {
        self.get(id)?;
        let value = self.slots.remove(id.key()).1;
        // A burst of connections or images must not leave its memory behind. (Those that stay are the
        // oldest, at the front; only what is free at the end can be given back.)
        if self.slots.capacity() > 64 && self.slots.len() < self.slots.capacity() / 8 {
            self.slots.shrink_to_fit();
        }
        Some(value)
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        self.slots.iter().map(|(key, (generation, value))| (Id::new(*generation, key), value))
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_leaves_no_memory_behind() {
        let mut table = Table::default();
        let first = table.insert(0);
        let burst: Vec<_> = (0..10_000).map(|i| table.insert(i)).collect();
        for id in burst {
            table.remove(id);
        }
        assert!(table.slots.capacity() < 1000);
        assert_eq!(table.get(first), Some(&0));
    }

    #[test]
    fn a_late_id_finds_nothing() {
        let mut table = Table::default();
        let old = table.insert("old");
        assert_eq!(table.remove(old), Some("old"));
        let new = table.insert("new");
        assert_eq!(old.key(), new.key(), "the slab reuses its key");
        assert_eq!(table.get(old), None);
        assert_eq!(table.get_mut(old), None);
        assert_eq!(table.remove(old), None);
        assert_eq!(table.get(new), Some(&"new"));
        assert_eq!(Id::from(mio::Token::from(new)), new);
    }
}
