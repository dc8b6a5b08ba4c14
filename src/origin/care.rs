//! How an origin's requests are sent again, sped up and held back, the same for registries and S3.
//!
//! Invariant: what we add to an origin's load is bounded by the load itself ([`Budget`]); an origin that names a time
//! is left alone until then; a body goes on at the byte where it broke, and every byte is delivered once.
//! This module refuses to hide a failure that lasts: the swarm hears of it, and knows better whom to ask next.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::{BoxFuture, Either, select};
use futures_util::{FutureExt, StreamExt, stream};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::metrics::OriginMetrics;
use super::{Body, OriginError, awake};
use crate::content::ByteRange;

/// Attempts of a small question on which somebody waits: with the pauses below they take less than a second.
const ATTEMPTS: u32 = 3;

/// Before the second attempt at most this long, then twice that.
const BACKOFF: Duration = Duration::from_millis(200);

/// The longest `Retry-After` that is waited for: somebody waits for us, with a first-byte deadline of ten seconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// No `Retry-After` is believed for longer: a registry that says "in a day" is asked again in a minute.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Times one body goes on after a break before the flow is given back to the swarm.
const RESUMES: u32 = 2;

/// What a request adds to the budget, in thousandths of a retry: a fifth, linkerd's default ratio.
const DEPOSIT: u32 = 200;

/// One retry.
const RETRY: u32 = 1000;

/// Retries in hand at first, and at most.
const FIRST_BALANCE: u32 = 10 * RETRY;
const HIGHEST_BALANCE: u32 = 100 * RETRY;

/// How one origin is asked. Shared by all who ask it.
#[derive(Debug)]
pub(super) struct Care {
    metrics: OriginMetrics,
    /// A range that brings nothing for this long is asked for a second time.
    hedge_after: Duration,
    budget: Mutex<Budget>,
    /// The origin asked to be left alone until then.
    paused_until: Mutex<Option<Instant>>,
}

/// Retries are paid from what requests deposit, so that an origin that fails everything gets a fifth more, not thrice
/// the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Budget(u32);

/// Opens the body of a range, once.
pub(super) type Opener =
    Box<dyn Fn(ByteRange) -> BoxFuture<'static, Result<Body, OriginError>> + Send + Sync>;

impl Budget {
    fn deposit(&mut self) {
        self.0 = (self.0 + DEPOSIT).min(HIGHEST_BALANCE);
    }

    fn withdraw(&mut self) -> bool {
        match self.0.checked_sub(RETRY) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }
}

