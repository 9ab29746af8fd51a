"""The losses: each against its formula in 100 digits, its limits, its extremes, and dpo.py with it end to end.
A new loss in LOSSES is tested without a line here. With a function in FORMULAS it is compared with that, too."""
import decimal
import gc
import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import dpo
from conftest import ROOT, random_groups, read_log, run_stage, small_gpt, write_data
from model import GPT
from nanodpo import checkpoint
from nanodpo.data import Groups, step_groups
from nanodpo.losses import LOSSES, call, needs, relative_loss
from test_exact import one_at_a_time
from test_train import DPO, last_checkpoint, losses, worst_difference


# --- the formulas as the papers print them, one example at a time, in 100 digits: no trick for stability is needed, and ---
# derivatives are quotients of differences. w, l: the policy's log-probs of chosen and rejected; u, v: the reference's;
# m, n: tokens; p, ref: the log-probs of all responses; r: their rewards; x: beta times the margin

Number, STEP = decimal.Decimal, decimal.Decimal('1e-30')


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def minus_log_sigmoid(x):
    return -sigmoid(x).ln()


def log_odds(p):
    return p - (1 - p.exp()).ln()


def power(p, ref, exponent):
    return min(Number(20).exp(), (exponent * (p - ref)).exp())


def kto(r, desirable, z, desirable_weight, undesirable_weight):
    terms = [desirable_weight * (1 - sigmoid(x - z)) if good else undesirable_weight * (1 - sigmoid(z - x))
             for x, good in zip(r, desirable)]
    return sum(terms) / len(terms)


RATIOS = 'forward_kl', 'js_divergence', 'alpha_divergence', 'chi_po'      # they take pi / ref, not its log alone
FORMULAS = {
    'dpo': lambda x: minus_log_sigmoid(x),
    'cdpo': lambda x, eps: (1 - eps) * minus_log_sigmoid(x) + eps * minus_log_sigmoid(-x),
    'robust': lambda x, eps: ((1 - eps) * minus_log_sigmoid(x) - eps * minus_log_sigmoid(-x)) / (1 - 2 * eps),
    'ipo': lambda w, l, u, v, beta: ((w - l) - (u - v) - 1 / (2 * beta)) ** 2,
    'ipo_mean': lambda w, l, u, v, m, n, beta: ((w / m - l / n) - (u / m - v / n) - 1 / (2 * beta)) ** 2,
    'hinge': lambda x: max(Number(0), 1 - x),
    'dpo_norm': lambda w, l, u, v, m, n, beta: minus_log_sigmoid(beta * ((w - u) / m - (l - v) / n)),
    'simpo': lambda w, l, m, n, beta, gamma: minus_log_sigmoid(beta / m * w - beta / n * l - gamma),
    'orpo': lambda w, l, m, n, beta: -w / m + beta * minus_log_sigmoid(log_odds(w / m) - log_odds(l / n)),
    'apo_zero': lambda w, l, u, v, beta: (1 - sigmoid(beta * (w - u))) + sigmoid(beta * (l - v)),
    'apo_down': lambda w, u, x, beta: sigmoid(beta * (w - u)) + (1 - sigmoid(x)),
    **dict.fromkeys(['forward_kl', 'js_divergence', 'alpha_divergence'], lambda r: minus_log_sigmoid(r[0] - r[1])),
    'chi_po': lambda w, l, u, v, x, beta: minus_log_sigmoid(x + beta * (power(w, u, 1) - power(l, v, 1))),
    'wpo': lambda x, weight: weight * minus_log_sigmoid(x),
    'kto': kto,
    'plackett_luce': lambda r: -sum((x.exp() / sum(y.exp() for y in r[k:])).ln() for k, x in enumerate(r))}
REWARDS = {         # of a response, before beta; of all others p - ref
    'ipo_mean': lambda p, ref, m: (p - ref) / m, 'dpo_norm': lambda p, ref, m: (p - ref) / m,
    'simpo': lambda p, m: p / m, 'orpo': lambda p, m: log_odds(p / m),
    'forward_kl': lambda p, ref: 1 - power(p, ref, -1),
    'js_divergence': lambda p, ref: (2 * (p - ref).exp() / (1 + (p - ref).exp())).ln(),
    'alpha_divergence': lambda p, ref, alpha: (1 - power(p, ref, -alpha)) / alpha}
OTHER_KNOBS = {         # beside the usual ones; of all others EXTREME
    'cdpo': [dict(beta=0.5, label_smoothing=0.0), dict(beta=0.03, label_smoothing=0.499)],
    'robust': [dict(beta=0.5, label_smoothing=0.0), dict(beta=0.03, label_smoothing=0.45)],
    'dpo_norm': [dict(beta=0.5), dict(beta=10.0)], 'simpo': [dict(beta=10.0, gamma=3.0), dict(beta=2.5, gamma=0.0)],
    'alpha_divergence': [dict(beta=0.5, alpha=1.0), dict(beta=0.03, alpha=0.1)],
    'kto': [dict(beta=0.5, desirable_weight=1.33, undesirable_weight=0.7),
            dict(beta=0.01, desirable_weight=0.0, undesirable_weight=2.0)]}
EXTREME = [dict(beta=0.01), dict(beta=2.0)]
EXACT = decimal.Context(prec=100, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)


def usual(name):
    return LOSSES[name][2]


