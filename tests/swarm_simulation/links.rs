//! How transfers share links and the origin: close to max-min fairness, as TCP and QUIC share them in the long run.
//!
//! In each of three rounds every transfer that still needs bytes takes an equal share of what each of its
//! bottlenecks has left. Three, because what a fourth moves is below a percent of a step.

/// The origin as a source.
pub(super) const ORIGIN: u32 = u32::MAX;
const ROUNDS: usize = 3;

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
        self.share = self.left / f64::from(self.users.max(1));
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
        for _ in 0..ROUNDS {
            self.round(demands);
        }
    }

    fn round(&mut self, demands: &mut [Demand]) {
        for demand in demands.iter().filter(|demand| demand.need > 0.5) {
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
        for demand in demands.iter_mut().filter(|demand| demand.need > 0.5) {
            let to = demand.to as usize;
            let source = if demand.from == ORIGIN {
                self.origin[to].share.min(self.origin_total.share)
            } else {
                self.up[demand.from as usize].share
            };
            let bytes = source.min(self.down[to].share).min(demand.need);
            demand.need -= bytes;
            demand.moved += bytes;
            self.down[to].left -= bytes;
            if demand.from == ORIGIN {
                self.origin[to].left -= bytes;
                self.origin_total.left -= bytes;
            } else {
                self.up[demand.from as usize].left -= bytes;
            }
        }
    }
}
