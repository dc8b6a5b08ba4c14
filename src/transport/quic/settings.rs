//! quinn, tuned. quinn's defaults reach half of what TCP with TLS does; these settings beat it
//! (`benches/transport`). Each number says why it is what it is.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, VarInt,
};
use serde::{Deserialize, Serialize};

use crate::transport::tls::{self, Identity};

/// Streams that a peer may have open towards us at once. A node asks one peer for a few chunks at a time; claims
/// and gossip use none.
const MAX_STREAMS: u32 = 256;

/// The smallest packet that every path must carry (RFC 9000, section 14).
const MIN_MTU: u16 = 1_200;

/// What an IP and UDP header cost at most on a jumbo path, in bytes: the offer to peers exceeds what we probe for.
const MTU_MARGIN: u16 = 20;

/// Long enough to be unguessable next to an address (RFC 9000, section 5.1).
const CONNECTION_ID_BYTES: usize = 8;

/// Datagrams waiting on either side, in bytes. Gossip sends a few per second; more is a burst worth losing.
const DATAGRAM_BUFFER_BYTES: usize = 256 << 10;

/// Handshakes that may wait for us to look at them, and the bytes they may hold: strangers cost memory here.
const MAX_WAITING_HANDSHAKES: usize = 1_024;
const WAITING_HANDSHAKE_BYTES: u64 = 16 << 20;

/// An acknowledgement per ten packets instead of two: less CPU on both ends, and 5 ms still is below what loss
/// detection waits for.
const ACK_EVERY_PACKETS: u32 = 10;
const MAX_ACK_DELAY: Duration = Duration::from_millis(5);

/// How peers talk to each other. The defaults are made for one cloud region: jumbo frames probed for, 25 to
/// 100 Gb/s, round trips of a millisecond or less.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// UDP address for peers. All traffic, in and out, uses this one port.
    pub listen: SocketAddr,
    /// Connections at once, both directions. Beyond it strangers are refused and dials fail; a cluster of 2,000
    /// nodes that all know each other needs 2,000.
    pub max_connections: u32,
    /// Longest time to reach a peer, milliseconds. Three handshake retransmissions inside a region; the origin is
    /// the next resort, so waiting longer costs more than it finds.
    pub connect_timeout_ms: u64,
    /// A connection without a sign of life for this long is lost, milliseconds.
    pub idle_timeout_ms: u64,
    /// A sign of life is sent after this long in silence, milliseconds. Three of them may be lost.
    pub keep_alive_ms: u64,
    /// A connection that nothing has used for this long is closed, milliseconds; the next use makes a new one.
    pub unused_close_ms: u64,
    /// Largest UDP payload to probe for, bytes. 8952 fits AWS's 9001-byte MTU over IPv4 and IPv6; a smaller path
    /// is found by probing and costs nothing. Lower it only for a network that lies.
    pub mtu_upper_bound: u16,
    /// What one stream may have in flight, bytes: a whole chunk of 8 MiB, which fills 60 Gb/s at 1 ms.
    pub stream_window_bytes: u32,
    /// What one peer may have in flight to us, bytes: the bound on memory per peer when our disk is slow.
    pub receive_window_bytes: u32,
    /// What we hold for one peer until it is acknowledged, bytes. More was not faster.
    pub send_window_bytes: u32,
    /// Bytes sent before the first acknowledgement. 1 MiB skips slow start inside a region; use 14720 (RFC 6928)
    /// when peers are reached over the internet.
    pub initial_window_bytes: u32,
    /// Kernel socket buffers, bytes each way; what the kernel gives (`net.core.rmem_max`) is taken.
    pub socket_buffer_bytes: u32,
    /// Messages that may wait for one peer. Together they are never more than 4 MiB.
    pub message_queue: usize,
    /// What has arrived and waits for the daemon to look at it. Beyond it datagrams are dropped, the rest waits.
    pub incoming_queue: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 5103)),
            max_connections: 4_096,
            connect_timeout_ms: 3_000,
            idle_timeout_ms: 10_000,
            keep_alive_ms: 3_000,
            unused_close_ms: 300_000,
            mtu_upper_bound: 8_952,
            stream_window_bytes: 8 << 20,
            receive_window_bytes: 32 << 20,
            send_window_bytes: 4 << 20,
            initial_window_bytes: 1 << 20,
            socket_buffer_bytes: 8 << 20,
            message_queue: 1_024,
            incoming_queue: 1_024,
        }
    }
}

