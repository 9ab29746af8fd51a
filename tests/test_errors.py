"""A user's mistakes: one clear line that says what, where and what to do; exit status not 0; nothing lost."""
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo
import prepare_prefs
import sample
import sft
from conftest import ROOT, random_groups, run_stage, small_gpt, write_data
from model import GPT, find_checkpoints, save_checkpoint

MAIN = dict(prepare_prefs=prepare_prefs.main, sft=sft.main, dpo=dpo.main, sample=sample.main)
GOOD = '{"prompt": "Q%d", "chosen": " yes %d", "rejected": " no %d"}\n'
DPO = ['--name=tiny', '--max_steps=2', '--batch_size=8', '--device=cpu']
SFT = [*DPO, '--init_from=scratch', '--n_embd=32']


def snapshot():
    """Every file below the working directory, with its content."""
    return {str(p): p.read_bytes() for p in Path('.').rglob('*') if p.is_file()}


def jsonl(bad, name='pairs.jsonl', good=20):
    """An own data file with `bad` (bytes) as line 3. -> its flags"""
    lines = [(GOOD % (i, i, i)).encode() for i in range(good)]
    Path(name).write_bytes(b''.join([*lines[:2], bad + b'\n', *lines[2:]]))
    return ['--name=own', f'--source={name}', '--tokenizer=bytes']


def config_file(text):
    Path('mine.py').write_text(text)
    return ['mine.py']


def pickled_checkpoint():
    path = Path('out/foreign/step-000001.pt')
    path.parent.mkdir()
    torch.save(small_gpt().state_dict(), path)
    path.with_suffix('.json').write_text(json.dumps({'sha256': prepare_prefs.sha256_file(path)}))
    return [*DPO, '--init_from=out/foreign']


def code_in_a_pickle():
    path = Path('out/foreign/step-000001.pt')
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(os.system))
    path.with_suffix('.json').write_text(json.dumps({'sha256': prepare_prefs.sha256_file(path)}))
    return [*DPO, '--init_from=out/foreign']


