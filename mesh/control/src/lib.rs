//! The mesh's control plane: from user objects to what proxies run with, and back to what the user sees.
//!
//! * [`ledger`]: which proxies need, were sent, acknowledged or refused each generation of each object.
//! * [`proxy_identity`]: who a connected proxy is.

pub mod ads;
pub mod index;
pub mod inject;
pub mod ledger;
pub mod proxy_identity;
pub mod telemetry;
pub mod translate;
