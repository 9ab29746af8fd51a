"""The relatives of DPO, chosen by --loss=. A loss is a reward of each response, and a link from rewards to a loss.

To add one, write a function and a line in LOSSES; a new knob is a line in dpo.py's Config, too. Nothing else knows a
loss by its name. A function names what it needs as its arguments:

    a reward    logps, ref_logps        log p of each response, summed over its tokens: the policy's, the reference's
                tokens, means           the number of its tokens, and logps / tokens
    a link      chosen, rejected        the rewards of a pair's two responses, (G,)
                ranking                 the rewards of a ranking, best response first
                responses, desirable    the rewards of single responses, and which of them are desirable
                z                       KTO's z, a scalar: see kto_z
                nll                     -log p of the chosen response, a token, (G,)
                beta, gamma, ...        knobs

The shapes are (G, K) where nothing else is said, of G groups with K responses each. The arguments tell the rest: a loss
without `ref_logps` loads no reference, and a link with `ranking` or `desirable` takes such data beside pairs.
"""
import inspect

import numpy as np
import torch
import torch.nn.functional as F

from config import need
from nanodpo.data import Sampled, batches


def wide(x):
    """x in float32, or wider if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------------------------------
# rewards, (G, K); the log shows them times beta

def ratio(logps, ref_logps):
    return logps - ref_logps


def mean_ratio(means, ref_logps, tokens):
    return means - ref_logps / tokens


def mean(means):
    return means


def odds(means):
    """log p / (1 - p), p the geometric mean over tokens. p = 1 stays finite."""
    return means - torch.log(-torch.expm1(means.clamp(max=-torch.finfo(means.dtype).eps)))


# ----------------------------------------------------------------------------------------------------
# links: losses (G,)

def logistic(chosen, rejected, beta):
    """DPO, arXiv 2305.18290, eq. 7, as in dpo.py. On means over tokens it is Tulu 3's, arXiv 2411.15124, section 5."""
    return -F.logsigmoid(beta * chosen - beta * rejected)


def smoothed(chosen, rejected, beta, label_smoothing):
    """A share of the labels is wrong: E. Mitchell's note on DPO and noisy preferences, 2023."""
    right, flipped = logistic(chosen, rejected, beta), logistic(rejected, chosen, beta)
    return (1 - label_smoothing) * right + label_smoothing * flipped


def unbiased(chosen, rejected, beta, label_smoothing):
    """Its mean over flipped labels is DPO's loss on the right ones: arXiv 2403.00409."""
    right, flipped = logistic(chosen, rejected, beta), logistic(rejected, chosen, beta)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def squared(chosen, rejected, beta):
    """The margin has a goal, 1 / (2 beta): arXiv 2310.12036, eq. 17, where beta is tau. Some peers take token means."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinged(chosen, rejected, beta):
    """The hinge of SLiC, arXiv 2305.10425, on DPO's margin, as in RSO, arXiv 2309.06657."""
    return F.relu(1 - (beta * chosen - beta * rejected))


def shifted(chosen, rejected, beta, gamma):
    """Asks for a margin of gamma: SimPO, arXiv 2405.14734."""
    return -F.logsigmoid(beta * chosen - beta * rejected - gamma)


def odds_ratio(chosen, rejected, nll, beta):
    """SFT on the chosen response, and beta times the odds ratio: ORPO, arXiv 2403.07691, where beta is lambda."""
    return nll - beta * F.logsigmoid(chosen - rejected)


def apo_zero(chosen, rejected, beta):
    """Raises the chosen response and lowers the rejected one: arXiv 2408.06266, eq. 7."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen, rejected, beta):
    """Lowers both responses, the rejected one more: arXiv 2408.06266, eq. 8."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected - beta * chosen)


def best_first(ranking, beta):
    """Plackett-Luce: each response against all that follow, arXiv 2305.18290, appendix A.3. Of two it is DPO."""
    r = beta * ranking
    return -sum(F.logsigmoid(r[:, k] - r[:, k + 1:].logsumexp(1)) for k in range(r.shape[1] - 1))


def each_alone(responses, desirable, z, beta, desirable_weight, undesirable_weight):
    """Each response against z: KTO, arXiv 2402.01306."""
    r = beta * responses
    good = desirable_weight * torch.sigmoid(z - r)
    bad = undesirable_weight * torch.sigmoid(r - z)
    return torch.where(desirable, good, bad).mean(1)


LOSSES = {      # the reward, the link, and what the link's knobs usually are
    'dpo': (ratio, logistic, dict(beta=0.1)),
    'cdpo': (ratio, smoothed, dict(beta=0.1, label_smoothing=0.1)),
    'robust': (ratio, unbiased, dict(beta=0.1, label_smoothing=0.1)),
    'ipo': (ratio, squared, dict(beta=0.1)),
    'ipo_mean': (mean_ratio, squared, dict(beta=0.1)),
    'hinge': (ratio, hinged, dict(beta=0.1)),
    'dpo_norm': (mean_ratio, logistic, dict(beta=5.0)),
    'simpo': (mean, shifted, dict(beta=2.0, gamma=1.0)),
    'orpo': (odds, odds_ratio, dict(beta=0.1)),
    'apo_zero': (ratio, apo_zero, dict(beta=0.05)),
    'apo_down': (ratio, apo_down, dict(beta=0.1)),
    'kto': (ratio, each_alone, dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)),
    'plackett_luce': (ratio, best_first, dict(beta=0.1)),
}


