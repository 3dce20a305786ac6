//! From a YAML tree to typed fields, with the place of every complaint.
//!
//! Two manners, both kustomize's: the kustomization file is strict (unknown fields and wrong types are errors), the
//! configuration of a plugin or a file of replacements is lenient (unknown fields are ignored, numbers become text).

use serin_manifests::{Map, Place, Tag, Value};

use crate::error::{Cause, Error, Result, nearest};

/// Where a document comes from and how strictly it is read.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    /// The file, for messages.
    pub file: &'a str,
    /// Its text, for the line in messages.
    pub text: &'a str,
    /// What it is: `Kustomization`.
    pub what: &'a str,
    /// Unknown fields and scalars of other types are errors.
    pub strict: bool,
}

impl Context<'_> {
    pub(crate) fn place(&self, value: &Value) -> Place {
        Place::in_text(self.file, self.text, value.pos().line(), value.pos().column())
    }

    pub(crate) fn wrong_type(&self, field: &str, expected: &str, value: &Value) -> Error {
        let what = self.what;
        let error = Error::new(Cause::InvalidKustomization(format!(
            "cannot use {} as field {what}.{field} of type {expected}",
            value.type_name()
        )));
        let error = error.at(self.place(value));
        match value {
            Value::Scalar(_) if expected == "string" => error.help(format!(
                "the file is read as YAML 1.1, where this is a {} without quotes; put it in quotes",
                value.type_name()
            )),
            _ => error,
        }
    }

    /// A string.
    pub(crate) fn string(&self, field: &str, value: &Value) -> Result<String> {
        match value {
            Value::Scalar(s) if s.tag == Tag::Str || s.tag == Tag::Merge => Ok(s.text.to_string()),
            Value::Scalar(s) if s.is_null() => Ok(String::new()),
            Value::Scalar(s) if !self.strict => Ok(s.text.to_string()),
            other => Err(self.wrong_type(field, "string", other)),
        }
    }

    pub(crate) fn map<'v>(&self, field: &str, value: &'v Value) -> Result<Option<&'v Map>> {
        match value {
            Value::Map(map) => Ok(Some(map)),
            v if v.is_null() => Ok(None),
            other => Err(self.wrong_type(field, "object", other)),
        }
    }
}

/// The fields of one object; remembers which were asked for.
pub(crate) struct Fields<'a, 'v> {
    pub(crate) ctx: &'a Context<'a>,
    map: &'v Map,
    path: String,
    known: Vec<&'static str>,
    any_field: bool,
}

impl<'a, 'v> Fields<'a, 'v> {
    pub(crate) fn new(ctx: &'a Context<'a>, path: &str, map: &'v Map) -> Fields<'a, 'v> {
        Fields {
            ctx,
            map,
            path: path.to_owned(),
            known: Vec::new(),
            any_field: false,
        }
    }

    fn at(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// A field that is there and not null. Names match in any case, the exact one first, as in Go.
    pub(crate) fn get(&mut self, name: &'static str) -> Option<&'v Value> {
        self.known.push(name);
        let exact = self.map.get(name);
        let found = exact.or_else(|| {
            self.map
                .entries
                .iter()
                .find(|e| e.key.text.eq_ignore_ascii_case(name))
                .map(|e| &e.value)
        });
        found.filter(|v| !v.is_null())
    }

    pub(crate) fn string(&mut self, name: &'static str) -> Result<String> {
        let path = self.at(name);
        self.get(name)
            .map_or(Ok(String::new()), |v| self.ctx.string(&path, v))
    }

    pub(crate) fn optional_string(&mut self, name: &'static str) -> Result<Option<String>> {
        let path = self.at(name);
        self.get(name).map(|v| self.ctx.string(&path, v)).transpose()
    }

    pub(crate) fn bool(&mut self, name: &'static str) -> Result<bool> {
        let path = self.at(name);
        match self.get(name) {
            None => Ok(false),
            Some(Value::Scalar(s)) if s.tag == Tag::Bool => Ok(&*s.text == "true"),
            Some(other) => Err(self.ctx.wrong_type(&path, "bool", other)),
        }
    }

    pub(crate) fn int(&mut self, name: &'static str) -> Result<i64> {
        let path = self.at(name);
        match self.get(name) {
            None => Ok(0),
            Some(value) => match value {
                Value::Scalar(s) if s.tag == Tag::Int => s
                    .text
                    .parse()
                    .map_err(|_| self.ctx.wrong_type(&path, "int64", value)),
                other => Err(self.ctx.wrong_type(&path, "int64", other)),
            },
        }
    }

    pub(crate) fn strings(&mut self, name: &'static str) -> Result<Vec<String>> {
        Ok(self
            .strings_with_values(name)?
            .into_iter()
            .map(|(s, _)| s)
            .collect())
    }

    /// Strings with the nodes they come from, for messages.
    pub(crate) fn strings_with_values(&mut self, name: &'static str) -> Result<Vec<(String, &'v Value)>> {
        let path = self.at(name);
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Seq(seq)) => seq
                .items
                .iter()
                .map(|item| Ok((self.ctx.string(&path, item)?, item)))
                .collect(),
            Some(other) => Err(self.ctx.wrong_type(&path, "list of strings", other)),
        }
    }

