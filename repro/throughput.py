"""The yardstick: DPO pairs per second, ours beside a plain padded loop and TRL, on the same pairs, weights and machine.

    python repro/throughput.py                                                  # gpt2 where you are, synthetic pairs
    python repro/throughput.py --model=tiny --contenders=ours,padded --sections=train        # half a minute
    python repro/throughput.py --data=Anthropic/hh-rlhf --data_dir=harmless-base --pairs=64
    python repro/throughput.py --device=cuda --model=gpt2-xl --batch_size=64 --pairs=1024 --data=Anthropic/hh-rlhf \\
        --out=h200                                                              # a GPU box: all of it, every section

Contenders, each in a process of its own, all with RMSprop, the same learning rate, clipping and precision (bfloat16
is autocast over float32 weights), gradients of `batch_size` pairs a step:
  ours        dpo.py with its defaults; ours+compile, ours-compile, ours+precomputed, ours+checkpointing change one.
  padded      what most people write: chosen and rejected as 2B right-padded sequences, the prompt in both, causal
              attention, logits of every position, log_softmax, gather, mask, sum; `child_padded` below.
  trl         TRL's DPOTrainer as it comes. Read in 1.16.0: 8 pairs a micro-step, gradient checkpointing ON, random
              order, a live reference, a head in chunks that scores completion tokens alone on CUDA but every position,
              padding too, on a CPU. Made equal: optimizer, batch, precision, clipping. Spared: its tokenisation.
  trl-best    the same without checkpointing, reference precomputed, batches grouped by length, micro-steps of each size
              in --micro_batch, the fastest shown; on CUDA FlashAttention 2 and Liger where they are installed. Not
              tried: torch.compile. padding_free is asked for, but TRL 1.16.0 switches it off with a warning.
`pip install trl transformers` for the peers; one that is missing, or runs out of memory, gets a row that says so.

How it counts. A run is one epoch of warm-up, then --epochs more; an epoch visits each pair once, so every contender did
the same work. pairs/s is the pairs of an epoch over the median epoch's seconds. Ours takes its own seconds from
log.jsonl (data, both models, optimizer; not the log line); the peers' run from the end of one step to the end of the next.
Tokens are distinct ones: a prompt counts once for its two responses. waste is the share of the tokens run through the
policy that need not be: repeated prompts, padding. Useful FLOPs are those of the distinct tokens, with heads at response
tokens alone (Groups.forward_flops): 4 forwards a step, the reference's, the policy's and two for its backward pass; 3
where the reference is precomputed. They do not count what a contender wastes or recomputes. "of peak" is against the
fastest of several matmuls of the same type, timed in this run before the contenders and after them, when nothing else
runs. Memory is the largest resident size of the process (CPU) or of CUDA's allocated tensors. "besides" is all
wall-clock seconds of the process but its epochs at the median speed: imports, loading, compiling, precomputing, and
ours its evaluations and its checkpoint. "1 epoch" is pairs/s with the precomputing spread over one epoch.

It needs no network: the weights are random, and without --data the pairs are too, their lengths drawn from HH's law.
Temporary files (the weights, one checkpoint of them at a time) go to $TMPDIR: some 20 GB for gpt2-xl.
"""
import argparse
import glob
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from model import GPT, GPTConfig                        # noqa: E402
from prepare_prefs import Groups, sha256_file           # noqa: E402

MODELS = {'tiny': (2, 2, 64), 'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
          'gpt2-xl': (48, 25, 1600)}                    # layers, heads, width; tiny is for a look at this script
OURS = {'ours': [], 'ours+compile': ['--compile=True'], 'ours-compile': ['--compile=False'],
        'ours+precomputed': ['--precompute_ref=True'], 'ours+checkpointing': ['--activation_checkpointing=True']}
PEERS = ['padded', 'trl', 'trl-best']
SECTIONS = ['train', 'prepare', 'eval', 'sample', 'rows', 'largest']
LEARNING_RATE, GRAD_CLIP = 1e-6, 10.0

# log-lengths of (prompt, chosen, rejected) in GPT-2 tokens, before truncation, over the 1,538 usable pairs of a sample of
# HH harmless-base (two thirds of its test split): prepare_prefs.read_dialogues, tiktoken, np.log, then mean, std, corrcoef
HH_MEAN, HH_STD = np.array([4.40, 3.32, 3.50]), np.array([1.00, 0.92, 0.97])
HH_CORRELATION = np.array([[1.00, 0.25, 0.23], [0.25, 1.00, 0.30], [0.23, 0.30, 1.00]])


# -----------------------------------------------------------------------------
# the peers, each in a process of its own: job -> dict(seconds of each step, computed tokens, ...)

