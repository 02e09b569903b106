"""Take the pictures of the MLflow UI in README and docs, from any store that holds a sweep of ours.

    python docs/screenshots.py --tracking-uri sqlite:///mlflow.db --experiment llmbench --out docs/images

Pictures: compare.png (the published comparison view), run.png (a run with its description and metrics), charts.png (a
chart among its artifacts), runs.png (the runs as a table), texts.png (the answers side by side, if they are text). If
the store has a registered version of ours and the recommendation that it came from, also recommendation.png and
front.png (the recommendation's text and chart among the artifacts of the sweep's run), model.png (the registered model
with its aliases) and version.png (the champion's page). `--only` selects some of them.

Needs selenium, Chromium and its driver, which are not dependencies of the package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.records.metrics import OUTPUT_RATE
from mlflow_llmbench.tracking import view

WIDTH = 1440
CHART = "charts/memory_timeline.svg"
PREVIEWED = "img[src^='blob:'], img[src^='data:'], img[src*='artifact']"
PATIENCE_S = 120
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

VISITED = {
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
    "mlflow.assistant.panelOpen_v1": False,
    "mlflow.workflowType_v1": "machine_learning",
}
"""Local storage of a browser that has visited the UI before: the assistant is closed, training runs are shown."""

HIDDEN = ".modebar, [data-assistant-ui] { display: none !important }"
"""CSS that hides Plotly's tools, which a user sees only on hover, and the assistant's floating button."""

CLICKED = r"""
const buttons = [...document.querySelectorAll('button')];
const named = text => buttons.filter(button => button.textContent.trim() === text);
named('Show more').forEach(button => button.click());
for (const leave of named('Exit shared view')) {
  let box = leave.parentElement, cross = null;
  const nameless = button => !button.textContent.trim();
  while (box && !(cross = [...box.querySelectorAll('button')].find(nameless))) box = box.parentElement;
  if (cross) cross.click();
}
for (const text of document.querySelectorAll('span, div')) {
  if (!text.children.length && text.textContent.startsWith('Path:')) text.parentElement.style.visibility = 'hidden';
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const shown = walker.currentNode.nodeValue, short = shown.replace(/(?<![\w:.\/])\/(?:[\w.-]+\/)+/g, '');
  if (short !== shown) walker.currentNode.nodeValue = short;
}
"""
"""JavaScript that opens long descriptions, closes the banner of a shared view (by its only button without a text),
hides the local path of an artifact, and shortens the path of a local model to the folder's name."""


