"""What a run leaves to look at: eval/kl in the log, the same numbers in W&B, and the curves of several runs."""
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo
import sft
from conftest import last_checkpoint, random_groups, read_log, run_ranks, save_sft, small_gpt, write_data, write_rows
from model import GPT
from repro import plot
from test_exact import one_at_a_time

KEYS = ['loss', 'rewards/accuracies', 'rewards/margins', 'rewards/chosen', 'rewards/rejected', 'kl']
DPO = ['--name=tiny', '--batch_size=8', '--learning_rate=1e-3', '--warmup_steps=0', '--device=cpu']


# --- KL(policy || reference) ----------------------------------------------------------------------

def test_kl_is_that_of_the_drawn_responses_scored_one_at_a_time_and_the_same_for_two_processes(experiment, monkeypatch):
    rng = np.random.default_rng(1)
    val = random_groups(40, 2, rng)
    val[7][0] = val[8][0]               # two have one prompt
    write_data('data/tiny', {'train': random_groups(48, 2, rng), 'val': val})
    save_sft(small_gpt(5), 1, 'out/tiny/other')
    flags = [*DPO, '--max_steps=1', '--ref_from=out/tiny/other']
    drawn, generate = [], GPT.generate

    def keep(self, prompts, *args, **options):
        made = generate(self, prompts, *args, **options)
        drawn.extend([prompt, ids[:64 - len(prompt)]] for prompt, ids in zip(prompts, made))
        return made
    monkeypatch.setattr(GPT, 'generate', keep)
    dpo.main(flags)
    first = read_log('out/tiny/dpo')[0]
    drawn = drawn[:len(drawn) // 2]         # of step 0
    prompts = {tuple(group[0]) for group in val}
    assert sorted(prompt for prompt, _ in drawn) == sorted(map(list, prompts)) and len(drawn) == 39
    assert all(len(p) + len(r) == 64 or r[-1] == 256 for p, r in drawn), 'whole responses'
    ratios = (one_at_a_time(small_gpt(0), drawn) - one_at_a_time(small_gpt(5), drawn))[:, 0].numpy(force=True)
    assert first['eval/kl'] == pytest.approx(ratios.mean(), rel=1e-4) and first['eval/kl'] > 1
    assert first['eval/kl_error'] == pytest.approx(ratios.std(ddof=1) / np.sqrt(39), rel=1e-4)
    assert run_ranks('dpo', [flags] * 2) == {0: '', 1: ''}
    two = read_log('out/tiny/dpo')[0]
    assert [two['eval/kl'], two['eval/kl_error']] == pytest.approx([first['eval/kl'], first['eval/kl_error']], rel=1e-5)


def test_kl_estimates_the_exact_kl_of_a_bigram(experiment):
    """A model whose next token depends on the last alone: the chain rule gives its KL exactly."""
    def bigram(seed):
        model = small_gpt(seed)
        with torch.no_grad():
            model.wpe.weight.zero_()
            for p in model.h.parameters():
                p.zero_()
            model.wte.weight[256] *= 3      # ends sooner
        return model
    rng, T = np.random.default_rng(0), 12
    groups = [[list(rng.integers(0, 256, 3)) + [7], [1, 256], [2, 256]] for _ in range(400)]
    write_data('data/tiny', {'train': groups[:40], 'val': groups}, max_length=T)
    models = [bigram(0), bigram(3)]
    save_sft(models[0])
    save_sft(models[1], 2, 'out/tiny/other')
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
    found, log = last_checkpoint('out/tiny/dpo')['model'], read_log('out/tiny/dpo')
    kl = [(r['step'], r['eval/kl']) for r in log if 'eval/kl' in r]
    assert [step for step, _ in kl] == [0, 2, 4, 6] and kl[0][1] == 0 and log[0]['eval/kl_error'] == 0
    assert len({value for _, value in kl}) == 4
    for flag in ('--loss=simpo', '--precompute_ref=True', '--kl_prompts=0'):    # no reference can be asked, or is
        dpo.main([*flags, flag])
        assert not any('kl' in key for r in read_log('out/tiny/dpo') for key in r)
    without = last_checkpoint('out/tiny/dpo')['model']
    assert found.keys() == without.keys() and all(torch.equal(found[key], without[key]) for key in found)


# --- W&B ------------------------------------------------------------------------------------------

def wandb_history(path):
    """The history of a .wandb file of one block: a file header, then records of checksum, length, kind and data."""
    from wandb.proto import wandb_internal_pb2
    content, at, rows = Path(path).read_bytes(), 7, []
    assert len(content) < 32768, 'one block'
    while at < len(content):
        length = int.from_bytes(content[at + 4:at + 6], 'little')
        record = wandb_internal_pb2.Record.FromString(content[at + 7:at + 7 + length])
        at += 7 + length
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
    steps = {record['step']: {} for record in read_log('out/tiny/dpo')}
    for record in read_log('out/tiny/dpo'):
        steps[record.pop('step')] |= record
    rows = wandb_history(*Path('out/tiny/wandb').glob('offline-run-*/*.wandb'))
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
    for stage, flags in ((dpo, DPO), (sft, [*DPO, '--init_from=out/tiny/sft', '--run_name=x'])):
        with pytest.raises(SystemExit, match=f'^error: track=wandb needs .*{message}'):
            stage.main([*flags, '--max_steps=1', '--track=wandb'])
    assert {path: path.read_bytes() for path in Path('out/tiny').rglob('*') if path.is_file()} == old


# --- the curves -----------------------------------------------------------------------------------

def dpo_log(slope, steps=5):
    """A log whose every value tells run, key and step."""
    log = [{'step': 0, **{f'eval/{key}': 0.0 for key in KEYS}, 'eval/kl_error': 0.0}]
    for step in range(1, steps):
        log += [{'step': step, **{key: slope + i + step / 100 for i, key in enumerate(KEYS[:5])}, 'lr': 1e-3},
                {'step': step, **{f'eval/{key}': slope + i + step / 10 for i, key in enumerate(KEYS)},
                 'eval/kl_error': 0.1}]
    return log


def figure_of(monkeypatch, *args):
    """The figure that plot.py writes, and its PNG."""
    pytest.importorskip('matplotlib', reason='matplotlib is not installed')
    from matplotlib.figure import Figure
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: kept.append(self) or save(self, *a, **k))
    plot.main([str(arg) for arg in args])
    return kept[-1]


