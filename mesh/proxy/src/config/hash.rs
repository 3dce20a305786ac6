//! Hash policies: which part of a request decides the endpoint, for consistent hashing balancers.
//!
//! What is hashed, and by what function, is Envoy's, so that proxies of both kinds send a request to the same endpoint.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderName, HeaderValue};
use regex::Regex;
use serin_xds::pb::envoy::config::route::v3 as route;

use super::convert;
use super::matchers::RequestView;
use super::route::{cookie, substitution};
use crate::error::{Refusal, Within};
use crate::policy::filter_state::FilterState;

/// One hash policy.
#[derive(Clone, Debug)]
pub struct HashPolicy {
    kind: Kind,
    terminal: bool,
}

#[derive(Clone, Debug)]
enum Kind {
    Header(HeaderName, Option<(Regex, Box<str>)>),
    /// With what follows the value of a cookie that is made where there is none.
    Cookie(Box<str>, Option<Box<str>>),
    SourceIp,
    Query(Box<str>),
    /// An object that may be hashed.
    State(Box<str>),
}

impl HashPolicy {
    /// Compiles the message.
    pub(crate) fn compile(from: &route::route_action::HashPolicy) -> Result<Self, Refusal> {
        use route::route_action::hash_policy::PolicySpecifier;
        let kind = match &from.policy_specifier {
            Some(PolicySpecifier::Header(header)) => Kind::Header(
                HeaderName::from_bytes(header.header_name.as_bytes())
                    .map_err(|_| Refusal::new("header.header_name", format!("{:?}", header.header_name)))?,
                header
                    .regex_rewrite
                    .as_ref()
                    .map(substitution)
                    .transpose()
                    .within("header.regex_rewrite")?,
            ),
            Some(PolicySpecifier::Cookie(cookie)) => {
                Kind::Cookie(cookie.name.as_str().into(), generated(cookie).within("cookie")?)
            }
            Some(PolicySpecifier::ConnectionProperties(properties)) if properties.source_ip => Kind::SourceIp,
            Some(PolicySpecifier::ConnectionProperties(_)) => {
                return Err(Refusal::new("connection_properties", "source_ip is not set"));
            }
            Some(PolicySpecifier::QueryParameter(query)) => Kind::Query(query.name.as_str().into()),
            Some(PolicySpecifier::FilterState(state)) if state.key.is_empty() => {
                return Err(Refusal::new("filter_state.key", "is missing"));
            }
            Some(PolicySpecifier::FilterState(state)) => Kind::State(state.key.as_str().into()),
            None => return Err(Refusal::new("policy_specifier", "is missing")),
        };
        Ok(Self {
            kind,
            terminal: from.terminal,
        })
    }

    /// What it makes of the request, and the cookie that the client is told to send from now on.
    fn value(
        &self,
        request: &RequestView<'_>,
        client: SocketAddr,
        local: SocketAddr,
        state: &FilterState,
    ) -> Option<(u64, Option<HeaderValue>)> {
        let plain = |hash| Some((hash, None));
        match &self.kind {
            Kind::Header(name, rewrite) => plain(hash_of_values(request, name, rewrite.as_ref())?),
            Kind::Cookie(name, made) => {
                if let Some(value) = cookie(request.headers, name).filter(|value| !value.is_empty()) {
                    return plain(xxh64(value.as_bytes(), 0));
                }
                let suffix = made.as_ref()?;
                // Of the connection: requests that race on it are given the same cookie (Envoy's rule).
                let value = format!("{:016x}", xxh64(format!("{client}{local}").as_bytes(), 0));
                let hash = xxh64(value.as_bytes(), 0);
                let header = HeaderValue::try_from(format!("{name}=\"{value}\"{suffix}")).ok()?;
                Some((hash, Some(header)))
            }
            Kind::SourceIp => plain(hash_of_source(client.ip())),
            Kind::State(key) => plain(xxh64(state.hashable(key)?.as_bytes(), 0)),
            Kind::Query(name) => request.query?.split('&').find_map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                (key == &**name).then(|| (xxh64(value.as_bytes(), 0), None))
            }),
        }
    }
}

/// Of all values of a field, in their own order and not in that of the request.
fn hash_of_values(
    request: &RequestView<'_>,
    name: &HeaderName,
    rewrite: Option<&(Regex, Box<str>)>,
) -> Option<u64> {
    let mut values = request.headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let first = values.next()?;
    let Some((regex, with)) = rewrite else {
        let Some(second) = values.next() else {
            return Some(xxh64(first, 0));
        };
        let mut all: Vec<&[u8]> = [first, second].into_iter().chain(values).collect();
        all.sort_unstable();
        return Some(all.iter().fold(0, |seed, value| xxh64(value, seed)));
    };
    let mut all: Vec<String> = std::iter::once(first)
        .chain(values)
        .map(|value| {
            regex
                .replace_all(&String::from_utf8_lossy(value), &**with)
                .into_owned()
        })
        .collect();
    all.sort_unstable();
    Some(all.iter().fold(0, |seed, value| xxh64(value.as_bytes(), seed)))
}

