//! What a certificate says, read once and kept.

use std::net::IpAddr;

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509Name};

/// The fields of a certificate that something here goes by.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificate itself.
    pub der: CertificateDer<'static>,
    /// URI subject alternative names (a SPIFFE identity is one).
    pub uri_sans: Box<[Box<str>]>,
    /// DNS subject alternative names.
    pub dns_sans: Box<[Box<str>]>,
    /// IP address subject alternative names.
    pub ip_sans: Box<[IpAddr]>,
    /// Email subject alternative names.
    pub email_sans: Box<[Box<str>]>,
    /// Subject in RFC 2253's form, most specific first.
    pub subject: Box<str>,
    /// Issuer in the same form.
    pub issuer: Box<str>,
    /// Serial number, lower-case hexadecimal.
    pub serial: Box<str>,
    /// Seconds since 1970 from which it is valid.
    pub not_before: i64,
    /// Seconds since 1970 until which it is valid.
    pub not_after: i64,
    /// Whether it is an authority's.
    pub is_authority: bool,
    /// Whether its key may sign certificates or revocation lists.
    pub may_sign: bool,
    /// SHA-256 of the certificate.
    pub sha256: [u8; 32],
    /// SHA-256 of its SubjectPublicKeyInfo.
    pub spki_sha256: [u8; 32],
}

/// The bytes are no X.509 certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an X.509 certificate: {0}")]
pub struct NotACertificate(String);

impl Certificate {
    /// Reads a certificate.
    pub fn parse(der: &CertificateDer<'_>) -> Result<Self, NotACertificate> {
        let (_, parsed) =
            X509Certificate::from_der(der).map_err(|error| NotACertificate(error.to_string()))?;
        let (mut uri, mut dns, mut ip, mut email) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut may_sign = false;
        for extension in parsed.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(names) => {
                    for name in &names.general_names {
                        match name {
                            GeneralName::URI(value) => uri.push(Box::from(*value)),
                            GeneralName::DNSName(value) => dns.push(Box::from(*value)),
                            GeneralName::RFC822Name(value) => email.push(Box::from(*value)),
                            GeneralName::IPAddress(bytes) => ip.extend(address_of(bytes)),
                            _ => {}
                        }
                    }
                }
                ParsedExtension::KeyUsage(usage) => may_sign = usage.key_cert_sign() || usage.crl_sign(),
                _ => {}
            }
        }
        Ok(Self {
            uri_sans: uri.into(),
            dns_sans: dns.into(),
            ip_sans: ip.into(),
            email_sans: email.into(),
            subject: name_text(parsed.subject()).into(),
            issuer: name_text(parsed.issuer()).into(),
            serial: hex(parsed.raw_serial()).into(),
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
            is_authority: parsed.is_ca(),
            may_sign,
            sha256: sha256(der),
            spki_sha256: sha256(parsed.public_key().raw),
            der: der.clone().into_owned(),
        })
    }

    /// Who the certificate's holder is, as Envoy's RBAC and Istio see it: its first URI name, else its first DNS name,
    /// else its subject.
    pub fn principal(&self) -> &str {
        self.uri_sans
            .first()
            .or(self.dns_sans.first())
            .unwrap_or(&self.subject)
    }
}

/// Seconds since 1970 as RFC 3339 in UTC, for messages and admin output.
pub(crate) fn timestamp(seconds: i64) -> String {
    crate::calendar::rfc3339(seconds, "")
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

/// SHA-256 of `bytes`.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
            // Writing to a String cannot fail.
            let _ = write!(out, "{byte:02x}");
            out
        })
}

/// RFC 2253: the last relative name first, separated by commas, special characters escaped.
fn name_text(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = name
        .iter_rdn()
        .map(|rdn| {
            rdn.iter()
                .map(|attribute| {
                    let key = x509_parser::objects::oid2abbrev(
                        attribute.attr_type(),
                        x509_parser::objects::oid_registry(),
                    )
                    .map_or_else(|_| attribute.attr_type().to_id_string(), str::to_owned);
                    let value = attribute.as_str().unwrap_or("").to_owned();
                    format!("{key}={}", escaped(&value))
                })
                .collect::<Vec<_>>()
                .join("+")
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

fn escaped(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let last = value.chars().count().saturating_sub(1);
    for (index, character) in value.chars().enumerate() {
        let special = matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';')
            || (index == 0 && matches!(character, '#' | ' '))
            || (index == last && character == ' ');
        if special {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_serial_and_validity_are_read_and_the_uri_is_the_principal() {
        use rcgen::{CertificateParams, DnType, KeyPair, SanType};
        let mut params = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        params
            .subject_alt_names
            .push(SanType::URI("spiffe://td/ns/shop/sa/cart".try_into().unwrap()));
        params
            .subject_alt_names
            .push(SanType::IpAddress("10.0.0.1".parse().unwrap()));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Shop, Inc.");
        params.distinguished_name.push(DnType::CommonName, "cart");
        params.serial_number = Some(vec![0x01, 0xab].into());
        let key = KeyPair::generate().unwrap();
        let made = params.self_signed(&key).unwrap();
        let read = Certificate::parse(made.der()).unwrap();
        assert_eq!(read.principal(), "spiffe://td/ns/shop/sa/cart");
        assert_eq!(&*read.dns_sans, [Box::from("a.example")]);
        assert_eq!(&*read.ip_sans, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(&*read.subject, "CN=cart,O=Shop\\, Inc.");
        assert_eq!(&*read.serial, "01ab");
        assert!(read.not_before < read.not_after);
        assert!(!read.is_authority);
    }

    #[test]
    fn times_are_written_as_rfc_3339() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00Z");
        assert_eq!(timestamp(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(timestamp(1_763_738_096), "2025-11-21T15:14:56Z");
    }

    #[test]
    fn bytes_that_are_no_certificate_are_an_error() {
        assert!(Certificate::parse(&CertificateDer::from(vec![1, 2, 3])).is_err());
    }
}
