"""The pieces of repro/gpu_check.sh: each prints a record, and appends it to $OUT/bench.jsonl.

    python repro/gpu_check.py machine                   # versions, the fastest matmul, attention with and without cuDNN
    python repro/gpu_check.py numerics                  # GPU in float32 and bfloat16 against the CPU's float32
    python repro/gpu_check.py bench gpt2-xl block 8192 8 profile        # steps of dpo.py's loop, part by part
    python repro/gpu_check.py generate gpt2             # against transformers' generate
"""
import contextlib
import copy
import functools
import gc
import importlib.metadata
import json
import math
import os
import re
import socket
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'repro')]
import dpo                                                                              # noqa: E402
import model as model_file                                                              # noqa: E402
import throughput                                                                       # noqa: E402
from model import GPT, GPTConfig, token_logps                                           # noqa: E402
from nanodpo import checkpoint, losses as relatives, run as run_file                    # noqa: E402
from nanodpo.data import Groups, Sampled, batches, pack                                 # noqa: E402
from nanodpo.export import save_pretrained                                              # noqa: E402

OUT = os.environ.get('OUT', '/tmp')
DRY = bool(os.environ.get('DRY'))       # on a GPU that is only pretended
BATCH_SIZE = 8 if DRY else 64
VOCAB = 50257


def record(what, **values):
    line = json.dumps(dict(what=what, gpu=torch.cuda.get_device_name(), torch=torch.__version__, **values))
    print(line, flush=True)
    with open(f'{OUT}/bench.jsonl', 'a') as f:
        f.write(line + '\n')


def seconds_of(function):
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - began


# --- the machine ----------------------------------------------------------------------------------