    pub(crate) fn string_map(&mut self, name: &'static str) -> Result<Option<Vec<(String, String)>>> {
        let path = self.at(name);
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let Some(map) = self.ctx.map(&path, value)? else {
            return Ok(None);
        };
        let pairs = map.entries.iter().map(|e| {
            let path = format!("{path}.{}", e.key.text);
            Ok((e.key.text.to_string(), self.ctx.string(&path, &e.value)?))
        });
        pairs.collect::<Result<Vec<_>>>().map(Some)
    }

    pub(crate) fn object<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&mut Fields<'a, 'v>) -> Result<T>,
    ) -> Result<Option<T>> {
        let path = self.at(name);
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let Some(map) = self.ctx.map(&path, value)? else {
            return Ok(None);
        };
        let mut fields = Fields::new(self.ctx, &path, map);
        let out = read(&mut fields)?;
        fields.finish()?;
        Ok(Some(out))
    }

    pub(crate) fn list<T>(
        &mut self,
        name: &'static str,
        mut read: impl FnMut(&mut Fields<'a, 'v>) -> Result<T>,
    ) -> Result<Vec<T>> {
        let path = self.at(name);
        let Some(value) = self.get(name) else {
            return Ok(Vec::new());
        };
        let Value::Seq(seq) = value else {
            return Err(self.ctx.wrong_type(&path, "list", value));
        };
        static EMPTY: Map = Map {
            entries: Vec::new(),
            pos: serin_manifests::Pos::NONE,
        };
        let mut out = Vec::with_capacity(seq.items.len());
        for item in &seq.items {
            let map = self.ctx.map(&path, item)?.unwrap_or(&EMPTY);
            let mut fields = Fields::new(self.ctx, &path, map);
            out.push(read(&mut fields)?);
            fields.finish()?;
        }
        Ok(out)
    }

    /// Accepts whatever other fields there are.
    pub(crate) fn ignore_rest(&mut self) {
        self.any_field = true;
    }

    /// The place of the object.
    pub(crate) fn place(&self) -> Place {
        Place::in_text(
            self.ctx.file,
            self.ctx.text,
            self.map.pos.line(),
            self.map.pos.column(),
        )
    }

    /// Complains about the first field that nobody asked for.
    pub(crate) fn finish(&mut self) -> Result<()> {
        if !self.ctx.strict || self.any_field {
            return Ok(());
        }
        for entry in &self.map.entries {
            if self.known.iter().any(|k| k.eq_ignore_ascii_case(&entry.key.text)) {
                continue;
            }
            let what = if self.path.is_empty() {
                self.ctx.what.to_owned()
            } else {
                format!("{}.{}", self.ctx.what, self.path)
            };
            let field = entry.key.text.to_string();
            let place = Place::in_text(
                self.ctx.file,
                self.ctx.text,
                entry.key.pos.line(),
                entry.key.pos.column(),
            );
            let suggestion = nearest(&field, self.known.iter().copied());
            let error = Error::new(Cause::UnknownField { what, field }).at(place);
            return Err(match suggestion {
                Some(known) => error.help(format!("did you mean '{known}'?")),
                None => error,
            });
        }
        Ok(())
    }
}
