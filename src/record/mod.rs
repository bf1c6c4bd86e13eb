//! What a daemon keeps of a session that is not decided, in a small file in its work directory: enough for a
//! daemon started again there, or `criu-relay resolve`, to finish it.
//!
//! It is text, for people to read: a first line that names the format, then a key and its value in each line. A
//! key that is not known is skipped, so that an older program can read what a newer one has written.

mod book;
mod file;
mod who;

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

pub use book::{Book, find};
pub use file::MAX_SIZE;
pub use who::{Distance, Found, Identity, Place};

use crate::cli::Verb;
use crate::session::Commit;
use crate::wire::control::MAX_TASKS;
use crate::wire::relay::SessionId;

/// The first line.
pub const FIRST: &str = "criu-relay record 1";

/// How far a session has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Of a proxy: CRIU is held, and the cache was told that this is all. The source lives, unless something else
    /// has killed it.
    Asking,
    /// Of a proxy: the cache has confirmed. CRIU was let go, or is about to be, and kills the source.
    Allowed,
    /// Of a cache: it has the images, and no copy has been made of them. They go with its daemon.
    Stored,
    /// Of a cache: a copy has been restored and did not run. The source was never told that it stands ready.
    Made,
    /// Of a cache: the copy is stopped, and the source was told that it stands ready.
    Prepared,
    /// Decided: the copy runs. That is to be done or to be told.
    Released,
    /// Decided: the source runs. That is to be done or to be told.
    RolledBack,
}

impl State {
    const ALL: [Self; 7] = [
        Self::Asking,
        Self::Allowed,
        Self::Stored,
        Self::Made,
        Self::Prepared,
        Self::Released,
        Self::RolledBack,
    ];

    /// Its name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Asking => "asking",
            Self::Allowed => "allowed",
            Self::Stored => "stored",
            Self::Made => "made",
            Self::Prepared => "prepared",
            Self::Released => "released",
            Self::RolledBack => "rolled-back",
        }
    }

    /// Whether nothing is to be decided any more.
    pub fn is_decided(self) -> bool {
        matches!(self, Self::Released | Self::RolledBack)
    }

    // Whether a daemon of this kind comes into it.
    fn is_of(self, role: Verb) -> bool {
        match self {
            Self::Asking | Self::Allowed => role == Verb::Proxy,
            Self::Stored | Self::Made | Self::Prepared => role == Verb::Cache,
            Self::Released | Self::RolledBack => true,
        }
    }
}

/// A process of the source, or of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Which one.
    pub who: Identity,
    /// It was stopped on the source, and so it is never continued.
    pub stays: bool,
}

/// A session as one of its daemons knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Whose it is.
    pub role: Verb,
    /// The session's name.
    pub session: SessionId,
    /// How far it has come.
    pub state: State,
    /// Where its process ids mean something.
    pub place: Place,
    /// Who keeps it.
    pub daemon: Identity,
    /// The directory of the daemon's control socket, absolute.
    pub images_dir: PathBuf,
    /// The CRIU that dumps or restores.
    pub criu: Option<Identity>,
    /// The processes of the source, or those of the copy.
    pub tasks: Vec<Task>,
    /// The source may run on beside its copy.
    pub leave_running: bool,
    /// Who is on the other side; for people.
    pub peer: String,
    /// Of a cache: its images, if they outlive it.
    pub kept: Option<Kept>,
}

/// Images that a cache has put where they outlive it (--persist).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// In this directory, absolute.
    pub dir: PathBuf,
    /// When their source may go.
    pub commit: Commit,
    /// How many they are.
    pub images: u64,
    /// How many bytes they have together.
    pub bytes: u64,
}

impl Record {
    /// One of this process, here and now; what else is known is to be filled in.
    pub fn new(role: Verb, session: SessionId, state: State) -> io::Result<Self> {
        Ok(Self {
            role,
            session,
            state,
            place: Place::here()?,
            daemon: Identity::of_myself()?,
            images_dir: PathBuf::new(),
            criu: None,
            tasks: Vec::new(),
            leave_running: false,
            peer: String::new(),
            kept: None,
        })
    }

    /// The session's name as it is written.
    pub fn session_hex(&self) -> String {
        hex(&self.session)
    }

