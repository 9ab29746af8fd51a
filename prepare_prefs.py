"""Preferences in, token ids on disk out: data/<name>/, which sft.py, dpo.py and sample.py read.

    python prepare_prefs.py                                   # the embedded experiment, config/reviews.py
    python prepare_prefs.py config/hh.py                      # Anthropic HH, from the hub
    python prepare_prefs.py --name=mine --source=pairs.jsonl  # your own pairs
    python prepare_prefs.py --name=online --source=data/reviews --policy=out/reviews/sft --reward=config/reviews.py
                                                              # pairs drawn from a policy; torchrun shares the work

`source` is one of
- a .jsonl file, all lines of one kind, which the first object tells:
  a pair                {"prompt": "...", "chosen": "...", "rejected": "..."}
  a ranking             {"prompt": "...", "responses": [best, ..., worst]}, as many in every line; with "scores": [...],
                        a number each, in any order. Of two responses it is a pair.
  an unpaired example   {"prompt": "...", "completion": "...", "label": true or false}, for dpo.py --loss=kto, which
                        takes pairs as they are, too: each is two examples. sft.py learns from the true ones alone.
  Other keys are ignored, blank lines skipped, texts taken as they are. A line that is not of the kind, has a
  blank response or two equal ones, is reported with its number and stops the run (see max_bad_lines).
- a directory with train.jsonl and, if there is one, val.jsonl (or validation.jsonl, test.jsonl).
- a .py file that defines pairs(split, seed), which yields such dicts for 'train' and for 'val'.
- a hub name, or a directory in a layout that `datasets` reads. Rows of such columns are taken as they are.
  Rows of chosen and rejected without prompt are whole dialogues, as in Anthropic HH: each side is split
  after its last '\\n\\nAssistant:', and the response keeps its leading space, but no white space at its end.
  Dropped, and counted under the first that fits: `no_assistant_turn` (a side does not end with one),
  `prompts_differ` (no one prompt belongs to both), `empty_response`, `identical`.

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

A set that is undamaged and was made from the same knobs and the same bytes is reused; of a .py file only its
own bytes are looked at, not what it imports. A run that fails or is stopped leaves the set as it was.
"""
import base64
import collections
import contextlib
import dataclasses
import functools
import glob
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
import shutil
import signal
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
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
    source: str = ''                # preferences: a hub name, a directory, a .jsonl or a .py file; '' = none
    data_dir: str = ''              # a subset inside source, e.g. harmless-base of Anthropic/hh-rlhf
    documents: str = ''             # text to pretrain on: a .py file with documents(split, seed), a .jsonl
                                    # file with `text`, a .txt file (<|endoftext|> lines between texts), or
                                    # 'chosen': prompt + chosen (best, desirable) of source; '' = none
    tokenizer: str = 'gpt2'         # one of tiktoken's, 'bytes', or 'bpe:N': N tokens learned from the text
    template: str = '{prompt}'      # what stands around a prompt; <|endoftext|> at its start is the end token
    max_length: In[int, 'x >= 2'] = 512             # tokens of a prompt and one response; the paper's
    max_prompt_length: In[int, 'x >= 1'] = 256      # a prompt is cut to this, only where too long together
    val_fraction: In[float, '0 < x < 1'] = 0.05     # held out, where the source has no validation split
    max_bad_lines: In[int, 'x >= 0'] = 0            # of your own data: more than this many stop the run
    seed: In[int, 'x >= 0'] = 1337                  # of what is held out, or drawn; a .py source gets it too
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


SPLITS = ('train', 'val', 'documents_train', 'documents_val')
DRAWING = ('reward', 'num_samples', 'num_prompts', 'pairing', 'temperature', 'max_new_tokens', 'batch_size', 'device')
READING = ('data_dir', 'documents', 'tokenizer', 'template', 'max_length', 'max_prompt_length', 'val_fraction', 'max_bad_lines')
FILES = [f'{s}{end}' for end in ('.bin', '.idx.npy', '.labels.npy') for s in SPLITS] + ['tokenizer.json', 'meta.json']

# -----------------------------------------------------------------------------
# rows: a source's row as (list of texts, label), or ValueError(reason, what is wrong with it). The label is
# None but for an unpaired example's

