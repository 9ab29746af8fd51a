"""The comparison of losses: its data, its metrics against independent computations, all of it on a tiny task."""
import json
import math
import os

import numpy as np
import pytest
import torch

from conftest import ROOT, read_log, small_gpt
import dpo
import family
import sweep
from config import UserError
from nanodpo import checkpoint
from nanodpo.data import Groups, epoch_order
from nanodpo.losses import LOSSES
from rollout import Task
from test_exact import one_at_a_time

REWARD = '''def reward(prompts, responses):
    return [(sum(map(ord, p + r)) % 997) / 100 for p, r in zip(prompts, responses)]
'''
METRICS = 'def metrics(prompts, responses):\n    return {"well_formed": [len(r) % 2 == 0 for r in responses]}\n'


@pytest.fixture
def task(experiment):
    (experiment / 'reward.py').write_text(REWARD + METRICS)
    return Task('tiny', 'reward.py')


def rewards_of(prompt, responses):
    def text(ids):
        return bytes(int(t) for t in ids if t != 256).decode(errors='replace')
    return [(sum(map(ord, text(prompt))) + sum(map(ord, text(r)))) % 997 / 100 for r in responses]


# --- data -----------------------------------------------------------------------------------------

def test_pairs_and_rankings_hold_the_same_responses_and_only_train_is_flipped(task):
    common = {'name': 'tiny', 'reward': 'reward.py', 'folder': 'out/tiny/family', 'prefixes': 30, 'val_prefixes': 6,
              'held_out': [0, 4]}
    found = family.work({'method': 'data', 'seed': 3, 'common': common}, [])
    sets = {ending: [Groups(f'data/tiny-family-3{ending}', split) for split in ('train', 'val')]
            for ending in ('', '-flipped', '-few', '-rankings', '-rankings-flipped')}
    parts = {ending: [[tuple(map(int, piece)) for piece in group] for group in train]
             for ending, (train, _) in sets.items()}
    by_prompt = {}
    for prompt, *responses in parts['']:
        assert np.greater(*rewards_of(prompt, responses))
        by_prompt.setdefault(prompt, []).extend(responses)
    assert len(parts['-rankings']) == found['rankings'] >= 20 and len(parts['']) == found['pairs']
    for prompt, *ranked in parts['-rankings']:
        rewards = rewards_of(prompt, ranked)
        assert sorted(ranked) == sorted(by_prompt[prompt])
        assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == 4
    assert parts['-few'] == parts[''][:family.FEW]
    for clean, flipped in (('', '-flipped'), ('-rankings', '-rankings-flipped')):
        turned = [a != b for a, b in zip(parts[clean], parts[flipped], strict=True)]
        assert sum(turned) == round(0.2 * len(turned)) > 3
        assert all(b == ([a[0], *reversed(a[1:])] if t else a) for a, b, t in zip(parts[clean], parts[flipped], turned))
    assert len({(val.fingerprint, val.K) for _, val in sets.values()}) == 1


def test_what_is_flipped_depends_on_the_seed_and_not_on_the_order_of_training():
    """Of any tenth of the first epoch a fifth is flipped; 4.5 percent are 5 standard deviations of 2,000 draws."""
    groups = [[[i], [1], [2]] for i in range(20_000)]
    for seed in (0, 1, 2):
        turned = np.array([a != b for a, b in zip(groups, family.flipped(groups, 0.2, seed))])
        assert turned.sum() == 4000
        for tenth in np.split(turned[epoch_order(len(groups), seed, 0)], 10):
            assert abs(tenth.mean() - 0.2) < 0.045
    a, b, c = (family.flipped(groups, 0.2, seed) for seed in (1, 1, 2))
    assert a == b != c and groups[0] == [[0], [1], [2]]


# --- metrics --------------------------------------------------------------------------------------

