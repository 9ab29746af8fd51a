"""prepare_prefs.py --dry_run and its notes: it says what the run will do, names what is odd, and writes nothing."""
import collections
import itertools
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

import prepare_prefs
from conftest import SHARED
from prepare_prefs import Groups, read_meta

HH = SHARED / 'data' / 'hh-rlhf'


@pytest.fixture(autouse=True)
def in_a_fresh_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))


def write_jsonl(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(''.join(json.dumps(row) + '\n' for row in rows))


def pairs(texts):
    return [dict(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in texts]


def run(capfd, *flags, name='made', tokenizer='bytes'):
    """What prepare_prefs.py prints here, from its table on or after 'nothing will be written'."""
    prepare_prefs.main([f'--name={name}', f'--tokenizer={tokenizer}', *flags])
    return re.split(r'making data/.*\n|nothing will be written\n', capfd.readouterr().out)[-1]


def verdict(printed):
    """The table and the notes."""
    lines = printed.split('\n')
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ['train'] or line.split()[:2] == ['train', 'val'])
    return [line for line in lines[start:] if line.strip() and not re.match('data/|nothing was written', line)]


def notes(name='made'):
    return read_meta(f'data/{name}')['notes']


def plain(n, seed=0):
    """n pairs in which nothing is odd."""
    rng = np.random.default_rng(seed)
    return [(f'What is {i + 10_000 * seed}?', 'yes ' * rng.integers(1, 9) + f'{i}', 'no ' * rng.integers(1, 11) + f'{i}') for i in range(n)]


# -----------------------------------------------------------------------------
# a dry run is the run, without its files

KINDS = {
    'pairs': lambda: pairs(plain(60) + plain(3)),
    'rankings': lambda: [dict(prompt=p, responses=[w, l, w + l]) for p, w, l in plain(40)],
    'unpaired': lambda: [dict(prompt=p, completion=w, label=len(w) % 3 > 0) for p, w, l in plain(40)],
}


@pytest.mark.parametrize('source', [*KINDS, pytest.param('hh', marks=pytest.mark.skipif(not HH.is_dir(), reason='the HH sample is not here'))])
def test_a_dry_run_says_what_the_run_then_does_and_writes_nothing(source, capfd):
    flags = ['--source=rows.jsonl', '--max_length=40', '--max_prompt_length=8']
    if source == 'hh':
        flags = [f'--source={HH}', '--data_dir=harmless-base', '--max_length=600', '--max_prompt_length=100', '--tokenizer=bpe:300', '--documents=chosen']
    else:
        write_jsonl('rows.jsonl', KINDS[source]())
    before = sorted(Path().rglob('*'))
    dry = run(capfd, *flags, '--dry_run')
    assert sorted(Path().rglob('*')) == before, 'nothing under data/, nothing left in temporary places'
    real = run(capfd, *flags)
    assert verdict(dry) == verdict(real) and len(verdict(dry)) > 8
    assert dry.rstrip().split('\n')[-1] == ('nothing was written; this writes data/made: python prepare_prefs.py --name=made --tokenizer=bytes '
                                            + ' '.join(flags))
    old = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path('data/made').iterdir()}
    run(capfd, *flags, '--seed=3', '--dry_run')
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path('data/made').iterdir()} == old
    assert 'is reused' in run(capfd, *flags), 'a dry run is no other knob'


def test_what_stops_the_run_stops_a_dry_run_and_leaves_nothing(capfd):
    write_jsonl('rows.jsonl', pairs(plain(20) + [('x', 'same', 'same')]))
    before = sorted(Path().rglob('*'))
    for flags, message in ((['--source=rows.jsonl'], 'line 21'), (['--policy=p', '--reward=r', '--source=data/x'], 'dry_run reads a source')):
        with pytest.raises(SystemExit, match=message) as stop:
            prepare_prefs.main(['--name=made', '--dry_run', *flags] + ['--tokenizer=bytes'] * (len(flags) == 1))
        assert '\n' not in stop.value.code
    assert sorted(Path().rglob('*')) == before


