"""Weights and tokenizers that transformers wrote or reads: the same shapes, ids, logits, losses and greedy text."""
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import dpo
import prepare_prefs
import sample
import sft
from config import UserError
from conftest import small_gpt, write_rows
from model import GPT, GPTConfig
from nanodpo import checkpoint, export, hf
from nanodpo.checkpoint import fingerprint, load_model
from nanodpo.data import Groups, pack
from nanodpo.bpe import PATTERN, train_bpe
from nanodpo.text import EOT, load_tokenizer, prompt_ids, render

transformers = pytest.importorskip('transformers')

HARD = ['', ' ', '\n', '\r', 'a\r\n  ', 'a \n', 'x\n\n  y', '  \n\n \t  \r\n\r\n ', '\u00a0\u2003\u3000 x', '\ufeffBOM',
        'aaaa' * 9, ' ' * 40, 'e\u0301\u200d👩‍👩‍👧‍👦🏽 🚀🚀', 'مرحبا بالعالم \u202e\u200f\u061c', 'שלום', '日本語テキスト、漢字。',
        '한국어', '\x00\x01\x1b[31m\x7f\x85', 'a<|endoftext|>b <|end', 'x <|fim_prefix|> y', "I'LL don't 's'T 'ſ 'Re",
        '1234567 12½ Ⅷ ٣٤٥', 'ﬀ ﬆ ŉ ß İ ı', '\ud7ff\ue000\uffff\U0010ffff']
HH = '\n\nHuman: {prompt}\n\nAssistant:'
TALK = 'Few fables of recent years are as superb as this one. The leads are deftly chosen, and will amuse the crowd! '


def fuzz(n):
    """n strings of all scripts, control characters, digits and white space, the same every time."""
    rng = random.Random(0)
    ranges = [(32, 127), (0, 32), (0x80, 0x3000), (0x3000, 0xd800), (0xe000, 0x110000)]
    anything = [chr(rng.randrange(*limits)) for limits in ranges for _ in range(500)]
    pools = [anything, ' \n\t\r\u00a0\u2003 ', "abcdefgst'AERLS' ", '0123456789½²٣ ', HARD, TALK.split(' ')]
    for _ in range(n):
        mostly = rng.choice(pools)
        yield ''.join(rng.choice(rng.choice([mostly] * 8 + pools)) for _ in range(rng.randrange(1, 30)))


def learned(pattern, special):
    """A tiktoken.Encoding with 500 tokens learned from HARD and TALK. special: {name: steps beyond the last rank}"""
    words = {word.encode(): 2 for word in ' '.join([TALK, *HARD[12:]]).split(' ')}
    words |= {b' ' + word: 3 for word in words} | {b' ' * 20: 9, b'123': 3, b'\n\n': 4}
    tokens = train_bpe(words, 500)
    return tiktoken.Encoding('learned', pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)},
                             special_tokens={name: len(tokens) + steps for name, steps in special.items()})


def past_the_end_token():
    """The layout of p50k_base: mergeable tokens on both sides of the end token."""
    encoding = learned(PATTERN, {EOT: 0})
    ranks = {token: rank + (rank >= 400) for token, rank in encoding._mergeable_ranks.items()}
    return tiktoken.Encoding('split', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 400})


CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
          r"\s+(?!\S)|\s")
BYTES = {bytes([b]): b for b in range(256)}
ENCODINGS = {
    'learned': lambda: learned(PATTERN, {EOT: 0}),
    'as p50k_base': past_the_end_token,
    'as cl100k_base, with gaps': lambda: learned(CL100K, {EOT: 1, '<|fim_prefix|>': 2, '<|endofprompt|>': 20}),
    'bytes': lambda: tiktoken.Encoding('bytes', pat_str=PATTERN, mergeable_ranks=BYTES, special_tokens={EOT: 256}),
}


def loaded_tokenizer(folder, encoding, template='{prompt}'):
    """What transformers makes of an exported tokenizer."""
    contents = {'tokenizer.json': export.tokenizer_json(encoding),
                'tokenizer_config.json': export.tokenizer_config(template, 1024),
                'config.json': dict(model_type='gpt2', vocab_size=encoding.n_vocab, bos_token_id=0, eos_token_id=0)}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize('name', ['gpt2', *ENCODINGS])
