//! The program: exit codes, and nothing else.

#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use criu_relay::cli::{self, Command};
use criu_relay::daemon;
use criu_relay::reactor::Exit;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Print(text)) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Ok(Command::Run(options)) => match daemon::run(&options) {
            Ok(Exit::Done) => ExitCode::SUCCESS,
            Ok(Exit::Failed) => ExitCode::FAILURE,
            Err(why) => complain(&why, 1),
        },
        Err(why) => complain(&why, 2),
    }
}

// eprintln! would panic where stderr is full or gone, and change the status.
fn complain(why: &str, status: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "criu-relay: {why}");
    ExitCode::from(status)
}
