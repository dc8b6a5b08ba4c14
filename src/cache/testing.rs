//! An engine alone, for the tests of the floors above: everything comes from the source.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Cache, Config, Metrics, Parts, PeerBook};
use crate::content::NodeId;
use crate::store::{self, Store};
use crate::swarm::{self, DEFAULT_CAPACITY, Member, Swarm, Zone};
use crate::transport::{Incoming, MemoryNetwork};

/// One node without peers; it stops when dropped.
pub(crate) struct Node {
    cache: Cache,
    store: Store,
    _incoming: tokio::sync::mpsc::Receiver<Incoming>,
    stop: DropGuard,
    data: tempfile::TempDir,
}

impl Node {
    /// Must be called within a runtime.
    pub(crate) fn alone() -> Self {
        Self::on(tempfile::tempdir().expect("a temporary directory"))
    }

    /// One that finds what another left behind.
    pub(crate) fn on(data: tempfile::TempDir) -> Self {
        let config = store::Config {
            data_dir: data.path().into(),
            free_floor: bytesize::ByteSize(0),
            ..store::Config::default()
        };
        let store = Store::open(config, store::Metrics::default()).expect("the directory opens");
        let (transport, incoming) = MemoryNetwork::new(1).join("alone", 16);
        let me = NodeId::from_name("alone");
        let stop = CancellationToken::new();
        let cache = Cache::start(Parts {
            config: Config::default(),
            swarm: Swarm::new(me, swarm::Config::default(), 1),
            store: store.clone(),
            transport: transport as Arc<_>,
            peers: watch::channel(only(me)).1,
            metrics: Metrics::default(),
            shutdown: stop.clone(),
        });
        Self { cache, store, _incoming: incoming, stop: stop.drop_guard(), data }
    }

    /// A clean end; what was stored is in the directory.
    pub(crate) async fn end(self) -> tempfile::TempDir {
        drop(self.stop);
        self.cache.stopped().await;
        self.store.close().expect("the disk is well");
        self.data
    }

    pub(crate) fn data_dir(&self) -> &std::path::Path {
        self.data.path()
    }

    pub(crate) fn cache(&self) -> Cache {
        self.cache.clone()
    }

    pub(crate) fn store(&self) -> Store {
        self.store.clone()
    }
}

/// A cluster of one, which need not wait for anybody.
fn only(me: NodeId) -> PeerBook {
    let zone = Zone::default();
    let member = Member { id: me, zone, seed: false, settled: true, capacity: DEFAULT_CAPACITY };
    PeerBook { members: vec![member], synced: true, ..PeerBook::default() }
}
