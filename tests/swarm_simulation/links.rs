//! How transfers share links and the origin: close to max-min fairness, as TCP and QUIC share them in the long run.
//!
//! In each round every transfer that still needs bytes, and whose every bottleneck has some left, takes an equal share of
//! what they have. Rounds go on until one moves next to nothing: three rounds, which counted transfers that were stuck
//! at another bottleneck as users, left 2 to 4 percent of all links idle that real transfers would have filled.

/// The origin as a source.
pub(super) const ORIGIN: u32 = u32::MAX;
const MOST_ROUNDS: usize = 12;
/// A round that moves less than this share of the step is the last.
const LAST_ROUND: f64 = 0.001;
/// Bytes that are nothing.
const LEAST: f64 = 0.5;

/// A transfer that can move bytes in this step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    pub(super) flow: u32,
    pub(super) from: u32,
    pub(super) to: u32,
    /// Bytes that the source has and the destination lacks.
    pub(super) need: f64,
    pub(super) moved: f64,
}

/// One capacity and those who share it.
#[derive(Clone, Copy, Debug, Default)]
struct Pipe {
    left: f64,
    share: f64,
    users: u32,
}

impl Pipe {
    fn divide(&mut self) {
        self.share = if self.users == 0 { 0.0 } else { self.left / f64::from(self.users) };
        self.users = 0;
    }
}

#[derive(Debug, Default)]
pub(super) struct Links {
    up: Vec<Pipe>,
    down: Vec<Pipe>,
    origin: Vec<Pipe>,
    origin_total: Pipe,
}

impl Links {
    /// Shares a step out among `demands`. Capacities are bytes in this step.
    pub(super) fn share(
        &mut self,
        demands: &mut [Demand],
        link: impl Fn(usize) -> f64,
        nodes: usize,
        origin_node: f64,
        origin_total: f64,
    ) {
        let pipe = |left| Pipe { left, ..Pipe::default() };
        self.up.clear();
        self.up.extend((0..nodes).map(|node| pipe(link(node))));
        self.down.clone_from(&self.up);
        self.origin.clear();
        self.origin.resize(nodes, pipe(origin_node));
        self.origin_total = pipe(origin_total);
        let mut total = 0.0;
        for _ in 0..MOST_ROUNDS {
            let moved = self.round(demands);
            total += moved;
            if moved < total * LAST_ROUND {
                break;
            }
        }
    }

    /// Hands out what each bottleneck has left, in equal shares; says how much that was.
    fn round(&mut self, demands: &mut [Demand]) -> f64 {
        for demand in demands.iter() {
            if !self.is_open(demand) {
                continue;
            }
            self.down[demand.to as usize].users += 1;
            if demand.from == ORIGIN {
                self.origin[demand.to as usize].users += 1;
                self.origin_total.users += 1;
            } else {
                self.up[demand.from as usize].users += 1;
            }
        }
        self.up.iter_mut().chain(&mut self.down).chain(&mut self.origin).for_each(Pipe::divide);
        self.origin_total.divide();
        let mut moved = 0.0;
        for demand in demands.iter_mut().filter(|demand| demand.need > LEAST) {
            let to = demand.to as usize;
            let source = if demand.from == ORIGIN {
                self.origin[to].share.min(self.origin_total.share)
            } else {
                self.up[demand.from as usize].share
            };
            let bytes = source.min(self.down[to].share).min(demand.need);
            demand.need -= bytes;
            demand.moved += bytes;
            moved += bytes;
            self.down[to].left -= bytes;
            if demand.from == ORIGIN {
                self.origin[to].left -= bytes;
                self.origin_total.left -= bytes;
            } else {
                self.up[demand.from as usize].left -= bytes;
            }
        }
        moved
    }

    /// It needs more, and each of its bottlenecks has some left.
    fn is_open(&self, demand: &Demand) -> bool {
        let to = demand.to as usize;
        let source = if demand.from == ORIGIN {
            self.origin[to].left.min(self.origin_total.left)
        } else {
            self.up[demand.from as usize].left
        };
        demand.need > LEAST && source.min(self.down[to].left) > LEAST
    }
}
