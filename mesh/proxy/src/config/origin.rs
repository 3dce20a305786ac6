//! Where a request comes from, as a connection manager believes it: `use_remote_address`, `xff_num_trusted_hops`,
//! `original_ip_detection_extensions`, `internal_address_config`, and the fields that tell the next hop.
//!
//! A request has a client: whoever is connected, or whom a trusted hop names ([`Found::named`]). It is *internal* where its
//! client is known to be one and its address is among the internal ones; whom the configuration does not call internal is not.
//! It is an *edge* request where this proxy is the first hop that is trusted and the client is not internal. What clients
//! may ask of the proxy follows from that ([`Found::may_not_send`]). The rules are Envoy's, those that look odd as well: what
//! came in `x-forwarded-for` makes a request external even where every address in it is internal.
//!
//! Not here: who reads the address afterwards (`worker::identify` notes it in the exchange).

use std::net::IpAddr;

use http::uri::Scheme;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use serin_xds::pb::envoy::extensions::http::original_ip_detection::custom_header::v3 as custom_header;
use serin_xds::pb::envoy::extensions::http::original_ip_detection::xff::v3 as xff;

use super::convert::{self, each};
use super::listener::Cidr;
use crate::error::{Refusal, Within};

static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

const XFF: &str = "envoy.extensions.http.original_ip_detection.xff.v3.XffConfig";
const CUSTOM_HEADER: &str = "envoy.extensions.http.original_ip_detection.custom_header.v3.CustomHeaderConfig";

/// Fields by which internal clients ask something of the router; of others they are not taken.
const OF_INTERNAL_CLIENTS: [&str; 15] = [
    "x-envoy-retriable-status-codes",
    "x-envoy-retriable-header-names",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-stream-duration-ms",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-ip-tags",
    "x-envoy-hedge-on-per-try-timeout",
    // Ours: says that a proxy could not reach its application.
    "x-serin-unprocessed",
];

/// Fields that hops write for each other; clients at the edge may not send them.
const OF_HOPS: [&str; 5] = [
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-original-path",
    "x-envoy-original-host",
];

/// See the module.
#[derive(Debug)]
pub struct Origin {
    /// Whoever is connected is the client, or the first untrusted hop.
    pub use_remote_address: bool,
    /// Trusted proxies before this one, where `use_remote_address` holds.
    hops: u32,
    /// `x-forwarded-for` is left as it is, where `use_remote_address` holds.
    skip_append: bool,
    /// How the client is found where it does not.
    detections: Box<[Detection]>,
    /// Addresses of internal clients.
    internal: Box<[Cidr]>,
    /// `x-forwarded-port` says to which port the client connected.
    pub append_port: bool,
    /// What is spoken with the client where the PROXY protocol says to which port it has connected.
    ports: Option<Box<hcm::ForwardProtoConfig>>,
    /// Who we are is told to endpoints (`add_user_agent`).
    pub tells_itself: bool,
    /// Added to `via` of requests and responses.
    pub via: Option<HeaderValue>,
    /// What `:scheme` is whatever the client says.
    pub scheme: Option<Scheme>,
    /// `:scheme` is what is spoken with the endpoint.
    pub match_upstream: bool,
}

/// A way to find the client.
#[derive(Debug)]
enum Detection {
    /// In `x-forwarded-for`, before that many trusted hops.
    Hops { hops: u32, append: bool },
    /// In `x-forwarded-for` of trusted proxies, before the last of them.
    Trusted { ranges: Box<[Cidr]>, append: bool },
    /// In a field of its own.
    Field {
        name: HeaderName,
        /// Whether the client may be internal.
        trusted: bool,
        /// The answer to requests without it.
        reject: Option<StatusCode>,
    },
}

/// What one way to find the client has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Detected {
    client: Option<IpAddr>,
    may_be_internal: bool,
    /// Whether who is connected is added to `x-forwarded-for`.
    append: bool,
}

/// Who a request is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whom a field names as the client; otherwise it is who is connected.
    pub named: Option<IpAddr>,
    /// The client is internal.
    pub internal: bool,
    /// The first request within what is trusted, of a client that is not internal.
    pub edge: bool,
    /// How often the address of who is connected is to be added to `x-forwarded-for`.
    pub appends: u8,
}

