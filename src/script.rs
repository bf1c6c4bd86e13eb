//! What runs as CRIU's action script: it tells the daemon where CRIU is, waits for the verdict, and ends. What it
//! returns decides whether CRIU goes on, so that whatever is not understood here is a failure.
//!
//! A short-lived program of its own; it may block, but not for longer than CRIU lives. CRIU starts it with
//! descriptor 0 closed; the standard library has put /dev/null there before main.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, socket_with,
};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, getppid, getrlimit, kill_process, pidfd_open,
    pidfd_send_signal, setrlimit, test_kill_process,
};

use crate::cli::Verb;
use crate::client::process::is_stopping;
use crate::net;
use crate::sockets::MAX_PATH;
use crate::wire::control::{Action, BATCH, MAX_TASKS, decode_reply, encode_request};
use crate::wire::frame::FrameReader;

/// How often a tree is looked at until it is found twice the same. A frozen one is at once.
const ROUNDS: usize = 100;

/// The control socket of a daemon, in each of its images directories.
pub fn socket_name(verb: Verb) -> &'static str {
    match verb {
        Verb::Proxy => "relay-proxy.sock",
        Verb::Cache => "relay-cache.sock",
    }
}

/// Acts as CRIU's script for `action`; the other two are CRTOOLS_IMAGE_DIR and CRTOOLS_INIT_PID. CRIU goes on
/// if this succeeds; the error is a sentence for its log.
pub fn run(action: &OsStr, images_dir: Option<&OsStr>, init_pid: Option<&OsStr>) -> Result<(), String> {
    // CRIU has more actions, and every new version may have others.
    let Some(action) = Action::parse(action.as_bytes()) else { return Ok(()) };
    let verbs: &[Verb] = match action {
        Action::PreStream => either(),
        Action::PreDump | Action::PostDump => &[Verb::Proxy],
        Action::PreRestore | Action::PostRestore | Action::PreResume => &[Verb::Cache],
        // Ours, and none of CRIU's: no script speaks for an operator.
        Action::Commit | Action::Rollback | Action::Wait => return Ok(()),
    };
    let dir = match images_dir {
        Some(dir) if !dir.is_empty() => Path::new(dir),
        _ => return Err(format!("CRTOOLS_IMAGE_DIR is not set for the action {}", action.name())),
    };
    let criu = parent()?;
    let mut tree = Tree::default();
    match action {
        // Of what is about to be restored nothing exists.
        Action::PreStream | Action::PreRestore | Action::Commit | Action::Rollback | Action::Wait => {}
        Action::PreDump => tree = Tree::to_be_dumped(root(init_pid)?),
        Action::PostDump | Action::PostRestore | Action::PreResume => {
            // Before the daemon waits for it: its patience is limited.
            raise_limit();
            let root = root(init_pid)?;
            tree.tasks = tasks(root).inspect_err(|_| {
                if action == Action::PreResume {
                    stop_blindly(root);
                }
            })?;
            if action == Action::PreResume {
                tree.sort_stopped();
            }
        }
    }
    let mut daemons = Vec::new();
    let asked = ask(action, verbs, dir, &criu, &mut tree, &mut daemons);
    if asked.is_err() && action == Action::PreResume {
        // CRIU goes on whatever we return, and the source may run. The daemon, if it lives, waits until we have
        // closed: what it does then with the tree is not undone by this.
        tree.stop()?;
    }
    asked.map_err(|why| format!("{}: {why}", action.name()))
}

// Tells the daemons, and waits for their verdicts. They are left connected.
fn ask(
    action: Action,
    verbs: &[Verb],
    dir: &Path,
    criu: &OwnedFd,
    tree: &mut Tree,
    daemons: &mut Vec<Daemon>,
) -> Result<(), String> {
    for verb in verbs {
        daemons.extend(Daemon::find(*verb, dir)?);
    }
    if daemons.is_empty() {
        let names: Vec<_> = verbs.iter().map(|verb| verb.name()).collect();
        let (shown, names) = (shown(dir), names.join(" or "));
        return Err(format!("no criu-relay {names} is in {shown}: start criu-relay {names} with -D {shown}"));
    }
    // All are told before the first answer is waited for: one daemon may wait for what the other is told.
    for daemon in daemons.iter() {
        daemon.ask(action, criu.as_fd(), tree)?;
    }
    if action == Action::PostDump {
        // They are on their way, and the daemon may have the last word for minutes.
        tree.tasks.clear();
    }
    verdicts(criu.as_fd(), daemons)
}

