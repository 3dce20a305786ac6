//! What gateways open: listeners, route configurations and their hosts, from Gateways and the VirtualServices bound to them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serin_model::{Client, Model, ObjectKey, Protocol, Provenance, Server, TargetPort, host};
use serin_xds::pb::envoy::config::route::v3 as pb;
use serin_xds::resource::ResourceType;

use super::listener;
use super::outbound::{Context, Made, destinations, is_for, routes};
use super::resolver::Resolver;
use super::view::{Built, Slot};
use super::wire;

/// One rule set under one gateway that a virtual host is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    rules: ObjectKey,
    gateway: Arc<str>,
}

/// A virtual host of a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Host {
    sources: Vec<Source>,
    /// Port as the Gateway names it; in the host's name and in what rules see.
    port: u16,
    /// Plain requests are redirected to https.
    redirect: bool,
}

/// A port that a gateway opens.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Opened {
    http: bool,
    address: Arc<str>,
    port: u16,
    /// Port as the Gateway names it.
    server_port: u16,
    gateways: Vec<Arc<str>>,
    origins: Vec<Provenance>,
}

/// What the proxies of a gateway open.
#[derive(Debug, Default)]
pub(super) struct Structure {
    listeners: BTreeMap<Arc<str>, Opened>,
    hosts: BTreeMap<(Arc<str>, Arc<str>), Host>,
}

/// Host of a route configuration that has no other: everything is 404.
const BLACKHOLE: &str = "blackhole";

impl Structure {
    /// What the gateways that select this client open.
    pub(super) fn of(model: &Model, client: &Client) -> Self {
        let mut structure = Self::default();
        for gateway in model.gateways(&client.labels) {
            for server in &gateway.servers {
                structure.open(model, client, &gateway, server);
            }
        }
        let routes: Vec<(Arc<str>, u16)> = structure
            .listeners
            .values()
            .filter(|opened| opened.http)
            .map(|opened| (route_name(opened.port), opened.server_port))
            .collect();
        for (route, port) in routes {
            if !structure.hosts.keys().any(|(of, _)| *of == route) {
                structure.hosts.insert(
                    (route, BLACKHOLE.into()),
                    Host {
                        sources: Vec::new(),
                        port,
                        redirect: false,
                    },
                );
            }
        }
        structure
    }

    fn open(&mut self, model: &Model, client: &Client, gateway: &serin_model::Gateway, server: &Server) {
        let http = server.protocol.is_http();
        let plain_tcp = matches!(server.protocol, Protocol::Tcp | Protocol::Mongo);
        if !http && !plain_tcp {
            // TLS servers come with certificates; `serin_model::unhonoured` names them until then.
            return;
        }
        let port = target_port(model, client, server.port);
        let address: Arc<str> = server.bind.clone().unwrap_or_else(|| "0.0.0.0".into());
        let name: Arc<str> = format!("{address}_{port}").into();
        let opened = self.listeners.entry(name).or_insert_with(|| Opened {
            http,
            address,
            port,
            server_port: server.port,
            gateways: Vec::new(),
            origins: Vec::new(),
        });
        if opened.http != http {
            // The senior gateway has the port; the other protocol has lost it.
            return;
        }
        if !opened.gateways.contains(&gateway.name) {
            opened.gateways.push(gateway.name.clone());
            opened.origins.push(gateway.provenance.clone());
        }
        if !http {
            return;
        }
        let route = route_name(port);
        let redirect = server
            .tls
            .as_ref()
            .is_some_and(|tls| tls.https_redirect == Some(true));
        for rules in model.gateway_rules(&gateway.name) {
            if !rules.visibility.includes(&client.namespace) || rules.http.is_empty() {
                continue;
            }
            for wanted in &rules.hosts {
                for exposed in server.exposes(wanted, &rules.provenance.object.namespace) {
                    let entry = self
                        .hosts
                        .entry((route.clone(), exposed.into()))
                        .or_insert_with(|| Host {
                            sources: Vec::new(),
                            port: server.port,
                            redirect: false,
                        });
                    entry.redirect |= redirect;
                    let source = Source {
                        rules: rules.provenance.object.clone(),
                        gateway: gateway.name.clone(),
                    };
                    if !entry.sources.contains(&source) {
                        entry.sources.push(source);
                    }
                }
            }
        }
        if redirect {
            for exposed in &server.hosts {
                self.hosts
                    .entry((route.clone(), exposed.host.clone()))
                    .or_insert_with(|| Host {
                        sources: Vec::new(),
                        port: server.port,
                        redirect: true,
                    })
                    .redirect = true;
            }
        }
    }

