//! Route configurations and their virtual hosts: taken, indexed by domain, replaced one by one.
//!
//! A route configuration comes whole, however little of it has changed. Its virtual hosts are compared with those of the one
//! before as bytes; only those that differ are decoded and compiled, and one that keeps its domains is swapped where it is.
//! So what a change of a weight costs beyond the comparison does not grow with the virtual hosts beside it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use prost::Message;
use serin_xds::pb::envoy::config::route::v3 as pb_route;

use super::{Store, Update, decode};
use crate::config::convert;
use crate::config::headers::HeaderOps;
use crate::config::route::{Context, VirtualHost};
use crate::config::slot::{RouteSlot, VirtualHostSlot};
use crate::config::table::{DomainIndex, RouteTable};
use crate::error::{Refusal, Within};
use crate::policy::per_route::PerRoute;
use crate::random;

/// The field of a route configuration that holds its virtual hosts.
const VIRTUAL_HOSTS: u64 = 2;

/// Virtual hosts of a batch that change domains, come or go, by route configuration.
pub(super) type Staged = BTreeMap<Arc<str>, BTreeMap<Box<str>, Option<Arc<VirtualHostSlot>>>>;

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
    /// The domains of all of them.
    index: DomainIndex,
}

impl RouteState {
    /// Makes the table anew; the message was checked when it was taken.
    fn publish(&self) -> Result<(), Refusal> {
        let table = match &self.base {
            None => None,
            Some(base) => Some(table_of(base, self.index.clone(), self.per_filter.clone())?),
        };
        self.slot.set(table.map(Arc::new));
        Ok(())
    }

    /// Whether its virtual hosts come as resources of their own.
    pub(super) fn discovers(&self) -> bool {
        self.base.as_ref().is_some_and(|base| base.vhds.is_some())
    }
}

/// A virtual host of a route configuration that is being taken.
enum Taken {
    /// As it was.
    Kept(Arc<VirtualHostSlot>),
    /// In the place of one with the same domains.
    Replaced(Arc<VirtualHostSlot>, Box<VirtualHost>),
    New(Arc<VirtualHostSlot>),
}

