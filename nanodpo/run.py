"""What a training stage needs around its loop, and no loss. Only rank 0 writes, through run.on_first."""
import contextlib
import copy
import gc
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
from config import UserError, need
from nanodpo import checkpoint
from nanodpo.folder import hold, release
from nanodpo.launch import join, ranks
from nanodpo.terminal import folded

COLUMNS = {'loss': 'loss {:.4f}', 'rewards/accuracies': 'acc {:.3f}', 'logps/accuracies': 'raw acc {:.3f}',
           'rewards/margins': 'margin {:+.4f}', 'rewards/chosen': 'chosen {:+.4f}',
           'rewards/rejected': 'rejected {:+.4f}', 'kl': 'kl {:.2f}', 'perplexity': 'ppl {:.2f}',
           'grad_norm': 'grad {:.2f}', 'lr': 'lr {:.2e}', 'tokens_per_second': '{:,.0f} tok/s',
           'mfu': 'mfu {:.1%}', 'memory_gb': '{:.1f} GB'}
PEAKS = {'H200': 989e12, 'H100': 989e12, 'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12, 'RTX 4090': 165e12}


def compile_blocks(model):
    """Compile every Block of a GPT in place, for rows of any length. All blocks share what is compiled."""
    torch._dynamo.config.recompile_limit = 64       # policy, reference, evaluation, last block: 8 is too few
    torch._dynamo.config.optimize_ddp = False       # else DDP splits a graph at every 25 MB of gradients
    torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True    # the same kernels for all
    for block in model.h:
        block.compile(dynamic=True)


def learning_rate(cfg, step, total_steps):
    """The rate of optimizer step `step`, the first being 1: linear warm-up, then the schedule."""
    warmup = min(150, total_steps // 10) if cfg.warmup_steps is None else cfg.warmup_steps
    if step <= warmup:
        return cfg.learning_rate * step / warmup
    done = (step - warmup) / max(1, total_steps + 1 - warmup)       # in (0, 1)
    factors = dict(constant=1, linear=1 - done, cosine=0.5 + 0.5 * math.cos(math.pi * done))
    return cfg.learning_rate * factors[cfg.schedule]


class Worker:
    """One process: its device, the type of its matmuls, its place among `world` ranks that share the work."""
    def __init__(self, device='auto', dtype='auto', world=1, rank=0, local_rank=0):
        self.world = world
        self.rank = rank
        if device == 'auto':
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        need(getattr(torch, device).is_available(), f'device={device} is not available here: --device=cpu')
        self.device = torch.device(device)
        self.bf16 = dtype == 'bfloat16'
        if device == 'cuda':
            here, gpus = int(os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)), torch.cuda.device_count()
            need(here <= gpus, f'{here} processes on this machine, but torch sees {gpus} GPUs: lower '
                 '--nproc_per_node, or --device=cpu')
            self.device = torch.device(device, local_rank)      # threads ask for its number
            torch.cuda.set_device(self.device)
            if dtype == 'auto':
                self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=self.bf16)
        self.exact = torch.float32 if device == 'mps' else torch.float64        # of sums; MPS has no float64

    def sum(self, tensor):
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def alone(self):
        """The same process as a world of its own, for work that ranks do not share."""
        other = copy.copy(self)
        other.world, other.rank = 1, 0
        return other


