"""The shapes of data that people have: the exact ids that come out of each, and what must never pass in silence."""
import gzip
import json
import random
import re
from pathlib import Path

import pytest

from conftest import ROOT, SHARED, error_of, prepare, prepare_all, write_rows
from nanodpo.data import Groups
from nanodpo.text import EOT
from test_tokenizers import CHATML, make

DEMOS = SHARED / 'data' / 'demos'


@pytest.fixture(autouse=True)
def in_a_fresh_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def said(role, content):
    return dict(role=role, content=content)


def shared(role, content):
    return {'from': role, 'value': content}


def ids(text):
    """A text in bytes; 256 is the end token."""
    return [256 if piece == EOT else byte for piece in re.split(f'({re.escape(EOT)})', text)
            for byte in ([0] if piece == EOT else piece.encode())]


def human(*turns):
    """A prompt in the frame of HH: the user's and the assistant's texts in turn."""
    texts = [f'\n\nHuman: {text}\n\nAssistant:' if i % 2 == 0 else f' {text}' for i, text in enumerate(turns)]
    return ''.join(texts)


def made(*flags, tokenizer='bytes'):
    """prepare, with all groups as [prompt ids, response ids, ..., label if there is one]; and meta.json."""
    _, meta = prepare(*flags, tokenizer=tokenizer)
    groups = []
    for split in ('train', 'val'):
        part = Groups('data/made', split)
        labels = [[]] * len(part) if part.labels is None else [[bool(label)] for label in part.labels]
        groups += [[piece.tolist() for piece in group] + label for group, label in zip(part, labels)]
    return groups, meta


# --- the table: a row, its prompt, its responses, its label, and where the parts come from in words ---

def user(text):
    return said('user', text)


def assistant(text):
    return said('assistant', text)


TALK = [user('a'), assistant('b'), user('c?')]
YES, NO = [*TALK, assistant('yes')], [*TALK, assistant('no')]
THREE = human('a', 'b', 'c?')
PARTS = [dict(type='text', text='yes'), dict(type='text', text=' sir')]
SIDES = "chosen from 'chosen', rejected from 'rejected'"
UP_TO = "'messages' up to its last turn"
SHAPES = {      # name: (row, prompt, chosen, rejected or label, the sentence)
    'a pair of texts': (
        dict(prompt='Q: c? A:', chosen=' yes', rejected=' no'),
        'Q: c? A:', ' yes', ' no', f"prompt from 'prompt', {SIDES}"),
    'dialogues': (
        dict(chosen=THREE + ' yes', rejected=THREE + ' no'),
        THREE, ' yes', ' no', "prompt and responses from the dialogues 'chosen' and 'rejected'"),
    'conversations': (
        dict(chosen=YES, rejected=NO),
        THREE, ' yes', ' no', f"prompt from 'chosen' up to its last turn, {SIDES}"),
    'ShareGPT': (
        dict(conversations=[shared('system', 's'), shared('human', 'c?')], chosen=shared('gpt', 'yes'),
             rejected=shared('gpt', 'no')),
        's' + human('c?'), ' yes', ' no', f"prompt from 'conversations', {SIDES}"),
    'one message a side and a prompt': (
        dict(prompt='c?', chosen=assistant('yes'), rejected=assistant('no')),
        human('c?'), ' yes', ' no', f"prompt from 'prompt', {SIDES}"),
    'one message a side and a context': (
        dict(context=TALK, chosen=assistant('yes'), rejected=assistant('no')),
        THREE, ' yes', ' no', f"prompt from 'context', {SIDES}"),
    'Alpaca': (
        dict(instruction='Fix it.', input='freind', chosen='friend', rejected='frend'),
        human('Fix it.\nfreind'), ' friend', ' frend', f"prompt from 'instruction' + 'input', {SIDES}"),
    'Alpaca of good and bad': (
        dict(instruction='Fix it.', input='freind', output=['friend', 'frend']),
        human('Fix it.\nfreind'), ' friend', ' frend',
        "prompt from 'instruction' + 'input', chosen from 'output'[0], rejected from 'output'[1]"),
    'Alpaca with a system turn and a history': (
        dict(instruction='c?', input='', system='s', history=[['a', 'b']], chosen='yes', rejected='no'),
        's' + THREE, ' yes', ' no', f"prompt from 'system' + 'history' + 'instruction' + 'input', {SIDES}"),
    'orca': (
        dict(system='s', question='c?', chosen='yes', rejected='no'),
        's' + human('c?'), ' yes', ' no', f"prompt from 'system' + 'question', {SIDES}"),
    'j and k': (
        dict(question='c?', response_j='yes', response_k='no'),
        human('c?'), ' yes', ' no', "prompt from 'question', chosen from 'response_j', rejected from 'response_k'"),
    'ms-swift': (
        dict(messages=YES, rejected_response='no'),
        THREE, ' yes', ' no', f"prompt from {UP_TO}, chosen from 'messages', rejected from 'rejected_response'"),
    'ms-swift of messages': (
        dict(messages=YES, rejected_messages=NO),
        THREE, ' yes', ' no', f"prompt from {UP_TO}, chosen from 'messages', rejected from 'rejected_messages'"),
    'KTO of messages': (
        dict(messages=YES, label=True),
        THREE, ' yes', True, f"prompt from {UP_TO}, response from 'messages', label from 'label'"),
    'KTO with a tag': (
        dict(messages=[user('c?'), assistant('yes')], kto_tag='False'),
        human('c?'), ' yes', False, f"prompt from {UP_TO}, response from 'messages', label from 'kto_tag'"),
    'KTO of Alpaca, with 0 and 1': (
        dict(instruction='c?', output='yes', label=0),
        human('c?'), ' yes', False, "prompt from 'instruction', response from 'output', label from 'label'"),
    'a label in words': (
        dict(prompt='c? ', completion='yes', label=' TRUE'),
        'c? ', 'yes', True, "prompt from 'prompt', response from 'completion', label from 'label'"),
    'messages in JSON': (
        dict(chosen=json.dumps(YES), rejected=json.dumps(NO)),
        THREE, ' yes', ' no', f"prompt from 'chosen' up to its last turn, {SIDES}"),
    'a list of texts as content': (
        dict(prompt=[user([dict(type='text', text='c?')])], chosen=[assistant(PARTS)], rejected='no'),
        human('c?'), ' yes sir', ' no', f"prompt from 'prompt', {SIDES}"),
    'names of roles': (
        dict(prompt=[said('developer', 's'), said('Human', 'c?')], chosen=[said('Assistant', 'yes')],
             rejected=[said('gpt', 'no')]),
        's' + human('c?'), ' yes', ' no', f"prompt from 'prompt', {SIDES}"),
    'a demonstration': (
        dict(instruction='c?', input='', output='yes'),
        human('c?'), ' yes', None, "prompt from 'instruction' + 'input', response from 'output'"),
    'messages that are asked': (
        dict(messages=TALK, chosen=assistant('yes'), rejected='no'),
        THREE, ' yes', ' no', f"prompt from 'messages', {SIDES}"),
    'KTO of ShareGPT': (
        dict(conversations=[shared('human', 'c?'), shared('gpt', 'yes')], label='1.0'),
        human('c?'), ' yes', True,
        "prompt from 'conversations' up to its last turn, response from 'conversations', label from 'label'"),
    'a prompt that both sides say again': (
        dict(prompt='c?', chosen=[said('system', 's'), *YES], rejected=[said('system', 's'), *NO]),
        's' + THREE, ' yes', ' no', f"prompt from 'chosen' up to its last turn, {SIDES}"),
    'a ranking with scores': (
        dict(question='c?', responses=['no', 'yes'], scores=[-1, 0.5]),
        human('c?'), ' yes', ' no', "prompt from 'question', responses from 'responses', sorted by 'scores'"),
    'messages with more keys': (
        dict(chosen=[user('c?') | dict(name='Bo', weight=0, tool_calls=None), assistant('yes') | dict(weight=1)],
             rejected=[user('c?') | dict(weight=2), assistant('no') | dict(tool_calls=[], tool_call_id=None)]),
        human('c?'), ' yes', ' no', f"prompt from 'chosen' up to its last turn, {SIDES}"),
    'JSON that is an answer': (
        dict(prompt='c? ', chosen='{"role": "king"}', rejected='[{"from": 3}]'),
        'c? ', '{"role": "king"}', '[{"from": 3}]', f"prompt from 'prompt', {SIDES}"),
}


