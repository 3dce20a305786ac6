//! Parts of `/config_dump` that did not come from a control plane as resources: the bootstrap, routes within listeners,
//! secrets as they are in use.

use base64::Engine as _;
use prost::Message as _;
use serde_json::{Value, json};
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;

use super::Proxy;
use crate::bootstrap::Showing;
use crate::tls::certificate::Certificate;
use crate::tls::secret::Secret;
use crate::tls::table::SecretTable;

const BOOTSTRAP: &str = "envoy.config.bootstrap.v3.Bootstrap";
const NODE: &str = "envoy.config.core.v3.Node";

/// The bootstrap as it was read, with the node as the control plane is told it. Without a file, the node alone.
pub(super) fn bootstrap(proxy: &Proxy, showing: &Showing) -> Value {
    let mut shown = showing.show(BOOTSTRAP, &proxy.bootstrap.body);
    if let Some(map) = shown.as_object_mut() {
        map.remove("@type");
        map.insert("node".to_owned(), node(proxy, showing));
    }
    shown
}

/// Who the proxy says that it is.
pub(super) fn node(proxy: &Proxy, showing: &Showing) -> Value {
    let mut shown = showing.show(NODE, &proxy.node.encode_to_vec());
    if let Some(map) = shown.as_object_mut() {
        map.remove("@type");
    }
    shown
}

/// Route configurations that an encoded listener holds, by name.
pub(super) fn inline_routes(body: &[u8]) -> Vec<(String, Vec<u8>)> {
    use hcm::http_connection_manager::RouteSpecifier;
    use listener::filter::ConfigType;
    let Ok(listener) = listener::Listener::decode(body) else {
        return Vec::new();
    };
    let chains = listener
        .filter_chains
        .iter()
        .chain(&listener.default_filter_chain);
    chains
        .flat_map(|chain| &chain.filters)
        .filter_map(|filter| match &filter.config_type {
            Some(ConfigType::TypedConfig(any)) if any.type_url.ends_with(".HttpConnectionManager") => {
                hcm::HttpConnectionManager::decode(any.value.as_slice()).ok()
            }
            _ => None,
        })
        .filter_map(|manager| match manager.route_specifier {
            Some(RouteSpecifier::RouteConfig(config)) => Some((config.name.clone(), config.encode_to_vec())),
            _ => None,
        })
        .collect()
}

pub(super) type Entries = Vec<(String, Value)>;

/// Secrets in use: those that are part of a configuration, and those that were discovered. Keys are not shown.
pub(super) fn secrets(table: &SecretTable) -> (Entries, Entries) {
    let (mut fixed, mut discovered) = (Vec::new(), Vec::new());
    for (slot, dynamic) in table.in_use_by_kind() {
        let Some(secret) = slot.get() else { continue };
        let mut shown = match &*secret {
            Secret::Identity(identity) => json!({
                "tls_certificate": {
                    "certificate_chain": { "inline_bytes": pem(identity.chain.iter()) },
                    "private_key": { "inline_bytes": base64::engine::general_purpose::STANDARD.encode("[redacted]") },
                },
            }),
            Secret::Validation(_, validation) => json!({
                "validation_context": { "trusted_ca": { "inline_bytes": pem(validation.authorities()) } },
            }),
            Secret::Tickets(_) => json!({ "session_ticket_keys": {} }),
        };
        if slot.name.is_empty() {
            continue;
        }
        shown["@type"] = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret".into();
        shown["name"] = (*slot.name).into();
        let mut entry = json!({ "name": &*slot.name, "secret": shown });
        if dynamic {
            entry["version_info"] = slot.version().to_string().into();
            discovered.push((slot.name.to_string(), entry));
        } else {
            fixed.push((slot.name.to_string(), entry));
        }
    }
    (fixed, discovered)
}

/// Certificates as PEM, as JSON has bytes.
fn pem<'c>(certificates: impl Iterator<Item = &'c Certificate>) -> String {
    let base64 = &base64::engine::general_purpose::STANDARD;
    let mut out = String::new();
    for certificate in certificates {
        out.push_str("-----BEGIN CERTIFICATE-----\n");
        let text = base64.encode(&certificate.der);
        // Base64 is ASCII: a line is 64 of its bytes.
        for line in text.as_bytes().chunks(64) {
            out.push_str(&String::from_utf8_lossy(line));
            out.push('\n');
        }
        out.push_str("-----END CERTIFICATE-----\n");
    }
    base64.encode(out)
}
