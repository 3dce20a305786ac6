//! What of an interim answer (1xx) goes on to a client, and how much of it.

use http::{HeaderMap, header};

/// Bytes of interim answers that are passed on for one request; more are dropped.
pub(crate) const MAX_WAITING: usize = 64 * 1024;
/// Interim answers that are passed on for one request: an endpoint that sends them for ever occupies nobody.
pub(crate) const MAX_PER_REQUEST: u32 = 64;

/// Fields that belong to the connection to the endpoint, or that an answer without content cannot have.
fn stays_behind(name: &header::HeaderName, headers: &HeaderMap) -> bool {
    matches!(
        *name,
        header::CONNECTION
            | header::TRANSFER_ENCODING
            | header::CONTENT_LENGTH
            | header::UPGRADE
            | header::TRAILER
            | header::TE
            | header::PROXY_AUTHENTICATE
            | header::PROXY_AUTHORIZATION
    ) || matches!(
        name.as_str(),
        "keep-alive"
            | "proxy-connection"
            | "x-envoy-peer-metadata"
            | "x-envoy-peer-metadata-id"
            | "x-serin-unprocessed"
    ) || headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|nominated| nominated.trim().eq_ignore_ascii_case(name.as_str()))
}

/// What of an interim answer's head goes on.
pub(crate) fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let mut passed = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers {
        if !stays_behind(name, headers) {
            passed.append(name.clone(), value.clone());
        }
    }
    passed
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn what_belongs_to_the_connection_stays_behind() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("link", "</a>; rel=preload"),
            ("link", "</b>; rel=preload"),
            ("connection", "x-own, close"),
            ("x-own", "1"),
            ("content-length", "3"),
            ("transfer-encoding", "chunked"),
            ("x-envoy-peer-metadata", "abc"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let passed = passed_on(&headers);
        assert_eq!((passed.len(), passed.keys_len()), (2, 1));
        assert!(passed.contains_key("link"));
    }
}
