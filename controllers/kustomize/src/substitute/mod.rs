//! Variables in objects that are built already: Flux's `postBuild`.
//!
//! Flux substitutes in the YAML text of an object and reads the result again. Here it is done on the scalars, with the
//! same outcome where that is meant: a value that stands without quotes is read again in its place (`replicas: ${N}` becomes a
//! number, `hosts: ${LIST}` with `[a, b]` a list), a quoted one stays text. What differs: a value cannot break out of the quotes
//! or the block around it, and long lines that the writer would fold do not tear a `${…}` apart.
//!
//! The language itself, on bytes, is in [`text()`]. An error tells the field and the line.

pub mod glob;
mod text;

use std::collections::BTreeMap;
use std::fmt;

use serin_manifests::yaml::{ReadOptions, parse_document, write_value};
use serin_manifests::{Dialect, Limits, Map, Object, Pos, Scalar, Style, Tag, Value};

pub use text::TextError;

/// A label or annotation with this key and the value `disabled` spares an object.
pub const OPT_OUT: &str = "kustomize.toolkit.fluxcd.io/substitute";

/// Replaces every expansion in a text. With `strict`, a variable without a value or a default is an error.
pub fn text(text: &[u8], variables: &BTreeMap<String, String>, strict: bool) -> Result<Vec<u8>, TextError> {
    text::substitute(text, variables, strict)
}

/// What went wrong, and in which field.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub struct Error {
    /// What.
    #[source]
    pub cause: Cause,
    /// The field: keys and indices joined by dots.
    pub path: String,
    /// Where the field was written, as far as it was.
    pub pos: Pos,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        if !self.path.is_empty() {
            write!(f, " (in {}", self.path)?;
            if self.pos.line() > 0 {
                write!(f, ", line {}", self.pos.line())?;
            }
            write!(f, ")")?;
        }
        Ok(())
    }
}

/// Why a substitution failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Cause {
    /// The expansion itself.
    #[error("variable substitution failed: {0}")]
    Text(#[from] TextError),
    /// An offset cut a character in two.
    #[error("the substituted text is not UTF-8")]
    NotText,
    /// A value without quotes is not YAML any more in its place.
    #[error("the substituted text '{text}' is not a value: {message}; put it into quotes")]
    NotAValue {
        /// The text, shortened.
        text: String,
        /// What the reader says.
        message: String,
    },
    /// Two keys of a mapping became the same.
    #[error("mapping key '{0}' already defined after substitution")]
    DuplicateKey(String),
    /// A variable's name is not one.
    #[error("'{0}' var name is invalid, must match '^[_[:alpha:]][_[:alpha:][:digit:]]*$'")]
    Name(String),
    /// A value of a Secret is not what it should be.
    #[error("{0}")]
    Source(String),
}

/// The variables of one Kustomization. What is added later overrides what was added earlier: add what `substituteFrom`
/// names in its order, then `substitute`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variables(BTreeMap<String, String>);

impl Variables {
    /// None.
    pub fn new() -> Variables {
        Variables::default()
    }

    /// Adds one. Line breaks are taken out of the value, since one would break the text around it.
    pub fn add(&mut self, name: &str, value: &str) -> Result<(), Error> {
        let good = !name.is_empty()
            && (name.bytes().enumerate())
                .all(|(i, b)| b == b'_' || b.is_ascii_alphabetic() || (i > 0 && b.is_ascii_digit()));
        if !good {
            return Err(fail(Cause::Name(name.to_owned())));
        }
        self.0.insert(name.to_owned(), value.replace('\n', ""));
        Ok(())
    }

    /// Adds all values of a ConfigMap or a Secret.
    pub fn add_object(&mut self, object: &Object) -> Result<(), Error> {
        use base64::Engine as _;
        let secret = object.kind() == "Secret";
        let pairs = |field: &str| object.root().get(field).and_then(Value::as_map);
        for (name, value) in pairs("data").into_iter().flat_map(Map::iter) {
            let value = value.text().unwrap_or_default();
            if !secret {
                self.add(name, value)?;
                continue;
            }
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(value)
                .map_err(|_| {
                    fail(Cause::Source(format!(
                        "data.{name} of {} is not Base64",
                        object.id()
                    )))
                })?;
            self.add(name, &String::from_utf8_lossy(&bytes))?;
        }
        if secret {
            for (name, value) in pairs("stringData").into_iter().flat_map(Map::iter) {
                self.add(name, value.text().unwrap_or_default())?;
            }
        }
        Ok(())
    }

