//! Operators about the certificates of both connections (`%DOWNSTREAM_PEER_ISSUER%`, `%UPSTREAM_LOCAL_URI_SAN%`).

use std::time::Duration;

use super::super::record::Record;
use super::super::time::TimeFormat;
use super::operator::Datum;
use crate::config::client_cert::encoded;
use crate::error::Refusal;
use crate::tls::certificate::Certificate;

/// Whose certificate.
#[derive(Clone, Copy, Debug)]
enum Whose {
    /// The client's, once it is verified.
    DownstreamPeer,
    /// Ours towards the client.
    DownstreamLocal,
    /// The endpoint's.
    UpstreamPeer,
    /// Ours towards the endpoint.
    UpstreamLocal,
}

/// What of it.
#[derive(Debug)]
enum Part {
    UriSan,
    DnsSan,
    IpSan,
    EmailSan,
    Subject,
    Issuer,
    Serial,
    Fingerprint,
    Whole,
    From(TimeFormat),
    Until(TimeFormat),
}

/// An operator.
#[derive(Debug)]
pub(super) struct OfCertificate {
    whose: Whose,
    part: Part,
}

impl OfCertificate {
    /// By the name of the operator; `None` if it is no such one.
    pub(super) fn find(name: &str, arguments: Option<&str>) -> Result<Option<Self>, Refusal> {
        let sides = [
            ("DOWNSTREAM_PEER_", Whose::DownstreamPeer),
            ("DOWNSTREAM_LOCAL_", Whose::DownstreamLocal),
            ("UPSTREAM_PEER_", Whose::UpstreamPeer),
            ("UPSTREAM_LOCAL_", Whose::UpstreamLocal),
        ];
        let found = sides
            .iter()
            .find_map(|(prefix, whose)| Some((name.strip_prefix(prefix)?, *whose)));
        let Some((part, whose)) = found else {
            return Ok(None);
        };
        let time = || match arguments {
            None | Some("") => Ok(TimeFormat::rfc3339()),
            Some(format) => TimeFormat::parse(format),
        };
        let peer = matches!(whose, Whose::DownstreamPeer | Whose::UpstreamPeer);
        let part = match part {
            "URI_SAN" => Part::UriSan,
            "DNS_SAN" => Part::DnsSan,
            "IP_SAN" => Part::IpSan,
            "EMAIL_SAN" => Part::EmailSan,
            "SUBJECT" => Part::Subject,
            "ISSUER" if peer => Part::Issuer,
            "SERIAL" if peer => Part::Serial,
            "FINGERPRINT_256" if peer => Part::Fingerprint,
            "CERT" if peer => Part::Whole,
            "CERT_V_START" if peer => {
                return Ok(Some(Self {
                    whose,
                    part: Part::From(time()?),
                }));
            }
            "CERT_V_END" if peer => {
                return Ok(Some(Self {
                    whose,
                    part: Part::Until(time()?),
                }));
            }
            _ => return Ok(None),
        };
        if arguments.is_some() {
            return Err(Refusal::new("", format!("%{name}%: takes no argument")));
        }
        Ok(Some(Self { whose, part }))
    }

    /// Its value.
    pub(super) fn value<'a>(&self, record: &'a Record<'a>) -> Datum<'a> {
        let (down, up) = (record.downstream_tls, record.upstream_tls);
        let certificate: Option<&'a Certificate> = match self.whose {
            Whose::DownstreamPeer => down
                .filter(|tls| tls.peer_validated)
                .and_then(|tls| tls.peer.as_deref()),
            Whose::DownstreamLocal => down.and_then(|tls| tls.local.as_deref()),
            Whose::UpstreamPeer => up.and_then(|tls| tls.peer.as_deref()),
            Whose::UpstreamLocal => up.and_then(|tls| tls.local.as_deref()),
        };
        certificate.map_or(Datum::Absent, |certificate| self.part.of(certificate))
    }
}

impl Part {
    fn of<'a>(&self, certificate: &'a Certificate) -> Datum<'a> {
        let joined = |names: &[Box<str>]| {
            if names.is_empty() {
                Datum::Absent
            } else {
                Datum::Text(names.join(",").into())
            }
        };
        let time = |format: &TimeFormat, seconds: i64| {
            let mut out = String::with_capacity(24);
            format.write(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)), &mut out);
            Datum::Text(out.into())
        };
        match self {
            Self::UriSan => joined(&certificate.uri_sans),
            Self::DnsSan => joined(&certificate.dns_sans),
            Self::EmailSan => joined(&certificate.email_sans),
            Self::IpSan if certificate.ip_sans.is_empty() => Datum::Absent,
            Self::IpSan => {
                let all: Vec<String> = certificate.ip_sans.iter().map(ToString::to_string).collect();
                Datum::Text(all.join(",").into())
            }
            Self::Subject => Datum::text(Some(&certificate.subject)),
            Self::Issuer => Datum::text(Some(&certificate.issuer)),
            Self::Serial => Datum::text(Some(&certificate.serial)),
            Self::Fingerprint => {
                let digits = certificate.sha256.iter().map(|byte| format!("{byte:02x}"));
                Datum::Text(digits.collect::<String>().into())
            }
            Self::Whole => Datum::Text(encoded(std::slice::from_ref(&certificate.der)).into()),
            Self::From(format) => time(format, certificate.not_before),
            Self::Until(format) => time(format, certificate.not_after),
        }
    }
}
