use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

fn record() -> Record {
    Record {
        role: Verb::Cache,
        session: *b"\x00\x01\x23\x45\x67\x89\xab\xcd\xef\xff0123\x0a ",
        state: State::Prepared,
        place: Place { boot: "b-1".into(), pid_namespace: 4026531836, time_namespace: 0 },
        daemon: Identity { pid: 10, start: u64::MAX },
        images_dir: OsString::from_vec(b"/a b\\c\nd\xff/".to_vec()).into(),
        criu: Some(Identity { pid: i32::MAX, start: 0 }),
        tasks: vec![
            Task { who: Identity { pid: 12, start: 7 }, stays: false },
            Task { who: Identity { pid: 13, start: 8 }, stays: true },
        ],
        leave_running: true,
        peer: "10.0.0.1:9996 \u{e4}\\\n".into(),
        kept: Some(Kept { dir: "/a\nb".into(), commit: Commit::Restored, images: 0, bytes: u64::MAX }),
    }
}

#[test]
fn round_trip() {
    for state in State::ALL {
        for role in [Verb::Proxy, Verb::Cache] {
            let mut record = Record { role, state, ..record() };
            let again = Record::decode(&record.encode());
            assert_eq!(again.is_ok(), state.is_of(role), "{again:?}");
            assert!(again.is_err() || again.as_ref() == Ok(&record));
            record.state = State::Released;
            (record.criu, record.leave_running) = (None, false);
            record.tasks.clear();
            record.peer.clear();
            assert_eq!(Record::decode(&record.encode()).as_ref(), Ok(&record));
        }
    }
}

#[test]
fn it_can_be_read() {
    let text = String::from_utf8_lossy(&record().encode()).into_owned();
    assert_eq!(
        text,
        "criu-relay record 1\nrole cache\nsession 000123456789abcdefff303132330a20\nstate prepared\nboot b-1\n\
         pid-namespace 4026531836\ntime-namespace 0\ndaemon 10 18446744073709551615\nimages-dir /a b\\\\c\\nd\u{fffd}/\n\
         criu 2147483647 0\nleave-running yes\npeer 10.0.0.1:9996 \u{e4}\\\\\\n\n\
         view /a\\nb\ncommit restored\nimages 0 18446744073709551615\ntask 12 7\ntask 13 8 stays\nend\n"
    );
}

#[test]
fn what_does_not_fit() {
    let lines: Vec<String> = {
        let record = Record { images_dir: "/dir".into(), ..record() };
        String::from_utf8(record.encode()).unwrap().lines().map(String::from).collect()
    };
    let decode = |lines: &[String]| Record::decode((lines.join("\n") + "\n").as_bytes());
    assert!(decode(&lines).is_ok());
    for (at, line) in lines.iter().enumerate() {
        let key = line.split(' ').next().unwrap();
        // Without the line: some may be missing.
        let mut fewer = lines.clone();
        fewer.remove(at);
        assert_eq!(decode(&fewer).is_ok(), matches!(key, "criu" | "task" | "view"), "{line}");
        // Twice.
        let mut more = lines.clone();
        more.insert(at, line.clone());
        let fine = matches!(key, "task" | "end" | "criu-relay");
        let twice = decode(&more);
        assert_eq!(twice.is_ok(), fine, "{line}");
        if !fine {
            assert_eq!(twice, Err(format!("line {}: \"{}\": it is there twice", at + 2, shown(line))));
        }
        // Nothing where something has to be.
        let mut empty = lines.clone();
        empty[at] = key.into();
        let fine = matches!(key, "boot" | "images-dir" | "peer" | "view" | "end");
        let got = decode(&empty);
        assert_eq!(got.is_ok(), fine, "{line}");
        assert!(got.is_ok() || got.unwrap_err().starts_with(&format!("line {}: ", at + 1)));
    }
    // Cut off anywhere, it is not taken for a smaller tree.
    let whole = lines.join("\n") + "\n";
    for end in 0..whole.len() - 1 {
        assert!(Record::decode(&whole.as_bytes()[..end]).is_err(), "{end}");
    }
    // What is not known is skipped, and so is all behind the end.
    let mut newer = lines.clone();
    newer.insert(3, "colour \u{1}blue".into());
    newer.insert(3, String::new());
    newer.push("state made".into());
    assert_eq!(decode(&newer), decode(&lines));
}

fn shown(line: &str) -> String {
    line.as_bytes().escape_ascii().to_string()
}

