//! What all entries of a store share, and the order in which it starts and ends.
//!
//! Invariant: the threads are gone, and everything is durable or known not to be, before the lock on the data
//! directory is let go.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::catalog::{Catalog, Cold};
use super::config::Config;
use super::data_dir::{DataDir, delete};
use super::disk::{self, Disk};
use super::error::OpenError;
use super::index::{self, Engine, Index, Row};
use super::metrics::{Lane, Metrics};
use super::now_ms;
use super::pin::Pins;
use super::pool::Pool;
use super::room::Room;
use super::scan::{Scan, scan};
use super::scrub::Scrubber;
use super::spare::Spares;
use super::syncer::Syncer;
use crate::content::ContentKey;

/// Between two batches to the index: a crash costs this much of "last used", and a batch shares one flush.
const INDEX_INTERVAL: Duration = Duration::from_secs(2);

/// The same complaint is not logged more often: a full disk fails every chunk.
const WARNING_INTERVAL_MS: u64 = 30_000;

/// The inside of a store.
pub(super) struct Shared {
    pub disk: Disk,
    pub dir: DataDir,
    pub pool: Pool,
    pub spares: Spares,
    pub index: Index,
    pub metrics: Metrics,
    pub room: Room,
    pub catalog: Catalog,
    pub syncer: Arc<Syncer>,
    pub scrubber: Arc<Scrubber>,
    pub pins: Pins,
    /// The last run did not end cleanly: what is placed is verified first.
    pub after_crash: bool,
    /// Destinations that are being written right now.
    pub placing: Mutex<HashSet<PathBuf>>,
    /// Copies occupy a thread for long; half of them stay free for reads.
    pub place_turns: Semaphore,
    pub no_space_warning: Interval,
    pub corrupt_warning: Interval,
    pub load_warning: Interval,
    pub sync_warning: Interval,
}

impl Shared {
    pub(super) fn open(disk: Disk, config: &Config, metrics: Metrics) -> Result<Arc<Self>, OpenError> {
        let dir = DataDir::open(&config.data_dir, disk.clone())?;
        let io =
            |source| OpenError::Io { doing: "opening the store in", path: config.data_dir.clone(), source };
        let pins = Pins(config.pins.clone());
        let Stock { engine, contents, graves, after_crash, scanned } =
            Stock::take(&dir, &pins, &metrics, &io)?;
        let this = Arc::new(OnceLock::<Weak<Self>>::new());
        let later = Arc::clone(&this);
        let all_rows = move || {
            let shared = later.get().and_then(Weak::upgrade);
            shared.map_or_else(Vec::new, |shared| shared.catalog.rows())
        };
        let rebuilds = metrics.index_rebuilds.clone();
        let index =
            Index::start(engine, dir.index(), INDEX_INTERVAL, Box::new(all_rows), rebuilds).map_err(io)?;
        let room = Room::new(config.budget.as_u64(), config.free_floor.as_u64(), metrics.clone());
        for (key, cold) in &contents {
            room.add_stored(cold.stored_bytes());
            if scanned {
                index.put(*key, cold.row.clone());
            }
        }
        metrics.contents.set(contents.len() as u64);
        let threads = config.effective_io_threads();
        let shared = Arc::new(Self {
            pool: Pool::start(threads, &metrics).map_err(io)?,
            spares: Spares::default(),
            scrubber: Arc::default(),
            syncer: Arc::new(Syncer::new(metrics.unsynced_contents.clone())),
            catalog: Catalog::new(contents),
            disk,
            dir,
            index,
            room,
            metrics,
            pins,
            after_crash,
            placing: Mutex::default(),
            place_turns: Semaphore::new(threads.div_ceil(2)),
            no_space_warning: Interval::default(),
            corrupt_warning: Interval::default(),
            load_warning: Interval::default(),
            sync_warning: Interval::default(),
        });
        // Set exactly once, here.
        let _ = this.set(Arc::downgrade(&shared));
        let started =
            Syncer::start(&shared).and_then(|()| Scrubber::start(&shared, config.scrub_rate.as_u64()));
        if let Err(error) = started {
            shared.abandon();
            return Err(io(error));
        }
        shared.warn_if_below_floor();
        shared.trim();
        if !graves.is_empty() {
            // The queue is empty: there is room.
            let disk = shared.disk.clone();
            shared.pool.try_submit(Lane::Write, move || graves.iter().for_each(|grave| delete(&disk, grave)));
        }
        Ok(shared)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        let pending = self.catalog.warm().into_iter().filter(|entry| entry.has_pending());
        pending.map(|entry| entry.sync()).fold(Ok(()), Result::and)
    }

    pub(super) fn close(&self) -> io::Result<()> {
        self.scrubber.stop();
        self.pool.stop();
        self.syncer.stop();
        let flushed = self.flush();
        // Last uses change without anything being written; this is when they are.
        for (key, row) in self.catalog.rows() {
            self.index.put(key, row);
        }
        self.dismiss_waiters();
        // The index knows nothing of chunks in doubt: only a scan would find them again.
        let is_settled = self.catalog.in_doubt().is_empty();
        let generation = self.index.close_clean();
        let marked = match (&flushed, generation) {
            (Ok(()), Some(generation)) if is_settled => {
                self.dir.leave_clean_mark(generation, self.pins.fingerprint())
            }
            _ => Ok(()),
        };
        self.catalog.clear();
        self.dir.unlock();
        flushed.and(marked)
    }

