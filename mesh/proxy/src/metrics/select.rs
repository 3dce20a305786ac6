//! Which statistics are told: what a request for them asks for (`filter`, `usedonly`, `type`) and what the bootstrap says of
//! all of them (`stats_config`, `deferred_stat_options`).

use serin_xds::pb::envoy::config::metrics::v3 as pb;
use serin_xds::pb::envoy::r#type::matcher::v3::ListStringMatcher;

use super::buckets::Settings;
use super::collect::{Family, Labels, Value};
use super::names;
use super::tags::Tags;
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};

/// Kinds of statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Counters only.
    Counters,
    /// Gauges only.
    Gauges,
    /// Histograms only.
    Histograms,
}

impl Kind {
    /// Which it is.
    pub fn of(value: &Value) -> Self {
        match value {
            Value::Counter(_) => Self::Counters,
            Value::Gauge(_) | Value::Whole(_) => Self::Gauges,
            Value::Histogram(_) => Self::Histograms,
        }
    }
}

/// What is told of clusters that nobody has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Deferred {
    /// Everything.
    #[default]
    No,
    /// What the configuration says, but no traffic (`enable_deferred_creation_stats`).
    Yes,
    /// Nothing: a sidecar knows thousands of clusters and uses a few, and Istio's agent does not tell of clusters either.
    Hidden,
}

/// A `StatsMatcher`.
#[derive(Clone, Debug, Default)]
pub enum Matcher {
    /// All are told.
    #[default]
    All,
    /// None is.
    Nothing,
    /// Those that match.
    Only(Box<[StringMatch]>),
    /// Those that do not match.
    Without(Box<[StringMatch]>),
}

impl Matcher {
    /// Compiles a `StatsConfig`'s matcher.
    pub fn compile(from: Option<&pb::StatsMatcher>) -> Result<Self, Refusal> {
        use pb::stats_matcher::StatsMatcher as Rule;
        let patterns = |list: &ListStringMatcher| -> Result<Box<[StringMatch]>, Refusal> {
            let each = list.patterns.iter().enumerate();
            each.map(|(index, pattern)| StringMatch::compile(pattern).within(format!("patterns[{index}]")))
                .collect()
        };
        match from.and_then(|from| from.stats_matcher.as_ref()) {
            None | Some(Rule::RejectAll(false)) => Ok(Self::All),
            Some(Rule::RejectAll(true)) => Ok(Self::Nothing),
            Some(Rule::InclusionList(list)) => Ok(Self::Only(patterns(list).within("inclusion_list")?)),
            Some(Rule::ExclusionList(list)) => Ok(Self::Without(patterns(list).within("exclusion_list")?)),
        }
    }

    /// Whether the statistic of that name in Envoy's form is told.
    pub fn tells(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Nothing => false,
            Self::Only(patterns) => patterns.iter().any(|pattern| pattern.matches(name)),
            Self::Without(patterns) => !patterns.iter().any(|pattern| pattern.matches(name)),
        }
    }
}

/// What the bootstrap says of statistics.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Which are told.
    pub matcher: Matcher,
    /// What of clusters that nobody has used.
    pub deferred: Deferred,
    /// Labels of Prometheus.
    pub tags: Tags,
    /// By which bounds histograms are shown.
    pub buckets: Settings,
}

/// Which statistics are told.
#[derive(Clone, Debug, Default)]
pub struct Select {
    /// Names that match somewhere.
    pub filter: Option<regex::Regex>,
    /// The filter is about the names of families (Prometheus), not of series.
    pub by_family: bool,
    /// None that are zero.
    pub used_only: bool,
    /// Of one kind.
    pub kind: Option<Kind>,
    /// What the bootstrap lets be told.
    pub matcher: Matcher,
    /// What of clusters that nobody has used.
    pub deferred: Deferred,
}

impl Select {
    /// Whether a value of that kind is wanted.
    pub fn wants_value(&self, kind: Kind, used: bool) -> bool {
        (!self.used_only || used) && self.kind.is_none_or(|wanted| wanted == kind)
    }

