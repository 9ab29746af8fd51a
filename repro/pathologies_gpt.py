"""Three of DPO's failures in small GPTs whose completions can all be listed: parts of pathologies.py.

    displacement        DPO on one pair at a time: does log pi(w) fall, and what told so beforehand?
    over_optimisation   pairs that show the good completions alone, a curve over one pass
    accuracy            pairs that are right by their margin and wrong by likelihood

The worlds are those of optimum.py. Adam in float64. KL and rewards are sums over all completions.
"""
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanodpo.losses import logistic                                                         # noqa: E402
from optimum import World, label_weights, mean_kl, mean_reward, optimum, sample_pairs       # noqa: E402

BAD = -2.0          # the reward of completions that are not of the language


# ----------------------------------------------------------------------------------------------------
# displacement in a GPT

def summed_states(world):
    """The reference's hidden states, summed over the tokens of each completion of the one prompt: (M, C)."""
    states = world.reference(world.tokens, world.positions, world.mask[None, None])[0, 1:]
    total = states.new_zeros(1, states.shape[1])
    for step in states.split(world.sizes):
        total = (total + step).repeat_interleave(world.sizes[1], 0)         # a prefix's children stand together
    return total


def displacement(seed, pairs, steps=5, rate=1e-3, beta=0.1):
    """DPO's first steps on one pair at a time, of a random GPT.

    -> the change of log pi(w) and of log pi(l), (n,) each; what might tell the first beforehand, {name: (n,)}.
    """
    world = World(prompts=1, vocab=5, length=4, width=32, seed=seed)
    rho, states = world.rho[0], summed_states(world)
    _, w, l = sample_pairs(world.rho, world.reward, pairs, torch.Generator().manual_seed(seed))
    w, l = w[w != l], l[w != l]
    changes, slopes = [], []
    for pair in torch.stack([w, l], 1):
        policy = world.policy()
        optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
        for step in range(steps + 1):
            logps = world.logps(policy)[0, pair]
            if step == 0:
                sides = [torch.cat([g.flatten() for g in torch.autograd.grad(logp, [*policy.parameters()],
                         retain_graph=True, materialize_grads=True)]) for logp in logps]
                slopes.append(sides[0] @ sides[1] - sides[0] @ sides[0])
            if step == steps:
                break
            ratios = (logps - rho[pair])[:, None]
            optimizer.zero_grad()
            logistic(ratios[0], ratios[1], beta).sum().backward()
            optimizer.step()
        changes.append((logps - rho[pair]).detach())
    same = (world.completions[w] == world.completions[l]).sum(1)
    scores = {'CHES': (states[w] * states[l]).sum(1) - (states[w] ** 2).sum(1), 'gradients': torch.stack(slopes),
              'shared tokens': same, 'log rho(w)': rho[w]}
    return *torch.stack(changes).T, scores


# ----------------------------------------------------------------------------------------------------
# over-optimisation, and what accuracy hides: one pass over sampled pairs

def chi_po(chosen, rejected, beta, limit=8.0):
    """chi-PO's link, arXiv 2407.13399: phi(z) = z + log z of the ratio z = pi / ref in place of log z, clipped."""
    margin = beta * (chosen.exp() + chosen - rejected.exp() - rejected)
    return -F.logsigmoid(margin.clamp(-limit, limit))


def one_pass(world, pairs, link, beta, rate, batch_size=16):
    """One epoch of Adam on pairs (prompt, chosen, rejected), each (n,). Yields log-probs (P, M) before each step, and
    at the end."""
    policy = world.policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate, betas=(0.9, 0.99))
    for x, w, l in zip(*(part.split(batch_size) for part in pairs)):
        logps = world.logps(policy)
        yield logps.detach()
        ratios = logps - world.rho
        optimizer.zero_grad()
        link(ratios[x, w], ratios[x, l], beta).mean().backward()
        optimizer.step()
    yield world.logps(policy).detach()


