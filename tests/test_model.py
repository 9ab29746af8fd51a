"""model.py against transformers: weights in and out, the same logits, the same greedy text. Checkpoints on disk."""
import json
import os
from pathlib import Path

import pytest
import torch

from config import UserError
from conftest import small_gpt
from model import GPT
from nanodpo import checkpoint
from nanodpo.checkpoint import fingerprint, load_model
from nanodpo.data import sha256_file
from nanodpo.export import save_pretrained
from test_hf import logits

transformers = pytest.importorskip('transformers')


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=211, n_positions=48, n_embd=48, n_layer=3, n_head=4, bos_token_id=210,
                                     eos_token_id=210, initializer_range=0.1)
    return transformers.GPT2LMHeadModel(config).eval()


def assert_same_logits(ours, theirs, length):
    ids = torch.randint(0, 211, (3, length))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.abs().max() > 2
    torch.testing.assert_close(logits(ours, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('max_shard_size, files', [('1GB', 1), ('100KB', 4)])
def test_an_imported_gpt2_has_transformers_logits(theirs, tmp_path, max_shard_size, files):
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob('*.safetensors'))) >= files
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.config.block_size == 48 and ours.config.n_layer == 3
    assert_same_logits(ours, theirs, 48)


def test_an_exported_and_a_reexported_gpt2_load_in_transformers_with_our_logits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / 'a')
    reexported = GPT.from_pretrained(str(tmp_path / 'a'))
    for name, ours in (('own', small_gpt(block_size=48)), ('re', reexported)):
        save_pretrained(ours, str(tmp_path / name))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert loaded.config.eos_token_id == ours.config.vocab_size - 1, "the last id, as GPT-2's"
        assert_same_logits(ours, loaded, 40)
        assert fingerprint(GPT.from_pretrained(str(tmp_path / name))) == fingerprint(ours), 'to the bit, there and back'


def test_greedy_text_is_transformers_token_for_token(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8, 9, 10]]
    for prompt, response in zip(prompts, ours.generate(prompts, 30, end_token=210, temperature=0)):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=210)
        assert response == expected[0, len(prompt):].tolist()


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


# -----------------------------------------------------------------------------
# checkpoints

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
    with pytest.raises(UserError, match='step-000100.pt is damaged'):
        checkpoint.read(path)
    with pytest.raises(UserError, match='step-000100.pt is damaged.*; the one before it is .*step-000010.pt'):
        load_model(str(tmp_path))


def test_what_is_no_checkpoint_of_ours_is_one_line(tmp_path):
    """Each with a hash that fits."""
    saved(tmp_path / 'good', 1, optimizer={'state': {}})
    good = checkpoint.read(str(tmp_path / 'good/step-000001.pt'))
    folder, path = str(tmp_path), tmp_path / 'step-000001.pt'
    misfit, foreign = 'its weights are not those of its model_config', 'is not a checkpoint of this project'
    for state, match in [
            (good | {'model_config': good['model_config'] | {'n_embd': 16}}, misfit), (good | {'model_config': None}, misfit),
            (good | {'model_config': {'layers': 2}}, misfit), (good | {'model': {}}, misfit), (good | {'model': 3}, misfit),
            (good['model'], foreign), ([good], foreign), (good | {'format': 9}, 'of this version'),
            ({'format': 1}, 'of this version'), (good | {'step': 2}, 'is not what its name says, but step 2')]:
        torch.save(state, path)
        path.with_suffix('.json').write_text(json.dumps({'sha256': sha256_file(path)}))
        with pytest.raises(UserError, match=match) as error:
            load_model(folder)
        assert '\n' not in error.value.code and 'step-000001.pt' in error.value.code
    for record in ('', '[]', '{}', '{"sha256": 3}', '\x00'):
        path.with_suffix('.json').write_text(record)
        with pytest.raises(UserError, match='step-000001.pt is (not a checkpoint of this project|damaged)'):
            load_model(folder)
    path.with_suffix('.json').unlink()
    with pytest.raises(UserError, match='cannot be read as a checkpoint: No such file or directory: .*step-000001.json'):
        load_model(str(path))


def fails(*args):
    raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('broken', ['os.replace', 'torch.save'])
def test_a_disk_that_is_full_says_so_and_leaves_the_checkpoints_before_it(tmp_path, monkeypatch, broken):
    """For torch.save, whose zip writer hides the disk's error, the disk is /dev/full."""
    saved(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if broken == 'torch.save':
        monkeypatch.setattr('builtins.open', lambda path, *args, real=open: real('/dev/full', *args))
    else:
        monkeypatch.setattr(os, 'replace', fails)
    with pytest.raises(OSError, match='No space left on device'):
        saved(tmp_path, 2)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
