//! The control socket (proto/control.proto): one request of CRIU's action script, with pidfds, or of
//! `criu-relay resolve` or `wait`, and the daemon's answer.
//!
//! The fields are derived as optional and the strings as bytes, for the reasons given in
//! [`criu`](super::criu).

use prost::Message;

use super::WireError;
use super::frame::{self, FrameReader};

/// The version spoken; another is refused.
pub const MAJOR: u32 = 1;

/// Grows with what an older daemon may skip, and with actions, which it closes at.
pub const MINOR: u32 = 2;

/// How many pidfds travel with one byte, in all messages but the last. The kernel takes 253.
pub const BATCH: usize = 250;

/// The most processes that a tree may have.
pub const MAX_TASKS: u32 = 1 << 20;

/// The longest text of an answer, in bytes; with all else it fits an object.
pub const MAX_TEXT: usize = 4000;

const STRAY: WireError = WireError::Descriptor("a descriptor where none belongs");
const NO_CRIU: WireError = WireError::Descriptor("a request without the one descriptor of its CRIU");
const BAD_BATCH: WireError = WireError::Descriptor("another number of processes than its request says");
const TOO_MANY: WireError = WireError::Descriptor("a request with more than 1048576 processes");
const BEHIND: WireError = WireError::Unexpected("behind its request");

/// `ControlRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ControlRequest {
    /// [`MAJOR`].
    #[prost(uint32, optional, tag = "1")]
    pub major: Option<u32>,
    /// [`MINOR`].
    #[prost(uint32, optional, tag = "2")]
    pub minor: Option<u32>,
    /// What CRIU calls its action; or a word of ours.
    #[prost(bytes = "vec", optional, tag = "3")]
    pub action: Option<Vec<u8>>,
    /// How many pidfds follow.
    #[prost(uint32, optional, tag = "4")]
    pub tasks: Option<u32>,
    /// Bytes of memory of the tree that is about to be dumped. (Minor version 1.)
    #[prost(uint64, optional, tag = "5")]
    pub memory: Option<u64>,
    /// How many of the processes, the last, are to be stopped anyway. (Minor version 1.)
    #[prost(uint32, optional, tag = "6")]
    pub stays: Option<u32>,
    /// Bytes of each page image that CRIU is about to write, in their order. (Minor version 2.)
    #[prost(uint64, repeated, tag = "7")]
    pub sizes: Vec<u64>,
}

/// `ControlReply`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ControlReply {
    /// 0, or why CRIU is not to go on.
    #[prost(uint32, optional, tag = "1")]
    pub errno: Option<u32>,
    /// The same as a sentence.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub text: Option<Vec<u8>>,
}

/// The actions of CRIU that a daemon hears of, and three that are none of CRIU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// CRIU is about to connect to a streamer socket, for a dump or a restore.
    PreStream,
    /// It is about to freeze a tree.
    PreDump,
    /// It has written every image and is about to decide what becomes of the tree.
    PostDump,
    /// It is about to restore, from a directory or a streamer socket: it has read the inventory. (Minor version 2.)
    PreRestore,
    /// Memory, files and PIDs are restored.
    PostRestore,
    /// The restored tree is about to run.
    PreResume,
    /// Of `criu-relay resolve`: the copy is to run.
    Commit,
    /// Of `criu-relay resolve`: the source is to run.
    Rollback,
    /// Of `criu-relay wait`: whether the dump is complete, once that is known. (Minor version 2.)
    Wait,
}

impl Action {
    const ALL: [Self; 9] = [
        Self::PreStream,
        Self::PreDump,
        Self::PostDump,
        Self::PreRestore,
        Self::PostRestore,
        Self::PreResume,
        Self::Commit,
        Self::Rollback,
        Self::Wait,
    ];

    /// What it is called, by CRIU if it is one of CRIU's.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreStream => "pre-stream",
            Self::PreDump => "pre-dump",
            Self::PostDump => "post-dump",
            Self::PreRestore => "pre-restore",
            Self::PostRestore => "post-restore",
            Self::PreResume => "pre-resume",
            Self::Commit => "commit",
            Self::Rollback => "rollback",
            Self::Wait => "wait",
        }
    }

    /// The inverse of [`Action::name`]; None: one that no daemon hears of.
    pub fn parse(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.name().as_bytes() == name)
    }
}

