#!/bin/bash
# Train over several machines under SLURM: sbatch recipes/slurm.sh RECIPE [--set KEY=VALUE ...]
#
# Ask for as many nodes as you like: sbatch --nodes 4 recipes/slurm.sh recipes/large.toml --output runs/large
#SBATCH --job-name=peerlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# 15 minutes before the time is up this script gets SIGTERM: the run is saved, and the job queued again.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@900

set -euo pipefail

nodes=${SLURM_JOB_NUM_NODES:-1}
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # of its own, for several jobs may have one first node
# srun does not take the job's --cpus-per-task over by itself since SLURM 22.05: all processes would share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# A process that fails ends all of them; torchrun starts them again, at most 3 times. With --resume=auto the same command
# begins the run, or continues it from its newest checkpoint. --shutdown-timeout leaves time to save.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$nodes" \
    --nproc-per-node "$processes" \
    --max-restarts 3 \
    --shutdown-timeout 600 \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${hosts[0]}:$port" \
    -m peerlm train "$@" --resume=auto &
job=$!

stopped=
trap 'stopped=yes; kill -TERM "$job"' TERM # srun hands the signal on to its tasks
code=0
wait "$job" || code=$?
if [ -n "$stopped" ]; then
    code=0
    wait "$job" || code=$? # the first wait ended with the signal
    if [ "$code" -ne 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
fi
exit "$code"
