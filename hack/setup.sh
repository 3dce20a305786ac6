#!/usr/bin/env bash
# Installs the system packages that building and running Serin needs, or names them. With --peers also those that tests
# and benchmarks compare with; without them those say that they skip.
set -euo pipefail

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
    if [ ${#missing[@]} -gt 0 ]; then
        install || echo "setup: not all of them could be installed; what needs them is skipped" >&2
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "setup: please install Rust (rustup, see https://rustup.rs); the version is in rust-toolchain.toml" >&2
    exit 1
fi