/// The processes that CRIU is at.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    tasks: Vec<OwnedFd>,
    /// What a dump of it will have to carry, in bytes; 0: not known.
    memory: u64,
    /// So many of the tasks, the last, are stopped by CRIU.
    stays: usize,
    /// What it will have to carry of each process, in the order in which CRIU dumps them, and of shared memory behind.
    sizes: Vec<u64>,
}

impl Tree {
    /// Its root alone: it runs, so that its tree may be another in a moment.
    fn to_be_dumped(root: Pid) -> Self {
        let tasks = pidfd_open(root, PidfdFlags::empty()).into_iter().collect();
        let found = walk(root).ok().flatten().unwrap_or_default();
        let all: Vec<_> = found.into_iter().filter_map(resident).collect();
        let mut sizes: Vec<u64> = all.iter().map(|(private, _)| *private).collect();
        // The same memory may be shared by all.
        let shared = all.iter().map(|(_, shared)| *shared).max().unwrap_or(0);
        sizes.extend(Some(shared).filter(|shared| *shared > 0));
        Self { tasks, memory: sizes.iter().sum(), stays: 0, sizes }
    }

    /// Before anybody else sends a SIGSTOP: CRIU has to those that were stopped when it dumped them.
    fn sort_stopped(&mut self) {
        let is_stopping = |task: &OwnedFd| net::pidfd_pid(task.as_fd()).is_some_and(is_stopping);
        let (stay, mut tasks): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.tasks).into_iter().partition(is_stopping);
        self.stays = stay.len();
        tasks.extend(stay);
        self.tasks = tasks;
    }

    /// Nothing of it is to run: its daemon has not said that it may, and is perhaps gone.
    fn stop(&self) -> Result<(), String> {
        let stopped = self.tasks.iter().map(|task| match pidfd_send_signal(task, Signal::STOP) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(format!("a task of the copy can't be stopped: {error}")),
        });
        stopped.fold(Ok(()), Result::and)
    }
}

// The same for a tree whose processes can't all be watched: as far as it can be seen.
fn stop_blindly(root: Pid) {
    for pid in walk(root).ok().flatten().unwrap_or_else(|| vec![root]) {
        let _ = kill_process(pid, Signal::STOP);
    }
}

// The memory of a process in bytes: what is its own, and what it may share. None: it has none, and no page image.
fn resident(pid: Pid) -> Option<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    Some((kib("RssAnon")? * 1024, kib("RssShmem").unwrap_or(0) * 1024))
}

// Whom a CRIU tells that is about to connect. Nothing that it gives us says whether it dumps or restores; its
// command line does, unless it was started as a service.
fn either() -> &'static [Verb] {
    let parent = getppid().map_or(0, Pid::as_raw_pid);
    let line = fs::read(format!("/proc/{parent}/cmdline")).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0);
    match words.find(|word| matches!(*word, b"restore" | b"dump" | b"pre-dump")) {
        Some(b"restore") => &[Verb::Cache],
        Some(_) => &[Verb::Proxy],
        None => &[Verb::Proxy, Verb::Cache],
    }
}

/// A pidfd of CRIU, which has started us.
fn parent() -> Result<OwnedFd, String> {
    let pid = getppid().ok_or("CRIU, the parent process, is not visible from here")?;
    let fd = pidfd_open(pid, PidfdFlags::empty())
        .map_err(|error| format!("CRIU, process {pid}, can't be watched: {error}"))?;
    // Had it died meanwhile, the number could be somebody else's.
    if getppid() != Some(pid) {
        return Err(GONE.into());
    }
    Ok(fd)
}

const GONE: &str = "CRIU has ended without waiting for this script";

/// A daemon that is asked.
pub(crate) struct Daemon {
    path: PathBuf,
    socket: OwnedFd,
    reply: FrameReader,
}

