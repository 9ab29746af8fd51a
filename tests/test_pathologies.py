"""repro/pathologies.py and its parts: exact quantities against sums and searches of their own, in plain float64."""
import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch

import optimum
import pathologies
import pathologies_figure
import pathologies_gpt
import sentences

STRIDE = sentences.LONGEST + 1


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(logits):
    weights = [math.exp(z - max(logits)) for z in logits]
    return [w / sum(weights) for w in weights]


def test_misspecified_dpo_is_the_least_loss_of_a_fine_grid_and_its_rewards_are_sums():
    rows, worst, _ = pathologies.misspecification(worlds=40)
    f, r, rho, beta = worst['features'], worst['reward'], worst['rho'], worst['beta']
    shares = {(0, 1): 0.98, (0, 2): 0.01, (1, 2): 0.01}

    def policy(theta):
        return softmax([math.log(p) + theta * x for p, x in zip(rho, f)])

    def reward(theta):
        return sum(p * x for p, x in zip(policy(theta), r))

    def loss(theta):
        total = 0
        for (i, j), share in shares.items():
            h, p = theta * (f[i] - f[j]), sigmoid(r[i] - r[j])
            total -= share * (p * math.log(sigmoid(beta * h)) + (1 - p) * math.log(sigmoid(-beta * h)))
        return total

    def objective(theta):
        return reward(theta) - beta * sum(p * math.log(p / q) for p, q in zip(policy(theta), rho))

    at, best = worst['theta'], worst['best_theta']
    assert all(loss(at) <= loss(at + step) + 1e-15 for step in (-1, -0.01, -1e-4, 1e-4, 0.01, 1))
    assert worst['gain'] == pytest.approx(reward(at) - reward(0), abs=1e-12)
    assert worst['best_gain'] == pytest.approx(reward(best) - reward(0), abs=1e-12) and worst['best_gain'] > 0.1
    grid = [i / 500 for i in range(-20_000, 20_001)]
    assert objective(best) >= max(map(objective, grid)) - 1e-4
    star = softmax([math.log(p) + x / beta for p, x in zip(rho, r)])
    assert worst['star_gain'] == pytest.approx(sum(p * x for p, x in zip(star, r)) - reward(0), abs=1e-12)
    assert worst['star_gain'] >= worst['best_gain'] > worst['gain'] >= rows[-1]['worst']
    assert rows[-1]['below'] >= rows[-1]['clearly'] and rows[0]['below'] < rows[-1]['below']


@pytest.mark.parametrize('beta', pathologies.BETAS)
def test_ipo_stops_at_its_optimum_and_dpo_follows_its_gradient_flow_to_infinity(beta):
    ipo = pathologies.two_arms(pathologies.squared, beta, 2000)
    assert ipo[-1].item() == pytest.approx(1 / (2 * beta), abs=1e-9)
    dpo, rate = pathologies.two_arms(pathologies.logistic, beta, 2000).tolist(), 0.1
    h = 0.0
    for step in range(2001):
        assert dpo[step] == pytest.approx(h, rel=1e-6, abs=1e-6)
        h += 2 * rate * beta * sigmoid(-beta * h)           # each of two logits moves by half of it
    assert all(a < b for a, b in itertools.pairwise(dpo))


def test_one_layer_moves_as_by_hand_and_displaces():
    head, beta, rate = pathologies.HEAD.tolist(), 0.1, 10.0
    state, rho = [0.0, 1.0], None
    for expected in pathologies.no_over_never(10).exp().tolist():
        p = softmax([sum(w * x for w, x in zip(row, state)) for row in head])
        rho = rho or p
        assert p == pytest.approx(expected, abs=1e-6)
        h = math.log(p[1] / p[2]) - math.log(rho[1] / rho[2])
        state = [x + rate * beta * sigmoid(-beta * h) * (no - never) for x, no, never in zip(state, head[1], head[2])]
    assert p[0] > rho[0] and p[1] < rho[1] and p[2] < rho[2]
    table = pathologies.no_over_never(10, head=torch.eye(3).double()).exp()
    assert table[0].tolist() == pytest.approx(rho) and table[-1, 1] > rho[1]        # free logits: No rises
    logits = [math.log(p) for p in pathologies.CROWD]
    for expected in pathologies.push_down(10).tolist():
        p = softmax(logits)
        assert p == pytest.approx(expected, abs=1e-12)
        logits = [z - 0.5 * ((i == len(p) - 1) - q) for i, (z, q) in enumerate(zip(logits, p))]
    assert p[0] > 0.98


