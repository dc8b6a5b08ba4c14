//! The file next to a content's data that says what the data is and which chunks of it are there.
//!
//! A header, then a log of 64-byte slots that only grows:
//!
//! ```text
//! header  0  8  magic "windlass"                  slot  0  1  kind: 1 held, 2 dropped, 3 sealed, 4 pinned,
//!                                                               5 unpinned, 6 written
//!         8  4  format version, little endian            1  3  zero
//!        12  4  length of the body                       4  4  chunk number, little endian
//!        16 32  BLAKE3 of bytes 0..16 and the body       8 32  BLAKE3 of the chunk (held, written)
//!        48  …  body: postcard of (ContentId, Layout)   40 16  node that attested it (held, written)
//!            …  zeros up to a multiple of 64            56  8  checksum: keyed BLAKE3 of offset and bytes 0..56
//! ```
//!
//! Slots never straddle a 512-byte sector, so a torn write loses whole slots only. The checksum is keyed with the
//! content's key and covers the slot's own offset: neither another content's log nor an old block that a crash
//! brought back passes for a slot. A slot that does not check is as if it had not been written, and a content whose
//! log has such a slot before its end is not believed until its chunks are hashed again.
//!
//! A `pinned` slot has in bytes 8..16 when the pin ends, in milliseconds since the Unix epoch, or zero for never.
//!
//! A `written` slot goes out as soon as the chunk's bytes have, and nobody syncs it: a killed process loses neither, a
//! power cut may lose either. So its chunk is *in doubt* until its bytes were hashed, unless a `held` or `dropped` slot
//! follows. A program that does not know the kind takes the slot for a damaged one, which only makes it check more.
//!
//! Invariant: a `held` slot is written only after its chunk is durable. Everything the index knows can be rebuilt
//! from here. This module refuses to look at the data.

use std::collections::HashMap;

use crate::content::{Attestation, ChunkDigest, ChunkIndex, ChunkSet, ContentId, ContentKey, Layout, NodeId};

use super::data_dir::FORMAT_VERSION;
use super::pin::Pin;

const MAGIC: &[u8; 8] = b"windlass";
const HEADER_FIXED: usize = 48;
/// Bytes of one slot.
pub(super) const SLOT: usize = 64;
const SLOT_BODY: usize = 56;

/// No program will get there: what says so is no sidecar, but some other file's block that begins with the same letters, as
/// the text in `format` does.
const VERSION_MAX: u32 = 0xFFFF;

/// S3 allows 1,024 bytes of key and 63 of bucket; this is far above any identity and below a harmful allocation.
const BODY_MAX: usize = 16 << 10;

/// One thing that happened to a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// The chunk's bytes are durable and had this digest.
    Held(ChunkIndex, Attestation),
    /// The chunk's bytes, which had this digest, were given to the kernel; whether they reached the medium is not known.
    Written(ChunkIndex, Attestation),
    /// The chunk's bytes are not to be used any more; a seal is void.
    Dropped(ChunkIndex),
    /// All chunks are there and the whole had its digest.
    Sealed,
    /// Takes the place of an earlier pin.
    Pinned(Pin),
}

/// What a log says when read from its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Claims {
    pub have: ChunkSet,
    pub attestations: HashMap<ChunkIndex, Attestation>,
    /// Chunks that were written and not seen durable: disjoint from `have`.
    pub doubts: HashMap<ChunkIndex, Attestation>,
    pub sealed: bool,
    pub pin: Pin,
}

impl Claims {
    pub(super) fn apply(&mut self, record: Record) {
        match record {
            Record::Held(chunk, attestation) => {
                self.have.insert(chunk);
                self.attestations.insert(chunk, attestation);
                self.doubts.remove(&chunk);
            }
            // What was claimed of the chunk before may have been overwritten.
            Record::Written(chunk, attestation) => {
                self.forget(chunk);
                self.doubts.insert(chunk, attestation);
            }
            Record::Dropped(chunk) => self.forget(chunk),
            Record::Sealed => self.sealed = true,
            Record::Pinned(pin) => self.pin = pin,
        }
    }

