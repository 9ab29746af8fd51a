"""prepare_prefs.py: it writes what an independent encoding of the same texts gives, and a failure writes nothing."""
import base64
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_prefs
from conftest import ROOT, SHARED, error_of, prepare, prepare_all, run_stage, write_rows
from nanodpo import look
from nanodpo.data import Groups
from nanodpo.bpe import train_bpe
from nanodpo.text import EOT, load_tokenizer
from prepare_prefs import truncate

HH = SHARED / 'data' / 'hh-rlhf'
TURN = '\n\nAssistant:'
PAIRS = [dict(prompt=f'What is {i} and {i}?', chosen=f' It is {2 * i}.',
              rejected=f' I do not know {"at all" * (i % 5)}')
         for i in range(100)]
UNPAIRED = [dict(prompt=f'p{i % 30}', completion=f' c{i}', label=i % 3 == 0) for i in range(90)]
needs_hh = pytest.mark.skipif(not HH.is_dir(), reason='the HH sample is not here')


@pytest.fixture(autouse=True)
def in_a_fresh_directory_with_pairs_and_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows('pairs.jsonl', PAIRS)
    write_rows('unpaired.jsonl', UNPAIRED)


def content(folder='data/made'):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- ids, truncation, the end token ---------------------------------------------------------------

@needs_hh
def test_hh_ids_equal_an_independent_encoding_and_truncation_loses_only_what_its_rule_says(gpt2):
    source = (f'--source={HH}', '--data_dir=harmless-base')
    _, meta = prepare(*source, '--max_length=100000', name='whole', tokenizer='gpt2')
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
        groups, info = Groups('data/whole', split), meta['splits'][split]
        assert [[list(part) for part in group] for group in groups] == expected
        assert info['read'] == info['kept'] + sum(dropped.values()) == (1387 if split == 'train' else 155)
        assert info['dropped'] == dropped and info['groups'] == info['kept'] == len(expected)
        assert info['truncated'] == {'prompts': 0, 'responses': 0, 'tokens': 0} and info['dtype'] == 'uint16'
        assert info['tokens'] == sum(len(part) for group in expected for part in group) == len(groups.tokens)
    assert (meta['vocab_size'], meta['eot_token'], meta['tokenizer']) == (50257, 50256, 'gpt2')

    _, meta = prepare(*source, '--max_length=128', '--max_prompt_length=48', '--truncation=paper', tokenizer='gpt2')
    prompts = responses = tokens = 0
    pairs_of_groups = zip(Groups('data/whole', 'train'), Groups('data/made', 'train'), strict=True)
    for (prompt, *answers), (cut_prompt, *cut_answers) in pairs_of_groups:
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
    ((8, 2, 3, 9), (4, 2, 3, 6)),       # of a ranking the longest counts
])
def test_truncation_is_the_paper_s(lengths, expected):
    whole = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    prompt, *responses = truncate(whole[0], whole[1:], max_length=10, max_prompt_length=4)
    assert (len(prompt), *map(len, responses)) == expected
    assert prompt == whole[0][-len(prompt):]
    assert responses == [response[:len(cut)] for response, cut in zip(whole[1:], responses)]


def test_the_end_token_ends_a_response_unless_truncation_cut_it():
    write_rows('pairs/train.jsonl', [
        dict(prompt='abcdefgh', chosen='1234', rejected='12345'),           # 5 and 6 with the end
        dict(prompt='ABCDEF', chosen='123456', rejected='1'),               # 6 + 7 > 12
        dict(prompt='xy', chosen='123456789', rejected='1234567890')])      # 2 + 10, 2 + 11 > 12
    write_rows('pairs/val.jsonl', PAIRS[:1])
    texts, meta = prepare('--source=pairs', '--max_length=12', '--max_prompt_length=4', '--truncation=paper')
    assert texts['train'] == [['efgh', f'1234{EOT}', f'12345{EOT}'], ['CDEF', f'123456{EOT}', f'1{EOT}'],
                              ['xy', f'123456789{EOT}', '1234567890']]
    assert meta['splits']['train']['truncated'] == {'prompts': 2, 'responses': 1, 'tokens': 4 + 2 + 1}
    assert meta['splits']['val']['truncated']['prompts'] == 1
    assert prepare('--source=pairs', '--max_length=12')[1]['max_prompt_length'] == 6      # the half, by default


