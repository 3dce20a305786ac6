//! Traces: whose request this is part of, whether it is recorded, and what is passed on.
//!
//! Pure: contexts are read from and written to header fields, decisions take random numbers as arguments.

use crate::hygiene::fields::never_again;
use http::{HeaderMap, HeaderName, HeaderValue};

static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
static B3: HeaderName = HeaderName::from_static("b3");
static B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
static B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
static B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
static B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
static B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");
static DD_TRACE: HeaderName = HeaderName::from_static("x-datadog-trace-id");
static DD_PARENT: HeaderName = HeaderName::from_static("x-datadog-parent-id");
static DD_PRIORITY: HeaderName = HeaderName::from_static("x-datadog-sampling-priority");

/// How contexts are passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// `traceparent`, with `tracestate` left as it is (W3C Trace Context).
    W3c,
    /// `x-b3-*`, and `b3` where it came like that.
    B3,
    /// Both: B3 is read first.
    B3AndW3c,
    /// `x-datadog-*`.
    Datadog,
}

/// A place in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: u128,
    /// The span.
    pub span: u64,
    /// Whether it is recorded; `None` leaves it to us.
    pub sampled: Option<bool>,
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// Lower-case hexadecimal digits of one of these lengths, and not zero.
fn hex(text: &str, lengths: &[usize]) -> Option<u128> {
    if !lengths.contains(&text.len()) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(text, 16).ok().filter(|value| *value != 0)
}

impl Context {
    /// The context that a request comes with.
    pub fn read(propagation: Propagation, headers: &HeaderMap) -> Option<Self> {
        match propagation {
            Propagation::W3c => Self::read_w3c(headers),
            Propagation::B3 => Self::read_b3(headers),
            Propagation::B3AndW3c => Self::read_b3(headers).or_else(|| Self::read_w3c(headers)),
            Propagation::Datadog => Self::read_datadog(headers),
        }
    }

    fn read_w3c(headers: &HeaderMap) -> Option<Self> {
        let mut parts = text(headers, &TRACEPARENT)?.split('-');
        let version = parts
            .next()
            .filter(|version| version.len() == 2 && *version != "ff")?;
        let trace = hex(parts.next()?, &[32])?;
        let span = hex(parts.next()?, &[16])? as u64;
        let flags = parts.next().filter(|flags| flags.len() == 2)?;
        let flags = u8::from_str_radix(flags, 16).ok()?;
        // Version 00 has exactly four parts; later ones may have more.
        if version == "00" && parts.next().is_some() {
            return None;
        }
        Some(Self {
            trace,
            span,
            sampled: Some(flags & 1 == 1),
        })
    }

    fn read_b3(headers: &HeaderMap) -> Option<Self> {
        let sampled = |text: &str| match text {
            "1" | "true" | "d" => Some(true),
            "0" | "false" => Some(false),
            _ => None,
        };
        if let Some(single) = text(headers, &B3) {
            let mut parts = single.split('-');
            let trace = hex(parts.next()?, &[16, 32])?;
            let span = hex(parts.next()?, &[16])? as u64;
            return Some(Self {
                trace,
                span,
                sampled: parts.next().and_then(sampled),
            });
        }
        let debug = text(headers, &B3_FLAGS) == Some("1");
        Some(Self {
            trace: hex(text(headers, &B3_TRACE)?, &[16, 32])?,
            span: hex(text(headers, &B3_SPAN)?, &[16])? as u64,
            sampled: if debug {
                Some(true)
            } else {
                text(headers, &B3_SAMPLED).and_then(sampled)
            },
        })
    }

    fn read_datadog(headers: &HeaderMap) -> Option<Self> {
        let trace: u64 = text(headers, &DD_TRACE)?.parse().ok().filter(|id| *id != 0)?;
        Some(Self {
            trace: u128::from(trace),
            span: text(headers, &DD_PARENT)?.parse().ok()?,
            sampled: text(headers, &DD_PRIORITY)
                .and_then(|text| text.parse::<i32>().ok())
                .map(|priority| priority > 0),
        })
    }

    /// A decision without a place: `b3: 0` or `x-b3-sampled: 0` alone.
    pub fn decision_alone(propagation: Propagation, headers: &HeaderMap) -> Option<bool> {
        if !matches!(propagation, Propagation::B3 | Propagation::B3AndW3c) {
            return None;
        }
        match text(headers, &B3).or_else(|| text(headers, &B3_SAMPLED))? {
            "1" | "true" | "d" => Some(true),
            "0" | "false" => Some(false),
            _ => None,
        }
    }

    /// Puts the context on a request. `parent` is the span before it.
    pub fn write(&self, propagation: Propagation, parent: Option<u64>, headers: &mut HeaderMap) {
        let sampled = self.sampled == Some(true);
        let mut put = |name: &HeaderName, value: String| {
            if let Ok(mut value) = HeaderValue::try_from(value) {
                never_again(&mut value);
                headers.insert(name, value);
            }
        };
        if matches!(propagation, Propagation::W3c | Propagation::B3AndW3c) {
            let flags = if sampled { "01" } else { "00" };
            put(
                &TRACEPARENT,
                format!("00-{:032x}-{:016x}-{flags}", self.trace, self.span),
            );
        }
        if matches!(propagation, Propagation::B3 | Propagation::B3AndW3c) {
            let trace = if self.trace >> 64 == 0 {
                format!("{:016x}", self.trace)
            } else {
                format!("{:032x}", self.trace)
            };
            let flag = if sampled { "1" } else { "0" };
            put(&B3_SPAN, format!("{:016x}", self.span));
            put(&B3_SAMPLED, flag.to_owned());
            if let Some(parent) = parent {
                put(&B3_PARENT, format!("{parent:016x}"));
            }
            let single = format!("{trace}-{:016x}-{flag}", self.span);
            put(&B3_TRACE, trace);
            if headers.contains_key(&B3)
                && let Ok(mut value) = HeaderValue::try_from(single)
            {
                never_again(&mut value);
                headers.insert(&B3, value);
            }
            return;
        }
        if propagation == Propagation::Datadog {
            put(&DD_TRACE, (self.trace as u64).to_string());
            put(&DD_PARENT, self.span.to_string());
            put(&DD_PRIORITY, i32::from(sampled).to_string());
        }
    }
}

