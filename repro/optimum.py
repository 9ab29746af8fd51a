"""The optimum, exactly: DPO, best-of-N, REINFORCE and PPO where every completion can be listed.

    python repro/optimum.py                                 # 6 minutes on one CPU core; writes repro/results/optimum.*
    python repro/optimum.py --quick --out=optimum           # a smaller world, in seconds

There are P prompts of two tokens, a vocabulary of V, and completions of a fixed length: M = V**length of them. The
reference rho is a small GPT of model.py with large random weights, far from uniform. The reward is drawn once: effects
of a token at a position, other ones for each prompt, and of adjacent tokens. So the optimum of the KL-constrained
objective, pi*(y|x) = rho(y|x) exp(r(x,y)/beta) / Z(x) (eq. 4 of arXiv 2305.18290), is a table, and so is its frontier
of KL and reward. Policies are the same GPT and start at the reference. All numbers are in nats. An average over x
gives prompts equal weight.

  expected   DPO on the expected loss over all M**2 pairs, both drawn from rho, with Bradley-Terry labels on r (eq. 1).
             With labels on r itself and DPO's beta, the minimum has beta log(pi/rho) = r + constant(x): pi*_beta, for
             pairs from any distribution with full support. rho is the paper's choice. Adam, then L-BFGS
  sampled    DPO on n sampled pairs and labels. Every fifth pair is held out, and the lowest loss there ends the run:
             few pairs are separable, and the loss has no minimum. Identical pairs are one row with a count
  best-of-N  the exact distribution, from the cumulative distribution of r under rho
  REINFORCE  on the true reward less beta log(pi/rho), with a running mean a prompt as the baseline
  PPO        the same reward and baseline, clipped, several epochs a batch. A completion is one action, its ratio is
             that of the whole completion, and there is no value network: not the token-level PPO of RLHF codes

The distance to the optimum: with J = E[r] - beta KL(pi||rho) and J* = beta E_x[log Z], J* - J(pi) = beta KL(pi||pi*).
Each method's learning rate for sampled runs was chosen by hand among 3e-4, 1e-3 and 3e-3, in this same world, from one
or two short runs each: what they need is a rough comparison.
"""
import argparse
import copy
import itertools
import math
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'repro')]
import config                           # noqa: E402
from config import UserError            # noqa: E402
from dpo import dpo_loss                # noqa: E402
from model import GPT, GPTConfig        # noqa: E402
from scale import table                 # noqa: E402
from sweep import write_json            # noqa: E402

BETAS = 0.1, 0.3, 1.0, 3.0
BETA = 1.0                              # of the sampled runs: DPO on n pairs, REINFORCE, PPO
BEST_OF = 1, 2, 4, 8, 16, 32, 64, 128
GAPS = 0.05, 0.01                       # J* - J, nats: what counts as close
RATES = dict(DPO=3e-4, REINFORCE=1e-3, PPO=1e-3)            # of Adam, linear to 0 over the run; of sampled runs
CLIP = 0.2                              # PPO's
EPOCHS = 4                              # PPO's, a batch
BATCH = 250                             # completions, PPO's and REINFORCE's
FULL = dict(prompts=4, vocab=5, length=4, width=32, adam=300, lbfgs=200,
            pairs=(100, 300, 1000, 3000, 10000, 30000, 100000), steps=300, samples=100_000, seeds=5)
QUICK = dict(prompts=2, vocab=3, length=3, width=16, adam=150, lbfgs=100,
             pairs=(100, 1000, 10000), steps=100, samples=10_000, seeds=1)


# ----------------------------------------------------------------------------------------------------
# the world: all completions, their rewards, the reference

def grid(x):
    """x in steps of 2**-40: there r + f(x) is exact, and float64's rounding is no part of what f(x) changes."""
    return (x * 2**40).round() / 2**40


