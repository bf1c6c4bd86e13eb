//! The directory, alone.

mod left;

use super::*;

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::cli::Persist;
use crate::store::body::MEMFD;

/// Where a view is, and the memory of a cache that is not there.
struct Place {
    around: PathBuf,
    dir: PathBuf,
}

impl Place {
    fn new() -> Self {
        Self::below(std::env::temp_dir())
    }

    /// Where files without a name can be made: not every file system can.
    fn for_files() -> Self {
        let shm = Path::new("/dev/shm");
        Self::below(if shm.is_dir() { shm.into() } else { std::env::temp_dir() })
    }

    fn below(dir: PathBuf) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let around = dir.join(format!("crt-view-{}-{count}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&around).unwrap();
        let dir = fs::canonicalize(&around).unwrap().join("view");
        Self { around, dir }
    }

    fn open(&self, persist: Option<Persist>) -> Result<View, String> {
        View::open(&cli::View { dir: self.dir.clone(), persist })
    }

    fn view(&self) -> View {
        self.open(None).unwrap()
    }

    fn persistent(&self) -> View {
        self.open(Some(Persist::Disk)).unwrap()
    }

    /// What is there, in order; a directory with what is in it.
    fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        list(&self.dir, "", &mut names);
        names.sort();
        names
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.dir.join(name)).unwrap()
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.dir.join(name), bytes).unwrap();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.around);
    }
}

fn list(dir: &Path, before: &str, names: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{before}{}", entry.file_name().display());
        match entry.file_type().unwrap().is_dir() {
            true => list(&entry.path(), &format!("{name}/"), names),
            false => names.push(name),
        }
    }
}

