#!/bin/bash
# A run on one GPU, which goes on after preemption:
# sbatch experiments/slurm/one_gpu.sh configs/chest_xray.py runs/chest DATA
#SBATCH --job-name=medfuncta
#SBATCH --ntasks=1 --cpus-per-task=4 --mem=32G --gres=gpu:1 --gpus-per-node=1
#SBATCH --time=24:00:00 --requeue --open-mode=append --signal=TERM@120
CONFIG=${1:?config file} WORKDIR=${2:?run directory} DATA=${3:?data folder}
shift 3 # the rest overrides the config: --config.train.batch_size=12
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer takes it from sbatch
srun python -m experiments.main --config="$CONFIG" --workdir="$WORKDIR" --data_dir="$DATA" "$@"
code=$?
[ $code -eq 75 ] && exec scontrol requeue "$SLURM_JOB_ID" # stopped and saved
exit $code
