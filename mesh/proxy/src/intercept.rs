//! Transparent interception: nftables rules that bring a pod's TCP connections to its proxy.
//!
//! The rules are Istio's (REDIRECT mode) in one table of family `inet`, so IPv4 and IPv6 are the same. They are
//! generated here ([`script`], a pure function) and put in place by `nft -f -`, which applies all or nothing; a second
//! run replaces the first. The proxy's own connections pass: they carry a socket mark, or belong to user or group 1337.

use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use crate::error::Error;

/// Name of the table.
pub const TABLE: &str = "serin_intercept";
/// User and group of the proxy, where it has its own.
pub const PROXY_ID: u32 = 1337;
/// Mark of the proxy's connections to other pods.
pub const MARK_OUT: u32 = 1337;
/// Mark of the proxy's connections to its own application, which must pass even to the pod's own address.
pub const MARK_IN: u32 = 1338;

/// A range of addresses, `10.0.0.0/8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range(IpAddr, u8);

impl std::str::FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, length) = text.split_once('/').unwrap_or((text, ""));
        let address: IpAddr = address
            .parse()
            .map_err(|_| format!("{text:?} is no address range"))?;
        let widest = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            "" => widest,
            given => given
                .parse()
                .ok()
                .filter(|n| *n <= widest)
                .ok_or_else(|| format!("{text:?}: bad length"))?,
        };
        Ok(Self(address, length))
    }
}

/// What is intercepted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Where outgoing connections are taken.
    pub outbound_port: u16,
    /// Where incoming connections are taken.
    pub inbound_port: u16,
    /// Incoming connections to these ports only; empty means all.
    pub include_inbound_ports: Vec<u16>,
    /// Incoming connections to these ports pass.
    pub exclude_inbound_ports: Vec<u16>,
    /// Outgoing connections to these ports pass.
    pub exclude_outbound_ports: Vec<u16>,
    /// Outgoing connections to these addresses only; empty means all.
    pub include_outbound_ranges: Vec<Range>,
    /// Outgoing connections to these addresses pass.
    pub exclude_outbound_ranges: Vec<Range>,
}

fn ports(list: &[u16]) -> String {
    list.iter().map(u16::to_string).collect::<Vec<_>>().join(", ")
}

fn family(range: &Range) -> &'static str {
    if range.0.is_ipv4() { "ip" } else { "ip6" }
}

/// The rules as a script for `nft -f -`. It removes what a former run left, in the same transaction.
pub fn script(rules: &Rules) -> String {
    let mut lines: Vec<String> = removal();
    let mut line = |text: String| lines.push(text);
    line(format!("table inet {TABLE} {{"));
    line("  chain prerouting {".into());
    line("    type nat hook prerouting priority dstnat; policy accept;".into());
    line("    meta l4proto tcp jump inbound".into());
    line("  }".into());
    line("  chain inbound {".into());
    if !rules.exclude_inbound_ports.is_empty() {
        line(format!(
            "    tcp dport {{ {} }} return",
            ports(&rules.exclude_inbound_ports)
        ));
    }
    let only = match rules.include_inbound_ports.as_slice() {
        [] => String::new(),
        some => format!("tcp dport {{ {} }} ", ports(some)),
    };
    line(format!(
        "    {only}meta l4proto tcp redirect to :{}",
        rules.inbound_port
    ));
    line("  }".into());
    line("  chain output {".into());
    line("    type nat hook output priority -100; policy accept;".into());
    line("    meta l4proto tcp jump outbound".into());
    line("  }".into());
    line("  chain outbound {".into());
    // The inbound side to its application, whichever address it connects to.
    line(format!("    meta mark {MARK_IN} return"));
    line("    oifname \"lo\" ip saddr 127.0.0.6 return".into());
    line("    oifname \"lo\" ip6 saddr ::6 return".into());
    // The application called itself by a service's name: through the inbound side like everybody else.
    for own in [
        format!("meta mark {MARK_OUT}"),
        format!("meta skuid {PROXY_ID}"),
        format!("meta skgid {PROXY_ID}"),
    ] {
        for loopback in ["ip daddr != 127.0.0.0/8", "ip6 daddr != ::1"] {
            line(format!(
                "    oifname \"lo\" {loopback} {own} meta l4proto tcp redirect to :{}",
                rules.inbound_port
            ));
        }
        line(format!("    {own} return"));
    }
    line("    oifname \"lo\" return".into());
    line("    ip daddr 127.0.0.0/8 return".into());
    line("    ip6 daddr ::1 return".into());
    if !rules.exclude_outbound_ports.is_empty() {
        line(format!(
            "    tcp dport {{ {} }} return",
            ports(&rules.exclude_outbound_ports)
        ));
    }
    for range in &rules.exclude_outbound_ranges {
        line(format!(
            "    {} daddr {}/{} return",
            family(range),
            range.0,
            range.1
        ));
    }
    let redirect = format!("meta l4proto tcp redirect to :{}", rules.outbound_port);
    if rules.include_outbound_ranges.is_empty() {
        line(format!("    {redirect}"));
    }
    for range in &rules.include_outbound_ranges {
        line(format!(
            "    {} daddr {}/{} {redirect}",
            family(range),
            range.0,
            range.1
        ));
    }
    line("  }".into());
    line("}".into());
    lines.join("\n") + "\n"
}

