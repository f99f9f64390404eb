import os

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import convert_splitbn_model
from timm.task import ClassificationTask, resume_task_checkpoint

from timm_pe.config.run_config import RunConfig
from timm_pe.run_folder import RunFolder
from timm_pe.train.checkpoints import Saver, best_epoch


@pytest.fixture
def make_saver(tmp_path):
    def make(split_bn=False):
        model = timm.create_model('test_resnet', num_classes=3)
        if split_bn:
            model = convert_splitbn_model(model, 2)
        task = ClassificationTask(model, verbose=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = RunConfig(model='test_resnet', checkpoint_hist=2, opt='sgd')
        saver = Saver(RunFolder(tmp_path), task, optimizer, config, None, False, task.get_eval_model)
        return saver, model

    return make


def student(tmp_path):
    return safetensors.torch.load_file(tmp_path / 'student.safetensors')['fc.bias'].tolist()


def fill(model, value):
    with torch.no_grad():
        model.fc.bias.fill_(value)


def test_the_student_file_holds_the_best_epoch(make_saver, tmp_path):
    saver, model = make_saver()
    for epoch, metric in enumerate((10.0, 30.0, 20.0)):
        fill(model, epoch)
        saver.save_checkpoint(epoch, metric)
    assert student(tmp_path) == [1.0] * 3


def test_a_worse_student_at_the_number_of_the_best_epoch_does_not_replace_it(make_saver, tmp_path):
    saver, model = make_saver()
    for epoch, metric in enumerate((10.0, 30.0, 20.0)):
        fill(model, epoch)
        saver.save_checkpoint(epoch, metric)
    again, model = make_saver()
    again.continue_from(str(tmp_path / 'last.pth.tar'))
    fill(model, 7)
    again.save_checkpoint(1, 5.0)
    assert student(tmp_path) == [1.0] * 3


def test_a_history_that_is_ranked_anew_has_its_best_in_all_files(make_saver, tmp_path):
    saver, model = make_saver()
    for epoch, metric in enumerate((30.0, 20.0, 10.0)):
        fill(model, epoch)
        saver.save_checkpoint(epoch, metric)
    again, model = make_saver()
    fill(model, 2)
    assert again.continue_from(str(tmp_path / 'last.pth.tar'), {0: 1.0, 1: 9.0, 2: 0.5})
    assert student(tmp_path) == [1.0] * 3
    assert best_epoch(RunFolder(tmp_path)) == again.best_epoch == 1
    names = [(os.path.basename(path), metric) for path, metric in again.checkpoint_files]
    assert names == [('checkpoint-1.pth.tar', 9.0), ('checkpoint-0.pth.tar', 1.0)]
    back, model = make_saver()  # by the first metric again, before anything was saved under the other
    back.continue_from(str(tmp_path / 'last.pth.tar'))
    assert best_epoch(RunFolder(tmp_path)) == back.best_epoch == 0
    assert student(tmp_path) == [0.0] * 3


def test_the_best_of_split_norms_that_is_restored_loads_in_plain_timm(make_saver, tmp_path):
    saver, model = make_saver(split_bn=True)
    for epoch, metric in enumerate((20.0, 30.0)):
        fill(model, epoch + 1)
        saver.save_checkpoint(epoch, metric)
    again, model = make_saver(split_bn=True)
    fill(model, 2)
    again.continue_from(str(tmp_path / 'last.pth.tar'), {0: 9.0, 1: 1.0})
    plain = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(tmp_path / 'student.safetensors'))
    assert plain.fc.bias.tolist() == [1.0] * 3


def test_a_fresh_run_replaces_the_student_of_an_old_one(make_saver, tmp_path):
    saver, model = make_saver()
    saver.save_checkpoint(0, 90.0)
    fresh, model = make_saver()
    fill(model, 7)
    fresh.save_checkpoint(0, 5.0)
    assert student(tmp_path) == [7.0] * 3


def test_no_file_is_ever_missing_or_half_written_while_it_is_replaced(make_saver, tmp_path, monkeypatch):
    saver, _ = make_saver()
    saver.save_checkpoint(0, 1.0)

    def fail(*args, **kwargs):
        raise OSError('disk full')

    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='disk full'):
        saver.save_checkpoint(1, 2.0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_timms_own_helper_resumes_from_a_checkpoint_of_ours(make_saver, tmp_path):
    saver, model = make_saver()
    saver.save_checkpoint(4, 1.0)
    other = ClassificationTask(timm.create_model('test_resnet', num_classes=3), verbose=False)
    optimizer = torch.optim.SGD(other.trainable_module.parameters(), lr=0.1)
    assert resume_task_checkpoint(other, str(tmp_path / 'last.pth.tar'), optimizer, log_info=False) == 5
    assert torch.equal(other.trainable_module.fc.weight, model.fc.weight)
