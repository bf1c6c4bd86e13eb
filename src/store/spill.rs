//! The spill file: where bodies grow when the memory is used up. It has no name, and goes with the process.
//!
//! All bodies share it. It is cut into chunks, each of which belongs to one body; a chunk that is given back is
//! punched out, so that only what is written takes space on the disk.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, fallocate, fstatfs, openat};
use rustix::io::{Errno, pwrite};

use crate::net;
use crate::sockets;

/// The size of a chunk, in bytes: what one connection moves in a turn.
pub const CHUNK: u64 = 1 << 20;

/// The file system that is memory itself.
pub const TMPFS: u64 = 0x0102_1994;

/// The file.
#[derive(Debug)]
pub struct SpillFile {
    file: OwnedFd,
    dir: PathBuf,
    // Chunks given back, and how many there have ever been.
    free: Vec<u32>,
    chunks: u32,
}

impl SpillFile {
    /// Makes it in this directory, which has to be ours. The error is a sentence.
    pub fn open(dir: &Path) -> Result<Self, String> {
        sockets::check_dir(dir)?;
        let wrong = |what: &str, error: io::Error| {
            format!("the spill directory {}: {what}: {error} (--spill-dir)", dir.display())
        };
        let file = nameless(dir).map_err(|error| wrong("no file can be made there", error))?;
        // A chunk is used again only when it has been punched out: what was there may be on its way to a reader.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        pwrite(&file, &[1], 0)
            .and_then(|_| fallocate(&file, hole, 0, CHUNK))
            .map_err(|error| wrong("its file system can't free parts of a file", error.into()))?;
        if fstatfs(&file).is_ok_and(|system| system.f_type as u64 == TMPFS) {
            log::warn!("the spill directory {} is in memory itself: nothing is gained", dir.display());
        }
        Ok(Self { file, dir: dir.to_path_buf(), free: Vec::new(), chunks: 0 })
    }

    /// The file itself.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A chunk with nothing in it.
    pub fn take(&mut self) -> io::Result<u32> {
        if let Some(chunk) = self.free.pop() {
            return Ok(chunk);
        }
        let next = self.chunks.checked_add(1).ok_or(Errno::FBIG)?;
        Ok(std::mem::replace(&mut self.chunks, next))
    }

    /// Gives a chunk back.
    pub fn give(&mut self, chunk: u32) {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, hole, start(chunk), CHUNK) {
            Ok(()) => self.free.push(chunk),
            Err(error) => {
                log::warn!("freeing a part of the spill file in {} failed: {error}", self.dir.display())
            }
        }
    }
}

/// Where a chunk begins.
pub fn start(chunk: u32) -> u64 {
    u64::from(chunk) * CHUNK
}

// A file without a name.
fn nameless(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match openat(CWD, dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(fd),
        // Not every file system can do that.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {
            unlinked(dir).map(OwnedFd::from)
        }
        Err(error) => Err(error.into()),
    }
}

fn unlinked(dir: &Path) -> io::Result<File> {
    let name: String = net::random_id()?.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = dir.join(format!(".criu-relay-{name}"));
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fstat;
    use std::os::unix::fs::DirBuilderExt;

    #[test]
    fn chunks_are_used_again_and_leave_nothing_on_the_disk() {
        let dir = std::env::temp_dir().join(format!("crt-spill-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
        let mut spill = SpillFile::open(&dir).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "it has no name");
        assert_eq!(fstat(spill.fd()).unwrap().st_mode & 0o7777, 0o600);
        let chunks: Vec<_> = (0..3).map(|_| spill.take().unwrap()).collect();
        assert_eq!(chunks, [0, 1, 2]);
        pwrite(spill.fd(), &[7; 10_000], start(1)).unwrap();
        spill.give(1);
        assert_eq!(fstat(spill.fd()).unwrap().st_blocks, 0);
        assert_eq!((spill.take().unwrap(), spill.take().unwrap()), (1, 3));
        // Without O_TMPFILE.
        let file = unlinked(&dir).unwrap();
        assert_eq!((file.metadata().unwrap().len(), fs::read_dir(&dir).unwrap().count()), (0, 0));
        fs::remove_dir(&dir).unwrap();
    }

    #[test]
    fn a_directory_that_will_not_do_is_refused() {
        let missing = SpillFile::open(Path::new("/does/not/exist")).unwrap_err();
        assert!(missing.contains("/does/not/exist"), "{missing}");
        let foreign = SpillFile::open(Path::new("/proc/self")).unwrap_err();
        assert!(foreign.contains("no file can be made there"), "{foreign}");
        assert!(SpillFile::open(Path::new("/dev/null")).unwrap_err().contains("not a directory"));
    }
}
