"""Before and after, side by side: responses of the reference and of the policy to the same prompts, with their rewards.

    python sample.py config/reviews.py                                      # held-out prompts; true reward and metrics
    python sample.py config/hh.py --temperature=0.7 --num_prompts=250 --show=4
    python sample.py config/hh.py --prompt='How do I fold a fitted sheet?' --num_samples=3
    python sample.py config/hh.py --prompts_file=mine.txt --json > samples.jsonl
    python sample.py config/hh.py --html=compare.html                       # the same to look at, and to show around

Reads data/<name>/ for the tokenizer, the template and the prompts of val, and the weights BEFORE (out/<name>/sft) and
AFTER (out/<name>/dpo). Under each response stands its implicit reward, beta log(after / before), and where `reward`
names a file its true one; a table sums up all samples. The implicit reward is a sum over the response's tokens: on a
terminal with colours, and on the page of `html`, each token is tinted by its own share. Both models draw with the same
random numbers, so they differ only where their distributions do. The numbers come in batches: another `batch_size`
gives other samples.
"""
import codecs
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import unicodedata
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from tqdm import tqdm

import config
from config import In, Literal, UserError
from model import CheckpointError, find_checkpoints, fingerprint, load_model, packed_mask, token_logps
from prepare_prefs import (Groups, Sampled, colours, distinct_prompts, load_tokenizer, packed_batches, parse_json, plan_rows, prompt_ids,
                           read_prompt, read_reward, row_limit, text_of, visible)


@torch.no_grad()
def response_token_logps(model, groups, device, autocast):
    """Log-probability of every token of every response, nats: for each group a list of K float64 arrays."""
    N, groups = len(groups), Sampled(groups)
    rows = plan_rows(np.arange(N), groups.lengths, 1, row_limit([groups], 0, device.type))[0]
    logps = np.zeros(len(groups.tokens))
    for batch in tqdm(packed_batches(groups, rows, device), total=len(rows), desc='log-probs', disable=None):
        with autocast:
            mask = packed_mask(batch.group, batch.part, batch.cuts)
            states = model(batch.tokens, batch.positions, mask, batch.predictor)                    # (S, C)
            scored = token_logps(states, model.wte.weight, batch.target)[:len(batch.response)]      # (S,)
        at = [np.arange(groups.index[i, 1], groups.index[i, -1]) for i in batch.ids]                # in the row's order
        logps[np.concatenate(at)] = scored.cpu().numpy()
    return [[logps[a:b] for a, b in itertools.pairwise(bounds[1:])] for bounds in groups.index.tolist()]


def response_logps(model, groups, device, autocast):
    """Log-probability of every response given its prompt, nats, summed over its tokens: (N, K) float64."""
    logps = response_token_logps(model, groups, device, autocast)
    return torch.tensor([[tokens.sum() for tokens in group] for group in logps], dtype=torch.float64)


def token_pieces(tokenizer, ids, values):
    """What of a response can be tinted apart: list of (text, values of its tokens). The texts join to text_of(ids).

    A piece is a token, or several where one ends within a character, as GPT-2's do in emoji, or within what is read as
    one: a letter and its accent, a flag, emoji that joiners hold together. The end token's text is None.
    """
    import regex        # tiktoken needs it, too
    decoder, text, ends = codecs.getincrementaldecoder('utf-8')('replace'), '', []
    ended = ids[-1:] == [tokenizer.eot_token]
    for token in ids[:len(ids) - ended]:
        try:
            text += decoder.decode(tokenizer.decode_single_token_bytes(token))
        except KeyError:        # an id that the tokenizer skips, as in text_of
            pass
        ends.append(None if decoder.getstate()[0] else len(text))
    text += decoder.decode(b'', final=True)
    ends[-1:] = [len(text)] * bool(ends)
    whole = {match.end() for match in regex.finditer(r'\X', text)} | {len(text)}
    pieces, start, held = [], 0, []
    for end, value in zip(ends, values):
        held.append(value)
        if end in whole and end > start:
            pieces.append((text[start:end], held))
            start, held = end, []
    return pieces + [('', held)] * bool(held) + [(None, [values[-1]])] * ended


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
    html: str = ''                                  # a file to write them to as well, as a page that needs nothing else
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
# the tint of a token: blue where AFTER likes it better than BEFORE, orange where less, none at 0

