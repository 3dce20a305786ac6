//! Columns of the built-in kinds, as Kubernetes prints them.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::Heading;
use crate::kinds::Kind;
use crate::{meta, time};

const NAME: Heading = ("Name", "string", "name", 0);
const AGE: Heading = ("Age", "string", "", 0);

pub(crate) fn headings(kind: &Kind) -> &'static [Heading] {
    match (&*kind.group, &*kind.plural) {
        ("", "pods") => &[
            NAME,
            ("Ready", "string", "", 0),
            ("Status", "string", "", 0),
            ("Restarts", "string", "", 0),
            AGE,
            ("IP", "string", "", 1),
            ("Node", "string", "", 1),
            ("Nominated Node", "string", "", 1),
            ("Readiness Gates", "string", "", 1),
        ],
        _ => &[NAME, ("Created At", "date", "", 0)],
    }
}

pub(crate) fn cells(_kind: &Kind, object: &Value, _now: Timestamp) -> Vec<Value> {
    vec![
        json!(meta::name(object)),
        json!(meta::text(object, "creationTimestamp")),
    ]
}

pub(crate) fn pod_row_conditions(_pod: &Value) -> Option<Value> {
    None
}

fn age(object: &Value, now: Timestamp) -> Value {
    match time::parse(meta::text(object, "creationTimestamp")) {
        Some(at) => json!(time::human((now - at).get_seconds())),
        None => json!("<unknown>"),
    }
}
