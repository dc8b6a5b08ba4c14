//! The threads that hash, read and write, so that no network task ever waits for a disk.
//!
//! Invariant: at most [`LANE_JOBS_MAX`] jobs wait per lane; a caller beyond that waits before it hands over its
//! bytes. Reads go first, because a client hangs on each, but never starve writes; and one thread takes reads only, so
//! that writes which wait (for a disk that syncs, for an eviction) never hold up a read from memory.
//! This module refuses to know what a job does. It is not `spawn_blocking`, whose queue has no bound and whose one
//! lock all threads contend for (tokio issue 8470).

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::error::Closed;
use super::metrics::{Lane, Metrics};

/// Waiting jobs per lane: enough to keep every thread busy between two wake-ups of the callers. Their bytes belong
/// to callers who wait anyway, so this bounds latency, not memory.
pub(super) const LANE_JOBS_MAX: usize = 64;

/// Reads served in a row before a waiting write gets its turn.
const READS_IN_A_ROW_MAX: u32 = 8;

type Job = Box<dyn FnOnce() + Send>;

/// A bounded pool of threads.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
    read: LaneGate,
    write: LaneGate,
}

struct LaneGate {
    room: Arc<Semaphore>,
    gauge: Gauge,
}

#[derive(Default)]
struct Queue {
    read: VecDeque<(Job, OwnedSemaphorePermit)>,
    write: VecDeque<(Job, OwnedSemaphorePermit)>,
    reads_in_a_row: u32,
    /// Writes that run now, and how many may.
    writing: usize,
    writing_max: usize,
    stopped: bool,
}

impl Pool {
    /// Starts `threads` threads that do everything, and one for reads alone.
    pub(super) fn start(threads: usize, metrics: &Metrics) -> std::io::Result<Self> {
        let gate = |lane| LaneGate {
            room: Arc::new(Semaphore::new(LANE_JOBS_MAX)),
            gauge: metrics.queue_gauge(lane),
        };
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { writing_max: threads, ..Queue::default() }),
            ready: Condvar::new(),
            read: gate(Lane::Read),
            write: gate(Lane::Write),
        });
        let pool = Self { shared: Arc::clone(&shared), threads: Mutex::default() };
        for number in 0..=threads {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new()
                .name(format!("store-io-{number}"))
                .spawn(move || shared.work())?;
            pool.threads.lock().push(thread);
        }
        Ok(pool)
    }

    /// Runs `job` on a thread of the pool and returns what it returned.
    ///
    /// Once queued the job runs even when the caller goes away.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        lane: Lane,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Closed> {
        let (answer, answered) = oneshot::channel();
        self.submit(lane, move || {
            // The caller may have gone.
            let _ = answer.send(job());
        })
        .await?;
        answered.await.map_err(|_| Closed)
    }

    /// Queues `job`; returns as soon as there is room for it.
    pub(super) async fn submit(&self, lane: Lane, job: impl FnOnce() + Send + 'static) -> Result<(), Closed> {
        let room = Arc::clone(&self.shared.gate(lane).room).acquire_owned().await.map_err(|_| Closed)?;
        self.shared.push(lane, Box::new(job), room)
    }

    /// Queues `job` if there is room right now.
    pub(super) fn try_submit(&self, lane: Lane, job: impl FnOnce() + Send + 'static) -> bool {
        let Ok(room) = Arc::clone(&self.shared.gate(lane).room).try_acquire_owned() else { return false };
        self.shared.push(lane, Box::new(job), room).is_ok()
    }

    /// Takes no more jobs, finishes those that are queued, and waits for the threads. Blocking.
    pub(super) fn stop(&self) {
        self.shared.read.room.close();
        self.shared.write.room.close();
        self.shared.queue.lock().stopped = true;
        self.shared.ready.notify_all();
        for thread in self.threads.lock().drain(..) {
            // A job's panic is caught where it runs, so the thread itself cannot have panicked.
            let _ = thread.join();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    const fn gate(&self, lane: Lane) -> &LaneGate {
        match lane {
            Lane::Read => &self.read,
            Lane::Write => &self.write,
        }
    }

    fn push(&self, lane: Lane, job: Job, room: OwnedSemaphorePermit) -> Result<(), Closed> {
        let mut queue = self.queue.lock();
        if queue.stopped {
            return Err(Closed);
        }
        self.gate(lane).gauge.inc();
        match lane {
            Lane::Read => queue.read.push_back((job, room)),
            Lane::Write => queue.write.push_back((job, room)),
        }
        drop(queue);
        self.ready.notify_one();
        Ok(())
    }

    fn work(&self) {
        while let Some((lane, job)) = self.next() {
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                // Whoever waits for the job sees its channel closed.
                tracing::error!("a job of the store panicked; its caller got an error");
            }
            if lane == Lane::Write {
                self.wrote();
            }
        }
    }

    /// The next write may begin; this thread may have a read to do first.
    fn wrote(&self) {
        let mut queue = self.queue.lock();
        queue.writing -= 1;
        if !queue.write.is_empty() {
            self.ready.notify_one();
        }
    }

    fn next(&self) -> Option<(Lane, Job)> {
        let mut queue = self.queue.lock();
        loop {
            if let Some((lane, job, room)) = queue.pop() {
                self.gate(lane).gauge.dec();
                drop(room);
                return Some((lane, job));
            }
            if queue.stopped {
                return None;
            }
            self.ready.wait(&mut queue);
        }
    }
}

