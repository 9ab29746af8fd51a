"""Data as people have it: every sort of file and every kind of row becomes the groups that its texts, put together by hand, make."""
import csv
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

import dpo
import prepare_prefs
import sample
import sft
from conftest import ROOT
from prepare_prefs import EOT, Groups, load_tokenizer, prompt_ids, read_meta, render, text_of

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


def write(path, rows):
    """Rows as a file of the sort that its name says; bytes as they are."""
    import pyarrow
    import pyarrow.parquet
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    if isinstance(rows, bytes):
        Path(path).write_bytes(rows)
    elif path.endswith('.parquet'):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.endswith('.gz'):
        write(path[:-3], rows)
        Path(path).write_bytes(gzip.compress(Path(path[:-3]).read_bytes()))
        os.remove(path[:-3])
    elif path.endswith('.csv'):
        with open(path, 'w', newline='', encoding='utf-8') as f:
            table = csv.DictWriter(f, list(rows[0]))
            table.writeheader()
            table.writerows({key: text if isinstance(text, str) else json.dumps(text) for key, text in row.items()} for row in rows)
    else:
        lines = ''.join(json.dumps(row) + '\n' for row in rows)
        Path(path).write_text(json.dumps(rows) if path.endswith('.json') else lines)


def prepare(*flags, name='made', tokenizer='bytes'):
    """Run the stage. -> {split: groups as strings, labels after them}, meta.json"""
    prepare_prefs.main([f'--name={name}', f'--tokenizer={tokenizer}', *flags])
    folder, found = f'data/{name}', {}
    meta = read_meta(folder)
    tokens = load_tokenizer(folder, meta['tokenizer'])
    for split in meta['splits']:
        groups = Groups(folder, split)
        labels = [[]] * len(groups) if groups.labels is None else [[bool(label)] for label in groups.labels]
        found[split] = [[tokens.decode(list(part)) for part in group] + label for group, label in zip(groups, labels)]
    return found, meta


def both(*flags, **options):
    """The groups of train and val together, sorted, and meta.json."""
    found, meta = prepare(*flags, **options)
    return sorted(found['train'] + found['val']), meta


def error_of(*flags, **options):
    """The line with which the stage ends, having changed nothing."""
    before = {path: path.stat().st_mtime_ns for path in Path().glob('data/**/*')}
    with pytest.raises(SystemExit) as stop:
        prepare(*flags, **options)
    assert isinstance(stop.value.code, str) and '\n' not in stop.value.code
    assert {path: path.stat().st_mtime_ns for path in Path().glob('data/**/*') if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()}
    return stop.value.code


# -----------------------------------------------------------------------------
# sorts of files

PAIRS = [dict(prompt=f'{i}, "why"?\n', chosen=['None', ' naïve 👍', '007'][i % 3], rejected=f'NA {i}') for i in range(12)]
TALKS = [dict(chosen=turns(f'q{i}', 'a', 'b?', f'yes {i}'), rejected=turns(f'q{i}', 'a', 'b?', 'no')) for i in range(12)]
OTHERS = [[dict(prompt=f'{i}', completion='c', label=i % 3 == 0) for i in range(12)],
          [dict(prompt=f'{i}', responses=['x', 'y', 'z'], scores=[1, 3.5, -2]) for i in range(12)],
          [dict(prompt=f'{i}', chosen='c', rejected='r', score_chosen=5.0, score_rejected=i) for i in range(12)]]


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


@pytest.mark.parametrize('sort', ['.jsonl', '.json', '.csv', '.parquet', '.jsonl.gz', '.json.gz', '.csv.gz', '/.json', '/.csv',
                                  '/.parquet', 'datasets'])
def test_every_sort_of_file_gives_the_same_groups(sort):
    for rows in (PAIRS, TALKS, *OTHERS):
        if sort == 'datasets':
            write('rows/data/train-00000-of-00001.parquet', rows[3:])
            write('rows/data/test-00000-of-00001.parquet', rows[:3])
        elif sort.startswith('/'):
            write(f'rows/train{sort[1:]}', rows[3:])
            write(f'rows/val{sort[1:]}', rows[:3])
        else:
            write(f'rows{sort}', rows)
        found, meta = prepare(f'--source=rows{sort if sort.startswith(".") else ""}')
        kept = [row for row in rows if row.get('score_rejected', 0) <= 5]
        assert sorted(found['train'] + found['val']) == sorted(map(by_hand, kept))
        assert sum(sum(info['dropped'].values()) for info in meta['splits'].values()) == len(rows) - len(kept)
        if not sort.startswith('.'):
            assert len(found['val']) == 3
        assert meta['template'] == (HUMAN if rows is TALKS else '{prompt}')
        shutil.rmtree('rows', ignore_errors=True)


