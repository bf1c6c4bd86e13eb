//! What a migration needs: the programs, the processes, and the certainty that none of them is left behind.

#![allow(dead_code)] // Each test file uses its part.

pub mod namespace;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Deadlines are for failures only, and the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(40);

const OURS: &str = env!("CARGO_BIN_EXE_criu-relay");

const STEP: Duration = Duration::from_millis(5);

/// The programs that are not ours.
#[derive(Debug)]
struct Programs {
    criu: PathBuf,
    workload: PathBuf,
}

// An error is why these tests can't run here.
fn prepare() -> Result<Programs, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("CRIU needs root".into());
    }
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fetch = Command::new(top.join("tests/fetch-criu.sh")).output().expect("tests/fetch-criu.sh starts");
    let said = String::from_utf8_lossy(&fetch.stderr).trim().to_string();
    match fetch.status.code() {
        Some(0) => {}
        Some(77) => return Err(said),
        _ => panic!("tests/fetch-criu.sh: {}: {said}", fetch.status),
    }
    // Complete or not at all: another run of these tests may be executing the one that is there.
    let workload = Path::new(env!("CARGO_TARGET_TMPDIR")).join("migrant");
    let new = workload.with_extension(std::process::id().to_string());
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-pthread", "-o"]).arg(&new).arg(top.join("tests/migrant.c"));
    match cc.output() {
        Ok(done) if done.status.success() => {}
        Ok(done) => panic!("tests/migrant.c: {}", String::from_utf8_lossy(&done.stderr)),
        Err(error) => return Err(format!("there is no C compiler: {error}")),
    }
    fs::rename(&new, &workload).expect("the workload can be renamed");
    Ok(Programs { criu: top.join("target/criu/criu"), workload })
}

/// Says that a test did not run; past the harness, which keeps what a test prints.
pub fn skip(test: &str, why: &str) {
    let line = format!("\nSKIPPED {test}: {why}\n");
    io::stdout().write_all(line.as_bytes()).expect("stdout takes a line");
}

/// Polls for something that is going to happen.
pub fn wait_for<T>(what: &str, within: Duration, mut event: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = event() {
            return value;
        }
        assert!(Instant::now() < deadline, "after {within:?} there is still no {what}");
        thread::sleep(STEP);
    }
}

/// A port that is free, and that the kernel gives to nobody by itself.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 10_000 + (std::process::id() % 1000) as u16 * 20;
    let mut ports = (0..20).map(|_| start + NEXT.fetch_add(1, Ordering::Relaxed) % 20);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("one port of twenty is free")
}

/// A child process; it is killed when it goes out of scope.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    // The child's only child: the process that is meant. The child ends after it, and in the same way.
    job: Option<Pid>,
}

impl Process {
    fn start(name: &str, command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| panic!("{name}: {command:?}: {error}"));
        Self { name: name.into(), child, job: None }
    }

    pub fn pid(&self) -> u32 {
        self.job.map_or(self.child.id(), |job| job.as_raw_pid() as u32)
    }

    /// How it ended, if it has: the exit status, or the signal's number with a minus.
    pub fn ended(&mut self) -> Option<i32> {
        let status = self.child.try_wait().expect("a child can be waited for")?;
        status.code().or_else(|| status.signal().map(|signal| -signal))
    }

    /// Waits for its end.
    pub fn end_within(&mut self, within: Duration) -> i32 {
        let what = format!("end of {} (process {})", self.name, self.pid());
        wait_for(&what, within, || self.ended())
    }

    /// Waits for its end.
    pub fn end(&mut self) -> i32 {
        self.end_within(PATIENCE)
    }

    pub fn signal(&mut self, signal: Signal) {
        assert_eq!(self.ended(), None, "{} has ended before {signal:?}", self.name);
        let pid = self.job.unwrap_or_else(|| Pid::from_child(&self.child));
        kill_process(pid, signal).expect("a signal can be sent");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Errors: it has ended already.
        let _ = match self.job {
            // The child waits for it. While the child is there, nobody else has its PID.
            Some(job) if matches!(self.child.try_wait(), Ok(None)) => {
                kill_process(job, Signal::KILL).map_err(io::Error::from)
            }
            _ => self.child.kill(),
        };
        let _ = self.child.wait();
    }
}

