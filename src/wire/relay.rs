//! The relay peer protocol (proto/relay.proto): framed messages both ways, raw bytes behind `Data`.
//!
//! A frame begins with a word in the host's byte order whose top bit is set, which no legal length of the seed
//! protocol has; the rest of the word is the length of the protobuf message that follows. Every field has a
//! default, and what a newer minor version adds is skipped; what a message needs to make sense is checked by
//! whoever acts on it.

use prost::{Message, Oneof};

use super::criu::{self, Transfer, WriteMode};
use super::frame::{LENGTH, MAX_BODY};
use super::{Key, WireError};

/// The version spoken here. Another major version is an error, another minor one is not.
pub const MAJOR: u32 = 1;
/// See [`MAJOR`].
pub const MINOR: u32 = 0;

/// The seed image whose payload is the proxy's [`Hello`].
pub const GREETING: &[u8] = b".criu-relay";

/// The longest payload of that image, in bytes.
pub const GREETING_MAX: u64 = 4095;

/// The top bit of a frame's first word.
pub const TOP: u32 = 1 << 31;

/// The most raw bytes behind one `Data`. (Longer ones are taken; none is sent.) What a pipe of 1 MiB holds of
/// pages that lie in a socket: the kernel stops some pages before it is full, and a piece of 1 MiB would take
/// two rounds.
pub const DATA_MAX: u64 = 960 * 1024;

/// Where raw bytes that are copied begin, in bytes: a line of the processor's cache. Twelve bytes further on a proxy
/// that copies took some 7 % more time for all that it does.
const ALIGN: usize = 64;

/// The longest text of an [`Error`] that is sent, in bytes.
const TEXT_MAX: usize = 4000;

/// How many bytes name a session, and a run of the cache.
pub const ID: usize = 16;

/// A session's name: random, so that neither side ever takes one for another.
pub type SessionId = [u8; ID];

/// The source may only go when the images are stored: [`Hello::commit`].
pub const COMMIT_STORED: u32 = 1;

/// `Hello`: The proxy's first word: the payload of a seed image named `.criu-relay`. No old cache minds.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Hello {
    /// Major.
    #[prost(uint32, tag = "1")]
    pub major: u32,
    /// Minor.
    #[prost(uint32, tag = "2")]
    pub minor: u32,
    /// 16 random bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub session: Vec<u8>,
    /// CRIU's action script has announced its CRIU.
    #[prost(bool, tag = "4")]
    pub scripted: bool,
    /// 1: stored, 2: restored.
    #[prost(uint32, tag = "5")]
    pub commit: u32,
    /// For so many seconds the proxy may come back.
    #[prost(uint32, tag = "6")]
    pub reconnect: u32,
    /// Reserved for starting TLS.
    #[prost(bool, tag = "7")]
    pub tls: bool,
}

/// `Welcome`: The cache's answer, and its first word.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Welcome {
    /// Major.
    #[prost(uint32, tag = "1")]
    pub major: u32,
    /// Minor.
    #[prost(uint32, tag = "2")]
    pub minor: u32,
    /// 16 random bytes: this run of the cache.
    #[prost(bytes = "vec", tag = "3")]
    pub run: Vec<u8>,
    /// Bytes; absent: none.
    #[prost(uint64, tag = "4")]
    pub memory_limit: u64,
    /// An announced restore waits.
    #[prost(bool, tag = "5")]
    pub restore_waits: bool,
}

/// `Open`: An image, or more of one, begins. Ids count up from 1 and are never used twice on a link.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Open {
    /// Id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Name.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// Snapshot id.
    #[prost(bytes = "vec", tag = "3")]
    pub snapshot_id: Vec<u8>,
    /// O_WRONLY or O_APPEND.
    #[prost(uint32, tag = "4")]
    pub open_mode: u32,
}

/// `Data`: So many raw bytes of it follow this Frame.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Data {
    /// Id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Length.
    #[prost(uint32, tag = "2")]
    pub length: u32,
    /// Means nothing: it moves the raw bytes to where they are copied fastest.
    #[prost(bytes = "vec", tag = "3")]
    pub pad: Vec<u8>,
}

