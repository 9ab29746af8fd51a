"""Preferences in, token ids on disk out: data/<name>/, which sft.py, dpo.py and sample.py read.

    python prepare_prefs.py                                   # the embedded experiment, config/reviews.py
    python prepare_prefs.py config/hh.py                      # Anthropic HH, from the hub
    python prepare_prefs.py --name=mine --source=pairs.jsonl  # your own pairs
    python prepare_prefs.py config/hh.py --dry_run            # only look: three pairs, lengths, what would be lost
    python prepare_prefs.py --name=online --source=data/reviews --policy=out/reviews/sft --reward=config/reviews.py
                                                              # pairs drawn from a policy; torchrun shares the work

`source` is one of
- a .jsonl, .json (an array of objects), .csv or .parquet file; all but Parquet may be compressed, as .jsonl.gz.
- a directory with train.jsonl (.json, .csv, .parquet) and, if there is one, val (validation, test) of the same sort.
- a .py file that defines pairs(split, seed), which yields dicts for 'train' and for 'val'.
- a hub name, or a directory in a layout that `datasets` reads, such as a copy of the hub's, or what its save_to_disk wrote.

Its rows are all of one kind, which the first object tells by its keys; other keys are ignored:
  a pair                {"prompt": "...", "chosen": "...", "rejected": "..."}
  a pair without prompt {"chosen": "...", "rejected": "..."}: dialogues as in Anthropic HH are split after their last
                        '\\n\\nAssistant:', other texts where they cease to be the same, between words
  a ranking             {"prompt": "...", "responses": [best, ..., worst]}, as many in every row; with "scores": [...],
                        a number each, in any order. Of two responses it is a pair.
  an unpaired example   {"prompt": "...", "completion": "...", "label": true or false}, for dpo.py --loss=kto, which
                        takes pairs as they are, too: each is two examples. sft.py learns from the true ones alone.
  a demonstration       {"prompt": "...", "completion": "..."} or {"messages": [...]}, for sft.py
A text may be messages, [{"role": "user", "content": "..."}, ...], of system (first, if at all), user and assistant in
turn: a prompt that ends with the user's, a response that is the assistant's, or whole conversations, alike up to
their last message. `template` writes them (see render). `columns` maps other names to these. Pairs with score_chosen
and score_rejected are dropped where the gap is below min_gap. Ready sources, known by their columns (HH, UltraFeedback,
TL;DR, SHP, IMDb), stand below under that title.

A row of your own that is not of its kind, has a blank response or two equal ones, is reported with its number and
stops the run (see max_bad_lines). Of `datasets`, and of ready sources, such rows are dropped and counted by reason.
Texts are taken as they are, but for white space at the end of HH's responses; a cell of a CSV file holds a text, or
messages as JSON.

Where there is no validation split, val_fraction of the rows is held out, drawn by the seed; rows with the
same prompt go to the same side, so validation prompts are new to the model. Documents are held out likewise;
of a lone one in a .txt file, the end.

Truncation, only where prompt + longest response exceed max_length: the prompt is cut from the left to
max_prompt_length, then responses from the right to what is left. A response ends with the end token, which
counts, unless it was cut. A document follows an end token and ends with one; of a long one, the last token of
one piece is the prompt of the next, so that every token is predicted once.

With `policy`, pairs are drawn: `source` is a prepared set, whose distinct prompts, train's and val's, get num_samples
responses each from the policy; `reward` ranks them, and best against worst, or all that differ, become pairs. Equal
rewards make none (`tied`). Tokenizer, template and lengths are those of the source. The result does not depend on the
number of processes.

Odd data is named in `note:` lines, which meta.json keeps: duplicates, contradictions, validation data that train holds,
too, a length that tells which response is chosen, one text too often. train[7] is the group of that number, from 0.

A set that is undamaged and was made from the same knobs and the same bytes is reused; of a .py file only its
own bytes are looked at, not what it imports. A run that fails or is stopped leaves the set as it was.
"""
import base64
import collections
import contextlib
import csv
import dataclasses
import functools
import glob
import gzip
import hashlib
import heapq
import io
import itertools
import json
import math
import numbers
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import unicodedata
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import config
from config import In, Literal, UserError

# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'           # the experiment: writes data/<name>/
    source: str = ''                # preferences: a hub name, a directory, a .jsonl, .json, .csv, .parquet or .py
                                    # file; '' = none
    data_dir: str = ''              # a subset inside source, e.g. harmless-base of Anthropic/hh-rlhf
    columns: str = ''               # source's names for ours, e.g. 'prompt=question,chosen=answer_a,rejected=answer_b'
    min_gap: In[float, 'x >= 0'] = 0.0              # drop pairs with score_chosen - score_rejected below this
    documents: str = ''             # text to pretrain on: a .py file with documents(split, seed), a .jsonl
                                    # file with `text`, a .txt file (<|endoftext|> lines between texts), or
                                    # 'chosen': prompt + chosen (best, desirable) of source; '' = none
    tokenizer: str = 'gpt2'         # one of tiktoken's, 'bytes', or 'bpe:N': N tokens learned from the text
    template: str = ''              # what stands around a prompt, and around each turn of a user: '' = '{prompt}', for
                                    # messages and HH's dialogues '\n\nHuman: {prompt}\n\nAssistant:', \n
                                    # being a line break; <|endoftext|> at its start is the end token
    max_length: In[int, 'x >= 2'] = 512             # tokens of a prompt and one response; the paper's
    max_prompt_length: In[int, 'x >= 0'] = 0        # a prompt is cut to this, only where too long together; 0 = half of
                                    # max_length, the paper's 256 of 512
    val_fraction: In[float, '0 < x < 1'] = 0.05     # held out, where the source has no validation split
    max_val: In[int, 'x >= 0'] = 0                  # rows of val at most, drawn by the seed; 0 = all
    max_bad_lines: In[int, 'x >= 0'] = 0            # of your own data: more than this many stop the run
    seed: In[int, 'x >= 0'] = 1337                  # of what is held out, or drawn; a .py source gets it too
    dry_run: bool = False           # read, count and print all of it, with three examples, and write nothing
    # to draw pairs from a policy:
    policy: str = ''                # a checkpoint, as dpo.py's init_from; source is then a prepared set, for its prompts
    reward: str = ''                # a .py file with reward(prompts, responses), or a folder of repro/reward_model.py
    num_samples: In[int, 'x >= 2'] = 4              # of each prompt
    num_prompts: In[int, 'x >= 0'] = 0              # distinct ones of train, and as many of val at most; 0 = all
    pairing: Literal['best_worst', 'all'] = 'best_worst'    # one pair a prompt, or all pairs of different rewards
    temperature: In[float, 'x > 0'] = 1.0           # of the draws
    max_new_tokens: In[int, 'x >= 1'] = 128         # of a response; fewer where max_length leaves less
    batch_size: In[int, 'x >= 1'] = 64              # responses drawn at once
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'  # auto = cuda where there is one, else cpu
    join_timeout: In[int, 'x >= 1'] = 120           # seconds to wait at the start for the other processes, of several

    def __post_init__(self):
        self.max_prompt_length = self.max_prompt_length or self.max_length // 2


SPLITS = ('train', 'val', 'documents_train', 'documents_val')
DRAWING = ('reward', 'num_samples', 'num_prompts', 'pairing', 'temperature', 'max_new_tokens', 'batch_size', 'device',
           'join_timeout')
READING = ('data_dir', 'columns', 'min_gap', 'documents', 'tokenizer', 'template', 'max_length', 'max_prompt_length', 'val_fraction',
           'max_val', 'max_bad_lines')
FILES = [f'{s}{end}' for end in ('.bin', '.idx.npy', '.labels.npy') for s in SPLITS] + ['tokenizer.json', 'meta.json']

# -----------------------------------------------------------------------------
# rows: a source's row as ([prompt, response_1, ...], label), or ValueError(reason, what is wrong with it). The prompt is a
# string or messages; the label is None but for an unpaired example's

class ByRule(ValueError):
    """A row that a rule leaves out, and that is nobody's mistake."""
    def __init__(self, reason):
        super().__init__(reason, reason)


def need(row, *keys):
    """ValueError where a row is no object with `keys`."""
    if not isinstance(row, dict):
        raise ValueError('not_an_object', f'not an object with {", ".join(keys)}, but {type(row).__name__}')
    for key in keys:
        if key not in row:
            raise ValueError('missing_key', f"missing key '{key}', it has {', '.join(map(ascii, row)) or 'none':.100}")


def text_in(value, what):
    """A string, or ValueError."""
    if type(value) is not str:
        raise ValueError('not_a_string', f'{what} is not a string, but {type(value).__name__}')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError('not_unicode', f'{what} holds half a character, a lone surrogate') from None
    return value


def number_in(value, key):
    """A finite number as a float, or ValueError."""
    try:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ValueError('score_no_number', f"'{key}' holds {value!r:.40}, which is no finite number")


def read_texts(row, *keys):
    """The strings under `keys`; only a prompt may be blank."""
    need(row, *keys)
    for key in keys:
        if not text_in(row[key], f"'{key}'").strip() and key != 'prompt':
            raise ValueError('empty_text' if key == 'text' else 'empty_response', f"empty '{key}'")
    return [row[key] for key in keys]


