//! Where the bytes of a blob are, found out once and used by all its chunks until it ends or fails.
//!
//! Invariant: whoever asks while somebody else finds out waits for a redirect's or a response's headers, never for a
//! body, and does not wait at all when its bytes come before all that are being asked for: a reader waits for these. Where
//! the blob was found behind a redirect before, one request asks for the next, whoever's bytes are first.
//! A lookup that is given up is passed on. Refuses to send anything: it says whose turn it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tokio::sync::Notify;
use url::Url;

use super::Registry;
use crate::content::Digest;
use crate::oci::RepositoryName;
use crate::origin::recent::Recent;

/// Blobs whose place is remembered. A node reads a few dozen images of some tens of layers at a time.
const REMEMBERED: usize = 4096;

/// A presigned URL is not used on its last moment: a request needs a while to be looked at.
const URL_MARGIN: Duration = Duration::from_secs(30);

/// The places of one registry's blobs and manifests.
#[derive(Debug)]
pub(super) struct Locations {
    known: Mutex<Recent<(RepositoryName, Digest), Arc<Location>>>,
    /// The last blob that was looked for came from the registry itself. Then the next is not looked for at all: all its
    /// chunks are asked for there at once, and should it redirect after all, one blob's chunks are redirected one by one.
    sends_blobs: Arc<AtomicBool>,
}

/// The place of one blob or manifest.
#[derive(Debug)]
pub(super) struct Location {
    state: Mutex<State>,
    changed: Notify,
    /// Set by what is found out here; `None` for a manifest, which says nothing of blobs.
    sends_blobs: Option<Arc<AtomicBool>>,
}

#[derive(Debug, Default)]
struct State {
    place: Place,
    /// The first byte that each lookup under way asks for, by a number that tells them apart.
    lookups: BTreeMap<u64, u64>,
    next: u64,
    /// It was elsewhere before: to find out where takes a redirect, so that nobody gains by asking beside another.
    redirects: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Unknown,
    /// The registry sends the bytes itself, or was not able to say: ask it.
    Registry,
    /// A redirect led here.
    Elsewhere {
        url: Url,
        /// A presigned URL says so itself.
        ends_at: Option<Instant>,
    },
}

/// What whoever wants bytes does next.
#[derive(Debug)]
pub(super) enum Turn {
    /// Ask the registry, and tell where it led.
    LookUp(Lookup),
    /// Ask there.
    Go(Url),
}

/// The right to find out. Dropped without a word, it is another's.
#[derive(Debug)]
pub(super) struct Lookup {
    location: Arc<Location>,
    number: u64,
}

impl Default for Locations {
    fn default() -> Self {
        Self { known: Mutex::new(Recent::new(REMEMBERED)), sends_blobs: Arc::default() }
    }
}

impl Locations {
    pub(super) fn of(&self, name: &RepositoryName, digest: &Digest, is_blob: bool) -> Arc<Location> {
        let make = || Arc::new(Location::new(is_blob.then(|| Arc::clone(&self.sends_blobs))));
        self.known.lock().get_or_insert_with(&(name.clone(), digest.clone()), make)
    }
}

impl Location {
    fn new(sends_blobs: Option<Arc<AtomicBool>>) -> Self {
        let is_presumed = sends_blobs.as_ref().is_some_and(|sends| sends.load(Ordering::Relaxed));
        let place = if is_presumed { Place::Registry } else { Place::Unknown };
        let state = Mutex::new(State { place, ..State::default() });
        Self { state, changed: Notify::new(), sends_blobs }
    }

