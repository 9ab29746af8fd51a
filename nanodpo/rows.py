"""What a row of preferences may be. All rows of a set are of one kind:

    {"prompt", "chosen", "rejected"}                        a pair
    {"chosen", "rejected"}                                  a pair of dialogues as in HH, or of conversations
    {"conversations", "chosen", "rejected"}                 a pair as in ShareGPT, messages of "from" and "value"
    {"messages", "chosen", "rejected"}                      a pair
    {"context", "chosen", "rejected"}                       a pair
    {"question", "chosen", "rejected"}                      a pair, or "response_j" and "response_k"
    {"instruction", "input", "chosen", "rejected"}          a pair as in Alpaca, or "output": [good, bad]
    {"messages", "rejected_response"}                       a pair, or "rejected_messages"; messages end as chosen
    {"prompt", "responses": [best, ..., worst]}             a ranking; with "scores", a number each, in any order
    {"prompt", "completion", "label": true or false}        an unpaired example, for --loss=kto
    {"messages", "label"}, {"conversations", "label"}       an unpaired example; "kto_tag" is a label, too
    {"instruction", "input", "output", "label"}             an unpaired example
    the last three without a label                          a demonstration, for sft.py

A prompt is one of "prompt", "context", "question", "instruction" (with "input"), "conversations" and "messages".
"system" and "history" go before it. "question" and "instruction" are turns of the user. "prompt" and "context" are
text as it stands, unless some rows have messages or a system turn.
Any text may be messages, [{"role": "user", "content": "..."}, ...], or one message, or JSON of them. Their content may
be a list of texts. The user and the assistant speak in turn. Turns of tools need a chat template that writes them.
"""
import json
import re
from dataclasses import dataclass


@dataclass(slots=True)
class Row:
    prompt: object          # a string, or messages
    responses: list         # of strings, the best or chosen first
    label: bool = None      # of an unpaired example
    dialogue: bool = False  # the prompt has its frame already, as HH's have
    turns: list = None      # the messages of the prompt, once it is put into a template


class BadRow(ValueError):
    """A row that cannot be used. What stands before the first colon is counted in meta.json."""


def expect(condition, message):
    """As config.need, for a row."""
    if not condition:
        raise BadRow(message)


# --- a row -------------------------------------------------------------------------------------------

PROMPTS = 'prompt', 'context', 'question', 'instruction', 'conversations', 'messages'   # the first there is read
SIDES = [('chosen', 'rejected'), ('response_j', 'response_k'), ('messages', 'rejected_response'),
         ('messages', 'rejected_messages'), ('responses',), ('output',), ('completion',), ('messages',),
         ('conversations',)]
NEEDED = {*PROMPTS[:-1], 'system', 'system_prompt', 'history', 'input', 'query', 'chosen', 'rejected',
          'rejected_response', 'rejected_messages', 'image', 'images', 'tools'}     # if it is not read, the run stops
LABELS = {'true': True, '1': True, '1.0': True, 'false': False, '0': False, '0.0': False}


def read_row(row):
    """(Row, shape, columns) of an object: where its parts come from in words, and the columns that were read."""
    expect(isinstance(row, dict), f'not an object: {type(row).__name__}')
    row = filled(row)
    keys = next((keys for keys in SIDES if all(key in row for key in keys)), ())
    expect(keys, f'missing key: it has {names_of(row)}; it needs chosen and rejected (and prompt), or prompt and '
           'responses, or prompt and completion, or messages')
    asked = next((key for key in PROMPTS if key in row and key not in keys), None)
    sides = {key: row[key] for key in keys}
    if keys == ('chosen', 'rejected') and not asked and all(isinstance(parsed(row[key], key), str) for key in keys):
        return read_dialogues(row), "prompt and responses from the dialogues 'chosen' and 'rejected'", keys
    if keys == ('responses',):
        sides = ranked(row)
    if keys == ('output',) and isinstance(row['output'], list):
        expect(len(row['output']) == 2, f"no pair: 'output' must be a text or [good, bad], not {row['output']!r:.40}")
        sides = {'output[0]': row['output'][0], 'output[1]': row['output'][1]}
    result, shape, columns = read_answers(row, asked, sides)
    columns += keys
    if keys == ('responses',):
        columns.append('scores')
        shape += ", sorted by 'scores'" if 'scores' in row else ', the best first'
    tag = next((key for key in ('label', 'kto_tag') if key in row), None)
    if len(sides) == 1 and tag:
        result.label = LABELS.get(str(row[tag]).strip().lower())
        expect(result.label is not None, f"no label: '{tag}' is not true or false")
        columns.append(tag)
        shape += f", label from '{tag}'"
    return result, shape, columns


