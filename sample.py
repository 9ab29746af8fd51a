"""Before and after, side by side: what the reference and the policy answer to the same prompts, with rewards.

    python sample.py config/reviews.py                                      # held-out prompts, true rewards, metrics
    python sample.py config/hh.py --prompt='How do I fold a fitted sheet?' --num_samples=3
    python sample.py config/hh.py --json | python repro/page.py compare.html            # the same, for a browser

The implicit reward of a response is beta log(after / before). A terminal with colours tints each token by its part.
Both models draw with the same random numbers, a batch at a time: another batch_size gives other samples.
"""
import json
import sys
from dataclasses import asdict, dataclass

import config
if __name__ == '__main__':
    config.check_flags(__file__, 'sample')          # before torch is imported, which takes seconds

import numpy as np

from config import In, Literal, need, one_line
from nanodpo import checkpoint, losses
from nanodpo.data import Groups, distinct_prompts
from nanodpo.folder import regular
from nanodpo.rollout import draw_responses, mean_and_error, read_reward, token_logps_of
from nanodpo.run import Worker
from nanodpo.rows import read_prompt
from nanodpo.sources import READERS, from_file, lines_of, stem_and_sort
from nanodpo.terminal import BOLD, DIM, colours, printable, say, styled, tinted
from nanodpo.text import can_render, load_tokenizer, prompt_ids, render, text_of, token_pieces

SIDES = 'before', 'after'


# --- the knobs ------------------------------------------------------------------------------------

@dataclass
class Config:
    name: str = 'reviews'                           # the experiment: reads data/<name> and out/<name>
    run_name: str = 'dpo'                           # the run that AFTER comes from
    before: str = ''                                # the reference: '' = AFTER's, or as init_from of dpo.py
    after: str = ''                                 # the policy: '' = out/<name>/<run_name>, or as above
    prompt: str = ''                                # one of your own; --prompt= is the empty one
    prompts_file: str = ''                          # many: a text file, one a line, or rows as prepare_prefs.py reads
    num_prompts: In[int, 'x >= 1'] = 8              # of val, distinct, in a fixed order: more extend fewer
    num_samples: In[int, 'x >= 1'] = 1              # of each prompt
    show: In[int, 'x >= 0'] = 8                     # samples to look at, of different prompts first
    max_new_tokens: In[int, 'x >= 1'] = 200         # of a response, if the end token does not come first
    temperature: In[float, 'x >= 0'] = 1.0          # 1 samples the model itself; 0 is greedy
    top_k: In[int, 'x >= 0'] = 0                    # draw from the k likeliest tokens only; 0 = all
    top_p: In[float, '0 < x <= 1'] = 1.0            # draw from the likeliest tokens up to this mass; 1 = all
    beta: In[float, 'x >= 0'] = 0.0                 # of the implicit reward; 0 = AFTER's, or 0.1 if that is of means
    reward: str = ''                                # a Python file: reward(prompts, responses), perhaps metrics
    batch_size: In[int, 'x >= 1'] = 64              # responses made at once
    json: bool = False                              # JSON lines alone on stdout: a sample each, then the summary
    seed: In[int, 'x >= 0'] = 1337                  # of the draws, the same for both models
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'  # auto = cuda where there is one, else cpu
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the matmuls; auto = bfloat16 on cuda


# --- prompts, and what is measured on the responses -----------------------------------------------

def read_prompts(path):
    """The prompts of a text file, one a line, or of a file of rows. Blank lines are skipped. UserErrors."""
    if stem_and_sort(path)[1] not in READERS:
        with one_line(f'prompts_file {path} cannot be read'), open(regular(path), encoding='utf-8-sig') as f:
            return [line.rstrip('\n') for line in filter(str.strip, lines_of(f))]
    prompts = []
    for place, row in from_file(path):
        with one_line(f'prompts_file {place}'):
            prompts.append(read_prompt(row))
    return prompts


