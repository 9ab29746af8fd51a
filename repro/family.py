"""Every loss of nanodpo/losses.py on one task: the same pairs, the same budget, clean labels and flipped ones.

    python repro/family.py                  # makes the reviews and their SFT model if they are missing, then compares
    python repro/family.py --quick          # one seed, four losses, fewer pairs
    python repro/family.py --search         # how FOUND was chosen
    python repro/family.py --only=dpo,wpo --out=repro/results/two       # these losses alone, in a table of their own

Four completions of each prefix are drawn from the SFT model and labelled by the true reward. They make two disjoint
pairs a prefix (ties left out) for most losses, and one ranking for those that take rankings. So every loss learns from
the same responses, and sees as many of them a step, at settings of its own. "Flipped" are the same data with 20% of the
pairs swapped, of the rankings reversed; val is one set of clean pairs. A run is `python dpo.py` itself, in a folder of
its own. Its policy is judged by samples on held-out prefixes. Over-training takes few pairs, many epochs and a constant
rate. A seed stands for the completions, the flips and the order; the SFT model is one.

Runs go to out/reviews/family, one file each. A comparison that was stopped goes on where it stopped, and a run whose
settings changed is made again. The data sets stay in data/reviews-family-<seed> and beside it. Writes <out>.json, .md
and .png.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import config                                                                               # noqa: E402
from config import In, need                                                      # noqa: E402
from draw_prefs import write_set                                                            # noqa: E402
from frontier import mean_and_error, prepare                                                # noqa: E402
from nanodpo import losses                                                                  # noqa: E402
from nanodpo.checkpoint import fingerprint                                                  # noqa: E402
from nanodpo.losses import LOSSES                                                           # noqa: E402
from nanodpo.text import text_of                                                            # noqa: E402
from rollout import Task                                                                    # noqa: E402
from sweep import path_of, result_of, sweep, write_results                                  # noqa: E402

MOST_KL, LEAST_FORMED = 4.0, 0.8        # the rule of the search: the highest true reward within these
SEARCHED = 0, 100                       # seeds of the search, not those of the comparison
K, SAMPLES, FLIPPED = 4, 2, 0.2         # completions a prefix, samples of each held-out one, share of flipped labels
BATCH = 16                              # pairs a step; of rankings half as many: 32 responses in both
OVER = 'dpo', 'cdpo', 'ipo'             # over-trained
QUICK, OVER_QUICK = ('dpo', 'ipo', 'simpo', 'plackett_luce'), ('dpo', 'ipo')
FURTHEST = 5.0                          # nats of KL that the figure shows
FEW, OVER_EPOCHS = 250, (1, 2, 6, 16)   # over-training: on so many pairs, judged after these

METHODS = [*LOSSES, 'dpo_nll']          # the last is dpo with nll_coef
NAMES = {'dpo': 'DPO', 'cdpo': 'cDPO', 'robust': 'robust DPO', 'ipo': 'IPO', 'ipo_mean': 'IPO, token means',
         'dpo_norm': 'DPO, token means', 'simpo': 'SimPO', 'orpo': 'ORPO', 'apo_zero': 'APO-zero',
         'apo_down': 'APO-down', 'forward_kl': 'forward KL', 'js_divergence': 'Jensen-Shannon',
         'alpha_divergence': 'alpha-divergence', 'chi_po': 'chi-PO', 'wpo': 'WPO', 'kto': 'KTO',
         'plackett_luce': 'Plackett-Luce', 'dpo_nll': 'DPO + NLL'}
TRIED = {       # (beta, learning rate); where those ended too far out or nowhere, more
    'dpo': ((0.5, 6e-4), (0.5, 1.2e-3), (1.0, 1.2e-3)),
    'cdpo': ((0.25, 6e-4), (0.25, 1.2e-3), (0.5, 1.2e-3)),
    'robust': ((0.5, 6e-4), (0.5, 1.2e-3), (1.0, 1.2e-3), (0.5, 9e-4), (1.0, 9e-4)),
    'ipo': ((0.1, 6e-4), (0.1, 1.2e-3), (0.2, 1.2e-3), (0.1, 9e-4)),
    'ipo_mean': ((2.0, 6e-4), (2.0, 1.2e-3), (5.0, 1.2e-3)),
    'hinge': ((0.25, 6e-4), (0.25, 1.2e-3), (0.5, 1.2e-3), (0.5, 9e-4)),
    'dpo_norm': ((10.0, 6e-4), (10.0, 1.2e-3), (20.0, 1.2e-3)),
    'simpo': ((10.0, 6e-4), (10.0, 1.2e-3), (5.0, 1.2e-3), (10.0, 9e-4)),
    'orpo': ((5.0, 6e-4), (5.0, 1.2e-3), (2.0, 1.2e-3)),
    'apo_down': ((5.0, 3e-4), (5.0, 6e-4), (2.0, 1e-4), (1.0, 1e-4)),
    'kto': ((0.25, 6e-4), (0.25, 1.2e-3), (0.5, 1.2e-3), (1.0, 6e-4), (1.0, 1.2e-3), (0.25, 9e-4)),
    'plackett_luce': ((0.5, 6e-4), (0.5, 1.2e-3), (1.0, 1.2e-3)),
    'dpo_nll': ((0.5, 6e-4), (0.5, 1.2e-3), (1.0, 1.2e-3)),
}
FOUND = {       # by --search, repro/results/family-search.md
    'dpo': {'beta': 0.5, 'learning_rate': 1.2e-3},
    'cdpo': {'beta': 0.25, 'learning_rate': 1.2e-3},
    'robust': {'beta': 0.5, 'learning_rate': 9e-4},
    'ipo': {'beta': 0.1, 'learning_rate': 9e-4},
    'ipo_mean': {'beta': 2.0, 'learning_rate': 1.2e-3},
    'hinge': {'beta': 0.5, 'learning_rate': 9e-4},
    'dpo_norm': {'beta': 10.0, 'learning_rate': 1.2e-3},
    'simpo': {'beta': 10.0, 'learning_rate': 9e-4},
    'orpo': {'beta': 5.0, 'learning_rate': 1.2e-3},
    'apo_zero': {'beta': 0.25, 'learning_rate': 1.2e-3},
    'apo_down': {'beta': 1.0, 'learning_rate': 1e-4},
    'forward_kl': {'beta': 0.5, 'learning_rate': 9e-4},
    'js_divergence': {'beta': 0.5, 'learning_rate': 1.2e-3},
    'alpha_divergence': {'beta': 0.5, 'learning_rate': 1.2e-3},
    'chi_po': {'beta': 0.5, 'learning_rate': 1.2e-3},
    'wpo': {'beta': 1.0, 'learning_rate': 1.2e-3},
    'kto': {'beta': 0.25, 'learning_rate': 1.2e-3},
    'plackett_luce': {'beta': 0.5, 'learning_rate': 1.2e-3},
    'dpo_nll': {'beta': 0.5, 'learning_rate': 1.2e-3},
}


def loss_of(method):
    return method.removesuffix('_nll')


def name_of(method):
    return NAMES.get(method, method)


def colour_of(method):
    """The figure's colours, of Okabe and Ito: told apart by the colour-blind too. A loss has that of its link."""
    if not losses.needs(loss_of(method), 'ref_logps'):
        return '#009E73'
    of_links = {losses.squared: '#D55E00', losses.hinged: '#CC79A7', losses.each_alone: '#000000',
                losses.apo_zero: '#E69F00', losses.apo_down: '#E69F00'}
    return of_links.get(LOSSES[loss_of(method)][1], '#0072B2')


