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
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
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
from sweep import path_of, result_of, sweep                                                 # noqa: E402

LABELS = {'dpo': 'DPO', 'cdpo': 'cDPO', 'robust': 'robust DPO', 'ipo': 'IPO', 'ipo_mean': 'IPO, token means', 'hinge': 'hinge',
          'dpo_norm': 'DPO, token means', 'simpo': 'SimPO', 'orpo': 'ORPO', 'kto': 'KTO', 'plackett_luce': 'Plackett-Luce',
          'dpo_nll': 'DPO + NLL'}
FIXED = {'cdpo': {'label_smoothing': 0.2}, 'robust': {'label_smoothing': 0.2},      # the share that is flipped
         'simpo': {'gamma': 1.0}, 'dpo_nll': {'nll_coef': 0.2}}
RATES = (3e-4, 6e-4, 1.2e-3)
BETAS = {       # tried, with each of RATES
    'dpo': (0.5, 1.0), 'cdpo': (0.5, 1.0), 'robust': (0.5, 1.0), 'ipo': (0.2, 0.5), 'ipo_mean': (2.0, 5.0), 'hinge': (0.5, 1.0),
    'dpo_norm': (10.0, 20.0), 'simpo': (2.0, 10.0), 'orpo': (1.0, 3.0), 'kto': (0.5, 1.0), 'plackett_luce': (0.5, 1.0),
    'dpo_nll': (0.5, 1.0),
}
FOUND = {loss: {'learning_rate': 6e-4, 'beta': BETAS[loss][-1]} for loss in LABELS}
MOST_KL, LEAST_FORMED = 4.0, 0.8        # the rule of the search: the highest true reward within these
K, SAMPLES, FLIPPED = 4, 2, 0.2         # completions a prefix; samples of each held-out one; share of labels turned round
BATCH = 32                              # pairs a step; of rankings half as many: 64 responses in both
OVER = ('dpo', 'cdpo', 'robust', 'ipo')     # over-trained
FEW, OVER_EPOCHS = 250, (1, 2, 5, 10, 20)   # on so many pairs, judged after these


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
    chosen = set(np.random.default_rng(seed).permutation(len(groups))[:round(share * len(groups))].tolist())
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
# starts it. Its last line: seconds, peak bytes, exit status.
START = '''import os, sys, time
began = time.perf_counter()
_, status, used = os.wait4(os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ), 0)
print(time.perf_counter() - began, used.ru_maxrss * (1 if sys.platform == 'darwin' else 1024), os.waitstatus_to_exitcode(status))'''


def run_dpo(folder, knobs):
    """`python dpo.py` with these knobs in `folder`. -> seconds, peak memory in bytes, '' or why the loss was not finite"""
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
             'eval_interval': 0, 'log_interval': math.ceil(FEW / batch) if few else 10, 'save_interval': 0, 'seed': seed,
             'device': 'cpu', 'compile': False, 'resume': True}
    points, cost, peak, stopped = [], 0.0, 0, ''
    with tempfile.TemporaryDirectory(dir=path_of(job)) as folder:
        os.symlink(os.path.abspath('data'), os.path.join(folder, 'data'))
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
    rates = [row['pairs_per_second'] for row in log if 'pairs_per_second' in row] if points else [math.nan]
    return {'points': points, 'stopped': stopped, 'dpo_seconds': cost, 'peak_memory': peak, 'ms_a_step': 1000 * batch / np.median(rates)}


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
