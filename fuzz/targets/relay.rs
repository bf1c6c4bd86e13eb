//! The decoder of the relay protocol against the stream it was made from, and the greeting. Input: the cuts (a
//! piece); how many raw bytes are moved past the decoder at a time (a piece); then operations, which make the
//! stream: 0 raw bytes; 1 a frame around a message that the input spells out; 2 a data frame that announces
//! something else than comes; 3 an image begins; 4 data of a transfer; 5 a message without raw bytes, with a
//! number and a text; 6 what a newer minor version says. From 3 on everything is as it should be. And beside the
//! stream: 7 a greeting is made; 8 one is received.
#![no_main]

use criu_relay::wire::criu::{self, Transfer, WriteMode};
use criu_relay::wire::frame::{FrameReader, LENGTH, MAX_BODY};
use criu_relay::wire::relay::{self, Decoder, GREETING, GREETING_MAX, Hello, ID, Item, Kind, MAJOR, TOP};
use criu_relay::wire::{Key, WireError, seed};
use criu_relay_fuzz::{Input, cut};
use libfuzzer_sys::fuzz_target;
use prost::Message;

/// What was found; neighbouring raw bytes of one transfer are one.
#[derive(Debug, PartialEq)]
enum Found {
    Message(Kind),
    Bytes(u64, Vec<u8>),
}

/// Everything that was found; raw bytes that are still to come; whether the stream may end there; the error.
type Received = (Vec<Found>, Option<(u64, u64)>, bool, Option<WireError>);

fn bytes(found: &mut Vec<Found>, id: u64, data: &[u8]) {
    match found.last_mut() {
        Some(Found::Bytes(last, all)) if *last == id => all.extend(data),
        _ => found.push(Found::Bytes(id, data.to_vec())),
    }
}

// `moves`: before each step so many raw bytes (0 counts as 256) are taken past the decoder; none, never.
fn receive(pieces: &[&[u8]], moves: &[u8]) -> Received {
    let mut moves = moves.iter().map(|n| if *n == 0 { 256 } else { u64::from(*n) }).cycle();
    let (mut found, mut decoder) = (Vec::new(), Decoder::default());
    // What a data frame has announced and has not come.
    let mut left: Option<(u64, u64)> = None;
    for mut input in pieces.iter().copied() {
        loop {
            assert_eq!(decoder.raw(), left, "it knows what is to come");
            assert!(left.is_none() || !decoder.at_boundary());
            if let Some((id, n)) = left
                && let Some(most) = moves.next()
            {
                let (data, rest) = input.split_at(most.min(n).min(input.len() as u64) as usize);
                input = rest;
                decoder.took(data.len() as u64);
                if !data.is_empty() {
                    bytes(&mut found, id, data);
                }
                left = Some((id, n - data.len() as u64)).filter(|(_, n)| *n > 0);
                assert_eq!(decoder.raw(), left, "what was moved is accounted for");
            }
            match decoder.next(&mut input) {
                Ok(None) => {
                    assert!(input.is_empty(), "it stops only where it has nothing left");
                    break;
                }
                Ok(Some(Item::Message(kind))) => {
                    assert_eq!(left, None, "nothing stands among the raw bytes");
                    if let Kind::Data(relay::Data { id, length: n @ 1.., .. }) = kind {
                        left = Some((id, n.into()));
                    }
                    found.push(Found::Message(kind));
                }
                Ok(Some(Item::Bytes(of, data))) => {
                    let (id, n) = left.expect("raw bytes come behind their announcement");
                    assert!(of == id && !data.is_empty() && data.len() as u64 <= n);
                    bytes(&mut found, id, data);
                    left = Some((id, n - data.len() as u64)).filter(|(_, n)| *n > 0);
                }
                Err(error) => {
                    assert_eq!(left, None, "raw bytes can't be wrong");
                    said(&error);
                    return (found, None, false, Some(error));
                }
            }
        }
    }
    let boundary = decoder.at_boundary();
    (found, left, boundary, None)
}

fn said(error: &WireError) {
    assert!(!error.to_string().chars().any(char::is_control), "it can stand in a log");
}

// A message that was found can be sent, and is found again.
fn again(kind: &Kind) {
    let frame = relay::encode(kind.clone());
    assert!((LENGTH..=LENGTH + MAX_BODY).contains(&frame.len()));
    let word = u32::from_ne_bytes(frame[..LENGTH].try_into().unwrap());
    assert_eq!(word, TOP | (frame.len() - LENGTH) as u32);
    assert!(FrameReader::default().feed(&mut &frame[..]).is_err(), "the seed protocol has no such length");
    let mut twice = b"before".to_vec();
    relay::append(&mut twice, kind.clone());
    assert_eq!(twice, [b"before", &frame[..]].concat());
    assert_eq!(Decoder::default().next(&mut &frame[..]), Ok(Some(Item::Message(kind.clone()))));
    match kind {
        Kind::Open(open) => match relay::opened(open.clone()) {
            Ok((key, mode)) => {
                assert!(!key.to_string().chars().any(char::is_control));
                assert_eq!(open.open_mode, mode.flags());
                assert_eq!(key, Key::new(open.snapshot_id.clone(), open.name.clone()));
                let transfer = Transfer { key, mode, size: open.id };
                let body = criu::encode_transfer(&transfer).split_off(LENGTH);
                assert_eq!(
                    criu::decode_transfer(&body),
                    Ok(transfer),
                    "the seed protocol has the same names"
                );
            }
            Err(error) => said(&error),
        },
        Kind::Hello(hello) => checked(hello, hello.clone().checked()),
        Kind::Error(error) => assert!(!error.shown().chars().any(char::is_control)),
        _ => {}
    }
}

