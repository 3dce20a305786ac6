//! The PROXY protocol's header, written and read. The format is HAProxy's `proxy-protocol.txt`.
//!
//! Version 2 has room for values by type (TLVs) after the addresses: [`Tlvs`].

use std::net::{IpAddr, SocketAddr};

use crate::config::transport_socket::ProxyVersion;

/// What version 2 starts with.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The longest header of version 1.
const MAX_V1: usize = 107;
/// The longest header of version 2 that is read; the addresses take 36 bytes at most, the rest are TLVs.
const MAX_V2: usize = 16 + 4096;
/// What follows the first 16 bytes of version 2 at most.
const MAX_REST: usize = u16::MAX as usize;

/// A type and a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tlv {
    /// The type (`PP2_TYPE_...`).
    pub kind: u8,
    /// The value, of at most 65,535 bytes.
    pub value: Box<[u8]>,
}

/// Types and values in their order. Shared by everything that happens on a connection.
pub type Tlvs = std::sync::Arc<[Tlv]>;

/// The types and values of what follows the addresses; `None` if it is no such list.
pub fn read_tlvs(mut bytes: &[u8]) -> Option<Vec<(u8, &[u8])>> {
    let mut out = Vec::new();
    while let [kind, high, low, rest @ ..] = bytes {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        out.push((*kind, rest.get(..length)?));
        bytes = &rest[length..];
    }
    bytes.is_empty().then_some(out)
}

/// Values by type beyond what a header has room for are left out (Envoy).
fn write_tlvs(tlvs: &[Tlv], taken: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for tlv in tlvs {
        let Ok(length) = u16::try_from(tlv.value.len()) else {
            continue;
        };
        if taken + out.len() + 3 + tlv.value.len() > MAX_REST {
            continue;
        }
        out.push(tlv.kind);
        out.extend(length.to_be_bytes());
        out.extend(&tlv.value);
    }
    out
}

/// The header for a connection between these two, or for one of our own. `tlvs` are for version 2 and others' connections.
pub fn write(version: ProxyVersion, between: Option<(SocketAddr, SocketAddr)>, tlvs: &[Tlv]) -> Vec<u8> {
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let between = between
        .map(|(source, destination)| (canonical(source), canonical(destination)))
        .map(|(source, destination)| {
            // A header has room for one family: the wider one takes both.
            if source.is_ipv4() == destination.is_ipv4() {
                (source, destination)
            } else {
                (widened(source), widened(destination))
            }
        });
    match version {
        ProxyVersion::V1 => match between {
            Some((source, destination)) => format!(
                "PROXY {} {} {} {} {}\r\n",
                if source.is_ipv4() { "TCP4" } else { "TCP6" },
                source.ip(),
                destination.ip(),
                source.port(),
                destination.port()
            )
            .into_bytes(),
            None => b"PROXY UNKNOWN\r\n".to_vec(),
        },
        ProxyVersion::V2 => {
            let mut out = SIGNATURE.to_vec();
            let Some((source, destination)) = between else {
                // LOCAL: a connection of the proxy itself.
                out.extend([0x20, 0x00, 0, 0]);
                return out;
            };
            let mut addresses = Vec::with_capacity(36);
            for address in [source.ip(), destination.ip()] {
                match address {
                    IpAddr::V4(address) => addresses.extend(address.octets()),
                    IpAddr::V6(address) => addresses.extend(address.octets()),
                }
            }
            addresses.extend(source.port().to_be_bytes());
            addresses.extend(destination.port().to_be_bytes());
            out.extend([0x21, if source.is_ipv4() { 0x11 } else { 0x21 }]);
            let tlvs = write_tlvs(tlvs, addresses.len());
            out.extend(((addresses.len() + tlvs.len()) as u16).to_be_bytes());
            out.extend(addresses);
            out.extend(tlvs);
            out
        }
    }
}

/// As an IPv6 address.
fn widened(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    SocketAddr::new(ip.into(), address.port())
}

/// What the first bytes of a connection say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// A header of `length` bytes, from `source` to `destination`; neither for a connection of the sender itself.
    Present {
        /// Its version.
        version: ProxyVersion,
        /// Bytes to take off.
        length: usize,
        /// Where in them the addresses end, and values by type begin.
        tlvs: usize,
        /// Who connected to whom.
        between: Option<(SocketAddr, SocketAddr)>,
    },
    /// More bytes are needed.
    Incomplete,
    /// It starts otherwise.
    Absent,
    /// It starts like a header and is none.
    Malformed,
}

