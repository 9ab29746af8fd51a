"""Weights in the Hugging Face layout, in and out: GPT-2, GPT-NeoX (Pythia), Llama 3 and its kin, Qwen2.5, Qwen3.

    model = from_pretrained('Qwen/Qwen3-0.6B')      # a hub name, or a directory

`model.config.hf` is the config.json that came in; checkpoints keep it. Weights go out as they came: names and layout.
"""
import json
import os
import re
from pathlib import Path

import torch

from config import need
from model import GPT, GPTConfig, check
from nanodpo.folder import regular

NAMES = '''
ours         gpt2            gpt_neox                           llama,qwen2,qwen3
prefix       transformer.    gpt_neox.                          model.
lm_head      lm_head         embed_out                          lm_head
wte          wte             embed_in                           embed_tokens
wpe          wpe             -                                  -
ln_f         ln_f            final_layer_norm                   norm
ln_1         h.*.ln_1        layers.*.input_layernorm           layers.*.input_layernorm
ln_2         h.*.ln_2        layers.*.post_attention_layernorm  layers.*.post_attention_layernorm
attn.c_attn  h.*.attn.c_attn layers.*.attention.query_key_value layers.*.self_attn.[qkv]_proj
attn.c_proj  h.*.attn.c_proj layers.*.attention.dense           layers.*.self_attn.o_proj
attn.q_norm  -               -                                  layers.*.self_attn.q_norm
attn.k_norm  -               -                                  layers.*.self_attn.k_norm
c_gate       -               -                                  layers.*.mlp.gate_proj
c_fc         h.*.mlp.c_fc    layers.*.mlp.dense_h_to_4h         layers.*.mlp.up_proj
c_proj       h.*.mlp.c_proj  layers.*.mlp.dense_4h_to_h         layers.*.mlp.down_proj
'''
ROWS = [row.split() for row in NAMES.strip().splitlines()]
NAMES = {family: {ours: theirs[i] for ours, *theirs in ROWS}
         for i, families in enumerate(ROWS[0][1:]) for family in families.split(',')}
OLD_BUFFERS = r'\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$'
ACTIVATIONS = dict(gelu='gelu', gelu_new='gelu_tanh', gelu_fast='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', silu='silu')
SCRATCH = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu_new', attn_pdrop=0.0)


def names_of(name, family):
    """Their tensors, without prefix, that make ours, such as h.0.attn.c_attn.weight: a list of one, or of q, k, v."""
    layer, key, kind = re.fullmatch(r'(?:h\.(\d+)\.)?(.+)\.(weight|bias)', name).groups('')
    theirs = f'{NAMES[family][key]}.{kind}'.replace('*', layer)
    return [theirs.replace('[qkv]', letter) for letter in ('qkv' if '[qkv]' in theirs else '-')]


