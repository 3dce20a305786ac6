//! Fields that are read and not honoured, by name, so that nothing is ignored in silence.

use serin_crds::istio::{
    CaptureMode, ClientTlsMode, ClientTlsSettings, DestinationRuleSpec, GatewaySpec, LoadBalancerSettings,
    OutlierDetection, ServerTlsMode, ServiceEntryResolution, ServiceEntrySpec, SidecarSpec,
    VirtualServiceSpec,
};

use crate::object::Object;
use crate::route::MESH;

/// A field that is set and not honoured.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unhonoured {
    /// Its path, for example `spec.trafficPolicy.tunnel`.
    pub path: String,
    /// Why not, and what happens instead.
    pub reason: String,
    /// Going on without it would do something else than what was asked: the object is refused.
    pub refused: bool,
}

#[derive(Default)]
struct Found(Vec<Unhonoured>);

impl Found {
    fn ignored(&mut self, set: bool, path: impl Into<String>, reason: &str) {
        self.add(set, path, reason, false);
    }

    fn refused(&mut self, set: bool, path: impl Into<String>, reason: &str) {
        self.add(set, path, reason, true);
    }

    fn add(&mut self, set: bool, path: impl Into<String>, reason: &str, refused: bool) {
        if set {
            self.0.push(Unhonoured {
                path: path.into(),
                reason: reason.to_owned(),
                refused,
            });
        }
    }
}

/// What of an object is not honoured.
pub fn unhonoured(object: &Object) -> Vec<Unhonoured> {
    let mut found = Found::default();
    match object {
        Object::VirtualService(object) => virtual_service(&mut found, &object.spec),
        Object::DestinationRule(object) => destination_rule(&mut found, &object.spec),
        Object::Gateway(object) => gateway(&mut found, &object.spec),
        Object::ServiceEntry(object) => service_entry(&mut found, &object.spec),
        Object::Sidecar(object) => sidecar(&mut found, &object.spec),
        Object::Service(_) | Object::EndpointSlice(_) | Object::Pod(_) | Object::Node(_) => {}
    }
    found.0
}

fn virtual_service(found: &mut Found, spec: &VirtualServiceSpec) {
    for (index, route) in spec.http.iter().enumerate() {
        let field = format!("spec.http[{index}]");
        for (position, block) in route.matches.iter().enumerate() {
            let claims = block
                .headers
                .keys()
                .chain(block.without_headers.keys())
                .any(|name| name.starts_with("@request.auth."));
            found.ignored(
                claims,
                format!("{field}.match[{position}].headers"),
                "tokens are not verified yet, so a condition on their claims never holds",
            );
        }
        let delay = route.fault.as_ref().and_then(|fault| fault.delay.as_ref());
        found.ignored(
            delay.is_some_and(|delay| delay.exponential_delay.is_some()),
            format!("{field}.fault.delay.exponentialDelay"),
            "only fixedDelay is injected, as in Istio",
        );
        let abort = route.fault.as_ref().and_then(|fault| fault.abort.as_ref());
        found.ignored(
            abort.is_some_and(|abort| abort.http2_error.is_some()),
            format!("{field}.fault.abort.http2Error"),
            "only httpStatus and grpcStatus are injected, as in Istio",
        );
    }
    let at_gateway = spec.gateways.iter().any(|gateway| gateway != MESH);
    found.ignored(
        at_gateway && !spec.tls.is_empty(),
        "spec.tls",
        "gateways do not open TLS ports yet; the rules hold for sidecars",
    );
}

fn destination_rule(found: &mut Found, spec: &DestinationRuleSpec) {
    let host = spec
        .traffic_policy
        .as_ref()
        .map(|policy| ("spec.trafficPolicy".to_owned(), policy));
    let subsets = spec.subsets.iter().enumerate().filter_map(|(index, subset)| {
        Some((
            format!("spec.subsets[{index}].trafficPolicy"),
            subset.traffic_policy.as_ref()?,
        ))
    });
    for (field, policy) in host.into_iter().chain(subsets) {
        found.refused(
            policy.tunnel.is_some(),
            format!("{field}.tunnel"),
            "tunnels through a proxy are not supported yet",
        );
        found.refused(
            policy.proxy_protocol.is_some(),
            format!("{field}.proxyProtocol"),
            "the PROXY protocol is not supported yet",
        );
        parts(
            found,
            &field,
            policy.load_balancer.as_ref(),
            policy.outlier_detection.as_ref(),
            policy.tls.as_ref(),
        );
        for (index, entry) in policy.port_level_settings.iter().enumerate() {
            let field = format!("{field}.portLevelSettings[{index}]");
            parts(
                found,
                &field,
                entry.load_balancer.as_ref(),
                entry.outlier_detection.as_ref(),
                entry.tls.as_ref(),
            );
        }
    }
}

