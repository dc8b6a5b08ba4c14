use std::cell::Cell;
use std::future::ready;

use super::*;

fn denied() -> OriginError {
    OriginError::Denied { origin: "reg".into(), what: "a".into(), reason: "no".into() }
}

fn down() -> OriginError {
    OriginError::Failed { origin: "reg".into(), reason: "refused".into() }
}

fn proofs(config: Config) -> Proofs<&'static str, u32> {
    Proofs::new(&config, "registry", &Metrics::default())
}

/// One caller's questions about one thing, on a clock that the test moves, and how often the origin was asked.
struct Asked {
    proofs: Proofs<&'static str, u32>,
    caller: CallerId,
    asked: Cell<usize>,
    now: Cell<Instant>,
}

impl Asked {
    fn new(config: Config) -> Self {
        let caller = Fingerprints::default().of(&[b"user", b"password"]);
        Self { proofs: proofs(config), caller, asked: Cell::new(0), now: Cell::new(Instant::now()) }
    }

    async fn get(&self, answer: Result<u32, OriginError>) -> Result<u32, OriginError> {
        self.get_fresh(None, answer).await
    }

    async fn get_fresh(
        &self,
        fresh: Option<Duration>,
        answer: Result<u32, OriginError>,
    ) -> Result<u32, OriginError> {
        let ask = || {
            self.asked.set(self.asked.get() + 1);
            ready(answer)
        };
        self.proofs.get_at(self.now.get(), self.caller, "a", fresh, ask).await
    }

    fn pass(&self, milliseconds: u64) {
        self.now.set(self.now.get() + Duration::from_millis(milliseconds));
    }
}

#[test]
fn callers_are_told_apart_and_not_written_down() {
    let fingerprints = Fingerprints::default();
    assert_eq!(fingerprints.of(&[b"a", b"bc"]), fingerprints.of(&[b"a", b"bc"]));
    assert_ne!(fingerprints.of(&[b"a", b"bc"]), fingerprints.of(&[b"ab", b"c"]));
    assert_ne!(
        fingerprints.of(&[b"a", b"bc"]),
        Fingerprints::default().of(&[b"a", b"bc"]),
        "the key is its own"
    );
}

#[tokio::test]
async fn a_permission_and_a_refusal_have_their_own_lifetimes() {
    let asked = Asked::new(Config { permit_ttl_ms: 1_000, refusal_ttl_ms: 100, ..Config::default() });
    assert_eq!(asked.get(Ok(7)).await.unwrap(), 7);
    asked.pass(999);
    assert_eq!(asked.get(Err(denied())).await.unwrap(), 7, "revoked, and not yet asked again");
    assert_eq!(asked.asked.get(), 1);
    asked.pass(1);
    assert!(asked.get(Err(denied())).await.is_err());
    asked.pass(99);
    assert!(asked.get(Ok(8)).await.is_err(), "granted, and not yet asked again");
    asked.pass(1);
    assert_eq!(asked.get(Ok(8)).await.unwrap(), 8);
    assert_eq!(asked.asked.get(), 3);
}

#[tokio::test]
async fn what_one_caller_may_another_may_not() {
    let (proofs, fingerprints) = (proofs(Config::default()), Fingerprints::default());
    let (one, other) = (fingerprints.of(&[b"one"]), fingerprints.of(&[b"other"]));
    assert!(proofs.get(one, "a", None, || ready(Ok(1))).await.is_ok());
    assert!(proofs.get(other, "a", None, || ready(Err(denied()))).await.is_err());
    assert!(
        proofs.get(one, "b", None, || ready(Err(denied()))).await.is_err(),
        "nor the same caller elsewhere"
    );
    assert!(proofs.get(one, "a", None, || ready(Err(denied()))).await.is_ok());
}

#[tokio::test]
async fn an_outage_lets_in_who_is_known_if_so_configured_and_only_for_a_while() {
    let lenient =
        Config { permit_ttl_ms: 10, outage: Outage::AllowKnown, outage_grace_ms: 1_000, ..Config::default() };
    let asked = Asked::new(lenient.clone());
    assert!(asked.get(Err(down())).await.is_err(), "nobody knows this caller");
    assert!(asked.get(Ok(1)).await.is_ok());
    asked.pass(500);
    assert_eq!(asked.get(Err(down())).await.unwrap(), 1);
    asked.pass(500);
    assert!(asked.get(Err(down())).await.is_err());

    let asked = Asked::new(lenient);
    assert!(asked.get(Ok(1)).await.is_ok());
    asked.pass(10);
    assert!(asked.get(Err(denied())).await.is_err());
    asked.pass(6_000);
    assert!(asked.get(Err(down())).await.is_err(), "a refusal ends what was known");

    let strict = Asked::new(Config { permit_ttl_ms: 10, ..Config::default() });
    assert!(strict.get(Ok(1)).await.is_ok());
    strict.pass(10);
    assert!(strict.get(Err(down())).await.is_err());
}

#[tokio::test]
async fn an_origin_that_does_not_answer_is_waited_for_only_so_long() {
    let asked = Asked::new(Config { check_timeout_ms: 50, ..Config::default() });
    let never = || std::future::pending::<Result<u32, OriginError>>();
    let error = asked.proofs.get(asked.caller, "a", None, never).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("within 50ms"), "{error}");
}

#[tokio::test]
async fn an_answer_that_changes_by_itself_counts_for_less_long() {
    let asked = Asked::new(Config::default());
    let moment = Some(Duration::from_millis(5));
    assert_eq!(asked.get_fresh(moment, Ok(1)).await.unwrap(), 1);
    assert_eq!(asked.get_fresh(moment, Ok(2)).await.unwrap(), 1);
    asked.pass(5);
    assert_eq!(asked.get_fresh(moment, Ok(2)).await.unwrap(), 2);
}

#[tokio::test]
async fn many_who_ask_the_same_cost_one_question() {
    let (proofs, caller) = (proofs(Config::default()), Fingerprints::default().of(&[b"one"]));
    let questions = Cell::new(0);
    let ask = || async {
        questions.set(questions.get() + 1);
        tokio::task::yield_now().await;
        Ok(1)
    };
    let all = futures_util::future::join_all((0..20).map(|_| proofs.get(caller, "a", None, ask)));
    assert!(all.await.iter().all(Result::is_ok));
    assert_eq!(questions.get(), 1);
}
