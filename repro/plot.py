"""The curves of one or several runs, from their log.jsonl to one PNG.

    python repro/plot.py out/reviews/dpo                                   # writes out/reviews/dpo/curves.png
    python repro/plot.py out/reviews/dpo --out=tests/assets/reviews.png    # the README's figure
    python repro/plot.py out/a/dpo out/b/dpo --out=compare.png             # a colour a run

Of dpo.py it draws loss, accuracy, margins, chosen and rejected rewards, KL; of sft.py, in panels of their own, loss,
perplexity, learning rate. Thin lines are training batches (means over log_interval steps), markers the whole validation
split. The band around the KL is its standard error. The torn last line of a run that is still writing is skipped. Needs
matplotlib.
"""
import json
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                           # noqa: E402
from config import UserError, need      # noqa: E402
from nanodpo.folder import written_aside        # noqa: E402

PANELS = [      # title, keys (the second one dashed), a level to compare with
    ('loss of sft.py, nats a token', ['sft_loss'], None),
    ('perplexity', ['perplexity'], None),
    ('loss', ['loss'], (math.log(2), 'ln 2: policy = reference')),
    ('accuracy: chosen reward above rejected', ['rewards/accuracies'], (0.5, 'chance')),
    ('reward margin, chosen − rejected', ['rewards/margins'], None),
    ('implicit rewards, β log(policy / reference)', ['rewards/chosen', 'rewards/rejected'], (0, '')),
    ('KL(policy || reference), nats a response', ['kl'], None),
    ('learning rate', ['lr'], None),
]
# colours that the colour-blind tell apart, too
COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000'
MARKERS = 'os^Dv'


def read_run(folder):
    """The records of <folder>/log.jsonl: list of dict. UserError where there are none or they are something else."""
    path = os.path.join(folder, 'log.jsonl')
    try:
        with open(path, encoding='utf-8') as f:
            lines = f.read().split('\n')
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f'{folder} has no log.jsonl: name the folder of a run, such as out/reviews/dpo') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {error}') from None
    records = []
    for number, line in enumerate(lines, 1):
        record = read_record(line)
        need(record or number == len(lines),        # what follows the last line break is empty, or torn
             f"{path} line {number} is no record of a run, an object of numbers with 'step': {line!r:.60}")
        if record:
            records.append(record)
    need(records, f'{path} holds no record yet')
    if any(key.endswith('perplexity') for record in records for key in record):     # of sft.py, on another scale
        records = [{key.replace('loss', 'sft_loss'): value for key, value in record.items()} for record in records]
    return records


def read_record(line):
    """A line of a log as a dict of numbers, or None where it is something else."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = type(record) is dict and 'step' in record and all(type(v) in (int, float) for v in record.values())
    return record if is_record else None


def names_of(folders):
    """What tells the runs apart: their paths without what all have in common at both ends."""
    paths = [os.path.normpath(folder).split(os.sep) for folder in folders]
    if len(set(map(tuple, paths))) == 1:
        return [os.path.join(*paths[0][-2:])] * len(paths)
    shortest = min(map(len, paths))
    head = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest - 1)
    tail = next((i for i in range(shortest - head) if len({path[-1 - i] for path in paths}) > 1), 0)
    return [os.path.join(*path[head:len(path) - tail]) for path in paths]


def plot(folders, out):
    """Read the log of each of `folders` and write the figure to `out`."""
    runs = [read_run(folder) for folder in folders]
    logged = {key.removeprefix('eval/') for records in runs for record in records for key in record}
    preferences = 'rewards/margins' in logged
    panels = [panel for panel in PANELS
              if logged & set(panel[1]) and not (panel[0] == 'learning rate' and preferences)]
    need(panels, f'nothing to draw: {", ".join(folders)} logged {", ".join(sorted(logged))}')
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f'the figure needs {error.name}: pip install {error.name}') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    columns = 3 if len(panels) > 3 else 2
    rows = len(panels) // columns + 1               # one place is the legend's
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), constrained_layout=True)
    styles = [dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i // len(COLOURS) % len(MARKERS)])
              for i in range(len(runs))]
    for ax, panel in zip(axes.flat, panels):
        draw(ax, *panel, runs, styles)
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
    axes.flat[len(panels)].legend(handles=handles(names_of(folders), styles, preferences), loc='center left',
                                  fontsize=9, frameon=False)
    try:
        with written_aside(out) as aside:
            figure.savefig(aside, dpi=110, format='png')
    except OSError as error:
        raise UserError(f'cannot write {out}: {error.strerror}') from None
    finally:
        plt.close(figure)


def draw(ax, title, keys, level, runs, styles):
    """One panel: `keys` of every run, and a level to compare with, (value, label)."""
    for records, style in zip(runs, styles):
        for key, dashes in zip(keys, ('-', '--')):
            for prefix, look in (('', dict(lw=0.8, alpha=0.45, marker='')), ('eval/', dict(ms=4, lw=1.6))):
                points = [(r['step'], r[prefix + key]) for r in records if prefix + key in r]
                if points:              # kto's batches may lack one side
                    ax.plot(*zip(*points), **{**style, 'ls': dashes, **look})
        measured = [r for r in records if keys == ['kl'] and 'eval/kl_error' in r]
        if measured:
            low, high = ([r['eval/kl'] + sign * r['eval/kl_error'] for r in measured] for sign in (-1, 1))
            ax.fill_between([r['step'] for r in measured], low, high, color=style['color'], alpha=0.15, lw=0)
    starts = [records[0].get('eval/loss', math.nan) for records in runs if 'eval/sft_loss' not in records[0]]
    if title == 'loss' and not all(math.isclose(start, math.log(2), abs_tol=1e-3) for start in starts):
        level = None                    # ln 2 is DPO's alone
    if level:
        ax.axhline(level[0], color='0.6', lw=0.8, ls=':', zorder=0)
        ax.annotate(level[1], (1, level[0]), xycoords=('axes fraction', 'data'), ha='right', va='bottom', fontsize=7,
                    color='0.4')
    if title == 'perplexity':
        ax.set_yscale('log')
    elif title == 'learning rate':
        ax.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
    ax.set_title(title, fontsize=9)
    ax.set_xlabel('step', fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.2)
    ax.spines[['top', 'right']].set_visible(False)


def handles(names, styles, preferences):
    """The entries of the legend."""
    from matplotlib.lines import Line2D
    entries = [Line2D([], [], **style, label=name.replace('$', r'\$')) for style, name in zip(styles, names)]
    entries.append(Line2D([], [], color='0.3', lw=0.8, label='training'))
    entries.append(Line2D([], [], color='0.3', marker='o', ms=4, label='validation'))
    if preferences:
        entries.append(Line2D([], [], color='0.3', ls='--', label='rejected, dashed'))
    return entries


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    folders = [arg for arg in argv if not arg.startswith('-')]
    folders = [os.path.dirname(arg) or '.' if os.path.basename(arg) == 'log.jsonl' else arg for arg in folders]
    out = os.path.join(folders[0], 'curves.png') if len(folders) == 1 else 'compare.png'
    for flag in [arg for arg in argv if arg.startswith('-')]:
        if flag in ('-h', '--help'):
            print(__doc__.strip())
            return
        need(flag.startswith('--out='), f'{flag} is unknown: there is --out=FILE.png')
        out = flag.removeprefix('--out=')
    need(folders, 'name the folder of a run, or of several, such as out/reviews/dpo')
    need(out.endswith('.png'), f'--out={out} must end with .png')
    plot(folders, out)
    print(out)


if __name__ == '__main__':
    config.run(main)
