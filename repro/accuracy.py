"""Held-out preference accuracy over training: DPO's implicit reward against a reward model, on the same pairs.

    python prepare_prefs.py config/hh_cpu.py && python sft.py config/hh_cpu.py
    python dpo.py config/hh_cpu.py
    python repro/reward_model.py config/hh_cpu.py --learning_rate=1e-4 --eval_interval=11 --warmup_steps=10
    python repro/accuracy.py config/hh_cpu.py --out=repro/results/hh_cpu            # writes .md and .png

Both start from the SFT weights and see each pair once. An accuracy is the share of validation pairs whose chosen
response has the higher reward (a tie counts one half), with Wilson's 95% interval. Beside them stand two guesses that
need no model: the longer response, and the shorter.
"""
import json
import os
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                   # noqa: E402
from config import UserError, need                              # noqa: E402
from nanodpo.data import Groups                                 # noqa: E402
from reward_model import correct, interval                      # noqa: E402

RUNS = {'dpo': ("DPO's implicit reward", 'eval/rewards/accuracies', 'eval/loss', 'C0'),
        'reward_model': ('Bradley-Terry reward model', 'eval/accuracy', 'eval/log_loss', 'C3')}


@dataclass
class Config:
    name: str = 'reviews'       # of the experiment: reads data/<name>, out/<name>/dpo and out/<name>/reward_model
    out: str = ''               # prefix of the .md and .png written; '' = out/<name>/accuracy


def read_curve(name, stage):
    """The evaluations of a run: list of (step, accuracy, loss)."""
    path = os.path.join('out', name, stage, 'log.jsonl')
    _, accuracy, loss, _ = RUNS[stage]
    try:
        with open(path) as f:
            rows = [json.loads(line) for line in f]
    except (OSError, ValueError):
        raise UserError(f'{path} cannot be read: run dpo.py and repro/reward_model.py with this config first') from None
    points = [(row['step'], row[accuracy], row[loss]) for row in rows if accuracy in row]
    need(points, f'{path} holds no evaluation')
    return points


def table(curves, guesses, n):
    """Markdown: each run at its end, and the guesses. n: the validation pairs."""
    lines = [f'| {n:,} validation pairs | steps | accuracy | 95% interval | log-loss | best step, accuracy |',
             '| --- | ---: | ---: | ---: | ---: | ---: |']
    for stage, points in curves.items():
        step, accuracy, loss = points[-1]
        best_step, best, _ = max(points, key=lambda point: point[1])
        low, high = interval(accuracy * n, n)
        lines.append(f'| {RUNS[stage][0]} | {step:,} | {accuracy:.3f} | {low:.3f} to {high:.3f} | {loss:.4f} '
                     f'| {best_step:,}, {best:.3f} |')
    for label, share in guesses.items():
        low, high = interval(share * n, n)
        lines.append(f'| {label} | - | {share:.3f} | {low:.3f} to {high:.3f} | - | - |')
    return '\n'.join(lines) + '\n'


def figure(curves, guesses, n, name, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, ax = plt.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    for stage, points in curves.items():
        label, _, _, colour = RUNS[stage]
        steps, accuracies, _ = np.array(points).T
        low, high = np.array([interval(accuracy * n, n) for accuracy in accuracies]).T
        ax.plot(steps, accuracies, marker='o', ms=4, color=colour, label=label)
        ax.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
    label, share = max(guesses.items(), key=lambda guess: guess[1])
    ax.axhline(0.5, color='0.6', lw=0.8, ls='--', label='chance')
    ax.axhline(share, color='0.4', lw=0.8, ls=':', label=label)
    ax.set(title=f'held-out accuracy, {name}, {n:,} pairs; bands are 95% intervals', xlabel='step', ylabel='accuracy')
    ax.legend(fontsize=9, frameon=False)
    ax.grid(alpha=0.2)
    ax.spines[['top', 'right']].set_visible(False)
    plot.savefig(path, dpi=110)


def main(argv=None):
    cfg = config.load(Config, 'accuracy', argv)
    val = Groups(os.path.join('data', cfg.name), 'val')
    curves = {stage: read_curve(cfg.name, stage) for stage in RUNS}
    sizes = np.diff(val.index, axis=1)[:, 1:]
    longer = float(correct(sizes[:, 0] - sizes[:, 1]).mean())
    guesses = {'the longer response': longer, 'the shorter response': 1 - longer}
    out = cfg.out or os.path.join('out', cfg.name, 'accuracy')
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    figure(curves, guesses, len(val), cfg.name, out + '.png')
    text = table(curves, guesses, len(val))
    with open(out + '.md', 'w') as f:
        f.write(text)
    print(f'{text}written: {out}.md, .png')


if __name__ == '__main__':
    config.run(main)
