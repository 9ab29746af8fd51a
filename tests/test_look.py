"""prepare_prefs.py --dry_run and its notes: it says what the run will do, names what is odd, and writes nothing."""
import collections
import itertools
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import dpo
import prepare_prefs
import sft
from conftest import SHARED, error_of, write_rows
from nanodpo.data import Groups, read_meta

HH = SHARED / 'data' / 'hh-rlhf'
needs_hh = pytest.mark.skipif(not HH.is_dir(), reason='the HH sample is not here')


@pytest.fixture(autouse=True)
def in_a_fresh_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))


def pairs(texts):
    return [dict(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in texts]


def write_pairs(train, val=[('v', 'w', 'x')]):
    """A folder of pairs, rows/, as --source."""
    write_rows('rows/train.jsonl', pairs(train))
    write_rows('rows/val.jsonl', pairs(val))


def run(capfd, *flags):
    """What prepare_prefs.py prints here."""
    prepare_prefs.main(['--name=made', '--tokenizer=bytes', *flags])
    return capfd.readouterr().out


def table_of(printed):
    """{title: cells} of the table."""
    table = re.search(r'^ {24} *(?:documents_)?train.*\n(?:[a-z]+[a-z_: ]* [ \d,-]+\n)+', printed, re.M)[0]
    return {line[:24].strip(): line[24:].split() for line in table.splitlines()}


def notes():
    return read_meta('data/made')['notes']


def plain(n, seed=0):
    """n pairs in which nothing is odd."""
    rng = np.random.default_rng(seed)
    first = 10_000 * seed
    return [(f'What is {i + first}?', ' ' + 'yes ' * rng.integers(1, 9) + str(i), ' ' + 'no ' * rng.integers(1, 11) + str(i))
            for i in range(n)]


# --- a dry run is the run, without its files ------------------------------------------------------

KINDS = {
    'pairs': lambda: pairs(plain(60) + plain(3)),
    'rankings': lambda: [dict(prompt=p, responses=[w, l, w + l]) for p, w, l in plain(40)],
    'unpaired': lambda: [dict(prompt=p, completion=w, label=len(w) % 3 > 0) for p, w, l in plain(40)],
    'documents': lambda: [dict(text=w) for _, w, _ in plain(40)],
}


@pytest.mark.parametrize('source', KINDS)
def test_a_dry_run_says_what_the_run_then_does_and_writes_nothing(source, capfd):
    flags = ['--documents=rows.jsonl' if source == 'documents' else '--source=rows.jsonl', '--max_length=40']
    if source == 'pairs':
        flags += ['--max_prompt_length=8', '--tokenizer=bpe:300', '--documents=chosen']
    write_rows('rows.jsonl', KINDS[source]())
    before = sorted(Path().rglob('*'))
    dry = run(capfd, *flags, '--dry_run')
    assert sorted(Path().rglob('*')) == before, 'nothing under data/, nothing left in temporary places'
    assert len(re.findall(r'train\[\d+\] of', dry)) == 3
    assert dry.rstrip().endswith('nothing was written: without --dry_run this writes data/made')
    real = run(capfd, *flags)
    assert table_of(dry) == table_of(real) and len(table_of(real)) > 8
    for printed in (dry, real):
        assert re.findall('^note: (.*)', printed, re.M) == notes()
    old = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path('data/made').iterdir()}
    run(capfd, *flags, '--seed=3', '--dry_run')
    assert 'is reused' in run(capfd, *flags), 'a dry run is no other knob'
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path('data/made').iterdir()} == old


def test_what_stops_the_run_stops_a_dry_run_and_leaves_nothing():
    write_rows('rows.jsonl', pairs(plain(20) + [('x', 'same', 'same')]))
    before = sorted(Path().rglob('*'))
    assert 'line 21' in error_of('--dry_run', '--source=rows.jsonl')
    assert sorted(Path().rglob('*')) == before


