"""Before and after, side by side: responses of the reference and of the policy to the same prompts, with their rewards.

    python sample.py config/reviews.py                                      # held-out prompts; true reward and metrics
    python sample.py config/hh.py --temperature=0.7 --num_prompts=250 --show=4
    python sample.py config/hh.py --prompt='How do I fold a fitted sheet?' --num_samples=3
    python sample.py config/hh.py --prompts_file=mine.txt --json > samples.jsonl

Reads data/<name>/ for the tokenizer, the template and the prompts of val, and the weights BEFORE (out/<name>/sft) and
AFTER (out/<name>/dpo). Under each response stands its implicit reward, beta log(after / before), and where `reward`
names a file its true one; a table sums up all samples. Both models draw with the same random numbers, so they differ
only where their distributions do. The numbers come in batches: another `batch_size` gives other samples.
"""
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import unicodedata
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import config
from config import In, Literal, UserError
from model import CheckpointError, find_checkpoints, fingerprint, load_model, packed_mask, token_logps
from prepare_prefs import (Groups, Sampled, distinct_prompts, load_tokenizer, packed_batches, parse_json, plan_rows, prompt_ids,
                           read_prompt, read_reward, row_limit, text_of)


@torch.no_grad()
def response_logps(model, groups, device, autocast):
    """Log-probability of every response given its prompt, nats, summed over its tokens: (N, K) float64."""
    N, groups = len(groups), Sampled(groups)
    rows = plan_rows(np.arange(N), groups.lengths, 1, row_limit([groups], 0, device.type))[0]
    logps = torch.zeros(N, groups.K, dtype=torch.float64)
    for batch in tqdm(packed_batches(groups, rows, device), total=len(rows), desc='log-probs', disable=None):
        with autocast:
            mask = packed_mask(batch.group, batch.part, batch.cuts)
            states = model(batch.tokens, batch.positions, mask, batch.predictor)                    # (S, C)
            scored = token_logps(states, model.wte.weight, batch.target)[:len(batch.response)]      # (S,)
        sums = scored.new_zeros(len(batch.ids) * batch.K).index_add(0, batch.response, scored)
        logps[batch.ids] = sums.view(-1, batch.K).cpu().double()
    return logps


def mean_and_error(values, num_samples):
    """{'mean', 'error'}: the standard error, None for one value. values: each prompt's num_samples side by side.

    Samples of one prompt are alike, so with several prompts the error is that of the mean over prompts.
    """
    rows = np.array(values, dtype=np.float64).reshape(-1, num_samples)
    means = rows.mean(1) if len(rows) > 1 else rows[0]
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else None
    return dict(mean=float(means.mean()), error=error if error is None else float(error))


# -----------------------------------------------------------------------------
# the knobs

@dataclass
class Config:
    name: str = 'reviews'                           # of the experiment: reads data/<name> and out/<name>
    before: str = ''                                # the reference: '' = out/<name>/sft, a folder or .pt of ours, a
                                                    # GPT-2 name on the hub, or a directory in its layout
    after: str = ''                                 # the policy: '' = out/<name>/dpo, or as above
    prompt: str = ''                                # one prompt of your own; '' on the command line is the empty prompt
    prompts_file: str = ''                          # many: a text file, one a line, or .jsonl with "prompt", a string or
                                                    # messages [{"role", "content"}, ...]; all are used
    num_prompts: In[int, 'x >= 1'] = 8              # of val, distinct, in a fixed shuffled order: more extend fewer
    num_samples: In[int, 'x >= 1'] = 1              # of each prompt
    show: In[int, 'x >= 0'] = 8                     # samples printed, of different prompts first; the table is over all
    max_new_tokens: In[int, 'x >= 1'] = 200         # of a response, where the end token does not come first
    temperature: In[float, 'x >= 0'] = 1.0          # 1 samples the model itself; 0 is greedy
    top_k: In[int, 'x >= 0'] = 0                    # draw from the k likeliest tokens only; 0 = all
    top_p: In[float, '0 < x <= 1'] = 1.0            # draw from the likeliest tokens that hold this probability; 1 = all
    beta: In[float, 'x >= 0'] = 0.0                 # of the implicit reward; 0 = the one AFTER was trained with, else 0.1
    reward: str = ''                                # a Python file with reward(prompts, responses) -> numbers; and, if you
                                                    # like, metrics(prompts, responses) -> {name: numbers or bools}
    batch_size: In[int, 'x >= 1'] = 64              # responses made at once
    json: bool = False                              # JSON lines on stdout and nothing else: a sample each, then the summary
    seed: In[int, 'x >= 0'] = 1337                  # of the draws, the same for both models
    device: Literal['auto', 'cpu', 'cuda', 'mps'] = 'auto'  # auto = cuda where there is one, else cpu
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the matmuls; auto = bfloat16 on cuda


