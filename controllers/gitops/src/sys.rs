//! libgit2's process-wide settings, the one place of this crate that needs `unsafe`.
#![allow(unsafe_code)]

use std::sync::Once;

/// How long libgit2 waits for a connection and for each answer. Callers have their own, usually shorter deadline;
/// these two only bound how long an abandoned thread may hang.
const CONNECT_TIMEOUT_MS: i32 = 15_000;
const ANSWER_TIMEOUT_MS: i32 = 30_000;

/// Sets libgit2 up, once per process, before its first use.
pub(crate) fn init_libgit2() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: these options are plain global variables of libgit2 that must not be written while another thread
        // reads them. `Once` makes this the only writer, and every use of git2 in this crate comes after it.
        let result = unsafe {
            git2::opts::set_server_connect_timeout_in_milliseconds(CONNECT_TIMEOUT_MS)
                .and_then(|()| git2::opts::set_server_timeout_in_milliseconds(ANSWER_TIMEOUT_MS))
        };
        if let Err(error) = result {
            tracing::warn!(%error, "libgit2 keeps its own timeouts");
        }
        for level in [
            git2::ConfigLevel::System,
            git2::ConfigLevel::Global,
            git2::ConfigLevel::XDG,
        ] {
            // SAFETY: as above. An empty path: the machine's git configuration (proxies, credential helpers,
            // insteadOf rules) must not change what an object in the cluster means.
            let result = unsafe { git2::opts::set_search_path(level, "") };
            if let Err(error) = result {
                tracing::warn!(%error, "libgit2 keeps reading the machine's git configuration");
            }
        }
        git2::opts::strict_hash_verification(true);
    });
}
