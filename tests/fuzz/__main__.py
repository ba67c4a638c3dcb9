"""``python -m tests.fuzz``."""

from __future__ import annotations

import click

from router_runtime.format.scoring import SCORINGS
from tests.fuzz.suite import BATCHES, run


@click.command()
@click.option("--rows", default=10_000_000, show_default=True, help="Rows over all ops, at least.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option(
    "--model", nargs=3, default=(4096, 256, 6), show_default=True, help="hidden, experts, k"
)
@click.option("--scoring", type=click.Choice(SCORINGS), default=SCORINGS[0], show_default=True)
@click.option("--temperature", default=1.0, show_default=True, help="The model's gate temperature.")
def main(
    rows: int,
    seed: int,
    device: str,
    model: tuple[int, int, int],
    scoring: str,
    temperature: float,
) -> None:
    """Any bits into every op; exits with an AssertionError if a promise is broken."""
    largest = BATCHES[-1] if rows > 100_000 else 129
    rule = {"scoring": scoring, "gate_temperature": temperature}
    counts = run(device, rows, model=model, rule=rule, seed=seed, largest=largest)
    for name, count in counts.items():
        click.echo(f"{name:<24}{count:>12} rows")
    click.echo(f"{'all':<24}{sum(counts.values()):>12} rows, every promise kept")


if __name__ == "__main__":
    main()
