//! The header mutation filter: ordered changes of the fields and trailers of requests and responses, and of the query.

mod query;

use std::sync::Arc;

use http::{HeaderMap, HeaderName, Uri};
use serin_xds::pb::envoy::config::common::mutation_rules::v3 as rules;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::http::header_mutation::v3 as filter;
use serin_xds::pb::envoy::extensions::http::early_header_mutation::header_mutation::v3 as early;

use self::query::QueryChanges;
use crate::config::convert::{required, unpack};
use crate::config::headers::{HeaderOps, Scene, Values};
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};

const EARLY: &str = "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation";

/// Compiled `Mutations`.
#[derive(Debug, Default)]
pub struct HeaderMutation {
    request: Box<[Change]>,
    query: QueryChanges,
    request_trailers: Box<[Change]>,
    response: Box<[Change]>,
    response_trailers: Box<[Change]>,
    /// `most_specific_header_mutations_wins`: the order in which levels are applied.
    pub most_specific_wins: bool,
}

#[derive(Debug)]
enum Change {
    Ops(HeaderOps),
    RemoveMatching(StringMatch),
}

impl HeaderMutation {
    /// Compiles the filter's own message.
    pub(crate) fn compile(from: &filter::HeaderMutation) -> Result<Self, Refusal> {
        let mut out = match &from.mutations {
            None => Self::default(),
            Some(mutations) => Self::compile_mutations(mutations).within("mutations")?,
        };
        out.most_specific_wins = from.most_specific_header_mutations_wins;
        Ok(out)
    }

    /// Compiles what a route says.
    pub(crate) fn compile_mutations(from: &filter::Mutations) -> Result<Self, Refusal> {
        Ok(Self {
            request: changes("request_mutations", &from.request_mutations, false)?,
            query: QueryChanges::compile(&from.query_parameter_mutations)?,
            request_trailers: changes(
                "request_trailers_mutations",
                &from.request_trailers_mutations,
                false,
            )?,
            response: changes("response_mutations", &from.response_mutations, true)?,
            response_trailers: changes(
                "response_trailers_mutations",
                &from.response_trailers_mutations,
                true,
            )?,
            most_specific_wins: false,
        })
    }

    /// Compiles an extension of `early_header_mutation_extensions`.
    pub(crate) fn compile_early(from: &core::TypedExtensionConfig) -> Result<Self, Refusal> {
        let any = required(from.typed_config.as_ref(), "typed_config")?;
        if any.type_url.rsplit('/').next() != Some(EARLY) {
            let reason = format!("{} is not supported", any.type_url);
            return Err(Refusal::new("typed_config", reason));
        }
        let message: early::HeaderMutation = unpack(any, EARLY)?;
        // Who asks whom is known by then.
        let of_host = |mutation: &rules::HeaderMutation| match &mutation.action {
            Some(rules::header_mutation::Action::Append(option)) => option
                .header
                .as_ref()
                .is_some_and(|header| header.key.starts_with(':') || header.key.eq_ignore_ascii_case("host")),
            _ => false,
        };
        if let Some(index) = message.mutations.iter().position(of_host) {
            return Err(Refusal::new(
                format!("typed_config.mutations[{index}]"),
                "the host and what begins with a colon cannot be changed",
            ));
        }
        Ok(Self {
            request: changes("mutations", &message.mutations, false).within("typed_config")?,
            ..Self::default()
        })
    }

    /// Changes a request.
    pub fn request(&self, headers: &mut HeaderMap, scene: &dyn Scene) {
        for change in &self.request {
            change.apply(headers, scene);
        }
    }

    /// The target of a request, where its query is changed.
    pub fn target(&self, uri: &Uri, headers: &HeaderMap, scene: &dyn Scene) -> Option<Uri> {
        self.query.changed(uri, headers, scene)
    }

    /// What is to be done to the trailers of a request whose fields are `headers`.
    pub(crate) fn request_trailers(
        self: &Arc<Self>,
        headers: &HeaderMap,
        scene: &dyn Scene,
    ) -> Option<TrailerChanges> {
        if self.request_trailers.is_empty() {
            return None;
        }
        let values = self.request_trailers.iter().map(|change| match change {
            Change::Ops(ops) => Some(ops.values(headers, scene)),
            Change::RemoveMatching(_) => None,
        });
        Some(TrailerChanges {
            values: values.collect(),
            of: self.clone(),
        })
    }

