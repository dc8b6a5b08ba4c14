//! Events for people who look at pods: that pulls were served by peers, and that containerd does not use the mirror.
//!
//! Invariant: at most one event of each kind in ten minutes, whatever happens; one that cannot be written is said in the
//! log and forgotten. They are about this pod, so `create` on events in its own namespace is all that is needed.
//! This file refuses to count pulls: it reads what the daemon counts.

use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cli::canary::{Arrival, Canary};
use crate::cli::kubernetes::ApiServer;
use crate::http::admin::view::{Stats, Transfers};

/// Between two events of a kind: 2,000 nodes that have something to say all the time make 3 in a second.
const INTERVAL: Duration = Duration::from_secs(10 * 60);

/// Less than this from peers is a manifest, not a pull.
const WORTH_SAYING_BYTES: u64 = 1 << 20;

/// Between two canaries while none has arrived, and afterwards.
const CANARY_WHILE_MISSING: Duration = Duration::from_secs(60);
const CANARY_ONCE_SEEN: Duration = Duration::from_secs(60 * 60);

/// The API server keeps 1,024 bytes of a message.
const MESSAGE_CHARACTERS_MAX: usize = 900;

/// The pod that the events are about, as `NAMESPACE/NAME/UID`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PodName {
    namespace: String,
    name: String,
    uid: String,
}

impl std::str::FromStr for PodName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/').map(str::to_owned);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(namespace), Some(name), Some(uid), None)
                if ![&namespace, &name].contains(&&String::new()) =>
            {
                Ok(Self { namespace, name, uid })
            }
            _ => Err("write it as NAMESPACE/POD/UID".into()),
        }
    }
}

/// What is worth an event.
#[derive(Debug, Clone, PartialEq, Eq)]
enum News {
    /// Bytes since the last such event.
    ServedByPeers {
        from_peers: u64,
        from_origin: u64,
        to_clients: u64,
    },
    MirrorNotUsed(String),
}

/// Decides what is said when. Times count from the start.
#[derive(Debug, Default)]
struct Notebook {
    /// The daemon's counters at the last event, and at the last look.
    told: Transfers,
    seen: Transfers,
    told_of_peers: Option<Duration>,
    told_of_mirror: Option<Duration>,
}

impl Notebook {
    /// A pull is told of when it is over: when nothing came in since the last look.
    fn saw(&mut self, now: Duration, counters: &Transfers) -> Option<News> {
        if counters.served_bytes < self.seen.served_bytes || counters.origin_bytes < self.seen.origin_bytes {
            // The daemon started again.
            self.told = Transfers::default();
        }
        let is_quiet = *counters == self.seen;
        self.seen = counters.clone();
        let from_peers = counters.peer_received_bytes.saturating_sub(self.told.peer_received_bytes);
        if from_peers < WORTH_SAYING_BYTES || !is_quiet || !is_due(self.told_of_peers, now) {
            return None;
        }
        let from_origin = counters.origin_bytes.saturating_sub(self.told.origin_bytes);
        let to_clients = counters.served_bytes.saturating_sub(self.told.served_bytes);
        self.told = counters.clone();
        self.told_of_peers = Some(now);
        Some(News::ServedByPeers { from_peers, from_origin, to_clients })
    }

    fn heard(&mut self, now: Duration, arrival: &Arrival) -> Option<News> {
        let Arrival::Missing(why) = arrival else { return None };
        is_due(self.told_of_mirror, now).then(|| {
            self.told_of_mirror = Some(now);
            News::MirrorNotUsed(why.clone())
        })
    }
}

fn is_due(last: Option<Duration>, now: Duration) -> bool {
    last.is_none_or(|last| now >= last + INTERVAL)
}

/// Looks at the daemon and at containerd, and writes events.
#[derive(Debug)]
pub(super) struct Reporter {
    server: ApiServer,
    pod: PodName,
    canary: Canary,
    began: Instant,
    notebook: Notebook,
    next_canary: Duration,
}

impl Reporter {
    pub(super) fn new(server: ApiServer, pod: PodName, canary: Canary) -> Self {
        let next_canary = Duration::ZERO;
        Self { server, pod, canary, began: Instant::now(), notebook: Notebook::default(), next_canary }
    }

    /// One look, after the wiring was looked after; `answers` says whether the mirror does.
    pub(super) async fn look(&mut self, answers: bool) {
        if !answers {
            return;
        }
        let now = self.began.elapsed();
        // A daemon that does not answer here is the probes' business.
        if let Ok(stats) = self.canary.daemon.get::<Stats>("/v1/stats").await
            && let Some(news) = self.notebook.saw(now, &stats.transfers)
        {
            self.tell(&news).await;
        }
        if now >= self.next_canary {
            let arrival = self.canary.send().await;
            let pause = if arrival == Arrival::Came { CANARY_ONCE_SEEN } else { CANARY_WHILE_MISSING };
            self.next_canary = now + pause;
            if let Some(news) = self.notebook.heard(now, &arrival) {
                self.tell(&news).await;
            }
        }
    }

