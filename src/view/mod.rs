//! Images as a directory: each complete image appears under its name, so that `criu restore` without `--stream`, and
//! whatever else reads images from files, reads the memory of the cache.
//!
//! Theory of operation. An image is a link to `/proc/PID/fd/N` of the cache, or (`--persist`) a name of the file that it
//! is. It is made under another name and renamed, so that nobody sees half of it; and `inventory.img`, without which no
//! tool restores, appears last. Until then it has a hidden name: [`WITHHELD`] while the dump arrives, and behind that
//! the session's name once the dump is stored and its source decides, so that a cache that is started again on the
//! directory knows what it finds there ([`Left`]).
//!
//! A dump of the stream dialect lies in the directory itself. In the remote dialect each snapshot has a subdirectory,
//! called as the last part of its id, with the link `parent` to the one before it.

mod left;
mod readers;
mod remains;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fstatfs, linkat, open};
use rustix::io::Errno;

use crate::cli::{self, Verb};
use crate::record;
use crate::script;
use crate::sockets;
use crate::store::catalog::INVENTORY;
use crate::store::spill::TMPFS;
use crate::wire::Key;
use crate::wire::relay::SessionId;

pub use left::{Left, reveal_withheld};
pub use readers::readers;
pub use remains::{Remains, Sight};

/// An inventory.img that nobody is to find yet.
const WITHHELD: &str = ".inventory.img";
/// What a name is made under.
const NEW: &str = ".criu-relay.new";
/// Says that CRIU's action script had announced the dump that is there, once no record does any more.
const SCRIPTED: &str = ".criu-relay.scripted";
/// The link from a snapshot to the one before it.
const PARENT: &str = "parent";
/// What CRIU leaves where it restores, unless its work directory (-W) is another.
const BY_PRODUCTS: [&str; 2] = ["stats-restore", "lazy-pages.socket"];
/// How long a name may be, in bytes, on every file system.
const NAME_MAX: usize = 255;
/// How long that of a snapshot may be, so that one more can be told from it.
const SNAPSHOT_MAX: usize = 200;

/// The directory.
#[derive(Debug)]
pub struct View {
    dir: PathBuf,
    // Whether it was made by us, and goes with us.
    made: bool,
    persists: bool,
    // What we have put there, by where it is in the directory; false: only other names.
    names: BTreeMap<PathBuf, bool>,
    // Subdirectories of ours in which somebody else has left something.
    stayed: HashSet<PathBuf>,
    // The subdirectory of each snapshot.
    snapshots: HashMap<Box<[u8]>, OsString>,
    // The hidden inventory.img of each dump, by its directory.
    withheld: BTreeMap<PathBuf, PathBuf>,
    // Whether a dump can be restored from here, and from where in it.
    shows: bool,
    last: PathBuf,
}

