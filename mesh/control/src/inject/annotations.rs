//! The annotations of a pod that injection reads.

use std::collections::BTreeMap;
use std::net::IpAddr;

/// A pod that cannot be injected as it asks to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InjectError {
    /// An annotation's value cannot be read.
    #[error("cannot inject the sidecar: annotation {annotation}: {value:?} {expected}")]
    Value {
        /// Name of the annotation.
        annotation: String,
        /// Its value.
        value: String,
        /// What was expected of it.
        expected: &'static str,
    },
    /// An annotation asks for something that Serin does not have.
    #[error("cannot inject the sidecar: annotation {annotation}: {value:?} is not supported; {remedy}")]
    Unsupported {
        /// Name of the annotation.
        annotation: String,
        /// Its value.
        value: String,
        /// What to do now.
        remedy: &'static str,
    },
    /// A gateway pod without the container to fill in.
    #[error(
        "cannot inject the gateway: the pod has no container named istio-proxy; add one with image: auto, it is filled in"
    )]
    NoGatewayContainer,
}

/// What is made of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Template {
    Sidecar,
    Gateway,
}

/// Quantities of one resource, as the user wrote them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Resources {
    pub(super) cpu: Option<String>,
    pub(super) memory: Option<String>,
    pub(super) cpu_limit: Option<String>,
    pub(super) memory_limit: Option<String>,
}

/// The annotations of a pod, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Annotations {
    pub(super) template: Template,
    pub(super) intercepts: bool,
    pub(super) include_outbound_ranges: String,
    pub(super) exclude_outbound_ranges: String,
    pub(super) exclude_outbound_ports: String,
    pub(super) include_inbound_ports: String,
    pub(super) exclude_inbound_ports: String,
    pub(super) image: Option<String>,
    pub(super) log_level: Option<String>,
    pub(super) resources: Resources,
    pub(super) unhonoured: Vec<String>,
}

/// Annotations of Istio's injection that tune what is not there.
const UNHONOURED: [&str; 18] = [
    "proxy.istio.io/config",
    "proxy.istio.io/overrides",
    "sidecar.istio.io/agentLogLevel",
    "sidecar.istio.io/componentLogLevel",
    "sidecar.istio.io/proxyImageType",
    "sidecar.istio.io/statsInclusionPrefixes",
    "sidecar.istio.io/statsInclusionSuffixes",
    "sidecar.istio.io/statsInclusionRegexps",
    "sidecar.istio.io/statsHistogramBuckets",
    "sidecar.istio.io/statsFlushInterval",
    "sidecar.istio.io/statsEvictionInterval",
    "sidecar.istio.io/extraStatTags",
    "sidecar.istio.io/rewriteAppHTTPProbers",
    "sidecar.istio.io/userVolume",
    "sidecar.istio.io/userVolumeMount",
    "readiness.status.sidecar.istio.io/applicationPorts",
    "status.sidecar.istio.io/port",
    "prometheus.istio.io/merge-metrics",
];

const PORTS: &str = "is not a comma-separated list of ports";
const PORTS_OR_STAR: &str = "is neither * nor a comma-separated list of ports";
const RANGES: &str = "is not a comma-separated list of CIDR ranges";
const RANGES_OR_STAR: &str = "is neither * nor a comma-separated list of CIDR ranges";

impl Annotations {
    pub(super) fn read(annotations: Option<&BTreeMap<String, String>>) -> Result<Self, InjectError> {
        let empty = BTreeMap::new();
        let all = annotations.unwrap_or(&empty);
        let get = |name: &str| all.get(name).map(String::as_str);
        let read = |name: &str, default: &str, valid: fn(&str) -> bool, expected: &'static str| {
            let annotation = format!("traffic.sidecar.istio.io/{name}");
            match get(&annotation) {
                Some(value) if value.split(',').all(|part| valid(part.trim())) => {
                    Ok(value.split(',').map(str::trim).collect::<Vec<_>>().join(","))
                }
                // An empty list is a list.
                Some(value) if value.trim().is_empty() => Ok(String::new()),
                Some(value) => Err(InjectError::Value {
                    annotation,
                    value: value.to_owned(),
                    expected,
                }),
                None => Ok(default.to_owned()),
            }
        };
        let unsupported = |annotation: &str, value: &str, remedy| {
            Err(InjectError::Unsupported {
                annotation: annotation.to_owned(),
                value: value.to_owned(),
                remedy,
            })
        };

