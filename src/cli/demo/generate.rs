//! The image and the checkpoint that the demo moves.
//!
//! Invariant: what a manifest, an index or a digest here says about bytes is true of the bytes, as it would be of a
//! real image and a real checkpoint; no byte is in two contents, so every one of them has to be hauled.
//! This module refuses to know how the bytes are served.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::recipe::{Recipe, Segment};
use crate::content::{Algorithm, ByteRange, Digest};

pub(super) const REPOSITORY: &str = "demo/model-server";
pub(super) const TAG: &str = "latest";
pub(super) const BUCKET: &str = "demo-models";
/// Every object's key starts with this.
pub(super) const PREFIX: &str = "model-server/";

pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
/// Uncompressed, so that a layer's digest is its diff id too.
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
const OBJECT_TYPE: &str = "application/octet-stream";

/// Shares of the image in percent: one layer has most of it, as the CUDA or framework layer of a model server has.
const LAYER_PERCENT: [u64; 3] = [70, 20, 10];
const SHARDS: u64 = 4;
const TENSORS_PER_SHARD: u64 = 4;
/// Keeps a file's size inside the 11 octal digits of a tar header.
const TAR_FILE_BYTES: u64 = 4 << 30;
const TAR_BLOCK_BYTES: u64 = 512;
/// What a hashing thread reads at once: large enough for BLAKE3's wide path, small enough for the L2 cache.
const HASH_PIECE_BYTES: u64 = 128 << 10;

/// One blob or object, with what proves that it arrived.
#[derive(Clone)]
pub(super) struct Generated {
    /// The object's key; for a blob, what it is.
    pub name: String,
    pub media_type: &'static str,
    pub recipe: Recipe,
    /// sha256.
    pub digest: Digest,
}

/// A manifest and what it names.
pub(super) struct Image {
    pub manifest: Generated,
    pub config: Generated,
    pub layers: Vec<Generated>,
}

/// All that the origin has.
pub(super) struct Dataset {
    pub image: Image,
    pub checkpoint: Vec<Generated>,
}

impl Dataset {
    /// An image and a checkpoint of about `size` bytes each. Hashes them on every core; `hashed` counts the bytes
    /// hashed so far, out of about 2 · `size`.
    #[must_use]
    pub(super) fn generate(size: u64, hashed: &AtomicU64) -> Self {
        let mut plans: Vec<_> = LAYER_PERCENT
            .iter()
            .enumerate()
            .map(|(n, percent)| {
                layer(n, u64::try_from(u128::from(size) * u128::from(*percent) / 100).unwrap_or(size))
            })
            .collect();
        plans.extend(checkpoint(size));
        let mut contents = digest_all(plans, hashed);
        let checkpoint = contents.split_off(LAYER_PERCENT.len());
        Self { image: Image::of(contents), checkpoint }
    }

    /// Everything the registry has.
    pub(super) fn blobs(&self) -> impl Iterator<Item = &Generated> {
        [&self.image.manifest, &self.image.config].into_iter().chain(&self.image.layers)
    }

    /// Everything there is.
    pub(super) fn contents(&self) -> impl Iterator<Item = &Generated> {
        self.blobs().chain(&self.checkpoint)
    }

    /// What the origin has to send when it sends every byte once.
    #[must_use]
    pub(super) fn unique_bytes(&self) -> u64 {
        self.contents().map(|content| content.recipe.size()).sum()
    }

    /// What the origin has to be asked for when it is asked for every chunk once.
    #[must_use]
    pub(super) fn chunks(&self, chunk_bytes: u32) -> u64 {
        self.contents().map(|content| content.recipe.size().div_ceil(u64::from(chunk_bytes))).sum()
    }
}

