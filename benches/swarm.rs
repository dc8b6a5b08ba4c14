//! The swarm's figures in virtual time: the shipped state machine on up to 2,000 nodes, against what physics allows.
//!
//! ```text
//! cargo bench --bench swarm -- grid [--nodes 2,8,32] [--only burst] [--json]    the figures, one table
//!                              [--gib 4] [--set fanout=2]                       of less, or with another [swarm]
//! cargo bench --bench swarm -- faults [--seeds 20000] [--from 1] [--large]      random faults, every invariant
//! cargo bench --bench swarm -- replay 53 [--large]                              one of these histories
//! cargo bench --bench swarm -- plot [--nodes 2,8,32]                            SVG into benches/figures
//! ```
//! All of it runs on as many threads as there are cores (`--jobs 1` for fewer). A grid up to 2,000 nodes takes an hour of
//! one core, 1,000 seeds two minutes. Add `--profile tests` to use what the tests have built. What the model leaves out is said in `tests/swarm_simulation/mod.rs`.
#![expect(clippy::cast_possible_truncation, reason = "counts of chunks and of parts")]

#[path = "swarm/figures.rs"]
mod figures;
#[path = "swarm/grid.rs"]
mod grid;
#[path = "swarm/plot.rs"]
mod plot;
#[path = "../tests/swarm_simulation/mod.rs"]
mod simulation;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use figures::{Figures, header};
use simulation::{Mix, World, mixed};
use windlass::swarm::Config;

const NODES: &[usize] = &[2, 8, 32, 128, 512, 2_000];
/// What 2 cores plot in minutes.
const PLOTTED: &[usize] = &[2, 8, 32, 128];
const USAGE: &str = "cargo bench --bench swarm -- grid | faults | replay SEED | plot; see benches/swarm.rs";

/// The command line after `--`.
struct Arguments(Vec<String>);

impl Arguments {
    fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|argument| argument == flag)
    }

    fn value(&self, flag: &str) -> Option<&str> {
        let at = self.0.iter().position(|argument| argument == flag)?;
        self.0.get(at + 1).map(String::as_str)
    }

    fn all(&self, flag: &str) -> Vec<&str> {
        let pairs = self.0.windows(2).filter(|pair| pair[0] == flag);
        pairs.map(|pair| pair[1].as_str()).collect()
    }

    fn number(&self, flag: &str, otherwise: u64) -> u64 {
        self.value(flag).and_then(|value| value.parse().ok()).unwrap_or(otherwise)
    }

    fn nodes(&self, otherwise: &[usize]) -> Vec<usize> {
        let given =
            self.value("--nodes").map(|list| list.split(',').filter_map(|n| n.parse().ok()).collect());
        given.unwrap_or_else(|| otherwise.to_vec())
    }

    fn jobs(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.number("--jobs", cores as u64).max(1) as usize
    }

    fn mix(&self) -> Mix {
        if self.has("--large") { Mix::LARGE } else { Mix::SMALL }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments(std::env::args().skip(1).filter(|argument| argument != "--bench").collect());
    match arguments.0.first().map(String::as_str) {
        Some("grid") => grid(&arguments),
        Some("faults") => return faults(&arguments),
        Some("replay") => return replay(&arguments),
        Some("plot") => plot::draw(&arguments.nodes(PLOTTED)),
        // `cargo test --all-targets` runs benches too.
        _ => println!("nothing to test here; {USAGE}"),
    }
    ExitCode::SUCCESS
}

fn grid(arguments: &Arguments) {
    let json = arguments.has("--json");
    let gib = arguments.number("--gib", u64::from(grid::CONTENT_GIB)) as u32;
    let config = config(&arguments.all("--set"));
    if !json {
        println!("{}", header());
    }
    let cases = arguments.nodes(NODES).into_iter().flat_map(|nodes| grid::cases(nodes, gib, &config));
    let only = arguments.value("--only");
    let cases: Vec<_> = cases.filter(|case| only.is_none_or(|only| case.name.contains(only))).collect();
    side_by_side(
        &cases,
        arguments.jobs(),
        |case| catch_unwind(|| Figures::of(case)),
        |case, figures| match figures {
            Ok(figures) if json => println!("{}", figures.json()),
            Ok(figures) => println!("{}", figures.row()),
            Err(_) => println!("{:<12} {:>5} broke an invariant", case.name, case.scenario.pulls.len()),
        },
    );
}

/// Does `work` for each item on `jobs` threads, and `report`s in the order in which they end.
fn side_by_side<I: Sync, R: Send>(
    items: &[I],
    jobs: usize,
    work: impl Fn(&I) -> R + Sync,
    mut report: impl FnMut(&I, R),
) {
    let next = AtomicUsize::new(0);
    let (sender, results) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            let (sender, next, work) = (sender.clone(), &next, &work);
            scope.spawn(move || {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if sender.send((item, work(item))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        results.iter().for_each(|(item, result)| report(item, result));
    });
}

/// The shipped numbers with these changes, each `key=value`.
///
/// # Panics
/// When `[swarm]` has no such key, or the value does not fit it.
fn config(changes: &[&str]) -> Config {
    let mut table = toml::Table::try_from(Config::default()).expect("the defaults serialise");
    for change in changes {
        table.extend(change.parse::<toml::Table>().expect("--set takes key=value"));
    }
    table.try_into().expect("--set takes what [swarm] takes")
}

fn faults(arguments: &Arguments) -> ExitCode {
    let (from, seeds) = (arguments.number("--from", 1), arguments.number("--seeds", 2_000));
    let (mix, started) = (arguments.mix(), Instant::now());
    let (mut failed, mut again, mut worst, mut stall) = (Vec::new(), 0, 1.0f64, 0.0f64);
    let histories: Vec<u64> = (from..from + seeds).collect();
    side_by_side(
        &histories,
        arguments.jobs(),
        |seed| catch_unwind(|| World::new(mixed(*seed, mix)).run()),
        |seed, outcome| match outcome {
            Ok(outcome) => {
                again += outcome.again();
                worst = worst.max(outcome.origin_ratio);
                stall = stall.max(outcome.longest_stall_s);
            }
            Err(_) => failed.push(*seed),
        },
    );
    failed.sort_unstable();
    println!(
        "{seeds} seeds from {from}: {} broke an invariant {failed:?}; {again} chunks fetched again, each for a fault; \
         worst origin ratio {worst:.3}; longest wait {stall:.1} s; {:.0} s",
        failed.len(),
        started.elapsed().as_secs_f64(),
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn replay(arguments: &Arguments) -> ExitCode {
    let Some(seed) = arguments.0.get(1).and_then(|seed| seed.parse().ok()) else {
        println!("{USAGE}");
        return ExitCode::FAILURE;
    };
    let scenario = mixed(seed, arguments.mix());
    println!("{scenario:#?}");
    let outcome = World::new(scenario).run();
    println!(
        "last {:.3} s, origin ratio {:.4}, fetched again {:?}, longest wait {:.2} s",
        outcome.last_s, outcome.origin_ratio, outcome.again, outcome.longest_stall_s
    );
    ExitCode::SUCCESS
}
