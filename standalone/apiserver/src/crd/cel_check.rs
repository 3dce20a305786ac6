//! What can be said of a CEL rule before it is ever run: fields that do not exist, comparisons that never hold, a result
//! that is no truth value, loops that could run for too long.
//!
//! A type is inferred for each expression from the schema that `self` has. Where that does not tell, the type is unknown and
//! nothing is said: a rule is only refused for what Kubernetes refuses too.
//!
//! The cost of a rule is bounded by its loops and by what it does with texts: the greatest number of times that its innermost loop can
//! turn, from `maxItems` and `maxProperties`, or from what fits into a request where these are not declared; the length of a text that
//! `matches` goes through, or that `+` makes. All of it as often as the schema lets the rule's own place occur. Kubernetes weighs every
//! operation and is stricter; this keeps out what could hold up the server.

use cel::Program;
use cel::common::ast::{CallExpr, ComprehensionExpr, Expr, IdedExpr, LiteralValue, SourceInfo};
use serde_json::Value;

use crate::error::FieldError;
use crate::meta::str_at;

/// Kubernetes' budget of one rule, in operations.
const BUDGET: u64 = 10_000_000;
/// Kubernetes' budget of all rules of a definition's version.
const BUDGET_OF_ALL: u64 = 100_000_000;
/// Longest request, in bytes.
const REQUEST: u64 = 3 << 20;

/// Names of types, which are values as well.
const TYPES: [&str; 11] = [
    "bool",
    "bytes",
    "double",
    "duration",
    "int",
    "list",
    "map",
    "null_type",
    "string",
    "timestamp",
    "type",
];

