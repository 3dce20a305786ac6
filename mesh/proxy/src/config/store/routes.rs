//! Route configurations and their virtual hosts: taken, indexed by domain, replaced one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serin_xds::pb::envoy::config::route::v3 as pb_route;

use super::{Store, Update, decode};
use crate::config::headers::HeaderOps;
use crate::config::route::{Context, VirtualHost};
use crate::config::slot::{RouteSlot, VirtualHostSlot};
use crate::config::table::{DomainIndex, RouteTable};
use crate::error::{Refusal, Within};
use crate::policy::per_route::PerRoute;
use crate::random;

/// State of one route configuration.
#[derive(Debug)]
pub(super) struct RouteState {
    pub(super) slot: Arc<RouteSlot>,
    /// The message without its virtual hosts; `None` while only virtual hosts have arrived.
    pub(super) base: Option<pb_route::RouteConfiguration>,
    /// Filter configuration of the message, compiled with it.
    per_filter: Arc<PerRoute>,
    pub(super) inline: Vec<Arc<VirtualHostSlot>>,
    pub(super) discovered: BTreeMap<Box<str>, Arc<VirtualHostSlot>>,
}

impl Store {
    pub(super) fn route_state(&mut self, name: &str) -> &mut RouteState {
        let slot = self.slots.route(name);
        self.routes
            .entry(slot.name.clone())
            .or_insert_with(|| RouteState {
                slot,
                base: None,
                per_filter: Arc::default(),
                inline: Vec::new(),
                discovered: BTreeMap::new(),
            })
    }

    pub(super) fn put_route(
        &mut self,
        update: &Update<'_>,
        dirty: &mut BTreeSet<Arc<str>>,
    ) -> Result<(), Refusal> {
        let mut message = decode::<pb_route::RouteConfiguration>(update)?;
        let mut context = Context {
            slots: &mut self.slots,
            workers: self.workers,
            seed: random::next(),
        };
        let inline = compile_hosts(&message, &mut context)?;
        // Compiled before it is kept, so that a refusal leaves the last good one.
        check_table(&message, &inline)?;
        let per_filter = Arc::new(PerRoute::compile(&message.typed_per_filter_config, &mut context)?);
        message.virtual_hosts.clear();
        let state = self.route_state(update.name);
        state.per_filter = per_filter;
        state.base = Some(message);
        state.inline = inline;
        dirty.insert(state.slot.name.clone());
        Ok(())
    }

    pub(super) fn remove_route(&mut self, name: &str) {
        if let Some(state) = self.routes.get_mut(name) {
            state.base = None;
            state.inline.clear();
            state.slot.set(None);
            if state.discovered.is_empty()
                && !self
                    .listeners
                    .values()
                    .any(|l| l.route_names().any(|n| &*n == name))
            {
                self.routes.remove(name);
            }
        }
    }

    pub(super) fn put_virtual_host(
        &mut self,
        update: &Update<'_>,
        dirty: &mut BTreeSet<Arc<str>>,
    ) -> Result<(), Refusal> {
        let (route_name, host_name) = split_host_name(update.name)?;
        let message = decode::<pb_route::VirtualHost>(update)?;
        let mut context = Context {
            slots: &mut self.slots,
            workers: self.workers,
            seed: random::next(),
        };
        let host = VirtualHost::compile(&message, &mut context)?;
        let state = self.route_state(route_name);
        match state.discovered.get(host_name) {
            // The common case, a weight change: one swap, and the table is not touched.
            Some(slot) if slot.load().domains == host.domains => slot.set(host),
            _ => {
                // A new slot also when domains change, so that until the table is rebuilt the old one stays whole.
                state
                    .discovered
                    .insert(host_name.into(), Arc::new(VirtualHostSlot::new(host)));
                dirty.insert(state.slot.name.clone());
            }
        }
        Ok(())
    }

    pub(super) fn remove_virtual_host(&mut self, name: &str, dirty: &mut BTreeSet<Arc<str>>) {
        let Ok((route_name, host_name)) = split_host_name(name) else {
            return;
        };
        if let Some(state) = self.routes.get_mut(route_name)
            && state.discovered.remove(host_name).is_some()
        {
            dirty.insert(state.slot.name.clone());
        }
    }