def filled(row):
    """A row without what is null, but for scores, and without a system turn or a history that is empty."""
    def left_out(key, value):
        return empty(value) if key in ('system', 'history') else value is None and key != 'scores'
    return {key: value for key, value in row.items() if not left_out(key, value)}


def empty(value):
    return value in (None, [], {}) or isinstance(value, str) and not value.strip()


def names_of(row):
    return f'{", ".join(map(ascii, row)) or "none":.200}'


def read_dialogues(row):
    """Two whole dialogues as in Anthropic HH. The prompt ends with their last '\\n\\nAssistant:'."""
    sides = [string(row, key).rpartition('\n\nAssistant:') for key in ('chosen', 'rejected')]
    (prompt, turn, chosen), (other_prompt, other_turn, rejected) = sides
    expect(turn and other_turn and '\n\nHuman:' not in chosen and '\n\nHuman:' not in rejected, 'no assistant turn: '
           f'there is no prompt, and a side is no dialogue that ends with an answer; it has {names_of(row)}')
    expect(prompt == other_prompt, 'prompts differ')
    return Row(prompt + turn, distinct({'chosen': chosen.rstrip(), 'rejected': rejected.rstrip()}), dialogue=True)


def dialogue_messages(text):
    """The prompt of a dialogue as in Anthropic HH as messages."""
    before, *pieces = re.split('(?:^|\n\n)(Human|Assistant):', text)    # then name and text of each turn
    roles = {'Human': 'user', 'Assistant': 'assistant'}
    turns = zip(pieces[:-2:2], pieces[1:-2:2])                  # the last turn is still to be said
    system = [dict(role='system', content=before.strip())] * bool(before.strip())
    return system + [dict(role=roles[name], content=content.strip()) for name, content in turns]


def ranked(row):
    """{name: response} of a ranking, the best first."""
    responses = row['responses']
    expect(isinstance(responses, list) and len(responses) > 1,
           f"no ranking: 'responses' must be a list of two or more, not {responses!r:.40}")
    order = range(len(responses))
    if 'scores' in row:
        scores = row['scores'] if isinstance(row['scores'], list) else []
        finite = {score for score in scores if type(score) in (int, float) and score - score == 0}
        expect(len(finite) == len(scores) == len(responses),
               f"no order: 'scores' must be {len(responses)} numbers, all finite and different")
        order = sorted(order, key=lambda k: scores[k], reverse=True)
    return {f'response {k + 1}': responses[k] for k in order}


def read_document(row):
    return Row('', [string(row if isinstance(row, dict) else {'text': row}, 'text')]), "text from 'text'", ('text',)


def read_prompt(row):
    """The prompt of an object, or a prompt itself: a string, or messages that the assistant is to answer."""
    if isinstance(row, BadRow):
        raise row
    row = {'prompt': None} | filled(row) if isinstance(row, dict) else {'prompt': row}
    asked = next((key for key in PROMPTS if row.get(key) is not None), 'prompt')
    return read_answers(row, asked, {'answer': '?'})[0].prompt


# --- a prompt and its answers ------------------------------------------------------------------------

