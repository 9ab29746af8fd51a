"""A user's mistakes: one clear line that says what, where and what to do; exit status not 0; nothing lost."""
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config
from conftest import ROOT, random_groups, run_stage, small_gpt, write_data
from nanodpo import checkpoint

STAGES = {'prepare': 'prepare_prefs', 'sft': 'sft', 'dpo': 'dpo', 'sample': 'sample'}
GOOD = '{"prompt": "Q%d", "chosen": " yes %d", "rejected": " no %d"}\n'
DPO = ['--name=tiny', '--max_steps=2', '--batch_size=8', '--device=cpu']
SFT = [*DPO, '--init_from=scratch', '--n_embd=32']


def main(script, args):
    importlib.import_module(script).main(args)


def snapshot():
    """Every file below the working directory, with its content, but for locks: this process holds them on."""
    return {str(p): p.read_bytes() for p in Path('.').rglob('*') if p.is_file() and p.suffix != '.lock'}


# --- what is wrong, made in the working directory; each returns the flags of the stage that meets it ---

def after(function, *args, flags=DPO):
    function(*args)
    return flags


def config_file(text):
    Path('mine.py').write_text(text)
    return ['mine.py']


def jsonl(bad, good=20):
    """An own data file with `bad` (bytes) as line 3."""
    lines = [(GOOD % (i, i, i)).encode() for i in range(good)]
    Path('pairs.jsonl').write_bytes(b''.join([*lines[:2], bad + b'\n', *lines[2:]]))
    return ['--name=own', '--source=pairs.jsonl', '--tokenizer=bytes']


def sft_model(model, vocabulary=None):
    checkpoint.save('out/tiny/sft', 2, model, dict(config={}, optimizer={}, vocabulary=vocabulary))
    return DPO


def flipped_bit(path, at=100):
    content = bytearray(Path(path).read_bytes())
    content[at] ^= 4
    Path(path).write_bytes(content)
    return DPO


def triples():
    rng = np.random.default_rng(0)
    write_data('data/three', {'train': random_groups(9, 3, rng), 'val': random_groups(3, 3, rng)})
    return ['--name=three', '--init_from=out/tiny/sft', '--batch_size=2']


def text_file(name, text, *flags):
    Path(name).write_text(text)
    return list(flags)


