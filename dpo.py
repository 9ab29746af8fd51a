"""Direct Preference Optimization: a policy and its frozen reference, preference pairs, one classification loss.

    python dpo.py config/reviews.py                                          # a laptop, the embedded experiment
    torchrun --standalone --nproc_per_node=8 dpo.py config/hh.py --beta=0.2  # eight GPUs
    python dpo.py config/hh.py --resume                                      # go on where a run was stopped
    python dpo.py config/reviews.py --loss=ipo --beta=0.5                    # a relative of DPO

Reads data/<name>/ (prepare_prefs.py) and the weights of `init_from`, by default out/<name>/sft; writes checkpoints
and log.jsonl to out/<name>/dpo. Departures from the authors' code: prompt and responses share one packed row, so
that a prompt is computed once; `batch_size` is exact whatever the number of processes; the last short batch is used.
"""
import copy
import gc
import json
import math
import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
from config import In, Literal, UserError
from launch import check_alike, join, name_lost_ranks, read_ranks
from model import (CheckpointError, export_error, find_checkpoints, fingerprint, load_model, open_run, packed_mask,
                   peak_flops, read_checkpoint, save_checkpoint, token_logps)
from prepare_prefs import Groups, Sampled, distinct_prompts, mismatched, packed_batches, plan_rows, row_limit, step_groups


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """Eq. 7 of arXiv 2305.18290: -log sigmoid(beta [(log pi(w) - log ref(w)) - (log pi(l) - log ref(l))]).

    All logps are (B,): a response's log-probability in nats, summed over its tokens; w is chosen, l rejected.
    -> losses, chosen_rewards, rejected_rewards, (B,) float32 or wider; a reward is beta log(pi / ref), detached.
    """
    chosen_rewards = beta * wide(policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * wide(policy_rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def wide(x):
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def response_logps(model, head, batch, mask):
    """Log-probability of every response given its prompt, nats: (G, K) float32. head: (V, C), the tied weight."""
    states = model(batch.tokens, batch.positions, mask, batch.predictor)        # (S, C), of the scored tokens alone
    logps = token_logps(states, head, batch.target)[:len(batch.response)]       # (S,)
    G, K = len(batch.ids), batch.K
    return logps.new_zeros(G * K).index_add(0, batch.response, logps).view(G, K)


# -----------------------------------------------------------------------------
# its relatives, chosen by --loss=; arguments and results as dpo_loss's where nothing else is said. h is the argument of
# beta in eq. 7; *_tokens, (B,), are the responses' lengths; a reward is what the loss compares, detached

def cdpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing):
    """(1 - eps) L(h) + eps L(-h), L being dpo_loss, where a share eps of the labels is wrong: "conservative DPO",
    E. Mitchell's note on DPO and noisy preferences, 2023. It stops at sigmoid(beta h) = 1 - eps."""
    losses, *rewards = dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    flipped, *_ = dpo_loss(policy_rejected_logps, policy_chosen_logps, ref_rejected_logps, ref_chosen_logps, beta)
    return (1 - label_smoothing) * losses + label_smoothing * flipped, *rewards


def robust_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing):
    """[(1 - eps) L(h) - eps L(-h)] / (1 - 2 eps), L being dpo_loss (arXiv 2403.00409): its mean over labels of which a
    share eps is flipped is that of L over the right ones. It has no lower bound."""
    losses, *rewards = dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    flipped, *_ = dpo_loss(policy_rejected_logps, policy_chosen_logps, ref_rejected_logps, ref_chosen_logps, beta)
    return ((1 - label_smoothing) * losses - label_smoothing * flipped) / (1 - 2 * label_smoothing), *rewards


def ipo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, tau):
    """(h - 1 / (2 tau))^2 (arXiv 2310.12036, eq. 17): the margin h has a goal, where dpo's has none. Rewards with tau."""
    chosen, rejected = wide(policy_chosen_logps - ref_chosen_logps), wide(policy_rejected_logps - ref_rejected_logps)
    return (chosen - rejected - 1 / (2 * tau)) ** 2, tau * chosen.detach(), tau * rejected.detach()


def ipo_mean_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_tokens,
                  rejected_tokens, tau):
    """ipo_loss on means over tokens: how some peers read arXiv 2310.12036, whose eq. 17 has sums. tau is then of nats a token."""
    return ipo_loss(policy_chosen_logps / chosen_tokens, policy_rejected_logps / rejected_tokens,
                    ref_chosen_logps / chosen_tokens, ref_rejected_logps / rejected_tokens, tau)


def hinge_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """max(0, 1 - beta h): the hinge of SLiC (arXiv 2305.10425) on dpo's margin, as in RSO (arXiv 2309.06657)."""
    chosen = beta * wide(policy_chosen_logps - ref_chosen_logps)
    rejected = beta * wide(policy_rejected_logps - ref_rejected_logps)
    return F.relu(1 - (chosen - rejected)), chosen.detach(), rejected.detach()


def dpo_norm_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_tokens,
                  rejected_tokens, beta):
    """dpo_loss on means over tokens: length-normalised DPO (Tulu 3, arXiv 2411.15124, section 5)."""
    return dpo_loss(policy_chosen_logps / chosen_tokens, policy_rejected_logps / rejected_tokens,
                    ref_chosen_logps / chosen_tokens, ref_rejected_logps / rejected_tokens, beta)


def simpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_tokens, rejected_tokens, beta, gamma):
    """-log sigmoid(beta [mean log pi(w) - mean log pi(l)] - gamma), means over tokens, no reference (arXiv 2405.14734)."""
    chosen, rejected = beta * wide(policy_chosen_logps) / chosen_tokens, beta * wide(policy_rejected_logps) / rejected_tokens
    return -F.logsigmoid(chosen - rejected - gamma), chosen.detach(), rejected.detach()


def orpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_tokens, rejected_tokens, lam):
    """-m(w) - lam log sigmoid(odds(w) - odds(l)), odds = m - log(1 - exp m), m the mean of log pi over tokens; no reference
    (arXiv 2403.07691). Rewards are lam odds. Above -eps of the type, m counts as -eps, so that p = 1 stays finite."""
    means = wide(policy_chosen_logps) / chosen_tokens, wide(policy_rejected_logps) / rejected_tokens
    chosen, rejected = (m - torch.log(-torch.expm1(m.clamp(max=-torch.finfo(m.dtype).eps))) for m in means)
    return -means[0] - lam * F.logsigmoid(chosen - rejected), lam * chosen.detach(), lam * rejected.detach()


def kto_loss(policy_logps, ref_logps, desirable, z, beta, desirable_weight, undesirable_weight):
    """lam_D (1 - sigmoid(r - z)) for desirable responses, lam_U (1 - sigmoid(z - r)) for others; r = beta log(pi / ref)
    (arXiv 2402.01306). Any shape, one response an entry; desirable: bool; z: see kto_z in main. -> losses, rewards"""
    rewards = beta * wide(policy_logps - ref_logps)
    losses = torch.where(desirable, desirable_weight * torch.sigmoid(z - rewards), undesirable_weight * torch.sigmoid(rewards - z))
    return losses, rewards.detach()


def plackett_luce_loss(policy_logps, ref_logps, beta):
    """-sum_k log [exp r_k / sum_{j >= k} exp r_j], r = beta log(pi / ref): a ranking, best first (arXiv 2305.18290,
    appendix A.3). policy_logps, ref_logps: (B, K). -> losses (B,), rewards (B, K). K = 2 is dpo_loss, to the bit."""
    rewards = beta * wide(policy_logps - ref_logps)
    ahead = [rewards[:, k] - rewards[:, k + 1:].logsumexp(1) for k in range(rewards.shape[1] - 1)]    # of all who follow
    return -sum(F.logsigmoid(lead) for lead in ahead), rewards.detach()


LOSSES = {      # each one's own knobs, and what they usually are; beta is ipo's tau, orpo's lam
    'dpo': (dpo_loss, dict(beta=0.1)),
    'cdpo': (cdpo_loss, dict(beta=0.1, label_smoothing=0.1)),
    'robust': (robust_loss, dict(beta=0.1, label_smoothing=0.1)),
    'ipo': (ipo_loss, dict(beta=0.1)),
    'ipo_mean': (ipo_mean_loss, dict(beta=0.1)),
    'hinge': (hinge_loss, dict(beta=0.1)),
    'dpo_norm': (dpo_norm_loss, dict(beta=5.0)),
    'simpo': (simpo_loss, dict(beta=2.0, gamma=1.0)),
    'orpo': (orpo_loss, dict(beta=0.1)),
    'kto': (kto_loss, dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)),
    'plackett_luce': (plackett_luce_loss, dict(beta=0.1)),
}
NO_REFERENCE = 'simpo', 'orpo'
PER_TOKEN = 'ipo_mean', 'dpo_norm', 'simpo', 'orpo'


def losses_and_rewards(cfg, logps, ref_logps, tokens, labels=None, z=None):
    """What cfg.loss makes of packed groups. logps, ref_logps (None where the loss needs none), tokens: (G, K), the best
    response first; labels: (G,) bool of single responses, or None; z: kto's. -> losses (G,), rewards (G, K)"""
    function, knobs = LOSSES[cfg.loss]
    own = [getattr(cfg, knob) for knob in knobs]
    if cfg.loss == 'kto':               # of a pair, the first is desirable
        desirable = torch.arange(logps.shape[1], device=logps.device) == 0 if labels is None else labels[:, None]
        losses, rewards = function(logps, ref_logps, desirable, z, *own)
        losses = losses.mean(1)
    elif cfg.loss == 'plackett_luce':
        losses, rewards = function(logps, ref_logps, *own)
    else:
        references = ref_logps.t() if cfg.loss not in NO_REFERENCE else ()
        lengths = tokens.t() if cfg.loss in PER_TOKEN else ()
        losses, *rewards = function(*logps.t(), *references, *lengths, *own)
        rewards = torch.stack(rewards, 1)
    if cfg.nll_coef:
        nll = -logps[:, 0] / tokens[:, 0]
        losses = losses + cfg.nll_coef * (nll if labels is None else nll * labels)
    return losses, rewards


# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: reads data/<name>, writes out/<name>/dpo
    init_from: str = ''                             # policy and reference: '' = out/<name>/sft, a folder or .pt of ours,
                                                    # a GPT-2 name on the hub, or a directory in its layout
    loss: Literal[tuple(LOSSES)] = 'dpo'            # dpo, cdpo, robust, ipo (on sums), ipo_mean (on means over tokens), hinge,
                                                    # dpo_norm, simpo, orpo, kto, plackett_luce: the functions above
    beta: In[float, 'x > 0'] = None                 # strength of the leash to the reference; paper: 0.1, TL;DR 0.5; tau of
                                                    # ipo, lambda of orpo; None = 0.1, for dpo_norm 5, for simpo 2
    label_smoothing: In[float, '0 <= x < 0.5'] = None   # cdpo, robust: the share of labels taken to be wrong; None = 0.1
    gamma: In[float, 'x >= 0'] = None               # simpo: the margin asked for, 0.1 to 0.8 of beta; None = 1
    desirable_weight: In[float, 'x >= 0'] = None    # kto: of desirable examples, and
    undesirable_weight: In[float, 'x >= 0'] = None  # of undesirable ones; None = 1
    nll_coef: In[float, 'x >= 0'] = 0.0             # adds so much of the chosen responses' NLL per token, to any loss
    ref_from: str = ''                              # the reference: '' = a copy of the policy as it starts, or as init_from
    batch_size: In[int, 'x >= 1'] = 64              # pairs (rankings, examples) a step, over all ranks and micro-steps
    epochs: In[int, 'x >= 1'] = 1                   # passes over the pairs; more than 1 to 3 over-fits
    max_steps: In[int, 'x >= 0'] = 0                # stop after so many optimizer steps; 0 = by epochs
    optimizer: Literal['rmsprop', 'adamw'] = 'rmsprop'  # the paper's is rmsprop: one state a weight, not two
    learning_rate: In[float, 'x > 0'] = 1e-6        # the paper's; 5e-7 in the authors' code; from 1e-5 on text suffers
    schedule: Literal['constant', 'linear', 'cosine'] = 'constant'  # after warm-up; linear and cosine go to 0
    warmup_steps: In[int, 'x >= 0'] = 150           # linear, from 0
    weight_decay: In[float, 'x >= 0'] = 0.0         # on matrices only
    grad_clip: In[float, 'x >= 0'] = 10.0           # largest global gradient norm; 0 = no clipping
    precompute_ref: bool = False                    # the reference's log-probs once, cached; then its memory is free
    activation_checkpointing: bool = False          # less memory for a fifth more time
    row_tokens: In[int, 'x >= 0'] = 0               # tokens a micro-step at most: speed and memory, not results; 0 =
                                                    # 8192 on CUDA, 2048 elsewhere, more where a pair is longer
    eval_interval: In[int, 'x >= 0'] = 100          # steps between evaluations on all of val; 0 = first and last only
    kl_prompts: In[int, 'x >= 0'] = 64              # distinct prompts of val, one response drawn to each, that estimate eval/kl;
                                                    # 0 = none, nor without a live reference (simpo, orpo, precompute_ref)
    log_interval: In[int, 'x >= 1'] = 10            # steps a log line sums up
    save_interval: In[int, 'x >= 0'] = 500          # steps between checkpoints; the last step always has one
    track: Literal['', 'wandb', 'tensorboard'] = '' # also log there
    save_pretrained: str = ''                       # a directory that gets the trained model in the Hugging Face layout, with
                                                    # tokenizer and turn template; python model.py does the same later
    seed: In[int, '0 <= x < 2**32'] = 1337                  # of the order of pairs
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'  # auto = cuda where there is one, else cpu
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the matmuls; weights stay float32; auto = bfloat16 on cuda
    compile: bool = torch.cuda.is_available()       # torch.compile the model: minutes once, then faster
    join_timeout: In[int, 'x >= 1'] = 120           # seconds to wait at the start for the other processes, of several
    resume: bool = False                            # go on from the last checkpoint of out/<name>/dpo, if there is one

    def __post_init__(self):
        for knob, usual in LOSSES[self.loss][1].items():
            if getattr(self, knob) is None:
                setattr(self, knob, usual)


STATS = ('loss', 'rewards/chosen', 'rewards/rejected', 'rewards/accuracies', 'logps/chosen', 'logps/rejected')


def batch_stats(losses, rewards, logps, labels=None, z=None):
    """Sums over the groups of a micro-step of what STATS names, and of how many each is: (2, 6) float32.

    Of a ranking, all but the first count as rejected, and accuracy is the share of its pairs that are in order; of single
    responses, labelled (G,) bool, the share on the right side of z.
    """
    logps, ones = logps.detach(), torch.ones_like(losses)
    if labels is None:
        i, j = torch.triu_indices(logps.shape[1], logps.shape[1], 1, device=logps.device)
        margins, chosen, rejected, others = rewards[:, i] - rewards[:, j], ones, ones, slice(1, None)
    else:
        margins, chosen, rejected, others = torch.where(labels[:, None], rewards - z, z - rewards), labels.float(), 1 - labels.float(), slice(1)
    accuracies = ((margins > 0).float() + 0.5 * (margins == 0).float()).mean(1)     # a tie counts one half
    rows = torch.stack([losses.detach(), rewards[:, 0], rewards[:, others].mean(1), accuracies, logps[:, 0], logps[:, others].mean(1)])
    counts = torch.stack([ones, chosen, rejected, ones, chosen, rejected])
    return torch.stack([(rows * counts).sum(1), counts.sum(1)])


def means(sums):
    """{name: mean} of what batch_stats summed, and the margin; what there is none of is left out."""
    found = {name: total / n for name, total, n in zip(STATS, *sums.tolist()) if n}
    if {'rewards/chosen', 'rewards/rejected'} <= found.keys():
        found['rewards/margins'] = found['rewards/chosen'] - found['rewards/rejected']
    return found