/// Why a request is traced, as Envoy packs it into the fifteenth character of a request id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Not at all.
    None,
    /// By chance.
    Sampled,
    /// `x-envoy-force-trace`.
    Forced,
    /// `x-client-trace-id`.
    Client,
}

impl Reason {
    const PLACE: usize = 14;

    /// What an id says, if it is a UUID.
    pub fn of_id(id: &[u8]) -> Option<Self> {
        if id.len() != 36 {
            return None;
        }
        match id[Self::PLACE] {
            b'9' => Some(Self::Sampled),
            b'a' => Some(Self::Forced),
            b'b' => Some(Self::Client),
            _ => Some(Self::None),
        }
    }

    /// The id with the reason in it; what is no UUID stays as it is.
    pub fn pack(self, id: &HeaderValue) -> Option<HeaderValue> {
        let mut bytes: [u8; 36] = id.as_bytes().try_into().ok()?;
        bytes[Self::PLACE] = match self {
            Self::None => b'4',
            Self::Sampled => b'9',
            Self::Forced => b'a',
            Self::Client => b'b',
        };
        HeaderValue::from_bytes(&bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::given::headers;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn expected(sampled: Option<bool>) -> Option<Context> {
        Some(Context {
            trace: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c,
            span: 0xb7ad_6b71_6920_3331,
            sampled,
        })
    }

    #[test]
    fn w3c_contexts_are_read_strictly() {
        let read = |value: &str| Context::read(Propagation::W3c, &headers(&[("traceparent", value)]));
        assert_eq!(read(&format!("00-{TRACE}-{SPAN}-01")), expected(Some(true)));
        assert_eq!(read(&format!("00-{TRACE}-{SPAN}-00")), expected(Some(false)));
        assert_eq!(read(&format!("01-{TRACE}-{SPAN}-01-more")), expected(Some(true)));
        for bad in [
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{TRACE}-{SPAN}"),
            "garbage".into(),
        ] {
            assert_eq!(read(&bad), None, "{bad}");
        }
    }

    #[test]
    fn b3_contexts_are_read_in_both_forms() {
        let multi = |sampled: &'static str| {
            Context::read(
                Propagation::B3,
                &headers(&[
                    ("x-b3-traceid", TRACE),
                    ("x-b3-spanid", SPAN),
                    ("x-b3-sampled", sampled),
                ]),
            )
        };
        assert_eq!(multi("1"), expected(Some(true)));
        assert_eq!(multi("0"), expected(Some(false)));
        let single = |value: &str| Context::read(Propagation::B3, &headers(&[("b3", value)]));
        assert_eq!(
            single(&format!("{TRACE}-{SPAN}-1-05e3ac9a4f6e3b90")),
            expected(Some(true))
        );
        assert_eq!(single(&format!("{TRACE}-{SPAN}-d")), expected(Some(true)));
        assert_eq!(single(&format!("{TRACE}-{SPAN}")), expected(None));
        assert_eq!(single("0"), None);
        assert_eq!(
            Context::decision_alone(Propagation::B3, &headers(&[("b3", "0")])),
            Some(false)
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        for (propagation, trace) in [
            (Propagation::W3c, u128::MAX / 3),
            (Propagation::B3, u128::MAX / 3),
            (Propagation::B3, 7),
            (Propagation::B3AndW3c, u128::MAX / 3),
            (Propagation::Datadog, 12_345),
        ] {
            for sampled in [true, false] {
                let context = Context {
                    trace,
                    span: 99,
                    sampled: Some(sampled),
                };
                let mut headers = HeaderMap::new();
                context.write(propagation, Some(5), &mut headers);
                assert_eq!(
                    Context::read(propagation, &headers),
                    Some(context),
                    "{propagation:?}"
                );
            }
        }
    }

    #[test]
    fn a_request_id_carries_why_it_is_traced() {
        let id = HeaderValue::from_static("11111111-2222-4333-8444-555555555555");
        assert_eq!(Reason::of_id(id.as_bytes()), Some(Reason::None));
        let packed = Reason::Sampled.pack(&id).unwrap();
        assert_eq!(packed, "11111111-2222-9333-8444-555555555555");
        assert_eq!(Reason::of_id(packed.as_bytes()), Some(Reason::Sampled));
        assert_eq!(Reason::Forced.pack(&HeaderValue::from_static("own-id")), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn any_field_is_read_without_panic(value in "[ -~]{0,70}") {
            for name in ["traceparent", "b3", "x-b3-traceid", "x-datadog-trace-id"] {
                let headers = headers(&[(name, &value)]);
                for propagation in [Propagation::W3c, Propagation::B3AndW3c, Propagation::Datadog] {
                    let _ = Context::read(propagation, &headers);
                }
            }
        }
    }
}
