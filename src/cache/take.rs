//! Takes what another node offers: because it leaves, or because it was told to warm this one.
//!
//! Invariant: only free room is given away: nothing is evicted for it, and what was accepted and has not come yet counts as
//! taken. An offer names no address and no origin; its chunks come from peers, by the swarm's ordinary rules, or not at
//! all. Refuses to trust the offer: chunks are checked against their attestation, and a content that becomes whole
//! against its name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Cache;
use super::open::Open;
use super::parting::send;
use super::shared::Shared;
use crate::content::{ChunkSet, ContentKey, Layout, NodeId};
use crate::wire::{Parting, Take, Took};

/// Offers taken at a time: sixteen leavers with all that each has on offer. More are refused, and made to others.
const TAKES_MAX: usize = 256;

/// Between two looks whether more has come.
const PAUSE: Duration = Duration::from_millis(100);

/// A taking of which nothing more has come for this long is over. Longer than the leaver's patience.
const IDLE: Duration = Duration::from_secs(15);

/// What was accepted and is still to come: bytes promised, by content. At most [`TAKES_MAX`].
pub(super) type Takings = Mutex<BTreeMap<ContentKey, u64>>;

/// Offers looked at by others than the driver at a time: whether the store has a content may cost a read of the disk.
pub(super) const JUDGED_MAX: usize = 16;

/// Counts while it lives.
struct Promise {
    shared: Arc<Shared>,
    key: ContentKey,
}

impl Promise {
    /// Nothing when there is no room for `bytes` more, or the content is promised already.
    fn make(shared: &Arc<Shared>, key: ContentKey, bytes: u64) -> Option<Self> {
        let mut takings = shared.takings.lock();
        let promised: u64 = takings.values().sum();
        let usage = shared.store.usage();
        let has_room =
            usage.stored_bytes.saturating_add(promised).saturating_add(bytes) <= usage.budget_bytes;
        if !has_room || takings.len() >= TAKES_MAX || takings.contains_key(&key) {
            return None;
        }
        takings.insert(key, bytes);
        shared.metrics.takings.set(i64::try_from(takings.len()).unwrap_or(i64::MAX));
        Some(Self { shared: Arc::clone(shared), key })
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        let mut takings = self.shared.takings.lock();
        takings.remove(&self.key);
        self.shared.metrics.takings.set(i64::try_from(takings.len()).unwrap_or(i64::MAX));
    }
}

/// What becomes of an offer.
enum Verdict {
    Refused,
    /// All of it is here, or on its way since an earlier offer.
    Known,
    Begin(Promise),
}

/// Has an offer answered, and an accepted one carried out, by a task of its own. One too many is dropped: it is made
/// again.
pub(super) fn answer(shared: &Arc<Shared>, from: NodeId, take: Take) {
    let Ok(permit) = Arc::clone(&shared.judging).try_acquire_owned() else {
        shared.metrics.messages_dropped.inc();
        return;
    };
    let cache = Cache { shared: Arc::clone(shared) };
    shared.tasks.spawn(async move {
        let begun = judge_and_say(&cache.shared, from, &take).await;
        drop(permit);
        if let Some((promise, missing)) = begun {
            let taken = cache.take(from, &take, &missing);
            cache.shared.shutdown.run_until_cancelled(taken).await;
            drop(promise);
        }
    });
}

async fn judge_and_say(shared: &Arc<Shared>, from: NodeId, take: &Take) -> Option<(Promise, ChunkSet)> {
    let key = take.content.key(take.chunk_bytes);
    let missing = missing(shared, key, take).await;
    let verdict = judge(shared, key, take, &missing);
    let accepted = !matches!(verdict, Verdict::Refused);
    shared.metrics.count_offer(if accepted { "accepted" } else { "refused" });
    send(shared, from, Parting::Took(Took { content: key, accepted, missing: missing.len() }));
    let Verdict::Begin(promise) = verdict else { return None };
    tracing::info!(content = %take.content, peer = %from, chunks = missing.len(), "takes what another node offers");
    Some((promise, missing))
}

async fn missing(shared: &Shared, key: ContentKey, take: &Take) -> ChunkSet {
    let store = shared.store.clone();
    let have = move || store.get(&key).map(|entry| entry.have()).unwrap_or_default();
    // What cannot be looked at counts as missing.
    let have = tokio::task::spawn_blocking(have).await.unwrap_or_default();
    let mut missing = ChunkSet::new();
    for (stripe, chunks) in &take.stripes {
        missing.insert_stripe(*stripe, chunks & !have.stripe(*stripe));
    }
    missing
}

fn judge(shared: &Arc<Shared>, key: ContentKey, take: &Take, missing: &ChunkSet) -> Verdict {
    if take.chunk_bytes != shared.config.chunk_bytes || shared.is_parting() {
        return Verdict::Refused;
    }
    let is_promised = || shared.takings.lock().contains_key(&key);
    if missing.is_empty() || is_promised() {
        return Verdict::Known;
    }
    let promise = Layout::new(take.size, take.chunk_bytes)
        .ok()
        .and_then(|layout| Promise::make(shared, key, missing.bytes(&layout)));
    match promise {
        Some(promise) => Verdict::Begin(promise),
        // The same offer, looked at side by side.
        None if is_promised() => Verdict::Known,
        None => Verdict::Refused,
    }
}

impl Cache {
    async fn take(&self, from: NodeId, take: &Take, missing: &ChunkSet) {
        let Ok(content) = self.open_with(&take.content, take.size, None).await else { return };
        let open = &content.open;
        if open.is_unstorable() {
            return;
        }
        let _demand = open.demand_chunks(missing.clone());
        let came = wait(open, from, missing).await;
        tracing::info!(content = %take.content, peer = %from, whole = came, "has taken what was offered");
    }
}

/// Waits until all of `missing` is here. `false` when it will not come.
async fn wait(open: &Open, from: NodeId, missing: &ChunkSet) -> bool {
    let mut moved = (Instant::now(), open.taken_in());
    loop {
        let have = open.have();
        if missing.iter().all(|chunk| have.contains(chunk)) {
            return true;
        }
        let taken_in = open.taken_in();
        if taken_in > moved.1 {
            moved = (Instant::now(), taken_in);
        }
        let is_gone = open.shared.address(from).is_none();
        if is_gone || open.is_unstorable() || moved.0.elapsed() > IDLE {
            return false;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
