//! A PID namespace of the target host in which more than one thing runs: a cache, and every CRIU that is to see
//! its /proc. What is started there is killed with it.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use rustix::pipe::fcntl_setpipe_size;
use rustix::process::Pid;

use super::{Bench, Daemon, Host, OURS, PATIENCE, Process, Restore, children, wait_for};

/// It is there while this is.
#[derive(Debug)]
pub struct Namespace {
    // The process before its first one.
    keeper: Restore,
    init: u32,
}

impl Namespace {
    fn link(pid: u32) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
    }

    /// The process ids, as seen from here, of the processes of that name in it, in the order of their numbers.
    pub fn named(&self, name: &str) -> Vec<u32> {
        let ours = Self::link(self.init).expect("the namespace is there");
        let entries = fs::read_dir("/proc").expect("/proc can be read").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let is_named = |pid: &u32| {
            let found = fs::read_to_string(format!("/proc/{pid}/comm"));
            found.is_ok_and(|found| found.trim_end() == name) && Self::link(*pid).as_ref() == Some(&ours)
        };
        let mut pids: Vec<_> = pids.filter(is_named).collect();
        pids.sort();
        pids
    }

    /// Those of the workload's copy.
    pub fn copy(&self) -> Vec<u32> {
        self.named("migrant")
    }

    /// Kills everything in it.
    pub fn kill(&mut self) {
        self.keeper.kill();
    }
}

/// A CRIU that stands still in the middle of what it does.
#[derive(Debug)]
pub struct Held {
    pub process: Process,
    reached: Receiver<()>,
    open: Sender<()>,
}

impl Held {
    /// Waits until it stands still, or is about to.
    pub fn is_reached(&self) {
        self.reached.recv_timeout(PATIENCE).expect("it comes so far");
    }

    /// It goes on.
    pub fn opens(&self) {
        self.open.send(()).expect("its log is read");
    }
}

impl Bench {
    /// A PID namespace, and nothing in it yet but its first process.
    pub fn namespace(&self) -> Namespace {
        let mut command = self.in_pid_namespace();
        // A shell, because what a CRIU leaves behind needs somebody who waits for it.
        command.args(["sh", "-c", "echo; while :; do sleep 60; done"]);
        let (printed, file) = self.output("namespace");
        let process = Process::start("the namespace", command.stdout(file));
        // It has said something: its /proc is there.
        wait_for("namespace", PATIENCE, || {
            fs::read(&printed).is_ok_and(|text| !text.is_empty()).then_some(())
        });
        let init = children(process.pid())[0];
        Namespace { keeper: Restore { process }, init }
    }

    fn command_in(&self, namespace: &Namespace, program: impl AsRef<Path>) -> Command {
        let mut command = self.command(Host::Target, "nsenter");
        command.args(["-F", "-p", "-m", "-t", &namespace.init.to_string()]);
        // Only the children of whoever enters are in there. nsenter itself, as one that waits, would stop with them.
        let shell = "\"$@\"; status=$?; [ $status -gt 128 ] && kill -$((status - 128)) $$; exit $status";
        command.args(["sh", "-c", shell, "sh"]).arg(program.as_ref());
        command
    }

    // A shell stays outside and waits: the one that is meant is its child.
    fn enter(process: &mut Process) {
        process.job = wait_for("process in the namespace", PATIENCE, || {
            let job = children(process.child.id()).first().and_then(|pid| Pid::from_raw(*pid as i32));
            // One that has ended at once needs no number.
            job.map(Some).or_else(|| process.ended().map(|_| None))
        });
    }

    /// `criu-relay cache` there, on a port of its own.
    pub fn cache_in(&self, namespace: &Namespace, args: &[&str]) -> Daemon {
        let command = self.command_in(namespace, OURS);
        let mut cache = self.daemon_by(command, Host::Target, "cache", 0, args);
        Self::enter(&mut cache.process);
        self.take_port(&mut cache);
        cache
    }

    /// The same, on this port.
    pub fn cache_in_at(&self, namespace: &Namespace, port: u16, args: &[&str]) -> Daemon {
        let command = self.command_in(namespace, OURS);
        let mut cache = self.daemon_by(command, Host::Target, "cache", port, args);
        Self::enter(&mut cache.process);
        cache
    }