def need(row, *keys):
    """ValueError where a row is no object with `keys`."""
    if not isinstance(row, dict):
        raise ValueError('not_an_object', f'not an object with {", ".join(keys)}, but {type(row).__name__}')
    for key in keys:
        if key not in row:
            raise ValueError('missing_key', f"missing key '{key}'")


def read_texts(row, *keys):
    """The strings under `keys`; only a prompt may be blank."""
    need(row, *keys)
    for key in keys:
        if type(row[key]) is not str:
            raise ValueError('not_a_string', f"'{key}' is not a string, but {type(row[key]).__name__}")
        try:
            row[key].encode()
        except UnicodeEncodeError:
            raise ValueError('not_unicode', f"'{key}' holds half a character, a lone surrogate") from None
        if key != 'prompt' and not row[key].strip():
            raise ValueError('empty_text' if key == 'text' else 'empty_response', f"empty '{key}'")
    return [row[key] for key in keys]


def read_pair(row):
    """[prompt, chosen, rejected], None of a row that has them."""
    prompt, chosen, rejected = read_texts(row, 'prompt', 'chosen', 'rejected')
    if chosen == rejected:
        raise ValueError('identical', "'chosen' and 'rejected' are the same")
    return [prompt, chosen, rejected], None


def read_dialogues(row):
    """[prompt, chosen, rejected], None of a row whose two sides are whole dialogues, as in Anthropic HH."""
    sides = [text.rpartition('\n\nAssistant:') for text in read_texts(row, 'chosen', 'rejected')]
    (prompt, turn, chosen), (other, _, rejected) = sides
    if any(not turn or '\n\nHuman:' in response for _, turn, response in sides):
        raise ValueError('no_assistant_turn', 'a side does not end with a turn of the Assistant')
    if prompt != other:
        raise ValueError('prompts_differ', 'the two sides have different prompts')
    return read_pair({'prompt': prompt + turn, 'chosen': chosen.rstrip(), 'rejected': rejected.rstrip()})


def read_ranking(row):
    """[prompt, best, ..., worst], None of a row with `responses`, in that order or in any with `scores`."""
    need(row, 'prompt', 'responses')
    responses, scores = row['responses'], row.get('scores')
    for key in ('responses', 'scores'):
        if key in row and type(row[key]) is not list:
            raise ValueError('not_a_list', f"'{key}' is not a list, but {type(row[key]).__name__}")
    if len(responses) < 2:
        raise ValueError('ranking_of_one', f"'responses' holds {len(responses)}, a ranking needs two or more")
    named = {f'response {i}': response for i, response in enumerate(responses, 1)}
    prompt, *texts = read_texts({'prompt': row['prompt'], **named}, 'prompt', *named)
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
    """[prompt, completion], label of a row that has them."""
    need(row, 'prompt', 'completion', 'label')
    if not isinstance(row['label'], (bool, np.bool_)):
        raise ValueError('label_not_boolean', f"'label' is not true or false, but {row['label']!r:.40}")
    return read_texts(row, 'prompt', 'completion'), bool(row['label'])


def read_document(row):
    """[text], None of a row that has it."""
    return read_texts(row, 'text'), None


KINDS = {read_pair: 'pairs', read_ranking: 'rankings', read_unpaired: 'unpaired examples'}


def reader_of(keys):
    """The one of KINDS for rows with these keys. What holds a whole pair is one, whatever else it holds."""
    if 'chosen' in keys and 'rejected' in keys:
        return read_pair
    if 'responses' in keys:
        return read_ranking
    return read_unpaired if 'completion' in keys or 'label' in keys else read_pair


def parse_line(line):
    """What a line of a .jsonl file, bytes, says."""
    try:
        return json.loads(line.decode('utf-8-sig'))
    except UnicodeDecodeError as error:
        raise ValueError('not_utf8', f'not UTF-8 at byte {error.start + 1}') from None
    except (ValueError, RecursionError) as error:
        raise ValueError('not_json', f'not JSON ({error})') from None

# -----------------------------------------------------------------------------
# sources: {'train': (where, rows, read), 'val': the same}, or 'train' alone. rows() yields (number, row)
# whenever called; read(row) gives (texts, label); where ('pairs.jsonl line') is for messages, '' where a bad row
# is dropped by rule and is not the user's mistake

def from_lines(path, read):
    def rows():
        with open(path, 'rb') as f:
            yield from ((number, line) for number, line in enumerate(f, 1) if line.strip())
    return f'{path} line', rows, lambda line: read(parse_line(line))


