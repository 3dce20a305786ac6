//! Which filter chain a connection gets: Envoy's order of criteria, without going back.
//!
//! The criteria are looked at in a fixed order: destination port, destination address, server name, transport protocol,
//! application protocols, directly connected address, kind of source, source address, source port. At each step the most
//! specific entry that fits decides; when nothing behind it fits, less specific entries are *not* tried, and the default
//! chain takes the connection. So the tables are nested in that order and finding is a handful of look-ups, whatever the
//! number of chains.

use std::collections::HashMap;
use std::net::IpAddr;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;

use super::listener::{Cidr, ConnectionFacts};
use crate::config::convert::each;
use crate::error::Refusal;

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// Ranges of addresses; the longest that contains an address decides.
#[derive(Debug)]
struct Ranges<T> {
    exact: Map<IpAddr, T>,
    /// Longest first.
    wider: Vec<(Cidr, T)>,
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self {
            exact: Map::default(),
            wider: Vec::new(),
        }
    }
}

impl<T: Default> Ranges<T> {
    fn entry(&mut self, range: Cidr) -> &mut T {
        if let Some(address) = range.single() {
            return self.exact.entry(address).or_default();
        }
        let index = match self.wider.iter().position(|(known, _)| *known == range) {
            Some(index) => index,
            None => {
                let index = self
                    .wider
                    .partition_point(|(known, _)| known.length() >= range.length());
                self.wider.insert(index, (range, T::default()));
                index
            }
        };
        &mut self.wider[index].1
    }

    fn find(&self, address: IpAddr) -> Option<&T> {
        let address = address.to_canonical();
        self.exact.get(&address).or_else(|| {
            self.wider
                .iter()
                .find(|(range, _)| range.contains(address))
                .map(|(_, found)| found)
        })
    }
}

/// Source port (0 for any) to chain.
type SourcePorts = Map<u16, usize>;

#[derive(Debug, Default)]
struct SourceKinds {
    any: Option<Ranges<SourcePorts>>,
    local: Option<Ranges<SourcePorts>>,
    external: Option<Ranges<SourcePorts>>,
}

/// By application protocol, `""` for any.
type Applications = Map<Box<str>, Ranges<SourceKinds>>;
/// By transport protocol, `""` for any.
type Transports = Map<Box<str>, Applications>;
/// By server name, `.suffix` for wildcards, `""` for any.
type Names = Map<Box<str>, Transports>;

/// Finds the index of a connection's chain.
#[derive(Debug, Default)]
pub struct ChainMatch {
    /// By destination port, 0 for any.
    ports: Map<u16, Ranges<Names>>,
    needs_tls: bool,
}

