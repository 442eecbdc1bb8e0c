"""`carso attacks`: the attacks and the protocols that combine them."""

from __future__ import annotations

import typer

from carso_cli.attacks.registry import ATTACKS, DEFENCE_ONLY, DESCRIPTIONS, DETERMINISTIC_ONLY, PROTOCOLS
from carso_cli.cli import options
from carso_cli.cli.console import print_json, print_plain, show_table

command = typer.Typer(help="List attacks and protocols.", rich_markup_mode="rich")


@command.callback()
def _several() -> None:
    """List attacks and protocols."""


@command.command("ls")
def list_attacks(json: options.JsonOption = False) -> None:
    """List what --attack takes: protocols, and single attacks with the models that they fit."""
    attacks = [
        {
            "name": name,
            "classifier": name not in DEFENCE_ONLY,
            "defence": name not in DETERMINISTIC_ONLY,
            "protocols": [
                protocol.name
                for protocol in PROTOCOLS.values()
                if name in (*protocol.classifier, *protocol.defence)
            ],
            "description": DESCRIPTIONS[name],
        }
        for name in ATTACKS
    ]
    if json:
        protocols = [
            {"name": one.name, "classifier": one.classifier, "defence": one.defence, "view": one.view}
            for one in PROTOCOLS.values()
        ]
        print_json({"protocols": protocols, "attacks": attacks})
        return
    rows = [
        [one.name, ", ".join(one.classifier), ", ".join(one.defence), one.view] for one in PROTOCOLS.values()
    ]
    show_table(("protocol", "on the classifier", "on the defence", "view"), rows, title="protocols")
    print_plain("")
    rows = [
        [
            str(one["name"]),
            "both"
            if one["classifier"] and one["defence"]
            else "classifier"
            if one["classifier"]
            else "defence",
            str(one["description"]),
        ]
        for one in attacks
    ]
    show_table(("attack", "fits", "what it does"), rows, title="single attacks")
