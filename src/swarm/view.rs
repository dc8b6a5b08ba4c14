//! One node's view of the cluster, and who is home of what in it.
//!
//! Homes are chosen by weighted rendezvous hashing: each member scores `weight / -ln(u)` for a stripe, `u` being a
//! hash of both in (0, 1); the highest wins. A member that comes or goes moves only the stripes it wins or held.
//!
//! Only settled members are homes, because until then not everybody knows them. When a whole cluster starts at once,
//! nobody is settled; then whoever is known at the end of the cold grace is trusted as if it were, and nothing is
//! granted before: by then all views name the same.
//!
//! With the scope of a zone, the nodes of other zones are not in the view: no home, no source, nobody to wait for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::config::Scope;
use super::member::{DEFAULT_CAPACITY, Member, Zone};
use super::rng::mix;
use super::time::Time;
use crate::content::{ContentKey, NodeId, StripeIndex};

/// Departed members remembered, to know which stripes were orphaned. More leave at once only when a cluster is
/// scaled down, and then a forgotten one costs at most a chunk fetched twice.
const MAX_DEPARTED: usize = 128;
/// How long a departure matters: until every other node has noticed it and announced what it holds.
const DEPARTED_MEMORY: Duration = Duration::from_secs(3);
/// A cold grace that newcomers prolong ends after this at the latest: half of what a requester waits for a home.
const MAX_COLD_GRACE: Duration = Duration::from_secs(1);

/// What a home is home of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StripeKey {
    pub(crate) content: ContentKey,
    pub(crate) stripe: StripeIndex,
}

impl StripeKey {
    fn hash(&self) -> u64 {
        let mut head = [0; 8];
        head.copy_from_slice(&self.content.0[..8]);
        mix(u64::from_le_bytes(head) ^ mix(u64::from(self.stripe.0) + 1))
    }
}

/// Why a node is suspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Evidence {
    /// It is late with an answer: passed over as a home, last choice as a source. What it holds and fetches counts,
    /// for the slow are many and the dead are few.
    Mute,
    /// Its connection broke: what it holds and fetches is lost to the others until it is heard from.
    Lost,
}

#[derive(Clone, Copy, Debug)]
struct Suspicion {
    evidence: Evidence,
    until: Time,
}

/// What a change of membership did.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) gone: Vec<NodeId>,
    /// Joined, settled, or changed in weight: may have become home of something.
    pub(crate) risen: Vec<NodeId>,
    /// Homes may have moved anywhere.
    pub(crate) upheaval: bool,
}

#[derive(Debug)]
pub(crate) struct View {
    me: NodeId,
    scope: Scope,
    members: BTreeMap<NodeId, Member>,
    synced: Option<Time>,
    /// When somebody was last learnt of.
    last_join: Time,
    /// Homes as if settled, since the cold grace; `None` while that lasts.
    trusted: Option<BTreeSet<NodeId>>,
    suspects: BTreeMap<NodeId, Suspicion>,
    departed: VecDeque<(Member, Time)>,
    epoch: u64,
    seed_weight: u32,
    cold_grace: Duration,
}

impl View {
    pub(crate) fn new(me: NodeId, seed_weight: u32, cold_grace: Duration) -> Self {
        let myself =
            Member { id: me, zone: Zone::default(), seed: false, settled: false, capacity: DEFAULT_CAPACITY };
        Self {
            me,
            scope: Scope::Cluster,
            members: BTreeMap::from([(me, myself)]),
            synced: None,
            last_join: Time::default(),
            trusted: None,
            suspects: BTreeMap::new(),
            departed: VecDeque::new(),
            epoch: 0,
            seed_weight: seed_weight.max(1),
            cold_grace,
        }
    }

    pub(crate) fn within(self, scope: Scope) -> Self {
        Self { scope, ..self }
    }

    pub(crate) fn replace(&mut self, now: Time, members: Vec<Member>, synced: bool) -> Change {
        let before = std::mem::take(&mut self.members);
        let zone = members.iter().find(|member| member.id == self.me).map(|member| member.zone.clone());
        let within = |member: &Member| {
            self.scope == Scope::Cluster || zone.as_ref().is_none_or(|zone| *zone == member.zone)
        };
        self.members = members.into_iter().filter(within).map(|member| (member.id, member)).collect();
        if let Some(myself) = before.get(&self.me) {
            self.members.entry(self.me).or_insert_with(|| myself.clone());
        }
        let mut change = Change::default();
        if synced && self.synced.is_none() {
            self.synced = Some(now);
            change.upheaval = true;
        }
        let settled =
            |members: &BTreeMap<NodeId, Member>| members.values().any(|member| self.is_settled(member));
        change.upheaval |= settled(&before) != settled(&self.members);
        change.risen =
            self.members.values().filter(|m| before.get(&m.id) != Some(*m)).map(|m| m.id).collect();
        if self.members.keys().any(|node| !before.contains_key(node)) {
            self.last_join = now;
        }
        for (id, member) in before {
            if !self.members.contains_key(&id) {
                change.gone.push(id);
                self.suspects.remove(&id);
                self.trusted.iter_mut().for_each(|trusted| {
                    trusted.remove(&id);
                });
                self.departed.push_back((member, now));
            }
        }
        while self.departed.len() > MAX_DEPARTED
            || self.departed.front().is_some_and(|(_, at)| now.since(*at) > DEPARTED_MEMORY)
        {
            self.departed.pop_front();
        }
        self.epoch += 1;
        change
    }

