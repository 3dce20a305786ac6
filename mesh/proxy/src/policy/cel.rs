//! CEL: conditions of access rules and filters of access logs, in the part of the language that Envoy documents for them.
//!
//! # What it is for
//! [`Expression`] is compiled when the configuration arrives, from text or from the parsed form that control planes send.
//! What is not known is refused then: attributes, functions, and attributes that are not there yet where the expression is
//! asked (`response.code` in an access rule). A regular expression must be a literal, so that it is compiled once, and so
//! must zones of time, which are offsets from UTC.
//!
//! # How data flows
//! ```text
//! text ──parse──▶ Ast ─┐
//! Expr ───────────────▶┴─compile─▶ Node ──evaluate(Scene, budget)──▶ true, false, or an error, which counts as false
//! ```
//!
//! # Limits
//! 8 KiB of text, 1,000 nodes, nesting of 64; an evaluation may take 10,000 steps, where handling a text costs a step for
//! every 64 bytes, and a list one for every 16 elements. Where an expression is asked at the end of a request, header fields
//! are found by literal names only, because only these are kept until then. Macros over lists and maps cost what their
//! elements cost; one that is cut off by the budget makes the whole expression false. Messages are not made.

mod eval;
mod fold;
mod functions;
mod parse;
mod scene;
#[cfg(test)]
mod tests;
mod time;

use http::HeaderName;
use serin_xds::pb::google::api::expr::v1alpha1 as pb;

use self::eval::{Folding, Node};
use self::fold::Fold;
use crate::error::Refusal;
use crate::observe::record::Side;

pub use self::eval::{Scene, Value};

/// Bytes of an expression at most.
const MAX_TEXT: usize = 8 << 10;
/// Nodes of an expression at most.
const MAX_NODES: usize = 1000;
/// Nesting at most.
const MAX_DEPTH: usize = 64;

/// What an expression may ask of a request or connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are the attributes'
pub enum Attribute {
    RequestPath,
    RequestUrlPath,
    RequestHost,
    RequestScheme,
    RequestMethod,
    RequestReferer,
    RequestUserAgent,
    RequestId,
    RequestQuery,
    RequestProtocol,
    RequestTime,
    RequestDuration,
    RequestSize,
    ResponseCode,
    ResponseCodeDetails,
    ResponseGrpcStatus,
    ResponseSize,
    ResponseBackendLatency,
    SourceAddress,
    SourcePort,
    DestinationAddress,
    DestinationPort,
    ConnectionId,
    ConnectionMtls,
    ConnectionServerName,
    ConnectionTlsVersion,
    ConnectionSubjectPeer,
    ConnectionDnsSanPeer,
    ConnectionUriSanPeer,
    ConnectionTermination,
    ConnectionFailure,
    UpstreamAddress,
    UpstreamPort,
    UpstreamLocalAddress,
    UpstreamAttempts,
    UpstreamFailure,
    ClusterName,
    RouteName,
    Metadata,
    FilterState,
}