def formula(name, policy, reference, tokens, desirable, z, weight, **knobs):
    """The loss and the rewards of one example: [loss, reward, ...], Numbers. weight: wpo's, a constant."""
    reward = REWARDS.get(name, lambda p, ref: p - ref)
    rewards = [knobs['beta'] * call(reward, p=p, ref=ref, m=m, **knobs)
               for p, ref, m in zip(policy, reference, tokens)]
    w, l, u, v = policy[0], policy[-1], reference[0], reference[-1]
    known = dict(w=w, l=l, u=u, v=v, m=tokens[0], n=tokens[-1], r=rewards, x=knobs['beta'] * ((w - l) - (u - v)),
                 eps=knobs.get('label_smoothing'), desirable=desirable, z=z, weight=weight, **knobs)
    return [call(FORMULAS[name], **known), *rewards]


def examples(logps, ref_logps=None, tokens=None, labels=None, z=0.0):
    """What a loss is given: logps, ref_logps, tokens, (N, K), and of KTO labels, (N,) or None, and z."""
    ref_logps = torch.zeros_like(logps) if ref_logps is None else ref_logps
    tokens = torch.ones_like(logps, dtype=torch.long) if tokens is None else tokens
    z = torch.tensor(z, dtype=logps.dtype)
    return SimpleNamespace(logps=logps, ref_logps=ref_logps, tokens=tokens, labels=labels, z=z)


def by_formula(name, given, knobs):
    """Losses (N,), rewards (N, K) and gradients (N, K), float64, an example at a time."""
    rows, slopes = [], []
    with decimal.localcontext(EXACT):
        knobs = {key: Number(value) for key, value in knobs.items()}
        for i, example in enumerate(zip(given.logps.tolist(), given.ref_logps.tolist(), given.tokens.tolist())):
            policy, reference, tokens = ([Number(x) for x in side] for side in example)
            desirable = [j == 0 for j in range(len(policy))] if given.labels is None else [bool(given.labels[i])]
            weight = (policy[0] / tokens[0]).exp() * (policy[-1] / tokens[-1]).exp()
            rest = reference, tokens, desirable, Number(given.z.item()), weight
            rows.append([float(x) for x in formula(name, policy, *rest, **knobs)])
            slopes.append([])
            for k in range(len(policy)):
                moved = [[x + step * (j == k) for j, x in enumerate(policy)] for step in (STEP, -STEP)]
                up, down = (formula(name, values, *rest, **knobs)[0] for values in moved)
                slopes[-1].append(float((up - down) / (2 * STEP)))
    rows = torch.tensor(rows, dtype=torch.float64)
    return rows[:, 0], rows[:, 1:], torch.tensor(slopes, dtype=torch.float64)


def by_autograd(name, given, knobs):
    """The same from nanodpo/losses.py and autograd, in its types."""
    logps = given.logps.clone().requires_grad_()
    cfg = SimpleNamespace(loss=name, **knobs)
    values, rewards = relative_loss(cfg, logps, given.ref_logps, given.tokens, given.labels, given.z)
    assert not rewards.requires_grad, 'rewards are detached'
    return values.detach(), rewards, torch.autograd.grad(values.sum(), logps)[0]


def random_examples(kind='pairs', size=40, dtype=torch.float64):
    """Log-probs of -1 to -300 nats, as many small as large."""
    torch.manual_seed(0)
    K = {'pairs': 2, 'rankings': 5, 'unpaired examples': 1}[kind]
    logps, ref_logps = -torch.exp(torch.rand(2, size, K, dtype=torch.float64) * math.log(300)).to(dtype)
    labels = torch.rand(size) < 0.5 if K == 1 else None
    return examples(logps, ref_logps, torch.randint(1, 101, (size, K)), labels, z=1.7)


def assert_equal(ours, exact, rtol=0, atol=0):
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


def kinds_of_data(name):
    extra = {'rankings': 'ranking', 'unpaired examples': 'desirable'}
    return ['pairs'] + [kind for kind, argument in extra.items() if needs(name, argument)]


LOSS_AND_KIND = [(name, kind) for name in LOSSES for kind in kinds_of_data(name)]


# --- values, gradients, limits, extremes ----------------------------------------------------------

@pytest.mark.parametrize('name, kind', [pair for pair in LOSS_AND_KIND if pair[0] in FORMULAS])
def test_values_rewards_and_gradients_equal_the_formula_in_100_digits(name, kind):
    """float64 rounds a difference of log-probs of 300 nats to 1e-13, times beta or the slope of orpo's odds, up to
    300: 1e-10 leaves room for both. ipo's squares reach 1e6 and are held to 1e-10 of their size. A ratio of e^20
    magnifies the rounding as much, so those losses get ratios of up to e^10 here, and larger ones below."""
    for knobs in (usual(name), *OTHER_KNOBS.get(name, EXTREME)):
        given = random_examples(kind)
        if name in RATIOS:
            given.logps = given.ref_logps + 3 * torch.randn_like(given.logps)
        ours, exact = by_autograd(name, given, knobs), by_formula(name, given, knobs)
        assert all(x.dtype == torch.float64 for x in ours)
        assert_equal(ours, exact, 1e-10, 1e-10)
        assert exact[2].abs().sum() > 0.01, 'not all of them saturated'


