//! A small network in virtual time.

use super::*;
use crate::swarm::Zone;

struct Network {
    now: Time,
    nodes: Vec<Membership>,
    cut: Vec<usize>,
    wire: VecDeque<(usize, NodeIdentity, Bytes)>,
}

fn identity(n: usize, boot_ms: u64) -> NodeIdentity {
    let addr = std::net::SocketAddr::from(([10, 0, 0, 1], 5_000 + u16::try_from(n).unwrap()));
    NodeIdentity::new(&format!("node-{n}"), addr, boot_ms, Zone::default(), false, 10).unwrap()
}

impl Network {
    fn new(n: usize) -> Self {
        let nodes = (0..n)
            .map(|n| Membership::new(Time(0), Config::default(), identity(n, 1_000), n as u64))
            .collect();
        Self { now: Time(0), nodes, cut: Vec::new(), wire: VecDeque::new() }
    }

    fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        while self.now < end {
            self.deliver();
            self.now = self.now + Duration::from_millis(10);
            for node in &mut self.nodes {
                if node.poll_timeout().is_some_and(|at| at <= self.now) {
                    node.handle_timeout(self.now);
                }
            }
        }
    }

    fn deliver(&mut self) {
        loop {
            for (n, node) in self.nodes.iter_mut().enumerate() {
                while let Some(action) = node.poll_action() {
                    if let MembershipAction::Send { to, bytes } = action {
                        assert!(bytes.len() <= MAX_PACKET_BYTES);
                        self.wire.push_back((n, to, bytes));
                    }
                }
            }
            let Some((from, to, bytes)) = self.wire.pop_front() else { return };
            let target = self.nodes.iter().position(|node| node.local().id() == to.id()).unwrap();
            if self.cut.contains(&from) || self.cut.contains(&target) {
                continue;
            }
            let sender = self.nodes[from].local().id();
            self.nodes[target].handle_datagram(self.now, sender, &bytes).unwrap();
        }
    }

    fn sees(&mut self, n: usize) -> Vec<String> {
        let mut names: Vec<_> =
            self.nodes[n].members().iter().map(|m| m.identity.name().to_owned()).collect();
        names.sort();
        names
    }
}

#[test]
fn all_find_each_other_through_one_and_settle() {
    let mut network = Network::new(5);
    for n in 1..5 {
        network.nodes[n].announce(Time(0), identity(0, 0));
    }
    network.run(Duration::from_secs(1));
    for n in 0..5 {
        assert_eq!(network.sees(n).len(), 5, "node {n}");
    }
    network.run(Duration::from_secs(3));
    for n in 0..5 {
        assert!(network.nodes[n].members().iter().all(|member| member.settled), "node {n}");
    }
}

#[test]
fn the_dead_are_noticed_and_a_restart_comes_back_at_once() {
    let mut network = Network::new(4);
    for n in 1..4 {
        network.nodes[n].announce(Time(0), identity(0, 0));
    }
    network.run(Duration::from_secs(2));
    network.cut.push(3);
    network.run(Duration::from_secs(15));
    assert_eq!(network.sees(0).len(), 3);
    network.cut.clear();
    network.nodes[3] = Membership::new(network.now, Config::default(), identity(3, 2_000), 99);
    let now = network.now;
    network.nodes[3].announce(now, identity(0, 0));
    network.run(Duration::from_secs(1));
    for n in 0..4 {
        assert_eq!(network.sees(n).len(), 4, "node {n}");
    }
}

#[test]
fn a_packet_in_another_nodes_name_is_refused() {
    let mut network = Network::new(2);
    network.nodes[1].announce(Time(0), identity(0, 0));
    let Some(MembershipAction::Send { bytes, .. }) = network.nodes[1].poll_action() else {
        panic!("announces")
    };
    let stranger = NodeId::from_name("stranger");
    let refused = network.nodes[0].handle_datagram(Time(0), stranger, &bytes);
    assert_eq!(refused, Err(PacketError::Forged { from: stranger }));
    assert!(network.nodes[0].handle_datagram(Time(0), stranger, b"garbage").is_err());
    assert!(!network.nodes[0].has_company());
}
