//! A home's table of one stripe: who has, gets and wants which chunk, and from whom.
//!
//! Pure bookkeeping. Invariants: a row is a source of a chunk when it holds it, leases it, or pulls it from a known
//! parent; `serving` of a row is the number of pulls that name it as parent; at most one lease per chunk.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::by_bit::ByBit;
use crate::content::{ChunkDigest, NodeId, STRIPE_CHUNKS};
use crate::swarm::member::Member;
use crate::swarm::time::Time;
use crate::wire::TableRow;

/// A node that gets something and wants more speaks twice as often, at the least.
const SPEAKS: Duration = Duration::from_secs(1);

/// Position of a node's row in the table.
pub(super) type RowId = u32;

/// An assignment whose receipt the node has not confirmed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    /// The answer it was in.
    pub(super) number: u32,
    pub(super) bit: u8,
    pub(super) at: Time,
}

/// What a view says of a node, kept here because it is asked for with every source of every assignment.
#[derive(Clone, Debug, Default)]
pub(super) struct Standing {
    /// `None`: not a member, as far as this node knows.
    pub(super) member: Option<Member>,
    /// Fingerprint of its zone.
    pub(super) zone: u64,
    /// Its connection did not break.
    pub(super) reachable: bool,
    /// And it is not late either.
    pub(super) prompt: bool,
}

/// What the home knows of one node.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) node: NodeId,
    pub(super) standing: Standing,
    pub(super) have: u64,
    pub(super) want: u64,
    pub(super) urgent: u64,
    pub(super) pulling: u64,
    pub(super) leased: u64,
    pub(super) room: u8,
    pub(super) grants: u8,
    /// Number of the last answer.
    pub(super) answers: u32,
    pub(super) sent: Vec<Sent>,
    /// Number of its last want.
    pub(super) wants: u32,
    /// Pulls that have this node as their parent.
    pub(super) serving: u32,
    /// The same, chunk by chunk.
    children: ByBit<u32>,
    /// Whom it pulls from; unknown when this home learnt of the pull from a want.
    parents: ByBit<Option<RowId>>,
    /// Chunks that it is a source of.
    offered: u64,
    /// Not a source until then: it was busy or broken.
    pub(super) sour_until: Time,
    /// How often it was found broken since it last spoke.
    pub(super) breaks: u32,
    /// When it last spoke.
    pub(super) heard: Time,
}

impl Row {
    /// Whether it takes part in the stripe's distribution now.
    pub(super) const fn is_interested(&self) -> bool {
        self.want | self.pulling | self.leased != 0
    }

    /// Whether the chunk was assigned to it in an answer after that one.
    pub(super) fn is_unseen(&self, bit: u8, seen: u32) -> bool {
        self.sent.iter().any(|sent| sent.bit == bit && sent.number > seen)
    }
}

/// A claim with a clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lease {
    pub(super) row: RowId,
    pub(super) granted: Time,
    pub(super) received: u32,
    /// When `received` last grew.
    pub(super) grew: Time,
    /// Since when it has been far slower than the others.
    pub(super) slow_since: Option<Time>,
    /// How often this chunk's lease has been taken from somebody.
    pub(super) steals: u8,
}

#[derive(Debug, Default)]
pub(super) struct Chunk {
    pub(super) sources: Vec<RowId>,
    /// Rows that hold it whole.
    pub(super) holders: u32,
    /// Rows that pull it.
    pullers: BTreeSet<RowId>,
    pub(super) lease: Option<Lease>,
    pub(super) steals: u8,
    pub(super) digest: Option<ChunkDigest>,
}

/// Chunks for which no source had capacity when last tried, for each zone of those who asked.
#[derive(Debug, Default)]
pub(super) struct Saturated(Vec<(u64, u64)>);

impl Saturated {
    pub(super) fn for_zone(&self, zone: u64) -> u64 {
        self.0.iter().find(|(of, _)| *of == zone).map_or(0, |(_, chunks)| *chunks)
    }

