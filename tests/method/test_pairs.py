"""One real training step for pairs across structures: what 'any timm pair' means."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from timm_pe import ProjectorEnsembleTask, create_teacher

VIT = 'vit_tiny_patch16_224'
# student with its arguments, teacher with its arguments, size of the student's images
PAIRS = {
    'CNN -> CNN, equal widths': ('resnet10t', {}, 'resnet18', {}, 64),
    'CNN -> ViT': ('test_vit', {}, 'resnet10t', {}, 64),
    'ViT -> CNN': ('test_resnet', {}, 'test_vit', {}, 64),
    'ViT of fixed size -> CNN': ('test_resnet', {}, VIT, {'img_size': 96}, 64),
    'ConvNeXt -> EfficientNet': ('test_efficientnet', {}, 'test_convnext', {}, 64),
    'hybrid -> CNN': ('resnet10t', {}, 'mobilevit_xxs', {}, 64),
    'CNN -> hybrid': ('mobilevit_xxs', {}, 'resnet10t', {}, 64),
    'CNN -> distilled ViT': ('deit_tiny_distilled_patch16_224', {'img_size': 64}, 'resnet10t', {}, 64),
    'distilled ViT -> CNN': ('resnet10t', {}, 'deit_tiny_distilled_patch16_224', {'img_size': 64}, 64),
    'CNN -> distilled LeViT': ('levit_128s', {}, 'test_resnet', {}, 224),
    'CNN -> EfficientFormer': ('efficientformer_l1', {}, 'test_resnet', {}, 224),
    'CNN -> two branches': ('crossvit_tiny_240', {}, 'test_resnet', {}, 240),
    'two branches -> CNN': ('test_resnet', {}, 'crossvit_tiny_240', {}, 96),
    'CNN -> a head a stage': ('efficientvim_m1', {}, 'test_resnet', {}, 224),
    'CLIP-ResNet -> CNN': ('test_resnet', {}, 'resnet50_clip', {'img_size': 64}, 64),
    'CNN -> CLIP-ResNet': ('resnet50_clip', {'img_size': 64}, 'test_resnet', {}, 64),
    'SAM -> CNN': ('test_resnet', {}, 'samvit_base_patch16_224', {'img_size': 64, 'depth': 2}, 64),
    'BiT (1x1 conv head) -> CNN': ('test_resnet', {}, 'resnetv2_50x1_bit', {}, 64),
    'CNN -> DLA (1x1 conv head)': ('dla46x_c', {}, 'test_resnet', {}, 64),
    'LSTM -> CNN': ('test_resnet', {}, 'sequencer2d_s', {}, 64),
    'head-less encoder -> CNN': ('test_resnet', {}, 'mobilenetv5_300m_enc', {}, 64),
    'no classifier -> CNN': ('test_resnet', {}, 'test_vit', {'num_classes': 0}, 64),
    'grey student, colour teacher': ('test_resnet', {'in_chans': 1}, 'resnet10t', {}, 64),
    'colour student, grey teacher': ('test_resnet', {}, 'cifar_resnet8', {'in_chans': 1}, 32),
    'CIFAR zoo': ('cifar_shufflenetv1', {}, 'cifar_wrn_16_2', {}, 32),
    'mixer -> MLP': ('gmlp_ti16_224', {'img_size': 64}, 'mixer_s32_224', {'img_size': 64}, 64),
}


@pytest.mark.parametrize('pair', PAIRS)
def test_one_step_moves_student_and_projectors_and_leaves_the_teacher(pair):
    student_name, student_kwargs, teacher_name, teacher_kwargs, size = PAIRS[pair]
    torch.manual_seed(0)
    student = timm.create_model(student_name, num_classes=5, **student_kwargs)
    cfg = student.pretrained_cfg
    channels = student_kwargs.get('in_chans', 3)
    teacher_kwargs = {'num_classes': 7, **teacher_kwargs} if 'enc' not in teacher_name else teacher_kwargs
    num_classes, in_chans = teacher_kwargs.pop('num_classes', None), teacher_kwargs.pop('in_chans', None)
    teacher = create_teacher(
        teacher_name,
        pretrained=False,
        num_classes=num_classes,
        in_chans=in_chans,
        model_kwargs=teacher_kwargs,
        input_mean=cfg['mean'][:channels],
        input_std=cfg['std'][:channels],
    )
    task = ProjectorEnsembleTask(student, teacher, verbose=False).train()
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=0.01)
    before = {k: v.clone() for k, v in task.trainable_module.state_dict().items()}
    frozen = {k: v.clone() for k, v in teacher.state_dict().items()}
    result = task(torch.randn(4, channels, size, size), torch.randint(0, 5, (4,)))
    result['loss'].backward()
    optimizer.step()
    assert all(v.isfinite().all() for v in result.values())
    assert result['output'].shape == (4, 5)
    after = task.trainable_module.state_dict()
    for name, _ in task.projection.named_parameters():
        assert not torch.equal(after[f'projection.{name}'], before[f'projection.{name}']), name
    first_weight = next(n for n, p in student.named_parameters() if p.ndim > 1)
    assert not torch.equal(after[f'student.{first_weight}'], before[f'student.{first_weight}'])
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
