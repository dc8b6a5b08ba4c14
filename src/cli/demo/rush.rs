//! The moment the demo is about: every node wants everything at once.
//!
//! Invariant: all nodes start together, and a node's clock stops when its last byte is in its client's hands;
//! hashing files that were placed comes after the clocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;

use super::cluster::{Cluster, REGISTRY, wait_until_it_stands};
use super::generate::{Dataset, PREFIX};
use super::origin::Counts;
use super::process::Node;
use super::progress::{Board, Standing, say};
use super::pull::{fetch_checkpoint, pull_image, verify_file};
use super::report::{NodeReport, Report, ratio};
use crate::http::admin::view::Transfers;

/// How often the board is redrawn and the daemons are asked for their counters.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What came of it.
pub(super) struct Rush {
    nodes: Vec<NodeOutcome>,
    seconds: f64,
    faults: Vec<String>,
}

struct NodeOutcome {
    name: String,
    seconds: Option<f64>,
    moved: u64,
    transfers: Transfers,
}

/// One node's part while it runs.
#[derive(Default)]
struct Track {
    image: AtomicU64,
    checkpoint: AtomicU64,
    seconds: Mutex<Option<f64>>,
    transfers: Mutex<Transfers>,
}

impl Track {
    fn moved(&self) -> u64 {
        self.image.load(Ordering::Relaxed) + self.checkpoint.load(Ordering::Relaxed)
    }

    fn standing(&self) -> Standing {
        let transfers = self.transfers.lock();
        Standing {
            moved: self.moved(),
            from_peers: transfers.peer_received_bytes,
            from_origin: transfers.origin_bytes,
        }
    }
}

/// Waits until the cluster stands, then pulls and fetches on every node, and checks all that arrived.
///
/// # Errors
/// When the cluster does not come up. What goes wrong later is a fault in the result.
pub(super) async fn rush(cluster: &mut Cluster, dataset: &Arc<Dataset>) -> anyhow::Result<Rush> {
    let nodes = cluster.nodes();
    tokio::select! {
        standing = wait_until_it_stands(&nodes) => standing?,
        death = cluster.first_death() => return Err(death.into()),
    }
    let tracks: Vec<_> = nodes.iter().map(|_| Track::default()).collect();
    let board = Board::new(nodes.iter().map(|node| node.name.clone()).collect(), dataset.unique_bytes());
    let began = Instant::now();
    let pulls =
        join_all(nodes.iter().zip(&tracks).map(|(node, track)| one_node(node, track, dataset, began)));
    let mut faults = tokio::select! {
        results = pulls => results.into_iter().flatten().collect(),
        death = cluster.first_death() => vec![death.to_string()],
        never = watch(&nodes, &tracks, &board) => match never {},
    };
    let seconds = began.elapsed().as_secs_f64();
    look(&nodes, &tracks).await;
    board.finish(&tracks.iter().map(Track::standing).collect::<Vec<_>>());
    if faults.is_empty() {
        say("verifying the placed files");
        faults = verify(&nodes, dataset).await;
    }
    let outcomes = nodes.iter().zip(&tracks).map(|(node, track)| NodeOutcome {
        name: node.name.clone(),
        seconds: *track.seconds.lock(),
        moved: track.moved(),
        transfers: track.transfers.lock().clone(),
    });
    Ok(Rush { nodes: outcomes.collect(), seconds, faults })
}

/// The image through the mirror and the checkpoint through the control socket, side by side. Returns what was wrong.
async fn one_node(node: &Node, track: &Track, dataset: &Dataset, began: Instant) -> Vec<String> {
    let (socket, models_dir) = (node.control_socket(), node.models_dir());
    let (image, checkpoint) = tokio::join!(
        pull_image(node.addresses.registry, REGISTRY, &dataset.image, &track.image),
        fetch_checkpoint(&socket, &models_dir, &track.checkpoint),
    );
    let faults: Vec<_> = [image, checkpoint]
        .into_iter()
        .filter_map(|r| Some(format!("{}: {}", node.name, r.err()?)))
        .collect();
    if faults.is_empty() {
        *track.seconds.lock() = Some(began.elapsed().as_secs_f64());
    }
    faults
}

async fn watch(nodes: &[Node], tracks: &[Track], board: &Board) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        look(nodes, tracks).await;
        board.show(&tracks.iter().map(Track::standing).collect::<Vec<_>>());
    }
}

/// A daemon that does not answer keeps its last figures: only the shares shown depend on them.
async fn look(nodes: &[Node], tracks: &[Track]) {
    let stats = join_all(nodes.iter().map(Node::stats)).await;
    for (track, stats) in tracks.iter().zip(stats) {
        if let Some(stats) = stats {
            *track.transfers.lock() = stats.transfers;
        }
    }
}

/// Hashes every placed file on every core. Returns what was wrong.
async fn verify(nodes: &[Node], dataset: &Arc<Dataset>) -> Vec<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let files = nodes.iter().flat_map(|node| (0..dataset.checkpoint.len()).map(move |n| (node, n)));
    let checks = files.map(|(node, n)| {
        let (dataset, dir, name) = (dataset.clone(), node.models_dir(), node.name.clone());
        tokio::task::spawn_blocking(move || {
            let object = &dataset.checkpoint[n];
            let path = dir.join(object.name.trim_start_matches(PREFIX));
            verify_file(&path, object).err().map(|error| format!("{name}: {error}"))
        })
    });
    let results: Vec<_> = stream::iter(checks).buffer_unordered(cores).collect().await;
    results.into_iter().filter_map(|result| result.unwrap_or_else(|panic| Some(panic.to_string()))).collect()
}

impl Rush {
    /// With what the origin counted, and each daemon's peak memory.
    #[must_use]
    pub(super) fn report(
        self,
        dataset: &Dataset,
        chunk_bytes: u32,
        origin: Counts,
        memory: &[Option<u64>],
    ) -> Report {
        let unique_bytes = dataset.unique_bytes();
        let whole = self.nodes.iter().all(|node| node.moved == unique_bytes);
        let verified = whole && self.faults.is_empty();
        let mut faults = self.faults;
        if origin.bytes != unique_bytes {
            faults.push(format!(
                "the origin sent {} bytes for {unique_bytes}: it was asked {} times for {} chunks",
                origin.bytes,
                origin.content_requests,
                dataset.chunks(chunk_bytes)
            ));
        }
        Report {
            nodes: self.nodes.len(),
            unique_bytes,
            origin_bytes: origin.bytes,
            origin_ratio: ratio(origin.bytes, unique_bytes),
            chunks: dataset.chunks(chunk_bytes),
            origin_requests: origin.content_requests,
            origin_metadata_requests: origin.metadata_requests,
            seconds: self.seconds,
            verified,
            per_node: self.nodes.into_iter().zip(memory).map(|(node, rss)| node.report(*rss)).collect(),
            faults,
        }
    }
}

impl NodeOutcome {
    fn report(self, peak_rss_bytes: Option<u64>) -> NodeReport {
        let Transfers { origin_bytes, peer_received_bytes, .. } = self.transfers;
        NodeReport {
            name: self.name,
            seconds: self.seconds,
            bytes: self.moved,
            from_peers_bytes: peer_received_bytes,
            from_origin_bytes: origin_bytes,
            from_local_bytes: self.moved.saturating_sub(origin_bytes + peer_received_bytes),
            peak_rss_bytes,
        }
    }
}
