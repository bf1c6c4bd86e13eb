//! CRIU's messages (proto/criu.proto) and what is checked of them before anything acts on them.
//!
//! prost takes a missing required field for its default value. All of CRIU's fields are required, so
//! they are derived as optional here (the bytes are the same) and their absence is an error. Strings are
//! bytes here (again the same on the wire): CRIU puts paths there, and a path need not be UTF-8.

use prost::Message;

use super::{Key, WireError, frame};

/// Every name and snapshot id is shorter than this, in bytes: Linux's PATH_MAX.
pub const PATH_MAX: usize = 4096;

/// open(2) flags as they stand in open_mode.
const O_RDONLY: u32 = 0;
const O_WRONLY: u32 = 1;
const O_APPEND: u32 = 0o2000;

/// `local_image_entry`: the header of a client of the remote dialect.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct LocalImageEntry {
    /// The image's name.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub name: Option<Vec<u8>>,
    /// The dump it belongs to.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub snapshot_id: Option<Vec<u8>>,
    /// open(2) flags.
    #[prost(uint32, optional, tag = "3")]
    pub open_mode: Option<u32>,
}

/// `local_image_reply_entry`: the answer to a reader of the remote dialect.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct LocalImageReplyEntry {
    /// 0 or an errno.
    #[prost(uint32, optional, tag = "1")]
    pub error: Option<u32>,
}

/// `remote_image_entry`: the header of an image between proxy and cache.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RemoteImageEntry {
    /// The image's name.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub name: Option<Vec<u8>>,
    /// The dump it belongs to.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub snapshot_id: Option<Vec<u8>>,
    /// open(2) flags.
    #[prost(uint32, optional, tag = "3")]
    pub open_mode: Option<u32>,
    /// The image's size in bytes after this transfer.
    #[prost(uint64, optional, tag = "4")]
    pub size: Option<u64>,
}

/// `snapshot_id_entry`: one element of the image `parent`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SnapshotIdEntry {
    /// The id: an images directory as it was typed.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub snapshot_id: Option<Vec<u8>>,
}

/// `img_streamer_request_entry`: a request of the stream dialect.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StreamerRequestEntry {
    /// The image's name.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub filename: Option<Vec<u8>>,
}

/// `img_streamer_reply_entry`: the answer on the restore side of the stream dialect.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StreamerReplyEntry {
    /// Whether the image is here.
    #[prost(bool, optional, tag = "1")]
    pub exists: Option<bool>,
}

/// How an image is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    /// From its end (O_APPEND); creates it where it does not exist.
    Append,
    /// From its beginning (O_WRONLY): what was there goes.
    Truncate,
}

impl WriteMode {
    /// As open(2) flags.
    pub fn flags(self) -> u32 {
        match self {
            Self::Append => O_APPEND,
            Self::Truncate => O_WRONLY,
        }
    }

    /// From the open(2) flags of a writer.
    pub fn from_flags(flags: u32) -> Result<Self, WireError> {
        match flags {
            O_APPEND => Ok(Self::Append),
            O_WRONLY => Ok(Self::Truncate),
            other => Err(WireError::OpenMode(other)),
        }
    }
}

/// What a client of the remote dialect wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// To read an image.
    Read(Key),
    /// To write an image.
    Write(Key, WriteMode),
    /// To say that the dump or the restore is over. From 2019 name and snapshot id are both empty, and
    /// the server just closes; in 2017 they are `DUMP_FINISH` or `RESTORE_FINISH` and `null`, and the
    /// reader among the two takes any answer.
    Finish {
        /// Whether an answer is expected.
        answer: bool,
    },
}

/// The header of a transfer from proxy to cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The image.
    pub key: Key,
    /// How its payload is to be taken.
    pub mode: WriteMode,
    /// The image's size in bytes after the transfer.
    pub size: u64,
}

