"""Sampling: the generator, the numbers under the samples, and what reaches the terminal."""
import json
import math
import os
import re
import unicodedata
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
from conftest import VOCAB, small_gpt, write_data
from model import draw
from nanodpo import checkpoint, losses, terminal
from nanodpo.data import Groups, distinct_prompts, read_meta, write_meta
from nanodpo.rollout import mean_and_error
from nanodpo.terminal import BOLD, DIM, printable, say, tinted
from nanodpo.text import load_tokenizer, token_pieces

END = VOCAB - 1


def save(folder, net, **state):
    """A checkpoint of `net` as out/tiny/<folder>, the newest there."""
    folder = f'out/tiny/{folder}'
    os.makedirs(folder, exist_ok=True)
    checkpoint.save(folder, len(os.listdir(folder)) + 1, net, dict(config={}, optimizer={}) | state)


@pytest.fixture
def trained(experiment):
    """The experiment `tiny`, with another random model as out/tiny/dpo, trained with beta 0.25."""
    save('dpo', small_gpt(1), config=dict(beta=0.25), stage='dpo', vocabulary=Groups('data/tiny', 'val').vocabulary,
         origin=dict(init='none', reference=checkpoint.fingerprint(small_gpt())))
    return experiment


def run(capsys, *flags):
    """sample.main on `tiny`. -> what it prints on stdout"""
    capsys.readouterr()
    sample.main(['--name=tiny', '--max_new_tokens=12', *flags])
    return capsys.readouterr().out


def run_json(capsys, *flags):
    """sample.main with --json, which is all that stands on stdout. -> its samples and its summary"""
    *samples, last = map(json.loads, run(capsys, '--json', *flags).splitlines())
    assert list(last) == ['summary']
    return samples, last['summary']


def logits_of(net, ids):
    """Logits after each token of one sequence, float64, no cache and no batch: (T, V)"""
    T = len(ids)
    hidden = net(torch.tensor([ids]), torch.arange(T)[None], torch.ones(1, 1, T, T, dtype=torch.bool).tril())
    return F.linear(hidden, net.wte.weight)[0].detach().double()


def independent_logps(net, prompt, response):
    """log p of each token of a response, nats, one sequence alone: (tokens,)"""
    logps = logits_of(net, [*prompt, *response])[len(prompt) - 1:-1].log_softmax(-1)
    return logps.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


def allowed(logits, temperature, top_k, top_p):
    """Probabilities (V,) after temperature, top-k and top-p, from one sorted list."""
    p = (logits / temperature).softmax(-1).numpy()
    order = np.argsort(-p)[:top_k or None]
    before = p[order].cumsum() - p[order]
    kept = np.zeros_like(p)
    kept[order[before < top_p * p[order].sum()]] = 1
    return kept * p / (kept * p).sum()


def sample_slowly(net, prompts, n, end, seed, vocab_size=None, temperature=1.0, top_k=0, top_p=1.0):
    """What generate promises, one sequence and one token at a time."""
    noise = torch.Generator().manual_seed(seed)
    u = torch.stack([torch.rand(len(prompts), generator=noise, dtype=torch.float64) for _ in range(n)]).tolist()
    responses = []
    for row, prompt in enumerate(prompts):
        ids = []
        while len(ids) < n and end not in ids and len(prompt) + len(ids) <= net.config.block_size:
            logits = logits_of(net, prompt + ids)[-1, :vocab_size]
            if temperature == 0:
                ids.append(int(logits.argmax()))
            else:
                cumulative = allowed(logits, temperature, top_k, top_p).cumsum()
                ids.append(int((cumulative <= u[len(ids)][row] * cumulative[-1]).sum()))
        responses.append(ids)
    return responses


PROMPTS = [[5], [7, 200, 31, 4, 4, 9], [80, 81, 82], list(range(40, 60))]


# --- the generator --------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [dict(temperature=0), dict(), dict(temperature=0.6, top_k=20), dict(top_p=0.8),
                                     dict(temperature=1.5, top_k=50, top_p=0.7), dict(top_p=1e-9),
                                     dict(temperature=0.01)], ids=str)
