//! What sidecars (and, for clusters and endpoints, gateways too) send to: the slots of a service and their translation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serin_model::route::{Audience, ConnectionRoute, MESH};
use serin_model::{Client, HostPolicy, Locality, Model, Port, Protocol, Resolution, RuleSet, Service, host};
use serin_xds::pb::envoy::config::cluster::v3::cluster::DiscoveryType;
use serin_xds::pb::envoy::config::listener::v3 as listener_pb;
use serin_xds::pb::envoy::config::route::v3 as pb;
use serin_xds::resource::{Origin, ResourceType};

use super::cluster::{self, Side};
use super::listener::{self, Destination, TcpChain};
use super::resolver::Resolver;
use super::route::{self, Destinations};
use super::view::{Built, Slot};
use super::{endpoint, wire};

/// Name of the virtual host that takes what no other takes.
pub(super) const ALLOW_ANY: &str = "allow_any";
const BLOCK_ALL: &str = "block_all";
/// Direct responses up to this size are taken; Istio's limit.
const DIRECT_RESPONSE_LIMIT: u32 = 1 << 20;
/// Hosts of VirtualServices that no service has are served on this port only, as in Istio.
const NAMED_PORT: u16 = 80;

/// For whom things are translated.
pub(super) struct Context<'a> {
    pub(super) model: &'a Model,
    pub(super) client: &'a Client,
    pub(super) side: Side,
    pub(super) locality: Option<&'a Locality>,
}

/// `80`, or `host:port` where the protocol is found out per connection.
fn route_name(service: &Service, port: &Port) -> Arc<str> {
    if port.protocol == Protocol::Auto {
        format!("{}:{}", service.host, port.number).into()
    } else {
        port.number.to_string().into()
    }
}

/// The slots that a service asks for.
pub(super) fn slots(service: &Service, model: &Model, client: &Client, side: Side) -> BTreeSet<Slot> {
    let mut slots = BTreeSet::new();
    let aliased = service.resolution == Resolution::Alias;
    if !aliased && service.ports.iter().any(|port| port.protocol != Protocol::Udp) {
        slots.insert(Slot::Clusters(service.host.clone()));
        slots.insert(Slot::Endpoints(service.host.clone()));
    }
    if side == Side::Router {
        return slots;
    }
    for port in service.ports.iter().filter(|port| port.protocol != Protocol::Udp) {
        if aliased {
            // Another name for another host: only rules of its own give it a virtual host.
            if port.protocol.is_http() && model.rules(&service.host, client).is_some() {
                slots.insert(Slot::VirtualHost(
                    port.number.to_string().into(),
                    service.host.clone(),
                ));
            }
            continue;
        }
        if port.protocol.is_http_or_auto() {
            let name = route_name(service, port);
            slots.insert(Slot::VirtualHost(name.clone(), service.host.clone()));
            if port.protocol.is_http() {
                slots.insert(Slot::VirtualHost(name.clone(), ALLOW_ANY.into()));
            }
            slots.insert(Slot::Route(name));
        }
        for address in listen_addresses(service, port, model) {
            slots.insert(Slot::Listener(format!("{address}_{}", port.number).into()));
        }
    }
    slots
}

/// Where a port is captured: HTTP on any address (the host decides), others on the service's or its Pods' addresses.
fn listen_addresses(service: &Service, port: &Port, model: &Model) -> Vec<String> {
    if port.protocol.is_http() {
        return vec!["0.0.0.0".to_owned()];
    }
    if !service.addresses.is_empty() {
        let mut addresses: Vec<String> = service.addresses.iter().map(ToString::to_string).collect();
        if !service.subnets.is_empty() {
            addresses.push("0.0.0.0".to_owned());
        }
        return addresses;
    }
    if service.headless {
        let mut addresses: Vec<String> = model
            .endpoints(&service.host)
            .iter()
            .map(|endpoint| endpoint.address.to_string())
            .collect();
        addresses.sort();
        addresses.dedup();
        return addresses;
    }
    vec!["0.0.0.0".to_owned()]
}