@pytest.mark.parametrize('sort', ['jsonl', 'parquet'])
@pytest.mark.parametrize('name', SHAPES)
def test_a_shape_gives_these_ids(name, sort, capfd):
    row, prompt, chosen, other, sentence = SHAPES[name]
    if sort == 'parquet' and name in ('a list of texts as content', 'messages with more keys'):
        pytest.skip('a column of Parquet has one type')

    def numbered(text, i):
        return text.replace('c?', f'c{i}?').replace('Fix', f'Fix{i}')

    write_rows(f'rows.{sort}', [json.loads(numbered(json.dumps(row), i)) for i in range(4)])
    groups, meta = made(f'--source=rows.{sort}')
    end = [] if other is None else [other] if isinstance(other, bool) else [ids(other + EOT)]
    assert sorted(groups) == sorted([ids(numbered(prompt, i)), ids(chosen + EOT), *end] for i in range(4))
    assert sentence in capfd.readouterr().out.splitlines()
    assert not any('not read' in note for note in meta['notes'])


CALL = dict(type='function', function=dict(name='look_up', arguments='{"city": "Lima"}'))
TOOLS = [user('Warm?'), dict(role='assistant', content=None, tool_calls=[CALL]), said('tool', '31 degrees'),
         assistant('Yes.')]
SHAREGPT_TOOLS = [shared('human', 'Warm?'), shared('function_call', json.dumps(CALL['function'])),
                  shared('observation', '31 degrees'), shared('gpt', 'Yes.')]
KNOWS_TOOLS = CHATML.replace("message.content + '<", "(message.content or (message.tool_calls | tojson)) + '<")


@pytest.mark.parametrize('talk', [TOOLS, SHAREGPT_TOOLS], ids=['OpenAI', 'ShareGPT'])
@pytest.mark.parametrize('template', ['', CHATML, KNOWS_TOOLS], ids=['text', 'no calls', 'calls'])
def test_turns_of_tools_are_written_by_the_template_or_the_row_is_dropped_and_counted(talk, template, capfd):
    rows = [dict(messages=[user(f'{i}?'), assistant('So.')], rejected_response='No.') for i in range(4)]
    write_rows('rows.jsonl', [*rows, dict(messages=talk, rejected_response='No.')])
    tokenizer = 'bytes'
    if template:
        names = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
        tokenizer = make(Path('chat').absolute(), names, dict(eos_token='<|endoftext|>'), template)
    texts, meta = prepare('--source=rows.jsonl', tokenizer=tokenizer)
    prompts = [group[0] for split in texts for group in texts[split]]
    dropped = sum(info['dropped'].get('tool_turns', 0) for info in meta['splits'].values())
    if template is KNOWS_TOOLS:
        assert dropped == 0 and len(prompts) == 5
        assert any('look_up' in prompt and '31 degrees' in prompt for prompt in prompts)
    else:
        assert dropped == 1 and len(prompts) == 4
        assert 'dropped: tool_turns' in capfd.readouterr().out


@pytest.mark.parametrize('call', [
    dict(role='assistant', content=None, function_call=CALL['function']), dict(role='assistant', tool_calls=CALL),
    dict(role='assistant', tool_calls='look_up()'), dict(role='assistant', tool_calls=[dict(id='1')]),
    dict(role='assistant', tool_calls=[7]), shared('function_call', 'look_up()'), shared('function_call', '[]'),
    shared('tool_call', json.dumps([CALL['function']])), dict(role='assistant', tool_calls=[dict(CALL, id='\ud800')])])
