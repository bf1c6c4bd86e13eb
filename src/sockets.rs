//! The places where things are found: UNIX sockets in CRIU's directories, the TCP port, inherited
//! descriptors.
//!
//! Each UNIX socket is bound once, in the first directory; in every further one it is a symbolic link to
//! that, which connect(2) follows. So connections to all of them are accepted in the order in which they
//! were made, and old CRIU, which appends to an image in one directory and finishes in another, can't
//! overtake itself.
//!
//! [`Sockets`] owns the files and removes them when dropped; the listening descriptors go to the role.

use std::fs;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, fcntl_getfl, fcntl_setfl, flock, fstat, open};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketType, bind, connect, getpeername, listen, socket_with, sockopt,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::net;

/// The longest path that fits a sockaddr_un; CRIU cuts off a longer one without a word.
pub const MAX_PATH: usize = 107;

/// Connections that may wait to be accepted; the kernel takes net.core.somaxconn if that is less.
const BACKLOG: i32 = 4096;

/// The socket files of this process.
#[derive(Debug, Default)]
pub struct Sockets {
    made: Vec<(PathBuf, u64)>,
}

impl Sockets {
    /// Makes the socket `name` in the first of `dirs`, links to it in the others, and listens. What a
    /// daemon that is gone has left is replaced; what a live one has is an error.
    pub fn place(&mut self, dirs: &[PathBuf], name: &str) -> Result<OwnedFd, String> {
        let mut places = dirs.iter();
        let Some(first) = places.next() else { return Err(format!("no directory for {name}")) };
        let path = first.join(name);
        let _lock = free_place(first, &path)?;
        let fd = bind_unix(&path).map_err(|error| format!("{} can't be made: {error}", path.display()))?;
        self.remember(&path)?;
        let target = fs::canonicalize(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        for dir in places {
            let link = dir.join(name);
            check_dir(dir)?;
            if fs::canonicalize(&link).is_ok_and(|other| other == target) {
                // The same directory by another name; or a link that an earlier daemon left here.
                if fs::symlink_metadata(&link).is_ok_and(|meta| meta.is_symlink()) {
                    self.remember(&link)?;
                }
                continue;
            }
            let _lock = free_place(dir, &link)?;
            symlink(&target, &link).map_err(|error| format!("{} can't be made: {error}", link.display()))?;
            self.remember(&link)?;
        }
        Ok(fd)
    }

    fn remember(&mut self, path: &Path) -> Result<(), String> {
        let meta = fs::symlink_metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
        self.made.push((path.to_path_buf(), meta.ino()));
        Ok(())
    }
}

impl Sockets {
    /// Removes the files. While the sockets still listen: once they do not, another daemon may have put its
    /// own there.
    pub fn remove(&mut self) {
        for (path, inode) in &std::mem::take(&mut self.made) {
            // Only what is still ours.
            if fs::symlink_metadata(path).is_ok_and(|meta| meta.ino() == *inode)
                && let Err(error) = fs::remove_file(path)
            {
                log::warn!("{} can't be removed: {error}", path.display());
            }
        }
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Checks that nobody else can put something into a directory of ours.
pub fn check_dir(dir: &Path) -> Result<(), String> {
    let meta = fs::metadata(dir).map_err(|error| format!("the directory {}: {error}", dir.display()))?;
    let ours = rustix::process::geteuid().as_raw();
    if !meta.is_dir() {
        return Err(format!("{} is not a directory", dir.display()));
    }
    if meta.uid() != 0 && meta.uid() != ours {
        return Err(format!(
            "the directory {} belongs to user {}: it has to belong to root or to user {ours}",
            dir.display(),
            meta.uid()
        ));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(format!(
            "the directory {} is writable by others (mode {:04o}): chmod go-w it, or choose another",
            dir.display(),
            meta.mode() & 0o7777
        ));
    }
    Ok(())
}

/// Keeps every other criu-relay from changing what is in a directory, until it is dropped. It waits for whoever
/// has it: at start-up only.
pub fn lock_dir(dir: &Path) -> Result<OwnedFd, String> {
    let wrong = |error: Errno| format!("the directory {} can't be locked: {error}", dir.display());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let lock = open(dir, flags, Mode::empty()).map_err(wrong)?;
    loop {
        match flock(&lock, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            locked => return locked.map(|()| lock).map_err(wrong),
        }
    }
}

// Makes sure that `path` can be created in `dir`, and locks the directory until it has been.
fn free_place(dir: &Path, path: &Path) -> Result<OwnedFd, String> {
    check_dir(dir)?;
    if path.as_os_str().len() > MAX_PATH {
        return Err(format!(
            "the path {} is longer than {MAX_PATH} bytes, where CRIU cuts it off: choose a shorter -D",
            path.display()
        ));
    }
    let lock = lock_dir(dir)?;
    let kind = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(lock),
        Err(error) => return Err(format!("{}: {error}", path.display())),
        // A link may point to nothing, but not to something else.
        Ok(meta) if meta.is_symlink() => fs::metadata(path).ok().map(|target| target.file_type()),
        Ok(meta) => Some(meta.file_type()),
    };
    if kind.is_some_and(|kind| !kind.is_socket()) {
        return Err(format!("{} is there already and is no socket", path.display()));
    }
    let answer = SocketAddrUnix::new(path).and_then(|address| {
        let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, net::SOCKET, None)?;
        connect(&probe, &address)
    });
    match answer {
        Err(Errno::CONNREFUSED | Errno::NOENT) => {}
        // EAGAIN: somebody listens and is busy.
        Ok(()) | Err(Errno::AGAIN) => {
            return Err(format!("{} belongs to a daemon that is running", path.display()));
        }
        Err(error) => return Err(format!("{} is there already: {error}", path.display())),
    }
    fs::remove_file(path).map_err(|error| format!("{} can't be replaced: {error}", path.display()))?;
    log::debug!("{}: left by a daemon that is gone, replaced", path.display());
    Ok(lock)
}

fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, net::SOCKET, None)?;
    bind(&fd, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listen(&fd, BACKLOG)?;
    Ok(fd)
}