def fixed(method):
    """The knobs that are not searched for: nll_coef, and a link's own but beta, label_smoothing being the true one."""
    if method == 'dpo_nll':
        return {'nll_coef': 0.2}
    knobs = {knob: value for knob, value in LOSSES[method][2].items() if knob != 'beta'}
    if 'label_smoothing' in knobs:
        knobs['label_smoothing'] = FLIPPED
    return knobs


def tried(method):
    """The pairs of beta and learning rate of the search: those of TRIED, else five times the usual beta and more."""
    beta = 5 * LOSSES[loss_of(method)][2]['beta']
    return TRIED.get(method, ((beta, 6e-4), (beta, 1.2e-3), (2 * beta, 1.2e-3), (beta, 9e-4)))


def found(method):
    """The settings of the comparison: those of FOUND, else the second of the search's."""
    beta, rate = tried(method)[1]
    return FOUND.get(method, {'beta': beta, 'learning_rate': rate})


# ----------------------------------------------------------------------------------------------------
# the data

def completions(task, reference, prompts, seed):
    """K responses of the reference to each prompt: groups [prompt, response_1, ..., response_K] and rewards (n, K)."""
    repeated = [p for p in prompts for _ in range(K)]
    responses = task.draw(reference, repeated, seed)
    rewards = task.score(repeated, responses)['true_reward'].reshape(-1, K)
    return [[p, *responses[i * K:(i + 1) * K]] for i, p in enumerate(prompts)], rewards