/// A whole request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<D> {
    /// What CRIU is doing.
    pub action: Action,
    /// A pidfd of CRIU; or of who asks instead.
    pub criu: D,
    /// A pidfd of every process of the tree, where the action has one; at `pre-dump` of its root alone.
    pub tasks: Vec<D>,
    /// Bytes of memory of the tree, at `pre-dump`; 0 otherwise, or when it is not known.
    pub memory: u64,
    /// How many of the processes, the last, are stopped by CRIU, at `pre-resume`: they were when it dumped them, or
    /// were to be.
    pub stays: usize,
    /// How large each page image will be, in bytes, in the order in which they come, at `pre-dump`; empty when that is not
    /// known.
    pub sizes: Vec<u64>,
}

/// Collects the one request of a connection.
#[derive(Debug)]
pub struct Decoder<D>(State<D>);

#[derive(Debug)]
enum State<D> {
    /// The message, with CRIU's pidfd at its last byte.
    Header(FrameReader),
    /// So many processes are still to come.
    Tasks(Request<D>, usize),
    /// The request has been handed out, or was wrong.
    Over,
}

impl<D> Default for Decoder<D> {
    fn default() -> Self {
        Self(State::Header(FrameReader::default()))
    }
}

impl<D> Decoder<D> {
    /// Takes what one recvmsg(2) returned: at least one byte. A receive ends at the byte that carries
    /// descriptors, so that nothing may stand behind it.
    pub fn feed(
        &mut self,
        mut input: &[u8],
        mut descriptors: Vec<D>,
    ) -> Result<Option<Request<D>>, WireError> {
        let (request, missing) = match std::mem::replace(&mut self.0, State::Over) {
            State::Header(mut reader) => {
                let Some(body) = reader.feed(&mut input)? else {
                    if !descriptors.is_empty() {
                        return Err(STRAY);
                    }
                    self.0 = State::Header(reader);
                    return Ok(None);
                };
                let (action, missing, message) = decode_request(&body)?;
                let criu = descriptors.pop().filter(|_| descriptors.is_empty()).ok_or(NO_CRIU)?;
                if !input.is_empty() {
                    return Err(BEHIND);
                }
                let memory = message.memory.unwrap_or(0);
                let stays = (message.stays.unwrap_or(0) as usize).min(missing);
                let sizes = message.sizes;
                (Request { action, criu, tasks: Vec::new(), memory, stays, sizes }, missing)
            }
            State::Tasks(mut request, missing) => {
                let expected = missing.min(BATCH);
                if input != [0] || descriptors.len() != expected {
                    return Err(BAD_BATCH);
                }
                request.tasks.append(&mut descriptors);
                (request, missing - expected)
            }
            State::Over => return Err(BEHIND),
        };
        if missing == 0 {
            return Ok(Some(request));
        }
        self.0 = State::Tasks(request, missing);
        Ok(None)
    }

    /// Whether nothing of a request has come yet.
    pub fn is_idle(&self) -> bool {
        matches!(&self.0, State::Header(reader) if reader.is_empty())
    }
}

// The action, how many pidfds follow, and what else stands there.
fn decode_request(body: &[u8]) -> Result<(Action, usize, ControlRequest), WireError> {
    const WHAT: WireError = WireError::Malformed("ControlRequest");
    let mut request = ControlRequest::decode(body).map_err(|_| WHAT)?;
    // First: of another version nothing else may be understood.
    match request.major.ok_or(WHAT)? {
        MAJOR => {}
        theirs => return Err(WireError::Version { theirs, ours: MAJOR }),
    }
    request.minor.ok_or(WHAT)?;
    let name = request.action.take().ok_or(WHAT)?;
    let tasks = request.tasks.ok_or(WHAT)?;
    let Some(action) = Action::parse(&name) else {
        return Err(WireError::Name("is none of the actions announced here", name));
    };
    if tasks > MAX_TASKS {
        return Err(TOO_MANY);
    }
    Ok((action, tasks as usize, request))
}

