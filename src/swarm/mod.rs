//! Who fetches what from whom: decisions only, no I/O, no clock, no global randomness.
//!
//! One [`Swarm`] per node holds both of its roles, requester and home. The same code runs in the daemon and in the
//! simulation (`tests/swarm_simulation.rs`).
//!
//! # How to drive it
//! ```text
//! loop {
//!     swarm.handle_event(now, event)  or  swarm.handle_timeout(now)   // timeout: when poll_timeout() is reached
//!     while let Some(action) = swarm.poll_action() { start it, do not wait for it }
//!     sleep until poll_timeout() or the next event
//! }
//! ```
//! Everything under one lock, and actions are started before it is released, so that a chunk that
//! [`Swarm::upload_requested`] admits is in the store or in a flow that the engine knows.
//!
//! | when | call |
//! |---|---|
//! | start | `Members` (self alone, `synced: false`, until membership knows better), `Stored` for each content in the store |
//! | membership changed | `Members` |
//! | a transport message came | decode; `Message` |
//! | the transport lost a peer | `PeerLost` |
//! | the process did not run for a second or more | `Slept` |
//! | a first reader opens a content | `Open`, then `Demand` |
//! | readers come, go, or move to another chunk | `Demand` (once per chunk passed is plenty) |
//! | the last reader left | `Close` |
//! | a peer that serves a flow says what else it has | `SourceHolds` |
//! | bytes of a flow arrive | `FlowProgress`, now and then |
//! | a flow's chunk is verified (and stored) | `FlowDone` |
//! | a flow ended otherwise, unless cancelled | `FlowFailed` |
//! | a peer asks for a chunk | [`Swarm::upload_requested`], later [`Swarm::upload_ended`] |
//! | the store evicts, or chunks turn out wrong | `Evicted`, `Dropped` |
//!
//! A flow may be started for a chunk of which part is here already: bytes are kept per chunk, not per flow.
//!
//! # The protocol
//! Each stripe of 64 chunks has a *home*: the settled member with the highest weighted rendezvous score (`view`). The
//! home keeps a table (`home::stripe`): who has, gets and wants which chunk. A requester tells the home its whole
//! state of a stripe in one `Want`, so that a lost table rebuilds itself; the home remembers, and answers at once and
//! again whenever something comes free:
//!
//! - a chunk that nobody has or gets: a *lease*, to one requester, within the content's origin budget (AIMD on 429/503),
//!   within the requester's fair share, lowest chunks first;
//! - any other chunk: the least loaded source, in the requester's zone if there is one, whole copies before nodes that
//!   are themselves receiving. Those serve `fanout` others at most, so that a chunk spreads as a tree while it arrives,
//!   and only while the table shows a holder or lessee at its root. A sole holder and seeds send each chunk to one node
//!   at a time, the lowest first, and an idle holder is no choice beside another holder in order; a requester has at most
//!   four pulls in a stripe of chunks that none of those who take part holds whole;
//! - nothing: wait. The empty answer says that the home is alive.
//!
//! | message | from, to | says |
//! |---|---|---|
//! | `Want` | requester, home | all about the sender and one stripe; failures and ended leases since the last |
//! | `Answer` | home, requester | sources or leases for some of it; more follow unasked |
//! | `Leases`, `Revoke` | lessee, home; back | bytes so far; somebody else fetches it now |
//! | `Redirect` | anybody, requester | that one is home |
//! | `Ask`, `Table` | new home, others; back | what do you know of this stripe; this, and who is home |
//! | `Table` | home that leaves, next; those whom it had told that it is home | this is known; that one is home now |
//! | `Announce` | holder, home | what is held of stripes nobody here asks for |
//!
//! What a node that leaves says ([`Parting`](crate::wire::Parting)) goes past the machine: the engine asks it who is home
//! and who holds what, and the taker fetches by demand like any reader.
//!
//! A stripe at its home is *due* (known, nobody asked yet), *waiting* (for those who may have been home) or *done*: only
//! then does it grant leases. A chunk at a requester is wanted, queued, in the air from a peer or with a lease, or held.
//!
//! Between zones a chunk travels once: a requester whose zone has a source in order, or somebody who is getting the chunk
//! across and has spoken within a second, waits for that rather than be sent across the border. With `scope = "zone"`
//! other zones are not in the view at all.
//!
//! Readers' chunks come first and in order, then the rarest of the window, which is wider the more nodes are interested.
//!
//! A source that reads the content itself says with each chunk what else it has of the stripes around. When that chunk is
//! there, nothing assigned fills the room and the nodes are so many that each may ask its home only seldom, the requester
//! *follows on*: it takes another from the same source without a word to the home, which hears of it with the next want. Never from the origin, from a seed or from a node that only holds, which are for
//! what the others lack, and never across a border of zones.
//!
//! **Why two nodes never hold the same claim.** A table has one lease per chunk. Two tables of one stripe arise when
//! views differ; so a home without a table asks whoever may have one before it grants (`home::handover`), and of two
//! that know each other the settled higher rank takes the table, or the lower keeps it until the other is settled. A
//! table follows only the latest word of each node: wants that others overtook, and what was said to a node while it
//! slept, are dropped. What remains: homes that cannot hear each other (partition), a home that died with its table
//! (holders announce, and `recovery_wait_ms` are waited for them), leases taken from the slow and the dead, and last
//! resorts.
//!
//! **Why nobody waits for ever.** An unanswered want moves to the next rank after `want_timeout_ms`. Who names
//! a home to others is told when that one leaves, so that nobody is sent round in a circle. A flow that stands still is
//! given up and its source reported. A lease that stands still, or crawls, is stolen, at most thrice a chunk. Without a
//! home the origin is asked after `origin_fallback_ms` without progress, and with one after `hard_fallback_ms`.
//!
//! A slow transfer is moved to another source and resumed there rather than duplicated at the end: one flow per chunk,
//! no byte twice.

mod config;
mod core;
mod event;
mod home;
mod machine;
mod member;
pub mod membership;
mod requester;
mod rng;
mod stats;
mod time;
mod timers;
mod view;

pub use config::{Config, MAX_CURSORS, Scope};
pub use event::{Action, Admission, Claim, Event, FlowFailure, FlowId};
pub use machine::Swarm;
pub use member::{DEFAULT_CAPACITY, MAX_ZONE_BYTES, Member, Zone, ZoneTooLong};
pub use stats::Stats;
pub use time::Time;
