//! CRIU's connections: one state machine for each kind, stepped by its role.

pub mod control;
pub mod fence;
pub mod listener;
pub mod process;
pub mod remote;
pub mod stream;

use std::time::Duration;

use crate::session::Dialect;

/// What is spoken at a listening UNIX socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// CRIU, in one of its dialects.
    Criu(Dialect),
    /// CRIU's action script.
    Control,
    /// The same, of a restore from the view.
    View,
}

/// What is said of [`Received::TooManyDescriptors`](crate::net::Received).
const TOO_MANY: &str = "sent more than one descriptor (or there was no place for the one)";

/// How long a client may take for its header, from its first moment in the remote dialect and from the
/// header's first byte in the stream dialect. CRIU sends it in one go.
pub const HEADER_LIMIT: Duration = Duration::from_secs(10);

/// How long a connection of the stream dialect may stay silent before its first request: CRIU connects
/// early and freezes, and runs its operator's scripts, before it asks for anything.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(600);
