//! Where tokens are in a request: header fields, query parameters, cookies.
//!
//! Every place is looked at in Envoy's order, which decides whose failure is told: fields by name and prefix, parameters by
//! name, cookies by name; tokens are judged from the last to the first. Of parameters and cookies of one name Envoy looks at
//! the first alone; here it comes last, so that it is judged first, and the others are judged as well, since an endpoint may
//! take any of them. The limits of a request's head bound how many there are.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use serin_xds::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;

use super::provider::header_name;
use crate::config::matchers::percent_decoded;
use crate::error::{Refusal, Within};

/// A token found in a request.
#[derive(Debug)]
pub struct Found<'a> {
    /// Its text.
    pub text: String,
    /// Where it was.
    pub place: Place<'a>,
    /// Indices of the providers that look for tokens there.
    pub owners: &'a [usize],
}

/// Where a token was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// In that field.
    Header(&'a HeaderName),
    /// In that query parameter.
    Parameter(&'a str),
    /// In some cookie.
    Cookie,
}

/// The places of a provider (`from_headers`, `from_params`, `from_cookies`), or of several.
#[derive(Debug)]
pub struct Places {
    headers: Box<[Field]>,
    parameters: Box<[(Box<str>, Box<[usize]>)]>,
    cookies: Box<[(Box<str>, Box<[usize]>)]>,
}

/// A field that holds tokens.
#[derive(Debug)]
struct Field {
    name: HeaderName,
    /// What comes before the token.
    prefix: Box<str>,
    owners: Box<[usize]>,
}

impl Places {
    /// Of these providers. Where one names none, tokens are where OAuth has them: `authorization: Bearer` and `access_token`.
    pub(super) fn compile<'p>(
        providers: impl Iterator<Item = (usize, &'p jwt::JwtProvider)>,
    ) -> Result<Self, Refusal> {
        let mut headers: BTreeMap<String, (HeaderName, &str, Vec<usize>)> = BTreeMap::new();
        let (mut parameters, mut cookies) = (BTreeMap::new(), BTreeMap::new());
        for (index, from) in providers {
            let mut field = |name: HeaderName, prefix: &'p str| {
                let key = format!("{name}{prefix}");
                let (_, _, owners) = headers.entry(key).or_insert_with(|| (name, prefix, Vec::new()));
                owners.push(index);
            };
            let mut default = None;
            if from.from_headers.is_empty() && from.from_params.is_empty() && from.from_cookies.is_empty() {
                field(header::AUTHORIZATION, "Bearer ");
                default = Some("access_token");
            }
            for one in &from.from_headers {
                field(header_name(&one.name).within("from_headers")?, &one.value_prefix);
            }
            let named = from.from_params.iter().map(String::as_str);
            add(&mut parameters, index, named.chain(default));
            add(&mut cookies, index, from.from_cookies.iter().map(String::as_str));
        }
        Ok(Self {
            headers: headers
                .into_values()
                .map(|(name, prefix, owners)| Field {
                    name,
                    prefix: prefix.into(),
                    owners: owners.into(),
                })
                .collect(),
            parameters: boxed(parameters),
            cookies: boxed(cookies),
        })
    }

    /// The tokens that a request brings.
    pub fn find(&self, headers: &HeaderMap, query: Option<&str>) -> Vec<Found<'_>> {
        let mut out = Vec::new();
        for field in &self.headers {
            field.find(headers, &mut out);
        }
        for (parameter, owners) in &self.parameters {
            let pairs = query.into_iter().flat_map(|query| query.rsplit('&'));
            for (name, value) in pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))) {
                if percent_decoded(name) == **parameter {
                    out.push(Found {
                        text: percent_decoded(value).into_owned(),
                        place: Place::Parameter(parameter),
                        owners,
                    });
                }
            }
        }
        for (cookie, owners) in &self.cookies {
            let all = headers.get_all(header::COOKIE).iter().rev();
            let pairs = all
                .filter_map(|value| value.to_str().ok())
                .flat_map(|text| text.rsplit(';'))
                .filter_map(|pair| pair.trim().split_once('='));
            for (_, value) in pairs.filter(|(name, _)| *name == &**cookie) {
                out.push(Found {
                    text: value.trim_matches('"').to_owned(),
                    place: Place::Cookie,
                    owners,
                });
            }
        }
        out
    }
}

/// Adds names that provider `index` looks for.
fn add<'p>(to: &mut BTreeMap<&'p str, Vec<usize>>, index: usize, names: impl Iterator<Item = &'p str>) {
    for name in names {
        to.entry(name).or_default().push(index);
    }
}

fn boxed(from: BTreeMap<&str, Vec<usize>>) -> Box<[(Box<str>, Box<[usize]>)]> {
    let names = from.into_iter();
    names.map(|(name, owners)| (name.into(), owners.into())).collect()
}

impl Field {
    fn find<'a>(&'a self, headers: &HeaderMap, out: &mut Vec<Found<'a>>) {
        let mut add = |value: &str| {
            if let Some(text) = self.token(value) {
                out.push(Found {
                    text: text.to_owned(),
                    place: Place::Header(&self.name),
                    owners: &self.owners,
                });
            }
        };
        let mut values = headers
            .get_all(&self.name)
            .iter()
            .map(HeaderValue::as_bytes)
            .map(String::from_utf8_lossy);
        if self.name != header::AUTHORIZATION {
            values.for_each(|value| add(&value));
            return;
        }
        // It is one field: two of them are read as one value (Envoy), which is no token.
        let Some(first) = values.next() else { return };
        let all = values.fold(first, |all, value| all + "," + value);
        add(&all);
    }

    /// What follows the prefix, from the first character that a token may have; all of it, since a part of what the client
    /// sent is not what the client sent.
    fn token<'v>(&self, value: &'v str) -> Option<&'v str> {
        if self.prefix.is_empty() {
            return Some(value);
        }
        let at = value.find(&*self.prefix)?;
        let rest = &value[at + self.prefix.len()..];
        let begins = |char: char| char.is_ascii_alphanumeric() || matches!(char, '-' | '_' | '.');
        Some(rest.find(begins).map_or(value, |start| &rest[start..]))
    }
}

impl Place<'_> {
    /// Takes the token out of the request. A new query is returned if it was in that.
    pub(super) fn take_out(self, headers: &mut HeaderMap, query: Option<&str>) -> Option<String> {
        match self {
            Place::Header(name) => {
                headers.remove(name);
                None
            }
            Place::Parameter(name) => query.map(|query| {
                let kept: Vec<&str> = query
                    .split('&')
                    .filter(|pair| {
                        let key = pair.split_once('=').map_or(*pair, |(key, _)| key);
                        percent_decoded(key) != *name
                    })
                    .collect();
                kept.join("&")
            }),
            // As in Envoy: the other cookies of the field stay, and with them this one.
            Place::Cookie => None,
        }
    }
}
