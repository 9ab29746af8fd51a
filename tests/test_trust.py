"""Nothing is lost and nothing false is called done: who holds a run's folder, what is kept, what is refused."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import config
import dpo
import sample
import sft
from conftest import (ROOT, by_hand, last_checkpoint, prepare, read_log, run_stage, save_sft, small_gpt,
                      write_rows)
from model import draw
from nanodpo import checkpoint, export, folder, sources
from nanodpo.checkpoint import load_model
from nanodpo.data import Groups
from nanodpo.run import learning_rate

DPO = ['--name=tiny', '--batch_size=8', '--max_steps=2', '--learning_rate=1e-3', '--warmup_steps=0', '--device=cpu',
       '--kl_prompts=8', '--log_interval=1']
WRONG = [*DPO, '--learning_rate=1e20']
LONG = 'x' * 1001
PAIRS = ''.join(json.dumps(dict(prompt=f'{i}', chosen=' y', rejected=' n')) + '\n' for i in range(9))


def refused(match, function, *args):
    """The line with which function(*args) ends."""
    with pytest.raises(SystemExit, match=match) as stop:
        function(*args)
    folder.release()
    assert isinstance(stop.value.code, str) and stop.value.code.isprintable(), 'one line, no control characters'
    return stop.value.code


# --- the folder of a run --------------------------------------------------------------------------

HOLDER = f'''if 1:
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from nanodpo.folder import hold
    hold(sys.argv[1])
    print('held', flush=True)
    input()'''


def holder(path):
    """A process that holds a folder until it reads a line."""
    process = subprocess.Popen([sys.executable, '-c', HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'held\n'
    return process


def test_a_folder_in_use_is_refused_by_name_and_a_kill_frees_it_with_a_note(experiment, capsys):
    other = holder('out/tiny/dpo')
    line = refused('out/tiny/dpo is in use', dpo.main, DPO)
    assert f'process {other.pid} on {socket.gethostname()}' in line and not os.path.exists('out/tiny/dpo')
    other.kill()
    other.wait()
    dpo.main(DPO)
    assert f'process {other.pid} on {socket.gethostname()} did not come to its end' in capsys.readouterr().out
    assert not list(Path().rglob('*.lock')), 'a run that ends leaves no lock'


def test_a_data_set_and_an_export_are_held_too(experiment):
    Path('pairs.jsonl').write_text(PAIRS)
    for path, function, args in (('data/made', prepare, ['--source=pairs.jsonl']),
                                 ('hf', export.main, [['out/tiny/sft', 'hf', '--data=']])):
        other = holder(path)
        refused(f'{path} is in use by process {other.pid}', function, *args)
        other.communicate(b'\n')


def test_no_start_deletes_a_run_and_the_folder_may_be_a_link(experiment, capsys):
    os.mkdir('scratch')
    os.symlink(os.path.abspath('scratch/run'), 'out/tiny/dpo')
    for steps in (1, 2, 3):
        dpo.main([*DPO, f'--max_steps={steps}'])
    said = capsys.readouterr().out
    assert os.path.islink('out/tiny/dpo') and sorted(os.listdir('scratch')) == ['run', 'run.1', 'run.2']
    steps = [last_checkpoint(f'scratch/{name}')['step'] for name in ('run.1', 'run.2', 'run')]
    assert steps == [1, 2, 3] and 'scratch/run is now in' in said and last_checkpoint('out/tiny/dpo')['step'] == 3


def test_runs_of_several_names_share_the_data_and_sample_takes_one(experiment, capsys):
    for name in ('a', 'b'):
        dpo.main([*DPO, f'--run_name={name}'])
    assert sorted(os.listdir('out/tiny')) == ['a', 'b', 'sft']
    sample.main(['--name=tiny', '--run_name=b', '--num_prompts=2', '--max_new_tokens=4', '--device=cpu'])
    assert 'BEFORE' in capsys.readouterr().out
    refused('run_name=', dpo.main, [*DPO, '--run_name=../x'])


def test_a_run_does_not_start_from_its_own_folder(experiment):
    dpo.main(DPO)
    (path,) = Path('out/tiny/dpo').glob('*.pt')
    for source in ('out/tiny/dpo', path):
        refused('is in the folder that this run writes', dpo.main, [*DPO, f'--init_from={source}'])
    refused('is in the folder that this run writes', dpo.main, [*DPO, '--run_name=sft'])
    dpo.main([*DPO, '--init_from=out/tiny/dpo', '--run_name=second'])
    refused('n_layer is for --init_from=scratch', sft.main, ['--name=tiny', '--init_from=out/tiny/sft', '--n_layer=7'])


def test_ids_of_another_tokenizer_than_the_model_s_are_refused_though_the_sizes_are_alike(experiment):
    """GPT-2 has 50,257 tokens, and Pythia 50,304 with padding."""
    groups = Groups('data/tiny', 'train')
    groups.meta['tokenizer'] = 'gpt2'
    for end, says in ((256, ''), ([0, 256], ''), (None, ''), (0, 'whose end token is 0: prepare with --tokenizer=pythia')):
        of_model = replace(small_gpt().config, vocab_size=300, hf=dict(eos_token_id=end))
        if says:
            refused(says, groups.check_model, of_model, None, 'pythia')
        else:
            groups.check_model(of_model, None, 'pythia')


def test_torchrun_takes_no_knob_for_an_option_of_its_own():
    """It reads the flags behind the script, too, and completes those that are a beginning of one of its own."""
    parser = pytest.importorskip('torch.distributed.run').get_args_parser()
    for stage in (sft, dpo):
        for knob in stage.Config.__dataclass_fields__:
            assert parser.parse_args(['x.py', f'--{knob}=1']).training_script_args == [f'--{knob}=1'], knob


def test_what_a_kill_left_half_written_goes_with_a_note(experiment, capsys):
    dpo.main(DPO)
    Path('elsewhere').write_text('precious')
    os.symlink(os.path.abspath('elsewhere'), 'out/tiny/dpo/log.jsonl.tmp')
    Path('out/tiny/dpo/step-000009.pt').write_text('no .json')
    dpo.main([*DPO, '--resume', '--max_steps=3'])
    said = capsys.readouterr().out
    assert said.count('which was never finished') == 2 and Path('elsewhere').read_text() == 'precious'
    assert {path.name for path in Path('out/tiny/dpo').iterdir()} == {
        'log.jsonl', *(f'step-00000{n}.{end}' for n in (2, 3) for end in ('pt', 'json'))}


def test_the_log_of_a_run_that_saved_nothing_goes_with_a_note(experiment, capsys):
    refused('step 1 broke the model', dpo.main, [*WRONG, '--eval_interval=0', '--save_interval=1'])
    dpo.main(DPO)
    assert 'removed out/tiny/dpo/log.jsonl, which was never finished' in capsys.readouterr().out


def test_a_set_that_was_never_finished_is_made_anew(experiment, capsys):
    Path('pairs.jsonl').write_text(PAIRS)
    prepare('--source=pairs.jsonl')
    os.mkdir('data/made/.tmp-set')
    prepare('--source=pairs.jsonl')
    said = capsys.readouterr().out
    assert 'removed data/made/.tmp-set, which was never finished' in said and not os.path.exists('data/made/.tmp-set')


SCRATCH = f'''if 1:
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from nanodpo.folder import scratch
    with scratch() as folder:
        print(folder, flush=True)
        input()'''


def test_the_temporary_folder_of_a_killed_process_goes_that_of_a_living_one_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    here = os.environ | dict(TMPDIR=str(tmp_path))
    others = [subprocess.Popen([sys.executable, '-c', SCRATCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=here)
              for _ in range(2)]
    killed, alive = (other.stdout.readline().decode().strip() for other in others)
    others[0].kill()
    others[0].wait()
    clone = str(tmp_path / 'nanodpo-main')          # of a user
    os.mkdir(clone)
    for path in killed, alive, clone:
        os.utime(path, (0, 0))          # long ago
    with folder.scratch() as mine:
        assert {str(path) for path in tmp_path.iterdir()} == {mine, alive, clone}
    assert f'removed {killed}' in capsys.readouterr().out
    others[1].communicate(b'\n')
    assert [str(path) for path in tmp_path.iterdir()] == [clone]


# --- what is no success ---------------------------------------------------------------------------

@pytest.mark.parametrize('flags, line', [
    (['--max_steps=1'], 'eval/loss is (nan|inf) after step 1'),
    (['--eval_interval=0', '--save_interval=1'], 'step 1 broke the model, and is not saved')])
def test_a_step_that_breaks_the_model_is_neither_saved_nor_done(experiment, flags, line):
    dpo.main([*DPO, '--max_steps=1', '--run_name=good'])
    refused(line, dpo.main, [*WRONG, *flags])
    assert not checkpoint.find('out/tiny/dpo')
    for text in Path('out/tiny/dpo/log.jsonl').read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
    refused('untouched', dpo.main, [*WRONG, *flags, '--max_steps=2', '--run_name=good', '--resume'])
    assert last_checkpoint('out/tiny/good')['step'] == 1


def test_weights_that_are_not_finite_are_named_on_save_load_and_export(experiment):
    model = small_gpt()
    with torch.no_grad():
        model.h[0].c_fc.weight[3, 4] = torch.nan
    refused('h.0.c_fc.weight holds a weight that is not finite', save_sft, model)
    refused('h.0.c_fc.weight holds', export.save_pretrained, model, 'hf')
    state = checkpoint.read(checkpoint.find('out/tiny/sft')[-1])
    forged(state | dict(model=model.state_dict()))
    refused('step-000001.pt: h.0.c_fc.weight holds a weight that is not finite', dpo.main, DPO)


def test_a_run_beyond_its_end_is_an_error_and_another_schedule_is_told(experiment, capsys):
    dpo.main([*DPO, '--max_steps=6', '--schedule=linear'])
    before = read_log('out/tiny/dpo')
    refused('is at step 6, beyond the 4 steps', dpo.main, [*DPO, '--max_steps=4', '--resume'])
    assert read_log('out/tiny/dpo') == before
    dpo.main([*DPO, '--max_steps=12', '--schedule=linear', '--resume'])
    then, now = (next(r['lr'] for r in read_log('out/tiny/dpo') if r['step'] == n and 'lr' in r) for n in (6, 7))
    assert f'the rate was {then:.2e} at step 6 and is {now:.2e} at step 7' in capsys.readouterr().out and now > 2 * then


def test_the_warm_up_fits_the_run_and_a_run_that_learned_nothing_says_so(experiment, capsys):
    cfg = config.load(dpo.Config, 'dpo', ['--name=tiny', '--learning_rate=2.0'])
    assert [learning_rate(cfg, step, 40) for step in (1, 2, 4, 5, 40)] == [0.5, 1, 2, 2, 2]
    assert learning_rate(cfg, 75, 10**6) == 1 and learning_rate(cfg, 1, 9) == 2
    still = 'it ended where it began: raise --learning_rate'
    for rate, said in (('1e-9', True), ('1e-2', False)):
        dpo.main([*DPO, f'--learning_rate={rate}'])
        assert (still in capsys.readouterr().out.splitlines()[-1]) == said


def test_a_signal_before_the_first_step_is_one_line(experiment):
    flags = [*DPO, '--kl_prompts=0', '--join_timeout=60']
    alone = by_hand(0, 2, 29999)                # it waits for rank 1
    process = subprocess.Popen([sys.executable, ROOT / 'dpo.py', *flags], stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, env=os.environ | alone)
    time.sleep(0.5)                             # torch is being imported
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGTERM, 'error: stopped by SIGTERM, nothing new was saved\n')


def test_a_temperature_that_float32_cannot_divide_by_is_greedy():
    logits = torch.randn(5, 40)
    for temperature in (0, 1e-300, 1e-39, 1e-37, 1e-31, 1e-20):
        assert torch.equal(draw(logits, torch.full((5,), 0.7), temperature), logits.argmax(1)), temperature


@pytest.mark.parametrize('size, said', [(1, True), (2, False)])
def test_kto_says_that_a_batch_of_one_has_no_z(experiment, capsys, size, said):
    dpo.main([*DPO, '--loss=kto', f'--batch_size={size}', '--max_steps=1'])
    assert ('batch_size=1 has none: z = 0' in capsys.readouterr().out) == said


def test_wandb_goes_on_with_the_run_that_it_began(experiment, monkeypatch):
    begun = []

    def init(id, **options):
        begun.append(id)
        return types.SimpleNamespace(id=id or f'run {len(begun)}', log=lambda *args, **options: None, finish=list)
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    for flags in ([], ['--resume', '--max_steps=3'], []):
        dpo.main([*DPO, '--track=wandb', *flags])
    assert begun == [None, 'run 1', None]


# --- hostile input --------------------------------------------------------------------------------

def forged(state, path='out/tiny/sft/step-000001.pt'):
    """Put a state in place of a checkpoint, with the hash that fits."""
    torch.save(state, path)
    Path(path).with_suffix('.json').write_text(json.dumps({'step': 1, 'sha256': checkpoint.sha256_file(path)}))


@pytest.mark.parametrize('change, words', [
    (lambda s: s.update(config=[1]), 'config must be a dict'),
    (lambda s: s.update(config={'beta': 'high'}), "beta='high'"),
    (lambda s: s.update(config={'beta': float('nan')}), 'beta=nan'),
    (lambda s: s.update(config={'name': 3}), 'name=3'),
    (lambda s: s.update(origin='x'), 'origin must be a dict'),
    (lambda s: s['model_config'].update(layer_norm_epsilon='1e-5'), "layer_norm_epsilon='1e-5'"),
    (lambda s: s['model_config'].update(n_layer=10**6), 'n_layer=1000000, but there are'),
    (lambda s: s['model_config'].update(n_embd=10**6), 'size mismatch|multiple|Error'),
    (lambda s: s['model'].update({'ln_f.bias': torch.zeros(32, dtype=torch.int64)}), 'ln_f.bias holds no real'),
    (lambda s: s['model'].update({'ln_f.bias': torch.zeros(32, dtype=torch.complex64)}), 'ln_f.bias holds no real'),
    (lambda s: s['model'].update({'ln_f.bias': torch.zeros(1).expand(32)}), 'ln_f.bias is larger than what the file'),
    (lambda s: s['model'].update({'ln_f.bias': torch.full((32,), torch.inf)}), 'ln_f.bias holds a weight that is not'),
    (lambda s: s['model_config'].update(n_head=0), 'model_config has a size of 0'),
    (lambda s: s['model_config'].update(layer_norm_epsilon=None), 'layer_norm_epsilon=None'),
    (lambda s: s.update(origin=dict(init=torch.zeros(3))), 'TypeError'),
    (lambda s: s['model'].update({'\x1b[31mred': 3}), 'TypeError'),
    (lambda s: s['model'].update({'\x1b[31mred': torch.zeros(3)}), r'\\x1b\[31mred'),
])
def test_a_checkpoint_of_a_stranger_is_refused_in_one_line(experiment, change, words):
    state = checkpoint.read('out/tiny/sft/step-000001.pt')
    change(state)
    forged(state)
    refused(words, load_model, 'out/tiny/sft')


@pytest.mark.parametrize('change', [
    lambda s: s.pop('config'), lambda s: s.pop('origin'), lambda s: s['origin'].pop('init'),
    lambda s: s['optimizer'].clear(), lambda s: s['optimizer']['state'].clear(),
    lambda s: s['optimizer']['state'][0].pop('square_avg'), lambda s: s['optimizer']['state'][0].update(step='x'),
    lambda s: s['optimizer']['state'][0].update(square_avg=torch.zeros(3)),
    lambda s: s['optimizer']['param_groups'][0].update(lr='fast'), lambda s: s['optimizer'].update(param_groups=[])])
def test_a_run_of_a_stranger_is_not_resumed(experiment, change):
    dpo.main(DPO)
    path = checkpoint.find('out/tiny/dpo')[-1]
    state = checkpoint.read(path)
    change(state)
    forged(state, path)
    refused(r'cannot resume out/tiny/dpo/step-000002\.pt', dpo.main, [*DPO, '--max_steps=3', '--resume'])


def test_weights_that_overflow_are_one_line_in_sample(experiment):
    model = small_gpt()
    with torch.no_grad():
        model.ln_f.weight.fill_(3e38)
    save_sft(model)
    refused('cannot sample: .* logits that are not finite', sample.main, ['--name=tiny', '--after=out/tiny/sft'])


@pytest.mark.parametrize('name, content', [
    ('a.jsonl', '{"prompt": "%s"}' % LONG), ('a.jsonl.gz', '{"prompt": "%s"}' % LONG), ('a.csv', LONG),
    ('a.csv', 'prompt,chosen\n"%s",b' % LONG), ('a.csv', 'prompt,chosen\n"%s",b' % ('x' * 600 + '\n' + 'x' * 600)),
    ('a.json', '[{"prompt": "%s"}]' % LONG)])
def test_what_is_longer_than_a_row_may_be_is_one_line(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, 'ROW', 1000)
    monkeypatch.setattr(sources, 'ARRAY', 1000)
    write_rows(name, content.encode())
    refused('1,?000', prepare, f'--source={name}')
    assert not os.path.exists('data')


def test_a_long_response_in_any_kind_of_file_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, 'ROW', 1000)
    rows = [dict(prompt=f'{i}', chosen=' y' * (500 if i == 2 else 1), rejected=' n') for i in range(9)]
    for name in ('a.json', 'a.parquet'):
        write_rows(name, rows)
        refused('3: too long: 1,001 characters, of 1,000', prepare, f'--source={name}')


@pytest.mark.parametrize('flags', [
    ['--init_from=hf'], ['--init_from=out/tiny/sft'], ['--init_from=pipe.pt'], ['--resume'], ['pipe.py'],
    ['--prompts_file=pipe'], ['--reward=pipe'], ['--source=pipes'], ['--documents=pipe.txt']])
def test_a_pipe_in_place_of_a_file_is_one_line(experiment, monkeypatch, flags):
    os.mkdir('hf')
    os.mkdir('pipes')
    dpo.main(DPO)
    for path in ('hf/config.json', 'pipes/train.jsonl', 'pipe', 'pipe.pt', 'pipe.json', 'pipe.py', 'pipe.txt',
                 *Path('out/tiny').glob('*/*.json')):
        Path(path).unlink(missing_ok=True)
        os.mkfifo(path)
    stage = sample.main if flags[0] in ('--prompts_file=pipe', '--reward=pipe') else dpo.main
    asked = ['--name=tiny', *flags, *(['--after=hf'] if stage is sample.main else ['--device=cpu'])]
    signal.alarm(20)                # it would wait for ever
    if flags[0].partition('=')[0] in ('--source', '--documents'):
        refused('no plain file', prepare, *flags)
    else:
        refused('no plain file|no checkpoint|does not exist', stage, asked)
    signal.alarm(0)


def test_checks_hold_without_asserts(experiment):
    meta = json.loads(Path('data/tiny/meta.json').read_text())
    Path('data/tiny/meta.json').write_text(json.dumps(meta | dict(max_length=8)))
    done = run_stage('dpo.py', *DPO, check=False, env=dict(PYTHONOPTIMIZE='1'))
    assert done.returncode == 1 and 'data/tiny/meta.json is damaged' in done.stderr


def test_strings_that_are_not_ours_cannot_move_the_cursor(experiment, capsys):
    """In errors `refused` sees to it."""
    dpo.main(DPO)
    with open('out/tiny/.dpo.lock', 'w') as lock:
        lock.write('\x1b[31m')
    state = checkpoint.read(checkpoint.find('out/tiny/dpo')[-1])
    forged(state | dict(config=state['config'] | dict(schedule='\x1b[31m')), checkpoint.find('out/tiny/dpo')[-1])
    dpo.main([*DPO, '--resume'])
    rows = [json.loads(line) | {'\x1b[31m': 'x'} for line in PAIRS.splitlines()]
    write_rows('a.jsonl', [*rows, b'{"prompt": "\x1b[31m'])
    prepare('--source=a.jsonl', '--max_bad_lines=1')
    prepare('--source=a.jsonl', '--max_bad_lines=1', '--dry_run')
    said = ''.join(capsys.readouterr())
    assert said.count('[31m') >= 4 and '\x1b' not in said


def test_half_precision_weights_of_a_checkpoint_become_float32(experiment):
    state = checkpoint.read('out/tiny/sft/step-000001.pt')
    forged(state | dict(model={name: p.half() for name, p in state['model'].items()}))
    model = load_model('out/tiny/sft')
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, state['model'][name].half().float()) for name, p in model.state_dict().items())


def test_sys_exit_in_a_file_of_the_user_is_an_error(experiment):
    Path('mine.py').write_text('import sys\nsys.exit(0)\n')
    assert 'SystemExit: 0 (mine.py line 2)' in refused('config file mine.py', dpo.main, ['mine.py'])
    refused('reward file mine.py', sample.main, ['--name=tiny', '--after=out/tiny/sft', '--reward=mine.py'])


def test_a_shard_that_is_no_plain_file_name_is_refused(experiment):
    pytest.importorskip('safetensors')
    export.main(['out/tiny/sft', 'hf', '--data='])
    os.rename('hf/model.safetensors', 'model.safetensors')
    Path('hf/model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(x='../model.safetensors'))))
    refused(r"hf holds no '\.\./model\.safetensors'", load_model, 'hf')


def test_a_typo_is_told_before_torch_is_imported(tmp_path):
    (tmp_path / 'torch.py').write_text('raise SystemExit("torch was imported")')
    for stage in ('prepare_prefs', 'sft', 'dpo', 'sample'):
        done = run_stage(f'{stage}.py', '--nmae=x', cwd=tmp_path, check=False, env=dict(PYTHONPATH=str(tmp_path)))
        assert done.returncode == 1 and re.fullmatch("error: flag: unknown key 'nmae' .*'name'.*\n", done.stderr), stage
        done = run_stage(f'{stage}.py', '--seed=1', cwd=tmp_path, check=False, env=dict(PYTHONPATH=str(tmp_path)))
        assert done.stderr == 'torch was imported\n', stage


@pytest.mark.parametrize('given, words', [
    (dict(WORLD_SIZE='abc'), 'start with torchrun'), (dict(WORLD_SIZE='2', RANK='5', LOCAL_RANK='0'), 'RANK=5'),
    (dict(WORLD_SIZE='0', RANK='0', LOCAL_RANK='0'), 'WORLD_SIZE=0')])
def test_ranks_that_cannot_be_are_one_line(experiment, monkeypatch, given, words):
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    refused(words, dpo.main, DPO)


def test_a_server_that_is_no_store_ends_the_run(experiment):
    with socket.create_server(('127.0.0.1', 0)) as server:
        environment = by_hand(1, 2, server.getsockname()[1])
        done = run_stage('dpo.py', *DPO, '--join_timeout=1', check=False, env=environment)
    assert done.returncode == 1 and 'does not answer as a store of torch does' in done.stderr
