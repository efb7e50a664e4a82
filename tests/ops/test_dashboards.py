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
from tests.ops.conftest import ROOT, Prometheus, eventually, promtool

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
    for outcome in ("pruned", "reused", "unpruned"):
        expr = f'himap_image_tokens_by_outcome_total{{outcome="{outcome}"}} > 0'
        assert eventually(prometheus.values, expr), outcome
    assert eventually(prometheus.values, "himap_kv_blocks_saved_total > 0")


_ENGINES = {
    "a": ("himap", 100, 50, 20),
    "b": ("himap", 300, 150, 20),
    "c": ("uniform+himap", 100, 90, 45),
}
"""By instance: its criteria, and image tokens per second in each stage."""
_OUTCOMES = {"pruned": (30, 20), "reused": (40, 0), "unpruned": (0, 10)}
"""Image tokens per second that the instances a and b are asked with."""


def test_shares_by_criterion_and_by_outcome(tmp_path: Path) -> None:
    """By Prometheus' own arithmetic: instances are summed before they are divided."""
    (savings,) = (dashboard for dashboard in DASHBOARDS if dashboard.uid == "himap-savings")
    of = {panel.title: panel.queries for panel in savings.panels}
    series = {}
    for name, (criterion, *tokens) in _ENGINES.items():
        target = f'job="himap", instance="{name}"'
        series[f'himap_info{{{target}, model_name="tiny", criterion="{criterion}"}}'] = "1x20"
        series[f'himap_requests_in_flight{{{target}, model_name="tiny"}}'] = "0x20"
        for stage, count in enumerate(tokens):
            series[f'himap_image_tokens_total{{{target}, stage="{stage}"}}'] = f"0+{count}x20"
    for outcome, counts in _OUTCOMES.items():
        for name, count in zip(_ENGINES, counts, strict=False):
            labels = f'job="himap", instance="{name}", outcome="{outcome}"'
            series[f"himap_image_tokens_by_outcome_total{{{labels}}}"] = f"0+{count}x20"
    first_cut, second_cut = of["Share kept, by criterion"]
    (by_outcome,) = of["Image tokens brought, by outcome"]
    expected = {
        first_cut: {'{criterion="himap"}': 0.5, '{criterion="uniform+himap"}': 0.9},
        second_cut: {'{criterion="himap"}': 0.1, '{criterion="uniform+himap"}': 0.45},
        by_outcome: {
            '{outcome="pruned"}': 0.5, '{outcome="reused"}': 0.4, '{outcome="unpruned"}': 0.1,
        },
    }  # fmt: skip
    checks = [
        {
            # promtool compares to the last bit.
            "expr": f"round({substituted(query.expr, '.*', chosen=False)}, 0.0001)",
            "eval_time": "15s",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in one.items()],
        }
        for query, one in expected.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    tests = [{"interval": "1s", "input_series": inputs, "promql_expr_test": checks}]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "1s", "tests": tests}))
    promtool("test", "rules", str(file))


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