/// Declaring the table first makes its removal succeed whether or not it was there.
fn removal() -> Vec<String> {
    vec![
        format!("table inet {TABLE}"),
        format!("delete table inet {TABLE}"),
    ]
}

/// Puts the rules in place in the current network namespace.
pub fn install(rules: &Rules) -> Result<(), Error> {
    add_ipv6_source();
    run(&script(rules))
}

/// Takes the rules away; does nothing when there are none.
pub fn remove() -> Result<(), Error> {
    run(&(removal().join("\n") + "\n"))
}

/// Starts `nft`, also where the path lacks the directories of system programs.
fn start_nft() -> std::io::Result<std::process::Child> {
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for program in ["nft", "/usr/sbin/nft", "/sbin/nft"] {
        let started = Command::new(program)
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        match started {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => last = error,
            other => return other,
        }
    }
    Err(last)
}

/// Gives the loopback interface the address that the inbound side connects from over IPv6. Without it (no IPv6, no
/// `ip`) only applications that are reached over IPv6 by a proxy without socket marks are concerned.
fn add_ipv6_source() {
    for program in ["ip", "/usr/sbin/ip", "/sbin/ip"] {
        let done = Command::new(program)
            .args(["-6", "addr", "add", "::6/128", "dev", "lo"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if done.is_ok() {
            return;
        }
    }
}

fn run(script: &str) -> Result<(), Error> {
    let failed = |action, reason: String| Error::Intercept { action, reason };
    let mut child =
        start_nft().map_err(|error| failed("starting nft (package nftables)", error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(script.as_bytes())
            .map_err(|error| failed("writing the rules to nft", error.to_string()))?;
    }
    let output = child
        .wait_with_output()
        .map_err(|error| failed("waiting for nft", error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(
        "applying the rules (needs CAP_NET_ADMIN)",
        String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            outbound_port: 15001,
            inbound_port: 15006,
            exclude_inbound_ports: vec![15090, 15021],
            exclude_outbound_ports: vec![5432],
            exclude_outbound_ranges: vec!["10.9.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()],
            ..Default::default()
        }
    }

    #[test]
    fn the_proxys_own_connections_pass_before_anything_is_redirected_outwards() {
        let script = script(&rules());
        let lines: Vec<_> = script.lines().map(str::trim).collect();
        let at = |wanted: &str| {
            lines
                .iter()
                .position(|line| *line == wanted)
                .unwrap_or_else(|| panic!("{wanted:?} is not in\n{script}"))
        };
        let redirect = at("meta l4proto tcp redirect to :15001");
        for pass in [
            "meta mark 1338 return",
            "meta mark 1337 return",
            "meta skuid 1337 return",
            "meta skgid 1337 return",
            "oifname \"lo\" return",
            "ip daddr 127.0.0.0/8 return",
            "ip6 daddr ::1 return",
            "tcp dport { 5432 } return",
            "ip daddr 10.9.0.0/16 return",
            "ip6 daddr fd00::/8 return",
        ] {
            assert!(at(pass) < redirect, "{pass}");
        }
        assert!(at("tcp dport { 15090, 15021 } return") < at("meta l4proto tcp redirect to :15006"));
        assert!(at("delete table inet serin_intercept") < at("table inet serin_intercept {"));
    }

    #[test]
    fn only_the_included_is_redirected_when_something_is_included() {
        let mut rules = rules();
        rules.include_inbound_ports = vec![80];
        rules.include_outbound_ranges = vec!["10.0.0.0/8".parse().unwrap()];
        let script = script(&rules);
        assert!(
            script.contains("tcp dport { 80 } meta l4proto tcp redirect to :15006"),
            "{script}"
        );
        assert!(
            script.contains("ip daddr 10.0.0.0/8 meta l4proto tcp redirect to :15001"),
            "{script}"
        );
        assert!(
            !script
                .lines()
                .any(|line| line.trim() == "meta l4proto tcp redirect to :15001"),
            "{script}"
        );
    }

    #[test]
    fn ranges_are_checked() {
        assert_eq!(
            "10.0.0.1".parse::<Range>().unwrap(),
            Range("10.0.0.1".parse().unwrap(), 32)
        );
        assert!("10.0.0.0/33".parse::<Range>().is_err());
        assert!("x".parse::<Range>().is_err());
    }
}
