"""prepare_prefs.py: what it writes is what an independent encoding of the same texts gives, and a failure writes nothing."""
import base64
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_prefs
from conftest import ROOT, SHARED, run_stage
from prepare_prefs import EOT, Groups, load_tokenizer, read_meta, train_bpe, truncate

HH = SHARED / 'data' / 'hh-rlhf'
TURN = '\n\nAssistant:'
PAIRS = [dict(prompt=f'What is {i} and {i}?', chosen=f' It is {2 * i}.', rejected=f' I do not know {"at all" * (i % 5)}')
         for i in range(100)]
needs_hh = pytest.mark.skipif(not HH.is_dir(), reason='the HH sample is not here')


@pytest.fixture(autouse=True)
def in_a_fresh_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='session')
def gpt2():
    tiktoken = pytest.importorskip('tiktoken')
    if not os.path.isdir(os.environ.get('TIKTOKEN_CACHE_DIR', '')):
        pytest.skip('no cached GPT-2 tokenizer')
    return tiktoken.get_encoding('gpt2')


def write_jsonl(path, rows):
    """A line a row; bytes are a line as it stands."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b''.join(line + b'\n' for line in lines))


def prepare(*flags, name='made', tokenizer='bytes'):
    """Run the stage here. -> (data/<name>, its meta.json, its tokenizer)"""
    prepare_prefs.main([f'--name={name}', f'--tokenizer={tokenizer}', *flags])
    folder = Path('data') / name
    meta = read_meta(folder)
    return folder, meta, load_tokenizer(folder, meta['tokenizer'])


def error_of(*flags, **options):
    """The line with which the stage ends."""
    with pytest.raises(SystemExit) as stop:
        prepare(*flags, **options)
    assert '\n' not in stop.value.code
    return stop.value.code


def texts_of(folder, split, tokenizer):
    """The groups of a split as decoded strings, end tokens and all."""
    return [[tokenizer.decode(list(part)) for part in group] for group in Groups(folder, split)]


def content(folder='data/made'):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# -----------------------------------------------------------------------------
# ids, truncation, the end token

@needs_hh
def test_hh_ids_equal_an_independent_encoding_and_its_dirt_is_counted(gpt2):
    folder, meta, _ = prepare(f'--source={HH}', '--data_dir=harmless-base', '--max_length=100000', tokenizer='gpt2')
    for split, file, dropped in (('train', 'train', {'empty_response': 2, 'prompts_differ': 2}), ('val', 'test', {})):
        expected = []
        for line in gzip.open(HH / 'harmless-base' / f'{file}.jsonl.gz', 'rt', encoding='utf-8'):
            row = json.loads(line)
            at = row['chosen'].rindex(TURN) + len(TURN)
            prompt, chosen = row['chosen'][:at], row['chosen'][at:].rstrip()
            if row['rejected'].startswith(prompt) and TURN not in row['rejected'][at:]:
                rejected = row['rejected'][at:].rstrip()
                if chosen and rejected:
                    expected.append([gpt2.encode_ordinary(prompt), gpt2.encode_ordinary(chosen) + [50256],
                                     gpt2.encode_ordinary(rejected) + [50256]])
        groups, info = Groups(folder, split), meta['splits'][split]
        assert [[list(part) for part in group] for group in groups] == expected
        assert info['read'] == info['kept'] + sum(dropped.values()) == (1387 if split == 'train' else 155)
        assert info['dropped'] == dropped and info['groups'] == info['kept'] == len(expected)
        assert info['truncated'] == {'prompts': 0, 'responses': 0, 'tokens': 0} and info['dtype'] == 'uint16'
        assert info['tokens'] == sum(len(part) for group in expected for part in group) == len(groups.tokens)
    assert (meta['vocab_size'], meta['eot_token'], meta['tokenizer']) == (50257, 50256, 'gpt2')


@needs_hh
def test_hh_truncation_loses_only_what_its_rule_says(gpt2):
    source = (f'--source={HH}', '--data_dir=harmless-base')
    whole = Groups(prepare(*source, '--max_length=100000', name='whole', tokenizer='gpt2')[0], 'train')
    folder, meta, _ = prepare(*source, '--max_length=128', '--max_prompt_length=48', tokenizer='gpt2')
    prompts = responses = tokens = 0
    for (prompt, *answers), (cut_prompt, *cut_answers) in zip(whole, Groups(folder, 'train'), strict=True):
        longest = max(len(answer) for answer in answers)
        if len(prompt) + longest <= 128:
            assert len(cut_prompt) == len(prompt)
        else:
            assert len(cut_prompt) == min(len(prompt), 48)
        assert list(cut_prompt) == list(prompt[-len(cut_prompt):])
        prompts += len(cut_prompt) < len(prompt)
        tokens += len(prompt) - len(cut_prompt)
        for answer, cut in zip(answers, cut_answers):
            assert len(cut) == min(len(answer), 128 - len(cut_prompt)) > 0
            assert list(cut) == list(answer[:len(cut)])
            assert (cut[-1] == 50256) == (len(cut) == len(answer))
            responses += len(cut) < len(answer)
            tokens += len(answer) - len(cut)
    assert meta['splits']['train']['truncated'] == dict(prompts=prompts, responses=responses, tokens=tokens)
    assert prompts > 100 and responses > 100


@pytest.mark.parametrize('lengths, expected', [
    ((5, 4, 3), (5, 4, 3)),             # 9 fit in 10
    ((6, 4, 2), (6, 4, 2)),             # 10 fit in 10, though the prompt is over its own limit of 4
    ((8, 4, 2), (4, 4, 2)),             # too long together: the prompt gives way, and that is enough
    ((3, 9, 2), (3, 7, 2)),             # a short prompt stays; the long response gives way alone
    ((8, 9, 7), (4, 6, 6)),             # both
    ((1, 30, 1), (1, 9, 1)),            # the shorter response is never emptied
])
def test_truncation_is_the_paper_s(lengths, expected):
    whole = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    prompt, *responses = truncate(whole[0], whole[1:], max_length=10, max_prompt_length=4)
    assert (len(prompt), *map(len, responses)) == expected
    assert prompt == whole[0][-len(prompt):]
    assert responses == [response[:len(cut)] for response, cut in zip(whole[1:], responses)]


def test_the_end_token_ends_a_response_unless_truncation_cut_it():
    write_jsonl('pairs.jsonl', [dict(prompt='abcdefgh', chosen='1234', rejected='12345'),       # 5 and 6 with the end
                                dict(prompt='ABCDEF', chosen='123456', rejected='1'),           # 6 + 7 > 12
                                dict(prompt='xy', chosen='123456789', rejected='1234567890')])  # 2 + 10, 2 + 11 > 12
    write_jsonl('pairs/train.jsonl', [json.loads(line) for line in open('pairs.jsonl')])
    write_jsonl('pairs/val.jsonl', PAIRS[:1])
    folder, meta, tokenizer = prepare('--source=pairs', '--max_length=12', '--max_prompt_length=4')
    assert texts_of(folder, 'train', tokenizer) == [['efgh', f'1234{EOT}', f'12345{EOT}'],
                                                    ['CDEF', f'123456{EOT}', f'1{EOT}'],
                                                    ['xy', f'123456789{EOT}', '1234567890']]
    assert meta['splits']['train']['truncated'] == {'prompts': 2, 'responses': 1, 'tokens': 4 + 2 + 1}
    assert meta['splits']['val']['truncated']['prompts'] == 1


@pytest.mark.parametrize('name', ['gpt2', 'bytes', 'bpe:300'])
def test_the_end_token_s_name_in_the_data_is_ordinary_text(name, request):
    if name == 'gpt2':
        request.getfixturevalue('gpt2')         # skips where it cannot be loaded
    write_jsonl('pairs.jsonl', [dict(prompt=f'{EOT} {i}?', chosen=f' yes{EOT}', rejected=EOT) for i in range(10)])
    folder, meta, tokenizer = prepare('--source=pairs.jsonl', tokenizer=name)
    for prompt, chosen, rejected in Groups(folder, 'train'):
        assert meta['eot_token'] not in prompt and (rejected == meta['eot_token']).sum() == 1
        assert tokenizer.decode(list(chosen[:-1])) == f' yes{EOT}' and chosen[-1] == meta['eot_token']


def test_the_template_stands_around_every_prompt_and_may_begin_with_the_end_token():
    write_jsonl('pairs.jsonl', PAIRS[:4] + [dict(prompt='', chosen='a', rejected='b')])
    folder, meta, tokenizer = prepare('--source=pairs.jsonl', f'--template={EOT}Q: {{prompt}} A:')
    prompts = sorted(group[0] for split in ('train', 'val') for group in texts_of(folder, split, tokenizer))
    assert prompts == sorted([f'{EOT}Q: {pair["prompt"]} A:' for pair in PAIRS[:4]] + [f'{EOT}Q:  A:'])
    assert meta['template'] == f'{EOT}Q: {{prompt}} A:'
    folder, _, tokenizer = prepare('--source=pairs.jsonl')
    assert EOT in [group[0] for split in ('train', 'val') for group in texts_of(folder, split, tokenizer)]


# -----------------------------------------------------------------------------
# sources

def test_whole_dialogues_are_split_at_their_last_turn_and_each_kind_of_dirt_has_its_name():
    ask = '\n\nHuman: Hi' + TURN + ' Hello.\n\nHuman: Why?' + TURN
    rows = [(ask + ' Because. \n', ask + ' No.\n\n Really.'),
            (ask + ' a', '\n\nHuman: Hi' + TURN + ' b'),                    # prompts_differ
            (ask + ' a', ask.replace('Hi', 'Ho') + ' b'),                   # prompts_differ
            (ask + ' a', ask + ' \n'),                                      # empty_response
            (ask, ask + ' b'),                                              # empty_response
            (ask + ' a', ask + ' a '),                                      # identical
            ('\n\nHuman: Hi', '\n\nHuman: Hi'),                             # no_assistant_turn
            (ask + ' a', ask + ' b\n\nHuman: And?')]                        # no_assistant_turn
    write_jsonl('dialogues/data.jsonl', [dict(chosen=c, rejected=r) for c, r in rows] +
                [dict(chosen=f'\n\nHuman: {i}{TURN} yes', rejected=f'\n\nHuman: {i}{TURN} no') for i in range(9)])
    folder, meta, tokenizer = prepare('--source=dialogues', '--val_fraction=0.2')
    train, val = meta['splits']['train'], meta['splits']['val']
    assert train['dropped'] == dict(prompts_differ=2, empty_response=2, identical=1, no_assistant_turn=2)
    assert (train['read'], train['kept'], val['read'], val['kept'], val['dropped']) == (15, 8, 2, 2, {})
    assert [ask, f' Because.{EOT}', f' No.\n\n Really.{EOT}'] in [group for split in ('train', 'val')
                                                               for group in texts_of(folder, split, tokenizer)]


def test_a_directory_of_explicit_columns_is_read_as_it_is():
    for split in ('train', 'validation', 'test'):
        with_blank = [dict(pair, prompt=f'{split} {pair["prompt"]}', extra=1) for pair in PAIRS[:5]] + [
            dict(prompt='p', chosen=' ', rejected='x', extra=2)]
        write_jsonl(f'columns/{split}.jsonl', with_blank)
        Path(f'columns/{split}.jsonl.gz').write_bytes(gzip.compress(Path(f'columns/{split}.jsonl').read_bytes()))
        os.remove(f'columns/{split}.jsonl')                 # the rest is for `datasets`
    folder, meta, tokenizer = prepare('--source=columns')
    assert texts_of(folder, 'val', tokenizer)[0] == ['validation What is 0 and 0?', f' It is 0.{EOT}',
                                                     f' I do not know {EOT}']
    assert meta['splits']['train']['dropped'] == {'empty_response': 1} and set(meta['splits']) == {'train', 'val'}


def test_a_hub_data_set_is_read_like_a_directory_and_known_by_its_fingerprint(monkeypatch, capfd):
    import datasets
    write_jsonl('columns/data.jsonl', PAIRS)
    table = datasets.load_dataset('columns', cache_dir='cache')
    monkeypatch.setattr(prepare_prefs, 'load_dataset', lambda source, data_dir: table)
    folder, meta, tokenizer = prepare('--source=someone/pairs')
    assert meta['splits']['val']['groups'] == 5
    assert texts_of(folder, 'train', tokenizer)[0] == ['What is 0 and 0?', f' It is 0.{EOT}', f' I do not know {EOT}']
    prepare('--source=someone/pairs')
    assert 'data/made is reused' in capfd.readouterr().out
    table = datasets.DatasetDict(train=table['train'].select(range(50)))
    assert prepare('--source=someone/pairs')[1]['splits']['train']['read'] == 48


def test_validation_prompts_are_new_to_the_model():
    pairs = [dict(prompt=f'p{i % 40}', chosen=f'c{i}', rejected=f'r{i}') for i in range(200)]
    write_jsonl('pairs.jsonl', pairs)
    folder, meta, tokenizer = prepare('--source=pairs.jsonl', '--val_fraction=0.1')
    train, val = (texts_of(folder, split, tokenizer) for split in ('train', 'val'))
    assert not {group[0] for group in train} & {group[0] for group in val}
    assert sorted(map(tuple, train + val)) == sorted((p['prompt'], p['chosen'] + EOT, p['rejected'] + EOT) for p in pairs)
    assert len(val) == 20
    other, _, _ = prepare('--source=pairs.jsonl', '--val_fraction=0.1', '--seed=1', name='other')
    assert texts_of(other, 'val', tokenizer) != val
    write_jsonl('pairs.jsonl', [pair for pair in pairs if pair['prompt'] in ('p1', 'p2')][:-1])     # 5 and 4 pairs
    assert [prepare('--source=pairs.jsonl')[1]['splits'][split]['groups'] for split in ('train', 'val')] == [5, 4]
    write_jsonl('pairs.jsonl', pairs[:2])
    assert [prepare('--source=pairs.jsonl')[1]['splits'][split]['groups'] for split in ('train', 'val')] == [1, 1]
    write_jsonl('pairs.jsonl', [pairs[0], pairs[40]])
    assert 'pairs.jsonl: two different prompts are needed' in error_of('--source=pairs.jsonl')
    write_jsonl('pairs.jsonl', [])
    assert 'of 0 rows' in error_of('--source=pairs.jsonl')


PYTHON = '''
def pairs(split, seed):
    for i in range(30 if split == 'train' else 5):
        yield dict(prompt=f'{split} {seed} {i}', chosen='yes', rejected='no')

def documents(split, seed):
    yield from (f'{split} document {i} of {seed}' for i in range(6))
'''


def test_a_python_file_gives_pairs_and_documents_by_split_and_seed():
    Path('grammar.py').write_text(PYTHON)
    folder, meta, tokenizer = prepare('--source=grammar.py', '--documents=grammar.py', '--seed=7')
    assert texts_of(folder, 'train', tokenizer) == [[f'train 7 {i}', f'yes{EOT}', f'no{EOT}'] for i in range(30)]
    assert len(Groups(folder, 'val')) == 5
    assert texts_of(folder, 'documents_val', tokenizer) == [[EOT, f'val document {i} of 7{EOT}'] for i in range(6)]
    assert [meta['splits'][split]['K'] for split in meta['splits']] == [2, 2, 1, 1]


@pytest.mark.parametrize('text, message', [
    ('x = 1', 'grammar.py defines no pairs(split, seed)'),
    ('def pairs(split, seed):\n    yield {}\n    yield 1 / 0', 'grammar.py line 3: ZeroDivisionError: division by zero'),
    ('def pairs(', "grammar.py: SyntaxError: '(' was never closed (grammar.py, line 1)"),
    (PYTHON.replace('rejected', 'reject'), "35 bad lines, 0 allowed"),
])
def test_a_python_file_s_mistakes_are_one_line(text, message):
    Path('grammar.py').write_text(text)
    assert message in error_of('--source=grammar.py')


def test_documents_cover_every_token_exactly_once():
    Path('one.txt').write_text('0123456789abcdefghij' * 5)
    folder, meta, tokenizer = prepare('--documents=one.txt', '--max_length=8', '--max_prompt_length=4', '--val_fraction=0.1')
    groups = [[list(part) for part in group] for group in Groups(folder, 'documents_train')]
    stream = [256, *tokenizer.encode_ordinary(('0123456789abcdefghij' * 5)[:90]), 256]
    assert [token for _, response in groups for token in response] == stream[1:]            # each is predicted once
    assert [prompt for prompt, _ in groups] == [[stream[i]] for i in range(0, 91, 7)]       # by the one before it
    assert max(len(prompt) + len(response) for prompt, response in groups) == 8
    assert texts_of(folder, 'documents_val', tokenizer) == [[EOT, 'abcdefg'], ['g', f'hij{EOT}']]
    assert set(meta['splits']) == {'documents_train', 'documents_val'}


def test_documents_come_from_text_lines_and_from_the_chosen_side():
    documents = [f'text {i}\n\nwith {EOT} inside\n' for i in range(10)]
    Path('many.txt').write_text(f'{EOT}\n'.join(documents) + f'{EOT}\n')
    write_jsonl('many.jsonl', [dict(text=document, more=1) for document in documents])
    write_jsonl('pairs.jsonl', PAIRS)
    for source, expected in (('many.txt', [document.strip('\n') for document in documents]), ('many.jsonl', documents)):
        folder, meta, tokenizer = prepare(f'--documents={source}')
        found = [group for split in ('documents_train', 'documents_val') for group in texts_of(folder, split, tokenizer)]
        assert sorted(found) == [[EOT, text + EOT] for text in expected]
        assert meta['splits']['documents_val']['groups'] == 1
    folder, meta, tokenizer = prepare('--source=pairs.jsonl', '--documents=chosen')
    for split in ('train', 'val'):
        joined = [[EOT, prompt + chosen] for prompt, chosen, _ in texts_of(folder, split, tokenizer)]
        assert texts_of(folder, f'documents_{split}', tokenizer) == joined


# -----------------------------------------------------------------------------
# bad lines

BAD = [(b'{"prompt": "a", "chosen": "b"', 'not JSON'),
       (b'[1, 2]', 'not an object with prompt, chosen, rejected, but list'),
       (b'"text"', 'not an object with prompt, chosen, rejected, but str'),
       (dict(prompt='a', chosen='b'), "missing key 'rejected'"),
       (dict(prompt='a', chosen='b', rejected=['c']), "'rejected' is not a string, but list"),
       (dict(prompt=None, chosen='b', rejected='c'), "'prompt' is not a string, but NoneType"),
       (dict(prompt='a', chosen=' \n', rejected='c'), "empty 'chosen'"),
       (dict(prompt='a', chosen='b', rejected=''), "empty 'rejected'"),
       (dict(prompt='a', chosen='b', rejected='b'), "'chosen' and 'rejected' are the same"),
       (b'{"prompt": "a", "chosen": "\xff", "rejected": "c"}', 'not UTF-8 at byte 28'),
       (b'{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', "'chosen' holds half a character, a lone surrogate"),
       (b'[' * 100_000, 'not JSON')]


@pytest.mark.parametrize('line, reason', BAD)
def test_one_bad_line_is_one_line_with_its_number_and_reason(line, reason, capfd):
    write_jsonl('pairs.jsonl', [*PAIRS[:3], b'', b' \r', line, *PAIRS[3:6]])
    error = error_of('--source=pairs.jsonl')
    assert error.startswith(f'error: pairs.jsonl line 6: {reason}')
    assert error.endswith('(allow and skip bad lines with --max_bad_lines=N)')
    assert capfd.readouterr().err == '' and not os.path.exists('data')
    folder, meta, _ = prepare('--source=pairs.jsonl', '--max_bad_lines=1')
    assert capfd.readouterr().err.startswith(f'skipped pairs.jsonl line 6: {reason}')
    assert list(meta['splits']['train']['dropped'].values()) == [1] and len(Groups(folder, 'train')) == 5
    assert meta['splits']['train']['read'] + meta['splits']['val']['read'] == 7


def test_ten_bad_lines_are_shown_and_all_are_counted(capfd):
    write_jsonl('own/train.jsonl', [*PAIRS, *[line for line, _ in BAD]])
    write_jsonl('own/val.jsonl', [*PAIRS[:3], b'{}'])
    assert error_of('--source=own', '--max_bad_lines=12') == (
        'error: 13 bad lines, 12 allowed (allow and skip bad lines with --max_bad_lines=N)')
    shown = capfd.readouterr().err.splitlines()
    assert [line.split(': ')[0] for line in shown] == [f'own/train.jsonl line {i}' for i in range(101, 111)] + ['and 3 more']
    assert not os.path.exists('data')
    meta = prepare('--source=own', '--max_bad_lines=13')[1]
    assert meta['splits']['train']['dropped'] == dict(empty_response=2, identical=1, missing_key=1, not_a_string=2,
                                                      not_an_object=2, not_json=2, not_unicode=1, not_utf8=1)
    assert meta['splits']['val']['dropped'] == dict(missing_key=1)


def test_line_ends_and_a_byte_order_mark_do_no_harm():
    lines = [json.dumps(pair) for pair in PAIRS[:5]]
    Path('pairs.jsonl').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(lines).encode())
    folder, meta, _ = prepare('--source=pairs.jsonl')
    assert len(Groups(folder, 'train')) == 4 and meta['splits']['train']['dropped'] == {}


def test_a_user_s_mistake_is_one_line_on_stderr_without_a_traceback():
    write_jsonl('pairs.jsonl', [*PAIRS[:2], dict(prompt='a', chosen='b')])
    for flags, expected in (
            (['--source=pairs.jsonl', '--tokenizer=bytes'],
             "error: pairs.jsonl line 3: missing key 'rejected', it has 'prompt', 'chosen' (allow and skip bad lines with --max_bad_lines=N)\n"),
            (['--source=nobody/has-this', '--tokenizer=bytes'], 'error: source \'nobody/has-this\' could not be loaded')):
        started = time.time()
        done = run_stage('prepare_prefs.py', '--name=made', *flags, check=False)
        assert done.returncode == 1 and done.stderr.startswith(expected) and done.stderr.count('\n') == 1
        assert time.time() - started < 20 and not os.path.exists('data')


@pytest.mark.parametrize('flags, expected', [
    (['--max_length=64', '--max_prompt_length=64'], 'max_prompt_length=64 must be less than max_length=64'),
    (['--max_length=1'], 'max_length=1 is out of range'),
    (['--val_fraction=1.0'], 'val_fraction=1.0 is out of range'),
    (['--template=Q:'], "template='Q:' must hold {prompt} once"),
    (['--template={prompt}{prompt}'], 'must hold {prompt} once'),
    (['--tokenizer=bpe:256'], "tokenizer='bpe:256' must be"),
    (['--tokenizer=bpe'], "tokenizer='bpe' must be"),
    (['--tokenizer=gpt3'], "tokenizer 'gpt3' is unknown"),
    (['--source='], 'nothing to prepare'),
    (['--source=absent.jsonl'], 'source absent.jsonl does not exist'),
    (['--source=notes.txt'], 'source notes.txt must be a .jsonl, .json, .csv, .parquet or .py file'),
    (['--source=empty'], "source 'empty' could not be loaded"),
    (['--source=columns'], "source 'columns' has columns question; it needs chosen and rejected"),
    (['--documents=absent.txt'], 'documents absent.txt does not exist'),
    (['--documents=pairs'], "documents='pairs' must be"),
    (['--documents=latin.txt'], 'latin.txt is not UTF-8 at byte 2'),
])
def test_knobs_and_sources_that_cannot_be_are_said_in_one_line(flags, expected):
    write_jsonl('pairs.jsonl', PAIRS)
    write_jsonl('columns/data.jsonl', [dict(question='?')])
    Path('notes.txt').write_text('text')
    Path('latin.txt').write_bytes(b'n\xe9')
    Path('empty').mkdir()
    assert expected in error_of('--source=pairs.jsonl', *flags) and not os.path.exists('data')


# -----------------------------------------------------------------------------
# unpaired examples and rankings

UNPAIRED = [dict(prompt=f'p{i % 30}', completion=f' c{i}', label=i % 3 == 0) for i in range(90)]
RANKINGS = [dict(prompt=f'p{i % 30}', responses=[f' best {i}', f' middle {i}', f' worst {i}']) for i in range(90)]
BY_SCORE = [dict(prompt=row['prompt'], responses=[row['responses'][j] for j in (1, 2, 0)], scores=[0.5, -10 ** 400, 2])
            for row in RANKINGS]


def write_source(how, rows):
    """The rows as a source of each sort. -> its flag"""
    if how == '.py':
        Path('rows.py').write_text(f'def pairs(split, seed):\n    return {rows!r}[slice(5) if split == "val" else slice(5, None)]')
    elif how == '.jsonl':
        write_jsonl('rows.jsonl', rows)
    elif how == 'folder':
        write_jsonl('rows/train.jsonl', rows[5:])
        write_jsonl('rows/test.jsonl', rows[:5])
    else:
        write_jsonl('rows/data.jsonl', rows)        # no train.jsonl: for `datasets`
    return f'--source=rows{how if how.startswith(".") else ""}'


def all_of(folder, tokenizer):
    """Every group of train and val as strings, its label after it where it has one, sorted."""
    found = []
    for split in ('train', 'val'):
        labels = Groups(folder, split).labels
        texts = texts_of(folder, split, tokenizer)
        found += texts if labels is None else [[*text, bool(label)] for text, label in zip(texts, labels, strict=True)]
    return sorted(found)


@pytest.mark.parametrize('how', ['.jsonl', '.py', 'folder', 'datasets'])
def test_unpaired_examples_and_rankings_come_back_from_every_source(how):
    folder, meta, tokenizer = prepare(write_source(how, UNPAIRED))
    assert all_of(folder, tokenizer) == sorted([row['prompt'], row['completion'] + EOT, row['label']] for row in UNPAIRED)
    assert Groups(folder, 'train').K == 1 and Groups(folder, 'train').labels.dtype == bool
    assert sum(info['desirable'] for info in meta['splits'].values()) == 30
    expected = sorted([row['prompt'], *(response + EOT for response in row['responses'])] for row in RANKINGS)
    folder, meta, tokenizer = prepare(write_source(how, RANKINGS), name='ranked')
    assert all_of(folder, tokenizer) == expected and Groups(folder, 'val').labels is None
    assert [meta['splits'][split]['K'] for split in ('train', 'val')] == [3, 3] and 'desirable' not in meta['splits']['train']
    scored = BY_SCORE if how != 'datasets' else [dict(row, scores=[0.5, -1, 2]) for row in BY_SCORE]    # its integers are 64 bits
    folder, _, tokenizer = prepare(write_source(how, scored), name='scored')
    assert all_of(folder, tokenizer) == expected


def test_a_ranking_of_two_is_a_pair_byte_for_byte():
    write_jsonl('pairs.jsonl', PAIRS)
    write_jsonl('rankings.jsonl', [dict(prompt=p['prompt'], responses=[p['chosen'], p['rejected']]) for p in PAIRS])
    write_jsonl('scored.jsonl', [dict(prompt=p['prompt'], responses=[p['rejected'], p['chosen']], scores=[-1, 1e3]) for p in PAIRS])
    sets = [prepare(f'--source={name}.jsonl', '--documents=chosen', name=name, tokenizer='bpe:300')[0]
            for name in ('pairs', 'rankings', 'scored')]
    pairs, *others = [{file: data for file, data in content(folder).items() if file != 'meta.json'} for folder in sets]
    assert len(pairs) == 9 and others == [pairs, pairs]
    assert Groups(sets[0], 'train').fingerprint == Groups(sets[1], 'train').fingerprint


def test_truncation_looks_at_all_responses_of_a_ranking():
    write_jsonl('rankings.jsonl', [dict(prompt='abcdefgh', responses=['1', '12', '123456789']),     # 8 + 10 > 12
                                   dict(prompt='ABCDEFGH', responses=['1', '12', '123'])] * 3)      # 8 + 4 fit
    folder, meta, tokenizer = prepare('--source=rankings.jsonl', '--max_length=12', '--max_prompt_length=4')
    cut, whole = ['efgh', f'1{EOT}', f'12{EOT}', '12345678'], ['ABCDEFGH', f'1{EOT}', f'12{EOT}', f'123{EOT}']
    assert all_of(folder, tokenizer) == sorted([cut, whole] * 3)
    counts = [meta['splits'][split]['truncated'] for split in ('train', 'val')]
    assert {key: counts[0][key] + counts[1][key] for key in counts[0]} == dict(prompts=3, responses=3, tokens=3 * (4 + 2))


def test_what_is_held_out_keeps_prompts_together_and_labels_with_their_rows():
    write_jsonl('unpaired.jsonl', UNPAIRED)
    folder, _, tokenizer = prepare('--source=unpaired.jsonl', '--val_fraction=0.2')
    train, val = (texts_of(folder, split, tokenizer) for split in ('train', 'val'))
    assert len(val) == 18 and not {group[0] for group in train} & {group[0] for group in val}
    truth = {row['completion'] + EOT: row['label'] for row in UNPAIRED}
    for split, texts in (('train', train), ('val', val)):
        assert Groups(folder, split).labels.tolist() == [truth[text] for _, text in texts]


def test_sft_and_documents_learn_from_the_desirable_examples_alone(capfd):
    write_jsonl('unpaired.jsonl', [dict(prompt='x', completion='rejected', label=False), *UNPAIRED, b'{}'])
    folder, meta, tokenizer = prepare('--source=unpaired.jsonl', '--documents=chosen', '--max_bad_lines=1')
    printed = {line.split('  ')[0]: line.split()[-4:] for line in capfd.readouterr().out.split('\n')}
    for split in ('train', 'val'):
        every = Groups(folder, split)
        good = Groups(folder, split, k=1)
        assert good.labels.all() and len(good) == every.labels.sum() == meta['splits'][split]['desirable'] > 0
        desirable = [texts for texts, label in zip(texts_of(folder, split, tokenizer), every.labels) if label]
        assert [[tokenizer.decode(list(part)) for part in group] for group in good] == desirable
        assert good.lengths.tolist() == [len(''.join(texts).replace(EOT, '$')) for texts in desirable]
        assert good.fingerprint != every.fingerprint
        assert texts_of(folder, f'documents_{split}', tokenizer) == [[EOT, prompt + text] for prompt, text in desirable]
        assert int(printed['desirable'][split == 'val']) == len(desirable)
        assert int(printed['undesirable'][split == 'val']) == len(every) - len(desirable)
    write_jsonl('unpaired.jsonl', [dict(row, label=False) for row in UNPAIRED])
    assert 'no desirable example is left for train' in error_of('--source=unpaired.jsonl', '--documents=chosen')
    folder = prepare('--source=unpaired.jsonl')[0]
    with pytest.raises(SystemExit, match='data/made train holds no desirable example'):
        Groups(folder, 'train', k=1)


RANKING, EXAMPLE = dict(prompt='a', responses=['b', 'c', 'd']), dict(prompt='a', completion='b', label=True)
BAD_KINDS = [(RANKINGS, line, message) for line, message in [
    (dict(prompt='a'), "missing key 'responses'"),
    (dict(responses=['b', 'c', 'd']), "missing key 'prompt'"),
    (dict(prompt='a', chosen='b', rejected='c'), "missing key 'responses'"),
    (b'["a", ["b", "c", "d"]]', 'not an object with prompt, responses, but list'),
    (dict(RANKING, prompt=3), "'prompt' is not a string, but int"),
    (dict(RANKING, responses='bcd'), "'responses' is not a list, but str"),
    (dict(RANKING, responses=['b', 3, 'd']), "'response 2' is not a string, but int"),
    (dict(RANKING, responses=['b', 'c', ' \n']), "empty 'response 3'"),
    (dict(RANKING, responses=['b', '\ud800', 'd']), "'response 2' holds half a character"),
    (dict(RANKING, responses=[]), "'responses' holds 0, a ranking needs two or more"),
    (dict(RANKING, responses=['b']), "'responses' holds 1, a ranking needs two or more"),
    (dict(RANKING, responses=['b', 'c', 'b']), 'responses 1 and 3 are the same'),
    (dict(RANKING, responses=['b', 'c', 'd', 'e']), '4 responses, but 3 in the first good line'),
    (dict(RANKING, responses=['b', 'c']), '2 responses, but 3 in the first good line'),
    (dict(RANKING, scores=None), "'scores' is not a list, but NoneType"),
    (dict(RANKING, scores=dict(b=1)), "'scores' is not a list, but dict"),
    (dict(RANKING, scores=[1, True, 3]), "'scores' holds True, which is no finite number"),
    (dict(RANKING, scores=[1, '2', 3]), "'scores' holds '2', which is no finite number"),
    (dict(RANKING, scores=[1, 2, float('nan')]), "'scores' holds nan, which is no finite number"),
    (dict(RANKING, scores=[1, 2, float('inf')]), "'scores' holds inf, which is no finite number"),
    (dict(RANKING, scores=[1, 2]), "'scores' holds 2 for 3 responses"),
    (dict(RANKING, scores=[1, 2, 1.0]), "two 'scores' are equal: a ranking needs an order")]]
BAD_KINDS += [(UNPAIRED, line, message) for line, message in [
    (dict(prompt='a', completion='b'), "missing key 'label'"),
    (dict(prompt='a', label=True), "missing key 'completion'"),
    (dict(prompt='a', chosen='b', rejected='c'), "missing key 'completion'"),
    (b'[]', 'not an object with prompt, completion, label, but list'),
    (dict(EXAMPLE, label=1), "'label' is not true or false, but 1"),
    (dict(EXAMPLE, label='true'), "'label' is not true or false, but 'true'"),
    (dict(EXAMPLE, label=None), "'label' is not true or false, but None"),
    (dict(EXAMPLE, completion=' '), "empty 'completion'"),
    (dict(EXAMPLE, completion=None), "'completion' is not a string, but NoneType")]]
BAD_KINDS += [(PAIRS, line, message) for line, message in [
    (RANKING, "missing key 'chosen'"), (EXAMPLE, "missing key 'chosen'")]]


@pytest.mark.parametrize('good, line, message', BAD_KINDS, ids=[message for _, _, message in BAD_KINDS])
def test_a_bad_ranking_or_example_is_one_line_and_can_be_skipped(good, line, message, capfd):
    write_jsonl('rows.jsonl', [b'nonsense', b'[1]', *good[:3], line, *good[3:6]])       # the kind: of the first object
    flags = ('--source=rows.jsonl', '--max_bad_lines=2')
    assert error_of(*flags) == 'error: 3 bad lines, 2 allowed (allow and skip bad lines with --max_bad_lines=N)'
    assert capfd.readouterr().err.splitlines()[2].startswith(f'rows.jsonl line 6: {message}') and not os.path.exists('data')
    folder, meta, _ = prepare('--source=rows.jsonl', '--max_bad_lines=3')
    assert capfd.readouterr().err.splitlines()[2].startswith(f'skipped rows.jsonl line 6: {message}')
    assert len(Groups(folder, 'train')) + len(Groups(folder, 'val')) == 6 and sum(meta['splits']['train']['dropped'].values()) == 3


def test_each_reason_to_drop_a_line_has_its_name():
    names = dict(zip(("two 'scores'", "'scores' holds 2", "'scores' holds True", "'responses' holds 1", '4 responses', "'label'"),
                     ('tied_scores', 'score_count', 'score_no_number', 'ranking_of_one', 'another_count', 'label_not_boolean')))
    for start, name in names.items():
        good, line = next((good, line) for good, line, message in BAD_KINDS if message.startswith(start))
        write_jsonl('rows.jsonl', [*good[:3], line])
        assert prepare('--source=rows.jsonl', '--max_bad_lines=1')[1]['splits']['train']['dropped'] == {name: 1}


def test_a_pair_is_a_pair_whatever_else_its_row_holds():
    write_jsonl('pairs.jsonl', [dict(pair, label=3, responses='x', completion=None) for pair in PAIRS])
    folder, meta, _ = prepare('--source=pairs.jsonl')
    assert Groups(folder, 'train').K == 2 and meta['splits']['train']['dropped'] == {}


@pytest.mark.parametrize('train, val, expected', [
    (PAIRS, UNPAIRED, 'own/train.jsonl holds pairs, own/val.jsonl holds unpaired examples'),
    (PAIRS, [dict(prompt='a', responses=['b', 'c'])], 'own/train.jsonl holds pairs, own/val.jsonl holds rankings'),
    (RANKINGS, [dict(prompt='a', responses=['b', 'c'])], 'own: train has rankings of 3, val has rankings of 2'),
])
def test_train_and_val_of_two_kinds_are_refused_in_one_line_that_names_both(train, val, expected):
    write_jsonl('own/train.jsonl', train)
    write_jsonl('own/val.jsonl', val)
    assert expected in error_of('--source=own') and not os.path.exists('data')


def test_a_table_without_the_columns_of_its_kind_is_refused(capfd):
    for row in (dict(prompt='a', chosen='b'), dict(responses=['a', 'b']), dict(completion='a', label=True)):
        write_jsonl('columns/data.jsonl', [row])
        assert f"has columns {', '.join(row)}; it needs" in error_of('--source=columns')
    write_jsonl('columns/data.jsonl', [dict(row, label=int(row['label'])) for row in UNPAIRED])
    assert "dropped: {'label_not_boolean': 90}" in error_of('--source=columns')


def test_labels_that_are_damaged_are_found_and_made_again(capfd):
    write_jsonl('unpaired.jsonl', UNPAIRED)
    folder = prepare('--source=unpaired.jsonl')[0]
    good, fingerprint = content(), Groups(folder, 'train').fingerprint
    labels = good['train.labels.npy']
    flipped = labels[:-1] + bytes([labels[-1] ^ 1])
    for wrong, said in ((flipped, 'train.labels.npy is damaged'), (labels[:-1], 'train.labels.npy is damaged'),
                        (b'', 'train.labels.npy is damaged'), (None, 'train.labels.npy is missing: run prepare_prefs.py')):
        Path(folder, 'train.labels.npy').write_bytes(wrong or b'')
        if wrong is None:
            os.remove(folder / 'train.labels.npy')
        for k in (None, 1):
            with pytest.raises(SystemExit, match=said):
                Groups(folder, 'train', k)
        capfd.readouterr()
        prepare('--source=unpaired.jsonl')
        assert said in capfd.readouterr().out and content() == good
    prepare('--source=unpaired.jsonl')
    assert 'data/made is reused' in capfd.readouterr().out
    write_jsonl('unpaired.jsonl', [dict(row, label=not row['label']) for row in UNPAIRED])
    made = prepare('--source=unpaired.jsonl')[1]
    assert made['fingerprint'] != json.loads(good['meta.json'])['fingerprint'] and content()['train.bin'] == good['train.bin']
    assert Groups(folder, 'train').fingerprint != fingerprint       # the labels alone
    write_jsonl('pairs.jsonl', PAIRS)
    prepare('--source=pairs.jsonl')
    assert not list(folder.glob('*.labels.npy'))                    # nothing is left of the older set


def test_a_failure_midway_brings_the_old_labels_back(monkeypatch):
    write_jsonl('unpaired.jsonl', UNPAIRED)
    prepare('--source=unpaired.jsonl')
    old, replace = content(), os.replace

    def fail_at(source, target):
        if Path(source).parent.name.startswith('.tmp-') and Path(source).name == 'val.labels.npy':
            raise OSError(28, 'No space left on device')
        replace(source, target)
    monkeypatch.setattr(os, 'replace', fail_at)
    assert error_of('--source=unpaired.jsonl', '--seed=5').endswith('data/made is as it was')
    assert content() == old


# -----------------------------------------------------------------------------
# tokenizers of our own

@pytest.mark.parametrize('seed', range(5))
def test_bpe_merges_what_a_recount_of_everything_would(seed):
    rng = np.random.default_rng(seed)
    words = {bytes(rng.choice(list(b'ab'), rng.integers(1, 25)).tolist()): int(rng.integers(1, 9)) for _ in range(40)}
    tokens, pieces = [bytes([b]) for b in range(256)], {word: list(word) for word in words}
    while len(tokens) < 400:
        counts = {}
        for word, piece in pieces.items():
            for pair in zip(piece, piece[1:]):
                counts[pair] = counts.get(pair, 0) + words[word]
        if not counts:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        if tokens[a] + tokens[b] not in tokens:
            tokens.append(tokens[a] + tokens[b])
        new = tokens.index(tokens[a] + tokens[b])
        for word, piece in pieces.items():
            merged, i = [], 0
            while i < len(piece):
                both = piece[i:i + 2] == [a, b]
                merged.append(new if both else piece[i])
                i += 1 + both
            pieces[word] = merged
    assert train_bpe(words, 400) == tokens and len(set(tokens)) == len(tokens) > 280


def test_own_tokenizers_give_back_any_text():
    rng = np.random.default_rng(0)
    strange = [''.join(chr(c) for c in rng.integers(0, 0x110000, 50) if not 0xd800 <= c < 0xe000) for _ in range(20)]
    strange += ['', ' ', '\0\r\n\t  ', "it's 12345!!!  'LL", 'é日本語🙂👩‍👩‍👧', EOT]
    write_jsonl('pairs.jsonl', PAIRS + [dict(prompt=text, chosen='é日本語🙂', rejected='no') for text in strange])
    for name, size in (('bytes', 257), ('bpe:257', 257), ('bpe:300', 300)):
        folder, meta, tokenizer = prepare('--source=pairs.jsonl', name=name.replace(':', ''), tokenizer=name)
        saved = json.loads((folder / 'tokenizer.json').read_text())['tokens']
        assert [base64.b64decode(token) for token in saved[:256]] == [bytes([b]) for b in range(256)]
        assert meta['vocab_size'] == size == len(saved) + 1 and meta['eot_token'] == size - 1
        assert all(tokenizer.decode(tokenizer.encode_ordinary(text)) == text for text in strange)
    assert len(tokenizer.encode_ordinary('What is')) < len('What is')


def test_a_text_with_too_few_pairs_makes_a_smaller_vocabulary_and_says_so(capfd):
    write_jsonl('pairs.jsonl', [dict(prompt=p, chosen='ab', rejected='cd') for p in 'xy'])
    meta = prepare('--source=pairs.jsonl', tokenizer='bpe:1000')[1]
    assert meta['vocab_size'] == 259                # the bytes, ab, cd and the end token
    assert 'no pairs are left to merge, it has 259 tokens' in capfd.readouterr().out


def test_a_tokenizer_learns_from_the_training_text_alone():
    write_jsonl('own/train.jsonl', [dict(prompt='x', chosen='aaaa', rejected='bbbb')])
    write_jsonl('own/val.jsonl', [dict(prompt='x', chosen='cccc', rejected='dddd')])
    tokenizer = prepare('--source=own', tokenizer='bpe:1000')[2]
    assert [len(tokenizer.encode_ordinary(letter * 4)) for letter in 'abcd'] == [1, 1, 4, 4]


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(monkeypatch):
    import tiktoken
    ranks = {bytes([b]): b for b in range(256)} | {f'<{i:05}>'.encode(): i for i in range(256, 70_000)}
    wide = tiktoken.Encoding('wide', pat_str=r'<\d+>|.', mergeable_ranks=ranks, special_tokens={EOT: 70_000})
    monkeypatch.setattr(prepare_prefs, 'load_tokenizer', lambda folder, name: wide)
    write_jsonl('pairs.jsonl', PAIRS)
    prepare_prefs.main(['--name=made', '--tokenizer=wide', '--source=pairs.jsonl'])
    groups = Groups('data/made', 'train')
    assert groups.meta['splits']['train']['dtype'] == 'uint32' and groups[0][1][-1] == 70_000


# -----------------------------------------------------------------------------
# the set on disk

def test_the_same_inputs_are_reused_and_anything_else_is_remade(capfd):
    write_jsonl('own/train.jsonl', PAIRS)
    write_jsonl('own/val.jsonl', PAIRS[:5])

    def run(*flags):
        before = {path: path.stat().st_mtime_ns for path in Path('data/made').glob('*')}
        prepare('--source=own', '--documents=chosen', *flags)
        reused = before == {path: path.stat().st_mtime_ns for path in Path('data/made').glob('*')}
        said = capfd.readouterr().out
        assert reused == ('data/made is reused' in said) != ('making data/made: ' in said)
        return said.split('making data/made: ')[-1].splitlines()[0] if not reused else 'reused'

    assert run() == 'it is new'
    good = content()
    assert run() == run() == 'reused'
    assert run('--max_length=300') == run() == run('--seed=3') == run() == 'its knobs or its source have changed'
    text = Path('own/train.jsonl').read_text()
    Path('own/train.jsonl').write_text(text.replace('What is 7', 'What is 8', 1))
    assert run() == 'its knobs or its source have changed' and content() != good
    Path('own/train.jsonl').write_text(text)
    assert run() == 'its knobs or its source have changed' and content() == good
    for file in good:
        damaged = bytearray(good[file])
        damaged[len(damaged) // 2] ^= 1
        for wrong in (bytes(damaged), good[file][:-1], b'', None):
            Path('data/made', file).write_bytes(wrong or b'')
            if wrong is None:
                os.remove(f'data/made/{file}')
            assert run() not in ('reused', 'it is new') or file == 'meta.json'
            assert content() == good
    prepare('--source=own')
    assert not os.path.exists('data/made/documents_train.bin')      # nothing is left of the older set


@pytest.mark.parametrize('at', ['encode', 'write', 'meta', 'first move', 'last move', 'Ctrl-C'])
def test_a_failure_leaves_the_old_set_as_it_was(at, monkeypatch):
    write_jsonl('pairs.jsonl', PAIRS)
    prepare('--source=pairs.jsonl')
    old, replace = content(), os.replace

    def fail(*args, **options):
        raise KeyboardInterrupt if at == 'Ctrl-C' else OSError(28, 'No space left on device')

    def fail_at(source, target):
        file = Path(source)
        new = file.parent.name.startswith('.tmp-')          # not an old file that is moved aside, or back
        if new and file.name == ('train.bin' if at == 'first move' else 'meta.json'):
            fail()
        replace(source, target)
    with monkeypatch.context() as patch:
        if at.endswith('move'):
            patch.setattr(os, 'replace', fail_at)
        elif at in ('encode', 'Ctrl-C'):
            patch.setattr(prepare_prefs, 'truncate', fail)
        elif at == 'write':
            patch.setattr(np, 'save', fail)
        else:
            patch.setattr(json, 'dump', fail)
        for name in ('made', 'new'):
            error = error_of('--source=pairs.jsonl', '--seed=5', name=name)
            assert error.endswith(f'data/{name} is as it was')
            assert ('stopped' if at == 'Ctrl-C' else 'No space left on device') in error
    assert content() == old and not os.path.exists('data/new/meta.json')
    assert len(Groups('data/made', 'train')) == 95


@pytest.mark.parametrize('how', ['TERM', 'KILL', 'full'])
def test_a_killed_run_leaves_the_old_set_and_its_remains_are_swept_up(how):
    write_jsonl('pairs.jsonl', PAIRS)
    prepare('--source=pairs.jsonl')
    old = content()
    write_jsonl('pairs.jsonl', [dict(pair, prompt=f'{pair["prompt"]} {i}') for i in range(1000) for pair in PAIRS])
    command = [sys.executable, str(ROOT / 'prepare_prefs.py'), '--name=made', '--source=pairs.jsonl', '--tokenizer=bytes']
    if how == 'full':               # a file that may not grow, as on a full disk
        command = ['bash', '-c', 'ulimit -f 1000; exec "$@"', 'bash', *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    if how != 'full':
        limit = time.time() + 60
        while not list(Path('data/made').glob('.tmp-*/train.bin')) and time.time() < limit:
            time.sleep(0.01)
        process.send_signal(getattr(signal, f'SIG{how}'))
    error = process.communicate(timeout=60)[1]
    if how == 'KILL':
        assert process.returncode == -9 and len(list(Path('data/made').glob('.tmp-*'))) == 1
        shutil.copytree('data/made', 'copy')
        assert len(Groups('copy', 'train')) == 95
    else:
        assert process.returncode == 1 and error.count('\n') == 1 and error.endswith('data/made is as it was\n')
        assert content() == old
    write_jsonl('pairs.jsonl', PAIRS)
    prepare('--source=pairs.jsonl', '--seed=2')
    assert sorted(content()) == sorted(old)


def test_the_table_adds_up(capfd):
    write_jsonl('pairs.jsonl', PAIRS + [b'{}'])
    _, meta, _ = prepare('--source=pairs.jsonl', '--max_bad_lines=1', '--max_length=30', '--max_prompt_length=12')
    printed = capfd.readouterr().out
    rows = {line[:24].strip(): line[24:].split() for line in printed.split('\n')
            if line.startswith(('read', 'kept', 'dropped'))}
    assert rows == {'read': ['96', '5'], 'dropped: missing_key': ['1', '0'], 'kept': ['95', '5']}
    for split in ('train', 'val'):
        info = meta['splits'][split]
        for number in (info['tokens'], info['longest'], info['truncated']['tokens'],
                       round(info['tokens'] / info['groups'], 1)):
            assert f'{number:,}' in printed
    assert 'val_fraction      = 0.05' in printed and 'data/made is ready' in printed