class World:
    """reference: a frozen GPT, float64; rho: (P, M) its log-probs; reward: (P, M), std 1 over all completions."""

    def __init__(self, prompts, vocab, length, width, seed):
        torch.manual_seed(seed)
        drawn = torch.randperm(vocab**2)[:prompts]          # different ones: a policy cannot tell equal ones apart
        self.prompts = torch.stack([drawn // vocab, drawn % vocab], dim=1)                              # (P, 2)
        self.completions = torch.tensor(list(itertools.product(range(vocab), repeat=length)))           # (M, length)
        gpt_config = GPTConfig(2 + length, vocab, n_layer=2, n_head=2, n_embd=width)
        self.reference = GPT(gpt_config).double().requires_grad_(False)
        for p in self.reference.parameters():
            if p.dim() == 2:
                p.mul_(6)                       # GPT-2's initialisation alone is close to uniform
        # one row a prompt, its nodes [prompt | all prefixes of a completion, short ones first]: each is computed once
        prefixes = [p for t in range(length) for p in itertools.product(range(vocab), repeat=t)]    # the first is ()
        extends = torch.tensor([[p[:len(q)] == q for q in prefixes] for p in prefixes])
        self.mask = F.pad(extends, (1, 0, 1, 0), value=True)        # a prefix sees its own prefixes, and the prompt
        self.mask[0, 1:] = False
        last = torch.tensor([p[-1] for p in prefixes[1:]]).expand(prompts, -1)
        self.tokens = torch.cat([self.prompts, last], dim=1)                                            # (P, T)
        self.positions = torch.tensor([0] + [1 + len(p) for p in prefixes]).expand(prompts, -1)         # (P, T)
        self.sizes = [vocab**t for t in range(length)]                  # prefixes of each length

        with torch.no_grad():
            self.rho = self.logps(self.reference)
        token = torch.randn(prompts, length, vocab, dtype=torch.float64)
        pair = torch.randn(length - 1, vocab, vocab, dtype=torch.float64)
        y = self.completions
        reward = sum(token[:, t, y[:, t]] for t in range(length))                                       # (P, M)
        reward = reward + sum(pair[t, y[:, t], y[:, t + 1]] for t in range(length - 1))
        self.reward = grid(reward / reward.std())

    def logps(self, policy):
        """Log-probabilities of all completions, in the order of `completions`: (P, M), differentiable."""
        states = policy(self.tokens, self.positions, self.mask[None, None])
        hidden = states[:, 1:]                                          # from the prompt's last token on
        steps = F.log_softmax(F.linear(hidden, policy.wte.weight), dim=-1)                      # (P, T - 1, V)
        total = steps.new_zeros(len(steps), 1)
        for step in steps.split(self.sizes, dim=1):
            total = (total[:, :, None] + step).flatten(1)               # (P, V**t) + (P, V**t, V) -> (P, V**(t + 1))
        return total

    def policy(self):
        """A trainable copy of the reference."""
        return copy.deepcopy(self.reference).requires_grad_(True)


def optimum(rho, reward, beta):
    """pi*_beta, eq. 4 -> its log-probs (P, M), and J* = beta E_x[log Z(x)], a float."""
    scores = rho + reward / beta
    return scores.log_softmax(-1), beta * scores.logsumexp(-1).mean().item()


def mean_kl(p, q):
    """E_x KL(p||q), nats; p, q: log-probs (P, M)."""
    return (p.exp() * (p.clamp(min=-1e300) - q)).sum(-1).mean().item()          # 0 log 0 is 0: best-of-N


def mean_reward(p, reward):
    """E_x E_y r(x, y), y from log-probs p (P, M)."""
    return (p.exp() * reward).sum(-1).mean().item()


def frontier(rho, reward, kl):
    """The largest mean reward at a mean KL to rho of `kl`: that of pi*_beta, its beta found by bisection.

    A policy with E_x KL(pi||rho) = kl is below by at most beta KL(pi||pi*_beta), any beta: the frontier is under its
    tangents.
    """
    low, high = 1e-3, 1e6
    for _ in range(50):
        beta = math.sqrt(low * high)
        star, _ = optimum(rho, reward, beta)
        low, high = (beta, high) if mean_kl(star, rho) > kl else (low, beta)
    return mean_reward(star, reward)


def best_of(rho, reward, n):
    """Log-probs of the best of n draws from rho, (P, M). Exact where no two completions of a prompt tie.

    They are F(y)^n less F^n just below y, with F the cumulative distribution of the reward under rho.
    """
    order = reward.argsort(dim=-1)
    cdf = rho.gather(-1, order).exp().cumsum(-1).clamp(max=1) ** n
    sorted_p = cdf.diff(dim=-1, prepend=torch.zeros_like(cdf[:, :1]))
    return torch.zeros_like(rho).scatter(-1, order, sorted_p).log()


# ----------------------------------------------------------------------------------------------------
# DPO

def expected_loss(logps, rho, weight, beta):
    """dpo_loss, averaged over prompts, pairs and labels. weight: (P, M, M), the probability that i is chosen over j."""
    losses, _, _ = dpo_loss(logps[:, :, None], logps[:, None], rho[:, :, None], rho[:, None], beta)  # (P, M, M)
    return (losses * weight).sum() / len(rho)


def label_weights(rho, reward):
    """P(y1, y2 from rho and i preferred to j): both orders of a pair are in it, so it sums to 1 a prompt. (P, M, M)"""
    return 2 * (rho[:, :, None] + rho[:, None] + F.logsigmoid(reward[:, :, None] - reward[:, None])).exp()


def fit_expected(world, reward, beta, adam, lbfgs, learning_rate=1e-2):
    """DPO on the expected loss. -> log-probs of the policy (P, M), and the loss above its minimum, which is pi*'s."""
    policy, weight = world.policy(), label_weights(world.rho, reward)
    bar = tqdm(total=adam + lbfgs, desc=f'expected loss, beta {beta:g}', leave=False, disable=None)

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(world.logps(policy), world.rho, weight, beta)
        loss.backward()
        bar.update()
        return loss

    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99))
    for step in range(adam):
        optimizer.param_groups[0]['lr'] = learning_rate * (1 - step / adam)
        optimizer.step(closure)
    optimizer = torch.optim.LBFGS(policy.parameters(), max_iter=lbfgs, max_eval=lbfgs, history_size=50,
                                  tolerance_change=0, line_search_fn='strong_wolfe')
    optimizer.step(closure)
    bar.close()
    with torch.no_grad():
        logps, (star, _) = world.logps(policy), optimum(world.rho, reward, beta)
        loss, minimum = (expected_loss(x, world.rho, weight, beta).item() for x in (logps, star))
    return logps, loss - minimum


