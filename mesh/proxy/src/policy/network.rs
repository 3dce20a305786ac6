//! Network filters that judge a connection before its bytes go on.

use std::sync::Arc;
use std::time::Duration;

use serin_xds::pb::envoy::extensions::filters::network::rbac::v3 as rbac;
use serin_xds::pb::google::protobuf::Any;

use super::facts::Facts;
use super::filter_state::SetConnectionState;
use super::local_rate_limit::ConnectionRateLimit;
use super::metadata::Metadata;
use super::rbac::{NETWORK_NAMESPACE, Rules};
use crate::clock;
use crate::config::convert;
use crate::config::route::Context;
use crate::error::{Refusal, Within};

/// A compiled network filter.
#[derive(Debug)]
pub enum NetworkFilter {
    /// Role-based access control by what is known of the connection.
    Rbac {
        /// The rules.
        rules: Box<Rules>,
        /// How long a connection that is denied stays open, unread.
        delay: Option<Duration>,
    },
    /// A limit of new connections.
    LocalRateLimit(Arc<ConnectionRateLimit>),
    /// Objects of the filter state, which the worker makes.
    SetFilterState(Box<SetConnectionState>),
}

/// Why a connection is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// Connection termination details.
    pub details: String,
    /// Whether it is a rate limit.
    pub limited: bool,
    /// When it is closed.
    pub delay: Option<Duration>,
}

impl NetworkFilter {
    /// Compiles a filter by its name and configuration; `None` if it is none of ours.
    pub(crate) fn compile(
        name: &str,
        any: Option<&Any>,
        context: &mut Context<'_>,
    ) -> Result<Option<Self>, Refusal> {
        let type_name = any.map_or("", |any| any.type_url.rsplit('/').next().unwrap_or_default());
        match (any, type_name) {
            (Some(any), "envoy.extensions.filters.network.rbac.v3.RBAC") => {
                let message: rbac::Rbac = convert::unpack(any, type_name)?;
                // Nothing that a rule can see changes during a connection: to judge it once is to judge it continuously.
                if rbac::rbac::EnforcementType::try_from(message.enforcement_type).is_err() {
                    return Err(Refusal::new(
                        "enforcement_type",
                        format!("{} is unknown", message.enforcement_type),
                    ));
                }
                let (workers, counters) = context.counters();
                let delay = convert::timeout(message.delay_deny.as_ref()).within("delay_deny")?;
                let rules = Rules::compile_network(message, workers, counters)?;
                Ok(Some(Self::Rbac {
                    rules: Box::new(rules),
                    delay,
                }))
            }
            (Some(any), "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit") => {
                let (workers, counters) = context.counters();
                let limit = ConnectionRateLimit::compile(
                    &convert::unpack(any, type_name)?,
                    workers,
                    counters,
                    clock::now_ms(),
                )?;
                Ok(Some(Self::LocalRateLimit(Arc::new(limit))))
            }
            (Some(any), "envoy.extensions.filters.network.set_filter_state.v3.Config") => {
                let state = SetConnectionState::compile(&convert::unpack(any, type_name)?)?;
                Ok(Some(Self::SetFilterState(Box::new(state))))
            }
            (None, _) if name == "envoy.filters.network.rbac" => {
                Err(Refusal::new("typed_config", "is missing")).within(name)
            }
            _ => Ok(None),
        }
    }

    /// Judges a connection.
    pub fn judge(&self, facts: &Facts<'_>, now_ms: u64, worker: usize) -> (Option<Denied>, Option<Metadata>) {
        match self {
            Self::Rbac { rules, delay } => {
                let (denied, notes) = rules.judge(facts, worker);
                let metadata = (!notes.is_empty()).then(|| {
                    let mut metadata = facts.metadata.clone();
                    notes.write(NETWORK_NAMESPACE, &mut metadata);
                    metadata
                });
                let denied = denied.map(|details| Denied {
                    details,
                    limited: false,
                    delay: *delay,
                });
                (denied, metadata)
            }
            Self::LocalRateLimit(limit) => {
                let denied = (!limit.admits(now_ms, worker)).then(|| Denied {
                    details: "local_rate_limited".into(),
                    limited: true,
                    delay: None,
                });
                (denied, None)
            }
            Self::SetFilterState(_) => (None, None),
        }
    }
}
