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
from nanodpo import hf
from nanodpo.checkpoint import check_weights, load_model
from nanodpo.data import Groups, read_meta
from nanodpo.folder import held
from nanodpo.text import EOT, MODEL_FILES, ModelTokenizer, load_tokenizer


SHARD = 5 * 2**30       # bytes of a file of weights at most, as transformers has it


def save_pretrained(model, folder, data_dir='', card=''):
    """Write a GPT for transformers, the tokenizer of data_dir (data/<name>), if given, and the model card.

    A base's config.json goes out again. A model from scratch may have a padded vocabulary, which is cut to the
    tokenizer's. Without a tokenizer its last id ends a text.
    """
    from safetensors.torch import save
    c = model.config
    meta = read_meta(data_dir) if data_dir else dict(vocab_size=c.vocab_size, eot_token=c.vocab_size - 1)
    size = c.vocab_size if c.hf else meta['vocab_size']
    if size < c.vocab_size:
        print(f"the vocabulary of {c.vocab_size:,} is cut to the tokenizer's {size:,}")
    files = tokenizer_files(data_dir, meta, c.block_size) if data_dir else {}
    ends = dict.fromkeys(['bos_token_id', 'eos_token_id', 'pad_token_id'], meta['eot_token'])
    if c.hf:                                # a base has its own; what ended responses in training counts, too
        base = {key: c.hf[key] for key in ends if c.hf.get(key) is not None}
        known = meta['eot_token'] in hf.end_tokens(base)
        ends = base if known or not data_dir else base | dict(eos_token_id=meta['eot_token'])
    files['generation_config.json'] = ends
    files['config.json'] = hf.config_of(c, vocab_size=size, **ends)     # the last: without it nobody reads the rest

    check_weights(model, f'{folder} is not written')
    os.makedirs(os.path.realpath(folder), exist_ok=True)
    need(not os.listdir(folder), f'{folder} is not empty: export into a new or an empty directory')
    shards = in_shards(hf.tensors_of(model), size)
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f'model-{number:05}-of-{len(shards):05}.safetensors' if len(shards) > 1 else 'model.safetensors'
        tensors = {name: p.detach().float().cpu().contiguous() for name, p in shard.items()}
        Path(folder, file).write_bytes(save(tensors, metadata={'format': 'pt'}))
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(4 * p.numel() for shard in shards for p in shard.values())
        files = {'model.safetensors.index.json': dict(metadata=dict(total_size=total), weight_map=index)} | files
    if card:
        Path(folder, 'README.md').write_text(card, encoding='utf-8')
    for name, content in files.items():
        if not isinstance(content, bytes):
            content = json.dumps(content, ensure_ascii=False, indent=1).encode()
        Path(folder, name).write_bytes(content)


def in_shards(tensors, vocab_size):
    """(name, tensor) pairs as dicts of at most SHARD bytes of float32, the embedding cut to vocab_size."""
    shards, held = [{}], 0
    for name, p in tensors:
        if name == 'transformer.wte.weight':
            p = p[:vocab_size]
        if shards[-1] and held + 4 * p.numel() > SHARD:
            shards.append({})
            held = 0
        shards[-1][name] = p
        held += 4 * p.numel()
    return shards


# --- the model card -------------------------------------------------------------------------------

ON_HUB = r'[A-Za-z0-9][\w.-]*(/[\w.-]+)?'         # a name there
CARD = {'eval/loss': 'held-out loss', 'eval/rewards/accuracies': 'held-out accuracy', 'eval/kl': 'KL to the reference',
        'eval/kl_error': 'its standard error'}


def model_card(model, source, data):
    """README.md of a checkpoint: the hub's metadata block, what made it, and what its log measured last.

    source: the checkpoint, beside which log.jsonl lies. data: meta.json's source, '' if unknown.
    """
    record, base = model.record, (model.config.hf or {}).get('_name_or_path', '')
    knobs, stage = record['config'], record.get('stage', 'sft')
    block = ['library_name: transformers', 'pipeline_tag: text-generation', f'tags: [{stage}, nanodpo]']
    if re.fullmatch(ON_HUB, base) and not os.path.exists(base):
        block.append(f'base_model: {base}')
    if re.fullmatch(ON_HUB, data) and not os.path.exists(data):
        block.append(f'datasets: [{data}]')
    rows = dict(base=base or 'random weights', data=data or knobs['name'], stage=stage, loss=knobs.get('loss'),
                beta=knobs.get('beta'), steps=record['step'], command=record.get('command'))
    path = Path(source if os.path.isdir(source) else os.path.dirname(source), 'log.jsonl')
    with one_line(f'{path} cannot be read'):
        for entry in map(json.loads, path.read_text().splitlines() if path.is_file() else []):
            if entry['step'] <= record['step']:
                rows |= {label: f'{entry[key]:.3f}' for key, label in CARD.items() if key in entry}
    table = [f'| {label} | {value} |' for label, value in rows.items() if value is not None]
    return '\n'.join(['---', *block, '---', '', f'# {knobs["name"]}', '', '| | |', '|---|---|', *table, ''])


# --- tokenizer and turn template ------------------------------------------------------------------

def tokenizer_files(data_dir, meta, max_length):
    """{name: content} of a model's own tokenizer, byte for byte, or of ours; a template of the user's goes along."""
    tokenizer = load_tokenizer(data_dir, meta['tokenizer'])
    if not isinstance(tokenizer, ModelTokenizer):
        settings = tokenizer_config(meta['template'], max_length)
        return {'tokenizer.json': tokenizer_json(tokenizer), 'tokenizer_config.json': settings}
    paths = [Path(data_dir, name) for name in MODEL_FILES]
    files = {path.name: path.read_bytes() for path in paths if path.exists()}
    if meta['template'] != tokenizer.template:
        *begin, end = map(tokenizer.backend.id_to_token, [*tokenizer.start, tokenizer.eot_token])
        settings = json.loads(files.get('tokenizer_config.json', '{}'))
        files['tokenizer_config.json'] = settings | dict(chat_template=chat(meta['template'], ''.join(begin), end))
        files.pop('chat_template.jinja', None)
    return files


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
{{- start + ns.text + (end if messages[-1]['role'] == 'assistant' else '') -}}
'''


def tokenizer_config(template, max_length):
    """The content of tokenizer_config.json."""
    return dict(tokenizer_class='PreTrainedTokenizerFast', padding_side='left', model_max_length=max_length,
                bos_token=EOT, eos_token=EOT, pad_token=EOT, unk_token=EOT, clean_up_tokenization_spaces=False,
                model_input_names=['input_ids', 'attention_mask'],      # GPT-2 would embed token types, too
                chat_template=chat(template, '', EOT))


def chat(template, begin, end):
    """text.render and text.prompt_ids in Jinja. begin: the model's begin token; end: the end token."""
    before, after = template.removeprefix(EOT).split('{prompt}', 1)
    start = end if template.startswith(EOT) else begin
    strings = json.dumps([start, before, after, end], ensure_ascii=False)
    return f'{{%- set start, before, after, end = {strings} -%}}\n{CHAT}'


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
    card = model_card(model, source, read_meta(data_dir).get('source', '') if data_dir else '') if name else ''
    with one_line(f'cannot write {folder}'), held(folder):
        save_pretrained(model, folder, data_dir, card)
    print(f'{folder}: {model.num_params():,} parameters of {source}, tokenizer of {data_dir or "none"}')


if __name__ == '__main__':
    config.run(main)
