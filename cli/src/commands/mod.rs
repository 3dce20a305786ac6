//! One file per command of the user: its options, what it does, what it prints.

pub(crate) mod apply;
pub(crate) mod build;
pub(crate) mod completion;
pub(crate) mod down;
pub(crate) mod image;
pub(crate) mod internal;
pub(crate) mod judge;
pub(crate) mod kinds;
pub(crate) mod kubeconfig;
pub(crate) mod load;
pub(crate) mod status;
pub(crate) mod up;
pub(crate) mod version;
pub(crate) mod wait;

use std::time::Duration;

/// Reads a duration as Go and kubectl write it, for example `1m30s` or `500ms`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    serin_crds::Duration::from(text)
        .parse()
        .map_err(|error| error.to_string())
}
