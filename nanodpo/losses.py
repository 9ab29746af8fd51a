"""The relatives of DPO, chosen by --loss=. A loss is a reward of each response, and a link from rewards to a loss.

To add one, write a function and a line in LOSSES. A new knob is a line in dpo.py's Config, too. Nothing else knows a
loss by its name, but for dpo. A function names what it needs as its arguments, of G groups with K responses each:

    a reward    logps, ref_logps        log p of each response, the policy's and the reference's, (G, K)
    a link      chosen, rejected, nll   the rewards of a pair's two responses, and -log p of the chosen, a token, (G,)
                ranking                 the rewards of a ranking, best response first, (G, K)
                responses, desirable, z the rewards of single responses, which are desirable, (G, K), and KTO's z
    both        tokens, means           the number of a response's tokens, and logps / tokens, (G, K)
                beta, gamma, ...        knobs
"""
import inspect
import math

import numpy as np
import torch
import torch.nn.functional as F

from config import need
from nanodpo.data import Sampled, batches


def wide(x):
    """x in float32, or wider if it is wider. None stays None."""
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


# --- rewards, (G, K); the log shows them times beta. A loss without `ref_logps` loads no reference ---

def ratio(logps, ref_logps):
    return logps - ref_logps


def mean_ratio(means, ref_logps, tokens):
    return means - ref_logps / tokens


def mean(means):
    return means


def odds(means):                # log p / (1 - p), p the geometric mean over tokens; p = 1 stays finite
    return means - torch.log(-torch.expm1(means.clamp(max=-torch.finfo(means.dtype).eps)))


def power(ratio, exponent):     # (pi / ref) ** exponent - 1 of log pi / ref, at most e ** 20: then its square is finite
    return torch.expm1((exponent * ratio).clamp(max=20))


# of an f-divergence the reward is f' of pi / ref; less a constant, which no link sees, it is 0 where they are equal

def forward_kl(logps, ref_logps):
    return -power(logps - ref_logps, -1)


def jensen_shannon(logps, ref_logps):
    return F.logsigmoid(logps - ref_logps) + math.log(2)


def alpha_divergence(logps, ref_logps, alpha):
    return -power(logps - ref_logps, -alpha) / alpha


# --- links: losses (G,). A link with `ranking` or `desirable` takes such data beside pairs --------

def logistic(chosen, rejected, beta):
    return -F.logsigmoid(beta * chosen - beta * rejected)


def smoothed(chosen, rejected, beta, label_smoothing):          # a share of the labels is wrong
    right, flipped = logistic(chosen, rejected, beta), logistic(rejected, chosen, beta)
    return (1 - label_smoothing) * right + label_smoothing * flipped


def unbiased(chosen, rejected, beta, label_smoothing):          # its mean over flipped labels is DPO's on right ones
    right, flipped = logistic(chosen, rejected, beta), logistic(rejected, chosen, beta)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def squared(chosen, rejected, beta):                            # the margin has a goal, 1 / (2 beta)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinged(chosen, rejected, beta):
    return F.relu(1 - (beta * chosen - beta * rejected))


def shifted(chosen, rejected, beta, gamma):                     # asks for a margin of gamma
    return -F.logsigmoid(beta * chosen - beta * rejected - gamma)


def chi_squared(chosen, rejected, beta):        # and reverse KL: f' is pi / ref + its log
    return -F.logsigmoid(beta * (chosen - rejected + (power(chosen, 1) - power(rejected, 1))))


def weighted(chosen, rejected, means, beta):    # pairs that the policy itself would write count more
    return means.detach().sum(1).exp() * logistic(chosen, rejected, beta)


def odds_ratio(chosen, rejected, nll, beta):                    # SFT on the chosen response, and beta times the odds
    return nll - beta * F.logsigmoid(chosen - rejected)


def apo_zero(chosen, rejected, beta):                           # raises the chosen response, lowers the rejected one
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen, rejected, beta):                           # lowers both, the rejected one more
    return torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected - beta * chosen)


def best_first(ranking, beta):                                  # each response against all that follow; of two, DPO
    r = beta * ranking
    return -sum(F.logsigmoid(r[:, k] - r[:, k + 1:].logsumexp(1)) for k in range(r.shape[1] - 1))


def each_alone(responses, desirable, z, beta, desirable_weight, undesirable_weight):    # each response against z
    r = beta * responses
    good = desirable_weight * torch.sigmoid(z - r)
    bad = undesirable_weight * torch.sigmoid(r - z)
    return torch.where(desirable, good, bad).mean(1)