def is_messages(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def read_messages(value, key, role):
    """[{'role', 'content'}, ...] of messages, or of a string, which is what `role` says."""
    if not is_messages(value):
        return [dict(role=role, content=text_in(value, f"'{key}'"))]
    found = []
    for i, message in enumerate(value, 1):
        what = f"message {i} of '{key}'"
        if not isinstance(message, dict) or not {'role', 'content'} <= set(message):
            raise ValueError('not_a_message', f'{what} is not an object with role and content')
        if message['role'] not in ('system', 'user', 'assistant'):
            raise ValueError('unknown_role', f"{what} has the role {message['role']!r:.40}, not system, user or assistant")
        found.append(dict(role=message['role'], content=text_in(message['content'], f'content of {what}')))
    return found


def take_turns(messages, key):
    """ValueError where they are not the user's and the assistant's in turn, after one of the system or none."""
    for i, message in enumerate(messages[messages[0]['role'] == 'system':]):
        turn = ('user', 'assistant')[i % 2]
        if message['role'] != turn:
            raise ValueError('not_in_turn', f"'{key}': the {message['role']} speaks where it is the {turn}'s turn")


def read_prompt(row):
    """The `prompt` of a row, a string, or messages that the assistant is to answer."""
    need(row, 'prompt')
    if isinstance(row['prompt'], str):
        return row['prompt']
    messages = read_messages(row['prompt'], 'prompt', 'user')
    take_turns(messages, 'prompt')
    if messages[-1]['role'] != 'user':
        raise ValueError('not_in_turn', "'prompt' does not end with a turn of the user")
    return messages


def read_group(row, *keys):
    """[prompt, *responses] of a row with `prompt` and `keys`. Where there are messages so is the prompt, and under each
    of `keys` stands an answer to it, or a whole conversation, whose beginning then is the prompt."""
    if not isinstance(row, dict) or not any(is_messages(row.get(key)) for key in ('prompt', *keys)):
        return read_texts(row, 'prompt', *keys)
    need(row, *keys)
    before = [] if row.get('prompt') is None else read_messages(row['prompt'], 'prompt', 'user')
    conversations = []
    for key in keys:
        messages = read_messages(row[key], key, 'assistant')
        if messages[0]['role'] == 'assistant' and key != 'messages':
            need(row, 'prompt')
            messages = before + messages
        elif is_messages(row.get('prompt')) and messages[:len(before)] != before:
            raise ValueError('prompts_differ', f"'{key}' does not begin as 'prompt' does")
        take_turns(messages, key)
        if messages[-1]['role'] != 'assistant':
            raise ValueError('no_assistant_turn', f"'{key}' does not end with a turn of the assistant")
        if not messages[-1]['content'].strip():
            raise ValueError('empty_response', f"empty '{key}'")
        conversations.append(messages)
    if any(messages[:-1] != conversations[0][:-1] for messages in conversations):
        raise ValueError('prompts_differ', 'the two sides have different prompts')
    return [conversations[0][:-1], *(messages[-1]['content'] for messages in conversations)]


def read_pair(row):
    """A row with prompt, chosen and rejected."""
    prompt, chosen, rejected = read_group(row, 'chosen', 'rejected')
    if chosen == rejected:
        raise ValueError('identical', "'chosen' and 'rejected' are the same")
    return [prompt, chosen, rejected], None


def read_dialogues(row):
    """A row whose two sides are whole dialogues, as in Anthropic HH."""
    no_key(row, 'prompt')
    sides = [text.rpartition('\n\nAssistant:') for text in read_texts(row, 'chosen', 'rejected')]
    (prompt, turn, chosen), (other, _, rejected) = sides
    if any(not turn or '\n\nHuman:' in response for _, turn, response in sides):
        raise ValueError('no_assistant_turn', 'a side does not end with a turn of the Assistant')
    if prompt != other:
        raise ValueError('prompts_differ', 'the two sides have different prompts')
    return read_pair({'prompt': prompt + turn, 'chosen': chosen.rstrip(), 'rejected': rejected.rstrip()})


def read_implicit(row):
    """A row whose two sides begin with the prompt: with what they share, up to where both responses begin a word.
    The space before a word belongs to it."""
    no_key(row, 'prompt')
    sides = read_texts(row, 'chosen', 'rejected')
    if sides[0] == sides[1]:
        raise ValueError('identical', "'chosen' and 'rejected' are the same")
    common = os.path.commonprefix(sides)
    last = min(len(common), *(len(text.rstrip()) - 1 for text in sides))            # neither response is blank,
    for cut in range(last, len(common) - len(common.lstrip()), -1):                 # nor the prompt
        if all(begins_word(text, cut) for text in sides):
            return [common[:cut], *(text[cut:] for text in sides)], None
    raise ValueError('no_common_prompt', "'chosen' and 'rejected' have no beginning in common, and there is no 'prompt'")


def begins_word(text, cut):
    """Whether text[cut:] begins a word, with its space, or a line, or comes after punctuation that words do not hold."""
    before, after = text[cut - 1], text[cut]
    closes = unicodedata.category(before) in ('Po', 'Pe', 'Pf') and before not in '.,\'"’@#%&*/\\'
    return after == ' ' or before in '\n\r\t' or closes and unicodedata.category(after)[0] not in 'MC'


def no_key(row, key):
    """ValueError where a row has what the first, which told the kind, has not."""
    if isinstance(row, dict) and key in row:
        raise ValueError('another_kind', f"has '{key}', the first row has none")


def read_ranking(row):
    """A row with prompt and `responses`, from the best to the worst, or in any order with `scores`."""
    if not isinstance(row, dict) or 'responses' not in row:
        need(row, 'prompt', 'responses')
    responses, scores = row['responses'], row.get('scores')
    for key in ('responses', 'scores'):
        if key in row and type(row[key]) is not list:
            raise ValueError('not_a_list', f"'{key}' is not a list, but {type(row[key]).__name__}")
    if len(responses) < 2:
        raise ValueError('ranking_of_one', f"'responses' holds {len(responses)}, a ranking needs two or more")
    named = {f'response {i}': response for i, response in enumerate(responses, 1)}
    prompt, *texts = read_group({key: row[key] for key in ('prompt',) if key in row} | named, *named)
    for i, text in enumerate(texts):
        if text in texts[:i]:
            raise ValueError('identical', f'responses {texts.index(text) + 1} and {i + 1} are the same')
    if scores is None:
        return [prompt, *texts], None
    for score in scores:
        if not isinstance(score, numbers.Real) or isinstance(score, bool) or score - score != 0:
            raise ValueError('score_no_number', f"'scores' holds {score!r:.40}, which is no finite number")
    if len(scores) != len(texts):
        raise ValueError('score_count', f"'scores' holds {len(scores)} for {len(texts)} responses")
    if len(set(scores)) < len(scores):
        raise ValueError('tied_scores', "two 'scores' are equal: a ranking needs an order")
    return [prompt, *(text for _, text in sorted(zip(scores, texts), reverse=True))], None


def read_unpaired(row):
    """A row with prompt, completion and label."""
    need(row, 'prompt', 'completion', 'label')
    if not isinstance(row['label'], (bool, np.bool_)):
        raise ValueError('label_not_boolean', f"'label' is not true or false, but {row['label']!r:.40}")
    return read_group(row, 'completion'), bool(row['label'])


def read_demonstration(row):
    """A row with prompt and completion, or with `messages`, whose last is the response."""
    no_key(row, 'label')
    if isinstance(row, dict) and 'messages' in row and 'completion' not in row:
        if not is_messages(row['messages']):
            raise ValueError('not_a_message', "'messages' is not a list of objects with role and content")
        return read_group({'messages': row['messages']}, 'messages'), None
    return read_group(row, 'completion'), None


def read_document(row):
    """[text], None of a row that has it."""
    return read_texts(row, 'text'), None

# -----------------------------------------------------------------------------
# ready sources, by their columns; a copy on disk is as good as the hub's. Sizes and splits as their cards give them.
#
# Anthropic/hh-rlhf, MIT: chosen, rejected, whole dialogues (read_dialogues). data_dir: harmless-base, helpful-base,
#   helpful-online, helpful-rejection-sampled; without it all four, 160,800 train and 8,552 test. red-team-attempts: no pairs.
# HuggingFaceH4/ultrafeedback_binarized, MIT: prompt, chosen and rejected as conversations, score_chosen, score_rejected
#   (read_pair). train_prefs 61,135, test_prefs 2,000; its other splits are not read.
# The others have a function each:

def read_tldr(row):
    """TL;DR comparisons, the config `comparisons` of openai/summarize_from_feedback: info {post, title, subreddit},
    summaries [{text}, {text}], choice (0 or 1), train and validation. The hub has a loading script, which `datasets`
    no longer runs: this is for OpenAI's own files and for copies. Rows on news articles have no post: `no_post`."""
    need(row, 'info', 'summaries', 'choice')
    info, summaries, choice = row['info'], row['summaries'], row['choice']
    if isinstance(summaries, dict) and isinstance(summaries.get('text'), list):     # an older `datasets` wrote it inside out
        summaries = [dict(text=text) for text in summaries['text']]
    objects = isinstance(info, dict) and isinstance(summaries, list) and all(isinstance(some, dict) for some in summaries)
    if not objects or len(summaries) != 2 or choice not in (0, 1):
        raise ValueError('not_a_comparison', "not an object 'info', two 'summaries' and a 'choice' of 0 or 1")
    if not info.get('post'):
        raise ByRule('no_post')
    texts = [' ' + text_in(summary.get('text'), 'a summary').strip() for summary in summaries]
    subreddit, title, post = (text_in(info.get(key) or '', f"'{key}'") for key in ('subreddit', 'title', 'post'))
    chosen, rejected = texts[::-1] if choice else texts
    return read_pair(dict(prompt=f'SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:', chosen=chosen, rejected=rejected))


def read_tldr_mirror(row):
    """The same as CarperAI/openai_summarize_comparisons has it, in Parquet: prompt 'SUBREDDIT: ...', chosen and rejected
    'TL;DR: ...'; train 92,534, valid1 33,082, valid2 50,715, test 83,629, says the card of a set made from it. 'TL;DR:' goes
    over to the prompt."""
    prompt, *sides = read_texts(row, 'prompt', 'chosen', 'rejected')
    chosen, rejected = (' ' + side.strip().removeprefix('TL;DR:').strip() for side in sides)
    return read_pair(dict(prompt=prompt.rstrip().removesuffix('TL;DR:').rstrip() + '\nTL;DR:', chosen=chosen, rejected=rejected))


def read_shp(row):
    """stanfordnlp/SHP: history (a Reddit post), human_ref_A, human_ref_B (comments), labels (1: A is preferred),
    score_ratio; a data_dir for each of 18 subreddits, e.g. askbaking; train, validation, test. As the DPO authors' code does,
    only pairs with score_ratio >= 2 are kept, the others counted as `score_ratio`; the post is a turn of the user."""
    need(row, 'history', 'human_ref_A', 'human_ref_B', 'labels', 'score_ratio')
    if row['labels'] not in (0, 1):
        raise ValueError('label_not_boolean', f"'labels' is not 0 or 1, but {row['labels']!r:.40}")
    if number_in(row['score_ratio'], 'score_ratio') < 2:
        raise ByRule('score_ratio')
    a, b = row['human_ref_A'], row['human_ref_B']
    chosen, rejected = (a, b) if row['labels'] == 1 else (b, a)
    user = [dict(role='user', content=row['history'])]
    return read_pair(dict(prompt=user, chosen=chosen, rejected=rejected))


def read_imdb(row, tokenizer, seed):
    """stanfordnlp/imdb: text, label (not used); train 25,000, test 25,000, unsupervised 50,000 (not read). A review becomes
    a demonstration for the paper's controlled sentiment: its first 2 to 8 tokens, as many as seed and text decide, and the
    rest; '<br />' is a line break. Where a tokenizer is still to be learned (None), words count instead of tokens."""
    text = re.sub(r'\s*<br />\s*', '\n', read_texts(row, 'text')[0]).strip()
    draw = int.from_bytes(hashlib.sha256(f'{seed} {text}'.encode()).digest()[:8], 'big')
    head = text[:500]
    if tokenizer:
        ids = tokenizer.encode_ordinary(head)
        pieces = [tokenizer.decode_single_token_bytes(token) for token in ids[:9]]
    else:
        import regex
        pieces = [word.encode() for word in regex.findall(PATTERN, head)[:9]]
    for n in (2 + (draw + i) % 7 for i in range(7)):            # the next, where this one does not end a word
        prefix = b''.join(pieces[:n]).decode(errors='ignore')
        rest = text[len(prefix):]
        if rest.strip() and begins_word(text, len(prefix)) and (not tokenizer or tokenizer.encode_ordinary(prefix) == ids[:n]):
            return [prefix, rest], None
    raise ByRule('too_short')


KINDS = {read_pair: 'pairs', read_dialogues: 'pairs', read_implicit: 'pairs', read_tldr: 'pairs', read_tldr_mirror: 'pairs',
         read_shp: 'pairs', read_ranking: 'rankings', read_unpaired: 'unpaired examples', read_demonstration: 'demonstrations',
         read_imdb: 'demonstrations'}
READY = (read_dialogues, read_tldr, read_tldr_mirror, read_shp, read_imdb)
DIRT = ('no_assistant_turn', 'prompts_differ', 'empty_response', 'empty_text', 'identical')     # they have it: nobody's mistake
OURS = ('prompt', 'chosen', 'rejected', 'score_chosen', 'score_rejected', 'responses', 'scores', 'completion', 'label', 'messages',
        'text')


def reader_of(row):
    """The one of KINDS for rows like this. What holds a whole pair is one, whatever else it holds."""
    keys = set(row)
    if {'chosen', 'rejected'} <= keys:
        sides = [row['chosen'], row['rejected']]
        texts = [side if isinstance(side, str) else '' for side in sides]
        if 'prompt' in keys or texts != sides:
            tldr = str(row.get('prompt')).startswith('SUBREDDIT: r/') and any(text.startswith('TL;DR:') for text in texts)
            return read_tldr_mirror if tldr else read_pair
        return read_dialogues if all('\n\nAssistant:' in text for text in texts) else read_implicit
    if 'responses' in keys:
        return read_ranking
    if 'completion' in keys:
        return read_unpaired if 'label' in keys else read_demonstration
    for reader, columns in ((read_demonstration, {'messages'}), (read_tldr, {'info', 'summaries', 'choice'}),
                            (read_shp, {'history', 'human_ref_A', 'human_ref_B'}), (read_imdb, {'text', 'label'})):
        if columns <= keys:
            return reader
    return read_unpaired if 'label' in keys else read_pair


def holds_messages(row):
    """Whether a row's texts are turns, for which the template has another default."""
    values = [row.get(key) for key in ('prompt', 'chosen', 'rejected', 'completion', 'messages')]
    responses = row.get('responses')
    return any(map(is_messages, values + (responses if isinstance(responses, list) else []))) or reader_of(row) is read_shp

# -----------------------------------------------------------------------------
# sources: {'train': (where, rows, read), 'val': the same}, or 'train' alone. rows() yields (number, row)
# whenever called; read(row) gives the object, and once interpret has seen to it (texts, label); where ('pairs.jsonl line') is
# for messages, '' where a bad row is dropped by rule and is not the user's mistake

FILE_SORTS = ('.jsonl', '.json', '.csv', '.parquet', '.jsonl.gz', '.json.gz', '.csv.gz')
TABLES = ('.csv', '.csv.gz', '.parquet')


@contextlib.contextmanager
def opened(path):
    """A file's bytes, decompressed."""
    try:
        with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as f:
            yield f
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f'{path} is damaged: {error}') from None


def parse_json(data):
    """What JSON in bytes says."""
    try:
        return json.loads(data.decode('utf-8-sig'))
    except UnicodeDecodeError as error:
        raise ValueError('not_utf8', f'not UTF-8 at byte {error.start + 1}') from None
    except (ValueError, RecursionError) as error:
        raise ValueError('not_json', f'not JSON ({error})') from None


def from_lines(path, read):
    def rows():
        with opened(path) as f:
            yield from ((number, line) for number, line in enumerate(f, 1) if line.strip())
    return f'{path} line', rows, lambda line: read(parse_json(line))


def from_items(items, where, read):
    return where, functools.partial(enumerate, items, 1), read


def as_it_is(row):
    return row


def from_array(path):
    """A JSON array; a .json file that begins otherwise holds a line a row."""
    with opened(path) as f:
        data = f.read()
    if data.removeprefix(b'\xef\xbb\xbf').lstrip()[:1] != b'[':
        return from_lines(path, as_it_is)
    try:
        return from_items(parse_json(data), f'{path} item', as_it_is)
    except ValueError as error:
        raise UserError(f'{path}: {error.args[1]}') from None


def from_parquet(path):
    import pyarrow
    import pyarrow.parquet

    def rows():
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                batches = (batch.to_pylist() for batch in file.iter_batches(1000))
                yield from enumerate(itertools.chain.from_iterable(batches), 1)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f'{path} cannot be read as Parquet: {(str(error) or type(error).__name__)[:200]}') from None
    return f'{path} row', rows, as_it_is


def from_csv(path):
    """Cells are text, and JSON where we need a list, a number or a label (see from_cells). Python's reader, since the one of
    `datasets` guesses types: it takes the answers '007' and 'None' for a number and for nothing."""
    def rows():
        with opened(path) as binary:
            file = io.TextIOWrapper(binary, 'utf-8-sig', 'surrogateescape', newline='')     # surrogates: what is not UTF-8
            csv.field_size_limit(2**31 - 1)
            reader = csv.reader(file, strict=True)
            while True:
                number = reader.line_num + 1
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    row = ValueError('not_csv', f'not CSV ({error})')
                if row is None:
                    return
                if row:                                         # [] is a blank line
                    yield number, row
    _, names = next(rows(), (0, []))
    if not isinstance(names, list) or not names or len(set(names)) < len(names) or not ''.join(names).replace('\t', '').isprintable():
        raise UserError(f'{path} has no line of column names, in UTF-8 and all different, at its top')

    def read(row):
        if isinstance(row, ValueError):
            raise row
        if len(row) != len(names):
            raise ValueError('cell_count', f'{len(row)} cells, the first line names {len(names)} columns')
        try:
            ''.join(row).encode()
        except UnicodeEncodeError:
            raise ValueError('not_utf8', 'not UTF-8') from None
        return dict(zip(names, row))
    return f'{path} line', lambda: itertools.islice(rows(), 1, None), read


