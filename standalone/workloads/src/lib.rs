//! serin-workloads
