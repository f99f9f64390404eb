import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train_distill
from timm_pe.config.run_config import parse_config

BENCHMARKS = Path(train_distill.__file__).parent / 'benchmarks'
SUITES = sorted(p.stem for p in (BENCHMARKS / 'backbone_suites').glob('*.yaml'))


@pytest.fixture(scope='module')
def backbones(load_script):
    return load_script('backbones')


@pytest.fixture(scope='module')
def squares(tmp_path_factory):
    """Pictures of two classes with a square on white, and their masks: the square is right in one class, left in the other."""
    root, rng = tmp_path_factory.mktemp('squares'), np.random.default_rng(0)
    for split, number in (('train', 12), ('validation', 6)):
        for label, left in (('a', 0), ('b', 32)):
            for i in range(number):
                alpha = np.zeros((64, 64), np.uint8)
                alpha[:48, left : left + 32] = 255
                picture = np.full((64, 64, 3), 255, np.uint8)
                picture[alpha > 0] = rng.integers(0, 120, 3)
                for folder, content in (('data', picture), ('masks', alpha)):
                    path = root / folder / split / label / f'{i}.png'
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(content).save(path)
    return root


@pytest.mark.parametrize('name', SUITES)
def test_every_suite_is_a_pretraining_that_the_tool_takes(backbones, name, tmp_path):
    suite = backbones.load_suite(name, tmp_path)
    for variant in suite.variants:
        config = tmp_path / 'config.yaml'
        config.write_text(yaml.safe_dump(suite.run(variant, 1).flags))
        parsed = parse_config(['-c', str(config)])
        assert parsed.unlabeled and not parsed.data_dir
    assert {v for pair in suite.minus for v in pair} <= set(suite.variants)


def test_a_cell_is_foreground_where_most_of_it_is_and_a_map_that_knows_it_is_found_perfect(backbones, squares):
    pictures = backbones.Pictures(squares / 'data', 64)
    chosen = {split: list(range(len(pictures.labels[split]))) for split in ('train', 'validation')}
    truth = {s: backbones.coverage(pictures, squares / 'masks', s, chosen[s], (4, 4)) for s in chosen}
    assert truth['train'][0].tolist() == [[True, True, False, False]] * 3 + [[False] * 4]
    known = {s: torch.stack([t.float(), 1 - t.float()], -1) for s, t in truth.items()}
    assert backbones.mean_iou(known, truth) == 100
    # by the position alone the last row is known, left and right are not
    blind = {s: torch.eye(16).view(4, 4, 16).expand(len(chosen[s]), 4, 4, 16) for s in chosen}
    assert backbones.mean_iou(blind, truth) < 80


def test_features_that_tell_classes_apart_have_a_knn_of_100(backbones, squares):
    class Left(torch.nn.Module):
        pretrained_cfg = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}

        def forward(self, x):
            return torch.stack([x[..., :32].mean((1, 2, 3)), x[..., 32:].mean((1, 2, 3))], 1)

    measured = backbones.measure_features(Left(), backbones.Pictures(squares / 'data', 64))
    assert measured == {'knn': 100, 'linear': 100}


@pytest.mark.long
def test_a_grid_of_backbones_is_run_measured_and_not_run_again(backbones, squares, tmp_path, monkeypatch, capsys):
    suite = {
        'title': 'tiny',
        'data': str(squares / 'data'),
        'masks': str(squares / 'masks'),
        'common': {
            'unlabeled': [str(squares / 'data' / 'train')], 'model': 'test_resnet', 'teacher': 'test_resnet', 'img_size': 64,
            'teacher_pretrained': False, 'epochs': 1, 'batch_size': 8, 'workers': 0, 'warmup_epochs': 0, 'lr': 0.01,
        },
        'variants': {'vector': {'label': 'the feature', 'flags': {}}, 'map': {'label': 'both', 'flags': {'pe_map_weight': 1.0}}},
        'minus': [['map', 'vector']],
        'seeds': [1, 2],
    }  # fmt: skip
    (tmp_path / 'backbone_suites').mkdir()
    (tmp_path / 'backbone_suites' / 'tiny.yaml').write_text(yaml.safe_dump(suite))
    monkeypatch.setattr(backbones, 'ROOT', tmp_path)
    create = backbones.timm.create_model
    monkeypatch.setattr(
        backbones.timm, 'create_model', lambda *args, **kw: create(*args, **{**kw, 'pretrained': False})
    )
    argv = ['tiny', '--output', str(tmp_path / 'out'), '--results', str(tmp_path / 'r' / 'backbones.json')]
    backbones.main(argv)
    assert capsys.readouterr().out.count('cosine') == 4
    found = json.loads((tmp_path / 'r' / 'backbones.json').read_text())['tiny']
    of_map, of_vector = ([m['knn'] for m in found['variants'][v]['of_seeds'].values()] for v in ('map', 'vector'))
    told = found['differences'][0]['knn']
    assert told['of_seeds'] == pytest.approx([a - b for a, b in zip(of_map, of_vector, strict=True)])
    assert set(found['references']) == {'random weights', 'teacher test_resnet'}
    assert '| both | 2 |' in (tmp_path / 'r' / 'backbones.md').read_text()
    backbones.main([*argv, '--seeds', '3'])
    assert json.loads((tmp_path / 'r' / 'backbones.json').read_text())['tiny']['variants']['map'][
        'of_seeds'
    ].keys() == {'3'}
    with pytest.raises(SystemExit, match='2'):
        backbones.main([*argv, '--variants', 'nope'])
    assert 'tiny has no variant nope, it has map, vector' in capsys.readouterr().err
    monkeypatch.setattr(backbones, 'measure_features', None)  # what is measured is not measured again
    backbones.main([*argv, '--no-run'])
