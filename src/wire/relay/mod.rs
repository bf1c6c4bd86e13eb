//! The relay peer protocol (proto/relay.proto): framed messages both ways, raw bytes behind `Data`.
//!
//! A frame begins with a word in the host's byte order whose top bit is set, which no legal length of the seed
//! protocol has; the rest of the word is the length of the protobuf message that follows. Every field has a
//! default, and what a newer minor version adds is skipped; what a message needs to make sense is checked by
//! whoever acts on it.

use prost::Message;

mod messages;

pub use messages::*;

use super::criu::{self, Transfer, WriteMode};
use super::frame::{LENGTH, MAX_BODY, fill};
use super::{Key, WireError};

/// The version spoken here. Another major version is an error, another minor one is not.
pub const MAJOR: u32 = 1;
/// See [`MAJOR`].
pub const MINOR: u32 = 2;

/// The minor version from which on nobody is silent: a proxy pings, and a cache says something also to a proxy that
/// waits its turn.
pub const PINGS_SINCE: u32 = 1;

/// The longest time that a cache waits for a proxy whose link was lost, whatever [`Hello::reconnect`] says, in seconds.
pub const RECONNECT_MAX: u32 = 3600;

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

/// The source may go when the images are stored: [`Hello::commit`].
pub const COMMIT_STORED: u32 = 1;
/// The source may go when the copy stands ready to run.
pub const COMMIT_RESTORED: u32 = 2;

/// The minor version from which on a cache knows [`COMMIT_RESTORED`], and tells of its restores.
pub const KNOWS_RESTORED: u32 = 1;

/// [`Restore::state`]: no announced restore waits.
pub const NONE_WAITS: u32 = 0;
/// One waits.
pub const WAITS: u32 = 1;
/// The copy is stopped and may run at once.
pub const PREPARED: u32 = 2;
/// The restore has succeeded.
pub const SUCCEEDED: u32 = 3;
/// It has failed, or its copy has died.
pub const FAILED: u32 = 4;

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

impl Prepare {
    /// So much memory, for page images of these sizes.
    pub fn new(bytes: u64, sizes: &[u64]) -> Self {
        Self { bytes, sizes: super::fold_sizes(sizes) }
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

    /// Its text, for the log: what is no plain character is escaped, but an apostrophe is one.
    pub fn shown(&self) -> String {
        shown(&self.text)
    }
}

/// What a peer has said, for the log: nothing in it can pass for a line of ours. Quotation marks stay as they are.
pub fn shown(text: &[u8]) -> String {
    let shown = |byte: &u8| match byte {
        b'\'' | b'"' => char::from(*byte).to_string(),
        byte => byte.escape_ascii().to_string(),
    };
    text.iter().map(shown).collect()
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
        if !fill(&mut self.got, LENGTH, input) {
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
        if !fill(&mut self.got, LENGTH + length, input) {
            return Ok(None);
        }
        self.last = self.got.len();
        let frame = Frame::decode(&self.got[LENGTH..]).map_err(|_| WireError::Malformed("relay frame"));
        self.got.clear();
        frame.map(Some)
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
        let prepare = Prepare::new(u64::MAX, &[u64::MAX; 5000]);
        assert_eq!((prepare.sizes.len(), Prepare::new(9, &[3, 6]).sizes), (1000, vec![3, 6]));
        assert!(encode(Kind::Prepare(prepare)).len() <= LENGTH + MAX_BODY);
        let many: Vec<u64> = (0..1500).collect();
        assert_eq!(Prepare::new(9, &many).sizes.iter().sum::<u64>(), many.iter().sum());
    }
}
