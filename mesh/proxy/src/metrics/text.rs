//! The Prometheus text format.

use std::fmt::Write;

use super::collect::{Family, Value};
use super::series::BOUNDS;

/// Content type of [`write()`]'s output.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Families as text.
pub fn write(families: &[Family]) -> String {
    let mut out = String::with_capacity(4096);
    for family in families {
        let kind = match family.metrics.first() {
            Some((_, Value::Counter(_))) => "counter",
            Some((_, Value::Gauge(_))) => "gauge",
            Some((_, Value::Histogram(_))) => "histogram",
            None => continue,
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "# HELP {} {}\n# TYPE {} {kind}",
            family.name, family.help, family.name
        );
        for (labels, value) in &family.metrics {
            let mut text = String::new();
            for (name, value) in labels {
                if !text.is_empty() {
                    text.push(',');
                }
                let _ = write!(text, "{name}=\"{}\"", escape(value));
            }
            write_value(&mut out, family.name, &text, value);
        }
    }
    out
}

fn write_value(out: &mut String, name: &str, labels: &str, value: &Value) {
    match value {
        Value::Counter(value) | Value::Gauge(value) => {
            let _ = match labels {
                "" => writeln!(out, "{name} {value}"),
                labels => writeln!(out, "{name}{{{labels}}} {value}"),
            };
        }
        Value::Histogram(histogram) => {
            let separator = if labels.is_empty() { "" } else { "," };
            let mut cumulative = 0;
            for (count, bound) in histogram.buckets.iter().zip(BOUNDS) {
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