@pytest.mark.parametrize('path, where', [('rows.json', 'item 3'), ('rows.csv', 'line 4'), ('rows.parquet', 'row 3'),
                                         ('rows.jsonl', 'line 3'), ('rows.jsonl.gz', 'line 3')])
def test_a_bad_row_of_one_s_own_is_named_by_file_and_number_and_can_be_skipped(path, where, capfd):
    rows = [dict(prompt=f'{i}', chosen='c', rejected='r' if i != 2 else 'c') for i in range(6)]
    write(path, rows)
    assert error_of(f'--source={path}').startswith(f"error: {path} {where}: 'chosen' and 'rejected' are the same (")
    found, meta = both(f'--source={path}', '--max_bad_lines=1')
    assert len(found) == 5 and meta['splits']['train']['dropped'] == {'identical': 1}
    assert f'skipped {path} {where}' in capfd.readouterr().err


@pytest.mark.parametrize('path, data, expected', [
    ('x.json', b'', 'of 0 rows'),
    ('x.json', b'[]', 'of 0 rows'),
    ('x.json', b'[{"prompt": "a", "chosen": "b", "rejected": "c"}\n', 'x.json: not JSON'),
    ('x.json', b'[1]', 'x.json item 1: not an object with prompt, chosen, rejected, but int'),
    ('x.json', b'["\xff"]', 'x.json: not UTF-8 at byte 3'),
    ('x.json', b'[' * 100_000, 'x.json: not JSON'),
    ('x.csv', b'', 'x.csv has no line of column names'),
    ('x.csv', b'prompt,prompt\na,b', 'x.csv has no line of column names, in UTF-8 and all different'),
    ('x.csv', 'prompt,chosen\na,b'.encode('utf-16'), 'x.csv has no line of column names, in UTF-8'),
    ('x.csv', b'why?,good,bad\nhow?,fine,worse\n', 'x.csv has columns why?, good, bad; it needs chosen and rejected'),
    ('x.csv', b'prompt;chosen;rejected\na;b;c\n', 'Are its cells separated by commas?'),
    ('x.csv', b'prompt\tchosen\trejected\na\tb\tc\n', 'Are its cells separated by commas?'),
    ('x.jsonl', b'{"question": "a", "good\\n": "b"}\n', "x.jsonl line 1: missing key 'prompt', it has 'question', 'good\\n'"),
    ('x.csv', b'prompt,chosen,rejected\n', 'of 0 rows'),
    ('x.csv', b'prompt,chosen,rejected\na,b,c\nd,"e\n\ne",f\ng,h\n', 'x.csv line 6: 2 cells, the first line names 3 columns'),
    ('x.csv', b'prompt,chosen,rejected\na,b,c\nd,\xff,f\n', 'x.csv line 3: not UTF-8'),
    ('x.csv', b'prompt,chosen,rejected\na,b,c\n"open,b,c\nd,e,f\n', 'x.csv line 3: not CSV'),
    ('x.csv', b'chosen,rejected\n"[{\'role\': \'user\', \'content\': \'a\'}]",b\n', "line 2: 'chosen' begins as messages do, but is"),
    ('x.csv.gz', b'prompt', 'x.csv.gz is damaged'),
    ('x.jsonl.gz', gzip.compress(b'{}' * 1000, mtime=0)[:-9], 'x.jsonl.gz is damaged'),
    ('x.parquet', b'', 'x.parquet cannot be read as Parquet'),
    ('x.parquet', None, 'x.parquet cannot be read as Parquet'),
    ('x.xlsx', b'PK', 'source x.xlsx must be a .jsonl, .json, .csv, .parquet or .py file'),
])
def test_a_broken_file_is_one_line(path, data, expected):
    if data is None:
        write(path, PAIRS)
        data = Path(path).read_bytes()[:-5]
    write(path, data)
    assert expected in error_of(f'--source={path}')


def test_a_folder_of_two_sorts_and_a_data_dir_of_a_file_are_refused():
    write('own/train.jsonl', PAIRS)
    write('own/train.csv', PAIRS)
    assert 'own holds train.jsonl and train.csv: which one?' in error_of('--source=own')
    assert 'data_dir=a is of no use' in error_of('--source=own/train.csv', '--data_dir=a')


