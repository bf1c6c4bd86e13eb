//! Peers of the relay protocol, played by a test with the codec alone: each frame is the test's own.

use std::collections::{HashMap, HashSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use criu_relay::wire::criu::{self, WriteMode};
use criu_relay::wire::relay::{self, Decoder, Hello, Item, Kind, Welcome};
use criu_relay::wire::{Key, frame};

use super::{DEADLINE, Daemon, LinkEnd};

/// One end of a link.
pub struct Peer {
    pub stream: TcpStream,
    decoder: Decoder,
    input: Vec<u8>,
    at: usize,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    Message(Kind),
    Bytes(u64, Vec<u8>),
    End(LinkEnd),
}

impl Peer {
    pub fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, decoder: Decoder::default(), input: Vec::new(), at: 0 }
    }

    pub fn say(&mut self, kind: Kind) {
        self.stream.write_all(&relay::encode(kind)).unwrap();
    }

    /// Waits until the other side has read everything that was said.
    pub fn is_read(&self) {
        let port = |address: std::io::Result<SocketAddr>| format!(":{:04X}", address.unwrap().port());
        let (theirs, ours) = (port(self.stream.peer_addr()), port(self.stream.local_addr()));
        super::wait_until("it has read everything", || {
            let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
            let mut sockets = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            let of_it = sockets.find(|s| s[1].ends_with(&theirs) && s[2].ends_with(&ours));
            of_it.expect("it has its end of the link")[4].ends_with(":00000000")
        });
    }

    /// The next message, piece of data or end.
    pub fn next(&mut self) -> Seen {
        loop {
            let mut rest = &self.input[self.at..];
            let seen = match self.decoder.next(&mut rest).expect("it speaks the relay protocol") {
                Some(Item::Message(kind)) => Some(Seen::Message(kind)),
                Some(Item::Bytes(id, bytes)) => Some(Seen::Bytes(id, bytes.to_vec())),
                None => None,
            };
            self.at = self.input.len() - rest.len();
            if let Some(seen) = seen {
                return seen;
            }
            self.input.resize(64 * 1024, 0);
            let n = loop {
                match self.stream.read(&mut self.input) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                        return Seen::End(LinkEnd::Reset);
                    }
                    other => break other.expect("something comes in time"),
                }
            };
            self.input.truncate(n);
            self.at = 0;
            if n == 0 {
                return Seen::End(LinkEnd::InOrder);
            }
        }
    }

    /// The next message; acknowledgements of parts, and how restores stand, are not looked at.
    pub fn hear(&mut self) -> Kind {
        loop {
            match self.next() {
                Seen::Message(Kind::Ack(_) | Kind::Restore(_)) => {}
                Seen::Message(kind) => return kind,
                other => panic!("no message but {other:?}"),
            }
        }
    }

    /// How a restore stands, when that is told next.
    pub fn hear_restore(&mut self) -> u32 {
        loop {
            match self.next() {
                Seen::Message(Kind::Restore(restore)) => return restore.state,
                Seen::Message(Kind::Ack(_) | Kind::Stored(_) | Kind::AllStored(_)) => {}
                other => panic!("nothing of a restore but {other:?}"),
            }
        }
    }

    /// The text of the error that comes next, behind which the link is closed.
    pub fn hear_error(&mut self) -> String {
        loop {
            match self.hear() {
                Kind::Error(error) => return String::from_utf8(error.text).unwrap(),
                Kind::Stored(_) => {}
                other => panic!("no error but {other:?}"),
            }
        }
    }

    /// Takes what comes until the link has ended.
    pub fn end(mut self) -> LinkEnd {
        loop {
            if let Seen::End(end) = self.next() {
                return end;
            }
        }
    }

    /// Dies, so that the other side sees a reset.
    pub fn reset(self) {
        rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO)).unwrap();
    }
}

/// A cache's listening socket, and the run that it claims to be.
pub struct FakeCache {
    pub listener: TcpListener,
    pub port: u16,
    pub run: Vec<u8>,
}

impl FakeCache {
    pub fn new() -> Self {
        let (listener, port) = super::old_listener();
        listener.set_nonblocking(true).unwrap();
        Self { listener, port, run: vec![7; relay::ID] }
    }

    /// The next link, behind its greeting.
    pub fn greeted(&self) -> (Peer, Hello) {
        let mut accepted = None;
        super::wait_until("the proxy connects", || {
            accepted = self.listener.accept().ok();
            accepted.is_some()
        });
        let mut stream = accepted.unwrap().0;
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let transfer = criu::decode_transfer(&super::read_object(&mut stream).unwrap()).unwrap();
        assert!(relay::is_greeting(&transfer));
        let mut payload = vec![0; transfer.size as usize];
        stream.read_exact(&mut payload).unwrap();
        (Peer::new(stream), Hello::check(&payload).unwrap())
    }