    /// What to do for bytes from `start` on.
    pub(super) async fn turn(self: &Arc<Self>, start: u64) -> Turn {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Before the look: what changes after it is not missed.
            changed.as_mut().enable();
            match self.look(start) {
                Some(turn) => return turn,
                None => changed.await,
            }
        }
    }

    fn look(self: &Arc<Self>, start: u64) -> Option<Turn> {
        let mut state = self.state.lock();
        match state.current() {
            Place::Elsewhere { url, .. } => return Some(Turn::Go(url)),
            Place::Unknown if state.waits_for_another(start) => return None,
            Place::Unknown | Place::Registry => {}
        }
        let number = state.next;
        state.next += 1;
        state.lookups.insert(number, start);
        drop(state);
        Some(Turn::LookUp(Lookup { location: Arc::clone(self), number }))
    }

    /// `url` did not work: whoever comes next looks for another, unless somebody has found it.
    pub(super) fn forget(&self, url: &Url) {
        let mut state = self.state.lock();
        if matches!(&state.place, Place::Elsewhere { url: known, .. } if known == url) {
            state.place = Place::Unknown;
        }
    }

    fn settle(&self, place: Place) {
        let mut state = self.state.lock();
        state.redirects = matches!(place, Place::Elsewhere { .. });
        state.place = place;
        drop(state);
        self.changed.notify_waiters();
    }

    fn learn(&self, sends_itself: bool) {
        if let Some(sends) = &self.sends_blobs {
            sends.store(sends_itself, Ordering::Relaxed);
        }
    }
}

impl State {
    /// A place whose time is over is none.
    fn current(&self) -> Place {
        match &self.place {
            Place::Elsewhere { ends_at: Some(ends_at), .. } if *ends_at <= Instant::now() => Place::Unknown,
            known => known.clone(),
        }
    }

    /// Whether somebody finds out already for bytes no later than these, or for any where that is a redirect's matter.
    fn waits_for_another(&self, start: u64) -> bool {
        self.lookups.values().any(|first| self.redirects || *first <= start)
    }
}

impl Lookup {
    /// The registry redirects to `url`: the others go there while its answer is still awaited.
    pub(super) fn leads_to(&self, url: &Url) {
        let life = presigned_life(url, SystemTime::now());
        let ends_at = life.map(|life| Instant::now() + life);
        self.location.learn(false);
        self.location.settle(Place::Elsewhere { url: url.clone(), ends_at });
    }

    /// The registry sent the bytes itself.
    pub(super) fn ends_here(&self) {
        self.location.learn(true);
        self.location.settle(Place::Registry);
    }

    /// The registry did not say. Where it redirected to before it failed stays known, and shows whether it is any good.
    pub(super) fn failed(&self) {
        let mut state = self.location.state.lock();
        if state.current() == Place::Unknown {
            state.place = Place::Registry;
        }
        drop(state);
        self.location.changed.notify_waiters();
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        self.location.state.lock().lookups.remove(&self.number);
        self.location.changed.notify_waiters();
    }
}

impl Registry {
    pub(super) fn location(&self, name: &RepositoryName, digest: &Digest, is_blob: bool) -> Arc<Location> {
        self.locations.of(name, digest, is_blob)
    }
}

/// How long a presigned URL that just came is good for; `None` when it does not say.
///
/// AWS's and Google's carry when they were signed and for how many seconds (Signature Version 4, query parameters). A
/// registry may hand out one that it signed a while ago; a clock that would make a new one old already is not believed.
fn presigned_life(url: &Url, now: SystemTime) -> Option<Duration> {
    let value = |wanted: &str| {
        let mut pairs = url.query_pairs();
        let is_it =
            |key: &str| key.strip_prefix("X-Amz-").or_else(|| key.strip_prefix("X-Goog-")) == Some(wanted);
        pairs.find(|(key, _)| is_it(key)).map(|(_, value)| value.into_owned())
    };
    let life = Duration::from_secs(value("Expires")?.parse().ok()?);
    let signed = value("Date").and_then(|date| read_basic_date(&date));
    let by_clock = signed.and_then(|at| (at + life).duration_since(now).ok()).filter(|left| !left.is_zero());
    let left = by_clock.map_or(life, |by_clock| by_clock.min(life));
    Some(left - URL_MARGIN.min(left / 10))
}

