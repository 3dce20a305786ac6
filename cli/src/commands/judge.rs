//! `serin judge`: replays recorded measurements through the judges of a rollout.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Serialize;
use serin_analysis::judge::flagger::{Flagger, Metric as FlaggerMetric, Options as FlaggerOptions};
use serin_analysis::judge::threshold::{Builtin, Range};
use serin_analysis::replay::{self, Line};
use serin_analysis::{Combined, Judges, MetricVerdict, Options as JudgeOptions, Verdict};
use serin_canary::plan::ComparisonPlan;
use serin_crds::flagger::{Comparison, ComparisonMetric, LatencyBound, MissingPolicy};

use super::parse_duration;

/// Longest line that is read. A second of two arms with a thousand buckets each is 30 kB.
const LINE_MAX: u64 = 1 << 20;
/// Weight of the canary when no line and no option says it, in percent; only the check of the split looks at it.
const WEIGHT_UNKNOWN: f64 = 0.0;

/// Options of `serin judge`.
#[derive(Debug, Args)]
#[command(
    after_help = "Input is one JSON object per line and interval; output is one verdict per line, in the same order:\n\n  {\"t\":1700000000,\"canary\":{\"requests\":100,\"errors\":4,\"latency_ms\":{\"le\":[50,100,250],\"counts\":[60,30,9,1]}},\"primary\":{\"requests\":900,\"errors\":2}}\n\n`t` is in seconds (or milliseconds) since the Unix epoch. Histogram counts are per bucket; the last one, beyond all bounds,\nmay be left out if it is 0. `classes` {\"http_5xx\",\"grpc\",\"connection\"} may tell errors apart, `error_clients` how many\nclients they are of (for `errors-by-client`); `weight` is the canary's\nconfigured share in percent.\n\nExamples:\n  serin judge incident.jsonl\n  serin judge --canary canary.yaml incident.jsonl | jq -c 'select(.verdict==\"bad\") | {t,explanation}' | head -1\n  tail -f live.jsonl | serin judge --alpha 0.001 --tolerance 2 --metric errors=3 --metric latency-p99\n  serin judge --rule flagger --interval 1m --threshold 5 --min-success-rate 99 incident.jsonl"
)]
pub(crate) struct Options {
    /// File of JSON lines; standard input without one or with -
    file: Option<PathBuf>,
    /// Take the options from this YAML file: a Canary, or its block spec.analysis.comparison
    #[arg(long, value_name = "FILE")]
    canary: Option<PathBuf>,
    /// Highest probability with which a release within the tolerance is ever called bad [default: 0.01]
    #[arg(long)]
    alpha: Option<f64>,
    /// Ratio canary : primary that is still tolerated [default: 1.5]
    #[arg(long)]
    tolerance: Option<f64>,
    /// What is compared, with its weight: NAME[=WEIGHT], repeatable [default: errors=3, latency-p99=1]
    #[arg(long = "metric", value_name = "NAME[=WEIGHT]", value_parser = parse_metric)]
    metrics: Vec<ComparisonMetric>,
    /// Highest acceptable error rate of the canary, in percent
    #[arg(long, value_name = "PERCENT")]
    max_error_rate: Option<f64>,
    /// Highest acceptable latency of the canary at a percentile: PERCENTILE=MILLISECONDS, repeatable
    #[arg(long, value_name = "P=MS", value_parser = parse_bound)]
    max_latency: Vec<LatencyBound>,
    /// How long the durations of a cold canary may be left out, for example 2m
    #[arg(long, value_name = "DURATION")]
    warm_up: Option<String>,
    /// What lines without data mean: Hold, Fail or Pass
    #[arg(long, value_name = "POLICY", value_parser = parse_policy)]
    on_no_data: Option<MissingPolicy>,
    /// Which rule judges
    #[arg(long, value_enum, default_value_t = Rule::Sequential)]
    rule: Rule,
    /// Flagger's rule: analysis.interval
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = parse_duration)]
    interval: std::time::Duration,
    /// Flagger's rule: analysis.threshold
    #[arg(long, default_value_t = 1)]
    threshold: u32,
    /// Flagger's rule: thresholdRange.min of request-success-rate, in percent [default: 99 unless another metric is named]
    #[arg(long, value_name = "PERCENT")]
    min_success_rate: Option<f64>,
    /// Flagger's rule: thresholdRange.max of request-duration, in milliseconds
    #[arg(long, value_name = "MS")]
    max_duration: Option<f64>,
    /// Histogram counts are cumulative, as Prometheus has them
    #[arg(long)]
    cumulative: bool,
    /// Leave out the verdicts of single metrics
    #[arg(long)]
    brief: bool,
    /// Exit with 2 when the last verdict is bad
    #[arg(long)]
    exit_code: bool,
}