impl Generated {
    #[must_use]
    pub(super) fn new(name: String, media_type: &'static str, recipe: Recipe, hashed: &AtomicU64) -> Self {
        let mut hasher = Sha256::new();
        let mut offset = 0;
        while offset < recipe.size() {
            let piece = recipe.read(ByteRange::new(offset, offset + HASH_PIECE_BYTES));
            hasher.update(&piece);
            offset += piece.len() as u64;
            hashed.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        let digest =
            Digest::from_bytes(Algorithm::Sha256, &hasher.finalize()).expect("a sha256 has 32 bytes");
        Self { name, media_type, recipe, digest }
    }

    fn descriptor(&self) -> serde_json::Value {
        json!({ "mediaType": self.media_type, "digest": self.digest.to_string(), "size": self.recipe.size() })
    }
}

impl Image {
    fn of(layers: Vec<Generated>) -> Self {
        let unseen = AtomicU64::new(0);
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.digest.to_string()).collect();
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Cmd": ["/opt/model-server/run"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config =
            Generated::new("config".into(), CONFIG_TYPE, config.to_string().into_bytes().into(), &unseen);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config.descriptor(),
            "layers": layers.iter().map(Generated::descriptor).collect::<Vec<_>>(),
        });
        let manifest = Generated::new(
            "manifest".into(),
            MANIFEST_TYPE,
            manifest.to_string().into_bytes().into(),
            &unseen,
        );
        Self { manifest, config, layers }
    }
}

/// A content before it is hashed.
struct Plan {
    name: String,
    media_type: &'static str,
    recipe: Recipe,
}

/// A tar of about `size` random bytes.
fn layer(number: usize, size: u64) -> Plan {
    let mut segments = Vec::new();
    let mut left = size;
    for part in 0.. {
        let len = left.min(TAR_FILE_BYTES);
        let path = format!("opt/model-server/layer-{number}/part-{part:04}.bin");
        segments.push(Segment::Literal(tar_header(&path, len)));
        segments.push(Segment::random(&path, len));
        segments.push(Segment::Zeros(len.next_multiple_of(TAR_BLOCK_BYTES) - len));
        left -= len;
        if left == 0 {
            break;
        }
    }
    segments.push(Segment::Zeros(2 * TAR_BLOCK_BYTES));
    Plan { name: format!("layer {number}"), media_type: LAYER_TYPE, recipe: Recipe::new(segments) }
}

/// One regular file's header in POSIX.1-1988 ustar form.
fn tar_header(path: &str, len: u64) -> Bytes {
    let mut block = vec![0; 512];
    let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, "0000644");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{len:011o}"));
    put(136, "00000000000");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar");
    put(263, "00");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block.into()
}

/// Files of a Hugging Face checkpoint: shards, their index, a configuration.
fn checkpoint(size: u64) -> Vec<Plan> {
    let shard_name = |n: u64| format!("model-{:05}-of-{SHARDS:05}.safetensors", n + 1);
    let tensor_bytes = (size / SHARDS / TENSORS_PER_SHARD).next_multiple_of(2);
    let mut plans: Vec<_> =
        (0..SHARDS).map(|n| object(&shard_name(n), shard(&shard_name(n), n, tensor_bytes))).collect();
    let weight_map: serde_json::Map<_, _> = (0..SHARDS)
        .flat_map(|n| (0..TENSORS_PER_SHARD).map(move |t| (tensor_name(n, t), json!(shard_name(n)))))
        .collect();
    let total = tensor_bytes * SHARDS * TENSORS_PER_SHARD;
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let config = json!({ "architectures": ["DemoForCausalLM"], "torch_dtype": "bfloat16" });
    plans.push(object("model.safetensors.index.json", index.to_string().into_bytes().into()));
    plans.push(object("config.json", config.to_string().into_bytes().into()));
    plans
}

fn object(name: &str, recipe: Recipe) -> Plan {
    Plan { name: format!("{PREFIX}{name}"), media_type: OBJECT_TYPE, recipe }
}

/// safetensors: the header's length as u64 LE, the header as JSON padded with spaces to 8 bytes, the tensors.
fn shard(name: &str, number: u64, tensor_bytes: u64) -> Recipe {
    let tensors: serde_json::Map<_, _> = (0..TENSORS_PER_SHARD)
        .map(|t| {
            let offsets = [t * tensor_bytes, (t + 1) * tensor_bytes];
            let tensor = json!({ "dtype": "BF16", "shape": [tensor_bytes / 2], "data_offsets": offsets });
            (tensor_name(number, t), tensor)
        })
        .collect();
    let mut json = serde_json::Value::Object(tensors).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Recipe::new(vec![
        Segment::Literal(header.into()),
        Segment::random(name, TENSORS_PER_SHARD * tensor_bytes),
    ])
}

