//! The router filter's own configuration.

use http::{HeaderMap, HeaderName};
use serin_xds::pb::envoy::extensions::filters::http::router::v3 as router;
use serin_xds::pb::google::protobuf::Any;

use super::convert::{self, each, refuse_present};
use super::retry::asked::number;
use super::retry::{RetryOn, RetryPolicy};
use crate::error::Refusal;

const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct RouterOptions {
    /// Fields that begin with `x-envoy-` are added neither to requests nor to responses.
    pub suppress_envoy_headers: bool,
    /// A hop before has said in `x-envoy-expected-rq-timeout-ms` how long there is.
    pub respect_expected_timeout: bool,
    /// Fields whose values must be ones that can be obeyed.
    strict: Box<[HeaderName]>,
}

impl RouterOptions {
    pub(super) fn compile(any: Option<&Any>) -> Result<Self, Refusal> {
        let Some(any) = any else {
            return Ok(Self::default());
        };
        let from: router::Router = convert::unpack(any, ROUTER)?;
        refuse_present(
            &[
                ("upstream_log", !from.upstream_log.is_empty()),
                (
                    "upstream_http_filters",
                    from.upstream_http_filters
                        .iter()
                        .any(|filter| !filter.name.ends_with("upstream_codec")),
                ),
            ],
            "not supported",
        )?;
        Ok(Self {
            suppress_envoy_headers: from.suppress_envoy_headers,
            respect_expected_timeout: from.respect_expected_rq_timeout,
            strict: each(
                &from.strict_check_headers,
                "strict_check_headers",
                |name: &String| match name.as_str() {
                    "x-envoy-upstream-rq-timeout-ms"
                    | "x-envoy-upstream-rq-per-try-timeout-ms"
                    | "x-envoy-max-retries"
                    | "x-envoy-retry-grpc-on"
                    | "x-envoy-retry-on" => HeaderName::from_bytes(name.as_bytes())
                        .map_err(|_| Refusal::new("", format!("{name:?} is not a header name"))),
                    _ => Err(Refusal::new("", format!("{name:?} is not checked"))),
                },
            )?,
        })
    }

    /// The first field whose value cannot be obeyed.
    pub fn disobeyed<'a>(&'a self, headers: &'a HeaderMap) -> Option<(&'a HeaderName, &'a str)> {
        self.strict.iter().find_map(|name| {
            let value = headers.get(name)?;
            let text = value.to_str().ok().unwrap_or("");
            let fine = match name.as_str() {
                "x-envoy-retry-on" => RetryPolicy::knows(text, false),
                "x-envoy-retry-grpc-on" => RetryPolicy::knows(text, true),
                _ => number(value).is_some(),
            };
            (!fine).then_some((name, text))
        })
    }
}

impl RetryPolicy {
    /// Whether every word is a condition, of gRPC or not.
    fn knows(text: &str, grpc: bool) -> bool {
        text.split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty())
            .all(|word| RetryOn::of(word, grpc).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_cannot_be_obeyed_are_found_in_the_fields_that_are_checked() {
        let options = RouterOptions {
            strict: ["x-envoy-retry-on", "x-envoy-max-retries"]
                .map(HeaderName::from_static)
                .into(),
            ..Default::default()
        };
        for (name, value, fine) in [
            ("x-envoy-retry-on", "5xx, connect-failure", true),
            ("x-envoy-retry-on", "5xx,never", false),
            ("x-envoy-retry-on", "cancelled", false),
            ("x-envoy-max-retries", "3", true),
            ("x-envoy-max-retries", "three", false),
            ("x-envoy-retry-grpc-on", "never", true),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            assert_eq!(options.disobeyed(&headers).is_none(), fine, "{name}: {value}");
        }
    }
}
