"""Hands the extension to build_backend/dat_ninja.py; the metadata is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PROJECT = Path(__file__).resolve().parent
sys.path.insert(0, str(PROJECT / "build_backend"))


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        from dat_ninja import build_extension
        from dat_toolchain import BuildError

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        version = self.distribution.get_version()
        try:
            build_extension(PROJECT, Path(self.build_temp).resolve(), output, version)
        except BuildError as error:
            raise CompileError(str(error)) from None


setup(ext_modules=[Extension("dat_cuda._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