def sync(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def read_pairs(job):
    """[[prompt, chosen, rejected], ...], lists of ids, as dpo.py reads them."""
    groups = Groups('data/bench', 'train')
    return [[piece.tolist() for piece in groups[i]] for i in range(len(groups))]


def child_padded(job):
    """Plain DPO: right-padded concatenation, full logits. `computed` counts tokens of the policy's passes."""
    import torch.nn.functional as F
    from transformers import GPT2LMHeadModel
    from dpo import dpo_loss
    pairs, B, micro, device = read_pairs(job), job['batch_size'], job['micro'], job['device']
    policy, reference = (GPT2LMHeadModel.from_pretrained('init', dtype=torch.float32, attn_implementation='sdpa').to(device)
                         for _ in range(2))
    policy.train()                  # the weights' config has no dropout
    reference.eval()
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=LEARNING_RATE)
    autocast = torch.autocast(device, torch.bfloat16) if job['dtype'] == 'bfloat16' else nullcontext()

    def sequence_logps(model, ids, scored):
        # causal attention never looks right, where the padding is: no mask, which is sdpa's fastest path
        logps = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)              # (2B, T-1, V)
        return (logps.gather(2, ids[:, 1:, None])[:, :, 0] * scored[:, 1:]).sum(1)              # (2B,)

    seconds, computed, losses = [], 0, []
    rng = np.random.default_rng(job['seed'])
    sync(device)
    began = time.perf_counter()
    for _ in range(job['epochs'] + 1):
        order = rng.permutation(len(pairs))
        for start in range(0, len(pairs), B):
            total = 0.0
            for i in range(start, start + B, micro):
                some = [pairs[j] for j in order[i:i + micro]]
                texts = [(prompt, pair[side]) for side in (1, 2) for pair in some for prompt in pair[:1]]
                T = max(len(prompt) + len(response) for prompt, response in texts)
                ids, scored = torch.full((len(texts), T), job['vocab'] - 1), torch.zeros(len(texts), T)
                for row, (prompt, response) in enumerate(texts):
                    end = len(prompt) + len(response)
                    ids[row, :end], scored[row, len(prompt):end] = torch.tensor(prompt + response), 1
                computed += ids.numel()
                ids, scored = ids.to(device), scored.to(device)
                with autocast:
                    with torch.no_grad():
                        ref = sequence_logps(reference, ids, scored)
                    logps = sequence_logps(policy, ids, scored)
                pair_losses, _, _ = dpo_loss(*logps.chunk(2), *ref.chunk(2), 0.1)
                (pair_losses.sum() / B).backward()
                total += pair_losses.sum().item() / B
            torch.nn.utils.clip_grad_norm_(policy.parameters(), GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sync(device)
            now = time.perf_counter()
            seconds, began = seconds + [now - began], now
            losses.append(total)
            print(f'step {len(seconds)} | loss {total:.4f}', flush=True)
    return dict(seconds=seconds, computed=computed, first_loss=losses[0], note=f'{micro} pairs a micro-step')


def child_trl(job):
    """TRL's DPOTrainer on the same token ids; job['best'] for its best settings."""
    import datasets
    import tokenizers
    import transformers
    import trl
    pairs, device, bf16 = read_pairs(job), job['device'], job['dtype'] == 'bfloat16'
    on, best, init_kwargs = [], {}, {}
    if job['best']:
        pairs.sort(key=lambda pair: len(pair[0]) + max(map(len, pair[1:])))      # less padding where it precomputes
        best = dict(gradient_checkpointing=False, precompute_ref_log_probs=True, train_sampling_strategy='group_by_length',
                    remove_unused_columns=False)
        on = ['precomputed reference', 'no checkpointing', 'grouped by length']
        if device == 'cuda' and importlib.util.find_spec('flash_attn'):
            init_kwargs['attn_implementation'] = 'flash_attention_2'
            best['padding_free'] = True
            on.append('FlashAttention 2')
        if device == 'cuda' and importlib.util.find_spec('liger_kernel'):
            best['use_liger_kernel'] = True
            on.append('Liger')
    data = dict(zip(('prompt_ids', 'chosen_ids', 'rejected_ids'), map(list, zip(*pairs))))
    if job['best']:
        data['length'] = [len(pair[0]) + max(map(len, pair[1:])) for pair in pairs]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<|endoftext|>': job['vocab'] - 1}, unk_token='<|endoftext|>'))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|endoftext|>', pad_token='<|endoftext|>')

    precomputing = [0.0]
    precompute = trl.DPOTrainer._precompute_ref_logps

    def timed_precompute(self, *args):
        began = time.perf_counter()
        result = precompute(self, *args)
        precomputing[0] += time.perf_counter() - began
        return result

    trl.DPOTrainer._precompute_ref_logps = timed_precompute
    trl.DPOTrainer._prepare_dataset = lambda self, dataset, *args: dataset         # these are ids already
    config = trl.DPOConfig(
        'trl', max_length=job['max_length'], bf16=bf16, use_cpu=device == 'cpu', seed=job['seed'],
        per_device_train_batch_size=job['micro'], gradient_accumulation_steps=job['batch_size'] // job['micro'],
        num_train_epochs=job['epochs'] + 1, optim='rmsprop', learning_rate=LEARNING_RATE, lr_scheduler_type='constant',
        max_grad_norm=GRAD_CLIP, model_init_kwargs=init_kwargs, save_strategy='no', report_to='none', disable_tqdm=True,
        logging_steps=1, **best)
    trainer = trl.DPOTrainer('init', args=config, train_dataset=datasets.Dataset.from_dict(data), processing_class=tokenizer)
    if getattr(trainer, 'padding_free', False):
        on.append('padding_free')
    collate, counted, stamps = trainer.data_collator, [0], []

    def counting(examples):
        batch = collate(examples)
        counted[0] += batch['input_ids'].numel()
        return batch

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            sync(device)
            stamps.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            sync(device)
            stamps.append(time.perf_counter())
            print(f'step {state.global_step}', flush=True)

    trainer.data_collator = counting
    trainer.add_callback(Clock())
    trainer.train()
    losses = [record['loss'] for record in trainer.state.log_history if 'loss' in record]
    note = f'TRL {trl.__version__}, {job["micro"]} pairs a micro-step' + ''.join(f', {name}' for name in on)
    return dict(seconds=np.diff(stamps).tolist(), computed=counted[0], first_loss=losses[0], note=note,
                precompute_seconds=precomputing[0] or None)