def main(argv=None):
    cfg = config.load(Config, 'dpo', argv)
    stage, needs_reference = 'dpo', cfg.loss not in NO_REFERENCE
    own = LOSSES[cfg.loss][1].keys() | ({'precompute_ref', 'ref_from'} if needs_reference else set())
    for knob in ('label_smoothing', 'gamma', 'desirable_weight', 'undesirable_weight', 'precompute_ref', 'ref_from'):
        if knob not in own and getattr(cfg, knob) != Config.__dataclass_fields__[knob].default:
            raise UserError(f'{cfg.origin[knob]}: {knob}={getattr(cfg, knob)!r} is of no use to loss={cfg.loss}: leave it out')
    if cfg.precompute_ref and cfg.loss == 'kto':
        raise UserError('precompute_ref cannot serve loss=kto, whose z asks the reference about other pairs at every step')

    # -------------------------------------------------------------------------
    # launch: one process, or one a GPU under torchrun

    device_type = cfg.device if cfg.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    world, rank, local_rank = read_ranks(device_type)
    if cfg.batch_size < world:
        raise UserError(f'batch_size={cfg.batch_size} is smaller than the {world} processes that share it')
    device = torch.device(device_type, local_rank) if device_type == 'cuda' else torch.device(device_type)
    bf16 = cfg.dtype == 'bfloat16' or cfg.dtype == 'auto' and device_type == 'cuda' and torch.cuda.is_bf16_supported()
    autocast = torch.autocast(device_type, torch.bfloat16) if bf16 else nullcontext()
    if device_type == 'cuda':
        torch.cuda.set_device(device)
    out_dir = os.path.join('out', cfg.name, stage)

    def say(text):
        if rank == 0:
            tqdm.write(text)

    step = 0
    store, launch, restarted = join(world, rank, 'cpu:gloo,cuda:nccl' if device_type == 'cuda' else 'gloo', cfg.join_timeout)
    if world > 1:
        name_lost_ranks(store, world, rank, lambda: f' at step {step}')

    def reduced(tensor):
        """The sum over ranks, in place."""
        if world > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(error):
        """End the run on all ranks where rank 0 has an error, so that none is left waiting; '' is no error."""
        if reduced(torch.tensor([len(error)])).item():
            told = [error]
            if world > 1:
                dist.broadcast_object_list(told)
            raise UserError(told[0])

    # -------------------------------------------------------------------------
    # data

    data_dir = os.path.join('data', cfg.name)
    train, val = Groups(data_dir, 'train'), Groups(data_dir, 'val')
    if cfg.save_pretrained:             # what cannot be written is refused before training
        agree(export_error(cfg.save_pretrained, data_dir, keep=(cfg.init_from, cfg.ref_from, out_dir)) if rank == 0 else '')
    kind = 'unpaired examples' if train.labels is not None else {1: 'single responses', 2: 'pairs'}.get(train.K, f'rankings of {train.K}')
    fitting = {'kto': 'pairs or unpaired examples', 'plackett_luce': 'pairs or rankings'}.get(cfg.loss, 'pairs')
    if kind.split()[0] not in fitting.split():
        takes = {'unpaired': ': --loss=kto takes them', 'rankings': ': --loss=plackett_luce takes them'}.get(kind.split()[0], '')
        raise UserError(f'{data_dir} holds {kind}, loss={cfg.loss} needs {fitting}{takes}')
    row_tokens = row_limit([train, val], cfg.row_tokens, device_type)
    steps_per_epoch = math.ceil(len(train) / cfg.batch_size)
    total_steps = cfg.max_steps or cfg.epochs * steps_per_epoch
    exact = torch.float64 if device_type != 'mps' else torch.float32    # of sums; MPS has no other

    def plan(step):
        """The groups of optimizer step `step`, the first being 1, and the rows of them that are this rank's."""
        ids = step_groups(len(train), cfg.batch_size, step - 1, cfg.seed)
        return ids, plan_rows(ids, train.lengths[ids], world, row_tokens)[rank]

    # -------------------------------------------------------------------------
    # model: the policy, and a frozen copy of it, the reference

    init_from = cfg.init_from or os.path.join('out', cfg.name, 'sft')
    if not cfg.init_from and not find_checkpoints(init_from):
        raise UserError(f'{init_from} holds no checkpoint: run sft.py with this config first, or set --init_from')
    try:
        policy, record = load_model(init_from, dropout=0.0, activation_checkpointing=cfg.activation_checkpointing)
        reference, ref_record = load_model(cfg.ref_from, dropout=0.0) if cfg.ref_from else (None, {})
    except CheckpointError as error:
        raise UserError(error) from None
    train.check_model(policy.config, record.get('vocabulary'), init_from)
    policy.to(device)
    init_fingerprint = ref_fingerprint = fingerprint(policy)
    if cfg.ref_from:
        train.check_model(reference.config, ref_record.get('vocabulary'), cfg.ref_from)
        ref_fingerprint = fingerprint(reference)
        init_fingerprint = f'{init_fingerprint} with reference {ref_fingerprint}'      # resuming needs both, sampling the last
    elif needs_reference:
        reference = copy.deepcopy(policy)
    if needs_reference:
        reference.to(device).eval().requires_grad_(False)

    # -------------------------------------------------------------------------
    # resume

    start_step, saved = 0, None
    found = find_checkpoints(out_dir) if cfg.resume or restarted else []
    for path in reversed(found):
        try:
            saved = read_checkpoint(path)
            break
        except CheckpointError as error:
            say(f'refused: {error}')
    if found and saved is None:
        raise UserError(f'cannot resume: no checkpoint of {out_dir} can be read')
    if saved is not None and not cfg.resume and saved.get('launch') != launch:
        saved = None            # an earlier run's: this launch was restarted before it saved
    if saved is not None:
        knobs = saved.get('config', {})
        for what, now, then in (('the training data', train.fingerprint, saved.get('data_fingerprint')),
                                ('the initial weights', init_fingerprint, saved.get('init_fingerprint')),
                                ('batch_size', cfg.batch_size, knobs.get('batch_size')),
                                ('seed', cfg.seed, knobs.get('seed')),
                                ('optimizer', cfg.optimizer, knobs.get('optimizer'))):
            if now != then:
                raise UserError(f'cannot resume {path}: {what} changed since ({then} then, {now} now)')
        changed = [f'{k} {knobs.get(k)!r} -> {v!r}' for k, v in asdict(cfg).items() if k != 'resume' and knobs.get(k) != v]
        try:
            policy.load_state_dict(saved['model'])
        except RuntimeError:
            raise UserError(f'cannot resume {path}: its weights do not fit the model of {init_from}') from None
        start_step = saved['step']
        say(f'resuming from {path}' + (f', with {", ".join(changed)}' if changed else ''))
    elif cfg.resume or restarted:
        say(f'nothing to resume in {out_dir}: starting at step 0')
    if world > 1:
        check_alike(asdict(cfg) | {
            f'{data_dir}/{train.split}': train.fingerprint, f'{data_dir}/{val.split}': val.fingerprint,
            'init_from': init_fingerprint, f'step to start from, by {out_dir},': start_step})

    # -------------------------------------------------------------------------
    # optimizer

    matrices = [p for p in policy.parameters() if p.dim() >= 2]
    others = [p for p in policy.parameters() if p.dim() < 2]
    param_groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0.0)]
    if cfg.optimizer == 'rmsprop':
        optimizer = torch.optim.RMSprop(param_groups, lr=cfg.learning_rate)
    else:
        optimizer = torch.optim.AdamW(param_groups, lr=cfg.learning_rate, betas=(0.9, 0.95), fused=device_type != 'mps')
    if saved is not None:
        try:
            optimizer.load_state_dict(saved['optimizer'])
        except (KeyError, TypeError, ValueError):
            raise UserError(f'cannot resume {path}: it holds no state of the optimizer') from None
        optimizer.param_groups[0]['weight_decay'] = cfg.weight_decay       # the knob's, not the saved one
    saved = None                # frees the copy

    def learning_rate(step):
        """Of optimizer step `step`, the first being 1: linear warm-up, then the schedule."""
        if step <= cfg.warmup_steps:
            return cfg.learning_rate * step / cfg.warmup_steps
        done = (step - cfg.warmup_steps) / max(1, total_steps + 1 - cfg.warmup_steps)      # in (0, 1)
        return cfg.learning_rate * {'constant': 1, 'linear': 1 - done, 'cosine': 0.5 + 0.5 * math.cos(math.pi * done)}[cfg.schedule]

    if bf16 and device_type == 'cpu' and torch.backends.cpu.get_cpu_capability() in ('DEFAULT', 'AVX2'):
        say('note: this CPU has no bfloat16 instructions: --dtype=float32 is many times faster here')
    if cfg.warmup_steps >= total_steps:
        say(f'note: the run of {total_steps:,} steps ends within its warm-up of {cfg.warmup_steps:,}: set --warmup_steps')

    net = torch.compile(policy, dynamic=True) if cfg.compile else policy        # rows vary in length
    ddp = DistributedDataParallel(net, device_ids=[local_rank] if device_type == 'cuda' else None,
                                  gradient_as_bucket_view=True) if world > 1 else net

    # -------------------------------------------------------------------------
    # log

    say(f'{stage}, {world} process{"es" * (world > 1)} on {device_type}:\n{config.show(cfg)}')
    log_file = tracker = None
    error = ''
    try:
        if rank == 0:
            if cfg.track == 'wandb':        # all that may fail before open_run moves an old run away
                import wandb
                folder = os.path.join('out', cfg.name)
                os.makedirs(folder, exist_ok=True)
                tracker = wandb.init(project='nanodpo', name=f'{cfg.name}-{stage}', config=asdict(cfg), dir=folder)
            elif cfg.track == 'tensorboard':
                from torch.utils.tensorboard import SummaryWriter
                threading.excepthook = lambda failed: None      # its thread's: the next call raises the same
            log_file = open_run(out_dir, start_step)
            if cfg.track == 'tensorboard':  # after a resume, what a killed run wrote past its checkpoint goes
                tracker = SummaryWriter(out_dir, purge_step=start_step + 1)
    except OSError as os_error:
        error = f'cannot write to {out_dir}: {os_error.strerror}'
    except ImportError as import_error:
        error = f'track={cfg.track} needs {import_error.name}: pip install {import_error.name}'
    except Exception as problem:        # wandb's own: no key, no network
        if cfg.track != 'wandb':
            raise
        error = f'track=wandb: {problem} WANDB_MODE=offline needs neither a login nor a network'
    agree(error)
    columns = {'loss': 'loss {:.4f}', 'rewards/accuracies': 'acc {:.3f}', 'rewards/margins': 'margin {:+.4f}',
               'rewards/chosen': 'chosen {:+.4f}', 'rewards/rejected': 'rejected {:+.4f}', 'kl': 'kl {:.2f}',
               'perplexity': 'ppl {:.2f}', 'grad_norm': 'grad {:.2f}', 'lr': 'lr {:.2e}',
               'tokens_per_second': '{:,.0f} tok/s', 'mfu': 'mfu {:.1%}', 'memory_gb': '{:.1f} GB'}

    def log(step, record, prefix=''):
        """One aligned line to the terminal, one JSON line to log.jsonl."""
        label = f'{prefix.strip("/") or "step":5}{step:>7,}/{total_steps:,}'
        say(' | '.join([label] + [text.format(record[key]) for key, text in columns.items() if key in record]))
        record = {prefix + key: value for key, value in record.items()}
        error = ''
        try:
            if rank == 0:
                log_file.write(json.dumps({'step': step, **record}) + '\n')
            if rank == 0 and cfg.track == 'wandb':
                tracker.log(record, step=step)
            elif rank == 0 and cfg.track == 'tensorboard':
                for key, value in record.items():
                    tracker.add_scalar(key, value, step)
        except OSError as os_error:
            error = f'cannot write the log to {out_dir}: {os_error.strerror}; the checkpoints are untouched'
        agree(error)

    def save(step):
        error = ''
        try:
            if rank == 0:
                save_checkpoint(out_dir, step, policy, dict(
                    stage=stage, config=asdict(cfg), optimizer=optimizer.state_dict(), vocabulary=train.vocabulary,
                    data_fingerprint=train.fingerprint, init_from=init_from, init_fingerprint=init_fingerprint, launch=launch))
        except OSError as os_error:
            error = (f'cannot save step {step} to {out_dir}: {os_error.strerror or os_error}; '
                     'the checkpoints before it are untouched')
        agree(error)

    def stop_if_not_finite(unread):
        """End the run where a step was not finite, naming the groups whose own loss is not, or all of the step's.

        unread: of each step since the last look its number, gradient norm and micro-steps' (ids, losses).
        """
        finite = torch.stack([norm for _, norm, _ in unread]).isfinite().tolist()       # the wait for the GPU
        if all(finite):
            return
        step, _, micros = unread[finite.index(False)]
        bad = [i for ids, losses in micros for i, ok in zip(ids, losses.isfinite().tolist()) if not ok]
        gathered = [bad]
        if world > 1:
            gathered = [None] * world
            dist.all_gather_object(gathered, bad)
        bad = sorted(i for some in gathered for i in some) or sorted(plan(step)[0].tolist())
        raise UserError(f'step {step}: the loss or its gradient is not finite; groups of {data_dir}/{train.split}: {bad}; '
                        f'nothing since is saved; lower the learning rate, or look at these groups')

    stopped_by = torch.zeros(1, dtype=torch.int32)      # a signal's number; on the CPU, so that asking costs no GPU sync

    def on_signal(number, frame):
        stopped_by[0] = number
        say(f'signal {number}: finishing this step, then saving')
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # a second Ctrl-C stops at once; SIGTERM, Slurm and torchrun send both

    # -------------------------------------------------------------------------
    # the reference's log-probs: live, or computed once

    ref_net = ref_head = None
    if needs_reference:
        ref_net, ref_head = torch.compile(reference, dynamic=True) if cfg.compile else reference, reference.wte.weight
        if bf16:        # what autocast would do at every call; half the memory
            ref_head = ref_head.bfloat16()
            for module in reference.modules():
                if isinstance(module, torch.nn.Linear):
                    module.bfloat16()
    cached = None

    def reference_logps(groups, batch, mask):
        if cached is not None:
            return cached[groups.split][batch.ids].to(device, non_blocking=True)
        return response_logps(ref_net, ref_head, batch, mask) if needs_reference else None

    @torch.no_grad()
    def all_reference_logps(groups, ids):
        """(len(groups), K): the reference's log-probs of the pairs `ids`, zeros elsewhere; every rank has all."""
        logps = torch.zeros(len(groups), groups.K)
        with tqdm(total=len(ids), desc=f'reference {groups.split}', unit='pair', disable=None if rank == 0 else True) as bar:
            for some in np.array_split(ids, math.ceil(len(ids) / 1024)):
                rows = plan_rows(some, groups.lengths[some], world, row_tokens)[rank]
                for batch in packed_batches(groups, rows, device):
                    with autocast:
                        mine = response_logps(ref_net, ref_head, batch, packed_mask(batch.group, batch.part, batch.cuts))
                    logps[batch.ids] = mine.cpu()
                bar.update(len(some))
        return reduced(logps)

    if cfg.precompute_ref:
        cached = {}
        for groups in (train, val):
            path = os.path.join('out', cfg.name, f'reference-{groups.split}.npz')      # outlives this run
            key = f'{groups.fingerprint} {ref_fingerprint} {"bfloat16" if bf16 else "float32"}'
            few = np.arange(min(16, len(groups)))
            live = all_reference_logps(groups, few)[few]
            logps = torch.zeros(len(groups), groups.K)
            why = read_reference(path, key, logps, live, bf16) if rank == 0 else ''
            verdict = reduced(torch.tensor([len(why)]))         # rank 0 alone reads; all must agree on what follows
            if verdict.item():
                say(f'reference log-probs of {groups.split}: {why}, computing them')
                logps = all_reference_logps(groups, np.arange(len(groups)))
                agree(write_reference(path, key, logps) if rank == 0 else '')
            else:
                logps = reduced(logps)
                say(f'reference log-probs of {groups.split}: from {path}, equal to live ones')
            cached[groups.split] = logps
        ref_net = ref_head = reference = None

    @torch.no_grad()
    def kto_z(groups, ids):
        """beta max(0, mean of log pi - log ref) over mismatched prompts and responses of the groups `ids`, the whole global
        batch: a scalar, the same on all ranks. An estimate of KL(pi, ref), biased but steady (arXiv 2402.01306)."""
        total, others = torch.zeros((), dtype=exact, device=device), mismatched(groups, ids)
        if others is None:
            return total.float()
        rows = plan_rows(np.arange(len(others.lengths)), others.lengths, world, max(row_tokens, int(others.lengths.max())))[rank]
        for batch in packed_batches(others, rows, device):
            with autocast:
                mask = packed_mask(batch.group, batch.part, batch.cuts)
                total += (response_logps(net, policy.wte.weight, batch, mask) - response_logps(ref_net, ref_head, batch, mask)).sum()
        return (cfg.beta * reduced(total) / (len(others.lengths) * others.K)).clamp(min=0).float()

    # -------------------------------------------------------------------------
    # evaluation: all of val, each pair once, sums over ranks

    kl_prompts = distinct_prompts(val, cfg.kl_prompts, cfg.seed) if cfg.kl_prompts and ref_net is not None else []

    @torch.no_grad()
    def estimate_kl():
        """KL(policy || reference) of whole responses, in nats: the mean of log pi - log ref over one response of the policy to
        each of kl_prompts, and its standard error. The draws have seeds of their own, the same ones every time, whoever
        draws them."""
        size, n, room = 16, len(kl_prompts), val.meta['max_length']
        sums = torch.zeros(2, dtype=exact, device=device)           # of the ratios, and of their squares
        for j in range(rank, math.ceil(n / size), world):
            prompts = kl_prompts[j * size:(j + 1) * size]
            with autocast:
                drawn = policy.generate(prompts, room - min(map(len, prompts)), val.meta['eot_token'], val.meta['vocab_size'],
                                        seed=cfg.seed * 1_000_003 + j)
            made = Sampled([[prompt, ids[:room - len(prompt)]] for prompt, ids in zip(prompts, drawn)])
            rows = plan_rows(np.arange(len(prompts)), made.lengths, 1, max(row_tokens, int(made.lengths.max())))[0]
            for batch in packed_batches(made, rows, device):
                with autocast:
                    mask = packed_mask(batch.group, batch.part, batch.cuts)
                    ratios = (response_logps(net, policy.wte.weight, batch, mask) - response_logps(ref_net, ref_head, batch, mask)).to(exact)
                sums += torch.stack([ratios.sum(), ratios.square().sum()])
        mean, square = (reduced(sums) / n).tolist()
        return {'kl': mean} | ({'kl_error': math.sqrt(max(0, square - mean ** 2) / (n - 1))} if n > 1 else {})

    @torch.no_grad()
    def evaluate():
        policy.eval()
        sums = torch.zeros(2, len(STATS), dtype=exact, device=device)
        z = kto_z(val, np.arange(len(val))) if cfg.loss == 'kto' else None
        for batch in packed_batches(val, plan_rows(np.arange(len(val)), val.lengths, world, row_tokens)[rank], device):
            with autocast:
                mask = packed_mask(batch.group, batch.part, batch.cuts)
                logps = response_logps(net, policy.wte.weight, batch, mask)                 # (G, K)
                ref_logps = reference_logps(val, batch, mask)
            sums += batch_stats(*losses_and_rewards(cfg, logps, ref_logps, batch.lengths, batch.labels, z), logps, batch.labels, z)
        found = means(reduced(sums)) | (estimate_kl() if kl_prompts else {})
        policy.train()
        return found

    # -------------------------------------------------------------------------
    # the loop

    say(f'{len(train):,} {kind} to train on, {len(val):,} to validate on; {total_steps:,} steps of {cfg.batch_size}, '
        f'{steps_per_epoch:,} an epoch; rows of at most {row_tokens:,} tokens\npolicy from {init_from}, '
        + (f'reference {"the same" if not cfg.ref_from else "from " + cfg.ref_from}' if needs_reference else 'no reference')
        + f': {policy.num_params():,} parameters' + ' each' * needs_reference)
    if cfg.loss == 'kto':
        say(kto_balance(train, cfg.desirable_weight, cfg.undesirable_weight))
    policy.train()
    step, stopped_by_any = start_step, 0
    if start_step == 0:
        log(0, evaluate(), 'eval/')
    stream = packed_batches(train, (row for step in range(start_step + 1, total_steps + 1) for row in plan(step)[1]), device)
    sums, tokens, pairs, computed, flops, elapsed = torch.zeros(2, len(STATS), dtype=exact, device=device), 0, 0, 0, 0, 0.0
    passes = 3 + (needs_reference and not cached) + 2 * (cfg.loss == 'kto')       # forward, backward twice that, reference, z
    unread = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    bar = tqdm(range(start_step + 1, total_steps + 1), initial=start_step, total=total_steps, desc=stage, unit='step',
               disable=None if rank == 0 else True)
    began = time.perf_counter()
    for step in bar:
        torch.manual_seed(((cfg.seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)     # dropout's: resuming needs the step alone
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step)
        ids, rows = plan(step)
        micros, z = [], kto_z(train, ids) if cfg.loss == 'kto' else None
        for j, batch in zip(range(len(rows)), stream):
            if world > 1:
                ddp.require_backward_grad_sync = j == len(rows) - 1        # once a step
            with autocast:
                mask = packed_mask(batch.group, batch.part, batch.cuts)                      # one for policy and reference
                with torch.no_grad():
                    ref_logps = reference_logps(train, batch, mask)                          # (G, K)
                logps = response_logps(ddp, policy.wte.weight, batch, mask)                  # (G, K)
            losses, rewards = losses_and_rewards(cfg, logps, ref_logps, batch.lengths, batch.labels, z)
            loss = losses.sum() / len(ids)                  # of the whole step, on all ranks
            (loss * world).backward()                       # DDP takes the mean over ranks
            sums += batch_stats(losses, rewards, logps, batch.labels, z)
            computed += batch.tokens.numel()
            micros.append((batch.ids, losses.detach()))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=world == 1)     # DDP's gradients stay views of its buckets: no copies beside them
        unread.append((step, norm, micros))
        tokens, pairs = tokens + int(train.lengths[ids].sum()), pairs + len(ids)
        flops += train.forward_flops(ids, policy.config) * passes

        signalled = stopped_by.clone()
        if world > 1:
            dist.all_reduce(signalled, dist.ReduceOp.MAX)           # all ranks leave, or none
        stopped_by_any = signalled.item()
        leaving = step == total_steps or stopped_by_any > 0
        eval_now = not stopped_by_any and (step == total_steps or cfg.eval_interval and step % cfg.eval_interval == 0)
        save_now = leaving or cfg.save_interval and step % cfg.save_interval == 0
        log_now = step == 1 or step % cfg.log_interval == 0 or save_now      # what comes after a checkpoint is summed up apart
        if not (log_now or eval_now or save_now):
            continue                                                # and never wait for the GPU
        stop_if_not_finite(unread)
        unread = []
        elapsed += time.perf_counter() - began
        if log_now:
            record = dict(means(reduced(sums)), grad_norm=norm.item(), lr=learning_rate(step),
                          tokens_per_second=tokens / elapsed, pairs_per_second=pairs / elapsed,
                          padding=1 - tokens / reduced(torch.tensor([computed])).item())
            if device_type == 'cuda':
                record['memory_gb'] = torch.cuda.max_memory_allocated(device) / 1e9
            if peak_flops(device):
                record['mfu'] = flops / elapsed / world / peak_flops(device)
            log(step, record)
            sums, tokens, pairs, computed, flops, elapsed = torch.zeros_like(sums), 0, 0, 0, 0, 0.0
        if eval_now:
            log(step, evaluate(), 'eval/')
        if save_now:
            save(step)
        began = time.perf_counter()
        if leaving:
            break
    bar.close()
    if tracker is not None:
        tracker.finish() if cfg.track == 'wandb' else tracker.close()
    if cfg.save_pretrained and not stopped_by_any:
        error = ''
        try:
            if rank == 0:
                policy.save_pretrained(cfg.save_pretrained, data_dir)
        except (OSError, CheckpointError, UserError) as problem:
            error = (f'cannot export to {cfg.save_pretrained}: {problem}; the checkpoints are untouched, and '
                     f'python model.py {out_dir} {cfg.save_pretrained} exports them')
        agree(error)
        say(f'exported to {cfg.save_pretrained}')
    if world > 1:
        del ddp             # before the process group, or its reducer ends it holding the GIL that gloo's threads wait for
        gc.collect()
        dist.destroy_process_group()
    if stopped_by_any:
        say(f'stopped by signal {stopped_by_any}, saved at step {step}: --resume goes on from there')
        raise SystemExit(128 + stopped_by_any)
    say(f'done: {out_dir}')


