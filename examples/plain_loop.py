"""A training loop of one's own: `python examples/plain_loop.py`. Put your data and your trained teacher in."""

import safetensors.torch
import timm
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from timm_pe import ProjectorEnsembleTask, create_teacher

# how the student sees images; the teacher gets them in its own normalization, so it must know this one
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

# random pictures and a random teacher; yours: create_teacher('resnet34', checkpoint='teacher.safetensors', ...)
images = datasets.FakeData(64, (3, 64, 64), num_classes=10, transform=transform)
teacher = create_teacher('test_resnet', pretrained=False, num_classes=10, input_mean=MEAN, input_std=STD)
student = timm.create_model('test_vit', num_classes=10, img_size=64)

task = ProjectorEnsembleTask(student_model=student, teacher_model=teacher, num_projectors=3).train()
optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-3)  # student and projectors
task.check_optimizer(optimizer)
for epoch in range(2):
    for batch, labels in DataLoader(images, batch_size=16, shuffle=True):
        result = task(batch, labels)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
    print(f'epoch {epoch}: task loss {result["task_loss"]:.3f}, projector loss {result["pe_loss"]:.3f}')

student = task.release_student()  # plain timm again
safetensors.torch.save_file(student.state_dict(), 'student.safetensors')
