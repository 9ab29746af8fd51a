"""Supervised fine-tuning, or pretraining from scratch: next-token prediction on response tokens.

    python sft.py config/reviews.py                                 # a laptop: from scratch, on documents
    torchrun --standalone --nproc_per_node=8 sft.py config/hh.py    # eight GPUs: GPT-2 on the chosen responses
    python sft.py config/hh.py --resume                             # go on where a run was stopped

Reads data/<name>/ (prepare_prefs.py); writes checkpoints and log.jsonl to out/<name>/sft, where dpo.py finds its
policy and reference. A document's prompt is one end token, so that every token of the text is scored; of a pair
only the chosen response is, of a ranking the best, of unpaired examples the desirable ones. The loss is per target
token of the whole batch, over all ranks and micro-steps.
"""
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
from config import In, Literal, UserError
from launch import check_alike, join, name_lost_ranks, read_ranks
from model import (GPT, CheckpointError, GPTConfig, export_error, find_checkpoints, fingerprint, load_model, open_run,
                   packed_mask, peak_flops, read_checkpoint, save_checkpoint, token_logps)
from prepare_prefs import Groups, packed_batches, plan_rows, row_limit, step_groups


# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: reads data/<name>, writes out/<name>/sft
    init_from: str = 'gpt2'                         # scratch, a GPT-2 name on the hub, a directory in its layout, or a
                                                    # folder or .pt of ours
    train_on: Literal['chosen', 'documents'] = 'chosen'  # the chosen (best, desirable) responses, or prepare's documents
    n_layer: In[int, 'x >= 1'] = 4                  # of a model from scratch, as the next three
    n_head: In[int, 'x >= 1'] = 4
    n_embd: In[int, 'x >= 1'] = 128
    block_size: In[int, 'x >= 0'] = 0               # positions; 0 = the data's max_length
    dropout: In[float, '0 <= x < 1'] = 0.0          # on embeddings and residual branches
    batch_size: In[int, 'x >= 1'] = 64              # groups an optimizer step, over all ranks and micro-steps
    epochs: In[int, 'x >= 1'] = 1                   # passes over the data
    max_steps: In[int, 'x >= 0'] = 0                # stop after so many optimizer steps; 0 = by epochs
    optimizer: Literal['rmsprop', 'adamw'] = 'adamw'    # rmsprop keeps one state a weight, not two
    learning_rate: In[float, 'x > 0'] = 1e-5        # 1e-5 for GPT-2's weights, 1e-3 for a small model from scratch
    schedule: Literal['constant', 'linear', 'cosine'] = 'cosine'    # after warm-up; linear and cosine go to 0
    warmup_steps: In[int, 'x >= 0'] = 150           # linear, from 0
    weight_decay: In[float, 'x >= 0'] = 0.0         # on matrices only
    grad_clip: In[float, 'x >= 0'] = 1.0            # largest global gradient norm; 0 = no clipping
    activation_checkpointing: bool = False          # less memory for a quarter more time
    row_tokens: In[int, 'x >= 0'] = 0               # tokens a micro-step at most: speed and memory, not results; 0 =
                                                    # 8192 on CUDA, 2048 elsewhere, more where a group is longer
    eval_interval: In[int, 'x >= 0'] = 100          # steps between evaluations on all of val; 0 = first and last only
    log_interval: In[int, 'x >= 1'] = 10            # steps a log line sums up
    save_interval: In[int, 'x >= 0'] = 500          # steps between checkpoints; the last step always has one
    track: Literal['', 'wandb', 'tensorboard'] = '' # also log there
    save_pretrained: str = ''                       # a directory that gets the trained model in the Hugging Face layout, with
                                                    # tokenizer and turn template; python model.py does the same later
    seed: In[int, '0 <= x < 2**32'] = 1337                  # of the order of groups, and of weights from scratch
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'  # auto = cuda where there is one, else cpu
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the matmuls; weights stay float32; auto = bfloat16 on cuda
    compile: bool = torch.cuda.is_available()       # torch.compile the model: minutes once, then faster
    join_timeout: In[int, 'x >= 1'] = 120           # seconds to wait at the start for the other processes, of several
    resume: bool = False                            # go on from the last checkpoint of out/<name>/sft, if there is one


def target_logps(model, head, batch):
    """log p of every scored token, (S,) float32, nats. head: (V, C), the tied weight."""
    mask = packed_mask(batch.group, batch.part, batch.cuts)
    states = model(batch.tokens, batch.positions, mask, batch.predictor)        # (S, C), of the scored tokens alone
    return token_logps(states, head, batch.target)[:len(batch.response)]


