//! Header fields that must not travel through a proxy (RFC 9110 section 7.6.1).

use http::{HeaderMap, HeaderName, HeaderValue, header};

static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
static PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Fields that a `Connection` field may not take away: they say where and what the message is.
const PROTECTED: [&str; 6] = [
    "host",
    "content-length",
    "content-type",
    "authorization",
    "cookie",
    "date",
];

/// Which of the fields that this proxy treats specially a head holds. One pass over the names is cheaper than looking
/// for each of them, since most heads hold none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Present(u16);

impl Present {
    /// `connection`.
    pub const CONNECTION: Self = Self(1);
    /// Other hop-by-hop fields, but `te`.
    pub const HOP: Self = Self(2);
    /// `te`.
    pub const TE: Self = Self(4);
    /// What HTTP/2 does not know, or only in part (RFC 9113 section 8.2.2).
    pub const NOT_IN_HTTP2: Self = Self(7);
    /// `x-envoy-peer-metadata`, `x-envoy-peer-metadata-id`.
    pub const PEER: Self = Self(8);
    /// `grpc-status`.
    pub const GRPC_STATUS: Self = Self(16);
    /// `x-serin-unprocessed`, `x-serin-response-flags`.
    pub const SERIN: Self = Self(32);
    /// Any field that begins with `x-envoy-` or `x-serin-`.
    pub const OWN: Self = Self(64);
    /// `x-forwarded-client-cert`.
    pub const CLIENT_CERT: Self = Self(128);
    /// `x-forwarded-for`.
    pub const FORWARDED_FOR: Self = Self(256);
    /// `x-forwarded-proto`.
    pub const FORWARDED_PROTO: Self = Self(512);
    /// `x-request-id`.
    pub const REQUEST_ID: Self = Self(1024);

    /// Looks at the names of a head.
    pub fn of(headers: &HeaderMap) -> Self {
        let mut present = 0;
        for name in headers.keys() {
            present |= match name.as_str() {
                "connection" => Self::CONNECTION.0,
                "transfer-encoding" | "upgrade" | "keep-alive" | "proxy-connection" => Self::HOP.0,
                "te" => Self::TE.0,
                "x-envoy-peer-metadata" | "x-envoy-peer-metadata-id" => Self::PEER.0 | Self::OWN.0,
                "grpc-status" => Self::GRPC_STATUS.0,
                "x-serin-unprocessed" | "x-serin-response-flags" => Self::SERIN.0 | Self::OWN.0,
                "x-forwarded-client-cert" => Self::CLIENT_CERT.0,
                "x-forwarded-for" => Self::FORWARDED_FOR.0,
                "x-forwarded-proto" => Self::FORWARDED_PROTO.0,
                "x-request-id" => Self::REQUEST_ID.0,
                name if name.starts_with("x-envoy-") || name.starts_with("x-serin-") => Self::OWN.0,
                _ => 0,
            };
        }
        Self(present)
    }

    /// Whether any of `which` is there.
    pub fn has(self, which: Self) -> bool {
        self.0 & which.0 != 0
    }
}

/// Whether a field has one value in Envoy, where others have a list of them: what comes more than once is joined by commas,
/// which means the same (RFC 9110 section 5.3).
fn is_single(name: &str, of_responses: bool) -> bool {
    match name {
        "cache-control"
        | "content-encoding"
        | "content-type"
        | "via"
        | "proxy-status"
        | "x-request-id"
        | "x-envoy-attempt-count"
        | "x-envoy-decorator-operation" => true,
        "age"
        | "date"
        | "etag"
        | "expires"
        | "last-modified"
        | "location"
        | "server"
        | "vary"
        | "grpc-message"
        | "grpc-status"
        | "access-control-allow-credentials"
        | "access-control-allow-headers"
        | "access-control-allow-methods"
        | "access-control-allow-origin"
        | "access-control-allow-private-network"
        | "access-control-expose-headers"
        | "access-control-max-age"
        | "x-envoy-degraded"
        | "x-envoy-immediate-health-check-fail"
        | "x-envoy-ratelimited"
        | "x-envoy-upstream-canary"
        | "x-envoy-upstream-healthchecked-cluster"
        | "x-envoy-upstream-service-time" => of_responses,
        "accept"
        | "accept-encoding"
        | "authorization"
        | "cdn-loop"
        | "expect"
        | "origin"
        | "pragma"
        | "referer"
        | "te"
        | "user-agent"
        | "grpc-accept-encoding"
        | "grpc-timeout"
        | "if-match"
        | "if-modified-since"
        | "if-none-match"
        | "if-range"
        | "if-unmodified-since"
        | "access-control-request-headers"
        | "access-control-request-method"
        | "access-control-request-private-network"
        | "x-client-trace-id"
        | "x-forwarded-client-cert"
        | "x-forwarded-for"
        | "x-forwarded-host"
        | "x-forwarded-port"
        | "x-forwarded-proto" => !of_responses,
        name => !of_responses && name.starts_with("x-envoy-"),
    }
}

/// Adds a value to a field of a request or of a response.
pub(crate) fn append(headers: &mut HeaderMap, name: &HeaderName, value: HeaderValue, of_responses: bool) {
    if is_single(name.as_str(), of_responses)
        && let Some(before) = headers.get_mut(name)
    {
        if let Some(joined) = joined(before, &value) {
            *before = joined;
        }
        return;
    }
    headers.append(name, value);
}

