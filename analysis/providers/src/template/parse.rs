//! Text to nodes.

use super::value::FUNCTIONS;
use crate::Error;

/// Nesting that is followed; templates are written by people.
const DEPTH_MAX: usize = 32;

#[derive(Debug)]
pub(super) enum Node {
    Text(String),
    Action(Pipeline),
    If {
        branches: Vec<(Pipeline, Vec<Node>)>,
        otherwise: Vec<Node>,
    },
}

/// Commands of which each gets the value of the one before as its last argument.
pub(super) type Pipeline = Vec<Vec<Operand>>;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Operand {
    /// A function, and fields of what it yields.
    Name(String, Vec<String>),
    Text(String),
    Integer(i64),
    Boolean(bool),
    Nested(Pipeline),
}

/// What stands between two braces, or around them.
enum Piece<'a> {
    Text(&'a str),
    Action(&'a str, usize),
}

pub(super) fn parse(template: &str) -> Result<Vec<Node>, Error> {
    let pieces = pieces(template)?;
    let mut rest = pieces.iter();
    let (nodes, ended) = block(&mut rest, template, 0)?;
    match ended {
        Stop::Text => Ok(nodes),
        Stop::Else(_, at) | Stop::End(at) => Err(fault(template, at, "else or end without an if")),
    }
}

fn fault(template: &str, at: usize, reason: impl std::fmt::Display) -> Error {
    let line = template[..at.min(template.len())].matches('\n').count() + 1;
    Error::Query(format!("line {line}: {reason}"))
}

/// Splits at the braces, cutting white space and comments as the language says.
fn pieces(template: &str) -> Result<Vec<Piece<'_>>, Error> {
    let mut pieces = Vec::new();
    let mut at = 0;
    let mut trim_next = false;
    loop {
        let rest = &template[at..];
        let open = rest.find("{{");
        let mut text = &rest[..open.unwrap_or(rest.len())];
        if trim_next {
            text = text.trim_start();
        }
        let Some(open) = open else {
            pieces.push(Piece::Text(text));
            return Ok(pieces);
        };
        let mut inside = at + open + 2;
        let dashed = template[inside..].strip_prefix('-');
        if dashed.is_some_and(|after| after.starts_with(char::is_whitespace)) {
            inside += 1;
            text = text.trim_end();
        }
        pieces.push(Piece::Text(text));
        let body_start = template[inside..].trim_start();
        let close = if body_start.starts_with("/*") {
            let start = template.len() - body_start.len();
            let end = template[start..]
                .find("*/")
                .ok_or_else(|| fault(template, start, "a comment is not closed"))?;
            let after = start + end + 2;
            let tail = template[after..].trim_start();
            let dash = usize::from(tail.starts_with("-}}"));
            if !tail[dash..].starts_with("}}") {
                return Err(fault(
                    template,
                    after,
                    "a comment must stand alone between its braces",
                ));
            }
            trim_next = dash == 1;
            template.len() - tail.len() + dash
        } else {
            let close = inside
                + close(&template[inside..]).ok_or_else(|| {
                    fault(
                        template,
                        inside,
                        "an action is not closed by }}, or a string in it",
                    )
                })?;
            let body = &template[inside..close];
            let trimmed = body
                .strip_suffix('-')
                .filter(|body| body.ends_with(char::is_whitespace));
            trim_next = trimmed.is_some();
            pieces.push(Piece::Action(trimmed.unwrap_or(body), inside));
            close
        };
        at = close + 2;
    }
}

/// Where `}}` stands outside of strings.
fn close(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut quote = None;
    let mut index = 0;
    while index < bytes.len() {
        match (quote, bytes[index]) {
            (Some(b'"'), b'\\') => index += 1,
            (Some(open), byte) if byte == open => quote = None,
            (Some(_), _) => {}
            (None, b'"' | b'`') => quote = Some(bytes[index]),
            (None, b'}') if bytes.get(index + 1) == Some(&b'}') => return Some(index),
            (None, _) => {}
        }
        index += 1;
    }
    None
}

