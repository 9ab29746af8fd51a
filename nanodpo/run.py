"""What a training stage needs around its loop: processes, device, log, checkpoints, signals; and no loss.

    run = Run(cfg, 'dpo')                               # one process, or one a GPU under torchrun
    start = run.resume(policy, optimizer, train, val)   # the step to go on after, 0 for a new run
    run.open_log(start, total_steps)
    for step, ids, micros in run.bar(steps):
        run.log(step, record)
        run.save(step)
        if run.stopping(): ...                          # SIGTERM or Ctrl-C, on all ranks together
    run.close()

Only rank 0 writes. It does so through run.on_first, so that its error ends all ranks with one line.
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
import torch._dynamo
import torch._inductor.config
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
from config import UserError, need
from nanodpo import checkpoint
from nanodpo.launch import join, ranks

ORIGIN = dict(data='training data', init='initial weights', reference='reference')
COLUMNS = {'loss': 'loss {:.4f}', 'rewards/accuracies': 'acc {:.3f}', 'rewards/margins': 'margin {:+.4f}',
           'rewards/chosen': 'chosen {:+.4f}', 'rewards/rejected': 'rejected {:+.4f}', 'kl': 'kl {:.2f}',
           'perplexity': 'ppl {:.2f}', 'grad_norm': 'grad {:.2f}', 'lr': 'lr {:.2e}',
           'tokens_per_second': '{:,.0f} tok/s', 'mfu': 'mfu {:.1%}', 'memory_gb': '{:.1f} GB'}


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> the type of the device, 'cpu', 'cuda' or 'mps'."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    available = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    need(available[name], f'device={name} is not available here: --device=cpu')
    return name


def pick_autocast(dtype, device_type):
    """The context in which matmuls run, and whether it is bfloat16, which old GPUs only emulate."""
    bf16 = dtype == 'bfloat16'
    if dtype == 'auto' and device_type == 'cuda':
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return (torch.autocast(device_type, torch.bfloat16) if bf16 else nullcontext()), bf16


def compile_blocks(model):
    """Compile every Block of a GPT in place, for rows of any length. All blocks share what is compiled.

    A whole model of 48 layers would take minutes. The head compiles two functions of its own, `generate` none.
    """
    torch._dynamo.config.recompile_limit = 64       # for each of policy, reference, evaluation, last block: 8 is few
    torch._dynamo.config.optimize_ddp = False       # DDP would split a block's graph at every 25 MB of gradients
    triton = torch._inductor.config.triton
    if hasattr(triton, 'mix_order_reduction_non_strict_mode'):      # from torch 2.10 on
        triton.mix_order_reduction_non_strict_mode = True           # else rows of other lengths get other kernels
    for block in model.h:
        block.compile(dynamic=True)


def learning_rate(cfg, step, total_steps):
    """The rate of optimizer step `step`, the first being 1: linear warm-up, then the schedule."""
    if step <= cfg.warmup_steps:
        return cfg.learning_rate * step / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, total_steps + 1 - cfg.warmup_steps)       # in (0, 1)
    if cfg.schedule == 'linear':
        return cfg.learning_rate * (1 - done)
    if cfg.schedule == 'cosine':
        return cfg.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done))
    return cfg.learning_rate


class Worker:
    """One process: its device, the type of its matmuls, its place among `world` ranks that share the work."""
    def __init__(self, device='auto', dtype='auto', world=1, rank=0, local_rank=0):
        self.world = world
        self.rank = rank
        device_type = pick_device(device)
        self.device = torch.device(device_type)
        if device_type == 'cuda':       # with its index: threads ask for it
            self.device = torch.device(device_type, local_rank)
            torch.cuda.set_device(self.device)
        self.autocast, self.bf16 = pick_autocast(dtype, device_type)
        self.exact = torch.float32 if device_type == 'mps' else torch.float64   # of sums; MPS has no float64

    def sum(self, tensor):
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def alone(self):
        """The same process as a world of its own, for work that ranks do not share."""
        other = copy.copy(self)
        other.world = 1
        other.rank = 0
        return other


class Run(Worker):
    """A Worker that trains one stage: it has the stage's folder, log, checkpoints and signals."""
    def __init__(self, cfg, stage):
        self.cfg = cfg
        self.stage = stage
        self.data_dir = os.path.join('data', cfg.name)
        self.out_dir = os.path.join('out', cfg.name, stage)
        device_type = pick_device(cfg.device)
        super().__init__(cfg.device, cfg.dtype, *ranks(device_type))
        self.compile = self.device.type == 'cuda' if cfg.compile is None else cfg.compile
        need(cfg.batch_size >= self.world,
             f'batch_size={cfg.batch_size} is smaller than the {self.world} processes that share it')
        self.launch, self.restarted = join(self.world, self.rank, device_type, cfg.join_timeout)
        self.own_signal = torch.zeros(1, dtype=torch.int32)     # on the CPU: asking for it never waits for a GPU
        self.signalled = 0                                      # the signal of any rank

    # ------------------------------------------------------------------------------------------------
    # all ranks together

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def on_first(self, function, what):
        """Call function() on rank 0 alone. -> its result there, None elsewhere.

        If it fails, all ranks end with one line: a UserError's own, or `what` and the reason that the disk gave.
        """
        result, error = None, ''
        if self.rank == 0:
            try:
                result = function()
            except UserError as problem:
                error = problem.message
            except OSError as problem:
                error = f'{what}: {problem.strerror or problem}'
        told = [error]
        if self.world > 1:
            dist.broadcast_object_list(told)
        need(not told[0], told[0])
        return result

    def gather(self, value):
        """The value that each rank has, a list."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def check_alike(self, facts):
        """Stop if a rank has other facts, {what: value}, than rank 0."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, 1):
            for what in first:
                need(other[what] == first[what],
                     f'rank {rank} has another {what} than rank 0 ({other[what]!r}, not {first[what]!r}): all nodes '
                     'need the same command, and the same data/ and out/, on a shared disk or copied')

    # ------------------------------------------------------------------------------------------------
    # the model

    def wrap(self, model):
        """Make a policy ready to train, in place. -> what to call before a backward pass: the policy, or DDP's of it"""
        if self.compile:
            compile_blocks(model)
        if self.world == 1:
            return model
        devices = [self.device.index] if self.device.type == 'cuda' else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def freeze(self, model):
        """Make a reference cheap to run, in place. Autocast would cast its matrices at every call: keep them cast."""
        model.eval().requires_grad_(False)
        if self.bf16:
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.bfloat16()
        if self.compile:
            compile_blocks(model)

    def resume(self, policy, optimizer, train, val, **weights):
        """Load the last checkpoint into policy and optimizer, if --resume or torchrun's restart asks for it.

        weights: {name: fingerprint} of the weights that the run starts from. A checkpoint records them, and a run
        with other data or weights cannot resume it. -> the step of the checkpoint, 0 for none.
        """
        self.policy = policy
        self.optimizer = optimizer
        self.train = train
        knobs = {key: getattr(self.cfg, key) for key in ('batch_size', 'seed', 'optimizer')}
        self.origin = dict(data=train.fingerprint, **weights, **knobs)
        step, state, path = 0, None, ''
        if self.cfg.resume or self.restarted:
            state, path = checkpoint.read_last(self.out_dir, self.say)
        if state and not self.cfg.resume and state.get('launch') != self.launch:
            state = None                # an earlier run's: this launch was restarted before it saved
        if state:
            self._load(state, path)
            step = state['step']
        elif self.cfg.resume or self.restarted:
            self.say(f'nothing to resume in {self.out_dir}: starting at step 0')
        facts = asdict(self.cfg)
        for groups in (train, val):
            facts[f'{self.data_dir}/{groups.split}'] = groups.fingerprint
        for key in weights:
            facts[ORIGIN[key]] = weights[key]
        facts[f'step to start from, by {self.out_dir},'] = step
        self.check_alike(facts)
        return step

    def _load(self, state, path):
        for key, now in self.origin.items():
            then = state.get('origin', {}).get(key)
            need(then == now,
                 f'cannot resume {path}: {ORIGIN.get(key, key)} changed since ({then} then, {now} now)')
        try:
            self.policy.load_state_dict(state['model'])
        except (RuntimeError, TypeError, AttributeError):
            raise UserError(f'cannot resume {path}: its weights do not fit the model of this run') from None
        try:
            self.optimizer.load_state_dict(state['optimizer'])
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(f'cannot resume {path}: it holds no state of the optimizer') from None
        self.optimizer.param_groups[0]['weight_decay'] = self.cfg.weight_decay      # not the saved one
        then = state.get('config', {})
        changed = [f'{key} {then.get(key)!r} -> {now!r}' for key, now in asdict(self.cfg).items()
                   if key != 'resume' and then.get(key) != now]
        self.say(f'resuming from {path}' + (f', with {", ".join(changed)}' if changed else ''))

    # ------------------------------------------------------------------------------------------------
    # log and checkpoints

    def open_log(self, start, total_steps):
        """Print the knobs, and make out/<name>/<stage>/ ready to go on after step `start`."""
        self.start = start
        self.total_steps = total_steps
        processes = '1 process' if self.world == 1 else f'{self.world} processes'
        self.say(f'{self.stage}, {processes} on {self.device.type}:\n{config.show(self.cfg)}')
        slow = self.device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() in ('DEFAULT', 'AVX2')
        if self.bf16 and slow:
            self.say('note: this CPU has no bfloat16 instructions: --dtype=float32 is many times faster here')
        if self.cfg.warmup_steps >= total_steps:
            self.say(f'note: the run of {total_steps:,} steps ends within its warm-up of '
                     f'{self.cfg.warmup_steps:,}: set --warmup_steps')
        what = f'cannot write to {self.out_dir}'
        self.wandb = self.on_first(self._open_wandb, what) if self.cfg.track else None
        self.log_file = self.on_first(lambda: checkpoint.open_run(self.out_dir, start), what)

    def _open_wandb(self):
        folder = os.path.join('out', self.cfg.name)
        os.makedirs(folder, exist_ok=True)
        try:
            import wandb
            return wandb.init(project='nanodpo', name=f'{self.cfg.name}-{self.stage}', config=asdict(self.cfg),
                              dir=folder)
        except ImportError as error:
            raise UserError(f'track=wandb needs {error.name}: pip install {error.name}') from None
        except Exception as error:      # wandb's own: no key, no network
            raise UserError(f'track=wandb: {error} WANDB_MODE=offline needs neither a login nor a '
                            'network') from None

    def bar(self, steps):
        """`steps` with a progress bar on rank 0. From now on a signal stops the run at the end of its step."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return tqdm(steps, self.stage, total=self.total_steps, initial=self.start, unit='step',
                    disable=None if self.rank == 0 else True)

    def log(self, step, record, prefix=''):
        """One aligned line to the terminal, one JSON line to log.jsonl."""
        label = f'{prefix.strip("/") or "step":5}{step:>7,}/{self.total_steps:,}'
        columns = [text.format(record[key]) for key, text in COLUMNS.items() if key in record]
        self.say(' | '.join([label, *columns]))
        record = {prefix + key: value for key, value in record.items()}

        def write():
            self.log_file.write(json.dumps({'step': step, **record}) + '\n')
            if self.wandb:
                self.wandb.log(record, step=step)
        self.on_first(write, f'cannot write the log to {self.out_dir}, the checkpoints are untouched')

    def save(self, step):
        """Write the checkpoint of this step."""
        state = dict(stage=self.stage, config=asdict(self.cfg), optimizer=self.optimizer.state_dict(),
                     origin=self.origin, vocabulary=self.train.vocabulary, launch=self.launch)
        self.on_first(lambda: checkpoint.save(self.out_dir, step, self.policy, state),
                      f'cannot save step {step} to {self.out_dir}, the checkpoints before it are untouched')
        self.saved_step = step

    # ------------------------------------------------------------------------------------------------
    # stopping

    def _on_signal(self, number, frame):
        self.own_signal[0] = number
        self.say(f'signal {number}: finishing this step, then saving')
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # a second Ctrl-C stops at once

    def stopping(self):
        """The signal that any rank got, 0 for none: all ranks leave together."""
        signalled = self.own_signal.clone()
        if self.world > 1:
            dist.all_reduce(signalled, dist.ReduceOp.MAX)
        self.signalled = signalled.item()
        return self.signalled

    def check_finite(self, unread):
        """Stop if a loss or a gradient is not finite, and name the pairs.

        unread: (step, gradient norm, [(ids, losses) of each micro-step]) of every step since the last check.
        """
        norms = torch.stack([norm for step, norm, micros in unread])
        finite = norms.isfinite().tolist()          # waits for the GPU
        if all(finite):
            return
        step, norm, micros = unread[finite.index(False)]
        bad, every = [], []
        for ids, losses in micros:
            every += ids
            bad += [group for group, good in zip(ids, losses.isfinite().tolist()) if not good]
        bad = sum(self.gather(bad), [])
        every = sum(self.gather(every), [])         # a gradient that is not finite may be of any of them
        raise UserError(f'step {step}: the loss or its gradient is not finite; groups of {self.data_dir}/'
                        f'{self.train.split}: {sorted(bad or every)}; nothing since the last checkpoint is saved; '
                        'lower the learning rate, or look at these groups')

    def close(self):
        """The end of the run on every rank, with the exit status of the signal that ended it."""
        if self.wandb:
            self.wandb.finish()
        if self.world > 1:
            gc.collect()        # the DDP wrapper goes before the process group: it would wait for its threads
            dist.destroy_process_group()
        if self.signalled:
            self.say(f'stopped by signal {self.signalled}, saved at step {self.saved_step}: --resume goes on from '
                     'there')
            raise SystemExit(128 + self.signalled)
        self.say(f'done: {self.out_dir}')


class Meter:
    """Tokens, pairs, FLOPs and seconds since the last log line.

    passes: forward passes over every token, of which a backward pass counts two.
    """
    def __init__(self, run, groups, model_config, passes):
        self.run = run
        self.groups = groups
        self.model_config = model_config
        self.passes = passes
        self.reset()

    def reset(self):
        self.tokens = self.pairs = self.computed = self.flops = self.seconds = 0
        self.go()

    def go(self):
        self.began = time.perf_counter()

    def stop(self):
        """The clock stands still: an evaluation or a checkpoint comes now."""
        self.seconds += time.perf_counter() - self.began

    def step(self, ids):
        """Count the groups of a step, on all ranks."""
        self.tokens += int(self.groups.lengths[ids].sum())
        self.pairs += len(ids)
        self.flops += self.groups.forward_flops(ids, self.model_config) * self.passes

    def read(self):
        """{name: value} for the log; then begin again."""
        device = self.run.device
        computed = self.run.sum(torch.tensor([self.computed])).item()
        record = dict(tokens_per_second=self.tokens / self.seconds,
                      pairs_per_second=self.pairs / self.seconds,
                      padding=1 - self.tokens / computed)
        if device.type == 'cuda':
            record['memory_gb'] = torch.cuda.max_memory_allocated(device) / 1e9
        peak = peak_flops(device)
        if peak:
            record['mfu'] = self.flops / self.seconds / self.run.world / peak
        self.reset()
        return record


def peak_flops(device):
    """The device's dense bfloat16 peak by its data sheet, FLOP/s; 0 where it is not known."""
    if device.type != 'cuda':
        return 0
    peaks = {'H200': 989e12, 'H100': 989e12, 'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12, 'RTX 4090': 165e12}
    return next((peak for key, peak in peaks.items() if key in torch.cuda.get_device_name(device)), 0)
