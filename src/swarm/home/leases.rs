//! Leases live by bytes: who receives none, or far fewer than the others, loses the claim to another.

use std::time::Duration;

use super::stripe::{Lease, RowId, Stripe, bits};
use super::{Home, tell};
use crate::content::NodeId;
use crate::swarm::core::{Core, millis};
use crate::swarm::view::StripeKey;
use crate::wire::{Assignment, LEASE_ARRIVED, LeaseRef, Leases, Message, Source};

/// A lease may be taken this often for one chunk, each time after twice the patience: when the origin itself is
/// slow, moving the claim around only wastes its bytes.
const MAX_STEALS: u8 = 3;
/// Slower than the median by this factor is slow.
const SLOW_FACTOR: u64 = 4;

impl Home {
    pub(crate) fn on_leases(&mut self, core: &Core, from: NodeId, leases: &Leases) {
        let key = StripeKey { content: leases.content, stripe: leases.stripe };
        let Some(known) = self.stripes.get_mut(&key) else { return };
        let Some(id) = known.stripe.find(from) else { return };
        for progress in &leases.progress {
            if let Some(lease) = &mut known.stripe.chunk_mut(progress.bit).lease
                && lease.row == id
                && (progress.received > lease.received || progress.received == LEASE_ARRIVED)
            {
                lease.received = progress.received;
                lease.grew = core.now;
            }
        }
    }

    /// Takes leases from the slow and gives them to somebody who wants the chunk.
    pub(super) fn watch_leases(&mut self, core: &mut Core, key: StripeKey) {
        let median = self.median_rate(core, key);
        let Some(known) = self.stripes.get_mut(&key) else { return };
        for bit in bits(known.stripe.leased) {
            let Some(lease) = &mut known.stripe.chunk_mut(bit).lease else { continue };
            if !is_overdue(lease, core, median) {
                continue;
            }
            let (lessee, steals) = (lease.row, lease.steals);
            let Some(thief) = thief(&known.stripe, core, bit, lessee) else { continue };
            let loser = known.stripe.row(lessee).node;
            known.stripe.chunk_mut(bit).steals = steals + 1;
            known.stripe.begin_lease(bit, thief, core.now);
            known.stripe.update(thief, |row| row.want &= !(1 << bit));
            core.stats.leases_stolen += 1;
            tell(known, core, key, thief, vec![Assignment { bit, source: Source::Origin }]);
            let lease = LeaseRef { content: key.content, stripe: key.stripe, bit };
            core.send(loser, Message::Revoke(lease));
        }
    }

    /// Median of the rates in bytes a second of the content's leases that are old enough to have one.
    fn median_rate(&self, core: &Core, key: StripeKey) -> Option<u64> {
        let mut rates: Vec<u64> = self
            .stripes_of(key.content)
            .flat_map(|stripe| bits(stripe.leased).map(|bit| stripe.chunk(bit)))
            .filter_map(|chunk| chunk.lease.as_ref().and_then(|lease| rate(lease, core)))
            .collect();
        // Of two, nobody can say which is the odd one.
        if rates.len() < 3 {
            return None;
        }
        let middle = rates.len() / 2;
        Some(*rates.select_nth_unstable(middle).1)
    }
}

/// `None` for a lease too young to have one, and for one whose bytes are all here.
fn rate(lease: &Lease, core: &Core) -> Option<u64> {
    let age = core.now.since(lease.granted);
    (age >= millis(core.config.lease_slow_ms) && lease.received != LEASE_ARRIVED)
        .then(|| u64::from(lease.received) * 1_000 / u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

fn is_overdue(lease: &mut Lease, core: &Core, median: Option<u64>) -> bool {
    if lease.steals >= MAX_STEALS {
        return false;
    }
    let patience = |base: Duration| base * (1 << lease.steals);
    if core.now.since(lease.grew) >= patience(millis(core.config.lease_stall_ms)) {
        return true;
    }
    let slow =
        matches!((rate(lease, core), median), (Some(rate), Some(median)) if rate * SLOW_FACTOR < median);
    if !slow {
        lease.slow_since = None;
        return false;
    }
    let since = *lease.slow_since.get_or_insert(core.now);
    core.now.since(since) >= patience(millis(core.config.lease_slow_ms))
}

/// Somebody else who wants the chunk, or already gets the slow lessee's bytes; the one with the fewest leases.
fn thief(stripe: &Stripe, core: &Core, bit: u8, lessee: RowId) -> Option<RowId> {
    let loser = stripe.row(lessee).node;
    stripe
        .rows()
        .filter(|row| (row.want | row.pulling) >> bit & 1 == 1)
        .filter(|row| row.node != loser && core.view.is_prompt(row.node))
        .min_by_key(|row| (row.leased.count_ones(), row.node))
        .and_then(|row| stripe.find(row.node))
}