/// What is known of an expression's value.
#[derive(Debug, Clone, PartialEq)]
enum Type<'s> {
    Unknown,
    /// `bool`, `int`, `double`, `string`, …: CEL's names.
    Scalar(&'static str),
    /// Whatever this schema describes: an object, a list or a map.
    Of(&'s Value),
    /// A list with this many items at most.
    List(Box<Type<'s>>, u64),
}

/// What is wrong with a rule.
#[derive(Debug, PartialEq)]
pub(super) enum Wrong {
    /// It does not compile against the schema.
    Compile(String),
    /// It has another type than it must have.
    Result(&'static str),
}

/// Checks an expression against the schema of `self`. `wanted` is CEL's name of the type that it must have; the place that the rule
/// stands at occurs `times` at most. The answer is what the rule costs.
pub(super) fn check(
    program: &Program,
    schema: &Value,
    is_root: bool,
    wanted: &'static str,
    times: u64,
) -> Result<u64, Wrong> {
    let mut checker = Checker {
        schema,
        is_root,
        source: program.source_info(),
        variables: Vec::new(),
        wrong: None,
        turns: times,
        most: times,
    };
    let found = checker.visit(program.expression());
    if let Some(wrong) = checker.wrong {
        return Err(wrong);
    }
    match found {
        Type::Scalar(name) if name != wanted => Err(Wrong::Result(name)),
        Type::Of(_) | Type::List(..) => Err(Wrong::Result("list or map")),
        Type::Scalar(_) | Type::Unknown => Ok(checker.most),
    }
}

/// What the rules of a version cost, by the place of each; most of it may be nothing.
#[derive(Debug, Default)]
pub(crate) struct Costs(Vec<(u64, String)>);

impl Costs {
    pub(super) fn add(&mut self, cost: u64, at: &str, what: &str, errors: &mut Vec<FieldError>) {
        if cost > BUDGET {
            errors.push(FieldError::forbidden(at, &exceeds(what, cost, BUDGET)));
        }
        self.0.push((cost, at.to_owned()));
    }

    /// All rules together have a budget as well: what says so of a schema whose root is at `root`.
    pub(super) fn errors(mut self, root: &str, errors: &mut Vec<FieldError>) {
        let total = self
            .0
            .iter()
            .fold(0, |all: u64, (cost, _)| all.saturating_add(*cost));
        if total <= BUDGET_OF_ALL {
            return;
        }
        self.0.sort_by_key(|(cost, _)| std::cmp::Reverse(*cost));
        // The dearest ones, without what hardly counts.
        for (_, at) in self.0.iter().take(4).filter(|(cost, _)| *cost >= total / 100) {
            errors.push(FieldError::forbidden(
                at.clone(),
                "contributed to estimated rule cost total exceeding cost limit for entire OpenAPIv3 schema",
            ));
        }
        let what = "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema";
        errors.push(FieldError::forbidden(root, &exceeds(what, total, BUDGET_OF_ALL)));
    }
}

fn exceeds(what: &str, cost: u64, budget: u64) -> String {
    let factor = cost as f64 / budget as f64;
    let factor = if factor > 100.0 {
        "more than 100x".to_owned()
    } else {
        format!("{factor:.1}x")
    };
    format!(
        "{what} exceeds budget by factor of {factor} (try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)"
    )
}

struct Checker<'s> {
    schema: &'s Value,
    is_root: bool,
    source: &'s SourceInfo,
    variables: Vec<(String, Type<'s>)>,
    wrong: Option<Wrong>,
    /// How often the expression at hand is evaluated at most.
    turns: u64,
    most: u64,
}

impl<'s> Checker<'s> {
    /// `id` is that of the expression at fault, which the message points at.
    fn refuse(&mut self, id: u64, text: &str) -> Type<'s> {
        if self.wrong.is_none() {
            self.wrong = Some(Wrong::Compile(pointed(self.source, id, text)));
        }
        Type::Unknown
    }

    /// What an operation costs that is not just one step.
    fn costs(&mut self, steps: u64) {
        self.most = self.most.max(self.turns.saturating_mul(steps.max(1)));
    }

    /// Longest text that an expression gives, in characters; 1 where nothing is known.
    fn longest(&mut self, expression: &IdedExpr) -> u64 {
        match &expression.expr {
            Expr::Literal(LiteralValue::String(text)) => text.inner().len() as u64,
            Expr::Call(call) if call.func_name == "_+_" => call
                .args
                .iter()
                .map(|argument| self.longest(argument))
                .fold(0, u64::saturating_add),
            // Kubernetes does not know how long the text of a number may be.
            Expr::Call(call) if call.func_name == "string" => u64::MAX,
            Expr::Ident(name) if name == "self" || name == "oldSelf" => text_bound(self.schema),
            Expr::Select(select) => match self.visit(&select.operand) {
                Type::Of(schema) => property(schema, &select.field).map_or(1, text_bound),
                _ => 1,
            },
            _ => 1,
        }
    }

    fn visit(&mut self, expression: &IdedExpr) -> Type<'s> {
        match &expression.expr {
            Expr::Literal(literal) => Type::Scalar(match literal {
                LiteralValue::Boolean(_) => "bool",
                LiteralValue::Bytes(_) => "bytes",
                LiteralValue::Double(_) => "double",
                LiteralValue::Int(_) => "int",
                // Null compares with everything.
                LiteralValue::Null => return Type::Unknown,
                LiteralValue::String(_) => "string",
                LiteralValue::UInt(_) => "uint",
            }),
            Expr::Ident(name) => self.variable(expression.id, name),
            Expr::Select(select) => {
                let operand = self.visit(&select.operand);
                let field = self.field(expression.id, &operand, &select.field);
                if select.test { Type::Scalar("bool") } else { field }
            }
            Expr::Call(call) => self.call(expression.id, call),
            Expr::Comprehension(comprehension) => self.comprehension(expression.id, comprehension),
            Expr::List(list) => {
                let items: Vec<Type<'s>> = list.elements.iter().map(|element| self.visit(element)).collect();
                let same = items.iter().all(|item| Some(item) == items.first());
                let length = items.len() as u64;
                let first = items.into_iter().next().filter(|_| same);
                Type::List(Box::new(first.unwrap_or(Type::Unknown)), length)
            }
            Expr::Map(map) => {
                for entry in &map.entries {
                    if let cel::common::ast::EntryExpr::MapEntry(entry) = &entry.expr {
                        self.visit(&entry.key);
                        self.visit(&entry.value);
                    }
                }
                Type::Unknown
            }
            Expr::Struct(_) | Expr::Unspecified => Type::Unknown,
        }
    }

    fn variable(&mut self, id: u64, name: &str) -> Type<'s> {
        if let Some((_, known)) = self.variables.iter().rev().find(|(known, _)| known == name) {
            return known.clone();
        }
        match name {
            "self" | "oldSelf" => of(self.schema),
            name if TYPES.contains(&name) || name.starts_with('@') => Type::Unknown,
            name => self.refuse(id, &format!("undeclared reference to '{name}' (in container '')")),
        }
    }

    /// A field of an object, by the name that it has in expressions.
    fn field(&mut self, id: u64, operand: &Type<'s>, name: &str) -> Type<'s> {
        let schema = match operand {
            Type::Of(schema) => *schema,
            Type::Scalar(scalar) => {
                return self.refuse(id, &format!("type '{scalar}' does not support field selection"));
            }
            Type::Unknown | Type::List(..) => return Type::Unknown,
        };
        if let Some(found) = property(schema, name) {
            return of(found);
        }
        if let Some(element) = schema
            .get("additionalProperties")
            .filter(|element| element.is_object())
        {
            return of(element);
        }
        let is_whole = (self.is_root && std::ptr::eq(schema, self.schema))
            || flag(schema, "x-kubernetes-embedded-resource");
        let open = flag(schema, "x-kubernetes-preserve-unknown-fields") || schema.get("properties").is_none();
        if (is_whole && matches!(name, "apiVersion" | "kind" | "metadata")) || open {
            return Type::Unknown;
        }
        self.refuse(id, &format!("undefined field '{name}'"))
    }

    fn call(&mut self, id: u64, call: &CallExpr) -> Type<'s> {
        let target = call.target.as_ref().map(|target| self.visit(target));
        let arguments: Vec<Type<'s>> = call.args.iter().map(|argument| self.visit(argument)).collect();
        let name = call.func_name.as_str();
        match name {
            "_==_" | "_!=_" | "_<_" | "_<=_" | "_>_" | "_>=_" => {
                if let [Type::Scalar(left), Type::Scalar(right)] = arguments.as_slice()
                    && left != right
                    && !(is_number(left) && is_number(right))
                {
                    return self.refuse(
                        id,
                        &format!("found no matching overload for '{name}' applied to '({left}, {right})'"),
                    );
                }
                Type::Scalar("bool")
            }
            "_&&_" | "_||_" | "!_" => {
                let wrong = arguments.iter().find_map(|argument| match argument {
                    Type::Scalar(name) if *name != "bool" => Some(*name),
                    _ => None,
                });
                if let Some(wrong) = wrong {
                    return self.refuse(id, &format!("expected type 'bool' but found '{wrong}'"));
                }
                Type::Scalar("bool")
            }
            "matches" => {
                // Through the text for each quarter of the pattern.
                let both: Vec<&IdedExpr> = call.target.as_deref().into_iter().chain(&call.args).collect();
                if let [text, pattern] = both.as_slice() {
                    let through = self.longest(text).saturating_add(1).div_ceil(10);
                    let quarters = self.longest(pattern).div_ceil(4);
                    self.costs(through.saturating_mul(quarters));
                }
                Type::Scalar("bool")
            }
            "@in" | "contains" | "startsWith" | "endsWith" | "has" => Type::Scalar("bool"),
            "size" | "int" | "indexOf" | "lastIndexOf" => Type::Scalar("int"),
            "string" | "lowerAscii" | "upperAscii" | "trim" | "replace" | "substring" | "charAt" | "join" => {
                Type::Scalar("string")
            }
            "timestamp" => Type::Scalar("timestamp"),
            "duration" => Type::Scalar("duration"),
            "double" => Type::Scalar("double"),
            "uint" => Type::Scalar("uint"),
            "bool" => Type::Scalar("bool"),
            "_+_"
                if arguments
                    .iter()
                    .all(|argument| *argument == Type::Scalar("string")) =>
            {
                let made = call
                    .args
                    .iter()
                    .map(|argument| self.longest(argument))
                    .fold(0, u64::saturating_add);
                self.costs(made / 10);
                Type::Scalar("string")
            }
            "_+_" | "_-_" | "_*_" | "_/_" | "_%_" => match arguments.as_slice() {
                [Type::Scalar(left), Type::Scalar(right)] if left == right => Type::Scalar(left),
                _ => Type::Unknown,
            },
            "_?_:_" => match arguments.as_slice() {
                [_, yes, no] if yes == no => yes.clone(),
                _ => Type::Unknown,
            },
            "_[_]" => match arguments.first() {
                Some(Type::Of(schema)) => match str_at(schema, "type") {
                    "array" => schema.get("items").map_or(Type::Unknown, of),
                    _ => schema
                        .get("additionalProperties")
                        .filter(|element| element.is_object())
                        .map_or(Type::Unknown, of),
                },
                Some(Type::List(item, _)) => (**item).clone(),
                _ => Type::Unknown,
            },
            // Of what they are called on.
            "reverse" | "distinct" | "sort" => target.unwrap_or(Type::Unknown),
            _ => Type::Unknown,
        }
    }

    /// A macro's loop: what it turns over, and what it makes of it.
    fn comprehension(&mut self, id: u64, comprehension: &ComprehensionExpr) -> Type<'s> {
        let range = self.visit(&comprehension.iter_range);
        let (item, size) = match &range {
            Type::Of(schema) if str_at(schema, "type") == "array" => {
                (schema.get("items").map_or(Type::Unknown, of), occurrences(schema))
            }
            // Loops over maps turn over their keys.
            Type::Of(schema) => (Type::Scalar("string"), occurrences(schema)),
            Type::List(item, size) => ((**item).clone(), *size),
            Type::Scalar(name) => {
                let text = format!(
                    "expression of type '{name}' cannot be range of a comprehension (must be list, map, or dynamic)"
                );
                return self.refuse(id, &text);
            }
            Type::Unknown => (Type::Unknown, 1),
        };
        let accumulated = self.visit(&comprehension.accu_init);
        let outside = self.turns;
        self.turns = outside.saturating_mul(size.max(1));
        self.most = self.most.max(self.turns);
        let known = self.variables.len();
        let second = comprehension.iter_var2.clone();
        let first = if second.is_some() {
            Type::Unknown
        } else {
            item.clone()
        };
        self.variables.push((comprehension.iter_var.clone(), first));
        self.variables
            .extend(second.map(|second| (second, Type::Unknown)));
        self.variables
            .push((comprehension.accu_var.clone(), Type::Unknown));
        self.visit(&comprehension.loop_cond);
        self.visit(&comprehension.loop_step);
        self.turns = outside;
        self.variables.truncate(known);
        match accumulated {
            // all, exists; exists_one counts and compares in the end.
            Type::Scalar("bool" | "int") => Type::Scalar("bool"),
            // filter and map: as long as what they were made of at most.
            Type::List(..) => Type::List(Box::new(Type::Unknown), size),
            Type::Unknown | Type::Scalar(_) | Type::Of(_) => Type::Unknown,
        }
    }
}