def test_a_prompt_is_cut_to_half_of_max_length_where_nothing_else_is_said():
    write('rows.jsonl', [dict(prompt=c * 30, chosen='b' * 30, rejected='d') for c in 'xyz'])
    found, meta = prepare('--source=rows.jsonl', '--max_length=20')
    assert meta['max_prompt_length'] == 10 and [len(group[0]) for group in found['train']] == [10, 10]


def test_max_val_leaves_out_validation_rows_and_says_so():
    write('own/train.json', PAIRS[:6])
    write('own/val.json', PAIRS[6:])
    found, meta = prepare('--source=own', '--max_val=2')
    assert len(found['val']) == 2 and meta['splits']['val']['dropped'] == {'over_max_val': 4} and meta['splits']['val']['read'] == 6
    assert all(group in map(by_hand, PAIRS[6:]) for group in found['val']) and len(found['train']) == 6
    assert prepare('--source=own', '--max_val=9')[1]['splits']['val']['dropped'] == {}


# -----------------------------------------------------------------------------
# messages and the template

SYSTEM = turns('Hi 👍', 'Hello.', 'E\u0301? שלום', system='Be <kind>.')
TEMPLATES = [('', '\n\nHuman: {}\n\nAssistant:', ' '), ('Q: {prompt}\nA: ', 'Q: {}\nA: ', ''), (EOT + 'U {prompt}\n', 'U {}\n', ''),
             ('{prompt}', '{}', ' ')]


@pytest.mark.parametrize('template, user, space', TEMPLATES)
def test_messages_have_the_same_ids_in_training_and_in_sampling(template, user, space):
    write('rows.jsonl', [dict(prompt=SYSTEM, chosen=answer('Yes'), rejected='No'),
                         dict(chosen=turns('a', 'Yes'), rejected=turns('a', 'No'), prompt='a')])
    found, meta = both('--source=rows.jsonl', f'--template={template}')
    new = '' if user.startswith('\n') else '\n'
    first = f'Be <kind>.{new}' + user.format('Hi 👍') + f'{space}Hello.{new}' + user.format('E\u0301? שלום')
    bos = EOT * template.startswith(EOT)
    assert found == sorted([bos + prompt, f'{space}Yes{EOT}', f'{space}No{EOT}'] for prompt in (first, user.format('a')))
    write('asked.jsonl', [dict(prompt=SYSTEM), dict(prompt=turns('a')), dict(prompt='a')])
    folder = 'data/made'
    tokens = load_tokenizer(folder, meta['tokenizer'])
    asked = [prompt_ids(tokens, prompt, meta['template']) for prompt in sample.read_prompts('asked.jsonl')]
    trained = {tuple(group[0]) for split in ('train', 'val') for group in Groups(folder, split)}
    assert set(map(tuple, asked)) == trained and len(trained) == 2
    assert [text_of(tokens, ids) for ids in asked] == [first, user.format('a'), user.format('a')]


def test_a_template_is_the_same_whether_the_shell_left_its_line_breaks_or_not():
    write('rows.jsonl', PAIRS)
    found, meta = both('--source=rows.jsonl', '--template=' + HUMAN)
    again, other = both('--source=rows.jsonl', '--template=' + HUMAN.replace('\n', '\\n'))
    assert found == again and meta['template'] == other['template'] == HUMAN


def test_the_default_template_writes_conversations_as_hh_does():
    assert render(turns('a', 'b', 'c'), HUMAN) == '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
    assert render(turns('a', ' b\n'), HUMAN) == '\n\nHuman: a\n\nAssistant: b\n'
    assert render('\n\nHuman: a\n\nAssistant:', HUMAN) == '\n\nHuman: a\n\nAssistant:' == render('a', HUMAN)


@pytest.mark.parametrize('line, message', [
    ('{"prompt": []}', "'prompt' is not a string, but list"),
    ('{"prompt": [{"role": "user"}]}', "message 1 of 'prompt' is not an object with role and content"),
    (json.dumps(dict(prompt=turns('a', 'b'))), "'prompt' does not end with a turn of the user"),
    (json.dumps(dict(prompt=answer('a'))), "the assistant speaks where it is the user's turn"),
    ('{"messages": []}', "missing key 'prompt'"), ('[' * 100_000, 'not JSON')])
def test_a_bad_prompt_of_messages_is_one_line_in_sampling(line, message):
    Path('asked.jsonl').write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(SystemExit) as stop:
        sample.read_prompts('asked.jsonl')
    assert 'asked.jsonl line 2' in stop.value.code and message in stop.value.code and '\n' not in stop.value.code


