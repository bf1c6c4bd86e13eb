//! Whom to connect to, and when: every address that the peer's name has, in turn, again and again, for
//! as long as the session allows. Pure: the clock comes in as an argument.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long one address has for an answer before the next is tried.
pub const ATTEMPT: Duration = Duration::from_secs(5);

/// The pause after every address has failed.
pub const PAUSE: Duration = Duration::from_millis(200);

/// A link lost within this time after it was made counts as none: somebody accepts and closes.
const FLAP: Duration = Duration::from_secs(1);

/// The search for a link.
#[derive(Debug)]
pub struct Dialer {
    addresses: Vec<SocketAddr>,
    next: usize,
    window: Duration,
    // Of a search that is none for a link that was lost.
    usual: Duration,
    searching: bool,
    // When the next attempt may begin; None: one is under way.
    attempt_at: Option<Instant>,
    // When the search is given up; None: never.
    until: Option<Instant>,
    // When the last search succeeded.
    linked_at: Option<Instant>,
    last_error: String,
    // Whether an attempt of the search under way has failed.
    failed: bool,
}

impl Dialer {
    /// A search among `addresses` (at least one), each time for `window`.
    pub fn new(addresses: Vec<SocketAddr>, window: Duration) -> Self {
        Self {
            addresses,
            next: 0,
            window,
            usual: window,
            searching: false,
            attempt_at: None,
            until: None,
            linked_at: None,
            last_error: String::new(),
            failed: false,
        }
    }

    /// Begins to search, `for_ever` or for the window's time. A link that was lost as soon as it stood
    /// does not begin the window anew.
    pub fn start(&mut self, now: Instant, for_ever: bool) {
        let flaps = self.linked_at.is_some_and(|at| now < at + FLAP);
        self.searching = true;
        self.failed = false;
        self.attempt_at = Some(if flaps { now + FLAP } else { now });
        if for_ever || !flaps {
            self.limit(now, for_ever);
        }
    }

    /// From now on a search has this window, or the usual one.
    pub fn within(&mut self, window: Option<Duration>) {
        self.window = window.unwrap_or(self.usual);
    }

    /// The last link has done its work, however short it was.
    pub fn served(&mut self) {
        self.linked_at = None;
    }

    /// The window is over, although there is a link just now.
    pub fn is_late(&mut self, now: Instant) {
        self.until = Some(now);
    }

    /// What became of the last link.
    pub fn note(&mut self, why: &str) {
        why.clone_into(&mut self.last_error);
    }

    /// Whether a search is under way.
    pub fn is_searching(&self) -> bool {
        self.searching
    }

    /// Whether an attempt of the search under way has failed.
    pub fn is_in_vain(&self) -> bool {
        self.searching && self.failed
    }

    /// Whether a search is under way that nothing will end.
    pub fn is_endless(&self) -> bool {
        self.searching && self.until.is_none()
    }

    /// From now on there is no end to the search, or one when the window has passed.
    pub fn limit(&mut self, now: Instant, for_ever: bool) {
        self.until = (!for_ever).then(|| now + self.window);
    }

    /// The address to try now, if an attempt is due.
    pub fn due(&mut self, now: Instant) -> Option<SocketAddr> {
        self.attempt_at.filter(|at| self.searching && *at <= now)?;
        self.attempt_at = None;
        self.addresses.get(self.next).copied()
    }

    /// The attempt failed.
    pub fn failed(&mut self, now: Instant, error: String) {
        self.last_error = error;
        self.failed = true;
        self.next = (self.next + 1) % self.addresses.len().max(1);
        self.attempt_at = Some(if self.next == 0 { now + PAUSE } else { now });
    }

    /// The attempt was given up: should the search go on, its address is tried again.
    pub fn abandoned(&mut self, now: Instant) {
        self.attempt_at.get_or_insert(now);
    }

    /// The attempt succeeded: the search is over.
    pub fn succeeded(&mut self, now: Instant) {
        self.next = 0;
        self.last_error.clear();
        self.searching = false;
        self.linked_at = Some(now);
    }

    /// Whether the time for the search is up; told once.
    pub fn gave_up(&mut self, now: Instant) -> bool {
        let up = self.searching && self.until.is_some_and(|until| until <= now);
        if up {
            self.until = None;
        }
        up
    }

    /// When to ask again.
    pub fn wake_at(&self) -> Option<Instant> {
        self.attempt_at.into_iter().chain(self.until).min().filter(|_| self.searching)
    }

