//! From tree to text, byte for byte as `kustomize build` and `kubectl get -o yaml` print: keys sorted, lists not
//! indented below their key, lines folded after column 80, quotes only where a reader would misunderstand.

use std::borrow::Cow;
use std::cmp::Ordering;

use crate::resolve::{self, Plain};
use crate::value::{Map, Value};

/// Where long scalars are folded.
const WIDTH: usize = 80;
/// Longer keys are announced by `? `.
const SIMPLE_KEY_MAX: usize = 128;

/// Writes a value as one YAML document, with a line end.
///
/// Fails on what JSON cannot say; the message tells the path.
pub fn write_value(value: &Value) -> Result<String, String> {
    let mut out = String::with_capacity(1024);
    document(&mut out, |w| w.node(value, -1, false, &mut Path(Vec::new())))?;
    Ok(out)
}

/// Appends a mapping as one YAML document; see [`write_value`].
pub fn write_map(map: &Map, out: &mut String) -> Result<(), String> {
    document(out, |w| {
        if map.is_empty() {
            w.indicator("{}", true, false, false);
            return Ok(());
        }
        w.mapping(map, -1, &mut Path(Vec::new()))
    })
}

fn document(out: &mut String, content: impl FnOnce(&mut Writer) -> Result<(), String>) -> Result<(), String> {
    let mut w = Writer {
        out: std::mem::take(out),
        column: 0,
        indention: true,
        whitespace: true,
    };
    content(&mut w)?;
    w.write_indent(0);
    *out = w.out;
    Ok(())
}

struct Path<'a>(Vec<PathPart<'a>>);

enum PathPart<'a> {
    Key(&'a str),
    Index(usize),
}

impl Path<'_> {
    fn fail<T>(&self, message: &str) -> Result<T, String> {
        let mut path = String::new();
        for part in &self.0 {
            match part {
                PathPart::Key(k) => {
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path.push_str(k);
                }
                PathPart::Index(i) => path.push_str(&format!("[{i}]")),
            }
        }
        Err(format!("{path}: {message}"))
    }
}

struct Writer {
    out: String,
    /// Characters in the current line.
    column: usize,
    /// Only indentation and indicators so far in this line.
    indention: bool,
    /// The last character was white space or an indicator.
    whitespace: bool,
}

impl Writer {
    fn write_indent(&mut self, indent: isize) {
        let indent = indent.max(0) as usize;
        if !self.indention || self.column > indent || (self.column == indent && !self.whitespace) {
            self.line_break();
        }
        while self.column < indent {
            self.out.push(' ');
            self.column += 1;
        }
        self.whitespace = true;
        self.indention = true;
    }

    fn line_break(&mut self) {
        self.out.push('\n');
        self.column = 0;
    }

    fn indicator(&mut self, text: &str, need_whitespace: bool, is_whitespace: bool, is_indention: bool) {
        if need_whitespace && !self.whitespace {
            self.put(' ');
        }
        self.out.push_str(text);
        self.column += text.len();
        self.whitespace = is_whitespace;
        self.indention = self.indention && is_indention;
    }

    fn put(&mut self, c: char) {
        self.out.push(c);
        self.column += 1;
    }

