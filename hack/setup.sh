#!/usr/bin/env bash
# Installs the system packages that building and running Serin needs, or names them.
set -euo pipefail

missing=()
need() { # package, how to tell that it is there
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}
need gcc command -v cc
need make command -v make
need git command -v git
need pkg-config command -v pkg-config
need libssl-dev pkg-config --exists openssl
need zlib1g-dev pkg-config --exists zlib
need nftables command -v /usr/sbin/nft
need iproute2 command -v ip

# Only tests of git over ssh start an ssh server (on loopback, for themselves); without it they say that they skip.
if [ "${1:-}" = tests ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    need openssh-server command -v /usr/sbin/sshd
fi

if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing ${missing[*]}"
        apt-get update -qq
        # RUNLEVEL=1: no service is started by being installed.
        RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    else
        echo "setup: please install these packages and run the command again: ${missing[*]}" >&2
        echo "setup:   on Debian or Ubuntu: sudo apt-get install ${missing[*]}" >&2
        exit 1
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "setup: please install Rust (rustup, see https://rustup.rs); the version is in rust-toolchain.toml" >&2
    exit 1
fi