def test_cached_batched_generation_equals_one_token_at_a_time_without_cache(options):
    net = small_gpt(3)
    free = net.generate(PROMPTS, 15, -1, seed=11, **options)
    for end in (END, free[1][4]):
        fast = net.generate(PROMPTS, 15, end, seed=11, **options)
        assert fast == sample_slowly(net, PROMPTS, 15, end, 11, **options)
        assert len(set(map(tuple, fast))) == len(PROMPTS)
    assert fast[1][-1] == end and len(fast[1]) <= 5, 'it ends with the end token'
    assert net.generate(PROMPTS, 15, END, top_k=1) == net.generate(PROMPTS, 15, END, temperature=0), 'both are greedy'


@pytest.mark.parametrize('options', [dict(), dict(top_k=7), dict(top_p=0.6), dict(temperature=2, top_k=30, top_p=0.9)])
def test_draw_has_the_frequencies_of_the_allowed_set_and_never_leaves_it(options):
    logits, n = 2 * torch.randn(60, generator=torch.Generator().manual_seed(0)), 20_000
    expected = allowed(logits.double(), **dict(temperature=1.0, top_k=0, top_p=1.0) | options)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n            # evenly spread: frequencies are exact to 1/n
    counts = np.bincount(draw(logits.expand(n, -1), u, **options), minlength=60)
    assert (counts[expected == 0] == 0).all()
    np.testing.assert_allclose(counts / n, expected, atol=2 / n)


def test_ids_of_a_padded_vocabulary_are_never_drawn(trained, capsys):
    padded = small_gpt(4, vocab_size=384)
    with torch.no_grad():
        padded.wte.weight[VOCAB:] *= 8          # likelier than all the others
    assert max(logits_of(padded, PROMPTS[0])[-1].topk(5).indices) >= VOCAB
    for temperature in (0, 1):
        drawn = padded.generate(PROMPTS, 20, END, VOCAB, temperature, seed=5)
        assert max(map(max, drawn)) < VOCAB
        assert drawn == sample_slowly(padded, PROMPTS, 20, END, 5, VOCAB, temperature)
    save('padded', padded)
    samples, _ = run_json(capsys, '--after=out/tiny/padded')
    assert all(s['after']['tokens'] for s in samples)


# --- the numbers ----------------------------------------------------------------------------------

@pytest.fixture
def scored(trained, capsys, monkeypatch):
    """Scores flags' samples one sequence at a time. -> summary, log after / before of each response, longest one"""
    spy = Mock(wraps=sample.token_logps_of)
    monkeypatch.setattr(sample, 'token_logps_of', spy)

    def scored(before, after, beta, *flags):
        samples, summary = run_json(capsys, *flags)
        groups = spy.call_args.args[1]
        ratios = []
        for s, (prompt, *responses) in zip(samples, groups, strict=True):
            for side, ids in zip(('before', 'after'), responses):
                ratio = independent_logps(after, prompt, ids) - independent_logps(before, prompt, ids)
                ratios.append(ratio.sum())
                texts, rewards = zip(*s[side]['pieces'])
                np.testing.assert_allclose(np.concatenate(rewards), beta * ratio, atol=2e-5)
                assert s[side]['implicit_reward'] == pytest.approx(beta * ratios[-1], abs=1e-4)
                assert (s[side]['tokens'], s[side]['ended']) == (len(ids), ids[-1] == END)
                assert ''.join(text or '' for text in texts) == s[side]['text']
                assert (texts[-1] is None) == s[side]['ended']
                assert END not in ids[:-1] and '<|endoftext|>' not in s[side]['text']
        return summary, ratios, max(len(prompt + ids) for prompt, *responses in groups for ids in responses)
    return scored


def test_implicit_rewards_equal_one_sequence_at_a_time_up_to_the_last_position(scored):
    flags = ['--num_prompts=7', '--num_samples=3', '--max_new_tokens=60', '--batch_size=5']
    summary, ratios, longest = scored(small_gpt(0), small_gpt(1), 0.25, *flags)                  # the beta of AFTER
    by_prompt = np.reshape(ratios[1::2], (7, 3)).mean(1)
    assert longest == 64
    kl = summary['after']['kl']
    assert kl['mean'] == pytest.approx(by_prompt.mean(), abs=1e-3)
    assert kl['error'] == pytest.approx(by_prompt.std(ddof=1) / 7**0.5, abs=1e-3)


