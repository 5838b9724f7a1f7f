"""Pages opened in Chromium, without a network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
DARK = "--blink-settings=preferredColorScheme=0"
PHONE = "--window-size=390,800"
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
READY = """
const all = (query, root = document) => [...root.querySelectorAll(query)];
const pixels = (canvas, across, down) => [...canvas.getContext("2d").getImageData(0, 0, across, down).data];
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
(async () => {
  while (!all("#grid canvas").length) await wait(10);
  const found = {};
  try { await visit(found); } catch (error) { found.error = String(error); }
  document.body.replaceChildren();
  document.body.dataset.found = JSON.stringify(found);
})();
"""


def visited(folder: Path, script: str, *options: str) -> dict[str, Any]:
    """Return what `async function visit(found)` of a script finds out on a run's page."""
    copy = folder / "visited.html"
    copy.write_text((folder / "report.html").read_text() + f"<script>{script}{READY}</script>")
    profile = f"--user-data-dir={folder / 'chromium'}"
    time = "--virtual-time-budget=20000"
    command = [CHROMIUM, *OPTIONS, *options, profile, time, "--dump-dom", copy.as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (result,) = re.findall(r'data-found="([^"]*)"', page)
    return json.loads(html.unescape(result))