def test_three_groups_are_shown_as_training_sees_them(capfd):
    write_rows('rows.jsonl', pairs(('P' * i + '\n', ' c\x1b[31m\u202e\t' + 'c' * 12, 'r' * (2 * i))
                                   for i in range(5, 45)))
    flags = ['--source=rows.jsonl', '--max_length=60', '--max_prompt_length=20', '--template=<|endoftext|>{prompt}']
    dry = run(capfd, *flags, '--dry_run')
    assert '\x1b' not in dry and '\u202e' not in dry
    assert run(capfd, *flags, '--dry_run') == dry

    run(capfd, *flags)
    groups = Groups('data/made', 'train')
    shown = [int(i) for i in re.findall(r'train\[(\d+)\] of', dry)]
    assert len(set(shown)) == 3
    for i, block in zip(shown, re.split(r'train\[\d+\] of.*\n', dry)[1:]):
        parts = r'  (?:prompt|chosen|rejected), (\d+) tokens(?: and (\d+) cut)?\n((?:    .*\n?)+)'
        prompt, chosen, rejected = re.findall(parts, block)
        assert [int(n) for n, _, _ in (prompt, chosen, rejected)] == [len(piece) for piece in groups[i]]
        assert ('⟨end⟩' in rejected[2]) == (groups[i][2][-1] == 256) == (not rejected[1])
        assert ('⟨cut⟩' in prompt[2]) == bool(prompt[1]) and '⏎' in prompt[2]
        assert prompt[2].strip().startswith('⟨end⟩') == (not prompt[1])
        assert '·c\\x1b[31m\\u202e\\tccc' in chosen[2]

    write_rows('rows.jsonl', pairs((f'{i}', f'begin {"x" * 2000} end', 'short') for i in range(20)))
    dry = run(capfd, '--source=rows.jsonl', '--max_length=4000', '--dry_run')
    assert dry.count('⟨1,460 characters not shown⟩') == 3 and dry.count(' end⟨end⟩') == 3    # 2,010 less 350 and 200
    assert re.search(r'chosen, 2,011 tokens\n    begin x', dry)