    /// By name.
    pub fn as_map(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// By name.
    pub fn into_map(self) -> BTreeMap<String, String> {
        self.0
    }
}

fn fail(cause: Cause) -> Error {
    Error {
        cause,
        path: String::new(),
        pos: Pos::NONE,
    }
}

/// Substitutes in all values and keys of an object. `None` when nothing changes, or when the object opts out.
pub fn object(
    object: &Object,
    variables: &BTreeMap<String, String>,
    strict: bool,
) -> Result<Option<Object>, Error> {
    let spared = |value: Option<&str>| value == Some("disabled");
    if spared(object.annotation(OPT_OUT)) || spared(object.label(OPT_OUT)) {
        return Ok(None);
    }
    if !mentions(object.root()) {
        return Ok(None);
    }
    let walk = Walk { variables, strict };
    let mut root = object.root().clone();
    walk.map(&mut root, &mut Vec::new())?;
    Ok(Some(Object::new(root).with_source(object.source().cloned())))
}

/// Whether there is a `$` anywhere. Most objects have none.
fn mentions(map: &Map) -> bool {
    fn below(value: &Value) -> bool {
        match value {
            Value::Scalar(scalar) => scalar.text.contains('$'),
            Value::Seq(seq) => seq.items.iter().any(below),
            Value::Map(map) => mentions(map),
        }
    }
    (map.entries.iter()).any(|entry| entry.key.text.contains('$') || below(&entry.value))
}

struct Walk<'a> {
    variables: &'a BTreeMap<String, String>,
    strict: bool,
}

/// What stands before a value that is read again: the value of a key may not be a block, an element of a list may.
#[derive(Clone, Copy)]
enum Place {
    Field,
    Element,
}