impl Config {
    /// Names the first setting that cannot work.
    pub(super) fn check(&self) -> Result<(), String> {
        let least = |key: &str, value: u64, least: u64| match value {
            value if value < least => Err(format!("transport.{key} is {value}; it must be at least {least}")),
            _ => Ok(()),
        };
        least("max_connections", self.max_connections.into(), 1)?;
        least("connect_timeout_ms", self.connect_timeout_ms, 10)?;
        least("keep_alive_ms", self.keep_alive_ms, 10)?;
        // Or a single lost sign of life ends a connection.
        least("idle_timeout_ms", self.idle_timeout_ms, 2 * self.keep_alive_ms)?;
        least("unused_close_ms", self.unused_close_ms, 1_000)?;
        least("mtu_upper_bound", self.mtu_upper_bound.into(), MIN_MTU.into())?;
        // Two packets of the largest kind, or nothing moves at all.
        let two_packets = 2 * u64::from(self.mtu_upper_bound);
        least("stream_window_bytes", self.stream_window_bytes.into(), two_packets)?;
        least("receive_window_bytes", self.receive_window_bytes.into(), self.stream_window_bytes.into())?;
        least("send_window_bytes", self.send_window_bytes.into(), two_packets)?;
        least("initial_window_bytes", self.initial_window_bytes.into(), two_packets.min(14_720))?;
        least("message_queue", self.message_queue as u64, 1)?;
        least("incoming_queue", self.incoming_queue as u64, 1)
    }

    pub(super) const fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(super) const fn unused_close(&self) -> Duration {
        Duration::from_millis(self.unused_close_ms)
    }
}

/// What both directions of dialling share.
///
/// quinn's receive buffer is 64 times the payload size; 18 MB per endpoint at 8972.
pub(super) fn endpoint(config: &Config, identity: &Identity) -> Result<EndpointConfig, quinn::ConfigError> {
    let mut endpoint = EndpointConfig::new(Arc::new(ResetKey(identity.reset_seed())));
    // The default of 1472 is told to the peer and caps its packets, whatever MTU discovery finds.
    endpoint.max_udp_payload_size(config.mtu_upper_bound.saturating_add(MTU_MARGIN))?;
    endpoint.cid_generator(|| Box::new(RandomIds));
    Ok(endpoint)
}

pub(super) fn client(config: &Config, identity: &Arc<Identity>) -> Result<ClientConfig, String> {
    let tls = tls::client_config(identity).map_err(|e| e.to_string())?;
    let crypto = QuicClientConfig::try_from(tls).map_err(|e| e.to_string())?;
    let mut client = ClientConfig::new(Arc::new(crypto));
    client.transport_config(Arc::new(transport(config)?));
    Ok(client)
}

pub(super) fn server(config: &Config, identity: &Arc<Identity>) -> Result<ServerConfig, String> {
    let tls = tls::server_config(identity).map_err(|e| e.to_string())?;
    let crypto = QuicServerConfig::try_from(tls).map_err(|e| e.to_string())?;
    let mut server = ServerConfig::with_crypto(Arc::new(crypto));
    server
        .transport_config(Arc::new(transport(config)?))
        .max_incoming(MAX_WAITING_HANDSHAKES)
        .incoming_buffer_size_total(WAITING_HANDSHAKE_BYTES)
        // Pods do not change their address; a packet that claims so is not followed.
        .migration(false);
    Ok(server)
}

fn transport(config: &Config) -> Result<TransportConfig, String> {
    let idle = IdleTimeout::try_from(Duration::from_millis(config.idle_timeout_ms))
        .map_err(|e| format!("idle_timeout_ms: {e}"))?;
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(config.mtu_upper_bound);
    let mut cubic = CubicConfig::default();
    // Below one packet nothing would ever leave.
    cubic.initial_window(u64::from(config.initial_window_bytes).max(u64::from(config.mtu_upper_bound) * 2));
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(ACK_EVERY_PACKETS.into())
        .max_ack_delay(Some(MAX_ACK_DELAY))
        .reordering_threshold(ACK_EVERY_PACKETS.into());

    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        // The one stream of messages.
        .max_concurrent_uni_streams(VarInt::from_u32(1))
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(Duration::from_millis(config.keep_alive_ms)))
        .stream_receive_window(config.stream_window_bytes.into())
        .receive_window(config.receive_window_bytes.into())
        .send_window(config.send_window_bytes.into())
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_BYTES))
        .datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES)
        .min_mtu(MIN_MTU)
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(cubic))
        .ack_frequency_config(Some(acks));
    Ok(transport)
}

/// Connection ids without structure. quinn's own carry a mark of the process that made them, and packets without
/// the mark get no answer: a node that restarted could not tell its peers so.
struct RandomIds;

impl quinn::ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> quinn::ConnectionId {
        quinn::ConnectionId::new(&rand::random::<[u8; CONNECTION_ID_BYTES]>())
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Makes stateless reset tokens (RFC 9000, section 10.3.2) from a secret that outlives the process.
struct ResetKey([u8; 32]);

impl quinn::crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        let hash = blake3::keyed_hash(&self.0, data);
        signature_out.copy_from_slice(&hash.as_bytes()[..signature_out.len()]);
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), quinn::crypto::CryptoError> {
        // blake3::Hash compares in constant time.
        let given = <[u8; blake3::OUT_LEN]>::try_from(signature).map_err(|_| quinn::crypto::CryptoError)?;
        if blake3::keyed_hash(&self.0, data) == given { Ok(()) } else { Err(quinn::crypto::CryptoError) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_cannot_work_is_named() {
        assert_eq!(Config::default().check(), Ok(()));
        let silent = Config { keep_alive_ms: 6_000, ..Config::default() };
        assert_eq!(
            silent.check().unwrap_err(),
            "transport.idle_timeout_ms is 10000; it must be at least 12000"
        );
    }
}
