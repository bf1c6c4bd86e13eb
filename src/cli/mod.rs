//! The command line: one table of flags, from which come the parser, the help and a test that the man page
//! documents exactly these. Parsing validates and opens nothing.

mod flags;
#[cfg(test)]
mod tests;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::*;

pub use flags::{BACKGROUND, FLAGS, Flag, help};
use values::{arg_error, choose, descriptor, level, persist, prepare, seconds, size};

use crate::peer::allow::Allowed;
use crate::peer::{Choice, Protocol};
use crate::proxy::{Policy, Retain, Splice};
use crate::resolve::Decision;
use crate::session::Commit;
use crate::wire::relay::RECONNECT_MAX;

/// The default TCP port; nothing but ours (the programs of 2017 had it as a constant too).
pub const PORT: u16 = 9996;

/// The smallest replay buffer, in bytes: what the cache acknowledges at a time.
const REPLAY_MIN: u64 = 1 << 20;
/// The least memory that images may be limited to, in bytes.
pub const MEMORY_MIN: u64 = 1 << 20;

/// Which daemon to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// The dump side.
    Proxy,
    /// The restore side.
    Cache,
}

impl Verb {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Cache => "cache",
        }
    }
}

/// A valid command line of a daemon.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Which daemon.
    pub verb: Verb,
    /// Where the sockets appear; at least one.
    pub images_dirs: Vec<PathBuf>,
    /// Log, pid file, remote sockets.
    pub work_dir: PathBuf,
    /// A name or an address.
    pub address: String,
    /// The TCP port.
    pub port: u16,
    /// Who may be the peer; empty: not said.
    pub allow_peer: Vec<Allowed>,
    /// An inherited connection.
    pub ps_socket: Option<i32>,
    /// How long the proxy looks for its cache.
    pub connect_timeout: Duration,
    /// Stay for the next session.
    pub keep: bool,
    /// What is done with the images, and with the source; `choice` is the cache's too.
    pub policy: Policy,
    /// Free what has been read.
    pub consume: bool,
    /// How many bytes of memory images may take; None: not said.
    pub memory_limit: Option<u64>,
    /// Where they go beyond that.
    pub spill_dir: Option<PathBuf>,
    /// Where the images of a complete dump appear.
    pub view: Option<View>,
    /// Go into the background.
    pub daemon: bool,
    /// This is the process in the background.
    pub background: bool,
    /// Where the process id goes.
    pub pidfile: Option<PathBuf>,
    /// Where readiness is told.
    pub status_fd: Option<i32>,
    /// Where the log goes.
    pub log_file: Option<PathBuf>,
    /// How much is logged.
    pub verbosity: u8,
}

/// Images as a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The directory.
    pub dir: PathBuf,
    /// Whether they outlive the daemon; None: they are links to its memory.
    pub persist: Option<Persist>,
}

/// Where images that outlive the daemon may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persist {
    /// In memory only.
    Tmpfs,
    /// On a disk too.
    Disk,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// A daemon.
    Run(Box<Options>),
    /// What is to be done with a session that its daemons can't decide.
    Resolve(Resolve),
    /// To return when something has come.
    Wait(Wait),
    /// Text for stdout.
    Print(String),
}

/// A valid command line of `criu-relay resolve`.
#[derive(Debug, PartialEq, Eq)]
pub struct Resolve {
    /// None: only say what is known.
    pub decision: Option<Decision>,
    /// Which session, by the beginning of its name.
    pub session: Option<String>,
    /// Where its record is.
    pub work_dir: PathBuf,
    /// How much is said.
    pub verbosity: u8,
}

/// A valid command line of `criu-relay wait`.
#[derive(Debug, PartialEq, Eq)]
pub struct Wait {
    /// Where the socket of the daemon is.
    pub images_dir: PathBuf,
    /// For how long; None: without end.
    pub timeout: Option<Duration>,
    /// For a daemon, not for a dump.
    pub ready: bool,
    /// How much is said.
    pub verbosity: u8,
}

/// Parses the arguments after the program's name. The error is a sentence for stderr.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    parse_args(args).map_err(|error| format!("{error}. Try criu-relay --help."))
}

