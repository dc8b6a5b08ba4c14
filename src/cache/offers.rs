//! Who is offered what by a node that leaves: decisions only.
//!
//! What homes say that nobody else holds is offered to seeds first, then to the member with the most capacity for what it
//! was already offered, one content to one taker, the last used first. A taker that says no, nothing, or takes nothing
//! for too long is passed over for the next. Invariant: every content ends up shared, or with nobody left to offer it to.
//! This file refuses to send and to wait: it is told the time, what was heard and who is there.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::content::{ContentKey, Layout, NodeId, StripeIndex};
use crate::swarm::Member;
use crate::wire::StripeChunks;

/// A home answers within its queue's time; one that has not by then is asked again, and what it was asked about counts
/// as unshared: to offer in vain costs a message.
const HOME_PATIENCE: Duration = Duration::from_secs(2);
/// An offer unanswered for this long is refused: the taker is of an older version, or gone.
const OFFER_PATIENCE: Duration = Duration::from_secs(2);
/// An accepted offer of which nothing more was taken for this long is given to the next.
const TAKE_PATIENCE: Duration = Duration::from_secs(10);
/// Contents that are on offer at a time: enough to fill a link with small ones, few enough that the most used are whole
/// somewhere else when the time is up.
const ON_OFFER_MAX: usize = 16;

/// A content that is held here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holding {
    pub(super) key: ContentKey,
    pub(super) layout: Layout,
    /// Milliseconds since the Unix epoch.
    pub(super) last_used_ms: u64,
}

/// All that this node holds, and where each content stands. Times count from the start of the parting.
#[derive(Debug, Default)]
pub(super) struct Offers {
    estates: BTreeMap<ContentKey, Estate>,
    /// Last used first.
    order: Vec<ContentKey>,
    members: BTreeMap<NodeId, Member>,
}

/// One content.
#[derive(Debug)]
struct Estate {
    layout: Layout,
    held: BTreeMap<StripeIndex, u64>,
    /// What nobody else holds, by stripe; stripes without an answer are missing.
    unshared: BTreeMap<StripeIndex, u64>,
    /// When the homes were first asked.
    asked: Option<Duration>,
    offer: Option<Offer>,
    refused_by: BTreeSet<NodeId>,
    /// Nobody is left to offer it to.
    is_lost: bool,
}

#[derive(Debug)]
struct Offer {
    to: NodeId,
    /// When it was made, or something of it last taken.
    moved: Duration,
    is_accepted: bool,
}

/// What became of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Bytes that others hold too, whether they did before or took them.
    pub(super) shared_bytes: u64,
    /// Bytes that nobody else holds.
    pub(super) sole_bytes: u64,
}

impl Offers {
    pub(super) fn new(holdings: Vec<(Holding, Vec<(StripeIndex, u64)>)>) -> Self {
        let mut sorted = holdings;
        sorted.sort_by_key(|(holding, _)| std::cmp::Reverse(holding.last_used_ms));
        let order = sorted.iter().map(|(holding, _)| holding.key).collect();
        let estate = |(holding, held): (Holding, Vec<(StripeIndex, u64)>)| {
            let estate = Estate {
                layout: holding.layout,
                held: held.into_iter().collect(),
                unshared: BTreeMap::new(),
                asked: None,
                offer: None,
                refused_by: BTreeSet::new(),
                is_lost: false,
            };
            (holding.key, estate)
        };
        Self { estates: sorted.into_iter().map(estate).collect(), order, members: BTreeMap::new() }
    }

    /// Those who stay, as far as is known; who left takes nothing any more.
    pub(super) fn members(&mut self, members: Vec<Member>) {
        self.members = members.into_iter().map(|member| (member.id, member)).collect();
        for estate in self.estates.values_mut() {
            if estate.offer.as_ref().is_some_and(|offer| !self.members.contains_key(&offer.to)) {
                estate.offer = None;
            }
        }
    }

