//! The three kinds of local connection against what the protocol says of each receive. Input: the kind,
//! then operations: 0 to 2 the client writes (raw bytes, a header of the remote dialect, one of the stream
//! dialect); 3 and 4 the server receives so many bytes (0: all), 4 with a descriptor; 5 the server answers;
//! 6 the connection ends and the next begins.
#![no_main]

use std::rc::Rc;

use criu_relay::wire::WireError;
use criu_relay::wire::criu::{self, Request};
use criu_relay::wire::frame::{self, LENGTH, MAX_BODY};
use criu_relay::wire::remote::{Fed, Remote};
use criu_relay::wire::stream::{Capture, Serve, ServeEvent};
use criu_relay_fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// Stands for a descriptor; the counter of the other one tells whether it has been closed.
type Descriptor = Rc<()>;

/// A header and what follows it.
type Parts<'a> = (&'a [u8], &'a [u8]);

/// The header at the front of `sent` with what follows it; None: it is not whole yet.
fn header(sent: &[u8]) -> Result<Option<Parts<'_>>, ()> {
    let Some((length, rest)) = sent.split_first_chunk::<LENGTH>() else { return Ok(None) };
    let length = u32::from_ne_bytes(*length) as usize;
    if !(1..=MAX_BODY).contains(&length) {
        return Err(());
    }
    Ok(rest.split_at_checked(length))
}

/// Where a connection is, by what it has sent and been told.
enum At {
    /// In its header, of which this has come; a capture's pipe belongs to it.
    Header(Vec<u8>),
    /// It writes, or only reads; it may send a pipe.
    Writes,
    Reads,
    MayUpgrade {
        writes: bool,
    },
    /// It waits for the answer, or owes a pipe.
    Waits,
    OwesPipe,
    /// Nothing it sends means anything.
    Over,
}

enum Wire {
    Remote(Remote),
    Capture(Capture),
    Serve(Serve),
}

struct Connection {
    wire: Wire,
    at: At,
}

/// What a receive has to yield.
#[derive(Debug, PartialEq)]
enum Yield {
    Wrong,
    Request(Option<Request>, Vec<u8>),
    Name(Vec<u8>),
    Pipe(Option<Vec<u8>>),
    Nothing,
}

impl Connection {
    fn new(kind: u8) -> Self {
        let wire = match kind % 3 {
            0 => Wire::Remote(Remote::default()),
            1 => Wire::Capture(Capture::default()),
            _ => Wire::Serve(Serve::default()),
        };
        Self { wire, at: At::Header(Vec::new()) }
    }

    // What the protocol says of the remote dialect.
    fn remote(&mut self, input: &[u8], fd: bool) -> Yield {
        let (mut request, mut rest) = (None, input.to_vec());
        if let At::Header(sent) = &mut self.at {
            sent.extend(input);
            let (body, behind) = match header(sent) {
                Err(()) => return Yield::Wrong,
                Ok(None) if fd => return Yield::Wrong,
                Ok(None) => return Yield::Request(None, Vec::new()),
                Ok(Some(parts)) => parts,
            };
            let Ok(decoded) = criu::decode_request(body) else { return Yield::Wrong };
            rest = behind.to_vec();
            self.at = match decoded {
                Request::Read(_) => At::Reads,
                Request::Write(..) => At::MayUpgrade { writes: true },
                Request::Finish { .. } => At::Over,
            };
            request = Some(decoded);
        }
        match (&self.at, fd) {
            (At::MayUpgrade { .. }, true) if rest.len() == 1 => {
                self.at = At::Over;
                // The request, if it came along, is looked at by the caller.
                match request {
                    Some(request) => Yield::Request(Some(request), Vec::new()),
                    None => Yield::Pipe(None),
                }
            }
            (_, true) => Yield::Wrong,
            (At::MayUpgrade { writes: true } | At::Writes, false) => {
                if !rest.is_empty() {
                    self.at = At::Writes;
                }
                Yield::Request(request, rest)
            }
            (At::Over, false) => Yield::Request(request, Vec::new()),
            (_, false) if rest.is_empty() => Yield::Request(request, Vec::new()),
            _ => Yield::Wrong,
        }
    }

    // And of the stream dialect's two connections.
    fn capture(&mut self, input: &[u8], fd: bool) -> Yield {
        let At::Header(sent) = &mut self.at else { return Yield::Wrong };
        sent.extend(input);
        let Ok(parts) = header(sent) else { return Yield::Wrong };
        let Some((body, behind)) = parts else { return if fd { Yield::Wrong } else { Yield::Nothing } };
        match (criu::decode_streamer_request(body), behind.len(), fd) {
            (Ok(_), 0, false) => Yield::Nothing,
            (Ok(key), 1, true) => {
                sent.clear();
                Yield::Pipe(Some(key.name.into()))
            }
            _ => Yield::Wrong,
        }
    }

    fn serve(&mut self, input: &[u8], fd: bool) -> Yield {
        match &mut self.at {
            At::Header(sent) => {
                sent.extend(input);
                match header(sent) {
                    _ if fd => Yield::Wrong,
                    Ok(None) => Yield::Nothing,
                    Ok(Some((body, []))) => match criu::decode_streamer_request(body) {
                        Ok(key) => {
                            self.at = At::Waits;
                            Yield::Name(key.name.into())
                        }
                        Err(_) => Yield::Wrong,
                    },
                    _ => Yield::Wrong,
                }
            }
            At::OwesPipe if fd && input.len() == 1 => {
                self.at = At::Header(Vec::new());
                Yield::Pipe(None)
            }
            _ => Yield::Wrong,
        }
    }

