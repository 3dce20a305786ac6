//! Queries are templates in Go's template language, with Flagger's functions.
//!
//! Functions: `name`, `namespace`, `target`, `service`, `ingress`, `route`, `interval`, `variables`. Of the language:
//! text, actions `{{ … }}` with trimming (`{{-`, `-}}`), comments, fields (`variables.x`; an unknown one is an error, as
//! with Flagger's `missingkey=error`), strings, raw strings, integers, booleans, parentheses, pipelines,
//! `if`/`else if`/`else`/`end`, and the functions `print`, `printf` (`%s %v %d %q %%`), `urlquery`, `index`, `len`, `eq`,
//! `ne`, `and`, `or`, `not`. Everything else of the language is refused by name: queries are short texts, not
//! programmes.

mod parse;
mod value;

use std::collections::BTreeMap;

use crate::Error;
use parse::{Node, parse};
use value::pipeline;

/// Longest template and longest query.
const LENGTH_MAX: usize = 256 * 1024;

/// What the functions yield.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// `name`: the Canary.
    pub name: String,
    /// `namespace`: its namespace.
    pub namespace: String,
    /// `target`: the workload that is rolled out.
    pub target: String,
    /// `service`: the apex Service.
    pub service: String,
    /// `ingress`: `ingressRef`, or the target.
    pub ingress: String,
    /// `route`: `routeRef`, or the target.
    pub route: String,
    /// `interval` of the metric, as in the spec.
    pub interval: String,
    /// `variables`: the metric's `templateVariables`.
    pub variables: BTreeMap<String, String>,
}

/// Renders a template.
pub fn render(template: &str, model: &Model) -> Result<String, Error> {
    if template.len() > LENGTH_MAX {
        return Err(Error::Query(format!("it is longer than {LENGTH_MAX} bytes")));
    }
    let nodes = parse(template)?;
    let mut out = String::with_capacity(template.len());
    write(&nodes, model, &mut out)?;
    Ok(out)
}

fn write(nodes: &[Node], model: &Model, out: &mut String) -> Result<(), Error> {
    for node in nodes {
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Action(action) => out.push_str(&pipeline(action, model)?.text()?),
            Node::If { branches, otherwise } => {
                let mut taken = otherwise;
                for (condition, body) in branches {
                    if pipeline(condition, model)?.is_true() {
                        taken = body;
                        break;
                    }
                }
                write(taken, model, out)?;
            }
        }
        if out.len() > LENGTH_MAX {
            return Err(Error::Query(format!("it becomes longer than {LENGTH_MAX} bytes")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn model() -> Model {
        Model {
            name: "podinfo".to_owned(),
            namespace: "test".to_owned(),
            target: "podinfo".to_owned(),
            service: "web".to_owned(),
            ingress: "podinfo".to_owned(),
            route: "podinfo".to_owned(),
            interval: "1m".to_owned(),
            variables: [("direction".to_owned(), "inbound".to_owned())].into(),
        }
    }

    #[test]
    fn templates_are_rendered_as_gos_template_language_does() {
        for (template, expected) in [
            ("plain", "plain"),
            (
                "{{ namespace }}/{{target}}-{{ service }}[{{ interval }}]",
                "test/podinfo-web[1m]",
            ),
            ("{{ variables.direction }}", "inbound"),
            (
                "{{ index variables \"direction\" }}{{ index variables `none` }}",
                "inbound",
            ),
            ("a  {{- name -}}  b", "apodinfob"),
            ("a {{/* {{ nothing }} */}}b", "a b"),
            ("a {{- /* c */ -}} b", "ab"),
            ("{{ \"a\\n\\\"b\" }}{{ `c\"` }}", "a\n\"bc\""),
            (
                "{{ printf \"%s-%d-%q-%v%%\" name 3 target true }}",
                "podinfo-3-\"podinfo\"-true%",
            ),
            ("{{ \"a b&c\" | urlquery }}", "a+b%26c"),
            ("{{ name | printf \"%s/%s\" namespace }}", "test/podinfo"),
            ("{{ if eq service \"web\" }}w{{ else }}o{{ end }}", "w"),
            (
                "{{ if ne service \"web\" }}w{{ else if variables.direction }}d{{ else }}o{{ end }}",
                "d",
            ),
            (
                "{{ if and (eq name \"x\") true }}1{{end}}{{ if or false (not false) }}2{{end}}",
                "2",
            ),
            (
                "{{ len name }} {{ print name 1 }} {{ eq name \"a\" \"podinfo\" }}",
                "7 podinfo1 true",
            ),
            ("}} { }", "}} { }"),
        ] {
            assert_eq!(render(template, &model()).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_place() {
        for (template, needle) in [
            ("{{ variables.absent }}", "absent"),
            ("{{ variables }}", "map"),
            ("a\n{{ pod }}", "line 2"),
            ("{{ range variables }}{{ end }}", "range"),
            ("{{ $x := name }}", "$"),
            ("{{ .Name }}", "."),
            ("{{ name", "closed"),
            ("{{ if name }}x", "end"),
            ("{{ end }}", "end"),
            ("{{ name.x }}", "x"),
            ("{{ \"a }}", "string"),
            ("{{ }}", "empty"),
            ("{{ printf \"%z\" name }}", "%z"),
            ("{{ name | }}", "empty"),
            ("{{ (name }}", ")"),
        ] {
            let error = render(template, &model()).unwrap_err().to_string();
            assert!(error.contains(needle), "{template}: {error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn text_without_actions_stays_as_it_is(text in "[^{]{0,64}") {
            prop_assert_eq!(render(&text, &model()).unwrap(), text);
        }

        #[test]
        fn no_template_brings_the_renderer_down(text in "(\\{\\{-? ?|-?\\}\\}| |if|else|end|name|variables|\\.|\"|`|\\(|\\)|\\||printf|%s|[a-z0-9é]){0,24}") {
            let _ = render(&text, &model());
        }
    }
}
