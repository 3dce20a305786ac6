//! From a git server to a revision: where files come from.
//!
//! [`reconcile`] drives `GitRepository` objects. A git operation runs on a thread of its own ([`threads`])
//! with a deadline; it fetches into a bare cache ([`git`]) and what it gives is a [`tree::Snapshot`]:
//! a commit's tree read in place, filtered by the ignore rules ([`ignore`]). Nothing is ever checked out.

pub(crate) mod certificate;
pub(crate) mod credentials;
pub(crate) mod git;
pub(crate) mod ignore;
pub(crate) mod known_hosts;
pub(crate) mod local_watch;

pub(crate) mod reconcile;
pub(crate) mod reference;
pub(crate) mod semver_range;
pub(crate) mod status;
pub(crate) mod store;
pub(crate) mod threads;
pub(crate) mod tree;
#[cfg(test)]
pub(crate) mod tree_testing;
