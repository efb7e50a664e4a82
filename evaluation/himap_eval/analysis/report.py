# SPDX-License-Identifier: Apache-2.0
"""What `himap analyze` writes: JSON, Markdown, and a page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from himap_vllm.plan.prompt import Ratios

from ..tables import markdown_table, percent, to_json
from .cuts import Cuts, MemoryCost, memory_cost
from .findings import EffectMeans, LayerMeans, as_lists
from .measure import FloatArray
from .svg import STYLE, heat_map, line_chart

_COLUMNS = (
    "S_vv", "S_vt", "S_tt", "bias", "text_to_image", "image_to_image", "entropy_text",
    "similarity_text", "similarity_image",
)  # fmt: skip
_CAUTION = (
    "S and the bias ratio are sums of attention, without the gradient that the paper weighs it "
    "with: compare layers with each other, not with the paper's numbers. Losses are measured."
)


@dataclass(frozen=True)
class Analysis:
    """All findings.

    Attributes:
        about: model, data and number of questions.
        layers: means by layer.
        effects: of blocked flows, by name.
        from_text: [num_layers, places] attention from the instruction by place in the image.
        from_image: [num_layers, places] likewise from image rows.
        shift_layer: see `findings.shift_layer`.
        ratios: that cuts are recommended for.
        recommended: cuts.
        default: the engine's default cuts.
        cuts: all of them.
    """

    about: dict[str, Any]
    layers: list[LayerMeans]
    effects: dict[str, list[EffectMeans]]
    from_text: FloatArray
    from_image: FloatArray
    shift_layer: int
    ratios: Ratios
    recommended: Cuts
    default: Cuts
    cuts: list[Cuts]

    def memory(self, cuts: Cuts) -> MemoryCost:
        """What cuts cost the KV cache."""
        return memory_cost(cuts.shallow_layer, cuts.deep_layer, len(self.layers))


def write(folder: Path, analysis: Analysis) -> str:
    """Write `analysis.json`, `.md` and `.html`; returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = asdict(analysis)
    for name in ("from_text", "from_image"):
        raw[name] = as_lists(getattr(analysis, name), 2)
    for name in ("recommended", "default"):
        raw[name] |= asdict(analysis.memory(getattr(analysis, name)))
    (folder / "analysis.json").write_text(to_json(_rounded(raw)))
    (folder / "analysis.md").write_text(_markdown(analysis))
    (folder / "analysis.html").write_text(_page(analysis))
    return "\n".join(summary(analysis))


def summary(analysis: Analysis) -> list[str]:
    """The findings in sentences."""
    best, default = analysis.recommended, analysis.default
    num_layers = len(analysis.layers)
    dropped = analysis.effects["dropped"]
    least = dropped[0].loss
    free = next((one.layers[0] for one in dropped if one.loss < 0.05 * least), num_layers)
    shift = (
        f"The shift is at layer {analysis.shift_layer} of {num_layers}: before it, blocking image "
        "to text costs more, from there on blocking image to image does."
    )
    if analysis.shift_layer == num_layers:
        shift = "There is no shift: blocking image to image costs no more than image to text."
    lines = [
        shift,
        f"Without any image the answer loses {least:.2f} nats. Images dropped from layer {free} on "
        "cost less than a twentieth of that.",
    ]
    for name, cuts in (("Recommended", best), ("The engine's default", default)):
        memory = analysis.memory(cuts)
        lines.append(
            f"{name} for ratios {analysis.ratios}: K1 = {cuts.shallow_layer}, K2 = "
            f"{cuts.deep_layer}. HiMAP's choice would lose {percent(cuts.lost)} of the reading of "
            f"images (predicted), and leave {percent(cuts.token_layers)} of the image "
            f"token-layers. KV cache groups: {memory.num_groups}, or {memory.num_groups_few} with "
            f'kv_grouping "few"; {percent(memory.wasted)} of the memory wasted.'
        )
    return lines


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _title(analysis: Analysis) -> str:
    return f"Where {analysis.about['model']} reads its images"


