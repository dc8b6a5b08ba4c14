//! Conditional requests (RFC 9110 section 13), decided in one place.

use std::time::{Duration, SystemTime};

use s3s::dto::{ETagCondition, Timestamp};

use crate::origin::s3::ObjectHead;

/// The conditions of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Conditions {
    pub(super) if_match: Option<ETagCondition>,
    pub(super) if_none_match: Option<ETagCondition>,
    pub(super) if_modified_since: Option<Timestamp>,
    pub(super) if_unmodified_since: Option<Timestamp>,
}

/// What the conditions make of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Send,
    /// 304
    NotModified,
    /// 412
    Failed,
}

impl Conditions {
    /// In the order of RFC 9110 section 13.2.2: an ETag condition overrides the date condition of its kind.
    pub(super) fn judge(&self, head: &ObjectHead) -> Verdict {
        let holds = match (&self.if_match, &self.if_unmodified_since) {
            (Some(condition), _) => matches(condition, head, Comparison::Strong),
            (None, Some(date)) => !modified_since(head, date),
            (None, None) => true,
        };
        if !holds {
            return Verdict::Failed;
        }
        let unchanged = match (&self.if_none_match, &self.if_modified_since) {
            (Some(condition), _) => matches(condition, head, Comparison::Weak),
            (None, Some(date)) => !modified_since(head, date),
            (None, None) => false,
        };
        if unchanged { Verdict::NotModified } else { Verdict::Send }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Strong,
    Weak,
}

fn matches(condition: &ETagCondition, head: &ObjectHead, comparison: Comparison) -> bool {
    let ETagCondition::ETag(wanted) = condition else { return true };
    let ours = head.version.etag.0.as_str();
    let (ours, weak) = ours.strip_prefix("W/").map_or((ours, false), |ours| (ours, true));
    let strong_enough = comparison == Comparison::Weak || !(weak || wanted.as_weak().is_some());
    strong_enough && wanted.value() == ours.trim_matches('"')
}

/// Dates on the wire have whole seconds. An object without a date counts as modified, so that it is sent.
fn modified_since(head: &ObjectHead, date: &Timestamp) -> bool {
    head.last_modified.is_none_or(|at| whole_seconds(at) > *date)
}

fn whole_seconds(at: SystemTime) -> Timestamp {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    (SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::{ETag, ObjectVersion};
    use crate::origin::s3::Checksums;

    const WRITTEN: u64 = 1_000_000;

    fn head(etag: &str) -> ObjectHead {
        ObjectHead {
            version: ObjectVersion {
                bucket: "models".into(),
                key: "a".into(),
                etag: ETag(etag.into()),
                size: 1,
            },
            version_id: None,
            last_modified: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(WRITTEN * 1000 + 500)),
            content_type: None,
            content_encoding: None,
            content_disposition: None,
            content_language: None,
            cache_control: None,
            metadata: std::collections::BTreeMap::new(),
            checksums: Checksums::default(),
        }
    }

    fn tag(text: &str) -> Option<ETagCondition> {
        Some(ETagCondition::parse_http_header(text.as_bytes()).unwrap())
    }

    fn date(seconds: u64) -> Option<Timestamp> {
        Some((SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).into())
    }

    #[test]
    fn tags() {
        let ours = head("\"x\"");
        let if_match = |text| Conditions { if_match: tag(text), ..Default::default() }.judge(&ours);
        assert_eq!(if_match("\"x\""), Verdict::Send);
        assert_eq!(if_match("*"), Verdict::Send);
        assert_eq!(if_match("\"y\""), Verdict::Failed);
        assert_eq!(if_match("W/\"x\""), Verdict::Failed);
        let none = |text| Conditions { if_none_match: tag(text), ..Default::default() }.judge(&ours);
        assert_eq!(none("\"x\""), Verdict::NotModified);
        assert_eq!(none("W/\"x\""), Verdict::NotModified);
        assert_eq!(none("\"y\""), Verdict::Send);
    }

    #[test]
    fn dates_have_whole_seconds() {
        let ours = head("\"x\"");
        let since = |s| Conditions { if_modified_since: date(s), ..Default::default() }.judge(&ours);
        assert_eq!(since(WRITTEN), Verdict::NotModified);
        assert_eq!(since(WRITTEN - 1), Verdict::Send);
        let before = |s| Conditions { if_unmodified_since: date(s), ..Default::default() }.judge(&ours);
        assert_eq!(before(WRITTEN), Verdict::Send);
        assert_eq!(before(WRITTEN - 1), Verdict::Failed);
    }

    #[test]
    fn a_tag_overrides_a_date_of_its_kind() {
        let ours = head("\"x\"");
        let both = Conditions {
            if_match: tag("\"x\""),
            if_unmodified_since: date(0),
            if_none_match: tag("\"y\""),
            if_modified_since: date(WRITTEN),
        };
        assert_eq!(both.judge(&ours), Verdict::Send);
        let neither =
            Conditions { if_match: tag("\"y\""), if_none_match: tag("\"x\""), ..Default::default() };
        assert_eq!(neither.judge(&ours), Verdict::Failed, "412 goes before 304");
    }
}
