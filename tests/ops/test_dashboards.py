# SPDX-License-Identifier: Apache-2.0
"""Every query of every dashboard, evaluated by the real Prometheus over a gateway under load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard as Model

from deploy.grafana import generate
from deploy.grafana.dashboards import DASHBOARDS
from deploy.grafana.panels import Dashboard, Panel
from tests.ops.conftest import ROOT, Prometheus, eventually

FILES = sorted((ROOT / "deploy" / "grafana" / "json").glob("*.json"))
PANELS = [
    pytest.param(panel, id=f"{dashboard.uid}-{number}-{panel.title.replace(' ', '_')}")
    for dashboard in DASHBOARDS
    for number, panel in enumerate(dashboard.panels)
]
_UNITS = {
    "short", "reqps", "ops", "s", "bytes", "Bps", "flops", "percentunit", "suffix: x",
}  # fmt: skip


def substituted(query: str, target: str, chosen: bool) -> str:
    """A query as Grafana sends it, with all or one of each variable's values chosen."""
    instance = target.replace(".", r"\\.")
    values = {
        "$__rate_interval": "15s",
        "$__range": "1m",
        "$job": "himap" if chosen else "(himap)",
        "$model": "tiny" if chosen else ".*",
        "$instance": instance if chosen else ".*",
    }
    for name, value in values.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


def panels(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Panels of a dashboard's JSON that ask something."""
    return [panel for panel in node["panels"] if panel.get("targets")]


def test_the_committed_dashboards_are_those_that_the_script_makes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().out
    assert len(FILES) == len(DASHBOARDS)


def test_a_changed_dashboard_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in FILES:
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    assert generate.main(["--check"]) == 0
    (tmp_path / FILES[0].name).write_text("{}")
    (tmp_path / "left-over.json").write_text("{}")
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in FILES]
    assert generate.main(["--check"]) == 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_grafanas_types_know_every_field(file: Path) -> None:
    """Read into the types that Grafana's schema is published as, nothing is lost."""
    source = json.loads(file.read_text())
    again = json.loads(JSONEncoder().encode(Model.from_json(source)))
    assert again == source
    assert source["schemaVersion"] >= 36
    positions = [tuple(panel["gridPos"].values()) for panel in source["panels"]]
    assert len(set(positions)) == len(positions)
    for panel in source["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    assert len({panel["id"] for panel in source["panels"]}) == len(source["panels"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_conventions(file: Path) -> None:
    source = json.loads(file.read_text())
    names = [variable["name"] for variable in source["templating"]["list"]]
    assert names == ["datasource", "job", "model", "instance"]
    for panel in panels(source):
        assert re.search(r"[.)] Metric: `[^`]+`(, `[^`]+`)*$", panel["description"]), panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in _UNITS
        assert defaults["noValue"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert "rate(" not in target["expr"] or "$__rate_interval" in target["expr"]


def test_variables_find_the_gateway(prometheus: Prometheus) -> None:
    expected = {"job": ["himap"], "model": ["tiny"], "instance": [prometheus.target]}
    for name, _, query in generate.VARIABLES:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert match is not None
        series, label = match.groups()
        series = substituted(series, prometheus.target, chosen=False)

        def look(series: str = series, label: str = label) -> Any:
            return prometheus.get(f"label/{label}/values", **{"match[]": series})

        assert eventually(look) == expected[name]


@pytest.mark.parametrize("panel", PANELS)
def test_every_query_shows_data(prometheus: Prometheus, panel: Panel) -> None:
    for chosen in (False, True):
        for query in panel.queries:
            expr = substituted(query.expr, prometheus.target, chosen)
            if panel.idle_only is not None:
                assert prometheus.values(expr) == [], "declared empty, and is not"
                continue
            values = eventually(prometheus.values, expr)
            assert values, f"no data, or NaN only: {expr}"
            if panel.unit == "percentunit":
                assert all(0 <= value <= 1 for value in values), expr
            else:
                assert all(value >= 0 for value in values), expr


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_every_metric_exists(prometheus: Prometheus, dashboard: Dashboard) -> None:
    asked = {name for panel in dashboard.panels for name in panel.metrics}
    assert asked
    # Prometheus makes this one of the alerts that fire.
    missing = eventually(lambda: not asked - {"ALERTS"} - prometheus.names())
    assert missing, asked - prometheus.names()


def test_pruned_and_not_pruned_are_both_there(prometheus: Prometheus) -> None:
    """The load has what the dashboards tell apart; else the tests above show less than they say."""
    for flag in ("true", "false", "no_images"):
        expr = f'himap_time_to_first_token_seconds_count{{pruned="{flag}"}} > 0'
        assert eventually(prometheus.values, expr)
    for reason in ("invalid", "image_host", "key", "rate"):
        expr = f'himap_refused_requests_total{{reason="{reason}"}} > 0'
        assert eventually(prometheus.values, expr), reason
    assert eventually(prometheus.values, "himap_kv_blocks_saved_total > 0")


def test_grafana_is_told_of_prometheus_and_of_the_dashboards() -> None:
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    deployed = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    # $__rate_interval is four times this.
    assert source["jsonData"]["timeInterval"] == deployed["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "himap.yml").read_text())["providers"]
    assert provider["type"] == "file"
