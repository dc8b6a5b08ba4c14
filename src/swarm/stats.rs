//! What the machine counts, for the engine to export.

/// Counters since the start, and gauges of now. Plain numbers: floor 0 knows no metrics library.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Flows started from peers.
    pub peer_flows: u64,
    /// Of these, follow-ons: taken from the source of the chunk before without asking the home.
    pub follow_ons: u64,
    /// Flows started from the origin with a lease.
    pub leased_flows: u64,
    /// Flows started from the origin without one, all deadlines having passed.
    pub last_resort_flows: u64,
    /// Flows that failed or were abandoned for being slow.
    pub failed_flows: u64,
    /// `Want` messages sent, those to this node itself included.
    pub wants: u64,
    /// Wants that no home answered in time.
    pub want_timeouts: u64,
    /// Leases granted as a home.
    pub leases_granted: u64,
    /// Leases taken from the slow or dead.
    pub leases_stolen: u64,
    /// Requesters sent to another home.
    pub redirects: u64,
    /// Stripes taken over after asking previous homes.
    pub takeovers: u64,
    /// Upload requests refused as busy.
    pub uploads_refused: u64,
    /// Upload requests for a chunk that was assigned to this node and had not begun to arrive.
    pub uploads_early: u64,
    /// Messages that were dropped as meaningless or over a bound.
    pub messages_ignored: u64,

    /// Gauge: stripes this node is home of and knows something about.
    pub home_stripes: u64,
    /// Gauge: rows in those stripes' tables.
    pub home_rows: u64,
    /// Gauge: leases granted and not ended.
    pub leases: u64,
    /// Gauge: requesters waiting for an answer, over all stripes.
    pub waiting: u64,
    /// Gauge: contents known here, stored or open.
    pub contents: u64,
    /// Gauge: flows in the air.
    pub flows: u64,
    /// Gauge: bytes that flows in the air may occupy.
    pub inflight_bytes: u64,
    /// Gauge: assignments taken in that wait for room.
    pub queued_assignments: u64,
    /// Gauge: uploads being served.
    pub uploads: u64,
    /// Gauge: stripes waiting to be announced to a new home.
    pub announcements_pending: u64,
}