class Run(Worker):
    """A Worker that trains one stage: it has the stage's folder, log, checkpoints and signals."""
    def __init__(self, cfg, stage):
        self.cfg = cfg
        self.stage = stage
        self.data_dir = os.path.join('data', cfg.name)
        self.out_dir = os.path.join('out', cfg.name, getattr(cfg, 'run_name', stage))
        super().__init__(cfg.device, cfg.dtype, *ranks())
        self.compile = self.device.type == 'cuda' if cfg.compile is None else cfg.compile
        self.launch, self.restarted = join(self.world, self.rank, self.device.type, cfg.join_timeout)
        self.own_signal = 0         # the signal of this rank
        self.signalled = 0          # the signal of any rank
        self.measured = {}          # the last evaluation
        self.broken = f'not saved: lower --learning_rate; the checkpoints of {self.out_dir} before it are untouched'
        self.wandb = self.wandb_id = None

    # --- all ranks together -----------------------------------------------------------------------

    def say(self, text, hang=2):
        if self.rank == 0:
            try:
                tqdm.write(folded(text, hang))
            except OSError:
                if not self.own_signal:         # which may have come with the end of the terminal, or of `| tee`
                    raise

    def gather(self, value):
        """The value that each rank has, a list."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def on_first(self, function, what):
        """function() on rank 0, None elsewhere. Its UserError, or `what` and its OSError, ends all ranks."""
        result, error = None, ''
        if self.rank == 0:
            try:
                result = function()
            except (UserError, OSError) as problem:
                error = getattr(problem, 'message', f'{what}: {problem}')
                release()
        error = self.gather(error)[0]
        need(not error, error)
        return result

    def check_alike(self, facts):
        """Stop if a rank has other facts, {what: value}, than rank 0."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, 1):
            for what, value in other.items():
                need(value == first[what], f'rank {rank} has another {what} than rank 0 ({value!r}, not '
                     f'{first[what]!r}): all nodes need the same command, data/ and out/')

    def check_finite(self, unread):
        """Stop the clock, and the run if a step is not finite. unread: [(step, norm, [(ids, losses)])]."""
        norms = torch.stack([norm for step, norm, micros in unread])
        finite = norms.isfinite().tolist()          # waits for the GPU
        self.seconds += time.perf_counter() - self.began
        self.began = None
        if all(finite):
            return
        step, norm, micros = unread[finite.index(False)]
        losses = []
        for ids, values in micros:
            losses += zip(ids, values.tolist())
        losses = dict(sum(self.gather(losses), []))
        bad = [group for group, loss in losses.items() if not math.isfinite(loss)]
        raise UserError(f'step {step}: the loss or its gradient is not finite; groups of {self.data_dir}/'
                        f'{self.train.split}: {sorted(bad or losses)}: lower the learning rate or see them')

    def on_signal(self, number, frame):
        self.own_signal = number
        if self.rank == 0:
            with contextlib.suppress(OSError):  # not by print, which may be what the signal interrupts
                os.write(2, f'signal {number}: finishing this step, then saving\n'.encode())
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # a second Ctrl-C stops at once

    def stopping(self):
        """The signal that any rank got, 0 for none: all ranks leave together."""
        self.signalled = max(self.gather(self.own_signal))
        return self.signalled

    # --- the model --------------------------------------------------------------------------------

    def wrap(self, model):
        """Make a policy ready to train, in place. -> what to call before a backward pass: it, or its DDP."""
        if self.compile:
            compile_blocks(model)
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if self.world > 1 else model

    def freeze(self, model):
        """Make a reference cheap to run, in place. Autocast would cast its matrices at every call."""
        model.eval().requires_grad_(False)
        for module in model.modules():
            if self.bf16 and isinstance(module, torch.nn.Linear):
                module.bfloat16()
        if self.compile:
            compile_blocks(model)

    def resume(self, policy, optimizer, train, val, init_from, **weights):
        """Load the last checkpoint if asked to, or after a restart. -> its step or 0. weights: fingerprints."""
        self.policy = policy
        self.optimizer = optimizer
        self.train = train
        knobs = {key: getattr(self.cfg, key) for key in ('batch_size', 'seed', 'optimizer')}
        self.origin = dict(data=train.fingerprint, **weights, **knobs)
        need(os.path.realpath(self.out_dir) not in map(os.path.realpath, (init_from, os.path.dirname(init_from))),
             f'init_from={init_from} is in the folder that this run writes: start it with --run_name=OTHER')
        self.on_first(lambda: hold(self.out_dir, self.say), f'cannot write to {self.out_dir}')
        step = 0
        if self.cfg.resume or self.restarted:
            state, path = checkpoint.read_last(self.out_dir, self.say)
            if state and (self.cfg.resume or state.get('launch') == self.launch):       # not an older run's
                self.load(state, path)
                step = state['step']
            else:
                self.say(f'nothing to resume in {self.out_dir}: starting at step 0')
        facts = {'val': val.fingerprint, 'step': step, 'kind of device': self.device.type, 'use of bfloat16': self.bf16}
        self.check_alike(asdict(self.cfg) | self.origin | facts)
        return step

    def load(self, state, path):
        with config.one_line(f'cannot resume {path}'):
            for key, now in self.origin.items():
                then = state['origin'][key]
                need(then == now, f'cannot resume {path}: {key} changed since ({then} then, {now} now)')
            self.policy.load_state_dict(state['model'])
            checkpoint.check_weights(self.policy, path)
            self.saved_rate = float(state['optimizer']['param_groups'][0]['lr'])
            knobs = self.optimizer.state_dict()['param_groups']         # this run's, not the saved ones
            self.optimizer.load_state_dict(state['optimizer'] | dict(param_groups=knobs))
            kept = dict(adamw=('exp_avg', 'exp_avg_sq'), rmsprop=('square_avg',))[self.cfg.optimizer]
            for weight in self.policy.parameters():
                values = self.optimizer.state[weight]
                need(all(values[key].shape == weight.shape for key in kept) and values['step'].numel() == 1,
                     f'cannot resume {path}: its optimizer is of another model')
            changed = [f'{key} {state["config"].get(key)!r:.80} -> {now!r}' for key, now in asdict(self.cfg).items()
                       if key != 'resume' and state['config'].get(key, now) != now]
        self.wandb_id = state.get('wandb')
        self.say(f'resuming from {path}, with {", ".join(changed) or "the same knobs"}')

    # --- speed, log and checkpoints ---------------------------------------------------------------

    def speed(self, passes):
        """{name: value} since the last call. passes: forward ones; a backward pass counts two."""
        tokens = int(self.train.lengths[self.ids].sum())
        computed = sum(self.gather(self.computed))
        record = dict(tokens_per_second=tokens / self.seconds, pairs_per_second=len(self.ids) / self.seconds,
                      padding=1 - tokens / computed)
        if self.device.type == 'cuda':
            record['memory_gb'] = torch.cuda.max_memory_allocated(self.device) / 1e9
            flops = self.train.forward_flops(self.ids, self.policy.config) * passes / self.seconds
            name = torch.cuda.get_device_name(self.device)
            for key, peak in PEAKS.items():         # dense bfloat16, by the data sheets, FLOP/s
                if key in name:
                    record['mfu'] = flops / self.world / peak
        self.ids = []
        self.computed = self.seconds = 0
        return record

    def open_log(self, start, total_steps):
        """Print the knobs, and make out/<name>/<run_name>/ ready to go on after step `start`."""
        self.start = start
        self.total_steps = total_steps
        need(start <= total_steps, f'{self.out_dir} is at step {start:,}, beyond the {total_steps:,} steps asked for: '
             'raise --max_steps or --epochs, or start another run with --run_name=OTHER')
        self.say(f'{self.stage} on {self.device.type}, processes: {self.world}\n{config.show(self.cfg)}')
        if (self.cfg.warmup_steps or 0) >= total_steps:
            self.say(f'note: the run of {total_steps:,} steps ends within its warm-up: set --warmup_steps')
        if start and not math.isclose(self.saved_rate, learning_rate(self.cfg, start, total_steps)):
            following = learning_rate(self.cfg, start + 1, total_steps)
            self.say(f'note: other knobs, another schedule: the rate was {self.saved_rate:.2e} at step {start:,} and '
                     f'is {following:.2e} at step {start + 1:,}')
        self.on_first(self.open_files, f'cannot write to {self.out_dir}')

    def open_files(self):
        if self.cfg.track:
            with config.one_line('track=wandb needs `pip install wandb`, and a login or WANDB_MODE=offline'):
                import wandb
                folder, run_name = os.path.split(self.out_dir)
                os.makedirs(folder, exist_ok=True)
                self.wandb = wandb.init(project='nanodpo', name=f'{self.cfg.name}-{run_name}', id=self.wandb_id,
                                        resume='allow', config=asdict(self.cfg), dir=folder)
                self.wandb_id = self.wandb.id
        self.log_file = checkpoint.open_run(self.out_dir, self.start, self.say)

    def bar(self, steps):
        """The steps with a progress bar, counted for `speed`. A signal now stops the run after its step."""
        for number in config.STOPS:
            signal.signal(number, self.on_signal)
        self.ids = []                           # the groups since the last log line, on all ranks
        self.computed = self.seconds = 0        # this rank's tokens with padding, and its time
        self.began = time.perf_counter()
        for step, ids, micros in tqdm(steps, self.stage, self.total_steps, initial=self.start, unit='step',
                                      disable=None if self.rank == 0 else True):
            self.ids.extend(ids)
            self.computed += sum(batch.tokens.numel() for batch in micros)
            yield step, ids, micros
            self.began = self.began or time.perf_counter()

    def log(self, step, record, prefix=''):
        """One aligned line to the terminal, one JSON line to log.jsonl."""
        label = f'{prefix.strip("/") or "step":5}{step:>7,}/{self.total_steps:,}'
        columns = [label, *(text.format(record[key]) for key, text in COLUMNS.items() if key in record)]
        columns = [column.replace(' ', '\xa0') for column in columns]      # the line breaks between them alone
        self.say('\xa0| '.join(columns), hang=len(label) + 3)
        self.measured = record if prefix else self.measured
        record = {prefix + key: value for key, value in record.items()}

        def write():
            for key, value in record.items():
                need(math.isfinite(value), f'{key} is {value} after step {step:,}, which is {self.broken}')
            self.log_file.write(json.dumps({'step': step, **record}) + '\n')
            if self.cfg.track:
                self.wandb.log(record, step=step)
        self.on_first(write, f'cannot write the log to {self.out_dir}: the checkpoints are untouched')

    def save(self, step, logps):
        """Write the checkpoint of this step. logps: what the model makes of some data now, which must be finite."""
        state = dict(stage=self.stage, config=asdict(self.cfg), optimizer=self.optimizer.state_dict(),
                     origin=self.origin, vocabulary=self.train.vocabulary, launch=self.launch, wandb=self.wandb_id,
                     command=shlex.join(['python', os.path.basename(sys.argv[0]), *sys.argv[1:]]))
        def write():
            need(logps.isfinite().all(), f'step {step:,} broke the model, and is {self.broken}')
            checkpoint.save(self.out_dir, step, self.policy, state)
        self.on_first(write, f'cannot save step {step} to {self.out_dir}: those before it are untouched')
        self.saved_step = step

    def close(self):
        """The end of the run on every rank, with the exit status of the signal that ended it."""
        release()
        if self.wandb:
            self.wandb.finish()
        if self.world > 1:
            gc.collect()        # the DDP wrapper goes before the process group: it would wait for its threads
            dist.destroy_process_group()
        if self.signalled:
            self.say(f'signal {self.signalled}: saved at step {self.saved_step}, --resume goes on from there')
            raise SystemExit(128 + self.signalled)
        still = ''
        if abs(self.measured.get('rewards/margins', 1)) < 0.01:
            if abs(self.measured.get('kl', 0)) <= max(0.001, self.measured.get('kl_error', 0)):
                still = ', but it ended where it began: raise --learning_rate or --epochs, or lower --warmup_steps'
        self.say(f'done: {self.out_dir}{still}')
