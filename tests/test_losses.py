"""The family of losses: each against its formula in 100 digits, its limits, its extremes, and dpo.py with it end to end."""
import decimal
import gc
import inspect
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import dpo
import prepare_prefs
from conftest import ROOT, random_groups, read_log, run_stage, small_gpt, write_data
from model import GPT, save_checkpoint
from prepare_prefs import Groups, step_groups
from test_exact import one_at_a_time
from test_train import DPO, last_checkpoint, losses, worst_difference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -----------------------------------------------------------------------------
# the formulas as the papers print them, one example at a time, in 100 digits: no trick for stability is needed, and
# derivatives are quotients of differences. w, l: the policy's log-probs of chosen and rejected; u, v: the reference's;
# m, n: tokens. -> loss, reward of w, reward of l

Number, STEP = decimal.Decimal, decimal.Decimal('1e-30')


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def minus_log_sigmoid(x):
    return -sigmoid(x).ln()


def log_odds(p):
    return p - (1 - p.exp()).ln()


def dpo_formula(w, l, u, v, beta):
    return minus_log_sigmoid(beta * ((w - l) - (u - v))), beta * (w - u), beta * (l - v)


def cdpo_formula(w, l, u, v, beta, eps):
    x = beta * ((w - l) - (u - v))
    return (1 - eps) * minus_log_sigmoid(x) + eps * minus_log_sigmoid(-x), beta * (w - u), beta * (l - v)


def robust_formula(w, l, u, v, beta, eps):
    x = beta * ((w - l) - (u - v))
    return ((1 - eps) * minus_log_sigmoid(x) - eps * minus_log_sigmoid(-x)) / (1 - 2 * eps), beta * (w - u), beta * (l - v)


def ipo_formula(w, l, u, v, tau):
    return ((w - l) - (u - v) - 1 / (2 * tau)) ** 2, tau * (w - u), tau * (l - v)


def ipo_mean_formula(w, l, u, v, m, n, tau):
    return ((w / m - l / n) - (u / m - v / n) - 1 / (2 * tau)) ** 2, tau * (w - u) / m, tau * (l - v) / n


def hinge_formula(w, l, u, v, beta):
    return max(Number(0), 1 - beta * ((w - l) - (u - v))), beta * (w - u), beta * (l - v)


def dpo_norm_formula(w, l, u, v, m, n, beta):
    return minus_log_sigmoid(beta * ((w - u) / m - (l - v) / n)), beta * (w - u) / m, beta * (l - v) / n


def simpo_formula(w, l, m, n, beta, gamma):
    return minus_log_sigmoid(beta / m * w - beta / n * l - gamma), beta * w / m, beta * l / n


def orpo_formula(w, l, m, n, lam):
    ratio = log_odds(w / m) - log_odds(l / n)
    return -w / m + lam * minus_log_sigmoid(ratio), lam * log_odds(w / m), lam * log_odds(l / n)


def kto_formula(p, ref, desirable, z, beta, desirable_weight, undesirable_weight):
    reward = beta * (p - ref)
    loss = desirable_weight * (1 - sigmoid(reward - z)) if desirable else undesirable_weight * (1 - sigmoid(z - reward))
    return loss, reward


def plackett_luce_formula(p, ref, beta):
    rewards = [beta * (a - b) for a, b in zip(p, ref)]
    return -sum((r.exp() / sum(s.exp() for s in rewards[k:])).ln() for k, r in enumerate(rewards)), rewards


FORMULAS = {name[:-8]: f for name, f in globals().items() if name.endswith('_formula')}
KNOBS = {       # several settings of each loss's own knobs, the usual one first
    'dpo': [(0.1,), (0.01,), (2.0,)], 'cdpo': [(0.1, 0.1), (0.5, 0.0), (0.03, 0.5)],
    'robust': [(0.1, 0.1), (0.5, 0.0), (0.03, 0.45)], 'ipo': [(0.1,), (0.01,), (1.0,)], 'ipo_mean': [(0.1,), (0.01,), (1.0,)], 'hinge': [(0.1,), (0.003,), (1.0,)],
    'dpo_norm': [(5.0,), (0.5,), (10.0,)], 'simpo': [(2.0, 1.0), (10.0, 3.0), (2.5, 0.0)], 'orpo': [(0.1,), (1.0,), (0.01,)],
    'kto': [(0.1, 1.0, 1.0), (0.5, 1.33, 0.7), (0.01, 0.0, 2.0)], 'plackett_luce': [(0.1,), (0.01,), (2.0,)]}
