#!/usr/bin/env python3
"""Train a timm model, with a teacher: timm's ImageNet training and Projector Ensemble Feature Distillation.

python train_distill.py DATA --model resnet18 --teacher resnet34
./distributed_train.sh 8 DATA --model resnet18 --teacher resnet34 --pe-projectors 3
"""

if __name__ == '__main__':
    import timm_pe_command  # noqa: F401  before timm_pe, see there

from timm_pe.train.main import main

if __name__ == '__main__':
    main()
