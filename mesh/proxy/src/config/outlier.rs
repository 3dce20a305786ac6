//! Rules of outlier detection.

use std::time::Duration;

use serin_xds::pb::envoy::config::cluster::v3 as cluster;

use super::convert;
use crate::error::{Refusal, Within};

/// Outlier detection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlier {
    /// 5xx in a row; `None` when not enforced.
    pub consecutive_5xx: Option<u32>,
    /// Gateway errors in a row.
    pub consecutive_gateway: Option<u32>,
    /// Local failures in a row (split mode only).
    pub consecutive_local: Option<u32>,
    /// Local failures are counted apart.
    pub split_local: bool,
    /// First ejection.
    pub base_ejection: Duration,
    /// Longest ejection.
    pub max_ejection: Duration,
    /// Of all hosts.
    pub max_ejection_percent: u32,
    /// One host may always be ejected.
    pub always_one: bool,
    /// How often hosts are compared with each other.
    pub interval: Duration,
    /// A host whose success rate is that far below the others'.
    pub success_rate: Option<SuccessRate>,
    /// A host that fails that often.
    pub failure_percentage: Option<FailurePercentage>,
    /// A passed active check ends an ejection.
    pub uneject_on_check: bool,
}

impl Outlier {
    /// Whether hosts are compared with each other at all.
    pub fn compares(&self) -> bool {
        self.success_rate.is_some() || self.failure_percentage.is_some()
    }
}

/// Ejection by success rate: below `mean - stdev * factor` of the hosts with enough requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SuccessRate {
    /// Hosts with enough requests that it takes.
    pub minimum_hosts: u32,
    /// Requests of an interval that it takes.
    pub request_volume: u32,
    /// In thousandths of a standard deviation.
    pub stdev_factor: u32,
    /// Whether it applies to answers, and to local failures (split mode).
    pub enforced: (bool, bool),
}

/// Ejection by failure percentage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailurePercentage {
    /// Percent of failures from which on a host goes.
    pub threshold: u32,
    /// Hosts with enough requests that it takes.
    pub minimum_hosts: u32,
    /// Requests of an interval that it takes.
    pub request_volume: u32,
    /// Whether it applies to answers, and to local failures (split mode).
    pub enforced: (bool, bool),
}

pub(super) fn compile_outlier(from: &cluster::OutlierDetection) -> Result<Outlier, Refusal> {
    let value = |given: &Option<serin_xds::pb::google::protobuf::UInt32Value>, default: u32| {
        given.as_ref().map_or(default, |value| value.value)
    };
    // A counter is enforced with the given probability; ours are enforced always or never.
    let enforced = |threshold: u32, percent: u32| (percent > 0 && threshold > 0).then_some(threshold);
    let split = from.split_external_local_origin_errors;
    let rate = (
        value(&from.enforcing_success_rate, 100) > 0,
        split && value(&from.enforcing_local_origin_success_rate, 100) > 0,
    );
    let percentage = (
        value(&from.enforcing_failure_percentage, 0) > 0,
        split && value(&from.enforcing_failure_percentage_local_origin, 0) > 0,
    );
    let base = convert::timeout(from.base_ejection_time.as_ref())
        .within("base_ejection_time")?
        .unwrap_or(Duration::from_secs(30));
    let max = convert::timeout(from.max_ejection_time.as_ref())
        .within("max_ejection_time")?
        .unwrap_or(Duration::from_secs(300).max(base));
    Ok(Outlier {
        consecutive_5xx: enforced(
            value(&from.consecutive_5xx, 5),
            value(&from.enforcing_consecutive_5xx, 100),
        ),
        consecutive_gateway: enforced(
            value(&from.consecutive_gateway_failure, 5),
            value(&from.enforcing_consecutive_gateway_failure, 0),
        ),
        consecutive_local: enforced(
            value(&from.consecutive_local_origin_failure, 5),
            value(&from.enforcing_consecutive_local_origin_failure, 100),
        ),
        split_local: from.split_external_local_origin_errors,
        base_ejection: base,
        max_ejection: max,
        max_ejection_percent: value(&from.max_ejection_percent, 10).min(100),
        always_one: from
            .always_eject_one_host
            .as_ref()
            .is_some_and(|value| value.value),
        interval: convert::timeout(from.interval.as_ref())
            .within("interval")?
            .unwrap_or(Duration::from_secs(10)),
        success_rate: (rate.0 || rate.1).then(|| SuccessRate {
            minimum_hosts: value(&from.success_rate_minimum_hosts, 5),
            request_volume: value(&from.success_rate_request_volume, 100),
            stdev_factor: value(&from.success_rate_stdev_factor, 1900),
            enforced: rate,
        }),
        failure_percentage: (percentage.0 || percentage.1).then(|| FailurePercentage {
            threshold: value(&from.failure_percentage_threshold, 85),
            minimum_hosts: value(&from.failure_percentage_minimum_hosts, 5),
            request_volume: value(&from.failure_percentage_request_volume, 50),
            enforced: percentage,
        }),
        uneject_on_check: from
            .successful_active_health_check_uneject_host
            .as_ref()
            .is_none_or(|value| value.value),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istios_outlier_detection_without_fields_ejects_after_five_5xx() {
        let outlier = compile_outlier(&cluster::OutlierDetection {
            enforcing_success_rate: Some(serin_xds::pb::google::protobuf::UInt32Value { value: 0 }),
            ..Default::default()
        })
        .unwrap();
        assert_eq!(outlier.consecutive_5xx, Some(5));
        assert_eq!(outlier.consecutive_gateway, None);
        assert_eq!(outlier.max_ejection_percent, 10);
    }
}