def gpt2_folder(change, damage=None):
    small_gpt().save_pretrained('hf')
    path = Path('hf/config.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if damage:
        weights = Path('hf/model.safetensors')
        weights.write_bytes(weights.read_bytes()[:damage])
    return [*DPO, '--init_from=hf']


def altered(path, at=100):
    content = bytearray(Path(path).read_bytes())
    content[at] ^= 4
    Path(path).write_bytes(content)
    return DPO


def other_vocabulary():
    save_checkpoint('out/tiny/sft', 2, small_gpt(vocab_size=300 + 257), dict(config={}, vocabulary=None))
    return DPO


def other_tokenizer():
    save_checkpoint('out/tiny/sft', 2, small_gpt(), dict(config={}, vocabulary='gpt2'))
    return DPO


def short_model():
    save_checkpoint('out/tiny/sft', 2, small_gpt(block_size=32), dict(config={}, vocabulary=None))
    return DPO


def triples():
    write_data('data/three', {'train': random_groups(9, 3, np.random.default_rng(0)), 'val': random_groups(3, 3, np.random.default_rng(0))})
    return ['--name=three', '--init_from=out/tiny/sft', '--batch_size=2']


CASES = {       # name: (stage, its arguments or what makes them, what the line must say)
    'unknown flag': ('dpo', ['--name=tiny', '--betta=0.2'], r"unknown key 'betta'.*did you mean 'beta'"),
    'unknown key in a file': ('dpo', lambda: config_file("name = 'tiny'\ndpo = dict(learning_rte=1e-5)"),
                              r"mine.py: unknown key 'learning_rte'.*did you mean 'learning_rate'"),
    'unknown name in a file': ('dpo', lambda: config_file("name = 'tiny'\ndop = dict()"), r"mine.py: unknown name 'dop'.*'dpo'"),
    'syntax error in a file': ('dpo', lambda: config_file("name = 'tiny'\ndpo = dict("), r'mine.py line 2: SyntaxError'),
    'exception in a file': ('dpo', lambda: config_file("name = 'tiny'\ndpo = dict(beta=1 / 0)"), r'mine.py line 2: ZeroDivision'),
    'a stage that is no dict': ('dpo', lambda: config_file("dpo = 3"), r"'dpo' must be a dict"),
    'missing config file': ('dpo', ['config/nope.py'], r'config/nope.py does not exist'),
    'wrong type in a flag': ('dpo', ['--name=tiny', '--batch_size=many'], r"batch_size='many' must be int"),
    'wrong type in a file': ('dpo', lambda: config_file("dpo = dict(compile='yes')"), r"compile='yes' must be bool"),
    'out of range': ('dpo', ['--name=tiny', '--beta=-1'], r'beta=-1.0 is out of range: beta > 0'),
    'not a number': ('dpo', ['--name=tiny', '--learning_rate=nan'], r'learning_rate'),
    'no such choice': ('dpo', ['--name=tiny', '--optimizer=sgd'], r"optimizer='sgd' must be one of 'rmsprop', 'adamw'"),
    'a flag without a value': ('dpo', ['--name=tiny', '--beta'], r'--beta needs a value'),
    'a name that is a path': ('dpo', ['--name=../x'], r'name='),
    'no prepared data': ('dpo', ['--name=nothing'], r'data/nothing/meta.json does not exist: run prepare_prefs.py'),
    'no documents': ('sft', [*SFT, '--train_on=documents'], r"no split 'documents_train'"),
    'no SFT checkpoint': ('dpo', lambda: [os.rename('out/tiny/sft', 'out/tiny/x'), *DPO][1:], r'holds no checkpoint: run sft.py'),
    'a folder without weights': ('dpo', lambda: [os.mkdir('empty'), *DPO, '--init_from=empty'][1:], r'neither a checkpoint'),
    'an unknown model name': ('dpo', [*DPO, '--init_from=no-such/model'], r"'no-such/model' is neither a directory here nor"),
    'a bin cut short': ('dpo', lambda: [os.truncate('data/tiny/train.bin', 50), *DPO][1:], r'train.bin is damaged.*prepare_prefs'),
    'a bin with one bit flipped': ('dpo', lambda: altered('data/tiny/val.bin'), r'val.bin is damaged'),
    'an index with one bit flipped': ('dpo', lambda: altered('data/tiny/train.idx.npy', 200), r'train.idx.npy is damaged'),
    'a broken meta.json': ('dpo', lambda: [Path('data/tiny/meta.json').write_text('{'), *DPO][1:], r'meta.json cannot be read'),
    'groups of three': ('dpo', triples, r'rankings of 3, loss=dpo needs pairs: --loss=plackett_luce takes them'),
    'another vocabulary size': ('dpo', other_vocabulary, r'vocabulary mismatch: data/tiny has 257 tokens.*557'),
    'another tokenizer': ('dpo', other_tokenizer, r'another tokenizer'),
    'data longer than the model': ('dpo', short_model, r'max_length=64.*32 positions: prepare with --max_length=32'),
    'block_size below the data': ('sft', [*SFT, '--block_size=16'], r'max_length=64.*16 positions'),
    'rows shorter than a pair': ('dpo', [*DPO, '--row_tokens=16'], r'row_tokens=16 is less than the longest group'),
    'heads that do not divide': ('sft', [*SFT, '--n_head=5'], r'n_embd=32 is not a multiple of n_head=5'),
    'a pickle that is not ours': ('dpo', pickled_checkpoint, r'is not a checkpoint of this project'),
    'a pickle with code in it': ('dpo', code_in_a_pickle, r'is not a checkpoint of this project'),
    'a model that is no GPT-2': ('dpo', lambda: gpt2_folder({'model_type': 'llama'}), r"model_type='llama', this model is GPT-2"),
    'another activation': ('dpo', lambda: gpt2_folder({'activation_function': 'relu'}), r"activation_function='relu'"),
    'weights of another shape': ('dpo', lambda: gpt2_folder({'n_embd': 64}), r'has shape'),
    'safetensors cut short': ('dpo', lambda: gpt2_folder({}, 3000), r'model.safetensors is damaged'),
    'a missing checkpoint file': ('dpo', [*DPO, '--init_from=out/tiny/sft/step-000009.pt'], r'step-000009'),
    'no cuda here': ('dpo', [*DPO[:-1], '--device=cuda'], r'torch sees 0 GPUs'),
    'JSONL: broken': ('prepare_prefs', lambda: jsonl(b'{"prompt": "x", '), r'pairs.jsonl line 3: not JSON.*max_bad_lines'),
    'JSONL: missing key': ('prepare_prefs', lambda: jsonl(b'{"prompt": "x", "chosen": "y"}'), r"line 3: missing key 'rejected'"),
    'JSONL: wrong type': ('prepare_prefs', lambda: jsonl(b'{"prompt": "x", "chosen": 3, "rejected": "z"}'), r"line 3: 'chosen' is not a string"),
    'JSONL: a list': ('prepare_prefs', lambda: jsonl(b'["x", "y", "z"]'), r'line 3: not an object'),
    'JSONL: empty response': ('prepare_prefs', lambda: jsonl(b'{"prompt": "x", "chosen": " ", "rejected": "z"}'), r"line 3: empty 'chosen'"),
    'JSONL: both the same': ('prepare_prefs', lambda: jsonl(b'{"prompt": "x", "chosen": "z", "rejected": "z"}'), r'line 3: .*same'),
    'JSONL: not UTF-8': ('prepare_prefs', lambda: jsonl(b'{"prompt": "\xff", "chosen": "y", "rejected": "z"}'), r'line 3: not UTF-8'),
    'JSONL: half a character': ('prepare_prefs', lambda: jsonl(b'{"prompt": "\\ud800", "chosen": "y", "rejected": "z"}'), r'line 3: .*surrogate'),
    'JSONL: empty file': ('prepare_prefs', lambda: [Path('e.jsonl').write_text(''), '--name=own', '--source=e.jsonl', '--tokenizer=bytes'][1:], r'e.jsonl'),
    'missing source file': ('prepare_prefs', ['--name=own', '--source=nope.jsonl'], r'nope.jsonl'),
    'unknown source': ('prepare_prefs', ['--name=own', '--source=nobody/nothing'], r"source 'nobody/nothing'"),
    'unknown tokenizer': ('prepare_prefs', lambda: [*jsonl(b'')[:2], '--tokenizer=gpt7'], r"gpt7"),
    'prompt longer than all': ('prepare_prefs', lambda: [*jsonl(b''), '--max_length=32', '--max_prompt_length=32'], r'max_prompt_length'),
    'a template without its place': ('prepare_prefs', lambda: [*jsonl(b''), '--template=Q:'], r'template'),
    'no AFTER to sample': ('sample', ['--name=tiny'], r'out/tiny/dpo holds no checkpoint: run dpo.py'),
    'no such prompts file': ('sample', lambda: [Path('a.py').write_text('')] and ['--name=tiny', '--prompts_file=nope.txt'], r'nope.txt'),
    'a reward file without reward': ('sample', lambda: [Path('a.py').write_text('x = 1')] and ['--name=tiny', '--reward=a.py'], r'a.py defines no function reward'),
}


@pytest.mark.parametrize('case', CASES)
def test_a_mistake_ends_with_one_line_and_nothing_lost(experiment, case):
    stage, args, expected = CASES[case]
    args = args() if callable(args) else args
    before = snapshot()
    with pytest.raises(SystemExit, match=f'(?s){expected}') as caught:
        MAIN[stage](args)
    message = caught.value.code
    assert isinstance(message, str) and '\n' not in message and len(message) < 600, message
    assert snapshot() == before


def test_a_batch_smaller_than_the_world_is_refused(experiment):
    before = snapshot()
    done = run_stage('dpo.py', '--name=tiny', '--batch_size=1', '--device=cpu', processes=2, check=False)
    assert done.returncode != 0 and 'error: batch_size=1 is smaller than the 2 processes' in done.stderr
    assert 'dpo.py", line' not in done.stderr and snapshot() == before


@pytest.mark.parametrize('case', ['unknown flag', 'no prepared data', 'a bin cut short', 'JSONL: not UTF-8'])
def test_in_a_terminal_it_is_one_line_on_stderr_and_status_1(experiment, case):
    stage, args, _ = CASES[case]
    done = run_stage(f'{stage}.py', *(args() if callable(args) else args), check=False)
    assert done.returncode == 1 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason='root writes everywhere')
