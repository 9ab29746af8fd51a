"""What a training stage needs around its loop: processes, device, log, checkpoints, signals. Nothing here knows a loss.

    run = Run(cfg, 'dpo')                       # one process, or one a GPU under torchrun
    start = run.resume(policy, optimizer, ...)  # the step to go on after, 0 for a new run
    run.open_log(start)
    for step ... :
        if run.stopping(): ...                  # SIGTERM or Ctrl-C, on all ranks together
        run.log(step, record); run.save(step)
    run.close()

What only rank 0 does (writing) goes through run.on_first, so that its error ends all ranks with one line.
"""
import copy
import gc
import json
import math
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
from config import UserError, need
from nanodpo import checkpoint
from nanodpo.launch import join, ranks

COLUMNS = {'loss': 'loss {:.4f}', 'rewards/accuracies': 'acc {:.3f}', 'rewards/margins': 'margin {:+.4f}',
           'rewards/chosen': 'chosen {:+.4f}', 'rewards/rejected': 'rejected {:+.4f}', 'kl': 'kl {:.2f}',
           'perplexity': 'ppl {:.2f}', 'grad_norm': 'grad {:.2f}', 'lr': 'lr {:.2e}',
           'tokens_per_second': '{:,.0f} tok/s', 'mfu': 'mfu {:.1%}', 'memory_gb': '{:.1f} GB'}


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> 'cpu', 'cuda' or 'mps'."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    available = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    need(available[name], f'device={name} is not available here: --device=cpu')
    return name


def pick_autocast(dtype, device_type):
    """The context in which matmuls run, and whether it is bfloat16."""
    bf16 = dtype == 'bfloat16' or dtype == 'auto' and device_type == 'cuda' and torch.cuda.is_bf16_supported()
    return (torch.autocast(device_type, torch.bfloat16) if bf16 else nullcontext()), bf16


def learning_rate(cfg, step, total_steps):
    """Of optimizer step `step`, the first being 1: linear warm-up, then the schedule."""
    if step <= cfg.warmup_steps:
        return cfg.learning_rate * step / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, total_steps + 1 - cfg.warmup_steps)       # in (0, 1)
    if cfg.schedule == 'linear':
        return cfg.learning_rate * (1 - done)
    return cfg.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done) if cfg.schedule == 'cosine' else 1)


class Worker:
    """One process: its device, the type of its matmuls, and its place among `world` ranks that share the work."""
    def __init__(self, device='auto', dtype='auto', world=1, rank=0, local_rank=0):
        self.world = world
        self.rank = rank
        device_type = pick_device(device)
        self.device = torch.device(device_type)
        if device_type == 'cuda':
            self.device = torch.device(device_type, local_rank)
            torch.cuda.set_device(self.device)
        self.autocast, self.bf16 = pick_autocast(dtype, device_type)
        self.exact = torch.float32 if device_type == 'mps' else torch.float64       # of sums; MPS has no other

    def sum(self, tensor):
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def alone(self):
        """The same process as one of its own, for work that is not shared out."""
        other = copy.copy(self)
        other.world = 1
        other.rank = 0
        return other