/// Reads a header.
pub fn read(bytes: &[u8]) -> Header {
    let start = |prefix: &[u8]| bytes.starts_with(prefix) || prefix.starts_with(bytes);
    if start(&SIGNATURE) {
        read_v2(bytes)
    } else if start(b"PROXY ") {
        read_v1(bytes)
    } else {
        Header::Absent
    }
}

fn read_v1(bytes: &[u8]) -> Header {
    let window = &bytes[..bytes.len().min(MAX_V1)];
    let Some(end) = window.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() >= MAX_V1 {
            Header::Malformed
        } else {
            Header::Incomplete
        };
    };
    let present = |between| Header::Present {
        version: ProxyVersion::V1,
        length: end + 2,
        tlvs: end + 2,
        between,
    };
    let Ok(line) = std::str::from_utf8(&bytes[..end]) else {
        return Header::Malformed;
    };
    let parts: Vec<&str> = line.split(' ').collect();
    match parts.as_slice() {
        ["PROXY", "UNKNOWN", ..] => present(None),
        [
            "PROXY",
            family @ ("TCP4" | "TCP6"),
            source,
            destination,
            source_port,
            destination_port,
        ] => {
            let address = |ip: &str, port: &str| {
                let ip: IpAddr = ip.parse().ok()?;
                // No sign, no leading zeros.
                let number: u16 = port
                    .parse()
                    .ok()
                    .filter(|number: &u16| number.to_string() == port)?;
                (ip.is_ipv4() == (*family == "TCP4")).then(|| SocketAddr::new(ip, number))
            };
            match (
                address(source, source_port),
                address(destination, destination_port),
            ) {
                (Some(source), Some(destination)) => present(Some((source, destination))),
                _ => Header::Malformed,
            }
        }
        _ => Header::Malformed,
    }
}

