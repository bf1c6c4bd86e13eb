//! The link between proxy and cache. Which protocol it speaks is decided in one place, [`Protocol`]; today
//! that is the seed protocol of 2017.

pub mod allow;
pub mod dialer;
pub mod link;
pub mod outq;
pub mod receiver;
pub mod sender;

/// What is spoken on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// remote_image_entry and payload, one way; 'done' is a guess.
    Seed,
}
