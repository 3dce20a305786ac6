//! `x-kubernetes-validations`: CEL rules on custom resources, and the string formats that schemas name.
//!
//! Rules are compiled when a CRD is stored. A rule that does not compile, or that calls a function which this server does not have
//! (of Kubernetes' own ones those of [`cel_kubernetes`] are there), is refused with the CRD: it is never silently left out. So is one that
//! cannot fit the schema or could run for too long ([`cel_check`]). An error while evaluating one makes the object invalid.

use std::sync::{Arc, LazyLock};

use cel::objects::{Key, Map as CelMap};
use cel::{Context, Env, ExecutionError, Program};
use serde_json::Value;

use super::cel_check::{self, Costs, Wrong};
use super::cel_kubernetes;
use crate::error::{FieldError, FieldErrorKind};
use crate::meta::str_at;
use crate::schema::{ListKind, Scalar, Schema, Shape};

static ENV: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    // Names are unique within each extension and between them.
    let _ = env.add_extension(cel::extensions::strings);
    let _ = env.add_extension(cel::extensions::lists);
    let _ = env.add_extension(cel_kubernetes::extension);
    Arc::new(env)
});

/// Functions that rules may call.
const FUNCTIONS: [&str; 46] = [
    "size",
    "contains",
    "startsWith",
    "endsWith",
    "matches",
    "int",
    "uint",
    "double",
    "string",
    "bytes",
    "bool",
    "duration",
    "timestamp",
    "type",
    "dyn",
    "has",
    "all",
    "exists",
    "exists_one",
    "existsOne",
    "map",
    "filter",
    "charAt",
    "indexOf",
    "lastIndexOf",
    "join",
    "lowerAscii",
    "upperAscii",
    "replace",
    "split",
    "substring",
    "trim",
    "reverse",
    "distinct",
    "sort",
    "flatten",
    "getFullYear",
    "getMonth",
    "getDate",
    "getDayOfMonth",
    "getDayOfWeek",
    "getDayOfYear",
    "getHours",
    "getMinutes",
    "getSeconds",
    "getMilliseconds",
];

/// A rule as Go prints its struct.
fn go_rule(rule: &Rule) -> String {
    let text = |text: &str| {
        Value::String(text.to_owned())
            .to_string()
            .replace('<', "\\u003c")
            .replace('>', "\\u003e")
            .replace('&', "\\u0026")
    };
    let or_null = |given: bool, shown: String| if given { shown } else { "null".to_owned() };
    format!(
        "{{\"Rule\":{},\"Message\":{},\"MessageExpression\":{},\"Reason\":{},\"FieldPath\":{},\"OptionalOldSelf\":{}}}",
        text(&rule.expression),
        text(&rule.message),
        text(&rule.message_expression),
        or_null(!rule.reason_text.is_empty(), text(&rule.reason_text)),
        text(&rule.field_path),
        or_null(rule.optional_old_self, "true".to_owned()),
    )
}

/// One rule.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    expression: String,
    program: Result<Arc<Program>, String>,
    message: String,
    message_program: Option<Result<Arc<Program>, String>>,
    message_expression: String,
    reason: FieldErrorKind,
    reason_text: String,
    field_path: String,
    /// Compares with the former state: evaluated on updates only.
    transition: bool,
    optional_old_self: bool,
}

fn compile(source: &str) -> Result<Arc<Program>, String> {
    let program = ENV
        .compile(source)
        .map_err(|errors| format!("compilation failed: {errors}").replace("\n| ", "\n | "))?;
    let references = program.references();
    let unknown = references
        .functions()
        .into_iter()
        .find(|f| {
            f.starts_with(|c: char| c.is_ascii_alphabetic())
                && !FUNCTIONS.contains(f)
                && !cel_kubernetes::FUNCTIONS.contains(f)
        })
        .map(str::to_owned);
    drop(references);
    match unknown {
        Some(name) => Err(format!(
            "compilation failed: the function {name:?} is not supported by this server"
        )),
        None => Ok(Arc::new(program)),
    }
}