@pytest.mark.parametrize('name, kind', [pair for pair in LOSS_AND_KIND if pair[0] != 'wpo'])     # its weight is fixed
def test_gradients_equal_differences_of_the_loss_itself(name, kind):
    given = random_examples(kind, 6)
    given.logps = given.ref_logps * (1 + 0.1 * torch.rand_like(given.logps))     # near the reference nothing is flat
    cfg = SimpleNamespace(loss=name, **usual(name))
    assert torch.autograd.gradcheck(
        lambda logps: relative_loss(cfg, logps, given.ref_logps, given.tokens, given.labels, given.z)[0],
        given.logps.requires_grad_())
    assert by_autograd(name, given, usual(name))[2].abs().sum() > 1e-3


@pytest.mark.parametrize('name, kind', LOSS_AND_KIND)
def test_losses_of_bfloat16_log_probs_are_float32_and_no_sum_is_taken_in_bfloat16(name, kind):
    given = random_examples(kind, dtype=torch.bfloat16)
    given.z = given.z.float()
    values, rewards, _ = by_autograd(name, given, usual(name))
    assert values.dtype == rewards.dtype == torch.float32
    given.logps, given.ref_logps = given.logps.double(), given.ref_logps.double()
    assert_equal((values, rewards), by_autograd(name, given, usual(name))[:2], 1e-3, 1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_dpo_loss_is_the_ratio_and_the_logistic_link_to_the_bit(dtype):
    given = random_examples(size=500)
    policy, reference = given.logps.to(dtype).requires_grad_(), given.ref_logps.to(dtype)
    values, *rewards = dpo.dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], 0.1)
    assert not any(reward.requires_grad for reward in rewards)
    assert {x.dtype for x in (values, *rewards)} == {torch.promote_types(dtype, torch.float32)}
    if dtype != torch.bfloat16:         # of those dpo_loss takes the difference before it widens
        gradient = torch.autograd.grad(values.sum(), policy)[0]
        given.logps, given.ref_logps = policy.detach(), reference
        assert_equal(by_autograd('dpo', given, dict(beta=0.1)), (values, torch.stack(rewards, 1), gradient))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name, twin', [('cdpo', 'dpo'), ('robust', 'dpo'), ('plackett_luce', 'dpo'),
                                        ('dpo_norm', 'dpo'), ('ipo_mean', 'ipo')])
def test_of_right_labels_two_responses_and_single_tokens_a_loss_is_its_twin_to_the_bit(name, twin, dtype):
    given = random_examples(size=500, dtype=dtype)
    given.tokens = torch.ones_like(given.tokens)
    knobs = dict(beta=0.1, label_smoothing=0.0)
    assert_equal(by_autograd(name, given, knobs), by_autograd(twin, given, knobs))


def test_robust_s_mean_over_flipped_labels_is_dpo_on_the_true_ones():
    given = random_examples(size=200)
    flipped = examples(given.logps.flip(1), given.ref_logps.flip(1))
    for beta, eps in ((0.1, 0.1), (0.5, 0.3), (0.02, 0.45)):
        right, wrong = (by_autograd('robust', g, dict(beta=beta, label_smoothing=eps))[0] for g in (given, flipped))
        expected = by_autograd('dpo', given, dict(beta=beta))[0]
        torch.testing.assert_close((1 - eps) * right + eps * wrong, expected, rtol=1e-12, atol=1e-11)


def test_cdpo_is_least_where_the_model_s_doubt_is_the_labels():
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    given = examples(torch.stack([x, torch.zeros_like(x)], 1))
    for eps in (0.05, 0.2, 0.4):
        values = by_autograd('cdpo', given, dict(beta=1.0, label_smoothing=eps))[0]
        assert torch.sigmoid(x[values.argmin()]).item() == pytest.approx(1 - eps, abs=1e-4)


@pytest.mark.parametrize('tau', [0.05, 0.1, 1.0])
@pytest.mark.parametrize('name, m, n', [('ipo', 1, 1), ('ipo_mean', 4, 7)])
def test_ipo_is_least_where_the_margin_is_1_over_2_tau(name, m, n, tau):
    """The margin of sums, or of means over tokens: all of the loss within 20 nats of it, and the gradient there."""
    goal = 1 / (2 * tau)
    h = goal + torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    u, v, l = (torch.full_like(h, x) for x in (-20.0, -31.0, -17.0))
    given = examples(torch.stack([u + m * (h + (l - v) / n), l], 1), torch.stack([u, v], 1),
                     torch.tensor([m, n]).expand(len(h), 2))
    values, _, slopes = by_autograd(name, given, dict(beta=tau))
    slope = slopes[:, 0]
    assert h[values.argmin()].item() == pytest.approx(goal, abs=1e-3) and values.min() < 1e-20
    assert slope[20_000].abs() < 1e-10 and slope[:20_000].max() < 0 < slope[20_001:].min()


def test_kto_is_half_its_weight_at_the_reference_and_saturates_far_from_z():
    given = random_examples('unpaired examples', 6)
    given.ref_logps, given.labels = given.logps, torch.tensor([True, False] * 3)
    knobs = dict(beta=0.1, desirable_weight=1.3, undesirable_weight=0.7)
    for z, good, bad in ((0.0, 0.65, 0.35), (1e6, 1.3, 0.0), (-1e6, 0.0, 0.7)):
        given.z = torch.tensor(z, dtype=torch.float64)
        values, rewards, _ = by_autograd('kto', given, knobs)
        assert values.tolist() == pytest.approx([good, bad] * 3) and not rewards.any()