    /// Whether it takes the name of a series to tell whether it is wanted.
    pub fn looks_at_names(&self) -> bool {
        !matches!(self.matcher, Matcher::All) || (self.filter.is_some() && !self.by_family)
    }

    /// Whether any series of a family can be wanted, by the family's name.
    pub fn may_have(&self, family: &str) -> bool {
        let filter = self.filter.as_ref().filter(|_| self.by_family);
        !matches!(self.matcher, Matcher::Nothing) && filter.is_none_or(|filter| filter.is_match(family))
    }

    /// Whether the series of that name in Envoy's form is wanted, of a family that [may have](Self::may_have) wanted ones.
    /// Istio's metrics and this proxy's own are always told.
    pub fn wants_name(&self, family: &str, name: &str) -> bool {
        let filter = self.filter.as_ref().filter(|_| !self.by_family);
        filter.is_none_or(|filter| filter.is_match(name))
            && (!family.starts_with("envoy_") || self.matcher.tells(name))
    }

    /// The wanted ones among the series of a family.
    pub fn pick(
        &self,
        family: &'static str,
        metrics: impl Iterator<Item = (Labels, Value)>,
    ) -> Vec<(Labels, Value)> {
        let filter = self.filter.as_ref().filter(|_| self.by_family);
        if filter.is_some_and(|filter| !filter.is_match(family)) {
            return Vec::new();
        }
        let wanted = |labels: &Labels, value: &Value| {
            self.wants_value(Kind::of(value), value.is_used())
                && (!self.looks_at_names() || self.wants_name(family, &names::name(family, labels)))
        };
        metrics.filter(|(labels, value)| wanted(labels, value)).collect()
    }

    /// Leaves the wanted series of families.
    pub fn narrow(&self, families: &mut Vec<Family>) {
        for family in families.iter_mut() {
            let metrics = std::mem::take(&mut family.metrics);
            family.metrics = self.pick(family.name, metrics.into_iter());
        }
        families.retain(|family| !family.metrics.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;

    use super::*;

    fn list(prefixes: &[&str]) -> ListStringMatcher {
        let pattern = |prefix: &&str| matcher::StringMatcher {
            match_pattern: Some(matcher::string_matcher::MatchPattern::Prefix(
                (*prefix).to_owned(),
            )),
            ..Default::default()
        };
        ListStringMatcher {
            patterns: prefixes.iter().map(pattern).collect(),
        }
    }

    #[test]
    fn a_matcher_tells_what_its_list_includes_or_does_not_exclude() {
        use pb::stats_matcher::StatsMatcher as Rule;
        for (rule, told) in [
            (None, [true, true]),
            (Some(Rule::RejectAll(true)), [false, false]),
            (Some(Rule::RejectAll(false)), [true, true]),
            (
                Some(Rule::InclusionList(list(&["cluster.a", "x"]))),
                [true, false],
            ),
            (Some(Rule::ExclusionList(list(&["cluster.a"]))), [false, true]),
        ] {
            let matcher = Matcher::compile(Some(&pb::StatsMatcher { stats_matcher: rule })).unwrap();
            assert_eq!(
                ["cluster.a.b", "server.live"].map(|name| matcher.tells(name)),
                told,
                "{matcher:?}"
            );
        }
    }

    #[test]
    fn istios_metrics_are_told_whatever_the_matcher_says_and_the_rest_by_its_own_name() {
        let select = Select {
            matcher: Matcher::compile(Some(&pb::StatsMatcher {
                stats_matcher: Some(pb::stats_matcher::StatsMatcher::InclusionList(list(&["server."]))),
            }))
            .unwrap(),
            ..Select::default()
        };
        let family = |name| Family {
            name,
            help: "",
            metrics: vec![(vec![], Value::Counter(1.0))],
        };
        let mut families = vec![
            family("istio_requests_total"),
            family("envoy_server_live"),
            family("envoy_listener_manager_lds_version"),
        ];
        select.narrow(&mut families);
        let left: Vec<_> = families.iter().map(|family| family.name).collect();
        assert_eq!(left, ["istio_requests_total", "envoy_server_live"]);
    }
}