def from_items(items, where, read):
    return where, functools.partial(enumerate, items, 1), read


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
        return datasets.load_dataset(path, data_dir=data_dir or None, cache_dir=cache_dir)
    except Exception as error:
        raise UserError(f'{what}: {type(error).__name__}: {str(error)[:300]}') from None


def from_dataset(found, source):
    """The splits of a datasets.DatasetDict: rows of explicit columns, or of whole dialogues."""
    sources = {}
    needed = {read_pair: {'chosen', 'rejected'}, read_ranking: {'prompt'}, read_unpaired: {'prompt', 'completion', 'label'}}
    for split, table in found.items():
        columns = set(table.column_names)
        read = reader_of(columns)
        if not needed[read] <= columns:
            raise UserError(f"source '{source}' has columns {', '.join(table.column_names)}; it needs chosen and rejected, and "
                            'prompt unless they are whole dialogues; or prompt and responses; or prompt, completion and label')
        sources[split] = from_items(table, '', read_dialogues if read is read_pair and 'prompt' not in columns else read)
    return sources


def train_and_val(found, source):
    """{'train': ..., 'val': ...} of {name: split}; without 'val' where there is none."""
    train = 'train' if len(found) > 1 else next(iter(found))
    if train not in found:
        raise UserError(f"source '{source}' has no split 'train', only {', '.join(found)}")
    val = [split for split in ('val', 'validation', 'test') if split in found and split != train]
    return {'train': found[train]} | {'val': found[split] for split in val[:1]}


def of_one_kind(splits):
    """The splits of a source, where read(row) gives the object itself, with that one of KINDS in its place which the
    first object of each split asks for."""
    kinds = {}
    for where, rows, read in splits.values():
        for _, row in rows():
            with contextlib.suppress(ValueError):           # a bad line is survey's to report
                if isinstance(row := read(row), dict):
                    kinds[where.rpartition(' ')[0]] = reader_of(row)
                    break
    if len(set(kinds.values())) > 1:
        raise UserError(', '.join(f'{where} holds {KINDS[kind]}' for where, kind in kinds.items()) +
                        ': both must be of one kind (their first lines tell)')
    kind = next(iter(kinds.values()), read_pair)
    return {split: (where, rows, lambda row, read=read: kind(read(row))) for split, (where, rows, read) in splits.items()}


def open_preferences(cfg, hub, aside):
    """The source of pairs, rankings or unpaired examples. hub: its DatasetDict where it is on the hub; aside: a
    temporary folder."""
    def as_it_is(row):
        return row
    if cfg.source.endswith('.py'):
        return of_one_kind(from_python(cfg.source, 'pairs', cfg.seed, as_it_is))
    if cfg.source.endswith('.jsonl'):
        return of_one_kind({'train': from_lines(cfg.source, as_it_is)})
    folder = os.path.join(cfg.source, cfg.data_dir)
    if os.path.isfile(os.path.join(folder, 'train.jsonl')):
        files = {file[:-6]: file for file in os.listdir(folder) if file.endswith('.jsonl')}
        return of_one_kind({split: from_lines(os.path.join(folder, file), as_it_is)
                            for split, file in train_and_val(files, folder).items()})
    # local files get a cache of their own: the shared one tells them by their times, and keeps a copy
    found = hub or load_dataset(cfg.source, cfg.data_dir, os.path.join(aside, 'cache'))
    return from_dataset(train_and_val(found, cfg.source), cfg.source)


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
            if where:
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
    """Token ids of rows, lists of a prompt and K responses. Returns (parts, cut): the parts of all groups,
    one after another, lists of int; and how many prompts, responses and tokens were cut, int (3,)."""
    parts, cut = [], np.zeros(3, np.int64)
    for prompt, *responses in rows:
        prompt = prompt_ids(tokenizer, prompt, cfg.template)
        responses = [text_ids(tokenizer, response) + [tokenizer.eot_token] for response in responses]
        group = truncate(prompt, responses, cfg.max_length, cfg.max_prompt_length)
        lost = [len(whole) - len(part) for whole, part in zip([prompt, *responses], group)]
        if any(lost):
            cut += lost[0] > 0, sum(n > 0 for n in lost[1:]), sum(lost)
        parts += group
    return parts, cut


