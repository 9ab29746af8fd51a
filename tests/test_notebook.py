"""understand_dpo.ipynb runs from top to bottom, its cells find what its text says, and its outputs are of such a run.

After a change, `jupyter execute --inplace understand_dpo.ipynb` makes its outputs anew.
"""
import json
import math
import re
import socket

import nbclient
import nbformat
import pytest

from conftest import ROOT

PATH = ROOT / 'understand_dpo.ipynb'
FACTS = '''
import json
facts = dict(
    j=objective(star), j_formula=best, j_near=max(map(objective, near)),
    kl_before=mean_kl(rho, star), kl_after=mean_kl(trained, star),
    packed=packed.tolist(), alone=alone.tolist(),
    first=first, last=last, before=summary['before'], after=summary['after'], correlation=correlation.item())
print(json.dumps(facts))
'''


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def text_of(outputs):
    """What outputs say, pictures left out: str."""
    parts = [output.get('text', '') + ''.join(text for kind, text in output.get('data', {}).items()
                                              if kind.startswith('text/')) for output in outputs]
    return '\n'.join(parts)


def skeleton(notebook):
    """Of each cell's output the names and shapes of tensors, and the columns of log lines: lists of str."""
    found = r'(?m)^\w+ +\([\d, ]*\)|\| [a-z ]+ (?=[-+\d])'
    return [re.findall(found, text_of(cell.outputs)) for cell in code(notebook)]


def test_the_notebook_runs_and_its_cells_find_what_its_text_says(notebook, tmp_path, monkeypatch):
    for name in ('TMPDIR', 'IPYTHONDIR', 'JUPYTER_RUNTIME_DIR'):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    committed = skeleton(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS))
    nbclient.NotebookClient(notebook, timeout=300, resources=dict(metadata=dict(path=str(ROOT)))).execute()
    facts = json.loads(notebook.cells.pop().outputs[0].text)
    assert skeleton(notebook) == committed and sum(map(len, committed)) > 50

    assert math.isclose(facts['j'], facts['j_formula'], abs_tol=1e-9) and facts['j'] > facts['j_near']
    assert facts['kl_before'] > 0.5 and facts['kl_after'] < 1e-3        # DPO arrives at the exact optimum
    assert len(facts['packed']) > 50
    assert facts['packed'] == pytest.approx(facts['alone'], abs=1e-4)
    first, last = facts['first'], facts['last']
    assert first['eval/loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert first['eval/rewards/accuracies'] == 0.5 and last['eval/rewards/accuracies'] > 0.7
    assert last['eval/rewards/rejected'] < last['eval/rewards/chosen'] < 0
    assert facts['after']['true_reward']['mean'] > facts['before']['true_reward']['mean'] + 1
    assert facts['correlation'] > 0.4


def test_the_notebook_stands_here_as_a_run_from_top_to_bottom_left_it(notebook):
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != 'error' and output.get('name') != 'stderr' for output in outputs)
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 7
    assert PATH.stat().st_size < 400_000
    said = text_of(outputs)
    assert 'loss 0.6931 | acc 0.500' in said
    assert not re.search(r'/(tmp|home|root|work|usr|var|Users|private)\b', said) and socket.gethostname() not in said


def test_cells_are_short_and_links_lead_to_files(notebook):
    for cell in code(notebook):
        lines = cell.source.split('\n')
        assert len(lines) < 15 and max(map(len, lines)) <= 120, cell.source
    prose = '\n'.join(cell.source for cell in notebook.cells if cell.cell_type == 'markdown')
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', prose) if not link.startswith('http')]
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).is_file(), link