def test_no_permission_is_said(experiment):
    os.chmod('out/tiny', 0o500)
    with pytest.raises(SystemExit, match='cannot write to out/tiny/dpo: Permission denied'):
        dpo.main(DPO)


def test_a_folder_that_cannot_be_made_is_said(experiment):
    """What root sees, too: a file stands where the folder must go."""
    Path('out/tiny/dpo').write_text('in the way')
    with pytest.raises(SystemExit, match='cannot write to out/tiny/dpo'):
        dpo.main(DPO)
    assert Path('out/tiny/dpo').read_text() == 'in the way'


def test_what_rank_0_alone_sees_ends_all_ranks_with_one_line(experiment):
    Path('out/tiny/dpo').write_text('in the way')
    done = run_stage('dpo.py', '--name=tiny', '--batch_size=8', '--device=cpu', processes=2, check=False)
    assert done.returncode != 0 and done.stderr.count('error: cannot write to out/tiny/dpo') == 1
    assert 'dpo.py", line' not in done.stderr, 'no rank is left in a collective'


def test_a_tracker_that_is_not_installed_is_named(experiment, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(SystemExit, match='track=wandb needs wandb: pip install wandb'):
        dpo.main([*DPO, '--track=wandb'])


def test_weights_from_a_later_step_go_when_a_run_is_resumed_before_them(experiment):
    dpo.main([*DPO, '--max_steps=4', '--save_interval=2'])
    os.truncate(find_checkpoints('out/tiny/dpo')[-1], 100)
    dpo.main([*DPO, '--max_steps=3', '--resume'])
    assert [p[-9:] for p in find_checkpoints('out/tiny/dpo')] == ['000002.pt', '000003.pt']
    for path in find_checkpoints('out/tiny/dpo'):
        os.truncate(path, 100)
    before = snapshot()
    with pytest.raises(SystemExit, match='no checkpoint of out/tiny/dpo can be read'):
        dpo.main([*DPO, '--resume'])
    assert snapshot() == before


@pytest.mark.parametrize('stage', ['dpo', 'sft'])
def test_a_full_disk_keeps_the_checkpoints_before_it(experiment, stage):
    """The file size limit of the process, hit in the middle of the second checkpoint, acts as a full disk."""
    args = {'dpo': DPO, 'sft': SFT}[stage]
    MAIN[stage]([*args, '--save_interval=1'])
    kept = find_checkpoints(f'out/tiny/{stage}')
    content = {p: Path(p).read_bytes() for p in kept}
    size = os.path.getsize(kept[-1])
    script = ROOT / f'{stage}.py'
    code = (f'import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
            f'resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2})); sys.path.insert(0, {str(ROOT)!r}); '
            f'sys.argv = {[str(script), *args, "--max_steps=4", "--save_interval=1", "--resume"]!r}; '
            f'runpy.run_path({str(script)!r}, run_name="__main__")')
    Path('limited.py').write_text(code)
    import subprocess
    import sys
    done = subprocess.run([sys.executable, 'limited.py'], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith('error')]
    assert errors and 'cannot save step 3' in errors[0] and 'untouched' in errors[0] and 'Traceback' not in done.stderr
    assert {p: Path(p).read_bytes() for p in find_checkpoints(f'out/tiny/{stage}')} == content
    assert not list(Path(f'out/tiny/{stage}').glob('*.tmp')), 'no half-written file stays'
    MAIN[stage]([*args, '--max_steps=4', '--resume'])       # and it goes on once there is room
    assert find_checkpoints(f'out/tiny/{stage}')[-1].endswith('step-000004.pt')
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != size // 2


def test_bad_lines_are_counted_up_to_ten_and_allowed_ones_skipped(experiment, capsys):
    flags = jsonl(b'{}\n' * 14 + b'nonsense')
    with pytest.raises(SystemExit, match='15 bad lines'):
        prepare_prefs.main(flags)
    printed = capsys.readouterr().err
    assert printed.count("missing key 'prompt'") == 10 and 'pairs.jsonl line 3:' in printed
    assert not Path('data/own').exists() or not list(Path('data/own').iterdir())
    prepare_prefs.main([*flags, '--max_bad_lines=15'])
    assert len(prepare_prefs.Groups('data/own', 'train')) + len(prepare_prefs.Groups('data/own', 'val')) == 20


def test_every_shipped_config_loads_for_every_stage():
    import config
    files = sorted(p for p in (ROOT / 'config').glob('*.py') if p.name != '__init__.py')
    assert {'reviews.py', 'hh.py', 'hh_small.py', 'hh_cpu.py'} <= {p.name for p in files}
    for path in files:
        for stage, module in (('prepare', prepare_prefs), ('sft', sft), ('dpo', dpo), ('sample', sample)):
            assert config.load(module.Config, stage, [str(path)]).name == path.stem


def test_flags_win_over_files_in_any_order_and_help_prints_every_knob(tmp_path, capsys):
    import dataclasses

    import config
    (tmp_path / 'a.py').write_text("name = 'a'\ndpo = dict(beta=0.5, batch_size=2)")
    for argv in (['--beta=0.2', str(tmp_path / 'a.py')], [str(tmp_path / 'a.py'), '--beta=0.2']):
        cfg = config.load(dpo.Config, 'dpo', argv)
        assert (cfg.beta, cfg.batch_size, cfg.name, cfg.origin['beta']) == (0.2, 2, 'a', 'flag')
    for stage, module in (('prepare', prepare_prefs), ('sft', sft), ('dpo', dpo), ('sample', sample)):
        with pytest.raises(SystemExit) as done:
            config.load(module.Config, stage, ['--help'])
        text = capsys.readouterr().out
        assert done.value.code == 0
        for field in dataclasses.fields(module.Config):
            assert f'--{field.name}=' in text, (stage, field.name)


def test_an_export_that_fails_leaves_the_folder_that_stood_there(experiment, monkeypatch):
    small_gpt().save_pretrained('hf')
    before = snapshot()
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(OSError):
        small_gpt(seed=2).save_pretrained('hf')
    assert snapshot() == before and GPT.from_pretrained('hf')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has it')
def test_a_full_disk_under_stdout_is_one_line():
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, '-u', ROOT / 'prepare_prefs.py', '--help'], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == 'error: No space left on device: standard output, or a file\n'
