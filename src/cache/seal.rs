//! The last check: a content that is whole is compared with its name before anyone may call it done.
//!
//! Invariant: a content is sealed only when the whole matched its digest. When it does not match, some attested chunk
//! was a lie: every chunk is fetched again from the origin, past the swarm, and the attesters of those that differ are
//! named. Only when the origin's own bytes do not match either does a read fail.

use std::sync::Arc;

use futures_util::StreamExt;

use crate::content::{Attestation, ChunkIndex, ChunkSet, ContentId};
use crate::origin::OriginError;
use crate::store::{Entry, Expect, SealError};

use super::driver::Command;
use super::error::ReadError;
use super::open::{Open, Outcome};

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// The whole was compared with its name: what a reader needs.
    Verified,
    /// And that is durable.
    Sealed,
}

/// Waits until the content is verified or sealed, as long as bytes keep arriving. Returns at once for a content that the
/// disk has no room for: it passes through, and containerd checks the digest itself.
pub(super) async fn wait(open: &Open, until: Until) -> Result<(), ReadError> {
    let mut outcome = open.outcome();
    let failures = outcome.borrow().failures();
    let stall = open.shared.config.stall_timeout();
    loop {
        if open.is_unstorable() {
            return Ok(());
        }
        match &*outcome.borrow_and_update() {
            Outcome::Sealed => return Ok(()),
            Outcome::Verified(_) if until == Until::Verified => return Ok(()),
            Outcome::Failed(count, error) if *count > failures => return Err(error.clone()),
            Outcome::Failed(..) | Outcome::Pending(_) | Outcome::Verified(_) => {}
        }
        let before = open.progress();
        tokio::select! {
            changed = tokio::time::timeout(stall, outcome.changed()) => {
                if changed.is_err() && open.progress() == before {
                    return Err(ReadError::Stalled { content: open.id.to_string(), waited: stall });
                }
            }
            () = open.shared.shutdown.cancelled() => return Err(ReadError::Shutdown),
        }
    }
}

/// Seals `open` if it has become whole, in a task of the cache's.
pub(super) fn begin(open: &Arc<Open>) {
    if !open.begin_sealing() {
        return;
    }
    let open = Arc::clone(open);
    open.shared.tasks.clone().spawn(async move {
        let outcome = run(&open).await;
        if let Err(error) = &outcome {
            tracing::error!(content = %open.id, %error, "content not sealed");
        }
        open.end_sealing(outcome);
    });
}

/// `false` when it turned out not to be whole.
async fn run(open: &Arc<Open>) -> Result<bool, ReadError> {
    let Some(entry) = &open.entry else { return Ok(false) };
    let verified = entry.verify_whole().await.inspect(|()| open.verified());
    let sealed = match verified {
        Ok(()) => entry.seal().await,
        failed => failed,
    };
    match sealed {
        Ok(()) => Ok(true),
        Err(SealError::Mismatch { .. }) => {
            open.shared.metrics.verification_failures.inc();
            tracing::error!(content = %open.id, "whole digest does not match: fetching all of it again from the origin");
            replace(open, entry, ChunkSet::full(&open.layout)).await?;
            entry.seal().await.map(|()| true).map_err(|error| verdict(open, &error))
        }
        // A chunk was dropped: it is missing again, in demand again, and sealing begins again when it is back.
        Err(SealError::Corrupt(chunk)) => {
            dropped(open, ChunkSet::from_iter([chunk])).await;
            Ok(false)
        }
        Err(SealError::Incomplete { .. }) => Ok(false),
        Err(error) => Err(verdict(open, &error)),
    }
}

/// Fetches `chunks` again from the origin, past the swarm, and seals the content anew; who attested a chunk that differs
/// is named. For an object whose whole somebody else compared.
pub(super) async fn redo(open: &Arc<Open>, chunks: ChunkSet) -> Result<(), ReadError> {
    let Some(entry) = &open.entry else { return Ok(()) };
    open.shared.metrics.verification_failures.inc();
    replace(open, entry, chunks).await?;
    entry.seal().await.map_err(|error| verdict(open, &error))
}

/// Takes `chunks` out of the store: nobody is to have them.
pub(super) async fn discard(open: &Arc<Open>, chunks: ChunkSet) {
    if let Some(entry) = &open.entry {
        entry.remove(&chunks).await;
        dropped(open, chunks).await;
    }
}

async fn replace(open: &Arc<Open>, entry: &Arc<Entry>, chunks: ChunkSet) -> Result<(), ReadError> {
    open.set_quarantined(true);
    dropped(open, chunks.clone()).await;
    let replaced = refetch(open, entry, &chunks).await;
    open.set_quarantined(false);
    replaced
}

/// Tells the swarm what is no longer held.
async fn dropped(open: &Open, chunks: ChunkSet) {
    // The driver being gone means shutdown.
    let _ = open.shared.commands.send(Command::Dropped { key: open.key, chunks }).await;
}

fn verdict(open: &Open, error: &SealError) -> ReadError {
    match (&open.id, error) {
        (ContentId::Blob(digest), SealError::Mismatch { .. }) => {
            ReadError::Verification { content: open.id.to_string(), expected: digest.clone() }
        }
        _ => ReadError::Store { content: open.id.to_string(), reason: error.to_string() },
    }
}

/// Replaces `chunks` with the origin's bytes, one after the other: this is rare, and the origin has done nothing to
/// deserve a burst.
async fn refetch(open: &Arc<Open>, entry: &Arc<Entry>, chunks: &ChunkSet) -> Result<(), ReadError> {
    let claimed: Vec<_> = chunks.iter().map(|chunk| (chunk, entry.attestation(chunk))).collect();
    for (chunk, attested) in claimed {
        entry.remove(&ChunkSet::from_iter([chunk])).await;
        let body = open.source()?.read(open.layout.chunk_range(chunk)).await?;
        let pieces = body.collect::<Vec<_>>().await.into_iter().collect::<Result<Vec<_>, OriginError>>()?;
        let truth = entry
            .insert(chunk, pieces, Expect::Attest(open.shared.transport.local()))
            .await
            .map_err(|error| ReadError::Store { content: open.id.to_string(), reason: error.to_string() })?;
        accuse(open, chunk, attested, truth);
    }
    Ok(())
}

fn accuse(open: &Open, chunk: ChunkIndex, attested: Option<Attestation>, truth: Attestation) {
    let Some(lie) = attested.filter(|attested| attested.digest != truth.digest) else { return };
    let attester =
        open.shared.address(lie.attester).map_or_else(|| lie.attester.to_string(), |peer| peer.name);
    tracing::error!(content = %open.id, chunk = chunk.0, %attester, "this node attested a chunk that is not the origin's");
}
