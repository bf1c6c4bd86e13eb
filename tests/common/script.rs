//! Scripted sessions: the real action script, with a CRIU that the tests play and a source that only has to live or
//! die. CRIU is this process, since a script's parent has to be who connects to the streamer socket.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::relay::{FakeCache, Held};
use super::{Daemon, Dump, Restore, binary, connect, pattern, wait_until};

/// The action script at work. CRIU is this test.
pub struct Script(pub Child);

impl Script {
    pub fn command(action: &str, dir: &Path, root: Option<&Source>) -> Command {
        let mut command = Command::new(binary());
        let root = root.map_or(String::new(), |source| source.0.id().to_string());
        command
            .env("CRTOOLS_SCRIPT_ACTION", action)
            .env("CRTOOLS_IMAGE_DIR", dir)
            .env("CRTOOLS_INIT_PID", root);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    pub fn start(action: &str, daemon: &Daemon, root: Option<&Source>) -> Self {
        Self(Self::command(action, &daemon.dir.0, root).spawn().unwrap())
    }

    /// That of a CRIU which is not this process: its parent is a shell.
    pub fn of_another(action: &str, daemon: &Daemon, root: Option<&Source>) -> Self {
        let script = Self::command(action, &daemon.dir.0, root);
        let mut shell = Command::new("sh");
        shell.args(["-c", "\"$0\"; exit $?", binary()]);
        shell.envs(script.get_envs().filter_map(|(name, value)| Some((name, value?))));
        shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Self(shell.spawn().unwrap())
    }

    /// Whether it still waits for its answer.
    pub fn waits(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// The exit status, and what it says; within the usual time.
    pub fn end(mut self) -> (i32, String) {
        wait_until("the script ends", || self.0.try_wait().unwrap().is_some());
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.0.wait().unwrap().code().unwrap(), said)
    }

    pub fn agrees(self) {
        assert_eq!(self.end(), (0, String::new()));
    }

    pub fn refuses(self, why: &str) {
        let (status, said) = self.end();
        assert!(status == 1 && said.contains(why), "{status}: {said}");
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn pre_stream(daemon: &Daemon) -> Script {
    Script::start("pre-stream", daemon, None)
}

/// A restore at the cache has succeeded: its script has said both. What it has made is given back.
pub fn succeeds(cache: &Daemon) -> Source {
    let copy = Source::new();
    for action in ["post-restore", "pre-resume"] {
        Script::start(action, cache, Some(&copy)).agrees();
    }
    copy
}

/// What is to be moved, or its copy: a shell that has two children.
pub struct Source(pub Child, Vec<Pid>);

impl Source {
    pub fn new() -> Self {
        let mut root = Command::new("sh")
            .args(["-c", "sleep 1000 >&- & echo $!; sleep 1000 >&- & echo $!; exec >&-; wait"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut text = String::new();
        root.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let children: Vec<_> = text.lines().map(|pid| Pid::from_raw(pid.parse().unwrap()).unwrap()).collect();
        assert_eq!(children.len(), 2);
        Self(root, children)
    }

    pub fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// Its processes, the root first.
    pub fn pids(&self) -> Vec<Pid> {
        std::iter::once(Pid::from_child(&self.0)).chain(self.1.iter().copied()).collect()
    }

    // What the kernel says of each of them; X: it is not there.
    fn states(&self) -> String {
        let state = |pid: Pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('X')
        };
        self.pids().into_iter().map(state).collect()
    }

    /// Whether all of it is stopped.
    pub fn is_stopped(&self) -> bool {
        self.states() == "TTT"
    }

    /// Whether all of it runs.
    pub fn runs(&self) -> bool {
        self.states().chars().all(|state| matches!(state, 'R' | 'S' | 'D'))
    }

    /// Whether nothing of it lives.
    pub fn is_dead(&self) -> bool {
        self.states().chars().all(|state| matches!(state, 'Z' | 'X'))
    }

    /// Stops one of its children; it stands still when this returns.
    pub fn stop_child(&self) {
        kill_process(self.1[0], Signal::STOP).unwrap();
        wait_until("it stands still", || self.states().chars().nth(1) == Some('T'));
    }

    /// Whether that one is all that is stopped.
    pub fn only_child_is_stopped(&self) -> bool {
        let states = self.states();
        states.chars().nth(1) == Some('T') && states.matches(['R', 'S', 'D']).count() == 2
    }

    pub fn kill_child(&mut self) {
        kill_process(self.1.remove(0), Signal::KILL).unwrap();
    }

    pub fn kill_root(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub fn kill_children(&mut self) {
        for pid in self.1.drain(..) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    pub fn kill(&mut self) {
        self.kill_root();
        self.kill_children();
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.kill_children();
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Everything of a scripted dump but its script.
pub struct Bench {
    pub proxy: Daemon,
    pub source: Source,
    pub dump: Option<Dump>,
}

impl Bench {
    /// Announced, and connected.
    pub fn new(port: u16, args: &[&str]) -> Self {
        let proxy = Daemon::proxy(port, args);
        Self::with(proxy)
    }

    pub fn with(proxy: Daemon) -> Self {
        pre_stream(&proxy).agrees();
        Self::connected(proxy)
    }

    /// Connected, and announced or not.
    pub fn connected(proxy: Daemon) -> Self {
        let dump = Some(Dump::connect(&proxy));
        Self { proxy, source: Source::new(), dump }
    }

    /// All images; the connection stays, as CRIU's does.
    pub fn images(&mut self) {
        let dump = self.dump.as_mut().unwrap();
        dump.write("pages-1.img", &pattern(300_000, 1));
        dump.write("pstree.img", b"the tree");
        dump.write("inventory.img", b"the inventory");
    }

    pub fn post_dump(&self) -> Script {
        Script::start("post-dump", &self.proxy, Some(&self.source))
    }

    /// CRIU is held, and the cache was told that this is all.
    pub fn held(&mut self, held: &mut Held) -> Script {
        self.images();
        let script = self.post_dump();
        assert!(held.begin().scripted);
        held.finished();
        assert_eq!(held.images.len(), 3);
        script
    }

    /// CRIU ends.
    pub fn disconnect(&mut self) {
        self.dump = None;
    }
}

/// Both daemons, and a restore that waits.
pub fn pair(cache_args: &[&str], proxy_args: &[&str]) -> (Daemon, Bench, Restore) {
    let cache = Daemon::cache(cache_args);
    let bench = Bench::new(cache.port, proxy_args);
    pre_stream(&cache).agrees();
    let mut restore = Restore::connect(&cache);
    restore.ask("inventory.img");
    (cache, bench, restore)
}

pub fn played(args: &[&str]) -> (FakeCache, Held, Bench) {
    let cache = FakeCache::new();
    let mut proxy = Daemon::proxy(cache.port, args);
    let held = cache.accept();
    proxy.wait_log("relay protocol");
    let bench = Bench::with(proxy);
    (cache, held, bench)
}

/// Whether the restore has been answered, or its connection closed.
pub fn is_left_waiting(restore: &Restore) -> bool {
    use rustix::net::{RecvFlags, recv};
    let seen = recv(&restore.0, &mut [0; 1], RecvFlags::DONTWAIT | RecvFlags::PEEK);
    matches!(seen, Err(rustix::io::Errno::AGAIN))
}

/// CRIU as a process of its own, so that it can die: it does what it is told, a line each, and answers each with a
/// line. The test file that starts it has a test `fake_criu` that calls [`fake_criu`].
pub struct FakeCriu {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl FakeCriu {
    /// At this daemon, with this tree.
    pub fn start(daemon: &Daemon, tree: &Source) -> Self {
        Self::start_in(&daemon.dir.0, tree)
    }

    /// With this images directory.
    pub fn start_in(dir: &Path, tree: &Source) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "fake_criu", "--nocapture"]).env("FAKE_CRIU", dir);
        command.env("CRTOOLS_INIT_PID", tree.0.id().to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, input, output: BufReader::new(output) }
    }

    /// `criu restore`, which has announced itself and waits.
    pub fn restore(cache: &Daemon, copy: &Source) -> Self {
        let mut criu = Self::start(cache, copy);
        criu.does("pre-stream");
        criu.does("restore");
        criu
    }

    /// `criu dump`, which is held when all images are there. The cache may be anything.
    pub fn dump(proxy: &Daemon, source: &Source) -> Self {
        let mut criu = Self::start(proxy, source);
        criu.does("pre-stream");
        criu.does("dump");
        criu.tell("post-dump");
        criu
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// The answer to a line.
    pub fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "it has ended");
            // The test harness has its say, too; perhaps on the same line.
            if let Some((_, said)) = line.split_once("CRIU: ") {
                return said.trim_end().into();
            }
        }
    }

    pub fn does(&mut self, line: &str) {
        self.tell(line);
        assert_eq!(self.hear(), "0", "{line}");
    }

    /// What it was told fails for this reason.
    pub fn hears(&mut self, why: &str) {
        let said = self.hear();
        assert!(said.starts_with("1 ") && said.contains(why), "{said}");
    }

    /// Makes its copy of everything, up to where that would run.
    pub fn restores(&mut self) {
        self.does("take");
        self.does("post-restore");
    }

    pub fn kill(mut self) {
        self.kill_now();
    }

    pub fn kill_now(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for FakeCriu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// That process, if this is it.
pub fn fake_criu() {
    let Some(dir) = std::env::var_os("FAKE_CRIU") else { return };
    let dir = Path::new(&dir);
    let (mut dump, mut restore) = (None, None);
    for line in std::io::stdin().lines() {
        let said = match &line.unwrap()[..] {
            "dump" => {
                let mut connected = Dump(connect(&dir.join("streamer-capture.sock")));
                connected.write("pages-1.img", &pattern(300_000, 1));
                connected.write("pstree.img", b"the tree");
                connected.write("inventory.img", b"the inventory");
                dump = Some(connected);
                "0".into()
            }
            "restore" => {
                let mut connected = Restore(connect(&dir.join("streamer-serve.sock")));
                connected.ask("inventory.img");
                restore = Some(connected);
                "0".into()
            }
            "take" => {
                let restore: &mut Restore = restore.as_mut().unwrap();
                let mut inventory = Vec::new();
                match restore.answer() {
                    Some(true) => drop(restore.pipe().read_to_end(&mut inventory).unwrap()),
                    other => panic!("no inventory but {other:?}"),
                }
                assert_eq!(inventory, b"the inventory");
                assert!(restore.read("pages-1.img") == Some(pattern(300_000, 1)));
                "0".into()
            }
            "read" => {
                let read = |name| std::fs::read(dir.join(name)).unwrap();
                assert_eq!(read("inventory.img"), b"the inventory");
                assert!(read("pages-1.img") == pattern(300_000, 1));
                "0".into()
            }
            "close" => {
                (dump, restore) = (None, None);
                "0".into()
            }
            action => {
                let mut script = Script::command(action, dir, None);
                script.env("CRTOOLS_INIT_PID", std::env::var_os("CRTOOLS_INIT_PID").unwrap());
                let done = script.output().unwrap();
                format!("{} {}", done.status.code().unwrap(), String::from_utf8(done.stderr).unwrap())
            }
        };
        println!("CRIU: {}", said.trim_end_matches('\n').replace('\n', "; "));
    }
    // Its connections are there to the end.
    drop((dump, restore));
}
