"""How robust is a model? Train a small network on scikit-learn's digits, then audit it.

Run: python examples/audit_a_model.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from carso_cli import audit

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
labels = torch.tensor(digits.target)
train, test = slice(0, 1200), slice(1200, 1300)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(60):
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(images[train]), labels[train]).backward()
    optimiser.step()

report = audit(model, images[test], labels[test], eps=0.05, budget="quick")
print(report)
