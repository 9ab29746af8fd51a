"""Data as people have it: every sort of file and kind of row becomes the groups that one makes of it by hand."""
import gzip
import json
import os
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from conftest import ROOT, error_of, prepare, prepare_all, write_rows
from nanodpo import rollout, sources
from nanodpo.data import Groups
from nanodpo.rows import BadRow, read_prompt
from nanodpo.text import EOT, load_tokenizer, prompt_ids, render, text_of

HUMAN = '\n\nHuman: {prompt}\n\nAssistant:'


@pytest.fixture(autouse=True)
def in_a_fresh_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def turns(*texts, system=None):
    """Messages of the user and the assistant in turn."""
    first = [] if system is None else [dict(role='system', content=system)]
    return first + [dict(role=('user', 'assistant')[i % 2], content=text) for i, text in enumerate(texts)]


def answer(text):
    return [dict(role='assistant', content=text)]


def write_parquet(folder, **splits):
    """Splits as the hub lays them out."""
    for split, rows in splits.items():
        write_rows(f'{folder}/{split}-00000-of-00001.parquet', rows)


# --- sorts of files -------------------------------------------------------------------------------

PAIRS = [dict(prompt=f'{i}, "why"?\n', chosen=['None', ' naïve 👍', '007'][i % 3], rejected=f'[{i}, NA]')
         for i in range(12)]
TALKS = [dict(chosen=turns(f'q{i}', 'a', 'b?', f'yes {i}'), rejected=turns(f'q{i}', 'a', 'b?', 'no'))
         for i in range(12)]
UNPAIRED = [dict(prompt=f'{i}', completion='c', label=i % 3 == 0) for i in range(12)]
RANKINGS = [dict(prompt=f'{i}', responses=['x', 'y', 'z'], scores=[1, 3.5, -2]) for i in range(12)]


def by_hand(row):
    """The groups that the rows above are."""
    if 'label' in row:
        return [row['prompt'], 'c' + EOT, row['label']]
    if 'responses' in row:
        return [row['prompt'], 'y' + EOT, 'x' + EOT, 'z' + EOT]
    if isinstance(row['chosen'], str):
        return [row['prompt'], row['chosen'] + EOT, row['rejected'] + EOT]
    q = row['chosen'][0]['content']
    return [f'\n\nHuman: {q}\n\nAssistant: a\n\nHuman: b?\n\nAssistant:', f' yes {q[1:]}{EOT}', f' no{EOT}']


@pytest.mark.parametrize('sort', ['.jsonl', '.json', '.csv', '.parquet', '.jsonl.gz', '.json.gz', '.csv.gz', '/.json',
                                  '/.csv', '/.parquet', '/.jsonl', '.py', 'datasets'])
def test_every_sort_of_source_gives_the_same_groups(sort):
    for rows in (PAIRS, TALKS, UNPAIRED, RANKINGS):
        source = f'rows{sort}' if sort.startswith('.') else 'rows'
        if sort == 'datasets':
            write_parquet('rows/data', train=rows[3:], test=rows[:3])
        elif sort.startswith('/'):
            write_rows(f'rows/train{sort[1:]}', rows[3:])
            write_rows(f'rows/val{sort[1:]}', rows[:3])
        elif sort == '.py':
            part = '[slice(3) if split == "val" else slice(3, None)]'
            Path(source).write_text(f'def pairs(split, seed):\n    return {rows!r}{part}')
        else:
            write_rows(source, rows)
        texts, meta = prepare(f'--source={source}')
        assert sorted(texts['train'] + texts['val']) == sorted(map(by_hand, rows))
        assert sum(sum(info['dropped'].values()) for info in meta['splits'].values()) == 0
        assert len(texts['val']) == 3 or sort.startswith('.') and sort != '.py'
        assert meta['template'] == (HUMAN if rows is TALKS else '{prompt}')
        K = len(by_hand(rows[0])) - 1 - ('label' in rows[0])
        assert [meta['splits'][split]['K'] for split in ('train', 'val')] == [K, K]
        assert sum(info.get('desirable', 0) for info in meta['splits'].values()) == (4 if rows is UNPAIRED else 0)
        shutil.rmtree('rows', ignore_errors=True)


@pytest.mark.parametrize('path, where', [('rows.json', 'item 3'), ('rows.csv', 'row 4'), ('rows.parquet', 'row 3'),
                                         ('rows.jsonl', 'line 3'), ('rows.jsonl.gz', 'line 3')])
def test_a_bad_row_of_one_s_own_is_named_by_file_and_number_and_can_be_skipped(path, where, capfd):
    rows = [dict(prompt=f'{i}', chosen='c', rejected='r' if i != 2 else 'c') for i in range(6)]
    write_rows(path, rows)
    assert error_of(f'--source={path}').startswith(f'error: {path} {where}: identical: two of chosen, ')
    groups, meta = prepare_all(f'--source={path}', '--max_bad_lines=1')
    assert len(groups) == 5 and meta['splits']['train']['dropped'] == {'identical': 1}
    assert f'skipped {path} {where}' in capfd.readouterr().err


HEADER = b'prompt,chosen,rejected\n'


