//! The tracing of a connection manager, compiled: sampling, tags, propagation, collector.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName};
use serin_xds::pb::envoy::config::trace::v3 as trace;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::r#type::tracing::v3 as tag;
use serin_xds::pb::envoy::r#type::v3::Percent;

use super::export::{Collector, Exporter};
use super::trace::{Context, Propagation, Reason};
use crate::config::convert::{self, each, refuse_present};
use crate::config::listener::Direction;
use crate::config::route::Context as Compile;
use crate::error::{Refusal, Within};
use crate::policy::metadata::{Key, Metadata, to_json};
use crate::policy::service::{GrpcTarget, HttpTarget, header_pair};

/// Envoy's longest path in a tag.
const DEFAULT_PATH: u32 = 256;
/// Limit of a request to a collector that has none of its own.
const COLLECTOR_TIMEOUT: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub struct Tracer {
    /// How contexts are passed on.
    pub propagation: Propagation,
    /// Where spans go.
    pub exporter: Arc<Exporter>,
    client: f64,
    random: f64,
    overall: f64,
    tags: Box<[CustomTag]>,
    /// Longest path in a tag.
    pub max_path: usize,
    /// Contexts are read, not passed on.
    pub silent: bool,
    /// Whether traces begun here get ids of 128 bits.
    pub wide: bool,
}

#[derive(Debug)]
struct CustomTag {
    name: Box<str>,
    value: TagValue,
}

#[derive(Debug)]
enum TagValue {
    Fixed(Box<str>),
    Header(HeaderName, Box<str>),
    Metadata(Key, Box<str>),
}

/// A share in hundredths of itself; 100 where nothing is said.
fn share(from: Option<&Percent>) -> f64 {
    from.map_or(100.0, |percent| percent.value)
}

/// Whether a draw falls within `percent`.
fn hit(percent: f64, random: u64) -> bool {
    (random >> 11) as f64 / (1u64 << 53) as f64 * 100.0 < percent
}

impl Tracer {
    /// Compiles the message; `None` where nobody collects.
    pub(crate) fn compile(
        from: Option<&hcm::http_connection_manager::Tracing>,
        prefix: &str,
        context: &mut Compile<'_>,
    ) -> Result<Option<Box<Self>>, Refusal> {
        let Some(from) = from else { return Ok(None) };
        let Some(provider) = &from.provider else {
            return Ok(None);
        };
        let Some(trace::tracing::http::ConfigType::TypedConfig(any)) = &provider.config_type else {
            return Err(Refusal::new("tracing.provider.typed_config", "is missing"));
        };
        let type_name = any.type_url.rsplit('/').next().unwrap_or_default();
        let mut wide = true;
        let (propagation, collector, service) = match type_name {
            "envoy.config.trace.v3.ZipkinConfig" => {
                let message: trace::ZipkinConfig = convert::unpack(any, type_name)?;
                wide = message.trace_id_128bit;
                let (propagation, collector) = zipkin(&message, context).within("tracing.provider")?;
                (propagation, collector, String::new())
            }
            "envoy.config.trace.v3.OpenTelemetryConfig" => {
                let message: trace::OpenTelemetryConfig = convert::unpack(any, type_name)?;
                let collector = otlp(&message, context).within("tracing.provider")?;
                (Propagation::W3c, collector, message.service_name)
            }
            "envoy.config.trace.v3.DatadogConfig" => {
                let message: trace::DatadogConfig = convert::unpack(any, type_name)?;
                wide = false;
                let target = plain_target(
                    &message.collector_cluster,
                    &message.collector_hostname,
                    "/v0.4/traces",
                    context,
                )?;
                (
                    Propagation::Datadog,
                    Collector::Datadog(target),
                    message.service_name,
                )
            }
            other => {
                return Err(Refusal::new(
                    "tracing.provider",
                    format!("the tracer {other} is not supported"),
                ));
            }
        };
        let tags = each(&from.custom_tags, "tracing.custom_tags", CustomTag::compile)?;
        let labels = [("envoy_http_conn_manager_prefix", prefix)];
        let (workers, registry) = context.counters();
        let sent = registry.counter(workers, "envoy_tracing_spans_sent", &labels);
        let dropped = registry.counter(workers, "envoy_tracing_spans_dropped", &labels);
        Ok(Some(Box::new(Self {
            propagation,
            exporter: Arc::new(Exporter::new(collector, &service, sent, dropped)),
            client: share(from.client_sampling.as_ref()),
            random: share(from.random_sampling.as_ref()),
            overall: share(from.overall_sampling.as_ref()),
            tags,
            max_path: from
                .max_path_tag_length
                .as_ref()
                .map_or(DEFAULT_PATH, |value| value.value) as usize,
            silent: from.no_context_propagation,
            wide,
        })))
    }

