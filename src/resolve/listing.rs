//! What is known of the sessions of a directory, in sentences.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::side::{Fate, fate};
use super::{kept, processes};
use crate::cli::Verb;
use crate::record::{Distance, Found, Place, Record, State};

/// All of them; `each` process too, if that is wanted.
pub fn list(dir: &Path, here: &Place, each: bool) -> Result<String, String> {
    let records = Record::load_all(dir, None)?;
    if records.is_empty() {
        return Ok(format!("{}: no session is open here.\n", dir.display()));
    }
    let mut text = String::new();
    for record in &records {
        show(&mut text, record, dir, here, each)?;
    }
    Ok(text)
}

fn show(text: &mut String, record: &Record, dir: &Path, here: &Place, each: bool) -> Result<(), String> {
    let distance = here.distance(&record.place);
    let since = fs::metadata(record.path(dir)).and_then(|meta| meta.modified());
    let since = since
        .ok()
        .and_then(|time| time.elapsed().ok())
        .map_or(String::new(), |age| format!(", for {}", rough(age)));
    let mut line = |what: &str| {
        let _ = writeln!(text, "{what}");
    };
    line(&format!(
        "{} of session {}: {}{since}",
        record.role.name(),
        record.session_hex(),
        record.state.name()
    ));
    line(&format!("  {}.", meaning(record)));
    if !record.peer.is_empty() {
        line(&format!("  The other side: {}.", record.peer.escape_debug()));
    }
    if record.leave_running {
        line("  The source may run on beside its copy (--leave-running).");
    }
    let what = match record.role {
        Verb::Proxy => "the source",
        Verb::Cache => "the copy",
    };
    match distance {
        Distance::Elsewhere => line(&format!(
            "  Its process ids belong to another PID or time namespace (pid:[{}]) and mean nothing here: run this \
             where its daemon runs.",
            record.place.pid_namespace
        )),
        Distance::Rebooted => line(&format!(
            "  The host has been started anew since: its daemon and every process of {what} are dead."
        )),
        Distance::Here => {
            line(&format!("  {}.", daemon(record)?));
            let (sum, lines) = tasks(record, distance)?;
            line(&format!("  Of {what}: {sum}."));
            if each {
                lines.iter().for_each(|each| line(each));
            }
        }
    }
    if let Some(kept) = &record.kept {
        line(&format!("  {}.", kept::describe(record, kept)));
    }
    let (commit, rollback) = choices(record);
    line(&format!("  criu-relay resolve commit: {commit}."));
    line(&format!("  criu-relay resolve rollback: {rollback}."));
    Ok(())
}

fn meaning(record: &Record) -> &'static str {
    match (record.state, record.role) {
        (State::Asking, _) => {
            "CRIU was held, and the cache had been told that this is all: the source lives, unless something else \
             has killed it"
        }
        (State::Allowed, _) => "The cache had confirmed, and CRIU was let go, to kill the source",
        (State::Stored, _) if record.kept.is_some() => {
            "The images are stored, and outlive their cache; no copy has been made of them, and their source has not said \
             what becomes of them"
        }
        (State::Stored, _) => {
            "The cache has the images, which are in its memory only; no copy has been made of them, and its source has \
             not said what becomes of them"
        }
        (State::Made, _) => {
            "A copy was restored and had not been stopped before it ran; its source was never told that it stands \
             ready"
        }
        (State::Prepared, _) => {
            "The copy is stopped before it runs, and the source was told that it stands ready: whether that is dead \
             by now is known only there"
        }
        (State::Released, Verb::Cache) if record.kept.is_some() && record.tasks.is_empty() => {
            "It is decided: the source is dead, and its images are there to be restored"
        }
        (State::Released, Verb::Cache) => "It is decided: the copy runs",
        (State::Released, Verb::Proxy) => "It is decided: the copy is to run; the cache may not know yet",
        (State::RolledBack, Verb::Cache) => "It is decided: the source runs, and the copy is killed",
        (State::RolledBack, Verb::Proxy) => "It is decided: the source runs; the cache may not know yet",
    }
}

fn daemon(record: &Record) -> Result<String, String> {
    let (role, pid) = (record.role.name(), record.daemon.pid);
    let found = record.daemon.open().map_err(|error| format!("process {pid} can't be looked at: {error}"))?;
    Ok(match found {
        Found::Alive(_) => format!(
            "criu-relay {role}, process {pid}, lives, and finishes this by itself when it can; a word of yours is \
             passed on to it"
        ),
        Found::Dead | Found::Another => {
            format!(
                "criu-relay {role}, which was process {pid}, is gone; started again here, it finishes this"
            )
        }
    })
}

