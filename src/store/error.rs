//! One error per operation. Their texts are what an operator reads, so each says what to do next.

use std::io;
use std::path::PathBuf;

use crate::content::{ChunkIndex, Digest, NodeId};

/// Why the data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("data directory {} is not a directory: move that file away or set store.data_dir to another path", .path.display())]
    NotADirectory { path: PathBuf },
    #[error("data directory {} cannot be written ({source}): make it writable for this process (chown, or remount read-write) or set store.data_dir to another path", .path.display())]
    NotWritable { path: PathBuf, source: io::Error },
    #[error("data directory {} is used by another windlass: stop that daemon or give this one its own store.data_dir", .path.display())]
    Locked { path: PathBuf },
    #[error("no room for the store's own files in {}: free some space on that file system or set store.data_dir to another one", .path.display())]
    Full { path: PathBuf },
    #[error("{} was written by a newer windlass (format {found}, this program knows up to {known}): run that version, or delete the directory to start with an empty cache", .path.display())]
    NewerFormat { path: PathBuf, found: u32, known: u32 },
    #[error("{doing} {} failed: {source}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

/// Why a content could not be made ready to receive chunks.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Two origins, or two answers of one, disagree about the size.
    #[error("{name} is already stored with {held_bytes} bytes, but {asked_bytes} were announced")]
    SizeConflict { name: String, held_bytes: u64, asked_bytes: u64 },
    /// It may be stored, and can be neither read nor written now.
    #[error("what is stored of {name} cannot be read now: {source}")]
    Io { name: String, source: io::Error },
    #[error("the store is closed")]
    Closed,
}

/// Why bytes did not come back from disk.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Fetch the chunk and ask again.
    #[error("chunk {} is not stored", .0.0)]
    NotHeld(ChunkIndex),
    /// The chunk was dropped; fetch it again.
    #[error("chunk {} on disk no longer has its digest and was dropped", .0.0)]
    Corrupt(ChunkIndex),
    #[error(
        "a read of {asked_bytes} bytes that ends at {end} is not possible in a content of {size} bytes (at most {limit_bytes} bytes at a time)"
    )]
    OutOfBounds { asked_bytes: u64, end: u64, size: u64, limit_bytes: u64 },
    /// The disk works, but we could not use it (out of file descriptors, permissions).
    #[error("reading {} failed: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the store is closed")]
    Closed,
}

/// Why a chunk was not stored.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    /// The bytes are not what `attester` vouched for.
    #[error("chunk {} does not have the digest that node {attester} attested", .chunk.0)]
    Mismatch { chunk: ChunkIndex, attester: NodeId },
    #[error("chunk {} is {expected_bytes} bytes long, {got_bytes} were given", .chunk.0)]
    WrongLength { chunk: ChunkIndex, expected_bytes: u64, got_bytes: u64 },
    /// Nothing is lost: serve the bytes from memory.
    #[error("not stored: {reason}")]
    NoSpace { reason: String },
    #[error("the store is closed")]
    Closed,
}

/// Why a content is not whole.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("{missing} chunks are not stored yet")]
    Incomplete { missing: u32 },
    /// At least one chunk was attested wrongly; `Entry::attestation` says by whom.
    #[error("the whole has digest {actual}, expected {expected}")]
    Mismatch { expected: Digest, actual: Digest },
    /// A chunk turned out bad while the whole was hashed, and was dropped.
    #[error("chunk {} on disk no longer has its digest and was dropped", .0.0)]
    Corrupt(ChunkIndex),
    #[error("making {} durable failed: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the store is closed")]
    Closed,
}

/// Why a file was not placed at its destination.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    #[error("only a sealed content can be placed, this one is not complete yet")]
    NotSealed,
    #[error("destination {} cannot be used: {reason}", .path.display())]
    BadDestination { path: PathBuf, reason: &'static str },
    #[error("destination {} cannot be written ({source}): make it writable for the windlass daemon or choose another directory", .path.display())]
    NotWritable { path: PathBuf, source: io::Error },
    #[error("files in {} cannot be given to {uid}:{gid} ({source}): run the windlass daemon as root, or do not ask for another owner", .path.display())]
    NotOwner { path: PathBuf, uid: u32, gid: u32, source: io::Error },
    #[error("{} needs {needed_bytes} bytes and its file system has {free_bytes} free: free some space or choose another directory", .path.display())]
    TooSmall { path: PathBuf, needed_bytes: u64, free_bytes: u64 },
    #[error("the file system of {} is full ({free_bytes} bytes left): free some space or choose another directory", .path.display())]
    Full { path: PathBuf, free_bytes: u64 },
    #[error("{} is being placed by another request right now: wait for it", .path.display())]
    Busy { path: PathBuf },
    /// The stored copy is bad and was dropped; fetch it again.
    #[error("chunk {} on disk no longer has its digest and was dropped; fetch again", .0.0)]
    Corrupt(ChunkIndex),
    #[error("{doing} {} failed: {source}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("the store is closed")]
    Closed,
}

/// The pool takes no more work. Each operation has its own word for it.
#[derive(Debug)]
pub(super) struct Closed;

macro_rules! closed {
    ($($error:ty),*) => { $(impl From<Closed> for $error {
        fn from(Closed: Closed) -> Self { Self::Closed }
    })* };
}
closed!(ReadError, InsertError, SealError, PlaceError);
