//! `serin.dev/v1alpha1`: our own kinds.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An entry of the image catalogue: which local program runs for an image reference.
///
/// Also the source of the `Image` kind (derived). Of several entries that match, the most specific pattern
/// wins: the one with the most characters that are not wildcards.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "serin.dev",
    version = "v1alpha1",
    kind = "Image",
    plural = "images",
    derive = "PartialEq",
    derive = "Default",
    category = "serin",
    printcolumn = r#"{"name":"Reference","type":"string","jsonPath":".spec.reference"}"#,
    printcolumn = r#"{"name":"Program","type":"string","jsonPath":".spec.program"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
pub struct ImageSpec {
    /// Pattern of image references, where `*` stands for any text, for example
    /// `docker.io/istio/examples-bookinfo-*`.
    #[schemars(length(min = 1, max = 512))]
    pub reference: String,
    /// Absolute path of a program, or a name that is looked up among the programs shipped with Serin and
    /// then in `PATH`.
    #[schemars(length(min = 1, max = 4096))]
    pub program: String,
    /// Arguments in front of the container's own. `{name}`, `{tag}`, `{1}` (the first wildcard's text) and
    /// so on are replaced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Environment, below the container's own. The same replacements apply to values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<ImageEnv>,
}

/// A variable.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageEnv {
    /// Name.
    #[schemars(length(min = 1))]
    pub name: String,
    /// Value. Default: empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}
