//! Who is in the cluster: SWIM (Das, Gupta, Motivala 2002) by foca, without sockets or a clock.
//!
//! Invariant: a packet counts only when the transport authenticated its sender as the node it claims to come from.
//! Refuses to resolve names and to dial: the caller supplies identities to announce to, and delivers what
//! [`Membership::poll_action`] says.
//!
//! Same grammar as [`Swarm`](crate::swarm::Swarm): `handle_*` in, `poll_*` out, `now` as an argument.

mod identity;
mod timers;

use std::collections::{BTreeMap, VecDeque};
use std::num::{NonZeroU8, NonZeroU32, NonZeroUsize};
use std::time::Duration;

use bytes::Bytes;
use foca::{
    Codec, Foca, Header, NoCustomBroadcast, Notification, PeriodicParams, PostcardCodec, Runtime, Timer,
};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use crate::content::NodeId;
use crate::swarm::{Member, Time};

pub use identity::{BadName, MAX_NAME_BYTES, NodeIdentity};

use timers::Timers;

/// Largest packet: a fresh QUIC connection carries datagrams of 1,162 bytes (`facts/crates.md`, Membership).
pub const MAX_PACKET_BYTES: usize = 1_150;

/// Members learnt this long after first contact belong to the first sync; a cluster of 2,000 names itself in some
/// hundred packets.
const SYNC_WINDOW: Duration = Duration::from_secs(1);

/// `[membership]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// A random member is probed this often, in milliseconds.
    pub probe_period_ms: u64,
    /// A probe not answered for this long is tried through others, in milliseconds. Below the period.
    pub probe_timeout_ms: u64,
    /// A suspect that does not speak up for this long is down, in milliseconds.
    pub suspect_to_down_ms: u64,
    /// News are passed on this often, in milliseconds.
    pub gossip_interval_ms: u64,
    /// A member becomes a home this long after it was first seen, in milliseconds: until then not everybody may
    /// know it.
    pub settle_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            probe_period_ms: 1_000,
            // A node that is unpacking an image at full load has been seen to answer after 200 ms.
            probe_timeout_ms: 400,
            suspect_to_down_ms: 3_000,
            // With three random receivers each, 2,000 members know within seven rounds: 1.4 s.
            gossip_interval_ms: 200,
            settle_ms: 2_000,
        }
    }
}

/// In `settles`: no longer waiting.
const SETTLED: Time = Time(0);

/// What the caller must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipAction {
    /// Deliver a packet, or lose it: SWIM copes.
    Send { to: NodeIdentity, bytes: Bytes },
    /// [`Membership::members`] changed.
    Changed,
}

/// A member as this node sees it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownMember {
    pub identity: NodeIdentity,
    /// Seen long enough for everybody to know it.
    pub settled: bool,
}

/// Who is in the cluster and how to reach them, this node included.
#[derive(Debug, Clone, Default)]
pub struct PeerBook {
    /// For the swarm.
    pub members: Vec<Member>,
    pub identities: BTreeMap<NodeId, NodeIdentity>,
    /// Whether the first exchange with the cluster is over, or there is nobody to exchange with.
    pub synced: bool,
}

impl PeerBook {
    #[must_use]
    pub fn new(known: Vec<KnownMember>, synced: bool) -> Self {
        let members = known.iter().map(KnownMember::member).collect();
        let identities = known.into_iter().map(|member| (member.identity.id(), member.identity)).collect();
        Self { members, identities, synced }
    }
}

impl KnownMember {
    fn member(&self) -> Member {
        Member {
            id: self.identity.id(),
            zone: self.identity.zone.clone(),
            seed: self.identity.seed,
            settled: self.settled,
            capacity: self.identity.capacity,
        }
    }
}

/// Why a packet was dropped. The sender is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    #[error("a membership packet from {from} claims to come from another node")]
    Forged { from: NodeId },
    #[error("a membership packet does not parse: {0}")]
    Malformed(String),
}