/// Decodes the header of a client of the remote dialect.
pub fn decode_request(body: &[u8]) -> Result<Request, WireError> {
    const WHAT: WireError = WireError::Malformed("local_image_entry");
    let entry = LocalImageEntry::decode(body).map_err(|_| WHAT)?;
    let name = entry.name.ok_or(WHAT)?;
    let snapshot_id = entry.snapshot_id.ok_or(WHAT)?;
    let mode = entry.open_mode.ok_or(WHAT)?;
    let write = if mode == O_RDONLY { None } else { Some(WriteMode::from_flags(mode)?) };
    if name.is_empty() && snapshot_id.is_empty() {
        return Ok(Request::Finish { answer: false });
    }
    if snapshot_id == b"null" && (name == b"DUMP_FINISH" || name == b"RESTORE_FINISH") {
        return Ok(Request::Finish { answer: write.is_none() });
    }
    let key = checked(snapshot_id, name)?;
    Ok(match write {
        None => Request::Read(key),
        Some(mode) => Request::Write(key, mode),
    })
}

/// Encodes a client's header; the inverse of [`decode_request`] for images. (A fake CRIU needs it.)
pub fn encode_request(key: &Key, write: Option<WriteMode>) -> Vec<u8> {
    frame::encode(&LocalImageEntry {
        name: Some(key.name.to_vec()),
        snapshot_id: Some(key.snapshot_id.to_vec()),
        open_mode: Some(write.map_or(O_RDONLY, WriteMode::flags)),
    })
}

/// The answer to a reader of the remote dialect: `errno` is 0 when the image follows.
pub fn encode_reply(errno: u32) -> Vec<u8> {
    frame::encode(&LocalImageReplyEntry { error: Some(errno) })
}

/// Decodes the header of a transfer.
pub fn decode_transfer(body: &[u8]) -> Result<Transfer, WireError> {
    const WHAT: WireError = WireError::Malformed("remote_image_entry");
    let entry = RemoteImageEntry::decode(body).map_err(|_| WHAT)?;
    let mode = WriteMode::from_flags(entry.open_mode.ok_or(WHAT)?)?;
    let key = checked(entry.snapshot_id.ok_or(WHAT)?, entry.name.ok_or(WHAT)?)?;
    Ok(Transfer { key, mode, size: entry.size.ok_or(WHAT)? })
}

/// Encodes the header of a transfer; the inverse of [`decode_transfer`].
pub fn encode_transfer(transfer: &Transfer) -> Vec<u8> {
    frame::encode(&RemoteImageEntry {
        name: Some(transfer.key.name.to_vec()),
        snapshot_id: Some(transfer.key.snapshot_id.to_vec()),
        open_mode: Some(transfer.mode.flags()),
        size: Some(transfer.size),
    })
}

/// Decodes a request of the stream dialect.
pub fn decode_streamer_request(body: &[u8]) -> Result<Key, WireError> {
    const WHAT: WireError = WireError::Malformed("img_streamer_request_entry");
    let entry = StreamerRequestEntry::decode(body).map_err(|_| WHAT)?;
    checked(Vec::new(), entry.filename.ok_or(WHAT)?)
}

/// Encodes a request of the stream dialect. (A fake CRIU needs it.)
pub fn encode_streamer_request(name: &[u8]) -> Vec<u8> {
    frame::encode(&StreamerRequestEntry { filename: Some(name.to_vec()) })
}

/// The answer on the restore side of the stream dialect.
pub fn encode_streamer_reply(exists: bool) -> Vec<u8> {
    frame::encode(&StreamerReplyEntry { exists: Some(exists) })
}

/// The ids in the image `parent`, oldest first; None where it is not a row of framed ids.
pub fn decode_snapshot_ids(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut ids = Vec::new();
    while !bytes.is_empty() {
        let body = frame::FrameReader::default().feed(&mut bytes).ok()??;
        ids.push(SnapshotIdEntry::decode(&body[..]).ok()?.snapshot_id?);
    }
    Some(ids)
}