@pytest.mark.parametrize('path, data, expected', [
    ('x.jsonl', b'', 'error: x.jsonl holds no rows'),
    ('x.json', b'', 'error: x.json holds no rows'),
    ('x.json', b'[]', 'x.json holds no rows'),
    ('x.json', b'[{"prompt": "a", "chosen": "b", "rejected": "c"}\n', 'x.json cannot be read: JSONDecodeError'),
    ('x.json', b'{"prompt": "a",\n "chosen": "b",\n "rejected": "c"}\n', 'x.json line 1: not JSON'),
    ('x.json', b'[1]', 'x.json item 1: not an object: int'),
    ('x.json', b'["\xff"]', 'x.json cannot be read: ValueError: it is not utf-8: save it as UTF-8, or name'),
    ('x.json', b'[' * 100_000, 'x.json cannot be read: RecursionError'),
    ('x.csv', b'', 'x.csv holds no rows'),
    ('x.csv', 'prompt,chosen\na,b'.encode('utf-16'), 'not utf-8: save it as UTF-8, or name what it is, as --encoding=utf-16'),
    ('x.csv', b'why?,good,bad\nhow?,fine,worse\n',
     "x.csv row 2: missing key: it has 'why?', 'good', 'bad'; it needs chosen and rejected"),
    ('x.csv', HEADER.replace(b',', b':') + b'a:b:c\n', "it has 'prompt:chosen:rejected'; it needs"),
    ('x.jsonl', b'{"question": "a", "good\\n": "b"}\n',
     "x.jsonl line 1: missing key: it has 'question', 'good\\n'; it needs chosen and rejected"),
    ('x.csv', HEADER, 'x.csv holds no rows'),
    ('x.csv', b'prompt,chosen,chosen\na,b,c\n', 'two columns have the same name'),
    ('x.csv', HEADER + b'a,b,c\nd,"e\n\ne",f\ng,h\n',
     'x.csv row 4: cell count: 2 cells, and the first row names 3 columns'),
    ('x.csv', HEADER + b'a,b,c\nd,e,f,g\n', 'x.csv row 3: cell count: 4 cells, and the first row names 3 columns'),
    ('x.csv', HEADER + b'a,b,c\nd,\xff,f\n', 'it is not utf-8: save it as UTF-8, or name what it is, as --encoding=cp1252 ('),
    ('x.csv', HEADER + b'a,b,c\n"open,b,c\nd,e,f\n', 'x.csv cannot be read: ValueError: row 3: unexpected end of data'),
    ('x.csv', HEADER + b'a,"[{\'role\': \'user\', \'content\': \'a\'}]",b\n',
     "x.csv row 2: not JSON: 'chosen' begins as messages do: Expecting property name"),
    ('x.csv.gz', b'prompt', 'x.csv.gz cannot be read'),
    ('x.jsonl.gz', gzip.compress(b'{}' * 1000, mtime=0)[:-9], 'x.jsonl.gz cannot be read'),
    ('x.parquet', b'', 'x.parquet cannot be read'),
    ('x.parquet', None, 'x.parquet cannot be read'),
    ('x.xlsx', b'PK', 'x.xlsx must be a .jsonl, .json, .csv, .tsv (also .gz) or .parquet file'),
])
def test_a_broken_file_is_one_line(path, data, expected):
    if data is None:
        write_rows(path, PAIRS)
        data = Path(path).read_bytes()[:-5]
    Path(path).write_bytes(data)
    assert expected in error_of(f'--source={path}')


def test_a_source_that_is_not_to_be_had_is_one_line(monkeypatch):
    monkeypatch.setattr(sources, 'hub_answers', lambda: False)
    write_rows('own/train.jsonl', PAIRS)
    write_rows('odd/left-00000-of-00001.parquet', PAIRS)
    os.mkdir('empty')
    for flags, expected in (
            (['--source=own', '--data_dir=nowhere'], "source 'own' could not be loaded: "),
            (['--source=empty'], "source 'empty' could not be loaded: "),
            (['--source=someone/nothing'], "source 'someone/nothing' could not be loaded from here or the hub: "),
            (['--source=absent.jsonl'], 'absent.jsonl does not exist')):
        assert expected in error_of(*flags)
    with pytest.raises(SystemExit, match="x has no split 'train', only .'test', 'left'"):
        sources.train_and_val(dict(test=[], left=[]), 'x')
    assert len(prepare_all('--source=odd')[0]) == len(PAIRS)        # a lone split is train


def test_max_val_leaves_out_validation_rows_and_says_so():
    write_rows('own/train.json', PAIRS[:6])
    write_rows('own/val.json', PAIRS[6:])
    texts, meta = prepare('--source=own', '--max_val=2')
    assert len(texts['val']) == 2 and meta['splits']['val']['dropped'] == {'over_max_val': 4}
    assert meta['splits']['val']['read'] == 6
    assert all(group in map(by_hand, PAIRS[6:]) for group in texts['val']) and len(texts['train']) == 6
    assert prepare('--source=own', '--max_val=9')[1]['splits']['val']['dropped'] == {}


@pytest.mark.parametrize('file', ['{}.jsonl.gz', '{}-0.jsonl'])
def test_the_bad_rows_of_a_directory_stop_the_run_as_those_of_a_file_do(file):
    """The second is read by `datasets`."""
    for split in ('train', 'validation', 'test'):
        rows = [dict(row, prompt=f'{split} {row["prompt"]}', extra=1) for row in PAIRS[:5]]
        write_rows('columns/' + file.format(split), [*rows, dict(prompt='p', chosen=' ', rejected='x', extra=2)])
    assert error_of('--source=columns').startswith('error: 2 bad lines, 0 allowed')
    texts, meta = prepare('--source=columns', '--max_bad_lines=2')
    assert any(note.startswith('not read of columns: ') and 'test' in note for note in meta['notes'])
    assert "columns that are not read, with the rows of 10 that fill them: 'extra' (10)" in meta['notes']
    assert texts['val'][0] == ['validation 0, "why"?\n', f'None{EOT}', f'[0, NA]{EOT}']
    assert meta['splits']['train']['dropped'] == {'empty_response': 1} and set(meta['splits']) == {'train', 'val'}
    for row in (dict(prompt='a', chosen='b'), dict(question='?')):
        write_rows('wrong/data.jsonl', [row])
        assert f"it has {', '.join(map(repr, row))}; it needs chosen and rejected" in error_of('--source=wrong')
    write_rows('wrong/data.jsonl', [dict(row, label=3) for row in UNPAIRED])
    assert "no row of train can be used; dropped: {'no_label': 12}; " in error_of('--source=wrong')