/// `Close`: It is complete.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Close {
    /// Id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// The image's size in bytes, from its beginning.
    #[prost(uint64, tag = "2")]
    pub size: u64,
}

/// `Abort`: Its writer died: what came of it is dropped.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Abort {
    /// Id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
}

/// `Prepare`: This much memory will be needed.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Prepare {
    /// Bytes.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
}

/// `Finished`: CRIU has ended after a complete dump, of so many transfers with so many bytes together.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Finished {
    /// Images.
    #[prost(uint64, tag = "1")]
    pub images: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
}

/// `Release`: The source is dead: the images may be restored.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Release {
    /// Session.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
}

/// `Rollback`: The source lives: they may not.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Rollback {
    /// Session.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
}

/// `Settled`: The proxy has heard how the session ended: nobody will ask for it again.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Settled {
    /// Session.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
}

/// `Resume`: A link that was lost goes on.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Resume {
    /// Session.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// Run.
    #[prost(bytes = "vec", tag = "2")]
    pub run: Vec<u8>,
}

/// `Ping`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Ping {
    /// Token.
    #[prost(uint64, tag = "1")]
    pub token: u64,
}

/// `Ack`: So many bytes of the transfer are stored, from its beginning.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Ack {
    /// Id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
}

/// `Stored`: The image is stored.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Stored {
    /// Id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Size.
    #[prost(uint64, tag = "2")]
    pub size: u64,
}

/// `Prepared`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Prepared {
    /// Bytes.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
}

/// `AllStored`: Everything is stored; the totals are those of Finished.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct AllStored {
    /// Images.
    #[prost(uint64, tag = "1")]
    pub images: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
}

/// `Restore`: The restore waits (1), stands ready (2), has finished (3) or failed (4).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Restore {
    /// State.
    #[prost(uint32, tag = "1")]
    pub state: u32,
}

/// `Released`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Released {
    /// Session.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
}

/// `RolledBack`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RolledBack {
    /// Session.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
}

/// `Holding`: Answer to Resume: what is held of each image; the last one has `last` set.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Holding {
    /// Id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Size.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// Complete.
    #[prost(bool, tag = "3")]
    pub complete: bool,
    /// Last.
    #[prost(bool, tag = "4")]
    pub last: bool,
}

/// `Error`: The session has failed on this side.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Error {
    /// Errno.
    #[prost(uint32, tag = "1")]
    pub errno: u32,
    /// Text.
    #[prost(bytes = "vec", tag = "2")]
    pub text: Vec<u8>,
}

/// `Pong`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Pong {
    /// Token.
    #[prost(uint64, tag = "1")]
    pub token: u64,
}

/// What a frame says.
#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum Kind {
    /// [`Open`].
    #[prost(message, tag = "1")]
    Open(Open),
    /// [`Data`].
    #[prost(message, tag = "2")]
    Data(Data),
    /// [`Close`].
    #[prost(message, tag = "3")]
    Close(Close),
    /// [`Abort`].
    #[prost(message, tag = "4")]
    Abort(Abort),
    /// [`Prepare`].
    #[prost(message, tag = "5")]
    Prepare(Prepare),
    /// [`Finished`].
    #[prost(message, tag = "6")]
    Finished(Finished),
    /// [`Release`].
    #[prost(message, tag = "7")]
    Release(Release),
    /// [`Rollback`].
    #[prost(message, tag = "8")]
    Rollback(Rollback),
    /// [`Resume`].
    #[prost(message, tag = "9")]
    Resume(Resume),
    /// [`Ping`].
    #[prost(message, tag = "10")]
    Ping(Ping),
    /// [`Hello`]: a session begins.
    #[prost(message, tag = "11")]
    Hello(Hello),
    /// [`Settled`].
    #[prost(message, tag = "12")]
    Settled(Settled),
    /// [`Ack`].
    #[prost(message, tag = "20")]
    Ack(Ack),
    /// [`Stored`].
    #[prost(message, tag = "21")]
    Stored(Stored),
    /// [`Prepared`].
    #[prost(message, tag = "22")]
    Prepared(Prepared),
    /// [`AllStored`].
    #[prost(message, tag = "23")]
    AllStored(AllStored),
    /// [`Restore`].
    #[prost(message, tag = "24")]
    Restore(Restore),
    /// [`Released`].
    #[prost(message, tag = "25")]
    Released(Released),
    /// [`RolledBack`].
    #[prost(message, tag = "26")]
    RolledBack(RolledBack),
    /// [`Holding`].
    #[prost(message, tag = "27")]
    Holding(Holding),
    /// [`Error`].
    #[prost(message, tag = "28")]
    Error(Error),
    /// [`Pong`].
    #[prost(message, tag = "29")]
    Pong(Pong),
    /// [`Welcome`].
    #[prost(message, tag = "30")]
    Welcome(Welcome),
}

