"""Preference pairs in, token ids on disk out: data/<name>/, which sft.py, dpo.py and sample.py read.

    python prepare_prefs.py                                   # the embedded experiment, config/reviews.py
    python prepare_prefs.py config/hh.py                      # Anthropic HH, from the hub
    python prepare_prefs.py --name=mine --source=pairs.jsonl  # your own pairs

`source` is one of
- a .jsonl file, a line a pair: {"prompt": "...", "chosen": "...", "rejected": "..."}; other keys are ignored,
  blank lines skipped. Texts are taken as they are. A line that is not such a pair, whose chosen or rejected is
  blank, or whose two responses are the same, is reported with its number and stops the run (max_bad_lines).
- a directory with train.jsonl and, if there is one, val.jsonl (validation.jsonl, test.jsonl).
- a .py file that defines pairs(split, seed), a generator of such dicts for 'train' and for 'val'.
- a hub name, or a directory in a layout of `datasets`. Rows of prompt, chosen, rejected are taken as they are.
  Rows of chosen and rejected alone are whole dialogues, as in Anthropic HH: each side is split at its last
  '\\n\\nAssistant:', which ends the prompt; the response keeps its leading space, not its trailing white space.
  Dropped, and counted under the first name that fits: `no_assistant_turn` (a side has none, or does not end with
  it), `prompts_differ` (no one prompt belongs to both), `empty_response`, `identical`.

A source without a validation split gives up val_fraction of its pairs, drawn by the seed; pairs with the same
prompt go to the same side, so validation prompts are new to the model. Of `documents`, a document counts as its
own prompt, and a lone one is divided: its end is held out.

Truncation, only where prompt + longest response exceed max_length: the prompt is cut from the left to
max_prompt_length, then responses from the right to what is left. A response ends with the end token, which counts,
unless it was cut. A document follows an end token and ends with one; in pieces of max_length tokens, the last
token of one piece is the prompt of the next, so every token is predicted once.

A set that was made from the same inputs and is undamaged is reused. A .py file is known by its own bytes: change
the seed or the file when what it imports has changed.
"""
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import config
from config import In, UserError

# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'           # the experiment: writes data/<name>/
    source: str = ''                # pairs: a hub name, a directory, a .jsonl or a .py file; '' = no pairs
    data_dir: str = ''              # a subset inside source, e.g. harmless-base of Anthropic/hh-rlhf
    documents: str = ''             # text to pretrain on: a .py file with documents(split, seed), a .jsonl file with
                                    # "text", a .txt file (lines <|endoftext|> between documents), or 'chosen': the
                                    # pairs' prompt + chosen; '' = none
    tokenizer: str = 'gpt2'         # one of tiktoken's, 'bytes', or 'bpe:N': N tokens, learned from the training text
    template: str = '{prompt}'      # what stands around a prompt; <|endoftext|> at its start is the end token
    max_length: In[int, 'x >= 2'] = 512             # tokens of the prompt and one response; the paper's
    max_prompt_length: In[int, 'x >= 1'] = 256      # a prompt is cut to this only where max_length is exceeded
    val_fraction: In[float, '0 < x < 1'] = 0.05     # held out, where the source has no validation split
    max_bad_lines: In[int, 'x >= 0'] = 0            # of your own data: more than this many stop the run
    workers: In[int, 'x >= 0'] = 0                  # processes that tokenise; 0 = one a core
    seed: In[int, 'x >= 0'] = 1337                  # of the held-out split, and given to a .py source


SPLITS = ('train', 'val', 'documents_train', 'documents_val')
FILES = [f'{split}{end}' for split in SPLITS for end in ('.bin', '.idx.npy')] + ['tokenizer.json', 'meta.json']
CHUNK = 1000                # rows a worker takes at a time

# -----------------------------------------------------------------------------
# rows: from any source to texts, or a reason why not

def texts(row, *keys):
    """The strings under `keys` of a row, a list; raises ValueError(reason, what is wrong)."""
    if not isinstance(row, dict):
        raise ValueError('not_an_object', f'not an object with {", ".join(keys)}, but {type(row).__name__}')
    for key in keys:
        if key not in row:
            raise ValueError('missing_key', f"missing key '{key}'")
        if type(row[key]) is not str:
            raise ValueError('not_a_string', f"'{key}' is not a string, but {type(row[key]).__name__}")
        try:
            row[key].encode()
        except UnicodeEncodeError:
            raise ValueError('not_unicode', f"'{key}' holds half a character, a lone surrogate") from None
    return [row[key] for key in keys]


def read_pair(row):
    """[prompt, chosen, rejected] of a row that has them."""
    prompt, chosen, rejected = texts(row, 'prompt', 'chosen', 'rejected')
    for key in ('chosen', 'rejected'):
        if not row[key].strip():
            raise ValueError('empty_response', f"empty '{key}'")
    if chosen == rejected:
        raise ValueError('identical', "'chosen' and 'rejected' are the same")
    return [prompt, chosen, rejected]


