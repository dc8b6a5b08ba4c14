//! The store's section of the configuration.

use std::path::PathBuf;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize, Serializer};

use super::pin::PinName;

/// Where contents lie, and how much of the disk they may take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory of this daemon alone. On a file system with reflink (XFS, btrfs) shared with the destinations of
    /// `fetch`, placed files take no further room.
    pub data_dir: PathBuf,
    /// Most bytes of chunks kept on disk. What nobody used for longest leaves first, and sooner what peers have too.
    #[serde(serialize_with = "exact")]
    pub budget: ByteSize,
    /// Bytes that stay free on the file system of `data_dir`, whoever else fills it. The store gives up contents
    /// rather than cross it.
    #[serde(serialize_with = "exact")]
    pub free_floor: ByteSize,
    /// Bytes per second of what is stored that are read again in the background to find what the disk has lost; 0
    /// reads nothing. 100 GiB take seven hours at 4 MiB, which a disk of 200 MB/s spends 2 % of its time on.
    #[serde(serialize_with = "exact")]
    pub scrub_rate: ByteSize,
    /// Contents that are never evicted: `sha256:DIGEST`, `s3://bucket/key`, or all below `s3://bucket/prefix/`.
    pub pins: Vec<PinName>,
    /// Threads that hash, read and write, beside one that only reads. 0 means as many as cores, at most 4: BLAKE3 takes
    /// about a tenth and a page-cache write a fifth of a core per GB/s, so four carry more than a 25 Gb/s link brings.
    pub io_threads: usize,
}

/// Cores beyond this add nothing to what a network link can bring (see [`Config::io_threads`]).
const IO_THREADS_AUTO_MAX: usize = 4;

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/windlass"),
            budget: ByteSize::gib(100),
            free_floor: ByteSize::gib(5),
            scrub_rate: ByteSize::mib(4),
            pins: Vec::new(),
            io_threads: 0,
        }
    }
}

impl Config {
    /// The number of threads meant, at least one.
    #[must_use]
    pub fn effective_io_threads(&self) -> usize {
        match self.io_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(IO_THREADS_AUTO_MAX),
            given => given,
        }
    }
}

/// In the largest binary unit that needs no fraction, so that what is printed reads back as the same size.
fn exact<S: Serializer>(size: &ByteSize, serializer: S) -> Result<S::Ok, S::Error> {
    let bytes = size.as_u64();
    let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let whole = units.into_iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    let (unit, name) = whole.unwrap_or((1, "B"));
    serializer.collect_str(&format_args!("{} {name}", bytes / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed_without_loss() {
        for (bytes, shown) in
            [(0, "0 B"), (1536 << 20, "1536 MiB"), (1 << 40, "1 TiB"), (1_234_567, "1234567 B")]
        {
            let config = Config { budget: ByteSize(bytes), ..Config::default() };
            let text = toml::to_string(&config).unwrap();
            assert!(text.contains(&format!("budget = \"{shown}\"")), "{text}");
            assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
        }
    }

    #[test]
    fn sizes_are_read_in_units_and_unknown_keys_are_refused() {
        let config: Config = toml::from_str("budget = \"20 GiB\"\nfree_floor = 1024").unwrap();
        assert_eq!(config.budget, ByteSize::gib(20));
        assert_eq!(config.free_floor, ByteSize(1024));
        assert!(toml::from_str::<Config>("budgets = 1").is_err());
        assert!(toml::from_str::<Config>("budget = \"20%\"").is_err());
    }
}
