"""Byte-level BPE, learned from the text of an experiment: the tokenizers 'bytes' and 'bpe:N'."""
import base64
import collections
import heapq
import json
import os

from tqdm import tqdm

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"       # GPT-2's


def make_tokenizer(name, texts, folder):
    """Write 'bytes' or 'bpe:N', learned from the strings `texts`, to tokenizer.json in `folder`."""
    words = collections.Counter()
    size = 256
    if name != 'bytes':
        import regex                                # a dependency of tiktoken's; Python's re knows no \p{L}
        size = int(name.removeprefix('bpe:')) - 1   # the end token is one of N
        for text in tqdm(texts, 'counting words', unit=' texts', disable=None, leave=False):
            words.update(regex.findall(PATTERN, text))
    tokens = train_bpe({word.encode(): count for word, count in words.items()}, size)
    saved = {'name': name, 'pattern': PATTERN, 'tokens': [base64.b64encode(token).decode() for token in tokens]}
    with open(os.path.join(folder, 'tokenizer.json'), 'w') as f:
        json.dump(saved, f)


def train_bpe(words, size):
    """Byte-level BPE of words, {bytes: count}: at most `size` tokens in rank order, list of bytes."""
    tokens = [bytes([b]) for b in range(256)]
    weights = list(words.values())
    words = [word.decode('latin-1') for word in words]      # a token is the character of its rank
    counts = collections.Counter()                          # of each pair, in all words
    places = collections.defaultdict(set)                   # the words that may hold it
    changed = set()                                         # the pairs whose new count is not in the heap
    heap = []

    def count(i, sign):
        for pair in zip(words[i], words[i][1:]):
            counts[pair] += sign * weights[i]
            places[pair].add(i)
            changed.add(pair)
    for i in range(len(words)):
        count(i, 1)
    while len(tokens) < size and (heap or changed):
        for pair in changed:
            heapq.heappush(heap, (-counts[pair], pair))
        changed.clear()
        frequency, (a, b) = heapq.heappop(heap)             # the highest; a tie goes to the pair of lower ranks
        if frequency == -counts[a, b] < 0:                  # it is not out of date
            new = chr(len(tokens))
            tokens.append(tokens[ord(a)] + tokens[ord(b)])  # never a token twice: the same bytes always merge alike
            for i in places.pop((a, b)):
                count(i, -1)
                words[i] = words[i].replace(a + b, new)
                count(i, 1)
    return tokens
