//! What the daemon says about itself: logs on stderr, metrics for Prometheus, traces for who collects them.
//!
//! Invariant: nothing here can fail a transfer, and no log line or label carries a credential.

mod expose;
mod logs;
mod process;
mod traces;

pub use expose::{Figures, TEXT_FORMAT, encode, own, registry};
pub use logs::{Config, Format, InitError, init};
pub use traces::{EndpointError, Exporter, TracesConfig};
