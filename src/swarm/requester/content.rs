//! One content on this node: what is here, what is wanted, and what the homes of its stripes have been told.

use std::collections::BTreeMap;

use crate::content::{ChunkIndex, ChunkSet, Layout, NodeId, StripeIndex};
use crate::swarm::config::MAX_CURSORS;
use crate::swarm::event::FlowId;
use crate::swarm::home::bits;
use crate::swarm::time::Time;
use crate::wire::{Failure, LeaseEnd, Source};

/// Chunks behind each cursor that are asked for as urgent: the one being read and enough to hide its successors'
/// latency. With four a reader stood still for up to 58 chunk times on shaped links, because the fifth was not begun
/// although others held it for long; with sixteen for half of that, but then 8 to 32 nodes take 1 % longer, because
/// what is urgent is not rare.
const URGENT_CHUNKS: u32 = 8;

#[derive(Debug)]
pub(super) struct Content {
    pub(super) layout: Layout,
    pub(super) have: ChunkSet,
    pub(super) open: bool,
    pub(super) wanted: ChunkSet,
    pub(super) cursors: Vec<ChunkIndex>,
    pub(super) asking: BTreeMap<StripeIndex, Asking>,
    pub(super) flights: BTreeMap<ChunkIndex, Flight>,
    /// Contiguous bytes of incomplete chunks that the engine keeps.
    pub(super) received: BTreeMap<ChunkIndex, u32>,
    /// Assignments that wait for room.
    pub(super) queued: BTreeMap<ChunkIndex, Source>,
    pub(super) inflight_bytes: u64,
    /// Nodes that want something of it, as the homes say.
    pub(super) interested: u16,
    /// The most that ever were: a window that shrinks and grows with every answer would be asked for in vain.
    pub(super) crowd: u16,
    /// Last time a byte came.
    pub(super) progressed: Time,
    /// Last time a flow was given up.
    pub(super) given_up: Option<Time>,
    /// Last time a home said that it is on it.
    pub(super) vouched: Time,
    /// The first chunk a reader misses, and since when.
    pub(super) head: Option<(ChunkIndex, Time)>,
    pub(super) origin_failures: u32,
    /// No lease is asked for before.
    pub(super) origin_after: Time,
    /// Leases' progress was last reported.
    pub(super) reported: Time,
    /// Stretches this node's last deadlines, in percent, so that not all nodes run to the origin at once.
    pub(super) patience_percent: u32,
}

/// A chunk in the air.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    pub(super) flow: FlowId,
    pub(super) from_origin: bool,
}

/// The conversation with the home of one stripe.
#[derive(Debug, Default)]
pub(super) struct Asking {
    /// Who is home by the view of that epoch.
    pub(super) home: Option<(u64, NodeId)>,
    /// Who is home by the word of another, in that epoch.
    pub(super) redirect: Option<(u64, NodeId)>,
    pub(super) hops: u8,
    pub(super) sent: Option<Time>,
    /// An answer is overdue after this.
    pub(super) deadline: Option<Time>,
    pub(super) seen: u32,
    /// Wants sent to this home.
    pub(super) wants: u32,
    /// What the home knows: the last want, and what its answers did since.
    pub(super) told: Status,
    /// Assigned chunks that somebody asked for before they had begun here: the home is told when they do.
    pub(super) early: u64,
    pub(super) failures: Vec<Failure>,
    pub(super) ended: Vec<LeaseEnd>,
}

/// The part of a want that is state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) want: u64,
    pub(super) urgent: u64,
    pub(super) have: u64,
    pub(super) pulling: u64,
    pub(super) queued: u64,
    pub(super) leased: u64,
    pub(super) room: u8,
    pub(super) grants: u8,
}

/// Missing chunks of one stripe that may be asked for now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) want: u64,
    pub(super) urgent: u64,
}

impl Content {
    pub(super) const fn new(layout: Layout, have: ChunkSet) -> Self {
        Self {
            layout,
            have,
            open: false,
            wanted: ChunkSet::new(),
            cursors: Vec::new(),
            asking: BTreeMap::new(),
            flights: BTreeMap::new(),
            received: BTreeMap::new(),
            queued: BTreeMap::new(),
            inflight_bytes: 0,
            interested: 1,
            crowd: 1,
            progressed: Time(0),
            given_up: None,
            vouched: Time(0),
            head: None,
            origin_failures: 0,
            origin_after: Time(0),
            reported: Time(0),
            patience_percent: 100,
        }
    }

    pub(super) fn is_wanted(&self, chunk: ChunkIndex) -> bool {
        self.open && self.wanted.contains(chunk) && !self.have.contains(chunk)
    }

    /// Whether anything is still missing that somebody here waits for.
    pub(super) fn is_hungry(&self) -> bool {
        self.open && self.stripes().any(|stripe| self.missing(stripe) != 0)
    }

    /// The window: the first missing chunks behind each cursor, then from the start. In the order of importance.
    pub(super) fn windows(&self, chunks: u32) -> Vec<(StripeIndex, Window)> {
        let cursors = &self.cursors[..self.cursors.len().min(MAX_CURSORS)];
        let share =
            chunks.div_ceil(u32::try_from(cursors.len()).unwrap_or(u32::MAX).max(1)).max(URGENT_CHUNKS);
        let mut windows = Vec::new();
        let mut left = chunks;
        for cursor in cursors {
            left = left.saturating_sub(self.walk(*cursor, share, URGENT_CHUNKS, &mut windows));
        }
        self.walk(ChunkIndex(0), left, 0, &mut windows);
        windows
    }

