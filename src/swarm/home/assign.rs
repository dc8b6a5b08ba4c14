//! Whom a requester is sent to: the least loaded source, or the origin.
//!
//! A chunk that nobody has or fetches is leased to the first requester with a free origin slot, lowest chunks first.
//! Everything else is pulled from peers, a reader's chunks first and then the rarest. A node that is still
//! receiving is a source too, for at most `fanout` others, so that a chunk spreads as a tree while it arrives.

use std::time::Duration;

use super::budget::Budget;
use super::stripe::{Row, RowId, Sent, Standing, Stripe, bits};
use crate::swarm::core::{Core, millis};
use crate::swarm::member::{DEFAULT_CAPACITY, Member, Zone};
use crate::swarm::rng::mix;
use crate::swarm::time::Time;
use crate::wire::{Assignment, Candidate, MAX_CANDIDATES, Source};

/// Sources looked at for one assignment. The best of 8 random ones is within a percent of the best of all in the
/// reference simulation; some of these are excluded.
const SAMPLED_SOURCES: usize = 24;
/// Sources passed on the way to those, most of which may be fed by nobody; until one is found the look goes on.
const PASSED_SOURCES: usize = 4 * SAMPLED_SOURCES;
/// Pulls of one requester, in one stripe, of chunks at the frontier ([`Stripe::frontier`]). These run at the pace of an
/// origin fetch, or of a share of the only holder's uplink, and fill a requester's room with flows that trickle, while
/// whole copies of other chunks wait for it. Simulated with 4 GiB, the last of 32 nodes of a burst takes 1.038 times the
/// bound (six: 1.045), and the last of 128 after one warm node 1.13 (six: 1.19, without a limit 1.27).
const MAX_FRONTIER_PULLS: u32 = 4;
/// Load that makes up for a source that is itself still receiving, in 1/64 pulls: prefer whole copies a little.
const PARTIAL_HANDICAP: u32 = 32;
/// Leases that a first comer gets at once, and with each step of time: the first of a burst must not take all
/// before the others are heard.
const RAMP_LEASES: u32 = 2;
/// How often it is looked whether a chunk that somebody brings into a zone has come: a few chunk times. The gateway's own
/// news serves those who wait sooner; books that are wrong keep nobody waiting for long.
const CROSSING: Duration = Duration::from_millis(50);
/// Several message latencies.
const RAMP_STEP: Duration = Duration::from_millis(5);

/// What can be said about sources of one chunk for one requester.
enum Choice {
    /// Best first.
    Peers(Vec<RowId>),
    /// There are sources, but none has capacity now; one that was passed over for failing is tried again then.
    Full { until: Option<Time> },
    /// No reachable node has it or gets it from one that has.
    Nobody,
}

/// Whether, and how many, leases may be granted.
pub(super) struct Grants {
    pub(super) allowed: bool,
    /// First want of the stripe: where the ramp starts.
    pub(super) opened: Time,
}

impl Grants {
    /// Leases of this stripe that one node may hold, and whether that will be more a little later.
    fn per_node(&self, core: &Core, interested: u16) -> (u32, bool) {
        let fair = core.config.origin_flows_per_content / u32::from(interested).max(1);
        let fair = fair.min(core.config.origin_flows).max(1);
        if core.view.is_alone() {
            return (fair, false);
        }
        let steps = core.now.since(self.opened).as_micros() / RAMP_STEP.as_micros();
        let ramp = RAMP_LEASES.saturating_mul(u32::try_from(steps).unwrap_or(u32::MAX).saturating_add(1));
        (fair.min(ramp), ramp < fair)
    }
}

/// What one requester gets.
pub(super) struct Assigned {
    pub(super) assignments: Vec<Assignment>,
    /// There may be more then, although nothing else happens.
    pub(super) more_at: Option<Time>,
}