    /// Whether and why a request without a decision of its own is traced.
    pub fn decide(&self, id: Option<&[u8]>, headers: &HeaderMap, random: &impl Fn() -> u64) -> Reason {
        let mut reason = id.and_then(Reason::of_id).unwrap_or(Reason::None);
        if reason == Reason::None {
            if headers.contains_key("x-client-trace-id") && hit(self.client, random()) {
                reason = Reason::Client;
            } else if headers.contains_key("x-envoy-force-trace") {
                reason = Reason::Forced;
            } else if hit(self.random, random()) {
                reason = Reason::Sampled;
            }
        }
        if reason != Reason::None && !hit(self.overall, random()) {
            reason = Reason::None;
        }
        reason
    }

    /// The context of a request's own span, and the span before it.
    pub fn begin(
        &self,
        headers: &HeaderMap,
        reason: Reason,
        random: &impl Fn() -> u64,
    ) -> (Context, Option<u64>) {
        let nonzero = || random().max(1);
        let given = Context::read(self.propagation, headers);
        let alone = || Context::decision_alone(self.propagation, headers);
        let sampled = given
            .and_then(|context| context.sampled)
            .or_else(alone)
            .unwrap_or(reason != Reason::None);
        let trace = given.map_or_else(
            || {
                let low = u128::from(nonzero());
                if self.wide {
                    low | u128::from(nonzero()) << 64
                } else {
                    low
                }
            },
            |context| context.trace,
        );
        let context = Context {
            trace,
            span: nonzero(),
            sampled: Some(sampled),
        };
        (context, given.map(|context| context.span))
    }

    /// The values of the configured tags that can be told from the request's head.
    pub fn request_tags(&self, headers: &HeaderMap) -> Vec<(String, String)> {
        self.tags
            .iter()
            .filter_map(|tag| {
                let value = match &tag.value {
                    TagValue::Fixed(value) => value.to_string(),
                    TagValue::Header(name, default) => headers.get(name).map_or_else(
                        || default.to_string(),
                        |value| String::from_utf8_lossy(value.as_bytes()).into_owned(),
                    ),
                    TagValue::Metadata(..) => return None,
                };
                (!value.is_empty()).then(|| (tag.name.to_string(), value))
            })
            .collect()
    }

    /// The values of the others, known at the end.
    pub fn metadata_tags(&self, metadata: &Metadata, out: &mut Vec<(String, String)>) {
        for tag in &self.tags {
            if let TagValue::Metadata(key, default) = &tag.value {
                let value = key.find(metadata).map_or_else(
                    || default.to_string(),
                    |value| match to_json(value) {
                        serde_json::Value::String(text) => text,
                        other => other.to_string(),
                    },
                );
                if !value.is_empty() {
                    out.push((tag.name.to_string(), value));
                }
            }
        }
    }
}

/// `ingress` or `egress host`, as Envoy names spans that nobody else does.
pub fn span_name(direction: Direction, authority: &str) -> String {
    match direction {
        Direction::Inbound => "ingress".to_owned(),
        Direction::Outbound | Direction::Unspecified => format!("egress {authority}"),
    }
}

fn plain_target(
    cluster: &str,
    hostname: &str,
    path: &str,
    context: &mut Compile<'_>,
) -> Result<HttpTarget, Refusal> {
    if cluster.is_empty() {
        return Err(Refusal::new("collector_cluster", "is missing"));
    }
    let authority = if hostname.is_empty() { cluster } else { hostname };
    Ok(HttpTarget {
        cluster: context.slots.cluster(cluster),
        authority: http::HeaderValue::from_str(authority)
            .map_err(|_| Refusal::new("collector_hostname", "is not a header value"))?,
        path: path
            .parse()
            .map_err(|_| Refusal::new("collector_endpoint", format!("{path:?} is no path")))?,
        timeout: COLLECTOR_TIMEOUT,
    })
}