        let template = match get("inject.istio.io/templates") {
            None | Some("" | "sidecar") => Template::Sidecar,
            Some("gateway") => Template::Gateway,
            Some(other) => {
                return unsupported("inject.istio.io/templates", other, "use sidecar or gateway");
            }
        };
        let intercepts = match get("sidecar.istio.io/interceptionMode") {
            None | Some("REDIRECT") => true,
            Some("NONE") => false,
            Some(other) => {
                return unsupported("sidecar.istio.io/interceptionMode", other, "use REDIRECT or NONE");
            }
        };
        if let Some(value) = get("sidecar.istio.io/nativeSidecar").filter(|value| *value != "true") {
            return unsupported(
                "sidecar.istio.io/nativeSidecar",
                value,
                "remove it: sidecars are always native here",
            );
        }
        for name in [
            "sidecar.istio.io/bootstrapOverride",
            "traffic.sidecar.istio.io/kubevirtInterfaces",
            "traffic.sidecar.istio.io/excludeInterfaces",
        ] {
            if let Some(value) = get(name) {
                return unsupported(name, value, "remove it");
            }
        }
        for name in ["includeInboundPorts", "includeOutboundIPRanges"] {
            let name = format!("traffic.sidecar.istio.io/{name}");
            if let Some(value) = get(&name).filter(|value| value.trim().is_empty()) {
                let remedy = "to intercept nothing at all use sidecar.istio.io/interceptionMode: NONE";
                return unsupported(&name, value, remedy);
            }
        }
        // Ports in addition to ranges; where every range is intercepted they add nothing.
        let all_ranges =
            get("traffic.sidecar.istio.io/includeOutboundIPRanges").is_none_or(|ranges| ranges == "*");
        let more_ports = read("includeOutboundPorts", "", is_port_or_star, PORTS_OR_STAR)?;
        if !all_ranges && !more_ports.is_empty() {
            let remedy = "intercept these destinations by includeOutboundIPRanges";
            return unsupported(
                "traffic.sidecar.istio.io/includeOutboundPorts",
                &more_ports,
                remedy,
            );
        }
        let log_level = match get("sidecar.istio.io/logLevel") {
            None | Some("") => None,
            Some(level @ ("trace" | "debug" | "info" | "error" | "off")) => Some(level.to_owned()),
            Some("warning" | "warn") => Some("warn".to_owned()),
            Some("critical") => Some("error".to_owned()),
            Some(other) => {
                return Err(InjectError::Value {
                    annotation: "sidecar.istio.io/logLevel".into(),
                    value: other.into(),
                    expected: "is none of trace, debug, info, warning, error, critical, off",
                });
            }
        };
        let text = |name: &str| get(name).filter(|value| !value.is_empty()).map(str::to_owned);
        Ok(Self {
            template,
            intercepts,
            include_outbound_ranges: read("includeOutboundIPRanges", "*", is_range_or_star, RANGES_OR_STAR)?,
            exclude_outbound_ranges: read("excludeOutboundIPRanges", "", is_range, RANGES)?,
            exclude_outbound_ports: read("excludeOutboundPorts", "", is_port, PORTS)?,
            include_inbound_ports: read("includeInboundPorts", "*", is_port_or_star, PORTS_OR_STAR)?,
            exclude_inbound_ports: read("excludeInboundPorts", "", is_port, PORTS)?,
            image: text("sidecar.istio.io/proxyImage"),
            log_level,
            resources: Resources {
                cpu: text("sidecar.istio.io/proxyCPU"),
                memory: text("sidecar.istio.io/proxyMemory"),
                cpu_limit: text("sidecar.istio.io/proxyCPULimit"),
                memory_limit: text("sidecar.istio.io/proxyMemoryLimit"),
            },
            unhonoured: UNHONOURED
                .into_iter()
                .filter(|name| all.contains_key(*name))
                .map(str::to_owned)
                .collect(),
        })
    }
}

fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|port| port > 0)
}

fn is_port_or_star(text: &str) -> bool {
    text == "*" || is_port(text)
}

fn is_range(text: &str) -> bool {
    let (address, length) = text
        .split_once('/')
        .map_or((text, None), |(address, length)| (address, Some(length)));
    address.parse::<IpAddr>().is_ok_and(|address| {
        let most = if address.is_ipv4() { 32 } else { 128 };
        length.is_none_or(|length| length.parse::<u8>().is_ok_and(|length| length <= most))
    })
}

fn is_range_or_star(text: &str) -> bool {
    text == "*" || is_range(text)
}