def test_apo_is_1_at_the_reference_and_what_each_side_is_pushed_to():
    """apo_zero raises the chosen side and lowers the rejected one; apo_down lowers both, the rejected one more."""
    given = examples(torch.zeros(1, 2, dtype=torch.float64))
    for name, up in (('apo_zero', [-1, 1]), ('apo_down', [0, 1])):
        values, _, slopes = by_autograd(name, given, dict(beta=0.4))
        assert values.tolist() == [1.0] and slopes[0].tolist() == pytest.approx([0.1 * s for s in up])


DIVERGENCES = {       # f(u) of u = pi / ref, as the papers print it: the divergence is the reference's mean of f
    'dpo': lambda u: u * u.log(),
    'forward_kl': lambda u: -u.log(),
    'js_divergence': lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    'alpha_divergence': lambda u: (u ** (1 - 0.3) - (1 - 0.3) * u - 0.3) / (0.3 * (0.3 - 1)),
    'chi_po': lambda u: (u - 1) ** 2 / 2 + u * u.log()}


def best_policy(loss):
    """log p (M,) of the policy whose loss(logps) is least: Newton steps on its logits, in float64."""
    logits = torch.zeros(len(REWARD), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], 1, 500, tolerance_grad=1e-12, tolerance_change=0,
                                  line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value
    optimizer.step(closure)
    assert logits.grad.abs().max() < 1e-8
    return logits.detach().log_softmax(0)


REWARD = torch.tensor([1.0, -0.5, 0.3, 0.0, -1.2], dtype=torch.float64)
RHO = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1], dtype=torch.float64).log()


@pytest.mark.parametrize('beta', [0.3, 1.0])
@pytest.mark.parametrize('name', DIVERGENCES)
def test_the_best_policy_of_a_loss_is_that_of_the_reward_less_beta_times_its_divergence(name, beta):
    """All pairs of five responses with Bradley-Terry labels, against E[reward] - beta E_ref[f(pi / ref)]."""
    cfg = SimpleNamespace(loss=name, beta=beta, alpha=0.3)
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).t()
    share = RHO[i].exp() * RHO[j].exp() * torch.sigmoid(REWARD[i] - REWARD[j])

    def expected_loss(logps):
        pairs = torch.stack([i, j], 1)
        return (share * relative_loss(cfg, logps[pairs], RHO[pairs], torch.ones_like(pairs))[0]).sum()

    def best_of(f):
        return best_policy(lambda logps: beta * RHO.exp() @ f((logps - RHO).exp()) - logps.exp() @ REWARD)
    found = best_policy(expected_loss)
    for other, f in DIVERGENCES.items():        # each divergence has a best policy of its own
        assert ((found - best_of(f)).abs().max() < 1e-5) == (other == name), other


def test_alpha_divergence_goes_from_dpo_to_forward_kl():
    given = random_examples(size=200)
    given.logps = given.ref_logps + 3 * torch.randn_like(given.ref_logps)
    for alpha, twin, tolerance in ((1e-7, 'dpo', 1e-5), (1.0, 'forward_kl', 0)):
        assert_equal(by_autograd('alpha_divergence', given, dict(beta=0.1, alpha=alpha)),
                     by_autograd(twin, given, dict(beta=0.1)), tolerance, tolerance)


def test_wpo_is_dpo_times_how_likely_the_policy_finds_both_responses_a_token():
    given = random_examples(size=200)
    given.logps = given.tokens * torch.empty_like(given.logps).uniform_(-3, -0.01)
    weight = torch.exp(given.logps[:, 0] / given.tokens[:, 0]) * torch.exp(given.logps[:, 1] / given.tokens[:, 1])
    values, rewards, gradients = by_autograd('dpo', given, dict(beta=0.1))
    expected = weight * values, rewards, weight[:, None] * gradients
    assert_equal(by_autograd('wpo', given, dict(beta=0.1)), expected, 1e-12)
    assert weight.min() < 0.1 and 0.5 < weight.max() < 1