def read_answers(row, asked, sides):
    """(Row, shape, columns) of the responses to one prompt; columns are those of the prompt.

    asked: the first column of the prompt, None if the first side holds it.
    sides: {name: an answer, or a whole conversation that ends with one}, best or chosen first.
    """
    talks = {name: messages_of(sides, name, 'assistant') for name in sides}
    first = next(iter(talks.values()))
    before, columns = earlier_turns(row, asked) if asked else (first[:-1], [])
    plain = columns in (['prompt'], ['context']) and 'system' not in row
    plain = plain and all(isinstance(parsed(text, key), str) for key, text in {asked: row[asked], **sides}.items())
    where = ' + '.join(f"'{name}'" for name in columns)
    if first[0]['role'] != 'assistant':         # it says again what is asked
        where = f"'{next(iter(sides))}' up to its last turn"
    for name, talk in talks.items():
        if talk[0]['role'] != 'assistant':
            said = '\n'.join(turn['content'] for turn in talk[:-1])
            expect(not asked or all(turn['content'].strip() in said for turn in before),
                   f"another prompt: '{name}' does not say what '{asked}' says")
        elif asked or talk is not first:
            talk[:0] = before
        if 'system' in row:
            talk.insert(0, dict(role='system', content=string(row, 'system')))
        check_turns(talk, f"'{asked}' and '{name}'" if asked else f"'{name}'", row)
        expect(talk[:-1] == first[:-1], 'prompts differ')
    responses = distinct({name: talk[-1]['content'] for name, talk in talks.items()})
    if 'system' in row:
        columns.append('system')
        where = f"'system' + {where}"
    return Row(row[asked] if plain else first[:-1], responses), in_words(where, list(sides)), columns


def in_words(where, names):
    """The shape as: prompt from 'instruction' + 'input', chosen from 'output'[0], rejected from 'output'[1]"""
    parts = {1: ['response'], 2: ['chosen', 'rejected']}.get(len(names), names)
    sides = [f'{part} from ' + re.sub(r'^\w+', r"'\g<0>'", name) for part, name in zip(parts, names)]
    if names[0].startswith('response '):
        sides = ["responses from 'responses'"]
    return ', '.join([f'prompt from {where}', *sides])


def earlier_turns(row, asked):
    """The messages that are answered, but for the system turn, and the columns that hold them."""
    messages, columns = messages_of(row, asked, 'user'), [asked]
    if asked == 'instruction' and 'input' in row:
        columns.append('input')
        if string(row, 'input', blank=True).strip():
            messages[-1]['content'] += '\n' + row['input']
    if 'history' in row:                        # messages, or [question, answer] each
        columns.insert(0, 'history')
        expect(isinstance(row['history'], list), f"not a list: 'history' is {row['history']!r:.40}")
        pairs = all(isinstance(turn, list) and len(turn) == 2 for turn in row['history'])
        texts = sum(row['history'], []) if pairs else []
        turns = [dict(role=('user', 'assistant')[i % 2], content=text) for i, text in enumerate(texts)]
        messages[:0] = [message(turn, 'history') for turn in turns or row['history']]
    return messages, columns