impl Walk<'_> {
    fn map(&self, map: &mut Map, path: &mut Vec<String>) -> Result<(), Error> {
        let mut renamed = false;
        for entry in &mut map.entries {
            path.push(entry.key.text.to_string());
            if entry.key.text.contains('$') {
                let text = self.text(&entry.key, path)?;
                entry.key = Scalar {
                    text: text.into(),
                    tag: Tag::Str,
                    ..entry.key.clone()
                };
                renamed = true;
            }
            self.value(&mut entry.value, Place::Field, path)?;
            path.pop();
        }
        if renamed {
            let mut seen = std::collections::HashSet::new();
            if let Some(entry) = map.entries.iter().find(|entry| !seen.insert(&*entry.key.text)) {
                return Err(Error {
                    cause: Cause::DuplicateKey(entry.key.text.to_string()),
                    path: path.join("."),
                    pos: entry.key.pos,
                });
            }
        }
        Ok(())
    }

    fn value(&self, value: &mut Value, place: Place, path: &mut Vec<String>) -> Result<(), Error> {
        match value {
            Value::Map(map) => self.map(map, path),
            Value::Seq(seq) => {
                for (index, item) in seq.items.iter_mut().enumerate() {
                    path.push(index.to_string());
                    self.value(item, Place::Element, path)?;
                    path.pop();
                }
                Ok(())
            }
            Value::Scalar(scalar) if scalar.text.contains('$') => {
                let text = self.text(scalar, path)?;
                *value = if is_written_plain(scalar) {
                    self.read_again(&text, scalar, place, path)?
                } else {
                    Value::Scalar(Scalar {
                        text: text.into(),
                        tag: Tag::Str,
                        ..scalar.clone()
                    })
                };
                Ok(())
            }
            Value::Scalar(_) => Ok(()),
        }
    }

    fn text(&self, scalar: &Scalar, path: &[String]) -> Result<String, Error> {
        let at = |cause| Error {
            cause,
            path: path.join("."),
            pos: scalar.pos,
        };
        let bytes = text::substitute(scalar.text.as_bytes(), self.variables, self.strict)
            .map_err(|e| at(Cause::Text(e)))?;
        String::from_utf8(bytes).map_err(|_| at(Cause::NotText))
    }

    /// The value that the text would be if it were typed in the place of the scalar.
    fn read_again(&self, text: &str, scalar: &Scalar, place: Place, path: &[String]) -> Result<Value, Error> {
        let not_a_value = |message: &str| Error {
            cause: Cause::NotAValue {
                text: text.chars().take(80).collect(),
                message: message.to_owned(),
            },
            path: path.join("."),
            pos: scalar.pos,
        };
        if text.contains(['\n', '\r']) {
            return Ok(Value::Scalar(Scalar {
                text: text.into(),
                tag: Tag::Str,
                ..scalar.clone()
            }));
        }
        let limits = Limits::default();
        let options = ReadOptions {
            file: "",
            line_offset: 0,
            dialect: Dialect::Kubectl,
            limits: &limits,
        };
        let document = match place {
            Place::Field => format!("k: {text}\n"),
            Place::Element => format!("- {text}\n"),
        };
        let mut read = match parse_document(&document, &options) {
            Ok(Some(Value::Map(mut map))) if map.len() == 1 => map.entries.remove(0).value,
            Ok(Some(Value::Seq(mut seq))) if seq.items.len() == 1 => seq.items.remove(0),
            Ok(_) => return Err(not_a_value("it would be another structure")),
            Err(serin_manifests::Error::Syntax { message, .. }) => return Err(not_a_value(&message)),
            Err(e) => return Err(not_a_value(&e.to_string())),
        };
        if let Value::Scalar(new) = &mut read {
            new.pos = scalar.pos;
        }
        Ok(read)
    }
}

