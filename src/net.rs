//! System calls on sockets and pipes, as the rest needs them. It owns nothing.

use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{getsockopt, setsockopt, sockopt as sockopt_nix, sockopt::PeerCredentials};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketFlags,
    SocketType, recv, recvmsg, socket_with, sockopt,
};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::wire::relay::SessionId;

/// What the pipes of CRIU are enlarged to, in bytes. CRIU gives them 64 KiB; an unprivileged user may
/// have this much too; CRIU has trouble with more than 4 MiB.
pub const PIPE_SIZE: usize = 1 << 20;

/// Flags of every socket made or accepted here.
pub const SOCKET: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// What a receive on a UNIX socket brought.
#[derive(Debug)]
pub enum Received {
    /// So many bytes, the last of which carried the descriptor.
    Bytes(usize, Option<OwnedFd>),
    /// More descriptors than any message of CRIU has (they are closed), or no place for the one.
    TooManyDescriptors,
    /// The peer will send nothing more.
    End,
    /// Nothing is here now.
    Wait,
}

/// What a receive with room for many descriptors brought.
#[derive(Debug)]
pub enum ReceivedMany {
    /// So many bytes, the last of which carried the descriptors.
    Bytes(usize, Vec<OwnedFd>),
    /// There was no place for all descriptors (they are closed).
    Truncated,
    /// The peer will send nothing more.
    End,
    /// Nothing is here now.
    Wait,
}

/// The most descriptors that the kernel lets one message carry.
const SCM_MAX: usize = 253;

/// Receives with room for descriptors. A plain read(2) would lose them.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    Ok(match receive_into(socket, buffer, &mut space)? {
        ReceivedMany::Bytes(_, descriptors) if descriptors.len() > 1 => Received::TooManyDescriptors,
        ReceivedMany::Bytes(n, mut descriptors) => Received::Bytes(n, descriptors.pop()),
        ReceivedMany::Truncated => Received::TooManyDescriptors,
        ReceivedMany::End => Received::End,
        ReceivedMany::Wait => Received::Wait,
    })
}

/// Receives with room for as many descriptors as one message can carry.
pub fn receive_many(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<ReceivedMany> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX))];
    receive_into(socket, buffer, &mut space)
}

fn receive_into(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    space: &mut [MaybeUninit<u8>],
) -> io::Result<ReceivedMany> {
    let mut control = RecvAncillaryBuffer::new(space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Ok(got) => break got,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(ReceivedMany::Wait),
            Err(error) => return Err(error.into()),
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Ok(ReceivedMany::Truncated);
    }
    match got.bytes {
        0 => Ok(ReceivedMany::End),
        n => Ok(ReceivedMany::Bytes(n, descriptors)),
    }
}

/// Looks at what is there without taking it.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    match recv(socket, buffer, RecvFlags::DONTWAIT | RecvFlags::PEEK) {
        Ok((_, 0)) => Ok(Received::End),
        Ok((_, n)) => Ok(Received::Bytes(n, None)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(Received::Wait),
        Err(error) => Err(error.into()),
    }
}

/// Whether whoever is on the other side has closed: for states in which nothing may be read.
pub fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    matches!(peek(socket, &mut [0; 1]), Ok(Received::End) | Err(_))
}

/// Whether whoever is on the other side will send nothing more, whatever of it is still to be read.
pub fn has_ended(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Whether whoever is on the other side of a UNIX socket has closed it, and not only shut its half.
pub fn is_closed(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        && fds[0].revents().contains(PollFlags::HUP)
}

/// Whether a pipe that is read from is empty and nobody can write to it any more.
pub fn is_pipe_at_end(pipe: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pipe, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        && fds[0].revents().contains(PollFlags::HUP)
        && !fds[0].revents().contains(PollFlags::IN)
}

/// Whether something can be read, or its end. Of a pidfd: whether the process is dead.
pub fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Which end of a pipe a descriptor has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PipeEnd {
    /// CRIU writes, we read.
    Read,
    /// We write, CRIU reads.
    Write,
}

/// Checks that a received descriptor is that end of a pipe, and makes it non-blocking. The error is the second half of a sentence. (Non-blocking is a property of the open file, but
/// the two ends of a pipe are two of them: CRIU's end is untouched.)
pub fn adopt_pipe(fd: OwnedFd, end: PipeEnd) -> Result<OwnedFd, String> {
    let broken = |error: Errno| format!("sent a descriptor that is no use: {error}");
    let kind = FileType::from_raw_mode(fstat(&fd).map_err(broken)?.st_mode);
    if kind != FileType::Fifo {
        return Err(format!("sent a descriptor that is no pipe ({kind:?})"));
    }
    let flags = fcntl_getfl(&fd).map_err(broken)?;
    let access = flags & OFlags::ACCMODE;
    let wrong = match end {
        PipeEnd::Read => OFlags::WRONLY,
        PipeEnd::Write => OFlags::RDONLY,
    };
    if access == wrong {
        return Err("sent the wrong end of a pipe".into());
    }
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(broken)?;
    Ok(fd)
}

/// Makes a pipe as large as allowed. A pipe that is written to is enlarged when it is first read from, not
/// before: what a dump can write before there is anybody to give it to is to be little.
pub fn enlarge(pipe: BorrowedFd<'_>) {
    // Refused where the user's pipes are many: it works with 64 KiB too.
    if let Err(error) = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_SIZE) {
        log::trace!("a pipe keeps its size: {error}");
    }
}

