"""Delta learning: pairs whose both sides are worse than what the model writes, and one less bad than the other.

    python repro/delta.py       # after the quickstart's first two stages; writes repro/results/delta.*

arXiv 2507.06187 says that DPO on such pairs improves the model, since it learns the difference. SFT on their chosen
side makes it worse. Here the SFT model of the reviews draws DRAWS responses to each prompt, and the true reward
scores them. A response's quality is its reward less the mean of its prompt's draws, so 0 is what the model writes. For
each band of BANDS one pair a prompt is taken. The chosen side's quality lies in the band, and the rejected side's is at
least GAP lower. DPO, and SFT on the chosen side, make one pass over as many pairs of each band at the same rate. A seed
stands for prompts, draws, the choice of pairs and their order. The policies are judged by samples on held-out prompts,
which all runs share. A gain is their true reward less that of the SFT model's samples.
"""
import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'repro')]
import config                                                               # noqa: E402
from config import In, need                                                 # noqa: E402
from dpo import response_logps                                              # noqa: E402
from family import table                                                    # noqa: E402
from nanodpo.data import Sampled                                            # noqa: E402
from offline import dpo_losses, preferred_ft_losses, train                  # noqa: E402
from pathologies_figure import BLUE, EXACT, ORANGE, cell, interval, of      # noqa: E402
from rollout import Task                                                    # noqa: E402
from sweep import write_report                                                # noqa: E402

DRAWS = 8
GAP = 1.0                                                       # nats of true reward between the two sides, at least
BANDS = (0.5, 1.5), (-0.5, 0.5), (-1.5, -0.5), (-3.0, -1.5)     # of the chosen side's quality


def pairs_of(quality, band, rng):
    """One pair (row, chosen, rejected) of each row of quality (n, DRAWS) that has one: ints, (m, 3)."""
    pairs = []
    for i, row in enumerate(quality):
        fitting = [(w, l) for w in range(len(row)) for l in range(len(row))
                   if band[0] <= row[w] < band[1] and row[w] - row[l] >= GAP]
        if fitting:
            pairs.append((i, *fitting[rng.integers(len(fitting))]))
    return np.array(pairs).reshape(-1, 3)


def draw_pairs(task, cfg, seed):
    """Of one seed: {band: (groups [prompt, chosen, rejected], mean quality of chosen and of rejected)}."""
    rng = np.random.default_rng(seed)
    prompts = task.prompts('train', 0)
    prompts = [prompts[i] for i in rng.permutation(len(prompts))[:cfg.prompts]]
    repeated = [prompt for prompt in prompts for _ in range(DRAWS)]
    responses = task.draw(task.load(''), repeated, seed, desc=f'seed {seed}: responses')
    reward = task.score(repeated, responses)['true_reward'].reshape(-1, DRAWS)
    quality = reward - reward.mean(1, keepdims=True)
    pairs = {band: pairs_of(quality, band, rng) for band in BANDS}
    n = min(map(len, pairs.values()))
    need(n >= cfg.batch_size, f'only {n} pairs of a band: raise --prompts')
    made = {}
    for band, found in pairs.items():
        found = found[rng.permutation(len(found))[:n]]
        groups = [[prompts[i], responses[i * DRAWS + w], responses[i * DRAWS + l]] for i, w, l in found]
        made[band] = groups, quality[found[:, 0], found[:, 1]].mean(), quality[found[:, 0], found[:, 2]].mean()
    return made


def learn(task, reference, groups, method, cfg, seed):
    """The SFT model after one pass over the groups, with DPO or with SFT on the chosen side."""
    policy = task.load('').train()

    def losses_of(batch):
        logps = response_logps(policy, batch)
        if method == 'SFT':
            return preferred_ft_losses(logps) / batch.lengths[:, :1, None]          # a token
        with torch.no_grad():
            ref_logps = response_logps(reference, batch)
        return dpo_losses(logps, ref_logps, cfg.beta)

    return one_pass(policy, losses_of, groups, cfg, seed)


def one_pass(model, losses_of, groups, cfg, seed):
    """A model after one pass over groups [prompt, chosen, rejected], in eval mode."""
    better = np.tile(np.array([[False, True], [False, False]]), (len(groups), 1, 1))
    steps = math.ceil(len(groups) / cfg.batch_size)
    for _ in train(model, losses_of, Sampled(groups), better, steps, cfg.batch_size, cfg.learning_rate, 5, seed):
        pass
    return model.eval()


