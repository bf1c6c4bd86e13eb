//! Writes the seeds: `cargo +nightly run --example seeds` in fuzz/. Each is a conversation that the
//! target would need long to find by itself.

use std::{fs, io, path::Path};

use criu_relay::wire::Key;
use criu_relay::wire::criu::{self, SnapshotIdEntry, Transfer, WriteMode};
use criu_relay::wire::{frame, relay};
use prost::Message;

/// File names with their bytes.
type Seeds = Vec<(&'static str, Vec<u8>)>;

fn main() -> io::Result<()> {
    let all: [(&str, Seeds); 8] = [
        ("headers", headers()),
        ("seed", seed()),
        ("dialects", dialects()),
        ("control", control()),
        ("relay", relay()),
        ("session", session()),
        ("store", store()),
        ("record", record()),
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

fn control() -> Seeds {
    // Version, action and number of processes, how many stay, and memory; what is received, and with how many
    // descriptors.
    let request = |version: u8, action: u8, tasks: u8| [1, version, action, tasks, 0, 0, 0, 0];
    let stays = |tasks: u8, stays: u8, memory: u8| [1, 3, 4, tasks, 0, stays, memory, 0];
    let (all, with_criu, batch, anew, byte) = ([2, 0], [3, 0, 1], [4], [5], [0, 1, 0]);
    let join = |parts: &[&[u8]]| parts.concat();
    vec![
        ("announce", join(&[&request(0, 0, 0), &with_criu, &anew, &request(3, 1, 0), &[2, 5], &with_criu])),
        ("post-dump", join(&[&request(0, 2, 3), &with_criu, &byte, &[3, 0, 3]])),
        ("batches", join(&[&[1, 0, 2, 251, 0, 0, 0, 0], &with_criu, &batch, &byte, &[3, 0, 1], &byte, &all])),
        ("many", join(&[&[1, 0, 2, 255, 3, 0, 0, 0], &with_criu, &batch, &batch, &batch, &batch, &batch])),
        ("short-batch", join(&[&request(0, 2, 250), &with_criu, &byte, &[3, 0, 249]])),
        (
            "no-criu",
            join(&[&request(0, 2, 1), &all, &request(0, 2, 1), &[3, 4, 1], &request(0, 2, 1), &[3, 0, 2]]),
        ),
        (
            "stays",
            join(&[&stays(3, 1, 1), &with_criu, &byte, &[3, 0, 3], &anew, &stays(1, 7, 2), &with_criu]),
        ),
        ("resolve", join(&[&request(0, 8, 0), &with_criu, &anew, &request(0, 9, 0), &with_criu])),
        ("wait", join(&[&request(0, 10, 0), &with_criu, &anew, &request(0, 11, 0), &with_criu])),
        ("glued", join(&[&request(0, 4, 0), &byte, &with_criu])),
        ("versions", join(&[&request(1, 2, 0), &with_criu, &request(2, 2, 0), &with_criu])),
        ("unknown", join(&[&request(0, 5, 0), &with_criu, &request(0, 12, 0), &with_criu])),
        ("limit", join(&[&request(9, 2, 0), &with_criu, &request(9, 2, 1), &with_criu, &batch])),
        ("replies", join(&[&[7, 5, 1, 0, 3], b"why", &[7, 0, 0, 0, 0], &[7, 1, 255, 3, 4], b"a\xc3\xa4b"])),
        ("reply", join(&[&[6, 7, 8, 5, 18, 3], b"why"])),
    ]
}

fn relay() -> Seeds {
    // The cuts, and what is moved past the decoder; then operations.
    let (whole, cut, moved) = ([0, 0], [2, 3, 1, 0], [1, 7, 1, 5]);
    let join = |parts: &[&[u8]]| parts.concat();
    let open = |id: u8, mode: u8| [3, id, 0, mode, 1, 0, 4, b'd', b'/', b'a', b'b'];
    let data = |id: u8, times: u8| [4, id, 0, times, 3, b'a', b'b', b'c'];
    let say = |which: u8, n: u8| [5, which, 0, n, 0, 2, b'i', b'd'];
    let all: Vec<u8> = (0..21).flat_map(|which| say(which, 3)).collect();
    let session = [5, 8, 0, 0, 0, 16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
    // The longest names that are taken: 39 times 210 bytes, of which half is the name.
    let longest = join(&[&[3, 1, 0, 0, 39, 0, 210], &[b'n'; 210]]);
    let hello = relay::Hello { major: 1, minor: 9, session: vec![7; 16], ..relay::Hello::default() };
    let payload = hello.encode_to_vec();
    vec![
        ("session", join(&[&cut, &session, &open(1, 1), &data(1, 0), &data(1, 7), &say(0, 1), &say(3, 1)])),
        (
            "interleaved",
            join(&[&moved, &open(1, 1), &open(2, 0), &data(1, 1), &data(2, 2), &say(0, 1), &data(2, 0)]),
        ),
        ("moved", join(&[&[2, 5, 2], &[2, 3, 0], &data(9, 7), &say(20, 9), &data(9, 0)])),
        ("kinds", join(&[&cut, &all])),
        (
            "newer",
            join(&[&cut, &[6, 0, 3, 1, 2, 3], &[6, 5, 2, 8, 1], &[6, 2, 0], &[6, 200, 1, 9], &say(7, 1)]),
        ),
        ("longest", join(&[&whole, &longest, &say(7, 1)])),
        ("text", join(&[&whole, &[5, 17, 0, 63, 0, 255], &[0xc3, 0xa4].repeat(127), b"a"])),
        ("no-frame", join(&[&whole, &say(7, 1), &[0, 4, 5, 0, 0, 0]])),
        ("too-long", join(&[&whole, &[0, 4], &(frame::MAX_BODY as u32 + 1 | relay::TOP).to_ne_bytes()])),
        ("spelled-out", join(&[&cut, &[1, 0, 4, 0x1a, 2, 8, 7], &[1, 2, 2, 0x52, 9]])),
        ("short-data", join(&[&moved, &[2, 7, 9, 0, 4, 1, 2, 3, 4], &say(7, 1)])),
        (
            "greetings",
            join(&[&whole, &[7, 0, 1, 30, 0, 3, 1, 2, 3], &[7, 7, 2, 0, 0, 0], &[7, 0, 128, 0, 0, 1, 1]]),
        ),
        ("greeted", join(&[&whole, &[8, 255, 15, 0, payload.len() as u8], &payload, &[8, 0, 16, 4, 1, 0]])),
    ]
}

fn session() -> Seeds {
    // Events of the source; 32 is their first argument: the remote dialect, success, the only copy, a source
    // that lives, a release.
    let (request, ended, failed, up, lost, no_link, delivered) = (0, 1, 2, 3, 4, 5, 6);
    let (announced, held, all_stored, died, criu_ended, acknowledged, disowned) = (8, 9, 10, 11, 12, 13, 14);
    let (asking, prepared, restore_failed, resolve) = (24, 27, 28, 29);
    let (yes, broken, term, hangup, killed) = (32, 64, 7 + 64, 7 + 64 + 128, 31 + 64);
    // Whether it keeps, whether the source may run on, and the commit point.
    let (once, keep, leave_running, restored) = (0, 2, 4, 8);
    let scripted =
        |flags: u8, then: &[u8]| [&[flags, up, request, announced, held + yes, asking], then].concat();
    vec![
        ("good", vec![once, up, request, ended + yes, delivered]),
        (
            "keep-twice",
            vec![keep, up, request + yes, ended + yes, delivered, up, request, ended + yes, delivered],
        ),
        ("sent-anew", vec![once, up, request, lost + yes, ended + yes, no_link, up, lost, up, delivered]),
        ("spoiled", vec![keep, up, request + yes, failed, request + yes, ended + yes, request, lost]),
        ("signals", vec![once, up, request, ended + yes, term, hangup, term, hangup]),
        (
            "released",
            scripted(once, &[ended + yes, all_stored, criu_ended, died, lost, up, acknowledged + yes]),
        ),
        ("left-running", scripted(keep | leave_running, &[all_stored, criu_ended + yes, acknowledged + yes])),
        ("rolled-back", scripted(keep, &[lost, all_stored, up, acknowledged + yes, acknowledged, request])),
        ("it-lives", scripted(keep, &[all_stored, criu_ended + yes, died, term, acknowledged])),
        ("held-signal", scripted(once, &[hangup, all_stored, term, acknowledged])),
        (
            "disowned",
            scripted(keep, &[disowned, all_stored, disowned, died, lost, up, disowned, request + yes]),
        ),
        (
            "not-told",
            [&scripted(once, &[lost, no_link, up])[..], &scripted(keep, &[])[1..5], &[lost]].concat(),
        ),
        ("never-asked", vec![keep, up, request, announced, ended + yes, request, held + yes]),
        (
            "prepared",
            scripted(restored, &[prepared, all_stored, prepared, criu_ended, died, up, acknowledged + yes]),
        ),
        ("not-prepared", scripted(restored, &[all_stored, restore_failed, prepared, lost, no_link])),
        ("died-before", scripted(restored, &[all_stored, died, criu_ended, died, acknowledged + yes])),
        ("comes-back", scripted(restored, &[all_stored, lost + broken, up, all_stored, prepared, died])),
        ("half-killed", scripted(restored, &[all_stored, prepared, criu_ended + broken, died, disowned])),
        (
            "killed-asking",
            scripted(restored | keep, &[killed, up, criu_ended + yes, lost, up, acknowledged, request]),
        ),
        (
            "killed-allowed",
            scripted(
                restored,
                &[all_stored, prepared, criu_ended + broken, killed, criu_ended, resolve + yes],
            ),
        ),
        ("killed-released", scripted(once, &[all_stored, died, killed, up, acknowledged + yes])),
        (
            "killed-leave-running",
            scripted(leave_running | keep, &[killed, criu_ended + yes, acknowledged + yes]),
        ),
        ("by-hand", scripted(restored, &[all_stored, resolve, resolve])),
        // Events of the sink: a peer, its end, the restore's end, a signal, all of a scripted session, its word.
        ("sink", vec![1, 0, 1 + yes, 0, 2, 3, 2 + yes]),
        ("sink-keep", vec![3, 0, 1, 0, 1 + yes, 3, 0, 2 + yes, 1, 3, 0, 3, 3]),
        ("sink-released", vec![1, 0, 9, 0, 3, 11 + yes, 0, 11 + yes, 0, 11, 0, 2 + yes]),
        ("sink-rolled-back", vec![3, 0, 9, 11, 1, 11, 0, 11 + yes, 0, 0, 1 + yes + 64, 11 + yes, 0, 3]),
        // The copy: a restore begins, it stands ready, it fails; the daemon is killed, the copy is lost.
        ("sink-prepared", vec![1, 0, 9 + yes, 14, 14, 15, 11 + yes, 0, 2 + yes]),
        ("sink-copy-failed", vec![3, 0, 9 + yes, 14, 15, 16, 14, 11 + yes, 0, 2 + yes, 0]),
        ("sink-killed", vec![1, 0, 9 + yes, 14, 15, 17 + 64, 0, 11 + yes, 0, 17 + 64, 11 + yes, 0, 2 + yes]),
        ("sink-killed-making", vec![1, 0, 9 + yes, 14, 17 + 64 + yes, 11 + yes, 0, 0]),
        ("sink-lost", vec![1, 0, 9 + yes, 14, 15, 17 + 64, 18, 11 + yes, 0, 0, 9, 18]),
        (
            "sink-remembers",
            [&[3][..], &[0, 9, 11 + yes, 0].repeat(18), &[11 + yes, 15, 11 + yes, 16]].concat(),
        ),
    ]
}

fn store() -> Seeds {
    // Lengths by their last two bits: few; around the inline limit; anything.
    let (few, around, far) = ([40, 0], [129, 0], [2, 255]);
    let join = |budget: u8, parts: &[&[u8]]| [&[budget][..], &parts.concat()].concat();
    // A limit of so many KiB: 4; a spill file too: 8.
    let limited = |first: u8, limit: u8, parts: &[&[u8]]| [&[first, limit][..], &parts.concat()].concat();
    let (moved, punch) = ([12, 0, 2, 99, 2, 50], [14, 0, 2, 99]);
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
            "limit",
            limited(
                4,
                30,
                &[&create, &create, &append(0, far), &append(1, far), &moved, &append(1, few), &read],
            ),
        ),
        (
            "limit-spilled",
            limited(
                13,
                30,
                &[&create, &append(0, far), &append(0, far), &moved, &punch, &read, &truncate(around), &read],
            ),
        ),
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

fn record() -> Seeds {
    // A line of each key; a proxy has no view.
    let lines = |numbers: &[u8], task: u8| {
        let numbered = numbers.iter().copied().zip(0..).chain([(task, 15)]);
        let lines = numbered.flat_map(|(number, which)| [1, which, number, 0]);
        [1].into_iter().chain(lines).collect::<Vec<u8>>()
    };
    let cache = [0, 1, 7, 5, 1, 2, 3, 4, 0, 5, 1, 6, 1, 9, 3];
    let kept = [0, 1, 7, 8, 1, 2, 3, 4, 0, 5, 1, 6, 0, 8, 5];
    let proxy = [0, 0, 7, 2, 1, 2, 3, 4, 1, 5, 0, 6];
    let text = "criu-relay record 1\nrole cache\nsession 000102030405060708090a0b0c0d0e0f\nstate prepared\nboot b-1\n\
                pid-namespace 4026531836\ntime-namespace 4026531834\ndaemon 10 20\nimages-dir /a\\\\b\\nc\n\
                leave-running no\npeer 10.0.0.1:9996\nview /dev/shm/v\ncommit restored\nimages 12 67108864\n\
                colour blue\ntask 12 7\ntask 13 8 stays\nend\n";
    vec![
        ("cache", lines(&cache, 9)),
        ("kept", lines(&kept, 9)),
        ("kept-half", lines(&kept[..14], 9)),
        ("proxy", [lines(&proxy, 8), vec![1, 15, 7, 0, 0, 3, b'x', b' ', b'y']].concat()),
        ("twice", [lines(&proxy, 8), vec![1, 4, 1, 0]].concat()),
        ("file", [&b"\0"[..], text.as_bytes()].concat()),
        ("cut-off", [&b"\0"[..], &text.as_bytes()[..text.len() - 4]].concat()),
    ]
}
