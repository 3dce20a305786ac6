//! What Prometheus reads: its text format, OpenMetrics, and its protobuf format, as the client accepts them.

use std::fmt::Write;

use prost::Message;
use serin_xds::pb::io::prometheus::client as prometheus;

use super::collect::{Family, Labels, Value};
use super::tags::Renamed;

/// A format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Prometheus' text format, 0.0.4.
    Text,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Delimited `io.prometheus.client.MetricFamily` messages.
    Protobuf,
}

impl Encoding {
    /// The format that an `accept` field prefers: the first of those with the highest quality that we have.
    pub fn of(accept: &str) -> Self {
        let mut best = (0.0, Self::Text);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let encoding = match parts.next() {
                Some("application/openmetrics-text") => Self::OpenMetrics,
                Some("application/vnd.google.protobuf")
                    if range.contains("io.prometheus.client.MetricFamily") && range.contains("delimited") =>
                {
                    Self::Protobuf
                }
                Some("text/plain" | "text/*" | "*/*") => Self::Text,
                _ => continue,
            };
            let quality = parts
                .find_map(|part| part.strip_prefix("q=")?.parse().ok())
                .unwrap_or(1.0);
            if quality > best.0 {
                best = (quality, encoding);
            }
        }
        best.1
    }

    /// Its content type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Protobuf => {
                "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
            }
        }
    }

    /// What comes after all families.
    pub fn end(self) -> &'static [u8] {
        match self {
            Self::OpenMetrics => b"# EOF\n",
            Self::Text | Self::Protobuf => b"",
        }
    }

    /// Families in this format; [`Self::end`] comes after the last.
    pub fn write(self, families: &[Family]) -> Vec<u8> {
        self.write_named(families.iter().map(Named::from))
    }

    /// The same by names that were put together.
    pub fn write_renamed(self, families: &[Renamed]) -> Vec<u8> {
        self.write_named(families.iter().map(|family| Named {
            name: &family.name,
            help: family.help,
            metrics: &family.metrics,
        }))
    }

    fn write_named<'a>(self, families: impl Iterator<Item = Named<'a>>) -> Vec<u8> {
        match self {
            Self::Text => write_named(families).into_bytes(),
            Self::OpenMetrics => open_metrics(families).into_bytes(),
            Self::Protobuf => {
                let mut out = Vec::new();
                for family in families.filter(|family| !family.metrics.is_empty()) {
                    out.extend(message(&family).encode_length_delimited_to_vec());
                }
                out
            }
        }
    }
}

/// A family as it is written.
struct Named<'a> {
    name: &'a str,
    help: &'a str,
    metrics: &'a [(Labels, Value)],
}

impl<'a> From<&'a Family> for Named<'a> {
    fn from(family: &'a Family) -> Self {
        Self {
            name: family.name,
            help: family.help,
            metrics: &family.metrics,
        }
    }
}

/// A family as a message.
fn message(family: &Named<'_>) -> prometheus::MetricFamily {
    let kind = match family.metrics.first() {
        Some((_, Value::Gauge(_) | Value::Whole(_))) => prometheus::MetricType::Gauge,
        Some((_, Value::Histogram(_))) => prometheus::MetricType::Histogram,
        Some((_, Value::Counter(_))) | None => prometheus::MetricType::Counter,
    };
    prometheus::MetricFamily {
        name: Some(family.name.to_owned()),
        help: Some(family.help.to_owned()),
        r#type: Some(kind as i32),
        metric: family
            .metrics
            .iter()
            .map(|(labels, value)| super::push::encode(labels, value, None))
            .collect(),
        ..Default::default()
    }
}

/// Families as OpenMetrics: counters are called after their family with `_total`.
fn open_metrics<'a>(families: impl Iterator<Item = Named<'a>>) -> String {
    let mut out = String::with_capacity(4096);
    for family in families {
        let (kind, suffix) = match family.metrics.first() {
            Some((_, Value::Counter(_))) => ("counter", "_total"),
            Some((_, Value::Gauge(_) | Value::Whole(_))) => ("gauge", ""),
            Some((_, Value::Histogram(_))) => ("histogram", ""),
            None => continue,
        };
        let name = family.name.strip_suffix("_total").unwrap_or(family.name);
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
        let sample = format!("{name}{suffix}");
        for (labels, value) in family.metrics {
            write_value(&mut out, &sample, &written(labels), value);
        }
    }
    out
}

/// Labels between the braces.
fn written(labels: &Labels) -> String {
    let mut text = String::new();
    for (name, value) in labels {
        if !text.is_empty() {
            text.push(',');
        }
        let _ = write!(text, "{name}=\"{}\"", escape(value));
    }
    text
}

/// Families as text.
pub fn write(families: &[Family]) -> String {
    write_named(families.iter().map(Named::from))
}

