"""
Anthropic HH with GPT-2 124M on one GPU: the same recipe as hh.py, an evening's experiment on one card.

    python prepare_prefs.py config/hh_small.py
    python sft.py config/hh_small.py
    python dpo.py config/hh_small.py
    python sample.py config/hh_small.py

Measured on one H200 with pairs of HH's lengths: 881 pairs/s and 6.8 GB (repro/README.md, "On a GPU"). At that speed
DPO's epoch takes 3 minutes. All other figures are ESTIMATES:
- 160,800 pairs, 2,513 steps of 64 an epoch, some 270 distinct tokens a pair: 43 M tokens.
- DPO: 8 FLOPs a weight and token and the output head, 1.2 GFLOP a token, 5e16 in all: at 30% of an H100's
  989 TFLOP/s 3 minutes, of an A100's 312 9 minutes, of an RTX 4090's 165 17 minutes. SFT about half of that.
- Memory with rows of 8,192 tokens: 4.9 GB, measured there. On an 8 GB card set --row_tokens=4096.
"""
name = 'hh_small'

prepare = dict(
    source='Anthropic/hh-rlhf',
    template='\n\nHuman: {prompt}\n\nAssistant:',
    max_length=512,
    max_prompt_length=256,
    truncation='paper',
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