/// The rules of one schema node.
pub(crate) fn parse(json: &Value) -> Vec<Rule> {
    crate::meta::list_at(json, "x-kubernetes-validations")
        .iter()
        .map(|rule| {
            let expression = str_at(rule, "rule").to_owned();
            let message_expression = str_at(rule, "messageExpression").to_owned();
            let program = compile(&expression);
            let transition = program
                .as_ref()
                .is_ok_and(|p| p.references().has_variable("oldSelf"));
            Rule {
                transition,
                program,
                message: str_at(rule, "message").to_owned(),
                message_program: (!message_expression.is_empty()).then(|| compile(&message_expression)),
                message_expression,
                reason: match str_at(rule, "reason") {
                    "FieldValueForbidden" => FieldErrorKind::Forbidden,
                    "FieldValueRequired" => FieldErrorKind::Required,
                    "FieldValueDuplicate" => FieldErrorKind::Duplicate,
                    _ => FieldErrorKind::Invalid,
                },
                reason_text: str_at(rule, "reason").to_owned(),
                field_path: str_at(rule, "fieldPath").to_owned(),
                optional_old_self: rule.get("optionalOldSelf") == Some(&Value::Bool(true)),
                expression,
            }
        })
        .collect()
}

/// What is wrong with the rules of a node themselves, found when a CRD is stored.
///
/// `uncorrelated` is the list above the node whose items cannot be told apart, if there is one: then `oldSelf` means nothing. The node
/// occurs `times` at most.
pub(crate) fn rule_errors(
    json: &Value,
    path: &str,
    uncorrelated: Option<&str>,
    times: u64,
    costs: &mut Costs,
    errors: &mut Vec<FieldError>,
) {
    for (i, rule) in parse(json).iter().enumerate() {
        let at = format!("{path}.x-kubernetes-validations[{i}]");
        if rule.expression.trim().is_empty() {
            errors.push(FieldError::required(
                format!("{at}.rule"),
                "rule is not specified",
            ));
            continue;
        }
        let is_root = path.ends_with("openAPIV3Schema");
        let refused = |at: String, text: String| FieldError {
            value: Some(go_rule(rule)),
            ..FieldError::invalid(at, &Value::Null, text)
        };
        match &rule.program {
            Err(text) => errors.push(refused(format!("{at}.rule"), text.clone())),
            Ok(program) => {
                let at = format!("{at}.rule");
                match cel_check::check(program, json, is_root, "bool", times) {
                    Ok(cost) => costs.add(cost, &at, "estimated rule cost", errors),
                    Err(Wrong::Compile(text)) => {
                        errors.push(refused(at.clone(), format!("compilation failed: {text}")));
                    }
                    Err(Wrong::Result(_)) => {
                        errors.push(refused(
                            at.clone(),
                            "cel expression must evaluate to a bool".to_owned(),
                        ));
                    }
                }
                if let Some(list) = uncorrelated.filter(|_| rule.transition) {
                    errors.push(FieldError::invalid(
                        at,
                        &Value::String(rule.expression.clone()),
                        format!(
                            "oldSelf cannot be used on the uncorrelatable portion of the schema within {list}"
                        ),
                    ));
                }
            }
        }
        if rule.message.contains('\n') {
            errors.push(FieldError::invalid(
                format!("{at}.message"),
                &Value::String(rule.message.clone()),
                "must not contain line breaks",
            ));
        }
        match &rule.message_program {
            Some(Err(text)) => errors.push(refused(format!("{at}.messageExpression"), text.clone())),
            Some(Ok(program)) => {
                let at = format!("{at}.messageExpression");
                match cel_check::check(program, json, is_root, "string", times) {
                    Ok(cost) => costs.add(cost, &at, "estimated messageExpression cost", errors),
                    Err(Wrong::Compile(text)) => {
                        errors.push(refused(at, format!("compilation failed: {text}")));
                    }
                    Err(Wrong::Result(_)) => errors.push(refused(
                        at,
                        "messageExpression must evaluate to a string".to_owned(),
                    )),
                }
            }
            None => {}
        }
        let reasons = [
            "FieldValueDuplicate",
            "FieldValueForbidden",
            "FieldValueInvalid",
            "FieldValueRequired",
        ];
        if !rule.reason_text.is_empty() && !reasons.contains(&rule.reason_text.as_str()) {
            errors.push(FieldError::not_supported(
                format!("{at}.reason"),
                &Value::String(rule.reason_text.clone()),
                &reasons,
            ));
        }
        if rule.optional_old_self {
            errors.push(FieldError::forbidden(
                format!("{at}.optionalOldSelf"),
                "optionalOldSelf is not supported by this server",
            ));
        }
        let last = rule.field_path.rsplit('.').next().unwrap_or_default();
        if !rule.field_path.is_empty()
            && json
                .get("properties")
                .is_some_and(|p| p.get(last).is_none() && !rule.field_path[1..].contains(['.', '[']))
        {
            errors.push(FieldError::invalid(
                format!("{at}.fieldPath"),
                &Value::String(rule.field_path.clone()),
                "must be a valid path",
            ));
        }
    }
}