def covered_world(seed, share=0.1, outside=0.02, steps=300):
    """A World whose reference has learned a language: it says `share` of all completions, and others with `outside`.

    The reward of the others is BAD. -> the world, and which completions are of the language, (P, M) bool.
    """
    world = World(prompts=2, vocab=5, length=4, width=32, seed=seed)
    noise = torch.Generator().manual_seed(seed + 7)
    said = torch.rand(world.rho.shape, generator=noise) < share
    scores = torch.randn(world.rho.shape, generator=noise, dtype=torch.float64)
    target = (1 - outside) * scores.masked_fill(~said, -torch.inf).softmax(-1)
    target += outside * ~said / (~said).sum(-1, keepdim=True)
    policy = world.policy()
    optimizer = torch.optim.Adam(policy.parameters())
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss = -(target * world.logps(policy)).sum(-1).mean()
        loss.backward()
        optimizer.step()
    world.reference = policy.requires_grad_(False)
    world.rho = world.logps(policy)
    world.reward = torch.where(said, world.reward, BAD)
    return world, said


def over_optimisation(seed, n=2000, rate=2e-4, every=4):
    """-> rows of the curves: reward, KL from the reference, mass on the language; of pi* and of methods by steps."""
    world, said = covered_world(seed)
    shown = world.rho.masked_fill(~said, -torch.inf).log_softmax(-1)
    x, w, l = sample_pairs(shown, world.reward, n, torch.Generator().manual_seed(seed))
    kept = w != l
    pairs = x[kept], w[kept], l[kept]
    rows = []
    for name, link, beta in (('DPO', logistic, 0.1), ('DPO, beta 1', logistic, 1.0), ('chi-PO', chi_po, 0.1)):
        for step, logps in enumerate(one_pass(world, pairs, link, beta, rate)):
            if step % every == 0:
                rows.append(dict(method=name, seed=seed, step=step, reward=mean_reward(logps, world.reward),
                                 kl=mean_kl(logps, world.rho), inside=mean_reward(logps, said)))
    star, _ = optimum(world.rho, world.reward, 0.1)
    rows.append(dict(method='optimum', seed=seed, step=0, reward=mean_reward(star, world.reward),
                     kl=mean_kl(star, world.rho), inside=mean_reward(star, said)))
    return rows


def accuracy(seed, beta, n=2000, rate=1e-3):
    """Of a random GPT after one pass: a row of shares of all pairs; of some, log rho(l)/rho(w), h, and pi*'s h.

    A pair is right by its margin if h > 0, and by likelihood if log pi(w) > log pi(l). Both sides are drawn from rho,
    equal ones left out, with Bradley-Terry labels.
    """
    world = World(prompts=1, vocab=5, length=4, width=32, seed=seed)
    noise = torch.Generator().manual_seed(seed)
    *_, logps = one_pass(world, sample_pairs(world.rho, world.reward, n, noise), logistic, beta, rate)
    star, _ = optimum(world.rho, world.reward, beta)
    rho = world.rho[0]
    gap = rho - rho[:, None]                                        # log rho(l)/rho(w), [w, l]
    weight = label_weights(world.rho, world.reward)[0].fill_diagonal_(0)
    row = dict(seed=seed, beta=beta, reference_likelihood=share_of(gap < 0, weight))
    for name, policy in (('dpo', logps[0]), ('optimum', star[0])):
        h = policy[:, None] - policy + gap
        row |= {f'{name}_margin': share_of(h > 0, weight), f'{name}_likelihood': share_of(h > gap, weight),
                f'{name}_hidden': share_of((h > 0) & (h <= gap), weight)}
    _, w, l = sample_pairs(world.rho, world.reward, 300, noise)
    return row, (gap[w, l], *(policy[w] - policy[l] + gap[w, l] for policy in (logps[0], star[0])))


def share_of(pairs, weight):
    return (weight * pairs).sum().item() / weight.sum().item()
