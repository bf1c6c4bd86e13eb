//! `criu-relay resolve`: the real binary, records as a daemon would have left them, and processes that stand for
//! the source or the copy.

mod common;

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use common::*;
use criu_relay::cli::Verb::{self, Cache, Proxy};
use criu_relay::client::control::{Control, Controlled};
use criu_relay::net;
use criu_relay::record::{Identity, Kept, Record, State, Task};
use criu_relay::script::socket_name;
use criu_relay::session::Commit;
use criu_relay::sockets::lock_dir;
use criu_relay::wire::control::Action;
use rustix::process::{Pid, Signal, kill_process};

/// A process of the source or of the copy. Killed when dropped.
struct Process(Child, Identity);

impl Process {
    fn running() -> Self {
        let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let identity = Identity::of(child.id() as i32).unwrap();
        Self(child, identity)
    }

    fn stopped() -> Self {
        let process = Self::running();
        kill_process(Pid::from_child(&process.0), Signal::STOP).unwrap();
        wait_until("it is stopped", || process.is_stopped());
        process
    }

    fn dead() -> Self {
        let mut process = Self::running();
        process.kill();
        process
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn is_stopped(&self) -> bool {
        self.1.is_stopped()
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A work directory with what a daemon that is gone has left in it.
struct Left(Dir);

impl Left {
    fn new() -> Self {
        Self(Dir::new())
    }

    fn store(&self, record: &Record) {
        record.store(&self.0.0).unwrap();
    }

    fn state(&self, role: Verb) -> State {
        let mut records = Record::load_all(&self.0.0, Some(role)).unwrap();
        assert_eq!(records.len(), 1);
        records.remove(0).state
    }

    fn command(&self, args: &str) -> Command {
        let mut command = Command::new(binary());
        command.arg("resolve").args(args.split_whitespace()).arg("-W").arg(&self.0.0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Exit status 0, and nothing complained of: what it says.
    fn says(&self, args: &str) -> String {
        let (status, out, err) = end(self.command(args).output().unwrap());
        assert!(status == 0 && err.is_empty(), "{status}: {out}{err}");
        out
    }

    fn refuses(&self, args: &str, why: &str) {
        let (status, out, err) = end(self.command(args).output().unwrap());
        assert!(status == 1 && out.is_empty() && err.contains(why), "{status}: {out}{err}");
    }
}

fn end(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// Kept by a daemon that is gone.
fn record(role: Verb, state: State, tasks: &[&Process]) -> Record {
    let mut record = Record::new(role, net::random_id().unwrap(), state).unwrap();
    record.daemon = Process::dead().1;
    record.peer = "10.1.2.3:9996".into();
    record.tasks = tasks.iter().map(|task| Task { who: task.1, stays: false }).collect();
    record
}

fn prepared(tasks: &[&Process]) -> Record {
    record(Cache, State::Prepared, tasks)
}

#[test]
fn nothing_is_open() {
    let left = Left::new();
    assert!(left.says("").ends_with(": no session is open here.\n"));
    left.refuses("commit", "no session is open here");
    left.refuses("rollback ab", "no session is open here");
    // The current directory is the default.
    left.store(&prepared(&[]));
    let mut command = Command::new(binary());
    let (status, out, _) = end(command.arg("resolve").current_dir(&left.0.0).output().unwrap());
    assert!(status == 0 && out.contains("prepared"), "{out}");
}

#[test]
fn wrong_usage() {
    let left = Left::new();
    for args in ["abort", "commit a b", "--keep", "-D .", "commit --leave-running", "proxy"] {
        let (status, out, err) = end(left.command(args).output().unwrap());
        assert!(status == 2 && out.is_empty() && err.contains("--help"), "{args}: {status}: {err}");
    }
    let help = end(Command::new(binary()).args(["resolve", "-h"]).output().unwrap());
    assert!(help.0 == 0 && help.1.contains("criu-relay resolve commit|rollback"));
}

#[test]
fn commit_continues_the_copy() {
    let left = Left::new();
    let [one, two, stays] = std::array::from_fn(|_| Process::stopped());
    let mut record = prepared(&[&one, &two, &stays]);
    record.tasks[2].stays = true;
    left.store(&record);
    let said = left.says("commit");
    assert!(said.contains("2 processes were continued, 1 process is as stopped as on the source"), "{said}");
    assert_eq!(left.state(Cache), State::Released);
    wait_until("they run", || !one.is_stopped() && !two.is_stopped());
    assert!(stays.is_stopped());
    // Once more does no harm, and continues who was not.
    kill_process(Pid::from_child(&two.0), Signal::STOP).unwrap();
    wait_until("it is stopped", || two.is_stopped());
    assert!(left.says("commit").contains("decided already"));
    wait_until("it runs", || !two.is_stopped());
    assert!(stays.is_stopped());
    left.refuses("rollback", "decided the other way");
    for mut process in [one, two, stays] {
        assert!(process.lives());
    }
    // What has ended since by itself is no hindrance.
    assert!(left.says("commit").contains("0 processes were continued"));
}

#[test]
fn rollback_kills_the_copy() {
    for state in [State::Prepared, State::Made] {
        let left = Left::new();
        let (mut one, dead, mut stays) = (Process::stopped(), Process::dead(), Process::running());
        let mut record = record(Cache, state, &[&one, &dead, &stays]);
        record.tasks[2].stays = true;
        left.store(&record);
        let said = left.says("rollback");
        assert!(said.contains("2 processes were killed, 1 process was dead before"), "{said}");
        // It has waited for that.
        assert!(!one.lives() && !stays.lives());
        assert_eq!(left.state(Cache), State::RolledBack);
        assert!(left.says("rollback").contains("decided already"));
        left.refuses("commit", "decided the other way");
    }
}

#[test]
fn a_copy_that_is_not_whole_is_not_continued() {
    let left = Left::new();
    let mut dead = Process::stopped();
    let one = Process::stopped();
    left.store(&prepared(&[&one, &dead]));
    dead.kill();
    left.refuses("commit", &format!("process {} of the copy is dead", dead.1.pid));
    assert!(one.is_stopped());
    assert_eq!(left.state(Cache), State::Prepared);
    let left = Left::new();
    left.store(&prepared(&[]));
    left.refuses("commit", "names no process");
    // One that was never said to stand ready.
    let left = Left::new();
    left.store(&record(Cache, State::Made, &[&one]));
    left.refuses("commit", "never told");
    assert!(one.is_stopped());
}

#[test]
fn a_number_that_is_anothers() {
    let left = Left::new();
    let (mut one, mut another) = (Process::stopped(), Process::stopped());
    let mut record = prepared(&[&one, &another]);
    record.tasks[1].who.start -= 1;
    left.store(&record);
    left.refuses("commit", "belongs to another process now");
    left.refuses("rollback", "belongs to another process now");
    assert!(one.lives() && one.is_stopped() && another.lives() && another.is_stopped());
    assert_eq!(left.state(Cache), State::Prepared);
    let said = left.says("-v");
    assert!(
        said.contains("1 process lives and is stopped, 1 process is dead and its number another's now"),
        "{said}"
    );
    assert!(
        said.contains(&format!("process {} is dead; its number belongs to another", another.1.pid)),
        "{said}"
    );
    // The same of the source: it is dead.
    let left = Left::new();
    record.role = Proxy;
    record.state = State::Allowed;
    record.tasks.remove(0);
    left.store(&record);
    left.refuses("rollback", "nothing of the source is left");
    assert!(left.says("commit").contains("the copy is to run"));
    // And of the daemon: it is gone, and not to be asked.
    let left = Left::new();
    let mut record = prepared(&[&one]);
    record.daemon = Identity { start: another.1.start - 1, ..another.1 };
    left.store(&record);
    left.says("commit");
    wait_until("it runs", || !one.is_stopped());
}

#[test]
fn the_sources_side() {
    for state in [State::Asking, State::Allowed] {
        let left = Left::new();
        let (mut one, dead) = (Process::running(), Process::dead());
        left.store(&record(Proxy, state, &[&dead, &one]));
        left.refuses("commit", &format!("process {} of the source lives", one.1.pid));
        assert_eq!(left.state(Proxy), state);
        let said = left.says("rollback");
        assert!(
            said.contains("10.1.2.3:9996") && said.contains("resolve rollback on the cache's host"),
            "{said}"
        );
        assert!(one.lives());
        assert_eq!(left.state(Proxy), State::RolledBack);
        assert!(left.says("rollback").contains("already"));
        left.refuses("commit", "decided the other way");

        let left = Left::new();
        one.kill();
        left.store(&record(Proxy, state, &[&dead, &one]));
        left.refuses("rollback", "nothing of the source is left");
        let said = left.says("commit");
        assert!(said.contains("-W ") && said.contains("resolve commit on the cache's host"), "{said}");
        assert_eq!(left.state(Proxy), State::Released);
        assert!(left.says("commit").contains("already"));
        left.refuses("rollback", "decided the other way");

        // A tree that nobody knows is neither alive nor dead.
        let left = Left::new();
        left.store(&record(Proxy, state, &[]));
        left.refuses("commit", "names no process");
        left.refuses("rollback", "names no process");
    }
}

#[test]
fn a_criu_that_was_let_go() {
    let left = Left::new();
    let (one, mut criu) = (Process::stopped(), Process::running());
    let mut record = record(Proxy, State::Allowed, &[&one]);
    record.criu = Some(criu.1);
    left.store(&record);
    left.refuses("rollback", "about to kill the source");
    assert_eq!(left.state(Proxy), State::Allowed);
    criu.kill();
    left.says("rollback");
    // One that was not let go fails when its script does.
    record.state = State::Asking;
    record.criu = Some(Identity::of_myself().unwrap());
    left.store(&record);
    left.says("rollback");
}

#[test]
fn two_are_wanted() {
    let left = Left::new();
    let mut one = Process::running();
    let mut record = record(Proxy, State::Allowed, &[&one]);
    record.leave_running = true;
    left.store(&record);
    assert!(left.says("").contains("--leave-running"));
    left.says("commit");
    assert!(one.lives());
    assert_eq!(left.state(Proxy), State::Released);
}

#[test]
fn numbers_of_another_namespace() {
    let left = Left::new();
    let mut one = Process::stopped();
    for role in [Cache, Proxy] {
        for time in [false, true] {
            let state = if role == Cache { State::Prepared } else { State::Allowed };
            let mut record = record(role, state, &[&one]);
            if time {
                record.place.time_namespace = 1;
            } else {
                // A container may have a boot id of its own, so that it says nothing.
                record.place.pid_namespace = 1;
                record.place.boot = "another".into();
            }
            left.store(&record);
            left.refuses("commit", "mean nothing here");
            left.refuses("rollback", "nsenter");
            assert!(left.says("").contains("mean nothing here"));
            assert!(one.lives() && one.is_stopped());
            assert_eq!(left.state(role), state);
            record.remove(&left.0.0).unwrap();
        }
    }
}

#[test]
fn the_host_was_started_anew() {
    let mut one = Process::stopped();
    let rebooted = |mut record: Record| {
        let left = Left::new();
        record.place.boot = "another".into();
        // Not even the daemon, whatever has its number.
        record.daemon = Identity::of_myself().unwrap();
        left.store(&record);
        assert!(left.says("").contains("The host has been started anew"));
        left
    };
    let copy = rebooted(prepared(&[&one]));
    copy.refuses("commit", "is dead");
    assert!(copy.says("rollback").contains("1 process was dead before"));
    let source = rebooted(record(Proxy, State::Allowed, &[&one]));
    source.refuses("rollback", "nothing of the source is left");
    source.says("commit");
    assert!(one.lives() && one.is_stopped());
}

/// What a daemon does with a word: the answer's errno and text.
fn daemon(left: &Left, args: &str, action: Action, errno: u32, text: &str) -> (i32, String, String) {
    let dir = Dir::new();
    let socket = UnixListener::bind(dir.join(socket_name(Cache))).unwrap();
    let mut record = Record::load_all(&left.0.0, None).unwrap().remove(0);
    record.daemon = Identity::of_myself().unwrap();
    record.images_dir = dir.0.clone();
    left.store(&record);
    let listed = left.says("");
    assert!(listed.contains(&format!("criu-relay cache, process {}, lives", record.daemon.pid)), "{listed}");
    let child = left.command(args).spawn().unwrap();
    wait_until("it connects", || net::is_readable(socket.as_fd()));
    let mut control = Control::new(socket.accept().unwrap().0.into(), false, Instant::now());
    let mut request = None;
    wait_until("it asks", || match control.step(&mut [0; 1 << 14]).unwrap() {
        Controlled::Request(got) => request.replace(got).is_none(),
        Controlled::Wait => false,
        Controlled::End => panic!("it has gone"),
    });
    let request = request.unwrap();
    assert_eq!((request.action, request.tasks.len()), (action, 0));
    assert_eq!(net::pidfd_pid(request.criu.as_fd()), Some(child.id() as i32));
    // The record can be written by the daemon meanwhile, and is by nobody else.
    drop(lock_dir(&left.0.0).unwrap());
    assert_eq!(left.state(Cache), record.state);
    control.reply(errno, text).unwrap();
    drop(control);
    let end = end(child.wait_with_output().unwrap());
    assert_eq!(left.state(Cache), record.state);
    end
}

#[test]
fn a_daemon_that_lives_is_asked() {
    let left = Left::new();
    let mut one = Process::stopped();
    let mut record = prepared(&[&one]);
    left.store(&record);
    let (status, out, _) = daemon(&left, "commit", Action::Commit, 0, "the copy runs");
    assert!(status == 0 && out.ends_with(": the copy runs\n"), "{out}");
    let (status, out, err) = daemon(&left, "rollback", Action::Rollback, 125, "the source is dead");
    assert!(status == 1 && out.is_empty() && err.contains("the source is dead"), "{err}");
    // Whether it is decided already is for the daemon to say.
    record.state = State::Released;
    left.store(&record);
    assert_eq!(daemon(&left, "rollback", Action::Rollback, 125, "no").0, 1);
    // Without a socket it is left alone, and so are its processes.
    left.refuses("commit", "lives, but");
    record.daemon = Identity::of_myself().unwrap();
    record.images_dir = left.0.0.clone();
    left.store(&record);
    left.refuses("commit", "has no control socket");
    assert!(one.lives() && one.is_stopped());
}

#[test]
fn a_long_way_to_the_socket() {
    let left = Left::new();
    left.store(&prepared(&[]));
    // The daemon was started in it, with -D .
    let deep = left.0.join(&"d".repeat(150));
    fs::create_dir(&deep).unwrap();
    let dir = fs::File::open(&deep).unwrap();
    let short = format!("/proc/self/fd/{}/{}", std::os::fd::AsRawFd::as_raw_fd(&dir), socket_name(Cache));
    let socket = UnixListener::bind(short).unwrap();
    let mut record = Record::load_all(&left.0.0, None).unwrap().remove(0);
    (record.daemon, record.images_dir) = (Identity::of_myself().unwrap(), deep);
    left.store(&record);
    let child = left.command("commit").spawn().unwrap();
    wait_until("it connects", || net::is_readable(socket.as_fd()));
    drop(socket.accept().unwrap());
    let (status, _, err) = end(child.wait_with_output().unwrap());
    assert!(status == 1 && err.contains("without an answer"), "{err}");
}

#[test]
fn more_than_one_session() {
    let left = Left::new();
    let (one, mut two) = (Process::stopped(), Process::stopped());
    let mut first = prepared(&[&one]);
    first.session[0] = 0x11;
    let mut second = prepared(&[&two]);
    second.session[0] = 0x22;
    left.store(&first);
    left.store(&second);
    let said = left.says("");
    assert!(said.contains(&first.session_hex()) && said.contains(&second.session_hex()), "{said}");
    left.refuses("commit", &format!("cache-{}", first.session_hex()));
    left.refuses("rollback 3", "no session 3 is open here");
    assert!(one.is_stopped() && two.is_stopped());
    left.says("commit 11");
    wait_until("it runs", || !one.is_stopped());
    assert!(two.is_stopped());
    // One is left to be decided.
    left.says("rollback");
    assert!(!two.lives());
    left.refuses("rollback", "more than one session is meant");
    left.says("commit cache-11");
}

#[test]
fn what_it_says() {
    let left = Left::new();
    let (run, stopped, dead) = (Process::running(), Process::stopped(), Process::dead());
    let record = prepared(&[&run, &stopped, &stopped, &dead]);
    left.store(&record);
    let said = left.says("");
    for part in [
        &format!("cache of session {}: prepared, for ", record.session_hex()),
        "The copy is stopped before it runs",
        "The other side: 10.1.2.3:9996.",
        &format!("criu-relay cache, which was process {}, is gone", record.daemon.pid),
        "Of the copy: 1 process lives, 2 processes live and are stopped, 1 process is dead.",
        "resolve commit: continues the copy.",
        "resolve rollback: kills the copy.",
    ] {
        assert!(said.contains(part), "{part}\nis not in\n{said}");
    }
    assert!(!said.contains(&format!("process {} lives", run.1.pid)));
    let more = left.says("-v");
    assert!(more.contains(&format!("    process {} lives\n", run.1.pid)), "{more}");
    assert!(more.contains(&format!("    process {} is dead\n", dead.1.pid)), "{more}");
    // Each state has its words.
    for (role, state, part) in [
        (Proxy, State::Asking, "CRIU was held"),
        (Proxy, State::Allowed, "CRIU was let go"),
        (Cache, State::Made, "refused: this copy may not be whole"),
        (Cache, State::Released, "refused: the copy runs"),
        (Cache, State::RolledBack, "refused: the source runs"),
        (Proxy, State::Released, "the cache may not know yet"),
        (Proxy, State::RolledBack, "the cache may not know yet"),
    ] {
        let left = Left::new();
        left.store(&self::record(role, state, &[&run]));
        let said = left.says("");
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn what_can_not_be_trusted() {
    let left = Left::new();
    let one = Process::stopped();
    let record = prepared(&[&one]);
    left.store(&record);
    let path = record.path(&left.0.0);
    let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"whatever\n").unwrap();
    left.says("");
    fs::write(&path, "criu-relay record 1\nrole cache\nstate unclear\n").unwrap();
    for args in ["", "commit", "rollback"] {
        left.refuses(args, &format!("{}: line 3: \"state unclear\": it is not a state", path.display()));
    }
    left.store(&record);
    fs::set_permissions(&left.0.0, fs::Permissions::from_mode(0o777)).unwrap();
    left.refuses("commit", "writable by others");
    fs::set_permissions(&left.0.0, fs::Permissions::from_mode(0o700)).unwrap();
    assert!(one.is_stopped());
}

#[test]
fn a_daemon_that_takes_over_is_waited_for() {
    let left = Left::new();
    let mut one = Process::stopped();
    let mut record = prepared(&[&one]);
    left.store(&record);
    let lock = lock_dir(&left.0.0).unwrap();
    let child = left.command("commit").spawn().unwrap();
    let pid = child.id().to_string();
    wait_until("it waits", || {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        locks.lines().any(|line| line.contains("-> FLOCK") && line.split_whitespace().any(|word| word == pid))
    });
    record.state = State::RolledBack;
    left.store(&record);
    drop(lock);
    let (status, _, err) = end(child.wait_with_output().unwrap());
    assert!(status == 1 && err.contains("decided the other way"), "{err}");
    assert!(one.lives() && one.is_stopped());
}

/// The view of a cache that is gone, with three images, as `--persist` leaves them while their source decides.
struct Images(Dir);

impl Images {
    fn withheld(record: &mut Record, commit: Commit) -> Self {
        let dir = Dir::new();
        for name in ["pages-1.img", "pstree.img", &format!(".inventory.img.{}", record.session_hex())] {
            fs::write(dir.join(name), name.as_bytes()).unwrap();
        }
        let bytes = ("pages-1.img".len() + "pstree.img".len() + ".inventory.img.".len() + 32) as u64;
        record.kept = Some(Kept { dir: dir.0.clone(), commit, images: 3, bytes });
        Self(dir)
    }

    fn shown(record: &mut Record) -> Self {
        let images = Self::withheld(record, Commit::Restored);
        fs::rename(images.hidden(record), images.0.join("inventory.img")).unwrap();
        images
    }

    fn hidden(&self, record: &Record) -> PathBuf {
        self.0.join(&format!(".inventory.img.{}", record.session_hex()))
    }

    fn names(&self) -> Vec<String> {
        let names =
            fs::read_dir(&self.0.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }
}

const ALL: [&str; 3] = ["inventory.img", "pages-1.img", "pstree.img"];

#[test]
fn images_that_were_kept_are_committed() {
    let left = Left::new();
    let mut record = record(Cache, State::Stored, &[]);
    let images = Images::withheld(&mut record, Commit::Stored);
    left.store(&record);
    let dir = images.0.0.display();
    let said = left.says("");
    for part in [
        "The images are stored, and outlive their cache".to_string(),
        format!("Its images: 3 files, 68 bytes, in {dir}, their inventory.img is withheld"),
        "resolve commit: lets the images be restored".into(),
        "resolve rollback: removes the images".into(),
    ] {
        assert!(said.contains(&part), "{part}\nis not in\n{said}");
    }
    let said = left.says("commit");
    assert!(
        said.contains("can be restored: 3 files") && said.contains(&format!("--view {dir} --persist")),
        "{said}"
    );
    assert_eq!((left.state(Cache), images.names()), (State::Released, ALL.map(String::from).to_vec()));
    let said = left.says("");
    assert!(
        said.contains("criu restore can begin from there") && said.contains("the source is dead"),
        "{said}"
    );
    // Had we died before they were shown, the same word shows them.
    fs::rename(images.0.join("inventory.img"), images.hidden(&record)).unwrap();
    assert!(left.says("commit").contains("decided already"));
    assert_eq!(images.names(), ALL);
    left.refuses("rollback", "decided the other way");
    // Somebody has restored them, and has removed them.
    fs::remove_file(images.0.join("inventory.img")).unwrap();
    assert!(left.says("").contains("without inventory.img"));
    left.refuses("commit", "are not in");
    ALL[1..].iter().for_each(|name| fs::remove_file(images.0.join(name)).unwrap());
    assert!(left.says("").contains("None of its images is in"));
}

#[test]
fn images_that_were_kept_are_rolled_back() {
    for commit in [Commit::Stored, Commit::Restored] {
        let left = Left::new();
        let mut record = record(Cache, State::Stored, &[]);
        // With commit restored a restore may have been told to begin.
        let images = match commit {
            Commit::Stored => Images::withheld(&mut record, commit),
            Commit::Restored => Images::shown(&mut record),
        };
        fs::write(images.0.join("notes"), "mine").unwrap();
        fs::create_dir(images.0.join("other.img")).unwrap();
        left.store(&record);
        let said = left.says("rollback");
        assert!(said.contains("The images are removed: 3 files"), "{said}");
        assert_eq!(images.names(), ["notes", "other.img"]);
        left.refuses("rollback", "no session is open");
        // Had we died in between, the same word does the rest.
        record.state = State::RolledBack;
        left.store(&record);
        assert!(left.says("rollback").contains("None of the images was there"));
        assert!(Record::load_all(&left.0.0, None).unwrap().is_empty());
    }
}

#[test]
fn images_of_somebody_else_are_left_alone() {
    let left = Left::new();
    let mut record = record(Cache, State::Stored, &[]);
    let images = Images::withheld(&mut record, Commit::Stored);
    left.store(&record);
    let before = images.names();
    let refused = |why: &str| {
        left.refuses("commit", why);
        left.refuses("rollback", why);
        assert_eq!(left.state(Cache), State::Stored);
    };
    // Others than were stored.
    fs::write(images.0.join("core-1.img"), "").unwrap();
    refused("are not those of the session");
    fs::remove_file(images.0.join("core-1.img")).unwrap();
    // Another session's.
    let other = images.0.join(".inventory.img.000102030405060708090a0b0c0d0e0f");
    fs::write(&other, "").unwrap();
    refused("belongs to another session");
    assert!(left.says("").contains("can't be looked at"));
    fs::remove_file(&other).unwrap();
    // A cache with another work directory has them.
    let socket = UnixListener::bind(images.0.join(socket_name(Cache))).unwrap();
    refused("a cache runs with --view");
    drop(socket);
    fs::set_permissions(&images.0.0, fs::Permissions::from_mode(0o777)).unwrap();
    refused("writable by others");
    fs::set_permissions(&images.0.0, fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_file(images.0.join(socket_name(Cache))).unwrap();
    assert_eq!(images.names(), before);
    // The directory went with the host: there is nothing to be restored.
    fs::rename(&images.0.0, images.0.0.with_extension("gone")).unwrap();
    left.refuses("commit", "are not in");
    assert!(left.says("").contains("None of its images is in"));
    fs::rename(images.0.0.with_extension("gone"), &images.0.0).unwrap();
    left.says("commit");
}

#[test]
fn a_source_that_can_be_seen_from_here() {
    let left = Left::new();
    let mut source = Process::running();
    let mut record = record(Cache, State::Stored, &[]);
    let images = Images::withheld(&mut record, Commit::Stored);
    let mut proxy = self::record(Proxy, State::Allowed, &[&source]);
    proxy.session = record.session;
    left.store(&record);
    left.store(&proxy);
    let before = images.names();
    left.refuses("commit cache", "of the source lives, so that two would run");
    assert!(source.lives() && images.names() == before);
    proxy.state = State::RolledBack;
    left.store(&proxy);
    left.refuses("commit cache", "says that the source runs");
    // So it is of a copy.
    let copy = Process::stopped();
    let ready = Record { tasks: vec![Task { who: copy.1, stays: false }], kept: None, ..record.clone() };
    left.store(&Record { state: State::Prepared, ..ready });
    left.refuses("commit cache", "says that the source runs");
    assert!(copy.is_stopped());
    left.store(&record);
    proxy.state = State::Allowed;
    left.store(&proxy);
    source.kill();
    left.says("commit cache");
    assert_eq!(images.names(), ALL);
}

#[test]
fn a_copy_and_its_images() {
    // It is whole: it runs, and nobody makes another.
    let left = Left::new();
    let mut one = Process::stopped();
    let mut record = prepared(&[&one]);
    let images = Images::shown(&mut record);
    left.store(&record);
    assert!(left.says("").contains("continues the copy; where it is not whole any more"));
    left.says("commit");
    wait_until("it runs", || !one.is_stopped());
    assert_eq!(images.names(), ALL[1..]);
    assert!(left.says("commit").contains("decided already"));
    assert!(one.lives());

    // It is not: another can be made, when nothing of it is left.
    for state in [State::Prepared, State::Made] {
        let left = Left::new();
        let (mut one, dead) = (Process::stopped(), Process::dead());
        let tasks: &[&Process] = if state == State::Made { &[&one] } else { &[&one, &dead] };
        let mut record = self::record(Cache, state, tasks);
        let images = Images::withheld(&mut record, Commit::Restored);
        left.store(&record);
        let said = left.says("commit");
        assert!(said.contains("1 process was killed") && said.contains("can be restored"), "{said}");
        assert!(!one.lives());
        assert_eq!((left.state(Cache), images.names()), (State::Released, ALL.map(String::from).to_vec()));
        assert!(left.says("-v").contains("no process is known"));
    }

    // It was released, and is dead: CRIU had not let it run.
    let left = Left::new();
    let mut record = self::record(Cache, State::Released, &[&Process::dead()]);
    let images = Images::shown(&mut record);
    left.store(&record);
    assert!(left.says("commit").contains("The images can be restored (it was decided already"));
    assert_eq!(images.names(), ALL);

    // The source runs: neither is left.
    let left = Left::new();
    let mut one = Process::stopped();
    let mut record = prepared(&[&one]);
    let images = Images::shown(&mut record);
    left.store(&record);
    let said = left.says("rollback");
    assert!(said.contains("1 process was killed") && said.contains("are removed"), "{said}");
    assert!(!one.lives() && images.names().is_empty());
    assert_eq!(left.state(Cache), State::RolledBack);
    assert!(left.says("rollback").contains("decided already"));
}