def from_cells(row):
    """A row of text cells with lists, numbers and labels where our keys ask for them."""
    found = dict(row)
    for key, text in row.items():
        if key == 'label':
            found[key] = {'true': True, '1': True, 'false': False, '0': False}.get(text.strip().lower(), text)
        elif key in ('score_chosen', 'score_rejected', 'score_ratio', 'labels', 'choice') or text[:1] in ('[', '{'):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(text)
                if type(value) is not list or is_messages(value) or key in ('responses', 'scores'):
                    found[key] = value
            if found[key] is text and re.match(r"""\[\s*{\s*['"](role|content)['"]\s*:""", text):
                raise ValueError('not_json', f"'{key}' begins as messages do, but is not JSON")
    return found


def from_file(path):
    sort = path.removesuffix('.gz').rpartition('.')[2]
    if sort == 'jsonl':
        return from_lines(path, as_it_is)
    return {'json': from_array, 'csv': from_csv, 'parquet': from_parquet}[sort](path)


def from_python(path, function, seed, read):
    """What the function of that name in a .py file yields for both splits."""
    try:
        found = runpy.run_path(path).get(function)
        if not callable(found):
            raise UserError(f'{path} defines no {function}(split, seed)')
        return {split: from_items(list(found(split, seed)), f"{path} {function}('{split}') item", read)
                for split in ('train', 'val')}
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = [f' line {frame.lineno}' for frame in frames if frame.filename == path][-1:]
        raise UserError(f'{path}{"".join(at)}: {type(error).__name__}: {error}') from None


def from_text(path, val_fraction, read):
    """The documents of a .txt file; a lone one is divided."""
    try:
        with open(path, encoding='utf-8') as f:
            found = re.split(rf'(?m)^{re.escape(EOT)}[ \t]*$', f.read())
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 at byte {error.start + 1}') from None
    found = [document.strip('\n') for document in found if document.strip()]
    if len(found) != 1:
        return {'train': from_items(found, f'{path} document', read)}
    cut = round(len(found[0]) * (1 - val_fraction))
    halves = {'train': found[0][:cut], 'val': found[0][cut:]}
    return {split: from_items([text], f'{path} {split} part', read) for split, text in halves.items()}


def load_dataset(source, data_dir, cache_dir=None):
    """A datasets.DatasetDict, of the local directory if there is one, or one line on why there is none."""
    what = f"source '{source}'" + (data_dir and f" with data_dir '{data_dir}'") + ' could not be loaded'
    if not os.path.isdir(source):
        hub = os.environ.get('HF_ENDPOINT', 'https://huggingface.co')
        what += ' from the hub, and is no local directory'
        try:
            urllib.request.urlopen(hub, timeout=5).close()
        except OSError as error:
            if not isinstance(error, urllib.error.HTTPError):   # that is an answer
                what += f' ({hub} does not answer: offline?)'
                os.environ['HF_HUB_OFFLINE'] = '1'              # the cache or nothing, no minutes of retries
    import datasets                                             # now, since it reads HF_HUB_OFFLINE here
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        path = os.path.abspath(source) if os.path.isdir(source) else source        # '.' is no name to datasets
        if os.path.isfile(os.path.join(path, data_dir, 'state.json')):      # of save_to_disk, a lone split
            return datasets.DatasetDict(train=datasets.load_from_disk(os.path.join(path, data_dir)))
        return datasets.load_dataset(path, data_dir=data_dir or None, cache_dir=cache_dir)
    except Exception as error:
        raise UserError(f'{what}: {type(error).__name__}: {str(error)[:300]}') from None


def train_and_val(found, source):
    """{'train': ..., 'val': ...} of {name: split}; without 'val' where there is none."""
    train = next((split for split in ('train', 'train_prefs') if split in found), next(iter(found)))
    if len(found) > 1 and not train.startswith('train'):
        raise UserError(f"source '{source}' has no split 'train', only {', '.join(found)}")
    names = ('val', 'validation', 'valid', 'valid1', 'dev', 'test_prefs', 'test')
    val = [split for split in names if split in found and split != train]
    return {'train': found[train]} | {'val': found[split] for split in val[:1]}


def read_columns(columns):
    """The knob `columns` as {ours: theirs}, or UserError."""
    found = {}
    for part in filter(None, columns.split(',')):
        ours, equals, theirs = map(str.strip, part.partition('='))
        if not equals or not theirs:
            raise UserError(f"columns: '{part}' must be written ours=theirs, e.g. prompt=question")
        if ours not in OURS:
            raise UserError(f"columns: unknown name '{ours}' of ours{config._nearest(ours, OURS)}")
        if ours in found or theirs in found.values():
            raise UserError(f"columns: '{ours if ours in found else theirs}' stands there twice")
        found[ours] = theirs
    return found


def renamed(row, columns):
    """A row under our names. columns: from read_columns."""
    if not columns or not isinstance(row, dict):
        return row
    for theirs in columns.values():
        need(row, theirs)
    return {key: row[key] for key in row if key not in columns.values()} | {ours: row[theirs] for ours, theirs in columns.items()}


def resolved(template, turns):
    """The knob `template` with its default, HH's for what is made of turns, and with line breaks where a shell left '\\n'."""
    return template.replace('\\n', '\n') or ('\n\nHuman: {prompt}\n\nAssistant:' if turns else '{prompt}')


def check_gap(row, min_gap, scored):
    """ByRule where a pair's scores are too close, or contradict it. scored: the first row has scores."""
    if scored or 'score_chosen' in row or 'score_rejected' in row:
        need(row, 'score_chosen', 'score_rejected')
        chosen, rejected = (number_in(row[key], key) for key in ('score_chosen', 'score_rejected'))
        if chosen - rejected < min_gap:
            raise ByRule('score_gap')


def interpret(splits, cfg):
    """The splits of a source, where read(row) gives the object itself, so that it gives its texts, the prompt rendered; and
    the resolved template. The first object of each split tells its kind; all must be of one."""
    columns, firsts, readers = read_columns(cfg.columns), {}, {}

    def object_of(row, read, cells):
        row = renamed(read(row), columns)
        return from_cells(row) if cells else row
    for split, (where, rows, read) in splits.items():
        name = where.rpartition(' ')[0] or f"source '{cfg.source}'"
        readers[split] = functools.partial(object_of, read=read, cells=name.removesuffix('.gz').endswith('.csv'))
        for _, row in rows():
            with contextlib.suppress(ValueError):               # a bad row is survey's to report
                if isinstance(first := read(row), dict):
                    if absent := [theirs for theirs in columns.values() if theirs not in first]:
                        raise UserError(f"columns: {name} has no '{absent[0]}'{config._nearest(absent[0], list(map(str, first)))}")
                    firsts[split] = name, readers[split](row)
                    break

    kinds = {split: reader_of(row) for split, (_, row) in firsts.items()}
    turns = {split: holds_messages(row) for split, (_, row) in firsts.items()}
    if len({(KINDS[kind], turns[split]) for split, kind in kinds.items()}) > 1:
        raise UserError(', '.join(f'{firsts[split][0]} holds {KINDS[kind]}' + ' of messages' * turns[split]
                                  for split, kind in kinds.items()) + ': both must be of one kind (their first lines tell)')
    conversations, dialogues = any(turns.values()), read_dialogues in kinds.values()
    template = resolved(cfg.template, conversations or dialogues)
    if read_imdb in kinds.values():
        learned = cfg.tokenizer == 'bytes' or cfg.tokenizer.startswith('bpe:')
        imdb = functools.partial(read_imdb, tokenizer=None if learned else load_tokenizer('', cfg.tokenizer), seed=cfg.seed)

    def texts_of(row, read, kind, scored, ready):
        row = read(row)
        try:
            (prompt, *responses), label = kind(row)
        except ValueError as error:
            raise ByRule(error.args[0]) if ready and error.args[0] in DIRT else error
        if KINDS.get(kind) == 'pairs':
            check_gap(row, cfg.min_gap, scored)
        text = prompt if dialogues and not cfg.template else render(prompt, template)      # they have their frame
        if not (isinstance(prompt, str) or conversations or cfg.template):
            raise ValueError('another_kind', 'holds messages, the first row has none')
        if conversations or not isinstance(prompt, str):
            responses = [spaced(text, response) for response in responses]
        return [text, *responses], label
    found = {}
    for split, (where, rows, _) in splits.items():
        name, row = firsts.get(split, ('', {}))
        kind = kinds.get(split, read_pair)
        scored = KINDS[kind] == 'pairs' and bool({'score_chosen', 'score_rejected'} & set(row))
        if cfg.min_gap and row and not scored:
            raise UserError(f'min_gap={cfg.min_gap:g} needs pairs with score_chosen and score_rejected; {name} has '
                            f'{", ".join(map(str, row))}')
        ready = kind in READY
        kind = imdb if kind is read_imdb else kind
        if row and (not where or name.endswith(TABLES)):        # all rows have the columns of the first
            check_columns(row, kind, name)
        found[split] = where, rows, functools.partial(texts_of, read=readers[split], kind=kind, scored=scored, ready=ready)
    return found, template


def check_columns(row, kind, name):
    """UserError where a table has not the columns of its kind."""
    try:
        kind(row)
    except ValueError as error:
        if error.args[0] == 'missing_key':
            hint = '. These are transcripts, as HH\'s red-team-attempts are, not pairs: set another --data_dir' * ('transcript' in row)
            hint += '. Are its cells separated by commas?' * any(mark in ''.join(row) for mark in ';\t|')
            raise UserError(f'{name} has columns {", ".join(row)}; it needs chosen and rejected, and prompt unless they begin with '
                            f'it; or prompt and responses; or prompt and completion; or messages (see --columns){hint}') from None


def open_preferences(cfg, hub, aside):
    """The source of pairs, rankings, examples or demonstrations, and the resolved template. hub: its DatasetDict where it is on
    the hub; aside: a temporary folder."""
    folder = os.path.normpath(os.path.join(cfg.source, cfg.data_dir))
    sorts = [sort for sort in FILE_SORTS[:4] if os.path.isfile(os.path.join(folder, f'train{sort}'))]
    if len(sorts) > 1:
        raise UserError(f'{folder} holds {" and ".join(f"train{sort}" for sort in sorts)}: which one? Give the file, or keep one')
    if cfg.source.endswith('.py'):
        splits = from_python(cfg.source, 'pairs', cfg.seed, as_it_is)
    elif os.path.isfile(cfg.source):
        splits = {'train': from_file(cfg.source)}
    elif sorts:
        files = {file.removesuffix(sorts[0]): file for file in os.listdir(folder) if file.endswith(sorts[0])}
        splits = {split: from_file(os.path.join(folder, file)) for split, file in train_and_val(files, folder).items()}
    else:
        # local files get a cache of their own: the shared one tells them by their times, and keeps a copy
        found = hub or load_dataset(cfg.source, cfg.data_dir, os.path.join(aside, 'cache'))
        splits = {split: from_items(table, '', as_it_is) for split, table in train_and_val(found, cfg.source).items()}
    return interpret(splits, cfg)


def open_documents(cfg):
    """The source of documents."""
    if cfg.documents.endswith('.jsonl'):
        return {'train': from_lines(cfg.documents, read_document)}

    def read(text):
        return read_document({'text': text})
    if cfg.documents.endswith('.py'):
        return from_python(cfg.documents, 'documents', cfg.seed, read)
    return from_text(cfg.documents, cfg.val_fraction, read)

# -----------------------------------------------------------------------------
# the first pass: what is bad, what is held out

def survey(source, bad):
    """Read a split once. Returns (prompts, labels, K, dropped): the number of each row's prompt, by order of
    appearance, int (N,), -1 for a row that is dropped; the labels, bool (N,), None but for unpaired examples; how
    many texts a row has after its first; and {reason: n}. Adds a line to `bad` on each of the user's."""
    where, rows, read = source
    prompts, labels, K, seen, dropped = [], [], None, {}, collections.Counter()
    for number, row in tqdm(rows(), 'reading', unit=' rows', disable=None, leave=False):
        try:
            (prompt, *responses), label = read(row)
            K = len(responses) if K is None else K
            if len(responses) != K:
                raise ValueError('another_count', f'{len(responses)} responses, but {K} in the first good line')
            digest = hashlib.sha256(prompt.encode()).digest()
            prompts.append(seen.setdefault(digest, len(seen)))
            labels.append(label)
        except ValueError as error:
            reason, message = error.args
            dropped[reason] += 1
            prompts.append(-1)
            labels.append(None)
            if where and not isinstance(error, ByRule):
                bad.append(f'{where} {number}: {message}')
    labelled = any(label is not None for label in labels)
    return np.array(prompts, np.int64), np.array(labels, bool) if labelled else None, K, dict(sorted(dropped.items()))


def stop_at_bad(bad, allowed):
    """Report the user's bad rows, ten at most; raise UserError where they are more than `allowed`."""
    hint = '(allow and skip bad lines with --max_bad_lines=N)'
    stop = len(bad) > allowed
    if stop and len(bad) == 1:
        raise UserError(f'{bad[0]} {hint}')
    for line in bad[:10]:
        print(line if stop else f'skipped {line}', file=sys.stderr)
    if len(bad) > 10:
        print(f'and {len(bad) - 10:,} more', file=sys.stderr)
    if stop:
        raise UserError(f'{len(bad):,} bad lines, {allowed:,} allowed {hint}')


