"""The table and the six panels of pathologies.py, from its report."""
import math
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from family import table                        # noqa: E402
from sentences import LEVEL, RELATIVES          # noqa: E402

# Okabe and Ito's colours, told apart by the colour-blind; black is what is exact
BLUE, ORANGE, GREEN, PINK, EXACT = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#000000'
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}      # 97.5%, by seeds
PARTS = 0.2, 0.4, 1.0            # of the epoch
SCORES = 'CHES', 'gradients', 'shared tokens', 'log rho(w)'


def interval(values):
    """Mean of one value a seed, and half its 95% interval: floats."""
    values = np.array(values, dtype=float)
    return float(values.mean()), float(STUDENT[len(values)] * values.std(ddof=1) / math.sqrt(len(values)))


def cell(values, form='.2f'):
    mean, half = interval(values)
    return f'{mean:{form}} ± {half:{form.lstrip("+")}}'


def of(rows, **wanted):
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


# ----------------------------------------------------------------------------------------------------
# the tables

def text(report):
    """The report as Markdown."""
    worst, = report['worst_world']
    misspecified = [['share of the pairs on one comparison', 'below the reference', 'below by 0.1 with 0.1 to gain',
                     'mean gain', 'of the best in the class', 'worst']]
    misspecified += [[f'{r["share"]:.0%}', f'{r["below"]:.1%}', f'{r["clearly"]:.1%}', f'{r["gain"]:+.3f}',
                      f'{r["best_gain"]:+.3f}', f'{r["worst"]:+.2f}'] for r in report['misspecification']]
    steps = [key for key in report['labels'][0] if key.startswith('step_')]
    labels = [['loss', 'beta or tau', *(f'step {int(key[5:]):,}' for key in steps), 'optimum']]
    labels += [[r['loss'], f'{r["beta"]:g}', *(f'{r[key]:.4f}' for key in steps), f'{r["optimum"]:.4f}']
               for r in report['labels']]
    layers = [['one layer', 'before', 'after 10 steps']]
    layers += [[r['what'], *(' '.join(f'{p:.2g}' for p in r[side]) for side in ('before', 'after'))]
               for r in report['one_layer']]
    moves = report['displacement']
    displaced = [['a GPT, one pair at a time', 'over seeds']]
    displaced += [[name, cell([r[key] for r in moves], form)] for name, key, form in (
        ('chosen responses that fall', 'displaced', '.1%'), ('change of log pi(w)', 'chosen', '+.2f'),
        ('change of log pi(l)', 'rejected', '+.2f'))]
    displaced += [[f'rank correlation of {name} with the first', cell([r[name] for r in moves], '+.2f')]
                  for name in SCORES]
    over = [['true reward less the reference\'s', *(f'{share:.0%} of the epoch' for share in PARTS), 'KL at the end',
             'mass on the part']]
    for method in ('DPO', 'DPO, beta 1', 'chi-PO', 'optimum'):
        gains, curves = gains_of(report, method), of(report['over_optimisation'], method=method)
        over.append([method, *(cell(at(gains, share), '+.2f') for share in PARTS),
                     *(cell([c[key][-1] for c in curves]) for key in ('kl', 'inside'))])
    behind = gains_of(report, 'chi-PO') - gains_of(report, 'DPO')
    over.append(['chi-PO less DPO', *(cell(at(behind, share), '+.2f') for share in PARTS), '', ''])
    pairs = report['length_of_pairs']
    length = [[f'tokens at a true reward of {LEVEL:g}', 'length', 'over the chosen mean', 'at the end']]
    for method in (*RELATIVES, 'optimum', 'optimum of the labels'):
        level = [r['length'] for r in of(report['length_at_level'], method=method)]
        end = [c['length'][-1] for c in of(report['length'], method=method)]
        length.append([method, cell(level), cell([n - p['chosen'] for n, p in zip(level, pairs)], '+.2f'), cell(end)])
    length += [[side, cell([p[side] for p in pairs]), '', ''] for side in ('reference', 'chosen', 'rejected')]
    head = 'right by margin', 'right by likelihood', 'of those right by margin, wrong by likelihood'
    right = [['beta', 'policy', *head]]
    for beta in sorted({r['beta'] for r in report['accuracy']}):
        rows = of(report['accuracy'], beta=beta)
        for name, key in (('DPO', 'dpo'), ('optimum', 'optimum')):
            hidden = [r[f'{key}_hidden'] / r[f'{key}_margin'] for r in rows]
            right.append([f'{beta:g}', name, cell([r[f'{key}_margin'] for r in rows], '.1%'),
                          cell([r[f'{key}_likelihood'] for r in rows], '.1%'), cell(hidden, '.1%')])
    right.append(['', 'reference', '', cell([r['reference_likelihood'] for r in rows], '.1%'), ''])
    lost = (f'The worst world at the last share: DPO {worst["gain"]:+.2f}, the best in the class '
            f'{worst["best_gain"]:+.2f}, pi* {worst["star_gain"]:+.2f}.\n')
    return '\n'.join([table(misspecified), lost, *map(table, (labels, layers, displaced, over, length, right))])