def test_summed_states_equal_one_completion_at_a_time():
    world = optimum.World(prompts=1, vocab=5, length=4, width=32, seed=3)
    sums = pathologies_gpt.summed_states(world)
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    for i in (0, 17, 311, 624):
        tokens = torch.cat([world.prompts[0], world.completions[i]])[None]
        states = world.reference(tokens, torch.arange(6)[None], causal)[0]
        torch.testing.assert_close(sums[i], states[1:5].sum(0), rtol=0, atol=1e-10)     # those that predict y
    chosen, rejected, scores = pathologies_gpt.displacement(1, 12)
    assert (rejected < 0).all() and {len(v) for v in scores.values()} == {len(chosen)}


def test_the_score_of_gradients_is_how_log_pi_w_falls_along_the_losss_gradient():
    scores = pathologies_gpt.displacement(1, 12)[2]
    world, step = optimum.World(prompts=1, vocab=5, length=4, width=32, seed=1), 1e-7
    _, w, l = optimum.sample_pairs(world.rho, world.reward, 12, torch.Generator().manual_seed(1))
    policy = world.policy()
    logps = world.logps(policy)[0]
    (logps[w[0]] - logps[l[0]]).backward()
    for p in policy.parameters():
        p.data += step * (p.grad if p.grad is not None else 0)
    risen = (world.logps(policy)[0, w[0]] - logps[w[0]]).item()
    assert scores['gradients'][0].item() == pytest.approx(-risen / step, rel=1e-3)


def test_rank_correlation_averages_the_ranks_of_ties():
    x, y = torch.tensor([3.0, 1.0, 1.0, 5.0]), torch.tensor([2, 0, 1, 1])
    assert pathologies.rank_correlation(x, y) == pytest.approx(np.corrcoef([2, 0.5, 0.5, 3], [3, 0, 1.5, 1.5])[0, 1])


def test_shares_of_pairs_right_equal_a_loop_over_all_pairs_and_pairs_flip_where_the_margin_passes_the_gap():
    row, (gap, h, best) = pathologies_gpt.accuracy(2, 0.5, n=64)
    world = optimum.World(prompts=1, vocab=5, length=4, width=32, seed=2)
    rho, r = world.rho[0].numpy(), world.reward[0].numpy()
    star = rho + r / 0.5
    star -= np.logaddexp.reduce(star)
    p = np.exp(rho)
    weight = p[:, None] * p * (1 / (1 + np.exp(r - r[:, None])))        # [w, l]
    np.fill_diagonal(weight, 0)
    weight /= weight.sum()
    likelier, higher = star[:, None] > star, r[:, None] > r
    assert row['optimum_margin'] == pytest.approx(weight[higher].sum())
    assert row['optimum_likelihood'] == pytest.approx(weight[likelier].sum())
    assert row['optimum_hidden'] == pytest.approx(weight[higher & ~likelier].sum())
    assert row['reference_likelihood'] == pytest.approx(weight[rho[:, None] > rho].sum())
    assert 0 < row['dpo_hidden'] < row['dpo_margin'] and len(gap) == len(h) == len(best)


def test_chi_po_is_phi_of_the_ratio_and_is_dpo_where_ratios_are_small():
    u_w, u_l = torch.tensor([0.3]).double(), torch.tensor([-0.7]).double()
    margin = 0.4 * ((math.exp(0.3) + 0.3) - (math.exp(-0.7) - 0.7))
    assert pathologies_gpt.chi_po(u_w, u_l, 0.4).item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-6)
    far = pathologies_gpt.chi_po(u_w - 30, u_l - 30, 0.4), pathologies.logistic(u_w, u_l, 0.4)
    assert far[0].item() == pytest.approx(far[1].item(), abs=1e-6)


def test_the_covered_world_says_its_language_and_one_pass_sees_each_pair_once():
    world, said = pathologies_gpt.covered_world(1, steps=60)
    inside = (world.rho.exp() * said).sum(-1)
    assert (inside > 0.3).all() and (world.reward[~said] == pathologies_gpt.BAD).all()
    pairs = tuple(torch.zeros(35, dtype=torch.long) for _ in range(3))
    assert len(list(pathologies_gpt.one_pass(world, pairs, pathologies.logistic, 0.1, 1e-3))) == 4      # 3 steps


@pytest.fixture(scope='module')
def world():
    return sentences.Sentences(3, steps=40)


