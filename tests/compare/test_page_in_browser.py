"""The page of a comparison in a browser: no error of its script, nothing cut at two widths, columns that sort."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run

from bkn_core.compare.report import publish, with_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
const results = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, root = page.documentElement;
  const heads = [...page.querySelectorAll("table.sortable thead th")];
  const column = heads.find((head) => head.textContent.startsWith("top-1"));
  const rows = column.closest("table").tBodies[0].rows;
  const values = () => [...rows].map((row) => row.cells[column.cellIndex].dataset.value);
  const orders = [values()];
  for (const _ of [1, 2]) { column.querySelector("button").click(); orders.push(values()); }
  const errors = frame.contentWindow.errors;
  results[frame.width] = { width: root.clientWidth, needed: root.scrollWidth, errors, orders };
}
document.body.textContent = "";
const answer = document.createElement("pre");
answer.textContent = JSON.stringify(results);
document.body.append(answer);
"""


def in_browser(page: str, folder: Path) -> dict[str, Any]:
    """What the probe finds in a page that is 390 and 1280 pixels wide."""
    watched = page.replace(
        "<head>", "<head><script>errors = []; onerror = (text) => { errors.push(text); };</script>", 1
    )
    frames = "".join(
        f'<iframe width="{width}" height="800" srcdoc="{html.escape(watched)}"></iframe>' for width in (390, 1280)
    )
    probe = folder / "probe.html"
    probe.write_text(f'<meta charset="utf-8"><body>{frames}<script>onload = () => {{{PROBE}}};</script></body>')
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run([str(BROWSER), *flags, probe.as_uri()], capture_output=True, text=True, timeout=400)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return dict(json.loads(html.unescape(found[1])))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: install the package chromium")
def test_nothing_is_cut_and_columns_sort(tmp_path: Path) -> None:
    cells = [
        make_run(
            tmp_path / f"{norm}{size}-{'long' * 30}", [f"norm.kind={norm}", f"batch.statistics={size}"], accuracy=top1
        )
        for norm, size, top1 in (("bn", 2, 0.3), ("bn", 32, 0.6), ("gn", 2, 0.4), ("bkn", 2, 0.5))
    ]
    result = with_page(publish(tmp_path, cells), measure=False, trusted=False)
    for width, found in in_browser(result.artifacts["page"].read_text(), tmp_path).items():
        assert found["errors"] == []
        assert 0 < found["needed"] <= found["width"] <= int(width)
        before, up, down = ([float(value) for value in order] for order in found["orders"])
        assert up == sorted(before) and down == sorted(before, reverse=True) and len(set(up)) == 4