def encode_documents(rows, tokenizer, cfg):
    """The same of documents, [text] each: groups of a prompt of one token and one response."""
    parts, step = [], cfg.max_length - 1
    for text, in rows:
        ids = [tokenizer.eot_token, *text_ids(tokenizer, text), tokenizer.eot_token]
        for i in range(0, len(ids) - 1, step):
            parts += ids[i:i + 1], ids[i + 1:i + 1 + step]
    return parts, np.zeros(3, np.int64)


def write_split(path, rows, n, K, encode, tokenizer, cfg, labels=None):
    """Write <path>.bin and <path>.idx.npy of n rows, as groups of K responses, and <path>.labels.npy where there are
    labels, bool (n,). Returns what meta.json says of them. rows: iterator of lists of texts; encode: one of the
    functions above."""
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    digest, pieces, cut = hashlib.sha256(), [], np.zeros(3, np.int64)
    with open(f'{path}.bin', 'wb') as f, tqdm(total=n, desc=os.path.basename(path), unit=' rows', disable=None) as bar:
        while chunk := list(itertools.islice(rows, 1000)):
            parts, chunk_cut = encode(chunk, tokenizer, cfg)
            tokens = np.array(list(itertools.chain.from_iterable(parts)), dtype)
            f.write(tokens)
            digest.update(tokens)
            pieces.append([len(part) for part in parts])
            cut += chunk_cut
            bar.update(len(chunk))
    lengths = np.concatenate(pieces).reshape(-1, K + 1)                             # (N, K+1)
    ends = lengths.cumsum().reshape(-1, K + 1)                                      # (N, K+1)
    index = np.column_stack((ends[:, 0] - lengths[:, 0], ends)).astype(np.int64)    # (N, K+2)
    info = dict(groups=len(index), K=K, tokens=int(index[-1, -1]), longest=int(lengths.sum(1).max()),
                dtype=np.dtype(dtype).name, bin_sha256=digest.hexdigest(),
                truncated=dict(zip(('prompts', 'responses', 'tokens'), cut.tolist())))
    if labels is not None:
        info |= dict(desirable=int(labels.sum()), undesirable=int((~labels).sum()))
    for name, array in (('idx', index), ('labels', labels)):
        if array is not None:
            file = io.BytesIO()
            np.save(file, array)
            with open(f'{path}.{name}.npy', 'wb') as f:
                f.write(file.getvalue())
            info[f'{name}_sha256'] = hashlib.sha256(file.getvalue()).hexdigest()
    return info

# -----------------------------------------------------------------------------
# the set on disk

def check(cfg):
    """UserError where knobs do not fit one another or name what is not there, before anything is read."""
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
    if cfg.template.count('{prompt}') != 1:
        raise UserError(f'template={cfg.template!r} must hold {{prompt}} once')
    size = re.fullmatch(r'bpe:([0-9]+)', cfg.tokenizer)
    if (int(size[1]) < 257) if size else cfg.tokenizer.startswith('bpe') or cfg.tokenizer.endswith('.json'):
        raise UserError(f"tokenizer={cfg.tokenizer!r} must be one of tiktoken's names, 'bytes' or 'bpe:N', "
                        'N >= 257: the 256 bytes, the end token, and what is learned')
    if not cfg.source and cfg.documents in ('', 'chosen'):
        raise UserError('nothing to prepare: set --source to a hub name, a directory, a .jsonl or a .py file')
    if os.path.isfile(cfg.source) != cfg.source.endswith(('.jsonl', '.py')):
        wrong = 'must be a .jsonl or a .py file' if os.path.isfile(cfg.source) else 'does not exist'
        raise UserError(f'source {cfg.source} {wrong}')
    if cfg.documents not in ('', 'chosen'):
        if not cfg.documents.endswith(('.jsonl', '.py', '.txt')):
            raise UserError(f"documents={cfg.documents!r} must be a .jsonl, .py or .txt file, or 'chosen'")
        if not os.path.isfile(cfg.documents):
            raise UserError(f'documents {cfg.documents} does not exist')