def check_turns(talk, where, row):
    """The user and the assistant speak in turn, after a system turn or none. Turns of tools may stand between."""
    roles = [turn['role'] for turn in talk if not of_tools(turn)]
    turns = ['user', 'assistant'] * (len(roles) // 2)
    expect(not of_tools(talk[-1]), f'tool turns: {where} ends with one, which is no text')
    expect(roles[0] != 'assistant', f'no prompt: the assistant speaks first in {where}; the row has {names_of(row)}')
    expect(turns and roles in (turns, ['system', *turns]),
           f'not in turn: user, then assistant must speak in {where}, not {", ".join(roles):.80}')


def of_tools(turn):
    return turn['role'] == 'tool' or 'tool_calls' in turn


def distinct(responses):
    """The texts of {name: response}. None is blank, and no two are the same."""
    texts = [string(responses, name) for name in responses]
    expect(len(set(texts)) == len(texts), f'identical: two of {", ".join(sorted(responses))} are the same')
    return texts


# --- messages ----------------------------------------------------------------------------------------

ROLES = {'system': 'system', 'developer': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant',
         'gpt': 'assistant', 'model': 'assistant', 'function_call': 'call', 'tool_call': 'call', 'tool': 'tool',
         'function': 'tool', 'observation': 'tool', 'tool_response': 'tool', 'ipython': 'tool'}
UNREAD = 'reasoning_content', 'reasoning', 'thinking', 'images', 'audio', 'refusal'         # what else a turn may say
MESSAGES = re.compile(r"""\[?\s*\{(?=.*["'](role|from)["']\s*:)(?=.*["'](content|value)["']\s*:)""", re.DOTALL)


def messages_of(row, key, role):
    """row[key] as [{'role', 'content'}, ...]; a string is what `role` says."""
    value = parsed(row.get(key), key)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        return [{'role': role, 'content': string(row, key, blank=True)}]
    return [message(turn, key) for turn in value]


def parsed(value, key):
    """The value itself, or the messages that it is in JSON."""
    if not isinstance(value, str) or not MESSAGES.match(value.lstrip()):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: '{key}' begins as messages do: {error}") from None
    first = found[0] if isinstance(found, list) else found
    return found if {'role', 'content'} <= {*first} or {'from', 'value'} <= {*first} else value


def message(turn, key):
    """{'role', 'content'} of a message of OpenAI's or of ShareGPT. A turn of tools keeps what else it has."""
    expect(isinstance(turn, dict), f"no message: '{key}' holds {turn!r:.40}")
    name, what = ('from', 'value') if 'from' in turn else ('role', 'content')
    lost = [part for part in UNREAD if not empty(turn.get(part))]
    expect(not lost, f"not read: a turn of '{key}' has {', '.join(lost)}; only its {what} is read")
    role = ROLES.get(string(turn, name).strip().lower())
    expect(role, f"unknown role: '{key}' has a turn of {turn[name]!r:.40}; known: {', '.join(ROLES)}")
    if isinstance(turn.get(what), list):
        kinds = [part.get('type') if isinstance(part, dict) else part for part in turn[what]]
        expect(set(map(str, kinds)) == {'text'}, f"not text: '{key}' holds {kinds!r:.60}; only text is read")
        turn = turn | {what: ''.join(string(part, 'text', blank=True) for part in turn[what])}
    if calls := calls_of(turn, role, what, key):
        return dict(role='assistant', tool_calls=calls,
                    content='' if role == 'call' or not turn.get(what) else string(turn, what, blank=True))
    extra = {name: value for name, value in turn.items() if value is not None} if role == 'tool' else {}
    return dict(extra, role=role, content=string(turn, what, blank=True))


def calls_of(turn, role, what, key):
    """The calls of tools in a turn, as OpenAI writes them, [] for none. ShareGPT's are the turn's text, in JSON."""
    calls = turn.get('tool_calls') or turn.get('function_call') or []
    try:
        calls = json.loads(string(turn, what)) if role == 'call' else calls
        calls = calls if isinstance(calls, list) else [calls]
        calls = [call if 'function' in call else dict(type='function', function=call) for call in calls]
        string({key: json.dumps(calls, ensure_ascii=False)}, key)
        named = all(string(call['function'], 'name') for call in calls) and (calls or role != 'call')
    except (ValueError, TypeError, RecursionError):
        named = False
    expect(named, f"tool turns: '{key}' holds a call without a name, or in no JSON")
    return calls


def string(row, key, blank=False):
    """row[key], a string that can be written down. blank: whether it may be."""
    expect(isinstance(row, dict) and key in row, f"missing key: '{key}'")
    expect(isinstance(row[key], str), f"not a string: '{key}' is {row[key]!r:.80}")
    expect(not re.search('[\ud800-\udfff]', row[key]), f"not UTF-8: '{key}' holds half a character")
    expect(blank or row[key].strip(), f"empty response: '{key}'")
    return row[key]