@pytest.mark.parametrize('row, reason, message', [
    (dict(chosen=turns('a', 'b'), rejected=turns('c', 'd')), 'prompts_differ', 'the two sides have different prompts'),
    (dict(chosen=turns('a', 'b', system='s'), rejected=turns('a', 'c')), 'prompts_differ', 'the two sides have different prompts'),
    (dict(prompt=turns('z'), chosen=turns('a', 'b'), rejected=turns('a', 'c')), 'prompts_differ', "'chosen' does not begin as 'prompt'"),
    (dict(chosen=turns('a'), rejected=turns('a')), 'no_assistant_turn', "'chosen' does not end with a turn of the assistant"),
    (dict(chosen=turns('a', 'b', system='s')[::-1], rejected=turns('a', 'b')), 'missing_key', "missing key 'prompt'"),
    (dict(chosen=turns('a', 'b') + turns(system='s'), rejected=turns('a', 'b')), 'not_in_turn', "'chosen': the system speaks"),
    (dict(chosen=turns('a') + turns('b', 'c'), rejected=turns('a', 'b')), 'not_in_turn', "the user speaks where it is the assistant's"),
    (dict(chosen=answer('b'), rejected=answer('c')), 'missing_key', "missing key 'prompt'"),
    (dict(chosen=[dict(role='tool', content='x')], rejected=answer('c')), 'unknown_role', "has the role 'tool', not system, user or"),
    (dict(chosen=[dict(role='user')], rejected=answer('c')), 'not_a_message', 'not an object with role and content'),
    (dict(chosen=turns('a') + ['b'], rejected=answer('c')), 'not_a_message', "message 2 of 'chosen' is not an object"),
    (dict(chosen=turns('a', None), rejected=turns('a', 'c')), 'not_a_string', "content of message 2 of 'chosen' is not a string, but No"),
    (dict(chosen=turns('a', '\ud800'), rejected=turns('a', 'c')), 'not_unicode', 'holds half a character'),
    (dict(chosen=turns('a', ' \n'), rejected=turns('a', 'c')), 'empty_response', "empty 'chosen'"),
    (dict(chosen=turns('a', 'c'), rejected=turns('a', 'c')), 'identical', 'are the same'),
    (dict(chosen=turns('a', 'c')), 'missing_key', "missing key 'rejected'"),
])
def test_a_bad_conversation_is_one_line_and_its_reason_has_a_name(row, reason, message):
    good = [dict(chosen=turns(f'{i}', 'b'), rejected=turns(f'{i}', 'd')) for i in range(3)]
    write('rows.jsonl', [*good, row])
    error = error_of('--source=rows.jsonl')
    assert error.startswith('error: rows.jsonl line 4: ') and message in error
    assert prepare('--source=rows.jsonl', '--max_bad_lines=1')[1]['splits']['train']['dropped'] == {reason: 1}


def test_what_datasets_saves_with_save_to_disk_is_read_with_splits_or_alone():
    import datasets
    rows = datasets.Dataset.from_list(PAIRS)
    rows.save_to_disk('alone')
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk('several')
    splits = {name: prepare('--source=' + name)[1]['splits'] for name in ('alone', 'several')}
    assert sum(splits['alone'][split]['kept'] for split in ('train', 'val')) == len(PAIRS)
    assert [splits['several'][split]['kept'] for split in ('train', 'val')] == [len(PAIRS), 1]


def test_rankings_examples_and_demonstrations_take_messages_too():
    write('rows.jsonl', [dict(prompt=turns(f'{i}'), responses=[answer('a'), 'b', turns(f'{i}', 'c')]) for i in range(4)])
    asked = [HUMAN.format(prompt=i) for i in range(4)]
    assert both('--source=rows.jsonl')[0] == [[prompt, f' a{EOT}', f' b{EOT}', f' c{EOT}'] for prompt in asked]
    write('rows.jsonl', [dict(prompt=turns(f'{i}'), completion=answer('a'), label=i > 1) for i in range(4)])
    assert both('--source=rows.jsonl')[0] == [[prompt, f' a{EOT}', i > 1] for i, prompt in enumerate(asked)]
    write('rows.jsonl', [dict(messages=turns(f'{i}', 'a')) for i in range(4)])
    assert both('--source=rows.jsonl')[0] == [[prompt, f' a{EOT}'] for prompt in asked]
    write('rows.jsonl', [dict(prompt=f'{i}', completion='a') for i in range(4)])
    found, meta = both('--source=rows.jsonl')
    assert found == [[f'{i}', f'a{EOT}'] for i in range(4)] and meta['template'] == '{prompt}'
    assert Groups('data/made', 'train').labels is None and Groups('data/made', 'train', k=1).K == 1