def test_an_exported_tokenizer_gives_the_ids_of_ours(name, tmp_path, request):
    encoding = ENCODINGS[name]() if name in ENCODINGS else request.getfixturevalue(name)
    theirs = loaded_tokenizer(tmp_path, encoding)
    for text in [*HARD, TALK, *fuzz(500)]:
        ids = encoding.encode_ordinary(text)
        assert theirs.encode(text, split_special_tokens=True) == ids, repr(text)
        assert theirs.decode(ids) == text
    assert theirs.encode('a' + EOT)[-1] == encoding.eot_token, 'by default transformers makes it the end token'
    assert len(theirs) == encoding.n_vocab and theirs.eos_token_id == theirs.pad_token_id == encoding.eot_token
    assert sorted(theirs.get_vocab().values()) == list(range(encoding.n_vocab)), 'every id has a name'


def turns(*texts):
    roles = 'system', 'user', 'assistant', 'user', 'assistant'
    return [dict(role=role, content=text) for role, text in zip(roles, texts) if text is not None]


@pytest.mark.parametrize('template, messages, expected', [
    ('{prompt}', turns(None, ' hi'), ' hi'),
    ('{prompt}', turns('Be kind.', 'a', 'b', 'c'), 'Be kind.\na b\nc'),
    (HH, turns(None, 'a "b" \\n {{c}} 🚀', 'ok', '\u202eمرحبا'),
     '\n\nHuman: a "b" \\n {{c}} 🚀\n\nAssistant: ok\n\nHuman: \u202eمرحبا\n\nAssistant:'),
    (HH, turns('S', 'a', ' b'), f'S\n\nHuman: a\n\nAssistant: b{EOT}'),
    (EOT + 'Q "{prompt}" {% if %} A:\n', turns(None, 'a', 'b', 'c', 'd'),
     f'{EOT}Q "a" {{% if %}} A:\nb\nQ "c" {{% if %}} A:\nd{EOT}')])
def test_a_chat_template_writes_turns_as_training_has_them_and_a_prompt_with_its_ids(
        tmp_path, template, messages, expected):
    encoding = ENCODINGS['learned']()
    theirs = loaded_tokenizer(tmp_path, encoding, template)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    for text in ('hello', '😀 one\ntwo ', "it's 42"):
        ids = theirs.apply_chat_template(turns(None, text), add_generation_prompt=True, return_dict=False)
        assert ids == prompt_ids(encoding, render(text, template), template)


# --- weights in -----------------------------------------------------------------------------------

@pytest.mark.parametrize('n_layer, n_head, n_embd', [(12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)])
def test_each_size_of_gpt2_has_transformers_tensors(n_layer, n_head, n_embd):
    with torch.device('meta'):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        ours = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    expected = {name: p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in hf.tensors_of(ours)} == expected
    assert ours.num_params() == theirs.num_parameters()


def assert_equal_up_to_rounding(ours, theirs, ids):
    """The same logits up to float32's rounding, half of 2**-23 of the largest each, of some hundred sums on the way."""
    B, T = ids.shape
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        a = ours.eval()(ids, torch.arange(T).expand(B, -1), mask) @ ours.wte.weight.t()
        b = theirs.eval()(ids).logits
    assert a.std() > 0.3, 'logits that tell tokens apart'
    torch.testing.assert_close(a, b, atol=2**-24 * 300 * a.abs().max().item(), rtol=0)


@pytest.mark.parametrize('max_shard_size, dtype', [('1GB', torch.float32), ('100KB', torch.bfloat16)])
def test_a_gpt2_of_transformers_has_its_logits_and_greedy_text_there_and_back(tmp_path, max_shard_size, dtype):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=211, n_positions=48, n_embd=48, n_layer=3, n_head=4, bos_token_id=210,
                                     eos_token_id=210, initializer_range=0.1)
    theirs = transformers.GPT2LMHeadModel(config).eval().to(dtype)
    theirs.save_pretrained(tmp_path / 'a', max_shard_size=max_shard_size)
    assert (tmp_path / 'a/model.safetensors.index.json').exists() == (max_shard_size == '100KB')
    theirs.float()
    ours = hf.from_pretrained(str(tmp_path / 'a'))
    assert ours.config.block_size == 48 and ours.config.n_layer == 3
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and all(p.requires_grad for p in ours.parameters())
    export.save_pretrained(ours, str(tmp_path / 'b'))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b')
    assert again.config.eos_token_id == 210, 'without a tokenizer the last id'
    assert fingerprint(hf.from_pretrained(str(tmp_path / 'b'))) == fingerprint(ours), 'to the bit'
    for model in (theirs, again):
        assert_equal_up_to_rounding(ours, model, torch.randint(0, 211, (3, 48)))
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8, 9, 10]]
    for prompt, response in zip(prompts, ours.generate(prompts, 30, end_token=210, temperature=0)):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=210)
        assert response == expected[0, len(prompt):].tolist()


