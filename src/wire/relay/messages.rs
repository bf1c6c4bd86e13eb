//! The messages of proto/relay.proto.

use prost::{Message, Oneof};

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

/// `Open`: An image, or more of one, begins. Ids count up from 1 and are never used twice on a link, nor in a session.
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

/// `Prepare`: This much memory will be needed. 0: none any more.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Prepare {
    /// Bytes.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
    /// Of the page images, in the order in which they come. (Minor version 2.)
    #[prost(uint64, repeated, tag = "2")]
    pub sizes: Vec<u64>,
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

/// `Prepared`: Answer to Prepare, to each in turn: so much of it is there.
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

/// `Restore`: No announced restore waits (0); one does (1); its copy stands ready (2); it has succeeded (3) or
/// failed (4).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Restore {
    /// State.
    #[prost(uint32, tag = "1")]
    pub state: u32,
    /// Why it failed.
    #[prost(bytes = "vec", tag = "2")]
    pub text: Vec<u8>,
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

/// `Holding`: Answer to Resume: what is held of each transfer; the last one has `last` set. An id of 0: nothing.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Holding {
    /// Id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Bytes of the transfer, from its beginning.
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
