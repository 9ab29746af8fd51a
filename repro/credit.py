"""Token credit: does beta log(policy / reference) of a token say what the token is worth?

    python repro/credit.py                  # after the quickstart's stages; writes repro/results/credit.*
    python repro/credit.py --prompts=0      # the worlds alone, which need no data

Worlds of optimum.py, where it can be computed. For the KL-constrained objective a token's advantage is V(s, a) - V(s)
with V(s) = beta log E_rho[exp(r / beta) | s]. It is beta log(pi* / rho) of the token, exactly (arXiv 2404.12358). DPO,
IPO and KTO learn from n sampled pairs with Bradley-Terry labels, every fifth held out; the lowest loss there counts.
IPO's tau is beta / 4, its scale for small differences of reward. KTO's z is the exact KL. PPO is ppo.py's token by
token, with a value model, on the true reward; its value model's credit is V(s, a) - V(s), the reward after the last
token. Correlations are over all tokens after all prefixes, weighted by rho. A seed draws world and pairs.

The reviews. A word's tint is beta log(policy / reference) of its tokens, as sample.py shows it. Is it ordered as the
true reward's weights, over all words and within each class of the grammar? Intervals there are over prompts.
"""
import math
import os
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'repro')]
import config                                                       # noqa: E402
from config import In, reviews                                      # noqa: E402
from family import table                                            # noqa: E402
from nanodpo.losses import each_alone, logistic, squared            # noqa: E402
from nanodpo.rollout import token_logps_of                          # noqa: E402
from nanodpo.text import token_pieces                               # noqa: E402
from optimum import World, mean_kl, sample_pairs                    # noqa: E402
from pathologies_figure import BLUE, EXACT, GREEN, ORANGE, PINK, cell, interval, of     # noqa: E402
from ppo import advantages_and_returns, clipped_losses              # noqa: E402
from rollout import Task                                            # noqa: E402
from sweep import write_report                                        # noqa: E402

BETA = 1.0
PAIRS = 1000, 10_000, 100_000
SIZE = dict(prompts=4, vocab=5, length=4, width=32)
COLOURS = {'DPO': BLUE, 'IPO': GREEN, 'KTO': ORANGE, 'PPO, policy': EXACT, 'PPO, value model': PINK}


# ----------------------------------------------------------------------------------------------------
# worlds: numbers of all tokens after all prefixes, (P, prefixes, V), in the order of World.tokens

def token_logps(world, policy):
    """log p of every token after every prefix: (P, prefixes, V)."""
    states = policy(world.tokens, world.positions, world.mask[None, None])[:, 1:]
    return F.linear(states, policy.wte.weight).log_softmax(-1)


def advantages(world, beta):
    """The exact advantage of every token: (P, prefixes, V)."""
    rho = token_logps(world, world.reference)
    value, parts = world.reward, []                                 # V of all completions, (P, M)
    for step in reversed(rho.split(world.sizes, dim=1)):            # from the last token to the first
        ahead = value.view(step.shape)                              # (P, V**t, V)
        value = beta * (step + ahead / beta).logsumexp(-1)          # (P, V**t)
        parts.append(ahead - value[:, :, None])
    return torch.cat(parts[::-1], 1)


def reach(world):
    """The reference's probability of every token after its prefix, and of the prefix: (P, prefixes, V)."""
    rho = token_logps(world, world.reference)
    total, parts = rho.new_zeros(len(rho), 1), []
    for step in rho.split(world.sizes, dim=1):
        parts.append(total[:, :, None] + step)
        total = parts[-1].flatten(1)
    return torch.cat(parts, 1).exp()


def compare(world, credit, exact, weight):
    """Correlation of two tables under weights, all tokens and each position, and the slope of credit on exact."""
    def of_tokens(a, b, w):
        w = w / w.sum()
        a, b = a - (w * a).sum(), b - (w * b).sum()
        product, squares = (w * a * b).sum(), (w * b * b).sum()
        return (product / ((w * a * a).sum() * squares).sqrt()).item(), (product / squares).item()

    correlation, slope = of_tokens(credit, exact, weight)
    places = zip(*(x.split(world.sizes, 1) for x in (credit, exact, weight)))
    return dict(correlation=correlation, slope=slope, positions=[of_tokens(*place)[0] for place in places])