CASES = {       # name: (script, its flags or what makes them, what the line must say)
    # config
    'unknown flag': ('dpo', ['--name=tiny', '--betta=0.2'], r"unknown key 'betta'.*did you mean 'beta'"),
    'unknown key in a file': ('dpo', lambda: config_file("name = 'tiny'\ndpo = dict(learning_rte=1e-5)"),
                              r"mine.py: unknown key 'learning_rte'.*did you mean 'learning_rate'"),
    'a key that is no string': ('dpo', lambda: config_file('dpo = {3: 4}'), r"mine.py: unknown key '3' for dpo"),
    'unknown name in a file': ('dpo', lambda: config_file("name = 'tiny'\ndop = dict()"),
                               r"mine.py: unknown name 'dop'.*'dpo'"),
    'syntax error in a file': ('dpo', lambda: config_file("name = 'tiny'\ndpo = dict("),
                               r'mine.py: SyntaxError.*line 2'),
    'a file that is no text': ('dpo', lambda: config_file("name = '\0'"), r'mine.py: (SyntaxError|ValueError)'),
    'exception in a file': ('dpo', lambda: config_file("name = 'tiny'\ndpo = dict(beta=1 / 0)"),
                            r'mine.py: ZeroDivision.*line 2'),
    'a stage that is no dict': ('dpo', lambda: config_file('dpo = 3'), r"'dpo' must be a dict"),
    'missing config file': ('dpo', ['config/nope.py'], r'config/nope.py does not exist'),
    'wrong type in a flag': ('dpo', ['--name=tiny', '--batch_size=many'], r"flag: batch_size='many' must be int"),
    'wrong type in a file': ('dpo', lambda: config_file("dpo = dict(compile='yes')"),
                             r"mine.py: compile='yes' must be bool"),
    'a name that is no string': ('dpo', lambda: config_file('name = 3'), r'mine.py: name=3 must be str, not int'),
    'out of range': ('dpo', ['--name=tiny', '--beta=-1'], r'beta=-1 is out of range: beta > 0'),
    'not a number': ('dpo', lambda: config_file("dpo = dict(learning_rate=float('nan'))"),
                     r'=nan is out of range'),
    'no such choice': ('dpo', ['--name=tiny', '--optimizer=sgd'],
                       r"optimizer='sgd' must be one of 'rmsprop', 'adamw'"),
    'a flag without a value': ('dpo', ['--name=tiny', '--beta'], r'--beta needs a value'),
    'a name that is a path': ('dpo', ['--name=../x'], r'name='),
    # data and weights
    'no prepared data': ('dpo', ['--name=nothing'], r'data/nothing/meta.json does not exist: run prepare_prefs.py'),
    'no documents': ('sft', [*SFT, '--train_on=documents'], r"no split 'documents_train'"),
    'no SFT checkpoint': ('dpo', lambda: after(os.rename, 'out/tiny/sft', 'out/tiny/x'),
                          r'holds no checkpoint: run sft.py'),
    'a folder without weights': ('dpo', lambda: after(os.mkdir, 'empty', flags=[*DPO, '--init_from=empty']),
                                 r'empty is no checkpoint'),
    'an unknown model name': ('dpo', [*DPO, '--init_from=no-such/model'],
                              r'no-such/model is no checkpoint, and no directory or hub name'),
    'a bin cut short': ('dpo', lambda: after(os.truncate, 'data/tiny/train.bin', 50),
                        r'train.bin is missing or damaged.*prepare_prefs'),
    'a bin with one bit flipped': ('dpo', lambda: flipped_bit('data/tiny/val.bin'), r'val.bin is missing or damaged'),
    'an index with one bit flipped': ('dpo', lambda: flipped_bit('data/tiny/train.idx.npy', 200),
                                      r'train.idx.npy is missing or damaged'),
    'a broken meta.json': ('dpo', lambda: text_file('data/tiny/meta.json', '{', *DPO),
                           r'meta.json .*prepare_prefs.py'),
    'groups of three': ('dpo', triples, r'holds rankings, for loss=plackett_luce, not dpo'),
    'another vocabulary size': ('dpo', lambda: sft_model(small_gpt(vocab_size=1300)),
                                r'vocabulary mismatch: data/tiny has 257 tokens.*1,300'),
    'another tokenizer': ('dpo', lambda: sft_model(small_gpt(), 'gpt2'), r'another tokenizer'),
    'data longer than the model': ('dpo', lambda: sft_model(small_gpt(block_size=32)),
                                   r'max_length=64.*32 positions: prepare with --max_length=32'),
    'block_size below the data': ('sft', [*SFT, '--block_size=16'], r'max_length=64.*16 positions'),
    'rows shorter than a pair': ('dpo', [*DPO, '--row_tokens=16'], r'row_tokens=16 is less than the longest group'),
    'heads that do not divide': ('sft', [*SFT, '--n_head=5'], r'n_embd=32 is not a multiple of n_head=5'),
    'a missing checkpoint file': ('dpo', [*DPO, '--init_from=out/tiny/sft/step-000009.pt'], r'step-000009'),
    'a file in the way': ('dpo', lambda: text_file('out/tiny/dpo', 'in the way', *DPO),
                          r'cannot write to out/tiny/dpo'),
    'no cuda here': ('dpo', [*DPO[:-1], '--device=cuda'], r'device=cuda is not available here|torch sees 0 GPUs'),
    # rows and knobs of prepare_prefs.py
    'JSONL: broken': ('prepare_prefs', lambda: jsonl(b'{"prompt": "x", '),
                      r'pairs.jsonl line 3: not JSON.*max_bad_lines'),
    'JSONL: not UTF-8': ('prepare_prefs', lambda: jsonl(b'{"prompt": "\xff", "chosen": "y", "rejected": "z"}'),
                         r'line 3: not JSON.*utf-8'),
    'JSONL: empty file': ('prepare_prefs', lambda: text_file('e.jsonl', '', '--name=own', '--source=e.jsonl',
                                                             '--tokenizer=bytes'), r'e.jsonl holds no rows'),
    # sample.py
    'no AFTER to sample': ('sample', ['--name=tiny'], r'out/tiny/dpo holds no checkpoint: run dpo.py'),
    'no checkpoint to sample': ('sample', ['--name=tiny', '--after=out'], r'out is no checkpoint, and no directory'),
    'prompts of two kinds': ('sample', ['--name=tiny', '--prompt=a', '--prompts_file=b'], r'keep one'),
    'AFTER of another tokenizer': ('sample', lambda: after(sft_model, small_gpt(), 'gpt2', flags=['--name=tiny',
                                                                                               '--after=out/tiny/sft']),
                                    r'another tokenizer'),
}


