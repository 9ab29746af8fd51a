"""What DPO gets wrong, six ways, each beside an optimum that is known exactly.

    python repro/pathologies.py                 # under two minutes on two cores; writes repro/results/pathologies.*
    python repro/pathologies.py --seeds=2 --out=pathologies

  misspecification    three responses, a policy of one parameter (arXiv 2510.20413). DPO on the expected loss, found by
                      bisection, in 3,000 random worlds
  labels              two arms, one always preferred (arXiv 2310.12036): gradient descent with DPO and with IPO
  displacement        a softmax of one layer, where No over Never raises Yes (arXiv 2410.08847), and where a 1% token
                      is pushed down (arXiv 2407.10490). Then a GPT, one pair at a time: does the CHES score tell which
                      chosen responses fall?
  over-optimisation   pairs that cover the good responses alone (arXiv 2406.02900), and the link of chi-PO (2407.13399)
  length              labels that prefer long sentences a little (arXiv 2403.19159), in the world of sentences.py
  accuracy            how many pairs are right by the likelihood, and by the margin alone (arXiv 2405.19534)

All distributions over responses are tables, also those of the GPTs: optimum.py lists what they can say. Numbers are in
nats and float64. An interval is Student's at 95%, over seeds. A seed draws world, reference, pairs and labels.
"""
import math
import os
import sys
import time

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'repro')]
import config                                                                   # noqa: E402
import pathologies_figure                                                       # noqa: E402
from nanodpo.losses import logistic, squared                                    # noqa: E402
from optimum import mean_reward, optimum, option_parser                         # noqa: E402
from pathologies_gpt import accuracy, displacement, over_optimisation           # noqa: E402
from sentences import lengths                                                   # noqa: E402
from sweep import write_json                                                    # noqa: E402

SHARES = 1 / 3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98         # of the pairs that are on the first comparison
BETAS = 0.1, 0.5, 1.0                                       # of two arms: DPO's beta, IPO's tau
WORDS = 'Yes', 'No', 'Never'
HEAD = torch.tensor([[1.0, 0.0], [-1.0, 0.2], [-1.5, 0.0]]).double()       # (3, 2) weights: No is near Never
START = torch.tensor([0.0, 1.0]).double()                   # the hidden state
CROWD = [0.60, 0.15, 0.10, 0.06, 0.04, 0.02, 0.01, 0.01, 0.01]             # the last one is pushed down


def rank_correlation(x, y):
    """Spearman's, of tensors (n,); the ranks of ties are averaged."""
    ranks = torch.stack([(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (x, y)])
    return torch.corrcoef(ranks.double())[0, 1].item()


def columns(rows):
    """Rows of curves as one record for each method and seed, its numbers in lists."""
    curves = {}
    for row in rows:
        curve = curves.setdefault((row['method'], row['seed']), dict(method=row['method'], seed=row['seed']))
        for key in row.keys() - curve.keys() | {key for key, value in curve.items() if isinstance(value, list)}:
            curve.setdefault(key, []).append(round(row[key], 5))
    return list(curves.values())


# ----------------------------------------------------------------------------------------------------
# misspecification

FIRST, SECOND = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])            # the three comparisons


def one_parameter(rho, features, theta):
    """The policy rho exp(theta feature) / Z, its log-probs. rho, features: (n, 3); theta: (..., n) -> (..., n, 3)."""
    return (rho + theta[..., None] * features).log_softmax(-1)


def expected_dpo(features, reward, shares, beta):
    """theta (n,) where DPO's expected loss is least: Bradley-Terry labels, shares (3,) of the pairs on each comparison.

    The loss is convex in theta, so its slope has one root.
    """
    d = features[:, FIRST] - features[:, SECOND]                                                # (n, 3)
    p = torch.sigmoid(reward[:, FIRST] - reward[:, SECOND])
    low = torch.full_like(reward[:, 0], -1e6)
    high = -low
    for _ in range(100):
        middle = (low + high) / 2
        slope = (shares * d * (torch.sigmoid(beta * middle[:, None] * d) - p)).sum(1)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return middle


