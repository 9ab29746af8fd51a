"""The baselines and the sweep of repro/: arithmetic against independent computations, scripts as a user runs them."""
import importlib
import json
import math
import os
import random

import numpy as np
import pytest
import torch

from conftest import random_groups, read_log, run_stage, small_gpt
import dpo
import frontier
import offline
import ppo
import reward_model
import sweep
from best_of_n import best_of_n
from config import UserError, reviews
from dpo import dpo_loss, response_logps
from nanodpo.data import Sampled, pack


def lists(n, K, seed):
    """n random groups of K responses, lists of ids."""
    return [[[int(t) for t in piece] for piece in group] for group in random_groups(n, K, np.random.default_rng(seed))]


@torch.no_grad()
def states_of(model, prompt, response):
    """Hidden states of one sequence by itself: (T, C)."""
    tokens = torch.tensor([prompt + response])
    T = tokens.shape[1]
    return model(tokens, torch.arange(T)[None], torch.ones(1, 1, T, T, dtype=torch.bool).tril())[0]


# --- offline.py: K responses, all their pairs -----------------------------------------------------

PAIR_LOSSES = {     # of all pairs at once, and of the pair (w, l)
    'dpo': (lambda logps, ref: offline.dpo_losses(logps, ref, 0.3),
            lambda w, l, ref_w, ref_l: dpo_loss(w[None], l[None], ref_w[None], ref_l[None], 0.3)[0][0]),
    'unlikelihood': (lambda logps, ref: offline.unlikelihood_losses(logps, 0.2), lambda w, l, *_: -w + 0.2 * l),
    'preferred_ft': (lambda logps, ref: offline.preferred_ft_losses(logps), lambda w, l, *_: -w),
    'unweighted': (lambda logps, ref: offline.unweighted_losses(logps, 0.3), lambda w, l, *_: -0.3 * (w - l)),
}


@pytest.mark.parametrize('name', PAIR_LOSSES)
def test_losses_of_all_pairs_of_four_responses_equal_pair_by_pair(name):
    at_once, of_pair = PAIR_LOSSES[name]
    batch = pack(Sampled(lists(5, 4, 0)), list(range(5)))
    rewards = np.random.default_rng(0).integers(0, 3, (5, 4))           # with ties
    better = torch.tensor(rewards[:, :, None] > rewards[:, None, :])
    with torch.no_grad():
        logps, ref = (response_logps(small_gpt(seed), batch) for seed in (0, 1))
    expected = [of_pair(logps[g, i], logps[g, j], ref[g, i], ref[g, j]) for g, i, j in better.nonzero().tolist()]
    torch.testing.assert_close((at_once(logps, ref) * better).sum(), torch.stack(expected).sum(), rtol=1e-5, atol=1e-5)


def test_unweighted_gradient_is_that_of_dpo_without_its_weight():
    policy, ref = torch.randn(2, 6, 2, dtype=torch.float64)
    policy.requires_grad_()
    beta, pair = 0.7, (slice(None), 0, 1)
    dpo, = torch.autograd.grad(offline.dpo_losses(policy, ref, beta)[pair].sum(), policy)
    unweighted, = torch.autograd.grad(offline.unweighted_losses(policy, beta)[pair].sum(), policy)
    h = (policy - ref)[:, 0] - (policy - ref)[:, 1]
    weight = torch.sigmoid(-beta * h).detach()[:, None]
    torch.testing.assert_close(dpo, unweighted * weight, rtol=1e-6, atol=1e-7)


def test_training_takes_the_gradient_of_the_mean_over_the_pairs_of_a_batch():
    """One step in rows of a few tokens against autograd on all pairs at once: with AdamW's first step, sign by sign."""
    groups = Sampled(lists(6, 3, 1))
    rewards = np.random.default_rng(2).integers(0, 3, (6, 3))
    better = rewards[:, :, None] > rewards[:, None, :]
    models = small_gpt(3), small_gpt(3)

    def losses_of(model, batch):
        return offline.unlikelihood_losses(response_logps(model, batch), 0.5)

    (step, loss, norm), = offline.train(models[0], lambda batch: losses_of(models[0], batch), groups, better,
                                        steps=1, batch_size=6, learning_rate=1e-3, warmup_steps=1, seed=0)
    losses = losses_of(models[1], pack(groups, list(range(6))))
    expected = (losses * torch.tensor(better)).sum() / better.sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.cat([p.grad.flatten() for p in models[1].parameters()])
    assert norm == pytest.approx(gradients.norm().item(), rel=1e-4)
    moves = torch.cat([(p - q).detach().flatten() for p, q in zip(*(m.parameters() for m in models))])
    sure = gradients.abs() > 1e-4 * norm
    assert sure.sum() > 1000 and (moves.sign() == -gradients.sign())[sure].all()


