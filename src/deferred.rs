//! Decisions that wait for what has happened already. A signal, or the loss of a link, may be told before
//! bytes that were there before it; what it means is decided a few quiet batches of the poll loop later, when
//! those have been read. Pure: its role says which batch was quiet.

use std::collections::VecDeque;

/// Quiet batches until an event is decided: in the next, the kernel tells of everything that had happened; an
/// operation of the remote dialect runs one later.
const QUIET: u8 = 3;

/// Events that wait to be decided, in the order in which they came.
#[derive(Debug)]
pub struct Deferred<T> {
    // With the quiet batches still to come, and the batches after which it is decided in any case.
    queue: VecDeque<(T, u8, u16)>,
    at_most: u16,
}

impl<T> Deferred<T> {
    /// No event yet. Each is decided after `at_most` batches, quiet or not: nobody may put it off for ever.
    pub fn new(at_most: u16) -> Self {
        Self { queue: VecDeque::new(), at_most }
    }

    /// Something has happened.
    pub fn push(&mut self, event: T) {
        self.queue.push_back((event, QUIET, self.at_most));
    }

    /// A batch is over. It was quiet when nothing was left to be read that might change a decision.
    pub fn batch(&mut self, quiet: bool) {
        for (_, left, at_most) in &mut self.queue {
            *left = left.saturating_sub(quiet.into());
            *at_most = at_most.saturating_sub(1);
        }
    }

    /// Takes out the next event that is to be decided now.
    pub fn due(&mut self) -> Option<T> {
        let (_, left, at_most) = self.queue.front()?;
        if *left > 0 && *at_most > 0 {
            return None;
        }
        self.queue.pop_front().map(|(event, ..)| event)
    }

    /// Forgets the events that no longer matter.
    pub fn retain(&mut self, matters: impl Fn(&T) -> bool) {
        self.queue.retain(|(event, ..)| matters(event));
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_batches_count_and_the_others_not_for_ever() {
        let mut deferred = Deferred::new(10);
        deferred.push("signal");
        for quiet in [true, false, true, false] {
            deferred.batch(quiet);
            assert_eq!(deferred.due(), None);
        }
        deferred.push("loss");
        deferred.batch(true);
        assert_eq!(deferred.due(), Some("signal"));
        assert_eq!(deferred.due(), None, "each has its own time");
        for _ in 0..9 {
            assert_eq!(deferred.due(), None);
            deferred.batch(false);
        }
        assert_eq!(deferred.due(), Some("loss"));
        deferred.push("stale");
        deferred.retain(|event| *event != "stale");
        assert!(deferred.is_empty());
    }
}
