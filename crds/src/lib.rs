//! The API types that Serin reads and writes, exact to their schemas, and nothing else.

pub mod istio;