def hold_out(prompts, fraction, seed):
    """Which rows are held out, bool (N,): whole prompts, `fraction` of the rows or a bit less, at least one.
    prompts: from survey, at least two different ones."""
    sizes = np.bincount(prompts[prompts >= 0])                  # rows of each prompt
    left = min(max(1, round(fraction * sizes.sum())), sizes.sum() - 1)
    held = np.zeros(len(sizes), bool)
    for prompt in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[prompt] <= left:
            held[prompt] = True
            left -= sizes[prompt]
    if not held.any():
        held[sizes.argmin()] = True
    return (prompts >= 0) & held[prompts]


def plan(splits, cfg, what):
    """{split: (rows, n, dropped, labels)} of a source: rows() yields the texts of the n rows that make the split;
    labels: bool (n,), or None."""
    bad = []
    found = {split: survey(source, bad) for split, source in splits.items()}
    stop_at_bad(bad, cfg.max_bad_lines)
    counts = {split: K for split, (_, _, K, _) in found.items() if K is not None}
    if len(set(counts.values())) > 1:
        raise UserError(f'{what}: ' + ', '.join(f'{split} has rankings of {K}' for split, K in counts.items()) +
                        ': all groups of a set have as many responses')
    take = {split: prompts >= 0 for split, (prompts, *_) in found.items()}
    if 'val' not in splits:
        prompts, labels, K, dropped = found['train']
        if prompts.max(initial=-1) < 1:
            raise UserError(f'{what}: two different prompts are needed, one to hold out for validation, of '
                            f'{take["train"].sum()} rows; dropped: {dropped or "none"}')
        splits, found = splits | {'val': splits['train']}, found | {'val': (prompts, labels, K, {})}
        take['val'] = hold_out(prompts, cfg.val_fraction, cfg.seed)
        take['train'] &= ~take['val']
    over = np.flatnonzero(take['val'])
    if 0 < cfg.max_val < len(over):
        left_out = np.random.default_rng(cfg.seed).permutation(over)[cfg.max_val:]
        take['val'][left_out] = False
        found['val'] = (*found['val'][:3], found['val'][3] | {'over_max_val': len(left_out)})
    plans = {}
    for split, (_, labels, _, dropped) in found.items():
        if not take[split].any():
            raise UserError(f'{what}: no rows are left for {split}; dropped: {dropped or "none"}')
        plans[split] = (functools.partial(kept_rows, splits[split], take[split]), int(take[split].sum()), dropped,
                        None if labels is None else labels[take[split]])
    return plans


def kept_rows(source, take):
    """The texts of the rows that `take`, bool (N,), names."""
    _, rows, read = source
    return (read(row)[0] for (_, row), wanted in zip(rows(), take) if wanted)


def chosen_documents(plans):
    """Plans of documents from those of preferences: prompt + first response of each row, but for undesirable ones."""
    found = {}
    for split, (rows, n, _, labels) in plans.items():
        keep = np.ones(n, bool) if labels is None else labels
        if not keep.any():
            raise UserError(f"documents='chosen': no desirable example is left for {split}")
        found[f'documents_{split}'] = (
            lambda rows=rows, keep=keep: ([prompt + best] for (prompt, best, *_), good in zip(rows(), keep) if good),
            int(keep.sum()), {}, None)
    return found

# -----------------------------------------------------------------------------
# a tokenizer of our own

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"       # GPT-2's