def sample_pairs(rho, reward, n, generator):
    """n pairs from rho with Bradley-Terry labels: prompt, chosen, rejected, each (n,)."""
    x = torch.randint(len(rho), (n,), generator=generator)
    y = torch.multinomial(rho.exp()[x], 2, replacement=True, generator=generator)               # (n, 2)
    p = torch.sigmoid(reward[x, y[:, 0]] - reward[x, y[:, 1]])
    first = torch.rand(n, generator=generator, dtype=p.dtype) < p
    return x, torch.where(first, y[:, 0], y[:, 1]), torch.where(first, y[:, 1], y[:, 0])


def grouped(x, chosen, rejected, M):
    """Identical pairs once -> flat indices into (P, M) of chosen and of rejected, and their shares of the pairs."""
    keys, counts = torch.unique((x * M + chosen) * M + rejected, return_counts=True)
    return keys // M, keys // M**2 * M + keys % M, counts / len(x)


def fit_pairs(world, beta, n, seed, steps, learning_rate):
    """DPO on n sampled pairs, every fifth held out. -> the log-probs (P, M) where the loss on these was lowest."""
    pairs = sample_pairs(world.rho, world.reward, n, torch.Generator().manual_seed(seed))
    held = torch.arange(n) % 5 == 0
    train, val = (grouped(*(part[rows] for part in pairs), world.rho.shape[1]) for rows in (~held, held))
    policy, ref = world.policy().float(), world.rho.float().flatten()           # sampling noise dwarfs float32's
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99))
    lowest, best = math.inf, None
    for step in range(steps + 1):
        logps = world.logps(policy)
        loss, val_loss = (dpo_loss(logps.flatten()[w], logps.flatten()[l], ref[w], ref[l], beta)[0] @ share
                          for w, l, share in (train, val))
        if val_loss < lowest:
            lowest, best = val_loss.item(), logps.detach().double()
        optimizer.param_groups[0]['lr'] = learning_rate * (1 - step / (steps + 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


# ----------------------------------------------------------------------------------------------------
# reinforcement learning on the true reward

def climb(world, beta, method, seed, samples, learning_rate):
    """REINFORCE or PPO. -> [(samples drawn, J* - J)] after each batch, and the last log-probs (P, M)."""
    generator = torch.Generator().manual_seed(seed)
    policy, rho, reward = world.policy().float(), world.rho.float(), world.reward.float()
    P, M = rho.shape
    star, _ = optimum(world.rho, world.reward, beta)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99))
    x = torch.arange(P).repeat_interleave(math.ceil(BATCH / P))[:BATCH]         # the same prompts in every batch
    baseline, curve, batches = None, [], samples // BATCH
    logps = world.logps(policy)
    for batch in range(batches):
        optimizer.param_groups[0]['lr'] = learning_rate * (1 - batch / batches)
        old = logps.detach()
        y = torch.multinomial(old.exp()[x], 1, generator=generator)[:, 0]
        returns = reward[x, y] - beta * (old - rho)[x, y]           # (BATCH,) the KL penalty is in the reward
        means = torch.zeros(P).index_add(0, x, returns) / x.bincount()
        baseline = means if baseline is None else baseline
        advantage = returns - baseline[x]
        baseline = 0.9 * baseline + 0.1 * means
        for _ in range(EPOCHS if method == 'PPO' else 1):
            if method == 'PPO':
                ratio = (logps[x, y] - old[x, y]).exp()
                loss = -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
            else:
                loss = -(logps[x, y] * advantage).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            logps = world.logps(policy)
        curve.append(((batch + 1) * BATCH, beta * mean_kl(logps.detach().double(), star)))
    return curve, logps.detach().double()


