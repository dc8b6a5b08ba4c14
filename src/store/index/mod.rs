//! What makes a start fast: which chunks of which content are held, and when each was last used.
//!
//! Invariant: nothing is only here. Every row but its last use can be rebuilt from the sidecars, a row never claims
//! a chunk that its sidecar does not, and an index is believed only when the clean mark in the data directory
//! carries its generation. So the engine may corrupt itself, panic, bloat or be deleted, and costs a scan.
//!
//! The engine (`engine`, the only file that knows sled) is written behind by one thread, in batches, and flushed by
//! that thread; nobody reads from it after the start. This module refuses to hold anything of variable size.

mod engine;
mod writer;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub(super) use writer::Index;

pub(super) use self::engine::Engine;
use super::pin::Pin;
use crate::content::{ChunkSet, ContentKey, Layout};

/// What the index knows of one content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub layout: Layout,
    /// Chunks whose sidecar records are durable.
    pub have: ChunkSet,
    pub sealed: bool,
    pub pin: Pin,
    /// Pinned by the configuration.
    pub configured: bool,
    /// Milliseconds since the Unix epoch.
    pub last_used_ms: u64,
}

impl Row {
    pub(super) fn is_pinned(&self, now_ms: u64) -> bool {
        self.configured || self.pin.holds(now_ms)
    }

    /// Whether losing this row would lose anything.
    pub(super) fn stores_something(&self) -> bool {
        self.sealed || self.pin != Pin::Not || !self.have.is_empty()
    }
}

/// The index as a start finds it.
pub(super) struct Found {
    /// Ready to be written; none when the disk does not let us have one.
    pub engine: Option<Engine>,
    /// Complete when `distrust` is none; else good for last uses only.
    pub rows: HashMap<ContentKey, Row>,
    /// Why the sidecars have to be scanned.
    pub distrust: Option<&'static str>,
}

/// Opens the index in `dir`; `mark` is the generation that a clean shutdown left.
///
/// An index that does not carry it is replaced by an empty one, since the engine is known to survive a crash
/// damaged without noticing (sled issues 1410 and 1533).
pub(super) fn find(dir: &Path, mark: Option<u64>) -> Found {
    let existed = dir.join(engine::MAIN_FILE).exists();
    let (rows, distrust) = match on_own_thread(dir, load) {
        Ok((engine, rows, generation)) => {
            if mark.is_some() && generation == mark && existed {
                return Found { engine: Some(engine), rows, distrust: None };
            }
            drop(engine);
            let why = match (existed, mark) {
                (false, _) => "it is missing",
                (true, None) => "the last run did not end cleanly",
                (true, Some(_)) => "it is not the one that the last run left",
            };
            (rows, why)
        }
        Err(error) => {
            tracing::warn!(path = %dir.display(), %error, "the index cannot be opened and is set aside");
            (HashMap::new(), "it cannot be opened")
        }
    };
    Found { engine: replace(dir, distrust == "it cannot be opened"), rows, distrust: Some(distrust) }
}

/// Puts an empty index in the place of the one in `dir`, keeping the old one beside it for a post-mortem if asked.
fn replace(dir: &Path, keep_old: bool) -> Option<Engine> {
    let fresh = clear(dir, keep_old)
        .map_err(|error| error.to_string())
        .and_then(|()| on_own_thread(dir, Engine::open));
    match fresh {
        Ok(engine) => Some(engine),
        Err(error) => {
            tracing::error!(path = %dir.display(), error, "no index; the next start has to scan all contents");
            None
        }
    }
}

fn clear(dir: &Path, keep_old: bool) -> io::Result<()> {
    let aside = aside(dir);
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    let remove = |path: &Path| if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    if keep_old {
        gone(remove(&aside))?;
        return gone(fs::rename(dir, &aside));
    }
    gone(remove(dir))
}

/// One broken index is kept, not one per failure.
fn aside(dir: &Path) -> PathBuf {
    dir.with_extension("broken")
}

type Loaded = (Engine, HashMap<ContentKey, Row>, Option<u64>);

fn load(dir: &Path) -> Result<Loaded, String> {
    let engine = Engine::open(dir)?;
    let rows = engine.rows()?;
    let generation = engine.generation()?;
    // Whatever happens next, this index is not the one that the mark vouched for.
    engine.set_generation(None)?;
    engine.flush()?;
    Ok((engine, rows, generation))
}

/// A damaged index may panic on opening; the thread takes the panic with it.
fn on_own_thread<T: Send>(
    dir: &Path,
    job: impl FnOnce(&Path) -> Result<T, String> + Send,
) -> Result<T, String> {
    std::thread::scope(|scope| {
        scope.spawn(|| job(dir)).join().unwrap_or_else(|_| Err("the engine panicked".to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::ChunkIndex;
    use std::time::Duration;

    fn row(chunks: &[u32]) -> Row {
        Row {
            layout: Layout::new(10_000, 10).unwrap(),
            have: chunks.iter().copied().map(ChunkIndex).collect(),
            sealed: false,
            pin: Pin::Until(77),
            configured: true,
            last_used_ms: 7,
        }
    }

    fn key(n: u8) -> ContentKey {
        ContentKey([n; 32])
    }

    fn start(found: Found) -> Index {
        Index::start(
            found.engine,
            PathBuf::new(),
            Duration::from_millis(1),
            Box::new(Vec::new),
            Default::default(),
        )
        .unwrap()
    }

    #[test]
    fn rows_survive_a_clean_end_and_only_that() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let index = start(find(&path, None));
        index.put(key(1), row(&[1, 2, 700]));
        index.put(key(2), row(&[5]));
        index.put(key(1), row(&[1, 700, 701]));
        index.put(key(3), row(&[5]));
        index.remove(key(3));
        let mark = index.close_clean();
        assert!(mark.is_some());

        let found = find(&path, mark);
        assert_eq!(found.distrust, None);
        assert_eq!(found.rows, HashMap::from([(key(1), row(&[1, 700, 701])), (key(2), row(&[5]))]));
        start(found).close_clean();

        let found = find(&path, mark);
        assert!(found.distrust.is_some(), "an old mark must not vouch for a newer index");
        assert_eq!(found.rows.len(), 2, "last uses are still of use");
    }

    #[test]
    fn garbage_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        fs::create_dir(&path).unwrap();
        for name in ["conf", "db"] {
            fs::write(path.join(name), b"segment_size: garbage \xff\xfe\x00 ".repeat(3_000)).unwrap();
        }
        let found = find(&path, Some(1));
        assert!(found.engine.is_some() && found.distrust.is_some() && found.rows.is_empty());
        assert!(aside(&path).exists());
    }
}
