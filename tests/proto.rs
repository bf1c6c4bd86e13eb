//! The messages derived in src/wire/criu.rs are those of proto/criu.proto.
//!
//! Names, numbers, types and labels of the .proto are compared with a table. What the Rust side makes of
//! them shows on the wire: every message is encoded with all its fields set, taken apart without
//! knowledge of it, and compared with the descriptor; and the same bytes made from the descriptor decode to
//! the same message.

use std::path::Path;

use criu_relay::wire::criu::{
    LocalImageEntry, LocalImageReplyEntry, RemoteImageEntry, SnapshotIdEntry, StreamerReplyEntry,
    StreamerRequestEntry,
};
use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto};

/// What stands on the wire for one field.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Varint(u64),
    Bytes(Vec<u8>),
    /// A wire type that no message of CRIU has here.
    Other(u64),
}

/// The value given to a field, the same for both sides. The number makes equal types tell apart.
fn text(number: i32) -> Vec<u8> {
    format!("field {number} \u{e4}").into_bytes()
}

fn sample(field: &FieldDescriptorProto) -> Value {
    match field.r#type() {
        Type::String | Type::Bytes => Value::Bytes(text(field.number())),
        // All ones: a signed or a zigzag field would have other bytes.
        Type::Uint32 => Value::Varint(u32::MAX.into()),
        Type::Uint64 => Value::Varint(u64::MAX),
        Type::Bool => Value::Varint(1),
        other => panic!("{}: no message here has a field of type {other:?}", field.name()),
    }
}

type Decodes = Box<dyn Fn(&[u8]) -> bool>;

/// One message as the Rust side has it.
struct Derived {
    name: &'static str,
    fields: &'static [(i32, &'static str, Type)],
    bytes: Vec<u8>,
    /// Whether these bytes decode to the value that `bytes` was made from.
    decodes: Decodes,
}

fn derived<M>(name: &'static str, fields: &'static [(i32, &'static str, Type)], value: M) -> Derived
where
    M: Message + Default + PartialEq + 'static,
{
    let bytes = value.encode_to_vec();
    Derived { name, fields, bytes, decodes: Box::new(move |bytes| M::decode(bytes).as_ref() == Ok(&value)) }
}

// Every field is named and there is no `..`: a field more or less, or of another type, does not compile.
fn all() -> Vec<Derived> {
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

fn proto() -> FileDescriptorProto {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let mut set = protox::compile(["criu.proto"], [dir]).expect("proto/criu.proto compiles");
    assert_eq!(set.file.len(), 1, "it imports nothing");
    set.file.remove(0)
}

fn message<'a>(file: &'a FileDescriptorProto, name: &str) -> &'a DescriptorProto {
    file.message_type
        .iter()
        .find(|message| message.name() == name)
        .unwrap_or_else(|| panic!("proto/criu.proto has no message {name}"))
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

fn put_together(message: &DescriptorProto) -> Vec<u8> {
    let mut out = Vec::new();
    for field in &message.field {
        let number = field.number() as u64;
        match sample(field) {
            Value::Varint(n) => {
                put_varint(&mut out, number << 3);
                put_varint(&mut out, n);
            }
            Value::Bytes(bytes) => {
                put_varint(&mut out, number << 3 | 2);
                put_varint(&mut out, bytes.len() as u64);
                out.extend(bytes);
            }
            Value::Other(_) => unreachable!("no sample has it"),
        }
    }
    out
}

#[test]
fn every_message_is_on_both_sides() {
    let file = proto();
    assert_eq!((file.package(), file.syntax.as_deref().unwrap_or("proto2")), ("criu", "proto2"));
    assert!(file.enum_type.is_empty() && file.extension.is_empty());
    let mut there: Vec<_> = file.message_type.iter().map(DescriptorProto::name).collect();
    let derived = all();
    let mut here: Vec<_> = derived.iter().map(|message| message.name).collect();
    there.sort_unstable();
    here.sort_unstable();
    assert_eq!(there, here);
    let source = include_str!("../src/wire/criu.rs");
    let in_source = source.lines().filter(|line| line.contains("derive(") && line.contains("Message)"));
    assert_eq!(in_source.count(), here.len(), "a message in src/wire/criu.rs that this test does not know");
}

#[test]
fn the_proto_is_as_the_table_says() {
    let file = proto();
    for Derived { name, fields, .. } in all() {
        let message = message(&file, name);
        let said: Vec<_> =
            message.field.iter().map(|field| (field.number(), field.name(), field.r#type())).collect();
        assert_eq!(said, fields, "{name}");
        for field in &message.field {
            assert_eq!(field.label(), Label::Required, "{name}.{}", field.name());
            assert!(field.default_value.is_none() && field.oneof_index.is_none());
        }
        assert!(message.nested_type.is_empty() && message.enum_type.is_empty());
        assert!(message.extension.is_empty() && message.extension_range.is_empty());
    }
}

#[test]
fn the_bytes_are_as_the_proto_says() {
    let file = proto();
    for Derived { name, bytes, decodes, .. } in all() {
        let message = message(&file, name);
        let expected: Vec<_> = message.field.iter().map(|field| (field.number(), sample(field))).collect();
        assert_eq!(take_apart(&bytes), expected, "{name}: what Rust encodes");
        let theirs = put_together(message);
        assert_eq!(bytes, theirs, "{name}: byte for byte");
        assert!(decodes(&theirs), "{name}: what Rust decodes");
    }
}