@pytest.mark.parametrize('name', ['gpt2', 'bytes', 'bpe:300'])
def test_the_end_token_s_name_in_the_data_is_ordinary_text(name, request):
    if name == 'gpt2':
        request.getfixturevalue('gpt2')         # skips where it cannot be loaded
    write_rows('pairs.jsonl', [dict(prompt=f'{EOT} {i}?', chosen=f' yes{EOT}', rejected=EOT) for i in range(10)])
    _, meta = prepare('--source=pairs.jsonl', tokenizer=name)
    tokenizer = load_tokenizer('data/made', meta['tokenizer'])
    for prompt, chosen, rejected in Groups('data/made', 'train'):
        assert meta['eot_token'] not in prompt and (rejected == meta['eot_token']).sum() == 1
        assert tokenizer.decode(list(chosen[:-1])) == f' yes{EOT}' and chosen[-1] == meta['eot_token']


def test_the_template_stands_around_every_prompt_and_may_begin_with_the_end_token():
    write_rows('pairs.jsonl', PAIRS[:4] + [dict(prompt='', chosen='a', rejected='b')])
    groups, meta = prepare_all('--source=pairs.jsonl', f'--template={EOT}Q: {{prompt}} A:')
    assert [group[0] for group in groups] == sorted([f'{EOT}Q: {pair["prompt"]} A:'
                                                     for pair in PAIRS[:4]] + [f'{EOT}Q:  A:'])
    assert meta['template'] == f'{EOT}Q: {{prompt}} A:'
    assert EOT in [group[0] for group in prepare_all('--source=pairs.jsonl')[0]]


# --- what is held out, Python files, documents ----------------------------------------------------

def test_validation_prompts_are_new_to_the_model():
    pairs = [dict(prompt=f'p{i % 40}', chosen=f'c{i}', rejected=f'r{i}') for i in range(200)]
    write_rows('pairs.jsonl', pairs)
    by_hand = {'pairs.jsonl': [[p['prompt'], p['chosen'] + EOT, p['rejected'] + EOT] for p in pairs],
               'unpaired.jsonl': [[row['prompt'], row['completion'] + EOT, row['label']] for row in UNPAIRED]}
    for source, groups in by_hand.items():
        texts, _ = prepare(f'--source={source}', '--val_fraction=0.1')
        train, val = texts['train'], texts['val']
        assert not {group[0] for group in train} & {group[0] for group in val}
        assert sorted(train + val) == sorted(groups) and len(val) == len(groups) // 10
        assert prepare(f'--source={source}', '--val_fraction=0.1', '--seed=1')[0]['val'] != val
    for rows, sizes in (([pair for pair in pairs if pair['prompt'] in ('p1', 'p2')][:-1], [5, 4]), (pairs[:2], [1, 1])):
        write_rows('pairs.jsonl', rows)
        texts, _ = prepare('--source=pairs.jsonl')
        assert [len(texts['train']), len(texts['val'])] == sizes
    for rows in (pairs[:1], [pairs[0], pairs[40]]):
        write_rows('pairs.jsonl', rows)
        expected = f'two different prompts are needed, one to hold out for val, of {len(rows)} rows'
        assert expected in error_of('--source=pairs.jsonl')


PYTHON = '''
def pairs(split, seed):
    for i in range(30 if split == 'train' else 5):
        yield dict(prompt=f'{split} {seed} {i}', chosen='yes', rejected='no')

def documents(split, seed):
    yield from (f'{split} document {i} of {seed}' for i in range(6))
'''


def test_a_python_file_gives_pairs_and_documents_by_split_and_seed():
    Path('grammar.py').write_text(PYTHON)
    texts, meta = prepare('--source=grammar.py', '--documents=grammar.py', '--seed=7')
    assert texts['train'] == [[f'train 7 {i}', f'yes{EOT}', f'no{EOT}'] for i in range(30)]
    assert len(texts['val']) == 5
    assert texts['documents_val'] == [[EOT, f'val document {i} of 7{EOT}'] for i in range(6)]
    assert [meta['splits'][split]['K'] for split in meta['splits']] == [2, 2, 1, 1]


