//! What the black-box tests share: the real binary as a child, a fake CRIU for each dialect, and peers of
//! the seed protocol that read and write as the programs of 2017 did. Nothing sleeps to be in time: it
//! waits for what can be seen, with a deadline.

#![allow(dead_code)] // Each test file uses its part.

pub mod middleman;
pub mod relay;
pub mod script;
pub mod view;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, IoSlice, PipeReader, PipeWriter, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use criu_relay::wire::criu::{self, Transfer, WriteMode};
use criu_relay::wire::{Key, frame};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take before a test fails. Generous: the machines are small and shared.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Waits until `ready` is true.
pub fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !ready() {
        assert!(Instant::now() < end, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Says that a test can't run here; past the harness's capture, so that tests/all.sh sees it.
pub fn skip(test: &str, why: &str) {
    let _ = io::stderr().write_all(format!("SKIPPED {test}: {why}\n").as_bytes());
}

/// A directory of a test's own, removed at its end.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("crt-{}-{count}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        Self(path)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A daemon under test; killed when dropped.
pub struct Daemon {
    pub child: Child,
    pub dir: Dir,
    pub port: u16,
    log: PathBuf,
}

pub fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_criu-relay")
}

impl Daemon {
    /// `criu-relay cache` on a port of its own, ready.
    pub fn cache(args: &[&str]) -> Self {
        Self::cache_in(Dir::new(), args)
    }

    pub fn cache_in(dir: Dir, args: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.args(["cache", "--port", "0"]);
        Self::start(dir, command, args)
    }

    /// One where another has been.
    pub fn cache_at(dir: Dir, port: u16, args: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.args(["cache", "--port", &port.to_string()]);
        let mut cache = Self::start(dir, command, args);
        cache.port = port;
        cache
    }

    /// `criu-relay proxy` for a cache at `port`, ready.
    pub fn proxy(port: u16, args: &[&str]) -> Self {
        Self::proxy_in(Dir::new(), port, args)
    }

    /// The same, told that the cache is an old one: it does not spend 2 s on finding that out.
    pub fn seed_proxy(port: u16, args: &[&str]) -> Self {
        let mut all = vec!["--peer-protocol", "seed"];
        all.extend(args);
        Self::proxy(port, &all)
    }

    pub fn proxy_in(dir: Dir, port: u16, args: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.args(["proxy", "--address", "127.0.0.1", "--port", &port.to_string()]);
        // The last one counts: a test of the default says so.
        command.args(["--commit", "stored"]);
        Self::start(dir, command, args)
    }

    /// Any command that ends up as one of the daemons.
    pub fn start(dir: Dir, mut command: Command, args: &[&str]) -> Self {
        let log = dir.join("log");
        let file = File::create(&log).unwrap();
        command.args(["-v3", "-D"]).arg(&dir.0).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        let chosen = command.get_args().collect::<Vec<_>>().windows(2).any(|pair| pair == ["--port", "0"]);
        let mut child = command.spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut daemon = Self { child, dir, port: 0, log };
        daemon.wait_log("is ready in");
        // It prints the port only where the kernel has chosen it.
        if !chosen || !daemon.log().contains("listening at") {
            return daemon;
        }
        let mut line = Vec::new();
        let mut byte = [0];
        while out.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        let line = String::from_utf8(line).unwrap();
        daemon.port = line.rsplit(':').next().unwrap().parse().unwrap_or(0);
        daemon
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the log holds `text`.
    pub fn wait_log(&mut self, text: &str) {
        self.wait_log_times(text, 1);
    }

    /// Waits until the log holds `text` so many times.
    pub fn wait_log_times(&mut self, text: &str, times: usize) {
        let end = Instant::now() + DEADLINE;
        while self.log().matches(text).count() < times {
            let gone = self.child.try_wait().unwrap().is_some();
            // Once more: it may have been the last thing that it said.
            if gone && self.log().matches(text).count() >= times {
                return;
            }
            assert!(
                !gone && Instant::now() < end,
                "waiting for '{text}' in the log (gone: {gone}):\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Stops the process, as a busy machine might; it stands still when this returns.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        wait_until("it stands still", || self.status("State:").starts_with('T'));
    }

    /// Lets a stopped process go on.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills it; what it leaves is there for another one.
    pub fn kill(&mut self) -> Dir {
        let _ = self.child.kill();
        self.wait();
        std::mem::replace(&mut self.dir, Dir::new())
    }

    /// The records in its work directory, by name.
    pub fn records(&self) -> Vec<PathBuf> {
        records(&self.dir)
    }

    /// How many descriptors it has.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// A field of /proc/PID/status.
    pub fn status(&self, field: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_string()
    }

    /// Waits for the end; the exit status.
    pub fn wait(&mut self) -> i32 {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < end, "the daemon does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn terminate(&mut self) -> i32 {
        self.signal(Signal::TERM);
        self.wait()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// A number in KiB from /proc/PID/status.
    pub fn memory(&self, field: &str) -> u64 {
        self.status(field).parse().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The records in a directory, by name.
pub fn records(dir: &Dir) -> Vec<PathBuf> {
    let entries = fs::read_dir(&dir.0).unwrap().map(|entry| entry.unwrap().path());
    let mut records: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "record")).collect();
    records.sort();
    records
}

/// Bytes that differ everywhere.
pub fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2654435761) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 24) as u8
        })
        .collect()
}

