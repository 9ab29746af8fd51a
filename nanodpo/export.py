"""A checkpoint in the Hugging Face layout, for transformers and the like: weights, tokenizer, chat template.

    python -m nanodpo.export out/hh/dpo hh-hf               # into a new or an empty directory
    python -m nanodpo.export gpt2 gpt2-hf --data=data/hh    # weights that do not say what data they are for
    python -m nanodpo.export gpt2 gpt2-hf --data=           # the weights alone
"""
import json
import os
import re
import sys
from pathlib import Path

import config
from config import need, one_line
from model import hf_names, transposed
from nanodpo.checkpoint import load_model
from nanodpo.data import Groups, read_meta
from nanodpo.text import EOT, load_tokenizer


def save_pretrained(model, folder, data_dir=''):
    """Write a GPT for transformers' GPT2LMHeadModel, and the tokenizer of data_dir (data/<name>), if given.

    A vocabulary that is padded beyond the tokenizer's is cut to it. Without one the last id ends a text.
    """
    from safetensors.torch import save
    c = model.config
    meta = read_meta(data_dir) if data_dir else dict(vocab_size=c.vocab_size, eot_token=c.vocab_size - 1)
    size = meta['vocab_size']
    if size < c.vocab_size:
        print(f"the vocabulary of {c.vocab_size:,} is cut to the tokenizer's {size:,}")
    ends = dict.fromkeys(['bos_token_id', 'eos_token_id', 'pad_token_id'], meta['eot_token'])
    files = {'generation_config.json': ends}
    if data_dir:
        files['tokenizer.json'] = tokenizer_json(load_tokenizer(data_dir, meta['tokenizer']))
        files['tokenizer_config.json'] = tokenizer_config(meta['template'], c.block_size)
    files['config.json'] = dict(
        architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu_new', vocab_size=size,
        n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, attn_pdrop=0.0,
        embd_pdrop=c.dropout, resid_pdrop=c.dropout, layer_norm_epsilon=c.layer_norm_epsilon, dtype='float32', **ends)
    tensors = {}
    for name, p in hf_names(model):
        tensors['transformer.' + name] = (p.t() if transposed(name) else p).detach().contiguous()
    tensors['transformer.wte.weight'] = tensors['transformer.wte.weight'][:size]

    os.makedirs(folder, exist_ok=True)
    need(not os.listdir(folder), f'{folder} is not empty: export into a new or an empty directory')
    Path(folder, 'model.safetensors').write_bytes(save(tensors, metadata={'format': 'pt'}))
    for name, content in files.items():         # config.json is the last: without it nobody reads the rest
        Path(folder, name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding='utf-8')


# --- tokenizer and turn template ------------------------------------------------------------------

def tokenizer_json(tokenizer):
    """A tiktoken.Encoding as the content of tokenizer.json.

    With split_special_tokens=True it encodes as ours. Without, a literal <|endoftext|> becomes the end token.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]      # GPT-2's characters for bytes
    others = [b for b in range(256) if b not in printable]
    letters = dict(zip(printable + others, map(chr, [*printable, *range(256, 324)])))
    ranks = tokenizer._mergeable_ranks
    spelled = {token: ''.join(letters[b] for b in token) for token in sorted(ranks, key=ranks.get)}
    vocab = {text: ranks[token] for token, text in spelled.items()} | tokenizer._special_tokens
    vocab |= {f'<|unused_{i}|>': i for i in set(range(tokenizer.n_vocab)) - set(vocab.values())}     # cl100k's gaps
    merges = [' '.join(spelled[part] for part in last_merge(token, ranks)) for token in spelled if len(token) > 1]
    # possessive quantifiers are for speed, and this engine reads {1,3}+ as repeated; its $ is a line's end
    pattern = re.sub(r'([+*?]|\{[\d,]+\})\+', r'\1', tokenizer._pat_str).replace('$', r'(?![\s\S])')
    split = dict(type='Split', pattern={'Regex': pattern}, behavior='Isolated', invert=False)
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    end = dict(id=tokenizer.eot_token, content=EOT, special=True,
               single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(version='1.0', added_tokens=[end], decoder=byte_level,
                pre_tokenizer=dict(type='Sequence', pretokenizers=[split, byte_level]),
                model=dict(type='BPE', vocab=vocab, merges=merges))


def last_merge(token, ranks):
    """The two tokens that BPE merges into `token`. It merges the oldest pair first."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [a + b for a, b in zip(parts, parts[1:])]
        oldest = min((pair for pair in pairs if pair in ranks), key=ranks.get)
        i = pairs.index(oldest)
        parts[i:i + 2] = [oldest]
    return parts


CHAT = '''\
{%- set ns = namespace(text='') -%}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if message['role'] == 'user' -%}
        {%- set gap = '\\n' if ns.text and ns.text[-1:] != '\\n' and before[:1] != '\\n' else '' -%}
        {%- set ns.text = ns.text + gap + before + content + after -%}
    {%- else -%}
        {%- set gap = ' ' if ns.text[-1:]|trim and (content[:1]|trim or not content) else '' -%}
        {%- set ns.text = ns.text + gap + content -%}
    {%- endif -%}
{%- endfor -%}
{{- start + ns.text + (eos_token if messages[-1]['role'] == 'assistant' else '') -}}
'''


def tokenizer_config(template, max_length):
    """The content of tokenizer_config.json. Its chat template is text.render in Jinja."""
    before, after = template.removeprefix(EOT).split('{prompt}', 1)
    start = EOT if template.startswith(EOT) else ''
    strings = json.dumps([start, before, after], ensure_ascii=False)
    return dict(tokenizer_class='PreTrainedTokenizerFast', padding_side='left', model_max_length=max_length,
                bos_token=EOT, eos_token=EOT, pad_token=EOT, unk_token=EOT, clean_up_tokenization_spaces=False,
                model_input_names=['input_ids', 'attention_mask'],      # GPT-2 would embed token types, too
                chat_template=f'{{%- set start, before, after = {strings} -%}}\n{CHAT}')


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv in (['-h'], ['--help']):
        print(__doc__.strip())
        return
    paths = [arg for arg in argv if not arg.startswith('--data=')]
    data_dirs = [arg.removeprefix('--data=') for arg in argv if arg.startswith('--data=')]
    need(len(paths) == 2, 'usage: python -m nanodpo.export WEIGHTS DIRECTORY [--data=data/NAME]')
    source, folder = paths
    model = load_model(source, dropout=0.0)
    name = model.record.get('config', {}).get('name')
    need(name or data_dirs, f'{source} does not say what data it is for: add --data=data/NAME, or --data=')
    data_dir = [f'data/{name}', *data_dirs][-1]
    if data_dir:
        split = list(read_meta(data_dir)['splits'])[-1]
        Groups(data_dir, split).check_model(model.config, model.record.get('vocabulary'), source)
    with one_line(f'cannot write {folder}'):
        save_pretrained(model, folder, data_dir)
    print(f'{folder}: {model.num_params():,} parameters of {source}, tokenizer of {data_dir or "none"}')


if __name__ == '__main__':
    config.run(main)
