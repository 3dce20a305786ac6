#!/usr/bin/env bash
# Builds serin-proxy with what a run of it has shown (profile-guided optimisation): instrumented build, the benchmark's
# matrix as training, build as shipped. Needs the toolchain's own llvm-profdata (rustup component add llvm-tools).
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(rustc -vV | sed -n 's/^host: //p')
profdata=$(rustc --print target-libdir)/../bin/llvm-profdata
if [ ! -x "$profdata" ]; then
    echo "SKIPPED: no llvm-profdata for this compiler: rustup component add llvm-tools" >&2
    exit 0
fi
# What the training needs.
hack/setup.sh --peers
for needed in h2load taskset; do
    if ! PATH=$PATH:/usr/sbin command -v "$needed" >/dev/null; then
        echo "SKIPPED: $needed is not installed, without which nothing can be learnt" >&2
        exit 0
    fi
done
out=${CARGO_TARGET_DIR:?}/pgo
rm -rf -- "$out/raw"
mkdir -p "$out/raw"
# With --target, so that build scripts and macros are not instrumented; in the quick profile, since only its counts matter.
RUSTFLAGS="${RUSTFLAGS:-} -Cprofile-generate=$out/raw" \
    cargo build --locked --profile demo --target "$target" --target-dir "$out" -p serin-proxy
SERIN_BENCH_PROXY=$out/$target/demo/serin-proxy ENVOY_BIN='' SERIN_BENCH_POLITE=1 SERIN_BENCH_ONLY=matrix \
    SERIN_BENCH_ROUNDS=1 SERIN_BENCH_REQUESTS="${SERIN_BENCH_REQUESTS:-20000}" \
    cargo bench --locked -q --profile "${PROFILE:-demo}" -p serin-proxy --bench matrix
if [ -z "$(find "$out/raw" -name '*.profraw' -size +0 -print -quit)" ]; then
    echo "pgo: the instrumented proxy wrote no counts to $out/raw: did the matrix above run?" >&2
    exit 1
fi
"$profdata" merge -o "$out/merged.profdata" "$out/raw"
# Cargo looks at the flags alone to see what must be built again: another profile needs another name.
rm -f -- "$out"/serin-proxy-*.profdata
learnt=$out/serin-proxy-$(sha256sum "$out/merged.profdata" | cut -c1-12).profdata
mv -- "$out/merged.profdata" "$learnt"
RUSTFLAGS="${RUSTFLAGS:-} -Cprofile-use=$learnt" \
    cargo build --locked --release --target "$target" --target-dir "$out" -p serin-proxy
echo "$out/$target/release/serin-proxy"
