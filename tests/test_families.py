"""Every family that model.py knows against transformers: logits, log-probs, gradients, greedy text, files, refusals."""
import copy
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import dpo
import model as model_file
from config import UserError
from conftest import random_groups, small_gpt, write_data
from model import GPTConfig, visible
from nanodpo import checkpoint, export, hf
from nanodpo.checkpoint import fingerprint, load_model
from nanodpo.data import Groups, pack
from nanodpo.run import Run, Worker

transformers = pytest.importorskip('transformers')

V, LONGEST = 257, 160
SIZES = dict(vocab_size=V, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=LONGEST,
             bos_token_id=256, eos_token_id=256)
YOUNG = dict(SIZES, intermediate_size=80)
GPT2 = dict(vocab_size=V, n_embd=48, n_layer=2, n_head=6, n_positions=LONGEST, bos_token_id=256, eos_token_id=256)
LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
MODELS = {
    'gpt2': ('GPT2', GPT2),
    'gpt2, a narrow mlp and the exact gelu': ('GPT2', GPT2 | dict(n_inner=100, activation_function='gelu')),
    'pythia': ('GPTNeoX', SIZES | dict(intermediate_size=192, hidden_size=96, rotary_pct=0.25)),
    'pythia, heads of 80': ('GPTNeoX', SIZES | dict(intermediate_size=64, hidden_size=160, num_attention_heads=2)),
    'neox, serial': ('GPTNeoX', SIZES | dict(intermediate_size=192, rotary_pct=0.5, use_parallel_residual=False)),
    'llama, untied': ('Llama', YOUNG | dict(tie_word_embeddings=False)),
    'smollm2': ('Llama', YOUNG | dict(num_key_value_heads=2, rope_theta=1e5, tie_word_embeddings=True)),
    'llama 3.2': ('Llama', YOUNG | dict(num_key_value_heads=3, head_dim=16, rope_theta=5e5, rope_scaling=LLAMA3,
                                        tie_word_embeddings=True)),
    'qwen2.5': ('Qwen2', YOUNG | dict(num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True)),
    'qwen3': ('Qwen3', YOUNG | dict(num_key_value_heads=2, head_dim=16, rope_theta=1e6, tie_word_embeddings=True)),
    'qwen3, untied': ('Qwen3', YOUNG | dict(num_key_value_heads=1, head_dim=16, tie_word_embeddings=False)),
}


def theirs_of(name):
    """A model of transformers, random, with predictions that tell tokens and positions apart."""
    family, sizes = MODELS[name]
    sizes = copy.deepcopy(sizes)
    if 'rope_theta' in sizes and int(transformers.__version__.split('.')[0]) >= 5:
        sizes['rope_parameters'] = dict(rope_type='default') | sizes.pop('rope_scaling', {}) | dict(
            rope_theta=sizes.pop('rope_theta'))
    torch.manual_seed(0)
    config = getattr(transformers, f'{family}Config')(**sizes)
    name = 'GPT2LMHeadModel' if family == 'GPT2' else f'{family}ForCausalLM'
    theirs = getattr(transformers, name)(config).eval()
    for key, p in theirs.named_parameters():
        scale = key.endswith('weight') and ('norm' in key or 'ln_' in key)
        torch.nn.init.normal_(p, 1.0 if scale else 0.0, 0.1 if p.dim() == 1 else 0.7 / math.sqrt(p.shape[-1]))
    return theirs


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """(transformers' model, ours, read from what it wrote to tmp_path/base)"""
    theirs = theirs_of(request.param)
    theirs.save_pretrained(tmp_path / 'base')
    return theirs, hf.from_pretrained(str(tmp_path / 'base')).eval()


def logits_of(ours, ids):
    """(B, T, V) by one plain forward pass."""
    T = ids.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    return F.linear(ours(ids, torch.arange(T).expand(len(ids), -1), mask), ours.head)


