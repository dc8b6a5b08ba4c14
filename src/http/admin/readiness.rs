//! Whether this node should get traffic, and if not, why.

use std::sync::Arc;

use parking_lot::Mutex;

/// What must hold before the node is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    ListenersBound,
    StoreOpen,
    /// The membership has heard from a peer, or has found that there is none.
    MembershipSynced,
}

impl Condition {
    const ALL: [Self; 3] = [Self::ListenersBound, Self::StoreOpen, Self::MembershipSynced];

    const fn as_str(self) -> &'static str {
        match self {
            Self::ListenersBound => "listeners to be bound",
            Self::StoreOpen => "the store to be opened",
            Self::MembershipSynced => "the membership to be in sync",
        }
    }
}

/// Starts with nothing met; the daemon reports each condition as it comes true.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    met: Vec<Condition>,
    is_stopping: bool,
}

impl Readiness {
    pub fn report(&self, condition: Condition) {
        let mut state = self.0.lock();
        if !state.met.contains(&condition) {
            state.met.push(condition);
        }
    }

    /// Not ready from now on: load balancers and pods should go elsewhere.
    pub fn report_stopping(&self) {
        self.0.lock().is_stopping = true;
    }

    /// What is still waited for; empty means ready.
    #[must_use]
    pub fn waiting_for(&self) -> Vec<&'static str> {
        let state = self.0.lock();
        if state.is_stopping {
            return vec!["its end: it is shutting down"];
        }
        Condition::ALL.into_iter().filter(|c| !state.met.contains(c)).map(Condition::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_only_while_every_condition_holds_and_nothing_stops() {
        let readiness = Readiness::default();
        readiness.report(Condition::ListenersBound);
        readiness.report(Condition::StoreOpen);
        assert_eq!(readiness.waiting_for(), ["the membership to be in sync"]);
        readiness.report(Condition::MembershipSynced);
        assert!(readiness.waiting_for().is_empty());
        readiness.report_stopping();
        assert_eq!(readiness.waiting_for().len(), 1);
    }
}