# ----------------------------------------------------------------------------------------------------
# the report

def recovered(logps, rho, reward, beta):
    """beta log(pi/rho) beside r, each less its mean under rho for a prompt.

    -> correlation and RMS error under rho, largest error, and both tables (P, M).
    """
    weight = rho.exp()
    implicit, r = (x - (weight * x).sum(-1, keepdim=True) for x in (beta * (logps - rho), reward))
    correlation = (weight * implicit * r).sum() / ((weight * implicit**2).sum() * (weight * r**2).sum()).sqrt()
    error = implicit - r
    rms = ((weight * error**2).sum(-1).mean()).sqrt()
    return correlation.item(), rms.item(), error.abs().max().item(), implicit, r


def first_within(curve, gap):
    """Samples from which on J* - J stays within `gap`; None where it does not."""
    outside = [i for i, (_, g) in enumerate(curve) if g > gap]
    after = outside[-1] + 1 if outside else 0
    return curve[after][0] if after < len(curve) else None


def measure(size, seed):
    """Run all of it. -> the report, a dict of numbers, and the (P, M) tables that the figure scatters, by beta."""
    began = time.process_time()
    world = World(size['prompts'], size['vocab'], size['length'], size['width'], seed)
    rho, reward = world.rho, world.reward

    def row(logps, **more):
        kl, r = mean_kl(logps, rho), mean_reward(logps, reward)
        return more | dict(kl=kl, reward=r, below_frontier=frontier(rho, reward, kl) - r)

    report = dict(seed=seed, size=size, completions=rho.shape[1], parameters=world.reference.num_params(),
                  perplexity=(-(rho.exp() * rho).sum(-1)).exp().tolist(), reference=row(rho))
    report['expected'], scatter, trained = measure_expected(world, size, row)
    report['frontier'] = []
    for beta in torch.logspace(-1.3, 1.5, 80).tolist():
        star, _ = optimum(rho, reward, beta)
        report['frontier'].append(dict(beta=beta, kl=mean_kl(star, rho), reward=mean_reward(star, reward)))
    report['best_of'] = [row(best_of(rho, reward, n), n=n, formula=math.log(n) - (n - 1) / n) for n in BEST_OF]
    report['shift'] = measure_shift(world, size, seed, trained)
    star, _ = optimum(rho, reward, BETA)
    seeds = range(seed + 1, seed + 1 + size['seeds'])
    report['sampled'] = []
    for n, s in tqdm(list(itertools.product(size['pairs'], seeds)), 'DPO on n pairs', leave=False, disable=None):
        logps = fit_pairs(world, BETA, n, s, size['steps'], RATES['DPO'])
        report['sampled'].append(row(logps, n=n, seed=s, kl_optimum=mean_kl(logps, star)))
    report['rl'] = []
    for method, s in tqdm(list(itertools.product(('REINFORCE', 'PPO'), seeds)), 'RL', leave=False, disable=None):
        curve, logps = climb(world, BETA, method, s, size['samples'], RATES[method])
        report['rl'].append(row(logps, method=method, seed=s, kl_optimum=mean_kl(logps, star), curve=curve,
                                within={f'{gap:g}': first_within(curve, gap) for gap in GAPS}))
    kls = {n: [r['kl_optimum'] for r in report['sampled'] if r['n'] == n] for n in size['pairs']}
    report['pairs'] = [dict(n=n, mean=statistics.mean(kl), lowest=min(kl), highest=max(kl)) for n, kl in kls.items()]
    first, last = report['pairs'][-3], report['pairs'][-1]
    report['slope'] = math.log(last['mean'] / first['mean']) / math.log(last['n'] / first['n'])
    report['pairs_within'] = {f'{gap:g}': next((p['n'] for p in report['pairs'] if BETA * p['mean'] <= gap), None)
                              for gap in GAPS}
    report['seconds'] = time.process_time() - began
    return report, scatter