@pytest.mark.parametrize('name', RATIOS)
def test_step_0_of_another_divergence_is_ln_2_with_rewards_0_and_powers_of_ratios_stop_at_e_to_the_20(name):
    ratios = torch.tensor([[0, 0], [-300, 0], [-1e4, 0], [0, 300], [0, 1e4]])
    values, rewards, slopes = by_autograd(name, examples(ratios), usual(name))
    assert values[0] == pytest.approx(math.log(2)) and rewards[0].tolist() == [0, 0]
    slope = usual(name)['beta'] / 2 * {'js_divergence': 0.5, 'chi_po': 2}.get(name, 1)         # by f'' at 1
    assert slopes[0].tolist() == pytest.approx([-slope, slope])
    assert all(values[1:] > math.log(2)) and values.max() <= 0.1 * (2 * math.exp(20) + 1e4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', LOSSES)
def test_losses_are_finite_and_right_for_log_probs_down_to_minus_ten_thousand(name, dtype):
    """Every sign and size of both differences. What is subtracted reaches 1e4, so the argument of the loss is off by
    eps times beta times 1e4, a few times over; ipo squares it, where the size of the result allows for as much."""
    values = torch.cartesian_prod(*[torch.tensor([-1e4, -1e2, -1.0, -0.5])] * 4).to(dtype)           # (256, 4)
    w, l, u, v = values.unbind(1)
    pairs = torch.stack([w, l], 1), torch.stack([u, v], 1)
    cases = [examples(*pairs), examples(*pairs, torch.tensor([64, 3]).expand(256, 2), z=500.0)]
    if 'rankings' in kinds_of_data(name):
        cases.append(examples(torch.stack([w, l, v], 1), torch.stack([u, v, l], 1)))
    if 'unpaired examples' in kinds_of_data(name):
        cases += [examples(w[:, None], u[:, None], labels=torch.full((256,), good), z=z)
                  for good in (True, False) for z in (0.0, 500.0)]
    eps, knobs = torch.finfo(dtype).eps, usual(name)
    for given in cases:
        ours = by_autograd(name, given, knobs)
        assert all(x.isfinite().all() for x in ours)
        if name in FORMULAS:
            assert_equal(ours, by_formula(name, given, knobs), 1e3 * eps, 8 * eps * max(1, knobs['beta']) * 1e4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_orpo_is_finite_and_right_as_p_goes_to_1(dtype):
    """Down to a mean of exactly 0, whose true odds are infinite; right wherever the type can tell it from 0."""
    means = torch.tensor([-1.0, -1e-3, -1e-4, -1e-6, -1e-8, -1e-10, -1e-12, -1e-30, 0.0], dtype=dtype)
    pairs = torch.cartesian_prod(means, means)
    eps, knobs = torch.finfo(dtype).eps, dict(beta=0.1)
    given = examples(8 * pairs, tokens=torch.full(pairs.shape, 8))
    assert all(x.isfinite().all() for x in by_autograd('orpo', given, knobs))
    told = (pairs < -eps).all(1)
    assert told.sum() >= 16
    given = examples(8 * pairs[told], tokens=given.tokens[told])
    assert_equal(by_autograd('orpo', given, knobs), by_formula('orpo', given, knobs), 1e3 * eps, 1e2 * eps)


def test_dpo_loss_stays_under_20_lines_before_the_plumbing_and_every_loss_names_its_source():
    text = inspect.getsource(dpo)
    assert len(inspect.getsource(dpo.dpo_loss).splitlines()) < 20
    assert text[:text.index('def dpo_loss')].count('\n') < 60
    assert text.index('def dpo_loss') < text.index('class Config')
    table = (ROOT / 'nanodpo' / 'losses.py').read_text()
    for name in LOSSES:
        assert re.search(rf"^    '{name}': .*# .*(arXiv \d{{4}}\.\d{{5}}|E\. Mitchell's note)", table, re.M), name


def test_a_loss_of_one_s_own_is_a_function_and_a_line(monkeypatch):
    """One that asks for the reference, the lengths, nll and a knob by their names."""
    def per_token(logps, ref_logps, tokens):
        return (logps - ref_logps) / tokens

    def exponential(chosen, rejected, nll, beta):
        return torch.exp(-beta * (chosen - rejected)) + nll
    monkeypatch.setitem(LOSSES, 'mine', (per_token, exponential, dict(beta=0.7)))
    given = random_examples()
    values, rewards, _ = by_autograd('mine', given, dict(beta=0.7))
    means = (given.logps - given.ref_logps) / given.tokens
    expected = torch.exp(-0.7 * (means[:, 0] - means[:, 1])) - given.logps[:, 0] / given.tokens[:, 0]
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(rewards, 0.7 * means)
    assert kinds_of_data('mine') == ['pairs']


# --- dpo.py end to end ----------------------------------------------------------------------------

def write_models(**models):
    for name, model in models.items():
        checkpoint.save(f'out/{name}', 1, model, dict(config={}, optimizer={}, vocabulary=None))


def make_workplace():
    """All kinds of data, 48 + 10 groups each, and two models, out/policy and out/other."""
    for kind, K in (('pairs', 2), ('rankings', 3), ('unpaired', 1)):
        rng = np.random.default_rng(0)
        splits = {'train': random_groups(48, K, rng), 'val': random_groups(10, K, rng)}
        labels = {split: rng.random(len(groups)) < 0.6 for split, groups in splits.items()}
        write_data(f'data/{kind}', splits, labels=labels if kind == 'unpaired' else {})
    write_models(policy=small_gpt(seed=0), other=small_gpt(seed=1))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_workplace()


RUN = [*DPO, '--init_from=out/policy', '--eval_interval=0', '--save_interval=0']
RUNS = {f'{name}, {kind}': (kind.removesuffix(' examples'), [f'--loss={name}']) for name, kind in LOSS_AND_KIND}
RUNS['dpo with nll'] = 'pairs', ['--nll_coef=0.5', '--ref_from=out/other']
TWO = '''
import os, sys
sys.path.insert(0, {root!r})
import dpo
for i, (folder, flags) in enumerate({runs!r}):
    dpo.main([*{flags!r}, f'--name={{folder}}', *flags])
    if os.environ['RANK'] == '0':
        os.rename(f'out/{{folder}}/dpo', f'out/two-{{i}}')
'''


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """A directory in which every one of RUNS was made by two processes, out/two-0 and so on, under one torchrun."""
    folder = tmp_path_factory.mktemp('two')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_workplace()
        Path('two.py').write_text(TWO.format(root=str(ROOT), runs=list(RUNS.values()), flags=RUN))
        done = run_stage(folder / 'two.py', processes=2)
        assert done.stdout.count('on cpu, processes: 2') == len(RUNS)
    return folder


@pytest.mark.parametrize('run', RUNS)
def test_processes_and_row_length_change_nothing_but_rounding_for_any_loss(two, monkeypatch, run):
    """The bounds of test_train's test of dpo: 1e-5 on losses, of their size where they are larger than 1, and a
    twentieth of a step's largest move on weights."""
    monkeypatch.chdir(two)
    name, flags = RUNS[run]
    flags, folder = [*RUN, f'--name={name}', *flags], f'out/{name}/dpo'
    dpo.main(flags)
    expected, weights = losses(folder), last_checkpoint(folder)['model']
    dpo.main([*flags, '--row_tokens=128'])
    for how, folder in (('short rows', folder), ('two processes', f'out/two-{list(RUNS).index(run)}')):
        assert losses(folder) == pytest.approx(expected, abs=1e-5, rel=1e-5), how
        worst, where = worst_difference(last_checkpoint(folder)['model'], weights)
        assert worst < 5e-5, (how, where, worst)
    assert worst_difference(weights, small_gpt().state_dict())[0] > 1e-3, 'the run moved the weights'


def read_groups(folder, split, ids=None):
    groups = Groups(folder, split)
    return [[list(map(int, piece)) for piece in groups[i]] for i in (range(len(groups)) if ids is None else ids)]


@pytest.mark.parametrize('name', [name for name in FORMULAS if name != 'kto'])
def test_the_logged_loss_is_the_formula_of_one_at_a_time_log_probs(workplace, name):
    """Before the first step, on all of val, with knobs that are not the usual ones, another model as reference where
    the loss has one, and with nll_coef, which adds that much of the chosen responses' NLL per token."""
    kind = 'rankings' if name == 'plackett_luce' else 'pairs'
    knobs = {key: 0.3 * value for key, value in usual(name).items()}
    data = read_groups(f'data/{kind}', 'val')
    with torch.no_grad():
        logps, ref = (one_at_a_time(small_gpt(seed=seed), data).double() for seed in (0, 1))
    tokens = torch.tensor([[len(piece) for piece in group[1:]] for group in data])
    given = examples(logps, ref, tokens)
    values, rewards, _ = by_formula(name, given, knobs)
    nll = (-logps / tokens)[:, 0].mean().item()
    flags = [f'--{key}={value}' for key, value in knobs.items()]
    flags += [] if name in ('simpo', 'orpo') else ['--ref_from=out/other']
    for nll_coef in (0.0, 0.4):
        dpo.main([*RUN, *flags, f'--name={kind}', f'--loss={name}', f'--nll_coef={nll_coef}', '--max_steps=1'])
        first = read_log(f'out/{kind}/dpo')[0]
        assert first['eval/loss'] == pytest.approx(values.mean().item() + nll_coef * nll, rel=1e-5)
    ordered = [row[i] > row[j] for row in rewards.tolist() for j in range(len(row)) for i in range(j)]
    logged = [first[f'eval/rewards/{key}'] for key in ('chosen', 'rejected', 'margins', 'accuracies')]
    chosen, rejected = rewards[:, 0].mean().item(), rewards[:, 1:].mean().item()
    assert logged == pytest.approx([chosen, rejected, chosen - rejected, np.mean(ordered)], rel=1e-4, abs=1e-4)
    ranked = [row[i] > row[j] for row in logps.tolist() for j in range(len(row)) for i in range(j)]
    assert first['eval/logps/accuracies'] == pytest.approx(np.mean(ranked), abs=1e-6)


@pytest.mark.parametrize('K', [2, 4])
def test_raw_accuracy_counts_pairs_whose_better_response_is_likelier_and_a_tie_one_half(K):
    torch.manual_seed(0)
    rewards, logps = torch.randint(0, 4, (2, 30, K)).float()
    logged = dpo.means(dpo.batch_stats(torch.zeros(30), rewards, logps))
    for values, name in ((rewards, 'rewards'), (logps, 'logps')):
        points = [1.0 if row[i] > row[j] else 0.5 if row[i] == row[j] else 0.0
                  for row in values.tolist() for j in range(K) for i in range(j)]
        assert logged[f'{name}/accuracies'] == pytest.approx(np.mean(points)) and 0.5 in points
    assert logged['logps/accuracies'] != pytest.approx(logged['rewards/accuracies'])


def test_the_log_has_raw_accuracy_beside_acc_of_pairs_and_rankings_and_none_of_unpaired_examples(workplace, capsys):
    for kind, loss in (('pairs', 'dpo'), ('pairs', 'kto'), ('rankings', 'plackett_luce'), ('unpaired', 'kto')):
        dpo.main([*RUN, f'--name={kind}', f'--loss={loss}', '--max_steps=2'])
        lines = [line for line in capsys.readouterr().out.splitlines() if ' | acc ' in line]
        log = read_log(f'out/{kind}/dpo')
        assert len(lines) == len(log) == 4
        for line, record in zip(lines, log):
            shown = re.search(r' acc ([\d.]+) \| raw acc ([\d.]+) \|', line)
            keys = [key for key in record if key.endswith('accuracies')]
            prefix = 'eval/' if line.startswith('eval') else ''
            names = ['rewards/accuracies'] if kind == 'unpaired' else ['rewards/accuracies', 'logps/accuracies']
            assert keys == [prefix + name for name in names]
            assert (shown is None) == (kind == 'unpaired')
            assert shown is None or [*shown.groups()] == [f'{record[key]:.3f}' for key in keys]


def z_by_hand(policy, reference, data, beta, max_length):
    """KTO's z of a step's groups, in its order: each prompt with the responses of the next group of another prompt."""
    foreign = []
    for i, (prompt, *_) in enumerate(data):
        partners = [responses for other, *responses in data[i:] + data[:i] if other != prompt]
        if partners:
            room = max_length - max(map(len, partners[0]))
            foreign.append([prompt[max(0, len(prompt) - room):], *partners[0]])
    if not foreign:
        return torch.zeros(()), torch.zeros(())
    ratio = (one_at_a_time(policy, foreign) - one_at_a_time(reference, foreign)).mean()
    return beta * ratio.clamp(min=0), beta * ratio


def kto_data(kind):
    """8 + 3 groups, long prompts before short responses and the other way round, so that strangers exceed 24 tokens
    together; three of them have one prompt, or all."""
    rng, K = np.random.default_rng(3), 1 if kind == 'unpaired' else 2

    def piece(n):
        return [int(t) for t in rng.integers(0, 256, n)]

    def group(i):
        prompt = [7] * 6 if kind == 'one prompt' or i in (1, 2, 5) else piece(16 if i % 2 else 5)
        return [prompt, *([*piece(rng.integers(2, 6 if len(prompt) > 6 else 17)), 256] for _ in range(K))]
    splits = {'train': [group(i) for i in range(8)], 'val': [group(i) for i in range(3)]}
    labels = {'train': [True, True, False, True, False, False, True, True], 'val': [False, True, True]}
    labels = labels if kind == 'unpaired' else {}
    write_data('data/kto', splits, 24, labels)
    return labels


@pytest.mark.parametrize('clamped', [False, True])
@pytest.mark.parametrize('kind', ['pairs', 'unpaired', 'one prompt'])
def test_kto_s_loss_z_and_gradient_are_those_of_one_at_a_time_log_probs(tmp_path, monkeypatch, kind, clamped):
    """z from mismatched prompts and responses alone, of the whole batch, clamped at 0 (where policy and reference
    change places), 0 where there is only one prompt, and without a gradient: the logged losses, step 1's gradient norm,
    and rewards. nll_coef counts desirable responses alone."""
    monkeypatch.chdir(tmp_path)
    labels, beta, weights, nll_coef = kto_data(kind), 0.05, (1.2, 0.8), 0.01
    models = [small_gpt(seed=2, spread=0.3), small_gpt()][::-1 if clamped else 1]   # the flatter finds bytes likelier
    write_models(policy=models[0], other=models[1])
    dpo.main([*RUN, '--name=kto', '--loss=kto', '--ref_from=out/other', f'--beta={beta}', '--desirable_weight=1.2',
              '--undesirable_weight=0.8', f'--nll_coef={nll_coef}', '--max_steps=1', '--grad_clip=0',
              '--row_tokens=64'])
    first, step, _ = read_log('out/kto/dpo')
    train_ids = step_groups(8, 8, 0, 1337)
    for split, ids, logged in (('val', range(3), first['eval/loss']), ('train', train_ids, step['loss'])):
        data = read_groups('data/kto', split, ids)
        z, free = z_by_hand(*models, data, beta, 24)
        logps, ref = one_at_a_time(models[0], data), one_at_a_time(models[1], data).detach()
        good = torch.tensor([[labels[split][i]] for i in ids] if labels else [[True, False]] * len(data))
        signs, rewards = torch.where(good, 1.0, -1.0), beta * (logps - ref)
        nll = -logps[:, 0] / torch.tensor([len(group[1]) for group in data]) * good[:, 0]

        def loss(z):
            values = torch.where(good, *weights) * (1 - torch.sigmoid(signs * (rewards - z)))
            return values.mean() + nll_coef * nll.mean()
        assert logged == pytest.approx(loss(z).item(), rel=1e-5)
        if kind != 'one prompt':
            assert (free < 0) == (z == 0) == clamped and abs(loss(0.0) - loss(free)) > 1e-3, 'z matters here'
    parameters = list(models[0].parameters())

    def norm(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)]).norm().item()
    assert step['grad_norm'] == pytest.approx(norm(loss(z.item())), rel=1e-4)
    assert z == 0 or norm(loss(z)) != pytest.approx(norm(loss(z.item())), rel=1e-2), 'a gradient through z would show'
    right = signs * (rewards - z) > 0 if kind == 'unpaired' else rewards[:, 0] > rewards[:, 1]
    logged = [step[f'rewards/{key}'] for key in ('chosen', 'rejected', 'accuracies')]
    expected = [rewards[good].mean().item(), rewards[~good].mean().item(), right.double().mean().item()]
    assert logged == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize('name, models', [('dpo', 2), ('simpo', 1), ('orpo', 1)])
