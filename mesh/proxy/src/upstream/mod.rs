//! The upstream side: what a worker keeps per cluster (hosts, balancing, outliers) and per host (connections).

pub mod balance;
pub mod cluster;
pub mod connect;
pub mod consistent;
pub mod ewma;
pub mod health;
pub mod http2;
pub mod metered;
pub mod outlier;
pub mod pool;
pub mod proxy_header;
pub mod subset;
pub mod zone;
