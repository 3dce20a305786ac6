//! Labels of Prometheus that the bootstrap asks for (`stats_config.stats_tags`, `use_all_default_tags`), extracted from the
//! names of statistics as Envoy extracts them: what a regular expression's first group matches is taken out of the name, and
//! its second group, or else the first, is the label's value. What is left of the name is the family's.
//!
//! Names in `/stats` stay whole. Istio's metrics and this proxy's own have labels and no names that hold values, and are left
//! as they are but for fixed labels.

use std::collections::BTreeMap;

use regex::{Regex, RegexBuilder};
use serin_xds::pb::envoy::config::metrics::v3 as pb;

use super::collect::{Family, Labels, Value};
use super::names;
use crate::error::{Refusal, Within};

/// Tags that a file may ask for.
const MAX_TAGS: usize = 256;
/// Tags that Envoy extracts by default and that statistics of this proxy have, by their names in labels.
const DEFAULTS: [&str; 17] = [
    "envoy_cluster_name",
    "envoy_grpc_bridge_method",
    "envoy_grpc_bridge_service",
    "envoy_http_conn_manager_prefix",
    "envoy_listener_address",
    "envoy_local_http_ratelimit_prefix",
    "envoy_ratelimit_prefix",
    "envoy_rbac_prefix",
    "envoy_rds_route_config",
    "envoy_response_code",
    "envoy_response_code_class",
    "envoy_ssl_cipher",
    "envoy_tcp_prefix",
    "envoy_virtual_cluster",
    "envoy_virtual_host",
    "envoy_worker_id",
    "envoy_xds_resource_name",
];

#[derive(Clone, Debug)]
struct Extractor {
    label: &'static str,
    pattern: Regex,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Tags {
    /// Default tags that stay in names; all of them where they are not wanted and none is asked for by name.
    kept_in_names: Vec<&'static str>,
    extractors: Vec<Extractor>,
    fixed: Labels,
}

/// A family whose name was put together.
#[derive(Clone, Debug)]
pub struct Renamed {
    /// Name.
    pub name: String,
    /// Help.
    pub help: &'static str,
    /// Its series.
    pub metrics: Vec<(Labels, Value)>,
}

/// Whatever Prometheus does not take in names is an underscore.
fn sanitized(name: &str) -> String {
    let plain = |char: char| char.is_ascii_alphanumeric() || char == '_';
    name.chars()
        .map(|char| if plain(char) { char } else { '_' })
        .collect()
}

impl Tags {
    /// Compiles what a `StatsConfig` says.
    pub fn compile(from: &pb::StatsConfig) -> Result<Self, Refusal> {
        use pb::tag_specifier::TagValue;
        if let Some(allow) = &from.allow_default_tag_overrides
            && allow.value
        {
            return Err(Refusal::new(
                "allow_default_tag_overrides",
                "not supported: use use_all_default_tags: false with tags of your own",
            ));
        }
        let all = from.use_all_default_tags.as_ref().is_none_or(|all| all.value);
        let mut out = Self::default();
        if !all {
            out.kept_in_names = DEFAULTS.to_vec();
        }
        if from.stats_tags.len() > MAX_TAGS {
            return Err(Refusal::new("stats_tags", format!("are more than {MAX_TAGS}")));
        }
        for (index, tag) in from.stats_tags.iter().enumerate() {
            let path = format!("stats_tags[{index}]");
            let label = sanitized(&tag.tag_name);
            if label.is_empty() {
                return Err(Refusal::new(path + ".tag_name", "is missing"));
            }
            let default = DEFAULTS.iter().find(|own| **own == label).copied();
            match (&tag.tag_value, default) {
                (None, Some(default)) => out.kept_in_names.retain(|own| *own != default),
                (None, None) => {
                    return Err(Refusal::new(
                        path + ".regex",
                        format!(
                            "is missing: {} is no default tag of any statistic here",
                            tag.tag_name
                        ),
                    ));
                }
                (Some(_), Some(_)) if all => {
                    return Err(Refusal::new(
                        path + ".tag_name",
                        format!(
                            "{} is a default tag: use another name, or use_all_default_tags: false",
                            tag.tag_name
                        ),
                    ));
                }
                (Some(TagValue::FixedValue(value)), _) => {
                    out.fixed.push((out.label(label, &path)?, value.clone()));
                }
                (Some(TagValue::Regex(pattern)), _) => {
                    let extractor = Extractor {
                        label: out.label(label, &path)?,
                        pattern: compile(pattern).within(path + ".regex")?,
                    };
                    out.extractors.push(extractor);
                }
            }
        }
        Ok(out)
    }

