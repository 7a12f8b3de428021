"""The command line of `train.py`."""

from __future__ import annotations

import argparse
import sys

from dualbranch.distill import dist


def main(argv: list[str] | None = None) -> int:
    """Runs the pipeline; returns 0, 2 for anything the user can mend, 130 after Ctrl-C (nothing is lost)."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a dual-branch model: teacher -> student -> gate -> evaluation -> report.")
    parser.add_argument("config", help="a YAML file, e.g. configs/small.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. --set student.steps=100 (repeatable)")
    parser.add_argument("--resume", action="store_true", help="continue the run of this name; starts it if there is none")
    args = parser.parse_args(argv)

    from dualbranch.distill import pipeline
    from dualbranch.distill.config import load_run
    from dualbranch.distill.trainer import NonFiniteLoss

    try:
        folder = pipeline.run(load_run(args.config, args.set), args.resume)
    except KeyboardInterrupt as stopped:
        print(f"\n{str(stopped) or 'stopped; the same command with --resume continues'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, NonFiniteLoss) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        dist.finish()
    if dist.rank() == 0:
        print(f"done: {folder}/report.md" if (folder / "report.md").exists() else f"done: {folder}")
    return 0