def test_probabilities_of_all_sentences_sum_to_one_and_equal_one_sentence_at_a_time(world):
    policy = world.policy()
    for parameter in policy.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    prefix, total = world.logps(policy)
    assert total.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for row, fillers in itertools.product((0, 37, 63), (0, 4, sentences.LONGEST)):
        ids = [sentences.FIRST + w for w in world.words[row].tolist()] + [sentences.FILLER] * fillers + [sentences.END]
        expected = 0.0
        for t in range(len(ids)):
            tokens = torch.tensor([[sentences.START, *ids[:t]]])
            mask = torch.ones(1, 1, t + 1, t + 1, dtype=torch.bool).tril()
            logits = policy(tokens, torch.arange(t + 1)[None], mask)[0, -1] @ policy.wte.weight.T
            legal = range(sentences.FIRST, len(logits)) if t < sentences.SLOTS else [sentences.FILLER, sentences.END]
            legal = legal if t < world.tokens.shape[1] - 1 else [sentences.END]
            if t == len(ids) - 1:
                assert prefix[row, fillers].item() == pytest.approx(expected, abs=1e-10)
            expected += logits[ids[t]].item() - torch.logsumexp(logits[list(legal)], 0).item()
        assert total[row, fillers].item() == pytest.approx(expected, abs=1e-10)
        assert world.lengths[row, fillers] == len(ids)


def test_desensitised_logps_count_the_tokens_beyond_the_shorter_side_alpha_times(world):
    pairs = world.sample_pairs(200, 0.1, torch.Generator().manual_seed(1))
    found = sentences.desensitised(world.prefix_rho, world.rho, world.lengths, pairs, 0.3)
    for (w, l), row in zip(pairs.tolist(), found.tolist()):
        for this, other, value in ((w, l, row[0]), (l, w, row[1])):
            r, fillers, others = this // STRIDE, this % STRIDE, other % STRIDE
            whole = world.rho[r, fillers].item()
            if fillers > others:            # the shorter side has SLOTS words, its fillers and an end
                kept = world.prefix_rho[r, others + 1].item()
                whole = kept + 0.3 * (whole - kept)
            assert value == pytest.approx(whole, abs=1e-12)


def test_pairs_follow_reward_and_length(world):
    pairs = world.sample_pairs(40_000, 0.2, torch.Generator().manual_seed(2))
    score = (world.reward + 0.2 * world.lengths).flatten()
    p, q = world.rho.flatten().exp().numpy(), score.numpy()
    weight = p[:, None] * p / (1 + np.exp(q - q[:, None]))
    np.fill_diagonal(weight, 0)
    weight /= weight.sum()
    for value in (world.lengths.flatten().numpy(), world.reward.flatten().numpy()):
        difference = value[:, None] - value
        mean = (weight * difference).sum()
        error = math.sqrt((weight * (difference - mean) ** 2).sum() / len(pairs))
        assert np.mean(value[pairs[:, 0]] - value[pairs[:, 1]]) == pytest.approx(mean, abs=4 * error)


def test_a_crossing_is_on_the_line_between_two_points():
    curve = [dict(reward=sentences.LEVEL - 1, length=4.0), dict(reward=sentences.LEVEL + 3, length=8.0)]
    assert sentences.crossing(curve) == 5.0 and math.isnan(sentences.crossing(curve[:1]))


def test_a_run_writes_table_figure_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {'displacement': dict(steps=1), 'over_optimisation': dict(n=200),
             'lengths': dict(n=300, rate=3e-3, steps=12)}
    for name, knobs in small.items():
        monkeypatch.setattr(pathologies, name, functools.partial(getattr(pathologies, name), **knobs))
    pathologies.main(['--seeds=2', '--pairs=10', '--worlds=50', '--out=few'])
    assert (tmp_path / 'few.md').read_text() in capsys.readouterr().out
    report = json.loads((tmp_path / 'few.json').read_text())
    assert (tmp_path / 'few.png').stat().st_size > 10_000 and len(report['accuracy']) == 6
    assert all(isinstance(rows, list) for rows in report.values()) and str(tmp_path) not in json.dumps(report)
    mean, half = pathologies_figure.interval([1, 2, 3])
    assert mean == 2 and half == pytest.approx(4.30 / math.sqrt(3))
    for flags in (['--seed=1'], ['--seeds=1'], ['--out=no/such/x']):
        with pytest.raises(SystemExit) as caught:
            pathologies.main(flags)
        assert caught.value.code.startswith('error: ') and '\n' not in caught.value.code