/// The ports on which a host that rules name and no service has is served: those of the services that the same rules name, else 80.
fn named_ports(rules: &RuleSet, model: &Model, client: &Client) -> BTreeSet<u16> {
    let mut ports: BTreeSet<u16> = rules
        .hosts
        .iter()
        .filter_map(|host| model.visible_service(host, client))
        .flat_map(|service| &service.ports)
        .filter(|port| port.protocol.is_http())
        .map(|port| port.number)
        .collect();
    if ports.is_empty() {
        ports.insert(NAMED_PORT);
    }
    ports
}

/// The slots of a host that rules name and no service has.
pub(super) fn named_slots(pattern: &Arc<str>, model: &Model, client: &Client) -> BTreeSet<Slot> {
    let mut slots = BTreeSet::new();
    let Some(rules) = model
        .rules_named(pattern, client)
        .filter(|rules| !rules.http.is_empty())
    else {
        return slots;
    };
    let taken = if host::is_wildcard(pattern) {
        model
            .visible_services(client)
            .any(|service| host::covers(pattern, &service.host))
    } else {
        model.visible_service(pattern, client).is_some()
    };
    if !taken {
        let ports = named_ports(rules, model, client).into_iter();
        slots.extend(ports.map(|port| Slot::VirtualHost(port.to_string().into(), pattern.clone())));
    }
    slots
}

/// The service that a name like `web`, `web.b` or `web.b.svc` is one of the names of.
pub(super) fn owner_of_short_name(name: &str, client: &Client, model: &Model) -> Option<Arc<str>> {
    let domain = &model.config().domain;
    let mut parts = name.trim_end_matches('.').split('.');
    let (service, namespace) = (parts.next()?, parts.next().unwrap_or(&client.namespace));
    let full = format!("{service}.{namespace}.svc.{domain}");
    (full != name)
        .then(|| model.visible_service(&full, client))
        .flatten()
        .map(|service| service.host.clone())
}

/// A route configuration; its hosts come on their own unless they are given.
pub(super) fn route_configuration(
    name: &str,
    virtual_hosts: Vec<pb::VirtualHost>,
    vhds: bool,
) -> pb::RouteConfiguration {
    pb::RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts,
        vhds: vhds.then(|| pb::Vhds {
            config_source: Some(wire::ads()),
        }),
        // A route may name a cluster that is not there yet: that request fails, the others do not.
        validate_clusters: Some(wire::boolean(false)),
        max_direct_response_body_size_bytes: Some(wire::uint32(DIRECT_RESPONSE_LIMIT)),
        ignore_port_in_host_matching: true,
        ..Default::default()
    }
}

/// Whether a rule is for this client, gateway and port.
pub(super) fn is_for(audience: &Audience, client: &Client, gateway: &str, port: u16) -> bool {
    audience.port.is_none_or(|wanted| wanted == port)
        && audience
            .namespace
            .as_deref()
            .is_none_or(|wanted| wanted == &*client.namespace)
        && audience
            .labels
            .iter()
            .all(|(key, value)| client.labels.get(key) == Some(value))
        && (audience.gateways.is_empty() || audience.gateways.iter().any(|wanted| &**wanted == gateway))
}

/// The routes of a rule set for a client; nothing after a catch-all is sent.
pub(super) fn routes(
    rules: &RuleSet,
    resolver: &Resolver<'_>,
    gateway: &str,
    port: u16,
    hosts: &mut BTreeSet<Arc<str>>,
    origins: &mut BTreeSet<Origin>,
) -> Vec<pb::Route> {
    let mut out = Vec::new();
    for rule in &rules.http {
        if !is_for(&rule.audience, resolver.client, gateway, port) {
            continue;
        }
        for backend in rule.hosts() {
            hosts.insert(resolver.host(&backend.host));
            hosts.insert(backend.host.clone());
        }
        origins.insert(wire::origin(&rule.provenance));
        origins.extend(rule.also.iter().map(wire::origin));
        out.push(route::translate(rule, port, resolver));
        if rule.matches.is_catch_all() {
            break;
        }
    }
    out
}

