//! The header mutation filter: ordered changes of request and response fields.

use http::{HeaderMap, HeaderName};
use serin_xds::pb::envoy::config::common::mutation_rules::v3 as rules;
use serin_xds::pb::envoy::extensions::filters::http::header_mutation::v3 as filter;

use crate::config::headers::{HeaderOps, Scene};
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};

/// Compiled `Mutations`.
#[derive(Debug, Default)]
pub struct HeaderMutation {
    request: Box<[Change]>,
    response: Box<[Change]>,
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
        if !from.query_parameter_mutations.is_empty() {
            return Err(Refusal::new("query_parameter_mutations", "not supported"));
        }
        if !from.response_trailers_mutations.is_empty() || !from.request_trailers_mutations.is_empty() {
            return Err(Refusal::new(
                "response_trailers_mutations",
                "mutations of trailers are not supported",
            ));
        }
        Ok(Self {
            request: changes(&from.request_mutations, false)?,
            response: changes(&from.response_mutations, true)?,
            most_specific_wins: false,
        })
    }

    /// Changes a request.
    pub fn request(&self, headers: &mut HeaderMap, scene: &dyn Scene) {
        for change in &self.request {
            change.apply(headers, scene);
        }
    }

    /// Whether responses are left alone.
    pub fn spares_responses(&self) -> bool {
        self.response.is_empty()
    }

    /// Changes a response.
    pub fn response(&self, headers: &mut HeaderMap, scene: &dyn Scene) {
        for change in &self.response {
            change.apply(headers, scene);
        }
    }
}

fn changes(from: &[rules::HeaderMutation], of_responses: bool) -> Result<Box<[Change]>, Refusal> {
    use rules::header_mutation::Action;
    let field = if of_responses {
        "response_mutations"
    } else {
        "request_mutations"
    };
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
            Self::RemoveMatching(test) => {
                let names: Vec<HeaderName> = headers
                    .keys()
                    .filter(|name| *name != http::header::HOST && test.matches(name.as_str()))
                    .cloned()
                    .collect();
                for name in names {
                    headers.remove(name);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::envoy::config::core::v3 as core;
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