# ----------------------------------------------------------------------------------------------------
# the report

def name_of(band):
    return f'{band[0]:+g} to {band[1]:+g}'


def text(rows):
    """The report as Markdown."""
    lines = [['quality of the chosen side', 'chosen', 'rejected', 'pairs', 'DPO: gain', 'SFT: gain', 'DPO: KL',
              'SFT: KL', 'DPO: well-formed', 'SFT: well-formed']]
    for band in BANDS:
        dpo, sft = (of(rows, band=list(band), method=method) for method in ('DPO', 'SFT'))
        lines.append([name_of(band), *(f'{np.mean([r[key] for r in dpo]):+.2f}' for key in ('chosen', 'rejected')),
                      f'{np.mean([r["pairs"] for r in dpo]):.0f}',
                      *(cell([r[key] for r in side], form) for key, form in
                        (('gain', '+.2f'), ('kl', '.2f'), ('well_formed', '.0%')) for side in (dpo, sft))])
    return table(lines)


def figure(rows, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, ax = plt.subplots(figsize=(7, 4.8), constrained_layout=True)
    for method, colour in (('DPO', BLUE), ('SFT', ORANGE)):
        of_bands = [of(rows, band=list(band), method=method) for band in BANDS]
        middle, half = zip(*(interval([r['gain'] for r in found]) for found in of_bands))
        x = [np.mean([r['chosen'] for r in found]) for found in of_bands]
        label = 'DPO on the pairs' if method == 'DPO' else 'SFT on their chosen side'
        ax.errorbar(x, middle, half, color=colour, marker='o', capsize=3, label=label)
    ax.axhline(0, color=EXACT, lw=1, ls='--', label='the model before')
    ax.axvline(0, color='0.7', lw=0.8)
    ax.annotate('what the model writes', (0, 0.02), xycoords=('data', 'axes fraction'), fontsize=8, color='0.4')
    ax.set(title='Delta learning', xlabel='quality of the chosen side: true reward less the model\'s own, nats',
           ylabel='true reward gained, nats')
    ax.grid(alpha=0.2)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(fontsize=9, frameon=False)
    plot.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: data/<name>, out/<name>/sft
    reward: str = config.EMBEDDED                   # a Python file with the true reward; its metrics have `well_formed`
    seeds: In[int, '2 <= x <= 10'] = 3
    prompts: In[int, 'x >= 1'] = 1500               # of train, a seed, DRAWS responses each
    held_out: In[int, 'x >= 2'] = 250               # prompts of val, two samples each
    beta: In[float, 'x > 0'] = 0.5                  # as config/reviews.py
    learning_rate: In[float, 'x > 0'] = 6e-4        # as config/reviews.py, for both
    batch_size: In[int, 'x >= 1'] = 8               # pairs a step
    out: str = os.path.join(ROOT, 'repro', 'results', 'delta')


def main(argv=None):
    cfg = config.load(Config, 'delta', argv)
    torch.set_num_threads(1)
    task = Task(cfg.name, cfg.reward)
    reference = task.load('').requires_grad_(False)
    held_out = task.prompts('val', cfg.held_out)
    before = task.evaluate(reference, reference, held_out, 16, 0)           # all gains share its error
    rows = []
    for seed in range(1, cfg.seeds + 1):
        for band, (groups, chosen, rejected) in draw_pairs(task, cfg, seed).items():
            for method in ('DPO', 'SFT'):
                policy = learn(task, reference, groups, method, cfg, seed)
                after = task.evaluate(policy, reference, held_out, 2, seed)
                row = dict(method=method, band=list(band), seed=seed, pairs=len(groups), chosen=float(chosen),
                           rejected=float(rejected), gain=after['true_reward'] - before['true_reward'], **after)
                rows.append(row)
                tqdm.write(f'seed {seed} | chosen {name_of(band):12} | {len(groups)} pairs | {method} | gain '
                           f'{row["gain"]:+.2f} | KL {after["kl"]:.2f} | well-formed {after["well_formed"]:.0%}')
    said = text(rows)
    print(said)
    write_report(cfg.out, said, dict(before=before, runs=rows))
    figure(rows, cfg.out + '.png')
    print(f'written: {cfg.out}.md, .json, .png')


if __name__ == '__main__':
    config.run(main)
