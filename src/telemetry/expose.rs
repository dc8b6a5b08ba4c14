//! The registry that every module registers at, and its text for a scrape.
//!
//! Invariant: what leaves here is the classic Prometheus text format, which Prometheus of any age and `promtool check
//! metrics` read; prometheus-client writes OpenMetrics, which names counters, infos and the end differently.

use std::fmt;

use prometheus_client::encoding::text::encode as encode_openmetrics;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::process::Process;
use super::traces;

/// Content type of what [`encode`] writes.
pub const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A registry with the process's figures and `windlass_build_info`.
#[must_use]
pub fn registry() -> Registry {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Process));
    let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
    own(&mut registry).register("build", "Version of this daemon", build);
    traces::register(own(&mut registry));
    registry
}

/// The part of `registry` for names that begin with `windlass_`: what `Metrics::register` of each module gets.
pub fn own(registry: &mut Registry) -> &mut Registry {
    registry.sub_registry_with_prefix("windlass")
}

/// Every metric, in the form of [`TEXT_FORMAT`].
///
/// # Errors
/// When a metric fails to write itself.
pub fn encode(registry: &Registry) -> Result<String, fmt::Error> {
    let mut openmetrics = String::new();
    encode_openmetrics(&mut openmetrics, registry)?;
    Ok(classic(&openmetrics))
}

/// The samples of one moment, to be added up over their labels.
///
/// Reading them back from the text is what keeps `windlass status` and Prometheus from ever disagreeing.
pub struct Figures(String);

impl Figures {
    /// Takes the samples; none if a metric fails to write itself.
    #[must_use]
    pub fn of(registry: &Registry) -> Self {
        Self(encode(registry).unwrap_or_default())
    }

    /// Sum of the whole-numbered samples of `name` over all labels; 0 when there is none.
    #[must_use]
    pub fn sum(&self, name: &str) -> u64 {
        self.samples(name).map(|(_, value)| value).sum()
    }

    /// As [`Self::sum`], of the samples that carry `label="value"`.
    #[must_use]
    pub fn sum_where(&self, name: &str, label: &str, value: &str) -> u64 {
        let wanted = format!("{label}=\"{value}\"");
        self.samples(name).filter(|(labels, _)| labels.split(',').any(|l| l == wanted)).map(|(_, v)| v).sum()
    }

    fn samples<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, u64)> {
        self.0.lines().filter_map(move |line| {
            let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
            let labels = match labels {
                "" => labels,
                _ => labels.strip_prefix('{')?.strip_suffix('}')?,
            };
            Some((labels, value.parse().ok()?))
        })
    }
}

/// OpenMetrics to the classic format: family names of counters and infos get the suffix of their samples, and the
/// lines that only OpenMetrics knows go.
fn classic(openmetrics: &str) -> String {
    let mut out = String::with_capacity(openmetrics.len());
    let mut help: Option<&str> = None;
    for line in openmetrics.lines() {
        if let Some(text) = line.strip_prefix("# HELP ") {
            help = Some(text);
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|text| text.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                other => ("", other),
            };
            if let Some((_, text)) = help.take().and_then(|text| text.split_once(' ')) {
                out.push_str(&format!("# HELP {name}{suffix} {text}\n"));
            }
            out.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else if !line.starts_with("# ") {
            // An exemplar stands behind " # "; label values never hold it, for they are ours and bounded.
            out.push_str(line.split_once(" # ").map_or(line, |(sample, _)| sample));
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn figures_add_up_over_labels_and_do_not_mistake_a_longer_name() {
        let text = "a 1\na{z=\"x\"} 2\na{y=\"q\",z=\"x\"} 4\nab 8\n# TYPE a counter\n";
        let figures = Figures(text.into());
        assert_eq!((figures.sum("a"), figures.sum("ab"), figures.sum("c")), (7, 8, 0));
        assert_eq!(figures.sum_where("a", "z", "x"), 6);
    }

    #[test]
    fn counters_and_infos_carry_their_suffix_in_every_line() {
        let mut registry = registry();
        let sent: Counter = Counter::default();
        own(&mut registry).register("peer_sent_bytes", "Bytes sent", sent.clone());
        sent.inc_by(7);
        let text = encode(&registry).expect("writes to a string");
        assert!(text.contains("# HELP windlass_peer_sent_bytes_total Bytes sent.\n"), "{text}");
        assert!(
            text.contains(
                "# TYPE windlass_peer_sent_bytes_total counter\nwindlass_peer_sent_bytes_total 7\n"
            )
        );
        assert!(text.contains("# TYPE windlass_build_info gauge\nwindlass_build_info{version=\""), "{text}");
        assert!(text.contains("# TYPE process_resident_memory_bytes gauge\n"), "{text}");
        assert!(!text.contains("# EOF") && !text.contains("# UNIT"), "{text}");
    }
}