fn parse_args(args: impl IntoIterator<Item = OsString>) -> Result<Command, lexopt::Error> {
    let mut parser = lexopt::Parser::from_args(args);
    let mut verb = None;
    let mut images_dirs = Vec::new();
    let mut work_dir = None;
    let mut address: Option<String> = None;
    let mut port = PORT;
    let mut allow_peer = Vec::new();
    let mut ps_socket = None;
    let mut connect_timeout = Duration::from_secs(30);
    let (mut keep, mut daemon, mut background) = (false, false, false);
    let mut policy = Policy::default();
    let mut consume = false;
    let (mut for_proxy, mut for_daemon) = (None, None);
    let (mut resolve, mut decision, mut session) = (false, None, None);
    let (mut memory_limit, mut spill_dir) = (None, None);
    let (mut view, mut persisted) = (None, None);
    let (mut wait, mut timeout, mut ready) = (false, None, false);
    let (mut for_wait, mut not_for_wait) = (None, None);
    let mut pidfile = None;
    let mut status_fd = None;
    let mut log_file = None;
    let mut verbosity: u8 = 1;

    while let Some(arg) = parser.next()? {
        let long = match &arg {
            Value(value) if verb.is_none() && !resolve && !wait => {
                verb = match value.to_str() {
                    Some("proxy" | "image-proxy") => Some(Verb::Proxy),
                    Some("cache" | "image-cache") => Some(Verb::Cache),
                    Some("resolve" | "wait") => None,
                    _ => {
                        let value = value.display();
                        return Err(format!("'{value}' is not proxy, cache, resolve or wait").into());
                    }
                };
                wait = value == "wait";
                resolve = verb.is_none() && !wait;
                continue;
            }
            Value(value) if resolve && decision.is_none() => {
                decision = Some(match value.to_str() {
                    Some("commit") => Decision::Commit,
                    Some("rollback") => Decision::Rollback,
                    _ => return Err(format!("'{}' is neither commit nor rollback", value.display()).into()),
                });
                continue;
            }
            Value(value) if resolve && session.is_none() && !value.is_empty() => {
                session = Some(value.clone().string()?);
                continue;
            }
            Value(_) => return Err(arg.unexpected()),
            Long(BACKGROUND) => BACKGROUND,
            Long(name) => match FLAGS.iter().find(|flag| flag.long == *name) {
                Some(flag) => flag.long,
                None => return Err(arg.unexpected()),
            },
            Short(letter) => match FLAGS.iter().find(|flag| flag.short == Some(*letter)) {
                Some(flag) => flag.long,
                None => return Err(arg.unexpected()),
            },
        };
        if matches!(
            long,
            "commit"
                | "confirm-timeout"
                | "restore-timeout"
                | "prepare-timeout"
                | "reconnect"
                | "replay-buffer"
                | "leave-running"
                | "accept-unconfirmed"
                | "splice"
                | "retain"
                | "connect-timeout"
        ) {
            for_proxy = Some(long);
        }
        if !matches!(long, "work-dir" | "verbosity") {
            for_daemon = Some(long);
        }
        match long {
            "timeout" | "ready" => for_wait = Some(long),
            "images-dir" | "verbosity" => {}
            _ => not_for_wait = Some(long),
        }
        match long {
            "images-dir" => images_dirs.push(PathBuf::from(parser.value()?)),
            "work-dir" => work_dir = Some(PathBuf::from(parser.value()?)),
            "address" => address = Some(parser.value()?.string()?),
            "port" => port = parser.value()?.parse()?,
            "allow-peer" => allow_peer.push(parser.value()?.parse()?),
            "ps-socket" => ps_socket = Some(descriptor(&parser.value()?)?),
            "connect-timeout" => connect_timeout = seconds(long, &parser.value()?)?,
            "keep" => keep = true,
            "peer-protocol" => {
                let choices = [
                    ("auto", Choice::Auto),
                    ("relay", Choice::Only(Protocol::Relay)),
                    ("seed", Choice::Only(Protocol::Seed)),
                ];
                policy.choice = choose(long, &parser.value()?, &choices)?;
            }
            "commit" => {
                let choices = [("restored", Commit::Restored), ("stored", Commit::Stored)];
                policy.commit = choose(long, &parser.value()?, &choices)?;
            }
            "confirm-timeout" => policy.confirm_timeout = seconds(long, &parser.value()?)?,
            "restore-timeout" => policy.restore_timeout = seconds(long, &parser.value()?)?,
            "prepare" => policy.prepare = prepare(long, &parser.value()?)?,
            "prepare-timeout" => policy.prepare_timeout = seconds(long, &parser.value()?)?,
            "reconnect" => match parser.value()?.parse::<u32>()? {
                0 => policy.reconnect = None,
                seconds if seconds > RECONNECT_MAX => {
                    return Err(format!("--reconnect is {RECONNECT_MAX} seconds at most").into());
                }
                seconds => policy.reconnect = Some(Duration::from_secs(seconds.into())),
            },
            "replay-buffer" => match size(long, &parser.value()?)? {
                bytes if bytes < REPLAY_MIN => return Err("--replay-buffer is 1M at least".into()),
                bytes => policy.replay_buffer = bytes,
            },
            "leave-running" => policy.leave_running = true,
            "accept-unconfirmed" => policy.accept_unconfirmed = true,
            "splice" => {
                let choices = [("auto", Splice::Auto), ("always", Splice::Always), ("never", Splice::Never)];
                policy.splice = choose(long, &parser.value()?, &choices)?;
            }
            "retain" => {
                let choices = [("all", Retain::All), ("small", Retain::Small), ("none", Retain::None)];
                policy.retain = choose(long, &parser.value()?, &choices)?;
            }
            "consume" => consume = true,
            "memory-limit" => match size(long, &parser.value()?)? {
                bytes if bytes < MEMORY_MIN => return Err("--memory-limit is 1M at least".into()),
                bytes => memory_limit = Some(bytes),
            },
            "spill-dir" => spill_dir = Some(PathBuf::from(parser.value()?)),
            "view" => view = Some(PathBuf::from(parser.value()?)),
            "persist" => persisted = Some(persist(parser.optional_value())?),
            "timeout" => timeout = Some(seconds(long, &parser.value()?)?),
            "ready" => ready = true,
            "daemon" => daemon = true,
            "pidfile" => pidfile = Some(PathBuf::from(parser.value()?)),
            "status-fd" => status_fd = Some(descriptor(&parser.value()?)?),
            "log-file" => log_file = Some(PathBuf::from(parser.value()?)),
            "verbosity" => verbosity = level(verbosity, parser.optional_value())?,
            "version" => return Ok(Command::Print(format!("criu-relay {}\n", env!("CARGO_PKG_VERSION")))),
            "help" => return Ok(Command::Print(help())),
            BACKGROUND => background = true,
            _ => return Err(arg_error(long)),
        }
    }

    if resolve {
        if let Some(long) = for_daemon {
            return Err(format!("--{long} is not for resolve").into());
        }
        let work_dir = work_dir.unwrap_or_else(|| PathBuf::from("."));
        return Ok(Command::Resolve(Resolve { decision, session, work_dir, verbosity }));
    }
    if wait {
        if let Some(long) = not_for_wait {
            return Err(format!("--{long} is not for wait").into());
        }
        if images_dirs.len() > 1 {
            return Err("wait takes one --images-dir".into());
        }
        let images_dir = images_dirs.pop().unwrap_or_else(|| PathBuf::from("."));
        return Ok(Command::Wait(Wait { images_dir, timeout, ready, verbosity }));
    }
    let Some(verb) = verb else { return Err("proxy, cache, resolve or wait has to be named".into()) };
    if let Some(long) = for_wait {
        return Err(format!("--{long} is for wait").into());
    }
    if verb == Verb::Proxy && !allow_peer.is_empty() {
        return Err("--allow-peer is for the cache: the proxy connects itself".into());
    }
    if let (Verb::Cache, Some(long)) = (verb, for_proxy) {
        return Err(format!("--{long} is for the proxy").into());
    }
    if view.is_some() && consume {
        return Err("--consume frees what a restore has read, which would be gone from the --view too".into());
    }
    if verb == Verb::Proxy && consume {
        return Err("--consume is for the cache".into());
    }
    if verb == Verb::Proxy && spill_dir.is_some() && memory_limit.is_none() {
        return Err("--spill-dir is for what is beyond --memory-limit, which the proxy was not given".into());
    }
    if verb == Verb::Proxy && (view.is_some() || persisted.is_some()) {
        return Err("--view and --persist are for the cache".into());
    }
    if view.is_none() && persisted.is_some() {
        return Err("--persist is for the images of a --view, which was not given".into());
    }
    if view.is_some() && spill_dir.is_some() {
        return Err(
            "an image in a view is one file, and --spill-dir would have it in two: only one of --view and \
                    --spill-dir"
                .into(),
        );
    }
    if policy.splice == Splice::Always && policy.choice == Choice::Only(Protocol::Seed) {
        return Err("--splice always needs the relay protocol, which --peer-protocol seed rules out".into());
    }
    if policy.reconnect.is_some() && policy.splice == Splice::Always {
        return Err(
            "--reconnect keeps what it sends, and --splice always keeps nothing: only one of them".into()
        );
    }
    if policy.reconnect.is_some() && policy.choice == Choice::Only(Protocol::Seed) {
        return Err("--reconnect needs the relay protocol, which --peer-protocol seed rules out".into());
    }
    if policy.reconnect.is_some() && ps_socket.is_some() {
        return Err("--ps-socket is a connection that can't be made anew, as --reconnect would".into());
    }
    if verb == Verb::Proxy && port == 0 {
        return Err("--port 0 is for the cache: the proxy has to know where to connect".into());
    }
    if ps_socket.is_some() && (address.is_some() || !allow_peer.is_empty()) {
        return Err(
            "--ps-socket is a connection already: --address and --allow-peer mean nothing with it".into()
        );
    }
    if ps_socket.is_some() && keep {
        return Err("--ps-socket carries one session, so that there is nothing to --keep".into());
    }
    if ps_socket.is_some() && ps_socket == status_fd {
        return Err("--ps-socket and --status-fd have to be different descriptors".into());
    }
    if images_dirs.is_empty() {
        images_dirs.push(PathBuf::from("."));
    }
    let work_dir = work_dir.unwrap_or_else(|| images_dirs[0].clone());
    let default_address = match verb {
        Verb::Proxy => "localhost",
        Verb::Cache => "127.0.0.1",
    };
    Ok(Command::Run(Box::new(Options {
        verb,
        images_dirs,
        work_dir,
        address: address.unwrap_or_else(|| default_address.into()),
        port,
        allow_peer,
        ps_socket,
        connect_timeout,
        keep,
        policy,
        consume,
        memory_limit,
        spill_dir,
        view: view.map(|dir| View { dir, persist: persisted }),
        daemon,
        background,
        pidfile,
        status_fd,
        log_file,
        verbosity,
    })))
}