    /// What the homes are to be asked now: all that is not known to be shared.
    pub(super) fn questions(&mut self, now: Duration) -> Vec<StripeChunks> {
        let mut questions = Vec::new();
        for key in &self.order {
            let Some(estate) = self.estates.get_mut(key).filter(|estate| !estate.is_lost) else { continue };
            let open = estate.held.iter().filter(|(stripe, _)| estate.unshared.get(stripe) != Some(&0));
            let before = questions.len();
            questions.extend(open.map(|(stripe, chunks)| StripeChunks {
                content: *key,
                stripe: *stripe,
                chunks: *chunks,
            }));
            if questions.len() > before {
                estate.asked.get_or_insert(now);
            }
        }
        questions
    }

    /// A home's answer.
    pub(super) fn heard(&mut self, now: Duration, stripes: &[StripeChunks]) {
        for said in stripes {
            let Some(estate) = self.estates.get_mut(&said.content) else { continue };
            let Some(held) = estate.held.get(&said.stripe) else { continue };
            let unshared = said.chunks & held;
            let before = estate.unshared.insert(said.stripe, unshared).unwrap_or(*held);
            if unshared.count_ones() < before.count_ones()
                && let Some(offer) = &mut estate.offer
            {
                offer.moved = now;
            }
            if estate.is_shared() {
                estate.offer = None;
            }
        }
    }

    /// A taker's answer.
    pub(super) fn took(&mut self, now: Duration, from: NodeId, key: ContentKey, accepted: bool) {
        let Some(estate) = self.estates.get_mut(&key) else { return };
        let Some(offer) = estate.offer.as_mut().filter(|offer| offer.to == from) else { return };
        if accepted {
            *offer = Offer { to: from, moved: now, is_accepted: true };
        } else {
            estate.refused_by.insert(from);
            estate.offer = None;
        }
    }

    /// The offers to make now.
    pub(super) fn make(&mut self, now: Duration) -> Vec<(NodeId, ContentKey)> {
        for estate in self.estates.values_mut() {
            estate.pass_over(now);
        }
        let mut burden = self.burden();
        let mut made = Vec::new();
        for key in &self.order {
            if burden.offers >= ON_OFFER_MAX {
                break;
            }
            let Some(estate) = self.estates.get_mut(key).filter(|estate| estate.is_to_be_offered(now)) else {
                continue;
            };
            let willing = self.members.values().filter(|member| !estate.refused_by.contains(&member.id));
            let Some(taker) = willing.min_by_key(|member| burden.rank(member)) else {
                estate.is_lost = true;
                continue;
            };
            estate.offer = Some(Offer { to: taker.id, moved: now, is_accepted: false });
            burden.add(taker.id, estate.unshared_bytes());
            made.push((taker.id, *key));
        }
        made
    }

    /// What an offer of `key` says.
    pub(super) fn unshared(&self, key: ContentKey) -> Vec<(StripeIndex, u64)> {
        let Some(estate) = self.estates.get(&key) else { return Vec::new() };
        let said = |(stripe, held): (&StripeIndex, &u64)| {
            (*stripe, estate.unshared.get(stripe).copied().unwrap_or(*held))
        };
        estate.held.iter().map(said).filter(|(_, chunks)| *chunks != 0).collect()
    }

    /// Nothing more can be done.
    pub(super) fn is_done(&self) -> bool {
        self.estates.values().all(|estate| estate.is_lost || estate.is_shared())
    }

    pub(super) fn outcome(&self) -> Outcome {
        let mut outcome = Outcome::default();
        for estate in self.estates.values() {
            let sole = estate.unshared_bytes();
            outcome.sole_bytes += sole;
            outcome.shared_bytes += bytes(&estate.layout, &estate.held).saturating_sub(sole);
        }
        outcome
    }

    fn burden(&self) -> Burden {
        let mut burden = Burden::default();
        for estate in self.estates.values() {
            if let Some(offer) = &estate.offer {
                burden.add(offer.to, estate.unshared_bytes());
            }
        }
        burden
    }
}

impl Estate {
    fn is_shared(&self) -> bool {
        self.held.keys().all(|stripe| self.unshared.get(stripe) == Some(&0))
    }