# ----------------------------------------------------------------------------------------------------
# the loss of a batch

def call(function, **known):
    """function(...), with those of `known` that it names as its arguments."""
    return function(**{name: known[name] for name in inspect.signature(function).parameters})


def chosen_nll(logps, tokens, labels=None):
    """-log p of each group's first response, a token: (G,). 0 for an undesirable example."""
    nll = -logps[:, 0] / tokens[:, 0]
    return nll if labels is None else nll * labels


def relative_loss(cfg, logps, ref_logps, tokens, labels=None, z=None):
    """What cfg.loss makes of packed groups: losses (G,), rewards (G, K), detached, float32 or wider.

    logps, ref_logps (None without a reference), tokens: (G, K). labels: (G,) bool of unpaired examples, else None.
    """
    reward, link, _ = LOSSES[cfg.loss]
    logps = wide(logps)
    means = logps / tokens
    if ref_logps is not None:
        ref_logps = wide(ref_logps)
    rewards = call(reward, logps=logps, ref_logps=ref_logps, tokens=tokens, means=means)    # (G, K)
    desirable = torch.arange(logps.shape[1], device=logps.device) == 0                      # of a pair, the first one
    if labels is not None:
        desirable = labels[:, None]
    losses = call(link, chosen=rewards[:, 0], rejected=rewards[:, -1], ranking=rewards, responses=rewards,
                  desirable=desirable, z=z, nll=-means[:, 0], **vars(cfg))
    return losses, cfg.beta * rewards.detach()


# ----------------------------------------------------------------------------------------------------
# what a loss needs

def needs(loss, argument):
    """Whether the reward or the link of a loss takes `argument`: 'ref_logps', 'means', 'z', ..."""
    return any(argument in inspect.signature(function).parameters for function in LOSSES[loss][:2])


def kinds_of_data(loss):
    extra = {'rankings': 'ranking', 'unpaired examples': 'desirable'}
    return ['pairs'] + [kind for kind, argument in extra.items() if needs(loss, argument)]


def fill_in_usual_knobs(cfg):
    for knob, usual in LOSSES[cfg.loss][2].items():
        if getattr(cfg, knob) is None:
            setattr(cfg, knob, usual)


def check(cfg, groups):
    """UserError if a knob is set that is of no use to the loss, or if the groups are not what it takes."""
    unused = {knob for *_, usual in LOSSES.values() for knob in usual} - LOSSES[cfg.loss][2].keys()
    if not needs(cfg.loss, 'ref_logps'):
        unused |= {'ref_from', 'precompute_ref'}
    for knob in sorted(unused):
        value, default = getattr(cfg, knob), getattr(type(cfg), knob)
        need(value == default,
             f'{cfg.origin.get(knob)}: {knob}={value!r} is of no use to loss={cfg.loss}: leave it out')
    need(not (cfg.precompute_ref and needs(cfg.loss, 'z')), f'precompute_ref cannot serve loss={cfg.loss}: its z asks '
         'the reference about other pairs at every step')
    kind = {1: 'single responses', 2: 'pairs'}.get(groups.K, 'rankings')
    if groups.labels is not None:
        kind = 'unpaired examples'
    fitting = kinds_of_data(cfg.loss)
    takers = [f'--loss={loss}' for loss in LOSSES if kind in kinds_of_data(loss)]
    need(kind in fitting, f'{groups.folder} holds {f"rankings of {groups.K}" if kind == "rankings" else kind}, '
         f'loss={cfg.loss} needs {" or ".join(fitting)}{f": {takers[0]} takes them" if takers else ""}')


# ----------------------------------------------------------------------------------------------------
# KTO's z

def mismatched(groups, ids):
    """Each group's prompt with the responses of the next of `ids`, going round, that has another prompt: Sampled.

    None where there is only one prompt. A prompt is cut from the left where the two exceed max_length.
    """
    members = [groups[i] for i in ids]
    partners = [None] * len(members)
    for i in reversed(range(2 * len(members))):     # twice round, from behind: then each has heard of a partner
        here, after = i % len(members), (i + 1) % len(members)
        same = np.array_equal(members[here][0], members[after][0])
        partners[here] = partners[after] if same else after
    strangers = []
    for (prompt, *_), partner in zip(members, partners):
        if partner is not None:
            responses = members[partner][1:]
            room = groups.meta['max_length'] - max(map(len, responses))
            strangers.append([prompt[-room:], *responses])
    return Sampled(strangers) if strangers else None


@torch.no_grad()
def kto_z(cfg, run, ratios, groups, ids, row_tokens):
    """beta max(0, mean of log pi - log ref) over mismatched prompts and responses of the groups `ids`: a scalar.

    `ids` are the whole global batch, and the result is the same on all ranks. It estimates KL(pi, ref): biased, but
    steady (arXiv 2402.01306). ratios: Batch -> log pi - log ref, (G, K).
    """
    total = torch.zeros((), dtype=run.exact, device=run.device)
    others = mismatched(groups, ids)
    if others is None:
        return total.float()
    with run.autocast:
        for batch in batches(others, np.arange(len(others)), run, max(row_tokens, int(others.lengths.max()))):
            total += ratios(batch).sum()
    return (cfg.beta * run.sum(total) / (len(others) * others.K)).clamp(min=0).float()
