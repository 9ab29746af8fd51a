"""
Stanford Human Preferences with GPT-2 124M on one GPU: which of two comments on a Reddit post got more votes.

    python prepare_prefs.py config/shp.py
    python sft.py config/shp.py
    python dpo.py config/shp.py
    python sample.py config/shp.py

There is a data_dir for each of 18 subreddits: --data_dir=askbaking. Sizes are second-hand, from the set's card. As the
DPO authors' code does, row() below keeps only pairs in which one comment has at least twice the other's score.

Arithmetic, every figure an ESTIMATE, none measured yet:
- Data: at most 348,718 training pairs; prepare says how many have a clear vote. With some 450 tokens of post and
  comments a pair: at most 157 M tokens.
- Steps: at most 348,718 / 64 = 5,449 an epoch; DPO runs one.
- FLOPs of DPO: 1.2 GFLOP a token (see hh_small.py), 1.9e17 in all: at 30% of an H100's 989 TFLOP/s 11 minutes, of an
  A100's 312 34 minutes, of an RTX 4090's 165 an hour. SFT about half of that.
- Memory: as hh_small.py, 6 GB. On an 8 GB card set --row_tokens=4096.
"""
name = 'shp'

prepare = dict(
    source='stanfordnlp/SHP',
    max_length=512,
    max_prompt_length=256,
    truncation='paper',
    max_val=2000,                   # of 18,436: an evaluation costs as much as 16 steps
)

sft = dict(
    init_from='gpt2',
    train_on='chosen',
    batch_size=64,
    epochs=1,
    learning_rate=2e-5,
    warmup_steps=150,
    eval_interval=500,
    save_interval=1000,
)

dpo = dict(
    beta=0.1,
    batch_size=64,
    epochs=1,
    learning_rate=1e-6,
    warmup_steps=150,
    eval_interval=500,
    save_interval=1000,
)

sample = dict(num_prompts=8, max_new_tokens=256, temperature=0.7)


def row(raw):
    """A pair with the post as a turn of the user; None where the vote is not clear. labels: 1 if A is preferred."""
    if raw['score_ratio'] < 2:
        return None
    comments = [raw['human_ref_B'], raw['human_ref_A']]
    return {'prompt': [{'role': 'user', 'content': raw['history']}],
            'chosen': comments[raw['labels']], 'rejected': comments[1 - raw['labels']]}
