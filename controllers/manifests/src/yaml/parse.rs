//! From tokens to a tree: anchors are expanded, merge keys applied, budgets kept.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::error::{Error, Place};
use crate::limits::Limits;
use crate::resolve::{self, Dialect, Plain};
use crate::value::{Pos, Scalar, Seq, Style, Tag, Value};
use crate::yaml::map_builder::MapBuilder;
use crate::yaml::scan::{DEPTH_MESSAGE, Mark, ScanError, Scanner, Token, TokenKind};

/// How a text is to be read.
#[derive(Clone, Debug)]
pub struct ReadOptions<'a> {
    /// The file's name, for messages.
    pub file: &'a str,
    /// Lines before the text in its file, for messages.
    pub line_offset: usize,
    /// Which scalars are booleans, and whether a repeated key is an error (kustomize) or overrides (kubectl).
    pub dialect: Dialect,
    /// Budgets.
    pub limits: &'a Limits,
}

/// Reads the first document of a text. `None` when it is empty or null.
pub fn parse_document(text: &str, options: &ReadOptions<'_>) -> Result<Option<Value>, Error> {
    let mut parser = Parser::new(text, options)?;
    let value = parser.document().map_err(|e| parser.error(e))?;
    Ok(value.filter(|v| !v.is_null()))
}

pub(super) enum Fault {
    Scan(ScanError),
    Duplicate {
        key: String,
        first_line: usize,
        mark: Mark,
    },
    Budget {
        budget: &'static str,
        what: String,
        limit: usize,
        mark: Mark,
    },
}

impl From<ScanError> for Fault {
    fn from(e: ScanError) -> Fault {
        Fault::Scan(e)
    }
}

pub(super) fn fault<T>(message: impl Into<Cow<'static, str>>, mark: Mark) -> Result<T, Fault> {
    Err(Fault::Scan(ScanError::new(message, mark)))
}

