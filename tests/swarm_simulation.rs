//! The shipped swarm in virtual time: every node finishes, and the origin sends each byte once.
//!
//! What a run is checked for at every moment is in `swarm_simulation/invariants.rs`. This file holds what fits into a
//! minute; `benches/swarm.rs` runs the same world at 2,000 nodes and over many thousand seeds.

mod swarm_simulation;

use swarm_simulation::{Fault, Mix, Outcome, Scenario, World, mixed};

fn main() {}