def pairs_of(groups, rewards):
    """[prompt, chosen, rejected] of responses 1 and 2, 3 and 4 ... of each group, where their rewards differ."""
    pairs = []
    for (prompt, *responses), r in zip(groups, rewards):
        for i in range(0, len(r), 2):
            if r[i] != r[i + 1]:
                better, worse = (i, i + 1) if r[i] > r[i + 1] else (i + 1, i)
                pairs.append([prompt, responses[better], responses[worse]])
    return pairs


def rankings_of(groups, rewards):
    """[prompt, best, ..., worst] of each group without ties."""
    return [[prompt, *(responses[i] for i in np.argsort(-r))]
            for (prompt, *responses), r in zip(groups, rewards) if len(set(r)) == len(r)]


def flipped(groups, share, seed):
    """The same groups, the responses of `share` of them in reverse."""
    rng = np.random.default_rng([seed, 0, 1])       # not [seed, 0], the order that dpo.py takes the groups in
    chosen = set(rng.permutation(len(groups))[:round(share * len(groups))].tolist())
    return [[group[0], *group[:0:-1]] if i in chosen else group for i, group in enumerate(groups)]


def set_of(job, ending):
    """The name of a data set of the job's seed."""
    common = job['common']
    return f"{common['name']}-{os.path.basename(common['folder'])}-{job['seed']}{ending}"


# ----------------------------------------------------------------------------------------------------
# what a policy is judged by

def distinct_3(texts):
    """The share of different ones among all word trigrams of the texts; none crosses from one text to the next."""
    words = [re.findall(r'\w+', text.lower()) for text in texts]
    trigrams = [tuple(of_text[i:i + 3]) for of_text in words for i in range(len(of_text) - 2)]
    return len(set(trigrams)) / max(1, len(trigrams))


def judge(task, policy, reference, prompts, seed):
    """Means over samples at temperature 1: {name: float}.

    The reward file's numbers; KL from the reference and entropy (the mean of -log policy(y | x), which is unbiased),
    nats a response; tokens a response; distinct_3 of one sample a prompt.
    """
    repeated = [p for p in prompts for _ in range(SAMPLES)]
    responses = task.draw(policy, repeated, seed)
    groups = list(zip(repeated, responses))
    logps, ref_logps = (task.logps(model, groups)[:, 0] for model in (policy, reference))
    measures = task.score(repeated, responses)
    measures |= {'kl': logps - ref_logps, 'entropy': -logps, 'tokens': [len(ids) for ids in responses]}
    texts = [text_of(task.tokenizer, ids) for ids in responses[::SAMPLES]]
    return {name: float(np.mean(values)) for name, values in measures.items()} | {'distinct_3': distinct_3(texts)}


# ----------------------------------------------------------------------------------------------------
# jobs

# The peak memory that the kernel reports of a process is at least what its parent had where it was started, so a small
# one starts it. Its last line: seconds of CPU, peak bytes, exit status.
START = '''import os, sys
_, status, used = os.wait4(os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ), 0)
unit = 1 if sys.platform == 'darwin' else 1024
print(used.ru_utime + used.ru_stime, used.ru_maxrss * unit, os.waitstatus_to_exitcode(status))'''