    /// Rebuilds the domain index of a route configuration. A discovered host that claims the domain of another is left
    /// out and named.
    pub(super) fn rebuild(&mut self, name: &str) -> Vec<(Box<str>, Refusal)> {
        let Some(state) = self.routes.get_mut(name) else {
            return Vec::new();
        };
        let Some(base) = &state.base else {
            state.slot.set(None);
            return Vec::new();
        };
        let mut refused = Vec::new();
        let mut domains = DomainIndex::default();
        for host in &state.inline {
            // Checked when the configuration was taken.
            let _ = insert_host(&mut domains, host);
        }
        state
            .discovered
            .retain(|host_name, host| match insert_host(&mut domains, host) {
                Ok(()) => true,
                Err(refusal) => {
                    refused.push((format!("{name}/{host_name}").into(), refusal));
                    false
                }
            });
        match table_of(base, domains, state.per_filter.clone()) {
            Ok(table) => state.slot.set(Some(Arc::new(table))),
            Err(refusal) => refused.push((name.into(), refusal)),
        }
        refused
    }
}

fn split_host_name(name: &str) -> Result<(&str, &str), Refusal> {
    name.split_once('/').ok_or_else(|| {
        Refusal::new(
            "name",
            "a virtual host resource is named <route configuration>/<virtual host>",
        )
    })
}

fn compile_hosts(
    from: &pb_route::RouteConfiguration,
    context: &mut Context<'_>,
) -> Result<Vec<Arc<VirtualHostSlot>>, Refusal> {
    from.virtual_hosts
        .iter()
        .enumerate()
        .map(|(index, host)| {
            VirtualHost::compile(host, context)
                .map(|host| Arc::new(VirtualHostSlot::new(host)))
                .within(format!("virtual_hosts[{index}]"))
        })
        .collect()
}

fn insert_host(domains: &mut DomainIndex, host: &Arc<VirtualHostSlot>) -> Result<(), Refusal> {
    let loaded = host.load();
    loaded
        .domains
        .iter()
        .try_for_each(|domain| domains.check(domain, host))?;
    loaded
        .domains
        .iter()
        .for_each(|domain| domains.insert(domain, host));
    Ok(())
}

fn check_table(from: &pb_route::RouteConfiguration, hosts: &[Arc<VirtualHostSlot>]) -> Result<(), Refusal> {
    let mut domains = DomainIndex::default();
    for (index, host) in hosts.iter().enumerate() {
        insert_host(&mut domains, host).within(format!("virtual_hosts[{index}]"))?;
    }
    table_of(from, domains, Arc::default()).map(drop)
}

fn table_of(
    from: &pb_route::RouteConfiguration,
    domains: DomainIndex,
    per_filter: Arc<PerRoute>,
) -> Result<RouteTable, Refusal> {
    let unsupported = [
        ("vhost_header", !from.vhost_header.is_empty()),
        (
            "cluster_specifier_plugins",
            !from.cluster_specifier_plugins.is_empty(),
        ),
        (
            "request_mirror_policies",
            !from.request_mirror_policies.is_empty(),
        ),
        (
            "most_specific_header_mutations_wins",
            from.most_specific_header_mutations_wins,
        ),
        (
            "ignore_path_parameters_in_path_matching",
            from.ignore_path_parameters_in_path_matching,
        ),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
        return Err(Refusal::new(*field, "not supported"));
    }
    let (request_headers, response_headers) = HeaderOps::of(from)?;
    Ok(RouteTable {
        name: from.name.as_str().into(),
        domains,
        discovers_hosts: from.vhds.is_some(),
        ignore_port: from.ignore_port_in_host_matching,
        request_headers,
        response_headers,
        per_filter,
    })
}

/// Compiles the route configuration that a listener carries itself.
pub(in crate::config) fn compile_inline_routes(
    from: &pb_route::RouteConfiguration,
    context: &mut Context<'_>,
) -> Result<RouteTable, Refusal> {
    if from.vhds.is_some() {
        return Err(Refusal::new("vhds", "needs a route configuration by RDS"));
    }
    let hosts = compile_hosts(from, context)?;
    let mut domains = DomainIndex::default();
    for (index, host) in hosts.iter().enumerate() {
        insert_host(&mut domains, host).within(format!("virtual_hosts[{index}]"))?;
    }
    let per_filter = Arc::new(PerRoute::compile(&from.typed_per_filter_config, context)?);
    table_of(from, domains, per_filter)
}