    /// A label's name, which lives as long as the process: a file is read once.
    fn label(&self, label: String, path: &str) -> Result<&'static str, Refusal> {
        let fixed = self.fixed.iter().map(|(own, _)| *own);
        let own = self.extractors.iter().map(|own| own.label).chain(fixed);
        if own.into_iter().any(|own| own == label) {
            return Err(Refusal::new(
                format!("{path}.tag_name"),
                format!("{label} is there twice"),
            ));
        }
        Ok(Box::leak(label.into_boxed_str()))
    }

    /// Whether names change, so that families are not what they are counted as.
    pub fn rename(&self) -> bool {
        !self.kept_in_names.is_empty() || !self.extractors.is_empty()
    }

    /// Adds what every series has.
    pub fn add_fixed(&self, families: &mut [Family]) {
        if self.fixed.is_empty() {
            return;
        }
        for (labels, _) in families.iter_mut().flat_map(|family| &mut family.metrics) {
            labels.extend(self.fixed.iter().cloned());
        }
    }

    /// Families by what is left of their series' names. Series that become the same are told once, as the first of them.
    pub fn renamed(&self, families: Vec<Family>) -> Vec<Renamed> {
        let mut out: BTreeMap<(String, u8), Renamed> = BTreeMap::new();
        for family in families {
            for (labels, value) in family.metrics {
                let (name, mut labels) = if family.name.starts_with("envoy_") {
                    self.extract(family.name, labels)
                } else {
                    (family.name.to_owned(), labels)
                };
                labels.extend(self.fixed.iter().cloned());
                let kind = match &value {
                    Value::Counter(_) => 0,
                    Value::Gauge(_) | Value::Whole(_) => 1,
                    Value::Histogram(_) => 2,
                };
                let renamed = out.entry((name, kind)).or_insert_with_key(|(name, _)| Renamed {
                    name: name.clone(),
                    help: family.help,
                    metrics: Vec::new(),
                });
                renamed.metrics.push((labels, value));
            }
        }
        let mut out: Vec<Renamed> = out.into_values().collect();
        for family in &mut out {
            family.metrics.sort_by(|one, other| one.0.cmp(&other.0));
            family.metrics.dedup_by(|later, first| later.0 == first.0);
        }
        // A name has one type.
        out.dedup_by(|later, first| later.name == first.name);
        out
    }

    fn extract(&self, family: &str, labels: Labels) -> (String, Labels) {
        let (name, places) = names::with_places(family, &labels);
        let mut gone = vec![false; name.len()];
        let mut out = Labels::new();
        for (label, value) in labels {
            if self.kept_in_names.contains(&label) {
                continue;
            }
            let places = places.iter().filter(|(own, _)| *own == label);
            places.for_each(|(_, place)| gone[place.clone()].fill(true));
            out.push((label, value));
        }
        for extractor in &self.extractors {
            let Some(found) = extractor.pattern.captures(&name) else {
                continue;
            };
            let Some(removed) = found.get(1) else { continue };
            let value = found.get(2).unwrap_or(removed);
            gone[removed.range()].fill(true);
            out.push((extractor.label, value.as_str().to_owned()));
        }
        let left: Vec<u8> = name
            .bytes()
            .zip(gone)
            .filter(|(_, gone)| !gone)
            .map(|(byte, _)| byte)
            .collect();
        let left = String::from_utf8_lossy(&left);
        (format!("envoy_{}", sanitized(&left)), out)
    }
}