class Run(Worker):
    def __init__(self, cfg, stage):
        self.cfg = cfg
        self.stage = stage
        self.data_dir = os.path.join('data', cfg.name)
        self.out_dir = os.path.join('out', cfg.name, stage)
        device_type = pick_device(cfg.device)
        super().__init__(cfg.device, cfg.dtype, *ranks(device_type))
        need(cfg.batch_size >= self.world, f'batch_size={cfg.batch_size} is smaller than the {self.world} '
             'processes that share it')
        self.launch, self.restarted = join(self.world, self.rank, device_type, cfg.join_timeout)
        self.stopped_by = torch.zeros(1, dtype=torch.int32)     # a signal's number; on the CPU: asking costs no sync

    # ------------------------------------------------------------------------------------------------
    # all ranks together

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def on_first(self, function, what):
        """Call function() on rank 0; where that fails, all ranks end with one line that begins with `what`."""
        error, result = '', None
        if self.rank == 0:
            try:
                result = function()
            except (OSError, ImportError, ValueError, UserError) as problem:
                error = f'{what}: {getattr(problem, "strerror", None) or problem}'
        told = [error]
        if self.world > 1:
            dist.broadcast_object_list(told)
        need(not told[0], told[0])
        return result

    def check_alike(self, facts):
        """End the run where a rank has other facts than rank 0: {what: value}."""
        if self.world == 1:
            return
        everyone = [None] * self.world
        dist.all_gather_object(everyone, facts)
        for rank, theirs in enumerate(everyone):
            for what, value in theirs.items():
                need(value == everyone[0][what], f'rank {rank} has another {what} than rank 0 ({value!r}, not '
                     f'{everyone[0][what]!r}): all nodes need the same command, data/ and out/')

    # ------------------------------------------------------------------------------------------------
    # the model

    def wrap(self, model):
        """-> (compiled, the same under DDP)"""
        net = torch.compile(model, dynamic=True) if self.cfg.compile else model         # rows vary in length
        if self.world == 1:
            return net, net
        devices = [self.device.index] if self.device.type == 'cuda' else None
        return net, DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)

    def freeze(self, model):
        """A reference, compiled; in bfloat16 where autocast would cast its matrices at every call: half the memory."""
        if self.bf16:
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.bfloat16()
        return torch.compile(model, dynamic=True) if self.cfg.compile else model

    def bar(self, steps, start, total):
        return tqdm(steps, self.stage, total=total, initial=start, unit='step', disable=None if self.rank == 0 else True)

    def resume(self, policy, optimizer, **origin):
        """Load the last checkpoint, if asked to or restarted by torchrun, into both. -> its step, 0 for none.

        origin: what must not have changed since, {what: fingerprint}; it is saved with every checkpoint.
        """
        self.policy, self.optimizer = policy, optimizer
        self.origin = origin | {key: getattr(self.cfg, key) for key in ('batch_size', 'seed', 'optimizer')}
        step, saved, path = 0, None, ''
        if self.cfg.resume or self.restarted:
            saved, path = checkpoint.read_last(self.out_dir, self.say)
        if saved and not self.cfg.resume and saved['launch'] != self.launch:
            saved = None                # an earlier run's: this launch was restarted before it saved
        if saved:
            for what, now in self.origin.items():
                need(saved['origin'].get(what) == now, f'cannot resume {path}: {what} changed since '
                     f'({saved["origin"].get(what)} then, {now} now)')
            policy.load_state_dict(saved['model'])
            optimizer.load_state_dict(saved['optimizer'])
            step = saved['step']
            then = saved['config']
            changed = [f'{k} {then.get(k)!r} -> {v!r}' for k, v in asdict(self.cfg).items()
                       if k != 'resume' and then.get(k) != v]
            self.say(f'resuming from {path}' + (f', with {", ".join(changed)}' if changed else ''))
        elif self.cfg.resume or self.restarted:
            self.say(f'nothing to resume in {self.out_dir}: starting at step 0')
        self.check_alike(asdict(self.cfg) | self.origin | {'step to start from': step})
        return step

    # ------------------------------------------------------------------------------------------------
    # log and checkpoints

    def open_log(self, start_step, total_steps):
        self.total_steps = total_steps
        self.say(f'{self.stage}, {self.world} process{"es" * (self.world > 1)} on {self.device.type}:\n'
                 f'{config.show(self.cfg)}')
        if self.bf16 and self.device.type == 'cpu':
            self.say('note: bfloat16 is slow on most CPUs: --dtype=float32')
        if self.cfg.warmup_steps >= total_steps:
            self.say(f'note: the run of {total_steps:,} steps ends within its warm-up of {self.cfg.warmup_steps:,}')
        self.wandb = self.on_first(self._open_wandb, 'track=wandb') if self.cfg.track else None
        self.log_file = self.on_first(lambda: checkpoint.open_run(self.out_dir, start_step),
                                      f'cannot write to {self.out_dir}')
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _open_wandb(self):
        import wandb
        os.makedirs(f'out/{self.cfg.name}', exist_ok=True)
        return wandb.init(project='nanodpo', name=f'{self.cfg.name}-{self.stage}', config=asdict(self.cfg),
                          dir=f'out/{self.cfg.name}')

    def log(self, step, record, prefix=''):
        """One aligned line to the terminal, one JSON line to log.jsonl."""
        label = f'{prefix.strip("/") or "step":5}{step:>7,}/{self.total_steps:,}'
        self.say(' | '.join([label] + [text.format(record[key]) for key, text in COLUMNS.items() if key in record]))
        record = {prefix + key: value for key, value in record.items()}

        def write():
            self.log_file.write(json.dumps({'step': step, **record}) + '\n')
            if self.wandb:
                self.wandb.log(record, step=step)
        self.on_first(write, f'cannot write the log to {self.out_dir}')

    def save(self, step, **facts):
        state = dict(stage=self.stage, config=asdict(self.cfg), optimizer=self.optimizer.state_dict(),
                     origin=self.origin, launch=self.launch, **facts)
        self.on_first(lambda: checkpoint.save(self.out_dir, step, self.policy, state),
                      f'cannot save step {step} to {self.out_dir}, the checkpoints before it are untouched')

    # ------------------------------------------------------------------------------------------------
    # stopping

    def _on_signal(self, number, frame):
        self.stopped_by[0] = number
        self.say(f'signal {number}: finishing this step, then saving')
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # a second Ctrl-C stops at once

    def stopping(self):
        """The signal that any rank got, 0 for none: all ranks leave together."""
        signalled = self.stopped_by.clone()
        if self.world > 1:
            dist.all_reduce(signalled, dist.ReduceOp.MAX)
        return signalled.item()

    def check_finite(self, unread):
        """End the run where a step was not finite, naming the groups whose own loss is not.

        unread: of each step since the last look its number, gradient norm and micro-steps' (ids, losses).
        """
        finite = torch.stack([norm for _, norm, _ in unread]).isfinite().tolist()       # the wait for the GPU
        if all(finite):
            return
        step, _, micros = unread[finite.index(False)]
        bad = [i for ids, losses in micros for i, ok in zip(ids, losses.isfinite().tolist()) if not ok]
        gathered = [bad]
        if self.world > 1:
            gathered = [None] * self.world
            dist.all_gather_object(gathered, bad)
        raise UserError(f'step {step}: the loss or its gradient is not finite; groups of {self.data_dir}: '
                        f'{sorted(i for some in gathered for i in some)}; nothing since is saved: lower the '
                        'learning rate, or look at these groups')

    def close(self, step, stopped_by):
        if self.wandb:
            self.wandb.finish()
        if self.world > 1:
            gc.collect()        # the DDP wrapper goes before the process group, whose threads it would wait for
            dist.destroy_process_group()
        if stopped_by:
            self.say(f'stopped by signal {stopped_by}, saved at step {step}: --resume goes on from there')
            raise SystemExit(128 + stopped_by)
        self.say(f'done: {self.out_dir}')


