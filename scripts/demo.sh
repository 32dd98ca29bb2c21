#!/usr/bin/env bash
# The whole way once: build, start the server, ask about real videos, watch it think, stop it gracefully.
set -euo pipefail
cd "$(dirname "$0")/.."

bold="" cyan="" plain="" color=never
if [ -t 1 ]; then bold=$'\033[1m' cyan=$'\033[36m' plain=$'\033[0m' color=always; fi
say() { printf '\n%s\n' "$bold$*$plain"; }

scripts/need-ffmpeg.sh
if ! command -v cargo >/dev/null; then
  echo "Rust is missing: install it from your distribution or with rustup, then run make demo again." >&2
  exit 1
fi

say "1. Building the server (the first time takes some minutes)"
cargo build --locked --release --quiet --bin tinyllava
tinyllava=target/release/tinyllava

say "2. Starting it on the embedded model"
log=target/demo-server.log
"$tinyllava" serve --port 0 >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
url=""
for _ in $(seq 200); do
  url=$(sed -n 's/.*ready: \(http:[^ ]*\).*/\1/p' "$log" | head -n 1)
  [ -n "$url" ] && break
  kill -0 "$server" 2>/dev/null || { echo "The server did not start:" >&2; cat "$log" >&2; exit 1; }
  sleep 0.1
done
[ -n "$url" ] || { echo "The server was not ready within 20 s:" >&2; cat "$log" >&2; exit 1; }
echo "$tinyllava serve  →  $url"

say "3. Asking about real videos (thinking first, then the answer)"
ask() { # clip, question
  printf '\n%s\n%s\n\n' "$cyan▶ $1$plain" "$2"
  "$tinyllava" ask "$1" "$2" --server "$url" --color "$color"
}
# Three lines an entry: clip, question (with \n between the options), right answer.
fields() { sed -n 's/^ *"\(video\|question\|answer\)": "\(.*\)",\{0,1\}$/\2/p' models/nano/demo/questions.json; }
while IFS= read -r clip && IFS= read -r question && IFS= read -r answer; do
  ask "models/nano/demo/$clip" "$(printf '%b' "$question")"
  echo "(right answer: $answer)"
done < <(fields)

say "4. The same over plain HTTP: server-sent events"
request='{"model":"nano","stream":true,"max_tokens":12,"messages":[{"role":"user","content":"What happens in the video?"}]}'
clip=$(ls models/nano/demo/*.mp4 | head -n 1)
echo "curl -N -F 'request=$request' -F video=@$clip $url/v1/chat/completions"
echo
curl -sS -N -F "request=$request" -F "video=@$clip" "$url/v1/chat/completions" | sed -n 's/^data: {.*"delta":\({[^}]*}\).*/data: {… "delta":\1 …}/p; /DONE/p'

say "5. Stopping it gracefully"
kill -TERM "$server"
wait "$server"
trap - EXIT
echo "The server finished its work and exited."

say "Try next, with the server in one terminal and curl in another:"
cat <<EOT
  $tinyllava serve
  curl -N -F 'request={"model":"nano","stream":true,"messages":[{"role":"user","content":"What happens in the video?"}]}' -F video=@$clip http://127.0.0.1:8000/v1/chat/completions
EOT
