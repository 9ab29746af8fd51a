"""repro/optimum.py: its tables against one sequence, one pair, one draw at a time, and the theory to a tolerance."""
import itertools
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import optimum


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)                    # as the script: matrices are small
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def world():
    return optimum.World(prompts=2, vocab=3, length=3, width=16, seed=5)


def test_enumerated_logps_equal_the_model_one_sequence_at_a_time(world):
    completions = list(itertools.product(range(3), repeat=3))
    assert world.completions.tolist() == [list(y) for y in completions]
    assert world.prompts[0].tolist() != world.prompts[1].tolist()
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    for x, prompt in enumerate(world.prompts.tolist()):
        for i, y in enumerate(completions):
            tokens = torch.tensor([[*prompt, *y]])
            hidden = world.reference(tokens, torch.arange(5)[None], causal)
            logps = F.log_softmax(hidden[0] @ world.reference.wte.weight.t(), dim=-1)
            expected = sum(logps[1 + t, y[t]].item() for t in range(3))
            assert world.rho[x, i].item() == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(world.rho.exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12)
    perplexity = (-(world.rho.exp() * world.rho).sum(-1)).exp()
    assert (perplexity < 0.9 * 27).all() and not torch.equal(world.rho[0], world.rho[1])    # not uniform, of the prompt
    assert world.reward.std().item() == pytest.approx(1)


