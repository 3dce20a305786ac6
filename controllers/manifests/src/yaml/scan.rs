//! From characters to tokens, with the lookahead that YAML needs to find out that something was a key.
//!
//! The accepted language is that of libyaml and its Go port, since that is what kubectl and kustomize accept: tabs may
//! not start a token in block context, a simple key lies on one line and has at most 1,024 bytes, `?` ends a plain
//! scalar in flow context.

use std::borrow::Cow;
use std::collections::VecDeque;

use crate::value::Style;

/// Where the scanner is. Bytes for slicing, line and column (in characters, both from 0) for indentation and messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) index: usize,
    pub(crate) line: usize,
    pub(crate) column: usize,
}

/// What went wrong, and where.
#[derive(Debug)]
pub(crate) struct ScanError {
    pub(crate) message: Cow<'static, str>,
    pub(crate) mark: Mark,
}

impl ScanError {
    pub(crate) fn new(message: impl Into<Cow<'static, str>>, mark: Mark) -> ScanError {
        ScanError {
            message: message.into(),
            mark,
        }
    }
}

#[derive(Debug, PartialEq)]
pub(crate) enum TokenKind<'a> {
    StreamEnd,
    Directive(Cow<'a, str>),
    DocumentStart,
    DocumentEnd,
    BlockSequenceStart,
    BlockMappingStart,
    BlockEnd,
    FlowSequenceStart,
    FlowSequenceEnd,
    FlowMappingStart,
    FlowMappingEnd,
    BlockEntry,
    FlowEntry,
    Key,
    Value,
    Alias(&'a str),
    Anchor(&'a str),
    Tag(String),
    Scalar(Cow<'a, str>, Style),
}

#[derive(Debug)]
pub(crate) struct Token<'a> {
    pub(crate) kind: TokenKind<'a>,
    pub(crate) mark: Mark,
}

#[derive(Clone, Copy, Default)]
struct SimpleKey {
    possible: bool,
    required: bool,
    token: usize,
    mark: Mark,
}

pub(crate) struct Scanner<'a> {
    pub(super) text: &'a str,
    pub(super) bytes: &'a [u8],
    pub(super) mark: Mark,
    tokens: VecDeque<Token<'a>>,
    /// Tokens already handed out; token numbers count from the first of the stream.
    taken: usize,
    pub(super) indent: isize,
    indents: Vec<isize>,
    simple_keys: Vec<SimpleKey>,
    pub(super) simple_key_allowed: bool,
    pub(super) flow_level: usize,
    max_depth: usize,
    ended: bool,
}

/// libyaml's limit on the length of a key that is not announced by `?`.
const SIMPLE_KEY_BYTES: usize = 1024;

impl<'a> Scanner<'a> {
    pub(crate) fn new(text: &'a str, max_depth: usize) -> Scanner<'a> {
        Scanner {
            text,
            bytes: text.as_bytes(),
            mark: Mark::default(),
            tokens: VecDeque::new(),
            taken: 0,
            indent: -1,
            indents: Vec::new(),
            simple_keys: vec![SimpleKey::default()],
            simple_key_allowed: true,
            flow_level: 0,
            max_depth,
            ended: false,
        }
    }

    /// The next token, without taking it.
    pub(crate) fn peek(&mut self) -> Result<&Token<'a>, ScanError> {
        self.fill()?;
        match self.tokens.front() {
            Some(token) => Ok(token),
            None => Err(ScanError::new("unexpected end of the document", self.mark)),
        }
    }

    /// Takes the next token.
    pub(crate) fn next(&mut self) -> Result<Token<'a>, ScanError> {
        self.fill()?;
        let mark = self.mark;
        self.taken += 1;
        self.tokens
            .pop_front()
            .ok_or_else(|| ScanError::new("unexpected end of the document", mark))
    }

    /// Scans until the first token in the queue is certain: it may still turn out to be the start of a key.
    fn fill(&mut self) -> Result<(), ScanError> {
        loop {
            if !self.tokens.is_empty() {
                let mut uncertain = false;
                for i in 0..self.simple_keys.len() {
                    if self.simple_keys[i].possible && self.simple_keys[i].token == self.taken {
                        uncertain |= self.key_still_possible(i)?;
                    }
                }
                if !uncertain {
                    return Ok(());
                }
            }
            if self.ended {
                return Ok(());
            }
            self.fetch()?;
        }
    }

    fn key_still_possible(&mut self, i: usize) -> Result<bool, ScanError> {
        let key = self.simple_keys[i];
        if !key.possible {
            return Ok(false);
        }
        if key.mark.line < self.mark.line || key.mark.index + SIMPLE_KEY_BYTES < self.mark.index {
            if key.required {
                return Err(ScanError::new("could not find expected ':'", key.mark));
            }
            self.simple_keys[i].possible = false;
            return Ok(false);
        }
        Ok(true)
    }

    // Characters.

    pub(super) fn at(&self, offset: usize) -> u8 {
        self.bytes.get(self.mark.index + offset).copied().unwrap_or(0)
    }

    pub(super) fn at_end(&self, offset: usize) -> bool {
        self.mark.index + offset >= self.bytes.len() || self.at(offset) == 0
    }

    /// Length in bytes of a line break at the offset; 0 if there is none.
    pub(super) fn break_len(&self, offset: usize) -> usize {
        match self.at(offset) {
            b'\r' if self.at(offset + 1) == b'\n' => 2,
            b'\r' | b'\n' => 1,
            0xC2 if self.at(offset + 1) == 0x85 => 2,
            0xE2 if self.at(offset + 1) == 0x80 && matches!(self.at(offset + 2), 0xA8 | 0xA9) => 3,
            _ => 0,
        }
    }

    pub(super) fn is_blank(&self, offset: usize) -> bool {
        matches!(self.at(offset), b' ' | b'\t')
    }

    pub(super) fn is_blank_or_end(&self, offset: usize) -> bool {
        self.is_blank(offset) || self.break_len(offset) > 0 || self.at_end(offset)
    }

    pub(super) fn is_break_or_end(&self) -> bool {
        self.break_len(0) > 0 || self.at_end(0)
    }

    /// One character forward.
    pub(super) fn skip(&mut self) {
        let width = match self.at(0) {
            0x00..=0x7F => 1,
            0x80..=0xDF => 2,
            0xE0..=0xEF => 3,
            _ => 4,
        };
        self.mark.index = (self.mark.index + width).min(self.bytes.len());
        self.mark.column += 1;
    }

    /// One line break forward.
    pub(super) fn skip_line(&mut self) {
        let n = self.break_len(0);
        if n > 0 {
            self.mark.index += n;
            self.mark.column = 0;
            self.mark.line += 1;
        }
    }

    /// One character into the buffer.
    pub(super) fn read(&mut self, into: &mut String) {
        let start = self.mark.index;
        self.skip();
        into.push_str(self.text.get(start..self.mark.index).unwrap_or(""));
    }

    /// One line break into the buffer: CR, LF, CRLF and NEL become LF, the separators of Unicode stay.
    pub(super) fn read_line(&mut self, into: &mut String) {
        if self.at(0) == 0xE2 && self.break_len(0) == 3 {
            into.push_str(
                self.text
                    .get(self.mark.index..self.mark.index + 3)
                    .unwrap_or("\n"),
            );
        } else {
            into.push('\n');
        }
        self.skip_line();
    }

    pub(super) fn document_indicator(&self) -> bool {
        self.mark.column == 0
            && matches!(
                (self.at(0), self.at(1), self.at(2)),
                (b'-', b'-', b'-') | (b'.', b'.', b'.')
            )
            && self.is_blank_or_end(3)
    }

    // Tokens.

    pub(super) fn push(&mut self, kind: TokenKind<'a>, mark: Mark) {
        self.tokens.push_back(Token { kind, mark });
    }

    /// Puts a token before the one with the given number.
    fn insert(&mut self, number: usize, token: Token<'a>) {
        let at = number.saturating_sub(self.taken).min(self.tokens.len());
        self.tokens.insert(at, token);
    }

    fn fetch(&mut self) -> Result<(), ScanError> {
        self.skip_to_token();
        self.unroll_indent(self.mark.column as isize);
        if self.at_end(0) {
            if self.mark.index < self.bytes.len() {
                return Err(ScanError::new("control characters are not allowed", self.mark));
            }
            return self.fetch_stream_end();
        }
        let c = self.at(0);
        if self.mark.column == 0 && c == b'%' {
            return self.fetch_directive();
        }
        if self.document_indicator() {
            return self.fetch_document_indicator(c == b'-');
        }
        let flow = self.flow_level > 0;
        match c {
            b'[' => self.fetch_flow_start(TokenKind::FlowSequenceStart),
            b'{' => self.fetch_flow_start(TokenKind::FlowMappingStart),
            b']' => self.fetch_flow_end(TokenKind::FlowSequenceEnd),
            b'}' => self.fetch_flow_end(TokenKind::FlowMappingEnd),
            b',' => self.fetch_flow_entry(),
            b'-' if self.is_blank_or_end(1) => self.fetch_block_entry(),
            b'?' if flow || self.is_blank_or_end(1) => self.fetch_key(),
            b':' if flow || self.is_blank_or_end(1) => self.fetch_value(),
            b'*' => self.fetch_anchor(true),
            b'&' => self.fetch_anchor(false),
            b'!' => self.fetch_tag(),
            b'|' if !flow => self.fetch_block_scalar(true),
            b'>' if !flow => self.fetch_block_scalar(false),
            b'\'' => self.fetch_quoted(true),
            b'"' => self.fetch_quoted(false),
            _ if self.starts_plain(c) => self.fetch_plain(),
            _ => Err(ScanError::new(
                "found character that cannot start any token",
                self.mark,
            )),
        }
    }

    fn starts_plain(&self, c: u8) -> bool {
        let indicator = self.is_blank_or_end(0)
            || matches!(
                c,
                b'-' | b'?'
                    | b':'
                    | b','
                    | b'['
                    | b']'
                    | b'{'
                    | b'}'
                    | b'#'
                    | b'&'
                    | b'*'
                    | b'!'
                    | b'|'
                    | b'>'
                    | b'\''
                    | b'"'
                    | b'%'
                    | b'@'
                    | b'`'
            );
        !indicator
            || (c == b'-' && !self.is_blank(1))
            || (self.flow_level == 0 && matches!(c, b'?' | b':') && !self.is_blank_or_end(1))
    }

    fn skip_to_token(&mut self) {
        loop {
            if self.mark.column == 0
                && self.bytes[self.mark.index.min(self.bytes.len())..].starts_with(b"\xEF\xBB\xBF")
            {
                self.mark.index += 3;
            }
            while self.at(0) == b' '
                || ((self.flow_level > 0 || !self.simple_key_allowed) && self.at(0) == b'\t')
            {
                self.skip();
            }
            if self.at(0) == b'#' {
                while !self.is_break_or_end() {
                    self.skip();
                }
            }
            if self.break_len(0) == 0 {
                return;
            }
            self.skip_line();
            if self.flow_level == 0 {
                self.simple_key_allowed = true;
            }
        }
    }

    pub(super) fn save_simple_key(&mut self) -> Result<(), ScanError> {
        if self.simple_key_allowed {
            let required = self.flow_level == 0 && self.indent == self.mark.column as isize;
            self.remove_simple_key()?;
            let key = SimpleKey {
                possible: true,
                required,
                token: self.taken + self.tokens.len(),
                mark: self.mark,
            };
            if let Some(last) = self.simple_keys.last_mut() {
                *last = key;
            }
        }
        Ok(())
    }

    pub(super) fn remove_simple_key(&mut self) -> Result<(), ScanError> {
        if let Some(key) = self.simple_keys.last_mut() {
            if key.possible && key.required {
                return Err(ScanError::new("could not find expected ':'", key.mark));
            }
            key.possible = false;
        }
        Ok(())
    }

    fn check_depth(&self) -> Result<(), ScanError> {
        if self.flow_level + self.indents.len() > self.max_depth {
            return Err(ScanError::new(DEPTH_MESSAGE, self.mark));
        }
        Ok(())
    }

    fn roll_indent(
        &mut self,
        column: usize,
        at: Option<usize>,
        kind: TokenKind<'a>,
        mark: Mark,
    ) -> Result<(), ScanError> {
        if self.flow_level > 0 || self.indent >= column as isize {
            return Ok(());
        }
        self.indents.push(self.indent);
        self.indent = column as isize;
        self.check_depth()?;
        let token = Token { kind, mark };
        match at {
            Some(number) => self.insert(number, token),
            None => self.tokens.push_back(token),
        }
        Ok(())
    }

    fn unroll_indent(&mut self, column: isize) {
        if self.flow_level > 0 {
            return;
        }
        while self.indent > column {
            self.push(TokenKind::BlockEnd, self.mark);
            self.indent = self.indents.pop().unwrap_or(-1);
        }
    }

    fn fetch_stream_end(&mut self) -> Result<(), ScanError> {
        self.unroll_indent(-1);
        self.remove_simple_key()?;
        self.simple_key_allowed = false;
        self.push(TokenKind::StreamEnd, self.mark);
        self.ended = true;
        Ok(())
    }

    fn fetch_directive(&mut self) -> Result<(), ScanError> {
        self.unroll_indent(-1);
        self.remove_simple_key()?;
        self.simple_key_allowed = false;
        let mark = self.mark;
        while !self.is_break_or_end() {
            self.skip();
        }
        let line = self.text.get(mark.index..self.mark.index).unwrap_or("");
        self.push(TokenKind::Directive(Cow::Borrowed(line)), mark);
        Ok(())
    }

    fn fetch_document_indicator(&mut self, start: bool) -> Result<(), ScanError> {
        self.unroll_indent(-1);
        self.remove_simple_key()?;
        self.simple_key_allowed = false;
        let mark = self.mark;
        for _ in 0..3 {
            self.skip();
        }
        self.push(
            if start {
                TokenKind::DocumentStart
            } else {
                TokenKind::DocumentEnd
            },
            mark,
        );
        Ok(())
    }

    fn fetch_flow_start(&mut self, kind: TokenKind<'a>) -> Result<(), ScanError> {
        self.save_simple_key()?;
        self.simple_keys.push(SimpleKey::default());
        self.flow_level += 1;
        self.check_depth()?;
        self.simple_key_allowed = true;
        let mark = self.mark;
        self.skip();
        self.push(kind, mark);
        Ok(())
    }

    fn fetch_flow_end(&mut self, kind: TokenKind<'a>) -> Result<(), ScanError> {
        self.remove_simple_key()?;
        if self.flow_level > 0 {
            self.flow_level -= 1;
            self.simple_keys.pop();
        }
        self.simple_key_allowed = false;
        let mark = self.mark;
        self.skip();
        self.push(kind, mark);
        Ok(())
    }

    fn fetch_flow_entry(&mut self) -> Result<(), ScanError> {
        self.remove_simple_key()?;
        self.simple_key_allowed = true;
        let mark = self.mark;
        self.skip();
        self.push(TokenKind::FlowEntry, mark);
        Ok(())
    }

    fn fetch_block_entry(&mut self) -> Result<(), ScanError> {
        if self.flow_level == 0 {
            if !self.simple_key_allowed {
                return Err(ScanError::new(
                    "block sequence entries are not allowed in this context",
                    self.mark,
                ));
            }
            self.roll_indent(self.mark.column, None, TokenKind::BlockSequenceStart, self.mark)?;
        }
        self.remove_simple_key()?;
        self.simple_key_allowed = true;
        let mark = self.mark;
        self.skip();
        self.push(TokenKind::BlockEntry, mark);
        Ok(())
    }

    fn fetch_key(&mut self) -> Result<(), ScanError> {
        if self.flow_level == 0 {
            if !self.simple_key_allowed {
                return Err(ScanError::new(
                    "mapping keys are not allowed in this context",
                    self.mark,
                ));
            }
            self.roll_indent(self.mark.column, None, TokenKind::BlockMappingStart, self.mark)?;
        }
        self.remove_simple_key()?;
        self.simple_key_allowed = self.flow_level == 0;
        let mark = self.mark;
        self.skip();
        self.push(TokenKind::Key, mark);
        Ok(())
    }

    fn fetch_value(&mut self) -> Result<(), ScanError> {
        let last = self.simple_keys.len().saturating_sub(1);
        if !self.simple_keys.is_empty() && self.key_still_possible(last)? {
            let key = self.simple_keys[last];
            self.insert(
                key.token,
                Token {
                    kind: TokenKind::Key,
                    mark: key.mark,
                },
            );
            self.roll_indent(
                key.mark.column,
                Some(key.token),
                TokenKind::BlockMappingStart,
                key.mark,
            )?;
            self.simple_keys[last].possible = false;
            self.simple_key_allowed = false;
        } else {
            if self.flow_level == 0 {
                if !self.simple_key_allowed {
                    return Err(ScanError::new(
                        "mapping values are not allowed in this context",
                        self.mark,
                    ));
                }
                self.roll_indent(self.mark.column, None, TokenKind::BlockMappingStart, self.mark)?;
            }
            self.simple_key_allowed = self.flow_level == 0;
        }
        let mark = self.mark;
        self.skip();
        self.push(TokenKind::Value, mark);
        Ok(())
    }

    fn fetch_anchor(&mut self, alias: bool) -> Result<(), ScanError> {
        self.save_simple_key()?;
        self.simple_key_allowed = false;
        let mark = self.mark;
        self.skip();
        let start = self.mark.index;
        while self.at(0).is_ascii_alphanumeric() || matches!(self.at(0), b'_' | b'-') {
            self.skip();
        }
        let name = self.text.get(start..self.mark.index).unwrap_or("");
        let ends = self.is_blank_or_end(0)
            || matches!(self.at(0), b'?' | b':' | b',' | b']' | b'}' | b'%' | b'@' | b'`');
        if name.is_empty() || !ends {
            return Err(ScanError::new(
                "did not find expected alphabetic or numeric character",
                mark,
            ));
        }
        self.push(
            if alias {
                TokenKind::Alias(name)
            } else {
                TokenKind::Anchor(name)
            },
            mark,
        );
        Ok(())
    }

    fn fetch_tag(&mut self) -> Result<(), ScanError> {
        self.save_simple_key()?;
        self.simple_key_allowed = false;
        let mark = self.mark;
        let start = self.mark.index;
        if self.at(1) == b'<' {
            while self.at(0) != b'>' && !self.is_blank_or_end(0) {
                self.skip();
            }
            if self.at(0) != b'>' {
                return Err(ScanError::new("did not find the expected '>'", mark));
            }
            self.skip();
        } else {
            while self.at(0).is_ascii_alphanumeric() || b"_-;/?:@&=+$,.!~*'()[]%".contains(&self.at(0)) {
                if self.at(0) == 0 {
                    break;
                }
                self.skip();
            }
        }
        if !self.is_blank_or_end(0) {
            return Err(ScanError::new(
                "did not find expected whitespace or line break",
                mark,
            ));
        }
        let tag = self.text.get(start..self.mark.index).unwrap_or("").to_owned();
        self.push(TokenKind::Tag(tag), mark);
        Ok(())
    }
}

pub(crate) const DEPTH_MESSAGE: &str = "exceeded max depth";
