"""Before and after, side by side: what the reference and the policy answer to the same prompts, with rewards.

    python sample.py config/reviews.py                                      # held-out prompts, true rewards, metrics
    python sample.py config/hh.py --temperature=0.7 --num_prompts=250 --show=4
    python sample.py config/hh.py --prompt='How do I fold a fitted sheet?' --num_samples=3
    python sample.py config/hh.py --prompts_file=mine.txt --json > samples.jsonl
    python sample.py config/hh.py --json | python repro/page.py compare.html            # the same, for a browser

Reads data/<name>/ for the tokenizer, the template and the prompts of val. BEFORE is out/<name>/sft, AFTER is
out/<name>/dpo. Under each response stand its implicit reward, beta log(after / before), and its true one if there
is a reward file. A terminal with colours tints each token by its share of the implicit reward. Both models draw
with the same random numbers, a batch at a time: another batch_size gives other samples.
"""
import itertools
import json
import math
import signal
import sys
from dataclasses import asdict, dataclass

import numpy as np

import config
from config import In, Literal, UserError, need
from nanodpo import checkpoint, losses
from nanodpo.data import Groups, distinct_prompts
from nanodpo.rollout import draw_responses, mean_and_error, read_reward, token_logps_of
from nanodpo.run import Worker
from nanodpo.sources import read_prompt
from nanodpo.terminal import BOLD, DIM, colours, say, side_by_side, styled, terminal_width, tinted
from nanodpo.text import load_tokenizer, printable, prompt_ids, text_of, token_pieces

SIDES = {'before': 'sft', 'after': 'dpo'}           # the two models, each with the stage that trained it


# ----------------------------------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # the experiment: reads data/<name> and out/<name>
    before: str = ''                                # the reference: '' = out/<name>/sft, or as init_from of dpo.py
    after: str = ''                                 # the policy: '' = out/<name>/dpo, or as above
    prompt: str = ''                                # one of your own; --prompt= is the empty one
    prompts_file: str = ''                          # many: a text file, one a line, or .jsonl with "prompt"
    num_prompts: In[int, 'x >= 1'] = 8              # of val, distinct, in a fixed order: more extend fewer
    num_samples: In[int, 'x >= 1'] = 1              # of each prompt
    show: In[int, 'x >= 0'] = 8                     # samples to look at, of different prompts first
    max_new_tokens: In[int, 'x >= 1'] = 200         # of a response, if the end token does not come first
    temperature: In[float, 'x >= 0'] = 1.0          # 1 samples the model itself; 0 is greedy
    top_k: In[int, 'x >= 0'] = 0                    # draw from the k likeliest tokens only; 0 = all
    top_p: In[float, '0 < x <= 1'] = 1.0            # draw from the likeliest tokens up to this mass; 1 = all
    beta: In[float, 'x >= 0'] = 0.0                 # of the implicit reward; 0 = AFTER's own, else 0.1
    reward: str = ''                                # a Python file with reward(prompts, responses) -> numbers; it may
                                                    # have metrics(prompts, responses) -> {name: values}
    batch_size: In[int, 'x >= 1'] = 64              # responses made at once
    json: bool = False                              # JSON lines alone on stdout: a sample each, then the summary
    seed: In[int, 'x >= 0'] = 1337                  # of the draws, the same for both models
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'  # auto = cuda where there is one, else cpu
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the matmuls; auto = bfloat16 on cuda


# ----------------------------------------------------------------------------------------------------
# prompts and models

def read_prompts(path):
    """The prompts of a text file, one a line, or of a .jsonl. Blank lines are skipped. UserErrors."""
    prompts, number = [], 0
    try:
        with open(path, encoding='utf-8-sig') as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    prompts.append(read_prompt(json.loads(line)) if path.endswith('.jsonl') else line.rstrip('\n'))
    except OSError as error:
        raise UserError(f'prompts_file {path} cannot be read: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise UserError(f'prompts_file {path} is not UTF-8: {error.reason} at byte {error.start}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'prompts_file {path} line {number} is not an object with a "prompt", a string or messages: '
                        f'{error}') from None
    need(prompts, f'prompts_file {path} holds no prompt')
    return prompts


def choose_prompts(cfg, val, tokenizer):
    """The prompts to answer, the user's own or distinct ones of val: lists of ids."""
    need('prompt' not in cfg.origin or not cfg.prompts_file, 'prompt and prompts_file are both set: keep one')
    if 'prompt' in cfg.origin or cfg.prompts_file:
        own = read_prompts(cfg.prompts_file) if cfg.prompts_file else [cfg.prompt]
        return [prompt_ids(tokenizer, prompt, val.meta['template']) for prompt in own]
    prompts = distinct_prompts(val, cfg.num_prompts, seed=0)
    need(prompts, f'{val.folder} has no prompts in val: set --prompt or --prompts_file')
    return prompts