    /// Every slot of the structure.
    pub(super) fn slots(&self) -> BTreeSet<Slot> {
        let listeners = self.listeners.keys().map(|name| Slot::Listener(name.clone()));
        let routes = self
            .listeners
            .values()
            .filter(|opened| opened.http)
            .map(|opened| Slot::Route(route_name(opened.port)));
        let hosts = self
            .hosts
            .keys()
            .map(|(route, host)| Slot::VirtualHost(route.clone(), host.clone()));
        listeners.chain(routes).chain(hosts).collect()
    }

    /// Slots that are in both and not the same.
    pub(super) fn differing(&self, old: &Self) -> BTreeSet<Slot> {
        let listeners = self
            .listeners
            .iter()
            .filter(|(name, opened)| old.listeners.get(*name).is_some_and(|known| known != *opened))
            .map(|(name, _)| Slot::Listener(name.clone()));
        let hosts = self
            .hosts
            .iter()
            .filter(|(name, host)| old.hosts.get(*name).is_some_and(|known| known != *host))
            .map(|((route, host), _)| Slot::VirtualHost(route.clone(), host.clone()));
        listeners.chain(hosts).collect()
    }

    /// Slots that rules for a host or wildcard go into.
    pub(super) fn slots_under(&self, pattern: &str) -> BTreeSet<Slot> {
        let routes: BTreeSet<&Arc<str>> = self.hosts.keys().map(|(route, _)| route).collect();
        let mut slots = BTreeSet::new();
        if host::is_wildcard(pattern) {
            slots.extend(
                self.hosts
                    .keys()
                    .filter(|(_, host)| host::intersection(pattern, host).is_some())
                    .map(|(route, host)| Slot::VirtualHost(route.clone(), host.clone())),
            );
        } else {
            // What a gateway exposes of a host without a wildcard is that host.
            let name: Arc<str> = pattern.into();
            slots.extend(
                routes
                    .into_iter()
                    .filter(|route| self.hosts.contains_key(&((*route).clone(), name.clone())))
                    .map(|route| Slot::VirtualHost(route.clone(), name.clone())),
            );
        }
        slots.extend(
            self.listeners
                .iter()
                .filter(|(_, opened)| !opened.http)
                .map(|(name, _)| Slot::Listener(name.clone())),
        );
        slots
    }

    pub(super) fn listener(&self, ctx: &Context<'_>, name: &str) -> Built {
        let mut built = Built::default();
        let Some(opened) = self.listeners.get(name) else {
            return built;
        };
        for origin in &opened.origins {
            built.origin(origin);
        }
        let message = if opened.http {
            listener::gateway_http(&opened.address, opened.port, &route_name(opened.port))
        } else {
            let chains = tcp_chains(ctx, opened, &mut built);
            if chains.is_empty() {
                return built;
            }
            listener::gateway_tcp(&opened.address, opened.port, &chains)
        };
        built.push(ResourceType::Listener, name, &message);
        built
    }

