"""The implicit reward of each token: the numbers, the pieces of text they belong to, and the page that shows them."""
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import config
import sample
from nanodpo.terminal import printable
from nanodpo.text import text_of, token_pieces
from test_sample import (ATTACK, TEXTS, as_seen_by_the_colour_blind, assert_readable, contrast,      # noqa: F401
                         pieces_of, run, tokenizers, trained)
import page

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
COLOURS = re.findall(r'--(\w+): (\d+) (\d+) (\d+);', page.STYLE)
LIGHT, DARK = ({name: tuple(map(int, rgb)) for name, *rgb in half} for half in (COLOURS[:6], COLOURS[6:]))


def torture(tokenizer):
    """Samples and a summary, as of sample.py --json, of every one of TEXTS, with attacks wherever there is text."""
    samples = []
    for i, text in enumerate(TEXTS):
        samples.append(dict(prompt=text, sample=0))
        for side, response in (('before', text), ('after', TEXTS[i - 1])):
            pieces, ids, values = pieces_of(tokenizer, response, i)
            samples[-1][side] = {'text': response, 'tokens': len(ids), 'ended': True, 'implicit_reward': sum(values),
                                 'pieces': pieces, ATTACK: bool(i % 2)}
    means = {name: dict(mean=0.5, error=0.1) for name in ('tokens', 'ended', 'implicit_reward', ATTACK)}
    knobs = dict(name=f'</title>{ATTACK}', show=len(samples), prompt=f'</pre>{ATTACK}\udcff')
    return samples, dict(samples=len(samples), prompts=len(samples), beta=0.1, config=knobs, before=means, after=means,
                         models=dict(before='out/' + ATTACK, after='out/\udcff'))


def write(monkeypatch, lines, path='p.html'):
    """The page of what sample.py --json prints, as a browser reads it."""
    monkeypatch.setattr('sys.stdin', io.StringIO(lines))
    page.main([path])
    return Page(Path(path).read_text(encoding='utf-8'))


class Page:
    """A page as its elements, (tag, attributes, text inside). They must be closed in their turn, as in XML."""
    def __init__(self, text):
        root = ElementTree.fromstring(re.sub('<meta[^>]*>', '', text))
        self.elements = [(e.tag, e.attrib, ''.join(e.itertext())) for e in root.iter()]

    def of(self, name):
        """The elements of a tag or class."""
        return [e for e in self.elements if e[0] == name or name in e[1].get('class', '').split()]


# --- the numbers and the colours ------------------------------------------------------------------

def test_pieces_join_to_the_text_and_hold_every_value_once(tmp_path):
    for tokenizer in tokenizers(tmp_path / 'd'):
        draw = np.random.default_rng(0)
        scraps = [draw.integers(tokenizer.n_vocab - 1, size=n).tolist() for n in range(1, 80)]      # any bytes
        cut = [tokenizer.encode_ordinary(text)[:-1] for text in TEXTS if text]
        for ids in [[tokenizer.eot_token], *scraps, *cut, *(pieces_of(tokenizer, text)[1] for text in TEXTS)]:
            values = list(range(len(ids)))
            pieces = token_pieces(tokenizer, ids, values)
            assert ''.join(text or '' for text, _ in pieces) == text_of(tokenizer, ids)
            assert [v for _, held in pieces for v in held] == values
            assert all(text for text, _ in pieces[:-1]) and pieces[-1][0] != ''
            assert (pieces[-1][0] is None) == (ids[-1] == tokenizer.eot_token)
            data = [b''.join(tokenizer.decode_single_token_bytes(ids[v]) for v in held) for _, held in pieces]
            if '\ufffd' not in text_of(tokenizer, ids):      # no character is cut: a piece is its tokens' bytes
                assert all(text is None or text.encode() == held for (text, _), held in zip(pieces, data))


def test_a_character_is_one_piece_and_words_are_not(tmp_path):
    for tokenizer in tokenizers(tmp_path / 'd'):
        sentence = 'A plain sentence.'
        assert len(pieces_of(tokenizer, sentence)[0]) == len(tokenizer.encode_ordinary(sentence)) + 1, 'a token a piece'
        for one in ('🎬', 'ع', '映'):
            assert [text for text, _ in pieces_of(tokenizer, f'{one}\n{one}')[0]] == [one, '\n', one, None]