/// Evaluate the rules of `schema` and everything below it.
pub(crate) fn check(
    schema: &Schema,
    value: &Value,
    old: Option<&Value>,
    path: &str,
    errors: &mut Vec<FieldError>,
) {
    if value.is_null() {
        return;
    }
    if let Some(rules) = &schema.rules {
        for rule in &rules.cel {
            evaluate(rule, schema, value, old, path, errors);
        }
    }
    let join = |name: &str| {
        if path.is_empty() {
            name.to_owned()
        } else {
            format!("{path}.{name}")
        }
    };
    match (&schema.shape, value) {
        (Shape::Struct(s), Value::Object(members)) => {
            for (name, member) in members {
                if let Some(field) = s.fields.get(name.as_str()) {
                    check(
                        &field.schema,
                        member,
                        old.and_then(|o| o.get(name)),
                        &join(name),
                        errors,
                    );
                }
            }
        }
        (Shape::Map { value: element }, Value::Object(members)) => {
            for (name, member) in members {
                check(
                    element,
                    member,
                    old.and_then(|o| o.get(name)),
                    &join(name),
                    errors,
                );
            }
        }
        (Shape::List { item, kind }, Value::Array(items)) => {
            let olds = old.and_then(Value::as_array);
            for (i, member) in items.iter().enumerate() {
                let before = match kind {
                    ListKind::Map(keys) => olds.and_then(|l| {
                        l.iter()
                            .find(|o| keys.iter().all(|k| o.get(&**k) == member.get(&**k)))
                    }),
                    _ => None,
                };
                check(item, member, before, &format!("{path}[{i}]"), errors);
            }
        }
        _ => {}
    }
}

fn context<'p, 'v>(schema: &Schema, value: &Value, old: Option<&Value>) -> Context<'p, 'v> {
    let mut context = Context::with_env(ENV.clone());
    context.add_variable_from_value("self", to_cel(schema, value));
    if let Some(old) = old {
        context.add_variable_from_value("oldSelf", to_cel(schema, old));
    }
    context
}

fn evaluate(
    rule: &Rule,
    schema: &Schema,
    value: &Value,
    old: Option<&Value>,
    path: &str,
    errors: &mut Vec<FieldError>,
) {
    if rule.transition && old.is_none() {
        return;
    }
    let field = match (path, rule.field_path.as_str()) {
        ("", "") => "<nil>".to_owned(),
        ("", inner) => inner.trim_start_matches('.').to_owned(),
        (path, inner) => format!("{path}{inner}"),
    };
    // Composite values are not printed.
    let shown = (!value.is_object() && !value.is_array() && rule.field_path.is_empty())
        .then(|| crate::error::show(value));
    let Ok(program) = &rule.program else {
        // Only of CRDs stored by an earlier version; new ones are refused.
        errors.push(FieldError::plain(
            FieldErrorKind::Invalid,
            field,
            &format!("rule cannot be evaluated: {}", rule.expression),
        ));
        return;
    };
    let context = context(schema, value, old);
    match program.execute(&context) {
        Ok(cel::Value::Bool(true)) => {}
        Ok(cel::Value::Bool(false)) => {
            let own = rule
                .message_program
                .as_ref()
                .and_then(|p| p.as_ref().ok())
                .and_then(|p| match p.execute(&context) {
                    Ok(cel::Value::String(text)) if !text.trim().is_empty() && !text.contains('\n') => {
                        Some(text.to_string())
                    }
                    _ => None,
                });
            let message = match own {
                Some(text) => text,
                None if !rule.message.is_empty() => rule.message.trim().to_owned(),
                None => format!("failed rule: {}", rule.expression.trim()),
            };
            errors.push(match rule.reason {
                FieldErrorKind::Duplicate => FieldError {
                    kind: rule.reason,
                    field,
                    value: shown,
                    detail: String::new(),
                },
                FieldErrorKind::Forbidden | FieldErrorKind::Required => FieldError {
                    kind: rule.reason,
                    field,
                    value: None,
                    detail: message,
                },
                _ => FieldError {
                    kind: rule.reason,
                    field,
                    value: shown,
                    detail: message,
                },
            });
        }
        Ok(other) => errors.push(FieldError::plain(
            FieldErrorKind::Invalid,
            field,
            &format!(
                "rule gave {} instead of true or false: {}",
                other.type_of(),
                rule.expression
            ),
        )),
        Err(error) => {
            let kind = match value {
                Value::Object(_) => "object",
                Value::Array(_) => "array",
                Value::String(_) => "string",
                Value::Number(_) => "integer",
                _ => "boolean",
            };
            errors.push(FieldError {
                kind: FieldErrorKind::Invalid,
                field,
                value: Some(format!("{kind:?}")),
                detail: match error {
                    ExecutionError::NoSuchOverload(_) => format!(
                        "'no such overload': call arguments did not match a supported operator, function or macro signature for rule: {}",
                        rule.expression.trim()
                    ),
                    ExecutionError::FunctionError { message, .. } => {
                        format!("{message} evaluating rule: {}", rule.expression.trim())
                    }
                    other => format!("{other} evaluating rule: {}", rule.expression.trim()),
                },
            });
        }
    }
}