/// One of our daemons.
#[derive(Debug)]
pub struct Daemon {
    pub process: Process,
    pub port: u16,
    log: PathBuf,
}

impl Daemon {
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("a log can be read")
    }

    pub fn has_logged(&self, words: &str) -> bool {
        self.log().contains(words)
    }

    /// Waits until its log holds these words.
    pub fn logs(&mut self, words: &str) {
        let what = format!("\"{words}\" in the log of {}", self.process.name);
        wait_for(&what, PATIENCE, || {
            let ended = self.process.ended();
            if self.has_logged(words) {
                return Some(());
            }
            assert_eq!(ended, None, "{} has ended without having logged \"{words}\"", self.process.name);
            None
        });
    }

    /// Waits until CRIU is connected to its serving socket: a restore waits, or is being served.
    pub fn serves(&self) {
        let table = format!("/proc/{}/net/unix", self.process.pid());
        let socket = self.log.with_file_name("target/streamer-serve.sock").display().to_string();
        wait_for("restore that is connected", PATIENCE, || {
            let table = fs::read_to_string(&table).expect("the table of sockets can be read");
            // Num RefCount Protocol Flags Type St Inode Path; 03 is a connection.
            let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            lines.any(|line| line.get(7) == Some(&socket.as_str()) && line[5] == "03").then_some(())
        });
    }
}

/// `criu restore` as the first process of a PID namespace, and with it what it restores.
#[derive(Debug)]
pub struct Restore {
    pub process: Process,
}

impl Restore {
    /// Kills the copy and all that belongs to it.
    pub fn kill(&mut self) {
        let unshare = self.process.pid();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"));
        let init = children.unwrap_or_default().trim().parse::<u32>();
        let _ = self.process.child.kill();
        let _ = self.process.child.wait();
        let Ok(init) = init else { return };
        // The namespace's first process is a zombie only when all others are gone. Whoever waits for it then
        // is not us.
        let deadline = Instant::now() + PATIENCE;
        let stat = format!("/proc/{init}/stat");
        while Instant::now() < deadline {
            let state = fs::read_to_string(&stat).unwrap_or_default();
            match state.rsplit_once(") ") {
                Some((_, rest)) if !rest.starts_with('Z') && !rest.starts_with('X') => thread::sleep(STEP),
                _ => return,
            }
        }
    }
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().expect("a process id")).collect()
}

/// The children of a process, theirs, and so on, in the order of their numbers.
pub fn descendants(of: u32) -> Vec<u32> {
    let (mut todo, mut found) = (children(of), Vec::new());
    while let Some(pid) = todo.pop() {
        todo.extend(children(pid));
        found.push(pid);
    }
    found.sort();
    found
}

impl Restore {
    /// The process ids, as seen from here, of the processes of that name in its namespace.
    pub fn named(&self, name: &str) -> Vec<u32> {
        let is_named = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|found| found.trim_end() == name)
        };
        descendants(self.process.pid()).into_iter().filter(is_named).collect()
    }

    /// Those of the workload's copy. CRIU's own are there before it is restored.
    pub fn copy(&self) -> Vec<u32> {
        self.named("migrant")
    }
}

/// The states of these processes; X: it is gone.
pub fn states(pids: &[u32]) -> String {
    let state = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('X')
    };
    pids.iter().map(state).collect()
}

/// A gate in the way of CRIU.
#[derive(Debug)]
pub struct Gate {
    path: PathBuf,
}

impl Gate {
    /// CRIU's arguments.
    pub fn args(&self) -> [String; 2] {
        ["--action-script".into(), self.path.display().to_string()]
    }