@pytest.mark.parametrize('first, other, message', [
    (PAIRS[0], TALKS[0], 'holds messages, the first row has none'),
    (dict(chosen='Q: a', rejected='Q: b'), PAIRS[0], "has 'prompt', the first row has none"),
    (dict(prompt='a', completion='b'), dict(prompt='a', completion='b', label=True), "has 'label', the first row has none")])
def test_a_row_of_another_kind_than_the_first_is_not_read_as_if_it_were_one(first, other, message):
    write('rows.jsonl', [first, other])
    assert message in error_of('--source=rows.jsonl')


# -----------------------------------------------------------------------------
# prompts that are not said, scores, names

@pytest.mark.parametrize('chosen, rejected, prompt', [
    ('Q: why?\nA: Because', 'Q: why?\nA: Bananas', 'Q: why?\nA:'),          # not inside a word; the space is the response's
    ('Q: why?\nYes', 'Q: why?\nNo', 'Q: why?\n'),
    ('One two', 'One two three', 'One'),                                    # no response is empty
    ('One twofold', 'One two', 'One'),
    ('Frage:\tja', 'Frage:\tjein', 'Frage:\t'),
    ('問い：はい', '問い：はて', '問い：'),
    ('Why? 👍🏽 a', 'Why? 👍🏿 b', 'Why?'),                                    # nor inside a character
    ('it costs 3.14', 'it costs 3.15', 'it costs'),
    ('say "ab', 'say "ac', 'say'),
    ('abc', 'abd', None), ('x', 'y', None), (' a', ' b', None)])
def test_a_prompt_that_both_sides_begin_with_ends_where_words_do(chosen, rejected, prompt):
    fine = [dict(chosen=f'Ask {i}: yes', rejected=f'Ask {i}: no') for i in range(2)]
    write('rows.jsonl', [*fine, dict(chosen=chosen, rejected=rejected)])
    if prompt is None:
        assert 'no beginning in common' in error_of('--source=rows.jsonl')
        assert prepare('--source=rows.jsonl', '--max_bad_lines=1')[1]['splits']['train']['dropped'] == {'no_common_prompt': 1}
        return
    group = [prompt, chosen[len(prompt):] + EOT, rejected[len(prompt):] + EOT]
    assert group in both('--source=rows.jsonl')[0] and chosen.startswith(prompt) and rejected.startswith(prompt)


def test_a_gap_of_scores_drops_by_rule_and_bad_scores_are_bad_lines():
    rows = [dict(prompt=f'{i}', chosen='c', rejected='r', score_chosen=i, score_rejected=2.5) for i in range(6)]
    write('rows.jsonl', rows)
    assert [group[0] for group in both('--source=rows.jsonl')[0]] == ['3', '4', '5']
    found, meta = both('--source=rows.jsonl', '--min_gap=1.5')
    assert [group[0] for group in found] == ['4', '5'] and meta['splits']['train']['dropped'] == {'score_gap': 4}
    for bad in (None, 'x', True, float('nan'), float('inf'), 10 ** 400):
        write('rows.jsonl', [*rows, dict(rows[0], score_rejected=bad)])
        assert "line 7: 'score_rejected' holds" in error_of('--source=rows.jsonl')
    write('rows.jsonl', [*rows, {key: rows[0][key] for key in ('prompt', 'chosen', 'rejected', 'score_chosen')}])
    assert "line 7: missing key 'score_rejected'" in error_of('--source=rows.jsonl')
    for rows in (PAIRS, OTHERS[0]):
        write('rows.jsonl', rows)
        assert 'min_gap=1 needs pairs with score_chosen and score_rejected; rows.jsonl has prompt, ' in error_of(
            '--source=rows.jsonl', '--min_gap=1')


def test_columns_are_renamed_swapped_and_a_wrong_name_is_one_line():
    write('rows.csv', [dict(question=f'{i}', good='c', bad='r', prompt='not this') for i in range(4)])
    names = '--columns=prompt=question, chosen=good,rejected=bad'
    assert both('--source=rows.csv', names)[0] == [[f'{i}', f'c{EOT}', f'r{EOT}'] for i in range(4)]
    write('swapped.jsonl', [dict(prompt=f'{i}', chosen='c', rejected='r') for i in range(4)])
    found, _ = both('--source=swapped.jsonl', '--columns=chosen=rejected,rejected=chosen')
    assert found == [[f'{i}', f'r{EOT}', f'c{EOT}'] for i in range(4)]
    for columns, message in (('promt=question', "unknown name 'promt' of ours; did you mean 'prompt'?"),
                             ('prompt=questoin', "rows.csv has no 'questoin'; did you mean 'question'?"),
                             ('prompt=question,prompt=good', "'prompt' stands there twice"),
                             ('prompt=question,chosen=question', "'question' stands there twice"),
                             ('prompt', "'prompt' must be written ours=theirs")):
        shutil.rmtree('data', ignore_errors=True)
        assert message in error_of('--source=rows.csv', f'--columns={columns}')
    write('rows.jsonl', [dict(q='a', chosen='c', rejected='r'), dict(prompt='b', chosen='c', rejected='r')])
    assert "rows.jsonl line 2: missing key 'q'" in error_of('--source=rows.jsonl', '--columns=prompt=q')