/// JSON as CEL sees it: numbers by the type of the schema, names that are CEL's own words escaped.
fn to_cel(schema: &Schema, value: &Value) -> cel::Value {
    let schema = schema.resolve();
    match value {
        Value::Null => cel::Value::Null,
        Value::Bool(b) => cel::Value::Bool(*b),
        Value::Number(n) => match (&schema.shape, n.as_i64()) {
            (Shape::Scalar(Scalar::Number), _) | (_, None) => cel::Value::Float(n.as_f64().unwrap_or(0.0)),
            (_, Some(i)) => cel::Value::Int(i),
        },
        Value::String(s) => formatted(schema, s),
        Value::Array(items) => {
            let item = schema.item();
            cel::Value::List(Arc::new(items.iter().map(|v| to_cel(item, v)).collect()))
        }
        Value::Object(members) => {
            let named = matches!(schema.shape, Shape::Struct(_));
            let map = members
                .iter()
                .map(|(k, v)| {
                    let key = if named { escape(k) } else { k.clone() };
                    (Key::String(Arc::new(key)), to_cel(schema.member(k).0, v))
                })
                .collect();
            cel::Value::Map(CelMap { map: Arc::new(map) })
        }
    }
}

/// What turns a text of a format into the value that rules see. Each conversion is a constant that compiles.
static BY_FORMAT: LazyLock<[(&str, Option<Program>); 3]> = LazyLock::new(|| {
    [
        ("date-time", "timestamp(text)"),
        ("date", "timestamp(text + 'T00:00:00Z')"),
        ("duration", "duration(text)"),
    ]
    .map(|(format, conversion)| (format, ENV.compile(conversion).ok()))
});

/// A string; a time or a duration where the schema's format says so and it is one.
fn formatted(schema: &Schema, text: &str) -> cel::Value {
    let plain = cel::Value::String(Arc::new(text.to_owned()));
    let format = schema.rules.as_ref().and_then(|rules| rules.format.as_deref());
    let conversion = BY_FORMAT.iter().find(|(known, _)| Some(*known) == format);
    let Some((_, Some(conversion))) = conversion else {
        return plain;
    };
    let mut context = Context::with_env(ENV.clone());
    context.add_variable_from_value("text", plain.clone());
    conversion.execute(&context).unwrap_or(plain)
}

/// Kubernetes' escaping of property names that are no CEL identifiers.
pub(super) fn escape(name: &str) -> String {
    const RESERVED: [&str; 21] = [
        "true",
        "false",
        "null",
        "in",
        "as",
        "break",
        "const",
        "continue",
        "else",
        "for",
        "function",
        "if",
        "import",
        "let",
        "loop",
        "package",
        "namespace",
        "return",
        "var",
        "void",
        "while",
    ];
    if RESERVED.contains(&name) {
        return format!("__{name}__");
    }
    if name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !name.contains("__") {
        return name.to_owned();
    }
    name.replace("__", "__underscores__")
        .replace('.', "__dot__")
        .replace('-', "__dash__")
        .replace('/', "__slash__")
}

