//! SPIFFE's validator: an authority per trust domain.

use std::collections::HashMap;

use base64::Engine as _;
use rustls_pki_types::CertificateDer;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;

use super::{Roots, Unverified, source};
use crate::config::convert::{self, required};
use crate::error::{Refusal, Within};
use crate::tls::certificate::Certificate;

const SPIFFE_VALIDATOR: &str = "envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";

/// The authorities of the peer's trust domain, after the rules of an X.509-SVID: one URI name, of the scheme `spiffe`,
/// and no right to sign.
pub(super) fn roots<'a>(
    domains: &'a HashMap<Box<str>, Roots>,
    certificate: &Certificate,
) -> Result<&'a Roots, Unverified> {
    let bad = |reason: &str| Unverified::Chain(format!("{reason} (peer {})", certificate.principal()));
    let [uri] = &*certificate.uri_sans else {
        return Err(bad("an X.509-SVID has exactly one URI SAN"));
    };
    if certificate.is_authority || certificate.may_sign {
        return Err(bad("an X.509-SVID must not be an authority's"));
    }
    let domain = uri
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.split('/').next())
        .filter(|domain| !domain.is_empty())
        .ok_or_else(|| bad("the URI SAN is no SPIFFE id"))?;
    domains
        .get(domain)
        .ok_or_else(|| bad("no trust bundle for the trust domain"))
}

pub(super) fn compile(from: &core::TypedExtensionConfig) -> Result<HashMap<Box<str>, Roots>, Refusal> {
    let any = required(from.typed_config.as_ref(), "typed_config")?;
    let message: tls::SpiffeCertValidatorConfig = convert::unpack(any, SPIFFE_VALIDATOR)?;
    let mut domains = HashMap::new();
    for (index, domain) in message.trust_domains.iter().enumerate() {
        let path = format!("trust_domains[{index}]");
        if !domain.workload_trust_domain.is_empty() {
            return Err(Refusal::new(
                format!("{path}.workload_trust_domain"),
                "not supported",
            ));
        }
        let pem = source(domain.trust_bundle.as_ref(), "trust_bundle")
            .within(&path)?
            .ok_or_else(|| Refusal::new(format!("{path}.trust_bundle"), "is missing"))?;
        let roots = Roots::from_pem(&pem).within(format!("{path}.trust_bundle"))?;
        if domains.insert(Box::from(domain.name.as_str()), roots).is_some() {
            return Err(Refusal::new(path, format!("{} occurs twice", domain.name)));
        }
    }
    if let Some(json) = source(message.trust_bundles.as_ref(), "trust_bundles")? {
        if !domains.is_empty() {
            return Err(Refusal::new(
                "trust_bundles",
                "and trust_domains exclude each other",
            ));
        }
        domains = trust_bundles(&json).within("trust_bundles")?;
    }
    if domains.is_empty() {
        return Err(Refusal::new("trust_domains", "there is none"));
    }
    Ok(domains)
}

/// `{"trust_domains": {"<name>": {"keys": [{"use": "x509-svid", "x5c": ["<base64>"]}]}}}`
fn trust_bundles(json: &[u8]) -> Result<HashMap<Box<str>, Roots>, Refusal> {
    #[derive(serde::Deserialize)]
    struct Bundles {
        trust_domains: HashMap<String, Bundle>,
    }
    #[derive(serde::Deserialize)]
    struct Bundle {
        keys: Vec<Key>,
    }
    #[derive(serde::Deserialize)]
    struct Key {
        #[serde(rename = "use", default)]
        purpose: String,
        #[serde(default)]
        x5c: Vec<String>,
    }
    let bundles: Bundles = serde_json::from_slice(json)
        .map_err(|error| Refusal::new("", format!("not a bundle map: {error}")))?;
    let mut out = HashMap::new();
    for (name, bundle) in bundles.trust_domains {
        let mut roots = Roots::default();
        let keys = bundle.keys.iter().filter(|key| key.purpose == "x509-svid");
        for encoded in keys.flat_map(|key| &key.x5c) {
            let der = base64::engine::general_purpose::STANDARD
                .decode(encoded)
                .map_err(|error| Refusal::new(&*name, error.to_string()))?;
            roots
                .add(CertificateDer::from(der))
                .map_err(|reason| Refusal::new(&*name, reason))?;
        }
        if roots.anchors.is_empty() {
            return Err(Refusal::new(name, "no x509-svid authority"));
        }
        out.insert(name.into(), roots);
    }
    Ok(out)
}