def worst(ours, theirs):
    """The largest difference, in units of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def random_ids(*shape, seed=0):
    return torch.randint(0, V - 1, shape, generator=torch.Generator().manual_seed(seed))


# --- the same numbers as transformers' ------------------------------------------------------------

def test_logits_gradients_and_greedy_text_are_those_of_transformers(pair):
    theirs, ours = pair
    ids = random_ids(2, 150)
    a, b = logits_of(ours, ids), theirs(ids).logits
    assert b.std() > 0.3 and worst(a, b) < 1e-4
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    (a.log_softmax(-1) * weights).mean().backward()
    (b.log_softmax(-1) * weights).mean().backward()
    family = ours.config.hf['model_type']
    grads = {name.replace('lm_head', hf.NAMES[family]['lm_head']): p.grad for name, p in theirs.named_parameters()}
    prefix = hf.NAMES[family]['prefix']
    for name, p in ours.named_parameters():
        of_theirs = [grads[part if part in grads else prefix + part] for part in hf.names_of(name, family)]
        assert worst(p.grad, hf.unpack(name, of_theirs, family, ours.config)) < 1e-4, name

    prompts = [random_ids(n, seed=n).tolist() for n in (1, 7, 40)]
    for prompt, response in zip(prompts, ours.generate(prompts, 40, end_token=256, temperature=0)):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=256)
        assert response == expected[0, len(prompt):].tolist()


def test_the_tolerance_tells_the_two_gelus_apart(tmp_path):
    theirs = theirs_of('pythia')
    theirs.save_pretrained(tmp_path)
    ours, ids = hf.from_pretrained(str(tmp_path)), random_ids(2, 150)
    expected = theirs(ids).logits
    assert worst(logits_of(ours, ids), expected) < 1e-5
    for block in ours.h:
        block.activation = model_file.ACTIVATIONS['gelu_tanh']
    assert worst(logits_of(ours, ids), expected) > 2e-4


@pytest.fixture
def groups(tmp_path):
    data = random_groups(8, 2, np.random.default_rng(0), longest=40)
    return Groups(write_data(tmp_path / 'd', {'train': data}, max_length=LONGEST), 'train')


def test_packed_logps_and_a_step_of_dpo_equal_one_sequence_at_a_time(pair, groups):
    """Against transformers, prompt + response alone: the log-probs, the loss and all gradients of the policy."""
    theirs, policy = pair
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for a, b in zip(reference.parameters(), policy.parameters()):
            a += 0.3 * b.abs().mean() * torch.randn(a.shape, generator=torch.Generator().manual_seed(a.numel()))
    batch = pack(groups, list(range(8)))
    logps = dpo.response_logps(policy, batch)
    alone, ref_alone = torch.zeros(8, 2), torch.zeros(8, 2)
    for i in range(8):
        prompt, *responses = groups[i]
        for k, response in enumerate(responses):
            ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
            for table, logits in ((alone, theirs(ids).logits), (ref_alone, logits_of(reference, ids))):
                scored = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1:]
                table[i, k] = scored.sum()
    assert worst(logps, alone) < 1e-4
    with torch.no_grad():
        ref_logps = dpo.response_logps(reference, batch)
    assert worst(ref_logps, ref_alone) < 1e-4
    loss = dpo.dpo_loss(*logps.t(), *ref_logps.t(), 0.1)[0].mean()
    expected = dpo.dpo_loss(*alone.t(), *ref_alone.detach().t(), 0.1)[0].mean()
    assert abs(loss.item() / expected.item() - 1) < 1e-4 and abs(expected.item() - math.log(2)) > 1e-3
    loss.backward()
    expected.backward()
    family = policy.config.hf['model_type']
    grads = {name.replace('lm_head', hf.NAMES[family]['lm_head']): p.grad for name, p in theirs.named_parameters()}
    prefix = hf.NAMES[family]['prefix']
    for name, p in policy.named_parameters():
        of_theirs = [grads[part if part in grads else prefix + part] for part in hf.names_of(name, family)]
        assert worst(p.grad, hf.unpack(name, of_theirs, family, policy.config)) < 1e-4, name


@torch.no_grad()
def test_flex_attention_and_activation_checkpointing_change_nothing(pair, groups, monkeypatch):
    """FlexAttention as CUDA has it, here forward and not compiled: keys stay shared by queries."""
    ours, batch = pair[1], pack(groups, [0, 1, 2], 128)
    expected = dpo.response_logps(ours, batch)
    T = batch.tokens.numel()
    batch.mask = create_block_mask(visible(batch.group, batch.part), 1, None, T, T, device='cpu')
    monkeypatch.setattr(model_file, 'flex', flex_attention)
    assert worst(dpo.response_logps(ours, batch), expected) < 1e-5


def test_activation_checkpointing_changes_no_gradient(pair, groups):
    ours, batch, grads = pair[1].train(), pack(groups, [0, 1]), []
    for ours.config.activation_checkpointing in (False, True):
        dpo.response_logps(ours, batch).sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
        ours.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@torch.no_grad()
def test_bfloat16_autocast_keeps_float32_where_it_matters(pair, groups):
    """The reference's casts change nothing, and bfloat16 costs at most a few times what one rounding costs."""
    ours, batch = pair[1], pack(groups, list(range(8)))
    exact = dpo.response_logps(ours, batch)
    reference = copy.deepcopy(ours)
    worker = Worker('cpu', 'bfloat16')
    frozen = type('R', (), dict(bf16=True, compile=False))
    Run.freeze(frozen, reference)
    with worker.autocast:
        rounded = dpo.response_logps(ours, batch)
        assert torch.equal(dpo.response_logps(reference, batch), rounded)
    assert 1e-5 < worst(rounded, exact) < 0.03