fn read_v2(bytes: &[u8]) -> Header {
    let Some(fixed) = bytes.get(12..16) else {
        return Header::Incomplete;
    };
    let length = 16 + usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
    if fixed[0] >> 4 != 2 || length > MAX_V2 {
        return Header::Malformed;
    }
    let Some(rest) = bytes.get(16..length) else {
        return Header::Incomplete;
    };
    let present = |between, addresses: usize| Header::Present {
        version: ProxyVersion::V2,
        length,
        tlvs: 16 + addresses,
        between,
    };
    let port = |at: usize| u16::from_be_bytes([rest[at], rest[at + 1]]);
    match (fixed[0] & 0x0f, fixed[1]) {
        // LOCAL, whatever the family; or nothing known of the family.
        (0, _) | (1, 0x00) => present(None, 0),
        (1, 0x11) if rest.len() >= 12 => {
            let ip = |at: usize| IpAddr::from([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
            let source = SocketAddr::new(ip(0), port(8));
            present(Some((source, SocketAddr::new(ip(4), port(10)))), 12)
        }
        (1, 0x21) if rest.len() >= 36 => {
            let ip = |at: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&rest[at..at + 16]);
                IpAddr::from(octets)
            };
            let source = SocketAddr::new(ip(0), port(32));
            present(Some((source, SocketAddr::new(ip(16), port(34)))), 36)
        }
        _ => Header::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_of_two_families_are_written_as_the_wider_one() {
        let (v4, v6): (SocketAddr, SocketAddr) =
            ("1.2.3.4:5".parse().unwrap(), "[2001:db8::1]:6".parse().unwrap());
        for version in [ProxyVersion::V1, ProxyVersion::V2] {
            let written = write(version, Some((v4, v6)), &[]);
            let Header::Present {
                between: Some((source, destination)),
                ..
            } = read(&written)
            else {
                panic!("{written:?}");
            };
            assert_eq!(source.ip().to_canonical(), v4.ip());
            assert_eq!((source.port(), destination), (5, v6));
        }
    }

    #[test]
    fn malformed_headers_are_told_from_absent_and_incomplete_ones() {
        for (bytes, wanted) in [
            (&b"GET / HTTP/1.1\r\n"[..], Header::Absent),
            (b"PRO", Header::Incomplete),
            (b"PROXY TCP4 1.1.1.1", Header::Incomplete),
            (b"PROXY TCP4 1.1.1.1 2.2.2.2 1 070\r\n", Header::Malformed),
            (b"PROXY TCP4 ::1 2.2.2.2 1 70\r\n", Header::Malformed),
            (b"PROXY UDP4 1.1.1.1 2.2.2.2 1 70\r\n", Header::Malformed),
            (b"\r\n\r\n\0\r\nQUIT\n", Header::Incomplete),
            (b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0c", Header::Malformed),
            (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x01a", Header::Malformed),
            (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff", Header::Malformed),
        ] {
            assert_eq!(read(bytes), wanted, "{bytes:?}");
        }
        assert_eq!(read(&[&b"PROXY "[..], &[b'x'; 200]].concat()), Header::Malformed);
        assert!(matches!(
            read(b"PROXY UNKNOWN\r\nGET"),
            Header::Present {
                length: 15,
                between: None,
                ..
            }
        ));
    }

    #[test]
    fn a_list_of_values_that_does_not_end_where_it_says_is_none() {
        let whole = [0x01, 0, 2, b'a', b'b', 0xe0, 0, 0];
        assert_eq!(read_tlvs(&whole), Some(vec![(1, &b"ab"[..]), (0xe0, &b""[..])]));
        for end in [1, 2, 3, 4, 6, 7] {
            assert_eq!(read_tlvs(&whole[..end]), None, "{end}");
        }
        assert_eq!(read_tlvs(&[]), Some(Vec::new()));
    }

    #[test]
    fn values_that_a_header_has_no_room_for_are_left_out() {
        let of = |kind, length| Tlv {
            kind,
            value: vec![0; length].into(),
        };
        let between = ("1.2.3.4:5".parse().unwrap(), "1.2.3.4:6".parse().unwrap());
        let tlvs = [of(1, 60_000), of(2, 60_000), of(3, 100), of(4, 70_000)];
        let written = write(ProxyVersion::V2, Some(between), &tlvs);
        let kinds: Vec<u8> = read_tlvs(&written[28..])
            .unwrap()
            .iter()
            .map(|(kind, _)| *kind)
            .collect();
        assert_eq!(kinds, [1, 3]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn what_is_written_is_read(
            a: [u8; 16],
            b: [u8; 16],
            v4: bool,
            v2: bool,
            ports: (u16, u16),
            local: bool,
            tlvs in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..5),
        ) {
            let ip = |octets: [u8; 16]| if v4 {
                IpAddr::from([octets[0], octets[1], octets[2], octets[3]])
            } else {
                IpAddr::from(octets)
            };
            let between = (!local).then(|| (SocketAddr::new(ip(a), ports.0), SocketAddr::new(ip(b), ports.1)));
            // Mapped addresses are written as what they are.
            prop_assume!(between.is_none_or(|(a, b)| v4 || (a.ip().to_canonical().is_ipv6() && b.ip().to_canonical().is_ipv6())));
            let version = if v2 { ProxyVersion::V2 } else { ProxyVersion::V1 };
            let list: Vec<Tlv> = tlvs
                .iter()
                .map(|(kind, value)| Tlv { kind: *kind, value: value.as_slice().into() })
                .collect();
            let written = write(version, between, &list);
            for end in 0..written.len() {
                prop_assert_eq!(read(&written[..end]), Header::Incomplete);
            }
            let length = written.len();
            let more = [&written[..], b"GET"].concat();
            let Header::Present { version: own, length: whole, tlvs: start, between: told } = read(&more) else {
                panic!("{:?}", read(&more));
            };
            prop_assert_eq!((own, whole, told), (version, length, between));
            let found = read_tlvs(&written[start..]).unwrap();
            // Version 1 has no room for them, and connections of the proxy itself have none.
            let kept = if v2 && !local { tlvs.len() } else { 0 };
            prop_assert!(found.iter().copied().eq(tlvs[..kept].iter().map(|(kind, value)| (*kind, value.as_slice()))));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80), dress in any::<bool>()) {
            let bytes = if dress { [&SIGNATURE[..], &bytes].concat() } else { bytes };
            let _ = read(&bytes);
        }
    }
}
