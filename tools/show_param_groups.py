"""List what updates every parameter of a run: its optimizer, rate, decay and maps, and why."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("groups"))
