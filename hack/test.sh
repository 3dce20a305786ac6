#!/usr/bin/env bash
# The whole suite: lints, every test of the workspace, and the demo, whose exit code says whether the story went as told.
set -euo pipefail
cd "$(dirname "$0")/.."
hack/setup.sh --peers
hack/lint.sh
# The end-to-end tests run the programs as users do, built as the demo builds them.
make --no-print-directory build
export SERIN_BIN_DIR="${CARGO_TARGET_DIR:?}/${PROFILE:-demo}"
cargo test --locked --workspace
