//! The HTTP/1 codec: heads and bodies from bytes and to bytes (RFC 9112). No sockets, no clock.
//!
//! What comes from clients is read strictly: what a second parser could read differently is refused, and the refusal has a
//! name ([`violation`]). Fields are shares of the bytes that were read; nothing is parsed twice.
//!
//! | room | what |
//! |---|---|
//! | [`input`], [`out`] | bytes that were read and bytes to be written, for as long as they wait |
//! | [`head`], [`request`], [`response`] | heads from bytes |
//! | [`decode`], [`encode`] | bodies from bytes; heads and bodies to bytes |
//!
//! `worker::http1` speaks it with clients, `upstream::http1` with endpoints. Limits: heads by bytes and fields
//! ([`head::HeadLimits`]), chunk lines 256 bytes, trailers 8 KiB.

mod chars;
pub mod decode;
pub mod encode;
mod extension;
mod fields;
pub mod head;
pub mod input;
pub mod out;
pub mod request;
pub mod response;
pub mod violation;