pub fn key(id: &str, name: &str) -> Key {
    Key::new(id.as_bytes(), name.as_bytes())
}

/// The image `parent`: a list of snapshot ids.
pub fn id_list(ids: &[&str]) -> Vec<u8> {
    let entry =
        |id: &&str| frame::encode(&criu::SnapshotIdEntry { snapshot_id: Some(id.as_bytes().to_vec()) });
    ids.iter().flat_map(entry).collect()
}

/// Sends bytes, the last of which carries descriptors.
pub fn send_with(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    let n = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    assert_eq!(n, bytes.len());
    Ok(())
}

pub fn connect(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.set_write_timeout(Some(DEADLINE)).unwrap();
    socket
}

/// Waits until the other side has closed, with or without a reset.
pub fn assert_closed(client: &mut impl Read) {
    match read_once(client, &mut [0; 16]) {
        Ok(0) => {}
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
        other => panic!("the connection is not closed: {other:?}"),
    }
}

/// One read(2), begun again only when a signal has interrupted it.
fn read_once(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Reads one object as CRIU does: a read for the length, a read for the body, short is an error.
pub fn read_object(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    match read_once(from, &mut length)? {
        4 => {}
        0 => return Err(ErrorKind::UnexpectedEof.into()),
        n => return Err(io::Error::other(format!("a length of {n} bytes"))),
    }
    let mut body = vec![0; u32::from_ne_bytes(length) as usize];
    let n = read_once(from, &mut body)?;
    if n != body.len() {
        return Err(io::Error::other(format!("a body of {n} bytes instead of {}", body.len())));
    }
    Ok(body)
}

// --- CRIU, remote dialect

/// Opens an image as `criu --remote` does: connects and sends the header.
pub fn open_remote(socket: &Path, key: &Key, write: Option<WriteMode>) -> UnixStream {
    let mut client = connect(socket);
    client.write_all(&criu::encode_request(key, write)).unwrap();
    client
}

/// Writes an image and closes.
pub fn write_remote(socket: &Path, key: &Key, mode: WriteMode, bytes: &[u8]) {
    let mut client = open_remote(socket, key, Some(mode));
    client.write_all(bytes).unwrap();
}

/// The answer to a reader: an errno or 0.
pub fn read_answer(client: &mut UnixStream) -> io::Result<u32> {
    use prost::Message;
    let body = read_object(client)?;
    Ok(criu::LocalImageReplyEntry::decode(&body[..]).unwrap().error.unwrap())
}

/// Takes the answer and the image; the error is an errno.
pub fn finish_read(mut client: UnixStream) -> Result<Vec<u8>, u32> {
    match read_answer(&mut client).unwrap() {
        0 => {}
        errno => return Err(errno),
    }
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).unwrap();
    Ok(bytes)
}

pub fn read_remote(socket: &Path, key: &Key) -> Result<Vec<u8>, u32> {
    finish_read(open_remote(socket, key, None))
}

/// Both spellings of a finish.
#[derive(Clone, Copy, Debug)]
pub enum Style {
    Y2017,
    Y2019,
}

fn finish(socket: &Path, style: Style, name: &str, write: bool) -> UnixStream {
    let (id, name) = match style {
        Style::Y2017 => ("null", name),
        Style::Y2019 => ("", ""),
    };
    open_remote(socket, &key(id, name), write.then_some(WriteMode::Truncate))
}

pub fn dump_finish(socket: &Path, style: Style) {
    finish(socket, style, "DUMP_FINISH", true);
}

pub fn restore_finish(socket: &Path, style: Style) {
    let mut client = finish(socket, style, "RESTORE_FINISH", false);
    match style {
        Style::Y2017 => drop(read_answer(&mut client).unwrap()),
        Style::Y2019 => assert_eq!(client.read(&mut [0; 8]).unwrap(), 0),
    }
}

// --- CRIU, stream dialect

/// `criu dump --stream`.
pub struct Dump(pub UnixStream);

impl Dump {
    pub fn connect(proxy: &Daemon) -> Self {
        Self(connect(&proxy.dir.join("streamer-capture.sock")))
    }

