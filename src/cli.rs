//! The command line: one table of flags, from which come the parser, the help and a test that the man page
//! documents exactly these. Parsing validates and opens nothing.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::*;

use crate::peer::allow::Allowed;
use crate::peer::{Choice, Protocol};
use crate::proxy::{Policy, Retain, Splice};

/// The default TCP port; nothing but ours (the programs of 2017 had it as a constant too).
pub const PORT: u16 = 9996;

/// One option.
#[derive(Debug)]
pub struct Flag {
    /// Its letter.
    pub short: Option<char>,
    /// Its name.
    pub long: &'static str,
    /// What its value is called; None: it has none.
    pub value: Option<&'static str>,
    /// What it does.
    pub help: &'static str,
}

const fn flag(
    short: Option<char>,
    long: &'static str,
    value: Option<&'static str>,
    help: &'static str,
) -> Flag {
    Flag { short, long, value, help }
}

/// All options, in the order of the help. Names and meanings are CRIU's where CRIU has them.
pub const FLAGS: &[Flag] = &[
    flag(
        Some('D'),
        "images-dir",
        Some("DIR"),
        "where the sockets for CRIU appear (default .); may be repeated",
    ),
    flag(
        Some('W'),
        "work-dir",
        Some("DIR"),
        "where log and pid file go (default: the first -D), and the sockets of criu --remote too",
    ),
    flag(
        None,
        "address",
        Some("ADDRESS"),
        "proxy: where the cache is (default localhost); cache: where to listen (default 127.0.0.1; beyond \
         loopback --allow-peer is needed)",
    ),
    flag(
        None,
        "port",
        Some("PORT"),
        "TCP port (default 9996); cache: 0 lets the kernel choose, and prints it",
    ),
    flag(None, "allow-peer", Some("ADDRESS[/PREFIX]|any"), "cache: who may connect; may be repeated"),
    flag(None, "ps-socket", Some("FD"), "use this established connection instead of making one"),
    flag(
        None,
        "connect-timeout",
        Some("SECONDS"),
        "proxy: how long to look for the cache (default 30, at least 1)",
    ),
    flag(None, "keep", None, "stay for the next session"),
    flag(
        None,
        "peer-protocol",
        Some("auto|relay|seed"),
        "what may be spoken on the link: auto (default) falls back to seed, the protocol of 2017, where the other \
         side is old",
    ),
    flag(
        None,
        "commit",
        Some("stored"),
        "proxy: when a scripted dump lets CRIU kill the source: when the cache has stored everything (the only \
         choice so far)",
    ),
    flag(
        None,
        "confirm-timeout",
        Some("SECONDS"),
        "proxy: how long CRIU is held by its action script while nothing moves (default 60, at least 1)",
    ),
    flag(
        None,
        "leave-running",
        None,
        "proxy: the source may run on beside its copy, as criu dump --leave-running has it",
    ),
    flag(
        None,
        "accept-unconfirmed",
        None,
        "proxy: let a scripted dump go to an old cache, which confirms nothing",
    ),
    flag(
        None,
        "splice",
        Some("auto|always|never"),
        "proxy: give CRIU's own pages to the link: when the dump is scripted (default), always (risky without the \
         script), never",
    ),
    flag(
        None,
        "retain",
        Some("all|small|none"),
        "proxy: what is kept of a dump that is not scripted, to be sent anew: all (default), all but page images, \
         nothing",
    ),
    flag(None, "consume", None, "cache: free the memory that a restore has read; it can't be repeated then"),
    flag(Some('d'), "daemon", None, "go into the background once the sockets accept"),
    flag(None, "pidfile", Some("FILE"), "write the process id there (relative to the work directory)"),
    flag(None, "status-fd", Some("FD"), "write a NUL byte there once the sockets accept, and close it"),
    flag(Some('o'), "log-file", Some("FILE"), "log there instead of stderr (relative to the work directory)"),
    flag(
        Some('v'),
        "verbosity",
        Some("[N]"),
        "0: warnings; 1: sessions (default); 2: every image; 3: everything; -v alone adds one",
    ),
    flag(Some('V'), "version", None, "print the version and exit"),
    flag(Some('h'), "help", None, "print this help and exit"),
];