fn checked(hello: &Hello, outcome: Result<Hello, WireError>) {
    let fine = hello.major == MAJOR && hello.session.len() == ID;
    match outcome {
        Ok(same) => assert!(fine && same == *hello),
        Err(error) => {
            said(&error);
            assert!(!fine, "{error}");
            assert_eq!(matches!(error, WireError::Version { .. }), hello.major != MAJOR);
        }
    }
}

// What the proxy says first, as both kinds of cache see it.
fn greeting(hello: &Hello) {
    let bytes = relay::encode_greeting(hello);
    let mut rest = &bytes[..];
    let body = FrameReader::default().feed(&mut rest).unwrap().expect("a whole object");
    let transfer = criu::decode_transfer(&body).expect("a valid header");
    assert_eq!((transfer.size, &transfer.key), (rest.len() as u64, &Key::stream(GREETING)));
    assert_eq!(relay::is_greeting(&transfer), (1..=GREETING_MAX).contains(&transfer.size));
    checked(hello, Hello::check(rest));
    // To an old cache it is an image.
    let (mut decoder, mut image, mut rest) = (seed::Decoder::default(), Vec::<u8>::new(), &bytes[..]);
    while let Some(item) = decoder.next(&mut rest, |_| 0).expect("an old cache takes it") {
        if let seed::Item::Data(data) = item {
            image.extend(data);
        }
    }
    assert!(decoder.at_boundary() && image == hello.encode_to_vec());
    // To one that waits for relay frames it is none.
    assert!(Decoder::default().next(&mut &bytes[..]).is_err());
}

fn received(payload: &[u8], size: u64, which: u8) {
    let key =
        Key::new(&b"dir"[..usize::from(which & 3)], &GREETING[..GREETING.len() - usize::from(which & 4) / 4]);
    let mode = if which & 8 == 0 { WriteMode::Append } else { WriteMode::Truncate };
    let fine = which & 15 == 0 && (1..=GREETING_MAX).contains(&size);
    assert_eq!(relay::is_greeting(&Transfer { key, mode, size }), fine);
    match Hello::check(payload) {
        Ok(hello) => greeting(&hello),
        Err(error) => said(&error),
    }
}

fn hello(major: u8, flags: u8, number: u16, session: &[u8]) -> Hello {
    let id = |name: &[u8]| [name, &[0; ID]].concat()[..ID].to_vec();
    Hello {
        // Mostly the right one.
        major: if major % 4 == 3 { u32::from(major) << (flags % 25) } else { MAJOR },
        minor: u32::from(number) << (flags % 17),
        session: if flags & 128 == 0 { id(session) } else { session.to_vec() },
        scripted: flags & 1 != 0,
        commit: u32::from(flags >> 1 & 3),
        reconnect: number.into(),
        tls: flags & 8 != 0,
    }
}

// One of those that have no raw bytes behind them.
fn message(which: u8, n: u64, text: &[u8]) -> Kind {
    let text = || text.to_vec();
    match which % 21 {
        0 => Kind::Close(relay::Close { id: n, size: n << 7 }),
        1 => Kind::Abort(relay::Abort { id: n }),
        2 => Kind::Prepare(relay::Prepare::new(
            n,
            &text().iter().map(|size| n << (size % 32)).collect::<Vec<_>>(),
        )),
        3 => Kind::Finished(relay::Finished { images: n, bytes: !n }),
        4 => Kind::Release(relay::Release { session: text() }),
        5 => Kind::Rollback(relay::Rollback { session: text() }),
        6 => Kind::Resume(relay::Resume { session: text(), run: text() }),
        7 => Kind::Ping(relay::Ping { token: n }),
        8 => Kind::Hello(hello(which, n as u8, n as u16, &text())),
        9 => Kind::Ack(relay::Ack { id: n, bytes: !n }),
        10 => Kind::Stored(relay::Stored { id: n, size: !n }),
        11 => Kind::Prepared(relay::Prepared { bytes: n }),
        12 => Kind::AllStored(relay::AllStored { images: n, bytes: !n }),
        13 => Kind::Restore(relay::Restore { state: n as u32, text: text() }),
        14 => Kind::Released(relay::Released { session: text() }),
        15 => Kind::RolledBack(relay::RolledBack { session: text() }),
        16 => Kind::Holding(relay::Holding { id: n, size: !n, complete: n & 1 != 0, last: n & 2 != 0 }),
        // It is cut off behind 4000 bytes, between two characters.
        17 => {
            let long = String::from_utf8_lossy(&text()).repeat((n % 64) as usize);
            let error = relay::Error::new(!n as u32, &long);
            assert!(
                long.as_bytes().starts_with(&error.text) && String::from_utf8(error.text.clone()).is_ok()
            );
            assert!(error.text.len() == long.len() || error.text.len() > 4000 - 4);
            Kind::Error(error)
        }
        18 => Kind::Pong(relay::Pong { token: n }),
        19 => Kind::Welcome(relay::Welcome {
            major: n as u32,
            minor: which.into(),
            run: text(),
            memory_limit: n,
            restore_waits: n & 1 != 0,
        }),
        _ => Kind::Data(relay::Data::new(n, 0)),
    }
}