def _tables(analysis: Analysis) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, head and rows of each table."""
    layers = [
        [str(one.layer), *(_number(getattr(one, name)) for name in _COLUMNS)]
        for one in analysis.layers
    ]
    effects = [
        [
            f"{one.layers[0]}-{one.layers[1] - 1}",
            *(
                f"{own.loss:z.2f} ± {own.error:.2f}, {percent(own.same, 0)}"
                for own in (one, analysis.effects["image_to_image"][place])
            ),
            f"{analysis.effects['dropped'][place].loss:.2f}, "
            f"{percent(analysis.effects['dropped'][place].same, 0)}",
        ]
        for place, one in enumerate(analysis.effects["image_to_text"])
    ]
    ranked = sorted(analysis.cuts, key=lambda one: one.lost + one.token_layers)[:8]
    cuts = [
        [f"{one.shallow_layer}, {one.deep_layer}", percent(one.lost), percent(one.token_layers),
         str(analysis.memory(one).num_groups), percent(analysis.memory(one).wasted)]
        for one in ranked
    ]  # fmt: skip
    return [
        ("Attention by layer", ["layer", *_COLUMNS], layers),
        (
            "Blocked flows: nats that the answer loses, share of answers that stay the same",
            ["layers", "image to text", "image to image", "images dropped from here on"],
            effects,
        ),
        (
            f"Cuts for ratios {analysis.ratios}",
            ["K1, K2", "reading lost (predicted)", "image token-layers", "KV groups", "KV waste"],
            cuts,
        ),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _source(analysis: Analysis) -> str:
    about = analysis.about
    return f"{about['model']}; {about['data']}: {about['num_questions']} questions. {_CAUTION}"


def _markdown(analysis: Analysis) -> str:
    parts = [f"# {_title(analysis)}", _source(analysis)]
    parts.append("\n".join(f"- {line}" for line in summary(analysis)))
    for title, head, rows in _tables(analysis):
        parts += [f"## {title}", markdown_table(head, rows)]
    return "\n\n".join(parts) + "\n"


def _charts(analysis: Analysis) -> list[tuple[str, str, str]]:
    """Title, text and SVG of each chart."""
    layers, effects = analysis.layers, analysis.effects
    best = analysis.recommended
    cuts = {"K1": best.shallow_layer - 0.5, "K2": best.deep_layer - 0.5}
    starts = [one.layers[0] for one in effects["dropped"]]

    def lines(*names: str) -> dict[str, list[float | None]]:
        return {name: [getattr(one, name) for one in layers] for name in names}

    def losses(*names: str) -> dict[str, list[float | None]]:
        return {name.replace("_", " "): [one.loss for one in effects[name]] for name in names}

    blocked = losses("image_to_text", "image_to_image"), "nats", starts, cuts
    attention = lines("text_to_image", "image_to_image"), "", None, cuts
    states = lines("similarity_text", "similarity_image"), "", None, cuts
    charts = [
        ("Blocked flows", "What the answer loses if a flow is blocked in one window of layers.",
         line_chart("Blocked flows", *blocked)),
        ("Images dropped", "What the answer loses if no text reads an image from a layer on.",
         line_chart("Images dropped", losses("dropped"), "nats", starts, cuts)),
        ("Attention to images", "Share of its attention that a row pays to images.",
         line_chart("Attention to images", *attention)),
        ("Similarity", "Cosine of a token's state before and behind a layer.",
         line_chart("Similarity", *states)),
    ]  # fmt: skip
    for name, rows in (("the text", analysis.from_text), ("the image", analysis.from_image)):
        title = f"Attention from {name}, by place"
        text = "A row for each layer; the first token of an image is on the left."
        charts.append((title, text, heat_map(title, rows.tolist(), "place in the image")))
    return charts


def _page(analysis: Analysis) -> str:
    body = [f"<h1>{escape(_title(analysis))}</h1>", f"<p>{escape(_source(analysis))}</p>", "<ul>"]
    body += [f"<li>{escape(line)}</li>" for line in summary(analysis)]
    body.append("</ul>")
    for title, text, chart in _charts(analysis):
        body.append(f"<h2>{escape(title)}</h2><p>{escape(text)}</p>{chart}")
    for title, head, rows in _tables(analysis):
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        body.append(f"<h2>{escape(title)}</h2><div><table><tr>{cells}</tr>")
        for row in rows:
            body.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
        body.append("</table></div>")
    return _PAGE.format(title=escape(_title(analysis)), style=STYLE, body="\n".join(body))


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; }}
td, th {{ padding: 2px 8px; text-align: right; }}
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
