//! What operators see of the peer network. Base units, bounded labels.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use prometheus_client::registry::{Registry, Unit};

/// Why a datagram of ours or theirs went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum DropReason {
    /// The daemon did not take what arrived fast enough.
    IncomingFull,
    /// There was no connection, and too many already waited for one.
    NotConnected,
    /// The connection refused it.
    Refused,
}

/// How a dial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum DialOutcome {
    Connected,
    /// Both sides dialled at once and the other's connection is used.
    Duplicate,
    Unreachable,
    NotAuthentic,
}

/// Why a connection that somebody made to us was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum RefusalReason {
    NotAuthentic,
    Limit,
    Duplicate,
    Ourselves,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct DropLabels {
    pub(super) reason: DropReason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct DialLabels {
    pub(super) outcome: DialOutcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RefusalLabels {
    pub(super) reason: RefusalReason,
}

/// Metrics of the QUIC transport.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) connections: Gauge,
    pub(super) dials: Family<DialLabels, Counter>,
    pub(super) refusals: Family<RefusalLabels, Counter>,
    pub(super) datagrams_dropped: Family<DropLabels, Counter>,
    pub(super) messages_refused: Counter,
    pub(super) messages_lost: Counter,
    pub(super) message_queue_bytes: Gauge,
    pub(super) incoming_queue: Gauge,
    pub(super) sent_bytes: Counter,
    pub(super) received_bytes: Counter,
    pub(super) sent_packets: Counter,
    pub(super) lost_packets: Counter,
    pub(super) certificate_expiry: Gauge,
    pub(super) certificate_refresh_failures: Counter,
}

impl Metrics {
    /// Registers every metric under `transport_`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("transport");
        let m = &metrics;
        registry.register("connections", "Open connections to peers", m.connections.clone());
        registry.register("dials", "Attempts to connect to a peer", m.dials.clone());
        registry.register("refusals", "Connections refused to others", m.refusals.clone());
        registry.register("datagrams_dropped", "Datagrams dropped on this node", m.datagrams_dropped.clone());
        registry.register(
            "messages_refused",
            "Messages refused because the queue to the peer was full",
            m.messages_refused.clone(),
        );
        registry.register(
            "messages_lost",
            "Queued messages given up because the peer could not be reached",
            m.messages_lost.clone(),
        );
        registry.register_with_unit(
            "message_queue",
            "Messages that wait for peers",
            Unit::Bytes,
            m.message_queue_bytes.clone(),
        );
        registry.register(
            "incoming_queue_length",
            "What has arrived and waits for the daemon",
            m.incoming_queue.clone(),
        );
        registry.register_with_unit("sent", "UDP payload sent to peers", Unit::Bytes, m.sent_bytes.clone());
        registry.register_with_unit(
            "received",
            "UDP payload received from peers",
            Unit::Bytes,
            m.received_bytes.clone(),
        );
        registry.register("sent_packets", "QUIC packets sent to peers", m.sent_packets.clone());
        registry.register("lost_packets", "QUIC packets that the network lost", m.lost_packets.clone());
        registry.register_with_unit(
            "certificate_expiry_timestamp",
            "When this node's certificate expires, since 1970",
            Unit::Seconds,
            m.certificate_expiry.clone(),
        );
        registry.register(
            "certificate_refresh_failures",
            "Changed certificate files that could not be used",
            m.certificate_refresh_failures.clone(),
        );
        metrics
    }

    pub(super) fn dialled(&self, outcome: DialOutcome) {
        self.dials.get_or_create(&DialLabels { outcome }).inc();
    }

    pub(super) fn refused(&self, reason: RefusalReason) {
        self.refusals.get_or_create(&RefusalLabels { reason }).inc();
    }

    pub(super) fn dropped(&self, reason: DropReason, count: usize) {
        if count > 0 {
            self.datagrams_dropped.get_or_create(&DropLabels { reason }).inc_by(count as u64);
        }
    }
}
