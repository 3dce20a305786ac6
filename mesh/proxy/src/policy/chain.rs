//! The chain of HTTP filters of a connection manager.

use std::sync::Arc;

use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::google::protobuf::Any;

use super::adaptive_concurrency::AdaptiveConcurrency;
use super::buffer::Buffer;
use super::compressor::Compressor;
use super::cors::Cors;
use super::ext_authz::ExtAuthz;
use super::ext_proc::ExtProc;
use super::fault::Fault;
use super::filter_state::SetFilterState;
use super::grpc_stats::GrpcStats;
use super::header_mutation::HeaderMutation;
use super::jwt::JwtAuthn;
use super::local_rate_limit::LocalRateLimit;
use super::on_demand::OnDemandClusters;
use super::rate_limit::RateLimit;
use super::rbac::Rules;
use super::set_metadata::SetMetadata;
use super::tap::TapFilter;
use crate::clock;
use crate::config::convert;
use crate::config::extension::{self, AnyPlace, Discoverable, Extensions, Place, not_by_discovery};
use crate::config::route::Context;
use crate::error::Refusal;

/// The message of a filter that is known by its configuration.
fn unpack<M: prost::Message + Default>(config: Option<&Any>, type_name: &str) -> Result<M, Refusal> {
    match config {
        Some(any) => convert::unpack(any, type_name),
        None => Err(Refusal::new("typed_config", "is missing")),
    }
}

/// What a filter does.
#[derive(Debug)]
pub enum Kind {
    /// Fault injection.
    Fault(Option<Arc<Fault>>),
    /// CORS.
    Cors(Option<Arc<Cors>>),
    /// Role-based access control; `None` where only routes say something.
    Rbac(Option<Box<Rules>>),
    /// Local rate limit.
    LocalRateLimit(Option<Arc<LocalRateLimit>>),
    /// Header mutations.
    HeaderMutation(Arc<HeaderMutation>),
    /// Fixed metadata.
    SetMetadata(SetMetadata),
    /// Objects of the filter state.
    SetFilterState(Arc<SetFilterState>),
    /// Holding requests.
    Buffer(Buffer),
    /// Global rate limit.
    RateLimit(Arc<RateLimit>),
    /// JWT authentication.
    Jwt(Box<JwtAuthn>),
    /// External authorisation.
    ExtAuthz(Box<ExtAuthz>),
    /// A limit on requests at a time that follows the latency.
    AdaptiveConcurrency(Arc<AdaptiveConcurrency>),
    /// Counting gRPC calls.
    GrpcStats(Arc<GrpcStats>),
    /// External processing.
    ExtProc(Arc<ExtProc>),
    /// Compression.
    Compressor(Arc<Compressor>),
    /// Requests that somebody looks at.
    Tap(Box<TapFilter>),
    /// Waiting for virtual hosts and, where it says so, for clusters.
    OnDemand(Option<OnDemandClusters>),
    /// Whatever its resource says (ECDS).
    Discovered(Arc<Place<Kind>>),
}

/// A filter of a chain.
#[derive(Debug)]
pub struct Filter {
    /// Its name, by which routes speak of it.
    pub name: Box<str>,
    /// Whether it is used where no route says otherwise.
    pub enabled: bool,
    /// What it does.
    pub kind: Kind,
}

/// Filters in the order in which requests pass them; the router, which is always the last, is not among them.
#[derive(Debug, Default)]
pub struct Chain {
    /// The filters.
    pub filters: Vec<Filter>,
}

impl Chain {
    /// Adds a filter. One that this proxy does not have is refused by name.
    pub(crate) fn add(
        &mut self,
        filter: &hcm::HttpFilter,
        stat_prefix: &str,
        context: &mut Context<'_>,
    ) -> Result<(), Refusal> {
        let any = match &filter.config_type {
            Some(hcm::http_filter::ConfigType::TypedConfig(any)) => Some(any),
            Some(hcm::http_filter::ConfigType::ConfigDiscovery(source)) => {
                let place = Extensions::place(&filter.name, source, stat_prefix.into(), context)?;
                self.filters.push(Filter {
                    name: filter.name.as_str().into(),
                    enabled: !filter.disabled,
                    kind: Kind::Discovered(place),
                });
                return Ok(());
            }
            None => None,
        };
        if let Some(kind) = compile(&filter.name, any, stat_prefix, context)? {
            self.filters.push(Filter {
                name: filter.name.as_str().into(),
                enabled: !filter.disabled,
                kind,
            });
        }
        Ok(())
    }

    /// Filters whose configuration is a resource of its own.
    pub fn discovered(&self) -> impl Iterator<Item = &dyn AnyPlace> {
        self.filters.iter().filter_map(|filter| match &filter.kind {
            Kind::Discovered(place) => Some(&**place as &dyn AnyPlace),
            _ => None,
        })
    }

    /// Whether requests may wait for their virtual host.
    pub fn waits_for_hosts(&self) -> bool {
        self.filters
            .iter()
            .any(|filter| filter.enabled && matches!(filter.kind, Kind::OnDemand(_)))
    }
}

impl Discoverable for Kind {
    const KIND: extension::Kind = extension::Kind::Http;
    /// The manager's prefix of statistics.
    type Origin = Box<str>;

    fn discovered(
        name: &str,
        any: &Any,
        stat_prefix: &Box<str>,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        match compile(name, Some(any), stat_prefix, context)? {
            Some(Self::OnDemand(_)) | None => Err(not_by_discovery(any)),
            Some(kind) => Ok(kind),
        }
    }
}

