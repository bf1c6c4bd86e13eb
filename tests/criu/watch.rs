//! What appears in a view, and when.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

/// What appears in directories, in its order.
#[derive(Debug)]
pub struct Watch {
    inotify: OwnedFd,
    dirs: Vec<(i32, PathBuf)>,
}

impl Watch {
    /// From now on.
    pub fn new(dirs: &[PathBuf]) -> Self {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        let add = |dir: &PathBuf| {
            let watch = inotify::add_watch(&inotify, dir, WatchFlags::CREATE | WatchFlags::MOVED_TO).unwrap();
            (watch, dir.clone())
        };
        let dirs = dirs.iter().map(add).collect();
        Self { inotify, dirs }
    }

    /// All there was so far.
    pub fn seen(&self) -> Vec<PathBuf> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        let mut seen = Vec::new();
        while let Ok(event) = reader.next() {
            // None: the directory is gone.
            let Some(name) = event.file_name() else { continue };
            let (_, dir) = self.dirs.iter().find(|(watch, _)| *watch == event.wd()).unwrap();
            seen.push(dir.join(name.to_str().unwrap()));
        }
        seen
    }
}
