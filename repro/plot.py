"""The curves of a DPO run, from its log.jsonl to one PNG: loss, margins, accuracy, and the rewards of both sides.

    python repro/plot.py out/reviews/dpo                                   # writes out/reviews/dpo/curves.png
    python repro/plot.py out/reviews/dpo tests/assets/reviews.png          # the README's figure

Thin lines are training batches (means over log_interval steps), dots the whole validation split. Needs matplotlib.
"""
import json
import math
import os
import sys

PANELS = [      # title, {key: (label, colour)}, a level to compare with
    ('loss', {'loss': ('', 'C0')}, (math.log(2), 'ln 2: the reference')),
    ('reward margin, chosen - rejected', {'rewards/margins': ('', 'C2')}, None),
    ('accuracy: chosen reward above rejected', {'rewards/accuracies': ('', 'C4')}, (0.5, 'chance')),
    ('implicit reward, beta log(policy / reference)', {'rewards/chosen': ('chosen', 'C2'), 'rewards/rejected': ('rejected', 'C3')}, None),
]


def plot(folder, path):
    """Read <folder>/log.jsonl and write the figure to `path`."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with open(os.path.join(folder, 'log.jsonl')) as f:
        records = [json.loads(line) for line in f]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), constrained_layout=True)
    for ax, (title, lines, level) in zip(axes.flat, PANELS):
        for key, (label, colour) in lines.items():
            for prefix, style in (('', dict(lw=1, alpha=0.6)), ('eval/', dict(marker='o', ms=4, lw=1.5))):
                points = [(r['step'], r[prefix + key]) for r in records if prefix + key in r]
                name = ' '.join(part for part in (label, 'validation' if prefix else 'training') if part)
                if points:              # kto's batches may lack one side
                    ax.plot(*zip(*points), color=colour, label=name, **style)
        if level and (title != 'loss' or math.isclose(records[0].get('eval/loss', 0), math.log(2), abs_tol=1e-3)):     # not of every loss
            ax.axhline(level[0], color='0.6', lw=0.8, ls='--', label=level[1], zorder=0)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel('step')
        ax.grid(alpha=0.2)
        ax.legend(fontsize=8, frameon=False)
        ax.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    folder = sys.argv[1]
    out = sys.argv[2] if len(sys.argv) == 3 else os.path.join(folder, 'curves.png')
    if not os.path.isfile(os.path.join(folder, 'log.jsonl')):
        raise SystemExit(f'error: {folder} has no log.jsonl: name the folder of a run, such as out/reviews/dpo')
    plot(folder, out)
    print(out)
