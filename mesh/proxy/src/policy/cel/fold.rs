//! Macros over lists and maps: `all`, `exists`, `exists_one`, `map`, `filter`. Each becomes a comprehension as CEL defines
//! it, which is also how control planes send them in the parsed form.

use super::{Ast, Value};
use crate::error::Refusal;

/// The accumulator of a macro; no expression can name it.
const RESULT: &str = "@result";

/// A comprehension: for each element of `range` that is called `variable`, while `condition` holds, the accumulator
/// becomes `step`; `result` is made of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Fold {
    pub variable: String,
    pub range: Ast,
    pub accumulator: String,
    pub initial: Ast,
    pub condition: Ast,
    pub step: Ast,
    pub result: Ast,
}

fn call(function: &str, arguments: Vec<Ast>) -> Ast {
    Ast::Call(None, function.into(), arguments)
}

/// The comprehension of a macro; `None` if the function is none. Macros have a target, the list or map.
pub(super) fn expand(target: &Ast, function: &str, arguments: &[Ast]) -> Result<Option<Ast>, Refusal> {
    let counts: &[usize] = match function {
        "all" | "exists" | "exists_one" | "existsOne" | "filter" => &[2],
        "map" => &[2, 3],
        _ => return Ok(None),
    };
    let variable = match arguments.first() {
        Some(Ast::Ident(name)) if counts.contains(&arguments.len()) => name.clone(),
        _ => {
            return Err(Refusal::new(
                "",
                format!("{function}() takes the name of a variable and an expression"),
            ));
        }
    };
    let result = || Ast::Ident(RESULT.to_owned());
    let literal = Ast::Literal;
    let one = |value: Ast| call("_+_", vec![result(), Ast::List(vec![value])]);
    let when = |condition: Ast, step: Ast| call("_?_:_", vec![condition, step, result()]);
    let last = arguments[arguments.len() - 1].clone();
    let (initial, condition, step, end) = match function {
        "all" => (
            literal(Value::Bool(true)),
            call("@not_strictly_false", vec![result()]),
            call("_&&_", vec![result(), last]),
            result(),
        ),
        "exists" => (
            literal(Value::Bool(false)),
            call("@not_strictly_false", vec![call("!_", vec![result()])]),
            call("_||_", vec![result(), last]),
            result(),
        ),
        "exists_one" | "existsOne" => (
            literal(Value::Int(0)),
            literal(Value::Bool(true)),
            when(last, call("_+_", vec![result(), literal(Value::Int(1))])),
            call("_==_", vec![result(), literal(Value::Int(1))]),
        ),
        "filter" => (
            Ast::List(Vec::new()),
            literal(Value::Bool(true)),
            when(last, one(Ast::Ident(variable.clone()))),
            result(),
        ),
        _ => {
            let step = match arguments {
                [_, condition, _] => when(condition.clone(), one(last)),
                _ => one(last),
            };
            (Ast::List(Vec::new()), literal(Value::Bool(true)), step, result())
        }
    };
    Ok(Some(Ast::Fold(Box::new(Fold {
        variable,
        range: target.clone(),
        accumulator: RESULT.to_owned(),
        initial,
        condition,
        step,
        result: end,
    }))))
}
