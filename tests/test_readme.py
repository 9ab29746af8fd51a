"""The README, and the headers of the configs: their commands can be read by the stages, their links lead somewhere.

repro/readme.py runs the README's commands.
"""
import importlib
import re
import shlex
import subprocess
import sys

import pytest

import config
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'repro'))
from readme import ELSEWHERE, LONG, commands       # noqa: E402

README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
         for path in [ROOT / 'README.md', ROOT / 'repro' / 'README.md', *(ROOT / 'config').glob('*.py')]}
STAGES = {'prepare_prefs.py': 'prepare', 'sft.py': 'sft', 'dpo.py': 'dpo', 'sample.py': 'sample'}
OF_STAGES = [(page, command) for page, text in PAGES.items() for command in commands(text)
             if re.search(r'\b(prepare_prefs|sft|dpo|sample)\.py\b', command) and 'sbatch' not in command]


@pytest.mark.parametrize('page,command', OF_STAGES, ids=lambda value: value[:60])
def test_every_command_of_a_stage_is_one_that_the_stage_takes(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.split(' > ')[0])
    script = next(word for word in words if word in STAGES)
    module = importlib.import_module(script[:-3])
    config.load(module.Config, STAGES[script], words[words.index(script) + 1:])


def test_the_readme_has_commands_of_every_stage_and_all_its_scripts_are_there():
    found = commands(README)
    assert {script for script in STAGES if any(f' {script}' in command for command in found)} == set(STAGES)
    for page, text in PAGES.items():
        for script in re.findall(r'\b(?:python|bash|sbatch) ((?:repro/|tests/)?[\w./]+\.(?:py|sh))\b', text):
            assert (ROOT / script).is_file(), f'{page} names {script}'


def test_what_the_script_shortens_or_leaves_out_is_in_the_readme():
    for start in [*LONG, *ELSEWHERE]:
        assert any(command.startswith(start) for command in commands(README)), start


def test_every_link_of_a_page_leads_to_a_file_or_a_heading():
    tracked = set(subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True).stdout.splitlines())
    for page in ('README.md', 'repro/README.md'):
        text = PAGES[page]
        for target in re.findall(r'\]\(([^)\s]+)\)', text):
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