/// Attributes by name, and whether they are known only at the end of a request.
const ATTRIBUTES: &[(&str, Attribute, bool)] = &[
    ("request.path", Attribute::RequestPath, false),
    ("request.url_path", Attribute::RequestUrlPath, false),
    ("request.host", Attribute::RequestHost, false),
    ("request.scheme", Attribute::RequestScheme, false),
    ("request.method", Attribute::RequestMethod, false),
    ("request.referer", Attribute::RequestReferer, false),
    ("request.useragent", Attribute::RequestUserAgent, false),
    ("request.id", Attribute::RequestId, false),
    ("request.query", Attribute::RequestQuery, false),
    ("request.protocol", Attribute::RequestProtocol, true),
    ("request.time", Attribute::RequestTime, true),
    ("request.duration", Attribute::RequestDuration, true),
    ("request.size", Attribute::RequestSize, true),
    ("response.code", Attribute::ResponseCode, true),
    ("response.code_details", Attribute::ResponseCodeDetails, true),
    ("response.grpc_status", Attribute::ResponseGrpcStatus, true),
    ("response.size", Attribute::ResponseSize, true),
    (
        "response.backend_latency",
        Attribute::ResponseBackendLatency,
        true,
    ),
    ("source.address", Attribute::SourceAddress, false),
    ("source.port", Attribute::SourcePort, false),
    ("destination.address", Attribute::DestinationAddress, false),
    ("destination.port", Attribute::DestinationPort, false),
    ("connection.id", Attribute::ConnectionId, true),
    ("connection.mtls", Attribute::ConnectionMtls, false),
    (
        "connection.requested_server_name",
        Attribute::ConnectionServerName,
        false,
    ),
    ("connection.tls_version", Attribute::ConnectionTlsVersion, true),
    (
        "connection.subject_peer_certificate",
        Attribute::ConnectionSubjectPeer,
        false,
    ),
    (
        "connection.dns_san_peer_certificate",
        Attribute::ConnectionDnsSanPeer,
        false,
    ),
    (
        "connection.uri_san_peer_certificate",
        Attribute::ConnectionUriSanPeer,
        false,
    ),
    (
        "connection.termination_details",
        Attribute::ConnectionTermination,
        true,
    ),
    (
        "connection.transport_failure_reason",
        Attribute::ConnectionFailure,
        true,
    ),
    ("upstream.address", Attribute::UpstreamAddress, true),
    ("upstream.port", Attribute::UpstreamPort, true),
    ("upstream.local_address", Attribute::UpstreamLocalAddress, true),
    (
        "upstream.request_attempt_count",
        Attribute::UpstreamAttempts,
        true,
    ),
    (
        "upstream.transport_failure_reason",
        Attribute::UpstreamFailure,
        true,
    ),
    ("xds.cluster_name", Attribute::ClusterName, true),
    ("xds.route_name", Attribute::RouteName, true),
];

impl Attribute {
    /// The attribute of that name, and whether it is known only at the end of a request.
    pub(crate) fn find(name: &str) -> Option<(Self, bool)> {
        let found = ATTRIBUTES.iter().find(|(own, ..)| *own == name);
        found.map(|(_, attribute, at_end)| (*attribute, *at_end))
    }
}

/// The parsed form of an expression.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ast {
    /// A literal.
    Literal(Value<'static>),
    /// A name.
    Ident(String),
    /// A field; `true` asks whether there is one.
    Select(Box<Ast>, String, bool),
    /// A function, by CEL's names (`_&&_`), with its target.
    Call(Option<Box<Ast>>, String, Vec<Ast>),
    /// A list.
    List(Vec<Ast>),
    /// A map.
    Map(Vec<(Ast, Ast)>),
    /// A comprehension, which is what a macro stands for.
    Fold(Box<Fold>),
}

/// A compiled expression.
#[derive(Debug)]
pub struct Expression(Node);

/// Gives the place of a field that is to be kept.
pub(crate) type Keep<'a> = dyn FnMut(Side, HeaderName) -> usize + 'a;

/// What is known while compiling.
struct Compiler<'a, 'b> {
    /// Where the expression is asked at the end of a request: how header fields are kept until then.
    keep: Option<&'a mut Keep<'b>>,
    nodes: usize,
    /// Variables of the comprehensions around, the innermost last.
    variables: Vec<String>,
}

impl Expression {
    /// Compiles text. With `keep` it is asked at the end of a request, otherwise while the request passes.
    pub(crate) fn parse(text: &str, keep: Option<&mut Keep<'_>>) -> Result<Self, Refusal> {
        if text.len() > MAX_TEXT {
            return Err(Refusal::new(
                "",
                format!("the expression is longer than {MAX_TEXT} bytes"),
            ));
        }
        Self::compile(&parse::parse(text)?, keep)
    }

    /// Compiles the parsed form.
    pub(crate) fn of_message(from: &pb::Expr, keep: Option<&mut Keep<'_>>) -> Result<Self, Refusal> {
        Self::compile(&read(from, 0)?, keep)
    }

    fn compile(ast: &Ast, keep: Option<&mut Keep<'_>>) -> Result<Self, Refusal> {
        let mut compiler = Compiler {
            keep,
            nodes: 0,
            variables: Vec::new(),
        };
        compiler.node(ast, 0).map(Self)
    }

