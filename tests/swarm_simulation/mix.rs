//! A random history from a seed: what cluster, what pulls, what goes wrong.

use super::scenario::{Blob, Fault, Pull, Random, SECOND, SETTLED_BY, Scenario, Views};

/// What a mixed history may be made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mix {
    pub(crate) least_nodes: u64,
    pub(crate) most_nodes: u64,
    /// With the shipped membership instead of a lag.
    pub(crate) gossip: bool,
}

impl Mix {
    /// The cluster sizes in which most faults are.
    pub(crate) const SMALL: Self = Self { least_nodes: 8, most_nodes: 64, gossip: true };
    pub(crate) const LARGE: Self = Self { least_nodes: 512, most_nodes: 512, gossip: false };
}

/// The history of this seed.
pub(crate) fn mixed(seed: u64, mix: Mix) -> Scenario {
    let mut random = Random::new(seed.wrapping_mul(0xD1B5_4A32_D192_ED03));
    // Small clusters are cheap: the square puts most of the seeds there.
    let span = mix.most_nodes - mix.least_nodes + 1;
    let nodes = (mix.least_nodes + random.below(span) * random.below(span) / span) as usize;
    let mut scenario = Scenario::burst(nodes, 64 + random.below(129) as u32);
    scenario.seed = seed;
    scenario.views = if mix.gossip { Views::Gossip } else { Views::Lag(SECOND / 2) };
    scenario.link_gbps = random.pick(&[5.0, 10.0, 25.0]);
    scenario.origin_node_gbps = random.pick(&[1.0, 2.0, 5.0]);
    scenario.origin_total_gbps = random.pick(&[5.0, 10.0, 40.0, f64::INFINITY]);
    scenario.break_after = random.pick(&[SECOND / 2, 3 * SECOND, 10 * SECOND]);
    scenario.step = 2_000;
    scenario.limit = 300 * SECOND;
    contents(&mut scenario, &mut random);
    starts(&mut scenario, &mut random);
    nature(&mut scenario, &mut random);
    let begin = scenario.pulls.iter().map(|pull| pull.at).min().unwrap_or(0);
    let span = ((scenario.bound_s() * 1e6) as u64).max(SECOND / 5) * 2;
    for _ in 0..1 + random.below(3) {
        let at = begin + random.below(span);
        let kind = random.below(if mix.gossip { 8 } else { 3 });
        fault(&mut scenario, &mut random, at, kind);
    }
    scenario.faults.sort_by_key(|(at, _)| *at);
    scenario
}

fn contents(scenario: &mut Scenario, random: &mut Random) {
    if random.chance(25) {
        let chunks = 16 + random.below(64) as u32;
        scenario.blobs.push(Blob { chunks, chunk_bytes: 4 << 20 });
        let nodes = scenario.nodes();
        scenario.pulls.extend((0..nodes).map(|node| Pull { node, blob: 1, at: 0 }));
    }
}

/// When daemons and pulls start: a cluster that has settled, mostly; or one that grows under the pulls.
fn starts(scenario: &mut Scenario, random: &mut Random) {
    let nodes = scenario.nodes();
    let spread = random.pick(&[0, 0, SECOND / 5, 3 * SECOND]);
    let newcomers = if random.chance(25) { random.below(nodes as u64) as usize } else { 0 };
    let mut begins = Vec::new();
    for node in 0..nodes {
        let begin = SETTLED_BY + random.below(spread + 1);
        let newcomer = node >= nodes - newcomers;
        scenario.boots[node] =
            if newcomer { begin.saturating_sub(random.below(SECOND)) } else { random.below(SECOND) };
        begins.push(begin);
    }
    for pull in &mut scenario.pulls {
        pull.at = begins[pull.node] + pull.blob as u64 * random.below(SECOND / 2);
    }
    if random.chance(15) {
        scenario.warm.push((0, 0));
        scenario.pulls.retain(|pull| pull.node != 0 || pull.blob != 0);
    }
}

/// What the cluster is like for as long as it lasts.
fn nature(scenario: &mut Scenario, random: &mut Random) {
    let nodes = scenario.nodes();
    if random.chance(25) {
        for node in 0..nodes / 4 {
            scenario.speed[node] = 0.2;
            scenario.capacity[node] = random.pick(&[2, 10]);
        }
    }
    if random.chance(25) {
        scenario.zones = 3;
    }
    if random.chance(20) {
        scenario.seeds[nodes - 1] = true;
    }
    if random.chance(20) {
        scenario.loss = random.pick(&[10, 100, 300]);
    }
    if random.chance(20) {
        scenario.jitter = random.pick(&[2_000, 20_000]);
    }
    if random.chance(10) {
        // A node with a damaged disk, which scenarios may have (`Scenario::corrupt`) and mixes have not yet: as the
        // only holder left it can keep a chunk from the others for ever.
        random.next();
    }
}

fn fault(scenario: &mut Scenario, random: &mut Random, at: u64, kind: u64) {
    let nodes = scenario.nodes();
    let node = random.below(nodes as u64) as usize;
    let longest = random.pick(&[SECOND, 5 * SECOND, 15 * SECOND]);
    let later = at + SECOND / 10 + random.below(longest);
    match kind {
        0 => scenario.faults.push((at, Fault::Crash(node))),
        1 => {
            // A tenth of the cluster within a moment.
            for _ in 0..nodes.div_ceil(10) {
                let node = random.below(nodes as u64) as usize;
                scenario.faults.push((at + random.below(SECOND / 5), Fault::Crash(node)));
            }
        }
        2 => {
            let refuse = if random.chance(50) { Fault::Throttle } else { Fault::Break };
            scenario.faults.push((at, refuse(random.pick(&[20, 50, 100]))));
            scenario.faults.push((later, refuse(0)));
        }
        3 => {
            scenario.faults.push((at, Fault::Crash(node)));
            scenario.faults.push((later, Fault::Restart { node, keep: random.chance(50) }));
        }
        4 => {
            scenario.faults.push((at, Fault::Pause(node)));
            scenario.faults.push((later, Fault::Resume(node)));
        }
        5 => {
            let parts = 2 + random.below(2);
            let parts = (0..nodes).map(|_| random.below(parts) as u8).collect();
            scenario.faults.push((at, Fault::Partition(parts)));
            scenario.faults.push((later, Fault::Heal));
        }
        6 => {
            for node in 0..nodes {
                if random.chance(30) {
                    scenario.faults.push((at + random.below(2 * SECOND), Fault::Evict { node, blob: 0 }));
                }
            }
        }
        _ => {
            scenario.faults.push((at, Fault::Slow { node, percent: random.pick(&[2, 10, 20]) }));
            scenario.faults.push((later, Fault::Slow { node, percent: 100 }));
        }
    }
}
