"""Scale, on paper and by simulation: how a step of dpo.py splits on 1, 8 and 32 GPUs, and where DDP is not enough.

    python repro/scale.py                                       # pairs with HH's lengths, drawn at random
    python repro/scale.py --data=data/hh --out=scale            # your prepared pairs; writes scale.json, .md and .png

Real: the pairs' lengths, the planner (step_groups and plan_rows of nanodpo/data.py, over --steps full batches), the
FLOPs (Groups.forward_flops' formula), and the CPU time of `pack` and `plan_rows`, taken here. A model: everything
else. THE STEPS ARE COMPUTED, NOT MEASURED. The constants below are data sheets and assumptions, but for the
utilisation: one H200 ran GPT-2 XL at it.

A step, as dpo.py runs it. Each rank has m rows (micro-steps), each a forward of the reference, a forward of the policy
and a backward that costs two: 4 forwards' FLOPs. Ranks meet once a step, in the last row's backward.
  compute     the mean rank's FLOPs, padding to blocks of 128 included, at UTILISATION of the peak
  waiting     what the slowest rank needs beyond the mean
  casts       float32 weights to bfloat16, their gradients back, sums of gradients: memory traffic, once a row
  all-reduce  a ring over float32 gradients. The blocks' part runs beside the last row's backward; the embedding's
              gradient is complete only at the backward's end (it is the tied head too), so its part is always exposed
  optimizer   clipping and RMSprop, memory traffic
  input       where planning and packing, on the CPU meanwhile, take longer than all of that
Left out: launching kernels, attention's whole blocks at the edge of the mask, matmuls too small for full speed (rows
under some 500 tokens), NCCL's share of the GPU, evaluations, checkpoints, logging.
"""
import argparse
import os
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import UserError                                                            # noqa: E402
from model import GPTConfig                                                             # noqa: E402
from nanodpo.data import Groups, pack, plan_rows, row_limit, step_groups                # noqa: E402
from sweep import write_json                                                            # noqa: E402
from throughput import HH_CORRELATION, HH_MEAN, HH_STD                                  # noqa: E402

PEAK = 989e12               # FLOP/s, bfloat16 dense, H100 and H200 SXM: data sheet
UTILISATION = 0.33          # of PEAK, in a row's kernels but the casts: GPT-2 XL's in results/gpu/h200-first.jsonl
HBM = 0.8 * 3.35e12         # bytes/s, memory: H100's data sheet (H200: 4.8e12); 80% of it assumed
NVLINK = 0.8 * 450e9        # bytes/s a direction and GPU, within a node: data sheet; 80% of it assumed
NETWORK = 0.8 * 8 * 50e9    # bytes/s a direction and node, 8 x 400 Gb/s InfiniBand: data sheet; 80% of it assumed
NODE = 8                    # GPUs
LATENCY = 30e-6, 100e-6     # s an all-reduce of one bucket, within a node and between nodes: assumed
BUCKET = 25 * 2**20         # bytes: DDP's default
CAST = 12                   # bytes a weight and row, casts: 4 + 2 read and written, twice: counted from the operations
ADD = 12                    # bytes a weight, a gradient added to another: counted
COPY = 8                    # bytes a weight, a gradient copied into DDP's bucket: counted
CLIP = 12                   # bytes a weight, clip_grad_norm_: read, then read and write: counted
OPTIMIZER = {'rmsprop': 52, 'adamw': 28}    # bytes a weight: torch's foreach RMSprop, fused AdamW: counted
ACTIVATIONS = 36            # bytes a token, layer and unit of width, kept for the backward: two norms' inputs 4 + 4 and
                            # outputs 2 + 2, q k v 6, attention's output 2, MLP 8 + 8: counted; compiling may save some
CHECKPOINT = 4              # the same with activation_checkpointing: a block's float32 input; one block in full
TILE = 4096                 # of the vocabulary, token_logps: (4 + 2) bytes a scored token and entry
CARDS = {'80 GB': 80e9, '141 GB': 141e9}    # H100, H200: data sheet
USABLE, RESERVED = 0.95, 2e9                # of a card, the rest being fragmentation; bytes of CUDA and NCCL: assumed