enum Stop<'a> {
    Text,
    /// With what stands after `else`.
    Else(&'a str, usize),
    End(usize),
}

fn block<'a>(
    pieces: &mut std::slice::Iter<'_, Piece<'a>>,
    template: &str,
    depth: usize,
) -> Result<(Vec<Node>, Stop<'a>), Error> {
    let mut nodes = Vec::new();
    while let Some(piece) = pieces.next() {
        match piece {
            Piece::Text(text) => nodes.push(Node::Text((*text).to_owned())),
            Piece::Action(body, at) => {
                let body = body.trim();
                let (word, rest) = body
                    .split_once(|c: char| !c.is_alphanumeric() && c != '_')
                    .map_or((body, ""), |(word, _)| (word, &body[word.len()..]));
                match word {
                    "if" => nodes.push(condition(pieces, template, rest, *at, depth + 1)?),
                    "else" => return Ok((nodes, Stop::Else(rest.trim(), *at))),
                    "end" => return Ok((nodes, Stop::End(*at))),
                    "range" | "with" | "define" | "template" | "block" | "break" | "continue" => {
                        return Err(fault(
                            template,
                            *at,
                            format!("{word} is not there; queries know if, else and end"),
                        ));
                    }
                    _ => nodes.push(Node::Action(
                        expression(body).map_err(|reason| fault(template, *at, reason))?,
                    )),
                }
            }
        }
    }
    Ok((nodes, Stop::Text))
}