def test_a_hub_data_set_is_read_like_a_directory_and_known_by_its_fingerprint(monkeypatch, capfd):
    import datasets
    write_rows('columns/data.jsonl', PAIRS)
    table = datasets.load_dataset('columns', cache_dir='cache')
    monkeypatch.setattr(sources, 'load_tables', lambda *args: table)
    texts, meta = prepare('--source=someone/pairs')
    assert len(texts['val']) == 1 and sorted(texts['train'] + texts['val']) == sorted(map(by_hand, PAIRS))
    prepare('--source=someone/pairs')
    assert 'data/made is reused' in capfd.readouterr().out
    table = datasets.DatasetDict(train=table['train'].select(range(6)))
    assert len(prepare_all('--source=someone/pairs')[0]) == 6


def test_what_datasets_saves_with_save_to_disk_is_read_with_splits_or_alone():
    import datasets
    rows = datasets.Dataset.from_list(PAIRS)
    rows.save_to_disk('alone')
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk('several')
    splits = {name: prepare('--source=' + name)[1]['splits'] for name in ('alone', 'several')}
    assert sum(splits['alone'][split]['kept'] for split in ('train', 'val')) == len(PAIRS)
    assert [splits['several'][split]['kept'] for split in ('train', 'val')] == [len(PAIRS), 1]


# --- kinds of rows, and what is wrong with a row --------------------------------------------------

RANKING, EXAMPLE, PAIR = RANKINGS[0], UNPAIRED[0], dict(prompt='a', chosen='b', rejected='c')
DEMONSTRATIONS = [dict(prompt=f'{i}', completion='a') for i in range(6)]
BAD = [(PAIRS, *bad) for bad in [
    (b'{"prompt": "a", "chosen": "b"', 'not JSON: '),
    (b'[' * 100_000, 'not JSON: '),
    (b'[1, 2]', 'not an object: list'),
    (b'"text"', 'not an object: str'),
    (dict(prompt='a', chosen='b'), "missing key: it has 'prompt', 'chosen'; it needs chosen and rejected"),
    (dict(chosen='b', rejected='c'),
     "no assistant turn: there is no prompt, and a side is no dialogue that ends with an answer; it has 'chosen', "),
    (dict(PAIR, rejected=3), "not a string: 'rejected' is 3"),
    (dict(PAIR, rejected=['c']), "no message: 'rejected' holds 'c'"),
    (dict(PAIR, prompt=None), 'no assistant turn: there is no prompt'),
    (dict(PAIR, chosen=' \n'), "empty response: 'chosen'"),
    (dict(PAIR, rejected=''), "empty response: 'rejected'"),
    (dict(PAIR, rejected='b'), 'identical: two of chosen, rejected are the same'),
    (b'{"prompt": "a", "chosen": "\xff", "rejected": "c"}', "not JSON: it is not utf-8: save it as UTF-8, or name"),
    (b'{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', "not UTF-8: 'chosen' holds half a character"),
    (RANKING, 'another kind: 3 responses'),
    (EXAMPLE, 'another kind: 1 responses, labelled: True')]]
BAD += [(RANKINGS, *bad) for bad in [
    (dict(prompt='a'), "missing key: it has 'prompt'; it needs"),
    (dict(responses=['b', 'c', 'd']), "no prompt: the assistant speaks first in 'response 1'; the row has 'responses'"),
    (PAIR, 'another kind: 2 responses'),
    (dict(RANKING, responses='bcd'), "no ranking: 'responses' must be a list of two or more, not 'bcd'"),
    (dict(RANKING, responses=['b']), "no ranking: 'responses' must be a list of two or more, not ['b']"),
    (dict(RANKING, responses=['b', 3, 'd']), "not a string: 'response 2' is 3"),
    (dict(RANKING, responses=['b', 'c', ' \n']), "empty response: 'response 3'"),
    (dict(RANKING, responses=['b', 'c', 'b']), 'identical: two of response 1, response 2, response 3 are the same'),
    (dict(prompt='a', responses=['b', 'c', 'd', 'e']), 'another kind: 4 responses'),
    (dict(prompt='a', responses=['b', 'c']), 'another kind: 2 responses')]]
BAD += [(RANKINGS, dict(RANKING, scores=scores), "no order: 'scores' must be 3 numbers, all finite and different")
        for scores in (None, dict(b=1), [1, True, 3], [1, '2', 3], [1, 2, float('nan')], [1, 2, float('inf')], [1, 2],
                       [1, 2, 1.0])]
BAD += [(UNPAIRED, *bad) for bad in [
    (dict(prompt='a', completion='b'), 'another kind: 1 responses, labelled: False'),
    (dict(prompt='a', label=True), "missing key: it has 'prompt', 'label'; it needs"),
    (PAIR, 'another kind: 2 responses, labelled: False'),
    (dict(EXAMPLE, label=2), "no label: 'label' is not true or false"),
    (dict(EXAMPLE, label='yes'), "no label: 'label' is not true or false"),
    (dict(EXAMPLE, completion=None), "missing key: it has 'prompt', 'label'")]]