def misspecification(worlds=3000, beta=0.5, seed=0):
    """-> a row for each share of the pairs, and the world where DPO lost most though the class had 0.1 to gain."""
    noise = torch.Generator().manual_seed(seed)
    features, reward, rho = torch.randn(3, worlds, 3, generator=noise, dtype=torch.float64)
    rho = rho.log_softmax(-1)
    before = (rho.exp() * reward).sum(-1)
    thetas = torch.linspace(-60, 60, 6001, dtype=torch.float64)[:, None]
    policies = one_parameter(rho, features, thetas)                                             # (6001, n, 3)
    rewards = (policies.exp() * reward).sum(-1)
    objective = rewards - beta * (policies.exp() * (policies - rho)).sum(-1)
    best = objective.argmax(0)                              # the RLHF objective of eq. 3, in the class
    best_gain = rewards[best, torch.arange(worlds)] - before
    rows = []
    for share in SHARES:
        shares = torch.tensor([share, (1 - share) / 2, (1 - share) / 2], dtype=torch.float64)
        theta = expected_dpo(features, reward, shares, beta)
        gain = (one_parameter(rho, features, theta).exp() * reward).sum(-1) - before
        rows.append(dict(share=share, below=(gain < 0).double().mean().item(), gain=gain.mean().item(),
                         clearly=((gain < -0.1) & (best_gain > 0.1)).double().mean().item(),
                         best_gain=best_gain.mean().item(), worst=gain.min().item()))
    i = torch.where(best_gain > 0.1, gain, torch.inf).argmin()
    near = (thetas.abs() <= 1.1 * max(theta[i].abs(), thetas[best[i]].abs()) + 1)[:, 0]
    worst = dict(features=features[i].tolist(), reward=reward[i].tolist(), rho=rho[i].exp().tolist(), beta=beta,
                 theta=theta[i].item(), gain=gain[i].item(), best_theta=thetas[best[i], 0].item(),
                 best_gain=best_gain[i].item(), star_gain=mean_reward(*(optimum(rho[i:i + 1], reward[i:i + 1], beta)[0],
                                                                        reward[i:i + 1])) - before[i].item())
    return rows, worst, (thetas[near, 0], (rewards[:, i] - before[i])[near])


# ----------------------------------------------------------------------------------------------------
# labels without noise, displacement and squeezing: gradient descent on a handful of logits

def two_arms(link, beta, steps, rate=0.1):
    """The first arm's log-odds after each step of gradient descent, from even odds: (steps + 1,)."""
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    odds = []
    for _ in range(steps + 1):
        logps = logits.log_softmax(-1)
        odds.append((logps[0, 0] - logps[0, 1]).item())
        ratios = logps + math.log(2)
        gradient, = torch.autograd.grad(link(ratios[:, 0], ratios[:, 1], beta).sum(), logits)
        logits.data -= rate * gradient
    return torch.tensor(odds, dtype=torch.float64)


def no_over_never(steps, beta=0.1, rate=10.0, head=HEAD):
    """Log-probs of WORDS after each step of DPO on the pair No over Never: (steps + 1, 3).

    Only the hidden state learns. head: (3, C); with the identity the softmax is a table of three free logits.
    """
    free = head is not HEAD
    state = (HEAD @ START if free else START).clone().requires_grad_()
    rho = (HEAD @ START).log_softmax(0)
    path = []
    for _ in range(steps + 1):
        logps = (head @ state).log_softmax(0)
        path.append(logps.detach())
        ratios = (logps - rho)[:, None]
        gradient, = torch.autograd.grad(logistic(ratios[1], ratios[2], beta).sum(), state)
        state.data -= rate * gradient
    return torch.stack(path)


