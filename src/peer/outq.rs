//! Whether a TCP socket's send queue has run empty: everything has been acknowledged by the peer's kernel.
//!
//! The ioctl that says so (SIOCOUTQ) has no safe wrapper; the same number stands in /proc/net/tcp.

use std::os::fd::AsFd;

/// How many bytes `socket` has sent or queued that its peer's kernel has not acknowledged. None: not
/// known, since the socket is none of TCP, or of another network namespace.
pub fn unacknowledged(socket: impl AsFd) -> Option<u64> {
    let inode = rustix::fs::fstat(socket).ok()?.st_ino;
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];
    tables.iter().find_map(|table| find(&std::fs::read_to_string(table).ok()?, inode))
}

// Columns: number, local and remote address, state, tx_queue:rx_queue, timer, retransmits, uid, timeout,
// inode.
fn find(table: &str, inode: u64) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let mut columns = line.split_whitespace();
        let queues = columns.nth(4)?;
        let found = columns.nth(4)?.parse() == Ok(inode);
        found.then(|| u64::from_str_radix(queues.split_once(':')?.0, 16).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn counts_what_the_peer_has_not_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut link = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(unacknowledged(&link), Some(0));
        let _peer = listener.accept().unwrap();
        link.set_nonblocking(true).unwrap();
        // Until both buffers are full and something has to stay in our queue.
        while link.write(&[0; 1 << 16]).is_ok() {}
        assert!(unacknowledged(&link).unwrap() > 0);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(unacknowledged(&file), None);
    }
}
