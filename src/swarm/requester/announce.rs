//! Tells homes what this node holds of stripes that nobody here is asking about: after a start, an eviction, and
//! when a home moved.
//!
//! Paced: a node with terabytes in its store that joins a cluster sends a few messages at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::content::{ContentKey, NodeId, StripeIndex};
use crate::swarm::core::Core;
use crate::swarm::timers::Timer;
use crate::swarm::view::{Change, StripeKey};
use crate::wire::{Announce, MAX_ANNOUNCED_STRIPES, Message};

/// Stripes announced at a time: 2 TiB of 8 MiB chunks take 80 ms.
const BATCH: usize = 512;
const BATCH_INTERVAL: Duration = Duration::from_millis(10);
/// Redirects followed for one stripe within one view.
const MAX_HOPS: u8 = 3;

#[derive(Debug, Default)]
pub(super) struct Announcer {
    /// Whom to tell, when a redirect said so; otherwise the home.
    pending: BTreeMap<StripeKey, Option<NodeId>>,
    /// Who was told, redirected how often.
    told: BTreeMap<StripeKey, (NodeId, u8)>,
}

impl Announcer {
    pub(super) fn announce(&mut self, core: &mut Core, key: StripeKey) {
        self.pending.insert(key, None);
        core.timers.set_by(Timer::Announce, core.now);
    }

    pub(super) fn redirect(&mut self, core: &mut Core, key: StripeKey, home: NodeId) {
        let Some((told, hops)) = self.told.get_mut(&key) else { return };
        if *told == home || *hops >= MAX_HOPS {
            return;
        }
        *hops += 1;
        self.pending.insert(key, Some(home));
        core.timers.set_by(Timer::Announce, core.now);
    }

    /// The home learnt it from a want.
    pub(super) fn is_known_to(&mut self, key: StripeKey, home: NodeId) {
        self.pending.remove(&key);
        self.told.insert(key, (home, 0));
    }

    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn on_view_change(
        &mut self,
        core: &mut Core,
        change: &Change,
        asked: impl Fn(&StripeKey) -> bool,
    ) {
        for (key, (told, hops)) in &mut self.told {
            *hops = 0;
            let lost = change.upheaval || change.gone.contains(told);
            let moved = lost
                || change.risen.iter().any(|node| *node == *told || core.view.outranks(*node, *told, *key));
            if moved && !asked(key) && (change.gone.contains(told) || core.view.home(*key) != *told) {
                self.pending.insert(*key, None);
            }
        }
        if !self.pending.is_empty() {
            core.timers.set_by(Timer::Announce, core.now);
        }
    }

    pub(super) fn send(&mut self, core: &mut Core, have: impl Fn(&StripeKey) -> u64) {
        if core.view.synced().is_none() {
            // The first membership will wake us.
            return;
        }
        let mut batches = BTreeMap::<(NodeId, ContentKey), Vec<(StripeIndex, u64)>>::new();
        for _ in 0..BATCH {
            let Some((key, target)) = self.pending.pop_first() else { break };
            let home = target.unwrap_or_else(|| core.view.home(key));
            let held = have(&key);
            batches.entry((home, key.content)).or_default().push((key.stripe, held));
            if held == 0 {
                self.told.remove(&key);
            } else {
                self.told.entry(key).and_modify(|told| told.0 = home).or_insert((home, 0));
            }
        }
        for ((home, content), stripes) in batches {
            debug_assert!(
                stripes.len() <= MAX_ANNOUNCED_STRIPES,
                "a batch is no longer than an announcement"
            );
            core.send(home, Message::Announce(Announce { content, stripes }));
        }
        if !self.pending.is_empty() {
            core.timers.set(Timer::Announce, core.now + BATCH_INTERVAL);
        }
    }
}
