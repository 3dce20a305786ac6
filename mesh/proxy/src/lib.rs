//! serin-proxy
