//! The one thread that writes to the engine: batches, flushes, watches its size, and replaces it when it fails.
//!
//! Invariant: a failing engine never reaches a caller. Changes are coalesced per content, so what waits here is
//! bounded by the number of contents.

use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;

use super::{Engine, Row, replace};
use crate::content::ContentKey;

/// An index below this is never rebuilt for its size: 10,000 rows measured 3.75 MB, so this is 170,000 of them.
const SIZE_MIN_BYTES: u64 = 64 << 20;

/// Growth over a freshly built index that says the engine leaks rather than stores.
const GROWTH_MAX: u64 = 8;

/// How often the size is looked at: the engine lists a directory for it.
const SIZE_INTERVAL: Duration = Duration::from_secs(10);

/// Replacements in one run before the engine is given up: each leaks the failed engine's memory, because dropping
/// it may hang or panic once more.
const REPLACEMENTS_MAX: u32 = 3;

/// A flush that takes longer than this is worth a line: the disk is in trouble.
const FLUSH_SLOW: Duration = Duration::from_secs(5);

/// Every row that the index should have.
pub(in crate::store) type AllRows = Box<dyn Fn() -> Vec<(ContentKey, Row)> + Send>;

/// Handle to the writing thread.
pub(in crate::store) struct Index {
    inbox: Arc<Inbox>,
    thread: Mutex<Option<JoinHandle<Option<u64>>>>,
}

#[derive(Default)]
struct Inbox {
    waiting: Mutex<Waiting>,
    wake: Condvar,
}

#[derive(Default)]
struct Waiting {
    changes: HashMap<ContentKey, Option<Row>>,
    stop: Option<Stop>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// As after a crash.
    Now,
    /// Write everything and return the generation for the clean mark.
    Clean,
}

impl Index {
    /// Starts the thread; it writes at most every `interval`. `all_rows` is asked when the engine is replaced.
    pub(in crate::store) fn start(
        engine: Option<Engine>,
        dir: PathBuf,
        interval: Duration,
        all_rows: AllRows,
        rebuilds: Counter,
    ) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::default());
        let writer = Writer {
            inbox: Arc::clone(&inbox),
            engine,
            dir,
            all_rows,
            rebuilds,
            replacements: 0,
            size_limit_bytes: SIZE_MIN_BYTES,
            size_checked: Instant::now(),
        };
        let thread =
            std::thread::Builder::new().name("store-index".to_owned()).spawn(move || writer.run(interval))?;
        Ok(Self { inbox, thread: Mutex::new(Some(thread)) })
    }

    /// Takes the place of what was put for `key` before.
    pub(in crate::store) fn put(&self, key: ContentKey, row: Row) {
        self.inbox.waiting.lock().changes.insert(key, Some(row));
    }

    pub(in crate::store) fn remove(&self, key: ContentKey) {
        self.inbox.waiting.lock().changes.insert(key, None);
    }

    /// Writes everything, and returns the generation that the clean mark must carry; none when the engine failed.
    pub(in crate::store) fn close_clean(&self) -> Option<u64> {
        self.stop(Stop::Clean)
    }

    /// Stops without writing what still waits.
    pub(in crate::store) fn abandon(&self) {
        self.stop(Stop::Now);
    }

    fn stop(&self, how: Stop) -> Option<u64> {
        let thread = self.thread.lock().take()?;
        self.inbox.waiting.lock().stop = Some(how);
        self.inbox.wake.notify_all();
        thread.join().ok().flatten()
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        self.abandon();
    }
}

struct Writer {
    inbox: Arc<Inbox>,
    engine: Option<Engine>,
    dir: PathBuf,
    all_rows: AllRows,
    rebuilds: Counter,
    replacements: u32,
    size_limit_bytes: u64,
    size_checked: Instant,
}

impl Writer {
    fn run(mut self, interval: Duration) -> Option<u64> {
        loop {
            let (changes, stop) = self.inbox.take(interval);
            if stop == Some(Stop::Now) {
                return None;
            }
            if !changes.is_empty() {
                self.write(&changes);
            }
            if stop == Some(Stop::Clean) {
                return self.finish();
            }
            self.check_size();
        }
    }

    fn write(&mut self, changes: &[(ContentKey, Option<Row>)]) {
        let Some(engine) = &self.engine else { return };
        let started = Instant::now();
        let outcome = guarded(|| engine.apply(changes).and_then(|()| engine.flush()));
        let seconds = started.elapsed().as_secs_f64();
        if seconds > FLUSH_SLOW.as_secs_f64() {
            tracing::warn!(seconds, "flushing the index is slow; the disk is");
        }
        if let Err(error) = outcome {
            tracing::warn!(error, "the index failed and is rebuilt from memory");
            // Dropping a failed engine may hang or panic; its memory is small and REPLACEMENTS_MAX bounds it.
            std::mem::forget(self.engine.take());
            self.rebuild(true);
        }
    }

    fn check_size(&mut self) {
        if self.size_checked.elapsed() < SIZE_INTERVAL {
            return;
        }
        self.size_checked = Instant::now();
        let Some(engine) = &self.engine else { return };
        let bytes = guarded(|| engine.size_on_disk_bytes()).unwrap_or(0);
        if bytes > self.size_limit_bytes {
            tracing::info!(
                bytes,
                limit_bytes = self.size_limit_bytes,
                "the index has grown too large and is rebuilt"
            );
            let old = self.engine.take();
            if catch_unwind(AssertUnwindSafe(|| drop(old))).is_ok() {
                self.rebuild(false);
            }
        }
    }

    /// Builds a new engine out of memory. Not counted against [`REPLACEMENTS_MAX`] when the old one was in order.
    fn rebuild(&mut self, failed: bool) {
        self.replacements += u32::from(failed);
        if self.replacements > REPLACEMENTS_MAX {
            tracing::error!("the index failed too often; the next start has to scan all contents");
            return;
        }
        let started = Instant::now();
        let Some(engine) = replace(&self.dir, failed) else { return };
        let rows: Vec<_> = (self.all_rows)().into_iter().map(|(key, row)| (key, Some(row))).collect();
        let built = guarded(|| {
            engine.apply(&rows)?;
            engine.flush()?;
            engine.size_on_disk_bytes()
        });
        match built {
            Ok(bytes) => {
                self.rebuilds.inc();
                self.size_limit_bytes = SIZE_MIN_BYTES.max(bytes.saturating_mul(GROWTH_MAX));
                self.engine = Some(engine);
                let seconds = started.elapsed().as_secs_f64();
                tracing::info!(contents = rows.len(), bytes, seconds, "index rebuilt from memory");
            }
            Err(error) => {
                tracing::error!(
                    error,
                    "the index could not be rebuilt; the next start has to scan all contents"
                );
                std::mem::forget(engine);
            }
        }
    }

    fn finish(&self) -> Option<u64> {
        let engine = self.engine.as_ref()?;
        let generation = rand::random();
        guarded(|| engine.set_generation(Some(generation)).and_then(|()| engine.flush())).ok()?;
        Some(generation)
    }
}

impl Inbox {
    /// What has gathered once `interval` has passed, or at once when told to stop.
    fn take(&self, interval: Duration) -> (Vec<(ContentKey, Option<Row>)>, Option<Stop>) {
        let mut waiting = self.waiting.lock();
        let deadline = Instant::now() + interval;
        while waiting.stop.is_none() && !self.wake.wait_until(&mut waiting, deadline).timed_out() {}
        (waiting.changes.drain().collect(), waiting.stop)
    }
}

/// The engine's panics are errors like any other here.
fn guarded<T>(job: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|_| Err("the engine panicked".to_owned()))
}