    pub(super) fn mark(&mut self, zone: u64, bit: u8) {
        match self.0.iter_mut().find(|(of, _)| *of == zone) {
            Some((_, chunks)) => *chunks |= 1 << bit,
            None => self.0.push((zone, 1 << bit)),
        }
    }

    fn clear(&mut self, free: u64) {
        self.0.iter_mut().for_each(|(_, chunks)| *chunks &= !free);
    }
}

#[derive(Debug)]
pub(super) struct Stripe {
    rows: Vec<Option<Row>>,
    free: Vec<RowId>,
    index: BTreeMap<NodeId, RowId>,
    /// The epoch of the view that the rows' standings are from, and those of no epoch yet.
    judged: u64,
    unjudged: Vec<RowId>,
    chunks: Vec<Chunk>,
    interested: u16,
    /// Rows that want something and have room for it.
    pub(super) waiting: BTreeSet<RowId>,
    pub(super) saturated: Saturated,
    /// Chunks with a lease.
    pub(super) leased: u64,
    held: u64,
    /// Chunks that exactly one row holds.
    sole: u64,
}

impl Stripe {
    pub(super) fn new() -> Self {
        Self {
            rows: Vec::new(),
            free: Vec::new(),
            index: BTreeMap::new(),
            judged: 0,
            unjudged: Vec::new(),
            chunks: (0..STRIPE_CHUNKS).map(|_| Chunk::default()).collect(),
            interested: 0,
            waiting: BTreeSet::new(),
            saturated: Saturated::default(),
            leased: 0,
            held: 0,
            sole: 0,
        }
    }

    /// The same table without claims, transfers and wants: who holds what, and what the chunks are.
    pub(super) fn held_only(&self) -> Self {
        let mut held = Self::new();
        for (chunk, before) in held.chunks.iter_mut().zip(&self.chunks) {
            chunk.digest = before.digest;
        }
        for row in self.rows().filter(|row| row.have != 0) {
            let id = held.ensure(row.node);
            held.set_have(id, row.have);
        }
        held
    }

    /// Chunks that none of those who take part holds whole: whoever gets one now gets it at the pace at which it comes
    /// from the origin, or from an idle node that alone has it.
    pub(super) fn frontier(&self) -> u64 {
        if self.sole == 0 {
            return !self.held;
        }
        let idle = |bit: &u8| self.holder(*bit).is_some_and(|row| !row.is_interested());
        !self.held | bits(self.sole).filter(idle).fold(0, |sole, bit| sole | 1 << bit)
    }

    /// One that holds the chunk whole.
    fn holder(&self, bit: u8) -> Option<&Row> {
        let mut sources = self.chunk(bit).sources.iter().map(|id| self.row(*id));
        sources.find(|row| row.have >> bit & 1 == 1)
    }

    /// Pulls of this chunk from that node.
    pub(super) fn children(&self, bit: u8, parent: RowId) -> u32 {
        self.row(parent).children.get(bit).unwrap_or(0)
    }

    pub(super) fn chunk(&self, bit: u8) -> &Chunk {
        &self.chunks[usize::from(bit)]
    }

    pub(super) fn chunk_mut(&mut self, bit: u8) -> &mut Chunk {
        &mut self.chunks[usize::from(bit)]
    }

    /// Whether the bytes that `source` passes on come from somewhere: a holder or a lessee, over reachable nodes, and not
    /// over `child`, which would close a circle.
    pub(super) fn is_fed(&self, bit: u8, source: RowId, child: RowId) -> bool {
        let mut id = source;
        // The books hold no circle; the bound makes the loop's end independent of that.
        for _ in 0..=self.rows.len() {
            let row = self.row(id);
            if id == child || !row.standing.reachable {
                return false;
            }
            if (row.have | row.leased) >> bit & 1 == 1 {
                return true;
            }
            let Some(Some(parent)) = row.parents.get(bit) else { return false };
            id = parent;
        }
        false
    }

