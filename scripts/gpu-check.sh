#!/usr/bin/env bash
# gpu-check.sh [BINARY]: whether the network computes what it should on this machine's GPU, and how fast, in one go of less
# than ten minutes. Needs the binary and, beside this folder, tests/golden; no Rust, no network. What else is missing
# (ffmpeg for the server's part, torch and transformers for the original's) is said and left out.
#
#   DEVICE=cuda:0     where to run; cpu tries the script itself
#   MODEL=synth:r1    what to time
#   QUANT="q8"        also checked and timed with weights in these; q4 is the other, "" none
#   SECONDS_EACH=150  longest time for one part
#   OUT=gpu-check.out where logs and JSON go
set -uo pipefail
cd "$(dirname "$0")/.."

binary=${1:-target/cuda/release/tinyllava}
device=${DEVICE:-cuda:0} model=${MODEL:-synth:r1} limit=${SECONDS_EACH:-150} out=${OUT:-gpu-check.out}
batches=${BATCHES:-1,8,32,64,128} clients=${CLIENTS:-1,8,32,64} quants=${QUANT-q8}
[ -x "$binary" ] || { echo "there is no $binary: build it with \`make build-cuda\`, or name it" >&2; exit 2; }
mkdir -p "$out"
clip=$(find models/nano/demo -name '*.mp4' 2>/dev/null | sort | head -1)
failed=0

part() { # NAME COMMAND…: runs a part, keeps its output, says how it ended
  local name=$1 began=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  timeout "$limit" "$@" 2>&1 | tee "$out/${name// /-}.log"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { failed=1; echo "-- $name FAILED (exit code $code)"; }
  echo "-- $name: $((SECONDS - began)) s"
}

skip() { printf '\n== %s\n-- left out: %s\n' "$1" "$2"; }

checks() {
  for name in tiny tiny_bf16_sharded; do
    part "check $name" "$binary" check --device "$device" --model "tests/golden/$name" \
      --golden "tests/golden/$name/golden.safetensors"
  done
  part "check nano" "$binary" check --device "$device" --model nano
  # Heads of 64: the kernels for tensor cores know them. Once as it is served, once with each kernel started by itself.
  part "check mid" "$binary" check --device "$device" --model "${CHECK_MODEL:-synth:mid}"
  TINYLLAVA_CUDA_GRAPHS=0 part "check mid without graphs" "$binary" check --device "$device" --model "${CHECK_MODEL:-synth:mid}"
}

engine() {
  part "bench engine" "$binary" bench engine --device "$device" --model "$model" --prompt-tokens "${PROMPT_TOKENS:-600}" \
    --batch "$batches" --requests "$clients" --repeat 3 --json "$out/engine.json"
  # What it brings that a step begins before the host has seen the tokens of the one before it.
  TINYLLAVA_RUN_AHEAD=0 part "bench engine one by one" "$binary" bench engine --device "$device" --model "$model" \
    --prompt-tokens "${PROMPT_TOKENS:-600}" --batch 1,32 --repeat 3 --json "$out/engine-one-by-one.json"
  # And that cuBLASLt finishes products itself.
  TINYLLAVA_CUDA_EPILOGUES=0 part "bench engine finished apart" "$binary" bench engine --device "$device" --model "$model" \
    --prompt-tokens "${PROMPT_TOKENS:-600}" --batch 1 --repeat 3 --json "$out/engine-finished-apart.json"
}

quantised() {
  local quant
  for quant in $quants; do
    part "check tiny $quant" "$binary" check --device "$device" --quant "$quant" --model tests/golden/tiny \
      --golden tests/golden/tiny/golden.safetensors
    part "check mid $quant" "$binary" check --device "$device" --quant "$quant" --model "${CHECK_MODEL:-synth:mid}"
    part "bench engine $quant" "$binary" bench engine --device "$device" --quant "$quant" --model "$model" \
      --prompt-tokens "${PROMPT_TOKENS:-600}" --batch "$batches" --repeat 3 --json "$out/engine-$quant.json"
  done
}

# Pictures of H.264 are defined to the bit: those of the GPU must be those of the processor.
decoder() {
  if [[ $device != cuda* ]] || [ -z "$clip" ] || ! ffmpeg -hide_banner -hwaccels 2>/dev/null | grep -q cuda; then
    skip "video decoder" "no GPU, no clip in models/nano/demo, or no ffmpeg that can use NVDEC"
    return
  fi
  pictures() { ffmpeg -v error -nostdin "$@" -i "$clip" -pix_fmt yuv420p -f md5 -; }
  local gpu processor
  gpu=$(pictures -hwaccel cuda -hwaccel_device "${device#cuda:}") processor=$(pictures)
  part "video decoder" bash -c 'echo "GPU $1, processor $2"; [ -n "$1" ] && [ "$1" = "$2" ]' - "$gpu" "$processor"
}

