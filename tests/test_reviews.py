"""config/reviews.py: the grammar, its exact reward, its recogniser and its noisy preference pairs."""
import collections
import math
import os
import random
import re
import runpy
import statistics
import subprocess
import sys
import types

import pytest

from conftest import ROOT

PATH = str(ROOT / 'config/reviews.py')


@pytest.fixture(scope='module')
def r():
    """The config file's globals; r.docs and r.prefs are its data for seed 0."""
    r = types.SimpleNamespace(**runpy.run_path(PATH))
    r.docs = {split: list(r.documents(split, 0)) for split in ('train', 'val')}
    r.prefs = {split: list(r.pairs(split, 0)) for split in ('train', 'val')}
    return r


def reward_of(r, pairs, side):
    return r.reward([pair['prompt'] for pair in pairs], [pair[side] for pair in pairs])


def words(text):
    return re.findall(r'\w+', text.lower())


def log_odds(r, text):
    """log P(text | z=+1) / P(text | z=-1), from the probabilities with which sentences are drawn."""
    likelihood = {1: 0.0, -1: 0.0}
    for sentence in re.split(r'(?<=[.!?]) ', text):
        kind = next(kind for kind in r.FORMS if r.ways(kind, sentence)[0])
        for z in likelihood:
            likelihood[z] += math.log(sum(r.ways(kind, sentence)[z]))
    return likelihood[1] - likelihood[-1]


# --- the header and the data ----------------------------------------------------------------------

def test_the_header_states_the_figures_of_the_log_that_it_cites_and_how_often_the_labels_are_right(r):
    log = (ROOT / 'repro/logs/quickstart.txt').read_text()
    for title in ('true reward', 'positive', 'well_formed'):
        line = re.search(rf'^{title} .*', log, re.M)[0]
        figures = [word.rstrip('%') for word in re.sub('±\\S+', '', line.removeprefix(title)).split()]
        assert re.search(rf'^    {title} +{figures[0]}%? +{figures[1]}%?$', r.__doc__, re.M), line
    kl = re.search(r'^KL from BEFORE, nats +- +(\S+)', log, re.M)[1]
    accuracy = re.findall(r'^eval .*\| acc (\S+)', log, re.M)[-1]
    assert re.search(rf'KL, nats +- +{kl} +validation accuracy {accuracy}\n', r.__doc__)
    for script, seconds in re.findall(r'^== (\w+\.py) took (\d+) s', log, re.M):
        assert re.search(rf'python {script} .* {seconds} s', r.__doc__), script
    pairs = list(r.pairs('val', 1337))
    both = zip(reward_of(r, pairs, 'chosen'), reward_of(r, pairs, 'rejected'))
    agree = statistics.mean((a > b) + 0.5 * (a == b) for a, b in both)
    assert f'agrees with {agree:.1%} of them' in r.__doc__


def test_data_depend_on_split_and_seed_alone(r):
    code = ('import itertools, runpy, sys; r = runpy.run_path(sys.argv[1]);'
            'print([list(itertools.islice(r[what](split, 0), 20))'
            '       for what in ("documents", "pairs") for split in ("train", "val")])')
    expected = [data[split][:20] for data in (r.docs, r.prefs) for split in ('train', 'val')]
    for hash_seed in '1', '2':
        out = subprocess.run([sys.executable, '-c', code, PATH], capture_output=True, text=True, check=True,
                             env=os.environ | {'PYTHONHASHSEED': hash_seed})
        assert out.stdout.strip() == str(expected)
    assert next(r.documents('train', 1)) != r.docs['train'][0]
    assert next(r.pairs('train', 1)) != r.prefs['train'][0]


