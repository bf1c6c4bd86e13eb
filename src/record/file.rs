//! Records as files. Nothing is synced: a record has to survive its daemon, not its host, with which every
//! process that it names dies.
//!
//! Only the daemon that a record names changes it. One that is started and takes records over reads them, names
//! itself in each and writes it, all under [`lock_dir`](crate::sockets::lock_dir) of the directory, and so does
//! `criu-relay resolve` where no daemon lives: neither sees the other half-way.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::Record;
use crate::cli::Verb;

/// The longest file that is read, in bytes: more than the largest tree can fill.
pub const MAX_SIZE: u64 = 64 << 20;

const PREFIX: &str = "criu-relay-";
const SUFFIX: &str = ".record";

impl Record {
    /// The name of its file: one for each session and role.
    pub fn file_name(&self) -> String {
        format!("{PREFIX}{}-{}{SUFFIX}", self.role.name(), self.session_hex())
    }

    /// Its file.
    pub fn path(&self, dir: &Path) -> PathBuf {
        dir.join(self.file_name())
    }

    /// Writes it, in place of what was there. At any moment the file is the old one or the new one.
    pub fn store(&self, dir: &Path) -> Result<(), String> {
        let path = self.path(dir);
        let new = dir.join(format!("{}.new", self.file_name()));
        let write = || {
            // What a daemon that died in the middle of this has left.
            match fs::remove_file(&new) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(&self.encode())?;
            fs::rename(&new, &path)
        };
        write().map_err(|error| {
            let _ = fs::remove_file(&new);
            format!("the record {} can't be written: {error}", path.display())
        })
    }

    /// Removes its file; that there is none is no error.
    pub fn remove(&self, dir: &Path) -> Result<(), String> {
        let path = self.path(dir);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(format!("the record {} can't be removed: {error}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// All records in a directory, by their names; with a role, only that one's. One that can't be read is an
    /// error: who does not know it can't know what runs.
    pub fn load_all(dir: &Path, role: Option<Verb>) -> Result<Vec<Self>, String> {
        let wrong = |error| format!("the directory {}: {error}", dir.display());
        let roles = role.map_or(vec![Verb::Proxy, Verb::Cache], |role| vec![role]);
        let prefixes: Vec<_> = roles.iter().map(|role| format!("{PREFIX}{}-", role.name())).collect();
        let mut names = Vec::new();
        for entry in fs::read_dir(dir).map_err(wrong)? {
            if let Ok(name) = entry.map_err(wrong)?.file_name().into_string()
                && name.ends_with(SUFFIX)
                && prefixes.iter().any(|prefix| name.starts_with(prefix))
            {
                names.push(name);
            }
        }
        names.sort();
        names.iter().filter_map(|name| load(dir, name).transpose()).collect()
    }
}

// None: it has been removed meanwhile.
fn load(dir: &Path, name: &str) -> Result<Option<Record>, String> {
    let path = dir.join(name);
    let wrong = |why: String| format!("the record {}: {why}", path.display());
    // What is no plain file is not waited for.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = match File::options().read(true).custom_flags(flags).open(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|error| wrong(error.to_string()))?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes).map_err(|error| wrong(error.to_string()))?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(wrong(format!("it is longer than {MAX_SIZE} bytes, which no record is")));
    }
    let record = Record::decode(&bytes).map_err(wrong)?;
    if record.file_name() != name {
        return Err(wrong(format!("what it says belongs into {}", record.file_name())));
    }
    Ok(Some(record))
}