    fn forget(&mut self, chunk: ChunkIndex) {
        self.have.remove(chunk);
        self.attestations.remove(&chunk);
        self.doubts.remove(&chunk);
        self.sealed = false;
    }
}

/// A sidecar as it was found.
#[derive(Debug)]
pub(super) struct Sidecar {
    pub id: ContentId,
    pub key: ContentKey,
    pub layout: Layout,
    pub claims: Claims,
    /// Offset behind the last good slot: the next one is written there.
    pub end: u64,
    /// Bad slots before `end`.
    pub damaged: u32,
}

/// Why a file is not a sidecar.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SidecarError {
    #[error("the header is torn or not a sidecar's")]
    Header,
    #[error("format {0} is newer than this program")]
    Newer(u32),
}

impl Sidecar {
    /// Reads a whole sidecar file.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, SidecarError> {
        let (id, layout, start) = parse_header(bytes)?;
        let key = id.key(layout.chunk_bytes());
        let mut sidecar = Self { id, key, layout, claims: Claims::default(), end: start as u64, damaged: 0 };
        let mut bad = 0;
        for (number, slot) in bytes[start..].as_chunks::<SLOT>().0.iter().enumerate() {
            let offset = (start + number * SLOT) as u64;
            match parse_slot(&key, offset, slot).filter(|record| fits(record, &layout)) {
                Some(record) => {
                    sidecar.claims.apply(record);
                    sidecar.end = offset + SLOT as u64;
                    sidecar.damaged += std::mem::take(&mut bad);
                }
                None => bad += 1,
            }
        }
        sidecar.claims.sealed &= sidecar.claims.have.is_full(&layout);
        Ok(sidecar)
    }
}

/// The bytes a new sidecar starts with.
pub(super) fn header(id: &ContentId, layout: &Layout) -> Vec<u8> {
    let body = postcard::to_stdvec(&(id, layout)).expect("postcard writes any owned value into memory");
    let mut bytes = Vec::with_capacity((HEADER_FIXED + body.len()).next_multiple_of(SLOT));
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(header_hash(&bytes, &body).as_bytes());
    bytes.extend_from_slice(&body);
    bytes.resize(bytes.len().next_multiple_of(SLOT), 0);
    bytes
}

/// Appends the slot for `record` to `log`, whose first byte lies at `log_offset` of the file.
pub(super) fn append(log: &mut Vec<u8>, log_offset: u64, key: &ContentKey, record: &Record) {
    let mut slot = [0; SLOT];
    if let Record::Held(_, attestation) | Record::Written(_, attestation) = record {
        slot[8..40].copy_from_slice(&attestation.digest.0);
        slot[40..56].copy_from_slice(&attestation.attester.0);
    }
    if let Record::Pinned(Pin::Until(end_ms)) = record {
        slot[8..16].copy_from_slice(&end_ms.to_le_bytes());
    }
    let (kind, chunk) = match record {
        Record::Held(chunk, _) => (1, chunk.0),
        Record::Dropped(chunk) => (2, chunk.0),
        Record::Sealed => (3, 0),
        Record::Pinned(Pin::Not) => (5, 0),
        Record::Pinned(_) => (4, 0),
        Record::Written(chunk, _) => (6, chunk.0),
    };
    slot[0] = kind;
    slot[4..8].copy_from_slice(&chunk.to_le_bytes());
    let sum = slot_sum(key, log_offset + log.len() as u64, &slot[..SLOT_BODY]);
    slot[SLOT_BODY..].copy_from_slice(&sum);
    log.extend_from_slice(&slot);
}

