"""A checkpoint in the Hugging Face layout, for transformers and what builds on it: weights, tokenizer, turn template.

    python -m nanodpo.export out/hh/dpo hh-hf                   # into a new or an empty directory
    python -m nanodpo.export gpt2 gpt2-hf --data=data/hh        # of weights that do not say what data they are for
    python -m nanodpo.export gpt2 gpt2-hf --data=               # the weights alone

The tokenizer and the template are those of data/<name>, the data set that a checkpoint was trained on.
"""
import json
import os
import re
import shutil
import sys
import tempfile

import config
from config import UserError, need
from model import hf_names, transposed
from nanodpo.checkpoint import load_model
from nanodpo.data import Groups, read_meta
from nanodpo.text import EOT, load_tokenizer


# ----------------------------------------------------------------------------------------------------
# weights

def save_pretrained(model, folder, data_dir=''):
    """Write a GPT for transformers' GPT2LMHeadModel, and with data_dir (data/<name>) a tokenizer for AutoTokenizer.

    folder: is new or empty. A vocabulary that is padded beyond the tokenizer's is cut to it, so that no id without a
    token is ever generated. Without a tokenizer the last id ends a text, as GPT-2's does. Raises UserError, OSError.
    """
    is_free = not os.path.lexists(folder) or os.path.isdir(folder) and not os.listdir(folder)
    need(is_free, f'{folder} is there and is not an empty directory: export into a new or an empty one')
    c = model.config
    size, end_token = c.vocab_size, c.vocab_size - 1
    contents = {}
    if data_dir:
        meta = read_meta(data_dir)
        size, end_token = meta['vocab_size'], meta['eot_token']
        contents['tokenizer.json'] = tokenizer_json(load_tokenizer(data_dir, meta['tokenizer']))
        contents['tokenizer_config.json'] = tokenizer_config(meta['template'], c.block_size)
    if size < c.vocab_size:
        print(f"the vocabulary of {c.vocab_size:,} is cut to the tokenizer's {size:,}")
    ends = dict(bos_token_id=end_token, eos_token_id=end_token, pad_token_id=end_token)
    contents['generation_config.json'] = ends
    contents['config.json'] = dict(
        architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu_new', vocab_size=size,
        n_positions=c.block_size, n_ctx=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
        layer_norm_epsilon=c.layer_norm_epsilon, attn_pdrop=0.0, embd_pdrop=c.dropout, resid_pdrop=c.dropout,
        dtype='float32', **ends)
    tensors = {}
    for name, p in hf_names(model):
        p = p.detach().float().cpu()
        if name == 'wte.weight':
            p = p[:size]
        tensors[f'transformer.{name}'] = (p.t() if transposed(name) else p).contiguous()
    write(folder, tensors, contents)


def write(folder, tensors, contents):
    """Write model.safetensors and JSON files, {name: content}. All are written aside, then moved to `folder`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.tmp-', dir=folder) as aside:
        weights = os.path.join(aside, 'model.safetensors')
        try:
            save_file(tensors, weights, metadata={'format': 'pt'})
        except SafetensorError as error:        # it holds the disk's own
            raise OSError(str(error)) from None
        for name, content in contents.items():
            with open(os.path.join(aside, name), 'w', encoding='utf-8') as f:
                json.dump(content, f, ensure_ascii=False, indent=1)
        shutil.copymode(f.name, weights)        # safetensors lets nobody else read it
        for name in ['model.safetensors', *contents]:       # config.json is the last: without it nobody reads the rest
            os.replace(os.path.join(aside, name), os.path.join(folder, name))


# ----------------------------------------------------------------------------------------------------
# tokenizer and turn template

def tokenizer_json(tokenizer):
    """A tiktoken.Encoding as the content of tokenizer.json.

    There `encode(text, split_special_tokens=True)` gives the ids of encode_ordinary. Without that flag a literal
    <|endoftext|> in a text becomes the end token.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]      # GPT-2's alphabet: a character for each byte
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def spelled(token):
        return ''.join(letters[b] for b in token)

    ranks = tokenizer._mergeable_ranks
    vocab = {spelled(token): rank for token, rank in ranks.items()} | tokenizer._special_tokens
    gaps = set(range(tokenizer.n_vocab)) - set(vocab.values())             # cl100k_base has some
    vocab |= {f'<|unused_{i}|>': i for i in gaps}
    longer = sorted((rank, token) for token, rank in ranks.items() if len(token) > 1)
    merges = [' '.join(map(spelled, last_merge(token, rank, ranks))) for rank, token in longer]
    # possessive quantifiers are there for speed alone, and this engine reads {1,3}+ as repeated; its $ is a line's end
    pattern = re.sub(r'([+*?]|\{[\d,]+\})\+', r'\1', tokenizer._pat_str).replace('$', r'(?![\s\S])')
    split = dict(type='Split', pattern={'Regex': pattern}, behavior='Isolated', invert=False)
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    end = dict(id=tokenizer.eot_token, content=EOT, single_word=False, lstrip=False, rstrip=False, normalized=False,
               special=True)
    return dict(version='1.0', added_tokens=[end], decoder=byte_level,
                pre_tokenizer=dict(type='Sequence', pretokenizers=[split, byte_level]),
                model=dict(type='BPE', vocab=vocab, merges=merges))