impl Taken {
    fn slot(&self) -> &Arc<VirtualHostSlot> {
        match self {
            Self::Kept(slot) | Self::Replaced(slot, _) | Self::New(slot) => slot,
        }
    }
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
                index: DomainIndex::default(),
            })
    }

    /// Takes a route configuration. Virtual hosts that came by themselves and have domains that it has now are left out and
    /// named in `refused`.
    pub(super) fn put_route(
        &mut self,
        update: &Update<'_>,
        refused: &mut Vec<(Box<str>, Refusal)>,
    ) -> Result<(), Refusal> {
        let canonical;
        let (rest, hosts) = match split(update.body) {
            Some(parts) => parts,
            // Not a message, or one with groups, which nobody sends.
            None => {
                canonical = decode::<pb_route::RouteConfiguration>(update)?.encode_to_vec();
                split(&canonical).unwrap_or_default()
            }
        };
        let base = pb_route::RouteConfiguration::decode(&*rest)
            .map_err(|error| Refusal::new("", format!("not a valid message: {error}")))?;
        let state = self.routes.get(update.name);
        let inline: &[_] = state.map_or(&[], |state| &state.inline);
        let before = self
            .received
            .route(update.name)
            .and_then(split)
            .filter(|(_, hosts)| {
                state.is_some_and(|state| state.base.is_some()) && hosts.len() == inline.len()
            });
        let same_base = before.as_ref().is_some_and(|(before, _)| *before == rest);
        let previous = before.map(|(_, hosts)| hosts).unwrap_or_default();
        let mut context = Context {
            slots: &mut self.slots,
            workers: self.workers,
            seed: random::next(),
        };
        let (taken, gone) = compare(&hosts, &previous, inline, &mut context)?;
        let mut index = state.map_or_else(DomainIndex::default, |state| state.index.clone());
        for host in &gone {
            let host = &inline[*host];
            for domain in &host.load().domains {
                index.remove(domain, host);
            }
        }
        let mut left_out = Vec::new();
        let mut anew = !gone.is_empty();
        for (at, host) in taken.iter().enumerate() {
            let Taken::New(slot) = host else { continue };
            anew = true;
            let loaded = slot.load();
            while let Some((holder, refusal)) = index.conflict(loaded.domains.iter().map(|one| &**one), slot)
            {
                let mut discovered = state.iter().flat_map(|state| &state.discovered);
                let Some((name, _)) = discovered.find(|(_, own)| Arc::ptr_eq(own, &holder)) else {
                    return Err(refusal.within(format!("virtual_hosts[{at}]")));
                };
                for domain in &holder.load().domains {
                    index.remove(domain, &holder);
                }
                let reason = format!("{} has its domains now", loaded.name);
                left_out.push((name.clone(), Refusal::new("domains", reason)));
            }
            for domain in &loaded.domains {
                index.insert(domain, slot);
            }
        }
        let per_filter = match state {
            Some(state) if same_base => state.per_filter.clone(),
            _ => Arc::new(PerRoute::compile(&base.typed_per_filter_config, &mut context)?),
        };
        // Compiled before anything is kept, so that a refusal leaves the last good one.
        let table = if same_base && !anew {
            None
        } else {
            Some(table_of(&base, index.clone(), per_filter.clone())?)
        };
        let state = self.route_state(update.name);
        let discovered = state.discovers();
        state.inline = taken.iter().map(|host| host.slot().clone()).collect();
        state.index = index;
        state.per_filter = per_filter;
        state.base = Some(base);
        for (name, refusal) in left_out {
            state.discovered.remove(&name);
            refused.push((format!("{}/{name}", update.name).into(), refusal));
        }
        for host in taken {
            if let Taken::Replaced(slot, host) = host {
                slot.set(*host);
            }
        }
        if let Some(table) = table {
            state.slot.set(Some(Arc::new(table)));
        }
        let discovers = state.discovers();
        self.discovering += usize::from(discovers);
        self.discovering -= usize::from(discovered);
        Ok(())
    }

    pub(super) fn remove_route(&mut self, name: &str) {
        if let Some(state) = self.routes.get_mut(name) {
            self.discovering -= usize::from(state.discovers());
            state.base = None;
            for host in std::mem::take(&mut state.inline) {
                for domain in &host.load().domains {
                    state.index.remove(domain, &host);
                }
            }
            state.slot.set(None);
            if state.discovered.is_empty() && !self.rds.is_held(name) {
                self.routes.remove(name);
            }
        }
    }

    pub(super) fn put_virtual_host(
        &mut self,
        update: &Update<'_>,
        staged: &mut Staged,
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
                // A new slot also when domains change, so that until the table is made the old one stays whole.
                let slot = Arc::new(VirtualHostSlot::new(host));
                let hosts = staged.entry(state.slot.name.clone()).or_default();
                hosts.insert(host_name.into(), Some(slot));
            }
        }
        Ok(())
    }

    pub(super) fn remove_virtual_host(&mut self, name: &str, staged: &mut Staged) {
        let Ok((route_name, host_name)) = split_host_name(name) else {
            return;
        };
        if let Some(state) = self.routes.get(route_name)
            && state.discovered.contains_key(host_name)
        {
            let hosts = staged.entry(state.slot.name.clone()).or_default();
            hosts.insert(host_name.into(), None);
        }
    }

    /// Takes a batch's virtual hosts into the domain indexes. One that claims the domain of another is left out and named;
    /// what was there by its name stays, if its domains are still its own.
    pub(super) fn settle_hosts(&mut self, staged: Staged) -> Vec<(Box<str>, Refusal)> {
        let mut refused = Vec::new();
        for (route, hosts) in staged {
            let Some(state) = self.routes.get_mut(&route) else {
                continue;
            };
            // All that goes before anything that comes, so that domains may move within a batch.
            let mut before = HashMap::new();
            for name in hosts.keys() {
                if let Some(old) = state.discovered.remove(name) {
                    for domain in &old.load().domains {
                        state.index.remove(domain, &old);
                    }
                    before.insert(name.clone(), old);
                }
            }
            for (name, host) in hosts {
                let Some(host) = host else { continue };
                let old = before.remove(&name);
                for (attempt, host) in [Some(host), old].into_iter().flatten().enumerate() {
                    let loaded = host.load();
                    let domains = || loaded.domains.iter().map(|domain| &**domain);
                    if let Some((_, refusal)) = state.index.conflict(domains(), &host) {
                        if attempt == 0 {
                            refused.push((format!("{route}/{name}").into(), refusal));
                        }
                        continue;
                    }
                    domains().for_each(|domain| state.index.insert(domain, &host));
                    state.discovered.insert(name.clone(), host);
                    break;
                }
            }
            if let Err(refusal) = state.publish() {
                refused.push(((*route).into(), refusal));
            }
        }
        refused
    }
}