# --- reward_model.py ------------------------------------------------------------------------------

def test_packed_rewards_equal_one_response_at_a_time():
    groups = lists(6, 3, 4)
    model = reward_model.RewardModel.from_policy(small_gpt(2))
    torch.nn.init.normal_(model.reward.weight)
    rewards = reward_model.all_rewards(model, Sampled(groups))
    for of_group, (prompt, *responses) in zip(rewards, groups):
        expected = [(states_of(model, prompt, r)[-1] @ model.reward.weight[0]).item() for r in responses]
        assert of_group == pytest.approx(expected, abs=1e-4)


def test_accuracy_and_calibration_by_hand():
    margins = np.array([0.1, -0.1, 3.0, 3.2, 3.05, -3.1, 0.0])
    found = reward_model.judge(margins)
    assert found['accuracy'] == pytest.approx((4 + 0.5) / 7)
    assert found['log_loss'] == pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in margins]))
    gap = 0
    for xs in (margins[abs(margins) < 1], margins[abs(margins) >= 1]):
        says = np.mean([1 / (1 + math.exp(-abs(x))) for x in xs])
        gap += len(xs) * abs(says - np.mean([0.5 if x == 0 else x > 0 for x in xs]))
    assert found['calibration_error'] == pytest.approx(gap / 7)
    low, high = reward_model.interval(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))       # Wilson's, tabled


# --- ppo.py ---------------------------------------------------------------------------------------

def test_advantages_are_the_double_sum_of_the_paper():
    g = torch.Generator().manual_seed(0)
    lengths, lam = [4, 1, 6], 0.9
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(3, 6, generator=g, dtype=torch.float64) * mask for _ in range(2))
    advantages, returns = ppo.advantages_and_returns(rewards, values, mask, lam)
    for i, n in enumerate(lengths):
        r, v = rewards[i, :n].tolist(), values[i, :n].tolist() + [0.0]
        for t in range(n):
            expected = sum(lam ** (k - t) * (r[k] + v[k + 1] - v[k]) for k in range(t, n))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[i, t].item() == pytest.approx(expected + v[t], abs=1e-12)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    monte_carlo, _ = ppo.advantages_and_returns(rewards, values, mask, 1.0)
    assert monte_carlo[0, 0].item() == pytest.approx(rewards[0, :4].sum().item() - values[0, 0].item(), abs=1e-12)


def test_clipped_losses_case_by_case():
    logps = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    values = torch.tensor([1.0, 0.1, -1.0, 0.0, 0.5], requires_grad=True)
    zeros, returns = torch.zeros(5), torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0])
    policy_losses, value_losses = ppo.clipped_losses(logps, zeros, advantages, values, zeros, returns, 0.2)
    torch.testing.assert_close(policy_losses, torch.tensor([-1.2, 1.5, -0.5, 0.8, -2.2]))
    torch.testing.assert_close(value_losses, 0.5 * torch.tensor([1.8, 1.9, 3.0, 2.0, 0.5]) ** 2)
    policy_losses.sum().backward()
    assert (logps.grad != 0).tolist() == [False, True, True, False, True]       # what is clipped pulls no further
    value_losses.sum().backward()
    assert (values.grad != 0).tolist() == [False, True, True, True, True]


