//! IP addresses (`net.IP`) and networks (`net.CIDR`).

use std::any::Any;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cel::common::types::{CelBool, CelInt, CelString, Type};
use cel::common::value::{StaticVal, Val};
use cel::{DeclarationError, Env, ExecutionError, add_member_overload, add_overload};

use super::{Outcome, Text, failed};

#[derive(Clone, Debug, PartialEq, Eq)]
struct Ip(IpAddr);
value!(Ip, IP, "net.IP");

#[derive(Clone, Debug, PartialEq, Eq)]
struct Cidr {
    address: IpAddr,
    length: u8,
}
value!(Cidr, CIDR, "net.CIDR");

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_type(IP.to_owned())?;
    env.add_type(CIDR.to_owned())?;
    add_overload!(env, fn ip: (CelString) -> Result<Ip>)?;
    add_overload!(env, fn is_ip: (CelString) -> CelBool, name = "isIP")?;
    add_overload!(env, fn is_canonical: (CelString) -> Result<CelBool>, name = "ip.isCanonical")?;
    add_overload!(env, fn ip_text: (Ip) -> CelString, name = "string")?;
    add_member_overload!(env, fn family: (Ip) -> CelInt)?;
    add_member_overload!(env, fn is_unspecified: (Ip) -> CelBool)?;
    add_member_overload!(env, fn is_loopback: (Ip) -> CelBool)?;
    add_member_overload!(env, fn is_link_local_multicast: (Ip) -> CelBool)?;
    add_member_overload!(env, fn is_link_local_unicast: (Ip) -> CelBool)?;
    add_member_overload!(env, fn is_global_unicast: (Ip) -> CelBool)?;
    add_overload!(env, fn cidr: (CelString) -> Result<Cidr>)?;
    add_overload!(env, fn is_cidr: (CelString) -> CelBool, name = "isCIDR")?;
    add_overload!(env, fn cidr_text: (Cidr) -> CelString, name = "string")?;
    add_member_overload!(env, fn contains_ip: (Cidr, Ip) -> CelBool, name = "containsIP")?;
    add_member_overload!(env, fn contains_ip_text: (Cidr, CelString) -> Result<CelBool>, name = "containsIP")?;
    add_member_overload!(env, fn contains_cidr: (Cidr, Cidr) -> CelBool, name = "containsCIDR")?;
    add_member_overload!(env, fn contains_cidr_text: (Cidr, CelString) -> Result<CelBool>, name = "containsCIDR")?;
    add_member_overload!(env, fn address: (Cidr) -> Ip, name = "ip")?;
    add_member_overload!(env, fn masked: (Cidr) -> Cidr)?;
    add_member_overload!(env, fn prefix_length: (Cidr) -> CelInt)?;
    Ok(())
}

/// Kubernetes takes no IPv4 address in the form of an IPv6 one, and none with a zone.
fn parse_ip(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>()
        .ok()
        .filter(|ip| !matches!(ip, IpAddr::V6(six) if six.to_ipv4_mapped().is_some()))
}

fn ip(text: &Text<'_>) -> Outcome<Ip> {
    match parse_ip(text.inner()) {
        Some(ip) => Ok(Ip(ip)),
        None => failed(
            "ip",
            format!(
                "IP Address {:?} parse error during conversion from string",
                text.inner()
            ),
        ),
    }
}

fn is_ip(text: &Text<'_>) -> CelBool {
    CelBool::from(parse_ip(text.inner()).is_some())
}

fn is_canonical(text: &Text<'_>) -> Outcome<CelBool> {
    let parsed = ip(text)?;
    Ok(CelBool::from(parsed.0.to_string() == text.inner()))
}

fn ip_text(this: &Ip) -> Text<'static> {
    CelString::from(this.0.to_string())
}

fn family(this: &Ip) -> CelInt {
    CelInt::from(if this.0.is_ipv4() { 4 } else { 6 })
}

fn is_unspecified(this: &Ip) -> CelBool {
    CelBool::from(this.0.is_unspecified())
}