BAD += [(TALKS, *bad) for bad in [
    (dict(prompt=turns('z'), chosen=turns('a', 'b'), rejected=turns('a', 'c')),
     "another prompt: 'chosen' does not say what 'prompt' says"),
    (dict(prompt='z', chosen=turns('a', 'b'), rejected=turns('a', 'c')), "another prompt: 'chosen' does not say what"),
    (dict(chosen=turns('a'), rejected=turns('a')),
     "not in turn: user, then assistant must speak in 'chosen', not user"),
    (dict(chosen=turns('a', 'b', system='s')[::-1], rejected=turns('a', 'b')),
     "no prompt: the assistant speaks first in 'chosen'; the row has 'chosen', 'rejected'"),
    (dict(chosen=turns('a', 'b') + turns(system='s'), rejected=turns('a', 'b')),
     "not in turn: user, then assistant must speak in 'chosen', not user, assistant, system"),
    (dict(chosen=turns('a') + turns('b', 'c'), rejected=turns('a', 'b')),
     "not in turn: user, then assistant must speak in 'chosen', not user, user, assistant"),
    (dict(chosen=answer('b'), rejected=answer('c')), 'no prompt: '),
    (dict(chosen=[dict(role='critic', content='x')], rejected=turns('a', 'c')),
     "unknown role: 'chosen' has a turn of 'critic'; known: system, developer, user, "),
    (dict(chosen=turns(system='s'), rejected=turns('a', 'c')), 'not in turn: '),
    (dict(chosen=[dict(role='user')], rejected=answer('c')), "missing key: 'content'"),
    (dict(chosen=turns('a') + ['b'], rejected=answer('c')), "no message: 'chosen' holds 'b'"),
    (dict(chosen=turns('a', None), rejected=turns('a', 'c')), "not a string: 'content' is None"),
    (dict(chosen=turns('a', '\ud800'), rejected=turns('a', 'c')), "not UTF-8: 'content' holds half a character"),
    (dict(chosen=turns('a', ' \n'), rejected=turns('a', 'c')), "empty response: 'chosen'"),
    (dict(chosen=turns('a', 'c')), "missing key: it has 'chosen'")]]
BAD += [(DEMONSTRATIONS, dict(DEMONSTRATIONS[0], label=True), 'another kind: 1 responses, labelled: True'),
        (DEMONSTRATIONS, dict(messages='a'), "no prompt: the assistant speaks first in 'messages'")]


@pytest.mark.parametrize('good, line, message', BAD, ids=[f'{i} {bad[-1]}' for i, bad in enumerate(BAD)])
def test_one_bad_row_is_one_line_with_its_number_and_can_be_skipped(good, line, message, capfd):
    write_rows('rows.jsonl', [*good[:3], b'', b' \r', line, *good[3:6]])
    error = error_of('--source=rows.jsonl')
    assert error.startswith(f'error: rows.jsonl line 6: {message}')
    assert error.endswith('(allow and skip bad lines with --max_bad_lines=N)')
    assert capfd.readouterr().err == '' and not os.path.exists('data')
    groups, meta = prepare_all('--source=rows.jsonl', '--max_bad_lines=1')
    skipped = capfd.readouterr().err
    assert skipped.startswith('skipped rows.jsonl line 6: ') and message in skipped and len(groups) == 6
    assert meta['splits']['train']['dropped'] == {message.split(':')[0].replace(' ', '_'): 1}
    assert meta['splits']['train']['read'] + meta['splits']['val']['read'] == 7


def test_the_first_object_tells_the_kind_of_all_rows():
    good, line = RANKINGS, dict(RANKING, scores=[1, 2])
    write_rows('rows.jsonl', [b'nonsense', b'[1]', {}, *good[:3], line, *good[3:6]])
    assert error_of('--source=rows.jsonl', '--max_bad_lines=3').startswith('error: 4 bad lines, 3 allowed')
    groups, meta = prepare_all('--source=rows.jsonl', '--max_bad_lines=4')
    assert groups == sorted(map(by_hand, good[:6])) and sum(meta['splits']['train']['dropped'].values()) == 4


def test_ten_bad_lines_are_shown_and_all_are_counted(capfd):
    bad = [line for good, line, *_ in BAD if good is PAIRS]
    write_rows('own/train.jsonl', [*PAIRS, *bad])
    write_rows('own/val.jsonl', [*PAIRS[:3], b'{}'])
    assert error_of('--source=own', '--max_bad_lines=15') == (
        'error: 17 bad lines, 15 allowed (allow and skip bad lines with --max_bad_lines=N)')
    shown = capfd.readouterr().err.splitlines()
    assert [line.split(': ')[0] for line in shown] == [f'own/train.jsonl line {i}' for i in range(13, 23)]
    assert not os.path.exists('data')
    splits = prepare('--source=own', '--max_bad_lines=17')[1]['splits']
    assert splits['train']['dropped'] == {'empty_response': 2, 'identical': 1, 'missing_key': 1, 'no_message': 1, 'not_a_string': 1,
                                          'no_assistant_turn': 2, 'another_kind': 2, 'not_an_object': 2,
                                          'not_JSON': 3, 'not_UTF-8': 1}
    assert splits['val']['dropped'] == dict(missing_key=1)


@pytest.mark.parametrize('train, val, expected', [
    (PAIRS, UNPAIRED,
     "no row of val can be used; dropped: {'another_kind': 12}; own/val.jsonl line 1: another kind: 1 responses"),
    (PAIRS, RANKINGS, 'own/val.jsonl line 1: another kind: 3 responses, '),
    (RANKINGS, [dict(prompt='a', responses=['b', 'c'])], 'the first row has 3 responses')])
def test_train_and_val_of_two_kinds_are_refused_in_one_line(train, val, expected):
    write_rows('own/train.jsonl', train)
    write_rows('own/val.jsonl', val)
    assert expected in error_of('--source=own') and not os.path.exists('data')


def test_a_ranking_of_two_is_a_pair_byte_for_byte():
    sides = [(row['prompt'], row['chosen'], row['rejected']) for row in PAIRS]
    write_rows('pairs.jsonl', PAIRS)
    write_rows('rankings.jsonl', [dict(prompt=prompt, responses=[c, r]) for prompt, c, r in sides])
    write_rows('scored.jsonl', [dict(prompt=prompt, responses=[r, c], scores=[-1, 1e3]) for prompt, c, r in sides])
    sets = []
    for name in ('pairs', 'rankings', 'scored'):
        prepare(f'--source={name}.jsonl', '--documents=chosen', name=name, tokenizer='bpe:300')
        sets.append({path.name: path.read_bytes() for path in Path('data', name).iterdir() if path.name != 'meta.json'})
    assert len(sets[0]) == 9 and sets[1] == sets[2] == sets[0]
    assert Groups('data/pairs', 'train').fingerprint == Groups('data/rankings', 'train').fingerprint


