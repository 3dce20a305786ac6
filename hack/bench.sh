#!/usr/bin/env bash
# Measures. Peers (kubectl, Envoy) take part where they are installed; figures are ratios of the same run where one is.
# Arguments name the benchmarks to run; all of them if there are none.
set -euo pipefail
cd "$(dirname "$0")/.."
hack/setup.sh --peers
export SERIN_BIN_DIR="${CARGO_TARGET_DIR:?}/${PROFILE:-demo}"
all=(kustomize analysis gitops control proxy demo)
for bench in "${@:-${all[@]}}"; do
    echo "== $bench"
    case $bench in
        # The proxy as it is shipped, or the one that SERIN_BENCH_PROXY names; what only measures is built quickly.
        proxy)
            [ -n "${SERIN_BENCH_PROXY:-}" ] || cargo build --locked -q --release -p serin-proxy
            # The tables are kept beside the programs; what the parts took and what failed is told on stderr.
            SERIN_BENCH_PROXY="${SERIN_BENCH_PROXY:-${CARGO_TARGET_DIR}/release/serin-proxy}" \
                cargo bench --locked -q --profile "${PROFILE:-demo}" -p serin-proxy --bench matrix |
                tee "${CARGO_TARGET_DIR}/bench-proxy.md"
            ;;
        soak) cargo bench --locked -q --profile "${PROFILE:-demo}" -p serin-proxy --bench soak ;;
        demo) cargo bench --locked -q -p serin-tests --bench demo ;;
        *) cargo bench --locked -q -p "serin-$bench" ;;
    esac
done
