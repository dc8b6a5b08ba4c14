//! What a registry's name says about ECR: pure.
//!
//! The patterns are those of the kubelet's ECR credential provider (`facts/wire.md` section 4); the endpoints of the
//! API are those of the SDK's rules for `ecr` and `ecr-public`.

use std::fmt;

/// Domains of registries, and the part of the API's name that follows the region there.
const PARTITIONS: [Partition; 10] = [
    Partition { registry: "amazonaws.com", api: "amazonaws.com", is_dual_stack: false },
    Partition { registry: "on.aws", api: "api.aws", is_dual_stack: true },
    Partition { registry: "amazonaws.com.cn", api: "amazonaws.com.cn", is_dual_stack: false },
    Partition {
        registry: "on.amazonwebservices.com.cn",
        api: "api.amazonwebservices.com.cn",
        is_dual_stack: true,
    },
    Partition { registry: "amazonaws.eu", api: "amazonaws.eu", is_dual_stack: false },
    Partition { registry: "on.amazonwebservices.eu", api: "api.amazonwebservices.eu", is_dual_stack: true },
    Partition { registry: "c2s.ic.gov", api: "c2s.ic.gov", is_dual_stack: false },
    Partition { registry: "sc2s.sgov.gov", api: "sc2s.sgov.gov", is_dual_stack: false },
    Partition { registry: "cloud.adc-e.uk", api: "cloud.adc-e.uk", is_dual_stack: false },
    Partition { registry: "csp.hci.ic.gov", api: "csp.hci.ic.gov", is_dual_stack: false },
];

/// Names of the public registry, one of them dual-stack.
const PUBLIC: [(&str, &str); 2] = [
    ("public.ecr.aws", "https://api.ecr-public.us-east-1.amazonaws.com"),
    ("ecr-public.aws.com", "https://ecr-public.us-east-1.api.aws"),
];

/// The one region that gives tokens for the public registry.
const PUBLIC_REGION: &str = "us-east-1";

#[derive(Clone, Copy, Debug)]
struct Partition {
    registry: &'static str,
    api: &'static str,
    is_dual_stack: bool,
}

/// A registry at ECR.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::origin::registry) enum EcrName {
    Private {
        /// Twelve digits.
        account: String,
        region: String,
        /// The registry's domain, which is the partition's.
        domain: &'static str,
        is_fips: bool,
        is_dual_stack: bool,
    },
    Public {
        endpoint: &'static str,
    },
}

impl EcrName {
    /// Reads a registry's name, as image names begin; `None` when it is no ECR.
    #[must_use]
    pub(in crate::origin::registry) fn parse(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        if let Some((_, endpoint)) = PUBLIC.iter().find(|(public, _)| *public == name) {
            return Some(Self::Public { endpoint });
        }
        let (account, rest) = name.split_once('.')?;
        if account.len() != 12 || !account.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        // Dual-stack names are spelled with a dash, the others with a dot.
        let (is_dashed, rest) = match rest.strip_prefix("dkr.ecr") {
            Some(rest) => (false, rest),
            None => (true, rest.strip_prefix("dkr-ecr")?),
        };
        let (is_fips, rest) = match rest.strip_prefix("-fips.") {
            Some(rest) => (true, rest),
            None => (false, rest.strip_prefix('.')?),
        };
        let (region, domain) = rest.split_once('.')?;
        let is_region = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let partition = PARTITIONS.iter().find(|partition| partition.registry == domain)?;
        if region.is_empty() || !region.chars().all(is_region) || is_dashed != partition.is_dual_stack {
            return None;
        }
        Some(Self::Private {
            account: account.to_owned(),
            region: region.to_owned(),
            domain: partition.registry,
            is_fips,
            is_dual_stack: partition.is_dual_stack,
        })
    }

    /// The region whose API gives the token, and whose name is signed.
    #[must_use]
    pub(super) fn region(&self) -> &str {
        match self {
            Self::Private { region, .. } => region,
            Self::Public { .. } => PUBLIC_REGION,
        }
    }

    /// Where `GetAuthorizationToken` is.
    #[must_use]
    pub(super) fn api(&self) -> String {
        let (region, domain, is_fips, is_dual_stack) = match self {
            Self::Public { endpoint } => return (*endpoint).to_owned(),
            Self::Private { region, domain, is_fips, is_dual_stack, .. } => {
                (region, domain, *is_fips, *is_dual_stack)
            }
        };
        let partition = PARTITIONS.iter().find(|partition| partition.registry == *domain);
        let suffix = partition.map_or(*domain, |partition| partition.api);
        // The first partition's older short names; the rule for the others is the general one.
        let is_first = matches!(*domain, "amazonaws.com" | "on.aws");
        let service = match (is_fips, is_dual_stack) {
            (true, _) if is_first => "ecr-fips",
            (true, _) => "api.ecr-fips",
            (false, true) if suffix == "api.aws" || suffix == "api.amazonwebservices.com.cn" => "ecr",
            (false, _) => "api.ecr",
        };
        format!("https://{service}.{region}.{suffix}")
    }

    #[must_use]
    pub(super) const fn is_public(&self) -> bool {
        matches!(self, Self::Public { .. })
    }
}