/// Whether the writer puts a scalar without quotes.
fn is_written_plain(scalar: &Scalar) -> bool {
    if scalar.style != Style::Plain {
        return false;
    }
    write_value(&Value::Scalar(scalar.clone()))
        .is_ok_and(|text| !text.starts_with(['\'', '"', '|', '>', '!']))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serin_manifests::parse_documents;

    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let mut variables = Variables::new();
        for (name, value) in pairs {
            variables.add(name, value).unwrap();
        }
        variables.into_map()
    }

    fn json(text: &str, pairs: &[(&str, &str)]) -> Result<serde_json::Value, Error> {
        let text = format!("apiVersion: v1\nkind: X\nmetadata: {{name: a}}\n{text}");
        let parsed = parse_documents(&text, "a.yaml").unwrap().remove(0);
        let new = object(&parsed, &variables(pairs), true)?;
        Ok(new.unwrap_or(parsed).to_json().unwrap())
    }

    #[test]
    fn a_value_without_quotes_is_read_again_in_its_place() {
        let pairs = [
            ("n", "5"),
            ("l", "[a, {b: c}]"),
            ("t", "true"),
            ("e", ""),
            ("p", "a: b"),
        ];
        let got = json(
            "a: ${n}\nb: \"${n}\"\nc: ${l}\nd: ${t}\ne: ${e}\nf: x${n}\ng: '${t}'\nh: [\"${n}\", 1]\ni:\n- ${p}\nj: |\n  ${t}\n",
            &pairs,
        )
        .unwrap();
        assert_eq!(got["a"], 5);
        assert_eq!(got["b"], "5");
        assert_eq!(got["c"], serde_json::json!(["a", {"b": "c"}]));
        assert_eq!(got["d"], true);
        assert_eq!(got["e"], serde_json::Value::Null);
        assert_eq!(got["f"], "x5");
        assert_eq!(got["g"], "true");
        assert_eq!(got["h"][0], "5");
        assert_eq!(got["i"][0]["b"], serde_json::Value::Null);
        assert_eq!(got["i"][0]["a"], "b");
        assert_eq!(got["j"], "true\n");
    }

    #[test]
    fn a_value_cannot_break_out_of_its_quotes() {
        let got = json("a: \"x ${v} y\"\n", &[("v", "\" # '")]).unwrap();
        assert_eq!(got["a"], "x \" # ' y");
    }

    #[test]
    fn an_error_names_the_field_and_the_line() {
        let error = json("spec:\n  list:\n  - {name: \"${gone}\"}\n", &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "variable substitution failed: variable not set (strict mode): \"gone\" (in spec.list.0.name, line 6)"
        );
        let error = json("a: ${p}\n", &[("p", "b: c")]).unwrap_err();
        assert!(
            error.to_string().contains("put it into quotes (in a, line 4)"),
            "{error}"
        );
    }

    #[test]
    fn keys_are_substituted_and_must_stay_different() {
        let got = json("data: {\"${n}\": x, b: z}\n", &[("n", "a")]).unwrap();
        assert_eq!(got["data"], serde_json::json!({"a": "x", "b": "z"}));
        let error = json("data: {\"${n}\": x, b: y}\n", &[("n", "b")]).unwrap_err();
        assert_eq!(error.cause, Cause::DuplicateKey("b".into()));
    }

    #[test]
    fn what_is_added_later_overrides_and_secrets_are_decoded() {
        let objects = parse_documents(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: \"1\", b: \"1\"}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata: {b: Mgo=, c: Mg==}\n",
            "x",
        )
        .unwrap();
        let mut variables = Variables::new();
        for object in &objects {
            variables.add_object(object).unwrap();
        }
        variables.add("c", "3\n").unwrap();
        let pairs: Vec<(&str, &str)> = variables
            .as_map()
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect();
        assert_eq!(pairs, [("a", "1"), ("b", "2"), ("c", "3")]);
        for bad in ["1a", "a-b", "", "a.b"] {
            assert!(
                variables
                    .add(bad, "")
                    .unwrap_err()
                    .to_string()
                    .contains("var name is invalid"),
                "{bad}"
            );
        }
    }

    #[test]
    fn an_object_that_opts_out_is_left_alone() {
        let text = "apiVersion: v1\nkind: X\nmetadata: {name: a, labels: {kustomize.toolkit.fluxcd.io/substitute: disabled}}\nx: ${y}\n";
        let parsed = parse_documents(text, "a").unwrap().remove(0);
        assert_eq!(
            object(&parsed, &BTreeMap::new(), true).unwrap().map(|o| o.id()),
            None
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// Where a value neither holds YAML's own signs nor meets them, text and scalars agree.
        #[test]
        fn plain_words_give_what_substitution_in_the_text_gives(
            template in "[a-z${}:/_-]{0,12}", value in "[a-z0-9./_]{0,8}", quoted in any::<bool>(),
        ) {
            let field = if quoted { Scalar { style: Style::Double, ..Scalar::string(template.as_str()) } } else { Scalar::untyped(template.as_str()) };
            let mut root = Map::new();
            for (key, value) in [("apiVersion", "v1"), ("kind", "X")] {
                root.push(key, Value::string(value));
            }
            root.push("metadata", Value::string_map([("name", "n")]));
            root.push("x", Value::Scalar(field));
            let before = Object::new(root);
            let variables = variables(&[("a", &value), ("b", "1")]);
            let ours = object(&before, &variables, false).map(|o| o.unwrap_or_else(|| before.clone()).to_json());
            let theirs = text::substitute(before.to_yaml().unwrap().as_bytes(), &variables, false)
                .map(|t| parse_documents(&String::from_utf8(t).unwrap(), "x"));
            match (ours, theirs) {
                (Ok(Ok(ours)), Ok(Ok(theirs))) => prop_assert_eq!(ours, theirs[0].to_json().unwrap()),
                (Err(_), Err(_) | Ok(Err(_))) => {}
                // What the text breaks by accident, the scalar need not.
                (Ok(_), _) => {}
                (Err(e), Ok(Ok(_))) => prop_assert!(false, "{} is refused: {}", template, e),
            }
        }
    }
}
