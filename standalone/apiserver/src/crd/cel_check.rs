//! What can be said of a CEL rule before it is ever run: fields that do not exist, comparisons that never hold, a result
//! that is no truth value, loops that could run for too long.
//!
//! A type is inferred for each expression from the schema that `self` has. Where that does not tell, the type is unknown and
//! nothing is said: a rule is only refused for what Kubernetes refuses too.
//!
//! The cost of a rule is bounded by its loops: the greatest number of times that its innermost one can turn, from `maxItems` and
//! `maxProperties`, or from what fits into a request where these are not declared. Kubernetes weighs every operation and is stricter;
//! this keeps out what could hold up the server (a loop within a loop over an unbounded list).

use cel::common::ast::{CallExpr, ComprehensionExpr, Expr, IdedExpr, LiteralValue};
use serde_json::Value;

use crate::meta::str_at;

/// Kubernetes' budget of one rule, in operations.
const BUDGET: u64 = 10_000_000;
/// Longest request, in bytes.
const REQUEST: u64 = 3 << 20;

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
    /// It could take this many times the budget.
    Cost(f64),
}

/// Checks an expression against the schema of `self`. `wanted` is CEL's name of the type that it must have.
pub(super) fn check(
    expression: &IdedExpr,
    schema: &Value,
    is_root: bool,
    wanted: &'static str,
) -> Option<Wrong> {
    let mut checker = Checker {
        schema,
        is_root,
        variables: Vec::new(),
        wrong: None,
        turns: 1,
        most: 1,
    };
    let found = checker.visit(expression);
    if let Some(wrong) = checker.wrong {
        return Some(wrong);
    }
    match found {
        Type::Scalar(name) if name != wanted => return Some(Wrong::Result(name)),
        Type::Of(_) | Type::List(..) => return Some(Wrong::Result("list or map")),
        Type::Scalar(_) | Type::Unknown => {}
    }
    (checker.most > BUDGET).then(|| Wrong::Cost(checker.most as f64 / BUDGET as f64))
}

struct Checker<'s> {
    schema: &'s Value,
    is_root: bool,
    variables: Vec<(String, Type<'s>)>,
    wrong: Option<Wrong>,
    /// How often the expression at hand is evaluated at most.
    turns: u64,
    most: u64,
}

impl<'s> Checker<'s> {
    fn refuse(&mut self, text: String) -> Type<'s> {
        self.wrong.get_or_insert(Wrong::Compile(text));
        Type::Unknown
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
            Expr::Ident(name) => self.variable(name),
            Expr::Select(select) => {
                let operand = self.visit(&select.operand);
                let field = self.field(&operand, &select.field);
                if select.test { Type::Scalar("bool") } else { field }
            }
            Expr::Call(call) => self.call(call),
            Expr::Comprehension(comprehension) => self.comprehension(comprehension),
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