/// The file of a body.
fn body(view: &View, bytes: &[u8]) -> OwnedFd {
    let file = match view.persists {
        true => {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            rustix::fs::openat(view.open_dir().unwrap(), ".", flags, Mode::RUSR | Mode::WUSR).unwrap()
        }
        false => rustix::fs::memfd_create("a body", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
    };
    rustix::io::pwrite(&file, bytes, 0).unwrap();
    file
}

/// An image that is complete; its descriptor, which the cache keeps.
fn add(view: &mut View, id: &str, name: &str, bytes: &[u8]) -> OwnedFd {
    let file = body(view, bytes);
    view.add(&Key::new(id.as_bytes(), name.as_bytes()), file.as_fd()).unwrap();
    file
}

/// A dump of the stream dialect, which is not to be seen yet.
fn dump(view: &mut View) -> Vec<OwnedFd> {
    [("pages-1.img", &b"pages"[..]), ("pstree.img", b"tree"), ("inventory.img", b"inventory")]
        .map(|(name, bytes)| add(view, "", name, bytes))
        .into()
}

const SESSION: SessionId = [0xab; 16];

fn withheld() -> String {
    format!(".inventory.img.{}", "ab".repeat(16))
}

// --- Names.

#[test]
fn names_from_the_network_are_names_of_images_only() {
    let place = Place::new();
    let mut view = place.view();
    let long = |len: usize| [&vec![b'n'; len - 4][..], b".img"].concat();
    let wrong: [&[u8]; 14] = [
        b"",
        b".",
        b"..",
        b".img",
        b".x.img",
        b".inventory.img",
        b"a/b",
        b"a/b.img",
        b"/a.img",
        b"../a.img",
        b"a\0b.img",
        b"a.img\0",
        b"pages-1",
        b"relay-cache.sock",
    ];
    for name in wrong.into_iter().map(<[u8]>::to_vec).chain([long(256), long(4096)]) {
        for id in [&b""[..], b"/dump/1"] {
            let file = body(&view, b"x");
            let key = Key::new(id, name.clone());
            let why = view.add(&key, file.as_fd()).unwrap_err();
            assert!(why.contains("is no name that an image may have in a directory (--view)"), "{why}");
        }
    }
    assert!(
        place.names().is_empty() && fs::read_dir(&place.dir).unwrap().count() == 0,
        "not even a directory"
    );
    // All that can be a name is one.
    let files: Vec<_> = [long(255), b"\xff\n .img".to_vec(), b"-rf.img".to_vec()]
        .into_iter()
        .map(|name| {
            let file = body(&view, &name);
            view.add(&Key::stream(&name[..]), file.as_fd()).unwrap();
            assert_eq!(fs::read(place.dir.join(OsStr::from_bytes(&name))).unwrap(), name);
            file
        })
        .collect();
    drop((view, files));
    assert!(!place.dir.exists());
}

#[test]
fn snapshots_are_called_as_the_last_part_of_their_ids() {
    let plain = [(&b"/var/dumps/1"[..], &b"1"[..]), (b"2", b"2"), (b"/a/b//", b"b"), (b"/sp ace", b"sp ace")];
    for (id, name) in plain {
        assert_eq!(snapshot_name(id), name);
    }
    let others: [&[u8]; 8] =
        [b"/", b"//", b"/a/..", b"..", b"/a/.hidden", b"/a\0b", b"/x/inventory.img", b"/relay-cache.sock"];
    for id in others {
        assert_eq!(snapshot_name(id), b"snapshot", "{}", id.escape_ascii());
    }
    assert_eq!(snapshot_name(&[b'n'; 200]), [b'n'; 200]);
    assert_eq!(snapshot_name(&[b'n'; 201]), b"snapshot");
}

#[test]
fn snapshots_of_the_same_name_are_told_apart() {
    let place = Place::new();
    let mut view = place.view();
    let long = format!("/a/{}", "n".repeat(200));
    let long2 = format!("/b/{}", "n".repeat(200));
    let ids = ["/a/1", "/b/1", "/c/1", "/..", "/.x", &long, &long2];
    let mut files = Vec::new();
    for id in ids {
        files.push(add(&mut view, id, "core-1.img", id.as_bytes()));
        files.push(add(&mut view, id, "core-2.img", id.as_bytes()));
    }
    let (long, long2) = ("n".repeat(200), format!("{}~2", "n".repeat(200)));
    for (id, name) in ids.iter().zip(["1", "1~2", "1~3", "snapshot", "snapshot~2", &long, &long2]) {
        assert_eq!(place.read(&format!("{name}/core-1.img")), id.as_bytes());
        assert_eq!(fs::metadata(place.dir.join(name)).unwrap().mode() & 0o7777, 0o700);
        let socket = fs::read_link(place.dir.join(name).join("relay-cache.sock")).unwrap();
        assert_eq!(socket, Path::new("../relay-cache.sock"));
    }
    assert_eq!(place.names().len(), 3 * ids.len());
    view.clear();
    assert!(fs::read_dir(&place.dir).unwrap().next().is_none());
    // The next dump begins anew.
    files.push(add(&mut view, "/c/1", "core-1.img", b"next"));
    assert_eq!(place.read("1/core-1.img"), b"next");
}

#[test]
fn a_directory_that_is_not_ours_is_not_made_a_snapshot() {
    let place = Place::new();
    let mut view = place.view();
    DirBuilder::new().create(place.dir.join("1")).unwrap();
    let file = body(&view, b"x");
    let why = view.add(&Key::new(*b"/a/1", *b"core-1.img"), file.as_fd()).unwrap_err();
    assert!(why.contains("/view/1, in the view of the images (--view): File exists"), "{why}");
    view.clear();
    assert!(place.dir.join("1").is_dir());
}

#[test]
fn a_snapshot_of_ours_is_one_again_whatever_lies_in_it() {
    let place = Place::new();
    let mut view = place.view();
    let mut files = vec![add(&mut view, "/a/1", "core-1.img", b"first")];
    fs::write(place.dir.join("1/restore.log"), b"of CRIU").unwrap();
    view.clear();
    assert_eq!(place.names(), ["1/restore.log"]);
    files.push(add(&mut view, "/a/1", "core-1.img", b"next"));
    assert_eq!(place.read("1/core-1.img"), b"next");
}

// --- What appears, and when.

#[test]
fn the_inventory_appears_last() {
    let place = Place::new();
    let mut view = place.view();
    // Whatever comes behind it.
    let mut files = vec![add(&mut view, "", "inventory.img", b"inventory")];
    assert_eq!(place.names(), [".inventory.img"]);
    files.push(add(&mut view, "", "pages-1.img", b"pages"));
    assert_eq!(place.names(), [".inventory.img", "pages-1.img"]);
    assert!(!view.shows());
    view.reveal(&[]).unwrap();
    assert_eq!(place.names(), ["inventory.img", "pages-1.img"]);
    assert!(view.shows() && view.restore_dir() == place.dir);
    assert_eq!(
        (place.read("inventory.img"), place.read("pages-1.img")),
        (b"inventory".into(), b"pages".into())
    );
    // They are links to our own descriptors.
    let link = fs::read_link(place.dir.join("pages-1.img")).unwrap();
    assert_eq!(link, Path::new(&format!("/proc/{}/fd/{}", std::process::id(), files[1].as_raw_fd())));
    view.hide();
    assert!(!view.shows() && place.names() == ["pages-1.img"]);
    view.clear();
    assert!(place.names().is_empty() && place.dir.is_dir());
}

#[test]
fn an_image_that_is_written_again_is_replaced() {
    for persist in [None, Some(Persist::Disk)] {
        let place = Place::for_files();
        let mut view = place.open(persist).unwrap();
        let first = add(&mut view, "", "pages-1.img", b"first");
        // The same file has grown, and is complete once more.
        rustix::io::pwrite(&first, b" and more", 5).unwrap();
        view.add(&Key::stream(*b"pages-1.img"), first.as_fd()).unwrap();
        assert_eq!(place.read("pages-1.img"), b"first and more");
        assert_eq!(place.names(), ["pages-1.img"], "{persist:?}");
        let second = add(&mut view, "", "pages-1.img", b"second");
        assert_eq!(
            (place.read("pages-1.img"), place.names()),
            (b"second".into(), vec!["pages-1.img".into()])
        );
        view.clear();
        drop((view, first, second));
        assert!(!place.dir.exists(), "{persist:?}");
    }
}

#[test]
fn a_chain_of_snapshots() {
    let place = Place::new();
    let mut view = place.view();
    // In any order: the last of the list is restored.
    let mut files = Vec::new();
    for id in ["/d/3", "/d/1", "/d/2"] {
        files.push(add(&mut view, id, "inventory.img", id.as_bytes()));
        files.push(add(&mut view, id, "pages-1.img", id.as_bytes()));
    }
    assert!(!place.names().iter().any(|name| name.ends_with("/inventory.img")));
    // One of which nothing has come is none.
    let ids = ["/d/1", "/d/none", "/d/2", "/d/3"].map(|id| id.as_bytes().to_vec());
    view.reveal(&ids).unwrap();
    assert!(view.shows() && view.restore_dir() == place.dir.join("3"));
    for (name, parent) in [("2", "../1"), ("3", "../2")] {
        assert_eq!(fs::read_link(place.dir.join(name).join("parent")).unwrap(), Path::new(parent));
    }
    assert!(!place.dir.join("1/parent").exists());
    assert_eq!(place.read("3/parent/parent/inventory.img"), b"/d/1");
    view.hide();
    assert!(!place.names().iter().any(|name| name.ends_with("/inventory.img")));
    drop(view);
    assert!(!place.dir.exists());
}

#[test]
fn a_dump_is_taken_back() {
    for persist in [None, Some(Persist::Disk)] {
        let place = Place::for_files();
        let mut view = place.open(persist).unwrap();
        let _files = dump(&mut view);
        view.take_back(SESSION).unwrap();
        assert!(place.names().contains(&".inventory.img".into()), "nothing was to be seen");
        if view.persists() {
            view.withhold(SESSION).unwrap();
            assert_eq!(place.names()[..2], [SCRIPTED.into(), withheld()]);
            assert!(view.withhold(SESSION).is_ok(), "once more is the same");
        }
        view.reveal(&[]).unwrap();
        assert!(view.shows() && place.dir.join("inventory.img").exists());
        view.take_back(SESSION).unwrap();
        let hidden = if view.persists() { withheld() } else { ".inventory.img".into() };
        assert!(!view.shows());
        let names = place.names().into_iter().filter(|name| name != SCRIPTED);
        assert_eq!(names.collect::<Vec<_>>(), [&hidden, "pages-1.img", "pstree.img"]);
        // Released after all.
        view.reveal(&[]).unwrap();
        let mut names = place.names();
        names.retain(|name| name != SCRIPTED);
        assert_eq!(names, ["inventory.img", "pages-1.img", "pstree.img"]);
        assert_eq!(place.read("inventory.img"), b"inventory");
        view.clear();
        assert!(place.names().is_empty());
        assert!(view.withhold(SESSION).unwrap_err().contains("has no inventory.img to be withheld"));
    }
}

#[test]
fn what_is_not_ours_stays() {
    let place = Place::new();
    DirBuilder::new().mode(0o755).create(&place.dir).unwrap();
    for name in ["notes", ".hidden", "dump.log"] {
        place.write(name, b"mine");
    }
    symlink("/etc/passwd", place.dir.join("link.img")).unwrap();
    symlink("/proc/self/fd/1", place.dir.join("self.img")).unwrap();
    symlink("/proc/1/fd/1/x", place.dir.join("deep.img")).unwrap();
    DirBuilder::new().create(place.dir.join("sub")).unwrap();
    place.write("sub/pages-1.img", b"mine");
    symlink("../relay-cache.sock.old", place.dir.join("sub/relay-cache.sock")).unwrap();
    let before = place.names();
    let mut view = place.view();
    assert!(matches!(view.take_over(), Ok(Left::Nothing)));
    assert_eq!(place.names(), before);
    let files = dump(&mut view);
    view.reveal(&[]).unwrap();
    // Of a snapshot too.
    let more = add(&mut view, "/d/1", "pages-1.img", b"pages");
    place.write("1/notes", b"mine");
    drop(view);
    let mut after = before;
    after.insert(after.partition_point(|name| name.as_str() < "1/notes"), "1/notes".into());
    assert_eq!(place.names(), after);
    assert_eq!(place.read("notes"), b"mine");
    drop((files, more));
}

// --- The directory itself.

#[test]
fn it_is_removed_if_it_was_made() {
    let place = Place::new();
    let view = place.view();
    assert_eq!(fs::metadata(&place.dir).unwrap().permissions().mode() & 0o7777, 0o700);
    drop(view);
    assert!(!place.dir.exists());
    // Also when it outlives us, if nothing is in it.
    drop(place.persistent());
    assert!(!place.dir.exists());
    DirBuilder::new().mode(0o755).create(&place.dir).unwrap();
    drop(place.view());
    assert_eq!(fs::metadata(&place.dir).unwrap().permissions().mode() & 0o7777, 0o755);
}

#[test]
fn one_that_will_not_do_is_refused() {
    let place = Place::new();
    let refused = |persist| place.open(persist).unwrap_err();
    place_at(&place, |dir| fs::write(dir, "").unwrap());
    assert!(refused(None).contains("is not a directory"), "{}", refused(None));
    place_at(&place, |dir| {
        DirBuilder::new().create(dir).unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
    });
    assert!(refused(None).contains("is writable by others (mode 0777)"), "{}", refused(None));
    let missing = View::open(&cli::View { dir: place.around.join("no/view"), persist: None }).unwrap_err();
    assert!(
        missing.contains("can't be made: No such file or directory") && missing.contains("(--view)"),
        "{missing}"
    );
}

// Makes another thing there.
fn place_at(place: &Place, make: impl Fn(&Path)) {
    let _ = fs::remove_file(&place.dir);
    let _ = fs::remove_dir_all(&place.dir);
    make(&place.dir);
}

#[test]
fn what_outlives_us_is_in_memory_unless_a_disk_will_do() {
    // The one file system that is no tmpfs wherever this runs.
    let why = check_file_system(Path::new("/proc/self"), Persist::Tmpfs).unwrap_err();
    assert!(why.contains("/proc/self is not on a tmpfs") && why.contains("--persist=disk"), "{why}");
    assert_eq!(check_file_system(Path::new("/proc/self"), Persist::Disk), Ok(()));
    if Path::new("/dev/shm").exists() {
        assert_eq!(check_file_system(Path::new("/dev/shm"), Persist::Tmpfs), Ok(()));
    }
    assert!(check_file_system(Path::new("/does/not/exist"), Persist::Tmpfs).is_err());
    // A directory that was made for it goes again.
    let place = Place::new();
    let on_tmpfs = check_file_system(&place.around, Persist::Tmpfs).is_ok();
    assert_eq!(place.open(Some(Persist::Tmpfs)).is_ok(), on_tmpfs);
    assert!(!place.dir.exists());
}

// --- Who reads.

#[test]
fn who_has_a_file_open_is_found() {
    for persist in [None, Some(Persist::Disk)] {
        let place = Place::for_files();
        let mut view = place.open(persist).unwrap();
        let file = match persist {
            Some(_) => body(&view, b"pages"),
            None => rustix::fs::memfd_create(MEMFD, rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        };
        let other = body(&view, b"another");
        view.add(&Key::stream(*b"pages-1.img"), file.as_fd()).unwrap();
        view.add(&Key::stream(*b"pages-2.img"), other.as_fd()).unwrap();
        let found = |files: &[&OwnedFd]| readers(files.iter().map(|file| file.as_fd()), view.dir());
        assert_eq!(found(&[&file, &other]), []);
        let mut child = std::process::Command::new("sleep");
        child.arg("1000").stdin(File::open(place.dir.join("pages-1.img")).unwrap());
        let mut child = child.spawn().unwrap();
        let ours = [child.id() as i32];
        assert_eq!(found(&[&file]), ours);
        assert_eq!(found(&[&other]), []);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found(&[&file]), []);
        view.clear();
    }
}
