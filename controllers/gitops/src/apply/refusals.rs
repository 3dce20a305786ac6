//! What the API server refuses, and how it is told: which refusals allow a recreation, and no Secret's values in messages.

use crate::error::{Error, is_transient, server_words};
use crate::key::ObjectId;

/// Only the server's own words for immutability count: other invalid values must not delete anything.
pub(super) fn is_immutable(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => {
            let message = status.message.to_ascii_lowercase();
            (status.code == 422 || status.code == 409 || status.code == 400 || status.code == 403)
                && (message.contains("is immutable")
                    || message.contains("immutable field")
                    || message.contains("updates to") && message.contains("are forbidden"))
        }
        _ => false,
    }
}

pub(super) fn object_error(
    id: &ObjectId,
    action: &'static str,
    origin: Option<&str>,
    error: &kube::Error,
) -> Error {
    let mut reason = server_words(error);
    if id.group.is_empty() && id.kind == "Secret" {
        reason = without_secret_values(&reason);
    }
    Error::Object {
        object: id.to_string(),
        action,
        reason,
        origin: origin.map(str::to_owned),
        transient: is_transient(error),
    }
}

/// API errors may quote the value that they refuse; a Secret's values must not reach a condition.
fn without_secret_values(reason: &str) -> String {
    match reason.find("Invalid value:") {
        Some(at) => {
            let rest = &reason[at..];
            let tail = rest.rfind("\": ").map_or("", |t| &rest[t + 1..]);
            format!("{}Invalid value: ***{tail}", &reason[..at])
        }
        None => reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(code: u16, message: &str) -> kube::Error {
        kube::Error::Api(Box::new(kube::core::Status {
            code,
            message: message.into(),
            ..Default::default()
        }))
    }

    #[test]
    fn only_what_the_server_calls_immutable_allows_a_recreation() {
        assert!(is_immutable(&api(
            422,
            "Secret \"s\" is invalid: data: Forbidden: field is immutable when `immutable` is set"
        )));
        assert!(is_immutable(&api(
            422,
            "spec.selector: Invalid value: ...: field is immutable"
        )));
        assert!(is_immutable(&api(422, "updates to parameters are forbidden.")));
        assert!(!is_immutable(&api(
            422,
            "spec.replicas: Invalid value: -1: must be greater than or equal to 0"
        )));
        assert!(!is_immutable(&api(
            403,
            "pods is forbidden: User \"x\" cannot patch"
        )));
        assert!(!is_immutable(&api(500, "is immutable")));
    }

    #[test]
    fn a_secrets_values_do_not_get_into_messages() {
        let id = ObjectId {
            group: String::new(),
            kind: "Secret".into(),
            namespace: "a".into(),
            name: "b".into(),
        };
        let error = object_error(
            &id,
            "apply",
            Some("s.yaml:1"),
            &api(
                422,
                "Secret \"b\" is invalid: data[k]: Invalid value: \"hunter2\": bad",
            ),
        );
        let text = error.to_string();
        assert!(!text.contains("hunter2"), "{text}");
        assert!(
            text.contains("s.yaml:1") && text.ends_with("bad (from s.yaml:1)"),
            "{text}"
        );
    }
}
