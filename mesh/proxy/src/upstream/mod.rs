//! The upstream side: what a worker keeps per cluster (hosts, balancing, outliers) and per host (connections).
//!
//! ```text
//! cluster ─▶ subset ─▶ balance (zone, consistent, ewma) ─▶ host ─▶ pool ─▶ connect (proxy_header, metered) ─▶ http1 | http2
//!                                    outlier, health: which hosts may be chosen
//! ```
//! What decides is pure and takes time and randomness as arguments: [`balance`], [`consistent`], [`ewma`], [`outlier`],
//! [`health`], [`zone`]. What waits is in [`connect`], [`pool`], [`http1`] and [`http2`].

pub mod balance;
pub mod cluster;
pub mod connect;
pub mod consistent;
pub mod ewma;
pub mod health;
pub mod http1;
pub mod http2;
pub mod metered;
pub mod outlier;
pub mod pool;
pub mod proxy_header;
pub mod subset;
pub mod zone;