def train_bpe(words, size):
    """Byte-level BPE: the most frequent pair of neighbours becomes a token, until there are `size` tokens.

    words: {bytes: count}, pieces that no token crosses. Returns the tokens in rank order, list of bytes,
    fewer than `size` where every word has become one token. A tie goes to the pair of lower ranks.
    """
    tokens = [bytes([b]) for b in range(256)]
    words, weights = [list(word) for word in words], list(words.values())
    counts, places = collections.Counter(), collections.defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += weights[i]
            places[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < size:
        count, best = heapq.heappop(heap)
        if counts[best] != -count:
            continue                                # out of date: it was pushed again with its new count
        changed, rank = set(), len(tokens)          # never a token twice: the same bytes always merge alike
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for i in places.pop(best):
            old, new = words[i], []
            for t in old:
                if new and (new[-1], t) == best:
                    new[-1] = rank
                else:
                    new.append(t)
            for word, sign in ((old, -1), (new, 1)):
                for pair in zip(word, word[1:]):
                    counts[pair] += sign * weights[i]
                    places[pair].add(i)
                    changed.add(pair)
            words[i] = new
        for pair in changed:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
    return tokens


def make_tokenizer(tokenizer, texts, aside):
    """Write 'bytes' or 'bpe:N', learned from the strings `texts`, to tokenizer.json in the folder `aside`."""
    words, size = collections.Counter(), 256
    if tokenizer != 'bytes':
        import regex                                # tiktoken needs it too
        size = int(tokenizer[4:]) - 1               # the end token is one of N
        for text in tqdm(texts, 'counting words', unit=' texts', disable=None, leave=False):
            words.update(regex.findall(PATTERN, text))
    tokens = train_bpe({word.encode(): count for word, count in words.items()}, size)
    if len(tokens) < size:
        print(f'tokenizer {tokenizer}: no pairs are left to merge, it has {len(tokens) + 1:,} tokens')
    with open(os.path.join(aside, 'tokenizer.json'), 'w') as f:
        tokens = [base64.b64encode(token).decode() for token in tokens]
        json.dump({'name': tokenizer, 'pattern': PATTERN, 'tokens': tokens}, f)

# -----------------------------------------------------------------------------
# the second pass: texts to token ids

def truncate(prompt, responses, max_length, max_prompt_length):
    """The paper's truncation of token lists: [prompt, *responses], prompt + any response <= max_length."""
    if len(prompt) + max(map(len, responses)) > max_length:
        prompt = prompt[-max_prompt_length:]
        responses = [response[:max_length - len(prompt)] for response in responses]
    return [prompt, *responses]


def encode_groups(rows, tokenizer, cfg):
    """Token ids of rows, lists of a prompt, rendered, and K responses. Returns (parts, whole): the parts of all groups, one after
    another, lists of int; and the same before they were cut."""
    parts, whole = [], []
    for prompt, *responses in rows:
        prompt = rendered_ids(tokenizer, prompt, cfg.template)
        responses = [text_ids(tokenizer, response) + [tokenizer.eot_token] for response in responses]
        parts += truncate(prompt, responses, cfg.max_length, cfg.max_prompt_length)
        whole += [prompt, *responses]
    return parts, whole


def encode_documents(rows, tokenizer, cfg):
    """The same of documents, [text] each: groups of a prompt of one token and one response."""
    parts, step = [], cfg.max_length - 1
    for text, in rows:
        ids = [tokenizer.eot_token, *text_ids(tokenizer, text), tokenizer.eot_token]
        for i in range(0, len(ids) - 1, step):
            parts += ids[i:i + 1], ids[i + 1:i + 1 + step]
    return parts, parts


@dataclass
class Seen:
    """What is remembered of a split's groups, int64 (N, K+1), of the prompt and each response: its tokens, and before it
    was cut its tokens and a hash of them."""
    lengths: np.ndarray
    whole: np.ndarray
    hashes: np.ndarray


def write_split(path, rows, n, K, encode, tokenizer, cfg, labels=None):
    """Write <path>.bin and <path>.idx.npy of n rows, as groups of K responses, and <path>.labels.npy where there are
    labels, bool (n,). Returns what meta.json says of them, and Seen. rows: iterator of lists of texts; encode: one of the
    functions above."""
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    digest, seen, equal = hashlib.sha256(), [], 0
    with open(f'{path}.bin', 'wb') as f, tqdm(total=n, desc=os.path.basename(path), unit=' rows', disable=None) as bar:
        while chunk := list(itertools.islice(rows, 1000)):
            parts, whole = encode(chunk, tokenizer, cfg)
            tokens = np.array(list(itertools.chain.from_iterable(parts)), dtype)
            f.write(tokens)
            digest.update(tokens)
            seen.append(np.array([[len(part) for part in parts], [len(part) for part in whole],
                                  [hash(tuple(part)) for part in whole]], np.int64))
            responses = (parts[i + 1:i + 1 + K] for i in range(0, len(parts), K + 1))
            equal += sum(any(a == b for a, b in itertools.combinations(some, 2)) for some in responses)
            bar.update(len(chunk))
    seen = Seen(*np.concatenate(seen, 1).reshape(3, -1, K + 1))                     # (N, K+1) each
    lengths, cut = seen.lengths, seen.whole - seen.lengths
    ends = lengths.cumsum().reshape(-1, K + 1)                                      # (N, K+1)
    index = np.column_stack((ends[:, 0] - lengths[:, 0], ends)).astype(np.int64)    # (N, K+2)
    info = dict(groups=len(index), K=K, tokens=int(index[-1, -1]), longest=int(lengths.sum(1).max()),
                dtype=np.dtype(dtype).name, bin_sha256=digest.hexdigest(),
                truncated=dict(prompts=int((cut[:, 0] > 0).sum()), responses=int((cut[:, 1:] > 0).sum()), tokens=int(cut.sum())))
    if K == 2:
        info |= dict(chosen_longer=int((lengths[:, 1] > lengths[:, 2]).sum()), as_long=int((lengths[:, 1] == lengths[:, 2]).sum()))
    if equal:
        info['equal_once_cut'] = equal
    if labels is not None:
        info |= dict(desirable=int(labels.sum()), undesirable=int((~labels).sum()))
    for name, array in (('idx', index), ('labels', labels)):
        if array is not None:
            file = io.BytesIO()
            np.save(file, array)
            with open(f'{path}.{name}.npy', 'wb') as f:
                f.write(file.getvalue())
            info[f'{name}_sha256'] = hashlib.sha256(file.getvalue()).hexdigest()
    return info, seen

# -----------------------------------------------------------------------------
# a look before anything is written

SHARE, COUNT, ERRORS = 0.1, 10, 3       # what is odd: a share of all, of at least so many; so many standard errors
MARK = '⟨{}⟩'                           # what is no text but said of it


def response_names(K):
    return {1: ['response'], 2: ['chosen', 'rejected']}.get(K) or [f'response {k}' for k in range(1, K + 1)]


def suspicions(folder, meta, seen, labels=None):
    """What is odd about the preferences of the set in `folder`, list of str. seen: {split: Seen}; labels: {split: bool (n,)}
    of unpaired examples. Texts are compared whole, before they are cut; lengths are those that training sees."""
    tokenizer, labels, notes, keys = load_tokenizer(folder, meta['tokenizer']), labels or {}, [], {}

    def text(split, i, part=0):
        """The beginning of a prompt or a response, quoted."""
        info, lengths = meta['splits'][split], seen[split].lengths
        dtype, start = np.dtype(info['dtype']), int(lengths[:i].sum() + lengths[i, :part].sum())
        ids = np.fromfile(os.path.join(folder, f'{split}.bin'), dtype, lengths[i, part], offset=start * dtype.itemsize)
        found = visible(' '.join(text_of(tokenizer, ids.tolist()).split()))
        return f"'{found if len(found) < 50 else found[:49] + '…'}'"

    for split in [s for s in ('train', 'val') if s in seen]:
        info, hashes = meta['splits'][split], seen[split].hashes
        n, K = len(hashes), info['K']
        what = {1: 'examples', 2: 'pairs'}.get(K, 'rankings')
        if lost := info['dropped'].get('identical'):
            notes.append(f'{split}: identical, {lost:,} rows dropped: two of their responses are the same')
        if equal := info.get('equal_once_cut'):
            notes.append(f'{split}: equal responses once cut, {equal:,} of {n:,} {what}: they teach nothing')

        # the same texts twice: keys[split] in whatever order, `exact` in the same
        weights = np.array([0x9E3779B97F4A7C15 * (2 * j + 1) % 2**63 for j in range(K + 1)])
        keys[split] = np.column_stack([hashes[:, 0], np.sort(hashes[:, 1:], 1)]) @ weights
        exact = hashes @ weights + (labels[split] if split in labels else 0)
        _, first, inverse = np.unique(exact, return_index=True, return_inverse=True)
        if len(first) < n:
            i = int((first[inverse] < np.arange(n)).argmax())
            notes.append(f'{split}: exact duplicates, {n - len(first):,} of {n:,} {what}: {split}[{i}] repeats '
                         f'{split}[{first[inverse][i]}], {text(split, i)}')
        first = np.sort(first)
        _, other, inverse = np.unique(keys[split][first], return_index=True, return_inverse=True)
        if len(other) < len(first):
            i = int((other[inverse] < np.arange(len(first))).argmax())
            how = 'labelled both ways' if K == 1 else 'the same responses in another order'
            notes.append(f'{split}: contradictions, {len(first) - len(other):,} of {n:,} {what}: {how}, {split}[{first[i]}] '
                         f'and {split}[{first[other[inverse][i]]}], {text(split, first[i])}')

        for part, name in enumerate(['prompt', *response_names(K)]):
            _, first, counts = np.unique(hashes[:, part], return_index=True, return_counts=True)
            if (most := int(counts.max())) >= max(COUNT, SHARE * n):
                notes.append(f'{split}: the same {name}{" response" * (K == 2 and part > 0)} in {most:,} of {n:,} {what}: '
                             f'{text(split, first[counts.argmax()], part)}')
        if info['truncated']['responses'] >= max(COUNT, 0.5 * n * K):
            knob = 'max_new_tokens' if 'max_new_tokens' in meta else 'max_length'
            notes.append(f"{split}: responses cut at {knob}={meta[knob]}, {info['truncated']['responses']:,} of "
                         f'{n * K:,}: few show where one ends')
        longer, unequal = info.get('chosen_longer', 0), n - info.get('as_long', n)
        off = abs(longer - unequal / 2)
        if unequal and off >= SHARE * unequal and off >= ERRORS * 0.5 * math.sqrt(unequal):
            which = 'longer' if longer > unequal / 2 else 'shorter'
            notes.append(f'{split}: length bias, chosen is the {which} one in {0.5 + off / unequal:.1%} of {unequal:,} pairs of '
                         'unequal length: a model that only counts tokens is right as often')

    if len(keys) == 2:
        found = np.isin(seen['val'].hashes[:, 0], seen['train'].hashes[:, 0])
        both = np.isin(keys['val'], keys['train'])
        if found.any():
            i = int((found + 1 * both).argmax())
            j = int((1 * (seen['train'].hashes[:, 0] == seen['val'].hashes[i, 0]) + (keys['train'] == keys['val'][i])).argmax())
            notes.append(f'val: overlap with train, the prompt of {found.sum():,} of {len(found):,} {what} and {both.sum():,} whole: '
                         f'val[{i}] and train[{j}], {text("val", i)}')
    return notes


def paint(text, style):
    """Coloured where colours are wanted, else plain."""
    return f'\x1b[{style}m{text}\x1b[0m' if colours() else text


def shown_piece(title, style, ids, lost, tokenizer, width):
    """A prompt or a response as training sees it, with its tokens. lost: how many were cut, of a prompt from the left."""
    def tokens(n):
        return f'{n:,} token{"s" * (n != 1)}'
    prompt, end, cut = title == 'prompt', MARK.format('end'), MARK.format(f'{tokens(lost)} cut') * (lost > 0)
    text = visible(text_of(tokenizer, ids).replace('\t', '\\t'))
    if len(text) > 600:
        text = text[:350] + MARK.format(f'{len(text) - 550:,} characters not shown') + text[-200:]
    text = re.sub('^ +| +$', lambda spaces: '·' * len(spaces[0]), text)
    text = (end * (ids[0] == tokenizer.eot_token) + cut + text if prompt else
            text + (end if ids[-1] == tokenizer.eot_token else cut))
    lines = [f'{title}, {tokens(len(ids))}' + f' and {lost:,} cut' * (lost > 0)]
    for line in re.sub('\n+', lambda breaks: '⏎' * len(breaks[0]) + '\n', text).split('\n'):
        lines += textwrap.wrap(line, width - 4, replace_whitespace=False) or ['']
    return '\n'.join([f'  {paint(lines[0], "1")}', *(f'    {paint(line, style)}' for line in lines[1:])])


def examples(folder, meta, seen, labels, seed):
    """Three groups of train, in an order that the seed fixes, as training sees them: str."""
    split = 'train' if 'train' in seen else 'documents_train'
    groups, tokenizer = Groups(folder, split), load_tokenizer(folder, meta['tokenizer'])
    width, blocks = min(max(40, shutil.get_terminal_size().columns), 120), []
    for i in np.random.default_rng(seed).permutation(len(groups))[:3]:
        titles = ['prompt', *response_names(groups.K)]
        if split in labels:
            titles[1] = 'desirable' if labels[split][i] else 'undesirable'
        lines = [f'{split}[{i}] of {len(groups):,}']
        for title, ids, lost in zip(titles, groups[i], seen[split].whole[i] - seen[split].lengths[i]):
            style = {'prompt': '34', 'rejected': '31', 'undesirable': '31'}.get(title, '32' if title == titles[1] else '33')
            lines.append(shown_piece(title, style, ids.tolist(), int(lost), tokenizer, width))
        blocks.append('\n'.join(lines))
    return '\n\n'.join(blocks)


def histograms(meta, seen, labels):
    """The lengths of train's preferences in tokens before truncation, a column a part, in at most 80 columns: str."""
    whole, K = seen['train'].whole, meta['splits']['train']['K']
    if K > 1:
        first, others = ('chosen', 'rejected') if K == 2 else ('best', 'others')
        columns = {first: whole[:, 1], others: whole[:, 2:].ravel()}
    elif 'train' in labels:
        columns = {'desirable': whole[labels['train'], 1], 'undesirable': whole[~labels['train'], 1]}
    else:
        columns = {'response': whole[:, 1]}
    both = whole[:, 0] + whole[:, 1:].max(1)
    columns = {'prompt': whole[:, 0], **columns, 'prompt + longest': both}
    limits = {meta['max_prompt_length']: ('max_prompt_length', 'prompts', whole[:, 0]),
              meta['max_length']: ('max_length', 'groups', both)}

    # bins end at powers of two, and half way between where that makes few, and at the limits
    top, low = max(both.max(), *limits), min(values.min() for values in columns.values() if len(values))
    edges = {2 ** k for k in range(int(top).bit_length() + 1)}
    if both.max() < 128 * low:
        edges |= {3 * 2 ** k // 2 for k in range(int(top).bit_length())}
    edges = sorted(edges | {0, *limits})
    lines = [f'{"tokens":12}' + ''.join(f'{title:>17}' for title in columns)]
    for after, upto in zip(edges, edges[1:]):
        if low <= upto and after < both.max():
            cells = []
            for values in columns.values():
                counts = np.histogram(values, np.array(edges) + 0.5)[0]
                n, share = counts[edges.index(after)], counts[edges.index(after)] / max(1, len(values))
                bar = '█' * math.ceil(8 * n / max(1, counts.max()))
                cells.append(f'  {bar:8}{f"{share:.1%}" if n else "":>7}')
            lines.append((f'{f"{after + 1:,}-{upto:,}" if after + 1 < upto else upto:<12}' + ''.join(cells)).rstrip())
        if upto in limits:
            name, what, values = limits[upto]
            lines.append(f'-- {name}={upto} -- {(values > upto).mean():.1%} of the {what} are longer '.ljust(80, '-'))
    for q in (50, 90, 99, 100):
        found = [f'{int(np.percentile(values, q, method="higher")):,}' if len(values) else '-' for values in columns.values()]
        lines.append(f'{f"{q}% up to" if q < 100 else "longest":12}' + ''.join(f'{value:>17}' for value in found))
    return '\n'.join(lines)


def notes_of(meta):
    """The lines that name what is odd about a set."""
    return [f'note: {note}' for note in meta.get('notes', [])]


def dry_run(cfg, hub, argv):
    """Print what the run would, and examples and lengths, from files in a temporary folder that goes at the end."""
    print('dry run: nothing will be written', flush=True)
    with tempfile.TemporaryDirectory(prefix='nanodpo-') as aside:
        meta, seen, labels = write_set(cfg, aside, hub, '')
        texts = [examples(aside, meta, seen, labels, cfg.seed)]
        texts += [f'train, before anything is cut:\n\n{histograms(meta, seen, labels)}'] if 'train' in seen else []
        texts.append('\n'.join([table(aside, meta), *notes_of(meta)]))
    again = [arg for arg in argv if not arg.startswith('--dry_run')] + ['--dry_run=False'] * (cfg.origin['dry_run'] != 'flag')
    texts.append(f'nothing was written; this writes data/{cfg.name}: {shlex.join(["python", "prepare_prefs.py", *again])}')
    print('\n\n'.join(['', *texts]))

# -----------------------------------------------------------------------------
# the set on disk

def check(cfg):
    """UserError where knobs do not fit one another or name what is not there, before anything is read."""
    if cfg.policy and cfg.dry_run:
        raise UserError('dry_run reads a source, and with policy there is none: draw a few instead, --num_prompts=20 --name=try')
    for key in READING if cfg.policy else DRAWING:
        if key in cfg.origin:
            why = 'with policy, where the source decides' if cfg.policy else 'without policy'
            raise UserError(f'{cfg.origin[key]}: {key}={getattr(cfg, key)} is of no use {why}: leave it out')
    if cfg.policy:
        return check_drawing(cfg)
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UserError('one process reads a source: run without torchrun (drawing pairs from a policy alone is shared out)')
    if cfg.max_prompt_length >= cfg.max_length:
        raise UserError(f'max_prompt_length={cfg.max_prompt_length} must be less than max_length='
                        f'{cfg.max_length}, to leave room for a response')
    if cfg.template and cfg.template.count('{prompt}') != 1:
        raise UserError(f'template={cfg.template!r} must hold {{prompt}} once')
    size = re.fullmatch(r'bpe:([0-9]+)', cfg.tokenizer)
    if (int(size[1]) < 257) if size else cfg.tokenizer.startswith('bpe') or cfg.tokenizer.endswith('.json'):
        raise UserError(f"tokenizer={cfg.tokenizer!r} must be one of tiktoken's names, 'bytes' or 'bpe:N', "
                        'N >= 257: the 256 bytes, the end token, and what is learned')
    if not cfg.source and cfg.documents in ('', 'chosen'):
        raise UserError('nothing to prepare: set --source to a hub name, a directory, or a file (--help)')
    if os.path.isfile(cfg.source) != cfg.source.endswith(('.py', *FILE_SORTS)):
        wrong = 'must be a .jsonl, .json, .csv, .parquet or .py file' if os.path.isfile(cfg.source) else 'does not exist'
        raise UserError(f'source {cfg.source} {wrong}')
    if cfg.data_dir and os.path.isfile(cfg.source):
        raise UserError(f'data_dir={cfg.data_dir} is of no use with a file as source: leave it out')
    read_columns(cfg.columns)
    if cfg.documents not in ('', 'chosen'):
        if not cfg.documents.endswith(('.jsonl', '.py', '.txt')):
            raise UserError(f"documents={cfg.documents!r} must be a .jsonl, .py or .txt file, or 'chosen'")
        if not os.path.isfile(cfg.documents):
            raise UserError(f'documents {cfg.documents} does not exist')


def hash_inputs(cfg, hub, policy):
    """A hash over all that decides the result: the format, the knobs, the content of the sources, the policy's weights."""
    knobs, files = dataclasses.asdict(cfg), {}
    for key in {'name', 'policy', 'dry_run', 'join_timeout', *(READING if cfg.policy else DRAWING)}:
        del knobs[key]
    if cfg.policy:
        knobs['policy'], knobs['reward'] = policy, sha256_file(reward_file(cfg.reward))
    for key in ('source', 'documents'):         # of what is here the content counts, not the path
        path = knobs.get(key, '')
        if os.path.isfile(path):
            knobs[key] = os.path.splitext(path)[1]
            files[key] = sha256_file(path)
        elif os.path.isdir(path):
            knobs[key] = 'folder'
            for folder, _, names in os.walk(os.path.join(path, cfg.data_dir)):
                for name in names:
                    file = os.path.join(folder, name)
                    files[os.path.relpath(file, path)] = sha256_file(file)
    return sha256_json([FORMAT, knobs, files, {split: table._fingerprint for split, table in (hub or {}).items()}])


def hash_set(folder, meta):
    """The fingerprint of a set: a hash over its tokens, its labels and its tokenizer."""
    name, infos = meta['tokenizer'], meta['splits'].items()
    return sha256_json([name, name.endswith('.json') and sha256_file(os.path.join(folder, name)),
                        {split: [info[key] for key in ('bin_sha256', 'idx_sha256', 'labels_sha256') if key in info]
                         for split, info in infos}])


def why_remake(folder, inputs):
    """Why the set in `folder` cannot be reused, a phrase; '' where it can."""
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        return 'it is new'
    try:
        meta = read_meta(folder)
        if meta['inputs'] != inputs:
            return 'its knobs or its source have changed'
        for split in meta['splits']:
            Groups(folder, split)       # checks the files
        return ''
    except UserError as error:
        return error.message
    except (OSError, KeyError) as error:
        return f'it is incomplete ({type(error).__name__}: {error})'


def write_set(cfg, aside, hub, inputs):
    """Make all files of the set in the folder `aside`. Returns meta.json as a dict, {split: Seen} and {split: labels}."""
    own = cfg.tokenizer == 'bytes' or cfg.tokenizer.startswith('bpe:')
    name = 'tokenizer.json' if own else cfg.tokenizer
    if not own:
        load_tokenizer(aside, name)     # a wrong name is found before the long read
    splits, template = open_preferences(cfg, hub, aside) if cfg.source else ({}, resolved(cfg.template, False))
    plans = plan(splits, cfg, cfg.source) if cfg.source else {}
    if cfg.documents == 'chosen':
        plans |= chosen_documents(plans)
    elif cfg.documents:
        found = plan(open_documents(cfg), cfg, cfg.documents)
        plans |= {f'documents_{split}': found[split] for split in found}
    if own:
        train = [rows for split, (rows, *_) in plans.items() if split.endswith('train')]
        make_tokenizer(cfg.tokenizer, (text for rows in train for row in rows() for text in row), aside)
    tokenizer = load_tokenizer(aside, name)
    knobs = ('name', 'source', 'data_dir', 'columns', 'min_gap', 'documents', 'max_length', 'max_prompt_length')
    meta = dict(format=FORMAT, **{key: getattr(cfg, key) for key in knobs}, template=template, tokenizer=name,
                vocab_size=tokenizer.n_vocab, eot_token=tokenizer.eot_token, inputs=inputs, splits={})
    seen = {}
    for split, (rows, n, dropped, labels) in plans.items():
        K, encode = (1, encode_documents) if split.startswith('documents') else (len(next(rows())) - 1, encode_groups)
        info, seen[split] = write_split(os.path.join(aside, split), rows(), n, K, encode, tokenizer, cfg, labels)
        meta['splits'][split] = dict(read=n + sum(dropped.values()), kept=n, dropped=dropped) | info
    labels = {split: labels for split, (*_, labels) in plans.items() if labels is not None}
    meta['notes'] = suspicions(aside, meta, seen, labels)
    meta['fingerprint'] = hash_set(aside, meta)
    return write_meta(aside, meta), seen, labels


@contextlib.contextmanager
def new_files(folder):
    """A temporary folder, whose files take the place of the set in `folder` once they are all there."""
    try:
        os.makedirs(folder, exist_ok=True)
        sweep(folder)
        with tempfile.TemporaryDirectory(prefix='.tmp-', dir=folder) as aside:
            yield aside
            publish(aside, folder)
    finally:
        with contextlib.suppress(OSError):
            os.removedirs(folder)       # only if it is empty: a failed first run leaves nothing


def sweep(folder):
    """Remove what killed runs left; a set that one had only begun to replace comes back."""
    for left in glob.glob(os.path.join(glob.escape(folder), '.tmp-*')):
        if os.path.exists(os.path.join(left, 'meta.json')):     # publish moves it last
            put_back(left, folder)
        shutil.rmtree(left)


def put_back(aside, folder):
    old = os.path.join(aside, 'old')
    for file in os.listdir(old) if os.path.isdir(old) else ():
        os.replace(os.path.join(old, file), os.path.join(folder, file))


def publish(aside, folder):
    """Put the files of a whole set, in `aside`, in place of the old; if that fails midway these come back. Killed midway,
    the next run brings them back; until then the hashes in meta.json tell readers that the two are mixed."""
    old = os.path.join(aside, 'old')
    os.mkdir(old)
    try:
        for file in FILES:              # meta.json is the last
            for source, target in ((folder, old), (aside, folder)):
                if os.path.exists(os.path.join(source, file)):
                    os.replace(os.path.join(source, file), os.path.join(target, file))
    except BaseException:
        put_back(aside, folder)
        raise


def table(folder, meta):
    """What was read, dropped, cut and written, a column a split."""
    reasons = sorted({reason for info in meta['splits'].values() for reason in info['dropped']})
    labels = ['desirable', 'undesirable'] if any('desirable' in info for info in meta['splits'].values()) else []
    paired = any('as_long' in info for info in meta['splits'].values())
    longer = {'chosen longer': 'chosen_longer', 'equally long': 'as_long'} if paired else {}
    columns = [['', 'read', *(f'dropped: {reason}' for reason in reasons), 'kept', *labels, 'prompts truncated',
                'responses truncated', 'tokens truncated', *longer, 'groups', 'tokens', 'longest group', 'mean group',
                'MB on disk']]
    for split, i in meta['splits'].items():
        size = sum(os.path.getsize(os.path.join(folder, split + end)) for end in ('.bin', '.idx.npy'))
        numbers = [i['read'], *(i['dropped'].get(reason, 0) for reason in reasons), i['kept'],
                   *(i.get(label, 0) for label in labels), *i['truncated'].values(),
                   *(f"{i[key] / i['groups']:.1%}" if key in i else '-' for key in longer.values()),
                   i['groups'], i['tokens'], i['longest'],
                   round(i['tokens'] / i['groups'], 1), round(size / 1e6, 2)]
        columns.append([split, *(number if type(number) is str else f'{number:,}' for number in numbers)])
    width = [max(map(len, column)) for column in columns]
    return '\n'.join('  '.join([line[0].ljust(width[0]), *map(str.rjust, line[1:], width[1:])])
                     for line in zip(*columns))


# -----------------------------------------------------------------------------
# pairs drawn from a policy

def write_groups(folder, source, splits, dropped=None, **facts):
    """Write groups of ids as the data set `folder`, with the tokenizer, template and lengths of the prepared set `source`.

    splits: {'train': [[prompt, response_1, ..., response_K], ...], 'val': ...}, lists of ids, at most max_length tokens of
    a prompt and one response. dropped: {split: {reason: n}}, what was not kept; facts: more of meta.json. Returns meta.json.
    The set that stood in `folder` is replaced at the end, or not at all. Raises OSError where the disk does.
    """
    source_meta, dropped, seen = read_meta(source), dropped or {}, {}
    tokenizer = load_tokenizer(source, source_meta['tokenizer'])
    same = ('format', 'template', 'max_length', 'max_prompt_length', 'tokenizer', 'vocab_size', 'eot_token')
    meta = dict(name=os.path.basename(folder), source=source, data_dir='', documents='', **facts,
                **{key: source_meta[key] for key in same if key in source_meta}, splits={})
    with new_files(folder) as aside:
        if meta['tokenizer'].endswith('.json'):
            shutil.copyfile(os.path.join(source, meta['tokenizer']), os.path.join(aside, meta['tokenizer']))
        for split, groups in splits.items():
            longest = max(len(group[0]) + max(map(len, group[1:])) for group in groups)
            assert longest <= meta['max_length'], f"{split} has {longest} tokens, max_length is {meta['max_length']}"
            info, seen[split] = write_split(
                os.path.join(aside, split), iter(groups), len(groups), len(groups[0]) - 1,
                lambda rows, *_: ([piece for row in rows for piece in row],) * 2, tokenizer, None)
            info['truncated']['responses'] = sum(int(ids[-1] != meta['eot_token']) for group in groups for ids in group[1:])
            lost = dropped.get(split, {})
            meta['splits'][split] = dict(read=len(groups) + sum(lost.values()), kept=len(groups), dropped=lost) | info
        meta['notes'] = suspicions(aside, meta, seen)
        meta['fingerprint'] = hash_set(aside, meta)
        return write_meta(aside, meta)


def check_drawing(cfg):
    """check, where pairs are drawn from a policy."""
    if not cfg.reward:
        raise UserError('policy is set, reward is not: a .py file with reward(prompts, responses), or a folder of '
                        'repro/reward_model.py')
    reward_file(cfg.reward)
    if not os.path.isdir(cfg.source):
        raise UserError(f"source={cfg.source!r} must be a prepared set (data/<name>), whose prompts the policy continues")
    if os.path.realpath(cfg.source) == os.path.realpath(os.path.join('data', cfg.name)):
        raise UserError(f'{cfg.source} would be replaced by what is drawn from its prompts: set another --name')
    read_meta(cfg.source)


def reward_file(path):
    """The file behind the knob `reward`: itself, or the last checkpoint of a folder."""
    from model import find_checkpoints
    found = [path] if os.path.isfile(path) and path.endswith('.py') else find_checkpoints(path)
    if not found:
        raise UserError(f'reward {path} is neither a .py file nor a folder with a checkpoint of repro/reward_model.py')
    return found[-1]


def open_policy(cfg):
    """The policy, on the CPU, and the fingerprint of its weights."""
    from model import CheckpointError, fingerprint, load_model
    try:
        policy, record = load_model(cfg.policy, dropout=0.0)
    except CheckpointError as error:
        raise UserError(error) from None
    Groups(cfg.source, 'train').check_model(policy.config, record.get('vocabulary'), cfg.policy)
    return policy, fingerprint(policy)


def response_rewards(model, head, batch):
    """A reward model's reward of each response of a packed batch: (G, K). head: (1, C), read at the response's last token."""
    import torch
    from model import packed_mask
    where = batch.group[0] * (batch.K + 1) + batch.part[0]                              # (T,) which piece of which group
    last = torch.cat([where[1:] != where[:-1], where.new_ones(1, dtype=torch.bool)])    # a piece's last token
    at = (last & (batch.part[0] > 0)).nonzero()[:, 0]                                   # (G*K,)
    states = model(batch.tokens, batch.positions, packed_mask(batch.group, batch.part, batch.cuts), at)
    return torch.nn.functional.linear(states, head).view(-1, batch.K)


def open_reward(path, groups, device):
    """What the knob `reward` names, as a function: [[prompt, response_1, ..., response_K], ...] of ids -> (N, K) float64.
    groups: a split of the set that it must fit."""
    if path.endswith('.py'):
        score, tokenizer = read_reward(path), load_tokenizer(groups.folder, groups.meta['tokenizer'])
        score(*([text_of(tokenizer, piece.tolist())] for piece in groups[0][:2]))       # once: it may load, or lack, a model

        def rewards(made):
            texts = [(text_of(tokenizer, prompt), text_of(tokenizer, ids)) for prompt, *responses in made for ids in responses]
            return np.array(score(*zip(*texts))['true_reward'], np.float64).reshape(len(made), -1)
        return rewards
    import torch
    from model import GPT, CheckpointError, GPTConfig, read_checkpoint
    try:
        state = read_checkpoint(reward_file(path))
        head = state['model'].pop('reward.weight').to(device)
        model = GPT(GPTConfig(**state['model_config']))
        model.load_state_dict(state['model'])
    except CheckpointError as error:
        raise UserError(error) from None
    except (KeyError, RuntimeError, TypeError):
        raise UserError(f'{reward_file(path)} is no reward model: run repro/reward_model.py') from None
    groups.check_model(model.config, state.get('vocabulary'), path)
    model.to(device).eval()

    @torch.no_grad()
    def rewards(made):
        made = Sampled(made)
        found = np.zeros((len(made.lengths), made.K))
        rows = plan_rows(np.arange(len(found)), made.lengths, 1, row_limit([made], 0, device.type))[0]
        for batch in tqdm(packed_batches(made, rows, device), 'rewards', len(rows), unit=' rows', disable=None, leave=False):
            found[batch.ids] = response_rewards(model, head, batch).double().cpu().numpy()
        if not np.isfinite(found).all():
            raise UserError(f'{path}: a reward is not finite')
        return found
    return rewards


def pair_up(groups, rewards, pairing):
    """Pairs [prompt, chosen, rejected] of groups [prompt, response_1, ..., response_K], their rewards (n, 2), and how many
    were tied. rewards: (N, K). best_worst: the first of the best against the last of the worst."""
    pairs, kept, tied = [], [], 0
    for (prompt, *responses), r in zip(groups, rewards):
        if pairing == 'best_worst':
            candidates = [(r.argmax(), len(r) - 1 - r[::-1].argmin())]
        else:
            candidates = itertools.combinations(range(len(r)), 2)
        for i, j in candidates:
            w, l = (i, j) if r[i] > r[j] else (j, i)
            if r[w] == r[l]:
                tied += 1
                continue
            pairs.append([prompt, responses[w], responses[l]])
            kept.append((r[w], r[l]))
    return pairs, np.array(kept), tied


def draw_pairs(cfg, policy, inputs):
    """Draw from the policy, score, and make pairs, on all ranks.

    Returns on rank 0 {split: pairs}, {split: {'tied': n}} and {split: mean rewards of samples, chosen, rejected}, on the
    others None. A batch of prompts is always the same one, and has its own seed: it does not matter who draws it.
    inputs: hash_inputs', which all ranks must share.
    """
    import torch
    import torch.distributed as dist
    from launch import join, name_lost_ranks, read_ranks
    device_type = cfg.device if cfg.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    world, rank, local_rank = read_ranks(device_type)
    device = torch.device(device_type, local_rank) if device_type == 'cuda' else torch.device(device_type)
    bf16 = device_type == 'cuda' and torch.cuda.is_bf16_supported()
    store, _, _ = join(world, rank, 'gloo', cfg.join_timeout)
    before = sys.excepthook
    if world > 1:
        name_lost_ranks(store, world, rank, lambda: '')

    # the reward, on rank 0, before the long work
    sources, error = {split: Groups(cfg.source, split) for split in ('train', 'val')}, ''
    if rank == 0:
        try:
            rewards_of = open_reward(cfg.reward, sources['train'], device)
        except UserError as user_error:
            error = user_error.message
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, (error, inputs))       # so that none is left waiting
        error = everyone[0][0]
        if not error and (others := [str(r) for r, (_, theirs) in enumerate(everyone) if theirs != everyone[0][1]]):
            error = (f'rank {", ".join(others)} has another command, {cfg.source}, {cfg.policy} or {cfg.reward} than rank 0: all nodes '
                     'need the same, on a shared disk or copied')
    if error:
        raise UserError(error)

    # responses
    policy.to(device).eval()
    prompts = {split: distinct_prompts(groups, cfg.num_prompts, cfg.seed) for split, groups in sources.items()}
    size, meta = max(1, cfg.batch_size // cfg.num_samples), sources['train'].meta
    batches = [(s, j) for s, split in enumerate(prompts) for j in range(math.ceil(len(prompts[split]) / size))]
    drawn = {}
    for s, j in tqdm(batches[rank::world], 'drawing', unit=' batches', disable=None if rank == 0 else True):
        some = [p for p in list(prompts.values())[s][j * size:(j + 1) * size] for _ in range(cfg.num_samples)]
        seed = int(np.random.SeedSequence([cfg.seed, s, j]).generate_state(1, np.uint64)[0] >> 1)
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            made = policy.generate(some, cfg.max_new_tokens, meta['eot_token'], meta['vocab_size'], cfg.temperature, seed=seed)
        drawn[s, j] = [ids[:meta['max_length'] - len(prompt)] for prompt, ids in zip(some, made)]
    if world > 1:
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(drawn, gathered)
        dist.destroy_process_group()
        sys.excepthook = before         # the ranks part here
        if rank:
            return None
        drawn = {key: made for part in gathered for key, made in part.items()}

    # rewards and pairs
    splits, dropped, means = {}, {}, {}
    for s, split in enumerate(prompts):
        responses = [ids for key in batches if key[0] == s for ids in drawn[key]]
        groups = [[p, *responses[i * cfg.num_samples:(i + 1) * cfg.num_samples]] for i, p in enumerate(prompts[split])]
        rewards = rewards_of(groups)
        for r, (_, *some) in zip(rewards, groups):      # copies are equal, whatever rounding or a noisy judge says
            r[:] = r[[some.index(ids) for ids in some]]
        splits[split], kept, tied = pair_up(groups, rewards, cfg.pairing)
        if not splits[split]:
            raise UserError(f'no pairs for {split}: all {cfg.num_samples} samples of each of its {len(groups):,} prompts have '
                            'equal rewards')
        dropped[split] = {'tied': tied}
        means[split] = dict(zip(('samples', 'chosen', 'rejected'), (float(rewards.mean()), *kept.mean(0).tolist())))
    return splits, dropped, means

# -----------------------------------------------------------------------------
# the reader half: what sft.py, dpo.py and sample.py import

FORMAT = 2                  # of the files under data/<name>/; readers refuse another
EOT = '<|endoftext|>'       # the end token's name, in GPT-2's vocabulary and in ours


def load_tokenizer(folder, name):
    """The tiktoken.Encoding that meta.json's `tokenizer` names: one of tiktoken's, or the file beside it."""
    import tiktoken
    if not name.endswith('.json'):
        try:
            return tiktoken.get_encoding(name)
        except ValueError:
            raise UserError(f"tokenizer '{name}' is unknown; tiktoken has {', '.join(tiktoken.list_encoding_names())}") from None
        except Exception as error:      # it downloads on first use
            raise UserError(f"tokenizer '{name}' could not be loaded ({type(error).__name__}): tiktoken downloads it on first use; "
                            'offline, set TIKTOKEN_CACHE_DIR to a folder that holds it') from None
    path = os.path.join(folder, name)
    try:
        with open(path) as f:
            saved = json.load(f)
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved['tokens'])}
        assert len(ranks) == len(saved['tokens']) and all(bytes([b]) in ranks for b in range(256)), 'no byte-level vocabulary'
        return tiktoken.Encoding(saved['name'], pat_str=saved['pattern'], mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): run prepare_prefs.py again') from None
    except Exception as error:      # whatever foreign content makes of base64 and tiktoken
        raise UserError(f'{path} is no tokenizer ({type(error).__name__}: {error}): run prepare_prefs.py again') from None