/// The membership of one node.
pub struct Membership {
    foca: Foca<NodeIdentity, PostcardCodec, StdRng, NoCustomBroadcast>,
    config: Config,
    effects: Effects,
    timers: Timers,
    first_contact: Option<Time>,
    /// When each member, this node included, counts as settled; zero once it does.
    settles: BTreeMap<NodeId, Time>,
}

/// What foca wants done, until it is polled or scheduled.
#[derive(Default)]
struct Effects {
    actions: VecDeque<MembershipAction>,
    scheduled: Vec<(Timer<NodeIdentity>, Duration)>,
    up: Vec<NodeIdentity>,
    down: Vec<NodeId>,
    changed: bool,
}

impl Membership {
    /// `seed` makes its random choices repeatable.
    #[must_use]
    pub fn new(now: Time, config: Config, local: NodeIdentity, seed: u64) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        let settles = now + Duration::from_millis(config.settle_ms);
        let settles = BTreeMap::from([(local.id(), settles)]);
        Self {
            foca: Foca::new(local, foca_config(&config, 1), rng, PostcardCodec),
            config,
            effects: Effects::default(),
            timers: Timers::default(),
            first_contact: None,
            settles,
        }
    }

    #[must_use]
    pub fn local(&self) -> &NodeIdentity {
        self.foca.identity()
    }

    /// Introduces this node to `peer`, which answers with the members it knows. Its boot time may be unknown (0).
    pub fn announce(&mut self, now: Time, peer: NodeIdentity) {
        let outcome = self.foca.announce(peer, &mut self.effects);
        self.settle_effects(now, outcome.err());
    }

    /// A packet that the transport authenticated as coming from `from`.
    ///
    /// # Errors
    /// When it is not a packet of that node; nothing was changed by it.
    pub fn handle_datagram(&mut self, now: Time, from: NodeId, bytes: &[u8]) -> Result<(), PacketError> {
        let malformed = |error: &dyn std::fmt::Display| PacketError::Malformed(error.to_string());
        let header: Header<NodeIdentity> =
            PostcardCodec.decode_header(bytes).map_err(|error| malformed(&error))?;
        if header.src.id() != from {
            return Err(PacketError::Forged { from });
        }
        let outcome = self.foca.handle_data(bytes, &mut self.effects);
        let error = outcome.as_ref().err().map(|error| malformed(error));
        self.settle_effects(now, None);
        error.map_or(Ok(()), Err)
    }

    /// Call when [`Self::poll_timeout`] is reached.
    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(timer) = self.timers.pop_due(now) {
            let outcome = self.foca.handle_timer(timer, &mut self.effects);
            self.settle_effects(now, outcome.err());
        }
        for at in self.settles.values_mut().filter(|at| SETTLED < **at && **at <= now) {
            *at = SETTLED;
            self.effects.changed = true;
        }
        self.settle_effects(now, None);
    }

    /// Tells the others that this node goes. Deliver the actions that follow.
    pub fn leave(&mut self, now: Time) {
        let outcome = self.foca.leave_cluster(&mut self.effects);
        self.settle_effects(now, outcome.err());
    }

    #[must_use]
    pub fn poll_action(&mut self) -> Option<MembershipAction> {
        self.effects.actions.pop_front()
    }

    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        [self.timers.next(), self.next_settling()].into_iter().flatten().min()
    }

    /// Whether some other member is known.
    #[must_use]
    pub fn has_company(&self) -> bool {
        self.foca.num_members() > 0
    }

    /// The other members and, last, this node itself.
    #[must_use]
    pub fn members(&self) -> Vec<KnownMember> {
        let settled = |identity: &NodeIdentity| self.settles.get(&identity.id()) == Some(&SETTLED);
        let others = self.foca.iter_members().map(|member| member.id());
        let mut members: Vec<_> =
            others.map(|id| KnownMember { identity: id.clone(), settled: settled(id) }).collect();
        let local = self.foca.identity();
        members.push(KnownMember { settled: members.is_empty() || settled(local), identity: local.clone() });
        members
    }

    fn next_settling(&self) -> Option<Time> {
        self.settles.values().copied().filter(|at| *at > SETTLED).min()
    }

    /// Takes over what foca did in one call.
    fn settle_effects(&mut self, now: Time, error: Option<foca::Error>) {
        if let Some(error) = error {
            tracing::debug!(%error, "membership");
        }
        for (timer, after) in self.effects.scheduled.drain(..) {
            self.timers.push(now + after, timer);
        }
        for id in std::mem::take(&mut self.effects.down) {
            self.settles.remove(&id);
        }
        for identity in std::mem::take(&mut self.effects.up) {
            let at = self.settling_time(now, &identity);
            self.settles.insert(identity.id(), at);
        }
        if std::mem::take(&mut self.effects.changed) {
            self.fit_to_size();
            self.effects.actions.push_back(MembershipAction::Changed);
        }
    }

    /// Members that were there before this node started are known to everybody: they settle at once.
    fn settling_time(&mut self, now: Time, identity: &NodeIdentity) -> Time {
        let first = *self.first_contact.get_or_insert(now);
        let older = identity.boot_ms + self.config.settle_ms <= self.foca.identity().boot_ms;
        if older && now.since(first) <= SYNC_WINDOW {
            SETTLED
        } else {
            now + Duration::from_millis(self.config.settle_ms)
        }
    }

    /// A larger cluster repeats news more often.
    fn fit_to_size(&mut self) {
        if let Err(error) = self.foca.set_config(foca_config(&self.config, self.foca.num_members() + 1)) {
            tracing::debug!(%error, "membership configuration not adapted");
        }
    }
}