    fn file(&self, what: &str) -> PathBuf {
        PathBuf::from(format!("{}.{what}", self.path.display()))
    }

    /// Waits until CRIU is there.
    pub fn is_reached(&self) {
        wait_for("CRIU at the gate", PATIENCE, || self.file("reached").exists().then_some(()));
    }

    pub fn opens(&self) {
        File::create(self.file("open")).expect("a gate can be opened");
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if self.process.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.kill();
        }
    }
}

/// What the workload says when everything in it is right.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub counter: u64,
    pub pid: u32,
    pub processes: u32,
}

/// A network namespace with its name.
#[derive(Debug)]
pub struct Netns(pub String);

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).output();
    }
}

/// Two hosts: 10.77.0.1 and 10.77.0.2.
pub fn two_hosts() -> Result<[Netns; 2], String> {
    let ip = |args: &str| match Command::new("ip").args(args.split_whitespace()).output() {
        Ok(done) if done.status.success() => Ok(()),
        Ok(done) => Err(format!("ip {args}: {}", String::from_utf8_lossy(&done.stderr).trim())),
        Err(error) => Err(format!("ip: {error}")),
    };
    let hosts = ["a", "b"].map(|host| Netns(format!("criu-{host}-{}", std::process::id())));
    let [a, b] = [&hosts[0].0, &hosts[1].0];
    ip(&format!("netns add {a}"))?;
    ip(&format!("netns add {b}"))?;
    ip(&format!("-n {a} link add veth0 type veth peer name veth0 netns {b}"))?;
    for (host, address) in [(a, "10.77.0.1/24"), (b, "10.77.0.2/24")] {
        ip(&format!("-n {host} address add {address} dev veth0"))?;
        ip(&format!("-n {host} link set veth0 up"))?;
        ip(&format!("-n {host} link set lo up"))?;
    }
    Ok(hosts)
}

/// A test's own directory and what it starts there: `source` and `target` are the two hosts' images
/// directories, `app` is the workload's.
#[derive(Debug)]
pub struct Bench {
    dir: PathBuf,
    programs: &'static Programs,
    started: Cell<u32>,
    /// The network namespaces of the two hosts.
    pub netns: Option<[Netns; 2]>,
}

/// Which host.
#[derive(Clone, Copy, Debug)]
pub enum Host {
    Source,
    Target,
}

