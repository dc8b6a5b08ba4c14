//! What both roles of a node share: clock, view, timers, randomness, counters, and the way out.

use std::collections::VecDeque;
use std::time::Duration;

use super::config::Config;
use super::event::Action;
use super::rng::Rng;
use super::stats::Stats;
use super::time::Time;
use super::timers::Timers;
use super::view::{Evidence, View};
use crate::content::NodeId;
use crate::wire::Message;

/// After a sleep, the time in which the transport finds all its connections ended: its timers fire at once.
const WAKING: Duration = Duration::from_secs(1);
/// After a sleep, the time in which the messages are read that waited in the sockets: a few milliseconds for what a
/// socket holds, more on a machine that is as busy as one that oversleeps may be. All who said something new meanwhile
/// repeat it soon after.
const CATCHING_UP: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) me: NodeId,
    pub(crate) now: Time,
    pub(crate) config: Config,
    pub(crate) view: View,
    pub(crate) timers: Timers,
    pub(crate) rng: Rng,
    pub(crate) stats: Stats,
    /// When this process last ran on after it had not run for long.
    woke: Option<Time>,
    actions: VecDeque<Action>,
    loopback: VecDeque<Message>,
}

impl Core {
    pub(crate) fn new(me: NodeId, config: Config, seed: u64) -> Self {
        let view = View::new(me, config.seed_weight, millis(config.cold_grace_ms)).within(config.scope);
        Self {
            me,
            now: Time::default(),
            config,
            view,
            timers: Timers::default(),
            rng: Rng::new(seed),
            stats: Stats::default(),
            woke: None,
            actions: VecDeque::new(),
            loopback: VecDeque::new(),
        }
    }

    /// A message to this node itself is taken in before the current call returns.
    pub(crate) fn send(&mut self, to: NodeId, message: Message) {
        if to == self.me {
            self.loopback.push_back(message);
        } else {
            self.actions.push_back(Action::Send { to, message });
        }
    }

    pub(crate) fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    pub(crate) fn take_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(crate) fn take_loopback(&mut self) -> Option<Message> {
        self.loopback.pop_front()
    }

    pub(crate) fn wake_up(&mut self) {
        self.woke = Some(self.now);
    }

    /// Connections that break now broke because this node was silent, and say nothing of the others: taken for lost, all
    /// of them at once, they would leave it alone with the origin.
    pub(crate) fn is_waking(&self) -> bool {
        self.woke.is_some_and(|woke| self.now.since(woke) < WAKING)
    }

    /// What is read now was said to the node that this one was before it slept.
    pub(crate) fn is_catching_up(&self) -> bool {
        self.woke.is_some_and(|woke| self.now.since(woke) < CATCHING_UP)
    }

    /// The peer is passed over for a while.
    pub(crate) fn suspect(&mut self, node: NodeId, evidence: Evidence) {
        let until = self.now + millis(self.config.suspect_ms);
        self.view.suspect(node, evidence, until);
    }
}

pub(crate) const fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}
