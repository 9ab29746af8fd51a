"""TODO(writer half): docstring with the commands to paste.
"""
import base64
import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np

import config
from config import In, Literal, UserError

# -----------------------------------------------------------------------------
# the knobs: WRITER HALF STANDS HERE


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


def rank_rows(rows, rank, world):
    """The rows of one rank, as many for every rank: empty rows fill up, so that no rank waits for ever."""
    rows = rows + [[] for _ in range(-len(rows) % world)]
    return rows[rank::world]


def row_length(groups, row_tokens, device_type):
    """T, the tokens of a row: the knob, or where it is 0 a default that holds the longest group of `groups`."""
    longest = max(int(g.lengths.max()) for g in groups)
    if row_tokens == 0:
        return max(8192 if device_type == 'cuda' else 1024, -(-longest // 128) * 128)
    if row_tokens < longest:
        raise UserError(f'row_tokens={row_tokens} is less than the longest group, {longest} tokens: '
                        f'set at least {-(-longest // 128) * 128}, or 0')
    return row_tokens


@dataclass
class Batch:
    """Packed rows on one device. S scored tokens (padded to a multiple of the head's chunk), G groups.

    tokens, positions, group, part: (B, T). part 0 is the prompt, 1..K a response; padding is group -1.
    predictor: (S,) flat index into B*T of the hidden state that predicts target, (S,) the token.
    response: (S,) row-major index into (G, K); G*K for what only pads S.
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
    pad = -S % chunk if S else chunk
    predictor.append(np.zeros(pad, np.int64))
    target.append(np.zeros(pad, np.int64))
    response.append(np.full(pad, len(ids) * K))
    flat = [torch.from_numpy(np.concatenate(a).astype(np.int64)) for a in (predictor, target, response)]
    return Batch(*map(torch.from_numpy, (tokens, positions, group, part)), *flat, ids, K)