def test_a_call_in_any_form_is_a_turn_of_tools_and_never_a_traceback(call):
    rows = [dict(prompt=f'{i}?', chosen=assistant('So.'), rejected=assistant('No.')) for i in range(4)]
    rows.append(dict(prompt=[user('Warm?'), call, said('tool', '31')], chosen=assistant('So.'), rejected='No.'))
    write_rows('rows.jsonl', rows)
    names = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    chat = make(Path('chat').absolute(), names, dict(eos_token='<|endoftext|>'), CHATML)
    for tokenizer in ('bytes', chat):
        _, meta = prepare('--source=rows.jsonl', '--max_bad_lines=1', tokenizer=tokenizer)
        assert meta['splits']['train']['dropped'] == {'tool_turns': 1}


def test_in_parquet_a_message_has_the_keys_of_all_as_nulls():
    ask = [dict(message, tool_calls=None) for message in (user('Hi?'), assistant('So.'))]
    talk = [dict(role=None, content=None, tool_calls=None) | turn for turn in TOOLS]
    rows = [dict(messages=[ask[0] | dict(content=f'{i}?'), ask[1]], rejected_response='No.') for i in range(4)]
    write_rows('rows.parquet', [*rows, dict(messages=talk, rejected_response='No.')])
    groups, meta = made('--source=rows.parquet')
    assert len(groups) == 4 and meta['splits']['train']['dropped'] == {'tool_turns': 1}


@pytest.mark.parametrize('nothing', [None, '', [], 'no key'], ids=str)
@pytest.mark.parametrize('full', [dict(system='s'), dict(history=[['a', 'b']])], ids=['system', 'history'])
@pytest.mark.parametrize('asked', ['prompt', 'question'])
def test_an_optional_column_may_be_empty_in_some_rows_in_any_order(asked, full, nothing):
    name, = full
    bare = {} if nothing == 'no key' else {name: nothing}
    before = 's' if name == 'system' else human('a', 'b')
    rows = [dict(PAIR, **{asked: f'{i}?'}, **(full if i % 2 else bare)) for i in range(4)]
    expected = sorted((before if i % 2 else '') + human(f'{i}?') for i in range(4))
    for several in (rows, rows[::-1]):
        write_rows('rows.jsonl', several)
        texts, meta = prepare_all('--source=rows.jsonl')
        assert sorted(group[0] for group in texts) == expected
        assert not any('not read' in note for note in meta['notes'])
        assert any('prompts of one text, 2 of 4' in note for note in meta['notes']) == (asked == 'prompt')


def test_a_side_that_ends_with_a_call_is_dropped_and_counted():
    rows = [dict(prompt=f'{i}?', chosen=assistant('So.'), rejected=assistant('No.')) for i in range(4)]
    write_rows('rows.jsonl', [*rows, dict(prompt='Warm?', chosen=TOOLS[1], rejected=assistant('No.'))])
    assert prepare('--source=rows.jsonl')[1]['splits']['train']['dropped'] == {'tool_turns': 1}


def test_pairs_whose_earlier_turns_differ_are_dropped_and_counted():
    good = [dict(chosen=[user(f'{i}'), assistant('a')],
                 rejected=[user(f'{i}'), assistant('b')]) for i in range(4)]
    other = [user('x'), assistant('y'), user('z'), assistant('c')]
    write_rows('rows.jsonl', [*good, dict(chosen=other, rejected=[*other[:1], assistant('Y'), *other[2:]])])
    groups, meta = made('--source=rows.jsonl')
    assert len(groups) == 4 and meta['splits']['train']['dropped'] == {'prompts_differ': 1}


# --- what was wrong in silence --------------------------------------------------------------------

PAIR = dict(chosen='Peru is over there.', rejected='Peru is nowhere.')
IMAGE = [dict(type='image_url', image_url=dict(url='x')), dict(type='text', text='What is it?')]
REFUSED = [
    (dict(PAIR, query='Where is Peru?'),
     "no assistant turn: there is no prompt, and a side is no dialogue that ends with an answer; it has 'chosen', "
     "'rejected', 'query'"),
    (dict(PAIR), "it has 'chosen', 'rejected'"),
    (dict(PAIR, prompt='Fix it.', input='freind'),
     "'input' is not read, and holds something in 4 of 4 rows, such as 'freind'; read is: "
     f"prompt from 'prompt', {SIDES}; rename"),
    (dict(PAIR, question='c?', context='Lima'), "'question' is not read"),
    (dict(PAIR, question='c?', system_prompt='Be brief.'), "'system_prompt' is not read"),
    (dict(PAIR, prompt='c?', Query='Where?'), "'Query' is not read"),
    (dict(messages=[user('c'), assistant('d')], rejected_responses=['bad']), "'rejected_responses' is not read"),
    (dict(prompt='c', completion='d', Label=False), "'Label' is not read"),
    (dict(prompt='c', completion='d', label=True, kto_tag=False), "'kto_tag' is not read"),
    (dict(conversations=[shared('human', 'c'), shared('gpt', 'd')], rejected='bad'), "'rejected' is not read"),
    (dict(PAIR, conversations=[shared('gpt', 'Hi.'), shared('human', 'c')]),
     "no prompt: the assistant speaks first in 'conversations' and 'chosen'; the row has 'chosen', "),
    (dict(PAIR, prompt=[said('narrator', 'c')]), "unknown role: 'prompt' has a turn of 'narrator'; known: system, "),
    (dict(PAIR, prompt=['c']), "no message: 'prompt' holds 'c'"),
    (dict(PAIR, messages=[user('c'), assistant('d')]),
     "not in turn: user, then assistant must speak in 'messages' and 'chosen', not user, assistant, assistant"),
    (dict(PAIR, prompt='c?', Instruction='Be brief.'), "'Instruction' is not read"),
    (dict(messages=[user('c'), assistant('d')], history=[['a', 'b']]), "'history' is not read"),
    (dict(messages=[user('c'), assistant('d')], rejected='bad'), "'rejected' is not read"),
    (dict(prompt='c', completion='d', rejected='bad'), "'rejected' is not read"),
    (dict(PAIR, prompt='<image> c?', images=['a.png']), "'images' is not read"),
    (dict(PAIR, prompt='c?', tools=[dict(type='function')]), "'tools' is not read"),
    (dict(PAIR, chosen=[assistant('b') | dict(reasoning_content='Hm. ')]),
     "not read: a turn of 'chosen' has reasoning_content; only its content is read"),
    (dict(PAIR, prompt=[user('c'), assistant(5) | dict(tool_calls=[CALL]), said('tool', 'd')]),
     "not a string: 'content' is 5"),
    (dict(PAIR, prompt=[user(IMAGE)]), "not text: 'prompt' holds ['image_url', 'text']; only text is read"),
    (dict(PAIR, prompt='[{"role": "user", "content": '), "not JSON: 'prompt' begins as messages do"),
    (dict(PAIR, prompt=str([user('a')])), "not JSON: 'prompt' begins as messages do"),
    (dict(messages=[assistant('a'), user('b'), assistant('c')], label=True),
     "no prompt: the assistant speaks first in 'messages'"),
    (dict(chosen=[assistant('a')], rejected=[assistant('b')]),
     "no prompt: the assistant speaks first in 'chosen'; the row has 'chosen', 'rejected'"),
    (dict(instruction='Fix', output=['a', 'b', 'c']), "no pair: 'output' must be a text or [good, bad]"),
    (dict(PAIR, system='s', prompt=[said('system', 't'), user('c')]), 'not in turn: '),
]


