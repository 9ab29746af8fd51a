"""Every loss of dpo.py on one task: the same pairs, the same budget, each at settings of its own, clean labels and flipped ones.

    python repro/family.py                  # prepares the reviews and their SFT model where they are missing, then compares
    python repro/family.py --quick          # one seed, four losses, fewer pairs
    python repro/family.py --search         # how FOUND was chosen

Four completions of each prefix are drawn from the SFT model and labelled by the true reward: two disjoint pairs a prefix
(ties left out) for all losses, and the same four as one ranking for plackett_luce, so that every loss learns from the same
responses and sees as many of them a step. "Flipped" are the same with 20% of the pairs swapped, of the rankings reversed;
val is one set of clean pairs. A run is `python dpo.py` itself, in a folder of its own; its policy is judged by samples on
held-out prefixes. Over-training: few pairs, many epochs, a constant rate. A seed stands for the completions, the flips and
the order; the SFT model is one.

Runs go to out/reviews/family, one file each: a comparison that was stopped goes on where it stopped, and a run whose settings
changed is made again. The data sets stay in data/reviews-family-<seed> and beside it. Writes <out>.json, .md and .png.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import config                                                                               # noqa: E402
from config import In, UserError                                                            # noqa: E402
from frontier import mean_and_error, prepare                                                # noqa: E402
from model import fingerprint                                                               # noqa: E402
from prepare_prefs import text_of, write_groups                                             # noqa: E402
from rollout import Task                                                                    # noqa: E402
from sample import response_logps                                                           # noqa: E402
from sweep import path_of, result_of, sweep, write_results                                             # noqa: E402

LABELS = {'dpo': 'DPO', 'cdpo': 'cDPO', 'robust': 'robust DPO', 'ipo': 'IPO', 'ipo_mean': 'IPO, token means', 'hinge': 'hinge',
          'dpo_norm': 'DPO, token means', 'simpo': 'SimPO', 'orpo': 'ORPO', 'kto': 'KTO', 'plackett_luce': 'Plackett-Luce',
          'dpo_nll': 'DPO + NLL'}
FIXED = {'cdpo': {'label_smoothing': 0.2}, 'robust': {'label_smoothing': 0.2},      # the share that is flipped
         'simpo': {'gamma': 1.0}, 'dpo_nll': {'nll_coef': 0.2}}
TRIED = {       # (beta, learning rate); where those ended too far out or nowhere, more
    'dpo': ((0.5, 6e-4), (0.5, 1.2e-3), (1.0, 1.2e-3)),
    'cdpo': ((0.25, 6e-4), (0.25, 1.2e-3), (0.5, 1.2e-3)),
    'robust': ((0.5, 6e-4), (0.5, 1.2e-3), (1.0, 1.2e-3), (0.5, 9e-4)),
    'ipo': ((0.1, 6e-4), (0.1, 1.2e-3), (0.2, 1.2e-3)),
    'ipo_mean': ((2.0, 6e-4), (2.0, 1.2e-3), (5.0, 1.2e-3)),
    'hinge': ((0.25, 6e-4), (0.25, 1.2e-3), (0.5, 1.2e-3), (0.5, 9e-4)),
    'dpo_norm': ((10.0, 6e-4), (10.0, 1.2e-3), (20.0, 1.2e-3)),
    'simpo': ((10.0, 6e-4), (10.0, 1.2e-3), (5.0, 1.2e-3), (10.0, 9e-4)),
    'orpo': ((5.0, 6e-4), (5.0, 1.2e-3), (2.0, 1.2e-3)),
    'kto': ((0.25, 6e-4), (0.25, 1.2e-3), (0.5, 1.2e-3), (1.0, 6e-4), (1.0, 1.2e-3)),
    'plackett_luce': ((0.5, 6e-4), (0.5, 1.2e-3), (1.0, 1.2e-3)),
    'dpo_nll': ((0.5, 6e-4), (0.5, 1.2e-3), (1.0, 1.2e-3)),
}
FOUND = {       # by --search, repro/results/family-search.md
    'dpo': {'beta': 0.5, 'learning_rate': 1.2e-3}, 'cdpo': {'beta': 0.25, 'learning_rate': 1.2e-3},
    'robust': {'beta': 0.5, 'learning_rate': 6e-4}, 'ipo': {'beta': 0.1, 'learning_rate': 1.2e-3},
    'ipo_mean': {'beta': 2.0, 'learning_rate': 1.2e-3}, 'hinge': {'beta': 0.5, 'learning_rate': 9e-4},
    'dpo_norm': {'beta': 10.0, 'learning_rate': 1.2e-3}, 'simpo': {'beta': 10.0, 'learning_rate': 9e-4},
    'orpo': {'beta': 5.0, 'learning_rate': 1.2e-3}, 'kto': {'beta': 1.0, 'learning_rate': 1.2e-3},
    'plackett_luce': {'beta': 0.5, 'learning_rate': 1.2e-3}, 'dpo_nll': {'beta': 0.5, 'learning_rate': 1.2e-3},
}
MOST_KL, LEAST_FORMED = 4.0, 0.8        # the rule of the search: the highest true reward within these
K, SAMPLES, FLIPPED = 4, 2, 0.2         # completions a prefix; samples of each held-out one; share of labels turned round
BATCH = 16                              # pairs a step; of rankings half as many: 32 responses in both
OVER = ('dpo', 'cdpo', 'ipo')     # over-trained
QUICK, OVER_QUICK = ('dpo', 'ipo', 'simpo', 'plackett_luce'), ('dpo', 'ipo')
FURTHEST = 20.0                         # nats of KL that the figure shows
FEW, OVER_EPOCHS = 250, (1, 2, 6, 16)        # on so many pairs, judged after these


# -----------------------------------------------------------------------------
# the data

def completions(task, reference, prompts, seed):
    """K responses of the reference to each prompt: groups [prompt, response_1, ..., response_K] and rewards (n, K)."""
    repeated = [p for p in prompts for _ in range(K)]
    responses = task.draw(reference, repeated, seed)
    rewards = task.score(repeated, responses)['true_reward'].reshape(-1, K)
    return [[p, *responses[i * K:(i + 1) * K]] for i, p in enumerate(prompts)], rewards


def pairs_of(groups, rewards):
    """[prompt, chosen, rejected] of responses 1 and 2, 3 and 4 ... of each group, where their rewards differ."""
    return [[group[0], *(group[1 + j] for j in ((i, i + 1) if row[i] > row[i + 1] else (i + 1, i)))]
            for group, row in zip(groups, rewards) for i in range(0, len(row), 2) if row[i] != row[i + 1]]


def rankings_of(groups, rewards):
    """[prompt, best, ..., worst] of each group without ties."""
    return [[group[0], *(group[1 + j] for j in np.argsort(-row))]
            for group, row in zip(groups, rewards) if len(set(row)) == len(row)]


def flipped(groups, share, seed):
    """The same groups, the responses of `share` of them in reverse."""
    rng = np.random.default_rng([seed, 0, 1])       # not [seed], which is [seed, 0]: the order that dpo.py takes the groups in
    chosen = set(rng.permutation(len(groups))[:round(share * len(groups))].tolist())
    return [[group[0], *group[:0:-1]] if i in chosen else group for i, group in enumerate(groups)]


def set_of(job, ending):
    """The name of a data set of the job's seed."""
    common = job['common']
    return f"{common['name']}-{os.path.basename(common['folder'])}-{job['seed']}{ending}"