impl Queue {
    fn pop(&mut self) -> Option<(Lane, Job, OwnedSemaphorePermit)> {
        let may_write = self.writing < self.writing_max && !self.write.is_empty();
        let writes_turn = may_write && self.reads_in_a_row >= READS_IN_A_ROW_MAX;
        if !writes_turn && let Some((job, room)) = self.read.pop_front() {
            self.reads_in_a_row += 1;
            return Some((Lane::Read, job, room));
        }
        if !may_write {
            return None;
        }
        self.reads_in_a_row = 0;
        self.writing += 1;
        self.write.pop_front().map(|(job, room)| (Lane::Write, job, room))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn jobs_run_and_a_panic_harms_only_its_caller() {
        let pool = Pool::start(1, &Metrics::default()).unwrap();
        assert_eq!(pool.run(Lane::Read, || 1).await.unwrap(), 1);
        assert!(pool.run(Lane::Write, || panic!("job")).await.is_err());
        assert_eq!(pool.run(Lane::Write, || 2).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn the_queue_is_bounded_and_drained_at_the_end() {
        let pool = Pool::start(1, &Metrics::default()).unwrap();
        let (open, gate) = std::sync::mpsc::sync_channel::<()>(0);
        let done = Arc::new(AtomicU32::new(0));
        let gate = Arc::new(Mutex::new(gate));
        let (begin, mut begun) = tokio::sync::mpsc::channel(2);
        for _ in 0..2 {
            let (gate, begin) = (Arc::clone(&gate), begin.clone());
            let job = move || {
                begin.try_send(()).unwrap();
                gate.lock().recv().unwrap();
            };
            pool.submit(Lane::Read, job).await.unwrap();
            begun.recv().await.unwrap();
        }
        let mut queued = 0;
        let count = || {
            let done = Arc::clone(&done);
            move || {
                done.fetch_add(1, Ordering::Relaxed);
            }
        };
        while pool.try_submit(Lane::Read, count()) {
            queued += 1;
            assert!(queued <= LANE_JOBS_MAX);
        }
        assert_eq!(queued, LANE_JOBS_MAX);
        open.send(()).unwrap();
        open.send(()).unwrap();
        pool.stop();
        assert_eq!(done.load(Ordering::Relaxed) as usize, queued);
        assert!(pool.run(Lane::Read, || ()).await.is_err());
    }

    #[tokio::test]
    async fn writes_that_wait_hold_up_no_read() {
        let pool = Pool::start(2, &Metrics::default()).unwrap();
        let (open, gate) = std::sync::mpsc::sync_channel::<()>(0);
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..5 {
            let gate = Arc::clone(&gate);
            pool.submit(Lane::Write, move || gate.lock().recv().unwrap()).await.unwrap();
        }
        for number in 0..20 {
            assert_eq!(pool.run(Lane::Read, move || number).await.unwrap(), number);
        }
        for _ in 0..5 {
            open.send(()).unwrap();
        }
    }

    #[test]
    fn a_write_is_not_starved() {
        let room = Arc::new(Semaphore::new(100));
        let mut queue = Queue { writing_max: 1, ..Queue::default() };
        let permit = || Arc::clone(&room).try_acquire_owned().unwrap();
        for _ in 0..20 {
            queue.read.push_back((Box::new(|| ()), permit()));
        }
        queue.write.push_back((Box::new(|| ()), permit()));
        let order: Vec<Lane> = std::iter::from_fn(|| queue.pop().map(|(lane, ..)| lane)).collect();
        assert_eq!(order.iter().position(|lane| *lane == Lane::Write), Some(READS_IN_A_ROW_MAX as usize));
        assert_eq!(order.len(), 21);
    }
}
