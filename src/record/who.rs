//! Who a process id in a record is: the number alone may be somebody else's by now.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::net;

/// A process: its number, and when it was started, which no later process of the same number shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its process id, as seen from the PID namespace of [`Place`].
    pub pid: i32,
    /// Its start in clock ticks since boot: field 22 of /proc/PID/stat.
    pub start: u64,
}

/// What has become of an [`Identity`].
#[derive(Debug)]
pub enum Found {
    /// It lives (some of its threads, at least); the pidfd is of no other process.
    Alive(OwnedFd),
    /// Nothing of it lives, and nobody has its number.
    Dead,
    /// It is dead, and its number belongs to another process, or to a thread of one.
    Another,
}

impl Identity {
    /// Of a process that is known to exist.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, start: stat(pid)?.start })
    }

    /// Of the process that a pidfd is of.
    pub fn of_pidfd(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let gone = || io::Error::from(Errno::SRCH);
        let pid = net::pidfd_pid(fd).ok_or_else(gone)?;
        let identity = Self::of(pid)?;
        // Had it been waited for meanwhile, the number could have been somebody else's.
        if net::pidfd_pid(fd) == Some(pid) { Ok(identity) } else { Err(gone()) }
    }

    /// Of this process.
    pub fn of_myself() -> io::Result<Self> {
        Self::of(rustix::process::getpid().as_raw_pid())
    }

    /// Looks for it. The pidfd is opened first: what is read of /proc behind it is of the same process, as long
    /// as that has not been waited for in the end.
    pub fn open(&self) -> io::Result<Found> {
        let Some(pid) = Pid::from_raw(self.pid.max(0)) else { return Ok(Found::Dead) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(Errno::SRCH) => return Ok(Found::Dead),
            // No process has it as its own: it is the id of a thread, or what is left of a group or session.
            Err(Errno::INVAL | Errno::NOENT) => {
                return Ok(if stat(self.pid).is_ok() { Found::Another } else { Found::Dead });
            }
            Err(error) => return Err(error.into()),
        };
        match Self::of_pidfd(fd.as_fd()) {
            Ok(found) if found != *self => Ok(Found::Another),
            Ok(_) if net::is_readable(fd.as_fd()) => Ok(Found::Dead),
            Ok(_) => Ok(Found::Alive(fd)),
            Err(error) if net::is_readable(fd.as_fd()) => {
                log::trace!("process {pid} has just gone: {error}");
                Ok(Found::Dead)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether it is stopped, as far as can be seen; that of a process which has gone is false.
    pub fn is_stopped(&self) -> bool {
        stat(self.pid).is_ok_and(|stat| stat.start == self.start && matches!(stat.state, b'T' | b't'))
    }
}

/// Where process ids mean something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// /proc/sys/kernel/random/boot_id.
    pub boot: String,
    /// The inode of /proc/self/ns/pid.
    pub pid_namespace: u64,
    /// The inode of /proc/self/ns/time, in which processes start at other times; 0: the kernel has none.
    pub time_namespace: u64,
}

/// How another [`Place`] looks from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distance {
    /// It is this one.
    Here,
    /// It was this one before the host was started anew: whoever was in it is dead.
    Rebooted,
    /// Its numbers mean nothing here.
    Elsewhere,
}

impl Place {
    /// That of this process.
    pub fn here() -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_string();
        let pid_namespace = fs::metadata("/proc/self/ns/pid")?.ino();
        let time_namespace = match fs::metadata("/proc/self/ns/time") {
            Ok(meta) => meta.ino(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        Ok(Self { boot, pid_namespace, time_namespace })
    }

    /// How `there` looks from here. Another boot in another namespace is not a reboot for sure: a container may
    /// have a boot id of its own.
    pub fn distance(&self, there: &Self) -> Distance {
        if self.pid_namespace != there.pid_namespace {
            Distance::Elsewhere
        } else if self.boot != there.boot {
            Distance::Rebooted
        } else if self.time_namespace != there.time_namespace {
            Distance::Elsewhere
        } else {
            Distance::Here
        }
    }
}

struct Stat {
    state: u8,
    start: u64,
}

fn stat(pid: i32) -> io::Result<Stat> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat makes no sense")))
}

