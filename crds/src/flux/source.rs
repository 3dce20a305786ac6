//! `source.toolkit.fluxcd.io/v1`: where manifests come from.

use crate::{Duration, LocalObjectReference, open_enum};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A git repository that is watched for new revisions.
///
/// Also the source of the `GitRepository` kind (derived).
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "source.toolkit.fluxcd.io",
    version = "v1",
    kind = "GitRepository",
    plural = "gitrepositories",
    shortname = "gitrepo",
    namespaced,
    status = "GitRepositoryStatus",
    derive = "PartialEq",
    derive = "Default",
    category = "all",
    category = "fluxcd",
    category = "fluxcd-sources",
    printcolumn = r#"{"name":"URL","type":"string","jsonPath":".spec.url"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Status","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].message"}"#
)]
#[schemars(extend("x-kubernetes-validations" = [{"message": "serviceAccountName can only be set when provider is 'azure' or 'aws'", "rule": "!has(self.serviceAccountName) || (has(self.provider) && (self.provider == 'azure' || self.provider == 'aws'))"}]))]
pub struct GitRepositorySpec {
    /// Address of the repository: `http`, `https` or `ssh` (never the scp form). Ours besides: `file://`
    /// and an absolute path of the machine itself, honoured in standalone only.
    #[schemars(regex(pattern = r"^(http|https|ssh|file)://.*$|^/.*$"))]
    pub url: String,
    /// Upper bound between two looks at the remote. Webhooks and local watches react at once.
    pub interval: Duration,
    /// Deadline of one git operation. Default 60 s.
    #[schemars(regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m))+$"), extend("default" = "60s"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Duration>,
    /// Which reference to follow. Default: branch `master`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#ref: Option<GitRepositoryRef>,
    /// Secret with credentials: `username` and `password`, or `bearerToken`; `identity`, `known_hosts` and
    /// optionally `password`; `ca.crt`; `tls.crt` and `tls.key`; GitHub App keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<LocalObjectReference>,
    /// How credentials are obtained when they are not in the Secret. Default `generic`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<GitProvider>,
    /// Service account whose workload identity is used; only with provider `azure` or `aws`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account_name: Option<String>,
    /// Signature check of the commit or tag; without it nothing is verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<GitRepositoryVerification>,
    /// Secret with `address` and optionally `username`, `password` of a proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy_secret_ref: Option<LocalObjectReference>,
    /// Paths left out, in gitignore syntax. Replaces the built-in list when set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignore: Option<String>,
    /// Stops fetching. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
    /// Fetches all submodules with the same credentials. Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recurse_submodules: Option<bool>,
    /// Directories that are wanted; a missing one is an error. Empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sparse_checkout: Vec<String>,
    /// Other repositories whose content is laid into this one's tree.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<GitRepositoryInclude>,
}

open_enum! {
    /// Credential provider of a GitRepository.
    pub enum GitProvider {
        /// `generic`
        Generic = "generic",
        /// `aws`
        Aws = "aws",
        /// `azure`
        Azure = "azure",
        /// `github`
        Github = "github",
    }
}
open_enum! {
    /// Which git object must carry a good signature.
    pub enum GitVerificationMode {
        /// `HEAD`
        Head = "HEAD",
        /// `head`
        LegacyHead = "head",
        /// `Tag`
        Tag = "Tag",
        /// `TagAndHEAD`
        TagAndHead = "TagAndHEAD",
    }
}

/// Reference to follow. Precedence: `commit`, `name`, `semver`, `tag`, `branch`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GitRepositoryRef {
    /// Branch. Default `master` when no other field is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// Tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Range over the tags that are semantic versions; the highest match wins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub semver: Option<String>,
    /// Any full reference name, for example `refs/pull/420/head`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Full commit id; `branch` narrows the search.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
}

/// Another GitRepository of the same namespace that is laid into the tree.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GitRepositoryInclude {
    /// The other GitRepository.
    pub repository: LocalObjectReference,
    /// Directory to take from it. Default: its root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_path: Option<String>,
    /// Directory to put it at. Default: the other repository's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_path: Option<String>,
}

/// Signature verification.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GitRepositoryVerification {
    /// Default `HEAD`.
    #[schemars(extend("default" = "HEAD"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<GitVerificationMode>,
    /// Secret with trusted public keys: `*.asc` PGP, `*.sshpub` SSH.
    pub secret_ref: LocalObjectReference,
}

/// What is known of the repository.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("default" = {"observedGeneration": -1}))]
pub struct GitRepositoryStatus {
    /// Generation of the spec that `conditions` speak of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Reconciling, Stalled, FetchFailed, ArtifactOutdated, ArtifactInStorage, SourceVerified,
    /// IncludeUnavailable, StorageOperationFailed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The last revision that was fetched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Artifact>,
    /// Revisions of `spec.include`, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub included_artifacts: Vec<Artifact>,
    /// `spec.ignore` used for `artifact`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_ignore: Option<String>,
    /// `spec.recurseSubmodules` used for `artifact`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_recurse_submodules: Option<bool>,
    /// `spec.include` used for `artifact`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub observed_include: Vec<GitRepositoryInclude>,
    /// `spec.sparseCheckout` used for `artifact`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub observed_sparse_checkout: Vec<String>,
    /// Mode used in the last verification.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_verification_mode: Option<String>,
    /// Value of the annotation `reconcile.fluxcd.io/requestedAt` that was handled last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_handled_reconcile_at: Option<String>,
}

/// One revision of a source's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// Path below the artifact storage.
    pub path: String,
    /// Address at which the artifact can be fetched.
    pub url: String,
    /// `<ref>@sha1:<hex>`, or `sha1:<hex>` for a bare commit.
    pub revision: String,
    /// `<algorithm>:<hex>` of the content.
    #[schemars(regex(pattern = r"^[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[a-zA-Z0-9=_-]+$"))]
    pub digest: String,
    /// When this revision was stored.
    pub last_update_time: Time,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<i64>,
    /// Facts about the revision, such as the commit's author and message in OCI annotation keys.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}