def test_three_groups_are_shown_as_training_sees_them(capfd, monkeypatch):
    rows = [('P' * i + '\n', ' c\x1b[31m\u202e\t' + 'c' * 12, 'r' * (2 * i)) for i in range(5, 45)]
    write_jsonl('rows.jsonl', pairs(rows))
    flags = ['--source=rows.jsonl', '--max_length=60', '--max_prompt_length=20', '--template=<|endoftext|>{prompt}']
    dry = run(capfd, *flags, '--dry_run')
    assert '\x1b' not in dry and '\u202e' not in dry
    monkeypatch.setattr(prepare_prefs.sys.stdout, 'isatty', lambda: True, raising=False)
    coloured = run(capfd, *flags, '--dry_run')
    assert '\x1b[32m' in coloured and '\x1b[31m' in coloured and '\x1b[34m' in coloured
    assert re.sub('\x1b\\[\\d+m', '', coloured) == dry, 'the same without colours'
    monkeypatch.setenv('NO_COLOR', '1')
    assert run(capfd, *flags, '--dry_run') == dry

    run(capfd, *flags)
    groups = Groups('data/made', 'train')
    shown = [int(i) for i in re.findall(r'train\[(\d+)\] of', dry)]
    assert len(set(shown)) == 3 and shown == [int(i) for i in re.findall(r'train\[(\d+)\] of', run(capfd, *flags, '--dry_run'))]
    blocks = re.split(r'train\[\d+\] of.*\n', dry)[1:]
    for i, block in zip(shown, blocks):
        prompt, chosen, rejected = re.findall(r'  (?:prompt|chosen|rejected), (\d+) tokens?(?: and (\d+) cut)?\n((?:    .*\n?)+)', block)
        assert [int(n) for n, _, _ in (prompt, chosen, rejected)] == [len(piece) for piece in groups[i]]
        assert ('⟨end⟩' in rejected[2]) == (groups[i][2][-1] == 256) == (not rejected[1])
        assert ('cut⟩' in prompt[2]) == bool(prompt[1]) and '⏎' in prompt[2]
        assert prompt[2].strip().startswith('⟨end⟩') == (not prompt[1])
        assert '·c\\x1b[31m\\u202e\\tccc' in chosen[2]


def test_long_texts_are_shortened_in_the_middle_and_say_by_how_much(capfd):
    write_jsonl('rows.jsonl', pairs([(f'{i}', f'begin {"x" * 2000} end', 'short') for i in range(20)]))
    dry = run(capfd, '--source=rows.jsonl', '--max_length=4000', '--dry_run')
    assert dry.count('⟨1,460 characters not shown⟩') == 3 and dry.count(' end⟨end⟩') == 3      # 2,010 less 350 and 200
    assert re.search(r'chosen, 2,011 tokens\n    begin x', dry)


@pytest.mark.parametrize('scale', [1, 40])
def test_the_histograms_count_what_a_recount_counts(capfd, scale):
    rng = np.random.default_rng(scale)
    sizes = rng.integers(1, 20 * scale, (200, 3))
    write_jsonl('data_in/train.jsonl', pairs([('p' * (p - 1) + str(i % 10), 'c' * c, 'r' * (r - 1) + 's') for i, (p, c, r) in enumerate(sizes)]))
    write_jsonl('data_in/val.jsonl', pairs(plain(5)))
    dry = run(capfd, '--source=data_in', f'--max_length={30 * scale}', f'--max_prompt_length={13 * scale}', '--dry_run')
    picture = dry[dry.index('before anything is cut'):dry.index('longest    ')].split('\n')
    assert max(map(len, dry[:dry.index('nothing was written')].split('\n'))) <= 80
    prompt, chosen, rejected = sizes[:, 0], sizes[:, 1] + 1, sizes[:, 2] + 1
    columns = [prompt, chosen, rejected, prompt + np.maximum(chosen, rejected)]
    seen = np.zeros(4)
    for line in picture:
        if bin := re.match(r'([\d,]+)(?:-([\d,]+))? ', line):
            low, high = (int((n or bin[1]).replace(',', '')) for n in bin.groups())
            for k, values in enumerate(columns):
                share = line[12 + 17 * k:29 + 17 * k].split()[1:] or ['0.0%']
                assert share == [f'{((low <= values) & (values <= high)).mean():.1%}']
                seen[k] += ((low <= values) & (values <= high)).sum()
    assert (seen == 200).all(), 'the bins hold everything, each once'
    assert f'-- max_prompt_length={13 * scale} -- {(prompt > 13 * scale).mean():.1%} of the prompts are longer' in dry
    assert f'-- max_length={30 * scale} -- {(columns[3] > 30 * scale).mean():.1%} of the groups are longer' in dry
    for q, label in ((50, '50% up to'), (90, '90% up to'), (99, '99% up to'), (100, 'longest')):
        line = next(line for line in dry.split('\n') if line.startswith(label))
        assert line[12:].replace(',', '').split() == [str(sorted(values)[int(np.ceil(q / 100 * 199))]) for values in columns]