STEPS = 10              # tints on either side of 0


@dataclass
class Palette:
    """Colours (r, g, b): of the background and the text on it, quieter text, and the tints of the strongest rewards."""
    paper: tuple
    ink: tuple
    quiet: tuple
    plus: tuple
    minus: tuple

    def tint(self, step):
        """The background of a step from -STEPS to STEPS, on the straight line from the paper's to the strongest."""
        strongest, share = self.plus if step > 0 else self.minus, abs(step) / STEPS
        return tuple(round(a + (b - a) * share) for a, b in zip(self.paper, strongest))


LIGHT = Palette((255, 255, 255), (26, 26, 26), (89, 89, 89), (90, 165, 255), (255, 150, 50))
DARK = Palette((20, 22, 26), (240, 240, 240), (176, 176, 176), (25, 95, 175), (160, 75, 0))
MIDDLE = Palette((180, 178, 180), (0, 0, 0), (0, 0, 0), (0, 140, 255), (255, 130, 0))     # for a terminal, light or dark


def scale(values):
    """The reward of the strongest tints: above all but 2 in 100 of the tokens, which would leave the others pale."""
    sizes = [abs(v) for v in values if math.isfinite(v)]
    return max(0.01, float(f'{np.quantile(sizes, 0.98):.2g}')) if sizes else 1.0


def step_of(value, limit):
    """The tint of a reward: -STEPS to STEPS, the strongest from `limit` on."""
    return round(STEPS * min(1, max(-1, value / limit)))


# -----------------------------------------------------------------------------
# the terminal

BOLD, DIM = '1', '2'