# --- messages and the template --------------------------------------------------------------------

SYSTEM = turns('Hi 👍', 'Hello.', 'E\u0301? שלום', system='Be <kind>.')
TEMPLATES = [('', '\n\nHuman: {}\n\nAssistant:', ' '), ('Q: {prompt}\nA: ', 'Q: {}\nA: ', ''),
             (EOT + 'U {prompt}\n', 'U {}\n', ''),
             ('{prompt}', '{}', ' ')]


@pytest.mark.parametrize('template, user, space', TEMPLATES)
def test_messages_have_the_same_ids_in_training_and_in_sampling(template, user, space):
    write_rows('rows.jsonl', [dict(prompt=SYSTEM, chosen=answer('Yes'), rejected='No'),
                              dict(chosen=turns('a', 'Yes'), rejected=turns('a', 'No'), prompt='a')])
    groups, meta = prepare_all('--source=rows.jsonl', f'--template={template}')
    new = '' if user.startswith('\n') else '\n'
    first = f'Be <kind>.{new}' + user.format('Hi 👍') + f'{space}Hello.{new}' + user.format('E\u0301? שלום')
    bos = EOT * template.startswith(EOT)
    assert groups == sorted([bos + prompt, f'{space}Yes{EOT}', f'{space}No{EOT}']
                            for prompt in (first, user.format('a')))
    tokens = load_tokenizer('data/made', meta['tokenizer'])
    asked = [prompt_ids(tokens, render(read_prompt(dict(prompt=prompt)), meta['template']), meta['template'])
             for prompt in (SYSTEM, turns('a'), 'a')]
    trained = {tuple(group[0]) for split in ('train', 'val') for group in Groups('data/made', split)}
    assert set(map(tuple, asked)) == trained and len(trained) == 2
    assert [text_of(tokens, ids) for ids in asked] == [first, user.format('a'), user.format('a')]


def test_a_template_is_the_same_whether_the_shell_left_its_line_breaks_or_not():
    write_rows('rows.jsonl', PAIRS)
    sets = [prepare('--source=rows.jsonl', '--template=' + text) for text in (HUMAN, HUMAN.replace('\n', '\\n'))]
    assert sets[0][0] == sets[1][0] and sets[0][1]['template'] == sets[1][1]['template'] == HUMAN


def test_the_default_template_writes_conversations_as_hh_does():
    assert render(turns('a', 'b', 'c'), HUMAN) == '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
    assert render(turns('a', ' b\n'), HUMAN) == '\n\nHuman: a\n\nAssistant: b\n'
    assert render('\n\nHuman: a\n\nAssistant:', HUMAN) == '\n\nHuman: a\n\nAssistant:' == render('a', HUMAN)


@pytest.mark.parametrize('row, message', [
    ([], "not a string: 'prompt' is []"), (dict(messages=[]), "not a string: 'messages' is []"),
    (dict(prompt=None), "not a string: 'prompt' is None"),
    (3, "not a string: 'prompt' is 3"), (dict(prompt=[dict(role='user')]), "missing key: 'content'"),
    (dict(prompt=turns('a', 'b')), "must speak in 'prompt' and 'answer', not user, assistant, assistant"),
    (dict(prompt=answer('a')), "no prompt: the assistant speaks first in 'prompt' and 'answer'")])
def test_a_bad_prompt_of_messages_is_a_bad_row(row, message):
    with pytest.raises(BadRow, match=re.escape(message)):
        read_prompt(row)


ASKED = [HUMAN.format(prompt=i) for i in range(4)]
GOOD = {
    'line ends and a byte order mark': (
        b'\xef\xbb\xbf' + '\r\n'.join(map(json.dumps, PAIRS)).encode(), list(map(by_hand, PAIRS))),
    'a pair, whatever else its row holds': (
        [dict(pair, label=3, responses='x', completion=None) for pair in PAIRS], list(map(by_hand, PAIRS))),
    'scores beyond any float': (
        [dict(prompt=f'{i}', responses=['b', 'c', 'a'], scores=[0.5, -10 ** 400, 2]) for i in range(2)],
        [[f'{i}', f'a{EOT}', f'b{EOT}', f'c{EOT}'] for i in range(2)]),
    'rankings of messages': (
        [dict(prompt=turns(f'{i}'), responses=[answer('a'), 'b', turns(f'{i}', 'c')]) for i in range(4)],
        [[prompt, f' a{EOT}', f' b{EOT}', f' c{EOT}'] for prompt in ASKED]),
    'unpaired messages': (
        [dict(prompt=turns(f'{i}'), completion=answer('a'), label=i > 1) for i in range(4)],
        [[prompt, f' a{EOT}', i > 1] for i, prompt in enumerate(ASKED)]),
    'messages': ([dict(messages=turns(f'{i}', 'a')) for i in range(4)], [[prompt, f' a{EOT}'] for prompt in ASKED]),
    'demonstrations': (DEMONSTRATIONS[:4], [[f'{i}', f'a{EOT}'] for i in range(4)]),
}


@pytest.mark.parametrize('rows, expected', GOOD.values(), ids=GOOD)
def test_these_rows_become_these_groups(rows, expected):
    write_rows('rows.jsonl', rows)
    groups, meta = prepare_all('--source=rows.jsonl')
    assert groups == sorted(expected) and meta['splits']['train']['dropped'] == {}
    if rows is GOOD['demonstrations'][0]:
        assert meta['template'] == '{prompt}'
        assert Groups('data/made', 'train').labels is None and Groups('data/made', 'train', k=1).K == 1


