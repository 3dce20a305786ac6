//! `/certs`: the certificates in use, in Envoy's shape.

use serde_json::{Value, json};

use crate::tls::certificate::{Certificate, timestamp};
use crate::tls::secret::Secret;
use crate::tls::table::SecretTable;

/// Every certificate that is in use; `now` in seconds since 1970.
pub fn certs(secrets: &SecretTable, now: i64) -> Value {
    let mut out = Vec::new();
    for slot in secrets.in_use() {
        match slot.get().as_deref() {
            Some(Secret::Identity(identity)) => {
                let chain: Vec<_> = identity.chain.iter().collect();
                out.push(entry(&slot.name, &[], &chain, now));
            }
            Some(Secret::Validation(_, validation)) => {
                let authorities: Vec<_> = validation.authorities().collect();
                out.push(entry(&slot.name, &authorities, &[], now));
            }
            Some(Secret::Tickets(_)) | None => {}
        }
    }
    json!({ "certificates": out })
}

/// Days until the first certificate in use ends, not below 0; nothing where there is none. `now` in seconds since 1970.
pub(super) fn days_left(secrets: &SecretTable, now: i64) -> Option<u64> {
    let mut first: Option<i64> = None;
    for slot in secrets.in_use() {
        let ends = |certificate: &Certificate| certificate.not_after;
        let earliest = match slot.get().as_deref() {
            Some(Secret::Identity(identity)) => identity.chain.iter().map(ends).min(),
            Some(Secret::Validation(_, validation)) => validation.authorities().map(ends).min(),
            Some(Secret::Tickets(_)) | None => None,
        };
        first = [first, earliest].into_iter().flatten().min();
    }
    first.map(|end| u64::try_from((end - now) / 86_400).unwrap_or(0))
}

fn entry(name: &str, authorities: &[&Certificate], chain: &[&Certificate], now: i64) -> Value {
    let details = |certificates: &[&Certificate]| {
        certificates
            .iter()
            .map(|certificate| detail(name, certificate, now))
            .collect::<Vec<_>>()
    };
    json!({ "ca_cert": details(authorities), "cert_chain": details(chain) })
}

fn detail(name: &str, certificate: &Certificate, now: i64) -> Value {
    let names = |key: &'static str, list: Vec<String>| list.into_iter().map(move |name| json!({ key: name }));
    let texts = |list: &[Box<str>]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    let sans: Vec<Value> = names("dns", texts(&certificate.dns_sans))
        .chain(names("uri", texts(&certificate.uri_sans)))
        .chain(names(
            "ip_address",
            certificate.ip_sans.iter().map(ToString::to_string).collect(),
        ))
        .collect();
    json!({
        "path": if name.is_empty() { "<inline>" } else { name },
        "serial_number": &*certificate.serial,
        "subject_alt_names": sans,
        "days_until_expiration": ((certificate.not_after - now).max(0) / 86_400).to_string(),
        "valid_from": timestamp(certificate.not_before),
        "expiration_time": timestamp(certificate.not_after),
    })
}
