"""The ``deepstitch`` command: finds verbs, turns refusals into one line and an exit code.

A verb is a module of :mod:`deepstitch.commands` with a click command named ``command``, imported on demand.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from deepstitch import __version__
from deepstitch.errors import DeepstitchError, did_you_mean

__all__ = ["EXIT_BUG", "EXIT_INTERRUPTED", "VERBS", "cli", "main"]

# as one meets them
VERBS = ("export", "build", "run", "chat", "split", "encode-server", "language-server", "compare", "inspect", "plugins")
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
EXIT_BUG = 70  # EX_SOFTWARE; Python's own 1 would read as a failed comparison


class LazyGroup(click.Group):
    """A group whose commands are imported by name, and which knows how to report a refusal."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every verb, in reading order."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb; None where there is no such verb."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"deepstitch.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or say which one was probably meant."""
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            hint = did_you_mean(args[0], VERBS)
            raise click.UsageError(f"no command '{args[0]}'{hint}; there are {', '.join(VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; a refusal becomes one line on stderr and the error's own exit code."""
        try:
            return super().invoke(ctx)
        except DeepstitchError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            message = " ".join(str(error).split())
            click.echo(f"{ctx.info_name}: error: {message}", err=True)
            ctx.exit(error.exit_code)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 comparison or check failed, 2 input refused, 70 a bug, 130 interrupted.",
)
@click.version_option(__version__, prog_name="deepstitch")
@click.option(
    "--debug",
    is_flag=True,
    envvar="DEEPSTITCH_DEBUG",
    show_envvar=True,
    help="Show the traceback of a refusal.",
)
def cli(debug: bool) -> None:
    """Turn a Qwen3-VL or Qwen3-VL-MoE checkpoint into ONNX graphs, and run them.

    \b
    deepstitch export CHECKPOINT --target ort-cpu -o BUNDLE
    deepstitch run BUNDLE --image picture.png --prompt "What is in the picture?"
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words after ``deepstitch``; None takes them from ``sys.argv``.
    """
    try:
        # standalone_mode would turn Ctrl-C into exit code 1, which here means a failed comparison
        outcome = cli.main(arguments, prog_name="deepstitch", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("deepstitch: interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        click.echo(
            "deepstitch: this is a bug in deepstitch, not in your input; please report the lines above",
            err=True,
        )
        return EXIT_BUG
    return outcome if isinstance(outcome, int) else 0  # click hands the code of ctx.exit() back as the outcome


if __name__ == "__main__":
    sys.exit(main())
