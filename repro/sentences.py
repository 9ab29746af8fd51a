"""Sentences of any length that can all be listed, and what labels that prefer length do to them: pathologies.py's part.

A sentence is SLOTS words of WORDS, up to LONGEST fillers, and the end token: N = WORDS**SLOTS rows of words, and
LONGEST + 1 lengths each. The reward is the sum of the words' weights, so length earns nothing. The policy is the GPT of
model.py with the tokens that no sentence has there masked out, so its probabilities of all sentences sum to 1. The
reference is fitted to a table: words by chance, each next one by the one before, and a geometric number of fillers.

A sentence's number is its row times LONGEST + 1, plus its fillers. Logs are natural, numbers are float64.
"""
import copy
import itertools
import math
import os
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import GPT, GPTConfig                    # noqa: E402
from nanodpo.losses import relative_loss            # noqa: E402

SLOTS, WORDS, LONGEST = 3, 4, 10
START, FILLER, END, FIRST = 0, 1, 2, 3          # ids; FIRST is the first word's
MORE = 0.75                                     # the table's probability of one filler more
LEVEL = 1.5                                                 # true reward at which lengths are compared
BIAS = 0.1                                                  # nats that a token earns in the labels, and not in truth
RELATIVES = {                                               # of the length panel: loss, knobs
    'DPO': dict(loss='dpo', beta=0.1), 'DPO, token means': dict(loss='dpo_norm', beta=1.0),
    'SimPO': dict(loss='simpo', beta=2.0, gamma=0.5), 'length-desensitised': dict(loss='dpo', beta=0.1, alpha=0.3)}


class Sentences:
    """reference: a frozen GPT; rho: (N, LONGEST + 1) its log-probs of all sentences; reward, lengths: the same shape.

    A length is the number of tokens, the end included.
    """

    def __init__(self, seed, width=32, steps=150):
        torch.manual_seed(seed)
        self.words = torch.tensor(list(itertools.product(range(WORDS), repeat=SLOTS)))                  # (N, SLOTS)
        start, fillers = (torch.full((len(self.words), n), id) for n, id in ((1, START), (LONGEST, FILLER)))
        self.tokens = torch.cat([start, FIRST + self.words, fillers], 1)                                # (N, T)
        T = self.tokens.shape[1]
        self.mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
        weights = torch.linspace(-1, 1, WORDS, dtype=torch.float64)
        self.reward = weights[self.words].sum(1, keepdim=True).expand(-1, LONGEST + 1)
        self.lengths = (SLOTS + 1 + torch.arange(LONGEST + 1)).expand(len(self.words), -1)
        first = torch.randn(WORDS, dtype=torch.float64).log_softmax(0)
        following = torch.randn(WORDS, WORDS, dtype=torch.float64).log_softmax(1)
        words = first[self.words[:, 0]] + following[self.words[:, :-1], self.words[:, 1:]].sum(1)
        self.table = words[:, None] + (math.log(MORE) * torch.arange(LONGEST + 1)).log_softmax(0)

        self.reference = GPT(GPTConfig(T, FIRST + WORDS, n_layer=2, n_head=2, n_embd=width)).double()
        optimizer = torch.optim.Adam(self.reference.parameters())
        for step in range(steps):
            optimizer.param_groups[0]['lr'] = 1e-2 * (1 - step / steps)
            optimizer.zero_grad()
            loss = -(self.table.exp() * self.logps(self.reference)[1]).sum()
            loss.backward()
            optimizer.step()
        self.reference.requires_grad_(False)
        self.prefix_rho, self.rho = self.logps(self.reference)

    def policy(self):
        """A trainable copy of the reference."""
        return copy.deepcopy(self.reference).requires_grad_(True)

    def states(self, policy, rows=slice(None)):
        """The hidden states that predict the tokens of these rows, the longest sentence of each: (n, T, C)."""
        tokens = self.tokens[rows]
        return policy(tokens, torch.arange(tokens.shape[1]).expand(len(tokens), -1), self.mask)

    def logps(self, policy, rows=slice(None)):
        """Of each row and each number of fillers: log p of the words and fillers, and of the whole sentence.

        -> two tables, (n, LONGEST + 1). Differentiable.
        """
        logits = F.linear(self.states(policy, rows), policy.wte.weight)                                 # (n, T, V)
        each = logits[:, :SLOTS, FIRST:].log_softmax(-1).gather(-1, self.words[rows][:, :, None])
        after = logits[:, SLOTS:, [FILLER, END]].log_softmax(-1)                # (n, LONGEST + 1, 2)
        more = F.pad(after[:, :-1, 0].cumsum(1), (1, 0))
        prefix = each.sum((1, 2))[:, None] + more
        return prefix, prefix + F.pad(after[:, :-1, 1], (0, 1))                 # after LONGEST fillers the end is sure

    def sums_of_states(self):
        """The reference's hidden states, summed over the tokens of each sentence: (N * (LONGEST + 1), C)."""
        return self.states(self.reference).cumsum(1)[:, SLOTS:].flatten(0, 1)

    def sample_pairs(self, n, bias, generator):
        """Pairs of two different sentences of rho, (chosen, rejected) numbers: at most n, (n, 2).

        The first is chosen with probability sigmoid(score of the first - of the second), the score being
        reward + bias * length: bias 0 is Bradley-Terry on the true reward.
        """
        y = torch.multinomial(self.rho.flatten().exp(), 2 * n, replacement=True, generator=generator).view(n, 2)
        score = (self.reward + bias * self.lengths).flatten()[y]
        turned = torch.rand(n, generator=generator, dtype=score.dtype) > torch.sigmoid(score[:, 0] - score[:, 1])
        y[turned] = y[turned].flip(1)
        return y[y[:, 0] != y[:, 1]]