/// Both values, with a comma between them; nothing where the second says nothing.
fn joined(before: &HeaderValue, value: &HeaderValue) -> Option<HeaderValue> {
    match (before.is_empty(), value.is_empty()) {
        (_, true) => None,
        (true, false) => Some(value.clone()),
        (false, false) => HeaderValue::from_bytes(&[before.as_bytes(), value.as_bytes()].join(&b',')).ok(),
    }
}

/// Joins the values of fields that have only one. Costs nothing where every field comes once.
pub(crate) fn join_repeated(headers: &mut HeaderMap, of_responses: bool) {
    if headers.len() == headers.keys_len() {
        return;
    }
    let repeated: Vec<HeaderName> = headers
        .keys()
        .filter(|name| {
            is_single(name.as_str(), of_responses) && headers.get_all(*name).iter().nth(1).is_some()
        })
        .cloned()
        .collect();
    for name in repeated {
        let mut values = headers.get_all(&name).iter();
        let Some(first) = values.next() else { continue };
        let mut all = first.clone();
        for value in values {
            if let Some(both) = joined(&all, value) {
                all = both;
            }
        }
        headers.insert(name, all);
    }
}

/// Says that a value does not come again, so that HTTP/2 does not enter it into its table: there it would push out what
/// does, and h2 would compare it with every value that its name has had before.
pub(crate) fn never_again(value: &mut HeaderValue) {
    value.set_sensitive(true);
}

/// The protocol that a request asks to upgrade to, lower case, if it does.
pub fn requested_upgrade(headers: &HeaderMap) -> Option<String> {
    let upgrade = headers.get(header::UPGRADE)?;
    connection_has(headers, "upgrade")
        .then(|| upgrade.to_str().ok().map(str::to_ascii_lowercase))
        .flatten()
}

/// Whether the `Connection` field holds `token`.
pub fn connection_has(headers: &HeaderMap, token: &str) -> bool {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|have| have.trim().eq_ignore_ascii_case(token))
}

/// Removes every hop-by-hop field, including those that `Connection` names. `TE: trailers` stays, because gRPC asks
/// for it end to end.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    strip_present(headers, Present::of(headers));
}

/// [`strip_hop_by_hop`] for a head that has been looked at.
pub fn strip_present(headers: &mut HeaderMap, present: Present) {
    let plain = |value: &HeaderValue| {
        let value = value.as_bytes();
        value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close")
    };
    if present.has(Present::CONNECTION) {
        // The usual field names nothing; no list is made then.
        let names = !headers.get_all(header::CONNECTION).iter().all(plain);
        let named: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .take_while(|_| names)
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map(str::trim)
            .filter(|name| {
                !["close", "keep-alive", "upgrade", "te"]
                    .iter()
                    .any(|own| name.eq_ignore_ascii_case(own))
            })
            .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
            .filter(|name| !PROTECTED.contains(&name.as_str()))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    if present.has(Present::HOP) {
        headers.remove(header::TRANSFER_ENCODING);
        headers.remove(header::UPGRADE);
        headers.remove(&KEEP_ALIVE);
        headers.remove(&PROXY_CONNECTION);
    }
    if !present.has(Present::TE) {
        return;
    }
    if let Some(te) = headers.get(header::TE) {
        let trailers = te.to_str().is_ok_and(|value| {
            value
                .split(',')
                .any(|coding| coding.trim().eq_ignore_ascii_case("trailers"))
        });
        if trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        } else {
            headers.remove(header::TE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::given::headers;

    #[test]
    fn hop_by_hop_and_nominated_fields_are_removed_and_te_trailers_stays() {
        let mut headers = headers(&[
            ("connection", "keep-alive, X-Secret, host"),
            ("x-secret", "1"),
            ("host", "a"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "close"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("te", "gzip, trailers"),
            ("accept", "*/*"),
        ]);
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["accept", "host", "te"]);
        assert_eq!(headers["te"], "trailers");
    }

    #[test]
    fn fields_with_one_value_are_joined_by_commas_and_others_stay_apart() {
        let mut headers = headers(&[
            ("x-forwarded-for", "1.2.3.4"),
            ("x-k", "a"),
            ("x-forwarded-for", ""),
            ("x-k", "b"),
            ("x-forwarded-for", "5.6.7.8"),
            ("vary", "a"),
            ("vary", "b"),
            ("accept", "c"),
        ]);
        join_repeated(&mut headers, false);
        let all = |headers: &HeaderMap, name: &str| headers.get_all(name).iter().cloned().collect::<Vec<_>>();
        assert_eq!(all(&headers, "x-forwarded-for"), ["1.2.3.4,5.6.7.8"]);
        assert_eq!(all(&headers, "x-k"), ["a", "b"]);
        assert_eq!(all(&headers, "vary"), ["a", "b"]);
        join_repeated(&mut headers, true);
        assert_eq!(all(&headers, "vary"), ["a,b"]);
        append(
            &mut headers,
            &header::ACCEPT,
            HeaderValue::from_static("d"),
            false,
        );
        assert_eq!(all(&headers, "accept"), ["c,d"]);
        append(&mut headers, &header::ACCEPT, HeaderValue::from_static("e"), true);
        assert_eq!(all(&headers, "accept"), ["c,d", "e"]);
    }

    #[test]
    fn an_upgrade_counts_only_when_connection_names_it() {
        let mut headers = HeaderMap::new();
        headers.insert("upgrade", HeaderValue::from_static("WebSocket"));
        assert_eq!(requested_upgrade(&headers), None);
        headers.insert("connection", HeaderValue::from_static("keep-alive, Upgrade"));
        assert_eq!(requested_upgrade(&headers).as_deref(), Some("websocket"));
    }
}