fn is_number(name: &str) -> bool {
    matches!(name, "int" | "uint" | "double")
}

fn flag(schema: &Value, name: &str) -> bool {
    schema.get(name) == Some(&Value::Bool(true))
}

fn bound(schema: &Value, name: &str) -> Option<u64> {
    schema.get(name).and_then(Value::as_u64)
}

/// A property of a schema by the name that it has in expressions.
fn property<'s>(schema: &'s Value, name: &str) -> Option<&'s Value> {
    let properties = schema.get("properties").and_then(Value::as_object);
    properties
        .into_iter()
        .flatten()
        .find(|(property, _)| super::cel::escape(property) == name)
        .map(|(_, found)| found)
}

/// Longest text that a schema lets through; 1 where it describes no text.
fn text_bound(schema: &Value) -> u64 {
    match of(schema) {
        Type::Scalar("string") => bound(schema, "maxLength").unwrap_or(REQUEST),
        _ => 1,
    }
}

/// How many items a list, or members a map, has at most.
pub(super) fn occurrences(schema: &Value) -> u64 {
    if str_at(schema, "type") == "array" {
        let items = schema.get("items");
        return bound(schema, "maxItems").unwrap_or_else(|| REQUEST / items.map_or(2, smallest));
    }
    let element = schema.get("additionalProperties");
    bound(schema, "maxProperties").unwrap_or_else(|| REQUEST / (4 + element.map_or(2, smallest)))
}

