// SPDX-License-Identifier: Apache-2.0
// Grids of a trace (docs/gateway.md), drawn over a picture and looked up by place.

/** Whether each cell is left, from run lengths: dropped, kept, dropped, and so on. */
export function unpack(runs) {
  return runs === null ? null : runs.flatMap((length, index) => Array(length).fill(index % 2 === 1));
}

/** A trace with masks for run lengths, and only grids that have a place. */
export function readTrace(trace) {
  const grids = trace.grids
    .filter((grid) => grid.box !== null)
    .map((grid) => ({ ...grid, shallow: unpack(grid.kept_shallow), deep: unpack(grid.kept_deep) }));
  return { ...trace, grids };
}

/** Kinds of grids that a trace has, in the order of its tokens. */
export function kindsOf(trace) {
  return [...new Set(trace.grids.map((grid) => grid.kind))];
}

function edgesOf(grid, cell) {
  const row = Math.floor(cell / grid.columns);
  const { left, top, cell_width: width, cell_height: height } = grid.box;
  return [left + (cell % grid.columns) * width, top + row * height, width, height];
}

/** The grid of a kind and its cell at a place of the picture, in pixels; null: nothing there. */
export function cellAt(trace, kind, x, y) {
  for (const grid of trace.grids) {
    const column = Math.floor((x - grid.box.left) / grid.box.cell_width);
    const row = Math.floor((y - grid.box.top) / grid.box.cell_height);
    const inside = row >= 0 && row < grid.rows && column >= 0 && column < grid.columns;
    if (grid.kind === kind && inside) return { grid, cell: row * grid.columns + column };
  }
  return null;
}

/** Where a cell has its middle, in pixels of the picture. */
export function middleOf(grid, cell) {
  const [left, top, width, height] = edgesOf(grid, cell);
  return [left + width / 2, top + height / 2];
}

function heat(share) {
  // From dark blue over red to yellow: lightness grows with the score, for any eyes.
  return `hsl(${260 + 160 * share} 90% ${15 + 50 * share}% / 0.72)`;
}

function fillScores(context, grids) {
  const scores = grids.flatMap((grid) => grid.scores_shallow ?? []).filter((score) => score !== null);
  const sorted = [...scores].sort((a, b) => a - b);
  const rank = new Map(sorted.map((score, index) => [score, index / Math.max(1, sorted.length - 1)]));
  for (const grid of grids) {
    (grid.scores_shallow ?? []).forEach((score, cell) => {
      if (score === null) return;
      context.fillStyle = heat(rank.get(score));
      context.fillRect(...edgesOf(grid, cell));
    });
  }
}

function clearKept(context, grids, cut) {
  for (const grid of grids) {
    (grid[cut] ?? []).forEach((kept, cell) => {
      if (kept) context.clearRect(...edgesOf(grid, cell));
    });
  }
}

/**
 * Draw a view over a picture.
 * @param canvas over the picture, of its shape.
 * @param trace of the picture (`readTrace`).
 * @param view "picture", "shallow", "deep" or "scores".
 * @param kind of the grids that are shown.
 * @param chosen {grid, cell} that is marked, or null.
 */
export function draw(canvas, trace, view, kind, chosen) {
  const bounds = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(bounds.width * ratio);
  canvas.height = Math.round(bounds.height * ratio);
  const context = canvas.getContext("2d");
  if (trace === null || !trace.width) return;
  context.scale(canvas.width / trace.width, canvas.height / trace.height);
  const grids = trace.grids.filter((grid) => grid.kind === kind);
  if (view === "scores") fillScores(context, grids);
  if (view === "shallow" || view === "deep") {
    context.fillStyle = "rgb(12 16 24 / 0.8)";
    const known = grids.some((grid) => grid[view] !== null);
    if (known) context.fillRect(0, 0, trace.width, trace.height); // also what no cell covers
    if (known) clearKept(context, grids, view);
  }
  if (chosen !== null) {
    const line = (2 * trace.width) / bounds.width;
    for (const [style, width] of [["black", 2 * line], ["white", line]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.strokeRect(...edgesOf(chosen.grid, chosen.cell));
    }
  }
}