def test_the_scale_is_symmetric_and_one_wild_token_does_not_take_it():
    def scale(rewards):
        return sample.scale([{side: {'pieces': [('a', rewards[i::2])]} for i, side in enumerate(sample.SIDES)}])
    values = [0.001 * i for i in range(-500, 501)] + [300.0]
    limit = scale(values)
    assert 0.45 < limit <= 0.5
    percent = [page.tint(v, limit)[1] for v in (0, limit, 3 * limit, math.inf, limit / 2)]
    assert percent == [''] + [f' style="--share: {share}%"' for share in (100, 100, 100, 50)]
    assert all(page.tint(-v, limit)[1] == page.tint(v, limit)[1] for v in values)
    assert [page.tint(v, limit)[0] for v in (limit, -limit, 0)] == [' plus', ' minus', '']
    assert scale([0.0, 0.0]) == 0.01 and sample.scale([]) > 0
    assert page.tint(1e-7, scale([1e-7, -1e-7])) == ('', ''), 'rounding is no reward'


@pytest.mark.parametrize('palette', [LIGHT, DARK], ids=['light', 'dark'])
def test_text_on_every_tint_meets_wcag_aa_and_the_colour_blind_tell_the_two_sides_apart(palette):
    assert contrast(palette['quiet'], palette['paper']) >= 4.5 and contrast(palette['paper'], palette['ink']) >= 7
    paper, sides = np.array(palette['paper']), np.array([palette['plus'], palette['minus']])
    tints = {tenth / 10: paper + (sides - paper) * tenth / 10 for tenth in range(1, 11)}
    assert_readable(palette['ink'], tints)
    away = np.linalg.norm([[paper, paper], *tints.values()] - paper, axis=-1)
    assert np.diff(away, axis=0).min() > 5, 'stronger is farther from zero'
    for share in (0.5, 1):
        for blue, orange, white in as_seen_by_the_colour_blind(*tints[share], paper):
            assert math.dist(blue, orange) > 0.8 * math.dist(blue, white), 'not two shades of one colour'


# --- the page -------------------------------------------------------------------------------------

def test_whatever_the_texts_hold_the_page_shows_it_and_no_more(tmp_path):
    for tokenizer in tokenizers(tmp_path / 'd'):
        samples, summary = torture(tokenizer)
        text = page.page_html(samples, summary)
        seen = Page(text)
        assert {e[0] for e in seen.elements} == set(
            'html head title style body main h1 h2 h3 p b div ol li span i section table thead tbody tr th td pre '
            'script'.split())
        assert [e[2] for e in seen.of('script')] == [page.SCRIPT]
        assert text.encode()
        assert not re.search('[\0-\t\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]', text), 'nothing hidden'
        bare = re.sub('>[^<]*<', '><', text)
        assert not re.search(r'(src|href|action|srcset|data)=|url\(|@import|https?:', bare), 'nothing from outside'
        assert '<!--' not in bare
        prompts = [printable(text.strip('\n')) if text.strip() else '(empty prompt)' for text in TEXTS]
        assert [e[2] for e in seen.of('prompt')] == prompts
        shown = [printable(TEXTS[i]) or '(nothing) ' for n in range(len(TEXTS)) for i in (n, n - 1)]
        assert [e[2] for e in seen.of('response')] == [t + 'end' for t in shown]
        assert all(ATTACK in seen.of(tag)[0][2] for tag in ('title', 'h1', 'p'))
        assert printable(f'prompt = {summary["config"]["prompt"]!r}') in seen.of('pre')[0][2]
        assert ATTACK in [e[2] for e in seen.of('th')]
        assert all(e[1]['dir'] == 'auto' for e in seen.of('text')) and seen.of('html')[0][1]['lang'] == 'en'
        assert len(seen.of('h2')) == len(seen.of('section')) == len(TEXTS) + 2 and len(seen.of('h1')) == 1


def test_every_token_has_its_value_and_its_tint(tmp_path):
    for tokenizer in tokenizers(tmp_path / 'd'):
        for text in TEXTS:
            pieces, _, values = pieces_of(tokenizer, text)
            spans, listed = Page(f'<p>{page.response_html(pieces, 0.5)}</p>').of('t'), []
            for (text, rewards), (_, attributes, shown) in zip(pieces, spans, strict=True):
                reward = sum(rewards)
                total, *tokens = re.findall(r'[+-][\d.]+', attributes['title'])
                listed += tokens or [total]
                assert total == f'{reward:+.3f}'
                assert not tokens or f'({len(rewards)} tokens: ' in attributes['title']
                share = 10 * round(10 * min(1, abs(reward) / 0.5))
                assert attributes.get('style') == (f'--share: {share}%' if share else None)
                sign = [] if not share else ['plus'] if reward > 0 else ['minus']
                assert attributes['class'].split() == ['t', *sign] + (['end'] if text is None else [])
                assert shown == 'end' or text is not None
            assert listed == [f'{v:+.3f}' for v in values]
    for side in ('plus', 'minus'):
        assert f'.{side} {{ background: rgb(var(--{side}) / var(--share)); }}' in page.STYLE