/// A request, to be sent with a pidfd of CRIU in one sendmsg(2); then `tasks` pidfds follow. The others are
/// those of [`Request`].
pub fn encode_request(action: Action, tasks: u32, memory: u64, stays: u32, sizes: &[u64]) -> Vec<u8> {
    frame::encode(&ControlRequest {
        major: Some(MAJOR),
        minor: Some(MINOR),
        action: Some(action.name().into()),
        tasks: Some(tasks),
        memory: (memory > 0).then_some(memory),
        stays: (stays > 0).then_some(stays),
        sizes: super::fold_sizes(sizes),
    })
}

/// The answer: 0, or an errno and why. The text is cut off behind [`MAX_TEXT`] bytes.
pub fn encode_reply(errno: u32, text: &str) -> Vec<u8> {
    let fits = |end: &usize| text.is_char_boundary(*end);
    let end = (0..=text.len().min(MAX_TEXT)).rev().find(fits).unwrap_or(0);
    frame::encode(&ControlReply { errno: Some(errno), text: Some(text.as_bytes()[..end].into()) })
}

/// The errno of an answer, and its text.
pub fn decode_reply(body: &[u8]) -> Result<(u32, String), WireError> {
    const WHAT: WireError = WireError::Malformed("ControlReply");
    let reply = ControlReply::decode(body).map_err(|_| WHAT)?;
    let text = reply.text.ok_or(WHAT)?;
    Ok((reply.errno.ok_or(WHAT)?, String::from_utf8_lossy(&text).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Fed = Result<Option<Request<u32>>, WireError>;

    fn feed(decoder: &mut Decoder<u32>, input: &[u8], descriptors: std::ops::Range<u32>) -> Fed {
        decoder.feed(input, descriptors.collect())
    }

    fn message(change: impl FnOnce(&mut ControlRequest)) -> Fed {
        let mut request = ControlRequest {
            major: Some(1),
            minor: Some(0),
            action: Some(b"post-dump".to_vec()),
            tasks: Some(0),
            memory: None,
            stays: None,
            sizes: Vec::new(),
        };
        change(&mut request);
        Decoder::default().feed(&frame::encode(&request), vec![7])
    }

    #[test]
    fn byte_by_byte() {
        let bytes = encode_request(Action::PostDump, 251, 0, 3, &[]);
        let (last, head) = bytes.split_last().unwrap();
        let mut decoder = Decoder::default();
        assert!(decoder.is_idle());
        for byte in head {
            assert_eq!(feed(&mut decoder, &[*byte], 0..0), Ok(None));
            assert!(!decoder.is_idle());
        }
        assert_eq!(feed(&mut decoder, &[*last], 0..1), Ok(None));
        assert_eq!(feed(&mut decoder, &[0], 1..251), Ok(None));
        let request = feed(&mut decoder, &[0], 251..252).unwrap().unwrap();
        assert_eq!((request.action, request.criu), (Action::PostDump, 0));
        assert_eq!((request.tasks, request.stays), ((1..252).collect::<Vec<_>>(), 3));
        assert!(!decoder.is_idle());
        assert_eq!(feed(&mut decoder, &[0], 0..0), Err(BEHIND));
    }

    #[test]
    fn whole() {
        let bytes = encode_request(Action::PreStream, 0, 0, 9, &[1, 1 << 40]);
        let request = feed(&mut Decoder::default(), &bytes, 4..5).unwrap().unwrap();
        assert_eq!(
            request,
            Request {
                action: Action::PreStream,
                criu: 4,
                tasks: vec![],
                memory: 0,
                stays: 0,
                sizes: vec![1, 1 << 40]
            }
        );
        // Nothing comes along with the byte behind which the descriptor is.
        let glued = [&bytes[..], &[0]].concat();
        assert_eq!(feed(&mut Decoder::default(), &glued, 4..5), Err(BEHIND));
    }

    #[test]
    fn wrong_numbers_of_descriptors() {
        let bytes = encode_request(Action::PostDump, 300, 0, 0, &[]);
        assert_eq!(feed(&mut Decoder::default(), &bytes, 0..0), Err(NO_CRIU));
        assert_eq!(feed(&mut Decoder::default(), &bytes, 0..2), Err(NO_CRIU));
        assert_eq!(feed(&mut Decoder::default(), &bytes[..9], 0..1), Err(STRAY));
        for (input, n) in [(&[0][..], 0), (&[0], 249), (&[0], 251), (&[0], 300), (&[1], 250), (&[0, 0], 250)]
        {
            let mut decoder = Decoder::default();
            assert_eq!(feed(&mut decoder, &bytes, 0..1), Ok(None));
            assert_eq!(feed(&mut decoder, input, 0..n), Err(BAD_BATCH), "{input:?} with {n}");
            assert_eq!(feed(&mut decoder, &[0], 0..250), Err(BEHIND), "there is no way back");
        }
        let mut decoder = Decoder::default();
        assert_eq!(feed(&mut decoder, &bytes, 0..1), Ok(None));
        assert_eq!(feed(&mut decoder, &[0], 0..250), Ok(None));
        assert_eq!(feed(&mut decoder, &[0], 0..250), Err(BAD_BATCH), "50 are left");
    }

    #[test]
    fn fields() {
        assert!(message(|_| ()).unwrap().is_some());
        assert!(message(|request| request.minor = Some(9)).unwrap().is_some());
        let other = message(|request| {
            *request = ControlRequest { major: Some(2), ..ControlRequest::default() };
        });
        assert_eq!(other, Err(WireError::Version { theirs: 2, ours: 1 }), "whatever else is there");
        for remove in [
            (|request| request.major = None) as fn(&mut ControlRequest),
            |request| request.minor = None,
            |request| request.action = None,
            |request| request.tasks = None,
        ] {
            assert_eq!(message(remove), Err(WireError::Malformed("ControlRequest")));
        }
        let unknown = message(|request| request.action = Some(b"network-lock".to_vec()));
        assert!(matches!(unknown, Err(WireError::Name(..))));
        assert_eq!(message(|request| request.tasks = Some(MAX_TASKS)), Ok(None));
        assert_eq!(message(|request| request.tasks = Some(MAX_TASKS + 1)), Err(TOO_MANY));
    }

    #[test]
    fn unknown_fields_are_skipped() {
        let mut body = encode_request(Action::PreDump, 0, 7, 0, &[]).split_off(frame::LENGTH);
        // Field 15: 1.
        body.extend([15 << 3, 1]);
        let bytes = [&(body.len() as u32).to_ne_bytes(), &body[..]].concat();
        assert_eq!(feed(&mut Decoder::default(), &bytes, 0..1).unwrap().unwrap().memory, 7);
    }

    #[test]
    fn sizes() {
        let bytes = encode_request(Action::PreDump, u32::MAX >> 12, u64::MAX, 9, &[u64::MAX; 2000]);
        assert!(bytes.len() <= frame::LENGTH + frame::MAX_BODY);
        let bytes = encode_request(Action::PreDump, 0, 7, 0, &[3, 0, 4]);
        assert_eq!(feed(&mut Decoder::default(), &bytes, 0..1).unwrap().unwrap().sizes, [3, 0, 4]);
    }

    #[test]
    fn actions() {
        for action in Action::ALL {
            assert_eq!(Action::parse(action.name().as_bytes()), Some(action));
        }
        assert_eq!(Action::parse(b""), None);
        assert_eq!(Action::parse(b"post-dump\0"), None);
    }

    #[test]
    fn replies() {
        let back = |errno, text: &str| decode_reply(&encode_reply(errno, text)[frame::LENGTH..]).unwrap();
        assert_eq!(back(0, ""), (0, String::new()));
        assert_eq!(back(5, "why"), (5, "why".into()));
        // 3999 bytes, then a character of two.
        let long = "a".repeat(MAX_TEXT - 1) + "\u{e4}";
        assert_eq!(back(1, &long).1.len(), MAX_TEXT - 1);
        assert_eq!(back(1, &long[1..]).1, long[1..]);
        assert!(encode_reply(u32::MAX, &long).len() <= frame::LENGTH + frame::MAX_BODY);
        assert!(decode_reply(b"").is_err());
        let no_text = ControlReply { errno: Some(1), text: None };
        assert!(decode_reply(&no_text.encode_to_vec()).is_err());
    }
}
