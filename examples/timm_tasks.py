"""timm's own pieces around the task: optimizer, schedule, moving average, checkpoints, evaluation.

`python examples/timm_tasks.py` runs it on random pictures. The whole of train_distill is a call too:
`train_distill.main(['DATA', '--model', 'resnet18', '--teacher', 'resnet34'])`.
"""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, accuracy
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from timm_pe import ProjectorEnsembleTask

EPOCHS = 2
# how the student sees images; the teacher gets them in its own normalization, so the task must know this one
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
# random pictures and a random teacher: put yours in
images = datasets.FakeData(64, (3, 64, 64), num_classes=10, transform=transform)
loader = DataLoader(images, batch_size=16, shuffle=True)
student = timm.create_model('test_vit', num_classes=10, img_size=64)
teacher = timm.create_model('test_resnet', num_classes=10)

task = ProjectorEnsembleTask(
    student_model=student,
    teacher_model=teacher,
    criterion_kwargs={'smoothing': 0.1},
    input_mean=MEAN,
    input_std=STD,
)
optimizer = create_optimizer_v2(task.trainable_module, opt='adamw', lr=1e-3, weight_decay=0.05)
scheduler, _ = create_scheduler_v2(optimizer, num_epochs=EPOCHS, warmup_epochs=0)
task.setup_ema(decay=0.9)
saver = CheckpointSaver(student, optimizer, task=task, checkpoint_dir='.')

for epoch in range(EPOCHS):
    task.train()
    for batch, labels in loader:
        result = task(batch, labels)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        task.update_ema()
    model = task.get_eval_model(ema=True).eval()
    with torch.inference_mode():
        top1 = sum(accuracy(model(batch), labels)[0].item() * len(batch) for batch, labels in loader) / len(images)
    print(f'epoch {epoch}: loss {result["loss"]:.3f}, top-1 {top1:.2f} %')
    saver.save_checkpoint(epoch, metric=top1)
    scheduler.step(epoch + 1)