# -----------------------------------------------------------------------------
# what a policy is judged by

def distinct_3(texts):
    """The share of different ones among all word trigrams of the texts; none crosses from one text to the next."""
    words = [re.findall(r'\w+', text.lower()) for text in texts]
    trigrams = [tuple(some[i:i + 3]) for some in words for i in range(len(some) - 2)]
    return len(set(trigrams)) / max(1, len(trigrams))


def judge(task, policy, reference, prompts, seed):
    """Means over samples at temperature 1: the reward file's numbers, KL from the reference, entropy (the mean of
    -log policy(y | x), which is unbiased), both in nats a response, and its tokens; distinct_3 of a sample a prompt."""
    repeated = [p for p in prompts for _ in range(SAMPLES)]
    responses = task.draw(policy, repeated, seed)
    groups, cpu = list(zip(repeated, responses)), torch.device('cpu')
    logps, ref_logps = (response_logps(model, groups, cpu, nullcontext())[:, 0] for model in (policy, reference))
    found = task.score(repeated, responses) | {'kl': logps - ref_logps, 'entropy': -logps, 'tokens': [len(r) for r in responses]}
    texts = [text_of(task.tokenizer, ids) for ids in responses[::SAMPLES]]
    return {**{name: float(np.mean(np.asarray(values))) for name, values in found.items()}, 'distinct_3': distinct_3(texts)}