    /// Changes with every membership and every suspicion: what was derived from an older one is to be derived again.
    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn is_alone(&self) -> bool {
        self.members.len() == 1
    }

    pub(crate) const fn synced(&self) -> Option<Time> {
        self.synced
    }

    /// When this node, as a home, may grant: after the first sync, and, where a whole cluster starts at once, a grace in
    /// which the others finish theirs. Everybody who appears prolongs that.
    pub(crate) fn may_grant_from(&self) -> Option<Time> {
        let synced = self.synced?;
        if self.is_alone() || self.trusted.is_some() || !self.is_cold() {
            return Some(synced);
        }
        Some((self.last_join.max(synced) + self.cold_grace).min(synced + MAX_COLD_GRACE))
    }

    /// Some member may be unknown to some other.
    pub(crate) fn is_in_flux(&self, now: Time) -> bool {
        now.since(self.last_join) < DEPARTED_MEMORY
            || self.members.values().any(|member| !self.is_settled(member))
    }

    pub(crate) fn is_settled(&self, member: &Member) -> bool {
        member.settled || self.trusted.as_ref().is_some_and(|trusted| trusted.contains(&member.id))
    }

    /// Nobody else was here before.
    fn is_cold(&self) -> bool {
        self.members.values().all(|member| member.id == self.me || !member.settled)
    }

    /// Ends what time ends: suspicions, and the cold grace.
    pub(crate) fn advance(&mut self, now: Time) {
        self.forgive(now);
        if self.trusted.is_none() && self.may_grant_from().is_some_and(|from| from <= now) {
            let all = if self.is_cold() { self.members.keys().copied().collect() } else { BTreeSet::new() };
            self.trusted = Some(all);
            self.epoch += 1;
        }
    }

