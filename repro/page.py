"""The samples of sample.py --json as one HTML page that needs no other file: to look at, and to show around.

    python sample.py config/reviews.py --json | python repro/page.py compare.html
    python repro/page.py compare.html samples.jsonl         # the same from a file

Before and after stand side by side, each token tinted by its implicit reward. The page holds as many samples as
sample.py's `show` says, and tells how many those are; its table sums up all.
"""
import contextlib
import html
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config                                                   # noqa: E402
from config import UserError, need                              # noqa: E402
from nanodpo.folder import written_aside                        # noqa: E402
from nanodpo.terminal import printable                          # noqa: E402
from sample import SIDES, numbers_of, scale, table_rows         # noqa: E402

STYLE = """
:root { --paper: 255 255 255; --ink: 26 26 26; --quiet: 89 89 89; --line: 172 172 172; }
:root { --plus: 90 165 255; --minus: 255 150 50; }
@media screen and (prefers-color-scheme: dark) {
:root { --paper: 20 22 26; --ink: 240 240 240; --quiet: 176 176 176; --line: 98 99 101; }
:root { --plus: 25 95 175; --minus: 160 75 0; }
}
:root { color-scheme: light dark; color: rgb(var(--ink)); background: rgb(var(--paper)); }
:root { font: 100%/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1rem; margin: 0 0 .25rem; color: rgb(var(--quiet)); font-weight: normal; }
h3 { font-size: .8rem; margin: 0; color: rgb(var(--quiet)); letter-spacing: .05em; }
section { border-top: 1px solid rgb(var(--line)); margin: 1.5rem 0; padding-top: 1rem; }
.text { white-space: pre-wrap; unicode-bidi: plaintext; margin: .25rem 0 .5rem; tab-size: 4; }
.prompt { font-weight: 600; }
.response { line-height: 1.75; }
.none, .numbers, .note { color: rgb(var(--quiet)); }
.numbers { margin: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
.pair { display: grid; gap: 1rem 2rem; margin-top: .75rem; }
@media (min-width: 44rem), print { .pair { grid-template-columns: 1fr 1fr; } }
.plus { background: rgb(var(--plus) / var(--share)); }
.minus { background: rgb(var(--minus) / var(--share)); }
.t { border-radius: 2px; -webkit-box-decoration-break: clone; box-decoration-break: clone; cursor: default; }
.t:hover, .picked { outline: 2px solid rgb(var(--quiet)); }
.t i::before { content: "↵"; font-style: normal; }
.end { unicode-bidi: isolate; border: 1px solid rgb(var(--quiet)); }
.end { font-size: .75rem; padding: 0 .3em; margin: 0 .15em; }
.end, .none { user-select: none; }
.legend { position: sticky; top: 0; background: rgb(var(--paper)); padding: .5rem 0; font-size: .8rem; }
.scale { display: flex; list-style: none; margin: 0; padding: 0; border: 1px solid rgb(var(--line)); }
.scale li { flex: 1 1 0; text-align: center; padding: .15rem 0; white-space: nowrap; overflow-wrap: normal; }
.values { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: start; font-weight: normal; padding: .15rem 1rem .15rem 0; }
thead th, td { text-align: end; padding: .15rem 0 .15rem 1rem; white-space: nowrap; }
pre { white-space: pre-wrap; font-size: .8rem; }
[role=status] { position: fixed; inset: auto 0 0; padding: .6rem 1rem; text-align: center; }
[role=status] { background: rgb(var(--ink)); color: rgb(var(--paper)); }
[role=status]:empty { visibility: hidden; }
@media print { .legend { position: static; } .t, .scale li { print-color-adjust: exact; } }
@media print { .pair > * { break-inside: avoid; } }
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
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>Responses of two models to the same prompts: BEFORE is {before}, AFTER is {after}. Each token is tinted by its
implicit reward, β log(after / before) with β = {beta:g}: <b>blue</b> where AFTER finds it likelier than BEFORE does,
<b>orange</b> where less likely. Hover over a token, or tap it, for its value; the sum stands under each response. {extent}</p>
<div class="legend" role="group" aria-label="scale of the tints">
<ol class="scale" aria-hidden="true">{swatches}</ol>
<div class="values"><span>{least:g} or less</span><span>{most:+g} or more</span></div>
</div>
{sections}
<section>
<h2>All samples</h2>
<table>
<thead><tr><td></td><th scope="col">BEFORE</th><th scope="col">AFTER</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p class="note">{note}</p>
</section>
<section>
<h2>Settings</h2>
<pre>{settings}</pre>
</section>
</main>
<div role="status"></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def safe(text):
    """Any text as HTML that shows it and does nothing else."""
    return html.escape(printable(text))


def tint(reward, limit):
    """The class and the style of what is tinted by a reward, as attributes in two parts; '' and '' for next to none."""
    percent = 10 * round(10 * min(1, abs(reward) / limit))
    if not percent:
        return '', ''
    return ' plus' if reward > 0 else ' minus', f' style="--share: {percent}%"'


def response_html(pieces, limit):
    """A response: a span for each of its pieces, with its implicit reward as the title."""
    spans = [] if any(text for text, _ in pieces) else ['<span class="none">(nothing) </span>']
    for text, rewards in pieces:
        title = f'{sum(rewards):+.3f}'
        if len(rewards) > 1:
            title += f' ({len(rewards)} tokens: {", ".join(f"{reward:+.3f}" for reward in rewards)})'
        shown, end = ('end', ' end') if text is None else (safe(text).replace('\n', '<i></i>\n'), '')
        sign, style = tint(sum(rewards), limit)
        spans.append(f'<span class="t{sign}{end}"{style} title="{title}">{shown}</span>')
    return ''.join(spans)


def section_html(number, samples, limit):
    """A prompt and its samples, one or several."""
    prompt = samples[0]['prompt']
    shown = safe(prompt.strip('\n')) if prompt.strip() else '<span class="none">(empty prompt)</span>'
    lines = ['<section>', f'<h2>Prompt {number}</h2>', f'<p class="text prompt" lang="" dir="auto">{shown}</p>']
    for sample in samples:
        lines.append('<div class="pair">')
        for side in SIDES:
            response = response_html(sample[side]['pieces'], limit)
            lines.append(f'<div><h3>{side.upper()}</h3>')
            lines.append(f'<p class="text response" lang="" dir="auto">{response}</p>')
            lines.append(f'<p class="numbers">{" · ".join(numbers_of(sample[side]))}</p></div>')
        lines.append('</div>')
    return '\n'.join([*lines, '</section>'])


def page_html(samples, summary):
    """The whole page: str. samples, summary: as sample.py --json gives them."""
    knobs = summary['config']
    order = sorted(range(len(samples)), key=lambda i: samples[i]['sample'])     # other prompts before other samples
    shown = [samples[i] for i in sorted(order[:knobs['show']])]
    limit = scale(shown)
    by_prompt = []
    for sample in shown:
        if sample['sample'] == 0:
            by_prompt.append([])
        by_prompt[-1].append(sample)
    swatches = []
    for tenth in range(-10, 11):
        sign, style = tint(tenth / 10 * limit, limit)
        mark = '-' if tenth < 0 else '+' if tenth else '0'
        swatches.append(f'<li class="s{sign}"{style} title="{tenth / 10 * limit:+.3f}">{mark}</li>')
    rows = [f'<tr><th scope="row">{html.escape(label)}</th><td>{before}</td><td>{after}</td></tr>'
            for label, before, after in table_rows(summary, samples)]
    counted = f'samples: {summary["samples"]:,}, prompts: {summary["prompts"]:,}, ± a standard error'
    extent = f'All {len(samples):,} samples are here.'
    if len(shown) < len(samples):
        extent = f'{len(shown):,} of {len(samples):,} samples are here (--show of sample.py); the table sums up all.'
    models = {side: safe(summary['models'][side]) for side in SIDES}
    return PAGE.format(
        title=safe(f'{knobs["name"]}: before and after'), STYLE=STYLE, SCRIPT=SCRIPT, beta=summary['beta'], **models,
        least=-limit, most=limit, swatches=''.join(swatches), rows='\n'.join(rows),
        sections='\n'.join(section_html(number, group, limit) for number, group in enumerate(by_prompt, 1)),
        note=counted, extent=extent,
        settings=safe('\n'.join(f'{name} = {value!r}' for name, value in knobs.items())))


def read_samples(path):
    """The samples and the summary in a file of `sample.py --json`, '' for stdin. UserErrors."""
    where = path or 'standard input'
    try:
        with open(path, encoding='utf-8') if path else contextlib.nullcontext(sys.stdin) as file:
            *samples, last = map(json.loads, file)
        if not samples or not all(sample[side]['pieces'] for sample in samples for side in SIDES):
            raise ValueError
        return samples, last['summary']
    except OSError as error:
        raise UserError(f'{where} cannot be read: {error.strerror}') from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f'{where} is not the whole output of sample.py --json ({type(error).__name__})') from None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(__doc__.strip())
        return
    need(len(argv) in (1, 2), 'name the page to write, such as compare.html, and perhaps a file of sample.py --json')
    path = os.path.realpath(argv[0])        # of a link, the file
    may_replace = os.path.isfile(path) and os.access(path, os.W_OK)
    need(may_replace or not os.path.exists(path), f'{path} is there and is no file, or may not be written')
    try:
        with written_aside(path) as aside, open(aside, 'w', encoding='utf-8') as f:     # before the wait for samples
            f.write(page_html(*read_samples(argv[1] if len(argv) > 1 else '')))
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from None
    print(f'wrote {argv[0]}')


if __name__ == '__main__':
    config.run(main)