    fn node<'a>(
        &mut self,
        value: &'a Value,
        indent: isize,
        in_mapping: bool,
        path: &mut Path<'a>,
    ) -> Result<(), String> {
        match value {
            Value::Scalar(s) => {
                let plain = match s.plain() {
                    Ok(plain) => plain,
                    Err(message) => return path.fail(&message),
                };
                let inner = if indent < 0 { 2 } else { indent + 2 };
                match &plain {
                    Plain::Str(text) => match resolve::through_reader(text) {
                        Ok(text) => self.string(&text, inner, false),
                        Err(message) => return path.fail(&message),
                    },
                    other => match number_text(other) {
                        Ok(text) => self.plain(&text, inner, true),
                        Err(message) => return path.fail(&message),
                    },
                }
                Ok(())
            }
            Value::Seq(s) if s.items.is_empty() => {
                self.indicator("[", true, true, false);
                self.indicator("]", false, false, false);
                Ok(())
            }
            Value::Map(m) if m.is_empty() => {
                self.indicator("{", true, true, false);
                self.indicator("}", false, false, false);
                Ok(())
            }
            Value::Seq(s) => {
                // A list below a key starts where the key starts.
                let inner = match (indent < 0, in_mapping && !self.indention) {
                    (true, _) => 0,
                    (false, true) => indent,
                    (false, false) => indent + 2,
                };
                for (i, item) in s.items.iter().enumerate() {
                    self.write_indent(inner);
                    self.indicator("-", true, false, true);
                    path.0.push(PathPart::Index(i));
                    self.node(item, inner, false, path)?;
                    path.0.pop();
                }
                Ok(())
            }
            Value::Map(m) => self.mapping(m, indent, path),
        }
    }

    fn mapping<'a>(&mut self, m: &'a Map, indent: isize, path: &mut Path<'a>) -> Result<(), String> {
        let inner = if indent < 0 { 0 } else { indent + 2 };
        for index in sorted_indexes(m) {
            let entry = &m.entries[index];
            // The keys of the object itself are read as text whatever they look like; deeper ones are not.
            if !path.0.is_empty() && !entry.key.is_string() && entry.key.tag != crate::value::Tag::Merge {
                let kind = Value::Scalar(entry.key.clone()).type_name();
                let key = &entry.key.text;
                return path.fail(&format!(
                    "the key `{key}` is a {kind}; keys must be strings: write \"{key}\" in quotes"
                ));
            }
            self.write_indent(inner);
            path.0.push(PathPart::Key(&entry.key.text));
            let key = match resolve::through_reader(&entry.key.text) {
                Ok(key) => key,
                Err(message) => return path.fail(&message),
            };
            let key = &*key;
            if key.len() <= SIMPLE_KEY_MAX && !has_break(key) {
                self.string(key, inner + 2, true);
                self.indicator(":", false, false, false);
            } else {
                self.indicator("?", true, false, true);
                self.string(key, inner + 2, false);
                self.write_indent(inner);
                self.indicator(":", true, false, true);
            }
            self.node(&entry.value, inner, true, path)?;
            path.0.pop();
        }
        Ok(())
    }

    fn string(&mut self, text: &str, indent: isize, key: bool) {
        let facts = Facts::of(text);
        if text.contains('\n') {
            if facts.block_allowed && !key {
                self.literal(text, indent);
            } else {
                self.double(text, indent, !key);
            }
        } else if resolve::needs_quotes(text) {
            self.double(text, indent, !key);
        } else if facts.plain_allowed {
            self.plain(text, indent, !key);
        } else if facts.single_allowed && !(key && facts.multiline) {
            self.single(text, indent, !key);
        } else {
            self.double(text, indent, !key);
        }
    }

    fn plain(&mut self, text: &str, indent: isize, breaks: bool) {
        if !self.whitespace {
            self.put(' ');
        }
        self.folding(text, indent, breaks, false);
        self.whitespace = false;
        self.indention = false;
    }

    fn single(&mut self, text: &str, indent: isize, breaks: bool) {
        self.indicator("'", true, false, false);
        self.folding(text, indent, breaks, true);
        self.indicator("'", false, false, false);
        self.whitespace = false;
        self.indention = false;
    }

    /// Text without line breaks of its own (but for the separators of Unicode), folded at single spaces.
    fn folding(&mut self, text: &str, indent: isize, breaks: bool, quoted: bool) {
        // A run that cannot reach the margin needs no look at each character.
        if text.len() + self.column <= WIDTH && !(quoted && text.contains('\'')) && !has_break(text) {
            self.out.push_str(text);
            self.column += text.chars().count();
            self.indention = false;
            return;
        }
        let bytes = text.as_bytes();
        let mut spaces = false;
        let mut after_break = false;
        for (i, c) in text.char_indices() {
            if c == ' ' {
                let last = i + 1 == bytes.len();
                let next_is_space = bytes.get(i + 1) == Some(&b' ');
                let inside = !quoted || (i > 0 && !last);
                if breaks && !spaces && self.column > WIDTH && inside && !next_is_space {
                    self.write_indent(indent);
                } else {
                    self.put(c);
                }
                spaces = true;
            } else if is_break(c) {
                self.out.push(c);
                self.column = 0;
                self.indention = true;
                after_break = true;
            } else {
                if after_break {
                    self.write_indent(indent);
                }
                if quoted && c == '\'' {
                    self.put('\'');
                }
                self.put(c);
                self.indention = false;
                spaces = false;
                after_break = false;
            }
        }
    }

    fn double(&mut self, text: &str, indent: isize, breaks: bool) {
        self.indicator("\"", true, false, false);
        let bytes = text.as_bytes();
        let mut spaces = false;
        // go-yaml looks for the byte order mark at the start of the text instead of at the character: with one there,
        // everything is escaped.
        let marked = text.starts_with('\u{FEFF}');
        for (i, c) in text.char_indices() {
            if marked || c == '"' || c == '\\' || !is_printable(c) || is_break(c) {
                self.escape(c);
                spaces = false;
            } else if c == ' ' {
                if breaks && !spaces && self.column > WIDTH && i > 0 && i + 1 < bytes.len() {
                    self.write_indent(indent);
                    if bytes.get(i + 1) == Some(&b' ') {
                        self.put('\\');
                    }
                } else {
                    self.put(c);
                }
                spaces = true;
            } else {
                self.put(c);
                spaces = false;
            }
        }
        self.indicator("\"", false, false, false);
        self.whitespace = false;
        self.indention = false;
    }

    fn escape(&mut self, c: char) {
        let short = match c {
            '\0' => '0',
            '\x07' => 'a',
            '\x08' => 'b',
            '\t' => 't',
            '\n' => 'n',
            '\x0B' => 'v',
            '\x0C' => 'f',
            '\r' => 'r',
            '\x1B' => 'e',
            '"' => '"',
            '\\' => '\\',
            '\u{85}' => 'N',
            '\u{A0}' => '_',
            '\u{2028}' => 'L',
            '\u{2029}' => 'P',
            _ => {
                let v = c as u32;
                let text = match v {
                    0..=0xFF => format!("\\x{v:02X}"),
                    0x100..=0xFFFF => format!("\\u{v:04X}"),
                    _ => format!("\\U{v:08X}"),
                };
                self.out.push_str(&text);
                self.column += text.len();
                return;
            }
        };
        self.put('\\');
        self.put(short);
    }

    fn literal(&mut self, text: &str, indent: isize) {
        self.indicator("|", true, false, false);
        if text.starts_with(' ') || text.chars().next().is_some_and(is_break) {
            self.indicator("2", false, false, false);
        }
        let mut back = text.chars().rev();
        match (back.next().map(is_break), back.next().map(is_break)) {
            (Some(true), None | Some(true)) => self.indicator("+", false, false, false),
            (Some(true), Some(false)) => {}
            _ => self.indicator("-", false, false, false),
        }
        self.line_break();
        self.indention = true;
        self.whitespace = true;
        let mut breaks = true;
        for c in text.chars() {
            if is_break(c) {
                if c == '\n' {
                    self.line_break();
                } else {
                    self.out.push(c);
                    self.column = 0;
                }
                self.indention = true;
                breaks = true;
            } else {
                if breaks {
                    self.write_indent(indent);
                }
                self.put(c);
                self.indention = false;
                breaks = false;
            }
        }
    }
}