// How many do what, and a line for each.
fn tasks(record: &Record, distance: Distance) -> Result<(String, Vec<String>), String> {
    let (mut run, mut stopped, mut dying, mut dead, mut another) = (0, 0, 0, 0, 0);
    let mut lines = Vec::new();
    for task in &record.tasks {
        let (count, now) = match fate(task, distance)? {
            Fate::Lives(_) if task.who.is_stopped() => (&mut stopped, "lives and is stopped"),
            Fate::Lives(_) => (&mut run, "lives"),
            Fate::Dying => (&mut dying, "is being killed"),
            Fate::Dead => (&mut dead, "is dead"),
            Fate::Another => (&mut another, "is dead; its number belongs to another process now"),
        };
        *count += 1;
        let stays = if task.stays { " (was stopped on the source, and stays so)" } else { "" };
        lines.push(format!("    process {} {now}{stays}", task.who.pid));
    }
    let sums = [
        (run, "lives", "live"),
        (stopped, "lives and is stopped", "live and are stopped"),
        (dying, "is being killed", "are being killed"),
        (dead, "is dead", "are dead"),
        (another, "is dead and its number another's now", "are dead and their numbers others' now"),
    ];
    let sums = sums.into_iter().filter(|(n, ..)| *n > 0).map(|(n, one, more)| processes(n, one, more));
    let sum = sums.collect::<Vec<_>>().join(", ");
    Ok((if sum.is_empty() { "no process is known".into() } else { sum }, lines))
}

// What the two words do, and when they are right.
fn choices(record: &Record) -> (&'static str, &'static str) {
    if record.role == Verb::Cache && record.kept.is_some() {
        return choices_of_kept(record);
    }
    match (record.role, record.state) {
        (_, State::Asking | State::Allowed) => (
            "the copy is to run; taken only when every process of the source is dead",
            "the source runs; taken only when one of its processes lives. It does not touch the source, and the cache \
             is told, or has to be, to kill the copy",
        ),
        (_, State::Stored) => (
            "serves the images to a restore. Right only when every process of the source is dead (criu-relay resolve on \
             its host says so), or that host is; refused when the cache is gone",
            "drops the images. Right only when the source lives; otherwise the process is lost",
        ),
        (_, State::Made) => (
            "refused: this copy may not be whole",
            "kills the copy. Right in any case: the source decides without it",
        ),
        (_, State::Prepared) => (
            "continues the copy. Right only when every process of the source is dead (criu-relay resolve on its host \
             says so), or that host is",
            "kills the copy. Right only when the source lives; otherwise the process is lost",
        ),
        (Verb::Cache, State::Released) => ("continues the copy once more", "refused: the copy runs"),
        (Verb::Cache, State::RolledBack) => ("refused: the source runs", "kills what is left of the copy"),
        (Verb::Proxy, State::Released) => ("changes nothing", "refused: the copy may run"),
        (Verb::Proxy, State::RolledBack) => ("refused: the source runs", "changes nothing"),
    }
}

// The same where the images outlive the cache.
fn choices_of_kept(record: &Record) -> (&'static str, &'static str) {
    match record.state {
        State::Stored => (
            "lets the images be restored. Right only when every process of the source is dead (criu-relay resolve on its \
             host says so), or that host is",
            "removes the images. Right only when the source lives; otherwise the process is lost",
        ),
        State::Prepared => (
            "continues the copy; where it is not whole any more, kills it and lets the images be restored. Right only when \
             every process of the source is dead (criu-relay resolve on its host says so), or that host is",
            "kills the copy and removes the images. Right only when the source lives; otherwise the process is lost",
        ),
        State::RolledBack => (
            "refused: the source runs",
            "kills what is left of the copy, and removes what is left of the images",
        ),
        State::Released if record.tasks.is_empty() => {
            ("lets the images be restored, if they can't be", "refused: the copy is to run")
        }
        State::Released => (
            "continues the copy once more; where nothing lives of it, lets the images be restored",
            "refused: the copy runs",
        ),
        // The others are a proxy's.
        State::Made | State::Asking | State::Allowed => (
            "kills the copy, which may not be whole, and lets the images be restored. Right only when every process of the \
             source is dead (criu-relay resolve on its host says so), or that host is",
            "kills the copy and removes the images. Right in any case: the source decides without it",
        ),
    }
}

fn rough(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        for (seconds, text) in [
            (0, "0 s"),
            (119, "119 s"),
            (120, "2 min"),
            (7200, "2 h"),
            (172_799, "47 h"),
            (172_800, "2 days"),
        ] {
            assert_eq!(rough(Duration::from_secs(seconds)), text);
        }
    }
}
