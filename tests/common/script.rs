//! Scripted sessions: the real action script, with a CRIU that the tests play and a source that only has to live or
//! die. CRIU is this process, since a script's parent has to be who connects to the streamer socket.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::relay::{FakeCache, Held};
use super::{Daemon, Dump, Restore, binary, pattern, wait_until};

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

/// What is to be moved: a shell that has two children.
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