    /// The whole search as a sentence.
    pub fn why(&self) -> String {
        self.sentence(&format!(" within {} s", self.window.as_secs()))
    }

    /// The same while it goes on.
    pub fn why_not_yet(&self) -> String {
        self.sentence("")
    }

    fn sentence(&self, within: &str) -> String {
        let tried: Vec<_> = self.addresses.iter().map(SocketAddr::to_string).collect();
        let error = if self.last_error.is_empty() { "no answer" } else { &self.last_error };
        format!(
            "no link to {}{within} ({error}): is criu-relay cache running there, does it allow this peer?",
            tried.join(" or ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_in_turn_until_the_time_is_up() {
        let addresses: Vec<SocketAddr> = vec!["127.0.0.1:1".parse().unwrap(), "[::1]:1".parse().unwrap()];
        let mut dialer = Dialer::new(addresses.clone(), Duration::from_secs(3));
        let start = Instant::now();
        assert_eq!((dialer.due(start), dialer.wake_at()), (None, None));
        dialer.start(start, false);
        assert_eq!(dialer.due(start), Some(addresses[0]));
        assert_eq!(dialer.due(start), None, "one attempt at a time");
        dialer.failed(start, "refused".into());
        assert_eq!(dialer.due(start), Some(addresses[1]));
        dialer.failed(start, "refused".into());
        assert_eq!(dialer.due(start), None, "a pause after a whole round");
        assert_eq!(dialer.wake_at(), Some(start + PAUSE));
        assert_eq!(dialer.due(start + PAUSE), Some(addresses[0]));
        assert!(!dialer.gave_up(start + Duration::from_secs(2)));
        assert!(dialer.gave_up(start + Duration::from_secs(3)));
        assert!(!dialer.gave_up(start + Duration::from_secs(4)), "told once");
        assert!(dialer.why().contains("127.0.0.1:1 or [::1]:1 within 3 s (refused)"));
        dialer.start(start, true);
        assert!(!dialer.gave_up(start + Duration::from_secs(1000)));
    }

    #[test]
    fn an_attempt_that_was_given_up_is_made_again() {
        let address = "127.0.0.1:1".parse().unwrap();
        let mut dialer = Dialer::new(vec![address], Duration::from_secs(3));
        let now = Instant::now();
        dialer.start(now, false);
        assert_eq!((dialer.due(now), dialer.due(now)), (Some(address), None));
        dialer.abandoned(now);
        assert_eq!(dialer.due(now), Some(address));
        dialer.succeeded(now);
        dialer.abandoned(now);
        assert_eq!(dialer.due(now), None, "the search is over");
    }

    #[test]
    fn a_search_for_a_lost_link_has_a_window_of_its_own() {
        let second = Duration::from_secs(1);
        let mut dialer = Dialer::new(vec!["127.0.0.1:1".parse().unwrap()], 30 * second);
        let now = Instant::now();
        dialer.within(Some(2 * second));
        dialer.start(now, false);
        assert!(!dialer.gave_up(now + second) && dialer.gave_up(now + 2 * second));
        assert!(dialer.why().contains("within 2 s"), "{}", dialer.why());
        dialer.within(None);
        dialer.start(now, false);
        assert!(!dialer.gave_up(now + 29 * second) && dialer.gave_up(now + 30 * second));
    }

    #[test]
    fn a_link_that_is_closed_at_once_is_none() {
        let window = Duration::from_secs(3);
        let mut dialer = Dialer::new(vec!["127.0.0.1:1".parse().unwrap()], window);
        let mut now = Instant::now();
        let end = now + window;
        dialer.start(now, false);
        while !dialer.gave_up(now) {
            assert!(now < end + FLAP, "the window never closes");
            if dialer.due(now).is_some() {
                dialer.succeeded(now);
                dialer.start(now, false);
            }
            now = dialer.wake_at().unwrap();
        }
        // A link that stands at the very end and is lost at once changes nothing.
        dialer.start(now, false);
        dialer.succeeded(now);
        dialer.is_late(now);
        dialer.start(now, false);
        assert!(dialer.gave_up(now));
        // One that has stood for a while begins it anew.
        dialer.start(now, false);
        dialer.succeeded(now);
        now += Duration::from_secs(60);
        dialer.start(now, false);
        assert!(dialer.due(now).is_some() && !dialer.gave_up(now));
    }
}
