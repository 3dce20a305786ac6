//! The value tree: what a YAML document says, with what is needed to write it back as it was meant.
//!
//! A scalar keeps its text, the style it was written in and the tag it resolved to, because `1.10`, `"1.10"` and
//! `!!str 1.10` are three different things to a transformer that edits text. Maps keep the order of their keys.
//! A node is 40 bytes; a position costs nothing extra (it lives in the padding of a scalar).

use std::borrow::Cow;
use std::fmt;

use crate::resolve::{self, Plain};

/// Where a node starts in its file. Lines and columns count from 1; columns above 1023 are cut to 1023.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Pos(u32);

impl Pos {
    /// No position: the node was made by a program.
    pub const NONE: Pos = Pos(0);

    /// A position from a line and a column, both counted from 1.
    pub fn new(line: usize, column: usize) -> Pos {
        let line = line.min((1 << 22) - 1) as u32;
        let column = column.min(1023) as u32;
        Pos(line << 10 | column)
    }

    /// The line, from 1; 0 when unknown.
    pub fn line(self) -> usize {
        (self.0 >> 10) as usize
    }

    /// The column, from 1; 0 when unknown.
    pub fn column(self) -> usize {
        (self.0 & 1023) as usize
    }
}

impl fmt::Debug for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line(), self.column())
    }
}

/// What kind of value a scalar is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Tag {
    /// Made by a program without saying; resolved from text and style when it is read.
    Unset,
    /// `!!str`
    Str,
    /// `!!int`
    Int,
    /// `!!float`
    Float,
    /// `!!bool`
    Bool,
    /// `!!null`
    Null,
    /// `!!timestamp`
    Timestamp,
    /// `!!binary`
    Binary,
    /// `<<`
    Merge,
    /// A tag that YAML does not define, such as `!vault`; the value is its text.
    Custom,
}

/// How a scalar was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Style {
    /// Without quotes.
    Plain,
    /// `'…'`
    Single,
    /// `"…"`
    Double,
    /// `|`
    Literal,
    /// `>`
    Folded,
}

/// A scalar: text, tag, style, position.
#[derive(Clone)]
pub struct Scalar {
    /// The text after unescaping, as an editor of the value sees it.
    pub text: Box<str>,
    /// Where it starts.
    pub pos: Pos,
    /// What it resolved to.
    pub tag: Tag,
    /// How it was written.
    pub style: Style,
    /// The tag was written out in the source (`!!int "5"`).
    pub tagged: bool,
}

impl Scalar {
    /// A string, whatever it looks like.
    pub fn string(text: impl Into<Box<str>>) -> Scalar {
        Scalar {
            text: text.into(),
            pos: Pos::NONE,
            tag: Tag::Str,
            style: Style::Plain,
            tagged: false,
        }
    }

    /// Text whose type follows from how it looks, as if typed into a file without quotes.
    pub fn untyped(text: impl Into<Box<str>>) -> Scalar {
        Scalar {
            text: text.into(),
            pos: Pos::NONE,
            tag: Tag::Unset,
            style: Style::Plain,
            tagged: false,
        }
    }

    /// A scalar with a known tag.
    pub fn tagged_as(tag: Tag, text: impl Into<Box<str>>) -> Scalar {
        Scalar {
            text: text.into(),
            pos: Pos::NONE,
            tag,
            style: Style::Plain,
            tagged: false,
        }
    }

    /// The value that a reader of the written document would get.
    pub fn plain(&self) -> Result<Plain<'_>, String> {
        resolve::read(self)
    }

    /// Whether a reader would see a string.
    pub fn is_string(&self) -> bool {
        match self.tag {
            Tag::Str | Tag::Custom | Tag::Binary => true,
            Tag::Unset => {
                self.style != Style::Plain
                    || self.text.contains('\n')
                    || resolve::tag_of(&self.text) == Tag::Str
            }
            _ => false,
        }
    }

    /// Whether this is `null`, `~` or nothing.
    pub fn is_null(&self) -> bool {
        self.tag == Tag::Null
    }
}

impl PartialEq for Scalar {
    /// Equal when a reader gets the same value; positions and quotes do not count.
    fn eq(&self, other: &Scalar) -> bool {
        match (self.plain(), other.plain()) {
            (Ok(a), Ok(b)) => a == b,
            _ => self.text == other.text && self.tag == other.tag,
        }
    }
}

impl fmt::Debug for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:{:?}", self.text, self.tag)
    }
}

/// One key and its value.
#[derive(Clone, PartialEq, Debug)]
pub struct Entry {
    /// The key.
    pub key: Scalar,
    /// The value.
    pub value: Value,
}

/// A mapping, in the order of its source. Keys are compared by text.
#[derive(Clone, Default)]
pub struct Map {
    /// The entries; no two keys have the same text unless a caller made it so.
    pub entries: Vec<Entry>,
    /// Where the mapping starts.
    pub pos: Pos,
}

/// Where a linear look at the keys stops being the fastest way to find one.
const SMALL_MAP: usize = 32;