def test_data_are_as_declared_reviews_of_both_polarities_and_nothing_of_train_is_in_val(r):
    assert {split: len(texts) for split, texts in r.docs.items()} == r.DOCUMENTS
    assert {split: len(pairs) for split, pairs in r.prefs.items()} == r.PAIRS
    assert not set(r.docs['train']) & set(r.docs['val'])
    prompts = {split: [pair['prompt'] for pair in pairs] for split, pairs in r.prefs.items()}
    assert not set(prompts['train']) & set(prompts['val'])
    assert len(set(prompts['val'])) == len(prompts['val'])
    assert len(set(prompts['train'])) > len(prompts['train']) / 2
    lengths = sorted(len(text.split()) for text in r.docs['train'])
    assert 20 < statistics.mean(lengths) < 45 and lengths[0] >= 15 and lengths[-1] <= 70
    assert {len(re.findall(r'[.!?]', text)) for text in r.docs['train']} == {2, 3}
    language = {word for text in r.docs['train'] for word in words(text)}
    weights = r.weights()
    assert len(language) >= 300 and set(weights) <= language, 'every word of a weight occurs'
    signs = [{weights[word] > 0 for word in words(text) if word in weights} for text in r.docs['train']]
    assert statistics.mean(len(polarities) == 2 for polarities in signs) > 0.5


# --- the pairs ------------------------------------------------------------------------------------

def test_a_pair_shares_a_prompt_of_2_to_8_words_and_its_responses_differ(r):
    sizes = collections.Counter()
    for pair in r.prefs['train'] + r.prefs['val']:
        sizes[len(pair['prompt'].split(' '))] += 1
        assert pair['prompt'] == pair['prompt'].strip()
        assert pair['chosen'] != pair['rejected']
        assert all(re.match(r' \S', pair[side]) for side in ('chosen', 'rejected'))
    assert sorted(sizes) == list(range(2, 9))
    assert max(sizes.values()) < 2 * min(sizes.values())
    pairs = r.prefs['train']
    begin = [[' '.join(pair[side].split()[:6]) for side in ('chosen', 'rejected')] for pair in pairs]
    assert statistics.mean(a == b for a, b in begin) < 0.1, 'different continuations'
    assert len({pair[side] for pair in pairs for side in ('chosen', 'rejected')}) > 1.9 * len(pairs)


def test_labels_are_as_noisy_as_bradley_terry_says_and_half_of_the_reviews_are_positive(r):
    pairs = r.prefs['train']
    gaps = [a - b for a, b in zip(reward_of(r, pairs, 'chosen'), reward_of(r, pairs, 'rejected'))]
    flip = [1 / (1 + math.exp(abs(gap))) for gap in gaps if gap]
    flipped = sum(gap < 0 for gap in gaps)
    assert abs(flipped - sum(flip)) < 4 * math.sqrt(sum(p * (1 - p) for p in flip))
    assert 0.10 < flipped / len(gaps) < 0.25
    texts = r.docs['train']
    held_out = reward_of(r, r.prefs['val'], 'chosen') + reward_of(r, r.prefs['val'], 'rejected')
    for rewards in r.reward([''] * len(texts), texts), held_out:
        assert 0.45 < statistics.mean(x > 0 for x in rewards) < 0.55
        assert statistics.mean(x == 0 for x in rewards) < 0.03


def test_a_continuation_is_as_likely_as_a_review_that_begins_so(r):
    """A prefix with its own review's rest, and with a new one, have one distribution: compare means."""
    rng, differences = random.Random(0), collections.defaultdict(list)
    for _ in range(6_000):
        text, z = r.review(rng)
        prompt = ' '.join(text.split(' ')[:rng.randint(*r.PROMPT_WORDS)])
        again, z_again = r.review(rng, prompt + ' ')
        assert again.startswith(prompt + ' ')
        known, reward, reward_again = r.reward([''] * 3, [prompt, text, again])
        moments = dict(z=z - z_again, z_if_known=known * (z - z_again), length=len(text) - len(again),
                       reward_if_known=known * (reward - reward_again))
        for part in ' about ', '?', ' one', 'has made', 'the ', ' is ':
            moments[part] = text.count(part) - again.count(part)
        for key, value in moments.items():
            differences[key].append(value)
    for key, values in differences.items():
        assert abs(statistics.mean(values)) < 4 * statistics.stdev(values) / math.sqrt(len(values)), key