    /// Ends without making anything durable.
    pub(super) fn abandon(&self) {
        self.scrubber.stop();
        self.pool.stop();
        self.syncer.stop();
        self.index.abandon();
        self.dismiss_waiters();
        self.catalog.clear();
        self.dir.unlock();
    }

    /// Nobody syncs any more; who waits for a sync would wait for ever, and keep the entry it waits in alive.
    fn dismiss_waiters(&self) {
        self.catalog.warm().iter().for_each(|entry| entry.dismiss_waiters());
    }

    /// More may be stored than allowed: the budget was lowered, or a crash brought back what had been evicted.
    fn trim(self: &Arc<Self>) {
        if !self.room.is_over_budget() {
            return;
        }
        let later = Arc::downgrade(self);
        // The queue is empty: there is room. Deleting terabytes takes a while, and nobody waits for it.
        self.pool.try_submit(Lane::Write, move || {
            while let Some(shared) = later.upgrade()
                && shared.room.is_over_budget()
                && shared.evict_one()
            {}
        });
    }

    /// The file system of the data directory is already below its floor: say so before the first pass-through does.
    fn warn_if_below_floor(&self) {
        let floor_bytes = self.room.usage().free_floor_bytes;
        match disk::free_bytes(self.dir.root()) {
            Ok(free_bytes) if free_bytes < floor_bytes => tracing::warn!(
                path = %self.dir.root().display(), free_bytes, floor_bytes,
                "less than store.free_floor is free: contents are evicted or passed through until there is more"
            ),
            _ => {}
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("dir", &self.dir).field("room", &self.room).finish_non_exhaustive()
    }
}

/// What a start finds in the data directory.
struct Stock {
    engine: Option<Engine>,
    contents: Vec<(ContentKey, Cold)>,
    /// To be deleted.
    graves: Vec<PathBuf>,
    after_crash: bool,
    /// The sidecars were read; the index does not know yet what they say.
    scanned: bool,
}

impl Stock {
    fn take(
        dir: &DataDir,
        pins: &Pins,
        metrics: &Metrics,
        io: &impl Fn(io::Error) -> OpenError,
    ) -> Result<Self, OpenError> {
        let mut graves = dir.old_graves().map_err(io)?;
        let mark = dir.take_clean_mark().map_err(io)?;
        let found = index::find(&dir.index(), mark.map(|mark| mark.generation));
        let after_crash = found.distrust.is_some();
        // The index does not know names: who is pinned by the configuration is seen only in the sidecars.
        let repinned = mark.is_some_and(|mark| mark.pins != Some(pins.fingerprint()));
        let why_scan = found.distrust.or_else(|| repinned.then_some("store.pins changed"));
        let contents = match why_scan {
            None => found.rows.into_iter().map(|(key, row)| (key, Cold::found(row, 0))).collect(),
            Some(why) => {
                let scan = recover(dir, pins, &found.rows, why, metrics)?;
                graves.extend(scan.discarded);
                scan.contents
            }
        };
        Ok(Self { engine: found.engine, contents, graves, after_crash, scanned: why_scan.is_some() })
    }
}

/// Lets a complaint through once per [`WARNING_INTERVAL_MS`].
#[derive(Debug, Default)]
pub(super) struct Interval {
    last_ms: AtomicU64,
}

impl Interval {
    pub(super) fn is_due(&self) -> bool {
        let now = now_ms();
        let last = self.last_ms.load(Ordering::Relaxed);
        now.saturating_sub(last) >= WARNING_INTERVAL_MS
            && self.last_ms.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// Scans the sidecars; `known` still tells when each content was last used.
fn recover(
    dir: &DataDir,
    pins: &Pins,
    known: &HashMap<ContentKey, Row>,
    why: &str,
    metrics: &Metrics,
) -> Result<Scan, OpenError> {
    let started = Instant::now();
    let mut scan = scan(dir, pins)?;
    let (mut chunks, mut doubtful_bytes) = (0, 0);
    for (key, cold) in &mut scan.contents {
        chunks += cold.row.have.len();
        doubtful_bytes += cold.doubtful_bytes;
        cold.row.last_used_ms = known.get(key).map_or(cold.row.last_used_ms, |known| known.last_used_ms);
    }
    if !scan.contents.is_empty() || !scan.discarded.is_empty() {
        metrics.index_rebuilds.inc();
        tracing::info!(
            contents = scan.contents.len(),
            chunks,
            doubtful_bytes,
            discarded = scan.discarded.len(),
            seconds = started.elapsed().as_secs_f64(),
            because = why,
            "index rebuilt by scanning the stored contents"
        );
    }
    Ok(scan)
}