#[test]
fn values_that_are_wrong() {
    for line in [
        "role relay",
        "session 00",
        "session 000123456789ABCDEFFF303132330A20",
        "state Made",
        "state asking",
        "pid-namespace -1",
        "pid-namespace +1",
        "pid-namespace 01",
        "pid-namespace 18446744073709551616",
        "daemon 1",
        "daemon 1 2 3",
        "daemon 0 2",
        "daemon -1 2",
        "daemon 2147483648 2",
        "daemon  1 2",
        "images-dir \\x",
        "images-dir /\\",
        "leave-running maybe",
        "task 1 2 goes",
        "task 1 2  stays",
        "task stays",
        "peer \u{1}\\",
    ] {
        let key = line.split(' ').next().unwrap();
        let text = String::from_utf8_lossy(&record().encode()).into_owned();
        let mut done = false;
        let lines = text.lines().map(|old| match old.split(' ').next() {
            Some(first) if first == key && !std::mem::replace(&mut done, true) => line.to_string() + "\n",
            _ => old.to_string() + "\n",
        });
        let why = Record::decode(lines.collect::<String>().as_bytes()).unwrap_err();
        assert!(done && !why.chars().any(char::is_control), "{line}: {why}");
    }
    for first in ["", "\n", "criu-relay record 2\n", "criu-relay record 1", "\u{0}"] {
        assert!(Record::decode(first.as_bytes()).unwrap_err().starts_with("line 1"), "{first}");
    }
}

#[test]
fn the_largest_tree() {
    let task = Task { who: Identity { pid: i32::MAX, start: u64::MAX }, stays: true };
    let mut large = Record { tasks: vec![task; MAX_TASKS as usize], ..record() };
    let bytes = large.encode();
    assert!((bytes.len() as u64) < MAX_SIZE, "{}", bytes.len());
    assert_eq!(Record::decode(&bytes).unwrap(), large);
    large.tasks.push(task);
    assert!(Record::decode(&large.encode()).unwrap_err().contains("more than 1048576 processes"));
}

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("criu-relay-{}-record-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn all(dir: &Path) -> Result<Vec<Record>, String> {
    Record::load_all(dir, None)
}

#[test]
fn files() {
    let dir = Dir::new("files");
    let dir = dir.0.as_path();
    assert_eq!(all(dir), Ok(vec![]));
    let cache = record();
    let proxy = Record { role: Verb::Proxy, state: State::Asking, ..record() };
    cache.store(dir).unwrap();
    proxy.store(dir).unwrap();
    assert_eq!(all(dir), Ok(vec![cache.clone(), proxy.clone()]));
    assert_eq!(Record::load_all(dir, Some(Verb::Proxy)), Ok(vec![proxy.clone()]));
    let path = dir.join("criu-relay-cache-000123456789abcdefff303132330a20.record");
    assert_eq!(path, cache.path(dir));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    // Written anew: another file in its place, so that nobody reads half of it. What was left in the way of that
    // by a daemon that died is no hindrance, and no record.
    let before = fs::metadata(&path).unwrap().ino();
    let _held = fs::File::open(&path).unwrap();
    fs::write(path.with_extension("record.new"), "half").unwrap();
    let decided = Record { state: State::Released, ..cache };
    decided.store(dir).unwrap();
    assert_ne!(fs::metadata(&path).unwrap().ino(), before);
    assert_eq!(all(dir), Ok(vec![decided.clone(), proxy.clone()]));
    fs::write(path.with_extension("record.new"), "half").unwrap();
    fs::write(dir.join("criu-relay-proxy.log"), "no record").unwrap();
    assert_eq!(all(dir).unwrap().len(), 2);
    decided.remove(dir).unwrap();
    decided.remove(dir).unwrap();
    assert_eq!(all(dir), Ok(vec![proxy]));
}

#[test]
fn files_that_are_wrong() {
    let dir = Dir::new("wrong");
    let dir = dir.0.as_path();
    let path = record().path(dir);
    let refused = |why: &str| {
        let said = all(dir).unwrap_err();
        assert!(said.contains(&path.display().to_string()) && said.contains(why), "{said}");
        fs::remove_file(&path).unwrap();
    };
    fs::write(&path, "junk").unwrap();
    refused("line 1");
    // Found under the name of another session.
    let other = Record { session: [1; 16], ..record() };
    fs::write(&path, other.encode()).unwrap();
    refused("belongs into criu-relay-cache-01010101");
    // It is not even read to its end.
    fs::File::create(&path).unwrap().set_len(MAX_SIZE + 1).unwrap();
    refused("longer than");
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    refused("symbolic link");
    assert!(record().store(&dir.join("missing")).unwrap_err().contains("can't be written"));
    assert!(all(&dir.join("missing")).unwrap_err().contains("missing"));
}
