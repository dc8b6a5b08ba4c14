//! When chunks are made durable: at the latest a second after they were written, sooner when many bytes wait.
//!
//! `fdatasync` per chunk would cost a journal commit per 8 MiB; per [`SYNC_BYTES`] or [`SYNC_DELAY`] it is lost in
//! the noise, and keeps the kernel's dirty pages low so that no writer is throttled. What a crash costs is at most
//! that much refetching. The threads are not the pool's: a slow disk may hold them for seconds, and reads must go on.
//!
//! Invariant: each content waits here at most once, so the queue is bounded by the number of contents.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::gauge::Gauge;

use super::entry::Entry;
use super::now_ms;
use super::shared::Shared;
use crate::content::ContentKey;

/// Written bytes of one content that are not left waiting: eight chunks of the default size.
const SYNC_BYTES: u64 = 64 << 20;

/// Longest that a written chunk waits before its sync begins.
const SYNC_DELAY: Duration = Duration::from_secs(1);

/// Between two attempts on a disk that refuses.
const RETRY_DELAY: Duration = Duration::from_secs(5);

/// Two: while one waits for the disk the other gathers.
const THREADS: usize = 2;

/// Between two looks for contents that nobody uses any more.
const COOL_DOWN_INTERVAL: Duration = Duration::from_secs(15);

/// The queue of contents with something to make durable.
#[derive(Debug)]
pub(super) struct Syncer {
    queue: Mutex<Queue>,
    wake: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
    waiting: Gauge,
}

#[derive(Debug, Default)]
struct Queue {
    by_time: BTreeMap<(Instant, ContentKey), Arc<Entry>>,
    times: HashMap<ContentKey, Instant>,
    stopped: bool,
}

impl Syncer {
    pub(super) fn new(waiting: Gauge) -> Self {
        Self { queue: Mutex::default(), wake: Condvar::new(), threads: Mutex::default(), waiting }
    }

    /// Starts the threads of `shared`'s syncer.
    pub(super) fn start(shared: &Arc<Shared>) -> io::Result<()> {
        for number in 0..THREADS {
            let weak = Arc::downgrade(shared);
            let syncer = Arc::clone(&shared.syncer);
            let thread = std::thread::Builder::new()
                .name(format!("store-sync-{number}"))
                .spawn(move || syncer.work((number == 0).then_some(&weak)))?;
            shared.syncer.threads.lock().push(thread);
        }
        Ok(())
    }

    /// `entry` has written something and has `pending_bytes` of it waiting.
    pub(super) fn after_write(&self, entry: &Arc<Entry>, pending_bytes: u64) {
        let delay = if pending_bytes >= SYNC_BYTES { Duration::ZERO } else { SYNC_DELAY };
        self.schedule(entry, Instant::now() + delay);
    }

    pub(super) fn soon(&self, entry: &Arc<Entry>) {
        self.schedule(entry, Instant::now() + SYNC_DELAY);
    }

    /// False once stopped: nobody will look at `entry` any more.
    pub(super) fn now(&self, entry: &Arc<Entry>) -> bool {
        self.schedule(entry, Instant::now())
    }

    pub(super) fn retry(&self, entry: &Arc<Entry>) {
        self.schedule(entry, Instant::now() + RETRY_DELAY);
    }

    /// Ends the threads after what they are at; what still waits is left to the caller. Blocking.
    pub(super) fn stop(&self) {
        let left = {
            let mut queue = self.queue.lock();
            queue.stopped = true;
            queue.times.clear();
            std::mem::take(&mut queue.by_time)
        };
        self.wake.notify_all();
        for thread in self.threads.lock().drain(..) {
            // The jobs' panics are caught.
            let _ = thread.join();
        }
        drop(left);
        self.waiting.set(0);
    }

    fn schedule(&self, entry: &Arc<Entry>, at: Instant) -> bool {
        let mut queue = self.queue.lock();
        let key = *entry.key();
        let planned = queue.times.get(&key).copied();
        if queue.stopped {
            return false;
        }
        if planned.is_some_and(|planned| planned <= at) {
            return true;
        }
        if let Some(planned) = planned {
            queue.by_time.remove(&(planned, key));
        }
        queue.times.insert(key, at);
        queue.by_time.insert((at, key), Arc::clone(entry));
        self.waiting.set(i64::try_from(queue.times.len()).unwrap_or(i64::MAX));
        drop(queue);
        self.wake.notify_one();
        true
    }

    /// `upkeep` is the store when this thread also looks after idle contents.
    fn work(&self, upkeep: Option<&Weak<Shared>>) {
        let mut cool_down_at = Instant::now() + COOL_DOWN_INTERVAL;
        while let Some(due) = self.next(cool_down_at) {
            if let Some(entry) = due {
                // A failure is logged, counted and scheduled again by the entry.
                let synced = catch_unwind(AssertUnwindSafe(|| entry.sync().is_ok()));
                if synced.is_err() {
                    tracing::error!(content = %entry.id(), "making chunks durable panicked");
                }
            }
            if Instant::now() >= cool_down_at {
                cool_down_at = Instant::now() + COOL_DOWN_INTERVAL;
                if let Some(shared) = upkeep.and_then(Weak::upgrade) {
                    shared.cool_down(now_ms());
                }
            }
        }
    }

    /// The content whose time has come, or none at `until`; nothing at all once stopped.
    #[expect(clippy::option_option, reason = "stopped, timed out and due are three things")]
    fn next(&self, until: Instant) -> Option<Option<Arc<Entry>>> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped {
                return None;
            }
            let now = Instant::now();
            if let Some(first) = queue.by_time.first_entry()
                && first.key().0 <= now
            {
                let entry = first.remove();
                queue.times.remove(entry.key());
                self.waiting.set(i64::try_from(queue.times.len()).unwrap_or(i64::MAX));
                return Some(Some(entry));
            }
            if now >= until {
                return Some(None);
            }
            let first = queue.by_time.first_key_value().map_or(until, |((at, _), _)| *at);
            self.wake.wait_until(&mut queue, first.min(until));
        }
    }
}
