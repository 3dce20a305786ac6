#!/usr/bin/env bash
# Format, lints and documentation, all with warnings denied.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fmt --all --check
cargo clippy --locked --workspace --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps -q
# cargo-deny is not installed by the set-up: building it takes minutes. Where it is there, it decides.
if command -v cargo-deny >/dev/null; then
    cargo deny --all-features check licenses bans sources
else
    echo "lint: cargo-deny is not installed; the test that reads cargo metadata checks the ban of ring"
fi