    /// The file's contents.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512 + 32 * self.tasks.len());
        out.extend_from_slice(FIRST.as_bytes());
        out.push(b'\n');
        let mut line = |key: &str, value: &[u8]| {
            out.extend_from_slice(key.as_bytes());
            out.push(b' ');
            out.extend_from_slice(value);
            out.push(b'\n');
        };
        line("role", self.role.name().as_bytes());
        line("session", self.session_hex().as_bytes());
        line("state", self.state.name().as_bytes());
        line("boot", &escape(self.place.boot.as_bytes()));
        line("pid-namespace", self.place.pid_namespace.to_string().as_bytes());
        line("time-namespace", self.place.time_namespace.to_string().as_bytes());
        line("daemon", show(&self.daemon).as_bytes());
        line("images-dir", &escape(self.images_dir.as_os_str().as_bytes()));
        if let Some(criu) = &self.criu {
            line("criu", show(criu).as_bytes());
        }
        line("leave-running", if self.leave_running { b"yes" } else { b"no" });
        line("peer", &escape(self.peer.as_bytes()));
        if let Some(kept) = &self.kept {
            line("view", &escape(kept.dir.as_os_str().as_bytes()));
            line("commit", kept.commit.name().as_bytes());
            line("images", format!("{} {}", kept.images, kept.bytes).as_bytes());
        }
        for task in &self.tasks {
            let stays = if task.stays { " stays" } else { "" };
            line("task", format!("{}{stays}", show(&task.who)).as_bytes());
        }
        // A file that was cut off has none.
        out.extend_from_slice(b"end\n");
        out
    }

    /// The inverse. The error is what a sentence goes on with behind the file's name.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').enumerate();
        match lines.next() {
            Some((_, first)) if first.strip_suffix(b"\n") == Some(FIRST.as_bytes()) => {}
            _ => return Err(format!("line 1: it is not \"{FIRST}\"")),
        }
        let mut seen = Seen::default();
        let mut ended = false;
        for (at, line) in lines {
            let line = line.strip_suffix(b"\n").unwrap_or(line);
            let space = line.iter().position(|byte| *byte == b' ');
            let (key, value) = space.map_or((line, &b""[..]), |at| (&line[..at], &line[at + 1..]));
            if key == b"end" {
                ended = true;
                break;
            }
            seen.take(key, value).map_err(|why| {
                format!("line {}: \"{}\": {why}", at + 1, line.get(..80).unwrap_or(line).escape_ascii())
            })?;
        }
        if !ended {
            return Err("it is cut off: the line \"end\" is missing".into());
        }
        seen.record()
    }
}

/// What of a file has been read.
#[derive(Default)]
struct Seen {
    role: Option<Verb>,
    session: Option<SessionId>,
    state: Option<State>,
    boot: Option<String>,
    pid_namespace: Option<u64>,
    time_namespace: Option<u64>,
    daemon: Option<Identity>,
    images_dir: Option<PathBuf>,
    criu: Option<Identity>,
    leave_running: Option<bool>,
    peer: Option<String>,
    view: Option<PathBuf>,
    commit: Option<Commit>,
    images: Option<(u64, u64)>,
    tasks: Vec<Task>,
}