SHAPES = {      # layers, heads, width; 2.8B is Pythia's shape
    'GPT-2 124M': (12, 12, 768), 'GPT-2 medium': (24, 16, 1024), 'GPT-2 large': (36, 20, 1280),
    'GPT-2 XL': (48, 25, 1600), '2.8B': (32, 32, 2560), '6.7B': (32, 32, 4096), '13B': (40, 40, 5120)}
WORLDS, BATCHES = (1, 8, 32), (64, 512)
PARTS = ('compute', 'waiting', 'casts', 'all-reduce', 'optimizer', 'input')


def shape(layers, heads, width):
    return GPTConfig(n_layer=layers, n_head=heads, n_embd=width)


# -----------------------------------------------------------------------------
# the pairs and the planner

def synthetic(n, seed):
    """n pairs with HH's lengths, cut as prepare_prefs.py does, random ids: what pack and plan_rows need of a Groups."""
    rng = np.random.default_rng(seed)
    logs = rng.multivariate_normal(HH_MEAN, HH_CORRELATION * HH_STD[:, None] * HH_STD, n)
    prompt, *responses = np.exp(logs).round().clip(1).astype(int).T
    responses = np.array(responses) + 1                                                 # (2, n), with the end token
    prompt = np.where(prompt + responses.max(0) > 512, np.minimum(prompt, 256), prompt)
    sizes = np.stack([prompt, *np.minimum(responses, 512 - prompt)], 1)                 # (n, 3)
    ends = sizes.cumsum().reshape(n, 3)
    index = np.column_stack([np.append(0, ends[:-1, -1]), ends])                        # (n, K+2)
    tokens = rng.integers(0, 50257, sizes.sum(), dtype=np.uint16)
    return SimpleNamespace(labels=None, index=index, lengths=sizes.sum(1), K=2, tokens=tokens)


def row_work(groups, ids):
    """(5,): a row's tokens, these padded as on CUDA, query-key pairs of the mask, scored tokens, these padded."""
    sizes = np.diff(groups.index[np.array(ids, np.int64)], axis=1).astype(float)        # (G, K+1)
    tokens, scored = sizes.sum(), sizes[:, 1:].sum()
    seen = (sizes * (sizes + 1) / 2).sum() + (sizes[:, :1] * sizes[:, 1:]).sum()
    padded, scored_padded = (max(2, np.ceil(n / 128)) * 128 for n in (tokens, scored))
    return tokens, padded, seen, scored, scored_padded


def simulate(groups, batch_size, world, row_tokens, steps, seed):
    """The planner over `steps` full batches. -> row_work of every step, list of (world, m, 5), and the seconds of
    plan_rows and pack."""
    n, step, found, planning, packing = len(groups.lengths), 0, [], [], []
    while len(found) < steps:
        ids = step_groups(n, batch_size, step, seed)
        step += 1
        if len(ids) < batch_size:       # an epoch's last
            continue
        began = time.perf_counter()
        rows = plan_rows(ids, groups.lengths[ids], world, row_tokens)
        planning.append(time.perf_counter() - began)
        if len(found) < 20:
            began = time.perf_counter()
            pack(groups, rows[0][0], 128)
            packing.append(time.perf_counter() - began)
        found.append(np.array([[row_work(groups, row) for row in mine] for mine in rows]))
    return found, statistics.median(planning), statistics.median(packing)


# -----------------------------------------------------------------------------
# the model of time, in seconds

def num_params(config):
    """(in blocks, in the two embeddings and the last norm); the head is the token embedding."""
    C = config.n_embd
    return config.n_layer * (12 * C * C + 13 * C), (config.vocab_size + config.block_size + 2) * C


def forward_flops(config, tokens, seen, scored):
    """Groups.forward_flops, from its sums."""
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    return 24 * L * C * C * tokens + 4 * L * C * seen + 2 * C * V * scored


def ring(world, size):
    """Seconds of an all-reduce of `size` bytes: 2 (n-1)/n of them pass each link, and every bucket has its latency."""
    if world == 1:
        return 0.0
    bandwidth, latency = (NVLINK, LATENCY[0]) if world <= NODE else (min(NVLINK, NETWORK), LATENCY[1])
    return 2 * (world - 1) / world * size / bandwidth + size / BUCKET * latency


