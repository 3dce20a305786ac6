//! What a Canary asks for, read once from its spec into plain numbers; and what it asks for that is not honoured.

mod comparison;

pub use comparison::{Advance, ComparisonPlan, WatchPlan};

use std::time::Duration;

use serin_analysis::judge::threshold::{Builtin, Range};
use serin_crds::flagger::{CanaryMetric, CanarySpec, Provider, TargetKind};
use serin_kit::unhonoured::{self, Field};

use crate::templates::{self, TemplatePlan};

/// Measurement window of a step when the spec names none (Flagger: the same).
const INTERVAL_DEFAULT: Duration = Duration::from_secs(60);
/// Window of a metric when the spec names none (Flagger: the same).
const METRIC_WINDOW_DEFAULT: Duration = Duration::from_secs(60);
/// Shortest interval that is honoured: counts arrive once a second. Flagger raises everything below 10 s to 10 s.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// How long a workload that is not available is waited for when the spec says nothing (Flagger: the same).
const PROGRESS_DEADLINE_DEFAULT: Duration = Duration::from_secs(600);

/// A metric with its bounds.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricPlan {
    /// Name as in the spec.
    pub name: String,
    /// What it measures.
    pub builtin: Builtin,
    /// Bounds, both inclusive.
    pub range: Range,
    /// How far back its value reaches at most; never before the weight was live.
    pub window: Duration,
}

/// A Canary's spec, normalised.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Name of the target Deployment.
    pub target: String,
    /// Name of the apex Service.
    pub apex: String,
    /// Shares of the canary in percent, ascending.
    pub steps: Vec<i32>,
    /// Growth of the primary's share after promotion in percent; 0 is all at once.
    pub promotion_step: i32,
    /// Length of a measurement window.
    pub interval: Duration,
    /// Failed checks after which a run is rolled back.
    pub threshold: i32,
    /// How long something that is not available, or a weight that is not live, is waited for.
    pub progress_deadline: Duration,
    /// Percent of the primary's pods that must be available.
    pub primary_ready_percent: i32,
    /// Percent of the canary's pods that must be available.
    pub canary_ready_percent: i32,
    /// Metrics in order.
    pub metrics: Vec<MetricPlan>,
    /// Metrics that providers are asked for, in order.
    pub templates: Vec<TemplatePlan>,
    /// The sequential comparison, unless switched off.
    pub comparison: Option<ComparisonPlan>,
    /// Promote without judging.
    pub skip_analysis: bool,
    /// Do nothing.
    pub suspend: bool,
    /// Give everything back on deletion.
    pub revert_on_deletion: bool,
    /// Fields that are set and not honoured.
    pub unhonoured: Vec<Field>,
}

impl Plan {
    /// Whether this Canary must not be acted on.
    pub fn is_refused(&self) -> bool {
        unhonoured::refuses(&self.unhonoured)
    }

    /// The first share above `weight`, `None` when the last step is done.
    pub fn next_step(&self, weight: i32) -> Option<i32> {
        self.steps.iter().copied().find(|step| *step > weight)
    }

    /// Name of the primary Deployment.
    pub fn primary(&self) -> String {
        format!("{}-primary", self.target)
    }

