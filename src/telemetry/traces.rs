//! Traces of pulls, when somebody collects them: a request, what it read, and the chunks that were fetched for it, each with
//! its source. OTLP over HTTP in JSON, which every collector takes on port 4318.
//!
//! The OpenTelemetry crates would be a tenth of this program for one message; this is that message. Invariant: a slow or
//! absent collector costs spans and nothing else: the queue is bounded, and what does not fit is counted.
//! This file refuses to make spans: they are `tracing`'s, with the target [`TARGET`].

use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use reqwest::Client;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;
use url::Url;

/// Target of the spans that are exported. Spelt out where they are made: lower floors do not see this one.
const TARGET: &str = "windlass::trace";

/// Spans that may wait: a second of a node that fetches 4 GB/s in chunks of 1 MiB.
const QUEUE_MAX: usize = 4_096;

/// Spans of one message: some 300 KiB of JSON.
const BATCH_MAX: usize = 512;

/// How long spans wait for company.
const INTERVAL: Duration = Duration::from_secs(1);

/// A collector stands beside us or in the cluster.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// Section `[traces]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TracesConfig {
    /// Where OTLP is taken over HTTP, such as `http://otel-collector.monitoring:4318`; `/v1/traces` is added. Empty traces
    /// nothing.
    pub endpoint: String,
}

/// The endpoint is none.
#[derive(Debug, thiserror::Error)]
#[error(
    "traces.endpoint: {0:?} is no address; write it like http://otel-collector:4318, or \"\" to trace nothing"
)]
pub struct EndpointError(String);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Of the process, as the subscriber is.
static SPANS: LazyLock<Family<OutcomeLabel, Counter>> = LazyLock::new(Family::default);

/// Registers what is counted here.
pub(super) fn register(registry: &mut Registry) {
    registry.register("trace_spans", "Spans of traces, by what became of them", SPANS.clone());
}

fn count(outcome: &'static str, spans: usize) {
    SPANS.get_or_create(&OutcomeLabel { outcome }).inc_by(spans as u64);
}

/// What makes spans into messages, and what sends them; nothing when nobody collects.
///
/// # Errors
/// [`EndpointError`]
pub(super) fn layer<S>(
    config: &TracesConfig,
) -> Result<Option<(impl Layer<S> + use<S>, Exporter)>, EndpointError>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    if config.endpoint.is_empty() {
        return Ok(None);
    }
    let refused = || EndpointError(config.endpoint.clone());
    let url = format!("{}/v1/traces", config.endpoint.trim_end_matches('/'));
    let url: Url = url.parse().map_err(|_| refused())?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(refused());
    }
    let client = Client::builder().timeout(CALL_DEADLINE).build().map_err(|_| refused())?;
    let (queue, inbox) = mpsc::channel(QUEUE_MAX);
    let is_ours = filter_fn(|metadata: &Metadata<'_>| metadata.target() == TARGET);
    Ok(Some((Recorder { queue }.with_filter(is_ours), Exporter { client, url, inbox })))
}

/// Turns spans that close into messages.
struct Recorder {
    queue: mpsc::Sender<Span>,
}

/// One span, open or closed.
#[derive(Clone, Debug)]
struct Span {
    trace: u128,
    id: u64,
    parent: Option<u64>,
    name: &'static str,
    began: SystemTime,
    ended: SystemTime,
    attributes: Vec<Value>,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let parent = span.parent().and_then(|parent| {
            let extensions = parent.extensions();
            extensions.get::<Span>().map(|parent| (parent.trace, parent.id))
        });
        let now = SystemTime::now();
        let mut made = Span {
            trace: parent.map_or_else(rand::random, |(trace, _)| trace),
            id: rand::random(),
            parent: parent.map(|(_, id)| id),
            name: span.name(),
            began: now,
            ended: now,
            attributes: Vec::new(),
        };
        attributes.record(&mut made);
        span.extensions_mut().insert(made);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(made) = span.extensions_mut().get_mut::<Span>()
        {
            values.record(made);
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let made = context.span(&id).and_then(|span| span.extensions_mut().remove::<Span>());
        if let Some(made) = made
            && self.queue.try_send(Span { ended: SystemTime::now(), ..made }).is_err()
        {
            count("dropped", 1);
        }
    }
}