def gains_of(report, method):
    """True reward less the reference's, over the steps that all seeds made: (seeds, steps)."""
    curves = of(report['over_optimisation'], method=method)
    steps = min(len(c['reward']) for c in curves)
    before = [c['reward'][0] for c in of(report['over_optimisation'], method='DPO')]
    return np.array([c['reward'][:steps] for c in curves]) - np.array(before)[:, None]


def at(gains, share):
    """The column of (seeds, steps) that lies at this share of the steps."""
    return gains[:, round(share * (gains.shape[1] - 1))]


# ----------------------------------------------------------------------------------------------------
# the figure

def draw(report, shown, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(16, 9.5), constrained_layout=True)
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1, 1.25])
    axes = [figure.add_subplot(grid[i // 3, i % 3]) for i in (0, 1, 3, 4, 5)]
    both = grid[0, 2].subgridspec(1, 2)
    axes += [figure.add_subplot(both[0]), figure.add_subplot(both[1])]
    draw_misspecification(axes[0], report, shown)
    draw_labels(axes[1], shown)
    draw_over_optimisation(axes[2], report)
    draw_length(axes[3], report)
    draw_accuracy(axes[4], report, shown)
    draw_one_layer(axes[5], shown)
    draw_displacement(axes[6], report, shown)
    for ax in axes:
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
        ax.title.set_fontsize(10)
    figure.savefig(path, dpi=100)


def draw_misspecification(ax, report, shown):
    worst, = report['worst_world']
    thetas, gains = shown['line']
    ax.plot(thetas, gains, color='0.6', label='all policies of the class, the worst world')
    ax.plot(worst['theta'], worst['gain'], 'o', color=BLUE, ms=8, label='DPO, 98% of the pairs on one comparison')
    ax.plot(worst['best_theta'], worst['best_gain'], '*', color=EXACT, ms=12, label='best of the class')
    ax.axhline(worst['star_gain'], color=EXACT, ls='--', lw=1, label='$\\pi^*$, outside the class')
    ax.plot(0, 0, 'D', color='0.4', label='reference')
    ax.set(title='1. Misspecification', xlabel='the parameter', ylabel='true reward less the reference\'s, nats')
    ax.set_xlim(thetas.min(), 1.6 * thetas.max())
    ax.set_ylim(None, 1.4 + worst['star_gain'])
    ax.legend(fontsize=8, frameon=False, loc='upper right')
    inset = ax.inset_axes([0.6, 0.2, 0.38, 0.34])
    rows = report['misspecification']
    inset.plot([r['share'] for r in rows], [100 * r['below'] for r in rows], color=BLUE, marker='o', ms=3)
    inset.axhline(0, color=EXACT, lw=1)
    inset.set_title('worlds below the reference, %', fontsize=8)
    inset.set_xlabel('share of pairs on one comparison', fontsize=7)
    inset.tick_params(labelsize=7)
    inset.grid(alpha=0.2)


def draw_labels(ax, shown):
    for (name, beta), odds in shown['arms'].items():
        steps = np.unique(np.logspace(0, math.log10(len(odds) - 1), 200).astype(int))
        shade = {0.1: 1.0, 0.5: 0.7, 1.0: 0.45}[beta]
        symbol = 'beta' if name == 'DPO' else 'tau'
        ax.plot(steps, 1 / (1 + odds[steps].exp()), color=BLUE if name == 'DPO' else ORANGE, alpha=shade,
                label=f'{name}, $\\{symbol}$ = {beta:g}')
        if name == 'IPO':
            ax.axhline(1 / (1 + math.exp(0.5 / beta)), color=EXACT, ls='--', lw=1, alpha=shade)
    ax.plot([], [], color=EXACT, ls='--', lw=1, label='IPO\'s optimum; DPO\'s is 0')
    ax.set(title='2. Two arms, one always preferred', xlabel='step', xscale='log', yscale='log', ylim=(1e-7, 1),
           ylabel='probability of the other arm')
    ax.legend(fontsize=8, frameon=False, loc='lower left')


def draw_one_layer(ax, shown):
    pair, pushed = shown['layers']['pair'], shown['layers']['pushed']
    for i, (word, colour) in enumerate(zip(('Yes', 'No', 'Never'), (GREEN, BLUE, ORANGE))):
        ax.plot(pair[:, i], color=colour, label=word)
        if i < 2:
            ax.axhline(pair[0, i] / (1 - pair[0, 2]), color=colour, ls='--', lw=1)
    ax.plot(pushed[:, 0], color=PINK, marker='o', ms=3, label='argmax, while a 1%\ntoken is pushed down')
    ax.axhline(pushed[0, 0] / (1 - pushed[0, -1]), color=PINK, ls='--', lw=1)
    ax.plot([], [], color=EXACT, ls='--', lw=1, label='the reference without\nNever, the 1% token')
    ax.set(title='3a. No over Never, one layer', xlabel='step', ylabel='probability', ylim=(0, 1.62),
           yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.legend(fontsize=8, frameon=False, loc='upper left')


def draw_displacement(ax, report, shown):
    scores, chosen = shown['CHES']
    ax.plot(scores, chosen, 'o', ms=3, color=BLUE, alpha=0.7)
    ax.axhline(0, color=EXACT, ls='--', lw=1)
    mean, half = interval([r['CHES'] for r in report['displacement']])
    ax.set(title=f'3b. A GPT: rank correlation\n{mean:+.2f} ± {half:.2f}', xlabel='CHES score before training',
           ylabel='change of log $\\pi$(w) in five steps')


def draw_over_optimisation(ax, report):
    for method, colour in (('DPO', BLUE), ('DPO, beta 1', '#56B4E9'), ('chi-PO', ORANGE)):
        gains = gains_of(report, method)
        steps = of(report['over_optimisation'], method=method)[0]['step'][:gains.shape[1]]
        middle, half = np.array([interval(values) for values in gains.T]).T
        ax.plot(steps, middle, color=colour, label=method if 'beta' in method else f'{method}, beta 0.1')
        ax.fill_between(steps, middle - half, middle + half, color=colour, alpha=0.12, lw=0)
    ax.axhline(gains_of(report, 'optimum').mean(), color=EXACT, ls='--', lw=1, label='$\\pi^*$, beta 0.1')
    ax.axhline(0, color='0.5', lw=0.8)
    ax.set(title='4. Pairs that show a part of the responses, one epoch', xlabel='step',
           ylabel='true reward less the reference\'s, nats')
    ax.legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(0, 0.75))


def draw_length(ax, report):
    styles = dict(zip((*RELATIVES, 'optimum', 'optimum of the labels'), (
        dict(color=BLUE), dict(color=GREEN), dict(color=ORANGE), dict(color=PINK, ls='-.'), dict(color=EXACT, ls='--'),
        dict(color=EXACT, ls=':'))))
    for method, style in styles.items():
        curves = of(report['length'], method=method)
        rewards, lengths = (np.mean([c[key] for c in curves], 0) for key in ('reward', 'length'))
        ax.plot(rewards, lengths, **style, label=f'exact {method}' if 'optimum' in method else method)
        if method in RELATIVES:
            half = [interval(values)[1] for values in np.array([c['length'] for c in curves]).T]
            ax.fill_between(rewards, lengths - half, lengths + half, color=style['color'], alpha=0.1, lw=0)
    for side in ('chosen', 'rejected'):
        level = np.mean([p[side] for p in report['length_of_pairs']])
        ax.axhline(level, color='0.6', lw=0.8)
        ax.annotate(f'{side} side\'s mean', (1, level), xycoords=('axes fraction', 'data'), fontsize=7, ha='right',
                    va='bottom' if side == 'chosen' else 'top', color='0.4')
    ax.set_ylim(2, 16)
    ax.set(title='5. Labels that prefer length by 0.1 nats a token', xlabel='true reward', ylabel='tokens a response')
    ax.legend(fontsize=8, frameon=False, loc='upper left')


def draw_accuracy(ax, report, shown):
    gap, h, best = shown['pairs']
    ends = [gap.min(), gap.max()]
    ax.plot(gap, best, 'x', ms=3, color='0.6', label='$\\pi^*$')
    hidden = (h > 0) & (h <= gap)
    for name, which, colour in (('right by both, or wrong by the margin', ~hidden, BLUE),
                                ('right by its margin, wrong by likelihood', hidden, ORANGE)):
        ax.plot(gap[which], h[which], 'o', ms=3, color=colour, label=f'DPO, {name}')
    ax.plot(ends, ends, color=EXACT, ls='--', lw=1, label='h = log $\\rho$(l)/$\\rho$(w): a pair flips')
    ax.axhline(0, color='0.5', lw=0.8)
    ax.set(title='6. What accuracy hides, beta 0.5', xlabel='log $\\rho$(l) / $\\rho$(w)', ylabel='h, nats')
    ax.set_ylim(min(h.min(), best.min()) - 0.5, 1.6 * max(h.max(), best.max()))
    ax.legend(fontsize=8, frameon=False, loc='upper left')