fn is_loopback(this: &Ip) -> CelBool {
    CelBool::from(this.0.is_loopback())
}

fn link_local_multicast(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(four) => four.octets().starts_with(&[224, 0, 0]),
        IpAddr::V6(six) => six.octets().first() == Some(&0xff) && six.segments()[0] & 0x000f == 2,
    }
}

fn link_local_unicast(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(four) => four.is_link_local(),
        IpAddr::V6(six) => six.is_unicast_link_local(),
    }
}

fn is_link_local_multicast(this: &Ip) -> CelBool {
    CelBool::from(link_local_multicast(&this.0))
}

fn is_link_local_unicast(this: &Ip) -> CelBool {
    CelBool::from(link_local_unicast(&this.0))
}

fn is_global_unicast(this: &Ip) -> CelBool {
    let ip = &this.0;
    let broadcast = matches!(ip, IpAddr::V4(four) if four.is_broadcast());
    CelBool::from(
        !broadcast
            && !ip.is_unspecified()
            && !ip.is_loopback()
            && !ip.is_multicast()
            && !link_local_unicast(ip),
    )
}

fn parse_cidr(text: &str) -> Option<Cidr> {
    let (address, length) = text.split_once('/')?;
    let address = parse_ip(address)?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let plain = length.bytes().all(|b| b.is_ascii_digit()) && (length == "0" || !length.starts_with('0'));
    let length: u8 = length.parse().ok().filter(|length| plain && *length <= most)?;
    Some(Cidr { address, length })
}

fn cidr(text: &Text<'_>) -> Outcome<Cidr> {
    match parse_cidr(text.inner()) {
        Some(cidr) => Ok(cidr),
        None => failed(
            "cidr",
            "network address parse error during conversion from string",
        ),
    }
}

fn is_cidr(text: &Text<'_>) -> CelBool {
    CelBool::from(parse_cidr(text.inner()).is_some())
}

fn cidr_text(this: &Cidr) -> Text<'static> {
    CelString::from(format!("{}/{}", this.address, this.length))
}

/// The bits of an address from the left, and how many there are.
fn bits(ip: &IpAddr) -> (u128, u8) {
    match ip {
        IpAddr::V4(four) => (u128::from(four.to_bits()) << 96, 32),
        IpAddr::V6(six) => (six.to_bits(), 128),
    }
}

fn mask(length: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
}

fn within(this: &Cidr, ip: &IpAddr) -> bool {
    let ((net, size), (ip, other)) = (bits(&this.address), bits(ip));
    size == other && (net ^ ip) & mask(this.length) == 0
}

fn contains_ip(this: &Cidr, ip: &Ip) -> CelBool {
    CelBool::from(within(this, &ip.0))
}

fn no_overload(function: &str) -> ExecutionError {
    ExecutionError::no_such_member_overload(function, vec!["net.CIDR".to_owned(), "string".to_owned()])
}

fn contains_ip_text(this: &Cidr, text: &Text<'_>) -> Outcome<CelBool> {
    let ip = parse_ip(text.inner()).ok_or_else(|| no_overload("containsIP"))?;
    Ok(CelBool::from(within(this, &ip)))
}

fn contains_cidr(this: &Cidr, other: &Cidr) -> CelBool {
    CelBool::from(other.length >= this.length && within(this, &other.address))
}

fn contains_cidr_text(this: &Cidr, text: &Text<'_>) -> Outcome<CelBool> {
    let other = parse_cidr(text.inner()).ok_or_else(|| no_overload("containsCIDR"))?;
    Ok(contains_cidr(this, &other))
}

fn address(this: &Cidr) -> Ip {
    Ip(this.address)
}

fn masked(this: &Cidr) -> Cidr {
    let net = bits(&this.address).0 & mask(this.length);
    let address = match this.address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits((net >> 96) as u32)),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(net)),
    };
    Cidr {
        address,
        length: this.length,
    }
}

fn prefix_length(this: &Cidr) -> CelInt {
    CelInt::from(i64::from(this.length))
}
