"""A slice of the fault campaign (repro/faults.py), proof that it can fail, and what it found, each by itself."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo
from config import UserError
from conftest import ROOT, random_groups, read_log, small_gpt, write_data
from nanodpo import checkpoint
from nanodpo.data import Groups, read_meta, replacing, sha256_file
from nanodpo.bpe import make_tokenizer
from nanodpo.text import load_tokenizer, text_ids
import faults

DPO = ['--name=tiny', '--max_steps=8', '--batch_size=8', '--device=cpu', '--learning_rate=1e-3', '--warmup_steps=2']


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def some_groups(seed=0):
    return {'train': random_groups(4, 2, np.random.default_rng(seed))}


# --- the campaign itself --------------------------------------------------------------------------

def test_a_slice_of_the_campaign_passes(tmp_path):
    flags = ['--trials=1', '--workers=1', '--seed=2', f'--out={tmp_path}/faults']
    done = subprocess.run([sys.executable, ROOT / 'repro/faults.py', *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / 'faults.json').read_text()
    results = json.loads(text)
    assert {r['name'] for r in results} == set(faults.CLASSES) and len(results) == len(faults.CLASSES)
    assert len(text.splitlines()) == len(results) + 2, 'a record a line'
    assert sum(r['n'] for r in results if r['name'] == 'kill') == 2, 'two kills a trial'
    assert '10 of 10 trials passed' in (tmp_path / 'faults.md').read_text()


def test_the_published_score_is_of_this_campaign():
    results = json.loads((ROOT / 'repro/results/faults.json').read_text())
    trials = {name: sum(r['name'] == name for r in results) for name in faults.CLASSES}
    assert trials == {name: trials for name, (_, trials, _) in faults.CLASSES.items()}
    passed = sum(not r['wrong'] for r in results)
    assert f'{passed:,} of {len(results):,} trials passed' in (ROOT / 'repro/results/faults.md').read_text()


def test_the_campaign_fails_where_a_stage_does_not_check_what_it_reads_or_who_else_writes():
    cell = faults.CELLS.index(('sft', 'data/own/train.bin', 'flip'))
    pair = faults.PAIRS.index(('dpo', 'other dpo')) + 4 * len(faults.PAIRS)
    code = f'''if 1:
        import sys
        sys.path.insert(0, {str(ROOT / 'repro')!r})
        import faults
        from nanodpo import data, run
        data.check_file = lambda path, sha256: None
        run.hold = lambda folder, say: None
        faults.main(['--only=both', '--seed={pair}', '--trials=1', '--workers=1'])
        sys.exit(faults.main(['--only=damage', '--seed={cell}', '--trials=1', '--workers=1']))'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 1 and 'sft, data/own/train.bin bit' in done.stdout, done.stdout + done.stderr
    assert f'--only=damage --seed={cell} --trials=1' in done.stdout and '0 of 1 trials passed' in done.stdout
    assert 'for other dpo: ' in done.stdout, done.stdout
    assert done.stdout.count('0 of 1 trials passed') == 2


def test_the_tracer_stops_before_each_operation_in_turn(tmp_path):
    def work():
        os.mkdir('made')
        Path('made/file').write_text('whole')
        os.replace('made/file', 'made/renamed')
        os.listdir('made')
        Path('/dev/null').read_text()           # elsewhere: not counted
    seen = []
    for n in range(5):
        folder = tmp_path / f'{n}'
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            os.chdir(folder)
            faults.at_operation(n, tmp_path / f'{n}.count', signal.SIGKILL)
            work()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (-signal.SIGKILL if n < 4 else 0)
        seen.append([p.name for p in sorted(folder.rglob('*'))])
        assert (tmp_path / f'{n}.count').stat().st_size == min(n + 1, 4)
    assert seen == [[], ['made'], ['made', 'file'], ['made', 'renamed'], ['made', 'renamed']]


@pytest.mark.parametrize('kind, line, says', [
    ('pairs', b'{"prompt": "", "chosen": "a", "rejected": "b"}\r', (['', 'a', 'b'], None)),
    ('pairs', '\ufeff{"prompt": "\\u0000", "rejected": "b", "chosen": "\u2028a", "x": NaN}'.encode(),
     (['\0', '\u2028a', 'b'], None)),
    ('pairs', b'{"prompt": "", "chosen": "a", "rejected": "b", "chosen": "b"}', False),
    ('pairs', b' \t\r', None),
    ('pairs', b'[1]', False),
    ('pairs', b'null', False),
    ('pairs', b'{"prompt": "", "chosen": "\\ud800", "rejected": "b"}', False),
    ('rankings', b'{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 2.5]}', (['p', 'b', 'c', 'a'], None)),
    ('rankings', b'{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 1.0, 2]}', False),
    ('unpaired', b'{"prompt": "p", "completion": "a", "label": false}', (['p', 'a'], False)),
    ('unpaired', b'{"prompt": "p", "completion": "a", "label": 2}', False),
    ('documents', b'{"text": " a"}', (['', ' a'], None)),
    ('demonstrations', b'{"prompt": " ", "completion": "a"}', ([' ', 'a'], None)),
    ('demonstrations', b'{"prompt": "p", "completion": "a", "label": true}', False),
    ('translated', b'{"question": "p", "good": "a", "bad": "b", "gap": 1.0}', (['p', 'a', 'b'], None)),
    ('translated', b'{"question": "p", "good": "a", "bad": "b", "gap": 0.5}', ()),
    ('translated', b'{"question": "p", "good": "a", "bad": " "}', ()),
    ('translated', b'{"question": "p", "good": "a"}', False),
    ('translated', b'null', False),
    ('conversations', b'{"prompt": "p", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "\\nb"}',
     (['\n\nHuman: p\n\nAssistant:', ' a', '\nb'], None)),
    ('conversations', b'{"prompt": [{"role": "system", "content": "s"}], "chosen": "a", "rejected": "b"}', False)])
def test_the_oracle_says_what_the_format_says(kind, line, says):
    assert faults.expected(kind, line) == says


# --- data sets ------------------------------------------------------------------------------------

def test_any_bit_of_meta_json_or_tokenizer_json_that_matters_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    folder = write_data(tmp_path / 'd', some_groups())
    good = read_meta(folder)
    refused = 0
    for file in ('meta.json', 'tokenizer.json'):
        path, undamaged = folder / file, (folder / file).read_bytes()
        for at in rng.integers(0, len(undamaged), 150):
            flipped = undamaged[at] ^ 1 << int(rng.integers(8))
            path.write_bytes(undamaged[:at] + bytes([flipped]) + undamaged[at + 1:])
            try:
                assert read_meta(folder) == good
            except UserError as error:
                assert file in error.message
                refused += 1
        path.write_bytes(undamaged)
    assert refused > 250
    (folder / 'meta.json').write_text(json.dumps(good))         # without its hash
    with pytest.raises(UserError, match="KeyError: 'sha256'"):
        read_meta(folder)


@pytest.mark.parametrize('change, changes, says', [
    (faults.sealed, dict(max_length='long'), 'meta.json has no usable max_length'),
    (faults.sealed, dict(template=None), 'meta.json has no usable template'),
    (faults.sealed, dict(vocab_size=2.5), 'meta.json has no usable vocab_size'),
    (faults.sealed, dict(splits=[]), 'meta.json has no usable splits'),
    (faults.sealed, dict(splits={'train': 3}), 'train is not what prepare_prefs.py writes: TypeError'),
    *((faults.odd_tokenizer, changes, 'tokenizer.json is no tokenizer, run prepare_prefs.py again: ')
      for changes in (dict(tokens=[]), dict(tokens=[1, 2]), dict(pattern='(')))])
def test_foreign_content_with_the_right_hash_is_one_line(tmp_path, change, changes, says):
    folder = write_data(tmp_path / 'd', some_groups())
    change(folder, changes)
    with pytest.raises(UserError, match=says):
        Groups(folder, 'train')
        load_tokenizer(str(folder), 'tokenizer.json')


def test_killed_between_any_two_renames_a_set_is_old_or_new_or_refused_and_the_next_run_makes_it(tmp_path):
    def replace_set(folder, other):
        with replacing(str(folder)) as aside:
            for file in content(other):
                shutil.copy(other / file, aside)
    old, new = (write_data(tmp_path / str(seed), some_groups(seed)) for seed in (1, 2))
    refused = 0
    for n in range(20):
        folder = Path(shutil.copytree(old, tmp_path / 'd'))
        pid = os.fork()
        if pid == 0:
            os.chdir(tmp_path)
            faults.at_operation(n, tmp_path / f'changes-{n}', signal.SIGKILL, faults.CHANGES)
            try:
                replace_set(folder, new)
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        if content(folder) not in (content(old), content(new)):
            with pytest.raises(UserError):
                Groups(folder, 'train')
            refused += 1
        assert killed or content(folder) == content(new)
        replace_set(folder, new)
        assert content(folder) == content(new)
        assert len(list(folder.iterdir())) == len(content(old)), 'nothing else is left'
        shutil.rmtree(folder)
        if not killed:
            break
    assert not killed and refused >= 5, 'three files go, and come back before meta.json'


def test_a_million_spaces_are_tokenised(tmp_path):
    make_tokenizer('bytes', [], str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path), 'tokenizer.json')
    for text in ('a' + ' ' * 1_000_000 + 'b', '\n' * 250_000, 'x y\u3000' * 60_000):
        assert bytes(text_ids(tokenizer, text)).decode() == text


# --- checkpoints and models -----------------------------------------------------------------------

def test_what_a_killed_run_left_goes_and_foreign_names_stay(tmp_path):
    run, state, model = tmp_path / 'run', dict(config={}), small_gpt()
    os.makedirs(run)
    for step in (1, 2, 3):
        checkpoint.save(str(run), step, model, state, keep=9)      # killed before it removed the first
    for left in ('step-000000.pt', 'step-000004.pt.tmp', 'step-000004.json.tmp', 'step-000004.pt'):
        (run / left).write_text('half')
    (run / 'step-000003 (copy).json').write_text('mine')
    assert [p[-9:] for p in checkpoint.find(str(run))] == ['000001.pt', '000002.pt', '000003.pt']
    checkpoint.open_run(str(run), 1).close()        # a run that goes on before damaged ones keeps them until it saves
    assert len(checkpoint.find(str(run))) == 3
    (run / 'log.jsonl').write_bytes(b'{"step": 3}\n{"st\xffp": 3}\n{"step": 4}\n')
    checkpoint.open_run(str(run), 3).close()
    checkpoint.save(str(run), 3, model, state)
    assert sorted(p.name for p in run.iterdir()) == [
        'log.jsonl', 'step-000002.json', 'step-000002.pt', 'step-000003 (copy).json', 'step-000003.json',
        'step-000003.pt']
    assert (run / 'log.jsonl').read_text() == '{"step": 3}\n'


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path):
    checkpoint.save(str(tmp_path), 2, small_gpt(), dict(config={}))
    for end in ('pt', 'json'):
        shutil.copy(tmp_path / f'step-000002.{end}', tmp_path / f'step-000005.{end}')
        shutil.copy(tmp_path / f'step-000002.{end}', tmp_path / f'best.{end}')
    with pytest.raises(UserError, match='step-000005.pt is not what its name says, but step 2'):
        checkpoint.load_model(str(tmp_path))
    assert checkpoint.read(str(tmp_path / 'best.pt'))['step'] == 2


@pytest.mark.parametrize('change, says', [
    (dict(optimizer={}), 'param_groups'), (dict(model={}), 'Missing key'),
    (dict(origin={}), "KeyError: 'data'")])
def test_a_foreign_checkpoint_is_not_resumed(experiment, change, says):
    dpo.main([*DPO, '--max_steps=1'])
    state = checkpoint.read(checkpoint.find('out/tiny/dpo')[-1]) | change
    torch.save(state, 'out/tiny/dpo/step-000001.pt')
    record = {'sha256': sha256_file('out/tiny/dpo/step-000001.pt')}
    Path('out/tiny/dpo/step-000001.json').write_text(json.dumps(record))
    before = content('out/tiny/dpo')
    with pytest.raises(UserError, match=f'cannot resume .*{says}'):
        dpo.main([*DPO, '--resume'])
    assert content('out/tiny/dpo') == before


def timeless(rows):
    return [{key: value for key, value in row.items() if 'second' not in key} for row in rows if 'loss' in row]


def test_a_resumed_log_sums_up_the_same_steps_whatever_the_intervals(experiment):
    args = [*DPO, '--log_interval=5', '--save_interval=3']
    dpo.main(args)
    undisturbed = timeless(read_log('out/tiny/dpo'))
    shutil.rmtree('out/tiny/dpo')
    dpo.main([*args, '--max_steps=3'])
    dpo.main([*args, '--resume'])
    assert timeless(read_log('out/tiny/dpo')) == undisturbed
    assert [row['step'] for row in undisturbed] == [1, 3, 5, 6, 8]
