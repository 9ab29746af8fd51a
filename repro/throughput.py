"""The yardstick: DPO pairs per second, ours beside a plain padded loop and TRL, on the same pairs, weights and machine.

    python repro/throughput.py                                                  # gpt2 where you are, random pairs
    python repro/throughput.py --model=tiny --contenders=ours,padded --sections=train        # half a minute
    python repro/throughput.py --data=Anthropic/hh-rlhf --data_dir=harmless-base --pairs=64 --out=hh
    python repro/throughput.py --device=cuda --model=gpt2-xl --pairs=1024 --data=Anthropic/hh-rlhf --out=xl

Contenders, each in a process of its own, all with RMSprop, the same learning rate, clipping, precision (bfloat16 is
autocast over float32 weights) and pairs a step:
  ours        dpo.py with its defaults, but for its checkpoints; ours+compile, ours-compile, ours+precomputed,
              ours+checkpointing change one
  padded      what most people write (child_padded below): chosen and rejected as 2B right-padded sequences, the prompt
              in both, causal attention, logits of every position, log_softmax, gather, mask, sum; 8 pairs a micro-step
  padded-nocudnn   the same without cuDNN's attention, which plans for every new length, on CUDA
  trl         TRL's DPOTrainer as it comes. Its defaults, read in 1.16.0: 8 pairs a micro-step, gradient checkpointing
              ON, random order, a live reference, and a head in chunks that scores completion tokens alone on CUDA but
              every position, padding too, on CPU. It is spared its tokenisation: it gets the same ids
  trl-best    without checkpointing, the reference precomputed, batches grouped by length, each --micro_batch tried and
              the fastest shown; on CUDA with FlashAttention 2 and Liger where they are installed. padding_free is
              asked for with FlashAttention, but 1.16.0 turns it off with a warning. torch.compile is not tried
`pip install trl` for the last two. A contender that cannot run gets a row that says why; the largest micro-step that
memory holds is found by halving.

How it counts. A run is one epoch of warm-up and then --epochs more; each visits every pair once, so all do the same
work. pairs/s is an epoch's pairs over the median epoch's seconds: ours by log.jsonl (data, both models, optimizer,
not the log line), the peers' from the end of one step to the end of the next. tokens/s counts distinct tokens: a
prompt once for both responses. waste is the share of the tokens run through the policy that repeat a prompt or are
padding. Useful FLOPs are those of distinct tokens with heads at response tokens alone (Groups.forward_flops), times
4 for the reference's forward, the policy's and two for its backward, times 3 where the reference is precomputed,
whatever a contender computes. "of peak" is against the fastest of several matmuls of the same type, timed before
and after the contenders. Memory is the process's largest resident size (CPU) or CUDA's largest allocation, 1 GB =
1e9 bytes; "reserved" is what CUDA's allocator held for it. "besides" is the wall-clock of the process but for its
epochs at median speed: imports, loading, compiling, precomputing, and ours its evaluations. "first" is part of it:
what the first step, and ours the first evaluation, took beyond a later one, which is compiling. "1 epoch" is
pairs/s with the precomputing spread over one epoch.

No network is needed: the weights are random, and without --data so are the tokens, with lengths by HH's law. The
weights go to $TMPDIR: 6 GB for gpt2-xl. --out is written anew after every contender, so a run that is cut loses one.
"""
import argparse
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

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from model import GPT, GPTConfig                        # noqa: E402
from nanodpo import checkpoint                          # noqa: E402
from nanodpo.data import Groups, write_meta, write_split            # noqa: E402
from nanodpo import hf                                 # noqa: E402
from nanodpo.export import save_pretrained              # noqa: E402
from nanodpo.run import Worker                          # noqa: E402
from sweep import write_json                            # noqa: E402

MODELS = {'tiny': (2, 2, 64), 'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
          'gpt2-xl': (48, 25, 1600)}                    # layers, heads, width; tiny is for a look at this script
OURS = {'ours': [], 'ours+compile': ['--compile=True'], 'ours-compile': ['--compile=False'],
        'ours+precomputed': ['--precompute_ref=True'], 'ours+checkpointing': ['--activation_checkpointing=True']}
PEERS = ['padded', 'padded-nocudnn', 'trl', 'trl-best']
SECTIONS = ['train', 'prepare', 'eval', 'sample', 'rows', 'largest']
LEARNING_RATE, GRAD_CLIP = 1e-6, 10.0

# log-lengths of (prompt, chosen, rejected) in GPT-2 tokens, before truncation, over the 1,538 usable pairs of a sample
# of HH harmless-base (two thirds of its test split): np.log, then mean, std, corrcoef
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


def longest(pair):
    return len(pair[0]) + max(len(pair[1]), len(pair[2]))


