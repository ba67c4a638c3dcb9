"""How a build shows its progress: one line that changes on a terminal, else a line for each job."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

import click

from build_kernels.build import Step

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar


class Screen:
    """Shows the steps of a build. Used with ``with``, which ends the line.

    Args:
        stream: Where to; None: nowhere.

    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._bar: ProgressBar[str] | None = None

    @property
    def changing(self) -> bool:
        """Return whether there is one line that changes."""
        return self._stream is not None and self._stream.isatty()

    def step(self, step: Step) -> None:
        """Show that a job has ended."""
        if self._stream is None:
            return
        if not self.changing:
            count = f"[{step.done:3}/{step.total}]"
            click.echo(f"{count} {step.key}  {step.how}  {step.seconds:.2f} s", self._stream)
            return
        if self._bar is None:
            self._bar = click.progressbar(
                length=step.total,
                file=self._stream,
                show_pos=True,
                width=0,
                item_show_func=lambda key: key,
            )
            self._bar.__enter__()
        self._bar.update(1, step.key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
