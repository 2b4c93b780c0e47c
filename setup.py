"""Every room of mmgen/ is a package, and configs/ is installed as mmgen/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mmgen", "mmgen.*"]), "mmgen.configs"],
    package_dir={"mmgen.configs": "configs"},
)