def child_sample(job):
    """Tokens a second of GPT.generate at batch 1 and 64; no end token, so that every sequence runs its length."""
    device, new = job['device'], job['new_tokens']
    model = GPT.from_pretrained('init').to(device).eval()
    prompts = [pair[0][-256:] for pair in read_pairs(job)]
    autocast = torch.autocast(device, torch.bfloat16) if job['dtype'] == 'bfloat16' else nullcontext()
    rows = []
    for B in (1, 64):
        some = [prompts[i % len(prompts)] for i in range(B)]
        with autocast:
            model.generate(some, 4, end_token=-1)
            sync(device)
            began = time.perf_counter()
            drawn = model.generate(some, new, end_token=-1)
            sync(device)
        seconds = time.perf_counter() - began
        tokens = sum(map(len, drawn))
        rows.append(dict(batch=B, new_tokens=tokens, seconds=seconds, tokens_per_second=tokens / seconds))
        print(f'batch {B}: {tokens / seconds:,.0f} tokens/s', flush=True)
    return dict(rows=rows)


def child(kind, job, result):
    job = json.loads(job)
    try:
        found = dict(padded=child_padded, trl=child_trl, sample=child_sample)[kind](job)
    except ModuleNotFoundError as error:
        raise SystemExit(f'needs {error.name}, which is not installed: pip install {(error.name or "").partition(".")[0]}') from None
    if job['device'] == 'cuda':
        found['memory_gb'] = torch.cuda.max_memory_allocated() / 1e9
    with open(result, 'w') as f:
        json.dump(found, f)


# -----------------------------------------------------------------------------
# running them

