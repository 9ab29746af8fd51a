"""Direct Preference Optimization: a policy and its frozen reference, preference pairs, one classification loss.

    python dpo.py config/reviews.py                                          # a laptop, the quickstart's pairs
    torchrun --standalone --nproc_per_node=8 dpo.py config/hh.py --beta=0.2  # eight GPUs
    python dpo.py config/hh.py --resume                                      # go on where a run was stopped
    python dpo.py config/reviews.py --loss=ipo --beta=0.5                    # a relative: nanodpo/losses.py

Reads data/<name>/ (prepare_prefs.py) and the weights of `init_from`. Writes checkpoints and log.jsonl to
out/<name>/dpo. Unlike the authors' code, it computes the prompt of a pair once, and uses an epoch's last short batch.
"""
import copy
import math
from dataclasses import dataclass

import config
if __name__ == '__main__':
    config.check_flags(__file__, 'dpo')               # before torch is imported, which takes seconds

import numpy as np
import torch
import torch.nn.functional as F

from config import In, Literal, need
from nanodpo import losses, reference_cache
from nanodpo.checkpoint import find, fingerprint, load_model
from nanodpo.data import Groups, batches, row_limit, training_steps
from nanodpo.losses import wide
from nanodpo.rollout import estimate_kl
from nanodpo.run import Run, learning_rate


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """Eq. 7 of arXiv 2305.18290: -log sigmoid(beta [(log pi(w) - log ref(w)) - (log pi(l) - log ref(l))]).

    All logps are (B,): a response's log-probability in nats, summed over its tokens; w is chosen, l rejected.
    -> losses, chosen_rewards, rejected_rewards, (B,) float32 or wider; a reward is beta log(pi / ref), detached.
    """
    chosen_rewards = beta * wide(policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * wide(policy_rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def response_logps(model, batch):
    """log p(response | prompt) of every response of a packed batch, nats: (G, K) float32."""
    logps = model(batch.tokens, batch.positions, batch.mask, batch.predictor, batch.target)     # (S,)
    logps = logps[:len(batch.response)]             # what is beyond is padding
    if logps.is_cuda:                               # index_add's order, and so its sum, changes there
        return torch.segment_reduce(logps, 'sum', lengths=batch.lengths.flatten(), unsafe=True).view(batch.G, batch.K)
    return logps.new_zeros(batch.G * batch.K).index_add(0, batch.response, logps).view(batch.G, batch.K)


def objective(cfg, logps, ref_logps, batch, z=None):
    """What the step minimises: losses (G,), rewards (G, K) of a packed batch. z: KTO's, else None."""
    if cfg.loss == 'dpo':
        losses_, *rewards = dpo_loss(logps[:, 0], logps[:, 1], ref_logps[:, 0], ref_logps[:, 1], cfg.beta)
        rewards = torch.stack(rewards, 1)
    else:
        losses_, rewards = losses.relative_loss(cfg, logps, ref_logps, batch.lengths, batch.labels, z)
    if cfg.nll_coef:
        nll = -logps[:, 0] / batch.lengths[:, 0]
        losses_ = losses_ + cfg.nll_coef * (nll if batch.labels is None else nll * batch.labels)
    return losses_, rewards


# --- the knobs ------------------------------------------------------------------------------------

@dataclass
class Config:
    name: str = 'reviews'                           # the experiment: reads data/<name>, writes out/<name>/<run_name>
    run_name: str = 'dpo'                           # of this run; several may share an experiment's data
    init_from: str = ''                             # '' = out/<name>/sft; our folder or .pt; a hub name or folder
    ref_from: str = ''                              # another reference than the policy as it starts
    # the loss; None = what is usual for it
    loss: Literal[tuple(losses.LOSSES)] = 'dpo'     # this file's, or a relative in nanodpo/losses.py
    beta: In[float, 'x > 0'] = None                 # leash to the reference; paper: 0.1, TL;DR 0.5; None = by the loss
    label_smoothing: In[float, '0 <= x < 0.5'] = None   # cdpo, robust: the share of labels taken to be wrong
    gamma: In[float, 'x >= 0'] = None               # simpo: the margin asked for
    alpha: In[float, '0 < x <= 1'] = None           # alpha_divergence: towards 0 it is dpo, at 1 forward_kl
    desirable_weight: In[float, 'x >= 0'] = None    # kto: of desirable examples, and
    undesirable_weight: In[float, 'x >= 0'] = None  # of undesirable ones
    nll_coef: In[float, 'x >= 0'] = 0.0             # adds so much of the chosen NLL per token; unpaired: mean over all
    # the optimizer
    batch_size: In[int, 'x >= 1'] = 64              # pairs a step, over all ranks and micro-steps
    epochs: In[int, 'x >= 1'] = 1                   # passes over the pairs; more than 1 to 3 over-fits
    max_steps: In[int, 'x >= 0'] = 0                # stop after so many optimizer steps; 0 = by epochs
    optimizer: Literal['rmsprop', 'adamw'] = 'rmsprop'  # the paper's is rmsprop: one state a weight, not two
    learning_rate: In[float, 'x > 0'] = 1e-6        # the paper's; 5e-7 in the authors' code; from 1e-5 on text suffers
    schedule: Literal['constant', 'linear', 'cosine'] = 'constant'  # after warm-up; linear and cosine go to 0
    warmup_steps: In[int, 'x >= 0'] = None          # linear, from 0; None = 150, or a tenth of the run if that is less
    weight_decay: In[float, 'x >= 0'] = 0.0         # on matrices only
    grad_clip: In[float, 'x >= 0'] = 10.0           # largest global gradient norm; 0 = no clipping
    # memory and speed; results do not depend on them
    row_tokens: In[int, 'x >= 0'] = 0               # in a micro-step; 0 = 16384 on 80 GB GPUs, 8192 below, 2048 on CPUs
    precompute_ref: bool = False                    # the reference's log-probs once; then its memory is free
    activation_checkpointing: bool = False          # less memory for a fifth more time
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'  # auto = cuda where there is one, else cpu
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the matmuls; auto = bfloat16 on cuda
    compile: bool = None                            # torch.compile the blocks: a minute once; None = on CUDA
    # log and checkpoints
    eval_interval: In[int, 'x >= 0'] = 100          # steps between evaluations on all of val; 0 = first and last
    kl_prompts: In[int, 'x >= 0'] = 64              # val prompts, a response to each, for eval/kl; 0 = none
    log_interval: In[int, 'x >= 1'] = 10            # steps a log line sums up
    save_interval: In[int, 'x >= 0'] = 500          # steps between checkpoints; the last step always has one
    track: Literal['', 'wandb'] = ''                # also log there
    seed: In[int, '0 <= x < 2**32'] = 1337          # of the order of pairs
    join_timeout: In[int, 'x >= 1'] = 120           # seconds to wait at the start for the other processes
    resume: bool = False                            # go on from the last checkpoint of the run, if there is one

    def __post_init__(self):
        usual = losses.LOSSES[self.loss][2]
        vars(self).update((knob, usual[knob]) for knob in usual if getattr(self, knob) is None)


# --- what the log shows ---------------------------------------------------------------------------

STATS = ('loss', 'rewards/chosen', 'rewards/rejected', 'rewards/accuracies',
         'logps/chosen', 'logps/rejected', 'logps/accuracies')


def accuracy(margins):
    """The share of positive ones in each group, (G, pairs) -> (G,). A tie counts one half."""
    return (margins.sign() / 2 + 0.5).mean(1)


def batch_stats(losses_, rewards, logps, labels=None, z=None):
    """Sums of what STATS names over the groups of a micro-step, and the number of groups in each sum: (2, 7)."""
    is_chosen = is_rejected = is_pair = ones = torch.ones_like(losses_)
    if labels is None:
        i, j = torch.triu_indices(logps.shape[1], logps.shape[1], 1, device=logps.device)
        margins = rewards[:, i] - rewards[:, j]                                             # (G, pairs)
        gaps = logps[:, i] - logps[:, j]                                                    # (G, pairs)
    else:
        margins = gaps = torch.where(labels[:, None], rewards - z, z - rewards)             # (G, 1)
        is_chosen, is_rejected, is_pair = labels.float(), 1 - labels.float(), 0 * ones
    rejected = slice(1 if labels is None else 0, None)                                      # all but the first
    values = torch.stack([losses_, rewards[:, 0], rewards[:, rejected].mean(1), accuracy(margins),
                          logps[:, 0], logps[:, rejected].mean(1), accuracy(gaps)]).detach()
    counts = torch.stack([ones, is_chosen, is_rejected, ones, is_chosen, is_rejected, is_pair])     # (7, G)
    return torch.stack([(values * counts).sum(1), counts.sum(1)])


def means(sums):
    """{name: mean} of what batch_stats summed, and the margin. A name without any group is left out."""
    result = {name: total / n for name, total, n in zip(STATS, *sums.tolist()) if n}
    if 'rewards/chosen' in result and 'rewards/rejected' in result:
        result['rewards/margins'] = result['rewards/chosen'] - result['rewards/rejected']
    return result


def main(argv=None):
    cfg = config.load(Config, 'dpo', argv)
    run = Run(cfg, 'dpo')

    # --- data -------------------------------------------------------------------------------------

    train, val = Groups(run.data_dir, 'train'), Groups(run.data_dir, 'val')
    losses.check(cfg, train)
    needs_z = losses.needs(cfg.loss, 'z')
    row_tokens = min(run.gather(row_limit(cfg.row_tokens, run.device, train, val)))     # GPUs may differ
    steps_per_epoch = math.ceil(len(train) / cfg.batch_size)
    total_steps = cfg.max_steps or cfg.epochs * steps_per_epoch

    # --- model: the policy, and a frozen copy of it, the reference --------------------------------

    init_from = cfg.init_from or f'out/{cfg.name}/sft'
    need(cfg.init_from or find(init_from), f'{init_from} holds no checkpoint: run sft.py first, or set --init_from')
    policy = load_model(init_from, train, dropout=0.0, activation_checkpointing=cfg.activation_checkpointing)
    policy.to(run.device)
    init_fingerprint = fingerprint(policy)
    reference, ref_fingerprint = None, ''
    if losses.needs(cfg.loss, 'ref_logps'):
        reference = load_model(cfg.ref_from, train, dropout=0.0) if cfg.ref_from else copy.deepcopy(policy)
        ref_fingerprint = fingerprint(reference) if cfg.ref_from else init_fingerprint
        run.freeze(reference.to(run.device))
    optimizer = policy.configure_optimizer(cfg.optimizer, cfg.learning_rate, cfg.weight_decay)
    start = run.resume(policy, optimizer, train, val, init_from, init=init_fingerprint, reference=ref_fingerprint)
    ddp = run.wrap(policy)
    cached = None
    if cfg.precompute_ref:
        cached = {groups.split: reference_cache.load_or_compute(
            run, ref_fingerprint, response_logps, reference, groups, row_tokens) for groups in (train, val)}
        reference = None                                            # its memory is free

    @torch.no_grad()
    def reference_logps(groups, batch):
        """(G, K), or None where the loss needs no reference."""
        if cached:
            return cached[groups.split][batch.ids].to(run.device, non_blocking=run.device.type == 'cuda')
        return response_logps(reference, batch) if reference is not None else None

    # --- evaluation: all of val, each pair once, sums over ranks ----------------------------------

    @torch.no_grad()
    def evaluate():
        policy.eval()
        ids = np.arange(len(val))
        sums = torch.zeros(2, len(STATS), dtype=run.exact, device=run.device)
        z = losses.kto_z(cfg, run, response_logps, policy, reference, val, ids, row_tokens) if needs_z else None
        with run.autocast:
            for batch in batches(val, ids, run, row_tokens):
                logps = response_logps(policy, batch)                                       # (G, K)
                losses_, rewards = objective(cfg, logps, reference_logps(val, batch), batch, z)
                sums += batch_stats(losses_, rewards, logps, batch.labels, z)
        found = means(run.sum(sums))
        if cfg.kl_prompts and reference is not None and math.isfinite(found['loss']):
            found |= estimate_kl(response_logps, policy, reference, val, cfg.kl_prompts, cfg.seed, run, row_tokens)
        policy.train()
        return found

    # --- the loop ---------------------------------------------------------------------------------

    run.open_log(start, total_steps)
    run.say(f'{len(train):,} groups to train on, {len(val):,} to validate on; {total_steps:,} steps of '
            f'{cfg.batch_size}, {steps_per_epoch:,} an epoch; {row_tokens:,} tokens a row\npolicy from {init_from}, '
            f'{policy.num_params():,} weights; reference: {cfg.ref_from or "the same" if ref_fingerprint else "none"}')
    if needs_z and cfg.batch_size == 1:
        run.say(f'note: {cfg.loss} takes z from other examples of a batch, and batch_size=1 has none: z = 0')
    if cfg.kl_prompts and reference is None:
        run.say('note: no kl in the log, since no reference is in memory')
    if start == 0:
        run.log(0, evaluate(), 'eval/')
    policy.train()
    sums = torch.zeros(2, len(STATS), dtype=run.exact, device=run.device)
    passes = 3 + (reference is not None) + 2 * needs_z              # forward ones: a backward pass counts two, z two
    unread = []                     # (step, gradient norm, losses) since the last look at the GPU
    for step, ids, micros in run.bar(training_steps(train, cfg, start, total_steps, run, row_tokens)):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(cfg, step, total_steps)
        z = losses.kto_z(cfg, run, response_logps, policy, reference, train, ids, row_tokens) if needs_z else None
        losses_of_step = []
        for batch in micros:
            if run.world > 1:
                ddp.require_backward_grad_sync = batch.last         # gradients are summed over ranks once a step
            with run.autocast:
                ref_logps = reference_logps(train, batch)                                   # (G, K)
                logps = response_logps(ddp, batch)                                          # (G, K)
            losses_, rewards = objective(cfg, logps, ref_logps, batch, z)
            loss = losses_.sum() / len(ids)                         # of the whole step, on all ranks
            (loss * run.world).backward()                           # DDP takes the mean over ranks
            sums += batch_stats(losses_, rewards, logps, batch.labels, z)
            losses_of_step.append((batch.ids, losses_.detach()))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=run.world == 1)             # DDP's gradients are views of its buckets
        unread.append((step, norm, losses_of_step))

        signalled = run.stopping()
        last = step == total_steps or signalled
        eval_now = not signalled and (last or cfg.eval_interval and step % cfg.eval_interval == 0)
        save_now = last or cfg.save_interval and step % cfg.save_interval == 0
        log_now = save_now or step == 1 or step % cfg.log_interval == 0
        if not (log_now or eval_now):
            continue                                                # never wait for the GPU
        run.check_finite(unread)
        unread = []
        if log_now:
            run.log(step, means(run.sum(sums)) | dict(grad_norm=norm.item(), lr=group['lr']) | run.speed(passes))
            sums.zero_()
        if eval_now:
            run.log(step, evaluate(), 'eval/')
        if save_now:
            with torch.no_grad(), run.autocast:
                run.save(step, response_logps(policy, batch))
        if signalled:
            break
    del ddp
    run.close()


if __name__ == '__main__':
    config.run(main)
