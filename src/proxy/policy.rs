//! What a proxy was told to do with the images, and with the source.

use std::time::Duration;

use crate::peer::{Choice, Prepare};
use crate::session::Commit;
use crate::store::catalog;
use crate::wire::Key;

/// Whether CRIU's own pages are given to the link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Splice {
    /// Where nothing can write to them before the cache has them: when the dump is scripted.
    #[default]
    Auto,
    /// In every dump of the stream dialect.
    Always,
    /// In none.
    Never,
}

/// What is kept of a dump that is not scripted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Retain {
    /// Everything.
    #[default]
    All,
    /// Everything but page images.
    Small,
    /// Nothing that the peer has, or is being given.
    None,
}

impl Retain {
    /// Whether an image stays here although the peer has it. Lists always do: old CRIU reads them back.
    pub fn keeps(self, key: &Key) -> bool {
        match self {
            Self::All => true,
            Self::Small => !catalog::is_pages(key),
            Self::None => catalog::is_list(key),
        }
    }
}

/// What is done with the images, and with the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What may be spoken with the cache.
    pub choice: Choice,
    /// Whether CRIU's pages go to the link.
    pub splice: Splice,
    /// What is kept.
    pub retain: Retain,
    /// The source may run on beside its copy.
    pub leave_running: bool,
    /// A script may go on although nothing can be confirmed.
    pub accept_unconfirmed: bool,
    /// When the source of a scripted dump may be killed.
    pub commit: Commit,
    /// How long a script waits while nothing moves.
    pub confirm_timeout: Duration,
    /// How long the source stays frozen while its copy is being made.
    pub restore_timeout: Duration,
    /// How much memory the cache is to write before anything is frozen.
    pub prepare: Prepare,
    /// How long a script waits for that.
    pub prepare_timeout: Duration,
    /// How long a link that was lost in the middle of a session may take to come back; None: the session fails.
    pub reconnect: Option<Duration>,
    /// How many bytes of pipes are kept for that until the cache has acknowledged them.
    pub replay_buffer: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            choice: Choice::Auto,
            splice: Splice::Auto,
            retain: Retain::All,
            leave_running: false,
            accept_unconfirmed: false,
            commit: Commit::Restored,
            confirm_timeout: Duration::from_secs(60),
            restore_timeout: Duration::from_secs(600),
            prepare: Prepare::Auto,
            prepare_timeout: Duration::from_secs(30),
            reconnect: None,
            replay_buffer: 64 << 20,
        }
    }
}