/// Assignments for one requester, taken into the table.
pub(super) fn assign(
    stripe: &mut Stripe,
    core: &mut Core,
    budget: &mut Budget,
    grants: &Grants,
    id: RowId,
) -> Assigned {
    stripe.judge(core.view.epoch(), |node| Standing {
        member: core.view.member(node).cloned(),
        zone: core.view.member(node).map_or(0, |member| fingerprint(&member.zone)),
        reachable: core.view.is_reachable(node),
        prompt: core.view.is_prompt(node),
    });
    let mut assignments = Vec::new();
    let ramping = grants.allowed && lease(stripe, core, budget, grants, id, &mut assignments);
    let ramp = ramping.then(|| core.now + RAMP_STEP);
    let sweet = pull(stripe, core, id, &mut assignments);
    let number = stripe.row(id).answers.wrapping_add(1);
    let now = core.now;
    let sent = assignments.iter().map(|assignment| Sent { number, bit: assignment.bit, at: now });
    stripe.row_mut(id).sent.extend(sent);
    Assigned { assignments, more_at: [ramp, sweet].into_iter().flatten().min() }
}

/// The flag says that waiting a ramp step will bring more.
fn lease(
    stripe: &mut Stripe,
    core: &mut Core,
    budget: &mut Budget,
    grants: &Grants,
    id: RowId,
    assignments: &mut Vec<Assignment>,
) -> bool {
    let (limit, ramping) = grants.per_node(core, stripe.interested());
    let (want, urgent) = (stripe.row(id).want, stripe.row(id).urgent);
    for bit in bits(want & urgent).chain(bits(want & !urgent)) {
        let row = stripe.row(id);
        if row.room == 0 || row.grants == 0 || !budget.has_room(core.now) {
            return false;
        }
        if row.leased.count_ones() >= limit {
            return ramping;
        }
        if stripe.chunk(bit).lease.is_some() || has_source(stripe, core, bit, id) {
            continue;
        }
        take(stripe, id, bit);
        stripe.update(id, |row| row.grants -= 1);
        stripe.begin_lease(bit, id, core.now);
        budget.leases += 1;
        core.stats.leases_granted += 1;
        assignments.push(Assignment { bit, source: Source::Origin });
    }
    false
}

/// Says when a source that was passed over for failing is tried again, if that kept a chunk back.
fn pull(stripe: &mut Stripe, core: &mut Core, id: RowId, assignments: &mut Vec<Assignment>) -> Option<Time> {
    let mut sweet: Option<Time> = None;
    let frontier = stripe.frontier();
    for bit in pull_order(stripe, core, frontier, id) {
        if stripe.row(id).room == 0 {
            break;
        }
        if must_wait(stripe, frontier, bit, id) {
            continue;
        }
        match choose(stripe, core, bit, id) {
            Choice::Peers(sources) => {
                take(stripe, id, bit);
                let candidates = candidates(stripe, bit, &sources);
                stripe.begin_pull(bit, id, Some(sources[0]));
                let digest = stripe.chunk(bit).digest;
                assignments.push(Assignment { bit, source: Source::Peers { candidates, digest } });
            }
            Choice::Full { until: None } => stripe.saturated.mark(stripe.row(id).standing.zone, bit),
            // Time alone frees this one, and nothing would clear the mark.
            Choice::Full { until: Some(until) } => {
                sweet = Some(sweet.map_or(until, |sweet| sweet.min(until)))
            }
            Choice::Nobody => {}
        }
    }
    sweet
}

/// Whether the requester has to leave this chunk until more nodes hold it whole.
fn must_wait(stripe: &Stripe, frontier: u64, bit: u8, id: RowId) -> bool {
    let row = stripe.row(id);
    let at_the_frontier = (frontier & !row.urgent) >> bit & 1 == 1;
    let is_awaited = stripe.children(bit, id) > 0;
    at_the_frontier && !is_awaited && (row.pulling & frontier).count_ones() >= MAX_FRONTIER_PULLS
}

