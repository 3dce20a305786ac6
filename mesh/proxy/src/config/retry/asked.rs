//! What requests ask about retries (`x-envoy-retry-on` and the fields beside it), as Envoy's router obeys it.
//!
//! Who may ask is decided before ([`crate::config::origin`]): of others these fields have been taken off.

use http::HeaderValue;

use super::*;

/// The fields, all of which are taken off.
const RETRY_ON: &str = "x-envoy-retry-on";
const RETRY_GRPC_ON: &str = "x-envoy-retry-grpc-on";
const MAX_RETRIES: &str = "x-envoy-max-retries";
const STATUS_CODES: &str = "x-envoy-retriable-status-codes";
const HEADER_NAMES: &str = "x-envoy-retriable-header-names";
const ALL: [&str; 5] = [RETRY_ON, RETRY_GRPC_ON, MAX_RETRIES, STATUS_CODES, HEADER_NAMES];

impl RetryPolicy {
    /// What is retried where a request asks for something and its route says nothing: what Envoy starts from.
    fn of_requests() -> Self {
        Self {
            on: RetryOn::default(),
            attempts: 1,
            per_try_timeout: None,
            previous_hosts: false,
            hosts: None,
            priorities_every: None,
            host_selection_attempts: 1,
            status_codes: Box::default(),
            response_headers: Box::default(),
            request_headers: Box::default(),
            base_interval: BASE_INTERVAL,
            max_interval: BASE_INTERVAL * 10,
            rate_limited: None,
        }
    }

    /// Whether a field asks something about retries.
    pub fn is_asked_by(name: &str) -> bool {
        ALL.contains(&name)
    }

    /// The route's policy with what the request asks for, whose fields are taken off. Conditions are added to those of the
    /// route, a number stands instead of its number. `None` where nothing is retried.
    pub fn asked(route: Option<&Self>, headers: &mut HeaderMap) -> Option<Self> {
        let [on, grpc_on, max, codes, names] = ALL.map(|name| headers.remove(name));
        // Without a condition of either nothing is retried, whatever else is said.
        if route.is_none() && on.is_none() && grpc_on.is_none() {
            return None;
        }
        let mut policy = route.cloned().unwrap_or_else(Self::of_requests);
        let conditions = |value: &Option<HeaderValue>, grpc: bool| {
            words(value)
                .filter_map(|word| RetryOn::of(word, grpc))
                .fold(RetryOn::default(), |all, one| all | one)
        };
        policy.on = policy.on | conditions(&on, false) | conditions(&grpc_on, true);
        if policy.on == RetryOn::default() {
            return None;
        }
        if let Some(max) = max.as_ref().and_then(number) {
            policy.attempts = u32::try_from(max).unwrap_or(u32::MAX);
        }
        if codes.is_some() {
            let more = words(&codes).filter_map(|code| code.parse().ok());
            policy.status_codes = policy.status_codes.iter().copied().chain(more).collect();
        }
        if names.is_some() {
            let more = words(&names).filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok());
            let own = std::mem::take(&mut policy.response_headers).into_vec();
            policy.response_headers = own.into_iter().chain(more.map(HeaderMatch::present)).collect();
        }
        Some(policy)
    }
}

/// A number as Envoy reads it in these fields.
pub fn number(value: &HeaderValue) -> Option<u64> {
    value.to_str().ok()?.trim().parse().ok()
}

fn words(value: &Option<HeaderValue>) -> impl Iterator<Item = &str> {
    let text = value.as_ref().and_then(|value| value.to_str().ok()).unwrap_or("");
    text.split(',').map(str::trim).filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let mut out = HeaderMap::new();
        for (name, value) in fields {
            out.insert(*name, value.parse().unwrap());
        }
        out
    }

    fn of_route(on: &str, retries: u32) -> RetryPolicy {
        RetryPolicy::compile(&route::RetryPolicy {
            retry_on: on.into(),
            num_retries: Some(serin_xds::pb::google::protobuf::UInt32Value { value: retries }),
            ..Default::default()
        })
        .unwrap()
        .unwrap()
    }

    #[test]
    fn what_a_request_asks_for_is_added_to_what_its_route_retries() {
        let answer = |policy: &RetryPolicy, code: u16, field: Option<&'static str>| {
            let mut fields = HeaderMap::new();
            if let Some(field) = field {
                fields.insert(field, HeaderValue::from_static("1"));
            }
            policy.wants(&Outcome::Response(StatusCode::from_u16(code).unwrap(), &fields))
        };
        let mut asked = headers(&[
            (
                RETRY_ON,
                "gateway-error, retriable-status-codes,retriable-headers,nonsense,unavailable",
            ),
            (MAX_RETRIES, " 7 "),
            (STATUS_CODES, "418, x, 70000"),
            (HEADER_NAMES, "x-again, not a name"),
            ("x-other", "1"),
        ]);
        let policy = RetryPolicy::asked(Some(&of_route("retriable-4xx", 2)), &mut asked).unwrap();
        assert_eq!(asked.len(), 1, "what was asked is taken off");
        assert_eq!(policy.attempts, 7);
        assert!(answer(&policy, 503, None) && answer(&policy, 409, None) && answer(&policy, 418, None));
        assert!(answer(&policy, 200, Some("x-again")));
        assert!(!answer(&policy, 200, Some("x-other")) && !answer(&policy, 500, None));
        assert!(
            !policy.on.has(RetryOn::UNAVAILABLE),
            "that is asked for in another field"
        );
    }

    #[test]
    fn a_request_without_a_condition_of_its_own_or_its_routes_is_not_retried() {
        for fields in [
            &[][..],
            &[(MAX_RETRIES, "3")],
            &[(RETRY_ON, "nonsense")],
            &[(RETRY_GRPC_ON, "5xx")],
            &[(STATUS_CODES, "418")],
        ] {
            assert!(
                RetryPolicy::asked(None, &mut headers(fields)).is_none(),
                "{fields:?}"
            );
        }
        let one = RetryPolicy::asked(None, &mut headers(&[(RETRY_GRPC_ON, "cancelled")])).unwrap();
        assert_eq!((one.attempts, one.on), (1, RetryOn::CANCELLED));
        let mut huge = headers(&[(RETRY_ON, "5xx"), (MAX_RETRIES, "99999999999")]);
        assert_eq!(RetryPolicy::asked(None, &mut huge).unwrap().attempts, u32::MAX);
        let mut wrong = headers(&[(RETRY_ON, "5xx"), (MAX_RETRIES, "-1")]);
        assert_eq!(RetryPolicy::asked(None, &mut wrong).unwrap().attempts, 1);
    }
}