/// All addresses that a name has. It may block: at start-up only.
pub fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    // An IPv6 address may be written as in a URL.
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    match (bare, port).to_socket_addrs().map(Vec::from_iter) {
        Ok(addresses) if !addresses.is_empty() => Ok(addresses),
        Ok(_) => Err(format!("the name {host} has no address")),
        Err(error) => Err(format!("the name {host} can't be resolved: {error}")),
    }
}

/// Listens for the peer at the first of `addresses` that can be had.
pub fn listen_tcp(addresses: &[SocketAddr]) -> Result<(OwnedFd, SocketAddr), String> {
    let mut why = String::from("there is no address to listen at");
    for address in addresses {
        match bind_tcp(*address) {
            Ok(bound) => return Ok(bound),
            Err(error) => why = format!("can't listen at {address}: {error}"),
        }
    }
    Err(why)
}

fn bind_tcp(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let fd = net::tcp_socket(address)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    bind(&fd, &address)?;
    listen(&fd, BACKLOG)?;
    let bound = rustix::net::getsockname(&fd)?.try_into()?;
    Ok((fd, bound))
}

/// Takes over descriptor number `fd`, which whoever started us has opened for us: a close-on-exec copy of
/// it; the number itself is closed. Before anything else is opened, so that the number can't be ours.
pub fn adopt(fd: i32) -> Result<OwnedFd, String> {
    let wrong = |error: Errno| format!("descriptor {fd} can't be taken over: {error}");
    let myself = pidfd_open(getpid(), PidfdFlags::empty()).map_err(wrong)?;
    let copy = pidfd_getfd(&myself, fd, PidfdGetfdFlags::empty()).map_err(wrong)?;
    // Standard descriptors stay open, or the next file opened would get their number.
    if fd > 2 {
        let _ = nix::unistd::close(fd);
    }
    Ok(copy)
}

