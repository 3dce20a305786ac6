//! Services that are asked over HTTP: 200 allows, everything else denies.

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::http::ext_authz::v3 as filter;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::google::protobuf as google;

use super::super::facts::Facts;
use super::super::service::HttpTarget;
use super::{Allowed, Denied, ExtAuthz, Field, How, PARTIAL_BODY, Verdict, any, matchers};
use crate::config::headers::HeaderOps;
use crate::config::matchers::StringMatch;
use crate::config::route::Context;
use crate::error::{Refusal, Within};

/// A compiled `HttpService`.
#[derive(Debug)]
pub struct HttpService {
    /// Where it is.
    pub target: HttpTarget,
    prefix: Box<str>,
    path: Option<Box<str>>,
    request: Option<Box<[StringMatch]>>,
    /// Fields of the question, made of the request's.
    pub add: HeaderOps,
    upstream: Box<[StringMatch]>,
    upstream_append: Box<[StringMatch]>,
    client: Option<Box<[StringMatch]>>,
    client_on_success: Box<[StringMatch]>,
    metadata: Box<[StringMatch]>,
}

/// The fields that are added to a question, each in place of what is there.
fn added(from: Option<&filter::AuthorizationRequest>) -> Result<HeaderOps, Refusal> {
    let options: Vec<_> = from
        .into_iter()
        .flat_map(|request| &request.headers_to_add)
        .map(|header| core::HeaderValueOption {
            header: Some(header.clone()),
            append_action: core::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
            ..Default::default()
        })
        .collect();
    HeaderOps::compile(&options, &[], false)
}

/// Adds a field; one that comes several times is one list.
fn joined(headers: &mut HeaderMap, name: &HeaderName, value: &HeaderValue) {
    let all = headers.get(name).and_then(|before| {
        HeaderValue::from_bytes(&[before.as_bytes(), b",", value.as_bytes()].concat()).ok()
    });
    headers.insert(name.clone(), all.unwrap_or_else(|| value.clone()));
}

impl HttpService {
    pub(super) fn compile(from: &filter::HttpService, context: &mut Context<'_>) -> Result<Self, Refusal> {
        let request = from.authorization_request.as_ref();
        let response = from.authorization_response.as_ref();
        let of_response = |list: Option<&matcher::ListStringMatcher>, field: &str| {
            matchers(list, field).within("authorization_response")
        };
        if from.retry_policy.is_some() {
            return Err(Refusal::new("retry_policy", "not supported"));
        }
        if !from.path_prefix.is_empty() && !from.path_override.is_empty() {
            return Err(Refusal::new(
                "path_override",
                "cannot be combined with path_prefix",
            ));
        }
        Ok(Self {
            target: HttpTarget::compile(from.server_uri.as_ref(), context).within("server_uri")?,
            prefix: from.path_prefix.as_str().into(),
            path: (!from.path_override.is_empty()).then(|| from.path_override.as_str().into()),
            request: matchers(
                request.and_then(|request| request.allowed_headers.as_ref()),
                "allowed_headers",
            )
            .within("authorization_request")?,
            add: added(request).within("authorization_request.headers_to_add")?,
            upstream: of_response(
                response.and_then(|response| response.allowed_upstream_headers.as_ref()),
                "allowed_upstream_headers",
            )?
            .unwrap_or_default(),
            upstream_append: of_response(
                response.and_then(|response| response.allowed_upstream_headers_to_append.as_ref()),
                "allowed_upstream_headers_to_append",
            )?
            .unwrap_or_default(),
            client: of_response(
                response.and_then(|response| response.allowed_client_headers.as_ref()),
                "allowed_client_headers",
            )?,
            client_on_success: of_response(
                response.and_then(|response| response.allowed_client_headers_on_success.as_ref()),
                "allowed_client_headers_on_success",
            )?
            .unwrap_or_default(),
            metadata: of_response(
                response.and_then(|response| response.dynamic_metadata_from_headers.as_ref()),
                "dynamic_metadata_from_headers",
            )?
            .unwrap_or_default(),
        })
    }

