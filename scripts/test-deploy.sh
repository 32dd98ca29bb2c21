#!/usr/bin/env bash
# Checks what is in deploy/ with the tools that will read it; installs them if they are missing, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."

need() { # PROGRAM PACKAGE
  command -v "$1" >/dev/null && return
  as_root=()
  [ "$(id -u)" -eq 0 ] || as_root=(sudo)
  echo "Installing $2 with apt-get (needed for $1)…"
  "${as_root[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "$2" >/dev/null
}

echo "Prometheus: the configuration, the rules, and each alert when it must fire and when it must not"
need promtool prometheus
promtool check config deploy/prometheus/prometheus.yml
promtool check rules --lint-fatal deploy/prometheus/rules.yml deploy/prometheus/alerts.yml
promtool test rules deploy/prometheus/alerts_test.yml