def child_padded(job):
    """Plain DPO: right-padded concatenation, full logits. `computed` counts tokens of the policy's passes."""
    from transformers import GPT2LMHeadModel
    from dpo import dpo_loss
    pairs, B, micro, device = read_pairs(job), job['batch_size'], job['micro'], job['device']
    options = dict(dtype=torch.float32, attn_implementation='sdpa')
    policy = GPT2LMHeadModel.from_pretrained('init', **options).to(device)
    reference = GPT2LMHeadModel.from_pretrained('init', **options).to(device)
    torch.backends.cuda.enable_cudnn_sdp(job['cudnn'])
    policy.train()                  # the weights' config has no dropout
    reference.eval()
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=LEARNING_RATE)
    autocast = Worker(device, job['dtype']).autocast

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
                texts = [(pair[0], pair[side]) for side in (1, 2) for pair in some]
                T = max(map(longest, some))
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


def trl_settings(job):
    """job['best']: of TRL's best. -> DPOConfig's, the model's, and their names for the table"""
    if not job['best']:
        return {}, {}, []
    best = dict(gradient_checkpointing=False, precompute_ref_log_probs=True, remove_unused_columns=False,
                train_sampling_strategy='group_by_length')
    model, names = {}, ['precomputed reference', 'no checkpointing', 'grouped by length']
    if job['device'] == 'cuda' and importlib.util.find_spec('flash_attn'):
        model['attn_implementation'] = 'flash_attention_2'
        best['padding_free'] = True
        names.append('FlashAttention 2')
    if job['device'] == 'cuda' and importlib.util.find_spec('liger_kernel'):
        best['use_liger_kernel'] = True
        names.append('Liger')
    return best, model, names


def trl_tokenizer(end_token):
    """A tokenizer that knows the end token alone: TRL gets ids."""
    import tokenizers
    import transformers
    end = '<|endoftext|>'
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({end: end_token}, unk_token=end))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)


def child_trl(job):
    """TRL's DPOTrainer on the same token ids; job['best'] for its best settings."""
    import datasets
    import transformers
    import trl
    pairs, device = read_pairs(job), job['device']
    best, init_kwargs, on = trl_settings(job)
    if job['best']:
        pairs.sort(key=longest)         # less padding where it precomputes; training shuffles
    data = dict(zip(('prompt_ids', 'chosen_ids', 'rejected_ids'), map(list, zip(*pairs))))
    if job['best']:
        data['length'] = list(map(longest, pairs))
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
        'trl-out', max_length=job['max_length'], bf16=job['dtype'] == 'bfloat16', use_cpu=device == 'cpu',
        seed=job['seed'],
        per_device_train_batch_size=job['micro'], gradient_accumulation_steps=job['batch_size'] // job['micro'],
        num_train_epochs=job['epochs'] + 1, optim='rmsprop', learning_rate=LEARNING_RATE, lr_scheduler_type='constant',
        max_grad_norm=GRAD_CLIP, model_init_kwargs=init_kwargs, save_strategy='no', report_to='none', disable_tqdm=True,
        logging_steps=1, **best)
    trainer = trl.DPOTrainer('init', args=config, train_dataset=datasets.Dataset.from_dict(data),
                             processing_class=trl_tokenizer(job['vocab'] - 1))
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
    model = hf.from_pretrained('init').to(device).eval()
    prompts = [pair[0][-256:] for pair in read_pairs(job)]
    autocast = Worker(device, job['dtype']).autocast
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


def child_dpo(job):
    """dpo.py, without its checkpoints: gpt2-xl's has 12 GB."""
    import dpo
    checkpoint.save = lambda *args: None
    dpo.main(job['flags'])
    return {}


def child(kind, job, result):
    job = json.loads(job)
    try:
        found = dict(dpo=child_dpo, padded=child_padded, trl=child_trl, sample=child_sample)[kind](job)
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error.name} is not installed: pip install {(error.name or "").partition(".")[0]}') from None
    if job['device'] == 'cuda':
        found['memory_gb'] = torch.cuda.max_memory_allocated() / 1e9
        found['reserved_gb'] = torch.cuda.max_memory_reserved() / 1e9
    with open(result, 'w') as f:
        json.dump(found, f)


# -----------------------------------------------------------------------------
# running them

