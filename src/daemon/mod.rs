//! `windlass serve`: assembles the floors, owns every task, shuts down in order.
//!
//! Invariant: when [`run`] returns, every task it started has ended, the peers have been told and the store is closed.
//! This module refuses to hold behaviour: each part's lives on its own floor, here are only the wires between them.
//!
//! The start: every listener is bound; admin and control answer at once and say what is waited for; the store is
//! opened; the node joins its peers; the faces answer. The end: take nothing more, let transfers finish and sole copies be
//! taken by others until the drain deadline, stop the engine, tell the peers, close the transport, close the store.

mod address;
mod config;
mod engine;
mod error;
mod identity;
mod listeners;
mod metrics;
mod node;
mod peers;
mod spot;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use address::AddressError;
pub use config::ShutdownConfig;
pub use error::DaemonError;
pub use identity::ProofError;

use crate::config::Config;
use crate::fetch::Fetcher;
use crate::http::admin::{Actions, Admin, Condition, Control, Readiness};
use crate::http::canary::Canaries;
use crate::http::object::Endpoint;
use crate::http::registry::{Callers, Mirror};
use crate::origin::registry::RegistryOrigin;
use crate::origin::s3::{S3Callers, S3Origin};
use crate::telemetry;
use crate::transport::QuicTransport;
use engine::Engine;
use listeners::{FaceListeners, OwnListeners, Serving};
use metrics::Metrics;
use node::{Node, Parts};

/// Where a running daemon listens; tells which ports the system chose for port 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    pub registry: SocketAddr,
    pub object: SocketAddr,
    pub admin: SocketAddr,
    /// UDP, for peers.
    pub peer: SocketAddr,
    pub control: PathBuf,
}

/// Runs a daemon until `shutdown` is ready, then drains it within the deadline. `on_bound` is called once, when every
/// listener is bound and served.
///
/// # Errors
/// [`DaemonError`]; nothing of the daemon is left running then.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()>,
    on_bound: impl FnOnce(Bound),
) -> Result<(), DaemonError> {
    let life = Life::default();
    let ending = config.shutdown.clone();
    match start(config, &life).await {
        Ok((engine, bound)) => {
            on_bound(bound);
            shutdown.await;
            let cache = engine.cache.clone();
            let parting = async {
                if ending.offer_sole_copies {
                    cache.part(ending.drain_deadline()).await;
                }
            };
            life.drain(ending.drain_deadline(), parting).await;
            engine.close(life).await;
            tracing::info!("stopped");
            Ok(())
        }
        Err(error) => {
            life.drain(Duration::ZERO, std::future::ready(())).await;
            life.leave().await;
            life.end().await;
            Err(error)
        }
    }
}

/// Who may still run, by the phase of the end that they see.
#[derive(Default)]
struct Life {
    readiness: Readiness,
    /// First: nothing new is taken from clients. Peers are still served, for clients' last bytes may take long.
    drain: CancellationToken,
    faces: TaskTracker,
    /// Then nothing new is taken from peers.
    refuse: CancellationToken,
    uploads: TaskTracker,
    /// Then the engine ends.
    halt: CancellationToken,
    /// Then the others are told, when there is nothing left to ask of this node.
    leave: CancellationToken,
    membership: TaskTracker,
    /// Ends when the transport does.
    background: TaskTracker,
}

impl Life {
    /// Takes nothing more and waits for what is in flight and for `parting`, at most until the deadline.
    async fn drain(&self, deadline: Duration, parting: impl Future<Output = ()>) {
        let deadline = tokio::time::Instant::now() + deadline;
        self.readiness.report_stopping();
        self.drain.cancel();
        self.faces.close();
        // The faces keep to the deadline by themselves, and close what they cut with FIN; so does a parting, and peers are
        // served as long as either goes on.
        tokio::join!(self.faces.wait(), parting);
        self.refuse.cancel();
        self.uploads.close();
        if tokio::time::timeout_at(deadline, self.uploads.wait()).await.is_err() {
            tracing::warn!(
                transfers = self.uploads.len(),
                "drain deadline reached: transfers to peers are cut"
            );
        }
    }