def measure_expected(world, size, row):
    """DPO on the expected loss at each beta. -> rows of the report; the tables to scatter; the log-probs at BETA."""
    rows, scatter, trained = [], {}, None
    for beta in BETAS:
        star, best = optimum(world.rho, world.reward, beta)
        logps, excess = fit_expected(world, world.reward, beta, size['adam'], size['lbfgs'])
        correlation, rms, largest, *scatter[beta] = recovered(logps, world.rho, world.reward, beta)
        gap = best - mean_reward(logps, world.reward) + beta * mean_kl(logps, world.rho)
        rows.append(row(logps, beta=beta, kl_optimum=mean_kl(logps, star), kl_start=mean_kl(world.rho, star), gap=gap,
                        excess_loss=excess, correlation=correlation, rms_error=rms, largest_error=largest))
        if beta == BETA:
            trained = logps
    return rows, scatter, trained


def measure_shift(world, size, seed, trained):
    """What some f(x), added to the reward, changes. trained: the log-probs without it."""
    rho, reward = world.rho, world.reward
    noise = torch.Generator().manual_seed(seed + 1)
    f = grid(3 * torch.randn(len(rho), 1, dtype=rho.dtype, generator=noise))
    shifted, _ = fit_expected(world, reward + f, BETA, size['adam'], size['lbfgs'])
    stars = [optimum(rho, r, BETA)[0] for r in (reward, reward + f)]
    labels = [label_weights(rho, r) for r in (reward, reward + f)]
    return dict(f=f.flatten().tolist(), difference=(shifted - trained).abs().max().item(),
                optimum=(stars[1] - stars[0]).abs().max().item(), labels=(labels[1] - labels[0]).abs().max().item())