fn compile(pattern: &str) -> Result<Regex, Refusal> {
    let pattern = RegexBuilder::new(pattern)
        .size_limit(1 << 20)
        .build()
        .map_err(|error| Refusal::new("", format!("cannot be used: {error}")))?;
    if pattern.captures_len() < 2 {
        return Err(Refusal::new("", "has no group that says what is taken out"));
    }
    Ok(pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(name: &str, value: Option<pb::tag_specifier::TagValue>) -> pb::TagSpecifier {
        pb::TagSpecifier {
            tag_name: name.to_owned(),
            tag_value: value,
        }
    }

    fn regex(text: &str) -> Option<pb::tag_specifier::TagValue> {
        Some(pb::tag_specifier::TagValue::Regex(text.to_owned()))
    }

    fn config(all: bool, tags: Vec<pb::TagSpecifier>) -> pb::StatsConfig {
        pb::StatsConfig {
            stats_tags: tags,
            use_all_default_tags: Some(serin_xds::pb::google::protobuf::BoolValue { value: all }),
            ..Default::default()
        }
    }

    fn series(family: &'static str, labels: &[(&'static str, &str)]) -> Family {
        Family {
            name: family,
            help: "",
            metrics: vec![(
                labels
                    .iter()
                    .map(|(key, value)| (*key, (*value).to_owned()))
                    .collect(),
                Value::Counter(1.0),
            )],
        }
    }

    fn told(tags: &Tags, families: Vec<Family>) -> Vec<String> {
        let line = |family: Renamed| {
            let name = family.name;
            let lines = family.metrics.into_iter().map(move |(labels, _)| {
                let labels: Vec<_> = labels
                    .iter()
                    .map(|(key, value)| format!("{key}={value}"))
                    .collect();
                format!("{name} {}", labels.join(" "))
            });
            lines.collect::<Vec<_>>()
        };
        tags.renamed(families).into_iter().flat_map(line).collect()
    }

    fn all() -> Vec<Family> {
        vec![
            series(
                "envoy_cluster_upstream_rq",
                &[
                    ("envoy_response_code", "503"),
                    ("envoy_cluster_name", "outbound|80||a.b"),
                ],
            ),
            series(
                "envoy_http_downstream_rq_xx",
                &[
                    ("envoy_response_code_class", "2"),
                    ("envoy_http_conn_manager_prefix", "in"),
                ],
            ),
            series("istio_requests_total", &[("reporter", "source")]),
        ]
    }

    #[test]
    fn what_a_first_group_matches_leaves_the_name_and_the_second_is_the_value() {
        let fixed = pb::tag_specifier::TagValue::FixedValue("yes".into());
        let tags = Tags::compile(&config(
            true,
            vec![
                tag("direction", regex("^cluster\\.((outbound|inbound)\\|)")),
                tag("mine", Some(fixed)),
            ],
        ))
        .unwrap();
        assert_eq!(
            told(&tags, all()),
            [
                "envoy_cluster_upstream_rq envoy_response_code=503 envoy_cluster_name=outbound|80||a.b direction=outbound mine=yes",
                "envoy_http_downstream_rq_xx envoy_response_code_class=2 envoy_http_conn_manager_prefix=in mine=yes",
                "istio_requests_total reporter=source mine=yes",
            ]
        );
    }

    #[test]
    fn default_tags_that_are_not_wanted_stay_in_names_and_others_take_their_place() {
        let tags = Tags::compile(&config(
            false,
            vec![
                tag("cluster_name", regex("^cluster\\.((.+?)\\.)upstream")),
                tag("envoy.response_code_class", None),
            ],
        ))
        .unwrap();
        assert_eq!(
            told(&tags, all()),
            [
                "envoy_cluster_upstream_rq_503 cluster_name=outbound|80||a.b",
                "envoy_http_in_downstream_rq_xx envoy_response_code_class=2",
                "istio_requests_total reporter=source",
            ]
        );
    }

    #[test]
    fn tags_that_cannot_be_honoured_are_refused_with_their_path() {
        for (tags, path) in [
            (vec![tag("a", regex("("))], "stats_tags[0].regex"),
            (vec![tag("a", regex("abc"))], "stats_tags[0].regex"),
            (vec![tag("a", regex("(?=b)(c)"))], "stats_tags[0].regex"),
            (vec![tag("", regex("(a)"))], "stats_tags[0].tag_name"),
            (vec![tag("mine", None)], "stats_tags[0].regex"),
            (
                vec![tag("envoy.cluster_name", regex("(a)"))],
                "stats_tags[0].tag_name",
            ),
            (
                vec![tag("a", regex("(a)")), tag("a", regex("(b)"))],
                "stats_tags[1].tag_name",
            ),
        ] {
            let refusal = Tags::compile(&config(true, tags)).unwrap_err();
            assert!(refusal.to_string().contains(path), "{refusal}");
        }
    }
}
