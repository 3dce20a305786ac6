//! `istio.alpn`: which protocols TLS connections to endpoints offer, by the HTTP version that will be spoken.
//!
//! Sidecars of a mesh tell each other by these names that the connection is between proxies
//! (`istio-peer-exchange`, `istio-http/1.1`, `istio-h2`), so that a server's filter chains can tell a peer from a
//! client that brings its own TLS.

use std::sync::Arc;

use http::Version;
use serin_xds::pb::google::protobuf as google;

use crate::error::Refusal;
use crate::upstream::connect::Speaking;

/// Names of protocols in the order of preference.
pub type Alpn = Arc<[Vec<u8>]>;

/// `istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig`, which is not in Envoy's protobuf set.
#[derive(Clone, PartialEq, prost::Message)]
struct FilterConfig {
    #[prost(message, repeated, tag = "1")]
    alpn_override: Vec<AlpnOverride>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AlpnOverride {
    #[prost(int32, tag = "1")]
    upstream_protocol: i32,
    #[prost(string, repeated, tag = "2")]
    alpn_override: Vec<String>,
}

/// The compiled filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AlpnOverrides {
    http10: Option<Alpn>,
    http11: Option<Alpn>,
    http2: Option<Alpn>,
    /// Where ALPN decides: those of HTTP/2, then those of HTTP/1.1.
    either: Option<Alpn>,
}

impl AlpnOverrides {
    /// Compiles the filter's configuration.
    pub(crate) fn compile(any: Option<&google::Any>) -> Result<Self, Refusal> {
        let Some(any) = any else {
            return Ok(Self::default());
        };
        let from = <FilterConfig as prost::Message>::decode(any.value.as_slice())
            .map_err(|error| Refusal::new("typed_config", format!("istio.alpn: {error}")))?;
        let mut out = Self::default();
        for (index, entry) in from.alpn_override.iter().enumerate() {
            let bad = |name: &&String| name.is_empty() || name.len() > 255;
            if let Some(name) = entry.alpn_override.iter().find(bad) {
                return Err(Refusal::new(
                    format!("typed_config.alpn_override[{index}]"),
                    format!("{name:?} is not the name of a protocol"),
                ));
            }
            let names: Alpn = entry
                .alpn_override
                .iter()
                .map(|name| name.as_bytes().to_vec())
                .collect();
            let names = (!names.is_empty()).then_some(names);
            match entry.upstream_protocol {
                0 => out.http10 = names,
                1 => out.http11 = names,
                2 => out.http2 = names,
                other => {
                    return Err(Refusal::new(
                        format!("typed_config.alpn_override[{index}].upstream_protocol"),
                        format!("{other} is unknown"),
                    ));
                }
            }
        }
        let both: Vec<_> = out
            .http2
            .iter()
            .chain(&out.http11)
            .flat_map(|names| names.iter().cloned())
            .collect();
        out.either = (!both.is_empty()).then(|| both.into());
        Ok(out)
    }

    /// What is offered for a request that came in `version` and will be spoken so.
    pub fn offer(&self, speaking: Speaking, version: Version) -> Option<&Alpn> {
        match speaking {
            Speaking::Bytes => None,
            Speaking::Http1 if version == Version::HTTP_10 => self.http10.as_ref(),
            Speaking::Http1 => self.http11.as_ref(),
            Speaking::Http2 => self.http2.as_ref(),
            Speaking::Either => self.either.as_ref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn any(entries: &[(i32, &[&str])]) -> google::Any {
        let config = FilterConfig {
            alpn_override: entries
                .iter()
                .map(|(protocol, names)| AlpnOverride {
                    upstream_protocol: *protocol,
                    alpn_override: names.iter().map(|name| (*name).to_owned()).collect(),
                })
                .collect(),
        };
        google::Any {
            type_url: "type.googleapis.com/istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig".into(),
            value: config.encode_to_vec(),
        }
    }

    #[test]
    fn what_is_offered_follows_the_version_that_will_be_spoken() {
        let message = any(&[
            (0, &["istio-http/1.0", "istio"]),
            (1, &["istio-http/1.1", "istio"]),
            (2, &["istio-h2", "istio"]),
        ]);
        let compiled = AlpnOverrides::compile(Some(&message)).unwrap();
        let first = |speaking, version| {
            compiled
                .offer(speaking, version)
                .map(|names| String::from_utf8(names[0].clone()).unwrap())
        };
        assert_eq!(
            first(Speaking::Http1, Version::HTTP_10).unwrap(),
            "istio-http/1.0"
        );
        assert_eq!(first(Speaking::Http1, Version::HTTP_2).unwrap(), "istio-http/1.1");
        assert_eq!(first(Speaking::Http2, Version::HTTP_11).unwrap(), "istio-h2");
        assert_eq!(
            compiled.offer(Speaking::Either, Version::HTTP_11).unwrap().len(),
            4
        );
        assert_eq!(first(Speaking::Bytes, Version::HTTP_11), None);
        let unknown = AlpnOverrides::compile(Some(&any(&[(7, &["x"])]))).unwrap_err();
        assert_eq!(unknown.path, "typed_config.alpn_override[0].upstream_protocol");
    }
}
