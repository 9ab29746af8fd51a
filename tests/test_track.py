"""What a run leaves to look at: eval/kl in the log, the same numbers in W&B, and the curves of several runs."""
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo
import sft
from conftest import random_groups, read_log, run_ranks, small_gpt, write_data, write_rows
from model import GPT
from nanodpo import checkpoint
from nanodpo.data import Groups

DPO = ['--name=tiny', '--batch_size=8', '--learning_rate=1e-3', '--warmup_steps=0', '--device=cpu']


def save_model(folder, step, model):
    os.makedirs(f'out/tiny/{folder}', exist_ok=True)
    vocabulary = Groups('data/tiny', 'val').vocabulary
    checkpoint.save(f'out/tiny/{folder}', step, model, dict(config={}, vocabulary=vocabulary))


@pytest.fixture
def two_models(experiment):
    """The experiment with 40 validation pairs, of which two have one prompt, and another model in out/tiny/other."""
    rng = np.random.default_rng(1)
    val = random_groups(40, 2, rng)
    val[7][0] = val[8][0]
    write_data('data/tiny', {'train': random_groups(48, 2, rng), 'val': val})
    save_model('other', 1, small_gpt(5))


def weights(folder='out/tiny/dpo'):
    return checkpoint.read(checkpoint.find(folder)[-1])['model']


# -----------------------------------------------------------------------------
# KL(policy || reference)

