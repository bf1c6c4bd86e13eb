//! The account of the memory that bodies take: whoever wants some asks first. No body, no descriptor.

use std::error::Error;
use std::fmt;
use std::io;

use crate::pump::human;

/// How much may be taken, and how much is.
#[derive(Debug, Default)]
pub struct Account {
    limit: Option<u64>,
    // So much of it is kept back for what can be nowhere else.
    kept_back: u64,
    used: u64,
    // What comes now may be the only copy of a process: it is taken, whatever the limit says.
    yields: bool,
}

/// There is no room within the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// The limit, in bytes.
    pub limit: u64,
    /// What is taken of it.
    pub used: u64,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the memory limit of {} (--memory-limit) is reached, {} are in use: a larger one is needed, or \
             --spill-dir",
            human(self.limit),
            human(self.used)
        )
    }
}

impl Error for Full {}

impl From<Full> for io::Error {
    fn from(full: Full) -> Self {
        Self::new(io::ErrorKind::StorageFull, full)
    }
}

/// Whether it is the limit that this error is about.
pub fn is_full(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Full>())
}

impl Account {
    /// Nothing is taken yet. None: there is no limit.
    pub fn new(limit: Option<u64>) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Keeps a part of the limit back, for [`Account::take_at_any_rate`].
    pub fn keep_back(&mut self, bytes: u64) {
        self.kept_back = bytes;
    }

    /// Takes so many bytes, all or none.
    pub fn take(&mut self, bytes: u64) -> Result<(), Full> {
        match self.left() {
            left if bytes > left => Err(self.full()),
            _ => self.take_at_any_rate(bytes),
        }
    }

    /// The same, also of what is kept back.
    pub fn take_at_any_rate(&mut self, bytes: u64) -> Result<(), Full> {
        if bytes > self.left_of(self.limit) {
            return Err(self.full());
        }
        self.used = self.used.saturating_add(bytes);
        Ok(())
    }

    /// Gives so many bytes back.
    pub fn give(&mut self, bytes: u64) {
        self.used = self.used.saturating_sub(bytes);
    }

    /// Something takes `after` bytes, where it took `before`: what has been done already is counted, also
    /// beyond the limit.
    pub fn correct(&mut self, before: u64, after: u64) {
        self.used = self.used.saturating_sub(before).saturating_add(after);
    }

    /// How many bytes may be taken.
    pub fn left(&self) -> u64 {
        self.left_of(self.limit.map(|limit| limit.saturating_sub(self.kept_back)))
    }

    fn left_of(&self, limit: Option<u64>) -> u64 {
        match limit {
            Some(limit) if !self.yields => limit.saturating_sub(self.used),
            _ => u64::MAX,
        }
    }

    /// How many bytes are taken.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// The limit; None: there is none.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// The refusal, as it stands now.
    pub fn full(&self) -> Full {
        Full { limit: self.limit.unwrap_or(u64::MAX), used: self.used }
    }

    /// Whether more than the limit is taken from now on. Returns whether that has changed.
    pub fn set_yields(&mut self, yields: bool) -> bool {
        std::mem::replace(&mut self.yields, yields) != yields
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_or_nothing_is_taken() {
        let mut account = Account::new(Some(100));
        account.take(60).unwrap();
        assert_eq!(account.take(41), Err(Full { limit: 100, used: 60 }));
        account.take(40).unwrap();
        assert_eq!((account.left(), account.used()), (0, 100));
        account.take(0).unwrap();
        account.give(30);
        assert_eq!(account.left(), 30);
        account.correct(10, 70);
        assert_eq!((account.left(), account.used()), (0, 130));
        assert!(account.take(1).is_err());
    }

    #[test]
    fn a_part_is_kept_back() {
        let mut account = Account::new(Some(100));
        account.keep_back(20);
        assert!(account.left() == 80 && account.take(81).is_err());
        account.take(80).unwrap();
        assert!(account.take(1).is_err() && account.take_at_any_rate(21).is_err());
        account.take_at_any_rate(20).unwrap();
        assert_eq!((account.left(), account.used(), account.full().limit), (0, 100, 100));
    }

    #[test]
    fn it_yields_when_it_has_to() {
        let mut account = Account::new(Some(10));
        assert!(account.set_yields(true) && !account.set_yields(true));
        account.take(1000).unwrap();
        account.set_yields(false);
        assert!(account.take(1).is_err());
        let mut free = Account::new(None);
        free.take(1 << 60).unwrap();
        free.take(1 << 60).unwrap();
        assert_eq!((free.left(), free.limit()), (u64::MAX, None));
    }

    #[test]
    fn the_refusal_says_limit_and_use() {
        let error = io::Error::from(Full { limit: 64 << 20, used: (64 << 20) - 4096 });
        assert!(is_full(&error) && !is_full(&io::Error::from(io::ErrorKind::StorageFull)));
        let text = error.to_string();
        assert!(text.contains("64.0 MiB (--memory-limit)") && text.contains("in use"), "{text}");
    }
}
