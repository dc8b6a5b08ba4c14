//! What a manifest refers to, read leniently.

use oci_spec::image::{Descriptor as OciDescriptor, MediaType, ToDockerV2S2};
use serde_json::Value;

use super::platform::Platform;
use crate::content::Digest;

/// Longest manifest that is read: containerd itself stops at 4 · 1048 · 1048 bytes (`facts/wire.md` section 1.2).
pub const MAX_MANIFEST_BYTES: u64 = 4 * 1048 * 1048;

/// A content that a manifest names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    pub media_type: String,
}

/// What a manifest is made of. Descriptors that cannot be read, or whose digest could not be checked, are left
/// out: a manifest is only read to know what will be asked for next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manifest {
    /// Manifests for several platforms.
    Index {
        children: Vec<Descriptor>,
        /// The child for the platform that was asked about.
        chosen: Option<Descriptor>,
    },
    /// One image. Layers that live elsewhere by their `urls` are left out.
    Image { config: Option<Descriptor>, layers: Vec<Descriptor> },
}

/// The bytes are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("neither an image manifest nor an index")]
    Unknown,
}

impl Manifest {
    /// Reads a manifest or index of OCI or Docker (schema 2).
    ///
    /// # Errors
    /// [`ManifestError`] when it is neither.
    pub fn parse(bytes: &[u8], platform: &Platform) -> Result<Self, ManifestError> {
        let json: Value = serde_json::from_slice(bytes)?;
        if let Some(manifests) = json.get("manifests").and_then(Value::as_array) {
            let children: Vec<_> = manifests.iter().filter_map(read_descriptor).collect();
            let fits = |child: &&OciDescriptor| {
                child.platform().as_ref().is_some_and(|candidate| platform.matches(candidate))
            };
            let chosen = children.iter().find(fits).and_then(checkable);
            return Ok(Self::Index { children: children.iter().filter_map(checkable).collect(), chosen });
        }
        let Some(layers) = json.get("layers").and_then(Value::as_array) else {
            return Err(ManifestError::Unknown);
        };
        let is_here = |layer: &OciDescriptor| layer.urls().as_ref().is_none_or(Vec::is_empty);
        let layers = layers.iter().filter_map(read_descriptor).filter(is_here);
        Ok(Self::Image {
            config: json.get("config").and_then(read_descriptor).as_ref().and_then(checkable),
            layers: layers.filter_map(|layer| checkable(&layer)).collect(),
        })
    }
}

/// The media type that a manifest's bytes claim or, by their shape, have. For registries that do not say.
#[must_use]
pub fn media_type(bytes: &[u8]) -> Option<String> {
    let json: Value = serde_json::from_slice(bytes).ok()?;
    if let Some(claimed) = json.get("mediaType").and_then(Value::as_str) {
        return Some(claimed.to_owned());
    }
    let shape = match (json.get("manifests"), json.get("layers"), json.get("fsLayers")) {
        (Some(_), ..) => MediaType::ImageIndex.to_string(),
        (_, Some(_), _) if is_docker(&json) => MediaType::ImageManifest.to_docker_v2s2().ok()?.to_owned(),
        (_, Some(_), _) => MediaType::ImageManifest.to_string(),
        (.., Some(_)) => "application/vnd.docker.distribution.manifest.v1+prettyjws".to_owned(),
        _ => return None,
    };
    Some(shape)
}

fn is_docker(manifest: &Value) -> bool {
    let config = manifest.pointer("/config/mediaType").and_then(Value::as_str);
    config.is_some_and(|media_type| media_type.starts_with("application/vnd.docker."))
}

fn read_descriptor(json: &Value) -> Option<OciDescriptor> {
    serde::Deserialize::deserialize(json).ok()
}

fn checkable(descriptor: &OciDescriptor) -> Option<Descriptor> {
    Some(Descriptor {
        digest: descriptor.digest().to_string().parse().ok()?,
        size: descriptor.size(),
        media_type: descriptor.media_type().to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest(n: u8) -> String {
        format!("sha256:{}", hex::encode([n; 32]))
    }

    fn amd64() -> Platform {
        Platform::new("linux", "amd64", None)
    }

    #[test]
    fn an_index_yields_the_child_for_the_platform() {
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[
                {{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":1,
                  "platform":{{"os":"linux","architecture":"arm64"}}}},
                {{"mediaType":"x","digest":"md5:zz","size":-3}},
                {{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":2,
                  "platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#,
            digest(1),
            digest(2)
        );
        let Manifest::Index { children, chosen } = Manifest::parse(index.as_bytes(), &amd64()).unwrap()
        else {
            panic!("an index")
        };
        assert_eq!(children.len(), 2);
        assert_eq!(chosen.unwrap().size, 2);
        assert_eq!(media_type(index.as_bytes()).as_deref(), Some("application/vnd.oci.image.index.v1+json"));
    }

    #[test]
    fn an_image_yields_config_and_layers_that_live_here() {
        let image = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.docker.container.image.v1+json","digest":"{}","size":1}},
                "layers":[{{"mediaType":"l","digest":"{}","size":2}},
                          {{"mediaType":"l","digest":"{}","size":3,"urls":["https://elsewhere"]}}]}}"#,
            digest(1),
            digest(2),
            digest(3)
        );
        let Manifest::Image { config, layers } = Manifest::parse(image.as_bytes(), &amd64()).unwrap() else {
            panic!("an image")
        };
        assert_eq!(config.unwrap().size, 1);
        assert_eq!(layers.iter().map(|layer| layer.size).collect::<Vec<_>>(), [2]);
        let docker = "application/vnd.docker.distribution.manifest.v2+json";
        assert_eq!(media_type(image.as_bytes()).as_deref(), Some(docker));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Manifest::parse(&bytes, &amd64());
            let _ = media_type(&bytes);
        }

        #[test]
        fn no_json_panics(inner in "[\\[\\]{}\":,a-z0-9-]{0,60}", list in any::<bool>()) {
            let field = if list { "manifests" } else { "layers" };
            let json = format!(r#"{{"{field}":[{inner}],"config":{{{inner}}}}}"#);
            let _ = Manifest::parse(json.as_bytes(), &amd64());
            let _ = media_type(json.as_bytes());
        }
    }
}
