# SPDX-License-Identifier: Apache-2.0
"""Write base/prometheusrule.yaml from deploy/prometheus/rules, which is the source of both.

`python -m deploy.kubernetes.prometheus_rule [--check]`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

_HERE = Path(__file__).parent
_RULES = _HERE.parent / "prometheus" / "rules"
FILE = _HERE / "base" / "prometheusrule.yaml"
_HEADER = """\
# Generated from deploy/prometheus/rules: python -m deploy.kubernetes.prometheus_rule
# For the Prometheus operator; add the labels that your Prometheus selects rules by.
"""


def build() -> str:
    """The manifest."""
    groups = []
    for path in sorted(_RULES.glob("*.yml")):
        groups += yaml.safe_load(path.read_text())["groups"]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "himap"},
        "spec": {"groups": groups},
    }
    return _HEADER + str(yaml.safe_dump(manifest, sort_keys=False, width=100))


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args(argv).check
    stale = not FILE.exists() or FILE.read_text() != build()
    if stale and check:
        print(f"{FILE.name} is not current: run python -m deploy.kubernetes.prometheus_rule")
    elif stale:
        FILE.write_text(build())
    return int(stale and check)


if __name__ == "__main__":
    sys.exit(main())
