"""Put the defence around a classifier of your own, and measure both.

Run: python examples/defend_a_classifier.py
"""

from pathlib import Path

from carso_cli import evaluate, load_defence, load_recipe, train_purifier

# Two epochs: enough to see every step, not enough for a purifier that is any good.
recipe = load_recipe("digits", ["training.epochs=2", "training.batch_size=128", "evaluation.pgd_eot_steps=5"])

train_purifier(recipe, run="runs/example")
result = evaluate(recipe, run=Path("runs/example"), attack="pgd-eot", limit=20)
for row in result["results"]:
    print(row["target"], row["attack"], row["accuracy"])

defence = load_defence("runs/example")
print(sum(weight.numel() for weight in defence.parameters()), "weights, all frozen")