impl Map {
    /// An empty mapping.
    pub fn new() -> Map {
        Map::default()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The index of a key.
    pub fn index_of(&self, key: &str) -> Option<usize> {
        self.entries.iter().position(|e| &*e.key.text == key)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries
            .iter()
            .find(|e| &*e.key.text == key)
            .map(|e| &e.value)
    }

    /// The value of a key, to change.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Value> {
        self.entries
            .iter_mut()
            .find(|e| &*e.key.text == key)
            .map(|e| &mut e.value)
    }

    /// Sets a key, in its place if present, at the end otherwise.
    pub fn set(&mut self, key: &str, value: Value) {
        match self.get_mut(key) {
            Some(slot) => *slot = value,
            None => self.push(key, value),
        }
    }

    /// Adds a key without looking whether it exists.
    pub fn push(&mut self, key: &str, value: Value) {
        self.entries.push(Entry {
            key: Scalar::untyped(key),
            value,
        });
    }

    /// Removes a key and returns its value.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let index = self.index_of(key)?;
        Some(self.entries.remove(index).value)
    }

    /// Keys and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|e| (&*e.key.text, &e.value))
    }

    /// A function from key to index that stays fast for large maps. It is a snapshot: do not add or remove meanwhile.
    pub fn finder(&self) -> Finder<'_> {
        if self.entries.len() <= SMALL_MAP {
            return Finder::Scan(&self.entries);
        }
        let mut index = std::collections::HashMap::with_capacity(self.entries.len());
        for (i, e) in self.entries.iter().enumerate() {
            index.entry(&*e.key.text).or_insert(i);
        }
        Finder::Index(index)
    }
}

/// See [`Map::finder`].
pub enum Finder<'a> {
    /// Few keys: compare one by one.
    Scan(&'a [Entry]),
    /// Many keys: a hash index.
    Index(std::collections::HashMap<&'a str, usize>),
}

impl Finder<'_> {
    /// The index of a key.
    pub fn find(&self, key: &str) -> Option<usize> {
        match self {
            Finder::Scan(entries) => entries.iter().position(|e| &*e.key.text == key),
            Finder::Index(index) => index.get(key).copied(),
        }
    }
}

impl PartialEq for Map {
    /// Equal when both have the same keys with equal values, in any order.
    fn eq(&self, other: &Map) -> bool {
        if self.len() != other.len() {
            return false;
        }
        let finder = other.finder();
        self.entries.iter().all(|e| {
            finder
                .find(&e.key.text)
                .is_some_and(|i| other.entries[i].value == e.value)
        })
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.entries.iter().map(|e| (&e.key, &e.value)))
            .finish()
    }
}

/// A sequence.
#[derive(Clone, Default)]
pub struct Seq {
    /// The elements.
    pub items: Vec<Value>,
    /// Where the sequence starts.
    pub pos: Pos,
}

impl PartialEq for Seq {
    fn eq(&self, other: &Seq) -> bool {
        self.items == other.items
    }
}

impl fmt::Debug for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.items).finish()
    }
}

/// A node of the tree.
#[derive(Clone, PartialEq)]
pub enum Value {
    /// Text, number, boolean, null.
    Scalar(Scalar),
    /// A list.
    Seq(Seq),
    /// An object.
    Map(Map),
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Scalar(s) => s.fmt(f),
            Value::Seq(s) => s.fmt(f),
            Value::Map(m) => m.fmt(f),
        }
    }
}

impl Value {
    /// A string.
    pub fn string(text: impl Into<Box<str>>) -> Value {
        Value::Scalar(Scalar::string(text))
    }

    /// An explicit null.
    pub fn null() -> Value {
        Value::Scalar(Scalar::tagged_as(Tag::Null, "null"))
    }

    /// An integer.
    pub fn int(number: i64) -> Value {
        Value::Scalar(Scalar::tagged_as(Tag::Int, number.to_string()))
    }

    /// A boolean.
    pub fn bool(value: bool) -> Value {
        Value::Scalar(Scalar::tagged_as(Tag::Bool, if value { "true" } else { "false" }))
    }

    /// A mapping of strings, in the given order.
    pub fn string_map<K: AsRef<str>, V: Into<Box<str>>>(pairs: impl IntoIterator<Item = (K, V)>) -> Value {
        let mut map = Map::new();
        for (k, v) in pairs {
            map.push(k.as_ref(), Value::string(v));
        }
        Value::Map(map)
    }

    /// The mapping, if it is one.
    pub fn as_map(&self) -> Option<&Map> {
        match self {
            Value::Map(m) => Some(m),
            _ => None,
        }
    }

    /// The mapping, to change.
    pub fn as_map_mut(&mut self) -> Option<&mut Map> {
        match self {
            Value::Map(m) => Some(m),
            _ => None,
        }
    }

    /// The elements, if it is a sequence.
    pub fn as_seq(&self) -> Option<&[Value]> {
        match self {
            Value::Seq(s) => Some(&s.items),
            _ => None,
        }
    }

    /// The elements, to change.
    pub fn as_seq_mut(&mut self) -> Option<&mut Vec<Value>> {
        match self {
            Value::Seq(s) => Some(&mut s.items),
            _ => None,
        }
    }