@pytest.mark.parametrize('name', ['pythia', 'qwen3, untied'])
def test_flops_are_those_of_every_matmul_that_runs(tmp_path, groups, name):
    """Counted by torch as the model runs, but for attention, of which torch counts the masked half, too."""
    from torch.utils.flop_counter import FlopCounterMode
    theirs_of(name).save_pretrained(tmp_path / 'base')
    ours = hf.from_pretrained(str(tmp_path / 'base'))
    ids = list(range(8))
    batch = pack(groups, ids)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(batch.tokens, batch.positions, batch.mask)
    matmuls = counter.get_flop_counts()['Global'][torch.ops.aten.addmm if ours.config.bias else torch.ops.aten.mm]
    c = ours.config
    sizes = np.diff(groups.index[ids], axis=1).astype(float)
    seen = (sizes * (sizes + 1) / 2).sum() + (sizes[:, :1] * sizes[:, 1:]).sum()
    attention = 4 * c.n_layer * c.n_head * c.head_dim * seen
    head = 2 * V * c.n_embd * groups.response_tokens(ids)
    assert groups.forward_flops(ids, c) == matmuls * sizes.sum() / batch.tokens.numel() + attention + head


# --- files, in and out ----------------------------------------------------------------------------

def test_weights_come_back_bit_for_bit_and_transformers_reads_them(pair, tmp_path, monkeypatch):
    """Through a checkpoint of ours, in one file and in shards: the tensors, names and config.json of the base."""
    from safetensors.torch import load_file
    theirs, ours = pair
    os.mkdir(tmp_path / 'out')
    checkpoint.save(str(tmp_path / 'out'), 1, ours, {})
    again = load_model(str(tmp_path / 'out'), dropout=0.0)
    assert fingerprint(again) == fingerprint(ours) and again.config == ours.config
    base = load_file(tmp_path / 'base/model.safetensors')
    config = json.loads((tmp_path / 'base/config.json').read_text())
    prompt = random_ids(1, 9)
    expected = theirs.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=256)
    for folder, shard in (('one', export.SHARD), ('many', 20_000)):
        monkeypatch.setattr(export, 'SHARD', shard)
        export.save_pretrained(again, str(tmp_path / folder))
        files = list((tmp_path / folder).glob('model*.safetensors'))
        assert (len(files) > 3) == (folder == 'many')
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert tensors.keys() == base.keys() and all(torch.equal(tensors[name], base[name]) for name in base)
        assert json.loads((tmp_path / folder / 'config.json').read_text()) == config
        assert fingerprint(hf.from_pretrained(str(tmp_path / folder))) == fingerprint(ours)
        copied = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        made = copied.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=256)
        assert torch.equal(made, expected)


