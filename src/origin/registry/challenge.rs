//! What a registry asks for when it answers 401 (RFC 9110 section 11.6.1; distribution token specification).

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;
use http_auth::{ChallengeRef, parser::ChallengeParser};

use crate::oci::RepositoryName;

/// A challenge that we can meet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Challenge {
    Basic,
    Bearer(Bearer),
}

/// Where to get a token, and for what. Equal values get equal tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Bearer {
    pub(super) realm: String,
    pub(super) service: Option<String>,
    /// Space-separated, as it came.
    pub(super) scope: String,
}

impl Challenge {
    /// The challenge to meet among those of a 401's headers: Bearer before Basic, as containerd prefers. `None`
    /// when there is none we can meet.
    ///
    /// A Bearer challenge without a scope means pulling from `name`.
    #[must_use]
    pub(super) fn choose(headers: &HeaderMap, name: &RepositoryName) -> Option<Self> {
        let values = headers.get_all(WWW_AUTHENTICATE).into_iter().filter_map(|value| value.to_str().ok());
        // The parser stops at a syntax error; what came before it still counts.
        let challenges: Vec<_> =
            values.flat_map(|value| ChallengeParser::new(value).map_while(Result::ok)).collect();
        let of = |scheme: &'static str| {
            challenges.iter().filter(move |challenge| challenge.scheme.eq_ignore_ascii_case(scheme))
        };
        let bearer = of("bearer").find_map(|challenge| Bearer::read(challenge, name));
        bearer.map(Self::Bearer).or_else(|| of("basic").next().map(|_| Self::Basic))
    }
}

impl Bearer {
    fn read(challenge: &ChallengeRef<'_>, name: &RepositoryName) -> Option<Self> {
        let parameter = |wanted: &str| {
            let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(wanted));
            found.map(|(_, value)| value.to_unescaped()).filter(|value| !value.is_empty())
        };
        Some(Self {
            realm: parameter("realm")?,
            service: parameter("service"),
            scope: parameter("scope").unwrap_or_else(|| format!("repository:{name}:pull")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choose(values: &[&str]) -> Option<Challenge> {
        let headers = values.iter().map(|value| (WWW_AUTHENTICATE, value.parse().unwrap())).collect();
        Challenge::choose(&headers, &"team/app".parse().unwrap())
    }

    fn bearer(realm: &str, service: Option<&str>, scope: &str) -> Challenge {
        Challenge::Bearer(Bearer {
            realm: realm.into(),
            service: service.map(str::to_owned),
            scope: scope.into(),
        })
    }

    #[test]
    fn challenges_in_all_their_forms() {
        let hub = r#"Bearer realm="https://auth.example.com/token",service="reg, the one",scope="repository:a/b:pull,push""#;
        let expected =
            bearer("https://auth.example.com/token", Some("reg, the one"), "repository:a/b:pull,push");
        assert_eq!(choose(&[hub]), Some(expected.clone()));
        assert_eq!(choose(&["Basic realm=\"x\"", hub]), Some(expected.clone()));
        assert_eq!(choose(&[&format!("Basic realm=\"x\", {hub}")]), Some(expected));
        assert_eq!(choose(&["bEARER Realm=\"r\""]), Some(bearer("r", None, "repository:team/app:pull")));
        assert_eq!(choose(&["BASIC realm=\"x\""]), Some(Challenge::Basic));
        assert_eq!(choose(&["Bearer service=\"no realm\"", "Basic realm=x"]), Some(Challenge::Basic));
        assert_eq!(choose(&["Negotiate"]), None);
        assert_eq!(choose(&[]), None);
    }

    proptest! {
        #[test]
        fn no_header_panics(value in "[ -~]{0,60}") {
            let _ = choose(&[&value, &format!("Bearer {value}")]);
        }
    }
}
