#!/usr/bin/env bash
# install.sh REASON PACKAGE…: installs Debian packages, and says so and why; elsewhere it says which to install.
set -euo pipefail

reason=$1
shift
if ! command -v apt-get >/dev/null; then
  echo "Please install: $*" >&2
  exit 1
fi
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
echo "Installing $* with apt-get (needed $reason)…"
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "$@" >/dev/null