# -----------------------------------------------------------------------------
# jobs

# The peak memory that the kernel reports of a process is at least what its parent had where it was started, so a small one
# starts it. Its last line: seconds of CPU, peak bytes, exit status.
START = '''import os, sys
_, status, used = os.wait4(os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ), 0)
print(used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == 'darwin' else 1024), os.waitstatus_to_exitcode(status))'''


def run_dpo(folder, knobs):
    """`python dpo.py` with these knobs in `folder`. -> seconds of CPU, peak memory in bytes, '' or why the loss was not finite"""
    command = [sys.executable, '-c', START, os.path.join(ROOT, 'dpo.py'), *(f'--{key}={value}' for key, value in knobs.items())]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    seconds, memory, status = done.stdout.splitlines()[-1].split() if done.returncode == 0 else (0, 0, 1)
    error = '' if status == '0' else (done.stderr.strip().splitlines() or ['no message'])[-1].removeprefix('error: ')
    if error and 'not finite' not in error:
        raise UserError(f'dpo.py failed: {error}')
    return float(seconds), int(memory), error


def needs(job, jobs):
    """The jobs whose files this one reads."""
    return [other for other in jobs if job['method'] != 'data' and other['method'] == 'data' and other['seed'] == job['seed']]


def work(job, needed):
    """Do a job, in its worker: make the data of a seed, or train with one loss and judge. -> what was found"""
    torch.set_num_threads(1)
    common, seed, loss = job['common'], job['seed'], job['method']
    task = Task(common['name'], common['reward'])
    reference = task.load('').requires_grad_(False)
    first, last = common['held_out']
    held_out = task.prompts('val', last)[first:]

    if loss == 'data':
        groups, rewards = completions(task, reference, task.prompts('train', common['prefixes']), seed)
        val = pairs_of(*completions(task, reference, task.prompts('val', common['val_prefixes']), 0))
        pairs, rankings = pairs_of(groups, rewards), rankings_of(groups, rewards)
        sets = {'': pairs, '-flipped': flipped(pairs, FLIPPED, seed), '-few': pairs[:FEW],
                '-rankings': rankings, '-rankings-flipped': flipped(rankings, FLIPPED, seed)}
        for ending, train in sets.items():
            write_groups(os.path.join('data', set_of(job, ending)), task.folder, {'train': train, 'val': val})
        return {'points': [judge(task, reference, reference, held_out, seed + 500)], 'pairs': len(pairs), 'rankings': len(rankings)}

    few, ranked = job['labels'] == 'few', loss == 'plackett_luce'
    data = set_of(job, '-rankings' * ranked + {'clean': '', 'flipped': '-flipped', 'few': '-few'}[job['labels']])
    batch = BATCH // 2 if ranked else BATCH
    knobs = {'name': data, 'init_from': os.path.abspath(os.path.join('out', common['name'], 'sft')), 'loss': loss.removesuffix('_nll'),
             **{key: value for key, value in job.items() if key not in ('method', 'seed', 'common', 'labels')},
             'batch_size': batch, 'optimizer': 'adamw', 'schedule': 'constant' if few else 'linear', 'warmup_steps': 20,
             'eval_interval': 0, 'kl_prompts': 0, 'log_interval': math.ceil(FEW / batch) if few else 10, 'save_interval': 0, 'seed': seed,
             'device': 'cpu', 'compile': False, 'resume': True}
    points, cost, peak, stopped = [], 0.0, 0, ''
    folder = os.path.join(path_of(job), 'run')
    shutil.rmtree(folder, ignore_errors=True)       # of one that was killed
    os.makedirs(folder)
    os.symlink(os.path.abspath('data'), os.path.join(folder, 'data'))       # dpo.py writes to out/ beside it
    out = os.path.join(folder, 'out', data, 'dpo')
    for epochs in common['over_epochs'] if few else [job['epochs']]:
        seconds, memory, stopped = run_dpo(folder, {**knobs, 'epochs': epochs})
        cost, peak = cost + seconds, max(peak, memory)
        shutil.copy(os.path.join(out, 'log.jsonl'), path_of(job))
        if stopped:
            break
        with open(os.path.join(out, 'log.jsonl')) as f:
            log = [json.loads(line) for line in f]
        trained, tested = ([row for row in log if key in row][-1] for key in ('loss', 'eval/loss'))
        points.append({'epochs': epochs, 'margin': trained['rewards/margins'], 'held_out_margin': tested['eval/rewards/margins'],
                       'accuracy': tested['eval/rewards/accuracies'], 'held_out_loss': tested['eval/loss'],
                       **judge(task, task.load(out), reference, held_out, seed + 500)})
    shutil.rmtree(folder)
    rates = [row['pairs_per_second'] for row in log if 'pairs_per_second' in row] if points else [math.nan]
    return {'points': points, 'stopped': stopped, 'cpu_seconds': cost, 'peak_memory': peak, 'ms_a_step': 1000 * batch / np.median(rates)}