@pytest.mark.parametrize('file, written, message', [
    ('source=bad.py', 'x = 1', 'bad.py defines no pairs(split, seed)'),
    ('source=bad.py', 'def pairs(split, seed):\n    yield {}\n    yield 1 / 0',
     'bad.py failed: ZeroDivisionError: division by zero (bad.py line 3)'),
    ('source=bad.py', 'def pairs(', "bad.py failed: SyntaxError: '(' was never closed (bad.py, line 1)"),
    ('source=bad.py', PYTHON.replace("rejected='no'", "rejected='yes' if i == 3 else 'no'"), '2 bad lines, 0 allowed'),
    ('source=bad.py', PYTHON.replace('rejected', 'reject'),
     "bad.py pairs('train') item 1: missing key: it has 'prompt', 'chosen', 'reject'; it needs"),
    ('documents=bad.jsonl', '{"text": "a"}\n{"text": " "}\n', "bad.jsonl line 2: empty response: 'text'"),
    ('documents=bad.jsonl', '{"text": "a"}\n{"text": 3}\n', "bad.jsonl line 2: not a string: 'text' is 3"),
    ('documents=bad.jsonl', '{"texts": "a"}\n',
     "bad.jsonl: no row of train can be used; dropped: {'missing_key': 1}; "),
    ('documents=bad.txt', f' \n{EOT}\n\n', 'bad.txt holds no rows'),
    ('documents=bad.py', 'def documents(split, seed):\n    return [3]',
     "bad.py documents('train') item 1: not a string: 'text' is 3"),
    ('documents=bad.py', 'def documents(split, seed):\n    yield 1 / 0',
     'bad.py failed: ZeroDivisionError: division by zero (bad.py line 2)'),
    ('documents=bad.py', '', 'bad.py defines no documents(split, seed)'),
])
def test_a_mistake_in_a_python_file_or_in_documents_is_one_line(file, written, message):
    Path(file.split('=')[1]).write_text(written)
    assert message in error_of(f'--{file}')


def test_documents_cover_every_token_exactly_once():
    Path('one.txt').write_text('0123456789abcdefghij' * 5)
    texts, meta = prepare('--documents=one.txt', '--max_length=8', '--max_prompt_length=4', '--val_fraction=0.1')
    groups = [[list(part) for part in group] for group in Groups('data/made', 'documents_train')]
    stream = [256, *('0123456789abcdefghij' * 5).encode()[:90], 256]
    assert [token for _, response in groups for token in response] == stream[1:]            # each is predicted once
    assert [prompt for prompt, _ in groups] == [[stream[i]] for i in range(0, 91, 7)]       # by the one before it
    assert max(len(prompt) + len(response) for prompt, response in groups) == 8
    assert texts['documents_val'] == [[EOT, 'abcdefg'], ['g', f'hij{EOT}']]
    assert set(meta['splits']) == {'documents_train', 'documents_val'}


def test_documents_come_from_text_lines_and_from_the_chosen_side():
    documents = [f'text {i}\n\nwith {EOT} inside\n' for i in range(10)]
    Path('many.txt').write_text(f'{EOT}\n'.join(documents) + f'{EOT}\n')
    write_rows('many.jsonl', [dict(text=document, more=1) for document in documents])
    for source, expected in (('many.txt', [document.strip('\n') for document in documents]), ('many.jsonl', documents)):
        texts, meta = prepare(f'--documents={source}')
        assert sorted(texts['documents_train'] + texts['documents_val']) == [[EOT, document + EOT]
                                                                             for document in expected]
        assert meta['splits']['documents_val']['groups'] == 1
    messages = [dict(prompt=[dict(role='user', content=pair['prompt'])], chosen='Yes', rejected='No') for pair in PAIRS]
    for rows in (PAIRS, messages):
        write_rows('pairs.jsonl', rows)
        texts, meta = prepare('--source=pairs.jsonl', '--documents=chosen')
        for split in ('train', 'val'):
            assert texts[f'documents_{split}'] == [[EOT, prompt + chosen] for prompt, chosen, _ in texts[split]]


# --- mistakes of a user ---------------------------------------------------------------------------

def test_a_user_s_mistake_is_one_line_on_stderr_without_a_traceback():
    write_rows('pairs.jsonl', [*PAIRS[:2], dict(prompt='a', chosen='b')])
    for source, expected in (('pairs.jsonl', "error: pairs.jsonl line 3: missing key: it has 'prompt', 'chosen'; it"),
                             ('nobody/has-this', "error: source 'nobody/has-this' could not be loaded")):
        started = time.time()
        done = run_stage('prepare_prefs.py', '--name=made', f'--source={source}', '--tokenizer=bytes', check=False)
        assert done.returncode == 1 and done.stderr.startswith(expected) and done.stderr.count('\n') == 1
        assert time.time() - started < 60 and not os.path.exists('data')


