//! The few kinds that kubectl creates with protobuf bodies.

use serde_json::Value;

/// Kinds that can be decoded.
pub(crate) const KINDS: [&str; 0] = [];

/// Decode `k8s\0` + `runtime.Unknown`; the error names what cannot be read.
pub(crate) fn decode(bytes: &[u8], kind: &str) -> Result<Value, String> {
    let _ = bytes;
    Err(format!("{kind} cannot be read as protobuf"))
}
