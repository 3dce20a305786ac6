//! Tests of the engine from outside: against recorded outputs of the original, against `kubectl kustomize` where it is
//! installed, and for its own promises.

// A test that cannot go on says so by panicking.
#![allow(clippy::unwrap_used, clippy::panic, clippy::format_collect)]

mod errors;
mod harness;
mod mutations;
mod oracle;
mod parity;
mod promises;
mod properties;

use std::path::PathBuf;

/// The shared data, beside the repository; `None`, with a note, where it is not.
fn shared(part: &str) -> Option<PathBuf> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/data")
        .join(part);
    if dir.is_dir() {
        return Some(dir);
    }
    eprintln!("SKIPPED: {part}: ../shared is not here");
    None
}