@pytest.fixture
def folder(tmp_path):
    """A function: the directory of a small model of that name."""
    def made(name):
        theirs_of(name).save_pretrained(tmp_path / name)
        return tmp_path / name
    return made


def changed(folder, **keys):
    config = json.loads((folder / 'config.json').read_text()) | keys
    (folder / 'config.json').write_text(json.dumps({key: value for key, value in config.items() if value != 'GONE'}))


@pytest.mark.parametrize('name, old', [
    ('pythia', dict(rotary_pct=0.25, rotary_emb_base=10000)), ('smollm2', dict(rope_theta=1e5, rope_scaling=None)),
    ('llama 3.2', dict(rope_theta=5e5, rope_scaling=LLAMA3)),
    ('qwen3', dict(rope_theta=1000000, use_sliding_window=False, sliding_window=None, max_window_layers=28))])
def test_the_hubs_older_config_files_and_bfloat16_weights_mean_the_same(folder, name, old):
    from safetensors.torch import load_file, save_file
    made = folder(name)
    expected, ids = hf.from_pretrained(str(made)), random_ids(1, 100)
    changed(made, rope_parameters='GONE', dtype='GONE', torch_dtype='bfloat16', **old)
    config = hf.from_pretrained(str(made)).config
    assert config.rope_scaling == expected.config.rope_scaling and config.rope_theta == expected.config.rope_theta
    with torch.no_grad():
        assert torch.equal(logits_of(hf.from_pretrained(str(made)), ids), logits_of(expected, ids))
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(made / 'model.safetensors').items()}
    layer = 'gpt_neox.layers.0.attention.' if name == 'pythia' else 'model.layers.0.self_attn.'
    tensors |= {layer + 'rotary_emb.inv_freq': torch.ones(4)}
    if name == 'pythia':
        tensors |= {layer + 'bias': torch.ones(1, 1, 8, 8).tril(), layer + 'masked_bias': torch.tensor(-1e9)}
    save_file(tensors, made / 'model.safetensors')
    ours = hf.from_pretrained(str(made))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.wte.weight, expected.wte.weight.bfloat16().float())
    assert 'torch_dtype' not in hf.config_of(ours.config)


@pytest.mark.parametrize('name, key, value, match', [
    ('smollm2', 'model_type', 'mixtral', "model_type='mixtral' .*gpt2.*qwen3"),
    ('smollm2', 'model_type', 'gemma2', "model_type='gemma2'"), ('smollm2', 'model_type', 'GONE', 'model_type=None'),
    ('smollm2', 'hidden_act', 'relu', "hidden_act='relu'"), ('gpt2', 'activation_function', 'relu', "function='relu'"),
    ('smollm2', 'quantization_config', dict(quant_method='gptq', bits=4), "quantization_config={'quant_method'"),
    ('qwen2.5', 'use_sliding_window', True, 'use_sliding_window=True'),
    ('qwen2.5', 'layer_types', ['full_attention', 'sliding_attention'], "layer_types='sliding_attention'"),
    ('smollm2', 'rope_parameters', dict(rope_type='yarn', factor=4.0), "rope_type='yarn'"),
    ('qwen3', 'rope_scaling', dict(type='linear', factor=4.0), "rope_type='linear'"),
    ('smollm2', 'attention_bias', True, 'attention_bias=True'), ('smollm2', 'mlp_bias', True, 'mlp_bias=True'),
    ('pythia', 'attention_bias', False, 'attention_bias=False'),
    ('gpt2', 'add_cross_attention', True, 'attention=True'), ('gpt2', 'scale_attn_weights', False, 'weights=False'),
    ('gpt2', 'scale_attn_by_inverse_layer_idx', True, 'inverse_layer_idx=True'),
    # a config that contradicts its weights
    ('smollm2', 'num_hidden_layers', 3, r"holds no layers.2.*, which its config.json asks for"),
    ('smollm2', 'num_hidden_layers', 1, 'holds .*layers.1.*has no place'),
    ('smollm2', 'hidden_size', 24, r'embed_tokens.weight makes \(257, 48\), config.json \(257, 24\)'),
    ('smollm2', 'num_key_value_heads', 3, r'q_proj.weight makes'), ('qwen3', 'head_dim', 8, r'q_proj.weight makes'),
    ('pythia', 'num_attention_heads', 5, 'RuntimeError'), ('smollm2', 'intermediate_size', 81, 'gate_proj'),
    ('llama, untied', 'tie_word_embeddings', True, 'lm_head.weight is not embed_tokens.weight'),
    ('smollm2', 'tie_word_embeddings', False, 'holds no .*lm_head.weight'),
    ('smollm2', 'vocab_size', 300, 'embed_tokens.weight makes'), ('smollm2', 'hidden_size', 'GONE', 'hidden_size')])