    fn variable(&self, name: &str) -> Type<'s> {
        if let Some((_, known)) = self.variables.iter().rev().find(|(known, _)| known == name) {
            return known.clone();
        }
        match name {
            "self" | "oldSelf" => of(self.schema),
            _ => Type::Unknown,
        }
    }

    /// A field of an object, by the name that it has in expressions.
    fn field(&mut self, operand: &Type<'s>, name: &str) -> Type<'s> {
        let schema = match operand {
            Type::Of(schema) => *schema,
            Type::Scalar(scalar) => {
                return self.refuse(format!("type '{scalar}' does not support field selection"));
            }
            Type::Unknown | Type::List(..) => return Type::Unknown,
        };
        let properties = schema.get("properties").and_then(Value::as_object);
        let found = properties
            .into_iter()
            .flatten()
            .find(|(property, _)| super::cel::escape(property) == name);
        if let Some((_, found)) = found {
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
        let open = flag(schema, "x-kubernetes-preserve-unknown-fields") || properties.is_none();
        if (is_whole && matches!(name, "apiVersion" | "kind" | "metadata")) || open {
            return Type::Unknown;
        }
        self.refuse(format!("undefined field '{name}'"))
    }

    fn call(&mut self, call: &CallExpr) -> Type<'s> {
        let target = call.target.as_ref().map(|target| self.visit(target));
        let arguments: Vec<Type<'s>> = call.args.iter().map(|argument| self.visit(argument)).collect();
        let name = call.func_name.as_str();
        match name {
            "_==_" | "_!=_" | "_<_" | "_<=_" | "_>_" | "_>=_" => {
                if let [Type::Scalar(left), Type::Scalar(right)] = arguments.as_slice()
                    && left != right
                    && !(is_number(left) && is_number(right))
                {
                    return self.refuse(format!(
                        "found no matching overload for '{name}' applied to '({left}, {right})'"
                    ));
                }
                Type::Scalar("bool")
            }
            "_&&_" | "_||_" | "!_" => {
                let wrong = arguments.iter().find_map(|argument| match argument {
                    Type::Scalar(name) if *name != "bool" => Some(*name),
                    _ => None,
                });
                if let Some(wrong) = wrong {
                    return self.refuse(format!("expected type 'bool' but found '{wrong}'"));
                }
                Type::Scalar("bool")
            }
            "@in" | "contains" | "startsWith" | "endsWith" | "matches" | "has" => Type::Scalar("bool"),
            "size" | "int" | "indexOf" | "lastIndexOf" => Type::Scalar("int"),
            "string" | "lowerAscii" | "upperAscii" | "trim" | "replace" | "substring" | "charAt" | "join" => {
                Type::Scalar("string")
            }
            "timestamp" => Type::Scalar("timestamp"),
            "duration" => Type::Scalar("duration"),
            "double" => Type::Scalar("double"),
            "uint" => Type::Scalar("uint"),
            "bool" => Type::Scalar("bool"),
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
    fn comprehension(&mut self, comprehension: &ComprehensionExpr) -> Type<'s> {
        let range = self.visit(&comprehension.iter_range);
        let (item, size) = match &range {
            Type::Of(schema) if str_at(schema, "type") == "array" => {
                let items = schema.get("items");
                let most = bound(schema, "maxItems").unwrap_or_else(|| REQUEST / items.map_or(2, smallest));
                (items.map_or(Type::Unknown, of), most)
            }
            // Loops over maps turn over their keys.
            Type::Of(schema) => {
                let element = schema.get("additionalProperties");
                let most = bound(schema, "maxProperties");
                let most = most.unwrap_or_else(|| REQUEST / (4 + element.map_or(2, smallest)));
                (Type::Scalar("string"), most)
            }
            Type::List(item, size) => ((**item).clone(), *size),
            Type::Scalar(name) => {
                let text = format!(
                    "expression of type '{name}' cannot be range of a comprehension (must be list, map, or dynamic)"
                );
                return self.refuse(text);
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

    fn found(schema: &Value, rule: &str) -> Option<Wrong> {
        let program = cel::Program::compile(rule).expect("it parses");
        check(program.expression(), schema, false, "bool")
    }

    #[test]
    fn rules_that_do_not_fit_the_schema_are_found() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}, "b-c": {"type": "boolean"},
            "l": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "string"}}}}}});
        let compile = |text: &str| Some(Wrong::Compile(text.to_owned()));
        for (rule, wanted) in [
            ("self.b > 1", compile("undefined field 'b'")),
            ("self.l.all(x, x.m == 'a')", compile("undefined field 'm'")),
            ("has(self.zz)", compile("undefined field 'zz'")),
            (
                "self.a == '1'",
                compile("found no matching overload for '_==_' applied to '(int, string)'"),
            ),
            (
                "self.s && true",
                compile("expected type 'bool' but found 'string'"),
            ),
            ("self.a + 1", Some(Wrong::Result("int"))),
            ("self.l", Some(Wrong::Result("list or map"))),
            ("self.a > 1 && self.s.startsWith('x')", None),
            ("!has(self.s) || size(self.s) > 2", None),
            ("self.b__dash__c", None),
            ("self.l.exists(x, x.n == self.s)", None),
            ("self.l.map(x, x.n).all(n, n == 'a')", None),
            ("self.l.filter(x, has(x.n)).size() > 0", None),
            ("self.a > 1.5", None),
        ] {
            assert_eq!(found(&schema, rule), wanted, "{rule}");
        }
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
            assert_eq!(found(&open, rule), None, "{rule}");
        }
        let map = json!({"type": "object", "additionalProperties": {"type": "integer"}});
        for rule in [
            "self['a'] > 1",
            "self.a > 1",
            "self.all(k, k.startsWith('a') && self[k] > 0)",
            "'a' in self",
        ] {
            assert_eq!(found(&map, rule), None, "{rule}");
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
        assert!(matches!(found(&list(None), twice), Some(Wrong::Cost(factor)) if factor > 100.0));
        assert_eq!(found(&list(Some(100)), twice), None);
        assert_eq!(found(&list(None), "self.l.all(x, x != '')"), None);
        assert!(
            matches!(found(&list(Some(5000)), twice), Some(Wrong::Cost(factor)) if (2.0..3.0).contains(&factor))
        );
        assert!(matches!(
            found(
                &list(None),
                "self.l.filter(x, x != '').all(a, self.l.all(b, a == b))"
            ),
            Some(Wrong::Cost(_))
        ));
    }
}