def load(cfg, side, val, device):
    """The model BEFORE or AFTER, ready to sample from. UserErrors."""
    stage = SIDES[side]
    folder = f'out/{cfg.name}/{stage}'
    hint = f' (its own out/{cfg.name}/sft samples BEFORE alone)' if side == 'after' else ''
    need(getattr(cfg, side) or checkpoint.find(folder),
         f'{folder} holds no checkpoint: run {stage}.py with this config first, or set --{side}{hint}')
    return checkpoint.load_model(getattr(cfg, side) or folder, val, dropout=0.0).to(device).eval()


def notes(cfg, worker, models, prompts, beta, longest, room):
    """Lines to say before anything is drawn."""
    yield f'sample on {worker.device.type}, implicit rewards with beta {beta:g}:\n{config.show(cfg)}'
    before, after = models
    origin = after.record.get('origin', {})
    reference = origin.get('reference') or origin.get('init')
    if after.record.get('stage') == 'dpo' and reference != checkpoint.fingerprint(before):
        yield 'note: AFTER was trained against other weights than BEFORE: rewards and KL are relative to BEFORE'
    if cut := sum(len(ids) > longest for ids in prompts):
        yield (f'note: {cut:,} of the prompts exceed {longest:,} tokens and were cut from the left, to leave room in '
               f'the {room:,} positions of the model')


# ----------------------------------------------------------------------------------------------------
# what is measured on responses

def measure(cfg, groups, models, beta, score, tokenizer, worker):
    """A sample for each group [prompt, BEFORE's response, AFTER's]: {'prompt', 'sample': n, 'before', 'after'}.

    A side is {'text', 'tokens', 'ended', 'implicit_reward', the results of `score`, 'pieces'}. Its pieces are those
    of token_pieces, with the implicit reward of each token. score: see read_reward; None for none.
    """
    before, after = (token_logps_of(model, groups, worker, f'log-probs {side}')
                     for model, side in zip(models, SIDES))
    prompts = [text_of(tokenizer, prompt) for prompt, *_ in groups]
    samples = [{'prompt': prompt, 'sample': i % cfg.num_samples} for i, prompt in enumerate(prompts)]
    for k, side in enumerate(SIDES):
        texts = [text_of(tokenizer, responses[k]) for _, *responses in groups]
        scores = score(prompts, texts) if score else {}
        for i, (_, *responses) in enumerate(groups):
            ids = responses[k]
            ratios = after[i][k] - before[i][k]                         # (tokens,)
            samples[i][side] = {
                'text': texts[i], 'tokens': len(ids), 'ended': ids[-1] == tokenizer.eot_token,
                'implicit_reward': beta * float(ratios.sum()),
                **{name: values[i] for name, values in scores.items()},
                'pieces': token_pieces(tokenizer, ids, (beta * ratios).round(6).tolist())}
    return samples


def summarize(cfg, samples, beta):
    """{side: {name: {'mean', 'error'}}} of what `measure` gives, and of AFTER's KL; and how it was drawn."""
    note = 'the KL is an estimate, the mean of log(AFTER / BEFORE) over the samples of AFTER'
    if cfg.temperature != 1 or cfg.top_k or cfg.top_p < 1:
        note = ('the KL row is not the KL here, which is that mean over samples at temperature 1 without top_k and '
                f'top_p: these were drawn at temperature={cfg.temperature:g}, top_k={cfg.top_k}, top_p={cfg.top_p:g}')
    summary = {'prompts': len(samples) // cfg.num_samples, 'samples': len(samples), 'beta': beta, 'note': note,
               'config': asdict(cfg)}
    for side in SIDES:
        names = [name for name in samples[0][side] if name not in ('text', 'pieces')]
        values = {name: [sample[side][name] for sample in samples] for name in names}
        if side == 'after':
            values['kl'] = [reward / beta for reward in values['implicit_reward']]
        summary[side] = {name: mean_and_error(numbers, cfg.num_samples) for name, numbers in values.items()}
    return summary


# ----------------------------------------------------------------------------------------------------
# the terminal

LABELS = {'tokens': 'tokens a response', 'ended': 'ended by end token', 'implicit_reward': 'implicit reward',
          'kl': 'KL from BEFORE, nats', 'true_reward': 'true reward'}


def scale(samples):
    """The reward of the strongest tint: above all but 2% of the tokens, or one token would pale the others."""
    sizes = []
    for sample, side in itertools.product(samples, SIDES):
        for _, rewards in sample[side]['pieces']:
            sizes += [abs(reward) for reward in rewards if math.isfinite(reward)]
    return max(0.01, float(f'{np.quantile(sizes, 0.98):.2g}')) if sizes else 1.0


