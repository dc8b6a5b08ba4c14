//! One fetch, from the plan to the last file.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::destination::{Destination, DestinationError};
use super::plan::{Plan, PlanError, PlannedFile};
use super::verify::{Expectations, Mismatch, Verdict, VerifyError};
use super::{Event, FetchRequest, Fetcher, Outcome, Shares, Summary, Verified};
use crate::cache::{Content, OpenError, ReadError};
use crate::content::ContentId;
use crate::origin::OriginError;
use crate::store::{PlaceError, PlaceOptions, Placement};

/// Between two progress events: a bar looks alive at four steps a second, and nobody reads faster.
const PROGRESS_PERIOD: Duration = Duration::from_millis(250);

/// How often one file is begun again because its object changed or its stored copy went bad. Whoever overwrites an
/// object in a loop must not keep us in one.
const RESTARTS: u32 = 2;

/// Why a fetch ended without every file in place.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("the daemon serves {0} fetches already (`fetch.max_active`); try again when one is done")]
    TooMany(usize),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Room(#[from] PlaceError),
    #[error(transparent)]
    Destination(#[from] DestinationError),
    #[error("{failed} of {files} files are not in place; the same command continues where this one ended")]
    Files { failed: u64, files: u64 },
    #[error("the client is gone")]
    Gone,
    #[error("a task of the daemon's broke: {0}")]
    Broken(#[from] tokio::task::JoinError),
}

/// Why one file is not in place.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// Fetched from the origin twice, and wrong both times; its bytes are gone from the store.
    #[error("{0}; fetched twice from S3, and not placed")]
    Wrong(Box<Mismatch>),
    #[error("cannot keep its stored copy from eviction: {0}")]
    Pin(std::io::Error),
    #[error("cannot note it down as placed: {0}")]
    Ledger(std::io::Error),
    #[error("a task of the daemon's broke: {0}")]
    Broken(#[from] tokio::task::JoinError),
}

impl Fetcher {
    /// Does what `request` asks and tells `events` about it; the last event is [`Event::Done`] or [`Event::Failed`].
    ///
    /// Dropping the future, or the receiver, cancels: demand for bytes is withdrawn, what is stored stays stored.
    pub async fn run(&self, request: FetchRequest, events: mpsc::Sender<Event>) {
        let mut active = Active::begin(self);
        let begun = Instant::now();
        let (event, outcome) = match self.attempt(&request, &events).await {
            Ok(summary) => {
                (Event::Done(Summary { seconds: begun.elapsed().as_secs_f64(), ..summary }), Outcome::Done)
            }
            Err(FetchError::Gone) => return,
            Err(error @ FetchError::TooMany(_)) => {
                (Event::Failed { reason: error.to_string() }, Outcome::Refused)
            }
            Err(error) => (Event::Failed { reason: error.to_string() }, Outcome::Failed),
        };
        if events.send(event).await.is_ok() {
            active.outcome = outcome;
        }
    }

    async fn attempt(
        &self,
        request: &FetchRequest,
        events: &mpsc::Sender<Event>,
    ) -> Result<Summary, FetchError> {
        let limit = self.inner.config.max_active;
        let _slot = self.inner.slots.try_acquire().map_err(|_| FetchError::TooMany(limit))?;
        let plan = Plan::make(&self.inner.origin, &self.inner.callers, request).await?;
        let (files, bytes) = totals(&plan.files);
        let (destination, kept, missing) = prepare(plan).await?;
        let options = place_options(request);
        let store = &self.inner.store;
        store.check_destination(destination.root(), totals(&missing).1, options).await?;
        let (kept_files, kept_bytes) = totals(&kept);
        send(events, Event::Plan { files, bytes, kept_files, kept_bytes }).await?;
        let tally = Tally::new(kept_files, kept_bytes);
        let lease = request.pin_for_seconds.map(Duration::from_secs);
        let transfer = Transfer { fetcher: self, destination, options, lease, tally, events };
        let failed = transfer.all(missing).await?;
        send(events, transfer.tally.progress()).await?;
        match failed {
            0 => {
                let (shares, verified) = (transfer.tally.shares(), transfer.tally.verified(kept_files));
                Ok(Summary { files, bytes, seconds: 0.0, shares, verified })
            }
            failed => Err(FetchError::Files { failed, files }),
        }
    }
}

/// The destination, what is whole there already, and what is missing.
async fn prepare(plan: Plan) -> Result<(Arc<Destination>, Vec<PlannedFile>, Vec<PlannedFile>), FetchError> {
    let prepared = spawn_blocking(move || {
        let destination = Destination::open(&plan.root)?;
        let is_kept = |file: &PlannedFile| destination.is_whole(file) && destination.is_as_said(file);
        let (kept, missing) = plan.files.into_iter().partition(is_kept);
        Ok::<_, DestinationError>((Arc::new(destination), kept, missing))
    });
    Ok(prepared.await??)
}

fn place_options(request: &FetchRequest) -> PlaceOptions {
    let usual = PlaceOptions::default();
    PlaceOptions {
        mode: request.mode.unwrap_or(usual.mode),
        owner: request.owner,
        allow_hard_link: !request.no_hard_link,
    }
}

fn totals(files: &[PlannedFile]) -> (u64, u64) {
    (files.len() as u64, files.iter().map(|file| file.version.size).sum())
}

async fn send(events: &mpsc::Sender<Event>, event: Event) -> Result<(), FetchError> {
    events.send(event).await.map_err(|_| FetchError::Gone)
}

/// Counts a fetch while it lives; one that is dropped was cancelled.
struct Active<'a> {
    fetcher: &'a Fetcher,
    outcome: Outcome,
}

impl<'a> Active<'a> {
    fn begin(fetcher: &'a Fetcher) -> Self {
        fetcher.inner.metrics.active.inc();
        Self { fetcher, outcome: Outcome::Cancelled }
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.fetcher.inner.metrics.active.dec();
        self.fetcher.inner.metrics.finish(self.outcome);
    }
}

/// The files of one fetch under way.
struct Transfer<'a> {
    fetcher: &'a Fetcher,
    destination: Arc<Destination>,
    options: PlaceOptions,
    /// Keeps the stored copy from eviction for so long.
    lease: Option<Duration>,
    tally: Tally,
    events: &'a mpsc::Sender<Event>,
}

