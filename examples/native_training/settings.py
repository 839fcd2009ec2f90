"""Options of a command line that change NSA's sizes and keys."""

import argparse
import dataclasses

from nsa_compile import NSAConfig


def add_nsa_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options, all None where they are not given."""
    parser.add_argument("--num-selected", type=int, help="n, blocks that a query attends to")
    parser.add_argument("--block-length", type=int, help="l, of NSA's compression")
    parser.add_argument("--block-stride", type=int, help="d; that of --block-length by default")
    parser.add_argument("--window", type=int, help="w, newest keys that every query attends to")
    parser.add_argument("--branch-kv", choices=["shared", "independent"])


def nsa_config(config: NSAConfig, options: argparse.Namespace) -> NSAConfig:
    """Returns a configuration with what was given changed."""
    names = ("num_selected", "block_length", "block_stride", "window", "branch_kv")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "block_length" in given:
        given.setdefault("block_stride", given["block_length"])
    return dataclasses.replace(config, **given)
