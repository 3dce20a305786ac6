//! Changes of the parameters of a request's query.

use http::{HeaderMap, Uri};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf::value::Kind;

use crate::config::convert::{each, required};
use crate::config::headers::Scene;
use crate::error::{Refusal, Within};
use crate::hygiene::query::{Names, Query, encoded};
use crate::observe::format::Template;
use crate::observe::record::Wants;

/// Compiled `query_parameter_mutations`, in their order.
#[derive(Debug, Default)]
pub(super) struct QueryChanges {
    changes: Box<[Change]>,
    /// What the variables of all values read.
    wants: Wants,
}

#[derive(Debug)]
enum Change {
    Remove(Box<str>),
    Put {
        name: Box<str>,
        /// The name as it is written.
        written: Box<str>,
        value: Template,
        mode: Mode,
    },
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Append,
    AddIfAbsent,
    Overwrite,
    OverwriteIfExists,
}

impl QueryChanges {
    pub(super) fn compile(from: &[core::KeyValueMutation]) -> Result<Self, Refusal> {
        let mut wants = Wants::default();
        let changes = each(from, "query_parameter_mutations", |mutation| {
            compile(mutation, &mut wants)
        })?;
        Ok(Self { changes, wants })
    }

    /// The target of a request, where it is changed. All values are of the request as it was before.
    pub(super) fn changed(&self, uri: &Uri, headers: &HeaderMap, scene: &dyn Scene) -> Option<Uri> {
        if self.changes.is_empty() {
            return None;
        }
        let mut values: Vec<String> = Vec::with_capacity(self.changes.len());
        scene.show(&self.wants, headers, &mut |record| {
            values.extend(self.changes.iter().map(|change| match change {
                Change::Remove(_) => String::new(),
                Change::Put { value, .. } => {
                    let mut text = String::new();
                    value.write(record, &mut text);
                    encoded(&text)
                }
            }));
        });
        let mut query = Query::of(uri, Names::Decoded);
        for (change, made) in self.changes.iter().zip(values) {
            match change {
                Change::Remove(name) => query.remove(name),
                Change::Put {
                    name, written, mode, ..
                } => match mode {
                    Mode::Append => query.add(name, written, made),
                    Mode::Overwrite => query.set(name, written, made),
                    Mode::AddIfAbsent if !query.has(name) => query.add(name, written, made),
                    Mode::OverwriteIfExists if query.has(name) => query.set(name, written, made),
                    Mode::AddIfAbsent | Mode::OverwriteIfExists => {}
                },
            }
        }
        query.target(uri.path())
    }
}

fn compile(from: &core::KeyValueMutation, wants: &mut Wants) -> Result<Change, Refusal> {
    use core::key_value_append::KeyValueAppendAction;
    let append = match &from.append {
        Some(append) if from.remove.is_empty() => append,
        Some(_) => return Err(Refusal::new("remove", "there may be one of append and remove")),
        None if from.remove.is_empty() => return Err(Refusal::new("append", "is missing")),
        None => return Ok(Change::Remove(from.remove.as_str().into())),
    };
    let record = required(append.record.as_ref(), "append.record")?;
    if record.key.is_empty() {
        return Err(Refusal::new("append.record.key", "is missing"));
    }
    let Some(Kind::StringValue(text)) = record.value.as_ref().and_then(|value| value.kind.as_ref()) else {
        return Err(Refusal::new("append.record.value", "must be a text"));
    };
    let mode = match KeyValueAppendAction::try_from(append.action) {
        Ok(KeyValueAppendAction::AppendIfExistsOrAdd) => Mode::Append,
        Ok(KeyValueAppendAction::AddIfAbsent) => Mode::AddIfAbsent,
        Ok(KeyValueAppendAction::OverwriteIfExistsOrAdd) => Mode::Overwrite,
        Ok(KeyValueAppendAction::OverwriteIfExists) => Mode::OverwriteIfExists,
        Err(_) => {
            let reason = format!("{} is unknown", append.action);
            return Err(Refusal::new("append.action", reason));
        }
    };
    Ok(Change::Put {
        name: record.key.as_str().into(),
        written: encoded(&record.key).into(),
        value: Template::parse(text, true, wants).within("append.record.value")?,
        mode,
    })
}