    /// `criu ACTION -D DIR` there: a restore, or what goes with one. Its log is all that it prints, and no file in
    /// DIR; what it has restored dies with the namespace.
    pub fn criu_in(&self, namespace: &Namespace, action: &str, dir: &Path, args: &[&str]) -> Daemon {
        let dir = dir.to_str().expect("the paths of tests are plain");
        self.run_in(namespace, action, &self.programs.criu, &[&[action, "-v4", "-D", dir], args].concat())
    }

    /// Gives this PID there to somebody who stays.
    pub fn take_pid(&self, namespace: &Namespace, pid: u32) {
        // Somebody else may start in between.
        let script = "for i in 1 2 3 4 5 6 7 8 9; do
            echo $(($1 - 1)) >/proc/sys/kernel/ns_last_pid; sleep 1000 & [ $! = $1 ] && echo taken && exit
            done; exit 99";
        let mut taker = self.run_in(namespace, "taker", "/bin/sh", &["-c", script, "sh", &pid.to_string()]);
        assert_eq!(taker.process.end(), 0, "process {pid} can be taken");
    }

    /// The same, but it stands still when it has said these words, or soon behind them, until it may go on: its log is a
    /// pipe. (A signal would make an error of the system call in which it waits.)
    pub fn criu_held_in(
        &self,
        namespace: &Namespace,
        action: &str,
        dir: &Path,
        args: &[&str],
        words: &'static str,
    ) -> Held {
        let (mut reader, writer) = io::pipe().expect("a pipe can be made");
        fcntl_setpipe_size(&reader, 4096).expect("a pipe can be small");
        // What the shell says that waits for it must not have to wait for us.
        let mut command = self.command_in(namespace, "/bin/sh");
        command.args(["-c", "exec \"$@\" 2>&1", "sh"]).arg(&self.programs.criu);
        command.args([action, "-v4", "-D"]).arg(dir).args(args).stdout(writer).stderr(Stdio::null());
        let mut process = Process::start(&format!("criu {action}"), &mut command);
        drop(command);
        Self::enter(&mut process);
        let (kept, _) = self.output(action);
        let ((say, reached), (open, opened)) = (mpsc::channel(), mpsc::channel());
        thread::spawn(move || {
            let (mut log, mut block) = (Vec::new(), [0; 256]);
            // Not one byte more is read than has to be.
            while let Ok(n @ 1..) = reader.read(&mut block) {
                log.extend_from_slice(&block[..n]);
                if log.windows(words.len()).any(|part| part == words.as_bytes()) {
                    // Errors: nobody waits any more.
                    let _ = say.send(());
                    let _ = opened.recv();
                    break;
                }
            }
            let _ = reader.read_to_end(&mut log);
            let _ = fs::write(&kept, log);
        });
        Held { process, reached, open }
    }

    /// `criu-relay wait -D DIR` there; the cache has been asked.
    pub fn wait_in(&self, namespace: &Namespace, dir: &Path) -> Daemon {
        let dir = dir.to_str().expect("the paths of tests are plain");
        let mut wait = self.run_in(namespace, "wait", OURS, &["wait", "-D", dir, "-v"]);
        wait.logs("the cache has been asked");
        wait
    }

    /// `crit` there, and what it prints. An error is why there is none.
    pub fn crit_in(&self, namespace: &Namespace, args: &[&str]) -> Result<String, String> {
        let crit = self.programs.criu.with_file_name("crit");
        let mut crit = self.run_in(namespace, "crit", crit, args);
        match crit.process.end() {
            0 => Ok(crit.log()),
            77 => Err(crit.log().trim().into()),
            other => panic!("crit {args:?}: {other}: {}", crit.log()),
        }
    }

    /// A program there. Its log is all that it prints.
    pub fn run_in(
        &self,
        namespace: &Namespace,
        name: &str,
        program: impl AsRef<Path>,
        args: &[&str],
    ) -> Daemon {
        let (log, out) = self.output(name);
        let err = out.try_clone().expect("a descriptor can be duplicated");
        let mut command = self.command_in(namespace, program);
        let mut process = Process::start(name, command.args(args).stdout(out).stderr(err));
        Self::enter(&mut process);
        Daemon { process, port: 0, log }
    }
}
