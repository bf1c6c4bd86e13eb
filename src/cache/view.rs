//! The cache and its view: images as a directory, for restores that ask for nothing, and for whoever waits for one to
//! become possible (`criu-relay wait`).
//!
//! One dump is in the view at a time. Its inventory.img is what a restore of the stream dialect would get, at the same
//! moment: when the source has released the dump; with commit `restored` when it is stored, if somebody waits here,
//! and no restore of the stream dialect does. Then it is for that one restore, and is hidden when the copy is made.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{Cache, Conn};
use crate::client::process::Process;
use crate::net;
use crate::session::Commit;
use crate::store::{BodyId, Catalog, catalog};
use crate::table::Id;
use crate::view::{self, View};
use crate::wire::Key;
use crate::wire::relay::{self, SessionId};

/// How long a source stays frozen, commit `restored`, for a restore that has been told to begin here, and does not: CRIU
/// says nothing before it has read some images.
const BEGIN: Duration = Duration::from_secs(30);

/// What is said to whoever waits in vain.
const SPENT: &str = "this cache has had its dump, and another restore has got it";

/// The view, and who waits for what will be in it.
#[derive(Debug, Default)]
pub struct Shown {
    pub(super) view: Option<View>,
    /// Those who wait for a dump to be complete, in the order in which they came.
    waiters: Vec<Id>,
    /// Until then the restore has to have begun that makes the copy from here.
    begin: Option<Instant>,
    /// Processes that read images still, after the restore: `criu lazy-pages`.
    readers: Vec<Id>,
}

impl Shown {
    /// This one; without one, only the waiting is left.
    pub fn new(view: Option<View>) -> Self {
        Self { view, ..Self::default() }
    }

    /// When the restore that was told to begin is late.
    pub fn wake_at(&self) -> Option<Instant> {
        self.begin
    }
}

impl Cache {
    /// Whether a dump can be restored from the view.
    pub(super) fn shows(&self) -> bool {
        self.shown.view.as_ref().is_some_and(View::shows)
    }

    /// Whether it will show no dump any more.
    pub(super) fn is_view_spent(&self) -> bool {
        self.shown.view.as_ref().is_none_or(View::is_spent)
    }

    pub(super) fn persists(&self) -> bool {
        self.shown.view.as_ref().is_some_and(View::persists)
    }

    /// An image is complete: it appears. The error is the second half of a sentence about the peer.
    pub(super) fn show(&mut self, key: &Key, body: BodyId) -> Result<(), String> {
        let Some(view) = &mut self.shown.view else { return Ok(()) };
        if catalog::is_list(key) {
            return Ok(());
        }
        let file = self.bodies.file_of(body);
        let shown = match file {
            Ok(file) => view.add(key, file),
            Err(error) => Err(format!("{key} can't have a file of its own: {error}")),
        };
        shown.map_err(|why| format!("was stopped: {why}"))
    }

    /// The next dump comes: the view is for that.
    pub(super) fn clear_view(&mut self) {
        if let Some(view) = &mut self.shown.view {
            view.clear();
        }
        self.shown.begin = None;
    }

    /// The dump can be restored from the view.
    pub(super) fn reveal(&mut self, images: &Rc<Catalog>) -> Result<(), String> {
        let Some(view) = self.shown.view.as_mut().filter(|view| !view.shows()) else { return Ok(()) };
        view.reveal(&images.snapshots(&self.bodies))?;
        log::info!("the dump can be restored from {}", view.restore_dir().display());
        Ok(())
    }

    /// The stored dump, commit `restored`, is for a restore that waits: if that is one of the view, it may begin.
    pub(super) fn offer_view(&mut self) {
        let Some(images) = self.stored.clone() else { return };
        if !self.shown.waiters.is_empty() && !self.has_announced_restore() {
            let revealed = self.reveal(&images);
            self.session.copying();
            self.restores_changed = true;
            match revealed {
                Ok(()) if self.tell_one_waiter() => self.shown.begin = Some(Instant::now() + BEGIN),
                Ok(()) => {
                    let why = "whoever waited for the dump (criu-relay wait) has gone";
                    log::error!("the restore has failed: {why}");
                    self.copy_from_view_failed(why);
                }
                Err(why) => {
                    log::error!("the restore has failed: {why}");
                    self.copy_from_view_failed(&why);
                    let waiter = self.shown.waiters.remove(0);
                    self.tell_waiter(waiter, Err(&why));
                }
            }
        }
        self.unpin(images);
    }

