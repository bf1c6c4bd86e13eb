//! The messages derived in src/wire are those of proto/*.proto.
//!
//! Names, numbers, types and labels of the .proto are compared with a table. What the Rust side makes of
//! them shows on the wire: every message is encoded with all its fields set, taken apart without
//! knowledge of it, and compared with the descriptor; and the same bytes made from the descriptor decode to
//! the same message. A message that is a choice of others is encoded once for each of them.

use std::path::Path;

use criu_relay::wire::control::{ControlReply, ControlRequest};
use criu_relay::wire::criu::{
    LocalImageEntry, LocalImageReplyEntry, RemoteImageEntry, SnapshotIdEntry, StreamerReplyEntry,
    StreamerRequestEntry,
};
use criu_relay::wire::relay;
use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto};

/// What stands on the wire for one field.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Varint(u64),
    Bytes(Vec<u8>),
    /// A wire type that no message has here.
    Other(u64),
}

/// The value given to a field, the same for both sides. The number makes equal types tell apart.
fn text(number: i32) -> Vec<u8> {
    format!("field {number} \u{e4}").into_bytes()
}

/// The values of a repeated field, which is packed.
const NUMBERS: [u64; 3] = [u64::MAX, 0, 300];

fn sample(file: &FileDescriptorProto, field: &FieldDescriptorProto) -> Value {
    match field.r#type() {
        Type::Uint64 if field.label() == Label::Repeated => {
            let mut packed = Vec::new();
            NUMBERS.iter().for_each(|number| put_varint(&mut packed, *number));
            Value::Bytes(packed)
        }
        Type::Message => Value::Bytes(put_together(file, message(file, referred(file, field)), None)),
        Type::String | Type::Bytes => Value::Bytes(text(field.number())),
        // All ones: a signed or a zigzag field would have other bytes.
        Type::Uint32 => Value::Varint(u32::MAX.into()),
        Type::Uint64 => Value::Varint(u64::MAX),
        Type::Bool => Value::Varint(1),
        other => panic!("{}: no message here has a field of type {other:?}", field.name()),
    }
}

type Decodes = Box<dyn Fn(&[u8]) -> bool>;

type Fields = &'static [(i32, &'static str, Type)];

/// One message as the Rust side has it.
struct Derived {
    name: &'static str,
    fields: Fields,
    samples: Vec<Sample>,
    /// Whether these bytes decode to the value in which nothing is set.
    decodes_to_default: Decodes,
}

/// A value of it.
struct Sample {
    /// In a choice, the field that is set, and the message that it holds. None: all are set.
    arm: Option<(i32, &'static str)>,
    bytes: Vec<u8>,
    /// Whether these bytes decode to the value that `bytes` was made from.
    decodes: Decodes,
}

fn derived<M>(name: &'static str, fields: Fields, value: M) -> Derived
where
    M: Message + Default + PartialEq + 'static,
{
    choice(name, fields, vec![(None, value)])
}

fn choice<M>(name: &'static str, fields: Fields, values: Vec<(Option<(i32, &'static str)>, M)>) -> Derived
where
    M: Message + Default + PartialEq + 'static,
{
    let sample = |(arm, value): (_, M)| Sample {
        arm,
        bytes: value.encode_to_vec(),
        decodes: Box::new(move |bytes| M::decode(bytes).as_ref() == Ok(&value)),
    };
    Derived {
        name,
        fields,
        samples: values.into_iter().map(sample).collect(),
        decodes_to_default: Box::new(|bytes| M::decode(bytes) == Ok(M::default())),
    }
}

/// A .proto with what belongs to it on the Rust side.
struct File {
    name: &'static str,
    syntax: &'static str,
    package: &'static str,
    source: &'static str,
    derived: Vec<Derived>,
}

fn files() -> [File; 3] {
    [
        File {
            name: "criu.proto",
            syntax: "proto2",
            package: "criu",
            source: include_str!("../src/wire/criu.rs"),
            derived: criu(),
        },
        File {
            name: "control.proto",
            syntax: "proto2",
            package: "criu_relay",
            source: include_str!("../src/wire/control.rs"),
            derived: control(),
        },
        File {
            name: "relay.proto",
            syntax: "proto3",
            package: "criu_relay",
            source: include_str!("../src/wire/relay/messages.rs"),
            derived: relay(),
        },
    ]
}

