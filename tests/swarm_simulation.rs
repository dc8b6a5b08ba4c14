//! The shipped swarm in virtual time: every node finishes, and the origin sends each byte once.
#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "simulated rates"
)]

#[path = "swarm_simulation/world.rs"]
mod world;

use windlass::swarm::Config;
use world::{Outcome, Scenario, World};

fn run(scenario: Scenario) -> Outcome {
    let config = Config::default();
    let (bound, name) =
        (scenario.bound_s(), format!("N={} M={} seed={}", scenario.nodes, scenario.chunks, scenario.seed));
    let outcome = World::new(scenario, &config).run(120);
    println!(
        "{name}: last {:.3} s, bound {bound:.3} s, ratio {:.3}, origin {:.4}, last resorts {}, messages {} ({:.2} per node and chunk, {:.5} of the bytes)",
        outcome.last_s,
        outcome.last_s / bound,
        outcome.origin_ratio,
        outcome.last_resorts,
        outcome.messages,
        outcome.messages as f64 / (outcome.origin_fetches.len() * outcome.seconds.len()) as f64,
        outcome.message_bytes as f64
            / (outcome.origin_fetches.len() as f64 * 8_388_608.0 * outcome.seconds.len() as f64),
    );
    for stats in
        outcome.stats.iter().zip(&outcome.seconds).filter(|(_, s)| s.is_some()).map(|(stats, _)| stats)
    {
        assert_eq!(stats.queued_assignments, 0);
        assert_eq!(stats.flows, 0);
        assert_eq!(stats.uploads, 0);
    }
    outcome
}

fn assert_once(outcome: &Outcome) {
    let twice: Vec<_> = outcome.origin_fetches.iter().enumerate().filter(|(_, n)| **n != 1).collect();
    assert!(twice.is_empty(), "fetched other than once (chunk, times): {twice:?}");
}

#[test]
fn a_cold_burst_fetches_each_chunk_once() {
    for (nodes, chunks) in [(1, 128), (2, 128), (4, 128), (8, 256), (32, 128), (128, 64)] {
        let scenario = Scenario::burst(nodes, chunks);
        let bound_s = scenario.bound_s();
        let outcome = run(scenario);
        assert_once(&outcome);
        assert_eq!(outcome.last_resorts, 0);
        // So small a content is over before its start, some 70 ms of the origin's first bytes and the first hops.
        assert!(outcome.last_s <= 1.1 * bound_s + 0.15, "{} s, bound {bound_s} s", outcome.last_s);
    }
}

#[test]
fn those_who_come_later_fetch_nothing_again() {
    for seed in 1..=2 {
        let mut scenario = Scenario::burst(32, 128);
        scenario.joins_us = (0..32).map(|n| n * 40_000).collect();
        scenario.seed = seed;
        assert_once(&run(scenario));
    }
}

#[test]
fn daemons_that_start_in_the_same_instant_hardly_fetch_twice() {
    for (nodes, seed) in [(2, 1), (8, 2), (32, 3), (32, 4)] {
        let mut scenario = Scenario::burst(nodes, 128);
        scenario.view_lag_us = 500_000;
        scenario.seed = seed;
        let outcome = run(scenario);
        assert!(outcome.origin_ratio <= 1.01, "origin ratio {}", outcome.origin_ratio);
    }
}

#[test]
fn nodes_that_join_a_running_burst_find_its_homes() {
    let mut scenario = Scenario::burst(24, 256);
    scenario.view_lag_us = 500_000;
    scenario.joins_us = (0..24).map(|n| n * 150_000).collect();
    let outcome = run(scenario);
    assert!(outcome.origin_ratio <= 1.01, "origin ratio {}", outcome.origin_ratio);
}

#[test]
fn a_crash_costs_the_others_only_what_was_in_the_air() {
    for seed in 1..=3 {
        let mut scenario = Scenario::burst(16, 256);
        scenario.crashes = vec![(3, 150_000), (7, 200_000)];
        scenario.seed = seed;
        let bound_s = scenario.bound_s();
        let outcome = run(scenario);
        assert_eq!(outcome.seconds.iter().flatten().count(), 14);
        // Half a second until the connections break.
        assert!(outcome.last_s <= 1.1 * bound_s + 0.7, "{} s, bound {bound_s} s", outcome.last_s);
        assert!(outcome.origin_ratio <= 1.01, "origin ratio {}", outcome.origin_ratio);
    }
}

#[test]
fn a_warm_node_sends_each_chunk_about_once() {
    let mut scenario = Scenario::burst(17, 256);
    scenario.warm = 1;
    let sent_once = 256.0 * 8_388_608.0;
    let outcome = run(scenario);
    println!("the warm node sent {:.3} of the content", outcome.sent_by_warm / sent_once);
    assert!(outcome.origin_fetches.iter().all(|fetches| *fetches == 0));
    assert!(outcome.sent_by_warm <= 1.15 * sent_once);
}