    // No copy is made of the stored dump any more.
    fn copy_from_view_failed(&mut self, why: &str) {
        self.take_back();
        if self.session.copy_failed() {
            self.tell(relay::FAILED, why);
        }
    }

    /// A restore of the stored dump has failed: nobody is to begin another, since its source will run on.
    pub(super) fn take_back(&mut self) {
        self.shown.begin = None;
        let (Some(session), Some(view)) = (self.session.stored(), &mut self.shown.view) else { return };
        if let Err(why) = view.take_back(session) {
            log::error!("{why}");
        }
    }

    /// A copy runs: whatever is read already may be read to its end; nobody begins anew, unless that was asked for.
    pub(super) fn hide_restored(&mut self) {
        self.shown.begin = None;
        let again = self.session.stays() && !self.persists();
        match (self.last.clone().filter(|_| again), &mut self.shown.view) {
            (Some(images), _) => {
                if let Err(why) = self.reveal(&images) {
                    log::warn!("{why}");
                }
                self.unpin(images);
            }
            (None, Some(view)) => view.hide(),
            (None, None) => {}
        }
    }

    /// The same for a copy whose images may be withheld. That comes before it runs, and before its record goes: whoever
    /// comes after us makes no other of them.
    pub(super) fn spend_view(&mut self) {
        self.hide_restored();
        if let Some(view) = self.shown.view.as_mut().filter(|view| view.persists()) {
            view.spend();
        }
    }

    /// Somebody waits for a dump that can be restored.
    pub(super) fn wait(&mut self, id: Id) {
        if self.may_begin() {
            self.tell_waiter(id, Ok(()));
        } else if self.failing.is_some() {
            self.tell_waiter(id, Err("the dump failed"));
        } else if self.is_spent() {
            self.tell_waiter(id, Err(SPENT));
        } else {
            self.shown.waiters.push(id);
            self.restores_changed = true;
        }
    }

    // Whether there will be no dump any more that could be restored. One that is being restored may yet be, once more.
    fn is_spent(&self) -> bool {
        let busy = self.stored.is_some() || self.session.is_receiving();
        !busy && !self.session.takes_peers() && self.session.is_restored()
    }

    // Whether a dump is there that a restore may begin with, and none is at. One that has been restored may be once more,
    // with --keep; but whoever waits does so for the next.
    fn may_begin(&self) -> bool {
        let shows = !self.session.is_restored() && self.shown.view.as_ref().is_none_or(View::shows);
        let free = self.last.as_ref().is_some_and(|images| !self.is_restored_from(None, images));
        shows && free && self.stored.is_none()
    }

    /// A restore has failed: whoever waits may try.
    pub(super) fn let_another_begin(&mut self) {
        let free = !self.session.is_restored() && self.stored.is_none();
        if let Some(images) = self.last.clone().filter(|images| free && !self.is_copied(images)) {
            // It was released while a copy of it was made.
            if let Err(why) = self.reveal(&images) {
                log::error!("{why}: the dump can be restored with criu restore --stream only");
            }
            self.unpin(images);
        }
        if self.may_begin() {
            self.tell_waiters(Ok(()));
        }
        self.answer_all();
    }

    /// Whether one waits that a restore from the view follows.
    pub(super) fn has_waiter(&self) -> bool {
        self.shown.view.is_some() && !self.shown.waiters.is_empty()
    }

    pub(super) fn waiter_gone(&mut self, id: Id) {
        self.shown.waiters.retain(|waiter| *waiter != id);
        self.restores_changed = true;
    }

    /// The dump can be restored, or never will be.
    pub(super) fn tell_waiters(&mut self, outcome: Result<(), &str>) {
        for waiter in std::mem::take(&mut self.shown.waiters) {
            self.restores_changed = true;
            self.tell_waiter(waiter, outcome);
        }
    }

