//! What a service said about a request that passes whatever it says (`shadow_mode`), and how it was asked
//! (`emit_filter_state_stats`), for later filters and the log.

use std::time::Duration;

use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};
use serin_xds::pb::google::protobuf::Struct;

use super::{Denied, Field};
use crate::policy::filter_state::Report;
use crate::policy::metadata::text;

/// Behind the filter's name, the key of the decision.
const SUFFIX: &str = ".shadow";

/// A decision that nobody has enforced (`ShadowDecision`).
#[derive(Debug)]
pub struct Decision<'a> {
    /// What the service decided.
    result: &'static str,
    /// What the client would have got.
    status: StatusCode,
    /// Fields of a denial.
    fields: &'a [Field],
    /// Whether its status is one of the fields, as in answers over HTTP.
    status_field: bool,
}

impl<'a> Decision<'a> {
    /// The request passes.
    pub const ALLOWED: Self = Self {
        result: "OK",
        status: StatusCode::OK,
        fields: &[],
        status_field: false,
    };

    /// It would have been denied.
    pub fn denied(denied: &'a Denied, over_http: bool) -> Self {
        Self {
            result: "DENIED",
            status: denied.status,
            fields: &denied.headers,
            status_field: over_http,
        }
    }

    /// It would have been denied without being asked about.
    pub fn unasked(status: StatusCode) -> Self {
        Self {
            result: "DENIED",
            status,
            ..Self::ALLOWED
        }
    }

    /// The service has failed.
    pub fn failed(status: StatusCode) -> Self {
        Self {
            result: "ERROR",
            status,
            ..Self::ALLOWED
        }
    }

    /// As it is kept, for the filter of that name.
    pub fn report(&self, filter: &str) -> Report {
        let status = self.status.as_u16();
        let own = self
            .status_field
            .then(|| json!({ "key": ":status", "value": status.to_string() }));
        let others = self
            .fields
            .iter()
            .map(|(name, value, _)| json!({ "key": name.as_str(), "value": lossy(value) }));
        let fields: Vec<Value> = own.into_iter().chain(others).collect();
        let list = |name: &str| {
            if fields.is_empty() {
                return String::new();
            }
            format!(",\"{name}\":{}", Value::from(fields.clone()))
        };
        let written = |result: &str, code: &str, name: &str| {
            let list = list(name);
            format!("{{\"{result}\":\"{}\",\"{code}\":{status}{list}}}", self.result).into()
        };
        Report {
            key: format!("{filter}{SUFFIX}").into(),
            plain: Some(written("check_result", "status_code", "response_headers")),
            typed: Some(written("checkResult", "statusCode", "responseHeaders")),
            fields: Struct {
                fields: [
                    ("check_result".to_owned(), text(self.result)),
                    ("status_code".to_owned(), text(status.to_string())),
                ]
                .into(),
            },
        }
    }
}

fn lossy(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}

/// How a service was asked.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// How long it took.
    pub took: Duration,
    /// Bytes of question and answer over gRPC: the messages with the five bytes before each.
    pub bytes: Option<(usize, usize)>,
}

impl Asked {
    /// As it is kept, for the filter of that name. It has fields, and no text of its own.
    pub fn report(&self, filter: &str) -> Report {
        let mut fields = vec![("latency_us".to_owned(), text(self.took.as_micros().to_string()))];
        if let Some((sent, received)) = self.bytes {
            fields.push(("bytesSent".to_owned(), text(sent.to_string())));
            fields.push(("bytesReceived".to_owned(), text(received.to_string())));
        }
        Report {
            key: filter.into(),
            plain: None,
            typed: None,
            fields: Struct {
                fields: fields.into_iter().collect(),
            },
        }
    }
}
