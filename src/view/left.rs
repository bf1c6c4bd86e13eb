//! What an earlier run has left in the directory of a view: links to what is gone are removed, and so are the images of
//! a dump that was never complete; those of a complete one are taken over.

use std::ffi::OsStr;
use std::fs::{self, File, FileType};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::{INVENTORY, NEW, PARENT, SCRIPTED, View, WITHHELD, control, withheld_name};
use crate::pump::human;
use crate::record;
use crate::wire::Key;
use crate::wire::relay::SessionId;

/// What is there to go on with.
#[derive(Debug)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// A dump that can be restored; and whether it is a scripted one.
    Complete(Vec<(Key, OwnedFd)>, bool),
    /// One that is stored, and whose source has not said what becomes of it, as far as this directory knows.
    Withheld(SessionId, Vec<(Key, OwnedFd)>),
}

/// The entries of one directory that are ours.
#[derive(Debug, Default)]
pub(super) struct Found {
    // Links into a cache that is gone, and what else was made for them.
    pub(super) stale: Vec<PathBuf>,
    pub(super) images: Vec<PathBuf>,
    pub(super) withheld: Vec<(SessionId, PathBuf)>,
    pub(super) scripted: Option<PathBuf>,
    dirs: Vec<PathBuf>,
}

impl View {
    /// Looks at what is there, once nobody else's socket can be: whoever made it has gone. The error is a sentence.
    pub fn take_over(&mut self) -> Result<Left, String> {
        let mut all = self.find(Path::new(""))?;
        let has_inventory = |found: &Found| found.images.iter().any(|path| is_inventory(path));
        for dir in all.dirs.clone() {
            let found = self.find(&dir)?;
            if has_inventory(&found) && self.persists {
                return Err(format!(
                    "{} holds the snapshots of an earlier dump of criu --remote, which only a criu restore from there \
                     can use: restore it, and remove them, or choose another --view",
                    self.dir.display()
                ));
            }
            all.stale.extend(found.stale);
            all.images.extend(found.images);
        }
        if !self.persists
            && let Some(image) = all.images.iter().chain(all.withheld.iter().map(|(_, path)| path)).next()
        {
            return Err(format!(
                "{} holds images that are files ({}): a dump may be kept there; choose another directory, or say \
                 --persist",
                self.dir.display(),
                image.display()
            ));
        }
        for path in &all.stale {
            self.remove(path, false);
        }
        if let Some(path) = &all.scripted {
            self.names.insert(path.clone(), false);
        }
        let left = match (&all.withheld[..], has_inventory(&all)) {
            ([], true) => {
                self.shows = true;
                Left::Complete(self.adopt(&all.images)?, all.scripted.is_some())
            }
            ([(session, path)], false) => {
                let mut images = self.adopt(&all.images)?;
                images.extend(self.adopt(std::slice::from_ref(path))?);
                self.withheld.insert(PathBuf::new(), path.clone());
                return Ok(Left::Withheld(*session, images));
            }
            ([], false) => {
                self.drop_incomplete(&all.images);
                if let Some(path) = &all.scripted {
                    self.remove(path, false);
                }
                Left::Nothing
            }
            (_, _) => {
                return Err(format!(
                    "{} holds what belongs to more than one dump ({} and inventory.img): look which of them is \
                     wanted, and remove the other",
                    self.dir.display(),
                    all.withheld[0].1.display()
                ));
            }
        };
        for dir in &all.dirs {
            self.remove(dir, true);
        }
        Ok(left)
    }

    pub(super) fn find(&self, dir: &Path) -> Result<Found, String> {
        let mut found = Found::default();
        let path = self.dir.join(dir);
        let wrong = |error| self.wrong(&path, error);
        for entry in fs::read_dir(&path).map_err(wrong)? {
            let entry = entry.map_err(wrong)?;
            self.sort(&mut found, dir, &entry.file_name(), entry.file_type().map_err(wrong)?);
        }
        Ok(found)
    }

    fn sort(&self, found: &mut Found, dir: &Path, name: &OsStr, kind: FileType) {
        let path = dir.join(name);
        let target = || fs::read_link(self.dir.join(&path)).unwrap_or_default();
        let hidden = name.as_bytes().strip_prefix(WITHHELD.as_bytes());
        if kind.is_symlink() {
            let is_link = is_descriptor(&target());
            if is_link
                || (!dir.as_os_str().is_empty() && [PARENT, control()].iter().any(|ours| name == *ours))
            {
                found.stale.push(path);
            }
        } else if kind.is_dir() && dir.as_os_str().is_empty() {
            // Every snapshot has this link.
            let link = fs::read_link(self.dir.join(&path).join(control()));
            if link.is_ok_and(|link| link == Path::new("..").join(control())) {
                found.dirs.push(path);
            }
        } else if !kind.is_file() {
            // Nothing of ours.
        } else if name == NEW || hidden == Some(b"") {
            found.stale.push(path);
        } else if let Some(session) = hidden.and_then(|rest| record::unhex(rest.strip_prefix(b".")?)) {
            found.withheld.push((session, path));
        } else if name == SCRIPTED && dir.as_os_str().is_empty() {
            found.scripted = Some(path);
        } else if name.as_bytes().ends_with(b".img") {
            found.images.push(path);
        }
    }

    // Opens them, and keeps their names as ours.
    fn adopt(&mut self, paths: &[PathBuf]) -> Result<Vec<(Key, OwnedFd)>, String> {
        let mut images = Vec::new();
        for path in paths {
            let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
            let opened = File::options().read(true).write(true).custom_flags(flags).open(self.dir.join(path));
            let file = opened.map_err(|error: io::Error| self.wrong(&self.dir.join(path), error))?;
            let name = match path.as_os_str().as_bytes() {
                hidden if hidden.starts_with(WITHHELD.as_bytes()) => INVENTORY,
                name => name,
            };
            images.push((Key::stream(name), OwnedFd::from(file)));
            self.names.insert(path.clone(), false);
        }
        Ok(images)
    }

    fn drop_incomplete(&mut self, images: &[PathBuf]) {
        if images.is_empty() {
            return;
        }
        let size = |path: &PathBuf| fs::metadata(self.dir.join(path)).map_or(0, |meta| meta.len());
        let bytes: u64 = images.iter().map(size).sum();
        log::warn!(
            "{} images ({}) of a dump that was never complete were left in {} by an earlier run: they are removed",
            images.len(),
            human(bytes),
            self.dir.display()
        );
        for path in images {
            self.remove(path, false);
        }
    }
}

/// What `criu-relay resolve` does for a cache that does not run: the dump of this session in this directory can be
/// restored. The error is a sentence.
pub fn reveal_withheld(dir: &Path, session: SessionId) -> Result<(), String> {
    let (old, new) = (dir.join(withheld_name(session)), dir.join(OsStr::from_bytes(INVENTORY)));
    fs::rename(&old, &new).map_err(|error| format!("{} can't be made: {error}", new.display()))
}

pub(super) fn is_inventory(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_bytes() == INVENTORY)
}

// Whether a link leads to a descriptor of some process.
pub(super) fn is_descriptor(target: &Path) -> bool {
    let mut parts = target.iter().skip(1);
    let is_number = |part: Option<&OsStr>| {
        part.is_some_and(|part| !part.is_empty() && part.as_bytes().iter().all(u8::is_ascii_digit))
    };
    target.is_absolute()
        && parts.next() == Some(OsStr::new("proc"))
        && is_number(parts.next())
        && parts.next() == Some(OsStr::new("fd"))
        && is_number(parts.next())
        && parts.next().is_none()
}
