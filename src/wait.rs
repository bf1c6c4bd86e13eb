//! `criu-relay wait`: returns when the cache's dump is complete, or with `--ready` when a daemon is there, so that a
//! shell line can go on at the right moment.
//!
//! A short-lived program of its own; it may block.

use std::io::{ErrorKind, Write, stderr, stdout};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::cli::{Verb, Wait};
use crate::script::{Daemon, Tree, socket_name};
use crate::wire::control::Action;

/// How often a daemon that is not there yet is looked for.
const AGAIN: Duration = Duration::from_millis(20);

/// Waits for what is asked for. The error is why it is not there.
pub fn run(asked: &Wait) -> Result<(), String> {
    let until = asked.timeout.map(|timeout| Instant::now() + timeout);
    let text = if asked.ready { ready(asked, until)? } else { complete(asked, until)? };
    match text.as_str() {
        "" => Ok(()),
        text => writeln!(stdout(), "{text}").map_err(|error| format!("stdout can't be written to: {error}")),
    }
}

/// Asks the cache, which answers when its dump is complete: with where it is to be restored from.
fn complete(asked: &Wait, until: Option<Instant>) -> Result<String, String> {
    let dir = asked.images_dir.as_path();
    let shown = dir.display();
    let Some(mut cache) = Daemon::find(Verb::Cache, dir)? else {
        return Err(format!(
            "no criu-relay cache is in {shown}: start it with --view {shown} or -D {shown}, or wait for it first \
             (criu-relay wait --ready)"
        ));
    };
    // Every request names a process that it comes from.
    let myself = pidfd_open(getpid(), PidfdFlags::empty())
        .map_err(|error| format!("this process can't be watched: {error}"))?;
    cache.ask(Action::Wait, myself.as_fd(), &Tree::default())?;
    say(asked, "the cache has been asked");
    loop {
        if let Some(text) = cache.answer()? {
            return Ok(text);
        }
        if !sleep(&mut [PollFd::from_borrowed_fd(cache.as_fd(), PollFlags::IN)], until)? {
            return Err(format!("no dump was complete within {} s", seconds(asked)));
        }
    }
}

/// Waits until a daemon accepts.
fn ready(asked: &Wait, until: Option<Instant>) -> Result<String, String> {
    let dir = asked.images_dir.as_path();
    loop {
        for verb in [Verb::Cache, Verb::Proxy] {
            if accepts(verb, dir)? {
                say(asked, &format!("criu-relay {} is ready", verb.name()));
                return Ok(String::new());
            }
        }
        // Nothing tells it: the directory may not exist, nor the one around it, so that there is nothing to
        // watch; and that a socket is there does not mean that its daemon listens. Nobody else waits for us.
        let again = Instant::now() + AGAIN;
        sleep(&mut [], Some(until.map_or(again, |until| until.min(again))))?;
        if until.is_some_and(|until| until <= Instant::now()) {
            return Err(format!(
                "no criu-relay cache or proxy was ready in {} within {} s",
                dir.display(),
                seconds(asked)
            ));
        }
    }
}

fn accepts(verb: Verb, dir: &Path) -> Result<bool, String> {
    let path = dir.join(socket_name(verb));
    match UnixStream::connect(&path) {
        Ok(_) => Ok(true),
        // Not there; or left by a daemon that is gone, and to be replaced by the next.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => Ok(false),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(false),
        Err(error) => Err(format!("{} can't be connected to: {error}", path.display())),
    }
}

/// Waits for an event; false: until then there was none.
fn sleep(fds: &mut [PollFd<'_>], until: Option<Instant>) -> Result<bool, String> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left =
            left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        match poll(fds, left.as_ref()) {
            Ok(n) => return Ok(n > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(format!("poll failed: {error}")),
        }
    }
}

fn seconds(asked: &Wait) -> u64 {
    asked.timeout.unwrap_or_default().as_secs()
}

// eprintln! would panic where stderr is full or gone.
fn say(asked: &Wait, what: &str) {
    if asked.verbosity > 1 {
        let _ = writeln!(stderr(), "criu-relay: {}: {what}", asked.images_dir.display());
    }
}