impl Care {
    /// `progress_timeout` is when the origin's bodies are given up; a hedge comes well before, so that the second request
    /// has time to be slow as well.
    #[must_use]
    pub(super) fn new(metrics: OriginMetrics, progress_timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            metrics,
            // With the usual 10 s: sooner than the swarm takes a claim that stands still, 5 s, and late enough that an
            // origin which is only busy is not asked for the same bytes twice.
            hedge_after: progress_timeout * 2 / 5,
            budget: Mutex::new(Budget(FIRST_BALANCE)),
            paused_until: Mutex::default(),
        })
    }

    /// Asks a small question, again after a transient failure.
    ///
    /// # Errors
    /// The last attempt's.
    pub(super) async fn ask<T, F>(&self, mut question: impl FnMut() -> F) -> Result<T, OriginError>
    where
        F: Future<Output = Result<T, OriginError>>,
    {
        let mut attempt = 1;
        loop {
            self.ready().await?;
            self.budget.lock().deposit();
            let answer = question().await;
            self.note(&answer);
            match answer {
                Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                    let Some(pause) = pause(attempt, rand::random(), &error) else { return Err(error) };
                    if !self.budget.lock().withdraw() {
                        return Err(error);
                    }
                    self.metrics.retried();
                    tokio::time::sleep(pause).await;
                    attempt += 1;
                }
                answer => return answer,
            }
        }
    }

    /// Reads a range with `open`: asks a second time when nothing comes, and goes on where a body broke.
    ///
    /// # Errors
    /// When the first request fails before its headers, and no second one was under way.
    pub(super) async fn read(self: Arc<Self>, open: Opener, range: ByteRange) -> Result<Body, OriginError> {
        let mut reading = Reading {
            care: self,
            open,
            rest: range,
            body: stream::empty().boxed(),
            second: None,
            has_hedged: false,
            resumes: 0,
        };
        reading.body = reading.begin().await?;
        let pieces = stream::unfold(Some(reading), |reading| async move {
            let mut reading = reading?;
            match reading.next().await {
                Ok(None) => None,
                Ok(Some(piece)) => Some((Ok(piece), Some(reading))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(pieces.boxed())
    }

    /// Waits out a pause that the origin asked for, if it is short.
    async fn ready(&self) -> Result<(), OriginError> {
        let Some(until) = *self.paused_until.lock() else { return Ok(()) };
        let left = until.saturating_duration_since(Instant::now());
        if left > PATIENCE {
            let origin = self.metrics.label().to_owned();
            return Err(OriginError::Throttled { origin, retry_after: Some(left) });
        }
        tokio::time::sleep(left).await;
        Ok(())
    }

    fn note<T>(&self, answer: &Result<T, OriginError>) {
        if let Err(OriginError::Throttled { retry_after: Some(asked), .. }) = answer {
            let until = Instant::now() + (*asked).min(LONGEST_PAUSE);
            let mut paused = self.paused_until.lock();
            *paused = Some(paused.map_or(until, |before| before.max(until)));
        }
    }

    async fn send(&self, open: &Opener, range: ByteRange) -> Result<Body, OriginError> {
        self.ready().await?;
        self.budget.lock().deposit();
        let body = open(range).await;
        self.note(&body);
        body
    }

    fn may_repeat(&self) -> bool {
        let is_paused = self.paused_until.lock().is_some_and(|until| until > Instant::now());
        !is_paused && self.budget.lock().withdraw()
    }
}

/// What a `Retry-After` asks for: seconds, or a date (RFC 9110, section 10.2.3), which `now` is subtracted from. A date
/// that is over means "now".
pub(super) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let by_date = || Some(httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default());
    value.parse().map(Duration::from_secs).ok().or_else(by_date)
}

/// The pause before attempt `attempt + 1`; `None` when the origin asks for more patience than there is.
///
/// Full jitter (M. Brooker, "Exponential Backoff And Jitter"): `random` is in 0..1.
fn pause(attempt: u32, random: f64, error: &OriginError) -> Option<Duration> {
    let asked = match error {
        OriginError::Throttled { retry_after: Some(asked), .. } => *asked,
        _ => Duration::ZERO,
    };
    let backoff = (BACKOFF * (1 << (attempt - 1).min(8))).mul_f64(random);
    (asked <= PATIENCE).then(|| asked.max(backoff))
}

/// A second request for the rest of a range, with its first piece.
type Second = BoxFuture<'static, Result<(Body, Bytes), OriginError>>;

struct Reading {
    care: Arc<Care>,
    open: Opener,
    /// What is not delivered yet.
    rest: ByteRange,
    body: Body,
    second: Option<Second>,
    has_hedged: bool,
    resumes: u32,
}

impl Reading {
    /// The first body to have its headers.
    async fn begin(&mut self) -> Result<Body, OriginError> {
        let hedge_after = self.care.hedge_after;
        let first = self.care.send(&self.open, self.rest);
        tokio::pin!(first);
        if let Ok(answer) = awake::timeout(hedge_after, &mut first).await {
            return answer;
        }
        if !self.care.may_repeat() {
            return first.await;
        }
        self.has_hedged = true;
        self.care.metrics.hedged();
        let second = self.care.send(&self.open, self.rest);
        tokio::pin!(second);
        match select(first, second).await {
            Either::Left((Err(_), other)) => other.await,
            Either::Right((Err(_), other)) => other.await,
            Either::Left((body, _)) => body,
            Either::Right((body, _)) => {
                self.care.metrics.hedge_won();
                body
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, OriginError> {
        loop {
            if self.rest.is_empty() {
                return Ok(None);
            }
            let may_hedge = !self.has_hedged;
            let step = tokio::select! {
                biased;
                piece = self.body.next() => Step::Piece(piece.transpose()),
                second = run(&mut self.second) => Step::Second(second),
                () = awake::sleep(self.care.hedge_after), if may_hedge => Step::Stalled,
            };
            match step {
                Step::Piece(Ok(Some(piece))) => return Ok(Some(self.deliver(piece))),
                Step::Piece(Ok(None)) => return Ok(None),
                Step::Piece(Err(error)) => self.go_on(error).await?,
                Step::Stalled => self.hedge(),
                Step::Second(Err(error)) => {
                    tracing::debug!(%error, "a second request for a stalled range failed too");
                    self.second = None;
                }
                Step::Second(Ok((body, piece))) => {
                    self.care.metrics.hedge_won();
                    self.body = body;
                    return Ok(Some(self.deliver(piece)));
                }
            }
        }
    }

    fn deliver(&mut self, piece: Bytes) -> Bytes {
        // It moves again: whoever was asked beside is not needed.
        self.second = None;
        self.rest = ByteRange::new(self.rest.start() + piece.len() as u64, self.rest.end());
        piece
    }

    /// Asks for the rest a second time, if the budget has it.
    fn hedge(&mut self) {
        self.has_hedged = true;
        if !self.care.may_repeat() {
            return;
        }
        self.care.metrics.hedged();
        let opened = (self.open)(self.rest);
        self.second = Some(
            async move {
                let mut body = opened.await?;
                match body.next().await {
                    Some(piece) => Ok((body, piece?)),
                    None => Err(OriginError::Ours("a body without a byte".to_owned())),
                }
            }
            .boxed(),
        );
    }

    /// After a break: with the second request if there is one, else with a new one for the rest.
    async fn go_on(&mut self, error: OriginError) -> Result<(), OriginError> {
        if let Some(second) = self.second.take()
            && let Ok((body, piece)) = second.await
        {
            self.care.metrics.hedge_won();
            self.body = stream::iter([Ok(piece)]).chain(body).boxed();
            return Ok(());
        }
        let mut error = error;
        while error.is_transient() && self.resumes < RESUMES && self.care.may_repeat() {
            self.resumes += 1;
            self.care.metrics.resumed();
            tracing::debug!(%error, at = self.rest.start(), "going on where a body broke");
            match self.care.send(&self.open, self.rest).await {
                Ok(body) => {
                    self.body = body;
                    return Ok(());
                }
                // What broke the body may have broken the connection that the pool had next.
                Err(again) => error = again,
            }
        }
        Err(error)
    }
}

enum Step {
    Piece(Result<Option<Bytes>, OriginError>),
    Second(Result<(Body, Bytes), OriginError>),
    Stalled,
}

async fn run(second: &mut Option<Second>) -> Result<(Body, Bytes), OriginError> {
    match second {
        Some(second) => second.await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt;
    use proptest::prelude::*;

    use super::super::Metrics;
    use super::super::fake::{FakeSource, Fault};
    use super::super::{Kind, Source};
    use super::*;

    const SIZE: u64 = 400_000;

    struct Bench {
        care: Arc<Care>,
        fake: Arc<FakeSource>,
    }

    impl Bench {
        fn new() -> Self {
            let metrics = Metrics::default().origin("test");
            Self { care: Care::new(metrics, Duration::from_millis(80)), fake: FakeSource::new(3, SIZE) }
        }

        async fn read(&self, range: ByteRange) -> Result<Vec<u8>, OriginError> {
            let fake = Arc::clone(&self.fake);
            let open: Opener = Box::new(move |range| {
                let fake = Arc::clone(&fake);
                async move { fake.read(range).await }.boxed()
            });
            let body = Arc::clone(&self.care).read(open, range).await?;
            body.map_ok(|piece| piece.to_vec()).try_concat().await
        }

        async fn read_all(&self) -> Result<Vec<u8>, OriginError> {
            self.read(ByteRange::new(0, SIZE)).await
        }

        fn right(&self) -> Vec<u8> {
            self.fake.bytes(ByteRange::new(0, SIZE)).to_vec()
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_goes_on_at_the_byte() {
        let bench = Bench::new();
        bench.fake.inject(0, 1, Fault::Short(100_001));
        assert_eq!(bench.read_all().await.unwrap(), bench.right());
        let requests = bench.fake.requests();
        assert_eq!(requests, [ByteRange::new(0, SIZE), ByteRange::new(100_001, SIZE)]);
        assert_eq!(bench.care.metrics.resumed_bodies(), 1);
    }

    #[tokio::test]
    async fn a_body_that_breaks_again_and_again_is_given_back() {
        let bench = Bench::new();
        bench.fake.inject(SIZE - 1, 10, Fault::Short(10));
        assert!(bench.read_all().await.unwrap_err().is_transient());
        assert_eq!(bench.fake.requests().len(), 1 + RESUMES as usize);
    }

    #[tokio::test]
    async fn what_stalls_is_asked_for_a_second_time_and_once() {
        for (fault, first) in [(Fault::StallBefore, 0), (Fault::StallAfter(65_536), 65_536)] {
            let bench = Bench::new();
            bench.fake.inject(0, 1, fault);
            assert_eq!(bench.read_all().await.unwrap(), bench.right());
            let expected = [ByteRange::new(0, SIZE), ByteRange::new(first, SIZE)];
            assert_eq!(bench.fake.requests(), expected);
            assert_eq!((bench.care.metrics.hedges(), bench.care.metrics.hedges_won()), (1, 1));
        }
    }

    #[tokio::test]
    async fn a_slow_start_is_waited_for_beside_its_second_request() {
        let bench = Bench::new();
        bench.fake.inject(0, 2, Fault::StallBefore);
        let fake = Arc::clone(&bench.fake);
        let late = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(120)).await;
            fake.release();
        });
        assert_eq!(bench.read_all().await.unwrap(), bench.right());
        late.await.unwrap();
        assert_eq!(bench.fake.requests().len(), 2);
    }

    #[tokio::test]
    async fn small_questions_are_asked_again_and_refusals_are_not() {
        let bench = Bench::new();
        let asked = Mutex::new(0);
        let failed = || OriginError::Failed { origin: "test".into(), reason: "500".into() };
        let answer = bench.care.ask(|| async {
            *asked.lock() += 1;
            if *asked.lock() < 3 { Err(failed()) } else { Ok(7) }
        });
        assert_eq!((answer.await.unwrap(), *asked.lock()), (7, 3));
        *asked.lock() = 0;
        let answer: Result<(), _> = bench
            .care
            .ask(|| async {
                *asked.lock() += 1;
                Err(OriginError::NotFound { origin: "test".into(), what: "it".into() })
            })
            .await;
        assert!(answer.is_err() && *asked.lock() == 1);
        assert_eq!(bench.care.metrics.requests(Kind::Content, crate::origin::Outcome::Ok), 0);
    }

    #[tokio::test]
    async fn an_origin_that_names_a_time_is_left_alone_until_then() {
        let bench = Bench::new();
        let throttled = |seconds| OriginError::Throttled {
            origin: "test".into(),
            retry_after: Some(Duration::from_secs(seconds)),
        };
        bench.fake.inject(0, 1, Fault::Refuse(throttled(30)));
        assert!(bench.read_all().await.is_err());
        let refused = bench.read_all().await.unwrap_err();
        assert!(matches!(refused, OriginError::Throttled { retry_after: Some(_), .. }), "{refused}");
        assert_eq!(bench.fake.requests().len(), 1, "nothing is sent during the pause");
    }

    #[test]
    fn pauses_grow_and_honour_what_was_asked() {
        let failed = OriginError::Failed { origin: String::new(), reason: String::new() };
        let after = |seconds| OriginError::Throttled {
            origin: String::new(),
            retry_after: Some(Duration::from_secs(seconds)),
        };
        assert_eq!(pause(1, 0.5, &failed), Some(Duration::from_millis(100)));
        assert_eq!(pause(2, 0.5, &failed), Some(Duration::from_millis(200)));
        assert_eq!(pause(1, 0.5, &after(2)), Some(Duration::from_secs(2)));
        assert_eq!(pause(1, 0.5, &after(60)), None);
    }

    #[test]
    fn retry_after_is_a_number_of_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Fri, 27 Nov 2026 09:30:00 GMT").unwrap();
        let seconds = |value| retry_after(value, now).map(|wait| wait.as_secs());
        assert_eq!(seconds("120"), Some(120));
        assert_eq!(seconds(" 0 "), Some(0));
        assert_eq!(seconds("Fri, 27 Nov 2026 09:30:07 GMT"), Some(7));
        assert_eq!(seconds("Friday, 27-Nov-26 09:30:07 GMT"), Some(7), "the obsolete form");
        assert_eq!(seconds("Fri, 27 Nov 2026 09:29:00 GMT"), Some(0), "over");
        for wrong in ["", "soon", "-1", "1.5", "Fri, 32 Nov 2026 09:30:00 GMT"] {
            assert_eq!(seconds(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn retries_are_a_fifth_of_the_requests_and_ten(ops in proptest::collection::vec(any::<bool>(), 0..2000)) {
            let mut budget = Budget(FIRST_BALANCE);
            let (mut requests, mut retries) = (0u32, 0u32);
            for is_request in ops {
                if is_request {
                    budget.deposit();
                    requests += 1;
                } else if budget.withdraw() {
                    retries += 1;
                }
            }
            prop_assert!(retries <= 10 + requests / 5);
        }
    }
}