def read_dialogues(row):
    """[prompt, chosen, rejected] of a row whose two sides are whole dialogues, as in Anthropic HH."""
    sides = [text.rpartition('\n\nAssistant:') for text in texts(row, 'chosen', 'rejected')]
    for _, turn, response in sides:
        if not turn or '\n\nHuman:' in response:
            raise ValueError('no_assistant_turn', 'a side does not end with a turn of the Assistant')
    (prompt, turn, chosen), (other, _, rejected) = sides
    if prompt != other:
        raise ValueError('prompts_differ', 'the two sides have different prompts')
    return read_pair({'prompt': prompt + turn, 'chosen': chosen.rstrip(), 'rejected': rejected.rstrip()})


def read_document(row):
    """[text] of a row that has it."""
    if not texts(row, 'text')[0].strip():
        raise ValueError('empty_document', "empty 'text'")
    return [row['text']]


def parse_line(line):
    """A line of a .jsonl file, bytes, as what it says; raises ValueError(reason, what is wrong)."""
    try:
        return json.loads(line.decode('utf-8-sig'))
    except UnicodeDecodeError as error:
        raise ValueError('not_utf8', f'not UTF-8 at byte {error.start + 1}') from None
    except (ValueError, RecursionError) as error:
        raise ValueError('not_json', f'not JSON ({error})') from None

# -----------------------------------------------------------------------------
# sources: {'train': (label, rows, read), 'val': the same} or 'train' alone. rows() may be called again, and gives
# (number, row); read(row) gives texts or raises ValueError; a label ('pairs.jsonl line') is for messages, and ''
# where a bad row is dropped by rule and is nobody's mistake

def lines_of(path, read):
    def rows():
        with open(path, 'rb') as f:
            yield from ((number, line) for number, line in enumerate(f, 1) if line.strip())
    return f'{path} line', rows, lambda line: read(parse_line(line))


def list_of(items, label, read):
    return label, lambda: enumerate(items, 1), read


def from_python(path, function, seed, read):
    """What the function of that name in a .py file yields for both splits."""
    found = {}
    try:
        module = runpy.run_path(path)
        if not callable(module.get(function)):
            raise UserError(f'{path} defines no {function}(split, seed)')
        for split in ('train', 'val'):
            found[split] = list_of(list(module[function](split, seed)), f"{path} {function}('{split}') item", read)
    except Exception as error:
        at = [f' line {frame.lineno}' for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        raise UserError(f'{path}{at[-1] if at else ""}: {type(error).__name__}: {error}') from None
    return found


def load_dataset(source, data_dir, cache_dir=None):
    """A datasets.DatasetDict, or one line on why there is none."""
    hub = os.environ.get('HF_ENDPOINT', 'https://huggingface.co')
    try:
        if cache_dir is None:
            urllib.request.urlopen(hub, timeout=5).close()
    except urllib.error.HTTPError:
        pass                                        # it answers
    except OSError:
        os.environ['HF_HUB_OFFLINE'] = '1'          # read before the import: the cache or nothing, no retries
    import datasets
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, data_dir=data_dir or None, cache_dir=cache_dir)
    except Exception as error:
        offline = os.environ.get('HF_HUB_OFFLINE') and f'; {hub} cannot be reached: offline?'
        raise UserError(f"source '{source}'{data_dir and f' with data_dir {data_dir!r}'} could not be loaded: "
                        f"{type(error).__name__}: {str(error)[:300]}{offline or ''}") from None


def from_dataset(dataset, source):
    """The splits of a datasets.DatasetDict: rows of explicit columns, or of dialogues."""
    def split_of(table):
        columns = [c for c in ('prompt', 'chosen', 'rejected') if c in table.column_names]
        if columns[-2:] != ['chosen', 'rejected']:
            raise UserError(f"source '{source}' has columns {', '.join(table.column_names)}; chosen and rejected are "
                            'needed, and prompt where they are not whole dialogues')

        def rows():
            batches = table.select_columns(columns).iter(CHUNK)
            values = itertools.chain.from_iterable(zip(*(batch[c] for c in columns)) for batch in batches)
            return enumerate((dict(zip(columns, v)) for v in values), 1)
        return '', rows, read_pair if len(columns) == 3 else read_dialogues
    return {split: split_of(table) for split, table in train_and_val(dataset, source).items()}


def train_and_val(found, source):
    """{'train': ..., 'val': ...} of what a source calls its splits; without 'val' where it has none."""
    train = 'train' if 'train' in found or len(found) != 1 else next(iter(found))
    if train not in found:
        raise UserError(f"source '{source}' has no split 'train', only {', '.join(found)}")
    val = [split for split in ('val', 'validation', 'test') if split in found and split != train][:1]
    return {'train': found[train]} | {'val': found[split] for split in val}