# -----------------------------------------------------------------------------
# ready sources, in the hub's layout

def test_hh_takes_each_subset_or_all_four_and_red_team_attempts_are_no_pairs():
    subsets = ['harmless-base', 'helpful-base', 'helpful-online', 'helpful-rejection-sampled']
    for subset in subsets:
        for split in ('train', 'test'):
            ask = f'\n\nHuman: {subset} {split}\n\nAssistant:'
            write(f'hh/{subset}/{split}.jsonl.gz', [dict(chosen=f'{ask} yes', rejected=f'{ask} no')])
    write('hh/red-team-attempts/red_team_attempts.jsonl.gz', [dict(transcript='\n\nHuman: a\n\nAssistant: b', rating=1.0)])
    found, _ = prepare('--source=hh')
    assert sorted(found['train']) == [[HUMAN.format(prompt=f'{subset} train'), f' yes{EOT}', f' no{EOT}'] for subset in subsets]
    assert len(found['val']) == 4
    found, meta = prepare('--source=hh', '--data_dir=helpful-online')
    assert meta['template'] == HUMAN, 'a plain question is framed as the dialogues are'
    assert [group[0] for group in found['train'] + found['val']] == [HUMAN.format(prompt=f'helpful-online {s}') for s in ('train', 'test')]
    assert "red-team-attempts are, not pairs: set another --data_dir" in error_of(
        '--source=hh', '--data_dir=red-team-attempts', name='other')


def test_the_dirt_of_hh_is_counted_and_no_mistake_of_the_user_s_in_a_file_of_his_own(capfd):
    ask = '\n\nHuman: {}\n\nAssistant:'.format
    rows = [(ask(1) + ' a', ask(1) + ' b'), (ask(2) + ' a', ask(2) + ' b'), (ask(3) + ' a', ask(4) + ' b'), (ask(5), ask(5) + ' b')]
    write('hh.jsonl', [dict(chosen=chosen, rejected=rejected) for chosen, rejected in rows])
    found, meta = both('--source=hh.jsonl')
    assert found == [[ask(i), f' a{EOT}', f' b{EOT}'] for i in (1, 2)] and capfd.readouterr().err == ''
    assert meta['splits']['train']['dropped'] == {'empty_response': 1, 'prompts_differ': 1}
    Path('hh.jsonl').write_text(Path('hh.jsonl').read_text() + '{"chosen": "a"}\n')
    assert "hh.jsonl line 5: missing key 'rejected'" in error_of('--source=hh.jsonl')


def test_ultrafeedback_takes_the_prefs_splits():
    rows = [dict(prompt=f'q{i}', prompt_id='x', messages=turns('m', 'm'), chosen=turns(f'q{i}', 'good'),
                 rejected=turns(f'q{i}', 'bad'), score_chosen=7.0, score_rejected=5.0 + i) for i in range(4)]
    for split, part in (('train_prefs', rows), ('test_prefs', rows[:1]), ('train_sft', rows[:2]), ('test_gen', rows[:2])):
        write(f'uf/data/{split}-00000-of-00001.parquet', part)
    found, meta = prepare('--source=uf')
    assert found == {'train': [[HUMAN.format(prompt=f'q{i}'), f' good{EOT}', f' bad{EOT}'] for i in range(3)],
                     'val': [[HUMAN.format(prompt='q0'), f' good{EOT}', f' bad{EOT}']]}
    assert meta['splits']['train']['dropped'] == {'score_gap': 1}


