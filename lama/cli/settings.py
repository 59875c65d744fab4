"""Settings as flags, each with its line of help: for the commands whose settings are one dataclass."""

import argparse
import dataclasses
from typing import Any

METAVARS = {int: "N", float: "X", str: "TEXT"}


def add_settings(parser: argparse.ArgumentParser, settings: type[Any], leave_out: tuple[str, ...] = ()) -> None:
    """`--d-model N` for the field d_model of `settings`, a TrainingConfig; None where it is not given."""
    group = parser.add_argument_group("settings")
    for field in dataclasses.fields(settings):
        if field.name in leave_out:
            continue
        flag, kind, choices = f"--{field.name.replace('_', '-')}", type(field.default), field.metadata["choices"] or None
        default = f"{field.default:g}" if kind is float else str(field.default)
        options: dict[str, Any] = {"dest": field.name, "default": None, "help": f"{field.metadata['about']} (default {default})"}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(flag, type=kind, choices=choices, metavar=None if choices else METAVARS[kind], **options)


def given(args: argparse.Namespace, settings: type[Any]) -> dict[str, Any]:
    """The settings that were given as flags."""
    return {field.name: value for field in dataclasses.fields(settings) if (value := getattr(args, field.name, None)) is not None}