    pub fn welcome(&self) -> Welcome {
        Welcome { major: relay::MAJOR, minor: relay::MINOR, run: self.run.clone(), ..Welcome::default() }
    }

    /// The next link, made welcome.
    pub fn accept(&self) -> Held {
        let (mut peer, _) = self.greeted();
        peer.say(Kind::Welcome(self.welcome()));
        Held::new(peer)
    }
}

/// What a played cache has of its peer's sessions.
pub struct Held {
    pub peer: Peer,
    /// Complete images, in all sessions of the link.
    pub images: HashMap<Key, Vec<u8>>,
    /// Transfers that are open: the image, and its bytes so far.
    pub open: HashMap<u64, (Key, Vec<u8>)>,
    /// Transfers of which something came while others were open.
    pub mixed: HashSet<Key>,
    /// Whether each image is confirmed as it is complete.
    pub confirms: bool,
    images_done: u64,
    bytes_done: u64,
    last: u64,
}

impl Held {
    pub fn new(peer: Peer) -> Self {
        Self {
            peer,
            images: HashMap::new(),
            open: HashMap::new(),
            mixed: HashSet::new(),
            confirms: true,
            images_done: 0,
            bytes_done: 0,
            last: 0,
        }
    }

    /// Does what comes next; None: that was a transfer's.
    fn step(&mut self) -> Option<Kind> {
        match self.peer.next() {
            Seen::Message(Kind::Open(open)) => {
                assert!(open.id > self.last, "ids count up: {open:?}");
                let id = open.id;
                self.last = id;
                let (key, mode) = relay::opened(open).unwrap();
                let held = match mode {
                    WriteMode::Append => self.images.get(&key).cloned().unwrap_or_default(),
                    WriteMode::Truncate => Vec::new(),
                };
                self.open.insert(id, (key, held));
                None
            }
            Seen::Message(Kind::Data(data)) => {
                assert!(u64::from(data.length) <= relay::DATA_MAX && data.length > 0);
                None
            }
            Seen::Bytes(id, bytes) => {
                let several = self.open.len() > 1;
                let (key, held) = self.open.get_mut(&id).expect("it is open");
                if several {
                    self.mixed.insert(key.clone());
                }
                held.extend(&bytes);
                self.bytes_done += bytes.len() as u64;
                None
            }
            Seen::Message(Kind::Close(close)) => {
                let (key, held) = self.open.remove(&close.id).expect("it is open");
                assert_eq!(close.size, held.len() as u64, "{key}");
                self.images.insert(key, held);
                self.images_done += 1;
                if self.confirms {
                    self.peer.say(Kind::Stored(relay::Stored { id: close.id, size: close.size }));
                }
                None
            }
            Seen::Message(kind) => Some(kind),
            Seen::End(end) => panic!("the link has ended: {end:?}"),
        }
    }

    /// Takes what comes until this is so.
    pub fn until(&mut self, mut done: impl FnMut(&Self) -> bool) {
        while !done(self) {
            if let Some(kind) = self.step() {
                panic!("{kind:?}");
            }
        }
    }

    /// The next message that is not of a transfer.
    pub fn hear(&mut self) -> Kind {
        loop {
            if let Some(kind) = self.step() {
                return kind;
            }
        }
    }

    /// A session begins: its hello.
    pub fn begin(&mut self) -> Hello {
        (self.images_done, self.bytes_done) = (0, 0);
        loop {
            match self.hear() {
                Kind::Hello(hello) => return hello,
                // The end of the session before.
                Kind::Settled(_) => {}
                other => panic!("no hello but {other:?}"),
            }
        }
    }

    /// Takes what comes until the dump is finished; its totals are right.
    pub fn finished(&mut self) {
        match self.hear() {
            Kind::Finished(all) => assert_eq!((all.images, all.bytes), (self.images_done, self.bytes_done)),
            other => panic!("not finished but {other:?}"),
        }
    }

    pub fn all_stored(&mut self) {
        let (images, bytes) = (self.images_done, self.bytes_done);
        self.peer.say(Kind::AllStored(relay::AllStored { images, bytes }));
    }

    /// A whole session, confirmed.
    pub fn session(&mut self) -> Hello {
        let hello = self.begin();
        self.finished();
        self.all_stored();
        hello
    }
}