/// `Frame`: one message of either side.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Frame {
    /// None: a kind of a newer minor version.
    #[prost(
        oneof = "Kind",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30"
    )]
    pub kind: Option<Kind>,
}

/// One frame.
pub fn encode(kind: Kind) -> Vec<u8> {
    let mut out = Vec::new();
    append(&mut out, kind);
    out
}

/// Adds one frame to `out`.
pub fn append(out: &mut Vec<u8>, kind: Kind) {
    let frame = Frame { kind: Some(kind) };
    out.extend_from_slice(&(frame.encoded_len() as u32 | TOP).to_ne_bytes());
    frame.encode_raw(out);
}

/// Adds a [`Data`] to `out` that makes it end at a multiple of [`ALIGN`] bytes: the raw bytes follow there.
pub fn append_data(out: &mut Vec<u8>, id: u64, length: u32) {
    let start = out.len();
    append(out, Kind::Data(Data::new(id, length)));
    // The padding's own tag and length take two bytes.
    let missing = match (ALIGN - out.len() % ALIGN) % ALIGN {
        0 => return,
        1 => ALIGN + 1,
        missing => missing,
    };
    out.truncate(start);
    append(out, Kind::Data(Data { id, length, pad: vec![0; missing - 2] }));
}

/// The proxy's first bytes: a seed image that holds `hello`.
pub fn encode_greeting(hello: &Hello) -> Vec<u8> {
    let payload = hello.encode_to_vec();
    let transfer =
        Transfer { key: Key::stream(GREETING), mode: WriteMode::Append, size: payload.len() as u64 };
    let mut out = criu::encode_transfer(&transfer);
    out.extend(payload);
    out
}

/// Whether a transfer is a greeting.
pub fn is_greeting(transfer: &Transfer) -> bool {
    transfer.key == Key::stream(GREETING)
        && transfer.mode == WriteMode::Append
        && (1..=GREETING_MAX).contains(&transfer.size)
}

impl Data {
    /// `length` bytes of a transfer follow.
    pub fn new(id: u64, length: u32) -> Self {
        Self { id, length, pad: Vec::new() }
    }
}

impl Hello {
    /// Decodes the payload of a greeting, and checks its version.
    pub fn check(payload: &[u8]) -> Result<Self, WireError> {
        let hello = Self::decode(payload).map_err(|_| WireError::Malformed("greeting"))?;
        hello.checked()
    }

    /// Checks one that came in a frame.
    pub fn checked(self) -> Result<Self, WireError> {
        check_version(self.major)?;
        session_id(&self.session)?;
        Ok(self)
    }
}

/// Checks the version of the other side.
pub fn check_version(major: u32) -> Result<(), WireError> {
    if major == MAJOR { Ok(()) } else { Err(WireError::Version { theirs: major, ours: MAJOR }) }
}

/// A session's name as it came.
pub fn session_id(bytes: &[u8]) -> Result<SessionId, WireError> {
    bytes.try_into().map_err(|_| WireError::Malformed("session id (it has 16 bytes)"))
}

/// What an [`Open`] opens.
pub fn opened(open: Open) -> Result<(Key, WriteMode), WireError> {
    let mode = WriteMode::from_flags(open.open_mode)?;
    Ok((criu::checked(open.snapshot_id, open.name)?, mode))
}