def watch(label, script, arguments, cwd):
    """Run a Python script to its end, its last line moving on the terminal.

    -> dict(error: one line, '' where it ended well; memory: whether it ran out of it; lines: [(second, text)]; seconds;
    rss_gb: the largest resident size)
    """
    env = dict(os.environ, PYTHONUNBUFFERED='1', TORCH_LOGS='recompiles', TOKENIZERS_PARALLELISM='false')
    env.setdefault('CUDA_VISIBLE_DEVICES', '0')         # one GPU; TRL refuses to start where it sees several
    if script != 'prepare_prefs.py':                    # whose --data may be on the hub; the others need none of it
        env.update(HF_HUB_OFFLINE='1', HF_DATASETS_CACHE=os.path.join(cwd, 'hf'))
    began, lines, usage = time.perf_counter(), [], None
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, script), *arguments], cwd=cwd, env=env, text=True,
                               errors='replace', stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def read():
        lines.extend((time.perf_counter() - began, line.strip()) for line in process.stdout if line.strip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    moving, width = sys.stderr.isatty(), shutil.get_terminal_size().columns - 1
    try:
        while reader.is_alive():
            reader.join(0.25)
            text = f'{label:<20}{time.perf_counter() - began:6.0f} s  {lines[-1][1] if lines else "starting"}'
            if moving:
                print('\r' + text[:width].ljust(width), end='', file=sys.stderr, flush=True)
        _, status, usage = os.wait4(process.pid, 0)     # wait() would not tell the memory
        process.returncode = status = os.waitstatus_to_exitcode(status)
    finally:
        if usage is None:
            process.kill()
        if moving:
            print('\r' + ' ' * width, end='\r', file=sys.stderr, flush=True)
    said = '\n'.join(line for _, line in lines[-50:]).lower()
    memory = status == -9 or status != 0 and ('out of memory' in said or "can't allocate memory" in said)
    return dict(error=what_went_wrong(status, memory, [line for _, line in lines]), memory=memory,
                lines=lines, seconds=time.perf_counter() - began,
                rss_gb=usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9)


def what_went_wrong(status, memory, lines):
    """One line, '' where nothing did."""
    if status == 0:
        return ''
    if status == -9:
        return 'killed (signal 9): out of memory?'
    if memory:
        return 'out of memory'
    if status < 0:
        return f'ended by signal {-status}'
    named = [line for line in lines if re.match(r'error:|[\w.]*(Error|Exception)\b', line)] or lines
    return named[-1][:200] if named else f'exit status {status}'


def run_child(label, kind, options, cwd, **more):
    """One of the functions above, in a process of its own. -> (what watch saw, its result or None)"""
    keys = ('device', 'dtype', 'vocab', 'batch_size', 'epochs', 'seed', 'max_length')
    job = {key: getattr(options, key) for key in keys}
    result = os.path.join(cwd, 'result.json')
    ran = watch(label, os.path.abspath(__file__), [f'child:{kind}', json.dumps(job | more), result], cwd)
    if ran['error']:
        return ran, None
    with open(result) as f:
        return ran, json.load(f)


def run_dpo(label, options, flags, cwd, name='bench'):
    """dpo.py's main on these flags. -> (what watch saw and child_dpo measured, the training records of log.jsonl)"""
    flags = [f'--name={name}', '--init_from=init', '--optimizer=rmsprop', f'--learning_rate={LEARNING_RATE}',
             '--warmup_steps=0', f'--grad_clip={GRAD_CLIP}', '--log_interval=1', '--eval_interval=0', '--kl_prompts=0',
             '--save_interval=0', f'--seed={options.seed}', f'--batch_size={options.batch_size}',
             f'--device={options.device}', f'--dtype={options.dtype}', *options.ours, *flags]
    ran, result = run_child(label, 'dpo', options, cwd, flags=flags)
    records = []
    if result is not None:
        ran.update(result)
        with open(os.path.join(cwd, 'out', name, 'dpo', 'log.jsonl')) as f:
            records = [record for record in map(json.loads, f) if 'pairs_per_second' in record]
    shutil.rmtree(os.path.join(cwd, 'out'), ignore_errors=True)         # a cache of the reference would be reused
    return ran, records


def line_times(lines, kind):
    """When dpo.py's log lines came: {step: second}. kind: 'step' or 'eval'."""
    found = ((re.match(kind + r'\s+([\d,]+)/', line), second) for second, line in lines)
    return {int(match[1].replace(',', '')): second for match, second in found if match}


def measure_ours(contender, options, data, cwd, flags=()):
    flags, steps = [*OURS[contender], *flags], options.pairs // options.batch_size
    ran, records = run_dpo(contender, options, [f'--epochs={options.epochs + 1}', *flags], cwd)
    if ran['error']:
        return dict(contender=contender, error=ran['error'])
    shown = line_times(ran['lines'], 'step')
    recompiled = [second for second, line in ran['lines'] if 'Recompiling function' in line]        # of TORCH_LOGS
    marks = [second for second, line in ran['lines'] if line.startswith('reference log-probs of ')]     # train's, val's
    computed = [record['tokens_per_second'] / record['pairs_per_second'] * options.batch_size / (1 - record['padding'])
                for record in records if 'padding' in record]
    row = dict(
        contender=contender, note=' '.join(flags), first_loss=records[0].get('loss'),
        seconds=[options.batch_size / record['pairs_per_second'] for record in records],
        computed=sum(computed) if len(computed) == len(records) else None,
        recompiles=sum(shown[steps] < second <= shown[len(records)] for second in recompiled),
        precompute_seconds=marks[1] - marks[0] if len(marks) == 2 else None,
        first_evaluation=first_evaluation(ran['lines']),
        memory_gb=ran.get('memory_gb', ran['rss_gb']), reserved_gb=ran.get('reserved_gb'))
    return finish(row, ran, options, data, '--precompute_ref=True' in flags)


def first_evaluation(lines):
    """Seconds that dpo.py's first evaluation took beyond its last, 0 where a line of theirs is missing."""
    began = [second for second, line in lines if line.startswith('policy from ')]
    steps, evaluations = line_times(lines, 'step'), line_times(lines, 'eval')
    last = max(steps, default=0)
    if not (began and last and {0, last} <= evaluations.keys()):
        return 0.0
    return evaluations[0] - began[0] - (evaluations[last] - steps[last])


def measure_peer(contender, options, data, cwd):
    best, rows = contender == 'trl-best', []
    sizes = list(options.micro_batch) if best else [math.gcd(8, options.batch_size)]
    for micro in sizes:                         # trl-best: each of them; the others: half as many where memory is short
        ran, result = run_child(f'{contender} ({micro})', contender.partition('-')[0], options, cwd, micro=micro,
                                best=best, cudnn=contender != 'padded-nocudnn')
        row = dict(contender=contender, micro_batch=micro, error=ran['error'])
        if result:
            result.setdefault('memory_gb', ran['rss_gb'])
            row = finish(dict(row, **result), ran, options, data, best)
        elif ran['memory'] and micro > 1 and not best:
            sizes.append(math.gcd(micro // 2, options.batch_size))
        rows.append(row)
    row = max(rows, key=lambda row: row.get('pairs_per_second', 0))
    if not row.get('error') and len(rows) > 1:
        row['tried'] = {r['micro_batch']: r.get('error') or r['pairs_per_second'] for r in rows}
        row['note'] += '; ' + ', '.join(f'with {n}: ' + (f'{was:.2f}' if isinstance(was, float) else was)
                                        for n, was in row['tried'].items() if n != row['micro_batch'])
    return row


def finish(row, ran, options, data, precomputed):
    """Add what follows from the seconds of the steps: the first epoch is warm-up, the others are measured."""
    epochs = np.array(row['seconds']).reshape(options.epochs + 1, -1).sum(1)
    seconds, computed = float(np.median(epochs[1:])), row.pop('computed')
    first = row['seconds'][0] - float(np.median(row['seconds'][len(row['seconds']) // len(epochs):]))
    computed = computed and computed / len(epochs)                              # an epoch's; each has another order
    row.update(error='', epoch_seconds=epochs.tolist(), wall_seconds=ran['seconds'],
               pairs_per_second=options.pairs / seconds, tokens_per_second=data['distinct_tokens'] / seconds,
               computed_tokens=computed,
               waste=computed and 1 - data['distinct_tokens'] / computed,
               useful_flops_per_second=data['forward_flops'] * (3 if precomputed else 4) / seconds,
               first_seconds=first + row.pop('first_evaluation', 0.0),
               besides_seconds=ran['seconds'] - len(epochs) * seconds)
    if row.get('precompute_seconds'):
        row['pairs_per_second_1_epoch'] = options.pairs / (seconds + row['precompute_seconds'])
    return row


# -----------------------------------------------------------------------------
# data, weights and the machine

def write_synthetic(folder, n, seed):
    """n pairs in train.jsonl and 8 in val.jsonl, of random letters, each a token to prepare's `bytes`; HH's lengths."""
    rng = np.random.default_rng(seed)
    os.makedirs(folder)
    for split, count in (('train', n), ('val', 8)):
        logs = rng.multivariate_normal(HH_MEAN, HH_CORRELATION * HH_STD[:, None] * HH_STD, count)       # (count, 3)
        with open(os.path.join(folder, f'{split}.jsonl'), 'w') as f:
            for lengths in np.exp(logs).round().clip(1).astype(int):
                letters = [rng.integers(97, 123, n, dtype=np.uint8).tobytes().decode() for n in lengths]
                prompt, chosen, rejected = letters
                f.write(json.dumps(dict(prompt=prompt, chosen='c' + chosen[1:], rejected='r' + rejected[1:])) + '\n')


def write_bench(cwd, name, train, val, options):
    """data/<name>: pairs drawn from data/all; where those are of letters, with random ids of the model's vocabulary."""
    source, folder = os.path.join(cwd, 'data', 'all'), os.path.join(cwd, 'data', name)
    shutil.copytree(source, folder)
    rng, meta = np.random.default_rng(options.seed), Groups(source, 'train').meta
    vocab = meta['vocab_size'] if options.data else options.vocab
    for split, n in (('train', train), ('val', val)):
        groups = Groups(source, split if split == 'train' or n <= 8 else 'train')       # a long val: of train's pairs
        drawn = [[piece.tolist() for piece in groups[i]] for i in rng.permutation(len(groups))[:n]]
        if not options.data:
            drawn = [[random_ids(piece, meta['eot_token'], vocab, rng) for piece in pair] for pair in drawn]
        meta['splits'][split] |= write_split(folder, split, drawn, vocab)
    if not options.data:
        meta.update(vocab_size=options.vocab, eot_token=options.vocab - 1)
    write_meta(folder, meta)


def random_ids(ids, end, vocab, rng):
    """As many ids of the model's vocabulary, whose last one is the end token, where `ids` have theirs."""
    return [vocab - 1 if token == end else int(rng.integers(0, vocab - 1)) for token in ids]


def model_config(model, options):
    return GPTConfig(1024, options.vocab, *MODELS[model])


def write_weights(cwd, model, options):
    torch.manual_seed(options.seed)
    shutil.rmtree(os.path.join(cwd, 'init'), ignore_errors=True)
    with torch.device(options.device):          # a GPU draws 1.5 billion numbers in no time
        weights = GPT(model_config(model, options))
    save_pretrained(weights, os.path.join(cwd, 'init'))


def matmul_rates(options, dtype):
    """FLOP/s of several matmuls, the best of five each: {shape: rate}."""
    big, C = 8192 if options.device == 'cuda' else 2048, MODELS[options.model][2]
    rates = {}
    for M, K, N in ((big, big, big), (big, C, 4 * C), (big, 4 * C, C), (min(big, 2048), C, options.vocab)):
        a, b = (torch.randn(*shape, device=options.device, dtype=getattr(torch, dtype)) for shape in ((M, K), (N, K)))
        best = math.inf
        for _ in range(6):
            sync(options.device)
            began = time.perf_counter()
            a @ b.t()                                   # as nn.Linear keeps it
            sync(options.device)
            best = min(best, time.perf_counter() - began)
            if best > 2:
                break                                   # a type that this machine only emulates
        rates[f'{M} x {K} x {N}'] = 2 * M * K * N / best
    return rates


# -----------------------------------------------------------------------------
# sections: each -> rows of one table

def section_train(options, data, cwd, report, rates):
    """Fill report['train'] and ['peak'], and write the report after every row. rates: of matmuls timed before."""
    rows = report['train'] = []
    report['peak'] = dict(before=rates, flops_per_second=max(rates[options.dtype].values()))
    for contender in options.contenders:
        has_compiler = options.device != 'cpu' or any(map(shutil.which, ('c++', 'g++', 'clang++')))
        if contender == 'ours+compile' and not has_compiler:
            row = dict(contender=contender, error='no C++ compiler')
        else:
            row = (measure_peer if contender in PEERS else measure_ours)(contender, options, data, cwd)
        rows.append(row)
        print(progress(contender, row), flush=True)
        compare(report)
        write(report, options.out)
    after = matmul_rates(options, options.dtype)
    report['peak'].update(after=after, flops_per_second=max(*rates[options.dtype].values(), *after.values()))
    compare(report)
    timed = [(dtype, found, 'before') for dtype, found in rates.items()] + [(options.dtype, after, 'after')]
    report['heading'] += '\nFastest matmul, GFLOP/s: ' + ', '.join(
        f'{dtype} {max(found.values()) / 1e9:,.0f} {when}' for dtype, found, when in timed) + '.'


def compare(report):
    """Add to each row its share of the peak, and how many times faster it is than each peer."""
    ran = [row for row in report['train'] if not row['error']]
    for row in ran:
        row['of_peak'] = row['useful_flops_per_second'] / report['peak']['flops_per_second']
        for peer in ran:
            if peer['contender'] in PEERS:
                row[f'times_{peer["contender"]}'] = row['pairs_per_second'] / peer['pairs_per_second']


def progress(label, row):
    """The line on the terminal when a run ends."""
    if row['error']:
        return f'{label:<20}{row["error"]}'
    return (f'{label:<20}{row["pairs_per_second"]:>10,.2f} pairs/s{row["tokens_per_second"]:>12,.0f} tokens/s'
            f'{row["memory_gb"] or 0:>8.2f} GB{row["besides_seconds"]:>8,.1f} s besides')


def section_eval(options, data, cwd):
    """dpo.py's evaluation after its only step: from that step's log line to the evaluation's. One before warms up."""
    write_bench(cwd, 'bench-eval', options.batch_size, options.pairs, options)
    ran, _ = run_dpo('eval', options, ['--max_steps=1'], cwd, 'bench-eval')
    ends, begins = line_times(ran['lines'], 'eval'), line_times(ran['lines'], 'step')
    if ran['error'] or 1 not in ends or 1 not in begins:
        return [dict(pairs=options.pairs, error=ran['error'] or 'dpo.py printed no line of its evaluation')]
    seconds = ends[1] - begins[1]
    return [dict(pairs=options.pairs, seconds=seconds, pairs_per_second=options.pairs / seconds)]


def section_sample(options, data, cwd):
    ran, result = run_child('sample', 'sample', options, cwd, new_tokens=128)
    return result['rows'] if result else [dict(error=ran['error'])]


def section_rows(options, data, cwd):
    """Training at several --row_tokens, one epoch after one of warm-up."""
    rows, short = [], argparse.Namespace(**{**vars(options), 'epochs': 1})
    for size in options.row_tokens:
        row = measure_ours('ours', short, data, cwd, [f'--row_tokens={size}'])
        if not row['error']:
            row['step_seconds'] = row['epoch_seconds'][1] * options.batch_size / options.pairs
        rows.append(dict(row, row_tokens=size))
        print(progress(f'row_tokens {size:,}', row), flush=True)
    return rows


def section_largest(options, data, cwd):
    """CUDA: the longest row that one micro-step takes, doubled until out of memory, for each size of GPT-2."""
    rows = [] if options.device == 'cuda' else [dict(error='needs CUDA')]
    for model in list(MODELS)[1:] if not rows else []:
        write_weights(cwd, model, options)
        for checkpointing in (False, True):
            size = 2048
            row = dict(model=model, checkpointing=checkpointing, error='too few --pairs to fill 2,048 tokens')
            while size * 1.2 < data['distinct_tokens']:             # a step must fill the row, or it proves nothing
                pairs = math.ceil(1.2 * size * options.pairs / data['distinct_tokens'])
                trial = argparse.Namespace(**{**vars(options), 'batch_size': pairs})
                flags = [f'--activation_checkpointing={checkpointing}', '--max_steps=2', f'--row_tokens={size}']
                ran, records = run_dpo(f'{model} {size:,}', trial, flags, cwd)
                if ran['error']:
                    row['note' if 'row_tokens' in row else 'error'] = f'{ran["error"]} at {size:,} tokens'
                    break
                row = dict(model=model, checkpointing=checkpointing, row_tokens=size,
                           memory_gb=records[-1].get('memory_gb'), tokens_per_second=records[-1]['tokens_per_second'],
                           note='more may fit: set a larger --pairs')
                size *= 2
            rows.append(row)
            fits = f'{row["row_tokens"]:,} tokens' if 'row_tokens' in row else row['error']
            print(f'{model + " checkpointing" * checkpointing:<27}{fits}', flush=True)
    return rows


# -----------------------------------------------------------------------------
# tables

def column(key, form='{}'):
    """A row's value of that name as text, '-' where there is none."""
    return lambda row: '-' if row.get(key) is None else form.format(row[key])


def note(row):
    return row.get('error') or row.get('note') or ''


TABLES = {          # section: (title, {column: text of a row})
    'train': ('DPO training', {
        'contender': column('contender'), 'pairs/s': column('pairs_per_second', '{:,.2f}'),
        **{f'x {peer}': column(f'times_{peer}', '{:.2f}') for peer in PEERS},
        'tokens/s': column('tokens_per_second', '{:,.0f}'), 'waste': column('waste', '{:.0%}'),
        'memory GB': column('memory_gb', '{:.2f}'), 'reserved GB': column('reserved_gb', '{:.2f}'),
        'of peak': column('of_peak', '{:.1%}'), 'besides s': column('besides_seconds', '{:,.1f}'),
        'first s': column('first_seconds', '{:,.1f}'), 'recompiles': column('recompiles'),
        'precompute s': column('precompute_seconds', '{:,.1f}'),
        '1 epoch': column('pairs_per_second_1_epoch', '{:,.2f}'), 'note': note}),
    'prepare': ('prepare_prefs.py', {
        'tokenizer': column('tokenizer'), 'rows': column('rows', '{:,}'), 's': column('seconds', '{:.1f}'),
        'rows/s': column('rows_per_second', '{:,.0f}'), 'note': note}),
    'eval': ('dpo.py: evaluation, policy and reference', {
        'pairs': column('pairs', '{:,}'), 's': column('seconds', '{:.2f}'),
        'pairs/s': column('pairs_per_second', '{:,.2f}'), 'note': note}),
    'sample': ('GPT.generate, with its cache', {
        'batch': column('batch'), 'new tokens': column('new_tokens', '{:,}'), 's': column('seconds', '{:.2f}'),
        'tokens/s': column('tokens_per_second', '{:,.0f}'), 'note': note}),
    'rows': ('dpo.py: --row_tokens', {
        'row_tokens': column('row_tokens', '{:,}'), 's a step': column('step_seconds', '{:.3f}'),
        'waste': column('waste', '{:.0%}'), 'tokens/s': column('tokens_per_second', '{:,.0f}'),
        'memory GB': column('memory_gb', '{:.2f}'), 'note': note}),
    'largest': ('dpo.py: the longest row that fits one micro-step', {
        'model': column('model'), 'checkpointing': column('checkpointing'), 'row_tokens': column('row_tokens', '{:,}'),
        'memory GB': column('memory_gb', '{:.1f}'), 'tokens/s': column('tokens_per_second', '{:,.0f}'), 'note': note}),
}


def table(rows, columns):
    """Aligned Markdown: text on the left in the first and the last column, numbers on the right between."""
    lines = [list(columns)] + [[show(row) for show in columns.values()] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    left = [True] + [False] * (len(widths) - 2) + [True]
    lines.insert(1, ['-' * width if at_left else '-' * (width - 1) + ':' for width, at_left in zip(widths, left)])
    return '\n'.join('| ' + ' | '.join(cell.ljust(width) if at_left else cell.rjust(width) for cell, width, at_left in
                                       zip(cells, widths, left)) + ' |' for cells in lines)


# -----------------------------------------------------------------------------
# the run

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(f'error: {message} (--help lists the options)')
    add = parser.add_argument
    add('--device', default='auto', choices=['auto', 'cpu', 'cuda'])
    add('--dtype', default='auto', choices=['auto', 'float32', 'bfloat16'], help='auto: whose matmuls are faster here')
    add('--model', default='gpt2', choices=list(MODELS), help='random weights of that size')
    add('--data', default='', help="pairs, as prepare_prefs.py's --source (needs GPT-2's BPE); default: synthetic")
    add('--data_dir', default='', help='a subset inside --data')
    add('--pairs', type=int, default=0, help='of an epoch; default 32 on CPU, 512 on CUDA')
    add('--batch_size', type=int, default=0, help='pairs an optimizer step; default 16 on CPU, 64 on CUDA')
    add('--micro_batch', default='', help='pairs a micro-step that trl-best tries; default 4,8, on CUDA 8,16,32,64')
    add('--max_length', type=int, default=512, help='tokens of a prompt and a response; prompts are cut to half of it')
    add('--epochs', type=int, default=2, help='measured, after one of warm-up')
    add('--contenders', default='', help=','.join([*OURS, *PEERS]) + '; default: all but the one that equals ours')
    add('--sections', default='', help=','.join(SECTIONS) + '; default: all')
    add('--row_tokens', default='', help='of the section rows; default 1024,2048,4096, on CUDA 4096 to 32768')
    add('--ours', type=str.split, default=[], help="flags for every run of dpo.py, e.g. --ours='--row_tokens=4096'")
    add('--seed', type=int, default=1337)
    add('--out', default='', help='writes OUT.json and OUT.md')
    options = parser.parse_args(argv)

    def check(good, message):
        if not good:
            parser.error(message)

    def several(key, default, known=None):
        """A comma-separated option as a list: of names among `known`, or of sizes."""
        found = [name for name in getattr(options, key).split(',') if name] or [str(name) for name in default]
        for name in found:
            check(name in known if known else name.isdecimal() and int(name), f'{key}: {name!r} is ' + (
                'unknown; known: ' + ', '.join(known) if known else 'no whole number of at least 1'))
        setattr(options, key, found if known else [int(name) for name in found])

    found = torch.cuda.is_available()
    check(options.device != 'cuda' or found, 'device=cuda, but torch sees no GPU')
    options.device = options.device if options.device != 'auto' else 'cuda' if found else 'cpu'
    cuda = options.device == 'cuda'
    options.pairs = options.pairs or (512 if cuda else 32)
    options.batch_size = options.batch_size or min(options.pairs, 64 if cuda else 16)
    options.vocab = 50257 if options.model != 'tiny' or options.data else 512
    for key in ('pairs', 'batch_size', 'epochs'):
        check(getattr(options, key) >= 1, f'{key}={getattr(options, key)} must be at least 1')
    check(options.pairs % options.batch_size == 0,
          f'pairs={options.pairs} must be a multiple of batch_size={options.batch_size}: an epoch is whole steps')
    check(4 <= options.max_length <= 1024, f'max_length={options.max_length} must be 4 to 1024')
    several('sections', SECTIONS, SECTIONS)
    same = 'ours+compile' if cuda else 'ours-compile'           # as ours, which compiles on CUDA
    of_no_use = [same] if cuda else [same, 'padded-nocudnn']
    several('contenders', [name for name in [*OURS, *PEERS] if name not in of_no_use], [*OURS, *PEERS])
    several('row_tokens', [4096, 8192, 16384, 32768] if cuda else [1024, 2048, 4096])
    several('micro_batch', sorted({math.gcd(n, options.batch_size) for n in ((8, 16, 32, 64) if cuda else (4, 8))}))
    for micro in options.micro_batch:
        check(options.batch_size % micro == 0, f'micro_batch={micro} must divide batch_size={options.batch_size}')
    check(os.path.isdir(os.path.dirname(options.out) or '.'), f'out={options.out}: no such folder')
    return options


def machine_name(device):
    return torch.cuda.get_device_name() if device == 'cuda' else f'{platform.machine()} CPU, {os.cpu_count()} cores'


def measure(options, cwd):
    """Everything, in the folder cwd. -> the report, a dict"""
    if (busy := os.getloadavg()[0]) > 0.5:
        print(f'note: the load average is {busy:.1f}: something else is running, the timings will suffer', flush=True)
    print('timing matmuls', flush=True)
    dtypes = ('float32', 'bfloat16') if options.dtype == 'auto' else (options.dtype,)
    rates = {dtype: matmul_rates(options, dtype) for dtype in dtypes}
    if options.dtype == 'auto':
        options.dtype = max(rates, key=lambda dtype: max(rates[dtype].values()))

    # all of the data through prepare_prefs.py, then the pairs of this run
    source = options.data
    if os.path.exists(source):
        source = os.path.abspath(source)        # the children run elsewhere
    if not source:
        source = os.path.join(cwd, 'synthetic')
        write_synthetic(source, max(options.pairs, 5000 if 'prepare' in options.sections else 0), options.seed)
    tokenizer = 'gpt2' if options.data else 'bytes'
    ran = watch('prepare', 'prepare_prefs.py', [
        '--name=all', f'--source={source}', f'--data_dir={options.data_dir}', f'--tokenizer={tokenizer}',
        f'--max_length={options.max_length}', f'--max_prompt_length={options.max_length // 2}'], cwd)
    if ran['error']:
        sys.exit(f'error: prepare_prefs.py: {ran["error"].removeprefix("error: ")}')
    everything = Groups(os.path.join(cwd, 'data', 'all'), 'train')
    if len(everything) < options.pairs:
        sys.exit(f'error: {source} has {len(everything):,} usable pairs to train on, --pairs asks for '
                 f'{options.pairs:,}')
    rows = sum(split['read'] for split in everything.meta['splits'].values())
    write_bench(cwd, 'bench', options.pairs, 8, options)
    write_weights(cwd, options.model, options)
    bench = Groups(os.path.join(cwd, 'data', 'bench'), 'train')
    ids = np.arange(len(bench))
    data = dict(distinct_tokens=int(bench.lengths.sum()), response_tokens=bench.response_tokens(ids),
                forward_flops=bench.forward_flops(ids, model_config(options.model, options)),
                longest=int(bench.lengths.max()), sizes=np.diff(bench.index).tolist())
    where = machine_name(options.device)
    what = 'random tokens with the lengths of HH'
    if options.data:
        what = f'{os.path.basename(source)} {options.data_dir}'.strip()
    heading = (f'{options.model} in {options.dtype} on {where}, torch {torch.__version__}; {len(bench):,} pairs of '
               f'{what}: {data["distinct_tokens"]:,} distinct tokens, {data["response_tokens"]:,} in responses; '
               'batches of '
               f'{options.batch_size}; {options.epochs} epoch{"s" * (options.epochs > 1)} after one of warm-up.')
    print(heading, flush=True)

    report = dict(heading=heading, options=vars(options) | dict(data=what), load_average=busy, torch=torch.__version__,
                  device=where, data=data)
    if 'prepare' in options.sections:
        seconds = ran['seconds']
        report['prepare'] = [dict(tokenizer=tokenizer, rows=rows, seconds=seconds, rows_per_second=rows / seconds,
                                  note='the whole process, its start included')]
    if 'train' in options.sections:
        section_train(options, data, cwd, report, rates)
    sections = dict(eval=section_eval, sample=section_sample, rows=section_rows, largest=section_largest)
    for name, section in sections.items():
        if name in options.sections:
            report[name] = section(options, data, cwd)
            write(report, options.out)
    return report


def text(report):
    """The report as Markdown."""
    parts = [report['heading']]
    for name, (title, columns) in TABLES.items():
        if name in report:
            parts.append(f'## {title}\n\n{table(report[name], columns)}')
    return '\n\n'.join(parts)


def write(report, out):
    if out:
        write_json(f'{out}.json', report)
        with open(f'{out}.md', 'w') as f:
            f.write(text(report) + '\n')


def main(argv=None):
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix='throughput-') as cwd:
        report = measure(options, cwd)
    print('\n' + text(report))
    write(report, options.out)


if __name__ == '__main__':
    if len(sys.argv) == 4 and sys.argv[1].startswith('child:'):
        child(sys.argv[1][6:], *sys.argv[2:])
    else:
        main()