    /// Whether the expression is true; an error is not.
    pub fn holds(&self, scene: &dyn Scene) -> bool {
        eval::holds(&self.0, scene)
    }
}

/// The parsed form as messages have it.
fn read(from: &pb::Expr, depth: usize) -> Result<Ast, Refusal> {
    use pb::constant::ConstantKind;
    use pb::expr::ExprKind;
    if depth > MAX_DEPTH {
        return Err(Refusal::new("", "the expression is nested too deeply"));
    }
    let inner = |from: &Option<Box<pb::Expr>>| match from {
        Some(from) => read(from, depth + 1),
        None => Err(Refusal::new("", "a part of the expression is missing")),
    };
    let all = |list: &[pb::Expr]| {
        list.iter()
            .map(|from| read(from, depth + 1))
            .collect::<Result<Vec<_>, _>>()
    };
    Ok(match &from.expr_kind {
        Some(ExprKind::ConstExpr(constant)) => Ast::Literal(match &constant.constant_kind {
            Some(ConstantKind::NullValue(_)) | None => Value::Null,
            Some(ConstantKind::BoolValue(value)) => Value::Bool(*value),
            Some(ConstantKind::Int64Value(value)) => Value::Int(*value),
            Some(ConstantKind::Uint64Value(value)) => Value::Uint(*value),
            Some(ConstantKind::DoubleValue(value)) => Value::Double(*value),
            Some(ConstantKind::StringValue(value)) => Value::Text(value.clone().into()),
            Some(ConstantKind::DurationValue(value)) => Value::Duration(
                value
                    .seconds
                    .saturating_mul(1_000_000_000)
                    .saturating_add(i64::from(value.nanos)),
            ),
            Some(ConstantKind::TimestampValue(value)) => Value::Timestamp(
                value
                    .seconds
                    .saturating_mul(1_000_000_000)
                    .saturating_add(i64::from(value.nanos)),
            ),
            Some(ConstantKind::BytesValue(value)) => Value::Bytes(value.clone().into()),
        }),
        Some(ExprKind::IdentExpr(ident)) => Ast::Ident(ident.name.clone()),
        Some(ExprKind::SelectExpr(select)) => Ast::Select(
            Box::new(inner(&select.operand)?),
            select.field.clone(),
            select.test_only,
        ),
        Some(ExprKind::CallExpr(call)) => Ast::Call(
            match &call.target {
                None => None,
                target => Some(Box::new(inner(target)?)),
            },
            call.function.clone(),
            all(&call.args)?,
        ),
        Some(ExprKind::ListExpr(list)) => Ast::List(all(&list.elements)?),
        Some(ExprKind::StructExpr(message)) if message.message_name.is_empty() => {
            use pb::expr::create_struct::entry::KeyKind;
            let entries = message.entries.iter().map(|entry| {
                let missing = || Refusal::new("", "a part of the expression is missing");
                let key = match &entry.key_kind {
                    Some(KeyKind::MapKey(key)) => read(key, depth + 1)?,
                    Some(KeyKind::FieldKey(_)) | None => return Err(missing()),
                };
                let value = entry.value.as_ref().ok_or_else(missing)?;
                Ok((key, read(value, depth + 1)?))
            });
            Ast::Map(entries.collect::<Result<_, Refusal>>()?)
        }
        Some(ExprKind::StructExpr(message)) => {
            return Err(Refusal::new(
                "",
                format!("messages ({}) are not supported", message.message_name),
            ));
        }
        Some(ExprKind::ComprehensionExpr(fold)) => {
            if !fold.iter_var2.is_empty() {
                return Err(Refusal::new(
                    "",
                    "comprehensions with two variables are not supported",
                ));
            }
            Ast::Fold(Box::new(Fold {
                variable: fold.iter_var.clone(),
                range: inner(&fold.iter_range)?,
                accumulator: fold.accu_var.clone(),
                initial: inner(&fold.accu_init)?,
                condition: inner(&fold.loop_condition)?,
                step: inner(&fold.loop_step)?,
                result: inner(&fold.result)?,
            }))
        }
        None => return Err(Refusal::new("", "a part of the expression is missing")),
    })
}

