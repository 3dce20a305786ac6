//! Fault injection: delays, aborts and slow responses for a share of the requests, fixed ones or those that requests ask for
//! by header.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use serin_xds::pb::envoy::extensions::filters::common::fault::v3 as common;
use serin_xds::pb::envoy::extensions::filters::http::fault::v3 as fault_v3;
use serin_xds::pb::envoy::r#type::v3::{FractionalPercent, fractional_percent::DenominatorType};

use crate::config::convert::{self, Fraction, each};
use crate::config::matchers::{HeaderMatch, RequestView};
use crate::error::{Refusal, Within};

/// By which a request asks for a slow response, in KiB a second, and for how many it does.
const THROUGHPUT: &str = "x-envoy-fault-throughput-response";
const THROUGHPUT_SHARE: &str = "x-envoy-fault-throughput-response-percentage";

/// How a request is aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAbort {
    /// An HTTP status.
    Http(StatusCode),
    /// A gRPC status, in a 200 answer.
    Grpc(u32),
}

/// A share of requests; where they ask by header, of their own percentage if that is smaller.
#[derive(Clone, Copy, Debug)]
struct Share {
    fraction: Fraction,
    /// Millionths of one of the numerator, which is what the header's number counts.
    unit: u32,
}

impl Share {
    fn compile(from: Option<&FractionalPercent>) -> Result<Self, Refusal> {
        let from = from.copied().unwrap_or_default();
        let unit = match DenominatorType::try_from(from.denominator) {
            Ok(DenominatorType::Hundred) => 10_000,
            Ok(DenominatorType::TenThousand) => 100,
            Ok(DenominatorType::Million) | Err(_) => 1,
        };
        Ok(Self {
            fraction: Fraction::compile(Some(&from), Fraction::NONE)?,
            unit,
        })
    }

