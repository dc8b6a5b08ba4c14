//! Shows a fetch: a bar on a terminal, plain lines otherwise.
//!
//! Invariant: progress goes to stderr, the summary alone to stdout. A line is readable by itself, for a log collector
//! shows it between other programs' lines.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, Write};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};

use crate::fetch::{Event, Shares, Summary, Verified};
use crate::store::Method;

/// Between two progress lines of a log.
const LINE_PERIOD: Duration = Duration::from_secs(5);

/// What the rate is taken over: long enough to be calm, short enough to show a stall.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// How a fetch is shown.
pub(super) struct Display {
    /// On a terminal.
    bar: Option<ProgressBar>,
    line_due: Instant,
    rate: Rate,
    files: u64,
    bytes: u64,
    kept_bytes: u64,
    /// Files placed, by method.
    methods: BTreeMap<&'static str, u64>,
    /// What files were compared with, and why one was not.
    sums: BTreeSet<String>,
    not_verified: Option<String>,
}

impl Display {
    #[must_use]
    pub(super) fn new(terminal: bool) -> Self {
        Self {
            bar: terminal.then(|| ProgressBar::new(0)),
            line_due: Instant::now() + LINE_PERIOD,
            rate: Rate::default(),
            files: 0,
            bytes: 0,
            kept_bytes: 0,
            methods: BTreeMap::new(),
            sums: BTreeSet::new(),
            not_verified: None,
        }
    }

