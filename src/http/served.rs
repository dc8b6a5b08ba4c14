//! What the faces gave their clients: bytes by where this node got them, and how soon the first one went out.

use std::fmt::{self, Write as _};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::StatusCode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::cache::{ReadError, Reader, Sources};

/// Seconds to the first byte: a local read takes under a millisecond, a cold S3 range 100 ms, and 30 s is the
/// default deadline.
const FIRST_BYTE_BUCKETS: [f64; 10] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

/// Which face served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Face {
    Registry,
    Object,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Source {
    Local,
    Peers,
    Origin,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByteLabels {
    face: Face,
    source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FaceLabels {
    face: Face,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    face: Face,
    status: Class,
}

/// The first digit of a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Class(u16);

impl Class {
    fn of(status: StatusCode) -> Self {
        Self(status.as_u16() / 100)
    }
}

impl EncodeLabelValue for Class {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        write!(encoder, "{}xx", self.0)
    }
}

/// The families of all faces. Registered once, cloned into each face.
#[derive(Clone, Debug)]
pub struct Served {
    bytes: Family<ByteLabels, Counter>,
    first_byte: Family<FaceLabels, Histogram, fn() -> Histogram>,
    requests: Family<RequestLabels, Counter>,
}

impl Default for Served {
    fn default() -> Self {
        let first_byte = Family::new_with_constructor((|| Histogram::new(FIRST_BYTE_BUCKETS)) as fn() -> _);
        Self { bytes: Family::default(), first_byte, requests: Family::default() }
    }
}

impl Served {
    /// Registers `served_bytes{face,source}`, `first_byte_seconds{face}` and `requests{face,status}`.
    pub fn register(registry: &mut Registry) -> Self {
        let served = Self::default();
        registry.register("served_bytes", "Body bytes given to clients", served.bytes.clone());
        registry.register(
            "first_byte_seconds",
            "From the request to its first body byte in hand",
            served.first_byte.clone(),
        );
        registry.register("requests", "Requests of clients answered", served.requests.clone());
        served
    }

    /// Counts an answer, by the first digit of its status.
    pub fn request(&self, face: Face, status: StatusCode) {
        let class = Class::of(status);
        self.requests.get_or_create(&RequestLabels { face, status: class }).inc();
    }

    /// Counts how long a request waited for its first byte.
    pub fn first_byte(&self, face: Face, waited: Duration) {
        self.first_byte.get_or_create(&FaceLabels { face }).observe(waited.as_secs_f64());
    }

    /// Counts what `reader` gives out from now on.
    #[must_use]
    pub fn metered(&self, face: Face, reader: Reader) -> Metered {
        let counter = |source| self.bytes.get_or_create_owned(&ByteLabels { face, source });
        Metered {
            reader,
            counted: Sources::default(),
            local: counter(Source::Local),
            peers: counter(Source::Peers),
            origin: counter(Source::Origin),
        }
    }
}

/// A reader whose bytes are counted.
pub struct Metered {
    reader: Reader,
    counted: Sources,
    local: Counter,
    peers: Counter,
    origin: Counter,
}

impl Stream for Metered {
    type Item = Result<Bytes, ReadError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.reader.poll_next_unpin(cx);
        let now = self.reader.sources();
        self.local.inc_by(now.local - self.counted.local);
        self.peers.inc_by(now.peers - self.counted.peers);
        self.origin.inc_by(now.origin - self.counted.origin);
        self.counted = now;
        polled
    }
}
