"""Compare how two models answer: refusals, blind wins, scores and divergence, as a report."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("alignment-report"))