impl Found {
    /// Fields that the client may not send.
    pub fn may_not_send(&self) -> impl Iterator<Item = &'static str> {
        let of_hops: &[&str] = if self.edge { &OF_HOPS } else { &[] };
        let of_clients: &[&str] = if self.internal { &[] } else { &OF_INTERNAL_CLIENTS };
        of_hops.iter().chain(of_clients).copied()
    }
}

impl Origin {
    pub(super) fn compile(from: &hcm::HttpConnectionManager) -> Result<Self, Refusal> {
        let use_remote_address = from.use_remote_address.as_ref().is_some_and(|value| value.value);
        let hops = from.xff_num_trusted_hops;
        let extensions = &from.original_ip_detection_extensions;
        if !extensions.is_empty() && (use_remote_address || hops > 0) {
            return Err(Refusal::new(
                "original_ip_detection_extensions",
                "cannot be used together with use_remote_address or xff_num_trusted_hops",
            ));
        }
        let detections = if use_remote_address {
            Box::default()
        } else if extensions.is_empty() {
            [Detection::Hops { hops, append: false }].into()
        } else {
            each(extensions, "original_ip_detection_extensions", Detection::compile)?
        };
        let internal = from.internal_address_config.as_ref();
        let (scheme, match_upstream) = scheme(from.scheme_header_transformation.as_ref())?;
        Ok(Self {
            use_remote_address,
            hops,
            skip_append: from.skip_xff_append,
            detections,
            // There are no clients on Unix sockets.
            internal: match internal {
                Some(config) if config.cidr_ranges.is_empty() => private(),
                Some(config) => each(&config.cidr_ranges, "cidr_ranges", Cidr::compile)
                    .within("internal_address_config")?,
                None => Box::default(),
            },
            append_port: from.append_x_forwarded_port,
            ports: from.forward_proto_config.clone().map(Box::new),
            tells_itself: from.add_user_agent.as_ref().is_some_and(|value| value.value),
            via: match from.via.as_str() {
                "" => None,
                via => Some(
                    HeaderValue::from_str(via)
                        .map_err(|_| Refusal::new("via", format!("{via:?} is not a header value")))?,
                ),
            },
            scheme,
            match_upstream,
        })
    }

    /// Finds out who a request is from; the status that it is refused with where that must be known and is not.
    ///
    /// `headers` are as they came, but for `x-forwarded-for`, which has been joined; `peer` is who is connected.
    pub fn find(&self, headers: &HeaderMap, peer: IpAddr) -> Result<Found, StatusCode> {
        let mut found = Found {
            named: None,
            internal: false,
            edge: false,
            appends: 0,
        };
        let client = if self.use_remote_address {
            let forwarded = forwarded_for(headers);
            if self.hops > 0 {
                found.named = forwarded.and_then(|list| before_hops(list, self.hops - 1));
            }
            found.appends = u8::from(!self.skip_append);
            forwarded.is_none().then(|| found.named.unwrap_or(peer))
        } else {
            let mut may_be_internal = false;
            for detection in &self.detections {
                let detected = detection.detect(headers, peer)?;
                found.appends += u8::from(detected.append);
                found.named = detected.client;
                may_be_internal = detected.may_be_internal;
                if found.named.is_some() {
                    break;
                }
            }
            found.named.filter(|_| may_be_internal)
        };
        found.internal =
            client.is_some_and(|client| self.internal.iter().any(|range| range.contains(client)));
        found.edge = self.use_remote_address && !found.internal;
        Ok(found)
    }

    /// What is spoken with a client that has connected to a port, by what the configuration says of ports; `None` where it
    /// says nothing.
    pub fn spoken_at(&self, port: u16) -> Option<&'static str> {
        let ports = self.ports.as_deref()?;
        let has = |list: &[u32]| list.contains(&u32::from(port));
        match () {
            () if has(&ports.https_destination_ports) => Some("https"),
            () if has(&ports.http_destination_ports) => Some("http"),
            () => None,
        }
    }

    /// Whether a hop that came before is believed about what it says of the client's connection.
    pub fn believes_hops(&self) -> bool {
        !self.use_remote_address || self.hops > 0
    }
}