    /// Reads a spec. Never fails: what cannot be read is in [`Plan::unhonoured`] and refuses the Canary.
    pub fn new(spec: &CanarySpec) -> Self {
        let mut fields = Vec::new();
        let analysis = &spec.analysis;
        let duration =
            |text: Option<&String>, default: Duration, path: &str, fields: &mut Vec<Field>| match text {
                None => default,
                Some(text) => serin_crds::Duration(text.clone())
                    .parse()
                    .unwrap_or_else(|error| {
                        fields.push(Field::refused(path, error.to_string()));
                        default
                    }),
            };
        let interval = duration(
            analysis.interval.as_ref(),
            INTERVAL_DEFAULT,
            "spec.analysis.interval",
            &mut fields,
        )
        .max(INTERVAL_MIN);
        let metrics = analysis
            .metrics
            .iter()
            .enumerate()
            .filter_map(|(index, metric)| metric_plan(index, metric, &mut fields))
            .collect();
        let templates = templates::plans(spec, &mut fields);
        let steps = if spec.skip_analysis == Some(true) {
            Vec::new()
        } else {
            steps(spec, &mut fields)
        };
        refuse_what_is_not_there(spec, &mut fields);
        let comparison = ComparisonPlan::new(&analysis.comparison.clone().unwrap_or_default(), &mut fields);
        Self {
            target: spec.target_ref.name.clone(),
            apex: spec
                .service
                .as_ref()
                .and_then(|service| service.name.clone())
                .unwrap_or_else(|| spec.target_ref.name.clone()),
            steps,
            promotion_step: analysis.step_weight_promotion.unwrap_or(0).clamp(0, 100),
            interval,
            threshold: analysis.threshold.filter(|threshold| *threshold > 0).unwrap_or(1),
            progress_deadline: spec
                .progress_deadline_seconds
                .and_then(|seconds| u64::try_from(seconds).ok())
                .map_or(PROGRESS_DEADLINE_DEFAULT, Duration::from_secs),
            primary_ready_percent: analysis.primary_ready_threshold.unwrap_or(100).clamp(0, 100),
            canary_ready_percent: analysis.canary_ready_threshold.unwrap_or(100).clamp(0, 100),
            metrics,
            templates,
            comparison,
            skip_analysis: spec.skip_analysis.unwrap_or(false),
            suspend: spec.suspend.unwrap_or(false),
            revert_on_deletion: spec.revert_on_deletion.unwrap_or(false),
            unhonoured: fields,
        }
    }
}

fn steps(spec: &CanarySpec, fields: &mut Vec<Field>) -> Vec<i32> {
    let analysis = &spec.analysis;
    if !analysis.step_weights.is_empty() {
        let mut ladder: Vec<i32> = Vec::new();
        for &weight in &analysis.step_weights {
            if !(0..=100).contains(&weight) || ladder.last().is_some_and(|last| *last >= weight) {
                fields.push(Field::refused(
                    "spec.analysis.stepWeights",
                    format!("{:?} must ascend between 1 and 100", analysis.step_weights),
                ));
                return ladder;
            }
            if weight > 0 {
                ladder.push(weight);
            }
        }
        return ladder;
    }
    let step = analysis.step_weight.unwrap_or(0);
    if step <= 0 {
        if analysis.iterations.unwrap_or(0) <= 0 {
            fields.push(Field::refused(
                "spec.analysis",
                "there is no step, so the analysis would never end; set stepWeight or stepWeights",
            ));
        }
        return Vec::new();
    }
    let max = analysis.max_weight.filter(|max| *max > 0).unwrap_or(100).min(100);
    // Flagger goes on while the weight is below the maximum, so the last step may exceed it.
    let mut ladder = Vec::new();
    let mut weight = 0;
    while weight < max {
        weight = weight.saturating_add(step).min(100);
        ladder.push(weight);
    }
    ladder
}

fn metric_plan(index: usize, metric: &CanaryMetric, fields: &mut Vec<Field>) -> Option<MetricPlan> {
    let path = |field: &str| format!("spec.analysis.metrics[{index}]{field}");
    if metric.template_ref.is_some() || metric.query.is_some() {
        // See `templates`.
        return None;
    }
    let Some(builtin) = Builtin::from_name(&metric.name) else {
        fields.push(Field::refused(
            path(".name"),
            format!(
                "{:?} is not a built-in metric; use request-success-rate or request-duration, or set templateRef",
                metric.name
            ),
        ));
        return None;
    };
    let range = match (&metric.threshold_range, metric.threshold, builtin) {
        (Some(range), _, _) => Range {
            min: range.min,
            max: range.max,
        },
        (None, Some(min), Builtin::RequestSuccessRate) => Range {
            min: Some(min),
            max: None,
        },
        (None, Some(max), Builtin::RequestDuration) => Range {
            min: None,
            max: Some(max),
        },
        (None, None, _) => Range::default(),
    };
    let window = match &metric.interval {
        None => METRIC_WINDOW_DEFAULT,
        Some(text) => match serin_crds::Duration(text.clone()).parse() {
            Ok(window) => window.max(INTERVAL_MIN),
            Err(error) => {
                fields.push(Field::refused(path(".interval"), error.to_string()));
                return None;
            }
        },
    };
    Some(MetricPlan {
        name: metric.name.clone(),
        builtin,
        range,
        window,
    })
}

