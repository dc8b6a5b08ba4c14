//! Whether the other nodes can be reached, with this node's certificate, in packets of which size.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;

use super::Scene;
use super::finding::Finding;
use super::udp::{self, Reach};
use crate::config::Config;
use crate::http::admin::view::Peer;
use crate::transport::tls::{Authority, Files, Identity};

const CERTIFICATE: &str = "certificate";
const PEERS: &str = "peers";
const MTU: &str = "mtu";
const GSO: &str = "gso";
const BUFFERS: &str = "socket-buffers";

/// Peers that are asked: enough to see a rule that shuts some out, few enough for a second.
const ASKED: usize = 16;

/// Where packets of Ethernet's usual 1,500 bytes end: less what IPv4 and UDP take.
const ETHERNET_BYTES: usize = 1_472;

/// A certificate that ends sooner is warned of: cert-manager renews at a third of what is left, and a person needs a day.
const SOON: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What is mended when packets do not arrive.
const OPEN_THE_PORT: &str = "allow UDP 5103 between all nodes, in both directions: in the security groups of the nodes \
    (an ingress rule whose source is the group itself), and in any NetworkPolicy that selects the windlass pods; with \
    `kubectl get networkpolicy -A` look for one that the chart did not make";

/// Runs the checks of this file.
pub(super) async fn check(scene: &Scene) -> Vec<Finding> {
    let mut findings = vec![judge_offload(), judge_buffers(scene)];
    if scene.config.node.standalone {
        findings.push(Finding::skip(PEERS, "node.standalone is set: this node works alone"));
        return findings;
    }
    findings.push(check_certificate(&scene.config));
    let known: Result<Vec<Peer>, _> = scene.daemon.get("/v1/peers").await;
    let known = known.map_err(|error| error.to_string());
    let targets = targets(&scene.config, known.as_deref().unwrap_or_default()).await;
    let probed = probe(&targets, scene.config.transport.mtu_upper_bound).await;
    findings.push(judge_peers(&scene.config, known.as_deref(), &probed));
    findings.push(judge_mtu(&probed, scene.config.transport.mtu_upper_bound));
    findings
}

