"""YAML in which 1e-3 is a number, as in YAML 1.2 and JSON: PyYAML reads YAML 1.1, where it is text."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """SafeLoader with one more form of a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def safe_load(text: str) -> Any:
    """As `yaml.safe_load`. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)
