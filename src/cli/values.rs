//! The values of options.

use std::ffi::OsString;
use std::time::Duration;

use lexopt::prelude::*;

use super::Persist;
use crate::peer::Prepare;

/// One of several words.
pub fn choose<T: Copy>(long: &str, value: &OsString, choices: &[(&str, T)]) -> Result<T, lexopt::Error> {
    match choices.iter().find(|(name, _)| value.to_str() == Some(name)) {
        Some((_, choice)) => Ok(*choice),
        None => {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            Err(format!("--{long} is {}, not '{}'", names.join(" or "), value.display()).into())
        }
    }
}

/// Whole seconds, at least one.
pub fn seconds(long: &str, value: &OsString) -> Result<Duration, lexopt::Error> {
    match value.parse_with(str::parse::<u32>)? {
        0 => Err(format!("--{long} is 1 second at least").into()),
        seconds => Ok(Duration::from_secs(seconds.into())),
    }
}

/// A number of bytes: 4096, 64K, 512M, 2G.
pub fn size(long: &str, value: &OsString) -> Result<u64, lexopt::Error> {
    let bytes = || {
        let text = value.to_str()?;
        let (digits, shift) = match text.chars().last()? {
            'K' | 'k' => (&text[..text.len() - 1], 10),
            'M' | 'm' => (&text[..text.len() - 1], 20),
            'G' | 'g' => (&text[..text.len() - 1], 30),
            _ => (text, 0),
        };
        // Not even a sign.
        let number: u64 = digits.parse().ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
        number.checked_mul(1 << shift)
    };
    bytes().ok_or_else(|| {
        let value = value.display();
        format!("--{long} takes a number of bytes, or one with K, M or G behind it, not '{value}'").into()
    })
}

/// How much memory is to be written beforehand.
pub fn prepare(long: &str, value: &OsString) -> Result<Prepare, lexopt::Error> {
    match value.to_str() {
        Some("auto") => Ok(Prepare::Auto),
        Some("off") => Ok(Prepare::Off),
        _ => match size(long, value) {
            Ok(0) => Ok(Prepare::Off),
            Ok(bytes) => Ok(Prepare::Size(bytes)),
            Err(_) => {
                let value = value.display();
                Err(format!(
                    "--{long} is auto, off, or a number of bytes, perhaps with K, M or G behind it, not '{value}'"
                )
                .into())
            }
        },
    }
}

/// The number of an open descriptor.
pub fn descriptor(value: &OsString) -> Result<i32, lexopt::Error> {
    match value.to_str().and_then(|text| text.parse().ok()) {
        Some(fd) if fd >= 0 => Ok(fd),
        _ => Err(format!("'{}' is not a descriptor's number", value.display()).into()),
    }
}

/// -v, -vv, -v2: as with CRIU, the number sets the level, a letter raises it.
pub fn level(before: u8, value: Option<OsString>) -> Result<u8, lexopt::Error> {
    let Some(value) = value else { return Ok(before.saturating_add(1)) };
    match value.to_str() {
        Some(text) if text.bytes().all(|byte| byte == b'v') => {
            Ok(before.saturating_add(1).saturating_add(u8::try_from(text.len()).unwrap_or(u8::MAX)))
        }
        Some(text) => text.parse().map_err(|_| format!("-v takes a number, not '{text}'").into()),
        None => Err("-v takes a number".into()),
    }
}

/// --persist, --persist=disk.
pub fn persist(value: Option<OsString>) -> Result<Persist, lexopt::Error> {
    match value {
        None => Ok(Persist::Tmpfs),
        Some(value) if value == "disk" => Ok(Persist::Disk),
        Some(value) => {
            Err(format!("--persist takes nothing or disk (--persist=disk), not '{}'", value.display()).into())
        }
    }
}

/// What an option is told that nothing is made of.
pub fn arg_error(long: &str) -> lexopt::Error {
    format!("--{long} has no meaning here").into()
}
