//! The decoder of the control socket against what the protocol says of each receive, and the answer's.
//! Input: operations: 0 and 1 the script writes (raw bytes; a request with a version, an action, a number of
//! processes, how many of them stay stopped, and bytes of memory); 2 and 3 the daemon receives so many bytes (0: all), 3 with so many descriptors; 4 it receives
//! the next batch as it has to be; 5 the connection ends and the next begins; 6 an answer (raw bytes); 7 an
//! answer with an errno and a text.
#![no_main]

use std::rc::Rc;

use criu_relay::wire::WireError;
use criu_relay::wire::control::{
    Action, BATCH, ControlRequest, Decoder, MAJOR, MAX_TASKS, MAX_TEXT, Request, decode_reply, encode_reply,
};
use criu_relay::wire::frame::{self, LENGTH, MAX_BODY};
use criu_relay_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use prost::Message;

/// Stands for a descriptor; the counter of the other one tells whether it has been closed.
type Descriptor = Rc<()>;

/// Where a connection is, by what it has sent.
enum At {
    /// In its request, of which this has come.
    Header(Vec<u8>),
    /// So many processes are still to come.
    Tasks(Said, usize),
    /// Nothing it sends means anything.
    Over,
}

/// What a request says.
#[derive(Debug, PartialEq)]
struct Said {
    action: Action,
    tasks: usize,
    memory: u64,
    stays: usize,
    sizes: Vec<u64>,
}

struct Connection {
    wire: Decoder<Descriptor>,
    at: At,
    counter: Descriptor,
}

// What stands in a request's message; None: it is to be refused.
fn request(body: &[u8]) -> Option<Said> {
    let message = ControlRequest::decode(body).ok()?;
    let tasks = message.tasks.filter(|tasks| *tasks <= MAX_TASKS)?;
    message.minor?;
    let known = message.major? == MAJOR;
    let action = Action::parse(&message.action?)?;
    // An older script says neither; and no more can stay stopped than there are.
    let (memory, stays) = (message.memory.unwrap_or(0), message.stays.unwrap_or(0).min(tasks) as usize);
    known.then_some(Said { action, tasks: tasks as usize, memory, stays, sizes: message.sizes })
}

impl Connection {
    fn new() -> Self {
        Self { wire: Decoder::default(), at: At::Header(Vec::new()), counter: Rc::new(()) }
    }

    // What the protocol says: whether the receive is fine, and then the request that is whole with it.
    fn expect(&mut self, input: &[u8], fds: usize) -> Result<Option<Said>, ()> {
        let (said, missing) = match std::mem::replace(&mut self.at, At::Over) {
            At::Header(mut sent) => {
                sent.extend(input);
                let length = sent.first_chunk::<LENGTH>().map(|length| u32::from_ne_bytes(*length) as usize);
                if length.is_some_and(|length| !(1..=MAX_BODY).contains(&length)) {
                    return Err(());
                }
                match length.map(|length| sent.len().checked_sub(LENGTH + length)) {
                    Some(Some(0)) if fds == 1 => {
                        let said = request(&sent[LENGTH..]).ok_or(())?;
                        let missing = said.tasks;
                        (said, missing)
                    }
                    Some(Some(_)) => return Err(()),
                    _ if fds > 0 => return Err(()),
                    _ => {
                        self.at = At::Header(sent);
                        return Ok(None);
                    }
                }
            }
            At::Tasks(said, missing) => {
                let batch = missing.min(BATCH);
                if input != [0] || fds != batch {
                    return Err(());
                }
                (said, missing - batch)
            }
            At::Over => return Err(()),
        };
        if missing == 0 {
            return Ok(Some(said));
        }
        self.at = At::Tasks(said, missing);
        Ok(None)
    }

