#!/usr/bin/env bash
# Builds the image of the Dockerfile without a Docker engine and without a registry, then serves from it as production
# would: read-only root, a user without rights, no capabilities. Needs root, Debian's mirror and some minutes:
# `make test-image`, not a part of CI.
#
# The base images are stand-ins: Debian bookworm by debootstrap for debian:bookworm-slim, the same with gcc
# for buildpack-deps:bookworm, this machine's Rust toolchain and downloaded crates for rust:*-bookworm. Everything else is the Dockerfile as it stands, built by buildah.
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(id -u)" -eq 0 ] || { echo "Run this as root: debootstrap and the chroot need it." >&2; exit 1; }
missing=()
for tool in buildah debootstrap curl; do command -v "$tool" >/dev/null || missing+=("$tool"); done
command -v bwrap >/dev/null || missing+=(bubblewrap)
if [ ${#missing[@]} -gt 0 ]; then
  echo "Installing ${missing[*]} with apt-get (needed to build and run the image)…"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

work=${TINYLLAVA_IMAGE_DIR:-/var/tmp/tinyllava-image}
mkdir -p "$work/data"
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
b() { buildah --root "$work/store" --runroot "$work/run" "$@"; }
say() { printf '\n== %s\n' "$*"; }

if [ ! -e "$work/debian/.complete" ]; then
  say "Base: Debian bookworm by debootstrap"
  rm -rf "$work/debian"
  debootstrap --variant=minbase bookworm "$work/debian" >"$work/debootstrap.log"
  touch "$work/debian/.complete"
fi
b inspect --type image localhost/debian >/dev/null 2>&1 || {
  base=$(b from scratch)
  b add -q "$base" "$work/debian" / >/dev/null
  b commit -q --rm "$base" localhost/debian >/dev/null
}
b inspect --type image localhost/build >/dev/null 2>&1 || {
  say "Base: the same with a C compiler"
  base=$(b from localhost/debian)
  b run "$base" -- sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null'
  b commit -q --rm "$base" localhost/build >/dev/null
}
b inspect --type image localhost/rust >/dev/null 2>&1 || {
  say "Base: this machine's Rust toolchain and its downloaded crates"
  cargo fetch --locked --quiet
  base=$(b from scratch)
  sysroot=$(rustc --print sysroot)
  mkdir -p "$work/empty" "$work/cargo"
  printf '[net]\noffline = true\n' >"$work/cargo/config.toml"
  b add -q "$base" "$work/empty" /usr/local/rustup >/dev/null
  b add -q "$base" "$work/cargo" /usr/local/cargo >/dev/null
  b add -q "$base" "$sysroot/bin" /usr/local/cargo/bin >/dev/null
  b add -q "$base" "$sysroot/lib" /usr/local/cargo/lib >/dev/null
  b add -q "$base" "${CARGO_HOME:-$HOME/.cargo}/registry" /usr/local/cargo/registry >/dev/null
  b commit -q --rm "$base" localhost/rust >/dev/null
}

say "The Dockerfile, CPU variant"
b build --layers --build-arg RUST_IMAGE=localhost/rust --build-arg BUILD_IMAGE=localhost/build \
  --build-arg RUNTIME_IMAGE=localhost/debian \
  --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" --format docker -t localhost/tinyllava .

say "Its settings"
b inspect --type image localhost/tinyllava >"$work/image.json"
python3 - "$work/image.json" <<'PY'
import json, sys
config = json.load(open(sys.argv[1]))["Docker"]["config"]
assert config["User"] == "10001:10001", config["User"]
assert config["Entrypoint"] == ["/usr/local/bin/tinyllava"], config["Entrypoint"]
assert config["Cmd"] == ["serve", "--host", "0.0.0.0"], config["Cmd"]
assert config["StopSignal"] == "SIGTERM", config
assert config["Healthcheck"]["Test"] == ["CMD", "/usr/local/bin/tinyllava", "health"], config["Healthcheck"]
assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
print("user, entrypoint, command, stop signal, health check and labels are as they should be")
PY

say "A server in it: read-only root, user 10001, no capabilities, no other processes in sight"
container=$(b from localhost/tinyllava)
root=$(b mount "$container")
du -sh "$root" | sed 's/\t.*/ unpacked/'
mkdir -p "$work/data/models" "$work/data/files"
port=${PORT:-18080}
inside() {
  bwrap --ro-bind "$root" / --proc /proc --dev /dev --tmpfs /tmp --bind "$work/data" /data --chdir /data \
    --unshare-user --uid 10001 --gid 10001 --unshare-pid --unshare-ipc --unshare-uts --cap-drop ALL --die-with-parent \
    --clearenv --setenv PATH /usr/local/bin:/usr/bin:/bin --setenv HF_HOME /data/models \
    --setenv TINYLLAVA_FILES_DIR /data/files --setenv TINYLLAVA_LOG_FORMAT json "$@"
}
# bwrap maps user 10001 to the one that runs it, so files are owned by that one.
chown -R 0:0 "$work/data"
inside /usr/local/bin/tinyllava serve --host 0.0.0.0 --port "$port" >"$work/server.log" 2>&1 &
server=$!
stop() { kill "$server" 2>/dev/null || true; b rm "$container" >/dev/null; }
trap stop EXIT
for _ in $(seq 300); do
  inside /usr/local/bin/tinyllava health --port "$port" --ready 2>/dev/null && break
  kill -0 "$server" 2>/dev/null || { cat "$work/server.log" >&2; exit 1; }
  sleep 0.1
done
inside /usr/local/bin/tinyllava health --port "$port"
echo "healthy and ready, by the health check of the image"
inside /bin/sh -c 'id -u; touch /nowhere 2>&1 || true'

ask='{"model":"nano","stream":true,"temperature":0,"messages":[{"role":"user","content":"In what direction is the red object moving?\nA. up\nB. down"}]}'
curl -sS -N -F "request=$ask" -F video=@models/nano/demo/direction.mp4 \
  "http://127.0.0.1:$port/v1/chat/completions" >"$work/answer.sse"
grep -q '"segment":"answer"' "$work/answer.sse" && grep -q '^data: \[DONE\]' "$work/answer.sse" \
  || { cat "$work/answer.sse" "$work/server.log" >&2; exit 1; }
echo "a video was decoded and answered: $(grep -c '^data: {' "$work/answer.sse") events"
curl -sS -F purpose=vision -F file=@models/nano/demo/order.mp4 "http://127.0.0.1:$port/v1/files" | grep -q '"id":"file-'
echo "a file was uploaded to the data directory"

# The signal goes to the server, as a container engine sends it to the first process.
kill -TERM "$(pgrep -f "^/usr/local/bin/tinyllava serve --host 0.0.0.0 --port $port")"
wait "$server"
trap - EXIT
b rm "$container" >/dev/null
echo "stopped by SIGTERM with exit code 0"
