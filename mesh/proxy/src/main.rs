//! serin-proxy binary.
fn main() {}