@pytest.mark.parametrize('flags, expected', [
    (['--max_length=64', '--max_prompt_length=64'], 'max_prompt_length must be less than max_length'),
    (['--max_length=1'], 'max_length=1 is out of range'),
    (['--val_fraction=1.0'], 'val_fraction=1.0 is out of range'),
    (['--template=Q:'], 'template must hold {prompt} once'),
    (['--template={prompt}{prompt}'], 'must hold {prompt} once'),
    (['--tokenizer=bpe:256'], 'bpe:N needs N of at least 257'),
    (['--tokenizer=bpe'], 'bpe:N needs N of at least 257'),
    (['--tokenizer=gpt3'], "tokenizer 'gpt3' cannot be loaded"),
    (['--source='], 'nothing to prepare'),
    (['--source=absent.jsonl'], 'absent.jsonl does not exist'),
    (['--source=notes.txt'], 'notes.txt must be a .jsonl, .json, .csv, .tsv (also .gz) or .parquet file'),
    (['--source=empty'], "source 'empty' could not be loaded"),
    (['--documents=absent.txt'], 'absent.txt does not exist'),
    (['--documents=pairs'], "source 'pairs' could not be loaded from here or the hub"),
    (['--documents=latin.txt'], 'latin.txt cannot be read: UnicodeDecodeError'),
    (['--source=', '--documents=notes.txt', '--data_dir=x'], 'val_source and data_dir go with a source'),
])
def test_knobs_and_sources_that_cannot_be_are_said_in_one_line(flags, expected):
    Path('notes.txt').write_text('text')
    Path('latin.txt').write_bytes(b'n\xe9')
    Path('empty').mkdir()
    assert expected in error_of('--source=pairs.jsonl', *flags) and not os.path.exists('data')


# --- unpaired examples and rankings ---------------------------------------------------------------

def test_sft_and_documents_learn_from_the_desirable_examples_alone(capfd):
    write_rows('unpaired.jsonl', [dict(prompt='x', completion='rejected', label=False), *UNPAIRED, b'{}'])
    texts, meta = prepare('--source=unpaired.jsonl', '--documents=chosen', '--max_bad_lines=1')
    printed = {line.split('  ')[0]: line.split()[-4:] for line in capfd.readouterr().out.split('\n')}
    for split in ('train', 'val'):
        every = Groups('data/made', split)
        good = Groups('data/made', split, k=1)
        desirable = [[prompt, response] for prompt, response, label in texts[split] if label]
        assert good.labels.all() and len(good) == every.labels.sum() == len(desirable) > 0
        assert meta['splits'][split]['desirable'] == len(desirable)
        assert [[list(part) for part in group] for group in good] == [
            [list(prompt.encode()), [*response.removesuffix(EOT).encode(), 256]] for prompt, response in desirable]
        assert good.lengths.tolist() == [len(''.join(group).replace(EOT, '$')) for group in desirable]
        assert good.fingerprint != every.fingerprint
        assert texts[f'documents_{split}'] == [[EOT, prompt + response] for prompt, response in desirable]
        assert int(printed['desirable'][split == 'val']) == len(desirable)
        assert int(printed['undesirable'][split == 'val']) == len(every) - len(desirable)
    write_rows('unpaired.jsonl', [dict(row, label=False) for row in UNPAIRED])
    message = "documents='chosen': train or val holds no desirable example"
    assert message in error_of('--source=unpaired.jsonl', '--documents=chosen')
    prepare('--source=unpaired.jsonl')
    with pytest.raises(SystemExit, match='data/made train holds no desirable example'):
        Groups('data/made', 'train', k=1)


def test_labels_count_as_content():
    prepare('--source=unpaired.jsonl')
    good, fingerprint = content(), Groups('data/made', 'train').fingerprint
    labels = good['train.labels.npy']
    flipped = labels[:-1] + bytes([labels[-1] ^ 1])
    for wrong in (flipped, labels[:-1], b'', None):
        Path('data/made/train.labels.npy').write_bytes(wrong or b'')
        if wrong is None:
            os.remove('data/made/train.labels.npy')
        for k in (None, 1):
            with pytest.raises(SystemExit, match='train.labels.npy is missing or damaged'):
                Groups('data/made', 'train', k)
    write_rows('unpaired.jsonl', [dict(row, label=not row['label']) for row in UNPAIRED])
    made = prepare('--source=unpaired.jsonl')[1]
    assert made['fingerprint'] != json.loads(good['meta.json'])['fingerprint']
    assert content()['train.bin'] == good['train.bin']
    assert Groups('data/made', 'train').fingerprint != fingerprint       # the labels alone
    write_rows('pairs.jsonl', PAIRS)
    prepare('--source=pairs.jsonl')
    assert not list(Path('data/made').glob('*.labels.npy'))         # nothing is left of the older set


