"""sft.py and dpo.py as a user runs them: the same result whatever the machine, resumed runs, signals, caches."""
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo
import sft
from conftest import (ROOT, by_hand, free_port, last_checkpoint, random_groups, read_log, run_stage, save_sft, small_gpt,
                      write_data)
from nanodpo import checkpoint
from nanodpo.data import Groups, step_groups
from test_exact import one_at_a_time

DPO = ['--name=tiny', '--batch_size=8', '--max_steps=20', '--learning_rate=1e-4', '--warmup_steps=3',
       '--log_interval=1', '--eval_interval=10', '--save_interval=5', '--device=cpu']
SFT = [*DPO, '--init_from=scratch', '--n_layer=2', '--n_embd=32', '--dropout=0.1']


def losses(folder):
    return [r.get('loss', r.get('eval/loss')) for r in read_log(folder)]


def first_batch(**options):
    """The groups of optimizer step 1 of batch_size=8, as lists of ids."""
    groups = Groups('data/tiny', 'train', **options)
    return [[list(piece) for piece in groups[i]] for i in step_groups(len(groups), 8, 0, 1337)]


def worst_difference(a, b):
    """Largest difference of two models' weights, in units of the step size, and where it is.

    The key's bias is left out: attention does not depend on it, its gradient is rounding noise around 0, and
    RMSprop and Adam divide that noise by its own size.
    """
    worst = (0.0, '')
    for name, p in a.items():
        difference = (p - b[name]).abs()
        if name.endswith('c_attn.bias'):
            C = len(p) // 3
            difference[C:2 * C] = 0
        worst = max(worst, (difference.max().item(), name))
    return worst


def test_processes_accumulation_and_row_length_change_nothing_but_rounding(experiment):
    """1 process, 2 under torchrun, short rows (more micro-steps), long rows.

    Sums are taken in another order, about 1e-7 relative a step. Losses sum 2,000 log-probs, 20 steps build on one
    another: 1e-5. Under RMSprop a gradient that is nearly 0 turns rounding into a share of a step's largest move, ten
    learning rates: a twentieth of that, 5e-5, on weights.
    """
    no_dropout = [*SFT, '--dropout=0.0']        # dropout draws per rank
    for stage, flags, others in (('dpo', DPO, ['--row_tokens=128', '--row_tokens=2048']), ('sft', no_dropout, [])):
        results = []
        for more in ('--seed=1337', '2 processes', *others):
            if more == '2 processes':
                assert 'processes: 2' in run_stage(f'{stage}.py', *flags, processes=2).stdout
            else:
                dict(dpo=dpo, sft=sft)[stage].main([*flags, more])
            results.append((losses(f'out/tiny/{stage}'), last_checkpoint(f'out/tiny/{stage}')['model']))
            assert results[-1][0] == pytest.approx(results[0][0], abs=1e-5), more
            worst, name = worst_difference(results[-1][1], results[0][1])
            assert worst < 5e-5, (more, name, worst)
        if stage == 'dpo':
            assert worst_difference(results[0][1], small_gpt().state_dict())[0] > 1e-3, 'the run moved the weights'


def test_sft_loss_is_per_target_token_of_the_global_batch(experiment):
    """Step 1's logged loss against one-at-a-time log-probs of the chosen responses of that batch."""
    sft.main([*DPO, '--max_steps=1', '--init_from=out/tiny/sft', '--run_name=again'])
    data = first_batch(k=1)
    expected = -one_at_a_time(small_gpt(), data).sum() / sum(len(g[1]) for g in data)
    logged = [r['loss'] for r in read_log('out/tiny/again') if 'loss' in r]
    assert logged[0] == pytest.approx(expected.item(), rel=1e-5)


def test_documents_are_scored_from_the_first_token_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docs = [[[256], [*b'hello world', 256]]] * 16
    write_data('data/tiny', {'documents_train': docs, 'documents_val': docs[:2]})
    sft.main([*SFT, '--dropout=0.0', '--train_on=documents', '--learning_rate=1e-2', '--max_steps=60',
              '--eval_interval=0'])
    assert read_log('out/tiny/sft')[-1]['eval/loss'] < 0.1      # 12 tokens, all predictable, the first one included