/// Given to ourselves when started anew in the background; not for people.
pub const BACKGROUND: &str = "in-background";

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

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// A daemon.
    Run(Box<Options>),
    /// Text for stdout.
    Print(String),
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
    let mut for_proxy = None;
    let mut pidfile = None;
    let mut status_fd = None;
    let mut log_file = None;
    let mut verbosity: u8 = 1;

    while let Some(arg) = parser.next()? {
        let long = match &arg {
            Value(value) if verb.is_none() => {
                verb = Some(match value.to_str() {
                    Some("proxy" | "image-proxy") => Verb::Proxy,
                    Some("cache" | "image-cache") => Verb::Cache,
                    _ => return Err(format!("'{}' is neither proxy nor cache", value.display()).into()),
                });
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
                | "leave-running"
                | "accept-unconfirmed"
                | "splice"
                | "retain"
                | "connect-timeout"
        ) {
            for_proxy = Some(long);
        }
        match long {
            "images-dir" => images_dirs.push(PathBuf::from(parser.value()?)),
            "work-dir" => work_dir = Some(PathBuf::from(parser.value()?)),
            "address" => address = Some(parser.value()?.string()?),
            "port" => port = parser.value()?.parse()?,
            "allow-peer" => allow_peer.push(parser.value()?.parse()?),
            "ps-socket" => ps_socket = Some(descriptor(&parser.value()?)?),
            "connect-timeout" => match parser.value()?.parse::<u32>()? {
                0 => return Err("--connect-timeout is 1 second at least".into()),
                seconds => connect_timeout = Duration::from_secs(seconds.into()),
            },
            "keep" => keep = true,
            "peer-protocol" => {
                let choices = [
                    ("auto", Choice::Auto),
                    ("relay", Choice::Only(Protocol::Relay)),
                    ("seed", Choice::Only(Protocol::Seed)),
                ];
                policy.choice = choose(long, &parser.value()?, &choices)?;
            }
            "commit" => choose(long, &parser.value()?, &[("stored", ())])?,
            "confirm-timeout" => match parser.value()?.parse::<u32>()? {
                0 => return Err("--confirm-timeout is 1 second at least".into()),
                seconds => policy.confirm_timeout = Duration::from_secs(seconds.into()),
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

    let Some(verb) = verb else { return Err("proxy or cache has to be named".into()) };
    if verb == Verb::Proxy && !allow_peer.is_empty() {
        return Err("--allow-peer is for the cache: the proxy connects itself".into());
    }
    if let (Verb::Cache, Some(long)) = (verb, for_proxy) {
        return Err(format!("--{long} is for the proxy").into());
    }
    if verb == Verb::Proxy && consume {
        return Err("--consume is for the cache".into());
    }
    if policy.splice == Splice::Always && policy.choice == Choice::Only(Protocol::Seed) {
        return Err("--splice always needs the relay protocol, which --peer-protocol seed rules out".into());
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
        daemon,
        background,
        pidfile,
        status_fd,
        log_file,
        verbosity,
    })))
}

fn choose<T: Copy>(long: &str, value: &OsString, choices: &[(&str, T)]) -> Result<T, lexopt::Error> {
    match choices.iter().find(|(name, _)| value.to_str() == Some(name)) {
        Some((_, choice)) => Ok(*choice),
        None => {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            Err(format!("--{long} is {}, not '{}'", names.join(" or "), value.display()).into())
        }
    }
}

fn descriptor(value: &OsString) -> Result<i32, lexopt::Error> {
    match value.to_str().and_then(|text| text.parse().ok()) {
        Some(fd) if fd >= 0 => Ok(fd),
        _ => Err(format!("'{}' is not a descriptor's number", value.display()).into()),
    }
}

// -v, -vv, -v2: as with CRIU, the number sets the level, a letter raises it.
fn level(before: u8, value: Option<OsString>) -> Result<u8, lexopt::Error> {
    let Some(value) = value else { return Ok(before.saturating_add(1)) };
    match value.to_str() {
        Some(text) if text.bytes().all(|byte| byte == b'v') => {
            Ok(before.saturating_add(1).saturating_add(u8::try_from(text.len()).unwrap_or(u8::MAX)))
        }
        Some(text) => text.parse().map_err(|_| format!("-v takes a number, not '{text}'").into()),
        None => Err("-v takes a number".into()),
    }
}

fn arg_error(long: &str) -> lexopt::Error {
    format!("--{long} has no meaning here").into()
}