def text_ids(tokenizer, text):
    """The ids of a text: list of int. White space by the hundred thousand would overflow tiktoken's stack: it goes in pieces."""
    pieces = re.split(r'(\s{100000})', text) if len(text) > 100_000 else [text]
    return [token for piece in pieces for token in tokenizer.encode_ordinary(piece)]


def save_tokenizer(folder, tokenizer, template, max_length):
    """Write a tiktoken.Encoding for transformers' AutoTokenizer: tokenizer.json, tokenizer_config.json and, where it splits
    words as GPT-2 does, vocab.json and merges.txt for older readers.

    `encode(text, split_special_tokens=True)` gives encode_ordinary's ids; without it a literal <|endoftext|> in a text becomes
    the end token. The chat template writes each turn of the user by `template`, which holds its own request for an answer; the
    assistant's follow, after a space, the system's stand as they are. max_length: the model's positions, in tokens.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]      # GPT-2's alphabet: a character for every byte
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ranks = tokenizer._mergeable_ranks
    vocab = {''.join(map(letters.get, token)): rank for token, rank in ranks.items()} | tokenizer._special_tokens
    vocab |= {f'<|unused_{i}|>': i for i in set(range(tokenizer.n_vocab)).difference(vocab.values())}     # cl100k_base has gaps
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:           # by older tokens alone: the last two pieces are what it was merged from
            pairs = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
            older, i = min(pairs)
            if older >= rank:
                raise UserError(f'tokenizer {tokenizer.name}: token {rank}, {token!r}, is no merge of two others: not exported')
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(' '.join(''.join(map(letters.get, part)) for part in parts))

    # possessive quantifiers are there for speed alone, and another engine reads {1,3}+ as repeated
    pattern = re.sub(r'([+*?]|\{[\d,]+\})\+', r'\1', tokenizer._pat_str)
    like_gpt2 = not merges or pattern in (PATTERN, PATTERN.replace(r'\s+(?!\S)|\s+', r'\s+$|\s+(?!\S)|\s'))
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True)
    split = dict(type='Split', pattern={'Regex': pattern.replace('$', r'(?![\s\S])')},      # $ is a line's end there
                 behavior='Isolated', invert=False)
    pre = byte_level | {'use_regex': True} if like_gpt2 else dict(
        type='Sequence', pretokenizers=[split, byte_level | {'use_regex': False}])
    end = dict(id=tokenizer.eot_token, content=EOT, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    whole = dict(version='1.0', truncation=None, padding=None, added_tokens=[end], normalizer=None, pre_tokenizer=pre,
                 post_processor=None, decoder=byte_level | {'use_regex': True},
                 model=dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix='', end_of_word_suffix='',
                            fuse_unk=False, byte_fallback=False, vocab=vocab, merges=merges))

    before, after = (json.dumps(text, ensure_ascii=False) for text in template.removeprefix(EOT).split('{prompt}', 1))
    own_line = "{%- if ns.text and ns.text[-1:] != '\n' -%}{%- set ns.text = ns.text + '\n' -%}{%- endif -%}"
    # the end token follows an answer that comes last, as in training
    chat = ("{%- set ns = namespace(text='') -%}{%- for message in messages -%}{%- set content = message['content'] -%}"
            "{%- if message['role'] == 'user' -%}" + own_line * (not before.startswith(r'"\n'))
            + f"{{%- set ns.text = ns.text + {before} + content + {after} -%}}{{%- else -%}}"
            "{%- if ns.text[-1:]|trim and (content[:1]|trim or not content) -%}{%- set ns.text = ns.text + ' ' -%}{%- endif -%}"
            "{%- set ns.text = ns.text + content -%}{%- endif -%}{%- endfor -%}"
            + "{{- bos_token -}}" * template.startswith(EOT)
            + "{{- ns.text -}}{%- if messages[-1]['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}")
    settings = dict(tokenizer_class='GPT2Tokenizer' if like_gpt2 else 'PreTrainedTokenizerFast', bos_token=EOT, eos_token=EOT,
                    unk_token=EOT, pad_token=EOT, padding_side='left', add_prefix_space=False, clean_up_tokenization_spaces=False,
                    model_max_length=max_length, chat_template=chat)
    files = {'tokenizer.json': json.dumps(whole, ensure_ascii=False), 'tokenizer_config.json': json.dumps(settings, indent=2)}
    if like_gpt2:
        files |= {'vocab.json': json.dumps(vocab, ensure_ascii=False), 'merges.txt': '\n'.join(['#version: 0.2', *merges, ''])}
    for file, text in files.items():
        with open(os.path.join(folder, file), 'w', encoding='utf-8') as f:
            f.write(text)


def render(prompt, template):
    """The text of a prompt, a string or messages, in the template: what the model reads before it answers.

    The template holds `{prompt}`. A string that already has what the template puts around it is taken as it is. Of
    messages [{'role', 'content'}, ...] each turn of the user is the template with its text, each of the assistant's
    follows it, after a space where there is none; the system's stands first, as plain text. A turn of the user begins
    a line of its own. A template's <|endoftext|> is a token, not text: see prompt_ids.
    """
    before, _, after = template.removeprefix(EOT).partition('{prompt}')
    if isinstance(prompt, str):
        return prompt if prompt.startswith(before) and prompt.endswith(after) else before + prompt + after
    text = ''
    for message in prompt:
        if message['role'] != 'user':
            text += spaced(text, message['content'])
            continue
        if text and not text.endswith('\n') and not before.startswith('\n'):
            text += '\n'
        text += before + message['content'] + after
    return text


def spaced(before, text):
    """`text` as it follows `before`: after a space, where neither has white space there."""
    return ' ' * bool(before and not before[-1].isspace() and not text[:1].isspace()) + text


def rendered_ids(tokenizer, text, template):
    """The ids of a rendered prompt: list of int, never empty. See prompt_ids."""
    ids = text_ids(tokenizer, text)
    return [tokenizer.eot_token] * (template.startswith(EOT) or not ids) + ids


def prompt_ids(tokenizer, prompt, template):
    """The ids of a prompt, a string or messages, the same in training and in sampling: list of int, never empty.

    A template that begins with <|endoftext|> puts the end token there, as between GPT-2's documents; in the prompt itself
    that string is ordinary text. An empty prompt becomes the end token.
    """
    return rendered_ids(tokenizer, render(prompt, template), template)


def text_of(tokenizer, ids):
    """The text of a list of ids, end tokens left out; a character that was cut becomes U+FFFD."""
    pieces = []
    for token in ids:
        with contextlib.suppress(KeyError):        # an id that the tokenizer skips, as cl100k_base does
            pieces.append(tokenizer.decode_single_token_bytes(token) if token != tokenizer.eot_token else b'')
    return b''.join(pieces).decode(errors='replace')


HIDDEN = 'Cc', 'Cf', 'Cs', 'Co', 'Zl', 'Zp'     # not Cn: newer than this Python
SHAPING = '\n\u200c\u200d\u200e\u200f\u061c'    # joiners and marks of direction, which real writing needs
FLAGS = '\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f'      # England's is a black flag and invisible letters


def visible(text):
    """Text that cannot move the cursor or reverse the line: control characters as escapes, line breaks kept."""
    def escaped(match):
        c = match[0]
        shown = match[1] or c in SHAPING or unicodedata.category(c) not in HIDDEN
        return c if shown else c.encode('unicode_escape').decode()
    return re.sub(f'({FLAGS})|(?s:.)', escaped, text.replace('\t', '    '))


def colours():
    """Whether stdout is a terminal that wants them."""
    return sys.stdout.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


def sha256_file(path):
    """The SHA-256 of a file's content, hex."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def check_file(path, sha256):
    """UserError where a file of a set is missing, or is not what meta.json records."""
    if not os.path.isfile(path):
        raise UserError(f'{path} is missing: run prepare_prefs.py again')
    if sha256_file(path) != sha256:
        raise UserError(f'{path} is damaged: its content is not what meta.json records; run prepare_prefs.py again')


