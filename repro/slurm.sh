#!/bin/bash
# Four nodes of eight GPUs under Slurm, with data/ and out/ on a disk that all nodes share:
#
#     sbatch repro/slurm.sh sft.py config/hh.py
#     sbatch repro/slurm.sh dpo.py config/hh.py --beta=0.2
#     sbatch --nodes=1 repro/slurm.sh dpo.py config/hh.py             # another size: the results are the same
#
# One torchrun a node; it starts one process a GPU, and all again when one dies, up to three times: they go on from the
# run's last checkpoint. Two minutes before the time limit the run saves and leaves, and the job is queued again; so it is
# when a node fails. A queued-again job goes on with --resume. Set account, partition and modules for your cluster.

#SBATCH --job-name=nanodpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100       # seconds for the step and the checkpoint after SIGTERM; torchrun's own is 30
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0       # where nodes have several networks, or ranks cannot connect

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 40000))          # two jobs may share a node
resume=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then resume=(--resume); fi

leaving=
trap 'leaving=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM         # to the processes; srun itself would kill them

srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$first_node:$port" --rdzv-id="$SLURM_JOB_ID" "$@" "${resume[@]}" &
wait $!
status=$?
if [ "$leaving" ]; then         # the trap ended the first wait, not the run
    wait $!
    status=$?
    if [ $status -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi      # 0: it was done
fi
exit $status
