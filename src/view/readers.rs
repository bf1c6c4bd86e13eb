//! Who reads the images of a view, beside CRIU's own restore: `criu lazy-pages` has them open for as long as it lives.

use std::collections::HashSet;
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::fstat;

use crate::store::body::MEMFD;

/// The processes that have one of these files open, beside ourselves, as far as we may see that; `dir` is where the
/// files have their names, if they have any. It looks at every descriptor of every process: at the end only.
pub fn readers<'a>(files: impl Iterator<Item = BorrowedFd<'a>>, dir: &Path) -> Vec<i32> {
    let wanted: HashSet<_> =
        files.filter_map(|file| fstat(file).ok()).map(|stat| (stat.st_dev, stat.st_ino)).collect();
    let has_one = |pid: &i32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        // Of another file nothing is asked: its file system may not answer.
        let may_be = open
            .map(|entry| entry.path())
            .filter(|path| fs::read_link(path).is_ok_and(|file| file.starts_with(dir) || is_memfd(&file)));
        let mut files = may_be.filter_map(|path| fs::metadata(path).ok());
        files.any(|file| wanted.contains(&(file.dev(), file.ino())))
    };
    let ourselves = std::process::id() as i32;
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != ourselves).filter(has_one).collect()
}

// As the kernel shows one of ours.
fn is_memfd(file: &Path) -> bool {
    file.as_os_str().as_bytes().starts_with(format!("/memfd:{MEMFD} ").as_bytes())
}