def rank_seconds(config, work, utilisation):
    """Of the kernels of each row, live reference: work (world, m, 5) -> (world, m)."""
    return 4 * forward_flops(config, work[..., 1], work[..., 2], work[..., 4]) / (PEAK * utilisation)


def step_seconds(config, work, planning, packing, utilisation=UTILISATION, gradient_bytes=4):
    """One step: {part: seconds} by PARTS, whose sum is the step, and the whole 'ring', hidden or not."""
    world, m, _ = work.shape
    blocks, embeddings = num_params(config)
    P, rows = blocks + embeddings, rank_seconds(config, work, utilisation)
    ranks, backward = rows.sum(1), rows[:, -1].mean() / 2               # the backward is 2 of a row's 4 forwards
    over_blocks, over_embeddings = ring(world, gradient_bytes * blocks), ring(world, gradient_bytes * embeddings)
    parts = {'compute': ranks.mean(), 'waiting': ranks.max() - ranks.mean(),
             'casts': P * (CAST * m + ADD * (m - 1) + COPY * (world > 1)) / HBM,
             'all-reduce': over_embeddings + max(0.0, over_blocks - backward),
             'optimizer': P * (CLIP + OPTIMIZER['rmsprop']) / HBM}
    parts['input'] = max(0.0, m * packing + planning - sum(parts.values()))
    return parts | {'ring': over_blocks + over_embeddings}


def hidden_tokens(world, gradient_bytes, utilisation):
    """Tokens that the last row of any model needs, so that its backward, 4 FLOPs a weight and token, hides the blocks'
    ring."""
    return ring(world, gradient_bytes) * PEAK * utilisation / 4


# -----------------------------------------------------------------------------
# the model of memory, in bytes

def memory(config, tokens, optimizer='rmsprop', live=True, checkpointing=False, state_shards=1, shards=1):
    """A GPU's peak with rows of `tokens`, all of them scored. live: a reference copy is held. state_shards: GPUs
    that share the optimizer's state; shards: that share weights, gradients and reference too."""
    C, L, V, P = config.n_embd, config.n_layer, config.vocab_size, sum(num_params(config))
    blocks, table = num_params(config)[0], V * C
    states = {'rmsprop': 4, 'adamw': 8}[optimizer] * P / max(state_shards, shards)
    reference = live * (2 * blocks + 4 * (P - blocks) + 2 * table) / shards     # bfloat16 blocks; the head's cast
    kept = (4 + 4) * P / shards + states + reference
    full = ACTIVATIONS * C * tokens
    activations = L * CHECKPOINT * C * tokens + full if checkpointing else L * full
    casts = 2 * (blocks + table) / shards + (shards > 1) * 2 * 12 * C * C * 4           # sharded: two layers gathered
    tables = 2 * 4 * table                                  # the head's and the embedding's gradient, not summed yet
    backward = activations + casts + tables + tokens * TILE * (4 + 2)
    foreach = (optimizer == 'rmsprop') * 4 * P / max(state_shards, shards)      # RMSprop's square roots, all at once
    return (kept + max(backward, foreach)) / USABLE + RESERVED