impl ChainMatch {
    /// Adds the chain at `index`. Two chains with the same criteria are refused.
    pub fn add(&mut self, index: usize, from: Option<&listener::FilterChainMatch>) -> Result<(), Refusal> {
        use listener::filter_chain_match::ConnectionSourceType;
        let empty = listener::FilterChainMatch::default();
        let from = from.unwrap_or(&empty);
        if !from.address_suffix.is_empty() || from.suffix_len.is_some() {
            return Err(Refusal::new("address_suffix", "not supported"));
        }
        let port = match &from.destination_port {
            None => 0,
            Some(port) => u16::try_from(port.value)
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| Refusal::new("destination_port", "is not a port"))?,
        };
        let destinations = ranges(&from.prefix_ranges, "prefix_ranges")?;
        let direct = ranges(&from.direct_source_prefix_ranges, "direct_source_prefix_ranges")?;
        let sources = ranges(&from.source_prefix_ranges, "source_prefix_ranges")?;
        let names = or_any(
            from.server_names
                .iter()
                .map(|name| server_name(name))
                .collect::<Result<_, _>>()?,
        );
        let applications = or_any(
            from.application_protocols
                .iter()
                .map(|name| name.as_str().into())
                .collect(),
        );
        let kind = ConnectionSourceType::try_from(from.source_type)
            .map_err(|_| Refusal::new("source_type", format!("{} is unknown", from.source_type)))?;
        let source_ports = if from.source_ports.is_empty() {
            vec![0]
        } else {
            from.source_ports
                .iter()
                .map(|port| u16::try_from(*port).map_err(|_| Refusal::new("source_ports", "is not a port")))
                .collect::<Result<_, _>>()?
        };
        let transport = from.transport_protocol.as_str();
        self.needs_tls |= transport == "tls"
            || (transport.is_empty()
                && (!from.server_names.is_empty() || !from.application_protocols.is_empty()));
        for destination in &destinations {
            for name in &names {
                for application in &applications {
                    let table = self
                        .ports
                        .entry(port)
                        .or_default()
                        .entry(*destination)
                        .entry(name.clone())
                        .or_default()
                        .entry(transport.into())
                        .or_default()
                        .entry(application.clone())
                        .or_default();
                    for direct in &direct {
                        let kinds = table.entry(*direct);
                        let table = match kind {
                            ConnectionSourceType::Any => &mut kinds.any,
                            ConnectionSourceType::SameIpOrLoopback => &mut kinds.local,
                            ConnectionSourceType::External => &mut kinds.external,
                        }
                        .get_or_insert_default();
                        for source in &sources {
                            let ports = table.entry(*source);
                            for source_port in &source_ports {
                                if ports
                                    .insert(*source_port, index)
                                    .is_some_and(|other| other != index)
                                {
                                    return Err(Refusal::new(
                                        "",
                                        "another filter chain has the same matching rules",
                                    ));
                                }
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether some criterion can only be decided by looking into a TLS handshake.
    pub fn needs_tls(&self) -> bool {
        self.needs_tls
    }

    /// The chain for a connection, or `None` for the default chain.
    pub fn find(&self, facts: &ConnectionFacts<'_>) -> Option<usize> {
        let names = self
            .ports
            .get(&facts.destination.port())
            .or_else(|| self.ports.get(&0))?
            .find(facts.destination.ip())?;
        let transports = find_name(names, facts.server_name.unwrap_or(""))?;
        let applications = transports.get(facts.transport).or_else(|| transports.get(""))?;
        let direct = facts
            .application
            .iter()
            .find_map(|name| applications.get(*name))
            .or_else(|| applications.get(""))?;
        let kinds = direct.find(facts.direct_source.ip())?;
        let specific = if kinds.local.is_some() || kinds.external.is_some() {
            let source = facts.source.ip();
            if source.is_loopback() || source == facts.destination.ip() {
                kinds.local.as_ref()
            } else {
                kinds.external.as_ref()
            }
        } else {
            None
        };
        let ports = specific.or(kinds.any.as_ref())?.find(facts.source.ip())?;
        ports.get(&facts.source.port()).or_else(|| ports.get(&0)).copied()
    }
}

fn find_name<'a>(names: &'a Names, name: &str) -> Option<&'a Transports> {
    if let Some(found) = names.get(name) {
        return Some(found);
    }
    // `.example.com` and `.com` for `www.example.com`, longest first.
    let mut rest = name;
    while let Some(dot) = rest
        .char_indices()
        .skip(1)
        .find(|(_, c)| *c == '.')
        .map(|(at, _)| at)
    {
        rest = &rest[dot..];
        if let Some(found) = names.get(rest) {
            return Some(found);
        }
    }
    names.get("")
}

/// A server name as key: exact, or `.suffix` for `*.suffix`.
fn server_name(name: &str) -> Result<Box<str>, Refusal> {
    let name = name.to_ascii_lowercase();
    match name.strip_prefix("*.") {
        Some(suffix) if !suffix.contains('*') && !suffix.is_empty() => Ok(format!(".{suffix}").into()),
        _ if name.contains('*') => Err(Refusal::new(
            "server_names",
            format!("{name:?}: partial wildcards are not supported; leave server_names out to match any"),
        )),
        _ => Ok(name.into()),
    }
}

fn or_any(list: Vec<Box<str>>) -> Vec<Box<str>> {
    if list.is_empty() { vec!["".into()] } else { list }
}

fn ranges(list: &[core::CidrRange], field: &str) -> Result<Vec<Cidr>, Refusal> {
    if list.is_empty() {
        return Ok(Cidr::everything().to_vec());
    }
    each(list, field, Cidr::compile)
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::google::protobuf::UInt32Value;

    use super::*;

    fn cidr(text: &str) -> core::CidrRange {
        let (address, length) = text.split_once('/').unwrap();
        core::CidrRange {
            address_prefix: address.into(),
            prefix_len: Some(UInt32Value {
                value: length.parse().unwrap(),
            }),
        }
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    fn facts<'a>(to: &str, from: &str) -> ConnectionFacts<'a> {
        ConnectionFacts {
            destination: to.parse().unwrap(),
            source: from.parse().unwrap(),
            direct_source: from.parse().unwrap(),
            transport: "raw_buffer",
            server_name: None,
            application: &[],
        }
    }

    fn of(chains: Vec<listener::FilterChainMatch>) -> ChainMatch {
        let mut out = ChainMatch::default();
        for (index, chain) in chains.iter().enumerate() {
            out.add(index, Some(chain)).unwrap();
        }
        out
    }

    #[test]
    fn the_first_criterion_decides_and_there_is_no_way_back() {
        let table = of(vec![
            listener::FilterChainMatch {
                destination_port: Some(UInt32Value { value: 80 }),
                server_names: names(&["a.example"]),
                ..Default::default()
            },
            listener::FilterChainMatch::default(),
        ]);
        // Port 80 leads to the first chain's table; that its name does not fit does not lead to the second.
        assert_eq!(table.find(&facts("10.0.0.1:80", "10.9.9.9:1")), None);
        assert_eq!(table.find(&facts("10.0.0.1:81", "10.9.9.9:1")), Some(1));
    }

    #[test]
    fn names_match_exactly_then_by_longest_suffix_then_any() {
        let chain = |list: &[&str]| listener::FilterChainMatch {
            server_names: names(list),
            ..Default::default()
        };
        let table = of(vec![
            chain(&["www.example.com"]),
            chain(&["*.example.com"]),
            chain(&["*.com"]),
            chain(&[]),
        ]);
        for (name, wanted) in [
            (Some("www.example.com"), 0),
            (Some("api.example.com"), 1),
            (Some("a.b.example.com"), 1),
            (Some("example.com"), 2),
            (Some("example.org"), 3),
            (None, 3),
        ] {
            let facts = ConnectionFacts {
                server_name: name,
                transport: "tls",
                ..facts("10.0.0.1:443", "10.9.9.9:1")
            };
            assert_eq!(table.find(&facts), Some(wanted), "{name:?}");
        }
        assert!(table.needs_tls());
        let mut refused = ChainMatch::default();
        assert!(refused.add(0, Some(&chain(&["a*.com"]))).is_err());
    }

    #[test]
    fn the_longest_range_decides_then_protocols_in_the_clients_order_then_the_source() {
        use listener::filter_chain_match::ConnectionSourceType;
        let table = of(vec![
            listener::FilterChainMatch {
                prefix_ranges: vec![cidr("10.0.0.0/8")],
                ..Default::default()
            },
            listener::FilterChainMatch {
                prefix_ranges: vec![cidr("10.1.0.0/16")],
                application_protocols: names(&["istio"]),
                transport_protocol: "tls".into(),
                ..Default::default()
            },
            listener::FilterChainMatch {
                prefix_ranges: vec![cidr("10.1.0.0/16")],
                application_protocols: names(&["h2"]),
                ..Default::default()
            },
            listener::FilterChainMatch {
                prefix_ranges: vec![cidr("10.1.0.0/16")],
                source_type: ConnectionSourceType::SameIpOrLoopback as i32,
                ..Default::default()
            },
            listener::FilterChainMatch {
                prefix_ranges: vec![cidr("10.1.0.0/16")],
                source_prefix_ranges: vec![cidr("192.168.0.0/16")],
                source_ports: vec![7],
                ..Default::default()
            },
        ]);
        assert_eq!(table.find(&facts("10.2.0.1:1", "1.1.1.1:1")), Some(0));
        let tls = |application| ConnectionFacts {
            transport: "tls",
            application,
            ..facts("10.1.0.1:1", "1.1.1.1:1")
        };
        assert_eq!(table.find(&tls(&["istio"])), Some(1));
        // The transport is looked at first: behind "tls" there is no h2.
        assert_eq!(table.find(&tls(&["h2"])), None);
        let raw = ConnectionFacts {
            application: &["h2"],
            ..facts("10.1.0.1:1", "1.1.1.1:1")
        };
        assert_eq!(table.find(&raw), Some(2));
        assert_eq!(table.find(&facts("10.1.0.1:1", "127.0.0.1:5")), Some(3));
        assert_eq!(table.find(&facts("10.1.0.1:1", "10.1.0.1:5")), Some(3));
        assert_eq!(table.find(&facts("10.1.0.1:1", "192.168.3.3:7")), Some(4));
        assert_eq!(table.find(&facts("10.1.0.1:1", "192.168.3.3:8")), None);
        assert_eq!(table.find(&facts("11.1.0.1:1", "192.168.3.3:8")), None);
    }

    #[test]
    fn two_chains_with_the_same_rules_are_refused() {
        let chain = listener::FilterChainMatch {
            server_names: names(&["a.example"]),
            ..Default::default()
        };
        let mut table = ChainMatch::default();
        table.add(0, Some(&chain)).unwrap();
        assert!(table.add(1, Some(&chain)).is_err());
    }
}