fn condition(
    pieces: &mut std::slice::Iter<'_, Piece<'_>>,
    template: &str,
    first: &str,
    at: usize,
    depth: usize,
) -> Result<Node, Error> {
    if depth > DEPTH_MAX {
        return Err(fault(template, at, "ifs are nested too deeply"));
    }
    let mut branches = Vec::new();
    let mut test = expression(first).map_err(|reason| fault(template, at, reason))?;
    loop {
        let (body, ended) = block(pieces, template, depth)?;
        branches.push((test, body));
        match ended {
            Stop::End(_) => {
                return Ok(Node::If {
                    branches,
                    otherwise: Vec::new(),
                });
            }
            Stop::Text => return Err(fault(template, at, "an if has no end")),
            Stop::Else("", else_at) => {
                let (otherwise, ended) = block(pieces, template, depth)?;
                return match ended {
                    Stop::End(_) => Ok(Node::If { branches, otherwise }),
                    Stop::Text => Err(fault(template, at, "an if has no end")),
                    Stop::Else(..) => Err(fault(template, else_at, "something follows the else of an if")),
                };
            }
            Stop::Else(rest, at) => {
                let rest = rest
                    .strip_prefix("if")
                    .filter(|rest| rest.starts_with(|c: char| !c.is_alphanumeric()))
                    .ok_or_else(|| fault(template, at, "else is followed by if or by nothing"))?;
                test = expression(rest).map_err(|reason| fault(template, at, reason))?;
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Field(String),
    Text(String),
    Integer(i64),
    Open,
    Close,
    Pipe,
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let token = match c {
            c if c.is_whitespace() => continue,
            '(' => Token::Open,
            ')' => Token::Close,
            '|' => Token::Pipe,
            '`' => {
                let rest = &text[at + 1..];
                let end = rest.find('`').ok_or("a raw string is not closed")?;
                while chars.next_if(|(index, _)| *index <= at + 1 + end).is_some() {}
                Token::Text(rest[..end].to_owned())
            }
            '"' => Token::Text(string(&mut chars)?),
            '.' => {
                let glued = at > 0 && !text[..at].ends_with(char::is_whitespace);
                let mut name = String::new();
                while let Some((_, c)) = chars.next_if(|(_, c)| c.is_alphanumeric() || *c == '_') {
                    name.push(c);
                }
                if !glued || name.is_empty() {
                    return Err(format!(
                        "{:?} has no meaning here: a query has no dot, only functions",
                        &text[at..]
                    ));
                }
                Token::Field(name)
            }
            c if c.is_ascii_digit() || c == '-' || c == '+' => {
                let mut number = String::from(c);
                while let Some((_, c)) = chars.next_if(|(_, c)| c.is_alphanumeric() || *c == '.' || *c == '_')
                {
                    number.push(c);
                }
                Token::Integer(
                    number
                        .parse()
                        .map_err(|_| format!("{number} is not an integer; write it as a string"))?,
                )
            }
            c if c.is_alphabetic() || c == '_' => {
                let mut word = String::from(c);
                while let Some((_, c)) = chars.next_if(|(_, c)| c.is_alphanumeric() || *c == '_') {
                    word.push(c);
                }
                Token::Word(word)
            }
            '$' => return Err("variables of the template language ($) are not there".to_owned()),
            c => return Err(format!("{c:?} has no meaning here")),
        };
        tokens.push(token);
    }
    Ok(tokens)
}

fn string(chars: &mut std::iter::Peekable<std::str::CharIndices<'_>>) -> Result<String, String> {
    let mut out = String::new();
    while let Some((_, c)) = chars.next() {
        match c {
            '"' => return Ok(out),
            '\n' => break,
            '\\' => {
                let (_, escaped) = chars.next().ok_or("a string is not closed")?;
                out.push(match escaped {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    '"' | '\\' | '\'' => escaped,
                    other => return Err(format!("the escape \\{other} is not there")),
                });
            }
            c => out.push(c),
        }
    }
    Err("a string is not closed".to_owned())
}

fn expression(text: &str) -> Result<Pipeline, String> {
    let tokens = tokens(text)?;
    let mut rest = tokens.as_slice();
    let pipeline = commands(&mut rest, 0)?;
    if rest.is_empty() {
        Ok(pipeline)
    } else {
        Err("a ) has no (".to_owned())
    }
}

/// Up to the end or to a `)`, which is left.
fn commands(rest: &mut &[Token], depth: usize) -> Result<Pipeline, String> {
    if depth > DEPTH_MAX {
        return Err("parentheses are nested too deeply".to_owned());
    }
    let mut pipeline = Vec::new();
    let mut command = Vec::new();
    loop {
        let end = matches!(rest.first(), None | Some(Token::Close));
        if end || rest.first() == Some(&Token::Pipe) {
            if command.is_empty() {
                return Err("a command is empty".to_owned());
            }
            pipeline.push(std::mem::take(&mut command));
            if end {
                return Ok(pipeline);
            }
            *rest = &rest[1..];
            continue;
        }
        let token = rest[0].clone();
        *rest = &rest[1..];
        command.push(match token {
            Token::Text(text) => Operand::Text(text),
            Token::Integer(number) => Operand::Integer(number),
            Token::Word(word) if word == "true" || word == "false" => Operand::Boolean(word == "true"),
            Token::Word(word) if !FUNCTIONS.contains(&word.as_str()) => {
                return Err(format!(
                    "there is no function {word:?}; there are {}",
                    FUNCTIONS.join(", ")
                ));
            }
            Token::Word(word) => {
                let mut fields = Vec::new();
                while let Some(Token::Field(field)) = rest.first() {
                    fields.push(field.clone());
                    *rest = &rest[1..];
                }
                Operand::Name(word, fields)
            }
            Token::Open => {
                let nested = commands(rest, depth + 1)?;
                match rest.split_first() {
                    Some((Token::Close, after)) => *rest = after,
                    _ => return Err("a ( has no )".to_owned()),
                }
                Operand::Nested(nested)
            }
            Token::Field(field) => {
                return Err(format!(
                    "the field .{field} stands after something without fields"
                ));
            }
            // Handled above; named so that a new token has to be thought of.
            Token::Close | Token::Pipe => return Err("a command is empty".to_owned()),
        });
    }
}
