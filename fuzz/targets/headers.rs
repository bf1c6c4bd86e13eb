//! The frame reader and every header decoder. Input: the cuts (a piece), then the bytes.
#![no_main]

use criu_relay::wire::criu::{self, Request, SnapshotIdEntry, Transfer};
use criu_relay::wire::frame::{self, FrameReader, LENGTH, MAX_BODY};
use criu_relay::wire::{Key, WireError};
use criu_relay_fuzz::{Input, cut};
use libfuzzer_sys::fuzz_target;

/// What a connection made of objects yields: the bodies, whether it ended inside one, and the error.
type Frames = (Vec<Vec<u8>>, bool, Option<WireError>);

fn frames(pieces: &[&[u8]]) -> Frames {
    let (mut reader, mut bodies) = (FrameReader::default(), Vec::new());
    for mut input in pieces.iter().copied() {
        while !input.is_empty() {
            let before = input.len();
            match reader.feed(&mut input) {
                Ok(Some(body)) => {
                    assert!(reader.is_empty() && (1..=MAX_BODY).contains(&body.len()));
                    bodies.push(body);
                }
                Ok(None) => assert!(input.is_empty() && !reader.is_empty(), "it took all it was given"),
                Err(error) => return (bodies, true, Some(error)),
            }
            assert!(input.len() < before, "it makes progress");
        }
    }
    (bodies, !reader.is_empty(), None)
}

// A message that we have encoded is one object; this is its body.
fn body(object: &[u8]) -> Vec<u8> {
    let (mut bodies, inside, error) = frames(&[object]);
    assert!(!inside && error.is_none() && bodies.len() == 1, "what is taken can be passed on");
    bodies.remove(0)
}

fn plain(key: &Key) {
    assert!((1..criu::PATH_MAX).contains(&key.name.len()) && key.snapshot_id.len() < criu::PATH_MAX);
    assert!(!key.name.contains(&b'/') && !key.name.contains(&0) && !key.snapshot_id.contains(&0));
    assert!(!key.to_string().chars().any(char::is_control), "it can stand in a log");
}

// `x` was decoded from bytes which the program has not made itself: it survives a round trip, and the
// bytes of the second encoding are those of the first.
fn round_trip<T: PartialEq + std::fmt::Debug>(
    x: &T,
    encode: impl Fn(&T) -> Vec<u8>,
    decode: impl Fn(&[u8]) -> Option<T>,
) {
    let first = encode(x);
    let again = decode(&first).expect("what we encode can be decoded");
    assert_eq!(&again, x);
    assert_eq!(encode(&again), first);
}

fn said<T>(result: Result<T, WireError>) -> Option<T> {
    result.inspect_err(|error| assert!(!error.to_string().chars().any(char::is_control))).ok()
}

fn decoders(bytes: &[u8]) {
    match said(criu::decode_request(bytes)) {
        None | Some(Request::Finish { .. }) => {}
        Some(request) => {
            let (Request::Read(key) | Request::Write(key, _)) = &request else { unreachable!() };
            plain(key);
            let encode = |request: &Request| match request {
                Request::Read(key) => criu::encode_request(key, None),
                Request::Write(key, mode) => criu::encode_request(key, Some(*mode)),
                Request::Finish { .. } => panic!("an image has become a finish"),
            };
            round_trip(&request, encode, |object| criu::decode_request(&body(object)).ok());
        }
    }
    if let Some(transfer) = said(criu::decode_transfer(bytes)) {
        plain(&transfer.key);
        let decode = |object: &[u8]| criu::decode_transfer(&body(object)).ok();
        round_trip::<Transfer>(&transfer, criu::encode_transfer, decode);
    }
    if let Some(key) = said(criu::decode_streamer_request(bytes)) {
        plain(&key);
        assert!(key.snapshot_id.is_empty());
        let encode = |key: &Key| criu::encode_streamer_request(&key.name);
        round_trip(&key, encode, |object| criu::decode_streamer_request(&body(object)).ok());
    }
    if let Some(ids) = criu::decode_snapshot_ids(bytes) {
        let encode = |ids: &Vec<Vec<u8>>| {
            let entry = |id: &Vec<u8>| frame::encode(&SnapshotIdEntry { snapshot_id: Some(id.clone()) });
            ids.iter().flat_map(entry).collect()
        };
        round_trip(&ids, encode, criu::decode_snapshot_ids);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let cuts = input.piece();
    let bytes = input.rest();

    let whole = frames(&[bytes]);
    assert_eq!(whole, frames(&cut(bytes, cuts)), "the cuts make no difference");
    assert_eq!(whole, frames(&cut(bytes, &[1])));
    let taken: Vec<u8> =
        whole.0.iter().flat_map(|body| [&(body.len() as u32).to_ne_bytes(), &body[..]].concat()).collect();
    assert!(bytes.starts_with(&taken), "bodies are what was sent");
    match &whole.2 {
        Some(WireError::Length(n)) => assert_eq!(bytes[taken.len()..][..LENGTH], n.to_ne_bytes()),
        Some(other) => panic!("a frame knows nothing of {other}"),
        None => assert_eq!(whole.1, taken.len() < bytes.len()),
    }

    decoders(bytes);
    for body in &whole.0 {
        decoders(body);
    }
});
