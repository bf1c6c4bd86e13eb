//! The records of a work directory. Input: a byte; if it is even, then the file itself. If it is odd, then the
//! operations that make one: 0 a line of raw bytes; 1 a line that belongs there (which, and a number); 2 raw bytes
//! without a line's end; the last line is added.
#![no_main]

use criu_relay::record::{FIRST, Record};
use criu_relay_fuzz::Input;
use libfuzzer_sys::fuzz_target;

fn line(which: u8, number: u16) -> String {
    let words = [
        "proxy",
        "cache",
        "asking",
        "allowed",
        "made",
        "prepared",
        "released",
        "rolled-back",
        "stored",
        "restored",
    ];
    let word = words[usize::from(number) % words.len()];
    match which % 16 {
        0 => FIRST.into(),
        1 => format!("role {word}"),
        2 => format!("session {:032x}", u128::from(number) << 100),
        3 => format!("state {word}"),
        4 => format!("boot {number}"),
        5 => format!("pid-namespace {number}"),
        6 => format!("time-namespace {number}"),
        7 => format!("daemon {number} {number}"),
        8 => format!("images-dir /{}", ["a", "\\n", "\\\\", "\\"][usize::from(number) % 4]),
        9 => format!("criu {number} 1"),
        10 => format!("leave-running {}", if number % 2 == 0 { "yes" } else { "no" }),
        11 => format!("peer {number}"),
        12 => format!("view /{}", ["a", "\\n", "\\\\", "\\"][usize::from(number) % 4]),
        13 => format!("commit {word}"),
        14 => format!("images {number} {which}"),
        _ => format!("task {number} {which}{}", if number % 2 == 0 { "" } else { " stays" }),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut bytes = Vec::new();
    // Otherwise the whole input is the file.
    if input.small() % 2 == 0 {
        bytes.extend_from_slice(input.rest());
    } else {
        while let Some(operation) = input.byte() {
            match operation % 3 {
                0 => bytes.extend_from_slice(input.piece()),
                1 => bytes.extend_from_slice(line(input.small(), input.number()).as_bytes()),
                _ => {
                    bytes.extend_from_slice(input.piece());
                    continue;
                }
            }
            bytes.push(b'\n');
        }
        bytes.extend_from_slice(b"end\n");
    }
    match Record::decode(&bytes) {
        Ok(record) => {
            let encoded = record.encode();
            assert_eq!(Record::decode(&encoded).as_ref(), Ok(&record), "what we write can be read");
            // Cut off, it is no record, and none of a smaller tree.
            let cut = encoded.len() - 1 - usize::from(data[0]) % (encoded.len() - 1);
            assert!(cut == encoded.len() - 1 || Record::decode(&encoded[..cut]).is_err());
            assert!(record.tasks.iter().all(|task| task.who.pid > 0) && record.daemon.pid > 0);
            assert!(!record.file_name().contains('/') && record.file_name().ends_with(".record"));
        }
        Err(why) => {
            assert!(!why.is_empty() && !why.chars().any(char::is_control), "it can be printed: {why}")
        }
    }
});