def hash_inputs(cfg, hub, policy):
    """A hash over all that decides the result: the format, the knobs, the content of the sources, the policy's weights."""
    knobs, files = dataclasses.asdict(cfg), {}
    for key in ('name', 'policy', *(READING if cfg.policy else DRAWING)):
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
    """Make all files of the set in the folder `aside`. Returns meta.json as a dict."""
    own = cfg.tokenizer == 'bytes' or cfg.tokenizer.startswith('bpe:')
    name = 'tokenizer.json' if own else cfg.tokenizer
    if not own:
        load_tokenizer(aside, name)     # a wrong name is found before the long read
    plans = plan(open_preferences(cfg, hub, aside), cfg, cfg.source) if cfg.source else {}
    if cfg.documents == 'chosen':
        plans |= chosen_documents(plans)
    elif cfg.documents:
        found = plan(open_documents(cfg), cfg, cfg.documents)
        plans |= {f'documents_{split}': found[split] for split in found}
    if own:
        train = [rows for split, (rows, *_) in plans.items() if split.endswith('train')]
        make_tokenizer(cfg.tokenizer, (text for rows in train for row in rows() for text in row), aside)
    tokenizer = load_tokenizer(aside, name)
    knobs = ('name', 'source', 'data_dir', 'documents', 'template', 'max_length', 'max_prompt_length')
    meta = dict(format=FORMAT, **{key: getattr(cfg, key) for key in knobs}, tokenizer=name,
                vocab_size=tokenizer.n_vocab, eot_token=tokenizer.eot_token, inputs=inputs, splits={})
    for split, (rows, n, dropped, labels) in plans.items():
        K, encode = (1, encode_documents) if split.startswith('documents') else (len(next(rows())) - 1, encode_groups)
        info = write_split(os.path.join(aside, split), rows(), n, K, encode, tokenizer, cfg, labels)
        meta['splits'][split] = dict(read=n + sum(dropped.values()), kept=n, dropped=dropped) | info
    meta['fingerprint'] = hash_set(aside, meta)
    write_meta(aside, meta)
    return meta


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
    columns = [['', 'read', *(f'dropped: {reason}' for reason in reasons), 'kept', *labels, 'prompts truncated',
                'responses truncated', 'tokens truncated', 'groups', 'tokens', 'longest group', 'mean group',
                'MB on disk']]
    for split, i in meta['splits'].items():
        size = sum(os.path.getsize(os.path.join(folder, split + end)) for end in ('.bin', '.idx.npy'))
        numbers = [i['read'], *(i['dropped'].get(reason, 0) for reason in reasons), i['kept'],
                   *(i.get(label, 0) for label in labels), *i['truncated'].values(), i['groups'], i['tokens'], i['longest'],
                   round(i['tokens'] / i['groups'], 1), round(size / 1e6, 2)]
        columns.append([split, *(f'{number:,}' for number in numbers)])
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
    source_meta, dropped = read_meta(source), dropped or {}
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
            info = write_split(os.path.join(aside, split), iter(groups), len(groups), len(groups[0]) - 1,
                               lambda rows, *_: ([piece for row in rows for piece in row], np.zeros(3, np.int64)), tokenizer, None)
            info['truncated']['responses'] = sum(int(ids[-1] != meta['eot_token']) for group in groups for ids in group[1:])
            lost = dropped.get(split, {})
            meta['splits'][split] = dict(read=len(groups) + sum(lost.values()), kept=len(groups), dropped=lost) | info
        meta['fingerprint'] = hash_set(aside, meta)
        write_meta(aside, meta)
    return meta


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


def draw_pairs(cfg, policy):
    """Draw from the policy, score, and make pairs, on all ranks.

    Returns on rank 0 {split: pairs}, {split: {'tied': n}} and {split: mean rewards of samples, chosen, rejected}, on the
    others None. A batch of prompts is always the same one, and has its own seed: it does not matter who draws it.
    """
    import torch
    import torch.distributed as dist
    world, rank, local_rank = (int(os.environ.get(key, default)) for key, default in
                               (('WORLD_SIZE', 1), ('RANK', 0), ('LOCAL_RANK', 0)))
    device_type = cfg.device if cfg.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    gpus = torch.cuda.device_count()
    if device_type == 'cuda' and local_rank >= gpus or device_type == 'mps' and not torch.backends.mps.is_available():
        raise UserError(f'device={device_type}: torch sees {gpus} GPUs here: --device=cpu' + ', or fewer processes' * (gpus > 0))
    device = torch.device(device_type, local_rank) if device_type == 'cuda' else torch.device(device_type)
    bf16 = device_type == 'cuda' and torch.cuda.is_bf16_supported()
    if world > 1:
        dist.init_process_group('gloo')

    # the reward, on rank 0, before the long work
    sources, error = {split: Groups(cfg.source, split) for split in ('train', 'val')}, ['']
    if rank == 0:
        try:
            rewards_of = open_reward(cfg.reward, sources['train'], device)
        except UserError as user_error:
            error = [user_error.message]
    if world > 1:
        dist.broadcast_object_list(error)       # so that none is left waiting
    if error[0]:
        raise UserError(error[0])

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


