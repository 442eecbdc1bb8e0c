"""Draw the method as `docs/assets/method.svg`: `python docs/diagram.py`."""

from __future__ import annotations

from pathlib import Path

BOXES = [
    # (left, top, width, lines of text, kind)
    (10, 70, 88, ["image x", "perhaps", "perturbed"], "data"),
    (128, 70, 104, ["classifier", "frozen"], "frozen"),
    (262, 70, 112, ["internal", "representation"], "data"),
    (404, 70, 104, ["layer", "encoders"], "trained"),
    (538, 70, 92, ["condition c"], "data"),
    (538, 170, 92, ["latents z", "N(0, I), 8 draws"], "data"),
    (404, 170, 104, ["decoder"], "trained"),
    (262, 170, 112, ["8 recon-", "structions"], "data"),
    (128, 170, 104, ["same classifier", "frozen"], "frozen"),
    (10, 170, 88, ["aggregation,", "class"], "data"),
]
ARROWS = [  # (x, y) to (x, y)
    ((98, 98), (128, 98)),
    ((232, 98), (262, 98)),
    ((374, 98), (404, 98)),
    ((508, 98), (538, 98)),
    ((584, 126), (480, 170)),
    ((538, 198), (508, 198)),
    ((404, 198), (374, 198)),
    ((262, 198), (232, 198)),
    ((128, 198), (98, 198)),
]
COLOURS = {
    "data": ("#ffffff", "#5f6b7a"),
    "frozen": ("#d9e8f6", "#1f6fb2"),
    "trained": ("#fdebd0", "#c77700"),
}
HEIGHT = 56


def svg() -> str:
    """Return the diagram as the text of an SVG file."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 270" role="img" font-family="sans-serif" '
        'font-size="13" text-anchor="middle">',
        "<title>The CARSO defence: representation, purifier, reconstructions, aggregation</title>",
        '<rect width="640" height="270" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#5f6b7a"/></marker></defs>',
    ]
    for y, line in (
        (28, "The classifier reads the image; the purifier redraws it from what the classifier saw;"),
        (48, "the same classifier reads the reconstructions."),
    ):
        parts.append(f'<text x="320" y="{y}" font-size="14" fill="#222222">{line}</text>')
    for left, top, width, lines, kind in BOXES:
        fill, stroke = COLOURS[kind]
        parts.append(
            f'<rect x="{left}" y="{top}" width="{width}" height="{HEIGHT}" rx="6" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )
        first = top + HEIGHT / 2 + 5 - 8 * (len(lines) - 1)
        for row, line in enumerate(lines):
            small = ' font-size="11"' if len(line) > 14 else ""
            parts.append(
                f'<text x="{left + width / 2}" y="{first + 16 * row}" fill="#222222"{small}>{line}</text>'
            )
    for (x1, y1), (x2, y2) in ARROWS:
        parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#5f6b7a" marker-end="url(#tip)"/>'
        )
    legend = [(150, "frozen", "not trained by CARSO"), (380, "trained", "the purifier")]
    for left, kind, text in legend:
        fill, stroke = COLOURS[kind]
        parts.append(f'<rect x="{left}" y="243" width="14" height="14" fill="{fill}" stroke="{stroke}"/>')
        parts.append(f'<text x="{left + 22}" y="255" text-anchor="start" fill="#222222">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "assets" / "method.svg").write_text(svg())