def test_expected_loss_equals_a_sum_over_pairs_and_labels(world):
    beta, rho, r = 0.7, world.rho.tolist(), world.reward.tolist()
    noise = torch.randn(2, 27, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logps = (world.rho + noise).log_softmax(-1)
    total = 0
    for x, i, j in itertools.product(range(2), range(27), range(27)):
        h = logps[x, i].item() - logps[x, j].item() - rho[x][i] + rho[x][j]
        p = 1 / (1 + math.exp(r[x][j] - r[x][i]))
        right, wrong = math.log1p(math.exp(-beta * h)), math.log1p(math.exp(beta * h))
        total += math.exp(rho[x][i] + rho[x][j]) * (p * right + (1 - p) * wrong) / 2
    weight = optimum.label_weights(world.rho, world.reward)
    assert optimum.expected_loss(logps, world.rho, weight, beta).item() == pytest.approx(total, rel=1e-6)
    assert weight.sum((1, 2)).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize('beta', [0.1, 1.0])
def test_expected_loss_is_flat_at_the_optimum_of_its_own_beta_alone(world, beta):
    slopes = []
    for other in (beta, 2 * beta, beta / 2):
        logps = optimum.optimum(world.rho, world.reward, other)[0].requires_grad_()
        optimum.expected_loss(logps, world.rho, optimum.label_weights(world.rho, world.reward), beta).backward()
        slopes.append(logps.grad.norm().item())
    assert slopes[0] < 1e-4 * min(slopes[1:])


@pytest.mark.parametrize('beta, bound', [(0.1, 0.05), (1.0, 0.01)])
def test_dpo_reaches_the_optimum_and_lies_on_the_frontier(world, beta, bound):
    star, best = optimum.optimum(world.rho, world.reward, beta)
    assert optimum.mean_kl(world.rho, star) > 10 * bound                       # where it starts
    logps, excess = optimum.fit_expected(world, world.reward, beta, 150, 100)
    kl, to_ref = optimum.mean_kl(logps, star), optimum.mean_kl(logps, world.rho)
    reward = optimum.mean_reward(logps, world.reward)
    assert kl <= bound and -1e-6 < excess < 1e-3
    for policy in (logps, world.rho):           # J* - J = beta KL(pi||pi*), for the trained policy and for one far away
        J = optimum.mean_reward(policy, world.reward) - beta * optimum.mean_kl(policy, world.rho)
        assert best - J == pytest.approx(beta * optimum.mean_kl(policy, star), abs=1e-10)
    below = optimum.frontier(world.rho, world.reward, to_ref) - reward      # the frontier is under its tangent at pi*
    assert -1e-9 < below <= beta * kl + 1e-9
    correlation, _, largest, implicit, r = optimum.recovered(logps, world.rho, world.reward, beta)
    assert correlation > 0.999 and largest < 0.2 and largest == pytest.approx((implicit - r).abs().max().item())
    untrained = optimum.recovered(world.rho, world.rho, world.reward + 7, beta)
    assert untrained[2] == pytest.approx(r.abs().max().item())


def test_a_constant_for_each_prompt_changes_nothing_and_one_for_a_completion_does(world):
    trained = [optimum.fit_expected(world, world.reward + shift, 1.0, 40, 0)[0] for shift in
               (0, torch.tensor([[3.75], [-2.25]], dtype=torch.float64), 0.1 * F.one_hot(torch.tensor([0, 1]), 27))]
    assert torch.equal(trained[0], trained[1]) and (trained[0] - trained[2]).abs().max() > 1e-3


def test_frontier_is_what_pi_star_attains_and_no_other_policy(world):
    noise = torch.Generator().manual_seed(1)
    for beta in (0.2, 1.0, 4.0):
        star, _ = optimum.optimum(world.rho, world.reward, beta)
        assert optimum.frontier(world.rho, world.reward, optimum.mean_kl(star, world.rho)) == pytest.approx(
            optimum.mean_reward(star, world.reward), abs=1e-9)
        for _ in range(20):
            other = (star + 0.3 * torch.randn(star.shape, generator=noise, dtype=star.dtype)).log_softmax(-1)
            highest = optimum.frontier(world.rho, world.reward, optimum.mean_kl(other, world.rho))
            assert optimum.mean_reward(other, world.reward) < highest


def test_best_of_n_equals_enumerated_draws_and_its_kl_the_formula_from_below(world):
    for n in (1, 2, 3):
        best = optimum.best_of(world.rho, world.reward, n).exp()
        for x in range(2):
            p, r, expected = world.rho[x].exp().tolist(), world.reward[x].tolist(), [0.0] * 27
            for draws in itertools.product(range(27), repeat=n):
                expected[max(draws, key=r.__getitem__)] += math.prod(p[i] for i in draws)
            assert best[x].tolist() == pytest.approx(expected, abs=1e-12)
    rows = [(n, optimum.best_of(world.rho, world.reward, n)) for n in optimum.BEST_OF]
    for n, best in rows[1:]:
        kl = optimum.mean_kl(best, world.rho)
        assert 0 < kl < math.log(n) - (n - 1) / n
        assert optimum.mean_reward(best, world.reward) < optimum.frontier(world.rho, world.reward, kl)
    fine = torch.full((1, 20000), -math.log(20000), dtype=torch.float64)       # no completion has mass to speak of
    kl = optimum.mean_kl(optimum.best_of(fine, torch.randn(1, 20000), 16), fine)
    assert kl == pytest.approx(math.log(16) - 15 / 16, abs=1e-3)


def test_sampled_pairs_follow_the_expected_losss_weights_and_group_without_loss(world):
    n = 40000
    x, chosen, rejected = optimum.sample_pairs(world.rho, world.reward, n, torch.Generator().manual_seed(2))
    weight = optimum.label_weights(world.rho, world.reward) / 2                 # (2, 27, 27), sums to 1
    for value in (world.reward[:, :, None] - world.reward[:, None], world.rho[:, :, None] + 0 * world.rho[:, None],
                  torch.arange(2.0)[:, None, None].expand(2, 27, 27)):
        mean = (weight * value).sum().item()
        error = math.sqrt((weight * (value - mean)**2).sum().item() / n)
        assert value[x, chosen, rejected].mean().item() == pytest.approx(mean, abs=4 * error)
    w, l, share = optimum.grouped(x, chosen, rejected, 27)
    seen = Counter(zip((x * 27 + chosen).tolist(), (x * 27 + rejected).tolist()))
    assert {(i, j): round(s * n) for i, j, s in zip(w.tolist(), l.tolist(), share.tolist())} == seen


def test_more_pairs_and_more_samples_come_closer_to_the_optimum(world):
    star, _ = optimum.optimum(world.rho, world.reward, 1.0)
    start = optimum.mean_kl(world.rho, star)
    few, many = (optimum.mean_kl(optimum.fit_pairs(world, 1.0, n, 1, 100, 1e-3), star) for n in (100, 10000))
    assert many < few / 3 and many < start / 10
    for method in ('REINFORCE', 'PPO'):
        curve, logps = optimum.climb(world, 1.0, method, 1, 10000, 1e-3)
        assert curve[-1] == (10000, pytest.approx(optimum.mean_kl(logps, star))) and curve[-1][1] < start / 4
    assert optimum.first_within([(1, 5), (2, 1), (3, 3), (4, 2)], 2) == 4 and optimum.first_within([(1, 5)], 2) is None


def test_a_run_writes_tables_figures_and_no_paths_and_a_wrong_flag_one_line(tmp_path, monkeypatch, capsys):
    small = dict(adam=20, lbfgs=10, pairs=(100, 300, 1000), steps=5, samples=1000)
    monkeypatch.setattr(optimum, 'QUICK', optimum.QUICK | small)
    optimum.main(['--quick', f'--out={tmp_path / "run"}'])
    report = json.loads((tmp_path / 'run.json').read_text())
    assert (tmp_path / 'run.md').read_text() == capsys.readouterr().out
    assert (tmp_path / 'run.png').stat().st_size > 10000
    assert str(tmp_path) not in json.dumps(report) and len(report['expected']) == 4 and len(report['rl']) == 2
    for row in report['expected']:
        assert row['gap'] == pytest.approx(row['beta'] * row['kl_optimum'], abs=1e-9)
    for flags in (['--bata=1'], ['--seed=x'], ['--seed=-1'], ['--out=no/such/folder/x']):
        with pytest.raises(SystemExit) as caught:
            optimum.main(flags)
        assert caught.value.code.startswith('error: ') and '\n' not in caught.value.code
