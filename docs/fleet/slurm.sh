#!/bin/sh
# One machine of the list per task of an array: sbatch --array=0-39%8 slurm.sh fleet.yaml
#SBATCH --job-name=hyper2kvm
#SBATCH --cpus-per-task=2
#SBATCH --mem=2G
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=hyper2kvm-%a.log
set -eu
exec srun hyper2kvm convert --batch "${1:?the list of machines}" --only "$SLURM_ARRAY_TASK_ID" --progress plain
