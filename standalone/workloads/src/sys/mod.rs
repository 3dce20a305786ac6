//! The kernel: namespaces, processes that must start inside them, file descriptors that travel between processes,
//! and the few rtnetlink messages of a pod's network. All of the crate's `unsafe` is here.

pub(crate) mod fdpass;
pub(crate) mod mounts;
pub(crate) mod netlink;
pub(crate) mod netns;
pub(crate) mod process;