/// A message that points at the place in the rule that it is about, as CEL's own compiler does.
fn pointed(source: &SourceInfo, id: u64, text: &str) -> String {
    let Some((start, _)) = source.offset_for(id) else {
        return text.to_owned();
    };
    let before = source.source.get(..start as usize).unwrap_or_default();
    let line = before.matches('\n').count();
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count();
    let shown = source.source.lines().nth(line).unwrap_or_default();
    format!(
        "ERROR: <input>:{}:{}: {text}\n | {shown}\n | {}^",
        line + 1,
        column + 1,
        ".".repeat(column)
    )
}

/// The type of what a schema describes.
fn of(schema: &Value) -> Type<'_> {
    if flag(schema, "x-kubernetes-int-or-string") || flag(schema, "nullable") {
        return Type::Unknown;
    }
    match (str_at(schema, "type"), str_at(schema, "format")) {
        ("boolean", _) => Type::Scalar("bool"),
        ("integer", _) => Type::Scalar("int"),
        ("number", _) => Type::Scalar("double"),
        ("string", "date" | "date-time") => Type::Scalar("timestamp"),
        ("string", "duration") => Type::Scalar("duration"),
        ("string", "byte") => Type::Unknown,
        ("string", _) => Type::Scalar("string"),
        ("object" | "array", _) => Type::Of(schema),
        _ => Type::Unknown,
    }
}