def summary(result):
    """One line on a finished run."""
    if result['job']['method'] == 'data':
        return f'{result["pairs"]:,} pairs, {result["rankings"]:,} rankings'
    if not result['points']:
        return result['stopped']
    last = result['points'][-1]
    return (f'reward {last["true_reward"]:+.2f}, KL {last["kl"]:.2f}, well-formed {last.get("well_formed", math.nan):.0%}, '
            f'accuracy {last["accuracy"]:.3f}')


def minutes(jobs, workers):
    """What the jobs take, from runs on 2 CPU cores side by side."""
    seconds = 0.0
    for job in jobs:
        common = job['common']
        if job['method'] == 'data':
            seconds += 12 + 0.02 * (common['prefixes'] + common['val_prefixes'])
        elif job['labels'] == 'few':
            seconds += len(common['over_epochs']) * 14 + max(common['over_epochs']) * FEW / 100
        else:
            seconds += 14 + job['epochs'] * 2 * common['prefixes'] / 100
    return seconds / workers / 60


# -----------------------------------------------------------------------------
# the search

def winner(results):
    """Of the runs of one loss, the one with the highest true reward within the rule's bounds, or None."""
    fit = [r for r in results if r['points'] and r['points'][-1]['kl'] <= MOST_KL
           and r['points'][-1].get('well_formed', 1.0) >= LEAST_FORMED]
    return max(fit, key=lambda r: r['points'][-1]['true_reward'], default=None)


def own_knobs(job):
    """The settings that are the loss's own."""
    return {key: value for key, value in job.items() if key not in ('method', 'seed', 'common', 'labels', 'epochs')}


