"""Pairs drawn from a policy: what is written is what independent drawing, scoring and pairing of the prompts gives."""
import os
import shutil

import numpy as np
import pytest
import torch

from config import UserError
from conftest import random_groups, run_ranks, run_stage, small_gpt
from nanodpo import checkpoint
from nanodpo.data import Groups, Sampled, read_meta
from nanodpo.text import load_tokenizer
import draw_prefs
import iterative
from draw_prefs import open_reward, pair_up, write_set
from reward_model import RewardModel, all_rewards
from sweep import path_of


def fingerprint(path):
    return checkpoint.fingerprint(checkpoint.load_model(path))


def as_lists(groups):
    return [[piece.tolist() for piece in group] for group in groups]


def content(folder):
    return {name: open(os.path.join(folder, name), 'rb').read() for name in os.listdir(folder)}


def test_written_groups_are_read_back_and_replace_a_set_whole_or_not_at_all(experiment):
    rng = np.random.default_rng(1)
    splits = {'train': random_groups(30, 3, rng), 'val': random_groups(5, 3, rng, ends=False)}
    meta = write_set('data/three', 'data/tiny', splits, {'train': {'tied': 4}}, who='me')
    for split, groups in splits.items():
        assert as_lists(Groups('data/three', split)) == groups
    assert Groups('data/three', 'train').vocabulary == Groups('data/tiny', 'train').vocabulary
    assert meta == read_meta('data/three') and meta['who'] == 'me' and meta['max_length'] == 64
    assert meta['splits']['train']['read'] == 34 and meta['splits']['val']['dropped'] == {}
    cut = sum(piece[-1] != 256 for group in splits['val'] for piece in group[1:])
    assert [meta['splits'][split]['truncated']['responses'] for split in splits] == [0, cut] and cut > 0
    before = content('data/three')
    with pytest.raises(SystemExit, match='max_length'):
        write_set('data/three', 'data/tiny', splits | {'val': [[[1] * 60, [2] * 5, [3], [4]]]})
    assert before == content('data/three')


# --- pairs ----------------------------------------------------------------------------------------

def test_pairs_equal_a_brute_force_over_rewards_with_ties():
    rng = np.random.default_rng(2)
    rewards = rng.integers(0, 3, (40, 4)).astype(float)
    groups = [[[i], *([i, k] for k in range(4))] for i in range(40)]
    pairs, kept, tied = pair_up(groups, rewards, 'all')
    expected = {(i, w, l) for i in range(40) for w in range(4) for l in range(4) if rewards[i, w] > rewards[i, l]}
    assert len(pairs) == len(expected) and {(p[0], w[1], l[1]) for p, w, l in pairs} == expected
    assert tied == 40 * 6 - len(expected)
    assert [tuple(row) for row in kept] == [(rewards[p[0], w[1]], rewards[p[0], l[1]]) for p, w, l in pairs]
    pairs, kept, tied = pair_up(groups, rewards, 'best_worst')
    spread = [i for i in range(40) if len(set(rewards[i])) > 1]
    assert [p[0] for p, _, _ in pairs] == spread and tied == 40 - len(spread) > 0
    for p, w, l in pairs:
        assert rewards[p[0], w[1]] == max(rewards[p[0]]) and rewards[p[0], l[1]] == min(rewards[p[0]])


REWARD = '''def reward(prompts, responses):
    return [round(sum(map(ord, r)) / 1000, 1) for r in responses]       # rounded: it has ties
'''


@pytest.fixture
def drawn(experiment):
    """The flags of a small drawing in a directory with data/tiny, out/tiny/sft and reward.py."""
    (experiment / 'reward.py').write_text(REWARD)
    return ['--name=drawn', '--source=data/tiny', '--policy=out/tiny/sft', '--reward=reward.py', '--num_samples=3',
            '--max_new_tokens=12', '--batch_size=15']


def read_drawn(split='train'):
    """{prompt: [(chosen, rejected), ...]} of data/drawn, tuples of ids."""
    found = {}
    for prompt, chosen, rejected in as_lists(Groups('data/drawn', split)):
        found.setdefault(tuple(prompt), []).append((tuple(chosen), tuple(rejected)))
    return found