def unpack(name, tensors, family, config):
    """Theirs -> ours, (out, in). Rows of c_attn: all queries, then all keys, then all values."""
    if family == 'gpt2' and name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
        return tensors[0].t()                                           # (in, out) there
    if family == 'gpt_neox' and 'c_attn' in name:                       # each head's query, key and value together
        return tensors[0].unflatten(0, (config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def pack(name, p, family, config):
    """The inverse of unpack: -> list of tensors."""
    if family == 'gpt2' or 'c_attn' not in name:
        return [unpack(name, [p], family, config)]
    if family == 'gpt_neox':
        return [p.unflatten(0, (3, config.n_head, -1)).transpose(0, 1).flatten(0, 2)]
    return p.split([heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)])


# --- in -------------------------------------------------------------------------------------------

def end_tokens(hf):
    """The ids that end a text by the content of config.json, which names one, several or none."""
    return [int(number) for number in re.findall(r'\d+', str(hf.get('eos_token_id')))]


def read_config(hf, **options):
    """The content of config.json as a GPTConfig. UserError where model.py would compute something else."""
    def only(key, value, *allowed):
        need(value in allowed, f'{key}={value!r:.80} in config.json: this model has {" or ".join(map(repr, allowed))}')
    family = hf.get('model_type')
    only('model_type', family, *NAMES)
    neox = family == 'gpt_neox'             # LayerNorm and biases; the younger ones have RMSNorm and a gated MLP
    fine = dict(quantization_config=None, use_sliding_window=False, mlp_bias=False, add_cross_attention=False,
                attention_bias=neox or family == 'qwen2', scale_attn_weights=True,
                scale_attn_by_inverse_layer_idx=False)
    for key, value in fine.items():
        only(key, hf.get(key, value), value)
    for kind in hf.get('layer_types') or []:
        only('layer_types', kind, 'full_attention')
    act = 'activation_function' if family == 'gpt2' else 'hidden_act'
    only(act, hf[act], *ACTIVATIONS)
    rope = (hf.get('rope_scaling') or {}) | (hf.get('rope_parameters') or {})   # of transformers before 5, and since
    kind = rope.get('rope_type', rope.get('type', 'default'))
    only('rope_type', kind, 'default', 'llama3')
    options |= dict(hf=hf, vocab_size=hf['vocab_size'], activation=ACTIVATIONS[hf[act]])
    if family == 'gpt2':
        return GPTConfig(hf.get('n_positions', 1024), n_layer=hf['n_layer'], n_head=hf['n_head'], n_embd=hf['n_embd'],
                         n_inner=hf.get('n_inner') or 0, layer_norm_epsilon=hf.get('layer_norm_epsilon', 1e-5),
                         tied=hf.get('tie_word_embeddings', True), **options)
    C, H = hf['hidden_size'], hf['num_attention_heads']
    head_dim = hf.get('head_dim') or (128 if family == 'qwen3' else C // H)
    rotated = rope.get('partial_rotary_factor', hf.get('rotary_pct', 0.25) if neox else 1.0)
    theta = rope.get('rope_theta', hf.get('rotary_emb_base' if neox else 'rope_theta', 10000.0))
    scaling = 'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'
    return GPTConfig(
        hf['max_position_embeddings'], n_layer=hf['num_hidden_layers'], n_head=H, n_embd=C, head_dim=head_dim,
        n_kv_head=hf.get('num_key_value_heads') or H, n_inner=hf['intermediate_size'], gated=not neox,
        rms_norm=not neox, layer_norm_epsilon=hf['layer_norm_eps' if neox else 'rms_norm_eps'],
        qk_norm=family == 'qwen3', qkv_bias=neox or family == 'qwen2', bias=neox,
        parallel=neox and hf.get('use_parallel_residual', True), tied=hf.get('tie_word_embeddings', False),
        rotary_dim=int(head_dim * rotated), rope_theta=theta,
        rope_scaling=tuple(rope[key] for key in scaling) if kind == 'llama3' else (), **options)


def empty(config, weights):
    """A GPT of shapes alone, for load_state_dict(..., assign=True). ValueError if `weights` are too few for it."""
    check(config.n_layer <= len(weights), f'n_layer={config.n_layer}, but there are {len(weights)} weights')
    with torch.device('meta'):
        return GPT(config)


def from_pretrained(name_or_dir, **options):
    """The GPT in a directory with config.json and model*.safetensors, or of that name on the hub; float32, on the CPU.

    options: dropout, activation_checkpointing. Raises UserError, and what a damaged file causes.
    """
    from safetensors.torch import load_file
    folder, origin = name_or_dir, {}
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download
        folder = snapshot_download(name_or_dir, allow_patterns=['config.json', 'model*.safetensors*'])
        origin = dict(_name_or_path=name_or_dir)
    config = read_config(json.loads(regular(Path(folder, 'config.json')).read_bytes()) | origin, **options)
    family = config.hf['model_type']
    files, theirs = ['model.safetensors'], {}
    index = Path(folder, 'model.safetensors.index.json')
    if index.is_file() and not Path(folder, *files).exists():
        files = sorted(set(json.loads(index.read_bytes())['weight_map'].values()))
    for file in files:
        need(file in os.listdir(folder), f'{folder} holds no {file!r}')
        tensors = load_file(regular(Path(folder, file)))
        theirs |= {name.removeprefix(NAMES[family]['prefix']): tensor for name, tensor in tensors.items()}
    head, embedding = (f'{NAMES[family][key]}.weight' for key in ('lm_head', 'wte'))
    need(not config.tied or head not in theirs or torch.equal(theirs.pop(head), theirs[embedding]),
         f'{folder}: {head} is not {embedding}, but tie_word_embeddings=True in config.json')
    model = empty(config, theirs)
    state = {}
    for name, p in model.state_dict().items():
        parts = names_of(name, family)
        need(theirs.keys() >= set(parts), f'{folder} holds no {", ".join(parts)}, which its config.json asks for')
        tensor = unpack(name, [theirs.pop(part) for part in parts], family, config)
        need(tensor.shape == p.shape, f'{folder}: {parts[0]} makes {tuple(tensor.shape)}, config.json {tuple(p.shape)}')
        need(tensor.is_floating_point(), f'{folder}: {parts[0]} holds {tensor.dtype}, no real numbers')
        state[name] = torch.empty(p.shape).copy_(tensor)        # float32, and no view of the file
    left = [name for name in theirs if not re.search(OLD_BUFFERS, name)]
    need(not left, f'{folder} holds {left[:3]}, for which its config.json has no place')
    model.load_state_dict(state, assign=True)
    return model


# --- out ------------------------------------------------------------------------------------------

def config_of(c, **changes):
    """The content of config.json of a GPTConfig: its base's, or that of a GPT-2 from scratch; float32."""
    hf = c.hf or SCRATCH | dict(n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                                layer_norm_epsilon=c.layer_norm_epsilon, embd_pdrop=c.dropout, resid_pdrop=c.dropout)
    return {key: value for key, value in hf.items() if key != 'torch_dtype'} | dict(dtype='float32') | changes


def tensors_of(model):
    """Yields (name, tensor) of every weight under transformers' names, in its layout."""
    family = (model.config.hf or SCRATCH)['model_type']
    for ours, p in model.state_dict().items():
        prefix = '' if ours.startswith('lm_head') else NAMES[family]['prefix']
        for name, tensor in zip(names_of(ours, family), pack(ours, p, family, model.config)):
            yield prefix + name, tensor