    /// Whether somebody else in the zone of `child`, who has spoken lately, is getting the chunk from one that has it.
    pub(super) fn is_crossing(&self, bit: u8, child: RowId, now: Time) -> bool {
        let zone = self.row(child).standing.zone;
        let brings = |id: RowId| {
            let row = self.row(id);
            let speaks = row.standing.prompt && now.since(row.heard) < SPEAKS;
            row.standing.zone == zone && speaks && self.is_fed(bit, id, child)
        };
        let chunk = self.chunk(bit);
        let lessee = chunk.lease.map(|lease| lease.row);
        lessee.into_iter().chain(chunk.pullers.iter().copied()).any(brings)
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// Nodes that want or get something of the stripe.
    pub(super) const fn interested(&self) -> u16 {
        self.interested
    }

    pub(super) fn find(&self, node: NodeId) -> Option<RowId> {
        self.index.get(&node).copied()
    }

    /// # Panics
    /// When `id` is not of this table.
    pub(super) fn row(&self, id: RowId) -> &Row {
        self.rows[id as usize]
            .as_ref()
            .expect("row ids are handed out by this table and dropped with their row")
    }

    /// # Panics
    /// When `id` is not of this table.
    pub(super) fn row_mut(&mut self, id: RowId) -> &mut Row {
        self.rows[id as usize]
            .as_mut()
            .expect("row ids are handed out by this table and dropped with their row")
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().flatten()
    }

    pub(super) fn ensure(&mut self, node: NodeId) -> RowId {
        if let Some(id) = self.find(node) {
            return id;
        }
        let row = Row {
            node,
            standing: Standing::default(),
            have: 0,
            want: 0,
            urgent: 0,
            pulling: 0,
            leased: 0,
            room: 0,
            grants: 0,
            answers: 0,
            sent: Vec::new(),
            wants: 0,
            serving: 0,
            children: ByBit::default(),
            parents: ByBit::default(),
            offered: 0,
            sour_until: Time::default(),
            breaks: 0,
            heard: Time::default(),
        };
        let id = if let Some(id) = self.free.pop() {
            self.rows[id as usize] = Some(row);
            id
        } else {
            self.rows.push(Some(row));
            RowId::try_from(self.rows.len() - 1).unwrap_or(RowId::MAX)
        };
        self.index.insert(node, id);
        self.unjudged.push(id);
        id
    }

    /// Takes over what the view of that epoch says of the nodes.
    pub(super) fn judge(&mut self, epoch: u64, standing: impl Fn(NodeId) -> Standing) {
        if self.judged == epoch {
            for id in std::mem::take(&mut self.unjudged) {
                if let Some(row) = &mut self.rows[id as usize] {
                    row.standing = standing(row.node);
                }
            }
            return;
        }
        self.judged = epoch;
        self.unjudged.clear();
        // Who was out of reach may be a source now.
        self.saturated.clear(u64::MAX);
        for row in self.rows.iter_mut().flatten() {
            row.standing = standing(row.node);
        }
    }

    /// Forgets a node: its leases end, its pulls too, and those who pull from it lose their parent.
    pub(super) fn remove(&mut self, node: NodeId) {
        let Some(id) = self.find(node) else { return };
        self.interrupt(id);
        self.set_have(id, 0);
        self.update(id, |row| row.want = 0);
        for bit in bits(self.row(id).children.bits()) {
            let pullers = self.chunk(bit).pullers.iter().copied();
            let orphans = pullers.filter(|child| self.row(*child).parents.get(bit) == Some(Some(id)));
            for child in orphans.collect::<Vec<_>>() {
                self.row_mut(child).parents.set(bit, None);
            }
        }
        self.index.remove(&node);
        self.rows[id as usize] = None;
        self.free.push(id);
    }

    /// The node's transfers are over as far as one can tell: what it fetched may be fetched by others, and those it
    /// pulled from are free.
    pub(super) fn interrupt(&mut self, id: RowId) {
        for bit in bits(self.row(id).leased) {
            self.end_lease(bit);
        }
        self.end_pulls(id);
    }

    /// The node's pulls are over as far as one can tell. If not, its next want says so.
    pub(super) fn end_pulls(&mut self, id: RowId) {
        for bit in bits(self.row(id).pulling) {
            self.end_pull(bit, id);
        }
    }

    /// Ends the pulls of nodes that have not spoken for longer than they would have borne with a source that sends nothing.
    pub(super) fn end_silent_pulls(&mut self, now: Time, patience: Duration) {
        let is_silent = |id: &RowId| self.row(*id).pulling != 0 && now.since(self.row(*id).heard) > patience;
        let silent: Vec<RowId> = self.index.values().copied().filter(is_silent).collect();
        silent.into_iter().for_each(|id| self.end_pulls(id));
    }

    /// Changes a row and what is derived from it.
    pub(super) fn update(&mut self, id: RowId, change: impl FnOnce(&mut Row)) {
        let row = self.row_mut(id);
        let before = row.is_interested();
        change(row);
        let (after, waits) = (row.is_interested(), row.want != 0 && row.room > 0);
        self.interested = self.interested + u16::from(after) - u16::from(before);
        if waits {
            self.waiting.insert(id);
        } else {
            self.waiting.remove(&id);
        }
    }

    /// The node holds exactly these chunks.
    pub(super) fn set_have(&mut self, id: RowId, have: u64) {
        let before = self.row(id).have;
        for bit in bits(have & !before) {
            if self.row(id).pulling >> bit & 1 == 1 {
                self.end_pull(bit, id);
            }
            if self.chunk(bit).lease.is_some_and(|lease| lease.row == id) {
                self.end_lease(bit);
            }
            self.chunk_mut(bit).holders += 1;
            self.note_holders(bit);
            self.chunk_mut(bit).steals = 0;
            self.add_source(bit, id);
        }
        self.row_mut(id).have = have;
        for bit in bits(before & !have) {
            self.chunk_mut(bit).holders -= 1;
            self.note_holders(bit);
            self.drop_source_unless_active(bit, id);
        }
        self.saturated.clear(have & !before);
    }

    fn note_holders(&mut self, bit: u8) {
        let (mask, holders) = (1 << bit, self.chunk(bit).holders);
        self.held = if holders == 0 { self.held & !mask } else { self.held | mask };
        self.sole = if holders == 1 { self.sole | mask } else { self.sole & !mask };
    }

    /// `child` gets the chunk from `parent`; from an unknown one it is not offered to others, because that might
    /// close a circle.
    pub(super) fn begin_pull(&mut self, bit: u8, child: RowId, parent: Option<RowId>) {
        self.chunk_mut(bit).pullers.insert(child);
        self.update(child, |row| {
            row.pulling |= 1 << bit;
            row.parents.set(bit, parent);
        });
        if let Some(parent) = parent {
            let row = self.row_mut(parent);
            row.children.set(bit, row.children.get(bit).unwrap_or(0) + 1);
            row.serving += 1;
            self.add_source(bit, child);
            self.saturated.clear(1 << bit);
        }
    }

    /// `child` gets the chunk from another source than it was sent to: a whole copy, so that no circle can close.
    pub(super) fn move_pull(&mut self, bit: u8, child: RowId, source: NodeId) {
        let Some(parent) = self.find(source).filter(|id| self.row(*id).have >> bit & 1 == 1) else { return };
        if self.row(child).parents.get(bit).is_some() {
            self.end_pull(bit, child);
            self.begin_pull(bit, child, Some(parent));
        }
    }

    pub(super) fn end_pull(&mut self, bit: u8, child: RowId) {
        let Some(parent) = self.row_mut(child).parents.take(bit) else { return };
        self.chunk_mut(bit).pullers.remove(&child);
        self.update(child, |row| row.pulling &= !(1 << bit));
        if let Some(parent) = parent {
            let row = self.row_mut(parent);
            if let Some(others) = row.children.take(bit).filter(|count| *count > 1) {
                row.children.set(bit, others - 1);
            }
            row.serving = row.serving.saturating_sub(1);
            let serves = row.have | row.pulling | row.leased;
            self.saturated.clear(serves);
        }
        self.drop_source_unless_active(bit, child);
    }

    /// The node fetches the chunk from the origin. Replaces a previous lease.
    pub(super) fn begin_lease(&mut self, bit: u8, id: RowId, now: Time) {
        self.end_lease(bit);
        self.end_pull(bit, id);
        let steals = self.chunk(bit).steals;
        self.chunk_mut(bit).lease =
            Some(Lease { row: id, granted: now, received: 0, grew: now, slow_since: None, steals });
        self.leased |= 1 << bit;
        self.update(id, |row| row.leased |= 1 << bit);
        self.add_source(bit, id);
        self.saturated.clear(1 << bit);
    }

    /// Returns whether there was a lease.
    pub(super) fn end_lease(&mut self, bit: u8) -> bool {
        let Some(lease) = self.chunk_mut(bit).lease.take() else { return false };
        self.leased &= !(1 << bit);
        self.update(lease.row, |row| row.leased &= !(1 << bit));
        self.drop_source_unless_active(bit, lease.row);
        self.saturated.clear(1 << bit);
        true
    }

    /// The node said it cannot serve this chunk.
    pub(super) fn lacks(&mut self, bit: u8, node: NodeId) {
        let Some(id) = self.find(node) else { return };
        let have = self.row(id).have & !(1 << bit);
        self.set_have(id, have);
        self.drop_source(bit, id);
    }

    /// The node is only about to receive this chunk; it is a source again as soon as it says that it has begun. What it
    /// says that it holds by now is news, and this is not: the complaint was on its way, and a chunk that nobody holds
    /// would be fetched again.
    pub(super) fn has_not_begun(&mut self, bit: u8, node: NodeId) {
        let Some(id) = self.find(node) else { return };
        if self.row(id).have >> bit & 1 == 0 {
            self.drop_source(bit, id);
        }
    }

    /// The node was assigned the pull, but has no room for it yet: nobody can follow it.
    pub(super) fn postpone_pull(&mut self, bit: u8, child: RowId) {
        self.confirm_pull(bit, child);
        if (self.row(child).have | self.row(child).leased) >> bit & 1 == 0 {
            self.drop_source(bit, child);
        }
    }

    /// A lease of this table that the lessee has begun: it can be a parent again after it was found lacking.
    pub(super) fn confirm_lease(&mut self, bit: u8, id: RowId) {
        if self.chunk(bit).lease.is_some_and(|lease| lease.row == id) {
            self.add_source(bit, id);
        }
    }

    /// A pull of this table that the node confirms: it can be a parent again after it was found lacking.
    pub(super) fn confirm_pull(&mut self, bit: u8, child: RowId) {
        match self.row(child).parents.get(bit) {
            None => self.begin_pull(bit, child, None),
            Some(Some(_)) => self.add_source(bit, child),
            Some(None) => {}
        }
    }

    /// The table as it is told to another home.
    pub(super) fn export(&self) -> impl Iterator<Item = TableRow> + '_ {
        self.rows().map(|row| TableRow {
            node: row.node,
            have: row.have,
            pulling: row.pulling,
            leased: row.leased,
        })
    }