server() {
  if ! command -v ffmpeg >/dev/null || ! command -v ffprobe >/dev/null || [ -z "$clip" ]; then
    skip "server" "no ffmpeg or no clip in models/nano/demo"
    return
  fi
  "$binary" serve --device "$device" --model "$model" --port 8899 --max-waiting 256 2>"$out/serve.log" &
  local server=$! began=$SECONDS
  for _ in $(seq 1200); do
    "$binary" health --ready --url http://127.0.0.1:8899 >/dev/null 2>&1 && break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
  done
  echo "ready after $((SECONDS - began)) s"
  local load=(--url http://127.0.0.1:8899 --video "$clip" --distinct-videos --ignore-eos)
  part "server" "$binary" bench "${load[@]}" --concurrency "$clients" --temperature 0 --json "$out/server.json"
  # What it costs that replies are drawn, from all of the vocabulary.
  part "server sampled" "$binary" bench "${load[@]}" --concurrency "${clients##*,}" --temperature 1 --json "$out/server-sampled.json"
  kill "$server" 2>/dev/null
  wait "$server" 2>/dev/null
}

original() {
  local torch_device=${device/cuda:0/cuda}
  if ! python3 -c 'import torch, transformers, safetensors' 2>/dev/null; then
    skip "original" "python3 has no torch, transformers and safetensors"
    return
  fi
  for dtype in float32 bfloat16; do
    part "original $dtype" python3 benches/peers/torch_bench.py --preset "${model#synth:}" --device "$torch_device" \
      --dtype "$dtype" --prompt-tokens "${PROMPT_TOKENS:-600}" --requests 2 --json "$out/original-$dtype.json"
  done
}

# One line a measurement: this server, the original in both types, and how often the one goes into the other.
table() {
  python3 - "$out" <<'TABLE' || cat "$out"/bench-engine.log
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
read = lambda name: json.loads((out / name).read_text()) if (out / name).exists() else {}
rows = read("engine.json").get("rows", [])
peers = {name: read(f"original-{name}.json") for name in ("float32", "bfloat16")}
stages = {"encode": "encode", "prefill": "prefill", "decode x 1": "decode_step"}
print(f"{'':<22}{'ms':>10}{'tokens/s':>11}{'TFLOP/s':>10}{'TB/s':>8}" + "".join(f"{'torch ' + p:>16}{'times':>7}" for p in peers))
for row in rows:
    rate = row["tokens_per_second"]
    line = f"{row['what']:<22}{row['ms']:>10.2f}" + (f"{rate:>11.1f}" if rate else " " * 11)
    line += f"{row['gflops'] / 1e3:>10.2f}{row['gbytes_per_second'] / 1e3:>8.2f}"
    stage = next((s for what, s in stages.items() if row["what"] == what or row["what"].startswith(what + " ")), None)
    for peer in peers.values():
        if stage and stage in peer:
            ms = peer[stage]["median_ms"]
            line += f"{ms:>16.2f}{ms / row['ms']:>7.1f}"
    print(line.rstrip())
plain = {row["what"]: row["ms"] for row in rows}
for path in sorted(out.glob("engine-*.json")):
    for row in json.loads(path.read_text())["rows"]:
        if row["what"] in plain:
            rate = f"{row['tokens_per_second']:.1f}" if row["tokens_per_second"] else ""
            what = f"{row['what']} {path.stem.removeprefix('engine-')}"
            print(f"{what:<32}{row['ms']:>10.2f}{rate:>11}  {plain[row['what']] / row['ms']:.2f} times as fast as above")
for name in ("server", "server-sampled"):
    for level in read(f"{name}.json").get("levels", []):
        first, between = (1e3 * level[key]["median"] for key in ("time_to_first_token_s", "inter_token_latency_s"))
        what = f"{name} x {level['concurrency']}"
        print(f"{what:<32}{level['tokens_per_second']:>11.1f}  first token after {first:.1f} ms, the next after {between:.2f}")
machine = read("engine.json").get("machine", {})
if machine:
    print(f"{machine['what']} {machine['gflops'] / 1e3:.1f} TFLOP/s, memory {machine['gbytes_per_second'] / 1e3:.2f} TB/s")
TABLE
}

checks
engine
quantised
decoder
server
original
printf '\n== all of it\n'
grep -h WRONG "$out"/check-*.log && failed=1
table
[ "$failed" -eq 0 ] && echo "everything that ran is as it should be" || echo "something FAILED: see above, and $out"
exit "$failed"
