"""The accuracies and differences that README and docs/ state are in the committed results.

The table of README is compared cell by cell; of an interval in a text it is checked that some difference has it, not which.
"""

import itertools
import json
import re
import statistics
from pathlib import Path

import pytest
from scipy.stats import t

import train_distill

ROOT = Path(train_distill.__file__).parent
SUITES = json.loads((ROOT / 'benchmarks' / 'results' / 'accuracy.json').read_text())['suites']
COLUMNS = ['cifar10_resnet_10', 'cifar10_resnet', 'cifar10_resnet_90', 'cifar10_resnet_adamw', 'emoji_equal']
ROWS = {
    'student alone': 'alone',
    'taught without a projector': 'no_projector',
    'with one projector': 'pe_q1',
    'with three, the default': 'pe_q3',
}
INTERVAL = re.compile(r'(?<![\d.])([+-]?\d+\.\d+)(?: points)? \[([+-]?\d+\.\d+), ([+-]?\d+\.\d+)\]')


def differences() -> set[tuple[float, ...]]:
    """Mean and 95 % interval of each difference of two methods of one student over the seeds they share, to one and two places."""
    by_seed = [
        (suite['student'], suite['common']['data_dir'], dict(zip(found['seeds'], found['top1_of_seeds'], strict=True)))
        for suite in SUITES.values()
        for found in suite['methods'].values()
    ]
    found = set()
    for (student, data, a), (other, same_data, b) in itertools.permutations(by_seed, 2):
        values = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
        if (student, data) == (other, same_data) and len(values) > 1:
            mean = statistics.mean(values)
            half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
            found |= {tuple(round(x, places) + 0.0 for x in (mean, mean - half, mean + half)) for places in (1, 2)}
    return found


def section(page: str, title: str) -> str:
    return (ROOT / page).read_text().partition(f'\n## {title}\n')[2].partition('\n## ')[0]


def test_the_table_of_the_readme_has_the_means_and_seeds_of_the_results():
    lines = [
        line.strip('|').split('|') for line in section('README.md', 'What to expect').splitlines() if line[:1] == '|'
    ]
    head, table = lines[0][1:], {name.strip(): [v.strip(' *') for v in values] for name, *values in lines[2:]}
    assert [f'{SUITES[name]["teacher"]["top1"]:.1f}' for name in COLUMNS] == table['the teacher']
    for row, method in ROWS.items():
        assert table[row] == [f'{SUITES[name]["methods"][method]["top1"]:.1f}' for name in COLUMNS]
        for title, name in zip(head, COLUMNS, strict=True):
            found = SUITES[name]['methods'][method]
            assert title.strip().endswith(f'{SUITES[name]["common"]["epochs"]} epochs, {len(found["seeds"])} seeds')


METHODS = {
    '3 projectors, MSE': ('pe_mse', 25),
    '3 projectors': ('pe_q3', 25),
    'linear projector with batch norms, log-sum': ('bn_logsum', None),
    'no projector': ('no_projector', 25),
    "timm's feature distillation": ('timm_fd', None),
    'KD (T = 4)': ('kd', 0.9),
    'DIST (T = 4)': ('dist', None),
    'orthogonal projector, teacher layer-normalized': ('orthogonal_layer', 1),
    'the same, whitened over batches of 64': ('orthogonal_whiten', None),
}


def test_the_table_of_methods_has_the_weights_that_were_tried_and_the_best_of_them():
    text = (
        section('docs/results.md', 'In numbers')
        .partition('Other methods there')[2]
        .partition('\nWhat projectors add')[0]
    )
    rows = [[cell.strip(' *') for cell in line.strip('|').split('|')] for line in text.splitlines() if line[:1] == '|'][
        2:
    ]
    of_seed_1 = {
        name: found['top1_of_seeds'][found['seeds'].index(1)]
        for name, found in SUITES['cifar10_resnet']['methods'].items()
    }
    assert rows.pop() == ['student alone', f'{of_seed_1["alone"]:.2f}', '']
    assert [row[0] for row in rows] == list(METHODS)
    for label, top1, weights in rows:
        method, default = METHODS[label]
        tried = {
            float(n.partition('@')[2] or default or 0): v for n, v in of_seed_1.items() if n.partition('@')[0] == method
        }
        best = max(tried, key=lambda weight: tried[weight])
        assert top1 == f'{tried[best]:.2f}'
        assert weights == ', '.join(f'**{w:g}**' if w == best else f'{w:g}' for w in sorted(tried)).strip('*'), label


@pytest.mark.parametrize(
    ('page', 'title'),
    [('README.md', 'What to expect'), ('docs/results.md', 'What the numbers say'), ('docs/results.md', 'In numbers')]
    + [('docs/guide/teachers.md', 'Which loss, which projector')],
)
def test_each_interval_of_a_page_is_that_of_a_difference_in_the_results(page, title):
    # a step's duration is no accuracy
    text = '\n'.join(line for line in section(page, title).split('\n- ') if 'What does it cost?' not in line)
    known = differences()
    stated = [tuple(map(float, numbers)) for numbers in INTERVAL.findall(text.replace('\n', ' '))]
    assert len(stated) > 3
    turned = {(-mean, -high, -low) for mean, low, high in known}  # "it costs", "it is below"
    assert not [numbers for numbers in stated if numbers not in known | turned]
