#!/bin/bash
# A run on the eight GPUs of one node, one process:
# sbatch experiments/slurm/one_node.sh configs/chest_xray.py runs/chest DATA
# train.batch_size is that of all GPUs together, and must be a multiple of their number.
#SBATCH --job-name=medfuncta
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=32 --mem=128G --gres=gpu:8 --gpus-per-node=8
#SBATCH --time=24:00:00 --requeue --open-mode=append --signal=TERM@120
CONFIG=${1:?config file} WORKDIR=${2:?run directory} DATA=${3:?data folder}
shift 3
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer takes it from sbatch
srun python -m experiments.main --config="$CONFIG" --workdir="$WORKDIR" --data_dir="$DATA" "$@"
code=$?
[ $code -eq 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
exit $code
