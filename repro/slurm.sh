#!/bin/bash
# Four nodes of eight GPUs under Slurm, with data/ and out/ on a disk that all nodes share:
#
#     sbatch repro/slurm.sh sft.py config/hh.py
#     sbatch repro/slurm.sh dpo.py config/hh.py --beta=0.2
#     sbatch --nodes=1 repro/slurm.sh dpo.py config/hh.py             # another size: the results are the same
#
# Without Slurm, on every node:
#
#     torchrun --nnodes=4 --nproc_per_node=8 --max-restarts=3 --rdzv-backend=c10d \
#         --rdzv-endpoint=NODE0:29500 --rdzv-id=1 dpo.py config/hh.py
#
# The nodes run the same command each, and read data/ and out/: share a disk, or copy both. Rank 0 alone writes. A rank
# that sees other data, weights, checkpoints or knobs than rank 0 is named at the start, and the run ends.
#
# torchrun starts one process a GPU. When one dies, it starts all again, up to three times, and they go on from this
# launch's last checkpoint. With as many processes as before, CPUs give the same bits as without the accident; on GPUs
# that is not measured yet. `save_interval` is what can be lost. With --nnodes=1:4 a run goes on with the nodes that
# are left, as long as the one at the rendezvous address lives.
#
# Two minutes before the time limit the run saves and leaves. Then the job is queued again, as it is
# when a node fails, and goes on with --resume. This script was tested with stand-ins for Slurm's commands, not on a
# cluster. Set account, partition and modules for yours.
#
# How a step of 8 or 32 GPUs splits into compute, all-reduce and input: repro/README.md, "Scale".

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

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100       # seconds for the step and the checkpoint after SIGTERM; the usual is 30
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