/// A route configuration's message without its virtual hosts, and these as they lie in it; nothing if it is not read that
/// simply.
fn split(mut body: &[u8]) -> Option<(Vec<u8>, Vec<&[u8]>)> {
    let (mut rest, mut hosts) = (Vec::new(), Vec::new());
    while !body.is_empty() {
        let start = body;
        let key = varint(&mut body)?;
        let length = match key & 7 {
            0 => {
                varint(&mut body)?;
                0
            }
            1 => 8,
            2 => usize::try_from(varint(&mut body)?).ok()?,
            5 => 4,
            _ => return None,
        };
        let (content, after) = body.split_at_checked(length)?;
        body = after;
        if key == VIRTUAL_HOSTS << 3 | 2 {
            hosts.push(content);
        } else {
            rest.extend_from_slice(&start[..start.len() - body.len()]);
        }
    }
    Some((rest, hosts))
}

fn varint(body: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for index in 0..10 {
        let (byte, after) = body.split_first()?;
        *body = after;
        value |= u64::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// What is to become of each host of a message, compared with those of the one before, and which of these are gone.
fn compare(
    hosts: &[&[u8]],
    previous: &[&[u8]],
    inline: &[Arc<VirtualHostSlot>],
    context: &mut Context<'_>,
) -> Result<(Vec<Taken>, Vec<usize>), Refusal> {
    let mut used = vec![false; inline.len()];
    let mut moved: Option<HashMap<&[u8], usize, foldhash::fast::RandomState>> = None;
    let mut taken = Vec::with_capacity(hosts.len());
    for (index, body) in hosts.iter().enumerate() {
        let same = if previous.get(index) == Some(body) {
            Some(index)
        } else {
            let moved = moved.get_or_insert_with(|| {
                let differ = |(index, body): &(usize, &&[u8])| hosts.get(*index) != Some(*body);
                let all = previous.iter().enumerate().filter(differ);
                all.map(|(index, body)| (*body, index)).collect()
            });
            moved.get(body).copied()
        };
        if let Some(at) = same.filter(|at| !used[*at]) {
            used[at] = true;
            taken.push(Taken::Kept(inline[at].clone()));
            continue;
        }
        let message = pb_route::VirtualHost::decode(*body)
            .map_err(|error| Refusal::new("", format!("not a valid message: {error}")))?;
        let host = VirtualHost::compile(&message, context).within(format!("virtual_hosts[{index}]"))?;
        match inline.get(index).filter(|_| !previous.is_empty() && !used[index]) {
            Some(slot) if slot.load().domains == host.domains => {
                used[index] = true;
                taken.push(Taken::Replaced(slot.clone(), Box::new(host)));
            }
            _ => taken.push(Taken::New(Arc::new(VirtualHostSlot::new(host)))),
        }
    }
    let gone = (0..inline.len()).filter(|index| !used[*index]).collect();
    Ok((taken, gone))
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
        most_specific_wins: from.most_specific_header_mutations_wins,
        internal_only: convert::each(
            &from.internal_only_headers,
            "internal_only_headers",
            |name: &String| {
                http::HeaderName::from_bytes(name.as_bytes())
                    .map_err(|_| Refusal::new("", format!("{name:?} is not a header name")))
            },
        )?,
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
        let loaded = host.load();
        let own = || loaded.domains.iter().map(|domain| &**domain);
        if let Some((_, refusal)) = domains.conflict(own(), host) {
            return Err(refusal.within(format!("virtual_hosts[{index}]")));
        }
        own().for_each(|domain| domains.insert(domain, host));
    }
    let per_filter = Arc::new(PerRoute::compile(&from.typed_per_filter_config, context)?);
    table_of(from, domains, per_filter)
}