    fn add_source(&mut self, bit: u8, id: RowId) {
        let row = self.row_mut(id);
        if row.offered >> bit & 1 == 0 {
            row.offered |= 1 << bit;
            self.chunk_mut(bit).sources.push(id);
            self.saturated.clear(1 << bit);
        }
    }

    fn drop_source(&mut self, bit: u8, id: RowId) {
        let row = self.row_mut(id);
        if row.offered >> bit & 1 == 1 {
            row.offered &= !(1 << bit);
            self.chunk_mut(bit).sources.retain(|source| *source != id);
        }
    }

    fn drop_source_unless_active(&mut self, bit: u8, id: RowId) {
        let row = self.row(id);
        let holds = (row.have | row.leased) >> bit & 1 == 1;
        let pulls = matches!(row.parents.get(bit), Some(Some(_)));
        if !holds && !pulls {
            self.drop_source(bit, id);
        }
    }
}

/// Positions of the set bits, ascending.
pub(crate) fn bits(mut word: u64) -> impl Iterator<Item = u8> {
    std::iter::from_fn(move || {
        (word != 0).then(|| {
            #[expect(clippy::cast_possible_truncation, reason = "at most 63 for a word that is not zero")]
            let bit = word.trailing_zeros() as u8;
            word &= word - 1;
            bit
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reachable(_: NodeId) -> Standing {
        Standing { reachable: true, ..Standing::default() }
    }

    impl Stripe {
        fn check(&self) {
            let mut serving = BTreeMap::<RowId, u32>::new();
            for (bit, chunk) in (0u8..).zip(&self.chunks) {
                let holders = self.rows().filter(|row| row.have >> bit & 1 == 1).count();
                assert_eq!(chunk.holders as usize, holders);
                assert_eq!(self.held >> bit & 1 == 1, holders > 0);
                assert_eq!(self.sole >> bit & 1 == 1, holders == 1);
                let mut children = BTreeMap::<RowId, u32>::new();
                for row in self.rows() {
                    assert_eq!(row.parents.get(bit).is_some(), row.pulling >> bit & 1 == 1);
                    row.parents
                        .get(bit)
                        .flatten()
                        .into_iter()
                        .for_each(|id| *children.entry(id).or_default() += 1);
                }
                for source in &chunk.sources {
                    let row = self.row(*source);
                    assert_ne!((row.have | row.leased | row.pulling) >> bit & 1, 0);
                }
                for id in self.index.values() {
                    let pulls = self.row(*id).pulling >> bit & 1 == 1;
                    assert_eq!(chunk.pullers.contains(id), pulls);
                    assert_eq!(self.children(bit, *id), children.get(id).copied().unwrap_or(0));
                    let sources = chunk.sources.iter().filter(|source| *source == id).count();
                    assert_eq!(sources, usize::from(self.row(*id).offered >> bit & 1 == 1));
                    *serving.entry(*id).or_default() += self.children(bit, *id);
                }
                assert_eq!(self.leased >> bit & 1 == 1, chunk.lease.is_some());
            }
            for (node, id) in &self.index {
                let row = self.row(*id);
                assert_eq!(row.node, *node);
                assert_eq!(row.serving, serving.get(id).copied().unwrap_or(0));
            }
            assert_eq!(usize::from(self.interested), self.rows().filter(|row| row.is_interested()).count());
        }
    }

    proptest! {
        #[test]
        fn the_books_balance(ops in proptest::collection::vec((0u8..10, 0u8..6, 0u8..6, 0u8..64), 0..120)) {
            let mut stripe = Stripe::new();
            for (op, a, b, bit) in ops {
                let (a, b) = (NodeId([a; 16]), NodeId([b; 16]));
                let row = stripe.ensure(a);
                match op {
                    0 => { let have = stripe.row(row).have | 1 << bit; stripe.set_have(row, have); }
                    1 => stripe.set_have(row, 0),
                    2 if a != b && stripe.row(row).pulling >> bit & 1 == 0 => {
                        let parent = stripe.ensure(b);
                        stripe.judge(0, reachable);
                        if stripe.is_fed(bit, parent, row) {
                            stripe.begin_pull(bit, row, Some(parent));
                        }
                    }
                    3 => stripe.end_pull(bit, row),
                    4 => stripe.begin_lease(bit, row, Time(0)),
                    5 => { stripe.end_lease(bit); }
                    6 => stripe.remove(a),
                    7 => stripe.has_not_begun(bit, a),
                    8 if a != b => stripe.move_pull(bit, row, b),
                    _ => stripe.lacks(bit, a),
                }
                stripe.check();
            }
        }
    }

    #[test]
    fn nobody_pulls_from_a_descendant() {
        let mut stripe = Stripe::new();
        let rows: Vec<_> = (0..4).map(|n| stripe.ensure(NodeId([n; 16]))).collect();
        stripe.begin_lease(0, rows[0], Time(0));
        for pair in rows.windows(2) {
            stripe.begin_pull(0, pair[1], Some(pair[0]));
        }
        stripe.judge(0, reachable);
        let fed = |source: usize, child: usize| stripe.is_fed(0, rows[source], rows[child]);
        assert!(fed(1, 3));
        assert!(!fed(3, 1));
    }

    #[test]
    fn whoever_fell_back_on_a_whole_copy_is_fed_by_it() {
        let mut stripe = Stripe::new();
        let rows: Vec<_> = (0..4).map(|n| stripe.ensure(NodeId([n; 16]))).collect();
        stripe.begin_pull(0, rows[1], Some(rows[0]));
        stripe.set_have(rows[2], 1);
        stripe.judge(1, reachable);
        assert!(!stripe.is_fed(0, rows[1], rows[3]));
        stripe.move_pull(0, rows[1], NodeId([2; 16]));
        assert!(stripe.is_fed(0, rows[1], rows[3]));
        assert_eq!((stripe.row(rows[0]).serving, stripe.row(rows[2]).serving), (0, 1));
    }

    #[test]
    fn a_pull_of_which_nothing_is_heard_is_over() {
        let mut stripe = Stripe::new();
        let (seed, child) = (stripe.ensure(NodeId([1; 16])), stripe.ensure(NodeId([2; 16])));
        stripe.set_have(seed, 1);
        stripe.row_mut(child).heard = Time(1_000_000);
        stripe.begin_pull(0, child, Some(seed));
        stripe.end_silent_pulls(Time(9_000_000), Duration::from_secs(8));
        assert_eq!(stripe.children(0, seed), 1);
        stripe.end_silent_pulls(Time(9_000_001), Duration::from_secs(8));
        assert_eq!((stripe.children(0, seed), stripe.row(child).pulling), (0, 0));
    }

    #[test]
    fn what_only_an_idle_node_holds_is_at_the_frontier() {
        let mut stripe = Stripe::new();
        let (idle, busy) = (stripe.ensure(NodeId([1; 16])), stripe.ensure(NodeId([2; 16])));
        stripe.set_have(idle, 0b011);
        stripe.set_have(busy, 0b010);
        stripe.update(busy, |row| row.want = 0b101);
        assert_eq!((stripe.sole, !stripe.frontier()), (0b001, 0b010));
        stripe.set_have(busy, 0b011);
        assert_eq!((stripe.sole, !stripe.frontier()), (0, 0b011));
    }

    #[test]
    fn a_complaint_that_is_late_takes_nothing_away() {
        let mut stripe = Stripe::new();
        let lessee = stripe.ensure(NodeId([1; 16]));
        stripe.begin_lease(0, lessee, Time(0));
        stripe.has_not_begun(0, NodeId([1; 16]));
        assert!(stripe.chunk(0).sources.is_empty() && stripe.chunk(0).lease.is_some());
        stripe.set_have(lessee, 1);
        stripe.has_not_begun(0, NodeId([1; 16]));
        assert_eq!((stripe.chunk(0).holders, stripe.chunk(0).sources.as_slice()), (1, &[lessee][..]));
    }

    #[test]
    fn whoever_lost_its_origin_feeds_nobody() {
        let mut stripe = Stripe::new();
        let rows: Vec<_> = (0..4).map(|n| stripe.ensure(NodeId([n; 16]))).collect();
        stripe.begin_lease(0, rows[0], Time(0));
        stripe.begin_pull(0, rows[1], Some(rows[0]));
        stripe.begin_pull(0, rows[2], Some(rows[1]));
        stripe.judge(1, reachable);
        assert!(stripe.is_fed(0, rows[2], rows[3]));
        stripe.judge(2, |node| Standing { reachable: node != NodeId([1; 16]), ..Standing::default() });
        assert!(!stripe.is_fed(0, rows[2], rows[3]));
        stripe.judge(3, reachable);
        stripe.remove(NodeId([0; 16]));
        assert!(!stripe.is_fed(0, rows[2], rows[3]));
    }
}
