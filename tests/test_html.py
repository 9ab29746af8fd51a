"""What sample.py shows of implicit rewards token by token: the numbers, the page and the terminal's tint."""
import errno
import html.parser
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
from contextlib import suppress

import numpy as np
import pytest
import torch

import config
import sample
from conftest import small_gpt, write_data
from model import fingerprint
from prepare_prefs import Groups, load_tokenizer, text_of
from sample import DARK, LIGHT, MIDDLE, STEPS
from test_sample import END, next_logits, run, run_json, save, width_of

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
ENGLAND = '\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f'
FAMILY, RAINBOW, GERMANY, FRANCE, THUMB = '👨\u200d👩\u200d👧\u200d👦', '🏳\ufe0f\u200d🌈', '🇩🇪', '🇫🇷', '👍🏽'
HINDI, ACCENT, KEYCAP = 'स्ते', 'e\u0301', '1\ufe0f\u20e3'
ATTACK = '<script>document.title="pwned"</script><img src=x onerror="document.title=\'pwned\'"></p></main><!-- </textarea> &amp; "\''
TEXTS = [f'{FAMILY} family, {ENGLAND} and {GERMANY}{FRANCE} flags, {THUMB} {RAINBOW} {ACCENT}a\u0308 {KEYCAP} 🎬🎬',
         'مرحبا بالعالم، هذا نص عربي with English inside 123 وأرقام.\n\nand English after it',
         'שלום עולם! with (parentheses) וסימנים — 42%.',
         '映画は素晴らしかった。我喜欢这部电影。', f'नम{HINDI} दुनिया ภาษาไทย', ATTACK, 'x' * 500 + ' ' + 'very-long/' * 50, '', ' \n ',
         '  two   runs\n\n\n\tof spaces ', 'NUL \x00 bell \x07 esc \x1b[31m cr \r \u202eover\u202c \u2028 \x85 end', ACCENT[1] * 9 + ' \ufffd']


def tokenizers(folder):
    """Byte tokens, which cut every character that is not ASCII, and GPT-2's where they can be had without a network."""
    write_data(folder, {'val': [[[1], [2, END], [3, END]]]})
    yield load_tokenizer(folder, 'tokenizer.json')
    if os.environ.get('TIKTOKEN_CACHE_DIR'):        # conftest sets it where it can
        yield load_tokenizer(folder, 'gpt2')


def pieces_of(tokenizer, text, seed=0, ended=True, spread=0.3):
    """token_pieces of a text, its values drawn at random. -> pieces, ids, values"""
    ids = tokenizer.encode_ordinary(text) + [tokenizer.eot_token] * ended
    draw = random.Random(seed)
    values = [draw.gauss(0, spread) for _ in ids]
    return sample.token_pieces(tokenizer, ids, values), ids, values


def torture_page(tokenizer, limit=0.5):
    """A page of every one of TEXTS, as prompt and on both sides, with attacks wherever there is text."""
    prompts = []
    for i, text in enumerate(TEXTS):
        both = [(side, pieces_of(tokenizer, words, i)[0], ['implicit +1.00', '9 tokens'])
                for side, words in (('before', text), ('after', TEXTS[i - 1]))]
        prompts.append((text, [both]))
    rows = [('tokens a response', '31.2', ' ±0.2', '33.7', ' ±0.1'), (sample.visible(ATTACK), '-', '', '50.0%', '')]
    return sample.html_page(f'</title>{ATTACK}', ('out/' + ATTACK, 'out/\udcff'), prompts, limit, 0.1, rows, ATTACK,
                            f"prompt = '</pre>{ATTACK}\udcff'")


@pytest.fixture
def trained(experiment):
    """The experiment `tiny`, with another random model as out/tiny/dpo, trained with beta 0.25."""
    save('dpo', small_gpt(1), config=dict(beta=0.25), stage='dpo', vocabulary=Groups('data/tiny', 'val').vocabulary,
         init_fingerprint=fingerprint(small_gpt()))
    return experiment


class Page(html.parser.HTMLParser):
    """A page as a browser reads it: elements in order as [tag, attributes, text inside]."""
    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ''])
        if tag not in ('meta',):
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, 'every element is closed in its turn'

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def handle_comment(self, data):
        raise AssertionError(f'a comment: {data}')

    def of(self, name):
        """The elements of a tag or class."""
        return [e for e in self.elements if e[0] == name or name in e[1].get('class', '').split()]