def test_a_loss_without_a_reference_holds_one_model_and_may_have_unused_knobs_at_their_defaults(
        workplace, monkeypatch, name, models):
    gc.collect()
    before = sum(type(x) is GPT for x in gc.get_objects())
    alive, scored = [], dpo.response_logps

    def counted(*arguments):
        if not alive:
            gc.collect()
            alive.append(sum(type(x) is GPT for x in gc.get_objects()) - before)
        return scored(*arguments)
    monkeypatch.setattr(dpo, 'response_logps', counted)
    dpo.main([*RUN, '--name=pairs', f'--loss={name}', '--precompute_ref=False', '--ref_from=', '--max_steps=1'])
    assert alive == [models]


# --- knobs and data -------------------------------------------------------------------------------

def error_of(*flags):
    """The one line that dpo.py ends with."""
    with pytest.raises(config.UserError) as error:
        dpo.main(list(flags))
    assert '\n' not in error.value.message
    return error.value.message


KNOBS = {knob for name in LOSSES for knob in usual(name)} - {'beta'}
FOREIGN = [(name, knob, 0.25) for name in LOSSES for knob in sorted(KNOBS - usual(name).keys())]
FOREIGN += [(name, *item) for name in ('simpo', 'orpo') for item in (('precompute_ref', True), ('ref_from', 'other'))]