def test_a_policy_is_judged_by_the_log_probs_of_its_own_samples(task):
    policy, reference, prompts = small_gpt(5), small_gpt(0), task.prompts('val', 5)
    found = family.judge(task, policy, reference, prompts, 7)
    repeated = [p for p in prompts for _ in range(2)]
    responses = task.draw(policy, repeated, 7)
    with torch.no_grad():
        mine, its = (one_at_a_time(model, list(zip(repeated, responses))).numpy() for model in (policy, reference))
    assert found['entropy'] == pytest.approx(-np.mean(mine), abs=1e-3) and found['entropy'] > 1
    assert found['kl'] == pytest.approx(np.mean(mine) - np.mean(its), abs=1e-3) and found['kl'] > 1
    assert found['tokens'] == np.mean([len(r) for r in responses])
    rewards = [rewards_of(p, [r]) for p, r in zip(repeated, responses)]
    assert found['true_reward'] == pytest.approx(np.mean(rewards))


def test_distinct_3_counts_trigrams_of_words_within_a_text():
    assert family.distinct_3(['A good film. A good', 'a good film!', 'one two']) == 3 / 4       # a good film, again
    words = np.random.default_rng(0).integers(0, 3, (40, 12)).astype(str)
    stacked = np.concatenate([words[:, i:i + 3] for i in range(10)])
    assert family.distinct_3([' '.join(row) for row in words]) == len(np.unique(stacked, axis=0)) / len(stacked)
    assert family.distinct_3(['', 'two words']) == 0


# --- the search and the runs ----------------------------------------------------------------------

def test_the_winner_has_the_highest_mean_reward_of_the_settings_whose_every_run_keeps_to_the_rule():
    def run(beta, reward, kl, formed, seed=0):
        return {'job': {'method': 'dpo', 'seed': seed, 'beta': beta},
                'points': [{'true_reward': 9.0, 'kl': 0.1, 'well_formed': 1.0},
                           {'true_reward': reward, 'kl': kl, 'well_formed': formed}]}
    far, broken, best, less = run(1, 5, 4.1, 0.9), run(2, 4, 3, 0.79), run(3, 3, 4.0, 0.8), run(4, 2, 1, 0.95)
    stopped = {'job': {'method': 'dpo', 'seed': 0, 'beta': 5}, 'points': [], 'stopped': 'not finite'}
    assert family.winner([less, far, best, broken, stopped]) == 'beta 3'
    assert family.winner([far, broken]) is None
    assert family.winner([less, best, run(3, 0.9, 1, 0.9, seed=1), run(4, 2, 1, 0.9, seed=1)]) == 'beta 4'  # 1.95, 2
    assert family.winner([less, best, run(3, 9, 4.1, 0.9, seed=1)]) == 'beta 4'


def test_the_settings_of_the_comparison_won_the_search():
    results = json.loads((ROOT / 'repro/results/family-search.json').read_text())
    for method in family.METHODS:
        runs = [run for run in results if run['job']['method'] == method]
        job = family.by_setting(runs)[family.winner(runs)][0]['job']
        assert family.FOUND[method] == {'beta': job['beta'], 'learning_rate': job['learning_rate']}, method


def test_every_loss_has_settings_a_colour_and_the_shape_of_its_data(monkeypatch):
    assert set(LOSSES) < set(family.METHODS)
    for method in family.METHODS:
        assert family.found(method).keys() == {'beta', 'learning_rate'} and family.colour_of(method).startswith('#')
        assert all(beta > 0 and rate > 0 for beta, rate in family.tried(method))
    assert family.fixed('cdpo') == family.fixed('robust') == {'label_smoothing': 0.2}      # the share that is flipped
    monkeypatch.setitem(LOSSES, 'mine', (*LOSSES['simpo'][:2], dict(beta=0.3, gamma=0.5)))      # new to family.py
    assert family.found('mine') == {'beta': 1.5, 'learning_rate': 1.2e-3} and family.fixed('mine') == {'gamma': 0.5}
    assert family.name_of('mine') == 'mine' and family.colour_of('mine') == family.colour_of('orpo')


