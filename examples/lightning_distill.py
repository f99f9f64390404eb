"""Distillation in Lightning: `pip install lightning`, `python examples/lightning_distill.py`."""

import lightning
import timm
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from timm_pe import ProjectorEnsembleTask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the batches; the teacher gets them in its own


class Distillation(lightning.LightningModule):
    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module):
        super().__init__()
        self.task = ProjectorEnsembleTask(student, teacher, num_projectors=3, input_mean=MEAN, input_std=STD)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        result = self.task(*batch)
        self.log_dict({name: result[name] for name in ('loss', 'task_loss', 'pe_loss')}, prog_bar=True)
        return result['loss']

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.task.trainable_module.parameters(), lr=1e-3)  # student and projectors


# random pictures and a random teacher: put yours in
transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
images = datasets.FakeData(64, (3, 64, 64), num_classes=10, transform=transform)
student = timm.create_model('test_vit', num_classes=10, img_size=64)
teacher = timm.create_model('test_resnet', num_classes=10)
trainer = lightning.Trainer(max_epochs=2, log_every_n_steps=1)  # its checkpoints are without the teacher
trainer.fit(Distillation(student, teacher), DataLoader(images, batch_size=16, shuffle=True))
torch.save(student.state_dict(), 'student.pth')
print(f'projector loss {trainer.callback_metrics["pe_loss"]:.3f}')