/// What follows the value of a cookie that the proxy makes; `None` if it makes none.
fn generated(from: &route::route_action::hash_policy::Cookie) -> Result<Option<Box<str>>, Refusal> {
    let Some(ttl) = &from.ttl else {
        return Ok(None);
    };
    let token = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    let clean = |text: &str| {
        text.bytes()
            .all(|byte| (0x20..0x7f).contains(&byte) && byte != b';')
    };
    if !token(&from.name) || from.name.contains(['=', ';', '"', ',']) {
        return Err(Refusal::new(
            "name",
            format!("{:?} cannot be a cookie", from.name),
        ));
    }
    let ttl = convert::duration(ttl).within("ttl")?.as_secs();
    let mut out = String::new();
    // Zero: for as long as the browser runs.
    if ttl > 0 {
        out.push_str(&format!("; Max-Age={ttl}"));
    }
    if !from.path.is_empty() {
        if !clean(&from.path) {
            return Err(Refusal::new("path", format!("{:?} cannot be a path", from.path)));
        }
        out.push_str(&format!("; Path={}", from.path));
    }
    for (index, attribute) in from.attributes.iter().enumerate() {
        if !token(&attribute.name) || !clean(&attribute.name) || !clean(&attribute.value) {
            return Err(Refusal::new(
                format!("attributes[{index}]"),
                "is not an attribute of a cookie",
            ));
        }
        out.push_str("; ");
        out.push_str(&attribute.name);
        if !attribute.value.is_empty() {
            out.push('=');
            out.push_str(&attribute.value);
        }
    }
    out.push_str("; HttpOnly");
    Ok(Some(out.into()))
}

/// What hash policies make of a request.
#[derive(Debug, Default)]
pub struct Hashed {
    /// `None` if no policy applies.
    pub hash: Option<u64>,
    /// Cookies that the client is given.
    pub cookies: Vec<HeaderValue>,
}

/// The hash of a request of `client` on a connection to `local`, by a list of policies.
pub fn request_hash(
    policies: &[HashPolicy],
    request: &RequestView<'_>,
    client: SocketAddr,
    local: SocketAddr,
    state: &FilterState,
) -> Hashed {
    let mut out = Hashed::default();
    for policy in policies {
        if let Some((value, cookie)) = policy.value(request, client, local, state) {
            out.hash = Some(
                out.hash
                    .map_or(value, |before: u64| before.rotate_left(1) ^ value),
            );
            out.cookies.extend(cookie);
        }
        // Also where it is an earlier policy that has found something (Envoy).
        if policy.terminal && out.hash.is_some() {
            break;
        }
    }
    out
}

/// The hash of a client's address, which is that of its text.
pub fn hash_of_source(source: IpAddr) -> u64 {
    xxh64(source.to_canonical().to_string().as_bytes(), 0)
}

/// XXH64 (Collet), Envoy's hash.
pub fn xxh64(bytes: &[u8], seed: u64) -> u64 {
    twox_hash::XxHash64::oneshot(seed, bytes)
}

/// MurmurHash64A (Appleby) with the seed of libstdc++'s `std::hash`, which is what Envoy calls `MURMUR_HASH_2`.
pub fn murmur_hash_2(bytes: &[u8]) -> u64 {
    const SEED: u64 = 0xc70f_6907;
    const MULTIPLIER: u64 = 0xc6a4_a793_5bd1_e995;
    let mut hash = SEED ^ (bytes.len() as u64).wrapping_mul(MULTIPLIER);
    let (words, rest) = bytes.as_chunks::<8>();
    let mix = |value: u64| value ^ (value >> 47);
    for word in words {
        let word = u64::from_le_bytes(*word).wrapping_mul(MULTIPLIER);
        hash = (hash ^ mix(word).wrapping_mul(MULTIPLIER)).wrapping_mul(MULTIPLIER);
    }
    if !rest.is_empty() {
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        hash = (hash ^ u64::from_le_bytes(last)).wrapping_mul(MULTIPLIER);
    }
    mix(mix(hash).wrapping_mul(MULTIPLIER))
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::google::protobuf as google;

    use super::*;

    #[test]
    fn a_cookie_is_made_once_and_hashes_as_it_will_when_it_comes_back() {
        use route::route_action::hash_policy as pb;
        let policy = HashPolicy::compile(&route::route_action::HashPolicy {
            policy_specifier: Some(pb::PolicySpecifier::Cookie(pb::Cookie {
                name: "sticky".into(),
                ttl: Some(google::Duration {
                    seconds: 60,
                    nanos: 0,
                }),
                path: "/shop".into(),
                attributes: vec![pb::CookieAttribute {
                    name: "SameSite".into(),
                    value: "Lax".into(),
                }],
            })),
            terminal: false,
        })
        .unwrap();
        let (client, local) = ("10.0.0.1:7".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        let hash = |headers: &http::HeaderMap| {
            let view = RequestView {
                method: "GET",
                path: "/",
                query: None,
                authority: Some("a"),
                scheme: Some("http"),
                headers,
            };
            request_hash(
                std::slice::from_ref(&policy),
                &view,
                client,
                local,
                &FilterState::EMPTY,
            )
        };
        let first = hash(&http::HeaderMap::new());
        let text = first.cookies[0].to_str().unwrap().to_owned();
        assert!(text.starts_with("sticky=\""), "{text}");
        assert!(
            text.ends_with("; Max-Age=60; Path=/shop; SameSite=Lax; HttpOnly"),
            "{text}"
        );
        let mut headers = http::HeaderMap::new();
        let pair = text.split(';').next().unwrap();
        headers.insert(http::header::COOKIE, format!("a=b; {pair}").parse().unwrap());
        let second = hash(&headers);
        assert_eq!(first.hash, second.hash);
        assert!(second.cookies.is_empty());
    }
}