@pytest.mark.parametrize('case', CASES)
def test_a_mistake_ends_with_one_line_and_nothing_lost(experiment, case):
    script, args, expected = CASES[case]
    args = args() if callable(args) else args
    before = snapshot()
    with pytest.raises(SystemExit, match=f'(?s){expected}') as caught:
        main(script, args)
    message = caught.value.code
    assert isinstance(message, str) and '\n' not in message and len(message) < 600, message
    assert snapshot() == before


@pytest.mark.parametrize('name, content, words', [
    ('none.txt', b'', 'none.txt cannot be read'), ('p.txt', b' \n\n', 'p.txt holds no prompt'),
    ('p.txt', b'a\n\xff', 'UnicodeDecodeError'), ('p.jsonl', b'{"prompt": "a"}\n\n{"prompt": 3}', "line 3: BadRow: not a string: 'prompt' is 3"),
    ('p.jsonl', b'{"prompt": "a"}\nprompt', 'line 2: BadRow: not JSON'), ('p.jsonl', b'{"text": "a"}', "'prompt' is None"),
    ('p.jsonl', b'[["a"]]', "no message: 'prompt' holds 'a'"),
    ('p.jsonl', b'{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
     b'{"role": "tool", "content": "c"}, {"role": "user", "content": "d"}]}', 'a prompt has turns of tools'), ('p.jsonl', b'{"prompt": "\\ud800"}', 'half a character'),
    ('none.py', b'', 'none.py: FileNotFoundError'), ('r.py', b'def reword(p, r): 0', 'defines no function reward'),
    ('r.py', b'1 +', 'SyntaxError'), ('r.py', b'import nothing_like_it', 'r.py line 1'),
    ('r.py', b'def reward(p): 0', 'TypeError'), ('r.py', b'def reward(p, r): return ["good"] * 8', 'ValueError'),
    ('r.py', b'def reward(p, r): return [0]', 'true_reward must be 8 finite numbers'),
    ('r.py', b'def reward(p, r): return [0] * 7 + [float("nan")]', 'true_reward must be 8 finite numbers'),
    ('r.py', b'def reward(p, r):\n  return 1 / 0', 'ZeroDivisionError: division by zero (r.py line 2)'),
    ('r.py', b'def reward(p, r): return [0] * 8\ndef metrics(p, r): return dict(m=[True])', 'm must be 8 finite'),
    ('r.py', b'def reward(p, r): return [0] * 8\ndef metrics(p, r): return [True] * 8', 'TypeError'),
])
def test_a_bad_file_of_prompts_or_rewards_is_one_line(experiment, name, content, words):
    if content:
        Path(name).write_bytes(content)
    flag = 'reward' if name.endswith('py') else 'prompts_file'
    with pytest.raises(config.UserError) as caught:
        main('sample', ['--name=tiny', '--after=out/tiny/sft', '--max_new_tokens=4', f'--{flag}={name}'])
    assert words in caught.value.message and name in caught.value.message and '\n' not in caught.value.message


@pytest.mark.parametrize('case', ['unknown flag', 'no prepared data', 'a bin cut short', 'JSONL: not UTF-8'])
def test_in_a_terminal_it_is_one_line_on_stderr_and_status_1(experiment, case):
    script, args, _ = CASES[case]
    done = run_stage(f'{script}.py', *(args() if callable(args) else args), check=False)
    assert done.returncode == 1 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr


def ends_with(main, **environment):
    """What stands on stderr after config.run(main), an expression, in a process of its own."""
    code = f'import sys, time; sys.path.insert(0, {str(ROOT)!r}); import config\ntime.sleep = print\nconfig.run({main})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1
    return done.stdout + done.stderr


def test_a_gpu_out_of_memory_is_one_line():
    said = ends_with('lambda: (_ for _ in ()).throw(__import__("torch").OutOfMemoryError("CUDA out of memory"))')
    assert said.splitlines()[-1].startswith('error: the GPU is out of memory: lower --row_tokens') and 'Trace' not in said


def test_what_a_developer_can_cause_keeps_its_traceback():
    said = ends_with('lambda: {}["nothing"]')
    assert 'Traceback' in said and "KeyError: 'nothing'" in said


def test_rank_0_speaks_for_all_and_another_rank_waits_and_says_who_it_is():
    """torchrun ends all ranks when one leaves; here nobody does, so that both have their say."""
    wrong = r'lambda: config.need(False, "two\nlines")'
    assert ends_with(wrong, RANK='0', LOCAL_RANK='0') == 'error: two lines\n'
    assert re.fullmatch('7\nerror: rank 3 on .+: two lines\n', ends_with(wrong, RANK='3', LOCAL_RANK='1'))


