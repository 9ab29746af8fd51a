"""Models' own tokenizers and chat templates: the same ids as transformers, the same text in training and sampling."""
import json
import os
import shutil
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import prepare_prefs
import sample
from config import UserError
from nanodpo import export
from nanodpo.data import Groups, read_meta
from nanodpo.text import copy_tokenizer, load_tokenizer, prompt_ids, render, text_ids, text_of, token_pieces

TEXTS = ['', ' ', 'Hello world', '  two  spaces   and\t tabs\n\n\nlines \n', "don't we'll I'M", 'naïve café',
         '日本語テキスト 한국어 🙂👍🏽 🇫🇷', '1234567 3.14159', 'def f(x):\n    return x**2  # code\n', 'a' * 50,
         'x <|im_end|> y <|endoftext|> z', '\u200b\ufeff zero', 'ﬁ ligature ① ½', ' leading', 'trailing ', '\r\n', 'e\u0301']

CHATML = '''\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}'''

HEADERS = '''\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|/head|>\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n' }}{%- endif %}'''

CONVERSATIONS = [
    [dict(role='user', content='Hi there')],
    [dict(role='system', content='Be brief.'), dict(role='user', content=' Hi ')],
    [dict(role='user', content='Hi'), dict(role='assistant', content='Hello.'), dict(role='user', content='Why?')]]


