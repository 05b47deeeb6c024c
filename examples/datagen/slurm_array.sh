#!/usr/bin/env bash
# One server and one worker a node, one folder for all:  sbatch --array=0-15 slurm_array.sh traces.jsonl /shared/out/data
# When the array is done, on any machine:  threadweaver generate-data traces.jsonl --out /shared/out/data --model "$MODEL"
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
set -euo pipefail
here=${SLURM_SUBMIT_DIR:-$(dirname "$0")}
GPUS=8 bash "$here/one_node.sh" "$1" "$2" --worker "$SLURM_ARRAY_TASK_ID" --workers "$SLURM_ARRAY_TASK_COUNT"
