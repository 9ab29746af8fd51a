"""model.py against transformers: GPT-2 weights in and out, the same logits, the same greedy text."""
import json
from pathlib import Path

import pytest
import torch

from conftest import small_gpt
from model import GPT, CheckpointError, find_checkpoints, fingerprint, load_model, read_checkpoint, save_checkpoint

transformers = pytest.importorskip('transformers')


def logits(model, ids):
    B, T = ids.shape
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        return model.eval()(ids, torch.arange(T).expand(B, -1), mask) @ model.wte.weight.t()


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=211, n_positions=48, n_embd=48, n_layer=3, n_head=4, bos_token_id=210,
                                     eos_token_id=210, initializer_range=0.1)
    return transformers.GPT2LMHeadModel(config).eval()


def test_an_imported_gpt2_has_transformers_logits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, ids = GPT.from_pretrained(str(tmp_path)), torch.randint(0, 211, (3, 48))
    assert ours.config.block_size == 48 and ours.config.n_layer == 3
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.abs().max() > 2
    torch.testing.assert_close(logits(ours, ids), expected, atol=1e-4, rtol=0)


def test_an_exported_and_a_reexported_gpt2_load_in_transformers_with_our_logits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / 'a')
    reexported = GPT.from_pretrained(str(tmp_path / 'a'))
    for name, ours in (('own', small_gpt(block_size=48)), ('re', reexported)):
        ours.save_pretrained(tmp_path / name, end_token=210)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert loaded.config.eos_token_id == 210
        ids = torch.randint(0, 211, (2, 40))
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, logits(ours, ids), atol=1e-4, rtol=0)
        again = GPT.from_pretrained(str(tmp_path / name))
        assert fingerprint(again) == fingerprint(ours), 'to the bit, there and back'


def test_names_of_the_hub_s_own_gpt2_files_are_read(theirs, tmp_path):
    """The hub's gpt2 has no `transformer.` prefix, and carries the causal masks as buffers."""
    from safetensors.torch import save_file
    state = {k.removeprefix('transformer.'): v.contiguous() for k, v in theirs.state_dict().items() if k != 'lm_head.weight'}
    state |= {f'h.{i}.attn.bias': torch.ones(1, 1, 48, 48) for i in range(3)}
    save_file(state, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(theirs.config.to_dict(), default=str))
    ids = torch.randint(0, 211, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(logits(GPT.from_pretrained(str(tmp_path)), ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_sharded_checkpoint_is_read(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    ids = torch.randint(0, 211, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(logits(GPT.from_pretrained(str(tmp_path)), ids), theirs(ids).logits, atol=1e-4, rtol=0)


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
    assert a.generate(prompts, 20, 256, seed=5) == b.generate(prompts, 20, 256, seed=5) != b.generate(prompts, 20, 256, seed=6)


def test_checkpoints_keep_the_last_two_and_name_a_damaged_one(tmp_path):
    model = small_gpt()
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, model, dict(config={}, vocabulary='v'))
    assert [Path(p).name for p in find_checkpoints(tmp_path)] == ['step-000010.pt', 'step-000100.pt']
    loaded, record = load_model(str(tmp_path))
    assert record['vocabulary'] == 'v' and fingerprint(loaded) == fingerprint(model)
    path = find_checkpoints(tmp_path)[-1]
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match='step-000100.pt is damaged'):
        read_checkpoint(path)
