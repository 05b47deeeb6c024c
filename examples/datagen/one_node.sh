#!/usr/bin/env bash
# Annotate with a model served on this node: GPUS=8 MODEL=Qwen/Qwen3-235B-A22B bash one_node.sh traces.jsonl out/data
set -euo pipefail
traces=$1 out=$2 model=${MODEL:-Qwen/Qwen3-30B-A3B} port=${PORT:-8000}
vllm serve "$model" --port "$port" --tensor-parallel-size "${GPUS:-1}" --enable-prefix-caching &
server=$!
trap 'kill "$server"' EXIT
until curl --silent --fail "http://localhost:$port/v1/models" >/dev/null; do
  kill -0 "$server" # stop waiting when the server has died
  sleep 5
done
threadweaver generate-data "$traces" --out "$out" --model "$model" --base-url "http://localhost:$port/v1" \
  --max-calls 256 --concurrency 256 "${@:3}"