def main(argv=None):
    cfg = config.load(Config, 'sft', argv)
    stage = 'sft'

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
    split = 'documents_' if cfg.train_on == 'documents' else ''
    train, val = Groups(data_dir, f'{split}train', k=1), Groups(data_dir, f'{split}val', k=1)
    if cfg.save_pretrained:             # what cannot be written is refused before training
        agree(export_error(cfg.save_pretrained, data_dir, keep=(cfg.init_from, out_dir)) if rank == 0 else '')
    row_tokens = row_limit([train, val], cfg.row_tokens, device_type)
    steps_per_epoch = math.ceil(len(train) / cfg.batch_size)
    total_steps = cfg.max_steps or cfg.epochs * steps_per_epoch
    exact = torch.float64 if device_type != 'mps' else torch.float32    # of sums; MPS has no other

    def plan(step):
        """The groups of optimizer step `step`, the first being 1, and the rows of them that are this rank's."""
        ids = step_groups(len(train), cfg.batch_size, step - 1, cfg.seed)
        return ids, plan_rows(ids, train.lengths[ids], world, row_tokens)[rank]

    # -------------------------------------------------------------------------
    # model

    try:
        if cfg.init_from == 'scratch':
            torch.manual_seed(cfg.seed)
            policy, record = GPT(GPTConfig(
                cfg.block_size or train.meta['max_length'], train.meta['vocab_size'], cfg.n_layer, cfg.n_head, cfg.n_embd,
                cfg.dropout, activation_checkpointing=cfg.activation_checkpointing)), {}
        else:
            policy, record = load_model(cfg.init_from, dropout=cfg.dropout,
                                        activation_checkpointing=cfg.activation_checkpointing)
    except CheckpointError as error:
        raise UserError(error) from None
    init_from = cfg.init_from
    train.check_model(policy.config, record.get('vocabulary'), init_from)
    policy.to(device)
    init_fingerprint = fingerprint(policy)

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
    # evaluation: all of val, each group once, sums over ranks

    @torch.no_grad()
    def evaluate():
        policy.eval()
        total, ids = torch.zeros(1, dtype=exact, device=device), np.arange(len(val))
        for batch in packed_batches(val, plan_rows(ids, val.lengths, world, row_tokens)[rank], device):
            with autocast:
                total -= target_logps(net, policy.wte.weight, batch).sum()
        policy.train()
        loss = reduced(total).item() / val.response_tokens(ids)
        return dict(loss=loss, perplexity=math.exp(min(loss, 700)))

    # -------------------------------------------------------------------------
    # the loop

    say(f'{len(train):,} {cfg.train_on} to train on, {len(val):,} to validate on; {total_steps:,} steps of {cfg.batch_size}, '
        f'{steps_per_epoch:,} an epoch; rows of at most {row_tokens:,} tokens\n'
        f'model from {init_from}: {policy.num_params():,} parameters')
    policy.train()
    step, stopped_by_any = start_step, 0
    if start_step == 0:
        log(0, evaluate(), 'eval/')
    stream = packed_batches(train, (row for step in range(start_step + 1, total_steps + 1) for row in plan(step)[1]), device)
    sums, tokens, targets, computed, flops, elapsed = torch.zeros(1, dtype=exact, device=device), 0, 0, 0, 0, 0.0
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
        micros = []
        for j, batch in zip(range(len(rows)), stream):
            if world > 1:
                ddp.require_backward_grad_sync = j == len(rows) - 1        # once a step
            with autocast:
                logps = target_logps(ddp, policy.wte.weight, batch)     # (S,)
            loss = -logps.sum() / train.response_tokens(ids)        # of the whole step, on all ranks
            (loss * world).backward()                       # DDP takes the mean over ranks
            sums -= logps.detach().sum()
            computed += batch.tokens.numel()
            micros.append((batch.ids, loss.detach().expand(len(batch.ids))))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=world == 1)     # DDP's gradients stay views of its buckets: no copies beside them
        unread.append((step, norm, micros))
        tokens, targets = tokens + int(train.lengths[ids].sum()), targets + train.response_tokens(ids)
        flops += train.forward_flops(ids, policy.config) * 3       # forward, and backward twice that

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
            record = dict(loss=reduced(sums).item() / targets, grad_norm=norm.item(), lr=learning_rate(step),
                          tokens_per_second=tokens / elapsed, padding=1 - tokens / reduced(torch.tensor([computed])).item())
            if device_type == 'cuda':
                record['memory_gb'] = torch.cuda.max_memory_allocated(device) / 1e9
            if peak_flops(device):
                record['mfu'] = flops / elapsed / world / peak_flops(device)
            log(step, record)
            sums, tokens, targets, computed, flops, elapsed = torch.zeros_like(sums), 0, 0, 0, 0, 0.0
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


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # until there is something to save, Ctrl-C just ends it
    main()