def machine():
    import triton
    properties = torch.cuda.get_device_properties(0)
    found = dict(triton=triton.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
                 memory_gb=properties.total_memory / 1e9, cores=os.cpu_count(),
                 bf16=torch.cuda.is_bf16_supported(including_emulation=False))
    for name in ('numpy', 'tiktoken', 'transformers', 'safetensors', 'datasets', 'trl'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    big = 1024 if DRY else 8192
    for M, K, N in ((big, big, big), (8192, 768, 3072), (8192, 1600, 6400), (8192, 6400, 1600), (4096, 1600, 4096)):
        a = torch.randn(M, K, device='cuda', dtype=torch.bfloat16)
        b = torch.randn(N, K, device='cuda', dtype=torch.bfloat16)
        best = min([seconds_of(lambda: a @ b.t()) for _ in range(8)][2:])
        found[f'tflops {M} x {K} x {N}'] = 2 * M * K * N / best / 1e12
    found['bf16_tflops'] = max(value for key, value in found.items() if key.startswith('tflops'))
    for cudnn in (False,) if DRY else (False, True):        # as generate calls it, with a key more at every step
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        times = []
        for keys in range(100 + cudnn, 164, 4):
            q = torch.randn(16, 12, 1, 64, device='cuda', dtype=torch.bfloat16)
            k = torch.randn(16, 12, keys, 64, device='cuda', dtype=torch.bfloat16)
            mask = torch.ones(16, 1, 1, keys, dtype=torch.bool, device='cuda')
            attend = functools.partial(F.scaled_dot_product_attention, q, k, k, attn_mask=mask)
            times.append((seconds_of(attend), seconds_of(attend)))
        new, known = np.median(times, axis=0) * 1e3
        found[f'attention ms, cudnn={cudnn}'] = dict(new_length=new, known_length=known)
    record('machine', **found)


# --- numbers --------------------------------------------------------------------------------------

def numerics():
    """Log-probs and gradients against the CPU's float32, and what the head alone loses to bfloat16 logits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(1024, VOCAB, *((2, 2, 64) if DRY else (12, 12, 768))))
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(3)              # predictions far from uniform
    rng = np.random.default_rng(0)
    groups = Sampled([[rng.integers(0, VOCAB, size).tolist() for size in rng.integers(8, 120, 3)] for _ in range(12)])
    on_cpu = dpo.response_logps(model, pack(groups, list(range(12)), 128))
    on_cpu.sum().backward()
    on_gpu = copy.deepcopy(model).cuda()
    found = dict(mean_logp=on_cpu.mean().item())
    for dtype in ('float32', 'bfloat16'):
        worker = run_file.Worker('cuda', dtype)
        batch = pack(groups, list(range(12)), 128).to(worker.device)
        on_gpu.zero_grad()
        with worker.autocast:
            logps = dpo.response_logps(on_gpu, batch)
            again = dpo.response_logps(on_gpu, batch)
        logps.sum().backward()
        gradients = [((p.grad.cpu() - q.grad).norm() / q.grad.norm().clamp(min=1e-9)).item()
                     for p, q in zip(on_gpu.parameters(), model.parameters())]
        found[dtype] = dict(largest_logp_difference=(logps.cpu() - on_cpu).abs().max().item(),
                            largest_gradient_difference=max(gradients), same_twice=torch.equal(logps, again))
        with torch.no_grad(), worker.autocast:
            states = on_gpu(batch.tokens, batch.positions, batch.mask, batch.predictor)
            of_dtype = token_logps(states, on_gpu.wte.weight, batch.target)
        exact = token_logps(states.float(), on_gpu.wte.weight, batch.target)
        found[dtype]['head_alone_rms'] = (of_dtype - exact).square().mean().sqrt().item()
    record('numerics', **found)


def losses(*flags):
    """Every loss that takes pairs, for a few steps in this process."""
    for loss in relatives.LOSSES:
        dpo.main([*flags, f'--loss={loss}'])
        with open('out/hh/dpo/log.jsonl') as f:
            lines = [json.loads(line) for line in f]
        found = [line['loss'] for line in lines if 'loss' in line]
        record('loss', loss=loss, at_0=lines[0].get('eval/loss'), losses=found, finite=all(map(math.isfinite, found)))


def resumed(whole, log):
    """How far a resumed run's losses lie from those of the run that went through."""
    runs = []
    for path in (whole, log):
        with open(path) as f:
            runs.append([json.loads(line) for line in f])
    through, again = ({line['step']: line['loss'] for line in lines if 'loss' in line} for lines in runs)
    gaps = {step: abs(through[step] - again[step]) for step in range(7, 13) if step in through and step in again}
    record('resumed', eval_loss_at_0=runs[0][0].get('eval/loss'), gaps=gaps)


def two_ranks(*flags):
    """dpo.py by two processes on one GPU; NCCL refuses that, gloo does not."""
    if 'RANK' in os.environ:
        join = run_file.join
        run_file.join = lambda world, rank, device_type, timeout: join(world, rank, 'cpu', timeout)
        return dpo.main(list(flags))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    shared = dict(os.environ, WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    ranks = [subprocess.Popen([sys.executable, __file__, 'two_ranks', *flags], env=dict(shared, RANK=str(rank)))
             for rank in range(2)]
    if any([rank.wait() for rank in ranks]):
        sys.exit('a rank failed')
    with open('out/hh/dpo/log.jsonl') as f:
        record('two_ranks', losses=[line['loss'] for line in map(json.loads, f) if 'loss' in line])


# --- data and weights -----------------------------------------------------------------------------

def pairs(folder):
    """Pairs of random letters with HH's lengths."""
    throughput.write_synthetic(folder, 1500, seed=0)


def weights(folder, name, data):
    """Random weights of that size for the data's vocabulary."""
    vocab = Groups(data, 'train').meta['vocab_size']
    with torch.device('cuda'):
        model = GPT(GPTConfig(1024, vocab, *throughput.MODELS[name]))
    save_pretrained(model, folder)


def hh_like(n):
    """n pairs with HH's lengths and random ids, as Sampled."""
    rng = np.random.default_rng(0)
    spread = throughput.HH_CORRELATION * throughput.HH_STD[:, None] * throughput.HH_STD
    sizes = np.exp(rng.multivariate_normal(throughput.HH_MEAN, spread, n)).round().clip(1).astype(int)
    sizes[:, 0] = sizes[:, 0].clip(max=256)
    sizes[:, 1:] = sizes[:, 1:].clip(max=512 - sizes[:, :1])
    return Sampled([[rng.integers(0, VOCAB, size).tolist() for size in row] for row in sizes])


# --- speed ----------------------------------------------------------------------------------------

def build(name, how):
    """A policy and its reference of that size, compiled as `how` says. -> worker, policy, what to call for each"""
    with torch.device('cuda'):
        policy = GPT(GPTConfig(1024, VOCAB, *throughput.MODELS[name]))
    reference = copy.deepcopy(policy)
    worker = run_file.Worker('cuda', 'bfloat16')
    worker.compile = 'block' in how
    run_file.Run.freeze(worker, reference)
    run_file.Run.wrap(worker, policy)
    if 'chunk' in how:                  # so many blocks in one compiled piece
        size = int(re.search(r'chunk(\d+)', how)[1])
        for model in (policy, reference):
            model.h = torch.nn.ModuleList(Chunk(model.h[i:i + size]) for i in range(0, len(model.h), size))
            run_file.compile_blocks(model)
    if 'cpp' in how:                    # Inductor's launching code in C++
        torch._inductor.config.cpp_wrapper = True
    calls = policy, reference
    if 'whole' in how:
        calls = torch.compile(policy, dynamic=True), torch.compile(reference, dynamic=True)
    return worker, policy, *calls


class Chunk(torch.nn.Module):
    """Consecutive blocks as one; of `at`, see Block."""
    def __init__(self, blocks):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x, mask, rotation=None, at=None, cache=None, positions=None):
        for block in self.blocks[:-1]:
            x = block(x, mask, rotation)
        return self.blocks[-1](x, mask, rotation, at)


def event():
    e = torch.cuda.Event(enable_timing=True)
    e.record()
    return e


def bench(name, how, row_tokens, steps, *more):
    """Steps of dpo.py's loop. how: block (the product), whole or eager, and +divisible. more: profile, and wait, for
    a file of that name, before anything is timed."""
    row_tokens, steps = int(row_tokens), int(steps)
    began = time.perf_counter()
    torch.manual_seed(0)
    worker, policy, net, reference_net = build(name, how)
    optimizer = policy.configure_optimizer('rmsprop', 1e-6, 0.0)
    update = torch.compile(optimizer.step) if 'opt' in how else optimizer.step
    groups = hh_like(BATCH_SIZE * (steps + 2))
    lengths = []

    def step(number, marks):
        """marks: takes (part of the step, its first event, its last) of every part."""
        ids = np.arange(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        for batch in batches(groups, ids, worker, row_tokens):
            lengths.append((batch.tokens.numel(), len(batch.target)))
            events = [event()]
            with worker.autocast:
                batch.mask
                events.append(event())
                with torch.no_grad():
                    reference_logps = dpo.response_logps(reference_net, batch)
                events.append(event())
                logps = dpo.response_logps(net, batch)
            pair_losses, *_ = dpo.dpo_loss(*logps.t(), *reference_logps.t(), 0.1)
            events.append(event())
            (pair_losses.sum() / BATCH_SIZE).backward()
            events.append(event())
            marks += zip(('mask', 'reference', 'forward', 'backward'), events, events[1:])
        before = event()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        update()
        optimizer.zero_grad(set_to_none=True)
        marks.append(('optimizer', before, event()))

    policy.train()
    built = time.perf_counter() - began
    first = [seconds_of(lambda: step(number, [])) for number in (0, 1)]
    graphs = counters['stats']['unique_graphs']
    record('compile', model=name, how=how, build_seconds=built, first_steps=first, graphs=graphs)
    if 'skip' in how:                   # guards that tell no compiled piece from another are not evaluated
        torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    for word in more:
        while word.startswith('wait') and not os.path.exists(word):
            time.sleep(0.1)

    marks, seconds = [], []
    lengths.clear()
    torch.cuda.reset_peak_memory_stats()
    for number in range(2, steps + 2):
        seconds.append(seconds_of(lambda: step(number, marks)))
    ids = np.arange(2 * BATCH_SIZE, (steps + 2) * BATCH_SIZE)
    tokens = int(groups.lengths[ids].sum())
    whole = float(np.median(seconds)) * steps
    flops = 4 * Groups.forward_flops(groups, ids, policy.config)
    record('train', model=name, how=how, row_tokens=row_tokens, step_seconds=seconds, tokens_per_second=tokens / whole,
           pairs_per_second=BATCH_SIZE * steps / whole, tflops=flops / whole / 1e12,
           of_matmul_peak=flops / whole / peak(), ms_a_step=milliseconds(marks, steps),
           rows_a_step=len(lengths) / steps, padding=1 - tokens / sum(T for T, _ in lengths), row_lengths=lengths[:12],
           new_graphs=counters['stats']['unique_graphs'] - graphs,
           memory_gb=torch.cuda.max_memory_allocated() / 1e9, reserved_gb=torch.cuda.max_memory_reserved() / 1e9)
    if 'profile' in more:
        profile(f'{name} {how}, one step', lambda: step(2, []))


def flex(name='gpt2-xl', limit='60'):
    """Forward and backward pass of FlexAttention over rows with HH's lengths, told this and that."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch._functorch.config.donated_buffer = False      # the backward pass is timed many times
    layers, H, width = throughput.MODELS[name]
    D, until = width // H, time.perf_counter() + float(limit)
    groups = hh_like(32)
    batch = pack(groups, list(range(32)), 128).to(torch.device('cuda', 0))
    T = batch.tokens.numel()
    masks = {}
    for dtype in (torch.int64, torch.int32):
        rule = model_file.visible(batch.group.to(dtype), batch.part.to(dtype))
        for size in (128, 64):
            make = torch.compile(create_block_mask, dynamic=True)
            masks[dtype, size] = make(rule, 1, None, T, T, device='cuda', BLOCK_SIZE=size)
    told = dict(IS_DIVISIBLE=True)          # ROWS_GUARANTEED_SAFE gave NaN
    variants = {'as it is': (torch.int64, 128, {}), 'divisible': (torch.int64, 128, told),
                'int32': (torch.int32, 128, {})}
    for M, N, warps, stages in ((64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 3),
                                (64, 128, 4, 2)):
        options = told | dict(fwd_BLOCK_M=M, fwd_BLOCK_N=N, fwd_num_warps=warps, fwd_num_stages=stages)
        variants[f'forward {M} x {N}, {warps} warps, {stages} stages'] = torch.int32, 128, options
    variants['blocks of 64'] = torch.int32, 64, told
    variants['TMA'] = torch.int32, 128, told | dict(USE_TMA=True)
    for M, N, warps, stages in ((64, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 2)):
        options = told | dict(bwd_BLOCK_M1=M, bwd_BLOCK_N1=N, bwd_BLOCK_M2=N, bwd_BLOCK_N2=M, bwd_num_warps=warps,
                              bwd_num_stages=stages)
        variants[f'backward {M} x {N}, {warps} warps, {stages} stages'] = torch.int32, 128, options
    q, k, v = (torch.randn(1, H, T, D, device='cuda', dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    first = None
    for variant, (dtype, size, options) in variants.items():
        if time.perf_counter() > until:
            break
        torch.compiler.reset()
        attend = torch.compile(flex_attention, dynamic=True)
        call = functools.partial(attend, q, k, v, block_mask=masks[dtype, size], scale=D ** -0.5, enable_gqa=True,
                                 kernel_options=options)
        try:
            began = time.perf_counter()
            y = call()
            y.sum().backward(retain_graph=True)
            compiled = time.perf_counter() - began
            with torch.no_grad():
                call()
            first = y.detach() if first is None else first

            def forward():
                with torch.no_grad():
                    for _ in range(20):
                        call()
            forward()
            ahead = min(seconds_of(forward) for _ in range(5)) / 20
            back = min(seconds_of(functools.partial(y.backward, torch.ones_like(y), retain_graph=True))
                       for _ in range(20))
            record('flex', variant=variant, T=T, H=H, D=D, forward_ms=ahead * 1e3, backward_ms=back * 1e3,
                   compile_seconds=compiled, difference=(y.detach() - first).abs().max().item())
        except Exception as error:
            record('flex', variant=variant, error=repr(error)[:300])


def milliseconds(marks, steps):
    """{part of a step: its milliseconds a step} of (part, first event, last event)."""
    parts = {}
    for part, start, end in marks:
        parts[part] = parts.get(part, 0) + start.elapsed_time(end) / steps
    return parts


def peak():
    """FLOP/s of the fastest matmul that `machine` timed, nan where it has not."""
    with open(f'{OUT}/bench.jsonl') as f:
        lines = [json.loads(line) for line in f]
    return max([line['bf16_tflops'] * 1e12 for line in lines if line['what'] == 'machine'], default=math.nan)


def profile(title, function):
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        seconds_of(function)
    with open(f'{OUT}/profile.txt', 'a') as f:
        for key, rows in (('self_cuda_time_total', 30), ('self_cpu_time_total', 12)):
            table = found.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=90)
            f.write(f'\n{title}, by {key}\n{table}\n')


def generate(name):
    """Tokens a second beside transformers' generate, at batch 1, 16 and 64."""
    from transformers import GPT2Config, GPT2LMHeadModel
    layers, heads, width = throughput.MODELS[name]
    groups, new = hh_like(64), 4 if DRY else 48
    prompts = [groups.tokens[a:b].tolist()[-128:] for a, b in groups.index[:, :2]]
    with torch.device('cuda'):
        ours = GPT(GPTConfig(1024, VOCAB, layers, heads, width))
    for size in (1, 16, 64):
        with torch.autocast('cuda', torch.bfloat16):
            times = [seconds_of(lambda: ours.generate(prompts[:size], new, end_token=-1)) for _ in range(2)]
        record('generate', model=name, batch=size, tokens_per_second=size * new / times[1], first=times[0])
    del ours
    gc.collect()
    if DRY:
        return
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width, attn_implementation='sdpa')
    with torch.device('cuda'):
        theirs = GPT2LMHeadModel(config).eval()
    theirs.generation_config.pad_token_id = VOCAB - 1
    for size in (1, 16, 64):
        longest = max(map(len, prompts[:size]))
        ids = torch.tensor([[VOCAB - 1] * (longest - len(prompt)) + prompt for prompt in prompts[:size]], device='cuda')
        options = dict(attention_mask=(ids != VOCAB - 1).long(), do_sample=True, min_new_tokens=new, max_new_tokens=new)
        with torch.autocast('cuda', torch.bfloat16):
            times = [seconds_of(lambda: theirs.generate(ids, **options)) for _ in range(2)]
        record('generate', model=name, batch=size, of='transformers', tokens_per_second=size * new / times[1],
               first=times[0])


PIECES = dict(machine=machine, numerics=numerics, losses=losses, resumed=resumed, two_ranks=two_ranks, pairs=pairs,
              weights=weights, bench=bench, flex=flex, generate=generate)

if __name__ == '__main__':
    if sys.argv[1] == 'losses':
        checkpoint.save = lambda *args: None
    PIECES[sys.argv[1]](*sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)                         # a pool of compilers must not hold the exit
