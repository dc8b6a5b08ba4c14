//! windlass fetches each byte of a container image or model checkpoint out of the registry or S3 once per cluster.
//!
//! The crate is built in floors; a module imports only from floors below, and `tests/floors.rs` fails on one that
//! does not. `ARCHITECTURE.md` draws the house.

// floor 0: pure
pub mod content;
pub mod oci;
pub mod swarm;
pub mod wire;
// floor 1: leaf I/O
pub mod containerd;
pub mod origin;
pub mod store;
pub mod transport;
// floor 2: engine
pub mod cache;
pub mod gossip;
// floor 3: faces
pub mod fetch;
pub mod http;
pub mod provider;
// floor 4: assembly
pub mod cli;
pub mod config;
pub mod daemon;
pub mod telemetry;