    /// One receive; false when the connection is to be closed.
    fn receive(&mut self, input: &[u8], with_descriptor: bool) -> bool {
        let ours: Descriptor = Rc::new(());
        let descriptor = with_descriptor.then(|| Rc::clone(&ours));
        let expected = match self.wire {
            Wire::Remote(_) => self.remote(input, with_descriptor),
            Wire::Capture(_) => self.capture(input, with_descriptor),
            Wire::Serve(_) => self.serve(input, with_descriptor),
        };
        let (got, pipe) = match &mut self.wire {
            Wire::Remote(wire) => match wire.feed(input, descriptor) {
                Ok(Fed { request, data, pipe }) => {
                    assert!(pipe.is_none() || data.is_empty(), "a descriptor's byte is never image data");
                    assert!(input.ends_with(data));
                    let only_a_pipe = pipe.is_some() && request.is_none();
                    let got = Yield::Request(request, data.to_vec());
                    (Ok(if only_a_pipe { Yield::Pipe(None) } else { got }), pipe)
                }
                Err(error) => (Err(error), None),
            },
            Wire::Capture(wire) => match wire.feed(input, descriptor) {
                Ok(Some((key, pipe))) => (Ok(Yield::Pipe(Some(key.name.into()))), Some(pipe)),
                Ok(None) => (Ok(Yield::Nothing), None),
                Err(error) => (Err(error), None),
            },
            Wire::Serve(wire) => match wire.feed(input, descriptor) {
                Ok(Some(ServeEvent::Pipe(pipe))) => (Ok(Yield::Pipe(None)), Some(pipe)),
                Ok(Some(ServeEvent::Request(key))) => (Ok(Yield::Name(key.name.into())), None),
                Ok(None) => (Ok(Yield::Nothing), None),
                Err(error) => (Err(error), None),
            },
        };
        // The descriptor is the caller's again, or there was an error and it is closed: never lost, never both.
        assert_eq!(pipe.is_some(), with_descriptor && got.is_ok());
        assert!(pipe.as_ref().is_none_or(|pipe| Rc::ptr_eq(pipe, &ours)));
        assert_eq!(Rc::strong_count(&ours), 1 + usize::from(pipe.is_some()));
        let fine = got.is_ok();
        let got = got.unwrap_or_else(|error| {
            let about_descriptor = matches!(error, WireError::Descriptor(_));
            assert!(with_descriptor || !about_descriptor || error.to_string().contains("without a pipe"));
            Yield::Wrong
        });
        assert_eq!(got, expected, "received {input:?}, descriptor: {with_descriptor}");
        if fine {
            self.check();
        }
        fine
    }

    fn answered(&mut self, exists: bool) {
        match (&mut self.wire, &self.at) {
            // Elsewhere it changes nothing.
            (Wire::Remote(wire), at) => {
                let reads = matches!(at, At::Reads);
                wire.answered();
                if reads {
                    self.at = At::MayUpgrade { writes: false };
                }
            }
            (Wire::Serve(wire), At::Waits) => {
                wire.answered(exists);
                self.at = if exists { At::OwesPipe } else { At::Header(Vec::new()) };
            }
            _ => {}
        }
        self.check();
    }

    // What the machine says of itself.
    fn check(&self) {
        let idle = matches!(&self.at, At::Header(sent) if sent.is_empty());
        match &self.wire {
            Wire::Remote(_) => {}
            Wire::Capture(wire) => assert_eq!(wire.is_idle(), idle),
            Wire::Serve(wire) => {
                assert_eq!(wire.is_idle(), idle);
                assert_eq!(wire.is_waiting(), !idle && !matches!(self.at, At::Waits));
            }
        }
    }
}

fn local_header(which: u8) -> Vec<u8> {
    let names: [&[u8]; 8] =
        [b"core-1.img", b"parent", b"", b"DUMP_FINISH", b"RESTORE_FINISH", b"a/b", b"a\0", b"\xff"];
    let ids: [&[u8]; 4] = [b"", b"null", b"/dir", b"i\0d"];
    frame::encode(&criu::LocalImageEntry {
        name: Some(names[usize::from(which % 8)].to_vec()),
        snapshot_id: Some(ids[usize::from(which / 8 % 4)].to_vec()),
        open_mode: Some([0, 1, 0o2000, 2][usize::from(which / 32 % 4)]),
    })
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let kind = input.small();
    let mut connection = Connection::new(kind);
    // What the client has written and the server has not received.
    let mut wire = Vec::new();
    while let Some(operation) = input.byte() {
        match operation % 7 {
            0 => wire.extend(input.piece()),
            1 => wire.extend(local_header(input.small())),
            2 => {
                let names: [&[u8]; 4] = [b"inventory.img", b"pages-1.img", b"", b"a/b"];
                wire.extend(criu::encode_streamer_request(names[usize::from(input.small() % 4)]));
            }
            3 | 4 => {
                let n = match usize::from(input.small()) {
                    0 => wire.len(),
                    n => n.min(wire.len()),
                };
                if n == 0 {
                    continue;
                }
                let received: Vec<u8> = wire.drain(..n).collect();
                if !connection.receive(&received, operation % 7 == 4) {
                    wire.clear();
                    connection = Connection::new(kind);
                }
            }
            5 => connection.answered(input.small() % 2 == 1),
            _ => {
                wire.clear();
                connection = Connection::new(kind);
            }
        }
    }
});