/// Bytes that the shortest value of a schema takes in a request, with the comma after it.
fn smallest(schema: &Value) -> u64 {
    let least = match str_at(schema, "type") {
        "string" => 2 + bound(schema, "minLength").unwrap_or(0),
        "boolean" => 4,
        "array" => 2,
        "object" => {
            let required = crate::meta::list_at(schema, "required");
            2 + required
                .iter()
                .filter_map(Value::as_str)
                .map(|name| name.len() as u64 + 4)
                .sum::<u64>()
        }
        _ => 1,
    };
    least + 1
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(schema: &Value, rule: &str) -> Result<u64, Wrong> {
        let program = cel::Program::compile(rule).expect("it parses");
        check(&program, schema, false, "bool", 1)
    }

    #[test]
    fn rules_that_do_not_fit_the_schema_are_found() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}, "b-c": {"type": "boolean"},
            "l": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "string"}}}}}});
        for (rule, wanted) in [
            ("self.b > 1", "1:5: undefined field 'b'\n | self.b > 1\n | ....^"),
            ("self.l.all(x, x.m == 'a')", "1:16: undefined field 'm'"),
            ("has(self.zz)", "undefined field 'zz'"),
            (
                "other == 1",
                "1:1: undeclared reference to 'other' (in container '')",
            ),
            ("self.l.all(x, true) && x == 1", "undeclared reference to 'x'"),
            (
                "self.a == '1'",
                "1:8: found no matching overload for '_==_' applied to '(int, string)'\n | self.a == '1'\n | .......^",
            ),
            ("self.s && true", "expected type 'bool' but found 'string'"),
        ] {
            match found(&schema, rule) {
                Err(Wrong::Compile(text)) => assert!(text.contains(wanted), "{rule}: {text}"),
                other => panic!("{rule}: {other:?}"),
            }
        }
        for (rule, wanted) in [("self.a + 1", "int"), ("self.l", "list or map")] {
            assert_eq!(found(&schema, rule), Err(Wrong::Result(wanted)), "{rule}");
        }
        for rule in [
            "self.a > 1 && self.s.startsWith('x')",
            "!has(self.s) || size(self.s) > 2",
            "self.b__dash__c",
            "self.l.exists(x, x.n == self.s)",
            "self.l.map(x, x.n).all(n, n == 'a')",
            "self.l.filter(x, has(x.n)).size() > 0",
            "self.a > 1.5",
            "self.l.map(x, x.n).all(x, x.matches('a') || type(x) == string)",
        ] {
            assert!(found(&schema, rule).is_ok_and(|cost| cost <= BUDGET), "{rule}");
        }
        let dear = "self.l.all(x, self.l.all(y, self.l.exists(z, z.n == x.n || z.n == y.n)))";
        assert!(found(&schema, dear).is_ok_and(|cost| cost > BUDGET));
    }

    #[test]
    fn what_the_schema_leaves_open_is_not_held_against_a_rule() {
        let open = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {"p": {"x-kubernetes-int-or-string": true}}});
        for rule in [
            "self.anything == 1",
            "self.p == '5%'",
            "self.p == 5",
            "type(self.p) == string",
        ] {
            assert_eq!(found(&open, rule), Ok(1), "{rule}");
        }
        let map = json!({"type": "object", "additionalProperties": {"type": "integer"}});
        for rule in [
            "self['a'] > 1",
            "self.a > 1",
            "self.all(k, k.startsWith('a') && self[k] > 0)",
            "'a' in self",
        ] {
            assert!(found(&map, rule).is_ok_and(|cost| cost <= BUDGET), "{rule}");
        }
    }

    #[test]
    fn a_loop_within_a_loop_needs_bounds() {
        let list = |most: Option<u64>| {
            let mut list = json!({"type": "array", "items": {"type": "string"}});
            if let Some(most) = most {
                list["maxItems"] = json!(most);
            }
            json!({"type": "object", "properties": {"l": list}})
        };
        let twice = "self.l.all(x, self.l.exists_one(y, x == y))";
        let cost = |most, rule| found(&list(most), rule).expect("it fits the schema");
        assert!(cost(None, twice) > 100 * BUDGET);
        assert_eq!(cost(Some(100), twice), 10_000);
        assert!(cost(None, "self.l.all(x, x != '')") <= BUDGET);
        assert_eq!(cost(Some(5000), twice), 25_000_000);
        assert!(cost(None, "self.l.filter(x, x != '').all(a, self.l.all(b, a == b))") > BUDGET);
    }

    #[test]
    fn texts_cost_by_their_length_and_by_how_often_the_place_occurs() {
        let text = json!({"type": "string"});
        let program = cel::Program::compile("self.matches('a.*b')").expect("it parses");
        let cost = |schema: &Value, times| check(&program, schema, false, "bool", times).expect("it fits");
        assert_eq!(cost(&text, 1), 314_573);
        assert_eq!(cost(&json!({"type": "string", "maxLength": 9}), 1), 1);
        assert!(cost(&text, occurrences(&json!({"type": "array", "items": text}))) > 100 * BUDGET);
        let number = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let program = cel::Program::compile("'a is ' + string(self.a)").expect("it parses");
        assert!(check(&program, &number, false, "string", 1).expect("it fits") > 100 * BUDGET);
    }
}