# -----------------------------------------------------------------------------
# what is odd has a name and a number

def numbers(text):
    return [int(n.replace(',', '')) for n in re.findall(r'[\d,]*\d', text)]


def note(*words, name='made'):
    """The one note that holds all of `words`."""
    found = [line for line in notes(name) if all(word in line for word in words)]
    assert len(found) == 1, notes(name)
    return found[0]


@pytest.mark.parametrize('seed', range(3))
def test_duplicates_contradictions_and_overlap_are_those_of_a_recount(seed, capfd):
    rng = np.random.default_rng(seed)
    some = [(p, a, b) for p, a, b in itertools.product('uvwxyz', ['yes', 'no no', 'why', 'who'], ['yes', 'no no', 'why', 'who']) if a != b]
    train, val = ([some[i] for i in rng.integers(0, len(some), n)] + plain(100, k) for n, k in ((30, 1), (12, 2)))
    write_jsonl('both/train.jsonl', pairs(train))
    write_jsonl('both/val.jsonl', pairs(val))
    printed = run(capfd, '--source=both', '--template=Q {prompt} A')
    for split, rows in (('train', train), ('val', val)):
        if repeated := len(rows) - len(set(rows)):
            line = note(f'{split}: ', 'exact duplicates')
            first, *_ = numbers(line)
            i, j = (int(n) for n in re.findall(rf'{split}\[(\d+)\]', line))
            assert first == repeated and rows[i] == rows[j] and j < i
        both_ways = sum((p, b, a) in set(rows) for p, a, b in set(rows)) // 2
        if both_ways:
            line = note(f'{split}: ', 'contradictions')
            i, j = (int(n) for n in re.findall(rf'{split}\[(\d+)\]', line))
            assert numbers(line)[0] == both_ways and rows[i] == (rows[j][0], rows[j][2], rows[j][1])
        assert repeated or both_ways
    line, seen = note('overlap'), {(p, *sorted((a, b))) for p, a, b in train}
    i, j = int(re.search(r'val\[(\d+)\]', line)[1]), int(re.search(r'train\[(\d+)\]', line)[1])
    whole = sum((p, *sorted((a, b))) in seen for p, a, b in val)
    assert numbers(line)[:3] == [sum(p in {q for q, *_ in train} for p, *_ in val), len(val), whole] and whole
    assert (val[i][0], *sorted(val[i][1:])) == (train[j][0], *sorted(train[j][1:]))
    assert all(f'note: {line}\n' in printed for line in notes())
    assert [line for line in run(capfd, '--source=both', '--template=Q {prompt} A').split('\n') if 'note' in line] == [
        f'note: {line}' for line in notes()], 'a set that is reused says them again'


