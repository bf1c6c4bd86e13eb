//! Writes the seeds: `cargo +nightly run --example seeds` in fuzz/. Each is a conversation that the
//! target would need long to find by itself.

use std::{fs, io, path::Path};

use criu_relay::wire::Key;
use criu_relay::wire::criu::{self, SnapshotIdEntry, Transfer, WriteMode};
use criu_relay::wire::frame;

/// File names with their bytes.
type Seeds = Vec<(&'static str, Vec<u8>)>;

fn main() -> io::Result<()> {
    let all: [(&str, Seeds); 5] = [
        ("headers", headers()),
        ("seed", seed()),
        ("dialects", dialects()),
        ("session", session()),
        ("store", store()),
    ];
    for (target, seeds) in all {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
        fs::create_dir_all(&dir)?;
        for (name, bytes) in seeds {
            fs::write(dir.join(name), bytes)?;
        }
    }
    Ok(())
}

fn headers() -> Seeds {
    let key = Key::new(*b"/tmp/dir", *b"pages-1.img");
    let request = |write| criu::encode_request(&key, write);
    let transfer = |mode, size| criu::encode_transfer(&Transfer { key: key.clone(), mode, size });
    let ids =
        [&b"/pre"[..], b"/final"].map(|id| frame::encode(&SnapshotIdEntry { snapshot_id: Some(id.into()) }));
    let read = request(None);
    let long = |len| {
        let key = Key::new([b'/'; 4095], vec![b'a'; len]);
        criu::encode_transfer(&Transfer { key, mode: WriteMode::Append, size: u64::MAX })
    };
    // Whole objects, cut in pieces of 3 bytes and 1; and a body alone.
    let cut = |objects: &[Vec<u8>]| [&[2, 3, 1][..], &objects.concat()].concat();
    vec![
        ("read", cut(std::slice::from_ref(&read))),
        ("body", [&[0], &read[frame::LENGTH..]].concat()),
        ("writes", cut(&[request(Some(WriteMode::Append)), request(Some(WriteMode::Truncate))])),
        (
            "finish-2017",
            cut(&[criu::encode_request(&Key::new(*b"null", *b"DUMP_FINISH"), Some(WriteMode::Append))]),
        ),
        ("finish-2019", cut(&[criu::encode_request(&Key::new([], []), None)])),
        ("transfers", cut(&[transfer(WriteMode::Append, 1), transfer(WriteMode::Truncate, u64::MAX)])),
        ("streamer", cut(&[criu::encode_streamer_request(b"inventory.img")])),
        ("parent", cut(&ids)),
        // The longest header that is taken, and one of a name too long; libFuzzer goes as far as its seeds do.
        ("longest", cut(&[long(4095)])),
        ("name-too-long", cut(&[long(4096)])),
        ("too-long", cut(&[(frame::MAX_BODY as u32 + 1).to_ne_bytes().to_vec()])),
    ]
}

fn seed() -> Seeds {
    let (append, overwrite) = (|which| [2, which, 3, b'a', b'b', b'c'], |which| [3, which, 2, b'x', b'y']);
    vec![
        ("appends", [&[1, 1][..], &append(0), &append(1), &append(0)].concat()),
        ("overwrite", [&[2, 7, 2][..], &append(4), &overwrite(4), &append(4)].concat()),
        ("empty", [&[0][..], &[4, 0], &append(0), &[4, 0]].concat()),
        // It says 2 bytes of an image of which 3 are held; then one that says more than comes.
        ("shrinks", [&[0][..], &append(0), &[1, 0, 2, 0, 0]].concat()),
        ("short", [&[0][..], &[1, 0, 9, 0, 2, 1, 1]].concat()),
        ("huge", [&[1, 5][..], &[1, 64, 255, 255, 4, 1, 2, 3, 4]].concat()),
    ]
}

fn dialects() -> Seeds {
    // Of the remote dialect's header: the name, 8 times the snapshot id, 32 times the mode.
    let header = |id: u8, mode: u8| [1, 8 * id + 32 * mode];
    let (all, with_pipe, byte) = ([3, 0], [4, 0], [0, 1, 0]);
    let join = |kind: u8, parts: &[&[u8]]| [&[kind][..], &parts.concat()].concat();
    vec![
        ("write-raw", join(0, &[&header(2, 1), &[0, 3, 1, 2, 3], &all, &byte, &all, &[6]])),
        ("write-pipe", join(0, &[&header(2, 2), &byte, &with_pipe])),
        ("read-pipe", join(0, &[&header(2, 0), &[3, 5], &all, &[5, 1], &byte, &with_pipe])),
        ("finish", join(0, &[&[1, 4 + 8], &all, &byte, &all, &[6], &[1, 2], &all])),
        ("capture", join(1, &[&[2, 0], &[3, 6], &all, &byte, &with_pipe, &[2, 1], &byte, &with_pipe])),
        ("capture-none", join(1, &[&[2, 0], &byte, &all])),
        ("serve", join(2, &[&[2, 0], &all, &[5, 1], &byte, &with_pipe, &[2, 1], &[3, 2], &all, &[5, 0]])),
        ("serve-early", join(2, &[&[2, 0], &all, &[2, 1], &all])),
    ]
}

fn session() -> Seeds {
    // Events of the source; 16 is its first argument: the remote dialect, success, the only copy.
    let (request, ended, failed, up, lost, no_link, delivered) = (0, 2, 3, 4, 5, 6, 7);
    let (yes, term, hangup) = (16, 15 + 32, 15 + 32 + 64);
    vec![
        ("good", vec![0, up, request, ended + yes, delivered]),
        (
            "keep-twice",
            vec![2, up, request + yes, ended + yes, delivered, up, request, ended + yes, delivered],
        ),
        ("sent-anew", vec![0, up, request, lost + yes, ended + yes, no_link, up, lost, up, delivered]),
        ("spoiled", vec![2, up, request + yes, failed, request + yes, ended + yes, request, lost]),
        ("signals", vec![0, up, request, ended + yes, term, hangup, term, hangup]),
        // Events of the sink: a peer, its end, the restore's end, a signal.
        ("sink", vec![1, 0, 1 + yes, 0, 2, 3, 2 + yes]),
        ("sink-keep", vec![3, 0, 1, 0, 1 + yes, 3, 0, 2 + yes, 1, 3, 0, 3, 3]),
    ]
}

fn store() -> Seeds {
    // Lengths by their last two bits: few; around the inline limit; anything.
    let (few, around, far) = ([40, 0], [129, 0], [2, 255]);
    let join = |budget: u8, parts: &[&[u8]]| [&[budget][..], &parts.concat()].concat();
    let (create, hold, release) = ([0, 0], [5, 0], [6, 0]);
    let append = |which: u8, length: [u8; 2]| [1, which, length[0], length[1]];
    let truncate = |length: [u8; 2]| [4, 0, length[0], length[1]];
    let read = [7, 0, 0, 0, 2, 255];
    vec![
        ("spill", join(1, &[&create, &append(0, few), &append(0, around), &read, &append(0, far), &read])),
        (
            "truncate",
            join(1, &[&create, &append(0, far), &append(0, far), &truncate(around), &append(0, few), &read]),
        ),
        ("holders", join(1, &[&create, &hold, &append(0, few), &release, &read, &release, &append(0, few)])),
        (
            "arena",
            join(
                0,
                &[
                    &create,
                    &create,
                    &append(0, far),
                    &append(1, far),
                    &append(0, far),
                    &append(1, far),
                    &release,
                    &create,
                    &append(2, far),
                    &append(2, far),
                ],
            ),
        ),
    ]
}
