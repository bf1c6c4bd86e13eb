//! The table of flags, and the help that is made of it.

use std::fmt::Write;

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
        Some("restored|stored"),
        "proxy: when a scripted dump lets CRIU kill the source: when its copy stands ready on the other side (default), \
         or when the cache has stored everything",
    ),
    flag(
        None,
        "confirm-timeout",
        Some("SECONDS"),
        "proxy: how long CRIU is held by its action script while nothing moves (default 60, at least 1)",
    ),
    flag(
        None,
        "restore-timeout",
        Some("SECONDS"),
        "proxy: how long the source stays frozen while its copy is being made, commit restored (default 600, at least 1)",
    ),
    flag(
        None,
        "prepare",
        Some("auto|off|SIZE"),
        "write the memory for the page images before anything is frozen: auto (default): as much as the tree has; off; \
         SIZE: so much, at the cache from its start",
    ),
    flag(
        None,
        "prepare-timeout",
        Some("SECONDS"),
        "proxy: how long pre-dump waits for that (default 30, at least 1)",
    ),
    flag(
        None,
        "reconnect",
        Some("SECONDS"),
        "proxy: how long a link that was lost in the middle of a dump may take to come back: the dump goes on \
         (default 0: it fails at once)",
    ),
    flag(
        None,
        "replay-buffer",
        Some("SIZE"),
        "proxy: with --reconnect, how much of what the cache has not acknowledged is kept (default 64M, at least 1M; \
         suffixes K, M, G)",
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
    flag(
        None,
        "memory-limit",
        Some("SIZE"),
        "how much memory the images may take, in bytes or with K, M or G behind the number, 1M at least (default: \
         cache: 80 % of what is available at the start; proxy: no limit)",
    ),
    flag(
        None,
        "spill-dir",
        Some("DIR"),
        "beyond the limit, images grow in a file without a name in this directory, instead of being refused",
    ),
    flag(
        None,
        "view",
        Some("DIR"),
        "cache: a complete dump appears in this directory, for criu restore -D DIR without --stream",
    ),
    flag(
        None,
        "persist",
        Some("[disk]"),
        "cache: the images of the view are files, which outlive the cache; DIR has to be on a tmpfs, or =disk is said",
    ),
    flag(None, "timeout", Some("SECONDS"), "wait: for how long (default: without end; at least 1)"),
    flag(None, "ready", None, "wait: for the sockets of a daemon, not for a dump"),
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

/// The help.
pub fn help() -> String {
    let mut text = String::from(
        "criu-relay: moves a running process between hosts, through memory alone\n\n\
         criu dump --stream on one host, criu restore --stream on the other; between them:\n\n\
         \x20 criu-relay cache [OPTIONS]   where the process is restored (start it first)\n\
         \x20 criu-relay proxy [OPTIONS]   where it is dumped\n\n\
         and when a daemon or a host has died in the middle of it, in the daemon's work directory:\n\n\
         \x20 criu-relay resolve [-W DIR]                              says what is known, and what can be done\n\
         \x20 criu-relay resolve commit|rollback [SESSION] [-W DIR]    the copy runs, or the source\n\n\
         and where a script has to know when the dump is there, for a view:\n\n\
         \x20 criu-relay wait [-D DIR] [--timeout SECONDS] [--ready]   0: it is complete\n\n\
         OPTIONS\n",
    );
    for flag in FLAGS {
        let short = flag.short.map_or("    ".into(), |letter| format!("-{letter}, "));
        let value = match flag.value {
            // An optional value is attached.
            Some(value) if value.starts_with('[') => value.replacen('[', "[=", 1),
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