class Groups:
    """One split of data/<name>/, memory-mapped: N groups of a prompt and K responses.

    folder: data/<name>; split: 'train', 'val', or 'documents_train', 'documents_val'.
    k: use only the first k responses of each group (k=1 on pairs: the chosen ones); k=1 on unpaired examples: the
    desirable ones.
    labels: (N,) bool, which of the unpaired examples are desirable; None where the groups are something else.
    Raises UserError where files are missing, cut short, altered or of another format.
    """
    def __init__(self, folder, split, k=None):
        self.meta = read_meta(folder)
        if split not in self.meta['splits']:
            raise UserError(f"{folder} has no split '{split}', only {', '.join(self.meta['splits'])}")
        self.folder, self.split, info = folder, split, self.meta['splits'][split]
        try:
            labelled = 'labels_sha256' in info
            for end, key in (('.bin', 'bin_sha256'), ('.idx.npy', 'idx_sha256'), ('.labels.npy', 'labels_sha256'))[:2 + labelled]:
                check_file(os.path.join(folder, split + end), info[key])
            self.tokens = np.memmap(os.path.join(folder, f'{split}.bin'), dtype=info['dtype'], mode='r')
            index = np.load(os.path.join(folder, f'{split}.idx.npy'), mmap_mode='r')
            labels = np.load(os.path.join(folder, f'{split}.labels.npy')) if labelled else None
            assert index[-1, -1] == len(self.tokens), f'{len(self.tokens)} tokens, {index[-1, -1]} in its index'
        except (ValueError, TypeError, LookupError, AssertionError) as error:       # the hashes are right: it was made so
            raise UserError(f'{folder} {split} is not what prepare_prefs.py writes ({type(error).__name__}: {error})') from None
        self.labels, self.K = labels, k or index.shape[1] - 2
        assert self.K <= index.shape[1] - 2, f'{folder} {split} has {index.shape[1] - 2} responses a group, not {k}'
        if labelled and k:
            index, self.labels = index[self.labels], self.labels[self.labels]
            if not len(index):
                raise UserError(f'{folder} {split} holds no desirable example to learn from: prepare with more of them')
        self.index = index[:, :self.K + 2]                          # (N, K+2): prompt, responses, end
        self.lengths = self.index[:, -1] - self.index[:, 0]         # (N,) tokens of each group
        name = self.meta['tokenizer']       # the tokenizer's identity: models trained on another one do not fit
        self.vocabulary = sha256_file(os.path.join(folder, name))[:16] if name.endswith('.json') else name
        # what the training result depends on: the tokens and how many responses, or which examples, are used
        parts = [info['bin_sha256'], info['idx_sha256'], self.K, *([info['labels_sha256'], k] if labelled else [])]
        self.fingerprint = hashlib.sha256(' '.join(map(str, parts)).encode()).hexdigest()

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        """Group i as [prompt, response_1, ..., response_K], arrays of token ids."""
        bounds = self.index[i]
        return [self.tokens[bounds[j]:bounds[j + 1]] for j in range(self.K + 1)]

    def response_tokens(self, ids):
        """Scored tokens of the given groups, all their responses together: int."""
        return int((self.index[ids, -1] - self.index[ids, 1]).sum())

    def forward_flops(self, ids, model_config):
        """Multiply-adds, times two, that one forward pass over these groups needs: blocks, attention, response heads."""
        C, L, V = model_config.n_embd, model_config.n_layer, model_config.vocab_size
        sizes = np.diff(self.index[ids], axis=1).astype(np.float64)             # (n, K+1)
        prompt, responses = sizes[:, :1], sizes[:, 1:]
        seen = (sizes * (sizes + 1) / 2).sum() + (prompt * responses).sum()     # query-key pairs of the mask
        return float(24 * L * C * C * sizes.sum() + 4 * L * C * seen + 2 * C * V * responses.sum())

    def check_model(self, model_config, vocabulary, where):
        """UserError where a model cannot read these ids or positions. vocabulary: as a checkpoint records it, or None."""
        size = self.meta['vocab_size']
        if vocabulary is not None and vocabulary != self.vocabulary:
            raise UserError(f'{where} was trained with another tokenizer than {self.folder} was prepared with '
                            f'({vocabulary}, not {self.vocabulary})')
        if not size <= model_config.vocab_size < size + 128:        # a padded vocabulary passes
            raise UserError(f"vocabulary mismatch: {self.folder} has {size:,} tokens (tokenizer {self.meta['tokenizer']}), "
                            f'{where} {model_config.vocab_size:,}')
        if self.meta['max_length'] > model_config.block_size:
            raise UserError(f"{self.folder} was prepared with max_length={self.meta['max_length']}, {where} has "
                            f'{model_config.block_size} positions: prepare with --max_length={model_config.block_size} or less')


