"""
The paper's controlled sentiment (section 6.1, appendix C.1) as published: GPT-2 large continues the first words of a
film review, and a sentiment classifier says how positive it is. With a network and one GPU:

    python prepare_prefs.py config/imdb.py                  # reviews as [2 to 8 tokens | the rest]
    python sft.py config/imdb.py                            # one epoch of them
    python repro/draw_prefs.py --name=imdb_pairs --source=data/imdb --policy=out/imdb/sft --reward=config/imdb.py \\
        --num_samples=4 --pairing=all --max_new_tokens=64 --batch_size=256
    python dpo.py config/imdb.py --name=imdb_pairs --init_from=out/imdb/sft
    python sample.py config/imdb.py --name=imdb_pairs --before=out/imdb/sft

The third and fourth may be given to torchrun --standalone --nproc_per_node=8. The classifier needs `pip install
transformers`; IMDB_CLASSIFIER=name-or-directory takes another one than the paper's. Then set another --name, too: a set
is known by the bytes of this file, not by the classifier's. For the frontier repeat the fourth with --beta=0.05, 1 and
5, each with a copy of data/imdb_pairs under its own --name.

Arithmetic, every figure an ESTIMATE, none measured yet:
- SFT: 25,000 reviews / 64 = 391 steps. Some 290 tokens each, cut at 512: 7 M tokens times 6 * 774 M weights, 3e16
  FLOPs; at 40% of an H100's 989 TFLOP/s 90 seconds, of an A100's 312 5 minutes.
- Pairs: 25,000 prefixes (fewer are distinct) and 2,000 of the test reviews, 4 responses each: 108,000 of 64 tokens, in
  422 batches of 256, 64 steps of some 30 ms: 14 minutes; the classifier, 355 M weights, another one. 6 pairs a prefix:
  150,000.
- DPO: 150,000 / 64 = 2,344 steps of 64 * 133 tokens: 20 M tokens times 8 * 774 M, 1.2e17 FLOPs: 5 minutes on an H100,
  17 on an A100.
- Memory: policy, gradients and RMSprop's average 3.1 GB each, the reference 1.6; activations of a row of 4,096 tokens,
  34 * 1280 bytes a token and layer, 6.4 GB: 18 GB. On a 16 GB card set --row_tokens=1024, or --init_from=gpt2-medium
  in SFT.
- To expect: in the paper's figure 2 DPO's rewards, the mean of p(positive), lie above PPO's at every KL. Nothing has
  been measured with this file yet.

The paper does not say how long responses are; 64 tokens are ours. Nothing but the classifier's p(positive) of prefix
and response makes the pairs: of two responses the likelier positive one is chosen.
"""
import functools
import hashlib
import os
import re
import sys
import unicodedata

from config import UserError, need

name = 'imdb'

prepare = dict(
    source='stanfordnlp/imdb',
    max_length=512,
    max_prompt_length=16,
    truncation='paper',
    max_val=2000,
)

sft = dict(
    init_from='gpt2-large',
    train_on='chosen',
    batch_size=64,
    epochs=1,
    learning_rate=1e-5,
    warmup_steps=40,
    row_tokens=4096,
    eval_interval=100,
)

dpo = dict(
    beta=0.1,                       # the paper: 0.05, 0.1, 1 and 5
    batch_size=64,
    epochs=1,
    optimizer='rmsprop',
    learning_rate=1e-6,
    warmup_steps=150,
    schedule='constant',
    row_tokens=4096,
    eval_interval=500,
    save_interval=500,
)

sample = dict(reward=__file__, num_prompts=256, show=8, max_new_tokens=64)

SEED = 1337                         # of the prefixes' lengths
CLASSIFIER = os.environ.get('IMDB_CLASSIFIER') or 'siebert/sentiment-roberta-large-english'       # the paper's


# ----------------------------------------------------------------------------------------------------
# reviews to demonstrations

@functools.cache
def tokenizer():
    import tiktoken
    return tiktoken.get_encoding('gpt2')


def row(raw):
    """A review's first 2 to 8 tokens, as many as SEED and its text decide, and the rest; None if it is too short."""
    text = re.sub(r'\s*<br />\s*', '\n', raw['text']).strip()
    draw = int.from_bytes(hashlib.sha256(f'{SEED} {text}'.encode()).digest()[:8], 'big')
    ids = tokenizer().encode_ordinary(text[:500])
    for i in range(7):
        n = 2 + (draw + i) % 7      # the next one, if this one does not end a word
        prefix = tokenizer().decode_bytes(ids[:n]).decode(errors='ignore')
        rest = text[len(prefix):]
        whole = prefix and rest.strip() and begins_word(prefix[-1], rest[0])
        if whole and tokenizer().encode_ordinary(prefix) == ids[:n]:
            return {'prompt': prefix, 'completion': rest}
    return None


def begins_word(before, after):
    """Whether a word, with its space, or a line begins between two characters."""
    closes = unicodedata.category(before) in ('Po', 'Pe', 'Pf') and before not in '.,\'"’@#%&*/\\'
    return after == ' ' or before in '\n\r\t' or closes and unicodedata.category(after)[0] not in 'MC'


# ----------------------------------------------------------------------------------------------------
# the reward

@functools.cache
def classifier():
    """The classifier, its tokenizer and the number of its positive class."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f'{error}: the sentiment classifier needs it (pip install transformers)') from None
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    from nanodpo.sources import hub_answers
    offline = not hub_answers()         # then what is here or nothing, no minutes of retries
    try:
        words = transformers.AutoTokenizer.from_pretrained(CLASSIFIER, local_files_only=offline)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(CLASSIFIER, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise UserError(f'the classifier {CLASSIFIER} cannot be loaded (no network? set IMDB_CLASSIFIER to a '
                        f'directory): {str(error)[:300]}') from None
    labels = model.config.id2label
    positive = [i for i, label in labels.items() if label.lower() in ('positive', 'pos')]
    need(len(positive) == 1, f'the classifier {CLASSIFIER} has no class POSITIVE, only {", ".join(labels.values())}')
    return model.to('cuda' if torch.cuda.is_available() else 'cpu').eval(), words, positive[0]


def reward(prompts, responses):
    """The probability that prompt + response is positive, by the classifier."""
    import torch
    from tqdm import tqdm
    model, words, positive = classifier()
    texts = [prompt + response for prompt, response in zip(prompts, responses)]
    longest = min(words.model_max_length, 512)
    probabilities = []
    with torch.no_grad():
        for i in tqdm(range(0, len(texts), 64), 'classifier', unit=' batches', disable=None, leave=False):
            batch = words(texts[i:i + 64], padding=True, truncation=True, max_length=longest, return_tensors='pt')
            logits = model(**batch.to(model.device)).logits.double()        # in float32 the best would tie at 1
            probabilities += logits.softmax(-1)[:, positive].tolist()
    return probabilities
