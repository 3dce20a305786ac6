//! Envoy's `ssl.*` counters of one listener or cluster. They outlive its configurations.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($name:ident: $text:literal, $doc:literal;)*) => {
        /// See the module.
        #[derive(Debug, Default)]
        pub struct TlsStats {
            $(#[doc = $doc] pub $name: AtomicU64,)*
            versions: [AtomicU64; VERSIONS.len()],
            ciphers: [AtomicU64; CIPHERS.len()],
            groups: [AtomicU64; GROUPS.len()],
        }

        impl TlsStats {
            /// Names as Envoy writes them, with their values; of versions, ciphers and curves those that occurred.
            pub fn read(&self) -> Vec<(String, u64)> {
                let mut out = vec![$(($text.to_owned(), self.$name.load(Ordering::Relaxed))),*];
                out.extend(present("versions", VERSIONS, &self.versions));
                out.extend(present("ciphers", CIPHERS, &self.ciphers));
                out.extend(present("curves", GROUPS, &self.groups));
                out
            }
        }
    };
}

counters! {
    handshake: "handshake", "Handshakes that succeeded.";
    connection_error: "connection_error", "Handshakes and connections that failed for other reasons than verification.";
    session_reused: "session_reused", "Handshakes that resumed a session.";
    no_certificate: "no_certificate", "Handshakes in which the client gave no certificate.";
    fail_verify_no_cert: "fail_verify_no_cert", "Handshakes that failed because the peer gave no certificate.";
    fail_verify_error: "fail_verify_error", "Handshakes that failed because the chain did not verify.";
    fail_verify_san: "fail_verify_san", "Handshakes that failed because no subject alternative name matched.";
    fail_verify_cert_hash: "fail_verify_cert_hash", "Handshakes that failed because neither hash nor key matched.";
    context_updated: "context_config_update_by_sds", "Configurations rebuilt because a secret changed.";
    secrets_not_ready: "context_secrets_not_ready", "Connections refused because a secret had not arrived.";
}

const VERSIONS: &[&str] = &["TLSv1.2", "TLSv1.3"];
const CIPHERS: &[&str] = &[
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-RSA-CHACHA20-POLY1305",
];
const GROUPS: &[&str] = &["X25519MLKEM768", "X25519", "P-256", "P-384"];

fn present<'a>(
    kind: &'a str,
    names: &'a [&'a str],
    values: &'a [AtomicU64],
) -> impl Iterator<Item = (String, u64)> + 'a {
    names.iter().zip(values).filter_map(move |(name, value)| {
        let value = value.load(Ordering::Relaxed);
        (value > 0).then(|| (format!("{kind}.{name}"), value))
    })
}

/// Adds one. Handshakes are rare enough for a shared counter.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl TlsStats {
    /// Counts what a handshake agreed on.
    pub(crate) fn negotiated(&self, version: &str, cipher: &str, group: &str) {
        for (names, values, name) in [
            (VERSIONS, &self.versions[..], version),
            (CIPHERS, &self.ciphers[..], cipher),
            (GROUPS, &self.groups[..], group),
        ] {
            if let Some(index) = names.iter().position(|known| *known == name) {
                count(&values[index]);
            }
        }
    }
}