/// [`adopt`] for an established connection.
pub fn adopt_connection(number: i32) -> Result<OwnedFd, String> {
    let wrong = |what: &str| format!("descriptor {number}, given with --ps-socket, {what}");
    let fd = adopt(number)?;
    let kind = fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    if kind != Ok(FileType::Socket) {
        return Err(wrong("is no socket"));
    }
    if sockopt::socket_type(&fd) != Ok(SocketType::STREAM) || !matches!(getpeername(&fd), Ok(Some(_))) {
        return Err(wrong("is not connected"));
    }
    let flags = fcntl_getfl(&fd).map_err(|error| wrong(&error.to_string()))?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|error| wrong(&error.to_string()))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("criu-relay-{}-{name}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn one_socket_in_all_directories() {
        let (a, b) = (Dir::new("all-a"), Dir::new("all-b"));
        let mut sockets = Sockets::default();
        let dirs = [a.0.clone(), b.0.clone(), a.0.join(".")];
        let _fd = sockets.place(&dirs, "x.sock").unwrap();
        let mode = fs::metadata(a.0.join("x.sock")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(a.0.join("x.sock")).unwrap();
        UnixStream::connect(b.0.join("x.sock")).unwrap();
        // A live daemon's sockets are not replaced, whichever way they are found.
        for dir in [&a.0, &b.0] {
            let error = Sockets::default().place(std::slice::from_ref(dir), "x.sock").unwrap_err();
            assert!(error.contains("running"), "{error}");
        }
        // A link that was left, and leads to the socket that has taken its old target's place, goes too.
        std::mem::forget(sockets);
        fs::remove_file(a.0.join("x.sock")).unwrap();
        let mut sockets = Sockets::default();
        let _fd = sockets.place(&dirs, "x.sock").unwrap();
        drop(sockets);
        assert!(fs::symlink_metadata(b.0.join("x.sock")).is_err());
        assert!(fs::symlink_metadata(a.0.join("x.sock")).is_err());
    }

    #[test]
    fn what_a_dead_daemon_left_is_replaced() {
        let (a, b) = (Dir::new("stale-a"), Dir::new("stale-b"));
        drop(UnixListener::bind(a.0.join("x.sock")).unwrap());
        symlink(a.0.join("gone.sock"), b.0.join("x.sock")).unwrap();
        let mut sockets = Sockets::default();
        let _fd = sockets.place(&[a.0.clone(), b.0.clone()], "x.sock").unwrap();
        UnixStream::connect(b.0.join("x.sock")).unwrap();
    }

    #[test]
    fn places_that_are_refused() {
        let dir = Dir::new("refused");
        fs::write(dir.0.join("x.sock"), "a file").unwrap();
        let refused = |dir: &Path, why: &str| {
            let error = Sockets::default().place(&[dir.to_path_buf()], "x.sock").unwrap_err();
            assert!(error.contains(why), "{error}");
        };
        refused(&dir.0, "no socket");
        let linked = dir.0.join("linked");
        fs::create_dir(&linked).unwrap();
        fs::set_permissions(&linked, fs::Permissions::from_mode(0o700)).unwrap();
        symlink(dir.0.join("x.sock"), linked.join("x.sock")).unwrap();
        refused(&linked, "no socket");
        refused(&dir.0.join("missing"), "No such file");
        refused(&dir.0.join("x.sock"), "not a directory");
        let long = dir.0.join("d".repeat(MAX_PATH));
        fs::create_dir(&long).unwrap();
        fs::set_permissions(&long, fs::Permissions::from_mode(0o700)).unwrap();
        refused(&long, "longer than 107 bytes");
        fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o777)).unwrap();
        refused(&dir.0, "writable by others");
    }
}