def desensitised(prefix, total, lengths, pairs, alpha):
    """log p of both sides, (n, 2), where tokens beyond the shorter side's length count alpha: arXiv 2409.06411.

    prefix, total: of Sentences.logps; lengths: (N, LONGEST + 1); pairs: (n, 2).
    """
    whole, sizes = total.flatten()[pairs], lengths.flatten()[pairs]
    longer = sizes > sizes.min(1, keepdim=True).values
    row = pairs // (LONGEST + 1)
    kept = prefix[row, sizes.min(1, keepdim=True).values.expand(-1, 2).sub(SLOTS).clamp(max=LONGEST)]
    return torch.where(longer, alpha * whole + (1 - alpha) * kept, whole)


# ----------------------------------------------------------------------------------------------------
# length

def lengths(seed, n=3000, rate=1e-3, steps=50):
    """Full batches of Adam on pairs that prefer length. -> rows of reward, length and KL by method and step; of the
    pairs; and the lengths at LEVEL."""
    world = Sentences(seed)
    pairs = world.sample_pairs(n, BIAS, torch.Generator().manual_seed(seed))
    tokens = world.lengths.flatten()[pairs]                                                     # (n, 2)
    rows, at_level = [], []
    for name, knobs in RELATIVES.items():
        cfg = SimpleNamespace(**{'alpha': 1.0, **knobs})
        policy = world.policy()
        optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
        ref_logps = desensitised(world.prefix_rho, world.rho, world.lengths, pairs, cfg.alpha)
        curve = []
        for step in range(steps + 1):
            prefix, total = world.logps(policy)
            curve.append(dict(method=name, seed=seed, step=step, **world_means(world, total.detach())))
            logps = desensitised(prefix, total, world.lengths, pairs, cfg.alpha)
            optimizer.zero_grad()
            relative_loss(cfg, logps, ref_logps, tokens)[0].mean().backward()
            optimizer.step()
        rows += curve
        at_level.append(dict(method=name, seed=seed, length=crossing(curve)))
    for beta in torch.logspace(1.5, -1, 40).tolist():
        for name, bias in (('optimum', 0.0), ('optimum of the labels', BIAS)):
            scores = (world.rho + (world.reward + bias * world.lengths) / beta).flatten().log_softmax(0)
            rows.append(dict(method=name, seed=seed, step=beta, **world_means(world, scores.view_as(world.rho))))
    for name in ('optimum', 'optimum of the labels'):
        at_level.append(dict(method=name, seed=seed, length=crossing([r for r in rows if r['method'] == name])))
    sides = dict(zip(('chosen', 'rejected'), tokens.double().mean(0).tolist()))
    return rows, at_level, dict(seed=seed, reference=rows[0]['length'], **sides)


def world_means(world, logps):
    p = logps.exp()
    return dict(reward=(p * world.reward).sum().item(), length=(p * world.lengths).sum().item(),
                kl=(p * (logps - world.rho)).sum().item())


def crossing(curve):
    """The length where a curve's reward first passes LEVEL, on the line between two points; nan if it never does."""
    for a, b in zip(curve, curve[1:]):
        if a['reward'] < LEVEL <= b['reward']:
            return a['length'] + (LEVEL - a['reward']) / (b['reward'] - a['reward']) * (b['length'] - a['length'])
    return math.nan