def losses_of(method, chosen, rejected, z):
    """chosen, rejected: log-ratios of n pairs -> losses (n,)."""
    if method == 'DPO':
        return logistic(chosen, rejected, BETA)
    if method == 'IPO':
        return squared(chosen, rejected, BETA / 4)
    return each_alone(torch.stack([chosen, rejected], 1), torch.tensor([[True, False]]), z, BETA, 1.0, 1.0)


def fit(world, method, pairs, steps=300, rate=1e-3):
    """The policy where the loss on held-out pairs was lowest, as token_logps."""
    held = torch.arange(len(pairs[0])) % 5 == 0
    policy = world.policy()
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99))
    lowest, best = math.inf, None
    for step in range(steps + 1):
        tokens = token_logps(world, policy)
        ratios = completions(world, tokens) - world.rho
        z = BETA * mean_kl(ratios.detach() + world.rho, world.rho)
        loss, val_loss = (losses_of(method, ratios[x, w], ratios[x, l], z).mean() for x, w, l in
                          ([part[rows] for part in pairs] for rows in (~held, held)))
        if val_loss < lowest:
            lowest, best = val_loss.item(), tokens.detach()
        optimizer.param_groups[0]['lr'] = rate * (1 - step / (steps + 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


def completions(world, tokens):
    """log p of all completions from those of tokens: (P, M)."""
    total = tokens.new_zeros(len(tokens), 1)
    for step in tokens.split(world.sizes, dim=1):
        total = (total[:, :, None] + step).flatten(1)
    return total


def ppo(world, seed, rounds=160, batch=250, epochs=4, rate=1e-3, clip=0.2, lam=0.95):
    """PPO on the true reward less beta log(pi / rho) of each token. -> token_logps, and V of every prefix."""
    noise = torch.Generator().manual_seed(seed)
    policy, value_model = world.policy(), world.policy()
    head = torch.zeros(SIZE['width'], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([*policy.parameters(), *value_model.parameters(), head], betas=(0.9, 0.99))
    rho = token_logps(world, world.reference)
    P, V, L = len(rho), rho.shape[2], len(world.sizes)
    x = torch.arange(P).repeat_interleave(math.ceil(batch / P))[:batch]
    starts = torch.tensor([0, *world.sizes[:-1]]).cumsum(0)             # the first prefix of each length
    mask = torch.ones(batch, L, dtype=torch.bool)

    def values():
        return value_model(world.tokens, world.positions, world.mask[None, None])[:, 1:] @ head     # (P, prefixes)

    for step in range(rounds):
        optimizer.param_groups[0]['lr'] = rate * (1 - step / rounds)
        with torch.no_grad():
            old, old_values = token_logps(world, policy), values()
            y = torch.multinomial(completions(world, old).exp()[x], 1, generator=noise)             # (batch, 1)
            after = y // V ** torch.arange(L).flip(0)           # the number of the prefix that ends with each token
            at, token = starts + F.pad(after[:, :-1], (1, 0)), after % V                            # (batch, L)
            place = x[:, None], at, token
            rewards = -BETA * (old - rho)[place]
            rewards[:, -1] += world.reward[x, y[:, 0]]
            ahead, returns = advantages_and_returns(rewards, old_values[x[:, None], at], mask, lam)
            ahead = (ahead - ahead.mean()) / ahead.std()
        for _ in range(epochs):
            policy_losses, value_losses = clipped_losses(token_logps(world, policy)[place], old[place], ahead,
                                                         values()[x[:, None], at], old_values[x[:, None], at], returns,
                                                         clip)
            optimizer.zero_grad()
            (policy_losses.mean() + value_losses.mean()).backward()
            optimizer.step()
    with torch.no_grad():
        return token_logps(world, policy), values()


def value_credit(world, values):
    """V(s, a) - V(s) of a value model, the true reward after the last token: (P, prefixes, V)."""
    ahead = torch.cat([values[:, 1:], world.reward], 1)         # of the children of each prefix, in order
    return ahead.view(*values.shape, -1) - values[:, :, None]


def worlds(seeds):
    """-> rows: correlation with the exact advantage, by method, pairs and seed; points of one world for the figure."""
    rows, points = [], {}
    jobs = [(seed, n) for seed in range(1, seeds + 1) for n in PAIRS]
    for seed, n in tqdm(jobs, 'worlds', disable=None):
        world = World(**SIZE, seed=seed)
        exact, weight, rho = advantages(world, BETA), reach(world), token_logps(world, world.reference)
        pairs = sample_pairs(world.rho, world.reward, n, torch.Generator().manual_seed(seed))
        credits = {method: BETA * (fit(world, method, pairs) - rho) for method in ('DPO', 'IPO', 'KTO')}
        if n == PAIRS[0]:           # PPO draws its own completions
            logps, values = ppo(world, seed)
            credits |= {'PPO, policy': BETA * (logps - rho), 'PPO, value model': value_credit(world, values)}
        for method, credit in credits.items():
            drawn = 40_000 if 'PPO' in method else n
            rows.append(dict(method=method, n=drawn, seed=seed, **compare(world, credit, exact, weight)))
            if seed == 1 and (n == PAIRS[1] or 'PPO' in method):
                points[method] = exact.flatten(), credit.flatten()
    return rows, points


# ----------------------------------------------------------------------------------------------------
# the reviews

def words_of(pieces):
    """[(word, tint)] of token_pieces: each word in lower case with the sum over the tokens that begin inside it.

    A token that begins with blanks begins where these end. What is no word counts for the word before it.
    """
    text, starts, tints = '', [], []
    for piece, values in pieces:
        piece = piece or ''
        starts.append(len(text) + len(piece) - len(piece.lstrip()))
        tints.append(sum(values))
        text += piece
    spans = list(re.finditer(r'\w+', text.lower()))
    sums = [0.0] * len(spans)
    for start, tint in zip(starts, tints):
        inside = [i for i, span in enumerate(spans) if span.start() <= start]
        if inside:
            sums[inside[-1]] += tint
    return [(span[0], tint) for span, tint in zip(spans, sums)]


def review_words(cfg):
    """Words of the policy's own samples: [(prompt's number, word, tint)]."""
    task = Task(cfg.name, cfg.reward)
    reference, policy = task.load(''), task.load(cfg.policy or os.path.join('out', cfg.name, 'dpo'))
    beta = policy.record['config']['beta']
    prompts = task.prompts('val', cfg.prompts)
    responses = task.draw(policy, prompts, 1337, desc='responses')
    groups = list(zip(prompts, responses))
    after, before = (token_logps_of(model, groups, task.worker) for model in (policy, reference))
    found = []
    for i, (ids, a, b) in enumerate(zip(responses, after, before)):
        pieces = token_pieces(task.tokenizer, ids, (beta * (a[0] - b[0])).tolist())
        found += [(i, word, tint) for word, tint in words_of(pieces)]
    return found


def by_class(found, draws=200):
    """A row a class: words, mean |tint|, rank correlation of tint and weight, its interval over prompts."""
    classes = {word: kind for kind, words in reviews.OPPOSITES.items() for word in re.split('[ /]', words)}
    weights = reviews.weights()
    kinds = np.array([classes.get(word, 'neutral') for _, word, _ in found])
    numbers = np.array([number for number, *_ in found])
    weight = np.array([weights.get(word, 0.0) for _, word, _ in found])
    tint = np.array([tint for *_, tint in found])
    rng, rows = np.random.default_rng(0), []
    for kind in ('all words', 'sentiment words', *reviews.OPPOSITES, 'neutral'):
        inside = kinds == kind if kind in kinds else (weight != 0) | (kind == 'all words')
        row = dict(kind=kind, words=int(inside.sum()), tint=float(np.abs(tint[inside]).mean()),
                   share=float(np.abs(tint[inside]).sum() / np.abs(tint).sum()))
        if kind != 'neutral':
            row['correlation'] = correlation_of(tint[inside], weight[inside])
            members = [np.flatnonzero(inside & (numbers == i)) for i in np.unique(numbers[inside])]
            again = []
            for _ in range(draws):
                drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
                again.append(correlation_of(tint[drawn], weight[drawn]))
            row['interval'] = np.percentile(again, [2.5, 97.5]).tolist()
        rows.append(row)
    return rows, (weight, tint)


def correlation_of(x, y):
    """Spearman's of arrays, the ranks of ties averaged."""
    (_, i, n), (_, j, m) = (np.unique(v, return_inverse=True, return_counts=True) for v in (x, y))
    return float(np.corrcoef((n.cumsum() - n / 2)[i], (m.cumsum() - m / 2)[j])[0, 1])


# ----------------------------------------------------------------------------------------------------
# the report

def text(rows, classes):
    """The report as Markdown."""
    lines = [['credit of', 'pairs or samples', 'correlation with the advantage', 'slope',
              *(f'token {t + 1}' for t in range(SIZE['length']))]]
    for method, n in dict.fromkeys((row['method'], row['n']) for row in rows):
        found = of(rows, method=method, n=n)
        positions = np.array([row['positions'] for row in found]).mean(0)
        lines.append([method, f'{n:,}', cell([row['correlation'] for row in found], '.3f'),
                      cell([row['slope'] for row in found]), *(f'{c:.3f}' for c in positions)])
    said = table(lines)
    if classes:
        lines = [['class', 'words', 'mean |tint|', 'of all tint', 'rank correlation with the weight', '95% interval']]
        for row in classes:
            found = [f'{row["correlation"]:.2f}', '{:.2f} to {:.2f}'.format(*row['interval'])] \
                if 'interval' in row else ['', '']
            lines.append([row['kind'], f'{row["words"]:,}', f'{row["tint"]:.3f}', f'{row["share"]:.0%}', *found])
        said += '\n' + table(lines)
    return said


def figure(rows, points, classes, scatter, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    panels = 4 if classes else 2
    plot, axes = plt.subplots(1, panels, figsize=(5 * panels, 4.8), constrained_layout=True)
    for method in ('KTO', 'DPO', 'PPO, value model'):
        axes[0].plot(*points[method], '.', ms=3, alpha=0.5, color=COLOURS[method], label=method)
    axes[0].axline((0, 0), slope=1, color=EXACT, lw=1, ls='--', label='equal, as for $\\pi^*$')
    axes[0].set(title=f'Credit of every token, {PAIRS[1]:,} pairs', xlabel='exact advantage, nats', ylim=(-8, 8),
                ylabel='$\\beta$ log($\\pi$/$\\rho$), or V(s, a) - V(s)')
    for method in ('DPO', 'IPO', 'KTO'):
        middle, half = zip(*(interval([r['correlation'] for r in of(rows, method=method, n=n)]) for n in PAIRS))
        axes[1].errorbar(PAIRS, middle, half, marker='o', capsize=3, color=COLOURS[method], label=method)
    for method in ('PPO, policy', 'PPO, value model'):
        middle, _ = interval([r['correlation'] for r in of(rows, method=method)])
        axes[1].axhline(middle, color=COLOURS[method], ls='--', lw=1, label=f'{method}, 40,000 completions')
    axes[1].set(title='Correlation with the exact advantage', xlabel='pairs', xscale='log', ylim=(0, 1.02))
    if classes:
        axes[2].plot(*scatter, '.', ms=2, alpha=0.3, color=BLUE)
        axes[2].set(title='The reviews: words of the policy\'s samples', xlabel='weight in the true reward, nats',
                    ylabel='tint, nats')
        measured = [row for row in classes if 'correlation' in row]
        for y, row in enumerate(reversed(measured)):
            axes[3].plot(row['interval'], [y, y], color=BLUE)
            axes[3].plot(row['correlation'], y, 'o', color=BLUE)
        axes[3].set(title='Rank correlation of tint and weight', yticks=range(len(measured)), xlim=(0, 1),
                    yticklabels=[row['kind'] for row in reversed(measured)])
    for ax in axes:
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)
    plot.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: data/<name>, out/<name>/sft
    reward: str = config.EMBEDDED                   # its true reward; the words' weights are those of config/reviews.py
    policy: str = ''                                # a checkpoint of dpo.py; '' = out/<name>/dpo
    prompts: In[int, 'x >= 0'] = 500                # of val, one sample each; 0 = the worlds alone
    seeds: In[int, '2 <= x <= 10'] = 5              # of the worlds
    out: str = os.path.join(ROOT, 'repro', 'results', 'credit')


def main(argv=None):
    cfg = config.load(Config, 'credit', argv)
    torch.set_num_threads(1)
    classes, scatter = by_class(review_words(cfg)) if cfg.prompts else ([], None)
    rows, points = worlds(cfg.seeds)
    said = text(rows, classes)
    print(said)
    write_report(cfg.out, said, dict(worlds=rows, reviews=classes))
    figure(rows, points, classes, scatter, cfg.out + '.png')
    print(f'written: {cfg.out}.md, .json, .png')


if __name__ == '__main__':
    config.run(main)