def test_tokens_side_by_side_are_those_of_each_rollout():
    groups = lists(7, 1, 5)
    model, lengths = small_gpt(1), torch.tensor([[len(response)] for _, response in groups])
    mask = torch.arange(21) < lengths
    logps = ppo.side_by_side(ppo.target_logps, model, Sampled(groups), mask)
    for i, (prompt, response) in enumerate(groups):
        alone = (states_of(model, prompt, response) @ model.wte.weight.t()).log_softmax(-1)
        expected = [alone[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
        np.testing.assert_allclose(logps[i, :len(response)], expected, atol=1e-4)
        assert (logps[i, len(response):] == 0).all()


# --- best_of_n.py and the grammar's frontier ------------------------------------------------------

def test_best_of_n_blocks():
    chooser, values = np.array([[1.0, 3.0, 2.0, 0.0]]), np.array([[10.0, 20.0, 30.0, 40.0]])
    assert [best_of_n(chooser, values, n).tolist() for n in (1, 2, 4)] == [[25.0], [25.0], [20.0]]


def test_the_grammars_frontier_is_that_of_its_own_samples_reweighted():
    """Importance weights exp(r / beta) on the grammar's samples; within 5 standard errors, by the delta method."""
    rng, start = random.Random(0), 'The Paper Clock is a superb '
    rewards = np.array(reviews.reward([''] * 20000, [reviews.review(rng, start)[0] for _ in range(20000)]))
    for beta in (4.0, 1.5):
        (kl, reward), = frontier.grammar_frontier([start], [beta])
        weights = np.exp(rewards / beta)
        weights /= weights.mean()
        estimate = (weights * rewards).mean()
        error = (weights * (rewards - estimate)).std() / math.sqrt(len(rewards))
        assert abs(reward - estimate) < 5 * error and error < 0.05
        log_z = math.log(np.exp(rewards / beta).mean())
        kl_error = error / beta + weights.std() / math.sqrt(len(rewards))
        assert kl == pytest.approx(estimate / beta - log_z, abs=5 * kl_error)


# --- the scripts ----------------------------------------------------------------------------------

@pytest.fixture
def tiny(experiment):
    """The experiment `tiny` with a reward file, reward.py."""
    (experiment / 'reward.py').write_text(
        'def reward(prompts, responses):\n    return [sum(c < "a" for c in r) / 4 - len(r) / 8 for r in responses]\n'
        'def metrics(prompts, responses):\n    return {"well_formed": [True] * len(prompts)}\n')
    return experiment


def run_main(script, *flags):
    importlib.import_module(script).main(['--name=tiny', *flags])


def test_the_pipeline_that_dpo_replaces_runs_and_learns_and_figures_show_what_was_logged(tiny):
    out = run_stage('repro/reward_model.py', '--name=tiny', '--batch_size=8', '--epochs=3',
                    '--learning_rate=3e-3').stdout
    by_reward_model = read_log('out/tiny/reward_model')[-1]
    assert by_reward_model['loss'] < 0.6 and '10 validation pairs: accuracy' in out         # ln 2 at the start
    assert reward_model.RewardModel.from_checkpoint('out/tiny/reward_model').reward.weight.norm() > 0
    run_stage('repro/ppo.py', '--name=tiny', '--reward=reward.py', '--steps=16', '--batch_size=48', '--target_kl=20',
              '--learning_rate=3e-3', '--kl_coef=0.05', '--max_new_tokens=12', '--eval_interval=16',
              '--eval_prompts=10')
    log = read_log('out/tiny/ppo')
    scores = [row['score'] for row in log if 'score' in row]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.5
    assert log[0] == {'step': 0, 'eval/score': log[0]['eval/score'], 'eval/kl': 0.0} and log[-1]['eval/kl'] > 0.1
    out = run_stage('sample.py', '--name=tiny', '--after=out/tiny/ppo', '--num_prompts=2', '--max_new_tokens=5').stdout
    assert 'AFTER' in out
    run_main('ppo', '--reward=out/tiny/reward_model', '--steps=1', '--batch_size=8', '--eval_prompts=4')
    out = run_stage('repro/best_of_n.py', '--name=tiny', '--reward=out/tiny/reward_model', '--true_reward=reward.py',
                    '--n=4', '--num_prompts=5').stdout
    assert len(out.splitlines()) == 5 and 'true reward' in out
    run_main('offline', '--method=unlikelihood', '--max_steps=2', '--batch_size=8')
    assert read_log('out/tiny/unlikelihood')[-1]['step'] == 2
    dpo.main(['--name=tiny', '--batch_size=16', '--compile=False'])
    run_main('accuracy', '--out=accuracy')
    table = (tiny / 'accuracy.md').read_text()
    assert f"| {read_log('out/tiny/dpo')[-1]['eval/rewards/accuracies']:.3f} |" in table
    assert f"| {by_reward_model['eval/accuracy']:.3f} |" in table
    run_main('gradient', '--reward=reward.py', '--batch_size=24', '--evaluations=2', '--held_out=4', '--out=gradient')
    runs = json.load(open('gradient.json'))
    assert [p['step'] for p in runs['dpo']] == [p['step'] for p in runs['unweighted']] == [0, 1, 2]
    assert runs['dpo'][0]['chosen'] == runs['unweighted'][0]['chosen'] != runs['dpo'][2]['chosen']
    assert min(os.path.getsize(f) for f in ('accuracy.png', 'gradient.png')) > 10_000


def test_a_sweep_goes_on_where_it_stopped(tiny, monkeypatch, capsys):
    few = {'ppo': [{'target_kl': 6.0}], 'ppo_gt': [{'target_kl': 6.0}], 'preferred_ft': [{}], 'best_of_n': [{}]}
    monkeypatch.setattr(frontier, 'GRID', {'dpo': [{'beta': 1.0, 'learning_rate': 6e-4}], **few})
    monkeypatch.setattr(frontier, 'NS', (1, 2, 4))

    flags = ['--reward=reward.py', '--seeds=1', '--prefixes=16', '--rounds=1', '--held_out=4', '--evaluations=2',
             '--workers=2', '--out=sweep']
    run_main('frontier', *flags)
    results = json.load(open('sweep.json'))
    assert '7 runs, 0 of them done before' in capsys.readouterr().out
    methods = ['data', 'reward_model', 'dpo', 'ppo', 'ppo_gt', 'preferred_ft', 'best_of_n']
    assert [r['job']['method'] for r in results] == methods
    assert all(math.isfinite(p['kl']) for r in results[2:] for p in r['points'])
    assert os.path.getsize('sweep.png') > 10_000
    done, = (tiny / 'out/tiny/frontier/seed-1').glob('dpo*.json')
    done.unlink()
    run_main('frontier', *flags)
    assert '7 runs, 6 of them done before' in capsys.readouterr().out
    assert json.load(open('sweep.json'))[2]['points'] == results[2]['points']       # the same numbers, run again
    run_main('temperature', '--reward=reward.py', '--held_out=2', '--samples=1', '--workers=2', '--out=heat')
    curves = json.load(open('heat.json'))['curves']
    assert set(curves) >= {'SFT', 'best of 128', 'DPO, beta 1'}
    assert all(0 <= mean <= 1 for points in curves.values() for mean, _ in points)
    assert curves['best of 1'][0] == curves['SFT'][0]       # both greedy


@pytest.mark.parametrize('value, lines', [
    ([{'a': 1, 'b': [1, 2]}, {'a': 2}], 4), ([], 1), ({0: [{'a': 1}], 'curves': {'a': [[1, None]]}, 'name': 'é'}, 7)])
def test_results_are_json_with_a_record_a_line(tmp_path, value, lines):
    sweep.write_json(tmp_path / 'a.json', value)
    text = (tmp_path / 'a.json').read_text()
    assert json.loads(text) == json.loads(json.dumps(value)) and len(text.splitlines()) == lines


def test_a_mistake_ends_in_one_line(experiment):
    nowhere = 'nowhere holds no checkpoint: run repro/reward_model.py first'
    for script, args, message in [
            ('ppo', [], 'reward is not set'), ('ppo', ['--reward=nowhere'], nowhere),
            ('ppo', ['--reward=out/tiny/sft'], 'is no reward model'),
            ('best_of_n', ['--reward=nowhere.py'], 'reward file nowhere.py'),
            ('offline', ['--init_from=nowhere'], 'nowhere holds no checkpoint'),
            ('frontier', ['--held_out=50'], 'distinct prompts in val'),
            ('temperature', [], 'run repro/frontier.py first'),
            ('accuracy', [], 'run dpo.py and repro/reward_model.py'),
            ('gradient', ['--name=other'], 'data/other/meta.json does not exist')]:
        with pytest.raises(UserError) as error:
            run_main(script, *args)
        assert message in error.value.message
    done = run_stage('repro/ppo.py', '--name=tiny', '--reward=nowhere', check=False)
    assert done.returncode == 1 and done.stderr.strip().splitlines() == [f'error: {nowhere}']
