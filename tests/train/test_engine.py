from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from timm_pe.train.evaluate import validate
from timm_pe.train.meters import Accumulation, LossMeter
from timm_pe.train.nonfinite import NonFiniteLoss


def steps(num_batches, accum, yielded):
    """Size of the group that each batch is divided by, and where a step ends."""
    a = Accumulation(num_batches, accum)
    return [a.size(i) for i in range(yielded)], [i for i in range(yielded) if a.ends_at(i)]


def test_the_batches_left_over_at_the_end_share_a_smaller_step():
    assert steps(7, 3, 7) == ([3, 3, 3, 3, 3, 3, 1], [2, 5, 6])
    assert steps(8, 3, 8) == ([3, 3, 3, 3, 3, 3, 2, 2], [2, 5, 7])
    assert steps(4, 1, 4) == ([1, 1, 1, 1], [0, 1, 2, 3])


def test_a_stream_longer_than_it_said_goes_on_in_steps_of_one_batch():
    sizes, ends = steps(4, 2, 7)
    assert sizes == [2, 2, 2, 2, 1, 1, 1]
    assert ends == [1, 3, 4, 5, 6]


def test_the_meter_weighs_batches_by_their_size():
    meter = LossMeter(torch.device('cpu'), distributed=False)
    meter.update({'loss': torch.tensor(1.0)}, 3)
    meter.update({'loss': torch.tensor(5.0)}, 1)
    assert meter.read()['loss'] == pytest.approx(2.0)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
def test_the_meter_names_the_first_term_and_batch_that_was_not_finite(bad):
    meter = LossMeter(torch.device('cpu'), distributed=False)
    for step in range(5):
        pe = bad if step >= 2 else 1.0
        task = bad if step >= 3 else 1.0
        meter.update({'loss': torch.tensor(pe + task), 'task_loss': torch.tensor(task), 'pe_loss': torch.tensor(pe)}, 4)
    with pytest.raises(NonFiniteLoss, match='^pe_loss not finite at batch 2 of the epoch'):
        meter.read()


def test_updating_the_meter_never_reads_from_the_device(monkeypatch):
    meter = LossMeter(torch.device('cpu'), distributed=False)
    for name in ('item', 'tolist', '__bool__', '__float__', '__int__'):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail('a host sync in the step'))
    meter.update({'loss': torch.tensor(1.0), 'pe_loss': torch.tensor(2.0)}, 4)
    meter.update({'loss': torch.tensor(1.0), 'pe_loss': torch.tensor(2.0)}, 4)


@pytest.mark.parametrize('tta', [0, 2])
def test_tta_averages_the_logits_of_neighbours(tta):
    torch.manual_seed(0)
    logits, target = torch.randn(8, 3), torch.tensor([0, 0, 1, 1, 2, 2, 0, 0])
    runtime = SimpleNamespace(
        device=torch.device('cpu'),
        is_primary=True,
        gather=lambda x: [x],
        distributed=False,
        autocast=nullcontext,
        model_dtype=None,
    )
    args = SimpleNamespace(
        task='classification', tta=tta, no_prefetcher=False, channels_last=False, torchcompile=None, torchscript=False
    )
    batches = DataLoader(TensorDataset(logits, target), batch_size=8)
    metrics = validate(lambda x: x, batches, runtime, args, 'Validation')
    if tta:
        logits, target = (logits[0::2] + logits[1::2]) / 2, target[::2]
    assert metrics['loss'] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert metrics['top1'] == pytest.approx(100 * (logits.argmax(1) == target).float().mean().item())