def test_what_rank_0_alone_sees_ends_all_ranks_with_one_line(experiment):
    Path('out/tiny/dpo').write_text('in the way')
    done = run_stage('dpo.py', '--name=tiny', '--batch_size=8', '--device=cpu', processes=2, check=False)
    line = 'error: cannot write to out/tiny/dpo'
    assert done.returncode != 0 and done.stderr.startswith(line) and done.stderr.count(line) == 2
    assert line in done.stderr.splitlines()[-2], 'the last that torchrun prints, but for a rule'
    assert 'dpo.py", line' not in done.stderr, 'no rank is left in a collective'


def test_weights_from_a_later_step_go_when_a_run_is_resumed_before_them(experiment):
    main('dpo', [*DPO, '--max_steps=4', '--save_interval=2'])
    os.truncate(checkpoint.find('out/tiny/dpo')[-1], 100)
    main('dpo', [*DPO, '--max_steps=3', '--resume'])
    assert [p[-9:] for p in checkpoint.find('out/tiny/dpo')] == ['000002.pt', '000003.pt']
    for path in checkpoint.find('out/tiny/dpo'):
        os.truncate(path, 100)
    before = snapshot()
    with pytest.raises(SystemExit, match='no checkpoint of out/tiny/dpo can be read'):
        main('dpo', [*DPO, '--resume'])
    assert snapshot() == before


LIMITED = f"""if 1:
    import resource, runpy, signal, sys
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    sys.path.insert(0, {str(ROOT)!r})
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name='__main__')"""


@pytest.mark.parametrize('stage', ['dpo', 'sft'])
def test_a_full_disk_keeps_the_checkpoints_before_it(experiment, stage):
    """The file size limit of the process, hit in the middle of the second checkpoint, acts as a full disk."""
    args = {'dpo': DPO, 'sft': SFT}[stage]
    main(stage, [*args, '--save_interval=1'])
    kept = checkpoint.find(f'out/tiny/{stage}')
    content = {p: Path(p).read_bytes() for p in kept}
    size = os.path.getsize(kept[-1])
    more = [*args, '--max_steps=4', '--save_interval=1', '--resume']
    done = subprocess.run([sys.executable, '-c', LIMITED, str(size // 2), ROOT / f'{stage}.py', *more],
                          capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert errors and 'cannot save step 3' in errors[0] and 'untouched' in errors[0] and 'Traceback' not in done.stderr
    assert {p: Path(p).read_bytes() for p in checkpoint.find(f'out/tiny/{stage}')} == content
    assert not list(Path(f'out/tiny/{stage}').glob('*.tmp')), 'no half-written file stays'
    main(stage, [*args, '--max_steps=4', '--resume'])           # and it goes on once there is room
    assert checkpoint.find(f'out/tiny/{stage}')[-1].endswith('step-000004.pt')


# --- config ---------------------------------------------------------------------------------------

def configs_of_stages():
    return {stage: importlib.import_module(script).Config for stage, script in STAGES.items()}


def test_every_shipped_config_loads_for_every_stage():
    files = sorted(p for p in (ROOT / 'config').glob('*.py') if p.name != '__init__.py')
    assert {'reviews.py', 'hh.py', 'hh_small.py', 'hh_cpu.py'} <= {p.name for p in files}
    for path in files:
        for stage, Config in configs_of_stages().items():
            assert config.load(Config, stage, [str(path)]).name == path.stem


def test_flags_win_over_files_in_any_order_and_help_prints_every_knob(tmp_path, capsys):
    path = tmp_path / 'a.py'
    path.write_text("name = 'a'\ndpo = dict(beta=0.5, batch_size=2)\ndef row(raw):\n    return raw")
    stages = configs_of_stages()
    for argv in (['--beta=0.2', str(path)], [str(path), '--beta=0.2']):
        cfg = config.load(stages['dpo'], 'dpo', argv)
        assert (cfg.beta, cfg.batch_size, cfg.name, cfg.origin['beta']) == (0.2, 2, 'a', 'flag')
        assert cfg.functions['row'](3) == 3
        shown = config.show(cfg).splitlines()
        assert len(shown) == len(dataclasses.fields(cfg)) and any(line.endswith(f"'a'   ({path})") for line in shown)
    for stage, Config in stages.items():
        with pytest.raises(SystemExit) as done:
            config.load(Config, stage, ['--help'])
        text = capsys.readouterr().out
        assert done.value.code == 0
        for field in dataclasses.fields(Config):
            assert f'--{field.name}=' in text, (stage, field.name)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has it')
def test_a_full_disk_under_stdout_is_one_line():
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, '-u', ROOT / 'prepare_prefs.py', '--help'], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == 'error: No space left on device: standard output, or a file\n'
