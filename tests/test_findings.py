"""The summary that opens repro/README.md: each number is one of the results files', each finding has its section."""
import json
import math
import re
import statistics

import numpy as np
import pytest

from conftest import ROOT

PAGE = (ROOT / 'repro/README.md').read_text(encoding='utf-8')
OPENING = PAGE[:PAGE.index('\n## ')]
LINES = [line for line in OPENING.splitlines() if line.startswith('| [')]
ROWS = [[cell.strip() for cell in line.strip('|').split('|')] for line in LINES]
STUDENT = {3: 4.30, 5: 2.78}                        # 97.5%, by seeds


def results(name):
    return json.loads((ROOT / f'repro/results/{name}.json').read_text())


def of(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def error(values, form='.2f'):
    """Mean and standard error over seeds, as on the page."""
    return [f'{np.mean(values):{form}}', f'{statistics.stdev(values) / math.sqrt(len(values)):{form.lstrip("+")}}']


def interval(values, form='.2f'):
    """Mean and half a 95% interval over seeds, as on the page."""
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return [f'{np.mean(values):{form}}', f'{half:{form.lstrip("+")}}']


def optimum():
    rows = results('optimum')['expected']
    distance, fit = ([row[key] for row in rows] for key in ('kl_optimum', 'correlation'))
    return [f'{min(distance):.4f}', f'{max(distance):.4f}', f'{min(fit):.3f}', f'{max(fit):.4f}']


def frontier(other):
    """DPO's best reward within 2 and 8 nats less that of another method, by seed."""
    runs = results('frontier')

    def best(method, seed, budget):
        return max(point['true_reward'] for run in runs if (run['job']['method'], run['job']['seed']) == (method, seed)
                   for point in run['points'] if point['kl'] <= budget)
    numbers = []
    for budget in (2, 8):
        lead = [best('dpo', seed, budget) - best(other, seed, budget) for seed in (1, 2, 3)]
        numbers += [*error(lead, '+.2f'), str(budget)]
    return numbers


def temperature():
    curves = results('temperature')['curves']
    methods = 'DPO, beta 1', 'PPO, learned reward, target KL 6'
    return ['0', '1', *(f'{100 * curves[method][i][0]:.1f}' for method in methods for i in (0, -1))]


def gradient():
    runs = results('gradient')
    step = runs['dpo'][-1]['step']
    return [str(step), *(f'{100 * runs[name][-1]["well_formed"]:.0f}' for name in ('dpo', 'unweighted'))]


def chosen_falls():
    first, last = results('gradient')['dpo'][0], results('gradient')['dpo'][-1]
    return [*(f'{point["chosen"]:.1f}' for point in (first, last)),
            *(f'{point["true_reward"]:+.1f}' for point in (first, last))]


def last_points(labels, method):
    return [run['points'][-1] for run in results('family')
            if (run['job'].get('labels'), run['job']['method']) == (labels, method)]


def over_training():
    few = [last_points('few', method) for method in ('dpo', 'ipo', 'cdpo')]
    return ['16', '250', *(f'{np.mean([p["kl"] for p in points]):.1f}' for points in few),
            *(f'{100 * np.mean([p["well_formed"] for p in points]):.0f}' for points in few)]


def diverse():
    return ['3', *(f'{100 * np.mean([p["distinct_3"] for p in last_points("clean", method)]):.1f}'
                   for method in ('dpo', 'forward_kl', 'js_divergence'))]


def flipped():
    return ['20', *(part for method in ('dpo', 'cdpo', 'robust')
                    for part in error([p['true_reward'] for p in last_points('flipped', method)], '+.2f'))]


def online():
    numbers = []
    for method in ('fixed', 'offline'):
        points = [run['points'][-1] for run in results('iterative') if run['job']['method'] == method]
        numbers += [*error([p['true_reward'] for p in points], '+.2f'), f'{np.mean([p["kl"] for p in points]):.1f}']
    return numbers


def misspecification():
    worlds = results('pathologies')['misspecification']
    below, equal = (f'{100 * worlds[i]["below"]:.1f}' for i in (-1, 0))
    return [below, f'{100 * worlds[-1]["share"]:.0f}', equal]


def labels():
    rows = results('pathologies')['labels']
    stops = [f'{row["step_10000"]:.4f}' for loss in ('DPO', 'IPO') for row in rows if row['loss'] == loss]
    return [*stops[:3], '0.1', '0.5', '1', *stops[3:]]


def squeezing():
    before, after = (of(results('pathologies')['one_layer'], what='pushed')[0][key] for key in ('before', 'after'))
    return [f'{100 * before[-1]:.0f}', f'{before[0]:.2f}', f'{after[0]:.2f}']


def ches():
    moves = results('pathologies')['displacement']
    return [part for name in ('CHES', 'shared tokens') for part in interval([row[name] for row in moves], '+.2f')]


def over_optimisation():
    rows = results('pathologies')['over_optimisation']
    start = {row['seed']: row['reward'][0] for row in rows if row['method'] == 'DPO'}
    numbers = []
    for method in ('DPO', 'chi-PO'):
        curves = of(rows, method=method)
        steps = min(len(row['reward']) for row in curves)
        for share in (0.2, 0.4, 1.0):
            at = round(share * (steps - 1))
            numbers.append(interval([row['reward'][at] - start[row['seed']] for row in curves], '+.2f')[0])
    return ['20', '40', '100', *numbers]


def length():
    rows = results('pathologies')['length_at_level']
    return ['1.5', *(f'{np.mean([row["length"] for row in of(rows, method=method)]):.1f}'
                     for method in ('optimum', 'DPO', 'length-desensitised', 'SimPO'))]


def right_by_likelihood():
    rows = results('pathologies')['accuracy']
    shares = [[f'{100 * np.mean([row[f"{who}_likelihood"] for row in of(rows, beta=beta)]):.1f}'
               for beta in (0.1, 0.5, 1.0)] for who in ('dpo', 'optimum')]
    return ['0.1', '0.5', '1', *shares[0], *shares[1]]


def credit():
    rows = results('credit')['worlds']
    pairs = {method: [row['correlation'] for row in of(rows, method=method, n=100_000)] for method in ('DPO', 'KTO')}
    return ['100,000', *interval(pairs['DPO'], '.3f'), *interval(pairs['KTO'])]


def delta():
    rows = of(results('delta')['runs'], band=[-3.0, -1.5])
    return [part for method in ('DPO', 'SFT')
            for part in interval([row['gain'] for row in of(rows, method=method)], '+.2f')]


def offpolicy():
    rows = results('offpolicy')['runs']

    def lead(name):
        sides = [[row['accuracy'] for row in of(rows, judged=name, judge=judge)] for judge in ('implicit', 'explicit')]
        return interval([100 * (a - b) for a, b in zip(*sides)], '+.1f')
    return [*lead('more sentences'), *lead('new sentences'), *lead('as trained')]


def hh():
    table = (ROOT / 'repro/results/hh_cpu.md').read_text()
    rows = [re.split(r' \| | to ', line) for line in table.splitlines() if 'reward' in line]
    return ['155', *(number for _, _, accuracy, low, high, *_ in rows for number in (accuracy, low, high))]


def speed():
    on_cpu, = of(results('throughput-cpu')['train'], contender='ours')
    on_gpu, = of(results('gpu/throughput-gpt2')['train'], contender='ours')
    return ['2', f'{on_cpu["times_trl"]:.1f}', f'{on_cpu["times_trl-best"]:.1f}', f'{on_gpu["times_trl"]:.1f}']


def nothing():
    return []


def faults():
    assert not any(trial['wrong'] for trial in results('faults'))
    return []


MEASURED = {            # the beginning of a claim -> the numbers of its cell, in order
    'Gradient descent': optimum, 'DPO beats PPO]': lambda: frontier('ppo'),
    'DPO beats PPO-GT': lambda: frontier('ppo_gt'), 'DPO equals': lambda: frontier('best_of_n'),
    'Temperature hurts': temperature, 'Without its weight': gradient, 'Log pi(chosen)': chosen_falls,
    'DPO over-fits': over_training, 'Losses for flipped': flipped, 'Other divergences': diverse, 'Online': online,
    'DPO ends below': misspecification, 'Without noise': labels, 'Pushing a token': squeezing,
    'The CHES': ches, 'The true reward': over_optimisation, 'Labels\' bias': length, 'After DPO': right_by_likelihood,
    'A token\'s log-ratio': credit, 'Pairs worse': delta, 'The implicit reward': offpolicy, 'On real text': hh,
    'Shared prompts': speed, 'Four nodes': nothing, 'What breaks': faults}


@pytest.mark.parametrize('start', MEASURED)
def test_the_numbers_of_a_finding_are_those_of_the_results(start):
    row, = [row for row in ROWS if row[0].startswith(f'[{start}')]
    assert re.findall(r'(?<![\w.])[+-]?\d[\d,.]*(?<![,.])', row[2]) == MEASURED[start](), row


def test_each_finding_has_its_section_its_source_and_a_verdict():
    assert len(ROWS) == len(MEASURED)
    for claim, source, _, verdict in ROWS:
        assert re.fullmatch(r'\[.+\]\(#[\w-]+\)', claim), claim
        assert source == 'ours' or re.fullmatch(r'\d{4}\.\d{5}(, \d{4}\.\d{5})?', source), source
        assert verdict.startswith(('yes', 'no', 'in part')), verdict
    sections = set(re.findall(r'\((#[\w-]+)\)', OPENING))
    figures = re.findall(r'(?m)^## (.*)\n\n!\[', PAGE)          # a section with a figure has results
    assert {'#' + re.sub(r'[^\w\- ]', '', name.lower()).replace(' ', '-') for name in figures} <= sections


def test_the_summary_fits_a_screen_of_45_lines_and_100_columns():
    shown = [re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', line) for line in OPENING.strip().splitlines()]
    assert sum(max(1, math.ceil(len(line) / 100)) for line in shown) <= 45
