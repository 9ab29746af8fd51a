"""The four stages, by their real commands: something is learned, and real dialogues go through under torchrun."""
import json
import math

import pytest

from conftest import ROOT, SHARED, read_log, run_stage
from nanodpo.data import read_meta


def test_the_embedded_experiment_in_short_makes_reviews_more_positive(tmp_path):
    reviews = str(ROOT / 'config' / 'reviews.py')
    first = run_stage('prepare_prefs.py', reviews, cwd=tmp_path)
    again = run_stage('prepare_prefs.py', reviews, cwd=tmp_path)
    assert 'is ready' in first.stdout and 'is reused' in again.stdout
    run_stage('sft.py', reviews, '--max_steps=150', '--eval_interval=0', cwd=tmp_path)
    run_stage('dpo.py', reviews, '--max_steps=50', '--eval_interval=0', cwd=tmp_path)
    log = read_log(tmp_path / 'out/reviews/dpo')
    assert log[0]['eval/loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]['eval/loss'] < 0.65 and log[-1]['eval/rewards/accuracies'] > 0.65
    done = run_stage('sample.py', reviews, '--json', '--num_prompts=200', '--num_samples=1', cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    before, after = (lines[-1]['summary'][model] for model in ('before', 'after'))
    assert len(lines) == 201
    assert after['true_reward']['mean'] > before['true_reward']['mean'] + 0.5
    assert after['positive']['mean'] > before['positive']['mean'] + 0.1
    assert after['kl']['mean'] > 0


@pytest.mark.skipif(not (SHARED / 'data' / 'hh-rlhf').is_dir(), reason='the HH sample is not here')
def test_real_dialogues_go_through_all_stages_on_two_processes(tmp_path):
    hh = [str(ROOT / 'config' / 'hh_cpu.py')]
    done = run_stage('prepare_prefs.py', *hh, f'--source={SHARED}/data/hh-rlhf', cwd=tmp_path)
    splits = read_meta(tmp_path / 'data/hh_cpu')['splits']
    assert splits['train']['read'] == 1387
    assert splits['train']['dropped'] == {'empty_response': 2, 'prompts_differ': 2}
    assert splits['val']['kept'] == 155 and 'prompts_differ' in done.stdout
    run_stage('sft.py', *hh, '--max_steps=12', '--eval_interval=0', cwd=tmp_path, processes=2)
    sft = read_log(tmp_path / 'out/hh_cpu/sft')
    assert sft[-1]['eval/perplexity'] < sft[0]['eval/perplexity'] / 2
    run_stage('dpo.py', *hh, '--max_steps=8', '--eval_interval=0', '--precompute_ref', cwd=tmp_path, processes=2)
    dpo = read_log(tmp_path / 'out/hh_cpu/dpo')
    assert dpo[0]['eval/loss'] == pytest.approx(math.log(2), abs=1e-5) and dpo[-1]['eval/loss'] < dpo[0]['eval/loss']
    done = run_stage('sample.py', *hh, '--prompt=How do I boil an egg?', '--max_new_tokens=20', cwd=tmp_path)
    assert 'Human: How do I boil an egg?' in done.stdout and 'BEFORE' in done.stdout