impl Bench {
    /// None: these tests can't run here, and it has been said so.
    pub fn new(test: &str) -> Option<Self> {
        static PROGRAMS: OnceLock<Result<Programs, String>> = OnceLock::new();
        let programs = match PROGRAMS.get_or_init(prepare) {
            Ok(programs) => programs,
            Err(why) => {
                skip(test, why);
                return None;
            }
        };
        let dir = std::env::temp_dir().join(format!("criu-{}-{test}", std::process::id()));
        for dir in [&dir, &dir.join("source"), &dir.join("target"), &dir.join("app")] {
            fs::DirBuilder::new().mode(0o700).create(dir).expect("a directory can be created");
        }
        Some(Self { dir, programs, started: Cell::new(0), netns: None })
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn dir(&self, host: Host) -> PathBuf {
        self.dir.join(match host {
            Host::Source => "source",
            Host::Target => "target",
        })
    }

    fn command(&self, host: Host, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let Some(netns) = &self.netns else { return Command::new(program) };
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", netns[host as usize].0)).arg(program);
        command
    }

    // A file for what something started here prints.
    fn output(&self, name: &str) -> (PathBuf, File) {
        self.started.set(self.started.get() + 1);
        let path = self.dir.join(format!("{}-{name}.log", self.started.get()));
        let file = File::create_new(&path).expect("a log can be created");
        (path, file)
    }

    fn daemon(&self, host: Host, name: &str, port: u16, args: &[&str]) -> Daemon {
        self.daemon_by(self.command(host, OURS), host, name, port, args)
    }

    // The command ends up as ours.
    fn daemon_by(&self, mut command: Command, host: Host, name: &str, port: u16, args: &[&str]) -> Daemon {
        let (log, file) = self.output(name);
        command.args([name, "--port", &port.to_string(), "-v2", "-D"]).arg(self.dir(host)).args(args);
        let (_, printed) = self.output("stdout");
        let process = Process::start(name, command.stderr(file).stdout(printed));
        let mut daemon = Daemon { process, port, log };
        daemon.logs("is ready in");
        daemon
    }

    pub fn cache(&self, args: &[&str]) -> Daemon {
        let mut cache = self.daemon(Host::Target, "cache", 0, args);
        self.take_port(&mut cache);
        cache
    }

    // The port that a cache prints which has just been started.
    fn take_port(&self, cache: &mut Daemon) {
        let printed = self.dir.join(format!("{}-stdout.log", self.started.get()));
        cache.port = wait_for("port that the cache prints", PATIENCE, || {
            let printed = fs::read_to_string(&printed).expect("what the cache prints can be read");
            printed.strip_suffix('\n')?.rsplit_once(':')?.1.parse().ok()
        });
    }

    pub fn cache_at(&self, port: u16, args: &[&str]) -> Daemon {
        self.daemon(Host::Target, "cache", port, args)
    }

    pub fn proxy(&self, port: u16, args: &[&str]) -> Daemon {
        self.daemon(Host::Source, "proxy", port, args)
    }

    /// The process that is to be moved.
    pub fn workload(&self, args: &[&str]) -> Process {
        self.started_workload(self.command(Host::Source, &self.programs.workload), args)
    }

    /// The same as a job of a session, which does not mind being hung up.
    pub fn job(&self, args: &[&str]) -> Process {
        let mut command = self.command(Host::Source, "nohup");
        command.arg(&self.programs.workload);
        self.started_workload(command, &[args, &["--job"]].concat())
    }

    fn started_workload(&self, mut command: Command, args: &[&str]) -> Process {
        let app = self.dir.join("app");
        command.arg(&app).args(args).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process::start("the workload", &mut command);
        wait_for("workload that is ready", PATIENCE, || {
            assert_eq!(process.ended(), None, "the workload can't run here");
            let ready = app.join("ready").exists();
            if args.contains(&"--job") {
                process.job = children(process.child.id()).first().and_then(|pid| Pid::from_raw(*pid as i32));
            }
            ready.then_some(())
        });
        process
    }

    /// Has the workload check everything, wherever it is.
    pub fn ask(&self) -> Answer {
        let text = self.ask_for_text();
        let field = |name: &str| {
            let value = text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            value.and_then(|value| value.parse::<u64>().ok()).unwrap_or_else(|| panic!("it answers {text:?}"))
        };
        assert!(text.starts_with("ok "), "it answers {text:?}");
        Answer { counter: field("counter"), pid: field("pid") as u32, processes: field("procs") as u32 }
    }

    /// The same, whatever it says.
    pub fn ask_for_text(&self) -> String {
        let [ask, answer] = ["ask", "answer"].map(|name| self.dir.join("app").join(name));
        let _ = fs::remove_file(&answer);
        File::create_new(&ask).expect("a question can be put");
        wait_for("answer of the workload", PATIENCE, || fs::read_to_string(&answer).ok())
    }

    /// Has the workload overwrite its memory.
    pub fn scribble(&self) {
        self.wish("scribble", "scribbled");
    }

    /// Has the workload take 64 MiB more.
    pub fn grow(&self) {
        self.wish("grow", "grown");
    }

    fn wish(&self, wish: &str, done: &str) {
        let [wish, done] = [wish, done].map(|name| self.dir.join("app").join(name));
        File::create_new(&wish).expect("a wish can be made");
        wait_for("workload that has done it", PATIENCE, || done.exists().then_some(()));
    }

    /// An action script, which does this at `post-dump`.
    pub fn script(&self, name: &str, at_post_dump: &str) -> PathBuf {
        let path = self.dir.join(name);
        let text =
            format!("#!/bin/sh\ncase $CRTOOLS_SCRIPT_ACTION in post-dump) {at_post_dump} ;; esac\nexit 0\n");
        self.write_script(&path, &text);
        path
    }

    /// An action script that waits at this action until it is opened.
    pub fn gate(&self, action: &str) -> Gate {
        let path = self.dir.join(format!("gate-{action}"));
        let shown = path.display();
        let text = format!(
            "#!/bin/sh\ncase $CRTOOLS_SCRIPT_ACTION in {action})\n: >{shown}.reached\nwhile [ -e {shown}.reached ] && \
             [ ! -e {shown}.open ]; do sleep 0.02; done ;;\nesac\nexit 0\n"
        );
        self.write_script(&path, &text);
        Gate { path }
    }

    /// An action script that is ours, but for this action, which it lets pass.
    pub fn script_without(&self, action: &str) -> PathBuf {
        let path = self.dir.join(format!("without-{action}"));
        let ours = env!("CARGO_BIN_EXE_criu-relay");
        let text = format!("#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = {action} ] && exit 0\nexec {ours}\n");
        self.write_script(&path, &text);
        path
    }

    fn write_script(&self, path: &Path, text: &str) {
        let mut file = fs::OpenOptions::new();
        let mut file =
            file.write(true).create_new(true).mode(0o700).open(path).expect("a script can be made");
        file.write_all(text.as_bytes()).expect("a script can be written");
    }

    /// The records in the directories of both hosts.
    pub fn records(&self) -> Vec<PathBuf> {
        self.files_of("record")
    }

    // The files in both images directories that end so.
    fn files_of(&self, extension: &str) -> Vec<PathBuf> {
        let dirs =
            [Host::Source, Host::Target].map(|host| fs::read_dir(self.dir(host)).expect("it can be read"));
        let paths = dirs.into_iter().flatten().flatten().map(|entry| entry.path());
        paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
    }

    /// Images in the directories of both hosts.
    pub fn images_on_disk(&self) -> usize {
        self.files_of("img").len()
    }

    fn criu_output(&self, command: &mut Command, name: &str) -> Process {
        let (_, out) = self.output(name);
        let err = out.try_clone().expect("a descriptor can be duplicated");
        Process::start(&format!("criu {name}"), command.stdout(out).stderr(err))
    }

    /// `criu dump`
    pub fn dump(&self, workload: &Process) -> Process {
        self.dump_with(workload, &[])
    }

    /// `criu dump` with more arguments.
    pub fn dump_with(&self, workload: &Process, args: &[&str]) -> Process {
        let mut command = self.command(Host::Source, &self.programs.criu);
        command.args(["dump", "--stream", "-v4", "-o", "dump.log", "-t", &workload.pid().to_string(), "-D"]);
        self.criu_output(command.arg(self.dir(Host::Source)).args(args), "dump")
    }

    /// `criu dump` into files, without us.
    pub fn dump_to_files(&self, workload: &Process, dir: &Path) -> Process {
        let mut command = self.command(Host::Source, &self.programs.criu);
        command.args(["dump", "-v4", "-o", "dump.log", "-t", &workload.pid().to_string(), "-D"]).arg(dir);
        self.criu_output(&mut command, "dump")
    }

    fn in_pid_namespace(&self) -> Command {
        let mut command = self.command(Host::Target, "unshare");
        command.args(["-pf", "--mount-proc", "--kill-child"]);
        command
    }

    /// `criu restore`
    pub fn restore(&self) -> Restore {
        self.restore_with(&[])
    }

    /// `criu restore` with more arguments.
    pub fn restore_with(&self, args: &[&str]) -> Restore {
        let mut command = self.in_pid_namespace();
        command.arg(&self.programs.criu).args(["restore", "--stream", "-v4", "-o", "restore.log", "-D"]);
        Restore { process: self.criu_output(command.arg(self.dir(Host::Target)).args(args), "restore") }
    }

    /// `criu restore` below the first process of its namespace, so that what it has restored outlives it.
    pub fn restore_below(&self, args: &[&str]) -> Restore {
        let mut command = self.in_pid_namespace();
        // A child of the first process, too, when CRIU has gone.
        command.args(["sh", "-c", "\"$@\"; while :; do sleep 60; done", "sh"]).arg(&self.programs.criu);
        command.args(["restore", "--stream", "-v4", "-o", "restore.log", "-D"]);
        Restore { process: self.criu_output(command.arg(self.dir(Host::Target)).args(args), "restore") }
    }

    /// `criu restore` as a job of a shell, which ends when everything is restored.
    pub fn restore_job(&self, args: &[&str]) -> Restore {
        let mut command = self.in_pid_namespace();
        let shell = "set -m; \"$@\" & wait; while :; do sleep 60; done";
        command.args(["sh", "-c", "setsid bash -c \"$@\"; exit $?", "sh", shell, "bash"]);
        command.arg(&self.programs.criu).args(["restore", "--stream", "--shell-job", "-d"]);
        command.args(["-v4", "-o", "restore.log", "-D"]);
        Restore { process: self.criu_output(command.arg(self.dir(Host::Target)).args(args), "restore") }
    }

    /// `criu restore` where somebody else has this PID.
    pub fn restore_with_taken(&self, pid: u32, args: &[&str]) -> Restore {
        let script = "echo $(($1 - 1)) >/proc/sys/kernel/ns_last_pid; sleep 60 & [ $! = $1 ] || exit 99
            criu=$2 dir=$3; shift 3
            \"$criu\" restore --stream -v4 -o restore.log -D \"$dir\" \"$@\"; status=$?; kill $!; exit $status";
        let mut command = self.in_pid_namespace();
        command.args(["sh", "-c", script, "sh", &pid.to_string()]).arg(&self.programs.criu);
        Restore { process: self.criu_output(command.arg(self.dir(Host::Target)).args(args), "restore") }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if thread::panicking() {
            let mut logs: Vec<_> = [".", "source", "target"]
                .iter()
                .flat_map(|dir| fs::read_dir(self.dir.join(dir)).into_iter().flatten().flatten())
                .map(|entry| entry.path())
                .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
                .collect();
            logs.sort();
            for path in logs {
                let text = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
                let lines: Vec<_> = text.lines().collect();
                eprintln!("--- {} ({} lines)", path.display(), lines.len());
                lines[lines.len().saturating_sub(30)..].iter().for_each(|line| eprintln!("{line}"));
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Counts the threads of processes, every millisecond, until it is asked for the result.
#[derive(Debug)]
pub struct ThreadWatch {
    // The counter goes on while this is there.
    wanted: Arc<()>,
    counter: JoinHandle<Vec<(u32, usize)>>,
}

impl ThreadWatch {
    pub fn new(processes: &[&Process]) -> Self {
        let pids: Vec<_> = processes.iter().map(|process| process.pid()).collect();
        let wanted = Arc::new(());
        let is_wanted = Arc::downgrade(&wanted);
        let counter = thread::spawn(move || {
            let mut seen = vec![(0, 0); pids.len()];
            while is_wanted.strong_count() > 0 {
                for (pid, (times, most)) in pids.iter().zip(&mut seen) {
                    if let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) {
                        *times += 1;
                        *most = tasks.count().max(*most);
                    }
                }
                thread::sleep(Duration::from_millis(1));
            }
            seen
        });
        Self { wanted, counter }
    }

    /// For each process: how many times it was looked at, and the most threads that it had.
    pub fn seen(self) -> Vec<(u32, usize)> {
        drop(self.wanted);
        self.counter.join().expect("the watcher does not panic")
    }
}
