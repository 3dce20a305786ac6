//! The hygiene layer: what RFC 9110, 9112 and 9113 call ambiguous is refused, never forwarded.

mod chars;
mod extension;
pub mod fields;
pub mod interim;
pub mod path;
pub mod scan;
pub mod strict;