# --- tokenizers of our own ------------------------------------------------------------------------

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
    write_rows('pairs.jsonl', PAIRS + [dict(prompt=strange_text, chosen='é日本語🙂', rejected='no')
                                       for strange_text in strange])
    for name, size in (('bytes', 257), ('bpe:257', 257), ('bpe:300', 300)):
        _, meta = prepare('--source=pairs.jsonl', tokenizer=name)
        tokenizer = load_tokenizer('data/made', 'tokenizer.json')
        saved = json.loads(Path('data/made/tokenizer.json').read_text())['tokens']
        assert [base64.b64decode(token) for token in saved[:256]] == [bytes([b]) for b in range(256)]
        assert meta['vocab_size'] == size == len(saved) + 1 and meta['eot_token'] == size - 1
        assert all(tokenizer.decode(tokenizer.encode_ordinary(string)) == string for string in strange)
    assert len(tokenizer.encode_ordinary('What is')) < len('What is')


def test_a_tokenizer_learns_from_the_training_text_alone():
    write_rows('own/train.jsonl', [dict(prompt='x', chosen='aaaa', rejected='bbbb')])
    write_rows('own/val.jsonl', [dict(prompt='x', chosen='cccc', rejected='dddd')])
    meta = prepare('--source=own', tokenizer='bpe:1000')[1]
    assert meta['vocab_size'] == 261                # the bytes, aa, aaaa, bb, bbbb and the end token
    tokenizer = load_tokenizer('data/made', 'tokenizer.json')
    assert [len(tokenizer.encode_ordinary(letter * 4)) for letter in 'abcd'] == [1, 1, 4, 4]


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(monkeypatch):
    import tiktoken
    ranks = {bytes([b]): b for b in range(256)} | {f'<{i:05}>'.encode(): i for i in range(256, 70_000)}
    wide = tiktoken.Encoding('wide', pat_str=r'<\d+>|.', mergeable_ranks=ranks, special_tokens={EOT: 70_000})
    monkeypatch.setattr(prepare_prefs, 'load_tokenizer', lambda folder, name: wide)
    monkeypatch.setattr(look, 'load_tokenizer', lambda folder, name: wide)
    write_rows('pairs.jsonl', PAIRS)
    prepare_prefs.main(['--name=made', '--tokenizer=wide', '--source=pairs.jsonl'])
    groups = Groups('data/made', 'train')
    assert groups.meta['splits']['train']['dtype'] == 'uint32' and groups[0][1][-1] == 70_000


# --- the set on disk ------------------------------------------------------------------------------

def test_the_same_inputs_are_reused_and_anything_else_is_remade(capfd):
    write_rows('own/train.jsonl', UNPAIRED)
    write_rows('own/val.jsonl', UNPAIRED[:5])

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
    Path('own/train.jsonl').write_text(text.replace(' c7', ' c8', 1))
    assert run() == 'its knobs or its source have changed' and content() != good
    Path('own/train.jsonl').write_text(text)
    assert run() == 'its knobs or its source have changed' and content() == good
    for file in good:
        at = len(good[file]) // 2
        flipped = good[file][:at] + bytes([good[file][at] ^ 1]) + good[file][at + 1:]
        for wrong in (flipped, good[file][:-1], b'', None):
            Path('data/made', file).write_bytes(wrong or b'')
            if wrong is None:
                os.remove(f'data/made/{file}')
            assert run() not in ('reused', 'it is new') or file == 'meta.json'
            assert content() == good
    prepare('--source=own')
    assert not os.path.exists('data/made/documents_train.bin')      # nothing is left of the older set


def test_documents_of_a_folder_count_as_content_where_the_source_has_a_data_dir(capfd):
    write_rows('own/sub/train.jsonl', UNPAIRED)
    write_rows('texts/train.jsonl', [dict(text='old'), dict(text='more')])
    flags = '--source=own', '--data_dir=sub', '--documents=texts'
    prepare(*flags)
    write_rows('texts/train.jsonl', [dict(text='new'), dict(text='more')])
    prepare(*flags)
    assert 'reused' not in capfd.readouterr().out