impl Error {
    /// An error of this side. The text is cut off at a length that a frame can carry.
    pub fn new(errno: u32, text: &str) -> Self {
        let mut end = text.len().min(TEXT_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self { errno, text: text.as_bytes()[..end].to_vec() }
    }

    /// Its text, for the log.
    pub fn shown(&self) -> String {
        self.text.escape_ascii().to_string()
    }
}

/// One thing found in the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// A message. Behind a [`Data`] its raw bytes follow.
    Message(Kind),
    /// Raw bytes of the transfer with this number, in order.
    Bytes(u64, &'a [u8]),
}

/// Takes the stream apart, wherever it is cut.
#[derive(Debug, Default)]
pub struct Decoder {
    // Word and message as far as they have come.
    got: Vec<u8>,
    // How long the last message was, with its word.
    last: usize,
    // Raw bytes still to come, and whose.
    raw: Option<(u64, u64)>,
}

impl Decoder {
    /// The next item in `input`, which is left at what follows it; None when more input is needed.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Item<'a>>, WireError> {
        loop {
            if let Some((id, left)) = self.raw {
                if input.is_empty() {
                    return Ok(None);
                }
                let here = usize::try_from(left).map_or(input.len(), |left| left.min(input.len()));
                let (data, rest) = input.split_at(here);
                *input = rest;
                self.took(here as u64);
                return Ok(Some(Item::Bytes(id, data)));
            }
            let Some(frame) = self.frame(input)? else { return Ok(None) };
            // A kind that we don't know comes from a newer minor version.
            let Some(kind) = frame.kind else { continue };
            if let Kind::Data(Data { id, length: length @ 1.., .. }) = kind {
                self.raw = Some((id, length.into()));
            }
            return Ok(Some(Item::Message(kind)));
        }
    }

    /// How many raw bytes are to come before the next message, and of which transfer: they may be moved without
    /// being looked at, see [`Decoder::took`].
    pub fn raw(&self) -> Option<(u64, u64)> {
        self.raw
    }

    /// How far to read in order to get the next message, and hardly anything behind it: a message that has begun
    /// to its end, otherwise as long a one as the last.
    pub fn missing(&self) -> usize {
        let mut word = [0; LENGTH];
        match self.got.get(..LENGTH) {
            None if self.got.is_empty() => self.last.max(LENGTH),
            None => LENGTH - self.got.len(),
            Some(got) => {
                word.copy_from_slice(got);
                let length = (u32::from_ne_bytes(word) & !TOP) as usize;
                (LENGTH + length).saturating_sub(self.got.len())
            }
        }
    }

    /// So many of those have been taken from the stream.
    pub fn took(&mut self, bytes: u64) {
        if let Some((id, left)) = self.raw {
            self.raw = left.checked_sub(bytes).filter(|left| *left > 0).map(|left| (id, left));
        }
    }

    /// Whether the stream may end here.
    pub fn at_boundary(&self) -> bool {
        self.got.is_empty() && self.raw.is_none()
    }

