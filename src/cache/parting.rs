//! Leaving well: what nobody else holds is offered to those who stay.
//!
//! Invariant: a parting ends at its deadline whoever answers, and takes nothing from anybody: until the process ends this
//! node serves what it offers as it serves anything. Refuses to decide who takes what: `offers` does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::offers::{Holding, Offers};
use super::shared::Shared;
use crate::cache::driver::Command;
use crate::content::{ContentId, ContentKey, NodeId, StripeIndex};
use crate::store::Summary;
use crate::swarm::Member;
use crate::wire::{self, MAX_TAKEN_STRIPES, Message, Parting, Take};

/// Between two rounds of questions and offers. A home answers in a millisecond; at four rounds a second the end of a
/// transfer is noticed soon enough.
const ROUND: Duration = Duration::from_millis(250);

/// Longest wait for the answers to offers that a command makes.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// Answers that may wait for a round. What is lost is asked again in the next.
const HEARD_MAX: usize = 1_024;

/// What is heard by those who offer.
#[derive(Clone, Debug)]
pub(super) enum Heard {
    /// Who is there, before each round of questions.
    Members(Vec<Member>),
    Said {
        from: NodeId,
        parting: Parting,
    },
}

/// Runs until nothing more can be done, or the deadline.
pub(super) async fn run(shared: &Arc<Shared>, deadline: Instant) {
    let store = shared.store.clone();
    // Reads sidecars.
    let Ok(held) = tokio::task::spawn_blocking(move || store.list()).await else { return };
    let held: BTreeMap<_, _> = held.into_iter().filter(is_worth_offering).map(|s| (s.key, s)).collect();
    let (sender, inbox) = mpsc::channel(HEARD_MAX);
    if held.is_empty() || shared.commands.send(Command::Listen(sender)).await.is_err() {
        return;
    }
    let offers = Offers::new(held.values().map(holding).collect());
    let mut leaver = Leaver { shared, held, offers, inbox, started: Instant::now(), has_company: false };
    let ended = tokio::time::timeout_at(deadline, leaver.part()).await;
    if !leaver.has_company {
        return;
    }
    let outcome = leaver.offers.outcome();
    if outcome.sole_bytes == 0 {
        tracing::info!(bytes = outcome.shared_bytes, "all that is held here is held elsewhere too");
    } else {
        tracing::warn!(
            bytes = outcome.sole_bytes,
            in_time = ended.is_ok(),
            "nobody took what only this node holds: it will be fetched from its origin again"
        );
    }
}

/// A blob that is not whole was interrupted, and whoever wants it again fetches it whole; an object may be useful in
/// parts.
fn is_worth_offering(summary: &Summary) -> bool {
    !summary.have.is_empty() && (summary.sealed || matches!(summary.id, ContentId::Object(_)))
}

fn holding(summary: &Summary) -> (Holding, Vec<(StripeIndex, u64)>) {
    let Summary { key, layout, last_used_ms, .. } = *summary;
    let stripes = (0..layout.stripe_count()).map(StripeIndex);
    let held = stripes.map(|stripe| (stripe, summary.have.stripe(stripe))).filter(|(_, bits)| *bits != 0);
    (Holding { key, layout, last_used_ms }, held.collect())
}

struct Leaver<'a> {
    shared: &'a Arc<Shared>,
    held: BTreeMap<ContentKey, Summary>,
    offers: Offers,
    inbox: mpsc::Receiver<Heard>,
    started: Instant,
    has_company: bool,
}