def open_pairs(cfg, hub, aside):
    """The source of pairs. hub: its DatasetDict where it comes from the hub; aside: a folder for temporary files."""
    folder = os.path.join(cfg.source, cfg.data_dir)
    found = {s: f'{folder}/{s}.jsonl' for s in ('train', 'val', 'validation', 'test') if os.path.isfile(f'{folder}/{s}.jsonl')}
    if cfg.source.endswith('.py'):
        return from_python(cfg.source, 'pairs', cfg.seed, read_pair)
    if cfg.source.endswith('.jsonl'):
        return {'train': lines_of(cfg.source, read_pair)}
    if hub is None and 'train' in found:
        return {split: lines_of(path, read_pair) for split, path in train_and_val(found, folder).items()}
    # a cache of its own: the shared one goes by file times, and would keep a copy of local data
    return from_dataset(hub or load_dataset(cfg.source, cfg.data_dir, os.path.join(aside, 'cache')), cfg.source)


def open_documents(cfg):
    """The source of documents, as of pairs."""
    path = cfg.documents
    if path.endswith('.py'):
        return from_python(path, 'documents', cfg.seed, lambda text: read_document({'text': text}))
    if path.endswith('.jsonl'):
        return {'train': lines_of(path, read_document)}
    try:
        with open(path, encoding='utf-8') as f:
            pieces = [piece.strip('\n') for piece in re.split(rf'(?m)^{re.escape(EOT)}[ \t]*$', f.read())]
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 at byte {error.start + 1}') from None
    pieces = [piece for piece in pieces if piece.strip()]
    if len(pieces) == 1:
        cut = round(len(pieces[0]) * (1 - cfg.val_fraction))
        pieces = {'train': [pieces[0][:cut]], 'val': [pieces[0][cut:]]}
    else:
        pieces = {'train': pieces}
    return {split: list_of(p, f'{path} document', lambda text: read_document({'text': text})) for split, p in pieces.items()}

# -----------------------------------------------------------------------------
# the first pass: what is bad, what is kept, what is held out

def survey(source, bad):
    """Read a split once. Returns (prompts, dropped): for each row the number of its prompt in order of appearance
    (-1 = dropped), int array (N,), and {reason: n}. Appends a line on each of the user's bad rows to `bad`."""
    label, rows, read = source
    prompts, seen, dropped = [], {}, collections.Counter()
    for number, row in tqdm(rows(), 'reading', unit=' rows', disable=None, leave=False):
        try:
            digest = hashlib.blake2b(read(row)[0].encode(), digest_size=16).digest()
        except ValueError as error:
            reason, message = error.args
            dropped[reason] += 1
            prompts.append(-1)
            if label:
                bad.append(f'{label} {number}: {message}')
        else:
            prompts.append(seen.setdefault(digest, len(seen)))
    return np.array(prompts, np.int64), dict(sorted(dropped.items()))


def stop_at_bad(bad, allowed):
    """Report the user's bad lines, ten at most; raise UserError where they are more than `allowed`."""
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


def hold_out(prompts, fraction, seed, what):
    """Which rows are held out, bool (N,): close to `fraction` of those kept, whole prompts, at least one a side."""
    sizes = np.bincount(prompts[prompts >= 0])                  # rows of each prompt
    if len(sizes) < 2:
        raise UserError(f'{what}: two different prompts are needed, one of them to hold out for validation; '
                        f'there {"is one" if len(sizes) else "are none"}')
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
    """{split: (rows, n, dropped)} of a source's splits: rows() yields the texts of the n rows that are kept."""
    bad = []
    found = {split: survey(source, bad) for split, source in splits.items()}
    stop_at_bad(bad, cfg.max_bad_lines)
    take = {split: prompts >= 0 for split, (prompts, _) in found.items()}
    if 'val' not in found:
        splits, found = {**splits, 'val': splits['train']}, {**found, 'val': (None, {})}
        take['val'] = hold_out(found['train'][0], cfg.val_fraction, cfg.seed, what)
        take['train'] &= ~take['val']
    for split in splits:
        if not take[split].any():
            raise UserError(f'{what}: nothing is left for {split}; dropped {found[split][1] or "none"}')
    return {split: (functools.partial(kept, splits[split], take[split]), int(take[split].sum()), found[split][1])
            for split in splits}


def kept(source, take):
    """The texts of those rows that `take` names: the second pass, and any further one."""
    _, rows, read = source
    return (read(row) for (_, row), wanted in zip(rows(), take) if wanted)

# -----------------------------------------------------------------------------
# a tokenizer of our own

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"       # GPT-2's