def test_the_end_token_is_scored_where_it_was_drawn_and_hidden_from_the_text(scored):
    nets = [small_gpt(seed) for seed in (0, 1)]
    for i, net in enumerate(nets):
        with torch.no_grad():
            net.wte.weight[END] += 0.3 * net.ln_f.bias / net.ln_f.bias.norm() * 10      # a likely end
        save(f'early{i}', net)
    flags = ['--before=out/tiny/early0', '--after=out/tiny/early1', '--max_new_tokens=40']
    summary, *_ = scored(*nets, 0.1, *flags)                                             # where none is recorded
    assert 0 < summary['before']['ended']['mean'] + summary['after']['ended']['mean'] < 2


def test_the_kl_row_is_the_exact_kl_of_one_token(trained, capsys):
    _, summary = run_json(capsys, '--prompt=a', '--max_new_tokens=1', '--num_samples=3000', '--batch_size=1000')
    p, q = (logits_of(small_gpt(seed), [97])[-1].log_softmax(-1) for seed in (1, 0))
    exact, kl = (p.exp() * (p - q)).sum().item(), summary['after']['kl']
    assert abs(kl['mean'] - exact) < 4 * kl['error'] < 0.4 * exact


@pytest.mark.parametrize('flag', ['--temperature=0.7', '--top_k=5', '--top_p=0.9', '--temperature=0'])
def test_there_is_no_kl_of_draws_that_the_knobs_narrow(trained, capsys, flag):
    assert 'KL' in run(capsys) and 'KL' not in run(capsys, flag) and 'kl' not in run_json(capsys, flag)[1]['after']


def test_json_lines_hold_what_the_table_sums_up(trained, capsys):
    trained.joinpath('r.py').write_text('def reward(p, r): print("hi"); return [len(x) for x in r]\ndef metrics(p, r): '
                                        'return dict(short=[len(x) < 9 for x in r], one=[1.5] * len(r))')
    flags = ['--reward=r.py', '--num_prompts=9', '--num_samples=2', '--beta=2']
    samples, summary = run_json(capsys, *flags)
    assert (len(samples), summary['samples'], summary['prompts'], summary['beta']) == (18, 18, 9, 2)
    assert [s['sample'] for s in samples] == [0, 1] * 9
    for side in ('before', 'after'):
        for name in ('tokens', 'ended', 'implicit_reward', 'true_reward', 'short', 'one'):
            assert summary[side][name]['mean'] == pytest.approx(np.mean([s[side][name] for s in samples]))
        assert all(s[side]['true_reward'] == len(s[side]['text']) for s in samples)
        assert all(s[side]['short'] is (len(s[side]['text']) < 9) for s in samples)
    table = run(capsys, *flags, '--show=2')
    assert len(re.findall('^BEFORE', table, re.M)) == 2 and 'samples: 18, prompts: 9' in table
    assert run(capsys, '--show=0').count('implicit ') == 2      # the config's line and the table's
    shares = [f'{summary[side]["short"]["mean"]:.1%}' for side in ('before', 'after')]
    assert re.search(rf'^short +{shares[0]} +{shares[1]}$', table, re.M)
    assert re.search(r'^one +1\.500 ±0\.000 +1\.500 ±0\.000$', table, re.M)
    assert f'{summary["after"]["kl"]["mean"]:,.3f} ±' in table


def test_the_same_weights_and_seed_give_the_same_texts_and_another_seed_others_of_the_same_prompts(trained, capsys):
    samples, summary = run_json(capsys, '--after=out/tiny/sft', '--num_samples=2')
    assert samples and all(s['before'] == s['after'] and s['after']['implicit_reward'] == 0 for s in samples)
    assert summary['after']['kl'] == dict(mean=0, error=0)
    a, b, c = (run_json(capsys, f'--seed={seed}')[0] for seed in (1, 1, 20240131))
    assert a == b != c and [s['prompt'] for s in a] == [s['prompt'] for s in c]