def test_polarity_given_a_prefix_is_its_posterior(r):
    """Bayes' rule by hand: a prefix with one sentiment word leaves its weight as log-odds, a neutral one even odds."""
    rng, weights = random.Random(0), r.weights()
    for prompt, log_odds_of_z in {'Ines Calder has made dreadful ': weights['dreadful'], 'In The Salt Clock, ': 0.0,
                                  'The Salt Clock is a superb ': weights['superb']}.items():
        share = statistics.mean(r.review(rng, prompt)[1] == 1 for _ in range(4_000))
        assert share == pytest.approx(1 / (1 + math.exp(-log_odds_of_z)), abs=4 * 0.5 / math.sqrt(4_000)), prompt


# --- the reward -----------------------------------------------------------------------------------

def test_reward_is_the_log_odds_of_the_hidden_polarity(r):
    texts = r.docs['val'][:200]
    for text, reward in zip(texts, r.reward([''] * len(texts), texts)):
        assert reward == pytest.approx(log_odds(r, text), abs=1e-9)


def test_reward_is_calibrated(r):
    """Among reviews with a reward near x, the share whose hidden polarity is + is sigmoid(x)."""
    rng, bins = random.Random(0), collections.defaultdict(list)
    for _ in range(20_000):
        text, z = r.review(rng)
        reward, = r.reward([''], [text])
        bins[max(-5, min(5, round(reward)))].append((z == 1, 1 / (1 + math.exp(-reward))))
    assert len(bins) == 11
    for hits in bins.values():
        share, expected = (statistics.mean(column) for column in zip(*hits))
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(hits))


def test_a_words_weight_is_the_log_ratio_of_its_counts(r):
    rng, counts = random.Random(1), {1: collections.Counter(), -1: collections.Counter()}
    for _ in range(20_000):
        text, z = r.review(rng)
        counts[z].update(words(text))
    # in bare counts only words that stand alone in their form: the others depend on the words beside them
    for word in (word for pair in r.OPPOSITES['gift'].split() for word in pair.split('/')):
        a, b = counts[1][word], counts[-1][word]
        assert abs(math.log(a / b) - r.weights()[word]) < 4 * math.sqrt(1 / a + 1 / b), word


def test_reward_of_any_text_is_the_sum_over_its_words(r):
    weight = r.weights()
    texts = {'': 0.0, ' \n\t': 0.0, 'Ünïcödé 映画 🎬': 0.0, 'nothing known here': 0.0, 'superbness': 0.0,
             'superb': weight['superb'], 'SUPERB!': weight['superb'], 'superb superb': 2 * weight['superb'],
             'superb, dreadful': 0.0, 'not-superb': weight['superb'], 'awful' * 2: 0.0,
             '映画 superb—witty': weight['superb'] + weight['witty']}
    assert r.reward([''] * len(texts), list(texts)) == list(texts.values())
    assert r.reward(list(texts), [''] * len(texts)) == list(texts.values())
    assert r.reward(['a sup'], ['erb film']) == [weight['superb']]
    assert r.reward([], []) == []
    assert r.metrics([], []) == {'positive': [], 'well_formed': []}


def test_opposites_have_opposite_weights_no_word_has_two_and_none_stands_among_the_neutral(r):
    pairs = [pair.split('/') for line in r.OPPOSITES.values() for pair in line.split()]
    assert len({word for pair in pairs for word in pair}) == 2 * len(pairs)
    assert all(r.weights()[good] == -r.weights()[bad] > 0 for good, bad in pairs)
    assert max(r.weights().values()) == r.STRONG and min(abs(w) for w in r.weights().values()) == r.MILD
    forms = [re.sub(r'\{[^}]*\}', ' ', form) for forms in r.FORMS.values() for form in forms]
    verbs = re.findall(r' (\w+)/(\w+)\}', ' '.join(form for forms in r.FORMS.values() for form in forms))
    neutral = words(' '.join([*forms, *r.NEUTRAL.values(), *(verb for pair in verbs for verb in pair)]))
    assert not set(neutral) & set(r.weights())