fn check_certificate(config: &Config) -> Finding {
    let tls = &config.tls;
    let name = format!("windlass://{}/{}", config.node.cluster, config.node.name);
    let reissue = format!(
        "windlass certs issue --ca DIR --cluster {} --node {} --out DIR, or let cert-manager do it with that URI name",
        config.node.cluster, config.node.name
    );
    let why = "no peer talks to this node without a certificate that it believes";
    if let Some(key) = &tls.ca_key {
        let read = |path: &std::path::Path| {
            std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
        };
        let loaded = read(&tls.ca).and_then(|ca| Ok((ca, read(key)?)));
        return match loaded.and_then(|(ca, key)| Authority::from_pem(&ca, &key).map_err(|e| e.to_string())) {
            Ok(_) => Finding::pass(CERTIFICATE, format!("{name} is signed by this node itself")),
            Err(error) => {
                Finding::fail(CERTIFICATE, error, why, "mount the CA and its key that all nodes share")
            }
        };
    }
    let files = Files { ca: tls.ca.clone(), certificate: tls.certificate.clone(), key: tls.key.clone() };
    let identity = match Identity::load(files, &config.node.cluster) {
        Ok(identity) => identity,
        Err(error) => return Finding::fail(CERTIFICATE, error.to_string(), why, reissue),
    };
    if identity.name().node() != config.node.name {
        let what = format!("{} is for {}, not for {name}", tls.certificate.display(), identity.name().uri());
        return Finding::fail(CERTIFICATE, what, why, reissue);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let left = Duration::from_secs(identity.expires_unix_s().saturating_sub(now));
    let days = left.as_secs() / 86_400;
    if left < SOON {
        let what = format!("{} ends in {days} days", identity.name().uri());
        return Finding::warn(CERTIFICATE, what, "after that no peer talks to this node", reissue);
    }
    Finding::pass(CERTIFICATE, format!("{} for {days} more days", identity.name().uri()))
}

/// The peers that the daemon knows, and what `gossip.peers` stands for, less this node. By address, with the name of
/// those who are members.
async fn targets(config: &Config, known: &[Peer]) -> BTreeMap<SocketAddr, Option<String>> {
    let mut targets = BTreeMap::new();
    for name in &config.gossip.peers {
        if let Ok(found) = tokio::net::lookup_host(name).await {
            targets.extend(found.filter(|address| !is_own(address.ip())).map(|address| (address, None)));
        }
    }
    for peer in known {
        if let Ok(address) = peer.address.parse() {
            targets.insert(address, Some(peer.name.clone()));
        }
    }
    targets.into_iter().take(ASKED).collect()
}

/// Whether it is an address of this node: only then can a socket be bound to it.
fn is_own(ip: IpAddr) -> bool {
    std::net::UdpSocket::bind((ip, 0)).is_ok()
}

/// One peer, and how far packets of three sizes got.
#[derive(Debug, Clone)]
struct Probed {
    address: SocketAddr,
    /// Its name, if the daemon counts it as a member: then both have believed the other's certificate.
    member: Option<String>,
    least: Reach,
    ethernet: Reach,
    largest: Reach,
}

async fn probe(targets: &BTreeMap<SocketAddr, Option<String>>, largest: u16) -> Vec<Probed> {
    join_all(targets.iter().map(|(address, member)| async move {
        let address = *address;
        let (least, ethernet, largest) = tokio::join!(
            udp::reach(address, udp::LEAST_BYTES),
            udp::reach(address, ETHERNET_BYTES),
            udp::reach(address, largest.into()),
        );
        Probed { address, member: member.clone(), least, ethernet, largest }
    }))
    .await
}

fn judge_peers(config: &Config, known: Result<&[Peer], &String>, probed: &[Probed]) -> Finding {
    let silent: Vec<_> = probed.iter().filter(|one| one.least != Reach::Answered).collect();
    let strangers: Vec<_> =
        probed.iter().filter(|one| one.least == Reach::Answered && one.member.is_none()).collect();
    let alone = "without peers every byte comes from the registry or S3";
    if let Some(one) = silent.first() {
        let how = match &one.least {
            Reach::Shut(error) => error.clone(),
            _ => "no answer".into(),
        };
        let what = format!(
            "{} of {} peers do not answer on UDP, such as {} ({how})",
            silent.len(),
            probed.len(),
            one.address
        );
        return Finding::fail(PEERS, what, alone, OPEN_THE_PORT);
    }
    let members = match known {
        Ok(members) => members.len(),
        Err(error) => return Finding::skip(PEERS, format!("{} answer on UDP; {error}", probed.len())),
    };
    if let Some(one) = strangers.first() {
        let what = format!("{} answers on UDP and is no peer of this node", one.address);
        let cure = format!(
            "give both nodes certificates of the same CA for cluster {} (`windlass certs issue`, or the same \
             cert-manager issuer), and check `node.cluster` and the clock on both; their logs say who refuses whom",
            config.node.cluster
        );
        return Finding::fail(PEERS, what, "one of the two does not believe the other's certificate", cure);
    }
    if members == 0 && config.gossip.peers.is_empty() {
        let cure = "gossip.peers = [\"windlass-peers.windlass.svc:5103\"]";
        return Finding::warn(PEERS, "gossip.peers is empty and nobody came", alone, cure);
    }
    if members == 0 {
        let what = format!("nobody is found at {}", config.gossip.peers.join(", "));
        let cure = "start windlass on another node, or correct `gossip.peers`: `getent hosts NAME` must list the nodes";
        return Finding::warn(PEERS, what, alone, cure);
    }
    Finding::pass(PEERS, format!("{members} members; {} asked, all answer on UDP", probed.len()))
}

fn judge_mtu(probed: &[Probed], largest: u16) -> Finding {
    let reached: Vec<_> = probed.iter().filter(|one| one.least == Reach::Answered).collect();
    let Some(first) = reached.first() else { return Finding::skip(MTU, "no peer answers") };
    if reached.iter().all(|one| one.largest == Reach::Answered) {
        return Finding::pass(
            MTU,
            format!("packets of {largest} bytes reach all {} peers asked", reached.len()),
        );
    }
    let small = reached.iter().find(|one| one.largest != Reach::Answered).unwrap_or(first);
    let carries = if small.ethernet == Reach::Answered { "1500" } else { "less than 1500" };
    let where_ = if small.largest == Reach::TooLong { "this node's interface" } else { "the path" };
    let what = format!("to {} {where_} carries an MTU of {carries}", small.address);
    let cure = "in one VPC set the nodes' interfaces to 9001 (Amazon VPC CNI: AWS_VPC_ENI_MTU=9001 on the aws-node \
                DaemonSet); for a network that carries no more, set transport.mtu_upper_bound = 1452";
    Finding::warn(MTU, what, "six times as many packets for the same bytes: about half the speed", cure)
}

fn judge_offload() -> Finding {
    match udp::offload() {
        Ok(offload) if offload.segments > 1 => {
            Finding::pass(GSO, format!("the kernel takes {} packets in one call", offload.segments))
        }
        Ok(_) => Finding::warn(
            GSO,
            "the kernel takes one UDP packet per call",
            "each packet costs a system call: about a third of the speed",
            "run a kernel of 4.18 or newer, and do not turn tx-udp-segmentation off (`ethtool -k eth0`)",
        ),
        Err(error) => Finding::skip(GSO, error.to_string()),
    }
}

fn judge_buffers(scene: &Scene) -> Finding {
    let wanted = u64::from(scene.config.transport.socket_buffer_bytes);
    let limit = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/proc/sys/net/core/{name}")).ok()?.trim().parse().ok()
    };
    match (limit("rmem_max"), limit("wmem_max")) {
        (Some(read), Some(write)) if read.min(write) >= wanted => {
            Finding::pass(BUFFERS, format!("net.core allows {} bytes each way", read.min(write)))
        }
        (Some(read), Some(write)) => Finding::warn(
            BUFFERS,
            format!("net.core allows {read} bytes in and {write} out, and {wanted} are asked for"),
            "bursts of peers are dropped and sent again, unless the daemon has CAP_NET_ADMIN, which passes the limit",
            format!("sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted}"),
        ),
        _ => Finding::skip(BUFFERS, "net.core is not readable here"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict::{Fail, Pass, Skip, Warn};
    use super::*;

    fn probed(member: bool, least: Reach, ethernet: Reach, largest: Reach) -> Probed {
        let member = member.then(|| "n2".to_owned());
        Probed { address: ([10, 0, 0, 2], 5103).into(), member, least, ethernet, largest }
    }

    #[test]
    fn silence_a_stranger_and_nobody_are_told_apart() {
        use Reach::{Answered, Silent};
        let mut config = Config::default();
        config.gossip.peers = vec!["peers:5103".into()];
        let members = [Peer::default()];
        let judge = |members: &[Peer], probed: &[Probed]| judge_peers(&config, Ok(members), probed);
        let fine = probed(true, Answered, Answered, Answered);
        assert_eq!(judge(&members, std::slice::from_ref(&fine)).verdict, Pass);
        let silent = probed(false, Silent, Silent, Silent);
        let blocked = judge(&members, &[fine, silent]);
        assert!(blocked.verdict == Fail && blocked.cure.contains("NetworkPolicy"), "{blocked:?}");
        let stranger = judge(&[], &[probed(false, Answered, Answered, Answered)]);
        assert!(stranger.verdict == Fail && stranger.cure.contains("same CA"), "{stranger:?}");
        assert_eq!(judge(&[], &[]).verdict, Warn);
    }

    #[test]
    fn a_small_path_is_warned_of_and_placed() {
        use Reach::{Answered, Silent, TooLong};
        assert_eq!(judge_mtu(&[], 8_952).verdict, Skip);
        assert_eq!(judge_mtu(&[probed(true, Answered, Answered, Answered)], 8_952).verdict, Pass);
        let path = judge_mtu(&[probed(true, Answered, Answered, Silent)], 8_952);
        assert!(path.verdict == Warn && path.what.contains("the path carries an MTU of 1500"), "{path:?}");
        let own = judge_mtu(&[probed(true, Answered, Answered, TooLong)], 8_952);
        assert!(own.what.contains("this node's interface"), "{own:?}");
    }
}
