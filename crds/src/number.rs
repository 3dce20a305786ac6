//! Numbers as Go writes them: a float without a fraction is written as an integer (`99`, not `99.0`).

use serde::{Serialize, Serializer};

/// The largest magnitude below which every integer is exact in an `f64`.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Serializes a float.
#[allow(clippy::trivially_copy_pass_by_ref)] // serde calls it with a reference
pub(crate) fn plain<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    optional(&Some(*value), serializer)
}

/// Serializes an optional float; to be used with `skip_serializing_if = "Option::is_none"`.
#[allow(clippy::trivially_copy_pass_by_ref)] // serde calls it with a reference
pub(crate) fn optional<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(whole) if whole.fract() == 0.0 && whole.abs() < EXACT => (*whole as i64).serialize(serializer),
        other => other.serialize(serializer),
    }
}
