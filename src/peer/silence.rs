//! How long a peer of the relay protocol may be silent. The proxy asks whether the cache is there, and the cache
//! listens for that: whoever is not heard of is lost, be the kernel on its side as well as can be. Pure: the clock
//! comes in as an argument.

use std::time::{Duration, Instant};

/// After so long a silence of the cache the proxy pings it, and again after as long; and so does a cache that lets a
/// proxy wait its turn.
pub const PING: Duration = Duration::from_secs(5);

/// So many pings in a row go unanswered until the cache is lost: 15 s after it was last heard.
const PINGS: u8 = 2;

/// A cache that has said nothing for so long is lost.
pub const CACHE_LOST: Duration = PING.saturating_mul(PINGS as u32 + 1);

/// A proxy that has said nothing for so long in the middle of its session is lost: it pings in time, also when its
/// CRIU is held.
pub const PROXY_LOST: Duration = Duration::from_secs(20);

/// The proxy's watch over its cache.
#[derive(Debug)]
pub struct Silence {
    pings: u8,
    until: Instant,
}

impl Silence {
    /// Something has just been heard.
    pub fn new(now: Instant) -> Self {
        Self { pings: 0, until: now + PING }
    }

    /// When to ask again.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// That time has come. Some: to be pinged, with this token; None: the cache is lost. (We may have been stopped
    /// ourselves: nobody is lost who has not been asked.)
    pub fn expired(&mut self, now: Instant) -> Option<u64> {
        if self.pings == PINGS {
            return None;
        }
        self.pings += 1;
        self.until = now + PING;
        Some(self.pings.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_cache_is_asked_twice() {
        let start = Instant::now();
        let mut silence = Silence::new(start);
        assert_eq!(silence.until(), start + PING);
        assert_eq!(silence.expired(start + PING), Some(1));
        assert_eq!(silence.expired(start + 2 * PING), Some(2));
        assert_eq!(silence.until(), start + CACHE_LOST);
        assert_eq!(silence.expired(start + CACHE_LOST), None);
        // Stopped for an hour, it asks first.
        let late = start + Duration::from_secs(3600);
        let mut silence = Silence::new(start);
        assert_eq!((silence.expired(late), silence.until()), (Some(1), late + PING));
    }
}
