//! The one way in which a controller says that it read a field that it does not act on.
//!
//! A manifest that asks for something that Serin does not do yet must never look as if it were done. Each controller
//! lists what it met while reading an object; the list becomes the condition [`CONDITION`] on that object, and where
//! ignoring the field would be unsafe the controller refuses the object as well ([`Severity::Refused`]).

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::condition::{self, Status, Wanted};

/// The type of the condition: `True` when every field that is set is acted on.
pub const CONDITION: &str = "FullyHonoured";

/// What follows from a field that is not honoured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object works without it, for example a hint or a display option.
    Ignored,
    /// Acting on the object without this field would do something else than what was asked: the object is refused.
    Refused,
}

/// A field that is set and not honoured.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Field {
    /// Its path, for example `spec.analysis.mirror`.
    pub path: String,
    /// Why not, and what to do instead.
    pub reason: String,
    /// What follows from it.
    pub severity: Severity,
}

impl Field {
    /// A field that the object can live without.
    pub fn ignored(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            reason: reason.into(),
            severity: Severity::Ignored,
        }
    }

    /// A field because of which the object is refused.
    pub fn refused(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            reason: reason.into(),
            severity: Severity::Refused,
        }
    }
}

/// Whether the object must be refused because of these fields.
pub fn refuses(fields: &[Field]) -> bool {
    fields.iter().any(|field| field.severity == Severity::Refused)
}

/// The sentence that names the fields, the refused ones first. Empty when there are none.
pub fn message(fields: &[Field]) -> String {
    let mut sorted: Vec<&Field> = fields.iter().collect();
    sorted.sort_by_key(|field| (std::cmp::Reverse(field.severity), &field.path));
    sorted.dedup();
    sorted
        .iter()
        .map(|field| match field.severity {
            Severity::Refused => format!("{} is refused: {}", field.path, field.reason),
            Severity::Ignored => format!("{} is not honoured: {}", field.path, field.reason),
        })
        .collect::<Vec<_>>()
        .join("; ")
}

/// Writes the condition. With no such fields it is removed, so that ordinary objects look as they do upstream.
/// Returns whether anything changed.
pub fn set(
    conditions: &mut Vec<Condition>,
    fields: &[Field],
    observed_generation: Option<i64>,
    now: Timestamp,
) -> bool {
    if fields.is_empty() {
        return condition::remove(conditions, CONDITION);
    }
    let reason = if refuses(fields) {
        "FieldsRefused"
    } else {
        "FieldsNotHonoured"
    };
    let message = message(fields);
    let wanted = Wanted {
        type_: CONDITION,
        status: Status::False,
        reason,
        message: &message,
        observed_generation,
    };
    condition::set(conditions, &wanted, now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_names_every_field_and_refused_ones_first() {
        let fields = [
            Field::ignored("spec.a", "it is only a hint"),
            Field::refused("spec.z", "it needs a later release; remove it"),
        ];
        let mut conditions = Vec::new();
        assert!(set(&mut conditions, &fields, Some(3), Timestamp::UNIX_EPOCH));
        assert_eq!(conditions[0].type_, CONDITION);
        assert_eq!(conditions[0].reason, "FieldsRefused");
        assert_eq!(
            conditions[0].message,
            "spec.z is refused: it needs a later release; remove it; spec.a is not honoured: it is only a hint"
        );
    }

    #[test]
    fn an_object_that_is_honoured_wholly_carries_no_condition() {
        let mut conditions = Vec::new();
        set(
            &mut conditions,
            &[Field::ignored("spec.a", "x")],
            None,
            Timestamp::UNIX_EPOCH,
        );
        assert!(set(&mut conditions, &[], None, Timestamp::UNIX_EPOCH));
        assert!(conditions.is_empty());
    }
}