    fn is_to_be_offered(&self, now: Duration) -> bool {
        let is_known = self.held.keys().all(|stripe| self.unshared.contains_key(stripe));
        let is_late = self.asked.is_some_and(|asked| now >= asked + HOME_PATIENCE);
        self.offer.is_none() && !self.is_lost && !self.is_shared() && (is_known || is_late)
    }

    /// Ends an offer of which nothing comes.
    fn pass_over(&mut self, now: Duration) {
        let Some(offer) = &self.offer else { return };
        let patience = if offer.is_accepted { TAKE_PATIENCE } else { OFFER_PATIENCE };
        if now >= offer.moved + patience {
            self.refused_by.insert(offer.to);
            self.offer = None;
        }
    }

    fn unshared_bytes(&self) -> u64 {
        let sole =
            self.held.iter().map(|(stripe, held)| (*stripe, *self.unshared.get(stripe).unwrap_or(held)));
        bytes(&self.layout, &sole.collect())
    }
}

fn bytes(layout: &Layout, stripes: &BTreeMap<StripeIndex, u64>) -> u64 {
    let chunks = stripes.iter().flat_map(|(stripe, word)| {
        (0..u64::BITS).filter(move |bit| word >> bit & 1 == 1).map(move |bit| stripe.chunk(bit))
    });
    chunks.map(|chunk| u64::from(layout.chunk_len(chunk))).sum()
}

/// What is on offer now, and to whom.
#[derive(Debug, Default)]
struct Burden {
    offers: usize,
    bytes: BTreeMap<NodeId, u64>,
}

impl Burden {
    fn add(&mut self, node: NodeId, bytes: u64) {
        self.offers += 1;
        *self.bytes.entry(node).or_default() += bytes;
    }

