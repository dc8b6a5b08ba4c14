//! What the demo shows while it runs: a bar per node on a terminal, lines elsewhere. All of it on stderr.
//!
//! This module refuses to know what moves; it is told numbers.

use std::fmt;
use std::io::{IsTerminal as _, stderr};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

use super::report::ratio;

/// Lines go into logs: often enough to see that it moves, seldom enough to read.
const LINES_EVERY: Duration = Duration::from_secs(5);

/// One bar, or line, per node.
pub(super) struct Board {
    bars: Option<Vec<ProgressBar>>,
    names: Vec<String>,
    total: u64,
    began: Instant,
    last_lines: Mutex<Instant>,
}

/// Where one node is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Standing {
    /// Bytes that its clients have.
    pub moved: u64,
    pub from_peers: u64,
    pub from_origin: u64,
}

impl Board {
    /// `total` is each node's, in bytes.
    #[must_use]
    pub(super) fn new(names: Vec<String>, total: u64) -> Self {
        let bars = stderr().is_terminal().then(|| bars(&names, total));
        let began = Instant::now();
        Self { bars, names, total, began, last_lines: Mutex::new(began) }
    }

    /// Redraws; where there are only lines, every few seconds.
    pub(super) fn show(&self, standings: &[Standing]) {
        if let Some(bars) = &self.bars {
            for (bar, standing) in bars.iter().zip(standings) {
                bar.set_position(standing.moved);
                bar.set_message(standing.to_string());
            }
            return;
        }
        {
            let mut last = self.last_lines.lock();
            if last.elapsed() < LINES_EVERY {
                return;
            }
            *last = Instant::now();
        }
        for (name, standing) in self.names.iter().zip(standings) {
            self.line(name, standing);
        }
    }

    /// Draws the end, without waiting for the next turn.
    pub(super) fn finish(&self, standings: &[Standing]) {
        match &self.bars {
            Some(bars) => {
                self.show(standings);
                bars.iter().for_each(ProgressBar::abandon);
            }
            None => self.names.iter().zip(standings).for_each(|(name, standing)| self.line(name, standing)),
        }
    }

    fn line(&self, name: &str, standing: &Standing) {
        let elapsed = self.began.elapsed().as_secs_f64();
        let percent = 100.0 * ratio(standing.moved, self.total);
        let rate = standing.moved as f64 / elapsed / 1e6;
        let moved = ByteSize(standing.moved);
        say(format_args!("{elapsed:6.1} s  {name}  {percent:3.0} %  {moved}  {rate:.0} MB/s  {standing}"));
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sent = self.from_peers + self.from_origin;
        if sent == 0 {
            return f.write_str("waiting");
        }
        let percent = |bytes| 100.0 * ratio(bytes, sent);
        write!(f, "peers {:.0} %, origin {:.0} %", percent(self.from_peers), percent(self.from_origin))
    }
}

fn bars(names: &[String], total: u64) -> Vec<ProgressBar> {
    let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(
        "{prefix} {bar:24} {binary_bytes:>10} of {binary_total_bytes} {binary_bytes_per_sec:>12}  {msg}",
    )
    .expect("the template's fields are indicatif's");
    let bar =
        |name: &String| all.add(ProgressBar::new(total).with_style(style.clone()).with_prefix(name.clone()));
    names.iter().map(bar).collect()
}

/// One spinner or bar while contents are hashed; nothing where there is no terminal.
#[must_use]
pub(super) fn hashing_bar(total: u64) -> ProgressBar {
    let style =
        ProgressStyle::with_template("generating {bar:24} {binary_bytes:>10} of {binary_total_bytes}")
            .expect("the template's fields are indicatif's");
    let target =
        if stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    ProgressBar::with_draw_target(Some(total), target).with_style(style)
}

/// A line on stderr for whoever watches.
pub(super) fn say(line: impl fmt::Display) {
    anstream::eprintln!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_what_was_sent() {
        assert_eq!(Standing::default().to_string(), "waiting");
        let standing = Standing { moved: 5, from_peers: 30, from_origin: 10 };
        assert_eq!(standing.to_string(), "peers 75 %, origin 25 %");
    }

    #[test]
    fn nothing_is_drawn_over_lines() {
        let board = Board::new(vec!["node-01".into()], 10);
        board.show(&[Standing { moved: 5, from_peers: 1, from_origin: 1 }]);
        board.finish(&[Standing { moved: 10, from_peers: 1, from_origin: 1 }]);
    }
}