def watch(label, command, cwd):
    """Run a child to its end, its last line moving on the terminal. -> dict(status, lines [(second, text)], seconds, rss_gb)"""
    env = dict(os.environ, PYTHONUNBUFFERED='1', TORCH_LOGS='recompiles', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false',
               HF_DATASETS_CACHE=os.path.join(cwd, 'hf'))
    env.setdefault('CUDA_VISIBLE_DEVICES', '0')         # one GPU; TRL refuses to start where it sees several
    if command[1].endswith('prepare_prefs.py'):
        del env['HF_HUB_OFFLINE'], env['HF_DATASETS_CACHE']     # --data may be a hub name
    began, lines = time.perf_counter(), []
    process = subprocess.Popen(command, cwd=cwd, env=env, text=True, errors='replace', stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def read():
        for line in process.stdout:
            if line.strip():
                lines.append((time.perf_counter() - began, line.rstrip()))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    width = shutil.get_terminal_size().columns - 1
    try:
        while reader.is_alive():
            reader.join(0.25)
            if sys.stderr.isatty():
                text = f'{label:<19}{time.perf_counter() - began:6.0f} s  {lines[-1][1] if lines else "starting"}'
                print('\r' + text[:width].ljust(width), end='', file=sys.stderr, flush=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.kill()
        if sys.stderr.isatty():
            print('\r' + ' ' * width, end='\r', file=sys.stderr, flush=True)
    rss = usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9
    return dict(status=process.returncode, lines=lines, seconds=time.perf_counter() - began, rss_gb=rss)


def out_of_memory(ran):
    text = '\n'.join(line for _, line in ran['lines'][-50:]).lower()
    return ran['status'] == -9 or 'out of memory' in text or "can't allocate memory" in text


def why(ran):
    """One line on why a child failed; '' where it did not."""
    if ran['status'] == 0:
        return ''
    if ran['status'] == -9:
        return 'killed (signal 9): out of memory?'
    if ran['status'] < 0:
        return f'ended by signal {-ran["status"]}'
    if out_of_memory(ran):
        return 'out of memory'
    return (ran['lines'][-1][1].strip() if ran['lines'] else f'exit status {ran["status"]}')[:200]


def run_peer(label, kind, job, cwd):
    """A child of this file. -> (what watch saw, its result or None)"""
    result = os.path.join(cwd, 'result.json')
    if os.path.exists(result):
        os.remove(result)
    ran = watch(label, [sys.executable, os.path.abspath(__file__), f'child:{kind}', json.dumps(job), result], cwd)
    if ran['status']:
        return ran, None
    with open(result) as f:
        return ran, json.load(f)


def run_dpo(label, options, flags, cwd, name='bench'):
    """dpo.py as a user runs it. -> (what watch saw, the training records of log.jsonl)"""
    shutil.rmtree(os.path.join(cwd, 'out'), ignore_errors=True)
    ran = watch(label, [sys.executable, os.path.join(ROOT, 'dpo.py'), f'--name={name}', '--init_from=init', '--optimizer=rmsprop',
                        f'--learning_rate={LEARNING_RATE}', f'--grad_clip={GRAD_CLIP}', '--warmup_steps=0', '--log_interval=1',
                        '--eval_interval=0', '--save_interval=0', f'--batch_size={options.batch_size}', f'--seed={options.seed}',
                        f'--device={options.device}', f'--dtype={options.dtype}', *options.ours, *flags], cwd)
    records = []
    if not ran['status']:
        with open(os.path.join(cwd, 'out', name, 'dpo', 'log.jsonl')) as f:
            records = [record for record in map(json.loads, f) if 'pairs_per_second' in record]
    shutil.rmtree(os.path.join(cwd, 'out'), ignore_errors=True)        # a checkpoint is large
    return ran, records


def line_times(lines, kind):
    """When the log lines of dpo.py came: {step: second}. kind: 'step' or 'eval'."""
    found = ((re.match(kind + r'\s+([\d,]+)/', line), second) for second, line in lines)
    return {int(match[1].replace(',', '')): second for match, second in found if match}


def recompiles_after(lines, first, last):
    """torch.compile's messages between the log lines of two steps."""
    steps = line_times(lines, 'step')
    return sum('Recompiling function' in line for second, line in lines if steps[first] < second <= steps[last])


def precompute_seconds(lines):
    """From dpo.py's line that it starts on train to its line on val; None where it says neither."""
    marks = [second for second, line in lines if line.startswith('reference log-probs of ')]
    return marks[1] - marks[0] if len(marks) == 2 else None


def measure_ours(contender, options, data, cwd, flags=()):
    steps = options.pairs // options.batch_size
    ran, records = run_dpo(contender, options, [f'--epochs={options.epochs + 1}', *OURS[contender], *flags], cwd)
    if ran['status']:
        return dict(contender=contender, error=why(ran))
    padding = [record.get('padding') for record in records]
    tokens = [record['tokens_per_second'] / record['pairs_per_second'] * options.batch_size for record in records]
    return finish(dict(
        contender=contender, seconds=[options.batch_size / record['pairs_per_second'] for record in records],
        computed=None if None in padding else round(sum(t / (1 - p) for t, p in zip(tokens, padding))),
        first_loss=records[0]['loss'], recompiles=recompiles_after(ran['lines'], steps, len(records)),
        memory_gb=max(record.get('memory_gb', 0) for record in records) or None if options.device == 'cuda' else ran['rss_gb'],
        precompute_seconds=precompute_seconds(ran['lines']), note=' '.join(OURS[contender] + list(flags)), forwards=3 if
        '--precompute_ref=True' in OURS[contender] else 4, wall_seconds=ran['seconds']), options, data)


def measure_peer(contender, options, data, cwd):
    kind, best = contender.partition('-')[0], contender == 'trl-best'
    rows = []
    for micro in options.micro_batch if best else [math.gcd(8, options.batch_size)]:
        while True:
            job = dict(device=options.device, dtype=options.dtype, batch_size=options.batch_size, micro=micro, best=best,
                       epochs=options.epochs, seed=options.seed, max_length=options.max_length)
            ran, result = run_peer(contender + f' ({micro})' * best, kind, job, cwd)
            if result is None and out_of_memory(ran) and micro > 1 and not best:
                micro = math.gcd(micro // 2, options.batch_size)       # what a user would do
                continue
            break
        if result is None:
            rows.append(dict(contender=contender, micro_batch=micro, error=why(ran)))
        else:
            result.setdefault('memory_gb', ran['rss_gb'])
            rows.append(finish(dict(contender=contender, micro_batch=micro, forwards=3 if best else 4, recompiles=None,
                                    wall_seconds=ran['seconds'], **result), options, data))
    ran = [row for row in rows if 'error' not in row]
    row = max(ran, key=lambda row: row['pairs_per_second']) if ran else rows[0]
    if len(rows) > 1:
        row['tried'] = {str(r['micro_batch']): r.get('pairs_per_second', r.get('error')) for r in rows}
    return row


def finish(row, options, data):
    """Add what follows from the seconds of the steps: the first epoch is warm-up, the others are measured."""
    steps = options.pairs // options.batch_size
    epochs = np.array(row['seconds']).reshape(-1, steps).sum(1)
    assert len(epochs) == options.epochs + 1, f'{row["contender"]}: {len(row["seconds"])} steps, not {options.epochs + 1} epochs of {steps}'
    seconds, computed = float(np.median(epochs[1:])), row.pop('computed')
    computed = computed and computed / len(epochs)                              # an epoch's; each has another order
    flops = data['forward_flops'] * row.pop('forwards')
    row.update(epoch_seconds=epochs.tolist(), pairs_per_second=options.pairs / seconds,
               tokens_per_second=data['distinct_tokens'] / seconds, computed_tokens=computed,
               waste=computed and 1 - data['distinct_tokens'] / computed, useful_flops_per_second=flops / seconds,
               besides_seconds=row['wall_seconds'] - len(epochs) * seconds)
    if row.get('precompute_seconds'):
        row['pairs_per_second_1_epoch'] = options.pairs / (seconds + row['precompute_seconds'])
    return row


# -----------------------------------------------------------------------------
# data, weights and the machine

def synthetic(folder, n, seed):
    """n pairs in train.jsonl and 8 in val.jsonl, of random letters, one a token to prepare's `bytes`; HH's lengths."""
    rng = np.random.default_rng(seed)
    covariance = HH_CORRELATION * HH_STD[:, None] * HH_STD
    os.makedirs(folder)
    for split, rows in (('train', n), ('val', 8)):
        lengths = np.exp(rng.multivariate_normal(HH_MEAN, covariance, rows)).round().clip(1).astype(int)
        with open(os.path.join(folder, f'{split}.jsonl'), 'w') as f:
            for row in lengths:
                prompt, chosen, rejected = (bytes(rng.integers(97, 123, n, dtype=np.uint8)).decode() for n in row)
                f.write(json.dumps(dict(prompt=prompt, chosen='c' + chosen[1:], rejected='r' + rejected[1:])) + '\n')


def write_bench(cwd, name, train, val, seed, random_ids):
    """data/<name>: `train` and `val` pairs drawn from those of data/all; random_ids: over GPT-2's vocabulary instead."""
    everything = {split: Groups(os.path.join(cwd, 'data', 'all'), split) for split in ('train', 'val')}
    meta, folder = dict(everything['train'].meta), os.path.join(cwd, 'data', name)
    rng = np.random.default_rng(seed)
    shutil.copytree(os.path.join(cwd, 'data', 'all'), folder)
    meta['splits'] = {}
    for split, n in (('train', train), ('val', val)):
        groups = everything[split if n <= len(everything[split]) else 'train']
        pieces = [piece for i in rng.permutation(len(groups))[:n] for piece in groups[i]]
        tokens = np.concatenate(pieces).astype(np.uint16)
        if random_ids:
            tokens = np.where(tokens == meta['eot_token'], VOCAB - 1, rng.integers(0, VOCAB - 1, len(tokens))).astype(np.uint16)
        ends = np.cumsum([len(piece) for piece in pieces]).reshape(n, 3)                        # (N, K+1)
        index = np.column_stack((np.append(0, ends[:-1, -1]), ends)).astype(np.int64)           # (N, K+2)
        path = os.path.join(folder, split)
        tokens.tofile(f'{path}.bin')
        np.save(f'{path}.idx.npy', index)
        meta['splits'][split] = dict(meta['splits'].get(split, {}), groups=n, K=2, tokens=len(tokens), dtype='uint16',
                                     longest=int((index[:, -1] - index[:, 0]).max()),
                                     bin_sha256=sha256_file(f'{path}.bin'), idx_sha256=sha256_file(f'{path}.idx.npy'))
    if random_ids:
        meta.update(vocab_size=VOCAB, eot_token=VOCAB - 1)
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump(meta, f)


def matmul_peak(device, dtype, width):
    """The fastest of several matmuls, FLOP/s: {shape: rate}, best of five each."""
    big = 8192 if device == 'cuda' else 2048
    shapes = [(big, big, big), (big, width, 4 * width), (big, 4 * width, width), (min(big, 2048), width, VOCAB)]
    rates = {}
    for M, K, N in shapes:
        a, b = (torch.randn(*shape, device=device, dtype=getattr(torch, dtype)) for shape in ((M, K), (N, K)))
        best = math.inf
        for _ in range(6):
            sync(device)
            began = time.perf_counter()
            a @ b.t()
            sync(device)
            best = min(best, time.perf_counter() - began)
            if best > 2:
                break                                   # a type that this machine only emulates
        rates[f'{M}x{K}x{N}'] = 2 * M * K * N / best
    return rates


# -----------------------------------------------------------------------------
# tables

def table(rows, columns):
    """An aligned Markdown table. columns: {title: function of a row, giving a string}."""
    lines = [list(columns)] + [[show(row) for show in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]

    def line(cells):
        return '| ' + ' | '.join(cell.ljust(w) if i in (0, len(widths) - 1) else cell.rjust(w)
                                 for i, (cell, w) in enumerate(zip(cells, widths))) + ' |'
    return '\n'.join([line(lines[0]), '|' + '|'.join('-' * (w + 1) + ('-' if i in (0, len(widths) - 1) else ':')
                                                     for i, w in enumerate(widths)) + '|', *map(line, lines[1:])])


def number(key, form):
    """A column: the row's value of that name, '-' where there is none."""
    return lambda row: '-' if row.get(key) is None else form.format(row[key])


def note(row):
    return row.get('error') or row.get('note') or ''


TRAIN = {'contender': lambda row: row['contender'], 'pairs/s': number('pairs_per_second', '{:,.2f}'),
         'tokens/s': number('tokens_per_second', '{:,.0f}'), 'waste': number('waste', '{:.0%}'),
         'memory GB': number('memory_gb', '{:.2f}'), 'of peak': number('of_peak', '{:.1%}'),
         'besides s': number('besides_seconds', '{:,.1f}'), 'recompiles': number('recompiles', '{}'),
         'precompute s': number('precompute_seconds', '{:,.1f}'), '1 epoch': number('pairs_per_second_1_epoch', '{:,.2f}'),
         **{f'x {peer}': number(f'times_{peer}', '{:.2f}') for peer in PEERS}, 'note': note}


# -----------------------------------------------------------------------------
# sections: each -> rows for one table

def section_train(options, data, cwd):
    rows = []
    for contender in options.contenders:
        if contender == 'ours+compile' and options.device == 'cpu' and not any(map(shutil.which, ('c++', 'g++', 'clang++'))):
            rows.append(dict(contender=contender, error='no C++ compiler'))
        else:
            rows.append((measure_peer if contender in PEERS else measure_ours)(*(contender, options, data, cwd)))
        print(progress(rows[-1]), flush=True)
    for peer in PEERS:
        rate = next((row['pairs_per_second'] for row in rows if row['contender'] == peer and 'error' not in row), None)
        for row in rows:
            if rate and 'error' not in row:
                row[f'times_{peer}'] = row['pairs_per_second'] / rate
    return rows


def progress(row):
    """A contender's line on the terminal, as it ends."""
    if 'error' in row:
        return f'{row["contender"]:<19}{row["error"]}'
    return (f'{row["contender"]:<19}{row["pairs_per_second"]:>10,.2f} pairs/s{row["tokens_per_second"]:>12,.0f} tokens/s'
            f'{row["memory_gb"] or 0:>8.2f} GB{row["besides_seconds"]:>9,.1f} s besides')


def section_eval(options, data, cwd):
    """dpo.py's evaluation after a single step: from that step's log line to the evaluation's. The one before it warms up."""
    write_bench(cwd, 'bench-eval', options.batch_size, options.pairs, options.seed, not options.data)
    ran, _ = run_dpo('eval', options, ['--max_steps=1'], cwd, 'bench-eval')
    ends, begins = line_times(ran['lines'], 'eval'), line_times(ran['lines'], 'step')
    if ran['status'] or 1 not in ends or 1 not in begins:
        return [dict(pairs=options.pairs, error=why(ran) or 'dpo.py printed no line of its evaluation')]
    seconds = ends[1] - begins[1]
    return [dict(pairs=options.pairs, seconds=seconds, pairs_per_second=options.pairs / seconds)]


def section_sample(options, data, cwd):
    job = dict(device=options.device, dtype=options.dtype, new_tokens=128 if options.model != 'tiny' else 32)
    ran, result = run_peer('sample', 'sample', job, cwd)
    return result['rows'] if result else [dict(error=why(ran))]


def section_rows(options, data, cwd):
    """Training at several --row_tokens, one epoch after one of warm-up."""
    rows, short = [], argparse.Namespace(**{**vars(options), 'epochs': 1})
    for size in options.row_tokens:
        row = measure_ours('ours', short, data, cwd, [f'--row_tokens={size}'])
        rows.append(dict(row, row_tokens=size, step_seconds=float(np.mean(row['seconds'][len(row['seconds']) // 2:]))
                         if 'error' not in row else None))
        print(f'row_tokens {size:>7,} ' + progress(row), flush=True)
    return rows


def section_largest(options, data, cwd):
    """CUDA: the longest row that one micro-step can take, doubled until out of memory, for each size of GPT-2."""
    if options.device != 'cuda':
        return [dict(model='-', error='needs CUDA')]
    rows = []
    for model in [name for name in MODELS if name != 'tiny']:
        write_weights(os.path.join(cwd, 'init'), model, options.seed)
        for checkpointing in (False, True):
            row = dict(model=model, checkpointing=checkpointing, error='out of memory at 2,048 tokens')
            size = 2048
            while True:
                # enough pairs to fill the first row
                n = min(options.pairs, math.ceil(1.2 * size * options.pairs / data['distinct_tokens']))
                trial = argparse.Namespace(**{**vars(options), 'batch_size': n})
                ran, records = run_dpo(f'{model} {size:,}', trial, ['--max_steps=2', f'--row_tokens={size}',
                                                                    f'--activation_checkpointing={checkpointing}'], cwd)
                if ran['status']:
                    if not out_of_memory(ran):
                        row['error'] = why(ran)
                    break
                row = dict(model=model, checkpointing=checkpointing, row_tokens=size, memory_gb=records[-1].get('memory_gb'),
                           tokens_per_second=records[-1]['tokens_per_second'])
                if n == options.pairs:
                    row['note'] = 'more would fit: set a larger --pairs'
                    break
                size *= 2
            rows.append(row)
            print(f'{model:<19}checkpointing {checkpointing!s:<6}' + (f'{row["row_tokens"]:,} tokens' if 'row_tokens' in row else row['error']))
    return rows


def write_weights(folder, model, seed):
    layers, heads, width = MODELS[model]
    torch.manual_seed(seed)
    GPT(GPTConfig(1024, VOCAB, layers, heads, width)).save_pretrained(folder)


TABLES = {          # section: (title, columns)
    'train': ('DPO training', TRAIN),
    'prepare': ('prepare_prefs.py', {'tokenizer': lambda row: row['tokenizer'], 'rows': number('rows', '{:,}'),
                                     's': number('seconds', '{:.1f}'), 'rows/s': number('rows_per_second', '{:,.0f}'), 'note': note}),
    'eval': ('dpo.py: evaluation, both models', {'pairs': number('pairs', '{:,}'), 's': number('seconds', '{:.2f}'),
                                    'pairs/s': number('pairs_per_second', '{:,.2f}'), 'note': note}),
    'sample': ('GPT.generate, with its cache', {'batch': number('batch', '{}'), 'new tokens': number('new_tokens', '{:,}'),
                                    's': number('seconds', '{:.2f}'), 'tokens/s': number('tokens_per_second', '{:,.0f}'), 'note': note}),
    'rows': ('dpo.py: --row_tokens', {'row_tokens': number('row_tokens', '{:,}'), 's a step': number('step_seconds', '{:.3f}'),
                                    'tokens/s': number('tokens_per_second', '{:,.0f}'), 'waste': number('waste', '{:.0%}'),
                                    'memory GB': number('memory_gb', '{:.2f}'), 'note': note}),
    'largest': ('dpo.py: the longest row in one micro-step', {
        'model': number('model', '{}'), 'checkpointing': number('checkpointing', '{}'), 'row_tokens': number('row_tokens', '{:,}'),
        'memory GB': number('memory_gb', '{:.1f}'), 'tokens/s': number('tokens_per_second', '{:,.0f}'), 'note': note}),
}


# -----------------------------------------------------------------------------
# the run

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f'error: {message} (--help lists the options)')

    def names(text):
        return [name for name in text.split(',') if name]

    def integers(text):
        return [int(name) for name in names(text)]
    add = parser.add_argument
    add('--device', default='auto', choices=['auto', 'cpu', 'cuda'])
    add('--dtype', default='auto', choices=['auto', 'float32', 'bfloat16'], help='auto: whose matmuls are faster here')
    add('--model', default='gpt2', choices=list(MODELS), help='random weights of that size')
    add('--data', default='', help="pairs, as prepare_prefs.py's --source takes them (needs GPT-2's BPE); default: synthetic")
    add('--data_dir', default='', help='a subset inside --data')
    add('--pairs', type=int, default=0, help='of an epoch; default 32 on CPU, 512 on CUDA')
    add('--batch_size', type=int, default=0, help='pairs an optimizer step; default 16 on CPU, 64 on CUDA')
    add('--micro_batch', type=integers, default=None, help='pairs a micro-step that trl-best tries; default 4,8 or 8,16,32,64')
    add('--max_length', type=int, default=512, help='tokens of a prompt and a response; prompts are cut to half of it')
    add('--epochs', type=int, default=2, help='measured, after one of warm-up')
    add('--contenders', type=names, default=None, help=','.join([*OURS, *PEERS]))
    add('--sections', type=names, default=SECTIONS, help=','.join(SECTIONS))
    add('--row_tokens', type=integers, default=None, help='values that the section rows tries')
    add('--ours', type=str.split, default=[], help="flags for every run of dpo.py, e.g. --ours='--row_tokens=4096'")
    add('--seed', type=int, default=1337)
    add('--out', default='', help='writes OUT.json and OUT.md')
    options = parser.parse_args(argv)

    def check(good, message):
        if not good:
            parser.error(message)
    cuda = torch.cuda.is_available()
    check(options.device != 'cuda' or cuda, 'device=cuda, but torch sees no GPU')
    options.device = options.device if options.device != 'auto' else 'cuda' if cuda else 'cpu'
    cuda = options.device == 'cuda'
    options.pairs = options.pairs or (512 if cuda else 32)
    options.batch_size = options.batch_size or min(options.pairs, 64 if cuda else 16)
    for key in ('pairs', 'batch_size', 'epochs'):
        check(getattr(options, key) >= 1, f'{key}={getattr(options, key)} must be at least 1')
    check(options.pairs % options.batch_size == 0,
          f'pairs={options.pairs} must be a multiple of batch_size={options.batch_size}: an epoch is whole steps')
    if options.micro_batch is None:
        options.micro_batch = sorted({math.gcd(n, options.batch_size) for n in ((8, 16, 32, 64) if cuda else (4, 8))})
    for micro in options.micro_batch:
        check(micro >= 1 and options.batch_size % micro == 0, f'micro_batch={micro} must divide batch_size={options.batch_size}')
    check(options.micro_batch, 'micro_batch names no size')
    check(4 <= options.max_length <= 1024, f'max_length={options.max_length} must be 4 to 1024')
    options.contenders = options.contenders or [name for name in [*OURS, *PEERS] if name != ('ours+compile' if cuda else 'ours-compile')]
    options.row_tokens = options.row_tokens or ([4096, 8192, 16384, 32768] if cuda else [1024, 2048, 4096])
    for key, known in (('contenders', [*OURS, *PEERS]), ('sections', SECTIONS)):
        wrong = [name for name in getattr(options, key) if name not in known]
        check(not wrong, f'{key}: unknown {", ".join(map(repr, wrong))}; known: {", ".join(known)}')
    check(os.path.isdir(os.path.dirname(options.out) or '.'), f'out={options.out}: no such folder')
    return options


def main(argv=None):
    options = parse(argv)
    if options.data and os.path.exists(options.data):
        options.data = os.path.abspath(options.data)
    with tempfile.TemporaryDirectory(prefix='throughput-') as cwd:
        report = measure(options, cwd)
    lines = report['heading'].split('\n')
    for section in [name for name in SECTIONS if name in report]:
        lines += ['', f'## {TABLES[section][0]}', '', table(report[section], TABLES[section][1])]
    text = '\n'.join(lines)
    print('\n' + text)
    if options.out:
        with open(f'{options.out}.json', 'w') as f:
            json.dump(report, f, indent=1)
        with open(f'{options.out}.md', 'w') as f:
            f.write(text + '\n')


def measure(options, cwd):
    """Everything in the folder cwd. -> the report, a dict"""
    device, width = options.device, MODELS[options.model][2]
    print('timing matmuls', flush=True)
    both = {dtype: matmul_peak(device, dtype, width) for dtype in ('float32', 'bfloat16') if options.dtype in ('auto', dtype)}
    if options.dtype == 'auto':
        options.dtype = max(both, key=lambda dtype: max(both[dtype].values()))
    before = both[options.dtype]

    # data: all of it through prepare_prefs.py, then the pairs of this run
    source = options.data
    if not source:
        source = os.path.join(cwd, 'synthetic')
        synthetic(source, max(options.pairs, 5000 if 'prepare' in options.sections else 0), options.seed)
    ran = watch('prepare', [sys.executable, os.path.join(ROOT, 'prepare_prefs.py'), '--name=all', f'--source={source}',
                            f'--data_dir={options.data_dir}', f'--tokenizer={"gpt2" if options.data else "bytes"}',
                            f'--max_length={options.max_length}', f'--max_prompt_length={options.max_length // 2}'], cwd)
    if ran['status']:
        sys.exit(f'error: prepare_prefs.py: {why(ran).removeprefix("error: ")}')
    everything = Groups(os.path.join(cwd, 'data', 'all'), 'train')
    if len(everything) < options.pairs:
        sys.exit(f'error: {options.data} has {len(everything):,} usable pairs, --pairs asks for {options.pairs:,}')
    rows = sum(info.get('read', info['groups']) for info in everything.meta['splits'].values())
    prepared = dict(tokenizer='gpt2' if options.data else 'bytes', rows=rows, seconds=ran['seconds'], rows_per_second=rows / ran['seconds'],
                    note='the whole process, its start included')
    write_bench(cwd, 'bench', options.pairs, min(8, options.pairs), options.seed, random_ids=not options.data)
    write_weights(os.path.join(cwd, 'init'), options.model, options.seed)
    bench = Groups(os.path.join(cwd, 'data', 'bench'), 'train')
    ids, (layers, heads, _) = np.arange(len(bench)), MODELS[options.model]
    data = dict(source=options.data or "synthetic, HH's lengths", pairs=len(bench), distinct_tokens=int(bench.lengths.sum()),
                response_tokens=bench.response_tokens(ids), longest=int(bench.lengths.max()),
                forward_flops=bench.forward_flops(ids, GPTConfig(1024, VOCAB, layers, heads, width)))
    name = torch.cuda.get_device_name() if device == 'cuda' else f'{platform.machine()}, {os.cpu_count()} cores'
    first = (f'{options.model} in {options.dtype} on {name}, torch {torch.__version__}, Python {platform.python_version()}; '
             f'{data["pairs"]:,} pairs ({data["source"]}), batches of {options.batch_size}; {data["distinct_tokens"]:,} distinct '
             f'tokens, {data["response_tokens"]:,} of them in responses; {options.epochs} epoch{"s" * (options.epochs > 1)} after one of warm-up.')
    print(first, flush=True)

    report = dict(heading=first, options=vars(options), data=data, torch=torch.__version__)
    if 'prepare' in options.sections:
        report['prepare'] = [prepared]
    for section in SECTIONS:
        if section in options.sections and section != 'prepare':
            report[section] = globals()[f'section_{section}'](options, data, cwd)
        if section == 'train':
            after = matmul_peak(device, options.dtype, width)
    peak = max(*before.values(), *after.values())
    report['peak'] = dict(dtype=options.dtype, before=before, after=after, other=both, flops_per_second=peak)
    for row in report.get('train', []):
        if 'error' not in row:
            row['of_peak'] = row['useful_flops_per_second'] / peak
    report['heading'] += '\nMatmul peak, ' + ', '.join(
        [f'{options.dtype} {max(rates.values()) / 1e9:,.1f} GFLOP/s {when}' for when, rates in (('before', before), ('after', after))]
        + [f'{dtype} {max(rates.values()) / 1e9:,.1f}' for dtype, rates in both.items() if dtype != options.dtype]) + '.'
    return report


if __name__ == '__main__':
    if len(sys.argv) == 4 and sys.argv[1].startswith('child:'):
        child(sys.argv[1][6:], *sys.argv[2:])
    else:
        main()