def test_step_0_is_ln_2_val_is_counted_once_and_the_gradient_is_of_the_whole_batch(experiment):
    """Against log-probs of one sequence at a time, and autograd over them."""
    dpo.main([*DPO, '--max_steps=1', '--grad_clip=0', '--row_tokens=128'])
    first, second = read_log('out/tiny/dpo')[:2]
    assert first['step'] == 0 and first['eval/loss'] == pytest.approx(np.log(2), abs=1e-6)
    assert first['eval/rewards/accuracies'] == 0.5 and first['eval/rewards/margins'] == 0
    logps = one_at_a_time(small_gpt(), Groups('data/tiny', 'val')).mean(0)
    assert [first['eval/logps/chosen'], first['eval/logps/rejected']] == pytest.approx(logps.tolist(), rel=1e-5)
    model = small_gpt()
    logps = one_at_a_time(model, first_batch())
    dpo.dpo_loss(*logps.t(), *logps.detach().t(), 0.1)[0].mean().backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert second['grad_norm'] == pytest.approx(norm, rel=1e-4)


def wait_for_log(process, stage, lines):
    """Until the log of a running stage holds so many lines."""
    log = Path('out/tiny') / stage / 'log.jsonl'
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and not (
            log.exists() and log.read_text().count('\n') >= lines):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]


def start_and_kill(script, args, when, number=signal.SIGKILL, processes=1):
    """Run a stage until its log holds `when` lines, then signal its whole group. -> (returncode, output)"""
    command = [sys.executable, str(ROOT / script), *args]
    if processes > 1:
        command[1:1] = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    wait_for_log(process, script[:-3], when)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


@pytest.mark.parametrize('script, args', [('dpo.py', DPO), ('sft.py', SFT)])
def test_killed_at_a_random_step_and_resumed_the_weights_are_bit_identical(experiment, script, args):
    folder = f'out/tiny/{script[:-3]}'
    args = [*args, '--max_steps=40']
    run_stage(script, *args)
    whole, log = last_checkpoint(folder), read_log(folder)
    random_step = int(time.time()) % 15 + 7
    shutil.rmtree(folder)
    start_and_kill(script, args, random_step)
    assert not checkpoint.find(folder) or last_checkpoint(folder)['step'] < 40, 'killed before the end'
    run_stage(script, *args, '--resume')
    resumed = last_checkpoint(folder)
    assert resumed['step'] == whole['step'] == 40
    assert all(torch.equal(tensor, resumed['model'][key]) for key, tensor in whole['model'].items()), random_step
    again = read_log(folder)
    for row in log + again:
        for key in ('tokens_per_second', 'pairs_per_second'):
            row.pop(key, None)
    assert again == log, 'the log is that of one run'


def test_sigterm_under_torchrun_saves_and_leaves_on_both_ranks(experiment):
    code, output = start_and_kill('dpo.py', [*DPO, '--max_steps=4000', '--save_interval=0', '--eval_interval=0'], 5,
                                  signal.SIGTERM, processes=2)
    assert code != 0
    saved = last_checkpoint('out/tiny/dpo')
    assert 5 <= saved['step'] < 4000
    assert f'saved at step {saved["step"]}' in output
    assert f'Traceback (most recent call last):\n  File "{ROOT}' not in output
    dpo.main([*DPO, f'--max_steps={saved["step"] + 2}', '--resume'])
    assert last_checkpoint('out/tiny/dpo')['step'] == saved['step'] + 2


UNEQUAL = f'''if 1:
    import os, sys
    sys.path.insert(0, {str(ROOT)!r})
    import config, dpo
    def row_limit(*args):
        return 400 if os.environ['RANK'] == '0' else 200
    dpo.row_limit = row_limit
    config.run(lambda: dpo.main(sys.argv[1:]))'''


