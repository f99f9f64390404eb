"""A teacher cache that is another one, damaged, or of no use to a run is refused by name."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from cache_runs import PAIR, open_caches, opened, small_cache, stages
from helpers import refused, run
from PIL import Image
from timm.data import create_transform

from timm_pe import UsageError, precompute
from timm_pe.data.fingerprint import hash_names
from timm_pe.method.weight_files import hash_tensors
from timm_pe.train import cache_manifest


def test_each_entry_of_the_manifest_that_differs_is_named_with_both_values(argv, tmp_path):
    precompute.main(argv)
    path = tmp_path / 'cache' / 'manifest.json'
    manifest = json.loads(path.read_text())
    assert len(manifest) == 22
    made = stages(argv)

    def message(**changes):
        path.write_text(json.dumps({k: v for k, v in {**manifest, **changes}.items() if v != 'missing'}))
        with pytest.raises(UsageError) as e:
            open_caches(made)[0]
        return str(e.value)

    assert 'made by another version of timm_pe (format 7, this one: 3)' in message(format=7)
    for name, value in manifest.items():
        if name == 'format':
            continue
        if name == 'logits':  # this run needs none, and all rows are there: more of them is no difference
            assert f'{name} None there and 0 here' in message(logits='missing')
            continue
        said = message(**{name: 'something else'})
        assert f'this one: {name} something else there and {value} here: give another folder, or delete it' in said
        assert f'{name} None there and {value} here' in message(**{name: 'missing'})
    assert 'images 7 there and 36 here; seed 1 there and 42 here' in message(seed=1, images=7)
    assert 'pixels' not in message(seed=1, pixels='of another seed')  # which follow from it
    assert 'pixels other' in message(**{'teacher weights': 'others', 'pixels': 'other'})


@pytest.mark.parametrize(
    ('more', 'names'),
    [
        (['--seed', '43'], ['seed 42 there and 43 here', 'teacher weights']),  # its weights are random
        (['--hflip', '0'], ['transform RandomHorizontalFlip(p=0.5) there and nothing here']),
        (['--scale', '0.6', '1'], ['transform RandomResizedCropAndInterpolation(size=(32, 32), scale=(0.5, 1.0)']),
        (['--vflip', '0.5'], ['transform nothing there and RandomVerticalFlip(p=0.5) here']),
        (['--mean', '0.1', '0.2', '0.3'], ['image mean [0.5, 0.5, 0.5] there and [0.1, 0.2, 0.3] here']),
        (['--img-size', '48'], ['image size [3, 32, 32] there and [3, 48, 48] here', 'teacher input 3x32x32 there']),
        (['--teacher-input-size', '48'], ['teacher input 3x32x32 there and 3x48x48 here']),
        (['--teacher-mean', '0.4'], ['teacher mean [0.5, 0.5, 0.5] there and [0.4, 0.4, 0.4] here']),
        (['--teacher-std', '0.4'], ['teacher std']),
        (['--teacher-dtype', 'bfloat16'], ['teacher precision float32 there and bfloat16 here', 'teacher weights']),
        (['--model-dtype', 'bfloat16'], ['image precision float32 there and bfloat16 here']),
        (['--teacher', 'test_vit2'], ['teacher test_vit there and test_vit2 here', 'teacher weights']),
        (['--teacher-num-classes', '3', '--kd-loss-weight', '1'], ['logits 0 there and 3 here']),
        (['--no-prefetcher'], ['transform MaybePILToTensor()']),
    ],
    ids=lambda x: ' '.join(x) if x[0].startswith('--') else '',
)
def test_a_run_that_would_see_other_features_is_refused(argv, more, names, tmp_path, capsys, filled_cache):
    os.symlink(filled_cache, tmp_path / 'cache')
    error = refused([*argv, *more], capsys)
    for name in names:
        assert name in error
    assert not (tmp_path / 'run').exists()


def test_augmentations_that_timm_describes_alike_are_told_apart():
    described = [
        cache_manifest._describe_transform(SimpleNamespace(transform=create_transform(32, True, auto_augment=given)))
        for given in ('rand-m9-t3a', 'rand-m9-t3aw', 'rand-m9-t3a')
    ]
    assert described[0] != described[1]
    assert described[0] == described[2]


def test_what_does_not_touch_the_features_may_change(argv, tmp_path, filled_cache, forwards):
    os.symlink(filled_cache, tmp_path / 'cache')
    more = ['--lr', '0.1', '-b', '12', '-j', '1', '--epochs', '1', '--smoothing', '0', '--drop', '0.1', '--model-ema']
    run([*argv, *more, '--pe-projectors', '2', '--teacher-cache-views', '1', '--model', 'test_resnet'])
    assert not forwards


def test_other_images_are_noticed_by_name(image_folder, argv, tmp_path, capsys):
    moved = tmp_path / 'moved'
    shutil.copytree(image_folder, moved)
    precompute.main(argv)
    argv = [str(moved), *argv[1:]]
    cache = tmp_path / 'cache'
    precompute.main(argv)  # the same images elsewhere
    first = moved / 'train' / 'ant' / '0.png'
    first.rename(first.with_name('00.png'))
    error = refused(argv, capsys)
    assert 'image names' in error
    first.with_name('00.png').rename(first)
    first.unlink()
    assert 'images 36 there and 35 here' in refused(argv, capsys)
    assert cache.is_dir()


def test_the_hash_of_weights_sees_names_values_and_precision():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet')
    before = hash_tensors(model.state_dict())
    assert before == hash_tensors(model.state_dict())
    assert before != hash_tensors(model.bfloat16().state_dict())
    other = timm.create_model('test_resnet')
    other.load_state_dict(model.state_dict())
    own = hash_tensors(other.state_dict())
    other.bn1.num_batches_tracked += 1
    assert own != hash_tensors(other.state_dict())


def test_data_without_file_names_is_told_apart_by_its_labels():
    sets = [SimpleNamespace(targets=t) for t in ([0, 1, 2], [0, 2, 1])]
    assert hash_names(sets[0]) != hash_names(sets[1])
    assert hash_names(sets[0]) == hash_names(SimpleNamespace(targets=[0, 1, 2]))
    hub = [SimpleNamespace(reader=SimpleNamespace(dataset=SimpleNamespace(_fingerprint=f))) for f in 'ab']
    assert hash_names(hub[0]) != hash_names(hub[1])


def test_data_in_a_wrapper_is_told_apart_as_without_it():
    def read_every_file(absolute):
        pytest.fail('the whole data set was read')

    reader = SimpleNamespace(dataset=SimpleNamespace(_fingerprint='a'))
    hub = SimpleNamespace(reader=reader)
    assert hash_names(SimpleNamespace(dataset=hub, filenames=read_every_file)) == hash_names(hub)


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--mixup', '0.2'], '--mixup mixes images of the batch: leave one out'),
        (['--cutmix', '1'], '--cutmix mixes images'),
        (['--cutmix-minmax', '0.1', '0.5'], '--cutmix-minmax mixes images'),
        (['--reprob', '0.2'], '--reprob erases batch by batch: leave one out, or add --no-prefetcher'),
        (['--aug-repeats', '2'], '--aug-repeats draws an image several times'),
        (['--train-img-sizes', '32', '40'], '--train-img-sizes gives an image another size'),
        (['--aug-splits', '3'], '--aug-splits does not go with --teacher'),
        (['--naflex-loader'], '--naflex-loader does not go with --teacher'),
        (['--teacher-cache-views', '0'], '--teacher-cache-views must be 1 or more, got 0'),
    ],
)
def test_what_cannot_be_exact_is_refused(argv, more, message, capsys, tmp_path):
    assert message in refused([*argv, *more], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--teacher-cache', 'x'], '--teacher-cache needs --teacher'),
        (['--teacher-cache', 'x', '--kd-model-name', 'test_vit'], '--teacher-cache needs --teacher'),
        (['--teacher-cache-views', '2'], '--teacher-cache-views needs --teacher'),
        (['--teacher', 'test_vit', '--teacher-cache-views', '2'], '--teacher-cache-views needs --teacher-cache'),
    ],
)
def test_a_flag_without_the_one_it_belongs_to_is_refused(small_run, more, message, capsys):
    assert message in refused([*small_run, '--model', 'test_resnet', *more], capsys)


def test_a_stream_has_no_index_to_keep_features_by(argv, tmp_path, capsys):
    webdataset = pytest.importorskip('webdataset')

    shards = tmp_path / 'wds'
    shards.mkdir()
    for split, number in (('train', 16), ('validation', 8)):
        with webdataset.TarWriter(str(shards / f'set-{split}-0000.tar')) as tar:
            for i in range(number):
                tar.write({'__key__': str(i), 'png': Image.new('RGB', (32, 32)), 'cls': i % 3})
    splits = {
        s: {'filenames': [f'set-{s}-0000.tar'], 'shard_lengths': [n]} for s, n in (('train', 16), ('validation', 8))
    }
    (shards / '_info.json').write_text(
        json.dumps({'splits': {k: {**v, 'name': k, 'num_samples': v['shard_lengths'][0]} for k, v in splits.items()}})
    )
    error = refused([str(shards), *argv[1:], '--dataset', 'wds/set'], capsys)
    assert "knows images by their index, 'wds/set' is a stream without: leave the cache out" in error
    assert not (tmp_path / 'cache').exists()


def test_precompute_needs_a_cache_to_fill(small_run, capsys):
    for more, message in (
        ([], 'needs --teacher-cache'),
        (['--teacher-cache', 'x', '--evaluate', 'y'], 'no --evaluate'),
    ):
        with pytest.raises(SystemExit):
            precompute.main([*small_run, *PAIR, *more])
        assert message in capsys.readouterr().err


def test_precompute_refuses_what_training_would(argv, capsys, tmp_path):
    with pytest.raises(SystemExit):
        precompute.main([*argv, '--kd-loss-weight', '1'])
    assert 'logit distillation compares logits of equal classes' in capsys.readouterr().err
    assert not (tmp_path / 'cache').exists()


def damage(folder, name, how):
    path = folder / name
    if how == 'truncate':
        os.truncate(path, path.stat().st_size - 10)
    elif how == 'garbage':
        path.write_bytes(b'not what it was')
    elif how == 'pickle':
        np.save(path, np.array([{}]), allow_pickle=True)
    elif how == 'empty':
        path.write_bytes(b'')
    else:
        np.save(path, np.zeros(*how))


@pytest.mark.parametrize('name', ['view-0.feature.npy', 'view-1.done.npy'])
@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('truncate', 'cannot open'),
        ('garbage', 'cannot open'),
        ('pickle', 'cannot open'),
        ('empty', 'cannot open'),
        (((9, 4), np.float16), 'holds float16 [9, 4], not'),
        (((10, 4), np.float64), 'holds float64 [10, 4], not'),
    ],
    ids=str,
)
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path, name, how, message):
    opened(tmp_path)
    damage(tmp_path, name, how)
    before = (tmp_path / name).read_bytes()
    cache = small_cache(tmp_path)
    with pytest.raises(UsageError) as e:
        cache.look()
    assert message in str(e.value)
    assert f"{name}'" in str(e.value)
    assert 'delete it to fill that view anew' in str(e.value)
    assert (tmp_path / name).read_bytes() == before
    (tmp_path / name).unlink()
    assert opened(tmp_path).counts == [0, 0]


@pytest.mark.parametrize('text', ['{"seed": ', '[1]', '"seed"', '\xff'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    opened(tmp_path)
    (tmp_path / 'manifest.json').write_text(text, encoding='latin1')
    with pytest.raises(UsageError, match='--teacher-cache: .*give another folder, or delete it'):
        small_cache(tmp_path).look()


def test_a_folder_of_something_else_is_refused(image_folder, argv, tmp_path, capsys):
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / 'thesis.tex').write_text('')
    error = refused(argv, capsys)
    assert "cache' holds thesis.tex and no manifest.json, so it is no teacher cache: give another folder" in error
    assert [p.name for p in (tmp_path / 'cache').iterdir()] == ['thesis.tex']
    assert 'Not a directory' in refused([*argv, '--teacher-cache', str(tmp_path / 'cache' / 'thesis.tex')], capsys)