def text(report):
    """The report as Markdown."""
    size, shift, pairs = report['size'], report['shift'], report['pairs']

    def count(n):
        return 'not reached' if n is None else f'{n:,}'

    heading = (f'{size["prompts"]} prompts, {report["completions"]} completions each; the reference, '
               f'{report["parameters"]:,} parameters, has a perplexity of {min(report["perplexity"]):.0f} to '
               f'{max(report["perplexity"]):.0f} completions. Nats, means over prompts. Seed {report["seed"]}, '
               f'{report["seconds"]:.0f} seconds of one CPU core.')
    expected = [{'beta': f'{r["beta"]:g}', 'KL(ref, pi*) before': f'{r["kl_start"]:.3f}',
                 'KL(pi, pi*)': f'{r["kl_optimum"]:.4f}', 'J* - J': f'{r["gap"]:.5f}',
                 'loss above minimum': f'{r["excess_loss"]:.1e}', 'KL(pi, ref)': f'{r["kl"]:.3f}',
                 'reward': f'{r["reward"]:.3f}', 'below frontier': f'{r["below_frontier"]:.5f}'}
                for r in report['expected']]
    implicit = [{'beta': f'{r["beta"]:g}', 'correlation with r': f'{r["correlation"]:.5f}',
                 'RMS error under rho': f'{r["rms_error"]:.4f}', 'largest error': f'{r["largest_error"]:.3f}'}
                for r in report['expected']]
    best = [{'N': f'{r["n"]}', 'exact KL': f'{abs(r["kl"]):.4f}', 'log N - (N-1)/N': f'{r["formula"]:.4f}',
             'reward': f'{r["reward"]:.3f}', 'below frontier': f'{r["below_frontier"]:.4f}'} for r in report['best_of']]
    sampled = [{'pairs': f'{p["n"]:,}', 'KL(pi, pi*), mean': f'{p["mean"]:.4f}', 'lowest': f'{p["lowest"]:.4f}',
                'highest': f'{p["highest"]:.4f}'} for p in pairs]
    runs = [(f'{r["method"]}, {r["seed"]}', r['within'], r['kl_optimum']) for r in report['rl']]
    runs.append(('DPO, pairs (first n above)', report['pairs_within'], pairs[-1]['mean']))
    rl = [{'method, seed': label, **{f'within {gap} of J*': count(n) for gap, n in within.items()},
           'J* - J at the end': f'{BETA * kl:.5f}'} for label, within, kl in runs]
    return '\n\n'.join([
        heading, '## DPO on the expected loss', table(expected),
        '## The implicit reward, beta log(pi/ref), less its mean for a prompt', table(implicit),
        f'f(x) added to the reward, {", ".join(f"{f:+.2f}" for f in shift["f"])} for the prompts, beta {BETA:g}: '
        f'probabilities of labels change by at most {shift["labels"]:.0e}, log pi* by {shift["optimum"]:.0e}, '
        f'log-probs after training by {shift["difference"]:.0e}.',
        '## Best-of-N, exactly', table(best),
        f'## DPO on n sampled pairs, beta {BETA:g}, seeds: {size["seeds"]}', table(sampled),
        f'Slope of log KL on log n from {pairs[-3]["n"]:,} to {pairs[-1]["n"]:,} pairs: {report["slope"]:.2f}.',
        f'## Samples needed, beta {BETA:g}: completions drawn and scored by the true reward; for DPO, labelled pairs',
        table(rl)]) + '\n'


BLUE, RED, YELLOW, GREEN = '#4c78a8', '#d1495b', '#e0a100', '#3a8f6f'