/// What the text allows.
struct Facts {
    multiline: bool,
    plain_allowed: bool,
    single_allowed: bool,
    block_allowed: bool,
}

impl Facts {
    fn of(text: &str) -> Facts {
        let mut facts = Facts {
            multiline: false,
            plain_allowed: true,
            single_allowed: true,
            block_allowed: true,
        };
        if text.is_empty() {
            facts.block_allowed = false;
            return facts;
        }
        let bytes = text.as_bytes();
        let mut indicators = text.starts_with("---") || text.starts_with("...");
        let (mut leading, mut trailing_space, mut trailing_break) = (false, false, false);
        let (mut break_space, mut space_break, mut special) = (false, false, false);
        let (mut previous_space, mut previous_break, mut after_blank) = (false, false, true);
        for (i, c) in text.char_indices() {
            let end = i + c.len_utf8();
            let before_blank = end >= bytes.len() || matches!(bytes[end], b' ' | b'\t');
            match c {
                '#' | ',' | '[' | ']' | '{' | '}' | '&' | '*' | '!' | '|' | '>' | '\'' | '"' | '%' | '@'
                | '`'
                    if i == 0 =>
                {
                    indicators = true;
                }
                '?' | '-' if i == 0 && before_blank => indicators = true,
                ':' if before_blank => indicators = true,
                '#' if after_blank => indicators = true,
                _ => {}
            }
            if !is_printable(c) {
                special = true;
            }
            if c == ' ' {
                leading |= i == 0;
                trailing_space |= end == bytes.len();
                break_space |= previous_break;
                previous_space = true;
                previous_break = false;
            } else if is_break(c) {
                facts.multiline = true;
                leading |= i == 0;
                trailing_break |= end == bytes.len();
                space_break |= previous_space;
                previous_space = false;
                previous_break = true;
            } else {
                previous_space = false;
                previous_break = false;
            }
            after_blank = matches!(c, ' ' | '\t' | '\0') || is_break(c);
        }
        if leading || trailing_space || trailing_break || facts.multiline || indicators {
            facts.plain_allowed = false;
        }
        if trailing_space {
            facts.block_allowed = false;
        }
        if break_space {
            facts.plain_allowed = false;
            facts.single_allowed = false;
        }
        if space_break || special {
            facts.plain_allowed = false;
            facts.single_allowed = false;
            facts.block_allowed = false;
        }
        facts
    }
}

