//! CEL's grammar: operators by precedence, literals, names, calls, macros.

use super::fold;
use super::{Ast, MAX_DEPTH, Value};
use crate::error::Refusal;

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Name(String),
    Literal(Value<'static>),
    Sign(&'static str),
    End,
}

/// Longer ones first.
const SIGNS: &[&str] = &[
    "&&", "||", "==", "!=", "<=", ">=", "<", ">", "!", "+", "-", "*", "/", "%", "?", ":", "(", ")", "[", "]",
    ".", ",", "{", "}",
];

fn wrong(at: usize, reason: &str) -> Refusal {
    Refusal::new("", format!("at byte {at} of the expression: {reason}"))
}

fn tokens(text: &str) -> Result<Vec<(Token, usize)>, Refusal> {
    let mut out = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start();
        while let Some(comment) = rest.strip_prefix("//") {
            rest = comment.find('\n').map_or("", |end| &comment[end..]).trim_start();
        }
        let at = text.len() - rest.len();
        let Some(first) = rest.chars().next() else {
            out.push((Token::End, at));
            return Ok(out);
        };
        let (token, length) = if let Some(found) = quoted(rest, at)? {
            found
        } else if first.is_ascii_digit() {
            number(rest, at)?
        } else if first.is_ascii_alphabetic() || first == '_' {
            let length = rest
                .find(|char: char| !(char.is_ascii_alphanumeric() || char == '_'))
                .unwrap_or(rest.len());
            let token = match &rest[..length] {
                "true" => Token::Literal(Value::Bool(true)),
                "false" => Token::Literal(Value::Bool(false)),
                "null" => Token::Literal(Value::Null),
                name => Token::Name(name.to_owned()),
            };
            (token, length)
        } else {
            let sign = SIGNS
                .iter()
                .find(|sign| rest.starts_with(**sign))
                .ok_or_else(|| wrong(at, &format!("{first:?} is not expected")))?;
            (Token::Sign(sign), sign.len())
        };
        out.push((token, at));
        rest = &rest[length..];
    }
}

/// A text or bytes, with the letters before that say whether it is raw (`r`) or bytes (`b`).
fn quoted(text: &str, at: usize) -> Result<Option<(Token, usize)>, Refusal> {
    let (mut raw, mut bytes, mut rest) = (false, false, text);
    loop {
        match rest.as_bytes().first() {
            Some(b'r' | b'R') if !raw => raw = true,
            Some(b'b' | b'B') if !bytes => bytes = true,
            Some(b'"' | b'\'') => break,
            _ => return Ok(None),
        }
        rest = &rest[1..];
    }
    let (value, length) = string(rest, raw, bytes, at)?;
    let token = if bytes {
        Value::Bytes(value.into())
    } else {
        // Escapes of texts are characters.
        let value = String::from_utf8(value).map_err(|_| wrong(at, "an escape is malformed"))?;
        Value::Text(value.into())
    };
    Ok(Some((Token::Literal(token), text.len() - rest.len() + length)))
}