def draw(report, scatter, path):
    """Frontier, implicit reward, DPO against the number of pairs, everyone against the number of samples."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(12.5, 9.4), constrained_layout=True)
    draw_frontier(axes[0, 0], report)
    draw_implicit(axes[0, 1], scatter)
    draw_pairs(axes[1, 0], report)
    draw_samples(axes[1, 1], report)
    for ax in axes.flat:
        ax.legend(fontsize=9, frameon=False, markerscale=4 if ax is axes[0, 1] else 1)
        ax.grid(alpha=0.2)
        ax.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_frontier(ax, report):
    def points(rows):
        return [r['kl'] for r in rows], [r['reward'] for r in rows]

    ax.plot(*points(report['frontier']), color='0.55', lw=1.5, label='$\\pi^*_\\beta$, exact', zorder=1)
    ax.plot(*points(report['best_of']), color=YELLOW, marker='s', ms=4, lw=0.8, ls=':',
            label='best of N = 1, 2, 4, ..., 128, exact')
    ax.plot(*points(report['expected']), 'o', color=BLUE, ms=8, label='DPO, expected loss')
    for r in report['expected']:
        above = dict(xytext=(-7, 7), ha='right') if r['beta'] < 1 else dict(xytext=(6, -13))
        ax.annotate(f'$\\beta$ = {r["beta"]:g}', (r['kl'], r['reward']), textcoords='offset points', fontsize=9,
                    color=BLUE, **above)
    for method, marker, colour in (('REINFORCE', '^', GREEN), ('PPO', 'v', RED)):
        ax.plot(*points([r for r in report['rl'] if r['method'] == method]), marker, color=colour, ms=11, mfc='none',
                label=f'{method}, true reward, $\\beta$ = {BETA:g}')
    ax.set_xlim(-0.1, 1.1 * max(r['kl'] for r in report['expected']))
    ax.set(title='The frontier of KL and reward, exact', xlabel='KL(policy || reference), nats',
           ylabel='mean true reward')


def draw_implicit(ax, scatter):
    for beta, colour in ((BETA, BLUE), (BETAS[0], YELLOW)):
        implicit, r = scatter[beta]
        ax.plot(r.flatten(), implicit.flatten(), '.', ms=3, color=colour, alpha=0.6,
                label=f'DPO, expected loss, $\\beta$ = {beta:g}')
    _, r = scatter[BETA]
    ends = [r.min(), r.max()]
    ax.plot(ends, ends, color='0.3', lw=0.8, label='equal')
    ax.set(title='DPO recovers the reward up to f(x)', xlabel='true reward less its mean for the prompt',
           ylabel='$\\beta$ log(policy / reference), less its mean')


def draw_pairs(ax, report):
    pairs, seeds = report['pairs'], report['size']['seeds']
    n, means = [p['n'] for p in pairs], [p['mean'] for p in pairs]
    bars = [p['mean'] - p['lowest'] for p in pairs], [p['highest'] - p['mean'] for p in pairs]
    ax.plot([r['n'] for r in report['sampled']], [r['kl_optimum'] for r in report['sampled']], '.', color=BLUE,
            alpha=0.5)
    ax.errorbar(n, means, bars, color=BLUE, capsize=3, marker='o', ms=5, lw=1.2,
                label=f'DPO, mean and range of {seeds} seed' + ('s' if seeds > 1 else ''))
    ax.plot(n[-2:], [1.5 * means[-2], 1.5 * means[-2] * n[-2] / n[-1]], color='0.3', lw=0.8, ls='--', label='slope -1')
    start = next(r['kl_start'] for r in report['expected'] if r['beta'] == BETA)
    ax.axhline(start, color='0.6', lw=0.8, ls=':', label='the reference')
    ax.set(title=f'DPO on n sampled pairs, $\\beta$ = {BETA:g}', xlabel='pairs', ylabel='KL(policy || $\\pi^*$), nats',
           xscale='log', yscale='log')


def draw_samples(ax, report):
    for method, colour in (('REINFORCE', GREEN), ('PPO', RED)):
        curves = [r['curve'] for r in report['rl'] if r['method'] == method]
        drawn = [samples for samples, _ in curves[0]]
        gaps = [[gap for _, gap in batch] for batch in zip(*curves)]
        ax.plot(drawn, [statistics.mean(g) for g in gaps], color=colour, lw=1.3,
                label=f'{method}: completions, true reward')
        ax.fill_between(drawn, [min(g) for g in gaps], [max(g) for g in gaps], color=colour, alpha=0.2, lw=0)
    ax.plot([p['n'] for p in report['pairs']], [BETA * p['mean'] for p in report['pairs']], color=BLUE, marker='o',
            ms=5, lw=1.2, label='DPO: labelled pairs, one run a dot')
    for gap in GAPS:
        ax.axhline(gap, color='0.6', lw=0.8, ls=':')
    ax.set(title=f'To the same optimum, $\\beta$ = {BETA:g}', xlabel='samples drawn', ylabel='J* - J, nats',
           xscale='log', yscale='log')


def option_parser(doc):
    """An argparse parser of a script with that docstring, whose mistakes are UserErrors."""
    def fail(message):
        raise UserError(f'{message} (--help lists the options)')

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    return parser


def main(argv=None):
    parser = option_parser(__doc__)
    add = parser.add_argument
    add('--quick', action='store_true', help='a smaller world, fewer steps, one seed; writes only where --out is given')
    add('--seed', type=int, default=1337, help='of the world; runs on samples take the next ones')
    add('--out', default='', help='writes OUT.json, OUT.md and OUT.png; default: repro/results/optimum')
    options = parser.parse_args(argv)
    if not 0 <= options.seed < 2**31:
        parser.error(f'seed={options.seed} must be from 0 to 2**31 - 1')
    if not os.path.isdir(os.path.dirname(options.out) or '.'):
        parser.error(f'out={options.out}: no such folder')
    out = options.out or ('' if options.quick else os.path.join(ROOT, 'repro', 'results', 'optimum'))
    torch.set_num_threads(1)            # matrices are small, and sums in one order repeat to the last bit
    report, scatter = measure(QUICK if options.quick else FULL, options.seed)
    print(text(report), end='')
    if out:
        write_json(f'{out}.json', report)
        with open(f'{out}.md', 'w') as f:
            f.write(text(report))
        draw(report, scatter, f'{out}.png')


if __name__ == '__main__':
    config.run(main)