def test_strings_beside_messages_become_the_user_s_in_any_order_and_a_note_says_so():
    expected = [HUMAN.format(prompt=PAIRS[1]['prompt']), f' naïve 👍{EOT}', f' [1, NA]{EOT}']
    for rows in ([TALKS[0], PAIRS[1], TALKS[1]], [PAIRS[1], TALKS[0], TALKS[1]]):
        write_rows('rows/train.jsonl', rows)
        write_rows('rows/val.jsonl', TALKS[2:3])
        texts, meta = prepare('--source=rows')
        assert expected in texts['train'] and len(texts['train']) == 3
        assert any('prompts of one text, 1 of 4: ' in note for note in meta['notes'])


# --- Anthropic HH, and the other sources in the hub's layout, by row(raw) of their config files ---

def test_whole_dialogues_are_split_at_their_last_turn_and_each_kind_of_dirt_has_its_name(capfd):
    turn = '\n\nAssistant:'
    ask = f'\n\nHuman: Hi{turn} Hello.\n\nHuman: Why?{turn}'
    rows = [(ask + ' Because. \n', ask + ' No.\n\n Really.'),
            (ask + ' a', f'\n\nHuman: Hi{turn} b'),                         # prompts_differ
            (ask + ' a', ask.replace('Hi', 'Ho') + ' b'),                   # prompts_differ
            (ask + ' a', ask + ' \n'),                                      # empty_response
            (ask, ask + ' b'),                                              # empty_response
            (ask + ' a', ask + ' a '),                                      # identical
            ('\n\nHuman: Hi', '\n\nHuman: Hi'),                             # no_assistant_turn
            (ask + ' a', ask + ' b\n\nHuman: And?')]                        # no_assistant_turn
    rows += [(f'\n\nHuman: {i}{turn} yes', f'\n\nHuman: {i}{turn} no') for i in range(9)]
    rows = [dict(chosen=chosen, rejected=rejected) for chosen, rejected in rows]
    for source in ('dialogues/data.jsonl', 'dialogues.jsonl'):              # nor is it a mistake in a file of one's own
        write_rows(source, rows)
        texts, meta = prepare(f'--source={source.removesuffix("/data.jsonl")}', '--val_fraction=0.2')
        train, val = meta['splits']['train'], meta['splits']['val']
        assert train['dropped'] == dict(prompts_differ=2, empty_response=2, identical=1, no_assistant_turn=2)
        assert (train['read'], train['kept'], val['read'], val['kept'], val['dropped']) == (15, 8, 2, 2, {})
        assert [ask, f' Because.{EOT}', f' No.\n\n Really.{EOT}'] in texts['train'] + texts['val']
        assert 'bad' not in capfd.readouterr().err and meta['template'] == HUMAN
    for line, message in ((dict(chosen='a'), "line 18: missing key: it has 'chosen'"),
                          (PAIR, 'another kind: 2 responses, labelled: False, dialogues: False')):
        write_rows('dialogues.jsonl', [*rows, line])
        assert message in error_of('--source=dialogues.jsonl')


def test_hh_takes_each_subset_or_all_four_and_red_team_attempts_are_no_pairs():
    subsets = ['harmless-base', 'helpful-base', 'helpful-online', 'helpful-rejection-sampled']
    for subset in subsets:
        for split in ('train', 'test'):
            ask = f'\n\nHuman: {subset} {split}\n\nAssistant:'
            write_rows(f'hh/{subset}/{split}.jsonl.gz', [dict(chosen=f'{ask} yes', rejected=f'{ask} no')])
    write_rows('hh/red-team-attempts/red_team_attempts.jsonl.gz',
               [dict(transcript='\n\nHuman: a\n\nAssistant: b', rating=1.0)])
    texts, _ = prepare('--source=hh')
    assert sorted(texts['train']) == [[HUMAN.format(prompt=f'{subset} train'), f' yes{EOT}', f' no{EOT}']
                                      for subset in subsets] and len(texts['val']) == 4
    texts, meta = prepare('--source=hh', '--data_dir=helpful-online')
    assert meta['template'] == HUMAN, 'a plain question is framed as the dialogues are'
    assert [texts[split][0][0] for split in ('train', 'val')] == [
        HUMAN.format(prompt=f'helpful-online {split}') for split in ('train', 'test')]
    assert len(texts['train']) == len(texts['val']) == 1
    assert "it has 'transcript', 'rating'; it needs chosen and rejected" in error_of(
        '--source=hh', '--data_dir=red-team-attempts', name='other')


def config_of(name):
    return str(ROOT / 'config' / f'{name}.py')


def test_ultrafeedback_takes_the_prefs_splits():
    rows = [dict(prompt=f'q{i}', prompt_id='x', messages=turns('m', 'm'), chosen=turns(f'q{i}', 'good'),
                 rejected=turns(f'q{i}', 'bad'), score_chosen=7.0, score_rejected=5.0 + i) for i in range(4)]
    write_parquet('uf/data', train_prefs=rows, test_prefs=rows[:1], train_sft=rows[:2], test_gen=rows[:2])
    texts, meta = prepare(config_of('ultrafeedback'), '--source=uf')
    assert texts == {'train': [[HUMAN.format(prompt=f'q{i}'), f' good{EOT}', f' bad{EOT}'] for i in range(3)],
                     'val': [[HUMAN.format(prompt='q0'), f' good{EOT}', f' bad{EOT}']]}
    assert meta['splits']['train']['dropped'] == {'left_out_by_row': 1}


