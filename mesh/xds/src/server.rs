//! The server end: views of resources for clients, sent as far and as fast as each client takes them.
//!
//! A [`Source`] is told of each client and gives it a view ([`Client::load`]) and later changes ([`Client::apply`]).
//! What each client wants, was sent, took and refused comes back as [`Event`]s. The protocol is
//! [`connection::Connection`], a pure state machine; [`AdsServer`] is its gRPC shell and speaks both variants, so that
//! a stock Envoy is a client like any other.

mod ads;
pub mod connection;
mod delta;
mod dirty;
mod sotw;

pub use ads::{AdsServer, Client, ClientId, Source};
pub use connection::{Event, Options};
