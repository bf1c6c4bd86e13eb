//! Images that have outlived their cache (--view, --persist): what is said of them, and what a word does with them.

use std::path::Path;

use super::processes;
use super::side::{Fate, Side, fate};
use crate::cli::Verb;
use crate::pump::human;
use crate::record::{Kept, Place, Record, State};
use crate::view::{Remains, Sight};

/// A line about them.
pub fn describe(record: &Record, kept: &Kept) -> String {
    let dir = kept.dir.display();
    let remains = match Remains::look(&kept.dir, record.session) {
        Ok(remains) => remains,
        Err(why) => return format!("Its images can't be looked at: {why}"),
    };
    let there = match (remains.images, remains.sight) {
        (0, _) => return format!("None of its images is in {dir} any more"),
        (_, Sight::Shown) => "criu restore can begin from there",
        (_, Sight::Withheld) => "their inventory.img is withheld, so that no criu restore begins from there",
        (_, Sight::Gone) => "without inventory.img: they have been restored, or nobody is to",
    };
    format!("Its images: {}, {}, in {dir}, {there}", count(remains.images), human(remains.bytes))
}

fn count(images: u64) -> String {
    format!("{images} {}", if images == 1 { "file" } else { "files" })
}

/// What an operator does with images that can be restored, and without their cache.
fn ways(record: &Record, kept: &Kept, dir: &Path) -> String {
    format!(
        "Start criu-relay cache again with -W {} --view {view} --persist, which serves them and tells the other side; \
         or restore them without it: criu restore -D {view}, without the action script. Then remove them and {}, or \
         the next cache there would serve them once more",
        dir.display(),
        record.path(dir).display(),
        view = kept.dir.display(),
    )
}

impl Side<'_> {
    /// The images of the session, if they were to outlive their cache, and nobody else is at them.
    pub(super) fn remains(&self) -> Result<Option<(Kept, Remains)>, String> {
        let Some(kept) = self.record.kept.clone() else { return Ok(None) };
        let remains = Remains::look(&kept.dir, self.record.session)?;
        remains.check()?;
        let whole = (remains.images, remains.bytes) == (kept.images, kept.bytes);
        if remains.sight != Sight::Gone && !whole {
            return Err(format!(
                "the images in {} are not those of the session {}: there are {}, {} bytes, and it has {}, {} bytes; \
                 nothing is done to them",
                kept.dir.display(),
                self.record.session_hex(),
                remains.images,
                remains.bytes,
                kept.images,
                kept.bytes
            ));
        }
        Ok(Some((kept, remains)))
    }

    /// Commit where no copy can run: another is made of the images.
    pub(super) fn let_restore(mut self, kept: &Kept, mut remains: Remains) -> Result<String, String> {
        if remains.sight == Sight::Gone {
            return Err(format!(
                "the session {}: its images are not in {} any more, and no copy of them can run: if the source lives, roll \
                 back on both hosts; if it does not, the process is lost",
                self.record.session_hex(),
                kept.dir.display()
            ));
        }
        self.check_source()?;
        let killed = self.kill_all()?;
        if !self.again || !self.record.tasks.is_empty() {
            self.record.tasks.clear();
            self.record.criu = None;
            self.write(State::Released)?;
        }
        remains.reveal()?;
        let killed = match killed {
            0 => String::new(),
            n => format!("What was left of the copy is dead: {} killed.\n", processes(n, "was", "were")),
        };
        Ok(format!(
            "{killed}The images can be restored{}: {}, {}, in {}.\n{}.\n",
            self.already(),
            count(remains.images),
            human(remains.bytes),
            kept.dir.display(),
            ways(&self.record, kept, self.dir)
        ))
    }

    /// Rollback where there is no copy: nobody needs the images, nor the record.
    pub(super) fn drop_images(mut self, kept: &Kept, mut remains: Remains) -> Result<String, String> {
        if !self.again {
            self.write(State::RolledBack)?;
        }
        remains.remove()?;
        self.record.remove(self.dir)?;
        let what = match remains.images {
            0 => "None of the images was there any more".into(),
            n => format!("The images are removed: {}, {}", count(n), human(remains.bytes)),
        };
        Ok(format!(
            "{what} ({}).\nThe session is over here, and its record is removed.\n",
            kept.dir.display()
        ))
    }

    // A record of its proxy may be in the same directory: then its source can be seen from here.
    pub(super) fn check_source(&self) -> Result<(), String> {
        let here = Place::here().map_err(|error| format!("/proc can't be read: {error}"))?;
        for source in Record::load_all(self.dir, Some(Verb::Proxy))? {
            if source.session != self.record.session || source.leave_running {
                continue;
            }
            if source.state == State::RolledBack {
                return Err(format!(
                    "the record {} says that the source runs: criu-relay resolve rollback",
                    source.path(self.dir).display()
                ));
            }
            let distance = here.distance(&source.place);
            for task in &source.tasks {
                if let Fate::Lives(_) | Fate::Dying = fate(task, distance)? {
                    return Err(format!(
                        "process {} of the source lives, so that two would run: criu-relay resolve rollback lets it; or \
                         kill it first",
                        task.who.pid
                    ));
                }
            }
        }
        Ok(())
    }
}