    /// The request to the service. `added` is what [`Self::add`] has made.
    pub fn question(
        &self,
        facts: &Facts<'_>,
        body: Bytes,
        authz: &ExtAuthz,
        partial: Option<bool>,
        added: HeaderMap,
    ) -> Option<Request<Bytes>> {
        let request = facts.request.as_ref()?;
        let path = match (&self.path, request.query) {
            (Some(path), _) => path.to_string(),
            (None, None) => format!("{}{}", self.prefix, request.path),
            (None, Some(query)) => format!("{}{}?{query}", self.prefix, request.path),
        };
        let mut out = Request::new(body);
        *out.method_mut() = request.method.parse().ok()?;
        *out.uri_mut() = Uri::from(path.parse::<PathAndQuery>().ok()?);
        let headers = out.headers_mut();
        for (name, value) in request.headers {
            let text = name.as_str();
            let wanted = match (&authz.allowed, &self.request) {
                (None, None) => false,
                (filter, own) => {
                    filter.as_deref().is_some_and(|list| any(list, text))
                        || own.as_deref().is_some_and(|list| any(list, text))
                }
            };
            let is_host = *name == header::HOST;
            let always = *name == header::AUTHORIZATION || is_host;
            // The host has another name in Envoy, by which alone it is left out.
            let left_out = any(&authz.disallowed, if is_host { ":authority" } else { text });
            let ours = name.as_str() == PARTIAL_BODY;
            let framing = *name == header::CONTENT_LENGTH || *name == header::TRANSFER_ENCODING;
            if (wanted || always) && !framing && !ours && !left_out {
                joined(headers, name, value);
            }
        }
        headers
            .entry(header::HOST)
            .or_insert_with(|| self.target.authority.clone());
        for (name, value) in &added {
            headers.insert(name.clone(), value.clone());
        }
        // Envoy says so of everything that it asks for itself.
        headers.insert("x-envoy-internal", HeaderValue::from_static("true"));
        let left = u64::try_from(self.target.timeout.as_millis()).unwrap_or(u64::MAX);
        headers.insert("x-envoy-expected-rq-timeout-ms", HeaderValue::from(left));
        if let Some(partial) = partial {
            headers.insert(
                PARTIAL_BODY,
                HeaderValue::from_static(if partial { "true" } else { "false" }),
            );
        }
        if out.body().is_empty() && out.method() != http::Method::GET && out.method() != http::Method::HEAD {
            out.headers_mut()
                .insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        Some(out)
    }

    /// What an answer means.
    pub fn read(&self, head: &http::response::Parts, body: Bytes) -> Verdict {
        let hop = |name: &HeaderName| {
            *name == header::CONNECTION
                || *name == header::TRANSFER_ENCODING
                || *name == header::CONTENT_LENGTH
        };
        let fields = |matchers: &[StringMatch], how: How| -> Vec<Field> {
            head.headers
                .iter()
                .filter(|(name, _)| !hop(name) && any(matchers, name.as_str()))
                .map(|(name, value)| (name.clone(), value.clone(), how))
                .collect()
        };
        let mut metadata = google::Struct::default();
        for (name, value) in &head.headers {
            if any(&self.metadata, name.as_str()) {
                let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
                metadata
                    .fields
                    .insert(name.to_string(), crate::policy::metadata::text(text));
            }
        }
        let metadata = (!metadata.fields.is_empty()).then_some(metadata);
        if head.status == StatusCode::OK {
            let mut set = fields(&self.upstream, How::Set);
            set.extend(fields(&self.upstream_append, How::Append));
            return Verdict::Allowed(Box::new(Allowed {
                set,
                response: fields(&self.client_on_success, How::Append)
                    .into_iter()
                    .map(|(name, value, how)| {
                        // Of these an answer has one.
                        let one = matches!(name, header::CONTENT_TYPE | header::LOCATION);
                        (name, value, if one { How::Set } else { how })
                    })
                    .collect(),
                metadata,
                ..Default::default()
            }));
        }
        if head.status.is_server_error() {
            return Verdict::Failed;
        }
        let headers = head
            .headers
            .iter()
            .filter(|(name, _)| {
                let always = matches!(**name, header::WWW_AUTHENTICATE | header::LOCATION);
                !hop(name)
                    && self
                        .client
                        .as_deref()
                        .is_none_or(|list| always || any(list, name.as_str()))
            })
            .map(|(name, value)| (name.clone(), value.clone(), How::Append))
            .collect();
        Verdict::Denied(Box::new(Denied {
            status: head.status,
            headers,
            body,
            metadata,
        }))
    }
}
