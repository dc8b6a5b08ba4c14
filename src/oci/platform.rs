//! Which of an index's images a node would run.

use oci_spec::image::Platform as OciPlatform;

/// An operating system and a processor, in the words of Go's GOOS and GOARCH as the image specification wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl Platform {
    /// The platform this program was built for: what containerd on the same node pulls.
    #[must_use]
    pub fn of_this_build() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self::new("linux", architecture, None)
    }

    #[must_use]
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let variant = variant.filter(|variant| !is_implied(architecture, variant)).map(str::to_owned);
        Self { os: os.to_owned(), architecture: architecture.to_owned(), variant }
    }

    /// Whether an image for `other` is one for this platform. Attestations, `unknown/unknown`, never are.
    #[must_use]
    pub fn matches(&self, other: &OciPlatform) -> bool {
        let architecture = other.architecture().to_string();
        let variant = other.variant().as_deref();
        *self == Self::new(&other.os().to_string(), &architecture, variant)
    }
}

/// Variants that mean nothing: containerd's `platforms.Normalize` drops them too.
fn is_implied(architecture: &str, variant: &str) -> bool {
    matches!((architecture, variant), (_, "") | ("arm64", "v8" | "8") | ("amd64", "v1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oci(json: &str) -> OciPlatform {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn variants_that_are_implied_do_not_matter() {
        let arm = Platform::new("linux", "arm64", None);
        assert!(arm.matches(&oci(r#"{"os":"linux","architecture":"arm64","variant":"v8"}"#)));
        assert!(arm.matches(&oci(r#"{"os":"linux","architecture":"arm64"}"#)));
        assert!(!arm.matches(&oci(r#"{"os":"linux","architecture":"arm","variant":"v7"}"#)));
        assert!(!arm.matches(&oci(r#"{"os":"unknown","architecture":"unknown"}"#)));
    }
}
