"""The relatives of DPO, chosen by --loss=. Each is a reward of a response and a link that turns rewards into a loss.

    reward          r(y), (G, K)                          who has it
    ratio           beta log pi(y) / ref(y)               dpo, cdpo, robust, hinge, ipo, kto, plackett_luce
    mean_ratio      the same, divided by y's tokens       dpo_norm, ipo_mean
    mean            beta log pi(y) / y's tokens           simpo: no reference
    odds            beta log p / (1 - p), p of a token    orpo: no reference

    link            of the margin m = r(chosen) - r(rejected); dpo's own is -log sigmoid(m), in dpo.py
    smoothed        cdpo    E. Mitchell's note on DPO and noisy preferences, 2023: a share eps of the labels is wrong
    unbiased        robust  arXiv 2403.00409: the mean over flipped labels is dpo's over the right ones
    squared         ipo     arXiv 2310.12036, eq. 17: the margin has a goal, 1 / (2 tau); tau is beta
    hinged          hinge   SLiC, arXiv 2305.10425, on dpo's margin as in RSO, arXiv 2309.06657
    shifted         simpo   arXiv 2405.14734: asks for a margin of gamma
    odds_ratio      orpo    arXiv 2403.07691: SFT on the chosen response, and lambda (beta) times the odds
    best_first      plackett_luce  arXiv 2305.18290, appendix A.3: a ranking of K responses; K = 2 is dpo
    each_alone      kto     arXiv 2402.01306: single responses, good or bad, against z (see kto_z)
"""
import numpy as np
import torch
import torch.nn.functional as F

from config import need
from nanodpo.data import Sampled, batches


# ----------------------------------------------------------------------------------------------------
# rewards: logps, ref_logps, tokens (G, K) -> (G, K)

def ratio(logps, ref_logps, tokens, beta):
    return beta * (logps - ref_logps)


def mean_ratio(logps, ref_logps, tokens, beta):
    return beta * (logps - ref_logps) / tokens


def mean(logps, ref_logps, tokens, beta):
    return beta * logps / tokens


def odds(logps, ref_logps, tokens, beta):
    p = logps / tokens
    return beta * (p - torch.log(-torch.expm1(p.clamp(max=-torch.finfo(p.dtype).eps))))     # p = 1 stays finite


# ----------------------------------------------------------------------------------------------------
# links: rewards (G, K), best response first -> losses (G,)

def logistic(r, cfg):
    return -F.logsigmoid(r[:, 0] - r[:, 1])


def smoothed(r, cfg):
    m, eps = r[:, 0] - r[:, 1], cfg.label_smoothing
    return -(1 - eps) * F.logsigmoid(m) - eps * F.logsigmoid(-m)


def unbiased(r, cfg):
    m, eps = r[:, 0] - r[:, 1], cfg.label_smoothing
    return (-(1 - eps) * F.logsigmoid(m) + eps * F.logsigmoid(-m)) / (1 - 2 * eps)


def squared(r, cfg):
    return ((r[:, 0] - r[:, 1]) / cfg.beta - 1 / (2 * cfg.beta)) ** 2


def hinged(r, cfg):
    return F.relu(1 - (r[:, 0] - r[:, 1]))


def shifted(r, cfg):
    return -F.logsigmoid(r[:, 0] - r[:, 1] - cfg.gamma)


def best_first(r, cfg):
    return -sum(F.logsigmoid(r[:, k] - r[:, k + 1:].logsumexp(1)) for k in range(r.shape[1] - 1))


def each_alone(r, cfg, desirable, z):
    good, bad = cfg.desirable_weight * torch.sigmoid(z - r), cfg.undesirable_weight * torch.sigmoid(r - z)
    return torch.where(desirable, good, bad).mean(1)


LOSSES = {      # the reward, the link, what the knobs usually are
    'dpo': (ratio, logistic, dict(beta=0.1)),           # as a pair of these; dpo.py has it in one function
    'cdpo': (ratio, smoothed, dict(beta=0.1, label_smoothing=0.1)),
    'robust': (ratio, unbiased, dict(beta=0.1, label_smoothing=0.1)),
    'ipo': (ratio, squared, dict(beta=0.1)),
    'ipo_mean': (mean_ratio, squared, dict(beta=0.1)),
    'hinge': (ratio, hinged, dict(beta=0.1)),
    'dpo_norm': (mean_ratio, logistic, dict(beta=5.0)),
    'simpo': (mean, shifted, dict(beta=2.0, gamma=1.0)),
    'orpo': (odds, logistic, dict(beta=0.1)),
    'kto': (ratio, each_alone, dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)),
    'plackett_luce': (ratio, best_first, dict(beta=0.1)),
}