def kto_balance(groups, desirable_weight, undesirable_weight):
    """A line on how many examples are desirable, and, where they are uneven, the weights that arXiv 2402.01306 recommends:
    desirable_weight * desirable from 1 to 4/3 times undesirable_weight * undesirable."""
    good = len(groups) if groups.labels is None else int(groups.labels.sum())
    bad = len(groups) if groups.labels is None else len(groups) - good
    line = f'{good:,} desirable and {bad:,} undesirable examples'
    if not good or not bad:
        return f'note: {line}: kto learns from the contrast of both'
    ratio = desirable_weight * good / (undesirable_weight * bad) if undesirable_weight else math.inf
    if 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9:
        return f'{line}; weighted {ratio:.2f} to 1, recommended are 1 to 1.33'
    if good >= bad:
        advice = f'--desirable_weight=1 --undesirable_weight={0.75 * good / bad:.3g} to {good / bad:.3g}'
    else:
        advice = f'--undesirable_weight=1 --desirable_weight={bad / good:.3g} to {4 / 3 * bad / good:.3g}'
    return f'note: {line}; weighted {ratio:.2f} to 1, recommended are 1 to 1.33: {advice}'


# -----------------------------------------------------------------------------
# the reference's log-probs on disk

def read_reference(path, key, logps, live, bf16):
    """Fill logps (N, 2) from the cache at `path`. -> '' where it is good, else why it is not.

    key: of data, weights and type. live: (n, 2), fresh log-probs of the first n pairs, which the cached ones must
    equal: packed beside other pairs they round differently, within 1e-4 of their size in float32, 2e-2 in bfloat16.
    """
    try:
        with np.load(path) as file:
            if str(file['key']) != key:
                return 'the cache is of other data or weights'
            cached = torch.from_numpy(file['logps'])
    except FileNotFoundError:
        return 'none cached'
    except Exception as error:      # whatever a damaged file makes of numpy
        return f'the cache is damaged ({type(error).__name__})'
    if cached.shape != logps.shape or not torch.allclose(cached[:len(live)], live, rtol=2e-2 if bf16 else 1e-4, atol=1e-3):
        return 'the cache does not equal live values'
    logps.copy_(cached)
    return ''


def write_reference(path, key, logps):
    """Cache the reference's log-probs; written aside and renamed. -> '' or what went wrong"""
    try:
        with open(path + '.tmp', 'wb') as file:
            np.savez(file, key=np.array(key), logps=logps.numpy())
        os.replace(path + '.tmp', path)
        return ''
    except OSError as error:
        return f'cannot write {path}: {error.strerror}'
    finally:
        if os.path.exists(path + '.tmp'):
            os.remove(path + '.tmp')


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # until there is something to save, Ctrl-C just ends it
    main()