def largest(card, tokens, **options):
    """(parameters, layers, width) of the largest GPT that fits, of widths 64, 128, ... with a layer for every 128."""
    best, width = (0, 0, 0), 64
    while memory(config := shape(max(1, width // 128), 1, width), tokens, **options) <= card:
        best, width = (sum(num_params(config)), config.n_layer, width), width + 64
    return best


# -----------------------------------------------------------------------------
# the report

def table(rows):
    """Aligned Markdown of a list of {title: text}, the first column to the left."""
    lines = [list(rows[0])] + [list(row.values()) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, ['-' * widths[0]] + ['-' * (width - 1) + ':' for width in widths[1:]])
    cells = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in cells)


def planner_row(groups, batch_size, world, works, planning, packing):
    """What the planner did, a dict of numbers; load imbalance is the largest rank over the mean, minus 1."""
    all_rows = np.concatenate([work.reshape(-1, 5) for work in works])
    row = dict(batch_size=batch_size, gpus=world, micro_steps=float(np.mean([work.shape[1] for work in works])),
               row_tokens=float(all_rows[:, 0].mean()), longest_row=int(all_rows[:, 1].max()),
               padding=1 - float(all_rows[:, 0].sum() / all_rows[:, 1].sum()))
    loads = {'tokens': [work[..., 0].sum(1) for work in works]}
    for name in ('GPT-2 124M', 'GPT-2 XL'):
        loads[name] = [forward_flops(shape(*SHAPES[name]), *work[..., [0, 2, 3]].T).sum(0) for work in works]
    for name, ranks in loads.items():
        excess = [float(load.max() / load.mean() - 1) for load in ranks]
        row[f'{name} imbalance'], row[f'{name} worst'] = float(np.mean(excess)), max(excess)
    return row | dict(plan_seconds=planning, pack_seconds=packing)


def measure(groups, what, options):
    """-> the report, a dict of lists of numbers."""
    row_tokens = row_limit(options.row_tokens, torch.device('cpu'), groups)
    report = dict(data=what, pairs=len(groups.lengths), tokens_a_pair=float(groups.lengths.mean()),
                  row_tokens=row_tokens,
                  options={key: value for key, value in vars(options).items() if key not in ('data', 'out')},
                  constants={k: v for k, v in globals().items() if k.isupper() and not k.startswith('HH')},
                  planner=[], steps=[], hidden=[], memory=[])
    for batch_size in BATCHES:
        single = {}
        for world in WORLDS:
            works, planning, packing = simulate(groups, batch_size, world, row_tokens, options.steps, options.seed)
            planner = planner_row(groups, batch_size, world, works, planning, packing)
            report['planner'].append(planner)
            for name, dimensions in SHAPES.items():
                config = shape(*dimensions)
                steps = [step_seconds(config, work, planning, packing, options.utilisation) for work in works]
                half = [step_seconds(config, work, planning, packing, options.utilisation, 2) for work in works]
                row = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
                row['seconds'] = sum(row[part] for part in PARTS)
                single.setdefault(name, row['seconds'])
                row |= dict(model=name, params=sum(num_params(config)), gpus=world, batch_size=batch_size,
                            scaling=single[name] / row['seconds'] / world, pairs_per_second=batch_size / row['seconds'],
                            seconds_bf16_gradients=float(np.mean([sum(s[part] for part in PARTS) for s in half])),
                            memory=float(memory(config, planner['longest_row'])))
                report['steps'].append(row)
    for world in WORLDS[1:]:
        for gradients, size in (('float32', 4), ('bfloat16', 2)):
            for utilisation in (0.3, 0.4, 0.5):
                tokens = hidden_tokens(world, size, utilisation)
                batch_size = tokens * world / report['tokens_a_pair']
                report['hidden'].append(dict(gpus=world, gradients=gradients, utilisation=utilisation, tokens=tokens,
                                             batch_size=batch_size))
    cases = [(f'DDP, {optimizer}, reference {"live" if live else "precomputed"}{", checkpointing" * checkpointing}',
              dict(optimizer=optimizer, live=live, checkpointing=checkpointing))
             for optimizer in OPTIMIZER for live in (True, False) for checkpointing in (False, True)]
    checkpointed = dict(optimizer='rmsprop', live=True, checkpointing=True)
    cases += [(f'{kind} over {n}, rmsprop, reference live, checkpointing', checkpointed | {key: n})
              for kind, key in (('optimizer state sharded', 'state_shards'), ('all sharded (FSDP)', 'shards'))
              for n in WORLDS[1:]]
    for label, case in cases:
        for card, size in CARDS.items():
            for tokens in (2048, row_tokens):
                params, layers, width = largest(size, tokens, **case)
                report['memory'].append(dict(case=label, card=card, tokens=tokens,
                                             params=params, layers=layers, width=width))
    return report


def fits(row):
    return next((card for card, size in CARDS.items() if row['memory'] <= size), 'none')


def text(report):
    """The report as Markdown."""
    u, steps = report['options']['utilisation'], report['steps']
    planner = [{'batch': f'{r["batch_size"]}', 'GPUs': f'{r["gpus"]}',
                'pairs a GPU': f'{r["batch_size"] / r["gpus"]:g}',
                'micro-steps': f'{r["micro_steps"]:.1f}', 'tokens a row': f'{r["row_tokens"]:,.0f}',
                'padding': f'{r["padding"]:.1%}',
                **{f'{load}: mean, worst': f'{r[f"{name} imbalance"]:.1%}, {r[f"{name} worst"]:.1%}' for load, name in
                   (('tokens', 'tokens'), ('FLOPs 124M', 'GPT-2 124M'), ('FLOPs XL', 'GPT-2 XL'))},
                'plan ms': f'{1e3 * r["plan_seconds"]:.2f}', 'pack ms a row': f'{1e3 * r["pack_seconds"]:.2f}'}
               for r in report['planner']]
    times = [{'model': r['model'], 'GPUs': f'{r["gpus"]}', 'batch': f'{r["batch_size"]}',
              'ms a step': f'{1e3 * r["seconds"]:,.1f}', **{part: f'{r[part] / r["seconds"]:.0%}' for part in PARTS},
              'whole ring ms': f'{1e3 * r["ring"]:,.1f}', 'pairs/s': f'{r["pairs_per_second"]:,.0f}',
              'scaling': f'{r["scaling"]:.0%}',
              'bf16 ring gains': f'{r["seconds"] / r["seconds_bf16_gradients"] - 1:+.0%}',
              'GB': f'{r["memory"] / 1e9:,.0f}', 'card': fits(r)}
             for name in SHAPES for r in steps if r['model'] == name and r['gpus'] > 1]
    hidden = [{'GPUs': f'{world}', 'gradients': kind,
               **{f'{h["utilisation"]:.0%} of peak': f'{h["tokens"]:,.0f} tokens, batch {h["batch_size"]:,.0f}'
                  for h in report['hidden'] if (h['gpus'], h['gradients']) == (world, kind)}}
              for world in WORLDS[1:] for kind in ('float32', 'bfloat16')]
    cells = {}
    for m in report['memory']:
        label = f'{m["card"]}, {m["tokens"]:,} tokens a row'
        row = cells.setdefault(m['case'], {'largest model': m['case']})
        row[label] = f'{m["params"] / 1e9:.1f} B ({m["layers"]} x {m["width"]:,})'
    heading = (f'The steps are computed, not measured. {report["pairs"]:,} pairs of {report["data"]}, '
               f'{report["tokens_a_pair"]:.0f} distinct tokens a pair; {report["options"]["steps"]} full batches of '
               f'each size; rows of at most {report["row_tokens"]:,} tokens; '
               f'H100 at {u:.0%} of {PEAK / 1e12:.0f} TFLOP/s, '
               f'ring {NVLINK / 1e9:.0f} GB/s in a node and {min(NVLINK, NETWORK) / 1e9:.0f} GB/s between nodes; '
               'RMSprop, live reference, no checkpointing.')
    return '\n\n'.join([heading, '## The planner', table(planner), '## A step', table(times),
                        '## The last row that hides the ring, and the batch with one such row a GPU', table(hidden),
                        '## The largest model that fits', table(list(cells.values()))]) + '\n'


def draw(report, path):
    """Shares of a step, a panel for each cluster and batch."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    colours = dict(zip(PARTS, ('#4c78a8', '#f2b134', '#9ecae9', '#d1495b', '#72b7a1', '#7f7f7f')))
    figure, axes = plt.subplots(2, 2, figsize=(13, 7.6), sharex=True, sharey=True, constrained_layout=True)
    for ax, (world, batch_size) in zip(axes.flat, ((w, b) for w in WORLDS[1:] for b in BATCHES)):
        rows = [r for r in report['steps'] if (r['gpus'], r['batch_size']) == (world, batch_size)]
        left = np.zeros(len(rows))
        for part in PARTS:
            share = np.array([100 * r[part] / r['seconds'] for r in rows])
            ax.barh(range(len(rows)), share, left=left, color=colours[part], label=part, height=0.72)
            for y, (x, width) in enumerate(zip(left, share)):
                if width >= 4:
                    ax.text(x + width / 2, y, f'{width:.0f}', ha='center', va='center', fontsize=8,
                            color='black' if part in ('waiting', 'casts', 'optimizer') else 'white')
            left += share
        for y, r in enumerate(rows):
            card = fits(r)
            verdict = {'80 GB': '', 'none': ', fits neither card'}.get(card, f', needs {card}')
            ax.text(101.5, y, f'{1e3 * r["seconds"]:,.0f} ms{verdict}',
                    va='center', fontsize=8.5, color='0.15' if card == '80 GB' else '#b03030')
        ax.set_yticks(range(len(rows)), [r['model'] for r in rows])
        ax.set_xlim(0, 138)
        ax.set_xticks(range(0, 101, 20))
        nodes = f'{world} GPUs, one node' if world <= NODE else f'{world // NODE} nodes of {NODE} GPUs'
        ax.set_title(f'{nodes}, batch {batch_size}: {batch_size // world} pairs a GPU', fontsize=11, loc='left')
        ax.spines[['top', 'right']].set_visible(False)
        ax.spines['bottom'].set_bounds(0, 100)
    axes[0, 0].invert_yaxis()
    for ax in axes[1]:
        ax.set_xlabel('% of the step', x=100 / 138 / 2)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    exposed = any(r['input'] for r in report['steps'])
    names = {'waiting': 'waiting for the slowest rank', 'all-reduce': 'exposed all-reduce',
             'input': 'exposed input' if exposed else 'exposed input (none)'}
    labels = [names.get(label, label) for label in labels]
    figure.legend(handles, labels, loc='outside lower center', ncols=len(PARTS), frameon=False, fontsize=10)
    figure.suptitle('A DPO step by the model of repro/scale.py, computed: H100 at '
                    f'{report["options"]["utilisation"]:.0%} of peak, DDP, live reference, no checkpointing',
                    fontsize=11.5)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(f'error: {message} (--help lists the options)')
    add = parser.add_argument
    add('--data', default='', help='a folder that prepare_prefs.py made; default: random pairs with the lengths of HH')
    add('--pairs', type=int, default=10000, help='of the random ones')
    add('--steps', type=int, default=100, help='full batches to plan, of each size')
    add('--row_tokens', type=int, default=8192, help="dpo.py's knob")
    add('--utilisation', type=float, default=UTILISATION, help="of the data sheet's peak; GPT-2 XL's on one H200")
    add('--seed', type=int, default=1337)
    add('--out', default='', help='writes OUT.json, OUT.md and OUT.png')
    options = parser.parse_args(argv)
    if not (options.steps > 0 and options.utilisation > 0):
        parser.error(f'steps={options.steps} and utilisation={options.utilisation} must be more than 0')
    if not os.path.isdir(os.path.dirname(options.out) or '.'):
        parser.error(f'out={options.out}: no such folder')
    if options.data:
        try:
            groups = Groups(options.data, 'train')
        except UserError as error:
            parser.error(f'{error}')
        what = f'{os.path.basename(groups.meta["source"])} {groups.meta["data_dir"]}'.strip()
    else:
        groups, what = synthetic(options.pairs, options.seed), "random ids with HH's lengths"
    if groups.K != 2 or len(groups.lengths) < max(BATCHES):
        parser.error(f'{options.data or "pairs"}: {len(groups.lengths):,} groups of {groups.K} responses; needed are '
                     f'{max(BATCHES)} pairs at least')
    if 0 < options.row_tokens < groups.lengths.max():
        parser.error(f'row_tokens={options.row_tokens} is less than the longest pair, {groups.lengths.max()} tokens')
    report = measure(groups, what, options)
    print(text(report), end='')
    if options.out:
        write_json(f'{options.out}.json', report)
        with open(f'{options.out}.md', 'w') as f:
            f.write(text(report))
        draw(report, f'{options.out}.png')


if __name__ == '__main__':
    main()