def columns(text):
    """Terminal columns of a text without line breaks: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.category(c) in ('Mn', 'Me', 'Cf') else 1 + (unicodedata.east_asian_width(c) in 'WF')
               for c in text)


def wrap(text, style, width):
    """Lines of at most `width` columns, broken between words where there are any: list of (text, style).

    style: of all of it, or a list of one for each character.
    """
    lines = []
    for paragraph in re.finditer(r'(?m)^.*$', text):
        start = end = paragraph.start()
        for word in re.compile(r'\s*(\S+)').finditer(text, start, paragraph.end()):
            if end > start and columns(text[start:word.end()]) > width:
                lines.append((start, end))
                start = end = word.start(1)
            for i in range(end, word.end()):        # one wider than a line is broken
                if columns(text[start:i + 1]) > width:
                    lines.append((start, i))
                    start = i
            end = word.end()
        lines.append((start, end))
    return [(text[a:b], style if isinstance(style, str) else style[a:b]) for a, b in lines]


def paint(text, style):
    """A line in its style, one or one for each character; plain where no colours are wanted."""
    if not colours():
        return text
    styles, parts = itertools.repeat(style) if isinstance(style, str) else style, []
    for code, run in itertools.groupby(zip(text, styles), lambda pair: pair[1]):
        run = ''.join(c for c, _ in run)
        parts.append(f'\x1b[{code}m{run}\x1b[0m' if code else run)
    return ''.join(parts)


def tint_style(step):
    """The style of a tint: both its colours, so that it can be read on any background. '' next to 0."""
    if abs(step) < 2:
        return ''
    if os.environ.get('COLORTERM') in ('truecolor', '24bit'):
        return ';'.join(map(str, (38, 2, *MIDDLE.ink, 48, 2, *MIDDLE.tint(step))))
    near = (110, 110, 74, 39, 33) if step > 0 else (180, 180, 215, 214, 208)            # of the 256 colours
    return f'38;5;16;48;5;{near[abs(step) * 5 // STEPS - 1]}'


def tinted(pieces, limit):
    """A response for a terminal with colours, from token_pieces: its text, and a style for each character."""
    text, styles = '', []
    for piece, values in pieces:
        shown = '∎' if piece is None else visible(piece).replace('\n', '↵\n')       # a line break has a tint, too
        text += shown
        styles += [tint_style(step_of(sum(values), limit))] * len(shown)
    left = len(text) - len(text.lstrip())
    return text[left:].rstrip(), styles[left:]


def legend(limit):
    """The scale of the tints, as `tinted` gives it."""
    before, after = f'implicit reward of a token: {-limit:g} ', f' {limit:+g}, ∎ the end token'
    tints = [tint_style(step) for step in range(-STEPS, STEPS + 1)]
    return before + '-' * STEPS + '0' + '+' * STEPS + after, [''] * len(before) + tints + [''] * len(after)


def side_by_side(cells, width):
    """Lines of two cells, each a list of (text, style): in two columns, or in less than 60 one below the other."""
    if width < 60:
        return [paint(*line) for cell in cells for text, style in cell for line in wrap(text, style, width)]
    half, lines = (width - 3) // 2, []
    for left, right in zip(*cells):
        for a, b in itertools.zip_longest(wrap(*left, half), wrap(*right, half), fillvalue=('', '')):
            lines.append(f'{paint(*a)}{" " * (half - columns(a[0]))} | {paint(*b)}'.rstrip())
    return lines


LABELS = dict(tokens='tokens a response', ended='ended by end token', implicit_reward='implicit reward',
              kl='KL from BEFORE, nats', true_reward='true reward')


def table_rows(summary, shares):
    """(label, BEFORE's mean, its error, AFTER's mean, its error) of every measure, as text; shares in percent."""
    for name in summary['after']:
        row = [visible(LABELS.get(name, name))]
        for side in ('before', 'after'):
            mean, error = summary[side].get(name, {'mean': None, 'error': None}).values()
            row.append('-' if mean is None else f'{mean:.1%}' if name in shares else f'{mean:,.3f}')
            row.append(f' ±{error:.3f}' if error is not None and name not in shares else '')
        yield row


def table(rows, width):
    """The rows as lines: the means, and where there is room their standard errors."""
    room = 17 if width >= 60 else 9
    lines = [f'{"":21}{"BEFORE":>{room}}{"AFTER":>{room}}']
    for label, *numbers in rows:
        before, after = (mean + error * (room > 9) for mean, error in (numbers[:2], numbers[2:]))
        lines.append(f'{label:21}{before:>{room}}{after:>{room}}')
    return '\n'.join(lines)


# -----------------------------------------------------------------------------
# the page

STYLE = """
:root { color-scheme: light dark; font: 100%/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1rem; margin: 0 0 .25rem; color: var(--quiet); font-weight: normal; }
h3 { font-size: .8rem; margin: 0; color: var(--quiet); letter-spacing: .05em; }
section { border-top: 1px solid var(--line); margin: 1.5rem 0; padding-top: 1rem; }
.text { white-space: pre-wrap; unicode-bidi: plaintext; margin: .25rem 0 .5rem; tab-size: 4; }
.prompt { font-weight: 600; }
.response { line-height: 1.75; }
.none, .numbers, .note { color: var(--quiet); }
.numbers { margin: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
.pair { display: grid; gap: 1rem 2rem; margin-top: .75rem; }
@media (min-width: 44rem), print { .pair { grid-template-columns: 1fr 1fr; } }
.t { border-radius: 2px; -webkit-box-decoration-break: clone; box-decoration-break: clone; cursor: default; }
.t:hover, .picked { outline: 2px solid var(--quiet); }
.t i::before { content: "↵"; font-style: normal; }
.end { unicode-bidi: isolate; border: 1px solid var(--quiet); font-size: .75rem; padding: 0 .3em; margin: 0 .15em; }
.end, .none { user-select: none; }
.legend { position: sticky; top: 0; background: var(--paper); padding: .5rem 0; font-size: .8rem; }
.scale { display: flex; list-style: none; margin: 0; padding: 0; border: 1px solid var(--line); }
.scale li { flex: 1 1 0; text-align: center; padding: .15rem 0; white-space: nowrap; overflow-wrap: normal; }
.values { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: start; font-weight: normal; padding: .15rem 1rem .15rem 0; }
thead th, td { text-align: end; padding: .15rem 0 .15rem 1rem; }
pre { white-space: pre-wrap; font-size: .8rem; }
small { color: var(--quiet); white-space: nowrap; }
[role=status] { position: fixed; inset: auto 0 0; padding: .6rem 1rem; text-align: center; }
[role=status] { background: var(--ink); color: var(--paper); }
[role=status]:empty { visibility: hidden; }
@media print { .legend { position: static; } .t, .scale li { print-color-adjust: exact; } .pair > * { break-inside: avoid; } }
"""
SCRIPT = """
const bar = document.querySelector('[role=status]')     // on a phone nothing hovers: a tap shows the value
document.querySelector('main').addEventListener('click', event => {
    const token = event.target.closest('.t')
    document.querySelector('.picked')?.classList.remove('picked')
    token?.classList.add('picked')
    bar.textContent = token ? 'implicit reward ' + token.title : ''
})
"""


def tint_class(step):
    """The CSS class of a tint: p1 to p10, n1 to n10, '' for 0."""
    return f'{"p" if step > 0 else "n"}{abs(step)}' if step else ''


def css_colours(palette):
    """The palette as CSS: the page's own colours, and those of the tints."""
    line = [(a + b) // 2 for a, b in zip(palette.paper, palette.quiet)]
    named = dict(paper=palette.paper, ink=palette.ink, quiet=palette.quiet, line=line)
    rules = [':root { ' + ' '.join(f'--{name}: rgb{tuple(rgb)};' for name, rgb in named.items()) + ' }']
    rules += [f'.{tint_class(step)} {{ background: rgb{palette.tint(step)}; }}' for step in range(-STEPS, STEPS + 1) if step]
    return '\n'.join(rules)


def safe(text):
    """Any text as HTML that shows it and does nothing else."""
    return escape(visible(text))


def html_response(pieces, limit):
    """A response as HTML, a span for each of token_pieces with its value as the title."""
    spans = []
    for text, values in pieces:
        classes = ['t', tint_class(step_of(sum(values), limit)), 'end' * (text is None)]
        title = f'{sum(values):+.3f}'
        if len(values) > 1:
            title += f' ({len(values)} tokens: {", ".join(f"{v:+.3f}" for v in values)})'
        shown = 'end' if text is None else safe(text).replace('\n', '<i></i>\n')        # a line break has a tint, too
        spans.append(f'<span class="{" ".join(filter(None, classes))}" title="{title}">{shown}</span>')
    return '<span class="none">(nothing) </span>' * (not any(text for text, _ in pieces)) + ''.join(spans)


def html_page(title, models, prompts, limit, beta, rows, note, settings):
    """The page, before and after side by side, every token tinted by its implicit reward: str.

    models: what BEFORE and AFTER are. prompts: list of (prompt, samples), a sample being both sides' (side, token_pieces,
    list of numbers as text). limit: the reward of the strongest tints. rows: of table_rows. All other text is any text.
    """
    swatches = ''.join(f'<li class="{tint_class(step)}" title="{step / STEPS * limit:+.3f}">{sign}</li>'
                       for step, sign in enumerate("-" * STEPS + "0" + "+" * STEPS, -STEPS))
    sections = []
    for n, (prompt, samples) in enumerate(prompts, 1):
        shown = safe(prompt.strip('\n')) if prompt.strip() else '<span class="none">(empty prompt)</span>'
        sections += ['<section>', f'<h2>Prompt {n}</h2>', f'<p class="text prompt" lang="" dir="auto">{shown}</p>']
        for both in samples:
            sections.append('<div class="pair">')
            for side, pieces, numbers in both:
                sections += [f'<div><h3>{side.upper()}</h3>',
                             f'<p class="text response" lang="" dir="auto">{html_response(pieces, limit)}</p>',
                             f'<p class="numbers">{" · ".join(numbers)}</p></div>']
            sections.append('</div>')
        sections.append('</section>')
    table = ''.join(f'<tr><th scope="row">{escape(label)}</th><td>{before}<small>{error}</small></td>'
                    f'<td>{after}<small>{other}</small></td></tr>\n' for label, before, error, after, other in rows)
    sections = '\n'.join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe(title)}</title>
<style>{STYLE}{css_colours(LIGHT)}
@media screen and (prefers-color-scheme: dark) {{
{css_colours(DARK)}
}}</style>
</head>
<body>
<main>
<h1>{safe(title)}</h1>
<p>Responses of two models to the same prompts: BEFORE is {safe(models[0])}, AFTER is {safe(models[1])}. Each token is tinted
by its implicit reward, β log(after / before) with β = {beta:g}: <b>blue</b> where AFTER finds it likelier than BEFORE does,
<b>orange</b> where less likely. Hover over a token, or tap it, for its value; the sum stands under each response.</p>
<div class="legend" role="group" aria-label="scale of the tints">
<ol class="scale" aria-hidden="true">{swatches}</ol>
<div class="values"><span>{-limit:g} or less</span><span>{limit:+g} or more</span></div>
</div>
{sections}
<section>
<h2>All samples</h2>
<table>
<thead><tr><td></td><th scope="col">BEFORE</th><th scope="col">AFTER</th></tr></thead>
<tbody>
{table}</tbody>
</table>
<p class="note">{safe(note)}</p>
</section>
<section>
<h2>Settings</h2>
<pre>{safe(settings)}</pre>
</section>
</main>
<div role="status"></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def write_page(path, page=None):
    """Write the page aside and rename it; without one, only see that this can be done. UserErrors."""
    path = os.path.realpath(path)       # of a link, the file
    aside = path + '.tmp'
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'html={path} is there and is no file: choose another name')
    try:
        if os.path.exists(path):
            open(path, 'r+b').close()   # renaming would not ask
        with open(aside, 'w', encoding='utf-8') as f:
            f.write(page or '')
        os.replace(aside, path) if page else os.remove(aside)
    except OSError as error:
        with suppress(OSError):
            os.remove(aside)
        raise UserError(f'html={path} cannot be written: {error.strerror}') from None


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
        for line in wrap(visible(text), style, width):
            print(paint(*line), file=sys.stderr if cfg.json else sys.stdout)

    # -------------------------------------------------------------------------
    # prompts and models

    if 'prompt' in cfg.origin and cfg.prompts_file:
        raise UserError('prompt and prompts_file are both set: keep one')
    if cfg.html:
        write_page(cfg.html)
    score = read_reward(cfg.reward) if cfg.reward else lambda prompts, responses: {}
    data_dir = os.path.join('data', cfg.name)
    val = Groups(data_dir, 'val')
    tokenizer = load_tokenizer(data_dir, val.meta['tokenizer'])
    own = [cfg.prompt] if 'prompt' in cfg.origin else read_prompts(cfg.prompts_file) if cfg.prompts_file else None
    default_before, default_after = (os.path.join('out', cfg.name, stage) for stage in ('sft', 'dpo'))
    before, _ = load(cfg.before, default_before, val, device)
    after, record = load(cfg.after, default_after, val, device)
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
    logps = [response_token_logps(model, groups, device, autocast) for model in (after, before)]
    ratios = [[a - b for a, b in zip(*both)] for both in zip(*logps)]          # (N, 2) arrays, of a value a token

    prompt_texts, measures, texts = [text_of(tokenizer, ids) for ids in prompts], {}, {}
    for side, made, ratio in zip(('before', 'after'), responses, zip(*ratios)):
        texts[side] = [text_of(tokenizer, ids) for ids in made]
        sums = [float(r.sum()) for r in ratio]
        measures[side] = dict(tokens=[len(ids) for ids in made], ended=[ids[-1] == tokenizer.eot_token for ids in made],
                              implicit_reward=[beta * r for r in sums])
        measures[side] |= ({'kl': sums} if side == 'after' else {}) | score(prompt_texts, texts[side])
    summary = {side: {name: mean_and_error(values, cfg.num_samples) for name, values in measures[side].items()}
               for side in texts}
    shares = {name for name, values in measures['after'].items() if all(type(v) is bool for v in values)}
    note = 'the KL is an estimate, the mean of log(AFTER / BEFORE) over the samples of AFTER'
    if cfg.temperature != 1 or cfg.top_k or cfg.top_p < 1:
        note = (f'the KL row is not the KL here, which is that mean over samples at temperature 1 without top_k and top_p: '
                f'these were drawn at temperature={cfg.temperature:g}, top_k={cfg.top_k}, top_p={cfg.top_p:g}')
    n = len(prompts) // cfg.num_samples
    counted = f'{len(prompts):,} sample{"s" * (len(prompts) > 1)} of {n:,} prompt{"s" * (n > 1)}'

    # -------------------------------------------------------------------------
    # samples, then the summary: the page, JSON lines or the terminal

    shown = sorted(range(len(prompts)), key=lambda i: i % cfg.num_samples)[:cfg.show]      # other prompts before other samples
    limit = scale([beta * value for i in shown for ratio in ratios[i] for value in ratio.tolist()])
    pairs = {i: [] for i in shown}
    for i, (k, side) in itertools.product(shown, enumerate(texts)):
        ids, measured = responses[k][i], {name: values[i] for name, values in measures[side].items()}
        numbers = [f'implicit {measured["implicit_reward"]:+.2f}']
        numbers += [f'true {measured["true_reward"]:+.2f}'] if 'true_reward' in measured else []
        numbers += [f'{len(ids)} tokens' + ', no end' * (not measured['ended'])]
        pairs[i].append((side, token_pieces(tokenizer, ids, (beta * ratios[i][k]).tolist()), numbers))
    if cfg.html:
        by_prompt = {}
        for i in sorted(shown):
            by_prompt.setdefault(i // cfg.num_samples, []).append(i)
        page = html_page(f'{cfg.name}: before and after', (cfg.before or default_before, cfg.after or default_after),
                         [(prompt_texts[some[0]], [pairs[i] for i in some]) for some in by_prompt.values()],
                         limit, beta, table_rows(summary, shares), f'{counted}; ± is a standard error; {note}', config.show(cfg))
        write_page(cfg.html, page)
    if cfg.json:
        for i, prompt in enumerate(prompt_texts):
            both = {side: {'text': texts[side][i]} | {name: values[i] for name, values in measures[side].items() if name != 'kl'}
                    for side in texts}
            print(json.dumps(dict(prompt=prompt, sample=i % cfg.num_samples, **both)))
        drawn = {key: getattr(cfg, key) for key in ('temperature', 'top_k', 'top_p', 'seed')}
        print(json.dumps({'summary': dict(prompts=n, samples=len(prompts), beta=beta, **drawn, **summary, note=note)}))
    else:
        if shown and colours():
            print()
            print('\n'.join(paint(*line) for line in wrap(*legend(limit), width)))
        for i in shown:
            say(f'\n{"-" * width}\n{prompt_texts[i].strip() or "(empty prompt)"}\n', BOLD)
            cells = []
            for side, pieces, numbers in pairs[i]:
                text, styles = tinted(pieces, limit) if colours() else (visible(texts[side][i]).strip(), '')
                cells.append([(side.upper(), BOLD), (text, styles) if text else ('(nothing)', ''), ('  '.join(numbers), DIM)])
            print('\n'.join(side_by_side(cells, width)))
        say(f'\n{"-" * width}\n{counted}\n')
        say(table(table_rows(summary, shares), width))
        say('± is a standard error; ' * (width >= 60) + note)
    if cfg.html:
        say(f'wrote {cfg.html}')


if __name__ == '__main__':
    for number in {'SIGINT', 'SIGPIPE'} & set(dir(signal)):     # Ctrl-C, or `| head`: leave quietly
        signal.signal(getattr(signal, number), signal.SIG_DFL)
    main()