    /// Adds up to `most` missing chunks from `from` on, the first `urgent` of them urgently; returns how many.
    fn walk(
        &self,
        from: ChunkIndex,
        most: u32,
        urgent: u32,
        windows: &mut Vec<(StripeIndex, Window)>,
    ) -> u32 {
        let mut taken = 0;
        for stripe in (from.stripe().0..self.layout.stripe_count()).map(StripeIndex) {
            if taken >= most {
                break;
            }
            let behind = if stripe == from.stripe() { u64::MAX << from.bit() } else { u64::MAX };
            let missing = self.missing(stripe) & behind;
            if missing == 0 {
                continue;
            }
            let at = windows.iter().position(|(known, _)| *known == stripe).unwrap_or_else(|| {
                windows.push((stripe, Window::default()));
                windows.len() - 1
            });
            let window = &mut windows[at].1;
            for bit in bits(missing).take((most - taken) as usize) {
                window.urgent |= u64::from(taken < urgent) << bit;
                taken += u32::from(window.want >> bit & 1 == 0);
                window.want |= 1 << bit;
            }
        }
        taken
    }

    pub(super) fn stripes(&self) -> impl Iterator<Item = StripeIndex> + use<> {
        (0..self.layout.stripe_count()).map(StripeIndex)
    }

    fn missing(&self, stripe: StripeIndex) -> u64 {
        self.wanted.stripe(stripe) & !self.have.stripe(stripe) & self.layout.stripe_mask(stripe)
    }

    /// This node's state of one stripe, but for room and grants.
    pub(super) fn status(&self, stripe: StripeIndex, window: Window) -> Status {
        let (mut pulling, mut queued, mut leased) = (0u64, 0u64, 0u64);
        let range = stripe.chunk(0)..=stripe.chunk(63);
        for (chunk, flight) in self.flights.range(range.clone()) {
            *(if flight.from_origin { &mut leased } else { &mut pulling }) |= 1 << chunk.bit();
        }
        for chunk in self.queued.range(range).map(|(chunk, _)| chunk) {
            queued |= 1 << chunk.bit();
        }
        pulling |= queued;
        let want = window.want & !pulling & !leased;
        Status {
            want,
            urgent: window.urgent & want,
            have: self.have.stripe(stripe),
            pulling,
            queued,
            leased,
            room: 0,
            grants: 0,
        }
    }

    /// Bytes of a usual chunk of this content.
    pub(super) fn chunk_bytes(&self) -> u64 {
        u64::from(self.layout.chunk_bytes()).min(self.layout.size()).max(1)
    }
}

impl Status {
    /// Whether `self` needs the home's attention soon, `told` being what it knows; otherwise a difference can wait.
    pub(super) const fn is_news(&self, told: &Self) -> bool {
        let asks_more = self.want & !told.want != 0 || self.urgent & !told.urgent != 0;
        // While the home has room of this node's left to use, a little more of it changes nothing.
        let has_room = self.room / 2 > told.room || (told.room == 0 && self.room > 0);
        let takes_more = self.want != 0 && (has_room || self.grants > told.grants);
        let finished = self.want | self.pulling | self.leased == 0 && self.have != told.have;
        let lost = told.have & !self.have != 0;
        asks_more || takes_more || finished || lost
    }

    /// Chunks of which something may be here to pass on.
    pub(super) const fn begun(&self) -> u64 {
        (self.pulling & !self.queued) | self.leased
    }

    /// Whether there is any difference worth a message.
    pub(super) fn differs(&self, told: &Self) -> bool {
        let without_room = |status: &Self| Self { room: 0, grants: 0, urgent: 0, ..*status };
        without_room(self) != without_room(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(chunks: u64) -> Content {
        let layout = Layout::new(chunks * 8, 8).unwrap();
        let mut content = Content::new(layout, ChunkSet::new());
        content.open = true;
        content.wanted = ChunkSet::full(&layout);
        content
    }

    #[test]
    fn a_fill_starts_at_the_beginning() {
        let mut content = content(200);
        content.have.insert(ChunkIndex(1));
        let windows = content.windows(64);
        assert_eq!(windows[0], (StripeIndex(0), Window { want: !2, urgent: 0 }));
        assert_eq!(windows[1], (StripeIndex(1), Window { want: 1, urgent: 0 }));
    }

    #[test]
    fn readers_come_first() {
        let mut content = content(200);
        content.cursors = vec![ChunkIndex(130), ChunkIndex(60)];
        let windows = content.windows(16);
        assert_eq!(windows[0], (StripeIndex(2), Window { want: 0xff << 2, urgent: 0xff << 2 }));
        assert_eq!(windows[1], (StripeIndex(0), Window { want: 0xf << 60, urgent: 0xf << 60 }));
        assert_eq!(windows[2], (StripeIndex(1), Window { want: 0xf, urgent: 0xf }));
    }

    #[test]
    fn what_remains_of_the_window_goes_to_the_start() {
        let mut content = content(200);
        content.cursors = vec![ChunkIndex(198)];
        let windows = content.windows(16);
        assert_eq!(windows[0].1.want, 0x3 << 6);
        assert_eq!(windows[1], (StripeIndex(0), Window { want: 0x3fff, urgent: 0 }));
    }
}
