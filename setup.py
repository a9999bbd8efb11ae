"""What pyproject.toml cannot say: a wheel carries `configs/` in the package, as `_configs`.

The repository's `configs/` is the one source. An editable install reads it where it is, and gets
no copy.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path("configs")
INSIDE = Path("equilibrium_mcore", "_configs")


class BuildWithConfigs(build_py):
    """Copies the configs beside the package's modules."""

    def run(self) -> None:
        super().run()
        for source, target in self._copies().items():
            self.mkpath(str(Path(target).parent))
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What lies in the build folder afterwards."""
        return [*super().get_outputs(include_bytecode), *self._copies().values()]

    def get_source_files(self) -> list[str]:
        """What a source distribution needs to build the same."""
        return [*super().get_source_files(), *self._copies()]

    def _copies(self) -> dict[str, str]:
        """Each config, and where it goes."""
        if self.editable_mode:
            return {}
        files = sorted(path for path in CONFIGS.rglob("*") if path.is_file())
        inside = Path(self.build_lib, INSIDE)
        return {str(path): str(inside / path.relative_to(CONFIGS)) for path in files}


setup(cmdclass={"build_py": BuildWithConfigs})