// Every field is named and there is no `..`: a field more or less, or of another type, does not compile.
fn control() -> Vec<Derived> {
    vec![
        derived(
            "ControlRequest",
            &[
                (1, "major", Type::Uint32),
                (2, "minor", Type::Uint32),
                (3, "action", Type::String),
                (4, "tasks", Type::Uint32),
                (5, "memory", Type::Uint64),
                (6, "stays", Type::Uint32),
                (7, "sizes", Type::Uint64),
            ],
            ControlRequest {
                major: Some(u32::MAX),
                minor: Some(u32::MAX),
                action: Some(text(3)),
                tasks: Some(u32::MAX),
                memory: Some(u64::MAX),
                stays: Some(u32::MAX),
                sizes: NUMBERS.to_vec(),
            },
        ),
        derived(
            "ControlReply",
            &[(1, "errno", Type::Uint32), (2, "text", Type::String)],
            ControlReply { errno: Some(u32::MAX), text: Some(text(2)) },
        ),
    ]
}

fn criu() -> Vec<Derived> {
    vec![
        derived(
            "local_image_entry",
            &[(1, "name", Type::String), (2, "snapshot_id", Type::String), (3, "open_mode", Type::Uint32)],
            LocalImageEntry { name: Some(text(1)), snapshot_id: Some(text(2)), open_mode: Some(u32::MAX) },
        ),
        derived(
            "local_image_reply_entry",
            &[(1, "error", Type::Uint32)],
            LocalImageReplyEntry { error: Some(u32::MAX) },
        ),
        derived(
            "remote_image_entry",
            &[
                (1, "name", Type::String),
                (2, "snapshot_id", Type::String),
                (3, "open_mode", Type::Uint32),
                (4, "size", Type::Uint64),
            ],
            RemoteImageEntry {
                name: Some(text(1)),
                snapshot_id: Some(text(2)),
                open_mode: Some(u32::MAX),
                size: Some(u64::MAX),
            },
        ),
        derived(
            "snapshot_id_entry",
            &[(1, "snapshot_id", Type::String)],
            SnapshotIdEntry { snapshot_id: Some(text(1)) },
        ),
        derived(
            "img_streamer_request_entry",
            &[(1, "filename", Type::String)],
            StreamerRequestEntry { filename: Some(text(1)) },
        ),
        derived(
            "img_streamer_reply_entry",
            &[(1, "exists", Type::Bool)],
            StreamerReplyEntry { exists: Some(true) },
        ),
    ]
}

macro_rules! value {
    (Numbers $number:literal) => {
        NUMBERS.to_vec()
    };
    (Uint32 $number:literal) => {
        u32::MAX
    };
    (Uint64 $number:literal) => {
        u64::MAX
    };
    (Bool $number:literal) => {
        true
    };
    ($text:ident $number:literal) => {
        text($number)
    };
}

macro_rules! kind {
    (Numbers) => {
        Type::Uint64
    };
    ($type:ident) => {
        Type::$type
    };
}

/// The messages, and the frame that is one of them: each has its number there and its name.
macro_rules! frame {
    ($($arm:literal $in_frame:ident $message:ident { $($field:ident: $type:ident = $number:literal),* })*) => {
        fn relay() -> Vec<Derived> {
            // As above, nothing may be left out.
            $(let $in_frame = || relay::$message { $($field: value!($type $number)),* };)*
            fn is_one(kind: &relay::Kind) -> bool {
                match kind {
                    $(relay::Kind::$message(_) => true),*
                }
            }
            let frame = |kind| {
                assert!(is_one(&kind));
                relay::Frame { kind: Some(kind) }
            };
            let mut all = vec![$(derived(
                stringify!($message),
                &[$(($number, stringify!($field), kind!($type))),*],
                $in_frame(),
            )),*];
            all.push(choice(
                "Frame",
                &[$(($arm, stringify!($in_frame), Type::Message)),*],
                vec![$((
                    Some(($arm, stringify!($message))),
                    frame(relay::Kind::$message($in_frame())),
                )),*],
            ));
            all
        }
    };
}