fn parse_header(bytes: &[u8]) -> Result<(ContentId, Layout, usize), SidecarError> {
    let fixed = bytes.first_chunk::<HEADER_FIXED>().ok_or(SidecarError::Header)?;
    if &fixed[..8] != MAGIC {
        return Err(SidecarError::Header);
    }
    // The version comes first: a newer header may be laid out differently behind it.
    let version = u32_at(fixed, 8);
    if version > VERSION_MAX {
        return Err(SidecarError::Header);
    }
    if version > FORMAT_VERSION {
        return Err(SidecarError::Newer(version));
    }
    let len = u32_at(fixed, 12) as usize;
    let body = bytes.get(HEADER_FIXED..HEADER_FIXED + len.min(BODY_MAX)).ok_or(SidecarError::Header)?;
    if header_hash(&fixed[..16], body).as_bytes()[..] != fixed[16..48] {
        return Err(SidecarError::Header);
    }
    let (id, layout): (ContentId, Layout) = postcard::from_bytes(body).map_err(|_| SidecarError::Header)?;
    let layout = Layout::new(layout.size(), layout.chunk_bytes()).map_err(|_| SidecarError::Header)?;
    let start = (HEADER_FIXED + len).next_multiple_of(SLOT);
    if bytes.len() < start { Err(SidecarError::Header) } else { Ok((id, layout, start)) }
}

fn parse_slot(key: &ContentKey, offset: u64, slot: &[u8; SLOT]) -> Option<Record> {
    if slot[SLOT_BODY..] != slot_sum(key, offset, &slot[..SLOT_BODY]) {
        return None;
    }
    let chunk = ChunkIndex(u32_at(slot, 4));
    let (mut digest, mut attester) = ([0; 32], [0; 16]);
    digest.copy_from_slice(&slot[8..40]);
    attester.copy_from_slice(&slot[40..56]);
    let attestation = Attestation { digest: ChunkDigest(digest), attester: NodeId(attester) };
    Some(match slot[0] {
        1 => Record::Held(chunk, attestation),
        2 => Record::Dropped(chunk),
        3 => Record::Sealed,
        4 => Record::Pinned(pin_end(slot)),
        5 => Record::Pinned(Pin::Not),
        6 => Record::Written(chunk, attestation),
        _ => return None,
    })
}

fn fits(record: &Record, layout: &Layout) -> bool {
    match record {
        Record::Held(chunk, _) | Record::Written(chunk, _) | Record::Dropped(chunk) => {
            chunk.0 < layout.chunk_count()
        }
        Record::Sealed | Record::Pinned(_) => true,
    }
}