LOSSES = {      # the reward, the link, what the link's knobs usually are                  and the source
    'dpo': (ratio, logistic, dict(beta=0.1)),                           # arXiv 2305.18290, eq. 7, as in dpo.py
    'cdpo': (ratio, smoothed, dict(beta=0.1, label_smoothing=0.1)),     # E. Mitchell's note on noisy preferences, 2023
    'robust': (ratio, unbiased, dict(beta=0.1, label_smoothing=0.1)),   # arXiv 2403.00409
    'ipo': (ratio, squared, dict(beta=0.1)),                            # arXiv 2310.12036, eq. 17; beta is tau
    'ipo_mean': (mean_ratio, squared, dict(beta=0.1)),                  # arXiv 2310.12036, of means as some peers do
    'hinge': (ratio, hinged, dict(beta=0.1)),                           # SLiC, arXiv 2305.10425, as in 2309.06657, RSO
    'dpo_norm': (mean_ratio, logistic, dict(beta=5.0)),                 # Tulu 3, arXiv 2411.15124, section 5
    'simpo': (mean, shifted, dict(beta=2.0, gamma=1.0)),                # arXiv 2405.14734
    'orpo': (odds, odds_ratio, dict(beta=0.1)),                         # arXiv 2403.07691; beta is lambda
    'apo_zero': (ratio, apo_zero, dict(beta=0.05)),                     # arXiv 2408.06266, eq. 7
    'apo_down': (ratio, apo_down, dict(beta=0.1)),                      # arXiv 2408.06266, eq. 8
    'forward_kl': (forward_kl, logistic, dict(beta=0.1)),               # arXiv 2309.16240, whose reverse KL is dpo
    'js_divergence': (jensen_shannon, logistic, dict(beta=0.1)),        # arXiv 2309.16240
    'alpha_divergence': (alpha_divergence, logistic, dict(beta=0.1, alpha=0.5)),    # arXiv 2309.16240
    'chi_po': (ratio, chi_squared, dict(beta=0.1)),                     # arXiv 2407.13399
    'wpo': (ratio, weighted, dict(beta=0.1)),                           # arXiv 2406.11827, eq. 2, without alignment
    'kto': (ratio, each_alone, dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)),   # arXiv 2402.01306
    'plackett_luce': (ratio, best_first, dict(beta=0.1)),               # arXiv 2305.18290, appendix A.3
}


# --- the loss of a batch, and what it needs: knobs, data, KTO's z ---------------------------------

def call(function, **known):
    """function(...), with those of `known` that it names as its arguments."""
    return function(**{name: known[name] for name in inspect.signature(function).parameters})


def relative_loss(cfg, logps, ref_logps, tokens, labels=None, z=None):
    """losses (G,), rewards (G, K), detached, of groups. labels: (G,) bool of unpaired examples, else None."""
    reward, link, _ = LOSSES[cfg.loss]
    logps = wide(logps)
    means = logps / tokens
    known = dict(vars(cfg), tokens=tokens, means=means)
    rewards = call(reward, logps=logps, ref_logps=wide(ref_logps), **known)
    desirable = torch.arange(logps.shape[1], device=logps.device) == 0 if labels is None else labels[:, None]
    losses = call(link, chosen=rewards[:, 0], rejected=rewards[:, -1], ranking=rewards, responses=rewards,
                  desirable=desirable, z=z, nll=-means[:, 0], **known)
    return losses, cfg.beta * rewards.detach()


def takes(function, argument):
    return argument in inspect.signature(function).parameters


def needs(loss, argument):
    """Whether the reward or the link of a loss takes `argument`: 'ref_logps', 'means', 'z', ..."""
    return any(takes(function, argument) for function in LOSSES[loss][:2])


def check(cfg, groups):
    """UserError if a knob is set that the loss does not use, or if the groups are not what it takes."""
    unused = {knob for *_, usual in LOSSES.values() for knob in usual} - LOSSES[cfg.loss][2].keys()
    if not needs(cfg.loss, 'ref_logps'):
        unused |= {'ref_from', 'precompute_ref'}
    if needs(cfg.loss, 'z'):        # it asks the reference about other pairs at every step
        unused.add('precompute_ref')
    for knob in sorted(unused):
        need(getattr(cfg, knob) == getattr(type(cfg), knob),
             f'{cfg.origin.get(knob)}: {knob} is of no use to loss={cfg.loss}: leave it out')
    kind, argument = {1: ('single responses', ''), 2: ('pairs', '')}.get(groups.K, ('rankings', 'ranking'))
    if groups.labels is not None:
        kind, argument = 'unpaired examples', 'desirable'
    takers = [loss for loss in LOSSES if kind == 'pairs' or needs(loss, argument)]
    need(cfg.loss in takers, f'{groups.folder} holds {kind}, for loss={" or ".join(takers) or "none"}, not {cfg.loss}')


def mismatched(groups, ids):
    """Each group's prompt with the responses of the next of `ids` that has another prompt: Sampled, or None."""
    members = [groups[i] for i in ids]
    strangers, responses = [], None
    for i in reversed(range(2 * len(members))):     # twice round, from behind: then each has heard of a partner
        here, after = members[i % len(members)], members[(i + 1) % len(members)]
        if not np.array_equal(here[0], after[0]):
            responses = after[1:]
        if i < len(members) and responses:
            room = groups.meta['max_length'] - max(map(len, responses))
            strangers.append([here[0][-room:], *responses])     # a long prompt loses its start
    return Sampled(strangers[::-1]) if strangers else None


@torch.no_grad()
def kto_z(cfg, run, score, policy, reference, groups, ids, row_tokens):
    """KTO's z: beta max(0, mean log pi - log ref) over mismatched pieces of the global batch, a scalar on all ranks."""
    total = torch.zeros((), dtype=run.exact, device=run.device)
    others = mismatched(groups, ids)
    if others is None:
        return total.float()
    with run.autocast:
        for batch in batches(others, np.arange(len(others)), run, max(row_tokens, int(others.lengths.max()))):
            total += (score(policy, batch) - score(reference, batch)).sum()
    return (cfg.beta * run.sum(total) / (len(others) * others.K)).clamp(min=0).float()