def test_tldr_comparisons_and_their_mirror_become_the_same_groups():
    post = dict(id='x', post='I did it. ', title='Oh', subreddit='tifu', article=None)
    both = [dict(text=' one\n', policy='p'), dict(text='two', policy='q')]
    raw = [dict(info=dict(post, title=f'{i}'), summaries=both, choice=i % 2) for i in range(4)]
    raw += [dict(info=dict(post, post=None, article='news'), summaries=[dict(text='a'), dict(text='b')], choice=0),
            dict(info=post, summaries=[dict(text=' a'), dict(text='a')], choice=0)]
    start = 'SUBREDDIT: r/tifu\nTITLE: {}\nPOST: I did it.'
    sides = [('one', 'two'), ('two', 'one')] * 2
    mirror = [dict(prompt=f'{start.format(i)} ', chosen=f'TL;DR: {chosen}', rejected=f'TL;DR:  {rejected}')
              for i, (chosen, rejected) in enumerate(sides)]
    write_parquet('mirror/data', train=mirror, valid1=mirror[:1], test=mirror[:2])
    write_rows('raw/train.jsonl', raw)
    write_rows('raw/validation.jsonl', raw[:2])
    for source, space, n in (('mirror', '', 1), ('raw', ' ', 2)):
        texts, meta = prepare(config_of('tldr'), f'--source={source}')
        assert len(texts['val']) == n and texts['train'] == [
            [f'{start.format(i)}{space}\nTL;DR:', f' {chosen}{EOT}', f' {rejected}{EOT}']
            for i, (chosen, rejected) in enumerate(sides)]
    assert meta['splits']['train']['dropped'] == {'left_out_by_row': 1, 'identical': 1}     # nobody's mistake


def test_shp_keeps_clear_votes_and_reads_a_subreddit_or_all():
    for sub in ('askbaking', 'askhr'):
        for split in ('train', 'validation', 'test'):       # .json with a line a row, as on the hub
            rows = [dict(history=f'{sub} {split} {i}', human_ref_A='a', human_ref_B='b', labels=i % 2,
                         score_ratio=1 + i / 2) for i in range(5)]
            write_rows(f'shp/{sub}/{split}.json', ''.join(json.dumps(row) + '\n' for row in rows).encode())
    expected = {sub: [[HUMAN.format(prompt=f'{sub} train {i}'), *((f' a{EOT}', f' b{EOT}')[::1 if i % 2 else -1])]
                      for i in (2, 3, 4)]
                for sub in ('askbaking', 'askhr')}
    assert prepare(config_of('shp'), '--source=shp', '--data_dir=askhr')[0]['train'] == expected['askhr']
    texts, meta = prepare(config_of('shp'), '--source=shp')
    assert sorted(texts['train']) == expected['askbaking'] + expected['askhr'] and len(texts['val']) == 6
    assert all('validation' in group[0] for group in texts['val'])
    assert meta['splits']['train']['dropped'] == {'left_out_by_row': 4}


ROW = """name = 'mine'
def row(raw):
    return dict(prompt=raw['q'], chosen=raw['a'][0], rejected=raw['a'][1]) if raw['q'] else None
"""


def test_a_row_function_turns_any_object_into_a_pair_and_changing_it_makes_the_set_anew(capfd):
    Path('mine.py').write_text(ROW)
    write_rows('rows.csv', [*(dict(q=q, a=q * 2) for q in ('xy', 'yx')), dict(q='', a='z')])
    expected = [['xy', f'x{EOT}', f'y{EOT}'], ['yx', f'y{EOT}', f'x{EOT}']]
    groups, meta = prepare_all('mine.py', '--source=rows.csv')
    assert groups == expected and meta['splits']['train']['dropped'] == {'left_out_by_row': 1}
    prepare('mine.py', '--source=rows.csv')
    assert 'data/made is reused' in capfd.readouterr().out
    Path('other.py').write_text('from mine import row\n')               # the file that defines it counts
    sys.path.insert(0, '.')
    try:
        prepare('other.py', '--source=rows.csv')
        assert 'data/made is reused' in capfd.readouterr().out
    finally:
        sys.path.remove('.')
        del sys.modules['mine']
    Path('mine.py').write_text(ROW.replace("['a'][0]", "['a'][:2]"))
    assert prepare_all('mine.py', '--source=rows.csv')[0][0][1] == f'xy{EOT}'
    assert 'its knobs or its source have changed' in capfd.readouterr().out


@pytest.mark.parametrize('source', ['rows.jsonl', 'rows'])
def test_what_a_row_function_raises_is_one_line_with_the_row_and_the_error(source):
    Path('mine.py').write_text(ROW)
    write_rows('rows.jsonl', [dict(q='a', a='bc'), dict(q='b')])
    write_rows('rows/data.jsonl', [dict(q='a', a='bc'), dict(q='b', a=None)])
    where = {'rows.jsonl': "rows.jsonl line 2: KeyError: 'a' (mine.py line 3)",
             'rows': "rows train row 2: TypeError: 'NoneType' object is not subscriptable (mine.py line 3)"}
    assert error_of('mine.py', f'--source={source}', '--max_bad_lines=9') == f'error: row() failed at {where[source]}'
    Path('mine.py').write_text(ROW.replace('rejected', 'reject'))
    write_rows('rows.jsonl', [dict(q='a', a='bc')])
    error = error_of('mine.py', '--source=rows.jsonl')
    assert "rows.jsonl line 1: missing key: it has 'prompt', 'chosen', 'reject'; it needs chosen and rejected" in error
    Path('mine.py').write_text('import functools\nrow = functools.partial(dict)\n')
    assert 'row in the config file must be a function' in error_of('mine.py', '--source=rows.jsonl')


# --- IMDb, with its classifier --------------------------------------------------------------------

def reviews(n, seed):
    """Film reviews in the raw form of IMDb."""
    rng = random.Random(seed)
    words = 'the a film of was really unbelievably disappointing loved naïve 👍 "quoted" 1984 superb awful'.split()
    return [dict(text=' '.join(rng.choices(words, k=30)).capitalize() + '.<br /><br />The end.', label=i % 2)
            for i in range(n)]