def test_an_error_of_the_mean_counts_prompts_not_samples():
    assert mean_and_error([1, 1, 1, 3, 3, 3], 3) == dict(mean=2, error=1)
    assert mean_and_error([1, 3], 2) == mean_and_error([1, 3], 1) == dict(mean=2, error=1)
    assert mean_and_error([5], 1) == dict(mean=5, error=None)


@pytest.mark.parametrize('loss', sorted(losses.LOSSES))
def test_the_beta_of_a_loss_on_means_over_tokens_is_none_of_the_implicit_reward(trained, capsys, loss):
    save('dpo', small_gpt(1), config=dict(loss=loss, beta=0.25))
    _, summary = run_json(capsys, '--num_prompts=1', '--max_new_tokens=1')
    assert summary['beta'] == (0.1 if loss in ('dpo_norm', 'ipo_mean', 'orpo', 'simpo') else 0.25)


def test_it_says_that_after_was_trained_from_other_weights_than_before(trained, capsys):
    assert 'other weights' not in run(capsys)
    save('sft', small_gpt(9))
    assert 'other weights' in run(capsys)


# --- prompts --------------------------------------------------------------------------------------

def test_prompts_of_val_are_distinct_and_more_extend_fewer(tmp_path):
    data = [[[i % 6 + 1], [9, END], [8, END]] for i in range(40)]
    groups = Groups(write_data(tmp_path / 'd', {'val': data}), 'val')
    prompts = distinct_prompts(groups, 100, 0)
    assert sorted(prompts) == [[i] for i in range(1, 7)] and distinct_prompts(groups, 4, 0) == prompts[:4]


LONG = ''.join(chr(97 + i % 26) for i in range(100))


@pytest.mark.parametrize('prompt, n, template, shown, words', [
    ('', 12, '{prompt}', '', '(empty prompt)'),                                     # from the end token
    (LONG, 12, '{prompt}', LONG[-52:], 'cut from the left'), (LONG, 1000, '{prompt}', LONG[-32:], 'cut from the left'),
    ('why?', 12, '<|endoftext|>Q: {prompt}\nA:', 'Q: why?\nA:', ''),
    ('Q: why?\nA:', 12, '<|endoftext|>Q: {prompt}\nA:', 'Q: why?\nA:', ''),
])
def test_a_prompt_goes_into_the_template_and_is_cut_from_the_left(trained, capsys, prompt, n, template, shown, words):
    write_meta(trained / 'data/tiny', read_meta(trained / 'data/tiny') | dict(template=template))
    flags = [f'--prompt={prompt}', f'--max_new_tokens={n}']
    (s,), _ = run_json(capsys, *flags)
    assert s['prompt'] == shown and 0 < s['after']['tokens'] <= 64 - len(shown)
    assert words in ' '.join(run(capsys, *flags).split())


@pytest.mark.parametrize('name, content, expected', [
    ('p.txt', 'one\n\n  \nfür zwei\r\n three', ['one', 'für zwei', ' three']),
    ('p.txt', '\ufeffone\ttab\x0b\u2028same line', ['one\ttab\x0b\u2028same line']),
    ('p.jsonl', '{"prompt": "a\\nb", "more": 1}\n\n{"prompt": ""}', ['a\nb', '']),
    ('p.json', '[\n {"prompt": "a"},\n {"prompt": "b"}\n]', ['a', 'b']),
    ('p.csv', 'prompt,note\n"a, or\nb",x\nc,y\n', ['a, or\nb', 'c']),
])
def test_prompts_file_is_text_or_jsonl_and_all_of_it_is_used(trained, capsys, name, content, expected):
    trained.joinpath(name).write_text(content, encoding='utf-8', newline='')
    samples, summary = run_json(capsys, f'--prompts_file={name}', '--num_prompts=1')
    assert [s['prompt'] for s in samples] == expected and summary['prompts'] == len(expected)


# --- the terminal ---------------------------------------------------------------------------------

ATTACK = ('<script>document.title="pwned"</script><img src=x onerror="document.title=\'pwned\'"></p></main>'
          '<!-- </textarea> &amp; "\'')