def last_merge(token, rank, ranks):
    """The two tokens that BPE merges into `token`. Merging its bytes by older tokens alone leaves these."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        older, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        need(older < rank, f'token {rank}, {token!r}, is no merge of two others: this tokenizer cannot be exported')
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


CHAT = '''\
{%- set ns = namespace(text='') -%}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if message['role'] == 'user' -%}
        {%- if ns.text and ns.text[-1:] != '\\n' and before[:1] != '\\n' -%}
            {%- set ns.text = ns.text + '\\n' -%}
        {%- endif -%}
        {%- set ns.text = ns.text + before + content + after -%}
    {%- else -%}
        {%- if ns.text[-1:]|trim and (content[:1]|trim or not content) -%}
            {%- set ns.text = ns.text + ' ' -%}
        {%- endif -%}
        {%- set ns.text = ns.text + content -%}
    {%- endif -%}
{%- endfor -%}
{{- start + ns.text -}}
{%- if messages[-1]['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
'''


def tokenizer_config(template, max_length):
    """The content of tokenizer_config.json. max_length: the model's positions.

    Its chat template writes turns as text.render does. The end token follows an answer that comes last, as in training.
    """
    before, after = template.removeprefix(EOT).split('{prompt}', 1)
    start = EOT if template.startswith(EOT) else ''
    values = [f'{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n'
              for name, value in dict(start=start, before=before, after=after).items()]
    return dict(tokenizer_class='PreTrainedTokenizerFast', bos_token=EOT, eos_token=EOT, unk_token=EOT, pad_token=EOT,
                padding_side='left', clean_up_tokenization_spaces=False, model_max_length=max_length,
                model_input_names=['input_ids', 'attention_mask'],      # GPT-2 would add token types to its embeddings
                chat_template=''.join(values) + CHAT)


# ----------------------------------------------------------------------------------------------------
# the command

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if '-h' in argv or '--help' in argv:
        print(__doc__.strip())
        return
    paths = [arg for arg in argv if not arg.startswith('-')]
    flags = [arg for arg in argv if arg.startswith('-')]
    need(len(paths) == 2 and '' not in paths and all(flag.startswith('--data=') for flag in flags),
         'usage: python -m nanodpo.export WEIGHTS DIRECTORY [--data=data/NAME]')
    source, folder = paths
    model = load_model(source, dropout=0.0)
    name = model.record.get('config', {}).get('name')
    need(name or flags, f'{source} does not say what data it is for: add --data=data/NAME, whose tokenizer is exported '
         'too, or --data= for the weights alone')
    data_dir = flags[-1].removeprefix('--data=') if flags else f'data/{name}'
    if data_dir:
        split = list(read_meta(data_dir)['splits'])[-1]
        Groups(data_dir, split).check_model(model.config, model.record.get('vocabulary'), source)
    try:
        save_pretrained(model, folder, data_dir)
    except ImportError as error:
        raise UserError(f'to export, pip install {error.name}') from None
    except OSError as error:
        raise UserError(f'cannot write {folder}: {error.strerror or error}') from None
    print(f'{folder}: {model.num_params():,} parameters of {source}, tokenizer of {data_dir or "none"}')


if __name__ == '__main__':
    config.run(main)
