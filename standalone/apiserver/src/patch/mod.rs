//! The three classic patch types, on plain JSON: [`json`] (RFC 6902), [`merge`] (RFC 7396) and [`strategic`].
//! Server-side apply is another thing altogether: [`crate::apply`].

pub(crate) mod json;
pub(crate) mod merge;
pub(crate) mod strategic;
