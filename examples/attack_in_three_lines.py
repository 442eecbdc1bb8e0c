"""Adversarial examples by any attack, for any model from images in [0, 1] to scores.

Run: python examples/attack_in_three_lines.py
"""

import torch
from torch import nn

from carso_cli import attack

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
images = torch.rand(16, 3, 32, 32)
labels = model(images).argmax(dim=1)

for name in ("fgsm", "pgd", "apgd-targeted"):
    examples = attack(name, model, eps=1 / 255)(images, labels)
    right = (model(examples).argmax(dim=1) == labels).float().mean()
    print(f"{name}: {right:.2f} of the images are still right")
