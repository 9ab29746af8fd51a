"""repro/offpolicy.py: the parts of the grammar by enumeration, a run's accuracies by hand, the page by its results."""
import functools
import json
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import offpolicy
from config import UserError, reviews
from conftest import ROOT, random_groups, save_sft, small_gpt, write_data

SEED = 3
ITEMS = {kind: set(pairs.split()) for kind, pairs in reviews.OPPOSITES.items()}


@functools.cache
def parts():
    return offpolicy.parts(SEED)


@functools.cache
def written(name, n=60):
    """n texts of a part."""
    rng = random.Random(name)
    return [parts()[name].review(rng)[0] for _ in range(n)]


def sentiment_words(texts):
    return {word for text in texts for word in re.findall(r'\w+', text.lower()) if word in reviews.weights()}


def likelihood(part, kind, sentence, z):
    """P(sentence | z), summed over all ways to write it."""
    def ways(choices, text):
        if not choices:
            return float(not text)
        (options, *_), rest = choices[0], choices[1:]
        weight = choices[0][z]
        return sum(w / sum(weight) * ways(rest, text[len(option):])
                   for option, w in zip(options, weight) if text.startswith(option))
    forms = part.forms(kind)
    return sum(ways(choices, sentence) for choices, _ in forms) / len(forms)


