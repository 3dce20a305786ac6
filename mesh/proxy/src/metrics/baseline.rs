//! What counters begin with: what the process before this one counted (hot restart), and what counters were set back by
//! (`/reset_counters`). Applied where counters are shown; the cells themselves only ever grow, since workers add to them
//! without asking.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;
use serde_json::{Value as Json, json};

use super::collect::{Family, Labels, Value};
use super::series::HistogramValue;

/// Series that are taken over at most.
const MAX_TAKEN: usize = 100_000;
/// Names of families and labels that other processes may bring up.
const MAX_NAMES: usize = 4096;

type Key = (&'static str, Labels);

/// See the module.
#[derive(Debug, Default)]
pub struct Baseline {
    taken: HashMap<Key, Value, foldhash::fast::RandomState>,
    reset: HashMap<Key, Value, foldhash::fast::RandomState>,
    /// Counters were set back: what others counted counts no more.
    own_only: bool,
    /// How many processes there were before this one.
    epoch: u64,
    /// Connections that the one before it has.
    connections: u64,
}

/// What a process tells of itself beside counters: how many there are up to it, and its connections.
const ITSELF: [&str; 2] = [
    "envoy_server_hot_restart_generation",
    "envoy_server_total_connections",
];

/// Series of the process before this one that have been shown.
#[derive(Debug, Default)]
pub struct Seen(HashSet<Key, foldhash::fast::RandomState>);

fn is_cumulative(value: &Value) -> bool {
    !matches!(value, Value::Gauge(_) | Value::Whole(_))
}

fn add(to: &mut Value, other: &Value, sign: f64) {
    match (to, other) {
        (Value::Counter(to), Value::Counter(other)) => *to = (*to + sign * other).max(0.0),
        (Value::Histogram(to), Value::Histogram(other)) => to.add(other, sign),
        _ => {}
    }
}

impl Baseline {
    /// What is shown of what was counted.
    pub fn apply(&self, families: &mut Vec<Family>) {
        let mut seen = Seen::default();
        self.adjust(families, &mut seen);
        self.add_rest(families, &seen, None);
    }

    /// What is shown of a part of what was counted; `seen` is kept for the parts that follow.
    pub fn adjust(&self, families: &mut [Family], seen: &mut Seen) {
        for family in families {
            if self.taken.is_empty() && self.reset.is_empty() {
                return;
            }
            for (labels, value) in &mut family.metrics {
                if !is_cumulative(value) {
                    continue;
                }
                let key = (family.name, labels.clone());
                if let Some(taken) = self.taken.get(&key) {
                    add(value, taken, 1.0);
                }
                // Few are set back, and it is done by hand.
                if let Some(reset) = self.reset.get(&key) {
                    add(value, reset, -1.0);
                }
                if self.taken.contains_key(&key) {
                    seen.0.insert(key);
                }
            }
        }
    }

    /// Adds what only the process before this one has counted: of one family, or of all.
    pub fn add_rest(&self, families: &mut Vec<Family>, seen: &Seen, only: Option<&[&str]>) {
        let mut rest: Vec<_> = self
            .taken
            .iter()
            .filter(|(key, _)| only.is_none_or(|only| only.contains(&key.0)) && !seen.0.contains(*key))
            .collect();
        rest.sort_by_key(|(key, _)| *key);
        for ((name, labels), value) in rest {
            let metric = (labels.clone(), value.clone());
            match families.iter_mut().find(|family| family.name == *name) {
                Some(family) => family.metrics.push(metric),
                None => families.push(Family {
                    name,
                    help: "Counted before a hot restart.",
                    metrics: vec![metric],
                }),
            }
        }
    }

    /// Takes note that a family has been shown whole.
    pub fn see(&self, name: &str, seen: &mut Seen) {
        let of_family = self.taken.keys().filter(|key| key.0 == name);
        seen.0.extend(of_family.cloned());
    }

    /// Counters begin with zero from now on; `families` is what they are, without a baseline.
    pub fn reset(&mut self, families: Vec<Family>) {
        self.taken.clear();
        self.own_only = true;
        self.reset = families
            .into_iter()
            .flat_map(|family| {
                let name = family.name;
                family
                    .metrics
                    .into_iter()
                    .filter(|(_, value)| is_cumulative(value))
                    .map(move |(labels, value)| ((name, labels), value))
            })
            .collect();
    }

    /// Takes over what another process has counted, in place of what was taken over before. What cannot be read is left
    /// out: a process of another version may count other things.
    pub fn take(&mut self, told: &Json) {
        let [epoch, connections] = ITSELF.map(|name| {
            let entries = told.as_array().into_iter().flatten();
            let mut own = entries.filter(|entry| entry.get(0).and_then(Json::as_str) == Some(name));
            let value = own.next().and_then(|entry| entry.get(2)?.as_f64());
            value.map(|value| value as u64)
        });
        self.epoch = epoch.unwrap_or(self.epoch);
        self.connections = connections.unwrap_or(0);
        if self.own_only {
            return;
        }
        self.taken = told
            .as_array()
            .into_iter()
            .flatten()
            .take(MAX_TAKEN)
            .filter_map(read)
            .filter(|((name, _), _)| !ITSELF.contains(name))
            .collect();
    }

    /// How many processes there were before this one, and how many connections the last of them has.
    pub fn before(&self) -> (u64, u64) {
        (self.epoch, self.connections)
    }
}

/// What a successor is told of counters.
pub fn tell(families: &[Family]) -> Json {
    let all = families.iter().flat_map(|family| {
        family
            .metrics
            .iter()
            .filter_map(|(labels, value)| match value {
                Value::Counter(value) if *value > 0.0 => Some((labels, json!(value))),
                Value::Gauge(value) if ITSELF.contains(&family.name) => Some((labels, json!(value))),
                Value::Histogram(histogram) if histogram.count() > 0 => Some((
                    labels,
                    json!({ "buckets": histogram.buckets, "sum": histogram.sum }),
                )),
                _ => None,
            })
            .map(|(labels, value)| json!([family.name, labels, value]))
    });
    all.collect()
}

fn read(entry: &Json) -> Option<(Key, Value)> {
    let [name, labels, value] = entry.as_array()?.as_slice() else {
        return None;
    };
    let labels = labels
        .as_array()?
        .iter()
        .map(|pair| {
            Some((
                name_of(pair.get(0)?.as_str()?)?,
                pair.get(1)?.as_str()?.to_owned(),
            ))
        })
        .collect::<Option<Labels>>()?;
    let value = match value {
        Json::Number(value) => Value::Counter(value.as_f64().filter(|value| value.is_finite())?),
        Json::Object(histogram) => {
            let mut out = HistogramValue {
                sum: histogram.get("sum")?.as_f64()?,
                ..HistogramValue::default()
            };
            let buckets = histogram.get("buckets")?.as_array()?;
            if buckets.len() != out.buckets.len() {
                return None;
            }
            for (to, count) in out.buckets.iter_mut().zip(buckets) {
                *to = count.as_u64()?;
            }
            Value::Histogram(Box::new(out))
        }
        _ => return None,
    };
    Some(((name_of(name.as_str()?)?, labels), value))
}

/// A name that lives as long as the process: families are named by constants elsewhere. There are some hundred of them,
/// each is kept once, and beyond a limit none is.
fn name_of(text: &str) -> Option<&'static str> {
    static NAMES: Mutex<Option<HashSet<&'static str>>> = Mutex::new(None);
    let mut names = NAMES.lock();
    let names = names.get_or_insert_default();
    if let Some(name) = names.get(text) {
        return Some(name);
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if names.len() >= MAX_NAMES || text.len() > 200 || !text.bytes().all(plain) {
        return None;
    }
    let name: &'static str = Box::leak(text.to_owned().into_boxed_str());
    names.insert(name);
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(value: f64, bucket: u64) -> Vec<Family> {
        let mut histogram = HistogramValue {
            sum: value,
            ..Default::default()
        };
        histogram.buckets[1] = bucket;
        let labels: Labels = vec![("envoy_cluster_name", "c".into())];
        vec![
            Family {
                name: "envoy_cluster_upstream_rq_total",
                help: "",
                metrics: vec![(labels.clone(), Value::Counter(value))],
            },
            Family {
                name: "envoy_cluster_upstream_rq_time",
                help: "",
                metrics: vec![(labels.clone(), Value::Histogram(Box::new(histogram)))],
            },
            Family {
                name: "envoy_cluster_upstream_rq_active",
                help: "",
                metrics: vec![(labels, Value::Gauge(value))],
            },
        ]
    }

    fn shown(baseline: &Baseline, mut families: Vec<Family>) -> Vec<Value> {
        baseline.apply(&mut families);
        families
            .into_iter()
            .flat_map(|family| family.metrics)
            .map(|(_, value)| value)
            .collect()
    }

    #[test]
    fn what_another_process_counted_is_added_and_what_only_it_counted_is_shown_as_well() {
        let mut baseline = Baseline::default();
        let mut told = counted(5.0, 2);
        told[0]
            .metrics
            .push((vec![("envoy_cluster_name", "gone".into())], Value::Counter(9.0)));
        let told = tell(&told);
        // As it travels.
        baseline.take(&serde_json::from_str(&told.to_string()).unwrap());
        let values = shown(&baseline, counted(1.0, 1));
        assert_eq!(values[..2], [Value::Counter(6.0), Value::Counter(9.0)]);
        let Value::Histogram(histogram) = &values[2] else {
            panic!("{values:?}");
        };
        assert_eq!((histogram.buckets[1], histogram.sum), (3, 6.0));
        assert_eq!(values[3], Value::Gauge(1.0), "what is open is open elsewhere");
        assert_eq!(shown(&baseline, Vec::new()).len(), 3);
    }

    #[test]
    fn a_process_knows_how_many_there_were_before_it_and_how_many_connections_the_last_one_has() {
        let mut baseline = Baseline::default();
        assert_eq!(baseline.before(), (0, 0));
        let itself = |generation: f64, connections: f64| {
            let gauge = |name, value| Family {
                name,
                help: "",
                metrics: vec![(Labels::new(), Value::Gauge(value))],
            };
            tell(&[gauge(ITSELF[0], generation), gauge(ITSELF[1], connections)])
        };
        baseline.take(&itself(3.0, 7.0));
        assert_eq!(baseline.before(), (3, 7));
        baseline.take(&itself(3.0, 0.0));
        assert_eq!(baseline.before(), (3, 0), "it has ended");
        assert!(shown(&baseline, Vec::new()).is_empty(), "they are no counters");
    }

    #[test]
    fn counters_that_were_reset_count_from_zero_and_gauges_are_what_they_are() {
        let mut baseline = Baseline::default();
        baseline.take(&tell(&counted(5.0, 2)));
        baseline.reset(counted(3.0, 1));
        let values = shown(&baseline, counted(3.0, 1));
        assert_eq!(values[0], Value::Counter(0.0));
        assert_eq!(values[2], Value::Gauge(3.0));
        let values = shown(&baseline, counted(7.0, 4));
        assert_eq!(values[0], Value::Counter(4.0));
        let Value::Histogram(histogram) = &values[1] else {
            panic!("{values:?}");
        };
        assert_eq!(histogram.buckets[1], 3);
        // A series that ended and came back counts anew.
        assert_eq!(shown(&baseline, counted(1.0, 0))[0], Value::Counter(0.0));
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        let mut baseline = Baseline::default();
        for text in [
            "1",
            "[1]",
            "[[1,2,3]]",
            r#"[["a",[["b",1]],1]]"#,
            r#"[["a",[],{"buckets":[1],"sum":1}]]"#,
            r#"[["a name",[],1]]"#,
        ] {
            baseline.take(&serde_json::from_str(text).unwrap());
            assert!(baseline.taken.is_empty(), "{text}");
        }
    }
}
