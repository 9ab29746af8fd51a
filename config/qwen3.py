"""
Qwen3-0.6B, aligned on UltraFeedback on one GPU: a chat model of today with its own tokenizer and chat template.

    python prepare_prefs.py config/qwen3.py
    python dpo.py config/qwen3.py
    python sample.py config/qwen3.py

Arithmetic, every figure an ESTIMATE, none measured yet:
- Data: 61,135 pairs of conversations; some 800 distinct tokens a pair, prompt and two responses: 49 M tokens.
- Steps: 61,135 / 64 = 956.
- FLOPs: 8 a weight and token, of 0.44 G weights in the blocks, and the head of 0.16 G on the responses:
  4.5 GFLOP a token, 2.2e17 in all. At 35% of an H100's 989 TFLOP/s: 11 minutes.
- Memory: policy, gradients and RMSprop's average 2.4 GB each in float32, the reference 1.5 GB, its matrices in
  bfloat16; activations of a row of 8,192 tokens some 17 GB. 26 GB in all, and 43 with the 16,384 tokens that 80 GB
  cards take. On a 24 GB card set --row_tokens=4096 or --activation_checkpointing=True.

The chat template is rendered with its defaults: no system turn is added, and no thinking tags. A response follows
the assistant's header as it is written in the data, and ends with <|im_end|>.
"""
name = 'qwen3'

prepare = dict(
    source='HuggingFaceH4/ultrafeedback_binarized',
    tokenizer='Qwen/Qwen3-0.6B',
    max_length=1024,
    max_prompt_length=512,
)

dpo = dict(
    init_from='Qwen/Qwen3-0.6B',
    beta=0.1,
    batch_size=64,
    learning_rate=1e-6,
    warmup_steps=95,                # a tenth of the run
    schedule='linear',
    eval_interval=200,
)

sample = dict(before='Qwen/Qwen3-0.6B', max_new_tokens=256, temperature=0.7)