@pytest.mark.parametrize('scale', [1, 40])
def test_the_histograms_count_what_a_recount_counts(capfd, scale):
    rng = np.random.default_rng(scale)
    sizes = rng.integers(1, 20 * scale, (200, 3))
    rows = [('p' * (p - 1) + str(i % 10), 'c' * c, 'r' * (r - 1) + 's') for i, (p, c, r) in enumerate(sizes)]
    write_pairs(rows, plain(5))
    dry = run(capfd, '--source=rows', f'--max_length={30 * scale}', f'--max_prompt_length={13 * scale}', '--dry_run')
    picture = dry[dry.index('before anything is cut'):dry.index('are longer than')].split('\n')
    assert max(map(len, picture)) <= 80
    prompt, chosen, rejected = sizes[:, 0], sizes[:, 1] + 1, sizes[:, 2] + 1
    columns = [prompt, chosen, rejected, prompt + np.maximum(chosen, rejected)]
    seen = np.zeros(4)
    for line in picture:
        if bin := re.match(r'up to ([\d,]+) ', line):
            high = int(bin[1].replace(',', ''))
            for k, values in enumerate(columns):
                inside = (high // 2 < values) & (values <= high)
                cell = line[12 + 17 * k:29 + 17 * k]
                assert cell.split()[-1] == f'{inside.mean():.1%}' and ('█' in cell) == inside.any()
                seen[k] += inside.sum()
    assert (seen == 200).all(), 'the bins hold everything, each once'
    assert f'{(columns[3] > 30 * scale).mean():.1%} are longer than max_length={30 * scale}' in dry
    for q in (50, 90, 99, 100):
        line = next(line for line in picture if line.startswith(f'{q}% up to'))
        ranks = [str(sorted(values)[int(np.ceil(q / 100 * 199))]) for values in columns]
        assert line[12:].replace(',', '').split() == ranks


# --- what is odd has a name and a number ----------------------------------------------------------

def numbers(text):
    return [int(n.replace(',', '')) for n in re.findall(r'[\d,]*\d', text)]


def places(text):
    return [int(n) for n in re.findall(r'\[(\d+)\]', text)]


def note(*words):
    """The one note that holds all of `words`."""
    lines = [line for line in notes() if all(word in line for word in words)]
    assert len(lines) == 1, notes()
    return lines[0]


@pytest.mark.parametrize('seed', range(3))
def test_duplicates_contradictions_and_overlap_are_those_of_a_recount(seed, capfd):
    rng = np.random.default_rng(seed)
    texts = ['yes', 'no no', 'why', 'who']
    pool = [(p, a, b) for p, a, b in itertools.product('uvwxyz', texts, texts) if a != b]
    train, val = ([pool[i] for i in rng.integers(0, len(pool), n)] + plain(100, k) for n, k in ((30, 1), (12, 2)))
    write_pairs(train, val)
    flags = ['--source=rows', '--template=Q {prompt} A']
    printed = run(capfd, *flags)
    for split, rows in (('train', train), ('val', val)):
        if repeated := len(rows) - len(set(rows)):
            line = note(f'{split}: ', 'exact duplicates')
            i, j = places(line)
            assert numbers(line)[0] == repeated and rows[i] == rows[j] and j < i
        both_ways = sum((p, b, a) in set(rows) for p, a, b in set(rows)) // 2
        if both_ways:
            line = note(f'{split}: ', 'contradictions')
            i, j = places(line)
            assert numbers(line)[0] == both_ways and rows[i] == (rows[j][0], rows[j][2], rows[j][1])
        assert repeated or both_ways
    line, seen = note('overlap'), {(p, *sorted((a, b))) for p, a, b in train}
    i, j = places(line)
    assert f'val[{i}] and train[{j}]' in line
    both = sum((p, *sorted((a, b))) in seen for p, a, b in val)
    assert numbers(line)[:3] == [sum(p in {q for q, *_ in train} for p, *_ in val), len(val), both] and both
    assert (val[i][0], *sorted(val[i][1:])) == (train[j][0], *sorted(train[j][1:]))
    assert all(f'note: {line}\n' in printed for line in notes())
    assert re.findall('^note: (.*)', run(capfd, *flags), re.M) == notes(), 'a set that is reused says them again'


def test_labels_tell_a_duplicate_from_a_contradiction_and_rankings_have_both(capfd):
    rows = [dict(prompt='p', completion='c', label=label) for label in (True, False, True)]
    more = [dict(prompt=p, completion=w, label=i % 2 == 0) for i, (p, w, _) in enumerate(plain(20))]
    write_rows('one/train.jsonl', rows + more)
    write_rows('one/val.jsonl', more[:1])
    run(capfd, '--source=one')
    assert numbers(note('train', 'exact duplicates'))[0] == 1 and numbers(note('train', 'labelled both ways'))[0] == 1
    assert numbers(note('overlap'))[:3] == [1, 1, 1]
    rankings = [['a', 'b', 'c'], ['c', 'a', 'b'], ['a', 'b', 'c'], ['a', 'b', 'd']]
    rows = [dict(prompt='p', responses=r) for r in rankings]
    write_rows('three.jsonl', rows + [dict(prompt=f'{i}', responses=['x', 'y', f'{i}']) for i in range(9)])
    run(capfd, '--source=three.jsonl', '--seed=2')
    assert numbers(note('train', 'exact duplicates'))[0] == numbers(note('train', 'contradictions'))[0] == 1


def test_messages_are_compared_like_strings(capfd):
    rows = [dict(prompt=[dict(role='user', content=question)], chosen=f'yes {i}', rejected=f'no {i}')
            for question, i in [*((f'Q{i}', i) for i in range(20)), ('Q3', 3), ('Q5', 50), ('new', 51)]]
    write_rows('rows/train.jsonl', rows[:-2])
    write_rows('rows/val.jsonl', rows[-2:])
    run(capfd, '--source=rows')
    line = note('train: ', 'exact duplicates')
    assert numbers(line)[:4] == [1, 21, 20, 3] and line.endswith("'Human: Q3 Assistant:'")
    assert numbers(note('overlap'))[:5] == [1, 2, 0, 0, 5]


def test_equal_responses_are_named_whether_dropped_or_made_equal_by_truncation(capfd):
    write_pairs(plain(30) + [('x', 'same', 'same')] * 4, [('long', 'a' * 50 + 'b', 'a' * 50 + 'c'), ('v', 'w', 'x')])
    run(capfd, '--source=rows', '--max_bad_lines=4', '--max_length=40', '--max_prompt_length=10')
    assert numbers(note('train', 'identical'))[0] == 4 and numbers(note('val', 'equal responses', 'cut'))[0] == 1


@pytest.mark.parametrize('longer, suspicious', [(100, False), (118, False), (125, True), (190, True), (60, True)])
def test_length_bias_is_always_printed_and_called_odd_only_when_large(longer, suspicious, capfd):
    rows = [(f'{i}', f'{i:03} {"long" if i < longer else ""}', f'{i:03} {"long" if i >= longer else ""}')
            for i in range(200)]
    write_pairs(rows + [(f'tie {i}', f'{i:03}', f'{i + 1:03}') for i in range(50)])
    table = table_of(run(capfd, '--source=rows'))
    assert table['chosen longer'] == [str(longer), '0'] and table['as long'] == ['50', '1']
    lines = [line for line in notes() if 'unequal length' in line]
    assert len(lines) == suspicious
    if suspicious:
        which = 'longer' if longer > 100 else 'shorter'
        assert f'{which} one in {max(longer, 200 - longer) / 200:.1%} of 200 pairs' in lines[0]


def test_one_text_too_often_and_responses_without_an_end_are_named(capfd):
    write_pairs([('' if i < 12 else f'p{i}', f'{"c" * 60} {i}', 'I cannot help.' if i % 2 else f'no {i}')
                 for i in range(40)], plain(12, 3))
    run(capfd, '--source=rows', '--max_length=30', '--max_prompt_length=5')
    prompt, rejected = note('train', "'prompt' is the same"), note('train', "'rejected' is the same")
    assert numbers(prompt)[:2] == [12, 40] and prompt.endswith("''")
    assert numbers(rejected)[:2] == [20, 40] and "'I cannot help.'" in rejected
    assert not any("'chosen' is the same" in line for line in notes())
    assert numbers(note('responses cut'))[:3] == [30, 40, 80]


@pytest.mark.parametrize('source', ['reviews', pytest.param('hh', marks=needs_hh)])
def test_nothing_is_said_of_data_in_which_nothing_is_odd(source, capfd):
    """Checked against a recount of the decoded groups."""
    flags = [f'--source={HH}', '--data_dir=harmless-base'] if source == 'hh' else ['--source=rows.jsonl']
    write_rows('rows.jsonl', pairs(plain(300)))
    run(capfd, *flags, '--max_length=100000')
    assert notes() == []
    seen = collections.Counter(tuple(piece.tobytes() for piece in group)
                               for split in ('train', 'val') for group in Groups('data/made', split))
    assert max(seen.values()) == 1 and len(seen) > 250


# --- a terminal of 80 columns ---------------------------------------------------------------------

def in_80_columns(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, 'isatty', lambda: True, raising=False)


def test_the_sentence_comes_first_and_no_line_is_wider_than_the_terminal(capfd, monkeypatch):
    in_80_columns(monkeypatch)
    write_pairs([(f'{i}? ' + 'word ' * 60, f'yes {i}' * 20, 'I cannot help with that, nor can anybody else.')
                 for i in range(40)])
    printed = run(capfd, '--source=rows', '--dry_run')
    assert printed.startswith("prompt from 'prompt', chosen from 'chosen', rejected from 'rejected'\n")
    assert 'note: ' in printed and max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize('script', [sft, dpo], ids=['sft', 'dpo'])
def test_a_log_line_breaks_between_its_columns_and_the_bar_ends_at_its_end(script, experiment, capfd, monkeypatch):
    in_80_columns(monkeypatch)
    flags = ['--init_from=out/tiny/sft', '--max_steps=3', '--batch_size=8', '--device=cpu', '--kl_prompts=4']
    script.main(['--name=tiny', '--run_name=again', *flags[:5 if script is dpo else 4]])
    out, bar = capfd.readouterr()
    assert '| 3/3 [' in bar.split('\r')[-1] + bar.split('\r')[-2]
    assert max(map(len, out.splitlines())) <= 80
    lines = re.findall(r'^(?:step|eval) .*(?:\n {15,}.*)*', out, re.M)
    assert len(lines) == 4 and (script is sft or any('\n' in line for line in lines))
    for line in lines:
        label, *columns = re.split(r' \|\s+', line)
        assert label.endswith('/3') and all(re.fullmatch(r'[a-z ]+ \S+|[\d,]+ tok/s', text) for text in columns), line