fn write_named<'a>(families: impl Iterator<Item = Named<'a>>) -> String {
    let mut out = String::with_capacity(4096);
    for family in families {
        let kind = match family.metrics.first() {
            Some((_, Value::Counter(_))) => "counter",
            Some((_, Value::Gauge(_) | Value::Whole(_))) => "gauge",
            Some((_, Value::Histogram(_))) => "histogram",
            None => continue,
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "# HELP {} {}\n# TYPE {} {kind}",
            family.name, family.help, family.name
        );
        for (labels, value) in family.metrics {
            write_value(&mut out, family.name, &written(labels), value);
        }
    }
    out
}

fn write_value(out: &mut String, name: &str, labels: &str, value: &Value) {
    let mut number = |value: &dyn std::fmt::Display| {
        let _ = match labels {
            "" => writeln!(out, "{name} {value}"),
            labels => writeln!(out, "{name}{{{labels}}} {value}"),
        };
    };
    match value {
        Value::Counter(value) | Value::Gauge(value) => number(value),
        Value::Whole(value) => number(value),
        Value::Histogram(histogram) => {
            let separator = if labels.is_empty() { "" } else { "," };
            let mut cumulative = 0;
            for (bound, count) in histogram.shown() {
                cumulative += count;
                let _ = writeln!(
                    out,
                    "{name}_bucket{{{labels}{separator}le=\"{bound}\"}} {cumulative}"
                );
            }
            let count = histogram.count();
            let _ = writeln!(out, "{name}_bucket{{{labels}{separator}le=\"+Inf\"}} {count}");
            let _ = writeln!(out, "{name}_sum{{{labels}}} {}", histogram.sum);
            let _ = writeln!(out, "{name}_count{{{labels}}} {count}");
        }
    }
}

fn escape(value: &str) -> std::borrow::Cow<'_, str> {
    if value.contains(['\\', '"', '\n']) {
        value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n")
            .into()
    } else {
        value.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::series::HistogramValue;

    #[test]
    fn the_client_chooses_the_format_by_what_it_accepts() {
        const PROTOBUF: &str =
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
        for (accept, encoding) in [
            ("", Encoding::Text),
            ("*/*", Encoding::Text),
            ("text/html", Encoding::Text),
            (
                "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5,*/*;q=0.1",
                Encoding::OpenMetrics,
            ),
            ("text/plain,application/openmetrics-text;q=0.3", Encoding::Text),
            (
                &format!("{PROTOBUF};q=0.9,application/openmetrics-text;q=0.8"),
                Encoding::Protobuf,
            ),
            ("application/vnd.google.protobuf", Encoding::Text),
        ] {
            assert_eq!(Encoding::of(accept), encoding, "{accept}");
        }
    }

    #[test]
    fn open_metrics_and_protobuf_say_the_same_as_the_text() {
        let families = [
            Family {
                name: "a_total",
                help: "h",
                metrics: vec![(vec![("x", "y".into())], Value::Counter(2.0))],
            },
            Family {
                name: "b",
                help: "h",
                metrics: vec![(vec![], Value::Counter(3.0))],
            },
        ];
        let text = String::from_utf8(Encoding::OpenMetrics.write(&families)).unwrap();
        assert_eq!(
            text,
            "# HELP a h\n# TYPE a counter\na_total{x=\"y\"} 2\n# HELP b h\n# TYPE b counter\nb_total 3\n"
        );
        assert_eq!(Encoding::OpenMetrics.end(), b"# EOF\n");
        let bytes = Encoding::Protobuf.write(&families);
        let mut rest = bytes.as_slice();
        let first = prometheus::MetricFamily::decode_length_delimited(&mut rest).unwrap();
        assert_eq!(first.name(), "a_total");
        assert_eq!(first.metric[0].counter.as_ref().unwrap().value(), 2.0);
        prometheus::MetricFamily::decode_length_delimited(&mut rest).unwrap();
        assert!(rest.is_empty());
    }

    #[test]
    fn histograms_are_cumulative_and_labels_are_escaped() {
        let mut value = HistogramValue {
            sum: 1.5,
            ..Default::default()
        };
        value.buckets[0] = 2;
        value.buckets[1] = 1;
        value.buckets[19] = 1;
        let text = write(&[Family {
            name: "m",
            help: "h",
            metrics: vec![(vec![("a", "x\"y\\".into())], Value::Histogram(Box::new(value)))],
        }]);
        for line in [
            "# TYPE m histogram",
            r#"m_bucket{a="x\"y\\",le="0.5"} 2"#,
            r#"m_bucket{a="x\"y\\",le="1"} 3"#,
            r#"m_bucket{a="x\"y\\",le="3600000"} 3"#,
            r#"m_bucket{a="x\"y\\",le="+Inf"} 4"#,
            r#"m_sum{a="x\"y\\"} 1.5"#,
            r#"m_count{a="x\"y\\"} 4"#,
        ] {
            assert!(text.lines().any(|have| have == line), "{line}\n{text}");
        }
    }
}
