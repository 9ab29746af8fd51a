"""
UltraFeedback with GPT-2 XL on eight GPUs: Zephyr's recipe (arXiv 2310.16944) for 1.5B weights and 1,024 positions.

    python prepare_prefs.py config/ultrafeedback.py
    torchrun --standalone --nproc_per_node=8 sft.py config/ultrafeedback.py
    torchrun --standalone --nproc_per_node=8 dpo.py config/ultrafeedback.py
    python sample.py config/ultrafeedback.py --prompt='Why is the sky blue?'

Four models answered each instruction, and GPT-4 scored the answers: a pair is the best and one of the others. Rows
are conversations, which become '\\n\\nHuman: ...\\n\\nAssistant: ...'. row() below leaves out a pair that the scores
contradict.

Arithmetic, every figure an ESTIMATE, none measured yet:
- Data: 61,135 training pairs, 2,000 test pairs. With some 150 tokens of prompt and twice 280 of response: 700 a
  pair, 43 M tokens; what exceeds 1,024 in prompt and one response is cut (prepare says how many).
- Steps: 61,135 / 128 = 478 an epoch; DPO runs one (Zephyr: up to three, more over-fits).
- FLOPs of DPO: 12 GFLOP a token (see hh.py), 5e17 in all: at 40% of eight H100s' 989 TFLOP/s 3 minutes, of A100s
  9. Add the optimizer and the all-reduce, some 60 ms a step by repro/scale.py: 4 minutes on H100s.
- Memory a GPU: policy, gradients 6.2 GB each, AdamW's two averages 12.4, the reference 3.3: 28 GB; a row of 4,096
  tokens 11 GB: 39 GB and the compiler's buffers. On 40 GB cards set --activation_checkpointing=True, or
  --optimizer=rmsprop, which needs 6.2 GB less.
- To expect: the reward accuracy on test pairs of Zephyr, 7B, is near 0.75 (second-hand); GPT-2 XL knows far less,
  and a base model of 2019 will not follow instructions well after 61,135 of them. Nothing has been measured with
  this file yet.
"""
name = 'ultrafeedback'

prepare = dict(
    source='HuggingFaceH4/ultrafeedback_binarized',
    max_length=1024,
    max_prompt_length=512,
    truncation='paper',
)

sft = dict(
    init_from='gpt2-xl',
    train_on='chosen',              # Zephyr's had learned from UltraChat
    batch_size=128,
    epochs=1,
    learning_rate=2e-5,
    warmup_steps=48,
    row_tokens=4096,
    eval_interval=200,
    save_interval=500,
)

dpo = dict(
    beta=0.1,                       # the paper's; the Zephyr authors' later recipe has 0.01
    batch_size=128,
    epochs=1,
    optimizer='adamw',
    learning_rate=5e-7,
    schedule='linear',
    warmup_steps=48,                # a tenth
    row_tokens=4096,
    eval_interval=200,
    save_interval=500,
)

sample = dict(num_prompts=8, max_new_tokens=384, temperature=0.7)

MIN_GAP = 0.0       # of the scores, 1 to 10; with 1 only clear pairs are kept


def row(raw):
    """The row itself, a pair of conversations; None where its scores are too close, or one is missing and it counts."""
    scores = raw['score_chosen'], raw['score_rejected']
    if None in scores:
        return raw if MIN_GAP == 0 else None
    return raw if scores[0] - scores[1] >= MIN_GAP else None
