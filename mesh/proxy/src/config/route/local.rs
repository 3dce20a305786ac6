//! Routes that the proxy answers itself: redirects and direct responses.

use bytes::Bytes;
use http::StatusCode;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;

use super::{Direct, Redirect, Rewrite, substitution};
use crate::error::{Refusal, Within};

/// Direct response bodies above this are refused (Envoy's default is 4 KiB, Istio sends 1 MiB).
const MAX_DIRECT_RESPONSE: usize = 1 << 20;

impl Redirect {
    pub(super) fn compile(from: &route::RedirectAction) -> Result<Self, Refusal> {
        use route::redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier};
        let status = match RedirectResponseCode::try_from(from.response_code) {
            Ok(RedirectResponseCode::MovedPermanently) => StatusCode::MOVED_PERMANENTLY,
            Ok(RedirectResponseCode::Found) => StatusCode::FOUND,
            Ok(RedirectResponseCode::SeeOther) => StatusCode::SEE_OTHER,
            Ok(RedirectResponseCode::TemporaryRedirect) => StatusCode::TEMPORARY_REDIRECT,
            Ok(RedirectResponseCode::PermanentRedirect) => StatusCode::PERMANENT_REDIRECT,
            Err(_) => {
                return Err(Refusal::new(
                    "response_code",
                    format!("{} is unknown", from.response_code),
                ));
            }
        };
        let path = match &from.path_rewrite_specifier {
            None => None,
            Some(PathRewriteSpecifier::PathRedirect(path) | PathRewriteSpecifier::PathRewrite(path)) => {
                Some(Rewrite::Full(path.as_str().into()))
            }
            Some(PathRewriteSpecifier::PrefixRewrite(prefix)) => {
                Some(Rewrite::Prefix(prefix.as_str().into()))
            }
            Some(PathRewriteSpecifier::RegexRewrite(regex)) => {
                let (regex, with) = substitution(regex).within("regex_rewrite")?;
                Some(Rewrite::Regex(regex, with))
            }
        };
        Ok(Self {
            status,
            scheme: match &from.scheme_rewrite_specifier {
                Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some("https".into()),
                Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => Some(scheme.as_str().into()),
                Some(SchemeRewriteSpecifier::HttpsRedirect(false)) | None => None,
            },
            host: (!from.host_redirect.is_empty()).then(|| from.host_redirect.as_str().into()),
            port: match from.port_redirect {
                0 => None,
                port => Some(
                    u16::try_from(port)
                        .map_err(|_| Refusal::new("port_redirect", format!("{port} is not a port")))?,
                ),
            },
            path,
            strip_query: from.strip_query,
        })
    }
}

impl Direct {
    pub(super) fn compile(from: &route::DirectResponseAction) -> Result<Self, Refusal> {
        use core::data_source::Specifier;
        if from.body_format.is_some() {
            return Err(Refusal::new("body_format", "not supported"));
        }
        let status = u16::try_from(from.status)
            .ok()
            .filter(|code| (200..600).contains(code))
            .and_then(|code| StatusCode::from_u16(code).ok())
            .ok_or_else(|| Refusal::new("status", format!("{} is not 200 to 599", from.status)))?;
        let body = match from.body.as_ref().and_then(|body| body.specifier.as_ref()) {
            None => Bytes::new(),
            Some(Specifier::InlineBytes(bytes)) => Bytes::copy_from_slice(bytes),
            Some(Specifier::InlineString(text)) => Bytes::copy_from_slice(text.as_bytes()),
            Some(Specifier::Filename(_) | Specifier::EnvironmentVariable(_)) => {
                return Err(Refusal::new("body", "only inline bodies are supported"));
            }
        };
        if body.len() > MAX_DIRECT_RESPONSE {
            return Err(Refusal::new(
                "body",
                format!("is longer than {MAX_DIRECT_RESPONSE} bytes"),
            ));
        }
        Ok(Self { status, body })
    }
}
