"""Several processes: the Slurm script, ranks killed and restarted by torchrun, missing or different ones."""
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import config
import dpo
from conftest import (ROOT, by_hand, free_port, last_checkpoint, random_groups, read_log, run_ranks, save_sft,
                      small_gpt, write_data)
from nanodpo import checkpoint, launch
from nanodpo.run import Worker

COMMON = ['--name=tiny', '--batch_size=8', '--max_steps=12', '--learning_rate=1e-4', '--warmup_steps=3',
          '--log_interval=1', '--eval_interval=6', '--save_interval=4', '--device=cpu']
ARGS = {'dpo': COMMON, 'sft': [*COMMON, '--init_from=scratch', '--n_layer=2', '--n_embd=32', '--dropout=0.1']}

# runs dpo.py and sft.py and kills them with SIGKILL, once at each point: stage, rank, where, at which call
DYING = '''
import os, runpy, signal, sys, torch
points, root, args = [('dpo', 1, 'step', 3), ('dpo', 0, 'save', 2), ('sft', 0, 'step', 7)], *eval(sys.argv[1])

def dying(function, where):
    def wrapped(*call, **options):
        calls[where] += 1
        point = stage, int(os.environ['RANK']), where, calls[where]
        if point in points and not os.path.exists(mark := f'died-{points.index(point)}'):
            open(mark, 'w').close()
            if where == 'save':             # half of the file is there
                call[1].write(b'half a checkpoint')
                call[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*call, **options)
    return wrapped

for optimizer in (torch.optim.RMSprop, torch.optim.AdamW):
    optimizer.step = dying(optimizer.step, 'step')          # gradients are there, half of a step
torch.save = dying(torch.save, 'save')
sys.path.insert(0, root)
for stage in ('dpo', 'sft'):
    calls = dict(step=0, save=0)
    sys.argv = [f'{root}/{stage}.py', *args[stage]]
    runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A directory with a run of each stage by two processes, which nothing disturbed, in out/whole."""
    folder = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rng = np.random.default_rng(0)
        write_data('data/tiny', {'train': random_groups(48, 2, rng), 'val': random_groups(10, 2, rng)})
        save_sft(small_gpt(), 1)
        os.makedirs('out/whole')
        for stage in ('dpo', 'sft'):
            assert run_ranks(stage, [ARGS[stage]] * 2) == {0: '', 1: ''}
            os.rename(f'out/tiny/{stage}', f'out/whole/{stage}')
        os.rename('out/tiny/sft.1', 'out/tiny/sft')
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return all(map(equal, a, b)) if isinstance(a, list) else a == b


def assert_same_run(folder, expected):
    """Last checkpoints (weights, optimizer's state) and logs of two runs, bit for bit, but for speeds."""
    a, b = last_checkpoint(folder), last_checkpoint(expected)
    assert a['step'] == b['step'] == 12 and equal(a['model'], b['model']) and equal(a['optimizer'], b['optimizer'])
    logs = [[{k: v for k, v in row.items() if 'second' not in k} for row in read_log(f)] for f in (folder, expected)]
    assert logs[0] == logs[1]
    assert sorted(os.listdir(folder)) == sorted(os.listdir(expected)), 'nothing half-written stays'


STUBS = {   # two nodes on this machine, each with torchrun
    'scontrol': '#!/bin/bash\nif [ "$1" = show ]; then printf "127.0.0.1\\nsecond\\n"; else echo "scontrol $@"; fi\n',
    'srun': '#!/bin/bash\nshift\n"$@" & first=$!\n"$@" & wait $! && wait $first\n',
    'torchrun': f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
}


@pytest.fixture
def sbatch(place):
    """repro/slurm.sh with stubs of Slurm's commands, two nodes of one process: a function of arguments."""
    os.makedirs('bin')
    for name, text in STUBS.items():
        Path('bin', name).write_text(text)
        os.chmod(f'bin/{name}', 0o755)

    def run(*args, **env):
        env = {'PATH': f'{os.getcwd()}/bin:{os.environ["PATH"]}', 'SLURM_JOB_ID': str(free_port() - 20000),
               'SLURM_JOB_NODELIST': 'any', 'SLURM_NNODES': '2', 'OMP_NUM_THREADS': '1', **env}
        return subprocess.run(['bash', ROOT / 'repro/slurm.sh', *map(str, args)], env={**os.environ, **env},
                              capture_output=True, text=True, timeout=280)
    return run


def test_killed_ranks_are_restarted_on_two_nodes_and_the_runs_are_bit_identical_to_undisturbed_ones(sbatch):
    """Rank 1 in mid-step before dpo's first checkpoint, rank 0 in mid-save, then in sft's mid-step."""
    old = small_gpt(seed=3)
    save_sft(old, 12, 'out/tiny/dpo')
    Path('dying.py').write_text(DYING)
    shutil.copytree('out/tiny/sft', 'start')        # sft replaces it
    done = sbatch('dying.py', repr((str(ROOT), ARGS | {'dpo': [*ARGS['dpo'], '--init_from=start']})))
    assert done.returncode == 0 and 'dpo on cpu, processes: 2' in done.stdout, done.stderr
    assert sorted(map(str, Path().glob('died-*'))) == ['died-0', 'died-1', 'died-2']
    assert re.findall(r'(?:nothing to resume in|resuming from) [^:,\n]*', done.stdout) == [
        'nothing to resume in out/tiny/dpo',
        'resuming from out/tiny/dpo/step-000004.pt', 'nothing to resume in out/tiny/sft',
        'resuming from out/tiny/dpo/step-000012.pt', 'resuming from out/tiny/sft/step-000004.pt']
    assert_same_run('out/tiny/dpo', 'out/whole/dpo')
    assert_same_run('out/tiny/sft', 'out/whole/sft')
    assert equal(dict(last_checkpoint('out/tiny/dpo.1')['model']), dict(old.state_dict())), 'moved aside once'
    assert last_checkpoint('out/tiny/sft.1')['step'] == 1, 'what stood there'
    for cwd in Path('/proc').glob('[0-9]*/cwd'):
        with contextlib.suppress(OSError):
            assert os.readlink(cwd) != os.getcwd() or int(cwd.parent.name) == os.getpid(), 'a worker is left'


@pytest.mark.parametrize('restarts, flags', [('0', ''), ('1', ' --resume')])
def test_a_slurm_job_that_is_queued_again_resumes(sbatch, restarts, flags):
    Path('bin/torchrun').write_text('#!/bin/bash\necho "$@"\n')
    done = sbatch('dpo.py', 'config/hh.py', SLURM_RESTART_COUNT=restarts)
    assert done.stdout.endswith(f'dpo.py config/hh.py{flags}\n')


def test_a_restart_goes_on_from_its_own_launch_alone(place, monkeypatch, capsys):
    """One process under torchrun, whose store the test plays; the first attempt died before it wrote anything."""
    def attempt(store, *flags):
        monkeypatch.setenv('MASTER_PORT', str(store.port))
        dpo.main([*ARGS['dpo'], *flags])
        return re.findall(r'(?:nothing to resume in|resuming from) [^:,\n]*', capsys.readouterr().out)
    by_torchrun = {'TORCHELASTIC_RUN_ID': 'none', 'TORCHELASTIC_USE_AGENT_STORE': 'True'}
    for key, value in (by_hand(0, 1, 0) | by_torchrun).items():
        monkeypatch.setenv(key, value)
    old = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    assert attempt(old, '--max_steps=8') == []
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    store.set('launch', 'of the first attempt')
    assert attempt(store, '--max_steps=4') == ['nothing to resume in out/tiny/dpo']
    assert attempt(store) == ['resuming from out/tiny/dpo/step-000004.pt']
    with open(checkpoint.find('out/tiny/dpo')[-1], 'ab') as file:
        file.write(b'damage')
    assert attempt(store) == ['resuming from out/tiny/dpo/step-000008.pt']
    assert attempt(old, '--resume') == ['resuming from out/tiny/dpo/step-000012.pt'], 'the user wants it'
    assert checkpoint.find('out/tiny/dpo.1')[-1].endswith('step-000008.pt'), 'still there'


BAD = {     # environment, the line
    'no rank': ({'WORLD_SIZE': '2'}, "start with torchrun, which sets WORLD_SIZE, RANK .*KeyError: 'RANK'"),
    'no address': (by_hand(0, 2, 1) | {'MASTER_ADDR': ''}, 'the ranks do not meet at MASTER_ADDR= MASTER_PORT=1'),
    'not a number': (by_hand(0, 2, 'http'), "MASTER_PORT=http.*ValueError"),
    'srun alone': ({'SLURM_STEP_NUM_TASKS': '8'}, 'srun started several processes .*torchrun'),
    'nobody at the address': (by_hand(1, 2, 1), 'do not meet at MASTER_ADDR=127.0.0.1 .*firewall.*refused'),
    'no such host': (by_hand(1, 2, 1) | {'MASTER_ADDR': 'no-such-host.invalid'}, 'do not meet at .*invalid'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_launch_that_cannot_work_ends_with_one_line(tmp_path, monkeypatch, case):
    environment, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match=f'^error: .*{expected}') as caught:
        dpo.main([*ARGS['dpo'], '--join_timeout=4'])
    assert '\n' not in caught.value.code and not os.listdir()


def test_too_few_gpus_or_no_connection_between_ranks_is_one_line(monkeypatch):
    def broken(*args):
        raise RuntimeError('Gloo connectFullMesh failed')
    monkeypatch.setattr(dist, 'init_process_group', broken)
    monkeypatch.setattr(launch, 'meet', lambda *args: ('a', 'a'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    for key, value in (by_hand(0, 2, free_port()) | {'LOCAL_WORLD_SIZE': '2'}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match='the ranks do not meet .*GLOO_SOCKET_IFNAME.*connectFullMesh failed'):
        launch.join(2, 0, 'cpu', 1)
    with pytest.raises(SystemExit, match='2 processes on this machine, but torch sees 1 GPUs'):
        Worker('auto')


def test_a_missing_rank_ends_all_with_one_line_each(place):
    """Three are expected, two come."""
    began, args = time.time(), [*ARGS['dpo'], '--join_timeout=5']
    said = run_ranks('dpo', [args, args, ['--name=?']])
    assert 'rank 2 of 3 did not come' in said[0] and said[1].startswith('error: the ranks do not meet')
    assert '\n' not in said[0] + said[1] and time.time() - began < 60


def test_another_rank_waits_for_rank_0_to_speak_and_says_who_it_is(monkeypatch, capsys):
    def main():
        raise config.UserError('no such file')
    waited, left = [], []
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    monkeypatch.setattr(time, 'sleep', waited.append)
    monkeypatch.setattr(os, '_exit', left.append)
    for rank in (0, 1):
        monkeypatch.setenv('RANK', str(rank))
        config.run(main)
    assert left == [1, 1] and len(waited) == 1 and waited[0] >= 5
    assert capsys.readouterr().err == f'error: no such file\nerror: rank 1 on {socket.gethostname()}: no such file\n'


@pytest.mark.parametrize('other, line', [
    ('command', 'rank 1 has another beta than rank 0 (0.5, not 0.1): all nodes need the same command'),
    ('train', "rank 1 has another data than rank 0 ('"), ('val', "rank 1 has another val than rank 0 ('"),
    ('weights', "rank 1 has another init than rank 0 ('"),
    ('checkpoint', 'rank 1 has another step than rank 0 (0, not 12)')])
def test_ranks_that_differ_say_in_what(place, other, line):
    for folder in ('data', 'out/tiny/sft'):
        shutil.copytree(folder, f'other/{folder}')
    flags = ['--resume', '--beta=0.5' if other == 'command' else '--beta=0.1']
    if other in ('train', 'val'):
        train = random_groups(48, 2, np.random.default_rng(7 if other == 'train' else 0))
        write_data('other/data/tiny', {'train': train, 'val': random_groups(10, 2, np.random.default_rng(7))})
    if other == 'weights':
        save_sft(small_gpt(seed=5), 2, 'other/out/tiny/sft')
    if other == 'checkpoint':
        shutil.copytree('out/whole/dpo', 'out/tiny/dpo')
    said = run_ranks('dpo', [[*ARGS['dpo'], '--resume'], [*ARGS['dpo'], *flags]], ['.', 'other'])
    assert len(said) == 2
    for words in said.values():
        assert words.startswith(f'error: {line}') and '\n' not in words
