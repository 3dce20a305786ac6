use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serin_xds::pb::google::protobuf::UInt32Value;

use super::super::certificate::hex;
use super::*;

struct Made {
    root: String,
    leaf: CertificateDer<'static>,
    intermediate: CertificateDer<'static>,
}

/// A root, an authority below it, and a leaf that was valid in January 2020.
fn made() -> Made {
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        (params, KeyPair::generate().unwrap())
    };
    let (root, root_key) = authority("root");
    let (below, below_key) = authority("below");
    let mut leaf = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
    leaf.not_before = rcgen::date_time_ymd(2020, 1, 1);
    leaf.not_after = rcgen::date_time_ymd(2020, 2, 1);
    let leaf_key = KeyPair::generate().unwrap();
    Made {
        root: root.self_signed(&root_key).unwrap().pem(),
        intermediate: below
            .signed_by(&below_key, &Issuer::from_params(&root, &root_key))
            .unwrap()
            .der()
            .clone(),
        leaf: leaf
            .signed_by(&leaf_key, &Issuer::from_params(&below, &below_key))
            .unwrap()
            .der()
            .clone(),
    }
}

fn text(pem: &str) -> Option<core::DataSource> {
    Some(core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineString(pem.into())),
        ..Default::default()
    })
}

fn verify(made: &Made, context: &tls::CertificateValidationContext, year: u64) -> Result<(), Unverified> {
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
    let now = std::time::Duration::from_secs((year - 1970) * 31_557_600 + 10 * 86_400);
    Validation::compile(context).unwrap().verify(
        &made.leaf,
        std::slice::from_ref(&made.intermediate),
        KeyUsage::server_auth(),
        algorithms.all,
        UnixTime::since_unix_epoch(now),
    )
}

#[test]
fn expiry_depth_and_untrusted_chains_are_judged_as_the_context_says() {
    let made = made();
    let mut context = tls::CertificateValidationContext {
        trusted_ca: text(&made.root),
        ..Default::default()
    };
    assert_eq!(verify(&made, &context, 2020), Ok(()));
    assert!(
        matches!(verify(&made, &context, 2022), Err(Unverified::Chain(reason)) if reason.contains("expired"))
    );
    context.allow_expired_certificate = true;
    assert_eq!(verify(&made, &context, 2022), Ok(()));
    context.max_verify_depth = Some(UInt32Value { value: 0 });
    assert!(
        matches!(verify(&made, &context, 2020), Err(Unverified::Chain(reason)) if reason.contains("too long"))
    );
    context.trust_chain_verification =
        tls::certificate_validation_context::TrustChainVerification::AcceptUntrusted as i32;
    assert_eq!(verify(&made, &context, 2020), Ok(()));
}

#[test]
fn a_pinned_certificate_or_key_is_believed_and_no_other() {
    let made = made();
    let certificate = Certificate::parse(&made.leaf).unwrap();
    let hash = hex(&certificate.sha256);
    let key = base64::engine::general_purpose::STANDARD.encode(certificate.spki_sha256);
    let pinned = |hashes: &[&str], keys: &[&str]| tls::CertificateValidationContext {
        verify_certificate_hash: hashes.iter().map(|hash| (*hash).to_owned()).collect(),
        verify_certificate_spki: keys.iter().map(|key| (*key).to_owned()).collect(),
        ..Default::default()
    };
    let zeros = "00".repeat(32);
    assert_eq!(verify(&made, &pinned(&[&hash], &[]), 2020), Ok(()));
    assert_eq!(verify(&made, &pinned(&[&zeros], &[&key]), 2020), Ok(()));
    assert_eq!(
        verify(&made, &pinned(&[&zeros], &[]), 2020),
        Err(Unverified::Hash)
    );
    assert!(Validation::compile(&pinned(&["xyz"], &[])).is_err());
    assert!(Validation::compile(&pinned(&[], &["AAAA"])).is_err());
}

#[test]
fn a_wildcard_covers_one_label() {
    assert!(dns_matches("*.example", "a.example"));
    assert!(!dns_matches("*.example", "a.b.example"));
    assert!(!dns_matches("*.example", "example"));
    assert!(dns_matches("A.example", "a.EXAMPLE"));
}
