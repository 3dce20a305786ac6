//! The hygiene layer: what RFC 9110, 9112 and 9113 call ambiguous is refused, never forwarded. What the bytes of HTTP/1 themselves
//! may look like is decided where they are read (`http1`).

pub mod fields;
pub mod interim;
pub mod path;
pub(crate) mod query;