    fn asked(self, request: &RequestView<'_>, field: &str) -> Fraction {
        match number(request, field) {
            None => self.fraction,
            Some(asked) => {
                let asked = u32::try_from(asked).unwrap_or(u32::MAX).saturating_mul(self.unit);
                Fraction::of_millionths(asked.min(self.fraction.millionths()))
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Given<T> {
    Fixed(T),
    /// By the request's headers.
    Header,
}

/// A compiled `HTTPFault`.
#[derive(Debug)]
pub struct Fault {
    delay: Option<(Share, Given<Duration>)>,
    abort: Option<(Share, Given<FaultAbort>)>,
    /// KiB a second.
    rate: Option<(Share, Given<u64>)>,
    headers: Box<[HeaderMatch]>,
    cluster: Option<Box<str>>,
    nodes: Box<[Box<str>]>,
    /// What the body of an abort is.
    pub body: Bytes,
    limit: Option<u64>,
    active: AtomicU64,
}

/// What happens to a request: a delay, an abort, or both in that order; and to its response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// How long it waits.
    pub delay: Option<Duration>,
    /// How it ends.
    pub abort: Option<FaultAbort>,
    /// How fast its response comes at most, in KiB a second.
    pub rate: Option<u64>,
}

/// Counts a fault until its request has ended.
#[derive(Debug)]
pub struct ActiveFault(Arc<Fault>);

impl Drop for ActiveFault {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

fn number(request: &RequestView<'_>, field: &str) -> Option<u64> {
    request.headers.get(field)?.to_str().ok()?.trim().parse().ok()
}

/// Statuses that an abort may have.
fn status(code: u64) -> Option<StatusCode> {
    u16::try_from(code)
        .ok()
        .filter(|code| (200..600).contains(code))
        .and_then(|code| StatusCode::from_u16(code).ok())
}

fn rate_limit(from: &common::FaultRateLimit) -> Result<(Share, Given<u64>), Refusal> {
    use common::fault_rate_limit::LimitType;
    let share = Share::compile(from.percentage.as_ref()).within("percentage")?;
    let given = match &from.limit_type {
        Some(LimitType::FixedLimit(limit)) if limit.limit_kbps > 0 => Given::Fixed(limit.limit_kbps),
        Some(LimitType::FixedLimit(_)) => {
            return Err(Refusal::new("fixed_limit.limit_kbps", "must be at least 1"));
        }
        Some(LimitType::HeaderLimit(_)) => Given::Header,
        None => return Err(Refusal::new("", "fixed_limit or header_limit is missing")),
    };
    Ok((share, given))
}

impl Fault {
    /// Compiles the message; `None` when it does nothing.
    pub(crate) fn compile(from: &fault_v3::HttpFault) -> Result<Option<Arc<Self>>, Refusal> {
        use common::fault_delay::FaultDelaySecifier;
        use fault_v3::fault_abort::ErrorType;
        if !from
            .filter_metadata
            .as_ref()
            .is_none_or(|fields| fields.fields.is_empty())
        {
            return Err(Refusal::new("filter_metadata", "not supported"));
        }
        let delay = match &from.delay {
            None => None,
            Some(delay) => {
                let share = Share::compile(delay.percentage.as_ref()).within("delay.percentage")?;
                let given = match &delay.fault_delay_secifier {
                    Some(FaultDelaySecifier::FixedDelay(time)) => {
                        Given::Fixed(convert::duration(time).within("delay.fixed_delay")?)
                    }
                    Some(FaultDelaySecifier::HeaderDelay(_)) => Given::Header,
                    None => return Err(Refusal::new("delay", "fixed_delay or header_delay is missing")),
                };
                Some((share, given))
            }
        };
        let abort = match &from.abort {
            None => None,
            Some(abort) => {
                let share = Share::compile(abort.percentage.as_ref()).within("abort.percentage")?;
                let given = match &abort.error_type {
                    Some(ErrorType::HttpStatus(code)) => {
                        Given::Fixed(FaultAbort::Http(status(u64::from(*code)).ok_or_else(|| {
                            Refusal::new("abort.http_status", format!("{code} is not 200 to 599"))
                        })?))
                    }
                    Some(ErrorType::GrpcStatus(code)) => Given::Fixed(FaultAbort::Grpc(*code)),
                    Some(ErrorType::HeaderAbort(_)) => Given::Header,
                    None => {
                        return Err(Refusal::new(
                            "abort",
                            "http_status, grpc_status or header_abort is missing",
                        ));
                    }
                };
                Some((share, given))
            }
        };
        let rate = from
            .response_rate_limit
            .as_ref()
            .map(rate_limit)
            .transpose()
            .within("response_rate_limit")?;
        let headers = each(&from.headers, "headers", HeaderMatch::compile)?;
        let active = delay.is_some_and(|(share, _)| !share.fraction.is_none())
            || abort.is_some_and(|(share, _)| !share.fraction.is_none())
            || rate.is_some_and(|(share, _)| !share.fraction.is_none());
        let body = from.abort.as_ref().map_or("", |abort| &abort.response_body);
        Ok(active.then(|| {
            Arc::new(Self {
                delay,
                abort,
                rate,
                headers,
                cluster: (!from.upstream_cluster.is_empty()).then(|| from.upstream_cluster.as_str().into()),
                nodes: from
                    .downstream_nodes
                    .iter()
                    .map(|node| node.as_str().into())
                    .collect(),
                body: if body.is_empty() {
                    Bytes::from_static(b"fault filter abort")
                } else {
                    Bytes::copy_from_slice(body.as_bytes())
                },
                limit: from
                    .max_active_faults
                    .as_ref()
                    .map(|limit| u64::from(limit.value)),
                active: AtomicU64::new(0),
            })
        }))
    }

    /// What happens to a request for `cluster`. `random` is called at most three times.
    pub fn decide(
        &self,
        request: &RequestView<'_>,
        cluster: &str,
        mut random: impl FnMut() -> u64,
    ) -> Decision {
        let from_node = || {
            let node = request.headers.get("x-envoy-downstream-service-node");
            node.is_some_and(|node| self.nodes.iter().any(|own| own.as_bytes() == node.as_bytes()))
        };
        if self.cluster.as_ref().is_some_and(|own| **own != *cluster)
            || (!self.nodes.is_empty() && !from_node())
            || !self.headers.iter().all(|header| header.matches(request))
        {
            return Decision::default();
        }
        let delay = self.delay.and_then(|(share, given)| {
            let (time, share) = match given {
                Given::Fixed(time) => (time, share.fraction),
                Given::Header => (
                    Duration::from_millis(number(request, "x-envoy-fault-delay-request")?),
                    share.asked(request, "x-envoy-fault-delay-request-percentage"),
                ),
            };
            share.hit(random()).then_some(time)
        });
        let abort = self.abort.and_then(|(share, given)| {
            let (kind, share) = match given {
                Given::Fixed(kind) => (kind, share.fraction),
                Given::Header => {
                    let http = number(request, "x-envoy-fault-abort-request").and_then(status);
                    let grpc = || {
                        let asked = number(request, "x-envoy-fault-abort-grpc-request")?;
                        u32::try_from(asked).ok().map(FaultAbort::Grpc)
                    };
                    let kind = http.map(FaultAbort::Http).or_else(grpc)?;
                    (
                        kind,
                        share.asked(request, "x-envoy-fault-abort-request-percentage"),
                    )
                }
            };
            share.hit(random()).then_some(kind)
        });
        let rate = self.rate.and_then(|(share, given)| {
            let (rate, share) = match given {
                Given::Fixed(rate) => (rate, share.fraction),
                Given::Header => (
                    number(request, THROUGHPUT).filter(|rate| *rate > 0)?,
                    share.asked(request, THROUGHPUT_SHARE),
                ),
            };
            share.hit(random()).then_some(rate)
        });
        Decision { delay, abort, rate }
    }

    /// Counts a fault that begins; `None` if there are as many as there may be.
    pub fn begin(self: &Arc<Self>) -> Option<ActiveFault> {
        let before = self.active.fetch_add(1, Ordering::Relaxed);
        let counted = ActiveFault(self.clone());
        self.limit.is_none_or(|limit| before < limit).then_some(counted)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use serin_xds::pb::envoy::config::route::v3 as route;

    use super::*;
    use crate::given::headers;

    fn view(headers: &HeaderMap) -> RequestView<'_> {
        RequestView {
            method: "GET",
            path: "/",
            query: None,
            authority: Some(""),
            scheme: Some(""),
            headers,
        }
    }

    #[test]
    fn requests_ask_for_faults_by_header_within_the_configured_share() {
        let percentage = |numerator| {
            Some(FractionalPercent {
                numerator,
                denominator: 0,
            })
        };
        let fault = Fault::compile(&fault_v3::HttpFault {
            delay: Some(common::FaultDelay {
                percentage: percentage(100),
                fault_delay_secifier: Some(common::fault_delay::FaultDelaySecifier::HeaderDelay(
                    common::fault_delay::HeaderDelay {},
                )),
            }),
            abort: Some(fault_v3::FaultAbort {
                percentage: percentage(50),
                error_type: Some(fault_v3::fault_abort::ErrorType::HeaderAbort(
                    fault_v3::fault_abort::HeaderAbort {},
                )),
                ..Default::default()
            }),
            upstream_cluster: "c".into(),
            downstream_nodes: vec!["n".into()],
            ..Default::default()
        })
        .unwrap()
        .unwrap();
        let node = ("x-envoy-downstream-service-node", "n");
        let ask = |pairs: &[(&'static str, &'static str)], cluster, random: u64| {
            let headers = headers(pairs);
            fault.decide(&view(&headers), cluster, || random)
        };
        let delay = ("x-envoy-fault-delay-request", "70");
        let abort = ("x-envoy-fault-abort-request", "503");
        let third = u64::MAX / 3;
        let both = ask(&[node, delay, abort], "c", third);
        assert_eq!(both.delay, Some(Duration::from_millis(70)));
        assert_eq!(
            both.abort,
            Some(FaultAbort::Http(StatusCode::SERVICE_UNAVAILABLE))
        );
        // More than the share that is configured cannot be asked for, less can.
        assert_eq!(ask(&[node, abort], "c", u64::MAX / 3 * 2).abort, None);
        let more = ("x-envoy-fault-abort-request-percentage", "100");
        assert_eq!(ask(&[node, abort, more], "c", u64::MAX / 3 * 2).abort, None);
        let less = ("x-envoy-fault-abort-request-percentage", "10");
        assert_eq!(ask(&[node, abort, less], "c", third).abort, None);
        let grpc = ("x-envoy-fault-abort-grpc-request", "14");
        assert_eq!(ask(&[node, grpc], "c", third).abort, Some(FaultAbort::Grpc(14)));
        for (pairs, cluster) in [
            (vec![node, ("x-envoy-fault-abort-request", "99")], "c"),
            (vec![node], "c"),
            (vec![node, abort], "other"),
            (vec![abort], "c"),
            (vec![("x-envoy-downstream-service-node", "m"), abort], "c"),
        ] {
            assert_eq!(
                ask(&pairs, cluster, third),
                Decision::default(),
                "{pairs:?} {cluster}"
            );
        }
    }

    #[test]
    fn a_fault_of_half_the_requests_hits_about_half_and_only_matching_ones() {
        let fault = Fault::compile(&fault_v3::HttpFault {
            abort: Some(fault_v3::FaultAbort {
                percentage: Some(FractionalPercent {
                    numerator: 50,
                    denominator: 0,
                }),
                error_type: Some(fault_v3::fault_abort::ErrorType::HttpStatus(503)),
                ..Default::default()
            }),
            headers: vec![route::HeaderMatcher {
                name: "x-hit".into(),
                ..Default::default()
            }],
            ..Default::default()
        })
        .unwrap()
        .unwrap();
        let hit = headers(&[("x-hit", "1")]);
        let miss = HeaderMap::new();
        let mut counter = 0u64;
        let mut spread = move || {
            counter = counter.wrapping_add(0x9E37_79B9_7F4A_7C15);
            counter
        };
        let hits = (0..1000)
            .filter(|_| fault.decide(&view(&hit), "", &mut spread).abort.is_some())
            .count();
        assert!((480..=520).contains(&hits), "{hits}");
        assert_eq!(fault.decide(&view(&miss), "", &mut spread), Decision::default());
    }
}
