//! Which peers were seen to have a content, and which asked for it lately: hints that say what an eviction would cost.
//!
//! The cache tells what peers do; nothing is asked, nothing is kept over a start, and a hint grows old. Invariant: at
//! most [`PEERS_MAX`] peers are remembered of a content, the latest. Pure: the time is given.

use crate::content::NodeId;

/// Peers remembered per content: more copies than the order of eviction tells apart, and some who ask.
const PEERS_MAX: usize = 8;

/// Who asked so recently still fetches: a node asks for its next chunk as soon as it has one, and asks again within
/// seconds where it was refused. Who has stopped asking has what it wanted.
const WANTED_FOR_MS: u64 = 10_000;

/// Nodes come and go within hours: a copy that nothing was heard of for longer is not counted on.
const HINT_LIFE_MS: u64 = 3_600_000;

/// Copies beyond these do not make a content cheaper to get back.
const COPIES_MAX: u64 = 3;

/// What is known of one content's other copies.
#[derive(Debug, Default)]
pub(super) struct Elsewhere(Vec<Peer>);

#[derive(Debug)]
struct Peer {
    node: NodeId,
    /// Milliseconds since the Unix epoch.
    heard_ms: u64,
    does: Does,
}

/// What a peer does with a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Does {
    /// It asked this node for a chunk.
    Ask,
    /// It gave this node a chunk.
    Give,
}

impl Elsewhere {
    /// `node` was seen to do this. Of too many peers the one that was heard of longest ago is forgotten.
    pub(super) fn note(&mut self, node: NodeId, does: Does, now_ms: u64) {
        self.0.retain(|peer| peer.node != node);
        if self.0.len() == PEERS_MAX {
            self.0.remove(0);
        }
        self.0.push(Peer { node, heard_ms: now_ms, does });
    }

    /// Whether somebody fetches the content, and nobody else is known to have it.
    pub(super) fn needs_us(&self, now_ms: u64) -> bool {
        self.0.iter().any(|peer| peer.is_fetching(now_ms)) && self.copies(now_ms) == 0
    }

    /// How willingly a content is given up that was not used for `idle_ms`: a copy elsewhere makes it twice as old.
    pub(super) fn weight(&self, idle_ms: u64, now_ms: u64) -> u64 {
        idle_ms.saturating_mul(1 + self.copies(now_ms).min(COPIES_MAX))
    }

    fn copies(&self, now_ms: u64) -> u64 {
        self.0.iter().filter(|peer| !peer.is_fetching(now_ms) && peer.age_ms(now_ms) < HINT_LIFE_MS).count()
            as u64
    }
}

impl Peer {
    const fn age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.heard_ms)
    }

    fn is_fetching(&self, now_ms: u64) -> bool {
        self.does == Does::Ask && self.age_ms(now_ms) < WANTED_FOR_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1_000_000;

    #[test]
    fn who_gave_has_it_and_who_stopped_asking_has_it_now() {
        let mut elsewhere = Elsewhere::default();
        assert_eq!((elsewhere.needs_us(START), elsewhere.weight(5, START)), (false, 5));
        elsewhere.note(NodeId([1; 16]), Does::Ask, START);
        assert_eq!((elsewhere.needs_us(START), elsewhere.weight(5, START)), (true, 5));
        elsewhere.note(NodeId([2; 16]), Does::Give, START);
        assert_eq!((elsewhere.needs_us(START), elsewhere.weight(5, START)), (false, 10));
        let later = START + WANTED_FOR_MS;
        assert_eq!((elsewhere.needs_us(later), elsewhere.weight(5, later)), (false, 15));
        let much_later = START + HINT_LIFE_MS;
        assert_eq!(elsewhere.weight(5, much_later), 5);
    }

    #[test]
    fn few_peers_are_remembered_and_few_count() {
        let mut elsewhere = Elsewhere::default();
        for number in 0..100 {
            elsewhere.note(NodeId([number; 16]), Does::Give, START);
            elsewhere.note(NodeId([number; 16]), Does::Give, START);
        }
        assert_eq!(elsewhere.0.len(), PEERS_MAX);
        assert_eq!(elsewhere.weight(5, START), 5 * (1 + COPIES_MAX));
    }
}