def test_kl_is_that_of_the_drawn_responses_scored_one_at_a_time(two_models, monkeypatch):
    from test_exact import one_at_a_time
    drawn, generate = [], GPT.generate

    def keep(self, prompts, *args, **options):
        made = generate(self, prompts, *args, **options)
        drawn.extend([prompt, ids[:64 - len(prompt)]] for prompt, ids in zip(prompts, made))
        return made
    monkeypatch.setattr(GPT, 'generate', keep)
    dpo.main([*DPO, '--max_steps=1', '--ref_from=out/tiny/other'])
    first, groups = read_log('out/tiny/dpo')[0], Groups('data/tiny', 'val')
    drawn = drawn[:len(drawn) // 2]         # of step 0
    prompts = {tuple(group[0].tolist()) for group in groups}
    assert sorted(prompt for prompt, _ in drawn) == sorted(map(list, prompts)) and len(drawn) == 39
    assert all(len(p) + len(r) == 64 or r[-1] == 256 for p, r in drawn), 'whole responses'
    ratios = (one_at_a_time(small_gpt(0), drawn) - one_at_a_time(small_gpt(5), drawn))[:, 0].numpy(force=True)
    assert first['eval/kl'] == pytest.approx(ratios.mean(), rel=1e-4) and first['eval/kl'] > 1
    assert first['eval/kl_error'] == pytest.approx(ratios.std(ddof=1) / np.sqrt(39), rel=1e-4)


def test_kl_estimates_the_exact_kl_of_a_bigram(experiment):
    """A policy whose next token depends on the last alone has a KL that the chain rule gives exactly. Over many prompts
    that end alike the estimate must agree within its error."""
    def bigram(seed):
        model = small_gpt(seed)
        with torch.no_grad():
            model.wpe.weight.zero_()
            for block in model.h:
                for p in block.parameters():
                    p.zero_()
            model.wte.weight[256] *= 3      # ends sooner
        return model
    rng, T = np.random.default_rng(0), 12
    groups = [[list(rng.integers(0, 256, 3)) + [7], [1, 256], [2, 256]] for _ in range(400)]
    write_data('data/tiny', {'train': groups[:40], 'val': groups}, max_length=T)
    models = []
    for folder, seed in (('sft', 0), ('other', 3)):
        models.append(bigram(seed))
        save_model(folder, 2, models[-1])
    dpo.main([*DPO, '--max_steps=1', '--ref_from=out/tiny/other', '--kl_prompts=400', '--eval_interval=0'])
    first = read_log('out/tiny/dpo')[0]

    def next_token_logps(model):
        tokens = torch.arange(257)[:, None]
        hidden = model(tokens, torch.zeros_like(tokens), None)[:, 0]
        return torch.log_softmax(hidden @ model.wte.weight.t(), -1).double()
    with torch.no_grad():
        policy, reference = map(next_token_logps, models)
    step, exact, now = (policy.exp() * (policy - reference)).sum(1), 0, torch.zeros(257, dtype=torch.float64)
    now[7] = 1
    for _ in range(T - 4):
        exact, now = exact + (now * step).sum().item(), now @ policy.exp()
        now[256] = 0
    assert abs(first['eval/kl'] - exact) < 4 * first['eval/kl_error'] and exact > 5 * first['eval/kl_error']


def test_kl_changes_no_weight_and_is_0_at_step_0(experiment):
    flags = [*DPO, '--max_steps=6', '--eval_interval=2']
    dpo.main([*flags, '--kl_prompts=64'])
    found, log = weights(), read_log('out/tiny/dpo')
    kl = [(r['step'], r['eval/kl']) for r in log if 'eval/kl' in r]
    assert [step for step, _ in kl] == [0, 2, 4, 6] and kl[0][1] == 0 and log[0]['eval/kl_error'] == 0
    assert len({value for _, value in kl}) == 4
    dpo.main([*flags, '--kl_prompts=0'])
    without = weights()
    assert found.keys() == without.keys() and all(torch.equal(found[key], without[key]) for key in found)
    assert not any('kl' in key for r in read_log('out/tiny/dpo') for key in r)


@pytest.mark.parametrize('flag', ['--loss=simpo', '--precompute_ref=True'])
def test_kl_is_not_logged_where_no_reference_can_be_asked(experiment, flag):
    dpo.main([*DPO, '--max_steps=1', flag])
    assert not any('kl' in key for r in read_log('out/tiny/dpo') for key in r)


def test_kl_does_not_depend_on_the_number_of_processes(two_models):
    flags = [*DPO, '--max_steps=1', '--eval_interval=0', '--ref_from=out/tiny/other']
    dpo.main(flags)
    one = read_log('out/tiny/dpo')[0]
    assert run_ranks('dpo', [flags] * 2) == {0: '', 1: ''}
    two = read_log('out/tiny/dpo')[0]
    assert [two['eval/kl'], two['eval/kl_error']] == pytest.approx([one['eval/kl'], one['eval/kl_error']], rel=1e-5)


# -----------------------------------------------------------------------------
# W&B

def wandb_history(path):
    """The history of a .wandb file: a file header, then 32 KiB blocks of records (checksum, length, kind, data), as
    LevelDB's logs; kind 1 is a whole record, 2, 3 and 4 are the first, middle and last piece of one."""
    from wandb.proto import wandb_internal_pb2
    content, at, whole, rows = Path(path).read_bytes(), 7, b'', []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack('<HB', content[at + 4:at + 7])
        whole += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record, whole = wandb_internal_pb2.Record.FromString(whole), b''
            if record.WhichOneof('record_type') == 'history':
                items = record.history.item
                rows.append({item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_wandb_offline_holds_the_numbers_of_the_log_and_stays_in_out(experiment, monkeypatch):
    wandb = pytest.importorskip('wandb', reason='wandb is not installed')
    before = set(os.listdir())
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    dpo.main([*DPO, '--max_steps=5', '--log_interval=2', '--eval_interval=2', '--track=wandb'])
    wandb.teardown()        # as at the end of a process: its service writes the file a moment after the run's end
    path, = Path('out/tiny/wandb').glob('offline-run-*/*.wandb')
    steps = {record['step']: {} for record in read_log('out/tiny/dpo')}
    for record in read_log('out/tiny/dpo'):
        steps[record.pop('step')] |= record
    rows = wandb_history(path)
    assert {row['_step']: {key: value for key, value in row.items() if key[0] != '_'} for row in rows} == steps
    assert sorted(steps) == [0, 1, 2, 4, 5] and 'eval/kl' in steps[4] and 'loss' in steps[4]
    assert set(os.listdir()) == before


@pytest.mark.parametrize('module, message', [
    ("raise ModuleNotFoundError('No module named wandb')", 'pip install wandb.*No module named wandb'),
    ("def init(**options): raise RuntimeError('no key\\nat all.')", 'WANDB_MODE=offline.*no key at all')])
def test_what_keeps_wandb_away_is_one_line_and_moves_no_old_run(experiment, monkeypatch, module, message):
    dpo.main([*DPO, '--max_steps=1'])
    old = {path: path.read_bytes() for path in Path('out/tiny').rglob('*') if path.is_file()}
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    Path('wandb.py').write_text(module)
    monkeypatch.syspath_prepend(os.getcwd())
    sft_flags = [*DPO[:2], '--device=cpu', '--init_from=out/tiny/sft', '--train_on=chosen']
    for stage, flags in ((dpo, DPO), (sft, sft_flags)):
        with pytest.raises(SystemExit, match=f'^error: track=wandb needs .*{message}'):
            stage.main([*flags, '--max_steps=1', '--track=wandb'])
    assert {path: path.read_bytes() for path in Path('out/tiny').rglob('*') if path.is_file()} == old


# -----------------------------------------------------------------------------
# the curves

def dpo_log(slope, steps=5):
    """A log whose every value tells run, key and step."""
    keys = ['loss', 'rewards/accuracies', 'rewards/margins', 'rewards/chosen', 'rewards/rejected', 'kl']
    log = [{'step': 0, **{f'eval/{key}': 0.0 for key in keys}, 'eval/kl_error': 0.0}]
    for step in range(1, steps):
        log += [{'step': step, **{key: slope + i + step / 100 for i, key in enumerate(keys[:5])}, 'lr': 1e-3},
                {'step': step, **{f'eval/{key}': slope + i + step / 10 for i, key in enumerate(keys)},
                 'eval/kl_error': 0.1}]
    return log


def figure_of(monkeypatch, *args):
    """The figure that plot.py writes, and its PNG."""
    pytest.importorskip('matplotlib', reason='matplotlib is not installed')
    from matplotlib.figure import Figure
    from repro import plot
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: kept.append(self) or save(self, *a, **k))
    plot.main([str(arg) for arg in args])
    return kept[-1]


def test_the_curves_of_several_runs_are_the_numbers_of_their_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logs = {'out/a/dpo': dpo_log(1), 'out/b/dpo': dpo_log(20, 9)}
    for folder, log in logs.items():
        write_rows(f'{folder}/log.jsonl', log)
    with open('out/b/dpo/log.jsonl', 'a') as f:
        f.write('{"step": 10, "loss": 3')           # torn
    figure = figure_of(monkeypatch, *logs, '--out=both.png')
    assert Path('both.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n' and capsys.readouterr().out == 'both.png\n'
    drawn, colours = {}, {}
    for ax in figure.axes:
        for line in ax.lines:
            points = [point for point in zip(*map(list, line.get_data())) if len(line.get_xdata()) > 2]
            drawn[tuple(points)] = line
    for folder, log in logs.items():
        for key in ('loss', 'rewards/accuracies', 'rewards/margins', 'rewards/chosen', 'rewards/rejected', 'kl'):
            for prefix in ('', 'eval/')[key == 'kl':]:
                line = drawn.pop(tuple((r['step'], r[prefix + key]) for r in log if prefix + key in r))
                assert line.get_linestyle() == ('--' if key == 'rewards/rejected' else '-')
                assert (line.get_marker() == 'o') == bool(prefix)
                colours.setdefault(folder, set()).add(line.get_color())
    assert set(drawn) <= {()}, 'nothing else'
    assert len(set.union(*colours.values())) == 2 and all(len(of_run) == 1 for of_run in colours.values())
    legend, = (ax.get_legend() for ax in figure.axes if ax.get_legend())
    assert [text.get_text() for text in legend.get_texts()][:2] == ['a', 'b']


def test_one_run_and_an_sft_run_have_their_panels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = [{'step': s, 'loss': 3 - s, 'perplexity': 2.0 ** s, 'lr': s * 1e-3} for s in range(3)]
    write_rows('out/a/sft/log.jsonl', log)
    figure = figure_of(monkeypatch, 'out/a/sft')
    assert [ax.get_title() for ax in figure.axes] == ['loss', 'perplexity', 'learning rate', '']
    assert os.path.exists('out/a/sft/curves.png')
    write_rows('out/a/dpo/log.jsonl', dpo_log(1))
    titles = [ax.get_title().split(',')[0].split(':')[0] for ax in figure_of(monkeypatch, 'out/a/dpo').axes]
    assert titles == ['loss', 'accuracy', 'reward margin', 'implicit rewards', 'KL(policy || reference)', '']


@pytest.mark.parametrize('content, message', [
    (None, 'has no log.jsonl'), ('', 'holds no record'), ('{"step": 1', 'holds no record'),
    ('what\n{"step": 1, "loss": 2}\n', 'line 1 is no record'), ('{"step": 1, "loss": "low"}\n', 'line 1 is no record'),
    ('[1]\n', 'line 1 is no record'), ('{"step": 1, "x": 2}\n', 'nothing to draw'),
    (b'\xff\xfe\n', 'cannot be read')])
def test_a_log_that_is_none_is_one_line_and_no_figure(tmp_path, monkeypatch, content, message):
    from repro import plot
    monkeypatch.chdir(tmp_path)
    write_rows('good/log.jsonl', dpo_log(1))
    os.mkdir('bad')
    if content is not None:
        Path('bad/log.jsonl').write_bytes(content if isinstance(content, bytes) else content.encode())
    runs = ['bad'] if message == 'nothing to draw' else ['good', 'bad']
    with pytest.raises(SystemExit, match=message) as stop:
        plot.main([*runs, '--out=both.png'])
    assert '\n' not in stop.value.code and not os.path.exists('both.png')


def test_a_run_is_its_folder_or_the_log_in_it_and_help_is_no_error(tmp_path, monkeypatch, capsys):
    from repro import plot
    monkeypatch.chdir(tmp_path)
    write_rows('a/log.jsonl', dpo_log(1))
    drawn = []
    monkeypatch.setattr(plot, 'plot', lambda folders, out: drawn.append((folders, out)))
    plot.main(['a/log.jsonl'])
    monkeypatch.chdir('a')
    plot.main(['log.jsonl', '../a', '--out=x.png'])
    assert drawn == [(['a'], 'a/curves.png'), (['.', '../a'], 'x.png')]
    plot.main(['--help'])
    assert plot.__doc__.strip() in capsys.readouterr().out


def test_runs_are_named_by_what_tells_them_apart():
    from repro.plot import names_of
    assert names_of(['out/a/dpo', 'out/b/dpo']) == ['a', 'b']
    assert names_of(['out/a/sft/', 'out/a/dpo']) == ['sft', 'dpo']
    assert names_of(['out/a/dpo']) == ['a/dpo'] and names_of(['x', 'y']) == ['x', 'y']
    assert len(set(names_of(['out/a/dpo', 'out/a/dpo.previous', 'out/a']))) == 3
    assert len(set(names_of(['out/a/b/dpo', 'out/a/dpo', 'out/b/dpo']))) == 3