/// Compiles a filter of that name; `None` where it does nothing.
pub(crate) fn compile(
    name: &str,
    any: Option<&Any>,
    stat_prefix: &str,
    context: &mut Context<'_>,
) -> Result<Option<Kind>, Refusal> {
    let type_name = any.map_or("", |any| any.type_url.rsplit('/').next().unwrap_or_default());
    // A filter is known by its configuration's type; where that says nothing, by its name.
    let known = match type_name {
        "" | "google.protobuf.Empty" => "",
        given => given,
    };
    let config = any.filter(|_| !known.is_empty());
    let kind = match (known, name) {
        ("envoy.extensions.filters.http.fault.v3.HTTPFault", _) | ("", "envoy.filters.http.fault") => {
            Kind::Fault(config.map_or(Ok(None), |any| Fault::compile(&convert::unpack(any, type_name)?))?)
        }
        // The type for a chain and the type for a route both occur here.
        ("envoy.extensions.filters.http.cors.v3.Cors", _) | ("", "envoy.filters.http.cors") => {
            Kind::Cors(None)
        }
        ("envoy.extensions.filters.http.cors.v3.CorsPolicy", _) => Kind::Cors(
            config
                .map(|any| {
                    Cors::compile(&convert::unpack(any, type_name)?, &mut context.slots.runtime).map(Arc::new)
                })
                .transpose()?,
        ),
        ("envoy.extensions.filters.http.rbac.v3.RBAC", _) | ("", "envoy.filters.http.rbac") => {
            let (workers, counters) = context.counters();
            Kind::Rbac(
                config
                    .map(|any| {
                        Rules::compile(&convert::unpack(any, type_name)?, stat_prefix, workers, counters)
                            .map(Box::new)
                    })
                    .transpose()?,
            )
        }
        ("envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit", _)
        | ("", "envoy.filters.http.local_ratelimit") => {
            let (workers, slots) = (context.workers, &mut *context.slots);
            Kind::LocalRateLimit(
                config
                    .map(|any| {
                        let message = convert::unpack(any, type_name)?;
                        let (counters, runtime) = (&mut slots.counters, &mut slots.runtime);
                        let (home, now) = (slots.home.as_ref(), clock::now_ms());
                        LocalRateLimit::compile(&message, workers, counters, runtime, home, now).map(Arc::new)
                    })
                    .transpose()?,
            )
        }
        ("envoy.extensions.filters.http.header_mutation.v3.HeaderMutation", _)
        | ("", "envoy.filters.http.header_mutation") => {
            Kind::HeaderMutation(Arc::new(config.map_or(Ok(HeaderMutation::default()), |any| {
                HeaderMutation::compile(&convert::unpack(any, type_name)?)
            })?))
        }
        ("envoy.extensions.filters.http.set_metadata.v3.Config", _) => match config {
            Some(any) => Kind::SetMetadata(SetMetadata::compile(&convert::unpack(any, type_name)?)?),
            None => return Ok(None),
        },
        ("envoy.extensions.filters.http.set_filter_state.v3.Config", _) => {
            Kind::SetFilterState(Arc::new(SetFilterState::compile(&unpack(config, type_name)?)?))
        }
        ("envoy.extensions.filters.http.buffer.v3.Buffer", _) => {
            Kind::Buffer(Buffer::compile(&unpack(config, type_name)?)?)
        }
        ("envoy.extensions.filters.http.ratelimit.v3.RateLimit", _) => Kind::RateLimit(Arc::new(
            RateLimit::compile(&unpack(config, type_name)?, stat_prefix, context)?,
        )),
        ("envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication", _) => Kind::Jwt(Box::new(
            JwtAuthn::compile(&unpack(config, type_name)?, stat_prefix, context)?,
        )),
        ("envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", _) => Kind::ExtAuthz(Box::new(
            ExtAuthz::compile(&unpack(config, type_name)?, stat_prefix, context)?,
        )),
        ("envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency", _) => {
            let message = unpack(config, type_name)?;
            Kind::AdaptiveConcurrency(Arc::new(AdaptiveConcurrency::compile(&message)?))
        }
        ("envoy.extensions.filters.http.grpc_stats.v3.FilterConfig", _)
        | ("", "envoy.filters.http.grpc_stats") => {
            let (workers, counters) = context.counters();
            let message = config.map_or(Ok(Default::default()), |any| convert::unpack(any, type_name))?;
            Kind::GrpcStats(Arc::new(GrpcStats::compile(&message, workers, &counters.grpc)?))
        }
        ("envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor", _) => Kind::ExtProc(Arc::new(
            ExtProc::compile(&unpack(config, type_name)?, stat_prefix, context)?,
        )),
        ("envoy.extensions.filters.http.on_demand.v3.OnDemand", _) | ("", "envoy.filters.http.on_demand") => {
            Kind::OnDemand(config.map_or(Ok(None), |any| {
                OnDemandClusters::of_filter(&convert::unpack(any, type_name)?)
            })?)
        }
        ("envoy.extensions.filters.http.compressor.v3.Compressor", _) => {
            Kind::Compressor(Arc::new(Compressor::compile(&unpack(config, type_name)?)?))
        }
        ("envoy.extensions.filters.http.tap.v3.Tap", _) => Kind::Tap(Box::new(TapFilter::compile(
            &unpack(config, type_name)?,
            stat_prefix,
            context,
        )?)),
        _ => {
            let of_type = if known.is_empty() {
                String::new()
            } else {
                format!(" ({known})")
            };
            return Err(Refusal::new(
                "name",
                format!("the HTTP filter {name:?}{of_type} is not supported"),
            ));
        }
    };
    Ok(Some(kind))
}
