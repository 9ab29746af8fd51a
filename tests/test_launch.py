"""Several processes: killed and restarted by torchrun, ranks that are missing or differ, two nodes, the Slurm script."""
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import config
import dpo
import sft
from conftest import ROOT, VOCAB, random_groups, read_log, small_gpt, write_data
from model import find_checkpoints, read_checkpoint, save_checkpoint

COMMON = ['--name=tiny', '--batch_size=8', '--max_steps=12', '--learning_rate=1e-4', '--warmup_steps=3', '--log_interval=1',
          '--eval_interval=6', '--save_interval=4', '--device=cpu']
ARGS = {'dpo': COMMON, 'sft': [*COMMON, '--init_from=scratch', '--n_layer=2', '--n_embd=32', '--dropout=0.1']}

# runs a stage and kills it with SIGKILL: PLAN is {attempt: (rank, where, at which call)}
DYING = '''
import os, runpy, signal, sys, torch
plan, sys.argv = eval(sys.argv[1]), sys.argv[2:]
rank, where, when = plan.get(int(os.environ['TORCHELASTIC_RESTART_COUNT']), (None, None, None))
calls = 0

def dying(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == when and rank == int(os.environ['RANK']):
            if where == 'save':             # half of the file is there
                args[1].write(b'half a checkpoint')
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

if where == 'load':
    torch.nn.parallel.DistributedDataParallel = dying(torch.nn.parallel.DistributedDataParallel)
elif where == 'step':                       # gradients are there, half of a step
    torch.optim.RMSprop.step = dying(torch.optim.RMSprop.step)
    torch.optim.AdamW.step = dying(torch.optim.AdamW.step)
elif where == 'save':
    torch.save = dying(torch.save)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def torchrun(*args, launch=('--standalone', '--nproc_per_node=2')):
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', *launch, *map(str, args)], capture_output=True, text=True,
                          timeout=280, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return done.returncode, done.stdout, done.stderr


def make_workplace():
    rng = np.random.default_rng(0)
    write_data('data/tiny', {'train': random_groups(48, 2, rng), 'val': random_groups(10, 2, rng)})
    os.makedirs('out/tiny/sft')
    save_checkpoint('out/tiny/sft', 1, small_gpt(), dict(config={}, vocabulary=None))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A directory with a run of each stage by two processes, which nothing disturbed, in out/whole."""
    folder = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_workplace()
        Path('dying.py').write_text(DYING)
        for stage in ('dpo', 'sft'):
            shutil.copytree('out/tiny/sft', 'start')
            code, _, errors = torchrun(ROOT / f'{stage}.py', *ARGS[stage])
            assert code == 0, errors
            os.makedirs('out/whole', exist_ok=True)
            os.rename(f'out/tiny/{stage}', f'out/whole/{stage}')
            shutil.rmtree('out/tiny')
            os.makedirs('out/tiny')
            os.rename('start', 'out/tiny/sft')
    return folder


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return all(map(equal, a, b)) if isinstance(a, list) else a == b


def assert_same_run(folder, expected):
    """Last checkpoints (weights, optimizer's state) and logs of two runs, bit for bit, but for speeds."""
    a, b = (read_checkpoint(find_checkpoints(f)[-1]) for f in (folder, expected))
    assert a['step'] == b['step'] == 12 and equal(a['model'], b['model']) and equal(a['optimizer'], b['optimizer'])
    logs = [[{k: v for k, v in row.items() if 'second' not in k} for row in read_log(f)] for f in (folder, expected)]
    assert logs[0] == logs[1]
    assert sorted(os.listdir(folder)) == sorted(os.listdir(expected)), 'nothing half-written stays'


def workers_left():
    """Processes of this test's directory that still run."""
    here = os.getcwd()
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc') if os.path.isdir('/proc') else []):
        try:
            if os.readlink(f'/proc/{pid}/cwd') == here and int(pid) != os.getpid():
                found += [Path(f'/proc/{pid}/cmdline').read_text().replace('\0', ' ')]
        except OSError:
            pass
    return found


def test_killed_ranks_are_restarted_and_the_run_is_bit_identical_to_an_undisturbed_one(whole, monkeypatch):
    """Rank 1 in mid-step before the first checkpoint, rank 0 in mid-save; an older, finished run stands in the folder."""
    monkeypatch.chdir(whole)
    old = small_gpt(seed=3)
    save_checkpoint('out/tiny/dpo', 12, old, {}) if os.makedirs('out/tiny/dpo') is None else None
    plan = {0: (1, 'load', 1), 1: (1, 'step', 3), 2: (0, 'save', 2)}
    code, output, errors = torchrun('dying.py', plan, ROOT / 'dpo.py', *ARGS['dpo'],
                                    launch=('--standalone', '--nproc_per_node=2', '--max-restarts=3'))
    assert code == 0, errors
    assert re.findall(r'(?:nothing to resume|resuming from) .*', output) == [
        'nothing to resume in out/tiny/dpo: starting at step 0'] * 2 + ['resuming from out/tiny/dpo/step-000004.pt']
    assert_same_run('out/tiny/dpo', 'out/whole/dpo')
    kept = read_checkpoint(find_checkpoints('out/tiny/dpo.previous')[-1])['model']
    assert equal(dict(kept), dict(old.state_dict())), 'the older run is moved aside once, and not lost'
    assert 'error: no answer from rank 1 at step 3' in errors and 'error: no answer from rank 0 at step 8' in errors
    assert 'Traceback' not in errors and workers_left() == []


def test_sft_is_restarted_the_same_way(whole, monkeypatch):
    monkeypatch.chdir(whole)
    code, output, errors = torchrun('dying.py', {0: (0, 'step', 7)}, ROOT / 'sft.py', *ARGS['sft'],
                                    launch=('--standalone', '--nproc_per_node=2', '--max-restarts=1'))
    assert code == 0 and 'resuming from out/tiny/sft/step-000004.pt' in output, errors
    assert_same_run('out/tiny/sft', 'out/whole/sft')
    assert find_checkpoints('out/tiny/sft.previous')[-1].endswith('step-000001.pt'), 'what stood there'
