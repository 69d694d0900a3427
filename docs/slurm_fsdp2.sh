#!/bin/bash
# The whole chain of a recipe, its models in slices inside of each machine: sbatch docs/slurm_fsdp2.sh recipes/my_run.yaml
# Two machines of eight GPUs; for 64 GPUs: sbatch --nodes=8 docs/slurm_fsdp2.sh recipes/my_run.yaml
# SLICES=64 cuts a model over so many GPUs instead of those of one machine: for one that eight GPUs do not hold.
# Submit it from the root of the project, which, like output_dir, is on a file system that all machines share.
#SBATCH --job-name=relay
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
set -euo pipefail

export RECIPE="${1:?name a recipe}"
export PYTHON="${PYTHON:-.venv/bin/python}"
MAIN="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
export MAIN SLICES="${SLICES:-$SLURM_GPUS_ON_NODE}"

# One launcher on each machine; each starts a process for every GPU of its own.
srun --kill-on-bad-exit=1 bash -c '
  "$PYTHON" pipeline/run.py "$RECIPE" -- \
    --config_file accelerate_configs/fsdp2_multi_node.yaml \
    --num_machines "$SLURM_NNODES" \
    --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --parallelism_config_dp_shard_size "$SLICES" \
    --parallelism_config_dp_replicate_size "$((SLURM_NNODES * SLURM_GPUS_ON_NODE / SLICES))" \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN" \
    --main_process_port 29500
'
