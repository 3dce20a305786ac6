//! What became of one request, and whose doing it was.

use http::{HeaderMap, HeaderName, StatusCode};

/// Response flags (Envoy's words) on answers that a proxy made itself.
pub(crate) const RESPONSE_FLAGS: HeaderName = HeaderName::from_static("x-serin-response-flags");
/// Flag of answers that another proxy made: a status of 500 and above that no application sent.
const UNNAMED: &str = "-";

/// What became of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The status, if there was an answer.
    pub(crate) status: Option<StatusCode>,
    /// Value of the header to group by.
    pub(crate) group: Option<String>,
    /// Who failed it.
    pub(crate) failure: Option<Failure>,
}

/// Whose failure a bad answer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The application answered with a status of 500 or above.
    Application,
    /// Something between failed it: a proxy's response flag (`UF`, `UH`, `NR`, …), or why there was no answer.
    System(String),
}

impl Outcome {
    /// There was no answer; `why` in one word.
    pub(crate) fn no_answer(why: &str) -> Self {
        Self {
            status: None,
            group: None,
            failure: Some(Failure::System(why.to_owned())),
        }
    }

    /// Reads an answer. What a proxy answered by itself carries its response flags; what came from an upstream carries
    /// `x-envoy-upstream-service-time`; without a proxy between, a bad answer can only be the application's.
    pub(crate) fn of_answer(status: StatusCode, headers: &HeaderMap, group_by: Option<&HeaderName>) -> Self {
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let bad = status.is_server_error();
        let made_by_envoy = || {
            headers
                .get("server")
                .is_some_and(|server| server == "envoy" || server == "istio-envoy")
                && !headers.contains_key("x-envoy-upstream-service-time")
        };
        let failure = match text(&RESPONSE_FLAGS) {
            Some(flags) if bad || status.is_client_error() => Some(Failure::System(flags.to_owned())),
            None if bad && made_by_envoy() => Some(Failure::System(UNNAMED.to_owned())),
            None if bad => Some(Failure::Application),
            Some(_) | None => None,
        };
        Self {
            status: Some(status),
            group: group_by.and_then(text).map(str::to_owned),
            failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn answer(status: u16, headers: &[(&'static str, &'static str)]) -> Outcome {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        Outcome::of_answer(StatusCode::from_u16(status).unwrap(), &headers, None)
    }

    #[test]
    fn a_bad_answer_with_response_flags_is_the_systems() {
        let outcome = answer(
            503,
            &[
                ("x-serin-response-flags", "UH"),
                ("x-envoy-upstream-service-time", "1"),
            ],
        );
        assert_eq!(outcome.failure, Some(Failure::System("UH".to_owned())));
        let outcome = answer(404, &[("x-serin-response-flags", "NR")]);
        assert_eq!(outcome.failure, Some(Failure::System("NR".to_owned())));
    }

    #[test]
    fn a_bad_answer_from_an_upstream_is_the_applications() {
        assert_eq!(
            answer(500, &[("x-envoy-upstream-service-time", "3")]).failure,
            Some(Failure::Application)
        );
        assert_eq!(answer(500, &[]).failure, Some(Failure::Application));
    }

    #[test]
    fn what_an_envoy_answered_without_an_upstream_is_the_systems() {
        assert_eq!(
            answer(503, &[("server", "envoy")]).failure,
            Some(Failure::System("-".to_owned()))
        );
    }

    #[test]
    fn good_answers_and_the_applications_client_errors_are_no_failures() {
        assert_eq!(answer(200, &[]).failure, None);
        assert_eq!(
            answer(404, &[("x-envoy-upstream-service-time", "3")]).failure,
            None
        );
    }
}