# -----------------------------------------------------------------------------
# prompts and models from files

def read_prompts(path):
    """The prompts of a text file, one a line, or of a .jsonl with `prompt`, a string or messages; blank lines are skipped.
    UserErrors."""
    try:
        with open(path, encoding='utf-8-sig') as f:
            lines = [(number, line.rstrip('\n')) for number, line in enumerate(f, 1) if line.strip()]
    except OSError as error:
        raise UserError(f'prompts_file {path} cannot be read: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise UserError(f'prompts_file {path} is not UTF-8: {error.reason} at byte {error.start}') from None
    if not lines:
        raise UserError(f'prompts_file {path} holds no prompt')
    if not path.endswith('.jsonl'):
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            prompts.append(read_prompt(parse_json(line.encode())))
        except ValueError as error:
            raise UserError(f'prompts_file {path} line {number} is not an object with a "prompt", a string or messages: '
                            f'{error.args[-1]}') from None
    return prompts


def val_prompts(groups, n):
    """The first n distinct prompts of a split in an order that depends on nothing else: lists of ids."""
    return distinct_prompts(groups, n, 0)


def load(init_from, default, groups, device):
    """A model to sample from, and what its checkpoint records beside the weights ({} where it is not ours)."""
    if not init_from and not find_checkpoints(default):
        stage = os.path.basename(default)
        other = '--before' if stage == 'sft' else f'--after (its own {os.path.dirname(default)}/sft samples BEFORE alone)'
        raise UserError(f'{default} holds no checkpoint: run {stage}.py with this config first, or set {other}')
    where = init_from or default
    try:
        model, record = load_model(where, dropout=0.0)
    except CheckpointError as error:
        raise UserError(error) from None
    groups.check_model(model.config, record.get('vocabulary'), where)
    return model.to(device).eval(), record


# -----------------------------------------------------------------------------
# the terminal

BOLD, DIM = '1', '2'


def visible(text):
    """Text that cannot move the cursor or reverse the line: control characters as escapes, line breaks kept."""
    def escaped(c):
        kind = unicodedata.category(c)
        hidden = (kind[0] == 'C' or kind in ('Zl', 'Zp')) and c not in '\n\u200c\u200d'     # joiners shape real writing
        return c.encode('unicode_escape').decode() if hidden else c
    return ''.join(map(escaped, text.replace('\t', '    ')))


def columns(text):
    """Terminal columns of a text without line breaks: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.category(c) in ('Mn', 'Me', 'Cf') else 1 + (unicodedata.east_asian_width(c) in 'WF')
               for c in text)


def wrap(text, width):
    """Lines of at most `width` columns, broken between words where there are any. -> list of str"""
    lines = []
    for paragraph in text.split('\n'):
        line = ''
        for word in re.findall(r'\s*\S+', paragraph):
            if line and columns(line + word) > width:
                lines.append(line)
                line, word = '', word.lstrip()
            for c in word:                          # one wider than a line is broken
                if columns(line + c) > width:
                    lines.append(line)
                    line = ''
                line += c
        lines.append(line)
    return lines


def paint(text, style):
    """Bold or dim on a terminal, plain elsewhere and where NO_COLOR is set."""
    return f'\x1b[{style}m{text}\x1b[0m' if style and sys.stdout.isatty() and not os.environ.get('NO_COLOR') else text


def side_by_side(cells, width):
    """Lines of two cells (title, response, numbers): in two columns, or in less than 60 one below the other."""
    styles = BOLD, '', DIM
    if width < 60:
        return [paint(line, style) for cell in cells for text, style in zip(cell, styles) for line in wrap(text, width)]
    half, lines = (width - 3) // 2, []
    for left, right, style in zip(*cells, styles):
        for a, b in itertools.zip_longest(wrap(left, half), wrap(right, half), fillvalue=''):
            lines.append(f'{paint(a + " " * (half - columns(a)), style)} | {paint(b, style)}'.rstrip())
    return lines


LABELS = dict(tokens='tokens a response', ended='ended by end token', implicit_reward='implicit reward',
              kl='KL from BEFORE, nats', true_reward='true reward')


def table(summary, shares, width):
    """A row a measure: mean, and where there is room its standard error, of BEFORE and AFTER; shares in percent."""
    room = 17 if width >= 60 else 9
    lines = [f'{"":21}{"BEFORE":>{room}}{"AFTER":>{room}}']
    for name in summary['after']:
        line = f'{visible(LABELS.get(name, name)):21}'
        for side in ('before', 'after'):
            mean, error = summary[side].get(name, {'mean': None, 'error': None}).values()
            text = '-' if mean is None else f'{mean:.1%}' if name in shares else f'{mean:,.3f}'
            line += f'{text + (f" ±{error:.3f}" if error is not None and name not in shares and room > 9 else ""):>{room}}'
        lines.append(line)
    return '\n'.join(lines)


def main(argv=None):
    cfg = config.load(Config, 'sample', argv)
    device_type = cfg.device if cfg.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    available = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not available[device_type]:
        raise UserError(f'device={device_type} is not available here: --device=cpu')
    device = torch.device(device_type)
    bf16 = cfg.dtype == 'bfloat16' or cfg.dtype == 'auto' and device_type == 'cuda' and torch.cuda.is_bf16_supported()
    autocast = torch.autocast(device_type, torch.bfloat16) if bf16 else nullcontext()
    width = max(20, shutil.get_terminal_size().columns)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')        # a terminal that is not UTF-8

    def say(text, style=''):
        for line in wrap(visible(text), width):
            print(paint(line, style), file=sys.stderr if cfg.json else sys.stdout)

    # -------------------------------------------------------------------------
    # prompts and models

    if 'prompt' in cfg.origin and cfg.prompts_file:
        raise UserError('prompt and prompts_file are both set: keep one')
    score = read_reward(cfg.reward) if cfg.reward else lambda prompts, responses: {}
    data_dir = os.path.join('data', cfg.name)
    val = Groups(data_dir, 'val')
    tokenizer = load_tokenizer(data_dir, val.meta['tokenizer'])
    own = [cfg.prompt] if 'prompt' in cfg.origin else read_prompts(cfg.prompts_file) if cfg.prompts_file else None
    before, _ = load(cfg.before, os.path.join('out', cfg.name, 'sft'), val, device)
    after, record = load(cfg.after, os.path.join('out', cfg.name, 'dpo'), val, device)
    prompts = ([prompt_ids(tokenizer, prompt, val.meta['template']) for prompt in own] if own
               else val_prompts(val, cfg.num_prompts))
    if not prompts:
        raise UserError(f'{data_dir} has no prompts in val: set --prompt or --prompts_file')
    trained = record.get('config', {})
    per_token = trained.get('loss') in ('ipo_mean', 'dpo_norm', 'simpo', 'orpo')       # their beta is of other quantities
    beta = cfg.beta or not per_token and trained.get('beta') or 0.1
    say(f'sample on {device_type}, implicit rewards with beta {beta:g}:\n{config.show(cfg)}')
    if record.get('stage') == 'dpo' and record['init_fingerprint'].split()[-1] != fingerprint(before):
        say('note: AFTER was trained against other weights than BEFORE: rewards and KL here are relative to BEFORE')

    size = min(before.config.block_size, after.config.block_size)
    longest = size - min(cfg.max_new_tokens, size // 2)
    if long := sum(len(ids) > longest for ids in prompts):
        say(f'note: {long:,} of the prompts exceed {longest:,} tokens and were cut from the left, to leave room in '
            f'the {size:,} positions of the model')
    prompts = [ids[-longest:] for ids in prompts for _ in range(cfg.num_samples)]

    # -------------------------------------------------------------------------
    # responses, log-probs, rewards

    responses = []
    with tqdm(total=2 * len(prompts), desc='responses', disable=None) as bar:
        for model in (before, after):
            made = []
            for i in range(0, len(prompts), cfg.batch_size):
                some = prompts[i:i + cfg.batch_size]
                seed = (cfg.seed * 1_000_003 + i // cfg.batch_size) % 2**63
                with autocast:
                    made += model.generate(some, cfg.max_new_tokens, tokenizer.eot_token, val.meta['vocab_size'],
                                           cfg.temperature, cfg.top_k, cfg.top_p, seed)
                bar.update(len(some))
            responses.append([ids[:size - len(prompt)] for ids, prompt in zip(made, prompts)])  # no position after that
    groups = list(zip(prompts, *responses))
    ratios = response_logps(after, groups, device, autocast) - response_logps(before, groups, device, autocast)  # (N, 2)

    prompt_texts, measures, texts = [text_of(tokenizer, ids) for ids in prompts], {}, {}
    for side, made, ratio in zip(('before', 'after'), responses, ratios.t().tolist()):
        texts[side] = [text_of(tokenizer, ids) for ids in made]
        measures[side] = dict(tokens=[len(ids) for ids in made], ended=[ids[-1] == tokenizer.eot_token for ids in made],
                              implicit_reward=[beta * r for r in ratio])
        measures[side] |= ({'kl': ratio} if side == 'after' else {}) | score(prompt_texts, texts[side])

    # -------------------------------------------------------------------------
    # samples, then the summary

    shown = sorted(range(len(prompts)), key=lambda i: i % cfg.num_samples)[:cfg.show]      # other prompts before other samples
    for i in range(len(prompts)) if cfg.json else shown:
        prompt = prompt_texts[i]
        sides = {side: {name: values[i] for name, values in measures[side].items() if name != 'kl'} for side in texts}
        if cfg.json:
            both = {side: {'text': texts[side][i]} | numbers for side, numbers in sides.items()}
            print(json.dumps(dict(prompt=prompt, sample=i % cfg.num_samples, **both)))
            continue
        cells = []
        for side, numbers in sides.items():
            true = f'  true {numbers["true_reward"]:+.2f}' if 'true_reward' in numbers else ''
            cells.append((side.upper(), visible(texts[side][i]).strip() or '(nothing)',
                          f'implicit {numbers["implicit_reward"]:+.2f}{true}  {numbers["tokens"]} tokens'
                          + ', no end' * (not numbers['ended'])))
        say(f'\n{"-" * width}\n{prompt.strip() or "(empty prompt)"}\n', BOLD)
        print('\n'.join(side_by_side(cells, width)))
    summary = {side: {name: mean_and_error(values, cfg.num_samples) for name, values in measures[side].items()}
               for side in texts}
    note = 'the KL is an estimate, the mean of log(AFTER / BEFORE) over the samples of AFTER'
    if cfg.temperature != 1 or cfg.top_k or cfg.top_p < 1:
        note = (f'the KL row is not the KL here, which is that mean over samples at temperature 1 without top_k and top_p: '
                f'these were drawn at temperature={cfg.temperature:g}, top_k={cfg.top_k}, top_p={cfg.top_p:g}')
    n = len(prompts) // cfg.num_samples
    if cfg.json:
        drawn = {key: getattr(cfg, key) for key in ('temperature', 'top_k', 'top_p', 'seed')}
        print(json.dumps({'summary': dict(prompts=n, samples=len(prompts), beta=beta, **drawn, **summary, note=note)}))
        return
    shares = {name for name, values in measures['after'].items() if all(type(v) is bool for v in values)}
    say(f'\n{"-" * width}\n{len(prompts):,} sample{"s" * (len(prompts) > 1)} of {n:,} prompt{"s" * (n > 1)}\n')
    say(table(summary, shares, width))
    say('± is a standard error; ' * (width >= 60) + note)


if __name__ == '__main__':
    for number in {'SIGINT', 'SIGPIPE'} & set(dir(signal)):     # Ctrl-C, or `| head`: leave quietly
        signal.signal(getattr(signal, number), signal.SIG_DFL)
    main()