def numbers_of(response):
    """What stands under a response: a list of strings."""
    numbers = [f'implicit {response["implicit_reward"]:+.2f}']
    if 'true_reward' in response:
        numbers.append(f'true {response["true_reward"]:+.2f}')
    return numbers + [f'{response["tokens"]} tokens' + ('' if response['ended'] else ', no end')]


def column(side, response, limit):
    """A title, the response and its numbers: styled texts."""
    text = tinted(response['pieces'], limit) if colours() else styled(printable(response['text']).strip())
    return [styled(side.upper(), BOLD), text or styled('(nothing)'), styled('  '.join(numbers_of(response)), DIM)]


def table_rows(summary, samples):
    """[label, BEFORE's mean, AFTER's] of every measure as text: ± its standard error, or in % if it is a share."""
    names = {**LABELS, **summary['after']}          # in this order
    for name in [name for name in names if name in summary['after']]:
        row = [printable(LABELS.get(name, name))]
        is_share = all(type(sample['after'].get(name)) is bool for sample in samples)
        for side in SIDES:
            mean, error = summary[side].get(name, {'mean': None, 'error': None}).values()
            number = '-' if mean is None else f'{mean:.1%}' if is_share else f'{mean:,.3f}'
            row.append(number if error is None or is_share else f'{number} ±{error:.3f}')
        yield row


def table(rows, width):
    """The rows as lines, without the errors where there is no room for them."""
    room = 17 if width >= 60 else 9
    lines = []
    for label, *numbers in [['', 'BEFORE', 'AFTER'], *rows]:
        if width < 60:
            numbers = [number.partition(' ')[0] for number in numbers]
        lines.append(f'{label:21}' + ''.join(f'{number:>{room}}' for number in numbers))
    return '\n'.join(lines)


def show(cfg, samples, summary):
    """Print the first cfg.show samples, other prompts before other samples of one, and the table of all."""
    width = terminal_width()
    shown = sorted(samples, key=lambda sample: sample['sample'])[:cfg.show]
    limit = scale(shown)
    for sample in shown:
        say(f'\n{"-" * width}\n{sample["prompt"].strip() or "(empty prompt)"}\n', BOLD)
        print('\n'.join(side_by_side(*(column(side, sample[side], limit) for side in SIDES), width)))
    errors = ', ± a standard error' if width >= 60 else ''
    say(f'\n{"-" * width}\nsamples: {summary["samples"]:,}, prompts: {summary["prompts"]:,}{errors}\n')
    say(table(table_rows(summary, samples), width))
    say(summary['note'])
    if shown and colours():
        say('a token is blue if AFTER finds it likelier than BEFORE does, orange if less likely; ∎ is the end token')


# ----------------------------------------------------------------------------------------------------
# draw, measure, sum up, show

def main(argv=None):
    cfg = config.load(Config, 'sample', argv)
    worker = Worker(cfg.device, cfg.dtype)
    score = read_reward(cfg.reward) if cfg.reward else None
    val = Groups(f'data/{cfg.name}', 'val')
    tokenizer = load_tokenizer(val.folder, val.meta['tokenizer'])
    prompts = choose_prompts(cfg, val, tokenizer)
    models = [load(cfg, side, val, worker.device) for side in SIDES]
    trained = models[1].record.get('config', {})
    of_tokens = trained.get('loss') in losses.LOSSES and losses.needs(trained['loss'], 'means')    # of their mean
    beta = cfg.beta or (0.1 if of_tokens else trained.get('beta', 0.1))
    room = min(model.config.block_size for model in models)
    longest = room - min(cfg.max_new_tokens, room // 2)     # of a prompt
    for line in notes(cfg, worker, models, prompts, beta, longest, room):
        say(line, file=sys.stderr if cfg.json else sys.stdout)

    prompts = [ids[-longest:] for ids in prompts for _ in range(cfg.num_samples)]
    knobs = {key: getattr(cfg, key) for key in ('max_new_tokens', 'temperature', 'top_k', 'top_p')}
    with worker.autocast:
        responses = [draw_responses(model, prompts, val.meta, room, cfg.batch_size, cfg.seed, desc=f'responses {side}',
                                    **knobs) for model, side in zip(models, SIDES)]
    samples = measure(cfg, list(zip(prompts, *responses)), models, beta, score, tokenizer, worker)
    summary = summarize(cfg, samples, beta)
    if cfg.json:
        for line in [*samples, {'summary': summary}]:
            print(json.dumps(line))
    else:
        show(cfg, samples, summary)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')                # a terminal that is not UTF-8
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it quietly
    config.run(main)
