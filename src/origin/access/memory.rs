//! What is remembered of one caller and one thing, and what that means at a moment: no clock, no I/O.

use std::time::Duration;

use tokio::time::Instant;

use crate::origin::OriginError;

/// The latest permission and the latest refusal; a refusal ends the permission before it.
#[derive(Debug)]
pub(super) struct Memory<V> {
    permit: Option<(Instant, V)>,
    refusal: Option<(Instant, OriginError)>,
}

impl<V> Default for Memory<V> {
    fn default() -> Self {
        Self { permit: None, refusal: None }
    }
}

/// What the memory says.
#[derive(Debug)]
pub(super) enum Judgement<V> {
    Permitted(V),
    Refused(OriginError),
    /// Nothing that still counts.
    Ask,
}

impl<V: Clone> Memory<V> {
    pub(super) fn judge(&self, now: Instant, permit_ttl: Duration, refusal_ttl: Duration) -> Judgement<V> {
        let counts = |at: Instant, ttl| now.saturating_duration_since(at) < ttl;
        match (&self.permit, &self.refusal) {
            (Some((at, said)), _) if counts(*at, permit_ttl) => Judgement::Permitted(said.clone()),
            (_, Some((at, error))) if counts(*at, refusal_ttl) => Judgement::Refused(error.clone()),
            _ => Judgement::Ask,
        }
    }

    pub(super) fn permit(&mut self, now: Instant, said: V) {
        *self = Self { permit: Some((now, said)), refusal: None };
    }

    pub(super) fn refuse(&mut self, now: Instant, error: OriginError) {
        *self = Self { permit: None, refusal: Some((now, error)) };
    }

    /// What was permitted at most `grace` ago, for when nobody can be asked.
    pub(super) fn known(&self, now: Instant, grace: Duration) -> Option<V> {
        let (at, said) = self.permit.as_ref()?;
        (now.saturating_duration_since(*at) < grace).then(|| said.clone())
    }
}
