//! The kustomize engine: a tree of files in, a list of objects out.
//!
//! [`build`] reads `kustomization.yaml` in a directory of a [`FileTree`] and everything below it, and gives the objects that
//! `kustomize build` 5.7 would print, in its order, with its values ([`Build::to_yaml`] gives its bytes), together with
//! the [`ReadSet`]: the files, missing files and links that influenced the result, so that a caller can cache it exactly.
//!
//! How data flows: `kustomization` decodes the file, `read` the resources; `build` accumulates them below each other into a
//! `resmap` (indexed, where the original searches) and applies the transformers of `transform` in their fixed order,
//! `smp` and `json_patch` being the two kinds of patch; once, at the root, hashes are added to names (`generate`), references
//! follow changed names (`name_reference`), variables are resolved and the result is ordered. Everything is linear in the
//! number of objects.
//!
//! Safe by construction: nothing outside the tree exists, links are followed inside it only, remote files are refused unless
//! the caller provides them ([`Remotes`]), programs and charts are never run, and every size has a [`Budget`] that the
//! error names. A pure function but for [`dir`], which shows a directory of the disk as a tree for the command line.
//!
//! Beside the engine: [`substitute`], Flux's variables in built objects; and [`Decrypt`], through which a caller opens
//! encrypted files (the engine knows no cipher).
//!
//! Deliberate differences to the original: references to the environment and to plugins do not exist; `helmCharts`,
//! executable and container plugins are refused with what to do instead; schema comments (`# {"$openapi": …}`) in resources
//! have no effect; text that starts with a tab is a value like others, where kustomize fails to read what it wrote. A label that kustomize puts into several places stays one value in all of them, as it does there.

mod accumulator;
mod build;
mod config;
mod crds;
mod decode;
pub mod dir;
mod error;
mod field_spec;
mod finish;
mod generate;
mod id;
mod image;
mod json_patch;
mod kustomization;
mod loader;
mod name_reference;
mod options;
mod origin;
mod paths;
mod plugin;
mod read;
mod replacement;
mod resmap;
mod resource;
mod schema;
mod selector;
mod smp;
pub mod substitute;
mod trace;
mod transform;
mod tree;
mod vars;

pub use build::{Build, Stats, build};
pub use error::{Cause, Error, Result};
pub use kustomization::FILE_NAMES;
pub use loader::ReadSet;
pub use options::{Budget, Decrypt, EncryptedUse, LoadRestrictor, Options, Reorder};
pub use trace::{ObjectTrace, Trace, TraceStep};
pub use tree::{FileTree, MemoryTree, Remotes, TreeEntry};