/// A reader's chunks in order, then those that others already wait for at this node, whose own source failed, then those
/// with the fewest sources, ties at random. Chunks at the frontier come last: whoever attaches to one is bound to the pace
/// of its origin fetch, and room is scarce. Of these the lowest comes first, for one that is left behind keeps all windows
/// from moving on.
fn pull_order(stripe: &Stripe, core: &mut Core, frontier: u64, id: RowId) -> Vec<u8> {
    let row = stripe.row(id);
    let possible = row.want & !stripe.saturated.for_zone(row.standing.zone);
    let salt = core.rng.next();
    let mut rest: Vec<u8> = bits(possible & !row.urgent).collect();
    rest.sort_by_cached_key(|bit| {
        let chunk = stripe.chunk(*bit);
        let at_the_frontier = frontier >> bit & 1 == 1;
        let tie = if at_the_frontier { u64::from(*bit) } else { mix(salt ^ u64::from(*bit)) };
        (stripe.children(*bit, id) == 0, at_the_frontier, chunk.sources.len(), tie)
    });
    bits(possible & row.urgent).chain(rest).collect()
}

fn take(stripe: &mut Stripe, id: RowId, bit: u8) {
    stripe.update(id, |row| {
        row.want &= !(1 << bit);
        row.room -= 1;
    });
}

/// The chosen source, and whole copies to fall back on. Only whole ones: a fallback enters the table's books when the
/// requester tells of it, and until then only a whole copy can never depend on the requester. And none that is spared: a
/// requester that found its source not begun would run to it, past everybody.
fn candidates(stripe: &Stripe, bit: u8, sources: &[RowId]) -> Vec<Candidate> {
    let candidate = |id: &RowId| {
        let row = stripe.row(*id);
        Candidate { node: row.node, complete: row.have >> bit & 1 == 1 }
    };
    let free = |id: &&RowId| !is_spared(stripe, bit, **id);
    let fallbacks = sources[1..].iter().filter(free).map(candidate).filter(|candidate| candidate.complete);
    sources[..1].iter().map(candidate).chain(fallbacks).take(MAX_CANDIDATES).collect()
}

/// Whether somebody has the chunk, or gets it from one that has, be it busy or late, or not a member yet: nobody can be
/// sent to a node that membership has not told of, but it will any moment.
fn has_source(stripe: &Stripe, core: &Core, bit: u8, child: RowId) -> bool {
    let patience = millis(core.config.stranger_wait_ms);
    let is_new = |row: &Row| row.standing.member.is_none() && core.now.since(row.heard) < patience;
    let serves = |id: RowId| stripe.is_fed(bit, id, child) || (id != child && is_new(stripe.row(id)));
    stripe.chunk(bit).sources.iter().any(|source| serves(*source))
}

/// How good a source is, less being better: late with its answers, to be spared, loaded.
type Score = (bool, bool, u32);

fn choose(stripe: &Stripe, core: &mut Core, bit: u8, child: RowId) -> Choice {
    let sources = &stripe.chunk(bit).sources;
    if sources.is_empty() {
        return Choice::Nobody;
    }
    let start = core.rng.below(sources.len());
    let rotated = || sources[start..].iter().chain(&sources[..start]).copied();
    let zone = stripe.row(child).standing.zone;
    // The first to get a chunk into a zone is its gateway: the others wait for it rather than cross the border too, also
    // before anything of it is there, unless it is in trouble.
    let near = look(stripe, core, bit, child, rotated().filter(|id| stripe.row(*id).standing.zone == zone));
    if near.serves || !near.scored.is_empty() {
        return near.choice();
    }
    if !near.anyone && stripe.is_crossing(bit, child, core.now) {
        return Choice::Full { until: Some(core.now + CROSSING) };
    }
    let afar = look(stripe, core, bit, child, rotated().filter(|id| stripe.row(*id).standing.zone != zone));
    if afar.anyone { afar.choice() } else { near.choice() }
}

/// What some sources of a chunk are like.
#[derive(Default)]
struct Look {
    anyone: bool,
    /// One of them is in order, be it busy.
    serves: bool,
    scored: Vec<(Score, RowId)>,
    /// When the first of those that failed is tried again.
    until: Option<Time>,
}

impl Look {
    /// Best first.
    fn choice(mut self) -> Choice {
        self.scored.sort_by_key(|(score, _)| *score);
        match (self.anyone, self.scored.is_empty()) {
            (false, _) => Choice::Nobody,
            (true, true) => Choice::Full { until: self.until },
            (true, false) => Choice::Peers(self.scored.into_iter().map(|(_, source)| source).collect()),
        }
    }
}