def choose_prompts(cfg, val, tokenizer):
    """The prompts to answer, the user's own or distinct ones of val: lists of ids."""
    need('prompt' not in cfg.origin or not cfg.prompts_file, 'prompt and prompts_file are both set: keep one')
    prompts = distinct_prompts(val, cfg.num_prompts, seed=0)
    if 'prompt' in cfg.origin or cfg.prompts_file:
        own = read_prompts(cfg.prompts_file) if cfg.prompts_file else [cfg.prompt]
        template = val.meta['template']
        need(all(can_render(prompt, template) for prompt in own),
             f'{cfg.prompts_file}: a prompt has turns of tools, which the template does not write')
        prompts = [prompt_ids(tokenizer, render(prompt, template), template) for prompt in own]
    need(prompts, f'{cfg.prompts_file or val.folder} holds no prompt: set --prompt, or another --prompts_file')
    return prompts


def load(source, val, worker):
    """The model of a checkpoint, a folder or a name on the hub, ready to sample on the worker's device."""
    ours = source.startswith('out/') and not source.endswith('.pt')
    stage = 'sft' if source.endswith('/sft') else 'dpo'
    need(not ours or checkpoint.find(source), f'{source} holds no checkpoint: run {stage}.py first')
    return checkpoint.load_model(source, val, dropout=0.0).to(worker.device).eval()


def measure(cfg, groups, models, beta, score, tokenizer, worker):
    """A sample for each group [prompt, BEFORE's response, AFTER's]: {'prompt', 'sample': n, 'before', 'after'}."""
    before, after = (token_logps_of(model, groups, worker, 'log-probs') for model in models)
    prompts = [text_of(tokenizer, prompt) for prompt, *_ in groups]
    samples = [{'prompt': prompt, 'sample': i % cfg.num_samples} for i, prompt in enumerate(prompts)]
    for k, side in enumerate(SIDES):
        responses = [group[1 + k] for group in groups]
        texts = [text_of(tokenizer, ids) for ids in responses]
        scores = score(prompts, texts) if score else {}
        for i, ids in enumerate(responses):
            ratios = after[i][k] - before[i][k]                         # (tokens,)
            samples[i][side] = dict(
                text=texts[i], tokens=len(ids), ended=ids[-1] == tokenizer.eot_token,
                implicit_reward=beta * float(ratios.sum()),
                **{name: values[i] for name, values in scores.items()},
                pieces=token_pieces(tokenizer, ids, (beta * ratios).round(6).tolist()))
    return samples


