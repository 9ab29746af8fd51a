"""
TL;DR with GPT-2 XL on eight GPUs: the paper's summarisation task with its hyper-parameters (App. B).

    python prepare_prefs.py config/tldr.py
    torchrun --standalone --nproc_per_node=8 sft.py config/tldr.py
    torchrun --standalone --nproc_per_node=8 dpo.py config/tldr.py
    python sample.py config/tldr.py

The comparisons of Stiennon et al. (2020) on Reddit posts. OpenAI's own set on the hub is a loading script, which
`datasets` no longer runs. So the source is a copy in Parquet. Its layout and sizes are second-hand, from its card.
row() below makes 'SUBREDDIT: r/...\\nTITLE: ...\\nPOST: ...\\nTL;DR:' the prompt, and a response begins with a space.
It reads OpenAI's own files, too: --source=directory, with train.jsonl and validation.jsonl.

Arithmetic, every figure an ESTIMATE, none measured yet:
- Data: 92,534 training pairs. A post of some 350 tokens and two summaries of 35: 420 distinct tokens a pair, 39 M
  in all.
- Steps: 92,534 / 64 = 1,446 an epoch; DPO runs one.
- FLOPs of DPO: 12 GFLOP a token (see hh.py), 5e17 in all. At 40% of eight H100s' 989 TFLOP/s: 2.5 minutes; A100s:
  8. Add the optimizer and the all-reduce, some 60 ms a step by repro/scale.py: 4 minutes on H100s.
- Memory a GPU: as hh.py, 33 GB and the compiler's buffers. On one card of 24 GB: --init_from=gpt2-large for SFT
  (policy, gradients and RMSprop 3.1 GB each, reference 1.6, 4,096 tokens of activations 6.4: 17 GB).
- To expect: the paper reports a GPT-4 win rate of about 61% over the human summaries at temperature 0, for GPT-J,
  6B. Nothing has been measured with this file yet.
"""
name = 'tldr'

prepare = dict(
    source='CarperAI/openai_summarize_comparisons',
    max_length=640,
    max_prompt_length=512,
    truncation='paper',
    max_val=2000,                   # of 33,082: an evaluation costs as much as 16 steps
)

sft = dict(
    init_from='gpt2-xl',
    train_on='chosen',              # preferred-FT; the paper's model had learned from people's own summaries
    batch_size=64,
    epochs=1,
    learning_rate=1e-5,
    warmup_steps=150,
    row_tokens=4096,
    eval_interval=500,
    save_interval=1000,
)

dpo = dict(
    beta=0.5,
    batch_size=64,
    epochs=1,
    optimizer='rmsprop',
    learning_rate=1e-6,
    warmup_steps=150,
    schedule='constant',
    row_tokens=4096,
    eval_interval=500,
    save_interval=1000,
)

sample = dict(num_prompts=8, max_new_tokens=64, temperature=0.0)


def row(raw):
    """A pair, of the copy's layout or of OpenAI's; None for news articles, which have no post."""
    if 'summaries' not in raw:
        prompt = raw['prompt'].rstrip().removesuffix('TL;DR:').rstrip()
        sides = [raw[key].strip().removeprefix('TL;DR:') for key in ('chosen', 'rejected')]
    elif raw['info']['post']:
        info, summaries = raw['info'], raw['summaries']
        prompt = f"SUBREDDIT: r/{info['subreddit'] or ''}\nTITLE: {info['title'] or ''}\nPOST: {info['post']}"
        sides = [summaries[raw['choice']]['text'], summaries[1 - raw['choice']]['text']]
    else:
        return None
    chosen, rejected = (' ' + side.strip() for side in sides)
    return {'prompt': prompt + '\nTL;DR:', 'chosen': chosen, 'rejected': rejected}