def prompt_ids(tokenizer, prompt, template):
    """The ids of a prompt, the same in training and in sampling: list of int, never empty.

    The template holds `{prompt}`; a prompt that already has what the template puts around it is taken as it
    is. A template that begins with <|endoftext|> puts the end token there, as between GPT-2's documents;
    in the prompt itself that string is ordinary text. An empty prompt becomes the end token.
    """
    bos = template.startswith(EOT)
    before, _, after = template.removeprefix(EOT).partition('{prompt}')
    if not (prompt.startswith(before) and prompt.endswith(after)):
        prompt = before + prompt + after
    ids = text_ids(tokenizer, prompt)
    return [tokenizer.eot_token] * (bos or not ids) + ids


def text_of(tokenizer, ids):
    """The text of a list of ids, end tokens left out; a character that was cut becomes U+FFFD."""
    pieces = []
    for token in ids:
        with contextlib.suppress(KeyError):        # an id that the tokenizer skips, as cl100k_base does
            pieces.append(tokenizer.decode_single_token_bytes(token) if token != tokenizer.eot_token else b'')
    return b''.join(pieces).decode(errors='replace')


def sha256_file(path):
    """The SHA-256 of a file's content, hex."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


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
                path = os.path.join(folder, split + end)
                if not os.path.isfile(path):
                    raise UserError(f'{path} is missing: run prepare_prefs.py again')
                if sha256_file(path) != info[key]:
                    raise UserError(f'{path} is damaged: its content is not what meta.json records; run prepare_prefs.py again')
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
    """Write data/<name>/meta.json; it holds a hash of the tokenizer's file and one of all the rest of it, for read_meta."""
    name = meta['tokenizer']
    if name.endswith('.json'):
        meta = meta | {'tokenizer_sha256': sha256_file(os.path.join(folder, name))}
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump(meta | {'sha256': sha256_json(meta)}, f, indent=1)


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
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f'{path} is missing: run prepare_prefs.py again')
        if sha256_file(path) != meta['tokenizer_sha256']:
            raise UserError(f'{path} is damaged: its content is not what meta.json records; run prepare_prefs.py again')
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
        policy, fingerprint = open_policy(cfg) if cfg.policy else (None, '')
        inputs = hash_inputs(cfg, hub, fingerprint)
        why = why_remake(folder, inputs)
        if not why:
            if os.environ.get('RANK', '0') == '0':
                sweep(folder)
            say(f'{folder} is reused: same knobs, same source, undamaged')
            return
        say(f'making {folder}: {why}', flush=True)
        if cfg.policy:
            drawn = draw_pairs(cfg, policy)
            if drawn is None:           # rank 0 alone goes on
                return
            splits, dropped, rewards = drawn
            meta = write_groups(folder, cfg.source, splits, dropped, inputs=inputs, rewards=rewards, policy=cfg.policy,
                                policy_fingerprint=fingerprint, seed=cfg.seed, **{key: getattr(cfg, key) for key in DRAWING})
        else:
            with new_files(folder) as aside:
                meta = write_set(cfg, aside, hub, inputs)
    except (OSError, ImportError) as error:
        raise UserError(f'{error}; {folder} is as it was') from None
    except KeyboardInterrupt:
        raise UserError(f'stopped; {folder} is as it was') from None
    print(table(folder, meta))
    for split, means in meta.get('rewards', {}).items():
        print(f'mean reward, {split}: ' + ', '.join(f'{mean:+.3f} {what}' for what, mean in means.items()))
    print(f'{folder} is ready, {time.time() - started:.1f} s')


if __name__ == '__main__':
    if os.environ.get('RANK', '0') == '0':
        signal.signal(signal.SIGTERM, signal.default_int_handler)   # clean up as after Ctrl-C; other ranks write nothing
    main()