frame! {
    1 open Open { id: Uint64 = 1, name: String = 2, snapshot_id: String = 3, open_mode: Uint32 = 4 }
    2 data Data { id: Uint64 = 1, length: Uint32 = 2, pad: Bytes = 3 }
    3 close Close { id: Uint64 = 1, size: Uint64 = 2 }
    4 abort Abort { id: Uint64 = 1 }
    5 prepare Prepare { bytes: Uint64 = 1, sizes: Numbers = 2 }
    6 finished Finished { images: Uint64 = 1, bytes: Uint64 = 2 }
    7 release Release { session: Bytes = 1 }
    8 rollback Rollback { session: Bytes = 1 }
    9 resume Resume { session: Bytes = 1, run: Bytes = 2 }
    10 ping Ping { token: Uint64 = 1 }
    11 hello Hello {
        major: Uint32 = 1, minor: Uint32 = 2, session: Bytes = 3, scripted: Bool = 4, commit: Uint32 = 5,
        reconnect: Uint32 = 6, tls: Bool = 7
    }
    12 settled Settled { session: Bytes = 1 }
    20 ack Ack { id: Uint64 = 1, bytes: Uint64 = 2 }
    21 stored Stored { id: Uint64 = 1, size: Uint64 = 2 }
    22 prepared Prepared { bytes: Uint64 = 1 }
    23 all_stored AllStored { images: Uint64 = 1, bytes: Uint64 = 2 }
    24 restore Restore { state: Uint32 = 1, text: Bytes = 2 }
    25 released Released { session: Bytes = 1 }
    26 rolled_back RolledBack { session: Bytes = 1 }
    27 holding Holding { id: Uint64 = 1, size: Uint64 = 2, complete: Bool = 3, last: Bool = 4 }
    28 error Error { errno: Uint32 = 1, text: String = 2 }
    29 pong Pong { token: Uint64 = 1 }
    30 welcome Welcome {
        major: Uint32 = 1, minor: Uint32 = 2, run: Bytes = 3, memory_limit: Uint64 = 4,
        restore_waits: Bool = 5
    }
}

fn compile(name: &str) -> FileDescriptorProto {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let mut set = protox::compile([name], [dir]).unwrap_or_else(|error| panic!("proto/{name}: {error}"));
    assert_eq!(set.file.len(), 1, "it imports nothing");
    set.file.remove(0)
}

fn message<'a>(file: &'a FileDescriptorProto, name: &str) -> &'a DescriptorProto {
    file.message_type
        .iter()
        .find(|message| message.name() == name)
        .unwrap_or_else(|| panic!("proto/{} has no message {name}", file.name()))
}

/// The message that a field holds.
fn referred<'a>(file: &FileDescriptorProto, field: &'a FieldDescriptorProto) -> &'a str {
    let name = field.type_name().strip_prefix('.').and_then(|name| name.strip_prefix(file.package()));
    name.and_then(|name| name.strip_prefix('.')).expect("a message of the same file")
}

fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn take_varint(input: &mut &[u8]) -> u64 {
    let mut n = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = input.split_first().expect("a varint ends");
        *input = rest;
        n |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return n;
        }
    }
    panic!("a varint has at most ten bytes");
}

/// The fields in the order in which they stand in a message.
fn take_apart(mut input: &[u8]) -> Vec<(i32, Value)> {
    let mut fields = Vec::new();
    while !input.is_empty() {
        let tag = take_varint(&mut input);
        let value = match tag & 7 {
            0 => Value::Varint(take_varint(&mut input)),
            2 => {
                let len = take_varint(&mut input) as usize;
                let (bytes, rest) = input.split_at(len);
                input = rest;
                Value::Bytes(bytes.to_vec())
            }
            other => {
                // Nothing behind it can be understood; the comparison fails either way.
                input = &[];
                Value::Other(other)
            }
        };
        fields.push(((tag >> 3) as i32, value));
    }
    fields
}

fn put(out: &mut Vec<u8>, number: i32, value: Value) {
    let number = number as u64;
    match value {
        Value::Varint(n) => {
            put_varint(out, number << 3);
            put_varint(out, n);
        }
        Value::Bytes(bytes) => {
            put_varint(out, number << 3 | 2);
            put_varint(out, bytes.len() as u64);
            out.extend(bytes);
        }
        Value::Other(_) => unreachable!("no sample has it"),
    }
}

/// The fields that are set in a sample.
fn set(message: &DescriptorProto, only: Option<i32>) -> impl Iterator<Item = &FieldDescriptorProto> {
    message.field.iter().filter(move |field| only.is_none_or(|number| field.number() == number))
}

fn put_together(file: &FileDescriptorProto, message: &DescriptorProto, only: Option<i32>) -> Vec<u8> {
    let mut out = Vec::new();
    for field in set(message, only) {
        put(&mut out, field.number(), sample(file, field));
    }
    out
}