fn pin_end(slot: &[u8; SLOT]) -> Pin {
    let mut end_ms = [0; 8];
    end_ms.copy_from_slice(&slot[8..16]);
    match u64::from_le_bytes(end_ms) {
        0 => Pin::Forever,
        end_ms => Pin::Until(end_ms),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn header_hash(fixed: &[u8], body: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(fixed).update(body).finalize()
}

fn slot_sum(key: &ContentKey, offset: u64, body: &[u8]) -> [u8; 8] {
    let hash = blake3::Hasher::new_keyed(&key.0).update(&offset.to_le_bytes()).update(body).finalize();
    let mut sum = [0; 8];
    sum.copy_from_slice(&hash.as_bytes()[..8]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::{ETag, ObjectVersion};
    use proptest::prelude::*;

    fn id() -> ContentId {
        ContentId::Object(ObjectVersion {
            bucket: "models".into(),
            key: "a/b".into(),
            etag: ETag("\"1\"".into()),
            size: 1_000,
        })
    }

    fn layout() -> Layout {
        Layout::new(1_000, 10).unwrap()
    }

    fn file(records: &[Record]) -> Vec<u8> {
        let mut bytes = header(&id(), &layout());
        let key = id().key(10);
        for record in records {
            append(&mut bytes, 0, &key, record);
        }
        bytes
    }

    fn attested(byte: u8) -> Attestation {
        Attestation { digest: ChunkDigest([byte; 32]), attester: NodeId([byte; 16]) }
    }

    fn held(chunk: u32, byte: u8) -> Record {
        Record::Held(ChunkIndex(chunk), attested(byte))
    }

    fn written(chunk: u32, byte: u8) -> Record {
        Record::Written(ChunkIndex(chunk), attested(byte))
    }

    fn records() -> impl Strategy<Value = Vec<Record>> {
        let record = prop_oneof![
            4 => (0u32..100, any::<u8>()).prop_map(|(chunk, byte)| held(chunk, byte)),
            4 => (0u32..100, any::<u8>()).prop_map(|(chunk, byte)| written(chunk, byte)),
            1 => (0u32..100).prop_map(|chunk| Record::Dropped(ChunkIndex(chunk))),
            1 => prop_oneof![Just(Pin::Not), Just(Pin::Forever), (1..u64::MAX).prop_map(Pin::Until)].prop_map(Record::Pinned),
        ];
        proptest::collection::vec(record, 0..60)
    }

    fn model(records: &[Record]) -> Claims {
        let mut claims = Claims::default();
        records.iter().for_each(|record| claims.apply(*record));
        claims
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(records in records()) {
            let read = Sidecar::parse(&file(&records)).unwrap();
            prop_assert_eq!((&read.id, read.layout, read.damaged), (&id(), layout(), 0));
            prop_assert_eq!(read.claims, model(&records));
        }

        #[test]
        fn a_torn_tail_loses_the_torn_slots_only(records in records(), cut in 0usize..2_000) {
            let mut bytes = file(&records);
            let start = file(&[]).len();
            let kept = cut.min(records.len() * SLOT);
            bytes.truncate(start + kept);
            let read = Sidecar::parse(&bytes).unwrap();
            prop_assert_eq!(read.claims, model(&records[..kept / SLOT]));
            prop_assert_eq!(read.end, (start + kept / SLOT * SLOT) as u64);
        }

        #[test]
        fn any_flipped_bit_is_noticed(records in records(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = file(&records);
            let start = file(&[]).len();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            match Sidecar::parse(&bytes) {
                Err(_) => prop_assert!(at < start),
                // Padding behind the header's body carries nothing.
                Ok(read) if at < start => prop_assert_eq!(read.claims, model(&records)),
                Ok(read) => {
                    let mut others = records.clone();
                    let hit = (at - start) / SLOT;
                    others.remove(hit);
                    prop_assert_eq!(read.claims, model(&others));
                    prop_assert_eq!(read.damaged, u32::from(hit + 1 < records.len()));
                }
            }
        }
    }

    #[test]
    fn a_seal_counts_only_while_every_chunk_is_there() {
        let mut records: Vec<_> = (0..100).map(|chunk| held(chunk, 1)).collect();
        records.push(Record::Sealed);
        assert!(Sidecar::parse(&file(&records)).unwrap().claims.sealed);
        records.push(Record::Dropped(ChunkIndex(7)));
        records.push(held(7, 2));
        assert!(!Sidecar::parse(&file(&records)).unwrap().claims.sealed);
        records.remove(3);
        assert!(!Sidecar::parse(&file(&[held(1, 1), Record::Sealed])).unwrap().claims.sealed);
    }

    #[test]
    fn a_written_chunk_is_in_doubt_until_it_is_held_or_dropped() {
        let claims = |records: &[Record]| Sidecar::parse(&file(records)).unwrap().claims;
        let doubtful = claims(&[held(1, 1), written(2, 2)]);
        assert_eq!(doubtful.have, [ChunkIndex(1)].into_iter().collect());
        assert_eq!(doubtful.doubts, HashMap::from([(ChunkIndex(2), attested(2))]));
        assert!(claims(&[written(2, 2), held(2, 2)]).doubts.is_empty());
        assert!(claims(&[written(2, 2), Record::Dropped(ChunkIndex(2))]).doubts.is_empty());
        // Overwritten before the word that it had been dropped came out.
        let again = claims(&[held(2, 1), written(2, 2)]);
        assert!(again.have.is_empty() && again.attestations.is_empty());
        assert_eq!(again.doubts, HashMap::from([(ChunkIndex(2), attested(2))]));
    }

    #[test]
    fn newer_and_foreign_files_are_told_apart() {
        let mut bytes = file(&[]);
        bytes[8] = 2;
        assert_eq!(Sidecar::parse(&bytes).unwrap_err(), SidecarError::Newer(2));
        bytes[0] = 0;
        assert_eq!(Sidecar::parse(&bytes).unwrap_err(), SidecarError::Header);
        assert_eq!(Sidecar::parse(&[]).unwrap_err(), SidecarError::Header);
    }
}