struct Parser<'a> {
    text: &'a str,
    options: &'a ReadOptions<'a>,
    scanner: Scanner<'a>,
    /// Finished anchors; `None` while the anchored node is being read.
    anchors: HashMap<&'a str, Option<Value>>,
    tag_handles: HashMap<String, String>,
    nodes: usize,
    aliases: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str, options: &'a ReadOptions<'a>) -> Result<Parser<'a>, Error> {
        if text.len() > options.limits.max_file_bytes {
            return Err(Error::Budget {
                budget: "bytes",
                what: format!("{} bytes in one file", text.len()),
                limit: options.limits.max_file_bytes,
                place: Place {
                    file: options.file.to_owned(),
                    ..Place::default()
                },
            });
        }
        let parser = Parser {
            text,
            options,
            scanner: Scanner::new(text, options.limits.max_depth),
            anchors: HashMap::new(),
            tag_handles: HashMap::new(),
            nodes: 0,
            aliases: 0,
            depth: 0,
        };
        if let Some(at) = find_control_character(text) {
            let before = &text[..at];
            let line = before.matches('\n').count();
            let column = before.len() - before.rfind('\n').map_or(0, |i| i + 1);
            let mark = Mark {
                index: at,
                line,
                column,
            };
            return Err(parser.error(Fault::Scan(ScanError::new(
                "control characters are not allowed",
                mark,
            ))));
        }
        Ok(parser)
    }

    fn place(&self, mark: Mark) -> Place {
        let mut place = Place::in_text(self.options.file, self.text, mark.line + 1, mark.column + 1);
        place.line += self.options.line_offset;
        place
    }

    fn error(&self, fault: Fault) -> Error {
        match fault {
            Fault::Scan(e) if e.message == DEPTH_MESSAGE => Error::Budget {
                budget: "depth",
                what: "the nesting of this document".into(),
                limit: self.options.limits.max_depth,
                place: self.place(e.mark),
            },
            Fault::Scan(e) => Error::Syntax {
                message: e.message.into_owned(),
                place: self.place(e.mark),
            },
            Fault::Duplicate {
                key,
                first_line,
                mark,
            } => Error::DuplicateKey {
                key,
                first_line: first_line + self.options.line_offset,
                place: self.place(mark),
            },
            Fault::Budget {
                budget,
                what,
                limit,
                mark,
            } => Error::Budget {
                budget,
                what,
                limit,
                place: self.place(mark),
            },
        }
    }

    fn pos(&self, mark: Mark) -> Pos {
        Pos::new(mark.line + 1 + self.options.line_offset, mark.column + 1)
    }

    fn document(&mut self) -> Result<Option<Value>, Fault> {
        while matches!(self.scanner.peek()?.kind, TokenKind::DocumentEnd) {
            self.scanner.next()?;
        }
        let mut explicit = false;
        loop {
            let token = self.scanner.peek()?;
            let mark = token.mark;
            match &token.kind {
                TokenKind::StreamEnd if !explicit => return Ok(None),
                TokenKind::StreamEnd => return fault("did not find expected <document start>", mark),
                TokenKind::Directive(line) => {
                    let line = line.clone().into_owned();
                    self.directive(&line, mark)?;
                    self.scanner.next()?;
                    explicit = true;
                }
                TokenKind::DocumentStart => {
                    self.scanner.next()?;
                    break;
                }
                _ if explicit => return fault("did not find expected <document start>", mark),
                _ => break,
            }
        }
        let token = self.scanner.peek()?;
        match token.kind {
            TokenKind::Directive(_)
            | TokenKind::DocumentStart
            | TokenKind::DocumentEnd
            | TokenKind::StreamEnd => {
                return Ok(None);
            }
            _ => {}
        }
        let value = self.node(true, false)?;
        // One token further: text that cannot be a token is an error even where the document ended before it. What else
        // follows is not looked at, as in go-yaml.
        self.scanner.peek()?;
        Ok(Some(value))
    }

    fn directive(&mut self, line: &str, mark: Mark) -> Result<(), Fault> {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("%YAML") => match words.next() {
                Some("1.1" | "1.2") => Ok(()),
                _ => fault("found incompatible YAML document", mark),
            },
            Some("%TAG") => match (words.next(), words.next()) {
                (Some(handle), Some(prefix)) => {
                    self.tag_handles.insert(handle.to_owned(), prefix.to_owned());
                    Ok(())
                }
                _ => fault("did not find expected tag handle", mark),
            },
            _ => fault("found unknown directive name", mark),
        }
    }

    fn count_nodes(&mut self, n: usize, mark: Mark) -> Result<(), Fault> {
        self.nodes += n;
        let limit = self.options.limits.max_nodes;
        if self.nodes > limit {
            let what = format!("{} nodes with all aliases expanded", self.nodes);
            return Err(Fault::Budget {
                budget: "nodes",
                what,
                limit,
                mark,
            });
        }
        Ok(())
    }

    fn node(&mut self, block: bool, indentless: bool) -> Result<Value, Fault> {
        self.depth += 1;
        if self.depth > self.options.limits.max_depth {
            let mark = self.scanner.peek()?.mark;
            return fault(DEPTH_MESSAGE, mark);
        }
        let value = self.node_inner(block, indentless);
        self.depth -= 1;
        value
    }

    fn node_inner(&mut self, block: bool, indentless: bool) -> Result<Value, Fault> {
        let start = self.scanner.peek()?.mark;
        self.count_nodes(1, start)?;
        if let TokenKind::Alias(name) = self.scanner.peek()?.kind {
            self.scanner.next()?;
            return self.alias(name, start);
        }
        let mut anchor = None;
        let mut tag = None;
        loop {
            match &self.scanner.peek()?.kind {
                TokenKind::Anchor(name) if anchor.is_none() => anchor = Some(*name),
                TokenKind::Tag(text) if tag.is_none() => {
                    let text = text.clone();
                    tag = Some(self.resolve_tag(&text, start)?);
                }
                _ => break,
            }
            self.scanner.next()?;
        }
        if let Some(name) = anchor {
            self.anchors.insert(name, None);
        }
        let value = self.content(block, indentless, tag, anchor.is_some(), start)?;
        if let Some(name) = anchor {
            self.anchors.insert(name, Some(value.clone()));
        }
        Ok(value)
    }

    fn alias(&mut self, name: &str, mark: Mark) -> Result<Value, Fault> {
        self.aliases += 1;
        let limits = self.options.limits;
        let limit = limits.max_aliases;
        if self.aliases > limit {
            let what = format!("{} aliases", self.aliases);
            return Err(Fault::Budget {
                budget: "aliases",
                what,
                limit,
                mark,
            });
        }
        match self.anchors.get(name) {
            None => fault(format!("unknown anchor '{name}' referenced"), mark),
            Some(None) => fault(format!("anchor '{name}' value contains itself"), mark),
            Some(Some(value)) => {
                let size = value.node_count();
                // Counted before the copy is made: a bomb must not go off first.
                let copy = if size <= limits.max_nodes.saturating_sub(self.nodes) {
                    Some(value.clone())
                } else {
                    None
                };
                self.count_nodes(size, mark)?;
                copy.map_or_else(|| fault("alias is too large", mark), Ok)
            }
        }
    }

    /// A tag in full, `!!` short form for those of YAML.
    fn resolve_tag(&self, text: &str, mark: Mark) -> Result<Tag, Fault> {
        if text == "!" {
            return Ok(Tag::Unset);
        }
        let full = if let Some(verbatim) = text.strip_prefix("!<") {
            verbatim.trim_end_matches('>').to_owned()
        } else {
            let end = text[1..].find('!').map_or(1, |i| i + 2);
            let (handle, suffix) = text.split_at(end);
            if suffix.is_empty() && handle.len() > 1 && handle.ends_with('!') {
                return fault("did not find expected tag URI", mark);
            }
            match (self.tag_handles.get(handle), handle) {
                (Some(prefix), _) => format!("{prefix}{suffix}"),
                (None, "!!") => format!("tag:yaml.org,2002:{suffix}"),
                (None, "!") => text.to_owned(),
                (None, _) => return fault("found undefined tag handle", mark),
            }
        };
        Ok(match full.strip_prefix("tag:yaml.org,2002:") {
            Some("str") => Tag::Str,
            Some("int") => Tag::Int,
            Some("float") => Tag::Float,
            Some("bool") => Tag::Bool,
            Some("null") => Tag::Null,
            Some("timestamp") => Tag::Timestamp,
            Some("binary") => Tag::Binary,
            Some("merge") => Tag::Merge,
            _ => Tag::Custom,
        })
    }

    fn content(
        &mut self,
        block: bool,
        indentless: bool,
        tag: Option<Tag>,
        anchored: bool,
        start: Mark,
    ) -> Result<Value, Fault> {
        let token = self.scanner.peek()?;
        let mark = token.mark;
        match &token.kind {
            TokenKind::BlockEntry if indentless => self.indentless_sequence(start),
            TokenKind::Scalar(..) => {
                let token = self.scanner.next()?;
                self.scalar(token, tag)
            }
            TokenKind::FlowSequenceStart => self.flow_sequence(),
            TokenKind::FlowMappingStart => self.flow_mapping(),
            TokenKind::BlockSequenceStart if block => self.block_sequence(),
            TokenKind::BlockMappingStart if block => self.block_mapping(),
            _ if anchored || tag.is_some() => Ok(self.empty(mark, tag)),
            _ => fault("did not find expected node content", mark),
        }
    }

    /// Nothing inside `[]` or `{}`: written out again it needs quotes, and so becomes empty text.
    fn empty_in_flow(&self, mark: Mark) -> Value {
        let mut value = self.empty(mark, None);
        if let (Value::Scalar(s), Dialect::Kustomize) = (&mut value, self.options.dialect) {
            s.style = Style::Single;
        }
        value
    }

    fn empty(&self, mark: Mark, tag: Option<Tag>) -> Value {
        let tag = match tag {
            None | Some(Tag::Unset) => Tag::Null,
            Some(tag) => tag,
        };
        Value::Scalar(Scalar {
            text: "".into(),
            pos: self.pos(mark),
            tag,
            style: Style::Plain,
            tagged: false,
        })
    }

    fn scalar(&self, token: Token<'a>, tag: Option<Tag>) -> Result<Value, Fault> {
        let mark = token.mark;
        let TokenKind::Scalar(text, style) = token.kind else {
            return fault("did not find expected node content", mark);
        };
        Ok(Value::Scalar(self.typed(text, style, tag, mark)?))
    }

    fn typed(&self, text: Cow<'a, str>, style: Style, tag: Option<Tag>, mark: Mark) -> Result<Scalar, Fault> {
        let pos = self.pos(mark);
        let explicit = tag.filter(|t| *t != Tag::Unset);
        let tag = match explicit {
            Some(tag) => tag,
            None if style != Style::Plain => Tag::Str,
            None if text == "<<" => Tag::Merge,
            None => resolve::resolve(&text, self.options.dialect).0,
        };
        let mut scalar = Scalar {
            text: text.into(),
            pos,
            tag,
            style,
            tagged: explicit.is_some(),
        };
        if self.options.dialect == Dialect::Kubectl {
            self.canonical(&mut scalar, mark)?;
        }
        Ok(scalar)
    }

    /// kubectl never sees how a scalar was written: numbers and booleans get their canonical text at once.
    fn canonical(&self, scalar: &mut Scalar, mark: Mark) -> Result<(), Fault> {
        let text = match (scalar.tag, scalar.tagged) {
            (Tag::Str | Tag::Custom | Tag::Unset | Tag::Merge, _) => {
                scalar.tag = if scalar.tag == Tag::Merge {
                    Tag::Merge
                } else {
                    Tag::Str
                };
                return Ok(());
            }
            (Tag::Binary, _) | (_, true) if scalar.tag != Tag::Bool => match scalar.plain() {
                Ok(value) => plain_text(&value),
                Err(message) => return fault(message, mark),
            },
            _ => {
                let (found, value) = resolve::resolve(&scalar.text, Dialect::Kubectl);
                if found != scalar.tag {
                    let name = resolve::tag_name(scalar.tag);
                    return fault(format!("cannot read `{}` as {name}", scalar.text), mark);
                }
                plain_text(&value)
            }
        };
        if matches!(scalar.tag, Tag::Timestamp | Tag::Binary) {
            scalar.tag = Tag::Str;
        }
        if scalar.tag == Tag::Float {
            scalar.tag = resolve::tag_of(&text);
        }
        scalar.text = text.into();
        scalar.style = Style::Plain;
        scalar.tagged = false;
        Ok(())
    }

    fn block_sequence(&mut self) -> Result<Value, Fault> {
        let start = self.scanner.next()?.mark;
        let mut items = Vec::new();
        loop {
            let token = self.scanner.next()?;
            match token.kind {
                TokenKind::BlockEntry => {
                    let next = self.scanner.peek()?;
                    let mark = next.mark;
                    let value = match next.kind {
                        TokenKind::BlockEntry | TokenKind::BlockEnd => self.empty(mark, None),
                        _ => self.node(true, false)?,
                    };
                    items.push(value);
                }
                TokenKind::BlockEnd => break,
                _ => return fault("did not find expected '-' indicator", token.mark),
            }
        }
        Ok(Value::Seq(Seq {
            items,
            pos: self.pos(start),
        }))
    }

    fn indentless_sequence(&mut self, start: Mark) -> Result<Value, Fault> {
        let mut items = Vec::new();
        while matches!(self.scanner.peek()?.kind, TokenKind::BlockEntry) {
            self.scanner.next()?;
            let next = self.scanner.peek()?;
            let mark = next.mark;
            let value = match next.kind {
                TokenKind::BlockEntry | TokenKind::Key | TokenKind::Value | TokenKind::BlockEnd => {
                    self.empty(mark, None)
                }
                _ => self.node(true, false)?,
            };
            items.push(value);
        }
        Ok(Value::Seq(Seq {
            items,
            pos: self.pos(start),
        }))
    }

    fn block_mapping(&mut self) -> Result<Value, Fault> {
        let start = self.scanner.next()?.mark;
        let mut builder = MapBuilder::new(self.pos(start));
        loop {
            let token = self.scanner.peek()?;
            let mark = token.mark;
            let key = match token.kind {
                TokenKind::Key => {
                    self.scanner.next()?;
                    match self.scanner.peek()?.kind {
                        TokenKind::Key | TokenKind::Value | TokenKind::BlockEnd => self.empty(mark, None),
                        _ => self.node(true, true)?,
                    }
                }
                TokenKind::Value => self.empty(mark, None),
                TokenKind::BlockEnd => {
                    self.scanner.next()?;
                    break;
                }
                _ => return fault("did not find expected key", mark),
            };
            let token = self.scanner.peek()?;
            let at = token.mark;
            let value = if matches!(token.kind, TokenKind::Value) {
                self.scanner.next()?;
                match self.scanner.peek()?.kind {
                    TokenKind::Key | TokenKind::Value | TokenKind::BlockEnd => self.empty(at, None),
                    _ => self.node(true, true)?,
                }
            } else {
                self.empty(at, None)
            };
            self.add(&mut builder, key, value, mark)?;
        }
        builder.finish()
    }

    fn flow_sequence(&mut self) -> Result<Value, Fault> {
        let start = self.scanner.next()?.mark;
        let mut items = Vec::new();
        let mut first = true;
        loop {
            if matches!(self.scanner.peek()?.kind, TokenKind::FlowSequenceEnd) {
                break;
            }
            if !first {
                let token = self.scanner.next()?;
                if !matches!(token.kind, TokenKind::FlowEntry) {
                    return fault("did not find expected ',' or ']'", token.mark);
                }
                if matches!(self.scanner.peek()?.kind, TokenKind::FlowSequenceEnd) {
                    break;
                }
            }
            first = false;
            if matches!(self.scanner.peek()?.kind, TokenKind::Key) {
                items.push(self.flow_pair()?);
            } else {
                items.push(self.node(false, false)?);
            }
        }
        self.scanner.next()?;
        Ok(Value::Seq(Seq {
            items,
            pos: self.pos(start),
        }))
    }

    /// `[a: b]`: a mapping with one entry.
    fn flow_pair(&mut self) -> Result<Value, Fault> {
        let mark = self.scanner.next()?.mark;
        let mut builder = MapBuilder::new(self.pos(mark));
        let key = match self.scanner.peek()?.kind {
            TokenKind::Value | TokenKind::FlowEntry | TokenKind::FlowSequenceEnd => self.empty_in_flow(mark),
            _ => self.node(false, false)?,
        };
        let value = self.flow_value(mark)?;
        self.add(&mut builder, key, value, mark)?;
        builder.finish()
    }

    fn flow_value(&mut self, mark: Mark) -> Result<Value, Fault> {
        if matches!(self.scanner.peek()?.kind, TokenKind::Value) {
            self.scanner.next()?;
            return match self.scanner.peek()?.kind {
                TokenKind::FlowEntry | TokenKind::FlowSequenceEnd | TokenKind::FlowMappingEnd => {
                    Ok(self.empty_in_flow(mark))
                }
                _ => self.node(false, false),
            };
        }
        Ok(self.empty_in_flow(mark))
    }

    fn flow_mapping(&mut self) -> Result<Value, Fault> {
        let start = self.scanner.next()?.mark;
        let mut builder = MapBuilder::new(self.pos(start));
        let mut first = true;
        loop {
            if matches!(self.scanner.peek()?.kind, TokenKind::FlowMappingEnd) {
                break;
            }
            if !first {
                let token = self.scanner.next()?;
                if !matches!(token.kind, TokenKind::FlowEntry) {
                    return fault("did not find expected ',' or '}'", token.mark);
                }
                if matches!(self.scanner.peek()?.kind, TokenKind::FlowMappingEnd) {
                    break;
                }
            }
            first = false;
            let mark = self.scanner.peek()?.mark;
            if matches!(self.scanner.peek()?.kind, TokenKind::Key) {
                self.scanner.next()?;
                let key = match self.scanner.peek()?.kind {
                    TokenKind::Value | TokenKind::FlowEntry | TokenKind::FlowMappingEnd => {
                        self.empty_in_flow(mark)
                    }
                    _ => self.node(false, false)?,
                };
                let value = self.flow_value(mark)?;
                self.add(&mut builder, key, value, mark)?;
            } else {
                let key = self.node(false, false)?;
                let value = self.empty_in_flow(mark);
                self.add(&mut builder, key, value, mark)?;
            }
        }
        self.scanner.next()?;
        builder.finish()
    }

    fn add(&self, builder: &mut MapBuilder, key: Value, value: Value, mark: Mark) -> Result<(), Fault> {
        let Value::Scalar(key) = key else {
            return fault("a mapping key must be a scalar", mark);
        };
        if key.tag == Tag::Merge {
            return builder.add_merge(value, mark);
        }
        if self.options.dialect == Dialect::Kustomize {
            if &*key.text == "<<" {
                // kustomize takes out what is called like a merge key, quoted or not.
                return Ok(());
            }
            if key.tag == Tag::Null {
                return fault(
                    format!("mapping key \"{}\" is null; put it in quotes", key.text),
                    mark,
                );
            }
        }
        if let Some(existing) = builder.find(&key.text) {
            if self.options.dialect == Dialect::Kubectl {
                builder.map.entries[existing].value = value;
                return Ok(());
            }
            let first_line = builder.map.entries[existing].key.pos.line() - self.options.line_offset;
            return Err(Fault::Duplicate {
                key: key.text.into(),
                first_line,
                mark,
            });
        }
        builder.push(key, value);
        Ok(())
    }
}

/// The text of a value as Go prints it.
fn plain_text(value: &Plain<'_>) -> String {
    match value {
        Plain::Null => "null".into(),
        Plain::Bool(b) => b.to_string(),
        Plain::Int(i) => i.to_string(),
        Plain::Uint(u) => u.to_string(),
        Plain::Float(f) if *f == f.trunc() && f.abs() < 9.2e18 => (*f as i64).to_string(),
        Plain::Float(f) => resolve::go_float(*f),
        Plain::Str(s) => s.clone().into_owned(),
    }
}

/// The first byte that YAML does not allow in a stream.
fn find_control_character(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    bytes.iter().enumerate().position(|(i, &b)| match b {
        b'\t' | b'\n' | b'\r' => false,
        0x00..=0x1F | 0x7F => true,
        // U+0080 to U+009F but for U+0085
        0xC2 => bytes
            .get(i + 1)
            .is_some_and(|&n| (0x80..0xA0).contains(&n) && n != 0x85),
        // U+FFFE, U+FFFF
        0xEF => bytes.get(i + 1) == Some(&0xBF) && bytes.get(i + 2).is_some_and(|&n| n >= 0xBE),
        _ => false,
    })
}