def test_ranks_whose_gpus_differ_in_memory_make_one_plan(experiment):
    args = [*DPO, '--max_steps=5', '--precompute_ref']
    dpo.main([*args, '--run_name=one'])
    for path in Path('out/tiny').glob('reference-*'):
        path.unlink()
    port = free_port()
    ranks = [subprocess.Popen([sys.executable, '-c', UNEQUAL, *args], env=os.environ | by_hand(rank, 2, port))
             for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert losses('out/tiny/dpo') == pytest.approx(losses('out/tiny/one'), rel=1e-5)


def test_ctrl_c_saves_and_exits_130(experiment):
    code, output = start_and_kill('dpo.py', [*DPO, '--max_steps=4000'], 3, signal.SIGINT)
    assert code == 130 and 'Traceback' not in output and 'goes on from there' in output


def test_ctrl_c_saves_though_who_reads_the_output_is_gone_too(experiment):
    """As for `dpo.py | tee log`: the reader dies of the same Ctrl-C."""
    process = subprocess.Popen([sys.executable, str(ROOT / 'dpo.py'), *DPO, '--max_steps=4000', '--save_interval=0'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS='1'))
    wait_for_log(process, 'dpo', 4)
    process.send_signal(signal.SIGSTOP)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.wait(60)
    assert last_checkpoint('out/tiny/dpo')['step'] >= 3


@pytest.mark.parametrize('damage', ['cut', 'bit', 'code'])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_resumes(experiment, capsys, damage):
    dpo.main(DPO)
    whole = last_checkpoint('out/tiny/dpo')
    before, last = checkpoint.find('out/tiny/dpo')
    content = bytearray(Path(last).read_bytes())
    content[len(content) // 3] ^= 1
    content = dict(cut=content[:len(content) // 2], bit=content, code=pickle.dumps(print))[damage]
    Path(last).write_bytes(content)
    if damage == 'code':        # even with its hash made to fit
        Path(last[:-3] + '.json').write_text(json.dumps(dict(sha256=hashlib.sha256(content).hexdigest())))
    capsys.readouterr()
    dpo.main([*DPO, '--resume'])
    assert re.search(rf'(?s)refused: .*step-000020\.pt.*resuming from {before}', capsys.readouterr().out)
    again = last_checkpoint('out/tiny/dpo')
    assert all(torch.equal(p, again['model'][k]) for k, p in whole['model'].items())


def test_a_damaged_sft_checkpoint_is_no_start_for_dpo(experiment):
    save_sft(small_gpt(seed=4))
    path = Path(checkpoint.find('out/tiny/sft')[-1])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=r'000002\.pt is damaged.*use the checkpoint before it'):
        dpo.main(DPO)
    dpo.main([*DPO, '--max_steps=1', '--init_from=out/tiny/sft/step-000001.pt'])


def test_cached_reference_logps_equal_live_ones_and_a_foreign_cache_is_remade(experiment, capsys):
    dpo.main(DPO)
    live = losses('out/tiny/dpo')

    def remade(reason, splits):
        dpo.main([*DPO, '--precompute_ref'])
        assert len(re.findall(f'{reason}.*, computing', capsys.readouterr().out)) == splits
    for expected in ('none cached, computing', 'equal to live ones'):
        dpo.main([*DPO, '--precompute_ref'])
        assert capsys.readouterr().out.count(expected) == 2
        assert losses('out/tiny/dpo') == pytest.approx(live, abs=1e-5)
    save_sft(small_gpt(seed=9))
    remade('of other data or weights', 2)
    assert read_log('out/tiny/dpo')[0]['eval/loss'] == pytest.approx(np.log(2), abs=1e-6)
    rng = np.random.default_rng(7)
    write_data('data/tiny', {'train': random_groups(48, 2, rng), 'val': random_groups(10, 2, rng)})
    remade('of other data or weights', 2)
    cache = Path('out/tiny/reference-train.npz')
    with np.load(cache) as file:
        key, logps = str(file['key']), file['logps']
    logps[3] += 1
    np.savez(cache, key=np.array(key), logps=logps)         # the key fits, the numbers do not
    remade('does not equal live values', 1)
    cache.write_bytes(cache.read_bytes()[:100])
    remade('the cache is damaged', 1)


def test_a_log_file_grows_as_the_run_does(experiment):
    with open('said', 'w') as said:
        process = subprocess.Popen([sys.executable, str(ROOT / 'dpo.py'), *DPO, '--max_steps=4000', '--loss=simpo'],
                                   stdout=said, stderr=subprocess.DEVNULL,
                                   env={key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'})
    wait_for_log(process, 'dpo', 4)
    process.kill()
    process.wait()
    text = Path('said').read_text()
    assert 'step       2/4,000' in text and 'note: no kl in the log' in text


def test_a_cache_that_cannot_be_written_is_a_note(experiment, capsys):
    Path('out/tiny/reference-train.npz').mkdir()
    dpo.main([*DPO, '--precompute_ref'])
    assert 'note: out/tiny/reference-train.npz is not kept: ' in capsys.readouterr().out
    assert last_checkpoint('out/tiny/dpo')['step'] == 20


def test_dpo_learns_and_generalises_where_there_is_something_to_learn(tmp_path, monkeypatch):
    """Chosen responses are of low bytes, rejected ones of high bytes: held-out accuracy must come near 1."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def response(lowest):
        return [*rng.integers(lowest, lowest + 100, rng.integers(3, 9)), 256]
    pairs = [[list(rng.integers(0, 256, 5)), response(0), response(150)] for _ in range(160)]
    write_data('data/tiny', {'train': pairs[:128], 'val': pairs[128:]})
    save_sft(small_gpt(spread=0.2))
    dpo.main([*DPO, '--learning_rate=1e-3', '--max_steps=32'])
    final = read_log('out/tiny/dpo')[-1]
    assert final['eval/rewards/accuracies'] > 0.95 and final['eval/loss'] < 0.4


def test_a_non_finite_loss_stops_the_run_names_the_pairs_and_saves_nothing(experiment):
    dpo.main([*DPO, '--max_steps=5'])
    kept = {path: Path(path).read_bytes() for path in checkpoint.find('out/tiny/dpo')}
    line = r'step \d+: the loss or its gradient is not finite; groups of data/tiny/train: \['
    with pytest.raises(SystemExit, match=line):
        dpo.main([*DPO, '--resume', '--max_steps=400', '--learning_rate=1e30', '--warmup_steps=0', '--save_interval=0'])
    assert {path: Path(path).read_bytes() for path in checkpoint.find('out/tiny/dpo')} == kept


def test_a_new_run_keeps_the_one_that_stood_there_and_resume_refuses_other_weights_batch_or_seed(experiment):
    dpo.main([*DPO, '--max_steps=1'])
    dpo.main([*DPO, '--max_steps=2'])
    assert checkpoint.find('out/tiny/dpo')[-1].endswith('step-000002.pt')
    assert checkpoint.find('out/tiny/dpo.1')[-1].endswith('step-000001.pt')
    for flag, what in (('--batch_size=16', 'batch_size'), ('--seed=1', 'seed'), ('--optimizer=adamw', 'optimizer')):
        with pytest.raises(SystemExit, match=f'cannot resume .*{what} changed'):
            dpo.main([*DPO, '--resume', flag])
    save_sft(small_gpt(seed=9))
    with pytest.raises(SystemExit, match='cannot resume .*init changed'):
        dpo.main([*DPO, '--resume'])


@pytest.mark.parametrize('optimizer', ['rmsprop', 'adamw'])
@pytest.mark.parametrize('schedule, last', [('constant', 1.0), ('linear', 1 / 18),
                                            ('cosine', 0.5 + 0.5 * np.cos(np.pi * 17 / 18))])
def test_schedules_warm_up_and_end_where_they_say(experiment, optimizer, schedule, last):
    dpo.main([*DPO, f'--schedule={schedule}', f'--optimizer={optimizer}', '--eval_interval=0'])
    lrs = [r['lr'] for r in read_log('out/tiny/dpo') if 'lr' in r]
    assert lrs[:3] == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4]) and lrs[-1] == pytest.approx(1e-4 * last)
    assert last == 1 or all(a > b for a, b in zip(lrs[2:], lrs[3:]))


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler on a CPU')
def test_compiled_training_gives_the_same_losses(experiment):
    """torch.compile fuses and so rounds differently: 1e-5 on losses of order 1, and step 0 within 1e-6 of ln 2."""
    short = [*DPO, '--max_steps=3', '--row_tokens=256']
    dpo.main(short)
    plain = losses('out/tiny/dpo')
    run_stage('dpo.py', *short, '--compile=True')
    compiled = losses('out/tiny/dpo')
    assert compiled == pytest.approx(plain, abs=1e-5) and compiled[0] == pytest.approx(np.log(2), abs=1e-6)