/// Which rule judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Rule {
    /// The sequential comparison with the primary
    Sequential,
    /// Flagger's fixed threshold
    Flagger,
}

fn parse_metric(text: &str) -> Result<ComparisonMetric, String> {
    let (name, weight) = match text.split_once('=') {
        None => (text, None),
        Some((name, weight)) => (
            name,
            Some(weight.parse().map_err(|_| format!("{weight:?} is no weight"))?),
        ),
    };
    Ok(ComparisonMetric {
        name: name.to_owned(),
        weight,
        tolerance: None,
    })
}

fn parse_bound(text: &str) -> Result<LatencyBound, String> {
    let (percentile, milliseconds) = text
        .split_once('=')
        .ok_or("say PERCENTILE=MILLISECONDS, as in 99=500")?;
    let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is no number"));
    Ok(LatencyBound {
        percentile: number(percentile.trim_start_matches('p'))?,
        milliseconds: number(milliseconds.trim_end_matches("ms"))?,
    })
}

fn parse_policy(text: &str) -> Result<MissingPolicy, String> {
    match text.to_ascii_lowercase().as_str() {
        "hold" => Ok(MissingPolicy::Hold),
        "fail" => Ok(MissingPolicy::Fail),
        "pass" => Ok(MissingPolicy::Pass),
        "extend" => Err("a recording has no steps to extend; say Hold, Fail or Pass".to_owned()),
        _ => Err("say Hold, Fail or Pass".to_owned()),
    }
}

/// One line of output.
#[derive(Serialize)]
struct Told<'a> {
    t: &'a serde_json::Number,
    verdict: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    evidence: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bound: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    samples: Option<u64>,
    explanation: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remaining_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    metrics: Vec<ToldMetric<'a>>,
}

#[derive(Serialize)]
struct ToldMetric<'a> {
    name: &'a str,
    verdict: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    evidence: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bound: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    explanation: &'a str,
}

impl<'a> Told<'a> {
    fn new(t: &'a serde_json::Number, verdict: &'a Verdict, metrics: &'a [MetricVerdict]) -> Self {
        let evidence = verdict.evidence();
        Self {
            t,
            verdict: verdict.word(),
            evidence: evidence.map(|evidence| evidence.value),
            bound: evidence.map(|evidence| evidence.bound),
            alpha: evidence.and_then(|evidence| evidence.alpha),
            samples: evidence.map(|evidence| evidence.samples),
            explanation: verdict.explanation(),
            missing: verdict.missing().map(|missing| missing.what.as_str()),
            remaining_seconds: verdict
                .missing()
                .and_then(|missing| missing.seconds)
                .map(f64::ceil),
            metrics: metrics
                .iter()
                .map(|metric| {
                    let evidence = metric.verdict.evidence();
                    ToldMetric {
                        name: &metric.name,
                        verdict: metric.verdict.word(),
                        evidence: evidence.map(|evidence| evidence.value),
                        bound: evidence.map(|evidence| evidence.bound),
                        alpha: evidence.and_then(|evidence| evidence.alpha),
                        explanation: metric.verdict.explanation(),
                    }
                })
                .collect(),
        }
    }
}

/// What judges line after line.
enum Judge {
    Sequential {
        judges: Box<Judges>,
        options: JudgeOptions,
        weight: f64,
    },
    Flagger {
        rule: Flagger,
        options: FlaggerOptions,
    },
}

impl Judge {
    fn new(options: &Options) -> anyhow::Result<Self> {
        Ok(match options.rule {
            Rule::Sequential => Self::Sequential {
                judges: Box::default(),
                options: sequential_options(options)?,
                weight: WEIGHT_UNKNOWN,
            },
            Rule::Flagger => Self::Flagger {
                rule: Flagger::default(),
                options: flagger_options(options),
            },
        })
    }

    fn judge(&mut self, line: &Line) -> Combined {
        match self {
            Self::Sequential {
                judges,
                options,
                weight,
            } => {
                let now = line.weight_percent.unwrap_or(*weight);
                if now != *weight {
                    judges.begin_step();
                    *weight = now;
                }
                judges.observe(&line.sample, *weight, options);
                judges.verdict(options)
            }
            Self::Flagger { rule, options } => {
                rule.observe(&line.sample, options);
                Combined {
                    verdict: rule.verdict(options),
                    metrics: Vec::new(),
                }
            }
        }
    }
}