def test_tldr_comparisons_and_their_mirror_become_the_same_groups():
    post = dict(id='x', post='I did it. ', title='Oh', subreddit='tifu', article=None)
    raw = [dict(info=dict(post, title=f'{i}'), summaries=[dict(text=' one\n', policy='p'), dict(text='two', policy='q')], choice=i % 2)
           for i in range(4)] + [dict(info=dict(post, post=None, article='news'), summaries=[dict(text='a'), dict(text='b')], choice=0)]
    mirror = [dict(prompt=f'SUBREDDIT: r/tifu\nTITLE: {i}\nPOST: I did it. ', chosen=f'TL;DR: {("one", "two")[i % 2]}',
                   rejected=f'TL;DR:  {("two", "one")[i % 2]}') for i in range(4)]
    expected = [[f'SUBREDDIT: r/tifu\nTITLE: {i}\nPOST: I did it.{{}}\nTL;DR:', f' {("one", "two")[i % 2]}{EOT}',
                 f' {("two", "one")[i % 2]}{EOT}'] for i in range(4)]
    for split in ('train', 'valid1', 'test'):
        write(f'mirror/data/{split}-00000-of-00001.parquet', mirror if split == 'train' else mirror[:1 if split == 'valid1' else 2])
    found, _ = prepare('--source=mirror')
    assert found['train'] == [[group[0].format(''), *group[1:]] for group in expected] and len(found['val']) == 1
    write('raw/train.jsonl', raw)
    write('raw/validation.jsonl', raw[:2])
    found, meta = prepare('--source=raw')
    assert found['train'] == [[group[0].format(' '), *group[1:]] for group in expected] and len(found['val']) == 2
    assert meta['splits']['train']['dropped'] == {'no_post': 1}


def test_shp_keeps_clear_votes_and_reads_a_subreddit_or_all():
    for sub in ('askbaking', 'askhr'):
        for split in ('train', 'validation', 'test'):       # .json with a line a row, as on the hub
            rows = [dict(history=f'{sub} {split} {i}', human_ref_A='a', human_ref_B='b', labels=i % 2, score_ratio=1 + i / 2)
                    for i in range(5)]
            write(f'shp/{sub}/{split}.json', ''.join(json.dumps(row) + '\n' for row in rows).encode())
    expected = {sub: [[HUMAN.format(prompt=f'{sub} train {i}'), *((f' a{EOT}', f' b{EOT}')[::1 if i % 2 else -1])] for i in (2, 3, 4)]
                for sub in ('askbaking', 'askhr')}
    assert prepare('--source=shp', '--data_dir=askhr')[0]['train'] == expected['askhr']
    found, meta = prepare('--source=shp')
    assert sorted(found['train']) == expected['askbaking'] + expected['askhr'] and len(found['val']) == 6
    assert all('validation' in group[0] for group in found['val']) and meta['splits']['train']['dropped'] == {'score_ratio': 4}


def reviews(n, seed):
    """Film reviews in the raw form of IMDb."""
    rng = random.Random(seed)
    words = 'the a film of was really unbelievably disappointing loved naïve 👍 "quoted" 1984 superb awful'.split()
    return [dict(text=' '.join(rng.choices(words, k=30)).capitalize() + '.<br /><br />The end.', label=i % 2) for i in range(n)]