impl Seen {
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        match key {
            b"role" => {
                let roles = [Verb::Proxy, Verb::Cache];
                let role = roles.into_iter().find(|role| role.name().as_bytes() == value);
                once(&mut self.role, role, "proxy or cache")
            }
            b"session" => once(&mut self.session, unhex(value), "32 hexadecimal digits"),
            b"state" => {
                let state = State::ALL.into_iter().find(|state| state.name().as_bytes() == value);
                once(&mut self.state, state, "a state")
            }
            b"boot" => once(&mut self.boot, text(value), "a boot id"),
            b"pid-namespace" => once(&mut self.pid_namespace, number(value), "a number"),
            b"time-namespace" => once(&mut self.time_namespace, number(value), "a number"),
            b"daemon" => once(&mut self.daemon, identity(value), PROCESS),
            b"images-dir" => once(&mut self.images_dir, path(value), "a directory"),
            b"view" => once(&mut self.view, path(value), "a directory"),
            b"commit" => {
                let points = [Commit::Stored, Commit::Restored];
                let commit = points.into_iter().find(|commit| commit.name().as_bytes() == value);
                once(&mut self.commit, commit, "stored or restored")
            }
            b"images" => once(&mut self.images, pair(value), "two numbers"),
            b"criu" => once(&mut self.criu, identity(value), PROCESS),
            b"leave-running" => {
                let yes = [(&b"yes"[..], true), (b"no", false)].into_iter().find(|(name, _)| *name == value);
                once(&mut self.leave_running, yes.map(|(_, yes)| yes), "yes or no")
            }
            b"peer" => once(&mut self.peer, text(value), "a text"),
            b"task" => {
                let (who, stays) = match value.strip_suffix(b" stays") {
                    Some(who) => (who, true),
                    None => (value, false),
                };
                let who =
                    identity(who).ok_or_else(|| format!("it is not {PROCESS}, \"stays\" if it stays"))?;
                if self.tasks.len() >= MAX_TASKS as usize {
                    return Err(format!("it is one of more than {MAX_TASKS} processes"));
                }
                self.tasks.push(Task { who, stays });
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn record(self) -> Result<Record, String> {
        fn need<T>(value: Option<T>, key: &str) -> Result<T, String> {
            value.ok_or_else(|| format!("the line \"{key}\" is missing"))
        }
        let (role, state) = (need(self.role, "role")?, need(self.state, "state")?);
        if !state.is_of(role) {
            return Err(format!("a {} does not come into the state {}", role.name(), state.name()));
        }
        Ok(Record {
            role,
            session: need(self.session, "session")?,
            state,
            place: Place {
                boot: need(self.boot, "boot")?,
                pid_namespace: need(self.pid_namespace, "pid-namespace")?,
                time_namespace: need(self.time_namespace, "time-namespace")?,
            },
            daemon: need(self.daemon, "daemon")?,
            images_dir: need(self.images_dir, "images-dir")?,
            criu: self.criu,
            tasks: self.tasks,
            leave_running: need(self.leave_running, "leave-running")?,
            peer: need(self.peer, "peer")?,
            kept: match self.view {
                Some(dir) => {
                    let (images, bytes) = need(self.images, "images")?;
                    Some(Kept { dir, commit: need(self.commit, "commit")?, images, bytes })
                }
                None => None,
            },
        })
    }
}

const PROCESS: &str = "a process id and when it was started";

fn once<T>(slot: &mut Option<T>, value: Option<T>, what: &str) -> Result<(), String> {
    let value = value.ok_or_else(|| format!("it is not {what}"))?;
    if slot.replace(value).is_some() { Err("it is there twice".into()) } else { Ok(()) }
}

fn show(who: &Identity) -> String {
    format!("{} {}", who.pid, who.start)
}

fn pair<A: FromStr, B: FromStr>(value: &[u8]) -> Option<(A, B)> {
    let at = value.iter().position(|byte| *byte == b' ')?;
    Some((number(&value[..at])?, number(&value[at + 1..])?))
}

fn path(value: &[u8]) -> Option<PathBuf> {
    unescape(value).map(|path| PathBuf::from(OsString::from_vec(path)))
}

fn identity(value: &[u8]) -> Option<Identity> {
    let (pid, start) = pair(value)?;
    (pid > 0).then_some(Identity { pid, start })
}

// Digits and nothing else, so that there is one way to write a number.
fn number<T: FromStr>(value: &[u8]) -> Option<T> {
    let plain = value.iter().all(u8::is_ascii_digit) && (value.len() == 1 || !value.starts_with(b"0"));
    std::str::from_utf8(value).ok().filter(|_| plain)?.parse().ok()
}

/// A session's name as it is written.
pub fn hex(session: &SessionId) -> String {
    session.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The inverse.
pub fn unhex(value: &[u8]) -> Option<SessionId> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut id = SessionId::default();
    if value.len() != 2 * id.len() {
        return None;
    }
    for (byte, pair) in id.iter_mut().zip(value.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(id)
}

fn text(value: &[u8]) -> Option<String> {
    String::from_utf8(unescape(value)?).ok()
}

// A path may hold a newline, which would be the end of the line.
fn escape(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    for byte in value {
        match byte {
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\\' => out.extend_from_slice(b"\\\\"),
            byte => out.push(*byte),
        }
    }
    out
}

fn unescape(value: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'\\' => match bytes.next()? {
                b'n' => b'\n',
                b'\\' => b'\\',
                _ => return None,
            },
            byte => *byte,
        });
    }
    Some(out)
}

#[cfg(test)]
mod tests;