def summarize(cfg, samples, beta):
    """{side: {name: {'mean', 'error'}}} of all samples. AFTER has its KL, too, unless a knob narrows its draws."""
    summary = dict(prompts=len(samples) // cfg.num_samples, samples=len(samples), beta=beta, config=asdict(cfg))
    for side in SIDES:
        names = [name for name in samples[0][side] if name not in ('text', 'pieces')]
        values = {name: [sample[side][name] for sample in samples] for name in names}
        if side == 'after' and cfg.temperature == 1 and not cfg.top_k and cfg.top_p == 1:
            values['kl'] = [reward / beta for reward in values['implicit_reward']]
        summary[side] = {name: mean_and_error(numbers, cfg.num_samples) for name, numbers in values.items()}
    return summary


# --- the terminal ---------------------------------------------------------------------------------

LABELS = {'tokens': 'tokens a response', 'ended': 'ended by end token', 'implicit_reward': 'implicit reward',
          'kl': 'KL from BEFORE, nats', 'true_reward': 'true reward'}


def scale(samples):
    """The reward of the strongest tint: above all but 2% of the tokens, or one token would pale the others."""
    pieces = [piece for sample in samples for side in SIDES for piece in sample[side]['pieces']]
    rewards = [reward for _, values in pieces for reward in values]
    return max(0.01, float(f'{np.quantile(np.abs(rewards), 0.98):.2g}')) if rewards else 1.0


def numbers_of(response):
    """What stands under a response: a list of strings."""
    true_reward = [f'true {response["true_reward"]:+.2f}'] if 'true_reward' in response else []
    tokens = f'{response["tokens"]} tokens' + ('' if response['ended'] else ', no end')
    return [f'implicit {response["implicit_reward"]:+.2f}', *true_reward, tokens]


def table_rows(summary, samples):
    """[label, BEFORE's mean, AFTER's] of every measure as text: ± its standard error, or in % if it is a share."""
    for name in filter(summary['after'].get, {**LABELS, **summary['after']}):       # in this order
        row = [printable(LABELS.get(name, name))]
        is_share = isinstance(samples[0]['after'].get(name), bool)
        for side in SIDES:
            mean, error = summary[side].get(name, {'mean': None, 'error': None}).values()
            number = '-' if mean is None else f'{mean:.1%}' if is_share else f'{mean:,.3f}'
            row.append(number if error is None or is_share else f'{number} ±{error:.3f}')
        yield row


def show(cfg, samples, summary):
    """Print the first cfg.show samples, other prompts before other samples of one, and the table of all."""
    shown = sorted(samples, key=lambda sample: sample['sample'])[:cfg.show]
    limit = scale(shown)
    for sample in shown:
        say(styled(f'\n{"-" * 60}\n{sample["prompt"].strip() or "(empty prompt)"}\n', BOLD))
        say(*(styled(side.upper(), BOLD) for side in SIDES))
        say(*(tinted(sample[side]['pieces'], limit) or styled('(nothing)') for side in SIDES))
        say(*(styled('  '.join(numbers_of(sample[side])), DIM) for side in SIDES))
    counted = 'samples: {samples:,}, prompts: {prompts:,}, ± a standard error'.format(**summary)
    say(styled(f'\n{"-" * 60}\n{counted}\n'))
    for label, *numbers in [['', 'BEFORE', 'AFTER'], *table_rows(summary, samples)]:
        say(styled(f'{label:21}' + ''.join(f'{number:>17}' for number in numbers)))
    if shown and colours():
        say(styled('a token is blue if AFTER finds it likelier than BEFORE, orange if less likely; ∎ is the end token'))


# --- draw, measure, sum up, show ------------------------------------------------------------------

def main(argv=None):
    cfg = config.load(Config, 'sample', argv)
    worker = Worker(cfg.device, cfg.dtype)
    score = read_reward(cfg.reward) if cfg.reward else None
    val = Groups(f'data/{cfg.name}', 'val')
    tokenizer = load_tokenizer(val.folder, val.meta['tokenizer'])
    prompts = choose_prompts(cfg, val, tokenizer)
    sources = dict(before=cfg.before or f'out/{cfg.name}/sft', after=cfg.after or f'out/{cfg.name}/{cfg.run_name}')
    after = load(sources['after'], val, worker)
    trained = after.record.get('config', {})
    if after.record.get('stage') == 'dpo' and not cfg.before:
        sources['before'] = trained.get('ref_from') or trained.get('init_from') or sources['before']
    before = load(sources['before'], val, worker)
    models = before, after
    reward = losses.LOSSES.get(trained.get('loss'), losses.LOSSES['dpo'])[0]
    of_mean = losses.takes(reward, 'means')                             # its beta is that of a mean over tokens
    beta = cfg.beta or (0.1 if of_mean else trained.get('beta') or 0.1)
    room = min(model.config.block_size for model in models)
    longest = room - min(cfg.max_new_tokens, room // 2)     # of a prompt

    notes = [f'sample on {worker.device.type}, implicit rewards with beta {beta:g}:\n{config.show(cfg)}']
    origin = after.record.get('origin', {})
    weights = origin.get('reference') or origin.get('init')
    if after.record.get('stage') == 'dpo' and weights != checkpoint.fingerprint(before):
        notes.append('note: AFTER was trained against other weights than BEFORE; KL and rewards are from BEFORE')
    if any(len(ids) > longest for ids in prompts):
        notes.append(f'note: prompts were cut from the left to {longest:,} tokens, to leave room to respond')
    say(styled('\n'.join(notes)), file=sys.stderr if cfg.json else sys.stdout)

    prompts = [ids[-longest:] for ids in prompts for _ in range(cfg.num_samples)]
    knobs = {key: getattr(cfg, key) for key in ('max_new_tokens', 'temperature', 'top_k', 'top_p')}
    with worker.autocast:
        responses = [draw_responses(model, prompts, val.meta, room, cfg.batch_size, cfg.seed, desc='responses', **knobs)
                     for model in models]
    samples = measure(cfg, list(zip(prompts, *responses)), models, beta, score, tokenizer, worker)
    summary = summarize(cfg, samples, beta) | dict(models=sources)
    if not cfg.json:
        return show(cfg, samples, summary)
    for line in [*samples, {'summary': summary}]:
        print(json.dumps(line))


if __name__ == '__main__':
    config.run(main)
