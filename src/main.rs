//! The program: exit codes, and nothing else.

#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use criu_relay::cli::{self, Command};
use criu_relay::daemon;
use criu_relay::reactor::Exit;
use criu_relay::resolve;
use criu_relay::script;
use criu_relay::wait;

fn main() -> ExitCode {
    // CRIU's action scripts get no argument.
    if std::env::args_os().len() <= 1
        && let Some(action) = std::env::var_os("CRTOOLS_SCRIPT_ACTION")
    {
        let (dir, pid) = (std::env::var_os("CRTOOLS_IMAGE_DIR"), std::env::var_os("CRTOOLS_INIT_PID"));
        return match script::run(&action, dir.as_deref(), pid.as_deref()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => complain(&why, 1),
        };
    }
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Print(text)) => print(&text),
        Ok(Command::Run(options)) => match daemon::run(&options) {
            Ok(Exit::Done) => ExitCode::SUCCESS,
            Ok(Exit::Failed) => ExitCode::FAILURE,
            Err(why) => complain(&why, 1),
        },
        Ok(Command::Resolve(asked)) => match resolve::run(&asked) {
            Ok(text) => print(&text),
            Err(why) => complain(&why, 1),
        },
        Ok(Command::Wait(asked)) => match wait::run(&asked) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => complain(&why, 1),
        },
        Err(why) => complain(&why, 2),
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

// eprintln! would panic where stderr is full or gone, and change the status.
fn complain(why: &str, status: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "criu-relay: {why}");
    ExitCode::from(status)
}
