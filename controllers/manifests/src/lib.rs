//! Kubernetes objects as data: YAML in and out exactly as kubectl and kustomize read and write it, identity, order,
//! difference, redaction.
//!
//! Text becomes a [`Value`] tree ([`yaml::parse_document`]), a tree with `kind` and a name becomes an [`Object`], objects are
//! ordered ([`order`]), compared ([`diff`]), masked ([`redact`]) and written ([`Object::to_yaml`], [`Object::to_json`]).
//!
//! The parser and the writer are our own. kustomize edits text as well as values (`1.10` must stay `1.10` in a string
//! and become `1.1` as a number; `"5"` and `5` differ; a transformer that sets a number into a quoted field yields text), so
//! a reader that gives values only is not enough, and a parser that accepts another language than libyaml's accepts files
//! that kubectl refuses. Differences to libyaml: a mapping key must be a scalar, and there are budgets.
//!
//! Two dialects ([`Dialect`]): resources of kustomize (go-yaml 3) and kubectl (go-yaml 2, where `yes` is a boolean and the
//! last of two equal keys wins).
//!
//! Pure: no clock, no network, no file system. No input makes it panic; every size is bounded by [`Limits`], and the
//! error names the budget. Not here: schemas, defaulting, validation.

pub mod diff;
pub mod error;
pub mod limits;
mod object;
pub mod order;
pub mod redact;
mod resolve;
mod value;
pub mod yaml;

pub use error::{Error, Place};
pub use limits::Limits;
pub use object::{Id, Object, Source, parse_documents, parse_documents_within, split_api_version};
pub use resolve::{Dialect, Plain, go_float, tag_of};
pub use value::{Entry, Finder, Map, Pos, Scalar, Seq, Style, Tag, Value};

/// How text without quotes resolves in a dialect: its tag and its value.
pub fn resolve_plain(text: &str, dialect: Dialect) -> (Tag, Plain<'_>) {
    resolve::resolve(text, dialect)
}