TEXTS = ['👨\u200d👩\u200d👧\u200d👦 family, 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f and 🇩🇪🇫🇷 flags, '
         '👍🏽 🏳\ufe0f\u200d🌈 e\u0301a\u0308 1\ufe0f\u20e3 🎬🎬',
         'مرحبا بالعالم، هذا نص عربي with English inside 123 وأرقام.\n\nand English after it',
         'שלום עולם! with (parentheses) וסימנים — 42%.', 'नमस्ते दुनिया ภาษาไทย', ATTACK, '', ' \n ',
         'x' * 300 + ' ' + 'very-long/' * 50, '  two   runs\n\n\n\tof spaces ', '\u0301' * 9 + ' \ufffd', 'word ' * 40,
         'NUL \x00 bell \x07 esc \x1b[31m cr \r \u202eover\u202c \u2028 \x85 end', '映画は素晴らしかった。我喜欢这部电影。' * 9,
         '👍🏽 great 🎬🎉 ' * 15, 'e\u0301' * 200, 'ｗｉｄｅ and 狭い mixed ' * 9, 'a\n\n  b\nc ' + 'y' * 90]


def tokenizers(folder):
    """Byte tokens, which cut every character that is not ASCII, and GPT-2's where they can be had without a network."""
    write_data(folder, {'val': [[[1], [2, END], [3, END]]]})
    yield load_tokenizer(folder, 'tokenizer.json')
    if os.environ.get('TIKTOKEN_CACHE_DIR'):        # conftest sets it where it can
        yield load_tokenizer(folder, 'gpt2')


def pieces_of(tokenizer, text, seed=0):
    """token_pieces of a text and the end token, its values drawn at random. -> pieces, ids, values"""
    ids = tokenizer.encode_ordinary(text) + [tokenizer.eot_token]
    values = np.random.default_rng(seed).normal(0, 0.3, len(ids)).tolist()
    return token_pieces(tokenizer, ids, values), ids, values


def width_of(cells):
    return sum(2 if unicodedata.east_asian_width(c) in ('W', 'F') else unicodedata.category(c) not in ('Mn', 'Me', 'Cf')
               for c, *_ in cells)


def cells_of(line):
    """A line with escapes as [(character, its style)]. A style ends with its line."""
    assert re.fullmatch(r'(\x1b\[[\d;]+m[^\x1b]*\x1b\[0m|[^\x1b])*', line)
    runs = re.findall(r'\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m|([^\x1b]+)', line)
    return [(c, style) for style, styled_text, plain in runs for c in styled_text or plain]


@pytest.fixture
def colours(monkeypatch):
    """stdout is a terminal with colours."""
    monkeypatch.setattr(terminal, 'sys', Mock())        # its isatty() is true
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setenv('TERM', 'xterm-256color')