impl Leaver<'_> {
    async fn part(&mut self) {
        loop {
            let questions = self.offers.questions(self.started.elapsed());
            if self.shared.commands.send(Command::AskHomes(questions)).await.is_err() {
                return;
            }
            self.listen().await;
            if !self.has_company || self.offers.is_done() {
                return;
            }
            for (taker, key) in self.offers.make(self.started.elapsed()) {
                self.offer(taker, key);
            }
        }
    }

    /// Takes in what is said within one round, or until nothing more is to be said.
    async fn listen(&mut self) {
        let end = Instant::now() + ROUND;
        while let Ok(Some(heard)) = tokio::time::timeout_at(end, self.inbox.recv()).await {
            let now = self.started.elapsed();
            match heard {
                Heard::Members(members) => {
                    self.has_company = !members.is_empty();
                    self.offers.members(members);
                }
                Heard::Said { parting: Parting::Unshared(inventory), .. } => {
                    self.offers.heard(now, &inventory.stripes);
                }
                Heard::Said { from, parting: Parting::Took(took) } => {
                    self.offers.took(now, from, took.content, took.accepted);
                }
                Heard::Said { parting: Parting::Leaving(_) | Parting::Take(_), .. } => {}
            }
            if !self.has_company || self.offers.is_done() {
                return;
            }
        }
    }

    fn offer(&self, taker: NodeId, key: ContentKey) {
        let Some(summary) = self.held.get(&key) else { return };
        let mut stripes = self.offers.unshared(key);
        stripes.truncate(MAX_TAKEN_STRIPES);
        tracing::info!(content = %summary.id, peer = %taker, stripes = stripes.len(), "offered what only this node holds");
        send(self.shared, taker, Parting::Take(take_of(summary, stripes)));
    }
}

/// The answer to an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    pub accepted: bool,
    /// Chunks that are still to come.
    pub missing: u32,
}

/// Offers to each of `nodes` all that is held here of the contents that `is_meant`; what has not been answered within a
/// round is `None`. Again is how to see how far they are.
pub(super) async fn offer(
    shared: &Arc<Shared>,
    is_meant: impl Fn(&Summary) -> bool,
    nodes: &[NodeId],
) -> Vec<(ContentId, NodeId, Option<Reply>)> {
    let store = shared.store.clone();
    let Ok(held) = tokio::task::spawn_blocking(move || store.list()).await else { return Vec::new() };
    let (sender, mut inbox) = mpsc::channel(HEARD_MAX);
    if shared.commands.send(Command::Listen(sender)).await.is_err() {
        return Vec::new();
    }
    let mut replies = BTreeMap::<(ContentKey, NodeId), (ContentId, Option<Reply>)>::new();
    for summary in held.iter().filter(|summary| is_meant(summary) && is_worth_offering(summary)) {
        let (_, mut stripes) = holding(summary);
        stripes.truncate(MAX_TAKEN_STRIPES);
        for node in nodes {
            send(shared, *node, Parting::Take(take_of(summary, stripes.clone())));
            replies.insert((summary.key, *node), (summary.id.clone(), None));
        }
    }
    let end = Instant::now() + ANSWERS_WITHIN;
    let is_complete = |replies: &BTreeMap<_, (ContentId, Option<Reply>)>| {
        replies.values().all(|(_, reply)| reply.is_some())
    };
    while !is_complete(&replies)
        && let Ok(Some(heard)) = tokio::time::timeout_at(end, inbox.recv()).await
    {
        if let Heard::Said { from, parting: Parting::Took(took) } = heard
            && let Some((_, reply)) = replies.get_mut(&(took.content, from))
        {
            *reply = Some(Reply { accepted: took.accepted, missing: took.missing });
        }
    }
    replies.into_iter().map(|((_, node), (content, reply))| (content, node, reply)).collect()
}

fn take_of(summary: &Summary, stripes: Vec<(StripeIndex, u64)>) -> Take {
    let (content, size) = (summary.id.clone(), summary.layout.size());
    Take { content, size, chunk_bytes: summary.layout.chunk_bytes(), stripes }
}

/// Sends, or drops when that is impossible: every word of a parting is said again.
pub(super) fn send(shared: &Shared, to: NodeId, parting: Parting) {
    let message = wire::encode(&Message::Parting(parting));
    let sent = shared.address(to).map(|peer| shared.transport.send_message(&peer, message));
    if !matches!(sent, Some(Ok(()))) {
        shared.metrics.messages_dropped.inc();
    }
}