/// Account and region, as messages name them.
impl fmt::Display for EcrName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Private { account, region, .. } => write!(f, "ECR of account {account} in {region}"),
            Self::Public { .. } => f.write_str("ECR Public"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What follows the account; the region, whether FIPS and dual-stack; where the API is.
    const PRIVATE: [(&str, &str, bool, bool, &str); 13] = [
        ("dkr.ecr.eu-west-1.amazonaws.com", "eu-west-1", false, false, "api.ecr.eu-west-1.amazonaws.com"),
        (
            "dkr.ecr.us-gov-west-1.amazonaws.com",
            "us-gov-west-1",
            false,
            false,
            "api.ecr.us-gov-west-1.amazonaws.com",
        ),
        (
            "dkr.ecr-fips.us-east-2.amazonaws.com",
            "us-east-2",
            true,
            false,
            "ecr-fips.us-east-2.amazonaws.com",
        ),
        (
            "dkr.ecr-fips.us-gov-east-1.amazonaws.com",
            "us-gov-east-1",
            true,
            false,
            "ecr-fips.us-gov-east-1.amazonaws.com",
        ),
        ("dkr-ecr.us-west-2.on.aws", "us-west-2", false, true, "ecr.us-west-2.api.aws"),
        ("dkr-ecr-fips.us-west-2.on.aws", "us-west-2", true, true, "ecr-fips.us-west-2.api.aws"),
        (
            "dkr.ecr.cn-north-1.amazonaws.com.cn",
            "cn-north-1",
            false,
            false,
            "api.ecr.cn-north-1.amazonaws.com.cn",
        ),
        (
            "dkr-ecr.cn-northwest-1.on.amazonwebservices.com.cn",
            "cn-northwest-1",
            false,
            true,
            "ecr.cn-northwest-1.api.amazonwebservices.com.cn",
        ),
        (
            "dkr.ecr.us-iso-east-1.c2s.ic.gov",
            "us-iso-east-1",
            false,
            false,
            "api.ecr.us-iso-east-1.c2s.ic.gov",
        ),
        (
            "dkr.ecr.us-isob-east-1.sc2s.sgov.gov",
            "us-isob-east-1",
            false,
            false,
            "api.ecr.us-isob-east-1.sc2s.sgov.gov",
        ),
        (
            "dkr.ecr.eu-isoe-west-1.cloud.adc-e.uk",
            "eu-isoe-west-1",
            false,
            false,
            "api.ecr.eu-isoe-west-1.cloud.adc-e.uk",
        ),
        (
            "dkr.ecr.us-isof-south-1.csp.hci.ic.gov",
            "us-isof-south-1",
            false,
            false,
            "api.ecr.us-isof-south-1.csp.hci.ic.gov",
        ),
        (
            "dkr.ecr.eusc-de-east-1.amazonaws.eu",
            "eusc-de-east-1",
            false,
            false,
            "api.ecr.eusc-de-east-1.amazonaws.eu",
        ),
    ];

    #[test]
    fn every_pattern_and_where_its_token_is() {
        for (rest, region, is_fips, is_dual_stack, api) in PRIVATE {
            let name = EcrName::parse(&format!("123456789012.{rest}")).expect(rest);
            assert_eq!((name.region(), name.api()), (region, format!("https://{api}")), "{rest}");
            let EcrName::Private { account, is_fips: fips, is_dual_stack: dual, .. } = name else {
                panic!("{rest}")
            };
            assert_eq!((account.as_str(), fips, dual), ("123456789012", is_fips, is_dual_stack), "{rest}");
        }
    }

    #[test]
    fn the_public_registry_has_two_names() {
        for (name, api) in [
            ("public.ecr.aws", "https://api.ecr-public.us-east-1.amazonaws.com"),
            ("ecr-public.aws.com", "https://ecr-public.us-east-1.api.aws"),
        ] {
            let parsed = EcrName::parse(name).unwrap();
            assert!(parsed.is_public());
            assert_eq!((parsed.region(), parsed.api().as_str()), ("us-east-1", api));
        }
    }

    #[test]
    fn what_only_looks_like_ecr_is_none() {
        for name in [
            "docker.io",
            "dkr.ecr.eu-west-1.amazonaws.com",
            "12345678901.dkr.ecr.eu-west-1.amazonaws.com",
            "12345678901a.dkr.ecr.eu-west-1.amazonaws.com",
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com.evil.example",
            "123456789012.dkr.ecr.eu-west-1.evil.example",
            "123456789012.dkr.ecr.evil.eu-west-1.amazonaws.com",
            "123456789012.dkr.ecr..amazonaws.com",
            "123456789012.dkr-ecr.eu-west-1.amazonaws.com",
            "123456789012.dkr.ecr.eu-west-1.on.aws",
            "123456789012.dkr.ecrfips.eu-west-1.amazonaws.com",
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com:443",
            "evil.public.ecr.aws",
        ] {
            assert_eq!(EcrName::parse(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_name_panics(name in "([0-9]{12}\\.)?(dkr[.-]ecr(-fips)?\\.)?[ -~]{0,40}") {
            let _ = EcrName::parse(&name);
        }
    }
}
