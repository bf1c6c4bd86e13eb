//! The life of a session as pure state: events in, decisions out. No descriptor, no clock, no image.
//!
//! A session is one dump with what becomes of it. On the source it begins with CRIU's first valid request
//! and ends when the images are delivered, or when it has failed. On the destination it begins with the
//! peer's first valid frame and ends when a restore has succeeded, or when the dump has failed.
//!
//! The rule behind every decision: fail towards the running process. While CRIU can still be made to fail, a
//! failure is passed on to it at once and the source process runs on. From the moment at which CRIU may
//! have finished, this side may hold the only copy, and nothing is given up by itself any more.

pub mod sink;
pub mod source;

use std::collections::VecDeque;

pub use sink::Sink;
pub use source::{Begun, Fate, Source};

/// How CRIU talks to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `criu --remote`.
    Remote,
    /// `criu --stream`.
    Stream,
}

/// How we are asked to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// SIGTERM or SIGINT: somebody wants it.
    End,
    /// SIGHUP: the terminal has gone, perhaps with the operator's connection.
    Hangup,
}

/// What we have been asked so far, and have not done yet.
#[derive(Debug, Default)]
struct Asked {
    end: bool,
    hangup: bool,
}

impl Asked {
    // Whether this is a second request to end.
    fn insists(&mut self, ask: Ask) -> bool {
        match ask {
            Ask::Hangup => {
                self.hangup = true;
                false
            }
            Ask::End => std::mem::replace(&mut self.end, true),
        }
    }

    // Whether no further session is to follow.
    fn leaves(&self) -> bool {
        self.end || self.hangup
    }
}

/// Sessions whose outcome is remembered: a word may be repeated when its acknowledgement was lost.
pub const REMEMBERED: usize = 16;

/// Adds to what is remembered of the last sessions; the oldest is forgotten.
pub fn remember<T>(sessions: &mut VecDeque<T>, session: T) {
    if sessions.len() == REMEMBERED {
        sessions.pop_front();
    }
    sessions.push_back(session);
}

/// When the source of a scripted session may be killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Commit {
    /// When the cache has all of its images.
    Stored,
    /// When the copy that was restored from them stands ready to run.
    #[default]
    Restored,
}

impl Commit {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Restored => "restored",
        }
    }
}

/// What decides about the images of a scripted session, once they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The source is dead: they may be restored.
    Release,
    /// The source lives: they may not.
    Rollback,
}
