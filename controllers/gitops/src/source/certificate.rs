//! Whether a server certificate comes from an authority of the user's own (`ca.crt` in `spec.secretRef`).
//!
//! libgit2 can be told additional authorities only for the whole process, which would make one repository's authority
//! trusted for every other. So the check is made here, on the leaf that libgit2 hands us: signed by one of the given
//! certificates (an intermediate has to be among them), in its time, for this host.

use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Checks `leaf` (DER) against the PEM certificates in `authorities`. The error is a sentence.
pub(crate) fn check(authorities: &str, leaf: &[u8], host: &str) -> Result<(), String> {
    let (_, leaf) =
        X509Certificate::from_der(leaf).map_err(|_| "the server's certificate cannot be read".to_string())?;
    if !leaf.validity().is_valid() {
        return Err(format!(
            "the server's certificate is not valid now ({})",
            leaf.validity().not_after
        ));
    }
    if !names(&leaf).any(|name| name_matches(&name, host)) {
        return Err(format!("the server's certificate is not for {host}"));
    }
    let mut any = false;
    for pem in Pem::iter_from_buffer(authorities.as_bytes()) {
        let pem = pem.map_err(|_| "ca.crt of spec.secretRef is not PEM".to_string())?;
        let Ok(authority) = pem.parse_x509() else { continue };
        any = true;
        let issued = leaf.issuer() == authority.subject()
            && leaf.verify_signature(Some(authority.public_key())).is_ok();
        // A self-signed server certificate may be listed itself.
        if (issued && authority.validity().is_valid())
            || authority.tbs_certificate.as_ref() == leaf.tbs_certificate.as_ref()
        {
            return Ok(());
        }
    }
    if any {
        Err("the server's certificate is not signed by a certificate in ca.crt of spec.secretRef (list intermediates too)".into())
    } else {
        Err("ca.crt of spec.secretRef holds no certificate".into())
    }
}

fn names(leaf: &X509Certificate<'_>) -> impl Iterator<Item = String> {
    let names = leaf
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|e| e.value.general_names.clone())
        .unwrap_or_default();
    names.into_iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes)
                .ok()
                .map(|b| std::net::IpAddr::from(b).to_string()),
            16 => <[u8; 16]>::try_from(bytes)
                .ok()
                .map(|b| std::net::IpAddr::from(b).to_string()),
            _ => None,
        },
        _ => None,
    })
}

/// A wildcard stands for exactly one label, the leftmost (RFC 6125 section 6.4.3).
fn name_matches(name: &str, host: &str) -> bool {
    let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
    match name.strip_prefix("*.") {
        Some(parent) => host.split_once('.').is_some_and(|(_, rest)| rest == parent),
        None => name == host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    fn authority(name: &str) -> (String, Issuer<'static, KeyPair>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let pem = params.self_signed(&key).unwrap().pem();
        (pem, Issuer::new(params, key))
    }

    #[test]
    fn a_leaf_is_accepted_only_from_a_listed_authority_and_for_its_names() {
        let (ours, issuer) = authority("ours");
        let (other, _) = authority("other");
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec![
            "git.example.com".into(),
            "*.apps.example.com".into(),
            "127.0.0.1".into(),
        ])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
        let both = format!("{other}{ours}");
        for host in ["git.example.com", "x.apps.example.com", "127.0.0.1"] {
            assert_eq!(check(&both, leaf.der(), host), Ok(()), "{host}");
        }
        assert!(
            check(&both, leaf.der(), "a.b.apps.example.com")
                .unwrap_err()
                .contains("not for")
        );
        assert!(
            check(&other, leaf.der(), "git.example.com")
                .unwrap_err()
                .contains("not signed")
        );
        assert!(
            check("", leaf.der(), "git.example.com")
                .unwrap_err()
                .contains("no certificate")
        );
    }
}