fn tensor_name(shard: u64, tensor: u64) -> String {
    format!("model.layers.{}.mlp.weight", shard * TENSORS_PER_SHARD + tensor)
}

/// Hashes on every core; the result has the order of `plans`.
fn digest_all(plans: Vec<Plan>, hashed: &AtomicU64) -> Vec<Generated> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(plans.len()));
    thread::scope(|scope| {
        for _ in 0..cores.min(plans.len()) {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(plan) = plans.get(n) else { break };
                    let content =
                        Generated::new(plan.name.clone(), plan.media_type, plan.recipe.clone(), hashed);
                    done.lock().push((n, content));
                }
            });
        }
    });
    let mut done = done.into_inner();
    done.sort_by_key(|(n, _)| *n);
    done.into_iter().map(|(_, content)| content).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn generate(size: u64) -> Dataset {
        Dataset::generate(size, &AtomicU64::new(0))
    }

    fn bytes(content: &Generated) -> Bytes {
        content.recipe.read(ByteRange::new(0, u64::MAX))
    }

    #[test]
    fn digests_are_of_the_bytes_and_no_two_are_equal() {
        let hashed = AtomicU64::new(0);
        let dataset = Dataset::generate(300_000, &hashed);
        let mut digests = BTreeSet::new();
        for content in dataset.contents() {
            assert_eq!(
                content.digest.as_bytes(),
                Sha256::digest(bytes(content)).as_slice(),
                "{}",
                content.name
            );
            assert!(digests.insert(content.digest.clone()), "{} is there twice", content.name);
        }
        assert_eq!(digests.len(), 5 + 6);
        let small = dataset.image.manifest.recipe.size() + dataset.image.config.recipe.size();
        assert_eq!(hashed.into_inner() + small, dataset.unique_bytes());
    }

    #[test]
    fn two_runs_generate_the_same() {
        assert_eq!(generate(300_000).image.manifest.digest, generate(300_000).image.manifest.digest);
        assert_ne!(generate(300_000).image.manifest.digest, generate(400_000).image.manifest.digest);
    }

    #[test]
    fn the_manifest_describes_its_layers_and_one_is_most_of_the_image() {
        let image = generate(1 << 20).image;
        let manifest: serde_json::Value = serde_json::from_slice(&bytes(&image.manifest)).unwrap();
        let sizes: Vec<_> =
            manifest["layers"].as_array().unwrap().iter().map(|l| l["size"].as_u64().unwrap()).collect();
        assert_eq!(sizes, image.layers.iter().map(|l| l.recipe.size()).collect::<Vec<_>>());
        assert!(sizes[0] * 10 >= sizes.iter().sum::<u64>() * 6);
        assert_eq!(manifest["config"]["digest"], image.config.digest.to_string());
    }

    #[test]
    fn a_layer_is_a_tar_and_a_shard_is_a_safetensors_file() {
        let dataset = generate(100_001);
        let tar = bytes(&dataset.image.layers[0]);
        assert_eq!(tar.len() % 512, 0);
        let sum: u32 = tar[..148].iter().chain(&[b' '; 8]).chain(&tar[156..512]).map(|b| u32::from(*b)).sum();
        assert_eq!(format!("{sum:06o}").as_bytes(), &tar[148..154]);
        assert_eq!(&tar[124..135], format!("{:011o}", 70_000).as_bytes());

        let shard = bytes(&dataset.checkpoint[0]);
        let header = usize::try_from(u64::from_le_bytes(shard[..8].try_into().unwrap())).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&shard[8..8 + header]).unwrap();
        let last = json["model.layers.3.mlp.weight"]["data_offsets"][1].as_u64().unwrap();
        assert_eq!(last, (shard.len() - 8 - header) as u64);
    }

    #[test]
    fn chunks_are_counted_per_content() {
        let dataset = generate(1 << 20);
        assert_eq!(dataset.chunks(u32::MAX), 11);
        assert!(dataset.chunks(64 << 10) > 32);
    }
}
