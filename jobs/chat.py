#!/usr/bin/env python
"""Talks with a checkpoint under a chosen persona: see ``--help`` for every setting."""

import sys

from arplus import cli
from arplus.config import ChatConfig
from arplus.errors import UsageError


def main() -> None:
    """Answers ``--say`` and stops, or converses on the terminal until an empty line or the end of input."""
    config = cli.parse(ChatConfig(), sys.argv[1:], prog="jobs/chat.py")
    from arplus import tracking
    from arplus.evaluation.replies import Responder, raw_profile
    from arplus.runs import checkpoint

    profile = raw_profile(config.gender, config.location, config.tags)
    weight = None if config.persona_weight == "auto" else config.persona_weight
    with tracking.fetched(config.checkpoint, config.mlflow) as folder:
        responder = Responder(checkpoint.load(folder), profile, config.sampling, config.seed, weight)
    if config.say is not None:
        print(responder.reply([config.say]))
        return
    print("Say something; an empty line ends the conversation.", file=sys.stderr)
    utterances: list[str] = []
    while said := _ask():
        reply = responder.reply([*utterances, said])
        print(reply)
        utterances += [said, reply]


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise UsageError("standard input: is not UTF-8 text") from None


if __name__ == "__main__":
    cli.run(main)
