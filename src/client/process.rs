//! A process that is watched, by its pidfd: CRIU, or a task of what it dumps or restores.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use mio::Interest;
use rustix::process::{Signal, pidfd_send_signal};

use crate::net;
use crate::reactor::Pollable;

/// Whether a process dies as soon as it may.
pub fn is_killed(pid: i32) -> bool {
    Status::of(pid).is_some_and(|status| status.pending(Signal::KILL))
}

/// Whether a process is stopped, or will be before it runs on.
pub fn is_stopping(pid: i32) -> bool {
    Status::of(pid).is_some_and(|status| status.stopped || status.pending(Signal::STOP))
}

/// A watched process. It is readable when it is dead, with all its threads.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Takes over a pidfd.
    pub fn new(pidfd: OwnedFd) -> Self {
        Self(pidfd)
    }

    /// Its process id as seen from here; None: it has been waited for, or is not visible.
    pub fn pid(&self) -> Option<i32> {
        net::pidfd_pid(self.0.as_fd())
    }

    /// Whether all of it is dead.
    pub fn is_dead(&self) -> bool {
        net::is_readable(self.0.as_fd())
    }

    /// Sends it a signal; one that is dead already needs none.
    pub fn send(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.0, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a SIGKILL is on its way: it dies as soon as it may.
    pub fn is_killed(&self) -> bool {
        self.pid().is_some_and(is_killed)
    }

    /// Whether a SIGSTOP is on its way, or it is stopped already.
    pub fn is_stopping(&self) -> bool {
        self.pid().is_some_and(is_stopping)
    }

    /// Whether somebody traces it; false too if it is dead.
    pub fn is_traced(&self) -> bool {
        self.status().is_some_and(|status| status.traced)
    }

    /// Whether it blocks every signal, as CRIU's code in it does until it hands over to the program's.
    pub fn is_masked(&self) -> bool {
        self.status().is_some_and(|status| status.masked)
    }

    /// Whether it is neither traced nor blocks every signal: no CRIU restores it. What the kernel says of the two is
    /// not of the same moment, and a tracer may have come in between: it has to be so twice.
    pub fn is_free(&self) -> bool {
        let free = || self.status().is_some_and(|status| !status.traced && !status.masked);
        free() && free()
    }

    /// Whether each of its threads is stopped, by a signal and not by a tracer.
    pub fn is_stopped(&self) -> bool {
        let Some(pid) = self.pid() else { return false };
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
        let mut all = threads.map(|thread| Status::read(&thread.ok()?.path()));
        // A thread that is dead is at rest too.
        all.all(|status| status.is_some_and(|status| (status.stopped || status.dead) && !status.traced))
    }

    fn status(&self) -> Option<Status> {
        Status::of(self.pid()?)
    }
}

/// What /proc/PID/status says.
#[derive(Debug, Default)]
struct Status {
    stopped: bool,
    dead: bool,
    traced: bool,
    masked: bool,
    pending: u64,
}

/// What no process can block.
const UNBLOCKABLE: u64 = 1 << (9 - 1) | 1 << (19 - 1);

impl Status {
    fn of(pid: i32) -> Option<Self> {
        Self::read(Path::new(&format!("/proc/{pid}")))
    }

    fn read(dir: &Path) -> Option<Self> {
        Some(Self::parse(&fs::read_to_string(dir.join("status")).ok()?))
    }

    fn parse(text: &str) -> Self {
        let mut status = Self::default();
        for (name, value) in text.lines().filter_map(|line| line.split_once(":\t")) {
            match name {
                // T is stopped by a signal, t by a tracer.
                "State" => {
                    status.stopped = value.starts_with('T');
                    status.dead = value.starts_with(['Z', 'X']);
                }
                "TracerPid" => status.traced = value != "0",
                "SigBlk" => {
                    status.masked =
                        u64::from_str_radix(value, 16).is_ok_and(|mask| mask | UNBLOCKABLE == u64::MAX);
                }
                // Those of the thread, and those of the whole process.
                "SigPnd" | "ShdPnd" => status.pending |= u64::from_str_radix(value, 16).unwrap_or(0),
                _ => {}
            }
        }
        status
    }

    fn pending(&self, signal: Signal) -> bool {
        self.pending & (1 << (signal.as_raw() - 1)) != 0
    }
}

impl Pollable for Process {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn interest(&self) -> Option<Interest> {
        Some(Interest::READABLE)
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{PidfdFlags, pidfd_open};

    #[test]
    fn what_the_kernel_says() {
        let text = "Name:\tx\nState:\tT (stopped)\nTracerPid:\t0\nSigPnd:\t0000000000000000\n\
                    ShdPnd:\t0000000000040000\nSigBlk:\t0000000000010000\n";
        let status = Status::parse(text);
        assert!(status.stopped && !status.traced && !status.masked);
        assert!(Status::parse("SigBlk:\tfffffffffffbfeff\n").masked);
        assert!(status.pending(Signal::STOP) && !status.pending(Signal::KILL));
        assert!(!Status::parse("State:\tt (tracing stop)\nTracerPid:\t77\n").stopped);
    }

    #[test]
    fn a_process_is_stopped_continued_and_killed() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let process = Process::new(pidfd_open(pid, PidfdFlags::empty()).unwrap());
        let until = |state: &dyn Fn() -> bool| {
            let late = Instant::now() + std::time::Duration::from_secs(20);
            while !state() {
                assert!(Instant::now() < late);
                std::thread::yield_now();
            }
        };
        assert!(!process.is_stopping() && !process.is_traced());
        process.send(Signal::STOP).unwrap();
        assert!(process.is_stopping());
        until(&|| process.is_stopped());
        process.send(Signal::CONT).unwrap();
        until(&|| !process.is_stopped());
        process.send(Signal::KILL).unwrap();
        until(&|| process.is_dead());
        child.wait().unwrap();
        process.send(Signal::KILL).unwrap();
        assert!(!process.is_stopped() && !process.is_stopping());
    }
}