    /// Lower is better: a seed, then who is done soonest with what it was offered, then who has most capacity.
    fn rank(&self, member: &Member) -> (bool, u64, std::cmp::Reverse<u16>) {
        let bytes = self.bytes.get(&member.id).copied().unwrap_or(0);
        (!member.seed, bytes / u64::from(member.capacity.max(1)), std::cmp::Reverse(member.capacity))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::swarm::Zone;

    const MS: Duration = Duration::from_millis(1);

    fn node(n: u8) -> NodeId {
        NodeId([n; 16])
    }

    fn key(n: u8) -> ContentKey {
        ContentKey([n; 32])
    }

    fn member(n: u8, seed: bool, capacity: u16) -> Member {
        Member { id: node(n), zone: Zone::default(), seed, settled: true, capacity }
    }

    /// Contents 1 to `count` of four chunks of one byte each, the first used last.
    fn offers(count: u8, members: Vec<Member>) -> Offers {
        let layout = Layout::new(4, 1).expect("a layout");
        let holding = |n: u8| {
            let holding = Holding { key: key(n), layout, last_used_ms: 1_000 - u64::from(n) };
            (holding, vec![(StripeIndex(0), 0b1111)])
        };
        let mut offers = Offers::new((1..=count).map(holding).collect());
        offers.members(members);
        offers.questions(Duration::ZERO);
        offers
    }

    fn answer(offers: &mut Offers, now: Duration, n: u8, chunks: u64) {
        offers.heard(now, &[StripeChunks { content: key(n), stripe: StripeIndex(0), chunks }]);
    }

    #[test]
    fn what_others_hold_is_not_offered() {
        let mut offers = offers(2, vec![member(1, false, 10)]);
        assert_eq!(offers.questions(MS).len(), 2);
        answer(&mut offers, MS, 1, 0);
        answer(&mut offers, MS, 2, 0);
        assert!(offers.is_done() && offers.make(MS).is_empty() && offers.questions(MS).is_empty());
        assert_eq!(offers.outcome(), Outcome { shared_bytes: 8, sole_bytes: 0 });
    }

    #[test]
    fn seeds_come_first_then_capacity_and_the_last_used_first() {
        let mut offers = offers(2, vec![member(1, false, 40), member(2, true, 10), member(3, false, 10)]);
        answer(&mut offers, MS, 1, 0b1111);
        answer(&mut offers, MS, 2, 0b0011);
        assert_eq!(offers.make(MS), vec![(node(2), key(1)), (node(2), key(2))]);
        assert_eq!(offers.unshared(key(2)), vec![(StripeIndex(0), 0b0011)]);
        offers.took(2 * MS, node(2), key(1), false);
        assert_eq!(offers.make(3 * MS), vec![(node(1), key(1))], "the seed has no room");
    }

    #[test]
    fn peers_share_the_burden_by_capacity() {
        let mut offers = offers(3, vec![member(1, false, 20), member(2, false, 10)]);
        for n in 1..=3 {
            answer(&mut offers, MS, n, 0b1111);
        }
        let takers: Vec<_> = offers.make(MS).into_iter().map(|(taker, _)| taker).collect();
        assert_eq!(takers, vec![node(1), node(1), node(1)], "four bytes are nothing");
        let layout = Layout::new(64 << 20, 1 << 20).expect("a layout");
        let large =
            |n: u8| (Holding { key: key(n), layout, last_used_ms: 0 }, vec![(StripeIndex(0), u64::MAX)]);
        let mut offers = Offers::new((1..=3).map(large).collect());
        offers.members(vec![member(1, false, 20), member(2, false, 10)]);
        for n in 1..=3 {
            answer(&mut offers, MS, n, u64::MAX);
        }
        let takers: Vec<_> = offers.make(MS).into_iter().map(|(taker, _)| taker).collect();
        assert_eq!(takers, vec![node(1), node(2), node(1)]);
    }

    #[test]
    fn a_taker_that_takes_nothing_is_passed_over_and_in_the_end_nobody_is_left() {
        let mut offers = offers(1, vec![member(1, false, 10), member(2, false, 20)]);
        answer(&mut offers, MS, 1, 0b1111);
        assert_eq!(offers.make(MS), vec![(node(2), key(1))]);
        assert!(offers.make(OFFER_PATIENCE).is_empty());
        assert_eq!(offers.make(OFFER_PATIENCE + MS), vec![(node(1), key(1))], "silent");
        let accepted = OFFER_PATIENCE + 2 * MS;
        offers.took(accepted, node(1), key(1), true);
        answer(&mut offers, accepted + TAKE_PATIENCE / 2, 1, 0b1110);
        assert!(offers.make(accepted + TAKE_PATIENCE).is_empty(), "something was taken since");
        assert!(!offers.is_done());
        assert!(offers.make(accepted + 2 * TAKE_PATIENCE).is_empty());
        assert!(offers.is_done(), "nobody is left");
        assert_eq!(offers.outcome(), Outcome { shared_bytes: 1, sole_bytes: 3 });
    }

    #[test]
    fn a_taker_that_leaves_is_replaced_and_a_home_that_is_silent_is_not_waited_for() {
        let mut offers = offers(1, vec![member(1, true, 10), member(2, false, 20)]);
        assert!(offers.make(MS).is_empty(), "the home was asked");
        assert_eq!(offers.make(HOME_PATIENCE), vec![(node(1), key(1))]);
        offers.took(HOME_PATIENCE, node(1), key(1), true);
        offers.members(vec![member(2, false, 20)]);
        assert_eq!(offers.make(HOME_PATIENCE + MS), vec![(node(2), key(1))]);
    }

    #[test]
    fn no_more_is_on_offer_than_the_bound() {
        let mut offers = offers(40, vec![member(1, true, 10)]);
        for n in 1..=40 {
            answer(&mut offers, MS, n, 1);
        }
        let made = offers.make(MS);
        assert_eq!(made.len(), ON_OFFER_MAX);
        assert_eq!(made[0].1, key(1));
        answer(&mut offers, 2 * MS, 1, 0);
        assert_eq!(offers.make(2 * MS).len(), 1, "as one is taken, the next is offered");
    }
}