impl Visit for Span {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.attributes.push(json!({ "key": field.name(), "value": { "intValue": value.to_string() } }));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.attributes.push(json!({ "key": field.name(), "value": { "stringValue": value } }));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

impl Span {
    fn message(&self) -> Value {
        let nanos = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
        json!({
            "traceId": format!("{:032x}", self.trace),
            "spanId": format!("{:016x}", self.id),
            "parentSpanId": self.parent.map(|id| format!("{id:016x}")).unwrap_or_default(),
            "name": self.name,
            // SERVER for what a client asked, INTERNAL for what that took.
            "kind": if self.parent.is_none() { 2 } else { 1 },
            "startTimeUnixNano": nanos(self.began),
            "endTimeUnixNano": nanos(self.ended),
            "attributes": self.attributes,
        })
    }
}

/// Sends what was recorded.
#[derive(Debug)]
pub struct Exporter {
    client: Client,
    url: Url,
    inbox: mpsc::Receiver<Span>,
}

impl Exporter {
    /// Sends until `stop`, and then what is left. `node` is where the spans are from.
    pub async fn run(mut self, node: String, stop: CancellationToken) {
        let mut is_stopping = false;
        while !is_stopping {
            is_stopping = stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await.is_none();
            while !self.inbox.is_empty() {
                let mut batch = Vec::with_capacity(BATCH_MAX);
                self.inbox.recv_many(&mut batch, BATCH_MAX).await;
                self.send(&node, &batch).await;
            }
        }
    }

    async fn send(&self, node: &str, batch: &[Span]) {
        let request = self.client.post(self.url.clone()).json(&message(node, batch));
        match request.send().await.and_then(reqwest::Response::error_for_status) {
            Ok(_) => count("exported", batch.len()),
            Err(error) => {
                count("failed", batch.len());
                tracing::debug!(%error, spans = batch.len(), "the collector of traces does not take them");
            }
        }
    }
}

fn message(node: &str, batch: &[Span]) -> Value {
    let text = |key: &str, value: &str| json!({ "key": key, "value": { "stringValue": value } });
    let about = [
        text("service.name", "windlass"),
        text("service.version", env!("CARGO_PKG_VERSION")),
        text("host.name", node),
    ];
    let spans: Vec<_> = batch.iter().map(Span::message).collect();
    json!({ "resourceSpans": [{
        "resource": { "attributes": about },
        "scopeSpans": [{ "scope": { "name": "windlass" }, "spans": spans }],
    }] })
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    fn recorded(act: impl FnOnce()) -> (Vec<Span>, Exporter) {
        let config = TracesConfig { endpoint: "http://127.0.0.1:9/".into() };
        let (layer, mut exporter) = layer(&config).expect("an address").expect("somebody collects");
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, act);
        let mut spans = Vec::new();
        while let Ok(span) = exporter.inbox.try_recv() {
            spans.push(span);
        }
        (spans, exporter)
    }

    #[test]
    fn a_chunk_hangs_under_its_read_and_that_under_its_request() {
        let (spans, exporter) = recorded(|| {
            let request = tracing::info_span!(target: "windlass::trace", "request", path = "/v2/a");
            let read = tracing::info_span!(target: "windlass::trace", parent: &request, "read", bytes = tracing::field::Empty);
            drop(request);
            drop(tracing::info_span!(target: "windlass::trace", parent: &read, "chunk", chunk = 3u32));
            drop(tracing::info_span!("not ours"));
            read.record("bytes", 7u64);
        });
        assert_eq!(exporter.url.as_str(), "http://127.0.0.1:9/v1/traces");
        let names: Vec<_> = spans.iter().map(|span| span.name).collect();
        assert_eq!(names, ["chunk", "read", "request"], "a parent closes after its children");
        assert!(spans.iter().all(|span| span.trace == spans[0].trace));
        assert_eq!((spans[0].parent, spans[1].parent), (Some(spans[1].id), Some(spans[2].id)));
        let sent = message("n1", &spans);
        let read = sent.pointer("/resourceSpans/0/scopeSpans/0/spans/1").expect("a span");
        assert_eq!(read["attributes"], json!([{ "key": "bytes", "value": { "intValue": "7" } }]));
        assert_eq!(read["traceId"].as_str().map(str::len), Some(32));
    }

    #[test]
    fn nothing_is_recorded_unless_somebody_collects() {
        type Any = tracing_subscriber::Registry;
        assert!(layer::<Any>(&TracesConfig::default()).expect("is off").is_none());
        let wrong = TracesConfig { endpoint: "otel:4318".into() };
        let error = layer::<Any>(&wrong).err().expect("no address").to_string();
        assert!(error.contains("traces.endpoint"), "{error}");
    }
}