@pytest.fixture
def hub_layout(tmp_path):
    """A small GPT-2 in the layout of the hub's own: float16, no prefix, causal masks as buffers."""
    from safetensors.torch import save_file
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=24, n_embd=16, n_layer=2, n_head=2,
                                     initializer_range=0.3, bos_token_id=96, eos_token_id=96)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    state = {k.removeprefix('transformer.'): v.half().contiguous() for k, v in theirs.state_dict().items()}
    del state['lm_head.weight']
    state |= {f'h.{i}.attn.bias': torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    save_file(state | {'h.0.attn.masked_bias': torch.tensor(-1e4)}, tmp_path / 'model.safetensors')
    return tmp_path


def test_a_float16_hub_layout_with_buffers_is_read(hub_layout):
    ours = hf.from_pretrained(str(hub_layout))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hub_layout, dtype=torch.float32)
    assert_equal_up_to_rounding(ours, theirs, torch.randint(0, 97, (2, 24)))
    expected, config = fingerprint(ours), hub_layout / 'config.json'
    good = json.loads(config.read_text())
    config.write_text(json.dumps(good | dict(activation_function='gelu_pytorch_tanh', n_inner=4 * good['n_embd'])))
    assert fingerprint(hf.from_pretrained(str(hub_layout))) == expected, 'the same in other words'
    os.truncate(hub_layout / 'model.safetensors', 0)
    assert fingerprint(ours) == expected, 'no memory is shared with the file'


@pytest.mark.parametrize('name', ['gpt2', 'openai-community/gpt2-medium'])
def test_a_hub_name_is_read_from_the_cache_without_a_network(hub_layout, tmp_path_factory, monkeypatch, name):
    import huggingface_hub.constants
    cache = tmp_path_factory.mktemp('cache')
    repo = cache / ('models--' + name.replace('/', '--'))
    shutil.copytree(hub_layout, repo / 'snapshots' / 'abc')
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('abc')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(cache))
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    expected = fingerprint(hf.from_pretrained(str(hub_layout)))
    for offline in (True, False):           # HF_HUB_OFFLINE, which is read once
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', offline)
        assert fingerprint(hf.from_pretrained(name)) == expected


def refused(folder, match):
    with pytest.raises(UserError, match=match) as error:
        load_model(str(folder))
    assert '\n' not in error.value.code and len(error.value.code) < 600


def test_a_wrong_config_ends_with_one_line(hub_layout):
    config = hub_layout / 'config.json'
    good = json.loads(config.read_text())
    for key, value, match in [
            ('n_layer', 3, 'holds no .*h.2.ln_1.*config.json'), ('n_layer', 1, 'holds .*h.1.*has no place'),
            ('n_embd', 32, 'wte.weight makes'), ('n_positions', 25, 'wpe.weight makes'), ('model_type', 'llama', 'hidden'),
            ('vocab_size', 98, 'wte.weight makes'), ('n_head', 3, 'not a multiple'), ('n_inner', 7, 'c_fc.* makes'),
            ('n_head', 0, 'is no'), ('n_embd', '32', 'is no'), ('n_layer', -1, 'no place'), ('vocab_size', 2.5, 'is no')]:
        config.write_text(json.dumps(good | {key: value}))
        refused(hub_layout, match)
    for text, match in [(b'[]', 'TypeError'), (b'{"n_l', 'JSONDecodeError'), (b'\x80', 'UnicodeDecodeError')]:
        config.write_bytes(text)
        refused(hub_layout, f'{hub_layout} is no checkpoint, and no .* weights that can be read: {match}')