@pytest.mark.parametrize('name, knob, value', [*FOREIGN, ('kto', 'precompute_ref', True)])
def test_a_knob_that_the_loss_does_not_use_is_an_error_that_names_it_and_its_file(experiment, name, knob, value):
    Path('mine.py').write_text(f"name = 'tiny'\ndpo = dict(loss={name!r}, {knob}={value!r})\n")
    assert error_of('mine.py') == f'mine.py: {knob} is of no use to loss={name}: leave it out'


@pytest.mark.parametrize('name', LOSSES)
def test_knobs_that_are_not_set_are_the_loss_s_usual_ones_and_help_names_the_loss(name):
    cfg = config.load(dpo.Config, 'dpo', ['--name=tiny', f'--loss={name}'])
    assert {knob: getattr(cfg, knob) for knob in usual(name)} == usual(name)
    assert all(getattr(cfg, knob) is None for knob in KNOBS - usual(name).keys())
    assert config.load(dpo.Config, 'dpo', ['--name=tiny', f'--loss={name}', '--beta=7']).beta == 7
    assert repr(name) in config.help_text(dpo.Config, 'dpo')


def test_the_usual_knobs_are_those_of_the_papers():
    noisy = dict(beta=0.1, label_smoothing=0.1)
    assert {name: usual(name) for name in FORMULAS if usual(name) != dict(beta=0.1)} == dict(
        dpo_norm=dict(beta=5), simpo=dict(beta=2, gamma=1), apo_zero=dict(beta=0.05), cdpo=noisy, robust=noisy,
        alpha_divergence=dict(beta=0.1, alpha=0.5), kto=dict(beta=0.1, desirable_weight=1, undesirable_weight=1))


