//! From a command line to a running role, and back to an exit status.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use log::LevelFilter;
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

use crate::cli::{BACKGROUND, MEMORY_MIN, Options, Verb};
use crate::client::Door;
use crate::peer::Prepare;
use crate::peer::dialer::Dialer;
use crate::pump::human;
use crate::reactor::{Exit, Reactor};
use crate::record::Book;
use crate::session::Dialect;
use crate::sockets::{self, Sockets};
use crate::store::{Bodies, Files, SpillFile};
use crate::view::View;
use crate::{cache, memory, proxy, script};

/// Descriptors kept back for what is neither a body nor a connection: the log, the poll, a descriptor that
/// is just being received.
const RESERVE: u64 = 64;

/// Runs the daemon to its end. The error is a sentence.
pub fn run(options: &Options) -> Result<Exit, String> {
    if options.daemon && !options.background {
        return launch(options);
    }
    // Before anything is opened: nobody else reads what we make, nobody traces us, and the inherited
    // numbers are not taken by files of ours.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| format!("PR_SET_DUMPABLE can't be switched off: {error}"))?;
    let link = options.ps_socket.map(sockets::adopt_connection).transpose()?;
    let status = options.status_fd.map(sockets::adopt).transpose()?.map(File::from);
    if options.background {
        rustix::process::setsid().map_err(|error| format!("setsid failed: {error}"))?;
    }
    sockets::check_dir(&options.work_dir)?;
    start_log(options)?;

    let result = serve(options, link, status);
    if let Err(why) = &result
        && log_path(options).is_some()
    {
        log::error!("{why}");
    }
    result
}

fn serve(options: &Options, link: Option<OwnedFd>, status: Option<File>) -> Result<Exit, String> {
    let (max_memfds, max_conns) = raise_descriptor_limit(options.view.is_some());
    // Whoever finds something of ours there looks at the socket first.
    let mut view = options.view.as_ref().map(View::open).transpose()?;
    let bodies = images_memory(options, max_memfds)?.with_files(match &view {
        Some(view) if view.persists() => Files::Nameless(view.open_dir()?),
        Some(_) => Files::Own,
        None => Files::Shared,
    });
    let reactor = Reactor::new().map_err(|error| format!("the poll loop can't be made: {error}"))?;
    // A failure from here on leaves no socket behind: `files` removes them.
    let mut files = Sockets::default();
    let (remote, stream) = match options.verb {
        Verb::Proxy => ("img-proxy.sock", "streamer-capture.sock"),
        Verb::Cache => ("img-cache.sock", "streamer-serve.sock"),
    };
    let mut remote_dirs = options.images_dirs.clone();
    remote_dirs.push(options.work_dir.clone());
    let mut listeners = vec![
        (files.place(&remote_dirs, remote)?, Door::Criu(Dialect::Remote)),
        (files.place(&options.images_dirs, stream)?, Door::Criu(Dialect::Stream)),
        (files.place(&options.images_dirs, script::socket_name(options.verb))?, Door::Control),
    ];
    if let Some(view) = &view {
        let is_view = |dir: &PathBuf| fs::canonicalize(dir).is_ok_and(|dir| dir == view.dir());
        if remote_dirs.iter().any(is_view) {
            return Err(format!(
                "{} can't be the view too: --view takes a directory of its own",
                view.dir().display()
            ));
        }
        let dir = [view.dir().to_path_buf()];
        listeners.push((files.place(&dir, script::socket_name(Verb::Cache))?, Door::View));
    }
    let left = view.as_mut().map(View::take_over).transpose()?;
    let images_dir = fs::canonicalize(&options.images_dirs[0]);
    let images_dir = images_dir.map_err(|error| format!("{}: {error}", options.images_dirs[0].display()))?;
    let book = Book::new(options.verb, options.work_dir.clone(), images_dir);
    let records = book.take_over()?;
    let wrong = |error: io::Error| format!("{} can't be started: {error}", options.verb.name());
    let exit = match options.verb {
        Verb::Proxy => {
            let reach = match link {
                Some(fd) => proxy::Reach::Inherited(fd),
                None => {
                    let addresses = sockets::resolve(&options.address, options.port)?;
                    proxy::Reach::Dial(Dialer::new(addresses, options.connect_timeout))
                }
            };
            let (keep, policy) = (options.keep, options.policy.clone());
            let setup = proxy::Setup { listeners, reach, keep, policy, book, records, bodies, max_conns };
            let mut role = proxy::Proxy::new(&reactor, setup).map_err(wrong)?;
            let _pidfile = ready(options, None, status)?;
            let exit = reactor.run(&mut role);
            files.remove();
            exit
        }
        Verb::Cache => {
            let (reach, port) = match link {
                Some(fd) => (cache::Reach::Inherited(fd), None),
                None => {
                    let (fd, bound) = listen(options)?;
                    log::info!("listening at {bound}");
                    let port = (options.port == 0).then(|| format!("{bound}\n"));
                    (cache::Reach::Listen(fd, options.allow_peer.clone()), port)
                }
            };
            let (keep, consume) = (options.keep, options.consume);
            let (choice, prepare) = (options.policy.choice, options.policy.prepare);
            let view = view.zip(left);
            let setup = cache::Setup {
                listeners,
                reach,
                keep,
                choice,
                prepare,
                consume,
                book,
                records,
                bodies,
                view,
                max_conns,
            };
            let mut role = cache::Cache::new(&reactor, setup).map_err(wrong)?;
            // The role removes the directory of a view that was made in vain: no socket may be in it by then.
            let _pidfile = ready(options, port, status).inspect_err(|_| files.remove())?;
            let exit = reactor.run(&mut role);
            files.remove();
            exit
        }
    };
    exit.map_err(|error| format!("the poll loop failed: {error}"))
}