def test_drawn_pairs_are_ranked_by_the_reward_and_best_worst_are_the_ends_of_all(drawn, capsys):
    draw_prefs.main([*drawn, '--pairing=all'])
    everything, meta = read_drawn(), read_meta('data/drawn')
    tokenizer = load_tokenizer('data/drawn', 'tokenizer.json')
    source = {tuple(group[0]) for group in as_lists(Groups('data/tiny', 'train'))}

    def reward(ids):
        return round(sum(map(ord, tokenizer.decode([t for t in ids if t != 256]))) / 1000, 1)
    info = meta['splits']['train']
    assert set(everything) <= source and info['dropped']['tied'] > 0
    assert info['read'] == 3 * len(source) == info['kept'] + info['dropped']['tied']
    assert all(reward(w) > reward(l) for pairs in everything.values() for w, l in pairs)
    pieces = [(p, ids) for p, pairs in everything.items() for pair in pairs for ids in pair]
    for prompt, ids in pieces:          # whole, or as long as may be
        assert 256 not in ids[:-1] and (ids[-1] == 256 and len(ids) <= 12 or len(ids) == min(12, 64 - len(prompt)))
    assert info['truncated']['responses'] == sum(ids[-1] != 256 for _, ids in pieces) > 0
    chosen = np.mean([reward(w) for pairs in everything.values() for w, _ in pairs])
    assert meta['rewards']['train']['chosen'] == pytest.approx(chosen)
    assert meta['policy_fingerprint'] == fingerprint('out/tiny/sft') and meta['pairing'] == 'all'
    draw_prefs.main(drawn)
    ends = read_drawn()
    assert set(ends) == set(everything) and all(len(pairs) == 1 for pairs in ends.values())
    for prompt, [ranked] in ends.items():
        best, worst = zip(*everything[prompt])
        assert tuple(map(reward, ranked)) == (max(map(reward, best)), min(map(reward, worst)))
    assert read_drawn('val').keys() <= {tuple(group[0]) for group in as_lists(Groups('data/tiny', 'val'))}
    text, mean = capsys.readouterr().out, read_meta('data/drawn')['rewards']['train']['samples']
    assert 'dropped: tied' in text and f'mean reward, train: {mean:+.3f} samples' in text


def test_two_processes_draw_what_one_does_and_only_a_change_draws_again(drawn, experiment, capsys):
    draw_prefs.main(drawn)
    one, before = capsys.readouterr().out, content('data/drawn')
    shutil.rmtree('data/drawn')
    two = run_stage('repro/draw_prefs.py', *drawn, cwd=experiment, processes=2)
    assert content('data/drawn') == before and 'Traceback' not in two.stderr
    assert one.splitlines()[:-1] == two.stdout.splitlines()[:-1]                        # but for the seconds

    def last_line(*flags):
        draw_prefs.main([*drawn, *flags])
        return capsys.readouterr().out.splitlines()[-1]
    assert 'is reused' in last_line() and content('data/drawn') == before
    (experiment / 'reward.py').write_text(REWARD.replace('1000', '900'))
    assert 'is ready' in last_line() and content('data/drawn') != before
    before = content('data/drawn')
    checkpoint.save('out/tiny/sft', 2, small_gpt(7), {})
    assert 'is ready' in last_line() and content('data/drawn')['train.bin'] != before['train.bin']
    assert 'is ready' in last_line('--seed=2') and 'is ready' in last_line('--seed=2', '--temperature=0.9')
    prompts = []
    for seed in (1, 2):
        assert 'is ready' in last_line('--num_prompts=12', f'--seed={seed}')
        assert [i['read'] for i in read_meta('data/drawn')['splits'].values()] == [12, 10]
        prompts.append(set(read_drawn()))
    assert prompts[0] != prompts[1]


def test_copies_of_a_response_are_tied_whatever_a_noisy_judge_says(drawn, experiment):
    (experiment / 'reward.py').write_text('def reward(prompts, responses):\n    return list(range(len(responses)))\n')
    draw_prefs.main([*drawn, '--temperature=0.2', '--pairing=all'])     # so sharp that samples are often the same
    assert read_meta('data/drawn')['splits']['train']['dropped']['tied'] > 0
    assert all(w != l for pairs in read_drawn().values() for w, l in pairs)


def test_a_reward_models_rewards_equal_one_response_at_a_time(experiment):
    groups = [[[int(t) for t in piece] for piece in group] for group in random_groups(6, 3, np.random.default_rng(4))]
    model = RewardModel.from_policy(small_gpt(2))
    torch.nn.init.normal_(model.reward.weight)
    tiny = Groups('data/tiny', 'train')
    checkpoint.save('out/rm', 1, model, dict(vocabulary=tiny.vocabulary))
    found = open_reward('out/rm', tiny, torch.device('cpu'))(groups)
    np.testing.assert_array_equal(found, all_rewards(model, Sampled(groups)))
    for (prompt, *responses), rewards in zip(groups, found):
        for response, reward in zip(responses, rewards):
            T = len(prompt + response)
            causal = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
            states = model(torch.tensor([prompt + response]), torch.arange(T)[None], causal)
            assert reward == pytest.approx((states[0, -1] @ model.reward.weight[0]).item(), abs=1e-4)


# --- mistakes -------------------------------------------------------------------------------------