/// `a.b.c` of an expression that is nothing but names.
fn dotted(ast: &Ast) -> Option<String> {
    match ast {
        Ast::Ident(name) => Some(name.trim_start_matches('.').to_owned()),
        Ast::Select(operand, field, false) => Some(format!("{}.{field}", dotted(operand)?)),
        _ => None,
    }
}

/// What a field of a request is that HTTP/1 has in its first line, by the name that HTTP/2 gives it.
fn pseudo(name: &str) -> Option<Attribute> {
    match name {
        ":path" => Some(Attribute::RequestPath),
        ":method" => Some(Attribute::RequestMethod),
        ":authority" => Some(Attribute::RequestHost),
        ":scheme" => Some(Attribute::RequestScheme),
        _ => None,
    }
}

/// Whose header fields a name means.
fn headers(name: &str) -> Option<Side> {
    match name {
        "request.headers" => Some(Side::Request),
        "response.headers" => Some(Side::Response),
        "response.trailers" => Some(Side::Trailers),
        _ => None,
    }
}

impl Compiler<'_, '_> {
    fn node(&mut self, ast: &Ast, depth: usize) -> Result<Node, Refusal> {
        self.nodes += 1;
        if depth > MAX_DEPTH || self.nodes > MAX_NODES {
            return Err(Refusal::new("", "the expression is too large"));
        }
        match ast {
            Ast::Literal(value) => Ok(Node::Literal(value.clone())),
            Ast::List(items) => items
                .iter()
                .map(|item| self.node(item, depth + 1))
                .collect::<Result<_, _>>()
                .map(Node::List),
            Ast::Map(entries) => entries
                .iter()
                .map(|(key, value)| Ok((self.node(key, depth + 1)?, self.node(value, depth + 1)?)))
                .collect::<Result<_, _>>()
                .map(Node::Map),
            Ast::Fold(fold) => self.fold(fold, depth),
            Ast::Ident(_) | Ast::Select(..) => self.name(ast, depth),
            Ast::Call(target, function, arguments) => {
                if let Some(found) = self.header_call(function, arguments, depth)? {
                    return Ok(found);
                }
                let mut all = Vec::with_capacity(arguments.len() + 1);
                for argument in target.as_deref().into_iter().chain(arguments) {
                    all.push(self.node(argument, depth + 1)?);
                }
                functions::call(function, target.is_some(), all)
            }
        }
    }

    fn fold(&mut self, fold: &Fold, depth: usize) -> Result<Node, Refusal> {
        let range = match dotted(&fold.range).filter(|name| !self.is_variable(name)) {
            Some(name) if headers(&name).is_some() => self.all_headers(&name)?,
            _ => self.node(&fold.range, depth + 1)?,
        };
        let initial = self.node(&fold.initial, depth + 1)?;
        self.variables.push(fold.accumulator.clone());
        let result = self.node(&fold.result, depth + 1)?;
        self.variables.push(fold.variable.clone());
        let condition = self.node(&fold.condition, depth + 1)?;
        let step = self.node(&fold.step, depth + 1)?;
        self.variables.truncate(self.variables.len() - 2);
        Ok(Node::Fold(Box::new(Folding {
            range,
            initial,
            condition,
            step,
            result,
        })))
    }

    /// Every header field, where all of them are at hand.
    fn all_headers(&self, name: &str) -> Result<Node, Refusal> {
        if self.keep.is_none() && headers(name) == Some(Side::Request) {
            return Ok(Node::AllHeaders);
        }
        Err(Refusal::new(
            "",
            format!(
                "{name} can be asked for one field only, by a literal name, where this expression is asked"
            ),
        ))
    }

    /// Whether a dotted name begins with the name of a variable.
    fn is_variable(&self, name: &str) -> bool {
        let first = name.split('.').next().unwrap_or_default();
        self.variables.iter().any(|own| own == first)
    }