fn string(text: &str, raw: bool, bytes: bool, at: usize) -> Result<(Vec<u8>, usize), Refusal> {
    let mark = &text[..1];
    let triple = [mark, mark, mark].concat();
    let (end, multiline) = if text.starts_with(&triple) {
        (&*triple, true)
    } else {
        (mark, false)
    };
    let malformed = || wrong(at, "an escape is malformed");
    let mut out = Vec::new();
    let mut rest = &text[end.len()..];
    loop {
        if let Some(after) = rest.strip_prefix(end) {
            return Ok((out, text.len() - after.len()));
        }
        let mut chars = rest.chars();
        let char = match chars.next() {
            Some('\n') if !multiline => None,
            other => other,
        };
        let Some(char) = char else {
            return Err(wrong(at, "the end of a text is missing"));
        };
        rest = chars.as_str();
        if char != '\\' || raw {
            out.extend(char.encode_utf8(&mut [0; 4]).bytes());
            continue;
        }
        let escape = chars.next().ok_or_else(malformed)?;
        rest = chars.as_str();
        let (digits, base) = match escape {
            'x' | 'X' => (2, 16),
            'u' => (4, 16),
            'U' => (8, 16),
            '0'..='3' => (3, 8),
            _ => (0, 0),
        };
        if digits == 0 {
            out.push(match escape {
                plain @ ('\\' | '"' | '\'' | '`' | '?') => plain as u8,
                'a' => 7,
                'b' => 8,
                't' => b'\t',
                'n' => b'\n',
                'v' => 11,
                'f' => 12,
                'r' => b'\r',
                _ => return Err(malformed()),
            });
            continue;
        }
        // Octal escapes have no letter.
        let from = if base == 8 {
            &text[text.len() - rest.len() - 1..]
        } else {
            rest
        };
        let code = from
            .get(..digits)
            .filter(|code| code.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .ok_or_else(malformed)?;
        let code = u32::from_str_radix(code, base).map_err(|_| malformed())?;
        rest = &from[digits..];
        match u8::try_from(code) {
            Ok(byte) if bytes && digits <= 3 => out.push(byte),
            _ if bytes && digits > 3 => return Err(malformed()),
            _ => {
                let char = char::from_u32(code).ok_or_else(malformed)?;
                out.extend(char.encode_utf8(&mut [0; 4]).bytes());
            }
        }
    }
}

fn number(text: &str, at: usize) -> Result<(Token, usize), Refusal> {
    let bad = || wrong(at, "a number is malformed or too large");
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let digits = hex
            .find(|char: char| !char.is_ascii_hexdigit())
            .unwrap_or(hex.len());
        let value = u64::from_str_radix(&hex[..digits], 16).map_err(|_| bad())?;
        let unsigned = hex[digits..].starts_with(['u', 'U']);
        let value = if unsigned {
            Value::Uint(value)
        } else {
            Value::Int(i64::try_from(value).map_err(|_| bad())?)
        };
        return Ok((Token::Literal(value), 2 + digits + usize::from(unsigned)));
    }
    let bytes = text.as_bytes();
    let digits = |from: usize| {
        bytes[from..]
            .iter()
            .position(|byte| !byte.is_ascii_digit())
            .map_or(bytes.len(), |count| from + count)
    };
    let mut end = digits(0);
    let mut real = false;
    if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
        real = true;
        end = digits(end + 1);
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
        if bytes.get(end + 1 + sign).is_some_and(u8::is_ascii_digit) {
            real = true;
            end = digits(end + 1 + sign);
        }
    }
    if real {
        let value = text[..end].parse().map_err(|_| bad())?;
        return Ok((Token::Literal(Value::Double(value)), end));
    }
    if matches!(bytes.get(end), Some(b'u' | b'U')) {
        let value = text[..end].parse().map_err(|_| bad())?;
        return Ok((Token::Literal(Value::Uint(value)), end + 1));
    }
    let value = text[..end].parse().map_err(|_| bad())?;
    Ok((Token::Literal(Value::Int(value)), end))
}

/// Binary operators by precedence, the weakest first, with CEL's names of their functions.
const LEVELS: &[&[(&str, &str)]] = &[
    &[("||", "_||_")],
    &[("&&", "_&&_")],
    &[
        ("==", "_==_"),
        ("!=", "_!=_"),
        ("<=", "_<=_"),
        (">=", "_>=_"),
        ("<", "_<_"),
        (">", "_>_"),
        ("in", "@in"),
    ],
    &[("+", "_+_"), ("-", "_-_")],
    &[("*", "_*_"), ("/", "_/_"), ("%", "_%_")],
];

struct Parser {
    tokens: Vec<(Token, usize)>,
    next: usize,
    depth: usize,
}

/// Parses an expression.
pub(super) fn parse(text: &str) -> Result<Ast, Refusal> {
    let mut parser = Parser {
        tokens: tokens(text)?,
        next: 0,
        depth: 0,
    };
    let ast = parser.ternary()?;
    match parser.peek() {
        Token::End => Ok(ast),
        _ => Err(parser.wrong("an operator is expected")),
    }
}

impl Parser {
    fn peek(&self) -> &Token {
        self.tokens.get(self.next).map_or(&Token::End, |(token, _)| token)
    }

    fn wrong(&self, reason: &str) -> Refusal {
        wrong(self.tokens.get(self.next).map_or(0, |(_, at)| *at), reason)
    }

    fn takes(&mut self, sign: &str) -> bool {
        let found = match self.peek() {
            Token::Sign(own) => *own == sign,
            Token::Name(name) => sign == "in" && name == "in",
            _ => false,
        };
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, sign: &str) -> Result<(), Refusal> {
        if self.takes(sign) {
            Ok(())
        } else {
            Err(self.wrong(&format!("{sign} is expected")))
        }
    }

