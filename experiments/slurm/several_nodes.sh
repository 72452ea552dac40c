#!/bin/bash
# A run on several nodes, one process a node:
# sbatch --nodes=8 experiments/slurm/several_nodes.sh configs/chest_xray.py runs/chest DATA --config.train.batch_size=64
# The processes find each other through Slurm. If one is lost the others end, and the job starts again from the newest
# checkpoint; the run directory and the data lie on a file system that all nodes share.
#SBATCH --job-name=medfuncta
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=32 --mem=128G --gres=gpu:8 --gpus-per-node=8
#SBATCH --time=24:00:00 --requeue --open-mode=append --signal=TERM@120
CONFIG=${1:?config file} WORKDIR=${2:?run directory} DATA=${3:?data folder}
shift 3
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer takes it from sbatch
srun --kill-on-bad-exit=1 python -m experiments.main --config="$CONFIG" --workdir="$WORKDIR" --data_dir="$DATA" \
    --config.train.checkpoint_every=1000 "$@"
code=$?
[ $code -eq 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
# Of a lost process: at most three more starts.
[ $code -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] && exec scontrol requeue "$SLURM_JOB_ID"
exit $code
