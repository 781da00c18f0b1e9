#!/bin/bash
# Train a recipe on several nodes under Slurm:   sbatch launch/slurm.sh recipes/NAME.yaml [key.path=value ...]
# Run it from the checkout, with its .venv made. Edit the lines marked with <-- for your cluster.
#SBATCH --job-name=sett
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8        # <-- ranks per node: its GPUs
#SBATCH --gres=gpu:8               # <-- per node, not per task: every rank picks its GPU by its local number
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180          # three minutes before the end all ranks finish their window and save
#SBATCH --requeue                  # a job started again resumes from there
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
if [ "$#" -eq 0 ]; then
    echo "usage: sbatch $0 RECIPE [key.path=value ...]" >&2
    exit 2
fi
source .venv/bin/activate

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node must not share a port
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# Checks the recipe once, before all ranks find the same mistake.
sett plan "$@" --windows 0

# srun starts the ranks itself, so neither ssh nor pdsh is needed, and it sends a signal to all of them at once.
exec srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -m trainer.worker "$@"
' worker "$@"