impl Transfer<'_> {
    /// Fetches and places `files`, several at a time in their order. One that fails does not stop the others.
    async fn all(&self, files: Vec<PlannedFile>) -> Result<u64, FetchError> {
        let at_once = self.fetcher.inner.config.files_in_flight.max(1);
        let mut transfers = stream::iter(files).map(|file| self.one(file)).buffer_unordered(at_once);
        let mut tick = tokio::time::interval(PROGRESS_PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut failed = 0;
        loop {
            let event = tokio::select! {
                ended = transfers.next() => match ended {
                    Some(event) => event,
                    None => return Ok(failed),
                },
                _ = tick.tick() => self.tally.progress(),
            };
            failed += u64::from(matches!(event, Event::FileFailed { .. }));
            send(self.events, event).await?;
        }
    }

    /// How one file ended.
    async fn one(&self, file: PlannedFile) -> Event {
        let path = file.path.clone();
        match self.place(file).await {
            Ok((file, placement, verdict)) => Event::File {
                path,
                bytes: file.version.size,
                method: placement.method,
                etag: file.version.etag.0,
                verified_by: verdict.by,
                not_verified_by_s3: verdict.not_by_s3,
            },
            Err(error) => Event::FileFailed { path, reason: error.to_string() },
        }
    }

    /// Until it is in place, beginning again where that can help.
    async fn place(&self, mut file: PlannedFile) -> Result<(PlannedFile, Placement, Verdict), FileError> {
        let mut restarts = 0;
        loop {
            let error = match self.attempt(&file).await {
                Ok((placement, verdict)) => return Ok((file, placement, verdict)),
                Err(error) => error,
            };
            restarts += 1;
            match error {
                _ if restarts > RESTARTS => return Err(error),
                FileError::Read(ReadError::Origin(OriginError::Changed { .. })) if !file.is_fixed => {
                    file = self.pin_again(file).await?;
                }
                FileError::Place(PlaceError::Corrupt(_)) => {}
                error => return Err(error),
            }
        }
    }

    async fn pin_again(&self, file: PlannedFile) -> Result<PlannedFile, FileError> {
        let old = &file.version;
        let head = self.fetcher.inner.origin.head(&old.bucket, &old.key, None).await?;
        let changed = Event::Changed {
            path: file.path.clone(),
            old_etag: old.etag.0.clone(),
            new_etag: head.version.etag.0.clone(),
            new_bytes: head.version.size,
        };
        // Whether anyone still listens shows at the next event.
        let _ = self.events.send(changed).await;
        Ok(PlannedFile { version: head.version, version_id: head.version_id, ..file })
    }

    async fn attempt(&self, file: &PlannedFile) -> Result<(Placement, Verdict), FileError> {
        let inner = &self.fetcher.inner;
        let source = Arc::new(inner.origin.object(file.version.clone(), file.version_id.clone()));
        let id = ContentId::Object(file.version.clone());
        let content = inner.cache.open(id, file.version.size, source).await?;
        let watched = self.tally.watch(&file.path, &content);
        let (filled, expectations) = tokio::join!(content.fill(), Expectations::of(&inner.origin, file));
        filled?;
        let verdict = verify(&content, &expectations).await?;
        content.fill().await?;
        if let Some(lease) = self.lease {
            content.pin_for(lease).await.map_err(FileError::Pin)?;
        }
        let target = self.destination.target(file);
        let placement = content.place(&target, self.options).await?;
        let (destination, placed) = (Arc::clone(&self.destination), file.clone());
        spawn_blocking(move || destination.record(&placed)).await?.map_err(FileError::Ledger)?;
        inner.metrics.placed_bytes.inc_by(file.version.size);
        watched.done(&verdict);
        Ok((placement, verdict))
    }
}

