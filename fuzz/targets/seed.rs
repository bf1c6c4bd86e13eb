//! The decoder of the seed protocol against a model of what a receiver holds. Input: the cuts (a piece),
//! then operations, which make the stream: 0 raw bytes; 1 a transfer whose announced size and payload are
//! what the input says; 2 an append, 3 an overwrite, 4 an empty transfer, all three as they should be.
#![no_main]

use std::collections::HashMap;

use criu_relay::wire::criu::{self, Transfer, WriteMode};
use criu_relay::wire::seed::{Decoder, Item};
use criu_relay::wire::{Key, WireError};
use criu_relay_fuzz::{Input, cut};
use libfuzzer_sys::fuzz_target;

type Images = HashMap<Key, Vec<u8>>;

/// Every transfer with the payload that came, and whether its end came; what is held at the end; whether
/// the stream may end there; the error.
type Received = (Vec<(Transfer, Vec<u8>, bool)>, Images, bool, Option<WireError>);

fn receive(pieces: &[&[u8]]) -> Received {
    let (mut transfers, mut images) = (Vec::<(Transfer, Vec<u8>, bool)>::new(), Images::new());
    // What the current image has to have at its end.
    let mut announced = None;
    let mut decoder = Decoder::default();
    for mut input in pieces.iter().copied() {
        loop {
            let held = |key: &Key| images.get(key).map_or(0, |image| image.len() as u64);
            match decoder.next(&mut input, held) {
                Ok(None) => {
                    assert!(input.is_empty(), "it stops only where it has nothing left");
                    break;
                }
                Ok(Some(Item::Begin(transfer))) => {
                    assert_eq!(announced, None, "one image at a time");
                    assert!(!decoder.at_boundary());
                    let image = images.entry(transfer.key.clone()).or_default();
                    match transfer.mode {
                        WriteMode::Truncate => image.clear(),
                        WriteMode::Append if transfer.size == 0 => {}
                        WriteMode::Append => assert!(image.len() as u64 <= transfer.size),
                    }
                    let size = match transfer.mode {
                        WriteMode::Append => transfer.size.max(image.len() as u64),
                        WriteMode::Truncate => transfer.size,
                    };
                    announced = Some(size);
                    transfers.push((transfer, Vec::new(), false));
                }
                Ok(Some(Item::Data(data))) => {
                    let (transfer, payload, _) = transfers.last_mut().expect("data belongs to an image");
                    let image = images.get_mut(&transfer.key).unwrap();
                    image.extend(data);
                    payload.extend(data);
                    assert!(!data.is_empty() && !decoder.at_boundary());
                    assert!(image.len() as u64 <= announced.expect("data comes between begin and end"));
                }
                Ok(Some(Item::End)) => {
                    let (transfer, _, ended) = transfers.last_mut().unwrap();
                    assert_eq!(images[&transfer.key].len() as u64, announced.take().unwrap());
                    assert!(!std::mem::replace(ended, true) && decoder.at_boundary());
                }
                Err(error) => {
                    assert_eq!(announced, None, "only a header can be wrong");
                    if let WireError::Shrinks { key, size, held } = &error {
                        assert!(size < held && images[key].len() as u64 == *held);
                    }
                    return (transfers, images, false, Some(error));
                }
            }
        }
    }
    let boundary = decoder.at_boundary();
    assert!(announced.is_none() || !boundary);
    (transfers, images, boundary, None)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let cuts = input.piece();
    let (mut stream, mut expected, mut honest) = (Vec::new(), Images::new(), true);
    while let Some(operation) = input.byte() {
        if operation % 5 == 0 {
            stream.extend(input.piece());
            honest = false;
            continue;
        }
        let which = input.small();
        let key = Key::new(&b"dir"[..usize::from(which / 4 % 4)], [b'a' + which % 4]);
        let mut send = |mode, size, payload: &[u8]| {
            stream.extend(criu::encode_transfer(&Transfer { key: key.clone(), mode, size }));
            stream.extend(payload);
        };
        match operation % 5 {
            1 => {
                let mode = if which >= 128 { WriteMode::Truncate } else { WriteMode::Append };
                let size = u64::from(input.number()) << if which & 64 == 0 { 0 } else { 48 };
                send(mode, size, input.piece());
                honest = false;
            }
            2 => {
                let (payload, image) = (input.piece(), expected.entry(key.clone()).or_default());
                image.extend(payload);
                send(WriteMode::Append, image.len() as u64, payload);
            }
            3 => {
                let payload = input.piece();
                expected.insert(key.clone(), payload.to_vec());
                send(WriteMode::Truncate, payload.len() as u64, payload);
            }
            _ => {
                expected.entry(key.clone()).or_default();
                send(WriteMode::Append, 0, b"");
            }
        }
    }
    let whole = receive(&[&stream]);
    assert_eq!(whole, receive(&cut(&stream, cuts)), "the cuts make no difference");
    if stream.len() <= 1024 {
        assert_eq!(whole, receive(&cut(&stream, &[1])));
    }
    if honest {
        assert_eq!((&whole.1, whole.2, &whole.3), (&expected, true, &None));
    }
});
