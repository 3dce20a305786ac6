//! The shim: one small process per pod that holds its namespaces, starts its containers, collects their output and
//! exit codes, and outlives everything else of Serin.
//!
//! It decides nothing. The node asks over a `SOCK_SEQPACKET` socket (one it inherits, and `s.sock` in the pod's
//! directory for a node that comes later): start this container, signal it, run this command in it, hand back the
//! listening sockets. The shim tells everyone connected when a container ends, and remembers it for who asks later.
//!
//! It is single-threaded and synchronous on purpose: the parent-death signal of a container's first process is tied
//! to the *thread* that made it, and a process without threads may run ordinary code between clone and exec. With
//! the shim's death every container dies (parent-death signal), and with a container's first process all of it (PID
//! namespace). So nothing of a pod can be left behind, whichever of them is killed.

pub(crate) mod container;
pub(crate) mod logfile;
pub mod main;
pub(crate) mod protocol;
mod server;

pub use main::main;