fn look(stripe: &Stripe, core: &Core, bit: u8, child: RowId, sources: impl Iterator<Item = RowId>) -> Look {
    let (mut look, mut kept_back) = (Look::default(), Vec::new());
    let mut sampled = 0;
    for (passed, source) in sources.enumerate() {
        if sampled == SAMPLED_SOURCES || (look.anyone && passed >= PASSED_SOURCES) {
            break;
        }
        if !stripe.is_fed(bit, source, child) {
            continue;
        }
        sampled += 1;
        look.anyone = true;
        let row = stripe.row(source);
        if row.sour_until > core.now {
            look.until = Some(look.until.map_or(row.sour_until, |until| until.min(row.sour_until)));
            continue;
        }
        let scored = score(stripe, core, bit, source).map(|score| (score, source));
        if is_kept_back(stripe, bit, source) {
            kept_back.extend(scored);
        } else {
            look.serves |= row.standing.prompt;
            look.scored.extend(scored);
        }
    }
    if !look.serves {
        look.serves = !kept_back.is_empty();
        look.scored.append(&mut kept_back);
    }
    look
}

/// A node that wants nothing, of a chunk that others hold too: it may alone have others, of this stripe or of one with
/// another home, and for what it sends twice they are waited for.
fn is_kept_back(stripe: &Stripe, bit: u8, source: RowId) -> bool {
    !stripe.row(source).is_interested() && !is_unique(stripe, bit, source)
}

/// It alone has the chunk, or is a seed: each chunk should leave it once.
fn is_unique(stripe: &Stripe, bit: u8, source: RowId) -> bool {
    let row = stripe.row(source);
    let is_seed = row.standing.member.as_ref().is_some_and(|member| member.seed);
    row.have >> bit & 1 == 1 && (is_seed || stripe.chunk(bit).holders == 1)
}

/// Its uplink is for what the others lack: it alone has the chunk, or it wants nothing itself, so that it may be all that
/// the others started from.
fn is_spared(stripe: &Stripe, bit: u8, source: RowId) -> bool {
    let row = stripe.row(source);
    let is_idle_holder = row.have >> bit & 1 == 1 && !row.is_interested();
    let is_rare = stripe.chunk(bit).holders < u32::from(stripe.interested());
    is_unique(stripe, bit, source) || (is_idle_holder && is_rare)
}

/// `None` when the source has no capacity for this requester now.
fn score(stripe: &Stripe, core: &Core, bit: u8, source: RowId) -> Option<Score> {
    let row = stripe.row(source);
    let member = row.standing.member.as_ref()?;
    let complete = row.have >> bit & 1 == 1;
    let unique = is_unique(stripe, bit, source);
    let children = stripe.children(bit, source);
    // A node that wants nothing itself and alone has the chunk is where the others start from.
    let is_origin = member.seed || (unique && !row.is_interested());
    let sole_slots = core.config.sole_slots(stripe.interested());
    let slots = if is_origin { sole_slots } else { core.config.upload_slots };
    let most_children = match (unique, complete) {
        (true, _) => 1,
        (false, true) => u32::MAX,
        (false, false) => core.config.fanout,
    };
    let open = row.serving < scaled(slots, member) && children < most_children;
    if !open {
        return None;
    }
    let load = row.serving * 64 * u32::from(DEFAULT_CAPACITY) / u32::from(member.capacity.max(1));
    let late = !row.standing.prompt;
    let spared = is_spared(stripe, bit, source);
    Some((late, spared, load + if complete { 0 } else { PARTIAL_HANDICAP }))
}

/// Zones are compared with every source of every assignment; two that share a fingerprint would only cost preference.
fn fingerprint(zone: &Zone) -> u64 {
    zone.as_str().bytes().fold(1, |hash, byte| mix(hash ^ u64::from(byte)))
}

/// A number meant for a node of usual capacity, for this one; at least 1.
pub(crate) fn scaled(number: u32, member: &Member) -> u32 {
    (number * u32::from(member.capacity) / u32::from(DEFAULT_CAPACITY)).max(1)
}
