//! The node's containerd: what its files tell it to do, and what it says over its socket.
//!
//! Invariant: what other people wrote in `certs.d` stays as it was, byte for byte; only what is between this module's
//! own marks is ever changed or removed.
//! This module refuses to judge: it reads, and it edits text when told. Sources of the formats: containerd's
//! `docs/hosts.md`, and its readers of both files.

pub mod config;
pub mod hosts;
pub mod roots;
pub mod socket;
