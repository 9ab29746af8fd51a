"""
Anthropic HH with GPT-2 XL on eight GPUs: the paper's dialogue task with its hyper-parameters (App. B).

    python prepare_prefs.py config/hh.py
    torchrun --standalone --nproc_per_node=8 sft.py config/hh.py
    torchrun --standalone --nproc_per_node=8 dpo.py config/hh.py
    python sample.py config/hh.py

Measured on one H200 with pairs of HH's lengths, by row_tokens: 16384 gives 125 pairs/s in 60 GB, 8192 gives 114 in 46
(repro/README.md, "On a GPU"). So DPO's epoch takes 21 to 24 minutes on the one. All other figures are ESTIMATES:
- Data: 160,800 training pairs, 8,552 test pairs. With some 270 distinct tokens a pair, prompt and two responses
  (the mean of a sample of harmless-base is printed by prepare; the helpful subsets are longer): 43 M tokens.
- Steps: 160,800 / 64 = 2,513 an epoch; DPO runs one.
- FLOPs of DPO: forward 2 and backward 4 of the policy, forward 2 of the reference, times 1.5 G weights a token:
  12 GFLOP, 5e17 in all. At 33% of eight H100s' 989 TFLOP/s that is 3 minutes, of A100s 10. A batch of 64 is small for 8
  GPUs: by repro/scale.py a step takes 120 ms on H100s, a third of it the optimizer. So the epoch takes 5 minutes.
- Memory a GPU: policy, gradients and RMSprop's average 6.2 GB each in float32, the reference 3.3 GB, its matrices in
  bfloat16: 22 GB; activations of a row of 4,096 tokens, about 34 * 1600 bytes a token and layer in bfloat16, 11 GB:
  33 GB, and the compiler's buffers. On 40 GB cards set --activation_checkpointing=True if that is too tight,
  --precompute_ref=True (the reference goes), or init_from='gpt2-large'.
- To expect: the authors report, for Pythia-2.8B, that the reward accuracy on test pairs levels off between 0.6 and
  0.7.
"""
name = 'hh'

prepare = dict(
    source='Anthropic/hh-rlhf',
    template='\n\nHuman: {prompt}\n\nAssistant:',   # what a plain question is put into; dialogues have it already
    max_length=512,
    max_prompt_length=256,
    truncation='paper',
)

sft = dict(
    init_from='gpt2-xl',
    train_on='chosen',              # preferred-FT, as the paper
    batch_size=64,
    epochs=1,
    learning_rate=1e-5,
    warmup_steps=150,
    row_tokens=4096,
    eval_interval=500,
    save_interval=1000,
)

dpo = dict(
    beta=0.1,
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

sample = dict(num_prompts=8, max_new_tokens=256, temperature=0.7)
