//! Recorded measurements as JSON lines, one interval each:
//!
//! ```json
//! {"t": 1700000000, "canary": {"requests": 100, "errors": 2, "latency_ms": {"le": [10, 100], "counts": [60, 38, 2]}},
//!  "primary": {"requests": 900, "errors": 1}}
//! ```
//!
//! `t` is in seconds since the Unix epoch (in milliseconds from 10^11 on), and does not fall. `counts` are per bucket, one
//! more than there are bounds for what exceeds them all; with one count per bound nothing exceeds the last one. With
//! `cumulative` they are Prometheus' cumulative ones, and `le` may end with `"+Inf"`. `classes` may tell the errors apart
//! (`http_5xx`, `grpc`, `connection`), `error_clients` how many distinct clients they are of, `weight` the configured weight of the canary in percent. What was not recorded may be
//! left out; a field that is not known is an error.

use serde::Deserialize;

use crate::sample::{Counts, ErrorClasses, Histogram, Sample};

/// Times from here on are milliseconds: as seconds they would be the year 5138.
const MILLISECONDS_FROM: f64 = 1e11;

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// It is not JSON of this form.
    #[error("not an interval of measurements: {0}")]
    Json(#[from] serde_json::Error),
    /// A number makes no sense.
    #[error("{0}")]
    Nonsense(String),
}

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// `t` as it was written, to be written back.
    pub t: serde_json::Number,
    /// The measurements.
    pub sample: Sample,
    /// The configured weight of the canary in percent, if recorded.
    pub weight_percent: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLine {
    t: serde_json::Number,
    #[serde(default)]
    canary: RawArm,
    #[serde(default)]
    primary: RawArm,
    #[serde(default)]
    weight: Option<f64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawArm {
    #[serde(default)]
    requests: u64,
    #[serde(default)]
    errors: u64,
    #[serde(default)]
    classes: Option<ErrorClasses>,
    #[serde(default)]
    error_clients: Option<u64>,
    #[serde(default)]
    latency_ms: Option<RawHistogram>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHistogram {
    le: Vec<Bound>,
    counts: Vec<u64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Bound {
    Number(f64),
    Text(String),
}

/// How lines are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Histogram counts are cumulative, as Prometheus has them.
    pub cumulative: bool,
}

/// Reads one line.
pub fn line(text: &str, options: Options) -> Result<Line, LineError> {
    let raw: RawLine = serde_json::from_str(text)?;
    let t = raw.t.as_f64().filter(|t| t.is_finite() && t.abs() < 1e15);
    let Some(t) = t else {
        return Err(LineError::Nonsense(format!("t is {}, which is no time", raw.t)));
    };
    let at_ms = if t.abs() < MILLISECONDS_FROM {
        t * 1000.0
    } else {
        t
    };
    if let Some(weight) = raw.weight
        && !(0.0..=100.0).contains(&weight)
    {
        return Err(LineError::Nonsense(format!(
            "weight is {weight}; it is a percentage"
        )));
    }
    Ok(Line {
        t: raw.t,
        sample: Sample {
            at_ms: at_ms as i64,
            from_ms: None,
            canary: arm("canary", raw.canary, options)?,
            primary: arm("primary", raw.primary, options)?,
        },
        weight_percent: raw.weight,
    })
}

fn arm(name: &str, raw: RawArm, options: Options) -> Result<Counts, LineError> {
    /// The judges are tested up to here; beyond, sums might not fit.
    const REQUESTS_MAX: u64 = 1_000_000_000_000_000;
    let nonsense = |text: String| Err(LineError::Nonsense(format!("{name}: {text}")));
    if raw.requests > REQUESTS_MAX {
        return nonsense(format!("{} requests are too many", raw.requests));
    }
    if raw.errors > raw.requests {
        return nonsense(format!("{} errors in {} requests", raw.errors, raw.requests));
    }
    let classes = raw.classes.unwrap_or_default();
    let classified = classes
        .http_5xx
        .saturating_add(classes.grpc)
        .saturating_add(classes.connection);
    if classified > raw.errors {
        return nonsense(format!("{classified} errors in classes, {} in all", raw.errors));
    }
    if let Some(clients) = raw.error_clients
        && (clients > raw.errors || (clients == 0 && raw.errors > 0))
    {
        return nonsense(format!("{} errors of {clients} clients", raw.errors));
    }
    let latency = match raw.latency_ms {
        None => Histogram::default(),
        Some(histogram) => match read_histogram(histogram, options) {
            Ok(histogram) => histogram,
            Err(text) => return nonsense(format!("latency_ms: {text}")),
        },
    };
    if latency.total() > raw.requests {
        return nonsense(format!(
            "latency_ms: {} durations of {} requests{}",
            latency.total(),
            raw.requests,
            if options.cumulative {
                ""
            } else {
                "; are the counts cumulative?"
            }
        ));
    }
    Ok(Counts {
        requests: raw.requests,
        errors: raw.errors,
        classes,
        error_clients: raw.error_clients,
        latency,
    })
}

fn read_histogram(raw: RawHistogram, options: Options) -> Result<Histogram, String> {
    let mut bounds_ms = Vec::with_capacity(raw.le.len());
    let mut infinite = false;
    for bound in raw.le {
        if infinite {
            return Err("+Inf must be the last of le".to_owned());
        }
        match bound {
            Bound::Number(bound) if bound.is_finite() && bound >= 0.0 => {
                if bounds_ms.last().is_some_and(|last| *last >= bound) {
                    return Err("le must rise".to_owned());
                }
                bounds_ms.push(bound);
            }
            Bound::Text(text) if text == "+Inf" => infinite = true,
            Bound::Number(bound) => return Err(format!("{bound} is no bound")),
            Bound::Text(text) => match text.parse::<f64>() {
                Ok(bound) if bound.is_finite() => bounds_ms.push(bound),
                _ => return Err(format!("{text:?} is no bound")),
            },
        }
    }
    let mut counts = raw.counts;
    if options.cumulative {
        if counts.windows(2).any(|pair| pair[0] > pair[1]) {
            return Err("cumulative counts must not fall".to_owned());
        }
        for index in (1..counts.len()).rev() {
            counts[index] -= counts[index - 1];
        }
    }
    if counts.len() == bounds_ms.len() && !infinite {
        counts.push(0);
    }
    if counts.len() != bounds_ms.len() + 1 {
        return Err(format!("{} counts for {} bounds", counts.len(), bounds_ms.len()));
    }
    Ok(Histogram { bounds_ms, counts })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_issues_example_is_read() {
        let text = r#"{"t":7,"canary":{"requests":100,"errors":2,"latency_ms":{"le":[10,100],"counts":[60,38,2]}},"primary":{"requests":900,"errors":1},"weight":10}"#;
        let line = line(text, Options::default()).unwrap();
        assert_eq!(line.sample.at_ms, 7000);
        assert_eq!(line.sample.canary.latency.counts, [60, 38, 2]);
        assert_eq!(line.sample.primary.requests, 900);
        assert_eq!(line.weight_percent, Some(10.0));
    }

    #[test]
    fn cumulative_counts_are_those_of_prometheus() {
        let text = r#"{"t":1700000000000,"canary":{"requests":100,"latency_ms":{"le":[10,100,"+Inf"],"counts":[60,98,100]}}}"#;
        let line = line(text, Options { cumulative: true }).unwrap();
        assert_eq!(line.sample.at_ms, 1_700_000_000_000);
        assert_eq!(line.sample.canary.latency.counts, [60, 38, 2]);
        assert_eq!(line.sample.canary.latency.bounds_ms, [10.0, 100.0]);
    }

    #[test]
    fn nonsense_is_refused_with_the_reason() {
        for (text, reason) in [
            ("{", "not an interval"),
            (r#"{"canary":{}}"#, "missing field `t`"),
            (r#"{"t":1,"canary":{"request":1}}"#, "unknown field `request`"),
            (
                r#"{"t":1,"canary":{"requests":1,"errors":2}}"#,
                "canary: 2 errors in 1 requests",
            ),
            (r#"{"t":1,"primary":{"requests":-1}}"#, "invalid value"),
            (
                r#"{"t":1,"canary":{"requests":9,"latency_ms":{"le":[5,2],"counts":[1,1,1]}}}"#,
                "le must rise",
            ),
            (
                r#"{"t":1,"canary":{"requests":9,"latency_ms":{"le":[5],"counts":[1,1,1]}}}"#,
                "3 counts for 1 bounds",
            ),
            (
                r#"{"t":1,"canary":{"requests":9,"latency_ms":{"le":[5,6],"counts":[5,9,9]}}}"#,
                "are the counts cumulative?",
            ),
            (r#"{"t":1,"weight":101}"#, "it is a percentage"),
            (r#"{"t":1e300}"#, "no time"),
        ] {
            let told = line(text, Options::default()).unwrap_err().to_string();
            assert!(told.contains(reason), "{text}: {told}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn no_text_makes_it_panic(text in r#"[\{\}\[\]":,a-z0-9_ .+-]{0,80}"#) {
            let _ = line(&text, Options::default());
        }
    }
}