impl Daemon {
    /// Connects; None: it has no socket there.
    pub(crate) fn find(verb: Verb, dir: &Path) -> Result<Option<Self>, String> {
        let path = dir.join(socket_name(verb));
        if path.as_os_str().len() > MAX_PATH {
            return Err(format!("the path {} is longer than {MAX_PATH} bytes", path.display()));
        }
        let connected = SocketAddrUnix::new(&path).and_then(|address| {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            loop {
                match connect(&socket, &address) {
                    Err(Errno::INTR) => {}
                    other => return other.map(|()| socket),
                }
            }
        });
        // From now on only for the eye.
        let path = Path::new(&shown(dir)).join(socket_name(verb));
        match connected {
            Ok(socket) => Ok(Some(Self { path, socket, reply: FrameReader::default() })),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::CONNREFUSED) => Err(format!(
                "{} was left by a criu-relay {verb} that is gone: start it again, or remove the file",
                path.display(),
                verb = verb.name()
            )),
            Err(error) => Err(format!("{} can't be connected to: {error}", path.display())),
        }
    }

    /// Sends the request. A daemon that closes meanwhile has said why, or will be found gone.
    pub(crate) fn ask(&self, action: Action, criu: BorrowedFd<'_>, tree: &Tree) -> Result<(), String> {
        let tasks: Vec<_> = tree.tasks.iter().map(AsFd::as_fd).collect();
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let request =
            encode_request(action, number(tasks.len()), tree.memory, number(tree.stays), &tree.sizes);
        let mut open = self.send(criu, &request, &[criu])?;
        for batch in tasks.chunks(BATCH) {
            open = open && self.send(criu, &[0], batch)?;
        }
        Ok(())
    }

    /// Sends one message with its descriptors; false: the daemon has closed.
    fn send(&self, criu: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool, String> {
        let broken = |why: String| Err(format!("{} can't be told: {why}", self.path.display()));
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return broken("too many descriptors in a message".into());
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(n) if n == bytes.len() => return Ok(true),
                Ok(_) => return broken("it takes no whole message".into()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait(criu, &[self.socket.as_fd()], PollFlags::OUT)?,
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(false),
                Err(error) => return broken(error.to_string()),
            }
        }
    }

    /// Reads what is there of the answer; its text, once it is whole, and good.
    pub(crate) fn answer(&mut self) -> Result<Option<String>, String> {
        let mut buffer = [0; 512];
        loop {
            let got = match recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((_, n)) => n,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET) => 0,
                Err(error) => return Err(format!("{} can't be read: {error}", self.path.display())),
            };
            if got == 0 {
                return Err(format!("the daemon at {} has gone without an answer", self.path.display()));
            }
            let wrong = |error| format!("the daemon at {} {error}", self.path.display());
            if let Some(body) = self.reply.feed(&mut &buffer[..got]).map_err(wrong)? {
                return match decode_reply(&body).map_err(wrong)? {
                    (0, text) => Ok(Some(text)),
                    (errno, text) if text.is_empty() => {
                        Err(io::Error::from_raw_os_error(errno.try_into().unwrap_or(i32::MAX)).to_string())
                    }
                    (_, text) => Err(text),
                };
            }
        }
    }
}