def train_bpe(words, size):
    """Byte-level BPE: the most frequent pair of neighbours becomes a token, until there are `size`.

    words: {bytes: count}, pieces that no token crosses. Returns tokens in rank order, list of bytes, fewer than
    `size` where every word has become one token. A tie goes to the pair with the lower ranks.
    """
    tokens = [bytes([b]) for b in range(256)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pieces, weights = [list(word) for word in words], list(words.values())
    counts, places = collections.Counter(), collections.defaultdict(set)
    for i, piece in enumerate(pieces):
        for pair in zip(piece, piece[1:]):
            counts[pair] += weights[i]
            places[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < size:
        count, (a, b) = heapq.heappop(heap)
        if counts[a, b] != -count:
            continue                                # out of date: what it is now was pushed again
        token = tokens[a] + tokens[b]
        rank = ranks.setdefault(token, len(tokens))
        if rank == len(tokens):                     # else the same bytes came together another way
            tokens.append(token)
        changed = set()
        for i in places.pop((a, b)):
            old, new = pieces[i], []
            for t in old:                           # merge from the left
                if new and (new[-1], t) == (a, b):
                    new[-1] = rank
                else:
                    new.append(t)
            for piece, sign in ((old, -1), (new, 1)):
                for pair in zip(piece, piece[1:]):
                    counts[pair] += sign * weights[i]
                    changed.add(pair)
            for pair in zip(new, new[1:]):
                places[pair].add(i)
            pieces[i] = new
        for pair in changed:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
    return tokens


def make_tokenizer(cfg, aside, training_text):
    """The name for meta.json of the tokenizer that cfg asks for; one of our own is written to `aside`."""
    if cfg.tokenizer != 'bytes' and not cfg.tokenizer.startswith('bpe:'):
        return cfg.tokenizer
    words, size = collections.Counter(), 256
    if cfg.tokenizer != 'bytes':
        import regex                                # tiktoken needs it too
        size = int(cfg.tokenizer[4:]) - 1           # the end token is one of N
        for text in tqdm(training_text, 'words', unit=' texts', disable=None, leave=False):
            words.update(regex.findall(PATTERN, text))
    tokens = train_bpe({word.encode(): count for word, count in words.items()}, size)
    if len(tokens) < size:
        print(f'tokenizer {cfg.tokenizer}: the text has no pairs left to merge, {len(tokens) + 1:,} tokens in all')
    with open(os.path.join(aside, 'tokenizer.json'), 'w') as f:
        json.dump({'name': cfg.tokenizer, 'pattern': PATTERN,
                   'tokens': [base64.b64encode(token).decode() for token in tokens]}, f)
    return 'tokenizer.json'

# -----------------------------------------------------------------------------
# the second pass: texts to token ids, in several processes

def truncate(prompt, responses, max_length, max_prompt_length):
    """The paper's truncation of token lists: (prompt, responses), prompt + longest response <= max_length."""
    if len(prompt) + max(map(len, responses)) > max_length:
        prompt = prompt[-max_prompt_length:]
        responses = [response[:max_length - len(prompt)] for response in responses]
    return prompt, responses


@functools.cache
def cached_tokenizer(folder, name):
    return load_tokenizer(folder, name)


def encode_pairs(rows, folder, name, cfg):
    """Token ids of groups. rows: lists of a prompt and K responses; folder, name: of the tokenizer.

    Returns (tokens, lengths, cut): all ids, flat; (n, K+1) int64; [prompts cut, responses cut, tokens cut].
    """
    tokenizer = cached_tokenizer(folder, name)
    parts, cut = [], np.zeros(3, np.int64)
    for prompt, *responses in rows:
        whole = prompt_ids(tokenizer, prompt, cfg.template)
        wholes = [tokenizer.encode_ordinary(response) + [tokenizer.eot_token] for response in responses]
        prompt, responses = truncate(whole, wholes, cfg.max_length, cfg.max_prompt_length)
        lost = [len(w) - len(r) for w, r in zip(wholes, responses)]
        gone = len(whole) - len(prompt)
        if gone or any(lost):
            cut += gone > 0, sum(n > 0 for n in lost), gone + sum(lost)
        parts += prompt, *responses
    return flatten(parts, tokenizer), np.array([len(p) for p in parts]).reshape(len(rows), -1), cut


def encode_documents(rows, folder, name, cfg):
    """Token ids of documents, as encode_pairs returns them: groups of one prompt token and one response."""
    tokenizer = cached_tokenizer(folder, name)
    parts, step = [], cfg.max_length - 1
    for text, in rows:
        ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(text), tokenizer.eot_token]
        for i in range(0, len(ids) - 1, step):
            parts += ids[i:i + 1], ids[i + 1:i + 1 + step]
    return flatten(parts, tokenizer), np.array([len(p) for p in parts]).reshape(-1, 2), np.zeros(3, np.int64)


def flatten(parts, tokenizer):
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    return np.fromiter(itertools.chain.from_iterable(parts), dtype, sum(map(len, parts)))


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the parent's to handle

    def leave_with_parent():                        # a killed parent would leave it waiting for ever
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def in_order(pool, ahead, function, chunks):
    """function(chunk) of each chunk, in order; `ahead` chunks are in the pool at a time."""
    waiting = collections.deque()
    for chunk in chunks:
        waiting.append(pool.submit(function, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_split(split, aside, rows, n, function, pool, ahead):
    """Write <split>.bin and <split>.idx.npy of n rows to `aside`. Returns what meta.json says of them."""
    iterator = iter(rows)
    chunks = iter(lambda: list(itertools.islice(iterator, CHUNK)), [])
    encoded = map(function, chunks) if n <= CHUNK or ahead == 0 else in_order(pool, ahead, function, chunks)
    digest, all_lengths, all_cut = hashlib.sha256(), [], np.zeros(3, np.int64)
    with open(os.path.join(aside, f'{split}.bin'), 'wb') as f, tqdm(total=n, desc=split, disable=None) as bar:
        for tokens, lengths, cut in encoded:
            f.write(tokens)
            digest.update(tokens)
            all_lengths.append(lengths)
            all_cut += cut
            bar.update(min(CHUNK, n - bar.n))
    lengths = np.concatenate(all_lengths)                                       # (N, K+1)
    ends = lengths.cumsum().reshape(lengths.shape)                              # of each part
    index = np.column_stack((ends[:, :1] - lengths[:, :1], ends))              # (N, K+2)
    file = io.BytesIO()
    np.save(file, index.astype(np.int64))
    with open(os.path.join(aside, f'{split}.idx.npy'), 'wb') as f:
        f.write(file.getbuffer())
    groups = lengths.sum(1)
    return dict(groups=len(groups), K=lengths.shape[1] - 1, tokens=int(groups.sum()), dtype=tokens.dtype.name,
                bin_sha256=digest.hexdigest(), idx_sha256=hashlib.sha256(file.getbuffer()).hexdigest(),
                longest=int(groups.max()), truncated=dict(zip(('prompts', 'responses', 'tokens'), map(int, all_cut))))

# -----------------------------------------------------------------------------
# the set on disk

def check(cfg):
    """Raise UserError where the knobs do not fit one another, before anything is read."""
    if cfg.max_prompt_length >= cfg.max_length:
        raise UserError(f'max_prompt_length={cfg.max_prompt_length} must be less than max_length={cfg.max_length}: '
                        'a cut prompt leaves room for a response')
    if cfg.template.count('{prompt}') != 1:
        raise UserError(f'template={cfg.template!r} must hold {{prompt}} once')
    size = re.fullmatch(r'bpe:(\d+)', cfg.tokenizer)
    if cfg.tokenizer.startswith('bpe:') and not (size and int(size[1]) >= 257) or cfg.tokenizer.endswith('.json'):
        raise UserError(f"tokenizer={cfg.tokenizer!r} must be one of tiktoken's names, 'bytes', or 'bpe:N' with N of "
                        "257 and more: 256 bytes, the end token, and what is learned")
    if not cfg.source and cfg.documents in ('', 'chosen'):
        raise UserError('nothing to prepare: set --source=, to a hub name, a directory, a .jsonl or a .py file')
    if cfg.source.endswith(('.py', '.jsonl', '.json', '.gz', '.txt')) and not os.path.isfile(cfg.source):
        raise UserError(f'source {cfg.source} does not exist')
    if os.path.isfile(cfg.source) and not cfg.source.endswith(('.py', '.jsonl')):
        raise UserError(f'source {cfg.source} must be a .jsonl or a .py file, a directory or a hub name')
    if cfg.documents not in ('', 'chosen') and not cfg.documents.endswith(('.py', '.jsonl', '.txt')):
        raise UserError(f"documents={cfg.documents!r} must be a .py, .jsonl or .txt file, or 'chosen'")
    if cfg.documents not in ('', 'chosen') and not os.path.isfile(cfg.documents):
        raise UserError(f'documents {cfg.documents} does not exist')


def hash_inputs(cfg, hub):
    """A hash over all that decides the result: knobs, sources' content, the format."""
    knobs = dataclasses.asdict(cfg)
    del knobs['name'], knobs['workers']
    folder = os.path.join(cfg.source, cfg.data_dir)
    paths = [path for path in (cfg.source, cfg.documents) if os.path.isfile(path)]
    if cfg.source and os.path.isdir(folder):
        for at, below, files in os.walk(folder):
            below[:] = [b for b in below if not b.startswith('.')]
            paths += [os.path.join(at, file) for file in files]
    content = {path: sha256_file(path) for path in paths}
    content |= {split: table._fingerprint for split, table in (hub or {}).items()}
    return hashlib.sha256(json.dumps([FORMAT, knobs, content], sort_keys=True).encode()).hexdigest()


def fingerprint(folder, meta):
    """A hash over the content of a set: its splits' tokens and its tokenizer."""
    own = os.path.join(folder, meta['tokenizer'])
    hashes = [[split, info['bin_sha256'], info['idx_sha256']] for split, info in sorted(meta['splits'].items())]
    return hashlib.sha256(json.dumps([hashes, meta['tokenizer'], meta['tokenizer'].endswith('.json') and sha256_file(own)])
                          .encode()).hexdigest()


def why_remake(folder, inputs):
    """Why the set in `folder` cannot be reused: a phrase, or '' where it can."""
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        return 'it is new'
    try:
        meta = read_meta(folder)
        if meta.get('inputs') != inputs:
            return 'other inputs than it was made from'
        for split in meta['splits']:
            Groups(folder, split)
        return '' if fingerprint(folder, meta) == meta['fingerprint'] else 'its tokenizer.json is damaged'
    except UserError as error:
        return error.message
    except (OSError, KeyError, TypeError) as error:
        return f'{type(error).__name__}: {error}'


def write_set(cfg, aside, hub, inputs):
    """Make every file of the set in the folder `aside`. Returns its meta.json as a dict."""
    plans = plan(open_pairs(cfg, hub, aside), cfg, cfg.source) if cfg.source else {}
    if cfg.documents == 'chosen':
        joined = {split: lambda rows=rows: ([prompt + chosen] for prompt, chosen, _ in rows()) for split, (rows, _, _) in plans.items()}
        plans |= {f'documents_{split}': (joined[split], plans[split][1], {}) for split in joined}
    elif cfg.documents:
        plans |= {f'documents_{split}': p for split, p in plan(open_documents(cfg), cfg, cfg.documents).items()}
    training = (text for split in plans if split.endswith('train') and not (split[0] == 'd' and cfg.documents == 'chosen')
                for row in plans[split][0]() for text in row)
    name = make_tokenizer(cfg, aside, training)
    tokenizer = load_tokenizer(aside, name)
    workers = cfg.workers or os.cpu_count()
    meta = dict(format=FORMAT, name=cfg.name, source=cfg.source, data_dir=cfg.data_dir, documents=cfg.documents,
                tokenizer=name, vocab_size=tokenizer.n_vocab, eot_token=tokenizer.eot_token, template=cfg.template,
                max_length=cfg.max_length, max_prompt_length=cfg.max_prompt_length, inputs=inputs, splits={})
    context = multiprocessing.get_context('spawn')      # a fork beside the threads of `datasets` may hang
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker) as pool:
        for split in plans:
            rows, n, dropped = plans[split]
            encode = encode_documents if split.startswith('documents') else encode_pairs
            function = functools.partial(encode, folder=aside, name=name, cfg=cfg)
            info = write_split(split, aside, rows(), n, function, pool, 2 * workers if workers > 1 else 0)
            meta['splits'][split] = dict(read=n + sum(dropped.values()), kept=n, dropped=dropped) | info
    meta['fingerprint'] = fingerprint(aside, meta)
    with open(os.path.join(aside, 'meta.json'), 'w') as f:
        json.dump(meta, f, indent=1)
    return meta


def publish(aside, folder):
    """Move the files of a whole set from `aside` over the old ones, which come back if that fails midway."""
    old = tempfile.mkdtemp(dir=aside)
    try:
        for file in FILES:                              # meta.json is the last
            if os.path.exists(os.path.join(folder, file)):
                os.replace(os.path.join(folder, file), os.path.join(old, file))
            if os.path.exists(os.path.join(aside, file)):
                os.replace(os.path.join(aside, file), os.path.join(folder, file))
    except BaseException:
        for file in os.listdir(old):
            os.replace(os.path.join(old, file), os.path.join(folder, file))
        raise


def table(folder, meta):
    """What was read, dropped, cut and written, a column a split."""
    splits = meta['splits'].values()
    lines = [('', *meta['splits']), ('read', *(s['read'] for s in splits))]
    for reason in sorted({reason for s in splits for reason in s['dropped']}):
        lines.append((f'dropped, {reason}', *(s['dropped'].get(reason, 0) for s in splits)))
    lines += [('kept', *(s['kept'] for s in splits)), ('groups', *(s['groups'] for s in splits))]
    for cut, what in (('prompts', 'prompts truncated'), ('responses', 'responses truncated'), ('tokens', 'tokens cut')):
        lines.append((what, *(s['truncated'][cut] for s in splits)))
    lines += [('tokens', *(s['tokens'] for s in splits)),
              ('mean tokens a group', *(round(s['tokens'] / s['groups'], 1) for s in splits)),
              ('longest group', *(s['longest'] for s in splits)),
              ('MB on disk', *(round(sum(os.path.getsize(os.path.join(folder, split + end)) for end in
                                         ('.bin', '.idx.npy')) / 1e6, 2) for split in meta['splits']))]
    text = [[cell if isinstance(cell, str) else f'{cell:,}' for cell in line] for line in lines]
    wide = [max(map(len, column)) for column in zip(*text)]
    return '\n'.join('  '.join([line[0].ljust(wide[0]), *map(str.rjust, line[1:], wide[1:])]) for line in text)


# -----------------------------------------------------------------------------
# the reader half: what sft.py, dpo.py and sample.py import

FORMAT = 1                  # of the files under data/<name>/; readers refuse another
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
            raise UserError(f"tokenizer '{name}' could not be loaded: {error} (offline? set TIKTOKEN_CACHE_DIR)") from None
    with open(os.path.join(folder, name)) as f:
        saved = json.load(f)
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved['tokens'])}
    return tiktoken.Encoding(saved['name'], pat_str=saved['pattern'], mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


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
    ids = tokenizer.encode_ordinary(prompt)
    return [tokenizer.eot_token] * (bos or not ids) + ids


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
    k: use only the first k responses of each group (k=1 on pairs: the chosen ones).
    Raises UserError where files are missing, cut short, altered or of another format.
    """
    def __init__(self, folder, split, k=None):
        self.meta = read_meta(folder)
        if split not in self.meta['splits']:
            raise UserError(f"{folder} has no split '{split}', only {', '.join(self.meta['splits'])}")
        self.folder, self.split, info = folder, split, self.meta['splits'][split]
        for path, key in ((f'{split}.bin', 'bin_sha256'), (f'{split}.idx.npy', 'idx_sha256')):
            path = os.path.join(folder, path)
            if not os.path.isfile(path):
                raise UserError(f'{path} is missing: run prepare_prefs.py again')
            if sha256_file(path) != info[key]:
                raise UserError(f'{path} is damaged: its content is not what meta.json records; run prepare_prefs.py again')
        self.tokens = np.memmap(os.path.join(folder, f'{split}.bin'), dtype=info['dtype'], mode='r')
        index = np.load(os.path.join(folder, f'{split}.idx.npy'), mmap_mode='r')
        self.K = k or index.shape[1] - 2
        assert self.K <= index.shape[1] - 2, f'{folder} {split} has {index.shape[1] - 2} responses a group, not {k}'
        self.index = index[:, :self.K + 2]                          # (N, K+2): prompt, responses, end
        self.lengths = self.index[:, -1] - self.index[:, 0]         # (N,) tokens of each group
        name = self.meta['tokenizer']       # the tokenizer's identity: models trained on another one do not fit
        self.vocabulary = sha256_file(os.path.join(folder, name))[:16] if name.endswith('.json') else name
        # what the training result depends on: the tokens and how many responses are used
        self.fingerprint = hashlib.sha256(f"{info['bin_sha256']} {info['idx_sha256']} {self.K}".encode()).hexdigest()

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
        """UserError where a model cannot read these ids or positions. vocabulary: of load_model."""
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


def read_meta(folder):
    """data/<name>/meta.json as a dict, or a UserError that says how to make it."""
    path = os.path.join(folder, 'meta.json')
    try:
        with open(path) as f:
            meta = json.load(f)
        assert meta['format'] == FORMAT, f"format {meta['format']}, this code reads {FORMAT}"
        assert isinstance(meta['splits'], dict) and isinstance(meta['tokenizer'], str)
        return meta
    except FileNotFoundError:
        raise UserError(f'{path} does not exist: run prepare_prefs.py with this config first') from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f'{path} cannot be read ({type(error).__name__}: {error}): run prepare_prefs.py again') from None


# -----------------------------------------------------------------------------
# packing: whole groups into rows of T tokens

def step_groups(n, batch_size, step, seed):
    """The groups of optimizer step `step`: int array. A pure function; each epoch visits each group once."""
    steps_per_epoch = -(-n // batch_size)
    epoch, within = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[within * batch_size:(within + 1) * batch_size]


def plan_rows(ids, lengths, T):
    """Groups into rows of at most T tokens, longest first, each to the fullest row that holds it (best fit).

    ids: (n,) group numbers; lengths: (n,) their tokens. Returns a list of lists of group numbers.
    """
    rows, room = [], []
    for i in np.argsort(-lengths, kind='stable'):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if fits:
            row = min(fits, key=room.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            room.append(T)
        rows[row].append(int(ids[i]))
        room[row] -= lengths[i]
    return rows


def micro_steps(rows, rank, world, at_once):
    """One rank's rows, `at_once` a micro-step: list of lists of rows.

    Every rank has as many micro-steps: empty rows fill up, so that no rank waits for another for ever.
    """
    mine = (rows + [[] for _ in range(-len(rows) % world)])[rank::world]
    return [mine[i:i + at_once] for i in range(0, len(mine), at_once)]


def row_shape(groups, row_tokens, device_type, compiled):
    """T, the tokens of a row, and how many rows a micro-step takes. Both set speed and memory, never results.

    row_tokens: the knob; 0 is 8192 on CUDA, where attention skips empty blocks, and 256 elsewhere, where it does
    not and short rows cost less; more where a group of `groups` (a list of Groups) is longer.
    """
    longest = max(int(g.lengths.max()) for g in groups)
    if 0 < row_tokens < longest:
        raise UserError(f'row_tokens={row_tokens} is less than the longest group, {longest} tokens: '
                        f'set at least {-(-longest // 128) * 128}, or 0')
    T = row_tokens or max(8192 if device_type == 'cuda' else 256, -(-longest // 128) * 128)
    return T, 1 if compiled or device_type == 'cuda' else max(1, 2048 // T)     # compiled: one shape


@dataclass
class Batch:
    """Packed rows on one device: G groups with S scored tokens in all.

    tokens, positions, group, part: (B, T). part 0 is the prompt, 1..K a response; padding is group -1.
    predictor: flat index into B*T of the hidden state that predicts target, the token; both (S,) and padded
    to a multiple of the head's chunk, so that shapes recur.
    response: (S,) row-major index into (G, K).
    ids: (G,) the groups' numbers in the split.
    """
    tokens: object
    positions: object
    group: object
    part: object
    predictor: object
    target: object
    response: object
    ids: object
    K: int

    def to(self, device):
        return Batch(*(getattr(self, f).to(device, non_blocking=True) for f in
                       ('tokens', 'positions', 'group', 'part', 'predictor', 'target', 'response')), self.ids, self.K)


def pack(groups, rows, T, chunk=512):
    """The Batch of `rows` (lists of group numbers of `groups`), on the CPU. S is a multiple of `chunk`."""
    import torch
    B, K = len(rows), groups.K
    tokens = np.zeros((B, T), np.int64)
    positions = np.zeros((B, T), np.int64)
    group = np.full((B, T), -1, np.int32)
    part = np.zeros((B, T), np.int32)
    predictor, target, response, ids = [], [], [], []
    for b, row in enumerate(rows):
        end = 0
        for i in row:
            prompt, *responses = groups[i]
            last = end + len(prompt) - 1                        # the prompt's last token, in this row
            at = end
            for k, piece in enumerate((prompt, *responses)):
                stop = at + len(piece)
                tokens[b, at:stop] = piece
                group[b, at:stop] = len(ids)
                part[b, at:stop] = k
                first = 0 if k == 0 else len(prompt)            # every response continues the prompt
                positions[b, at:stop] = np.arange(first, first + len(piece))
                if k:
                    predictor.append(b * T + np.concatenate(([last], np.arange(at, stop - 1))))
                    target.append(piece)
                    response.append(np.full(len(piece), len(ids) * K + k - 1))
                at = stop
            end = at
            ids.append(i)
        positions[b, end:] = np.arange(T - end) % max(1, positions.max())      # padding: anything in range
    S = sum(map(len, target))
    padding = np.zeros(-S % chunk if S else chunk, np.int64)
    predictor.append(padding)
    target.append(padding)
    response.append(padding[:0])
    flat = [torch.from_numpy(np.concatenate(a).astype(np.int64)) for a in (predictor, target, response)]
    return Batch(*map(torch.from_numpy, (tokens, positions, group, part)), *flat, ids, K)


# -----------------------------------------------------------------------------
# the run

def main(argv=None):
    started = time.time()
    cfg = config.load(Config, 'prepare', argv)
    print(config.show(cfg), flush=True)
    check(cfg)
    folder = os.path.join('data', cfg.name)
    try:
        on_hub = cfg.source and not os.path.exists(cfg.source)
        hub = load_dataset(cfg.source, cfg.data_dir) if on_hub else None
        inputs = hash_inputs(cfg, hub)
        why = why_remake(folder, inputs)
        if not why:
            print(f'{folder} is reused: it was made from the same inputs')
            return
        print(f'making {folder}: {why}', flush=True)
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.tmp-', dir=folder) as aside:
            meta = write_set(cfg, aside, hub, inputs)
            publish(aside, folder)
    except (OSError, ImportError) as error:
        raise UserError(f'{error}; {folder} is as it was') from None
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(f'a worker process was killed (out of memory?), try --workers=1; {folder} is as it was') from None
    except KeyboardInterrupt:
        raise UserError(f'interrupted; {folder} is as it was') from None
    finally:
        with contextlib.suppress(OSError):
            os.removedirs(folder)                   # only where it is empty: a failed run leaves nothing
    print(table(folder, meta))
    print(f'{folder} is made, {time.time() - started:.1f} s')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # clean up as after Ctrl-C
    main()
