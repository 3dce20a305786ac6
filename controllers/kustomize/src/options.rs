//! What a caller may ask for, and what a build may cost.

use serin_manifests::Limits;

use crate::tree::Remotes;

/// From where a kustomization may load files (bases are always free to lie anywhere in the tree).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LoadRestrictor {
    /// Only from its own directory and below. The default of kustomize.
    #[default]
    RootOnly,
    /// From anywhere in the tree. What Flux uses.
    None,
}

impl std::str::FromStr for LoadRestrictor {
    type Err = String;

    /// The values of `--load-restrictor`.
    fn from_str(text: &str) -> Result<LoadRestrictor, String> {
        match text {
            "LoadRestrictionsRootOnly" => Ok(LoadRestrictor::RootOnly),
            "LoadRestrictionsNone" => Ok(LoadRestrictor::None),
            _ => Err(format!(
                "'{text}' is no load restrictor: use LoadRestrictionsRootOnly or LoadRestrictionsNone"
            )),
        }
    }
}

/// The order of the result when the kustomization has no `sortOptions`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reorder {
    /// By kind: namespaces and definitions first. The default of kustomize and kubectl.
    #[default]
    Legacy,
    /// As read. What Flux uses.
    None,
}

/// What one build may cost. An error names the budget that was passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Files read. Default 50,000.
    pub max_files: usize,
    /// Bytes read, each file counted once. Default 256 MiB.
    pub max_bytes: usize,
    /// Kustomizations below each other. Default 64.
    pub max_kustomization_depth: usize,
    /// Kustomizations in all, counted as often as they are built. Default 20,000.
    pub max_kustomizations: usize,
    /// Resources. Default 200,000.
    pub max_resources: usize,
    /// Size of a compiled regular expression in bytes. Default 256 KiB. Matching takes time linear in its text.
    pub max_regex_bytes: usize,
    /// Fields visited and values compared; stands for time, which a pure function cannot see. Default 2 billion.
    pub max_steps: u64,
    /// For each document.
    pub document: Limits,
}

impl Default for Budget {
    fn default() -> Budget {
        Budget {
            max_files: 50_000,
            max_bytes: 256 << 20,
            max_kustomization_depth: 64,
            max_kustomizations: 20_000,
            max_resources: 200_000,
            max_regex_bytes: 256 << 10,
            max_steps: 2_000_000_000,
            document: Limits::default(),
        }
    }
}

/// What an encrypted file is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EncryptedUse {
    /// Lines of `KEY=value` of a secret generator.
    Env,
    /// A value of a secret generator.
    File,
    /// A patch.
    Patch,
}

/// Opens files that lie encrypted in the tree. Asked only for what may hold secrets: the files of secret generators, and
/// patches; so nothing secret gets into a ConfigMap by accident.
pub trait Decrypt {
    /// The plain content, or `None` if the file is not encrypted.
    fn open(&self, path: &str, content: &[u8], wanted: EncryptedUse) -> Result<Option<Vec<u8>>, String>;
}

/// Options of a build.
#[derive(Clone, Default)]
pub struct Options<'a> {
    /// From where files may be loaded.
    pub load_restrictor: LoadRestrictor,
    /// The order of the result.
    pub reorder: Reorder,
    /// Remote files that have been fetched and are allowed.
    pub remotes: Option<&'a dyn Remotes>,
    /// Opens encrypted files; without it they are taken as they are.
    pub decrypt: Option<&'a dyn Decrypt>,
    /// What the build may cost.
    pub budget: Budget,
    /// Annotate every object with `config.kubernetes.io/origin`, as `buildMetadata: [originAnnotations]` does.
    pub origin: bool,
    /// Label every object with `app.kubernetes.io/managed-by`, as `buildMetadata: [managedByLabel]` does.
    pub managed_by: bool,
    /// Keep a record of which transformer changed which field; see [`crate::Build::trace`].
    pub trace: bool,
}