def needs_reference(loss):
    return LOSSES[loss][0] not in (mean, odds)


def divides_by_tokens(loss):
    """Whether the loss takes a mean over tokens: its beta is then of another quantity than log(pi / ref)."""
    return loss in LOSSES and LOSSES[loss][0] is not ratio


def relative_loss(cfg, logps, ref_logps, tokens, labels=None, z=None):
    """losses (G,), rewards (G, K), detached, of packed groups. labels: (G,) of unpaired examples, or None."""
    reward, link, _ = LOSSES[cfg.loss]
    r = reward(logps.float(), ref_logps, tokens, cfg.beta)
    if link is each_alone:          # of a pair the first is desirable
        desirable = torch.arange(r.shape[1], device=r.device) == 0 if labels is None else labels[:, None]
        return each_alone(r, cfg, desirable, z), r.detach()
    if cfg.loss == 'orpo':
        return -logps[:, 0] / tokens[:, 0] + cfg.beta * link(r / cfg.beta, cfg), r.detach()
    return link(r, cfg), r.detach()


# ----------------------------------------------------------------------------------------------------
# what the knobs and the data must fit

def fill_in_usual_knobs(cfg):
    for knob, usual in LOSSES[cfg.loss][2].items():
        if getattr(cfg, knob) is None:
            setattr(cfg, knob, usual)


def check(cfg, groups):
    """UserError where a knob is of no use to the loss, or the data are of another kind than it takes."""
    own = LOSSES[cfg.loss][2].keys() | ({'precompute_ref', 'ref_from'} if needs_reference(cfg.loss) else set())
    own -= {'precompute_ref'} if cfg.loss == 'kto' else set()           # z asks the reference about other pairs
    for knob in ('label_smoothing', 'gamma', 'desirable_weight', 'undesirable_weight', 'precompute_ref', 'ref_from'):
        need(knob in own or knob not in cfg.origin, f'{knob} is of no use to loss={cfg.loss}: leave it out')
    kind = ('unpaired examples' if groups.labels is not None else
            {1: 'single responses', 2: 'pairs'}.get(groups.K, f'rankings of {groups.K}'))
    fits = {'kto': ('pairs', 'unpaired examples'), 'plackett_luce': ('pairs', f'rankings of {groups.K}')}
    need(kind in fits.get(cfg.loss, ('pairs',)), f'{groups.folder} holds {kind}, loss={cfg.loss} needs '
         f'{" or ".join(fits.get(cfg.loss, ("pairs",)))}')


# ----------------------------------------------------------------------------------------------------
# KTO's z

def mismatched(groups, ids):
    """Each group's prompt with the responses of the next of `ids`, going round, whose prompt is another: Sampled, or
    None where there is only one prompt. A prompt is cut from the left where the two exceed max_length."""
    some = [groups[i] for i in ids]
    n, partner, found = len(some), [None] * len(some), []
    for i in reversed(range(2 * n)):        # twice round, from behind, so that all have heard of a partner
        j = (i + 1) % n
        partner[i % n] = partner[j] if np.array_equal(some[i % n][0], some[j][0]) else j
    for (prompt, *_), j in zip(some, partner):
        if j is not None:
            responses = some[j][1:]
            found.append([prompt[-(groups.meta['max_length'] - max(map(len, responses))):], *responses])
    return Sampled(found) if found else None


@torch.no_grad()
def kto_z(cfg, run, ratios, groups, ids, row_tokens):
    """beta max(0, mean of log pi - log ref) over mismatched prompts and responses of the groups `ids`, the whole global
    batch: a scalar, the same on all ranks. An estimate of KL(pi, ref), biased but steady (arXiv 2402.01306)."""
    total, others = torch.zeros((), dtype=run.exact, device=run.device), mismatched(groups, ids)
    if others is None:
        return total.float()
    with run.autocast:
        for batch in batches(others, np.arange(len(others)), run, max(row_tokens, int(others.lengths.max()))):
            total += ratios(batch).sum()
    return (cfg.beta * run.sum(total) / (len(others) * others.K)).clamp(min=0).float()