class Meter:
    """Tokens, FLOPs and seconds since the last log line. passes: over the tokens, of a forward pass each."""
    def __init__(self, run, groups, model_config, passes):
        self.run, self.groups, self.model_config, self.passes = run, groups, model_config, passes
        self.reset()

    def reset(self):
        self.tokens = self.pairs = self.computed = self.flops = self.seconds = 0
        self.go()

    def go(self):
        self.began = time.perf_counter()

    def stop(self):
        """What comes now, an evaluation or a checkpoint, is not counted."""
        self.seconds += time.perf_counter() - self.began

    def step(self, ids):
        self.tokens, self.pairs = self.tokens + int(self.groups.lengths[ids].sum()), self.pairs + len(ids)
        self.flops += self.groups.forward_flops(ids, self.model_config) * self.passes

    def read(self):
        """{name: value} for the log, and begin again."""
        device, computed = self.run.device, self.run.sum(torch.tensor([self.computed])).item()
        found = dict(tokens_per_second=self.tokens / self.seconds, pairs_per_second=self.pairs / self.seconds,
                     padding=1 - self.tokens / computed)
        if device.type == 'cuda':
            found['memory_gb'] = torch.cuda.max_memory_allocated(device) / 1e9
        if peak := peak_flops(device):
            found['mfu'] = self.flops / self.seconds / self.run.world / peak
        self.reset()
        return found


def peak_flops(device):
    """The device's dense bfloat16 peak by its data sheet, FLOP/s; 0 where it is not known."""
    if device.type != 'cuda':
        return 0
    peaks = {'H200': 989e12, 'H100': 989e12, 'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12, 'RTX 4090': 165e12}
    return next((peak for key, peak in peaks.items() if key in torch.cuda.get_device_name(device)), 0)
