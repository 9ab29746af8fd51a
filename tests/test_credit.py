"""repro/credit.py: exact advantages against sums over completions, credit of words against a count by hand."""
import json
import math

import numpy as np
import pytest
import torch

import credit
import optimum

BETA = 0.7


@pytest.fixture(scope='module')
def world():
    return optimum.World(prompts=2, vocab=3, length=3, width=16, seed=5)


def test_advantages_equal_sums_over_completions_and_the_log_ratio_of_the_optimum(world):
    exact, rho = credit.advantages(world, BETA), world.rho.exp()
    y = world.completions

    def value(x, prefix):
        """beta log E_rho[exp(r / beta) | prefix]."""
        fits = (y[:, :len(prefix)] == torch.tensor(prefix, dtype=y.dtype)).all(1)
        p = rho[x, fits]
        return BETA * math.log(((p * (world.reward[x, fits] / BETA).exp()).sum() / p.sum()).item())

    prefixes = [(), *((a,) for a in range(3)), *((a, b) for a in range(3) for b in range(3))]
    reach = credit.reach(world)
    for x in range(2):
        for i, prefix in enumerate(prefixes):
            for token in range(3):
                whole = [*prefix, token]
                assert exact[x, i, token].item() == pytest.approx(value(x, whole) - value(x, list(prefix)), abs=1e-10)
                fits = (y[:, :len(whole)] == torch.tensor(whole)).all(1)
                assert reach[x, i, token].item() == pytest.approx(rho[x, fits].sum().item(), abs=1e-12)
    tokens = credit.token_logps(world, world.reference)
    star, _ = optimum.optimum(world.rho, world.reward, BETA)
    torch.testing.assert_close(credit.completions(world, tokens + exact / BETA), star, rtol=0, atol=1e-10)
    torch.testing.assert_close(credit.completions(world, tokens), world.rho, rtol=0, atol=1e-12)


def test_an_exact_value_function_gives_the_exact_advantage(world):
    y, values = world.completions, []
    for prefix in [(), *((a,) for a in range(3)), *((a, b) for a in range(3) for b in range(3))]:
        fits = (y[:, :len(prefix)] == torch.tensor(prefix, dtype=y.dtype)).all(1)
        p = world.rho[:, fits].softmax(1)
        values.append(BETA * (p * (world.reward[:, fits] / BETA).exp()).sum(1).log())
    found = credit.value_credit(world, torch.stack(values, 1))
    torch.testing.assert_close(found, credit.advantages(world, BETA), rtol=0, atol=1e-10)


def test_comparison_is_a_weighted_correlation(world):
    weight = credit.reach(world)
    noise = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, *weight.shape, generator=noise, dtype=torch.float64)
    found = credit.compare(world, a, b, weight)
    covariance = np.cov(a.flatten(), b.flatten(), aweights=weight.flatten())
    assert found['correlation'] == pytest.approx(covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1]))
    assert found['slope'] == pytest.approx(covariance[0, 1] / covariance[1, 1])
    first = np.cov(a[:, 0].flatten(), b[:, 0].flatten(), aweights=weight[:, 0].flatten())
    assert found['positions'][0] == pytest.approx(first[0, 1] / math.sqrt(first[0, 0] * first[1, 1]))
    assert len(found['positions']) == 3
    same = credit.compare(world, 2 * b + 1, b, weight)
    assert same['correlation'] == pytest.approx(1) and same['slope'] == pytest.approx(2)


def test_dpo_and_ppo_come_closer_to_the_exact_credit(world, monkeypatch):
    monkeypatch.setitem(credit.SIZE, 'width', 16)
    exact, weight = credit.advantages(world, credit.BETA), credit.reach(world)
    rho = credit.token_logps(world, world.reference)
    pairs = optimum.sample_pairs(world.rho, world.reward, 4000, torch.Generator().manual_seed(1))
    for method in ('DPO', 'IPO', 'KTO'):
        found = credit.compare(world, credit.BETA * (credit.fit(world, method, pairs, 100, 3e-3) - rho), exact, weight)
        assert found['correlation'] > (0.5 if method == 'KTO' else 0.9), method
    logps, values = credit.ppo(world, 1, rounds=30, rate=3e-3)
    for table in (credit.BETA * (logps - rho), credit.value_credit(world, values)):
        assert credit.compare(world, table, exact, weight)['correlation'] > 0.8


def test_words_get_the_tints_of_the_tokens_that_begin_in_them():
    pieces = [(' del', [0.5]), ('ight', [0.25]), ('ful', [0.125]), (' and', [1.0, 2.0]), (',', [4.0]), (' so', [8.0]),
              (None, [16.0])]
    assert credit.words_of(pieces) == [('delightful', 0.875), ('and', 7.0), ('so', 24.0)]
    assert credit.words_of([('?!', [1.0]), (' yes', [2.0])]) == [('yes', 2.0)]


def test_classes_sum_up_their_own_words():
    found = [(0, 'superb', 2.0), (0, 'the', 0.5), (1, 'dreadful', -1.0), (1, 'watchable', 0.25), (2, 'loved', 1.0),
             (2, 'hated', 0.0), (3, 'superb', 1.0), (3, 'hated', -0.5), (4, 'crisp', 0.0), (4, 'dull', -1.0)]
    found += [(5, words.split('/')[0].split(' ')[0], 1.0) for words in credit.reviews.OPPOSITES.values()]
    found += [(6, words.split('/')[-1], -1.0) for words in credit.reviews.OPPOSITES.values()]
    rows, (weight, tint) = credit.by_class(found, draws=20)
    named = {row['kind']: row for row in rows}
    total = sum(abs(value) for *_, value in found)
    assert named['neutral']['words'] == 1 and named['neutral']['share'] == pytest.approx(0.5 / total)
    assert named['all words']['words'] == len(found) == named['sentiment words']['words'] + 1
    film = [(weight[i], tint[i]) for i, (_, word, _) in enumerate(found)
            if word in credit.reviews.OPPOSITES['film'].replace('/', ' ').split()]
    assert named['film']['words'] == len(film)
    assert named['film']['correlation'] == pytest.approx(credit.correlation_of(*np.array(film).T))
    assert credit.correlation_of([3, 1, 1, 5], [2, 0, 1, 1]) == pytest.approx(
        np.corrcoef([2, 0.5, 0.5, 3], [3, 0, 1.5, 1.5])[0, 1])


def test_a_run_on_worlds_alone_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(credit, 'PAIRS', (100, 200, 300))
    monkeypatch.setattr(credit, 'SIZE', dict(prompts=2, vocab=3, length=3, width=16))
    monkeypatch.setattr(credit.fit, '__defaults__', (5, 1e-3))
    monkeypatch.setattr(credit.ppo, '__defaults__', (2, 250, 2, 1e-3, 0.2, 0.95))
    credit.main(['--prompts=0', '--seeds=2', f'--out={tmp_path / "few"}'])
    assert (tmp_path / 'few.md').read_text() in capsys.readouterr().out
    assert len(json.loads((tmp_path / 'few.json').read_text())['worlds']) == 2 * (3 * 3 + 2)
    assert (tmp_path / 'few.png').stat().st_size > 10_000
