"""What pyproject.toml cannot say: configs/ lies beside the package in a checkout, and inside it once installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["crate_jax*"]), "crate_jax.configs"],
    package_dir={"crate_jax.configs": "configs"},
)
