//! Example applications.
fn main() {}