def search_table(results):
    """Markdown: every setting that was tried, the winners in bold, and FOUND as Python."""
    lines = [f'The highest true reward with a KL of at most {MOST_KL:g} nats and {LEAST_FORMED:.0%} of the samples well-formed wins (bold).', '',
             '| loss | setting | true reward | KL | well-formed | accuracy | tokens |', '| --- | --- | ---: | ---: | ---: | ---: | ---: |']
    found = {}
    for loss in LABELS:
        mine = [r for r in results if r['job']['method'] == loss]
        best = winner(mine)
        found |= {loss: own_knobs(best['job'])} if best else {}
        for result in mine:
            cells = [LABELS[loss], ', '.join(f'{key} {value:g}' for key, value in own_knobs(result['job']).items())]
            if result['points']:
                last = result['points'][-1]
                cells += [f"{last['true_reward']:+.2f}", f"{last['kl']:.2f}", f"{last.get('well_formed', math.nan):.0%}",
                          f"{last['accuracy']:.1%}", f"{last['tokens']:.1f}"]
            else:
                cells += [result['stopped'], *[''] * 4]
            lines.append('| ' + ' | '.join(f'**{cell}**' if result is best and cell else cell for cell in cells) + ' |')
    return '\n'.join([*lines, '', '    FOUND = {', *(f'        {loss!r}: {knobs},' for loss, knobs in found.items()), '    }', ''])


# -----------------------------------------------------------------------------
# the tables and the figure

def runs_of(results, loss, labels):
    """The finished runs of a loss on such labels, by seed."""
    return [r for r in results if r['job']['method'] == loss and r['job'].get('labels') == labels and r['points']]


def cell(values, form, scale=1.0):
    """'mean ± standard error' of one value a seed; '-' of none."""
    if not values:
        return '-'
    mean, error = mean_and_error(scale * np.array(values))
    return format(mean, form) + ('' if math.isnan(error) else f' ± {error:{form.lstrip("+")}}')


def table(rows):
    """Markdown of a list of rows of strings, the first of them the head."""
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [rows[0], ['---', *['---:'] * (len(rows[0]) - 1)], *rows[1:]]) + '\n'


def comparison(results):
    """The table of all losses, clean and flipped; the SFT model's row first."""
    columns = [('true reward', 'true_reward', '+.2f', 1), ('KL, nats', 'kl', '.2f', 1), ('accuracy, %', 'accuracy', '.1f', 100),
               ('well-formed, %', 'well_formed', '.0f', 100)]
    clean_only = [('tokens', 'tokens', '.1f', 1), ('entropy, nats', 'entropy', '.1f', 1), ('distinct-3, %', 'distinct_3', '.1f', 100)]
    rows = [['loss', *(f'{title}{more}' for title, *_ in columns for more in ('', ', flipped')), *(title for title, *_ in clean_only)]]
    data = [r for r in results if r['job']['method'] == 'data']
    rows.append(['the SFT model', *(text for _, key, form, scale in columns
                                    for text in (cell([r['points'][-1][key] for r in data if key in r['points'][-1]], form, scale), '')),
                 *(cell([r['points'][-1][key] for r in data], form, scale) for _, key, form, scale in clean_only)])
    for loss in LABELS:
        if not runs_of(results, loss, 'clean'):
            continue

        def text(labels, key, form, scale):
            return cell([r['points'][-1][key] for r in runs_of(results, loss, labels) if key in r['points'][-1]], form, scale)
        rows.append([LABELS[loss], *(text(labels, *rest) for _, *rest in columns for labels in ('clean', 'flipped')),
                     *(text('clean', *rest) for _, *rest in clean_only)])
    return table(rows)


