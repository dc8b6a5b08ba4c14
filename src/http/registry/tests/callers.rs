//! `access = "caller"`: a registry with users, and clients with the right credential, another one and none.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;

use super::*;
use crate::origin::access::{Access, Outage};

/// A credential and the repositories that it opens. `*` opens all, and the empty credential is anybody's.
type Users = Arc<Mutex<BTreeMap<String, Vec<&'static str>>>>;

fn basic(pair: &str) -> String {
    format!("Basic {}", STANDARD.encode(pair))
}

/// A registry whose repositories are open to `users` only; all of them hold the same image.
struct Guarded {
    stub: Stub,
    users: Users,
    down: Arc<AtomicBool>,
    image: Image,
    _password: tempfile::NamedTempFile,
    config: RegistryConfig,
}

impl Guarded {
    async fn new(seed: u64) -> Self {
        let image = Image::new(seed);
        let node = [("node:nodes-own".to_owned(), vec!["*"]), ("ann:hers".to_owned(), vec!["team/app"])];
        let users: Users = Arc::new(Mutex::new(node.into()));
        let down = Arc::new(AtomicBool::new(false));
        let (theirs, open_to, is_down) = (image.clone(), Arc::clone(&users), Arc::clone(&down));
        let stub = Stub::start(move |seen| {
            if is_down.load(Ordering::SeqCst) {
                return Reply::status(500);
            }
            let shown = seen.header("authorization").unwrap_or_default();
            let users = open_to.lock();
            let repositories = users.iter().find(|(pair, _)| match pair.as_str() {
                "" => shown.is_empty(),
                pair => shown == basic(pair),
            });
            let asked = |open: &str| open == "*" || seen.target.starts_with(&format!("/v2/{open}/"));
            match repositories {
                Some((_, open)) if open.iter().any(|open| asked(open)) => theirs.answer(seen),
                Some(_) => Reply::status(403),
                None => Reply::status(401).with("www-authenticate", "Basic realm=\"r\""),
            }
        })
        .await;
        let password = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(password.path(), "nodes-own").unwrap();
        let config = RegistryConfig {
            access: Access::Caller,
            username: Some("node".into()),
            password_file: Some(password.path().into()),
            ..stub.config()
        };
        Self { stub, users, down, image, _password: password, config }
    }

    fn mirror(&self, access: access::Config) -> Node {
        Node::with_access(&Config { tag_ttl_ms: 0, ..plain() }, vec![self.config.clone()], &access)
    }

    fn targets(&self, repository: &str) -> [String; 3] {
        let (manifest, layer) = (digest_of(&self.image.manifest), digest_of(&self.image.layer()));
        [
            format!("/v2/{repository}/manifests/latest?ns=reg.example.com"),
            format!("/v2/{repository}/manifests/{manifest}?ns=reg.example.com"),
            format!("/v2/{repository}/blobs/{layer}?ns=reg.example.com"),
        ]
    }
}

async fn get_as(node: &Node, target: &str, pair: &str) -> Got {
    match pair {
        "" => get(node, target).await,
        pair => ask(node, "GET", target, &[("authorization", &basic(pair))]).await,
    }
}

async fn statuses(node: &Node, targets: &[String; 3], pair: &str) -> [u16; 3] {
    let mut all = [0; 3];
    for (status, target) in all.iter_mut().zip(targets) {
        *status = get_as(node, target, pair).await.status;
    }
    all
}

#[tokio::test]
async fn what_is_cached_for_one_caller_is_refused_to_others() {
    let guarded = Guarded::new(20).await;
    let mirror = guarded.mirror(access::Config::default());
    let targets = guarded.targets("team/app");
    assert_eq!(statuses(&mirror, &targets, "ann:hers").await, [200; 3]);
    assert_eq!(get_as(&mirror, &targets[2], "ann:hers").await.body.as_ref(), Ok(&guarded.image.layer()));

    assert_eq!(statuses(&mirror, &targets, "").await, [401; 3]);
    let nobody = get_as(&mirror, &targets[2], "").await;
    assert_eq!(nobody.header("www-authenticate"), "Basic realm=\"reg.example.com\", charset=\"UTF-8\"");
    assert!(nobody.text().contains("UNAUTHORIZED"), "{}", nobody.text());

    for other in ["ann:wrong", "bob:hers", "node:wrong"] {
        assert_eq!(statuses(&mirror, &targets, other).await, [404; 3], "{other}");
    }
    let stranger = get_as(&mirror, &targets[2], "ann:wrong").await.text();
    assert!(stranger.contains("DENIED") && !stranger.contains("wrong"), "{stranger}");
    let bearer = ask(&mirror, "GET", &targets[2], &[("authorization", "Bearer ann")]).await;
    assert_eq!(bearer.status, 401);
}