fn sequential_options(options: &Options) -> anyhow::Result<JudgeOptions> {
    let mut spec = match &options.canary {
        None => Comparison::default(),
        Some(path) => comparison_of(path)?,
    };
    spec.alpha = options.alpha.or(spec.alpha);
    spec.tolerance = options.tolerance.or(spec.tolerance);
    spec.max_error_rate = options.max_error_rate.or(spec.max_error_rate);
    spec.warm_up = options.warm_up.clone().or(spec.warm_up);
    spec.on_no_data = options.on_no_data.clone().or(spec.on_no_data);
    if !options.metrics.is_empty() {
        spec.metrics.clone_from(&options.metrics);
    }
    if !options.max_latency.is_empty() {
        spec.max_latency.clone_from(&options.max_latency);
    }
    let mut refused = Vec::new();
    let Some(plan) = ComparisonPlan::new(&spec, &mut refused) else {
        bail!("the comparison is switched off in that Canary; there is nothing to judge by");
    };
    if let Some(field) = refused.first() {
        bail!("{}: {}", field.path, field.reason);
    }
    Ok(JudgeOptions {
        on_no_data: plan.on_no_data,
        on_provider_error: plan.on_provider_error,
        ..plan.options
    })
}

/// The block of a Canary, or the block alone.
fn comparison_of(path: &Path) -> anyhow::Result<Comparison> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let value: serde_json::Value =
        serde_yaml::from_str(&text).with_context(|| format!("{} is not YAML", path.display()))?;
    let block = match value.get("kind").and_then(serde_json::Value::as_str) {
        Some("Canary") => value
            .pointer("/spec/analysis/comparison")
            .cloned()
            .unwrap_or_else(|| serde_json::json!({})),
        Some(kind) => bail!("{} is a {kind}, not a Canary", path.display()),
        None => value,
    };
    serde_json::from_value(block).with_context(|| format!("{}: spec.analysis.comparison", path.display()))
}

fn flagger_options(options: &Options) -> FlaggerOptions {
    let millis = i64::try_from(options.interval.as_millis()).unwrap_or(i64::MAX);
    let metric = |builtin, range| FlaggerMetric {
        builtin,
        range,
        window_ms: millis,
    };
    let success = options
        .min_success_rate
        .or(options.max_duration.is_none().then_some(99.0));
    let success = success.map(|min| {
        metric(
            Builtin::RequestSuccessRate,
            Range {
                min: Some(min),
                max: None,
            },
        )
    });
    let duration = options.max_duration.map(|max| {
        metric(
            Builtin::RequestDuration,
            Range {
                min: None,
                max: Some(max),
            },
        )
    });
    FlaggerOptions {
        interval_ms: millis,
        threshold: options.threshold,
        metrics: success.into_iter().chain(duration).collect(),
    }
}

/// Judges and prints.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let file = options.file.as_deref().filter(|path| *path != Path::new("-"));
    let (name, input): (String, Box<dyn BufRead>) = match file {
        None => ("standard input".to_owned(), Box::new(io::stdin().lock())),
        Some(path) => {
            let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
            (path.display().to_string(), Box::new(BufReader::new(file)))
        }
    };
    let mut output = io::BufWriter::new(io::stdout().lock());
    let bad = judge_lines(options, &name, input, &mut output)?;
    output.flush()?;
    Ok(if options.exit_code && bad {
        ExitCode::from(2)
    } else {
        ExitCode::SUCCESS
    })
}