    pub(super) fn virtual_host(
        &self,
        ctx: &Context<'_>,
        route: &Arc<str>,
        host: &Arc<str>,
    ) -> (Made, BTreeSet<Arc<str>>) {
        let mut hosts = BTreeSet::new();
        let Some(known) = self.hosts.get(&(route.clone(), host.clone())) else {
            return (None, hosts);
        };
        if &**host == BLACKHOLE {
            let blackhole = pb::VirtualHost {
                name: format!("{BLACKHOLE}:{}", known.port),
                domains: vec!["*".to_owned()],
                ..Default::default()
            };
            return (Some((blackhole, BTreeSet::new())), hosts);
        }
        let resolver = Resolver {
            model: ctx.model,
            client: ctx.client,
            side: ctx.side,
        };
        let (mut made, mut last) = (Vec::new(), Vec::new());
        let mut origins = BTreeSet::new();
        for source in &known.sources {
            let Some(rules) = ctx.model.rules_of(&source.rules) else {
                continue;
            };
            origins.insert(wire::origin(&rules.provenance));
            for route in routes(
                rules,
                &resolver,
                &source.gateway,
                known.port,
                &mut hosts,
                &mut origins,
            ) {
                // Catch-alls of one rule set must not hide the routes of the next.
                if is_catch_all(&route) {
                    last.push(route)
                } else {
                    made.push(route)
                }
            }
        }
        made.append(&mut last);
        let virtual_host = pb::VirtualHost {
            name: format!("{host}:{}", known.port),
            domains: vec![host.to_string()],
            routes: made,
            include_request_attempt_count: true,
            require_tls: if known.redirect {
                pb::virtual_host::TlsRequirementType::All as i32
            } else {
                pb::virtual_host::TlsRequirementType::None as i32
            },
            ..Default::default()
        };
        (Some((virtual_host, origins)), hosts)
    }
}

fn route_name(port: u16) -> Arc<str> {
    format!("http.{port}").into()
}

fn is_catch_all(route: &pb::Route) -> bool {
    route.r#match.as_ref().is_some_and(|matches| {
        matches.headers.is_empty()
            && matches.query_parameters.is_empty()
            && matches.dynamic_metadata.is_empty()
            && match &matches.path_specifier {
                Some(pb::route_match::PathSpecifier::Prefix(prefix)) => prefix == "/",
                Some(pb::route_match::PathSpecifier::SafeRegex(regex)) => regex.regex == ".*",
                _ => false,
            }
    })
}

/// The port of the Pod behind the Service port that a Gateway names; the number itself where no Service leads there.
fn target_port(model: &Model, client: &Client, port: u16) -> u16 {
    model
        .services_selecting(&client.namespace, &client.labels)
        .filter_map(|service| service.port(port))
        .find_map(|port| match &port.target {
            TargetPort::Number(number) => Some(*number),
            TargetPort::Name(name) => model.named_port(&client.namespace, &client.labels, name),
        })
        .unwrap_or(port)
}

/// The first TCP route that is for this gateway and port takes all connections that come to it.
fn tcp_chains(ctx: &Context<'_>, opened: &Opened, built: &mut Built) -> Vec<listener::TcpChain> {
    let resolver = Resolver {
        model: ctx.model,
        client: ctx.client,
        side: ctx.side,
    };
    for gateway in &opened.gateways {
        for rules in ctx.model.gateway_rules(gateway) {
            for rule in &rules.tcp {
                let applies = rule.matches.is_empty()
                    || rule
                        .matches
                        .iter()
                        .any(|block| is_for(&block.audience, ctx.client, gateway, opened.server_port));
                if applies {
                    built.origin(&rule.provenance);
                    built
                        .hosts
                        .extend(rule.backends.iter().map(|backend| backend.host.clone()));
                    return vec![listener::TcpChain {
                        matches: None,
                        destinations: destinations(rule, &resolver, opened.server_port),
                        limits: listener::ConnectionLimits::default(),
                        origin: None,
                        name: String::new(),
                    }];
                }
            }
        }
    }
    Vec::new()
}
