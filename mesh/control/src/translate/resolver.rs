//! Which cluster, port and policy a rule's backend means for one client.

use std::sync::Arc;

use serin_crds::istio::TrafficPolicy;
use serin_model::route::Backend;
use serin_model::{Client, Model};

use super::cluster::{self, Side};
use super::route::Destinations;

/// Destinations as one client sees them.
pub(super) struct Resolver<'a> {
    pub(super) model: &'a Model,
    pub(super) client: &'a Client,
    pub(super) side: Side,
}

impl Resolver<'_> {
    /// An alias stands for another host.
    pub(super) fn host(&self, host: &Arc<str>) -> Arc<str> {
        self.model
            .visible_service(host, self.client)
            .and_then(|service| service.alias_of.clone())
            .unwrap_or_else(|| host.clone())
    }

    /// The port of a backend: the one it names, else that of the listener. A gateway, whose listener's port says nothing about
    /// services, takes the only port of the service if it has but one; a sidecar does not, as in Istio, since there the caller
    /// chose the port.
    fn port(&self, backend: &Backend, listener: u16) -> u16 {
        let only = || {
            let service = self
                .model
                .visible_service(&self.host(&backend.host), self.client)?;
            match service.ports.as_slice() {
                [only] if self.side == Side::Router => Some(only.number),
                _ => None,
            }
        };
        backend.port.or_else(only).unwrap_or(listener)
    }
}

impl Destinations for Resolver<'_> {
    fn cluster(&self, backend: &Backend, port: u16) -> String {
        cluster::name(
            self.port(backend, port),
            backend.subset.as_deref().unwrap_or(""),
            &self.host(&backend.host),
        )
    }

    fn policy(&self, backend: &Backend, port: u16) -> Option<TrafficPolicy> {
        let service = self
            .model
            .visible_service(&self.host(&backend.host), self.client)?;
        let policy = self
            .model
            .policy(&service.host, &service.namespace, self.client)?;
        Some(policy.for_port(backend.subset.as_deref(), self.port(backend, port)))
    }
}