/// The name of an image, if it is one that may stand in a directory.
pub fn checked(snapshot_id: Vec<u8>, name: Vec<u8>) -> Result<Key, WireError> {
    // Names come from a socket and may one day become file names: only plain ones get past here.
    let why = if name.is_empty() {
        "is empty"
    } else if name.len() >= PATH_MAX || snapshot_id.len() >= PATH_MAX {
        "is longer than 4095 bytes"
    } else if name.contains(&0) || snapshot_id.contains(&0) {
        "holds a NUL"
    } else if name.contains(&b'/') {
        "holds a slash"
    } else {
        return Ok(Key::new(snapshot_id, name));
    };
    Err(WireError::Name(why, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(name: &[u8], id: &[u8], mode: u32) -> Result<Request, WireError> {
        let entry = LocalImageEntry {
            name: Some(name.to_vec()),
            snapshot_id: Some(id.to_vec()),
            open_mode: Some(mode),
        };
        decode_request(&entry.encode_to_vec())
    }

    #[test]
    fn open_modes() {
        let key = Key::new(*b"dir", *b"core-1.img");
        let read = request(b"core-1.img", b"dir", 0).unwrap();
        assert_eq!(read, Request::Read(key.clone()));
        let write = request(b"core-1.img", b"dir", 1).unwrap();
        assert_eq!(write, Request::Write(key.clone(), WriteMode::Truncate));
        let append = request(b"core-1.img", b"dir", 0o2000).unwrap();
        assert_eq!(append, Request::Write(key, WriteMode::Append));
        for mode in [2, 0o2001, 0o1001, u32::MAX] {
            assert_eq!(request(b"a", b"b", mode), Err(WireError::OpenMode(mode)));
        }
    }

    #[test]
    fn both_spellings_of_finish() {
        assert_eq!(request(b"", b"", 1), Ok(Request::Finish { answer: false }));
        assert_eq!(request(b"", b"", 0), Ok(Request::Finish { answer: false }));
        assert_eq!(request(b"DUMP_FINISH", b"null", 1), Ok(Request::Finish { answer: false }));
        assert_eq!(request(b"RESTORE_FINISH", b"null", 0), Ok(Request::Finish { answer: true }));
        // Only together with its snapshot id is it more than a name.
        assert!(matches!(request(b"DUMP_FINISH", b"x", 1), Ok(Request::Write(..))));
    }

    #[test]
    fn names() {
        for (name, id) in [
            (&b""[..], &b"id"[..]),
            (b"a/b", b"id"),
            (b"a\0b", b"id"),
            (b"a", b"i\0d"),
            (&[b'a'; 4096], b"id"),
            (b"a", &[b'a'; 4096]),
        ] {
            assert!(matches!(request(name, id, 0), Err(WireError::Name(..))), "{name:?}");
        }
        assert!(request(&[b'a'; 4095], &[b'/'; 4095], 0).is_ok());
        assert!(request(b"\xff\xfe", b"/tmp/\xff", 0).is_ok(), "a path need not be UTF-8");
    }

    #[test]
    fn a_missing_field_is_not_a_default() {
        let entry = LocalImageEntry { name: Some(b"a".to_vec()), snapshot_id: None, open_mode: Some(0) };
        assert_eq!(decode_request(&entry.encode_to_vec()), Err(WireError::Malformed("local_image_entry")));
        assert!(decode_request(b"").is_err());
        assert!(decode_transfer(b"").is_err());
        assert!(decode_streamer_request(b"").is_err());
    }

    #[test]
    fn transfers_come_back() {
        let transfer =
            Transfer { key: Key::new(*b"dir", *b"pages-1.img"), mode: WriteMode::Append, size: 5 << 32 };
        let bytes = encode_transfer(&transfer);
        assert_eq!(decode_transfer(&bytes[frame::LENGTH..]), Ok(transfer));
    }

    #[test]
    fn snapshot_ids() {
        let entry = |id: &[u8]| frame::encode(&SnapshotIdEntry { snapshot_id: Some(id.to_vec()) });
        let mut list = entry(b"/pre");
        list.extend(entry(b"/final"));
        assert_eq!(decode_snapshot_ids(&list), Some(vec![b"/pre".to_vec(), b"/final".to_vec()]));
        assert_eq!(decode_snapshot_ids(b""), Some(vec![]));
        assert_eq!(decode_snapshot_ids(&list[..list.len() - 1]), None);
        assert_eq!(decode_snapshot_ids(b"not a list"), None);
    }
}
