//! Budgets for input that nobody vouches for.

/// How much of everything one document or one build may have. The error names the budget that was passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in one file. Default 64 MiB: the largest CRD bundles are some 10 MiB.
    pub max_file_bytes: usize,
    /// Nesting of one document. Default 256: schemas of CRDs reach some 60.
    pub max_depth: usize,
    /// Nodes of one document with all aliases expanded. Default 5 million.
    pub max_nodes: usize,
    /// Aliases in one document. Default 100,000.
    pub max_aliases: usize,
    /// Documents in one file. Default 100,000.
    pub max_documents: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_file_bytes: 64 << 20,
            max_depth: 256,
            max_nodes: 5_000_000,
            max_aliases: 100_000,
            max_documents: 100_000,
        }
    }
}
