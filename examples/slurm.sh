#!/usr/bin/env bash
# Train on whole nodes under Slurm: sbatch --nodes 2 examples/slurm.sh DATA RUN [further options of diffkit train]
# A minute and a half before the time is up Slurm sends SIGUSR1; the run saves, ends with 75, and is put in the queue again.
# Written for Slurm's documentation, not yet tried on a cluster.
#SBATCH --job-name=diffkit
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
data=$1 run=$2
shift 2

again() {
    scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null  # to the steps: torchrun passes it on to every process
    wait
    scontrol requeue "$SLURM_JOB_ID"
    exit
}
trap again USR1

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node gpu --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m diffkit train "$data" -o "$run" "$@" &
wait
