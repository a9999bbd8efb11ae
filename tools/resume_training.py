"""Resume a run from its folder alone: the stored config, the newest whole checkpoint."""

from equilibrium_mcore.cli.command import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool("resume"))
