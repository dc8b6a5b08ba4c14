//! Reads what is stored once more, slowly and for ever, so that a tired disk is noticed before a client is.
//!
//! Invariant: at most `store.scrub_rate` bytes are read per second, past the page cache where the file system lets us,
//! so that nobody's working set is evicted for it. A content is held for one chunk at a time: scrubbing keeps nothing
//! from eviction. This module refuses to mend: a bad chunk is dropped like any other, and fetched by who wants it.

use std::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::entry::Entry;
use super::shared::Shared;
use crate::content::{ChunkIndex, ContentKey};

/// Between two passes over a store that has nothing, or next to nothing, in it.
const PASS_MIN: Duration = Duration::from_secs(60);

/// The thread, and the way to end it.
#[derive(Debug, Default)]
pub(super) struct Scrubber {
    stopped: Mutex<bool>,
    wake: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Scrubber {
    /// Starts the thread of `shared`'s scrubber; nothing happens at a rate of 0 bytes per second.
    pub(super) fn start(shared: &Arc<Shared>, rate: u64) -> io::Result<()> {
        if rate == 0 {
            return Ok(());
        }
        let (weak, scrubber) = (Arc::downgrade(shared), Arc::clone(&shared.scrubber));
        let thread = std::thread::Builder::new()
            .name("store-scrub".to_owned())
            .spawn(move || scrubber.run(&weak, rate))?;
        *shared.scrubber.thread.lock() = Some(thread);
        Ok(())
    }

    /// Ends the thread after the chunk that it is at. Blocking.
    pub(super) fn stop(&self) {
        *self.stopped.lock() = true;
        self.wake.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            // Whatever it panicked over was logged by the panic hook.
            let _ = thread.join();
        }
    }

    fn run(&self, shared: &Weak<Shared>, rate: u64) {
        // Not in the first minute, which has better uses for the disk.
        let mut begun = Instant::now();
        while self.sleep_until(begun + PASS_MIN) {
            begun = Instant::now();
            let Some(keys) = shared.upgrade().map(|shared| shared.catalog.keys()) else { return };
            if !keys.iter().all(|key| self.scrub_content(shared, key, rate)) {
                return;
            }
            if let Some(shared) = shared.upgrade() {
                shared.metrics.scrub_passes.inc();
            }
        }
    }

    /// False once stopped.
    fn scrub_content(&self, shared: &Weak<Shared>, key: &ContentKey, rate: u64) -> bool {
        let mut next = ChunkIndex(0);
        loop {
            let begun = Instant::now();
            let Some(strong) = shared.upgrade() else { return false };
            // Evicted meanwhile, or done.
            let Some((chunk, bytes)) = strong.get(key).and_then(|entry| entry.scrub_from(next)) else {
                return !*self.stopped.lock();
            };
            strong.metrics.scrubbed_bytes.inc_by(bytes);
            drop(strong);
            next = ChunkIndex(chunk.0 + 1);
            if !self.sleep_until(begun + Duration::from_secs_f64(bytes as f64 / rate as f64)) {
                return false;
            }
        }
    }

    /// False once stopped.
    fn sleep_until(&self, at: Instant) -> bool {
        let mut stopped = self.stopped.lock();
        while !*stopped && !self.wake.wait_until(&mut stopped, at).timed_out() {}
        !*stopped
    }
}

#[cfg(test)]
impl Shared {
    /// One pass, here and now.
    pub(super) fn scrub_all(self: &Arc<Self>) {
        for key in self.catalog.keys() {
            let mut next = ChunkIndex(0);
            while let Some((chunk, _)) = self.get(&key).and_then(|entry| entry.scrub_from(next)) {
                next = ChunkIndex(chunk.0 + 1);
            }
        }
    }
}

impl Entry {
    /// Checks the first held chunk from `next` on; returns it and its length, or none when there is none.
    pub(super) fn scrub_from(self: &Arc<Self>, next: ChunkIndex) -> Option<(ChunkIndex, u64)> {
        let chunk = self.have().iter().find(|chunk| chunk.0 >= next.0)?;
        // What is wrong was counted, logged and dropped.
        let _ = self.scrub(chunk);
        Some((chunk, self.layout().chunk_range(chunk).len()))
    }
}