PAIRWISE = [name for name in FORMULAS if name not in ('kto', 'plackett_luce')]


def takes(name):
    """Which of w, l, u, v, m, n a pairwise loss has."""
    return [key for key in 'wluvmn' if key in inspect.signature(FORMULAS[name]).parameters]


def numbers(x):
    return [numbers(y) for y in x] if isinstance(x, list) else x if isinstance(x, bool) else Number(x)


def by_formula(name, tensors, knobs, policy):
    """[losses, *rewards] and gradients with respect to the first `policy` tensors, float64, an example at a time."""
    formula, rows, gradients = FORMULAS[name], [], []
    size = len(tensors[0])
    with decimal.localcontext(decimal.Context(prec=100)):
        knobs = numbers(list(knobs))
        for example in zip(*(t.tolist() if t.dim() else [t.item()] * size for t in tensors)):
            example = numbers(list(example))
            rows.append([float(x) if isinstance(x, Number) else [float(y) for y in x] for x in formula(*example, *knobs)])

            def slope(i, k=None):
                values = []
                for step in (STEP, -STEP):
                    moved = example[i] + step if k is None else [x + step * (j == k) for j, x in enumerate(example[i])]
                    values.append(formula(*example[:i], moved, *example[i + 1:], *knobs)[0])
                return float((values[0] - values[1]) / (2 * STEP))
            gradients.append([slope(i) if isinstance(example[i], Number) else [slope(i, k) for k in range(len(example[i]))]
                              for i in range(policy)])
    return [[torch.tensor(x, dtype=torch.float64) for x in zip(*found)] for found in (rows, gradients)]


def by_dpo(name, tensors, knobs, policy):
    """The same from dpo.py and autograd, in its types."""
    tensors = [t.clone().requires_grad_() if i < policy else t for i, t in enumerate(tensors)]
    out = getattr(dpo, f'{name}_loss')(*tensors, *knobs)
    assert not any(reward.requires_grad for reward in out[1:]), 'rewards are detached'
    return list(out), torch.autograd.grad(out[0].sum(), tensors[:policy])


def random_logps(*shape):
    """-1 to -300 nats, as many small as large."""
    return -torch.exp(torch.rand(*shape, dtype=torch.float64) * math.log(300))


def random_arguments(name, size=40):
    """What the loss takes before its knobs, and how many of it are the policy's."""
    if name == 'kto':
        return [random_logps(size), random_logps(size), torch.rand(size) < 0.5, torch.tensor(1.7, dtype=torch.float64)], 1
    if name == 'plackett_luce':
        return [random_logps(size, 5), random_logps(size, 5)], 1
    values = {key: random_logps(size) for key in 'wluv'} | {key: torch.randint(1, 101, (size,)) for key in 'mn'}
    return [values[key] for key in takes(name)], 2


