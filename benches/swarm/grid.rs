//! The scenarios whose figures are promised.

use windlass::swarm::{Config, Scope};

use crate::simulation::{Blob, Fault, Scenario, Views};

const SECOND: u64 = 1_000_000;
const GIB: u32 = 1 << 30;
/// What every scenario distributes: a large image or a mid-sized model.
pub(crate) const CONTENT_GIB: u32 = 16;

/// A scenario with its name in the table.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) scenario: Scenario,
}

/// Chunks of 8 MiB as shipped; beyond 512 nodes of 16 MiB, which halves what one home answers a second.
fn blob(nodes: usize, gib: u32) -> Blob {
    let chunk_bytes = if nodes > 512 { 16 << 20 } else { 8 << 20 };
    Blob { chunks: (u64::from(gib) * u64::from(GIB) / u64::from(chunk_bytes)) as u32, chunk_bytes }
}

pub(crate) fn cases(nodes: usize, gib: u32, config: &Config) -> Vec<Case> {
    let sized = |mut scenario: Scenario| {
        scenario.blobs = vec![blob(nodes, gib)];
        scenario.config = config.clone();
        scenario
    };
    let chunks = blob(nodes, gib).chunks;
    let mut capped = sized(Scenario::burst(nodes, chunks));
    capped.origin_total_gbps = 40.0;
    let mut cases = vec![
        Case { name: "burst", scenario: sized(Scenario::burst(nodes, chunks)) },
        Case { name: "burst R=40", scenario: capped },
        Case { name: "joins 30 s", scenario: sized(Scenario::joins(nodes, chunks, 30 * SECOND, 1)) },
        Case { name: "joins 300 s", scenario: sized(Scenario::joins(nodes, chunks, 300 * SECOND, 1)) },
        Case { name: "warm", scenario: sized(Scenario::warm(1, nodes, chunks)) },
        Case { name: "instant", scenario: sized(Scenario::same_instant(nodes, chunks)) },
    ];
    if nodes >= 8 {
        cases.extend(faulty(nodes, &sized(Scenario::burst(nodes, chunks))));
    }
    cases
}

fn faulty(nodes: usize, burst: &Scenario) -> Vec<Case> {
    let with = |name, change: &dyn Fn(&mut Scenario)| {
        let mut scenario = burst.clone();
        change(&mut scenario);
        Case { name, scenario }
    };
    vec![
        with("crash 10 %", &|scenario| {
            scenario.views = Views::Lag(SECOND / 2);
            settle(scenario);
            let begin = scenario.pulls[0].at;
            let dying = (nodes / 10).max(1);
            scenario.faults =
                (0..dying).map(|n| (begin + 2 * SECOND, Fault::Crash(n * nodes / dying))).collect();
        }),
        with("home crash", &|scenario| {
            scenario.views = Views::Lag(SECOND / 2);
            settle(scenario);
            scenario.faults = vec![(scenario.pulls[0].at + 2 * SECOND, Fault::CrashHome)];
        }),
        with("partition", &|scenario| {
            let begin = 2 * SECOND;
            scenario.faults = vec![
                (begin, Fault::Partition((0..nodes).map(|n| (n % 2) as u8).collect())),
                (begin + 30 * SECOND, Fault::Heal),
            ];
        }),
        with("slow 25 %", &|scenario| {
            for n in 0..nodes / 4 {
                scenario.speed[n] = 0.2;
                scenario.capacity[n] = 2;
            }
        }),
        with("zones", &|scenario| scenario.zones = 3),
        with("scope zone", &|scenario| {
            scenario.zones = 3;
            scenario.config.scope = Scope::Zone;
        }),
    ]
}

/// Daemons that have known each other for ten seconds, in views that learn of what dies.
fn settle(scenario: &mut Scenario) {
    scenario.pulls.iter_mut().for_each(|pull| pull.at = 10 * SECOND);
}