fn listen(options: &Options) -> Result<(OwnedFd, std::net::SocketAddr), String> {
    let addresses = sockets::resolve(&options.address, options.port)?;
    if options.allow_peer.is_empty()
        && let Some(far) = addresses.iter().find(|address| !address.ip().to_canonical().is_loopback())
    {
        return Err(format!(
            "listening at {far}, beyond loopback, needs --allow-peer ADDRESS[/PREFIX] (or --allow-peer any): \
             whoever connects there can hand a process to this host, in plain text"
        ));
    }
    sockets::listen_tcp(&addresses)
}

// Tells everybody who waits for it that CRIU and the peer can connect. Returns what removes the pid file.
fn ready(options: &Options, port: Option<String>, status: Option<File>) -> Result<Pidfile, String> {
    let pidfile = Pidfile::write(options)?;
    let dirs: Vec<_> = options.images_dirs.iter().map(|dir| dir.display().to_string()).collect();
    log::info!("{} {} is ready in {}", options.verb.name(), std::process::id(), dirs.join(", "));
    let mut out = port.unwrap_or_default().into_bytes();
    if options.background {
        out.push(0);
    }
    let told = io::stdout().write_all(&out).and_then(|()| io::stdout().flush());
    told.map_err(|error| format!("stdout can't be written to: {error}"))?;
    if options.background {
        let null = File::options().write(true).open("/dev/null");
        let done = null.and_then(|null| Ok(rustix::stdio::dup2_stdout(null)?));
        done.map_err(|error| format!("stdout can't be closed: {error}"))?;
    }
    if let Some(mut status) = status {
        let told = status.write_all(&[0]);
        told.map_err(|error| format!("the descriptor of --status-fd can't be written to: {error}"))?;
    }
    Ok(pidfile)
}

/// The pid file, removed when dropped.
struct Pidfile(Option<PathBuf>);

impl Pidfile {
    fn text() -> String {
        format!("{}\n", std::process::id())
    }

    fn write(options: &Options) -> Result<Self, String> {
        let Some(path) = &options.pidfile else { return Ok(Self(None)) };
        let path = options.work_dir.join(path);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path);
        file.and_then(|mut file| file.write_all(Self::text().as_bytes()))
            .map_err(|error| format!("the pid file {}: {error}", path.display()))?;
        Ok(Self(Some(path)))
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        // Unless another has written there meanwhile.
        if let Some(path) = &self.0
            && fs::read_to_string(path).is_ok_and(|text| text == Self::text())
            && let Err(error) = fs::remove_file(path)
        {
            log::warn!("the pid file {} can't be removed: {error}", path.display());
        }
    }
}

