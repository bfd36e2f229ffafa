"""setuptools' PEP 517 backend, asking for torch only where the target environment has none.

With torch among the static requirements, pip would download a second copy of it into the
isolated build environment, several GB of it and maybe of another version.
"""

import dat_toolchain
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def _missing_torch() -> list[str]:
    try:
        torch = dat_toolchain.check_before_build()
    except dat_toolchain.BuildError as error:
        raise SystemExit(f"error: {error}") from None
    return [] if torch else [dat_toolchain.TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _missing_torch() + build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _missing_torch() + build_meta.get_requires_for_build_editable(config_settings)
