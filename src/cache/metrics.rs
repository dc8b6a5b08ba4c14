//! What the cache counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::swarm;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ZoneLabel {
    zone: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabel {
    answer: &'static str,
}

/// Counters and gauges of the cache; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    peer_received_bytes: Family<ZoneLabel, Counter>,
    peer_sent_bytes: Family<ZoneLabel, Counter>,
    pub(super) verification_failures: Counter,
    pub(super) messages_dropped: Counter,
    pub(super) flows: Gauge,
    pub(super) open_contents: Gauge,
    pub(super) commands_queued: Gauge,
    swarm: Family<KindLabel, Gauge>,
    /// Offers of other nodes that are being taken; bounded.
    pub(super) takings: Gauge,
    offers: Family<AnswerLabel, Counter>,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let this = Self::default();
        let m = this.clone();
        registry.register(
            "peer_received_bytes",
            "Chunk bytes received from peers, by their zone",
            m.peer_received_bytes,
        );
        registry.register("peer_sent_bytes", "Chunk bytes sent to peers, by their zone", m.peer_sent_bytes);
        registry.register(
            "verification_failures",
            "Contents whose whole digest did not match and that were fetched again from the origin",
            m.verification_failures,
        );
        registry.register(
            "claim_messages_dropped",
            "Claim messages not sent because the peer's queue was full or it is unknown",
            m.messages_dropped,
        );
        registry.register("flows", "Chunk transfers under way to this node", m.flows);
        registry.register("contents_open", "Contents somebody on this node has open", m.open_contents);
        registry.register(
            "engine_queue",
            "Commands waiting for the engine; it is bounded",
            m.commands_queued,
        );
        registry.register("takings", "Contents being taken that other nodes offered; at most 256", m.takings);
        registry.register("offers", "Offers of contents by other nodes, by the answer they got", m.offers);
        registry.register("swarm", "State and counters of the swarm's decisions, by kind", m.swarm);
        this
    }

    pub fn received_from_peer(&self, zone: &str, bytes: u64) {
        self.peer_received_bytes.get_or_create(&ZoneLabel { zone: zone.to_owned() }).inc_by(bytes);
    }

    pub(super) fn count_offer(&self, answer: &'static str) {
        self.offers.get_or_create(&AnswerLabel { answer }).inc();
    }

    pub(super) fn export(&self, stats: &swarm::Stats, flows: usize, open: usize, queued: usize) {
        let gauge = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        self.flows.set(gauge(flows));
        self.open_contents.set(gauge(open));
        self.commands_queued.set(gauge(queued));
        for (kind, value) in counts(stats) {
            self.swarm.get_or_create(&KindLabel { kind }).set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    }

    pub fn sent_to_peer(&self, zone: &str, bytes: u64) {
        self.peer_sent_bytes.get_or_create(&ZoneLabel { zone: zone.to_owned() }).inc_by(bytes);
    }
}

const fn counts(s: &swarm::Stats) -> [(&'static str, u64); 24] {
    [
        ("peer_flows", s.peer_flows),
        ("follow_ons", s.follow_ons),
        ("leased_flows", s.leased_flows),
        ("last_resort_flows", s.last_resort_flows),
        ("failed_flows", s.failed_flows),
        ("wants", s.wants),
        ("want_timeouts", s.want_timeouts),
        ("leases_granted", s.leases_granted),
        ("leases_stolen", s.leases_stolen),
        ("redirects", s.redirects),
        ("takeovers", s.takeovers),
        ("uploads_refused", s.uploads_refused),
        ("uploads_early", s.uploads_early),
        ("messages_ignored", s.messages_ignored),
        ("home_stripes", s.home_stripes),
        ("home_rows", s.home_rows),
        ("leases", s.leases),
        ("waiting", s.waiting),
        ("contents", s.contents),
        ("flows", s.flows),
        ("inflight_bytes", s.inflight_bytes),
        ("queued_assignments", s.queued_assignments),
        ("uploads", s.uploads),
        ("announcements_pending", s.announcements_pending),
    ]
}