    /// Tells the peers that this node is gone, and returns when they have been told.
    async fn leave(&self) {
        self.leave.cancel();
        self.membership.close();
        self.membership.wait().await;
    }

    /// Waits for the tasks that end with the transport.
    async fn end(self) {
        self.uploads.wait().await;
        self.background.close();
        self.background.wait().await;
    }
}

async fn start(config: Config, life: &Life) -> Result<(Engine, Bound), DaemonError> {
    let mut registry = telemetry::registry();
    let metrics = Metrics::register(telemetry::own(&mut registry));
    let notices = spot::Notices::from_config(&config.shutdown)?;
    let (own, faces) = listeners::bind(&config).await?;
    let (named, tls) = (config.node.clone(), config.tls.clone());
    let identity = spawn_blocking(move || identity::prove(&named, &tls)).await??;
    let (transport, incoming) = QuicTransport::bind(config.transport.clone(), identity, metrics.transport)?;
    let bound = bound(&config, &own, &faces, &transport);
    life.readiness.report(Condition::ListenersBound);

    let serving = Serving {
        metrics: metrics.server,
        tasks: life.faces.clone(),
        stop: life.drain.clone(),
        drain: config.shutdown.drain_deadline(),
    };
    let canaries = Canaries::default();
    let node = Node::new(config.node.clone(), registry, canaries.clone());
    let actions = Arc::new(OnceLock::new());
    let pages = Admin::new(node.clone(), life.readiness.clone());
    own.serve(&Control::new(pages, Arc::clone(&actions)), &serving);

    let introduced = peers::introduce(&config, &transport).await?;
    let registries = RegistryOrigin::new(config.registry.origins.clone(), &metrics.origin)?;
    let s3 = S3Origin::new(config.s3.clone(), &metrics.origin)?;
    let store = engine::open_store(&config, metrics.store).await?;
    life.readiness.report(Condition::StoreOpen);

    let engine = Engine::start(&config, introduced, transport, incoming, store, metrics.engine, life);
    node.attach(Parts { gossip: engine.gossip.clone(), store: engine.store.clone() });
    let cache = &engine.cache;
    let callers = Arc::new(Callers::new(&config.access, config.registry.tag_ttl(), &metrics.access));
    let mirror = Mirror::new(
        &config.registry,
        cache.clone(),
        registries,
        Arc::clone(&callers),
        metrics.served.clone(),
    );
    let s3_callers = S3Callers::new(s3.clone(), &config.access, &metrics.access);
    let endpoint =
        Endpoint::new(&config.object, cache.clone(), s3.clone(), s3_callers.clone(), metrics.served);
    let store = engine.store.clone();
    let fetcher = Fetcher::new(config.fetch, cache.clone(), store.clone(), s3, s3_callers, metrics.fetch);
    let _ = actions.set(Actions { fetcher, store, cache: cache.clone() });
    faces.serve(mirror, canaries, endpoint, &serving);
    let stop = life.drain.clone();
    life.faces.spawn(async move { callers.tidy(stop).await });
    if let Some(notices) = notices {
        let (cache, stop) = (cache.clone(), life.drain.clone());
        life.faces.spawn(async move { notices.watch(cache, stop).await });
    }
    Ok((engine, bound))
}

/// Where everything listens, which is also logged.
fn bound(config: &Config, own: &OwnListeners, faces: &FaceListeners, transport: &QuicTransport) -> Bound {
    let bound = Bound {
        registry: faces.registry.address().unwrap_or(config.registry.listen),
        object: faces.object.address().unwrap_or(config.object.listen),
        admin: own.admin.address().unwrap_or(config.admin.listen),
        peer: transport.local_addr().unwrap_or(config.transport.listen),
        control: config.control.socket.clone(),
    };
    tracing::info!(address = %bound.registry, "registry mirror listens");
    tracing::info!(address = %bound.object, "S3 read endpoint listens");
    tracing::info!(address = %bound.admin, "admin, metrics and health listen");
    tracing::info!(address = %bound.peer, "peers' UDP port listens");
    tracing::info!(path = %bound.control.display(), "control socket listens");
    bound
}
