//! Path templates: routes that match them, and rewrites that put their variables elsewhere.

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::path;

use crate::config::convert;
use crate::error::{Refusal, Within};
use crate::policy::uri_template::UriTemplate;

const MATCH: &str = "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig";
const REWRITE: &str = "envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig";

/// Compiles `path_match_policy`.
pub(super) fn compile_match(from: &core::TypedExtensionConfig) -> Result<UriTemplate, Refusal> {
    let any = from
        .typed_config
        .as_ref()
        .ok_or_else(|| Refusal::new("typed_config", "is missing"))?;
    let config: path::r#match::uri_template::v3::UriTemplateMatchConfig = convert::unpack(any, MATCH)?;
    UriTemplate::compile(&config.path_template).within("typed_config")
}

/// A path made of the variables of the template that matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateRewrite(Box<[Part]>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    Variable(Box<str>),
}

impl TemplateRewrite {
    /// Compiles `path_rewrite_policy`, for a route that matches `template`.
    pub(super) fn compile(
        from: &core::TypedExtensionConfig,
        template: Option<&UriTemplate>,
    ) -> Result<Self, Refusal> {
        let any = from
            .typed_config
            .as_ref()
            .ok_or_else(|| Refusal::new("typed_config", "is missing"))?;
        let config: path::rewrite::uri_template::v3::UriTemplateRewriteConfig =
            convert::unpack(any, REWRITE)?;
        let template = template.ok_or_else(|| {
            Refusal::new(
                "",
                "a template can only be rewritten where path_match_policy matches one",
            )
        })?;
        let out = Self::parse(&config.path_template_rewrite).within("typed_config")?;
        for part in &out.0 {
            if let Part::Variable(name) = part
                && !template.has(name)
            {
                return Err(Refusal::new(
                    "typed_config.path_template_rewrite",
                    format!("the template has no variable {name:?}"),
                ));
            }
        }
        Ok(out)
    }

    fn parse(text: &str) -> Result<Self, Refusal> {
        let wrong = |reason: &str| Refusal::new("path_template_rewrite", format!("{text:?}: {reason}"));
        if !text.starts_with('/') {
            return Err(wrong("must begin with /"));
        }
        if text.contains("//") {
            return Err(wrong("has an empty segment"));
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (name, after) = after
                .split_once('}')
                .ok_or_else(|| wrong("a variable is not closed"))?;
            if before.contains('}') || name.is_empty() || name.contains('{') {
                return Err(wrong("braces must hold the name of a variable"));
            }
            if !before.is_empty() {
                parts.push(Part::Text(before.into()));
            }
            parts.push(Part::Variable(name.into()));
            rest = after;
        }
        if rest.contains('}') {
            return Err(wrong("braces must hold the name of a variable"));
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.into()));
        }
        Ok(Self(parts.into()))
    }

    /// The new path; `None` if `path` does not match after all.
    pub(super) fn apply(&self, template: &UriTemplate, path: &str) -> Option<String> {
        let found = template.captures(path)?;
        let mut out = String::with_capacity(path.len() + 16);
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Variable(name) => out.push_str(found.get(name)?),
            }
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_a_template_are_put_where_the_rewrite_says() {
        let template = UriTemplate::compile("/content/{format}/{lang}/{file=**}").unwrap();
        let rewrite = TemplateRewrite::parse("/{lang}/{format}/v1/{file}").unwrap();
        assert_eq!(
            rewrite.apply(&template, "/content/hls/en-us/a/b.ts").unwrap(),
            "/en-us/hls/v1/a/b.ts"
        );
        assert_eq!(rewrite.apply(&template, "/other"), None);
        for wrong in ["{lang}", "/a//b", "/{lang", "/lang}", "/{}", "/{a{b}}"] {
            assert!(TemplateRewrite::parse(wrong).is_err(), "{wrong}");
        }
    }
}
