//! The only file that knows sled 0.34, and how to live with it.
//!
//! Trees: `contents` key → 29 bytes, `stripes` key and stripe → 8 bytes, `about` → schema and generation. Values
//! stay small and of fixed size because sled leaks large ones (sled pull request 1202). No background flush, and
//! never `flush_async`, which deadlocks (sled issues 1308 and 1357).

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::content::{ChunkSet, ContentKey, Layout, StripeIndex};

use super::Row;
use crate::store::pin::Pin;

/// Exists once an index was written.
pub(super) const MAIN_FILE: &str = "db";

/// sled's default is 1 GiB; all of our rows are also in memory, so this only has to hold what a batch touches.
const CACHE_BYTES: u64 = 16 << 20;

/// Far longer than sled's threads take to end, on a machine that is far too busy.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Raised when rows are laid out differently; an index of another schema is rebuilt.
const SCHEMA: u32 = 2;

const ROW_BYTES: usize = 29;
const SEALED: u8 = 1;
/// By configuration.
const PINNED: u8 = 2;

/// An open index. Any method may also panic; callers run it where that does no harm.
pub(in crate::store) struct Engine {
    db: sled::Db,
    contents: sled::Tree,
    stripes: sled::Tree,
    about: sled::Tree,
}

impl Engine {
    pub(super) fn open(dir: &Path) -> Result<Self, String> {
        let db = open_db(dir).map_err(text)?;
        let tree = |name: &str| db.open_tree(name).map_err(text);
        let engine = Self {
            contents: tree("contents")?,
            stripes: tree("stripes")?,
            about: tree("about")?,
            db: db.clone(),
        };
        match engine.about.get("schema").map_err(text)? {
            Some(schema) if *schema != SCHEMA.to_le_bytes() => Err("it has another schema".to_owned()),
            Some(_) => Ok(engine),
            None => {
                engine.about.insert("schema", &SCHEMA.to_le_bytes()).map_err(text)?;
                Ok(engine)
            }
        }
    }

    /// Every row.
    pub(super) fn rows(&self) -> Result<HashMap<ContentKey, Row>, String> {
        let mut rows = HashMap::new();
        for entry in &self.contents {
            let (key, value) = entry.map_err(text)?;
            let (key, row) = decode(&key, &value).ok_or("a row is malformed")?;
            rows.insert(key, row);
        }
        for entry in &self.stripes {
            let (key, value) = entry.map_err(text)?;
            let (content, stripe) = decode_stripe(&key).ok_or("a stripe is malformed")?;
            let bits =
                value.as_ref().try_into().map(u64::from_le_bytes).map_err(|_| "a bitmap is malformed")?;
            let row = rows.get_mut(&content).ok_or("a stripe has no content")?;
            if bits & !row.layout.stripe_mask(stripe) != 0 {
                return Err("a bitmap has chunks past the end".to_owned());
            }
            row.have.insert_stripe(stripe, bits);
        }
        Ok(rows)
    }

    /// Writes each row, or removes it.
    pub(super) fn apply(&self, changes: &[(ContentKey, Option<Row>)]) -> Result<(), String> {
        let (mut contents, mut stripes) = (sled::Batch::default(), sled::Batch::default());
        for (key, change) in changes {
            match change {
                Some(row) => {
                    contents.insert(&key.0, &encode(row));
                    self.write_stripes(&mut stripes, key, row)?;
                }
                None => {
                    contents.remove(&key.0);
                    for stripe in self.stripes.scan_prefix(key.0).keys() {
                        stripes.remove(stripe.map_err(text)?);
                    }
                }
            }
        }
        self.contents.apply_batch(contents).map_err(text)?;
        self.stripes.apply_batch(stripes).map_err(text)
    }

    /// The number that the clean mark must repeat, if the index was closed cleanly.
    pub(super) fn generation(&self) -> Result<Option<u64>, String> {
        let value = self.about.get("generation").map_err(text)?;
        Ok(value.and_then(|bytes| bytes.as_ref().try_into().ok()).map(u64::from_le_bytes))
    }