def run_dpo(folder, knobs):
    """`python dpo.py` with these knobs in `folder`. -> seconds of CPU, peak bytes, '' or why the loss was not finite"""
    flags = [f'--{key}={value}' for key, value in knobs.items()]
    done = subprocess.run([sys.executable, '-c', START, os.path.join(ROOT, 'dpo.py'), *flags], cwd=folder,
                          capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    seconds, memory, status = done.stdout.splitlines()[-1].split() if done.returncode == 0 else (0, 0, 1)
    error = ''
    if status != '0':
        error = (done.stderr.strip().splitlines() or ['no message'])[-1].removeprefix('error: ')
    need('not finite' in error or not error, f'dpo.py failed: {error}')
    return float(seconds), int(memory), error


def needs(job, jobs):
    """The jobs whose files this one reads."""
    if job['method'] == 'data':
        return []
    return [other for other in jobs if other['method'] == 'data' and other['seed'] == job['seed']]


def work(job, needed):
    """Do a job, in its worker: make the data of a seed, or train with one loss and judge. -> what it gave, a dict"""
    torch.set_num_threads(1)
    common = job['common']
    task = Task(common['name'], common['reward'])
    reference = task.load('').requires_grad_(False)
    first, last = common['held_out']
    held_out = task.prompts('val', last)[first:]
    do = make_data if job['method'] == 'data' else train
    return do(job, task, reference, held_out)


def make_data(job, task, reference, held_out):
    common, seed = job['common'], job['seed']
    groups, rewards = completions(task, reference, task.prompts('train', common['prefixes']), seed)
    val = pairs_of(*completions(task, reference, task.prompts('val', common['val_prefixes']), 0))
    pairs, rankings = pairs_of(groups, rewards), rankings_of(groups, rewards)
    sets = {'': pairs, '-flipped': flipped(pairs, FLIPPED, seed), '-few': pairs[:FEW],
            '-rankings': rankings, '-rankings-flipped': flipped(rankings, FLIPPED, seed)}
    for ending, groups in sets.items():
        write_set(os.path.join('data', set_of(job, ending)), task.folder, {'train': groups, 'val': val})
    points = [judge(task, reference, reference, held_out, seed + 500)]
    return {'points': points, 'pairs': len(pairs), 'rankings': len(rankings)}


def train(job, task, reference, held_out):
    common, seed, loss = job['common'], job['seed'], loss_of(job['method'])
    few, ranked = job['labels'] == 'few', losses.needs(loss, 'ranking')
    ending = {'clean': '', 'flipped': '-flipped', 'few': '-few'}[job['labels']]
    data = set_of(job, f'-rankings{ending}' if ranked else ending)
    batch = BATCH // 2 if ranked else BATCH
    knobs = {'name': data, 'init_from': os.path.abspath(os.path.join('out', common['name'], 'sft')), 'loss': loss,
             **own_knobs(job), 'batch_size': batch, 'optimizer': 'adamw', 'schedule': 'constant' if few else 'linear',
             'warmup_steps': 20, 'eval_interval': 0, 'kl_prompts': 0, 'save_interval': 0, 'seed': seed,
             'log_interval': math.ceil(FEW / batch) if few else 10, 'device': 'cpu', 'resume': True}
    folder = os.path.join(path_of(job), 'run')
    shutil.rmtree(folder, ignore_errors=True)       # of one that was killed
    os.makedirs(folder)
    os.symlink(os.path.abspath('data'), os.path.join(folder, 'data'))       # dpo.py writes to out/ beside it
    out = os.path.join(folder, 'out', data, 'dpo')
    points, cost, peak, stopped, log = [], 0.0, 0, '', []
    for epochs in common['over_epochs'] if few else [job['epochs']]:
        seconds, memory, stopped = run_dpo(folder, {**knobs, 'epochs': epochs})
        cost += seconds
        peak = max(peak, memory)
        shutil.copy(os.path.join(out, 'log.jsonl'), path_of(job))
        if stopped:
            break
        with open(os.path.join(out, 'log.jsonl')) as f:
            log = [json.loads(line) for line in f]
        trained, tested = ([row for row in log if key in row][-1] for key in ('loss', 'eval/loss'))
        points.append({'epochs': epochs, 'margin': trained['rewards/margins'],
                       'held_out_margin': tested['eval/rewards/margins'],
                       'accuracy': tested['eval/rewards/accuracies'], 'held_out_loss': tested['eval/loss'],
                       **judge(task, task.load(out), reference, held_out, seed + 500)})
    shutil.rmtree(folder)
    rates = [row['pairs_per_second'] for row in log if 'pairs_per_second' in row] or [math.nan]
    return {'points': points, 'stopped': stopped, 'cpu_seconds': cost, 'peak_memory': peak,
            'ms_a_step': 1000 * batch / np.median(rates)}


def summary(result):
    """One line on a finished run."""
    if result['job']['method'] == 'data':
        return f'{result["pairs"]:,} pairs, {result["rankings"]:,} rankings'
    if not result['points']:
        return result['stopped']
    last = result['points'][-1]
    formed = last.get('well_formed', math.nan)
    return (f'reward {last["true_reward"]:+.2f}, KL {last["kl"]:.2f}, well-formed {formed:.0%}, '
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


# ----------------------------------------------------------------------------------------------------
# the search

def within(run):
    """Whether a run keeps to the rule."""
    last = run['points'][-1] if run['points'] else {}
    return last.get('kl', math.inf) <= MOST_KL and last.get('well_formed', 1.0) >= LEAST_FORMED


def by_setting(results):
    """{setting: its runs, one a seed}"""
    groups = {}
    for run in results:
        groups.setdefault(settings(run['job']), []).append(run)
    return groups


def winner(results):
    """Of one loss, the setting with the highest mean reward of those whose every run keeps to the rule, or None."""
    fit = {setting: runs for setting, runs in by_setting(results).items() if all(map(within, runs))}
    return max(fit, key=lambda setting: np.mean(last_of(fit[setting], 'true_reward')), default=None)


def own_knobs(job):
    """The settings that are the loss's own."""
    return {key: value for key, value in job.items() if key not in ('method', 'seed', 'common', 'labels', 'epochs')}


def settings(job):
    return ', '.join(f'{key} {value:g}' for key, value in own_knobs(job).items())


def search_table(results):
    """Markdown: every setting that was tried, the winners in bold, and FOUND as Python."""
    rows = [['loss', 'setting', 'true reward', 'KL', 'well-formed, %', 'accuracy, %', 'tokens']]
    lines = ''
    for method in METHODS:
        of_method = [r for r in results if r['job']['method'] == method]
        tested, best = by_setting(of_method), winner(of_method)
        for setting, runs in tested.items():
            cells = [name_of(method), setting]
            for key, form, scale in (('true_reward', '+.2f', 1), ('kl', '.2f', 1), ('well_formed', '.0f', 100),
                                     ('accuracy', '.1f', 100), ('tokens', '.1f', 1)):
                cells.append(cell(last_of([run for run in runs if run['points']], key), form, scale))
            rows.append([f'**{text}**' for text in cells] if setting == best else cells)
        if best:
            knobs = {key: tested[best][0]['job'][key] for key in ('beta', 'learning_rate')}
            lines += f'        {method!r}: {knobs},\n'
    head = (f'The highest mean reward over the seeds wins (bold), if each seed has a KL of at most {MOST_KL:g} nats and '
            f'{LEAST_FORMED:.0%} of its samples well-formed. ± is the standard error.\n\n')
    return f'{head}{table(rows)}\n    FOUND = {{\n{lines}    }}\n'


# ----------------------------------------------------------------------------------------------------
# the tables

def runs_of(results, method, labels):
    """The finished runs of a loss on such labels, by seed."""
    return [r for r in results if r['job']['method'] == method and r['job'].get('labels') == labels and r['points']]


def last_of(runs, key):
    """The last value of `key` of each run that has it."""
    return [r['points'][-1][key] for r in runs if key in r['points'][-1]]


def cell(values, form, scale=1.0):
    """'mean ± standard error' of one value a seed; '-' of none."""
    if not values:
        return '-'
    mean, error = mean_and_error(scale * np.array(values))
    return format(mean, form) + ('' if math.isnan(error) else f' ± {error:{form.lstrip("+")}}')


def table(rows):
    """Markdown of a list of rows of strings, the first of them the head."""
    rule = ['---'] + ['---:'] * (len(rows[0]) - 1)
    return ''.join(f'| {" | ".join(row)} |\n' for row in [rows[0], rule, *rows[1:]])


def comparison(results):
    """The table of all losses, clean and flipped; the SFT model's row first."""
    both = [('true reward', 'true_reward', '+.2f', 1), ('KL, nats', 'kl', '.2f', 1),
            ('accuracy, %', 'accuracy', '.1f', 100), ('well-formed, %', 'well_formed', '.0f', 100)]
    clean_only = [('tokens', 'tokens', '.1f', 1), ('entropy, nats', 'entropy', '.1f', 1),
                  ('distinct-3, %', 'distinct_3', '.1f', 100)]
    head = ['loss']
    for title, *_ in both:
        head += [title, f'{title}, flipped']
    rows = [head + [title for title, *_ in clean_only]]
    data = [r for r in results if r['job']['method'] == 'data']
    runs = {'the SFT model': (data, None)}
    for method in METHODS:
        if runs_of(results, method, 'clean'):
            runs[name_of(method)] = runs_of(results, method, 'clean'), runs_of(results, method, 'flipped')
    for name, (clean, turned) in runs.items():
        row = [name]
        for _, key, form, scale in both:
            row.append(cell(last_of(clean, key), form, scale))
            row.append(cell(last_of(turned, key), form, scale) if turned is not None else '')
        rows.append(row + [cell(last_of(clean, key), form, scale) for _, key, form, scale in clean_only])
    return table(rows)


def costs(results):
    """The table of settings, time and memory."""
    rows = [['loss', 'settings', 'dpo.py, s of CPU', 'ms a step', 'peak memory, MB']]
    for method in METHODS:
        runs = runs_of(results, method, 'clean')
        if runs:
            rows.append([name_of(method), settings(runs[0]['job']), cell([r['cpu_seconds'] for r in runs], '.0f'),
                         cell([r['ms_a_step'] for r in runs], '.0f'),
                         cell([r['peak_memory'] for r in runs], '.0f', 1e-6)])
    return table(rows)


def at_epoch(runs, epoch, key):
    return [p[key] for r in runs for p in r['points'] if p['epochs'] == epoch and key in p]


def over_training(results):
    """The table of the long runs on few pairs. The margin is in nats of log-ratio: the loss's own divided by beta."""
    few = {method: runs_of(results, method, 'few') for method in OVER}
    epochs = sorted({p['epochs'] for runs in few.values() for r in runs for p in r['points']})
    rows = [['loss', 'measure', *(f'epoch {epoch}' for epoch in epochs)]]
    for method, runs in few.items():
        if not runs:
            continue
        beta = runs[0]['job']['beta']
        goal = f' (goal {0.5 / beta:.1f})' if method == 'ipo' else ''
        for title, key, form, scale in ((f'margin on the training pairs, nats{goal}', 'margin', '.1f', 1 / beta),
                                        ('on held-out pairs', 'held_out_margin', '.1f', 1 / beta),
                                        ('accuracy on these, %', 'accuracy', '.1f', 100), ('KL, nats', 'kl', '.1f', 1),
                                        ('true reward', 'true_reward', '+.2f', 1),
                                        ('well-formed, %', 'well_formed', '.0f', 100)):
            cells = [cell(at_epoch(runs, epoch, key), form, scale) for epoch in epochs]
            rows.append([name_of(method), title, *cells])
    return table(rows)


# ----------------------------------------------------------------------------------------------------
# the figure

def label_points(ax, points, texts, colours, others):
    """Write each text beside its point (data units), where it covers no point, none of `others` and no other text."""
    from matplotlib.text import Text
    renderer = ax.figure.canvas.get_renderer()
    ax.figure.draw_without_rendering()
    ax.figure.set_layout_engine('none')         # from here on nothing moves
    crowd = ax.transData.transform([*points, *others])
    taken = []
    angles = np.linspace(0, 2 * math.pi, 17)[:-1]
    places = [(r * math.cos(a), r * math.sin(a)) for r in (8, 16, 26, 38) for a in angles]
    for point, text, colour in zip(points, texts, colours):
        for x, y in places:
            arrow = dict(arrowstyle='-', lw=0.8, color=colour, shrinkA=0, shrinkB=3)
            side = 'left' if x > 1 else 'right' if x < -1 else 'center'
            note = ax.annotate(text, point, (x, y), textcoords='offset points', fontsize=8, color=colour, va='center',
                               ha=side, arrowprops=arrow if math.hypot(x, y) > 10 else None)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(1)         # without the arrow
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
            covers = any(box.overlaps(other) for other in taken) or any(box.padded(3).contains(*p) for p in crowd)
            if inside and not covers:
                break
            if (x, y) != places[-1]:
                note.remove()
        taken.append(box)


def draw_comparison(scatter, drop, results):
    """All losses: true reward against KL, and what flipped labels cost.

    -> {(method, labels): (KL, reward)}, both (mean, standard error)
    """
    mean = {}
    for method in METHODS:
        for labels in ('clean', 'flipped'):
            runs = runs_of(results, method, labels)
            if runs:
                mean[method, labels] = [np.nan_to_num(mean_and_error(last_of(runs, key)))
                                        for key in ('kl', 'true_reward')]
    order = sorted((m for m in METHODS if (m, 'clean') in mean), key=lambda m: mean[m, 'clean'][1][0])
    for y, method in enumerate(order):
        colour = colour_of(method)
        ends = [mean[method, labels] for labels in ('clean', 'flipped') if (method, labels) in mean]
        kls, rewards = [end[0][0] for end in ends], [end[1][0] for end in ends]
        scatter.plot(kls, rewards, color=colour, lw=0.6, alpha=0.35, zorder=1)
        drop.plot(rewards, [y] * len(ends), color=colour, lw=1, alpha=0.5, zorder=1)
        for (kl, reward), fill in zip(ends, (colour, 'white')):
            style = dict(fmt='o', ms=6, color=colour, mfc=fill, lw=0.8)
            scatter.errorbar(kl[0], reward[0], reward[1], kl[1], **style)
            drop.errorbar(reward[0], y, xerr=reward[1], **style)
    far = [f'{name_of(method)}, {labels}: {kl[0]:.1f}' for (method, labels), (kl, _) in mean.items()
           if kl[0] > FURTHEST]
    beyond = f' ({"; ".join(far)})' if far else ''
    scatter.set(title='true reward against KL: filled, clean labels; hollow, 20% flipped', ylabel='true reward, nats',
                xlabel=f'KL(policy || SFT), nats a response{beyond}', xlim=(0, FURTHEST))
    drop.set(title='what flipped labels cost', xlabel='true reward, nats', yticks=range(len(order)),
             yticklabels=[name_of(method) for method in order])
    for tick, method in zip(drop.get_yticklabels(), order):
        tick.set_color(colour_of(method))
    return mean


def draw_over_training(margins, distances, results):
    epochs = []
    styles = [('#0072B2', '-', 'o'), ('#56B4E9', '--', 's'), ('#D55E00', '-', 'D')]
    for method, (colour, dashes, marker) in zip(OVER, styles):
        runs = runs_of(results, method, 'few')
        if not runs:
            continue
        beta = runs[0]['job']['beta']
        epochs = sorted({p['epochs'] for r in runs for p in r['points']})
        for ax, key, scale in ((margins, 'margin', 1 / beta), (distances, 'kl', 1)):
            values = [mean_and_error(scale * np.array(at_epoch(runs, epoch, key))) for epoch in epochs]
            middle, error = np.nan_to_num(values).T
            ax.plot(epochs, middle, color=colour, ls=dashes, marker=marker, ms=4, label=name_of(method))
            ax.fill_between(epochs, middle - error, middle + error, color=colour, alpha=0.15, lw=0)
        if method == 'ipo':
            margins.axhline(0.5 / beta, color=colour, lw=0.8, ls=':', label="IPO's goal, 1/(2 tau)")
    margins.set(title=f'over-training on {FEW} pairs: their margin h', ylabel='log-ratio of chosen - rejected, nats')
    distances.set(title=f'over-training on {FEW} pairs: distance from the SFT model',
                  ylabel='KL(policy || SFT), nats a response')
    for ax in (margins, distances):
        ax.set(xlabel='epochs', xscale='log', xticks=epochs, xticklabels=epochs)
        ax.minorticks_off()
        ax.legend(fontsize=9, frameon=False, loc='upper left')


def figure(results, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, axes = plt.subplots(2, 2, figsize=(13, 10.5), constrained_layout=True)
    mean = draw_comparison(*axes[0], results)
    draw_over_training(*axes[1], results)
    for ax in axes.flat:
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
    crosses = []                        # points and their error bars, which no text may cover
    for (kl, kl_error), (reward, reward_error) in mean.values():
        if kl <= FURTHEST:
            crosses += [(kl + s * kl_error, reward) for s in (-1, -0.5, 0, 0.5, 1)]
            crosses += [(kl, reward + s * reward_error) for s in (-1, -0.5, 0.5, 1)]
    clean = {method: (kl[0], reward[0]) for (method, labels), (kl, reward) in mean.items() if labels == 'clean'}
    clean = dict(sorted(clean.items(), key=lambda item: item[1][1]))
    label_points(axes[0, 0], list(clean.values()), map(name_of, clean), map(colour_of, clean), crosses)
    plot.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------
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
    search: bool = False                            # the search for FOUND instead: other seeds, other prefixes of val
    only: str = ''                                  # these losses alone, by commas, and no over-training; needs out
    out: str = ''                                   # '' = repro/results/family, with -quick or -search


def jobs_of(cfg, common):
    """The data of each seed, and the runs: each loss on clean and on flipped labels, and the over-trained ones."""
    seeds = SEARCHED if cfg.search else [1] if cfg.quick else range(1, cfg.seeds + 1)
    methods = cfg.only.split(',') if cfg.only else QUICK if cfg.quick else METHODS
    for method in methods:
        need(method in METHODS, f'only={method}: no such loss; there are {", ".join(METHODS)}')
    jobs = []
    for seed in seeds:
        def job(method, labels, knobs, epochs=1):
            return {'method': method, 'seed': seed, 'common': common, 'labels': labels, **fixed(method), **knobs,
                    'epochs': epochs}
        jobs.append({'method': 'data', 'seed': seed, 'common': common})
        if cfg.search:
            jobs += [job(method, 'clean', {'learning_rate': rate, 'beta': beta})
                     for method in methods for beta, rate in tried(method)]
            continue
        for method in methods:
            jobs += [job(method, labels, found(method), 4 if cfg.quick else 1) for labels in ('clean', 'flipped')]
        for method in [] if cfg.only else OVER_QUICK if cfg.quick else OVER:
            jobs.append(job(method, 'few', found(method), common['over_epochs'][-1]))
    return jobs


def main(argv=None):
    cfg = config.load(Config, 'family', argv)
    need(not (cfg.quick and cfg.search), 'quick and search are both set: keep one')
    need(cfg.out or not cfg.only, f'only={cfg.only}: set --out, too, so that the table of all losses stays')
    prepare(cfg.name)
    task = Task(cfg.name, cfg.reward)
    wanted = 2 * cfg.held_out if cfg.search else cfg.held_out
    there = len(task.prompts('val', 2 * cfg.held_out))
    need(there >= wanted, f'held_out={cfg.held_out}: data/{cfg.name} has {there} distinct prompts in val, and {wanted} '
         'are needed')
    common = {'name': cfg.name, 'reward': cfg.reward,
              'folder': os.path.join('out', cfg.name, 'family-quick' if cfg.quick else 'family'),
              'prefixes': 200 if cfg.quick else cfg.prefixes, 'val_prefixes': 50 if cfg.quick else cfg.held_out,
              'held_out': [wanted - cfg.held_out, wanted],
              'over_epochs': [1, 4, 12] if cfg.quick else list(OVER_EPOCHS), 'sft': fingerprint(task.load(''))}
    jobs = jobs_of(cfg, common)
    left = [job for job in jobs if result_of(job) is None]
    print(f'about {minutes(left, cfg.workers):.0f} minutes')
    began = time.perf_counter()
    results = sweep(jobs, cfg.workers, work, needs, summary)
    seconds = sum(r['seconds'] for r in results)
    print(f'that took {time.perf_counter() - began:,.0f} s; the runs, {seconds:,.0f} s of one core')

    variant = '-quick' if cfg.quick else '-search' if cfg.search else ''
    out = cfg.out or os.path.join(ROOT, 'repro', 'results', f'family{variant}')
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    endings = '.md, .json'
    if cfg.search:
        text = search_table(results)
    else:
        stopped = [f"- {path_of(r['job'])}: {r['stopped']}" for r in results if r.get('stopped')]
        parts = [comparison(results), costs(results)]
        if not cfg.only:
            parts.append(over_training(results))
            figure(results, out + '.png')
            endings += ', .png'
        text = '\n'.join(parts + stopped)
    write_results(out, text, results)
    print(f'\n{text}\nwritten: {out}{endings}')


if __name__ == '__main__':
    config.run(main)
