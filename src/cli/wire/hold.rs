//! `windlass wire --hold`: the wiring follows the mirror. It is there while the mirror answers, goes when it does not,
//! and goes for good on SIGTERM, so that an uninstall leaves the node as it was.

use std::time::Duration;

use tokio::time::Instant;

use super::events::Reporter;
use super::files::{self, Change};
use super::taint::{self, Gate, NodeObject};
use super::{MirrorAddress, Wish, mirror};
use crate::cli::canary::{Arrival, Canary};
use crate::cli::signals::Signals;
use crate::containerd::roots::Roots;

/// Between two looks at the mirror.
const INTERVAL: Duration = Duration::from_secs(5);

/// Looks that must fail in a row before the wiring goes: one may meet a restart, and a refused connection costs
/// containerd nothing. A mirror that hangs is gone after 15 to 21 seconds.
const FAILURES: u32 = 3;

/// What is to be done after a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Wire,
    Unwire,
    Nothing,
}

/// Whether the node is wired, and how often in a row the mirror did not answer.
#[derive(Debug, Default)]
struct Watch {
    is_wired: bool,
    failures: u32,
}

impl Watch {
    fn saw(&mut self, answers: bool) -> Step {
        self.failures = if answers { 0 } else { self.failures.saturating_add(1) };
        if answers {
            // Each time: somebody else may have rewritten the files, as an image's boot script does.
            self.is_wired = true;
            return Step::Wire;
        }
        if self.is_wired && self.failures >= FAILURES {
            self.is_wired = false;
            return Step::Unwire;
        }
        Step::Nothing
    }
}

/// What is to be in the files.
pub(super) struct Wiring {
    pub(super) roots: Roots,
    pub(super) wishes: Vec<Wish>,
    pub(super) has_default: bool,
}

/// Removes the startup taint when it is time.
pub(super) struct Gatekeeper {
    node: NodeObject,
    canary: Canary,
    gate: Gate,
    began: Instant,
    is_proven: bool,
}

/// Who looks on after each look at the mirror.
pub(super) struct Attendants {
    pub(super) gatekeeper: Option<Gatekeeper>,
    pub(super) reporter: Option<Reporter>,
}

/// Holds the wiring until SIGTERM or SIGINT.
pub(super) async fn hold(
    wiring: &Wiring,
    address: &MirrorAddress,
    mut attendants: Attendants,
) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let mut ticks = tokio::time::interval(INTERVAL);
    let mut watch = Watch::default();
    let mut said = Vec::new();
    let rounds = async {
        loop {
            ticks.tick().await;
            let answer = mirror::ask(address).await;
            let answers = answer.is_ok();
            match watch.saw(answers) {
                Step::Wire => {
                    say(&files::wire(&wiring.roots, &wiring.wishes, wiring.has_default, false), &mut said)
                }
                Step::Unwire => {
                    eprintln!("the mirror does not answer: {}", answer.err().unwrap_or_default());
                    say(&files::unwire(&wiring.roots, &[], false), &mut said);
                }
                Step::Nothing => {}
            }
            if let Some(keeper) = &mut attendants.gatekeeper {
                keeper.look(answers).await;
            }
            if let Some(reporter) = &mut attendants.reporter {
                reporter.look(answers).await;
            }
        }
    };
    // A file is written in one rename, so a round may be cut anywhere.
    tokio::select! {
        () = rounds => {}
        _ = signals.next() => {}
    }
    say(&files::unwire(&wiring.roots, &[], false), &mut said);
    Ok(())
}

impl Gatekeeper {
    pub(super) fn new(node: NodeObject, canary: Canary, deadline: Duration) -> Self {
        Self { node, canary, gate: Gate::new(deadline), began: Instant::now(), is_proven: false }
    }

    async fn look(&mut self, answers: bool) {
        if answers && self.gate.is_shut() && !self.is_proven {
            self.is_proven = match self.canary.send().await {
                Arrival::Came => true,
                Arrival::Missing(why) | Arrival::Unknown(why) => {
                    eprintln!("the node stays tainted: {why}");
                    false
                }
            };
        }
        let now = self.began.elapsed();
        if self.gate.step(now, self.is_proven) != taint::Step::Remove {
            return;
        }
        match self.node.untaint().await {
            Ok(was_there) => {
                if was_there {
                    let why = if self.is_proven { "a canary arrived" } else { "the deadline has passed" };
                    eprintln!("removed the taint {} from this node: {why}", taint::KEY);
                }
                self.gate.removed(now);
            }
            Err(error) => eprintln!("the taint {} could not be removed: {error:#}", taint::KEY),
        }
    }
}

/// Says what is new, and a refusal once and not at every look.
fn say(changes: &[Change], said: &mut Vec<Change>) {
    for change in changes.iter().filter(|change| change.is_new() && !said.contains(change)) {
        eprintln!("{}", change.line(false));
    }
    if changes.iter().any(Change::is_new) {
        *said = changes.to_vec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wiring_goes_only_after_several_failures_and_comes_back_at_once() {
        let mut watch = Watch::default();
        assert_eq!(watch.saw(false), Step::Nothing, "nothing was wired yet");
        assert_eq!(watch.saw(true), Step::Wire);
        assert_eq!([watch.saw(false), watch.saw(false)], [Step::Nothing; 2]);
        assert_eq!(watch.saw(true), Step::Wire, "a restart");
        assert_eq!(
            [watch.saw(false), watch.saw(false), watch.saw(false)],
            [Step::Nothing, Step::Nothing, Step::Unwire]
        );
        assert_eq!(watch.saw(false), Step::Nothing);
        assert_eq!(watch.saw(true), Step::Wire);
    }
}
