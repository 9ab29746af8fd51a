"""Sampling from the model, and checkpoints on disk. test_hf.py compares the model with transformers."""
import json
import os
from pathlib import Path

import pytest
import torch

from config import UserError
from conftest import small_gpt
from nanodpo import checkpoint
from nanodpo.checkpoint import fingerprint, load_model
from nanodpo.data import sha256_file


def test_generation_fills_the_positions_and_no_more():
    model = small_gpt(block_size=16)
    responses = model.generate([[1] * 10, [2] * 15, [3]], 99, end_token=-1)
    assert [len(r) for r in responses] == [6, 1, 15]
    assert model.generate([[1], [2]], 0, end_token=-1) == [[], []]
    with pytest.raises(ValueError, match='1 to 15 tokens'):
        model.generate([[1] * 16], 1, end_token=-1)


def test_two_models_share_their_random_numbers():
    a, b = small_gpt(), small_gpt()
    prompts = [[1, 2], [3]] * 8
    first = a.generate(prompts, 20, 256, seed=5)
    assert first == b.generate(prompts, 20, 256, seed=5) != b.generate(prompts, 20, 256, seed=6)


# --- checkpoints ----------------------------------------------------------------------------------

def saved(folder, *steps, **state):
    os.makedirs(folder, exist_ok=True)
    model = small_gpt()
    for step in steps:
        checkpoint.save(str(folder), step, model, dict(config={}, vocabulary='v', **state))
    return model


def test_checkpoints_keep_the_last_two_and_name_a_damaged_one(tmp_path):
    model = saved(tmp_path, 5, 10, 100)
    assert [Path(p).name for p in checkpoint.find(tmp_path)] == ['step-000010.pt', 'step-000100.pt']
    loaded = load_model(str(tmp_path))
    assert loaded.record['vocabulary'] == 'v' and fingerprint(loaded) == fingerprint(model)
    path = checkpoint.find(tmp_path)[-1]
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    for read in (lambda: checkpoint.read(path), lambda: load_model(str(tmp_path))):
        with pytest.raises(UserError, match='step-000100.pt is damaged.*use the checkpoint before it'):
            read()


def test_what_is_no_checkpoint_of_ours_is_one_line(tmp_path):
    """Each with a hash that fits."""
    saved(tmp_path / 'good', 1, optimizer={'state': {}})
    good = checkpoint.read(str(tmp_path / 'good/step-000001.pt'))
    path = tmp_path / 'step-000001.pt'

    def refused(match, where=str(tmp_path)):
        with pytest.raises(UserError, match='step-000001.pt ' + match) as error:
            load_model(where)
        assert '\n' not in error.value.code

    misfit, foreign = 'is no checkpoint', 'cannot be read as a checkpoint: '
    wide = good['model_config'] | {'n_embd': 16}
    for state, match in [
            (good | {'model_config': wide}, misfit), (good | {'model_config': None}, foreign + 'ValueError: model_config'),
            (good | {'model_config': {'layers': 2}}, misfit), (good | {'model': {}}, misfit),
            (good | {'model': 3}, foreign + 'ValueError: model'), (good['model'], foreign + 'KeyError'), ([good], foreign + 'TypeError'),
            ({'format': 1}, foreign + 'KeyError'), (good | {'format': 9}, 'is of another version'),
            (good | {'step': 2}, 'is not what its name says, but step 2')]:
        torch.save(state, path)
        path.with_suffix('.json').write_text(json.dumps({'sha256': sha256_file(path)}))
        refused(match)
    for record in ('', '[]', '{}', '{"sha256": 3}', '\x00'):
        path.with_suffix('.json').write_text(record)
        refused(f'({foreign}|is damaged)')
    path.with_suffix('.json').unlink()
    refused(foreign + 'FileNotFoundError: .*step-000001.json', str(path))


def test_a_disk_that_is_full_says_so_and_leaves_the_checkpoints_before_it(tmp_path, monkeypatch):
    """At the last moment, when the files get their names. test_errors.py fills it before."""
    saved(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='No space left on device'):
        saved(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