@pytest.mark.parametrize('flag, message', [
    ('--source=', 'source, policy and reward must be set'), ('--reward=nowhere.py', 'reward nowhere.py is neither'),
    ('--reward=empty.py', 'defines no function reward(prompts, responses)'),
    ('--reward=short.py', 'true_reward must be 144 finite numbers'), ('--reward=nan.py', 'must be 1 finite numbers'),
    ('--reward=flat.py', 'no pairs for train: all 3 samples of each of its 48 prompts have equal rewards'),
    ('--reward=out/foreign', 'was trained with another tokenizer'), ('--policy=nowhere.pt', 'nowhere.json'),
    ('--policy=out/foreign', 'is no checkpoint, and no directory or hub name of weights'),
    ('--policy=out/other', 'was trained with another tokenizer'), ('--source=out', 'out/meta.json does not exist'),
    ('--source=nowhere', "source='nowhere' must be a prepared set"), ('--name=tiny', 'data/tiny would be replaced'),
    ('--num_samples=1', 'is out of range'), ('--temperature=0', 'is out of range'), ('--pairing=some', 'one of')])
def test_a_mistake_ends_in_one_line_and_leaves_the_set(drawn, experiment, flag, message):
    write_set('data/drawn', 'data/tiny', {'train': [[[1], [2], [3]]], 'val': [[[1], [2], [3]]]})
    before = content('data/drawn')
    (experiment / 'empty.py').write_text('')
    for name, value in dict(short='[0.0]', flat='[0] * len(r)', nan='[float("nan")] * len(r)').items():
        (experiment / f'{name}.py').write_text(f'def reward(p, r):\n    return {value}\n')
    checkpoint.save('out/foreign', 1, RewardModel.from_policy(small_gpt(2)), dict(vocabulary='gpt2'))
    checkpoint.save('out/other', 1, small_gpt(2), dict(vocabulary='gpt2'))
    with pytest.raises(UserError) as error:
        draw_prefs.main([*drawn, flag])
    assert message in error.value.message and '\n' not in error.value.code
    assert content('data/drawn') == before and not [f for f in os.listdir('data') if f not in ('tiny', 'drawn')]


def test_an_error_of_rank_0_ends_all_and_draws_nothing(drawn):
    said = run_ranks('draw_prefs', [[*drawn, '--reward=out/tiny/sft']] * 2)
    line = 'out/tiny/sft/step-000001.pt is no reward model: run repro/reward_model.py'
    assert said[0].startswith(f'error: {line}') and line in said[1] and not os.path.exists('data/drawn')


# --- repro/iterative.py ---------------------------------------------------------------------------

def test_rounds_draw_new_prompts_from_the_last_policy_at_equal_pairs_and_steps(drawn, experiment):
    common = {'name': 'tiny', 'reward': str(experiment / 'reward.py'), 'folder': 'runs', 'rounds': 2, 'prompts': 16,
              'num_samples': 3, 'beta': 0.1, 'learning_rate': 1e-3, 'epochs': 1, 'batch_size': 8, 'held_out': 4}
    jobs = {way: {'method': way, 'seed': 1, 'common': common} for way in iterative.LABELS}
    points = {}

    def drawn_by(way, name):
        return as_lists(Groups(f'{path_of(jobs[way])}/data/{name}', 'train'))
    for way, job in jobs.items():
        os.makedirs(path_of(job))
        points[way] = iterative.work(job, [])['points']
        assert os.getcwd() == str(experiment)
        assert [p['steps'] for p in points[way]] == [0, 2, 4] and points[way][0]['kl'] == 0 != points[way][2]['kl']
        first, second = ({tuple(group[0]) for group in drawn_by(way, f'round-{r}')} for r in (1, 2))
        assert not first & second                   # other prompts in every round
    sft, start = fingerprint('out/tiny/sft'), fingerprint(path_of(jobs['moved']) + '/out/round-1/dpo')
    assert sft != start
    for way, sampler, reference in (('fixed', start, sft), ('moved', start, start), ('offline', sft, sft)):
        run = path_of(jobs[way])
        trained = 'rounds-1-to-2' if way == 'offline' else 'round-2'
        assert read_meta(f'{run}/data/round-2')['policy_fingerprint'] == sampler
        assert checkpoint.load_model(f'{run}/out/{trained}/dpo').record['origin']['reference'] == reference
    assert points['fixed'][1] == points['moved'][1] == points['offline'][1]     # until then they are the same
    assert drawn_by('offline', 'rounds-1-to-2') == drawn_by('offline', 'round-1') + drawn_by('offline', 'round-2')
    results = [{'job': jobs[way], 'points': points[way]} for way in points]
    gap = points['fixed'][2]['true_reward'] - points['offline'][2]['true_reward']
    assert f'{gap:+.2f} and ' in iterative.table(results).splitlines()[-2]
    iterative.figure(results, np.zeros((2, 2)), 'figure.png')
    assert os.path.getsize('figure.png') > 10_000
    with pytest.raises(UserError, match='48 distinct prompts in train, 2,000 are needed'):
        iterative.main(['--name=tiny', '--reward=reward.py'])
