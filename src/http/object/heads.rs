//! A short memory of HEADs: one per object and moment, however many ranges ask.
//!
//! Invariant: an answer is never older than its time to live; failures are not remembered; at most [`CAPACITY`]
//! objects are.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::OnceCell;

use crate::origin::OriginError;
use crate::origin::s3::{ObjectHead, S3Origin};

/// Objects remembered: about 1 KiB each makes 4 MiB, and more than one second's worth of distinct objects.
const CAPACITY: usize = 4096;

/// Which object: bucket, key and the version, if one is named.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name {
    pub(super) bucket: String,
    pub(super) key: String,
    pub(super) version_id: Option<String>,
}

/// A HEAD's answer, and whether it came after the question.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) head: Arc<ObjectHead>,
    pub(super) fresh: bool,
}

/// The memory.
pub(super) struct Heads {
    origin: S3Origin,
    ttl: Duration,
    slots: Mutex<HashMap<Name, Arc<Slot>>>,
}

/// One question in flight or answered; those who come meanwhile wait for the same answer.
#[derive(Default)]
struct Slot {
    answer: OnceCell<(Instant, Arc<ObjectHead>)>,
}

impl Slot {
    fn expired(&self, now: Instant, ttl: Duration) -> bool {
        self.answer.get().is_some_and(|(at, _)| now.duration_since(*at) >= ttl)
    }
}

impl Heads {
    pub(super) fn new(origin: S3Origin, ttl: Duration) -> Self {
        Self { origin, ttl, slots: Mutex::default() }
    }

    /// What HEAD says of `name`, at most the time to live ago.
    pub(super) async fn get(&self, name: &Name) -> Result<Known, OriginError> {
        let slot = self.slot(name);
        let fresh = !slot.answer.initialized();
        let ask = || async {
            let head = self.origin.head(&name.bucket, &name.key, name.version_id.as_deref()).await?;
            Ok((Instant::now(), Arc::new(head)))
        };
        let answer = slot.answer.get_or_try_init(ask).await;
        if answer.is_err() {
            self.forget(name);
        }
        let (_, head) = answer?;
        Ok(Known { head: Arc::clone(head), fresh })
    }

    /// The next [`Self::get`] asks the origin.
    pub(super) fn forget(&self, name: &Name) {
        self.slots.lock().remove(name);
    }

    fn slot(&self, name: &Name) -> Arc<Slot> {
        let now = Instant::now();
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.get(name)
            && !slot.expired(now, self.ttl)
        {
            return Arc::clone(slot);
        }
        if slots.len() >= CAPACITY {
            slots.retain(|_, slot| !slot.expired(now, self.ttl));
        }
        if slots.len() >= CAPACITY {
            slots.clear();
        }
        let slot = Arc::<Slot>::default();
        slots.insert(name.clone(), Arc::clone(&slot));
        slot
    }
}