def test_dpo_is_a_process_of_its_own_whose_memory_is_not_ours(experiment):
    ballast = bytearray(10**9)          # resident here, and no part of the child
    knobs = {'name': 'tiny', 'loss': 'ipo', 'beta': 0.5, 'max_steps': 1, 'device': 'cpu', 'compile': False}
    seconds, memory, error = family.run_dpo('.', knobs)
    assert seconds > 0.1 and 1e8 < memory < len(ballast) and not error and os.path.isfile('out/tiny/dpo/log.jsonl')
    with pytest.raises(UserError, match='dpo.py failed: .*loss'):
        family.run_dpo('.', {**knobs, 'loss': 'ippo'})


def test_the_comparison_of_two_losses_from_the_draws_to_the_figure(task, experiment, monkeypatch, capsys):
    def run_dpo(folder, knobs):         # here, which saves the start of ten processes
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            dpo.main([f'--{key}={value}' for key, value in knobs.items()])
        return 1.0, 2 * 10**6, ''

    def in_turn(jobs, workers, work, needs, summary):
        results = [sweep.result_of(job) or sweep.do(work, job, needs(job, jobs)) for job in jobs]
        assert all(map(summary, results))
        return results
    for name, value in (('run_dpo', run_dpo), ('sweep', in_turn), ('OVER', ('ipo',)), ('OVER_EPOCHS', (1, 3)),
                        ('METHODS', ['ipo', 'plackett_luce'])):
        monkeypatch.setattr(family, name, value)
    checkpoint.save('out/tiny/sft', 1, small_gpt(0, spread=0.5), dict(config={}, vocabulary=task.train.vocabulary))
    args = ['--name=tiny', '--reward=reward.py', '--seeds=2', '--prefixes=20', '--held_out=4', '--out=compared']
    family.main(args)
    results = json.load(open('compared.json'))
    assert [(r['job']['method'], r['job'].get('labels')) for r in results[:6]] == [
        ('data', None), ('ipo', 'clean'), ('ipo', 'flipped'), ('plackett_luce', 'clean'), ('plackett_luce', 'flipped'),
        ('ipo', 'few')]
    assert all(math.isfinite(value) for r in results for p in r['points'] for value in p.values())
    few = results[5]['points']
    assert [p['epochs'] for p in few] == [1, 3] and few[1]['margin'] > few[0]['margin'] + 0.02       # it learned
    log = read_log(sweep.path_of({**results[5]['job'], 'common': {'folder': 'out/tiny/family'}}))
    margins = [row['eval/rewards/margins'] for row in log if 'eval/loss' in row]
    assert margins[1:] == [p['held_out_margin'] for p in few]       # resumed, one log
    text = open('compared.md').read()
    rewards = [run['points'][-1]['true_reward'] for run in family.runs_of(results, 'ipo', 'flipped')]
    assert f'{np.mean(rewards):+.2f} ± {abs(rewards[0] - rewards[1]) / 2:.2f} |' in text and '| 2 ± 0 |' in text
    assert os.path.getsize('compared.png') > 30_000
    family.main([*args[:-1], '--only=ipo', '--out=one'])
    row = next(line for line in text.splitlines() if line.startswith('| IPO |'))
    assert row in open('one.md').read() and 'Plackett' not in open('one.md').read() and not os.path.exists('one.png')
    for flags, message in ((['--only=ipo,no', '--out=one'], 'only=no: no such loss'), (['--only=ipo'], 'set --out')):
        with pytest.raises(UserError, match=message):
            family.main([*args[:-1], *flags])
    monkeypatch.setattr(family, 'TRIED', dict.fromkeys(family.METHODS, ((0.2, 1e-3), (0.5, 1e-3))))
    family.main(['--search', *args[:-1], '--out=searched'])
    text = open('searched.md').read()
    assert text.count('\n| **') <= 2 and text.count('learning_rate 0.001') >= 4 and 'FOUND = {' in text
    with pytest.raises(UserError, match='held_out=9: .* has 10 distinct prompts in val, and 18 are needed'):
        family.main(['--name=tiny', '--reward=reward.py', '--search', '--held_out=9'])
