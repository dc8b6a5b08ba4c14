//! What a check came to, and how it is shown.

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    Pass,
    /// It could not be looked at, and the text says why.
    Skip,
    /// It works, and could work better.
    Warn,
    /// Pulls or fetches suffer from it.
    Fail,
}

impl Verdict {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Skip => "SKIP",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// Which check, by a name that does not change between versions.
    pub(super) check: &'static str,
    pub(super) verdict: Verdict,
    /// What was found.
    pub(super) what: String,
    /// Why it matters; empty when it passed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) why: String,
    /// The exact change to make; empty when there is none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) cure: String,
}

impl Finding {
    fn new(check: &'static str, verdict: Verdict, what: impl Into<String>) -> Self {
        Self { check, verdict, what: what.into(), why: String::new(), cure: String::new() }
    }

    pub(super) fn pass(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Verdict::Pass, what)
    }

    pub(super) fn skip(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Verdict::Skip, what)
    }

    pub(super) fn warn(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self { why: why.into(), cure: cure.into(), ..Self::new(check, Verdict::Warn, what) }
    }

    pub(super) fn fail(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self { why: why.into(), cure: cure.into(), ..Self::new(check, Verdict::Fail, what) }
    }
}

/// A table of all, then what is wrong with its reason and its cure, then the sum.
pub(super) fn report(findings: &[Finding]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    for finding in findings {
        table.add_row([finding.verdict.as_str(), finding.check, &finding.what]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    for finding in findings.iter().filter(|finding| !finding.why.is_empty()) {
        let cure = finding.cure.replace('\n', "\n    ");
        text += &format!(
            "\n{} {}: {}\n  why: {}\n  cure: {cure}\n",
            finding.verdict.as_str(),
            finding.check,
            finding.what,
            finding.why
        );
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    text + &format!(
        "\n{} passed, {} to look at, {} failed, {} skipped\n",
        count(Verdict::Pass),
        count(Verdict::Warn),
        count(Verdict::Fail),
        count(Verdict::Skip)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_comes_with_its_reason_and_its_cure() {
        let text =
            report(&[Finding::pass("one", "fine"), Finding::fail("two", "broken", "it hurts", "mend\nit")]);
        assert!(text.starts_with("PASS  one  fine\nFAIL  two  broken\n"), "{text}");
        assert!(text.contains("\n  why: it hurts\n  cure: mend\n    it\n"), "{text}");
        assert!(text.ends_with("\n1 passed, 0 to look at, 1 failed, 0 skipped\n"), "{text}");
    }
}
