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

# Peers that tests and benchmarks stand beside; without them those say that they are skipped. Only where asked for.
if [ "${1:-}" = --peers ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    missing=()
    need nginx command -v /usr/sbin/nginx
    need haproxy command -v /usr/sbin/haproxy
    need lighttpd command -v /usr/sbin/lighttpd
    need nghttp2-client command -v h2load
    if [ ${#missing[@]} -gt 0 ]; then
        echo "setup: installing ${missing[*]} to compare with"
        # They are to be there, not to serve this machine.
        if [ ! -e /usr/sbin/policy-rc.d ]; then
            printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
            chmod +x /usr/sbin/policy-rc.d
            trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        fi
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
            echo "setup: not all of them could be installed; what needs them is skipped" >&2
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "setup: please install Rust (rustup, see https://rustup.rs); the version is in rust-toolchain.toml" >&2
    exit 1
fi
