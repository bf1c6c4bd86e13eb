//! What is left of one session in the directory of a view whose cache has gone, for `criu-relay resolve`: its images can
//! be restored, or can't any more, or go.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::left::{Found, is_inventory};
use super::{View, control, reveal_withheld};
use crate::sockets;
use crate::wire::relay::SessionId;

/// Whether a dump can be restored from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Its inventory.img is there.
    Shown,
    /// It has a hidden name.
    Withheld,
    /// There is none, so that what else is there is of no use.
    Gone,
}

/// The images.
#[derive(Debug)]
pub struct Remains {
    view: View,
    session: SessionId,
    found: Found,
    /// Whether they can be restored.
    pub sight: Sight,
    /// How many they are.
    pub images: u64,
    /// How many bytes they have together.
    pub bytes: u64,
}

impl Remains {
    /// Looks for those of this session. That the directory is not there, as after a reboot, is no error; an error is a
    /// sentence.
    pub fn look(dir: &Path, session: SessionId) -> Result<Self, String> {
        let view = View::of_nobody(dir);
        let found = match dir.try_exists() {
            Ok(false) => Found::default(),
            _ => view.find(Path::new(""))?,
        };
        let is_shown = found.images.iter().any(|path| is_inventory(path));
        let ours = found.withheld.iter().any(|(whose, _)| *whose == session);
        let sight = match (&found.withheld[..], is_shown) {
            ([], true) => Sight::Shown,
            ([_], false) if ours => Sight::Withheld,
            ([], false) => Sight::Gone,
            (_, _) => {
                return Err(format!(
                    "{} holds what belongs to another session ({}): look which of them is wanted",
                    dir.display(),
                    found.withheld[0].1.display()
                ));
            }
        };
        let mut remains = Self { view, session, found, sight, images: 0, bytes: 0 };
        let sizes = remains.paths().map(|path| fs::metadata(dir.join(path)).map_or(0, |meta| meta.len()));
        (remains.images, remains.bytes) = sizes.fold((0, 0), |(n, bytes), size| (n + 1, bytes + size));
        Ok(remains)
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.found.images.iter().chain(self.found.withheld.iter().map(|(_, path)| path))
    }

    /// Whether something may be done with them: nobody else can change them, and no cache is at them. The error is a
    /// sentence.
    pub fn check(&self) -> Result<(), String> {
        let dir = &self.view.dir;
        if self.images == 0 {
            return Ok(());
        }
        sockets::check_dir(dir)?;
        match UnixStream::connect(dir.join(control())) {
            Ok(_) => Err(format!(
                "a cache runs with --view {}: it is to be asked (criu-relay resolve with its own -W), or to end",
                dir.display()
            )),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                Ok(())
            }
            Err(error) => Err(format!("{}: {error}", dir.join(control()).display())),
        }
    }

    /// They can be restored.
    pub fn reveal(&mut self) -> Result<(), String> {
        if self.sight == Sight::Withheld {
            reveal_withheld(&self.view.dir, self.session)?;
            self.sight = Sight::Shown;
        }
        Ok(())
    }

    /// No restore is to begin from there any more.
    pub fn hide(&mut self) -> Result<(), String> {
        let inventories: Vec<_> =
            self.found.images.iter().filter(|path| is_inventory(path)).cloned().collect();
        inventories.iter().try_for_each(|path| self.unlink(path))
    }

    /// They go, the inventory first: nobody finds half of them.
    pub fn remove(&mut self) -> Result<(), String> {
        self.hide()?;
        let hidden = self.found.withheld.iter().map(|(_, path)| path);
        let rest = hidden.chain(&self.found.images).chain(&self.found.stale).chain(&self.found.scripted);
        rest.cloned().collect::<Vec<_>>().iter().try_for_each(|path| self.unlink(path))
    }

    fn unlink(&self, path: &Path) -> Result<(), String> {
        let path = self.view.dir.join(path);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(format!("{} can't be removed: {error}", path.display()))
            }
            _ => Ok(()),
        }
    }
}