    pub(crate) fn member(&self, node: NodeId) -> Option<&Member> {
        self.members.get(&node)
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// The node is passed over until then, or until it is heard from. Being late takes nothing back from being lost.
    pub(crate) fn suspect(&mut self, node: NodeId, evidence: Evidence, until: Time) {
        if node == self.me || !self.members.contains_key(&node) {
            return;
        }
        let suspicion = self.suspects.entry(node).or_insert(Suspicion { evidence, until });
        suspicion.evidence = suspicion.evidence.max(evidence);
        suspicion.until = suspicion.until.max(until);
        self.epoch += 1;
    }

    pub(crate) fn heard_from(&mut self, node: NodeId) {
        if self.suspects.remove(&node).is_some() {
            self.epoch += 1;
        }
    }

    fn forgive(&mut self, now: Time) {
        let before = self.suspects.len();
        self.suspects.retain(|_, suspicion| suspicion.until > now);
        if self.suspects.len() != before {
            self.epoch += 1;
        }
    }

    /// A member whose connection did not break.
    pub(crate) fn is_reachable(&self, node: NodeId) -> bool {
        self.members.contains_key(&node) && !self.is_lost(node)
    }

    /// A member in this node's zone.
    pub(crate) fn is_near(&self, node: NodeId) -> bool {
        let zone = |node| self.members.get(&node).map(|member| &member.zone);
        zone(node).is_some() && zone(node) == zone(self.me)
    }

    /// A member that is late with nothing, as far as this node knows.
    pub(crate) fn is_prompt(&self, node: NodeId) -> bool {
        self.members.contains_key(&node) && !self.suspects.contains_key(&node)
    }

    fn is_lost(&self, node: NodeId) -> bool {
        self.suspects.get(&node).is_some_and(|suspicion| suspicion.evidence == Evidence::Lost)
    }

    /// Members that are suspected, the likeliest homes of `key` first.
    pub(crate) fn suspects_for(&self, key: StripeKey, at_most: usize) -> Vec<NodeId> {
        let suspects = self.suspects.keys().filter_map(|node| self.members.get(node));
        self.ranked(suspects, key, at_most)
    }

    /// Whom to ask: the best settled member that is not suspected, this node only if it is settled itself.
    pub(crate) fn home(&self, key: StripeKey) -> NodeId {
        let usable = || self.members.values().filter(|member| !self.suspects.contains_key(&member.id));
        self.best(usable().filter(|member| self.is_settled(member)), key)
            .or_else(|| self.best(usable(), key))
            .unwrap_or(self.me)
    }

    /// Who should answer, asked by somebody who cannot reach `passed_over`: like [`Self::home`], but being asked
    /// settles this node.
    pub(crate) fn answering_home(&self, key: StripeKey, passed_over: &[NodeId]) -> NodeId {
        let eligible = self.members.values().filter(|member| {
            (self.is_settled(member) || member.id == self.me)
                && !self.suspects.contains_key(&member.id)
                && !passed_over.contains(&member.id)
        });
        self.best(eligible, key).unwrap_or(self.me)
    }

    /// Who may have been home before this node: the best ranks among the settled others, then among all. The mute are
    /// among them: one that is only slow is home still.
    pub(crate) fn likely_homes(&self, key: StripeKey, settled: usize, at_most: usize) -> Vec<NodeId> {
        let others = || self.members.values().filter(|m| m.id != self.me && !self.is_lost(m.id));
        let mut homes = self.ranked(others().filter(|member| self.is_settled(member)), key, settled);
        for node in self.ranked(others(), key, at_most) {
            if homes.len() < at_most && !homes.contains(&node) {
                homes.push(node);
            }
        }
        homes
    }

    /// Whether `a` ranks above `b` for this stripe. Unknown nodes rank last.
    pub(crate) fn outranks(&self, a: NodeId, b: NodeId, key: StripeKey) -> bool {
        let score = |node| self.members.get(&node).map_or(0.0, |member| self.score(member, key));
        (score(a), a) > (score(b), b)
    }

    /// A better home than this node has left lately or was lost: holders will announce themselves soon.
    pub(crate) fn is_orphaned(&self, now: Time, key: StripeKey) -> bool {
        let Some(myself) = self.members.get(&self.me) else { return false };
        let mine = self.score(myself, key);
        let lately = self.departed.iter().filter(|(_, at)| now.since(*at) <= DEPARTED_MEMORY);
        let lost = self.suspects.keys().filter(|node| self.is_lost(**node));
        let lost = lost.filter_map(|node| self.members.get(node));
        lately.map(|(member, _)| member).chain(lost).any(|m| self.score(m, key) > mine)
    }

    fn best<'a>(&self, members: impl Iterator<Item = &'a Member>, key: StripeKey) -> Option<NodeId> {
        let scored = members.map(|member| (self.score(member, key), member.id));
        scored.max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))).map(|(_, id)| id)
    }

    fn ranked<'a>(
        &self,
        members: impl Iterator<Item = &'a Member>,
        key: StripeKey,
        at_most: usize,
    ) -> Vec<NodeId> {
        let mut scored: Vec<_> = members.map(|member| (self.score(member, key), member.id)).collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        scored.into_iter().take(at_most).map(|(_, id)| id).collect()
    }

    #[expect(clippy::cast_precision_loss, reason = "53 bits of a hash are plenty")]
    fn score(&self, member: &Member, key: StripeKey) -> f64 {
        let (mut low, mut high) = ([0; 8], [0; 8]);
        low.copy_from_slice(&member.id.0[..8]);
        high.copy_from_slice(&member.id.0[8..]);
        let node = mix(u64::from_le_bytes(low) ^ mix(u64::from_le_bytes(high)));
        let u = ((mix(node ^ key.hash()) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let seed = if member.seed { self.seed_weight } else { 1 };
        f64::from(member.capacity.max(1)) * f64::from(seed) / -u.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: u8) -> NodeId {
        NodeId([n; 16])
    }

    fn member(n: u8, capacity: u16, seed: bool) -> Member {
        Member { id: node(n), zone: Zone::default(), seed, settled: true, capacity }
    }

    fn keys() -> impl Iterator<Item = StripeKey> {
        (0..10_000).map(|n| StripeKey { content: ContentKey([3; 32]), stripe: StripeIndex(n) })
    }

    fn share(view: &View, n: u8) -> usize {
        keys().filter(|key| view.home(*key) == node(n)).count()
    }

    #[test]
    fn homes_follow_capacity_and_seeds() {
        let mut view = View::new(node(1), 4, Duration::from_millis(250));
        view.replace(Time(0), vec![member(1, 10, false), member(2, 20, false), member(3, 10, true)], true);
        // 1 : 2 : 4 of 10,000
        for (n, expected) in [(1, 1_429), (2, 2_857), (3, 5_714)] {
            let share = share(&view, n);
            assert!(share.abs_diff(expected) < 200, "node {n} is home of {share}, expected about {expected}");
        }
    }

    #[test]
    fn only_what_a_departed_home_held_moves() {
        let mut view = View::new(node(1), 4, Duration::from_millis(250));
        view.replace(Time(0), (1..=5).map(|n| member(n, 10, false)).collect(), true);
        let before: Vec<_> = keys().map(|key| view.home(key)).collect();
        let change = view.replace(Time(1), (1..=4).map(|n| member(n, 10, false)).collect(), true);
        assert_eq!(change.gone, [node(5)]);
        for (key, old) in keys().zip(before) {
            assert!(old == node(5) || view.home(key) == old);
            assert!(old != node(5) || view.is_orphaned(Time(1), key));
            assert!(old != node(1) || !view.is_orphaned(Time(1), key));
        }
    }

    #[test]
    fn the_unsettled_are_homes_only_among_themselves() {
        let mut view = View::new(node(1), 4, Duration::from_millis(250));
        let unsettled = |n| Member { settled: false, ..member(n, 10, false) };
        view.replace(Time(0), vec![unsettled(1), unsettled(2)], true);
        assert!(share(&view, 1) > 0);
        view.replace(Time(1), vec![unsettled(1), member(2, 10, false)], true);
        assert_eq!(share(&view, 1), 0);
    }

    #[test]
    fn who_is_there_at_a_cold_start_is_trusted_and_who_comes_later_is_not() {
        let mut view = View::new(node(1), 4, Duration::from_millis(250));
        let unsettled = |n| Member { settled: false, ..member(n, 10, false) };
        view.replace(Time(0), vec![unsettled(1), unsettled(2)], true);
        view.replace(Time(200_000), (1..=3).map(unsettled).collect(), true);
        assert_eq!(view.may_grant_from(), Some(Time(450_000)));
        view.advance(Time(450_000));
        view.replace(Time(500_000), (1..=4).map(unsettled).collect(), true);
        assert_eq!(view.may_grant_from(), Some(Time(0)));
        assert!(share(&view, 1) > 0 && share(&view, 3) > 0);
        assert_eq!(share(&view, 4), 0);
        view.replace(
            Time(600_000),
            vec![unsettled(1), unsettled(2), unsettled(3), member(4, 10, false)],
            true,
        );
        assert!(share(&view, 1) > 0 && share(&view, 4) > 0);
    }

    #[test]
    fn with_the_scope_of_a_zone_the_other_zones_do_not_exist() {
        let zoned = |n, zone: &str| Member { zone: Zone::new(zone).unwrap(), ..member(n, 10, false) };
        let mut view = View::new(node(1), 4, Duration::from_millis(250)).within(Scope::Zone);
        view.replace(Time(0), vec![zoned(1, "a"), zoned(2, "a"), zoned(3, "b")], true);
        assert!(share(&view, 1) > 0 && share(&view, 2) > 0);
        assert_eq!(share(&view, 3), 0);
        assert!(!view.is_reachable(node(3)));
    }

    #[test]
    fn a_suspect_is_passed_over_until_it_speaks() {
        let mut view = View::new(node(1), 4, Duration::from_millis(250));
        view.replace(Time(0), vec![member(1, 10, false), member(2, 10, false)], true);
        view.suspect(node(2), Evidence::Mute, Time(100));
        assert_eq!(share(&view, 2), 0);
        view.heard_from(node(2));
        assert!(share(&view, 2) > 0);
        view.suspect(node(2), Evidence::Lost, Time(100));
        view.advance(Time(101));
        assert!(view.is_prompt(node(2)));
    }

    #[test]
    fn the_mute_are_slow_and_the_lost_are_gone() {
        let mut view = View::new(node(1), 4, Duration::from_millis(250));
        view.replace(Time(0), vec![member(1, 10, false), member(2, 10, false)], true);
        let key = keys().next().unwrap();
        view.suspect(node(2), Evidence::Mute, Time(100));
        assert!(view.is_reachable(node(2)) && !view.is_prompt(node(2)));
        assert_eq!(view.likely_homes(key, 3, 3), [node(2)]);
        assert!(keys().all(|key| !view.is_orphaned(Time(1), key)));
        view.suspect(node(2), Evidence::Lost, Time(90));
        view.suspect(node(2), Evidence::Mute, Time(100));
        assert!(!view.is_reachable(node(2)));
        assert!(view.likely_homes(key, 3, 3).is_empty());
        assert!(keys().any(|key| view.is_orphaned(Time(1), key)));
    }
}
