//! The directory of a view, as whoever restores from it sees it; and whoever waits for that.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;

use super::{Daemon, Dir, binary, wait_until};

/// Where a view is to be. It is not there yet.
pub struct Place {
    around: Dir,
    pub dir: PathBuf,
}

impl Place {
    pub fn new() -> Self {
        Self::below(Dir::new())
    }

    /// On a tmpfs; None: this machine has none where it usually is.
    pub fn in_memory() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let shm = Path::new("/dev/shm");
        let is_tmpfs = rustix::fs::statfs(shm).is_ok_and(|system| system.f_type as u64 == 0x0102_1994);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = shm.join(format!("crt-view-{}-{count}", std::process::id()));
        let made = is_tmpfs && fs::DirBuilder::new().mode(0o700).create(&path).is_ok();
        made.then(|| Self::below(Dir(path)))
    }

    pub fn below(around: Dir) -> Self {
        let dir = fs::canonicalize(&around.0).unwrap().join("view");
        Self { around, dir }
    }

    pub fn arg(&self) -> &str {
        self.dir.to_str().unwrap()
    }

    /// What is there beside the socket, in order.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != "relay-cache.sock").collect();
        names.sort();
        // What says that the images are a scripted dump's has to go with them.
        if names.iter().any(|name| name.ends_with(".img")) {
            names.retain(|name| name != ".criu-relay.scripted");
        }
        names
    }

    pub fn has(&self, name: &str) -> bool {
        fs::symlink_metadata(self.dir.join(name)).is_ok()
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.dir.join(name)).unwrap()
    }

    /// Waits until this one is there.
    pub fn appears(&self, name: &str) {
        wait_until("it appears", || self.has(name));
    }

    /// `criu-relay wait`, of which the cache knows.
    pub fn wait(&self, cache: &mut Daemon) -> Waiter {
        let before = cache.log().matches("the action script: wait").count();
        let mut command = Command::new(binary());
        command.arg("wait").arg("-D").arg(&self.dir);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let waiter = Waiter(command.spawn().unwrap());
        cache.wait_log_times("the action script: wait", before + 1);
        waiter
    }
}

/// See [`Place::wait`].
pub struct Waiter(Child);

impl Waiter {
    pub fn waits(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// Its exit status, and what it says.
    pub fn end(mut self) -> (i32, String) {
        wait_until("the waiting ends", || !self.waits());
        let output = self.0.wait_with_output().unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.code().unwrap(), said)
    }

    /// There is a dump, here.
    pub fn finds(self, dir: &Path) {
        assert_eq!(self.end(), (0, format!("{}\n", dir.display())));
    }

    pub fn fails(self, why: &str) {
        let (status, said) = self.end();
        assert!(status == 1 && said.contains(why), "{status}: {said}");
    }

    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Whatever appears in a directory, in its order.
pub struct Watch(OwnedFd);

impl Watch {
    pub fn new(dir: &Path) -> Self {
        let fd = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        add_watch(&fd, dir, WatchFlags::CREATE | WatchFlags::MOVED_TO).unwrap();
        Self(fd)
    }

    /// The names that were given up to now, but those under which things are made.
    pub fn seen(&self) -> Vec<String> {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.0, &mut space);
        let mut names = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => {
                    assert!(!event.events().contains(ReadFlags::QUEUE_OVERFLOW));
                    // The directory itself has gone.
                    let Some(name) = event.file_name() else { continue };
                    let name = name.to_str().unwrap().to_string();
                    if name != ".criu-relay.new" {
                        // Nobody sees half of one.
                        assert!(event.events().contains(ReadFlags::MOVED_TO), "{name}");
                        names.push(name);
                    }
                }
                Err(Errno::AGAIN) => return names,
                Err(Errno::INTR) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}
