//! Buckets of one's own for histograms (`stats_config.histogram_bucket_settings`).
//!
//! The first entry whose matcher takes a histogram's name in Envoy's form says by which bounds it is shown, in Prometheus, as
//! text and as JSON, quantiles included. Names of Istio's metrics are matched as they are shown here and with the
//! `istiocustom.` that Istio's proxies put before them. What the control plane is streamed has the default bounds always,
//! since verdicts compare distributions of proxies that need not have been told the same.

use std::sync::Arc;

use serin_xds::pb::envoy::config::metrics::v3 as pb;

use super::collect::{Family, Value};
use super::histogram;
use super::names;
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};

/// Bounds of an entry, at most: what a histogram costs on every worker grows with them.
const MAX: usize = 100;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Settings(Vec<(StringMatch, Arc<[f64]>)>);

impl Settings {
    /// Compiles the entries.
    pub fn compile(from: &[pb::HistogramBucketSettings]) -> Result<Self, Refusal> {
        let each = from
            .iter()
            .enumerate()
            .map(|(index, entry)| compile(entry).within(format!("histogram_bucket_settings[{index}]")));
        each.collect::<Result<_, _>>().map(Self)
    }

    /// Whatever is counted from now on is counted by these bounds as well. To be called before anything is.
    pub fn begin(&self) {
        let bounds = self.0.iter().flat_map(|(_, bounds)| bounds.iter().copied());
        if !self.0.is_empty() {
            histogram::also_by(bounds);
        }
    }

    /// Shows histograms by the bounds that their names are to have.
    pub fn apply(&self, families: &mut [Family]) {
        for family in families {
            for (labels, value) in &mut family.metrics {
                let Value::Histogram(value) = value else { break };
                if self.0.is_empty() {
                    value.show_by(None);
                    continue;
                }
                let name = names::name(family.name, labels);
                value.show_by(self.of(&name));
            }
        }
    }

    fn of(&self, name: &str) -> Option<&Arc<[f64]>> {
        let custom = name.starts_with("istio_").then(|| format!("istiocustom.{name}"));
        let fits = |pattern: &StringMatch| {
            pattern.matches(name) || custom.as_ref().is_some_and(|custom| pattern.matches(custom))
        };
        self.0
            .iter()
            .find(|(pattern, _)| fits(pattern))
            .map(|(_, bounds)| bounds)
    }
}

fn compile(from: &pb::HistogramBucketSettings) -> Result<(StringMatch, Arc<[f64]>), Refusal> {
    let Some(pattern) = &from.r#match else {
        return Err(Refusal::new("match", "is missing"));
    };
    let pattern = StringMatch::compile(pattern).within("match")?;
    let mut bounds = from.buckets.clone();
    bounds.sort_by(f64::total_cmp);
    bounds.dedup();
    // Envoy's own conditions.
    if bounds.is_empty() || bounds.len() < from.buckets.len() {
        return Err(Refusal::new(
            "buckets",
            "must be one or more bounds, each of them once",
        ));
    }
    if let Some(wrong) = bounds.iter().find(|bound| !bound.is_finite() || **bound <= 0.0) {
        return Err(Refusal::new(
            "buckets",
            format!("{wrong} is no bound: it must be above 0"),
        ));
    }
    if bounds.len() > MAX {
        return Err(Refusal::new(
            "buckets",
            format!("{} are more than the {MAX} that are supported", bounds.len()),
        ));
    }
    Ok((pattern, bounds.into()))
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
    use serin_xds::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;

    use super::*;

    fn setting(pattern: MatchPattern, buckets: &[f64]) -> pb::HistogramBucketSettings {
        pb::HistogramBucketSettings {
            r#match: Some(matcher::StringMatcher {
                match_pattern: Some(pattern),
                ..Default::default()
            }),
            buckets: buckets.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn the_first_entry_that_fits_a_name_says_its_bounds() {
        let settings = Settings::compile(&[
            setting(
                MatchPattern::Exact("cluster.a.upstream_rq_time".into()),
                &[3.0, 1.0, 2.0],
            ),
            setting(MatchPattern::Prefix("cluster.".into()), &[4.0]),
            setting(MatchPattern::Suffix("length_ms".into()), &[5.0]),
            setting(MatchPattern::Contains("_bytes".into()), &[6.0]),
            setting(MatchPattern::Prefix("istiocustom".into()), &[7.0]),
            setting(
                MatchPattern::SafeRegex(matcher::RegexMatcher {
                    regex: r"^http\.[a-c]\..*".into(),
                    ..Default::default()
                }),
                &[8.0],
            ),
        ])
        .unwrap();
        for (name, expected) in [
            ("cluster.a.upstream_rq_time", &[1.0, 2.0, 3.0][..]),
            ("cluster.b.upstream_rq_time", &[4.0]),
            ("cluster.b.upstream_cx_length_ms", &[4.0]),
            ("http.z.downstream_cx_length_ms", &[5.0]),
            ("istio_request_bytes.reporter.source", &[6.0]),
            ("istio_request_duration_milliseconds", &[7.0]),
            ("http.b.downstream_rq_time", &[8.0]),
        ] {
            assert_eq!(
                settings.of(name).map(|bounds| &**bounds),
                Some(expected),
                "{name}"
            );
        }
        assert!(settings.of("http.d.downstream_rq_time").is_none());
    }

    #[test]
    fn bounds_that_cannot_be_honoured_are_refused_with_their_path() {
        let any = || MatchPattern::Prefix("cluster".into());
        let none = pb::HistogramBucketSettings {
            buckets: vec![1.0],
            ..Default::default()
        };
        let many: Vec<f64> = (1..=101).map(f64::from).collect();
        for (entry, path) in [
            (none, "histogram_bucket_settings[0].match"),
            (setting(any(), &[]), "histogram_bucket_settings[0].buckets"),
            (
                setting(any(), &[1.0, 1.0]),
                "histogram_bucket_settings[0].buckets",
            ),
            (setting(any(), &[0.0]), "histogram_bucket_settings[0].buckets"),
            (
                setting(any(), &[f64::NAN]),
                "histogram_bucket_settings[0].buckets",
            ),
            (setting(any(), &many), "histogram_bucket_settings[0].buckets"),
        ] {
            let refusal = Settings::compile(&[entry]).unwrap_err();
            assert_eq!(refusal.path, path, "{refusal}");
        }
    }
}
