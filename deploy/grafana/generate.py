# SPDX-License-Identifier: Apache-2.0
"""Write the dashboards' JSON: `python -m deploy.grafana.generate [--check]`.

Edit dashboards.py, not the JSON. `--check` changes nothing and fails if a file is not current.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, text
from grafana_foundation_sdk.builders import timeseries as graph
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from .dashboards import DASHBOARDS
from .panels import Dashboard, Panel, Query

FOLDER = Path(__file__).parent / "json"

_NO_TRAFFIC = "No traffic"
_DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHTS = {"stat": 4, "graph": 8, "table": 8}
VARIABLES = (
    ("job", "Job", "label_values(himap_requests_in_flight, job)"),
    ("model", "Model", 'label_values(himap_requests_in_flight{job=~"$job"}, model_name)'),
    (
        "instance",
        "Instance",
        'label_values(himap_requests_in_flight{job=~"$job", model_name=~"$model"}, instance)',
    ),
)


def _target(query: Query, index: int, instant: bool) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(_DATASOURCE).ref_id(chr(ord("A") + index))
    target = target.expr(query.expr).legend_format(query.legend or "__auto")
    return target.instant() if instant else target.range()


def _thresholds(limits: tuple[float, float] | None) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=None, color="green")]
    if limits is not None:
        steps += [
            models.Threshold(value=limits[0], color="orange"),
            models.Threshold(value=limits[1], color="red"),
        ]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _panel(panel: Panel) -> Any:
    kinds: dict[str, Any] = {"stat": stat.Panel, "graph": graph.Panel, "table": table.Panel}
    builder = kinds[panel.kind]()
    nan = models.DashboardSpecialValueMapOptions(
        match=models.SpecialValueMatch.NULL_AND_NAN,
        result=models.ValueMappingResult(text=_NO_TRAFFIC, color="text", index=0),
    )
    builder = (
        builder.title(panel.title)
        .description(panel.description)
        .datasource(_DATASOURCE)
        .unit(panel.unit)
        .span(panel.width)
        .height(_HEIGHTS[panel.kind])
        .no_value(_NO_TRAFFIC if panel.idle_only is None else "None")
        .mappings([models.SpecialValueMap(options=nan)])
    )
    for index, query in enumerate(panel.queries):
        target = _target(query, index, instant=panel.kind != "graph")
        if panel.kind == "table":
            target = target.format(PromQueryFormat.TABLE)
        builder = builder.with_target(target)
    if panel.kind == "stat":
        return builder.thresholds(_thresholds(panel.limits)).reduce_options(
            common.ReduceDataOptions().calcs(["last"])
        )
    if panel.kind == "table":
        return builder
    if panel.unit == "percentunit":
        builder = builder.max(1)
    if panel.stacked:
        builder = builder.stacking(
            common.StackingConfig().mode(common_models.StackingMode.NORMAL)
        ).fill_opacity(30)
    return (
        builder.min(0)
        .show_points(common_models.VisibilityMode.NEVER)
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
        )
    )


def _variables(builder: dashboard.Dashboard) -> dashboard.Dashboard:
    builder = builder.with_variable(
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    )
    for name, label, query in VARIABLES:
        variable = (
            dashboard.QueryVariable(name)
            .label(label)
            .query(query)
            .datasource(_DATASOURCE)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
        )
        if name != "job":
            # The plugin's counters have no model. Not so for the job: `.*` would count targets
            # that are none of ours among the unreachable.
            variable = variable.all_value(".*")
        builder = builder.with_variable(variable)
    return builder


def build(source: Dashboard) -> str:
    """A dashboard's JSON."""
    builder = (
        dashboard.Dashboard(source.title)
        .uid(source.uid)
        .tags(["himap"])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-1h", "now")
        .link(
            dashboard.DashboardLink("HiMAP")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["himap"])
            .include_vars(True)
            .keep_time(True)
        )
    )
    builder = _variables(builder)
    notes = text.Panel().content(source.notes).title("How to read this").span(24).height(4)
    identifiers = itertools.count(1)  # stable, for links to a panel
    builder = builder.with_panel(notes.id(next(identifiers)))
    for row in source.rows:
        builder = builder.with_row(dashboard.Row(row.title).id(next(identifiers)))
        for panel in row.panels:
            builder = builder.with_panel(_panel(panel).id(next(identifiers)))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args(argv).check
    wanted = {FOLDER / f"{source.uid}.json": build(source) for source in DASHBOARDS}
    stale = [path for path, new in wanted.items() if not path.exists() or path.read_text() != new]
    stale += [path for path in FOLDER.glob("*.json") if path not in wanted]
    for path in stale:
        if check:
            print(f"{path.name} is not current: run python -m deploy.grafana.generate")
        elif path in wanted:
            path.write_text(wanted[path])
        else:
            path.unlink()
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