/// The help.
pub fn help() -> String {
    let mut text = String::from(
        "criu-relay: moves a running process between hosts, through memory alone\n\n\
         criu dump --stream on one host, criu restore --stream on the other; between them:\n\n\
         \x20 criu-relay cache [OPTIONS]   where the process is restored (start it first)\n\
         \x20 criu-relay proxy [OPTIONS]   where it is dumped\n\n\
         OPTIONS\n",
    );
    for flag in FLAGS {
        let short = flag.short.map_or("    ".into(), |letter| format!("-{letter}, "));
        let value = match flag.value {
            Some("[N]") => "[=N]".into(),
            Some(value) => format!(" {value}"),
            None => String::new(),
        };
        let _ = write!(text, "  {short}--{}{value}\n{}", flag.long, wrap(flag.help));
    }
    text.push_str(
        "\nExit status: 0 done and confirmed, 1 failed, 2 usage. The link is not encrypted. See criu-relay(8).\n",
    );
    text
}

fn wrap(help: &str) -> String {
    let mut text = String::new();
    let mut line = String::new();
    for word in help.split_whitespace() {
        if line.len() + word.len() > 70 {
            let _ = writeln!(text, "          {}", line.trim_end());
            line.clear();
        }
        line.push_str(word);
        line.push(' ');
    }
    let _ = writeln!(text, "          {}", line.trim_end());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(args: &str) -> Result<Options, String> {
        match parse(args.split_whitespace().map(OsString::from))? {
            Command::Run(options) => Ok(*options),
            Command::Print(text) => panic!("printed {text}"),
        }
    }

    #[test]
    fn defaults() {
        let proxy = options("proxy").unwrap();
        assert_eq!((proxy.address.as_str(), proxy.port), ("localhost", 9996));
        assert_eq!(proxy.images_dirs, [PathBuf::from(".")]);
        assert_eq!(proxy.connect_timeout, Duration::from_secs(30));
        let cache = options("image-cache -D /a --images-dir /b").unwrap();
        assert_eq!((cache.verb, cache.address.as_str()), (Verb::Cache, "127.0.0.1"));
        assert_eq!(cache.work_dir, PathBuf::from("/a"));
        assert_eq!(cache.images_dirs.len(), 2);
    }

    #[test]
    fn verbosity() {
        for (args, level) in
            [("-v", 2), ("-vv", 3), ("-v2", 2), ("-v0", 0), ("-v -v", 3), ("--verbosity=3", 3)]
        {
            assert_eq!(options(&format!("proxy {args}")).unwrap().verbosity, level, "{args}");
        }
        assert!(options("proxy -vx").is_err());
    }

    #[test]
    fn mistakes() {
        for args in [
            "",
            "relay",
            "proxy cache",
            "proxy --port",
            "proxy --port 65536",
            "proxy --port 0",
            "proxy --nonsense",
            "proxy -x",
            "proxy --allow-peer any",
            "cache --allow-peer 10.0.0.0/64",
            "proxy --ps-socket -1",
            "proxy --ps-socket x",
            "proxy --ps-socket 3 --status-fd 3",
            "proxy --ps-socket 3 --address host",
            "proxy --keep=yes",
            "proxy --connect-timeout -3",
            "proxy --connect-timeout 0",
        ] {
            assert!(options(args).is_err(), "{args}");
        }
    }

    #[test]
    fn every_flag_of_the_table_is_understood() {
        for flag in FLAGS {
            let value = match flag.long {
                "allow-peer" => "any",
                "address" => "host",
                "peer-protocol" => "relay",
                "commit" => "stored",
                "splice" => "never",
                "retain" => "small",
                _ => "3",
            };
            let verb = if matches!(flag.long, "allow-peer" | "consume") { "cache" } else { "proxy" };
            let mut args = vec![verb.to_string(), format!("--{}", flag.long)];
            match flag.value {
                Some("[N]") | None => {}
                Some(_) => args.push(value.into()),
            }
            assert!(parse(args.into_iter().map(OsString::from)).is_ok(), "--{}", flag.long);
        }
        let help = help();
        assert!(help.lines().all(|line| line.chars().count() <= 110));
        assert!(FLAGS.iter().all(|flag| help.contains(&format!("--{}", flag.long))));
    }
}
