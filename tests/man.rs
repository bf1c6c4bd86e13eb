//! The manual pages: every option is there and no other, and mandoc finds nothing wrong with them.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;

use criu_relay::cli::{FLAGS, Flag};

const PAGES: [&str; 2] = ["criu-relay.8", "criu-relay-protocol.7"];

fn path(page: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "man", page].iter().collect()
}

fn text(page: &str) -> String {
    std::fs::read_to_string(path(page)).expect(page)
}

/// The names of the page's sections, in order.
fn sections(page: &str) -> Vec<String> {
    text(page).lines().filter_map(|line| line.strip_prefix(".Sh ")).map(String::from).collect()
}

/// The lines of one section.
fn section(page: &str, name: &str) -> Vec<String> {
    let text = text(page);
    let lines = text.lines().skip_while(|line| line.strip_prefix(".Sh ") != Some(name)).skip(1);
    lines.take_while(|line| !line.starts_with(".Sh ")).map(String::from).collect()
}

/// What the macros of an option's line say, as far as such lines need them.
fn render(line: &str) -> String {
    let mut out = String::new();
    let (mut glued, mut flag) = (true, false);
    for word in line.split_whitespace() {
        let dash = std::mem::take(&mut flag);
        match word {
            "Fl" => flag = true,
            "Ar" | "Cm" => {}
            "Ns" => glued = true,
            "Oo" => {
                out.push_str(if glued { "[" } else { " [" });
                glued = true;
            }
            "Oc" => out.push(']'),
            "," => out.push(','),
            word => {
                out.push_str(if glued { "" } else { " " });
                out.push_str(if dash { "-" } else { "" });
                out.push_str(word);
                glued = false;
            }
        }
    }
    out
}

/// What the page has to say of an option: `-D, --images-dir DIR`, `-v[N], --verbosity[=N]`.
fn expected(flag: &Flag) -> String {
    let (short_value, long_value) = match flag.value {
        None => (String::new(), String::new()),
        // An optional value is attached: -v2, --verbosity=2.
        Some(value) if value.starts_with('[') => (value.into(), value.replacen('[', "[=", 1)),
        Some(value) => (String::new(), format!(" {value}")),
    };
    let short = flag.short.map_or(String::new(), |letter| format!("-{letter}{short_value}, "));
    format!("{short}--{}{long_value}", flag.long)
}

#[test]
fn every_option_is_documented_and_no_other() {
    let options = section("criu-relay.8", "OPTIONS");
    let items: Vec<_> = options.iter().filter_map(|line| line.strip_prefix(".It ")).collect();
    let documented: BTreeSet<_> = items.iter().map(|item| render(item)).collect();
    assert_eq!(documented.len(), items.len(), "an option is documented twice: {items:?}");
    assert!(items.iter().all(|item| item.starts_with("Fl ")), "not an option: {items:?}");
    let existing: BTreeSet<_> = FLAGS.iter().map(expected).collect();
    let missing: Vec<_> = existing.difference(&documented).collect();
    let unknown: Vec<_> = documented.difference(&existing).collect();
    assert!(missing.is_empty(), "not in OPTIONS: {missing:?}; there instead: {unknown:?}");
    assert!(unknown.is_empty(), "in OPTIONS, but the program has no such option: {unknown:?}");
}

#[test]
fn sections_stand_in_their_order() {
    // mandoc wants FILES, EXIT STATUS, EXAMPLES, DIAGNOSTICS, SEE ALSO and CAVEATS in this order.
    let program = [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "COMMIT",
        "OPTIONS",
        "FILES",
        "EXIT STATUS",
        "LIMITS",
        "EXAMPLES",
        "DIAGNOSTICS",
        "SECURITY",
        "SEE ALSO",
        "CAVEATS",
    ];
    assert_eq!(sections("criu-relay.8"), program);
    let protocol = [
        "NAME",
        "DESCRIPTION",
        "FRAMING",
        "MESSAGES",
        "REMOTE DIALECT",
        "STREAM DIALECT",
        "SEED PROTOCOL",
        "RELAY PROTOCOL",
        "CONTROL SOCKET",
        "SESSIONS ON THE CACHE",
        "ORDER OF OPERATIONS",
        "PROTOCOL ERRORS",
        "WHAT A CLIENT MAY RELY ON",
        "SEE ALSO",
    ];
    assert_eq!(sections("criu-relay-protocol.7"), protocol);
}

#[test]
fn man_pages_are_clean() {
    for page in PAGES {
        let lint = Command::new("mandoc").args(["-T", "lint", "-W", "warning"]).arg(path(page)).output();
        let lint = match lint {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                eprintln!("SKIPPED man_pages_are_clean: mandoc is not installed");
                return;
            }
            lint => lint.expect("mandoc can't be run"),
        };
        let said = [lint.stdout, lint.stderr].concat();
        assert!(lint.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
    }
}

#[test]
fn lines_of_options_are_understood() {
    for (line, meaning) in [
        ("Fl D , Fl -images-dir Ar DIR", "-D, --images-dir DIR"),
        ("Fl -keep", "--keep"),
        ("Fl v Ns Oo Ar N Oc , Fl -verbosity Ns Oo = Ns Ar N Oc", "-v[N], --verbosity[=N]"),
        ("Fl -a Ar B Ns Oo / Ns Ar C Oc Ns | Ns Cm any", "--a B[/C]|any"),
    ] {
        assert_eq!(render(line), meaning);
    }
}