/// Compares, and has what differs fetched again from the origin, once: a peer may have attested what is not so.
async fn verify(content: &Content, expectations: &Expectations) -> Result<Verdict, FileError> {
    let first = match expectations.check(content).await {
        Err(VerifyError::Mismatch(mismatch)) => mismatch,
        done => return Ok(done?),
    };
    tracing::error!(mismatch = %first, "fetching again from the origin what is wrong");
    content.redo(first.range).await?;
    let second = match expectations.check(content).await {
        Err(VerifyError::Mismatch(mismatch)) => mismatch,
        done => return Ok(done?),
    };
    // What a caller's list alone calls wrong is what S3 has, and others may want it.
    if second.is_s3s {
        content.discard(second.range).await;
    }
    Err(FileError::Wrong(second))
}

impl From<VerifyError> for FileError {
    fn from(error: VerifyError) -> Self {
        match error {
            VerifyError::Mismatch(mismatch) => Self::Wrong(mismatch),
            VerifyError::Read(error) => Self::Read(error),
            VerifyError::Broken(error) => Self::Broken(error),
        }
    }
}

/// How far the fetch is.
struct Tally {
    state: Mutex<State>,
}

struct State {
    files_done: u64,
    /// Of files that are in place.
    settled: Shares,
    verified: Verified,
    under_way: HashMap<String, Content>,
}

impl Tally {
    fn new(kept_files: u64, kept_bytes: u64) -> Self {
        let settled = Shares { local_bytes: kept_bytes, ..Shares::default() };
        let (verified, under_way) = (Verified::default(), HashMap::new());
        Self { state: Mutex::new(State { files_done: kept_files, settled, verified, under_way }) }
    }

    /// Counts `content` as under way until the guard is dropped, and as done if it is told so before.
    fn watch(&self, path: &str, content: &Content) -> Watched<'_> {
        self.state.lock().under_way.insert(path.into(), content.clone());
        Watched { tally: self, path: path.into() }
    }

    fn shares(&self) -> Shares {
        let state = self.state.lock();
        state.under_way.values().fold(state.settled, |sum, content| add(sum, shares_of(content)))
    }

    fn verified(&self, kept_files: u64) -> Verified {
        Verified { kept_files, ..self.state.lock().verified }
    }

    fn progress(&self) -> Event {
        let shares = self.shares();
        Event::Progress { files_done: self.state.lock().files_done, shares }
    }
}

struct Watched<'a> {
    tally: &'a Tally,
    path: String,
}

impl Watched<'_> {
    fn done(self, verdict: &Verdict) {
        let mut state = self.tally.state.lock();
        if let Some(content) = state.under_way.remove(&self.path) {
            state.settled = add(state.settled, shares_of(&content));
            state.files_done += 1;
            match verdict.by.is_empty() {
                true => state.verified.by_nothing_files += 1,
                false => state.verified.now_files += 1,
            }
        }
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.tally.state.lock().under_way.remove(&self.path);
    }
}

fn shares_of(content: &Content) -> Shares {
    let progress = content.progress();
    Shares {
        local_bytes: progress.local,
        peer_bytes: progress.from_peers,
        origin_bytes: progress.from_origin,
    }
}

const fn add(a: Shares, b: Shares) -> Shares {
    Shares {
        local_bytes: a.local_bytes + b.local_bytes,
        peer_bytes: a.peer_bytes + b.peer_bytes,
        origin_bytes: a.origin_bytes + b.origin_bytes,
    }
}