def write_imdb(n):
    write_parquet('imdb/plain_text', train=reviews(n, 0), test=reviews(n // 4, 1), unsupervised=reviews(5, 2))


def test_imdb_reviews_are_cut_after_two_to_eight_tokens_by_their_text(gpt2):
    write_imdb(120)
    texts, _ = prepare(config_of('imdb'), '--source=imdb', tokenizer='gpt2')
    whole = [row['text'].replace('<br />', '\n') + EOT for row in reviews(120, 0)]
    assert [prefix + rest for prefix, rest in texts['train']] == whole and len(texts['val']) == 30
    lengths = [len(group[0]) for group in Groups('data/made', 'train')]
    assert set(lengths) == set(range(2, 9)) and Groups('data/made', 'train').labels is None
    assert not any(prefix[-1:].isalnum() and rest[:1].isalnum() for prefix, rest in texts['train'])
    write_parquet('imdb/plain_text', train=reviews(120, 0)[::-1] + [dict(text='Bad', label=0)])
    again, meta = prepare(config_of('imdb'), '--source=imdb', tokenizer='gpt2')
    assert sorted(again['train']) == sorted(texts['train'])             # whatever the order
    assert meta['splits']['train']['dropped'] == {'left_out_by_row': 1}


@pytest.fixture
def tiny_classifier(monkeypatch):
    """A real RoBERTa classifier with a real tokenizer, saved; class 0 is positive. -> p(positive) of one text"""
    transformers = pytest.importorskip('transformers')
    import torch
    from tokenizers import ByteLevelBPETokenizer
    texts = [row['text'] for row in reviews(40, 0)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 400, special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'], show_progress=False)
    os.makedirs('classifier')
    bpe.save('classifier/tokenizer.json')
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file='classifier/tokenizer.json', model_max_length=48, bos_token='<s>', eos_token='</s>',
        cls_token='<s>', sep_token='</s>', unk_token='<unk>', pad_token='<pad>')
    torch.manual_seed(0)
    cfg = transformers.RobertaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1,
        intermediate_size=16, max_position_embeddings=50, id2label={0: 'POSITIVE', 1: 'NEGATIVE'},
        initializer_range=1.0)
    model = transformers.RobertaForSequenceClassification(cfg).eval()
    for part in (model, tokenizer):
        part.save_pretrained('classifier')
    monkeypatch.setenv('IMDB_CLASSIFIER', 'classifier')

    def positive(text):
        with torch.no_grad():
            output = model(**tokenizer(text, truncation=True, max_length=48, return_tensors='pt'))
        return output.logits.double().softmax(-1)[0, 0].item()
    return positive


SMALL = {'prepare_prefs.py config/imdb.py': ['--source=imdb', '--tokenizer=bytes', '--max_length=128', '--max_val=6'],
         'sft.py config/imdb.py': ['--init_from=scratch', '--n_layer=1', '--n_head=1', '--n_embd=16', '--max_steps=2',
                                   '--batch_size=8'],
         'repro/draw_prefs.py --name=imdb_pairs': ['--max_new_tokens=12', '--num_prompts=6', '--device=cpu'],
         'dpo.py config/imdb.py': ['--max_steps=2', '--batch_size=8'],
         'sample.py config/imdb.py': ['--num_prompts=4', '--max_new_tokens=12']}


def test_the_commands_of_imdb_py_run_with_a_classifier_of_hugging_face(tiny_classifier, gpt2, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'repro')
    import dpo
    import draw_prefs
    import prepare_prefs
    import sample
    import sft
    write_imdb(24)
    os.symlink(ROOT / 'config', 'config')
    header = re.search(r'"""(.*?)"""', Path(config_of('imdb')).read_text(), re.S)[1].replace('\\\\\n', ' ')
    commands = [line.split('#')[0].strip() for line in header.split('\n') if line.startswith('    python ')]
    stages = {'prepare_prefs.py': prepare_prefs, 'sft.py': sft, 'repro/draw_prefs.py': draw_prefs, 'dpo.py': dpo,
              'sample.py': sample}
    assert len(commands) == len(SMALL)
    for command, (start, flags) in zip(commands, SMALL.items()):
        _, script, *argv = shlex.split(command)
        assert ' '.join([script, *argv]).startswith(start)
        last = {flag.split('=')[0] for flag in flags}
        stages[script].main([flag for flag in argv if flag.split('=')[0] not in last] + flags)
    printed = capsys.readouterr().out
    groups = Groups('data/imdb_pairs', 'train')
    tokens = load_tokenizer('data/imdb_pairs', 'tokenizer.json')
    assert len(groups) > 12
    for group in groups:
        prompt, chosen, rejected = (text_of(tokens, list(part)) for part in group)
        # alone, where the config has batches
        assert tiny_classifier(prompt + chosen) > tiny_classifier(prompt + rejected)
    shown = re.search(r'true reward\s+([\d.]+).*?([\d.]+)', printed)
    assert shown and 0 < float(shown[1]) < 1


def test_a_classifier_that_cannot_be_had_is_one_line(monkeypatch, tmp_path):
    transformers = pytest.importorskip('transformers')
    monkeypatch.setenv('IMDB_CLASSIFIER', str(tmp_path / 'nowhere'))
    score = rollout.read_reward(config_of('imdb'))
    with pytest.raises(SystemExit, match='nowhere cannot be loaded'):
        score(['a'], ['b'])
    # now a directory without weights and without a tokenizer
    transformers.RobertaConfig(hidden_size=8, num_attention_heads=1).save_pretrained('nowhere')
    with pytest.raises(SystemExit) as stop:
        score(['a'], ['b'])
    assert 'nowhere cannot be loaded' in stop.value.code and '\n' not in stop.value.code
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(SystemExit, match='pip install transformers'):
        rollout.read_reward(config_of('imdb'))(['a'], ['b'])
