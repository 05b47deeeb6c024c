#!/usr/bin/env bash
# Two rounds of self-training on 8 GPUs, trained with FSDP2: bash self_train.sh problems.jsonl out/sft out/data/dataset out/self
set -euo pipefail
threadweaver generate-data self-train "$1" --model "$2" --stage1 "$3" --out "$4" \
  --device cuda --dtype bfloat16 --samples 8 --rounds 2 --base Qwen/Qwen3-8B \
  --train-config examples/sft/qwen3_8b_8gpus.yaml \
  --train-command "accelerate launch --config_file examples/sft/fsdp2.yaml -m tw_recipes.cli sft --config {config} --model_name_or_path {base} --dataset_name {data} --output_dir {out}"