/// Judges line after line; tells whether the last verdict is bad.
fn judge_lines(
    options: &Options,
    name: &str,
    mut input: impl BufRead,
    output: &mut impl io::Write,
) -> anyhow::Result<bool> {
    let mut judge = Judge::new(options)?;
    let reading = replay::Options {
        cumulative: options.cumulative,
    };
    let (mut text, mut number, mut last, mut bad) = (String::new(), 0_u64, i64::MIN, false);
    loop {
        text.clear();
        number += 1;
        let at = || format!("{name}:{number}");
        if input
            .by_ref()
            .take(LINE_MAX)
            .read_line(&mut text)
            .with_context(at)?
            == 0
        {
            return Ok(bad);
        }
        if text.len() as u64 >= LINE_MAX && !text.ends_with('\n') {
            bail!("{}: the line is longer than {LINE_MAX} bytes", at());
        }
        if text.trim().is_empty() {
            continue;
        }
        let line = match replay::line(&text, reading) {
            Ok(line) => line,
            Err(error) => {
                output.flush()?;
                bail!("{}: {error}", at());
            }
        };
        if line.sample.at_ms < last {
            output.flush()?;
            bail!("{}: t is {}, before that of the line above", at(), line.t);
        }
        last = line.sample.at_ms;
        let combined = judge.judge(&line);
        bad = combined.verdict.is_bad();
        let metrics = if options.brief { &[][..] } else { &combined.metrics };
        serde_json::to_writer(&mut *output, &Told::new(&line.t, &combined.verdict, metrics))?;
        output.write_all(b"\n")?;
        // Whoever follows a live source wants each verdict at once.
        output.flush()?;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Wrapper {
        #[command(flatten)]
        options: Options,
    }

    fn judged(arguments: &[&str], input: &str) -> (Vec<serde_json::Value>, anyhow::Result<bool>) {
        let all = ["judge"].iter().chain(arguments);
        let options = Wrapper::try_parse_from(all).unwrap().options;
        let mut output = Vec::new();
        let outcome = judge_lines(&options, "incident.jsonl", input.as_bytes(), &mut output);
        let lines = String::from_utf8(output)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        (lines, outcome)
    }

    fn seconds(count: u64, canary: (u64, u64), primary: (u64, u64)) -> String {
        let arms = |(requests, errors)| serde_json::json!({"requests": requests, "errors": errors});
        let lines: Vec<String> = (0..count)
            .map(|t| {
                serde_json::json!({"t": t, "canary": arms(canary), "primary": arms(primary)}).to_string()
            })
            .collect();
        lines.join("\n") + "\n"
    }

    #[test]
    fn each_line_of_input_gives_one_verdict_with_evidence_bound_and_explanation() {
        let (lines, outcome) = judged(&[], &seconds(3, (100, 30), (900, 1)));
        assert!(outcome.unwrap());
        assert_eq!(lines.len(), 3);
        let last = &lines[2];
        assert_eq!(
            (&last["t"], &last["verdict"]),
            (&serde_json::json!(2), &serde_json::json!("bad"))
        );
        assert!(last["evidence"].as_f64().unwrap() >= last["bound"].as_f64().unwrap());
        assert_eq!(
            last["explanation"],
            "canary fails 30 % of 300 requests, primary 0.11 % of 2,700; at most 1 in 100 healthy releases would ever look this bad"
        );
        assert_eq!(last["metrics"][0]["name"], "errors");
    }

    #[test]
    fn healthy_lines_are_undecided_with_what_is_missing_and_at_last_good() {
        let (lines, outcome) = judged(
            &["--metric", "errors", "--brief"],
            &seconds(200, (1000, 10), (4000, 40)),
        );
        assert!(!outcome.unwrap());
        assert_eq!(lines[0]["verdict"], "undecided");
        assert!(
            lines[0]["missing"]
                .as_str()
                .unwrap()
                .contains("more canary requests")
        );
        assert!(lines[0]["remaining_seconds"].as_f64().unwrap() > 1.0);
        assert_eq!(lines[199]["verdict"], "good");
        assert_eq!(lines[199].get("metrics"), None);
    }

    #[test]
    fn bad_input_is_named_with_file_and_line_after_the_verdicts_before_it() {
        let input = format!("{}\n{{\"t\":\"soon\"}}\n", seconds(2, (10, 0), (90, 0)));
        let (lines, outcome) = judged(&[], &input);
        assert_eq!(lines.len(), 2);
        let error = outcome.unwrap_err().to_string();
        assert!(
            error.starts_with("incident.jsonl:4: not an interval of measurements"),
            "{error}"
        );
        let backwards = "{\"t\":5}\n{\"t\":4}\n";
        let error = judged(&[], backwards).1.unwrap_err().to_string();
        assert_eq!(error, "incident.jsonl:2: t is 4, before that of the line above");
    }

    #[test]
    fn flaggers_rule_can_be_replayed_on_the_same_recording() {
        let arguments = ["--rule", "flagger", "--interval", "10s", "--threshold", "2"];
        let (lines, outcome) = judged(&arguments, &seconds(40, (100, 3), (900, 27)));
        assert!(outcome.unwrap());
        let first = lines.iter().position(|line| line["verdict"] == "bad");
        assert_eq!(first, Some(30), "two failed checks and one more interval");
    }

    #[test]
    fn options_come_from_a_canary_and_the_command_line_wins() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("canary.yaml");
        std::fs::write(
            &path,
            "kind: Canary\nspec:\n  analysis:\n    comparison:\n      alpha: 0.001\n      tolerance: 3\n      metrics: [{name: errors-5xx}]\n",
        )
        .unwrap();
        let parse = |arguments: &[&str]| {
            let all = ["judge", "--canary", path.to_str().unwrap()];
            let options = Wrapper::try_parse_from(all.iter().chain(arguments))
                .unwrap()
                .options;
            sequential_options(&options)
        };
        let options = parse(&["--alpha", "0.05"]).unwrap();
        assert_eq!((options.alpha, options.tolerance), (0.05, 3.0));
        assert_eq!(options.metrics[0].name, "errors-5xx");
        let error = parse(&["--metric", "speed"]).unwrap_err().to_string();
        assert!(
            error.contains("metrics[0].name") && error.contains("speed"),
            "{error}"
        );
    }
}