def test_labels_tell_a_duplicate_from_a_contradiction_and_rankings_have_both(capfd):
    rows = [dict(prompt='p', completion='c', label=label) for label in (True, False, True)]
    more = [dict(prompt=p, completion=w, label=i % 2 == 0) for i, (p, w, _) in enumerate(plain(20))]
    write_jsonl('one/train.jsonl', rows + more)
    write_jsonl('one/val.jsonl', more[:1])
    run(capfd, '--source=one')
    assert numbers(note('train', 'exact duplicates'))[0] == 1 and numbers(note('train', 'labelled both ways'))[0] == 1
    assert numbers(note('overlap'))[:3] == [1, 1, 1]
    rankings = [['a', 'b', 'c'], ['c', 'a', 'b'], ['a', 'b', 'c'], ['a', 'b', 'd']]
    write_jsonl('three.jsonl', [dict(prompt='p', responses=r) for r in rankings] + [dict(prompt=f'{i}', responses=['x', 'y', f'{i}']) for i in range(9)])
    run(capfd, '--source=three.jsonl', '--seed=2', name='three')
    assert numbers(note('train', 'exact duplicates', name='three'))[0] == 1
    assert numbers(note('train', 'contradictions', name='three'))[0] == 1


def test_equal_responses_are_named_whether_dropped_or_made_equal_by_truncation(capfd):
    write_jsonl('rows/train.jsonl', pairs(plain(30) + [('x', 'same', 'same')] * 4))
    write_jsonl('rows/val.jsonl', pairs([('long', 'a' * 50 + 'b', 'a' * 50 + 'c'), ('v', 'w', 'x')]))
    run(capfd, '--source=rows', '--max_bad_lines=4', '--max_length=40', '--max_prompt_length=10')
    assert numbers(note('train', 'identical'))[0] == 4 and numbers(note('val', 'equal responses', 'cut'))[0] == 1


@pytest.mark.parametrize('longer, suspicious', [(100, False), (118, False), (125, True), (190, True), (60, True)])
def test_length_bias_is_always_printed_and_called_odd_only_when_large(longer, suspicious, capfd):
    rows = [(f'{i}', f'{i:03} {"long" if i < longer else ""}', f'{i:03} {"long" if i >= longer else ""}') for i in range(200)]
    rows += [(f'tie {i}', f'{i:03}', f'{i + 1:03}') for i in range(50)]
    write_jsonl('rows/train.jsonl', pairs(rows))
    write_jsonl('rows/val.jsonl', pairs([('v', 'w', 'x')]))
    printed = run(capfd, '--source=rows')
    table = {line[:15].strip(): line[15:].split() for line in printed.split('\n')}
    assert table['chosen longer'] == [f'{longer / 250:.1%}', '0.0%'] and table['equally long'] == ['20.0%', '100.0%']
    found = [line for line in notes() if 'unequal length' in line]
    assert len(found) == suspicious
    if suspicious:
        assert f'{"longer" if longer > 100 else "shorter"} one in {max(longer, 200 - longer) / 200:.1%} of 200 pairs' in found[0]


def test_one_text_too_often_and_responses_without_an_end_are_named(capfd):
    rows = [('' if i < 12 else f'p{i}', f'{"c" * 60} {i}', 'I cannot help.' if i % 2 else f'no {i}') for i in range(40)]
    write_jsonl('rows/train.jsonl', pairs(rows))
    write_jsonl('rows/val.jsonl', pairs(plain(12, 3)))
    run(capfd, '--source=rows', '--max_length=30', '--max_prompt_length=5')
    assert numbers(note('train', 'the same prompt'))[:2] == [12, 40] and note('the same prompt').endswith("''")
    assert numbers(note('train', 'the same rejected response'))[:2] == [20, 40] and "'I cannot help.'" in note('the same rejected response')
    assert not any('the same chosen' in line for line in notes())
    assert numbers(note('responses cut'))[1:3] == [40, 80]


@pytest.mark.parametrize('source', ['reviews', pytest.param('hh', marks=pytest.mark.skipif(not HH.is_dir(), reason='the HH sample is not here'))])
def test_nothing_is_said_of_data_in_which_nothing_is_odd(source, capfd):
    """Checked against a recount of the decoded groups."""
    flags = [f'--source={HH}', '--data_dir=harmless-base'] if source == 'hh' else ['--source=rows.jsonl']
    write_jsonl('rows.jsonl', pairs(plain(300)))
    run(capfd, *flags, '--max_length=100000')
    assert notes() == []
    seen = collections.Counter(tuple(bytes(int(t) % 256 for t in piece) for piece in group) for split in ('train', 'val') for group in Groups('data/made', split))
    assert max(seen.values()) == 1 and os.path.isdir('data/made')