#[tokio::test]
async fn a_permission_is_for_one_repository() {
    let guarded = Guarded::new(21).await;
    let mirror = guarded.mirror(access::Config::default());
    assert_eq!(statuses(&mirror, &guarded.targets("team/app"), "ann:hers").await, [200; 3]);
    assert_eq!(statuses(&mirror, &guarded.targets("team/secret"), "ann:hers").await, [404; 3]);
    assert_eq!(statuses(&mirror, &guarded.targets("team/secret"), "node:nodes-own").await, [200; 3]);
}

#[tokio::test]
async fn what_is_open_to_anybody_needs_no_credential() {
    let guarded = Guarded::new(22).await;
    guarded.users.lock().insert(String::new(), vec!["public/app"]);
    let mirror = guarded.mirror(access::Config::default());
    assert_eq!(statuses(&mirror, &guarded.targets("public/app"), "").await, [200; 3]);
    assert_eq!(statuses(&mirror, &guarded.targets("team/app"), "").await, [401; 3]);
}

#[tokio::test]
async fn a_callers_question_is_asked_with_the_callers_credential_and_only_once() {
    let guarded = Guarded::new(23).await;
    let mirror = guarded.mirror(access::Config::default());
    let [_, _, layer] = guarded.targets("team/app");
    for _ in 0..5 {
        assert_eq!(get_as(&mirror, &layer, "ann:hers").await.status, 200);
    }
    let hers = basic("ann:hers");
    let seen = guarded.stub.seen();
    let of = |method: &str| -> Vec<_> {
        let with = |seen: &&Seen| seen.method == method && seen.header("authorization") == Some(&hers);
        seen.iter().filter(with).collect()
    };
    assert_eq!((of("HEAD").len(), of("GET").len()), (1, 0), "the proof; the bytes come in the node's name");
}

#[tokio::test]
async fn a_revocation_takes_effect_when_the_permission_ends() {
    let guarded = Guarded::new(24).await;
    let [tag, _, layer] = guarded.targets("team/app");
    for (permit_ttl_ms, status) in [(3_600_000, 200), (0, 404)] {
        let mirror = guarded.mirror(access::Config { permit_ttl_ms, ..access::Config::default() });
        guarded.users.lock().insert("ann:hers".into(), vec!["team/app"]);
        assert_eq!(get_as(&mirror, &layer, "ann:hers").await.status, 200);
        guarded.users.lock().remove("ann:hers");
        assert_eq!(get_as(&mirror, &layer, "ann:hers").await.status, status);
        assert_eq!(get_as(&mirror, &tag, "ann:hers").await.status, 404, "it was never asked before");
    }
}

#[tokio::test]
async fn in_an_outage_only_who_is_known_gets_in_and_only_if_so_configured() {
    for (outage, status) in [(Outage::AllowKnown, 200), (Outage::Deny, 404)] {
        let guarded = Guarded::new(25).await;
        let config = access::Config { permit_ttl_ms: 0, outage, ..access::Config::default() };
        let mirror = guarded.mirror(config);
        let [_, _, layer] = guarded.targets("team/app");
        assert_eq!(get_as(&mirror, &layer, "ann:hers").await.status, 200);
        guarded.down.store(true, Ordering::SeqCst);
        assert_eq!(get_as(&mirror, &layer, "ann:hers").await.status, status);
        assert_eq!(get_as(&mirror, &layer, "ann:wrong").await.status, 404);
        assert_eq!(get_as(&mirror, &layer, "").await.status, 401, "who brings none is still asked for one");
    }
}

#[tokio::test]
async fn a_credential_is_forgotten_when_its_time_ends() {
    let guarded = Guarded::new(26).await;
    let config = access::Config { permit_ttl_ms: 1, ..access::Config::default() };
    let callers = Arc::new(Callers::new(&config, Duration::ZERO, &access::Metrics::default()));
    let registries = RegistryOrigin::new(vec![guarded.config.clone()], &Metrics::default()).unwrap();
    let hers = HeaderMap::from_iter([(http::header::AUTHORIZATION, basic("ann:hers").parse().unwrap())]);
    let (name, layer) = ("team/app".parse().unwrap(), digest_of(&guarded.image.layer()));
    callers.admit_to_blob(&hers, registries.only().unwrap(), &name, &layer).await.unwrap();
    assert_eq!(callers.remembered(), 1);
    let stop = CancellationToken::new();
    let forgotten = async {
        while callers.remembered() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stop.cancel();
    };
    tokio::join!(callers.tidy(stop.clone()), forgotten);
}