    fn frame(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, WireError> {
        if !self.fill(LENGTH, input) {
            return Ok(None);
        }
        let mut word = [0; LENGTH];
        word.copy_from_slice(&self.got[..LENGTH]);
        let word = u32::from_ne_bytes(word);
        if word & TOP == 0 {
            return Err(WireError::Unexpected("that is no frame of the relay protocol"));
        }
        let length = (word & !TOP) as usize;
        if length > MAX_BODY {
            return Err(WireError::Length(word & !TOP));
        }
        if !self.fill(LENGTH + length, input) {
            return Ok(None);
        }
        self.last = self.got.len();
        let frame = Frame::decode(&self.got[LENGTH..]).map_err(|_| WireError::Malformed("relay frame"));
        self.got.clear();
        frame.map(Some)
    }

    // Fills `got` up to `target` bytes; says whether it is filled.
    fn fill(&mut self, target: usize, input: &mut &[u8]) -> bool {
        let missing = target.saturating_sub(self.got.len()).min(input.len());
        let (head, rest) = input.split_at(missing);
        self.got.extend_from_slice(head);
        *input = rest;
        self.got.len() >= target
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(bytes: &[u8], piece: usize) -> (Vec<Kind>, Vec<u8>) {
        let (mut kinds, mut raw) = (Vec::new(), Vec::new());
        let mut decoder = Decoder::default();
        for mut input in bytes.chunks(piece) {
            while let Some(item) = decoder.next(&mut input).unwrap() {
                match item {
                    Item::Message(kind) => kinds.push(kind),
                    Item::Bytes(id, data) => {
                        assert_eq!(id, 7);
                        raw.extend_from_slice(data);
                    }
                }
            }
        }
        assert!(decoder.at_boundary());
        (kinds, raw)
    }

    #[test]
    fn messages_and_raw_bytes_wherever_they_are_cut() {
        let open = Kind::Open(Open { id: 7, name: b"a".to_vec(), snapshot_id: vec![], open_mode: 1 });
        let data = Kind::Data(Data::new(7, 5));
        let none = Kind::Data(Data::new(7, 0));
        let close = Kind::Close(Close { id: 7, size: 5 });
        let mut bytes = encode(open.clone());
        append(&mut bytes, data.clone());
        bytes.extend(b"12345");
        append(&mut bytes, none.clone());
        append(&mut bytes, close.clone());
        for piece in [1, 2, 3, 1000] {
            let (kinds, raw) = items(&bytes, piece);
            assert_eq!(kinds, [open.clone(), data.clone(), none.clone(), close.clone()]);
            assert_eq!(raw, b"12345");
        }
    }

    #[test]
    fn raw_bytes_that_are_copied_begin_at_a_line() {
        for id in [1, 127, 128, 1 << 20, u64::MAX] {
            for length in [1, 127, 128, 1 << 14, 1 << 18, u32::MAX] {
                let mut out = Vec::new();
                append_data(&mut out, id, length);
                assert_eq!(out.len() % ALIGN, 0, "{id} {length}");
                let mut decoder = Decoder::default();
                let item = decoder.next(&mut &out[..]).unwrap();
                assert!(matches!(item, Some(Item::Message(Kind::Data(data))) if data.length == length));
                assert_eq!(decoder.raw(), Some((id, length.into())));
            }
        }
    }

    #[test]
    fn what_a_newer_minor_version_says_is_skipped() {
        // Field 999, a message; and Close with a field 50.
        let mut bytes = (6u32 | TOP).to_ne_bytes().to_vec();
        bytes.extend([0xba, 0x3e, 3, 1, 2, 3]);
        bytes.extend((9u32 | TOP).to_ne_bytes());
        bytes.extend([0x1a, 7, 8, 7, 16, 5, 0x90, 3, 1]);
        assert_eq!(items(&bytes, 1).0, [Kind::Close(Close { id: 7, size: 5 })]);
    }

    #[test]
    fn greetings() {
        let hello = Hello { major: 1, minor: 9, session: vec![3; 16], ..Hello::default() };
        let bytes = encode_greeting(&hello);
        let mut input = &bytes[..];
        let body = super::super::frame::FrameReader::default().feed(&mut input).unwrap().unwrap();
        let transfer = criu::decode_transfer(&body).unwrap();
        assert!(is_greeting(&transfer) && transfer.size == input.len() as u64);
        assert_eq!(Hello::check(input), Ok(hello.clone()));
        let newer = Hello { major: 2, ..hello.clone() }.encode_to_vec();
        assert!(matches!(Hello::check(&newer), Err(WireError::Version { theirs: 2, .. })));
        assert!(Hello { session: vec![1; 15], ..hello }.checked().is_err());
    }

    #[test]
    fn no_frame_of_this_protocol() {
        let mut decoder = Decoder::default();
        assert!(decoder.next(&mut &5u32.to_ne_bytes()[..]).is_err());
        let long = (MAX_BODY as u32 + 1) | TOP;
        assert!(Decoder::default().next(&mut &long.to_ne_bytes()[..]).is_err());
        let longest = Error::new(28, &"\u{e4}".repeat(9000));
        assert!(encode(Kind::Error(longest)).len() < LENGTH + MAX_BODY);
        let name = vec![b'n'; 4095];
        let open = Open { id: u64::MAX, name: name.clone(), snapshot_id: name, open_mode: 1 };
        assert!(encode(Kind::Open(open)).len() <= LENGTH + MAX_BODY);
    }
}