@pytest.mark.parametrize('row, message', REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_what_cannot_be_read_whole_stops_and_says_why(row, message):
    write_rows('rows.jsonl', [row] * 4)
    assert message in error_of('--source=rows.jsonl') and not Path('data').exists()


def test_columns_that_are_not_read_are_named_once_with_their_counts():
    more = dict(chosen=' a', rejected=' b', note='')
    rows = [dict(more, prompt=f'{i}', id=i, source='web' if i < 3 else ' ') for i in range(5)]
    write_rows('rows.jsonl', rows)
    notes = [note for note in prepare('--source=rows.jsonl')[1]['notes'] if 'not read' in note]
    assert notes == ["columns that are not read, with the rows of 5 that fill them: 'id' (5), 'note' (0), 'source' (3)"]
    write_rows('rows.jsonl', [dict(row, input='', system=None) for row in rows])
    assert "'input' (0), 'note' (0)" in prepare('--source=rows.jsonl')[1]['notes'][0], 'an empty one loses nothing'


def test_an_array_over_several_lines_is_read_and_an_object_over_several_is_refused_in_one_line():
    rows = [dict(prompt=f'{i} ', chosen='a', rejected='b') for i in range(4)]
    Path('rows.jsonl').write_text(json.dumps(rows, indent=2))
    assert len(made('--source=rows.jsonl')[0]) == 4
    Path('rows.jsonl').write_text('\n'.join(json.dumps(row, indent=2) for row in rows))
    assert 'ValueError: an object spans several lines: write each on one line' in error_of('--source=rows.jsonl')


@pytest.mark.parametrize('val', ['val', 'valid', 'validation', 'dev', 'eval', 'test', 'Val', 'EVAL'])
@pytest.mark.parametrize('train, sort', [('train.jsonl', '.jsonl'), ('train.jsonl', '.json'), ('Train.jsonl', '.csv'),
                                         ('train.csv', '.jsonl.gz')])
def test_the_validation_file_of_a_folder_is_found_by_any_usual_name_and_other_files_are_named(train, sort, val):
    write_rows(f'rows/{train}', [dict(prompt=f'{i} ', chosen='a', rejected='b') for i in range(4)])
    write_rows(f'rows/{val}{sort}', [dict(prompt='v ', chosen='a', rejected='b')])
    write_rows('rows/extra.jsonl', [dict(prompt='x', chosen='a', rejected='b')])
    texts, meta = prepare('--source=rows')
    assert [group[0] for group in texts['val']] == ['v '] and len(texts['train']) == 4
    assert [note for note in meta['notes'] if 'not read' in note] == ['not read of rows: extra.jsonl']


def test_a_second_validation_file_is_named_two_train_files_and_capitals_that_hide_a_split_are_refused():
    for name in ('train.jsonl', 'val.json', 'test.jsonl'):
        write_rows(f'rows/{name}', [dict(prompt=f'{name} {i} ', chosen='a', rejected='b') for i in range(2)])
    texts, meta = prepare('--source=rows')
    assert texts['val'][0][0] == 'val.json 0 ' and 'not read of rows: test.jsonl' in meta['notes']
    write_rows('rows/Train.csv', [dict(prompt='x', chosen='a', rejected='b')])
    assert 'rows holds Train.csv and train.jsonl: keep one of them' in error_of('--source=rows')
    for name in ('My_Train-1.jsonl', 'My_Train-2.jsonl', 'My_Val.jsonl'):
        write_rows(f'mine/{name}', [dict(prompt=name, chosen='a', rejected='b')])
    assert 'mine/My_Val.jsonl: `datasets` would take it for training data' in error_of('--source=mine')
    Path('mine/My_Train-2.jsonl').unlink()
    texts, meta = prepare('--source=mine')
    assert [texts[split][0][0] for split in ('train', 'val')] == ['My_Train-1.jsonl', 'My_Val.jsonl']


@pytest.mark.parametrize('files, expected', [
    (['pairs.jsonl', 'val.jsonl'], "rows has no split 'train', only ['validation']: call its file train.*"),
    (['test.jsonl'], "rows has no split 'train', only ['test']: call its file train.*"),
    (['pairs.jsonl', 'holdout_pairs.jsonl'], 'rows/holdout_pairs.jsonl: `datasets` would take it for training data'),
    (['Train/a.jsonl', 'Val/b.jsonl'], 'rows/Val/b.jsonl: `datasets` would take it for training data')])
def test_a_folder_in_which_validation_would_be_trained_on_is_refused(files, expected):
    for file in files:
        write_rows(f'rows/{file}', [dict(prompt=f'{file} {i} ', chosen='a', rejected='b') for i in range(4)])
    assert expected in error_of('--source=rows')


def test_files_that_datasets_leaves_out_of_a_folder_are_named():
    for file in ('train-0.jsonl', 'train-1.jsonl', 'train-2.csv', 'sub/test.jsonl', 'valid.jsonl'):
        write_rows(f'rows/{file}', [dict(prompt=f'{file} ', chosen='a', rejected='b')])
    texts, meta = prepare('--source=rows')
    assert sorted(group[0] for group in texts['train']) == ['train-0.jsonl ', 'train-1.jsonl ']
    assert 'not read of rows: sub/test.jsonl, train-2.csv' in meta['notes']


def test_a_knob_names_the_validation_file(capfd):
    for name in ('pairs.jsonl', 'rows/train.jsonl', 'rows/val.jsonl', 'held.csv'):
        write_rows(name, [dict(prompt=f'{name} {i} ', chosen='a', rejected='b') for i in range(3)])
    texts, meta = prepare('--source=pairs.jsonl', '--val_source=held.csv')
    assert [group[0] for group in texts['val']] == [f'held.csv {i} ' for i in range(3)] and len(texts['train']) == 3
    texts, meta = prepare('--source=rows', '--val_source=held.csv')
    assert texts['val'][0][0] == 'held.csv 0 ' and 'not read of rows: its own validation split' in meta['notes']
    write_rows('held.csv', [dict(prompt='new ', chosen='a', rejected='b')])
    assert prepare('--source=rows', '--val_source=held.csv')[0]['val'][0][0] == 'new ', 'its content counts'
    assert 'val_source=no.csv is no file' in error_of('--source=rows', '--val_source=no.csv')


def pairs(n, **texts):
    """n pairs in which nothing is odd; texts are functions of the number."""
    row = dict(prompt=lambda i: f'What is {i}?', chosen=lambda i: f' yes {i % 7}', rejected=lambda i: f' not {i % 6}')
    return [{key: write(i) for key, write in (row | texts).items()} for i in range(n)]


ONE_LABEL = [dict(prompt=f'{i} ', completion=f'{i}', label=True) for i in range(20)]
TALKS = [dict(prompt=[user(f'{"x" * 40} {i}'), assistant('b'), user('c' * 60)], chosen='yes',
              rejected='no ') for i in range(24)]
NOTES = {       # name: (rows, what a note says, its count in train)
    'prompts cut': (TALKS, 'prompts cut at max_length=100, 23 of 23, and 23 of these had several turns'),
    'the frame twice': (pairs(20, prompt=lambda i: human(f'{i}'), chosen=lambda i: human(f'{i}') + f' y{i}',
                              rejected=lambda i: human(f'{i}') + f' n{i}'),
                        'the prompt stands twice, in the responses as well, 19 of 19: [0]'),
    'a frame in a frame': (pairs(20, prompt=lambda i: [user(human(f'{i}'))], chosen=lambda i: f'yes {i}',
                                 rejected=lambda i: f'no {i}'),
                           'the prompt stands in a template already, and is put into another, 19 of 19: [0]'),
    'an end token': (pairs(20, chosen=lambda i: ' a' + EOT * (i == 5)),
                     'an end token is written at the end of a response, where one is added, 1 of 19: '),
    'a leading space': (pairs(20, chosen=lambda i: f'Yes {i}', rejected=lambda i: f' No {i}'),
                        'one response begins with a space and the other does not, 19 of 19: [0], '
                        "'Yes 0' against ' No 0'"),
    'glue': (pairs(20, chosen=lambda i: f'Yes {i}', rejected=lambda i: f'No {i}'),
             "no space or line break between prompt and response, 19 of 19: [0], 'What is 0?Yes 0'"),
    'one label': (ONE_LABEL, 'labels of one kind, 19 of 19 are True'),
    'an empty prompt': (pairs(20, prompt=lambda i: f'{i}?' * (i != 6)),
                        'empty prompts, 1 of 20: the first is rows.jsonl line 7'),
    'null scores': ([row | dict(score=None if i == 3 else 1.5) for i, row in enumerate(pairs(20))],
                    "columns that are not read, with the rows of 20 that fill them: 'score' (19)"),
}


@pytest.mark.parametrize('name', NOTES)
def test_what_hurts_is_a_note_with_its_share_and_the_dry_run_shows_it(name, capfd):
    rows, note = NOTES[name]
    write_rows('rows.jsonl', rows)
    flags = ['--source=rows.jsonl', '--max_length=100'][:2 if name == 'prompts cut' else 1]
    notes = prepare(*flags)[1]['notes']
    found = [line for line in notes if note in line]
    assert len(found) == 1, notes
    capfd.readouterr()
    prepare(*flags, '--dry_run')
    assert f'note: {found[0]}\n' in capfd.readouterr().out
    write_rows('rows.jsonl', pairs(20))
    assert prepare('--source=rows.jsonl')[1]['notes'] == [], 'and nothing is said where nothing is odd'


# --- truncation: no more than is needed, at a turn of the user where there are turns; a system turn stays ---

def cut(prompt, chosen, max_length, *flags, tokenizer='bytes'):
    """The texts of one pair after truncation."""
    rows = [dict(prompt=prompt, chosen=chosen, rejected='n'), dict(prompt='z', chosen='y', rejected='n')]
    write_rows('rows/train.jsonl', rows[:1])
    write_rows('rows/val.jsonl', rows[1:] if isinstance(prompt, str) else [rows[1] | dict(prompt=[user('z')])])
    texts, _ = prepare('--source=rows', f'--max_length={max_length}', *flags, tokenizer=tokenizer)
    return texts['train'][0]


def test_a_plain_prompt_loses_from_the_left_what_is_too_much_and_no_more():
    text = 'abcdefghij'                                                     # 10, and 5 of '1234' with its end
    assert cut(text, '1234', 15) == [text, f'1234{EOT}', f'n{EOT}']
    assert cut(text, '1234', 14) == [text[1:], f'1234{EOT}', f'n{EOT}']
    assert cut(text, '1234', 14, '--truncation=paper') == [text[3:], f'1234{EOT}', f'n{EOT}'], 'the half, as the paper'
    assert cut(text, '1' * 20, 12) == [text[-6:], '1' * 6, f'n{EOT}'], 'a prompt keeps max_prompt_length'
    assert cut('abc', '1' * 20, 12, '--max_prompt_length=4') == ['abc', '1' * 9, f'n{EOT}']


LONG = [said('system', 'SYS'), user('a' * 20), assistant('b' * 10), user('c' * 20),
        assistant('d' * 10), user('e' * 20)]
WHOLE = 'SYS' + human('a' * 20, 'b' * 10, 'c' * 20, 'd' * 10, 'e' * 20)
TWO = 'SYS' + human('c' * 20, 'd' * 10, 'e' * 20)
ONE = 'SYS' + human('e' * 20)


def test_a_conversation_loses_whole_turns_and_keeps_its_system_turn():
    for room in range(len(ONE), len(WHOLE) + 2):
        expected = WHOLE if room >= len(WHOLE) else TWO if room >= len(TWO) else ONE
        assert cut(LONG, 'yes', room + 5, '--max_prompt_length=2')[0] == expected       # ' yes' and its end are 5
        if room >= len(ONE) + 2:
            turns = cut(LONG[1:], 'yes', room + 2, '--max_prompt_length=2')[0]
            assert 'SYS' + turns == (WHOLE if room >= len(WHOLE) else TWO if room >= len(TWO) else ONE)


def test_a_last_turn_that_is_too_long_loses_its_left_and_keeps_the_frame_and_the_system_turn():
    for room in range(40, len(ONE)):
        frame = len('SYS\n\nHuman:') + len('\n\nAssistant:')
        expected = f'SYS\n\nHuman:{"e" * (room - frame)}\n\nAssistant:'
        assert cut(LONG, 'yes', room + 5, '--max_prompt_length=2')[0] == expected
    assert cut(LONG, 'yes', 15, '--max_prompt_length=2')[0] == ONE[-10:], 'no room for that: the end alone'


def test_a_dialogue_of_hh_is_cut_at_its_turns_as_a_conversation_is():
    for room in range(50, len(WHOLE)):
        text = WHOLE.removeprefix('SYS')
        row = dict(chosen=f'{text} yes', rejected=f'{text} no')
        write_rows('rows/train.jsonl', [row])
        write_rows('rows/val.jsonl', [row])
        texts, _ = prepare('--source=rows', f'--max_length={room + 5}', '--max_prompt_length=2')
        texts = texts['train'][0]
        assert texts[0] == max((t.removeprefix('SYS') for t in (WHOLE, TWO, ONE) if len(t) - 3 <= room), key=len)


@pytest.mark.parametrize('room', range(60, 160, 9))
def test_in_a_chat_template_fewer_messages_are_rendered(room):
    names = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    source = make(Path(f'chat{room}').absolute(), names, dict(eos_token='<|endoftext|>'), CHATML)
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(source)
    candidates = [theirs.encode(theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
                  for turns in (LONG, LONG[:1] + LONG[3:], LONG[:1] + LONG[5:])]
    fits = [ids for ids in candidates if len(ids) <= room]
    write_rows('rows/train.jsonl', [dict(prompt=LONG, chosen='yes', rejected='n')])
    write_rows('rows/val.jsonl', [dict(prompt=LONG, chosen='yes', rejected='n')])
    longest = len(theirs.encode('yes')) + 1
    prepare('--source=rows', f'--max_length={room + longest}', '--max_prompt_length=2', tokenizer=source)
    prompt = Groups('data/made', 'train')[0][0].tolist()
    if fits:
        assert prompt == fits[0]
    else:
        assert len(prompt) == room and prompt[:5] == candidates[2][:5] and prompt[-9:] == candidates[2][-9:]


@pytest.mark.parametrize('seed', range(20))
def test_whatever_the_lengths_a_pair_fits_and_no_token_is_lost_that_had_room(seed):
    rng = random.Random(seed)
    prompt, chosen = 'p' * rng.randrange(1, 60), '1' * rng.randrange(1, 60)
    length = rng.randrange(8, 80)
    keep = rng.randrange(1, length)
    result = cut(prompt, chosen, length, f'--max_prompt_length={keep}')
    if len(prompt) + len(chosen) + 1 <= length:
        assert result == [prompt, chosen + EOT, f'n{EOT}']
    else:
        kept = [len(result[0]), len(result[1].replace(EOT, '$'))]
        assert sum(kept) == length, 'not one position is left unused'
        assert kept[0] == max(min(len(prompt), keep), length - len(chosen) - 1)


# --- the demos of LLaMA-Factory, counted by other lines -------------------------------------------

def after(text):
    """What the assistant says, after a space."""
    return text if text[:1].isspace() else f' {text}'


needs_demos = pytest.mark.skipif(not DEMOS.is_dir(), reason='the demos are not here')


@needs_demos
def test_the_pairs_of_a_real_demo_are_those_of_a_few_independent_lines(gpt2):
    expected = []
    for row in json.loads((DEMOS / 'dpo_en_demo.json').read_text()):
        text = ''
        for turn in row['conversations']:
            value = turn['value']
            text += {'human': f'\n\nHuman: {value}\n\nAssistant:', 'gpt': after(value), 'system': value}[turn['from']]
        sides = [gpt2.encode_ordinary(after(row[key]['value'])) + [50256] for key in ('chosen', 'rejected')]
        expected.append([gpt2.encode_ordinary(text), *sides])
    groups, meta = made(f'--source={DEMOS / "dpo_en_demo.json"}', '--max_length=100000', tokenizer='gpt2')
    assert sorted(groups) == sorted(expected) and len(groups) == 300
    assert all(info['dropped'] == {} for info in meta['splits'].values())


@needs_demos
def test_the_cut_prompts_of_a_real_demo_hold_as_many_turns_as_fit(gpt2):
    """Of each conversation the longest part that fits; where none does, every position is used."""
    groups, _ = made(f'--source={DEMOS / "dpo_en_demo.json"}', '--max_length=1024', tokenizer='gpt2')
    whole, fewer_turns, last_turn = 0, 0, 0
    for row in json.loads((DEMOS / 'dpo_en_demo.json').read_text()):
        sides = [gpt2.encode_ordinary(after(row[key]['value'])) + [50256] for key in ('chosen', 'rejected')]
        room = max(512, 1024 - max(map(len, sides)))
        system = [turn['value'] for turn in row['conversations'] if turn['from'] == 'system']
        turns = [turn['value'] for turn in row['conversations'] if turn['from'] != 'system']
        parts = [gpt2.encode_ordinary(''.join(system) + human(*turns[i:])) for i in range(0, len(turns), 2)]
        fitting = [part for part in parts if len(part) <= room]
        if fitting:
            expected = [fitting[0], *(side[:1024 - len(fitting[0])] for side in sides)]
            assert expected in groups
            whole += fitting[0] == parts[0]
            fewer_turns += fitting[0] != parts[0]
        else:
            responses = [side[:1024 - room] for side in sides]
            found = [group[0] for group in groups if group[1:] == responses and group[0][-60:] == parts[-1][-60:]]
            assert found and len(found[0]) == room
            assert gpt2.decode(found[0]).startswith(''.join(system) + '\n\nHuman:')
            last_turn += 1
    assert whole + fewer_turns + last_turn == 300 and fewer_turns > 5 and last_turn > 5


@needs_demos
def test_the_labels_of_a_real_demo_are_those_of_a_few_independent_lines():
    rows = json.loads((DEMOS / 'kto_en_demo.json').read_text())
    texts, meta = prepare(f'--source={DEMOS / "kto_en_demo.json"}', '--max_length=100000')
    expected = []
    for row in rows:
        contents = [turn['content'] for turn in row['messages']]
        assert [turn['role'] for turn in row['messages']] == ['user', 'assistant'] * (len(contents) // 2)
        prompt = ''.join(after(text) if i % 2 else f'\n\nHuman: {text}\n\nAssistant:'
                         for i, text in enumerate(contents[:-1]))
        expected.append([prompt, after(contents[-1]) + EOT, row['label']])
    assert sorted(texts['train'] + texts['val']) == sorted(expected) and len(expected) == 300
    assert sum(info['desirable'] for info in meta['splits'].values()) == sum(row['label'] for row in rows) == 150


# --- CSV as Excel writes it, and a file as the only argument --------------------------------------

@pytest.mark.parametrize('delimiter, name', [(',', 'a.csv'), (';', 'a.csv'), ('\t', 'a.csv'), ('\t', 'a.tsv')])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'cp1252', 'utf-16'])
def test_excel_s_csv_is_read_whatever_divides_its_cells_and_whatever_its_encoding(delimiter, name, encoding):
    lines = [[f'Größe {i}, oder; was? ', f' gut\n{i}', ' schlecht'] for i in range(4)]
    lines.insert(0, ['prompt', 'chosen', 'rejected'])
    text = '\r\n'.join(delimiter.join(f'"{cell}"' for cell in line) for line in lines) + '\r\n' + delimiter * 2 + '\r\n'
    Path(name).write_bytes(text.encode(encoding))
    if not encoding.startswith('utf-8'):
        message = (f'{name} cannot be read: ValueError: it is not utf-8: save it as UTF-8, or name what it is, as '
                   f'--encoding={encoding}')
        assert message in error_of(f'--source={name}', '--max_bad_lines=99') and not Path('data').exists()
    groups, _ = made(f'--source={name}', *([] if encoding.startswith('utf-8') else [f'--encoding={encoding}']))
    assert sorted(groups) == [[ids(f'Größe {i}, oder; was? '), ids(f' gut\n{i}{EOT}'), ids(f' schlecht{EOT}')]
                              for i in range(4)]


def test_rows_of_a_csv_are_counted_as_a_spreadsheet_counts_them():
    Path('rows.csv').write_text('question,chosen,rejected\n"a\nb\nc",yes,no\n\n,yes,no\nx,same,same\n')
    assert error_of('--source=rows.csv').startswith('error: rows.csv row 5: identical: ')
    Path('rows.csv').write_text('question,chosen,rejected\n"a\nb\nc",yes,no\n\n,yes,no\nx,y,z\n')
    assert 'empty prompts, 1 of 3: the first is rows.csv row 4' in prepare('--source=rows.csv')[1]['notes']
    assert 'LookupError: unknown encoding: klingon' in error_of('--source=rows.csv', '--encoding=klingon')


CSV = 'prompt,chosen,rejected\n' + ''.join(f'{i}? ,ü{i},n\n' for i in range(4))
TABLES = {      # name: (file, bytes, flags, what an error says, or the chosen side of the row 0)
    'unnamed columns': ('a.csv', CSV.replace('\n', ',,\n').encode(), [], 'ü0'),
    'spaces in the first line': ('a.csv', CSV.replace('n,r', 'n, r').encode(), [], 'ü0'),
    'line ends of old': ('a.csv', CSV.replace('\n', '\r').encode(), [], 'ü0'),
    'a quote': ('a.csv', CSV.replace('0? ', '"0"?').encode(), [], "a.csv cannot be read: ValueError: row 2: ',' exp"),
    'an open quote': ('a.csv', CSV.replace('2? ', '"2?').encode(), [], 'ValueError: row 4: unexpected end of data'),
    'a list that is none': ('a.csv', b'prompt,responses\na,yes\nb,no\n', [],
                            "'responses' must be a list of two or more"),
    'packed': ('a.csv', gzip.compress(CSV.encode()), [], 'it is packed, as .gz, .zip and .xlsx are'),
    'Excel itself': ('a.csv', b'PK\x03\x04' + bytes(99), [], 'it is packed, as .gz, .zip and .xlsx are'),
    'nothing': ('a.csv', b'', [], 'a.csv holds no rows'),
    'JSON of Windows': ('a.jsonl', '{"prompt": "ü"}'.encode('cp1252'), [],
                        'it is not utf-8: save it as UTF-8, or name what it is, as --encoding=cp1252'),
    'JSON of Windows, read': (
        'a.jsonl', ''.join(f'{{"prompt": "{i}? ", "chosen": "ü0", "rejected": "n"}}\n' for i in range(4)).encode('cp1252'),
        ['--encoding=cp1252'], 'ü0'),
    'JSON in UTF-16': ('a.jsonl', '{"prompt": "ü"}'.encode('utf-16'), [], 'it is UTF-16: save it as UTF-8'),
}


@pytest.mark.parametrize('name', TABLES)
def test_a_table_is_read_as_it_stands_or_refused_with_what_is_wrong(name):
    file, data, flags, expected = TABLES[name]
    Path(file).write_bytes(data)
    if expected != 'ü0':
        assert expected in error_of(f'--source={file}', *flags)
    else:
        groups = prepare_all(f'--source={file}', *flags)[0]
        assert groups[0][:2] == ['0? ', f'ü0{EOT}'] and len(groups) == 4


def test_a_pair_in_a_cell_of_csv_is_a_pair():
    Path('a.csv').write_text('instruction,output\n' + ''.join(f'{i}?,"[""yes"", ""no""]"\n' for i in range(4)))
    assert prepare_all('--source=a.csv')[0][0] == [human('0?'), f' yes{EOT}', f' no{EOT}']


def test_a_file_of_data_as_the_only_argument_is_the_source_and_is_never_run(capfd):
    import config
    import prepare_prefs
    import sft
    write_rows('my pairs.v2.jsonl', pairs(20))
    prepare_prefs.main(['my pairs.v2.jsonl', '--tokenizer=bytes'])
    assert "source            = 'my pairs.v2.jsonl'   (flag)" in capfd.readouterr().out
    assert len(Groups('data/my_pairs', 'train')) == 19
    prepare_prefs.main(['my pairs.v2.jsonl', '--tokenizer=bytes', '--name=mine'])
    assert len(Groups('data/mine', 'train')) == 19
    code = "open('ran', 'w')\nname = 'x'\n"
    for file in ('code.jsonl', 'code.txt', 'code'):
        Path(file).write_text(code)
        for main in (prepare_prefs.main, sft.main):
            with pytest.raises(config.UserError) as stop:
                main([file, '--tokenizer=bytes'] if main is prepare_prefs.main else [file])
            assert file in stop.value.message and not Path('ran').exists()
    for main, wrong in ((prepare_prefs.main, 'beta=3'), (sft.main, 'nope')):
        with pytest.raises(config.UserError, match=f'{wrong} is no config file: such a file ends in .py .a flag is'):
            main([wrong])
    with pytest.raises(config.UserError, match='nope.jsonl does not exist'):
        prepare_prefs.main(['nope.jsonl', '--tokenizer=bytes'])
    with pytest.raises(config.UserError, match='more than one source: a.csv, my pairs.v2.jsonl'):
        Path('a.csv').write_text('')
        prepare_prefs.main(['a.csv', 'my pairs.v2.jsonl'])
    assert not Path('data/reviews').exists(), 'nor is it ever mixed with the embedded experiment'


def test_the_example_of_the_readme_works_as_it_stands_in_the_readme_s_own_command(capfd):
    import prepare_prefs
    section = (ROOT / 'README.md').read_text(encoding='utf-8').split('## Your own data')[1].split('\n## ')[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith('    {"prompt"')]
    Path('pairs.jsonl').write_text('\n'.join(lines) + '\n')
    command = re.search(r'python prepare_prefs.py (.*--name=mine)$', section, re.M)[1]
    for flags in ([], ['--dry_run']):
        prepare_prefs.main([*command.split(), *flags, '--tokenizer=bytes'])
    assert len(Groups('data/mine', 'train')) == len(Groups('data/mine', 'val')) == 1


def row_of(names, number):
    """A row with these columns, of another prompt for each number."""
    question = user(f'q{number}')
    lists = dict(conversations=[question], messages=[question, assistant('d')], responses=['a', 'b'],
                 output=['a', 'b'], label=True)
    frame = human(f'q{number}') if names[0] == 'chosen' else ''
    return {name: lists.get(name, f'{frame} {name} {number}') for name in names}


def test_every_row_of_the_readme_s_table_is_read():
    section = (ROOT / 'README.md').read_text(encoding='utf-8').split('## Your own data')[1].split('\n## ')[0]
    shapes = re.findall(r'^\| (`.*?) \|', section, re.M)
    assert len(shapes) > 4
    for shape in re.findall(r'\{(.*?)\}', ' '.join(shapes)):
        names = re.findall(r'"(\w+)"', shape)
        write_rows('rows.jsonl', [row_of(names, number) for number in range(4)])
        assert len(made('--source=rows.jsonl')[0]) == 4, shape