// The name of the command stands in parentheses and may hold anything, parentheses too: it ends at the last.
fn parse_stat(text: &[u8]) -> Option<Stat> {
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let mut fields = text[end + 1..].split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
    let state = *fields.next()?.first()?;
    // Field 22; the state was field 3.
    let start = std::str::from_utf8(fields.nth(18)?).ok()?.parse().ok()?;
    Some(Stat { state, start })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, pidfd_send_signal};
    use std::process::{Child, Command};

    fn child() -> (Child, Identity) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let identity = Identity::of(child.id() as i32).unwrap();
        (child, identity)
    }

    #[test]
    fn a_child_lives_stops_and_dies() {
        let (mut child, identity) = child();
        let Found::Alive(fd) = identity.open().unwrap() else { panic!("it lives") };
        assert_eq!(Identity::of_pidfd(fd.as_fd()).unwrap(), identity);
        assert!(!identity.is_stopped());
        pidfd_send_signal(&fd, Signal::STOP).unwrap();
        while !identity.is_stopped() {
            std::thread::yield_now();
        }
        let other = Identity { start: identity.start + 1, ..identity };
        assert!(matches!(other.open().unwrap(), Found::Another) && !other.is_stopped());
        child.kill().unwrap();
        while !net::is_readable(fd.as_fd()) {
            std::thread::yield_now();
        }
        // Dead, whether its parent has waited for it or not.
        assert!(matches!(identity.open().unwrap(), Found::Dead));
        child.wait().unwrap();
        assert!(matches!(identity.open().unwrap(), Found::Dead) && !identity.is_stopped());
        assert!(Identity::of_pidfd(fd.as_fd()).is_err() && Identity::of(identity.pid).is_err());
    }

    #[test]
    fn numbers_that_are_no_process() {
        for pid in [0, -1, i32::MIN] {
            assert!(matches!(Identity { pid, start: 1 }.open().unwrap(), Found::Dead));
        }
        // A thread has a number too.
        let (tell, told) = std::sync::mpsc::channel();
        let (keep, kept) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // PID/task/TID
            let link = fs::read_link("/proc/thread-self").unwrap();
            tell.send(link.file_name().unwrap().to_str().unwrap().parse().unwrap()).unwrap();
            let _ = kept.recv();
        });
        let pid: i32 = told.recv().unwrap();
        let identity = Identity::of(pid).unwrap();
        assert!(matches!(identity.open().unwrap(), Found::Another));
        drop(keep);
        thread.join().unwrap();
    }

    #[test]
    fn names_with_parentheses() {
        let fields: String = (4..=52).map(|field| format!(" {field}")).collect();
        for name in ["sh", "a b", ") S 1 (", "x) R 1 2 3", "\n)", ""] {
            let stat = parse_stat(format!("7 ({name}) T{fields}\n").as_bytes()).unwrap();
            assert_eq!((stat.state, stat.start), (b'T', 22), "{name}");
        }
        for text in
            ["", "7 sh S 1", "7 (sh)", "7 (sh) S 1 2", "7 (sh) S x x x x x x x x x x x x x x x x x x x"]
        {
            assert!(parse_stat(text.as_bytes()).is_none(), "{text}");
        }
        assert!(parse_stat(format!("7 (\u{7f}\u{80}) S{fields}").as_bytes()).is_some());
    }

    #[test]
    fn places() {
        let here = Place::here().unwrap();
        assert_eq!(here.distance(&here), Distance::Here);
        let rebooted = Place { boot: "x".into(), time_namespace: 1, ..here.clone() };
        assert_eq!(here.distance(&rebooted), Distance::Rebooted);
        let elsewhere = Place { pid_namespace: 1, ..here.clone() };
        assert_eq!(here.distance(&elsewhere), Distance::Elsewhere);
        assert_eq!(here.distance(&Place { pid_namespace: 1, ..rebooted }), Distance::Elsewhere);
        assert_eq!(here.distance(&Place { time_namespace: 1, ..here.clone() }), Distance::Elsewhere);
    }
}