def test_damaged_weights_and_a_missing_file_or_package_end_with_one_line(hub_layout, monkeypatch):
    weights, good = hub_layout / 'model.safetensors', fingerprint(load_model(str(hub_layout)))
    whole = weights.read_bytes()
    for size in (0, 8, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused(hub_layout, 'SafetensorError')
    header = 8 + int.from_bytes(whole[:8], 'little')
    outcomes = set()
    for bit in random.Random(0).choices(range(8 * header), k=150):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        weights.write_bytes(data)
        try:
            outcomes.add(fingerprint(load_model(str(hub_layout))))
        except UserError:
            outcomes.add('refused')
    assert outcomes == {'refused', good}, 'a bit of the header flipped: refused, or of no consequence'
    weights.write_bytes(whole)
    for package, weights_of in (('safetensors.torch', hub_layout), ('huggingface_hub', 'gpt2')):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            refused(weights_of, f'ModuleNotFoundError: .*{package}')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hub_layout, dtype=torch.float32)
    weights.rename(hub_layout / 'pytorch_model.bin')
    refused(hub_layout, "holds no 'model.safetensors'")
    theirs.save_pretrained(hub_layout, max_shard_size='10KB')
    sorted(hub_layout.glob('model-*.safetensors'))[1].unlink()
    refused(hub_layout, "holds no 'model-00002-of-")
    (hub_layout / 'config.json').unlink()
    refused(hub_layout, 'FileNotFoundError.*config.json')


# --- weights out ----------------------------------------------------------------------------------

