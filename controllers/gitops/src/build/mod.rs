pub(crate) mod envsubst;
pub(crate) mod glob;
