//! The swarm's figures, simulated.

use std::process::ExitCode;
use std::time::Instant;

#[path = "../tests/swarm_simulation/mod.rs"]
mod swarm_simulation;

use swarm_simulation::{Mix, Scenario, World, mixed};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize| args.get(i).and_then(|s| s.parse::<u64>().ok()).unwrap_or(0);
    let started = Instant::now();
    match args[0].as_str() {
        "burst" => {
            let mut scenario = Scenario::burst(number(1) as usize, number(2) as u32);
            if args.len() > 3 {
                scenario.origin_total_gbps = number(3) as f64;
            }
            let bound = scenario.bound_s();
            let o = World::new(scenario).run();
            println!("last {:.3} bound {bound:.3} ratio {:.4} origin {:.4} msgs/chunk/node {:.2} control {:.5} peak {} rows {} | {:.1} s",
                o.last_s, o.last_s / bound, o.origin_ratio, o.messages as f64 / (number(1) * number(2)) as f64, o.control_share(), o.peak_messages, o.peak_rows, started.elapsed().as_secs_f64());
        }
        "replay" => {
            let scenario = mixed(number(1), if args.get(2).is_some() { Mix::LARGE } else { Mix::SMALL });
            println!("{scenario:?}");
            let bound = scenario.bound_s();
            let o = World::new(scenario).run();
            println!("last {:.3} bound {bound:.3} ratio {:.4} again {:?} stall {:.2} | {:.1} s",
                o.last_s, o.origin_ratio, o.again, o.longest_stall_s, started.elapsed().as_secs_f64());
        }
        "seeds" => {
            let mut failed = 0;
            for seed in number(1)..number(2) {
                let t = Instant::now();
                let r = std::panic::catch_unwind(|| {
                    let o = World::new(mixed(seed, if args.get(3).is_some() { Mix::LARGE } else { Mix::SMALL })).run();
                    (o.last_s, o.origin_ratio, o.again, o.longest_stall_s, o.took_s)
                });
                failed += u32::from(r.is_err());
                if let Ok(r) = r { if t.elapsed().as_secs_f64() > 1.0 { println!("seed {seed}: {r:?} {:.2} s", t.elapsed().as_secs_f64()); } }
            }
            println!("{failed} failed, {:.1} s", started.elapsed().as_secs_f64());
        }
        _ => {}
    }
    ExitCode::SUCCESS
}