    /// Opens an image: a request, then a byte with the pipe's read end.
    pub fn open(&mut self, name: &str) -> PipeWriter {
        self.try_open(name).unwrap()
    }

    /// The same where the proxy may have closed.
    pub fn try_open(&mut self, name: &str) -> io::Result<PipeWriter> {
        let (reader, writer) = io::pipe().unwrap();
        self.0.write_all(&criu::encode_streamer_request(name.as_bytes()))?;
        send_with(&self.0, b"\0", &[reader.as_fd()])?;
        Ok(writer)
    }

    pub fn write(&mut self, name: &str, bytes: &[u8]) {
        self.open(name).write_all(bytes).unwrap();
    }

    /// What makes a dump of the images before it.
    pub fn end(mut self) {
        self.write("pstree.img", b"the tree");
        self.write("inventory.img", b"the inventory");
    }
}

/// `criu restore --stream`.
pub struct Restore(pub UnixStream);

impl Restore {
    pub fn connect(cache: &Daemon) -> Self {
        Self(connect(&cache.dir.join("streamer-serve.sock")))
    }

    pub fn ask(&mut self, name: &str) {
        self.0.write_all(&criu::encode_streamer_request(name.as_bytes())).unwrap();
    }

    /// The answer; None: the connection was closed instead.
    pub fn answer(&mut self) -> Option<bool> {
        use prost::Message;
        match read_object(&mut self.0) {
            Ok(body) => Some(criu::StreamerReplyEntry::decode(&body[..]).unwrap().exists.unwrap()),
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    pub fn pipe(&mut self) -> PipeReader {
        let (reader, writer) = io::pipe().unwrap();
        send_with(&self.0, b"\0", &[writer.as_fd()]).unwrap();
        reader
    }

    /// Asks, and reads the image to its end; None: it does not exist.
    pub fn read(&mut self, name: &str) -> Option<Vec<u8>> {
        self.ask(name);
        if !self.answer().expect("the connection was closed") {
            return None;
        }
        let mut bytes = Vec::new();
        self.pipe().read_to_end(&mut bytes).unwrap();
        Some(bytes)
    }
}

// --- peers of the seed protocol

/// How a link ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkEnd {
    InOrder,
    Reset,
}

/// What an image-cache of 2017 holds at the end of one link. It reads as that did: one read for the length,
/// one for the header's body (short is an error), 4 KiB at a time for the payload.
pub fn old_cache(mut link: TcpStream) -> (HashMap<Key, Vec<u8>>, LinkEnd) {
    link.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut images: HashMap<Key, Vec<u8>> = HashMap::new();
    loop {
        let body = match read_object(&mut link) {
            Ok(body) => body,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                // What ours begin with: to an old cache an image that nobody asks for.
                images.remove(&Key::stream(*b".criu-relay"));
                return (images, LinkEnd::InOrder);
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return (images, LinkEnd::Reset),
            Err(error) => panic!("{error}"),
        };
        let transfer = criu::decode_transfer(&body).unwrap();
        let image = images.entry(transfer.key).or_default();
        if transfer.mode == WriteMode::Truncate {
            image.clear();
        }
        let mut buffer = [0; 4096];
        while (image.len() as u64) < transfer.size {
            let missing = (transfer.size - image.len() as u64).min(4096) as usize;
            match link.read(&mut buffer[..missing]) {
                Ok(0) => panic!("the link ended in the middle of an image"),
                Ok(n) => image.extend(&buffer[..n]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return (images, LinkEnd::Reset),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Where an old cache listens.
pub fn old_listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// An image-proxy of 2017, connected.
pub struct OldProxy(pub TcpStream);

impl OldProxy {
    pub fn connect(cache: &Daemon) -> Self {
        let link = TcpStream::connect(("127.0.0.1", cache.port)).unwrap();
        link.set_read_timeout(Some(DEADLINE)).unwrap();
        link.set_write_timeout(Some(DEADLINE)).unwrap();
        Self(link)
    }

    pub fn header(&mut self, key: &Key, mode: WriteMode, size: u64) {
        self.0.write_all(&criu::encode_transfer(&Transfer { key: key.clone(), mode, size })).unwrap();
    }

    /// A whole image in one transfer.
    pub fn send(&mut self, key: &Key, bytes: &[u8]) {
        self.header(key, WriteMode::Append, bytes.len() as u64);
        self.0.write_all(bytes).unwrap();
    }

    /// What makes a complete dump of the stream dialect.
    pub fn end(mut self) {
        self.send(&key("", "pstree.img"), b"the tree");
        self.send(&key("", "inventory.img"), b"the inventory");
    }

    /// Dies, so that the peer sees a reset.
    pub fn reset(self) {
        rustix::net::sockopt::set_socket_linger(&self.0, Some(Duration::ZERO)).unwrap();
    }
}
