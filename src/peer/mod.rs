//! The link between proxy and cache. Which protocol it speaks is found out when it has been made ([`link`] on one
//! side, [`receiver`] on the other).

pub mod allow;
pub mod dialer;
pub mod link;
pub mod outq;
pub mod receiver;
pub mod relay;
pub mod resume;
pub mod sender;
pub mod silence;

/// What is spoken on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// remote_image_entry and payload, one way; 'done' is a guess.
    Seed,
    /// Framed messages both ways (proto/relay.proto); 'done' is a fact.
    Relay,
}

/// Which of them may be spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The relay protocol where the other side knows it, the seed protocol otherwise.
    #[default]
    Auto,
    /// This one only.
    Only(Protocol),
}

/// Whether memory is written before a dump begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prepare {
    /// As much as the tree has; at the cache: as much as a proxy asks for.
    #[default]
    Auto,
    /// None.
    Off,
    /// So many bytes.
    Size(u64),
}

impl Choice {
    /// Whether this protocol may be spoken.
    pub fn allows(self, protocol: Protocol) -> bool {
        self == Self::Auto || self == Self::Only(protocol)
    }
}