#[test]
fn every_message_is_on_both_sides() {
    for File { name, syntax, package, source, derived } in files() {
        let file = compile(name);
        assert_eq!((file.package(), file.syntax.as_deref().unwrap_or("proto2")), (package, syntax));
        assert!(file.enum_type.is_empty() && file.extension.is_empty());
        let mut there: Vec<_> = file.message_type.iter().map(DescriptorProto::name).collect();
        let mut here: Vec<_> = derived.iter().map(|message| message.name).collect();
        there.sort_unstable();
        here.sort_unstable();
        assert_eq!(there, here);
        let in_source = source.lines().filter(|line| line.contains("derive(") && line.contains("Message)"));
        assert_eq!(in_source.count(), here.len(), "{name}: Rust has a message that this test does not know");
    }
}

#[test]
fn every_proto_is_compared() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let mut there: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let mut here = files().map(|file| file.name);
    there.sort_unstable();
    here.sort_unstable();
    assert_eq!(there, here);
}

#[test]
fn the_proto_is_as_the_table_says() {
    for File { name, syntax, derived, .. } in files() {
        let file = compile(name);
        let label = if syntax == "proto2" { Label::Required } else { Label::Optional };
        for Derived { name, fields, samples, .. } in derived {
            let message = message(&file, name);
            let said: Vec<_> =
                message.field.iter().map(|field| (field.number(), field.name(), field.r#type())).collect();
            assert_eq!(said, fields, "{name}");
            // Either all fields are one choice, or there is none.
            let arms: Vec<_> = samples.iter().filter_map(|sample| sample.arm).collect();
            assert_eq!(message.oneof_decl.len(), usize::from(!arms.is_empty()), "{name}");
            for field in &message.field {
                // What a later minor version has added may be absent.
                let added = name == "ControlRequest" && matches!(field.name(), "memory" | "stays");
                let label = match field.name() {
                    "sizes" => Label::Repeated,
                    _ if added => Label::Optional,
                    _ => label,
                };
                assert_eq!(field.label(), label, "{name}.{}", field.name());
                assert!(field.default_value.is_none() && !field.proto3_optional());
                assert_eq!(field.oneof_index, message.oneof_decl.first().map(|_| 0));
            }
            let chosen = message.field.iter().filter(|field| field.oneof_index.is_some());
            let chosen: Vec<_> = chosen.map(|field| (field.number(), referred(&file, field))).collect();
            assert_eq!(chosen, arms, "{name}");
            assert!(message.nested_type.is_empty() && message.enum_type.is_empty());
            assert!(message.extension.is_empty() && message.extension_range.is_empty());
        }
    }
}

#[test]
fn the_bytes_are_as_the_proto_says() {
    for File { name, derived, .. } in files() {
        let file = compile(name);
        for Derived { name, samples, .. } in derived {
            let message = message(&file, name);
            for Sample { arm, bytes, decodes } in samples {
                let only = arm.map(|(number, _)| number);
                let expected: Vec<_> =
                    set(message, only).map(|field| (field.number(), sample(&file, field))).collect();
                assert_eq!(take_apart(&bytes), expected, "{name} {arm:?}: what Rust encodes");
                let theirs = put_together(&file, message, only);
                assert_eq!(bytes, theirs, "{name} {arm:?}: byte for byte");
                assert!(decodes(&theirs), "{name} {arm:?}: what Rust decodes");
            }
        }
    }
}

#[test]
fn zero_is_absent_in_proto3_only() {
    for File { name, syntax, derived, .. } in files() {
        let file = compile(name);
        for Derived { name, decodes_to_default, .. } in derived {
            assert!(decodes_to_default(&[]), "{name}");
            for field in &message(&file, name).field {
                let (zero, absent) = match field.r#type() {
                    // Whether an empty one is there makes a difference: which it is.
                    Type::Message => (Value::Bytes(Vec::new()), false),
                    _ if field.label() == Label::Repeated => (Value::Bytes(Vec::new()), true),
                    Type::String | Type::Bytes => (Value::Bytes(Vec::new()), syntax == "proto3"),
                    _ => (Value::Varint(0), syntax == "proto3"),
                };
                let mut bytes = Vec::new();
                put(&mut bytes, field.number(), zero);
                assert_eq!(decodes_to_default(&bytes), absent, "{name}.{}", field.name());
            }
        }
    }
}
