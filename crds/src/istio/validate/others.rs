//! The rules of Gateways, ServiceEntries and Sidecars.

use std::collections::BTreeSet;

use super::{Findings, Violation};
use crate::istio::{GatewaySpec, ServerTlsMode, ServiceEntryResolution, ServiceEntrySpec, SidecarSpec};

/// What a Gateway breaks.
pub fn gateway(spec: &GatewaySpec) -> Vec<Violation> {
    let mut found = Findings::default();
    if spec.servers.is_empty() {
        found.add("spec.servers", "gateway must have at least one server");
    }
    for (index, server) in spec.servers.iter().enumerate() {
        let field = format!("spec.servers[{index}]");
        if server.hosts.is_empty() {
            found.add(
                format!("{field}.hosts"),
                "server config must contain at least one host",
            );
        }
        for host in &server.hosts {
            let name = host.split_once('/').map_or(host.as_str(), |(_, name)| name);
            found.host(&format!("{field}.hosts"), name);
        }
        let Some(port) = &server.port else {
            found.add(format!("{field}.port"), "port is required");
            continue;
        };
        match port.number {
            Some(number) => found.port(&format!("{field}.port.number"), Some(number)),
            None => found.add(format!("{field}.port.number"), "port must be between 1-65535"),
        }
        let protocol = port.protocol.as_deref().unwrap_or("").to_ascii_uppercase();
        if ![
            "HTTP", "HTTPS", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "TCP", "TLS",
        ]
        .contains(&protocol.as_str())
        {
            found.add(
                format!("{field}.port.protocol"),
                format!("protocol {protocol:?} is not supported"),
            );
        }
        let tls = server.tls.as_ref();
        if matches!(protocol.as_str(), "HTTPS" | "TLS") && tls.is_none() {
            found.add(
                format!("{field}.tls"),
                "server must have TLS settings for HTTPS/TLS protocols",
            );
        }
        if !matches!(protocol.as_str(), "HTTPS" | "TLS")
            && tls.is_some_and(|tls| tls.mode.is_some())
            && protocol == "HTTP"
        {
            found.add(
                format!("{field}.tls"),
                "server cannot have TLS settings for plain text HTTP ports",
            );
        }
        if let Some(tls) = tls
            && tls.https_redirect == Some(true)
            && protocol == "HTTPS"
        {
            found.add(
                format!("{field}.tls.httpsRedirect"),
                "tls.httpsRedirect should only be used with http servers",
            );
        }
        if let Some(tls) = tls
            && matches!(
                tls.mode,
                Some(ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual)
            )
            && tls.credential_name.is_none()
            && tls.credential_names.is_empty()
            && tls.tls_certificates.is_empty()
            && (tls.server_certificate.is_none() || tls.private_key.is_none())
        {
            found.add(
                format!("{field}.tls"),
                "TLS requires a server certificate and a private key, or a credentialName",
            );
        }
    }
    found.0
}

/// What a ServiceEntry breaks.
pub fn service_entry(spec: &ServiceEntrySpec) -> Vec<Violation> {
    let mut found = Findings::default();
    if spec.hosts.is_empty() {
        found.add(
            "spec.hosts",
            "Required value: service entry must have at least one host",
        );
    }
    for (index, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{index}]");
        if host == "*" {
            found.add(field, "hostname cannot be wildcard");
        } else {
            found.host(&field, host);
        }
    }
    if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
        found.add(
            "spec.endpoints",
            "only one of WorkloadSelector or Endpoints can be set",
        );
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in spec.ports.iter().enumerate() {
        let field = format!("spec.ports[{index}]");
        found.port(&format!("{field}.number"), Some(port.number));
        found.port(&format!("{field}.targetPort"), port.target_port);
        if !names.insert(&port.name) {
            found.add(
                format!("{field}.name"),
                format!("Duplicate value: port name {}", port.name),
            );
        }
        if !numbers.insert(port.number) {
            found.add(format!("{field}.number"), "port number cannot be duplicated");
        }
    }
    let cidr = spec.addresses.iter().any(|address| address.contains('/'));
    match spec.resolution.unwrap_or(ServiceEntryResolution::None) {
        ServiceEntryResolution::None => {
            if !spec.endpoints.is_empty() {
                found.add("spec.endpoints", "NONE mode cannot set endpoints");
            }
        }
        ServiceEntryResolution::Static
        | ServiceEntryResolution::Dns
        | ServiceEntryResolution::DnsRoundRobin => {
            if cidr {
                found.add(
                    "spec.addresses",
                    "CIDR addresses are allowed only for NONE resolution types",
                );
            }
        }
        ServiceEntryResolution::DynamicDns => {}
    }
    found.0
}

/// What a Sidecar breaks.
pub fn sidecar(spec: &SidecarSpec) -> Vec<Violation> {
    let mut found = Findings::default();
    for (index, listener) in spec.egress.iter().enumerate() {
        let field = format!("spec.egress[{index}]");
        if listener.hosts.is_empty() {
            found.add(
                format!("{field}.hosts"),
                "sidecar: egress listener must contain at least one host",
            );
        }
        for host in &listener.hosts {
            match host.split_once('/') {
                Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {}
                _ => found.add(
                    format!("{field}.hosts"),
                    format!("host {host:?} must be namespace/host"),
                ),
            }
        }
        if listener.port.is_none() && index + 1 != spec.egress.len() {
            found.add(
                format!("{field}.port"),
                "sidecar: only the last egress listener can have an empty port",
            );
        }
    }
    let mut ports = BTreeSet::new();
    for (index, listener) in spec.ingress.iter().enumerate() {
        let field = format!("spec.ingress[{index}]");
        match listener.port.number {
            Some(number) => {
                found.port(&format!("{field}.port.number"), Some(number));
                if !ports.insert(number) {
                    found.add(
                        format!("{field}.port.number"),
                        "sidecar: ports on listener must be unique",
                    );
                }
            }
            None => found.add(format!("{field}.port.number"), "port must be between 1-65535"),
        }
    }
    found.0
}