@contextlib.contextmanager
def server(uri: str) -> Iterator[str]:
    """Yield the address of a UI for the store: the store's own, or a server on loopback that ends with the block."""
    if uri.startswith(("http://", "https://")):
        yield uri.rstrip("/")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri),
        *("--host", "127.0.0.1", "--port", port, "--workers", "1"),
    ]
    with tempfile.TemporaryFile() as log:
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            _until_healthy(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def _until_healthy(address: str, process: subprocess.Popen[bytes], log: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(0.5)
    log.seek(0)
    sys.exit(f"The MLflow server did not start:\n{log.read().decode(errors='replace')[-2000:]}")


def pages(uri: str, experiment: str) -> dict[str, tuple[str, int, str]]:
    """Picture → URL fragment, height in pixels, and the CSS selector of an element that must be drawn."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        sys.exit(f"The store {uri} has no experiment {experiment}. Name one with --experiment.")
    views = {
        key.removeprefix(view.TAG): json.loads(value)
        for key, value in found.tags.items()
        if key.startswith(view.TAG + view.OURS)
    }
    if not views:
        sys.exit(f"The experiment {experiment} has no view of ours. Run a sweep into it first, which publishes one.")
    view_id = max(views, key=lambda one: int(views[one]["updatedAt"]))
    cells = client.search_runs(
        [found.experiment_id],
        json.loads(views[view_id]["state"])["searchFilter"],
        order_by=[f"metrics.`{OUTPUT_RATE.key()}` DESC"],
    )
    measured = [run.info.run_id for run in cells if run.data.tags.get("llmbench.outcome") == "ok"]
    if not measured:
        sys.exit(f"No cell of the newest sweep in {experiment} was measured. Run a sweep that succeeds first.")
    charts = [item.path for item in client.list_artifacts(measured[0], "charts")]
    if not charts:
        sys.exit(
            f"The run {measured[0]} has no charts in {found.artifact_location}. "
            "Check that its artifacts were not moved."
        )
    chart = CHART if CHART in charts else charts[0]
    fragment = view.link(found.experiment_id, view_id)
    run = f"#/experiments/{found.experiment_id}/runs/{measured[0]}"
    return {
        "compare.png": (fragment, 1400, ".js-plotly-plot .main-svg"),
        "run.png": (run, 1000, "[role=row], table"),
        "charts.png": (f"{run}/artifacts/{chart}", 800, PREVIEWED),
        "runs.png": (fragment.replace("=CHART", "=TABLE"), 700, ".ag-row"),
        "texts.png": (fragment.replace("=CHART", "=ARTIFACT"), 800, "input[placeholder^='Filter by']:not([disabled])"),
    } | decision_pages(client)


def decision_pages(client: Any) -> dict[str, tuple[str, int, str]]:
    """Pages as above for our newest champion and the recommendation of its sweep.

    Empty without a champion; without a recommendation only the pages of the model.
    """
    champions = [
        (model.name, version)
        for model in client.search_registered_models()
        for alias, version in model.aliases.items()
        if alias == "champion"
    ]
    found = [client.get_model_version(name, version) for name, version in champions]
    ours = [version for version in found if "llmbench.run_id" in version.tags]
    if not ours:
        return {}
    champion = max(ours, key=lambda version: int(version.creation_timestamp))
    told = {
        "model.png": (f"#/models/{champion.name}", 900, "table, [role=table]"),
        "version.png": (f"#/models/{champion.name}/versions/{champion.version}", 1000, "table, [role=table]"),
    }
    run = client.get_run(champion.tags["llmbench.run_id"])
    parent = run.data.tags.get("mlflow.parentRunId", run.info.run_id)
    if "recommendation.md" not in {item.path for item in client.list_artifacts(parent)}:
        return told
    artifacts = f"#/experiments/{run.info.experiment_id}/runs/{parent}/artifacts"
    told["recommendation.png"] = (
        f"{artifacts}/recommendation.md",
        800,
        ".mlflow-ui-container h1, .artifact-view h1, h1",
    )
    told["front.png"] = (f"{artifacts}/charts/recommendation.svg", 800, PREVIEWED)
    return told


def browser(profile: str) -> Any:
    """Start a headless Chromium with its profile in the folder `profile`; use it in a `with` block."""
    try:
        from selenium import webdriver
    except ImportError:
        sys.exit("selenium is not installed. Try: pip install selenium")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        missing = "chromedriver" if binary else "Chromium"
        sys.exit(f"{missing} is not on PATH. Install the packages chromium and chromium-driver, or similar ones.")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def picture(driver: Any, address: str, height: int, awaited: str) -> bytes:
    """Take a PNG of a page once the element `awaited` exists and the page has stopped changing."""
    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get("about:blank")
    driver.get(address)
    last, end = b"", time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(1.5)
        if not driver.find_elements("css selector", awaited):
            continue
        driver.execute_script(CLICKED)
        driver.execute_script(
            "const style = document.createElement('style'); style.textContent = arguments[0];"
            "document.head.append(style)",
            HIDDEN,
        )
        shot = bytes(driver.get_screenshot_as_png())
        if shot == last:
            return shot
        last = shot
    seen = driver.find_element("tag name", "body").text[:500]
    sys.exit(f"{address} was not drawn within {PATIENCE_S} s. The page shows:\n{seen}")


def main() -> None:
    """Parse the arguments, start a browser and a server, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db")
    parser.add_argument("--experiment", default="llmbench")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", metavar="NAMES", help="with commas: model.png,version.png")
    given = parser.parse_args()
    wanted = pages(given.tracking_uri, given.experiment)
    if given.only:
        missing = sorted(set(given.only.split(",")) - wanted.keys())
        if missing:
            sys.exit(f"The store has nothing for {', '.join(missing)}. It has pages for {', '.join(wanted)}.")
        wanted = {name: wanted[name] for name in given.only.split(",")}
    given.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browser(profile) as driver,
        server(given.tracking_uri) as address,
    ):
        driver.get(f"{address}/health")
        for key, value in VISITED.items():
            driver.execute_script("localStorage.setItem(arguments[0], arguments[1])", key, json.dumps(value))
        for name, (fragment, height, awaited) in wanted.items():
            (given.out / name).write_bytes(picture(driver, f"{address}/{fragment}", height, awaited))
            print(given.out / name)


if __name__ == "__main__":
    main()