@pytest.mark.parametrize('width', [20, 21, 60, 80, 133])
def test_two_columns_hold_every_character_in_its_tint_and_fit(colours, tmp_path, capsys, monkeypatch, width):
    monkeypatch.setenv('COLUMNS', str(width))
    for tokenizer in tokenizers(tmp_path / 'd'):
        for left, right in zip(TEXTS, TEXTS[1:] + TEXTS[:1]):
            texts = [tinted(pieces_of(tokenizer, text)[0], 0.5) for text in (left, right)]
            say(*texts)
            shown = [], []
            for line in map(cells_of, capsys.readouterr().out.splitlines()):
                assert width_of(line) <= width
                half = [i for i in range(len(line)) if width_of(line[:i]) == (width - 3) // 2]
                bar = next(i for i in half if line[i + 1][0] == '|')
                shown[0].extend(line[:bar])
                shown[1].extend(line[bar + 3:])
            for cells, wanted in zip(shown, texts):
                assert [cell for cell in cells if not cell[0].isspace()] == [
                    letter for letter in wanted if not letter[0].isspace()]


def test_a_tinted_response_is_its_text_with_line_breaks_and_the_end_marked(colours, tmp_path):
    tokenizer = next(tokenizers(tmp_path / 'd'))
    for text in TEXTS:
        letters = tinted(pieces_of(tokenizer, text)[0], 0.5)
        assert ''.join(c for c, _ in letters) == (printable(text).replace('\n', '↵\n') + '∎').strip()
        hidden = {c for c, _ in letters if unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') or c == '\u202e'}
        assert hidden <= {'\n'}
    letters = tinted([(' a', [0.5]), ('b', [-0.25, -0.25]), ('c', [0.01]), (None, [0.2])], 0.5)
    assert ''.join(c for c, _ in letters) == 'abc∎'
    styles = [style for _, style in letters]
    assert styles == [tint(1), tint(-1), '', tint(0.4)] and len(set(styles)) == 4


def tint(value):
    """The style of a token of that value, where 1 is the limit."""
    return tinted([('token', [value])], 1)[0][1]


def linear(rgb):
    c = np.array(rgb) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """The contrast of two sRGB colours, as WCAG 2 defines it: that of their relative luminances."""
    low, high = sorted(linear(rgb) @ [0.2126, 0.7152, 0.0722] for rgb in (one, other))
    return (high + 0.05) / (low + 0.05)


def as_seen_by_the_colour_blind(*colours):
    """The colours (r, g, b) with protanopia, deuteranopia and tritanopia: Machado et al. 2009, severity 1."""
    for matrix in ([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
                   [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
                   [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]):
        yield [255 * np.clip(np.array(matrix) @ linear(rgb), 0, 1) ** (1 / 2.2) for rgb in colours]


def assert_readable(ink, tints):
    """Text in `ink` on {share: (plus, minus)} meets WCAG AA, and the colour-blind tell strong ones apart. All RGB."""
    for share, (plus, minus) in tints.items():
        assert min(contrast(ink, plus), contrast(ink, minus)) >= 4.5
        assert plus[2] > plus[0] and minus[2] < minus[0], 'blue is positive'
        for blue, orange in as_seen_by_the_colour_blind(plus, minus) if share >= 0.5 else ():
            assert math.dist(blue, orange) > 50 * share


def test_tints_of_the_terminal_set_both_colours_and_can_be_read_by_the_colour_blind_too():
    def rgb(number):
        return [[0, 95, 135, 175, 215, 255][(int(number) - 16) // step % 6] for step in (36, 6, 1)]
    assert {tint(share).split(';')[2] for share in (-1, -0.6, -0.2, 0.2, 0.6, 1)} == {'16'}
    assert_readable(rgb(16), {share: [rgb(tint(sign * share).split(';')[-1]) for sign in (1, -1)]
                              for share in (0.2, 0.6, 1)})
    assert [tint(v) for v in (0, 0.1, -0.16, 1e-9)] == [''] * 4, 'next to 0'
    assert len({tint(v / 100) for v in range(-100, 101)}) == 7
    assert [tint(v) for v in (9, math.inf, -9, -math.inf)] == [tint(v) for v in (1, 1, -1, -1)]


@pytest.mark.parametrize('width', ['24', '60', '100'])
def test_every_printed_line_fits_and_without_colours_it_holds_no_escape(trained, colours, capsys, monkeypatch, width):
    monkeypatch.setenv('COLUMNS', width)
    trained.joinpath('r.py').write_text('def reward(p, r): return [-1234.5] * len(r)\ndef metrics(p, r): '
                                        'return {"a metric with a long name \\x1b": [True] * len(r)}')
    flags = ['--num_prompts=10', '--show=10', '--max_new_tokens=60', '--reward=r.py']
    lines = [cells_of(line) for line in run(capsys, *flags).split('\n')]
    assert max(map(width_of, lines)) <= int(width)
    styles = {style for line in lines for _, style in line}
    assert {'', BOLD, DIM, tint(1), tint(-1)} <= styles
    assert 'a token is' in ''.join(c for line in lines for c, _ in line)
    for name, value in (('NO_COLOR', '1'), ('TERM', 'dumb')):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            plain = run(capsys, *flags)
        assert '\\x' in plain, 'random bytes held control characters'
        assert max(map(width_of, plain.split('\n'))) <= int(width) and 'a token is' not in plain
        assert not [c for c in plain if c != '\n' and unicodedata.category(c) == 'Cc' or c == '∎']
    assert len(run_json(capsys, *flags)[0]) == 10, 'JSON has none'
