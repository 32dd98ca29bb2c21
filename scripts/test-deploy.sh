#!/usr/bin/env bash
# Checks what is in deploy/ with the tools that will read it; installs them if they are missing, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."

need() { # PROGRAM PACKAGE
  command -v "$1" >/dev/null || scripts/install.sh "for $1" "$2"
}

echo "Prometheus: the configuration, the rules, and each alert when it must fire and when it must not"
need promtool prometheus
promtool check config deploy/prometheus/prometheus.yml
promtool check rules --lint-fatal deploy/prometheus/rules.yml deploy/prometheus/alerts.yml
promtool test rules deploy/prometheus/alerts_test.yml