/// A virtual host and the objects that it was made from.
pub(super) type Made = Option<(pb::VirtualHost, BTreeSet<Origin>)>;

impl Context<'_> {
    fn resolver(&self) -> Resolver<'_> {
        Resolver {
            model: self.model,
            client: self.client,
            side: self.side,
        }
    }

    pub(super) fn registry_only(&self) -> bool {
        self.client
            .scope
            .as_ref()
            .and_then(|scope| scope.registry_only)
            .unwrap_or(self.model.config().registry_only)
    }

    fn policy(&self, service: &Service) -> Option<HostPolicy> {
        self.model.policy(&service.host, &service.namespace, self.client)
    }

    /// Every port and subset of a service, with the load assignment where the endpoints are part of the cluster.
    pub(super) fn clusters(&self, host: &Arc<str>) -> Built {
        let mut built = Built::default();
        let Some(service) = self.model.visible_service(host, self.client) else {
            return built;
        };
        let policy = self.policy(service);
        for origin in policy.iter().flat_map(|policy| &policy.provenance) {
            built.origin(origin);
        }
        if !service.kubernetes {
            built.origin(&service.provenance);
        }
        let endpoints = self.model.endpoints(host);
        for port in service.ports.iter().filter(|port| port.protocol != Protocol::Udp) {
            for subset in subsets(policy.as_ref()) {
                let mut made = cluster::outbound(service, port, subset, policy.as_ref(), self.side);
                if matches!(service.resolution, Resolution::Dns | Resolution::DnsRoundRobin) {
                    made.load_assignment =
                        Some(self.assignment(service, port, subset, policy.as_ref(), &endpoints));
                }
                built.push(ResourceType::Cluster, &made.name.clone(), &made);
            }
        }
        built
    }

    fn assignment(
        &self,
        service: &Service,
        port: &Port,
        subset: Option<&str>,
        policy: Option<&HostPolicy>,
        endpoints: &[serin_model::Endpoint],
    ) -> serin_xds::pb::envoy::config::endpoint::v3::ClusterLoadAssignment {
        let traffic = policy
            .map(|policy| policy.for_port(subset, port.number))
            .unwrap_or_default();
        let empty = BTreeMap::new();
        let labels = subset
            .and_then(|name| policy?.subsets.iter().find(|subset| subset.name == name))
            .map_or(&empty, |subset| &subset.labels);
        let nowhere = Locality::default();
        endpoint::assignment(
            &cluster::name(port.number, subset.unwrap_or(""), &service.host),
            service,
            port,
            endpoints,
            labels,
            &traffic,
            &endpoint::Nearness {
                client: self.locality.unwrap_or(&nowhere),
                labels: &self.client.labels,
                cluster_id: &self.model.config().cluster_id,
            },
        )
    }

    /// The load assignments of a service's clusters.
    pub(super) fn endpoints(&self, host: &Arc<str>) -> Built {
        let mut built = Built::default();
        let Some(service) = self.model.visible_service(host, self.client) else {
            return built;
        };
        let policy = self.policy(service);
        let endpoints = self.model.endpoints(host);
        for port in service.ports.iter().filter(|port| port.protocol != Protocol::Udp) {
            for subset in subsets(policy.as_ref()) {
                let traffic = policy
                    .as_ref()
                    .map(|policy| policy.for_port(subset, port.number))
                    .unwrap_or_default();
                if cluster::discovery(service, &traffic, self.side) == DiscoveryType::Eds {
                    let made = self.assignment(service, port, subset, policy.as_ref(), &endpoints);
                    built.push(ResourceType::Endpoints, &made.cluster_name.clone(), &made);
                }
            }
        }
        for origin in policy.iter().flat_map(|policy| &policy.provenance) {
            built.origin(origin);
        }
        built
    }

    /// A virtual host of a sidecar's route configuration.
    pub(super) fn virtual_host(&self, route: &str, host: &Arc<str>) -> (Made, BTreeSet<Arc<str>>) {
        let mut hosts = BTreeSet::from([host.clone()]);
        if &**host == ALLOW_ANY {
            return (Some((self.catch_all(), BTreeSet::new())), BTreeSet::new());
        }
        let service = self.model.visible_service(host, self.client);
        let sniffed = route.contains(':');
        let Some(port) = route.rsplit(':').next().and_then(|port| port.parse::<u16>().ok()) else {
            return (None, hosts);
        };
        let mut origins = BTreeSet::new();
        let rules = self
            .model
            .rules(host, self.client)
            .filter(|rules| !rules.http.is_empty());
        let mut made = Vec::new();
        if let Some(rules) = rules {
            origins.insert(wire::origin(&rules.provenance));
            made = routes(rules, &self.resolver(), MESH, port, &mut hosts, &mut origins);
        }
        let domains = match service {
            Some(service) if !sniffed => self.domains(service, port),
            Some(_) => vec!["*".to_owned()],
            None => vec![host.to_string()],
        };
        if made.is_empty() {
            let Some(service) = service else {
                return (None, hosts);
            };
            let policy = self.policy(service).map(|policy| policy.for_port(None, port));
            let mut default = route::default_route(&cluster::name(port, "", host), policy.as_ref());
            default.decorator = Some(pb::Decorator {
                operation: format!("{host}:{port}/*"),
                ..Default::default()
            });
            made.push(default);
            origins.clear();
        }
        let virtual_host = pb::VirtualHost {
            name: format!("{host}:{port}"),
            domains,
            routes: made,
            include_request_attempt_count: true,
            ..Default::default()
        };
        (Some((virtual_host, origins)), hosts)
    }

    /// The names of a service on a port, without those that rules claim for themselves.
    fn domains(&self, service: &Service, port: u16) -> Vec<String> {
        let domain = &self.model.config().domain;
        let claimed = |name: &String| {
            **name != *service.host
                && self
                    .model
                    .rules_named(name, self.client)
                    .filter(|rules| !rules.http.is_empty())
                    .is_some_and(|rules| named_ports(rules, self.model, self.client).contains(&port))
        };
        let mut domains = service.domains(&self.client.namespace, domain);
        domains.retain(|name| !claimed(name));
        for alias in self.model.aliases_of(&service.host) {
            // An alias with rules of its own on this port has a virtual host of its own.
            let own = alias.port(port).is_some_and(|port| port.protocol.is_http())
                && self.model.rules(&alias.host, self.client).is_some();
            if !own && alias.visibility.includes(&self.client.namespace) {
                domains.extend(alias.domains(&self.client.namespace, domain));
            }
        }
        domains.extend(service.subnets.iter().cloned());
        domains.extend(service.addresses.iter().map(|address| match address {
            std::net::IpAddr::V4(address) => address.to_string(),
            std::net::IpAddr::V6(address) => format!("[{address}]"),
        }));
        if service.headless {
            // Callers may also name single Pods: `pod.service.namespace...`.
            let pods: Vec<String> = domains.iter().map(|name| format!("*.{name}")).collect();
            domains.extend(pods);
        }
        domains
    }

    fn catch_all(&self) -> pb::VirtualHost {
        let (name, route) = if self.registry_only() {
            let mut route = route::passthrough_route(BLOCK_ALL, "");
            route.action = Some(pb::route::Action::DirectResponse(pb::DirectResponseAction {
                status: 502,
                ..Default::default()
            }));
            (BLOCK_ALL, route)
        } else {
            (
                ALLOW_ANY,
                route::passthrough_route(ALLOW_ANY, "PassthroughCluster"),
            )
        };
        pb::VirtualHost {
            name: name.to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            include_request_attempt_count: true,
            ..Default::default()
        }
    }

    /// A captured listener; `owners` are the services that ask for it, of which the first decides where they disagree.
    pub(super) fn listener(&self, name: &str, owners: Option<&BTreeSet<Arc<str>>>) -> Built {
        let mut built = Built::default();
        let Some((address, port)) = name
            .rsplit_once('_')
            .and_then(|(a, p)| Some((a, p.parse::<u16>().ok()?)))
        else {
            return built;
        };
        let claims: Vec<(&Arc<Service>, &Port)> = owners
            .into_iter()
            .flatten()
            .filter_map(|host| self.model.visible_service(host, self.client))
            .filter_map(|service| service.port(port).map(|port| (service, port)))
            .collect();
        // HTTP on any address goes before a TCP service without an address of its own.
        let Some((service, claimed)) = claims
            .iter()
            .find(|(_, port)| port.protocol.is_http())
            .or_else(|| claims.first())
            .copied()
        else {
            return built;
        };
        let message = if claimed.protocol.is_http() {
            listener::http(address, port, &port.to_string(), self.registry_only())
        } else if address == "0.0.0.0" && (claimed.protocol.is_tls() || !service.subnets.is_empty()) {
            self.by_name(port, &claims, &mut built)
        } else {
            let (chains, sni) = self.tcp_chains(service, claimed, &mut built);
            match (claimed.protocol, chains.split_last()) {
                (Protocol::Auto, Some((fallback, _))) => {
                    listener::sniffed(address, port, &route_name(service, claimed), fallback)
                }
                _ => listener::tcp(address, port, &chains, sni),
            }
        };
        built.push(ResourceType::Listener, name, &message);
        built
    }

    /// TLS services without an address of their own, and services of whole networks: server name and network decide, and what
    /// fits none of them is unknown.
    fn by_name(
        &self,
        port: u16,
        claims: &[(&Arc<Service>, &Port)],
        built: &mut Built,
    ) -> listener_pb::Listener {
        let mut chains: Vec<TcpChain> = Vec::new();
        for (service, claimed) in claims {
            if !claimed.protocol.is_tls() && service.subnets.is_empty() {
                continue;
            }
            let (made, _) = self.tcp_chains(service, claimed, built);
            for mut chain in made {
                chain.matches.get_or_insert_default();
                if let Some(matches) = chain
                    .matches
                    .as_mut()
                    .filter(|matches| matches.server_names.is_empty())
                {
                    matches.server_names = vec![service.host.to_string()];
                }
                if !chains.iter().any(|known| known.matches == chain.matches) {
                    chains.push(chain);
                }
            }
        }
        chains.push(listener::unknown(
            self.registry_only(),
            "PassthroughFilterChain",
            None,
        ));
        let sni = claims.iter().any(|(_, port)| port.protocol.is_tls());
        listener::tcp("0.0.0.0", port, &chains, sni)
    }

    fn limits(&self, service: &Service, port: &Port) -> listener::ConnectionLimits {
        let policy = self
            .policy(service)
            .map(|policy| policy.for_port(None, port.number))
            .unwrap_or_default();
        let tcp = policy.connection_pool.as_ref().and_then(|pool| pool.tcp.as_ref());
        let parsed = |value: Option<&serin_crds::istio::Duration>| value.and_then(|value| value.parse().ok());
        listener::ConnectionLimits {
            idle_timeout: parsed(tcp.and_then(|tcp| tcp.idle_timeout.as_ref())),
            max_duration: parsed(tcp.and_then(|tcp| tcp.max_connection_duration.as_ref())),
            by_source: policy
                .load_balancer
                .as_ref()
                .and_then(|balancer| balancer.consistent_hash.as_ref())
                .is_some_and(|hash| hash.use_source_ip == Some(true)),
        }
    }

    /// The chains of a TCP port: those of rules with conditions, then the one for the rest; whether any of them goes by
    /// server name.
    fn tcp_chains(&self, service: &Arc<Service>, port: &Port, built: &mut Built) -> (Vec<TcpChain>, bool) {
        let limits = self.limits(service, port);
        built.hosts.insert(service.host.clone());
        let mut found = TcpChains::default();
        if let Some(rules) = self.model.rules(&service.host, self.client) {
            let by_name = port.protocol.is_tls();
            let rules = if by_name { &rules.tls } else { &rules.tcp };
            for rule in rules {
                self.add_chains(rule, by_name, port, limits, &mut found, built);
                if found.catch_all {
                    break;
                }
            }
        }
        // TLS rules take the port over: a server name that none of them has is not this service's.
        if !found.catch_all && !found.sni {
            found.chains.push(TcpChain {
                matches: None,
                destinations: vec![Destination {
                    cluster: cluster::name(port.number, "", &service.host),
                    weight: 1,
                }],
                limits,
                origin: None,
                name: String::new(),
            });
        }
        (found.chains, found.sni)
    }

    /// Adds the chains of a rule, one for each of its conditions that no chain has yet.
    fn add_chains(
        &self,
        rule: &ConnectionRoute,
        by_name: bool,
        port: &Port,
        limits: listener::ConnectionLimits,
        found: &mut TcpChains,
        built: &mut Built,
    ) {
        let blocks: Vec<_> = rule
            .matches
            .iter()
            .filter(|block| is_for(&block.audience, self.client, MESH, port.number))
            .collect();
        if !rule.matches.is_empty() && blocks.is_empty() {
            return;
        }
        built.origin(&rule.provenance);
        let hosts = rule.backends.iter().map(|backend| backend.host.clone());
        built.hosts.extend(hosts);
        let chain = |matches, origin| TcpChain {
            matches,
            destinations: destinations(rule, &self.resolver(), port.number),
            limits,
            origin,
            name: String::new(),
        };
        if rule.matches.is_empty() {
            found.chains.push(chain(None, Some(rule.provenance.clone())));
            found.catch_all = true;
            return;
        }
        for block in blocks {
            let source = block.source.as_ref().map(std::slice::from_ref);
            let matches = listener_pb::FilterChainMatch {
                server_names: if by_name { block.sni.clone() } else { Vec::new() },
                prefix_ranges: listener::ranges(&block.destinations),
                source_prefix_ranges: source.map(listener::ranges).unwrap_or_default(),
                ..Default::default()
            };
            found.sni |= by_name && !block.sni.is_empty();
            let known = |chain: &TcpChain| chain.matches.as_ref() == Some(&matches);
            if found.chains.iter().any(known) {
                continue;
            }
            let empty = matches == listener_pb::FilterChainMatch::default();
            let origin = (empty || by_name).then(|| rule.provenance.clone());
            found.chains.push(chain((!empty).then_some(matches), origin));
            if empty {
                found.catch_all = true;
                return;
            }
        }
    }
}

/// Chains of a port as its rules are gone through.
#[derive(Default)]
struct TcpChains {
    chains: Vec<TcpChain>,
    /// One goes by server name.
    sni: bool,
    /// One takes everything: no rule comes after it.
    catch_all: bool,
}

/// The clusters of a connection route.
pub(super) fn destinations(rule: &ConnectionRoute, to: &impl Destinations, port: u16) -> Vec<Destination> {
    rule.backends
        .iter()
        .map(|backend| Destination {
            cluster: to.cluster(backend, port),
            weight: backend.weight,
        })
        .collect()
}

/// The whole service, then its subsets.
fn subsets(policy: Option<&HostPolicy>) -> Vec<Option<&str>> {
    std::iter::once(None)
        .chain(
            policy
                .into_iter()
                .flat_map(|policy| policy.subsets.iter().map(|subset| Some(subset.name.as_str()))),
        )
        .collect()
}
