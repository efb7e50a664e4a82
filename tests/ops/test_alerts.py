# SPDX-License-Identifier: Apache-2.0
"""Prometheus' configuration, rules and alerts, by Prometheus' own tools."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.ops.conftest import PROMETHEUS, ROOT, Prometheus, eventually, promtool

RULES = {
    file: yaml.safe_load((PROMETHEUS / "rules" / f"{file}.yml").read_text())["groups"][0]["rules"]
    for file in ("recording", "alerts")
}
ALERTS = {rule["alert"]: rule for rule in RULES["alerts"]}
TESTS: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "tests" / "alerts.yml").read_text())[
    "tests"
]


def test_configuration_and_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    out = promtool("check", "rules", "rules/recording.yml", "rules/alerts.yml")
    assert f"SUCCESS: {len(ALERTS)} rules found" in out


def test_alerts_fire_and_stay_quiet() -> None:
    promtool("test", "rules", "tests/alerts.yml")
    fire, quiet = set(), set()
    for number, case in enumerate(TESTS):
        for check in case["alert_rule_test"]:
            if check.get("exp_alerts"):
                fire.add(check["alertname"])
            elif number == 0:
                quiet.add(check["alertname"])
    assert fire == quiet == set(ALERTS)


def test_every_recording_rule_has_an_expected_value() -> None:
    expected = " ".join(check["expr"] for check in TESTS[0]["promql_expr_test"])
    for rule in RULES["recording"]:
        assert rule["record"] in expected


def test_every_alert_has_a_section_in_the_runbooks() -> None:
    sections = set()
    for line in (ROOT / "docs" / "runbooks.md").read_text().splitlines():
        if line.startswith("## "):
            sections.add(line.removeprefix("## "))
    assert sections == set(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{name.lower()}"
        assert rule["labels"]["severity"] in {"warning", "critical"}


@pytest.mark.parametrize("rule", RULES["recording"], ids=lambda rule: rule["record"])
def test_recording_rules_record(prometheus: Prometheus, rule: dict[str, str]) -> None:
    values = eventually(prometheus.values, rule["record"])
    assert values
    assert all(value >= 0 for value in values)


def test_alerts_ask_for_metrics_that_exist(prometheus: Prometheus) -> None:
    asked = set()
    for rule in (*RULES["alerts"], *RULES["recording"]):
        asked |= set(re.findall(r"\b(?:himap_|vllm:|job_model\w*:)[\w:]*|\bup\b", rule["expr"]))
    assert len(asked) > 10
    assert eventually(lambda: asked <= prometheus.names()), asked - prometheus.names()


def test_nothing_is_wrong_with_a_healthy_service(prometheus: Prometheus) -> None:
    assert eventually(prometheus.values, 'up{job="himap"} == 1')
    groups = prometheus.get("rules")["groups"]
    assert all(rule["health"] != "err" for group in groups for rule in group["rules"])
    firing = [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]
    assert firing == []
