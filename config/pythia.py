"""
Pythia-2.8B on Anthropic HH: the paper's own model for its dialogue task, with its hyper-parameters (App. B).

    python prepare_prefs.py config/pythia.py
    torchrun --standalone --nproc_per_node=8 sft.py config/pythia.py
    torchrun --standalone --nproc_per_node=8 dpo.py config/pythia.py
    python sample.py config/pythia.py

Arithmetic, every figure an ESTIMATE, none measured yet:
- Data and steps as in hh.py: 160,800 pairs, some 43 M tokens, 2,513 steps of 64.
- FLOPs of DPO: 8 a weight and token, 2.65 G weights in the blocks and the head: 21 GFLOP a token, 9e17 in all.
  At 40% of eight H100s' 989 TFLOP/s: 5 minutes; of eight A100s' 312: 15.
- Memory a GPU: policy, gradients and RMSprop's average 11.1 GB each in float32, the reference 5.8 GB, its matrices
  in bfloat16: 39 GB. Activations of a row of 4,096 tokens, about 34 * 2560 bytes a token and layer: 11 GB. So it
  fits cards of 80 GB, not of 40. On 48 GB: --precompute_ref=True and --activation_checkpointing=True, 35 GB.
- To expect: the authors report that the reward accuracy on test pairs levels off between 0.6 and 0.7.
"""
name = 'pythia'

prepare = dict(
    source='Anthropic/hh-rlhf',
    tokenizer='EleutherAI/pythia-2.8b',
    template='\n\nHuman: {prompt}\n\nAssistant:',
    max_length=512,
    max_prompt_length=256,
)

sft = dict(
    init_from='EleutherAI/pythia-2.8b',
    train_on='chosen',
    batch_size=64,
    learning_rate=1e-5,
    warmup_steps=150,
    row_tokens=4096,
    eval_interval=500,
    save_interval=1000,
)

dpo = dict(
    beta=0.1,
    batch_size=64,
    learning_rate=1e-6,
    warmup_steps=150,
    row_tokens=4096,
    eval_interval=500,
    save_interval=1000,
)

sample = dict(num_prompts=8, max_new_tokens=256, temperature=0.7)