// The descriptors that bodies may take, and those that connections may take. `each`: every body needs one.
fn raise_descriptor_limit(each: bool) -> (usize, usize) {
    let before = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: before.maximum, maximum: before.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!("RLIMIT_NOFILE can't be raised: {error}");
    }
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
    let reserve = RESERVE.min(limit / 4);
    // Some are left for connections, however few there are.
    let memfds = if each { (limit - reserve) / 4 * 3 } else { limit / 4 };
    let conns = limit - memfds - reserve;
    log::info!(
        "RLIMIT_NOFILE is {limit}: {conns} connections and pipes at a time, {memfds} {}images with a file of \
         their own",
        if each { "" } else { "large " }
    );
    (memfds as usize, conns as usize)
}

// Where the images will be, and how much of it there is.
fn images_memory(options: &Options, max_memfds: usize) -> Result<Bodies, String> {
    let spill = options.spill_dir.as_deref().map(SpillFile::open).transpose()?;
    let (limit, source) = match (options.memory_limit, options.verb) {
        (Some(limit), _) => (Some(limit), "--memory-limit".into()),
        (None, Verb::Proxy) => (None, String::new()),
        (None, Verb::Cache) => match memory::available() {
            Some(memory::Available { bytes, source }) => {
                let limit = (bytes / 5 * 4).max(MEMORY_MIN);
                (Some(limit), format!("80 % of the {} available by {source}", human(bytes)))
            }
            None => {
                log::warn!(
                    "how much memory is available can't be found out: there is no limit (--memory-limit)"
                );
                (None, String::new())
            }
        },
    };
    if let Some(limit) = limit {
        let beyond = match &spill {
            Some(spill) => format!("images beyond it go to {}", spill.dir().display()),
            None => "images beyond it are refused".into(),
        };
        log::info!("the memory limit is {} ({source}): {beyond}", human(limit));
    }
    if let (Prepare::Size(size), Some(limit), Verb::Cache) = (options.policy.prepare, limit, options.verb)
        && size > limit
    {
        return Err(format!(
            "--prepare is {}, and the memory limit {} ({source}): raise it with --memory-limit, or prepare less",
            human(size),
            human(limit)
        ));
    }
    Ok(Bodies::new(max_memfds).limited(limit, spill))
}

fn log_path(options: &Options) -> Option<PathBuf> {
    match &options.log_file {
        Some(file) => Some(options.work_dir.join(file)),
        // In the background there is nobody to read stderr.
        None if options.background => {
            Some(options.work_dir.join(format!("criu-relay-{}.log", options.verb.name())))
        }
        None => None,
    }
}

fn start_log(options: &Options) -> Result<(), String> {
    if let Some(path) = log_path(options) {
        let redirected = open_log(&path).and_then(|file| Ok(rustix::stdio::dup2_stderr(file)?));
        redirected.map_err(|error| format!("the log file {}: {error}", path.display()))?;
    }
    let level = match options.verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let logger = simple_logger::SimpleLogger::new().with_level(level);
    // mio has nothing to say about a dump.
    let logger = logger.with_module_level("mio", LevelFilter::Off);
    log::set_max_level(level);
    log::set_boxed_logger(Box::new(Unfailing(logger)))
        .map_err(|error| format!("the log can't be started: {error}"))
}

/// A log that may fail: eprintln!, with which simple_logger writes, panics when the disk is full or the
/// terminal has gone, and a log line is not worth a process.
struct Unfailing(simple_logger::SimpleLogger);

impl log::Log for Unfailing {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.0.log(record)));
    }

    fn flush(&self) {
        self.0.flush();
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).open(path)
}

// Starts ourselves anew in the background, and waits until that process is ready.
fn launch(options: &Options) -> Result<Exit, String> {
    let wrong = |error: io::Error| format!("the background process can't be started: {error}");
    let mut child = Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .arg(format!("--{BACKGROUND}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(wrong)?;
    let mut said = Vec::new();
    if let Some(mut out) = child.stdout.take() {
        // What is for stdout, a NUL, and the end; or only the end.
        out.read_to_end(&mut said).map_err(wrong)?;
    }
    if said.pop() == Some(0) {
        io::stdout().write_all(&said).map_err(wrong)?;
        return Ok(Exit::Done);
    }
    let status = child.wait().map_err(wrong)?;
    let log = PathBuf::from(format!("criu-relay-{}.log", options.verb.name()));
    let log = options.work_dir.join(options.log_file.as_ref().unwrap_or(&log));
    Err(format!("the background process has ended before it was ready ({status}): see {}", log.display()))
}