# --- the grammar and its recogniser ---------------------------------------------------------------

def test_a_prefix_is_read_in_one_way_and_a_form_is_as_likely_under_either_polarity(r):
    for kind in r.FORMS:
        for choices, total in r.forms(kind):
            assert total == pytest.approx(r.mass(choices, 1)) == pytest.approx(r.mass(choices, -1))
            for options, *_ in choices:
                ordered = sorted(options)
                assert len(set(ordered)) == len(ordered)
                assert not any(b.startswith(a) for a, b in zip(ordered, ordered[1:]))
    for choices, _ in r.forms('opening'):
        shortest = ''.join(min(options, key=lambda text: len(text.split())) for options, *_ in choices)
        assert len(shortest.split()) > r.PROMPT_WORDS[1], 'an opening is longer than any prompt'


def test_articles_are_judged_by_sound(r):
    """The rule looks at letters: no word after {a ...} may sound otherwise than it is spelt."""
    for name in set(re.findall(r'\{a (\w+)', str(r.FORMS))):
        for word in re.findall(r'\w+', (r.OPPOSITES | r.NEUTRAL)[name]):
            assert not re.match(r'(hon|hour|heir|one|uni[cfqtv]|us[eu]|eu)', word), word


def test_every_document_pair_and_form_is_well_formed(r):
    assert all(map(r.well_formed, r.docs['train'] + r.docs['val']))
    for pairs in r.prefs.values():
        for side in 'chosen', 'rejected':
            assert all(r.metrics([pair['prompt'] for pair in pairs], [pair[side] for pair in pairs])['well_formed'])
    rng = random.Random(0)
    for kind in r.FORMS:
        for choices, _ in r.forms(kind):
            sentences = [''.join(rng.choice(options) for options, *_ in choices) for _ in range(20)]
            assert {r.sentence_pattern().fullmatch(sentence).lastgroup for sentence in sentences} == {kind}


WRONG = {'the wrong article': {'a': 'an', 'an': 'a'},
         'the wrong number': {'is': 'are', 'are': 'is', 'manages': 'manage', 'manage': 'manages'}}


def mutate(rng, text, how):
    """A text with one fault, or None where this text cannot have it."""
    parts = text.split(' ')
    i = rng.randrange(len(parts) - 1)
    if how == 'a word deleted':
        del parts[i]
    elif how == 'a word doubled':
        parts.insert(i, parts[i])
    elif how == 'two words swapped':
        parts[i:i + 2] = parts[i + 1], parts[i]
    elif how in WRONG:
        at = [i for i, word in enumerate(parts) if word in WRONG[how]]
        if not at:
            return None
        i = rng.choice(at)
        parts[i] = WRONG[how][parts[i]]
    elif how == 'a small letter at the start':
        return text[0].lower() + text[1:]
    elif how == 'the end cut':
        return text[:-rng.randint(1, 30)]
    elif how == 'a sentence too many':
        return text + ' ' + rng.choice(re.split(r'(?<=[.!?]) ', text))
    elif how == 'no verdict':
        return ' '.join(re.split(r'(?<=[.!?]) ', text)[:-1])
    elif how == 'space at the end':
        return text + ' '
    return ' '.join(parts)


@pytest.mark.parametrize('how', [
    'a word deleted', 'a word doubled', 'two words swapped', 'the wrong article', 'the wrong number',
    'a small letter at the start', 'the end cut', 'a sentence too many', 'no verdict', 'space at the end'])
def test_a_review_with_a_fault_is_not_well_formed(r, how):
    rng = random.Random(0)
    faulty = [text for text in (mutate(rng, text, how) for text in r.docs['val']) if text]
    assert len(faulty) > 300
    assert statistics.mean(map(r.well_formed, faulty)) < 0.03
