"""READMEs and headers: scripts can read their commands, which repro/readme.py runs; links lead somewhere."""
import importlib
import re
import shlex
import subprocess

import pytest

import config
from conftest import ROOT
from readme import LONG, commands

README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
         for pattern in ('*.md', '*.py', 'config/*.py', 'repro/*.md', 'repro/*.py')
         for path in sorted(ROOT.glob(pattern))}
STAGES = {'prepare_prefs.py': 'prepare', 'sft.py': 'sft', 'dpo.py': 'dpo', 'sample.py': 'sample'}


def calls_of(text):
    """(script, its arguments) of the commands of a text that run a script of ours with knobs."""
    for command in commands(text):
        for part in re.split(r' [|>] ', command):
            words = [] if 'sbatch' in part or ' ...' in part else shlex.split(part)
            for script in words:
                if 'class Config' in PAGES.get(script, ''):
                    yield script, words[words.index(script) + 1:]


CALLS = {(page, ' '.join([script, *arguments])): (script, arguments)
         for page, text in PAGES.items() for script, arguments in calls_of(text)}


@pytest.mark.parametrize('page,call', CALLS, ids=lambda value: value[:60])
def test_every_command_is_one_that_its_script_takes(page, call, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, arguments = CALLS[page, call]
    module = importlib.import_module(script.removeprefix('repro/').removesuffix('.py'))
    config.load(module.Config, STAGES.get(script, script), arguments)


def test_the_readme_has_commands_of_every_stage_and_all_scripts_are_there():
    assert {script for (page, _), (script, _) in CALLS.items() if page == 'README.md'} >= set(STAGES)
    for page, text in PAGES.items():
        for script in re.findall(r'\b(?:python|bash|sbatch) ((?:repro/|tests/)?[\w./]+\.(?:py|sh))\b', text):
            assert (ROOT / script).is_file(), f'{page} names {script}'


def test_a_loss_begins_where_the_readme_says():
    import torch
    import dpo
    from nanodpo.losses import LOSSES, relative_loss

    def start(loss, logps, labels=None):
        tokens = torch.full(logps.shape, 4)
        return relative_loss(dpo.Config(loss=loss), logps, logps.clone(), tokens, labels, torch.zeros(()))[0].tolist()

    sentence = README.split('- `loss` begins')[1].split('\n- ')[0]
    starts = {'hinge': 1, 'apo_zero': 1, 'apo_down': 1, 'kto': 0.5, 'ipo': 25, 'ipo_mean': 25}
    for part in ('at ln 2 = 0.6931,', '`hinge` and `apo_*` begin at 1, `kto` at 0.5', '= 25, `plackett_luce`', 'ln K!'):
        assert part in sentence
    own = ('simpo', 'orpo', 'wpo')
    pairs = torch.tensor([[-10.0, -20.0], [-3.0, -3.5]])
    for loss in LOSSES:
        if loss in own:
            assert f'`{loss}`' in sentence and start(loss, pairs)[0] != start(loss, pairs)[1]
        else:
            assert start(loss, pairs) == pytest.approx([starts.get(loss, 0.693147)] * 2, abs=1e-5), loss
    assert start('kto', pairs[:, :1], torch.tensor([True, False])) == [0.5, 0.5]
    assert start('plackett_luce', torch.tensor([[-1.0, -2.0, -3.0]])) == pytest.approx([1.791759])      # ln 6


def test_what_the_script_shortens_is_in_the_readme():
    for start in LONG:
        assert any(command.startswith(start) for command in commands(README)), start


@pytest.mark.parametrize('page', ['README.md', 'repro/README.md', 'repro/LOG.md'])
def test_every_link_of_a_page_leads_to_a_file_or_a_heading(page):
    git = ['git', 'ls-files', '-co', '--exclude-standard']
    tracked = set(subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.splitlines())
    for target in re.findall(r'\]\(([^)\s]+)\)', PAGES[page]):
        if target.startswith('http'):
            continue
        path, _, heading = target.partition('#')
        where = (ROOT / page).parent / path if path else ROOT / page
        assert where.exists(), f'{page}: {target}'
        name = where.resolve().relative_to(ROOT).as_posix()
        assert where.is_dir() or name in tracked or not tracked, f'{page}: {target} is not in git'
        if heading:
            headings = {re.sub(r'[^\w\- ]', '', line.lower()).strip().replace(' ', '-')
                        for line in re.findall(r'(?m)^#+ (.*)$', where.read_text(encoding='utf-8'))}
            assert heading in headings, f'{page}: {target}, headings: {sorted(headings)}'