    async fn tell(&self, news: &News) {
        let event = event(&self.pod, news, SystemTime::now());
        let path = format!("/api/v1/namespaces/{}/events", self.pod.namespace);
        if let Err(error) = self.server.post(&path, &event).await {
            eprintln!("an event could not be written: {error}");
        }
    }
}

fn event(pod: &PodName, news: &News, now: SystemTime) -> Value {
    let now = humantime::format_rfc3339_seconds(now).to_string();
    let (kind, reason, message) = match news {
        News::ServedByPeers { from_peers, from_origin, to_clients } => {
            let [peers, origin, clients] =
                [from_peers, from_origin, to_clients].map(|bytes| ByteSize(*bytes));
            let text =
                format!("{peers} came from peers and {origin} from origins; clients were given {clients}");
            ("Normal", "PulledFromPeers", text)
        }
        News::MirrorNotUsed(why) => {
            let text = format!(
                "a pull did not arrive at the mirror, so images come from the registry ({why}); \
                 `kubectl exec` into this pod and run `windlass doctor`: it names the setting to change"
            );
            ("Warning", "MirrorNotUsed", text)
        }
    };
    let message: String = message.chars().take(MESSAGE_CHARACTERS_MAX).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": { "generateName": "windlass-", "namespace": pod.namespace },
        "involvedObject": {
            "apiVersion": "v1", "kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid,
        },
        "type": kind, "reason": reason, "message": message, "count": 1,
        "firstTimestamp": now, "lastTimestamp": now,
        "source": { "component": "windlass" },
        "reportingComponent": "windlass.dev/wire", "reportingInstance": pod.name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);
    const MIB: u64 = 1 << 20;

    fn counters(peers: u64, origin: u64, served: u64) -> Transfers {
        Transfers {
            peer_received_bytes: peers * MIB,
            origin_bytes: origin * MIB,
            served_bytes: served * MIB,
            ..Transfers::default()
        }
    }

    #[test]
    fn a_pull_is_told_of_once_when_it_is_over() {
        let mut notebook = Notebook::default();
        assert_eq!(notebook.saw(S, &counters(0, 0, 0)), None);
        assert_eq!(notebook.saw(5 * S, &counters(30, 0, 20)), None, "it goes on");
        let news = News::ServedByPeers { from_peers: 40 * MIB, from_origin: 0, to_clients: 40 * MIB };
        assert_eq!(notebook.saw(10 * S, &counters(40, 0, 40)), None);
        assert_eq!(notebook.saw(15 * S, &counters(40, 0, 40)), Some(news));
        assert_eq!(notebook.saw(20 * S, &counters(40, 0, 40)), None, "once");
        assert_eq!(notebook.saw(25 * S, &counters(50, 0, 50)), None);
        assert_eq!(notebook.saw(30 * S, &counters(50, 0, 50)), None, "not so soon");
        let news = News::ServedByPeers { from_peers: 10 * MIB, from_origin: 0, to_clients: 10 * MIB };
        assert_eq!(notebook.saw(15 * S + INTERVAL, &counters(50, 0, 50)), Some(news));
    }

    #[test]
    fn what_came_from_the_origin_alone_is_no_news_and_a_restart_starts_over() {
        let mut notebook = Notebook::default();
        for now in 1..9 {
            assert_eq!(notebook.saw(now * S, &counters(0, 90, 90)), None);
        }
        assert_eq!(notebook.saw(10 * S, &counters(3, 0, 3)), None);
        let news = News::ServedByPeers { from_peers: 3 * MIB, from_origin: 0, to_clients: 3 * MIB };
        assert_eq!(notebook.saw(11 * S, &counters(3, 0, 3)), Some(news));
    }

    #[test]
    fn a_missing_canary_is_told_of_every_ten_minutes() {
        let missing = Arrival::Missing("refused".into());
        let mut notebook = Notebook::default();
        assert_eq!(notebook.heard(S, &Arrival::Came), None);
        assert_eq!(notebook.heard(S, &Arrival::Unknown("no socket".into())), None);
        assert_eq!(notebook.heard(S, &missing), Some(News::MirrorNotUsed("refused".into())));
        assert_eq!(notebook.heard(60 * S, &missing), None);
        assert!(notebook.heard(S + INTERVAL, &missing).is_some());
    }

    #[test]
    fn an_event_is_about_the_pod() {
        let pod: PodName = "windlass/windlass-x1/8d2f".parse().expect("a pod");
        let made = event(&pod, &News::MirrorNotUsed("é".repeat(2_000)), SystemTime::UNIX_EPOCH);
        assert_eq!(made["involvedObject"]["uid"], "8d2f");
        assert_eq!(made["metadata"]["namespace"], made["involvedObject"]["namespace"]);
        assert_eq!(made["firstTimestamp"], "1970-01-01T00:00:00Z");
        assert_eq!(made["message"].as_str().expect("text").chars().count(), MESSAGE_CHARACTERS_MAX);
        assert!("windlass/pod".parse::<PodName>().is_err() && "//x".parse::<PodName>().is_err());
    }
}
