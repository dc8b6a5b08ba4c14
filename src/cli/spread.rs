//! The second half of `windlass warm`: other nodes take what this one has.
//!
//! Nodes are chosen here, from what the membership tells: seeds first, then the zone that has fewest of the chosen. The
//! daemon offers, and each node takes into free room by its own rules. Invariant: exit code 0 means that every chosen node
//! has every content.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use anyhow::bail;
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::control::Daemon;
use crate::http::admin::view::Peer;
use crate::http::admin::{SPREAD_PATH, Spread, SpreadRequest, SpreadState};
use crate::store::PinName;

/// Between two questions how far they are.
const PAUSE: Duration = Duration::from_secs(1);

/// A node that came no further for this long does not get there: the daemon there gives up after 15 s.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which nodes, as `seed`, `zone=NAME` and a node's name with at most one `*`, with commas between: all must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Selector {
    seed: bool,
    zone: Option<String>,
    name: Option<String>,
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut selector = Self::default();
        for term in text.split(',') {
            match term.split_once('=') {
                Some(("zone", zone)) => selector.zone = Some(zone.to_owned()),
                Some((key, _)) => {
                    return Err(format!("{key}= is unknown: write seed, zone=NAME or a node's name"));
                }
                None if term == "seed" => selector.seed = true,
                None if term.is_empty() || term.matches('*').count() > 1 => {
                    return Err(format!("{term:?} is no node's name with at most one *"));
                }
                None => selector.name = Some(term.to_owned()),
            }
        }
        Ok(selector)
    }
}

impl Selector {
    fn selects(&self, peer: &Peer) -> bool {
        let is_named = self.name.as_ref().is_none_or(|name| match name.split_once('*') {
            Some((head, tail)) => {
                peer.name.len() >= head.len() + tail.len()
                    && peer.name.starts_with(head)
                    && peer.name.ends_with(tail)
            }
            None => peer.name == *name,
        });
        (!self.seed || peer.seed) && self.zone.as_ref().is_none_or(|zone| peer.zone == *zone) && is_named
    }
}

/// The nodes that shall have it: at most `count` of those that are selected.
fn choose(peers: &[Peer], selector: &Selector, count: Option<usize>) -> Vec<String> {
    let mut left: Vec<&Peer> = peers.iter().filter(|peer| selector.selects(peer)).collect();
    let mut by_zone = BTreeMap::<&str, usize>::new();
    let mut chosen = Vec::new();
    while count.is_none_or(|count| chosen.len() < count) {
        let rank = |peer: &&Peer| (!peer.seed, by_zone.get(peer.zone.as_str()).copied().unwrap_or(0));
        let Some(best) = (0..left.len()).min_by_key(|at| (rank(&left[*at]), left[*at].name.clone())) else {
            break;
        };
        let peer = left.swap_remove(best);
        *by_zone.entry(&peer.zone).or_default() += 1;
        chosen.push(peer.name.clone());
    }
    chosen
}

/// Has `replicas` nodes, this one included, or all that are selected, take what is stored here under `names`. Returns how
/// many others have all of it.
///
/// # Errors
/// When there are too few nodes, or one does not take it.
pub(super) async fn spread(
    daemon: &Daemon,
    names: Vec<PinName>,
    selector: &Selector,
    replicas: Option<usize>,
    show: impl Fn(u64),
) -> anyhow::Result<usize> {
    let peers: Vec<Peer> = daemon.get("/v1/peers").await?;
    let others = replicas.map(|replicas| replicas.saturating_sub(1));
    let nodes = choose(&peers, selector, others);
    if let Some(others) = others.filter(|others| *others > nodes.len()) {
        bail!("{others} other nodes are wanted and {} fit; see `windlass peers`", nodes.len());
    }
    if nodes.is_empty() {
        return Ok(0);
    }
    let request = serde_json::to_vec(&SpreadRequest { names, nodes: nodes.clone() })?;
    let mut moved = (u64::MAX, Instant::now());
    loop {
        let response = daemon.post(SPREAD_PATH, request.clone().into()).await?;
        let states: Vec<Spread> = serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?;
        let (missing, trouble) = sum(&states);
        show(missing);
        if missing == 0 && trouble.is_none() {
            return Ok(nodes.len());
        }
        if missing < moved.0 {
            moved = (missing, Instant::now());
        }
        let is_stuck = moved.1.elapsed() > PATIENCE;
        match trouble {
            Some(Spread { content, node, state: SpreadState::Refused }) => bail!(
                "{node} does not take {content}: it has no room without evicting something, or leaves; \
                 raise its store.budget, or choose others with --nodes"
            ),
            Some(Spread { content, node, .. }) if is_stuck => bail!("{node} does not answer about {content}"),
            None if is_stuck => {
                bail!("{missing} chunks are still to come, and nothing came for {PATIENCE:?}")
            }
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Chunks that are still to come, and the first node that gives no hope.
fn sum(states: &[Spread]) -> (u64, Option<Spread>) {
    let missing = states.iter().map(|one| match one.state {
        SpreadState::Coming(chunks) => u64::from(chunks),
        _ => 0,
    });
    let is_trouble = |one: &&Spread| matches!(one.state, SpreadState::Refused | SpreadState::Silent);
    let refused = states.iter().find(|one| one.state == SpreadState::Refused);
    (missing.sum(), refused.or_else(|| states.iter().find(is_trouble)).cloned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, zone: &str, seed: bool) -> Peer {
        Peer { name: name.into(), zone: zone.into(), seed, ..Peer::default() }
    }

    fn peers() -> Vec<Peer> {
        vec![
            peer("gpu-1", "a", false),
            peer("gpu-2", "a", false),
            peer("gpu-3", "b", false),
            peer("s", "b", true),
        ]
    }

    fn chosen(selector: &str, count: Option<usize>) -> Vec<String> {
        choose(&peers(), &selector.parse().expect("a selector"), count)
    }

    #[test]
    fn seeds_come_first_and_zones_take_turns() {
        assert_eq!(choose(&peers(), &Selector::default(), Some(3)), ["s", "gpu-1", "gpu-2"]);
        assert_eq!(chosen("gpu-*", Some(2)), ["gpu-1", "gpu-3"]);
        assert_eq!(choose(&peers(), &Selector::default(), None).len(), 4);
    }

    #[test]
    fn all_terms_must_hold() {
        assert_eq!(chosen("seed", None), ["s"]);
        assert_eq!(chosen("zone=b,gpu-*", None), ["gpu-3"]);
        assert_eq!(chosen("*-2", None), ["gpu-2"]);
        assert!(chosen("seed,zone=a", None).is_empty());
        for wrong in ["", "rack=1", "a*b*c", "seed,"] {
            assert!(wrong.parse::<Selector>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_refusal_is_worse_than_silence() {
        let spread = |state| Spread { content: "c".into(), node: "n".into(), state };
        let (missing, trouble) = sum(&[spread(SpreadState::Coming(3)), spread(SpreadState::There)]);
        assert_eq!((missing, trouble), (3, None));
        let (_, trouble) = sum(&[spread(SpreadState::Silent), spread(SpreadState::Refused)]);
        assert_eq!(trouble.map(|one| one.state), Some(SpreadState::Refused));
    }
}
