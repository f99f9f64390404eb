"""Labels that do not fit are one line of a user's error, wherever they are read."""

import pytest
import torch
from helpers import refused, run

from timm_pe.data.targets import ClassTarget, MultiLabelTargets
from timm_pe.errors import UsageError

RESNET = ['--model', 'test_resnet']


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--num-classes', '2'], 'the data has label 2, the student 2 classes'),
        (['--num-classes', '3', '--target-key', 'several'], 'not one label: --task multilabel takes several'),
        (['--num-classes', '2', '--task', 'multilabel', '--target-key', 'several'], 'indices must be in [0, 2)'),
        (['--num-classes', '3', '--task', 'multilabel', '--target-key', 'one'], 'targets of the data set do not fit'),
        (['--num-classes', '3', '--task', 'multilabel', '--target-key', 'vector'], 'add --target-format multihot'),
        (['--task', 'multilabel', '--target-key', 'several'], '--task multilabel needs --num-classes'),
    ],
)
def test_labels_of_a_stream_that_do_not_fit_are_one_line(argv, message, uneven_shards, small_run, capsys):
    base = [str(uneven_shards), *small_run[3:], *RESNET, '--dataset', 'wds/x', '-j', '1']
    assert message in refused([*base, *argv], capsys)


def test_a_stream_is_counted_as_its_description_says_for_any_number_of_workers(uneven_shards, small_run, capsys):
    base = [str(uneven_shards), *small_run[1:], *RESNET, '--dataset', 'wds/x', '--epochs', '1']
    said = run([*base, '-j', '5'], capsys)
    assert '36 training, 12 validation images' in said


def test_a_stream_that_gives_other_images_than_described_is_measured_on_those(
    uneven_shards, small_run, tmp_path, capsys
):
    argv = [str(uneven_shards), *small_run[1:], *RESNET, '--dataset', 'wds/x', '--epochs', '2', '-j', '1']
    said = run([*argv, '--val-num-samples', '40'], capsys)
    assert said.count('The validation stream gave 12 images, not the 40 that are described') == 1
    evaluate = ['--evaluate', str(tmp_path / 'run'), '--device', 'cpu', '-j', '1']
    assert run(evaluate, capsys).rstrip().endswith('on 12 images.')


def test_a_stream_without_an_image_is_one_line(uneven_shards, small_run, capsys):
    argv = [str(uneven_shards), *small_run[3:], *RESNET, '--dataset', 'wds/x', '--num-classes', '3', '-j', '1']
    assert 'the training split gave no image' in refused([*argv, '--input-key', 'jpg'], capsys)


def test_a_class_map_that_lacks_a_label_of_a_stream_is_one_line(uneven_shards, small_run, tmp_path, capsys):
    (tmp_path / 'map.txt').write_text('ant\nbee\ncat\n')
    argv = [str(uneven_shards), *small_run[3:], *RESNET, '--dataset', 'wds/x', '--num-classes', '3', '-j', '1']
    said = refused([*argv, '--class-map', str(tmp_path / 'map.txt')], capsys)
    assert f"--class-map: '{tmp_path / 'map.txt'}' has no class " in said


def test_one_label_is_an_int_of_the_students_classes():
    target = ClassTarget(3)
    assert target(torch.tensor(2)) == target('2') == 2
    for wrong in (3, -1, [0, 1], 'ant', None):
        with pytest.raises(UsageError):
            target(wrong)


def test_several_labels_are_timms_vector():
    torch.testing.assert_close(MultiLabelTargets(4)([1, 3, 3]), torch.tensor([0.0, 1, 0, 1]))
    torch.testing.assert_close(MultiLabelTargets(3, dense=True)([0, 1, 1]), torch.tensor([0.0, 1, 1]))
    # of two classes a list of indices and a vector of 0 and 1 can be the same
    torch.testing.assert_close(MultiLabelTargets(2)([0, 1]), torch.tensor([1.0, 1]))


def test_a_vector_where_indices_are_expected_is_refused_with_the_flag_that_reads_it():
    with pytest.raises(UsageError, match='--target-format multihot'):
        MultiLabelTargets(3)([0, 1, 1])