@pytest.mark.parametrize('name, encoding', [('texts.jsonl', 'cp1252'), ('texts.txt', 'cp1252'), ('texts.txt', 'utf-8-sig')])
def test_documents_have_the_encoding_of_the_knob_and_no_byte_order_mark(name, encoding):
    texts = ['Größe', 'Maß']
    content = '\n'.join(json.dumps(dict(text=text), ensure_ascii=False) for text in texts) if name.endswith('l') else \
        '\n<|endoftext|>\n'.join(texts)
    Path(name).write_bytes(content.encode(encoding))
    prepare('--source=', f'--documents={name}', f'--encoding={encoding.removesuffix("-sig")}')
    found = [bytes(group[1][:-1].tolist()).decode() for split in ('train', 'val')
             for group in Groups('data/made', f'documents_{split}')]
    assert sorted(found) == texts


@pytest.mark.parametrize('at', ['truncate', 'save', 'dump', 'Ctrl-C'])
def test_a_failure_leaves_the_old_set_as_it_was(at, monkeypatch):
    prepare('--source=pairs.jsonl')
    old = content()

    def fail(*args, **options):
        raise KeyboardInterrupt if at == 'Ctrl-C' else OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr({'save': np, 'dump': json}.get(at, prepare_prefs), 'truncate' if at == 'Ctrl-C' else at, fail)
        for name in ('made', 'new'):
            error = error_of('--source=pairs.jsonl', '--seed=5', name=name)
            assert error.endswith(f'data/{name} was not replaced')
            assert ('stopped' if at == 'Ctrl-C' else 'No space left on device') in error
    assert content() == old and not os.path.exists('data/new')


@pytest.mark.parametrize('file', ['train.bin', 'val.labels.npy', 'meta.json'])
def test_a_failure_while_files_are_replaced_leaves_a_set_that_readers_refuse_and_prepare_makes_again(file, monkeypatch):
    prepare('--source=unpaired.jsonl')
    old, replace = content(), os.replace

    def fail_at(source, target):
        if Path(source).name == file:
            raise OSError(28, 'No space left on device')
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', fail_at)
        with pytest.raises(SystemExit, match='No space left on device; data/made was not replaced'):
            prepare('--source=unpaired.jsonl', '--seed=5')
    with pytest.raises(SystemExit, match='is missing or damaged|it is not what'):
        for split in ('train', 'val'):
            Groups('data/made', split)
    prepare('--source=unpaired.jsonl')
    assert content() == old


def test_sigterm_leaves_the_old_set_as_it_was_and_so_does_a_kill_but_for_files_that_the_next_run_sweeps_up():
    prepare('--source=pairs.jsonl')
    old = content()
    write_rows('pairs.jsonl', [dict(pair, prompt=f'{pair["prompt"]} {i}') for i in range(1000) for pair in PAIRS])
    command = [sys.executable, ROOT / 'prepare_prefs.py', '--name=made', '--source=pairs.jsonl', '--tokenizer=bytes']
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        limit = time.time() + 60
        while not list(Path('data/made').glob('.tmp-*/train.bin')) and time.time() < limit:
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        if number == signal.SIGTERM:
            assert process.returncode == 1 and error.endswith('data/made was not replaced\n') and error.count('\n') == 1
            assert content() == old
    assert process.returncode == -9 and len(list(Path('data/made').glob('.tmp-*'))) == 1
    assert len(Groups('data/made', 'train')) == 95
    write_rows('pairs.jsonl', PAIRS)
    prepare('--source=pairs.jsonl', '--seed=2')
    assert sorted(content()) == sorted(old)


def test_the_table_adds_up(capfd):
    write_rows('pairs.jsonl', PAIRS + [b'{}'])
    _, meta = prepare('--source=pairs.jsonl', '--max_bad_lines=1', '--max_length=30', '--max_prompt_length=12')
    printed = capfd.readouterr().out
    rows = {line[:24].strip(): line[24:].split() for line in printed.split('\n')
            if line.startswith(('read', 'kept', 'dropped'))}
    assert rows == {'read': ['96', '5'], 'dropped: missing_key': ['1', '0'], 'kept': ['95', '5']}
    for split in ('train', 'val'):
        info = meta['splits'][split]
        for number in (info['tokens'], info['longest'], info['truncated']['tokens']):
            assert f'{number:,}' in printed
    assert 'val_fraction      = 0.05' in printed and 'data/made is ready' in printed
