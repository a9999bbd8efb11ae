"""Score texts against true answers or unit tests: verdicts counted, values, reasons."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("score-answers"))
