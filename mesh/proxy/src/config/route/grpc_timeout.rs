//! How long a gRPC call may take by its own words (`grpc-timeout`, gRPC over HTTP/2), as far as the route lets it say so.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use serin_xds::pb::google::protobuf as google;

use crate::config::convert;
use crate::error::{Refusal, Within};

static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// What a route makes of the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrpcTimeout {
    /// The longest that is granted; without one, whatever is asked for.
    max: Option<Duration>,
    /// Taken off, so that the answer of the proxy comes before the client gives up.
    offset: Duration,
}

impl GrpcTimeout {
    /// Nothing where the route does not say that the field counts.
    pub(super) fn compile(
        max: (&'static str, Option<&google::Duration>),
        offset: (&'static str, Option<&google::Duration>),
    ) -> Result<Option<Self>, Refusal> {
        let Some(given) = max.1 else {
            return Ok(None);
        };
        Ok(Some(Self {
            max: convert::timeout(Some(given)).within(max.0)?,
            offset: convert::timeout(offset.1).within(offset.0)?.unwrap_or_default(),
        }))
    }

    /// The limit of a call with these fields: `Err` where they have none, then the longest that is granted.
    pub(super) fn of(&self, headers: &HeaderMap) -> Result<Option<Duration>, Option<Duration>> {
        let Some(asked) = headers.get(&GRPC_TIMEOUT).and_then(read) else {
            return Err(self.max);
        };
        // What would be nothing left, or less, is left as it is: nothing would mean no limit.
        let asked = match asked.checked_sub(self.offset) {
            Some(left) if !left.is_zero() => left,
            _ => asked,
        };
        if asked.is_zero() {
            return Ok(self.max);
        }
        Ok(Some(self.max.map_or(asked, |max| asked.min(max))))
    }

    /// Tells the next server how long there is.
    pub(super) fn write(limit: Duration, headers: &mut HeaderMap) {
        // Eight digits are allowed.
        let text = match limit.as_millis() {
            millis @ ..100_000_000 => format!("{millis}m"),
            millis => format!("{}S", (millis / 1000).min(99_999_999)),
        };
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(&GRPC_TIMEOUT, value);
        }
    }
}

/// Up to eight digits and a unit.
fn read(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(&GRPC_TIMEOUT, text.parse().unwrap());
        headers
    }

    #[test]
    fn a_call_says_how_long_it_may_take_up_to_what_the_route_grants() {
        let millis = Duration::from_millis;
        let rule = |max: u64, offset: u64| GrpcTimeout {
            max: (max > 0).then(|| millis(max)),
            offset: millis(offset),
        };
        for (text, max, offset, expected) in [
            ("200m", 0, 0, Ok(Some(200))),
            ("200m", 1000, 0, Ok(Some(200))),
            ("5S", 1000, 0, Ok(Some(1000))),
            ("1H", 0, 0, Ok(Some(3_600_000))),
            ("2M", 0, 0, Ok(Some(120_000))),
            ("5000u", 0, 0, Ok(Some(5))),
            ("99999999n", 0, 0, Ok(Some(99))),
            ("200m", 0, 50, Ok(Some(150))),
            ("200m", 0, 200, Ok(Some(200))),
            ("0m", 1000, 0, Ok(Some(1000))),
            ("0m", 0, 0, Ok(None)),
            // Nothing that the protocol knows.
            ("200", 1000, 0, Err(Some(1000))),
            ("-1m", 1000, 0, Err(Some(1000))),
            ("123456789m", 0, 0, Err(None)),
            ("1x", 0, 0, Err(None)),
            ("", 0, 0, Err(None)),
        ] {
            let whole = |limit: Option<Duration>| limit.map(|limit| limit.as_millis());
            let seen = rule(max, offset).of(&fields(text));
            assert_eq!(
                seen.map(whole).map_err(whole),
                expected,
                "{text}, at most {max} ms, less {offset} ms"
            );
        }
        assert_eq!(rule(1000, 0).of(&HeaderMap::new()), Err(Some(millis(1000))));
    }

    #[test]
    fn the_next_server_is_told_in_eight_digits() {
        for (limit, text) in [
            (Duration::from_millis(150), "150m"),
            (Duration::from_secs(99_999), "99999000m"),
            (Duration::from_secs(100_000), "100000S"),
        ] {
            let mut headers = HeaderMap::new();
            GrpcTimeout::write(limit, &mut headers);
            assert_eq!(headers[&GRPC_TIMEOUT], text);
            assert!(read(&headers[&GRPC_TIMEOUT]).is_some());
        }
    }
}