/// `20261127T093000Z`.
fn read_basic_date(text: &str) -> Option<SystemTime> {
    let is_basic = text.len() == 16 && text.is_ascii() && text.ends_with('Z');
    let part = |range| is_basic.then(|| text.get(range)).flatten();
    let (date, time) = (part(0..8)?, part(9..15)?);
    let spelled = format!(
        "{}-{}-{}T{}:{}:{}Z",
        &date[..4],
        &date[4..6],
        &date[6..],
        &time[..2],
        &time[2..4],
        &time[4..]
    );
    humantime::parse_rfc3339(&spelled).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presigned_urls_say_when_they_end() {
        let now = humantime::parse_rfc3339("2026-11-27T09:30:00Z").unwrap();
        let life = |query: &str| {
            let url = Url::parse(&format!("https://bucket.example.com/blob?{query}")).unwrap();
            presigned_life(&url, now).map(|life| life.as_secs())
        };
        assert_eq!(life("X-Amz-Date=20261127T093000Z&X-Amz-Expires=3600&X-Amz-Signature=x"), Some(3570));
        assert_eq!(life("X-Amz-Date=20261127T092000Z&X-Amz-Expires=3600"), Some(2970), "signed a while ago");
        assert_eq!(life("X-Amz-Date=20261127T080000Z&X-Amz-Expires=60"), Some(54), "our clock is off");
        assert_eq!(life("X-Goog-Date=20261127T093000Z&X-Goog-Expires=100"), Some(90));
        assert_eq!(life("X-Amz-Expires=100"), Some(90));
        for other in ["", "Expires=1700000000", "X-Amz-Expires=soon"] {
            assert_eq!(life(other), None, "{other}");
        }
        for odd in ["20261327T093000Z", "20261127T093000", "é0261127T09300Z", "20261127 093000Z"] {
            assert!(life(&format!("X-Amz-Date={odd}&X-Amz-Expires=100")).is_some(), "{odd}");
        }
    }

    fn location() -> (Arc<Location>, Arc<AtomicBool>) {
        let sends = Arc::<AtomicBool>::default();
        (Arc::new(Location::new(Some(Arc::clone(&sends)))), sends)
    }

    fn lookup(turn: Option<Turn>) -> Lookup {
        match turn {
            Some(Turn::LookUp(lookup)) => lookup,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_finds_out_and_earlier_bytes_do_not_wait() {
        let (location, sends) = location();
        let second = lookup(location.look(8));
        assert!(location.look(8).is_none() && location.look(16).is_none(), "they wait");
        let first = lookup(location.look(0));
        let url = Url::parse("https://bucket.example.com/blob").unwrap();
        second.leads_to(&url);
        assert!(matches!(location.look(16), Some(Turn::Go(to)) if to == url));
        location.forget(&url);
        assert!(location.look(16).is_none(), "the first finds out");
        drop(first);
        assert!(location.look(16).is_none(), "the second may tell where it ends");
        drop(second);
        lookup(location.look(16)).ends_here();
        assert!(sends.load(Ordering::Relaxed));
        let _all = [lookup(location.look(16)), lookup(location.look(24))];
    }

    #[test]
    fn the_place_of_what_was_redirected_before_is_asked_for_once() {
        let (location, _) = location();
        let url = Url::parse("https://bucket.example.com/blob").unwrap();
        lookup(location.look(0)).leads_to(&url);
        location.forget(&url);
        let again = lookup(location.look(8));
        assert!(location.look(0).is_none(), "earlier bytes wait too");
        again.ends_here();
        drop(again);
        let _all = [lookup(location.look(8)), lookup(location.look(0))];
    }

    #[test]
    fn who_fails_sends_the_others_to_the_registry_unless_it_knew_more() {
        let (location, _) = location();
        let (failing, _other) = (lookup(location.look(8)), lookup(location.look(0)));
        failing.failed();
        lookup(location.look(16)).leads_to(&Url::parse("https://bucket.example.com/blob").unwrap());
        failing.failed();
        assert!(matches!(location.look(16), Some(Turn::Go(_))));
    }

    #[tokio::test]
    async fn a_lookup_that_is_given_up_is_anothers() {
        let (location, _) = location();
        let given_up = lookup(location.look(0));
        let waiting = {
            let location = Arc::clone(&location);
            tokio::spawn(async move { location.turn(8).await })
        };
        tokio::task::yield_now().await;
        drop(given_up);
        assert!(matches!(waiting.await.unwrap(), Turn::LookUp(_)));
    }
}