    /// The scalar, if it is one.
    pub fn as_scalar(&self) -> Option<&Scalar> {
        match self {
            Value::Scalar(s) => Some(s),
            _ => None,
        }
    }

    /// The text of a scalar that is not null, whatever its type.
    pub fn text(&self) -> Option<&str> {
        match self {
            Value::Scalar(s) if !s.is_null() => Some(&s.text),
            _ => None,
        }
    }

    /// The string, if a reader would see a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Scalar(s) if s.is_string() => Some(&s.text),
            _ => None,
        }
    }

    /// Whether it is null.
    pub fn is_null(&self) -> bool {
        matches!(self, Value::Scalar(s) if s.is_null())
    }

    /// Null, `{}` or `[]`.
    pub fn is_null_or_empty(&self) -> bool {
        match self {
            Value::Scalar(s) => s.is_null(),
            Value::Seq(s) => s.items.is_empty(),
            Value::Map(m) => m.is_empty(),
        }
    }

    /// The value below a key of a mapping.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.as_map()?.get(key)
    }

    /// Follows keys of mappings.
    pub fn at(&self, path: &[&str]) -> Option<&Value> {
        path.iter().try_fold(self, |v, key| v.get(key))
    }

    /// Where it starts.
    pub fn pos(&self) -> Pos {
        match self {
            Value::Scalar(s) => s.pos,
            Value::Seq(s) => s.pos,
            Value::Map(m) => m.pos,
        }
    }

    /// `mapping`, `sequence`, `string`, `number`, … for messages.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Map(_) => "mapping",
            Value::Seq(_) => "sequence",
            Value::Scalar(s) => match s.plain() {
                Ok(Plain::Null) => "null",
                Ok(Plain::Bool(_)) => "boolean",
                Ok(Plain::Int(_) | Plain::Uint(_) | Plain::Float(_)) => "number",
                Ok(Plain::Str(_)) | Err(_) => "string",
            },
        }
    }

    /// Number of nodes in the tree, keys not counted.
    pub fn node_count(&self) -> usize {
        match self {
            Value::Scalar(_) => 1,
            Value::Seq(s) => 1 + s.items.iter().map(Value::node_count).sum::<usize>(),
            Value::Map(m) => 1 + m.entries.iter().map(|e| e.value.node_count()).sum::<usize>(),
        }
    }

    /// The tree as JSON. Fails on what JSON cannot say: infinite numbers, keys that are not strings, tags that do not fit.
    pub fn to_json(&self) -> Result<serde_json::Value, String> {
        Ok(match self {
            Value::Scalar(s) => match s.plain()? {
                Plain::Null => serde_json::Value::Null,
                Plain::Bool(b) => serde_json::Value::Bool(b),
                Plain::Int(i) => serde_json::Value::from(i),
                Plain::Uint(u) => serde_json::Value::from(u),
                Plain::Float(f) => resolve::float_to_json(f)?,
                Plain::Str(s) => serde_json::Value::String(s.into_owned()),
            },
            Value::Seq(s) => {
                serde_json::Value::Array(s.items.iter().map(Value::to_json).collect::<Result<_, _>>()?)
            }
            Value::Map(m) => {
                let mut out = serde_json::Map::new();
                for e in &m.entries {
                    out.insert(e.key.text.to_string(), e.value.to_json()?);
                }
                serde_json::Value::Object(out)
            }
        })
    }

    /// The tree of a JSON value.
    pub fn from_json(json: &serde_json::Value) -> Value {
        match json {
            serde_json::Value::Null => Value::null(),
            serde_json::Value::Bool(b) => Value::bool(*b),
            serde_json::Value::Number(n) => {
                if n.is_f64() {
                    let text = resolve::go_float(n.as_f64().unwrap_or(0.0));
                    let tag = resolve::tag_of(&text);
                    Value::Scalar(Scalar::tagged_as(tag, text))
                } else {
                    Value::Scalar(Scalar::tagged_as(Tag::Int, n.to_string()))
                }
            }
            serde_json::Value::String(s) => Value::string(s.as_str()),
            serde_json::Value::Array(items) => Value::Seq(Seq {
                items: items.iter().map(Value::from_json).collect(),
                pos: Pos::NONE,
            }),
            serde_json::Value::Object(fields) => {
                let mut map = Map {
                    entries: Vec::with_capacity(fields.len()),
                    pos: Pos::NONE,
                };
                for (k, v) in fields {
                    map.push(k, Value::from_json(v));
                }
                Value::Map(map)
            }
        }
    }
}

impl From<Map> for Value {
    fn from(map: Map) -> Value {
        Value::Map(map)
    }
}

impl From<Vec<Value>> for Value {
    fn from(items: Vec<Value>) -> Value {
        Value::Seq(Seq {
            items,
            pos: Pos::NONE,
        })
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::string(text)
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::string(text)
    }
}

impl From<Cow<'_, str>> for Value {
    fn from(text: Cow<'_, str>) -> Value {
        Value::string(text.into_owned())
    }
}
