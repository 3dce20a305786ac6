//! `x-forwarded-client-cert`: who the client proved to be, told to the next hop.

use http::{HeaderMap, HeaderName, HeaderValue};
use rustls_pki_types::CertificateDer;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;

use crate::error::Refusal;
use crate::tls::certificate::hex;
use crate::tls::info::ConnectionTls;

static X_FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// What becomes of the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Taken off.
    Sanitize,
    /// Passed on over mutual TLS, else taken off.
    ForwardOnly,
    /// Ours is added over mutual TLS, else taken off.
    AppendForward,
    /// Ours instead over mutual TLS, else taken off.
    SanitizeSet,
    /// Passed on whatever the connection.
    AlwaysForwardOnly,
}

/// `forward_client_cert_details` and `set_current_client_cert_details`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientCert {
    mode: Mode,
    cert: bool,
    chain: bool,
    subject: bool,
    uri: bool,
    dns: bool,
}

impl ClientCert {
    pub(super) fn compile(from: &hcm::HttpConnectionManager) -> Result<Self, Refusal> {
        use hcm::http_connection_manager::ForwardClientCertDetails as Details;
        let mode = match Details::try_from(from.forward_client_cert_details) {
            Ok(Details::Sanitize) => Mode::Sanitize,
            Ok(Details::ForwardOnly) => Mode::ForwardOnly,
            Ok(Details::AppendForward) => Mode::AppendForward,
            Ok(Details::SanitizeSet) => Mode::SanitizeSet,
            Ok(Details::AlwaysForwardOnly) => Mode::AlwaysForwardOnly,
            Err(_) => return Err(Refusal::new("forward_client_cert_details", "is unknown")),
        };
        let details = from.set_current_client_cert_details.as_ref();
        Ok(Self {
            mode,
            cert: details.is_some_and(|details| details.cert),
            chain: details.is_some_and(|details| details.chain),
            subject: details
                .and_then(|details| details.subject.as_ref())
                .is_some_and(|value| value.value),
            uri: details.is_some_and(|details| details.uri),
            dns: details.is_some_and(|details| details.dns),
        })
    }

    /// Makes the field of a request what the mode says; whether there may be one is `present`. Only a certificate that was
    /// verified counts.
    pub fn apply(&self, headers: &mut HeaderMap, tls: Option<&ConnectionTls>, present: bool) {
        let tls = tls.filter(|tls| tls.is_mutual());
        match (self.mode, tls) {
            (Mode::AlwaysForwardOnly, _) | (Mode::ForwardOnly, Some(_)) => {}
            (Mode::Sanitize, _) | (_, None) => {
                if present {
                    headers.remove(&X_FORWARDED_CLIENT_CERT);
                }
            }
            (Mode::AppendForward | Mode::SanitizeSet, Some(tls)) => {
                let ours = self.element(tls);
                let before = headers
                    .get(&X_FORWARDED_CLIENT_CERT)
                    .filter(|_| self.mode == Mode::AppendForward)
                    .and_then(|value| value.to_str().ok());
                let value = match before {
                    Some(before) => format!("{before},{ours}"),
                    None => ours,
                };
                match HeaderValue::try_from(value) {
                    Ok(value) => headers.insert(X_FORWARDED_CLIENT_CERT.clone(), value),
                    Err(_) => headers.remove(&X_FORWARDED_CLIENT_CERT),
                };
            }
        }
    }

    fn element(&self, tls: &ConnectionTls) -> String {
        let mut parts = Vec::new();
        if let Some(local) = &tls.local {
            parts.extend(local.uri_sans.iter().map(|uri| format!("By={uri}")));
        }
        if let Some(peer) = &tls.peer {
            parts.push(format!("Hash={}", hex(&peer.sha256)));
            if self.cert {
                parts.push(format!("Cert=\"{}\"", encoded(std::slice::from_ref(&peer.der))));
            }
            if self.chain {
                parts.push(format!("Chain=\"{}\"", encoded(&tls.peer_chain)));
            }
            if self.subject {
                parts.push(format!("Subject=\"{}\"", peer.subject.replace('"', "\\\"")));
            }
            if self.uri {
                if peer.uri_sans.is_empty() {
                    parts.push("URI=".to_owned());
                }
                parts.extend(peer.uri_sans.iter().map(|uri| format!("URI={uri}")));
            }
            if self.dns {
                parts.extend(peer.dns_sans.iter().map(|name| format!("DNS={name}")));
            }
        }
        parts.join(";")
    }
}

/// Certificates as PEM, percent-encoded.
pub(crate) fn encoded(chain: &[CertificateDer<'_>]) -> String {
    use base64::Engine as _;
    let mut out = String::new();
    for der in chain {
        out.push_str("-----BEGIN%20CERTIFICATE-----%0A");
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        for (index, character) in text.chars().enumerate() {
            if index > 0 && index % 64 == 0 {
                out.push_str("%0A");
            }
            match character {
                '+' => out.push_str("%2B"),
                '/' => out.push_str("%2F"),
                '=' => out.push_str("%3D"),
                other => out.push(other),
            }
        }
        out.push_str("%0A-----END%20CERTIFICATE-----%0A");
    }
    out
}
