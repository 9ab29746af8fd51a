"""repro/delta.py: which pairs it takes, against a search over all, and a run as a user makes it."""
import itertools
import json

import numpy as np
import pytest

import delta

REWARD = '''
def reward(prompts, responses):
    return [sum(map(ord, r)) % 7 for r in responses]

def metrics(prompts, responses):
    return {"well_formed": [True] * len(prompts)}
'''


def test_pairs_lie_in_their_band_one_a_row_and_each_fitting_pair_has_its_chance():
    quality = np.random.default_rng(0).normal(0, 1.5, (30, 4))
    band, seen = (-1.5, -0.5), set()
    for seed in range(200):
        pairs = delta.pairs_of(quality, band, np.random.default_rng(seed))
        assert len(set(pairs[:, 0].tolist())) == len(pairs)
        seen |= set(map(tuple, pairs.tolist()))
    fitting = {(i, w, l) for i in range(30) for w, l in itertools.permutations(range(4), 2)
               if -1.5 <= quality[i, w] < -0.5 and quality[i, w] >= quality[i, l] + delta.GAP}
    assert seen == fitting


def test_a_run_writes_its_files_and_gains_are_measured_from_the_model_before(experiment, monkeypatch, capsys):
    (experiment / 'reward.py').write_text(REWARD)
    monkeypatch.setattr(delta, 'BANDS', ((0.0, 2.0), (-2.0, 0.0)))
    delta.main(['--name=tiny', '--reward=reward.py', '--seeds=2', '--prompts=40', '--held_out=6', '--batch_size=4',
                '--out=few'])
    said = capsys.readouterr().out
    assert (experiment / 'few.md').read_text() in said and (experiment / 'few.png').stat().st_size > 10_000
    report = json.loads((experiment / 'few.json').read_text())
    assert len(report['runs']) == 2 * 2 * 2
    for row in report['runs']:
        assert row['gain'] == pytest.approx(row['true_reward'] - report['before']['true_reward'])
        assert row['band'][0] <= row['chosen'] < row['band'][1] and row['rejected'] <= row['chosen'] - delta.GAP
    by_method = {method: [row for row in report['runs'] if row['method'] == method] for method in ('DPO', 'SFT')}
    assert [row['pairs'] for row in by_method['DPO']] == [row['pairs'] for row in by_method['SFT']]
    with pytest.raises(SystemExit) as caught:
        delta.main(['--name=tiny', '--reward=reward.py', '--prompts=2', '--batch_size=8'])
    assert 'raise --prompts' in caught.value.code
