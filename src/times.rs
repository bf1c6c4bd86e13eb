//! Where the time of a migration goes, told in one line at its end.

use std::fmt;
use std::time::{Duration, Instant};

use crate::pump::human;

/// The moments of one session, each known from when it has come.
#[derive(Debug, Default)]
pub struct Times {
    prepared: Option<(u64, Duration)>,
    begun: Option<Instant>,
    stored: Option<(Instant, u64)>,
    ready: Option<Instant>,
    over: Option<Instant>,
}

impl Times {
    /// So much memory was written beforehand, in this time.
    pub fn prepared(&mut self, bytes: u64, took: Duration) {
        self.prepared = Some((bytes, took));
    }

    /// The source is frozen from now on, or will be in a moment; the last time counts.
    pub fn begin(&mut self) {
        *self = Self { prepared: self.prepared, begun: Some(Instant::now()), ..Self::default() };
    }

    /// The same, for who can't tell before the first image comes.
    pub fn begin_at_latest(&mut self) {
        if self.begun.is_none() {
            self.begin();
        }
    }

    /// Everything is stored: so many bytes.
    pub fn stored(&mut self, bytes: u64) {
        self.stored.get_or_insert((Instant::now(), bytes));
    }

    /// The copy stands ready, or is about to run.
    pub fn ready(&mut self) {
        self.ready.get_or_insert_with(Instant::now);
    }

    /// The source is dead, and the other side knows.
    pub fn over(&mut self) {
        self.over.get_or_insert_with(Instant::now);
    }

    /// The line, if there is anything to tell; what comes from now on is another session's.
    pub fn take(&mut self) -> Option<String> {
        let times = std::mem::take(self);
        times.begun.and(times.stored)?;
        Some(times.to_string())
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = |at: Instant| at.saturating_duration_since(self.begun.unwrap_or(at));
        match self.prepared {
            Some((bytes, took)) => write!(f, "{} prepared beforehand in {}", human(bytes), ms(took))?,
            None => f.write_str("nothing prepared beforehand")?,
        }
        if let Some((at, bytes)) = self.stored {
            let took = since(at);
            let rate = bytes as f64 / took.as_secs_f64().max(0.001);
            write!(
                f,
                "; frozen, it was stored after {} ({}, {}/s)",
                ms(took),
                human(bytes),
                human(rate as u64)
            )?;
        }
        // Which of the two comes first depends on the commit point.
        let mut rest = [("the copy ready", self.ready), ("released", self.over)];
        rest.sort_by_key(|(_, at)| *at);
        for (what, at) in rest {
            if let Some(at) = at {
                write!(f, ", {what} after {}", ms(since(at)))?;
            }
        }
        Ok(())
    }
}

fn ms(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_what_is_known() {
        let mut times = Times::default();
        assert_eq!(times.take(), None);
        times.begin_at_latest();
        assert_eq!(times.take(), None, "nothing was stored");
        let begun = Instant::now();
        let after = |ms| begun + Duration::from_millis(ms);
        let mut times = Times {
            prepared: None,
            begun: Some(begun),
            stored: Some((after(500), 1 << 30)),
            ready: None,
            over: Some(after(612)),
        };
        let stored = "frozen, it was stored after 500 ms (1.0 GiB, 2.0 GiB/s)";
        assert_eq!(
            times.to_string(),
            format!("nothing prepared beforehand; {stored}, released after 612 ms")
        );
        times.ready = Some(after(600));
        let both = [times.ready, times.over];
        times.ready = Some(after(700));
        assert!(times.to_string().ends_with(", released after 612 ms, the copy ready after 700 ms"));
        [times.ready, times.over] = both;
        times.prepared(3 << 20, Duration::from_millis(7));
        assert_eq!(
            times.take().unwrap(),
            format!(
                "3.0 MiB prepared beforehand in 7 ms; {stored}, the copy ready after 600 ms, released after 612 ms"
            )
        );
        assert_eq!(times.take(), None);
    }
}
