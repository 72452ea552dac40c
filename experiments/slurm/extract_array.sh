#!/bin/bash
# The latents of a trained run, by an array of jobs:
# sbatch --array=0-7 experiments/slurm/extract_array.sh configs/chest_xray.py runs/chest DATA
# Each job writes its own files of the store, the same as one job would; the last one to end describes the store.
#SBATCH --job-name=medfuncta-extract
#SBATCH --array=0-7 --ntasks=1 --cpus-per-task=4 --mem=32G --gres=gpu:1 --gpus-per-node=1
#SBATCH --time=08:00:00 --requeue --open-mode=append --signal=TERM@120
CONFIG=${1:?config file} WORKDIR=${2:?run directory} DATA=${3:?data folder}
shift 3
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer takes it from sbatch
srun python -m experiments.main --config="$CONFIG" --workdir="$WORKDIR" --data_dir="$DATA" --mode=extract \
    --config.extract.shards="$SLURM_ARRAY_TASK_COUNT" --config.extract.shard="$SLURM_ARRAY_TASK_ID" "$@"
code=$?
[ $code -eq 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
exit $code