/// Everything of Flagger that is not there yet. Refused: what would change what users see of a release. Ignored:
/// what only tells, or belongs to another router.
fn refuse_what_is_not_there(spec: &CanarySpec, fields: &mut Vec<Field>) {
    let analysis = &spec.analysis;
    let mut refuse = |present: bool, path: &str, reason: &str| {
        if present {
            fields.push(Field::refused(path, reason));
        }
    };
    refuse(
        !matches!(spec.provider, None | Some(Provider::Istio)),
        "spec.provider",
        "only istio is there yet",
    );
    refuse(
        spec.target_ref.kind != TargetKind::Deployment,
        "spec.targetRef.kind",
        "only Deployment is there yet",
    );
    refuse(
        spec.service.is_none(),
        "spec.service",
        "a port is needed to serve; set spec.service.port",
    );
    refuse(
        spec.autoscaler_ref.is_some(),
        "spec.autoscalerRef",
        "autoscalers come in a later release",
    );
    refuse(
        analysis.iterations.unwrap_or(0) > 0,
        "spec.analysis.iterations",
        "blue/green and A/B rollouts come in a later release; use stepWeight",
    );
    refuse(
        !analysis.r#match.is_empty(),
        "spec.analysis.match",
        "A/B rollouts come in a later release; use stepWeight",
    );
    refuse(
        analysis.mirror == Some(true),
        "spec.analysis.mirror",
        "mirroring comes in a later release",
    );
    refuse(
        analysis.session_affinity.is_some(),
        "spec.analysis.sessionAffinity",
        "session affinity comes in a later release",
    );
    refuse(
        !analysis.webhooks.is_empty(),
        "spec.analysis.webhooks",
        "hooks and gates come in a later release",
    );
    if let Some(service) = &spec.service {
        refuse(
            service.app_protocol.as_deref() == Some("tcp"),
            "spec.service.appProtocol",
            "TCP routes come in a later release",
        );
        refuse(
            service.delegation == Some(true) && !(service.hosts.is_empty() && service.gateways.is_empty()),
            "spec.service.delegation",
            "a delegate has neither hosts nor gateways; remove them",
        );
    }
    let mut ignore = |present: bool, path: &str, reason: &str| {
        if present {
            fields.push(Field::ignored(path, reason));
        }
    };
    ignore(
        !analysis.alerts.is_empty(),
        "spec.analysis.alerts",
        "alerts come in a later release; events tell the same",
    );
    ignore(
        spec.metrics_server.is_some(),
        "spec.metricsServer",
        "the built-in metrics are the mesh's own counts",
    );
    ignore(
        analysis.mirror_weight.is_some(),
        "spec.analysis.mirrorWeight",
        "mirroring comes in a later release",
    );
    ignore(
        spec.ingress_ref.is_some(),
        "spec.ingressRef",
        "it belongs to other providers",
    );
    ignore(
        spec.route_ref.is_some(),
        "spec.routeRef",
        "it belongs to other providers",
    );
    ignore(
        spec.upstream_ref.is_some(),
        "spec.upstreamRef",
        "it belongs to other providers",
    );
    if let Some(service) = &spec.service {
        ignore(
            !service.gateway_refs.is_empty(),
            "spec.service.gatewayRefs",
            "they belong to the provider gatewayapi",
        );
        ignore(
            !service.mirror.is_empty(),
            "spec.service.mirror",
            "it belongs to the provider gatewayapi",
        );
        ignore(
            service.backend_timeout.is_some(),
            "spec.service.backendTimeout",
            "it belongs to the provider gatewayapi",
        );
        ignore(
            service.mesh_name.is_some(),
            "spec.service.meshName",
            "it belongs to App Mesh",
        );
        ignore(
            !service.backends.is_empty(),
            "spec.service.backends",
            "they belong to App Mesh",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan(analysis: serde_json::Value) -> Plan {
        let spec = json!({
            "targetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "podinfo"},
            "service": {"port": 9898},
            "analysis": analysis,
        });
        Plan::new(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn steps_are_those_that_flagger_takes() {
        for (analysis, steps) in [
            (json!({"stepWeight": 25, "maxWeight": 50}), vec![25, 50]),
            (json!({"stepWeight": 30, "maxWeight": 50}), vec![30, 60]),
            (json!({"stepWeight": 40}), vec![40, 80, 100]),
            (
                json!({"stepWeights": [5, 20, 60], "maxWeight": 50}),
                vec![5, 20, 60],
            ),
        ] {
            let plan = plan(analysis.clone());
            assert_eq!((plan.steps, plan.unhonoured), (steps, vec![]), "{analysis}");
        }
    }

    #[test]
    fn an_analysis_without_a_step_is_refused_because_it_would_never_end() {
        assert!(plan(json!({"iterations": 0})).is_refused());
        assert!(plan(json!({"stepWeights": [50, 20]})).is_refused());
    }

    #[test]
    fn intervals_below_ten_seconds_are_honoured() {
        assert_eq!(
            plan(json!({"stepWeight": 5, "interval": "2s"})).interval,
            Duration::from_secs(2)
        );
        assert_eq!(plan(json!({"stepWeight": 5})).interval, Duration::from_secs(60));
    }

    #[test]
    fn the_deprecated_threshold_of_a_metric_is_a_minimum_of_rates_and_a_maximum_of_durations() {
        let plan = plan(json!({"stepWeight": 5, "metrics": [
            {"name": "request-success-rate", "threshold": 99},
            {"name": "request-duration", "threshold": 500, "interval": "30s"}]}));
        assert_eq!(plan.metrics[0].range.min, Some(99.0));
        assert_eq!(plan.metrics[1].range.max, Some(500.0));
        assert_eq!(plan.metrics[1].window, Duration::from_secs(30));
    }

    #[test]
    fn strategies_that_come_later_are_refused_by_name() {
        for (analysis, path) in [
            (json!({"iterations": 5}), "spec.analysis.iterations"),
            (json!({"stepWeight": 5, "mirror": true}), "spec.analysis.mirror"),
            (
                json!({"stepWeight": 5, "match": [{"headers": {"x": {"exact": "y"}}}]}),
                "spec.analysis.match",
            ),
            (
                json!({"stepWeight": 5, "sessionAffinity": {"cookieName": "c"}}),
                "spec.analysis.sessionAffinity",
            ),
            (
                json!({"stepWeight": 5, "webhooks": [{"name": "h", "url": "http://h"}]}),
                "spec.analysis.webhooks",
            ),
            (
                json!({"stepWeight": 5, "metrics": [{"name": "x", "query": "q", "threshold": 1}]}),
                "spec.analysis.metrics[0].query",
            ),
            (
                json!({"stepWeight": 5, "metrics": [{"name": "x"}]}),
                "spec.analysis.metrics[0].name",
            ),
            (
                json!({"stepWeight": 5, "interval": "soon"}),
                "spec.analysis.interval",
            ),
        ] {
            let plan = plan(analysis);
            assert!(plan.is_refused(), "{path}");
            assert!(
                plan.unhonoured.iter().any(|field| field.path == path),
                "{path}: {:?}",
                plan.unhonoured
            );
        }
    }

    #[test]
    fn alerts_are_named_as_not_honoured_without_stopping_the_rollout() {
        let plan = plan(json!({"stepWeight": 5, "alerts": [{"name": "a", "providerRef": {"name": "p"}}]}));
        assert!(!plan.is_refused());
        assert_eq!(plan.unhonoured[0].path, "spec.analysis.alerts");
    }
}