    /// Whether responses are left alone.
    pub fn spares_responses(&self) -> bool {
        self.response.is_empty() && self.response_trailers.is_empty()
    }

    /// Whether trailers of responses are changed, by values that name fields of responses.
    pub fn trailers_name_the_head(&self) -> bool {
        self.response_trailers.iter().any(|change| match change {
            Change::Ops(ops) => ops.looks_at_responses(),
            Change::RemoveMatching(_) => false,
        })
    }

    /// Changes a response.
    pub fn response(&self, headers: &mut HeaderMap, scene: &dyn Scene) {
        for change in &self.response {
            change.apply(headers, scene);
        }
    }

    /// Changes the trailers of a response.
    pub fn response_trailers(&self, trailers: &mut HeaderMap, scene: &dyn Scene) {
        for change in &self.response_trailers {
            change.apply(trailers, scene);
        }
    }
}

/// What is done to the trailers of a request once they come. Values are those of when its head came: who reads its body
/// knows nothing else of it.
#[derive(Debug)]
pub struct TrailerChanges {
    of: Arc<HeaderMutation>,
    /// Of each change that adds fields.
    values: Box<[Option<Values>]>,
}

impl TrailerChanges {
    /// Changes the trailers.
    pub fn apply(&self, trailers: &mut HeaderMap) {
        for (change, values) in self.of.request_trailers.iter().zip(&self.values) {
            match (change, values) {
                (Change::Ops(ops), Some(values)) => ops.apply_values(trailers, values),
                (Change::Ops(_), None) => {}
                (Change::RemoveMatching(test), _) => remove_matching(trailers, test),
            }
        }
    }
}

fn changes(
    field: &str,
    from: &[rules::HeaderMutation],
    of_responses: bool,
) -> Result<Box<[Change]>, Refusal> {
    use rules::header_mutation::Action;
    from.iter()
        .enumerate()
        .map(|(index, mutation)| {
            let path = format!("{field}[{index}]");
            match &mutation.action {
                None => Err(Refusal::new(path, "action is missing")),
                Some(Action::Remove(name)) => {
                    HeaderOps::compile(&[], std::slice::from_ref(name), of_responses)
                        .map(Change::Ops)
                        .within(path)
                }
                Some(Action::Append(option)) => {
                    HeaderOps::compile(std::slice::from_ref(option), &[], of_responses)
                        .map(Change::Ops)
                        .within(path)
                }
                Some(Action::RemoveOnMatch(on)) => {
                    let matcher = on
                        .key_matcher
                        .as_ref()
                        .ok_or_else(|| Refusal::new(path.clone(), "key_matcher is missing"))?;
                    StringMatch::compile(matcher)
                        .map(Change::RemoveMatching)
                        .within(format!("{path}.remove_on_match.key_matcher"))
                }
            }
        })
        .collect()
}

impl Change {
    fn apply(&self, headers: &mut HeaderMap, scene: &dyn Scene) {
        match self {
            Self::Ops(ops) => ops.apply(headers, scene),
            Self::RemoveMatching(test) => remove_matching(headers, test),
        }
    }
}

fn remove_matching(headers: &mut HeaderMap, test: &StringMatch) {
    let names: Vec<HeaderName> = headers
        .keys()
        .filter(|name| *name != http::header::HOST && test.matches(name.as_str()))
        .cloned()
        .collect();
    for name in names {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;

    use super::*;

    #[test]
    fn changes_are_applied_in_their_order() {
        use rules::header_mutation::{Action, RemoveOnMatch};
        let mutation = |action| rules::HeaderMutation { action: Some(action) };
        let add = |key: &str, value: &str| {
            mutation(Action::Append(core::HeaderValueOption {
                header: Some(core::HeaderValue {
                    key: key.into(),
                    value: value.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }))
        };
        let compiled = HeaderMutation::compile_mutations(&filter::Mutations {
            request_mutations: vec![
                add("x-a", "new"),
                mutation(Action::RemoveOnMatch(RemoveOnMatch {
                    key_matcher: Some(matcher::StringMatcher {
                        match_pattern: Some(matcher::string_matcher::MatchPattern::Prefix("x-".into())),
                        ..Default::default()
                    }),
                })),
                add("x-b", "kept"),
                mutation(Action::Remove("y".into())),
            ],
            ..Default::default()
        })
        .unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("y", "1".parse().unwrap());
        headers.insert("z", "1".parse().unwrap());
        compiled.request(&mut headers, &crate::config::headers::Nothing);
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["x-b", "z"]);
    }
}