def test_a_part_has_two_thirds_of_everything_and_what_is_held_out_is_the_rest():
    same, new_words, new_sentences = (parts()[name] for name in ('as trained', 'only new words', 'new sentences'))
    for kind, items in ITEMS.items():
        old, new = (set(part.OPPOSITES[kind].split()) for part in (same, new_words))
        assert old | new == items and not old & new and len(new) == max(1, len(items) // 3)
    for kind, forms in reviews.FORMS.items():
        old, new = same.FORMS[kind], new_sentences.FORMS[kind]
        assert sorted(old + new) == sorted(forms) and len(new) == len(forms) // 3
    assert offpolicy.parts(SEED + 1)['as trained'].FORMS != same.FORMS
    assert reviews.FORMS['remark'] == reviews.REMARKS and len(reviews.forms('remark')) == len(reviews.REMARKS)


def test_texts_of_a_part_hold_what_it_has_and_nothing_else():
    new = sentiment_words([parts()['only new words'].OPPOSITES[kind].replace('/', ' ') for kind in ITEMS])
    for name, some_new, some_old in (('as trained', False, True), ('only new words', True, False),
                                     ('some new words', True, True), ('new sentences', False, True),
                                     ('more sentences', False, True)):
        words = sentiment_words(written(name))
        assert bool(words & new) == some_new and bool(words - new) == some_old, name
    for text in written('new sentences'):
        kinds = [re.fullmatch(parts()['as trained'].sentence_pattern(), sentence) and 'old'
                 for sentence in re.split(r'(?<=[.!?]) ', text)]
        assert reviews.well_formed(text) and set(kinds) == {None}
    for text in written('more sentences'):
        kinds = [parts()['as trained'].sentence_pattern().fullmatch(sentence).lastgroup
                 for sentence in re.split(r'(?<=[.!?]) ', text)]
        assert kinds in (['opening', *['remark'] * n, 'verdict'] for n in (2, 3))


@pytest.mark.parametrize('name', ['as trained', 'only new words', 'new sentences'])
def test_the_true_reward_is_the_log_odds_of_a_part_by_enumeration(name):
    part = parts()[name]
    for text in written(name, 20):
        odds = 0.0
        for sentence in re.split(r'(?<=[.!?]) ', text):
            kind = part.sentence_pattern().fullmatch(sentence).lastgroup
            odds += math.log(likelihood(part, kind, sentence, 1) / likelihood(part, kind, sentence, -1))
        assert odds == pytest.approx(reviews.reward([''], [text])[0], abs=1e-9)


def test_training_labels_are_bradley_terrys():
    part = parts()['as trained']
    rows = offpolicy.training_rows(part, 1500, random.Random(1))
    gaps = [np.subtract(*reviews.reward([row.prompt] * 2, row.responses)) for row in rows]
    sure = 1 / (1 + np.exp(-np.abs(gaps)))
    right = (np.array(gaps) > 0) + 0.5 * (np.array(gaps) == 0)
    assert abs(right.mean() - sure.mean()) < 4 * math.sqrt((sure * (1 - sure)).mean() / len(rows))
    assert 0.7 < right.mean() < 0.95 and not any(reviews.held_out(row.prompt) for row in rows)
@pytest.fixture
def bytes_of_reviews(tmp_path, monkeypatch):
    """data/reviews in bytes and out/reviews/sft, a random model with room for them."""
    monkeypatch.chdir(tmp_path)
    groups = random_groups(8, 2, np.random.default_rng(0))
    write_data('data/reviews', {'train': groups, 'val': groups}, max_length=1000)
    save_sft(small_gpt(block_size=1000), folder='out/reviews/sft')
    return tmp_path


def test_judged_pairs_are_new_in_their_band_the_better_first_and_no_longer_than_asked(bytes_of_reviews):
    part = parts()['more sentences']
    for prompt, *responses in offpolicy.judged_groups(offpolicy.Task('reviews'), part, 30, random.Random(2), 330):
        texts = [bytes(list(ids)).decode() for ids in (prompt, *(response[:-1] for response in responses))]
        assert reviews.held_out(texts[0]) and all(response[-1] == 256 for response in responses)
        assert 1 <= np.subtract(*reviews.reward([texts[0]] * 2, texts[1:])) <= 3
        assert len(prompt) + max(map(len, responses)) <= 330
        assert all(len(re.findall('[.!?]', texts[0] + text)) >= 4 for text in texts[1:])


@torch.no_grad()
def by_hand(judge, model, reference, group, beta):
    """The margin of a pair, one sequence at a time, with no packing and no code of the project but the model."""
    prompt, *responses = [list(piece) for piece in group]
    rewards = []
    for response in responses:
        ids = torch.tensor([prompt + response])
        causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        states = [m(ids, torch.arange(ids.shape[1])[None], causal)[0] for m in (model, reference)]
        if judge == 'explicit':
            rewards.append((states[0][-1] @ model.reward.weight[0]).item())
            continue
        logps = [F.log_softmax(h.double() @ m.wte.weight.double().T, -1)[:-1].gather(-1, ids[0, 1:, None])
                 for h, m in zip(states, (model, reference))]
        rewards.append(beta * (logps[0] - logps[1])[len(prompt) - 1:].sum().item())
    return rewards[0] - rewards[1]


def test_a_run_writes_its_files_and_its_accuracies_are_those_counted_by_hand(bytes_of_reviews, monkeypatch, capsys):
    judged = []

    def drawn(task, policy, part, n, rng, seed):
        return offpolicy.judged_groups(task, part, n, rng, 1000)

    @functools.wraps(offpolicy.margins_of)
    def kept(*judging, real=offpolicy.margins_of):
        margins = real(*judging)
        judged.append((judging, margins))
        return margins

    monkeypatch.setattr(offpolicy, 'RATES', (1e-3, 5e-3))
    monkeypatch.setattr(offpolicy, 'drawn_groups', drawn)
    monkeypatch.setattr(offpolicy, 'margins_of', kept)
    offpolicy.main(['--seeds=2', '--pairs=18', '--judged=4', '--batch_size=3', '--beta=0.3', '--out=few'])
    said = capsys.readouterr().out
    assert (bytes_of_reviews / 'few.md').read_text() in said
    assert (bytes_of_reviews / 'few.png').stat().st_size > 10_000
    report = json.loads((bytes_of_reviews / 'few.json').read_text())
    assert [(row['judge'], row['rate']) for row in report['rates']] == [
        ('implicit', 1e-3), ('implicit', 5e-3), ('explicit', 1e-3), ('explicit', 5e-3)]
    rows = report['rates'] + report['runs']
    assert len(rows) == len(judged) == 4 + 2 * 2 * 7
    moved = set()
    for row, ((judge, model, _, reference, groups, beta), margins) in zip(rows, judged):
        expected = [by_hand(judge, model, reference, group, beta) for group in groups]
        np.testing.assert_allclose(margins, expected, rtol=2e-3, atol=2e-4)
        assert row['judge'] == judge and beta == 0.3
        assert row['accuracy'] == np.mean([1 if h > 0 else 0.5 if h == 0 else 0 for h in margins])
        moved.add((judge, bool(np.abs(margins).max() > 1e-3)))
    assert moved == {('implicit', True), ('explicit', True)}
    with pytest.raises(SystemExit) as caught:
        offpolicy.main(['--pairs=15', '--batch_size=3'])
    assert 'too few' in caught.value.code


class Drawer:
    """A task whose policy answers with words of known weight, so each pair is known."""
    def __init__(self, task, answers):
        self.tokenizer, self.val, self.answers = task.tokenizer, task.val, answers

    def draw(self, policy, prompts, seed):
        return [list(self.answers[i % len(self.answers)].encode()) for i in range(len(prompts))]

    def score(self, prompts, responses):
        texts = [bytes(response).decode() for response in responses]
        return dict(true_reward=np.array(reviews.reward([''] * len(texts), texts)))


def test_of_the_policys_samples_a_pair_in_the_band_is_taken_the_better_one_first(bytes_of_reviews):
    task = offpolicy.Task('reviews')
    part = parts()['as trained']
    answers = [' gem', ' superb', ' dud', ' x']         # some pairs of weights are too close, one is too far
    weight = dict(zip(answers, reviews.reward([''] * 4, answers)))
    fitting = {(a, b) for a in answers for b in answers if 1 <= weight[a] - weight[b] <= 3}
    assert 0 < len(fitting) < 6
    groups = offpolicy.drawn_groups(Drawer(task, answers), None, part, 80, random.Random(0), 1)
    assert len(groups) == 80 and {tuple(bytes(r).decode() for r in group[1:]) for group in groups} == fitting
    with pytest.raises(UserError) as caught:
        offpolicy.drawn_groups(Drawer(task, [' x']), None, part, 5, random.Random(0), 1)
    assert 'raise --judged' in caught.value.message


def test_the_page_has_the_numbers_of_the_results():
    report = json.loads((ROOT / 'repro/results/offpolicy.json').read_text())
    said = offpolicy.text(report['runs'], report['rates'])
    assert said == (ROOT / 'repro/results/offpolicy.md').read_text()
    accuracy = {name: {judge: 100 * np.array([row['accuracy'] for row in report['runs']
                                              if (row['judged'], row['judge']) == (name, judge)])
                       for judge in ('implicit', 'explicit')} for name in (offpolicy.SAME, *offpolicy.SHIFTS)}
    page = (ROOT / 'repro/README.md').read_text()
    for name, sides in accuracy.items():
        values = [sides['implicit'], sides['explicit'], sides['implicit'] - sides['explicit']]
        assert all(len(v) == 5 for v in values)
        halves = [2.78 * v.std(ddof=1) / math.sqrt(5) for v in values]         # Student's t, 4 degrees of freedom
        cells = [f'{v.mean():{form}} ± {half:.1f}' for v, half, form in zip(values, halves, ('.1f', '.1f', '+.1f'))]
        assert f'| {name} | ' + ' | '.join(cells) + ' |' in page, (name, cells)