    /// Shows one event.
    ///
    /// # Errors
    /// When the output is closed.
    pub(super) fn show(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Plan { files, bytes, kept_files, kept_bytes } => {
                (self.files, self.bytes, self.kept_bytes) = (*files, *bytes, *kept_bytes);
                self.start();
                let kept = match kept_files {
                    0 => String::new(),
                    n => format!("; {n} of them ({}) are in place", HumanBytes(*kept_bytes)),
                };
                self.line(&format!("{} in {}{kept}", HumanBytes(*bytes), count(*files, "file")))
            }
            Event::Progress { files_done, shares } => self.progress(*files_done, *shares, Instant::now()),
            Event::File { method, verified_by, not_verified_by_s3, .. } => {
                self.sums.extend(verified_by.iter().cloned());
                if verified_by.is_empty() {
                    self.not_verified.clone_from(not_verified_by_s3);
                }
                *self.methods.entry(name_of(*method)).or_default() += 1;
                Ok(())
            }
            Event::Changed { path, new_bytes, .. } => self.line(&format!(
                "{path} was overwritten while it was fetched; beginning again with its new version of {}",
                HumanBytes(*new_bytes)
            )),
            Event::FileFailed { path, reason } => self.line(&format!("windlass: {path}: {reason}")),
            Event::Done(summary) => {
                self.finish();
                writeln!(io::stdout(), "{}", self.summary(summary))
            }
            Event::Failed { .. } => {
                self.finish();
                Ok(())
            }
        }
    }

    fn start(&self) {
        let Some(bar) = &self.bar else { return };
        let style =
            ProgressStyle::with_template("[{bar:12}] {wide_msg}").expect("the template is well-formed");
        bar.set_style(style.progress_chars("=> "));
        bar.set_length(self.bytes);
    }

    fn progress(&mut self, files_done: u64, shares: Shares, now: Instant) -> io::Result<()> {
        self.rate.sample(now, shares.peer_bytes + shares.origin_bytes);
        let text = self.progress_text(files_done, shares);
        if let Some(bar) = &self.bar {
            bar.set_position(shares.total().min(self.bytes));
            bar.set_message(text);
            return Ok(());
        }
        if now < self.line_due {
            return Ok(());
        }
        self.line_due = now + LINE_PERIOD;
        self.line(&text)
    }

    fn progress_text(&self, files_done: u64, shares: Shares) -> String {
        let done = shares.total().min(self.bytes);
        let rate = self.rate.bytes_per_second();
        let left = match (self.bytes - done).checked_div(rate) {
            Some(seconds) => format!("{:#} left", HumanDuration(Duration::from_secs(seconds))),
            None => "waiting".into(),
        };
        format!(
            "{} of {}, {}/s, {left}, {}, {files_done}/{} files",
            HumanBytes(done),
            HumanBytes(self.bytes),
            HumanBytes(rate),
            by_source(shares),
            self.files,
        )
    }

    fn summary(&self, summary: &Summary) -> String {
        let moved = summary.shares.peer_bytes + summary.shares.origin_bytes;
        let methods: Vec<_> =
            self.methods.iter().map(|(method, files)| format!("{files} by {method}")).collect();
        let placed = if methods.is_empty() { "nothing to place".into() } else { methods.join(", ") };
        let time = Duration::try_from_secs_f64(summary.seconds).unwrap_or_default();
        let rate = match moved {
            0 => String::new(),
            moved => format!(" ({}/s)", HumanBytes(per_second(moved, time))),
        };
        format!(
            "{}, {} in {:.1} s{rate}: {}; placed {placed}; {}",
            count(summary.files, "file"),
            HumanBytes(summary.bytes),
            summary.seconds,
            by_source(summary.shares),
            self.verified(summary.verified),
        )
    }

    /// What was compared with a checksum, and what was not.
    fn verified(&self, verified: Verified) -> String {
        let mut parts = Vec::new();
        if verified.now_files > 0 {
            let by: Vec<_> = self.sums.iter().map(String::as_str).collect();
            parts.push(format!("{} verified as a whole by {}", verified.now_files, by.join(", ")));
        }
        if verified.by_nothing_files > 0 {
            let why = self.not_verified.as_deref().map(|why| format!(" ({why})")).unwrap_or_default();
            parts.push(format!("{} not verified as a whole{why}", verified.by_nothing_files));
        }
        if verified.kept_files > 0 {
            parts.push(format!("{} in place before", verified.kept_files));
        }
        parts.join(", ")
    }

    fn line(&self, text: &str) -> io::Result<()> {
        match &self.bar {
            Some(bar) => {
                bar.println(text);
                Ok(())
            }
            None => writeln!(io::stderr(), "{text}"),
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

const fn name_of(method: Method) -> &'static str {
    match method {
        Method::Reflink => "reflink",
        Method::HardLink => "hard link",
        Method::KernelCopy | Method::Copy => "copy",
    }
}

fn count(n: u64, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

fn by_source(shares: Shares) -> String {
    let of = |bytes| percent(bytes, shares.total());
    format!(
        "peers {} % origin {} % local {} %",
        of(shares.peer_bytes),
        of(shares.origin_bytes),
        of(shares.local_bytes)
    )
}

/// Rounded down, so that 100 means all.
fn percent(part: u64, whole: u64) -> u128 {
    (u128::from(part) * 100).checked_div(u128::from(whole)).unwrap_or(0)
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let rate = (u128::from(bytes) * 1000).checked_div(time.as_millis()).unwrap_or(0);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// Bytes per second over the last [`RATE_WINDOW`].
#[derive(Debug, Default)]
struct Rate {
    /// Oldest first; a few per second, so a few dozen.
    samples: VecDeque<(Instant, u64)>,
}

impl Rate {
    fn sample(&mut self, now: Instant, bytes: u64) {
        self.samples.push_back((now, bytes));
        while self.samples.len() > 2
            && self.samples.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= RATE_WINDOW)
        {
            self.samples.pop_front();
        }
    }

    fn bytes_per_second(&self) -> u64 {
        match (self.samples.front(), self.samples.back()) {
            (Some((begun, first)), Some((ended, last))) => {
                per_second(last.saturating_sub(*first), ended.duration_since(*begun))
            }
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_rate_forgets_what_is_long_ago() {
        let (mut rate, begun) = (Rate::default(), Instant::now());
        assert_eq!(rate.bytes_per_second(), 0);
        for second in 0..=20 {
            rate.sample(begun + Duration::from_secs(second), second.min(10) * MIB);
            if second == 10 {
                assert_eq!(rate.bytes_per_second(), MIB);
            }
        }
        assert_eq!(rate.bytes_per_second(), 0, "a stall shows");
    }

    #[test]
    fn texts() {
        let mut display = Display::new(false);
        (display.files, display.bytes) = (8, 100 * MIB);
        let shares = Shares { local_bytes: 10 * MIB, peer_bytes: 30 * MIB, origin_bytes: 10 * MIB };
        let now = Instant::now();
        display.rate.sample(now, 0);
        display.rate.sample(now + Duration::from_secs(1), 10 * MIB);
        assert_eq!(
            display.progress_text(2, shares),
            "50.00 MiB of 100.00 MiB, 10.00 MiB/s, 5s left, peers 60 % origin 20 % local 20 %, 2/8 files"
        );
        display.methods.insert("reflink", 8);
        let verified = Verified { now_files: 6, by_nothing_files: 2, ..Verified::default() };
        let summary = Summary { files: 8, bytes: 50 * MIB, seconds: 2.0, shares, verified };
        display.sums.insert("crc64nvme".into());
        display.not_verified = Some("S3 keeps no checksum of it".into());
        assert_eq!(
            display.summary(&summary),
            "8 files, 50.00 MiB in 2.0 s (20.00 MiB/s): peers 60 % origin 20 % local 20 %; placed 8 by reflink; \
             6 verified as a whole by crc64nvme, 2 not verified as a whole (S3 keeps no checksum of it)"
        );
    }

    #[test]
    fn nothing_divides_by_zero() {
        let display = Display::new(false);
        assert!(display.progress_text(0, Shares::default()).starts_with("0 B of 0 B, 0 B/s, waiting"));
        let summary = Summary {
            files: 1,
            bytes: 0,
            seconds: 0.0,
            shares: Shares::default(),
            verified: Verified::default(),
        };
        assert!(display.summary(&summary).starts_with("1 file, 0 B in 0.0 s: "));
    }
}