def make(folder, special, settings, template='', start=None, normalizer=None):
    """Byte-level BPE, trained here, in the layout of the hub."""
    os.makedirs(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([open(__file__, encoding='utf-8').read()], trainer)
    if start:
        begin = (start, tokenizer.token_to_id(start))
        tokenizer.post_processor = processors.TemplateProcessing(f'{start} $A', special_tokens=[begin])
    tokenizer.save(f'{folder}/tokenizer.json')
    with open(f'{folder}/tokenizer_config.json', 'w') as f:
        json.dump(dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False) | settings, f)
    if template:
        with open(f'{folder}/chat_template.jinja', 'w') as f:
            f.write(template)
    return str(folder)


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
    """{kind: (folder, the name of the token that ends a response)}"""
    folder = tmp_path_factory.mktemp('tokenizers')
    made = {
        'base': (make(folder / 'base', ['<|endoftext|>'], {}, normalizer=normalizers.NFC()), '<|endoftext|>'),
        'chatml': (make(folder / 'chatml', ['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
                        dict(eos_token='<|endoftext|>'), CHATML), '<|im_end|>'),
        'headers': (make(folder / 'headers', ['<|begin|>', '<|end|>', '<|head|>', '<|/head|>', '<|eot|>'],
                         dict(bos_token='<|begin|>', eos_token=dict(__type='AddedToken', content='<|end|>'), chat_template=HEADERS),
                         start='<|begin|>'), '<|eot|>')}
    pythia = os.path.join(os.path.dirname(__file__), '..', '..', 'shared', 'data', 'tokenizers', 'neox')
    if os.path.isdir(pythia):
        made['pythia'] = pythia, '<|endoftext|>'
    return made


def load(source, folder):
    copy_tokenizer(source, str(folder))
    return load_tokenizer(str(folder), 'tokenizer.json'), AutoTokenizer.from_pretrained(source)


@pytest.mark.parametrize('kind', ['base', 'chatml', 'headers', 'pythia'])
def test_ids_equal_those_of_transformers(tokenizers, kind, tmp_path):
    if kind not in tokenizers:
        pytest.skip('the tokenizer of Pythia is not here')
    source, end = tokenizers[kind]
    ours, theirs = load(source, tmp_path)
    assert ours.eot_token == theirs.convert_tokens_to_ids(end) and ours.n_vocab == len(theirs)
    for text in TEXTS:
        ids = text_ids(ours, text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert prompt_ids(ours, text, '{prompt}') == (theirs.encode(text) or [ours.eot_token])
        pieces = token_pieces(ours, ids, ids)
        assert ''.join(piece or '' for piece, _ in pieces) == text_of(ours, ids)
        assert sum([values for _, values in pieces], []) == ids
        if end not in text:
            composed = kind in ('base', 'pythia')       # they normalize to NFC
            assert text_of(ours, ids) == (unicodedata.normalize('NFC', text) if composed else text)


@pytest.mark.parametrize('kind', ['chatml', 'headers'])
def test_a_conversation_in_the_chat_template_equals_transformers(tokenizers, kind, tmp_path):
    ours, theirs = load(tokenizers[kind][0], tmp_path)
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert render(messages, ours.template) == expected
        assert prompt_ids(ours, expected, ours.template) == theirs.encode(expected, add_special_tokens=False)
        answered = [*messages, dict(role='assistant', content='Because.')]
        whole = theirs.encode(theirs.apply_chat_template(answered, tokenize=False), add_special_tokens=False)
        trained = prompt_ids(ours, expected, ours.template) + text_ids(ours, 'Because.') + [ours.eot_token]
        assert whole[:len(trained)] == trained, 'training sees what the template makes of the answered conversation'
    assert render('Hi there', ours.template) == render(CONVERSATIONS[0], ours.template)


def test_a_template_gets_no_date_and_no_python(tokenizers):
    assert render('', "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}") == '2024'
    for template, error in [('{% for', 'TemplateSyntaxError'), ("{{ raise_exception('no system turn') }}", 'no system'),
                            ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
                            ("{{ messages.append(1) }}", 'SecurityError')]:
        with pytest.raises(UserError, match=error):
            render('a', template)


PAIRS = [dict(prompt=[dict(role='user', content=f'Why {i}?')], chosen=[dict(role='assistant', content='So.')],
              rejected=[dict(role='assistant', content='Never.')]) for i in range(8)]
DIALOGUES = [dict(chosen=f'\n\nHuman: Hi {i}\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: So.',
                  rejected=f'\n\nHuman: Hi {i}\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: Never.') for i in range(8)]


def prepare(rows, tokenizer, *flags):
    with open('pairs.jsonl', 'w') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)
    prepare_prefs.main(['--name=chat', '--source=pairs.jsonl', f'--tokenizer={tokenizer}', '--val_fraction=0.2', *flags])
    return read_meta('data/chat')


def test_preferences_are_put_into_the_models_template(tokenizers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, _ = tokenizers['chatml']
    theirs = AutoTokenizer.from_pretrained(source)
    for rows, conversation in [
            (PAIRS, PAIRS[0]['prompt']),
            ([dict(prompt=f'Why {i}?', chosen='So.', rejected='Never.') for i in range(8)], PAIRS[0]['prompt']),
            (DIALOGUES, [dict(role='user', content='Hi 0'), dict(role='assistant', content='Yes?'),
                         dict(role='user', content='Why?')])]:
        meta = prepare(rows, source)
        expected = [theirs.encode(theirs.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)),
                    *(theirs.encode(f'{answer}<|im_end|>') for answer in ('So.', 'Never.'))]
        groups = [[piece.tolist() for piece in groups[i]] for groups in (Groups('data/chat', 'train'),
                                                                         Groups('data/chat', 'val'))
                  for i in range(len(groups))]
        assert expected in groups and len(groups) == 8
    for file in os.listdir(source):
        assert open(f'data/chat/{file}', 'rb').read() == open(f'{source}/{file}', 'rb').read(), 'kept byte for byte'
    cfg = sample.config.load(sample.Config, 'sample', ['--name=chat', '--prompt=Why 0?'])
    tokenizer = load_tokenizer('data/chat', meta['tokenizer'])
    prompts = sample.choose_prompts(cfg, Groups('data/chat', 'val'), tokenizer)
    assert prompts == [theirs.encode(render(PAIRS[0]['prompt'], CHATML))], 'sample.py reads it the same way'

    assert prepare(PAIRS, source, '--template=Q: {prompt} A:')['template'] == 'Q: {prompt} A:', 'a template overrides'
    assert prepare(PAIRS, 'bytes')['template'].count('Human'), 'the next set keeps nothing of the one before'
    assert not {'chat_template.jinja', 'tokenizer_config.json'} & set(os.listdir('data/chat'))


@pytest.mark.parametrize('kind', ['chatml', 'headers'])
def test_an_export_brings_the_tokenizer_back_with_the_users_template(tokenizers, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, end = tokenizers[kind]
    meta = prepare(PAIRS, source)
    files = export.tokenizer_files('data/chat', meta, 64)
    assert files == {file: open(f'{source}/{file}', 'rb').read() for file in os.listdir(source)}, 'byte for byte'

    meta = prepare(PAIRS, source, '--template=Q: {prompt} A:')
    files = export.tokenizer_files('data/chat', meta, 64)
    os.mkdir('exported')
    for file, content in files.items():
        with open(f'exported/{file}', 'wb') as f:
            f.write(content if isinstance(content, bytes) else json.dumps(content).encode())
    theirs = AutoTokenizer.from_pretrained('exported')
    prompt, chosen, _ = Groups('data/chat', 'train')[0]
    messages = [dict(role='user', content=theirs.decode(prompt).partition('Q: ')[2].removesuffix(' A:'))]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs.encode(text, add_special_tokens=False) == prompt.tolist()
    text = theirs.apply_chat_template([*messages, dict(role='assistant', content='So.')], tokenize=False)
    assert text.endswith('A: So.' + end) and theirs.decode(chosen) == ' So.' + end


def test_mistakes_end_in_one_line(tokenizers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tokenizers['chatml'][0], 'mine')
    with pytest.raises(UserError, match='tokenizer.json'):
        os.mkdir('empty')
        prepare(PAIRS, 'empty')
    for text, error in [('{% if %}', 'TemplateSyntaxError'), ('{{ open("x") }}', "'open' is undefined")]:
        with open('mine/chat_template.jinja', 'w') as f:
            f.write(text)
        with pytest.raises(UserError, match=f"tokenizer 'mine' .*{error}"):
            prepare(PAIRS, 'mine')
    os.remove('mine/chat_template.jinja')
    for settings, error in [('{', 'JSONDecodeError'), ('{"eos_token": "<|no|>"}', r"end token '<\|no\|>'")]:
        with open('mine/tokenizer_config.json', 'w') as f:
            f.write(settings)
        with pytest.raises(UserError, match=error):
            prepare(PAIRS, 'mine')
    assert not os.path.exists('data/chat')

    prepare(PAIRS, tokenizers['chatml'][0])
    with open('data/chat/chat_template.jinja', 'a') as f:
        f.write(' ')
    with pytest.raises(UserError, match='chat_template.jinja is missing or damaged'):
        read_meta('data/chat')


def test_a_changed_template_makes_the_set_anew(tokenizers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tokenizers['chatml'][0], 'mine')
    prepare(PAIRS, 'mine')
    before = read_meta('data/chat')
    with open('mine/chat_template.jinja', 'w') as f:
        f.write('{% for m in messages %}Q: {{ m.content }}{% endfor %}')
    prepare(PAIRS, 'mine')
    assert read_meta('data/chat')['splits']['train']['bin_sha256'] != before['splits']['train']['bin_sha256']
    prepare(PAIRS, 'mine')
    assert 'data/chat is reused' in capsys.readouterr().out


def prompts_of(folder):
    """The texts of all prompts of a set."""
    tokenizer = load_tokenizer(folder, 'tokenizer.json')
    return {text_of(tokenizer, group[0]) for split in ('train', 'val') for group in Groups(folder, split)}


@pytest.mark.parametrize('before, system', [('', 'Be kind.'), ('Speak like a pirate.\n\n', 'Speak like a pirate.')])
def test_a_dialogue_goes_into_a_chat_template_whole(tokenizers, before, system, tmp_path, monkeypatch):
    """The text may be stripped, so that no line break stands before its first turn."""
    monkeypatch.chdir(tmp_path)
    prepare([{side: f'{before}Human: q{i}\n\nAssistant: a\n\nHuman: r\n\nAssistant: {side}'
              for side in ('chosen', 'rejected')} for i in range(4)], tokenizers['chatml'][0])
    turns = 'user\nq{}<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n'
    assert prompts_of('data/chat') == {
        f'<|im_start|>system\n{system}<|im_end|>\n<|im_start|>{turns.format(i)}<|im_start|>assistant\n' for i in range(4)}


def test_a_long_prompt_keeps_the_frame_of_its_template(tokenizers, tmp_path, monkeypatch):
    """As a text it is cut as a conversation of one turn is."""
    monkeypatch.chdir(tmp_path)
    frame = '<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n'
    found = []
    for wrap in (str, lambda text: [dict(role='user', content=text)]):
        rows = [dict(prompt=wrap('why ' * 300 + str(i)), chosen='yes', rejected='no') for i in range(4)]
        prepare(rows, tokenizers['chatml'][0], '--max_length=80')
        found.append(prompts_of('data/chat'))
    assert found[0] == found[1] and all(text.startswith(frame) and text.count('why') > 5 for text in found[0])
    prepare([row | dict(prompt=row['prompt'][0]['content']) for row in rows], 'bytes', '--max_length=80',
            '--template=Q: {prompt} A:')
    assert all(text.startswith('Q:') and text.endswith(' A:') for text in prompts_of('data/chat'))


def test_documents_alone_keep_the_chat_template(tokenizers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'notes.txt').write_text('one\n<|endoftext|>\ntwo\n')
    prepare_prefs.main(['--name=made', '--documents=notes.txt', f"--tokenizer={tokenizers['chatml'][0]}"])
    assert read_meta('data/made')['template'] == load_tokenizer('data/made', 'tokenizer.json').template


def test_a_template_begins_with_its_line_break_and_may_ask_for_tools_as_in_transformers(tmp_path):
    template = "\n{% if tools is not none or documents is not none %}no{% endif %}user: {{ messages[0]['content'] }}"
    (tmp_path / 'kept').mkdir()
    ours, theirs = load(make(tmp_path / 'own', ['<|end|>'], dict(eos_token='<|end|>'), template), tmp_path / 'kept')
    talk = [dict(role='user', content='hi')]
    assert render(talk, ours.template) == theirs.apply_chat_template(talk, tokenize=False) == '\nuser: hi'
