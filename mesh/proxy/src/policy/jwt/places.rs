//! Where tokens are in a request: header fields, query parameters, cookies.

use http::{HeaderMap, HeaderName, header};
use serin_xds::pb::envoy::extensions::filters::http::jwt_authn::v3 as jwt;

use super::provider::{header_name, texts};
use crate::error::{Refusal, Within};

/// Tokens that one request may bring for a provider.
const MAX_TOKENS: usize = 8;

/// A token found in a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its text.
    pub text: String,
    /// Where it was.
    pub place: Place,
}

/// Where a token was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In that field.
    Header(HeaderName),
    /// In that query parameter.
    Parameter(Box<str>),
    /// In that cookie.
    Cookie,
}

/// The places of a provider (`from_headers`, `from_params`, `from_cookies`).
#[derive(Debug)]
pub(super) struct Places {
    /// Fields, and what comes before the token in each.
    headers: Box<[(HeaderName, Box<str>)]>,
    parameters: Box<[Box<str>]>,
    cookies: Box<[Box<str>]>,
}

impl Places {
    /// Where a provider names none, tokens are where OAuth has them: `authorization: Bearer` and `access_token`.
    pub(super) fn compile(from: &jwt::JwtProvider) -> Result<Self, Refusal> {
        let mut headers: Vec<(HeaderName, Box<str>)> = from
            .from_headers
            .iter()
            .map(|header| {
                Ok((
                    header_name(&header.name).within("from_headers")?,
                    header.value_prefix.as_str().into(),
                ))
            })
            .collect::<Result<_, Refusal>>()?;
        let mut parameters = texts(&from.from_params);
        let cookies = texts(&from.from_cookies);
        if headers.is_empty() && parameters.is_empty() && cookies.is_empty() {
            headers.push((header::AUTHORIZATION, "Bearer ".into()));
            parameters = Box::new(["access_token".into()]);
        }
        Ok(Self {
            headers: headers.into(),
            parameters,
            cookies,
        })
    }

    /// The tokens that a request brings.
    pub(super) fn find(&self, headers: &HeaderMap, query: Option<&str>) -> Vec<Found> {
        let mut out = Vec::new();
        for (name, prefix) in &self.headers {
            for value in headers.get_all(name) {
                let Ok(text) = value.to_str() else { continue };
                let token = match text.find(&**prefix) {
                    _ if prefix.is_empty() => text.trim(),
                    Some(at) => {
                        let rest = text[at + prefix.len()..].trim_start();
                        let end = rest
                            .find(|char: char| !(char.is_ascii_alphanumeric() || "-_.=".contains(char)))
                            .unwrap_or(rest.len());
                        &rest[..end]
                    }
                    None => continue,
                };
                if !token.is_empty() {
                    out.push(Found {
                        text: token.to_owned(),
                        place: Place::Header(name.clone()),
                    });
                }
            }
        }
        for (name, value) in query.into_iter().flat_map(pairs) {
            if self.parameters.iter().any(|parameter| **parameter == *name) && !value.is_empty() {
                out.push(Found {
                    text: value.to_owned(),
                    place: Place::Parameter(name.into()),
                });
            }
        }
        if !self.cookies.is_empty() {
            let all = headers
                .get_all(header::COOKIE)
                .iter()
                .filter_map(|value| value.to_str().ok());
            for (name, value) in all
                .flat_map(|text| text.split(';'))
                .filter_map(|pair| pair.trim().split_once('='))
            {
                if self.cookies.iter().any(|cookie| **cookie == *name) {
                    out.push(Found {
                        text: value.trim_matches('"').to_owned(),
                        place: Place::Cookie,
                    });
                }
            }
        }
        out.truncate(MAX_TOKENS);
        out
    }
}

impl Place {
    /// Takes the token out of the request. A new query is returned if it was in that.
    pub(super) fn take_out(&self, headers: &mut HeaderMap, query: Option<&str>) -> Option<String> {
        match self {
            Place::Header(name) => {
                headers.remove(name);
                None
            }
            Place::Parameter(name) => query.map(|query| {
                let kept: Vec<&str> = query
                    .split('&')
                    .filter(|pair| pair.split_once('=').map_or(*pair, |(key, _)| key) != &**name)
                    .collect();
                kept.join("&")
            }),
            // As in Envoy: the other cookies of the field stay, and with them this one.
            Place::Cookie => None,
        }
    }
}

fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').filter_map(|pair| pair.split_once('='))
}
