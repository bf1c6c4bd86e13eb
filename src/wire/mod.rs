//! Sans-I/O codecs: bytes in, messages out. Nothing here knows a descriptor; where a message travels
//! with one, the codec is generic over what stands for it, so that tests and fuzzers need no socket.

pub mod control;
pub mod criu;
pub mod frame;
pub mod relay;
pub mod remote;
pub mod seed;
pub mod stream;

use std::fmt;

/// The name of an image: its snapshot id and its path, as bytes, since CRIU checks neither's encoding.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The dump or pre-dump it belongs to; empty in the stream dialect.
    pub snapshot_id: Box<[u8]>,
    /// The file name.
    pub name: Box<[u8]>,
}

impl Key {
    /// Names an image; the parts are not checked here but in [`criu`].
    pub fn new(snapshot_id: impl Into<Box<[u8]>>, name: impl Into<Box<[u8]>>) -> Self {
        Self { snapshot_id: snapshot_id.into(), name: name.into() }
    }

    /// The name of an image of the stream dialect, which has no snapshot ids.
    pub fn stream(name: impl Into<Box<[u8]>>) -> Self {
        Self::new([], name)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name.escape_ascii())?;
        if !self.snapshot_id.is_empty() {
            write!(f, " of snapshot {}", self.snapshot_id.escape_ascii())?;
        }
        Ok(())
    }
}

/// The most page images whose sizes stand in a message.
pub const MAX_SIZES: usize = 1000;
/// The largest size that is named there, in bytes: eight bytes in a message, so that all of them fit.
const MAX_SIZE: u64 = (1 << 56) - 1;

/// The sizes of page images as they fit a message: those of too many are added to the last.
pub fn fold_sizes(sizes: &[u64]) -> Vec<u64> {
    let (first, rest) = sizes.split_at(sizes.len().min(MAX_SIZES));
    let mut sizes = first.to_vec();
    if let Some(last) = sizes.last_mut() {
        *last = rest.iter().fold(*last, |sum, size| sum.saturating_add(*size));
    }
    sizes.iter().map(|size| (*size).min(MAX_SIZE)).collect()
}

/// Why bytes are not what the protocol allows. Each is the second half of a sentence that begins with
/// who sent them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WireError {
    /// A length outside 1..=[`frame::MAX_BODY`].
    Length(u32),
    /// Not a protobuf message of the expected kind, or a required field is missing.
    Malformed(&'static str),
    /// open(2) flags that CRIU never sends here.
    OpenMode(u32),
    /// A name or snapshot id that is empty, too long, or holds a NUL or a slash.
    Name(&'static str, Vec<u8>),
    /// A descriptor where none belongs, or not exactly one where one does.
    Descriptor(&'static str),
    /// Bytes where the client has to wait for an answer.
    Unexpected(&'static str),
    /// An appended image that would become smaller.
    Shrinks {
        /// The image.
        key: Key,
        /// The size announced.
        size: u64,
        /// The size held already.
        held: u64,
    },
    /// The end in the middle of something.
    Truncated(&'static str),
    /// Another version of a protocol of ours.
    Version {
        /// What the other side speaks.
        theirs: u32,
        /// What we speak.
        ours: u32,
    },
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(n) => {
                write!(f, "announced a header of {n} bytes (1 to {} are allowed)", frame::MAX_BODY)
            }
            Self::Malformed(what) => write!(f, "sent a {what} that does not parse"),
            Self::OpenMode(mode) => write!(f, "asked for the unknown open mode {mode:#o}"),
            Self::Name(why, name) => {
                let shown = name.get(..64).unwrap_or(name).escape_ascii();
                write!(f, "sent a name that {why}: \"{shown}\"")
            }
            Self::Descriptor(what) => write!(f, "sent {what}"),
            Self::Unexpected(what) => write!(f, "sent data {what}"),
            Self::Shrinks { key, size, held } => write!(
                f,
                "announced {size} bytes after an append to {key}, of which {held} bytes are here already"
            ),
            Self::Truncated(what) => write!(f, "ended in the middle of {what}"),
            Self::Version { theirs, ours } => write!(
                f,
                "speaks version {theirs} of the protocol, and this program version {ours}: both have to be the \
                 same criu-relay"
            ),
        }
    }
}

impl std::error::Error for WireError {}