impl Detection {
    fn compile(from: &core::TypedExtensionConfig) -> Result<Self, Refusal> {
        let any = convert::required(from.typed_config.as_ref(), "typed_config")?;
        match any.type_url.rsplit('/').next() {
            Some(XFF) => Self::of_forwarded_for(&convert::unpack(any, XFF)?).within("typed_config"),
            Some(CUSTOM_HEADER) => {
                Self::of_field(&convert::unpack(any, CUSTOM_HEADER)?).within("typed_config")
            }
            _ => Err(Refusal::new(
                "typed_config",
                format!("{} is not supported", any.type_url),
            )),
        }
    }

    fn of_forwarded_for(from: &xff::XffConfig) -> Result<Self, Refusal> {
        let append = from.skip_xff_append.as_ref().is_some_and(|value| !value.value);
        match &from.xff_trusted_cidrs {
            Some(_) if from.xff_num_trusted_hops > 0 => Err(Refusal::new(
                "xff_trusted_cidrs",
                "cannot be used together with xff_num_trusted_hops",
            )),
            Some(trusted) if !trusted.cidrs.is_empty() => Ok(Self::Trusted {
                ranges: each(&trusted.cidrs, "cidrs", Cidr::compile).within("xff_trusted_cidrs")?,
                append,
            }),
            Some(_) | None => Ok(Self::Hops {
                hops: from.xff_num_trusted_hops,
                append,
            }),
        }
    }

    fn of_field(from: &custom_header::CustomHeaderConfig) -> Result<Self, Refusal> {
        let name = HeaderName::from_bytes(from.header_name.as_bytes()).map_err(|_| {
            Refusal::new(
                "header_name",
                format!("{:?} is not a header name", from.header_name),
            )
        })?;
        Ok(Self::Field {
            name,
            trusted: from.allow_extension_to_set_address_as_trusted,
            reject: from.reject_with_status.as_ref().map(|status| {
                u16::try_from(status.code)
                    .ok()
                    .filter(|code| (400..=511).contains(code))
                    .and_then(|code| StatusCode::from_u16(code).ok())
                    .unwrap_or(StatusCode::FORBIDDEN)
            }),
        })
    }

    fn detect(&self, headers: &HeaderMap, peer: IpAddr) -> Result<Detected, StatusCode> {
        match self {
            Self::Hops { hops, append } => {
                let list = forwarded_for(headers);
                Ok(Detected {
                    client: list.and_then(|list| before_hops(list, *hops)),
                    may_be_internal: *hops == 0 && list.is_some_and(|list| !list.contains(',')),
                    append: *append,
                })
            }
            Self::Trusted { ranges, append } => {
                let trusted = is_among(ranges, peer);
                let list = forwarded_for(headers).filter(|_| trusted);
                Ok(Detected {
                    client: list.and_then(|list| before_trusted(list, ranges)),
                    may_be_internal: list.is_some_and(|list| !list.contains(',')),
                    // Whoever is not trusted is always told of.
                    append: *append || !trusted,
                })
            }
            Self::Field {
                name,
                trusted,
                reject,
            } => {
                let value = headers.get(name).and_then(|value| value.to_str().ok());
                match (value.and_then(address), reject) {
                    (None, Some(status)) => Err(*status),
                    (client, _) => Ok(Detected {
                        client,
                        may_be_internal: *trusted,
                        append: false,
                    }),
                }
            }
        }
    }
}

fn scheme(from: Option<&core::SchemeHeaderTransformation>) -> Result<(Option<Scheme>, bool), Refusal> {
    use core::scheme_header_transformation::Transformation;
    let Some(from) = from else {
        return Ok((None, false));
    };
    Ok(match &from.transformation {
        Some(Transformation::SchemeToOverwrite(scheme)) => match scheme.as_str() {
            "http" => (Some(Scheme::HTTP), false),
            "https" => (Some(Scheme::HTTPS), false),
            other => {
                return Err(Refusal::new(
                    "scheme_header_transformation.scheme_to_overwrite",
                    format!("{other:?} is neither http nor https"),
                ));
            }
        },
        None => (None, from.match_upstream),
    })
}