def push_down(steps, rate=0.5):
    """Probabilities after each step of gradient descent on log p of the last of CROWD: (steps + 1, V)."""
    logits = torch.tensor(CROWD, dtype=torch.float64).log().requires_grad_()
    path = []
    for _ in range(steps + 1):
        logps = logits.log_softmax(0)
        path.append(logps.detach().exp())
        gradient, = torch.autograd.grad(logps[-1], logits)
        logits.data -= rate * gradient
    return torch.stack(path)


# ----------------------------------------------------------------------------------------------------
# all of it

def measure(options):
    """-> the report, {name: list of rows}, and what only the figure shows."""
    seeds = tqdm(range(1, options.seeds + 1), 'seeds', disable=None)
    report = {name: [] for name in ('misspecification', 'worst_world', 'labels', 'one_layer', 'displacement',
                                    'over_optimisation', 'length', 'length_at_level', 'length_of_pairs', 'accuracy')}
    report['misspecification'], worst, line = misspecification(options.worlds)
    report['worst_world'] = [worst]
    arms = {(name, beta): two_arms(link, beta, 10_000) for name, link in (('DPO', logistic), ('IPO', squared))
            for beta in BETAS}
    for (name, beta), odds in arms.items():
        limit = 1.0 if name == 'DPO' else 1 / (1 + math.exp(-0.5 / beta))
        reached = {f'step_{step}': odds[step].sigmoid().item() for step in (10, 100, 1000, 10_000)}
        report['labels'].append(dict(loss=name, beta=beta, optimum=limit, **reached))
    layers = {'pair': no_over_never(10).exp(), 'table': no_over_never(10, head=torch.eye(3).double()).exp(),
              'pushed': push_down(10)}
    report['one_layer'] = [dict(what=name, before=path[0].tolist(), after=path[-1].tolist())
                           for name, path in layers.items()]
    shown = {}
    for seed in seeds:
        chosen, rejected, scores = displacement(seed, options.pairs)
        report['displacement'].append(dict(
            seed=seed, pairs=len(chosen), displaced=(chosen < 0).double().mean().item(), chosen=chosen.mean().item(),
            rejected=rejected.mean().item(), **{name: rank_correlation(x, chosen) for name, x in scores.items()}))
        report['over_optimisation'] += columns(over_optimisation(seed))
        curves, at_level, of_pairs = lengths(seed)
        report['length'] += columns(curves)
        report['length_at_level'] += at_level
        report['length_of_pairs'].append(of_pairs)
        for beta in BETAS:
            row, pairs = accuracy(seed, beta)
            report['accuracy'].append(row)
            if seed == 1 and beta == 0.5:
                shown['pairs'] = pairs
        if seed == 1:
            shown['CHES'] = scores['CHES'], chosen
    return report, shown | dict(line=line, arms=arms, layers=layers)


def main(argv=None):
    parser = option_parser(__doc__)
    add = parser.add_argument
    add('--seeds', type=int, choices=range(2, 11), default=5, help='of the worlds with a GPT')
    add('--pairs', type=int, default=100, help='displacement: pairs a seed')
    add('--worlds', type=int, default=3000, help='misspecification')
    add('--out', default=os.path.join(ROOT, 'repro', 'results', 'pathologies'), help='writes OUT.md, .json and .png')
    options = parser.parse_args(argv)
    if not os.path.isdir(os.path.dirname(options.out) or '.'):
        parser.error(f'out={options.out}: no such folder')
    torch.set_num_threads(1)            # matrices are small, and sums in one order repeat to the last bit
    began = time.perf_counter()
    report, shown = measure(options)
    said = pathologies_figure.text(report)
    print(f'{said}\n{time.perf_counter() - began:.0f} s, {time.process_time():.0f} of them of one core')
    with open(options.out + '.md', 'w') as f:
        f.write(said)
    write_json(options.out + '.json', report)
    pathologies_figure.draw(report, shown, options.out + '.png')
    print(f'written: {options.out}.md, .json, .png')


if __name__ == '__main__':
    config.run(main)
