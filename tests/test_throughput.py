"""repro/throughput.py: its accounting against an independent count, and what it says when a peer is missing."""
import json
import math

import numpy as np
import pytest

from conftest import run_stage
import throughput


def test_throughput_counts_what_was_computed_and_says_which_peer_is_missing(tmp_path):
    (tmp_path / 'without').mkdir()
    (tmp_path / 'without' / 'trl.py').write_text("raise ModuleNotFoundError(\"No module named 'trl'\", name='trl')\n")
    run_stage('repro/throughput.py', '--model=tiny', '--pairs=16', '--batch_size=4', '--max_length=64', '--epochs=1',
              '--device=cpu', '--dtype=float32', '--contenders=ours,padded,trl', '--sections=train', '--seed=5',
              '--out=bench', cwd=tmp_path, env={'PYTHONPATH': str(tmp_path / 'without')})
    report = json.loads((tmp_path / 'bench.json').read_text())
    ours, padded, trl = report['train']
    assert trl['error'] == 'trl is not installed: pip install trl'
    sizes = np.array(report['data']['sizes'])                   # (16, 3): prompt, chosen, rejected
    assert sizes.shape == (16, 3) and report['data']['distinct_tokens'] == sizes.sum()
    assert max(sizes[:, 0] + sizes[:, 1:].max(1)) <= 64

    rng, computed = np.random.default_rng(5), 0         # two epochs, micro-steps of 4 pairs: 8 rows of the longest
    for order in (rng.permutation(16), rng.permutation(16)):
        longest = (sizes[:, 0] + sizes[:, 1:].max(1))[order.reshape(4, 4)].max(1)
        computed += 8 * int(longest.sum())
    assert padded['computed_tokens'] == computed / 2
    assert padded['waste'] == pytest.approx(1 - 2 * sizes.sum() / computed)
    for row in (ours, padded):
        assert row['error'] == '' and len(row['seconds']) == 8
        seconds = sum(row['seconds'][4:])                       # the epoch after the one of warm-up
        assert row['pairs_per_second'] == pytest.approx(16 / seconds)
        assert row['tokens_per_second'] == pytest.approx(sizes.sum() / seconds)
        useful = 4 * report['data']['forward_flops'] / seconds
        assert row['of_peak'] == pytest.approx(useful / report['peak']['flops_per_second'])
        assert row['first_loss'] == pytest.approx(math.log(2), abs=1e-5)
        assert 0.1 < row['memory_gb'] < 8 and row['first_seconds'] < row['wall_seconds']
    assert ours['times_padded'] == pytest.approx(ours['pairs_per_second'] / padded['pairs_per_second'])
    text = (tmp_path / 'bench.md').read_text()
    assert all(f'\n| {row["contender"]} ' in text for row in report['train']) and trl['error'] in text


@pytest.mark.parametrize('flag, says', [
    ('--pairs=30', 'multiple of batch_size=8'), ('--contenders=ours,trlx', "'trlx' is unknown; known: ours, "),
    ('--sections=no', 'known: train'), ('--micro_batch=3', 'micro_batch=3 must divide batch_size=8'),
    ('--row_tokens=many', "'many' is no whole number"), ('--epochs=0', 'epochs=0'), ('--max_length=4096', '4 to 1024'),
    ('--out=none/such', 'no such folder'), ('--pears=8', '--pears=8')])
def test_throughput_answers_a_wrong_option_with_one_line(flag, says):
    with pytest.raises(SystemExit) as caught:
        throughput.parse(['--device=cpu', '--batch_size=8', flag])
    assert caught.value.code.startswith('error: ') and says in caught.value.code and '\n' not in caught.value.code


def test_recompilations_count_only_after_the_epoch_of_warm_up(monkeypatch, tmp_path):
    """Two steps an epoch; messages before step 1's line, between steps 2 and 3, and in the evaluation at the end."""
    told = ['[__recompiles] Recompiling function forward', 'step       1/4 | loss', 'step       2/4 | loss',
            '[__recompiles] Recompiling function forward', 'step       3/4 | loss', 'step       4/4 | loss',
            '[__recompiles] Recompiling function forward', 'eval       4/4 | loss']
    ran = dict(error='', memory=False, lines=list(enumerate(told)), seconds=9.0, rss_gb=1.0)
    record = dict(loss=0.7, pairs_per_second=4.0, tokens_per_second=100.0, padding=0.5)
    monkeypatch.setattr(throughput, 'run_dpo', lambda *args: (ran, [record] * 4))
    options = throughput.parse(['--device=cpu', '--pairs=4', '--batch_size=2', '--epochs=1'])
    row = throughput.measure_ours('ours', options, dict(distinct_tokens=100, forward_flops=1.0), str(tmp_path))
    assert row['recompiles'] == 1 and row['first_seconds'] == 0
    assert row['pairs_per_second'] == 4 and row['computed_tokens'] == 200
    assert row['waste'] == 0.5 and row['besides_seconds'] == 7


def test_a_run_that_is_cut_keeps_the_contenders_before(monkeypatch, tmp_path):
    def measure(contender, *args):
        if contender == 'trl':
            raise KeyboardInterrupt
        return dict(contender=contender, error='', pairs_per_second=4.0, tokens_per_second=100.0, memory_gb=1.0,
                    useful_flops_per_second=3.0, besides_seconds=1.0)
    monkeypatch.setattr(throughput, 'measure_ours', measure)
    monkeypatch.setattr(throughput, 'measure_peer', measure)
    options = throughput.parse(['--device=cpu', '--contenders=ours,padded,trl', f'--out={tmp_path}/cut'])
    with pytest.raises(KeyboardInterrupt):
        rates = {options.dtype: {'2 x 2 x 2': 6.0}}
        throughput.section_train(options, {}, str(tmp_path), dict(heading='of a test'), rates)
    ours, padded = json.loads((tmp_path / 'cut.json').read_text())['train']
    assert ours['times_padded'] == 1 and padded['of_peak'] == 0.5 and '| padded ' in (tmp_path / 'cut.md').read_text()
