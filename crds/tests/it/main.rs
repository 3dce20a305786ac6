//! The types against the world: real manifests of other projects, upstream's schemas, our committed definitions.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests may fail like tests

mod definitions;
mod documents;
mod real_manifests;
mod schemas;