def write_imdb(n):
    for split, rows in (('train', reviews(n, 0)), ('test', reviews(n // 4, 1)), ('unsupervised', reviews(5, 2))):
        write(f'imdb/plain_text/{split}-00000-of-00001.parquet', rows)


def test_imdb_reviews_are_cut_after_two_to_eight_tokens_by_seed_and_text():
    pytest.importorskip('tiktoken')
    if not os.path.isdir(os.environ.get('TIKTOKEN_CACHE_DIR', '')):
        pytest.skip('no cached GPT-2 tokenizer')
    write_imdb(120)
    found, meta = prepare('--source=imdb', tokenizer='gpt2')
    whole = [row['text'].replace('<br />', '\n') + EOT for row in reviews(120, 0)]
    assert [prefix + rest for prefix, rest in found['train']] == whole and len(found['val']) == 30
    lengths = [len(group[0]) for group in Groups('data/made', 'train')]
    assert set(lengths) == set(range(2, 9)) and Groups('data/made', 'train').labels is None
    assert not any(prefix[-1:].isalnum() and rest[:1].isalnum() for prefix, rest in found['train'])
    write('imdb/plain_text/train-00000-of-00001.parquet', reviews(120, 0)[::-1])
    assert sorted(prepare('--source=imdb', tokenizer='gpt2')[0]['train']) == sorted(found['train'])     # whatever the order
    assert sorted(prepare('--source=imdb', '--seed=1', tokenizer='gpt2')[0]['train']) != sorted(found['train'])


@pytest.fixture
def tiny_classifier(monkeypatch):
    """A real RoBERTa classifier with a real tokenizer, saved; its positive class is number 0. -> p(positive) of one text"""
    transformers = pytest.importorskip('transformers')
    import torch
    from tokenizers import ByteLevelBPETokenizer
    texts = [row['text'] for row in reviews(40, 0)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 400, special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'], show_progress=False)
    os.makedirs('classifier')
    bpe.save('classifier/tokenizer.json')
    special = dict(bos_token='<s>', eos_token='</s>', cls_token='<s>', sep_token='</s>', unk_token='<unk>', pad_token='<pad>')
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file='classifier/tokenizer.json', model_max_length=48, **special)
    torch.manual_seed(0)
    cfg = transformers.RobertaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=50, pad_token_id=1, id2label={0: 'POSITIVE', 1: 'NEGATIVE'}, initializer_range=1.0)
    model = transformers.RobertaForSequenceClassification(cfg).eval()
    model.save_pretrained('classifier')
    tokenizer.save_pretrained('classifier')
    monkeypatch.setenv('IMDB_CLASSIFIER', 'classifier')

    def positive(text):
        with torch.no_grad():
            found = model(**tokenizer(text, truncation=True, max_length=48, return_tensors='pt'))
        return found.logits.double().softmax(-1)[0, 0].item()
    return positive


SMALL = {'prepare_prefs.py config/imdb.py': ['--source=imdb', '--tokenizer=bytes', '--max_length=128', '--max_val=6'],
         'sft.py config/imdb.py': ['--init_from=scratch', '--n_layer=1', '--n_head=1', '--n_embd=16', '--max_steps=2', '--batch_size=8'],
         'prepare_prefs.py --name=imdb_pairs': ['--max_new_tokens=12', '--num_prompts=6', '--device=cpu'],
         'dpo.py config/imdb.py': ['--max_steps=2', '--batch_size=8'],
         'sample.py config/imdb.py': ['--num_prompts=4', '--max_new_tokens=12']}


def test_the_commands_of_imdb_py_run_with_a_classifier_of_hugging_face(tiny_classifier, capsys):
    write_imdb(24)
    os.symlink(ROOT / 'config', 'config')
    header = re.search(r'"""(.*?)"""', (ROOT / 'config' / 'imdb.py').read_text(), re.S)[1].replace('\\\\\n', ' ').replace('\\\n', ' ')
    commands = [line.split('#')[0].strip() for line in header.split('\n') if line.startswith('    python ')]
    stages = {'prepare_prefs.py': prepare_prefs, 'sft.py': sft, 'dpo.py': dpo, 'sample.py': sample}
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
        assert tiny_classifier(prompt + chosen) > tiny_classifier(prompt + rejected)    # alone, where the config has batches
    shown = re.search(r'true reward\s+([\d.]+).*?([\d.]+)', printed)
    assert shown and 0 < float(shown[1]) < 1


def test_a_classifier_that_cannot_be_had_is_one_line(monkeypatch, tmp_path):
    transformers = pytest.importorskip('transformers')
    monkeypatch.setenv('IMDB_CLASSIFIER', str(tmp_path / 'nowhere'))
    score = prepare_prefs.read_reward(str(ROOT / 'config' / 'imdb.py'))
    with pytest.raises(SystemExit, match='nowhere cannot be loaded'):
        score(['a'], ['b'])
    transformers.RobertaConfig(hidden_size=8, num_attention_heads=1).save_pretrained('nowhere')     # no weights, no tokenizer
    with pytest.raises(SystemExit) as stop:
        score(['a'], ['b'])
    assert 'nowhere cannot be loaded' in stop.value.code and '\n' not in stop.value.code


def test_a_reward_that_cannot_be_had_ends_the_run_before_anything_is_drawn(monkeypatch):
    write('rows.jsonl', PAIRS)
    prepare('--source=rows.jsonl', '--max_length=64', '--max_prompt_length=16', name='asked')
    sft.main(['--name=asked', '--init_from=scratch', '--n_layer=1', '--n_head=1', '--n_embd=8', '--max_steps=1', '--device=cpu'])
    Path('reward.py').write_text('def reward(prompts, responses):\n    raise OSError("no model")')
    monkeypatch.setattr('model.GPT.generate', lambda *_: pytest.fail('it has drawn'))
    with pytest.raises(SystemExit, match='reward file reward.py: OSError: no model'):
        prepare_prefs.main(['--name=drawn', '--source=data/asked', '--policy=out/asked/sft', '--reward=reward.py', '--device=cpu'])


def test_a_classifier_without_transformers_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(SystemExit, match='pip install transformers'):
        prepare_prefs.read_reward(str(ROOT / 'config' / 'imdb.py'))(['a'], ['b'])