def test_the_page_of_a_run_holds_its_samples_its_table_and_its_settings(trained, capsys, monkeypatch):    # noqa: F811
    trained.joinpath('r.py').write_text('def reward(p, r): return [len(x) for x in r]')
    flags = ['--num_prompts=5', '--num_samples=2', '--reward=r.py', '--max_new_tokens=30', '--show=7']
    lines = run(capsys, '--json', *flags)
    *samples, last = map(json.loads, lines.splitlines())
    seen, summary = write(monkeypatch, lines, 'a&b.html'), last['summary']
    shown = [samples[i] for i in (0, 1, 2, 3, 4, 6, 8)]     # one of each prompt, then further ones, side by side
    sides = [s[side] for s in shown for side in ('before', 'after')]
    assert [e[2] for e in seen.of('prompt')] == [printable(s['prompt'].strip('\n')) for s in samples[::2]]
    for numbers, response, side in zip(seen.of('numbers'), seen.of('response'), sides, strict=True):
        end = '' if side['ended'] else ', no end'
        assert numbers[2] == (f'implicit {side["implicit_reward"]:+.2f} · true {side["true_reward"]:+.2f} · '
                              f'{side["tokens"]} tokens{end}')
        assert response[2].removesuffix('end') == (printable(side['text']) or '(nothing) ')
    cells = [e[2] for e in seen.of('td')]
    for name, side in itertools.product(('implicit_reward', 'true_reward', 'tokens'), ('before', 'after')):
        assert f'{summary[side][name]["mean"]:,.3f} ±{summary[side][name]["error"]:.3f}' in cells
    assert "max_new_tokens = 30" in seen.of('pre')[0][2] and 'out/tiny/dpo' in seen.of('p')[0][2]
    assert '7 of 10 samples are here' in seen.of('p')[0][2] and len(seen.of('response')) == 14
    assert sorted(p.name for p in trained.iterdir()) == ['a&b.html', 'data', 'out', 'r.py']
    assert not write(monkeypatch, run(capsys, '--json', '--show=0')).of('t')
    seen = write(monkeypatch, run(capsys, '--json', '--after=out/tiny/sft'))      # equal models
    spans = seen.of('t')
    assert 'All 8 samples are here' in seen.of('p')[0][2]
    assert spans and all(e[1]['class'] in ('t', 't end') and float(e[1]['title'].split()[0]) == 0 for e in spans)


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A folder with an old page, which stands there unchanged in the end."""
    monkeypatch.chdir(tmp_path)
    os.makedirs('taken.html.tmp')
    for name, content in {'p.html': 'old', **FOREIGN}.items():
        tmp_path.joinpath(name).write_text(content)
    yield tmp_path
    assert tmp_path.joinpath('p.html').read_text() == 'old'
    assert {path.name for path in tmp_path.iterdir()} == {'p.html', 'taken.html.tmp', *FOREIGN}


FOREIGN = {f'{i}.jsonl': content for i, content in enumerate([
    '', 'no JSON\n', '3\n', '{"prompt": "a"}\n', '{"summary": {}}\n',
    '{"prompt": "", "sample": 0, "before": {"text": ""}, "after": {"text": ""}}\n{"summary": {}}\n'])}


@pytest.mark.parametrize('arguments, words', [
    (['none/p.html'], 'none/p.html .*No such file'), (['taken.html.tmp'], 'is there and is no file'),
    (['/dev/null'], 'null is there and is no file'), (['x' * 300], 'xxx .*name too long'),
    (['taken.html'], 'taken.html .*Is a directory'), (['p.html/q.html'], 'q.html .*Not a directory'),
    ([], 'name the page'), (['p.html', 'none.jsonl'], 'none.jsonl cannot be read'),
    *((['p.html', name], f'{name} is not the whole output of sample.py --json') for name in FOREIGN)])
def test_what_cannot_be_read_or_written_is_one_line_and_leaves_the_old_page(old, arguments, words):
    with pytest.raises(config.UserError, match=words):      # where it waited for samples, it would say so of stdin
        page.main(arguments)


def test_a_full_disk_leaves_the_old_page_as_it_was(old, monkeypatch, tmp_path_factory):
    def full(*_):
        raise OSError(28, 'No space left on device')
    samples, summary = torture(next(tokenizers(tmp_path_factory.mktemp('data'))))
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(config.UserError, match='No space left'):
        write(monkeypatch, '\n'.join(map(json.dumps, [*samples, dict(summary=summary)])))


# --- a real browser -------------------------------------------------------------------------------

PROBE = """<!DOCTYPE html><title>probe</title><iframe width="WIDTH" height="800"></iframe><pre id="out"></pre><script>
const frame = document.querySelector('iframe')
frame.onload = () => {
    const page = frame.contentDocument, view = frame.contentWindow, root = page.scrollingElement
    const scrolled = root.scrollWidth
    const width = content => {
        const copy = root.appendChild(page.createElement('div'))
        copy.className = 'response'
        copy.style = 'position: absolute; visibility: hidden; white-space: pre; width: max-content'
        copy.append(...content)
        return copy.getBoundingClientRect().width
    }
    const widths = [...page.querySelectorAll('.response')].map(p => {       // with and without spans around the tokens
        const tokens = [...p.cloneNode(true).childNodes].filter(node => !node.matches('.end'))
        tokens.forEach(node => node.querySelectorAll('i').forEach(mark => mark.remove()))
        return [width([tokens.map(node => node.textContent).join('')]), width(tokens)]
    })
    const token = page.querySelector('.t'), bar = page.querySelector('[role=status]')
    const pair = page.querySelector('.pair').children
    const mixed = page.querySelectorAll('.prompt')[1], last = page.createRange()         // English below Arabic
    last.setStart(mixed.firstChild, mixed.textContent.lastIndexOf('\\n') + 1), last.setEndAfter(mixed.firstChild)
    token.click()
    document.querySelector('#out').textContent = JSON.stringify({
        title: page.title, pwned: document.title != 'probe', width: scrolled, room: root.clientWidth, widths,
        token: token.title, bar: bar.textContent, shown: view.getComputedStyle(bar).visibility,
        paper: view.getComputedStyle(page.documentElement).backgroundColor, ink: view.getComputedStyle(token).color,
        columns: pair[0].getBoundingClientRect().top == pair[1].getBoundingClientRect().top,
        tints: [...page.querySelectorAll('.scale li')].map(li => view.getComputedStyle(li).backgroundColor),
        indent: last.getBoundingClientRect().left - mixed.getBoundingClientRect().left,
        directions: [...page.querySelectorAll('.prompt')].map(p => view.getComputedStyle(p).direction)})
}
frame.srcdoc = PAGE
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason='no Chromium here')
@pytest.mark.parametrize('width, dark', [(1200, False), (390, True)], ids=['desktop-light', 'phone-dark'])
def test_a_browser_shows_the_page_as_meant(tmp_path, width, dark):
    *_, tokenizer = tokenizers(tmp_path / 'd')
    shown = json.dumps(page.page_html(*torture(tokenizer))).replace('</', '<\\/').replace('<!--', '<\\u0021--')
    probe = PROBE.replace('WIDTH', str(width)).replace('PAGE', shown)
    tmp_path.joinpath('probe.html').write_text(probe, encoding='utf-8')
    done = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--no-first-run', '--window-size=1400,900',
                           f'--blink-settings=preferredColorScheme={int(not dark)}', '--virtual-time-budget=3000',
                           f'--user-data-dir={tmp_path}/profile', '--dump-dom', f'file://{tmp_path}/probe.html'],
                          capture_output=True, text=True, timeout=120)
    out = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.S)
    assert out, done.stderr
    seen, palette = json.loads(html.unescape(out[1])), DARK if dark else LIGHT
    assert not seen['pwned'] and seen['title'] == f'</title>{ATTACK}: before and after', 'no script of the data ran'
    assert seen['width'] <= seen['room'] <= width, 'nothing to scroll sideways'
    assert seen['columns'] is (width > 800)
    assert seen['bar'] == 'implicit reward ' + seen['token'] and seen['shown'] == 'visible', 'a tap shows the value'
    assert [seen[key] for key in ('paper', 'ink')] == [f'rgb{palette["paper"]}', f'rgb{palette["ink"]}']
    shares = [tenth / 10 for tenth in range(1, 10)]
    minus, plus = ([f'rgba{(*palette[side], share)}' for share in shares] for side in ('minus', 'plus'))
    assert seen['tints'] == [f'rgb{palette["minus"]}', *minus[::-1], 'rgba(0, 0, 0, 0)', *plus, f'rgb{palette["plus"]}']
    assert [i for i, direction in enumerate(seen['directions']) if direction == 'rtl'] == [1, 2]
    assert abs(seen['indent']) < 1, 'each paragraph has its own direction'
    for plain, tinted in seen['widths']:
        assert tinted == pytest.approx(plain, rel=0.003), 'spans do not break ligatures, joined letters, emoji'
