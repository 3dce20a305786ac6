//! Events of events.k8s.io/v1, which demand more of whoever reports than those of core/v1.

use serde_json::{Value, json};

use crate::error::{FieldError, FieldErrorKind};
use crate::meta;
use crate::names;

/// Longest instance, action and reason, and longest note, in bytes.
const WORD_MAX: usize = 128;
const NOTE_MAX: usize = 1024;

/// A new Event.
pub(super) fn check(object: &Value, errors: &mut Vec<FieldError>) {
    if meta::at(object, "eventTime").is_none_or(Value::is_null) {
        errors.push(FieldError::required("eventTime", ""));
    }
    let text = |field: &str| meta::str_at(object, field);
    let controller = text("reportingController");
    if controller.is_empty() {
        errors.push(FieldError::required("reportingController", ""));
    }
    for error in names::qualified_name_errors(controller) {
        errors.push(FieldError::invalid(
            "reportingController",
            &json!(controller),
            error,
        ));
    }
    for (field, longest) in [
        ("reportingInstance", WORD_MAX),
        ("action", WORD_MAX),
        ("reason", WORD_MAX),
        ("note", NOTE_MAX),
    ] {
        let length = text(field).len();
        if length == 0 && field != "note" {
            errors.push(FieldError::required(field, ""));
        }
        if length > longest {
            errors.push(FieldError::plain(
                FieldErrorKind::Invalid,
                if field == "note" { "message" } else { field },
                &format!("can have at most {longest} characters"),
            ));
        }
    }
    let kind = text("type");
    if !matches!(kind, "Normal" | "Warning") {
        let said = format!("has invalid value: {kind}");
        errors.push(FieldError::invalid("type", &json!(""), said));
    }
    for field in ["deprecatedFirstTimestamp", "deprecatedLastTimestamp"] {
        if let Some(given) = meta::at(object, field).filter(|at| !at.is_null()) {
            let core = field.trim_start_matches("deprecated");
            let core = core.replacen(['F', 'L'], if core.starts_with('F') { "f" } else { "l" }, 1);
            errors.push(FieldError::invalid(core, given, "needs to be unset"));
        }
    }
    if meta::at(object, "deprecatedCount")
        .and_then(Value::as_i64)
        .unwrap_or(0)
        != 0
    {
        let given = meta::at(object, "deprecatedCount").unwrap_or(&Value::Null);
        errors.push(FieldError::invalid("count", given, "needs to be unset"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_event_says_who_reports_what_was_done_and_of_which_type() {
        let found = |event: Value| {
            let mut errors = Vec::new();
            check(&event, &mut errors);
            errors.iter().map(|e| e.field.clone()).collect::<Vec<_>>()
        };
        let good = json!({"eventTime": "2026-01-01T00:00:00.000000Z", "reportingController": "x.example/c", "reportingInstance": "i",
            "action": "Do", "reason": "Because", "type": "Normal", "note": "so"});
        assert_eq!(found(good.clone()), Vec::<String>::new());
        let mut without = good.clone();
        without["action"] = json!("");
        without["type"] = json!("Odd");
        assert_eq!(found(without), ["action", "type"]);
        let mut old = good;
        old["deprecatedFirstTimestamp"] = json!("2026-01-01T00:00:00Z");
        old["note"] = json!("n".repeat(1025));
        assert_eq!(found(old), ["message", "firstTimestamp"]);
    }
}