fn is_break(c: char) -> bool {
    matches!(c, '\r' | '\n' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

fn has_break(text: &str) -> bool {
    text.chars().any(is_break)
}

/// What is written as it is: no control characters, no byte order mark, nothing beyond the basic plane.
fn is_printable(c: char) -> bool {
    matches!(c, '\n' | '\x20'..='\x7E' | '\u{A0}'..='\u{D7FF}' | '\u{E000}'..='\u{FEFE}' | '\u{FF00}'..='\u{FFFD}')
}

fn number_text(plain: &Plain<'_>) -> Result<Cow<'static, str>, String> {
    Ok(match plain {
        Plain::Null => "null".into(),
        Plain::Bool(true) => "true".into(),
        Plain::Bool(false) => "false".into(),
        Plain::Int(i) => i.to_string().into(),
        Plain::Uint(u) => u.to_string().into(),
        Plain::Float(f) => match resolve::float_to_json(*f)? {
            serde_json::Value::Number(n) if n.is_f64() => resolve::go_float(*f).into(),
            whole => whole.to_string().into(),
        },
        Plain::Str(_) => "".into(),
    })
}

/// Indexes of the entries in the order in which keys are written.
fn sorted_indexes(map: &Map) -> Vec<usize> {
    let mut indexes: Vec<usize> = (0..map.len()).collect();
    let key = |i: usize| &*map.entries[i].key.text;
    merge_sort(&mut indexes, &|a, b| compare_keys(key(a), key(b)));
    indexes
}

/// A sort that survives an order which is not quite one: the rule for digits below can contradict itself on odd keys,
/// and the sort of the standard library may panic then.
fn merge_sort(items: &mut Vec<usize>, compare: &dyn Fn(usize, usize) -> Ordering) {
    if items.windows(2).all(|w| compare(w[0], w[1]) != Ordering::Greater) {
        return;
    }
    let mut right = items.split_off(items.len() / 2);
    merge_sort(items, compare);
    merge_sort(&mut right, compare);
    let left = std::mem::take(items);
    items.reserve(left.len() + right.len());
    let mut left = left.into_iter().peekable();
    let mut right = right.into_iter().peekable();
    while let (Some(&l), Some(&r)) = (left.peek(), right.peek()) {
        if compare(r, l) == Ordering::Less {
            items.push(r);
            right.next();
        } else {
            items.push(l);
            left.next();
        }
    }
    items.extend(left);
    items.extend(right);
}

/// The order of keys in written maps: letters after everything else, runs of digits as numbers.
pub fn compare_keys(a: &str, b: &str) -> Ordering {
    let ab = a.as_bytes();
    let bb = b.as_bytes();
    // Up to the first difference nothing matters, so skip what is equal.
    let common = ab.iter().zip(bb).take_while(|(x, y)| x == y).count();
    if common == ab.len() || common == bb.len() {
        return ab.len().cmp(&bb.len());
    }
    if ab[common].is_ascii_alphabetic() && bb[common].is_ascii_alphabetic() {
        return ab[common].cmp(&bb[common]);
    }
    let ar: Vec<char> = a.chars().collect();
    let br: Vec<char> = b.chars().collect();
    let i = ar.iter().zip(&br).take_while(|(x, y)| x == y).count();
    let (Some(&ac), Some(&bc)) = (ar.get(i), br.get(i)) else {
        return ar.len().cmp(&br.len());
    };
    let (al, bl) = (ac.is_alphabetic(), bc.is_alphabetic());
    if al && bl {
        return ac.cmp(&bc);
    }
    if al || bl {
        return if bl { Ordering::Less } else { Ordering::Greater };
    }
    let (mut an, mut bn) = (0i64, 0i64);
    if ac == '0' || bc == '0' {
        for &c in ar[..i].iter().rev().take_while(|c| c.is_ascii_digit()) {
            if c != '0' {
                an = 1;
                bn = 1;
                break;
            }
        }
    }
    let run = |chars: &[char], n: &mut i64| {
        let mut end = i;
        while let Some(d) = chars.get(end).and_then(|c| c.to_digit(10)) {
            *n = n.wrapping_mul(10).wrapping_add(i64::from(d));
            end += 1;
        }
        end
    };
    let ai = run(&ar, &mut an);
    let bi = run(&br, &mut bn);
    an.cmp(&bn).then(ai.cmp(&bi)).then(ac.cmp(&bc))
}

/// Writes a value as compact JSON the way Go does: keys sorted by bytes, `<`, `>` and `&` escaped.
pub fn write_json(value: &Value) -> Result<String, String> {
    let mut out = String::new();
    json_node(value, &mut out)?;
    Ok(out)
}

fn json_node(value: &Value, out: &mut String) -> Result<(), String> {
    match value {
        Value::Scalar(s) => match s.plain()? {
            Plain::Str(text) => json_string(&text, out),
            other => out.push_str(&match &other {
                Plain::Float(f) => json_float(*f)?.into(),
                other => number_text(other)?,
            }),
        },
        Value::Seq(s) => {
            out.push('[');
            for (i, item) in s.items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                json_node(item, out)?;
            }
            out.push(']');
        }
        Value::Map(m) => {
            let mut order: Vec<usize> = (0..m.len()).collect();
            order.sort_by(|&a, &b| m.entries[a].key.text.cmp(&m.entries[b].key.text));
            out.push('{');
            for (n, i) in order.into_iter().enumerate() {
                if n > 0 {
                    out.push(',');
                }
                json_string(&m.entries[i].key.text, out);
                out.push(':');
                json_node(&m.entries[i].value, out)?;
            }
            out.push('}');
        }
    }
    Ok(())
}

fn json_float(f: f64) -> Result<String, String> {
    resolve::float_to_json(f)?;
    let magnitude = f.abs();
    if magnitude != 0.0 && !(1e-6..1e21).contains(&magnitude) {
        let text = format!("{f:e}");
        return Ok(match text.split_once('e') {
            Some((m, e)) if !e.starts_with('-') => format!("{m}e+{e}"),
            _ => text,
        });
    }
    Ok(format!("{f}"))
}

fn json_string(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0C' => out.push_str("\\f"),
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' | '\0'..='\x1F' => {
                out.push_str(&format!("\\u{:04x}", c as u32));
            }
            _ => out.push(c),
        }
    }
    out.push('"');
}