impl Runtime<NodeIdentity> for Effects {
    fn notify(&mut self, notification: Notification<'_, NodeIdentity>) {
        match notification {
            Notification::MemberUp(identity) => self.up.push(identity.clone()),
            Notification::MemberDown(identity) => self.down.push(identity.id()),
            // A restart in place: not settled again, everybody knows the node; its address may be new.
            Notification::Rename(..) => {}
            Notification::Active | Notification::Idle | Notification::Defunct | Notification::Rejoin(_) => {}
        }
        self.changed = true;
    }

    fn send_to(&mut self, to: NodeIdentity, data: &[u8]) {
        self.actions.push_back(MembershipAction::Send { to, bytes: Bytes::copy_from_slice(data) });
    }

    fn submit_after(&mut self, event: Timer<NodeIdentity>, after: Duration) {
        self.scheduled.push((event, after));
    }
}

/// foca's numbers for a cluster of `members`. Of ours, only those change that foca lets change while it runs.
fn foca_config(config: &Config, members: usize) -> foca::Config {
    let size = u32::try_from(members).ok().and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MIN);
    let ms = |ms: u64| Duration::from_millis(ms.max(1));
    let count = |n: usize| NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN);
    let every = |frequency, n| Some(PeriodicParams { frequency, num_members: count(n) });
    foca::Config {
        probe_period: ms(config.probe_period_ms.max(config.probe_timeout_ms + 1)),
        probe_rtt: ms(config.probe_timeout_ms),
        num_indirect_probes: count(3),
        max_transmissions: NonZeroU8::new(5).unwrap_or(NonZeroU8::MIN).max(
            // The logarithm of the size times four, as memberlist has it.
            foca::Config::new_lan(size).max_transmissions,
        ),
        suspect_to_down_after: ms(config.suspect_to_down_ms),
        // Spot nodes never come back under their names: without a limit the dead would pile up.
        remove_down_after: Some(Duration::from_secs(3_600)),
        max_packet_size: count(MAX_PACKET_BYTES),
        notify_down_members: true,
        periodic_announce: every(Duration::from_secs(30), 1),
        periodic_announce_to_down_members: every(Duration::from_secs(10), 2),
        periodic_gossip: every(ms(config.gossip_interval_ms), 3),
    }
}

#[cfg(test)]
mod tests;