    /// `request.headers["x"]` and `"x" in request.headers`.
    fn header_call(
        &mut self,
        function: &str,
        arguments: &[Ast],
        depth: usize,
    ) -> Result<Option<Node>, Refusal> {
        let (map, name, test) = match (function, arguments) {
            ("_[_]", [map, name]) => (map, name, false),
            ("@in" | "in" | "_in_", [name, map]) => (map, name, true),
            _ => return Ok(None),
        };
        let whole = dotted(map).filter(|name| !self.is_variable(name));
        let Some(side) = whole.as_deref().and_then(headers) else {
            return Ok(None);
        };
        match name {
            Ast::Literal(Value::Text(name)) => self.header(side, name, test).map(Some),
            _ if self.keep.is_none() && side == Side::Request => {
                let name = self.node(name, depth + 1)?;
                Ok(Some(Node::NamedHeader(Box::new(name), test)))
            }
            _ => Err(Refusal::new("", "the name of a header field must be a literal")),
        }
    }

    fn header(&mut self, side: Side, name: &str, test: bool) -> Result<Node, Refusal> {
        if let Some(attribute) = pseudo(name).filter(|_| side == Side::Request) {
            return Ok(Node::Attribute(attribute, test));
        }
        let name = HeaderName::from_bytes(name.to_ascii_lowercase().as_bytes())
            .map_err(|_| Refusal::new("", format!("{name:?} is not a header name")))?;
        let place = match &mut self.keep {
            Some(keep) => keep(side, name.clone()),
            None if side != Side::Request => {
                return Err(Refusal::new(
                    "",
                    "there is no response yet where this expression is asked",
                ));
            }
            None => 0,
        };
        Ok(Node::Header(side, name, place, test))
    }

    fn name(&mut self, ast: &Ast, depth: usize) -> Result<Node, Refusal> {
        if let Ast::Ident(name) = ast
            && let Some(place) = self.variables.iter().rev().position(|own| own == name)
        {
            return Ok(Node::Variable(place));
        }
        if let Ast::Select(operand, field, test) = ast
            && dotted(operand).is_some_and(|name| self.is_variable(&name))
        {
            let operand = self.node(operand, depth + 1)?;
            return Ok(Node::Field(Box::new(operand), field.as_str().into(), *test));
        }
        if let Some(name) = dotted(ast) {
            if let Some((_, attribute, late)) = ATTRIBUTES.iter().find(|(known, ..)| *known == name) {
                if *late && self.keep.is_none() {
                    return Err(Refusal::new(
                        "",
                        format!("{name} is not known yet where this expression is asked"),
                    ));
                }
                if self.keep.is_some() {
                    match attribute {
                        Attribute::RequestReferer => return self.header(Side::Request, "referer", false),
                        Attribute::RequestUserAgent => {
                            return self.header(Side::Request, "user-agent", false);
                        }
                        _ => {}
                    }
                }
                return Ok(Node::Attribute(*attribute, false));
            }
            if name == "metadata" || name == "metadata.filter_metadata" {
                return Ok(Node::Attribute(Attribute::Metadata, false));
            }
            if name == "filter_state" {
                return Ok(Node::Attribute(Attribute::FilterState, false));
            }
            if headers(&name).is_some() {
                return Err(Refusal::new(
                    "",
                    format!("{name} can be asked for one field only, by a literal name"),
                ));
            }
        }
        if let Ast::Select(operand, field, test) = ast {
            match dotted(operand) {
                Some(name) => {
                    if let Some(side) = headers(&name) {
                        return self.header(side, field, *test);
                    }
                    if *test {
                        let whole = format!("{name}.{field}");
                        if let Some((_, attribute, _)) = ATTRIBUTES.iter().find(|(known, ..)| *known == whole)
                        {
                            return Ok(Node::Attribute(*attribute, true));
                        }
                    }
                    if name != "metadata" && name != "filter_state" && !name.starts_with("metadata.") {
                        return Err(unknown(&format!("{name}.{field}")));
                    }
                }
                None if matches!(**operand, Ast::Literal(_)) => return Err(unknown(field)),
                None => {}
            }
            let operand = self.node(operand, depth + 1)?;
            return Ok(Node::Field(Box::new(operand), field.as_str().into(), *test));
        }
        Err(unknown(&dotted(ast).unwrap_or_default()))
    }
}

fn unknown(name: &str) -> Refusal {
    Refusal::new("", format!("the attribute {name:?} is not supported"))
}
