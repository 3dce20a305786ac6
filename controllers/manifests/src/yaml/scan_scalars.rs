//! Scalars: plain, quoted and block text, with YAML's rules for folding lines.

use std::borrow::Cow;

use super::scan::{Mark, ScanError, Scanner, TokenKind};
use crate::value::Style;

impl<'a> Scanner<'a> {
    pub(super) fn fetch_block_scalar(&mut self, literal: bool) -> Result<(), ScanError> {
        self.remove_simple_key()?;
        self.simple_key_allowed = true;
        let mark = self.mark;
        let text = self.scan_block_scalar(literal, mark)?;
        let style = if literal { Style::Literal } else { Style::Folded };
        self.push(TokenKind::Scalar(Cow::Owned(text), style), mark);
        Ok(())
    }

    fn scan_block_scalar(&mut self, literal: bool, mark: Mark) -> Result<String, ScanError> {
        self.skip();
        let mut chomping = 0i8;
        let mut increment = 0isize;
        for _ in 0..2 {
            match self.at(0) {
                b'+' if chomping == 0 => {
                    chomping = 1;
                    self.skip();
                }
                b'-' if chomping == 0 => {
                    chomping = -1;
                    self.skip();
                }
                b'0' => return Err(ScanError::new("found an indentation indicator equal to 0", mark)),
                d @ b'1'..=b'9' if increment == 0 => {
                    increment = isize::from(d - b'0');
                    self.skip();
                }
                _ => break,
            }
        }
        while self.is_blank(0) {
            self.skip();
        }
        if self.at(0) == b'#' {
            while !self.is_break_or_end() {
                self.skip();
            }
        }
        if !self.is_break_or_end() {
            return Err(ScanError::new(
                "did not find expected comment or line break",
                mark,
            ));
        }
        self.skip_line();
        let mut indent = if increment > 0 {
            self.indent.max(0) + increment
        } else {
            0
        };

        let mut text = String::new();
        let mut leading_break = String::new();
        let mut trailing_breaks = String::new();
        self.scan_block_breaks(&mut indent, &mut trailing_breaks, mark)?;
        let mut leading_blank = false;
        while self.mark.column as isize == indent && !self.at_end(0) {
            let trailing_blank = self.is_blank(0);
            if !literal && leading_break.starts_with('\n') && !leading_blank && !trailing_blank {
                if trailing_breaks.is_empty() {
                    text.push(' ');
                }
            } else {
                text.push_str(&leading_break);
            }
            leading_break.clear();
            text.push_str(&trailing_breaks);
            trailing_breaks.clear();
            leading_blank = self.is_blank(0);
            let start = self.mark.index;
            while !self.is_break_or_end() {
                self.skip();
            }
            text.push_str(self.text.get(start..self.mark.index).unwrap_or(""));
            if self.break_len(0) > 0 {
                self.read_line(&mut leading_break);
            }
            self.scan_block_breaks(&mut indent, &mut trailing_breaks, mark)?;
        }
        if chomping != -1 {
            text.push_str(&leading_break);
        }
        if chomping == 1 {
            text.push_str(&trailing_breaks);
        }
        Ok(text)
    }

    /// Skips indentation and empty lines; finds the indentation by the first line with text if it is not given.
    fn scan_block_breaks(
        &mut self,
        indent: &mut isize,
        breaks: &mut String,
        mark: Mark,
    ) -> Result<(), ScanError> {
        let mut deepest = 0isize;
        loop {
            while (*indent == 0 || (self.mark.column as isize) < *indent) && self.at(0) == b' ' {
                self.skip();
            }
            deepest = deepest.max(self.mark.column as isize);
            if (*indent == 0 || (self.mark.column as isize) < *indent) && self.at(0) == b'\t' {
                return Err(ScanError::new(
                    "found a tab character where an indentation space is expected",
                    mark,
                ));
            }
            if self.break_len(0) == 0 {
                break;
            }
            self.read_line(breaks);
        }
        if *indent == 0 {
            *indent = deepest.max(self.indent + 1).max(1);
        }
        Ok(())
    }