fn zipkin(
    from: &trace::ZipkinConfig,
    context: &mut Compile<'_>,
) -> Result<(Propagation, Collector), Refusal> {
    if from.split_spans_for_request {
        return Err(Refusal::new("split_spans_for_request", "not supported"));
    }
    use trace::zipkin_config::{CollectorEndpointVersion, TraceContextOption};
    if from.collector_endpoint_version != CollectorEndpointVersion::HttpJson as i32 {
        return Err(Refusal::new(
            "collector_endpoint_version",
            "only HTTP_JSON is supported",
        ));
    }
    // Where both are there Envoy takes the service.
    let target = match &from.collector_service {
        Some(service) if !service.request_headers_to_add.is_empty() || !service.formatters.is_empty() => {
            return Err(Refusal::new(
                "collector_service.request_headers_to_add",
                "not supported for Zipkin",
            ));
        }
        Some(service) => {
            HttpTarget::compile(service.http_uri.as_ref(), context).within("collector_service.http_uri")?
        }
        None => plain_target(
            &from.collector_cluster,
            &from.collector_hostname,
            &from.collector_endpoint,
            context,
        )?,
    };
    let propagation = if from.trace_context_option == TraceContextOption::UseB3WithW3cPropagation as i32 {
        Propagation::B3AndW3c
    } else {
        Propagation::B3
    };
    Ok((propagation, Collector::Zipkin(target, from.trace_id_128bit)))
}

fn otlp(from: &trace::OpenTelemetryConfig, context: &mut Compile<'_>) -> Result<Collector, Refusal> {
    refuse_present(
        &[
            ("exporter", from.exporter.is_some()),
            ("resource_detectors", !from.resource_detectors.is_empty()),
            ("sampler", from.sampler.is_some()),
        ],
        "not supported",
    )?;
    match (&from.grpc_service, &from.http_service) {
        (Some(service), None) => GrpcTarget::compile(Some(service), context).map(Collector::OtlpGrpc),
        (None, Some(service)) => {
            let (target, fields) = http_service(service, context).within("http_service")?;
            Ok(Collector::OtlpHttp(target, fields))
        }
        (Some(_), Some(_)) => Err(Refusal::new(
            "http_service",
            "cannot be combined with grpc_service",
        )),
        (None, None) => Err(Refusal::new("grpc_service", "or http_service is missing")),
    }
}

/// Where an `HttpService` is, and the fields that each request to it carries.
pub(super) fn http_service(
    from: &serin_xds::pb::envoy::config::core::v3::HttpService,
    context: &mut Compile<'_>,
) -> Result<(HttpTarget, Box<[(HeaderName, http::HeaderValue)]>), Refusal> {
    let target = HttpTarget::compile(from.http_uri.as_ref(), context).within("http_uri")?;
    let fields = from
        .request_headers_to_add
        .iter()
        .filter_map(|option| option.header.as_ref())
        .map(header_pair)
        .collect::<Result<_, _>>()
        .within("request_headers_to_add")?;
    Ok((target, fields))
}

impl CustomTag {
    fn compile(from: &tag::CustomTag) -> Result<Self, Refusal> {
        use serin_xds::pb::envoy::r#type::metadata::v3::metadata_kind::Kind;
        let value = match &from.r#type {
            Some(tag::custom_tag::Type::Literal(literal)) => TagValue::Fixed(literal.value.as_str().into()),
            Some(tag::custom_tag::Type::Environment(environment)) => TagValue::Fixed(
                std::env::var(&environment.name)
                    .unwrap_or_else(|_| environment.default_value.clone())
                    .into(),
            ),
            Some(tag::custom_tag::Type::RequestHeader(header)) => TagValue::Header(
                HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| {
                    Refusal::new(
                        "request_header.name",
                        format!("{:?} is no header name", header.name),
                    )
                })?,
                header.default_value.as_str().into(),
            ),
            Some(tag::custom_tag::Type::Metadata(metadata)) => {
                let request = metadata
                    .kind
                    .as_ref()
                    .is_none_or(|kind| matches!(kind.kind, None | Some(Kind::Request(_))));
                if !request {
                    return Err(Refusal::new(
                        "metadata.kind",
                        "only request metadata is supported",
                    ));
                }
                TagValue::Metadata(
                    Key::compile(metadata.metadata_key.as_ref()).within("metadata")?,
                    metadata.default_value.as_str().into(),
                )
            }
            Some(tag::custom_tag::Type::Value(text)) if text.contains('%') => {
                return Err(Refusal::new("value", "substitution in tags is not supported"));
            }
            Some(tag::custom_tag::Type::Value(text)) => TagValue::Fixed(text.as_str().into()),
            None => return Err(Refusal::new("type", "is missing")),
        };
        Ok(Self {
            name: from.tag.as_str().into(),
            value,
        })
    }
}