    pub(super) fn set_generation(&self, generation: Option<u64>) -> Result<(), String> {
        match generation {
            Some(number) => self.about.insert("generation", &number.to_le_bytes()),
            None => self.about.remove("generation"),
        }
        .map(drop)
        .map_err(text)
    }

    /// Blocks until everything applied is durable.
    pub(super) fn flush(&self) -> Result<(), String> {
        self.db.flush().map(drop).map_err(text)
    }

    pub(super) fn size_on_disk_bytes(&self) -> Result<u64, String> {
        self.db.size_on_disk().map_err(text)
    }

    /// Only stripes that changed: sled's log grows with every write, needed or not.
    fn write_stripes(&self, batch: &mut sled::Batch, key: &ContentKey, row: &Row) -> Result<(), String> {
        for stripe in (0..row.layout.stripe_count()).map(StripeIndex) {
            let name = encode_stripe(key, stripe);
            let bits = row.have.stripe(stripe);
            let old = self.stripes.get(name).map_err(text)?;
            match (bits, old) {
                (0, None) => {}
                (0, Some(_)) => batch.remove(&name[..]),
                (_, Some(old)) if *old == bits.to_le_bytes() => {}
                _ => batch.insert(&name[..], &bits.to_le_bytes()),
            }
        }
        Ok(())
    }
}

/// sled lets go of its lock some moments after it was dropped, when its threads have ended. Nobody else can hold it, for
/// the data directory has a lock of our own: it is waited for.
fn open_db(dir: &Path) -> sled::Result<sled::Db> {
    let config = sled::Config::new().path(dir).cache_capacity(CACHE_BYTES).flush_every_ms(None);
    let begun = Instant::now();
    loop {
        match config.open() {
            Err(sled::Error::Io(error))
                if begun.elapsed() < LOCK_PATIENCE && error.to_string().contains("acquire lock") =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

fn encode(row: &Row) -> [u8; ROW_BYTES] {
    let mut value = [0; ROW_BYTES];
    value[..8].copy_from_slice(&row.layout.size().to_le_bytes());
    value[8..12].copy_from_slice(&row.layout.chunk_bytes().to_le_bytes());
    value[12..20].copy_from_slice(&row.last_used_ms.to_le_bytes());
    value[20] = u8::from(row.sealed) * SEALED + u8::from(row.configured) * PINNED;
    value[21..].copy_from_slice(&row.pin.to_ms().to_le_bytes());
    value
}

fn decode(key: &[u8], value: &[u8]) -> Option<(ContentKey, Row)> {
    let value: &[u8; ROW_BYTES] = value.try_into().ok()?;
    let number = |at: usize| value[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    let chunk_bytes = value[8..12].try_into().map(u32::from_le_bytes).ok()?;
    let row = Row {
        layout: Layout::new(number(0)?, chunk_bytes).ok()?,
        have: ChunkSet::new(),
        sealed: value[20] & SEALED != 0,
        configured: value[20] & PINNED != 0,
        pin: Pin::from_ms(number(21)?),
        last_used_ms: number(12)?,
    };
    Some((ContentKey(key.try_into().ok()?), row))
}

fn encode_stripe(key: &ContentKey, stripe: StripeIndex) -> [u8; 36] {
    let mut name = [0; 36];
    name[..32].copy_from_slice(&key.0);
    name[32..].copy_from_slice(&stripe.0.to_be_bytes());
    name
}

fn decode_stripe(name: &[u8]) -> Option<(ContentKey, StripeIndex)> {
    let (key, stripe) = name.split_at_checked(32)?;
    Some((ContentKey(key.try_into().ok()?), StripeIndex(u32::from_be_bytes(stripe.try_into().ok()?))))
}

#[expect(clippy::needless_pass_by_value, reason = "what map_err hands over")]
fn text(error: sled::Error) -> String {
    error.to_string()
}
