//! Who may read: what an origin said of a caller, remembered for a short while.
//!
//! Invariant: a caller is let in only where the origin let that very caller in, at most [`Config::permit_ttl_ms`] ago;
//! or, while the origin cannot be asked and the configuration says so, at most [`Config::outage_grace_ms`] ago. Callers
//! are told apart by a keyed hash of their credential, whose key dies with the process: no credential is kept here.
//! This module refuses to ask an origin, which its callers do, and to know what a credential looks like.

mod memory;
mod metrics;

use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::time::Instant;

pub use metrics::Metrics;

use self::memory::{Judgement, Memory};
use self::metrics::{MemoryMetrics, Outcome};
use super::OriginError;
use super::recent::Recent;

/// Proofs remembered in one memory: some hundred images of some tens of blobs, or a few checkpoints, each read by a few
/// callers; about 300 bytes each.
const REMEMBERED: usize = 8192;

/// Questions to origins at a time: more than one pull has, far fewer than a flood of invented credentials would send.
const ASKED_AT_A_TIME: usize = 32;

/// Whose right to read counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// This node's: whoever reaches the listener may read what the node's own credentials can.
    #[default]
    Node,
    /// Each caller's own: the origin is asked with the credential that the caller brought.
    Caller,
}

/// What happens to a caller whose right cannot be checked because the origin does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outage {
    #[default]
    Deny,
    /// Who was let in before is let in again, [`Config::outage_grace_ms`] long.
    AllowKnown,
}

/// `[access]`: how long an origin's word about a caller counts, wherever `access = "caller"`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How long a permission counts, milliseconds, and how long a token got for a caller is used again: one that the
    /// origin revokes is refused here twice this long later at the latest.
    pub permit_ttl_ms: u64,
    /// How long a refusal counts, milliseconds: what was just granted works this much later.
    pub refusal_ttl_ms: u64,
    /// Longest wait for the origin's word, milliseconds.
    pub check_timeout_ms: u64,
    /// What an origin that cannot be asked means.
    pub outage: Outage,
    /// With `allow-known`: how long after the last permission, milliseconds.
    pub outage_grace_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            // One question per blob and caller in half a minute: parallel ranges of a large layer ask once.
            permit_ttl_ms: 30_000,
            refusal_ttl_ms: 5_000,
            // Half of what a pull waits for its first byte, so that an answer can still be given.
            check_timeout_ms: 5_000,
            outage: Outage::Deny,
            outage_grace_ms: 3_600_000,
        }
    }
}

impl Config {
    /// How long a permission counts.
    #[must_use]
    pub const fn permit_ttl(&self) -> Duration {
        Duration::from_millis(self.permit_ttl_ms)
    }
}

/// One caller, as the keyed hash of what it showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallerId([u8; 32]);

/// Turns credentials into [`CallerId`]s. Its key is made at the start and nowhere written down.
pub struct Fingerprints {
    key: [u8; 32],
}

impl Default for Fingerprints {
    fn default() -> Self {
        Self { key: rand::random() }
    }
}

impl Fingerprints {
    /// The caller who shows `parts`. Each part's length is hashed too, so that no two lists run together.
    #[must_use]
    pub fn of(&self, parts: &[&[u8]]) -> CallerId {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        CallerId(*hasher.finalize().as_bytes())
    }
}

/// What one kind of origin said: by caller and by what the caller wants to read, with what the origin told of it.
pub struct Proofs<K, V> {
    config: Config,
    slots: Mutex<Recent<(CallerId, K), Slot<V>>>,
    asking: Semaphore,
    metrics: MemoryMetrics,
}

/// Locked while the origin is asked, so that one question is in the air for all who wait for its answer.
type Slot<V> = Arc<tokio::sync::Mutex<Memory<V>>>;