    pub(super) fn fetch_quoted(&mut self, single: bool) -> Result<(), ScanError> {
        self.save_simple_key()?;
        self.simple_key_allowed = false;
        let mark = self.mark;
        let text = self.scan_quoted(single, mark)?;
        let style = if single { Style::Single } else { Style::Double };
        self.push(TokenKind::Scalar(text, style), mark);
        Ok(())
    }

    fn scan_quoted(&mut self, single: bool, mark: Mark) -> Result<Cow<'a, str>, ScanError> {
        let quote = if single { b'\'' } else { b'"' };
        self.skip();
        // The common case: one line, nothing escaped.
        let start = self.mark.index;
        let rest = &self.bytes[start.min(self.bytes.len())..];
        let end = rest
            .iter()
            .position(|&b| b == quote || b < b' ' || b == b'\\' || b >= 0x80);
        if let Some(end) = end.filter(|&end| rest[end] == quote && rest.get(end + 1) != Some(&b'\'')) {
            self.mark.index += end + 1;
            self.mark.column += end + 1;
            return Ok(Cow::Borrowed(self.text.get(start..start + end).unwrap_or("")));
        }
        let mut text = String::new();
        let mut leading_break = String::new();
        let mut trailing_breaks = String::new();
        let mut blanks = String::new();
        loop {
            if self.document_indicator() {
                return Err(ScanError::new("found unexpected document indicator", mark));
            }
            if self.at_end(0) {
                return Err(ScanError::new("found unexpected end of stream", mark));
            }
            let mut leading_blanks = false;
            while !self.is_blank_or_end(0) {
                let c = self.at(0);
                if single && c == b'\'' && self.at(1) == b'\'' {
                    text.push('\'');
                    self.skip();
                    self.skip();
                } else if c == quote {
                    break;
                } else if !single && c == b'\\' && self.break_len(1) > 0 {
                    self.skip();
                    self.skip_line();
                    leading_blanks = true;
                    break;
                } else if !single && c == b'\\' {
                    self.scan_escape(&mut text, mark)?;
                } else {
                    self.read(&mut text);
                }
            }
            if self.at(0) == quote {
                break;
            }
            while self.is_blank(0) || self.break_len(0) > 0 {
                if self.is_blank(0) {
                    if leading_blanks {
                        self.skip();
                    } else {
                        self.read(&mut blanks);
                    }
                } else if leading_blanks {
                    self.read_line(&mut trailing_breaks);
                } else {
                    blanks.clear();
                    self.read_line(&mut leading_break);
                    leading_blanks = true;
                }
            }
            if leading_blanks {
                join_lines(&mut text, &mut leading_break, &mut trailing_breaks);
            } else {
                text.push_str(&blanks);
                blanks.clear();
            }
        }
        self.skip();
        Ok(Cow::Owned(text))
    }

    fn scan_escape(&mut self, text: &mut String, mark: Mark) -> Result<(), ScanError> {
        let code = self.at(1);
        let simple = match code {
            b'0' => Some('\0'),
            b'a' => Some('\x07'),
            b'b' => Some('\x08'),
            b't' | b'\t' => Some('\t'),
            b'n' => Some('\n'),
            b'v' => Some('\x0B'),
            b'f' => Some('\x0C'),
            b'r' => Some('\r'),
            b'e' => Some('\x1B'),
            b' ' => Some(' '),
            b'"' => Some('"'),
            b'\'' => Some('\''),
            b'\\' => Some('\\'),
            b'N' => Some('\u{85}'),
            b'_' => Some('\u{A0}'),
            b'L' => Some('\u{2028}'),
            b'P' => Some('\u{2029}'),
            _ => None,
        };
        let digits = match code {
            b'x' => 2,
            b'u' => 4,
            b'U' => 8,
            _ if simple.is_some() => 0,
            _ => return Err(ScanError::new("found unknown escape character", mark)),
        };
        self.skip();
        self.skip();
        if let Some(c) = simple {
            text.push(c);
            return Ok(());
        }
        let mut value = 0u32;
        for k in 0..digits {
            let Some(d) = (self.at(k) as char).to_digit(16) else {
                return Err(ScanError::new("did not find expected hexdecimal number", mark));
            };
            value = value << 4 | d;
        }
        let Some(c) = char::from_u32(value) else {
            return Err(ScanError::new(
                "found invalid Unicode character escape code",
                mark,
            ));
        };
        text.push(c);
        for _ in 0..digits {
            self.skip();
        }
        Ok(())
    }

    pub(super) fn fetch_plain(&mut self) -> Result<(), ScanError> {
        self.save_simple_key()?;
        self.simple_key_allowed = false;
        let mark = self.mark;
        let text = self.scan_plain(mark)?;
        self.push(TokenKind::Scalar(text, Style::Plain), mark);
        Ok(())
    }

    fn scan_plain(&mut self, mark: Mark) -> Result<Cow<'a, str>, ScanError> {
        let indent = self.indent + 1;
        // Text of the first line is a slice of the source; only a second line makes a copy.
        let mut owned: Option<String> = None;
        let mut end = self.mark.index;
        let mut leading_break = String::new();
        let mut trailing_breaks = String::new();
        let mut leading_blanks = false;
        let mut blanks_from = self.mark.index;
        loop {
            if self.document_indicator() || self.at(0) == b'#' {
                break;
            }
            let start = self.mark.index;
            while !self.is_blank_or_end(0) {
                let c = self.at(0);
                if (c == b':' && self.is_blank_or_end(1))
                    || (self.flow_level > 0 && matches!(c, b',' | b'?' | b'[' | b']' | b'{' | b'}'))
                {
                    break;
                }
                self.skip();
            }
            if self.mark.index > start {
                if leading_blanks {
                    let first = self.text.get(mark.index..end).unwrap_or("");
                    let buffer = owned.get_or_insert_with(|| first.to_owned());
                    join_lines(buffer, &mut leading_break, &mut trailing_breaks);
                    leading_blanks = false;
                } else if let Some(buffer) = owned.as_mut() {
                    buffer.push_str(self.text.get(blanks_from..start).unwrap_or(""));
                }
                if let Some(buffer) = owned.as_mut() {
                    buffer.push_str(self.text.get(start..self.mark.index).unwrap_or(""));
                }
                end = self.mark.index;
            }
            if !(self.is_blank(0) || self.break_len(0) > 0) {
                break;
            }
            blanks_from = self.mark.index;
            while self.is_blank(0) || self.break_len(0) > 0 {
                if self.is_blank(0) {
                    if leading_blanks && (self.mark.column as isize) < indent && self.at(0) == b'\t' {
                        return Err(ScanError::new(
                            "found a tab character that violates indentation",
                            mark,
                        ));
                    }
                    self.skip();
                } else if leading_blanks {
                    self.read_line(&mut trailing_breaks);
                } else {
                    self.read_line(&mut leading_break);
                    leading_blanks = true;
                }
            }
            if self.flow_level == 0 && (self.mark.column as isize) < indent {
                break;
            }
        }
        if leading_blanks {
            self.simple_key_allowed = true;
        }
        Ok(match owned {
            Some(text) => Cow::Owned(text),
            None => Cow::Borrowed(self.text.get(mark.index..end).unwrap_or("")),
        })
    }
}

/// Folds a line break: one becomes a space, several lose the first.
fn join_lines(text: &mut String, leading_break: &mut String, trailing_breaks: &mut String) {
    if leading_break.starts_with('\n') {
        if trailing_breaks.is_empty() {
            text.push(' ');
        } else {
            text.push_str(trailing_breaks);
        }
    } else {
        text.push_str(leading_break);
        text.push_str(trailing_breaks);
    }
    leading_break.clear();
    trailing_breaks.clear();
}