impl View {
    /// Makes the directory, if it is not there. The error is a sentence.
    pub fn open(options: &cli::View) -> Result<Self, String> {
        let dir = &options.dir;
        let wrong = |error: io::Error| format!("the view {} can't be made: {error} (--view)", dir.display());
        let made = match DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(wrong(error)),
        };
        let checked = sockets::check_dir(dir).and_then(|()| match &options.persist {
            Some(persist) => check_file_system(dir, *persist),
            None => Ok(()),
        });
        if let Err(why) = checked {
            if made {
                let _ = fs::remove_dir(dir);
            }
            return Err(why);
        }
        Ok(Self::at(fs::canonicalize(dir).map_err(wrong)?, made, options.persist.is_some()))
    }

    // One to look at, whose cache has gone: it leaves everything as it is.
    fn of_nobody(dir: &Path) -> Self {
        Self::at(dir.into(), false, true)
    }

    // One with nothing of ours in it.
    fn at(dir: PathBuf, made: bool, persists: bool) -> Self {
        Self {
            dir,
            made,
            persists,
            names: BTreeMap::new(),
            stayed: HashSet::new(),
            snapshots: HashMap::new(),
            withheld: BTreeMap::new(),
            shows: false,
            last: PathBuf::new(),
        }
    }

    /// Where it is, absolute.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether what is there outlives this process.
    pub fn persists(&self) -> bool {
        self.persists
    }

    /// Whether a dump can be restored from here.
    pub fn shows(&self) -> bool {
        self.shows
    }

    /// Whether there is no dump to restore, not even one that is withheld.
    pub fn is_spent(&self) -> bool {
        !self.shows && self.withheld.is_empty()
    }

    /// Where a restore finds the dump.
    pub fn restore_dir(&self) -> PathBuf {
        if self.last.as_os_str().is_empty() { self.dir.clone() } else { self.dir.join(&self.last) }
    }

    /// The directory itself, in which files without a name can be made.
    pub fn open_dir(&self) -> Result<OwnedFd, String> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(&self.dir, flags, Mode::empty()).map_err(|error| self.wrong(&self.dir, error.into()))
    }

    /// The image is complete: `file` has all of it and nothing else. It appears under its name, or replaces what is
    /// there; inventory.img does not yet. The error is a sentence.
    pub fn add(&mut self, key: &Key, file: BorrowedFd<'_>) -> Result<(), String> {
        let name = file_name(key)?;
        let dir = self.dir_of(&key.snapshot_id)?;
        let path = match name.as_bytes() == INVENTORY {
            true => {
                let hidden = dir.join(WITHHELD);
                self.withheld.insert(dir, hidden.clone());
                hidden
            }
            false => dir.join(name),
        };
        self.put(&path, |new| match self.persists {
            // The magic link is followed: it needs no privilege, as a link by the descriptor alone would.
            true => Ok(linkat(CWD, own_link(file), CWD, new, AtFlags::SYMLINK_FOLLOW)?),
            false => symlink(own_link(file).replace("self", &std::process::id().to_string()), new),
        })?;
        self.names.insert(path, false);
        Ok(())
    }

    // Makes something under another name, and renames it.
    fn put(&self, path: &Path, make: impl Fn(&Path) -> io::Result<()>) -> Result<(), String> {
        let (new, path) = (self.dir.join(NEW), self.dir.join(path));
        let made = make(&new).or_else(|error| match error.kind() {
            // One that was killed has left it.
            io::ErrorKind::AlreadyExists => fs::remove_file(&new).and_then(|()| make(&new)),
            _ => Err(error),
        });
        let renamed = made.and_then(|()| fs::rename(&new, &path));
        // An image that has grown is the file that has the name already: then rename(2) leaves both.
        if renamed.is_ok() && self.persists {
            let _ = fs::remove_file(&new);
        }
        renamed.map_err(|error| self.wrong(&path, error))
    }

    // Where the images of this snapshot are; relative.
    fn dir_of(&mut self, snapshot: &[u8]) -> Result<PathBuf, String> {
        if snapshot.is_empty() {
            return Ok(PathBuf::new());
        }
        if let Some(name) = self.snapshots.get(snapshot) {
            return Ok(name.into());
        }
        let name = snapshot_name(snapshot);
        let is_taken = |name: &OsString| self.snapshots.values().any(|other| other == name);
        let name = (2..).map(|n| [&name[..], format!("~{n}").as_bytes()].concat());
        let mut names = std::iter::once(snapshot_name(snapshot)).chain(name).map(OsString::from_vec);
        let name = names.find(|name| !is_taken(name)).unwrap_or_default();
        let path = self.dir.join(&name);
        match DirBuilder::new().mode(0o700).create(&path) {
            // CRIU's log may lie there still.
            Err(error)
                if error.kind() == io::ErrorKind::AlreadyExists && self.stayed.contains(Path::new(&name)) => {
            }
            made => made.map_err(|error| self.wrong(&path, error))?,
        }
        self.names.insert(PathBuf::from(&name), true);
        // CRIU's action script looks for us where it restores from.
        let socket = PathBuf::from(&name).join(control());
        self.put(&socket, |new| symlink(Path::new("..").join(control()), new))?;
        self.names.insert(socket, false);
        self.snapshots.insert(snapshot.into(), name.clone());
        Ok(name.into())
    }

    /// The dump is stored, and its source decides: should we die now, the next one on this directory knows whose it is.
    pub fn withhold(&mut self, session: SessionId) -> Result<(), String> {
        let Some(old) = self.withheld.remove(Path::new("")) else {
            return Err(format!("{} has no inventory.img to be withheld", self.dir.display()));
        };
        let hidden = withheld_name(session);
        // Only of a scripted dump the source decides.
        self.put(Path::new(SCRIPTED), |new| File::create_new(new).map(drop))?;
        self.names.insert(SCRIPTED.into(), false);
        self.rename(&old, &hidden)?;
        self.withheld.insert(PathBuf::new(), hidden);
        Ok(())
    }

    /// The dump can be restored: inventory.img appears. `snapshots`: in the order in which they were made, in the remote
    /// dialect.
    pub fn reveal(&mut self, snapshots: &[Vec<u8>]) -> Result<(), String> {
        let mut dirs: Vec<OsString> = Vec::new();
        for dir in snapshots.iter().filter_map(|id| self.snapshots.get(&id[..])) {
            // One that was made again is what was made last: none may be before itself.
            dirs.retain(|other| other != dir);
            dirs.push(dir.clone());
        }
        for pair in dirs.windows(2) {
            let path = Path::new(&pair[1]).join(PARENT);
            self.put(&path, |new| symlink(Path::new("..").join(&pair[0]), new))?;
            self.names.insert(path, false);
        }
        // The last of all is that of the last dump.
        let last = dirs.last().map(PathBuf::from).unwrap_or_default();
        let mut withheld: Vec<_> = std::mem::take(&mut self.withheld).into_iter().collect();
        withheld.sort_by_key(|(dir, _)| *dir == last);
        for (dir, hidden) in withheld {
            self.rename(&hidden, &dir.join(OsStr::from_bytes(INVENTORY)))?;
        }
        self.last = last;
        self.shows = true;
        Ok(())
    }

    /// The dump, which was revealed although its source has not decided, can't be restored any more; what reads already is
    /// not disturbed.
    pub fn take_back(&mut self, session: SessionId) -> Result<(), String> {
        if std::mem::take(&mut self.shows) {
            let hidden = if self.persists { withheld_name(session) } else { WITHHELD.into() };
            self.rename(Path::new(OsStr::from_bytes(INVENTORY)), &hidden)?;
            self.withheld.insert(PathBuf::new(), hidden);
        }
        Ok(())
    }

    fn rename(&mut self, old: &Path, new: &Path) -> Result<(), String> {
        let renamed = fs::rename(self.dir.join(old), self.dir.join(new));
        renamed.map_err(|error| self.wrong(&self.dir.join(new), error))?;
        self.names.remove(old);
        self.names.insert(new.into(), false);
        Ok(())
    }

    /// No restore is to begin from here any more. What reads already is not disturbed.
    pub fn hide(&mut self) {
        self.shows = false;
        let is_inventory = |path: &PathBuf| path.file_name().is_some_and(|name| name.as_bytes() == INVENTORY);
        let found: Vec<_> = self.names.keys().filter(|path| is_inventory(path)).cloned().collect();
        for path in found {
            self.remove(&path, false);
        }
    }

    /// The copy runs: not even whoever comes after us begins from here any more.
    pub fn spend(&mut self) {
        self.hide();
        for (_, path) in std::mem::take(&mut self.withheld) {
            self.remove(&path, false);
        }
    }

    /// Everything that we have put there goes, the inventories first: should we die meanwhile, what is left is no dump.
    pub fn clear(&mut self) {
        self.spend();
        // What is in a directory before the directory.
        while let Some((path, is_dir)) = self.names.pop_last() {
            self.remove(&path, is_dir);
        }
        self.snapshots.clear();
        self.last = PathBuf::new();
    }

    fn remove(&mut self, relative: &Path, is_dir: bool) {
        self.names.remove(relative);
        let path = self.dir.join(relative);
        if is_dir {
            for name in BY_PRODUCTS {
                let _ = fs::remove_file(path.join(name));
            }
        }
        let removed = if is_dir { fs::remove_dir(&path) } else { fs::remove_file(&path) };
        match removed {
            Err(error) if is_dir && Errno::from_io_error(&error) == Some(Errno::NOTEMPTY) => {
                log::debug!("{} stays: there is something of somebody else in it", path.display());
                self.stayed.insert(relative.into());
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!("{} can't be removed: {error}", path.display());
            }
            _ => {}
        }
    }

    fn wrong(&self, path: &Path, error: io::Error) -> String {
        format!("{}, in the view of the images (--view): {error}", path.display())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // What outlives us goes only when somebody has said so.
        if !self.persists {
            self.clear();
        }
        if self.made {
            self.remove(Path::new(""), true);
        }
    }
}

