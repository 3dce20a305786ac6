//! The fields that both shapes of a balancing policy have, with their defaults and limits.

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::r#type::v3 as envoy_type;
use serin_xds::pb::google::protobuf as google;

use super::{Hashing, LbPolicy, PLAIN_BIAS, RingFunction, SlowStart};
use crate::config::convert::{self, Fraction};
use crate::error::{Refusal, Within};

/// Envoy's least number of hosts for which zones count.
pub(super) const DEFAULT_MIN_CLUSTER_SIZE: u64 = 6;
/// Points of a ring at most (Envoy's limit).
const MAX_RING: u64 = 8 << 20;
/// Points of a ring at least, unless told otherwise (Envoy).
const DEFAULT_RING: u64 = 1024;
/// Entries of a Maglev table at most (Envoy's limit).
const MAX_MAGLEV: u64 = 5_000_011;
pub(super) fn percent(from: Option<&envoy_type::Percent>) -> Fraction {
    from.map_or(Fraction::ALL, |percent| Fraction::of_percent(percent.value))
}

pub(super) fn wide(from: Option<&google::UInt64Value>, default: u64) -> u64 {
    from.map_or(default, |value| value.value)
}

pub(super) fn choice_count(from: Option<&google::UInt32Value>) -> u32 {
    from.map_or(2, |count| count.value.clamp(2, 16))
}

/// Beyond that the least busy host is all that counts anyway.
const MAX_BIAS: f64 = 100.0;

/// The power of the requests on their way that is set against a host's weight, in thousandths.
pub(super) fn compile_bias(from: Option<&core::RuntimeDouble>) -> Result<u32, Refusal> {
    match from {
        None => Ok(PLAIN_BIAS),
        Some(bias) if (0.0..=MAX_BIAS).contains(&bias.default_value) => {
            Ok((bias.default_value * 1000.0).round() as u32)
        }
        Some(bias) => Err(Refusal::new(
            "active_request_bias",
            format!("{} is not between 0 and {MAX_BIAS}", bias.default_value),
        )),
    }
}

pub(super) fn ring(
    minimum: Option<&google::UInt64Value>,
    maximum: Option<&google::UInt64Value>,
    function: RingFunction,
) -> Result<LbPolicy, Refusal> {
    let (minimum, maximum) = (wide(minimum, DEFAULT_RING), wide(maximum, MAX_RING));
    for (field, size) in [("minimum_ring_size", minimum), ("maximum_ring_size", maximum)] {
        if size > MAX_RING {
            return Err(Refusal::new(field, format!("{size} is above {MAX_RING}")));
        }
    }
    if minimum > maximum {
        return Err(Refusal::new(
            "minimum_ring_size",
            format!("{minimum} is above the maximum, {maximum}"),
        ));
    }
    Ok(LbPolicy::RingHash {
        minimum,
        maximum,
        function,
    })
}

pub(super) fn maglev(size: Option<&google::UInt64Value>) -> Result<LbPolicy, Refusal> {
    let size = wide(size, 65_537);
    let is_prime = size > 1 && (2..=size.isqrt()).all(|divisor| !size.is_multiple_of(divisor));
    if !is_prime || size > MAX_MAGLEV {
        return Err(Refusal::new(
            "table_size",
            format!("{size} is not a prime of at most {MAX_MAGLEV}"),
        ));
    }
    Ok(LbPolicy::Maglev { size })
}

pub(super) fn hashing(by_hostname: bool, factor: Option<&google::UInt32Value>) -> Result<Hashing, Refusal> {
    let balance_factor = factor.map(|factor| factor.value);
    if balance_factor.is_some_and(|factor| factor < 100) {
        return Err(Refusal::new("hash_balance_factor", "is below 100"));
    }
    Ok(Hashing {
        by_hostname,
        balance_factor,
    })
}

pub(super) fn slow_start(
    window: Option<&google::Duration>,
    aggression: Option<&core::RuntimeDouble>,
    least: Option<&envoy_type::Percent>,
) -> Result<Option<SlowStart>, Refusal> {
    let Some(window) = convert::timeout(window).within("slow_start_window")? else {
        return Ok(None);
    };
    let aggression = aggression.map_or(1.0, |value| value.default_value);
    if !(aggression.is_finite() && aggression > 0.0) {
        return Err(Refusal::new(
            "aggression",
            format!("{aggression} is not above zero"),
        ));
    }
    Ok(Some(SlowStart {
        window,
        aggression,
        least: least.map_or(0.1, |percent| (percent.value / 100.0).clamp(0.0, 1.0)),
    }))
}