    fn ternary(&mut self) -> Result<Ast, Refusal> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.wrong("the expression is nested too deeply"));
        }
        let condition = self.binary(0)?;
        let out = if self.takes("?") {
            let yes = self.ternary()?;
            self.expect(":")?;
            let no = self.ternary()?;
            Ast::Call(None, "_?_:_".into(), vec![condition, yes, no])
        } else {
            condition
        };
        self.depth -= 1;
        Ok(out)
    }

    fn binary(&mut self, level: usize) -> Result<Ast, Refusal> {
        let Some(operators) = LEVELS.get(level) else {
            return self.unary();
        };
        let mut left = self.binary(level + 1)?;
        while let Some((_, function)) = operators.iter().find(|(sign, _)| self.takes(sign)) {
            let right = self.binary(level + 1)?;
            left = Ast::Call(None, (*function).to_owned(), vec![left, right]);
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Ast, Refusal> {
        let mut signs = Vec::new();
        loop {
            if self.takes("!") {
                signs.push("!_");
            } else if self.takes("-") {
                signs.push("-_");
            } else {
                break;
            }
            if signs.len() > MAX_DEPTH {
                return Err(self.wrong("the expression is nested too deeply"));
            }
        }
        let operand = self.member()?;
        Ok(signs.into_iter().rev().fold(operand, |operand, sign| {
            Ast::Call(None, sign.into(), vec![operand])
        }))
    }

    fn member(&mut self) -> Result<Ast, Refusal> {
        let mut out = self.primary()?;
        loop {
            if self.takes(".") {
                let name = self.name()?;
                out = if self.takes("(") {
                    let arguments = self.list(")")?;
                    match fold::expand(&out, &name, &arguments)? {
                        Some(expanded) => expanded,
                        None => Ast::Call(Some(Box::new(out)), name, arguments),
                    }
                } else {
                    Ast::Select(Box::new(out), name, false)
                };
            } else if self.takes("[") {
                let index = self.ternary()?;
                self.expect("]")?;
                out = Ast::Call(None, "_[_]".into(), vec![out, index]);
            } else {
                return Ok(out);
            }
        }
    }

    fn name(&mut self) -> Result<String, Refusal> {
        match self.peek().clone() {
            Token::Name(name) => {
                self.next += 1;
                Ok(name)
            }
            _ => Err(self.wrong("a name is expected")),
        }
    }

    fn list(&mut self, end: &'static str) -> Result<Vec<Ast>, Refusal> {
        let mut out = Vec::new();
        while !self.takes(end) {
            if !out.is_empty() {
                self.expect(",")?;
                // CEL allows a comma after the last item of a list.
                if end == "]" && self.takes(end) {
                    break;
                }
            }
            out.push(self.ternary()?);
        }
        Ok(out)
    }

    /// What follows the `{` of a map.
    fn map(&mut self) -> Result<Ast, Refusal> {
        let mut entries = Vec::new();
        while !self.takes("}") {
            if !entries.is_empty() {
                self.expect(",")?;
                if self.takes("}") {
                    break;
                }
            }
            let key = self.ternary()?;
            self.expect(":")?;
            entries.push((key, self.ternary()?));
        }
        Ok(Ast::Map(entries))
    }

    fn primary(&mut self) -> Result<Ast, Refusal> {
        if self.takes("(") {
            let inner = self.ternary()?;
            self.expect(")")?;
            return Ok(inner);
        }
        if self.takes("[") {
            return self.list("]").map(Ast::List);
        }
        if self.takes("{") {
            return self.map();
        }
        // A leading dot says that the name is not relative to anything.
        self.takes(".");
        match self.peek().clone() {
            Token::Literal(value) => {
                self.next += 1;
                Ok(Ast::Literal(value))
            }
            Token::Name(name) if name != "in" => {
                self.next += 1;
                if !self.takes("(") {
                    return Ok(Ast::Ident(name));
                }
                let mut arguments = self.list(")")?;
                if name != "has" {
                    return Ok(Ast::Call(None, name, arguments));
                }
                match (arguments.len(), arguments.pop()) {
                    (1, Some(Ast::Select(operand, field, false))) => Ok(Ast::Select(operand, field, true)),
                    _ => Err(self.wrong("has() takes one field")),
                }
            }
            _ => Err(self.wrong("a value is expected")),
        }
    }
}