// The socket that CRIU's action script looks for.
fn control() -> &'static str {
    script::socket_name(Verb::Cache)
}

fn own_link(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn withheld_name(session: SessionId) -> PathBuf {
    PathBuf::from(format!("{WITHHELD}.{}", record::hex(&session)))
}

// What comes over the network becomes the name of a file.
fn file_name(key: &Key) -> Result<&OsStr, String> {
    let name = &key.name[..];
    let is_plain = !name.is_empty() && !name.starts_with(b".") && !name.contains(&b'/') && !name.contains(&0);
    match is_plain && name.ends_with(b".img") && name.len() <= NAME_MAX {
        true => Ok(OsStr::from_bytes(name)),
        false => Err(format!("{key} is no name that an image may have in a directory (--view)")),
    }
}

// The last part of a snapshot's id, which is the -D of its dump, if that can be a name.
fn snapshot_name(id: &[u8]) -> Vec<u8> {
    let last = id.split(|byte| *byte == b'/').rfind(|part| !part.is_empty()).unwrap_or_default();
    let is_plain = !last.starts_with(b".") && !last.contains(&0) && !last.ends_with(b".img");
    match is_plain && !last.is_empty() && last.len() <= SNAPSHOT_MAX && last != control().as_bytes() {
        true => last.into(),
        false => b"snapshot".into(),
    }
}

fn check_file_system(dir: &Path, persist: cli::Persist) -> Result<(), String> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = open(dir, flags, Mode::empty()).map_err(|error| format!("{}: {error}", dir.display()))?;
    let system = fstatfs(fd.as_fd()).map_err(|error| format!("{}: {error}", dir.display()))?;
    if persist == cli::Persist::Tmpfs && system.f_type as u64 != TMPFS {
        return Err(format!(
            "{} is not on a tmpfs, so that every image would be written to a disk: choose another directory, or say \
             --persist=disk",
            dir.display()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