@pytest.fixture
def own(tmp_path, monkeypatch):
    """In a fresh directory: data/own with a tokenizer learned from its text, random models in out/own/sft and dpo."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    words = TALK.split() + ['🚀', 'né', '\n', 'naïve']
    texts = [[' '.join(rng.choices(words, k=rng.randrange(2, 9))) for _ in range(3)] for _ in range(40)]
    rows = [dict(prompt=f'{i} {text[0]}', chosen=text[1], rejected=text[2]) for i, text in enumerate(texts)]
    write_rows('pairs.jsonl', rows)
    prepare_prefs.main(['--name=own', '--source=pairs.jsonl', '--tokenizer=bpe:300', '--template=Q: {prompt}\nA:',
                        '--max_length=64', '--max_prompt_length=32'])
    for stage, seed in (('sft', 1), ('dpo', 2)):
        save_own(stage, 1, small_gpt(seed, 64, Groups('data/own', 'val').meta['vocab_size'], spread=0.7))


def save_own(stage, step, model):
    os.makedirs(f'out/own/{stage}', exist_ok=True)
    vocabulary = Groups('data/own', 'val').vocabulary
    checkpoint.save(f'out/own/{stage}', step, model,
                    dict(stage=stage, config=dict(name='own', beta=0.1), vocabulary=vocabulary, origin={}))


def snapshot(folder='.'):
    return {str(path): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


@pytest.fixture
def loaded(caplog):
    """loaded(folder): what transformers makes of an export, with any warning an error. -> model, tokenizer"""
    def load(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert not [record for record in caplog.records if record.levelname != 'INFO']
        return model, tokenizer

    transformers.logging.enable_propagation()
    yield load
    transformers.logging.disable_propagation()


@pytest.mark.parametrize('padding', [0, 20])
def test_transformers_greedy_text_is_ours_token_for_token(own, loaded, capsys, padding):
    """Prompts padded on the left there; with `padding`, a vocabulary with large logits at ids that no token has."""
    meta = Groups('data/own', 'val').meta
    size, end = meta['vocab_size'], meta['eot_token']
    if padding:
        wide = small_gpt(3, 64, size + padding, spread=0.7)
        with torch.no_grad():
            wide.wte.weight[size:] *= 9
        save_own('dpo', 2, wide)
    ours = load_model('out/own/dpo')
    export.main(['out/own/dpo', 'hf'])
    assert ('is cut to' in capsys.readouterr().out) == bool(padding)
    theirs, tokenizer = loaded('hf')
    assert theirs.config.vocab_size == len(tokenizer) == size
    texts = ['one', 'which of these years is superb?', '🚀 né', 'a\n\nb', 'The leads amuse', 'x' * 20]
    encoding = load_tokenizer('data/own', 'tokenizer.json')
    prompts = [prompt_ids(encoding, render(text, meta['template']), meta['template']) for text in texts]
    expected = ours.generate(prompts, 30, end, size, temperature=0)
    assert len({tuple(ids) for ids in expected}) == len(texts) and min(len(set(ids)) for ids in expected) > 1

    chats = [[dict(role='user', content=text)] for text in texts]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors='pt',
                                           return_dict=True)
    assert not inputs['attention_mask'].all() and inputs['attention_mask'][:, -1].all()
    made = theirs.generate(**inputs, max_new_tokens=30, do_sample=False)[:, inputs['input_ids'].shape[1]:].tolist()
    made = [ids[:ids.index(end) + 1] if end in ids else ids for ids in made]
    assert made == expected

    if not padding:
        Path('p.jsonl').write_text('\n'.join(json.dumps(dict(prompt=text)) for text in texts))
        capsys.readouterr()
        sample.main(['--name=own', '--prompts_file=p.jsonl', '--temperature=0', '--max_new_tokens=30', '--json'])
        after = [json.loads(line)['after']['text'] for line in capsys.readouterr().out.splitlines()[:-1]]
        assert after == tokenizer.batch_decode(made, skip_special_tokens=True)


def test_transformers_loss_of_an_export_is_ours(own, loaded):
    groups = Groups('data/own', 'val')
    export.main(['out/own/sft', 'hf'])
    ours, (theirs, _) = load_model('out/own/sft').eval(), loaded('hf')
    with torch.no_grad():
        logps = dpo.response_logps(ours, pack(groups, list(range(len(groups)))))
        for i, row in enumerate(logps):
            prompt, *responses = groups[i]
            for response, logp in zip(responses, row):
                ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
                labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
                loss = theirs(ids, labels=labels).loss * len(response)
                assert abs(loss + logp) < 1e-5 * abs(logp) + 1e-4


def test_an_export_comes_back_to_the_bit_and_a_stage_starts_from_it(own, capsys):
    export.main(['--help'])
    assert export.__doc__.strip() in capsys.readouterr().out
    os.makedirs('b')            # empty
    export.main(['out/own/sft/step-000001.pt', 'a'])
    export.main(['a', 'b', '--data=data/own'])
    export.main(['b', 'new/c', '--data='])
    expected = fingerprint(load_model('out/own/sft'))
    assert all(fingerprint(hf.from_pretrained(folder)) == expected for folder in ('a', 'b', 'new/c'))
    card = Path('a/README.md')
    assert card.read_text().startswith('---\nlibrary_name: transformers') and '| data | pairs.jsonl |' in card.read_text()
    card.unlink()
    assert snapshot('b') == {path.replace('a/', 'b/'): content for path, content in snapshot('a').items()}
    assert names('new/c') == {'config.json', 'generation_config.json', 'model.safetensors'}
    assert names('a') == names('new/c') | {'tokenizer.json', 'tokenizer_config.json'}
    seen = {expected}
    for stage in (dpo, sft):
        folder = f'out/own/{stage.__name__}'
        stage.main(['--name=own', '--max_steps=1', '--batch_size=4', '--warmup_steps=0', '--device=cpu',
                    '--compile=False', '--eval_interval=0', '--init_from=a'])
        export.main([folder, stage.__name__])
        trained = fingerprint(load_model(folder))
        assert fingerprint(hf.from_pretrained(stage.__name__)) == trained and trained not in seen
        seen.add(trained)


def test_a_mistake_in_the_command_is_one_line_and_writes_nothing(own):
    os.mkdir('out/own/nameless')
    checkpoint.save('out/own/nameless', 1, small_gpt(), dict(config={}, vocabulary='another'))
    export.main(['out/own/dpo', 'hf'])
    Path('file').write_text('x')
    before = snapshot()
    for argv, match in [
            ([], 'usage'), (['out/own/dpo'], 'usage'), (['out/own/dpo', 'x', '--dat=y'], 'usage'),
            (['out/own/dpo', ''], 'cannot write : .*No such file'), (['out/own/dpo', 'file'], 'file: .*File exists'),
            (['nowhere', 'x'], 'nowhere is no checkpoint, and no directory or hub name'),
            (['hf', 'x'], 'does not say what data.*--data='), (['out/own/nameless', 'x'], 'does not say what data'),
            (['out/own/dpo', 'x', '--data=data/no'], 'data/no/meta.json does not exist'),
            (['out/own/nameless', 'x', '--data=data/own'], 'another tokenizer'),
            (['out/own/dpo', 'hf'], 'hf is not empty: export into a new or an empty directory')]:
        with pytest.raises(UserError, match=match) as error:
            export.main(argv)
        assert '\n' not in error.value.code and snapshot() == before, argv


def test_what_stops_an_export_is_one_line_and_leaves_nothing_that_loads(own, monkeypatch):
    def full(*args, **options):
        raise OSError(28, 'No space left on device')

    def fails(match):
        with pytest.raises(UserError, match=f'cannot write half: .*{match}') as error:
            export.main(['out/own/dpo', 'half'])
        assert '\n' not in error.value.code

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'safetensors.torch', None)
        fails('safetensors')
    assert not os.path.exists('half')
    monkeypatch.setattr(Path, 'write_text', full)       # the disk has room for the weights alone
    fails('No space left')
    refused('half', 'config.json')