fn parts(
    found: &mut Found,
    field: &str,
    balancer: Option<&LoadBalancerSettings>,
    outlier: Option<&OutlierDetection>,
    tls: Option<&ClientTlsSettings>,
) {
    if let Some(balancer) = balancer {
        found.ignored(
            balancer.backend_utilization.is_some(),
            format!("{field}.loadBalancer.backendUtilization"),
            "endpoints' load reports are not read; LEAST_REQUEST is used",
        );
        found.ignored(
            balancer.zone_aware_lb_setting.is_some(),
            format!("{field}.loadBalancer.zoneAwareLbSetting"),
            "zones do not count; use localityLbSetting",
        );
    }
    if let Some(outlier) = outlier {
        found.ignored(
            !outlier.outlier_detection_http_error_codes.is_empty(),
            format!("{field}.outlierDetection.outlierDetectionHttpErrorCodes"),
            "only 5xx answers and connection failures count",
        );
        found.ignored(
            outlier.consecutive_errors.is_some(),
            format!("{field}.outlierDetection.consecutiveErrors"),
            "deprecated and without effect in Istio too; use consecutive5xxErrors or consecutiveGatewayErrors",
        );
    }
    if let Some(tls) = tls {
        found.ignored(
            tls.mode == Some(ClientTlsMode::IstioMutual),
            format!("{field}.tls.mode"),
            "the mesh's own mutual TLS comes later; connections are plain text",
        );
        found.refused(
            tls.credential_name.is_some()
                && matches!(tls.mode, Some(ClientTlsMode::Simple | ClientTlsMode::Mutual)),
            format!("{field}.tls.credentialName"),
            "certificates from Secrets come later; give them as files",
        );
    }
}

fn gateway(found: &mut Found, spec: &GatewaySpec) {
    for (index, server) in spec.servers.iter().enumerate() {
        let field = format!("spec.servers[{index}]");
        let protocol = server
            .port
            .as_ref()
            .and_then(|port| port.protocol.as_deref())
            .unwrap_or("")
            .to_ascii_uppercase();
        found.ignored(
            matches!(protocol.as_str(), "HTTPS" | "TLS"),
            format!("{field}.port.protocol"),
            "servers with TLS come with certificates; the port is not opened",
        );
        let terminates = server
            .tls
            .as_ref()
            .is_some_and(|tls| tls.mode.is_some_and(|mode| mode != ServerTlsMode::Passthrough));
        found.ignored(
            terminates && !matches!(protocol.as_str(), "HTTPS" | "TLS"),
            format!("{field}.tls"),
            "servers with TLS come with certificates; the port speaks plain text",
        );
        found.ignored(
            server.default_endpoint.is_some(),
            format!("{field}.defaultEndpoint"),
            "without effect in Istio too",
        );
    }
}

fn service_entry(found: &mut Found, spec: &ServiceEntrySpec) {
    found.refused(
        spec.workload_selector.is_some(),
        "spec.workloadSelector",
        "WorkloadEntries and Pods are not selected yet; list the endpoints",
    );
    found.refused(
        spec.resolution == Some(ServiceEntryResolution::DynamicDns),
        "spec.resolution",
        "DYNAMIC_DNS is not supported yet; use DNS",
    );
    found.ignored(
        !spec.subject_alt_names.is_empty(),
        "spec.subjectAltNames",
        "state the names in the DestinationRule's tls.subjectAltNames",
    );
    found.ignored(
        spec.endpoints.iter().any(|endpoint| endpoint.network.is_some()),
        "spec.endpoints[].network",
        "there is one network; endpoints are reached directly",
    );
}

fn sidecar(found: &mut Found, spec: &SidecarSpec) {
    found.ignored(
        !spec.ingress.is_empty(),
        "spec.ingress",
        "inbound listeners are derived from Services",
    );
    found.ignored(
        spec.inbound_connection_pool.is_some(),
        "spec.inboundConnectionPool",
        "use the connectionPool of the service's DestinationRule",
    );
    for (index, listener) in spec.egress.iter().enumerate() {
        let field = format!("spec.egress[{index}]");
        found.ignored(
            listener.port.is_some(),
            format!("{field}.port"),
            "hosts are reachable on all their ports",
        );
        found.ignored(
            listener.bind.is_some(),
            format!("{field}.bind"),
            "connections are captured by interception",
        );
        found.ignored(
            listener.capture_mode == Some(CaptureMode::None),
            format!("{field}.captureMode"),
            "connections are captured by interception",
        );
    }
    let policy = spec.outbound_traffic_policy.as_ref();
    found.ignored(
        policy.is_some_and(|policy| policy.egress_proxy.is_some()),
        "spec.outboundTrafficPolicy.egressProxy",
        "unknown destinations are passed on or refused by mode",
    );
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn what_would_change_the_meaning_is_refused_and_the_rest_is_named() {
        let rule: serin_crds::istio::DestinationRule = serde_yaml::from_str(
            "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: r, namespace: a}
spec:
  host: h
  trafficPolicy:
    tls: {mode: ISTIO_MUTUAL}
    portLevelSettings: [{port: {number: 443}, tls: {mode: SIMPLE, credentialName: c}}]
    tunnel: {targetHost: t, targetPort: 1}
",
        )
        .unwrap();
        let found: Vec<(String, bool)> = unhonoured(&Object::DestinationRule(Arc::new(rule)))
            .into_iter()
            .map(|field| (field.path, field.refused))
            .collect();
        assert_eq!(
            found,
            [
                ("spec.trafficPolicy.tunnel".to_owned(), true),
                ("spec.trafficPolicy.tls.mode".to_owned(), false),
                (
                    "spec.trafficPolicy.portLevelSettings[0].tls.credentialName".to_owned(),
                    true
                ),
            ]
        );
    }
}
