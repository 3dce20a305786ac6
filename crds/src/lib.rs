//! serin-crds: every API type that Serin reads or writes as a custom resource, and nothing else.
//!
//! The kinds are those people already have (Flux, Flagger, Istio) plus our own group `serin.dev`. Types are exact: they
//! hold every field of the upstream schema, under its upstream name, so that an object which is read and written back
//! is the same object. Three rules keep that true:
//!
//! - Durations, semantic versions and the like stay text in the object ([`Duration`] keeps `1m0s` and `60s` apart) and
//!   are parsed where they are used. A value that cannot be parsed is the reader's condition to report; it never makes a
//!   whole list or watch fail.
//! - Enumerations are open ([`open_enum!`]): a value that a newer upstream added is carried in `Other`, for the
//!   controller to refuse by name. The generated schema lists the known ones, so an API server refuses a typing error.
//! - Empty lists and maps are not written, as Go's `omitempty` does upstream.
//!
//! Not here: defaults that depend on other objects, validation across fields beyond what a schema can say, behaviour.
//! Field defaults are stated in the doc comments; where upstream's schema carries a default, ours does too.
//!
//! [`definitions`] generates the CustomResourceDefinitions; `cargo run -p serin-crds --bin crdgen` writes them to
//! `crds/manifests/`, and a test fails when the committed files differ.

mod definitions;
pub mod flagger;
pub mod flux;
pub mod istio;
mod number;
pub mod serin_dev;
mod text;

pub use definitions::{definitions, manifests};
use text::int_or_string;
pub use text::{Duration, DurationError, LocalObjectReference};