def distinct_prompts(groups, n, seed):
    """The first n distinct prompts of a split, 0 = all, in an order that the seed shuffles: lists of ids."""
    found = {}
    for i in np.random.default_rng(seed).permutation(len(groups)):
        prompt = groups[i][0]
        found.setdefault(prompt.tobytes(), prompt.tolist())
        if len(found) == n:
            break
    return list(found.values())


class Sampled:
    """A list of [prompt, response_1, ..., response_K], lists of ids, in the form that is packed."""
    def __init__(self, groups):
        self.K, self.labels = len(groups[0]) - 1, None
        self.tokens = np.concatenate([np.asarray(piece, np.int64) for group in groups for piece in group])
        ends = np.cumsum([0] + [len(piece) for group in groups for piece in group])
        width = self.K + 1
        self.index = np.hstack([ends[:-1].reshape(-1, width), ends[width::width, None]])      # (N, K+2)
        self.lengths = self.index[:, -1] - self.index[:, 0]


def sha256_json(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_meta(folder, meta):
    """Write data/<name>/meta.json, with a hash of the tokenizer's file and one of all the rest of it. -> as read_meta reads it."""
    name = meta['tokenizer']
    if name.endswith('.json'):
        meta = meta | {'tokenizer_sha256': sha256_file(os.path.join(folder, name))}
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump(meta | {'sha256': sha256_json(meta)}, f, indent=1)
    return meta


def read_meta(folder):
    """data/<name>/meta.json as a dict, or a UserError that says how to make it; a damaged tokenizer.json is one, too."""
    path = os.path.join(folder, 'meta.json')
    try:
        with open(path) as f:
            meta = json.load(f)
        assert meta['format'] == FORMAT, f"format {meta['format']}, this code reads {FORMAT}"
        assert meta.pop('sha256') == sha256_json(meta), 'its content is not what was written'
        for key, kind in dict(tokenizer=str, template=str, vocab_size=int, eot_token=int, max_length=int, splits=dict).items():
            assert isinstance(meta[key], kind), f'{key} is {meta[key]!r:.40}'
        name = meta['tokenizer']
    except FileNotFoundError:
        raise UserError(f'{path} does not exist: run prepare_prefs.py with this config first') from None
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise UserError(f'{path} cannot be read ({type(error).__name__}: {error}): run prepare_prefs.py again') from None
    if name.endswith('.json'):
        check_file(os.path.join(folder, name), meta['tokenizer_sha256'])
    return meta


def read_reward(path):
    """The functions of a reward file as one: (prompts, responses) -> {name: list of float or bool}. UserErrors."""
    if not os.path.isfile(path):
        raise UserError(f'reward file {path} does not exist')
    try:
        with contextlib.redirect_stdout(sys.stderr):       # what it prints must not mix with ours
            found = runpy.run_path(path)
    except Exception as error:
        raise UserError(f'reward file {path}: {type(error).__name__}: {error}') from None
    if not callable(found.get('reward')):
        raise UserError(f'reward file {path} defines no function reward(prompts, responses)')

    def score(prompts, responses):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                given = {'true_reward': found['reward'](list(prompts), list(responses))}
                if 'metrics' in found:
                    given |= found['metrics'](list(prompts), list(responses))
            scores = {str(name): [bool(v) if isinstance(v, (bool, np.bool_)) else float(v) for v in values]
                      for name, values in given.items()}
        except Exception as error:
            raise UserError(f'reward file {path}: {type(error).__name__}: {error}') from None
        for name, values in scores.items():
            if len(values) != len(responses):
                raise UserError(f'reward file {path}: {name} has {len(values)} results for {len(responses)} responses')
            bad = next((i for i, v in enumerate(values) if not math.isfinite(v)), None)
            if bad is not None:
                raise UserError(f'reward file {path}: {name} of response {bad + 1} is {values[bad]}: {responses[bad]!r:.60}')
        return scores
    return score


# -----------------------------------------------------------------------------
# packing: whole groups into rows

@functools.lru_cache(2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_groups(n, batch_size, step, seed):
    """The groups of optimizer step `step`: int array. A pure function; each epoch visits each group once."""
    steps_per_epoch = -(-n // batch_size)
    epoch, within = divmod(step, steps_per_epoch)
    return epoch_order(n, seed, epoch)[within * batch_size:(within + 1) * batch_size]


def plan_rows(ids, lengths, world, row_tokens):
    """Share groups out over ranks, in rows of at most row_tokens: the rows of each rank, lists of group numbers.

    ids: (n,) group numbers; lengths: (n,) their tokens. The longest first, each to the row that has least so far: all
    rows come out about equally long, so no rank waits long for another, and all ranks have equally many, some of
    them perhaps empty, so that none waits for ever. A row is one micro-step.
    """
    assert lengths.max(initial=0) <= row_tokens, 'a group is longer than a row'
    count = -(-int(lengths.sum()) // (world * row_tokens)) * world
    while True:
        rows, heap = [[] for _ in range(count)], [(0, row) for row in range(count)]     # heap: (tokens, row)
        for i in np.argsort(-lengths, kind='stable'):
            tokens, row = heap[0]
            if tokens + lengths[i] > row_tokens:
                break
            rows[row].append(int(ids[i]))
            heapq.heapreplace(heap, (tokens + int(lengths[i]), row))
        else:
            return [rows[rank::world] for rank in range(world)]
        count += world              # too tight: with one row more for each rank


def row_limit(groups, row_tokens, device_type):
    """The knob row_tokens with its default: 8192 on CUDA, 2048 elsewhere, more where one of `groups` is longer."""
    longest = max(int(g.lengths.max()) for g in groups)
    if 0 < row_tokens < longest:
        raise UserError(f'row_tokens={row_tokens} is less than the longest group, {longest} tokens: set at least that, or 0')
    return row_tokens or max(8192 if device_type == 'cuda' else 2048, longest)


@dataclass
class Batch:
    """One packed row of T tokens on one device: G groups with S scored tokens in all.

    tokens, positions, group, part: (1, T). part 0 is the prompt, 1..K a response; padding is group -1.
    predictor: (S,) index into the row of the hidden state that predicts target, (S,), the token; what is beyond
    len(response) is padding.
    response: row-major index into (G, K) of each scored token. lengths: (G, K), the responses' tokens.
    labels: (G,) bool of unpaired examples, else None.
    ids: the G groups' numbers in the split. cuts: places between groups, at least 128 tokens apart.
    """
    tokens: object
    positions: object
    group: object
    part: object
    predictor: object
    target: object
    response: object
    lengths: object
    labels: object
    ids: list
    cuts: list
    K: int

    def on(self, device):
        """The same on `device`; to CUDA by way of pinned memory, without waiting for the copy."""
        def move(x):
            return x if x is None else (x.pin_memory() if device.type == 'cuda' else x).to(device, non_blocking=True)
        return Batch(*(move(getattr(self, f.name)) for f in dataclasses.fields(self)[:9]), self.ids, self.cuts, self.K)


def pack(groups, ids, multiple=1):
    """The Batch of the groups `ids`, on the CPU. T and S are padded to a multiple of `multiple`, at least twice that:
    torch.compile makes a case of its own of a single one."""
    import torch
    index = groups.index[np.array(ids, np.int64)]                   # (G, K+2)
    sizes, G, K = np.diff(index, axis=1), len(ids), groups.K        # (G, K+1) tokens of prompt and responses
    starts = np.concatenate([[0], sizes.cumsum()])                  # of each piece in the row
    n, starts = starts[-1], starts[:-1].reshape(G, K + 1)
    part = np.repeat(np.tile(np.arange(K + 1), G), sizes.ravel())   # (n,)
    origin = starts - np.pad(np.repeat(sizes[:, :1], K, 1), ((0, 0), (1, 0)))      # every response continues the prompt
    tokens = np.concatenate([groups.tokens[i[0]:i[-1]] for i in index] or [[]])
    before = np.arange(n) - 1
    before[starts[:, 1:]] = starts[:, 1:2] - 1                      # a response's first token: the prompt's last state
    cuts = [0]
    for start in starts[:, 0].tolist():
        cuts += [start] * (start - cuts[-1] >= 128)

    def tensor(values, size, padding=0):
        return torch.from_numpy(np.concatenate([values, np.full(size - len(values), padding)]).astype(np.int64))
    T, S = (max(2, -(-size // multiple)) * multiple for size in (n, int((part > 0).sum())))
    row = (tensor(tokens, T), tensor(np.arange(n) - np.repeat(origin.ravel(), sizes.ravel()), T),
           tensor(np.repeat(np.arange(G), sizes.sum(1)), T, -1), tensor(part, T))
    response = np.repeat(np.arange(G * K), sizes[:, 1:].ravel())
    labels = None if groups.labels is None else torch.from_numpy(groups.labels[np.array(ids, np.int64)])
    return Batch(*(x[None] for x in row), tensor(before[part > 0], S), tensor(tokens[part > 0], S), tensor(response, len(response)),
                 torch.from_numpy(sizes[:, 1:].astype(np.int64)), labels, ids, cuts[1:], K)


def mismatched(groups, ids):
    """Each group's prompt with the responses of the next of `ids`, going round, whose prompt is another: Sampled, or None
    where there is only one prompt. Where the two exceed max_length, the prompt is cut from the left."""
    some = [groups[i] for i in ids]
    n, partner, found = len(some), [None] * len(some), []
    for i in reversed(range(2 * n)):        # twice round, from behind, so that all have heard of a partner
        j = (i + 1) % n
        partner[i % n] = partner[j] if np.array_equal(some[i % n][0], some[j][0]) else j
    for (prompt, *_), j in zip(some, partner):
        if j is not None:
            responses = some[j][1:]
            found.append([prompt[-(groups.meta['max_length'] - max(map(len, responses))):], *responses])
    return Sampled(found) if found else None


def packed_batches(groups, rows, device):
    """The Batch of each of `rows`, an iterable of lists of group numbers, on `device`; one is packed ahead meanwhile."""
    import torch
    multiple = 1 if device.type == 'cpu' else 128       # FlexAttention's block; few shapes elsewhere
    set_device = functools.partial(torch.cuda.set_device, device) if device.type == 'cuda' else None    # it is a thread's own
    with ThreadPoolExecutor(1, initializer=set_device) as thread:
        coming = collections.deque()
        for row in rows:
            coming.append(thread.submit(lambda row=row: pack(groups, row, multiple).on(device)))
            if len(coming) == 2:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


# -----------------------------------------------------------------------------
# the run

def main(argv=None):
    started = time.time()
    cfg = config.load(Config, 'prepare', argv)
    say = print if os.environ.get('RANK', '0') == '0' else lambda *_, **__: None
    say(config.show(cfg), flush=True)
    check(cfg)
    folder = os.path.join('data', cfg.name)
    try:
        on_hub = cfg.source and not os.path.exists(cfg.source)
        hub = load_dataset(cfg.source, cfg.data_dir) if on_hub else None
        if cfg.dry_run:
            return dry_run(cfg, hub, sys.argv[1:] if argv is None else argv)
        policy, fingerprint = open_policy(cfg) if cfg.policy else (None, '')
        inputs = hash_inputs(cfg, hub, fingerprint)
        why = why_remake(folder, inputs)
        if not why:
            if os.environ.get('RANK', '0') == '0':
                sweep(folder)
            say('\n'.join([*notes_of(read_meta(folder)), f'{folder} is reused: same knobs, same source, undamaged']))
            return
        say(f'making {folder}: {why}', flush=True)
        if cfg.policy:
            drawn = draw_pairs(cfg, policy, inputs)
            if drawn is None:           # rank 0 alone goes on
                return
            splits, dropped, rewards = drawn
            meta = write_groups(folder, cfg.source, splits, dropped, inputs=inputs, rewards=rewards, policy=cfg.policy,
                                policy_fingerprint=fingerprint, seed=cfg.seed, **{key: getattr(cfg, key) for key in DRAWING})
        else:
            with new_files(folder) as aside:
                meta, *_ = write_set(cfg, aside, hub, inputs)
    except (OSError, ImportError) as error:
        raise UserError(f'{error}; {folder} is as it was') from None
    except KeyboardInterrupt:
        raise UserError(f'stopped; {folder} is as it was') from None
    print(table(folder, meta))
    for split, means in meta.get('rewards', {}).items():
        print(f'mean reward, {split}: ' + ', '.join(f'{mean:+.3f} {what}' for what, mean in means.items()))
    print('\n'.join([*notes_of(meta), f'{folder} is ready, {time.time() - started:.1f} s']))


if __name__ == '__main__':
    if os.environ.get('RANK', '0') == '0':
        signal.signal(signal.SIGTERM, signal.default_int_handler)   # clean up as after Ctrl-C; other ranks write nothing
    main()