impl<K: Clone + Eq + Hash, V: Clone> Proofs<K, V> {
    /// An empty memory. `origin` names it in the metrics.
    #[must_use]
    pub fn new(config: &Config, origin: &'static str, metrics: &Metrics) -> Self {
        Self {
            config: config.clone(),
            slots: Mutex::new(Recent::new(REMEMBERED)),
            asking: Semaphore::new(ASKED_AT_A_TIME),
            metrics: metrics.memory(origin, REMEMBERED),
        }
    }

    /// What the origin said of `what` to `caller`: remembered, or asked for by `ask`. `fresh` shortens how long a
    /// permission counts, for answers that change by themselves, as a tag's.
    ///
    /// # Errors
    /// The origin's refusal ([`OriginError::Denied`], [`OriginError::NotFound`]), or why it could not be asked.
    pub async fn get<F>(
        &self,
        caller: CallerId,
        what: K,
        fresh: Option<Duration>,
        ask: impl FnOnce() -> F,
    ) -> Result<V, OriginError>
    where
        F: Future<Output = Result<V, OriginError>>,
    {
        self.get_at(Instant::now(), caller, what, fresh, ask).await
    }

    /// `now` is when the question came up: an answer counts from then on.
    async fn get_at<F>(
        &self,
        now: Instant,
        caller: CallerId,
        what: K,
        fresh: Option<Duration>,
        ask: impl FnOnce() -> F,
    ) -> Result<V, OriginError>
    where
        F: Future<Output = Result<V, OriginError>>,
    {
        let ttl = fresh.unwrap_or(Duration::MAX).min(self.config.permit_ttl());
        let slot = self.slot(caller, what);
        let mut memory = slot.lock().await;
        match memory.judge(now, ttl, Duration::from_millis(self.config.refusal_ttl_ms)) {
            Judgement::Permitted(said) => {
                self.metrics.count(Outcome::Remembered);
                Ok(said)
            }
            Judgement::Refused(error) => {
                self.metrics.count(Outcome::RememberedRefusal);
                Err(error)
            }
            Judgement::Ask => {
                let answer = self.ask(ask).await;
                self.settle(now, &mut memory, answer)
            }
        }
    }

    /// One question, within the time and the number of questions that are allowed.
    async fn ask<F>(&self, ask: impl FnOnce() -> F) -> Result<V, OriginError>
    where
        F: Future<Output = Result<V, OriginError>>,
    {
        let question = async {
            // Never closed, so there is always a permit in the end.
            let _permit = self.asking.acquire().await;
            ask().await
        };
        let timeout = Duration::from_millis(self.config.check_timeout_ms);
        tokio::time::timeout(timeout, question).await.unwrap_or_else(|_| {
            let reason = format!("it did not say within {timeout:?} whether the caller may read this");
            Err(OriginError::Failed { origin: self.metrics.origin().to_owned(), reason })
        })
    }

    /// Remembers an answer, and decides what no answer means.
    fn settle(
        &self,
        now: Instant,
        memory: &mut Memory<V>,
        answer: Result<V, OriginError>,
    ) -> Result<V, OriginError> {
        match answer {
            Ok(said) => {
                self.metrics.count(Outcome::Permitted);
                memory.permit(now, said.clone());
                Ok(said)
            }
            Err(error @ (OriginError::Denied { .. } | OriginError::NotFound { .. })) => {
                self.metrics.count(Outcome::Refused);
                memory.refuse(now, error.clone());
                Err(error)
            }
            Err(error) => {
                let grace = match self.config.outage {
                    Outage::Deny => Duration::ZERO,
                    Outage::AllowKnown => Duration::from_millis(self.config.outage_grace_ms),
                };
                let known = memory.known(now, grace);
                self.metrics.count(if known.is_some() { Outcome::Known } else { Outcome::Unknown });
                known.ok_or(error)
            }
        }
    }

    fn slot(&self, caller: CallerId, what: K) -> Slot<V> {
        let mut slots = self.slots.lock();
        let slot = slots.get_or_insert_with(&(caller, what), Slot::default);
        self.metrics.remembered(slots.len());
        slot
    }
}

#[cfg(test)]
mod tests;
