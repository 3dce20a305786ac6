//! What route configurations, virtual hosts, routes and weighted clusters say about the filters of a chain
//! (`typed_per_filter_config`).

use std::sync::Arc;

use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::http::header_mutation::v3 as header_mutation;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as rbac;
use serin_xds::pb::google::protobuf::Any;

use super::buffer::Buffer;
use super::compressor::PerRouteCompressor;
use super::cors::Cors;
use super::ext_authz::PerRouteAuthz;
use super::ext_proc::PerRouteProc;
use super::fault::Fault;
use super::filter_state::SetFilterState;
use super::header_mutation::HeaderMutation;
use super::jwt::PerRouteJwt;
use super::local_rate_limit::LocalRateLimit;
use super::on_demand::OnDemandClusters;
use super::rate_limit::PerRouteLimit;
use super::rbac::Rules;
use super::set_metadata::SetMetadata;
use crate::clock;
use crate::config::convert;
use crate::config::route::Context;
use crate::error::{Refusal, Within};

/// What is said about one filter.
#[derive(Debug)]
pub enum Override {
    /// Leave it out.
    Disabled,
    /// Use it, as the chain configures it, although the chain switches it off.
    Enabled,
    /// Fault injection; `None` does nothing.
    Fault(Option<Arc<Fault>>),
    /// CORS.
    Cors(Arc<Cors>),
    /// RBAC; `None` judges nothing.
    Rbac(Option<Box<Rules>>),
    /// Local rate limit.
    LocalRateLimit(Arc<LocalRateLimit>),
    /// Header mutations, which are applied at every level that has some.
    HeaderMutation(Arc<HeaderMutation>),
    /// Fixed metadata.
    SetMetadata(SetMetadata),
    /// Holding requests; `None` does not.
    Buffer(Option<Buffer>),
    /// Global rate limit.
    RateLimit(PerRouteLimit),
    /// JWT authentication.
    Jwt(PerRouteJwt),
    /// External authorisation.
    ExtAuthz(PerRouteAuthz),
    /// External processing.
    ExtProc(PerRouteProc),
    /// Compression; `None` leaves responses as they are.
    Compressor(Option<PerRouteCompressor>),
    /// Clusters on demand; `None` switches them off.
    OnDemand(Option<OnDemandClusters>),
    /// Objects of the filter state, beside those of the chain and of less specific levels.
    SetFilterState(Arc<SetFilterState>),
}

/// Overrides by filter name.
#[derive(Debug, Default)]
pub struct PerRoute {
    /// CORS in the fields that routes and virtual hosts had before filters were configured by type.
    pub cors: Option<Arc<Cors>>,
    entries: Box<[(Box<str>, Override)]>,
}

impl PerRoute {
    /// Compiles the map; a filter that we do not have is refused, unless the entry says that it is optional.
    pub(crate) fn compile<S: std::hash::BuildHasher>(
        from: &std::collections::HashMap<String, Any, S>,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        let mut entries = Vec::with_capacity(from.len());
        for (name, any) in from {
            let entry = compile(any, context).within(format!("typed_per_filter_config[{name:?}]"))?;
            if let Some(entry) = entry {
                entries.push((name.as_str().into(), entry));
            }
        }
        Ok(Self {
            cors: None,
            entries: entries.into(),
        })
    }

    /// What is said about the filter of that name.
    pub fn get(&self, name: &str) -> Option<&Override> {
        self.entries
            .iter()
            .find(|(entry, _)| **entry == *name)
            .map(|(_, entry)| entry)
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.cors.is_none()
    }
}

fn compile(any: &Any, context: &mut Context<'_>) -> Result<Option<Override>, Refusal> {
    let type_name = any.type_url.rsplit('/').next().unwrap_or_default();
    Ok(Some(match type_name {
        "envoy.config.route.v3.FilterConfig" => {
            let message: route::FilterConfig = convert::unpack(any, type_name)?;
            return match &message.config {
                _ if message.disabled => Ok(Some(Override::Disabled)),
                None => Ok(Some(Override::Enabled)),
                Some(config) if config.type_url.is_empty() => Ok(Some(Override::Enabled)),
                Some(config) => match compile(config, context) {
                    Err(_) if message.is_optional => Ok(None),
                    other => other,
                },
            };
        }
        "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
            Override::Fault(Fault::compile(&convert::unpack(any, type_name)?)?)
        }
        "envoy.extensions.filters.http.cors.v3.CorsPolicy" => {
            let message = convert::unpack(any, type_name)?;
            Override::Cors(Arc::new(Cors::compile(&message, &mut context.slots.runtime)?))
        }
        "envoy.extensions.filters.http.rbac.v3.RBACPerRoute" => {
            let message: rbac::RbacPerRoute = convert::unpack(any, type_name)?;
            let (workers, counters) = context.counters();
            Override::Rbac(
                message
                    .rbac
                    .map(|rbac| {
                        Rules::compile(&rbac, "", workers, counters)
                            .map(Box::new)
                            .within("rbac")
                    })
                    .transpose()?,
            )
        }
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit" => {
            let message = convert::unpack(any, type_name)?;
            let slots = &mut *context.slots;
            Override::LocalRateLimit(Arc::new(LocalRateLimit::compile(
                &message,
                context.workers,
                &mut slots.counters,
                &mut slots.runtime,
                slots.home.as_ref(),
                clock::now_ms(),
            )?))
        }
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute" => {
            let message: header_mutation::HeaderMutationPerRoute = convert::unpack(any, type_name)?;
            Override::HeaderMutation(Arc::new(HeaderMutation::compile_mutations(
                &message.mutations.unwrap_or_default(),
            )?))
        }
        "envoy.extensions.filters.http.set_metadata.v3.Config" => {
            Override::SetMetadata(SetMetadata::compile(&convert::unpack(any, type_name)?)?)
        }
        "envoy.extensions.filters.http.set_filter_state.v3.Config" => Override::SetFilterState(Arc::new(
            SetFilterState::compile(&convert::unpack(any, type_name)?)?,
        )),
        "envoy.extensions.filters.http.buffer.v3.BufferPerRoute" => {
            Override::Buffer(Buffer::compile_route(&convert::unpack(any, type_name)?)?)
        }
        "envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute" => {
            Override::RateLimit(PerRouteLimit::compile(&convert::unpack(any, type_name)?)?)
        }
        "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig" => {
            Override::Jwt(PerRouteJwt::compile(&convert::unpack(any, type_name)?)?)
        }
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute" => Override::ExtAuthz(
            PerRouteAuthz::compile(&convert::unpack(any, type_name)?, context)?,
        ),
        "envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute" => {
            Override::ExtProc(PerRouteProc::compile(&convert::unpack(any, type_name)?, context)?)
        }
        "envoy.extensions.filters.http.on_demand.v3.PerRouteConfig" => {
            Override::OnDemand(OnDemandClusters::of_route(&convert::unpack(any, type_name)?)?)
        }
        "envoy.extensions.filters.http.compressor.v3.CompressorPerRoute" => {
            Override::Compressor(PerRouteCompressor::compile(&convert::unpack(any, type_name)?)?)
        }
        other => {
            return Err(Refusal::new(
                "",
                format!("the filter configuration {other} is not supported"),
            ));
        }
    }))
}