def costs(results):
    """The table of settings, time and memory."""
    rows = [['loss', 'settings', 'dpo.py, s of CPU', 'ms a step', 'peak memory, MB']]
    for loss in LABELS:
        if runs := runs_of(results, loss, 'clean'):
            rows.append([LABELS[loss], ', '.join(f'{key} {value:g}' for key, value in own_knobs(runs[0]['job']).items()),
                         cell([r['cpu_seconds'] for r in runs], '.0f'), cell([r['ms_a_step'] for r in runs], '.0f'),
                         cell([r['peak_memory'] for r in runs], '.0f', 1e-6)])
    return table(rows)


def over_training(results):
    """The table of the long runs on few pairs. The margin is in nats of log-ratio: the loss's own divided by beta."""
    epochs = sorted({p['epochs'] for loss in OVER for r in runs_of(results, loss, 'few') for p in r['points']})
    rows = [['loss', 'measure', *(f'epoch {epoch}' for epoch in epochs)]]
    for loss in OVER:
        runs = runs_of(results, loss, 'few')
        goal = f" (goal {0.5 / runs[0]['job']['beta']:.1f})" if runs and loss == 'ipo' else ''
        for title, key, form in (('margin on the training pairs, nats' + goal, 'margin', '.1f'), ('on held-out pairs', 'held_out_margin', '.1f'),
                                 ('accuracy on these, %', 'accuracy', '.1f'), ('KL, nats', 'kl', '.1f'), ('true reward', 'true_reward', '+.2f'),
                                 ('well-formed, %', 'well_formed', '.0f')) if runs else ():
            scale = 1 / runs[0]['job']['beta'] if 'margin' in key else 100 if '%' in title else 1
            rows.append([LABELS[loss], title, *(cell([p[key] for r in runs for p in r['points'] if p['epochs'] == epoch and key in p], form, scale)
                                                for epoch in epochs)])
    return table(rows)


KINDS = {       # the figure's colours, of Okabe and Ito: told apart by the colour-blind too
    '#0072B2': ('dpo', 'cdpo', 'robust', 'dpo_norm', 'plackett_luce', 'dpo_nll'), '#D55E00': ('ipo', 'ipo_mean'), '#CC79A7': ('hinge',),
    '#009E73': ('simpo', 'orpo'), '#000000': ('kto',),
}
COLOURS = {loss: colour for colour, losses in KINDS.items() for loss in losses}


def label_points(ax, points, texts, colours, others):
    """Write each text beside its point (data units), where it covers no point, none of `others` and no other text."""
    from matplotlib.text import Text
    renderer = ax.figure.canvas.get_renderer()
    ax.figure.draw_without_rendering()
    ax.figure.set_layout_engine('none')         # from here on nothing moves
    at, taken = ax.transData.transform([*points, *others]), []
    places = [(r * math.cos(a), r * math.sin(a)) for r in (8, 16, 26, 38) for a in np.linspace(0, 2 * math.pi, 17)[:-1]]
    for point, text, colour in zip(points, texts, colours):
        for x, y in places:
            note = ax.annotate(text, point, (x, y), textcoords='offset points', fontsize=8, color=colour, va='center',
                               ha='left' if x > 1 else 'right' if x < -1 else 'center',
                               arrowprops=dict(arrowstyle='-', lw=0.8, color=colour, shrinkA=0, shrinkB=3) if math.hypot(x, y) > 10 else None)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(1)         # without the arrow
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.padded(3).contains(*p) for p in at):
                break
            if (x, y) != places[-1]:
                note.remove()
        taken.append(box)


