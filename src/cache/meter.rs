//! Tells the driver how far a flow is, often enough for leases to live by bytes and not more often.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::content::StripeIndex;
use crate::swarm::FlowId;

use super::driver::Command;

/// The swarm wants to hear at least this often while bytes arrive.
const INTERVAL: Duration = Duration::from_millis(100);

/// A report per so many bytes: 32 for a chunk of 8 MiB.
const STEP_BYTES: u32 = 256 << 10;

/// One flow's reports. Lossy: when the driver is behind, only later figures count.
pub(super) struct Meter {
    flow: FlowId,
    commands: mpsc::Sender<Command>,
    reported: u32,
    at: Instant,
}

impl Meter {
    pub(super) fn new(flow: FlowId, commands: mpsc::Sender<Command>) -> Self {
        Self { flow, commands, reported: 0, at: Instant::now() }
    }

    /// The source says what else it has. Lost when the driver is behind: then it only asks the home.
    pub(super) fn source_holds(&self, also: Vec<(StripeIndex, u64)>) {
        if !also.is_empty() {
            let _ = self.commands.try_send(Command::SourceHolds { flow: self.flow, also });
        }
    }

    /// Every byte is here: from now on the disk is waited for, not the source. Never lost.
    pub(super) async fn arrived(&mut self, bytes: u32) {
        // The driver being gone means shutdown.
        let _ = self.commands.send(Command::Progress { flow: self.flow, received: bytes }).await;
    }

    pub(super) fn received(&mut self, bytes: u32) {
        if bytes.saturating_sub(self.reported) < STEP_BYTES && self.at.elapsed() < INTERVAL {
            return;
        }
        self.reported = bytes;
        self.at = Instant::now();
        // A full inbox means that the driver will hear of later bytes instead.
        let _ = self.commands.try_send(Command::Progress { flow: self.flow, received: bytes });
    }
}