/// A proxy of ours, played.
pub struct FakeProxy {
    pub peer: Peer,
    pub session: Vec<u8>,
    /// The run of the cache.
    pub run: Vec<u8>,
    last: u64,
    images: u64,
    bytes: u64,
}

pub fn hello(session: u8) -> Hello {
    Hello {
        major: relay::MAJOR,
        minor: relay::MINOR,
        session: vec![session; relay::ID],
        commit: relay::COMMIT_STORED,
        ..Hello::default()
    }
}

impl FakeProxy {
    /// A link that has said hello, and not heard anything yet.
    pub fn greet(cache: &Daemon, hello: &Hello) -> Peer {
        let mut stream = TcpStream::connect(("127.0.0.1", cache.port)).unwrap();
        stream.write_all(&relay::encode_greeting(hello)).unwrap();
        Peer::new(stream)
    }

    pub fn connect(cache: &Daemon) -> Self {
        Self::connect_for(cache, 1)
    }

    /// The greeting names this session.
    pub fn connect_for(cache: &Daemon, session: u8) -> Self {
        let mut peer = Self::greet(cache, &hello(session));
        let Kind::Welcome(welcome) = peer.hear() else { panic!("no welcome") };
        assert_eq!((welcome.major, welcome.run.len()), (relay::MAJOR, relay::ID));
        Self { peer, session: Vec::new(), run: welcome.run, last: 0, images: 0, bytes: 0 }
    }

    pub fn begin(&mut self, session: u8, scripted: bool) {
        self.begin_for(session, scripted, relay::COMMIT_STORED);
    }

    /// With this commit point.
    pub fn begin_for(&mut self, session: u8, scripted: bool, commit: u32) {
        let hello = Hello { scripted, commit, ..hello(session) };
        self.session.clone_from(&hello.session);
        (self.images, self.bytes) = (0, 0);
        self.peer.say(Kind::Hello(hello));
    }

    pub fn open(&mut self, key: &Key, mode: WriteMode) -> u64 {
        self.last += 1;
        self.peer.say(Kind::Open(relay::Open {
            id: self.last,
            name: key.name.to_vec(),
            snapshot_id: key.snapshot_id.to_vec(),
            open_mode: mode.flags(),
        }));
        self.last
    }

    pub fn data(&mut self, id: u64, bytes: &[u8]) {
        for piece in bytes.chunks(relay::DATA_MAX as usize) {
            self.peer.say(Kind::Data(relay::Data::new(id, piece.len() as u32)));
            self.peer.stream.write_all(piece).unwrap();
        }
        self.bytes += bytes.len() as u64;
    }

    pub fn close(&mut self, id: u64, size: usize) {
        self.peer.say(Kind::Close(relay::Close { id, size: size as u64 }));
        self.images += 1;
    }

    /// A whole image in one transfer.
    pub fn image(&mut self, key: &Key, bytes: &[u8]) {
        let id = self.open(key, WriteMode::Append);
        self.data(id, bytes);
        self.close(id, bytes.len());
    }

    pub fn stream_image(&mut self, name: &str, bytes: &[u8]) {
        self.image(&Key::stream(name.as_bytes()), bytes);
    }

    /// The rest of a dump of the stream dialect, up to the cache's word.
    pub fn end(&mut self) {
        self.stream_image("pstree.img", b"the tree");
        self.stream_image("inventory.img", b"the inventory");
        self.finish();
        self.hear_all_stored();
    }

    pub fn finish(&mut self) {
        self.peer.say(Kind::Finished(relay::Finished { images: self.images, bytes: self.bytes }));
    }

    pub fn hear_all_stored(&mut self) {
        loop {
            match self.peer.hear() {
                Kind::Stored(_) => {}
                Kind::AllStored(all) => {
                    assert_eq!((all.images, all.bytes), (self.images, self.bytes));
                    return;
                }
                other => panic!("not all stored but {other:?}"),
            }
        }
    }

    pub fn release(&mut self) {
        self.peer.say(Kind::Release(relay::Release { session: self.session.clone() }));
    }

    pub fn rollback(&mut self) {
        self.peer.say(Kind::Rollback(relay::Rollback { session: self.session.clone() }));
    }
}

/// A frame of a kind that nobody knows yet.
pub fn unknown_frame() -> Vec<u8> {
    // Field 99, length-delimited, three bytes.
    let body = [0x9a, 0x06, 3, 1, 2, 3];
    assert!(body.len() < frame::MAX_BODY);
    let mut bytes = (body.len() as u32 | relay::TOP).to_ne_bytes().to_vec();
    bytes.extend(body);
    bytes
}