/// What is internal where the configuration does not say what is: RFC 1918, RFC 4193 and the loopback addresses.
fn private() -> Box<[Cidr]> {
    let range = |address: &str, length| core::CidrRange {
        address_prefix: address.into(),
        prefix_len: Some(serin_xds::pb::google::protobuf::UInt32Value { value: length }),
    };
    [
        range("10.0.0.0", 8),
        range("172.16.0.0", 12),
        range("192.168.0.0", 16),
        range("127.0.0.1", 32),
        range("fd00::", 8),
        range("::1", 128),
    ]
    .iter()
    .filter_map(|range| Cidr::compile(range).ok())
    .collect()
}

fn is_among(ranges: &[Cidr], address: IpAddr) -> bool {
    ranges.iter().any(|range| range.contains(address))
}

fn forwarded_for(headers: &HeaderMap) -> Option<&str> {
    headers.get(&X_FORWARDED_FOR)?.to_str().ok()
}

fn address(text: &str) -> Option<IpAddr> {
    // An address of IPv4 is the same one however it is written.
    text.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

/// The last address of the list before that many others.
fn before_hops(list: &str, hops: u32) -> Option<IpAddr> {
    let mut list = list;
    for _ in 0..hops {
        list = list.rsplit_once(',')?.0;
    }
    let last = match list.rsplit_once(',') {
        // A list that ends with a comma is no address.
        Some((_, "")) => list,
        Some((_, last)) => last,
        None => list,
    };
    address(last.trim_matches([' ', '\t']))
}

/// The last address of the list that is not trusted, or else the first one; nobody where something else comes before it.
fn before_trusted(list: &str, trusted: &[Cidr]) -> Option<IpAddr> {
    let mut last = None;
    for entry in list.rsplit(',') {
        let found = address(entry.trim_matches([' ', '\t']))?;
        if !is_among(trusted, found) {
            return Some(found);
        }
        last = Some(found);
    }
    last
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn range(text: &str) -> core::CidrRange {
        let (address, length) = text.split_once('/').unwrap();
        core::CidrRange {
            address_prefix: address.into(),
            prefix_len: Some(serin_xds::pb::google::protobuf::UInt32Value {
                value: length.parse().unwrap(),
            }),
        }
    }

    fn manager(edge: bool, hops: u32) -> hcm::HttpConnectionManager {
        hcm::HttpConnectionManager {
            use_remote_address: Some(serin_xds::pb::google::protobuf::BoolValue { value: edge }),
            xff_num_trusted_hops: hops,
            internal_address_config: Some(hcm::http_connection_manager::InternalAddressConfig {
                cidr_ranges: vec![range("10.0.0.0/8")],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn headers(forwarded: Option<&str>) -> HeaderMap {
        let mut out = HeaderMap::new();
        if let Some(forwarded) = forwarded {
            out.insert(X_FORWARDED_FOR.clone(), forwarded.parse().unwrap());
        }
        out
    }

    #[test]
    fn the_client_is_whom_the_configuration_trusts_to_say_so() {
        // use_remote_address, hops, x-forwarded-for, peer; client, internal, edge.
        for (edge, hops, list, peer, client, internal, is_edge) in [
            (true, 0, None, "10.1.1.1", "10.1.1.1", true, false),
            (true, 0, None, "8.8.8.8", "8.8.8.8", false, true),
            (true, 0, Some("10.2.2.2"), "10.1.1.1", "10.1.1.1", false, true),
            (
                true,
                1,
                Some("1.1.1.1, 2.2.2.2"),
                "10.1.1.1",
                "2.2.2.2",
                false,
                true,
            ),
            (
                true,
                2,
                Some("1.1.1.1, 2.2.2.2"),
                "10.1.1.1",
                "1.1.1.1",
                false,
                true,
            ),
            (
                true,
                3,
                Some("1.1.1.1, 2.2.2.2"),
                "10.1.1.1",
                "10.1.1.1",
                false,
                true,
            ),
            (true, 1, Some("nobody"), "10.1.1.1", "10.1.1.1", false, true),
            (false, 0, None, "10.1.1.1", "10.1.1.1", false, false),
            (false, 0, Some("10.2.2.2"), "8.8.8.8", "10.2.2.2", true, false),
            (
                false,
                0,
                Some("1.1.1.1,10.2.2.2"),
                "8.8.8.8",
                "10.2.2.2",
                false,
                false,
            ),
            (
                false,
                1,
                Some("10.3.3.3,10.2.2.2"),
                "8.8.8.8",
                "10.3.3.3",
                false,
                false,
            ),
            (false, 1, Some("10.2.2.2"), "8.8.8.8", "8.8.8.8", false, false),
            (false, 0, Some("1.1.1.1,"), "8.8.8.8", "8.8.8.8", false, false),
            (false, 0, Some(" ::1 "), "8.8.8.8", "::1", false, false),
        ] {
            let origin = Origin::compile(&manager(edge, hops)).unwrap();
            let found = origin.find(&headers(list), ip(peer)).unwrap();
            let case = format!("{edge} {hops} {list:?} {peer}");
            assert_eq!(found.named.unwrap_or(ip(peer)), ip(client), "{case}");
            assert_eq!((found.internal, found.edge), (internal, is_edge), "{case}");
            assert_eq!(found.appends, u8::from(edge), "{case}");
        }
    }

    #[test]
    fn a_request_without_the_field_that_names_its_client_is_refused_where_that_is_asked_for() {
        for (asked, answered) in [
            (None, None),
            (Some(404), Some(404)),
            (Some(200), Some(403)),
            (Some(600), Some(403)),
        ] {
            let detection = Detection::of_field(&custom_header::CustomHeaderConfig {
                header_name: "x-client".into(),
                reject_with_status: asked.map(|code| serin_xds::pb::envoy::r#type::v3::HttpStatus { code }),
                ..Default::default()
            })
            .unwrap();
            let peer = ip("10.0.0.1");
            let refused = detection.detect(&headers(None), peer).err();
            assert_eq!(refused.map(|status| status.as_u16()), answered);
            let mut named = headers(None);
            named.insert("x-client", HeaderValue::from_static("1.2.3.4"));
            let detected = detection.detect(&named, peer).unwrap();
            assert_eq!((detected.client, detected.append), (Some(ip("1.2.3.4")), false));
        }
    }

    #[test]
    fn what_contradicts_itself_or_is_not_known_is_refused_with_its_path() {
        let extension = |url: &str| core::TypedExtensionConfig {
            name: "x".into(),
            typed_config: Some(serin_xds::pb::google::protobuf::Any {
                type_url: format!("type.googleapis.com/{url}"),
                value: Vec::new(),
            }),
        };
        let mut with_both = manager(true, 0);
        with_both.original_ip_detection_extensions = vec![extension(XFF)];
        let mut with_hops = manager(false, 1);
        with_hops.original_ip_detection_extensions = vec![extension(XFF)];
        let mut other = manager(false, 0);
        other.original_ip_detection_extensions = vec![extension("a.B")];
        let mut range_of_nothing = manager(false, 0);
        range_of_nothing
            .internal_address_config
            .as_mut()
            .unwrap()
            .cidr_ranges[0]
            .address_prefix = "x".into();
        for (from, path) in [
            (with_both, "original_ip_detection_extensions"),
            (with_hops, "original_ip_detection_extensions"),
            (other, "original_ip_detection_extensions[0].typed_config"),
            (
                range_of_nothing,
                "internal_address_config.cidr_ranges[0].address_prefix",
            ),
        ] {
            let refusal = Origin::compile(&from).unwrap_err().to_string();
            assert!(refusal.contains(path), "{refusal}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn whoever_writes_the_list_names_nobody_behind_the_hops_that_are_trusted(
            claimed in prop::collection::vec("[0-9a-z., :]{0,12}", 0..4),
            real in prop::collection::vec(any::<[u8; 4]>(), 1..4),
        ) {
            // What trusted hops have added decides, whatever was there before.
            let real: Vec<IpAddr> = real.into_iter().map(IpAddr::from).collect();
            let mut list = claimed;
            list.extend(real.iter().map(IpAddr::to_string));
            let list = list.join(",");
            for hops in 0..real.len() {
                let found = before_hops(&list, u32::try_from(hops).unwrap());
                prop_assert_eq!(found, Some(real[real.len() - 1 - hops]));
            }
        }
    }
}
