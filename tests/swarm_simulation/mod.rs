//! A cluster in virtual time: the shipped state machine on every node, a fluid model of the links between them.
//!
//! Shared by `tests/swarm_simulation.rs` and `benches/swarm.rs`. One scenario and one seed make one history; nothing
//! here reads a clock. What the model leaves out: CPU, disks, congestion control and packet loss inside a transfer.
//!
//! | file | what |
//! |---|---|
//! | `scenario` | what a run is made of, and what physics allows it |
//! | `world` | the loop: events in their order, and steps in which bytes move |
//! | `transfers` | a chunk's way from a source to a node |
//! | `links` | how links and the origin share their capacity |
//! | `views` | who knows whom: everybody at once, with a lag, or the shipped membership |
//! | `faults` | crashes, pauses, partitions, evictions, an origin that refuses |
//! | `invariants` | what must hold in every history, and what explains a second fetch |
//! | `mix` | a random history from a seed |
//! | `outcome` | what came of it |
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "simulated rates and small counts"
)]
#![allow(dead_code, unused_imports, reason = "the test and the bench use different parts")]

mod faults;
mod invariants;
mod links;
mod mix;
mod outcome;
mod scenario;
mod transfers;
mod views;
mod world;

pub(crate) use mix::{Mix, mixed};
pub(crate) use outcome::Outcome;
pub(crate) use scenario::{Blob, Fault, Pull, Scenario, Views};
pub(crate) use world::World;