def test_the_curves_of_several_runs_are_the_numbers_of_their_logs_each_in_its_panel(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logs = {'out/a/dpo': dpo_log(1), 'out/b/dpo': dpo_log(20, 9)}
    for folder, log in logs.items():
        write_rows(f'{folder}/log.jsonl', log)
    with open('out/b/dpo/log.jsonl', 'a') as f:
        f.write('{"step": 10, "loss": 3')           # torn
    figure = figure_of(monkeypatch, *logs, '--out=both.png')
    assert Path('both.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n' and capsys.readouterr().out == 'both.png\n'
    drawn, colours = {}, {}
    for line in [line for ax in figure.axes for line in ax.lines if len(line.get_xdata()) > 2]:
        drawn[tuple(zip(*map(list, line.get_data())))] = line
    for folder, log in logs.items():
        for key in KEYS:
            for prefix in ('', 'eval/')[key == 'kl':]:
                line = drawn.pop(tuple((r['step'], r[prefix + key]) for r in log if prefix + key in r))
                assert line.get_linestyle() == ('--' if key == 'rewards/rejected' else '-')
                assert (line.get_marker() == 'o') == bool(prefix)
                colours.setdefault(folder, set()).add(line.get_color())
    assert not drawn, 'nothing else'
    assert len(set.union(*colours.values())) == 2 and all(len(of_run) == 1 for of_run in colours.values())
    legend, = (ax.get_legend() for ax in figure.axes if ax.get_legend())
    assert [text.get_text() for text in legend.get_texts()][:2] == ['a', 'b']

    log = [{'step': s, 'loss': 3 - s, 'perplexity': 2.0 ** s, 'lr': s * 1e-3} for s in range(3)]
    write_rows('out/a/sft/log.jsonl', log)
    titles = [ax.get_title() for ax in figure_of(monkeypatch, 'out/a/sft').axes]
    assert titles == ['loss of sft.py, nats a token', 'perplexity', 'learning rate', ''] and os.path.exists('out/a/sft/curves.png')
    titles = [ax.get_title().split(',')[0].split(':')[0] for ax in figure_of(monkeypatch, 'out/a/dpo').axes]
    assert titles == ['loss', 'accuracy', 'reward margin', 'implicit rewards', 'KL(policy || reference)', '']
    both = figure_of(monkeypatch, 'out/a/sft', 'out/a/dpo')     # neither squashes the other
    curves = {ax.get_title(): ax.lines for ax in both.axes}
    assert [len(curves[title]) for title in ('loss of sft.py, nats a token', 'perplexity', 'loss')] == [1, 1, 2]


@pytest.mark.parametrize('content, message', [
    (None, 'has no log.jsonl'), (b'', 'holds no record'), (b'{"step": 1', 'holds no record'),
    (b'what\n{"step": 1, "loss": 2}\n', 'line 1 is no record'), (b'{"step": 1, "loss": "low"}\n', 'line 1 is'),
    (b'[1]\n', 'line 1 is no record'), (b'{"step": 1, "x": 2}\n', 'nothing to draw'), (b'\xff\n', 'cannot be read')])
def test_a_log_that_is_none_is_one_line_and_no_figure(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write_rows('good/log.jsonl', dpo_log(1))
    if content is not None:
        write_rows('bad/log.jsonl', content)
    runs = ['bad'] if message == 'nothing to draw' else ['good', 'bad']
    with pytest.raises(SystemExit, match=message) as stop:
        plot.main([*runs, '--out=both.png'])
    assert '\n' not in stop.value.code and not os.path.exists('both.png')


def test_a_run_is_its_folder_or_the_log_in_it_and_help_is_no_error(tmp_path, monkeypatch, capsys):
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
    names_of = plot.names_of            # by what tells them apart
    assert names_of(['out/a/dpo', 'out/b/dpo']) == ['a', 'b']
    assert names_of(['out/a/sft/', 'out/a/dpo']) == ['sft', 'dpo']
    assert names_of(['out/a/dpo']) == ['a/dpo'] and names_of(['x', 'y']) == ['x', 'y']
    assert len(set(names_of(['out/a/dpo', 'out/a/dpo.previous', 'out/a']))) == 3
    assert len(set(names_of(['out/a/b/dpo', 'out/a/dpo', 'out/b/dpo']))) == 3
