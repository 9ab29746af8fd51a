"""TODO"""
name = 'hh_cpu'

prepare = dict(
    source='Anthropic/hh-rlhf',
    data_dir='harmless-base',
    documents='chosen',             # prompt + chosen as text: a model from scratch must learn the language first
    tokenizer='bpe:4096',           # a small head; GPT-2's 50,257 tokens would cost more than all the layers
    template='\n\nHuman: {prompt}\n\nAssistant:',
    max_length=256,
    max_prompt_length=128,
)

sft = dict(
    init_from='scratch',
    train_on='documents',
    batch_size=32,
    epochs=6,
    learning_rate=2e-3,
    warmup_steps=20,
)

dpo = dict(
    beta=0.1,
    batch_size=32,
    epochs=1,
    learning_rate=2e-5,
    warmup_steps=10,
    eval_interval=11,
)

sample = dict(num_prompts=64, show=2, max_new_tokens=80)