/// Lets a UNIX socket hold more of what is sent on it: with the default of 208 KiB the reader is woken three times
/// as often. More than the system's limit needs privilege; without it stays as it is.
pub fn widen(socket: &OwnedFd) {
    if let Err(error) = setsockopt(socket, sockopt_nix::SndBufForce, &PIPE_SIZE) {
        log::trace!("a socket keeps its size: {error}");
    }
}

/// Whether a client of a UNIX socket is root or our own user; its user id otherwise. Its process id may
/// be 0: it may live in a PID namespace that is not visible from here.
pub fn check_user(socket: &OwnedFd) -> Result<(), String> {
    let credentials =
        getsockopt(socket, PeerCredentials).map_err(|error| format!("SO_PEERCRED failed: {error}"))?;
    let ours = rustix::process::geteuid().as_raw();
    match credentials.uid() {
        0 => Ok(()),
        uid if uid == ours => Ok(()),
        uid => Err(format!("user {uid} may not connect here (only root and user {ours} may)")),
    }
}

/// A name that nothing else has: 16 random bytes.
pub fn random_id() -> io::Result<SessionId> {
    let mut id = SessionId::default();
    let mut filled = 0;
    while filled < id.len() {
        // So few bytes come at once; at boot they may have to be waited for.
        match getrandom(&mut id[filled..], GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(id)
}

/// The process id of whoever connected a UNIX socket, as seen from here; 0: it is not visible from here.
pub fn peer_pid(socket: &OwnedFd) -> i32 {
    getsockopt(socket, PeerCredentials).map_or(0, |credentials| credentials.pid())
}

/// The process that a pidfd is of, as seen from here. None: it has been waited for, or lives in a PID
/// namespace that is not visible from here, or the descriptor is no pidfd.
pub fn pidfd_pid(fd: BorrowedFd<'_>) -> Option<i32> {
    fdinfo_pid(fd).filter(|pid| *pid > 0)
}

/// Whether a descriptor is a pidfd, be its process dead or not visible.
pub fn is_pidfd(fd: BorrowedFd<'_>) -> bool {
    fdinfo_pid(fd).is_some()
}

// What no other kind of file has there: the process id, 0 (not visible) or -1 (waited for).
fn fdinfo_pid(fd: BorrowedFd<'_>) -> Option<i32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()
}

/// A non-blocking TCP socket for `address`.
pub fn tcp_socket(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    Ok(socket_with(family, SocketType::STREAM, SOCKET, None)?)
}

/// How long a peer may leave bytes unacknowledged, or its window shut, before the link is given up. (Both
/// kinds of peer read whatever comes into memory, so that a window stays shut only when they are stopped, or when
/// they let a session wait.)
const USER_TIMEOUT: Duration = Duration::from_secs(15);

/// Sets up an established link. Nothing waits to be filled up (a header is a message of its own); a peer
/// whose host has vanished is found in 5 + 2 x 5 s when the link is quiet, and in [`USER_TIMEOUT`] when it is
/// not: the time in which a proxy of the relay protocol misses its cache by itself. An inherited socket may be of
/// another family, to which none of this applies.
pub fn tune_link(link: impl AsFd) {
    let link = link.as_fd();
    let tuned = sockopt::set_tcp_nodelay(link, true)
        .and_then(|()| sockopt::set_socket_keepalive(link, true))
        .and_then(|()| sockopt::set_tcp_keepidle(link, Duration::from_secs(5)))
        .and_then(|()| sockopt::set_tcp_keepintvl(link, Duration::from_secs(5)))
        .and_then(|()| sockopt::set_tcp_keepcnt(link, 2))
        .and_then(|()| sockopt::set_tcp_user_timeout(link, USER_TIMEOUT.as_millis() as u32));
    if let Err(error) = tuned {
        log::debug!("the link keeps its default options: {error}");
    }
}

/// The peer may leave its window shut: it lets a session wait its turn, and says so from time to time. Whether it is
/// there is found out by ping, which takes no longer than the kernel would.
pub fn let_wait(link: impl AsFd) {
    if let Err(error) = sockopt::set_tcp_user_timeout(link, 0) {
        log::debug!("the link keeps its time-out: {error}");
    }
}

/// Closes `link` with a reset, so that its peer sees a failure and not an end.
pub fn reset(link: OwnedFd) {
    if let Err(error) = sockopt::set_socket_linger(&link, Some(Duration::ZERO)) {
        log::warn!("the link can't be reset, its peer may take the end for a good one: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{PidfdFlags, getpid, pidfd_open};

    #[test]
    fn pidfds_are_told_from_other_descriptors() {
        let myself = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        assert!(is_pidfd(myself.as_fd()));
        assert_eq!(pidfd_pid(myself.as_fd()), Some(getpid().as_raw_pid()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let fd = pidfd_open(rustix::process::Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        child.wait().unwrap();
        assert!(is_pidfd(fd.as_fd()), "dead, but a pidfd");
        assert_eq!(pidfd_pid(fd.as_fd()), None);
        let (reader, _writer) = io::pipe().unwrap();
        assert!(!is_pidfd(reader.as_fd()) && pidfd_pid(reader.as_fd()).is_none());
    }

    #[test]
    fn the_peer_has_a_process_id() {
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(peer_pid(&one.into()), getpid().as_raw_pid());
        drop(other);
    }
}