@pytest.mark.parametrize('name, kind, takers', [
    ('dpo', 'rankings', 'plackett_luce'), ('ipo_mean', 'rankings', 'plackett_luce'),
    ('kto', 'rankings', 'plackett_luce'), ('dpo', 'unpaired examples', 'kto'),
    ('plackett_luce', 'unpaired examples', 'kto'), ('kto', 'single responses', 'none')])
def test_data_that_do_not_fit_the_loss_are_an_error(workplace, name, kind, takers):
    folder = kind.partition(' ')[0]
    if folder == 'single':
        write_data('data/single', {split: random_groups(4, 1, np.random.default_rng(0)) for split in ('train', 'val')})
    message = error_of(*RUN, f'--name={folder}', f'--loss={name}')
    assert message == f'data/{folder} holds {kind}, for loss={takers}, not {name}'


# --- the reference --------------------------------------------------------------------------------

def test_step_0_is_ln_2_against_a_copy_and_not_against_another_reference(workplace):
    first = []
    for flags in ([], ['--ref_from=out/policy'], ['--ref_from=out/other']):
        dpo.main([*RUN, '--name=pairs', '--max_steps=1', *flags])
        first.append(read_log('out/pairs/dpo')[0]['eval/loss'])
    assert first[:2] == pytest.approx([math.log(2)] * 2, abs=1e-6) and abs(first[2] - math.log(2)) > 0.1


def test_resume_refuses_another_reference(workplace):
    dpo.main([*RUN, '--name=pairs', '--max_steps=2', '--ref_from=out/other'])
    flags = [*RUN, '--name=pairs', '--max_steps=4', '--resume']
    for others in ([], ['--ref_from=out/policy']):
        assert re.search('cannot resume .*changed since', error_of(*flags, *others))
    dpo.main([*flags, '--ref_from=out/other'])
    assert last_checkpoint('out/pairs/dpo')['step'] == 4


@pytest.mark.parametrize('name, kind', [('dpo', 'pairs'), ('plackett_luce', 'rankings')])
def test_a_reference_of_its_own_is_cached_apart_from_the_policy_s(workplace, capsys, name, kind):
    flags = [*RUN, f'--name={kind}', f'--loss={name}', '--max_steps=5']
    dpo.main([*flags, '--precompute_ref'])                                  # a cache of the policy's own copy
    dpo.main([*flags, '--ref_from=out/other'])
    live = losses(f'out/{kind}/dpo')
    capsys.readouterr()
    for says in ('computing', 'equal to live ones'):
        dpo.main([*flags, '--ref_from=out/other', '--precompute_ref'])
        assert capsys.readouterr().out.count(says) == 2
        assert losses(f'out/{kind}/dpo') == pytest.approx(live, abs=1e-5, rel=1e-5)