fn framed(stream: &mut Vec<u8>, length: u32, message: &[u8]) {
    stream.extend((length | TOP).to_ne_bytes());
    stream.extend(message);
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let (cuts, moves) = (input.piece(), input.piece());
    let (mut stream, mut expected, mut honest) = (Vec::new(), Vec::new(), true);
    while let Some(operation) = input.byte() {
        match operation % 9 {
            0 => {
                stream.extend(input.piece());
                honest = false;
            }
            1 => {
                let (more, message) = (input.small(), input.piece());
                // Mostly as long as it is.
                let length = message.len() as u32 + u32::from(more) * u32::from(more) / 4;
                framed(&mut stream, length, message);
                honest = false;
            }
            2 => {
                let (id, length) = (input.small().into(), u32::from(input.number()) << (operation % 16));
                relay::append(&mut stream, Kind::Data(relay::Data::new(id, length)));
                stream.extend(input.piece());
                honest = false;
            }
            3 => {
                let (id, mode, times) = (input.number().into(), input.small(), input.number());
                // Both at their limits fit a frame; a little more is not taken.
                let name = input.piece().repeat(usize::from(times % 40));
                let half = name.len() / 2;
                let open_mode = [1, 0o2000, 0, mode.into()][usize::from(mode % 4)];
                let [snapshot_id, name] = [&name[..half], &name[half..]].map(<[u8]>::to_vec);
                let open = relay::Open { id, name, snapshot_id, open_mode };
                let fits = relay::encode(Kind::Open(open.clone())).len() <= LENGTH + MAX_BODY;
                assert!(fits || relay::opened(open.clone()).is_err());
                honest &= fits;
                relay::append(&mut stream, Kind::Open(open.clone()));
                expected.push(Found::Message(Kind::Open(open)));
            }
            4 => {
                let (id, times) = (input.number().into(), input.small());
                let data = input.piece().repeat(1 + usize::from(times % 8));
                let kind = Kind::Data(relay::Data::new(id, data.len() as u32));
                relay::append(&mut stream, kind.clone());
                stream.extend(&data);
                expected.push(Found::Message(kind));
                if !data.is_empty() {
                    expected.push(Found::Bytes(id, data));
                }
            }
            5 => {
                let (which, high, low) = (input.small(), input.small(), input.number());
                let kind = message(which, u64::from(low) << (high % 49), input.piece());
                relay::append(&mut stream, kind.clone());
                expected.push(Found::Message(kind));
            }
            6 => {
                // A kind that is not known, no kind at all, or a field more in one that is.
                let (number, value) = (16 + u32::from(input.small()), input.piece());
                let mut field = Vec::new();
                // Two bytes, of which the second is less than 128: the field's number and 'bytes'.
                field.extend([(number << 3 & 127 | 128 | 2) as u8, (number >> 4) as u8]);
                prost::encode_length_delimiter(value.len(), &mut field).unwrap();
                field.extend(value);
                let known = (20..=30).contains(&number);
                if number % 3 == 0 || known {
                    let close = relay::Close { id: number.into(), size: 0 };
                    field.splice(0..0, close.encode_to_vec());
                    field.splice(0..0, [3 << 3 | 2, field.len() as u8]);
                    // A length of one byte only.
                    if field.len() > 2 + 127 {
                        continue;
                    }
                    expected.push(Found::Message(Kind::Close(close)));
                }
                framed(&mut stream, field.len() as u32, &field);
            }
            7 => {
                let (major, flags, number) = (input.small(), input.small(), input.number());
                greeting(&hello(major, flags, number, input.piece()));
            }
            _ => {
                let (size, which) = (input.number().into(), input.small());
                received(input.piece(), size, which);
            }
        }
    }
    let whole = receive(&[&stream], &[]);
    assert_eq!(whole, receive(&[&stream], moves), "what is moved past it makes no difference");
    let pieces = cut(&stream, cuts);
    assert_eq!(whole, receive(&pieces, &[]), "the cuts make no difference");
    assert_eq!(whole, receive(&pieces, moves), "nor do both");
    if stream.len() <= 1024 {
        assert_eq!(whole, receive(&cut(&stream, &[1]), moves));
    }
    for found in &whole.0 {
        if let Found::Message(kind) = found {
            again(kind);
        }
    }
    if honest {
        assert_eq!(whole, (expected, None, true, None));
    }
});
