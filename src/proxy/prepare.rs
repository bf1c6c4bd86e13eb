//! The proxy and the memory that its cache writes before a dump. It is asked for at `pre-dump`, when nothing is
//! frozen, and the script waits for it. Nothing but time depends on what comes of it, unless so much was demanded.

use std::time::{Duration, Instant};

use super::scripted::Waiting;
use super::{Conn, Proxy};
use crate::peer::{Prepare, Protocol};
use crate::pump::human;
use crate::table::Id;
use crate::wire::relay::{self, Kind};

/// What a script waits for.
#[derive(Debug)]
pub struct Wanted {
    bytes: u64,
    sizes: Vec<u64>,
    /// When it was asked for first.
    since: Option<Instant>,
    /// Whether that was on the link that there is.
    asked: bool,
    answer: Option<u64>,
}

impl Wanted {
    /// When it is too late, once it has been asked for.
    pub fn until(&self, patience: Duration) -> Option<Instant> {
        Some(self.since? + patience)
    }
}

impl Proxy {
    /// What is to be asked for a tree with so much memory.
    pub(super) fn wanted(&self, memory: u64, sizes: Vec<u64>) -> Option<Wanted> {
        let (bytes, sizes) = match self.policy.prepare {
            Prepare::Auto => (memory, sizes),
            Prepare::Off => return None,
            Prepare::Size(bytes) => (bytes, Vec::new()),
        };
        (bytes > 0).then_some(Wanted { bytes, sizes, since: None, asked: false, answer: None })
    }

    /// Whether this script may go on, whose dump could begin now. None: it has to wait.
    pub(super) fn is_prepared(&mut self, waiting: &mut Waiting, now: Instant) -> Option<Result<(), String>> {
        let client = waiting.client();
        let Some(wanted) = waiting.wanted_mut() else { return Some(Ok(())) };
        let confirms =
            |conn: &Conn| matches!(conn, Conn::Link(link) if link.protocol() == Some(Protocol::Relay));
        if !self.link.and_then(|id| self.conns.get(id)).is_some_and(confirms) {
            return Some(match self.policy.prepare {
                Prepare::Size(_) => {
                    Err("the cache is an old one, which prepares no memory (--prepare)".into())
                }
                Prepare::Auto | Prepare::Off => Ok(()),
            });
        }
        let since = *wanted.since.get_or_insert(now);
        if !wanted.asked {
            wanted.asked = true;
            let prepare = relay::Prepare::new(wanted.bytes, &wanted.sizes);
            self.say_prepare(client, prepare);
            return None;
        }
        let late = since + self.policy.prepare_timeout <= now;
        let missed = match wanted.answer {
            Some(bytes) if bytes >= wanted.bytes => {
                self.times.prepared(bytes, now - since);
                log::info!(
                    "the cache has prepared {} of memory in {} ms",
                    human(bytes),
                    (now - since).as_millis()
                );
                return Some(Ok(()));
            }
            Some(bytes) => {
                self.times.prepared(bytes, now - since);
                format!("the cache has prepared {} of the {} of memory", human(bytes), human(wanted.bytes))
            }
            None if late => format!(
                "the cache has not prepared the {} of memory in {} s (--prepare-timeout)",
                human(wanted.bytes),
                self.policy.prepare_timeout.as_secs()
            ),
            None => return None,
        };
        if let Prepare::Size(_) = self.policy.prepare {
            return Some(Err(format!("{missed} that --prepare demands")));
        }
        log::info!("{missed} that the dump will need: it goes on without the rest");
        Some(Ok(()))
    }

    fn say_prepare(&mut self, client: Id, prepare: relay::Prepare) {
        self.asked_to_prepare.push_back(client);
        self.sender.say(Kind::Prepare(prepare));
        self.wake_link();
    }

    /// The script is gone, or was told to fail: what it has asked for is not needed.
    pub(super) fn unprepare(&mut self, waiting: &Waiting) {
        if waiting.wanted().is_some_and(|wanted| wanted.asked) && self.session.is_linked() {
            self.say_prepare(waiting.client(), relay::Prepare::default());
        }
    }

    /// The cache answers each request, in their order.
    pub(super) fn prepared(&mut self, bytes: u64) {
        let Some(client) = self.asked_to_prepare.pop_front() else { return };
        let waiting = self.waiting.iter_mut().find(|waiting| waiting.client() == client);
        if let Some(wanted) = waiting.and_then(Waiting::wanted_mut) {
            wanted.answer = Some(bytes);
        }
    }

    /// The link is lost: on the next, everything is asked for once more.
    pub(super) fn forget_prepared(&mut self) {
        self.asked_to_prepare.clear();
        for wanted in self.waiting.iter_mut().filter_map(Waiting::wanted_mut) {
            (wanted.asked, wanted.answer) = (false, None);
        }
    }
}
