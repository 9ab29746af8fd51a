"""Held-out preference accuracy over training: DPO's implicit reward against a Bradley-Terry reward model, on the same pairs.

    python prepare_prefs.py config/hh_cpu.py && python sft.py config/hh_cpu.py
    python dpo.py config/hh_cpu.py && python repro/reward_model.py config/hh_cpu.py --learning_rate=1e-4 --eval_interval=11
    python repro/accuracy.py config/hh_cpu.py --out=repro/results/hh_cpu            # writes .md and .png

Both start from the SFT weights and see each pair once. An accuracy is the share of validation pairs whose chosen response
has the higher reward (a tie counts one half), with Wilson's 95% interval; at its side two guesses that need no model: the
longer response, and the shorter.
"""
import json
import os
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                   # noqa: E402
from config import UserError                                    # noqa: E402
from prepare_prefs import Groups                                # noqa: E402
from reward_model import interval                               # noqa: E402

RUNS = {'dpo': ("DPO's implicit reward", 'eval/rewards/accuracies', 'eval/loss', 'C0'),
        'reward_model': ('Bradley-Terry reward model', 'eval/accuracy', 'eval/log_loss', 'C3')}


@dataclass
class Config:
    name: str = 'reviews'       # of the experiment: reads data/<name>, out/<name>/dpo and out/<name>/reward_model
    out: str = ''               # prefix of the .md and .png written; '' = out/<name>/accuracy


def main(argv=None):
    cfg = config.load(Config, 'accuracy', argv)
    out, curves = cfg.out or os.path.join('out', cfg.name, 'accuracy'), {}
    val = Groups(os.path.join('data', cfg.name), 'val')
    for stage, (label, accuracy, loss, _) in RUNS.items():
        path = os.path.join('out', cfg.name, stage, 'log.jsonl')
        try:
            with open(path) as f:
                rows = [json.loads(line) for line in f]
        except (OSError, ValueError):
            raise UserError(f'{path} cannot be read: run dpo.py and repro/reward_model.py with this config first') from None
        curves[stage] = [(row['step'], row[accuracy], row[loss]) for row in rows if accuracy in row]
        if not curves[stage]:
            raise UserError(f'{path} holds no evaluation')

    n, sizes = len(val), np.diff(val.index, axis=1)[:, 1:]
    longer = float(((sizes[:, 0] > sizes[:, 1]) + 0.5 * (sizes[:, 0] == sizes[:, 1])).mean())
    lines = [f'| {n:,} validation pairs | steps | accuracy | 95% interval | log-loss | best step, accuracy |', '| --- | ---: | ---: | ---: | ---: | ---: |']
    for stage, points in curves.items():
        step, accuracy, loss = points[-1]
        best = max(points, key=lambda point: point[1])
        low, high = interval(accuracy * n, n)
        lines.append(f'| {RUNS[stage][0]} | {step:,} | {accuracy:.3f} | {low:.3f} to {high:.3f} | {loss:.4f} | {best[0]:,}, {best[1]:.3f} |')
    for label, share in (('the longer response', longer), ('the shorter response', 1 - longer)):
        low, high = interval(share * n, n)
        lines.append(f'| {label} | - | {share:.3f} | {low:.3f} to {high:.3f} | - | - |')
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot, ax = plt.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    for stage, points in curves.items():
        label, _, _, colour = RUNS[stage]
        steps, accuracies, _ = map(np.array, zip(*points))
        low, high = np.array([interval(a * n, n) for a in accuracies]).T
        ax.plot(steps, accuracies, marker='o', ms=4, color=colour, label=label)
        ax.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
    ax.axhline(0.5, color='0.6', lw=0.8, ls='--', label='chance')
    ax.axhline(max(longer, 1 - longer), color='0.4', lw=0.8, ls=':', label='the longer response' if longer > 0.5 else 'the shorter response')
    ax.set(title=f'held-out accuracy, {cfg.name}, {n:,} pairs; bands are 95% intervals', xlabel='step', ylabel='accuracy')
    ax.legend(fontsize=9, frameon=False)
    ax.grid(alpha=0.2)
    ax.spines[['top', 'right']].set_visible(False)
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    plot.savefig(out + '.png', dpi=110)
    with open(out + '.md', 'w') as f:
        f.write('\n'.join(lines) + '\n')
    print('\n'.join(lines) + f'\nwritten: {out}.md, .png')


if __name__ == '__main__':
    main()