    // The first that is there still. Whether there is one: it may have died in the moment in which it would be told.
    fn tell_one_waiter(&mut self) -> bool {
        while !self.shown.waiters.is_empty() {
            let waiter = self.shown.waiters.remove(0);
            if self.tell_waiter(waiter, Ok(())) {
                return true;
            }
        }
        false
    }

    // Whether it could be told.
    fn tell_waiter(&mut self, id: Id, outcome: Result<(), &str>) -> bool {
        let Some(Conn::Control(mut control)) = self.conns.remove(id) else { return false };
        let dir = self.shown.view.as_ref().map(|view| view.restore_dir().display().to_string());
        let told = match outcome {
            Ok(()) => control.reply(0, &dir.unwrap_or_default()),
            Err(why) => control.reply(Errno::CANCELED.raw_os_error() as u32, why),
        };
        if let Err(why) = &told {
            log::warn!("somebody who waited for a dump {why}");
        }
        told.is_ok()
    }

    /// A restore from the view has begun, as CRIU's action script says. An error: it may not go on.
    pub(super) fn begins_in_view(&mut self, criu: OwnedFd) -> Result<(), String> {
        let shown = self.stored.as_ref().or(self.last.as_ref()).filter(|_| self.shows());
        let Some(images) = shown.cloned() else {
            return Err("there is no dump in the view that may be restored now".into());
        };
        let pid = net::pidfd_pid(criu.as_fd()).unwrap_or(0);
        let begun = match self.is_restored_from(None, &images) {
            true => Err("another restore is at this dump".into()),
            false => self.announce(criu),
        };
        match begun {
            Ok(()) => {
                self.shown.begin = None;
                // Its end, or its word, decides.
                self.restore_closed(pid, images);
                Ok(())
            }
            Err(why) => {
                self.unpin(images);
                Err(why)
            }
        }
    }

    /// What has to be looked at from time to time.
    pub(super) fn tick_view(&mut self, now: Instant) {
        if !self.shown.waiters.is_empty() && self.is_spent() {
            self.tell_waiters(Err(SPENT));
        }
        if self.shown.begin.take_if(|begin| *begin <= now).is_some() {
            let why = format!(
                "no criu restore has begun in the view within {} s (with --action-script criu-relay)",
                BEGIN.as_secs()
            );
            log::error!("the restore has failed: {why}");
            self.copy_from_view_failed(&why);
        }
    }

    /// Before we leave: whether somebody still reads. Who does is watched.
    pub(super) fn is_being_read(&mut self) -> bool {
        let (Some(view), Some(images)) = (&self.shown.view, &self.last) else { return false };
        if !self.shown.readers.is_empty() {
            return true;
        }
        let pages = images.in_order().into_iter().filter(|(key, _)| catalog::is_pages(key));
        let files = pages.filter_map(|(_, image)| self.bodies.own_file(image.body));
        for pid in view::readers(files, view.dir()) {
            let fd = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
            let Some(fd) = fd else { continue };
            log::info!("process {pid} still reads images: it is waited for");
            match self.conns.insert(Conn::Reader(Process::new(fd))) {
                Ok(reader) => self.shown.readers.push(reader),
                Err(error) => {
                    log::warn!("process {pid}, which still reads images, can't be watched: {error}")
                }
            }
        }
        !self.shown.readers.is_empty()
    }

    pub(super) fn step_reader(&mut self, id: Id) {
        if matches!(self.conns.get(id), Some(Conn::Reader(process)) if process.is_dead()) {
            self.close(id, None);
        }
    }

    pub(super) fn reader_gone(&mut self, id: Id) {
        self.shown.readers.retain(|reader| *reader != id);
    }

    /// The dump is stored, and outlives us: whoever comes after us finds whose it is.
    pub(super) fn outlives(&mut self, session: SessionId) -> Result<(), String> {
        match &mut self.shown.view {
            Some(view) if view.persists() => view.withhold(session),
            _ => Ok(()),
        }
    }

    /// The view's own lines in a record.
    pub(super) fn kept(&self, commit: Commit, images: &Catalog) -> Option<crate::record::Kept> {
        let view = self.shown.view.as_ref().filter(|view| view.persists())?;
        Some(crate::record::Kept {
            dir: view.dir().to_path_buf(),
            commit,
            images: images.len() as u64,
            bytes: images.bytes(),
        })
    }
}
