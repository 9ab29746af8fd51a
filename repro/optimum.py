"""The optimum, exactly: DPO, best-of-N, REINFORCE and PPO where every completion can be listed.

    python repro/optimum.py                                 # one CPU core; writes repro/results/optimum.json, .md and .png
    python repro/optimum.py --quick --out=optimum           # a smaller world, in seconds

P prompts of two tokens, a vocabulary of V, completions of a fixed length: M = V**length of them. The reference rho is a
small GPT of model.py with large random weights, far from uniform. The reward is drawn once: effects of a token at a
position, other ones for each prompt, and of adjacent tokens. So the optimum of the KL-constrained objective,
pi*(y|x) = rho(y|x) exp(r(x,y)/beta) / Z(x) (eq. 4 of arXiv 2305.18290), is a table, and so is its frontier of KL and reward.
Policies are the same GPT and start at the reference. In nats throughout; an average over x gives prompts equal weight.

  expected   DPO on the expected loss over all M**2 pairs, both drawn from rho, with Bradley-Terry labels on r (eq. 1).
             With labels on r itself and DPO's beta, the minimum has beta log(pi/rho) = r + constant(x): pi*_beta, for
             pairs from any distribution with full support. rho is the paper's choice. Adam, then L-BFGS
  sampled    DPO on n sampled pairs and labels. Every fifth pair is held out, the lowest loss there ends the run (early
             stopping: few pairs are separable, and the loss has no minimum). Identical pairs are one row with a count
  best-of-N  the exact distribution, from the cumulative distribution of r under rho
  REINFORCE  on the true reward less beta log(pi/rho), with a running mean a prompt as the baseline
  PPO        the same reward and baseline, clipped, several epochs a batch. A completion is one action, its ratio is that
             of the whole completion, and there is no value network: not the token-level PPO of RLHF codes
The distance to the optimum: with J = E[r] - beta KL(pi||rho) and J* = beta E_x[log Z], J* - J(pi) = beta KL(pi||pi*).
Learning rates were chosen by hand on seed 1337, with about as much care for each method.
"""
import argparse
import copy
import itertools
import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'repro')]
from dpo import dpo_loss                # noqa: E402
from model import GPT, GPTConfig        # noqa: E402
from scale import table                 # noqa: E402

BETAS = 0.1, 0.3, 1.0, 3.0
BETA = 1.0                              # of the sampled runs: DPO on n pairs, REINFORCE, PPO
BEST_OF = 1, 2, 4, 8, 16, 32, 64, 128
GAPS = 0.05, 0.01                       # J* - J, nats: what counts as close
CLIP, EPOCHS, BATCH = 0.2, 4, 250       # PPO's clip and epochs a batch; completions a batch, REINFORCE's too
FULL = dict(prompts=4, vocab=5, length=4, width=32, adam=300, lbfgs=200, pairs=(100, 300, 1000, 3000, 10000, 30000, 100000),
            steps=300, samples=100_000, seeds=3)
QUICK = dict(prompts=2, vocab=3, length=3, width=16, adam=150, lbfgs=100, pairs=(100, 1000, 10000), steps=100, samples=10_000, seeds=1)


# -----------------------------------------------------------------------------
# the world: all completions, their rewards, the reference

class World:
    """reference: a frozen GPT, float64; rho: (P, M) its log-probs; reward: (P, M), std 1 over all completions."""

    def __init__(self, prompts, vocab, length, width, seed):
        torch.manual_seed(seed)
        drawn = torch.randperm(vocab**2)[:prompts]                      # different ones: a policy cannot tell equal ones apart
        self.prompts = torch.stack([drawn // vocab, drawn % vocab], dim=1)                              # (P, 2)
        self.completions = torch.tensor(list(itertools.product(range(vocab), repeat=length)))           # (M, length)
        self.reference = GPT(GPTConfig(2 + length, vocab, n_layer=2, n_head=2, n_embd=width)).double().requires_grad_(False)
        for p in self.reference.parameters():
            if p.dim() == 2:
                p.mul_(6)                       # GPT-2's initialisation alone is close to uniform
        # one row a prompt, its nodes [prompt | all prefixes of a completion, short ones first]: each is computed once
        prefixes = [p for t in range(length) for p in itertools.product(range(vocab), repeat=t)]        # the first is ()
        extends = torch.tensor([[p[:len(q)] == q for q in prefixes] for p in prefixes])
        self.mask = F.pad(extends, (1, 0, 1, 0), value=True)            # a prefix sees its own prefixes, and the prompt
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
        reward = sum(token[:, t, y[:, t]] for t in range(length)) + sum(pair[t, y[:, t], y[:, t + 1]] for t in range(length - 1))
        self.reward = reward / reward.std()

    def logps(self, policy):
        """Log-probabilities of all completions, in the order of `completions`: (P, M), differentiable."""
        hidden = policy(self.tokens, self.positions, self.mask[None, None])[:, 1:]              # from the prompt's last token on
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
    terms = p.exp() * (p - q)
    return terms.nan_to_num().sum(-1).mean().item()             # 0 log 0 is 0: best-of-N


def mean_reward(p, reward):
    return (p.exp() * reward).sum(-1).mean().item()


def best_of(rho, reward, n):
    """Log-probs of the best of n draws from rho, (P, M): F(y)^n less F^n just below y, F the cumulative distribution of
    the reward under rho. Exact where no two completions of a prompt tie."""
    order = reward.argsort(dim=-1)
    cdf = rho.gather(-1, order).exp().cumsum(-1).clamp(max=1) ** n
    sorted_p = cdf.diff(dim=-1, prepend=torch.zeros_like(cdf[:, :1]))
    return torch.zeros_like(rho).scatter(-1, order, sorted_p).log()


# -----------------------------------------------------------------------------
# DPO

def expected_loss(logps, rho, weight, beta):
    """dpo_loss, averaged over prompts, pairs and labels. weight: (P, M, M), the probability that i is chosen over j."""
    losses, _, _ = dpo_loss(logps[:, :, None], logps[:, None], rho[:, :, None], rho[:, None], beta)     # (P, M, M)
    return (losses * weight).sum() / len(rho)


def label_weights(rho, reward):
    """P(y1, y2 from rho and i preferred to j): both orders of a pair are in it, so it sums to 1 a prompt. (P, M, M)"""
    return 2 * (rho[:, :, None] + rho[:, None] + F.logsigmoid(reward[:, :, None] - reward[:, None])).exp()


def fit_expected(world, reward, beta, adam, lbfgs, learning_rate=1e-2):
    """DPO on the expected loss. -> log-probs of the policy (P, M), and the loss above its minimum, which is pi*'s."""
    policy, weight = world.policy(), label_weights(world.rho, reward)
    bar = tqdm(total=adam + lbfgs, desc=f'expected loss, beta {beta:g}', leave=False)

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
    optimizer = torch.optim.LBFGS(policy.parameters(), max_iter=lbfgs, max_eval=lbfgs, history_size=50, tolerance_change=0,
                                  line_search_fn='strong_wolfe')
    optimizer.step(closure)
    bar.close()
    with torch.no_grad():
        logps = world.logps(policy)
        return logps, (expected_loss(logps, world.rho, weight, beta) - expected_loss(optimum(world.rho, reward, beta)[0],
                                                                                    world.rho, weight, beta)).item()


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


# -----------------------------------------------------------------------------
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
        returns = reward[x, y] - beta * (old - rho)[x, y]                       # (BATCH,) the KL penalty is in the reward
        means = torch.zeros(P).index_add(0, x, returns) / x.bincount(minlength=P)
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
