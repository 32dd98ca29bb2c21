#!/usr/bin/env bash
# Installs what the test of the load balancers needs, and says so: HAProxy, nginx, envsubst and Python.
set -euo pipefail

missing=()
command -v haproxy >/dev/null || missing+=(haproxy)
command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || missing+=(nginx-light)
command -v envsubst >/dev/null || missing+=(gettext-base)
command -v python3 >/dev/null || missing+=(python3)
[ ${#missing[@]} -eq 0 ] || "$(dirname "$0")/install.sh" "to test the load balancers" "${missing[@]}"