def luminance(rgb):
    """Relative luminance of sRGB, as WCAG 2 defines it."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in rgb))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# -----------------------------------------------------------------------------
# the numbers

def test_token_rewards_equal_one_sequence_at_a_time_and_sum_to_the_response():
    draw, net = random.Random(1), small_gpt(2)
    groups = [[[draw.randrange(256) for _ in range(draw.randint(1, 20))] for _ in range(3)] for _ in range(30)]
    args = groups, torch.device('cpu'), torch.autocast('cpu', enabled=False)
    tokens, sums = sample.response_token_logps(net, *args), sample.response_logps(net, *args)
    for (prompt, *responses), found, total in zip(groups, tokens, sums.tolist()):
        for response, values, one in zip(responses, found, total):
            expected = [next_logits(net, prompt + response[:i]).log_softmax(-1)[t].item() for i, t in enumerate(response)]
            np.testing.assert_allclose(values, expected, atol=2e-5)
            assert values.dtype == np.float64 and one == pytest.approx(math.fsum(values), abs=1e-12)


def test_pieces_join_to_the_text_and_hold_every_value_once(tmp_path):
    for tokenizer in tokenizers(tmp_path / 'd'):
        draw = random.Random(0)
        scraps = [[draw.randrange(tokenizer.n_vocab - 1) for _ in range(n)] for n in range(1, 80)]      # any bytes
        cut = [tokenizer.encode_ordinary(text)[:-1] for text in TEXTS if text]
        for ids in [[tokenizer.eot_token], *scraps, *cut, *(pieces_of(tokenizer, text)[1] for text in TEXTS)]:
            values = [float(i) for i in range(len(ids))]
            pieces = sample.token_pieces(tokenizer, ids, values)
            assert ''.join(text or '' for text, _ in pieces) == text_of(tokenizer, ids)
            assert [v for _, some in pieces for v in some] == values
            assert all(text for text, _ in pieces if text is not None)
            with suppress(UnicodeDecodeError):      # of whole characters a piece holds its tokens' bytes and no others
                whole = iter(b''.join(map(tokenizer.decode_single_token_bytes, ids)).decode() and ids)
                for text, some in pieces:
                    data = b''.join(tokenizer.decode_single_token_bytes(next(whole)) for _ in some)
                    assert text is None or data == text.encode()
            assert [text is None for text, _ in pieces] == [False] * (len(pieces) - 1) + [ids[-1] == tokenizer.eot_token]


def test_what_is_read_as_one_character_is_one_piece_and_words_are_not(tmp_path):
    for tokenizer in tokenizers(tmp_path / 'd'):
        for one in (FAMILY, ENGLAND, GERMANY, FRANCE, THUMB, RAINBOW, ACCENT, KEYCAP, HINDI, '🎬', 'ع', '映'):
            (text, values), (space, _), (again, _), _ = sample.token_pieces(tokenizer, ids := [
                *tokenizer.encode_ordinary(one), *tokenizer.encode_ordinary(' '), *tokenizer.encode_ordinary(one), tokenizer.eot_token],
                [1.0] * len(ids))
            assert (text, space, again) == (one, ' ', one)
            assert len(values) == len(tokenizer.encode_ordinary(one))
        (a, one), (b, two) = sample.token_pieces(tokenizer, ids := tokenizer.encode_ordinary(GERMANY + FRANCE), [1.0] * len(ids))
        assert (a, b) == (GERMANY, FRANCE) and len(one) + len(two) == len(ids)
        ids = tokenizer.encode_ordinary('A plain sentence.')
        assert len(sample.token_pieces(tokenizer, ids, [0.0] * len(ids))) == len(ids), 'a token a piece'


def test_the_scale_is_symmetric_and_one_wild_token_does_not_take_it():
    values = [0.001 * i for i in range(-500, 501)] + [300.0, math.nan, -math.inf]
    limit = sample.scale(values)
    assert 0.45 < limit <= 0.5
    assert [sample.step_of(v, limit) for v in (0, limit, 3 * limit, math.inf, limit / 2)] == [0, STEPS, STEPS, STEPS, STEPS // 2]
    assert all(sample.step_of(-v, limit) == -sample.step_of(v, limit) for v in values if v == v)
    assert sample.scale([0.0, 0.0]) == 0.01 and sample.scale([]) > 0 and abs(sample.step_of(math.nan, 1)) <= STEPS
    assert sample.step_of(1e-7, sample.scale([1e-7, -1e-7])) == 0, 'rounding is no reward'


# -----------------------------------------------------------------------------
# the colours

@pytest.mark.parametrize('palette', [LIGHT, DARK, MIDDLE], ids=['light', 'dark', 'terminal'])
def test_text_on_every_tint_meets_wcag_aa_and_stronger_is_farther_from_zero(palette):
    tints = [palette.tint(step) for step in range(-STEPS, STEPS + 1)]
    assert min(contrast(palette.ink, tint) for tint in tints) >= 4.5
    assert tints[STEPS] == palette.paper and tints[0] == palette.minus and tints[-1] == palette.plus
    if palette is not MIDDLE:
        assert contrast(palette.quiet, palette.paper) >= 4.5
        assert contrast(palette.paper, palette.ink) >= 7
    for side in (tints[STEPS:], tints[STEPS::-1]):
        away = [math.dist(tint, palette.paper) for tint in side]
        assert all(b - a > 5 for a, b in itertools.pairwise(away))


@pytest.mark.parametrize('kind, matrix', [      # Machado, Oliveira and Fernandes 2009, severity 1
    ('protanopia', [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    ('deuteranopia', [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    ('tritanopia', [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
])
@pytest.mark.parametrize('palette', [LIGHT, DARK, MIDDLE], ids=['light', 'dark', 'terminal'])
def test_the_two_sides_are_told_apart_by_the_colour_blind(palette, kind, matrix):
    def seen(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255]
        return 255 * np.clip(np.array(matrix) @ linear, 0, 1) ** (1 / 2.2)
    for step in (STEPS // 2, STEPS):
        plus, minus = seen(palette.tint(step)), seen(palette.tint(-step))
        assert math.dist(plus, minus) > 50 * step / STEPS
        assert math.dist(plus, minus) > 0.8 * math.dist(plus, seen(palette.paper)), 'not two shades of one colour'


# -----------------------------------------------------------------------------
# the page

TAGS = set('html head meta title style body main h1 h2 h3 p b div ol li span i section table thead tbody tr th td small pre script'.split())


def test_whatever_the_texts_hold_the_page_shows_it_and_no_more(tmp_path):
    for tokenizer in tokenizers(tmp_path / 'd'):
        text = torture_page(tokenizer)
        page = Page(text)
        assert not page.open and {e[0] for e in page.elements} == TAGS
        assert [e[2] for e in page.of('script')] == [sample.SCRIPT]
        assert text.encode() and not re.search('[\0-\t\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]', text), 'nothing hidden'
        bare = re.sub('>[^<]*<', '><', text)
        assert not re.search(r'(src|href|action|srcset|data)=|url\(|@import|https?:', bare), 'nothing from outside'
        assert [e[2] for e in page.of('prompt')] == [sample.visible(t) if t.strip() else '(empty prompt)' for t in TEXTS]
        shown = [sample.visible(TEXTS[i]) or '(nothing) ' for n in range(len(TEXTS)) for i in (n, n - 1)]
        assert [e[2] for e in page.of('response')] == [t + 'end' for t in shown]
        assert all(ATTACK in page.of(tag)[0][2] for tag in ('title', 'h1', 'pre')) and ATTACK in page.of('p')[0][2]
        assert page.of('note')[0][2] == ATTACK and page.of('th')[3][2] == ATTACK
        assert all(e[1]['dir'] == 'auto' for e in page.of('text')) and page.of('html')[0][1]['lang'] == 'en'
        assert len(page.of('h2')) == len(page.of('section')) == len(TEXTS) + 2 and len(page.of('h1')) == 1


def test_every_token_has_its_value_and_its_tint(tmp_path):
    for tokenizer in tokenizers(tmp_path / 'd'):
        for text in TEXTS:
            pieces, ids, values = pieces_of(tokenizer, text)
            spans = Page(sample.html_response(pieces, 0.5)).of('t')
            assert len(spans) == len(pieces) and 'end' in spans[-1][1]['class'].split() and spans[-1][2] == 'end'
            titles, listed = [e[1]['title'] for e in spans], []
            for title, (_, some), span in zip(titles, pieces, spans):
                assert title.split()[0] == f'{sum(some):+.3f}'
                each = re.fullmatch(r'(\S+)( \((\d+) tokens: (.*)\))?', title)
                listed += each[4].split(', ') if each[2] else [each[1]]
                assert not each[2] or int(each[3]) == len(some)
                step = round(STEPS * max(-1, min(1, sum(some) / 0.5)))
                assert span[1]['class'].split()[1:2] == ([f'{"pn"[step < 0]}{abs(step)}'] if step else ['end'] * (span is spans[-1]))
            assert listed == [f'{v:+.3f}' for v in values]
    css = torture_page(tokenizer)
    for palette, part in zip((LIGHT, DARK), css.split('prefers-color-scheme: dark')):
        for step in range(1, STEPS + 1):
            assert f'.p{step} {{ background: rgb{palette.tint(step)}; }}' in part
            assert f'.n{step} {{ background: rgb{palette.tint(-step)}; }}' in part


def test_the_page_of_a_run_holds_its_samples_its_table_and_its_settings(trained, capsys):
    trained.joinpath('r.py').write_text('def reward(p, r): return [len(x) for x in r]')
    flags = ['--num_prompts=5', '--num_samples=2', '--reward=r.py', '--max_new_tokens=30', '--json']
    plain = run(capsys, *flags)
    assert run(capsys, *flags, '--show=7', '--html=a&b.html') == plain, 'the page changes nothing of the JSON lines'
    *samples, last = map(json.loads, plain.splitlines())
    page, summary = Page(trained.joinpath('a&b.html').read_text(encoding='utf-8')), last['summary']
    assert len(page.of('prompt')) == 5 and len(page.of('response')) == 14
    shown = [samples[i] for i in (0, 1, 2, 3, 4, 6, 8)]        # a sample of each prompt, then further ones; together on the page
    numbers = [e[2] for e in page.of('numbers')]
    for line, side in zip(numbers, (s[side] for s in shown for side in ('before', 'after')), strict=True):
        assert line == ' · '.join([f'implicit {side["implicit_reward"]:+.2f}', f'true {side["true_reward"]:+.2f}',
                                   f'{side["tokens"]} tokens' + ', no end' * (not side['ended'])])
    for e, side in zip(page.of('response'), (s[side] for s in shown for side in ('before', 'after'))):
        assert e[2].removesuffix('end') == (sample.visible(side['text']) or '(nothing) ')
    first = trained.joinpath('a&b.html').read_text(encoding='utf-8').split('<h3>')[2]
    titles = re.findall(r'class="t[^>]* title="(\S+?)[ "]', first)
    assert sum(map(float, titles)) == pytest.approx(shown[0]['after']['implicit_reward'], abs=0.0005 * len(titles))
    cells = [e[2] for e in page.of('td')]
    for name in ('implicit_reward', 'true_reward', 'tokens'):
        for side in ('before', 'after'):
            assert f'{summary[side][name]["mean"]:,.3f} ±{summary[side][name]["error"]:.3f}' in cells
    assert "html           = 'a&b.html'   (flag)" in page.of('pre')[0][2] and 'out/tiny/dpo' in page.of('p')[0][2]
    assert sorted(p.name for p in trained.iterdir()) == ['a&b.html', 'data', 'out', 'r.py']


def test_a_page_without_samples_and_one_of_equal_models(trained, capsys):
    run(capsys, '--show=0', '--html=p.html')
    assert not Page(trained.joinpath('p.html').read_text(encoding='utf-8')).of('t')
    run(capsys, '--after=out/tiny/sft', '--html=p.html')
    spans = Page(trained.joinpath('p.html').read_text(encoding='utf-8')).of('t')
    assert spans and all(e[1]['class'] in ('t', 't end') and float(e[1]['title'].split()[0]) == 0 for e in spans)


@pytest.mark.parametrize('path, words', [('none/p.html', 'No such file'), ('data', 'is no file'), ('/dev/null', 'is no file'),
                                         ('taken.html', 'Is a directory'), ('r.py/p.html', 'Not a directory'), ('x' * 300, 'name too long')])
def test_a_page_that_cannot_be_written_is_refused_before_a_model_is_read(trained, monkeypatch, path, words):
    monkeypatch.setattr(sample, 'load', lambda *_: pytest.fail('a model was read'))
    trained.joinpath('r.py').write_text('')
    trained.joinpath('taken.html.tmp').mkdir()
    with pytest.raises(config.UserError) as caught:
        sample.main(['--name=tiny', f'--html={path}'])
    assert words in caught.value.message and 'html=' in caught.value.message and '\n' not in caught.value.message
    assert sorted(p.name for p in trained.iterdir()) == ['data', 'out', 'r.py', 'taken.html.tmp']


def test_a_full_disk_leaves_the_old_page_as_it_was(trained, monkeypatch, capsys):
    trained.joinpath('p.html').write_text('old')

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(config.UserError, match='No space left'):
        run(capsys, '--html=p.html')
    assert trained.joinpath('p.html').read_text() == 'old' and not trained.joinpath('p.html.tmp').exists()


# -----------------------------------------------------------------------------
# the terminal

def on_a_terminal(monkeypatch):
    """Make stdout a terminal of 256 colours."""
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    for name in ('NO_COLOR', 'COLORTERM'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TERM', 'xterm-256color')


def cells_of(line):
    """A line with escapes as [(character, its style)]."""
    found, style = [], ''
    for escape, c in re.findall(r'\x1b\[([\d;]*)m|(.)', line):
        if c:
            found.append((c, style))
        else:
            style = '' if escape == '0' else escape
    assert style == '', 'a style ends with its line'
    return found


@pytest.mark.parametrize('width', [20, 59, 60, 80, 133])
def test_tinted_columns_hold_every_character_in_its_tint_and_stay_aligned(monkeypatch, tmp_path, width):
    on_a_terminal(monkeypatch)
    for tokenizer in tokenizers(tmp_path / 'd'):
        for left, right in zip(TEXTS, TEXTS[1:] + TEXTS[:1]):
            texts, styles = zip(*(sample.tinted(pieces_of(tokenizer, text)[0], 0.5) for text in (left, right)))
            cells = [[(side, sample.BOLD), (text, style), ('implicit +1.00', sample.DIM)]
                     for side, text, style in zip(('BEFORE', 'AFTER'), texts, styles)]
            lines = [cells_of(line) for line in sample.side_by_side(cells, width)]
            plain = [''.join(c for c, _ in line) for line in lines]
            assert max(map(width_of, plain)) <= width
            shown = ([], [])
            for line, text in zip(lines, plain):
                if width < 60:
                    shown[0].extend(line)
                    continue
                at = next(i for i in range(len(text) + 1) if width_of(text[:i]) == (width - 3) // 2 and text[i:i + 2] == ' |')
                shown[0].extend(line[:at]), shown[1].extend(line[at + 3:])
            expected = [[(c, s) for c, s in zip(text, style)] for text, style in zip(texts, styles)]
            expected = expected if width >= 60 else [expected[0] + expected[1]]
            for some, wanted in zip(shown, expected):       # the titles and numbers are bold and dim
                assert [p for p in some if p[1] not in (sample.BOLD, sample.DIM) and not p[0].isspace()] == [
                    p for p in wanted if not p[0].isspace()]


def test_a_tinted_response_is_its_text_with_line_breaks_and_the_end_marked(monkeypatch, tmp_path):
    on_a_terminal(monkeypatch)
    tokenizer = next(tokenizers(tmp_path / 'd'))
    for text in TEXTS:
        pieces, _, _ = pieces_of(tokenizer, text)
        shown, styles = sample.tinted(pieces, 0.5)
        assert shown == (sample.visible(text).replace('\n', '↵\n') + '∎').strip() and len(styles) >= len(shown)
    shown, styles = sample.tinted([(' a', [0.5]), ('b', [-0.25, -0.25]), ('c', [0.01]), (None, [0.2])], 0.5)
    assert shown == 'abc∎' and styles[2] == '' and len(set(styles)) == 4


def test_tints_of_the_terminal_set_both_colours_and_can_be_read(monkeypatch):
    on_a_terminal(monkeypatch)
    cube = [0, 95, 135, 175, 215, 255]
    def rgb_256(n):     # noqa: E306
        return cube[(n - 16) // 36], cube[(n - 16) // 6 % 6], cube[(n - 16) % 6]
    for step in range(-STEPS, STEPS + 1):
        style = sample.tint_style(step)
        if abs(step) < 2:
            assert style == ''
            continue
        ink, ground = map(int, re.fullmatch(r'38;5;(\d+);48;5;(\d+)', style).groups())
        assert contrast(rgb_256(ink), rgb_256(ground)) >= 4.5
        r, _, b = rgb_256(ground)
        assert b > r if step > 0 else r > b
    monkeypatch.setenv('COLORTERM', 'truecolor')
    for step in (-STEPS, -2, 2, STEPS):
        assert sample.tint_style(step) == ';'.join(map(str, (38, 2, *MIDDLE.ink, 48, 2, *MIDDLE.tint(step))))


@pytest.mark.parametrize('width', ['24', '60', '100'])
def test_a_terminal_shows_the_legend_and_the_tints_and_the_same_text_without_colours(trained, monkeypatch, capsys, width):
    on_a_terminal(monkeypatch)
    monkeypatch.setenv('COLUMNS', width)
    flags = ['--num_prompts=4', '--max_new_tokens=40']
    tinted = run(capsys, *flags)
    assert 'implicit reward of a token' in ' '.join(re.sub(r'\x1b\[[\d;]*m', '', tinted).split()) and '\x1b[38;5;16;48;5;' in tinted
    for line in tinted.split('\n'):
        assert width_of(''.join(c for c, _ in cells_of(line))) <= int(width)
    for name, value in (('NO_COLOR', '1'), ('TERM', 'dumb')):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            plain = run(capsys, *flags)
            assert '\x1b' not in plain and 'of a token' not in plain and '∎' not in plain
    assert len(run_json(capsys, *flags)[0]) == 4, 'JSON has none'


# -----------------------------------------------------------------------------
# a real browser

PROBE = """<!DOCTYPE html><title>probe</title><iframe width="WIDTH" height="800"></iframe><pre id="out"></pre><script>
const frame = document.querySelector('iframe')
frame.onload = () => {
    const page = frame.contentDocument, view = frame.contentWindow, root = page.scrollingElement
    const widths = [...page.querySelectorAll('.response')].map(p => {       // with and without spans around the tokens
        const both = [p.innerHTML.replaceAll('<i></i>', ''), ''].map(inner => {
            const copy = page.createElement('div')
            copy.className = 'response'
            copy.style = 'position: absolute; visibility: hidden; white-space: pre; width: max-content'
            copy.innerHTML = inner
            if (!inner) copy.textContent = [...p.childNodes].filter(n => !n.matches('.end')).map(n => n.textContent).join('')
            copy.querySelector('.end')?.remove()
            root.append(copy)
            const width = copy.getBoundingClientRect().width
            copy.remove()
            return width
        })
        return both
    })
    const token = page.querySelector('.t'), bar = page.querySelector('[role=status]')
    const pair = page.querySelector('.pair').children
    const mixed = page.querySelectorAll('.prompt')[1], last = page.createRange()         // English below Arabic
    last.setStart(mixed.firstChild, mixed.textContent.lastIndexOf('\\n') + 1), last.setEndAfter(mixed.firstChild)
    token.click()
    document.querySelector('#out').textContent = JSON.stringify({
        title: page.title, pwned: document.title != 'probe', width: root.scrollWidth, room: root.clientWidth, widths,
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
    page = json.dumps(torture_page(tokenizer)).replace('</', '<\\/').replace('<!--', '<\\u0021--')
    tmp_path.joinpath('probe.html').write_text(PROBE.replace('WIDTH', str(width)).replace('PAGE', page), encoding='utf-8')
    done = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
                           '--disable-background-networking', '--disable-component-update', '--disable-sync', '--window-size=1400,900',
                           f'--user-data-dir={tmp_path}/profile', f'--blink-settings=preferredColorScheme={int(not dark)}',
                           '--virtual-time-budget=3000', '--dump-dom', f'file://{tmp_path}/probe.html'],
                          capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stderr
    seen, palette = json.loads(html.unescape(found[1])), DARK if dark else LIGHT
    assert not seen['pwned'] and seen['title'] == f'</title>{ATTACK}', 'no script of the data ran'
    assert seen['width'] <= seen['room'] <= width, 'nothing to scroll sideways'
    assert seen['columns'] is (width > 800)
    assert seen['bar'] == 'implicit reward ' + seen['token'] and seen['shown'] == 'visible', 'a tap shows the value'
    assert [seen[key] for key in ('paper', 'ink')] == [f'rgb{palette.paper}', f'rgb{palette.ink}']
    zero = 'rgba(0, 0, 0, 0)'
    assert seen['tints'] == [f'rgb{palette.tint(step)}' if step else zero for step in range(-STEPS, STEPS + 1)]
    assert [d for d in seen['directions'] if d == 'rtl'] == ['rtl'] * 2 and seen['directions'][1:3] == ['rtl'] * 2
    assert abs(seen['indent']) < 1, 'each paragraph has its own direction'
    for tinted, plain in seen['widths']:
        assert tinted == pytest.approx(plain, rel=0.003), 'spans do not break ligatures, joined letters, emoji'