    // Whether the connection goes on.
    fn receive(&mut self, input: &[u8], fds: usize) -> bool {
        let expected = self.expect(input, fds);
        let got = self.wire.feed(input, vec![self.counter.clone(); fds]);
        let fine = got.is_ok();
        match got {
            Ok(got) => {
                let whole = got.as_ref().map(|Request { action, tasks, memory, stays, sizes, .. }| Said {
                    action: *action,
                    tasks: tasks.len(),
                    memory: *memory,
                    stays: *stays,
                    sizes: sizes.clone(),
                });
                assert_eq!(Ok(whole), expected, "received {input:?} with {fds} descriptors");
            }
            Err(error) => {
                said(&error);
                assert!(expected.is_err(), "received {input:?} with {fds} descriptors: {error}");
            }
        }
        // What the decoder holds, and nothing else: the request is closed by now.
        let held = match &self.at {
            At::Tasks(said, missing) => 1 + said.tasks - missing,
            At::Header(_) | At::Over => 0,
        };
        assert_eq!(Rc::strong_count(&self.counter), 1 + held);
        assert_eq!(self.wire.is_idle(), matches!(&self.at, At::Header(sent) if sent.is_empty()));
        fine
    }
}

fn said(error: &WireError) {
    assert!(!error.to_string().chars().any(char::is_control), "it can stand in a log");
}

fn header(version: u8, action: u8, tasks: u16, stays: u8, memory: u16) -> Vec<u8> {
    let actions: [&[u8]; 12] = [
        b"pre-stream",
        b"pre-dump",
        b"post-dump",
        b"post-restore",
        b"pre-resume",
        b"network-lock",
        b"",
        b"post-dump\0",
        b"commit",
        b"rollback",
        b"pre-restore",
        b"wait",
    ];
    frame::encode(&ControlRequest {
        major: [Some(1), Some(2), None][usize::from(version % 3)],
        minor: [Some(0), Some(7), None][usize::from(version / 3 % 3)],
        action: actions.get(usize::from(action % 13)).map(|action| action.to_vec()),
        // The largest number of all is just beyond the limit, the next exactly on it.
        tasks: match version / 9 % 4 {
            0 => Some(tasks.into()),
            1 => Some((MAX_TASKS + 1).saturating_sub(tasks.into())),
            2 => Some(u32::MAX),
            _ => None,
        },
        // Few, just any number, and the largest.
        stays: [None, Some(stays.into()), Some(u32::MAX)][usize::from(stays % 3)],
        memory: [None, Some(memory.into()), Some(u64::MAX - u64::from(memory))][usize::from(memory % 3)],
        sizes: (0..memory % 5).map(|n| u64::from(memory) << (n * 12)).collect(),
    })
}

fn answer(bytes: &[u8]) {
    match decode_reply(bytes) {
        Ok((errno, text)) => reply(errno, &text),
        Err(error) => said(&error),
    }
}

fn reply(errno: u32, text: &str) {
    let bytes = encode_reply(errno, text);
    assert!((LENGTH + 1..=LENGTH + MAX_BODY).contains(&bytes.len()));
    let (again, shown) = decode_reply(&bytes[LENGTH..]).expect("what we encode can be decoded");
    assert!(again == errno && text.starts_with(&shown) && shown.len() <= MAX_TEXT);
    assert!(shown.len() == text.len() || shown.len() + 3 >= MAX_TEXT, "no more is cut off than has to be");
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut connection = Connection::new();
    // What the script has written and the daemon has not received.
    let mut wire = Vec::new();
    while let Some(operation) = input.byte() {
        let fine = match operation % 8 {
            0 => {
                wire.extend(input.piece());
                true
            }
            1 => {
                wire.extend(header(
                    input.small(),
                    input.small(),
                    input.number(),
                    input.small(),
                    input.number(),
                ));
                true
            }
            kind @ (2 | 3) => {
                let n = match usize::from(input.small()) {
                    0 => wire.len(),
                    n => n.min(wire.len()),
                };
                let fds = if kind == 3 { usize::from(input.small()) } else { 0 };
                let received: Vec<u8> = wire.drain(..n).collect();
                n == 0 || connection.receive(&received, fds)
            }
            4 => match connection.at {
                At::Tasks(_, missing) => connection.receive(&[0], missing.min(BATCH)),
                _ => true,
            },
            5 => false,
            6 => {
                answer(input.piece());
                true
            }
            _ => {
                let (errno, times) = (input.small(), input.number());
                let text = String::from_utf8_lossy(input.piece()).repeat(usize::from(times % 1024));
                reply(errno.into(), &text);
                true
            }
        };
        if !fine {
            wire.clear();
            connection = Connection::new();
        }
    }
});