/// Whether `text` is of a string format that Kubernetes checks; unknown formats hold.
pub(crate) fn format_holds(format: &str, text: &str) -> bool {
    match format {
        "date-time" => crate::time::parse(text).is_some(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "cidr" => text.split_once('/').is_some_and(|(ip, bits)| {
            ip.parse::<std::net::IpAddr>().is_ok() && bits.parse::<u8>().is_ok_and(|b| b <= 128)
        }),
        "uuid" => uuid::Uuid::parse_str(text).is_ok(),
        "hostname" => crate::names::subdomain_errors(&text.to_ascii_lowercase()).is_empty(),
        "email" => text
            .split_once('@')
            .is_some_and(|(a, b)| !a.is_empty() && !b.is_empty()),
        "uri" => text
            .parse::<http::Uri>()
            .is_ok_and(|u| u.scheme().is_some() || u.path().starts_with('/')),
        "duration" => go_duration(text),
        "byte" => {
            use base64::Engine as _;
            base64::engine::general_purpose::STANDARD.decode(text).is_ok()
        }
        _ => true,
    }
}

/// Go's durations: `1h30m`, `-1.5s`, `0`.
fn go_duration(text: &str) -> bool {
    let rest = text.strip_prefix(['-', '+']).unwrap_or(text);
    if rest == "0" {
        return true;
    }
    let mut rest = rest;
    let mut any = false;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        if number.is_empty() || number.parse::<f64>().is_err() {
            return false;
        }
        let Some(unit) = ["ns", "us", "µs", "ms", "s", "m", "h"]
            .into_iter()
            .find(|u| after.starts_with(u) && !(*u == "m" && after.starts_with("ms")))
        else {
            return false;
        };
        rest = &after[unit.len()..];
        any = true;
    }
    any
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::crd::rules;

    fn errors(schema: &Value, value: &Value, old: Option<&Value>) -> Vec<String> {
        let schema = rules::parse(schema, false);
        let mut out = Vec::new();
        check(&schema, value, old, "", &mut out);
        out.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_rule_that_fails_says_so_with_its_message() {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {"min": {"type": "integer"}, "max": {"type": "integer"}},
            "x-kubernetes-validations": [{"rule": "self.min <= self.max", "messageExpression": "'min ' + string(self.min) + ' is above max'"}]}}});
        assert!(errors(&schema, &json!({"spec": {"min": 1, "max": 2}}), None).is_empty());
        assert_eq!(
            errors(&schema, &json!({"spec": {"min": 3, "max": 2}}), None),
            ["spec: Invalid value: min 3 is above max"]
        );
    }

    #[test]
    fn transition_rules_see_the_old_value_and_rest_at_creation() {
        let schema = json!({"type": "object", "properties": {"name": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "immutable"}]}}});
        assert!(errors(&schema, &json!({"name": "a"}), None).is_empty());
        assert_eq!(
            errors(&schema, &json!({"name": "b"}), Some(&json!({"name": "a"}))),
            ["name: Invalid value: \"b\": immutable"]
        );
    }

    #[test]
    fn times_and_durations_are_what_their_format_says() {
        let schema = json!({"type": "object", "properties": {
            "dur": {"type": "string", "format": "duration", "x-kubernetes-validations": [{"rule": "self < duration('1h')"}]},
            "at": {"type": "string", "format": "date-time", "x-kubernetes-validations": [{"rule": "self > timestamp('2000-01-01T00:00:00Z')"}]},
            "day": {"type": "string", "format": "date", "x-kubernetes-validations": [{"rule": "self.getFullYear() == 2020"}]},
        }});
        let good = json!({"dur": "5m", "at": "2020-01-01T00:00:00Z", "day": "2020-02-03"});
        assert_eq!(errors(&schema, &good, None), Vec::<String>::new());
        let bad = json!({"dur": "2h", "at": "1999-01-01T00:00:00Z", "day": "2021-02-03"});
        assert_eq!(errors(&schema, &bad, None).len(), 3);
    }

    #[test]
    fn rules_that_cannot_be_evaluated_are_found_when_the_definition_is_stored() {
        for (rule, wanted) in [
            ("self.a >", "compilation failed"),
            (
                "format.dns1123Label().validate(self.a).hasValue()",
                "is not supported",
            ),
            ("other == 1", "undeclared reference"),
        ] {
            let mut out = Vec::new();
            rule_errors(
                &json!({"x-kubernetes-validations": [{"rule": rule}]}),
                "p",
                None,
                1,
                &mut Costs::default(),
                &mut out,
            );
            assert!(
                out.iter().any(|e| e.to_string().contains(wanted)),
                "{rule}: {out:?}"
            );
        }
    }
}