impl AsFd for Daemon {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Waits until all have agreed, for as long as CRIU lives.
fn verdicts(criu: BorrowedFd<'_>, daemons: &mut [Daemon]) -> Result<(), String> {
    let mut waiting: Vec<_> = daemons.iter_mut().collect();
    while !waiting.is_empty() {
        let sockets: Vec<_> = waiting.iter().map(|daemon| daemon.socket.as_fd()).collect();
        let waited = wait(criu, &sockets, PollFlags::IN);
        let mut left = Vec::new();
        for daemon in waiting {
            if daemon.answer()?.is_none() {
                left.push(daemon);
            }
        }
        waiting = left;
        // What has been answered stands, whatever has become of CRIU.
        if !waiting.is_empty() {
            waited?;
        }
    }
    Ok(())
}

/// Waits until one of the sockets is ready; an error when CRIU has ended.
pub(crate) fn wait(criu: BorrowedFd<'_>, sockets: &[BorrowedFd<'_>], flags: PollFlags) -> Result<(), String> {
    let mut fds = vec![PollFd::from_borrowed_fd(criu, PollFlags::IN)];
    fds.extend(sockets.iter().map(|socket| PollFd::from_borrowed_fd(*socket, flags)));
    loop {
        match poll(&mut fds, None) {
            Ok(_) if fds[0].revents().is_empty() => return Ok(()),
            Ok(_) => return Err(GONE.into()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(format!("poll failed: {error}")),
        }
    }
}

// CRIU names its directory by a descriptor of its own, which says nothing to anybody.
fn shown(dir: &Path) -> String {
    fs::canonicalize(dir).unwrap_or_else(|_| dir.to_path_buf()).display().to_string()
}

// A pidfd for each process: the usual 1024 are soon used up.
fn raise_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    // If it fails, a tree that is too large will say so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

fn root(init_pid: Option<&OsStr>) -> Result<Pid, String> {
    let pid = init_pid.unwrap_or_default();
    let number = pid.to_str().and_then(|pid| pid.parse().ok());
    match number.filter(|pid| *pid > 0).and_then(Pid::from_raw) {
        Some(pid) => Ok(pid),
        None => Err(format!("CRTOOLS_INIT_PID is no process id: \"{}\"", pid.as_bytes().escape_ascii())),
    }
}

/// A pidfd of every process (thread group) of the tree at `root`, its own first. It is looked at again until a round has
/// found what the one before has, and each is still who it was.
fn tasks(root: Pid) -> Result<Vec<OwnedFd>, String> {
    let mut known: HashMap<Pid, OwnedFd> = HashMap::new();
    for _ in 0..ROUNDS {
        let walked = walk(root).map_err(|error| format!("the tree of process {root}: {error}"))?;
        let Some(found) = walked else {
            if test_kill_process(root) == Err(Errno::SRCH) {
                return Err(format!("process {root}, the root of the tree, does not exist"));
            }
            continue;
        };
        let found: HashSet<_> = found.into_iter().collect();
        let before = known.len();
        known.retain(|pid, fd| found.contains(pid) && net::pidfd_pid(fd.as_fd()) == Some(pid.as_raw_pid()));
        let mut stable = known.len() == before;
        for pid in found {
            if known.contains_key(&pid) {
                continue;
            }
            stable = false;
            match pidfd_open(pid, PidfdFlags::empty()) {
                Ok(fd) => drop(known.insert(pid, fd)),
                Err(Errno::SRCH) => {}
                Err(error) => return Err(format!("process {pid} can't be watched: {error}")),
            }
        }
        if stable {
            let mut tasks: Vec<_> = known.into_iter().collect();
            tasks.sort_unstable_by_key(|(pid, _)| *pid != root);
            return Ok(tasks.into_iter().map(|(_, fd)| fd).collect());
        }
    }
    Err(format!("the tree of process {root} does not come to rest"))
}

/// The processes of the tree, each before the children of all its threads, as CRIU goes through them; None: one
/// vanished meanwhile.
fn walk(root: Pid) -> io::Result<Option<Vec<Pid>>> {
    let mut found = HashSet::from([root]);
    let (mut todo, mut walked) = (vec![root], Vec::new());
    while let Some(pid) = todo.pop() {
        walked.push(pid);
        let children = match children(pid) {
            Ok(children) => children,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => return Ok(None),
            Err(error) => return Err(error),
        };
        todo.extend(children.into_iter().rev().filter(|child| found.insert(*child)));
        if found.len() > MAX_TASKS as usize {
            return Err(io::Error::other(format!("it has more than {MAX_TASKS} processes")));
        }
    }
    Ok(Some(walked))
}

fn children(pid: Pid) -> io::Result<Vec<Pid>> {
    let mut children = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("children"))?;
        // 0: a process that is not visible from here; then the tree can't be watched.
        for pid in text.split_ascii_whitespace() {
            let pid = pid.parse().ok().filter(|pid| *pid > 0).and_then(Pid::from_raw);
            children.push(pid.ok_or_else(|| io::Error::other("a process of it is not visible from here"))?);
        }
    }
    Ok(children)
}