def figure(results, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, axes = plt.subplots(2, 2, figsize=(13, 10.5), constrained_layout=True)
    (scatter, drop), (margins, distances) = axes
    mean = {}
    for loss in LABELS:
        for labels in ('clean', 'flipped'):
            if runs := runs_of(results, loss, labels):
                mean[loss, labels] = [mean_and_error([r['points'][-1][key] for r in runs]) for key in ('kl', 'true_reward')]
    losses = sorted((loss for loss in LABELS if (loss, 'clean') in mean), key=lambda loss: mean[loss, 'clean'][1][0])
    for y, loss in enumerate(losses):
        colour = COLOURS[loss]
        ends = [mean[loss, labels] for labels in ('clean', 'flipped') if mean.get((loss, labels), [[math.inf]])[0][0] <= FURTHEST]
        if mean.get((loss, 'flipped'), [[0]])[0][0] > FURTHEST:
            drop.text(ends[0][1][0] - 0.15, y, 'flipped: fell apart, off the scale', color=colour, fontsize=8, ha='right', va='center')
        scatter.plot(*([end[i][0] for end in ends] for i in (0, 1)), color=colour, lw=0.6, alpha=0.35, zorder=1)
        drop.plot([end[1][0] for end in ends], [y] * len(ends), color=colour, lw=1, alpha=0.5, zorder=1)
        for (kl, reward), fill in zip(ends, (colour, 'white')):
            style = dict(fmt='o', ms=6, color=colour, mfc=fill, lw=0.8)
            scatter.errorbar(kl[0], reward[0], np.nan_to_num(reward[1]), np.nan_to_num(kl[1]), **style)
            drop.errorbar(reward[0], y, xerr=np.nan_to_num(reward[1]), **style)
    scatter.set(title='true reward against KL: filled, clean labels; hollow, 20% flipped', xlabel='KL(policy || SFT), nats a response',
                ylabel='true reward, nats')
    drop.set(title='what flipped labels cost', xlabel='true reward, nats', yticks=range(len(losses)), yticklabels=[LABELS[loss] for loss in losses])
    for tick, loss in zip(drop.get_yticklabels(), losses):
        tick.set_color(COLOURS[loss])

    styles = {'dpo': ('#0072B2', '-', 'o'), 'cdpo': ('#56B4E9', '--', 's'), 'ipo': ('#D55E00', '-', 'D')}
    few = {loss: runs for loss in OVER if (runs := runs_of(results, loss, 'few'))}
    epochs = []
    for loss, runs in few.items():
        colour, dashes, marker = styles[loss]
        epochs = sorted({p['epochs'] for r in runs for p in r['points']})
        for ax, key, scale in ((margins, 'margin', 1 / runs[0]['job']['beta']), (distances, 'kl', 1)):
            found = [mean_and_error([scale * p[key] for r in runs for p in r['points'] if p['epochs'] == epoch]) for epoch in epochs]
            middle, error = np.nan_to_num(np.array(found)).T
            ax.plot(epochs, middle, color=colour, ls=dashes, marker=marker, ms=4, label=LABELS[loss])
            ax.fill_between(epochs, middle - error, middle + error, color=colour, alpha=0.15, lw=0)
        if loss == 'ipo':
            margins.axhline(0.5 / runs[0]['job']['beta'], color=colour, lw=0.8, ls=':', label="IPO's goal, 1/(2 tau)")
    margins.set(title=f'over-training on {FEW} pairs: their margin h', ylabel='log-ratio of chosen - rejected, nats')
    distances.set(title=f'over-training on {FEW} pairs: distance from the SFT model', ylabel='KL(policy || SFT), nats a response')
    for ax in (margins, distances):
        ax.set(xlabel='epochs', xscale='log', xticks=epochs, xticklabels=epochs)
        ax.minorticks_off()
        ax.legend(fontsize=9, frameon=False, loc='upper left')
    for ax in axes.flat:
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
    crosses = [(kl + dx, reward + dy) for (kl, e), (reward, f) in mean.values() if kl <= FURTHEST
               for dx, dy in ((0, 0), *((s * np.nan_to_num(e), 0) for s in (-1, -.5, .5, 1)), *((0, s * np.nan_to_num(f)) for s in (-1, -.5, .5, 1)))]
    label_points(scatter, [[mean[loss, 'clean'][i][0] for i in (0, 1)] for loss in losses], [LABELS[loss] for loss in losses],
                 [COLOURS[loss] for loss in losses], crosses)
    plot.savefig(path, dpi=110)


# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment; the runs go to out/<name>/family
    reward: str = config.EMBEDDED                   # a Python file with the true reward: as in sample.py
    seeds: In[int, 'x >= 1'] = 3                    # 1 to so many
    prefixes: In[int, 'x >= 1'] = 1600              # distinct ones of train, 4 completions and so 2 pairs each
    held_out: In[int, 'x >= 2'] = 250               # prefixes of val
    workers: In[int, 'x >= 1'] = os.cpu_count() or 1    # runs at a time, one thread each
    quick: bool = False                             # one seed, 200 prefixes, four losses, fewer epochs of over-training
    search: bool = False                            # the search for FOUND instead, on seed 0 and the other prefixes of val
    out: str = ''                                   # '' = repro/results/family, with -quick or -search


def main(argv=None):
    cfg = config.load(Config, 'family', argv)
    if cfg.quick and cfg.search:
        raise UserError('quick and search are both set: keep one')
    prepare(cfg.name)
    task = Task(cfg.name, cfg.reward)
    there, needed = len(task.prompts('val', 2 * cfg.held_out)), (2 if cfg.search else 1) * cfg.held_out
    if there < needed:
        raise UserError(f'held_out={cfg.held_out}: data/{cfg.name} has {there} distinct prompts in val, and {needed} are needed')
    common = {'name': cfg.name, 'reward': cfg.reward, 'folder': os.path.join('out', cfg.name, 'family' + ('-quick' if cfg.quick else '')),
              'prefixes': 200 if cfg.quick else cfg.prefixes, 'val_prefixes': 50 if cfg.quick else cfg.held_out,
              'held_out': [needed - cfg.held_out, needed], 'over_epochs': [1, 4, 12] if cfg.quick else list(OVER_EPOCHS),
              'sft': fingerprint(task.load(''))}
    jobs = []
    for seed in [0] if cfg.search else [1] if cfg.quick else range(1, cfg.seeds + 1):
        def job(loss, labels, epochs=1, **knobs):
            return {'method': loss, 'seed': seed, 'common': common, 'labels': labels, **FIXED.get(loss, {}), **knobs, 'epochs': epochs}
        jobs.append({'method': 'data', 'seed': seed, 'common': common})
        if cfg.search:
            jobs += [job(loss, 'clean', learning_rate=rate, beta=beta) for loss in LABELS for beta, rate in TRIED[loss]]
            continue
        jobs += [job(loss, labels, 4 if cfg.quick else 1, **FOUND[loss]) for loss in (QUICK if cfg.quick else LABELS) for labels in ('clean', 'flipped')]
        jobs += [job(loss, 'few', common['over_epochs'][-1], **FOUND[loss]) for loss in (OVER_QUICK if cfg.quick else OVER)]
    left = [job for job in jobs if result_of(job) is None]
    print(f'about {minutes(left, cfg.workers):.0f} minutes')
    began = time.perf_counter()
    results = sweep(jobs, cfg.workers, work, needs, summary)
    print(f'that took {time.perf_counter() - began:,.0f} s; the runs, {sum(r["seconds"] for r in results):,.0f} s of one core')

    out = cfg.out or os.path.join(ROOT, 'repro', 'results', 'family' + ('-quick' if cfg.quick else '-search' if cfg.search else ''))
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    if cfg.search:
        text = search_table(results)
    else:
        stopped = [f"- {path_of(r['job'])}: {r['stopped']}" for r in results if r.get('stopped')]
        text = '\n'.join([comparison(results), costs(results), over_training(results), *stopped])
        figure(results, out + '.png')
    write_results(out, text, results)
    print(f'\n{text}\nwritten: {out}.md, .json' + ('' if cfg.search else ', .png'))


if __name__ == '__main__':
    main()