def test_what_the_model_cannot_do_exactly_is_one_line_with_key_and_value(folder, name, key, value, match):
    made = folder(name)
    changed(made, **{key: value} | ({'rope_parameters': 'GONE'} if key == 'rope_scaling' else {}))
    with pytest.raises(UserError, match=match) as error:
        load_model(str(made))
    assert '\n' not in error.value.code and len(error.value.code) < 400


def test_a_missing_shard_is_named(tmp_path):
    theirs_of('smollm2').save_pretrained(tmp_path, max_shard_size='20KB')
    lost = sorted(tmp_path.glob('model-*.safetensors'))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"holds no '{lost.name}'"):
        load_model(str(tmp_path))


def test_a_rotary_model_has_no_table_of_positions(folder):
    """Positions up to 2^20 cost nothing: neither weights, nor a cache beyond what is drawn."""
    made = folder('smollm2')
    changed(made, max_position_embeddings=2**20)
    ours = hf.from_pretrained(str(made))
    assert ours.wpe is None and ours.num_params() < 100_000 and not list(ours.buffers())
    assert len(ours.generate([[1, 2]], 5, end_token=V, temperature=0)[0]) == 5


@pytest.mark.parametrize('name', ['pythia', 'qwen3, untied'])
def test_a_run_from_the_base_to_an_export_and_from_there(experiment, folder, name, capsys):
    """dpo.py with cached and with live reference log-probs, in rows of any length; its export has its weights."""
    made, losses = folder(name), []
    flags = ['--name=tiny', '--device=cpu', '--batch_size=12', '--learning_rate=1e-4', '--warmup_steps=0',
             '--kl_prompts=4', '--optimizer=adamw']
    for extra in ([], ['--precompute_ref', '--activation_checkpointing', '--row_tokens=200']):
        dpo.main([*flags, f'--init_from={made}', *extra])
        rows = [json.loads(line) for line in Path('out/tiny/dpo/log.jsonl').read_text().splitlines()]
        losses.append([row['eval/loss'] for row in rows if 'eval/loss' in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] == pytest.approx(math.log(2))
    assert losses[0][-1] != pytest.approx(math.log(2), abs=1e-3)
    trained = load_model('out/tiny/dpo')
    export.main(['out/tiny/dpo', 'exported', '--data='])
    assert fingerprint(load_model('exported')) == fingerprint(trained) != fingerprint(load_model(str(made)))
    card = Path('exported/README.md').read_text()
    for row in ('| loss | dpo |', '| beta | 0.1 |', '| steps | 4 |', '| held-out accuracy | ', '| command | '):
        assert row in card
    theirs = transformers.AutoModelForCausalLM.from_pretrained('exported')
    prompt = random_ids(1, 9)
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=256)[0, 9:].tolist()
    assert trained.generate(prompt.tolist(), 20, end_token=256, temperature=0) == [expected]


def test_a_checkpoint_from_before_the_families_still_loads(tmp_path):
    """Its model_config has the sizes of a GPT-2 alone."""
    ours, fields = small_gpt(), [field.name for field in dataclasses.fields(GPTConfig)]
    fields = fields[:fields.index('activation_checkpointing') + 1]
    ours.config = dataclasses.make_dataclass('Old', fields)(**{key: getattr(ours.config, key) for key in fields})
    os.mkdir(tmp_path / 'out')
    checkpoint.save(str(tmp_path / 'out'), 1, ours, {})
    again = load_model(str(tmp_path / 'out'))
    assert again.config == small_gpt().config and fingerprint(again) == fingerprint(ours)