def assert_equal(ours, exact, rtol, atol):
    for a, b in zip((*ours[0], *ours[1]), (*exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=rtol, atol=atol)


# -----------------------------------------------------------------------------
# values, gradients, limits, extremes

@pytest.mark.parametrize('name', FORMULAS)
def test_values_rewards_and_gradients_equal_the_formula_in_100_digits(name):
    """float64 rounds a difference of log-probs of 300 nats to 1e-13, times beta or the slope of orpo's odds, up to 300 at one
    token of -0.003 nats a token: 1e-10 leaves room for both. ipo's squares reach 1e6 and are held to 1e-10 of their size."""
    for knobs in KNOBS[name]:
        tensors, policy = random_arguments(name)
        ours, exact = by_dpo(name, tensors, knobs, policy), by_formula(name, tensors, knobs, policy)
        assert all(x.dtype == torch.float64 for x in (*ours[0], *ours[1]))
        assert_equal(ours, exact, 1e-10, 1e-10)
        assert sum(g.abs().sum() for g in exact[1]) > 0.01, 'not all of them saturated'


@pytest.mark.parametrize('name', FORMULAS)
def test_losses_of_bfloat16_log_probs_are_float32(name):
    tensors, policy = random_arguments(name)
    tensors = [t.bfloat16() if t.is_floating_point() and t.dim() else t.float() if t.is_floating_point() else t for t in tensors]
    assert {x.dtype for x in by_dpo(name, tensors, KNOBS[name][0], policy)[0]} == {torch.float32}


@pytest.mark.parametrize('name', ['cdpo', 'robust'])
def test_cdpo_and_robust_without_flipped_labels_are_dpo_to_the_bit(name):
    pair = [random_logps(200) for _ in range(4)]
    ours, dpos = by_dpo(name, pair, (0.1, 0.0), 2), by_dpo('dpo', pair, (0.1,), 2)
    assert all(torch.equal(a, b) for a, b in zip((*ours[0], *ours[1]), (*dpos[0], *dpos[1]), strict=True))


def test_a_ranking_of_two_is_dpo_to_the_bit():
    for dtype in (torch.float32, torch.float64):
        w, l, u, v = (random_logps(500).to(dtype) for _ in range(4))
        (ranked, rewards), [gradient] = by_dpo('plackett_luce', [torch.stack([w, l], 1), torch.stack([u, v], 1)], (0.1,), 1)
        (paired, chosen, rejected), gradients = by_dpo('dpo', [w, l, u, v], (0.1,), 2)
        assert torch.equal(ranked, paired) and torch.equal(rewards, torch.stack([chosen, rejected], 1))
        assert torch.equal(gradient, torch.stack(gradients, 1))


def test_robust_s_mean_over_flipped_labels_is_dpo_on_the_true_ones():
    w, l, u, v = (random_logps(200) for _ in range(4))
    for beta, eps in ((0.1, 0.1), (0.5, 0.3), (0.02, 0.45)):
        right, flipped = dpo.robust_loss(w, l, u, v, beta, eps)[0], dpo.robust_loss(l, w, v, u, beta, eps)[0]
        torch.testing.assert_close((1 - eps) * right + eps * flipped, dpo.dpo_loss(w, l, u, v, beta)[0], rtol=1e-12, atol=1e-11)


def test_cdpo_is_least_where_the_model_s_doubt_is_the_labels():
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    zero = torch.zeros_like(x)
    for eps in (0.05, 0.2, 0.4):
        best = x[dpo.cdpo_loss(x, zero, zero, zero, 1.0, eps)[0].argmin()]
        assert torch.sigmoid(best).item() == pytest.approx(1 - eps, abs=1e-4)


@pytest.mark.parametrize('tau', [0.05, 0.1, 1.0])
@pytest.mark.parametrize('mean', [False, True])
def test_ipo_is_least_where_the_margin_is_1_over_2_tau(mean, tau):
    """The margin of sums, or of means over tokens: all of the loss within 20 nats of it, and the gradient there."""
    name, m, n = ('ipo_mean', 4, 7) if mean else ('ipo', 1, 1)
    goal = 1 / (2 * tau)
    h = goal + torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    u, v, l = (torch.full_like(h, x) for x in (-20.0, -31.0, -17.0))
    tokens = [torch.full(h.shape, m), torch.full(h.shape, n)] if mean else []
    (values, *_), (slope, _) = by_dpo(name, [u + m * (h + (l - v) / n), l, u, v, *tokens], (tau,), 2)
    assert h[values.argmin()].item() == pytest.approx(goal, abs=1e-3) and values.min() < 1e-20
    assert slope[20_000].abs() < 1e-10 and slope[:20_000].max() < 0 < slope[20_001:].min()


def test_means_of_single_tokens_are_sums():
    pair, one = [random_logps(200) for _ in range(4)], torch.ones(200, dtype=torch.long)
    for mean, plain, strength in (('dpo_norm', 'dpo', 0.3), ('ipo_mean', 'ipo', 0.1)):
        ours, plains = by_dpo(mean, [*pair, one, one], (strength,), 2), by_dpo(plain, pair, (strength,), 2)
        assert all(torch.equal(a, b) for a, b in zip((*ours[0], *ours[1]), (*plains[0], *plains[1]), strict=True))


def test_simpo_without_a_margin_is_dpo_norm_under_a_uniform_reference():
    w, l, m, n = random_arguments('simpo', 200)[0]
    ours, norms = (by_dpo('simpo', [w, l, m, n], (2.0, 0.0), 2),
                   by_dpo('dpo_norm', [w, l, *(-x.double() * math.log(50257) for x in (m, n)), m, n], (2.0,), 2))
    assert_equal(([ours[0][0]], ours[1]), ([norms[0][0]], norms[1]), 1e-12, 1e-12)


def test_orpo_of_equal_means_is_nll_and_lambda_ln_2():
    m, n = torch.randint(1, 100, (2, 200))
    mean = -torch.rand(200, dtype=torch.float64) * 5 - 0.01
    loss = dpo.orpo_loss(mean * m, mean * n, m, n, 0.3)[0]
    torch.testing.assert_close(loss, -mean + 0.3 * math.log(2), rtol=1e-12, atol=1e-12)


def test_kto_is_half_its_weight_at_the_reference_and_saturates_far_from_z():
    logps, desirable = random_logps(6), torch.tensor([True, False] * 3)
    for z, good, bad in ((0.0, 0.65, 0.35), (1e6, 1.3, 0.0), (-1e6, 0.0, 0.7)):
        loss, rewards = dpo.kto_loss(logps, logps, desirable, torch.tensor(z, dtype=torch.float64), 0.1, 1.3, 0.7)
        assert loss.tolist() == pytest.approx([good, bad] * 3) and not rewards.any()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', FORMULAS)
def test_losses_are_finite_and_right_for_log_probs_down_to_minus_ten_thousand(name, dtype):
    """Every sign and size of both differences. What is subtracted reaches 1e4, so the argument of the loss is off by eps times
    beta times 1e4, a few times over; ipo squares it, where the size of the result allows for as much."""
    values = torch.cartesian_prod(*[torch.tensor([-1e4, -1e2, -1.0, -0.5])] * 4).to(dtype)           # (256, 4)
    w, l, u, v = values.unbind(1)
    eps, size = torch.finfo(dtype).eps, len(values)
    if name == 'kto':
        cases = [([w, u, torch.full((size,), good), torch.tensor(z, dtype=dtype)], 1) for good in (True, False) for z in (0.0, 500.0)]
    elif name == 'plackett_luce':
        cases = [([torch.stack([w, l, v], 1), torch.stack([u, v, l], 1)], 1)]
    else:
        cases = [([dict(w=w, l=l, u=u, v=v, m=torch.full((size,), m), n=torch.full((size,), n))[key] for key in takes(name)], 2)
                 for m, n in ((1, 1), (64, 3))]
    for tensors, policy in cases:
        knobs = KNOBS[name][0]
        ours, exact = by_dpo(name, tensors, knobs, policy), by_formula(name, tensors, knobs, policy)
        assert all(x.isfinite().all() for x in (*ours[0], *ours[1]))
        assert_equal(ours, exact, 1e3 * eps, 8 * eps * max(1, knobs[0]) * 1e4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_orpo_is_finite_and_right_as_p_goes_to_1(dtype):
    """On either side, down to a mean of exactly 0, whose true odds are infinite; right wherever the type can tell it from 0."""
    means = torch.tensor([-1.0, -1e-3, -1e-4, -1e-6, -1e-8, -1e-10, -1e-12, -1e-30, 0.0], dtype=dtype)
    w, l = torch.cartesian_prod(means, means).unbind(1)
    tokens = torch.full(w.shape, 8)
    eps = torch.finfo(dtype).eps
    tensors, knobs = [8 * w, 8 * l, tokens, tokens], (0.1,)
    assert all(x.isfinite().all() for out in by_dpo('orpo', tensors, knobs, 2) for x in out)
    told = (w < -eps) & (l < -eps)
    assert told.sum() >= 16
    tensors = [t[told] for t in tensors]
    assert_equal(by_dpo('orpo', tensors, knobs, 2), by_formula('orpo', tensors, knobs, 2), 1e3 * eps, 1e2 * eps)


def test_dpo_loss_stays_under_20_lines_before_the_plumbing_and_every_loss_names_its_source():
    text = inspect.getsource(dpo)
    assert len(inspect.getsource(dpo.dpo_loss).splitlines()) < 20 and text[:text.index('def dpo_loss')].count('\n') < 60
    found = dict(re.findall(r'\ndef (\w+)_loss(\(.*?\)):\n', text, re.S))
    assert found.keys() == FORMULAS.keys()
    for name in found:
        assert text.index(f'def {name}_loss') < text.index('class Config')
        assert re.search(r"arXiv \d{4}\.\d{5}|E\. Mitchell's note", getattr(dpo, f'{name}_loss').__doc__), name


# -----------------------------------------------------------------------------
# dpo.py end to end

def write_unpaired(folder, splits, labels, max_length=64):
    """data/<name>/ of single responses and their labels, {split: list of bool}."""
    write_data(folder, splits, max_length)
    meta = prepare_prefs.read_meta(folder)
    for split, values in labels.items():
        path = Path(folder) / f'{split}.labels.npy'
        np.save(path, np.array(values, bool))
        meta['splits'][split]['labels_sha256'] = prepare_prefs.sha256_file(path)
    prepare_prefs.write_meta(folder, meta)


def make_data(kind):
    """data/<kind>: 'tiny' (pairs), 'rankings' of 3 or 'unpaired' examples; 48 + 10 groups."""
    rng = np.random.default_rng(0)
    K = {'tiny': 2, 'rankings': 3, 'unpaired': 1}[kind]
    splits = {'train': random_groups(48, K, rng), 'val': random_groups(10, K, rng)}
    if kind == 'unpaired':
        write_unpaired(f'data/{kind}', splits, {split: rng.random(len(groups)) < 0.6 for split, groups in splits.items()})
    else:
        write_data(f'data/{kind}', splits)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """In a fresh directory: all three kinds of data, and two models, out/policy and out/other."""
    monkeypatch.chdir(tmp_path)
    make_workplace()


def make_workplace():
    for kind in ('tiny', 'rankings', 'unpaired'):
        make_data(kind)
    for name, seed in (('policy', 0), ('other', 1)):
        os.makedirs(f'out/{name}')
        save_checkpoint(f'out/{name}', 1, small_gpt(seed=seed), dict(config={}, vocabulary=None))


QUIET = ['--init_from=out/policy', '--eval_interval=0', '--save_interval=0']
RUNS = {name: ('tiny', [f'--loss={name}']) for name in FORMULAS} | {       # what 1 and 2 processes run: data, flags
    'plackett_luce of 3': ('rankings', ['--loss=plackett_luce']), 'kto unpaired': ('unpaired', ['--loss=kto']),
    'dpo with nll': ('tiny', ['--nll_coef=0.5', '--ref_from=out/other'])}
TWO = '''
import os, sys
sys.path.insert(0, {root!r})
import dpo
for i, (kind, flags) in enumerate({runs!r}):
    dpo.main([*{flags!r}, f'--name={{kind}}', *flags])
    if os.environ['RANK'] == '0':
        os.rename(f'out/{{kind}}/dpo', f'out/two-{{i}}')
'''


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """A directory in which every one of RUNS was made by two processes, out/two-0 and so on, under one torchrun."""
    folder = tmp_path_factory.mktemp('two')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_workplace()
        Path('two.py').write_text(TWO.format(root=str(ROOT), runs=list(RUNS.values()), flags=[*DPO, *QUIET]))
        done = run_stage(folder / 'two.py', processes=2)
        assert done.stdout.count('2 processes on cpu') == len(RUNS)
    return folder


@pytest.mark.parametrize('run', RUNS)
def test_processes_and_row_length_change_nothing_but_rounding_for_any_loss(two, monkeypatch, run):
    """As test_train's test of dpo, with its bounds: 1e-5 on losses of the size of 1, here of their size where they are larger
    (the steepest, ipo, has a slope of 10 where dpo has 0.05), and a twentieth of a step's largest move on weights."""
    monkeypatch.chdir(two)
    kind, flags = RUNS[run]
    flags, folder = [*DPO, *QUIET, f'--name={kind}', *flags], f'out/{kind}/dpo'
    dpo.main(flags)
    expected, weights = losses(folder), last_checkpoint(folder)['model']
    dpo.main([*flags, '--row_tokens=128'])
    for how, folder in (('short rows', folder), ('two processes', f'out/two-{list(RUNS).index(run)}')):
        assert losses(folder) == pytest.approx(expected, abs=1e-5, rel=1e-5), how
        worst, name = worst_difference(last_checkpoint(folder)['model'], weights)
        assert worst < 5e-5, (how, name, worst)
    assert worst_difference(weights, small_gpt().state_dict())[0] > 1e-3, 'the run moved the weights'


def read_groups(folder, split, ids=None):
    groups = Groups(folder, split)
    return [[list(map(int, piece)) for piece in groups[i]] for i in (range(len(groups)) if ids is None else ids)]


def formula(name, *arguments):
    """Loss and rewards of one example, float."""
    with decimal.localcontext(decimal.Context(prec=100)):
        return [float(x) if isinstance(x, Number) else [float(y) for y in x]
                for x in FORMULAS[name](*numbers([a if isinstance(a, (bool, list)) else float(a) for a in arguments]))]


SETTINGS = {    # knobs other than the usual ones, as flags
    'dpo': dict(beta=0.03), 'cdpo': dict(beta=0.02, label_smoothing=0.3), 'robust': dict(beta=0.02, label_smoothing=0.3),
    'ipo': dict(beta=0.02), 'ipo_mean': dict(beta=0.5), 'hinge': dict(beta=0.02), 'dpo_norm': dict(beta=0.7),
    'simpo': dict(beta=0.6, gamma=0.4), 'orpo': dict(beta=2.0), 'plackett_luce': dict(beta=0.03)}


@pytest.mark.parametrize('name', SETTINGS)
def test_the_logged_loss_is_the_formula_of_one_at_a_time_log_probs(workplace, name):
    """Before the first step, on all of val, with knobs that are not the usual ones, another model as reference where the
    loss has one, and with nll_coef, which adds that much of the chosen responses' NLL per token."""
    kind = 'rankings' if name == 'plackett_luce' else 'tiny'
    data = read_groups(f'data/{kind}', 'val')
    with torch.no_grad():
        logps, ref = (one_at_a_time(small_gpt(seed=seed), data).tolist() for seed in (0, 1))
    tokens, knobs, found = [[len(piece) for piece in group[1:]] for group in data], SETTINGS[name].values(), []
    for policy, reference, length in zip(logps, ref, tokens):
        if name == 'plackett_luce':
            found.append(formula(name, policy, reference, *knobs))
        else:
            values = dict(zip('wluvmn', (*policy, *reference, *length)))
            found.append(formula(name, *(values[key] for key in takes(name)), *knobs))
    flags = [f'--{key}={value}' for key, value in SETTINGS[name].items()] + ['--ref_from=out/other'] * (name not in ('simpo', 'orpo'))
    for nll_coef in (0.0, 0.4):
        dpo.main([*DPO, *QUIET, *flags, f'--name={kind}', f'--loss={name}', f'--nll_coef={nll_coef}', '--max_steps=1'])
        first = read_log(f'out/{kind}/dpo')[0]
        nll = np.mean([-row[0] / length[0] for row, length in zip(logps, tokens)])
        assert first['eval/loss'] == pytest.approx(np.mean([row[0] for row in found]) + nll_coef * nll, rel=1e-5)
    rewards = np.array([row[1] if kind == 'rankings' else row[1:] for row in found])        # (N, K)
    ordered = [row[i] > row[j] for row in rewards for j in range(len(row)) for i in range(j)]
    logged = [first[f'eval/rewards/{key}'] for key in ('chosen', 'rejected', 'margins', 'accuracies')]
    chosen, rejected = rewards[:, 0].mean(), rewards[:, 1:].mean()
    assert logged == pytest.approx([chosen, rejected, chosen - rejected, np.mean(ordered)], rel=1e-4, abs=1e-4)


def z_by_hand(policy, reference, data, beta, max_length):
    """KTO's z of a step's groups, in its order: each prompt with the responses of the next group of another prompt."""
    foreign = []
    for i, (prompt, *_) in enumerate(data):
        for j in range(1, len(data)):
            other, *responses = data[(i + j) % len(data)]
            if other != prompt:
                room = max_length - max(len(response) for response in responses)
                foreign.append([prompt[max(0, len(prompt) - room):], *responses])
                break
    if not foreign:
        return torch.zeros(()), None
    ratio = (one_at_a_time(policy, foreign) - one_at_a_time(reference, foreign)).mean()
    return beta * ratio.clamp(min=0), beta * ratio


def kto_data(kind):
    """8 + 3 groups, long prompts before short responses and the other way round, so that strangers exceed 24 tokens together;
    three of them have one prompt, or all."""
    rng, K = np.random.default_rng(3), 1 if kind == 'unpaired' else 2

    def some(n):
        return [int(t) for t in rng.integers(0, 256, n)]

    def group(i):
        prompt = [7] * 6 if kind == 'one prompt' or i in (1, 2, 5) else some(16 if i % 2 else 5)
        return [prompt, *([*some(rng.integers(2, 6 if len(prompt) > 6 else 17)), 256] for _ in range(K))]
    splits = {'train': [group(i) for i in range(8)], 'val': [group(i) for i in range(3)]}
    if kind == 'unpaired':
        labels = {'train': [True, True, False, True, False, False, True, True], 'val': [False, True, True]}
        write_unpaired('data/kto', splits, labels, 24)
        return labels
    write_data('data/kto', splits, 24)
    return {split: None for split in splits}


@pytest.mark.parametrize('clamped', [False, True])
@pytest.mark.parametrize('kind', ['pairs', 'unpaired', 'one prompt'])
def test_kto_s_loss_z_and_gradient_are_those_of_one_at_a_time_log_probs(workplace, kind, clamped):
    """z from mismatched prompts and responses alone, of the whole batch, clamped at 0 (where policy and reference change places),
    0 where there is only one prompt, and without a gradient: the logged losses, step 1's gradient norm, and rewards."""
    labels, beta, weights, nll_coef = kto_data(kind), 0.05, (1.2, 0.8), 0.01
    models = [small_gpt(seed=2, spread=0.3), small_gpt()]       # the flatter one finds random bytes likelier
    models = models[::-1] if clamped else models
    for name, model in zip(('policy', 'other'), models):
        save_checkpoint(f'out/{name}', 1, model, dict(config={}, vocabulary=None))
    dpo.main([*DPO, '--name=kto', '--loss=kto', '--init_from=out/policy', '--ref_from=out/other', f'--beta={beta}',
              '--desirable_weight=1.2', '--undesirable_weight=0.8', f'--nll_coef={nll_coef}', '--max_steps=1', '--grad_clip=0',
              '--row_tokens=64'])
    first, step, _ = read_log('out/kto/dpo')
    for split, ids, logged in (('val', range(3), first['eval/loss']), ('train', step_groups(8, 8, 0, 1337), step['loss'])):
        data = read_groups('data/kto', split, ids)
        z, free = z_by_hand(*models, data, beta, 24)
        logps, ref = one_at_a_time(models[0], data), one_at_a_time(models[1], data).detach()
        good = torch.tensor([[True, False]] * len(data) if labels[split] is None else [[labels[split][i]] for i in ids])
        signs, rewards = torch.where(good, 1.0, -1.0), beta * (logps - ref)
        nll = -logps[:, 0] / torch.tensor([len(group[1]) for group in data]) * good[:, 0]

        def loss(z):
            return (torch.where(good, *weights) * (1 - torch.sigmoid(signs * (rewards - z)))).mean() + nll_coef * nll.mean()
        assert logged == pytest.approx(loss(z).item(), rel=1e-5)
        if kind == 'one prompt':
            assert z == 0
        else:
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
def test_a_loss_without_a_reference_holds_one_model(workplace, monkeypatch, name, models):
    gc.collect()
    before = sum(type(x) is GPT for x in gc.get_objects())
    alive, scored = [], dpo.response_logps

    def counted(*arguments):
        if not alive:
            gc.collect()
            alive.append(sum(type(x) is GPT for x in gc.get_objects()) - before)
        return scored(*arguments)
    monkeypatch.setattr(dpo, 'response_logps', counted)
    dpo.main([*DPO, *QUIET, '--name=tiny', f'--loss={name}', '--max_steps=1'])
    assert alive == [models]


OWN = dict(cdpo=['label_smoothing'], robust=['label_smoothing'], simpo=['gamma'], kto=['desirable_weight', 'undesirable_weight'])
FOREIGN = [(name, f'--{knob}=0.25') for name in FORMULAS for knobs in OWN.values() for knob in knobs if knob not in OWN.get(name, [])]
FOREIGN = sorted(set(FOREIGN))      # cdpo and robust share theirs
FOREIGN += [(name, flag) for name in ('simpo', 'orpo') for flag in ('--precompute_ref=True', '--ref_from=out/other')] + [('kto', '--precompute_ref=True')]


def one_line(error):
    assert str(error.value).startswith('error: ') and '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('name, flag', FOREIGN)
def test_a_knob_that_the_loss_does_not_use_is_an_error(name, flag):
    with pytest.raises(SystemExit) as error:
        dpo.main(['--name=tiny', f'--loss={name}', flag])
    assert re.search(rf'{flag[2:].partition("=")[0]}.*{name}\b', one_line(error))


def test_a_config_file_s_unused_knob_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text("name = 'mine'\ndpo = dict(loss='dpo', gamma=1.0)\n")
    with pytest.raises(SystemExit) as error:
        dpo.main([str(path)])
    assert re.search(r'mine\.py.*gamma.*dpo', one_line(error))


@pytest.mark.parametrize('name', FORMULAS)
def test_knobs_that_are_not_set_are_the_loss_s_usual_ones(name):
    cfg = config.load(dpo.Config, 'dpo', ['--name=tiny', f'--loss={name}'])
    knobs = ['beta', *OWN.get(name, [])]
    assert tuple(getattr(cfg, knob) for knob in knobs) == KNOBS[name][0]
    assert all(getattr(cfg, knob) is None for knobs in OWN.values() for knob in knobs if knob not in OWN.get(name, []))


@pytest.mark.parametrize('name, kind, says', [
    ('dpo', 'rankings', r'data/rankings holds rankings of 3.*loss=dpo.*pairs'),
    ('ipo_mean', 'rankings', r'data/rankings holds rankings of 3.*loss=ipo_mean.*pairs'),
    ('kto', 'rankings', r'data/rankings holds rankings of 3.*loss=kto'),
    ('dpo', 'unpaired', r'data/unpaired holds unpaired examples.*loss=dpo.*pairs'),
    ('plackett_luce', 'unpaired', r'data/unpaired holds unpaired examples.*loss=plackett_luce'),
    ('kto', 'single', r'data/single holds single responses.*loss=kto'),
    ('simpo', 'single', r'data/single holds single responses.*loss=simpo.*pairs')])
def test_data_that_do_not_fit_the_loss_are_an_error(workplace, name, kind, says):
    if kind == 'single':
        write_data('data/single', {split: random_groups(4, 1, np.random.default_rng(0)) for split in ('train', 'val')})
    with pytest.raises(SystemExit) as error:
        dpo.main([*DPO, *QUIET, f'--name={kind}', f'--loss={name}'])
    assert re.search(says, one_line(error))


def test_step_0_is_ln_2_against_a_copy_and_not_against_another_reference(workplace):
    first = []
    for flags in ([], ['--ref_from=out/policy'], ['--ref_from=out/other']):
        dpo.main([*DPO, *QUIET, '--name=tiny', '--max_steps=1', *flags])
        first.append(read_log('out/tiny/dpo')[0]['eval/loss'])
    assert first[:2] == pytest.approx([math.log(2)] * 2, abs=1e-6) and abs(first[2] - math.log(2)) > 0.1


def test_resume_refuses_another_reference(workplace):
    dpo.main([*DPO, *QUIET, '--name=tiny', '--max_steps=2', '--ref_from=out/other'])
    with pytest.raises(SystemExit) as error:
        dpo.main([*DPO, *QUIET, '--name=tiny', '--max_steps=4', '--resume'])
    assert re.search('cannot resume .*changed since', one_line(error))
    dpo.main([*DPO, *QUIET, '--name=tiny', '--max_steps=4', '--ref_from=out/other', '--resume'])
    assert last_checkpoint('out/tiny/dpo')['step'] == 4
    with pytest.raises(SystemExit) as error:
        dpo.main([*DPO, *QUIET, '--name=tiny', '--max_steps=6', '--ref_from=out/policy', '--resume'])
    assert re.search('cannot resume .*changed since', one_line(error))


@pytest.mark.parametrize('name, kind', [('dpo', 'tiny'), ('plackett_luce', 'rankings')])
def test_a_reference_of_its_own_is_cached_apart_from_the_policy_s(workplace, capsys, name, kind):
    flags = [*DPO, *QUIET, f'--name={kind}', f'--loss={name}', '--max_steps=5']
    dpo.main([*flags, '--precompute_ref'])                                  # a cache of the policy's own copy
    dpo.main([*flags, '--ref_from=out/other'])
    live = losses(f'out/{kind}/dpo')
    capsys.readouterr()
    for says in ('of other data or weights, computing', 'equal to live ones'):
        dpo.main([*flags, '--ref_from=out/other', '--precompute_ref'])
        assert capsys.readouterr().out.count(says) == 2
        assert losses(f'out/{kind}/dpo') == pytest.approx(live, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize('good, bad, weights, says', [
    (900, 300, (1.0, 1.0), 'note: 900 desirable and 300 undesirable examples; weighted 3.00 to 1, .* --desirable_weight=1 --undesirable_weight=2.25 to 3'),
    (300, 900, (1.0, 1.0), 'weighted 0.33 to 1, .* --undesirable_weight=1 --desirable_weight=3 to 4'),
    (300, 900, (3.5, 1.0), '300 desirable and 900 undesirable examples; weighted 1.17 to 1, recommended are 1 to 1.33'),
    (300, 0, (1.0, 1.0), 'note: 300 desirable and 0 undesirable examples: kto learns from the contrast of both'),
])
def test_kto_names_the_weights_that_balance_uneven_classes(good, bad, weights, says):
    """arXiv 2402.01306: lam_D n_D from 1 to 4/3 times lam_U n_U. Either end of the advice, taken, is no longer advised against."""
    class Examples:
        labels = np.array([True] * good + [False] * bad)

        def __len__(self):
            return good + bad
    line = dpo.kto_balance(Examples(), *weights)
    assert re.fullmatch('.*' + says, line)
    for value in re.findall(r'([\d.]+) to ([\d.]+)$', line) if '--' in line else ():
        for end in map(float, value):
            assert not dpo.kto_balance(Examples(), *((1.0, end) if good > bad else (end, 1.0))).startswith('note')
